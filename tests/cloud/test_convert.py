"""rn50/cloud/{convert,fetch,snapshot}.py: real processes, moto's S3 and SSM, and tests/hub.py as the origins."""

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import boto3
import pytest
from PIL import Image

from rn50.cloud import fetch, origins, snapshot
from rn50.cloud.convert import Progress
from rn50.errors import RunError, UsageError
from tests import hub
from tests.conftest import ROOT
from tests.data.test_imagenet import WNIDS, make_images, make_kaggle, make_parquet, make_tars

SETTINGS = ["source.counts=any", "out.resolutions=48,70", "out.workers=2"]
LONG_SETTINGS = ["source.counts=any", "out.resolutions=320,480", "out.workers=1"]
# As `python -m rn50.cloud.convert`, with constants for small files: argv[1] is [[module, name, value], ...].
LAUNCH = """
import importlib, json, sys
for module, name, value in json.loads(sys.argv.pop(1)):
    setattr(importlib.import_module(f"rn50.cloud.{module}"), name, value)
from rn50.cloud import convert
from rn50.command import run
run(convert.main)
"""
SMALL = {"fetch.PART": 20_000, "fetch.CHUNK": 4096, "fetch.PAUSE_SECONDS": 0.02, "snapshot.PART": 300_000,
         "convert.PROGRESS_SECONDS": 0.0, "convert.SNAPSHOT_SECONDS": 0.2, "origins.PAUSE_SECONDS": 0.01}  # fmt: skip
FORMS = ("hf", "kaggle", "links", "s3")


@pytest.fixture
def account(fresh_moto):
    """Clients of an empty account with the bucket `bucket`."""
    made = Account(boto3.client("s3"), boto3.client("ssm"))
    made.s3.create_bucket(Bucket="bucket")
    return made


class Account:
    def __init__(self, s3, ssm):
        self.s3, self.ssm = s3, ssm

    def keys(self, prefix):
        found = self.s3.list_objects_v2(Bucket="bucket", Prefix=f"rn50/{prefix}").get("Contents", [])
        return [entry["Key"].removeprefix("rn50/") for entry in found]

    def get(self, key):
        return self.s3.get_object(Bucket="bucket", Key=f"rn50/{key}")["Body"].read()

    def put(self, key, body):
        self.s3.put_object(Bucket="bucket", Key=key, Body=body)

    def betons(self):
        """{name: bytes} of the .beton files, each with its manifest's checksum."""
        found = {}
        for key in self.keys("betons/"):
            if key.endswith(".beton"):
                found[key.removeprefix("betons/")] = content = self.get(key)
                manifest = json.loads(self.get(key.replace(".beton", ".json")))
                assert manifest["beton"]["sha256"] == hashlib.sha256(content).hexdigest()
        return found

    def everything(self):
        return b"".join(key.encode() + self.get(key) for key in self.keys(""))

    def secrets(self):
        return [found["Name"] for found in self.ssm.describe_parameters()["Parameters"]]


@pytest.fixture
def server(monkeypatch):
    with hub.Origins() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("KAGGLE_API_ENDPOINT", server.url)
        yield server


