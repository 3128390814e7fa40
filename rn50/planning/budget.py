"""What a run costs while it runs: dollars so far, dollars to finish, and when to stop so that the limit holds.

Every second of the process costs, so start-up, evaluation and repeated steps do too. What is spent is in the checkpoint
and, once a minute, in the run folder's spend.json: a crash loses a minute of it at most. Hours between two commands are
not seen: a machine that waits must be shut down.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import threading
import time
from functools import cache
from pathlib import Path

from rn50 import schedules
from rn50.errors import UsageError
from rn50.files import write_atomically
from rn50.planning import costs, speeds, top1

FILE = "spend.json"
WRITE_SECONDS = 60.0
# What writing the last checkpoint, and a mirror's copy of it, may take after the last step.
STOP_SECONDS = 120.0


class Meter:
    """Dollars of a run over all its sessions; counts from the start of this process.

    folder: the run's. before: dollars up to the checkpoint that this session goes on from; spend.json counts where it
    knows of more. dollars_per_hour: of all machines together. max_dollars: None where there is no limit.
    """

    def __init__(self, folder, *, dollars_per_hour, max_dollars, before):
        self.max_dollars, self.dollars_per_hour = max_dollars, dollars_per_hour
        self._path = Path(folder) / FILE
        self._before = max(before, _written(self._path))
        self._started = time.monotonic() - process_age()
        threading.Thread(target=self._keep, name="spend", daemon=True).start()

    @property
    def dollars(self):
        return self._before + self.cost(time.monotonic() - self._started)

    def cost(self, seconds):
        return self.dollars_per_hour * seconds / 3600

    def spent(self):
        """Whether it is time to stop: what is left pays for the last checkpoint only."""
        return self.max_dollars is not None and self.dollars + self.cost(STOP_SECONDS) >= self.max_dollars

    def seconds_left(self):
        """Seconds until it is `spent`; infinite where there is no limit, or no cost."""
        if self.max_dollars is None or not self.dollars_per_hour:
            return math.inf
        return 3600 * (self.max_dollars - self.dollars) / self.dollars_per_hour - STOP_SECONDS

    def write(self):
        """Put the dollars into spend.json; a disk that does not take it leaves them to the checkpoint."""
        with contextlib.suppress(OSError):
            write_atomically(self._path, json.dumps({"dollars": round(self.dollars, 6), "time": time.time()}) + "\n")

    def _keep(self):
        while True:
            self.write()
            time.sleep(WRITE_SECONDS)


class Pace:
    """How long the rest of a run will take.

    config: the run's, a nested dict. progress: its training.progress.Progress, read when something is asked.
    images, validation_images: how many there are in the betons.
    """

    def __init__(self, *, config, progress, images, validation_images):
        self._config, self._progress = config, progress
        self._counts = {"images": images, "validation_images": validation_images}
        self._left_out = 0, 0.0

    def leave_out(self):
        """Leave out the steps of this epoch so far: the first one compiles and allocates, or was another session's."""
        self._left_out = self._progress.epoch_step, self._progress.epoch_seconds

    def seconds_to_finish(self, rows=None):
        """At the measured pace; None before that is known. rows: the log, where it is not progress.rows."""
        config, progress = self._config, self._progress
        epochs = config["training"]["epochs"]
        steps, seconds = progress.epoch_step - self._left_out[0], progress.epoch_seconds - self._left_out[1]
        return seconds_to_finish(
            resolutions=[schedules.resolution(epoch, **config["resolution"]) for epoch in range(epochs)],
            evaluations=costs.evaluations(config),
            rows=progress.rows if rows is None else rows,
            epoch=progress.epoch,
            epoch_share=progress.epoch_step / progress.epoch_steps,
            epoch_seconds=seconds * progress.epoch_step / steps if steps > 0 else 0.0,
            **self._counts,
        )


