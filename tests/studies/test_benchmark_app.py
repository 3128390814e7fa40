"""studies/space/benchmark_app.py in small: it measures a real app, and its verdict follows the figures."""

import json
import sys

import pytest

import studies.space.benchmark_app as tool
from tests import tiny_model

FIGURES = {
    "machine": {"cores": 2, "processor": "a processor"},
    "model": "resnet50",
    "image": "500x375 JPEG",
    "app_ms": 10.0,
    "eager_ms": 30.0,
    "pipeline_ms": 31.0,
    "requests_per_second": 20.0,
    "p50": 0.4,
    "errors": 0,
    "peak_mib": 400.0,
    "speedup": 3.0,
    "cold_start": 2.5,
    "p95": 1.0,
    "installed": 440.0,
}


def test_a_run_measures_the_app_and_says_what_falls_short(monkeypatch, exported, textures, tmp_path, capsys):
    if not tiny_model.APP_PYTHON.exists():
        pytest.skip("the Space's packages are not installed; run: bash tools/app.sh --install")
    monkeypatch.setattr(tool, "ROUNDS", 8)
    monkeypatch.setattr(tool, "COLD_STARTS", 1)
    monkeypatch.setattr(tool, "USERS", 3)
    monkeypatch.setattr(tool, "REQUESTS", 9)
    # a minute of pip, and the network: measured where the tool is run for its figures
    monkeypatch.setattr(tool, "installed_megabytes", lambda: 701.0)
    monkeypatch.setitem(tool.TARGETS, "speedup", (0.0, 2.5, "x", True))
    monkeypatch.setitem(tool.TARGETS, "cold_start", (100.0, 3.0, "s", False))
    monkeypatch.setitem(tool.TARGETS, "p95", (100.0, 1.5, "s", False))
    image = next(textures.glob("val/*/0000.jpg"))
    out = tmp_path / "figures.json"
    monkeypatch.setattr(sys, "argv", ["tool", "--model", str(exported[0]), "--image", str(image), "--json", str(out)])
    with pytest.raises(tool.RunError, match="below what is asked: installed$"):
        tool.main()
    figures = json.loads(out.read_text())
    assert figures["errors"] == 0
    assert figures["speedup"] == pytest.approx(min(figures["eager_ms"], figures["eager_nhwc_ms"]) / figures["app_ms"])
    assert 0 < figures["p50"] <= figures["p95"] < figures["cold_start"]
    assert figures["peak_mib"] > 100
    assert (
        "701.00 MB  added to a fresh environment by app/requirements.txt: below what is asked"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("changed", "short", "words"),
    [
        ({}, [], "aim reached"),
        ({"speedup": 2.0}, [], "2.00 x   faster than PyTorch eager: reached"),
        ({"speedup": 1.4}, ["speedup"], "1.40 x   faster than PyTorch eager: below what is asked"),
        ({"cold_start": 6.1}, ["cold_start"], "below what is asked"),
        ({"p95": 3.2, "installed": 800.0}, ["p95", "installed"], "below what is asked"),
        ({"p95": float("nan")}, ["p95"], "below what is asked"),
        ({"errors": 2}, ["errors"], "2 errors"),
    ],
)
def test_the_verdict_follows_the_figures(changed, short, words, capsys):
    assert tool.report(FIGURES | changed) == short
    assert words in capsys.readouterr().out
