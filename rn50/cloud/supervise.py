"""What runs on the instance: copies the betons, trains, reports to S3, and switches the instance off at the end.

    python -m rn50.cloud.supervise stage    --betons DIR    # S3 to a local disk, with checksums
    python -m rn50.cloud.supervise tune     --betons DIR    # where the launch asked for it: measures what is fastest
    python -m rn50.cloud.supervise train    --betons DIR    # under systemd, which starts it again after a failure
    python -m rn50.cloud.supervise give-up  --reason TEXT   # report a failure, and switch off

tools/ec2_bootstrap.sh and the systemd units that it writes call it. RN50_BUCKET and RN50_RUN say which run; all else is
in the run's launch.json. A conversion (`kind`) is one more run, with another command and nothing to stage or tune. The
instance was launched so that switching it off terminates it. Where a group launched it, the end of the run ends the
group first, and an instance that is taken away leaves it as it is: then another one comes.
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

from rn50.cloud import group
from rn50.cloud import store as cloud
from rn50.cloud.aws import ROOT
from rn50.cloud.mail import BUDGET_SHARE, Postman
from rn50.cloud.pace import LOW, Pace, slow_line
from rn50.command import run
from rn50.errors import RunError, UsageError
from rn50.files import read_json, read_rows

POLL_SECONDS = float(os.environ.get("RN50_POLL_SECONDS", 5))
# What saving and mirroring the last checkpoint may take after a stop was asked for; and what dying may, after a kill.
STOP_SECONDS, KILL_SECONDS = 150.0, 60.0
SUPERSEDED = "another instance, "
RENEW_SECONDS = 900.0  # between two renewals of the hour at which AWS ends the group


def main():
    args = arguments()
    import boto3

    instance = Instance(*connect(), boto3.client)
    instance.renew(at_once=True)
    if args.action == "stage":
        instance.hold()
        if not instance.converts:
            instance.stage(args.betons)
    elif args.action == "tune":
        if not instance.converts:
            tune(instance.store, instance.reporter, instance.record, args.betons)
    elif args.action == "train":
        train(instance, args.betons)
    else:
        log = Path(f"{os.environ.get('RN50_PREFIX', '')}/var/log") / cloud.SETUP_LOG
        instance.end("failed", args.reason, files=[log])


def connect():
    """The run's store, this instance's reporter, and the launch record, with this instance's own price."""
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    for name in ("RN50_BUCKET", "RN50_RUN", "RN50_INSTANCE"):
        if not os.environ.get(name):
            raise UsageError(f"{name} is not set: this runs on an instance that tools/ec2.py launched")
    store = cloud.Store(boto3.client("s3"), os.environ["RN50_BUCKET"], os.environ["RN50_RUN"])
    try:
        record = store.read("launch.json")
        mine = store.read(f"instances/{os.environ['RN50_INSTANCE']}.json")
    except (BotoCoreError, ClientError) as error:
        raise RunError(f"cannot read s3://{store.bucket}/{store.prefix}: {error}") from None
    if record is None:
        raise RunError(f"there is no s3://{store.bucket}/{store.prefix}/launch.json")
    if mine is None:  # gate.py could not note it
        price = cloud.price_of(record, os.environ.get("RN50_TYPE"), os.environ.get("RN50_MARKET"))
        mine = cloud.instance_record(os.environ, price)
    record["dollars_per_hour"] = mine["dollars_per_hour"]
    return store, cloud.Reporter(store, mine, say=say), record


