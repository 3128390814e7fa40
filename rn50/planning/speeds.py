"""How fast GPUs, loader and disk are, by published figures, and the hours that a recipe takes on a machine.

A GPU's training images/s: what independent published sources say, each brought to one GPU at 224 px and a network
without blurs, and corrected for how fast its code is on GPUs that others measured too; a GPU that nobody published gets
the images/s for each GB/s of memory bandwidth that the others have. The slowest of GPU, loader and disk sets the pace.
`check` predicts every published run without its own source; how far off that is, is the range of every projection.
"""

import math
from dataclasses import dataclass
from statistics import geometric_mean, mean, median

from rn50.planning.costs import LADDER, parse_schedule

# What ten minutes of measuring leave open: an assumption until a whole run has been compared with its preflight.
MEASURED_SPREAD = 0.05
# Of `separate`: enough for its terms to stand still to the eighth digit.
TURNS = 200


# --- GPU -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Speeds:
    """What the rates of some sources say, of one GPU at 224 px, for a network without blurs.

    by_gpu: {gpu: {source: its images/s}}; rates: {gpu: images/s of typical code}; code: {source: its code's speed
    against typical code}.
    """

    exponent: float
    efficiency_8: float
    by_gpu: dict
    rates: dict
    code: dict
    per_bandwidth: float

    def gpu_rate(self, gpu, bandwidth):
        """(training images/s of one GPU at 224 px, number of independent sources; 0: from its bandwidth)."""
        return self.rates.get(gpu, self.per_bandwidth * bandwidth), len(self.by_gpu.get(gpu, {}))

    @property
    def ours(self):
        """Speed of this repository's code against typical code, by what it was measured at."""
        return self.code.get("rn50", 1.0)

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
    exponent, efficiency_8 = mean(exponents) if exponents else 2.0, median(efficiencies) if efficiencies else 0.9
    speeds, implied = Speeds(exponent, efficiency_8, {}, {}, {}, 0.0), {}
    for row in rates:
        at_224 = (float(row["schedule"]) / 224) ** speeds.exponent
        value = (
            row["value"] * at_224 / row["gpus"] / speeds.efficiency(row["gpus"]) / network_speed(table, row["network"])
        )
        implied.setdefault(row["gpu"], {}).setdefault(row["name"], []).append(value)
    for row in runs:
        # hours that a source rounds say less than its images/s
        if row["name"] not in implied.get(row["gpu"], {}):
            work = sum(n * (px / 224) ** speeds.exponent for px, n in parse_schedule(row["schedule"]))
            value = work * table.value("images_train") / (row["value"] * 3600)
            value /= row["gpus"] * speeds.efficiency(row["gpus"]) * network_speed(table, row["network"])
            implied.setdefault(row["gpu"], {}).setdefault(row["name"], []).append(value)
    by_gpu = {gpu: {name: geometric_mean(v) for name, v in sources.items()} for gpu, sources in implied.items()}
    rates, code = separate(by_gpu)
    per_bandwidth = geometric_mean(rate / table.gpu[gpu]["value"] for gpu, rate in rates.items())
    return Speeds(exponent, efficiency_8, by_gpu, rates, code, per_bandwidth)


def separate(by_gpu):
    """({gpu: images/s of typical code}, {source: speed of its code against it}) from {gpu: {source: images/s}}.

    The least squares of ln(images/s) = gpu + source, plus the squares of the source terms: where a source is the only
    one of a GPU, all of its figure is the GPU's; where there are two, each differs by its code for the half of it that
    nothing else explains. (A ridge on one of two crossed factors, as in a mixed model with equal variances.) By turns:
    each term is the best one for what the others leave. Without NumPy, which a laptop that only launches does not have.
    """
    cells = [(gpu, source, math.log(rate)) for gpu, rates in by_gpu.items() for source, rate in rates.items()]
    gpus, code = dict.fromkeys(by_gpu, 0.0), {source: 0.0 for _, source, _ in cells}
    for _ in range(TURNS):
        for gpu in gpus:
            gpus[gpu] = mean(rate - code[source] for name, source, rate in cells if name == gpu)
        for source in code:
            left = [rate - gpus[gpu] for gpu, name, rate in cells if name == source]
            code[source] = sum(left) / (len(left) + 1)
    return tuple({name: math.exp(term) for name, term in terms.items()} for terms in (gpus, code))


def network_speed(table, network):
    """Images/s of a `network` of costs.csv against those of one without blurs."""
    pooled = table.value("blurpool_speed")
    return {"": 1.0, "blurpool": pooled, "both blurs": pooled * table.value("blur_maxpool_speed")}[network]


def check(table):
    """Every published run and rate predicted without its source: a list of dicts, `excluded` ones last.

    Keys: source, gpu, gpus, schedule, observed and predicted (hours), error (fraction), sources (independent ones that
    the prediction had for this GPU; 0: bandwidth rule), counted, note. A source without a run is asked for 90 epochs.
    """
    checked = []
    with_runs = {(row["name"], row["gpu"]) for row in table.run}
    rates = [row for row in table.rate if (row["name"], row["gpu"]) not in with_runs]
    rows = [*table.run, *rates, *table.excluded]
    fitted = {name: fit(table, without=name) for name in {row["name"] for row in rows}}
    for row in rows:
        speeds = fitted[row["name"]]
        bandwidth = table.gpu[row["gpu"]]["value"]
        is_rate = row["kind"] == "rate"
        schedule = f"{row['schedule']}x90" if is_rate else row["schedule"]
        epochs = parse_schedule(schedule)
        images = table.value("images_train")
        observed = 90 * images / row["value"] / 3600 if is_rate else row["value"]
        predicted = sum(n * images / speeds.total(row["gpu"], bandwidth, row["gpus"], px) / 3600 for px, n in epochs)
        predicted /= network_speed(table, row["network"])
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


