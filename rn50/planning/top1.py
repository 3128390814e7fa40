"""The top-1 that a recipe is expected to reach, by published results in costs.csv, and how sure that is.

Three things make it up. What was published for such a length: for MosaicML's recipes no single figure says it, so
there are several `readings` of what there is, and how far they lie apart counts. What repeats of published ResNet-50
runs lose against them: most lose something, because what is published is what came out well. And the noise of a run.
"""

import math
from dataclasses import dataclass, replace
from statistics import NormalDist, fmean, stdev

import numpy as np

# The run that comes before the money, and the least top-1 that goes on.
ACCEPTANCE, ACCEPTANCE_EPOCHS, ACCEPTED = "rn50_mild_28", 28, 75.8


@dataclass(frozen=True)
class Outlook:
    """Top-1 at 224 px, single view, in %, as a normal distribution.

    published: the mean of the readings. bias, shared: mean and standard deviation of what every run of this code is
    off by. noise: standard deviation of the rest: seeds, rounding, the readings' distance. readings: {what is read:
    top-1}.
    """

    published: float
    bias: float
    shared: float
    noise: float
    readings: dict
    basis: str

    @property
    def mean(self):
        return self.published + self.bias

    @property
    def spread(self):
        return math.hypot(self.shared, self.noise)

    def probability(self, target):
        """P(top-1 >= target)."""
        return 1 - NormalDist(self.mean, self.spread).cdf(target)


def curve(results):
    """Final top-1 as a function of epochs, from {epochs: top-1 in %} of one recipe at two lengths or more.

    The straight line in ln(epochs) through two, else the parabola with the least squares: that is off by 0.07 points
    on average for each of FFCV's six lengths from the other five, straight lines by 0.26 (studies/forecast).
    """
    lengths = sorted(results)
    terms = np.polyfit(np.log(lengths), [results[epochs] for epochs in lengths], min(2, len(lengths) - 1))
    return lambda epochs: float(np.polyval(terms, math.log(epochs)))


def outlook(table, family, epochs):
    """The Outlook of a recipe of `family` (a name of costs.csv's results) after `epochs`."""
    found, basis = readings(table, family, epochs)
    bias, shared = reproduction(table)
    variance = 2 * table.value("seed_sd") ** 2 + table.value("published_sd") ** 2
    if len(found) > 1:
        variance += stdev(found.values()) ** 2
    if family == "mild" and epochs > table.value("mild_longest"):
        # their authors take another recipe from there on
        variance += (table.value("gain_sd") * math.log(epochs / table.value("mild_longest"))) ** 2
    if family == "ffcv":
        variance += view_correction(table)[1] ** 2
    rows = _results(table, family)
    if rows and rows[0]["low"] is not None:
        variance += (rows[0]["high"] - rows[0]["low"]) ** 2 / 12
    return Outlook(fmean(found.values()), bias, shared, math.sqrt(variance), found, basis)


def readings(table, family, epochs):
    """({what is read: top-1 at 224 px, single view, in %}, a line about their basis)."""
    if family == "mild":
        (run,) = _results(table, "mild")
        anchors = {f"FFCV's curve from the {run['schedule']}-epoch run": run}
        if epochs != float(run["schedule"]):
            for end in ("mild_blog", "mild_file"):
                (row,) = _results(table, end)
                anchors[f"FFCV's curve from {row['value']:g} % after {row['schedule']} epochs"] = row
        found = {name: row["value"] + ffcv_gain(table, float(row["schedule"]), epochs) for name, row in anchors.items()}
        return found, f"{len(found)} readings of MosaicML's Mild: {_spelled(found)}"
    if family == "medium":
        ends = {"60 to 240 epochs": "medium_blog", "67.5 to 234 epochs": "medium_file"}
        found = {f"the line over {name}": curve(_points(table, rows))(epochs) for name, rows in ends.items()}
        # from there on its authors take it in the place of Mild
        found["no more than Mild of its length"] = fmean(readings(table, "mild", epochs)[0].values())
        return found, f"{len(found)} readings of MosaicML's Medium: {_spelled(found)}"
    points = _points(table, family)
    note = _results(table, family)[0]["note"]
    if epochs in points:
        top1, basis = points[epochs], f"published {points[epochs]:g} % ({note})"
    elif len(points) > 1 and min(points) < epochs < max(points):
        top1, basis = curve(points)(epochs), f"projected between published lengths ({note})"
    else:
        raise ValueError(f"{family} has no published results around {epochs} epochs")
    if family == "ffcv":
        correction, _ = view_correction(table)
        top1, basis = top1 + correction, f"{basis}, {correction:+.2f} for 224 px single"
    return {"what was published": top1}, basis


