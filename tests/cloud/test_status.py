"""tools/ec2.py status, stop, resume, fetch and clean."""

import json
import re
import time

import pytest

from rn50.cloud import aws as aws_module
from rn50.cloud import cleanup, status
from rn50.errors import RunError
from tests.cloud.helpers import BUCKET, IMAGE, alive, broken, launch, only_instance, put, refused, report, user_data
from tools import ec2


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
    warning = {"cause": "no learning", "text": "top-1 of guessing"}
    own = {"top1": 78.25, "evaluation": "224 px", "warnings": [warning]}
    rows[-1] |= {"forecast": own, "dollars_to_finish": 3.5}
    put(cloud_account, "rn50/runs/demo/log.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    slow = {"images_per_second": 310.0, "share": 0.38, "minutes": 31}
    report(cloud_account, instance, ago=900, pace=slow)
    ec2.main(["status", "--bucket", BUCKET])
    out = capsys.readouterr().out
    assert "it runs but does not report" in out
    assert "warning: no learning: top-1 of guessing" in out
    assert "warning: 310 images/s over 31 minutes, 38% of what is expected of this machine: a stolen or thr" in out
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


def test_watching_ends_with_the_run(cloud_account, capsys):
    instance = launch(cloud_account)
    report(cloud_account, instance, state="finished", reason="all epochs are done")
    cloud_account.ec2.terminate_instances(InstanceIds=[instance["InstanceId"]])
    put(cloud_account, "rn50/runs/demo/ended", {"state": "finished", "reason": "all epochs are done", "time": 1.0})
    ec2.main(["status", "--bucket", BUCKET, "--watch", "0.1"])  # else it would go on for ever
    out = capsys.readouterr().out
    assert "demo: rn50_configs/demo.yaml at " in out
    assert "finished (all epochs are done), seen" in out
    assert "$1.00 of $25.00" in out