def median_error(checked):
    """Median over sources and GPUs of the mean size of their relative errors."""
    by_source = {}
    for row in checked:
        if row["counted"]:
            by_source.setdefault((row["source"], row["gpu"]), []).append(abs(math.log(1 + row["error"])))
    return math.expm1(median(mean(errors) for errors in by_source.values()))


# --- Loader, disk and memory -----------------------------------------------------------------------------------------


def loader_rates(table):
    """{"rn50": ..., "ffcv": ...}: training images/s that one vCPU decodes at 160 px from 500-px files, all vCPUs busy.

    A vCPU is a hyper-thread, and our benchmark ran on one thread: it is never multiplied by vCPUs. Stock FFCV's rate is
    published for all vCPUs of a machine; ours is that times what we measured ours against stock FFCV in the same run,
    times an assumed margin.
    """
    measured = {name: row["value"] for name, row in table.loader.items()}
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


def disk_speed(table, machine):
    """MB/s of sequential reading."""
    if machine.disk_mb_per_s:
        return machine.disk_mb_per_s
    return table.value("nvme_mb_per_s") * machine.gpus if machine.disk_gb else table.value("ebs_mb_per_s")


def images_that_fit(table, memory_gib, resolution):
    """Largest micro-batch at `resolution` px."""
    return int((memory_gib - table.value("gib_fixed")) / (table.value("gib_per_image") * (resolution / 224) ** 2))


def fitting_micro_batch(table, recipe, machine):
    """The recipe's micro-batch, halved until it fits the GPU at every resolution."""
    micro = recipe.micro_batch
    if machine.micro_batch:
        return min(micro, machine.micro_batch)
    while micro > images_that_fit(table, table.gpu[machine.gpu]["memory_gib"], max(recipe.resolutions)):
        micro //= 2
    return micro


# --- One recipe on one machine ---------------------------------------------------------------------------------------


def hours(table, speeds, loader, recipe, machine, spot=False):
    """({part: hours} of set-up, staging, training and evaluation, what limits most of the training)."""
    seconds, limited = 0.0, {}
    for resolution, rung in zip(recipe.resolutions, recipe.rungs, strict=True):
        rate, limit = pace(table, speeds, loader, recipe, machine, resolution, rung, recipe.passes)
        spent = table.value("images_train") / rate
        seconds += spent
        limited[limit] = limited.get(limit, 0) + spent
    evaluation = 0.0
    for resolution, views in recipe.evaluated:
        passes = views / table.value("evaluation_speed")
        rate, _ = pace(table, speeds, loader, recipe, machine, resolution, max(LADDER), passes)
        evaluation += table.value("images_val") / rate
    staging = machine.staging_mb_per_s or table.value("staging_mb_per_s")
    gigabytes = sum(beton_gb(table, rung) for rung in set(recipe.rungs))
    gigabytes += sum(beton_gb(table, rung) for rung in LADDER) * table.value("images_val") / table.value("images_train")
    rework = table.value("spot_rework") if spot else 1
    parts = {
        "setup": table.value("setup_hours"),
        "staging": gigabytes * 1000 / staging / 3600,
        "training": seconds / 3600 * rework,
        "evaluation": evaluation / 3600,
    }
    limit = max(limited, key=limited.get)
    return parts, "memory" if fitting_micro_batch(table, recipe, machine) < recipe.micro_batch else limit


def pace(table, speeds, loader, recipe, machine, resolution, rung, passes):
    """(images/s, what limits them: GPU, CPU or disk) at `resolution` px from `rung`-px files.

    passes: what the GPU does with each image, 1 being forward and backward; the loader decodes each once.
    """
    if machine.measured:
        nearest = min(machine.measured, key=lambda px: abs(px - resolution))
        # preflight's training had the recipe's own passes
        rate = _interpolate(machine.measured, resolution, speeds.exponent) * recipe.passes / passes
        return min(rate, _interpolate(machine.loader, resolution, speeds.exponent)), machine.limits[nearest]
    gpu = table.gpu[machine.gpu]
    micro = fitting_micro_batch(table, recipe, machine)
    # with hardly more vCPUs than GPUs, training and decoding share them
    decoding = max(machine.vcpus - machine.gpus * table.value("training_vcpus"), machine.vcpus / 2)
    network = speeds.ours * network_speed(table, recipe.network)
    limits = {
        "GPU": speeds.total(machine.gpu, gpu["value"], machine.gpus, resolution) * network,
        "CPU": decoding * loader["rn50"] * loader_scale(table, resolution, rung),
    }
    # kernels are launched one after the other: a small micro-batch at a low resolution does not fill a fast GPU
    launches = machine.gpus * speeds.efficiency(machine.gpus) * micro / table.value("launch_seconds")
    limits["GPU"] = min(limits["GPU"], launches) / passes
    gigabytes = beton_gb(table, rung)
    # as rn50.data.loaders.choose_order: what fits in 60 % of memory is read from disk once
    if gigabytes * 1e9 > 0.6 * machine.memory_gib * 2**30:
        limits["disk"] = disk_speed(table, machine) * 1e6 / (gigabytes * 1e9 / table.value("images_train"))
    limit = min(limits, key=limits.get)
    return limits[limit], limit


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
