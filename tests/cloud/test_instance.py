"""The instance itself: user data, bootstrap, supervisor, training, in real processes."""

import os
import re
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime

import pytest

from rn50.cloud import launch as launching
from rn50.errors import RunError
from tests.cloud.helpers import (
    BUCKET,
    IMAGE,
    PLAN,
    alive,
    launch,
    only_instance,
    put,
    put_betons,
    user_data,
)
from tests.cloud.machine import SETTINGS, Machine, committed
from tests.conftest import ROOT
from tests.services import Metadata
from tools import ec2


def test_a_set_up_that_fails_is_reported_and_switches_the_instance_off(cloud_account, moto, tmp_path, capsys):
    with Metadata() as metadata:
        instance = launch(cloud_account, "--commit", committed(), *(f"--set={s}" for s in SETTINGS))
        machine = Machine(tmp_path / "one", user_data(cloud_account, instance), moto, metadata, instance["InstanceId"])
        for name in ("train_64.beton", "train_64.json"):
            cloud_account.s3.delete_object(Bucket=BUCKET, Key=f"rn50/betons/{name}")
        machine.start(status=1)
    off = [line for line in machine.log("did").splitlines() if line.startswith("shutdown")]
    assert off[2:3] == ["shutdown -h now"]  # after two limits
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
        ec2.main(["launch", *PLAN, "--ami", IMAGE, "--run", "demo", "--commit", "HEAD"])
        instance = only_instance(cloud_account)
        machine = Machine(tmp_path / "one", user_data(cloud_account, instance), moto, metadata, instance["InstanceId"])
        for entry in cloud_account.s3.list_objects_v2(Bucket=BUCKET, Prefix="rn50/code/")["Contents"]:
            put(cloud_account, entry["Key"], b"nothing that runs")
        asked = time.time()
        machine.start(status=1)
    minutes = int(re.search(r"RN50_MINUTES=(\d+)", user_data(cloud_account, instance))[1])
    did = machine.log("did").splitlines()
    assert did[0] == f"shutdown -h +{minutes}"
    assert did[2:4] == ["systemctl enable rn50-limit.timer", "systemctl restart rn50-limit.timer"]
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
        (shims / "snap").write_text(
            '#!/bin/bash\necho "snap $*" >>"$RN50_PREFIX/did"\n[[ $1 != install ]] || mv "${0%/*}"/{held,aws}\n'
        )
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


def test_the_laptop_and_the_supervisor_need_no_torch(tmp_path):
    """The commands answer at once, and a laptop needs boto3 and PyYAML only, in a clone that is not installed."""
    code = f"import runpy; runpy.run_path('{ROOT}/tools/ec2.py'); import sys, rn50; print(rn50.__file__)\n"
    code += "from rn50.cloud import supervise; print({'torch', 'numpy', 'ffcv'} & set(sys.modules))"
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
