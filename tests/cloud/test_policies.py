"""The policies: what is granted is what is called, both ways."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import boto3
import parliament
import pytest

from rn50.cloud import account as accounts
from rn50.cloud import aws as aws_module
from rn50.cloud import cleanup, gate, group, supervise
from rn50.cloud import store as cloud
from rn50.training.mirror import Mirror
from tests import hub
from tests.cloud.helpers import BUCKET, IMAGE, PLAN, alive, groups_of, put, quota, report, stub, with_image
from tests.conftest import ROOT
from tests.data.test_imagenet import make_images, make_parquet, make_tars
from tools import ec2

# IAM's names where they differ from the call's; () where a call needs no permission.
ACTIONS = {
    "s3:CreateMultipartUpload": ["s3:PutObject"],
    "s3:UploadPart": ["s3:PutObject"],
    "s3:CompleteMultipartUpload": ["s3:PutObject"],
    "s3:DeleteObjects": ["s3:DeleteObject"],
    "s3:HeadBucket": ["s3:ListBucket"],
    "s3:HeadObject": ["s3:GetObject"],
    "s3:ListObjectsV2": ["s3:ListBucket"],
    "s3:ListMultipartUploads": ["s3:ListBucketMultipartUploads"],
    "service-quotas:GetServiceQuota": ["servicequotas:GetServiceQuota"],
    # the last for the first spot instance of an account
    "ec2:RunInstances": ["ec2:RunInstances", "ec2:CreateTags", "iam:PassRole", "iam:CreateServiceLinkedRole"],
    "ec2:CreateSecurityGroup": ["ec2:CreateSecurityGroup", "ec2:CreateTags"],
    "ec2:CreateLaunchTemplate": ["ec2:CreateLaunchTemplate", "ec2:CreateTags"],
    # AWS asks who makes a group for what its launch template does, too; and for the first group's role
    "autoscaling:CreateAutoScalingGroup": [
        "autoscaling:CreateAutoScalingGroup",
        "autoscaling:CreateOrUpdateTags",
        "ec2:RunInstances",
        "ec2:CreateTags",
        "iam:PassRole",
        "iam:CreateServiceLinkedRole",
    ],
    "iam:AddRoleToInstanceProfile": ["iam:AddRoleToInstanceProfile", "iam:PassRole"],
    "iam:CreateRole": ["iam:CreateRole", "iam:TagRole"],
    "iam:CreateInstanceProfile": ["iam:CreateInstanceProfile", "iam:TagInstanceProfile"],
    "sns:CreateTopic": ["sns:CreateTopic", "sns:TagResource"],
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


@pytest.mark.parametrize("kind", ["instance", "converter", "user"])
def test_the_policies_pass_a_linter_and_hold_no_wildcard_action(kind):
    found = parliament.analyze_policy_string(accounts.policy(kind, BUCKET)).findings
    newer = "ssmmessages:OpenDataChannel"  # AWS gave it resources after the linter's table was made
    assert [finding for finding in found if finding.severity != "LOW" and newer not in str(finding.detail)] == []
    assert not any("*" in action for action in granted(kind))
    for word in ("BUCKET", "ROLE", "SOURCE", "PREFIX"):
        assert word not in accounts.policy(kind, BUCKET, source="mine/imagenet")


@pytest.mark.parametrize(("kind", "most"), [("instance", 10_240), ("converter", 10_240), ("user", 6_144)])
def test_the_policies_fit_where_iam_wants_them(kind, most):
    """A role's own policies, and a managed one for the user; IAM does not count spaces."""
    document = json.loads(accounts.policy(kind, "b" * 63, source="s" * 63 + "/" + "p" * 200))
    assert len(json.dumps(document, separators=(",", ":"))) < most


