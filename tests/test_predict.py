"""tools/predict.py: what the Space says, in the terminal."""

import json
import re
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

import tools.predict as tool
from tests.app.test_app import known  # noqa: F401


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, arguments)])
    tool.main()


def test_a_table_and_json_say_the_same(monkeypatch, capsys, exported, known):  # noqa: F811
    paths = [path for path, *_ in known[:2]]
    run(monkeypatch, *paths, "--model", exported[0], "--json", "--top", 3)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["image"] for row in rows] == [str(path) for path in paths]
    for row, (path, label, probability) in zip(rows, known, strict=False):
        assert [len(row["confidences"]), row["confidences"][0]["label"]] == [3, label]
        assert row["confidences"][0]["wnid"] == path.parent.name
        assert row["confidences"][0]["probability"] == pytest.approx(probability, abs=1e-5)
    run(monkeypatch, paths[0], "--model", exported[0])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(paths[0])
    assert lines[-6] == f"  {100 * known[0][2]:5.1f} %  {known[0][1]}"
    assert re.fullmatch(r"  decoded in \d+\.\d ms, classified in \d+\.\d ms", lines[-1])


def test_it_says_where_it_is_unsure(monkeypatch, capsys, exported, known, tmp_path):  # noqa: F811
    model = shutil.copytree(exported[0], tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    for least, unsure in ((known[0][2] - 0.01, False), (known[0][2] + 0.01, True)):
        config["probabilities"]["unsure_below"] = least
        (model / "config.json").write_text(json.dumps(config))
        run(monkeypatch, known[0][0], "--model", model, "--json")
        assert json.loads(capsys.readouterr().out)["unsure"] == unsure
        run(monkeypatch, known[0][0], "--model", model)
        words = f"  unsure: nearly all right answers have {100 * least:.0f} % or more; it knows 10 classes alone"
        assert (words in capsys.readouterr().out.splitlines()) == unsure


def test_the_map_is_of_the_chosen_class(monkeypatch, exported, known, tmp_path):  # noqa: F811
    path = known[0][0]
    pictures = {}
    for name in ("zigzag", "bricks"):
        run(monkeypatch, path, "--model", exported[0], "--cam", tmp_path / f"{name}.png", "--cam-class", name)
        pictures[name] = np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int)
    assert pictures["zigzag"].shape == pictures["bricks"].shape
    assert np.abs(pictures["zigzag"] - pictures["bricks"]).max() > 10
    assert sorted(file.name for file in tmp_path.iterdir()) == ["bricks.png", "zigzag.png"]


def test_unreadable_pictures_are_named_and_the_others_answered(monkeypatch, capsys, exported, known, tmp_path):  # noqa: F811
    (tmp_path / "text.jpg").write_text("no picture")
    with pytest.raises(tool.RunError, match="2 of 3 pictures could not be read"):
        run(monkeypatch, tmp_path / "text.jpg", known[0][0], tmp_path / "none.jpg", "--model", exported[0])
    printed = capsys.readouterr()
    assert known[0][1] in printed.out
    errors = printed.err.splitlines()
    assert errors[0].startswith(f"error: {tmp_path}/text.jpg: The file is text, not a picture")
    assert errors[1] == f"error: {tmp_path}/none.jpg: No such file or directory"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["a.jpg", "--model", "nowhere"], "RunError", "no config.json in nowhere"),
        (["a.jpg", "b.jpg", "--cam", "out.png"], "UsageError", "give one image"),
        (["a.jpg", "--cam-class", "zigzag"], "UsageError", "needs --cam"),
        (["a.jpg", "--top", "0"], "UsageError", "at least 1"),
    ],
)
def test_refusals(monkeypatch, arguments, error, message):
    with pytest.raises(getattr(tool, error), match=message):
        run(monkeypatch, *arguments)


def test_an_unknown_class_is_refused(monkeypatch, exported, known, tmp_path):  # noqa: F811
    with pytest.raises(tool.UsageError, match="the model has no class unicorn"):
        run(
            monkeypatch,
            known[0][0],
            "--model",
            exported[0],
            "--cam",
            tmp_path / "out.png",
            "--cam-class",
            "unicorn",
        )
