"""Training curves of one or more runs as one figure, from their log.jsonl."""

import math
import os
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

from rn50 import errors
from rn50.files import read_rows
from rn50.planning import costs, forecast

# Panel title -> the keys of a log row it draws, each with its label and line style.
PANELS = {
    "Loss": {"train_loss": ("train", "-"), "val_loss": ("validation", "--")},
    "Accuracy (%)": {"top1": ("top-1", "-"), "top5": ("top-5", "--")},
    "Learning rate": {"lr": ("", "-")},
    "Training resolution (px)": {"resolution": ("", "-")},
}
# What is added up or compared as it is: a log in which it is no number is not ours.
SUMMED = ("train_seconds", "val_seconds", "elapsed_seconds", "dollars", "images_seen", "top1")
# Panel title -> what top-1 is drawn against.
COSTS = {"Top-1 (%) against hours": "hours", "Top-1 (%) against dollars": "dollars"}
# A run that is validated on so many images is on ImageNet, and may be seen beside published runs on it.
IMAGENET_VALIDATION_IMAGES = 50_000
PUBLISHED = f"published by FFCV: 16 to 88 epochs on 8 A100, at {forecast.EVALUATION}"


def read_log(run):
    """(rows, notes) of a run folder or log.jsonl: a dict per epoch, and what was passed over, as text.

    A last line that a killed process left torn is passed over. Raises RunError for a missing or empty
    log and for any other line that is not a JSON object with an epoch.
    """
    path = Path(run)
    if path.is_dir():
        path = path / "log.jsonl"
    if not path.exists():
        raise errors.RunError(f"cannot read {path}: No such file or directory")
    notes = []
    rows = read_rows(path, notes.append, _problem)
    if not rows:
        raise errors.RunError(f"{path} holds no complete row yet")
    return rows, notes


def points(rows, key):
    """(epochs, values) of the rows in which `key` is a number; an epoch that was logged twice counts once, the last."""
    values = {row["epoch"]: row[key] for row in rows if _is_number(row.get(key))}
    epochs = sorted(values)
    return epochs, [values[epoch] for epoch in epochs]


def hours(rows):
    """{epoch: hours of training and evaluation so far}, where the log has them."""
    found, evaluation = {}, 0.0
    for row in rows:
        evaluation += row.get("val_seconds") or 0
        if _is_number(row.get("elapsed_seconds")):
            found[row["epoch"]] = (row["elapsed_seconds"] + evaluation) / 3600
    return found


def published():
    """FFCV's runs: a list of {epoch, hours, dollars, top1}, each a list of values."""
    (machine,) = [row for row in costs.read_table().instance if row["name"] == "p4d.24xlarge"]
    runs = []
    for rows in forecast.read_curves().values():
        hours = [row["elapsed_seconds"] / 3600 for row in rows]
        runs.append(
            {
                "epoch": [row["epoch"] for row in rows],
                "hours": hours,
                "dollars": [value * machine["value"] for value in hours],
                "top1": [row["top1"] for row in rows],
            }
        )
    return runs


def on_imagenet(logs):
    return any(row.get("images") == IMAGENET_VALIDATION_IMAGES for rows in logs for row in rows)


def warnings(logs, names):
    """The newest warning of each run's forecast, as lines."""
    newest = [(rows[-1].get("forecast") or {}).get("warnings", []) for rows in logs]
    return [f"{name}: {found[0]['text']}" for name, found in zip(names, newest, strict=True) if found]


def run_names(runs):
    """A short, distinct name for each run: its folder's, or its log's other name, with parents where two are alike."""
    folders = [Path(run).resolve() for run in runs]
    folders = [folder.parent if folder.name == "log.jsonl" else folder for folder in folders]
    depth = 1
    while depth < 8 and len({folder.parts[-depth:] for folder in folders}) < len(set(folders)):
        depth += 1
    return ["/".join(folder.parts[-depth:]) for folder in folders]


