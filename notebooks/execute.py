"""Run the notebook on textures, which may be published, and keep what it shows: .venv/bin/python notebooks/execute.py

The folder data/notebook/textures is made anew. Photographs must not be committed: nothing is written where the notebook
chose Imagenette. Needs the packages of the tests (tools/setup.sh).
"""

import base64
import re
import shutil
from io import BytesIO
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

NOTEBOOK = Path(__file__).resolve().parent / "01_pipeline_test.ipynb"
ROOT = NOTEBOOK.parent.parent
# What is of this machine and this day: the repository's folder, and when a run ends.
PASSING = re.compile(rf"{re.escape(str(ROOT))}/| · ends [A-Z]\w\w \d\d:\d\d")


def main():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    shutil.rmtree(ROOT / "data/notebook/textures", ignore_errors=True)
    execute(notebook)
    if "textures, run recipe" not in "".join(output.get("text", "") for output in outputs(notebook)):
        raise SystemExit('error: set DATA = "textures" and CHANGES = [] first; nothing was written')
    for output in outputs(notebook):
        if "text" in output:
            output["text"] = PASSING.sub("", output["text"])
        if "image/png" in output.get("data", {}):
            output["data"]["image/png"] = small_png(output["data"]["image/png"])
    nbformat.write(notebook, NOTEBOOK)
    print(f"wrote {NOTEBOOK.name}: {NOTEBOOK.stat().st_size / 1000:.0f} KB")


def execute(notebook):
    """Run all cells, from the notebook's own folder as Jupyter does; raises nbclient's CellExecutionError."""
    folder = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, timeout=None, resources=folder, record_timing=False, coalesce_streams=True).execute()


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def small_png(encoded):
    """The same picture in 256 colours; base64 text, as notebooks have it."""
    picture = Image.open(BytesIO(base64.b64decode(encoded))).convert("RGB").quantize(256)
    file = BytesIO()
    picture.save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


if __name__ == "__main__":
    main()
