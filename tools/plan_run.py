"""What to rent and which recipe to run for a budget and a target: hours, dollars and expected top-1, with ranges.

    python tools/plan_run.py --budget 25 --target 78
    python tools/plan_run.py --budget 25 --target 78 --spot --json plan.json --png plan.png --proposal proposal.md
    python tools/plan_run.py --budget 25 --target 78 --preflight preflight.json     # measured speeds, not the table's

All figures are projected from published ones (rn50/planning/costs.csv) and compared at 224 px, single view.
"""

import argparse
import json
import math
from pathlib import Path

import yaml

from rn50.command import run
from rn50.errors import RunError, UsageError
from rn50.files import expanded, read_rows, write_result
from rn50.planning import conversion, costs, projection, speeds, top1

ROOT = Path(__file__).resolve().parent.parent
CONFIDENT = 0.9


def main(argv=None):
    args = arguments(argv)
    table = costs.read_table()
    fitted, loader = speeds.fit(table), speeds.loader_rates(table)
    checked = speeds.check(table)
    spread = speeds.prediction_errors(checked)
    recipes = costs.read_recipes(table)
    candidates = [measured_machine(args.preflight)] if args.preflight else costs.machines(table, args.spot)
    if args.instance:
        candidates = [machine for machine in candidates if machine.name == args.instance]
        if not candidates:
            names = [machine.name for machine in costs.machines(table, args.spot)]
            what = "no spot price is known for" if args.spot else "there is no"
            raise UsageError(f"--instance: {what} {args.instance}; known are {', '.join(names)}")
    rows = [
        projection.project(table, fitted, loader, spread, recipe, machine, args.target, args.spot)
        for machine in candidates
        for recipe in recipes
    ]
    add_acceptance(rows)
    rows = ranked(rows, args.budget)
    explain_p3(rows)
    lines = [*report(table, rows, args), *check_lines(table, fitted, loader, checked, spread)]
    print("\n".join(lines))
    if args.elsewhere:
        print("\n".join(elsewhere(table, fitted, loader, spread, rows[0]["recipe"], args)))
    if args.json:
        write_result(args.json, json.dumps(rows, indent=1) + "\n")
    if args.png:
        draw(rows, args)
    if args.proposal:
        write_result(args.proposal, proposal(rows, args))


def measured_machine(path):
    """The machine that tools/preflight.py measured."""
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
        if report["arch"] != "resnet50":
            raise RunError(f"{path} was measured with {report['arch']}; the recipes train resnet50")
        return costs.measured_machine(report)
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is not what tools/preflight.py writes ({error})") from None


def add_acceptance(rows):
    """Give each row `both`: what it and the acceptance run before it cost together, on the same machine, or None."""
    first = {row["instance"]: row for row in rows if row["recipe"] == top1.ACCEPTANCE}
    for row in rows:
        before = first.get(row["instance"]) if row["probability_after_acceptance"] is not None else None
        sums = ("hours", "dollars", "dollars_low", "dollars_high")
        row["both"] = {key: round(row[key] + before[key], 2) for key in sums} if before else None


def total(row):
    """Hours and dollars of all that a row's plan has: with the acceptance run, where there is one."""
    return row["both"] or row


def chance(row):
    """P of the target, once there has been what comes before."""
    return row["probability_after_acceptance"] if row["both"] else row["probability_of_target"]


def ranked(rows, budget):
    """First what reaches the target and stays within the budget, cheapest first; then what is likeliest to."""

    def key(row):
        if chance(row) >= CONFIDENT:
            return too_old(row), total(row)["dollars_high"] > budget, total(row)["dollars"]
        return too_old(row), 2, -row["top1"], row["dollars"]

    return sorted(rows, key=key)


def explain_p3(rows):
    """A V100 is what old guides name: say in its rows what it costs against the cheapest machine."""
    cheapest = {}
    for row in rows:
        best = cheapest.setdefault(row["recipe"], row)
        if row["dollars"] < best["dollars"]:
            cheapest[row["recipe"]] = row
    for row in rows:
        best = cheapest[row["recipe"]]
        if too_old(row) and best is not row:
            reason = f"not this one: {row['dollars'] / best['dollars']:.1f} x the dollars of {best['instance']}"
            row["notes"] = f"{reason}; {row['notes']}"


