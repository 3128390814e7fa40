"""The published figures in costs.csv, and what a projection is made of: recipes, and machines with their prices."""

import csv
import math
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from rn50 import schedules
from rn50.errors import RunError, UsageError

TABLE = Path(__file__).with_name("costs.csv")
CONFIGS = Path(__file__).parents[2] / "rn50_configs"
NUMBERS = ("gpus", "vcpus", "memory_gib", "disk_gb", "value", "low", "high")


@dataclass(frozen=True)
class Table:
    """costs.csv by kind: lists of rows, each a dict with numbers as float or None; some kinds by name."""

    instance: list
    gpu: dict
    rate: list
    run: list
    excluded: list
    result: list
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
    for kind in ("gpu", "recipe", "loader", "constant"):
        kinds[kind] = {row["name"]: row for row in kinds[kind]}
    return Table(**kinds)


def parse_schedule(text):
    """`160x45+192x11` -> [(160, 45.0), (192, 11.0)]: px and epochs."""
    return [(int(px), float(epochs)) for px, epochs in (part.split("x") for part in text.split("+"))]


# --- Recipes ---------------------------------------------------------------------------------------------------------


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
