"""Hours, dollars and expected top-1 of a recipe on an instance, projected from published figures (costs.csv).

A GPU's training images/s: the geometric mean over independent published sources, each brought to one GPU at 224 px; a
GPU that nobody published gets the images/s for each GB/s of memory bandwidth that the others have. The slowest of GPU,
loader and disk sets the pace. `check` predicts every published run without its own source; how far off that is, is the
range of every projection.
"""

import csv
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist, geometric_mean, mean, median

import yaml

from rn50 import schedules
from rn50.errors import RunError, UsageError

TABLE = Path(__file__).with_name("costs.csv")
CONFIGS = Path(__file__).parents[2] / "rn50_configs"
LOADER_BENCHMARK = Path(__file__).parents[2] / "docs" / "results" / "benchmark_loader" / "160px_1thread.json"
# 80 % of a normal distribution lies within so many standard deviations.
Z_80 = NormalDist().inv_cdf(0.9)
# What ten minutes of measuring leave open: an assumption until a whole run has been compared with its preflight.
MEASURED_SPREAD = 0.05
NUMBERS = ("gpus", "vcpus", "memory_gib", "disk_gb", "value", "low", "high")


@dataclass(frozen=True)
class Table:
    """costs.csv by kind: lists of rows, each a dict with numbers as float or None; `constant` by name."""

    instance: list
    gpu: dict
    rate: list
    run: list
    excluded: list
    result: list
    recipe: dict
    constant: dict

    def value(self, name):
        return self.constant[name]["value"]

    def sd(self, name):
        """Standard deviation of a constant that may be anywhere between its low and high."""
        return (self.constant[name]["high"] - self.constant[name]["low"]) / math.sqrt(12)


def read_table(path=TABLE):
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    for row in rows:
        row.update({key: float(row[key]) if row[key] else None for key in NUMBERS})
    kinds = {name: [row for row in rows if row["kind"] == name] for name in Table.__dataclass_fields__}
    for kind in ("gpu", "recipe", "constant"):
        kinds[kind] = {row["name"]: row for row in kinds[kind]}
    return Table(**kinds)


def parse_schedule(text):
    """`160x45+192x11` -> [(160, 45.0), (192, 11.0)]: px and epochs."""
    return [(int(px), float(epochs)) for px, epochs in (part.split("x") for part in text.split("+"))]


# --- GPU speed -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Speeds:
    """What the rates of some sources say. `by_gpu`: {gpu: {source: images/s of one GPU at 224 px}}."""

    exponent: float
    efficiency_8: float
    by_gpu: dict
    per_bandwidth: float

    def gpu_rate(self, gpu, bandwidth):
        """(training images/s of one GPU at 224 px, number of independent sources; 0: from its bandwidth)."""
        sources = self.by_gpu.get(gpu, {})
        rate = geometric_mean(sources.values()) if sources else self.per_bandwidth * bandwidth
        return rate, len(sources)

    def efficiency(self, gpus):
        """Speed of one of `gpus` GPUs against one alone: falls evenly with every doubling to `efficiency_8`."""
        return 1 - (1 - self.efficiency_8) * math.log2(gpus) / 3

    def total(self, gpu, bandwidth, gpus, resolution):
        """Training images/s of all GPUs at `resolution` px."""
        rate, _ = self.gpu_rate(gpu, bandwidth)
        return rate * gpus * self.efficiency(gpus) * (224 / resolution) ** self.exponent


