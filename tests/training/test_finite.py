"""Weights or figures that are not finite: the run has failed, and the checkpoint from before stays."""

import json
import math
import sys

import pytest
import torch

from rn50.errors import RunError
from rn50.files import read_rows
from rn50.model import not_finite
from rn50.optimizer import FiniteSteps
from rn50.training import checkpoint
from tests.commands import Command
from tools import export_model

THREE_STEPS = {"training__epochs": 1, "training__batch_size": 60, "training__micro_batch": 60, "lr__warmup_epochs": 0}


def failed(command, *words):
    """Asserts one line, exit status 1 and `failed`."""
    assert command.end() == 1, command.output()
    (line,) = [line for line in command.output().splitlines() if line.startswith(("error", "Traceback"))]
    for word in words:
        assert word in line
    assert command.status()["status"] == "failed"
    assert all(word in command.status()["reason"] for word in words)


def test_three_steps_with_a_rate_of_1e30_have_failed(betons, tmp_path):
    with Command(betons, tmp_path, lr__lr_per_256="1e30", **THREE_STEPS) as command:
        failed(command, "not finite", "lr.lr_per_256")
    assert "finished" not in command.output()


def spoil(step, change):
    """Have `change(finite)` follow an optimizer step: what a step that is too long, or BatchNorm, may do."""
    make, steps = FiniteSteps.step, []

    def spoiling(self, loss):
        loss = make(self, loss)
        steps.append(None)
        if len(steps) == step:
            change(self)
            self.remember()
        return loss

    FiniteSteps.step = spoiling


def first_weight(finite):
    return finite.optimizer.param_groups[0]["params"][0].data


def spoil_a_weight():
    spoil(15, lambda finite: first_weight(finite)[7].fill_(math.inf))


def spoil_a_statistic():
    spoil(15, lambda finite: finite._buffers[1][3].fill_(math.nan))


@pytest.mark.parametrize(
    ("prepare", "name"), [(spoil_a_weight, "0.weight"), (spoil_a_statistic, "1.running_var")]
)  # fmt: skip
def test_the_checkpoint_from_before_stays_and_the_same_command_goes_on_from_it(betons, tmp_path, prepare, name):
    with Command(betons, tmp_path, prepare=prepare) as command:
        failed(command, "weights are not finite at step", f"({name})", "the last checkpoint is from before")
    saved = checkpoint.load(command.folder / "last.pt")
    assert saved["step"] == 10
    assert not_finite(saved["model"]) is None
    assert not_finite(saved["ema"]["model"]) is None
    with Command(betons, tmp_path) as command:
        assert command.end() == 0, command.output()
    assert "resuming" in command.output()
    assert command.status()["status"] == "finished"


def enlarge_at_the_end():
    spoil(30, lambda finite: [weight.data.fill_(1e30) for weight in finite.optimizer.param_groups[0]["params"]])


def enlarge_after_an_epoch():
    spoil(10, lambda finite: [weight.data.fill_(1e30) for weight in finite.optimizer.param_groups[0]["params"]])


def test_a_final_evaluation_that_is_not_finite_is_a_failure_too(betons, tmp_path):
    with Command(betons, tmp_path, prepare=enlarge_at_the_end, model__ema_half_life=0) as command:
        failed(command, "the evaluation's loss at 32 px is not finite, although the weights are")
    assert [row["epoch"] for row in read_rows(command.folder / "log.jsonl")] == [0, 1]
    evaluated = {"training__eval_only": "true", "model__ema_half_life": 0}
    with Command(betons, tmp_path, **evaluated) as command:
        assert command.end() == 1
    assert "the evaluation's loss at 32 px is not finite" in command.output()


def test_an_evaluation_on_the_way_only_warns_and_the_log_stays_json(betons, tmp_path):
    with Command(betons, tmp_path, prepare=enlarge_after_an_epoch, model__ema_half_life=0) as command:
        failed(command, "not finite in 10 steps in a row")
    assert "warning: the evaluation's loss is not finite" in command.output()
    (row,) = (command.folder / "log.jsonl").read_text().splitlines()
    found = json.loads(row, parse_constant=pytest.fail)
    assert "val_loss" not in found
    assert "top1" in found


@pytest.fixture
def spoiled(tiny_checkpoint, tmp_path):
    """A checkpoint of an older version's run that ended so, without a word."""
    state = checkpoint.load(tiny_checkpoint)
    state["ema"]["model"]["layer1.0.bn1.running_mean"][0] = math.nan
    (tmp_path / "run").mkdir()
    checkpoint.save(tmp_path / "run", state)
    return tmp_path / "run" / "last.pt"


def test_an_export_of_it_is_refused_and_leaves_nothing(spoiled, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["", "--checkpoint", str(spoiled), "--out", str(tmp_path / "model")])
    with pytest.raises(RunError, match=r"run/last.pt holds weights that are not finite \(layer1.0.bn1.running_mean\)"):
        export_model.main()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_neither_evaluation_nor_training_goes_on_from_it(betons, tmp_path):
    with Command(betons, tmp_path, training__epochs=2) as command:
        assert command.end() == 0, command.output()
    state = checkpoint.load(command.folder / "last.pt")
    state["model"]["0.weight"][0] = math.nan
    checkpoint.save(command.folder, state)
    for more, words in (({"training__eval_only": "true"}, "of no use"), ({}, "move the folder away to start anew")):
        with Command(betons, tmp_path, training__epochs=2, **more) as command:
            assert command.end() == 1
        assert "holds weights that are not finite (0.weight)" in command.output()
        assert words in command.output()


def test_the_name_of_what_is_not_finite_is_found():
    weights = {"a": torch.ones(3), "counted": torch.tensor(3), "b": torch.ones(2, 2)}
    assert not_finite(weights) is None
    for value in (math.nan, math.inf, -math.inf):
        weights["b"][1, 1] = value
        assert not_finite(weights) == "b"
