"""One recipe on one machine: hours, dollars and expected top-1, with ranges."""

import math
from statistics import NormalDist

from rn50.planning import speeds
from rn50.planning.top1 import expected_top1, probability

# 80 % of a normal distribution lies within so many standard deviations.
Z_80 = NormalDist().inv_cdf(0.9)


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
    storage = speeds.beton_gb(table, recipe.rung) * table.value("s3_dollars_gb_month")
    top1, top1_spread, top1_basis = expected_top1(table, table.recipe[recipe.name]["schedule"], len(recipe.resolutions))
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
        "dollars": round(total * machine.dollars_per_hour + storage, 2),
        "dollars_low": round((fixed + (total - fixed) / factor) * machine.dollars_low + storage, 2),
        "dollars_high": round((fixed + (total - fixed) * factor) * machine.dollars_high + storage, 2),
        "top1": round(top1, 2),
        "top1_low": round(top1 - Z_80 * top1_spread, 2),
        "top1_high": round(top1 + Z_80 * top1_spread, 2),
        "evaluation": "224 px single view",
        "probability_of_target": round(probability(target, top1, top1_spread), 3),
        "limited_by": limit,
        "basis": f"{speed_basis}, hours +-{math.expm1(spread):.0%}; top-1 {top1_basis}",
        "notes": "; ".join(notes),
    }
