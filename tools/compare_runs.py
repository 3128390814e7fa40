"""One run or several: how each ended, its top-1, hours, dollars and forecast, the settings that differ, the curves.

    python tools/compare_runs.py runs/first --out curves.png
    python tools/compare_runs.py runs/first runs/second --out curves.svg --json compare.json
    python tools/compare_runs.py runs/first runs/second --out figure.pdf --paper hours

RUN is a run folder or a file in it, or another log.jsonl, whose settings and status nobody knows. The figure has all
that the logs have: loss, accuracy, learning rate and resolution over epochs, and top-1 over hours and dollars. With
--paper it is one panel, and its caption is printed.
"""

import argparse
import json
import textwrap
from pathlib import Path

import yaml

from rn50 import errors
from rn50.command import run
from rn50.files import expanded, file_of_run, write_result
from rn50.planning import plots
from rn50.words import counted

# Where and how fast a run is, and not what it computes.
NOT_COMPARED = ("logging.", "budget.", "data.dir", "data.workers", "data.timeout_minutes", "training.device")
VIEWS = {"single": "single view", "flip": "averaged with the mirror image"}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "runs", nargs="+", type=expanded, metavar="RUN", help="a run folder or a file in it, or a log.jsonl alone"
    )
    parser.add_argument(
        "--out", type=expanded, metavar="FILE", help="draw the curves of them all: a .png, .svg or .pdf"
    )
    parser.add_argument(
        "--paper", choices=plots.COSTS, help="let FILE be one panel, 89 mm wide: top-1 against this; prints a caption"
    )
    parser.add_argument("--json", type=expanded, metavar="JSON", help="the table's rows and the settings that differ")
    args = parser.parse_args(argv)
    if args.paper and not args.out:
        parser.error("--paper is for the figure: add --out FILE")
    if args.out:
        plots.picture_format(args.out)
    logs, notes = zip(*(plots.read_log(run) for run in args.runs), strict=True)
    configs = [read_config(run) for run in args.runs]
    names = plots.run_names(args.runs)
    rows = [
        describe(name, run, log, config) for name, run, log, config in zip(names, args.runs, logs, configs, strict=True)
    ]
    differing = differences(configs)
    passed_over = [f"note: {note}" for of_run in notes for note in of_run]
    print("\n".join([*table_lines(rows), *passed_over, *remarks(rows, logs), *difference_lines(differing, configs)]))
    if args.json:
        write_result(args.json, json.dumps({"runs": rows, "differing": differing}, indent=1) + "\n")
        print(f"wrote {args.json}")
    if args.out:
        draw(args, logs, names, [evaluation(config) for config in configs])
        print(f"wrote {args.out} ({counted(len(logs), 'run')})")


def draw(args, logs, names, evaluations):
    if not args.paper:
        plots.save(plots.draw(logs, names, evaluations), args.out)
        return
    plots.save(plots.draw_paper(logs, names, args.paper), args.out, dpi=600)
    print(textwrap.fill(f"caption: {plots.caption(logs, names, evaluations, args.paper)}", 80))


def evaluation(config):
    """At which resolution and view the run's top-1 is, in words; None where nobody knows."""
    if config is None:
        return None
    validation = config["validation"]
    return f"{validation['headline_resolution']} px, {VIEWS[validation['headline_view']]}"


def read_config(run):
    """The config.yaml of a run, a nested dict; None for a log alone."""
    path = file_of_run(run, "config.yaml")
    if path.name != "config.yaml" or (Path(run).is_file() and not path.exists()):
        return None
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8", errors="replace"))
        needed = {"training": ["epochs"], "validation": ["headline_resolution", "headline_view"]}
        complete = all(config[section][key] is not None for section, keys in needed.items() for key in keys)
        complete = complete and config["validation"]["headline_view"] in VIEWS
        complete = complete and all(isinstance(keys, dict | None) for keys in config.values())
    except OSError as error:
        raise errors.RunError(f"{run} is not a run folder: cannot read its config.yaml: {error.strerror}") from None
    except (yaml.YAMLError, KeyError, TypeError, AttributeError):
        complete = False
    if not complete:
        raise errors.RunError(f"{path} is not the config of a run")
    return config


