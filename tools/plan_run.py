"""What to rent and which recipe to run for a budget and a target: hours, dollars and expected top-1, with ranges.

    python tools/plan_run.py --budget 25 --target 78
    python tools/plan_run.py --budget 25 --target 78 --spot --json plan.json --plot plan.svg --proposal proposal.md
    python tools/plan_run.py --budget 25 --target 78 --preflight preflight.json     # measured speeds, not the table's

All figures are projected from published ones (rn50/planning/costs.csv) and compared at 224 px, single view.
"""

import argparse
import json
import math
import re
import textwrap
from pathlib import Path

import yaml

from rn50.command import run
from rn50.errors import RunError, UsageError
from rn50.files import expanded, read_rows, write_result
from rn50.planning import conversion, costs, projection, speeds, top1
from rn50.planning.projection import CONFIDENT, chance, too_old, total

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 80
# Above these a number is a slip of the keyboard.
MOST_DOLLARS, MOST_TOP1 = 100_000, 100


def main(argv=None):
    args = arguments(argv)
    if args.plot:
        from rn50.planning import plan_plot, plots  # matplotlib takes a second

        plots.picture_format(args.plot)
    table = costs.read_table()
    fitted, loader = speeds.fit(table), speeds.loader_rates(table)
    checked = speeds.check(table)
    spread = speeds.prediction_errors(checked)
    candidates = [measured_machine(args.preflight)] if args.preflight else costs.machines(table, args.spot)
    if args.instance:
        candidates = [machine for machine in candidates if machine.name == args.instance]
        if not candidates:
            names = [machine.name for machine in costs.machines(table, args.spot)]
            what = "no spot price is known for" if args.spot else "there is no"
            raise UsageError(f"--instance: {what} {args.instance}; known are {', '.join(names)}")
    wanted = {"budget": args.budget, "target": args.target, "spot": args.spot}
    rows = projection.plan(table, fitted, loader, spread, candidates, costs.read_recipes(table), **wanted)
    explain_p3(rows)
    lines = [*report(table, rows, args), *check_lines(table, fitted, loader, checked, spread)]
    if args.elsewhere:
        lines += elsewhere(table, fitted, loader, spread, rows[0]["recipe"], args)
    print("\n".join(wrapped(lines)))
    if args.json:
        write_result(args.json, json.dumps(rows, indent=1) + "\n")
    if args.plot:
        figure = plan_plot.draw(rows, budget=args.budget, target=args.target, priced=priced(args), basis=basis(args))
        plots.save(figure, args.plot)
    if args.proposal:
        write_result(args.proposal, proposal(rows, args))
    for path in filter(None, (args.json, args.plot, args.proposal)):
        print(f"wrote {path}")


def wrapped(lines):
    """The lines, what is longer than WIDTH broken; what follows a number stands under it, and no % stands alone."""
    for line in lines:
        indent = " " * re.match(r" *(\d+\. )?", line).end()
        together = line.replace(" %", "\N{NO-BREAK SPACE}%")
        broken = textwrap.wrap(together, WIDTH, subsequent_indent=indent, break_on_hyphens=False)
        yield "\n".join(broken).replace("\N{NO-BREAK SPACE}", " ")


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
        yield from machine_lines(machines)
        yield ""
    yield f"every recipe on {best['instance']}"
    yield from recipe_lines(recipes)
    yield ""
    yield (
        "hours +-: how far published runs were from such projections, see below. The GPU sets the pace where no note "
        "says what does. top-1: %, 224 px, single view."
    )
    yield (
        f"P: of {args.target:g} % or more. after: P after an acceptance run of {top1.ACCEPTED} % or more, whose hours "
        "and dollars are not in the row."
    )
    month = sum(speeds.beton_gb(table, side) for side in costs.LADDER) * table.value("s3_dollars_gb_month")
    yield (
        "dollars: set-up, staging, training, evaluation. Not in it: the conversion, once "
        f"(${converting(table)[1]:.2f} on EC2), S3 (${month:.0f} a month)."
    )
    yield f"Basis of {best['recipe']} on {best['instance']}: {best['basis']}."
    yield ""


def basis(args):
    speed = "Hours projected from tools/preflight.py's measurement, top-1" if args.preflight else "Projected"
    return f"{speed} from published figures; no ImageNet run has been made with this code yet"


def priced(args):
    return "its price" if args.preflight else "spot" if args.spot else "on demand"


def machine_lines(rows):
    """A table of one recipe's rows, and their notes below it."""
    yield f"  {'machine':<15}{'hours':>6}{'+-':>5}  dollars (range)"
    for row in rows:
        yield f"  {row['instance']:<15}{row['hours']:>6.1f}{row['hours_error']:>5.0%}  {dollars(row)}"
    yield from note_lines(rows, "instance")