class Instance:
    """This instance's part in a run: what it reports to, what it holds, and how it ends."""

    def __init__(self, store, reporter, record, client):
        """client: boto3.client, or what stands in for it."""
        self.store, self.reporter, self.record = store, reporter, record
        self.id = self.reporter.record["instance_id"]
        self.groups = self.record.get("groups") or []
        self.group = cloud.group_of(self.record, self.reporter.record.get("market"))
        self.converts = self.record.get("kind") == "conversion"
        self.folder = ROOT / "runs" / self.record["run"]
        self.postman = Postman(store, record, client, say)
        self._client = client
        self._scaling = client("autoscaling") if self.groups else None
        self._renewed = time.monotonic()

    def beat(self, state, **more):
        return self.reporter.beat(state, self.folder if self.folder.exists() else None, **more)

    def hold(self):
        """Be the one instance of the run; where another one stays alive, leave without ending anything."""
        give_up = time.monotonic() + cloud.LOST_SECONDS + 2 * cloud.HEARTBEAT_SECONDS
        while (holder := self.store.claim(self.id)) is not None:
            if time.monotonic() > give_up:
                self.step_aside(f"{holder} has this run")
                wait_to_be_off()
            say(f"waiting: {holder} has this run, and is alive")
            self.beat("waiting", reason=f"{holder} has this run")
            time.sleep(4 * POLL_SECONDS)

    def stage(self, betons):
        self.beat("staging")
        rung = cloud.rung_of(self.record, yaml.safe_load((ROOT / self.record["config"]).read_text()))
        cloud.stage(self.store.client, self.store.bucket, betons, rung=rung, say=say)
        self.beat("staged")

    def renew(self, at_once=False):
        """Tell AWS that this instance is well, now and then."""
        if self.group and (at_once or time.monotonic() - self._renewed > RENEW_SECONDS):
            self._renewed = time.monotonic()
            switches = group.renewal(self.groups, self.group, self.record["patience_hours"], time.time())
            group.throw(self._scaling, switches, refused=self._refused)

    def tell_warnings(self):
        """Mail what the run finds wrong with itself, each once: what is wrong early need not be paid for to the end."""
        try:
            rows = read_rows(self.folder / "log.jsonl", warn=lambda text: None)
        except RunError as error:
            return say(f"warning: {error}")
        for found in cloud.warnings_of(rows):
            self.postman.tell(found["cause"], found["text"], once=f"warning: {found['cause']}")

    def step_aside(self, reason):
        """Switch off for the other instance of this run: the group has one less from then on, but goes on."""
        say(f"{reason}; switching off")
        self.beat("superseded", reason=reason)
        if self.group:
            ours = {"InstanceId": self.id, "ShouldDecrementDesiredCapacity": True}
            group.throw(self._scaling, [("terminate_instance_in_auto_scaling_group", ours)], refused=self._refused)
        switch_off()

    def leave(self, reason):
        """Switch off because AWS takes this instance away: the group, where there is one, brings another."""
        after = "another instance goes on" if self.group else "go on with: tools/ec2.py resume"
        self._last_word("interrupted", reason)
        self.postman.tell("interrupted", f"{reason}\n{self._figures()}\n{after}")
        switch_off()

    def end(self, state, reason, files=()):
        """End the run on all instances, and switch off: the instance was launched to terminate then."""
        self._last_word(state, reason, files=files)
        try:
            self.store.write("ended", {"state": state, "reason": reason, "time": time.time()})
        except Exception as error:  # whatever S3 says, the group must end and the machine be off
            say(f"warning: S3 does not take how the run ended: {str(error).splitlines()[0]}")
        if self.group:
            group.throw(self._scaling, group.ending(self.groups), refused=self._refused)
        if self.record.get("secret"):
            self._forget_secret()
        self.postman.tell(state, f"{reason}\n{self._figures()}")
        switch_off()

    def _forget_secret(self):
        """Delete the token of a conversion, which the command asks for again if it goes on."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            self._client("ssm").delete_parameter(Name=self.record["secret"])
        except (BotoCoreError, ClientError) as error:
            if "ParameterNotFound" not in str(error):
                say(f"warning: {self.record['secret']} is still there: {str(error).splitlines()[0]}")

    def _last_word(self, state, reason, files=()):
        say(f"{state}: {reason}; switching off")
        for _ in range(3):
            if self.beat(state, files=files, reason=reason):
                break
            time.sleep(POLL_SECONDS)

    def _figures(self):
        """Dollars so far, and the last line of the console, for a mail."""
        lines = []
        with contextlib.suppress(Exception):  # a mail is sent without them, too
            lines.append(f"${cloud.dollars(self.store.instances()):.2f} of ${self.record['budget']:.2f} so far")
            lines.append(last_line(self.folder))
        return "\n".join(lines)

    def _refused(self, why):
        say(f"warning: the group cannot be told: {why}")


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
        if report:  # what the speed of the run is compared with
            store.write(cloud.PREFLIGHT, report | {"type": reporter.record.get("type")})
        if code and not report:
            say("warning: tools/preflight.py failed; the recipe's own settings are taken")
        tuned = (folder / cloud.TUNED).read_bytes() if report else b"{}\n"
        store.write_bytes(cloud.TUNED, tuned)
    (folder / cloud.TUNED).write_bytes(tuned)


def train(instance, betons):
    """One start of the training, watched until it ends; exit status 1 asks systemd for another one."""
    folder, record = instance.folder, instance.record
    folder.mkdir(parents=True, exist_ok=True)
    status = read_json(folder / "status.json", default={})
    if status.get("status") in ("finished", "budget"):
        return instance.end(status["status"], status["reason"])
    command = cloud.job_command(record, python=sys.executable, betons=betons, gpus=count_gpus())
    say(" ".join(command))
    asked = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append("SIGTERM"))
    with open(folder / cloud.CONSOLE, "ab") as console:
        child = subprocess.Popen(command, cwd=ROOT, stdout=console, stderr=subprocess.STDOUT)
    instance.beat(instance_state(instance))
    why = watch(child, asked, instance)
    status = read_json(folder / "status.json", default={})
    say(f"training ended with {child.returncode}, {status or 'without a status'}; {why or 'nobody asked it to'}")
    if status.get("status") in ("finished", "budget"):
        return instance.end(status["status"], status["reason"])
    if why == "SIGTERM":  # the instance is being switched off, or someone stops the service
        instance.beat("interrupted", reason=status.get("reason", why))
        return None
    if why and why.startswith(SUPERSEDED):
        return instance.step_aside(why)
    if why:
        return instance.end("budget" if why.startswith("budget") else "stopped", why)
    if status.get("status") == "interrupted" and "rebalance" not in status["reason"]:
        return instance.leave(status["reason"])
    if child.returncode == 2:
        return instance.end("failed", f"the command was refused: {last_line(folder)}")
    # a crash, kill -9, or a recommendation to leave, which does not say that the instance is taken away
    reason = status.get("reason") or last_line(folder)
    instance.beat("restarting", reason=reason)
    instance.postman.tell("trouble, it is started again", reason)
    sys.exit(1)


def instance_state(instance):
    return "converting" if instance.converts else "training"


def watch(child, asked, instance):
    """Wait for the training's end; returns why it was asked to stop, or None. It may stop itself at any time."""
    why, beaten, moved, mark = None, time.monotonic(), time.monotonic(), None
    pace = Pace(expected_rates(instance))
    while child.poll() is None:
        time.sleep(POLL_SECONDS)
        now = time.monotonic()
        if (latest := activity(instance.folder)) != mark:
            mark, moved = latest, now
        if why is None:
            why = asked[0] if asked else None
            if now - beaten >= min(cloud.HEARTBEAT_SECONDS, 12 * POLL_SECONDS):
                beaten = now
                progress = read_json(instance.folder / cloud.PROGRESS, default={})
                pace.add(progress)
                instance.beat(instance_state(instance), progress=progress, pace=pace.now())
                instance.renew()
                instance.tell_warnings()
                why = why or stop_reason(instance, idle_minutes=(now - moved) / 60, pace=pace.now())
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


