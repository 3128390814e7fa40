"""tools/ec2.py, its bootstrap script and supervisor against moto's EC2, IAM, S3 and a metadata server, over HTTP.

Nothing here has run on AWS. What moto does not do is done by hand and said: it runs no user data (the test runs it, in
an empty prefix), has no systemd (a shim reads the unit file and runs its command), and does not terminate an instance
that switches itself off.
"""

import base64
import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import boto3
import parliament
import pytest
import torch
from botocore.exceptions import ClientError
from botocore.stub import Stubber

from rn50.cloud import account as accounts
from rn50.cloud import aws as aws_module
from rn50.cloud import cleanup, status
from rn50.cloud import launch as launching
from rn50.cloud import store as cloud
from rn50.errors import RunError, UsageError
from rn50.training import checkpoint
from rn50.training.mirror import Mirror
from tests.services import Metadata, MotoS3
from tools import ec2, ec2_supervise

ROOT = Path(__file__).resolve().parents[1]
BUCKET = "bucket"
CONFIG = "rn50_configs/demo.yaml"
PLAN = ["--bucket", BUCKET, "--config", CONFIG, "--instance", "g5.2xlarge", "--spot", "--budget", "25", "--yes"]


REAL_SESSION = boto3.Session
IMAGE = "ami-03cf127a"  # one of those that moto has


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
def cloud_account(moto, session, monkeypatch):
    """A fresh account: boto3's clients by name, and the names of all calls that are made in this process."""
    urllib.request.urlopen(urllib.request.Request(f"{moto.url}/moto-api/reset", method="POST"), timeout=20).close()
    for name, value in moto.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(aws_module, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(boto3, "Session", lambda **options: session)
    plain = {name: session.client(name) for name in ("s3", "ec2", "iam")}
    plain["s3"].create_bucket(Bucket=BUCKET)
    session.calls = calls = set()
    return SimpleNamespace(calls=calls, image=IMAGE, **plain)


def call_name(model):
    return f"{model.service_model.service_name}:{model.name}"


def put_betons(account, *sizes):
    """What a launch looks for; nothing could be trained from it."""
    for size in sizes:
        for name in (f"{split}_{size}.{kind}" for split in ("train", "val") for kind in ("beton", "json")):
            put(account, f"rn50/betons/{name}", b"x")


def launch(account, *more, run="demo"):
    put_betons(account, 64)
    ec2.main(["launch", *PLAN, "--ami", account.image, "--run", run, "--commit", "HEAD", *more])
    return only_instance(account)


def only_instance(account):
    (instance,) = alive(account)
    return instance


def alive(account):
    filters = [{"Name": "instance-state-name", "Values": ["pending", "running"]}]
    found = account.ec2.describe_instances(Filters=filters)["Reservations"]
    return [instance for reservation in found for instance in reservation["Instances"]]


def user_data(account, instance):
    found = account.ec2.describe_instance_attribute(InstanceId=instance["InstanceId"], Attribute="userData")
    return base64.b64decode(found["UserData"]["Value"]).decode()


def put(account, key, value):
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    account.s3.put_object(Bucket=BUCKET, Key=key, Body=body)


# --- launch ----------------------------------------------------------------------------------------------------------


def test_launch_makes_a_closed_encrypted_tagged_spot_instance(cloud_account, capsys):
    instance = launch(cloud_account)
    assert instance["InstanceType"] == "g5.2xlarge"
    assert instance["InstanceLifecycle"] == "spot"
    assert instance["MetadataOptions"]["HttpTokens"] == "required"
    marks = {tag["Key"]: tag["Value"] for tag in instance["Tags"]}
    assert marks == {"project": "rn50", "Name": "rn50-demo", "rn50-run": "demo", "rn50-bucket": BUCKET}
    attribute = cloud_account.ec2.describe_instance_attribute(
        InstanceId=instance["InstanceId"], Attribute="instanceInitiatedShutdownBehavior"
    )
    assert attribute["InstanceInitiatedShutdownBehavior"]["Value"] == "terminate"
    volume = cloud_account.ec2.describe_volumes(VolumeIds=[instance["BlockDeviceMappings"][0]["Ebs"]["VolumeId"]])[
        "Volumes"
    ][0]
    assert (volume["Encrypted"], volume["VolumeType"], volume["Size"]) == (True, "gp3", 100)
    (group,) = instance["NetworkInterfaces"][0]["Groups"]
    rules = cloud_account.ec2.describe_security_groups(GroupIds=[group["GroupId"]])["SecurityGroups"][0]
    assert rules["IpPermissions"] == []
    profile = cloud_account.iam.get_instance_profile(InstanceProfileName=accounts.role_name(BUCKET))["InstanceProfile"]
    assert instance["IamInstanceProfile"]["Arn"] == profile["Arn"]
    record = json.loads(cloud_account.s3.get_object(Bucket=BUCKET, Key="rn50/runs/demo/launch.json")["Body"].read())
    assert record["instance_id"] == instance["InstanceId"]
    code = cloud_account.s3.get_object(Bucket=BUCKET, Key=f"rn50/code/{record['commit']}.tar.gz")["Body"].read()
    assert record["code_sha256"] == hashlib.sha256(code).hexdigest()
    out = capsys.readouterr().out
    assert "on one g5.2xlarge, spot, us-east-1" in out
    assert "budget $25.00" in out
    assert f"aws ssm start-session --target {instance['InstanceId']}" in out


def test_the_plan_is_shown_and_nothing_is_made_without_a_yes(cloud_account, monkeypatch, capsys):
    put_betons(cloud_account, 64)
    monkeypatch.setattr("builtins.input", lambda question: "no")
    flags = [flag for flag in PLAN if flag != "--yes"]
    with pytest.raises(RunError, match="nothing was launched"):
        ec2.main(["launch", *flags, "--ami", cloud_account.image, "--commit", "HEAD"])
    assert "terminates itself" in capsys.readouterr().out
    assert alive(cloud_account) == []
    assert cloud_account.s3.list_objects_v2(Bucket=BUCKET)["KeyCount"] == 4
    assert not cloud_account.calls & {"ec2:CreateSecurityGroup", "iam:CreateRole", "ec2:RunInstances"}


def test_the_flagship_is_projected_before_it_is_paid_for(cloud_account, capsys):
    put_betons(cloud_account, 400)
    flags = ["--bucket", BUCKET, "--config", "rn50_configs/rn50_78.yaml", "--budget", "25", "--yes"]
    ec2.main(["launch", *flags, "--ami", cloud_account.image, "--commit", "HEAD"])
    assert re.search(r"projected from published figures: \d+\.\d h, \$\d+\.\d\d", capsys.readouterr().out)


def test_a_run_that_is_projected_to_cost_more_than_its_budget_is_not_launched(cloud_account):
    flags = ["--bucket", BUCKET, "--config", "rn50_configs/rn50_78.yaml", "--budget", "3", "--yes"]
    with pytest.raises(
        RunError, match=r"projected to cost \$\d+\.\d\d of a budget of \$3.00.*budget.allow_overrun=true"
    ):
        ec2.main(["launch", *flags, "--ami", cloud_account.image, "--commit", "HEAD"])
    assert alive(cloud_account) == []


def test_without_its_betons_a_run_is_not_launched(cloud_account):
    put_betons(cloud_account, 64)
    flags = [
        "launch",
        *PLAN[:2],
        "--config",
        "rn50_configs/rn50_78.yaml",
        "--budget",
        "25",
        "--yes",
        "--commit",
        "HEAD",
    ]
    with pytest.raises(RunError, match=r"there is no train_400.beton under rn50/betons/; upload what write_dataset"):
        ec2.main([*flags, "--ami", IMAGE])
    with pytest.raises(RunError, match=r"there is no train_500.beton"):
        ec2.main([*flags, "--ami", IMAGE, "--set", "data.rung=500"])
    assert alive(cloud_account) == []
    assert cloud_account.iam.list_roles()["Roles"] == []


def test_a_repeated_launch_makes_nothing_twice(cloud_account):
    first = launch(cloud_account)
    with pytest.raises(RunError, match=f"{first['InstanceId']} is running"):
        launch(cloud_account)
    cloud_account.ec2.terminate_instances(InstanceIds=[first["InstanceId"]])
    with pytest.raises(RunError, match=f"resume --bucket {BUCKET} --run demo"):
        launch(cloud_account)
    second = launch(cloud_account, run="other")
    assert second["InstanceId"] != first["InstanceId"]
    groups = cloud_account.ec2.describe_security_groups(Filters=[{"Name": "group-name", "Values": ["rn50"]}])
    assert len(groups["SecurityGroups"]) == 1
    assert len(cloud_account.iam.list_roles()["Roles"]) == 1


def broken(monkeypatch, service, operation, code, times=1):
    """The operation fails `times` times before it reaches moto."""
    real, left = aws_module.Aws.client, [times]

    def client(self, name, region=None):
        made = real(self, name, region)
        if name == service:
            method = getattr(made, operation)

            def fail(**options):
                if left[0] > 0:
                    left[0] -= 1
                    raise ClientError({"Error": {"Code": code, "Message": f"{code} of a test (profile)"}}, operation)
                return method(**options)

            return SimpleNamespace(
                **{name: getattr(made, name) for name in dir(made) if not name.startswith("_")} | {operation: fail}
            )
        return made

    monkeypatch.setattr(aws_module.Aws, "client", client)


def test_a_launch_that_fails_half_way_says_what_there_is_and_goes_on(cloud_account, monkeypatch):
    with monkeypatch.context() as patch:
        broken(patch, "ec2", "run_instances", "VcpuLimitExceeded")
        with pytest.raises(RunError) as caught:
            launch(cloud_account)
    said = str(caught.value)
    assert "vCPU quota" in said
    assert "an instance that has just ended counts for some minutes more" in said
    assert re.search(r"There is now: security group sg-\w+, role rn50-\w+, instance profile rn50-\w+", said)
    assert f"tools/ec2.py clean --bucket {BUCKET}" in said
    assert launch(cloud_account)["InstanceType"] == "g5.2xlarge"
    assert len(cloud_account.iam.list_roles()["Roles"]) == 1


def test_a_launch_ends_when_ec2_shows_the_instance(cloud_account, monkeypatch):
    """Its lists lag: the next command would take it for gone."""
    real, asked = launching.instances_of, []

    def lagging(*arguments, **options):
        asked.append(options)
        return real(*arguments, **options) if len(asked) > 4 else []

    monkeypatch.setattr(launching, "instances_of", lagging)
    monkeypatch.setattr(status, "instances_of", lagging)
    launch(cloud_account)
    assert len(asked) == 5


def test_a_zone_without_room_is_followed_by_the_next(cloud_account, monkeypatch):
    broken(monkeypatch, "ec2", "run_instances", "InsufficientInstanceCapacity", times=2)
    assert launch(cloud_account)["State"]["Name"] == "running"
    cloud_account.ec2.terminate_instances(InstanceIds=[only_instance(cloud_account)["InstanceId"]])
    broken(monkeypatch, "ec2", "run_instances", "InsufficientInstanceCapacity", times=99)
    with pytest.raises(RunError, match=r"no zone has a g5.2xlarge now \(us-east-1a: Insuff.*or without --spot"):
        launch(cloud_account, run="other")


def replaced(service, operation, function):
    """Aws.client, with one of a service's calls replaced."""
    real = aws_module.Aws.client

    def client(self, name, region=None):
        made = real(self, name, region)
        if name != service:
            return made
        kept = {name: getattr(made, name) for name in dir(made) if not name.startswith("_")}
        return SimpleNamespace(**kept | {operation: function})

    return client


def test_a_new_profile_that_ec2_does_not_know_yet_is_waited_for(cloud_account, monkeypatch):
    broken(monkeypatch, "ec2", "run_instances", "InvalidParameterValue", times=3)
    assert launch(cloud_account)["State"]["Name"] == "running"


def test_a_refused_request_and_another_one_have_two_tokens():
    """EC2 keeps the token of what it refused; with it, another price or image is IdempotentParameterMismatch."""
    record = {"run": "demo", "bucket": BUCKET, "instance": "g5.xlarge", "spot": True, "attempt": 1, "budget": 25.0}
    record |= {"commit": "abc", "code_sha256": "def", "region": "us-east-1", "dollars_per_hour": 0.4}

    def token(image=IMAGE, subnet="subnet-1", **changed):
        return launching.instance_request(record | changed, {"ImageId": image}, subnet, "sg-1", "profile", 0, 450)[
            "ClientToken"
        ]

    assert token() == token()
    changes = [{"dollars_per_hour": 0.41}, {"image": "ami-2"}, {"subnet": "subnet-2"}, {"attempt": 2}, {"spot": False}]
    assert len({token(), *(token(**change) for change in changes)}) == 6
    assert len(token()) == 64  # EC2's limit


def test_a_token_of_a_terminated_instance_is_followed_by_another(cloud_account, monkeypatch):
    broken(monkeypatch, "ec2", "run_instances", "IdempotentInstanceTerminated")
    assert launch(cloud_account)["State"]["Name"] == "running"
    record = json.loads(cloud_account.s3.get_object(Bucket=BUCKET, Key="rn50/runs/demo/launch.json")["Body"].read())
    assert record["attempt"] == 2


@pytest.mark.parametrize("operation", ["put_role_policy", "add_role_to_instance_profile"])
def test_a_new_role_that_iam_itself_does_not_know_yet_is_waited_for(cloud_account, monkeypatch, operation):
    made, left = aws_module.Aws(SimpleNamespace(region="us-east-1", bucket=BUCKET), ec2.Published()).client("iam"), [2]

    def fail(**options):
        if left[0] > 0:
            left[0] -= 1
            raise made.exceptions.NoSuchEntityException({"Error": {"Code": "NoSuchEntity"}}, operation)
        return getattr(made, operation)(**options)

    monkeypatch.setattr(aws_module.Aws, "client", replaced("iam", operation, fail))
    assert launch(cloud_account)["State"]["Name"] == "running"
    assert left == [0]


def test_a_new_security_group_that_ec2_does_not_know_yet_is_waited_for(cloud_account, monkeypatch):
    broken(monkeypatch, "ec2", "run_instances", "InvalidGroup.NotFound", times=2)
    assert launch(cloud_account)["State"]["Name"] == "running"


def test_spots_own_role_may_have_to_be_made_by_an_administrator(cloud_account, monkeypatch):
    broken(monkeypatch, "ec2", "run_instances", "AuthFailure.ServiceLinkedRoleCreationNotPermitted")
    with pytest.raises(RunError, match="aws iam create-service-linked-role --aws-service-name spot.amazonaws.com"):
        launch(cloud_account)


def test_only_a_default_subnet_is_taken_and_the_instance_has_a_public_address(cloud_account):
    """Another subnet of the default VPC may have no way to S3; a default one may be set to give no address."""
    (vpc,) = (v["VpcId"] for v in cloud_account.ec2.describe_vpcs()["Vpcs"] if v["IsDefault"])
    for subnet in cloud_account.ec2.describe_subnets()["Subnets"]:
        cloud_account.ec2.modify_subnet_attribute(SubnetId=subnet["SubnetId"], MapPublicIpOnLaunch={"Value": False})
    private = {
        cloud_account.ec2.create_subnet(
            VpcId=vpc, CidrBlock=f"172.31.{200 + k}.0/24", AvailabilityZone=f"us-east-1{z}"
        )["Subnet"]["SubnetId"]
        for k, z in enumerate("abcdef")
    }
    instance = launch(cloud_account)
    assert instance["SubnetId"] not in private
    assert instance["PublicIpAddress"]


def test_a_bucket_elsewhere_or_of_someone_else_is_refused(cloud_account, monkeypatch):
    """Each staging would be paid for; and `clean` would take the role from an instance that it does not see."""
    put_betons(cloud_account, 64)
    there = {"LocationConstraint": "eu-west-1"}
    with monkeypatch.context() as patch:
        patch.setattr(aws_module.Aws, "client", replaced("s3", "get_bucket_location", lambda **options: there))
        for command in (["launch", *PLAN, "--ami", IMAGE, "--commit", "HEAD"], ["clean", "--bucket", BUCKET, "--yes"]):
            with pytest.raises(RunError, match="bucket is in eu-west-1 and the region is us-east-1"):
                ec2.main(command)
    assert alive(cloud_account) == []
    broken(monkeypatch, "s3", "get_bucket_location", "AccessDenied", times=9)
    with pytest.raises(RunError, match="is another account's bucket, or your credentials may not do this"):
        ec2.main(["clean", "--bucket", BUCKET, "--yes"])


def test_a_run_of_another_region_is_not_taken_for_gone(cloud_account):
    instance = launch(cloud_account)
    record = json.loads(cloud_account.s3.get_object(Bucket=BUCKET, Key="rn50/runs/demo/launch.json")["Body"].read())
    put(cloud_account, "rn50/runs/demo/launch.json", record | {"region": "us-west-2"})
    for action in ("status", "resume", "stop"):
        with pytest.raises(UsageError, match="demo is in us-west-2 and the region is us-east-1: --region us-west-2"):
            ec2.main([action, "--bucket", BUCKET, "--run", "demo"])
    assert alive(cloud_account)[0]["InstanceId"] == instance["InstanceId"]


def test_a_gpu_that_the_default_image_does_not_know_needs_another_image(cloud_account):
    put_betons(cloud_account, 64)
    flags = ["launch", "--bucket", BUCKET, "--config", CONFIG, "--budget", "5", "--instance", "p3.2xlarge"]
    with pytest.raises(
        RunError, match="driver does not know the GPU of p3.2xlarge: name one of that region with --ami"
    ):
        ec2.main([*flags, "--yes", "--commit", "HEAD"])
    assert alive(cloud_account) == []


def test_no_secret_leaves_this_machine(cloud_account, monkeypatch, capsys):
    secret = "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY"
    keys = {"aws_access_key_id": "AKIAIOSFODNN7EXAMPLE", "aws_secret_access_key": secret}
    monkeypatch.setattr(boto3, "Session", lambda **options: REAL_SESSION(**options, **keys))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7EXAMPLE")
    instance = launch(cloud_account)
    texts = [user_data(cloud_account, instance), capsys.readouterr().out, json.dumps(instance, default=str)]
    for entry in cloud_account.s3.list_objects_v2(Bucket=BUCKET)["Contents"]:
        body = cloud_account.s3.get_object(Bucket=BUCKET, Key=entry["Key"])["Body"].read()
        texts.append(body.decode(errors="replace") if entry["Key"].endswith("json") else "")
    assert not any(secret in text or "AKIAIOSFODNN7EXAMPLE" in text for text in texts)
    assert len(texts[0]) < 16_384


def test_uncommitted_changes_are_not_launched(monkeypatch):
    answers = {"rev-parse": b"abc\n", "status": b" M train_imagenet.py\n"}
    monkeypatch.setattr(launching, "git", lambda *arguments: answers[arguments[0]])
    with pytest.raises(RunError, match="uncommitted"):
        launching.pinned_commit(None)
    assert launching.pinned_commit("HEAD") == "abc"


def test_every_action_of_the_command_line_is_in_the_table_and_no_other_does_anything(cloud_account, capsys):
    with pytest.raises(SystemExit) as caught:
        ec2.main(["cleanup", "--bucket", BUCKET])
    assert caught.value.code == 2
    assert cloud_account.calls == set()
    offered = re.search(r"\{([\w,]+)\}", capsys.readouterr().err)[1].split(",")
    assert offered == list(ec2.ACTIONS)


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["launch", *PLAN, "--run", "a b"], "the run's name 'a b'"),
        (["launch", *PLAN, "--run", "../x"], "the run's name"),
        (["launch", *PLAN, "--set=--training.epochs=3"], "not of the form"),
        (["launch", *PLAN[:2], "--config", "nowhere.yaml", "--budget", "5"], "cannot read nowhere.yaml"),
        (["status", "--bucket", "a;b"], "--bucket 'a;b'"),
        (["status", "--bucket", BUCKET], "there is none"),
    ],
)
def test_wrong_usage_is_one_line(cloud_account, flags, problem):
    with pytest.raises(UsageError, match=re.escape(problem)):
        ec2.main(flags)


