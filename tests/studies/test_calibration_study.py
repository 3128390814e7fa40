"""studies/calibration: what it says of figures, and that its README has its results."""

import importlib.util
import json

import numpy as np
import pytest

from tests.conftest import ROOT

FOLDER = ROOT / "studies/calibration"


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("calibration_study", FOLDER / "calibration.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_figures_that_are_right_about_themselves_have_the_error_of_chance(study):
    rng = np.random.default_rng(0)
    best = rng.uniform(0.5, 1, 3000)
    shown = np.stack([best, 1 - best], axis=1)
    truth = (rng.random(3000) > best).astype(int)
    found = study.judged(shown, truth)
    assert found["ece"] == pytest.approx(found["chance"], abs=1)
    assert found["nll"] == pytest.approx(-np.log(shown[np.arange(3000), truth]).mean())
    exaggerated = study.judged(np.sqrt(shown), truth)
    assert exaggerated["ece"] > 4 * exaggerated["chance"]
    assert exaggerated["nll"] is None
    assert exaggerated["sum"][1] > 1.2


def test_the_readme_has_the_results(study, capsys):
    study.report(json.loads((FOLDER / "results.json").read_text()))
    text = (FOLDER / "README.md").read_text()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| s")]
    assert len(rows) == 6
    for row in rows:
        assert row in text
    for found in json.loads((FOLDER / "results.json").read_text())["runs"].values():
        shares = [found[key] for key in ("right_unsure", "wrong_unsure", "others_unsure")]
        least, *shown = (f"{share:.1f} %" for share in (100 * found["unsure_below"], *shares))
        assert f"| {least} | {' | '.join(shown)} |" in text
        assert f"top-1 {found['top1']:.2f} %, T = {found['temperature']:.3f}" in text
