"""Commands whose stdin, stdout or stderr is closed, or a file on a full disk."""

import json
import os
import subprocess
import sys

import pytest

from rn50.data import beton
from rn50.files import sha256
from rn50.training import checkpoint
from tests.commands import SMALL, Command
from tests.conftest import ROOT

PROGRAM = """
import os, sys
from rn50.command import run
from rn50.errors import RunError

def main():
    data = open(sys.argv[2], "wb")
    print("printed")
    os.write(1, b"by a library\\n")
    os.write(2, b"also\\n")
    data.write(b"data")
    data.close()
    if sys.argv[1] == "error":
        raise RunError("what is wrong")
    if sys.argv[1] == "bug":
        raise OSError(28, os.strerror(28))

run(main)
"""


@pytest.fixture
def program(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)

    def run(how, redirections, **environment):
        """(exit status, stdout, stderr, what is in its file)"""
        words = f'exec "{sys.executable}" program.py {how} data {redirections}'
        environment = {**os.environ, "PYTHONPATH": str(ROOT)} | environment
        done = subprocess.run(["bash", "-c", words], cwd=tmp_path, env=environment, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr, (tmp_path / "data").read_bytes()

    return run


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-", "1</dev/null 2</dev/null"])
def test_a_closed_stream_loses_what_is_printed_and_nothing_else(program, closed):
    stdout = "" if closed[0] in "><1" else "printed\nby a library\n"
    status, printed, said, data = program("well", closed)
    assert (status, data) == (0, b"data")
    assert sorted(printed.splitlines()) == sorted(stdout.splitlines())
    assert said == ("" if "2" in closed else "also\n")
    status, _, said, _ = program("error", closed)
    assert status == 1
    assert said == ("" if "2" in closed else "also\nerror: what is wrong\n")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_for_stdout_is_one_line(program, unbuffered):
    status, _, said, _ = program("well", ">/dev/full", PYTHONUNBUFFERED=unbuffered)
    assert status == 1
    lines = [line for line in said.splitlines() if line != "also"]
    assert lines == ["error: stdout cannot be written: No space left on device"]


def test_a_name_that_is_no_text_can_be_printed(program, tmp_path):
    text = (tmp_path / "program.py").read_text().replace('print("printed")', 'print("skipped \\udcff.jpg")')
    (tmp_path / "program.py").write_text(text)
    status, printed, _, _ = program("well", "", PYTHONIOENCODING="utf-8:strict", LC_ALL="C.UTF-8")
    assert (status, sorted(printed.splitlines())[1]) == (0, "skipped \\udcff.jpg")


def test_a_full_disk_for_stderr_leaves_the_status(program):
    assert program("error", "2>/dev/full")[0] == 1
    assert program("well", "2>/dev/full >/dev/full")[0] == 1


def test_another_full_disk_is_not_taken_for_it(program):
    status, _, said, _ = program("bug", "")
    assert status == 1
    assert "Traceback" in said


def test_the_scripts_work_without_any_stream(betons, textures, tmp_path):
    flags = [f"--source.dir={textures}", f"--out.dir={tmp_path}", "--out.resolutions=64", "--source.subset=8"]
    words = f'exec "{sys.executable}" {ROOT}/write_dataset.py {" ".join(flags)} --source.splits=val <&- >&- 2>&-'
    assert subprocess.run(["bash", "-c", words], timeout=120).returncode == 0
    info = beton.read_info(tmp_path / "val_64.beton")
    assert info.num_samples == 8
    assert sha256(info.path) == info.manifest["beton"]["sha256"]
    settings = SMALL | {"data.dir": betons, "logging.folder": tmp_path, "training.epochs": 1, "lr.warmup_epochs": 0}
    flags = [f"--{name}={value}" for name, value in settings.items()]
    words = f'exec "{sys.executable}" {ROOT}/train_imagenet.py {" ".join(flags)} <&- >&- 2>&-'
    assert subprocess.run(["bash", "-c", words], timeout=120).returncode == 0
    assert json.loads((tmp_path / "small/status.json").read_text())["status"] == "finished"
    assert checkpoint.load(tmp_path / "small/last.pt")["step"] == 10


def print_to_a_full_disk():
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


def test_a_training_does_not_die_of_a_line_that_a_full_disk_refuses(betons, tmp_path):
    with Command(betons, tmp_path, prepare=print_to_a_full_disk) as command:
        assert command.end() == 0, command.output()
    (line,) = command.output().splitlines()
    assert line.startswith("warning: stdout cannot be written: No space left on device; training goes on")
    assert command.status()["status"] == "finished"
    # an evaluation is for what it prints
    with Command(betons, tmp_path, prepare=print_to_a_full_disk, training__eval_only="true") as command:
        assert command.end() == 1
    (line,) = command.output().splitlines()
    assert line == "error: stdout cannot be written: No space left on device"
