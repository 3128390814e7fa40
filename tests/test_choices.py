"""Which settings are measured against each other, and which of them is chosen."""

import time

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException

from rn50 import choices, recipe
from rn50.errors import RunError
from rn50.learner import Learner
from rn50.precision import autocast_dtype
from tests.conftest import ROOT

CPU = torch.device("cpu")
KEYS = ("training.precision", "training.compile", "resolution.multiple")


def load(*settings, name="rn50_78"):
    return recipe.load("", [f"--config-file={ROOT}/rn50_configs/{name}.yaml", "--data.dir=none", *settings])


def tuples(cfg, device):
    return [tuple(settings[key] for key in KEYS) for settings in choices.settings(cfg, device)]


def test_a_gpu_is_tried_in_both_half_precisions_compiled_and_not(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    found = tuples(load(), torch.device("cuda", 0))
    assert found == [("fp16", False, 4), ("fp16", True, 8), ("bf16", False, 4), ("bf16", True, 8)]
    # the recipe's own come first, auto as what it means
    assert tuples(load("--training.precision=auto"), torch.device("cuda", 0))[0] == ("bf16", False, 4)
    assert tuples(load("--training.precision=fp32"), torch.device("cuda", 0))[0] == ("fp32", False, 4)
    # a T4 does not multiply in bf16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert tuples(load(), torch.device("cuda", 0)) == [("fp16", False, 4), ("fp16", True, 8)]


def test_a_processor_is_tried_in_what_it_multiplies_in():
    names = {name for name, _, _ in tuples(load("--training.precision=auto"), CPU)}
    assert names == ({"fp32", "bf16"} if autocast_dtype("auto", CPU) == torch.bfloat16 else {"fp32"})


def test_compiling_makes_the_ramp_coarser_only_where_its_ends_stay(monkeypatch):
    def multiples(*settings):
        return {multiple for _, compiled, multiple in tuples(load(*settings), CPU) if compiled}

    assert multiples() == {8}
    assert multiples("--resolution.multiple=32", "--resolution.start=96", "--resolution.end=192") == {32}
    assert multiples("--resolution.start=84") == {4}
    assert multiples("--training.compile=true") == {4}  # what the recipe says itself
    for cfg in (load(), choices.with_settings(load(), {"resolution.multiple": 8})):
        sides = recipe.resolutions(cfg)
        assert (sides[0], sides[-1]) == (88, 176)
    assert len(set(sides)) == 12


def test_most_of_the_work_is_at_the_end_of_the_ramp():
    assert choices.heaviest(load()) == 176
    assert choices.heaviest(load("--resolution.end_ramp=90")) == 88


def row(hours, failed=None):
    return {"hours": hours, "failed": failed}


def test_another_choice_must_be_worth_it():
    own, faster, as_fast = row(10.0), row(9.0), row(9.9)
    assert choices.fastest([own, as_fast]) is own
    assert choices.fastest([own, as_fast, faster]) is faster
    cannot = {"failed": "does not fit the GPU's memory"}
    assert choices.fastest([cannot, as_fast]) is as_fast
    assert choices.fastest([own, cannot]) is own
    with pytest.raises(RunError, match="no training step can be made here: does not fit"):
        choices.fastest([cannot, cannot])


SMALL = ["--training.batch_size=16", "--training.micro_batch=8", "--training.precision=fp16"]
HOW = {"classes": 10, "images": 1000, "device": CPU, "px": 32, "micro_batch": 8, "seconds": 0.2}


def test_hours_follow_from_the_rate_of_whole_steps(small_network):
    cfg = load(*SMALL, name="demo")
    own = {"training.precision": "fp32", "training.compile": False, "resolution.multiple": 4}
    found = choices.measure(cfg, own, **HOW)
    sides = recipe.resolutions(choices.with_settings(cfg, own))
    work = 1000 * sum((px / 32) ** 2 for px in sides)
    assert found["hours"] == pytest.approx(work / found["images_per_second"] / 3600, rel=0.01)
    assert (found["sizes"], found["compile_seconds"], found["failed"]) == (3, 0.0, None)
    assert cfg.training.precision == "fp16"  # the caller's is as it was


def test_steps_with_sam_count_as_often_as_a_run_has_them(small_network, monkeypatch):
    seen = []

    def step(self, micro_batches, *, step, **given):
        seen.append(self.climbs(step))
        time.sleep(0.06 if seen[-1] else 0.02)
        return torch.zeros(())

    monkeypatch.setattr(Learner, "step", step)
    own = {"training.precision": "fp32", "training.compile": False, "resolution.multiple": 4}
    for interval, seconds in ((4, (3 * 0.02 + 0.06) / 4), (1, 0.06)):
        seen.clear()
        cfg = load(*SMALL, "--training.sam_rho=0.5", f"--training.sam_interval={interval}", name="demo")
        found = choices.measure(cfg, own, **HOW)
        assert found["images_per_second"] == pytest.approx(16 / seconds, rel=0.1)
    assert all(seen)


def fails_with(error):
    def forward_backward(self, *args, **options):
        raise error

    return forward_backward


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("2 GiB more"), "does not fit the GPU's memory"),
        (TorchDynamoException("no compiler\nand a long story"), "no compiler"),
    ],
)
def test_a_choice_that_cannot_be_made_says_why(small_network, monkeypatch, error, said):
    monkeypatch.setattr(Learner, "forward_backward", fails_with(error))
    own = {"training.precision": "fp32", "training.compile": False, "resolution.multiple": 4}
    found = choices.measure(load(*SMALL, name="demo"), own, **HOW)
    assert found == {"settings": own, "resolution": 32, "failed": said}
