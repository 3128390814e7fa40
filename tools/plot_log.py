"""Draw training curves: `python tools/plot_log.py RUN... --out curves.png`, RUN a run folder or its log.jsonl."""

import argparse
import json
import os
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

from rn50 import errors

# Panel title -> the keys of a log row it draws, each with its label and line style.
PANELS = {
    "Loss": {"train_loss": ("train", "-"), "val_loss": ("validation", "--")},
    "Accuracy (%)": {"top1": ("top-1", "-"), "top5": ("top-5", "--")},
    "Learning rate": {"lr": ("", "-")},
    "Training resolution (px)": {"resolution": ("", "-")},
}


def read_log(run):
    """(rows, notes) of a run folder or log.jsonl: a dict per epoch, and what was passed over, as text.

    A last line that a killed process left torn is passed over. Raises RunError for a missing or empty
    log and for any other line that is not a JSON object with an epoch.
    """
    path = Path(run)
    if path.is_dir():
        path = path / "log.jsonl"
    try:
        content = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise errors.RunError(f"cannot read {path}: {error.strerror}") from None
    lines = content.splitlines()
    rows, notes = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            if number == len(lines) and not content.endswith("\n"):
                notes.append(f"{path}: line {number} is incomplete and passed over")
                continue
            raise errors.RunError(f"{path}, line {number}: not valid JSON") from None
        if not isinstance(row, dict) or not _is_number(row.get("epoch")):
            raise errors.RunError(f"{path}, line {number}: not an epoch's row (no number under 'epoch')")
        rows.append(row)
    if not rows:
        raise errors.RunError(f"{path} holds no complete row yet")
    return rows, notes


def points(rows, key):
    """(epochs, values) of the rows in which `key` is a number; an epoch that was logged twice counts once, the last."""
    values = {row["epoch"]: row[key] for row in rows if _is_number(row.get(key))}
    epochs = sorted(values)
    return epochs, [values[epoch] for epoch in epochs]


def run_names(runs):
    """A short, distinct legend name for each run: the folder's name, with parents only where two are alike."""
    folders = [Path(run).resolve() for run in runs]
    folders = [folder.parent if folder.suffix == ".jsonl" else folder for folder in folders]
    depth = 1
    while depth < 8 and len({folder.parts[-depth:] for folder in folders}) < len(set(folders)):
        depth += 1
    return ["/".join(folder.parts[-depth:]) for folder in folders]


def draw(logs, names):
    """A matplotlib figure of four panels over epochs, one colour a run. `logs` are lists of rows as from `read_log`."""
    # One range of epochs in all panels: accuracy may be measured in a few of them only.
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained", sharex=True)
    for axis, (title, keys) in zip(axes.flat, PANELS.items(), strict=True):
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
        _finish(axis, title, [style for style in keys.values() if style in drawn] if len(keys) > 1 else [])
    figure.legend(
        [plt.Line2D([], [], color=f"C{index % 10}", lw=3) for index in range(len(names))],
        [_legend_name(name, rows) for name, rows in zip(names, logs, strict=True)],
        loc="outside lower center",
        ncols=min(len(names), 3),
        frameon=False,
    )
    return figure


def save(figure, out):
    """Write the figure as PNG under a temporary name and rename it. Raises RunError when it cannot be written."""
    out = Path(out)
    partial = out.with_name(f"{out.name}.{os.getpid()}.partial")
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


def _finish(axis, title, styles):
    axis.set_title(title, loc="left", fontsize=11)
    axis.set_xlabel("epoch")
    axis.tick_params(labelbottom=True)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
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


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Draw loss, accuracy, learning rate and resolution over epochs.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder, or its log.jsonl")
    parser.add_argument("--out", required=True, metavar="PNG")
    args = parser.parse_args(argv)
    logs = []
    for run in args.runs:
        rows, notes = read_log(run)
        logs.append(rows)
        for note in notes:
            print(f"note: {note}")
    save(draw(logs, run_names(args.runs)), args.out)
    print(f"{args.out}: {len(logs)} run{'s' if len(logs) > 1 else ''}")


if __name__ == "__main__":
    errors.run(main)