def too_old(row):
    """Whether the pinned PyTorch has no code for the machine's GPU, a V100."""
    return row["instance"].startswith("p3.")


def report(table, rows, args):
    """The lines of the terminal: the recommendation first."""
    yield recommendation(rows, args)
    yield f"{basis(args)}. Ranges hold 80 %."
    yield ""
    yield from two_stages(table, rows, args)
    best = rows[0]
    machines = [row for row in rows if row["recipe"] == best["recipe"]]
    recipes = [row for row in rows if row["instance"] == best["instance"]]
    if len(machines) > 1:
        yield f"{best['recipe']} on every machine"
        yield from table_lines(machines, args)
        yield ""
    yield f"every recipe on {best['instance']}"
    yield from table_lines(recipes, args)
    yield ""
    yield "hours +-: how far published runs were from such projections, see below. top-1: %, 224 px, single view."
    yield (
        f"P after: P(>= target) after an acceptance run of {top1.ACCEPTED} % or more, whose hours and dollars are not "
        "in the row."
    )
    month = sum(speeds.beton_gb(table, side) for side in costs.LADDER) * table.value("s3_dollars_gb_month")
    yield (
        "dollars: set-up, staging, training, evaluation. Not in it: the conversion, once "
        f"(${converting(table)[1]:.2f} on EC2), S3 (${month:.0f} a month)."
    )
    yield "limit: what sets the pace; memory: the recipe's micro-batch may not fit the GPU."
    yield f"Basis of {best['recipe']} on {best['instance']}: {best['basis']}."
    yield ""


def basis(args):
    speed = "Hours projected from tools/preflight.py's measurement, top-1" if args.preflight else "Projected"
    return f"{speed} from published figures; no ImageNet run has been made with this code yet"


def priced(args):
    return "its price" if args.preflight else "spot" if args.spot else "on demand"


def table_lines(rows, args):
    yield (
        f"{'instance':<14}{'recipe':<24}{'hours':>6}{'+-':>5}{'dollars':>9}{'range':>11}{'top-1':>7}{'range':>14}"
        f"{f'P(>={args.target:g})':>8}{'P after':>8}  {'limit':<7}notes"
    )
    for row in rows:
        dollars = f"{row['dollars_low']:.0f} to {row['dollars_high']:.0f}"
        top1s = f"{row['top1_low']:.1f} to {row['top1_high']:.1f}"
        after = f"{row['probability_after_acceptance']:.2f}" if row["both"] else ""
        yield (
            f"{row['instance']:<14}{row['recipe']:<24}{row['hours']:>6.1f}{row['hours_error']:>5.0%}"
            f"{row['dollars']:>9.2f}{dollars:>11}{row['top1']:>7.2f}{top1s:>14}{row['probability_of_target']:>8.2f}"
            f"{after:>8}  {row['limited_by']:<7}{row['notes']}"
        ).rstrip()


def money(row):
    return f"${row['dollars']:.0f} (${row['dollars_low']:.0f} to ${row['dollars_high']:.0f})"