def reproduction(table):
    """(mean, standard deviation) of what a repeat by others has more than what was published, in points, but for seeds.

    From the reproduction rows, one for each source, as a prediction of another one; the seeds of both runs, which are
    in them, are taken out of the spread.
    """
    found = [row["value"] for row in table.reproduction]
    variance = stdev(found) ** 2 * (1 + 1 / len(found)) - 2 * table.value("seed_sd") ** 2
    return fmean(found), math.sqrt(variance)


def first_stage(table):
    """The Outlook of the acceptance run."""
    return outlook(table, table.recipe[ACCEPTANCE]["schedule"], ACCEPTANCE_EPOCHS)


def acceptance(table, expected, target, *, accepted=ACCEPTED):
    """(P(the acceptance run has `accepted` or more), P(top-1 >= target) of `expected`, an Outlook, where it has).

    Both runs are off by the same: what the code does otherwise than the published one. It cannot be seen in one run
    alone, but a bad 28-epoch run makes a bad long one likelier.
    """
    first = first_stage(table)
    off = np.linspace(-5, 5, 401) * expected.shared + expected.bias
    weight = np.exp(-(((off - expected.bias) / expected.shared) ** 2) / 2)
    weight /= weight.sum()
    passes = np.array([1 - NormalDist(first.published + b, first.noise).cdf(accepted) for b in off])
    reaches = np.array([1 - NormalDist(expected.published + b, expected.noise).cdf(target) for b in off])
    passed = float((weight * passes).sum())
    return passed, float((weight * passes * reaches).sum()) / passed


def sensitivity(table, family, epochs, target):
    """[(an assumption that is otherwise, P(top-1 >= target) after a passed acceptance run, before it)], each alone."""
    expected = outlook(table, family, epochs)
    worst = min(table.reproduction, key=lambda row: row["value"])
    cases = [
        ("as it stands", expected),
        ("repeats lose nothing", replace(expected, bias=0.0)),
        (f"ours loses what {worst['name']}'s did: {worst['value']:g}", replace(expected, bias=worst["value"])),
    ]
    if len(expected.readings) > 1:
        only = expected.readings.items()
        cases += [(f"only {name}: {top1:.2f} %", replace(expected, published=top1)) for name, top1 in only]
    if family == "medium":
        mild, gain = fmean(readings(table, "mild", epochs)[0].values()), table.value("sam_gain")
        cases.append((f"SAM gains over Mild what it gained alone: {gain:+g}", replace(expected, published=mild + gain)))
    chosen = table.value("chosen_run")
    luck = replace(expected, published=expected.published + chosen)
    cases.append((f"what was published is the best of three runs: {chosen:g}", luck))
    return [(name, acceptance(table, case, target)[1], case.probability(target)) for name, case in cases]


def ffcv_gain(table, start, end):
    """Points that FFCV's recipe gains from `start` to `end` epochs: by its curve, beyond the longest by its tangent."""
    points = _points(table, "ffcv")
    along, longest = curve(points), max(points)
    slope = (along(longest) - along(0.999 * longest)) / -math.log(0.999)

    def top1(epochs):
        return along(epochs) if epochs <= longest else along(longest) + slope * math.log(epochs / longest)

    return top1(end) - top1(start)


def view_correction(table):
    """(points, standard deviation) from 256 px flip-averaged to 224 px single view, for a network trained at 192 px."""
    names = ("view_resolution", "view_flip")
    return sum(table.value(name) for name in names), math.hypot(*(table.sd(name) for name in names))


def _results(table, name):
    return sorted((row for row in table.result if row["name"] == name), key=lambda row: float(row["schedule"]))


def _points(table, name):
    return {float(row["schedule"]): row["value"] for row in _results(table, name)}


def _spelled(found):
    low, high = min(found.values()), max(found.values())
    return f"{low:.2f} %" if low == high else f"{low:.2f} to {high:.2f} %"
