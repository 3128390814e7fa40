"""Every kind of fault once, through tests/chaos.py."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_fault_leaves_the_weights_and_the_log_of_an_undisturbed_run(ranks, tmp_path):
    command = [sys.executable, "-m", "tests.chaos", "--short", f"--ranks={ranks}", f"--out={tmp_path}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout + result.stderr
    table = (tmp_path / "README.md").read_text()
    assert table.count(" | identical |") == 14 + (ranks > 1)
    assert "| kill -9 while a checkpoint is mirrored" in table