@pytest.mark.parametrize("budget", ["0", "-3", "nan", "much"])
def test_a_budget_is_a_sum_of_money(budget):
    with pytest.raises(SystemExit) as caught:
        ec2.main(["launch", "--bucket", BUCKET, "--config", CONFIG, "--budget", budget])
    assert caught.value.code == 2


# --- doctor: what moto lacks is stubbed with botocore's own Stubber ---------------------------------------------------


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


def test_doctor_passes_where_everything_is_there(cloud_account, monkeypatch, capsys):
    put_betons(cloud_account, 400)
    stub(monkeypatch, cloud_account, {"service-quotas": quota(8.0), "ssm": with_image(cloud_account)})
    ec2.main(["doctor", "--bucket", BUCKET, "--instance", "g5.2xlarge", "--spot"])
    out = capsys.readouterr().out
    assert out.count("ok ") == 7
    assert "8 vCPUs of spot G instances, g5.2xlarge takes 8" in out
    assert "a launch has what it needs" in out


def test_a_quota_that_aws_keeps_no_value_of_is_no_problem(cloud_account, monkeypatch, capsys):
    put_betons(cloud_account, 400)
    missing = ("get_service_quota", "NoSuchResourceException")
    stub(monkeypatch, cloud_account, {"service-quotas": missing, "ssm": with_image(cloud_account)})
    ec2.main(["doctor", "--bucket", BUCKET, "--instance", "p5.4xlarge", "--spot"])
    assert "not checked: AWS keeps no value of spot P5 instances" in (out := capsys.readouterr().out)
    assert "L-C4BD4855" in out


