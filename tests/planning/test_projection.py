"""One recipe on one machine: dollars, ranges, notes."""

import math

import pytest

from rn50.planning import costs, projection, speeds

TABLE = costs.read_table()
SPEEDS = speeds.fit(TABLE)
LOADER = speeds.loader_rates(TABLE)
RECIPES = {recipe.name: recipe for recipe in costs.read_recipes(TABLE)}
MACHINES = {machine.name: machine for machine in costs.machines(TABLE, spot=False)}


def project(recipe, machine, target=78.0, spot=False):
    errors = speeds.prediction_errors(speeds.check(TABLE))
    return projection.project(TABLE, SPEEDS, LOADER, errors, RECIPES[recipe], machine, target, spot)


def test_a_micro_batch_that_does_not_fit_is_halved_and_said():
    machine = MACHINES["g5.xlarge"]
    recipe = RECIPES["rn50_56_epochs"]
    assert speeds.fitting_micro_batch(TABLE, recipe, machine) == 256
    assert speeds.fitting_micro_batch(TABLE, recipe, MACHINES["p4d.24xlarge"]) == 512
    row = project("rn50_56_epochs", machine)
    assert row["limited_by"] == "memory"
    assert "training.micro_batch=256" in row["notes"]


def test_dollars_are_hours_times_price():
    row = project("rn50_78", MACHINES["g5.xlarge"])
    assert row["dollars"] == pytest.approx(row["hours"] * 1.006, abs=0.02)
    assert sum(row["hours_by_part"].values()) == pytest.approx(row["hours"], abs=0.03)
    assert row["dollars_low"] < row["dollars"] < row["dollars_high"]
    assert "no training measurement by anyone" in project("rn50_78", MACHINES["g6e.xlarge"])["basis"]
    # 22, 44 and 63 GB, and a 26th of it for validation, at 200 MB/s
    ladder = sum(speeds.beton_gb(TABLE, side) for side in (256, 400, 500)) * 1e9
    assert ladder == pytest.approx(129e9, rel=0.01)
    parts, _ = speeds.hours(TABLE, SPEEDS, LOADER, RECIPES["rn50_78"], MACHINES["g5.xlarge"])
    assert parts["staging"] == pytest.approx(ladder * (1 + 1 / 25.6) / 200e6 / 3600, rel=1e-3)
    # where one size is read, it alone is staged, and all of validation
    parts, _ = speeds.hours(TABLE, SPEEDS, LOADER, RECIPES["rn50_56_epochs"], MACHINES["g5.xlarge"])
    one = speeds.beton_gb(TABLE, 500) * 1e9
    assert parts["staging"] == pytest.approx((one + ladder / 25.6) / 200e6 / 3600, rel=1e-3)
    assert parts["setup"] == 0.25


def test_the_range_is_that_of_the_hours_times_that_of_the_price():
    errors = speeds.prediction_errors(speeds.check(TABLE))
    (spot,) = [machine for machine in costs.machines(TABLE, spot=True) if machine.name == "g5.xlarge"]
    # others have published training on an A10G, and nobody on an L40S
    for machine, spotted, measured in ((spot, True, True), (MACHINES["g6e.xlarge"], False, False)):
        row, factor = project("rn50_78", machine, spot=spotted), math.exp(1.2816 * errors[measured])
        parts, _ = speeds.hours(TABLE, SPEEDS, LOADER, RECIPES["rn50_78"], machine, spotted)
        fixed, rest = parts["setup"] + parts["staging"], parts["training"] + parts["evaluation"]
        low, high = (0.36, 0.92) if spotted else (1.861, 1.861)
        assert row["dollars_low"] == pytest.approx((fixed + rest / factor) * low, abs=0.01)
        assert row["dollars_high"] == pytest.approx((fixed + rest * factor) * high, abs=0.01)
        assert row["hours_error"] == pytest.approx(math.expm1(errors[measured]), abs=1e-3)


def test_spot_is_cheaper_and_only_where_a_price_was_seen():
    spot = {machine.name: machine for machine in costs.machines(TABLE, spot=True)}
    assert set(spot) == {row["name"] for row in TABLE.instance if row["low"] is not None}
    cheap = project("rn50_78", spot["g5.2xlarge"], spot=True)
    assert cheap["dollars"] < project("rn50_78", MACHINES["g5.2xlarge"])["dollars"]
    assert cheap["hours"] > project("rn50_78", MACHINES["g5.2xlarge"])["hours"]
