"""Instances that a group launches: one that is taken away, two at once, and everything that might make a loop of it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import boto3
import pytest
import torch

from rn50.cloud import gate, supervise
from rn50.cloud import store as cloud
from rn50.training import checkpoint
from tests.cloud.helpers import BUCKET, CONFIG, IMAGE, SPOT, alive, groups_of, launch, only_instance, put, user_data
from tests.cloud.machine import CONSOLE, SETTINGS, Machine, committed
from tests.conftest import ROOT
from tests.services import Metadata
from tools import ec2


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


def test_a_spot_instance_that_is_taken_away_is_replaced_and_the_weights_are_the_same(
    cloud_account, moto, betons, tmp_path, capsys
):
    for path in betons.iterdir():
        put(cloud_account, f"rn50/betons/{path.name}", path.read_bytes())
    flags = [*SPOT, "--ami", IMAGE, "--run", "demo", "--commit", committed(), *(f"--set={s}" for s in SETTINGS)]
    with Metadata() as metadata:
        metadata.market = "spot"
        ec2.main(["launch", *flags])
        (group,) = groups_of(cloud_account)
        assert [p["ProcessName"] for p in group["SuspendedProcesses"] if p["ProcessName"] != "AZRebalance"] == [
            "ReplaceUnhealthy"
        ]
        first = only_instance(cloud_account)
        machine = Machine(tmp_path / "first", user_data(cloud_account, first), moto, metadata, first["InstanceId"])
        machine.start()
        (group,) = groups_of(cloud_account)
        # from now on it replaces
        assert [p["ProcessName"] for p in group["SuspendedProcesses"]] == ["AZRebalance"]
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
        (group,) = groups_of(cloud_account)
        assert group["DesiredCapacity"] == 1  # what was taken away has left it as it was
        cloud_account.ec2.terminate_instances(InstanceIds=[first["InstanceId"]])
        capsys.readouterr()
        ec2.main(["status", "--bucket", BUCKET])
        out = capsys.readouterr().out
        assert re.search(r"last command: interrupted \(EC2 spot notice .*\) at step \d+", out)
        assert re.search(r"epoch 1 of 2|no epoch is done yet", out)

        second = only_instance(cloud_account)  # the group's, without any of us
        assert second["InstanceId"] != first["InstanceId"]
        again = Machine(tmp_path / "second", user_data(cloud_account, second), moto, metadata, second["InstanceId"])
        again.start()
        again.wait_for("shutdown -h now", "did")
        assert "finished: all epochs are done; switching off" in again.log("journal"), again.everything()
        assert 0 < int(re.search(r"resuming .* at step (\d+)", again.log(CONSOLE))[1]) < 20
    assert "started again" not in machine.log("did") + again.log("did")
    (group,) = groups_of(cloud_account)
    assert (group["DesiredCapacity"], group["MaxSize"]) == (0, 0)
    assert "Launch" in [p["ProcessName"] for p in group["SuspendedProcesses"]]
    assert alive(cloud_account) == []
    ec2.main(["fetch", "--bucket", BUCKET, "--run", "demo", "--out", str(tmp_path / "here")])
    assert len((tmp_path / "here" / "demo" / "log.jsonl").read_text().splitlines()) == 2
    assert not {"stop", "ended", "holder", "told"} & {path.name for path in (tmp_path / "here" / "demo").iterdir()}
    capsys.readouterr()
    ec2.main(["status", "--bucket", BUCKET])
    out = capsys.readouterr().out
    assert "last command: finished (all epochs are done) at step 20" in out
    assert "instances so far: 2" in out
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


# --- It never loops --------------------------------------------------------------------------------------------------


@pytest.fixture
def replacement(cloud_account, moto, tmp_path):
    """start(change): the first start of a group's instance after change(machine); the machine, and then the group."""
    with Metadata() as metadata:
        metadata.market = "spot"
        instance = launch(cloud_account, "--commit", committed(), *(f"--set={s}" for s in SETTINGS), plan=SPOT)
        script = user_data(cloud_account, instance)

        def start(change=lambda machine: None, status=1, name="one"):
            machine = Machine(tmp_path / name, script, moto, metadata, instance["InstanceId"])
            change(machine)
            machine.start(status=status)
            (group,) = groups_of(cloud_account)
            return machine, group

        start.instance = instance
        yield start


