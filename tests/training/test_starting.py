"""How a training begins: what is left over of torchrun, and one run folder for one command."""

import errno
import fcntl
import json
import os
import signal
import socket
import time
from multiprocessing.connection import wait

import pytest

from rn50.errors import RunError, UsageError
from rn50.files import read_rows
from rn50.training import distributed, progress, run_folder
from rn50.training.run_folder import Claim, recorded
from tests import faults
from tests.commands import Command

WHOLE = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def errors(command, rank=0):
    return [line for line in command.output(rank).splitlines() if line.startswith(("error", "Traceback"))]


# --- What is left over of torchrun -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"RANK": "3"}, "RANK=3 is set, but WORLD_SIZE, MASTER_ADDR, MASTER_PORT are missing: unset RANK to train"),
        ({"RANK": "0", "WORLD_SIZE": "4"}, "RANK=0, WORLD_SIZE=4 are set, but MASTER_ADDR, MASTER_PORT are missing"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set, but RANK, MASTER_ADDR, MASTER_PORT are missing"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK=1 is set, but RANK, WORLD_SIZE"),
        ({"LOCAL_WORLD_SIZE": "8"}, "LOCAL_WORLD_SIZE=8 is set, but RANK"),
        ({"RANK": ""}, "RANK= is set, but RANK, WORLD_SIZE"),
        (WHOLE | {"MASTER_ADDR": ""}, "MASTER_ADDR is missing"),
        (WHOLE | {"RANK": "abc"}, "RANK must be a whole number"),
        (WHOLE | {"RANK": "-1"}, "RANK must be a whole number"),
        (WHOLE | {"RANK": "5"}, "RANK must be less than WORLD_SIZE"),
        (WHOLE | {"WORLD_SIZE": "0"}, "RANK must be less than WORLD_SIZE"),
        (WHOLE | {"LOCAL_RANK": "2"}, "LOCAL_RANK must be less than WORLD_SIZE"),
        (WHOLE | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK must be less than LOCAL_WORLD_SIZE"),
        (WHOLE | {"MASTER_PORT": "65536"}, "MASTER_PORT must be a port"),
    ],
)  # fmt: skip
def test_half_of_torchruns_variables_is_refused_and_named(monkeypatch, given, words):
    set_only(monkeypatch, given)
    with pytest.raises(UsageError) as refusal:
        distributed.check_environment()
    assert words in str(refusal.value)
    for name in given:
        assert name in str(refusal.value).split("unset ")[1].split(" to train alone")[0]


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"MASTER_ADDR": "a", "MASTER_PORT": "1"},  # as many scripts for SLURM set them for all that follows
        {"WORLD_SIZE": "1", "LOCAL_RANK": "0"},
        {"SLURM_PROCID": "3", "SLURM_NTASKS": "4"},
        WHOLE,  # one process a machine, as PyTorchJob of Kubernetes starts them
        WHOLE | {"LOCAL_RANK": "1", "RANK": "1"},
        WHOLE | {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"},
    ],
)
def test_what_torchrun_sets_and_what_changes_nothing_is_taken(monkeypatch, given):
    set_only(monkeypatch, given)
    distributed.check_environment()


def set_only(monkeypatch, given):
    for name in distributed.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)


def test_a_rank_alone_ends_before_anything_is_written(betons, tmp_path):
    with Command(betons, tmp_path, environment={"RANK": "3"}) as command:
        assert command.end() == 2
    (line,) = errors(command)
    assert line.startswith("error: RANK=3 is set, but WORLD_SIZE, MASTER_ADDR, MASTER_PORT are missing")
    assert not command.folder.exists()


def wait_briefly():
    distributed.JOIN_SECONDS, distributed.QUIET_SECONDS = 1.5, 0.3