def test_the_user_may_do_what_the_commands_call_and_nothing_else(cloud_account, monkeypatch, tmp_path):
    stubs = {"service-quotas": quota(96.0), "pricing": ("get_products", "AccessDenied")}
    stub(monkeypatch, cloud_account, stubs)
    make_parquet(tmp_path / "hf", make_images())
    monkeypatch.setattr(cleanup, "STOP_PATIENCE", 0.2)
    with monkeypatch.context() as patch:
        stub(patch, cloud_account, {"ssm": with_image(cloud_account)})
        ec2.main(["doctor", "--bucket", BUCKET, "--spot"])
    with hub.Origins() as server:
        server.files = {f"data/{path.name}": path.read_bytes() for path in (tmp_path / "hf" / "data").iterdir()}
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", hub.TOKEN)
        ec2.main(["convert", "--bucket", BUCKET, "--from", "hf", "--commit", "HEAD", "--yes", "--ami", IMAGE])
        ec2.main(["stop", "--bucket", BUCKET, "--run", "convert"])
    for name in ("train_400.beton", "train_400.json", "val_400.beton", "val_400.json"):
        put(cloud_account, f"rn50/betons/{name}", b"x")
    ec2.main(["launch", *PLAN, "--commit", "HEAD", "--ami", IMAGE, "--spot", "--notify", "mailto:me@example.org"])
    report(cloud_account, alive(cloud_account)[-1], state="stopped")
    group.refusals(
        SimpleNamespace(client=lambda name: getattr(cloud_account, name)), groups_of(cloud_account)[0]
    )  # where there is no room
    ec2.main(["status", "--bucket", BUCKET, "--run", "demo"])
    ec2.main(["stop", "--bucket", BUCKET, "--run", "demo"])
    ec2.main(["resume", "--bucket", BUCKET, "--run", "demo", "--yes", "--on-demand", "--ami", IMAGE])
    ec2.main(["fetch", "--bucket", BUCKET, "--run", "demo", "--out", str(tmp_path)])
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
    made = {"StringEquals": {"ec2:CreateAction": ["CreateLaunchTemplate", "CreateSecurityGroup", "RunInstances"]}}
    assert conditions["ec2:CreateTags"] == [made]
    ours = {"StringEquals": {"aws:ResourceTag/project": "rn50"}}
    for name in ("TerminateInstances", "DeleteVolume", "DeleteSecurityGroup", "DeleteLaunchTemplate"):
        assert conditions[f"ec2:{name}"] == [ours]


def test_the_instance_may_do_what_it_calls_and_nothing_else(cloud_account, tmp_path, betons, monkeypatch):
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", boto3.Session())
    for path in betons.iterdir():
        put(cloud_account, f"rn50/betons/{path.name}", path.read_bytes())
    ec2.main(["launch", *PLAN, "--commit", "HEAD", "--ami", IMAGE, "--spot", "--notify", "mailto:me@example.org"])
    (made,) = groups_of(cloud_account)
    (instance,) = alive(cloud_account)
    for name, value in {
        "BUCKET": BUCKET,
        "RUN": "demo",
        "INSTANCE": instance["InstanceId"],
        "PREFIX": str(tmp_path),
        "MARKET": "spot",
        "TYPE": "g5.2xlarge",
    }.items():
        monkeypatch.setenv(f"RN50_{name}", value)
    monkeypatch.setattr(supervise, "switch_off", lambda: None)
    monkeypatch.setattr(supervise, "RENEW_SECONDS", -1.0)
    cloud_account.calls.clear()
    # the gate, by the aws command on an instance
    record = cloud.Store(boto3.client("s3"), BUCKET, "demo").read("launch.json")
    monkeypatch.setattr(
        gate,
        "aws",
        lambda service, operation, flag, given: getattr(boto3.client(service), operation.replace("-", "_"))(
            **json.loads(given)
        ),
    )
    gate.arm(record, "spot")
    store, reporter, record = supervise.connect()
    one = supervise.Instance(store, reporter, record, boto3.client)
    one.hold()
    cloud.stage(store.client, BUCKET, tmp_path / "betons", rung=64)
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / "log.jsonl").write_text("{}\n")
    assert reporter.beat("training", folder)
    one.renew()
    assert supervise.stop_reason(one, 0) is None
    mirror = Mirror(f"s3://{BUCKET}/{cloud.RUNS}", folder=folder, warn=print)
    assert mirror.fetch(into=folder / "last.pt.partial", later_than=None) is False
    (folder / "last.pt").write_bytes(bytes(9 << 20))  # more than one part
    mirror.offer(folder / "last.pt", 3)
    assert mirror.wait(20)
    assert mirror.fetch(into=folder / "last.pt.partial", later_than=1) is True
    one.step_aside("another has it")
    one.end("finished", "all epochs are done")
    # an upload that breaks off is aborted by boto3 itself
    assert granted("instance") - AGENT == needed(cloud_account.calls) | {"s3:AbortMultipartUpload"}
    assert granted("instance") >= AGENT
    assert made["AutoScalingGroupName"].startswith(f"{accounts.role_name(BUCKET)}-")  # as the policy has it


