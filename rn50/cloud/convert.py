"""Converts ImageNet on an instance: fetches it, writes the .beton files, checks and uploads them to S3.

    python -m rn50.cloud.convert --work DIR     # a folder on a fast local disk with some 600 GB

RN50_BUCKET and RN50_RUN say which launch.json to read. Killed at any point and started again, on this disk or on an
empty one, it goes on; the files are the same bytes in the end. The run's folder gets status.json, and progress.json
whenever something has moved. Exit status: 0 finished, 1 failed (try again), 2 refused (trying again will not help),
3 stopped by SIGTERM.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import traceback
import zipfile
from pathlib import Path

import yaml

from rn50.cloud import fetch as fetching
from rn50.cloud import origins
from rn50.cloud import store as cloud
from rn50.cloud.aws import aws_errors
from rn50.cloud.snapshot import PARTIAL, Snapshots
from rn50.command import run
from rn50.errors import RunError, Stopped, UsageError
from rn50.files import read_json, write_atomically

PROGRESS_SECONDS, SNAPSHOT_SECONDS = 3.0, 60.0
# After SIGTERM: write_dataset.py ends within a second or so; then the rest is for the last snapshot.
CHILD_SECONDS, STOP_SECONDS = 6.0, 17.0
BUSY_TRIES, BUSY_SECONDS = 12, 5.0
# What write_dataset.py says when trying again may help; all else that it refuses stays refused.
PASSING = re.compile(r"another conversion is writing|no room left|make room|cannot write|stopped by SIG")
OURS = ("source.dir", "source.splits", "out.dir")
# Of Kaggle's archive, which also has the test images.
WANTED = re.compile(r"(\./)?ILSVRC/(Data/CLS-LOC/(train|val)|ImageSets/CLS-LOC)/.+")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", required=True, help="folder on a fast local disk")
    work = Path(parser.parse_args().work).resolve()
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    with aws_errors():
        conversion = connect(work)
    conversion.watch(stop)


def connect(work):
    """The Conversion that the environment names. RunError where its launch record cannot be read."""
    import boto3
    from botocore.config import Config

    for name in ("RN50_BUCKET", "RN50_RUN"):
        if not os.environ.get(name):
            raise UsageError(f"{name} is not set: this runs on an instance that tools/ec2.py launched")
    patient = Config(max_pool_connections=32, retries={"mode": "standard", "total_max_attempts": 6})
    store = cloud.Store(boto3.client("s3", config=patient), os.environ["RN50_BUCKET"], os.environ["RN50_RUN"])
    record = store.read("launch.json")
    if record is None:
        raise RunError(f"there is no s3://{store.bucket}/{store.prefix}/launch.json")
    return Conversion(store, record, work, boto3.client("ssm"))


class Conversion:
    """One start of a launch record's conversion."""

    def __init__(self, store, record, work, ssm):
        self.store, self.record, self.work, self.ssm = store, record, work, ssm
        self.s3, self.bucket = store.client, store.bucket
        self.source, self.betons, self.records = work / "source", work / "betons", work / "records"
        self.folder = Path("runs") / record["run"]
        self.progress, self.images, self._error, self._child = Progress(), 0, None, None
        self._snapshots, self._split, self._stopping = None, None, False
        self._settings = [setting for setting in record["settings"] if setting.partition("=")[0] not in OURS]
        config = Path(record["config"]).read_text(encoding="utf-8")
        self.splits = _splits(yaml.safe_load(config) or {}, record["settings"])
        asked = {"from": record["from"], "config": config, "settings": self._settings}
        self.asked = json.dumps(asked, sort_keys=True)

    # --- The main thread: signals, progress.json, status.json ---------------------------------------------------------

    def watch(self, stop):
        """Convert in a thread of its own, which a signal's handler does not disturb, until it ends or `stop` is set."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "status.json").unlink(missing_ok=True)
        worker = threading.Thread(target=self._guarded, daemon=True)
        worker.start()
        written, shown = None, 0.0
        while worker.is_alive() and not stop.wait(0.1):
            state = self.progress.state()
            if state != written and time.monotonic() - shown >= PROGRESS_SECONDS:
                written, shown = state, time.monotonic()
                self._write("progress.json", {**state, "seconds": self.progress.seconds()})
        if "stopped by SIG" in str(self._error):
            stop.wait(2.0)  # systemd signals the child too, which may be the first to hear of it
        if worker.is_alive() or (self._error and stop.is_set()):
            self._stop()
            self._status("interrupted", "SIGTERM")
            raise Stopped("SIGTERM")
        self._write("progress.json", {**self.progress.state(), "seconds": self.progress.seconds()})
        if self._error is None:
            return self._status("finished", f"{', '.join(self.splits)} are in s3://{self.bucket}/{cloud.BETONS}/")
        reason = " ".join(str(self._error).split()) or type(self._error).__name__
        self._status("failed", reason)
        if isinstance(self._error, UsageError):
            self._drop_secret()
        raise self._error

    def _guarded(self):
        try:
            with aws_errors():
                self.convert()
        except (UsageError, RunError) as error:
            self._error = error
        except OSError as error:
            self._error = RunError(f"{error.strerror or type(error).__name__}: {error.filename or 'a file'}")
        except Exception:
            traceback.print_exc()
            self._error = RunError("a bug in the conversion; console.log has its traceback")

    def _stop(self):
        """Within STOP_SECONDS: end the child, and bring what it has written to the bucket."""
        ends, self._stopping = time.monotonic() + STOP_SECONDS, True
        child = self._child
        if child and child.poll() is None:
            child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(CHILD_SECONDS)
            if child.poll() is None:
                child.kill()
        if self._split:
            last = threading.Thread(target=self._snapshot, daemon=True)
            last.start()
            last.join(max(0.0, ends - time.monotonic()))

    def _status(self, status, reason):
        content = {"status": status, "reason": reason, "step": self.images, "time": time.time()}
        self._write("status.json", content)
        say(f"{status}: {reason}")

    def _write(self, name, content):
        with contextlib.suppress(OSError):
            write_atomically(self.folder / name, json.dumps(content) + "\n")

    # --- The conversion -----------------------------------------------------------------------------------------------

    def convert(self):
        """Everything, from wherever it stands."""
        for folder in (self.source, self.betons, self.records):
            folder.mkdir(parents=True, exist_ok=True)
        done = {split: self._done(split) for split in self.splits}
        self.images = sum(images or 0 for images in done.values())
        left = [split for split in self.splits if done[split] is None]
        if left:
            self._fresh_folder()
            self._snapshots = Snapshots(self.s3, self.bucket, self.betons, asked=self.asked, say=say)
            self._fetch()
        for split in left:
            self._write_split(split)
            self._verify(split)
            self._upload(split)
        say("removing what is no longer needed from the bucket")
        for prefix in (fetching.SOURCE, PARTIAL):
            fetching.delete_objects(self.s3, self.bucket, list(cloud.objects(self.s3, self.bucket, f"{prefix}/")))
        self._drop_secret()

    def _fresh_folder(self):
        """What was begun for another launch is not continued, nor mixed with this one's."""
        kept = self.records / "asked"
        if kept.exists() and kept.read_text() != self.asked:
            for folder in (self.source, self.betons, self.records):
                shutil.rmtree(folder)
                folder.mkdir()
        write_atomically(kept, self.asked)

    def _done(self, split):
        """Number of images of a split that is in the bucket, whole and as asked for; None where it is not."""
        found = self.store.read(f"converted-{split}.json")
        if found is None or found["asked"] != self.asked:
            return None
        sizes = cloud.objects(self.s3, self.bucket, f"{cloud.BETONS}/{split}_", strip=f"{cloud.BETONS}/")
        if any(sizes.get(name) != size or _manifest(name) not in sizes for name, size in found["files"].items()):
            return None
        say(f"{split} is in s3://{self.bucket}/{cloud.BETONS}/ already")
        return found["images"]

    def _fetch(self):
        self.progress.phase("fetching", "bytes")
        secret = self._secret()
        origin = origins.parse(self.record["from"])
        files = origins.listing(origin, secret, self.s3)
        say(f"fetching {len(files)} files, {sum(file.bytes for file in files) / 1e9:.1f} GB")
        wanted = [file for file in files if not self._is_unpacked(file)]
        fetching.Fetch(wanted, origin=origin, secret=secret, s3=self.s3, bucket=self.bucket, folder=self.source,
                       records=self.records, progress=self.progress, say=say).run()  # fmt: skip
        for file in wanted:
            if file.name in origins.KAGGLE_TABLES:
                _unzip(self.source / file.name)
            elif file.name == origins.KAGGLE_ARCHIVE:
                self._unpack(file)

    def _secret(self):
        name = self.record.get("secret")
        if not name:
            return {}
        try:
            found = self.ssm.get_parameter(Name=name, WithDecryption=True)
        except self.ssm.exceptions.ParameterNotFound:
            raise UsageError(f"the parameter {name} with the origin's token or links is gone; launch again") from None
        return json.loads(found["Parameter"]["Value"])

    def _drop_secret(self):
        from botocore.exceptions import BotoCoreError, ClientError

        if name := self.record.get("secret"):
            try:
                self.ssm.delete_parameter(Name=name)
            except self.ssm.exceptions.ParameterNotFound:
                pass
            except (BotoCoreError, ClientError) as error:
                say(f"warning: cannot delete the parameter {name} with the origin's secret: {type(error).__name__}")

    def _is_unpacked(self, file):
        with contextlib.suppress(FileNotFoundError):
            return self._unpacked(file).read_text() == fetching.version(file)
        return False

    def _unpacked(self, file):
        return self.records / f"{file.name}.unpacked"

    def _unpack(self, file):
        """Kaggle's archive becomes its folders, and goes."""
        path = self.source / file.name
        self.progress.phase("fetching", "bytes", total=file.bytes, detail=f"unpacking {file.name}")
        say(f"unpacking {file.name}")
        try:
            with open(path, "rb") as raw, tarfile.open(fileobj=Counted(raw, self.progress), mode="r|gz") as archive:
                archive.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.4 and later
                for member in archive:
                    if WANTED.fullmatch(member.name):
                        archive.extract(member, self.source, set_attrs=False)
        except (tarfile.TarError, EOFError, zipfile.BadZipFile, ValueError) as error:
            raise UsageError(f"{file.name} cannot be unpacked: {error}") from None
        except OSError as error:
            if error.errno is None:  # gzip's own
                raise UsageError(f"{file.name} cannot be unpacked: {error}") from None
            with fetching.disk_errors(f"what is in {file.name}"):
                raise
        write_atomically(self._unpacked(file), fetching.version(file))
        path.unlink()

    def _write_split(self, split):
        """Have the split's betons and manifests in the folder."""
        self.progress.phase("writing", "images", detail=split)
        if self._snapshots.restore(split):
            say(f"{split}: going on with what the bucket has of it")
        before, self._split = self.images, split
        command = [sys.executable, "write_dataset.py", "--config-file", self.record["config"]]
        command += [f"--source.dir={self.source}", f"--source.splits={split}", f"--out.dir={self.betons}"]
        command += [f"--{setting}" for setting in self._settings]
        ended = threading.Event()
        watcher = threading.Thread(target=self._keep_snapshots, args=(ended,), daemon=True)
        watcher.start()

        def follow(line):
            if found := re.match(rf"{re.escape(split)}: (\d+)/(\d+) images", line):
                self.progress.set(int(found[1]), int(found[2]))
                self.images = before + int(found[1])

        try:
            for attempt in range(BUSY_TRIES):
                code, last = self._run(command, follow)
                # A conversion whose parent was killed ends when it next says something.
                if code == 0 or "another conversion is writing" not in last or attempt + 1 == BUSY_TRIES:
                    break
                time.sleep(BUSY_SECONDS)
        finally:
            ended.set()
            watcher.join()
        if self._stopping:
            raise RunError("stopped")
        if code:
            refused = code == 2 or (code == 1 and last.startswith("error: ") and not PASSING.search(last))
            text = last.removeprefix("error: ") or "it said nothing"
            raise (UsageError if refused else RunError)(f"write_dataset.py ended with {code}: {text}")
        self._split = None
        self.images = before + self._of(split)[0]["num_samples"]

    def _keep_snapshots(self, ended):
        while not ended.wait(SNAPSHOT_SECONDS):
            self._snapshot()

    def _snapshot(self):
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            self._snapshots.take(self._split)
        except (BotoCoreError, ClientError, OSError, ValueError) as error:
            say(f"warning: cannot keep what is written so far in S3: {type(error).__name__}; tried again later")

    def _of(self, split):
        """Manifests of the split's betons, by size."""
        found = [path for path in self.betons.glob(f"{split}_*.beton") if path.with_suffix(".json").exists()]
        manifests = [{"path": path, **read_json(path.with_suffix(".json"), default={})} for path in found]
        return sorted(manifests, key=lambda manifest: manifest["settings"]["max_side"])

    def _verify(self, split):
        found = self._of(split)
        total = sum(manifest["num_samples"] for manifest in found)
        self.progress.phase("verifying", "images", total=total, detail=split)
        images = {str(manifest["path"]): manifest["num_samples"] for manifest in found}

        def follow(line):
            name, ok, _ = line.partition(": OK: ")
            if ok:
                self.progress.add(images.get(name, 0))

        code, last = self._run([sys.executable, "tools/verify_beton.py", *images], follow)
        if self._stopping:
            raise RunError("stopped")
        if code:
            for manifest in found:
                manifest["path"].with_suffix(".json").unlink()
                manifest["path"].unlink()
            self._snapshots.forget(split)
            raise RunError(f"{split} was written damaged ({last.removeprefix('error: ')}); the next try writes it anew")

    def _upload(self, split):
        from boto3.s3.transfer import TransferConfig

        found = self._of(split)
        sizes = {manifest["path"].name: manifest["beton"]["bytes"] for manifest in found}
        self.progress.phase("uploading", "bytes", total=sum(sizes.values()), detail=split)
        self._abort_leftovers()
        transfer = TransferConfig(multipart_chunksize=64 << 20, max_concurrency=16)
        for manifest in found:
            path, key = manifest["path"], f"{cloud.BETONS}/{manifest['path'].name}"
            if self._is_uploaded(path, key, sizes[path.name]):
                self.progress.add(sizes[path.name])
                continue
            self.s3.upload_file(str(path), self.bucket, key, Config=transfer, Callback=self.progress.add)
            there = self.s3.head_object(Bucket=self.bucket, Key=key)["ContentLength"]
            if there != sizes[path.name]:
                raise RunError(f"{key} has {there} bytes in S3 and not {sizes[path.name]}; the next try uploads again")
            # Until now an older manifest may have stood beside it; whoever stages the two sees that they do not agree.
            body = path.with_suffix(".json").read_bytes()
            self.s3.put_object(Bucket=self.bucket, Key=_manifest(key), Body=body)
            say(f"uploaded {path.name}: {there / 1e6:.0f} MB")
        images = found[0]["num_samples"]
        self.store.write(f"converted-{split}.json", {"asked": self.asked, "files": sizes, "images": images})
        self._snapshots.forget(split)

    def _is_uploaded(self, path, key, size):
        there = cloud.objects(self.s3, self.bucket, key.removesuffix("beton"))
        if there.get(key) != size or _manifest(key) not in there:
            return False
        manifest = self.s3.get_object(Bucket=self.bucket, Key=_manifest(key))["Body"].read()
        return manifest == path.with_suffix(".json").read_bytes()

    def _abort_leftovers(self):
        """Parts of uploads that a killed process has begun would be paid for and never seen."""
        from botocore.exceptions import ClientError

        try:
            pages = self.s3.get_paginator("list_multipart_uploads").paginate(
                Bucket=self.bucket, Prefix=f"{cloud.BETONS}/"
            )
            for upload in [upload for page in pages for upload in page.get("Uploads", [])]:
                self.s3.abort_multipart_upload(Bucket=self.bucket, Key=upload["Key"], UploadId=upload["UploadId"])
        except ClientError as error:
            say(f"warning: cannot end unfinished uploads: {error.response['Error']['Code']}")

    def _run(self, command, follow):
        """(exit status, last line) of a command; all it says is passed on."""
        self._child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                       errors="replace", env={**os.environ, "PYTHONUNBUFFERED": "1"})  # fmt: skip
        if self._stopping:
            self._child.terminate()
        last = ""
        for line in self._child.stdout:
            line = line.rstrip()
            last = line or last
            say(line)
            follow(line)
        return self._child.wait(), last


