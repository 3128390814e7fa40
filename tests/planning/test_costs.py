"""costs.csv, and the recipes and machines that it names."""

import csv

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


def test_work_is_summed_over_the_schedule():
    assert costs.parse_schedule("160x45+192x11") == [(160, 45), (192, 11)]
    resolutions = RECIPES["rn50_56_epochs"].resolutions
    assert [resolutions.count(px) for px in (160, 192)] == [45, 11]
    assert len(RECIPES["rn50_56_epochs"].evaluated) == 55 + 2
