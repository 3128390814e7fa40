"""Speeds and hours: the arithmetic against hand-made cases, and how it does on published runs."""

import dataclasses
import json
import math

import pytest

from rn50.planning import costs, speeds
from tests.conftest import ROOT

TABLE = costs.read_table()
SPEEDS = speeds.fit(TABLE)
LOADER = speeds.loader_rates(TABLE)
RECIPES = {recipe.name: recipe for recipe in costs.read_recipes(TABLE)}
MACHINES = {machine.name: machine for machine in costs.machines(TABLE, spot=False)}


def test_the_exponent_is_that_of_ffcvs_two_resolutions():
    assert math.log(28087 / 20679) / math.log(192 / 160) == pytest.approx(SPEEDS.exponent)
    assert speeds.fit(TABLE, without="FFCV").exponent == 2


def test_sources_count_once_and_a_gpu_without_any_comes_from_its_bandwidth():
    rate, sources = SPEEDS.gpu_rate("A10G", 600)
    assert sources == 2
    assert min(SPEEDS.by_gpu["A10G"].values()) < rate < max(SPEEDS.by_gpu["A10G"].values())
    assert SPEEDS.gpu_rate("A100", 1555)[1] == 8
    assert SPEEDS.gpu_rate("L40S", 864) == (864 * SPEEDS.per_bandwidth, 0)


def test_what_a_source_has_more_than_others_on_the_same_gpus_is_its_codes():
    rates, code = speeds.separate({"A": {"x": 100.0, "y": 400.0}, "B": {"x": 200.0}, "C": {"z": 7.0}})
    # by hand: half of A's factor of 4 is the codes', a square root of 2 for each, and half is left over
    assert (code["x"], code["y"], code["z"]) == pytest.approx((2**-0.5, 2**0.5, 1))
    assert rates == pytest.approx({"A": 200, "B": 200 * 2**0.5, "C": 7})


def test_lambdas_old_code_is_told_from_its_gpus():
    assert min(SPEEDS.code, key=SPEEDS.code.get) == "Lambda"
    assert SPEEDS.rates["RTX 4090"] > SPEEDS.by_gpu["RTX 4090"]["Lambda"]


def test_blurs_are_taken_out_of_rates_and_put_into_recipes():
    flagship, machine = RECIPES["rn50_78"], MACHINES["g5.xlarge"]
    rate, _ = speeds.pace(TABLE, SPEEDS, LOADER, flagship, machine, 176, 500, passes=1)
    plain, _ = speeds.pace(
        TABLE, SPEEDS, LOADER, dataclasses.replace(flagship, network=""), machine, 176, 500, passes=1
    )
    step = json.loads((ROOT / "studies/gpu_h100/step.json").read_text())["results"]
    measured = {row["name"]: row["gpu_milliseconds"] for row in step}
    assert rate / plain == pytest.approx(measured["fp16_no_blur"] / measured["fp16"], abs=0.01)
    (ours,) = [row for row in TABLE.rate if row["name"] == "rn50"]
    implied = ours["value"] * (176 / 224) ** SPEEDS.exponent / (rate / plain)
    assert SPEEDS.by_gpu["H100"]["rn50"] == pytest.approx(implied)
    # SAM: an eleventh of all passes is its own
    with_sam, _ = speeds.pace(TABLE, SPEEDS, LOADER, flagship, machine, 176, 500, flagship.passes)
    assert with_sam == pytest.approx(rate / 1.1)


def test_leaving_a_source_out_leaves_out_all_it_said():
    fitted = speeds.fit(TABLE, without="Lambda")
    assert all("Lambda" not in sources for sources in fitted.by_gpu.values())
    assert "RTX 4090" not in fitted.by_gpu
    row = next(row for row in speeds.check(TABLE) if row["source"] == "Sagar063" and row["gpu"] == "A10G")
    assert row["sources"] == 1
    without = speeds.fit(TABLE, without="Sagar063")
    hours = 195 * 1_281_167 / without.by_gpu["A10G"]["crpatel"] / 3600
    assert row["predicted"] == pytest.approx(hours)
    assert row["error"] == pytest.approx(hours / 88 - 1)


def test_a_source_cannot_improve_the_prediction_of_itself():
    """Ten times the images/s in one source's rows change nothing in what is predicted for it."""
    rate = [{**row, "value": row["value"] * (10 if row["name"] == "NVIDIA" else 1)} for row in TABLE.rate]
    changed = speeds.check(dataclasses.replace(TABLE, rate=rate))
    for before, after in zip(speeds.check(TABLE), changed, strict=True):
        if before["source"] == "NVIDIA":
            assert after["predicted"] == before["predicted"]


def test_the_error_is_what_the_readme_says_and_excluded_runs_do_not_count():
    checked = speeds.check(TABLE)
    errors = speeds.prediction_errors(checked)
    assert {key: round(math.expm1(value), 2) for key, value in errors.items()} == {True: 0.24, False: 0.30}
    assert speeds.median_error(checked) == pytest.approx(0.14, abs=0.005)
    counted = [row for row in checked if row["counted"]]
    assert speeds.prediction_errors(counted) == errors
    assert all(abs(row["error"]) < 0.505 for row in counted)
    assert speeds.median_error(counted) == speeds.median_error(checked)


def test_ffcvs_own_machine_is_projected_as_published_within_the_error():
    machine = MACHINES["p4d.24xlarge"]
    parts, limit = speeds.hours(TABLE, SPEEDS, LOADER, RECIPES["rn50_56_epochs"], machine)
    # 49.4 minutes
    assert parts["training"] + parts["evaluation"] == pytest.approx(49.4 / 60, rel=0.24)
    assert limit == "GPU"


