"""An instance's first start in an empty folder: its user data run as it is, with what stands in for the system."""

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT

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
if [[ $1 == is-system-running ]]; then
    if [[ -e $RN50_PREFIX/stopping ]]; then echo stopping; else echo running; fi
    exit
fi
echo "systemctl $*" >>"$RN50_PREFIX/did"
[[ $* == "enable --now rn50-train.service" ]] || exit 0
unit=$RN50_PREFIX/etc/systemd/system/rn50-train.service
cd "$(sed -n 's/^WorkingDirectory=//p' "$unit")" || exit 1
# Restart=on-failure
(for _ in 1 2 3 4 5; do
    $(sed -n 's/^ExecStart=//p' "$unit") >>"$RN50_PREFIX/journal" 2>&1 && break
    echo "started again" >>"$RN50_PREFIX/did"
done) &
"""


# What the aws command of the image does for the user data; at first the instance's role is not known yet.
AWS = """#!{python}
import argparse, fnmatch, json, pathlib, sys, boto3
here = pathlib.Path(__file__).parent
parser = argparse.ArgumentParser()
parser.add_argument("service")
parser.add_argument("operation")
parser.add_argument("paths", nargs="*")
parser.add_argument("--only-show-errors", action="store_true")
parser.add_argument("--recursive", action="store_true")
parser.add_argument("--exclude", action="append")
parser.add_argument("--include", action="append")
parser.add_argument("--cli-input-json", type=json.loads)
parser.add_argument("--auto-scaling-group-name")
parser.add_argument("--scaling-processes", nargs="+")
for name in ("--min-size", "--max-size", "--desired-capacity"):
    parser.add_argument(name, type=int)
args = parser.parse_intermixed_args()
with open(here / "aws-calls", "a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + chr(10))
if args.service == "autoscaling":
    if (here / "refused").exists():
        sys.exit("An error occurred (AccessDenied) when calling " + args.operation)
    given = args.cli_input_json or {{key: value for key, value in {{
        "AutoScalingGroupName": args.auto_scaling_group_name, "ScalingProcesses": args.scaling_processes,
        "MinSize": args.min_size, "MaxSize": args.max_size, "DesiredCapacity": args.desired_capacity,
    }}.items() if value is not None}}
    getattr(boto3.client("autoscaling"), args.operation.replace("-", "_"))(**given)
    sys.exit()
assert (args.service, args.operation) == ("s3", "cp")
source, target = args.paths
if not (here / "tried").exists():
    (here / "tried").touch()
    sys.exit("fatal error: Unable to locate credentials")
bucket, _, key = (target if target.startswith("s3://") else source).removeprefix("s3://").partition("/")
s3 = boto3.client("s3")
if args.recursive:
    for page in s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=key):
        for entry in page.get("Contents", []):
            name = entry["Key"].removeprefix(key)
            if any(fnmatch.fnmatch(name, pattern) for pattern in args.include):
                path = pathlib.Path(target) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                s3.download_file(bucket, entry["Key"], str(path))
elif source == "-":
    s3.put_object(Bucket=bucket, Key=key, Body=sys.stdin.read().encode())
elif target.startswith("s3://"):
    s3.upload_file(source, bucket, key)
else:
    s3.download_file(bucket, key, target)
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
            # the system's; pyenv's would put its own folder, with an aws in it, before this one
            ("python3", f'#!/bin/bash\nexec {Path(sys.executable).resolve()} "$@"\n'),
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
