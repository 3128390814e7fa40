"""The supervisor by itself: how each end of a training is taken."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import yaml
from botocore.exceptions import ClientError

from rn50.cloud import store as cloud
from rn50.cloud import supervise
from rn50.errors import RunError
from tests.cloud.helpers import BUCKET


class FakeStore:
    """Takes what is written; `stop` and the records of other instances can be set."""

    bucket, prefix, run = BUCKET, "rn50/runs/demo", "demo"

    def __init__(self):
        self.written, self.asked, self.others = {}, None, []

    def write(self, name, value):
        self.written[name] = dict(value)

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
    store = FakeStore()

    def train(script, **record):
        whole = {"run": "demo", "bucket": BUCKET, "config": "x", "settings": [], "budget": 25.0, "idle_minutes": 30}
        whole |= {"dollars_per_hour": 1.0, **record}
        monkeypatch.setattr(
            cloud, "training_command", lambda *args, **options: [sys.executable, "-c", script, str(folder)]
        )
        reporter = cloud.Reporter(store, instance_id="i-1", dollars_per_hour=1.0, started=time.time(), say=print)
        code = 0
        try:
            supervise.train(store, reporter, whole, "betons")
        except SystemExit as leaving:
            code = leaving.code
        return store.written["instances/i-1.json"], code, len(off)

    train.folder, train.store, store.console = folder, store, folder / cloud.CONSOLE
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
        (STATUS + "status('interrupted', 'EC2 rebalance recommendation (12:00)'); sys.exit(3)", "failed", 1, 0),
        (STATUS + "status('failed'); sys.exit(1)", "failed", 1, 0),
        ("import os; os.kill(os.getpid(), 9)", "failed", 1, 0),
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


def test_without_s3_the_training_goes_on(supervised, monkeypatch, capsys):
    def unreachable(*args):
        raise ClientError({"Error": {"Code": "503", "Message": "Slow Down"}}, "PutObject")

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
    store = SimpleNamespace(read_bytes=objects.get, write_bytes=objects.__setitem__)
    reporter = SimpleNamespace(beat=lambda *args: None)

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
    assert tuned.objects == {cloud.TUNED: KEPT.encode()}
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