def suspended(group):
    return {process["ProcessName"] for process in group["SuspendedProcesses"]}


def sizes(group):
    return group["MinSize"], group["MaxSize"], group["DesiredCapacity"]


def at_end(cloud_account):
    """When AWS ends the group by itself, in seconds since 1970."""
    actions = cloud_account.autoscaling.describe_scheduled_actions()["ScheduledUpdateGroupActions"]
    (action,) = [each for each in actions if each["ScheduledActionName"].endswith("-end")]
    assert (action["MinSize"], action["MaxSize"], action["DesiredCapacity"]) == (0, 0, 0)
    return action["StartTime"].timestamp()


@pytest.mark.parametrize(
    "ended",
    [
        {"ended": {"state": "finished", "reason": "all epochs are done"}},
        {"ended": {"state": "budget", "reason": "spent"}},
        {"ended": {"state": "failed", "reason": "setting up failed at: betons"}},
        {"stop": {"asked": 1}},
        {"instances/i-0.json": {"instance_id": "i-0", "started": 0, "seen": 3600, "dollars_per_hour": 25.0}},
    ],
)
def test_what_has_ended_ends_a_replacement_before_anything_is_installed(cloud_account, replacement, ended):
    ((name, value),) = ended.items()
    put(cloud_account, f"rn50/runs/demo/{name}", value)
    machine, group = replacement(status=gate.ENDED)
    assert "rn50-train.service" not in machine.everything()
    assert not (machine.folder / "etc/systemd/system/rn50-train.service").exists()
    assert sizes(group) == (0, 0, 0)
    assert "Launch" in suspended(group)
    assert machine.log("did").splitlines()[-1] == "shutdown -h +1"
    kept = json.loads(cloud_account.s3.get_object(Bucket=BUCKET, Key="rn50/runs/demo/ended")["Body"].read())
    assert kept["state"] == (value.get("state") or ("stopped" if name == "stop" else "budget"))


def test_a_missing_permission_ends_in_zero_instances_not_in_a_loop(cloud_account, replacement):
    """The group was made unable to replace anything; only who may end it can change that."""
    before = at_end(cloud_account)
    machine, group = replacement(lambda machine: (machine.folder / "shims" / "refused").touch())
    assert "aws autoscaling update-auto-scaling-group failed: An error occurred (AccessDenied)" in machine.everything()
    assert "ReplaceUnhealthy" in suspended(group)
    assert machine.log("did").splitlines()[-1] == "shutdown -h +1"
    assert at_end(cloud_account) == before  # and AWS ends what there is then
    assert 0 < before - time.time() <= 6 * 3600


def test_a_bucket_that_is_gone_ends_the_group(cloud_account, replacement):
    for entry in cloud_account.s3.list_objects_v2(Bucket=BUCKET)["Contents"]:
        cloud_account.s3.delete_object(Bucket=BUCKET, Key=entry["Key"])
    cloud_account.s3.delete_bucket(Bucket=BUCKET)
    machine, group = replacement(lambda machine: machine.environment.update(RN50_POLL_SECONDS="0.01"))
    assert sizes(group) == (0, 0, 0)
    assert machine.log("did").splitlines()[-1] == "shutdown -h +1"


@pytest.mark.parametrize("stopping", [True, False])
def test_a_set_up_that_aws_interrupts_is_gone_on_with_and_one_that_fails_is_not(cloud_account, replacement, stopping):
    def change(machine):
        if stopping:
            (machine.folder / "stopping").touch()

    for name in ("train_64.beton", "train_64.json"):
        cloud_account.s3.delete_object(Bucket=BUCKET, Key=f"rn50/betons/{name}")
    machine, group = replacement(change)
    assert sizes(group) == ((0, 1, 1) if stopping else (0, 0, 0))
    kept = {entry["Key"] for entry in cloud_account.s3.list_objects_v2(Bucket=BUCKET)["Contents"]}
    assert ("rn50/runs/demo/ended" in kept) != stopping
    record = json.loads(
        cloud_account.s3.get_object(
            Bucket=BUCKET, Key=f"rn50/runs/demo/instances/{replacement.instance['InstanceId']}.json"
        )["Body"].read()
    )
    assert record["started"] > time.time() - 200  # counted from its start, though it never came to train
    assert (record["type"], record["market"]) == ("g5.2xlarge", "spot")


