"""tools/ec2.py, its bootstrap script and supervisor against moto's EC2, IAM, S3 and a metadata server, over HTTP.

Nothing here has run on AWS. What moto does not do is done by hand and said: it runs no user data (the test runs it, in
an empty prefix), has no systemd (a shim reads the unit file and runs its command), and does not terminate an instance
that switches itself off.
"""

import urllib.request
from types import SimpleNamespace

import boto3
import pytest

from rn50.cloud import aws as aws_module
from tests.cloud.helpers import BUCKET, IMAGE, call_name
from tests.services import MotoS3


@pytest.fixture(scope="module")
def moto():
    with MotoS3() as server:
        yield server


@pytest.fixture(scope="module")
def session():
    """One for all tests: reading EC2's model takes most of a command's time."""
    made = boto3.Session(region_name="us-east-1", aws_access_key_id="test", aws_secret_access_key="test")
    made.calls = set()
    made.events.register("before-parameter-build", lambda model, **rest: made.calls.add(call_name(model)))
    return made


@pytest.fixture
def fresh_moto(moto, monkeypatch):
    """moto without anything in it, as where this process's clients go."""
    urllib.request.urlopen(urllib.request.Request(f"{moto.url}/moto-api/reset", method="POST"), timeout=20).close()
    for name, value in moto.environment.items():
        monkeypatch.setenv(name, value)
    return moto


@pytest.fixture
def cloud_account(fresh_moto, session, monkeypatch):
    """A fresh account: boto3's clients by name, and the names of all calls that are made in this process."""
    monkeypatch.setattr(aws_module, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(boto3, "Session", lambda **options: session)
    plain = {name: session.client(name) for name in ("s3", "ec2", "iam", "autoscaling", "ssm", "sns")}
    plain["s3"].create_bucket(Bucket=BUCKET)
    session.calls = calls = set()
    return SimpleNamespace(calls=calls, image=IMAGE, **plain)