@pytest.mark.parametrize(
    ("rank", "whom"),
    [("0", "1 of 2 ranks (rank 1)"), ("1", "rank 0 (Connection refused)"), ("1", "an answer of rank 0")],
)
def test_who_waits_for_a_rank_that_never_comes_says_so_and_ends(betons, tmp_path, rank, whom):
    left_over = WHOLE | {"RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": str(faults.free_port())}
    with socket.socket() as other:
        if "answer" in whom:  # a program that is none of torch's
            other.bind(("127.0.0.1", int(left_over["MASTER_PORT"])))
            other.listen()
        with Command(betons, tmp_path, environment=left_over, prepare=wait_briefly) as command:
            assert command.end(within=30) == 1
    waiting = [line for line in command.output().splitlines() if line.startswith("waiting for ")]
    assert len(waiting) == 1
    where = f"at 127.0.0.1:{left_over['MASTER_PORT']}"
    assert f"waiting for {whom} {where}, because {'WORLD_SIZE=2' if rank == '0' else 'RANK=1'} is set in" in waiting[0]
    (line,) = errors(command)
    assert where in line
    assert "unset RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT to train alone, or start with torchrun" in line


def say_soon():
    distributed.QUIET_SECONDS = 0.3


def test_a_rank_that_comes_late_is_waited_for_and_a_stop_meanwhile_is_heeded(betons, tmp_path):
    both = WHOLE | {"LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": str(faults.free_port())}
    with Command(betons, tmp_path, environment=both, prepare=say_soon) as first:
        first.until(lambda: "waiting for 1 of 2 ranks (rank 1)" in first.output())
        asked = time.monotonic()
        first.processes[0].terminate()
        assert first.end() == 0  # as torchrun must see it
        assert time.monotonic() - asked < 5
    flags = {"training__epochs": 2, "environment": both, "prepare": say_soon}
    with Command(betons, tmp_path, **flags) as first:
        first.until(lambda: "waiting for 1 of 2 ranks (rank 1)" in first.output())
        with Command(betons, tmp_path, **flags | {"environment": both | {"RANK": "1"}}) as second:
            assert (first.end(), second.end()) == (0, 0), first.output() + second.output()
    assert "10 x 2 ranks" in first.output()
    assert first.status()["status"] == "finished"


