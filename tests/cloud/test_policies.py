"""The policies: what is granted is what is called, both ways."""

import json

import boto3
import parliament
import pytest

from rn50.cloud import account as accounts
from rn50.cloud import aws as aws_module
from rn50.cloud import store as cloud
from rn50.cloud import supervise
from rn50.training.mirror import Mirror
from tests.cloud.helpers import BUCKET, PLAN, only_instance, put, quota, report, stub, with_image
from tools import ec2

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
    store, reporter, record = supervise.connect()
    cloud.stage(store.client, BUCKET, tmp_path / "betons", rung=64)
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / "log.jsonl").write_text("{}\n")
    assert reporter.beat("training", folder)
    assert supervise.stop_reason(store, record | {"idle_minutes": 30, "budget": 5}, 0) is None
    mirror = Mirror(f"s3://{BUCKET}/{cloud.RUNS}", folder=folder, warn=print)
    assert mirror.fetch(into=folder / "last.pt.partial", later_than=None) is False
    (folder / "last.pt").write_bytes(bytes(9 << 20))  # more than one part
    mirror.offer(folder / "last.pt", 3)
    assert mirror.wait(20)
    assert mirror.fetch(into=folder / "last.pt.partial", later_than=1) is True
    # an upload that breaks off is aborted by boto3 itself
    assert granted("instance") - AGENT == needed(cloud_account.calls) | {"s3:AbortMultipartUpload"}
    assert granted("instance") >= AGENT
