"""tools/ec2.py launch and resume against moto: what is made, in which order, and what is refused."""

import hashlib
import json
import re

import boto3
import pytest
from boto3.exceptions import S3UploadFailedError

from rn50.cloud import account as accounts
from rn50.cloud import launch as launching
from rn50.cloud import status
from rn50.errors import RunError, UsageError
from tests.cloud.helpers import (
    BUCKET,
    CONFIG,
    IMAGE,
    PLAN,
    REAL_SESSION,
    alive,
    broken,
    launch,
    only_instance,
    put,
    put_betons,
    replaced,
    user_data,
)
from tools import ec2


def test_launch_makes_a_closed_encrypted_tagged_instance(cloud_account, capsys):
    instance = launch(cloud_account)
    assert instance["InstanceType"] == "g5.2xlarge"
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
    assert "on one g5.2xlarge, on demand, us-east-1" in out
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
    ec2.main(["launch", *flags, "--ami", cloud_account.image, "--commit", "HEAD", "--spot"])
    said = capsys.readouterr().out
    assert re.search(r"projected from published figures: \d+\.\d h, \$\d+\.\d\d", said)
    assert "copies train_400.beton, val_400.beton, " in said  # all that there are


def test_an_instance_without_room_for_the_betons_is_not_launched(cloud_account, monkeypatch):
    put_betons(cloud_account, 400)
    monkeypatch.setattr(ec2.Published, "disk_gb", lambda self, instance: 1e-12)
    with pytest.raises(
        RunError, match=r"betons of this run take [\d.e-]+ GB and g5.2xlarge has a disk of 1e-12 GB: choose"
    ):
        launch(cloud_account)
    assert alive(cloud_account) == []


def test_measuring_first_is_in_the_plan_and_in_the_record(cloud_account, capsys):
    launch(cloud_account, "--tune")
    assert "precision and torch.compile as tools/preflight.py finds them fastest there" in capsys.readouterr().out
    assert json.loads(cloud_account.s3.get_object(Bucket=BUCKET, Key="rn50/runs/demo/launch.json")["Body"].read())[
        "tune"
    ]


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
        "rn50_configs/rn50_56_epochs.yaml",
        "--budget",
        "25",
        "--yes",
        "--commit",
        "HEAD",
    ]
    with pytest.raises(RunError, match=r"there is no train_500.beton under rn50/betons/; upload what write_dataset"):
        ec2.main([*flags, "--ami", IMAGE])
    with pytest.raises(RunError, match=r"there is no train_400.beton"):
        ec2.main([*flags, "--ami", IMAGE, "--set", "data.rung=400"])
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
    with pytest.raises(RunError, match=r"no zone has a g5.2xlarge now \(us-east-1a: Insuff"):
        launch(cloud_account, run="other")


def test_a_new_profile_that_ec2_does_not_know_yet_is_waited_for(cloud_account, monkeypatch):
    broken(monkeypatch, "ec2", "run_instances", "InvalidParameterValue", times=3)
    assert launch(cloud_account)["State"]["Name"] == "running"


def test_a_refused_request_and_another_one_have_two_tokens():
    """EC2 keeps the token of what it refused; with it, another price or image is IdempotentParameterMismatch."""
    record = {"run": "demo", "bucket": BUCKET, "instance": "g5.xlarge", "attempt": 1, "budget": 25.0}
    record |= {"commit": "abc", "code_sha256": "def", "region": "us-east-1", "dollars_per_hour": 0.4}

    def token(image=IMAGE, subnet="subnet-1", **changed):
        changed = record | changed
        common = launching.common_request(changed, {"ImageId": image}, "sg-1", "profile", 0, 450)
        return launching.instance_request(changed, common, subnet)["ClientToken"]

    assert token() == token()
    changes = [{"dollars_per_hour": 0.41}, {"image": "ami-2"}, {"subnet": "subnet-2"}, {"attempt": 2}]
    assert len({token(), *(token(**change) for change in changes)}) == 5
    assert len(token()) == 64  # EC2's limit