@pytest.mark.parametrize("origin", ["hf", "s3"])
def test_the_converter_may_do_what_it_calls_and_nothing_else(cloud_account, tmp_path, monkeypatch, origin):
    """In a process of its own, which tells its calls."""
    put(cloud_account, "rn50/betons/train_48.beton", b"x")
    record = {"run": "convert", "kind": "conversion", "config": "rn50_configs/write_imagenet.yaml", "secret": None}
    record |= {"settings": ["source.counts=any", "out.resolutions=48", "out.workers=1"], "dollars_per_hour": 1.0}
    with hub.Origins() as server:
        if origin == "hf":
            make_parquet(tmp_path / "hf", make_images())
            server.files = {f"data/{path.name}": path.read_bytes() for path in (tmp_path / "hf" / "data").iterdir()}
            secret = {"Name": accounts.secret_name(BUCKET), "Value": json.dumps({"token": hub.TOKEN})}
            cloud_account.ssm.put_parameter(**secret, Type="SecureString")
            record |= {"from": ["hf"], "secret": secret["Name"]}
        else:
            make_tars(tmp_path / "tars", make_images())
            for path in (tmp_path / "tars").iterdir():
                put(cloud_account, f"mine/{path.name}", path.read_bytes())
            record |= {"from": [f"s3://{BUCKET}/mine"]}
        put(cloud_account, "rn50/runs/convert/launch.json", record)
        code = (
            "import boto3, sys\n"
            "calls = open(sys.argv.pop(1), 'a')\n"
            "boto3.setup_default_session()\n"
            "def note(model, **rest):\n"
            "    print(f'{model.service_model.service_name}:{model.name}', file=calls, flush=True)\n"
            "boto3.DEFAULT_SESSION.events.register('before-parameter-build', note)\n"
            "from rn50.cloud import convert, snapshot\n"
            "convert.SNAPSHOT_SECONDS = 0.05\n"
            "convert.main()\n"
        )
        for name in ("write_dataset.py", "tools", "rn50_configs"):
            (tmp_path / name).symlink_to(ROOT / name)
        environment = os.environ | {"RN50_BUCKET": BUCKET, "RN50_RUN": "convert", "PYTHONPATH": str(ROOT)}
        environment |= {"HF_ENDPOINT": server.url}
        command = [sys.executable, "-c", code, str(tmp_path / "calls"), "--work", str(tmp_path / "work")]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    called = needed(set((tmp_path / "calls").read_text().split()))
    reported = {"s3:GetObject", "s3:PutObject", "sns:Publish"}  # by the supervisor
    if origin == "s3":
        called |= {"ssm:GetParameter", "ssm:DeleteParameter", "s3:DeleteObject"}
    assert granted("converter") - AGENT == called | reported | {"s3:AbortMultipartUpload"}
    sids = {statement["Sid"] for statement in json.loads(accounts.policy("converter", BUCKET))["Statement"]}
    assert not {sid for sid in sids if sid.startswith("TheOrigin")}  # only where the origin is in S3
    allowed = accounts.policy("converter", BUCKET, source="mine/imagenet")
    assert "arn:aws:s3:::mine/imagenet*" in allowed
    assert '"arn:aws:s3:::mine"' in allowed
