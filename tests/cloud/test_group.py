"""launch --spot from the laptop: the group, what it may launch, no room for it, and the commands that know it."""

import json
import re
import time
from datetime import UTC, datetime
from types import SimpleNamespace

import boto3
import pytest

from rn50.cloud import account as accounts
from rn50.cloud import aws as aws_module
from rn50.cloud import cleanup, group, prices
from rn50.cloud import launch as launching
from rn50.errors import RunError, UsageError
from tests.cloud.helpers import (
    BUCKET,
    IMAGE,
    SPOT,
    alive,
    groups_of,
    launch,
    only_instance,
    put,
    put_betons,
    replaced,
    report,
    user_data,
)
from tools import ec2

NO_CAPACITY = (
    "Could not launch Spot Instances. UnfulfillableCapacity - Unable to fulfill capacity due to your request "
    "configuration. Please adjust your request and try again. Launching EC2 instance failed."
)
RESUME = ["resume", "--bucket", BUCKET, "--run", "demo", "--ami", IMAGE, "--yes"]


def record_of(account):
    return json.loads(account.s3.get_object(Bucket=BUCKET, Key="rn50/runs/demo/launch.json")["Body"].read())


def without_room(monkeypatch, *messages):
    """AWS launches nothing for a group, and says so: moto would launch at once, and has no activities."""
    now = time.time()
    activities = [
        {"StatusCode": "Failed", "StatusMessage": message, "StartTime": datetime.fromtimestamp(now - 60 * k, UTC)}
        for k, message in enumerate(messages)
    ]
    scaling = boto3.client("autoscaling")

    def update(own, **sizes):
        if sizes.get("DesiredCapacity") != 1:
            own(**sizes)

    def describe(**which):
        found = scaling.describe_auto_scaling_groups(**which)
        for each in found["AutoScalingGroups"]:
            if not each["AutoScalingGroupName"].endswith("-on-demand") and each["MaxSize"]:
                each["DesiredCapacity"] = 1
        return found

    replaced(
        monkeypatch,
        "autoscaling",
        update_auto_scaling_group=update,
        get_paginator=lambda own, name: SimpleNamespace(paginate=lambda **which: [describe(**which)]),
        describe_scaling_activities=lambda own, **which: {"Activities": activities},
    )
    monkeypatch.setattr(launching, "GROUP_SECONDS", 0.2)


def test_the_group_is_unable_to_loop_before_it_may_launch_anything(cloud_account, monkeypatch):
    order = []
    prices = {"g5.2xlarge": "0.45", "g5.4xlarge": "0.4"}
    history = [{"InstanceType": n, "AvailabilityZone": "us-east-1b", "SpotPrice": p} for n, p in prices.items()]
    replaced(monkeypatch, "ec2", describe_spot_price_history=lambda own, **which: {"SpotPriceHistory": history})
    real = aws_module.Aws.client

    def client(self, name, region=None):
        made = real(self, name, region)
        if name == "autoscaling" and not hasattr(made, "noted"):
            made.noted = True
            note = lambda model, params, **rest: order.append((model.name, dict(params)))  # noqa: E731
            made.meta.events.register("provide-client-params.auto-scaling.*", note)
        return made

    monkeypatch.setattr(aws_module.Aws, "client", client)
    instance = launch(cloud_account, plan=SPOT)
    made = [step for step in order if not step[0].startswith("Describe")]
    assert [name for name, _ in made] == [
        "CreateAutoScalingGroup", "SuspendProcesses", "PutScheduledUpdateGroupAction", "UpdateAutoScalingGroup",
    ]  # fmt: skip
    created, suspended, action, update = (parameters for _, parameters in made)
    assert (created["MinSize"], created["MaxSize"], created["DesiredCapacity"]) == (0, 1, 0)
    assert created["CapacityRebalance"] is False
    assert suspended["ScalingProcesses"] == ["AZRebalance", "ReplaceUnhealthy"]
    assert (action["MinSize"], action["MaxSize"], action["DesiredCapacity"]) == (0, 0, 0)
    assert update["DesiredCapacity"] == 1
    launches = created["MixedInstancesPolicy"]["LaunchTemplate"]
    assert launches["LaunchTemplateSpecification"]["LaunchTemplateName"] == created["AutoScalingGroupName"]
    types = [each["InstanceType"] for each in launches["Overrides"]]
    assert types == list(record_of(cloud_account)["types"])
    assert types == ["g5.2xlarge", "g5.4xlarge"]
    distribution = created["MixedInstancesPolicy"]["InstancesDistribution"]
    assert distribution == {
        "OnDemandBaseCapacity": 0, "OnDemandPercentageAboveBaseCapacity": 0,
        "SpotAllocationStrategy": "price-capacity-optimized", "SpotMaxPrice": "0.9000",
    }  # fmt: skip
    zones = cloud_account.ec2.describe_subnets(Filters=[{"Name": "default-for-az", "Values": ["true"]}])["Subnets"]
    assert set(created["VPCZoneIdentifier"].split(",")) == {zone["SubnetId"] for zone in zones}
    assert record_of(cloud_account)["instance_id"] == instance["InstanceId"]


