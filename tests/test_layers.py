"""Who may import whom: the contracts in pyproject.toml hold, and break where they should."""

import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT

LINT = "import sys; from importlinter.cli import lint_imports_command; lint_imports_command()"


def lint(root):
    """What import-linter says of the package in `root`."""
    return subprocess.run(
        [sys.executable, "-c", LINT],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=100,
        env={"PYTHONPATH": str(root)},
    )


def test_the_contracts_hold():
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout
    assert "3 kept, 0 broken" in done.stdout


@pytest.mark.parametrize(
    ("module", "line", "broken"),
    [
        ("model.py", "from rn50.data import beton", "The ground floor"),
        ("planning/costs.py", "from rn50.data import order", "The ground floor"),
        ("unheard_of.py", "", "The ground floor"),
        ("cloud/store.py", "def late():\n    import torch", "no torch"),
        ("data/pictures.py", "def late():\n    from rn50.data import sources", "No import circle"),
    ],
)
def test_a_breach_is_named(tmp_path, module, line, broken):
    shutil.copytree(ROOT / "rn50", tmp_path / "rn50", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with open(tmp_path / "rn50" / module, "a", encoding="utf-8") as file:
        file.write(f"\n\n{line}\n")
    done = lint(tmp_path)
    assert done.returncode == 1
    broken_ones = [row for row in done.stdout.splitlines() if row.endswith("BROKEN")]
    assert len(broken_ones) == 1, done.stdout
    assert broken in broken_ones[0]
