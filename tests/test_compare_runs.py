"""tools/compare_runs.py: what it says and draws of one run and of several, what it passes over and what it refuses."""

import json
import re
import subprocess
import sys

import pytest
import yaml
from PIL import Image

from rn50.errors import RunError, UsageError
from rn50.planning import plots
from tests.conftest import ROOT
from tools import compare_runs


def write(folder, *, epochs=4, config=None, status=None, **changed):
    """A run folder whose every other epoch is evaluated. config: {section: {key: value}} beside what every run has."""
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
    whole = {
        "model": {"arch": "resnet50"},
        "training": {"epochs": epochs},
        "validation": {"headline_resolution": 224, "headline_view": "single"},
        "logging": {"run_name": folder.name},
    }
    for section, keys in (config or {}).items():
        whole[section] = whole.get(section, {}) | keys
    (folder / "config.yaml").write_text(yaml.safe_dump(whole))
    if status:
        (folder / "status.json").write_text(json.dumps({"status": status}))
    return folder


def shell(*args):
    command = [sys.executable, ROOT / "tools" / "compare_runs.py", *args]
    return subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}, timeout=120)


def compare(*args):
    compare_runs.main([str(arg) for arg in args])


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
    compare(first, second, "--json", tmp_path / "c.json", "--out", tmp_path / "new folder" / "c.png")
    lines = capsys.readouterr().out.splitlines()
    assert " ".join(lines[1].split()) == "first budget 4/8 60.00 after 4 224 px single 2.50 3.25 100 -"
    assert " ".join(lines[2].split()) == "second no status 4/4 60.00 224 px single - - - 78.0 at 256 px"
    assert " ".join(lines[0].split()) == "run status epochs top-1 (95 %) at hours dollars img/s forecast"
    assert "warning: second: loss is too high" in lines
    assert lines[lines.index("settings that differ") + 1 :] == [
        "  training.epochs: 8, 4",
        "  model.blurpool: None, True",
        f"wrote {tmp_path / 'c.json'}",
        f"wrote {tmp_path / 'new folder' / 'c.png'} (2 runs)",
    ]
    content = json.loads((tmp_path / "c.json").read_text())
    assert content["differing"] == {"training.epochs": [8, 4], "model.blurpool": [None, True]}
    assert [(row["run"], row["hours"], row["dollars"]) for row in content["runs"]] == [
        ("first", 2.5, 3.25),
        ("second", None, None),
    ]
    with Image.open(tmp_path / "new folder" / "c.png") as image:
        assert image.format == "PNG"
        assert min(image.size) > 600
    assert [path.name for path in (tmp_path / "new folder").iterdir()] == ["c.png"]


def test_figures_that_must_not_be_compared_are_said_to_be(tmp_path, capsys):
    alike = write(tmp_path / "a", images=50000), write(tmp_path / "b", images=50000)
    compare(*alike)
    out = capsys.readouterr().out
    assert "note:" not in out
    assert out.endswith("no setting differs\n")
    other = write(tmp_path / "c", images=3925, config={"validation": {"headline_view": "flip"}})
    compare(alike[0], other)
    out = capsys.readouterr().out
    assert "at different resolutions or views" in out
    assert "not the same data" in out


def test_a_status_that_is_no_word_is_shown_as_it_is(tmp_path, capsys):
    run = write(tmp_path / "run", status=5)
    compare(run)
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["run", "5"]


def test_a_log_alone_is_described_and_drawn_by_what_it_says(tmp_path, capsys):
    run, log = write(tmp_path / "run"), write(tmp_path / "other", epochs=6) / "baseline.jsonl"
    (tmp_path / "other" / "log.jsonl").rename(log)
    compare(log, "--out", tmp_path / "c.png")
    lines = capsys.readouterr().out.splitlines()
    # what no run has is no column
    assert [" ".join(line.split()) for line in lines[:2]] == [
        "run status epochs top-1 (95 %)",
        "baseline no status 6/? 100.00",
    ]
    assert lines[2:] == [f"wrote {tmp_path / 'c.png'} (1 run)"]
    compare(run, log)
    assert "differ" not in capsys.readouterr().out
    compare(run, log, write(tmp_path / "third", config={"model": {"arch": "resnet18"}}))
    out = capsys.readouterr().out
    assert "model.arch: resnet50, None, resnet18" in out
    assert "note:" not in out


