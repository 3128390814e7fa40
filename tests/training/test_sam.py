"""Whole runs with SAM and mixup: they resume exactly, the number of ranks does not change them, the recipes run."""

import re

import pytest
import yaml
from torchvision import models

from rn50 import learner
from rn50.files import read_rows
from tests import chaos
from tests.commands import Command
from tests.conftest import ROOT
from tests.training.test_stops import stop_every_seven_steps

FLAGS = {"training__sam_rho": 0.5, "training__sam_interval": 3, "training__mixup": 0.2, "training__loss": "bce"}
FLAGS |= {"training__batch_size": 40, "training__epochs": 6}


def say_where_it_climbs():
    climbs = learner.Learner.climbs

    def said(self, step):
        if climbs(self, step):
            print("climbs in step", step)
        return climbs(self, step)

    learner.Learner.climbs = said


@pytest.fixture(scope="module")
def whole(betons, tmp_path_factory):
    """{ranks: the folder of a run that nothing disturbed}."""
    folders = {}
    for ranks in (1, 2):
        folder = tmp_path_factory.mktemp("whole")
        with Command(betons, folder, ranks=ranks, prepare=say_where_it_climbs, **FLAGS) as command:
            assert command.end() == 0, command.output()
        said = re.findall(r"climbs in step (\d+)\n", command.output())
        assert [int(step) for step in said] == [2, 5, 8, 11, 14, 17, 20, 23, 26, 29]  # whatever epoch that is
        folders[ranks] = command.folder
    return folders


@pytest.mark.parametrize("ranks", [1, 2])
def test_it_goes_on_at_any_step_with_the_same_bits(whole, betons, tmp_path, ranks):
    for _ in range(5):  # it stops after 7, 14, 21 and 28 of 30 steps
        with Command(betons, tmp_path, ranks=ranks, prepare=stop_every_seven_steps, **FLAGS) as command:
            assert command.end() == (0 if ranks > 1 else 3) or command.status()["status"] == "finished"
    assert command.status()["status"] == "finished"
    outcomes = (chaos.outcome(folder, epochs=6) for folder in (command.folder, whole[ranks]))
    assert chaos.compare(*outcomes) == "identical"


def test_each_micro_batch_climbs_by_itself_so_two_ranks_compute_what_one_does(whole):
    """A climb along the gradient of a rank's whole share, or mixing by the rank's own count, would differ."""
    one, two = (read_rows(folder / "log.jsonl") for folder in whole.values())
    assert [row["train_loss"] for row in two] == pytest.approx([row["train_loss"] for row in one], rel=1e-4)
    assert [row["val_loss"] for row in two] == pytest.approx([row["val_loss"] for row in one], rel=1e-2)


def spoil_one_first_gradient():
    """Infinite in the loss that SAM climbs by: the third step's, in the first of its micro-batches."""
    climbed, count = learner.climbed, []

    def spoiled(parameters, gradients, rho):
        count.append(None)
        if len(count) == 1:
            gradients = [gradient * float("inf") for gradient in gradients]
        return climbed(parameters, gradients, rho)

    learner.climbed = spoiled


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_first_gradient_that_is_not_finite_leaves_the_step_out(betons, tmp_path, precision):
    flags = FLAGS | {"training__epochs": 2, "training__precision": precision}
    with Command(betons, tmp_path, prepare=spoil_one_first_gradient, **flags) as command:
        assert command.end() == 0, command.output()
    rows = read_rows(command.folder / "log.jsonl")
    assert [row["skipped_steps"] for row in rows] == [1, 0]
    assert all(row["train_loss"] < 10 for row in rows)


REAL = models.resnet18


def with_the_real_network():
    models.resnet18 = REAL


@pytest.mark.parametrize("name", ["rn50_mild_28", "rn50_medium_67"])
def test_the_recipes_run_from_end_to_end(betons, tmp_path, name):
    """The files themselves, with ResNet-18 on 200 images of textures: fewer epochs, smaller steps and sizes."""
    changed = {"config-file": f"{ROOT}/rn50_configs/{name}.yaml", "data__rung": "auto", "model__ema_half_life": 10}
    changed |= {"resolution__start": 24, "resolution__end": 48, "resolution__start_ramp": 2.4}
    changed |= {"resolution__end_ramp": 4.8, "training__epochs": 6, "logging__run_name": "small"}
    with Command(betons, tmp_path, prepare=with_the_real_network, **changed) as command:
        assert command.end(within=180) == 0, command.output()
    rows = read_rows(command.folder / "log.jsonl")
    assert [row["resolution"] for row in rows] == [24, 24, 24, 32, 40, 48]
    assert [row["rung"] for row in rows] == [64, 64, 64, 96, 96, 96]
    used = yaml.safe_load((command.folder / "config.yaml").read_text())
    assert used["training"]["loss"] == "bce"
    assert (used["training"]["sam_rho"] > 0) == (used["training"]["mixup"] > 0) == (name != "rn50_mild_28")
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    assert rows[-1]["top1"] > 20