def test_an_instance_that_is_let_in_arms_its_group_and_moves_its_end_on(cloud_account, replacement):
    (group,) = groups_of(cloud_account)
    cloud_account.autoscaling.put_scheduled_update_group_action(
        AutoScalingGroupName=group["AutoScalingGroupName"], ScheduledActionName=f"{group['AutoScalingGroupName']}-end",
        StartTime="2030-01-01T00:00:00Z", MinSize=0, MaxSize=0, DesiredCapacity=0)  # fmt: skip

    def change(machine):
        (machine.folder / "stopping").touch()  # set-up fails, and ends nothing

    cloud_account.s3.delete_object(Bucket=BUCKET, Key="rn50/betons/train_64.json")
    launched = json.loads(cloud_account.s3.get_object(Bucket=BUCKET, Key="rn50/runs/demo/launch.json")["Body"].read())
    put(cloud_account, "rn50/runs/demo/launch.json", launched | {"types": {"g5.2xlarge": 0.5, "g5.4xlarge": 0.9}})
    machine, group = replacement(change)
    # $25 at the price of its own type
    assert [line for line in machine.log("did").splitlines() if line.startswith("shutdown")][1] == "shutdown -h +3000"
    assert suspended(group) == {"AZRebalance"}
    assert abs(at_end(cloud_account) - time.time() - 6 * 3600) < 60


RECORD = {"budget": 25.0, "replacements": 2, "groups": ["g-1"], "attempt_started": 1000}


def others(count, started=2000, **more):
    return [
        {"instance_id": f"i-{k}", "started": started, "seen": started, "dollars_per_hour": 1.0, **more}
        for k in range(count)
    ]


@pytest.mark.parametrize(
    ("records", "state"),
    [
        (others(2), None),
        (others(3), "failed"),  # the first and two replacements
        (others(9, started=500), None),  # of an attempt before
        (others(1, seen=2000 + 3600 * 26), "budget"),
    ],
)
def test_replacements_and_dollars_are_counted_over_all_instances(records, state):
    found = gate.refusal(RECORD, None, None, records, "i-new")
    assert (found and found[0]) == state
    # on demand nothing is replaced
    assert gate.refusal(RECORD | {"groups": []}, None, None, others(9), "i-new") is None


def thrown(cloud_account, monkeypatch):
    """gate.py's calls of the aws command, thrown with boto3."""

    def aws(service, operation, flag, given):
        assert (service, flag) == ("autoscaling", "--cli-input-json")
        getattr(cloud_account.autoscaling, operation.replace("-", "_"))(**json.loads(given))

    monkeypatch.setattr(gate, "aws", aws)