def test_a_token_of_a_terminated_instance_is_followed_by_another(cloud_account, monkeypatch):
    broken(monkeypatch, "ec2", "run_instances", "IdempotentInstanceTerminated")
    assert launch(cloud_account)["State"]["Name"] == "running"
    record = json.loads(cloud_account.s3.get_object(Bucket=BUCKET, Key="rn50/runs/demo/launch.json")["Body"].read())
    assert record["attempt"] == 2


@pytest.mark.parametrize("operation", ["put_role_policy", "add_role_to_instance_profile"])
def test_a_new_role_that_iam_itself_does_not_know_yet_is_waited_for(cloud_account, monkeypatch, operation):
    left = [2]

    def fail(own, **options):
        if left[0] <= 0:
            return own(**options)
        left[0] -= 1
        raise cloud_account.iam.exceptions.NoSuchEntityException({"Error": {"Code": "NoSuchEntity"}}, operation)

    replaced(monkeypatch, "iam", **{operation: fail})
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
        replaced(patch, "s3", get_bucket_location=lambda own, **options: there)
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


ANSWERS = {
    "InvalidParameterCombination": (
        "The specified instance type is not eligible for Free Tier. For a list of Free Tier instance types, run "
        "'describe-instance-types' with the filter 'free-tier-eligible=true'.",
        "upgrade it to the paid plan",
    ),
    "PendingVerification": (
        "Your request for accessing resources in this region is being validated, and you will not be able to launch "
        "additional resources in this region until the validation is complete.",
        "AWS is still checking this new account",
    ),
    "VcpuLimitExceeded": (
        "You have requested more vCPU capacity than your current vCPU limit of 0 allows for the instance bucket that "
        "the specified instance type belongs to.",
        "ask for a higher vCPU quota",
    ),
    "Unsupported": (
        "Your requested instance type (g5.2xlarge) is not supported in your requested Availability Zone (us-east-1e).",
        "no zone has a g5.2xlarge now",
    ),
    "OptInRequired": ("You are not subscribed to this service.", "finish signing up"),
    "Blocked": ("This account is currently blocked and not recognized as a valid account.", "Your support cases"),
    "RequestTimeTooSkewed": ("The difference between the request time and the current time is too large.", "set-ntp"),
    "UnauthorizedOperation": ("You are not authorized to perform this operation.", "docs/ec2.md has the policy"),
}


@pytest.mark.parametrize("code", ANSWERS)
def test_what_real_accounts_answer_is_one_line_with_what_to_do(cloud_account, monkeypatch, code):
    message, advice = ANSWERS[code]
    broken(monkeypatch, "ec2", "run_instances", code, times=99, message=message)
    with pytest.raises(RunError) as caught:
        launch(cloud_account)
    assert advice in str(caught.value)
    assert "\n" not in str(caught.value)
    assert alive(cloud_account) == []


def test_one_zone_without_the_type_is_no_reason_to_end(cloud_account, monkeypatch):
    broken(monkeypatch, "ec2", "run_instances", "Unsupported", times=1)
    assert launch(cloud_account)["State"]["Name"] == "running"


def test_an_instance_that_ec2_does_not_know_everywhere_yet_can_be_ended(cloud_account, monkeypatch):
    launch(cloud_account)
    broken(monkeypatch, "ec2", "terminate_instances", "InvalidInstanceID.NotFound", times=2)
    ec2.main(["clean", "--bucket", BUCKET, "--yes"])
    assert alive(cloud_account) == []


def test_an_upload_with_a_wrong_clock_says_so(cloud_account, monkeypatch):
    """boto3's uploads hide S3's answer in a text."""
    text = (
        "Failed to upload x to bucket/y: An error occurred (RequestTimeTooSkewed) when calling the PutObject operation"
    )

    def fail(*arguments):
        raise S3UploadFailedError(f"{text}: The difference between the request time and the current time is too large.")

    monkeypatch.setattr(launching, "upload_code", fail)
    with pytest.raises(RunError, match="this machine's clock is wrong: set it"):
        launch(cloud_account)