def test_what_a_group_launches_is_as_closed_as_any_other_instance(cloud_account):
    instance = launch(cloud_account, plan=SPOT)
    (template,) = cloud_account.ec2.describe_launch_templates()["LaunchTemplates"]
    marks = {tag["Key"]: tag["Value"] for tag in template["Tags"]}
    assert marks == {"project": "rn50", "Name": "rn50-demo", "rn50-run": "demo", "rn50-bucket": BUCKET}
    (version,) = cloud_account.ec2.describe_launch_template_versions(LaunchTemplateName=template["LaunchTemplateName"])[
        "LaunchTemplateVersions"
    ]
    data = version["LaunchTemplateData"]
    assert data["MetadataOptions"]["HttpTokens"] == "required"
    assert data["InstanceInitiatedShutdownBehavior"] == "terminate"
    assert data["IamInstanceProfile"] == {"Name": accounts.role_name(BUCKET)}
    (disk,) = data["BlockDeviceMappings"]
    assert disk["Ebs"]["Encrypted"] is True
    assert "InstanceMarketOptions" not in data  # a group says that itself, and refuses a template that does
    assert "SubnetId" not in data["NetworkInterfaces"][0]
    assert {tag["Key"] for tag in instance["Tags"]} >= {"project", "rn50-run", "rn50-bucket"}
    script = user_data(cloud_account, instance)
    (made,) = groups_of(cloud_account)
    assert f"RN50_GROUPS={made['AutoScalingGroupName']}\n" in script
    assert len(script) < 16_384


def test_types_of_the_same_gpu_that_are_worth_it_and_allowed(cloud_account, monkeypatch):
    """g5: xlarge is smaller, 12xlarge has four GPUs; 16xlarge is over what the quota allows, 8xlarge is too dear."""
    seen = {"g5.2xlarge": "0.5", "g5.4xlarge": "0.9", "g5.8xlarge": "1.3", "g5.16xlarge": "1.0", "g5.xlarge": "0.1"}
    history = [
        {"InstanceType": name, "AvailabilityZone": zone, "SpotPrice": dollars}
        for name, dollars in seen.items()
        for zone in ("us-east-1a", "us-east-1b")
    ]

    def spot(own, InstanceTypes, **rest):
        return {"SpotPriceHistory": [entry for entry in history if entry["InstanceType"] in InstanceTypes]}

    replaced(monkeypatch, "ec2", describe_spot_price_history=spot)
    monkeypatch.setattr(prices, "quota_of", lambda *args, **options: 32.0)
    launch(cloud_account, plan=SPOT)
    record = record_of(cloud_account)
    assert record["types"] == {"g5.2xlarge": 0.5, "g5.4xlarge": 0.9}
    assert record["dollars_per_hour"] == 0.9  # a budget counts with the dearest