def recommendation(rows, args):
    best, limit = rows[0], f"${args.budget:g}"
    if too_old(best):
        return f"Not on {best['instance']}: {best['notes']}."
    place = f"on {best['instance']} ({priced(args)})"
    stages = f"in two stages, {top1.ACCEPTANCE} and {best['recipe']}" if best["both"] else best["recipe"]
    odds = f"P(>= {args.target:g}) = {chance(best):.2f}" + (" after a passed first stage" if best["both"] else "")
    run = (
        f"{stages} {place}: about {total(best)['hours']:.0f} h and {money(total(best))}, expected top-1 "
        f"{best['top1']:.1f} % ({best['top1_low']:.1f} to {best['top1_high']:.1f}), {odds}."
    )
    sure, fits = chance(best) >= CONFIDENT, total(best)["dollars_high"] <= args.budget
    if sure and fits:
        then = "" if args.preflight else " Run tools/preflight.py there before you pay for the rest."
        return f"Recommended: {run}{then}"
    if not sure:
        verdict = f"No recipe here reaches {args.target:g} % with confidence; the likeliest is {run}"
    else:
        over = "its range reaches beyond" if total(best)["dollars"] <= args.budget else "it costs more than"
        verdict = f"{limit} is not safe for {args.target:g} %: {over} that {run}"
    if not (args.spot or args.preflight):
        verdict += " Spot machines cost less: see --spot."
    affordable = [row for row in rows if total(row)["dollars_high"] <= args.budget and not too_old(row)]
    if not affordable:
        return f"{verdict} Nothing else here fits {limit} either."
    fit = max(affordable, key=lambda row: (chance(row), row["top1"], -row["dollars"]))
    first = f"{top1.ACCEPTANCE} and " if fit["both"] else ""
    return (
        f"{verdict} The most that {limit} surely buys: {first}{fit['recipe']} on {fit['instance']}, "
        f"{money(total(fit))}, {fit['top1']:.1f} % expected, P(>= {args.target:g}) = {chance(fit):.2f}."
    )


def two_stages(table, rows, args):
    """The plan of the best row: what comes first, when to go on, what it all rests on."""
    best = rows[0]
    if not best["both"] or too_old(best):
        return
    (first,) = [row for row in rows if (row["recipe"], row["instance"]) == (top1.ACCEPTANCE, best["instance"])]
    family, epochs = table.recipe[best["recipe"]]["schedule"], len(recipe_named(best["recipe"]).resolutions)
    expected = top1.outlook(table, family, epochs)
    passes, _ = top1.acceptance(table, expected, args.target)
    reaches = f"P(>= {args.target:g})"
    hours, dollars, low, high, machine = converting(table)
    yield f"The plan, on one {best['instance']}, {priced(args)}:"
    yield (
        f"  0. tools/ec2.py convert --from hf, once: {hours:.1f} h, ${dollars:.2f} (${low:.2f} to ${high:.2f}), on one "
        f"{machine} on demand."
    )
    yield (
        f"  1. {first['recipe']}: {first['hours']:.0f} h, {money(first)}. Published: "
        f"{top1.first_stage(table).published:g} %; expected here: "
        f"{first['top1']:.1f} %."
    )
    yield f"     Go on at {top1.ACCEPTED} % or more: P = {passes:.2f}. Below, find out why first."
    yield (
        f"  2. {best['recipe']}: {best['hours']:.0f} h, {money(best)}. Expected: {best['top1']:.1f} % "
        f"({best['top1_low']:.1f} to {best['top1_high']:.1f})."
    )
    yield (
        f"     {reaches} = {chance(best):.2f} after a passed first stage, {best['probability_of_target']:.2f} before "
        "anything is known."
    )
    yield (
        f"  Both: {best['both']['hours']:.0f} h, {money(best['both'])}; with the conversion "
        f"${best['both']['dollars'] + dollars:.0f}."
    )
    here = [row for row in rows if row["instance"] == best["instance"]]
    enough = [row for row in here if row["probability_of_target"] >= CONFIDENT]
    within = [row for row in here if row["dollars"] <= args.budget]
    if within and not any(row in within for row in enough):
        likeliest = max(within, key=lambda row: row["probability_of_target"])
        known = [likeliest, *sorted(enough, key=lambda row: row["dollars"])[:1]]
        odds = ", ".join(f"{r['recipe']} has {r['probability_of_target']:.2f} for ${r['dollars']:.0f}" for r in known)
        yield f"  Without the first stage no recipe here has {CONFIDENT:g} for ${args.budget:g} or less: {odds}."
    yield ""
    yield f"What {reaches} of {best['recipe']} rests on, and what it would be were one thing otherwise"
    yield f"{'':<60}{'P after':>8}{'before':>8}"
    for name, after, before in top1.sensitivity(table, family, epochs, args.target):
        yield f"  {name:<58}{after:>8.2f}{before:>8.2f}"
    yield f"  {'the first stage says nothing about the second':<58}{expected.probability(args.target):>8.2f}"
    yield (
        f"  Repeats by others: {expected.bias:+.2f} points on average, {expected.spread:.2f} to expect all in all; "
        "sources in costs.csv."
    )
    yield ""


