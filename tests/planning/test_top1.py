"""The top-1 that a recipe is expected to reach: by hand, and as the recipes' files say it."""

import math

import pytest

from rn50.planning import costs, forecast, top1
from tests.conftest import ROOT

TABLE = costs.read_table()
RECIPES = {recipe.name: recipe for recipe in costs.read_recipes(TABLE)}


def test_the_flagship_is_the_cheapest_schedule_with_nine_in_ten_and_its_header_says_so():
    epochs = len(RECIPES["rn50_78"].resolutions)
    expected, spread, _ = top1.expected_top1(TABLE, "mild", epochs)
    chance = top1.probability(78.0, expected, spread)
    header = (ROOT / "rn50_configs" / "rn50_78.yaml").read_text()
    header = " ".join(header[: header.index("model:")].replace("#", "").split())
    assert expected >= 78.3
    assert chance >= 0.9 > top1.probability(78.0, *top1.expected_top1(TABLE, "mild", epochs - 2)[:2])
    assert f"{expected:.2f} for E = {epochs}" in header
    assert f"Phi({(expected - 78) / spread:.2f}) = {chance:.2f}" in header
    by_hand = math.sqrt(0.11**2 + 0.10**2 + (0.40 * math.log(80 / 60)) ** 2 + 0.20**2)
    assert spread == pytest.approx(by_hand)
    assert expected == pytest.approx(78.1 + 0.41 / math.log(88 / 56) * math.log(80 / 60))


def test_flip_averaged_figures_at_256_are_brought_to_224_single_view():
    correction, spread = top1.view_correction(TABLE)
    assert correction == pytest.approx(-0.43 - 0.3)
    assert spread == pytest.approx(math.hypot(0.86, 0.2) / math.sqrt(12))
    # the line through torchvision V2's two figures, from 224/192 to 256/192 of the training px
    slope = (80.85 - 79.43) / (224 / 176 - 1)
    assert TABLE.constant["view_resolution"]["low"] == pytest.approx(-slope * (256 - 224) / 192, abs=0.01)
    assert top1.expected_top1(TABLE, "ffcv", 56)[0] == pytest.approx(78.02 + correction)


def test_between_two_published_lengths_top1_is_linear_in_the_logarithm_of_epochs():
    expected, _, basis = top1.expected_top1(TABLE, "mild", 36)
    share = math.log(36 / 28.8) / math.log(60 / 28.8)
    assert expected == pytest.approx(76.19 + share * (78.1 - 76.19))
    assert basis.startswith("projected between published")
    assert top1.expected_top1(TABLE, "classic_cosine", 90)[2].startswith("76.13 to 77.12 %")


def test_a_plan_and_the_forecast_of_a_run_expect_the_same_of_a_length_that_nobody_published():
    correction, _ = top1.view_correction(TABLE)
    # costs.csv has the finals of ffcv_curves.csv with two digits
    expected = forecast.reference().final_top1(48) + correction
    assert top1.expected_top1(TABLE, "ffcv", 48)[0] == pytest.approx(expected, abs=0.01)
    # a published length has its own figure, and not the curve's
    assert top1.expected_top1(TABLE, "ffcv", 16)[0] == pytest.approx(73.76 + correction)
    assert forecast.reference().final_top1(16) != pytest.approx(73.76, abs=0.01)


def test_probability_of_a_normal_distribution():
    assert top1.probability(78.0, 78.0, 0.2) == pytest.approx(0.5)
    assert top1.probability(78.0, 78.0 + 1.2816 * 0.2, 0.2) == pytest.approx(0.9, abs=1e-4)
