"""Draw training curves: `python tools/plot_log.py RUN... --out curves.png`, RUN a run folder or its log.jsonl."""

import argparse

from rn50.command import run
from rn50.planning.plots import draw, read_log, run_names, save


def main(argv=None):
    parser = argparse.ArgumentParser(
        description="Draw loss, accuracy, learning rate and resolution over epochs, top-1 over hours and dollars."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder, or its log.jsonl")
    parser.add_argument("--out", required=True, metavar="PNG")
    args = parser.parse_args(argv)
    logs = []
    for path in args.runs:
        rows, notes = read_log(path)
        logs.append(rows)
        for note in notes:
            print(f"note: {note}")
    save(draw(logs, run_names(args.runs)), args.out)
    print(f"{args.out}: {len(logs)} run{'s' if len(logs) > 1 else ''}")


if __name__ == "__main__":
    run(main)