class Guard(Meter, Pace):
    """The meter of a run that also knows the schedule, and so what the rest of it will cost.

    config, progress, images, validation_images: as for a Pace. dollars_per_hour: of all machines together.
    """

    def __init__(self, folder, *, config, progress, images, validation_images, dollars_per_hour):
        limit = config["budget"].get("max_dollars")
        Meter.__init__(self, folder, dollars_per_hour=dollars_per_hour, max_dollars=limit, before=progress.dollars)
        Pace.__init__(self, config=config, progress=progress, images=images, validation_images=validation_images)

    def refusal(self, *, ladder, **machine):
        """(why the rest of the schedule should not begin or None, what could not be projected or None).

        ladder: {max side: median short side} of the training files, px. machine: gpu_name, gpus, machines, vcpus and
        memory_gib of `projected_hours`.
        """
        if self.max_dollars is None or self.spent():
            return None, None
        seconds, given = self.seconds_to_finish(), self._config["budget"]
        machine |= {"instance": given.get("instance"), "spot": given["spot"]} | self._counts
        if seconds is not None:
            needed, basis = self.cost(seconds), "at the pace of this run so far"
        else:
            known = self._config["model"]["arch"] == "resnet50"
            projected = known and projected_hours(costs.recipe_of("this run", self._config, ladder), **machine)
            if not projected:
                unknown = "nothing is known of this network's speed on this machine"
                return None, f"{unknown}: what it will cost is said as it goes"
            needed, basis = self.cost(3600 * projected[0]), f"projected from published speeds, +-{projected[1]:.0%}"
        if self.dollars + needed + self.cost(STOP_SECONDS) <= self.max_dollars:
            return None, None
        message = (
            f"budget.max_dollars={self.max_dollars:g} is less than ${self.dollars:.2f} spent and ${needed:.2f} to "
            f"finish ({basis})"
        )
        if seconds is None:
            fits = largest_that_fits(
                costs.read_recipes(costs.read_table()),
                lambda recipe: projected_hours(recipe, **machine)[0],
                self.dollars_per_hour,
                self.max_dollars - self.dollars - self.cost(STOP_SECONDS),
            )
            message += f"; the largest recipe that fits: {fits[0]}, ${fits[1]:.2f}" if fits else "; no recipe fits"
        return message, None

    def columns(self, row):
        """What an epoch's row of the log gets: dollars so far, of this epoch and to finish, and when that will be."""
        seconds = self.seconds_to_finish([*self._progress.rows, row])
        return {
            "dollars": round(self.dollars, 4),
            "dollars_epoch": round(self.cost(row["train_seconds"] + row["val_seconds"]), 4),
            "dollars_to_finish": round(self.cost(seconds), 4),
            "finish_time": round(time.time() + seconds),
        }


