"""A checkpoint is whole or not there, whatever happens while it is written."""

import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch

from rn50 import checkpoint
from rn50.errors import RunError

WRITER = """
import sys, torch
from rn50 import checkpoint
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
