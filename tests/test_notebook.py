"""The notebook runs from its first cell to its last, in short mode."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import ROOT

PATH = ROOT / "notebooks" / "01_pipeline_test.ipynb"


def test_it_runs_in_short_mode(textures, tmp_path, monkeypatch):
    monkeypatch.setenv("IMAGENETTE_DIR", os.environ.get("IMAGENETTE_DIR") or str(textures))
    monkeypatch.setenv("RN50_NOTEBOOK_SHORT", "1")
    monkeypatch.setenv("RN50_NOTEBOOK_DIR", str(tmp_path))
    notebook = nbformat.read(PATH, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(PATH.parent)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "".join(output.get("text", "") for output in outputs)
    pictures = sum("image/png" in output.get("data", {}) for output in outputs)
    assert "epoch 3/3  48 px" in text
    assert "<- headline" in text
    assert pictures == 7
    assert (Path(tmp_path) / "curves.png").stat().st_size > 10_000
    assert (Path(tmp_path) / "model" / "model.onnx").exists()


def test_only_two_small_plots_are_committed_and_no_photographs():
    notebook = nbformat.read(PATH, as_version=4)
    nbformat.validate(notebook)
    kept = {cell["id"]: cell["outputs"] for cell in notebook.cells if cell.get("outputs")}
    assert set(kept) == {"cell-11", "cell-18"}  # curves and confusion matrix
    for (output,) in kept.values():
        assert list(output["data"]) == ["image/png"]
        assert len(output["data"]["image/png"]) < 60_000


def test_on_colab_pip_takes_the_setuptools_that_pyproject_asks_for():
    """Colab has 75.2, which does not read pyproject.toml's `license`."""
    assert "--no-build-isolation" not in PATH.read_text()


@pytest.mark.parametrize("folder", ["home", "work", "root"])
def test_it_names_no_machine(folder):
    assert f"/{folder}/" not in PATH.read_text()