def _written(path):
    try:
        dollars = float(json.loads(path.read_text(encoding="utf-8"))["dollars"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0
    return dollars if math.isfinite(dollars) else 0.0


def process_age():
    """Seconds since this process was started, imports included (Linux)."""
    # the 22nd field, counted after the name, which may hold spaces
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def price(*, dollars_per_hour, instance, spot):
    """Dollars an hour of one machine, or None where nothing says. A spot price is the highest that was seen."""
    if dollars_per_hour is not None:
        return dollars_per_hour
    if instance is None:
        return None
    known = {machine.name: machine for machine in costs.machines(costs.read_table(), spot)}
    if instance not in known:
        what = "no spot price is known for" if spot else "there is no price of"
        raise UsageError(
            f"budget.instance: {what} {instance}; give budget.dollars_per_hour, or one of {', '.join(known)}"
        )
    return known[instance].dollars_high


def projected_hours(recipe, *, images, validation_images, instance, spot, gpu_name, gpus, machines, vcpus, memory_gib):
    """(hours of training and evaluation, typical relative error) from published throughput, or None.

    recipe: a costs.Recipe of ResNet-50. instance: its row of the table; else the GPU that `gpu_name` names, None where
    the table knows neither. gpus: that the run uses, on all `machines` together. vcpus, memory_gib: of one of them.
    images, validation_images: how many there are in the betons.
    """
    table = costs.read_table()
    # whatever the price, the table knows the hardware
    known = {machine.name: machine for machine in costs.machines(table, spot=False)}
    if instance in known:
        machine = known[instance]
        machine = dataclasses.replace(machine, gpus=gpus, vcpus=machines * machine.vcpus)
    else:
        # whole words: an L40 is no L4
        named = [name for name in table.gpu if re.search(rf"\b{name}\b", gpu_name or "")]
        if not named:
            return None
        machine = costs.Machine(
            name=gpu_name,
            gpu=max(named, key=len),
            gpus=gpus,
            vcpus=machines * vcpus,
            memory_gib=memory_gib,
            disk_gb=0,
            dollars_per_hour=0,
            dollars_low=0,
            dollars_high=0,
        )
    fitted = speeds.fit(table)
    parts, _ = speeds.hours(table, fitted, speeds.loader_rates(table), recipe, machine, spot)
    measured = fitted.gpu_rate(machine.gpu, table.gpu[machine.gpu]["value"])[1] > 0
    error = math.expm1(speeds.prediction_errors(speeds.check(table))[measured])
    training = parts["training"] * images / table.value("images_train")
    return training + parts["evaluation"] * validation_images / table.value("images_val"), error


def largest_that_fits(recipes, hours_of, dollars_per_hour, dollars):
    """(name, dollars) of the recipe with the highest expected top-1 that costs no more than `dollars`, or None.

    recipes: costs.Recipe. hours_of(recipe): as from `projected_hours`, in hours.
    """
    table = costs.read_table()
    fitting = []
    for recipe in recipes:
        cost = hours_of(recipe) * dollars_per_hour
        if cost <= dollars:
            family = table.recipe[recipe.name]["schedule"]
            expected = top1.outlook(table, family, len(recipe.resolutions))
            fitting.append((expected.mean, -cost, recipe.name))
    if not fitting:
        return None
    _, negative, name = max(fitting)
    return name, -negative


@cache
def resolution_exponent():
    return speeds.fit(costs.read_table()).exponent


def seconds_to_finish(*, resolutions, evaluations, rows, epoch, epoch_share, epoch_seconds, images, validation_images):
    """Seconds of the steps and evaluations that are left at the measured pace, or None before anything is measured.

    resolutions: px of every epoch. evaluations: [(px, views)] by epoch. rows: the log. epoch: whole epochs that are
    done; epoch_share, epoch_seconds: of the one after them. images, validation_images: of an epoch and of an
    evaluation. Where a resolution was not measured, seconds grow with it as published ones do.
    """
    # the newest epoch of a resolution: the run may have moved to another machine since the others
    seconds = {row["resolution"]: row["train_seconds"] for row in rows}
    if epoch < len(resolutions) and epoch_share > 0 and epoch_seconds > 0:
        seconds.setdefault(resolutions[epoch], epoch_seconds / epoch_share)
    if not seconds:
        return None

    def epoch_at(px):
        nearest = min(seconds, key=lambda known: abs(known - px))
        return seconds[nearest] * (px / nearest) ** resolution_exponent()

    def forward(px, views):
        """By the forward third of a training step."""
        return epoch_at(px) / images / 3 * validation_images * views

    slower = 1
    for row in rows:
        expected = sum(forward(*view) for view in evaluations[row["epoch"]])
        if expected and row["val_seconds"]:
            slower = row["val_seconds"] / expected
    left = sum(epoch_at(px) for px in resolutions[epoch:])
    if epoch < len(resolutions):
        left -= epoch_at(resolutions[epoch]) * epoch_share
    return left + slower * sum(forward(*view) for epoch in evaluations[epoch:] for view in epoch)
