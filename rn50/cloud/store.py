"""Where a run on EC2 keeps its things in S3, and what it has cost: what tools/ec2.py and the instance share.

s3://BUCKET/rn50/betons/                        what to train from
s3://BUCKET/rn50/code/COMMIT.tar.gz             the tree at a commit
s3://BUCKET/rn50/runs/RUN/launch.json           what was asked for
s3://BUCKET/rn50/runs/RUN/instances/ID.json     an instance: price, since when, when last seen, what it does
s3://BUCKET/rn50/runs/RUN/{last.pt, log.jsonl, status.json, console.log, ...}
s3://BUCKET/rn50/runs/RUN/tuned.yaml            the fastest settings on its first instance, where that was asked for
s3://BUCKET/rn50/runs/RUN/stop                  is there while the run is asked to stop
s3://BUCKET/rn50/runs/RUN/ended                 how the run has ended, and why: no instance begins after it
s3://BUCKET/rn50/runs/RUN/holder                the one instance that may train
s3://BUCKET/rn50/runs/RUN/told                  the events that were mailed
s3://BUCKET/rn50/source/, rn50/partial/         what a conversion has fetched, and written so far
"""

import contextlib
import json
import os
import re
import shutil
import time
from email.utils import parsedate_to_datetime
from pathlib import Path

from rn50.cloud.advice import advice_in
from rn50.errors import RunError, UsageError
from rn50.files import sha256

PREFIX = "rn50"
BETONS, CODE, RUNS = f"{PREFIX}/betons", f"{PREFIX}/code", f"{PREFIX}/runs"
# What is small goes along with every checkpoint.
RECORDS = ("config.yaml", "environment.json", "log.jsonl", "status.json")
CONSOLE, SETUP_LOG, PROGRESS = "console.log", "rn50-bootstrap.log", "progress.json"
TUNED, PREFLIGHT = "tuned.yaml", "preflight.json"
# An instance's record is renewed every HEARTBEAT_SECONDS; one that is older than LOST_SECONDS counts as gone.
HEARTBEAT_SECONDS, LOST_SECONDS = 60.0, 300.0
# States in which an instance has ended, or is ending.
FINAL = ("finished", "budget", "failed", "stopped")
GONE = (*FINAL, "interrupted", "superseded")
# Objects of a run that say how it stands, and are no result.
SIGNS = ("stop", "ended", "holder", "told")
CONVERSION = "convert"  # the run's name that a conversion has
SPOT = "spot"  # what EC2's metadata calls the market; else on-demand
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
TUNING_SECONDS = 30.0  # tools/preflight.py --seconds: about five minutes for all it measures
SMALL = 4 << 20  # bytes of console.log that are kept in S3


def check_name(kind, value):
    """UsageError unless `value` is safe in a key, a tag and a shell."""
    if not NAME.fullmatch(value or ""):
        raise UsageError(f"{kind} {value!r} must be letters, digits, dots, dashes and underscores")
    return value


class Folder:
    """A part of a bucket. client: boto3's for S3; prefix: a key without a slash at its end."""

    def __init__(self, client, bucket, prefix):
        self.client, self.bucket, self.prefix = client, bucket, prefix

    def read(self, name):
        """The JSON value of an object, or None where there is none."""
        data = self.read_bytes(name)
        return None if data is None else json.loads(data)

    def read_bytes(self, name):
        try:
            return self.client.get_object(Bucket=self.bucket, Key=f"{self.prefix}/{name}")["Body"].read()
        except self.client.exceptions.NoSuchKey:
            return None

    def write(self, name, value):
        """Put a JSON value as an object."""
        self.write_bytes(name, json.dumps(value, indent=1).encode())

    def write_bytes(self, name, body):
        self.client.put_object(Bucket=self.bucket, Key=f"{self.prefix}/{name}", Body=body)

    def keys(self, under=""):
        """{name within the folder: bytes}."""
        return objects(self.client, self.bucket, f"{self.prefix}/{under}", strip=f"{self.prefix}/")


