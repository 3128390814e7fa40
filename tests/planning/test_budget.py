"""The budget guard: what it counts and projects, and that a run stops before its limit and goes on with more."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

from rn50.errors import UsageError
from rn50.files import read_rows
from rn50.planning import budget, costs, speeds
from rn50.training.progress import Progress
from tests.conftest import ROOT
from tests.test_train_imagenet import TORCHRUN, assert_refused, command, run

# A dollar for every tenth of a second: limits are reached within a test.
PRICE = 36000
STOPPING = PRICE * budget.STOP_SECONDS / 3600
LONG = {
    "model__arch": "resnet50",
    "training__epochs": 5000,
    "training__micro_batch": 40,
    "resolution__end": 32,
    "validation__resolutions": 32,
    "validation__headline_resolution": 32,
    "validation__every": 5000,
    "budget__instance": "g5.xlarge",
    "budget__dollars_per_hour": PRICE,
}


def test_the_price_is_given_or_looked_up():
    assert budget.price(dollars_per_hour=0.5, instance="g5.xlarge", spot=False) == 0.5
    assert budget.price(dollars_per_hour=None, instance="g5.xlarge", spot=False) == 1.006
    assert budget.price(dollars_per_hour=None, instance="g5.xlarge", spot=True) == 0.92  # the highest seen
    assert budget.price(dollars_per_hour=None, instance=None, spot=True) is None
    with pytest.raises(UsageError, match=r"no spot price is known for g6.xlarge.*budget.dollars_per_hour"):
        budget.price(dollars_per_hour=None, instance="g6.xlarge", spot=True)


def test_the_meter_counts_from_the_start_of_the_process_and_what_either_file_knows(tmp_path):
    age = budget.process_age()
    assert 0 < age < 3600
    meter = budget.Meter(tmp_path, dollars_per_hour=3600, max_dollars=None, before=10.0)
    assert 10 + age <= meter.dollars < 10 + age + 1
    assert not meter.spent()
    meter.write()
    kept = json.loads((tmp_path / "spend.json").read_text())["dollars"]
    assert kept == pytest.approx(meter.dollars, abs=0.5)
    # a crash after the checkpoint, which knew of 10 only, loses nothing that spend.json has
    again = budget.Meter(tmp_path, dollars_per_hour=3600, max_dollars=kept + age + 130, before=10.0)
    assert again.dollars >= kept + age
    assert not again.spent()
    assert again.seconds_left() == pytest.approx(130 - budget.STOP_SECONDS, abs=1)
    assert meter.seconds_left() == float("inf")
    again.max_dollars = again.dollars + budget.STOP_SECONDS
    assert again.spent()
    for number, damaged in enumerate(("", "{", '{"dollars": null}', '{"dollars": NaN}', "[]")):
        folder = tmp_path / str(number)  # of its own: the meters above write theirs every few seconds
        folder.mkdir()
        (folder / "spend.json").write_text(damaged)
        assert budget.Meter(folder, dollars_per_hour=0, max_dollars=1, before=7.0).dollars == 7


def test_seconds_to_finish_are_those_of_what_is_left():
    given = {
        "resolutions": [100, 100, 200, 200],
        "evaluations": [[], [(100, 1)], [], [(100, 2), (200, 2)]],
        "images": 1000,
        "validation_images": 300,
    }
    finish = budget.seconds_to_finish
    assert finish(**given, rows=[], epoch=0, epoch_share=0.0, epoch_seconds=0.0) is None
    larger = 2 ** budget.resolution_exponent()
    assert 1.5 < budget.resolution_exponent() < 2.5
    # a quarter of the first epoch took 5 s; one view of all validation images takes 20 x 300 / 1000 / 3 = 2 s
    measured = finish(**given, rows=[], epoch=0, epoch_share=0.25, epoch_seconds=5.0)
    assert measured == pytest.approx(15 + 20 + 2 * 20 * larger + 2 + 2 * 2 + 2 * 2 * larger)
    # evaluation turned out three times as slow, and the larger images took 30 s
    rows = [
        {"epoch": 0, "resolution": 100, "train_seconds": 20.0, "val_seconds": 0.0},
        {"epoch": 1, "resolution": 100, "train_seconds": 20.0, "val_seconds": 6.0},
        {"epoch": 2, "resolution": 200, "train_seconds": 30.0, "val_seconds": 0.0},
    ]
    left = finish(**given, rows=rows, epoch=3, epoch_share=0.0, epoch_seconds=0.0)
    assert left == pytest.approx(30 + 3 * (2 * 2 + 2 * 3))
    rows.append({"epoch": 3, "resolution": 200, "train_seconds": 30.0, "val_seconds": 30.0})
    assert finish(**given, rows=rows, epoch=4, epoch_share=0.0, epoch_seconds=0.0) == 0
    # on a machine that is four times as fast from epoch 1 on, the slow one's epoch says nothing of the rest
    moved = [{"epoch": 0, "resolution": 100, "train_seconds": 80.0, "val_seconds": 0.0}, rows[1]]
    left = finish(**given, rows=moved, epoch=2, epoch_share=0.0, epoch_seconds=0.0)
    assert left == pytest.approx(2 * 20 * larger + 3 * (2 * 2 + 2 * 2 * larger))


def test_a_projection_is_the_plans_and_scales_with_the_data():
    recipe = costs.read_recipe(ROOT / "rn50_configs" / "rn50_78.yaml")
    table = costs.read_table()
    (machine,) = [machine for machine in costs.machines(table, spot=False) if machine.name == "g5.xlarge"]
    parts, _ = speeds.hours(table, speeds.fit(table), speeds.loader_rates(table), recipe, machine)
    here = {"gpu_name": None, "gpus": 1, "machines": 1, "vcpus": 4, "memory_gib": 16}
    whole = {"images": 1281167, "validation_images": 50000, **here}
    hours, error = budget.projected_hours(recipe, instance="g5.xlarge", spot=False, **whole)
    assert hours == pytest.approx(parts["training"] + parts["evaluation"])
    assert 0 < error < 1
    half = {"images": 1281167 / 2, "validation_images": 25000, **here}
    assert budget.projected_hours(recipe, instance="g5.xlarge", spot=False, **half)[0] == pytest.approx(hours / 2)
    # the GPU's own name is known, and a longer name is not mistaken for a shorter one
    named, _ = budget.projected_hours(recipe, instance=None, spot=False, **{**whole, "gpu_name": "NVIDIA A10G"})
    assert named == pytest.approx(hours, rel=0.02)
    assert budget.projected_hours(recipe, instance=None, spot=False, **whole) is None
    for unknown in ("NVIDIA L40", "NVIDIA T400 4GB"):  # no L4, no T4
        assert budget.projected_hours(recipe, instance=None, spot=False, **{**whole, "gpu_name": unknown}) is None


def test_a_projection_is_for_the_gpus_that_the_run_uses_at_whatever_price():
    recipe = costs.read_recipe(ROOT / "rn50_configs" / "rn50_78.yaml")
    whole = {"images": 1281167, "validation_images": 50000, "gpu_name": None, "vcpus": 48, "memory_gib": 192}

    def hours(instance, gpus, machines=1, spot=False):
        given = {"gpus": gpus, "machines": machines, "instance": instance, "spot": spot}
        return budget.projected_hours(recipe, **whole, **given)[0]

    one = hours("g5.xlarge", 1)
    assert hours("g5.12xlarge", 1) == pytest.approx(one, rel=0.1)  # three of its GPUs have nothing to do
    assert one / 4 < hours("g5.12xlarge", 4) < one / 3
    assert one / 2 < hours("g5.xlarge", 2, machines=2) < one / 1.7
    # a spot price that is given needs none in the table, and a type that the table lacks is no error
    assert hours("g6.xlarge", 1, spot=True) > hours("g6.xlarge", 1)
    missing = {"gpus": 1, "machines": 1, "instance": "g9.huge", "spot": False}
    assert budget.projected_hours(recipe, **whole, **missing) is None


def test_the_largest_recipe_that_fits_is_the_most_accurate():
    recipes = costs.read_recipes(costs.read_table())
    by_epochs = {"rn50_78": 15.0, "rn50_mild_36": 7.0, "rn50_16_epochs": 4.0}  # hours; the rest are too long

    def hours_of(recipe):
        return by_epochs.get(recipe.name, 1000.0)

    assert budget.largest_that_fits(recipes, hours_of, 2.0, 30.0) == ("rn50_78", 30.0)
    assert budget.largest_that_fits(recipes, hours_of, 2.0, 29.9) == ("rn50_mild_36", 14.0)
    assert budget.largest_that_fits(recipes, hours_of, 2.0, 7.9) is None


def test_the_recipe_that_is_offered_would_not_be_refused_itself(tmp_path):
    price, config = 1000.0, yaml.safe_load((ROOT / "rn50_configs" / "rn50_78.yaml").read_text())
    counts = {"images": 1281167, "validation_images": 50000}
    machine = {"gpu_name": None, "gpus": 1, "machines": 1, "vcpus": 4, "memory_gib": 16}
    smaller = costs.read_recipe(ROOT / "rn50_configs" / "rn50_mild_36.yaml")
    hours, _ = budget.projected_hours(smaller, instance="g5.xlarge", spot=False, **machine, **counts)
    # what stopping takes is $33 at this price; the process is less than a minute, or $17, older when it is asked
    for margin, offered in ((25 / price, False), (60 / price, True)):
        limit = price * (hours + margin + budget.process_age() / 3600)
        given = config | {"budget": {"max_dollars": limit, "spot": False, "instance": "g5.xlarge"}}
        folder = tmp_path / str(offered)
        guard = budget.Guard(folder, config=given, progress=Progress(), dollars_per_hour=price, **counts)
        message, _ = guard.refusal(ladder=costs.LADDER, **machine)
        assert ("the largest recipe that fits: rn50_mild_36" in message) == offered


def test_a_schedule_that_is_projected_to_cost_more_is_refused_with_one_that_fits(betons, tmp_path):
    result = run(betons, tmp_path, **LONG, budget__max_dollars=STOPPING + 1500)
    assert_refused(
        result, 2, "projected from published speeds", "largest recipe that fits: rn50_medium_135", "allow_overrun"
    )
    assert not (tmp_path / "small" / "last.pt").exists()


def test_what_is_left_after_a_resume_is_projected_at_the_runs_own_pace(tmp_path):
    progress = Progress(epoch=2, dollars=4.0)
    progress.rows = [
        {"epoch": epoch, "resolution": 64, "train_seconds": 1800.0, "val_seconds": 0.0} for epoch in (0, 1)
    ]
    config = {
        "training": {"epochs": 4},
        "resolution": {"start": 64, "end": 64, "start_ramp": 0, "end_ramp": 0, "multiple": 32},
        "validation": {"every": 5, "resolutions": [], "headline_resolution": 64, "headline_view": "single"},
    }
    counts = {"images": 100, "validation_images": 100, "dollars_per_hour": 2.0}
    for limit, refused in ((6.0, True), (6.0 + 2 * (budget.STOP_SECONDS + budget.process_age() + 60) / 3600, False)):
        given = config | {"budget": {"max_dollars": limit, "spot": False}}
        guard = budget.Guard(tmp_path / str(refused), config=given, progress=progress, **counts)
        message, unknown = guard.refusal(ladder={64: 64}, gpu_name=None, gpus=1, machines=1, vcpus=2, memory_gib=8)
        assert unknown is None
        assert (message is not None) == refused
        if message:
            assert "and $2.00 to finish (at the pace of this run so far)" in message
            assert "recipe" not in message


def test_a_run_stops_before_its_limit_and_goes_on_with_a_larger_one(betons, tmp_path):
    folder = tmp_path / "small"
    given = {**LONG, "model__arch": "resnet18", "budget__allow_overrun": "true"}
    limit = STOPPING + 120
    result = run(betons, tmp_path, **given, budget__max_dollars=limit)
    assert result.returncode == 4, result.stdout + result.stderr
    assert "a larger budget.max_dollars goes on from there" in result.stdout
    status = json.loads((folder / "status.json").read_text())
    assert (status["status"], status["reason"].split("=")[0]) == ("budget", "budget.max_dollars")
    spent = json.loads((folder / "spend.json").read_text())["dollars"]
    assert 120 - 1 <= spent < limit
    before = read_rows(folder / "log.jsonl")

    process = subprocess.Popen(
        command(betons, tmp_path, **given, budget__max_dollars=1e9), stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 240
    try:
        while len(read_rows(folder / "log.jsonl")) <= len(before):
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert process.returncode == 3, output
    if status["step"]:
        assert f"at step {status['step']}:" in output
    row = read_rows(folder / "log.jsonl")[len(before)]
    assert row["epoch"] == len(before)
    assert row["dollars"] > spent
    assert row["dollars_epoch"] == pytest.approx(PRICE / 3600 * (row["train_seconds"] + row["val_seconds"]), rel=1e-3)
    assert row["dollars_to_finish"] > row["dollars"]
    # the row is older than this moment by what stopping took
    left = 3600 * row["dollars_to_finish"] / PRICE
    assert row["finish_time"] == pytest.approx(time.time() + left, abs=70)
    assert left > 300
    assert f"${row['dollars_to_finish']:,.2f} to finish" in output


def test_two_ranks_stop_at_the_limit_together(betons, tmp_path):
    given = {**LONG, "model__arch": "resnet18", "training__micro_batch": 20, "budget__allow_overrun": "true"}
    torchrun = (*TORCHRUN, "--standalone", "--nproc_per_node=2")
    result = run(betons, tmp_path, launcher=torchrun, **given, budget__max_dollars=STOPPING + 400)
    # under torchrun, which starts whatever fails again
    assert result.returncode == 0, result.stdout + result.stderr
    status = json.loads((tmp_path / "small" / "status.json").read_text())
    assert status["status"] == "budget"
    assert status["step"] > 0
    assert torch.load(tmp_path / "small" / "last.pt", weights_only=False)["step"] == status["step"]
    assert 400 - 1 <= json.loads((tmp_path / "small" / "spend.json").read_text())["dollars"] < STOPPING + 400


def test_a_pipe_that_is_closed_ends_a_command_without_a_traceback():
    command = f"{sys.executable} tools/plan_run.py --budget 25 --target 78 | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (141, "")