def test_doctor_says_what_to_do_about_each_problem(cloud_account, monkeypatch, capsys):
    stub(monkeypatch, cloud_account, {"service-quotas": quota(0.0), "ssm": ("get_parameter", "ParameterNotFound")})
    with pytest.raises(RunError, match="4 of these must be solved"):
        ec2.main(["doctor", "--bucket", "not-there", "--instance", "g5.xlarge"])
    out = capsys.readouterr().out
    assert "--quota-code L-DB2E81BA --desired-value 4 --region us-east-1" in out
    assert "aws s3 mb s3://not-there --region us-east-1" in out
    assert "PROBLEM  image: us-east-1 does not say which image is the newest: name one of that region with --ami" in out
    assert "PROBLEM  betons: AWS refuses ListObjectsV2 (NoSuchBucket)" in out


def test_doctor_knows_other_regions_images_networks_and_empty_buckets(cloud_account, monkeypatch, capsys):
    stub(monkeypatch, cloud_account, {"service-quotas": quota(8.0)})
    for subnet in cloud_account.ec2.describe_subnets()["Subnets"]:
        cloud_account.ec2.delete_subnet(SubnetId=subnet["SubnetId"])
    flags = ["doctor", "--bucket", BUCKET, "--ami", "ami-00000000"]
    with pytest.raises(RunError, match="4 of these must be solved"):
        ec2.main([*flags, "--instance", "g9.huge"])
    out = capsys.readouterr().out
    assert "PROBLEM  region: us-east-1 has no g9.huge; choose another --region" in out
    assert "PROBLEM  image: there is no image ami-00000000 in us-east-1: name one of that region with --ami" in out
    assert (
        "PROBLEM  network: the default VPC of us-east-1 has no default subnet: make one with: aws ec2 create-def" in out
    )
    assert "PROBLEM  betons: there is no train_*.beton under rn50/betons/; upload what write_dataset.py made" in out
    for vpc in cloud_account.ec2.describe_vpcs()["Vpcs"]:
        cloud_account.ec2.delete_vpc(VpcId=vpc["VpcId"])
    with pytest.raises(RunError, match="4 of these must be solved"):
        ec2.main([*flags, "--instance", "g9.huge"])
    assert "aws ec2 create-default-vpc --region us-east-1" in capsys.readouterr().out


def test_doctor_without_credentials_or_region(monkeypatch, moto, capsys, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto.url)
    with pytest.raises(UsageError, match="no region is set"):
        ec2.main(["doctor", "--bucket", BUCKET])
    with pytest.raises(RunError, match="7 of these"):
        ec2.main(["doctor", "--bucket", BUCKET, "--region", "us-east-1"])
    assert "there are no AWS credentials: aws configure" in capsys.readouterr().out


def price(monkeypatch, account, answers, instance="g5.2xlarge", spot=False, zones=("us-east-1a", "us-east-1b")):
    with monkeypatch.context() as patch:
        stub(patch, account, answers)
        aws = aws_module.Aws(SimpleNamespace(region="us-east-1", bucket=BUCKET), ec2.Published())
        return launching.hourly_prices(aws, instance, spot, {zone: {} for zone in zones})


def test_the_price_is_asked_for_and_else_taken_from_the_table(cloud_account, monkeypatch):
    offer = {"terms": {"OnDemand": {"a": {"priceDimensions": {"b": {"pricePerUnit": {"USD": "1.3000000000"}}}}}}}
    reserved = json.dumps(offer).replace("1.3000000000", "0.0000000000")  # capacity that was bought ahead
    listed = {"pricing": ("get_products", {"PriceList": [reserved, json.dumps(offer)]})}
    assert price(monkeypatch, cloud_account, listed) == ({"us-east-1a": 1.3, "us-east-1b": 1.3}, "AWS Pricing API")
    refused = {"pricing": ("get_products", "AccessDeniedException")}
    prices, source = price(monkeypatch, cloud_account, refused, zones=["us-east-1a"])
    assert prices == {"us-east-1a": 1.212}
    assert "costs.csv" in source
    history = [("us-east-1b", "0.41"), ("us-east-1b", "0.5"), ("us-east-1a", "0.45")]  # newest first
    history = [{"AvailabilityZone": zone, "SpotPrice": dollars} for zone, dollars in history]
    answers = {"ec2": ("describe_spot_price_history", {"SpotPriceHistory": history})}
    found = price(monkeypatch, cloud_account, answers, spot=True)
    assert found == ({"us-east-1a": 0.45, "us-east-1b": 0.41}, "spot prices of now")
    with pytest.raises(RunError, match="no price is known for x9.large"):
        price(monkeypatch, cloud_account, refused, instance="x9.large")


# --- status, stop, fetch, clean --------------------------------------------------------------------------------------


def report(account, instance, state="training", ago=10, hours=2.0, **more):
    now = time.time()
    record = {"instance_id": instance["InstanceId"], "dollars_per_hour": 0.5, "started": now - ago - 3600 * hours}
    put(account, f"rn50/runs/demo/instances/{instance['InstanceId']}.json", record | {"seen": now - ago, "state": state,
                                                                                     **more})  # fmt: skip