class Store(Folder):
    """The bucket's part that belongs to one run."""

    def __init__(self, client, bucket, run):
        super().__init__(client, bucket, f"{RUNS}/{run}")
        self.run = run

    def instances(self):
        """Records of the run's instances, oldest first."""
        records = [self.read(name) for name in self.keys("instances/")]
        return sorted((record for record in records if record), key=lambda record: record["started"])

    def claim(self, instance_id):
        """Make this instance the run's holder; returns None, or the id of the living one that holds it.

        S3 decides between two that ask at the same time. Who lives is told by S3's clock alone.
        """
        key = f"{self.prefix}/holder"
        try:
            reply = self.client.get_object(Bucket=self.bucket, Key=key)
            holder, condition = json.loads(reply["Body"].read())["instance_id"], {"IfMatch": reply["ETag"]}
        except self.client.exceptions.NoSuchKey:
            holder, condition = None, {"IfNoneMatch": "*"}
        if holder == instance_id:
            return None
        if holder and self._lives(holder):
            return holder
        try:
            body = json.dumps({"instance_id": instance_id}).encode()
            self.client.put_object(Bucket=self.bucket, Key=key, Body=body, **condition)
        except self.client.exceptions.ClientError as error:
            if error.response["Error"]["Code"] not in ("PreconditionFailed", "ConditionalRequestConflict"):
                raise
            return self.read("holder")["instance_id"]
        return None

    def _lives(self, instance_id):
        try:
            reply = self.client.get_object(Bucket=self.bucket, Key=f"{self.prefix}/instances/{instance_id}.json")
        except self.client.exceptions.NoSuchKey:
            return False
        now = parsedate_to_datetime(reply["ResponseMetadata"]["HTTPHeaders"]["date"])
        silent = (now - reply["LastModified"]).total_seconds()
        return json.loads(reply["Body"].read())["state"] not in GONE and silent <= LOST_SECONDS


def entries(client, bucket, prefix):
    """All objects under `prefix`, as S3 lists them: dicts with Key, Size and ETag."""
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    return [entry for page in pages for entry in page.get("Contents", [])]


def objects(client, bucket, prefix, strip=""):
    """{key without `strip`: bytes} of all objects under `prefix`."""
    return {entry["Key"].removeprefix(strip): entry["Size"] for entry in entries(client, bucket, prefix)}


def dollars(records):
    """What the instances of these records have cost, from their start to when they were last seen. Without storage."""
    return sum(max(0.0, r["seen"] - r["started"]) / 3600 * r["dollars_per_hour"] for r in records)


def warnings_of(rows):
    """[{"cause", "text"}] of what a run finds wrong with itself, by the newest row of its log."""
    found = rows[-1].get("forecast") if rows else None
    return found.get("warnings", []) if isinstance(found, dict) else []


def price_of(record, instance_type, market):
    """Dollars an hour that an instance of a launch record counts with. market: as EC2's metadata calls it, or None."""
    if market and market != SPOT:
        return record.get("dollars_on_demand") or record["dollars_per_hour"]
    return record.get("types", {}).get(instance_type) or record["dollars_per_hour"]


def group_of(record, market):
    """The Auto Scaling group that launched an instance of a launch record, or None."""
    groups = record.get("groups") or [None]
    return groups[0] if market == SPOT else groups[-1]


def instance_record(environment, dollars_per_hour):
    """What an instance's record begins with. environment: with the variables of first_boot.sh."""
    # a try without an instance has an old machine around it
    up = 0.0 if environment.get("RN50_PREFIX") else float(Path("/proc/uptime").read_text().split()[0])
    return {
        "instance_id": environment["RN50_INSTANCE"],
        "type": environment.get("RN50_TYPE"),
        "market": environment.get("RN50_MARKET"),
        "dollars_per_hour": dollars_per_hour,
        "started": time.time() - up,
    }


def job_command(record, *, python, betons, gpus):
    """The command of a launch record's job: a training run, or a conversion in the folder `betons`."""
    if record.get("kind") == "conversion":
        return [python, "-m", "rn50.cloud.convert", "--work", str(betons)]
    return training_command(record, python=python, betons=betons, gpus=gpus)


def training_command(record, *, python, betons, gpus):
    """The command of a launch record's run, for the working directory of the tree."""
    command = [python, "train_imagenet.py"]
    if gpus > 1:
        command = [python, "-m", "torch.distributed.run", f"--nproc_per_node={gpus}", "train_imagenet.py"]
    command += ["--config-file", record["config"]]
    if record.get("tune"):
        command += ["--config-file", f"runs/{record['run']}/{TUNED}"]
    command += _flags(record)
    command += [f"--data.dir={betons}", "--logging.folder=runs", f"--logging.run_name={record['run']}"]
    command.append(f"--logging.mirror=s3://{record['bucket']}/{RUNS}")
    command.append(f"--budget.max_dollars={record['budget']:g}")
    command.append(f"--budget.dollars_per_hour={record['dollars_per_hour']:g}")
    return command


def tuning_command(record, *, python, betons):
    """The command that measures which settings are fastest, and leaves TUNED and PREFLIGHT in the run's folder."""
    folder = f"runs/{record['run']}"
    command = [python, "tools/preflight.py", record["config"], *_flags(record), "--data", str(betons)]
    command += ["--budget", f"{record['budget']:g}", "--dollars-per-hour", f"{record['dollars_per_hour']:g}"]
    command += ["--seconds", f"{TUNING_SECONDS:g}"]
    return [*command, "--write", f"{folder}/{TUNED}", "--json", f"{folder}/{PREFLIGHT}"]