def test_on_demand_takes_over_at_the_hour_and_ends_the_spot_instances(cloud_account, monkeypatch):
    instance = launch(cloud_account, "--fallback", "on-demand", "--patience-hours", "2", plan=SPOT)
    spot, dear = groups_of(cloud_account)
    assert dear["AutoScalingGroupName"] == f"{spot['AutoScalingGroupName']}-on-demand"
    assert sizes(dear) == (0, 1, 0)
    actions = cloud_account.autoscaling.describe_scheduled_actions()["ScheduledUpdateGroupActions"]
    due = {action["ScheduledActionName"]: action for action in actions}
    begin = due[f"{dear['AutoScalingGroupName']}-begin"]
    assert (begin["MinSize"], begin["MaxSize"], begin["DesiredCapacity"]) == (0, 1, 1)
    end = due[f"{spot['AutoScalingGroupName']}-end"]["StartTime"]
    assert (begin["StartTime"] - end).total_seconds() == 60
    assert abs(begin["StartTime"].timestamp() - time.time() - 2 * 3600) < 120
    assert (due[f"{dear['AutoScalingGroupName']}-end"]["StartTime"] - end).total_seconds() == 2 * 3600

    record = json.loads(cloud_account.s3.get_object(Bucket=BUCKET, Key="rn50/runs/demo/launch.json")["Body"].read())
    thrown(cloud_account, monkeypatch)
    gate.arm(record, "on-demand")
    spot, dear = groups_of(cloud_account)
    assert sizes(spot) == (0, 0, 0)
    assert "Launch" in suspended(spot)
    assert suspended(dear) == {"AZRebalance"}
    assert instance["InstanceId"] not in [i["InstanceId"] for i in alive(cloud_account)]
    assert cloud.price_of(record, "g5.2xlarge", "on-demand") == 1.212
    assert cloud.price_of(record, "g5.2xlarge", "spot") == record["types"]["g5.2xlarge"]


# --- Two at once -----------------------------------------------------------------------------------------------------


def test_of_instances_that_ask_at_the_same_time_one_has_the_run(cloud_account):
    """As often as S3 is asked: 12 threads, each with its own connection."""
    ids, answers, start = [f"i-{k}" for k in range(12)], {}, threading.Barrier(12)
    for name in ids:
        put(cloud_account, f"rn50/runs/demo/instances/{name}.json", {"instance_id": name, "state": "starting"})

    def ask(name):
        store = cloud.Store(boto3.session.Session(region_name="us-east-1").client("s3"), BUCKET, "demo")
        start.wait(20)
        answers[name] = store.claim(name)

    threads = [threading.Thread(target=ask, args=(name,)) for name in ids]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    holders = [name for name in ids if answers[name] is None]
    assert len(holders) == 1
    assert {answer for answer in answers.values() if answer} == set(holders)


def instance_of(cloud_account, name, calls):
    store = cloud.Store(cloud_account.s3, BUCKET, "demo")
    client = lambda service: type("Client", (), {"__getattr__": lambda _, o: lambda **p: calls.append((o, p))})()  # noqa: E731
    mine = {"instance_id": name, "dollars_per_hour": 1.0, "started": time.time(), "market": "spot"}
    record = {"run": "demo", "groups": ["g-1"], "budget": 25.0, "patience_hours": 6, "idle_minutes": 30}
    return supervise.Instance(store, cloud.Reporter(store, mine), record, client)


def test_the_second_of_two_waits_and_leaves_or_takes_over_where_the_first_is_silent(cloud_account, monkeypatch):
    monkeypatch.setattr(supervise, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(cloud, "LOST_SECONDS", 2.5)  # S3's dates are in whole seconds
    monkeypatch.setattr(cloud, "HEARTBEAT_SECONDS", 0.1)
    off = []
    monkeypatch.setattr(supervise, "switch_off", lambda: off.append(True))

    def wait_to_be_off():
        raise InterruptedError("switched off")

    monkeypatch.setattr(supervise, "wait_to_be_off", wait_to_be_off)
    calls = []
    first, second = (instance_of(cloud_account, name, calls) for name in ("i-1", "i-2"))
    first.beat("training")
    first.hold()
    beats = threading.Event()

    def beat():
        while not beats.wait(0.2):
            first.beat("training")

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(InterruptedError):
            second.hold()
        assert second.reporter.record["reason"] == "i-1 has this run"
    finally:
        beats.set()
        thread.join()
    assert off == [True]
    assert calls == [
        ("terminate_instance_in_auto_scaling_group", {"InstanceId": "i-2", "ShouldDecrementDesiredCapacity": True})
    ]
    assert first.store.read("ended") is None
    time.sleep(4)
    second.hold()  # i-1 is silent now
    assert first.store.read("holder") == {"instance_id": "i-2"}
    assert supervise.stop_reason(first, 0) == "another instance, i-2, has this run"
    # what has said that it is gone is not waited for
    second.beat("interrupted")
    began = time.monotonic()
    first.hold()
    assert time.monotonic() - began < 1