def test_the_loader_ceiling_is_anchored_at_a_figure_for_all_vcpus():
    def rates(ours, stock):
        loader = {"rn50": {"value": ours}, "ffcv": {"value": stock}}
        return speeds.loader_rates(dataclasses.replace(TABLE, loader=loader))

    assert rates(900.0, 300.0)["ffcv"] == pytest.approx(31278 / 96, rel=1e-3)
    assert rates(900.0, 300.0)["rn50"] == pytest.approx(3 * 31278 / 96 * 0.7, rel=1e-3)
    # a faster host makes both faster, and says nothing about a vCPU elsewhere
    assert rates(1800.0, 600.0) == rates(900.0, 300.0)


def test_the_loaders_rates_are_those_that_the_study_measured():
    tables = json.loads((ROOT / "studies/loader/1thread.json").read_text())["measurements"]
    [rows] = [table["results"] for table in tables if table["resolution"] == 160]
    measured = {row["name"]: row["images_per_second"] for row in rows}
    assert {name: row["value"] for name, row in TABLE.loader.items()} == {name: measured[name] for name in TABLE.loader}


def test_smaller_crops_and_smaller_files_decode_faster():
    assert speeds.loader_scale(TABLE, 160, 500) == 1
    assert speeds.loader_scale(TABLE, 224, 500) < 1 < speeds.loader_scale(TABLE, 88, 500)
    assert speeds.loader_scale(TABLE, 160, 400) > 1
    assert [round(speeds.beton_gb(TABLE, side)) for side in (256, 512)] == [22, 65]


def test_what_limits():
    machine, recipe = MACHINES["g5.xlarge"], RECIPES["rn50_78"]
    loader = LOADER | {"rn50": 500.0}

    def pace(machine):
        return speeds.pace(TABLE, SPEEDS, loader, recipe, machine, 160, 400, passes=1)

    assert pace(machine)[1] == "GPU"
    rate, limit = pace(dataclasses.replace(machine, vcpus=2))
    assert limit == "CPU"
    # one of the two vCPU launches kernels
    assert rate == pytest.approx(500 * speeds.loader_scale(TABLE, 160, 400))
    assert pace(dataclasses.replace(machine, vcpus=1)) == (pytest.approx(rate / 2), "CPU")
    slow = dataclasses.replace(machine, disk_mb_per_s=10.0)
    rate, limit = pace(slow)
    assert limit == "disk"
    assert rate == pytest.approx(10e6 / (speeds.beton_gb(TABLE, 400) * 1e9 / 1_281_167))
    # what fits in memory is read once
    assert pace(dataclasses.replace(slow, memory_gib=100))[1] == "GPU"


def test_evaluation_is_a_third_of_a_training_step_but_no_faster_than_the_loader():
    recipe = dataclasses.replace(RECIPES["rn50_78"], evaluated=[(224, 1)])

    def images_per_second(machine):
        parts, _ = speeds.hours(TABLE, SPEEDS, LOADER, recipe, machine)
        return 50000 / parts["evaluation"] / 3600

    many, two = (dataclasses.replace(MACHINES["g5.xlarge"], vcpus=vcpus) for vcpus in (48, 2))
    network = SPEEDS.ours * speeds.network_speed(TABLE, "both blurs")
    gpu = SPEEDS.total("A10G", 600, 1, 224) * network
    assert images_per_second(many) == pytest.approx(3 * gpu)
    fed = LOADER["rn50"] * speeds.loader_scale(TABLE, 224, 500)  # of one vCPU, the other launches kernels
    assert gpu < fed < 3 * gpu
    assert images_per_second(two) == pytest.approx(fed)
    # the mirror image is the same image decoded once
    recipe = dataclasses.replace(recipe, evaluated=[(224, 2)])
    assert images_per_second(many) == pytest.approx(1.5 * gpu)
    assert images_per_second(two) == pytest.approx(min(fed, 1.5 * gpu))


def test_a_small_micro_batch_does_not_fill_a_fast_gpu():
    machine, recipe = MACHINES["p5.4xlarge"], RECIPES["rn50_78"]
    given = (machine, 88, 256, 1)
    full = speeds.pace(TABLE, SPEEDS, LOADER, recipe, *given)[0]
    small = speeds.pace(TABLE, SPEEDS, LOADER, dataclasses.replace(recipe, micro_batch=32), *given)[0]
    assert small == pytest.approx(32 / 0.025)
    assert full > 4 * small


def test_measured_speeds_are_taken_as_they_are_and_interpolated_in_logarithms():
    machine = dataclasses.replace(
        MACHINES["g5.xlarge"],
        measured={88: 4000.0, 176: 1000.0},
        limits={88: "CPU", 176: "GPU"},
        loader={88: 4000.0, 176: 2000.0},
    )

    def pace(px, passes=1.0, recipe="rn50_mild_60"):
        return speeds.pace(TABLE, SPEEDS, LOADER, RECIPES[recipe], machine, px, 400, passes)

    assert pace(88) == (4000.0, "CPU")
    assert pace(176) == (pytest.approx(1000), "GPU")
    assert pace(124)[0] == pytest.approx(4000 * (88 / 124) ** 2)
    assert pace(224)[0] == pytest.approx(1000 * (176 / 224) ** SPEEDS.exponent)
    # evaluation: three times as fast as training, but no faster than the loader
    assert pace(176, passes=1 / 3)[0] == pytest.approx(2000)
    assert pace(176, passes=2 / 3)[0] == pytest.approx(1500)
    # what preflight measured had SAM's passes in it
    assert pace(176, 1.1, "rn50_78")[0] == pytest.approx(1000)
    assert pace(176, 0.9, "rn50_78")[0] == pytest.approx(1000 * 1.1 / 0.9)