def test_a_run_is_its_folder_or_any_file_in_it(tmp_path, capsys):
    run = write(tmp_path / "run", status="finished")
    compare(run)
    said = capsys.readouterr().out
    assert said.splitlines()[1].startswith("run  finished")
    for name in ("log.jsonl", "config.yaml", "last.pt"):
        compare(run / name)
        assert capsys.readouterr().out == said
    (run / "config.yaml").unlink()
    compare(run / "log.jsonl")
    assert "4/?" in capsys.readouterr().out


def test_a_torn_last_line_is_passed_over_with_a_note(tmp_path, capsys):
    run = write(tmp_path / "run")
    with open(run / "log.jsonl", "a") as log:
        log.write('{"epoch": 4, "lr"')
    compare(run)
    assert "line 5 is incomplete" in capsys.readouterr().out


def test_the_shell_gets_a_table_or_one_line_of_error_and_no_file(tmp_path):
    done = shell(write(tmp_path / "run"), "--out", tmp_path / "run" / "c.png")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("run ")
    done = shell(tmp_path / "nowhere", "--out", tmp_path / "out.png")
    assert done.returncode == 1
    assert done.stderr.startswith("error: cannot read")
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_is_no_run_is_refused(tmp_path):
    run = write(tmp_path / "run")
    whole = (tmp_path / "run" / "config.yaml").read_text()
    damages = ["a: [", "- 1\n", "training: 3\n", "training: {}\nvalidation:\n", f"{whole}note: 7\n", "\udcff: \x00"]
    for damaged in damages:
        (tmp_path / "run" / "config.yaml").write_text(damaged, errors="surrogateescape")
        with pytest.raises(RunError, match="is not the config of a run"):
            compare(run)
    (tmp_path / "run" / "config.yaml").unlink()
    with pytest.raises(RunError, match="is not a run folder"):
        compare(run)
    with pytest.raises(RunError, match="cannot read"):
        compare(tmp_path / "nowhere")
    good = write(tmp_path / "good")
    with pytest.raises(RunError, match="cannot write"):
        compare(good, "--json", tmp_path / "no" / "c.json")


# --- The figure -------------------------------------------------------------------------------------------------------


EVALUATION = "224 px, single view"


def panels_of(figure):
    return {axis.get_title(loc="left"): axis for axis in figure.axes}


def test_every_panel_shows_the_values_of_every_run(tmp_path):
    logs = [plots.read_log(write(tmp_path / name, epochs=n))[0] for name, n in (("a", 4), ("b", 6))]
    figure = plots.draw(logs, ["a", "b"], [EVALUATION, None])
    panels = panels_of(figure)
    assert list(panels) == list(plots.PANELS)
    assert [len(panels[title].lines) for title in plots.PANELS] == [4, 4, 2, 2]
    top1 = panels["Accuracy (%)"].lines[0]
    # epochs from 1, as on the console
    assert list(top1.get_xdata()) == [2, 4]
    assert list(top1.get_ydata()) == [20.0, 60.0]
    resolution = panels["Training resolution (px)"].lines[1]
    assert list(resolution.get_ydata()) == [96, 96, 128, 128, 160, 160]
    assert resolution.get_drawstyle() == "steps-mid"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "a: top-1 60.00 % at 224 px, single view",
        "b: top-1 100.00 % at a resolution that is not in the log",
    ]
    plots.plt.close(figure)


def test_what_is_not_in_the_log_has_no_panel(tmp_path):
    rows, _ = plots.read_log(write(tmp_path / "run", top1=None, top5=None))
    figure = plots.draw([rows], ["run"], [EVALUATION])
    assert list(panels_of(figure)) == ["Loss", "Learning rate", "Training resolution (px)"]
    plots.plt.close(figure)
    with pytest.raises(RunError, match="nothing to draw: run logged neither"):
        plots.draw([[{"epoch": 0}]], ["run"], [None])


def test_between_epochs_that_were_not_evaluated_the_line_is_thin(tmp_path):
    rows, _ = plots.read_log(write(tmp_path / "run", epochs=40))
    figure = plots.draw([rows], ["run"], [EVALUATION])
    train, validation = panels_of(figure)["Loss"].lines
    assert validation.get_linewidth() < 1 < train.get_linewidth()
    assert (train.get_marker(), validation.get_marker()) == ("", "o")
    plots.plt.close(figure)