def test_no_room_anywhere_leaves_a_group_that_waits_and_a_status_that_says_so(cloud_account, monkeypatch, capsys):
    without_room(monkeypatch, NO_CAPACITY, NO_CAPACITY)
    put_betons(cloud_account, 64)
    ec2.main(["launch", *SPOT, "--ami", IMAGE, "--run", "demo", "--commit", "HEAD", "--fallback", "on-demand"])
    said = capsys.readouterr().out
    assert f"no instance yet: {NO_CAPACITY}" in said
    assert "AWS has no instance now. The group goes on asking in every zone, for free; after 6 h one on demand" in said
    assert record_of(cloud_account)["instance_id"] is None
    record = record_of(cloud_account)
    put(cloud_account, "rn50/runs/demo/launch.json", record | {"attempt_started": time.time() - 2.5 * 3600})
    ec2.main(["status", "--bucket", BUCKET])
    out = capsys.readouterr().out
    assert "waiting for an instance" in out
    assert f"no instance for 2.5 h after 2 tries: {NO_CAPACITY}" in out
    assert "where none comes, one on demand takes over in 3.5 h" in out
    assert re.search(r"stop it, then .*resume --bucket bucket --run demo with --on-demand \(\$1\.212/h\), or", out)
    assert "dollars so far: 0.00 of 25.00" in out
    for again in (["launch", *SPOT, "--ami", IMAGE, "--run", "demo", "--commit", "HEAD"], RESUME):
        with pytest.raises(RunError, match="demo has a group already, which waits for an instance"):
            ec2.main(again)
    ec2.main(["stop", "--bucket", BUCKET, "--run", "demo"])
    assert groups_of(cloud_account) == []
    ec2.main(["stop", "--bucket", BUCKET, "--run", "demo"])
    assert "demo has no instance" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("message", "advice"),
    [
        ("Could not launch Spot Instances. MaxSpotInstanceCountExceeded - Max spot instance count", "spot vCPU quota"),
        ("You have requested more vCPU capacity than your current limit. VcpuLimitExceeded", "higher vCPU quota"),
        ("PendingVerification: Your request for accessing resources is being validated", "still checking"),
        ("The specified instance type is not eligible for Free Tier. For a list of", "upgrade it to the paid plan"),
        ("AuthFailure.ServiceLinkedRoleCreationNotPermitted: The provided", "aws iam create-service-linked-role"),
    ],
)
def test_what_waiting_cannot_mend_ends_the_group_at_once(cloud_account, monkeypatch, message, advice):
    without_room(monkeypatch, message)
    put_betons(cloud_account, 64)
    with pytest.raises(RunError) as caught:
        ec2.main(["launch", *SPOT, "--ami", IMAGE, "--run", "demo", "--commit", "HEAD"])
    assert advice in str(caught.value)
    assert "\n" not in str(caught.value)
    assert groups_of(cloud_account) == []
    assert "Auto Scaling group" not in str(caught.value)  # of what there is now
    assert cloud_account.ec2.describe_launch_templates()["LaunchTemplates"] == []


def test_resume_makes_another_group_and_leaves_none_behind(cloud_account):
    first = launch(cloud_account, plan=SPOT)
    (old,) = groups_of(cloud_account)
    with pytest.raises(RunError, match="demo has an instance already"):
        ec2.main(RESUME)
    group.throw(cloud_account.autoscaling, group.ending([old["AutoScalingGroupName"]]))  # as the instance does
    report(cloud_account, first, state="failed", hours=1)
    put(cloud_account, "rn50/runs/demo/ended", {"state": "failed", "reason": "x", "time": 1})
    ec2.main([*RESUME, "--budget", "30", "--replacements", "3", "--patience-hours", "2"])
    (new,) = groups_of(cloud_account)
    assert new["AutoScalingGroupName"] != old["AutoScalingGroupName"]
    (template,) = cloud_account.ec2.describe_launch_templates()["LaunchTemplates"]
    assert template["LaunchTemplateName"] == new["AutoScalingGroupName"]
    record = record_of(cloud_account)
    assert (record["replacements"], record["patience_hours"], record["budget"]) == (3, 2.0, 30.0)
    keys = {entry["Key"] for entry in cloud_account.s3.list_objects_v2(Bucket=BUCKET)["Contents"]}
    assert "rn50/runs/demo/ended" not in keys
    second = only_instance(cloud_account)
    cloud_account.autoscaling.delete_auto_scaling_group(AutoScalingGroupName=new["AutoScalingGroupName"])
    report(cloud_account, second, state="training", hours=1)
    ec2.main([*RESUME, "--on-demand"])
    assert groups_of(cloud_account) == []
    assert len(alive(cloud_account)) == 1


def test_stop_keeps_the_group_from_replacing_and_removes_it(cloud_account, monkeypatch, capsys):
    instance = launch(cloud_account, "--fallback", "on-demand", plan=SPOT)
    report(cloud_account, instance, state="stopped", reason="stop was asked for")
    real, seen = cleanup.wait_for_checkpoint, []

    def wait(*arguments):
        seen.extend(group.may_launch(each) for each in groups_of(cloud_account))
        real(*arguments)

    monkeypatch.setattr(cleanup, "wait_for_checkpoint", wait)
    ec2.main(["stop", "--bucket", BUCKET, "--run", "demo"])
    assert seen == [False, False]  # already while the checkpoint is waited for
    assert "has stopped: stop was asked for" in capsys.readouterr().out
    assert alive(cloud_account) == []
    assert groups_of(cloud_account) == []
    assert cloud_account.ec2.describe_launch_templates()["LaunchTemplates"] == []


