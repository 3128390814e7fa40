"""The supervisor by itself: how each end of a training is taken."""

import copy
import json
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import datetime
from types import SimpleNamespace

import pytest
import yaml
from botocore.exceptions import ClientError

from rn50.cloud import store as cloud
from rn50.cloud import supervise
from rn50.cloud.pace import Pace, expected_at
from rn50.errors import RunError
from tests.cloud.helpers import BUCKET


class FakeStore:
    """Takes what is written; `stop` and the records of other instances can be set."""

    bucket, prefix, run = BUCKET, "rn50/runs/demo", "demo"

    def __init__(self):
        self.written, self.asked, self.others = {}, None, []

    def write(self, name, value):
        self.written[name] = copy.deepcopy(value)

    def read(self, name):
        return self.written.get(name)

    def write_bytes(self, name, body):
        pass

    def read_bytes(self, name):
        return self.asked if b"started" in self.console.read_bytes() else None

    def instances(self):
        return self.others if b"started" in self.console.read_bytes() else []


@pytest.fixture
def supervised(tmp_path, monkeypatch):
    """train(script): runs `script` as the training; gives (what was reported last, exit status, shutdowns)."""
    monkeypatch.setattr(supervise, "ROOT", tmp_path)
    monkeypatch.setattr(supervise, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(cloud, "HEARTBEAT_SECONDS", 0.05)
    folder = tmp_path / "runs" / "demo"
    folder.mkdir(parents=True)
    off, real, handler = [], subprocess.run, signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(
        supervise.subprocess,
        "run",
        lambda command, **options: off.append(command) if command[0] == "shutdown" else real(command, **options),
    )
    store, calls = FakeStore(), []

    class Client:
        """Notes what is called; refuses what is in `train.refused`."""

        def __init__(self, service):
            self.service = service

        def __getattr__(self, operation):
            def call(**parameters):
                calls.append((operation, parameters))
                if operation in train.refused:
                    raise ClientError({"Error": {"Code": "AccessDenied", "Message": "no"}}, operation)

            return call

    def train(script, **record):
        whole = {"run": "demo", "bucket": BUCKET, "config": "x", "settings": [], "budget": 25.0, "idle_minutes": 30}
        whole |= {"dollars_per_hour": 1.0, **record}
        monkeypatch.setattr(
            cloud, "training_command", lambda *args, **options: [sys.executable, "-c", script, str(folder)]
        )
        mine = {"instance_id": "i-1", "dollars_per_hour": 1.0, "started": time.time(), "type": "g5.2xlarge"}
        instance = supervise.Instance(store, cloud.Reporter(store, mine, print), whole, Client)
        code = 0
        try:
            supervise.train(instance, "betons")
        except SystemExit as leaving:
            code = leaving.code
        return store.written["instances/i-1.json"], code, len(off)

    train.folder, train.store, store.console = folder, store, folder / cloud.CONSOLE
    train.calls, train.refused = calls, set()
    yield train
    signal.signal(signal.SIGTERM, handler)


STATUS = """
import json, signal, sys, time
def status(word, why="why"):
    open(sys.argv[1] + "/status.json", "w").write(json.dumps({"status": word, "reason": why, "step": 3}))
"""
WAITS = (
    STATUS
    + """
def leave(*which):
    status("interrupted", "SIGTERM")
    sys.exit(3)
signal.signal(signal.SIGTERM, leave)
print("started", flush=True)
while True:
    time.sleep(0.01)
"""
)


@pytest.mark.parametrize(
    ("script", "state", "code", "off"),
    [
        (STATUS + "status('finished')", "finished", 0, 1),
        (STATUS + "status('budget'); sys.exit(4)", "budget", 0, 1),
        (STATUS + "status('interrupted', 'EC2 spot notice (terminate at 12:00)'); sys.exit(3)", "interrupted", 0, 1),
        (STATUS + "status('interrupted', 'EC2 rebalance recommendation (12:00)'); sys.exit(3)", "restarting", 1, 0),
        (STATUS + "status('failed'); sys.exit(1)", "restarting", 1, 0),
        ("import os; os.kill(os.getpid(), 9)", "restarting", 1, 0),
        ("import sys; print('error: no such key'); sys.exit(2)", "failed", 0, 1),
        # under torchrun a planned stop exits 0
        (STATUS + "status('budget')", "budget", 0, 1),
    ],
)
def test_every_end_of_a_training_is_taken_for_what_it_is(supervised, script, state, code, off):
    record, left, switched_off = supervised(script)
    assert (record["state"], left, switched_off) == (state, code, off)


@pytest.mark.parametrize("word", ["finished", "budget"])
def test_what_is_finished_or_spent_is_never_started_again(supervised, word):
    (supervised.folder / "status.json").write_text(json.dumps({"status": word, "reason": "as it was"}))
    record, _, off = supervised("raise SystemExit('started again')")
    assert (record["state"], record["reason"], off) == (word, "as it was", 1)
    assert not (supervised.folder / cloud.CONSOLE).exists()


def test_a_stop_that_is_asked_for_ends_the_run_with_a_checkpoint(supervised):
    supervised.store.asked = b"{}"
    record, code, off = supervised(WAITS)
    assert (record["state"], record["reason"], code, off) == ("stopped", "stop was asked for", 0, 1)
    assert json.loads((supervised.folder / "status.json").read_text())["status"] == "interrupted"


def test_the_instances_own_budget_counts_every_instance(supervised):
    supervised.store.others = [
        {"started": 0, "seen": 3600 * 20, "dollars_per_hour": 1.0},
        {"started": 0, "seen": 3600 * 10, "dollars_per_hour": 0.5},
    ]
    record, _, off = supervised(WAITS)
    assert record["state"] == "budget"
    assert record["reason"] == "budget: $25.00 of $25.00 are spent, set-up included"
    assert off == 1


def test_a_run_that_writes_nothing_is_ended(supervised):
    record, _, off = supervised(WAITS, idle_minutes=0.005)
    assert (record["state"], off) == ("stopped", 1)
    assert record["reason"].startswith("idle: nothing written")


def test_a_training_that_does_not_stop_is_killed(supervised, monkeypatch):
    monkeypatch.setattr(supervise, "STOP_SECONDS", 0.2)
    supervised.store.asked = b"{}"
    record, _, off = supervised(WAITS.replace("sys.exit(3)", "pass"))
    assert (record["state"], off) == ("stopped", 1)


def test_a_training_that_cannot_even_be_killed_does_not_keep_the_instance(supervised, monkeypatch):
    """A hung GPU's driver holds the process in the kernel: nothing but switching off ends that."""
    monkeypatch.setattr(supervise, "STOP_SECONDS", 0.1)
    monkeypatch.setattr(supervise, "KILL_SECONDS", 0.1)
    held = []
    monkeypatch.setattr(subprocess.Popen, "kill", lambda process: held.append(process))
    supervised.store.asked = b"{}"
    try:
        record, _, off = supervised(WAITS.replace("sys.exit(3)", "pass"))
    finally:
        monkeypatch.undo()
        held[0].kill()
        held[0].wait()
    assert (record["state"], record["reason"], off) == ("stopped", "stop was asked for", 1)


def test_systemds_stop_is_passed_on_and_switches_nothing_off(supervised):
    threading.Timer(0.6, os.kill, (os.getpid(), signal.SIGTERM)).start()
    record, code, off = supervised(WAITS)
    assert (record["state"], record["reason"], code, off) == ("interrupted", "SIGTERM", 0, 0)


@pytest.mark.parametrize("code", ["503", "AccessDenied", "RequestTimeTooSkewed", "NoSuchBucket"])
def test_without_s3_the_training_goes_on(supervised, monkeypatch, capsys, code):
    def unreachable(*args):
        raise ClientError({"Error": {"Code": code, "Message": "no"}}, "PutObject")

    monkeypatch.setattr(supervised.store, "read_bytes", unreachable)
    record, code, off = supervised(STATUS + "time.sleep(0.5); status('finished')")
    assert (record["state"], code, off) == ("finished", 0, 1)
    assert "warning: cannot ask S3" in capsys.readouterr().out


def test_the_training_command_has_what_the_launch_asked_for():
    record = {"run": "r", "bucket": BUCKET, "config": "c.yaml", "settings": ["a.b=1"], "budget": 25.0}
    record["dollars_per_hour"] = 0.5
    one = cloud.training_command(record, python="python", betons="/b", gpus=1)
    assert one[:4] == ["python", "train_imagenet.py", "--config-file", "c.yaml"]
    assert {"--a.b=1", "--data.dir=/b", "--logging.run_name=r", f"--logging.mirror=s3://{BUCKET}/rn50/runs"} < set(one)
    assert {"--budget.max_dollars=25", "--budget.dollars_per_hour=0.5"} < set(one)
    assert "--training.device=cuda" in one  # auto would train on the processor where the driver is missing
    record["settings"] = ["training.device=cpu"]
    own = cloud.training_command(record, python="python", betons="/b", gpus=0)
    assert [word for word in own if "training.device" in word] == ["--training.device=cpu"]
    eight = cloud.training_command(record, python="python", betons="/b", gpus=8)
    assert eight[:4] == ["python", "-m", "torch.distributed.run", "--nproc_per_node=8"]


# --- With a group, and beside another instance ------------------------------------------------------------------------

GROUPS = {"groups": ["g-1", "g-1-on-demand"], "patience_hours": 6.0, "fallback": "on-demand", "replacements": 20}
ENDS = ["suspend_processes", "update_auto_scaling_group"] * 2
TOPIC = "arn:aws:sns:us-east-1:1:rn50-x"


def operations(train):
    return [operation for operation, _ in train.calls]


@pytest.mark.parametrize(
    ("script", "ends"),
    [
        (STATUS + "status('finished')", True),
        (STATUS + "status('budget'); sys.exit(4)", True),
        ("import sys; print('error: no such key'); sys.exit(2)", True),
        # another instance goes on
        (STATUS + "status('interrupted', 'EC2 spot notice (terminate at 12:00)'); sys.exit(3)", False),
        # systemd starts it again
        (STATUS + "status('failed'); sys.exit(1)", False),
    ],
)
def test_only_the_end_of_the_run_ends_its_groups(supervised, script, ends):
    supervised(script, **GROUPS)
    assert operations(supervised) == (ENDS if ends else [])
    assert ("ended" in supervised.store.written) == ends
    for operation, parameters in supervised.calls:
        assert parameters["AutoScalingGroupName"] in GROUPS["groups"]
        if operation == "update_auto_scaling_group":
            assert (parameters["MinSize"], parameters["MaxSize"], parameters["DesiredCapacity"]) == (0, 0, 0)
        else:
            assert parameters["ScalingProcesses"] == ["Launch"]


@pytest.mark.parametrize("script", [STATUS + "status('finished')", "import sys; print('error: no'); sys.exit(2)"])
def test_a_conversions_token_goes_however_it_ends(supervised, script):
    supervised(script, secret="/rn50/rn50-x/conversion")
    assert supervised.calls == [("delete_parameter", {"Name": "/rn50/rn50-x/conversion"})]


def test_a_group_that_cannot_be_ended_does_not_keep_the_instance_on(supervised, capsys):
    supervised.refused = {"suspend_processes", "update_auto_scaling_group", "publish"}
    record, code, off = supervised(STATUS + "status('finished')", **GROUPS, notify=TOPIC)
    assert (record["state"], code, off) == ("finished", 0, 1)
    assert operations(supervised) == [*ENDS, "publish"]  # each was tried
    assert "warning: the group cannot be told: An error occurred (AccessDenied)" in (said := capsys.readouterr().out)
    assert "warning: no mail could be sent" in said


def test_a_living_instance_moves_the_end_of_its_group_on(supervised, monkeypatch):
    monkeypatch.setattr(supervise, "RENEW_SECONDS", 0.0)
    before = time.time()
    supervised(STATUS + "time.sleep(0.8); status('finished')", **GROUPS)
    moved = [p for o, p in supervised.calls if o == "put_scheduled_update_group_action"]
    assert [(p["AutoScalingGroupName"], p["ScheduledActionName"]) for p in moved[:3]] == [
        ("g-1-on-demand", "g-1-on-demand-end"),
    ] * 3  # an instance that is not spot has the second group, and leaves the first alone
    assert 6 * 3600 - 2 < datetime.fromisoformat(moved[0]["StartTime"]).timestamp() - before < 6 * 3600 + 60


def test_the_instance_that_another_one_has_replaced_stops_and_ends_nothing(supervised):
    supervised.store.written["holder"] = {"instance_id": "i-2"}
    record, code, off = supervised(WAITS, **GROUPS)
    assert (record["state"], record["reason"], code, off) == (
        "superseded", "another instance, i-2, has this run", 0, 1)  # fmt: skip
    assert supervised.calls == [
        ("terminate_instance_in_auto_scaling_group", {"InstanceId": "i-1", "ShouldDecrementDesiredCapacity": True})
    ]
    assert "ended" not in supervised.store.written


@pytest.mark.parametrize(("minimum", "state"), [(0.3, "finished"), (0.6, "stopped")])
def test_half_an_hour_at_low_speed_is_told_and_on_request_stopped(supervised, minimum, state):
    """400 images/s where the table has 1000 at 128 px."""
    progress = """
def progress(seconds):
    text = json.dumps({"images_seen": 400 * seconds, "seconds": seconds, "resolution": 128, "epoch": 0})
    open(sys.argv[1] + "/progress.json.new", "w").write(text)
    import os
    os.replace(sys.argv[1] + "/progress.json.new", sys.argv[1] + "/progress.json")
progress(10); time.sleep(0.5); progress(1000); time.sleep(0.5); progress(1900); time.sleep(0.5)
status("finished")
"""
    expected = {"128": 1000.0, "224": 500.0}
    record, _, off = supervised(
        WAITS.partition("signal.signal")[0] + "signal.signal(signal.SIGTERM, leave)\n" + progress,
        expected=expected, min_speed=minimum, notify=TOPIC)  # fmt: skip
    assert (record["state"], off) == (state, 1)
    assert record["pace"] == {"images_per_second": 400.0, "share": 0.4, "minutes": 32}
    if state == "stopped":
        assert record["reason"].startswith("slow: 400 images/s over 32 minutes, 40% of what is expected")
    told = [p["Subject"] for o, p in supervised.calls if o == "publish"]
    assert told == (["rn50 demo: slow"] if state == "finished" else []) + [f"rn50 demo: {state}"]


def test_what_is_expected_between_and_beyond_the_sizes_that_were_measured():
    rates = {"96": 1000.0, 160: 600.0}
    assert [expected_at(rates, px) for px in (64, 96, 128, 160, 320)] == [1000, 1000, 800, 600, 150]


def test_a_run_that_began_again_is_not_taken_for_a_slow_one():
    pace = Pace({128: 1000.0})
    for seconds, images in ((0, 0), (1700, 1_700_000), (1000, 1_000_000), (2900, 2_900_000)):
        pace.add({"seconds": seconds, "images_seen": images, "resolution": 128})
    assert pace.now() == {"images_per_second": 1000.0, "share": 1.0, "minutes": 32}
    assert Pace(None).now() is None


def test_four_fifths_of_the_budget_are_mailed_once_over_all_instances(supervised):
    supervised.store.others = [{"started": 0, "seen": 3600 * 21, "dollars_per_hour": 1.0}]
    for _ in range(2):
        supervised(STATUS + "print('started', flush=True); time.sleep(0.5); status('finished')", notify=TOPIC)
        (supervised.folder / "status.json").unlink()
    told = [p["Subject"] for o, p in supervised.calls if o == "publish"]
    assert told == ["rn50 demo: 80% of the budget is spent", "rn50 demo: finished", "rn50 demo: finished"]
    (mail,) = [p for o, p in supervised.calls if o == "publish" and "80%" in p["Subject"]]
    assert mail["Message"] == "$21.00 of $25.00 are spent"
    assert mail["TopicArn"] == TOPIC


def test_what_the_run_finds_wrong_with_itself_is_mailed_once(supervised):
    row = {"epoch": 1, "forecast": {"top1": None, "warnings": [{"cause": "no learning", "text": "top-1 of guessing"}]}}
    (supervised.folder / "log.jsonl").write_text(json.dumps(row) + "\n")
    supervised(STATUS + "time.sleep(0.8); status('finished')", notify=TOPIC)
    told = [(p["Subject"], p["Message"]) for o, p in supervised.calls if o == "publish"]
    assert told[0] == ("rn50 demo: no learning", "top-1 of guessing")
    assert [subject for subject, _ in told[1:]] == ["rn50 demo: finished"]


def test_a_log_with_a_torn_line_does_not_end_the_watch(supervised, capsys):
    (supervised.folder / "log.jsonl").write_text('{"epoch": 0}\n{"epo\n{"epoch": 2}\n')
    supervised(STATUS + "time.sleep(0.8); status('finished')", notify=TOPIC)
    assert [p["Subject"] for o, p in supervised.calls if o == "publish"] == ["rn50 demo: finished"]
    assert "log.jsonl, line 2: not valid JSON" in capsys.readouterr().out


# --- Measured before the first epoch: launch --tune ------------------------------------------------------------------

# In the place of tools/preflight.py: {go} and {status} are its verdict.
PREFLIGHT = """
import json, sys
options = dict(zip(sys.argv, sys.argv[1:]))
open("measured", "a").write(" ".join(sys.argv) + chr(10))
open(options["--write"], "w").write("training: {{compile: true}}")
open(options["--json"], "w").write(json.dumps({{"go": {go}, "reasons": ["$30.00 is more than $25"]}}))
sys.exit({status})
"""
KEPT = "training: {compile: true}"


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """tune(script, **record): one instance's; gives what its run's folder has then. tune.objects: the bucket's."""
    monkeypatch.setattr(supervise, "ROOT", tmp_path)
    (tmp_path / "tools").mkdir()
    objects = {}
    store = SimpleNamespace(read_bytes=objects.get, write_bytes=objects.__setitem__, write=objects.__setitem__)
    reporter = SimpleNamespace(beat=lambda *args: None, record={"type": "g5.2xlarge"})

    def tune(script, **more):
        (tmp_path / "tools" / "preflight.py").write_text(script)
        record = {"run": "demo", "config": "c.yaml", "settings": ["lr.schedule=step"], "budget": 25.0, "tune": True}
        supervise.tune(store, reporter, record | {"dollars_per_hour": 1.0} | more, "/betons")
        found = tmp_path / "runs" / "demo" / cloud.TUNED
        return found.read_text() if found.exists() else None

    tune.objects = objects
    tune.measured = lambda: (tmp_path / "measured").read_text().splitlines() if (tmp_path / "measured").exists() else []
    return tune


def test_what_is_fastest_is_measured_once_a_run(tuned):
    assert tuned(PREFLIGHT.format(go=True, status=0)) == KEPT
    assert tuned.objects[cloud.TUNED] == KEPT.encode()
    assert tuned.objects[cloud.PREFLIGHT]["type"] == "g5.2xlarge"  # what it measured holds for this type alone
    (command,) = tuned.measured()
    assert command.startswith("tools/preflight.py c.yaml --lr.schedule=step --training.device=cuda --data /betons")
    assert "--budget 25 --dollars-per-hour 1" in command
    # the next instance of the run takes what the first one found, whatever it would find itself
    assert tuned("raise SystemExit('measured again')") == KEPT
    assert len(tuned.measured()) == 1


def test_nothing_is_measured_unless_it_was_asked_for(tuned):
    assert tuned(PREFLIGHT.format(go=True, status=0), tune=False) is None
    assert not tuned.measured()
    assert not tuned.objects


def test_a_run_that_would_cost_more_than_its_budget_is_not_begun(tuned):
    no_go = PREFLIGHT.format(go=False, status=1)
    with pytest.raises(RunError, match=r"no go: \$30\.00 is more than \$25"):
        tuned(no_go)
    assert not tuned.objects
    assert tuned(no_go, settings=["budget.allow_overrun=true"]) == KEPT


def test_a_measurement_that_fails_leaves_the_recipes_own_settings(tuned, capsys):
    assert yaml.safe_load(tuned("raise SystemExit('no such driver')")) == {}
    assert "warning: tools/preflight.py failed; the recipe's own settings are taken" in capsys.readouterr().out
    assert yaml.safe_load(tuned.objects[cloud.TUNED]) == {}


def test_the_training_of_a_tuned_run_reads_what_was_found():
    record = {"run": "r", "bucket": BUCKET, "config": "c.yaml", "settings": ["a.b=1"], "budget": 25.0, "tune": True}
    command = cloud.training_command(record | {"dollars_per_hour": 0.5}, python="python", betons="/b", gpus=1)
    # a setting that was asked for comes after it, and so wins
    assert command[2:7] == ["--config-file", "c.yaml", "--config-file", f"runs/r/{cloud.TUNED}", "--a.b=1"]