def converting(table):
    """(hours, dollars, lowest, highest dollars, instance type) of making the betons on EC2 from Hugging Face."""
    dollars, hours, machine = conversion.offers(table, "hf")[0]
    return hours[0], dollars, hours[1] * machine["value"], hours[2] * machine["value"], machine["name"]


def recipe_named(name):
    return costs.read_recipe(costs.CONFIGS / f"{name}.yaml")


def elsewhere(table, fitted, loader, spread, name, args):
    """The best recipe on machines that are not EC2's."""
    yield ""
    yield f"{name} elsewhere (tools/ does not launch there; betons must be brought)"
    recipe, places = recipe_named(name), costs.places(table)
    rows = [projection.project(table, fitted, loader, spread, recipe, place, args.target) for place in places]
    yield f"{'place':<42}{'$/h':>7}{'hours':>7}{'+-':>5}  dollars"
    for row, machine in sorted(zip(rows, places, strict=True), key=lambda pair: pair[0]["dollars"]):
        yield (
            f"{row['instance']:<42}{machine.dollars_per_hour:>7.2f}{row['hours']:>7.1f}{row['hours_error']:>5.0%}  "
            f"{money(row):<20}{row['notes']}"
        ).rstrip()


def check_lines(table, fitted, loader, checked, spread):
    yield "Training images/s of one GPU at 224 px (independent published sources; 0: from its memory bandwidth)"
    known = {row["gpu"]: fitted.gpu_rate(row["gpu"], table.gpu[row["gpu"]]["value"]) for row in table.instance}
    yield ", ".join(f"{gpu} {rate:.0f} ({sources})" for gpu, (rate, sources) in known.items())
    yield (
        f"Loader images/s of one vCPU, all of them busy, 160 px from 500 px: ours {loader['rn50']:.0f} (projected: "
        f"measured against stock FFCV in one run, x {table.value('loader_margin'):g}), stock FFCV {loader['ffcv']:.0f} "
        "(published)"
    )
    yield ""
    yield "How wrong the hours may be: every published run predicted without its own source"
    yield (
        f"{'source':<20}{'GPUs':<18}{'px x epochs':<20}{'observed h':>10}{'predicted h':>12}{'error':>7}"
        f"{'other sources':>15}"
    )
    for row in checked:
        gpus = f"{row['gpus']} x {row['gpu']}"
        yield (
            f"{row['source']:<20}{gpus:<18}{row['schedule']:<20}{row['observed']:>10.2f}{row['predicted']:>12.2f}"
            f"{row['error']:>+7.0%}{row['sources']:>15}  {'' if row['counted'] else 'not counted: '}{row['note']}"
        ).rstrip()
    yield (
        f"typical error: {math.expm1(spread[True]):.0%} on a GPU that other sources measured, "
        f"{math.expm1(spread[False]):.0%} on one that none did (0: from its memory bandwidth); median of the sources: "
        f"{speeds.median_error(checked):.0%}"
    )


