"""What each recipe would be on each machine: hours, dollars and expected top-1, with ranges; and which is best."""

import math
from statistics import NormalDist

from rn50.planning import speeds, top1

# 80 % of a normal distribution lies within so many standard deviations.
Z_80 = NormalDist().inv_cdf(0.9)
# With such a P of the target a plan is recommended.
CONFIDENT = 0.9


def plan(table, fitted, loader, errors, machines, recipes, *, budget, target, spot=False):
    """The rows of `project` for every recipe on every machine, each with `both`, the best first (see `ranked`).

    `both`: hours and dollars of the recipe and of the acceptance run before it, on the same machine; None where none
    comes before it.
    """
    rows = [
        project(table, fitted, loader, errors, recipe, machine, target, spot)
        for machine in machines
        for recipe in recipes
    ]
    first = {row["instance"]: row for row in rows if row["recipe"] == top1.ACCEPTANCE}
    for row in rows:
        before = first.get(row["instance"]) if row["probability_after_acceptance"] is not None else None
        sums = ("hours", "dollars", "dollars_low", "dollars_high")
        row["both"] = {key: round(row[key] + before[key], 2) for key in sums} if before else None
    return ranked(rows, budget)


def total(row):
    """Hours and dollars of all that a row's plan has: with the acceptance run, where there is one."""
    return row["both"] or row


def chance(row):
    """P of the target, once there has been what comes before."""
    return row["probability_after_acceptance"] if row["both"] else row["probability_of_target"]


def too_old(row):
    """Whether the pinned PyTorch has no code for the machine's GPU, a V100."""
    return row["instance"].startswith("p3.")


def ranked(rows, budget):
    """First what reaches the target and surely stays within the budget; then what is likeliest to reach it.

    The cheapest first, by what it may cost at most (90 %): a student pays once.
    """

    def key(row):
        if chance(row) >= CONFIDENT:
            return too_old(row), total(row)["dollars_high"] > budget, total(row)["dollars_high"]
        return too_old(row), 2, -row["top1"], row["dollars_high"]

    return sorted(rows, key=key)


def frontier(rows):
    """The rows with more top-1 than all cheaper ones, the cheapest first; none that is too_old."""
    found = []
    for row in sorted(rows, key=lambda row: (total(row)["dollars"], -row["top1"])):
        if not too_old(row) and (not found or row["top1"] > found[-1]["top1"]):
            found.append(row)
    return found


def project(table, fitted, loader, errors, recipe, machine, target, spot=False):
    """The plan's row for one recipe on one machine: plain values; ranges hold 80 % if the errors are normal."""
    parts, limit = speeds.hours(table, fitted, loader, recipe, machine, spot)
    total = sum(parts.values())
    if machine.measured:
        sources, spread, speed_basis = 0, speeds.MEASURED_SPREAD, "speed measured by preflight"
    else:
        _, sources = fitted.gpu_rate(machine.gpu, table.gpu[machine.gpu]["value"])
        spread = errors[sources > 0]
        speed_basis = f"{machine.gpu} measured by {sources} published source{'s' if sources > 1 else ''}"
        if not sources:
            speed_basis = f"{machine.gpu}: no training measurement by anyone, from its memory bandwidth"
    factor = math.exp(Z_80 * spread)
    fixed = parts["setup"] + parts["staging"]
    family = table.recipe[recipe.name]["schedule"]
    expected = top1.outlook(table, family, len(recipe.resolutions))
    # the acceptance run is Mild: it says something of its own family's path
    accepted = family in ("mild", "medium") and recipe.name != top1.ACCEPTANCE
    micro = speeds.fitting_micro_batch(table, recipe, machine)
    notes = [machine.note] if machine.note else []
    if not machine.measured and not sources:
        notes.append(f"nobody has published training on {machine.gpu}")
    if micro < recipe.micro_batch:
        notes.append(f"needs training.micro_batch={micro}, the recipe's {recipe.micro_batch} may not fit {machine.gpu}")
    return {
        "instance": machine.name,
        "recipe": recipe.name,
        "vcpus": machine.vcpus,
        "hours": round(total, 2),
        "hours_error": round(math.expm1(spread), 3),
        "gpu_sources": sources,
        "hours_by_part": {name: round(value, 2) for name, value in parts.items()},
        "dollars": round(total * machine.dollars_per_hour, 2),
        "dollars_low": round((fixed + (total - fixed) / factor) * machine.dollars_low, 2),
        "dollars_high": round((fixed + (total - fixed) * factor) * machine.dollars_high, 2),
        "top1": round(expected.mean, 2),
        "top1_low": round(expected.mean - Z_80 * expected.spread, 2),
        "top1_high": round(expected.mean + Z_80 * expected.spread, 2),
        "evaluation": "224 px single view",
        "probability_of_target": expected.probability(target),
        "probability_after_acceptance": top1.acceptance(table, expected, target)[1] if accepted else None,
        "limited_by": limit,
        "basis": f"{speed_basis}, hours +-{math.expm1(spread):.0%}; top-1 {expected.basis}",
        "notes": "; ".join(notes),
    }
