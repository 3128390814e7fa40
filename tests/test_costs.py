"""The cost model: its data, its arithmetic against hand-made cases, and how it does on published runs."""

import csv
import dataclasses
import json
import math

import pytest

from rn50.planning import costs
from tests.conftest import ROOT

TABLE = costs.read_table()
SPEEDS = costs.fit(TABLE)
LOADER = costs.loader_rates(TABLE)
RECIPES = {recipe.name: recipe for recipe in costs.read_recipes(TABLE)}
MACHINES = {machine.name: machine for machine in costs.machines(TABLE, spot=False)}


def test_every_row_has_a_date_and_a_source():
    with open(costs.TABLE, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    assert {row["kind"] for row in rows} == set(costs.Table.__dataclass_fields__)
    for row in rows:
        assert all(row[key] for key in ("name", "date", "source")), row
        assert None not in row, row
    assert {row["gpu"] for row in rows if row["gpu"]} == set(TABLE.gpu)


def test_every_recipe_of_the_folder_is_planned():
    assert set(TABLE.recipe) == {path.stem for path in (ROOT / "rn50_configs").glob("rn50_*.yaml")}


def test_work_is_summed_over_the_schedule():
    assert costs.parse_schedule("160x45+192x11") == [(160, 45), (192, 11)]
    resolutions = RECIPES["rn50_56_epochs"].resolutions
    assert [resolutions.count(px) for px in (160, 192)] == [45, 11]
    assert len(RECIPES["rn50_56_epochs"].evaluated) == 55 + 2


def test_the_exponent_is_that_of_ffcvs_two_resolutions():
    assert math.log(28087 / 20679) / math.log(192 / 160) == pytest.approx(SPEEDS.exponent)
    assert costs.fit(TABLE, without="FFCV").exponent == 2


def test_sources_count_once_and_a_gpu_without_any_comes_from_its_bandwidth():
    rate, sources = SPEEDS.gpu_rate("A10G", 600)
    assert (round(rate, 1), sources) == (810.6, 1)
    assert SPEEDS.gpu_rate("A100", 1555)[1] == 6
    assert SPEEDS.gpu_rate("L4", 300) == (300 * SPEEDS.per_bandwidth, 0)


def test_leaving_a_source_out_leaves_out_all_it_said():
    speeds = costs.fit(TABLE, without="Lambda")
    assert all("Lambda" not in sources for sources in speeds.by_gpu.values())
    assert "H100" not in speeds.by_gpu
    row = next(row for row in costs.check(TABLE) if row["source"] == "Sagar063" and row["gpu"] == "A10G")
    assert row["sources"] == 0
    without = costs.fit(TABLE, without="Sagar063")
    hours = 195 * 1_281_167 / (without.per_bandwidth * 600) / 3600
    assert row["predicted"] == pytest.approx(hours)
    assert row["error"] == pytest.approx(hours / 88 - 1)


def test_a_source_cannot_improve_the_prediction_of_itself():
    """Ten times the images/s in one source's rows change nothing in what is predicted for it."""
    rate = [{**row, "value": row["value"] * (10 if row["name"] == "NVIDIA" else 1)} for row in TABLE.rate]
    changed = costs.check(dataclasses.replace(TABLE, rate=rate))
    for before, after in zip(costs.check(TABLE), changed, strict=True):
        if before["source"] == "NVIDIA":
            assert after["predicted"] == before["predicted"]


def test_the_error_is_what_the_readme_says_and_excluded_runs_do_not_count():
    checked = costs.check(TABLE)
    errors = costs.prediction_errors(checked)
    assert {key: round(math.expm1(value), 2) for key, value in errors.items()} == {True: 0.26, False: 0.28}
    counted = [row for row in checked if row["counted"]]
    assert costs.prediction_errors(counted) == errors
    assert all(abs(row["error"]) < 0.5 for row in counted)


def test_ffcvs_own_machine_is_projected_as_published_within_the_error():
    machine = MACHINES["p4d.24xlarge"]
    parts, limit = costs.hours(TABLE, SPEEDS, LOADER, RECIPES["rn50_56_epochs"], machine)
    # 49.4 minutes
    assert parts["training"] + parts["evaluation"] == pytest.approx(49.4 / 60, rel=0.26)
    assert limit == "GPU"


def test_the_loader_ceiling_is_anchored_at_a_figure_for_all_vcpus(tmp_path):
    benchmark = tmp_path / "benchmark.json"
    results = [{"name": "rn50", "images_per_second": 900.0}, {"name": "ffcv", "images_per_second": 300.0}]
    benchmark.write_text(json.dumps({"results": results}))
    rates = costs.loader_rates(TABLE, benchmark)
    assert rates["ffcv"] == pytest.approx(31278 / 96, rel=1e-3)
    assert rates["rn50"] == pytest.approx(3 * 31278 / 96 * 0.7, rel=1e-3)
    # a faster host makes both faster, and says nothing about a vCPU elsewhere
    for result in results:
        result["images_per_second"] *= 2
    benchmark.write_text(json.dumps({"results": results}))
    assert costs.loader_rates(TABLE, benchmark) == rates


def test_smaller_crops_and_smaller_files_decode_faster():
    assert costs.loader_scale(TABLE, 160, 500) == 1
    assert costs.loader_scale(TABLE, 224, 500) < 1 < costs.loader_scale(TABLE, 88, 500)
    assert costs.loader_scale(TABLE, 160, 400) > 1
    assert [round(costs.beton_gb(TABLE, side)) for side in (256, 512)] == [22, 65]


def test_what_limits():
    machine, recipe = MACHINES["g5.xlarge"], RECIPES["rn50_78"]
    args = (TABLE, SPEEDS, LOADER, recipe)
    assert costs.pace(*args, machine, 160)[1] == "GPU"
    two = dataclasses.replace(machine, vcpus=2)
    rate, limit = costs.pace(*args, two, 160)
    assert limit == "CPU"
    # one of the two vCPU launches kernels
    assert rate == pytest.approx(LOADER["rn50"] * costs.loader_scale(TABLE, 160, 400))
    one = dataclasses.replace(machine, vcpus=1)
    assert costs.pace(*args, one, 160) == (pytest.approx(rate / 2), "CPU")
    slow = dataclasses.replace(machine, disk_mb_per_s=10.0)
    rate, limit = costs.pace(*args, slow, 160)
    assert limit == "disk"
    assert rate == pytest.approx(10e6 / (costs.beton_gb(TABLE, 400) * 1e9 / 1_281_167))
    # what fits in memory is read once
    assert costs.pace(*args, dataclasses.replace(slow, memory_gib=100), 160)[1] == "GPU"


def test_evaluation_is_a_third_of_a_training_step_but_no_faster_than_the_loader():
    recipe = dataclasses.replace(RECIPES["rn50_78"], evaluated=[(224, 1)])

    def images_per_second(machine):
        parts, _ = costs.hours(TABLE, SPEEDS, LOADER, recipe, machine)
        return 50000 / parts["evaluation"] / 3600

    many, four = (dataclasses.replace(MACHINES["g5.xlarge"], vcpus=vcpus) for vcpus in (48, 4))
    gpu = SPEEDS.total("A10G", 600, 1, 224)
    assert images_per_second(many) == pytest.approx(3 * gpu)
    fed = 3 * LOADER["rn50"] * costs.loader_scale(TABLE, 224, 400)
    assert gpu < fed < 3 * gpu
    assert images_per_second(four) == pytest.approx(fed)
    # the mirror image is the same image decoded once
    recipe = dataclasses.replace(recipe, evaluated=[(224, 2)])
    assert images_per_second(many) == pytest.approx(1.5 * gpu)
    assert images_per_second(four) == pytest.approx(min(fed, 1.5 * gpu))


def test_a_small_micro_batch_does_not_fill_a_fast_gpu():
    machine, recipe = MACHINES["p5.4xlarge"], RECIPES["rn50_78"]
    full = costs.pace(TABLE, SPEEDS, LOADER, recipe, machine, 88)[0]
    small = costs.pace(TABLE, SPEEDS, LOADER, dataclasses.replace(recipe, micro_batch=32), machine, 88)[0]
    assert small == pytest.approx(32 / 0.025)
    assert full > 4 * small


def test_a_micro_batch_that_does_not_fit_is_halved_and_said():
    machine = MACHINES["g5.xlarge"]
    recipe = RECIPES["rn50_56_epochs"]
    assert costs.fitting_micro_batch(TABLE, recipe, machine) == 256
    assert costs.fitting_micro_batch(TABLE, recipe, MACHINES["p4d.24xlarge"]) == 512
    row = project("rn50_56_epochs", machine)
    assert row["limited_by"] == "memory"
    assert "training.micro_batch=256" in row["notes"]


def project(recipe, machine, target=78.0, spot=False):
    errors = costs.prediction_errors(costs.check(TABLE))
    return costs.project(TABLE, SPEEDS, LOADER, errors, RECIPES[recipe], machine, target, spot)


def test_dollars_are_hours_times_price_plus_storage():
    row = project("rn50_78", MACHINES["g5.xlarge"])
    assert row["dollars"] == pytest.approx(row["hours"] * 1.006 + costs.beton_gb(TABLE, 400) * 0.023, abs=0.02)
    assert sum(row["hours_by_part"].values()) == pytest.approx(row["hours"], abs=0.03)
    assert row["dollars_low"] < row["dollars"] < row["dollars_high"]
    assert "no training measurement by anyone" in project("rn50_78", MACHINES["g6.xlarge"])["basis"]
    # 44.2 GB and a 26th of it for validation, at 200 MB/s
    parts, _ = costs.hours(TABLE, SPEEDS, LOADER, RECIPES["rn50_78"], MACHINES["g5.xlarge"])
    assert parts["staging"] == pytest.approx(44.2e9 * (1 + 1 / 25.6) / 200e6 / 3600, rel=1e-3)
    assert parts["setup"] == 0.25


def test_the_range_is_that_of_the_hours_times_that_of_the_price():
    errors = costs.prediction_errors(costs.check(TABLE))
    storage = costs.beton_gb(TABLE, 400) * 0.023
    (spot,) = [machine for machine in costs.machines(TABLE, spot=True) if machine.name == "g5.xlarge"]
    # others have published training on an A10G, and nobody on an L4
    for machine, spotted, measured in ((spot, True, True), (MACHINES["g6.xlarge"], False, False)):
        row, factor = project("rn50_78", machine, spot=spotted), math.exp(1.2816 * errors[measured])
        parts, _ = costs.hours(TABLE, SPEEDS, LOADER, RECIPES["rn50_78"], machine, spotted)
        fixed, rest = parts["setup"] + parts["staging"], parts["training"] + parts["evaluation"]
        low, high = (0.36, 0.92) if spotted else (0.8048, 0.8048)
        assert row["dollars_low"] == pytest.approx((fixed + rest / factor) * low + storage, abs=0.01)
        assert row["dollars_high"] == pytest.approx((fixed + rest * factor) * high + storage, abs=0.01)
        assert row["hours_error"] == pytest.approx(math.expm1(errors[measured]), abs=1e-3)


def test_spot_is_cheaper_and_only_where_a_price_was_seen():
    spot = {machine.name: machine for machine in costs.machines(TABLE, spot=True)}
    assert set(spot) == {row["name"] for row in TABLE.instance if row["low"] is not None}
    cheap = project("rn50_78", spot["g5.2xlarge"], spot=True)
    assert cheap["dollars"] < project("rn50_78", MACHINES["g5.2xlarge"])["dollars"]
    assert cheap["hours"] > project("rn50_78", MACHINES["g5.2xlarge"])["hours"]


def test_the_flagship_is_the_cheapest_schedule_with_nine_in_ten_and_its_header_says_so():
    epochs = len(RECIPES["rn50_78"].resolutions)
    top1, spread, _ = costs.expected_top1(TABLE, "mild", epochs)
    chance = costs.probability(78.0, top1, spread)
    header = (ROOT / "rn50_configs" / "rn50_78.yaml").read_text()
    header = " ".join(header[: header.index("model:")].replace("#", "").split())
    assert top1 >= 78.3
    assert chance >= 0.9 > costs.probability(78.0, *costs.expected_top1(TABLE, "mild", epochs - 2)[:2])
    assert f"{top1:.2f} for E = {epochs}" in header
    assert f"Phi({(top1 - 78) / spread:.2f}) = {chance:.2f}" in header
    by_hand = math.sqrt(0.11**2 + 0.10**2 + (0.40 * math.log(80 / 60)) ** 2 + 0.20**2)
    assert spread == pytest.approx(by_hand)
    assert top1 == pytest.approx(78.1 + 0.41 / math.log(88 / 56) * math.log(80 / 60))


def test_flip_averaged_figures_at_256_are_brought_to_224_single_view():
    correction, spread = costs.view_correction(TABLE)
    assert correction == pytest.approx(-0.43 - 0.3)
    assert spread == pytest.approx(math.hypot(0.86, 0.2) / math.sqrt(12))
    # the line through torchvision V2's two figures, from 224/192 to 256/192 of the training px
    slope = (80.85 - 79.43) / (224 / 176 - 1)
    assert TABLE.constant["view_resolution"]["low"] == pytest.approx(-slope * (256 - 224) / 192, abs=0.01)
    assert costs.expected_top1(TABLE, "ffcv", 56)[0] == pytest.approx(78.02 + correction)


def test_between_published_lengths_top1_is_linear_in_the_logarithm_of_epochs():
    top1, _, basis = costs.expected_top1(TABLE, "mild", 36)
    share = math.log(36 / 28.8) / math.log(60 / 28.8)
    assert top1 == pytest.approx(76.19 + share * (78.1 - 76.19))
    assert basis.startswith("projected between published")
    assert costs.expected_top1(TABLE, "classic_cosine", 90)[2].startswith("76.13 to 77.12 %")


def test_probability_of_a_normal_distribution():
    assert costs.probability(78.0, 78.0, 0.2) == pytest.approx(0.5)
    assert costs.probability(78.0, 78.0 + 1.2816 * 0.2, 0.2) == pytest.approx(0.9, abs=1e-4)


def test_measured_speeds_are_taken_as_they_are_and_interpolated_in_logarithms():
    machine = dataclasses.replace(
        MACHINES["g5.xlarge"],
        measured={88: 4000.0, 176: 1000.0},
        limits={88: "CPU", 176: "GPU"},
        loader={88: 4000.0, 176: 2000.0},
    )
    args = (TABLE, SPEEDS, LOADER, RECIPES["rn50_78"], machine)
    assert costs.pace(*args, 88) == (4000.0, "CPU")
    assert costs.pace(*args, 176) == (pytest.approx(1000), "GPU")
    assert costs.pace(*args, 124)[0] == pytest.approx(4000 * (88 / 124) ** 2)
    assert costs.pace(*args, 224)[0] == pytest.approx(1000 * (176 / 224) ** SPEEDS.exponent)
    # evaluation: three times as fast as training, but no faster than the loader
    assert costs.pace(*args, 176, passes=1 / 3)[0] == pytest.approx(2000)
    assert costs.pace(*args, 176, passes=2 / 3)[0] == pytest.approx(1500)
