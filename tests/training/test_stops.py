"""Runs that are stopped, hang, or lose a rank: how soon they end, what they say, and what a repetition makes of it."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rn50 import evaluate, losses
from rn50.data import beton_loader, loaders
from rn50.files import read_rows
from rn50.training import checkpoint, distributed, interruption, progress
from tests import chaos
from tests.commands import Command
from tests.conftest import ROOT
from tests.services import Metadata

STOP_SECONDS = 4.0  # in the place of 18, where a test waits for all of it


def stop_sooner():
    interruption.STOP_SECONDS = STOP_SECONDS


def evaluate_slowly():
    count = evaluate.correct_in_top

    def slowly(*args):
        time.sleep(0.1)
        return count(*args)

    evaluate.correct_in_top = slowly


def test_a_signal_during_the_imports_is_heeded_before_the_first_step(betons, tmp_path):
    """In a new process, because the imports are what takes long."""
    flags = {"data.dir": betons, "logging.folder": tmp_path, "logging.run_name": "x", "training.device": "cpu"}
    flags |= {"training.epochs": 9, "training.batch_size": 20, "training.micro_batch": 20, "model.arch": "resnet18"}
    command = [sys.executable, str(ROOT / "train_imagenet.py"), *(f"--{name}={value}" for name, value in flags.items())]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not catches_sigterm(process.pid):
        time.sleep(0.01)
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 3, output
    assert time.monotonic() - asked < 20
    assert output.startswith("loading ...\n")
    stopping = "stopping at step 0: SIGTERM; the same command goes on from there\nnext: go on\n"
    assert output.endswith(f"{stopping}  {shlex.join(command)}\n")
    assert '"status": "interrupted"' in (tmp_path / "x" / "status.json").read_text()


def catches_sigterm(pid):
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(lines["SigCgt"], 16) >> (signal.SIGTERM - 1) & 1


def test_a_stuck_disk_while_the_files_are_opened_does_not_keep_the_process(betons, tmp_path):
    for name in ("train_64.json", "val_64.beton", "val_64.json"):
        (tmp_path / name).symlink_to(betons / name)
    os.mkfifo(tmp_path / "train_64.beton")  # opening it waits for ever
    with Command(tmp_path, tmp_path / "runs", prepare=stop_sooner) as command:
        command.until(lambda: catches_sigterm(command.processes[0].pid))
        time.sleep(0.5)
        asked = time.monotonic()
        command.processes[0].terminate()
        assert command.end() == 3
        assert time.monotonic() - asked < STOP_SECONDS + 2


def test_a_stuck_disk_while_a_checkpoint_is_written_costs_only_its_steps(betons, tmp_path):
    partial = tmp_path / "small" / checkpoint.PARTIAL
    partial.parent.mkdir()
    os.mkfifo(partial)
    with Command(betons, tmp_path, prepare=stop_sooner, logging__checkpoint_steps=1) as command:
        command.until(lambda: "epoch 1/" in command.output())
        asked = time.monotonic()
        command.processes[0].terminate()
        assert command.end() == 3
        assert time.monotonic() - asked < STOP_SECONDS + 2
    assert "could not be written (the disk is too slow); the steps since the one before it" in command.output()
    assert command.status()["status"] == "interrupted"
    partial.unlink()
    with Command(betons, tmp_path) as command:
        assert command.end() == 0
    assert [row["epoch"] for row in read_rows(tmp_path / "small" / "log.jsonl")] == [0, 1, 2]


def test_a_signal_during_an_evaluation_ends_it_and_costs_no_step(betons, tmp_path):
    with Command(betons, tmp_path, prepare=evaluate_slowly, validation__batch_size=1) as command:
        command.until(command.has_checkpoint)  # made before the evaluation, which takes 20 s
        time.sleep(1)
        asked = time.monotonic()
        command.processes[0].terminate()
        assert command.end() == 3
        assert time.monotonic() - asked < 5
    assert command.status()["step"] == 10
    assert checkpoint.load(tmp_path / "small" / "last.pt")["step"] == 10
    assert not read_rows(tmp_path / "small" / "log.jsonl")
    with Command(betons, tmp_path) as command:
        assert command.end() == 0
    assert "resuming" in command.output()
    assert "after epoch 0 of 3 and 10 steps" in command.output()
    assert [row["step"] for row in read_rows(tmp_path / "small" / "log.jsonl")] == [10, 20, 30]


def lose_the_third_step():
    criterion, calls = losses.cross_entropy, []

    def spoiled(*args, **kwargs):
        calls.append(None)
        return criterion(*args, **kwargs) * (float("nan") if len(calls) == 5 else 1)  # two calls a step

    losses.cross_entropy = spoiled


def lose_the_third_step_and_evaluate_slowly():
    lose_the_third_step()
    evaluate_slowly()


def test_a_step_with_a_loss_of_nan_is_left_out_and_counted_also_by_who_resumes_in_the_evaluation(betons, tmp_path):
    with Command(betons, tmp_path / "whole", prepare=lose_the_third_step) as command:
        assert command.end() == 0, command.output()
    expected = chaos.outcome(command.folder, epochs=3)
    assert [row["skipped_steps"] for row in expected[1]] == [1, 0, 0]
    assert "1 step of it was left out" in command.output()
    slowly = {"prepare": lose_the_third_step_and_evaluate_slowly, "validation__batch_size": 1}
    with Command(betons, tmp_path / "parts", **slowly) as command:
        command.until(command.has_checkpoint)
        command.processes[0].terminate()
        assert command.end() == 3
    with Command(betons, tmp_path / "parts") as command:
        assert command.end() == 0, command.output()
    assert chaos.compare(chaos.outcome(command.folder, epochs=3), expected) == "identical"


def test_a_spot_notice_that_is_there_before_the_first_step_is_heeded(betons, tmp_path):
    with Metadata() as metadata:
        metadata.notice = {"action": "terminate", "time": "2030-01-02T03:04:05Z"}
        environment = {"AWS_EC2_METADATA_DISABLED": "", "AWS_EC2_METADATA_SERVICE_ENDPOINT": metadata.url}
        with Command(betons, tmp_path, environment=environment) as command:
            assert command.end() == 3
    status = command.status()
    assert (status["status"], status["step"]) == ("interrupted", 0)
    assert "EC2 spot notice (terminate at 2030-01-02T03:04:05Z)" in status["reason"]


def give_up_soon():
    setup = distributed.setup
    distributed.setup = lambda device, timeout: setup(device, timeout=3)


@pytest.mark.parametrize("trouble", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_hangs_ends_the_others_with_one_line(betons, tmp_path, trouble):
    with Command(betons, tmp_path, ranks=2, prepare=give_up_soon, training__epochs=2000) as command:
        command.until(command.has_checkpoint)
        os.kill(command.processes[1].pid, trouble)
        assert command.end(within=20) == 1
    (line,) = [line for line in command.output().splitlines() if line.startswith(("error", "Traceback"))]
    assert line.startswith("error: rank 0 lost contact with another rank")
    assert "repeat the command" in line
    assert command.status()["status"] == "failed"


def stop_every_seven_steps():
    count = progress.Progress.count_step

    def count_step(self, **counts):
        count(self, **counts)
        if self.step % 7 == 0 and os.environ.get("RANK", "0") == "0":
            interruption.request_stop("seven steps")

    progress.Progress.count_step = count_step


@pytest.mark.parametrize(("order", "ranks"), [("random", 2), ("page", 1)])
def test_either_order_goes_on_at_any_step(betons, tmp_path, order, ranks):
    """tests/chaos.py has page-aware order with two ranks and random order with one."""
    with Command(betons, tmp_path / "whole", ranks=ranks, data__order=order) as command:
        assert command.end() == 0, command.output()
    expected = chaos.outcome(command.folder, epochs=3)
    stops = 0
    while stops == 0 or command.status()["status"] == "interrupted":
        with Command(
            betons, tmp_path / "parts", ranks=ranks, data__order=order, prepare=stop_every_seven_steps
        ) as command:
            assert command.end() == (0 if ranks > 1 else 3) or command.status()["status"] == "finished"
        stops += 1
    assert stops == 5  # after 7, 14, 21 and 28 of 30 steps
    assert chaos.compare(chaos.outcome(command.folder, epochs=3), expected) == "identical"


def have_little_memory():
    """For a file of many pages, whose two orders differ."""
    found = loaders.find_rungs

    def find_rungs(*split):
        rungs = found(*split)
        for info in rungs.values():
            info.page_size = 1 << 13
        return rungs

    loaders.memory_bytes, loaders.find_rungs = (lambda: 1), find_rungs


def test_an_epoch_ends_in_the_order_that_it_was_begun_in_on_a_machine_with_less_memory(betons, tmp_path):
    flags = {"training__epochs": 1, "lr__warmup_epochs": 0}
    with Command(betons, tmp_path / "whole", **flags) as command:
        assert command.end() == 0, command.output()
    expected = chaos.outcome(command.folder, epochs=1)
    with Command(betons, tmp_path / "parts", prepare=stop_every_seven_steps, **flags) as command:
        assert command.end() == 3
    with Command(betons, tmp_path / "parts", prepare=have_little_memory, **flags) as command:
        assert command.end() == 0, command.output()
    assert "page order" in command.output()  # of a new epoch
    assert chaos.compare(chaos.outcome(command.folder, epochs=1), expected) == "identical"


def stall():
    beton_loader._Iterator.run_pipeline = lambda self, *args: time.sleep(1000)
    beton_loader.STOP_PATIENCE = 0.5


def test_data_that_does_not_come_is_one_line(betons, tmp_path):
    with Command(betons, tmp_path, prepare=stall, data__timeout_minutes=0.02) as command:
        assert command.end() == 1
    (line,) = [line for line in command.output().splitlines() if line.startswith(("error", "Traceback"))]
    assert "no batch from" in line
    assert "data.timeout_minutes" in line


def give_the_first_resolution_only():
    """As in a public run, which trained all of its epochs at 160 px while its log said 192 and 224."""
    batches = beton_loader.BetonLoader.batches
    beton_loader.BetonLoader.batches = lambda self, samples, resolution, **options: batches(
        self, samples, 32, **options
    )


def test_pictures_of_another_size_than_planned_end_the_run(betons, tmp_path):
    flags = {"training__epochs": 4, "resolution__end": 48, "resolution__multiple": 16, "resolution__start_ramp": 1}
    with Command(betons, tmp_path, prepare=give_the_first_resolution_only, resolution__end_ramp=2, **flags) as command:
        assert command.end() == 1
    (line,) = [line for line in command.output().splitlines() if line.startswith(("error", "Traceback"))]
    planned, given = "48 px channels_last float32 for epoch 3", "was given 32 px channels_last float32"
    assert planned in line
    assert given in line
    rows = read_rows(command.folder / "log.jsonl")
    assert [row["first_batch"] for row in rows] == 2 * [
        {"resolution": 32, "layout": "channels_last", "dtype": "float32"}
    ]
    assert command.status()["status"] == "failed"
