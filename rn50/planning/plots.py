"""Training curves of one or more runs as one figure, from their log.jsonl, for the screen or for a paper."""

import math
import os
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.patheffects as effects
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from rn50 import errors
from rn50.files import file_of_run, read_rows
from rn50.planning import costs, forecast

FORMATS = ("png", "svg", "pdf")
# Panel title -> the keys of a log row it draws, each with its label and line style.
PANELS = {
    "Loss": {"train_loss": ("train", "-"), "val_loss": ("validation", "--")},
    "Accuracy (%)": {"top1": ("top-1", "-"), "top5": ("top-5", "--")},
    "Learning rate": {"lr": ("", "-")},
    "Training resolution (px)": {"resolution": ("", "-")},
}
# What top-1 can be drawn against.
COSTS = ("epochs", "hours", "dollars")
# A run shorter than this, in hours, is drawn in minutes.
SHORT = 2
# What is added up or compared as it is: a log in which it is no number is not ours.
SUMMED = ("train_seconds", "val_seconds", "elapsed_seconds", "dollars", "images_seen", "top1")
# A run that is validated on so many images is on ImageNet, and may be seen beside published runs on it.
IMAGENET_VALIDATION_IMAGES = 50_000
PUBLISHED = f"published by FFCV: 16 to 88 epochs on 8 A100, at {forecast.EVALUATION}"
COLUMN = 89 / 25.4  # inches: one column of most journals


def read_log(run):
    """(rows, notes) of a run folder, a file in it or a log alone: a dict per epoch, and what was passed over, as text.

    A last line that a killed process left torn is passed over. Raises RunError for a missing or empty
    log and for any other line that is not a JSON object with an epoch.
    """
    path = file_of_run(run, "log.jsonl")
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


def spent(rows, unit):
    """{epoch from 0: epochs, hours or dollars so far}, where the log has them."""
    if unit == "hours":
        return hours(rows)
    if unit == "dollars":
        return dict(zip(*points(rows, "dollars"), strict=True))
    return {row["epoch"]: row["epoch"] + 1 for row in rows}


def against(rows, unit, key="top1"):
    """(epochs, hours or dollars; values) of the rows in which `key` is a number."""
    costs_of, values = spent(rows, unit), dict(zip(*points(rows, key), strict=True))
    epochs = [epoch for epoch in values if epoch in costs_of]
    return [costs_of[epoch] for epoch in epochs], [values[epoch] for epoch in epochs]