def fit(table, without=None):
    """Speeds from all sources but `without`.

    exponent: how images/s fall with resolution, from sources that give two (2, the number of pixels, where none does).
    efficiency_8: median of the sources that give one and eight GPUs (0.9 where none does).
    """
    rates = [row for row in table.rate if row["name"] != without]
    runs = [row for row in table.run if row["name"] != without]
    exponents, efficiencies = [], []
    for first in rates:
        for second in rates:
            same = all(first[key] == second[key] for key in ("name", "gpu"))
            small, large = float(first["schedule"]), float(second["schedule"])
            if same and first["gpus"] == second["gpus"] and small < large:
                exponents.append(math.log(first["value"] / second["value"]) / math.log(large / small))
            if same and small == large and (first["gpus"], second["gpus"]) == (1, 8):
                efficiencies.append(second["value"] / first["value"] / 8)
    speeds = Speeds(mean(exponents) if exponents else 2.0, median(efficiencies) if efficiencies else 0.9, {}, 0.0)
    implied = {}
    for row in rates:
        at_224 = (float(row["schedule"]) / 224) ** speeds.exponent
        value = row["value"] * at_224 / row["gpus"] / speeds.efficiency(row["gpus"])
        implied.setdefault(row["gpu"], {}).setdefault(row["name"], []).append(value)
    for row in runs:
        # hours that a source rounds say less than its images/s
        if row["name"] not in implied.get(row["gpu"], {}):
            work = sum(n * (px / 224) ** speeds.exponent for px, n in parse_schedule(row["schedule"]))
            value = work * table.value("images_train") / (row["value"] * 3600)
            value /= row["gpus"] * speeds.efficiency(row["gpus"])
            implied.setdefault(row["gpu"], {}).setdefault(row["name"], []).append(value)
    by_gpu = {gpu: {name: geometric_mean(v) for name, v in sources.items()} for gpu, sources in implied.items()}
    per_bandwidth = geometric_mean(
        geometric_mean(sources.values()) / table.gpu[gpu]["value"] for gpu, sources in by_gpu.items()
    )
    return Speeds(speeds.exponent, speeds.efficiency_8, by_gpu, per_bandwidth)


def check(table):
    """Every published run and rate predicted without its source: a list of dicts, `excluded` ones last.

    Keys: source, gpu, gpus, schedule, observed and predicted (hours), error (fraction), sources (independent ones that
    the prediction had for this GPU; 0: bandwidth rule), counted, note. A source without a run is asked for 90 epochs.
    """
    checked = []
    with_runs = {(row["name"], row["gpu"]) for row in table.run}
    rates = [row for row in table.rate if (row["name"], row["gpu"]) not in with_runs]
    for row in [*table.run, *rates, *table.excluded]:
        speeds = fit(table, without=row["name"])
        bandwidth = table.gpu[row["gpu"]]["value"]
        is_rate = row["kind"] == "rate"
        schedule = f"{row['schedule']}x90" if is_rate else row["schedule"]
        epochs = parse_schedule(schedule)
        images = table.value("images_train")
        observed = 90 * images / row["value"] / 3600 if is_rate else row["value"]
        predicted = sum(n * images / speeds.total(row["gpu"], bandwidth, row["gpus"], px) / 3600 for px, n in epochs)
        checked.append(
            {
                "source": row["name"],
                "gpu": row["gpu"],
                "gpus": int(row["gpus"]),
                "schedule": schedule,
                "observed": observed,
                "predicted": predicted,
                "error": predicted / observed - 1,
                "sources": speeds.gpu_rate(row["gpu"], bandwidth)[1],
                "counted": row["kind"] != "excluded",
                "note": row["note"] if row["kind"] == "excluded" else "from images/s" if is_rate else "",
            }
        )
    return checked


def prediction_errors(checked):
    """Root mean square of ln(predicted / observed), sources weighing the same.

    {True: on GPUs that another source measured, False: on GPUs that none did}.
    """
    errors = {}
    for measured in (True, False):
        by_source = {}
        for row in checked:
            if row["counted"] and (row["sources"] > 0) == measured:
                by_source.setdefault((row["source"], row["gpu"]), []).append(math.log(1 + row["error"]) ** 2)
        errors[measured] = math.sqrt(mean(mean(squares) for squares in by_source.values()))
    return errors


# --- Loader and disk -------------------------------------------------------------------------------------------------


