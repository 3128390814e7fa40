"""What the tests of EC2 share: the plan, and what is asked of the account afterwards."""

import base64
import json
import time
from functools import partial
from types import SimpleNamespace

import boto3
import pytest
from botocore.exceptions import ClientError
from botocore.stub import Stubber

from rn50.cloud import aws as aws_module
from rn50.cloud import prices
from tools import ec2

BUCKET = "bucket"
CONFIG = "rn50_configs/demo.yaml"
PLAN = ["--bucket", BUCKET, "--config", CONFIG, "--instance", "g5.2xlarge", "--budget", "25", "--yes"]
SPOT = [*PLAN, "--spot"]
REAL_SESSION = boto3.Session
IMAGE = "ami-03cf127a"  # one of those that moto has


def call_name(model):
    return f"{model.service_model.service_name}:{model.name}"


def put_betons(account, *sizes):
    """What a launch looks for; nothing could be trained from it."""
    for size in sizes:
        for name in (f"{split}_{size}.{kind}" for split in ("train", "val") for kind in ("beton", "json")):
            put(account, f"rn50/betons/{name}", b"x")


def launch(account, *more, run="demo", plan=PLAN):
    put_betons(account, 64)
    ec2.main(["launch", *plan, "--ami", account.image, "--run", run, "--commit", "HEAD", *more])
    return only_instance(account)


def only_instance(account):
    (instance,) = alive(account)
    return instance


def alive(account):
    filters = [{"Name": "instance-state-name", "Values": ["pending", "running"]}]
    found = account.ec2.describe_instances(Filters=filters)["Reservations"]
    return [instance for reservation in found for instance in reservation["Instances"]]


def groups_of(account):
    """The Auto Scaling groups there are, by name."""
    found = account.autoscaling.describe_auto_scaling_groups()["AutoScalingGroups"]
    return sorted(found, key=lambda group: group["AutoScalingGroupName"])


def user_data(account, instance):
    found = account.ec2.describe_instance_attribute(InstanceId=instance["InstanceId"], Attribute="userData")
    return base64.b64decode(found["UserData"]["Value"]).decode()


def put(account, key, value):
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    account.s3.put_object(Bucket=BUCKET, Key=key, Body=body)


def replaced(monkeypatch, service, **operations):
    """Functions in the place of a service's operations, each called as (moto's own, **parameters)."""
    real = aws_module.Aws.client

    def client(self, name, region=None):
        made = real(self, name, region)
        if name != service:
            return made
        kept = {each: getattr(made, each) for each in dir(made) if not each.startswith("_")}
        return SimpleNamespace(**kept | {each: partial(f, kept[each]) for each, f in operations.items()})

    monkeypatch.setattr(aws_module.Aws, "client", client)


def broken(monkeypatch, service, operation, code, times=1, message=None):
    """The operation fails `times` times before it reaches moto."""
    left = [times]

    def fail(own, **options):
        if left[0] <= 0:
            return own(**options)
        left[0] -= 1
        text = message or f"{code} of a test (profile)"
        raise ClientError({"Error": {"Code": code, "Message": text}}, operation)

    replaced(monkeypatch, service, **{operation: fail})


def stub(monkeypatch, account, responses):
    """responses: {service: (operation, response or error code)}."""
    real = aws_module.Aws.client

    def client(self, name, region=None):
        made = real(self, name, region)
        if name in responses and not hasattr(made, "stubbed"):
            operation, answer = responses[name]
            made.stubbed = Stubber(made)
            for _ in range(3):
                if isinstance(answer, str):
                    made.stubbed.add_client_error(operation, answer)
                else:
                    made.stubbed.add_response(operation, answer)
            made.stubbed.activate()
        return made

    monkeypatch.setattr(aws_module.Aws, "client", client)


def quota(value):
    return ("get_service_quota", {"Quota": {"Value": value}})


def with_image(account):
    return ("get_parameter", {"Parameter": {"Value": account.image}})


def price(monkeypatch, account, answers, instance="g5.2xlarge", spot=False, zones=("us-east-1a", "us-east-1b")):
    with monkeypatch.context() as patch:
        stub(patch, account, answers)
        aws = aws_module.Aws(SimpleNamespace(region="us-east-1", bucket=BUCKET), ec2.Published())
        return prices.hourly_prices(aws, instance, spot, {zone: {} for zone in zones})


def report(account, instance, state="training", ago=10, hours=2.0, **more):
    now = time.time()
    record = {"instance_id": instance["InstanceId"], "dollars_per_hour": 0.5, "started": now - ago - 3600 * hours}
    put(account, f"rn50/runs/demo/instances/{instance['InstanceId']}.json", record | {"seen": now - ago, "state": state,
                                                                                     **more})  # fmt: skip


def refused(account, key):
    with pytest.raises(ClientError) as caught:
        account.s3.get_object(Bucket=BUCKET, Key=key)
    return str(caught.value)
