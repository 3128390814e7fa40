"""The forecast: what it says of published runs it has not seen, and what raises an alarm."""

import copy
import math
from statistics import fmean

import pytest
import torch

from rn50.losses import binary_cross_entropy
from rn50.planning import forecast
from rn50.planning.forecast import CLASSES
from studies.forecast import forecast_check
from studies.forecast.forecast_check import (
    TROUBLES,
    alarm_rates,
    as_logged,
    config_of,
    held_out_errors,
    interpolated,
    published,
)
from tests.conftest import ROOT

RUN = published()[32]


def causes(rows, config, classes=CLASSES):
    return [warning["cause"] for warning in forecast.forecast(rows, config, classes=classes)["warnings"]]


def test_it_beats_the_bar_on_runs_it_has_not_seen():
    bar = [abs(error) for error in held_out_errors(interpolated).values()]
    ours = [abs(error) for error in held_out_errors(as_logged).values()]
    assert fmean(bar) == pytest.approx(0.264, abs=0.005)
    assert fmean(ours) < 0.1
    # what it says of its spread is the worst of the six, rounded
    assert max(ours) == pytest.approx(forecast.SPREAD, abs=0.006)


def test_the_run_that_is_forecast_is_not_among_the_curves():
    curves = forecast.read_curves()
    for epochs in curves:
        changed = copy.deepcopy(curves)
        del changed[epochs]
        assert forecast.reference(epochs).final_top1(50) == forecast.Reference(changed).final_top1(50)
    assert len({forecast.reference(epochs).final_top1(50) for epochs in [None, *curves]}) == 7


def test_a_run_on_track_is_forecast_from_the_first_epoch_with_what_the_figure_means():
    for count in (1, 8, 32):
        found = forecast.forecast(RUN[:count], config_of(32), classes=CLASSES)
        assert found["top1"] == pytest.approx(RUN[-1]["top1"], abs=0.2)
        assert found["warnings"] == []
        assert found["evaluation"] == "256 px, averaged with the mirror image"
        assert found["spread"] == 0.19


def test_a_training_loss_that_is_too_high_leaves_no_number():
    for nats, basis in ((0.05, "FFCV's runs"), (0.2, "no basis: not as in the published runs: training")):
        rows = [row | {"train_loss": row["train_loss"] + nats} for row in RUN[:16]]
        found = forecast.forecast(rows, config_of(32), classes=CLASSES)
        assert found["basis"] == basis
        assert (found["top1"] is None) == bool(found["warnings"]) == (nats > 0.1)


def test_false_alarms_are_fewer_than_one_in_twenty():
    assert alarm_rates(forecast_check.unchanged)["ever"] < 0.05
    for epochs, rows in published().items():
        assert forecast_check.first_alarm(epochs, rows, without=epochs) is None


@pytest.mark.parametrize(
    ("trouble", "early", "named"),
    [
        ("learning rate 16 times too small, in config and log", 1, {"learning rate"}),
        ("learning rate 16 times too small, in the log only", 1, {"learning rate"}),
        ("schedule of 1.5 times the length, cut short", 1, {"learning rate", "learning rate schedule"}),
        ("learning rate ends at a quarter of its peak", 1, {"learning rate schedule"}),
        ("warm restart after a quarter", 0.8, {"warm restart"}),
        ("weight decay ten times too high, in the config", 1, {"weight decay"}),
        ("a tenth of the classes mislabelled (top-1 x 0.9)", 0.4, {"labels or evaluation"}),
        ("evaluation at 112 px, in the config", 1, {"evaluation resolution"}),
        ("evaluation wrong and the config right (top-1 x 0.8, assumed)", 0.7, {"labels or evaluation"}),
        ("training loss 0.2 too high (assumed)", 1, {"training"}),
    ],
)
def test_trouble_is_flagged_in_the_first_third_and_named(trouble, early, named):
    rates = alarm_rates(TROUBLES[trouble])
    assert rates["early"] >= early
    assert set(rates["causes"]) == named


def test_every_trouble_of_the_table_has_its_test():
    marks = test_trouble_is_flagged_in_the_first_third_and_named.pytestmark
    assert {case[0] for case in marks[0].args[1]} == set(TROUBLES)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("model", "arch", "resnet18"),
        ("training", "loss", "bce"),
        ("training", "epochs", 200),
        ("resolution", "end", 224),
    ],
)
def test_a_run_unlike_the_reference_gets_no_number(section, key, value):
    config = config_of(32)
    config[section][key] = value
    found = forecast.forecast(RUN[:3], config, classes=CLASSES)
    assert found["top1"] is None
    assert found["basis"].startswith(f"no basis: {section}.{key}")
    assert str(value) in found["basis"]


