"""The published figures in costs.csv, and what a projection is made of: recipes, and machines with their prices."""

import csv
import math
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from rn50 import schedules
from rn50.errors import RunError, UsageError

TABLE = Path(__file__).with_name("costs.csv")
# What write_imagenet.yaml makes: {max side: median short side}, px; most of ImageNet's images are 4:3.
LADDER = {256: 192, 400: 300, 500: 375}
CONFIGS = Path(__file__).parents[2] / "rn50_configs"
NUMBERS = ("gpus", "vcpus", "memory_gib", "disk_gb", "value", "low", "high")


@dataclass(frozen=True)
class Table:
    """costs.csv by kind: lists of rows, each a dict with numbers as float or None; some kinds by name."""

    instance: list
    place: list
    cpu: dict
    gpu: dict
    rate: list
    run: list
    excluded: list
    result: list
    reproduction: list
    recipe: dict
    loader: dict
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
    for kind in ("cpu", "gpu", "recipe", "loader", "constant"):
        kinds[kind] = {row["name"]: row for row in kinds[kind]}
    return Table(**kinds)


def parse_schedule(text):
    """`160x45+192x11` -> [(160, 45.0), (192, 11.0)]: px and epochs."""
    return [(int(px), float(epochs)) for px, epochs in (part.split("x") for part in text.split("+"))]


# --- Recipes ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """What of a recipe decides its time.

    resolutions, rungs: px of the crops and of the files of every epoch. network: which blurs, in costs.csv's words.
    passes: forward and backward passes for each image, more than 1 with SAM. evaluated: [(px, views)] over the run.
    """

    name: str
    resolutions: list
    rungs: list
    micro_batch: int
    network: str
    passes: float
    evaluated: list


def evaluations(config):
    """[(px, views)] of every epoch of a config, a nested dict."""
    validation = config["validation"]
    views = 2 if validation["headline_view"] == "flip" else 1
    one, every = [(validation["headline_resolution"], views)], validation["every"]
    during = [[] if epoch % every else one for epoch in range(1, config["training"]["epochs"])]
    return [*during, [(px, 2) for px in validation["resolutions"]]]


def recipe_of(name, config, ladder=LADDER):
    """A config, as a nested dict, as a Recipe; KeyError where it lacks a key that its time depends on.

    ladder: {max side: median short side} of the files to train from, px.
    """
    model, training, rung = config["model"], config["training"], config["data"]["rung"]
    sides = [schedules.resolution(epoch, **config["resolution"]) for epoch in range(training["epochs"])]
    # a key that a recipe leaves out is off, as in rn50/recipe.py
    blurs = model.get("blurpool", False), model.get("blur_maxpool", False)
    return Recipe(
        name=name,
        resolutions=sides,
        rungs=[schedules.rung(px, ladder) if rung == "auto" else rung for px in sides],
        micro_batch=training["micro_batch"],
        network={(False, False): "", (True, False): "blurpool"}.get(blurs, "both blurs"),
        passes=1 + 1 / training.get("sam_interval", 10) if training.get("sam_rho", 0) else 1.0,
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


# --- Machines --------------------------------------------------------------------------------------------------------


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
    return [_machine(row, spot) for row in table.instance if not spot or row["low"] is not None]


def places(table):
    """Machines that are not EC2's, at their price."""
    return [_machine(row, spot=False) for row in table.place]


def _machine(row, spot):
    low, high = (row["low"], row["high"]) if spot else (row["value"], row["value"])
    return Machine(
        name=row["name"],
        gpu=row["gpu"],
        gpus=int(row["gpus"]),
        vcpus=int(row["vcpus"]),
        memory_gib=row["memory_gib"],
        disk_gb=row["disk_gb"],
        dollars_per_hour=(low + high) / 2,
        dollars_low=low,
        dollars_high=high,
        note=row["note"],
    )
