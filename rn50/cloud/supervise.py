"""What runs on the instance: copies the betons, trains, reports to S3, and switches the instance off at the end.

    python -m rn50.cloud.supervise stage    --betons DIR    # S3 to a local disk, with checksums
    python -m rn50.cloud.supervise tune     --betons DIR    # where the launch asked for it: measures what is fastest
    python -m rn50.cloud.supervise train    --betons DIR    # under systemd, which starts it again after a failure
    python -m rn50.cloud.supervise give-up  --reason TEXT   # report a failure, and switch off

tools/ec2_bootstrap.sh and the systemd units that it writes call it. RN50_BUCKET and RN50_RUN say which run; all else is
in the run's launch.json. The instance was launched so that switching it off terminates it.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

from rn50.cloud import store as cloud
from rn50.cloud.aws import ROOT
from rn50.command import run
from rn50.errors import RunError, UsageError
from rn50.files import read_json

POLL_SECONDS = float(os.environ.get("RN50_POLL_SECONDS", 5))
# What saving and mirroring the last checkpoint may take after a stop was asked for; and what dying may, after a kill.
STOP_SECONDS, KILL_SECONDS = 150.0, 60.0


def main():
    args = arguments()
    store, reporter, record = connect()
    if args.action == "stage":
        reporter.beat("staging")
        client = store.client
        rung = cloud.rung_of(record, yaml.safe_load((ROOT / record["config"]).read_text()))
        cloud.stage(client, store.bucket, args.betons, rung=rung, say=say)
        reporter.beat("staged")
    elif args.action == "tune":
        tune(store, reporter, record, args.betons)
    elif args.action == "train":
        train(store, reporter, record, args.betons)
    else:
        folder = ROOT / "runs" / record["run"]
        log = Path(f"{os.environ.get('RN50_PREFIX', '')}/var/log") / cloud.SETUP_LOG
        end(reporter, folder if folder.exists() else None, "failed", args.reason, files=[log])


def connect():
    """The run's store, this instance's reporter, and the launch record."""
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    for name in ("RN50_BUCKET", "RN50_RUN", "RN50_INSTANCE"):
        if not os.environ.get(name):
            raise UsageError(f"{name} is not set: this runs on an instance that tools/ec2.py launched")
    store = cloud.Store(boto3.client("s3"), os.environ["RN50_BUCKET"], os.environ["RN50_RUN"])
    try:
        record = store.read("launch.json")
        before = store.read(f"instances/{os.environ['RN50_INSTANCE']}.json")
    except (BotoCoreError, ClientError) as error:
        raise RunError(f"cannot read s3://{store.bucket}/{store.prefix}: {error}") from None
    if record is None:
        raise RunError(f"there is no s3://{store.bucket}/{store.prefix}/launch.json")
    reporter = cloud.Reporter(
        store,
        instance_id=os.environ["RN50_INSTANCE"],
        dollars_per_hour=record["dollars_per_hour"],
        started=before["started"] if before else time.time() - seconds_up(),
        say=say,
    )
    return store, reporter, record


def tune(store, reporter, record, betons):
    """Have TUNED in the run's folder, and in the bucket for the instances to come: a run keeps its settings.

    Where measuring fails, the recipe's own are taken. RunError where the run would cost more than its budget.
    """
    if not record.get("tune"):
        return
    folder = ROOT / "runs" / record["run"]
    folder.mkdir(parents=True, exist_ok=True)
    tuned = store.read_bytes(cloud.TUNED)
    if tuned is None:
        reporter.beat("tuning", folder)
        command = cloud.tuning_command(record, python=sys.executable, betons=betons)
        say(" ".join(command))
        code = subprocess.run(command, cwd=ROOT).returncode
        report = read_json(folder / cloud.PREFLIGHT, default={})
        if code and report.get("go") is False and "budget.allow_overrun=true" not in record["settings"]:
            raise RunError(f"no go: {report['reasons'][0]}")
        if code and not report:
            say("warning: tools/preflight.py failed; the recipe's own settings are taken")
        tuned = (folder / cloud.TUNED).read_bytes() if report else b"{}\n"
        store.write_bytes(cloud.TUNED, tuned)
    (folder / cloud.TUNED).write_bytes(tuned)


def train(store, reporter, record, betons):
    """One start of the training, watched until it ends; exit status 1 asks systemd for another one."""
    folder = ROOT / "runs" / record["run"]
    folder.mkdir(parents=True, exist_ok=True)
    status = read_json(folder / "status.json", default={})
    if status.get("status") in ("finished", "budget"):
        return end(reporter, folder, status["status"], status["reason"])
    command = cloud.training_command(record, python=sys.executable, betons=betons, gpus=count_gpus())
    say(" ".join(command))
    asked = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append("SIGTERM"))
    with open(folder / cloud.CONSOLE, "ab") as console:
        child = subprocess.Popen(command, cwd=ROOT, stdout=console, stderr=subprocess.STDOUT)
    reporter.beat("training", folder)
    why = watch(child, asked, store, reporter, record, folder)
    status = read_json(folder / "status.json", default={})
    say(f"training ended with {child.returncode}, {status or 'without a status'}; {why or 'nobody asked it to'}")
    if status.get("status") in ("finished", "budget"):
        return end(reporter, folder, status["status"], status["reason"])
    if why == "SIGTERM":  # the instance is being switched off, or someone stops the service
        reporter.beat("interrupted", folder, reason=status.get("reason", why))
        return None
    if why:
        return end(reporter, folder, "budget" if why.startswith("budget") else "stopped", why)
    if status.get("status") == "interrupted" and "rebalance" not in status["reason"]:
        return end(reporter, folder, "interrupted", status["reason"])
    if child.returncode == 2:
        return end(reporter, folder, "failed", f"the command was refused: {last_line(folder)}")
    # a crash, kill -9, or a recommendation to leave, which does not say that the instance is taken away
    reporter.beat("failed", folder, reason=status.get("reason") or last_line(folder))
    sys.exit(1)


def watch(child, asked, store, reporter, record, folder):
    """Wait for the training's end; returns why it was asked to stop, or None. It may stop itself at any time."""
    why, beaten, moved, mark = None, time.monotonic(), time.monotonic(), None
    while child.poll() is None:
        time.sleep(POLL_SECONDS)
        now = time.monotonic()
        if (latest := activity(folder)) != mark:
            mark, moved = latest, now
        if why is None:
            why = asked[0] if asked else None
            if now - beaten >= min(cloud.HEARTBEAT_SECONDS, 12 * POLL_SECONDS):
                beaten = now
                reporter.beat("training", folder)
                why = why or stop_reason(store, record, idle_minutes=(now - moved) / 60)
            if why:
                say(f"asking the training to stop: {why}")
                child.send_signal(signal.SIGTERM)
                stop_by = now + STOP_SECONDS
        elif now > stop_by + KILL_SECONDS:  # a hung GPU's driver keeps it: only switching off helps
            say("it cannot be killed")
            break
        elif now > stop_by:
            say("it did not stop in time")
            child.kill()
    return why


