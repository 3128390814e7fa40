"""A checkpoint is whole or not there, whatever happens while it is written."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from rn50.errors import RunError, Stopped
from rn50.training import checkpoint, interruption
from studies.checkpoint import benchmark_checkpoint

WRITER = """
import sys, torch
from rn50.training import checkpoint
folder = sys.argv[1]
print("ready", flush=True)
for number in range(10**6):
    checkpoint.save(folder, {"number": number, "tensor": torch.full((1_000_000,), float(number))})
"""


def test_saved_state_comes_back(tmp_path):
    state = {"model": {"w": torch.arange(3.0)}, "step": 5, "config": {"a": {"b": [1, None, "x"]}}}
    checkpoint.save(tmp_path, state)
    back = checkpoint.newest(tmp_path, warn=pytest.fail)
    assert torch.equal(back["model"]["w"], state["model"]["w"])
    assert (back["step"], back["config"]) == (5, state["config"])


def test_no_checkpoint_is_none(tmp_path):
    assert checkpoint.newest(tmp_path, warn=pytest.fail) is None


@pytest.mark.parametrize("damage", ["truncate", "empty", "noise", "one bit"])
def test_a_damaged_newest_is_reported_and_the_one_before_it_used(tmp_path, damage):
    for number in (1, 2):
        checkpoint.save(tmp_path, {"number": number, "tensor": torch.full((1000,), float(number))})
    data = (tmp_path / "last.pt").read_bytes()
    flipped = bytearray(data)
    flipped[data.index(torch.full((1000,), 2.0).numpy().tobytes()) + 1234] ^= 1  # torch.load would not notice
    damaged = {"truncate": data[:-500], "empty": b"", "noise": b"x" * 5000, "one bit": bytes(flipped)}[damage]
    (tmp_path / "last.pt").write_bytes(damaged)
    warnings = []
    assert checkpoint.newest(tmp_path, warn=warnings.append)["number"] == 1
    assert len(warnings) == 1
    assert "last.pt" in warnings[0]
    # the good one is not replaced by the damaged one at the next save
    checkpoint.save(tmp_path, {"number": 3})
    assert [checkpoint.load(tmp_path / name)["number"] for name in ("previous.pt", "last.pt")] == [1, 3]


def test_nothing_readable_is_an_error_not_a_fresh_start(tmp_path):
    (tmp_path / "last.pt").write_bytes(b"")
    with pytest.raises(RunError, match="no checkpoint in"):
        checkpoint.newest(tmp_path, warn=lambda message: None)


def test_other_files_are_named_as_such(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "weights.pt")
    with pytest.raises(RunError, match="not a checkpoint of format"):
        checkpoint.load(tmp_path / "weights.pt")
    with pytest.raises(RunError, match="no checkpoint at"):
        checkpoint.load(tmp_path / "nowhere.pt")


def test_a_checkpoint_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/owned",)

    torch.save({"format": checkpoint.FORMAT, "x": Evil()}, tmp_path / "last.pt")
    with pytest.raises(RunError, match="cannot be read"):
        checkpoint.load(tmp_path / "last.pt")
    assert not (tmp_path / "owned").exists()


def test_kill_9_while_writing_leaves_a_readable_checkpoint(tmp_path):
    last = -1
    for delay in (0.11, 0.17, 0.23, 0.31, 0.37):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        writer.stdout.readline()
        while not (tmp_path / "last.pt").exists():
            time.sleep(0.01)
        time.sleep(delay)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        state = checkpoint.newest(tmp_path, warn=pytest.fail)
        assert (state["tensor"] == state["number"]).all()
        last = max(last, state["number"])
    assert last >= 0


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path):
    checkpoint.save(tmp_path, {"number": 1, "tensor": torch.zeros(10)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(RunError, match="cannot write a checkpoint"):
            checkpoint.save(tmp_path, {"number": 2, "tensor": torch.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)
    assert checkpoint.newest(tmp_path, warn=pytest.fail)["number"] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.pt"]


def test_the_writer_never_waits_and_a_newer_snapshot_replaces_one_that_waits(tmp_path, monkeypatch):
    saved, go = [], threading.Event()
    save = checkpoint.save

    def slow_disk(folder, state):
        go.wait(30)
        saved.append(state["step"])
        save(folder, state)

    monkeypatch.setattr(checkpoint, "save", slow_disk)
    writer, tensor = checkpoint.Writer(tmp_path, step=0, warn=pytest.fail), torch.zeros(4)
    assert not writer.due(1, steps=2, minutes=10)
    assert writer.due(2, steps=2, minutes=10)
    for step in (1, 2, 3, 4):
        tensor.fill_(step)
        writer.put({"step": step, "tensor": tensor})
        if step == 1:
            assert not writer.due(9, steps=1, minutes=10)  # the disk has not even begun
            time.sleep(0.1)
    tensor.fill_(99)  # training goes on while it is written
    go.set()
    writer.finish(30, required=True)
    assert saved == [1, 4]
    assert checkpoint.load(tmp_path / "last.pt")["tensor"].tolist() == [4.0] * 4
    assert writer.due(9, steps=1, minutes=10)


def test_a_full_disk_is_said_once_tried_again_and_never_damages_what_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "RETRY_SECONDS", 0.05)
    warnings, limits = [], resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = checkpoint.Writer(tmp_path, step=0, warn=warnings.append)
    state = {"tensor": torch.zeros(1_000_000)}
    writer.put({"step": 1, **state})
    writer.finish(30, required=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        writer.put({"step": 2, **state})
        while not warnings:
            time.sleep(0.01)
        time.sleep(0.3)  # several tries
        with pytest.raises(RunError, match=r"step 2 could not be written .*make room and repeat"):
            writer.finish(0.1, required=True)
        assert checkpoint.load(tmp_path / "last.pt")["step"] == 1
        assert len(warnings) == 1
        assert "training goes on, and this is tried again" in warnings[0]
        monkeypatch.setattr(interruption, "_asked", ("SIGTERM", time.monotonic() - 100))
        with pytest.raises(Stopped, match="SIGTERM"):  # not finished, although all steps are done
            writer.finish(1, required=True)
        monkeypatch.setattr(interruption, "_asked", None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    writer.finish(30, required=True)
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 2
    assert "are written to" in warnings[-1]


def test_the_benchmark_measures_what_a_checkpoint_costs(tmp_path, monkeypatch, capsys):
    out = tmp_path / "result.json"
    words = ["--rounds", "1", "--batch", "2", "--size", "32", "--folder", str(tmp_path), "--json", str(out)]
    monkeypatch.setattr(sys, "argv", ["benchmark_checkpoint.py", *words])
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    benchmark_checkpoint.main()
    result = json.loads(out.read_text())
    measured = result["measured"]
    assert 300 < measured["checkpoint_megabytes"] < 320
    assert 0 < measured["seconds_training_stands_still"] < measured["seconds_until_it_is_on_disk"]
    assert result["projected_for_a_gpu"]["seconds_training_stands_still"] == pytest.approx(0.1, abs=0.01)
    assert json.loads(capsys.readouterr().out) == result
    assert list(tmp_path.iterdir()) == [out]
