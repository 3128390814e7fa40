"""A small image set and its betons, made once for all tests that read some."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rn50.textures import write_textures

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def textures(tmp_path_factory):
    """An ImageFolder tree: 10 classes, 20 training and 11 validation JPEGs each."""
    tree = tmp_path_factory.mktemp("textures") / "tree"
    write_textures(tree, train_per_class=20, val_per_class=11)
    return tree


@pytest.fixture(scope="session")
def betons(textures, tmp_path_factory):
    """A folder with {train,val}_{64,96}.beton of `textures`."""
    folder = tmp_path_factory.mktemp("betons")
    command = [sys.executable, ROOT / "write_dataset.py", f"--source.dir={textures}", f"--out.dir={folder}"]
    subprocess.run([*command, "--out.resolutions=64,96"], check=True, capture_output=True, timeout=120)
    return folder


def pytest_sessionfinish(session, exitstatus):
    session.config.exit_status = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config):
    """End without the interpreter's clean-up: numba's threads have been seen to hang it for ever, as in errors.run."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(getattr(config, "exit_status", pytest.ExitCode.INTERNAL_ERROR))