@pytest.fixture
def place(tmp_path):
    """A working directory with the tree in it, so that runs/ is not the repository's."""
    for name in ("write_dataset.py", "tools", "rn50_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


class Job:
    """Starts the conversion of a launch record, as often as need be."""

    def __init__(self, account, place, words, secret, settings=SETTINGS):
        self.account, self.place, self.work = account, place, place / "work"
        self.folder, self.saying, self.secret = place / "runs" / "convert", place / "console.log", secret
        name = None
        if secret:
            name = "/rn50/bucket/convert"
            account.ssm.put_parameter(Name=name, Value=json.dumps(secret), Type="SecureString")
        record = {"run": "convert", "from": words, "secret": name, "settings": settings}
        record["config"] = "rn50_configs/write_imagenet.yaml"
        account.put("rn50/runs/convert/launch.json", json.dumps(record))

    def start(self, **constants):
        constants = SMALL | {name.replace("__", "."): value for name, value in constants.items()}
        chosen = json.dumps([[*name.split("."), value] for name, value in constants.items()])
        environment = {**os.environ, "RN50_BUCKET": "bucket", "RN50_RUN": "convert", "PYTHONPATH": str(ROOT)}
        with open(self.saying, "wb") as output:
            command = [sys.executable, "-c", LAUNCH, chosen, "--work", str(self.work)]
            self.process = subprocess.Popen(
                command, cwd=self.place, env=environment, stdout=output, stderr=output, start_new_session=True
            )
        return self

    def end(self, within=90):
        code = self.process.wait(within)
        assert "Traceback" not in self.said()
        assert not [value for value in self._secrets() if value in self.said()]
        return code

    def run(self, code=0, **constants):
        assert self.start(**constants).end() == code, self.said()
        return self.said()

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def wipe(self):
        shutil.rmtree(self.work)
        shutil.rmtree(self.folder)

    def until(self, condition, within=60):
        deadline = time.monotonic() + within
        while not condition():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.02)

    def said(self):
        return self.saying.read_text()

    def status(self):
        return json.loads((self.folder / "status.json").read_text())

    def _secrets(self):
        return [
            text for value in (self.secret or {}).values() for text in (value if isinstance(value, list) else [value])
        ]

    def check_secrecy(self):
        kept = self.account.everything() + (self.folder / "status.json").read_bytes() + self.said().encode()
        kept += (self.folder / "progress.json").read_bytes()
        kept += b"".join(path.read_bytes() for path in (self.work / "records").iterdir())
        for value in self._secrets():
            assert value.encode() not in kept


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    """{form: folder} of one miniature set, and the .beton files that write_dataset.py makes of it."""
    root, images = tmp_path_factory.mktemp("forms"), make_images()
    make_tars(root / "links", images)
    (root / "kaggle").mkdir()
    make_kaggle(root / "kaggle", images)
    make_parquet(root / "hf", images)
    return root, direct(root / "hf", root / "betons", SETTINGS)


