"""Who may import whom (docs/architecture.md), read off the source, and that planning and cloud load no torch."""

import ast
import subprocess
import sys

import pytest

from tests.conftest import ROOT

WINGS = ("data", "training", "planning", "cloud", "publishing")
FORBIDDEN = {"": WINGS, "data": ("training", "planning", "cloud", "publishing")}
FORBIDDEN |= {"planning": ("training", "data", "cloud", "publishing")}
FORBIDDEN |= {"cloud": ("training", "data", "planning", "publishing")}
MODULES = sorted((ROOT / "rn50").rglob("*.py"))


def imported(path):
    """The rn50 modules that a file imports, anywhere in it, as dotted names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rn50":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "rn50")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_floor_imports_no_wing_and_a_wing_no_other(path):
    wing = path.parent.name if path.parent.name in WINGS else ""
    for name in imported(path):
        assert name.split(".")[1] not in FORBIDDEN.get(wing, ()), name


def test_planning_and_cloud_load_no_torch():
    names = [
        f"rn50.{wing}.{path.stem}"
        for wing in ("planning", "cloud")
        for path in (ROOT / "rn50" / wing).glob("[a-z]*.py")
    ]
    code = f"import importlib, sys; [importlib.import_module(name) for name in {names}]; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=100)
    assert done.stdout == "False\n", done.stderr
    assert len(names) >= 5
