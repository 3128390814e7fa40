"""tools/compare_runs.py: what it says of runs side by side, and what it refuses."""

import json

import pytest
import yaml
from PIL import Image

from rn50.errors import RunError
from tests.test_plot_log import write_run
from tools import compare_runs


def write(folder, *, config=None, status=None, **changed):
    """A run folder of 4 epochs; config: {section: {key: value}} beside what every run has."""
    run = write_run(folder, **changed)
    whole = {
        "model": {"arch": "resnet50"},
        "training": {"epochs": 4},
        "validation": {"headline_resolution": 224, "headline_view": "single"},
        "logging": {"run_name": folder.name},
    }
    for section, keys in (config or {}).items():
        whole[section] = whole.get(section, {}) | keys
    (run / "config.yaml").write_text(yaml.safe_dump(whole))
    if status:
        (run / "status.json").write_text(json.dumps({"status": status}))
    return str(run)


def test_every_run_has_its_figures_and_only_what_differs_is_listed(tmp_path, capsys):
    first = write(
        tmp_path / "first",
        status="budget",
        config={"training": {"epochs": 8}, "data": {"dir": "/a"}},
        dollars=3.25,
        elapsed_seconds=7200,
        val_seconds=450,
        train_seconds=1800,
        images_seen=720000,
    )
    forecast = {"top1": 77.96, "evaluation": "256 px", "warnings": [{"cause": "x", "text": "loss is too high"}]}
    second = write(tmp_path / "second", forecast=forecast, config={"model": {"blurpool": True}, "data": {"dir": "/b"}})
    compare_runs.main([first, second, "--json", str(tmp_path / "c.json"), "--out", str(tmp_path / "c.png")])
    lines = capsys.readouterr().out.splitlines()
    assert " ".join(lines[1].split()) == "first budget 4/8 60.00 after 4 224 px single 2.50 3.25 100 -"
    assert " ".join(lines[2].split()) == "second no status 4/4 60.00 224 px single - - - 78.0 at 256 px"
    assert "warning: second: loss is too high" in lines
    assert lines[lines.index("settings that differ") + 1 :] == [
        "  training.epochs: 8, 4",
        "  model.blurpool: None, True",
    ]
    content = json.loads((tmp_path / "c.json").read_text())
    assert content["differing"] == {"training.epochs": [8, 4], "model.blurpool": [None, True]}
    assert [(row["run"], row["hours"], row["dollars"]) for row in content["runs"]] == [
        ("first", 2.5, 3.25),
        ("second", None, None),
    ]
    with Image.open(tmp_path / "c.png") as image:
        assert image.format == "PNG"


def test_figures_that_must_not_be_compared_are_said_to_be(tmp_path, capsys):
    alike = write(tmp_path / "a", images=50000), write(tmp_path / "b", images=50000)
    compare_runs.main([*alike])
    out = capsys.readouterr().out
    assert "note:" not in out
    assert out.endswith("no setting differs\n")
    other = write(tmp_path / "c", images=3925, config={"validation": {"headline_view": "flip"}})
    compare_runs.main([alike[0], other])
    out = capsys.readouterr().out
    assert "at different resolutions or views" in out
    assert "not the same data" in out


def test_a_status_that_is_no_word_is_shown_as_it_is(tmp_path, capsys):
    run = write(tmp_path / "run", status=5)
    compare_runs.main([run])
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["run", "5"]


def test_what_is_no_run_is_refused(tmp_path):
    run = write(tmp_path / "run")
    whole = (tmp_path / "run" / "config.yaml").read_text()
    damages = ["a: [", "- 1\n", "training: 3\n", "training: {}\nvalidation:\n", f"{whole}note: 7\n", "\udcff: \x00"]
    for damaged in damages:
        (tmp_path / "run" / "config.yaml").write_text(damaged, errors="surrogateescape")
        with pytest.raises(RunError, match="is not the config of a run"):
            compare_runs.main([run])
    (tmp_path / "run" / "config.yaml").unlink()
    with pytest.raises(RunError, match="is not a run folder"):
        compare_runs.main([run])
    with pytest.raises(RunError, match="cannot read"):
        compare_runs.main([str(tmp_path / "nowhere")])
    good = write(tmp_path / "good")
    with pytest.raises(RunError, match="cannot write"):
        compare_runs.main([good, "--json", str(tmp_path / "no" / "c.json")])