def test_a_group_that_was_deleted_by_hand_is_said(cloud_account, capsys):
    instance = launch(cloud_account, plan=SPOT)
    (made,) = groups_of(cloud_account)
    cloud_account.autoscaling.delete_auto_scaling_group(AutoScalingGroupName=made["AutoScalingGroupName"])
    report(cloud_account, instance, state="interrupted", reason="EC2 spot notice")
    capsys.readouterr()
    ec2.main(["status", "--bucket", BUCKET])
    assert "it was taken away: go on with" in capsys.readouterr().out


def test_clean_removes_groups_first_and_templates_that_lost_theirs(cloud_account, capsys):
    launch(cloud_account, "--fallback", "on-demand", "--notify", "mailto:me@example.org", plan=SPOT)
    cloud_account.ec2.create_launch_template(
        LaunchTemplateName="orphan", LaunchTemplateData={"ImageId": IMAGE},
        TagSpecifications=[{"ResourceType": "launch-template",
                            "Tags": aws_module.tags({"project": "rn50", "rn50-bucket": BUCKET})}])  # fmt: skip
    ec2.main(["clean", "--bucket", BUCKET, "--yes"])
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("removed ")]
    assert lines[0].startswith("removed Auto Scaling groups rn50-")
    assert "removed launch template orphan" in lines
    assert any(line.startswith("removed topic arn:aws:sns:") for line in lines)
    assert groups_of(cloud_account) == []
    assert alive(cloud_account) == []
    assert cloud_account.ec2.describe_launch_templates()["LaunchTemplates"] == []
    assert cloud_account.sns.list_topics()["Topics"] == []


# --- Mails -----------------------------------------------------------------------------------------------------------


def test_an_address_is_subscribed_once(cloud_account, capsys):
    launch(cloud_account, "--notify", "mailto:me@example.org")
    assert "AWS has sent a mail there with a link to confirm" in capsys.readouterr().out
    (topic,) = cloud_account.sns.list_topics()["Topics"]
    assert record_of(cloud_account)["notify"] == topic["TopicArn"]
    cloud_account.ec2.terminate_instances(InstanceIds=[only_instance(cloud_account)["InstanceId"]])
    launch(cloud_account, "--notify", "mailto:me@example.org", run="other")
    assert "sent a mail" not in capsys.readouterr().out
    listed = cloud_account.sns.list_subscriptions_by_topic(TopicArn=topic["TopicArn"])["Subscriptions"]
    assert [(each["Protocol"], each["Endpoint"]) for each in listed] == [("email", "me@example.org")]


@pytest.mark.parametrize("address", ["me@example.org", "mailto:nobody", "mailto:a@b@c", "mailto:a b@c", "sms:1"])
def test_what_is_no_address_is_one_line(cloud_account, address):
    with pytest.raises(UsageError, match="is not of the form mailto:you@example.org"):
        launch(cloud_account, "--notify", address)
    assert alive(cloud_account) == []


def test_fallback_is_for_spot_alone(cloud_account):
    with pytest.raises(UsageError, match="--fallback on-demand is for --spot"):
        launch(cloud_account, "--fallback", "on-demand")


def test_a_run_of_an_earlier_version_is_gone_on_with_in_its_own(cloud_account):
    """Its tree lacks what today's user data calls."""
    instance = launch(cloud_account)
    cloud_account.ec2.terminate_instances(InstanceIds=[instance["InstanceId"]])
    record = record_of(cloud_account)
    put(cloud_account, "rn50/runs/demo/launch.json", {key: record[key] for key in record if key != "groups"})
    with pytest.raises(RunError, match=f"in a checkout of its own commit, {record['commit'][:12]}"):
        ec2.main(RESUME)


@pytest.mark.parametrize("flags", [["--patience-hours", "0.5"], ["--min-speed", "1.5"], ["--replacements", "-1"]])
def test_what_makes_no_sense_is_refused_by_the_command_line(cloud_account, flags):
    with pytest.raises(SystemExit) as caught:
        launch(cloud_account, *flags, plan=SPOT)
    assert caught.value.code == 2
    assert alive(cloud_account) == []