def test_status_shows_progress_dollars_and_the_last_lines(cloud_account, capsys):
    instance = launch(cloud_account)
    ec2.main(["status", "--bucket", BUCKET])
    assert re.search(r"running for \d+ s, has not reported yet", capsys.readouterr().out)
    report(cloud_account, instance)
    rows = [{"epoch": k, "resolution": 64, "train_loss": 1.5, "top1": 50.0 + k, "train_seconds": 3600, "val_seconds": 0}
            for k in range(2)]  # fmt: skip
    put(cloud_account, "rn50/runs/demo/log.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    put(cloud_account, "rn50/runs/demo/console.log", b"one\ntwo\nthree\n")
    ec2.main(["status", "--bucket", BUCKET, "--run", "demo"])
    out = capsys.readouterr().out
    assert f"instance {instance['InstanceId']}: running; training, seen 1" in out
    assert "dollars so far: 1.00 of 25.00" in out
    assert "epoch 2 of 8, 64 px, loss 1.500, top-1 51.00 % after epoch 2" in out
    assert "forecast: 6.0 h more at the pace of the last epochs, $" in out
    assert "  | three" in out
    rows[-1] |= {"forecast": {"top1": 78.25, "evaluation": "224 px"}, "dollars_to_finish": 3.5}
    put(cloud_account, "rn50/runs/demo/log.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    report(cloud_account, instance, ago=900)
    ec2.main(["status", "--bucket", BUCKET])
    out = capsys.readouterr().out
    assert "it runs but does not report" in out
    assert "forecast: top-1 78.2 % at 224 px, $4.50 in all" in out
    cloud_account.ec2.terminate_instances(InstanceIds=[instance["InstanceId"]])
    ec2.main(["status", "--bucket", BUCKET])
    said = capsys.readouterr().out
    assert "it was taken away: go on with " in said
    assert f"python tools/ec2.py resume --bucket {BUCKET} --run demo\n" in said


def test_status_counts_an_instance_that_has_not_reported_and_says_why_one_never_did(cloud_account, monkeypatch, capsys):
    instance = launch(cloud_account)
    price = json.loads(cloud_account.s3.get_object(Bucket=BUCKET, Key="rn50/runs/demo/launch.json")["Body"].read())[
        "dollars_per_hour"
    ]
    with monkeypatch.context() as patch:
        later = time.time() + 7200
        patch.setattr(status.time, "time", lambda: later)
        ec2.main(["status", "--bucket", BUCKET])
    out = capsys.readouterr().out
    assert "running for 2.0 h, has not reported yet" in out
    assert f"dollars so far: {2 * price:.2f} of 25.00" in out
    cloud_account.ec2.terminate_instances(InstanceIds=[instance["InstanceId"]])
    ec2.main(["status", "--bucket", BUCKET])
    out = capsys.readouterr().out
    assert f"instance {instance['InstanceId']}: gone before it reported (Client.UserInitiatedShutdown" in out
    assert f"go on with python tools/ec2.py resume --bucket {BUCKET} --run demo" in out.replace(".venv/bin/", "")


def test_stop_waits_for_the_checkpoint_and_terminates(cloud_account, capsys, monkeypatch):
    instance = launch(cloud_account)
    report(cloud_account, instance, state="stopped", reason="stop was asked for")
    ec2.main(["stop", "--bucket", BUCKET, "--run", "demo"])
    assert "has stopped: stop was asked for" in capsys.readouterr().out
    assert alive(cloud_account) == []
    ec2.main(["stop", "--bucket", BUCKET, "--run", "demo"])
    assert "demo has no instance" in capsys.readouterr().out
    monkeypatch.setattr(cleanup, "STOP_PATIENCE", 0.2)
    ec2.main(["resume", "--bucket", BUCKET, "--run", "demo", "--ami", cloud_account.image, "--yes"])
    assert "NoSuchKey" in refused(cloud_account, "rn50/runs/demo/stop")
    ec2.main(["stop", "--bucket", BUCKET, "--run", "demo"])
    assert "it did not answer; terminating it" in capsys.readouterr().out
    assert alive(cloud_account) == []


def refused(account, key):
    with pytest.raises(ClientError) as caught:
        account.s3.get_object(Bucket=BUCKET, Key=key)
    return str(caught.value)


def test_resume_keeps_the_budget_over_all_instances(cloud_account):
    instance = launch(cloud_account)
    resume = ["resume", "--bucket", BUCKET, "--run", "demo", "--ami", cloud_account.image, "--yes"]
    with pytest.raises(RunError, match="is running"):
        ec2.main(resume)
    cloud_account.ec2.terminate_instances(InstanceIds=[instance["InstanceId"]])
    report(cloud_account, instance, hours=51)
    with pytest.raises(RunError, match=r"\$25.50 of \$25.00 are spent"):
        ec2.main(resume)
    ec2.main([*resume, "--budget", "30", "--instance", "g5.xlarge", "--on-demand"])
    second = only_instance(cloud_account)
    assert second["InstanceType"] == "g5.xlarge"
    assert "InstanceLifecycle" not in second
    minutes = int(re.search(r"RN50_MINUTES=(\d+)", user_data(cloud_account, second))[1])
    assert minutes == int(60 * 4.5 / 1.006)
    cloud_account.ec2.terminate_instances(InstanceIds=[second["InstanceId"]])
    put(cloud_account, "rn50/runs/demo/status.json", {"status": "finished", "reason": "all epochs are done", "step": 9})
    with pytest.raises(RunError, match="is finished"):
        ec2.main(resume)


def test_a_launch_that_died_before_it_noted_its_instance_is_not_asked_for_again(cloud_account):
    """EC2 gives the old instance, terminated, for a token that it knows."""
    first = launch(cloud_account)
    record = json.loads(cloud_account.s3.get_object(Bucket=BUCKET, Key="rn50/runs/demo/launch.json")["Body"].read())
    put(cloud_account, "rn50/runs/demo/launch.json", record | {"instance_id": None})
    report(cloud_account, first, hours=1)
    cloud_account.ec2.terminate_instances(InstanceIds=[first["InstanceId"]])
    ec2.main(["resume", "--bucket", BUCKET, "--run", "demo", "--ami", IMAGE, "--yes"])
    assert only_instance(cloud_account)["ClientToken"] != first["ClientToken"]


def test_clean_waits_for_the_network_interfaces_of_the_last_instance(cloud_account, monkeypatch):
    launch(cloud_account)
    broken(monkeypatch, "ec2", "delete_security_group", "DependencyViolation", times=2)
    ec2.main(["clean", "--bucket", BUCKET, "--yes"])
    named = [{"Name": "tag:project", "Values": ["rn50"]}]
    assert cloud_account.ec2.describe_security_groups(Filters=named)["SecurityGroups"] == []


def test_clean_lists_first_and_removes_everything_that_is_tagged(cloud_account, capsys, monkeypatch):
    launch(cloud_account)
    zone = "us-east-1a"
    foreign = cloud_account.ec2.create_volume(AvailabilityZone=zone, Size=1)["VolumeId"]
    marks = aws_module.tags({"project": "rn50", "rn50-bucket": BUCKET})
    ours = cloud_account.ec2.create_volume(
        AvailabilityZone=zone, Size=1, TagSpecifications=[{"ResourceType": "volume", "Tags": marks}]
    )["VolumeId"]
    cloud_account.s3.create_multipart_upload(Bucket=BUCKET, Key="rn50/runs/demo/last.pt")
    with monkeypatch.context() as patch:
        patch.setattr("builtins.input", lambda question: "")
        with pytest.raises(RunError, match="nothing was removed"):
            ec2.main(["clean", "--bucket", BUCKET])
    assert len(alive(cloud_account)) == 1
    listed = capsys.readouterr().out
    for what in (
        "instances i-",
        f"volume {ours}",
        "security group sg-",
        "instance profile rn50-",
        "role rn50-",
        "upload",
    ):
        assert what in listed
    assert foreign not in listed
    ec2.main(["clean", "--bucket", BUCKET, "--yes"])
    assert "is kept, and costs its storage" in capsys.readouterr().out
    assert alive(cloud_account) == []
    assert cloud_account.iam.list_roles()["Roles"] == []
    assert cloud_account.iam.list_instance_profiles()["InstanceProfiles"] == []
    assert foreign in [v["VolumeId"] for v in cloud_account.ec2.describe_volumes()["Volumes"]]
    ec2.main(["clean", "--bucket", BUCKET, "--yes", "--data"])
    assert cloud_account.s3.list_objects_v2(Bucket=BUCKET)["KeyCount"] == 0
    ec2.main(["clean", "--bucket", BUCKET, "--yes", "--data"])
    assert "there is nothing to remove" in capsys.readouterr().out


# --- Policies: what is granted is what is called, both ways -----------------------------------------------------------

# IAM's names where they differ from the call's; () where a call needs no permission.
ACTIONS = {
    "s3:CreateMultipartUpload": ["s3:PutObject"],
    "s3:UploadPart": ["s3:PutObject"],
    "s3:CompleteMultipartUpload": ["s3:PutObject"],
    "s3:HeadBucket": ["s3:ListBucket"],
    "s3:HeadObject": ["s3:GetObject"],
    "s3:ListObjectsV2": ["s3:ListBucket"],
    "s3:ListMultipartUploads": ["s3:ListBucketMultipartUploads"],
    "service-quotas:GetServiceQuota": ["servicequotas:GetServiceQuota"],
    # the last for the first spot instance of an account
    "ec2:RunInstances": ["ec2:RunInstances", "ec2:CreateTags", "iam:PassRole", "iam:CreateServiceLinkedRole"],
    "ec2:CreateSecurityGroup": ["ec2:CreateSecurityGroup", "ec2:CreateTags"],
    "iam:AddRoleToInstanceProfile": ["iam:AddRoleToInstanceProfile", "iam:PassRole"],
    "iam:CreateRole": ["iam:CreateRole", "iam:TagRole"],
    "iam:CreateInstanceProfile": ["iam:CreateInstanceProfile", "iam:TagInstanceProfile"],
    "sts:GetCallerIdentity": [],
}
# The user's `aws ssm start-session`, by AWS's "Sample IAM policies for Session Manager".
SHELL = {"ssm:StartSession", "ssm:TerminateSession", "ssmmessages:OpenDataChannel"}
# The agent of Session Manager, which AWS wrote, calls these.
AGENT = {"ssm:UpdateInstanceInformation", "ssmmessages:CreateControlChannel", "ssmmessages:CreateDataChannel"}
AGENT |= {"ssmmessages:OpenControlChannel", "ssmmessages:OpenDataChannel"}


def granted(kind):
    statements = json.loads(accounts.policy(kind, BUCKET))["Statement"]
    lists = [s["Action"] if isinstance(s["Action"], list) else [s["Action"]] for s in statements]
    return {action for listed in lists for action in listed}


def needed(calls):
    return {action for call in calls for action in ACTIONS.get(call, [call])}


@pytest.mark.parametrize("kind", ["instance", "user"])
def test_the_policies_pass_a_linter_and_hold_no_wildcard_action(kind):
    found = parliament.analyze_policy_string(accounts.policy(kind, BUCKET)).findings
    newer = "ssmmessages:OpenDataChannel"  # AWS gave it resources after the linter's table was made
    assert [finding for finding in found if finding.severity != "LOW" and newer not in str(finding.detail)] == []
    assert not any("*" in action for action in granted(kind))
    assert '"BUCKET"' not in accounts.policy(kind, BUCKET)


def test_the_user_may_do_what_the_commands_call_and_nothing_else(cloud_account, monkeypatch, tmp_path):
    stubs = {
        "service-quotas": quota(96.0),
        "ssm": with_image(cloud_account),
        "pricing": ("get_products", "AccessDenied"),
    }
    stub(monkeypatch, cloud_account, stubs)
    for name in ("train_400.beton", "train_400.json", "val_400.beton", "val_400.json"):
        put(cloud_account, f"rn50/betons/{name}", b"x")
    ec2.main(["doctor", "--bucket", BUCKET, "--spot"])
    ec2.main(["launch", *PLAN, "--commit", "HEAD"])
    report(cloud_account, only_instance(cloud_account), state="stopped")
    ec2.main(["status", "--bucket", BUCKET])
    ec2.main(["stop", "--bucket", BUCKET])
    ec2.main(["resume", "--bucket", BUCKET, "--run", "demo", "--yes", "--on-demand"])
    ec2.main(["fetch", "--bucket", BUCKET, "--out", str(tmp_path)])
    theirs = set(cloud_account.calls)
    marks = aws_module.tags({"project": "rn50", "rn50-bucket": BUCKET})
    cloud_account.ec2.create_volume(
        AvailabilityZone="us-east-1a", Size=1, TagSpecifications=[{"ResourceType": "volume", "Tags": marks}]
    )
    cloud_account.s3.create_multipart_upload(Bucket=BUCKET, Key="rn50/runs/demo/last.pt")
    cloud_account.calls.clear()
    ec2.main(["clean", "--bucket", BUCKET, "--yes", "--data"])
    assert needed(theirs | cloud_account.calls) == granted("user") - SHELL
    assert granted("user") >= SHELL


def test_the_user_tags_only_what_is_being_made_and_removes_only_what_is_tagged(cloud_account):
    """Who may tag anything may terminate anything: the conditions hold together only as a pair."""
    conditions = {}
    for statement in json.loads(accounts.policy("user", BUCKET))["Statement"]:
        for action in [statement["Action"]] if isinstance(statement["Action"], str) else statement["Action"]:
            conditions.setdefault(action, []).append(statement.get("Condition"))
    made = {"StringEquals": {"ec2:CreateAction": ["CreateSecurityGroup", "RunInstances"]}}
    assert conditions["ec2:CreateTags"] == [made]
    ours = {"StringEquals": {"aws:ResourceTag/project": "rn50"}}
    for action in ("ec2:TerminateInstances", "ec2:DeleteVolume", "ec2:DeleteSecurityGroup"):
        assert conditions[action] == [ours]


def test_the_instance_may_do_what_it_calls_and_nothing_else(cloud_account, tmp_path, betons, monkeypatch):
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", boto3.Session())
    put(cloud_account, "rn50/runs/demo/launch.json", {"dollars_per_hour": 1.0, "run": "demo"})
    for path in betons.iterdir():
        put(cloud_account, f"rn50/betons/{path.name}", path.read_bytes())
    monkeypatch.setenv("RN50_BUCKET", BUCKET)
    monkeypatch.setenv("RN50_RUN", "demo")
    monkeypatch.setenv("RN50_INSTANCE", "i-1")
    monkeypatch.setenv("RN50_PREFIX", str(tmp_path))
    cloud_account.calls.clear()
    store, reporter, record = ec2_supervise.connect()
    cloud.stage(store.client, BUCKET, tmp_path / "betons", rung=64)
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / "log.jsonl").write_text("{}\n")
    assert reporter.beat("training", folder)
    assert ec2_supervise.stop_reason(store, record | {"idle_minutes": 30, "budget": 5}, 0) is None
    mirror = Mirror(f"s3://{BUCKET}/{cloud.RUNS}", folder=folder, warn=print)
    assert mirror.fetch(into=folder / "last.pt.partial", later_than=None) is False
    (folder / "last.pt").write_bytes(bytes(9 << 20))  # more than one part
    mirror.offer(folder / "last.pt", 3)
    assert mirror.wait(20)
    assert mirror.fetch(into=folder / "last.pt.partial", later_than=1) is True
    # an upload that breaks off is aborted by boto3 itself
    assert granted("instance") - AGENT == needed(cloud_account.calls) | {"s3:AbortMultipartUpload"}
    assert granted("instance") >= AGENT


# --- Staging ---------------------------------------------------------------------------------------------------------


def test_staging_takes_what_the_run_needs_and_checks_it(cloud_account, tmp_path, betons, capsys):
    for path in betons.iterdir():
        put(cloud_account, f"rn50/betons/{path.name}", path.read_bytes())
    cloud.stage(cloud_account.s3, BUCKET, tmp_path, rung=64)
    names = {f"{stem}.{kind}" for stem in ("train_64", "val_64", "val_96") for kind in ("beton", "json")}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert (tmp_path / "train_64.beton").read_bytes() == (betons / "train_64.beton").read_bytes()
    before = (tmp_path / "train_64.beton").stat().st_mtime_ns
    cloud.stage(cloud_account.s3, BUCKET, tmp_path, rung=None)
    assert (tmp_path / "train_64.beton").stat().st_mtime_ns == before
    assert (tmp_path / "train_96.beton").exists()
    damaged = bytearray((betons / "val_64.beton").read_bytes())
    damaged[100] ^= 1
    put(cloud_account, "rn50/betons/val_64.beton", bytes(damaged))
    (tmp_path / "val_64.beton").unlink()
    with pytest.raises(RunError, match="val_64.beton is not what its manifest says"):
        cloud.stage(cloud_account.s3, BUCKET, tmp_path, rung=64)
    assert not list(tmp_path.glob("val_64.beton*"))
    assert "arrived damaged; once more" in capsys.readouterr().out


def test_staging_says_what_is_not_there_or_does_not_fit(cloud_account, tmp_path, monkeypatch):
    with pytest.raises(RunError, match="there is no train_400.beton"):
        cloud.stage(cloud_account.s3, BUCKET, tmp_path, rung=400)
    for name in ("train_400.beton", "val_400.beton", "val_400.json"):
        put(cloud_account, f"rn50/betons/{name}", b"x" * 1000)
    with pytest.raises(RunError, match="train_400.beton has no manifest"):
        cloud.stage(cloud_account.s3, BUCKET, tmp_path, rung=400)
    put(cloud_account, "rn50/betons/train_400.json", b"{}")
    monkeypatch.setattr(cloud.shutil, "disk_usage", lambda path: SimpleNamespace(free=1500))
    with pytest.raises(RunError, match="the betons take"):
        cloud.stage(cloud_account.s3, BUCKET, tmp_path, rung=400)


# --- The page: its commands are these ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("page", "actions"),
    [("docs/ec2.md", "doctor launch status stop resume fetch clean"), ("README.md", "doctor launch status clean")],
)
def test_every_command_of_the_page_runs(cloud_account, monkeypatch, tmp_path, capsys, page, actions):
    text = (ROOT / page).read_text().replace("BUCKET", BUCKET)
    blocks = re.findall(r"```\n(.*?)```", text, re.S)
    lines = [line.partition("#")[0].split() for block in blocks for line in block.splitlines()]
    commands = [words[2:] for words in lines if words[1:2] == ["tools/ec2.py"]]
    assert [words[0] for words in commands] == actions.split()
    put_betons(cloud_account, 400)
    stub(monkeypatch, cloud_account, {"service-quotas": quota(8.0), "ssm": with_image(cloud_account)})
    monkeypatch.setattr(launching, "pinned_commit", lambda name: launching.git("rev-parse", "HEAD").decode().strip())
    monkeypatch.setattr(cleanup, "STOP_PATIENCE", 0.1)
    monkeypatch.setattr("builtins.input", lambda question: "yes")
    monkeypatch.chdir(tmp_path)
    for words in commands:
        ec2.main(words)
    assert (tmp_path / "runs" / "rn50_78" / "launch.json").exists() == ("fetch" in actions)
    assert alive(cloud_account) == []