def test_the_axis_of_top1_is_where_the_runs_are():
    def lowest(top1):
        figure = plots.draw([[{"epoch": at, "top1": value} for at, value in enumerate(top1)]], ["run"], [EVALUATION])
        low, high = panels_of(figure)["Accuracy (%)"].get_ylim()
        plots.plt.close(figure)
        assert low < max(top1) < high
        return low

    assert 68 < lowest([70, 75, 80]) < 70
    # a long run is not flattened by its first epochs
    assert 30 < lowest([5, 20, *range(40, 80)]) < 50


@pytest.mark.parametrize(("hours", "unit", "ends"), [(4, "hours", [2.0, 4.0]), (1, "minutes", [30.0, 60.0])])
def test_top1_is_drawn_against_time_and_dollars(tmp_path, hours, unit, ends):
    rows, _ = plots.read_log(write(tmp_path / "run"))
    seconds = {"elapsed_seconds": 750 * hours, "val_seconds": 150 * hours}
    rows = [row | seconds | {"elapsed_seconds": 750 * hours * (row["epoch"] + 1), "dollars": 1.5} for row in rows]
    rows[-1]["dollars"] = 7.5
    figure = plots.draw([rows], ["run"], [EVALUATION])
    panels = panels_of(figure)
    (time,), (dollars,) = (panels[f"Top-1 (%) against {what}"].lines for what in (unit, "dollars"))
    assert list(time.get_xdata()) == pytest.approx(ends)
    assert list(dollars.get_xdata()) == [1.5, 7.5]
    assert list(time.get_ydata()) == list(dollars.get_ydata()) == [20.0, 60.0]
    plots.plt.close(figure)


def test_published_curves_are_behind_runs_on_imagenet_only(tmp_path):
    rows, _ = plots.read_log(write(tmp_path / "run", elapsed_seconds=36000, images=50000))
    for images, curves in ((50000, 6), (3925, 0)):
        figure = plots.draw([[{**row, "images": images} for row in rows]], ["run"], [EVALUATION])
        panels = panels_of(figure)
        assert len(panels["Top-1 (%) against hours"].lines) == 1 + curves
        assert len(panels["Accuracy (%)"].lines) == 2 + curves
        assert len(panels["Loss"].lines) == 2
        assert len(figure.legends[0].get_texts()) == 1 + bool(curves)
        plots.plt.close(figure)
    longest = plots.published()[-1]
    assert longest["epochs"][-1] == 88
    assert longest["top1"][-1] == pytest.approx(78.43, abs=0.01)
    assert 1.2 < longest["hours"][-1] < 1.4  # 77 minutes
    assert longest["dollars"][-1] == pytest.approx(longest["hours"][-1] * 21.957642)


def test_the_forecast_is_a_line_and_its_warning_is_on_top(tmp_path):
    rows, _ = plots.read_log(write(tmp_path / "run"))
    text = "the learning rate rose from 0.1 to 1.7 in epoch 3"
    for row in rows:
        row["forecast"] = {"top1": 70.0 + row["epoch"], "warnings": []}
    rows[-1]["forecast"] = {"top1": None, "warnings": [{"cause": "warm restart", "text": text}]}
    figure = plots.draw([rows], ["run"], [EVALUATION])
    forecasts = panels_of(figure)["Accuracy (%)"].lines[-1]
    assert (list(forecasts.get_xdata()), list(forecasts.get_ydata())) == ([1, 2, 3], [70.0, 71.0, 72.0])
    assert figure.get_suptitle() == f"run: {text}"
    plots.plt.close(figure)


# --- For a paper ------------------------------------------------------------------------------------------------------


