"""costs.csv, and the recipes and machines that it names."""

import csv
from types import SimpleNamespace

import yaml

from rn50.data import loaders
from rn50.planning import costs
from tests.conftest import ROOT

TABLE = costs.read_table()
RECIPES = {recipe.name: recipe for recipe in costs.read_recipes(TABLE)}


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


def test_the_plans_ladder_is_what_the_conversion_makes_and_recipes_read_it_as_training_does():
    made = yaml.safe_load((ROOT / "rn50_configs" / "write_imagenet.yaml").read_text())
    assert made["out"]["resolutions"] == list(costs.LADDER)
    files = {side: SimpleNamespace(median_short_side=short) for side, short in costs.LADDER.items()}
    flagship = RECIPES["rn50_78"]
    assert [loaders.training_rung(files, px, "auto") for px in flagship.resolutions] == flagship.rungs
    assert sorted(set(flagship.rungs)) == [256, 400, 500]
    assert set(RECIPES["rn50_56_epochs"].rungs) == {500}


def test_what_a_recipes_network_and_sam_cost_is_known():
    found = {
        name: (RECIPES[name].network, RECIPES[name].passes) for name in ("rn50_78", "rn50_mild_28", "rn50_56_epochs")
    }
    assert found == {
        "rn50_78": ("both blurs", 1.1),
        "rn50_mild_28": ("both blurs", 1.0),
        "rn50_56_epochs": ("blurpool", 1.0),
    }
    assert RECIPES["rn50_baseline_90_step"].network == ""


def test_work_is_summed_over_the_schedule():
    assert costs.parse_schedule("160x45+192x11") == [(160, 45), (192, 11)]
    resolutions = RECIPES["rn50_56_epochs"].resolutions
    assert [resolutions.count(px) for px in (160, 192)] == [45, 11]
    assert len(RECIPES["rn50_56_epochs"].evaluated) == 13 + 2
