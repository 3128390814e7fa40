"""Draws the figure of README.md's first screen: what was measured, what others published, what is projected from that.

python studies/first_screen/figure.py                    # writes figure.svg beside this file
"""

import argparse
import itertools
from pathlib import Path

from rn50.command import run
from rn50.files import expanded, read_rows
from rn50.planning import costs, forecast, plan_plot, plots, projection, speeds

HERE = Path(__file__).resolve().parent
IMAGENETTE = HERE.parent / "imagenette_cpu"
BUDGET, TARGET = 25, 78
# 1000 x 390 px in a browser, which draws 96 px to an inch.
SIZE = (1000 / 96, 390 / 96)
STYLE = {"font.size": 11.5, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=expanded, default=HERE / "figure.svg", help="a .svg, .png or .pdf; default: %(default)s"
    )
    out = parser.parse_args(argv).out
    plots.picture_format(out)
    plots.save(draw(), out)
    print(f"wrote {out}")


def draw():
    with plots.plt.rc_context(STYLE):
        figure, axes = plots.plt.subplots(
            1, 3, figsize=SIZE, layout="constrained", gridspec_kw={"width_ratios": [1, 1, 1.15]}
        )
        figure.get_layout_engine().set(wspace=0.06, w_pad=0.06, h_pad=0.06)
        measured(axes[0])
        published(axes[1])
        projected(axes[2])
        axes[0].set_ylabel("top-1, %")
    return figure


def finish(axis, word, what, unit):
    """The panel's word, what it shows in two lines, and what its x-axis is."""
    axis.set_title(what, loc="left", fontsize=10.5, color="0.3")
    axis.annotate(word, (0, 1), (0, 36), "axes fraction", "offset points", fontsize=15, fontweight="bold")
    axis.set_xlabel(unit)
    axis.grid(alpha=0.25)


def measured(axis):
    """The first Imagenette run, whose time was measured, beside the plain loop that was given the same time."""
    looks = {
        "first_log.jsonl": ("rn50", plan_plot.BLUE, "o-", (-9, 5)),
        "baseline_log.jsonl": ("plain\ntorchvision\nloop", "0.35", "s", (6, -88)),
    }
    for name, (label, colour, style, offset) in looks.items():
        rows = read_rows(IMAGENETTE / name)
        minutes = [seconds / 60 for seconds in itertools.accumulate(row["cpu_seconds"] for row in rows)]
        points = [(at, row) for at, row in zip(minutes, rows, strict=True) if row.get("top1") is not None]
        xs, ys = [at for at, _ in points], [row["top1"] for _, row in points]
        low = [row["top1"] - row["top1_low"] for _, row in points]
        high = [row["top1_high"] - row["top1"] for _, row in points]
        axis.errorbar(xs, ys, [low, high], fmt=style, color=colour, ms=6, lw=0.8, elinewidth=1.4, capsize=3)
        axis.annotate(
            f"{label} {ys[-1]:.1f} %",
            (xs[-1], ys[-1]),
            xytext=offset,
            textcoords="offset points",
            ha="right",
            color=colour,
            fontweight="bold",
            arrowprops={"arrowstyle": "-", "color": "0.6", "lw": 0.7, "relpos": (0.93, 1)} if len(xs) == 1 else None,
        )
    axis.set(xlim=(0, 68), ylim=(50, 88), xticks=range(0, 61, 20))
    axis.text(
        0.98, 0.04, "95 % intervals: they overlap", transform=axis.transAxes, ha="right", color="0.4", fontsize=10
    )
    finish(axis, "Measured", "ResNet-50 from scratch on Imagenette,\non two CPU cores", "minutes of processor time")


def published(axis):
    """FFCV's six runs."""
    for row, epochs in zip(plots.published(), forecast.read_curves(), strict=True):
        minutes = [60 * value for value in row["hours"]]
        axis.plot(minutes, row["top1"], color="0.62", lw=1.3)
        axis.plot(minutes[-1], row["top1"][-1], "o", color="0.45", ms=5)
        axis.annotate(
            f"{epochs} epochs" if epochs == 88 else f"{epochs}",
            (minutes[-1], row["top1"][-1]),
            xytext=(-3, 4),
            textcoords="offset points",
            ha="right",
            color="0.3",
        )
    axis.set(xlim=(0, 82), ylim=(50, 82), xticks=range(0, 81, 20))
    finish(axis, "Published", "FFCV's six runs on ImageNet, on 8 A100\n(256 px, with the mirror image)", "minutes")


def projected(axis):
    """The plan on spot machines: every recipe on every machine, and the recommended one."""
    table = costs.read_table()
    spread = speeds.prediction_errors(speeds.check(table))
    rows = projection.plan(
        table,
        speeds.fit(table),
        speeds.loader_rates(table),
        spread,
        costs.machines(table, spot=True),
        costs.read_recipes(table),
        budget=BUDGET,
        target=TARGET,
        spot=True,
    )
    plan_plot.draw_plan(axis, rows, budget=BUDGET, target=TARGET)
    best = rows[0]
    axis.annotate(
        f"{best['recipe']}, ${projection.total(best)['dollars']:.0f}\n{best['instance']} spot",
        (projection.total(best)["dollars"], best["top1"]),
        xytext=(-12, 12),
        textcoords="offset points",
        ha="right",
        color=plan_plot.RED,
        fontweight="bold",
    )
    axis.set_ylim(73.6, 79.9)
    axis.text(BUDGET, 73.7, f" budget ${BUDGET}", color=plan_plot.GREEN, fontsize=10)
    axis.text(
        0.02,
        TARGET,
        f"target {TARGET} %",
        transform=axis.get_yaxis_transform(),
        color=plan_plot.GREEN,
        va="bottom",
        fontsize=10,
    )
    axis.text(BUDGET / 1.05, 73.7, "grey: other recipes\nand machines", ha="right", color="0.4", fontsize=10)
    finish(
        axis,
        "Projected",
        "78 % on ImageNet, one rented GPU: no run\nmade yet (224 px, single view)",
        "dollars, both stages",
    )


if __name__ == "__main__":
    run(main)
