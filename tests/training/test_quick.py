"""--quick: a recipe's whole course in two epochs, as a run of its own."""

import json

import pytest

from rn50 import config, recipe
from rn50.errors import UsageError
from rn50.files import read_rows
from tests import faults
from tests.commands import context, enter
from tests.conftest import ROOT

RECIPES = [name for name in config.recipes() if name.startswith("rn50_")]
SMALL = ["--training.batch_size=20", "--training.micro_batch=10", "--training.device=cpu", "--training.precision=fp32"]


def load(name, *flags):
    return recipe.load("", [f"--config-file={ROOT}/rn50_configs/{name}.yaml", "--data.dir=x", *flags])


@pytest.mark.parametrize("name", RECIPES)
def test_every_phase_of_a_recipe_takes_place(name):
    whole, trial = load(name), load(name, "--quick")
    assert recipe.resolutions(trial) == [whole.resolution.start, whole.resolution.end]
    share = 2 / whole.training.epochs
    for part in (0, 0.1, 0.4, 0.5, 0.8, 0.99):  # of the way
        epoch = part * whole.training.epochs
        expected = recipe.learning_rate(whole, epoch)
        assert recipe.learning_rate(trial, epoch * share) == pytest.approx(expected, rel=0.01, abs=1e-4), part
    changed = {"training.epochs", "lr.warmup_epochs", "lr.step_epochs", "resolution.start_ramp", "resolution.end_ramp"}
    changed |= {"validation.every", "logging.run_name"}
    whole, trial = config.to_dict(whole), config.to_dict(trial)
    different = {f"{s}.{key}" for s in whole for key in whole[s] if trial[s][key] != whole[s][key]}
    assert {"training.epochs", "logging.run_name"} <= different <= changed
    assert trial["logging"]["run_name"] == f"{name}_quick"


def test_a_flag_wins_over_what_quick_sets():
    trial = load("rn50_78", "--quick", "--training.epochs=4", "--logging.run_name=mine", "--lr.warmup_epochs=1")
    assert (trial.training.epochs, trial.logging.run_name, trial.lr.warmup_epochs) == (4, "mine", 1)
    assert recipe.resolutions(trial) == [88, 88, 112, 176]
    assert recipe.resolutions(load("rn50_78", "--quick", "--training.epochs=1", "--resolution.start=176")) == [176]


def test_a_trial_of_a_trial_is_the_same_one(tmp_path):
    config_file = tmp_path / "config.yaml"
    trial = load("rn50_78", "--quick")
    config_file.write_text(json.dumps(config.to_dict(trial)))
    assert recipe.load("", [f"--config-file={tmp_path}", "--quick"]) == trial


def test_quick_is_no_key_and_takes_no_value():
    with pytest.raises(UsageError, match="^--quick takes no value: leave out =True$"):
        load("rn50_78", "--quick=True")
    with pytest.raises(UsageError, match="to try a recipe in 2 epochs, give --quick alone"):
        load("rn50_78", "--training.epochs=2")


def test_the_same_command_goes_on_with_a_trial_on_two_ranks(betons, tmp_path):
    """With a real recipe, the files' folder and what a processor needs; interrupted in its second epoch."""
    flags = [f"--config-file={ROOT}/rn50_configs/demo.yaml", f"--data.dir={betons}", "--quick", *SMALL]
    flags += [f"--logging.folder={tmp_path}", "--data.workers=1"]
    folder = tmp_path / "demo_quick"
    assert end(flags, tmp_path / "first", prepare=stop_in_the_second_epoch) == 0  # under torchrun
    assert json.loads((folder / "status.json").read_text())["status"] == "interrupted"
    assert len(read_rows(folder / "log.jsonl")) == 1
    assert end(flags, tmp_path / "second") == 0
    said = (tmp_path / "second0").read_text()
    assert f"resuming {folder} at step 12: after epoch 1 of 2 and 2 steps" in said, said
    rows = read_rows(folder / "log.jsonl")
    assert [(row["epoch"], row["resolution"], "top1" in row) for row in rows] == [(0, 48, True), (1, 64, True)]
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["demo_quick"]


def stop_in_the_second_epoch():
    from rn50.training import interruption, session

    after_step = session.Session.after_step

    def stop(self, *step):
        if self.progress.step == 11:
            interruption.request_stop("a test")
        after_step(self, *step)

    session.Session.after_step = stop


def end(flags, output, prepare=None):
    """Exit status of rank 0 of two that train with `flags`; what they say is in {output}0 and {output}1."""
    port, ranks = faults.free_port(), []
    for rank in (0, 1):
        environment = {"AWS_EC2_METADATA_DISABLED": "true", "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
        environment |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": str(port)}
        environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(context.Process(target=enter, args=(flags, environment, f"{output}{rank}", prepare)))
        ranks[-1].start()
    for process in ranks:
        process.join(60)
        process.kill()
    return ranks[0].exitcode