def test_a_port_that_is_taken_is_one_line(monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        set_only(monkeypatch, WHOLE | {"MASTER_PORT": str(other.getsockname()[1])})
        with pytest.raises(RunError, match=r"rank 0 cannot meet the others at 127.0.0.1:\d+ \(.*in use\)"):
            distributed._meet(0, 2)


# --- One run folder for one command ----------------------------------------------------------------------------------


def picture(folder):
    """All there is of a run folder, and when it was written."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def refuse_soon():
    run_folder.LOCK_SECONDS = 0.2


LONG = {"training__epochs": 2000}


@pytest.fixture(scope="module")
def running(betons, tmp_path_factory):
    """A training that has a checkpoint, stopped by SIGSTOP while others try; it must be able to go on after them."""
    with Command(betons, tmp_path_factory.mktemp("taken"), **LONG) as command:
        command.until(lambda: (command.folder / "previous.pt").exists())
        os.kill(command.processes[0].pid, signal.SIGSTOP)
        time.sleep(0.1)
        yield command
        epochs = len(read_rows(command.folder / "log.jsonl"))
        os.kill(command.processes[0].pid, signal.SIGCONT)
        command.until(lambda: len(read_rows(command.folder / "log.jsonl")) > epochs)
        command.processes[0].terminate()
        assert command.end() == 3, command.output()
        assert command.status()["status"] == "interrupted"


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_same_command_a_second_time_ends_and_touches_nothing(running, betons, ranks):
    before = picture(running.folder)
    began = time.monotonic()
    with Command(betons, running.folder.parent, **LONG, ranks=ranks, prepare=refuse_soon) as second:
        assert second.end(within=30) == 1
        for process in second.processes:
            process.join(5)
            assert process.exitcode == 1
    assert time.monotonic() - began < 20
    for rank in range(ranks):
        (line,) = errors(second, rank)
        holder = f"process {running.processes[0].pid} on {socket.gethostname()}"
        assert f"{running.folder} is in use: {holder} trains into it" in line
        assert "logging.run_name" in line
    assert picture(running.folder) == before


def test_an_evaluation_beside_it_goes_on(running, betons):
    before = picture(running.folder)
    with Command(betons, running.folder.parent, **LONG, training__eval_only="true") as command:
        assert command.end() == 0, command.output()
    assert "<- headline" in command.output()
    assert picture(running.folder) == before


def test_of_two_that_begin_a_run_at_once_one_ends(betons, tmp_path):
    flags = {"prepare": refuse_soon, **LONG}
    with Command(betons, tmp_path, **flags) as one, Command(betons, tmp_path, **flags) as other:
        first, second = (command.processes[0] for command in (one, other))
        wait([first.sentinel, second.sentinel], timeout=60)
        loser, winner = (one, other) if other.processes[0].is_alive() else (other, one)
        assert loser.end() == 1
        assert "is in use: process" in errors(loser)[0]
        winner.until(winner.has_checkpoint)
        winner.processes[0].terminate()
        assert winner.end() == 3, winner.output()
    assert winner.status()["status"] == "interrupted"


def leave_a_child():
    """As a library may that forks: the child has all descriptors of the run, and outlives it."""
    count = progress.Progress.count_step

    def count_step(self, **counts):
        count(self, **counts)
        if self.step == 1 and os.fork() == 0:
            (child := open(f"{os.environ['CHILD']}", "w")).write(str(os.getpid()))  # noqa: SIM115
            child.close()
            time.sleep(120)
            os._exit(0)

    progress.Progress.count_step = count_step


def test_after_kill_9_the_same_command_goes_on_at_once_even_if_a_child_is_left(betons, tmp_path):
    environment = {"CHILD": str(tmp_path / "child")}
    try:
        with Command(betons, tmp_path, prepare=leave_a_child, environment=environment) as command:
            command.until(command.has_checkpoint)
            command.processes[0].kill()
            command.processes[0].join()
        os.kill(int((tmp_path / "child").read_text()), 0)  # it is alive
        with Command(betons, tmp_path, prepare=refuse_soon) as command:
            assert command.end() == 0, command.output()
        assert "resuming" in command.output()
    finally:
        os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_a_file_system_has_no_locks_it_is_said(tmp_path, monkeypatch, error):
    """No such file system can be mounted here: lockf stands in for it."""

    def no_locks(*args):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    said = []
    claim = Claim(tmp_path, warn=said.append)
    claim.take()
    assert claim.held
    assert len(said) == 1
    assert f"cannot lock {tmp_path}" in said[0]
    assert os.strerror(error) in said[0]


def test_a_folder_that_another_command_has_keeps_its_status(tmp_path):
    (tmp_path / "status.json").write_text("{}")
    claim = Claim(tmp_path, warn=pytest.fail)
    for rank in (0, 1):
        with pytest.raises(RunError), recorded(tmp_path, progress.Progress(), rank=rank, claim=claim):
            raise RunError("taken")
        assert (tmp_path / "status.json").read_text() == "{}"
    claim.take()
    with pytest.raises(RunError), recorded(tmp_path, progress.Progress(), rank=0, claim=claim):
        raise RunError("no disk")
    assert json.loads((tmp_path / "status.json").read_text())["reason"] == "no disk"


# --- What is read at a resume ----------------------------------------------------------------------------------------


def test_a_log_that_was_torn_in_the_middle_comes_back_whole_from_the_checkpoint(betons, tmp_path):
    with Command(betons, tmp_path) as command:
        assert command.end() == 0, command.output()
    log = command.folder / "log.jsonl"
    whole = log.read_text()
    first, second, third = whole.splitlines(keepends=True)
    log.write_text(first + second[:50] + "\n" + third)
    with pytest.raises(RunError, match=r"log.jsonl, line 2: not valid JSON"):
        read_rows(log)
    with Command(betons, tmp_path) as command:
        assert command.end() == 0, command.output()
    assert log.read_text() == whole
