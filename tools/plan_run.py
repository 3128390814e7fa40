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
from rn50.files import read_rows, write_result
from rn50.planning import costs, projection, speeds

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
    rows = ranked(rows, args.budget)
    explain_p3(rows)
    print("\n".join([*report(rows, args), *check_lines(table, fitted, loader, checked, spread)]))
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


def ranked(rows, budget):
    """First what reaches the target and stays within the budget, cheapest first; then what is likeliest to."""

    def key(row):
        sure, affordable = row["probability_of_target"] >= CONFIDENT, row["dollars_high"] <= budget
        if sure:
            return too_old(row), not affordable, row["dollars"]
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


def report(rows, args):
    """The lines of the terminal: the recommendation first."""
    yield recommendation(rows, args)
    yield f"{basis(args)}. Ranges hold 80 %."
    yield ""
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
    yield "dollars: set-up, staging, training, evaluation, a month of betons on S3; making them is not in it ($6 once)."
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
        f"{f'P(>={args.target:g})':>8}  {'limit':<7}notes"
    )
    for row in rows:
        money = f"{row['dollars_low']:.0f} to {row['dollars_high']:.0f}"
        top1 = f"{row['top1_low']:.1f} to {row['top1_high']:.1f}"
        yield (
            f"{row['instance']:<14}{row['recipe']:<24}{row['hours']:>6.1f}{row['hours_error']:>5.0%}"
            f"{row['dollars']:>9.2f}{money:>11}{row['top1']:>7.2f}{top1:>14}{row['probability_of_target']:>8.2f}  "
            f"{row['limited_by']:<7}{row['notes']}"
        ).rstrip()


def recommendation(rows, args):
    best = rows[0]
    if too_old(best):
        return f"Not on {best['instance']}: {best['notes']}."
    run = (
        f"{best['recipe']} on {best['instance']} ({priced(args)}): about {best['hours']:.0f} h and "
        f"${best['dollars']:.0f} (${best['dollars_low']:.0f} to ${best['dollars_high']:.0f}), expected top-1 "
        f"{best['top1']:.1f} % ({best['top1_low']:.1f} to {best['top1_high']:.1f}), P(>= {args.target:g}) = "
        f"{best['probability_of_target']:.2f}."
    )
    if best["probability_of_target"] >= CONFIDENT and best["dollars_high"] <= args.budget:
        then = "" if args.preflight else " Run tools/preflight.py there before you pay for the rest."
        return f"Recommended: {run}{then}"
    if best["probability_of_target"] < CONFIDENT:
        verdict = f"No recipe here reaches {args.target:g} % with confidence; the likeliest is {run}"
    else:
        over = "its range reaches beyond" if best["dollars"] <= args.budget else "it costs more than"
        verdict = f"${args.budget:g} is not safe for {args.target:g} %: {over} that with {run}"
    affordable = [row for row in rows if row["dollars_high"] <= args.budget and not too_old(row)]
    if not affordable:
        return f"{verdict} Nothing else here fits ${args.budget:g} either."
    fit = max(affordable, key=lambda row: (row["top1"], -row["dollars"]))
    return (
        f"{verdict} The most that ${args.budget:g} surely buys: {fit['recipe']} on {fit['instance']}, "
        f"${fit['dollars']:.0f} (${fit['dollars_low']:.0f} to ${fit['dollars_high']:.0f}), "
        f"{fit['top1']:.1f} % expected, P(>= {args.target:g}) = {fit['probability_of_target']:.2f}."
    )


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
        f"{math.expm1(spread[False]):.0%} on one that none did (0: from its memory bandwidth)"
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
    for name in dict.fromkeys(row["recipe"] for row in rows):
        mine = [row for row in rows if row["recipe"] == name]
        axis.annotate(
            name,
            (max(row["dollars_high" if row in frontier else "dollars"] for row in mine), mine[0]["top1"]),
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
    speed = "tools/preflight.py's measurement on it" if args.preflight else "published throughput"
    asked = max(25, 5 * math.ceil(1.5 * best["dollars_high"] / 5))
    return f"""# Request for AWS credits: ResNet-50 on ImageNet to {args.target:g} % top-1

**Goal.** Train ResNet-50 from scratch on ImageNet-1k to at least {args.target:g} % top-1 (224 px, single view, 50,000
validation images) and publish the code, the log, the cost and the weights.

**Plan.** Recipe `{best["recipe"]}` on one {best["instance"]} ({best["vcpus"]} vCPU, {priced(args)}).

| | projected | range (80 %) |
|---|---|---|
| hours, billed | {best["hours"]:.1f} ({spelled}) | +-{best["hours_error"]:.0%} (typical error) |
| dollars | ${best["dollars"]:.2f} | ${best["dollars_low"]:.2f} to ${best["dollars_high"]:.2f} |
| top-1, 224 px, single view | {best["top1"]:.2f} % | {best["top1_low"]:.2f} to {best["top1_high"]:.2f} % |
| P(top-1 >= {args.target:g} %) | {best["probability_of_target"]:.2f} | |

**We ask for ${asked}**: one run at the upper end of its range and half of it again for a rehearsal and a repeat.

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
- The run goes wrong: it is evaluated after every epoch, says when something looks wrong (docs/recipes.md says what it
  notices), and we look after the first third.
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
    parser.add_argument("--preflight", metavar="JSON", help="speeds that tools/preflight.py measured, not the table's")
    parser.add_argument("--json", metavar="OUT", help="all rows as a list")
    parser.add_argument("--png", metavar="OUT", help="dollars against top-1")
    parser.add_argument("--proposal", metavar="OUT.md", help="one page asking for AWS credits")
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
