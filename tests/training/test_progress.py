"""What a run says while it goes: its last line on a terminal, the end that it expects, the time it waited for data."""

import contextlib
import io
import os
import select
import sys
import termios
import time
from types import SimpleNamespace

import pytest
import torch

from rn50.planning import budget
from rn50.training import progress
from rn50.training.progress import Console, Progress, Waiting, fitted, folded
from rn50.training.session import Session

PARTS = {
    "what": "epoch 3/80",
    "share": "12 %",
    "speed": "3,410 img/s",
    "loss": "loss 2.18",
    "money": "$1.24 of $25",
    "end": "ends Thu 08:40",
}


# --- The last line ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        (80, "epoch 3/80 · 12 % · 3,410 img/s · loss 2.18 · $1.24 of $25 · ends Thu 08:40"),
        (75, "epoch 3/80 · 12 % · 3,410 img/s · $1.24 of $25 · ends Thu 08:40"),
        (60, "epoch 3/80 · 12 % · $1.24 of $25 · ends Thu 08:40"),
        (45, "epoch 3/80 · $1.24 of $25 · ends Thu 08:40"),
        (40, "$1.24 of $25 · ends Thu 08:40"),
        (20, "$1.24 of $25 · ends"),
    ],
)
def test_where_the_terminal_is_narrow_the_money_and_the_end_stay(columns, line):
    assert fitted(PARTS, columns) == line


def test_a_wait_for_data_stays_longer_than_loss_and_speed():
    parts = PARTS | {"waits": "waits 12 %"}
    assert fitted(parts, 80) == "epoch 3/80 · 12 % · 3,410 img/s · $1.24 of $25 · ends Thu 08:40 · waits 12 %"
    assert fitted(parts, 60) == "epoch 3/80 · $1.24 of $25 · ends Thu 08:40 · waits 12 %"


def test_what_is_printed_for_good_is_folded():
    assert folded(["a" * 30, "b" * 30, "c" * 14]) == f"{'a' * 30} · {'b' * 30} · {'c' * 14}"
    assert folded(["a" * 30, "b" * 30, "c" * 15, "d"]) == f"{'a' * 30} · {'b' * 30}\n  {'c' * 15} · d"


def set_columns(terminal, columns):
    termios.tcsetwinsize(terminal, (24, columns))


@contextlib.contextmanager
def terminal(monkeypatch):
    """stderr is a terminal: gives a function that returns what it was sent since the last call."""
    ours, theirs = os.openpty()
    set_columns(theirs, 80)

    def sent():
        pieces = b""
        while select.select([ours], [], [], 0.3)[0]:  # the kernel passes it on in its own time
            pieces += os.read(ours, 65536)
        return pieces.decode()

    with open(theirs, "w") as stream, monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", stream)
        patched.setenv("TERM", "xterm")
        yield sent
    os.close(ours)


def test_the_line_renews_itself_at_the_windows_width_and_what_is_said_comes_above(monkeypatch):
    said, line = [], "epoch 3/80 · 12 % · 3,410 img/s · loss 2.18 · $1.24 of $25 · ends Thu 08:40"
    with terminal(monkeypatch) as sent:
        console = Console(write=said.append, shown=True)
        console.show(PARTS)
        assert sent() == f"{progress.ERASE}{line}\r"
        console.say("a warning")
        assert sent() == f"{progress.ERASE}\r{progress.ERASE}{line}\r"
        set_columns(sys.stderr.fileno(), 60)
        console.show(PARTS)
        assert sent() == f"{progress.ERASE}epoch 3/80 · 12 % · $1.24 of $25 · ends Thu 08:40\r"
        console.clear()
        console.say("the end")
        assert sent() == 3 * f"{progress.ERASE}\r"
    assert said == ["a warning", "the end"]


def test_without_a_terminal_the_line_is_printed_when_nothing_was_for_a_minute(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    now, said = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    console, other = Console(write=said.append, shown=True), Console(write=said.append, shown=False)
    for now[0], due in ((0.5, False), (59.0, True), (61.0, True), (61.5, False), (100.0, True), (122.0, True)):
        for each in (console, other):
            assert each.due() == due
            each.show(PARTS)
            each.clear()
        if now[0] == 100.0:
            console.say("a warning")
    assert said == [" · ".join(PARTS.values()), "a warning"]
    assert sys.stderr.getvalue() == ""


def test_the_first_step_of_an_epoch_says_nothing_of_the_rest():
    """It compiles, and takes as long as a thousand others."""
    config = {
        "training": {"epochs": 2},
        "resolution": {"start": 64, "end": 64, "start_ramp": 0, "end_ramp": 0, "multiple": 32},
        "validation": {"every": 5, "resolutions": [], "headline_resolution": 64, "headline_view": "single"},
    }
    done = Progress(epoch_steps=100)
    pace = budget.Pace(config=config, progress=done, images=100, validation_images=100)
    assert pace.seconds_to_finish() is None
    done.count_step(images=1, seconds=1000.0, cpu_seconds=0.0)
    pace.leave_out()
    assert pace.seconds_to_finish() is None
    for _ in range(9):
        done.count_step(images=1, seconds=1.0, cpu_seconds=0.0)
    assert pace.seconds_to_finish() == pytest.approx(90 + 100)
    done.rows.append({"epoch": 0, "resolution": 64, "train_seconds": 150.0, "val_seconds": 0.0})
    done.next_epoch()
    assert pace.seconds_to_finish() == pytest.approx(150)


def test_the_line_says_when_the_money_ends_where_that_comes_first():
    run = SimpleNamespace(pace=SimpleNamespace(seconds_to_finish=lambda: 600), guard=None)
    assert Session._end(run) == "ends in 10 min"
    run.guard = SimpleNamespace(seconds_left=lambda: 660)
    assert Session._end(run) == "ends in 10 min"
    run.guard = SimpleNamespace(seconds_left=lambda: 300)
    assert Session._end(run) == "money ends in 5 min"


# --- Waiting for data: on a CPU the time of the call, on a GPU the time that it had nothing to do --------------------


def test_on_a_cpu_it_is_the_time_of_the_call():
    waiting = Waiting(torch.device("cpu"))
    for _ in range(2):
        with waiting.for_data():
            time.sleep(0.02)
    assert 0.04 <= waiting.lap() < 1
    assert waiting.lap() == 0


def test_on_a_gpu_it_is_the_time_between_two_of_its_events(monkeypatch):
    """The host waits for three seconds; the GPU, which was two behind, for one."""
    clock, reached = iter([5.0, 6.0, 9.0, 9.0]), [7.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = next(clock)

        def query(self):
            return self.at <= reached[0]

        def elapsed_time(self, end):
            return 1000 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    waiting = Waiting(torch.device("cuda"))
    for _ in range(2):
        with waiting.for_data():
            pass
    assert waiting.lap() == 1
    reached[0] = 9.0
    assert (waiting.lap(), len(waiting._events)) == (0, 0)
