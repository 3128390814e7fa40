"""Instances that a group launches: one that is taken away, two at once, and everything that might make a loop of it."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import torch

from rn50.training import checkpoint
from tests.cloud.helpers import BUCKET, CONFIG, IMAGE, SPOT, alive, groups_of, only_instance, put, user_data
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
