"""studies/gpu_memory: what it counts is what a GPU was measured to take, and docs/recipes.md has what it printed."""

import re

import pytest

from studies.gpu_memory import gpu_memory as study
from tests.conftest import ROOT


def test_a_counted_step_is_within_5_percent_of_what_an_h100_took():
    measured = {(name, px): gib for name, px, gib in study.measurements()}
    assert len(measured) == 4
    learner = study.build("rn50_78")
    plain = study.step_gib(learner, 256, 128)
    assert plain == pytest.approx(measured["fp16", 128], rel=0.05)
    # SAM holds the first pass's gradients and the weights that it left: 0.1 GiB each
    assert study.step_gib(learner, 256, 128, climb=True) == pytest.approx(plain + 0.2, abs=0.05)


@pytest.mark.parametrize(("there_is", "expected"), [(40, "512, its own"), (18, "256"), (7, "64"), (1, "0")])
def test_the_micro_batch_is_the_largest_that_fits_up_to_the_recipes_own(there_is, expected):
    gib = {512: 18.3, 256: 10.1, 64: 3.9}
    assert study.micro_batch("rn50_88_epochs", gib, there_is) == expected


def test_the_page_has_what_the_study_printed():
    printed = (ROOT / "studies/gpu_memory/results.md").read_text()
    page = (ROOT / "docs/recipes.md").read_text()
    of = {name: row.split(" | ") for name, row in re.findall(r"^\| `(\w+)` \| \d+ \| (.*) \|$", printed, re.M)}
    assert f"`rn50_78` comes to {of['rn50_78'][1]} GiB, FFCV's recipes to {of['rn50_88_epochs'][0]} GiB" in page
    assert f"and to {of['rn50_88_epochs'][1]} GiB with 256." in page
    assert f"need {of['rn50_baseline_90_step'][1]} GiB" in page
    hours = re.findall(r"^\| ([\w ]+) \|.*\| (\d+) \([^|]*\| (\d+) \([^|]*\|$", printed, re.M)
    assert len(hours) == 8
    for gpu, first, second in hours:
        assert re.search(rf"[|;] {gpu}: {first}, {second}[ ;]", page), gpu
