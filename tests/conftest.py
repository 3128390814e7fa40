"""A small image set and its betons, made once for all tests that read some."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rn50.data.textures import write_textures
from tests import tiny_model

ROOT = Path(__file__).resolve().parent.parent
# A shell puts programs in the background with Ctrl-C ignored; those that the tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


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


@pytest.fixture(scope="session")
def tiny_checkpoint(textures, betons, tmp_path_factory):
    """last.pt of a small network that knows the textures."""
    return tiny_model.train(betons, textures, tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def exported(tiny_checkpoint, textures, tmp_path_factory):
    """(folder of the exported model, what the command said)."""
    out = tmp_path_factory.mktemp("exported") / "model"
    pictures = [str(path) for path in sorted(textures.glob("val/*/0000.jpg"))[:4]]
    command = [sys.executable, ROOT / "tools/export_model.py", "--checkpoint", tiny_checkpoint, "--out", out]
    command += ["--images", textures, "--examples", *pictures, "--examples-licence", "CC0 1.0, generated"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


@pytest.fixture(scope="session")
def app(exported, tmp_path_factory):
    """The running page."""
    if not tiny_model.APP_PYTHON.exists():
        pytest.skip("the Space's packages are not installed; run: bash tools/app.sh --install")
    running = tiny_model.App(exported[0], tmp_path_factory.mktemp("app"))
    yield running
    running.close()


def pytest_collection_modifyitems(items):
    """What pytest-xdist must give to one process: a file, and all that shares the exported network."""
    for item in items:
        shared = {"tiny_checkpoint", "exported", "app"} & set(item.fixturenames)
        item.add_marker(pytest.mark.xdist_group("the page" if shared else item.path.name))


def pytest_sessionfinish(session, exitstatus):
    session.config.exit_status = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config):
    """End without the interpreter's clean-up: numba's threads have been seen to hang it for ever, as in command.run."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(getattr(config, "exit_status", pytest.ExitCode.INTERNAL_ERROR))
