"""A plan as a figure: dollars against top-1, what is the most for the money, and the recommended point."""

from matplotlib.transforms import Bbox

from rn50.planning.plots import boxes_along, place, plt, write
from rn50.planning.projection import frontier, too_old, total

# So many machines are named at most, the recommended one among them.
NAMED = 6
# The axis of dollars ends at so many budgets, and that of top-1 begins so many points below the target: what costs
# more, or reaches less, is of no use.
BUDGETS, POINTS = 4, 4
GREY, BLUE, RED, GREEN = "0.72", "#1f5fa8", "#c0392b", "#2e8b57"


def draw(rows, *, budget, target, priced, basis):
    """A matplotlib figure of a plan's `rows` (projection.plan). priced: such as "spot"; basis: what it rests on."""
    figure, axis = plt.subplots(figsize=(9, 5.6), layout="constrained")
    draw_plan(axis, rows, budget=budget, target=target)
    low, high = axis.get_ylim()
    axis.set_ylim(low, high + 0.12 * (high - low))  # room for the machines' names
    axis.set_xlabel(f"projected dollars of all stages, {priced} (log scale)")
    axis.set_ylabel("projected top-1 (%), 224 px, single view")
    figure.suptitle(f"{basis}.", x=0.01, ha="left", fontsize=11, fontweight="bold")
    axis.set_title(
        "Star: the plan's choice. Blue: the most top-1 for the money. Grey: other recipes and machines.\n"
        "Green: within the budget and at the target. Bars hold 80 %.",
        loc="left",
        fontsize=9.5,
        color="0.35",
    )
    green = {"color": GREEN, "fontsize": 9, "clip_on": True}
    axis.text(0.012, target, f"target {target:g} %", transform=axis.get_yaxis_transform(), va="bottom", **green)
    axis.text(budget, 0.015, f" budget ${budget:g}", transform=axis.get_xaxis_transform(), **green)
    figure.draw_without_rendering()
    best, line = recommended(rows), frontier(rows)
    taken = _boxes(axis, line, best)
    if best:
        text = f"{best['recipe']} on {best['instance']} {priced}, ${total(best)['dollars']:.0f}"
        style = {"fontsize": 10.5, "fontweight": "bold", "color": RED}
        places = [(-11, 7, "right"), (-9, 26, "right"), (9, -22, "left"), (-9, -22, "right"), (9, 26, "left")]
        if not place(axis, at(best), text, taken, places, **style):
            write(axis, at(best), text, (11, 9), "left", **style)
    for row in reversed(line):
        if best is None or row["recipe"] != best["recipe"]:
            places = [(-6, 8, "right"), (-7, 0, "right"), (6, -9, "left"), (-6, -9, "right"), (6, 8, "left")]
            place(axis, at(row), row["recipe"], taken, places[row is line[-1] :], fontsize=9, color=BLUE)
    _name_machines(axis, rows, best)
    return figure


def draw_plan(axis, rows, *, budget, target):
    """The points, the frontier, the star with its ranges, the shade of what is wanted, and limits that show them."""
    best, line = recommended(rows), frontier(rows)
    dollars, top1 = _points(rows)
    low = min(*_points([*line, best])[0], budget) / 1.3 if best else min(dollars) / 1.3
    high = 1.15 * max(dollars)
    if best:
        # the star and the budget are shown wherever they are, unless the budget is far beyond all
        high = max(min(high, BUDGETS * budget), 1.6 * total(best)["dollars"], min(1.4 * budget, 2 * high))
    axis.set_xscale("log")
    axis.set_xlim(low, high)
    axis.fill_between([low, min(budget, high)], target, 100, color=GREEN, alpha=0.10, lw=0, zorder=0)
    axis.axhline(target, color=GREEN, ls="--", lw=1, zorder=1)
    axis.axvline(budget, color=GREEN, ls="--", lw=1, zorder=1)
    axis.scatter(dollars, top1, s=12, color=GREY, zorder=2, lw=0)
    axis.plot(*_points(line), "o-", color=BLUE, ms=5, lw=1.6, zorder=3)
    if best:
        axis.errorbar(*_points([best]), *_ranges(best), color=RED, elinewidth=1, capsize=2.5, zorder=4)
        axis.plot(*_points([best]), "*", color=RED, ms=17, mec="white", mew=0.8, zorder=5)
    highest = max([*top1, *([best["top1_high"]] if best else [])])
    axis.set_ylim(
        max(min(top1) - 0.6, min(target, best["top1"] if best else target) - POINTS),
        max(highest, target if target < highest + 1 else 0) + 0.15,
    )
    ticks = [base * 10.0**power for power in range(-2, 6) for base in (1, 2, 5)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    axis.set_xticks(ticks, [f"${tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def recommended(rows):
    """The row that the plan's first line is about; None where it is about a machine that cannot run it."""
    return None if too_old(rows[0]) else rows[0]


def at(row):
    """Where a row is: dollars, top-1."""
    return total(row)["dollars"], row["top1"]


def _points(rows):
    return [at(row)[0] for row in rows], [at(row)[1] for row in rows]


def _ranges(row):
    """How far the row's ranges reach below and above: of top-1, of dollars; as `errorbar` takes them."""
    spent = total(row)
    return (
        [[row["top1"] - row["top1_low"]], [row["top1_high"] - row["top1"]]],
        [[spent["dollars"] - spent["dollars_low"]], [spent["dollars_high"] - spent["dollars"]]],
    )


def _boxes(axis, line, best):
    """What no label may cover, in pixels: the frontier and the star with its ranges."""
    boxes = boxes_along(axis, *_points(line))
    if best:
        spent = total(best)
        corners = [(spent["dollars"], best["top1_low"]), (spent["dollars"], best["top1_high"])]
        corners += [(spent["dollars_low"], best["top1"]), (spent["dollars_high"], best["top1"])]
        (x, y0), (_, y1), (x0, y), (x1, _) = axis.transData.transform(corners)
        boxes += [Bbox.from_extents(x - 3, y0, x + 3, y1), Bbox.from_extents(x0, y - 3, x1, y + 3)]
    return boxes


def _name_machines(axis, rows, best):
    """The names of some machines, above their points of the recipe with the most top-1."""
    most = max(row["top1"] for row in rows)
    row_of = {row["instance"]: row for row in rows if row["top1"] == most}
    low, high = axis.get_xlim()
    left, taken = NAMED - bool(best), []
    if best and best["top1"] == most:
        taken.append(axis.transData.transform((total(best)["dollars"], most))[0])
    for name, row in sorted(row_of.items(), key=lambda item: total(item[1])["dollars"]):
        x = total(row)["dollars"]
        pixel = axis.transData.transform((x, most))[0]
        # the star's label names its own; slanted names a line's height apart do not touch
        far_enough = all(abs(pixel - other) > 20 for other in taken)
        if left and far_enough and low < x < high / 1.15 and (best is None or name != best["instance"]):
            write(axis, at(row), name, (-1, 6), "left", va="bottom", fontsize=8.5, color="0.4", rotation=40)
            taken.append(pixel)
            left -= 1
