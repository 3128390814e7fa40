"""The instance itself: user data, bootstrap, supervisor, training, in real processes."""

import contextlib
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

from rn50.cloud import launch as launching
from rn50.errors import RunError
from rn50.training import checkpoint
from tests.cloud.helpers import (
    BUCKET,
    CONFIG,
    IMAGE,
    PLAN,
    alive,
    launch,
    only_instance,
    put,
    put_betons,
    user_data,
)
from tests.conftest import ROOT
from tests.services import Metadata
from tools import ec2

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
