"""The notebook runs from its first cell to its last, and what it keeps is of these cells and of no photograph."""

import os
import re
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import nbformat
import pytest

from notebooks import execute
from rn50.data.textures import CLASSES
from tests.conftest import ROOT

SHORT = ["--quick", "--model.arch=resnet18", "--resolution.start=32", "--resolution.end=48"]
SHORT += ["--validation.resolutions=48,64", "--validation.headline_resolution=64"]


@pytest.fixture
def notebook():
    return nbformat.read(execute.NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def committed():
    """{id of a cell: the cell}"""
    return {cell["id"]: cell for cell in nbformat.read(execute.NOTEBOOK, as_version=4).cells}


def code_of(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shorten(notebook, work, data):
    """Edit the notebook: little of `data`, in the folder `work`, for two small epochs."""
    edits = {
        'DATA = "imagenette" if torch.cuda.is_available() else "textures"': f'DATA = "{data}"',
        "CHANGES = []": f"CHANGES = {SHORT}",
        'Path("data/notebook")': f"Path({str(work)!r})",
        "--train-per-class=200": "--train-per-class=20",
        "--val-per-class=50": "--val-per-class=10",
        '{SIDES[DATA]}"': '{SIDES[DATA]}", "--source.subset=300"',
    }
    for old, new in edits.items():
        (cell,) = [cell for cell in code_of(notebook) if old in cell.source]
        cell.source = cell.source.replace(old, new)


def texts(cell):
    return "".join(output.get("text", "") for output in cell.outputs)


def kinds(cell):
    """What a cell shows: {"stdout", "image/png", ...}"""
    shown = [
        [output.name] if output.output_type == "stream" else list(output.get("data", {})) for output in cell.outputs
    ]
    return {kind for output in shown for kind in output}


def test_imagenette_runs_from_the_first_cell_to_the_last(notebook, committed, textures, tmp_path, monkeypatch):
    monkeypatch.setenv("IMAGENETTE_DIR", os.environ.get("IMAGENETTE_DIR") or str(textures))
    shorten(notebook, tmp_path, "imagenette")
    execute.execute(notebook)
    cells = {cell["id"]: cell for cell in code_of(notebook)}
    assert "resnet18" in texts(cells["train-it"])
    assert re.search(r"epoch 2/2 · 48 px", texts(cells["train-it"]))
    assert "<- headline" in texts(cells["evaluate-it"])
    work = tmp_path / "imagenette"
    assert (work / "curves.png").stat().st_size > 10_000
    assert (work / "model" / "model.onnx").exists()
    for name, cell in cells.items():
        if name != "get-images":  # prints nothing where the images are there
            assert kinds(cell) == kinds(committed[name]), name


def test_textures_run_until_they_are_trained(notebook, tmp_path, monkeypatch):
    monkeypatch.delenv("IMAGENETTE_DIR", raising=False)
    shorten(notebook, tmp_path, "textures")
    names = [cell["id"] for cell in notebook.cells]
    notebook.cells = notebook.cells[: names.index("train-it") + 1]
    execute.execute(notebook)
    assert re.search(r"epoch 2/2 · 48 px", texts(notebook.cells[-1]))
    assert ", ".join(CLASSES) in "".join(texts(cell) for cell in code_of(notebook))


def test_committed_outputs_are_of_a_whole_run_on_textures(committed):
    cells = [cell for cell in committed.values() if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert texts(committed["settings"]).startswith("textures, run recipe")
    assert ", ".join(CLASSES) in texts(committed["read-betons"])
    pictures = [name for name, cell in committed.items() if cell.cell_type == "code" and "image/png" in kinds(cell)]
    assert pictures == ["show-classes", "show-crops", "show-curves", "predict", "show-confusion", "show-maps"]
    assert execute.NOTEBOOK.stat().st_size < 600_000


def test_the_network_that_the_committed_outputs_show_works(committed):
    top1, images = re.search(r"top-1 ([\d.]+) % of (\d+) images", texts(committed["show-confusion"])).groups()
    assert float(top1) >= 95
    assert int(images) == 500


def test_committed_outputs_have_no_errors_warnings_machines_or_times_of_day(committed):
    for name, cell in committed.items():
        assert set(cell.metadata) <= {"tags"}, name
        if cell.cell_type == "code":
            assert not {output.output_type for output in cell.outputs} & {"error"}, name
            assert "stderr" not in kinds(cell), name
            found = re.search(r"(?i)warning|traceback|\x1b|/(home|root|tmp|work|content|usr)/|\b\d\d:\d\d", texts(cell))
            assert not found, (name, found)


def test_photographs_are_never_kept(monkeypatch, notebook, tmp_path):
    """execute.py writes nothing where a run was not of textures."""
    path = tmp_path / "kept.ipynb"
    path.write_bytes(execute.NOTEBOOK.read_bytes())
    monkeypatch.setattr(execute, "NOTEBOOK", path)
    monkeypatch.setattr(execute, "ROOT", tmp_path)

    def of_imagenette(notebook):
        for cell in code_of(notebook):
            cell.outputs = [nbformat.v4.new_output("stream", text="imagenette, run recipe, with a GPU\n")]

    monkeypatch.setattr(execute, "execute", of_imagenette)
    with pytest.raises(SystemExit, match="nothing was written"):
        execute.main()
    assert path.read_bytes() == execute.NOTEBOOK.read_bytes()


def test_on_colab_it_clones_and_leaves_torch_as_it_is(committed, monkeypatch, tmp_path):
    """pip builds in isolation there: Colab has setuptools 75.2, which does not read pyproject.toml's `license`."""
    commands = []

    def run(*command):
        commands.append([str(word) for word in command])
        if command[0] == "git":
            Path(command[-1]).mkdir()
            (Path(command[-1]) / "train_imagenet.py").touch()

    monkeypatch.setitem(sys.modules, "google.colab", ModuleType("google.colab"))
    monkeypatch.chdir(tmp_path)
    names = {"run": run, "sys": sys, "os": os, "Path": Path, "PYTHON": "python"}
    for _ in range(2):  # repeating the cell clones nothing
        exec(committed["install"].source, names)
    clone, update, apt, pip, *again = commands
    assert clone == ["git", "clone", "--depth=1", names["REPOSITORY"], "rn50"]
    assert update == ["apt-get", "update"]
    assert {"pkg-config", "libopencv-dev", "libturbojpeg0-dev"} <= set(apt)
    assert {f"torch=={version('torch')}", f"torchvision=={version('torchvision')}", "ffcv", ".[export]"} <= set(pip)
    assert "--no-build-isolation" not in pip
    assert again == [update, apt, pip]
    assert Path.cwd() == tmp_path / "rn50"


def test_badge_and_links_lead_somewhere(committed):
    text = "\n".join(cell.source for cell in committed.values() if cell.cell_type == "markdown")
    links = re.findall(r"\]\(([^)#]+)", text)
    repository = re.search(r'REPOSITORY = "https://github.com/([\w/-]+)"', committed["install"].source)[1]
    assert f"https://colab.research.google.com/github/{repository}/blob/main/notebooks/01_pipeline_test.ipynb" in links
    local = [link for link in links if "://" not in link]
    assert len(local) >= 4
    for link in local:
        assert (ROOT / "notebooks" / link).exists(), link


def test_it_asks_for_no_input(committed):
    assert not any("input(" in cell.source for cell in committed.values())