def stop_reason(store, record, idle_minutes):
    """Why the run should stop now, or None; S3 that does not answer is no reason."""
    from botocore.exceptions import BotoCoreError, ClientError

    if idle_minutes > record["idle_minutes"]:
        return f"idle: nothing written for {idle_minutes:.0f} minutes"
    try:
        if store.read_bytes("stop") is not None:
            return "stop was asked for"
        spent = cloud.dollars(store.instances())
    except (BotoCoreError, ClientError, OSError) as error:
        say(f"warning: cannot ask S3: {str(error).splitlines()[0]}")
        return None
    reserve = record["dollars_per_hour"] * STOP_SECONDS / 3600
    if spent + reserve >= record["budget"]:
        return f"budget: ${spent:.2f} of ${record['budget']:.2f} are spent, set-up included"
    return None


def end(reporter, folder, state, reason, files=()):
    """Report how it ended, and switch off: the instance was launched to terminate then."""
    say(f"{state}: {reason}; switching off")
    for _ in range(3):
        if reporter.beat(state, folder, files=files, reason=reason):
            break
        time.sleep(POLL_SECONDS)
    subprocess.run(["shutdown", "-h", "now"], check=True)


def activity(folder):
    """Changes whenever the run writes anything."""
    found = {}
    for entry in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):  # a partial file just got its name
            found[entry.name] = entry.stat().st_mtime_ns
    return found


def last_line(folder):
    lines = (folder / cloud.CONSOLE).read_text(errors="replace").split("\n")
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "it said nothing")


def count_gpus():
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=120)
    except (FileNotFoundError, subprocess.TimeoutExpired):  # without a driver, or with one that hangs
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def seconds_up():
    """Seconds since the machine was started: they cost too."""
    return float(Path("/proc/uptime").read_text().split()[0]) if not os.environ.get("RN50_PREFIX") else 0.0


def say(message):
    print(message, flush=True)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    actions = parser.add_subparsers(dest="action", required=True)
    for name in ("stage", "tune", "train"):
        actions.add_parser(name).add_argument("--betons", required=True, help="folder on a fast local disk")
    actions.add_parser("give-up").add_argument("--reason", required=True)
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