def loader_rates(table, benchmark=LOADER_BENCHMARK):
    """{"rn50": ..., "ffcv": ...}: training images/s that one vCPU decodes at 160 px from 500-px files, all vCPUs busy.

    A vCPU is a hyper-thread, and our benchmark ran on one thread: it is never multiplied by vCPUs. Stock FFCV's rate is
    published for all vCPUs of a machine; ours is that times what we measured ours against stock FFCV in the same run,
    times an assumed margin.
    """
    measured = {row["name"]: row["images_per_second"] for row in json.loads(Path(benchmark).read_text())["results"]}
    stock = table.value("stock_loader_per_vcpu")
    return {"ffcv": stock, "rn50": stock * measured["rn50"] / measured["ffcv"] * table.value("loader_margin")}


def loader_scale(table, resolution, rung):
    """Our loader's speed at `resolution` px from `rung`-px files, against 160 px from 500 px."""

    def microseconds(px, side):
        stored, out = side / 500, px / 160
        return (
            table.value("loader_us_fixed")
            + table.value("loader_us_decode") * stored**2
            + table.value("loader_us_rows") * stored * out
            + table.value("loader_us_columns") * out**2
        )

    return microseconds(160, 500) / microseconds(resolution, rung)


def beton_gb(table, rung):
    """Size of the training beton: a power law through the two published sizes."""
    small, large = table.value("gb_at_256"), table.value("gb_at_512")
    return small * (rung / 256) ** math.log2(large / small)


def images_that_fit(table, memory_gib, resolution):
    """Largest micro-batch at `resolution` px."""
    return int((memory_gib - table.value("gib_fixed")) / (table.value("gib_per_image") * (resolution / 224) ** 2))


# --- One recipe on one machine ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """What of a recipe decides its time. `resolutions`: px of every epoch; `evaluated`: [(px, views)] over the run."""

    name: str
    resolutions: list
    micro_batch: int
    rung: int
    evaluated: list


def evaluations(config):
    """[(px, views)] of every epoch of a config, a nested dict."""
    validation = config["validation"]
    views = 2 if validation["headline_view"] == "flip" else 1
    one, every = [(validation["headline_resolution"], views)], validation["every"]
    during = [[] if epoch % every else one for epoch in range(1, config["training"]["epochs"])]
    return [*during, [(px, 2) for px in validation["resolutions"]]]


def recipe_of(name, config):
    """A config, as a nested dict, as a Recipe; KeyError where it lacks a key that its time depends on."""
    epochs = config["training"]["epochs"]
    return Recipe(
        name=name,
        resolutions=[schedules.resolution(epoch, **config["resolution"]) for epoch in range(epochs)],
        micro_batch=config["training"]["micro_batch"],
        rung=config["data"]["rung"],
        evaluated=[view for epoch in evaluations(config) for view in epoch],
    )


