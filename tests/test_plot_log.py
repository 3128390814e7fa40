"""tools/plot_log.py: what it draws, what it passes over and what it refuses."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "tools" / "plot_log.py"


@pytest.fixture(scope="module")
def plot_log():
    spec = importlib.util.spec_from_file_location("plot_log", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_run(folder, epochs=4, **changed):
    folder.mkdir(parents=True)
    rows = [
        {
            "epoch": epoch,
            "step": 10 * epoch,
            "resolution": 96 + 32 * (epoch // 2),
            "lr": 0.1 * (epochs - epoch),
            "train_loss": 3.0 - 0.5 * epoch,
            "val_loss": 2.9 - 0.5 * epoch if epoch % 2 else None,
            "top1": 20.0 * epoch if epoch % 2 else None,
            "top5": 25.0 * epoch if epoch % 2 else None,
            **changed,
        }
        for epoch in range(epochs)
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run_tool(*args):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, TOOL, *map(str, args)], capture_output=True, text=True, env=environment, timeout=120
    )


def test_draws_several_runs_into_one_png(tmp_path):
    first, second = write_run(tmp_path / "first"), write_run(tmp_path / "second", epochs=6)
    out = tmp_path / "new folder" / "curves.png"
    done = run_tool(first, second / "log.jsonl", "--out", out)
    assert (done.returncode, done.stderr) == (0, "")
    with Image.open(out) as image:
        assert image.format == "PNG"
        assert min(image.size) > 600
    assert [path.name for path in out.parent.iterdir()] == ["curves.png"]


def test_every_panel_shows_the_values_of_every_run(tmp_path, plot_log):
    logs = [plot_log.read_log(write_run(tmp_path / name, epochs=n))[0] for name, n in (("a", 4), ("b", 6))]
    figure = plot_log.draw(logs, ["a", "b"])
    panels = {axis.get_title(loc="left"): axis for axis in figure.axes}
    assert list(panels) == list(plot_log.PANELS)
    assert [len(axis.lines) for axis in panels.values()] == [4, 4, 2, 2]
    top1 = panels["Accuracy (%)"].lines[0]
    assert list(top1.get_xdata()) == [1, 3]
    assert list(top1.get_ydata()) == [20.0, 60.0]
    assert list(panels["Training resolution (px)"].lines[1].get_ydata()) == [96, 96, 128, 128, 160, 160]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "a (last top-1 60.00 %)",
        "b (last top-1 100.00 %)",
    ]
    plot_log.plt.close(figure)


def test_a_key_that_is_always_null_leaves_its_panel_labelled_empty(tmp_path, plot_log):
    rows, _ = plot_log.read_log(write_run(tmp_path / "run", top1=None, top5=None))
    figure = plot_log.draw([rows], ["run"])
    assert [text.get_text() for text in figure.axes[1].texts] == ["not in the log"]
    plot_log.plt.close(figure)


def test_an_epoch_logged_twice_counts_once_and_the_last_wins(plot_log):
    rows = [{"epoch": 0, "lr": 1.0}, {"epoch": 1, "lr": 2.0}, {"epoch": 0, "lr": 3.0}]
    assert plot_log.points(rows, "lr") == ([0, 1], [3.0, 2.0])


def test_runs_of_the_same_name_get_distinct_legends(plot_log):
    assert plot_log.run_names(["/x/one/run", "/x/two/run/log.jsonl"]) == ["one/run", "two/run"]
    assert plot_log.run_names(["/x/one", "/x/two"]) == ["one", "two"]


def test_a_torn_last_line_is_passed_over_with_a_note(tmp_path):
    run = write_run(tmp_path / "run")
    with open(run / "log.jsonl", "a") as log:
        log.write('{"epoch": 4, "lr"')
    done = run_tool(run, "--out", tmp_path / "out.png")
    assert done.returncode == 0
    assert "line 5 is incomplete" in done.stdout


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("", "holds no complete row"),
        ('{"epoch": 0', "holds no complete row"),
        ('{"epoch": 0}\n{"epoch": 1, \n{"epoch": 2}\n', "line 2: not valid JSON"),
        ('{"epoch": 0}\n{"epoch": 1, "lr"\n', "line 2: not valid JSON"),
        ('{"epoch": 0}\n[1, 2]\n', "line 2: not an epoch's row"),
        ('{"step": 0}\n', "line 1: not an epoch's row"),
    ],
)
def test_a_bad_log_is_one_clear_error(tmp_path, plot_log, content, message):
    run = tmp_path / "run"
    run.mkdir()
    if content is not None:
        (run / "log.jsonl").write_text(content)
    with pytest.raises(plot_log.errors.RunError, match=message):
        plot_log.read_log(run)


def test_errors_reach_the_shell_as_one_line_and_leave_no_file(tmp_path):
    done = run_tool(tmp_path / "nowhere", "--out", tmp_path / "out.png")
    assert done.returncode == 1
    assert done.stderr.startswith("error: cannot read")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_picture_and_nothing_else(tmp_path, plot_log, monkeypatch):
    rows, _ = plot_log.read_log(write_run(tmp_path / "run"))
    out = tmp_path / "out" / "curves.png"
    plot_log.save(plot_log.draw([rows], ["run"]), out)
    before = out.read_bytes()

    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(plot_log.os, "replace", full_disk)
    with pytest.raises(plot_log.errors.RunError, match="No space left"):
        plot_log.save(plot_log.draw([rows], ["run"]), out)
    assert out.read_bytes() == before
    assert [path.name for path in out.parent.iterdir()] == ["curves.png"]
