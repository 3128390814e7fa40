"""The mirror over HTTP, against moto's server."""

import socket
import time

import boto3
import pytest
import torch

from rn50.errors import RunError, UsageError
from rn50.training import checkpoint, mirror
from rn50.training.mirror import Mirror
from tests.services import MotoS3


@pytest.fixture(scope="module")
def s3():
    with MotoS3() as server:
        yield server


@pytest.fixture
def aws(s3, monkeypatch):
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # it keeps credentials
    monkeypatch.setattr(mirror, "RETRY_SECONDS", 0.1)
    monkeypatch.setattr(checkpoint, "RETRY_SECONDS", 0.1)
    return s3


def put(folder, warn=pytest.fail, url="s3://bucket/some/prefix", *, step):
    """A checkpoint of `step` in the folder and, in time, in the mirror."""
    folder.mkdir(exist_ok=True)
    checkpoint.save(folder, {"step": step, "tensor": torch.full((1000,), float(step))})
    copy = Mirror(url, folder=folder, warn=warn)
    copy.offer(folder / "last.pt", step)
    return copy


def test_an_empty_disk_gets_the_checkpoint_and_a_newer_one_here_is_kept(aws, tmp_path):
    folder = tmp_path / "run-a"
    (tmp_path / "run-a").mkdir()
    (folder / "log.jsonl").write_text("{}\n")
    copy = put(folder, step=7)
    assert copy.wait(20)
    elsewhere = tmp_path / "other machine" / "run-a"
    elsewhere.mkdir(parents=True)
    there = Mirror("s3://bucket/some/prefix/", folder=elsewhere, warn=pytest.fail)
    assert checkpoint.newest(elsewhere, warn=pytest.fail, mirror=there)["step"] == 7
    assert [path.name for path in elsewhere.iterdir()] == ["last.pt"]
    checkpoint.save(elsewhere, {"step": 8})
    assert checkpoint.newest(elsewhere, warn=pytest.fail, mirror=there)["step"] == 8
    assert not there.fetch(into=elsewhere / "x", later_than=7)
    assert there.fetch(into=elsewhere / "x", later_than=6)
    # another run of the same prefix, and a prefix with nothing
    assert checkpoint.newest(tmp_path, warn=pytest.fail, mirror=Mirror("s3://bucket", folder=folder, warn=None)) is None
    copy.put_records()
    body = there._s3.get_object(Bucket="bucket", Key="some/prefix/run-a/log.jsonl")["Body"].read()
    assert body == b"{}\n"


def test_a_damaged_copy_is_reported_and_what_is_here_used(aws, tmp_path):
    folder = tmp_path / "run-b"
    copy = put(folder, step=3)
    assert copy.wait(20)
    copy._s3.put_object(Bucket="bucket", Key="some/prefix/run-b/last.pt", Body=b"x" * 99, Metadata={"step": "9"})
    warnings = []
    assert checkpoint.newest(folder, warn=warnings.append, mirror=copy)["step"] == 3
    assert len(warnings) == 1
    assert "the mirror's" in warnings[0]
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="damaged"):
        checkpoint.newest(tmp_path / "empty", warn=pytest.fail, mirror=copy)


@pytest.mark.parametrize("trouble", ["unreachable", "no bucket", "no credentials"])
def test_trouble_is_said_once_and_never_a_fresh_start(aws, tmp_path, monkeypatch, trouble):
    url = "s3://bucket/p"
    if trouble == "unreachable":
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{unused_port()}")
    elif trouble == "no bucket":
        url = "s3://nowhere/p"
    else:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    expected = {"unreachable": "connect", "no bucket": "bucket", "no credentials": "credentials"}[trouble]
    warnings = []
    copy = put(tmp_path / "run-c", warnings.append, url, step=5)
    deadline = time.monotonic() + 20
    while not warnings:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not copy.wait(0.5)
    copy.put_records()
    assert len(warnings) == 1
    assert expected in warnings[0]
    assert "\n" not in warnings[0]
    assert f"the mirror {url}" in warnings[0]
    assert "training goes on, and this is tried again" in warnings[0]
    # with something here it goes on, without it does not start anew
    assert checkpoint.newest(tmp_path / "run-c", warn=warnings.append, mirror=copy)["step"] == 5
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match=r"there is no checkpoint here: repeat the command") as refusal:
        checkpoint.newest(tmp_path / "empty", warn=pytest.fail, mirror=copy)
    assert expected in str(refusal.value).lower()


def test_a_mirror_that_comes_back_gets_the_newest(aws, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{(port := unused_port())}")
    warnings = []
    copy = put(tmp_path / "run-d", warnings.append, step=1)
    while not warnings:
        time.sleep(0.01)
    checkpoint.save(tmp_path / "run-d", {"step": 2})
    copy.offer(tmp_path / "run-d" / "last.pt", 2)
    with MotoS3(port):
        assert copy.wait(30)
        assert copy._step() == 2
    assert len(warnings) == 2
    assert "is written again" in warnings[1]


@pytest.mark.parametrize("url", ["bucket/prefix", "s3://", "gs://bucket/x"])
def test_what_is_no_address_is_a_usage_error(url, tmp_path):
    with pytest.raises(UsageError, match="not of the form s3://bucket/prefix"):
        Mirror(url, folder=tmp_path, warn=pytest.fail)


def unused_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
