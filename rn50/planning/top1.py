"""Final top-1 over the length of a schedule, and what a recipe is expected to reach by the results in costs.csv."""

import math
from statistics import NormalDist

import numpy as np


def curve(results):
    """Final top-1 as a function of epochs, from {epochs: top-1 in %} of one recipe at two lengths or more.

    The straight line in ln(epochs) through two, else the parabola with the least squares: that is off by 0.07 points
    on average for each of FFCV's six lengths from the other five, straight lines by 0.26 (studies/forecast).
    """
    lengths = sorted(results)
    terms = np.polyfit(np.log(lengths), [results[epochs] for epochs in lengths], min(2, len(lengths) - 1))
    return lambda epochs: float(np.polyval(terms, math.log(epochs)))


def expected_top1(table, family, epochs):
    """(mean, standard deviation, basis) of top-1 at 224 px, single view, in %.

    At a published length of the same family: what was published. Between two: the family's `curve`. Beyond the last:
    what FFCV's last two schedules gain for each factor e of epochs. Figures at 256 px, flip-averaged, are brought to
    224 px, single view.
    """
    rows = sorted((row for row in table.result if row["name"] == family), key=lambda row: float(row["schedule"]))
    points = {float(row["schedule"]): row["value"] for row in rows}
    lengths = sorted(points)
    variance = table.value("seed_sd") ** 2 + table.value("published_sd") ** 2 + table.value("ours_sd") ** 2
    if epochs in points:
        top1, basis = points[epochs], f"published {points[epochs]:g} % ({rows[0]['note']})"
        if rows[0]["low"] is not None:
            basis = f"{rows[0]['low']:g} to {rows[0]['high']:g} %: {rows[0]['source']}"
    elif epochs > lengths[-1]:
        factors = math.log(epochs / lengths[-1])
        top1 = points[lengths[-1]] + gain_per_factor_e(table) * factors
        variance += (table.value("gain_sd") * factors) ** 2
        basis = f"projected from published {points[lengths[-1]]:g} % after {lengths[-1]:g} epochs ({rows[0]['note']}"
        basis += f"; {rows[-1]['source']})"
    else:
        after = next(length for length in lengths if length > epochs)
        before = max((length for length in lengths if length < epochs), default=None)
        if before is None:
            raise ValueError(f"{family} has no published result at or below {epochs} epochs")
        top1 = curve(points)(epochs)
        basis = f"projected between published {points[before]:g} and {points[after]:g} % ({rows[0]['note']})"
    if rows[0]["low"] is not None:
        variance += ((rows[0]["high"] - rows[0]["low"]) ** 2) / 12
    if rows[0]["note"] == "256 px flip":
        correction, spread = view_correction(table)
        top1, variance = top1 + correction, variance + spread**2
        basis += f", {correction:+.2f} for 224 px single"
    return top1, math.sqrt(variance), basis


def view_correction(table):
    """(points, standard deviation) from 256 px flip-averaged to 224 px single view, for a network trained at 192 px."""
    names = ("view_resolution", "view_flip")
    return sum(table.value(name) for name in names), math.hypot(*(table.sd(name) for name in names))


def gain_per_factor_e(table):
    """Points of top-1 that FFCV's two longest schedules are apart, for each factor e of epochs."""
    ffcv = sorted((float(row["schedule"]), row["value"]) for row in table.result if row["name"] == "ffcv")
    (shorter, low), (longer, high) = ffcv[-2:]
    return (high - low) / math.log(longer / shorter)


def probability(target, top1, spread):
    """P(top-1 >= target) of a normal distribution."""
    return 1 - NormalDist(top1, spread).cdf(target)