def _flags(record):
    flags = [f"--{setting}" for setting in record["settings"]]
    if not any(setting.startswith("training.device=") for setting in record["settings"]):
        flags.append("--training.device=cuda")  # without a driver, auto would go on for the GPU's price on a CPU
    return flags


# --- Betons from S3 to a local disk ----------------------------------------------------------------------------------


def rung_of(record, config):
    """data.rung of a launch record's run: a size, or None where all are needed. config: that of its file, a dict."""
    for setting in reversed(record["settings"]):
        if setting.startswith("data.rung="):
            value = setting.partition("=")[2]
            return int(value) if value.isdigit() else None
    value = config.get("data", {}).get("rung")
    return value if isinstance(value, int) else None


def wanted_betons(names, rung):
    """Those of the files that a run needs: all sizes of val, and of train the one that its config names, or all."""
    size = rung or r"\d+"
    chosen = [name for name in names if re.fullmatch(rf"(val_\d+|train_{size})\.(beton|json)", name)]
    missing = [
        split for split in ("train", "val") if not any(n.startswith(split) and n.endswith(".beton") for n in chosen)
    ]
    if missing:
        what = f"train_{rung}.beton" if rung and missing[0] == "train" else f"{missing[0]}_*.beton"
        raise RunError(f"there is no {what} under {BETONS}/; upload what write_dataset.py made (docs/ec2.md)")
    for name in chosen:
        if name.endswith(".beton") and f"{name.removesuffix('.beton')}.json" not in chosen:
            raise RunError(f"{name} has no manifest beside it under {BETONS}/; upload its .json too")
    return sorted(chosen)


def stage(client, bucket, folder, *, rung, say=print):
    """Copy a run's betons to `folder`, each compared with its manifest's sha256 before it gets its name.

    What is there already is not copied again. RunError where a file is damaged, missing or too large for the disk.
    """
    from boto3.s3.transfer import TransferConfig

    sizes = objects(client, bucket, f"{BETONS}/", strip=f"{BETONS}/")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = wanted_betons(sizes, rung)
    rest = [name for name in names if name.endswith(".beton") and not (folder / name).exists()]
    needed, free = sum(sizes[name] for name in rest), shutil.disk_usage(folder).free
    if needed * 1.02 > free:
        raise RunError(f"the betons take {needed / 1e9:.1f} GB and {folder} has {free / 1e9:.1f} GB; choose data.rung")
    transfer = TransferConfig(multipart_chunksize=64 << 20, max_concurrency=16)
    for name in names:
        if name.endswith(".json"):
            client.download_file(bucket, f"{BETONS}/{name}", str(folder / name))
    for name in rest:
        manifest = json.loads((folder / f"{name.removesuffix('.beton')}.json").read_text())
        partial, started = folder / f"{name}.partial", time.monotonic()
        for attempt in (1, 2):
            client.download_file(bucket, f"{BETONS}/{name}", str(partial), Config=transfer)
            if sha256(partial) == manifest["beton"]["sha256"]:
                break
            say(f"{name} arrived damaged{'; once more' if attempt == 1 else ''}")
        else:
            partial.unlink()
            raise RunError(f"s3://{bucket}/{BETONS}/{name} is not what its manifest says; upload it again")
        partial.rename(folder / name)
        seconds = time.monotonic() - started
        say(f"staged {name}: {sizes[name] / 1e6:.0f} MB in {seconds:.0f} s, checksum right")


# --- What an instance reports ----------------------------------------------------------------------------------------


class Reporter:
    """Keeps the instance's record and the small files of its run in S3. What S3 refuses is said and tried again."""

    def __init__(self, store, record, say=print):
        self.store, self.record, self.say, self._sent = store, record, say, {}

    def beat(self, state, folder=None, *, files=(), **more):
        """Renew the record; upload `files` and the run folder's small ones, if changed. Returns whether S3 took it."""
        from boto3.exceptions import S3UploadFailedError
        from botocore.exceptions import BotoCoreError, ClientError

        self.record |= {"state": state, "seen": time.time(), **more}
        try:
            self.store.write(f"instances/{self.record['instance_id']}.json", self.record)
            for path in [*files, *(Path(folder) / name for name in (*RECORDS, CONSOLE, PROGRESS) if folder)]:
                self._send(path)
            return True
        except (BotoCoreError, ClientError, S3UploadFailedError, OSError) as error:
            advice = f": {found}" if (found := advice_in(str(error))) else ""
            self.say(f"warning: S3 does not take what this instance reports: {str(error).splitlines()[0]}{advice}")
            return False

    def _send(self, path):
        with contextlib.suppress(FileNotFoundError):
            found = os.stat(path)
            mark = found.st_size, found.st_mtime_ns
            if self._sent.get(path) != mark:
                with open(path, "rb") as file:
                    file.seek(max(0, found.st_size - SMALL))
                    body = file.read(SMALL)
                self.store.write_bytes(path.name, body)
                self._sent[path] = mark
