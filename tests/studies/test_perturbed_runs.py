"""The perturbed runs: their table, and what is refused."""

import json
from collections import Counter

import pytest

from rn50.errors import RunError
from rn50.files import read_rows
from studies.perturbed_runs import perturbed_runs
from tests.conftest import ROOT


def test_the_committed_table_is_what_the_committed_runs_say():
    folder = ROOT / "studies/perturbed_runs"
    rows = read_rows(folder / "runs.jsonl")
    assert {row["trouble"] for row in rows} == {*perturbed_runs.TROUBLES, *perturbed_runs.RESUMED}
    assert "\n".join(perturbed_runs.lines(rows)) + "\n" == (folder / "results.md").read_text()


@pytest.fixture
def args(textures, betons, tmp_path, monkeypatch):
    given = ["perturbed_runs.py", "--images", textures, "--data", betons, "--out", tmp_path, "--runs", tmp_path / "r"]
    monkeypatch.setattr("sys.argv", [str(word) for word in given])
    return perturbed_runs.arguments()


@pytest.mark.parametrize("name", [perturbed_runs.EXCHANGED, perturbed_runs.RANDOM])
def test_training_labels_are_wrong_and_validation_labels_are_not(textures, args, name):
    made = perturbed_runs.wrong_labels(name, args)
    first, second = sorted(path.name for path in (textures / "train").iterdir())[:2]
    links = {split: list((made.parent / "tree" / split).glob("*/*")) for split in ("train", "val")}
    now = {link.resolve(): link.parent.name for link in links["train"]}
    assert len(now) == len(links["train"]) == len(list((textures / "train").glob("*/*")))
    if name == perturbed_runs.EXCHANGED:
        other = {first: second, second: first}
        assert all(label == other.get(path.parent.name, path.parent.name) for path, label in now.items())
    else:
        assert Counter(now.values()) == Counter(path.parent.name for path in now)
        assert sum(label == path.parent.name for path, label in now.items()) < len(now) / 4
    assert all(link.resolve().parent.name == link.parent.name for link in links["val"])
    classes = [json.loads((made / f"{split}_64.json").read_text())["classes"] for split in ("train", "val")]
    assert classes[0] == classes[1]


def test_runs_become_lines_that_are_not_made_again(args, tmp_path, monkeypatch, capsys):
    troubles = {name: perturbed_runs.TROUBLES[name] for name in ("nothing", "weight decay ten times too high")}
    monkeypatch.setattr(perturbed_runs, "TROUBLES", troubles)
    monkeypatch.setattr(perturbed_runs, "RESUMED", dict([next(iter(perturbed_runs.RESUMED.items()))]))
    perturbed_runs.main()
    healthy, heavy, resumed = made = read_rows(tmp_path / "runs.jsonl")
    assert healthy["warnings"] == [[], [], []]
    assert [found[0]["cause"] for found in heavy["warnings"]] == ["weight decay"] * 3
    assert (resumed["status"], "training.epochs is 5" in resumed["said"][0]) == (2, True)
    assert "| refused |" in capsys.readouterr().out
    monkeypatch.setattr(perturbed_runs.subprocess, "Popen", None)
    perturbed_runs.main()
    assert read_rows(tmp_path / "runs.jsonl") == made


def test_data_that_is_missing_is_one_line(monkeypatch, tmp_path):
    given = ["perturbed_runs.py", "--images", str(tmp_path), "--data", str(tmp_path), "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", given)
    with pytest.raises(RunError, match="there is no .*train"):
        perturbed_runs.arguments()