class Progress:
    """What is done of a phase; for many threads."""

    def __init__(self):
        self._lock = threading.Lock()
        self.phase("fetching", "bytes")

    def phase(self, name, unit, total=0, detail=None):
        with self._lock:
            self._state = {"phase": name, "done": 0, "total": total, "unit": unit}
            if detail:
                self._state["detail"] = detail
            self._since = time.monotonic()

    def start(self, total):
        self.set(0, total)

    def set(self, done, total):
        with self._lock:
            self._state |= {"done": done, "total": total}

    def add(self, count):
        with self._lock:
            self._state["done"] += count

    def state(self):
        with self._lock:
            return dict(self._state)

    def seconds(self):
        return round(time.monotonic() - self._since, 1)


class Counted:
    """A file that says how much of it was read."""

    def __init__(self, file, progress):
        self._file, self._progress = file, progress

    def read(self, count):
        data = self._file.read(count)
        self._progress.add(len(data))
        return data


def _splits(config, settings):
    given = [setting.partition("=")[2] for setting in settings if setting.startswith("source.splits=")]
    value = given[-1] if given else config.get("source", {}).get("splits", "train,val")
    return [split.strip() for split in str(value).split(",")]


def _manifest(name):
    return f"{name.removesuffix('.beton')}.json"


def _unzip(path):
    """Kaggle wraps some of its tables in a zip file without saying so."""
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            data = archive.read(path.name if path.name in names else names[0])
    except (zipfile.BadZipFile, IndexError, ValueError) as error:
        raise UsageError(f"{path.name} cannot be unpacked: {error}") from None
    write_atomically(path, data.decode("utf-8"))


def say(message):
    print(message, flush=True)


if __name__ == "__main__":
    run(main)