def test_other_data_gets_no_number_and_wider_limits():
    config = config_of(32)
    config["training"]["weight_decay"] = 5e-4
    rows = [row | {"train_loss": row["train_loss"] / 3} for row in RUN[:3]]
    found = forecast.forecast(rows, config, classes=10)
    assert (found["top1"], found["warnings"]) == (None, [])
    assert "10 classes" in found["basis"]
    assert causes(rows, config) == ["weight decay"]
    config["training"]["weight_decay"] = 5e-3
    config["validation"]["headline_resolution"] = 100
    assert causes(rows, config, classes=10) == ["weight decay", "evaluation resolution"]


def test_renamed_classes_are_named_until_an_evaluation_finds_none():
    rows = [*RUN[:4], RUN[4] | {"renamed": [[0, 2], [2, 0]]}, RUN[5] | {"top1": None}]
    (warning,) = forecast.forecast(rows, config_of(32), classes=CLASSES, names=["n0", "n1", "n2"])["warnings"]
    assert warning["cause"] == "labels"
    assert "2 classes are recognised under another name (n0 as n2, n2 as n0)" in warning["text"]
    assert "(0 as 2, 2 as 0)" in forecast.forecast(rows, config_of(32), classes=CLASSES)["warnings"][0]["text"]
    assert causes([*rows, RUN[6]], config_of(32)) == []


def unlike(loss="bce", classes=CLASSES):
    """A config without a basis, as the flagship's, and its rows: (config, the loss of guessing, row of an epoch)."""
    config = config_of(80)
    config["model"]["arch"], config["training"]["loss"] = "resnet18", loss
    guessing = forecast.guessing_loss(loss, classes)

    def row(epoch, top1, share, step=400):
        return {"epoch": epoch, "step": step, "train_loss": share * guessing, "top1": top1, "images": 50_000}

    return config, guessing, row


@pytest.mark.parametrize(("loss", "classes"), [("cross_entropy", 1000), ("bce", 1000), ("cross_entropy", 10)])
def test_a_run_that_does_not_learn_is_said_whatever_its_recipe(loss, classes):
    config, guessing, row = unlike(loss, classes)
    assert causes([row(2, None, 1)], config, classes) == ["training"]
    assert (
        f"is that of guessing ({guessing:.3f})"
        in forecast.forecast([row(2, None, 1)], config, classes=classes)["warnings"][0]["text"]
    )
    assert causes([row(2, 101 / classes, 0.9)], config, classes) == ["labels or evaluation"]
    for healthy in (
        [row(2, 4 * 100 / classes, 0.9)],
        [row(2, None, 0.9)],
        [row(1, 100 / classes, 1)],
        [row(2, 100 / classes, 1, step=399)],
        [row(2, None, 1), row(3, None, 0.9)],
    ):
        assert causes(healthy, config, classes) == []
    config["lr"]["warmup_epochs"] = 5
    assert causes([row(4, None, 1)], config, classes) == []
    assert causes([row(5, None, 1)], config, classes) == ["training"]


def test_classes_under_other_names_are_the_better_explanation_of_a_top1_of_guessing():
    config, _, row = unlike()
    assert causes([row(2, 0, 0.5) | {"renamed": [[0, 1]]}], config) == ["labels"]


def test_the_loss_of_guessing_is_that_of_the_shares():
    assert forecast.guessing_loss("cross_entropy", 1000) == pytest.approx(math.log(1000))
    for classes, smoothing in ((2, 0.0), (10, 0.1), (1000, 0.0)):
        logits = torch.full((classes, classes), -math.log(classes - 1), dtype=torch.float64)
        loss = binary_cross_entropy(logits, torch.arange(classes), smoothing=smoothing).item()
        assert forecast.guessing_loss("bce", classes) == pytest.approx(loss, rel=1e-4)


def test_top1_of_another_evaluation_is_not_compared():
    config = config_of(32)
    low = [row | {"top1": 0.5 * row["top1"]} for row in RUN]
    assert causes(low, config) == ["labels or evaluation"]
    config["validation"]["headline_view"] = "single"
    assert causes(low, config) == []
    assert causes([{**row, "top1": None} for row in RUN], config_of(32)) == []


def test_a_schedule_that_ends_high_is_said_before_it_does():
    config = config_of(32)
    config["lr"] |= {"schedule": "step", "step_epochs": [20], "step_gamma": 0.1}
    assert causes([], config) == ["schedule end"]
    config["lr"]["step_epochs"] = [10, 20]
    assert causes([], config) == []


def test_the_published_table_is_the_one_the_check_writes():
    committed = (ROOT / "studies/forecast/results.md").read_text()
    forecasts = {name: held_out_errors(estimate) for name, estimate in forecast_check.ESTIMATES.items()}
    for line in forecast_check.forecast_lines(forecasts):
        assert line in committed