def recipe_lines(rows):
    """A table of one machine's rows, and their notes below it."""
    yield f"{'recipe':<23}{'hours':>6}  {'dollars (range)':<17} {'top-1 (range)':<20}{'P':>5}{'after':>6}"
    for row in rows:
        top1s = f"{row['top1']:.2f} ({row['top1_low']:.1f} to {row['top1_high']:.1f})"
        after = f"{row['probability_after_acceptance']:.2f}" if row["both"] else ""
        yield (
            f"{row['recipe']:<23}{row['hours']:>6.1f}  {dollars(row):<17} {top1s:<20}"
            f"{row['probability_of_target']:>5.2f}{after:>6}"
        ).rstrip()
    yield from note_lines(rows, "recipe")


def note_lines(rows, key):
    """The rows' notes, each once, after what they are of."""
    of = {}
    for row in rows:
        pace = [f"the {row['limited_by']} sets the pace"] * (row["limited_by"] in ("CPU", "disk"))
        for note in [*pace, *filter(None, row["notes"].split("; "))]:
            of.setdefault(note, []).append(row[key])
    together = {}
    for note, names in of.items():
        together.setdefault(tuple(names), []).append(note)
    for names, notes in together.items():
        whose = "all" if len(rows) == len(names) > 1 else ", ".join(names)
        yield f"  {whose}: {'; '.join(notes)}"


def dollars(row):
    return f"{row['dollars']:.2f} ({row['dollars_low']:.0f} to {row['dollars_high']:.0f})"


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
    yield f"{'place':<30}{'$/h':>6}{'hours':>7}{'+-':>5}  dollars (range)"
    pairs = sorted(zip(rows, places, strict=True), key=lambda pair: pair[0]["dollars"])
    for row, machine in pairs:
        yield (
            f"{row['instance']:<30}{machine.dollars_per_hour:>6.2f}{row['hours']:>7.1f}{row['hours_error']:>5.0%}  "
            f"{dollars(row)}"
        )
    yield from note_lines([row for row, _ in pairs], "instance")


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
    yield f"{'source':<21}{'GPUs':<17}{'px x epochs':<20}{'hours':>7}{'ours':>7}{'error':>6}"
    for row in checked:
        if row["counted"]:
            yield check_line(row)
    known = ", ".join(dict.fromkeys(row["source"] for row in checked if row["counted"] and row["note"]))
    yield f"*: no other source has this GPU; from its memory bandwidth. Hours from published images/s: {known}."
    yield (
        f"typical error: {math.expm1(spread[True]):.0%} on a GPU that other sources measured, "
        f"{math.expm1(spread[False]):.0%} on one that none did; median of the sources: "
        f"{speeds.median_error(checked):.0%}"
    )
    yield ""
    yield "Not counted, and why"
    for row in checked:
        if not row["counted"]:
            yield check_line(row)
            yield f"    {row['note']}"


def check_line(row):
    gpus = f"{row['gpus']} x {row['gpu']}"
    return (
        f"{row['source']:<21}{gpus:<17}{row['schedule']:<20}{row['observed']:>7.2f}{row['predicted']:>7.2f}"
        f"{row['error']:>+6.0%}{'' if row['sources'] else '*'}"
    )


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
    parser.add_argument("--budget", type=budget, required=True, help="what you can spend, in dollars")
    parser.add_argument("--target", type=target, required=True, help="top-1 in %%, 224 px, single view, such as 78")
    parser.add_argument("--instance", help="only this EC2 type, all recipes")
    parser.add_argument("--spot", action="store_true", help="spot prices, where one was seen")
    parser.add_argument(
        "--preflight", type=expanded, metavar="JSON", help="speeds that tools/preflight.py measured, not the table's"
    )
    parser.add_argument("--elsewhere", action="store_true", help="the best recipe also on machines that are not EC2's")
    parser.add_argument("--json", type=expanded, metavar="OUT", help="all rows as a list")
    parser.add_argument("--plot", type=expanded, metavar="OUT", help="draw dollars against top-1: a .png, .svg or .pdf")
    parser.add_argument("--proposal", type=expanded, metavar="OUT.md", help="one page asking for AWS credits")
    args = parser.parse_args(argv)
    if args.preflight and (args.instance or args.spot):
        parser.error("--preflight is one machine at the price it was given: leave out --instance and --spot")
    return args


def budget(text):
    dollars = number("--budget", text, "dollars, such as 25")
    if not 0 < dollars <= MOST_DOLLARS:
        raise UsageError(f"--budget: ${text}? Give dollars above 0 and up to {MOST_DOLLARS:,}, such as 25")
    return dollars


def target(text):
    percent = number("--target", text, "top-1 in %, such as 78")
    if 0 < percent < 1:
        raise UsageError(f"--target: {text} %? Write {100 * percent:g}: top-1 is in %")
    if not 1 <= percent < MOST_TOP1:
        raise UsageError(f"--target: {text} %? Give top-1 in %, from 1 to below {MOST_TOP1}, such as 78")
    return percent


def number(option, text, what):
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"{option}: {text} is not a number; give {what}") from None


if __name__ == "__main__":
    run(main)