def draw(logs, names):
    """A matplotlib figure of six panels, one colour a run. `logs` are lists of rows as from `read_log`."""
    figure, grid = plt.subplots(3, 2, figsize=(11, 10.5), layout="constrained")
    by_epoch, by_cost = [grid[0, 0], grid[0, 1], grid[2, 0], grid[2, 1]], list(grid[1])
    behind = published() if on_imagenet(logs) else []
    # One range of epochs in all panels: accuracy may be measured in a few of them only.
    for axis in by_epoch[1:]:
        axis.sharex(by_epoch[0])
    for axis, (title, keys) in zip(by_epoch, PANELS.items(), strict=True):
        drawn = set()
        for index, rows in enumerate(logs):
            for key, (label, style) in keys.items():
                epochs, values = points(rows, key)
                if not epochs:
                    continue
                drawn.add((label, style))
                step = "steps-mid" if key == "resolution" and len(epochs) > 1 else "default"
                # A marker at every epoch drowns a long run, and without one a single point is invisible.
                marker = "o" if len(epochs) <= 30 and step == "default" else ""
                axis.plot(epochs, values, style, drawstyle=step, color=f"C{index % 10}", marker=marker, ms=3.5, lw=1.6)
        styles = [style for style in keys.values() if style in drawn] if len(keys) > 1 else []
        if "top1" in keys and _draw_forecasts(axis, logs):
            styles.append(("forecast of the last top-1", ":"))
        if "top1" in keys:
            _draw_published(axis, behind, "epoch")
        _finish(axis, title, styles)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis, (title, unit) in zip(by_cost, COSTS.items(), strict=True):
        for index, rows in enumerate(logs):
            spent = hours(rows) if unit == "hours" else dict(zip(*points(rows, "dollars"), strict=True))
            epochs = [epoch for epoch in points(rows, "top1")[0] if epoch in spent]
            top1 = dict(zip(*points(rows, "top1"), strict=True))
            marker = "o" if len(epochs) <= 30 else ""
            xs, ys = [spent[epoch] for epoch in epochs], [top1[epoch] for epoch in epochs]
            if epochs:
                axis.plot(xs, ys, color=f"C{index % 10}", marker=marker, ms=3.5, lw=1.6)
        _draw_published(axis, behind, unit)
        _finish(axis, title, [], unit)
        axis.set_xlim(left=0)
    handles = [plt.Line2D([], [], color=f"C{index % 10}", lw=3) for index in range(len(names))]
    labels = [_legend_name(name, rows) for name, rows in zip(names, logs, strict=True)]
    if behind:
        handles, labels = [*handles, plt.Line2D([], [], color="0.75", lw=1)], [*labels, PUBLISHED]
    figure.legend(handles, labels, loc="outside lower center", ncols=1 if len(labels) < 4 else 2, frameon=False)
    trouble = warnings(logs, names)
    if trouble:
        figure.suptitle(
            "\n".join(textwrap.fill(line, 130) for line in trouble), color="C3", fontsize=10, x=0.01, ha="left"
        )
    return figure


def _draw_published(axis, runs, key):
    for run in runs if axis.lines else []:
        axis.plot(run[key], run["top1"], color="0.75", lw=1, zorder=0)


def _draw_forecasts(axis, logs):
    drawn = False
    for index, rows in enumerate(logs):
        expected = {row["epoch"]: (row.get("forecast") or {}).get("top1") for row in rows}
        expected = {epoch: value for epoch, value in expected.items() if _is_number(value)}
        if expected:
            drawn = True
            axis.plot(list(expected), list(expected.values()), ":", color=f"C{index % 10}", lw=1.6)
    return drawn


def save(figure, out):
    """Write the figure as PNG under a temporary name and rename it. Raises RunError when it cannot be written."""
    out = Path(out)
    partial = Path(f"{out}.{os.getpid()}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(partial, format="png", dpi=130)
        os.replace(partial, out)
    except OSError as error:
        raise errors.RunError(f"cannot write {out}: {error.strerror or error}") from None
    finally:
        plt.close(figure)
        if partial.exists():
            partial.unlink()


def _finish(axis, title, styles, unit="epoch"):
    axis.set_title(title, loc="left", fontsize=11)
    axis.set_xlabel(unit)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(x=0.03)
    if title != "Loss":
        axis.margins(y=0.08)
        axis.set_ylim(bottom=0)
    if not axis.lines:
        axis.text(0.5, 0.5, "not in the log", transform=axis.transAxes, ha="center", color="gray")
    if styles:
        handles = [plt.Line2D([], [], color="gray", linestyle=style) for _, style in styles]
        axis.legend(handles, [label for label, _ in styles], frameon=False, fontsize=9)


def _legend_name(name, rows):
    _, top1 = points(rows, "top1")
    return f"{name} (last top-1 {top1[-1]:.2f} %)" if top1 else name


def _problem(row):
    """What keeps a line's value from being an epoch's row, or None."""
    if not isinstance(row, dict) or not _is_number(row.get("epoch")) or not math.isfinite(row["epoch"]):
        return "not an epoch's row (no number under 'epoch')"
    if not all(_is_number(row.get(key) or 0) for key in SUMMED) or not _is_forecast(row.get("forecast") or {}):
        return "not an epoch's row (seconds, dollars or forecast are none)"
    return None


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_forecast(value):
    warnings = value.get("warnings", []) if isinstance(value, dict) else None
    return isinstance(warnings, list) and all(isinstance(warning, dict) and "text" in warning for warning in warnings)