def test_the_first_launch_that_the_page_advises_is_not_refused(cloud_account, monkeypatch, capsys):
    """A small budget for the whole recipe: refused without the setting that docs/ec2.md gives with it, not with it."""
    put_betons(cloud_account, 400)
    page = (ROOT / "docs" / "ec2.md").read_text()
    advice = re.search(r"`(--budget 2 [^`]*)`", page)[1].split()
    flags = ["launch", "--bucket", BUCKET, "--config", "rn50_configs/rn50_78.yaml", "--instance", "g5.xlarge"]
    flags += ["--ami", IMAGE, "--commit", "HEAD", "--yes"]
    with pytest.raises(RunError, match="is projected to cost"):
        ec2.main([*flags, "--budget", "2"])
    ec2.main([*flags, *advice])
    assert "budget $2.00" in capsys.readouterr().out
    assert len(alive(cloud_account)) == 1


# --- The supervisor by itself: how each end of a training is taken ----------------------------------------------------


class FakeStore:
    """Takes what is written; `stop` and the records of other instances can be set."""

    bucket, prefix, run = BUCKET, "rn50/runs/demo", "demo"

    def __init__(self):
        self.written, self.asked, self.others = {}, None, []
        self.client = SimpleNamespace(put_object=lambda **options: None)

    def write(self, name, value):
        self.written[name] = dict(value)

    def read_bytes(self, name):
        return self.asked if b"started" in self.console.read_bytes() else None

    def instances(self):
        return self.others if b"started" in self.console.read_bytes() else []


