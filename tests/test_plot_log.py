"""tools/plot_log.py: what it draws, what it passes over and what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from rn50.planning import plots

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "tools" / "plot_log.py"


@pytest.fixture
def plot_log():
    return plots


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
    assert set(panels) == {*plot_log.PANELS, *plot_log.COSTS}
    assert [len(panels[title].lines) for title in plot_log.PANELS] == [4, 4, 2, 2]
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
    panels = {axis.get_title(loc="left"): axis for axis in figure.axes}
    for title in ("Accuracy (%)", *plot_log.COSTS):
        assert [text.get_text() for text in panels[title].texts] == ["not in the log"]
    plot_log.plt.close(figure)


def test_top1_is_drawn_against_hours_and_dollars(tmp_path, plot_log):
    rows, _ = plot_log.read_log(write_run(tmp_path / "run"))
    rows = [{**row, "elapsed_seconds": 3000 * (row["epoch"] + 1), "val_seconds": 600, "dollars": 1.5} for row in rows]
    rows[-1]["dollars"] = 7.5
    figure = plot_log.draw([rows], ["run"])
    panels = {axis.get_title(loc="left"): axis for axis in figure.axes}
    (hours,), (dollars,) = (panels[title].lines for title in plot_log.COSTS)
    assert list(hours.get_xdata()) == [2.0, 4.0]
    assert list(dollars.get_xdata()) == [1.5, 7.5]
    assert list(hours.get_ydata()) == list(dollars.get_ydata()) == [20.0, 60.0]
    plot_log.plt.close(figure)


def test_published_curves_are_behind_runs_on_imagenet_only(tmp_path, plot_log):
    rows, _ = plot_log.read_log(write_run(tmp_path / "run", elapsed_seconds=3600, images=50000))
    for images, curves in ((50000, 6), (3925, 0)):
        figure = plot_log.draw([[{**row, "images": images} for row in rows]], ["run"])
        panels = {axis.get_title(loc="left"): axis for axis in figure.axes}
        assert len(panels["Top-1 (%) against hours"].lines) == 1 + curves
        assert len(panels["Accuracy (%)"].lines) == 2 + curves
        assert len(panels["Loss"].lines) == 2
        assert len(figure.legends[0].get_texts()) == 1 + bool(curves)
        plot_log.plt.close(figure)
    longest = plot_log.published()[-1]
    assert longest["top1"][-1] == pytest.approx(78.43, abs=0.01)
    assert 1.2 < longest["hours"][-1] < 1.4  # 77 minutes
    assert longest["dollars"][-1] == pytest.approx(longest["hours"][-1] * 21.957642)


def test_the_forecast_is_a_line_and_its_warning_is_on_top(tmp_path, plot_log):
    rows, _ = plot_log.read_log(write_run(tmp_path / "run"))
    text = "the learning rate rose from 0.1 to 1.7 in epoch 3"
    for row in rows:
        row["forecast"] = {"top1": 70.0 + row["epoch"], "warnings": []}
    rows[-1]["forecast"] = {"top1": None, "warnings": [{"cause": "warm restart", "text": text}]}
    figure = plot_log.draw([rows], ["run"])
    panels = {axis.get_title(loc="left"): axis for axis in figure.axes}
    forecasts = panels["Accuracy (%)"].lines[-1]
    assert (list(forecasts.get_xdata()), list(forecasts.get_ydata())) == ([0, 1, 2], [70.0, 71.0, 72.0])
    assert figure.get_suptitle() == f"run: {text}"
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
        ('{"epoch": NaN}\n', "line 1: not an epoch's row"),
        ('{"epoch": 0, "val_seconds": "x"}\n', "line 1: not an epoch's row"),
        ('{"epoch": 0, "forecast": "no"}\n', "line 1: not an epoch's row"),
        ('{"epoch": 0, "forecast": {"warnings": ["no"]}}\n', "line 1: not an epoch's row"),
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


def test_a_folder_is_no_name_for_a_picture(tmp_path, plot_log, monkeypatch):
    rows, _ = plot_log.read_log(write_run(tmp_path / "run"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(plot_log.errors.RunError, match="cannot write"):
        plot_log.save(plot_log.draw([rows], ["run"]), ".")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


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