def describe(name, run, log, config):
    """One row of the table: plain values, None where the log does not say."""
    evaluated = [row for row in log if row.get("top1") is not None]
    last = evaluated[-1] if evaluated else {}
    hours, dollars = plots.hours(log), [row["dollars"] for row in log if row.get("dollars") is not None]
    seconds, images = sum(row.get("train_seconds") or 0 for row in log), log[-1].get("images_seen")
    validation = config["validation"] if config else None
    return {
        "run": name,
        "status": status(run),
        "epochs_done": log[-1]["epoch"] + 1,
        "epochs": config["training"]["epochs"] if config else None,
        "top1": last.get("top1"),
        "top1_low": last.get("top1_low"),
        "top1_high": last.get("top1_high"),
        "top1_epoch": last["epoch"] + 1 if last else None,
        "evaluation": f"{validation['headline_resolution']} px {validation['headline_view']}" if config else None,
        "hours": max(hours.values()) if hours else None,
        "dollars": dollars[-1] if dollars else None,
        "images_per_second": images / seconds if images and seconds else None,
        "forecast": log[-1].get("forecast"),
    }


def status(run):
    """The word of status.json; a run that is going on, or was killed, has none, and neither has a log alone."""
    path = file_of_run(run, "status.json")
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["status"]) if path.name == "status.json" else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def differences(configs):
    """{section.key: [value of each run]} where configs differ; None where one does not have it, or a run has none."""
    flat = [
        {f"{section}.{key}": value for section, keys in (config or {}).items() for key, value in (keys or {}).items()}
        for config in configs
    ]
    known = [config for config in flat if config]
    names = dict.fromkeys(name for config in known for name in config)
    return {
        name: [config.get(name) for config in flat]
        for name in names
        if not name.startswith(NOT_COMPARED) and any(config.get(name) != known[0].get(name) for config in known)
    }


def table_lines(rows):
    cells = [["run", "status", "epochs", "top-1 (95 %)", "at", "hours", "dollars", "img/s", "forecast"]]
    for row in rows:
        top1 = "-" if row["top1"] is None else f"{row['top1']:.2f}"
        if row["top1_low"] is not None:
            top1 += f" ({row['top1_low']:.1f} to {row['top1_high']:.1f})"
        if row["top1_epoch"] not in (None, row["epochs"] or row["epochs_done"]):
            top1 += f" after {row['top1_epoch']}"
        expected = (row["forecast"] or {}).get("top1")
        cells.append(
            [
                row["run"],
                row["status"] or "no status",
                f"{row['epochs_done']}/{row['epochs'] or '?'}",
                top1,
                row["evaluation"] or "-",
                shown(row["hours"], ".2f"),
                shown(row["dollars"], ".2f"),
                shown(row["images_per_second"], ".0f"),
                "-" if expected is None else f"{expected:.1f} at {row['forecast']['evaluation']}",
            ]
        )
    # what no run has is left out
    columns = [column for column in zip(*cells, strict=True) if set(column[1:]) != {"-"}]
    cells, widths = list(zip(*columns, strict=True)), [max(map(len, column)) for column in columns]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def shown(value, form):
    return "-" if value is None else format(value, form)


def remarks(rows, logs):
    if len({row["evaluation"] for row in rows if row["evaluation"]}) > 1:
        yield "note: top-1 is at different resolutions or views: not to be compared across these runs"
    if len({row.get("images") for log in logs for row in log if row.get("images")}) > 1:
        yield "note: the runs were validated on different numbers of images: not the same data"
    for row in rows:
        for warning in (row["forecast"] or {}).get("warnings", []):
            yield f"warning: {row['run']}: {warning['text']}"


def difference_lines(differing, configs):
    if len([config for config in configs if config]) < 2:
        return
    yield ""
    yield "settings that differ" if differing else "no setting differs"
    for name, values in differing.items():
        yield f"  {name}: " + ", ".join(map(str, values))


if __name__ == "__main__":
    run(main)