def stop_reason(instance, idle_minutes, pace=None):
    """Why the run should stop now, or None; S3 that does not answer is no reason. pace: as `Pace.now` has it."""
    from botocore.exceptions import BotoCoreError, ClientError

    store, record = instance.store, instance.record
    if idle_minutes > record["idle_minutes"]:
        return f"idle: nothing written for {idle_minutes:.0f} minutes"
    if pace and pace["share"] < record.get("min_speed", 0):
        return f"slow: {slow_line(pace)}"
    if pace and pace["share"] < LOW:
        instance.postman.tell("slow", slow_line(pace), once="slow")
    try:
        if store.read_bytes("stop") is not None:
            return "stop was asked for"
        holder = (store.read("holder") or {}).get("instance_id", instance.id)
        if holder != instance.id:
            return f"{SUPERSEDED}{holder}, has this run"
        spent = cloud.dollars(store.instances())
    except (BotoCoreError, ClientError, OSError) as error:
        say(f"warning: cannot ask S3: {str(error).splitlines()[0]}")
        return None
    if spent >= BUDGET_SHARE * record["budget"]:
        text = f"${spent:.2f} of ${record['budget']:.2f} are spent"
        instance.postman.tell(f"{BUDGET_SHARE:.0%} of the budget is spent", text, once="budget")
    reserve = record["dollars_per_hour"] * STOP_SECONDS / 3600
    if spent + reserve >= record["budget"]:
        return f"budget: ${spent:.2f} of ${record['budget']:.2f} are spent, set-up included"
    return None


def expected_rates(instance):
    """{px: images/s}: measured by preflight on this type of machine, else projected at the launch, else None."""
    record, mine = instance.record, instance.reporter.record
    with contextlib.suppress(Exception):  # S3 may not answer, and nothing depends on it
        measured = instance.store.read(cloud.PREFLIGHT)
        if measured and measured.get("type") == mine.get("type"):
            return {row["resolution"]: row["training_images_per_second"] for row in measured["resolutions"]}
    return record.get("expected")


def switch_off():
    subprocess.run(["shutdown", "-h", "now"], check=True)


def wait_to_be_off():
    """What ended with an error would be taken for a set-up that failed, which ends the run of the other one, too."""
    while True:
        signal.pause()


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