def direct(source, out, settings):
    command = [sys.executable, ROOT / "write_dataset.py", f"--source.dir={source}", f"--out.dir={out}"]
    command += ["--config-file", ROOT / "rn50_configs" / "write_imagenet.yaml", *(f"--{each}" for each in settings)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return {path.name: path.read_bytes() for path in out.glob("*.beton")}


def zipped(name, content):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


def archive(folder):
    """As Kaggle's: with test images and annotations, which nobody needs here."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.add(folder / "ILSVRC", "ILSVRC")
        for name in ("ILSVRC/Data/CLS-LOC/test/1.JPEG", "ILSVRC/Annotations/CLS-LOC/val/1.xml"):
            tar.add(__file__, name)
    return buffer.getvalue()


def offer(form, root, server, account):
    """Put the set where it comes from; returns the words and the secret of a launch."""
    files = {}
    if form == "kaggle":
        files = {name: (root / "kaggle" / name).read_bytes() for name in origins.KAGGLE_TABLES}
        files = {name: zipped(name, content) for name, content in files.items()}
        files[origins.KAGGLE_ARCHIVE] = archive(root / "kaggle")
        secret = {"username": hub.USER, "key": hub.KEY}
    elif form == "hf":
        files = {f"data/{path.name}": path.read_bytes() for path in (root / "hf" / "data").iterdir()}
        secret = {"token": hub.TOKEN}
    else:
        files = {path.name: path.read_bytes() for path in (root / "links").iterdir()}
        secret = {"links": server.links(origins.VAL, origins.TRAIN)} if form == "links" else None
    if form == "s3":
        account.s3.create_bucket(Bucket="mine")
        for name, content in files.items():
            account.s3.put_object(Bucket="mine", Key=f"imagenet/{name}", Body=content)
        return ["s3://mine/imagenet"], secret
    server.files = files
    return [form], secret


@pytest.mark.parametrize("form", FORMS)
def test_every_origin_gives_the_same_betons_and_leaves_nothing_behind(form, forms, server, account, place):
    root, expected = forms
    job = Job(account, place, *offer(form, root, server, account))
    server.faults = ["reset", "cut", "500", "429", "slow"]
    said = job.run()
    assert account.betons() == expected
    assert server.strangers == 0
    assert server.faults == (["reset", "cut", "500", "429", "slow"] if form == "s3" else [])
    assert account.keys("source/") + account.keys("partial/") + account.secrets() == []
    status = job.status()
    assert (status["status"], status["step"]) == ("finished", 32)
    assert json.loads((job.folder / "progress.json").read_text())["phase"] == "uploading"
    assert "checksum right" in said or form != "hf"
    if form == "kaggle":
        assert not (job.work / "source" / origins.KAGGLE_ARCHIVE).exists()
        assert not list(job.work.glob("source/ILSVRC/**/test"))
    job.check_secrecy()
    shutil.rmtree(job.work)
    asked = len(server.asked)
    assert "train is in s3://bucket/rn50/betons/ already" in job.run()
    assert len(server.asked) == asked


# --- Interrupted -----------------------------------------------------------------------------------------------------


def test_killed_while_it_fetches_it_asks_nobody_twice(forms, server, account, place):
    root, expected = forms
    words, secret = offer("links", root, server, account)
    job = Job(account, place, words, secret)
    server.pause = 0.15

    def kept():
        return {tuple(key.removeprefix("source/").rsplit("/", 1)) for key in account.keys("source/")
                if not key.endswith("version")}  # fmt: skip

    job.start(fetch__PART=4000).until(lambda: len(kept()) >= 5)
    job.kill()
    here = {(name, int(number) * 4000) for name, number in kept()}
    job.wipe()
    before = len(server.parts())
    job.start(fetch__PART=4000).until(lambda: len(server.parts()) > before + 2)
    job.process.terminate()
    assert job.end() == 3
    assert job.status()["status"] == "interrupted"
    assert not here & set(server.parts()[before:])
    here = {(name, int(number) * 4000) for name, number in kept()}
    before = len(server.parts())
    job.run(fetch__PART=4000)
    assert not here & set(server.parts()[before:])
    assert account.betons() == expected
    job.check_secrecy()


def test_what_is_uploaded_already_stays_and_what_is_damaged_is_written_again(forms, server, account, place):
    root, expected = forms
    job = Job(account, place, *offer("hf", root, server, account))
    shutil.copytree(root / "betons", job.work / "betons")
    for name, body in (
        ("train_70.beton", expected["train_70.beton"]),
        ("train_48.beton", b"half"),
        ("val_48.json", b""),
    ):
        account.put(f"rn50/betons/{name}", body)
    for name in ("train_48.json", "train_70.json"):
        account.put(f"rn50/betons/{name}", (root / "betons" / name).read_bytes())
    account.s3.create_multipart_upload(Bucket="bucket", Key="rn50/betons/train_48.beton")
    with open(job.work / "betons" / "val_70.beton", "r+b") as file:
        file.seek(9_000_000)
        file.write(b"!")
    said = job.run(1)
    assert "uploaded train_48.beton" in said
    assert "uploaded train_70.beton" not in said
    assert "error: val was written damaged" in said.splitlines()[-1]
    assert "Uploads" not in account.s3.list_multipart_uploads(Bucket="bucket")
    assert account.secrets() == ["/rn50/bucket/convert"]
    said = job.run()
    assert "uploaded val_70.beton" in said
    assert "uploaded train_48.beton" not in said
    assert account.betons() == expected


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """Seconds of work: photographs where the tests have some, else pictures made here, under many names."""
    root, folder = tmp_path_factory.mktemp("long"), os.environ.get("IMAGENET_SAMPLES_DIR")
    if folder:
        pictures = [path.read_bytes() for path in sorted(Path(folder).glob("*.JPEG"))[:30]]
    else:
        pictures = [drawn(k) for k in range(10)]
    images = {
        "train": {wnid: {f"{wnid}_{k}.JPEG": pictures[k % len(pictures)] for k in range(140)} for wnid in WNIDS},
        "val": {
            wnid: {f"ILSVRC2012_val_{n}{k:07d}.JPEG": pictures[k] for k in range(4)} for n, wnid in enumerate(WNIDS)
        },
    }
    make_parquet(root / "hf", images)
    return root, direct(root / "hf", tmp_path_factory.mktemp("direct"), LONG_SETTINGS)


def drawn(k):
    buffer = io.BytesIO()
    picture = Image.effect_mandelbrot((500, 375), (-2.0 + k / 10, -1.0, 1.0, 1.0), 60).convert("RGB")
    picture.save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


class Watched(threading.Thread):
    """What the processes of a session show to all on their machine, while it runs."""

    def __init__(self, session):
        super().__init__(daemon=True)
        self.session, self.shown, self.commands, self.ended = session, b"", set(), False
        self.start()

    def run(self):
        while not self.ended:
            for folder in Path("/proc").glob("[0-9]*"):
                try:
                    if os.getsid(int(folder.name)) == self.session:
                        command = (folder / "cmdline").read_bytes()
                        if command not in self.commands:
                            self.commands.add(command)
                            self.shown += command + (folder / "environ").read_bytes()
                except OSError:
                    continue
            time.sleep(0.05)


def test_stopped_and_killed_while_it_writes_a_new_machine_goes_on(long, server, account, place):
    root, expected = long
    words, secret = offer("hf", root, server, account)
    job = Job(account, place, words, secret, LONG_SETTINGS)
    big = {"fetch__PART": 4_000_000, "fetch__CHUNK": 1 << 20}

    def journal():
        return account.get("partial/train.journal") if "partial/train.journal" in account.keys("partial/") else b""

    def lines():
        path = job.work / "betons" / "train.journal"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    job.start(**big, convert__SNAPSHOT_SECONDS=3600)
    watched = Watched(job.process.pid)
    job.until(lambda: lines() >= 2)
    asked = time.monotonic()
    job.process.terminate()
    assert job.end() == 3
    assert time.monotonic() - asked < 20
    watched.ended = True
    assert any(b"write_dataset.py" in command for command in watched.commands)
    assert hub.TOKEN.encode() not in watched.shown
    status = job.status()
    assert (status["status"], status["reason"]) == ("interrupted", "SIGTERM")
    first = journal()
    assert first.count(b"\n") >= 2
    fetched, sizes = len(server.parts()), account.keys("partial/")
    assert any("train_480.beton/1" in key for key in sizes)

    job.wipe()
    job.start(**big)
    job.until(lambda: len(journal()) > len(first))
    job.kill()
    assert "train: going on with what the bucket has of it" in job.said()
    assert "train: continuing after" in job.said()
    job.wipe()
    said = job.run(**big)
    assert "train: continuing after" in said
    assert "starting over" not in said
    assert len(server.parts()) == fetched
    assert account.betons() == expected
    assert job.status()["step"] == 720
    assert account.secrets() == []
    job.check_secrecy()


# --- Refused ---------------------------------------------------------------------------------------------------------


def test_a_wrong_token_ends_it_for_good(forms, server, account, place):
    words, secret = offer("hf", forms[0], server, account)
    job = Job(account, place, words, {"token": "hf_" + "w" * 30})
    said = job.run(2)
    assert said.count("error: ") == 1
    assert "error: Hugging Face does not take the token" in said.splitlines()[-1]
    assert job.status()["status"] == "failed"
    assert account.secrets() == []
    assert "is gone; launch again" in job.run(2)


def test_a_corrupt_image_ends_it_for_good_and_a_dead_server_does_not(server, account, place, tmp_path):
    images = make_images()
    images["train"]["n01440764"]["n01440764_2.JPEG"] = b"\xff\xd8not a picture"
    make_parquet(tmp_path / "hf", images)
    words, secret = offer("hf", tmp_path, server, account)
    job = Job(account, place, words, secret)
    server.faults = ["500"] * 1000
    said = job.run(1, fetch__TRIES=2)
    assert "error: Hugging Face answers data/" in said
    assert account.secrets() == ["/rn50/bucket/convert"]
    server.faults = []
    said = job.run(2)
    assert "error: write_dataset.py ended with 1: cannot decode" in said.splitlines()[-1]
    assert job.status()["reason"].startswith("write_dataset.py ended with 1: cannot decode")
    assert account.secrets() == []


# --- One part at a time ----------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(fetch, "PART", 1000)
    monkeypatch.setattr(fetch, "PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(origins, "PAUSE_SECONDS", 0.01)


def linked(server):
    server.files = {name: os.urandom(5500) for name in (origins.TRAIN, origins.VAL, origins.DEVKIT)}
    return {"links": server.links(origins.TRAIN, origins.VAL)}


def fetched(server, account, folder, secret, files=None):
    origin = origins.parse(["links"])
    files = files or origins.listing(origin, secret, None)
    fetch.Fetch(files, origin=origin, secret=secret, s3=account.s3, bucket="bucket", folder=folder / "source",
                records=folder / "records", progress=Progress(), say=print).run()  # fmt: skip
    return {path.name: path.read_bytes() for path in (folder / "source").iterdir()}


def test_parts_come_in_any_order_and_again_after_faults(small, server, account, tmp_path):
    secret = linked(server)
    server.faults = ["cut", "500", "reset", "slow", "429"] * 3
    assert fetched(server, account, tmp_path, secret) == server.files
    assert len(account.keys("source/")) == 3 * 7
    before = len(server.parts())
    assert fetched(server, account, tmp_path / "new", secret) == server.files
    assert fetched(server, account, tmp_path, secret) == server.files
    assert len(server.parts()) == before


def test_a_file_that_changes_meanwhile_is_noticed_and_fetched_anew(small, server, account, tmp_path):
    secret = linked(server)
    files = origins.listing(origins.parse(["links"]), secret, None)
    server.files[origins.VAL] = os.urandom(5500)
    with pytest.raises(RunError, match="ILSVRC2012_img_val.tar has changed where it comes from"):
        fetched(server, account, tmp_path, secret, files)
    assert fetched(server, account, tmp_path, secret) == server.files
    server.files[origins.VAL] = os.urandom(4500)  # after it was here, for this machine and the next one
    assert fetched(server, account, tmp_path, secret) == server.files
    assert fetched(server, account, tmp_path / "new", secret) == server.files


def test_a_server_without_ranges_will_do_for_small_files(small, server, account, tmp_path):
    secret = linked(server)
    server.ranged = False
    assert fetched(server, account, tmp_path, secret) == server.files


def test_a_link_that_expires_is_said_by_name_alone(small, server, account, tmp_path):
    secret = linked(server)
    files = origins.listing(origins.parse(["links"]), secret, None)
    del server.files[origins.TRAIN]
    with pytest.raises(UsageError, match="the link to ILSVRC2012_img_train.tar leads to status 404") as caught:
        fetched(server, account, tmp_path, secret, files)
    assert server.url not in str(caught.value)


def test_damage_is_found_by_the_checksum(small, server, account, tmp_path):
    server.files = {"data/a": os.urandom(2500)}
    place = f"{server.url}/links/data/a"
    file = origins.File("data/a", 2500, hashlib.sha256(b"other").hexdigest(), place)
    for _ in range(2):
        with pytest.raises(RunError, match="data/a arrived damaged; the next try fetches it anew"):
            fetched(server, account, tmp_path, {}, [file])
        assert not list(tmp_path.glob("source/data/*"))
        assert account.keys("source/") == []


def test_a_disk_that_is_too_small_is_one_line(small, server, account, tmp_path, monkeypatch):
    secret = linked(server)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 10**4))
    with pytest.raises(RunError, match="launch with a larger disk"):
        fetched(server, account, tmp_path, secret)


# --- Snapshots -------------------------------------------------------------------------------------------------------


def write(folder, header, *lines, **files):
    (folder / "train.journal").write_bytes("".join(f"{line}\n" for line in (json.dumps(header), *lines)).encode())
    for name, content in files.items():
        (folder / f"{name}.beton.partial").write_bytes(content)


def test_a_snapshot_covers_its_journal_and_another_conversion_s_is_not_taken_up(account, tmp_path, monkeypatch):
    monkeypatch.setattr(snapshot, "PART", 10)
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    header = {"fingerprint": 1, "files": ["train_48.beton"]}

    def snapshots(folder, asked="a"):
        return snapshot.Snapshots(account.s3, "bucket", folder, asked=asked, say=print)

    taken = snapshots(here)
    assert not taken.take("train")
    write(here, header, "[1]", train_48=b"0123456789abcde")
    (here / "train.journal").open("a").write("[torn")
    assert taken.take("train")
    write(here, header, "[1]", "[2]", train_48=b"0123456789abcdefghijklmno")
    assert snapshots(here).take("train")
    assert snapshots(there).restore("train")
    assert {path.name: path.read_bytes() for path in there.iterdir()} == {
        path.name: path.read_bytes() for path in here.iterdir()
    }
    assert not snapshots(there).restore("train")
    account.s3.delete_object(Bucket="bucket", Key="rn50/partial/train_48.beton/1")
    (there / "train.journal").unlink()
    assert not snapshots(there).restore("train")
    write(here, header | {"fingerprint": 2}, "[1]", train_48=b"XYZ")
    assert taken.take("train")
    assert account.get("partial/train_48.beton/0") == b"XYZ"
    assert "partial/train_48.beton/2" not in account.keys("partial/")
    snapshots(there, asked="b")
    assert account.keys("partial/") == ["partial/asked"]