def draw(rows, args):
    """Dollars against expected top-1, the frontier, the budget and the target."""
    from rn50.planning import plots  # matplotlib takes a second

    plt = plots.plt
    figure, axis = plt.subplots(figsize=(10, 6.5), layout="constrained")
    names = sorted(
        {row["instance"] for row in rows}, key=lambda name: min(r["dollars"] for r in rows if r["instance"] == name)
    )
    for index, name in enumerate(names):
        mine = [row for row in rows if row["instance"] == name]
        marker = "osD^vP"[index // 10]
        axis.scatter(
            [r["dollars"] for r in mine],
            [r["top1"] for r in mine],
            s=26,
            alpha=0.75,
            label=name,
            color=f"C{index % 10}",
            marker=marker,
            zorder=2,
        )
    frontier = []
    for row in sorted(rows, key=lambda row: (row["dollars"], -row["top1"])):
        if not frontier or row["top1"] > frontier[-1]["top1"]:
            frontier.append(row)
    xs, ys = [row["dollars"] for row in frontier], [row["top1"] for row in frontier]
    low = [y - row["top1_low"] for y, row in zip(ys, frontier, strict=True)]
    high = [row["top1_high"] - y for y, row in zip(ys, frontier, strict=True)]
    left = [max(0, x - row["dollars_low"]) for x, row in zip(xs, frontier, strict=True)]
    right = [max(0, row["dollars_high"] - x) for x, row in zip(xs, frontier, strict=True)]
    axis.errorbar(
        xs,
        ys,
        yerr=[low, high],
        xerr=[left, right],
        color="black",
        lw=1.2,
        elinewidth=0.7,
        capsize=2,
        zorder=3,
        label="cheapest for its accuracy, with 80 % ranges",
    )
    height = -math.inf
    for name in sorted(
        {row["recipe"] for row in rows}, key=lambda name: next(r["top1"] for r in rows if r["recipe"] == name)
    ):
        mine = [row for row in rows if row["recipe"] == name]
        height = max(mine[0]["top1"], height + 0.16)  # so that no name covers another
        axis.annotate(
            name,
            (max(row["dollars_high" if row in frontier else "dollars"] for row in mine), height),
            xytext=(8, -3),
            textcoords="offset points",
            fontsize=9,
            fontweight="bold" if any(row in frontier for row in mine) else "normal",
        )
    axis.axhline(args.target, color="C2", ls="--", lw=1, zorder=1)
    axis.axvline(args.budget, color="C3", ls="--", lw=1, zorder=1)
    axis.set_xscale("log")
    # room for the names on the right
    axis.set_xlim(min(xs) / 1.6, 4 * max(row["dollars"] for row in rows))
    ticks = [t for t in (2, 5, 10, 20, 50, 100, 200) if min(xs) / 2 < t < 2 * max(row["dollars"] for row in rows)]
    axis.set_xticks(ticks, [f"${t}" for t in ticks])
    axis.minorticks_off()
    axis.annotate(
        f"budget ${args.budget:g}",
        (args.budget, 0.02),
        xycoords=("data", "axes fraction"),
        xytext=(4, 0),
        textcoords="offset points",
        color="C3",
        fontsize=9,
        annotation_clip=True,
    )
    axis.annotate(
        f"target {args.target:g} %",
        (0.01, args.target),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        color="C2",
        fontsize=9,
    )
    axis.set_xlabel(f"dollars of one run, {priced(args)} (log scale)")
    axis.set_ylabel("expected top-1, %, 224 px, single view")
    axis.set_title(basis(args), loc="left", fontsize=11)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    plots.save(figure, args.png)


def proposal(rows, args):
    """One page of Markdown that asks for AWS credits: what for, how sure, on what evidence."""
    best = rows[0]
    if too_old(best):
        raise UsageError(f"--proposal: not for {best['instance']}: {best['notes']}")
    benchmark = {name: row["value"] for name, row in costs.read_table().loader.items()}
    results = ROOT / "studies" / "imagenette_cpu"
    imagenette = read_rows(results / "log.jsonl")[-1]["top1"]
    px = yaml.safe_load((results / "config.yaml").read_text(encoding="utf-8"))["validation"]["headline_resolution"]
    spelled = ", ".join(f"{name} {value:.1f}" for name, value in best["hours_by_part"].items())
    both, first, odds = total(best), "", f"{chance(best):.2f}"
    if best["both"]:
        first = (
            f" A first stage, `{top1.ACCEPTANCE}`, comes before it: it is published at "
            f"{top1.first_stage(costs.read_table()).published:g} %, and we go on at {top1.ACCEPTED} % or more."
        )
        odds += f" after a passed first stage, {best['probability_of_target']:.2f} before it"
    speed = "tools/preflight.py's measurement on it" if args.preflight else "published throughput"
    hours, dollars, low, high, machine = converting(costs.read_table())
    asked = max(25, 5 * math.ceil((1.5 * both["dollars_high"] + high) / 5))
    return f"""# Request for AWS credits: ResNet-50 on ImageNet to {args.target:g} % top-1

**Goal.** Train ResNet-50 from scratch on ImageNet-1k to at least {args.target:g} % top-1 (224 px, single view, 50,000
validation images) and publish the code, the log, the cost and the weights.

**Plan.** Recipe `{best["recipe"]}` on one {best["instance"]} ({best["vcpus"]} vCPU, {priced(args)}).{first}

| | projected | range (80 %) |
|---|---|---|
| hours of `{best["recipe"]}`, billed | {best["hours"]:.1f} ({spelled}) | +-{best["hours_error"]:.0%} (typical error) |
| ImageNet to the bucket, once ({machine}) | {hours:.1f} h, ${dollars:.2f} | ${low:.2f} to ${high:.2f} |
| hours of all stages | {both["hours"]:.1f} | |
| dollars of all stages | ${both["dollars"]:.2f} | ${both["dollars_low"]:.2f} to ${both["dollars_high"]:.2f} |
| top-1, 224 px, single view | {best["top1"]:.2f} % | {best["top1_low"]:.2f} to {best["top1_high"]:.2f} % |
| P(top-1 >= {args.target:g} %) | {odds} | |

**We ask for ${asked}**: the upper ends of these ranges, and half of the stages' again for a rehearsal and a repeat.

**Evidence so far.**

- Projected: hours and dollars from {speed}, top-1 from published results (`tools/plan_run.py`; every
  figure with its source in `rn50/planning/costs.csv`). Basis: {best["basis"]}.
- Measured: ResNet-50 from scratch on Imagenette (ten classes) on a CPU, {imagenette:.1f} % top-1 at {px} px, single \
view
  (studies/imagenette_cpu).
- Measured: our loader gives {benchmark["rn50"]:.0f} images/s on one thread, stock FFCV \
{benchmark["ffcv"]:.0f} (studies/loader).
- Not yet: no ImageNet run has been made with this code.

**Risks, and what we do about them.**

- The machine is slower than projected: `tools/preflight.py` measures ten minutes first and says go or no-go.
- The run goes wrong: it says when something looks wrong (docs/recipes.md says what it notices), and the first stage
  costs less than a third of the second.
- It costs more than projected: it writes a checkpoint and stops before its limit in dollars.
- Interruption: a run continues from its last checkpoint when the command is repeated.
- The price or quota changes: prices are those of rn50/planning/costs.csv; a quota of {best["vcpus"]} vCPU is needed.

**Team.** Names, course and contact: *fill in*.
"""


def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=positive, required=True, help="dollars")
    parser.add_argument("--target", type=positive, required=True, help="top-1 in %%, 224 px, single view")
    parser.add_argument("--instance", help="only this EC2 type, all recipes")
    parser.add_argument("--spot", action="store_true", help="spot prices, where one was seen")
    parser.add_argument(
        "--preflight", type=expanded, metavar="JSON", help="speeds that tools/preflight.py measured, not the table's"
    )
    parser.add_argument("--elsewhere", action="store_true", help="the best recipe also on machines that are not EC2's")
    parser.add_argument("--json", type=expanded, metavar="OUT", help="all rows as a list")
    parser.add_argument("--png", type=expanded, metavar="OUT", help="dollars against top-1")
    parser.add_argument("--proposal", type=expanded, metavar="OUT.md", help="one page asking for AWS credits")
    args = parser.parse_args(argv)
    if args.preflight and (args.instance or args.spot):
        parser.error("--preflight is one machine at the price it was given: leave out --instance and --spot")
    return args


def positive(text):
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


if __name__ == "__main__":
    run(main)
