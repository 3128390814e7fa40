"""A small image set and its betons, made once for all tests that read some."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from torchvision import models

from rn50.data.textures import write_textures
from rn50.training import checkpoint
from tests import faults, tiny_model

ROOT = Path(__file__).resolve().parent.parent
# A shell puts programs in the background with Ctrl-C ignored; those that the tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """made_once(name, make): a folder that `make(folder)` has filled, once for all of pytest-xdist's processes."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base

    def made(name, make):
        folder, whole = base / name, base / f"{name}.made"
        with FileLock(base / f"{name}.lock"):
            if not whole.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                whole.touch()
        return folder

    return made


@pytest.fixture(scope="session")
def textures(made_once):
    """An ImageFolder tree: 10 classes, 20 training and 11 validation JPEGs each."""
    return (
        made_once("textures", lambda tree: write_textures(tree / "tree", train_per_class=20, val_per_class=11)) / "tree"
    )


@pytest.fixture(scope="session")
def betons(textures, made_once):
    """A folder with {train,val}_{64,96}.beton of `textures`."""

    def convert(folder):
        command = [sys.executable, ROOT / "write_dataset.py", f"--source.dir={textures}", f"--out.dir={folder}"]
        subprocess.run([*command, "--out.resolutions=64,96"], check=True, capture_output=True, timeout=120)

    return made_once("betons", convert)


@pytest.fixture(scope="session")
def tiny_checkpoint(textures, betons, made_once):
    """last.pt of a small network that knows the textures."""
    return made_once("tiny", lambda folder: tiny_model.train(betons, textures, folder)) / "tiny" / checkpoint.LAST


@pytest.fixture(scope="session")
def exported(tiny_checkpoint, textures, made_once):
    """(folder of the exported model, what the command said)."""

    def export(folder):
        pictures = [str(path) for path in sorted(textures.glob("val/*/0000.jpg"))[:4]]
        command = [sys.executable, ROOT / "tools/export_model.py", "--checkpoint", tiny_checkpoint]
        command += ["--out", folder / "model", "--images", textures]
        command += ["--examples", *pictures, "--examples-licence", "CC0 1.0, generated"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        (folder / "said").write_text(done.stdout)

    folder = made_once("exported", export)
    return folder / "model", (folder / "said").read_text()


@pytest.fixture(scope="session")
def app(exported, tmp_path_factory):
    """The running page."""
    if not tiny_model.APP_PYTHON.exists():
        pytest.skip("the Space's packages are not installed; run: bash tools/app.sh --install")
    running = tiny_model.App(exported[0], tmp_path_factory.mktemp("app"))
    yield running
    running.close()


@pytest.fixture
def small_network(monkeypatch):
    """In the place of ResNet-18, in this process: processors are slow in half precision."""
    monkeypatch.setattr(models, "resnet18", models.resnet18)  # put back afterwards
    faults.use_small_network()


# Files of more than a minute, longest first: pytest-xdist gives a process whole files, so the last should be short.
LONG = ["test_train_imagenet", "test_decode_tools", "test_write_dataset", "test_chaos", "test_app", "test_notebook"]
LONG += ["test_instance", "test_readme", "test_budget", "test_perturbed_runs", "test_compile", "test_plan_run"]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


def pytest_sessionfinish(session, exitstatus):
    session.config.exit_status = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config):
    """End without the interpreter's clean-up: numba's threads have been seen to hang it for ever, as in command.run."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(getattr(config, "exit_status", pytest.ExitCode.INTERNAL_ERROR))