def read_recipe(path):
    """A recipe's file as a Recipe. The files spell these keys out, so that no default is kept in two places."""
    try:
        return recipe_of(path.stem, yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from None
    except KeyError as error:
        raise UsageError(f"{path} does not give {error.args[0]}, which its time depends on") from None


def read_recipes(table):
    """The Recipe of each of the table's."""
    return [read_recipe(CONFIGS / f"{name}.yaml") for name in table.recipe]


@dataclass(frozen=True)
class Machine:
    """A row of the instance table, or what preflight measured.

    `measured`: {px: training images/s} of the whole machine with its loader, in place of the model's; `limits`:
    {px: what limited them}; `loader`: {px: images/s of the loader alone}.
    """

    name: str
    gpu: str
    gpus: int
    vcpus: int
    memory_gib: float
    disk_gb: float
    dollars_per_hour: float
    dollars_low: float
    dollars_high: float
    note: str = ""
    measured: dict = field(default_factory=dict)
    limits: dict = field(default_factory=dict)
    loader: dict = field(default_factory=dict)
    micro_batch: int | None = None
    disk_mb_per_s: float | None = None
    staging_mb_per_s: float | None = None


def measured_machine(report):
    """The machine that tools/preflight.py measured; KeyError, TypeError or ValueError where `report` is not its own."""
    price = report["dollars_per_hour"]
    measured = {row["resolution"]: row["training_images_per_second"] for row in report["resolutions"]}
    sizes = [report[key] for key in ("gpus", "vcpus", "memory_gib", "micro_batch")]
    loader = {row["resolution"]: row["loader_images_per_second"] for row in report["resolutions"]}
    values = [price, *sizes, *measured, *measured.values(), *loader.values()]
    if not measured or not all(0 < value < math.inf for value in values):
        raise ValueError("a size, a price or a speed is missing or not above 0")
    return Machine(
        name=report["instance"],
        gpu=report["device"],
        gpus=report["gpus"],
        vcpus=report["vcpus"],
        memory_gib=report["memory_gib"],
        disk_gb=0,
        dollars_per_hour=price,
        dollars_low=price,
        dollars_high=price,
        measured=measured,
        loader=loader,
        limits={row["resolution"]: row["limited_by"] for row in report["resolutions"]},
        micro_batch=report["micro_batch"],
        staging_mb_per_s=report["staging_mb_per_s"],
    )


def machines(table, spot):
    """Every instance at its on-demand price; with `spot`, those whose spot price was seen, at its middle."""
    made = []
    for row in table.instance:
        if spot and row["low"] is None:
            continue
        low, high = (row["low"], row["high"]) if spot else (row["value"], row["value"])
        sizes = {key: int(row[key]) for key in ("gpus", "vcpus")}
        made.append(
            Machine(
                name=row["name"],
                gpu=row["gpu"],
                memory_gib=row["memory_gib"],
                disk_gb=row["disk_gb"],
                dollars_per_hour=(low + high) / 2,
                dollars_low=low,
                dollars_high=high,
                note=row["note"],
                **sizes,
            )
        )
    return made


def pace(table, speeds, loader, recipe, machine, resolution, passes=1.0):
    """(images/s, what limits them: GPU, CPU or disk) at `resolution` px.

    passes: what the GPU does with each image, 1 being forward and backward; the loader decodes each once.
    """
    if machine.measured:
        nearest = min(machine.measured, key=lambda px: abs(px - resolution))
        rate = _interpolate(machine.measured, resolution, speeds.exponent) / passes
        return min(rate, _interpolate(machine.loader, resolution, speeds.exponent)), machine.limits[nearest]
    gpu = table.gpu[machine.gpu]
    micro = fitting_micro_batch(table, recipe, machine)
    # with hardly more vCPUs than GPUs, training and decoding share them
    decoding = max(machine.vcpus - machine.gpus * table.value("training_vcpus"), machine.vcpus / 2)
    limits = {
        "GPU": speeds.total(machine.gpu, gpu["value"], machine.gpus, resolution),
        "CPU": decoding * loader["rn50"] * loader_scale(table, resolution, recipe.rung),
    }
    # kernels are launched one after the other: a small micro-batch at a low resolution does not fill a fast GPU
    launches = machine.gpus * speeds.efficiency(machine.gpus) * micro / table.value("launch_seconds")
    limits["GPU"] = min(limits["GPU"], launches) / passes
    gigabytes = beton_gb(table, recipe.rung)
    # as rn50.data.loaders.choose_order: what fits in 60 % of memory is read from disk once
    if gigabytes * 1e9 > 0.6 * machine.memory_gib * 2**30:
        limits["disk"] = disk_speed(table, machine) * 1e6 / (gigabytes * 1e9 / table.value("images_train"))
    limit = min(limits, key=limits.get)
    return limits[limit], limit


def disk_speed(table, machine):
    """MB/s of sequential reading."""
    if machine.disk_mb_per_s:
        return machine.disk_mb_per_s
    return table.value("nvme_mb_per_s") * machine.gpus if machine.disk_gb else table.value("ebs_mb_per_s")


def fitting_micro_batch(table, recipe, machine):
    """The recipe's micro-batch, halved until it fits the GPU at every resolution."""
    micro = recipe.micro_batch
    if machine.micro_batch:
        return min(micro, machine.micro_batch)
    while micro > images_that_fit(table, table.gpu[machine.gpu]["memory_gib"], max(recipe.resolutions)):
        micro //= 2
    return micro


def hours(table, speeds, loader, recipe, machine, spot=False):
    """({part: hours} of set-up, staging, training and evaluation, what limits most of the training)."""
    seconds, limited = 0.0, {}
    for resolution in recipe.resolutions:
        rate, limit = pace(table, speeds, loader, recipe, machine, resolution)
        spent = table.value("images_train") / rate
        seconds += spent
        limited[limit] = limited.get(limit, 0) + spent
    evaluation = 0.0
    for resolution, views in recipe.evaluated:
        passes = views / table.value("evaluation_speed")
        rate, _ = pace(table, speeds, loader, recipe, machine, resolution, passes)
        evaluation += table.value("images_val") / rate
    staging = machine.staging_mb_per_s or table.value("staging_mb_per_s")
    gigabytes = beton_gb(table, recipe.rung) * (1 + table.value("images_val") / table.value("images_train"))
    rework = table.value("spot_rework") if spot else 1
    parts = {
        "setup": table.value("setup_hours"),
        "staging": gigabytes * 1000 / staging / 3600,
        "training": seconds / 3600 * rework,
        "evaluation": evaluation / 3600,
    }
    limit = max(limited, key=limited.get)
    return parts, "memory" if fitting_micro_batch(table, recipe, machine) < recipe.micro_batch else limit


def expected_top1(table, family, epochs):
    """(mean, standard deviation, basis) of top-1 at 224 px, single view, in %.

    Between published lengths of the same family: linear in ln(epochs). Beyond the last: what FFCV's last two schedules
    gain for each factor e of epochs. Figures at 256 px, flip-averaged, are brought to 224 px, single view.
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
        share = math.log(epochs / before) / math.log(after / before)
        top1 = points[before] + share * (points[after] - points[before])
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


def project(table, speeds, loader, errors, recipe, machine, target, spot=False):
    """The plan's row for one recipe on one machine: plain values; ranges hold 80 % if the errors are normal."""
    parts, limit = hours(table, speeds, loader, recipe, machine, spot)
    total = sum(parts.values())
    if machine.measured:
        sources, spread, speed_basis = 0, MEASURED_SPREAD, "speed measured by preflight"
    else:
        _, sources = speeds.gpu_rate(machine.gpu, table.gpu[machine.gpu]["value"])
        spread = errors[sources > 0]
        speed_basis = f"{machine.gpu} measured by {sources} published source{'s' if sources > 1 else ''}"
        if not sources:
            speed_basis = f"{machine.gpu}: no training measurement by anyone, from its memory bandwidth"
    factor = math.exp(Z_80 * spread)
    fixed = parts["setup"] + parts["staging"]
    storage = beton_gb(table, recipe.rung) * table.value("s3_dollars_gb_month")
    top1, top1_spread, top1_basis = expected_top1(table, table.recipe[recipe.name]["schedule"], len(recipe.resolutions))
    micro = fitting_micro_batch(table, recipe, machine)
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


def _interpolate(measured, resolution, exponent):
    """images/s at `resolution` from those at other resolutions: straight in logarithms, by `exponent` outside."""
    known = sorted(measured)
    if resolution <= known[0]:
        return measured[known[0]] * (known[0] / resolution) ** exponent
    for low, high in zip(known, known[1:], strict=False):
        if resolution <= high:
            share = math.log(resolution / low) / math.log(high / low)
            return math.exp((1 - share) * math.log(measured[low]) + share * math.log(measured[high]))
    return measured[known[-1]] * (known[-1] / resolution) ** exponent