def published():
    """FFCV's runs: a list of {epochs, hours, dollars, top1}, each a list of values."""
    (machine,) = [row for row in costs.read_table().instance if row["name"] == "p4d.24xlarge"]
    runs = []
    for rows in forecast.read_curves().values():
        hours = [row["elapsed_seconds"] / 3600 for row in rows]
        runs.append(
            {
                "epochs": [row["epoch"] + 1 for row in rows],
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
    logs = [file_of_run(run, "log.jsonl").resolve() for run in runs]
    paths = [log.parent if log.name == "log.jsonl" else log for log in logs]
    paths = [path.with_suffix("") if path.suffix == ".jsonl" else path for path in paths]
    depth = 1
    while depth < 8 and len({path.parts[-depth:] for path in paths}) < len(set(paths)):
        depth += 1
    names = ["/".join(path.parts[-depth:]) for path in paths]
    earlier = [names[:index].count(name) for index, name in enumerate(names)]
    return [f"{name} ({count + 1})" if count else name for name, count in zip(names, earlier, strict=True)]


# --- For the screen: all that a log has ------------------------------------------------------------------------------


def draw(logs, names, evaluations):
    """A matplotlib figure with a panel for each thing that a log has, one colour a run.

    logs: lists of rows as from `read_log`. evaluations: at which resolution and view each run's top-1 is, as text, or
    None.
    """
    units = [unit for unit in COSTS[1:] if any(against(rows, unit)[0] for rows in logs)]
    titles = [title for title, keys in PANELS.items() if any(points(rows, key)[0] for rows in logs for key in keys)]
    if not titles:
        raise errors.RunError(f"there is nothing to draw: {', '.join(names)} logged neither loss nor accuracy")
    # top-1 against its costs comes after the accuracies
    at = sum(title in titles for title in ("Loss", "Accuracy (%)"))
    panels = [*titles[:at], *units, *titles[at:]]
    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure, grid = plt.subplots(
        lines, columns, figsize=(5.5 * columns, 3.2 * lines + 0.9), layout="constrained", squeeze=False
    )
    axes = dict(zip(panels, grid.flat, strict=False))
    for axis in grid.flat[len(panels) :]:
        axis.remove()
    behind = published() if on_imagenet(logs) else []
    for title in titles:
        _draw_by_epoch(axes[title], title, logs, behind)
        # One range of epochs in all panels: accuracy may be measured in a few of them only.
        axes[title].sharex(axes[titles[0]])
    for unit in units:
        _draw_by_cost(axes[unit], unit, logs, behind)
    handles = [plt.Line2D([], [], color=f"C{index % 10}", lw=3) for index in range(len(names))]
    labels = [_legend_name(*run) for run in zip(names, logs, evaluations, strict=True)]
    if behind and any("top1" in PANELS.get(title, ()) for title in titles):
        handles, labels = [*handles, plt.Line2D([], [], color="0.75", lw=1)], [*labels, PUBLISHED]
    figure.legend(handles, labels, loc="outside lower center", ncols=1, frameon=False)
    trouble = warnings(logs, names)
    if trouble:
        figure.suptitle(
            "\n".join(textwrap.fill(line, 65 * columns) for line in trouble), color="C3", fontsize=10, x=0.01, ha="left"
        )
    return figure


def _draw_by_epoch(axis, title, logs, behind):
    drawn = set()
    for index, rows in enumerate(logs):
        for key, (label, style) in PANELS[title].items():
            epochs, values = points(rows, key)
            if epochs:
                drawn.add((label, style))
                step = "steps-mid" if key == "resolution" and len(epochs) > 1 else "default"
                look = _line(index, epochs, step)
                if len(PANELS[title]) == 1:
                    # two runs often have the same schedule: let the earlier one be seen behind the later one
                    look["lw"] += 0.9 * min(2, len(logs) - 1 - index)
                axis.plot([epoch + 1 for epoch in epochs], values, style, drawstyle=step, **look)
    styles = [style for style in PANELS[title].values() if style in drawn] if len(PANELS[title]) > 1 else []
    if "top1" in PANELS[title]:
        if _draw_forecasts(axis, logs):
            styles.append(("forecast of the last top-1", ":"))
        _draw_published(axis, behind, "epochs")
        _show_the_end(axis, logs)
    _finish(axis, title, "epoch")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    if title == "Learning rate":
        axis.set_ylim(bottom=0)
    if styles:
        keys = [plt.Line2D([], [], color="gray", linestyle=style) for _, style in styles]
        axis.legend(keys, [label for label, _ in styles], frameon=False, fontsize=9)


def _draw_by_cost(axis, unit, logs, behind):
    unit_shown, scale = _unit(unit, logs)
    for index, rows in enumerate(logs):
        xs, ys = against(rows, unit)
        if xs:
            axis.plot([scale * x for x in xs], ys, **_line(index, points(rows, "top1")[0]))
    _draw_published(axis, behind, unit, scale)
    _show_the_end(axis, logs)
    _finish(axis, f"Top-1 (%) against {unit_shown}", unit_shown)
    axis.set_xlim(left=0)


def _line(index, epochs, step="default"):
    """How a run's line looks. Between epochs that were not measured it is a thin one, which only leads the eye."""
    sparse = any(after - before > 1 for before, after in zip(epochs, epochs[1:], strict=False))
    # A marker at every epoch drowns a long run, and without one a single point is invisible.
    marker = "o" if (sparse or len(epochs) <= 30) and step == "default" else ""
    return {"color": f"C{index % 10}", "marker": marker, "ms": 4.5 if sparse else 3.5, "lw": 0.7 if sparse else 1.6}


def _unit(unit, logs):
    """(what the axis is in, factor): minutes in the place of hours where all runs are short."""
    longest = max((value for rows in logs for value in spent(rows, unit).values()), default=0)
    return ("minutes", 60) if unit == "hours" and longest < SHORT else (unit, 1)


def _draw_published(axis, runs, key, scale=1):
    """Behind what is drawn: the published curves begin far below it, so they do not set the limits."""
    limits = axis.dataLim.frozen()
    for run in runs if axis.lines else []:
        axis.plot([scale * x for x in run[key]], run["top1"], color="0.75", lw=1, zorder=0)
    if runs and axis.lines:
        axis.dataLim.set(limits)


def _show_the_end(axis, logs):
    """Leave the first steep epochs of long runs out: runs differ at their end, and by little."""
    top1 = [value for rows in logs for value in points(rows, "top1")[1]]
    if len(top1) >= 20:
        axis.set_ylim(bottom=np.quantile(top1, 0.1) - 2)


def _draw_forecasts(axis, logs):
    drawn = False
    for index, rows in enumerate(logs):
        expected = {row["epoch"] + 1: (row.get("forecast") or {}).get("top1") for row in rows}
        expected = {epoch: value for epoch, value in expected.items() if _is_number(value)}
        if expected:
            drawn = True
            axis.plot(list(expected), list(expected.values()), ":", color=f"C{index % 10}", lw=1.6)
    return drawn


def _finish(axis, title, unit):
    axis.set_title(title, loc="left", fontsize=11)
    axis.set_xlabel(unit)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(x=0.03, y=0.08)


def _legend_name(name, rows, evaluation):
    epochs, top1 = points(rows, "top1")
    if not top1:
        return name
    after = f" after {epochs[-1] + 1} epochs" if epochs[-1] != rows[-1]["epoch"] else ""
    return f"{name}: top-1 {top1[-1]:.2f} % at {evaluation or 'a resolution that is not in the log'}{after}"


# --- For a paper: one panel ------------------------------------------------------------------------------------------


def draw_paper(logs, names, unit):
    """A figure one column wide: top-1 against `unit`, one of COSTS, each line with its name and 95 % interval."""
    for name, rows in zip(names, logs, strict=True):
        if not against(rows, unit)[0]:
            has = [other for other in COSTS if against(rows, other)[0]]
            hint = f"it has {' and '.join(has)}" if has else "it was not evaluated yet"
            raise errors.UsageError(f"--paper {unit}: the log of {name} has no top-1 against {unit}; {hint}")
    with plt.rc_context({"font.size": 8, "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6}):
        figure, axis = plt.subplots(figsize=(COLUMN, 0.68 * COLUMN), layout="constrained")
        unit_shown, scale = _unit(unit, logs)
        for index, rows in enumerate(logs):
            xs, ys = against(rows, unit)
            xs, look = [scale * x for x in xs], _line(index, points(rows, "top1")[0])
            sparse = look["lw"] < 1 or len(ys) == 1
            axis.plot(xs, ys, **(look | {"ms": 2.5, "lw": 0.6 if sparse else 1.2}))
            low, high = (against(rows, unit, key)[1] for key in ("top1_low", "top1_high"))
            if len(low) == len(high) == len(ys) and sparse:
                axis.vlines(xs, low, high, color=look["color"], lw=1.2, alpha=0.6)
            elif len(low) == len(high) == len(ys):
                axis.fill_between(xs, low, high, color=look["color"], alpha=0.2, lw=0)
        lines = list(axis.lines)
        _draw_published(axis, published() if on_imagenet(logs) else [], unit, scale)
        _show_the_end(axis, logs)
        what = f"{unit_shown} of training and evaluation" if unit == "hours" else unit
        axis.set(xlabel=what, ylabel="top-1 (%)")
        axis.grid(alpha=0.3, lw=0.5)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlim(left=0)
        if unit == "epochs":
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        _name_lines(figure, axis, lines, names)
    return figure


def _name_lines(figure, axis, lines, names):
    """Write each line's name beside its end, in its colour; the axis becomes wide enough for the longest line's."""
    ends = [(line.get_xdata()[-1], line.get_ydata()[-1]) for line in lines]
    figure.draw_without_rendering()
    frame, (left, right) = axis.get_window_extent(), axis.get_xlim()
    for (x, y), name in zip(ends, names, strict=True):
        if x > 0.97 * max(end for end, _ in ends):
            label = write(axis, (x, y), name, (5, 0), "left")
            room = min(label.get_window_extent().width + 6 * figure.dpi / 72, 0.6 * frame.width)
            right = max(right, left + (x - left) * frame.width / (frame.width - room))
            label.remove()
    axis.set_xlim(left, right)
    taken = [box for line in lines for box in boxes_along(axis, line.get_xdata(), line.get_ydata())]
    beside = [(5, y, "left") for y in (0, 6, -6, 12, -12)]
    places = [*beside, *[(3, y, "right") for y in (8, -9, 16, -17, 25)]]
    for line, end, name in sorted(zip(lines, ends, names, strict=True), key=lambda run: -run[1][1]):
        if not place(axis, end, name, taken, places, color=line.get_color()):
            write(axis, end, name, (5, 0), "left", color=line.get_color())


def boxes_along(axis, xs, ys):
    """Small boxes, in pixels, along a line through the points: what no label may cover."""
    along = axis.transData.transform(np.column_stack([xs, ys])) if len(xs) else np.empty((0, 2))
    steps = np.linspace(0, 1, 25)[:, None]
    dots = [
        *along,
        *(dot for start, end in zip(along, along[1:], strict=False) for dot in start + steps * (end - start)),
    ]
    return [Bbox.from_extents(x - 1, y - 1, x + 1, y + 1) for x, y in dots]


def place(axis, at, text, taken, places, **style):
    """Write `text` at the first of `places` (x, y in points from `at`, which end of it is there) that is free.

    taken: boxes in pixels, to which the text's is added. False where no place is free.
    """
    frame = axis.get_window_extent()
    for x, y, end in places:
        label = write(axis, at, text, (x, y), end, **style)
        box = label.get_window_extent().padded(1)
        inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 + 2 and frame.y0 <= box.y0
        if inside and not any(box.overlaps(other) for other in taken):
            taken.append(box)
            return True
        label.remove()
    return False


def write(axis, at, text, offset, end, va="center", **style):
    """`text` at `offset` points from the data's `at`, its left or right `end` there, on a white edge."""
    style |= {"xytext": offset, "textcoords": "offset points", "ha": end, "va": va, "rotation_mode": "anchor"}
    halo = [effects.withStroke(linewidth=2.5, foreground="white")]
    label = axis.annotate(text, at, path_effects=halo, zorder=6, annotation_clip=False, **style)
    label.set_in_layout(False)
    return label


def caption(logs, names, evaluations, unit):
    """The text under the paper's figure: what is drawn, each run's last figure with its interval, what the bars are."""
    said, images = [], sorted({row["images"] for rows in logs for row in rows if row.get("images")})
    for name, rows, evaluation in zip(names, logs, evaluations, strict=True):
        last = [row for row in rows if row.get("top1") is not None][-1]
        interval = ""
        if last.get("top1_low") is not None:
            interval = f" (95 % interval {last['top1_low']:.2f} to {last['top1_high']:.2f})"
        at = f" at {evaluation}" if evaluation else ""
        said.append(f"{name}: {last['top1']:.2f} %{interval}{at} after {last['epoch'] + 1} epochs.")
    count = " or ".join(f"{number:,}" for number in images)
    return " ".join(
        [
            f"Top-1 accuracy{f' on {count} validation images' if images else ''} against "
            f"{unit if unit != 'hours' else 'the time of training and evaluation'}, one run each.",
            *said,
            *(["Bars or bands: 95 % interval that the choice of validation images leaves."] * _has_intervals(logs)),
            *([f"Grey: {PUBLISHED}."] * on_imagenet(logs)),
        ]
    )


def _has_intervals(logs):
    return any(row.get("top1_low") is not None for rows in logs for row in rows)


# --- Files -----------------------------------------------------------------------------------------------------------


def picture_format(name):
    """png, svg or pdf, as the name of a figure's file ends; UsageError for another."""
    found = Path(name).suffix.lower().removeprefix(".")
    if found not in FORMATS:
        raise errors.UsageError(f"{name}: a figure is a .png, .svg or .pdf; give it a name that ends so")
    return found


def save(figure, out, dpi=130):
    """Write the figure as its name asks, under a temporary name, and rename it. RunError where it cannot be written.

    The same figure gives the same bytes: no date, and the same names within an SVG.
    """
    out, kind = Path(out), picture_format(out)
    partial = Path(f"{out}.{os.getpid()}.partial")
    undated = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[kind]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with plt.rc_context({"svg.hashsalt": "rn50", "pdf.fonttype": 42}):
            figure.savefig(partial, format=kind, dpi=dpi, metadata=undated)
        os.replace(partial, out)
    except OSError as error:
        raise errors.RunError(f"cannot write {out}: {error.strerror or error}") from None
    finally:
        plt.close(figure)
        if partial.exists():
            partial.unlink()


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