@pytest.fixture
def supervised(tmp_path, monkeypatch):
    """train(script): runs `script` as the training; gives (what was reported last, exit status, shutdowns)."""
    monkeypatch.setattr(ec2_supervise, "ROOT", tmp_path)
    monkeypatch.setattr(ec2_supervise, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(cloud, "HEARTBEAT_SECONDS", 0.05)
    folder = tmp_path / "runs" / "demo"
    folder.mkdir(parents=True)
    off, real, handler = [], subprocess.run, signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(
        ec2_supervise.subprocess,
        "run",
        lambda command, **options: off.append(command) if command[0] == "shutdown" else real(command, **options),
    )
    store = FakeStore()

    def train(script, **record):
        whole = {"run": "demo", "bucket": BUCKET, "config": "x", "settings": [], "budget": 25.0, "idle_minutes": 30}
        whole |= {"dollars_per_hour": 1.0, **record}
        monkeypatch.setattr(
            cloud, "training_command", lambda *args, **options: [sys.executable, "-c", script, str(folder)]
        )
        reporter = cloud.Reporter(store, instance_id="i-1", dollars_per_hour=1.0, started=time.time(), say=print)
        code = 0
        try:
            ec2_supervise.train(store, reporter, whole, "betons")
        except SystemExit as leaving:
            code = leaving.code
        return store.written["instances/i-1.json"], code, len(off)

    train.folder, train.store, store.console = folder, store, folder / cloud.CONSOLE
    yield train
    signal.signal(signal.SIGTERM, handler)


STATUS = """
import json, signal, sys, time
def status(word, why="why"):
    open(sys.argv[1] + "/status.json", "w").write(json.dumps({"status": word, "reason": why, "step": 3}))
"""
WAITS = (
    STATUS
    + """
def leave(*which):
    status("interrupted", "SIGTERM")
    sys.exit(3)
signal.signal(signal.SIGTERM, leave)
print("started", flush=True)
while True:
    time.sleep(0.01)
"""
)


@pytest.mark.parametrize(
    ("script", "state", "code", "off"),
    [
        (STATUS + "status('finished')", "finished", 0, 1),
        (STATUS + "status('budget'); sys.exit(4)", "budget", 0, 1),
        (STATUS + "status('interrupted', 'EC2 spot notice (terminate at 12:00)'); sys.exit(3)", "interrupted", 0, 1),
        (STATUS + "status('interrupted', 'EC2 rebalance recommendation (12:00)'); sys.exit(3)", "failed", 1, 0),
        (STATUS + "status('failed'); sys.exit(1)", "failed", 1, 0),
        ("import os; os.kill(os.getpid(), 9)", "failed", 1, 0),
        ("import sys; print('error: no such key'); sys.exit(2)", "failed", 0, 1),
        # under torchrun a planned stop exits 0
        (STATUS + "status('budget')", "budget", 0, 1),
    ],
)
def test_every_end_of_a_training_is_taken_for_what_it_is(supervised, script, state, code, off):
    record, left, switched_off = supervised(script)
    assert (record["state"], left, switched_off) == (state, code, off)


@pytest.mark.parametrize("word", ["finished", "budget"])
def test_what_is_finished_or_spent_is_never_started_again(supervised, word):
    (supervised.folder / "status.json").write_text(json.dumps({"status": word, "reason": "as it was"}))
    record, _, off = supervised("raise SystemExit('started again')")
    assert (record["state"], record["reason"], off) == (word, "as it was", 1)
    assert not (supervised.folder / cloud.CONSOLE).exists()


def test_a_stop_that_is_asked_for_ends_the_run_with_a_checkpoint(supervised):
    supervised.store.asked = b"{}"
    record, code, off = supervised(WAITS)
    assert (record["state"], record["reason"], code, off) == ("stopped", "stop was asked for", 0, 1)
    assert json.loads((supervised.folder / "status.json").read_text())["status"] == "interrupted"


def test_the_instances_own_budget_counts_every_instance(supervised):
    supervised.store.others = [
        {"started": 0, "seen": 3600 * 20, "dollars_per_hour": 1.0},
        {"started": 0, "seen": 3600 * 10, "dollars_per_hour": 0.5},
    ]
    record, _, off = supervised(WAITS)
    assert record["state"] == "budget"
    assert record["reason"] == "budget: $25.00 of $25.00 are spent, set-up included"
    assert off == 1


def test_a_run_that_writes_nothing_is_ended(supervised):
    record, _, off = supervised(WAITS, idle_minutes=0.005)
    assert (record["state"], off) == ("stopped", 1)
    assert record["reason"].startswith("idle: nothing written")


def test_a_training_that_does_not_stop_is_killed(supervised, monkeypatch):
    monkeypatch.setattr(ec2_supervise, "STOP_SECONDS", 0.2)
    supervised.store.asked = b"{}"
    record, _, off = supervised(WAITS.replace("sys.exit(3)", "pass"))
    assert (record["state"], off) == ("stopped", 1)


def test_a_training_that_cannot_even_be_killed_does_not_keep_the_instance(supervised, monkeypatch):
    """A hung GPU's driver holds the process in the kernel: nothing but switching off ends that."""
    monkeypatch.setattr(ec2_supervise, "STOP_SECONDS", 0.1)
    monkeypatch.setattr(ec2_supervise, "KILL_SECONDS", 0.1)
    held = []
    monkeypatch.setattr(subprocess.Popen, "kill", lambda process: held.append(process))
    supervised.store.asked = b"{}"
    try:
        record, _, off = supervised(WAITS.replace("sys.exit(3)", "pass"))
    finally:
        monkeypatch.undo()
        held[0].kill()
        held[0].wait()
    assert (record["state"], record["reason"], off) == ("stopped", "stop was asked for", 1)


def test_systemds_stop_is_passed_on_and_switches_nothing_off(supervised):
    threading.Timer(0.6, os.kill, (os.getpid(), signal.SIGTERM)).start()
    record, code, off = supervised(WAITS)
    assert (record["state"], record["reason"], code, off) == ("interrupted", "SIGTERM", 0, 0)


def test_without_s3_the_training_goes_on(supervised, monkeypatch, capsys):
    def unreachable(*args):
        raise ClientError({"Error": {"Code": "503", "Message": "Slow Down"}}, "PutObject")

    monkeypatch.setattr(supervised.store, "read_bytes", unreachable)
    record, code, off = supervised(STATUS + "time.sleep(0.5); status('finished')")
    assert (record["state"], code, off) == ("finished", 0, 1)
    assert "warning: cannot ask S3" in capsys.readouterr().out


def test_the_training_command_has_what_the_launch_asked_for():
    record = {"run": "r", "bucket": BUCKET, "config": "c.yaml", "settings": ["a.b=1"], "budget": 25.0}
    record["dollars_per_hour"] = 0.5
    one = cloud.training_command(record, python="python", betons="/b", gpus=1)
    assert one[:4] == ["python", "train_imagenet.py", "--config-file", "c.yaml"]
    assert {"--a.b=1", "--data.dir=/b", "--logging.run_name=r", f"--logging.mirror=s3://{BUCKET}/rn50/runs"} < set(one)
    assert {"--budget.max_dollars=25", "--budget.dollars_per_hour=0.5"} < set(one)
    assert "--training.device=cuda" in one  # auto would train on the processor where the driver is missing
    record["settings"] = ["training.device=cpu"]
    own = cloud.training_command(record, python="python", betons="/b", gpus=0)
    assert [word for word in own if "training.device" in word] == ["--training.device=cpu"]
    eight = cloud.training_command(record, python="python", betons="/b", gpus=8)
    assert eight[:4] == ["python", "-m", "torch.distributed.run", "--nproc_per_node=8"]


# --- The instance itself: user data, bootstrap, supervisor, training --------------------------------------------------

# 20 steps; with a checkpoint there is something to lose.
SETTINGS = ["training.epochs=2", "training.batch_size=20", "training.micro_batch=20", "training.device=cpu"]
SETTINGS += [
    "training.precision=fp32",
    "resolution.start=48",
    "resolution.end=48",
    "lr.warmup_epochs=1",
    "data.rung=64",
]
SETTINGS += [
    "resolution.start_ramp=0",
    "resolution.end_ramp=0",
    "data.workers=1",
    "validation.every=2",
    "logging.checkpoint_steps=5",
]
SYSTEMCTL = """#!/bin/bash
echo "systemctl $*" >>"$RN50_PREFIX/did"
[[ $* == "enable --now rn50-train.service" ]] || exit 0
unit=$RN50_PREFIX/etc/systemd/system/rn50-train.service
cd "$(sed -n 's/^WorkingDirectory=//p' "$unit")" || exit 1
# Restart=on-failure
(for _ in 1 2 3 4 5; do
    $(sed -n 's/^ExecStart=//p' "$unit") >>"$RN50_PREFIX/journal" 2>&1 && break
    echo "restart" >>"$RN50_PREFIX/did"
done) &
"""
# What the aws command of the image does for the user data; at first the instance's role is not known yet.
AWS = """#!{python}
import pathlib, sys, boto3
source, target = sys.argv[4:6]
assert sys.argv[1:4] == ["s3", "cp", "--only-show-errors"]
tried = pathlib.Path(__file__).with_name("tried")
if not tried.exists():
    tried.touch()
    sys.exit("fatal error: Unable to locate credentials")
bucket, _, key = (target if target.startswith("s3://") else source).removeprefix("s3://").partition("/")
if target.startswith("s3://"):
    boto3.client("s3").upload_file(source, bucket, key)
else:
    boto3.client("s3").download_file(bucket, key, target)
"""


class Machine:
    """An instance's first start in an empty folder: its user data is run as it is, with this one's packages."""

    def __init__(self, folder, script, moto, metadata, instance_id):
        self.folder, self.metadata = folder, metadata
        metadata.instance_id = instance_id
        tree, tools = folder / "opt" / "rn50", folder / "shims"
        for place in (tree / ".venv" / "bin", tree / "rn50/data", tools):
            place.mkdir(parents=True)
        for name, text in (
            ("systemctl", SYSTEMCTL),
            ("shutdown", '#!/bin/bash\necho "shutdown $*" >>"$RN50_PREFIX/did"\n'),
            ("aws", AWS.format(python=sys.executable)),
        ):
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
        # tools/setup.sh finds that there is nothing to install: these packages, for these inputs
        (tree / ".venv" / "bin" / "python").write_text(f'#!/bin/bash\nexec {sys.executable} "$@"\n')
        (tree / ".venv" / "bin" / "python").chmod(0o755)
        for built in (ROOT / "rn50/data").glob("_decode*.so"):
            shutil.copy(built, tree / "rn50/data")
        names = (
            "pyproject.toml",
            "requirements.lock",
            "setup.py",
            "rn50/data/csrc/decode.c",
            "rn50/data/csrc/decode.h",
        )
        digest = hashlib.sha256(b"".join((ROOT / name).read_bytes() for name in names)).hexdigest()
        version = ".".join(map(str, sys.version_info[:3]))
        (tree / ".venv" / "rn50-setup-done").write_text(f"{tree} {version} {digest}\n")
        (folder / "user-data").write_text(script)
        self.environment = moto.environment | {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "HOME": str(folder),
            "PYTHONPATH": str(tree),
            "RN50_PREFIX": str(folder),
            "RN50_POLL_SECONDS": "0.2",
            "OMP_NUM_THREADS": "1",
            "AWS_EC2_METADATA_SERVICE_ENDPOINT": metadata.url,
        }

    def start(self, status=0):
        done = subprocess.run(["bash", self.folder / "user-data"], env=self.environment, timeout=120)
        assert done.returncode == status, self.log("var/log/rn50-bootstrap.log")

    def log(self, name):
        path = self.folder / name
        return path.read_text(errors="replace") if path.exists() else ""

    def wait_for(self, what, name, within=300):
        deadline = time.monotonic() + within
        while what not in self.log(name):
            assert time.monotonic() < deadline, self.everything()
            time.sleep(0.05)

    def training(self):
        """The process id of train_imagenet.py."""
        ours = f"--data.dir={self.folder}".encode()
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                words = entry.read_bytes()
                if b"train_imagenet.py" in words and ours in words:
                    return int(entry.parent.name)
        raise AssertionError(self.everything())

    def everything(self):
        return "\n".join(self.log(n) for n in ("did", "journal", "var/log/rn50-bootstrap.log", CONSOLE))


CONSOLE = "opt/rn50/runs/demo/console.log"


def committed():
    """The tree as it is here, as a commit on no branch; HEAD where nothing is changed."""
    author = {f"GIT_{who}_{what}": "test@invalid" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    done = subprocess.run(["git", "stash", "create"], cwd=ROOT, env=os.environ | author, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git working tree")
    return done.stdout.strip() or "HEAD"


def test_a_set_up_that_fails_is_reported_and_switches_the_instance_off(cloud_account, moto, tmp_path, capsys):
    with Metadata() as metadata:
        instance = launch(cloud_account, "--commit", committed(), *(f"--set={s}" for s in SETTINGS))
        machine = Machine(tmp_path / "one", user_data(cloud_account, instance), moto, metadata, instance["InstanceId"])
        for name in ("train_64.beton", "train_64.json"):
            cloud_account.s3.delete_object(Bucket=BUCKET, Key=f"rn50/betons/{name}")
        machine.start(status=1)
    off = [line for line in machine.log("did").splitlines() if line.startswith("shutdown")]
    assert off[1:2] == ["shutdown -h now"]
    capsys.readouterr()
    ec2.main(["status", "--bucket", BUCKET])
    out = capsys.readouterr().out
    assert "failed (setting up failed at: betons)" in out
    assert "  | error: there is no train_64.beton under rn50/betons/" in out


def test_a_set_up_that_hangs_is_ended(cloud_account, moto, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(launching, "SETUP_MINUTES", 0.1)
    with Metadata() as metadata:
        instance = launch(cloud_account, "--commit", committed())
        machine = Machine(tmp_path / "one", user_data(cloud_account, instance), moto, metadata, instance["InstanceId"])
        hangs = machine.folder / "opt/rn50/.venv/bin/python"  # what tools/setup.sh asks first
        hangs.write_text(hangs.read_text().replace("exec ", "[[ $* == *give-up* ]] || sleep 60\nexec "))
        machine.start(status=124)
    assert "shutdown -h now" in machine.log("did").splitlines()
    ec2.main(["status", "--bucket", BUCKET])
    assert "failed (setting up failed at: packages)" in capsys.readouterr().out


def test_the_budgets_limit_outlives_a_restart_of_the_machine(cloud_account, moto, tmp_path):
    """`shutdown +N` is forgotten by a restart, which does not run the user data again: a timer on the disk is not."""
    put_betons(cloud_account, 64)
    with Metadata() as metadata:
        ec2.main(
            ["launch", *(flag for flag in PLAN if flag != "--spot"), "--ami", IMAGE, "--run", "demo"]
            + ["--commit", "HEAD"]
        )
        instance = only_instance(cloud_account)
        machine = Machine(tmp_path / "one", user_data(cloud_account, instance), moto, metadata, instance["InstanceId"])
        for entry in cloud_account.s3.list_objects_v2(Bucket=BUCKET, Prefix="rn50/code/")["Contents"]:
            put(cloud_account, entry["Key"], b"nothing that runs")
        asked = time.time()
        machine.start(status=1)
    minutes = int(re.search(r"RN50_MINUTES=(\d+)", user_data(cloud_account, instance))[1])
    did = machine.log("did").splitlines()
    assert did[0] == f"shutdown -h +{minutes}"
    assert "systemctl enable --now rn50-limit.timer" in did
    timer = machine.log("etc/systemd/system/rn50-limit.timer")
    at = re.search(r"OnCalendar=(.*) UTC\nPersistent=true", timer)[1]
    at = datetime.strptime(at, "%Y-%m-%d %H:%M:%S").replace(tzinfo=UTC).timestamp()
    assert abs(at - asked - 60 * minutes) < 60
    assert "ExecStart=shutdown -h now" in machine.log("etc/systemd/system/rn50-limit.service")
    if shutil.which("systemd-analyze"):
        units = [machine.folder / "etc/systemd/system" / f"rn50-limit.{kind}" for kind in ("service", "timer")]
        done = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True)
        assert "rn50-limit" not in done.stderr, done.stderr


def test_an_image_without_the_aws_command_gets_it(cloud_account, moto, tmp_path):
    with Metadata() as metadata:
        instance = launch(cloud_account)
        machine = Machine(tmp_path / "one", user_data(cloud_account, instance), moto, metadata, instance["InstanceId"])
        shims = machine.folder / "shims"
        (shims / "aws").rename(shims / "held")
        (shims / "snap").write_text('#!/bin/bash\necho "snap $*" >>"$RN50_PREFIX/did"\nmv "${0%/*}"/{held,aws}\n')
        (shims / "snap").chmod(0o755)
        machine.environment["PATH"] = f"{shims}:/usr/bin:/bin"  # this machine's own may have one
        for entry in cloud_account.s3.list_objects_v2(Bucket=BUCKET, Prefix="rn50/code/")["Contents"]:
            put(cloud_account, entry["Key"], b"nothing that runs")
        machine.start(status=1)
    assert "snap install aws-cli --classic" in machine.log("did").splitlines()
    assert "checksum did NOT match" in machine.log("var/log/rn50-bootstrap.log")  # so it was fetched


def test_code_that_is_not_what_was_pinned_is_not_run(cloud_account, moto, tmp_path, capsys):
    with Metadata() as metadata:
        instance = launch(cloud_account)
        (key,) = (e["Key"] for e in cloud_account.s3.list_objects_v2(Bucket=BUCKET, Prefix="rn50/code/")["Contents"])
        put(cloud_account, key, b"something else")
        machine = Machine(tmp_path / "one", user_data(cloud_account, instance), moto, metadata, instance["InstanceId"])
        machine.start(status=1)
    log = machine.log("var/log/rn50-bootstrap.log")
    assert "Unable to locate credentials" in log  # and tried again
    assert "checksum did NOT match" in log
    assert machine.log("did").splitlines()[-1] == "shutdown -h +1"
    capsys.readouterr()
    ec2.main(["status", "--bucket", BUCKET])
    assert "checksum did NOT match" in capsys.readouterr().out
    assert not (tmp_path / "one" / "opt" / "rn50" / "tools").exists()


def tensors(path):
    state = checkpoint.load(path)
    found = []

    def walk(value):
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, dict | list | tuple):
            for item in value.values() if isinstance(value, dict) else value:
                walk(item)

    walk([state[part] for part in ("model", "ema", "optimizer")])
    return found


def test_a_spot_instance_that_is_taken_away_costs_nothing_but_time(cloud_account, moto, betons, tmp_path, capsys):
    for path in betons.iterdir():
        put(cloud_account, f"rn50/betons/{path.name}", path.read_bytes())
    flags = [*PLAN, "--ami", IMAGE, "--run", "demo", "--commit", committed(), *(f"--set={s}" for s in SETTINGS)]
    with Metadata() as metadata:
        ec2.main(["launch", *flags])
        first = only_instance(cloud_account)
        machine = Machine(tmp_path / "first", user_data(cloud_account, first), moto, metadata, first["InstanceId"])
        machine.start()
        assert "staged train_64.beton" in machine.log("var/log/rn50-bootstrap.log")
        machine.wait_for("resnet18 on cpu", CONSOLE)
        while not (machine.folder / "opt/rn50/runs/demo/last.pt").exists():
            time.sleep(0.02)
        # it asks for a notice every five seconds, in which it could be done
        training = machine.training()
        os.kill(training, signal.SIGSTOP)
        metadata.notice = {"action": "terminate", "time": "2030-01-01T00:00:00Z"}
        time.sleep(5.2)
        os.kill(training, signal.SIGCONT)
        machine.wait_for("shutdown -h now", "did")
        assert "interrupted: EC2 spot notice (terminate at 2030" in machine.log("journal"), machine.everything()
        assert re.match(r"shutdown -h \+\d+\n", machine.log("did"))  # the budget's hard limit comes first
        # the last word of a run that failed for good does not depend on S3
        failed = machine.log("etc/systemd/system/rn50-failed.service")
        assert re.search(r"ExecStart=-.* give-up .*\nExecStart=shutdown -h now\n", failed)
        assert "AWS_METADATA_SERVICE_NUM_ATTEMPTS=5" in machine.log("etc/rn50.env")
        metadata.notice = None
        cloud_account.ec2.terminate_instances(InstanceIds=[first["InstanceId"]])
        capsys.readouterr()
        ec2.main(["status", "--bucket", BUCKET])
        out = capsys.readouterr().out
        assert f"tools/ec2.py resume --bucket {BUCKET} --run demo" in out
        assert re.search(r"last command: interrupted \(EC2 spot notice .*\) at step \d+", out)
        assert re.search(r"epoch 1 of 2|no epoch is done yet", out)

        ec2.main(["resume", "--bucket", BUCKET, "--run", "demo", "--ami", IMAGE, "--yes"])
        second = only_instance(cloud_account)
        again = Machine(tmp_path / "second", user_data(cloud_account, second), moto, metadata, second["InstanceId"])
        again.start()
        again.wait_for("shutdown -h now", "did")
        assert "finished: all epochs are done; switching off" in again.log("journal"), again.everything()
        assert 0 < int(re.search(r"resuming .* at step (\d+)", again.log(CONSOLE))[1]) < 20
    assert "restart" not in machine.log("did") + again.log("did")
    ec2.main(["fetch", "--bucket", BUCKET, "--run", "demo", "--out", str(tmp_path / "here")])
    assert len((tmp_path / "here" / "demo" / "log.jsonl").read_text().splitlines()) == 2
    capsys.readouterr()
    ec2.main(["status", "--bucket", BUCKET])
    assert "last command: finished (all epochs are done) at step 20" in capsys.readouterr().out
    for unit in ("rn50-train.service", "rn50-failed.service"):
        if shutil.which("systemd-analyze"):
            path = tmp_path / "second" / "etc" / "systemd" / "system" / unit
            done = subprocess.run(["systemd-analyze", "verify", path], capture_output=True, text=True)
            assert not [line for line in done.stderr.splitlines() if unit in line], done.stderr

    command = [sys.executable, "train_imagenet.py", "--config-file", CONFIG, f"--data.dir={betons}"]
    command += [*(f"--{setting}" for setting in SETTINGS), f"--logging.folder={tmp_path}", "--logging.run_name=calm"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "AWS_EC2_METADATA_DISABLED": "true"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=400)
    pairs = list(
        zip(tensors(tmp_path / "here" / "demo" / "last.pt"), tensors(tmp_path / "calm" / "last.pt"), strict=True)
    )
    assert len(pairs) > 100
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_laptop_and_the_supervisor_need_no_torch(tmp_path):
    """The commands answer at once, and a laptop needs boto3 and PyYAML only, in a clone that is not installed."""
    code = f"import runpy; runpy.run_path('{ROOT}/tools/ec2.py'); import sys, rn50; print(rn50.__file__)\n"
    code += "from tools import ec2_supervise; print({'torch', 'numpy', 'ffcv'} & set(sys.modules))"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == [str(ROOT / "rn50" / "__init__.py"), "set()"], done.stderr


def test_a_security_group_that_someone_opened_is_not_used(cloud_account):
    first = launch(cloud_account)
    group = first["NetworkInterfaces"][0]["Groups"][0]["GroupId"]
    cloud_account.ec2.terminate_instances(InstanceIds=[first["InstanceId"]])
    cloud_account.ec2.authorize_security_group_ingress(
        GroupId=group, IpProtocol="tcp", FromPort=22, ToPort=22, CidrIp="0.0.0.0/0"
    )
    with pytest.raises(RunError, match=rf"security group {group} \(rn50\) has open ports"):
        launch(cloud_account, run="other")
    assert alive(cloud_account) == []


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_the_shell_scripts_pass_shellcheck(tmp_path):
    record = {"bucket": BUCKET, "run": "demo", "commit": "abc", "code_sha256": "def", "region": "us-east-1"}
    (tmp_path / "user-data.sh").write_text(launching.user_data(record | {"budget": 25, "dollars_per_hour": 1}, spent=0))
    scripts = [tmp_path / "user-data.sh", ROOT / "tools" / "ec2_bootstrap.sh"]
    done = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