def test_a_papers_figure_is_a_column_wide_names_its_lines_and_has_a_caption(tmp_path, capsys):
    at = {"top1_low": 10.0, "top1_high": 70.5, "images": 3925, "elapsed_seconds": 600}
    first = write(tmp_path / "first", **at)
    second = write(tmp_path / "second", epochs=6, config={"validation": {"headline_view": "flip"}}, **at)
    out = tmp_path / "figure.svg"
    compare(first, second, "--paper", "epochs", "--out", out)
    width, height = (
        float(size) for size in re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', out.read_text()).groups()
    )
    assert width == pytest.approx(89 / 25.4 * 72, abs=0.1)
    assert height < width
    said = " ".join(capsys.readouterr().out.split())
    assert "caption: Top-1 accuracy on 3,925 validation images against epochs, one run each." in said
    assert "first: 60.00 % (95 % interval 10.00 to 70.50) at 224 px, single view after 4 epochs." in said
    assert "second: 100.00 % (95 % interval 10.00 to 70.50) at 224 px, averaged with the mirror image" in said
    assert said.endswith(f"wrote {out} (2 runs)")
    again = tmp_path / "again.svg"
    compare(first, second, "--paper", "epochs", "--out", again)
    assert again.read_bytes() == out.read_bytes()
    with pytest.raises(UsageError, match="the log of first has no top-1 against dollars; it has epochs and hours"):
        compare(first, second, "--paper", "dollars", "--out", out)
    with pytest.raises(SystemExit):
        compare(first, "--paper", "epochs")


@pytest.mark.parametrize("ends", [(80.0, 79.9, 79.8), (80.0, 60.0, 80.0)])
def test_no_name_of_a_line_covers_another(ends):
    logs = [[{"epoch": at, "top1": end * (at + 1) / 4} for at in range(4)] for end in ends]
    figure = plots.draw_paper(logs, ["the_first", "second", "3"], "epochs")
    figure.draw_without_rendering()
    texts = figure.axes[0].texts
    boxes = [text.get_window_extent() for text in texts]
    assert {text.get_text() for text in texts} == {"the_first", "second", "3"}
    assert not any(box.overlaps(other) for index, box in enumerate(boxes) for other in boxes[:index])
    assert all(box.x1 <= figure.bbox.x1 + 1 for box in boxes)
    plots.plt.close(figure)


# --- Names and files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "begins"), [("c.png", b"\x89PNG"), ("c.SVG", b"<?xml"), ("c.pdf", b"%PDF"), ("a.b.svg", b"<?xml")]
)
def test_a_figure_is_what_its_name_says(tmp_path, name, begins):
    compare(write(tmp_path / "run"), "--out", tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(begins)


@pytest.mark.parametrize("name", ["c.foo", "c", ".", "c.png.gz"])
def test_another_name_is_refused_before_anything_is_read(tmp_path, capsys, name):
    with pytest.raises(UsageError, match=r"\.png, \.svg or \.pdf"):
        compare(tmp_path / "nowhere", "--out", name)
    assert capsys.readouterr().out == ""


def test_an_epoch_logged_twice_counts_once_and_the_last_wins():
    rows = [{"epoch": 0, "lr": 1.0}, {"epoch": 1, "lr": 2.0}, {"epoch": 0, "lr": 3.0}]
    assert plots.points(rows, "lr") == ([0, 1], [3.0, 2.0])


def test_runs_of_the_same_name_get_distinct_legends():
    assert plots.run_names(["/x/one/run", "/x/two/run/log.jsonl"]) == ["one/run", "two/run"]
    assert plots.run_names(["/x/one", "/x/two"]) == ["one", "two"]
    assert plots.run_names(["/x/one", "/x/one/log.jsonl", "/x/one/first_log.jsonl"]) == ["one", "one (2)", "first_log"]


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
def test_a_bad_log_is_one_clear_error(tmp_path, content, message):
    run = tmp_path / "run"
    run.mkdir()
    if content is not None:
        (run / "log.jsonl").write_text(content)
    with pytest.raises(RunError, match=message):
        plots.read_log(run)


def test_a_folder_is_no_name_for_a_picture(tmp_path):
    rows, _ = plots.read_log(write(tmp_path / "run"))
    (tmp_path / "c.png").mkdir()
    with pytest.raises(RunError, match="cannot write"):
        plots.save(plots.draw([rows], ["run"], [EVALUATION]), tmp_path / "c.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.png", "run"]


def test_a_failed_write_leaves_the_old_picture_and_nothing_else(tmp_path, monkeypatch):
    rows, _ = plots.read_log(write(tmp_path / "run"))
    out = tmp_path / "out" / "curves.png"
    plots.save(plots.draw([rows], ["run"], [EVALUATION]), out)
    before = out.read_bytes()

    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(plots.os, "replace", full_disk)
    with pytest.raises(RunError, match="No space left"):
        plots.save(plots.draw([rows], ["run"], [EVALUATION]), out)
    assert out.read_bytes() == before
    assert [path.name for path in out.parent.iterdir()] == ["curves.png"]
