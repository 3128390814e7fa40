"""The training script as its user runs it: from betons to a curve, interrupted, resumed, refused."""

import contextlib
import copy
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import train_imagenet
from rn50 import config, learner, recipe
from rn50.augment import normalize
from rn50.errors import RunError, UsageError
from rn50.files import read_rows
from rn50.publishing import export
from rn50.training import checkpoint, session
from rn50.training.progress import Progress
from tests import chaos, faults, tiny_model
from tests.conftest import ROOT

SMALL = {
    "model.arch": "resnet18",
    "training.epochs": 3,
    "training.batch_size": 40,
    "training.micro_batch": 20,
    "training.device": "cpu",
    "lr.warmup_epochs": 1,
    "resolution.start": 32,
    "resolution.end": 48,
    "resolution.start_ramp": 1,
    "resolution.end_ramp": 2,
    "resolution.multiple": 16,
    "data.workers": 1,
    "validation.resolutions": "48,64",
    "validation.headline_resolution": 48,
    "logging.run_name": "small",
}


def command(betons, folder, launcher=(sys.executable,), **overrides):
    settings = {**SMALL, "data.dir": betons, "logging.folder": folder}
    settings |= {name.replace("__", "."): value for name, value in overrides.items()}
    flags = [f"--{name}={value}" for name, value in settings.items() if value is not None]
    return [*launcher, str(ROOT / "train_imagenet.py"), *flags]


def run(*args, **kwargs):
    return subprocess.run(command(*args, **kwargs), capture_output=True, text=True, timeout=300)


def assert_refused(result, status, *words):
    assert result.returncode == status, result.stdout + result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    for word in words:
        assert word in lines[0]


def load(flags):
    """The settings of `flags`, checked as the script checks them."""
    cfg = recipe.load("", flags)
    session.check(cfg)
    return cfg


@pytest.fixture(scope="module")
def finished(betons, tmp_path_factory):
    """A run that was killed with SIGKILL after its first epoch and finished by repeating the command."""
    folder = tmp_path_factory.mktemp("runs")
    process = subprocess.Popen(command(betons, folder, model__ema_half_life=5), stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while not (folder / "small" / "last.pt").exists():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed_with = checkpoint.load(folder / "small" / "last.pt")
    money = {"budget__dollars_per_hour": 1, "budget__max_dollars": 25}
    status, output, shown = on_terminal(command(betons, folder, model__ema_half_life=5, **money), columns=80)
    assert status == 0, output + shown
    return SimpleNamespace(folder=folder, run=folder / "small", output=output, shown=shown, killed_with=killed_with)


def on_terminal(words, *, columns):
    """(exit status, stdout, what came to the terminal that stderr was) of a command."""
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, columns))
    shown = []

    def read():
        with contextlib.suppress(OSError):  # there is nobody on the other side any more
            while piece := os.read(ours, 4096):
                shown.append(piece)

    reader = threading.Thread(target=read)
    reader.start()
    environment = {**os.environ, "TERM": "xterm"}
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=theirs, text=True, env=environment)
    os.close(theirs)
    output = process.communicate(timeout=300)[0]
    reader.join()
    os.close(ours)
    return process.returncode, output, b"".join(shown).decode()


def test_a_killed_run_goes_on_where_its_checkpoint_is(finished):
    step = finished.killed_with["step"]
    assert 5 <= step < 15
    assert f"resuming {finished.run} at step " in finished.output
    rows = read_rows(finished.run / "log.jsonl")
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    assert [row["step"] for row in rows] == [5, 10, 15]
    assert [row["resolution"] for row in rows] == [32, 32, 48]
    assert rows[-1]["images_seen"] == 3 * 200


def test_the_terminal_has_one_line_that_renews_itself_and_goes(finished):
    lines = re.split(r"\r\x1b\[J|\r", finished.shown)
    assert lines[-1] == ""
    lines = [line for line in lines if line]
    assert all(len(line) < 80 for line in lines), lines
    assert all(re.search(r" · \$0.0\d of \$25($| · )", line) for line in lines), lines
    assert all(re.search(r" · ends in \d+ min$", line) for line in lines[1:]), lines
    pattern = r"epoch 3/3 · 100 % · [\d,]+ img/s · loss \d\.\d\d · (waits \d+ % · )?\$0.0\d of \$25 · ends in \d+ min"
    assert any(re.fullmatch(pattern, line) for line in lines), lines
    assert [line.split(" · ")[0] for line in lines[-2:]] == ["evaluating at 48 px", "evaluating at 64 px"]


def test_its_lines_fit_a_terminal_and_say_what_the_run_is_of(finished):
    lines = finished.output.splitlines()
    assert lines[0] == "loading ..."
    assert lines[2].endswith(", 200 training images of 10 classes")
    assert lines[3] == "3 epochs at 32 to 48 px, batch 40 = 20 x 2 accumulated, peak lr 0.0156"
    assert lines[4] == f"random order, run folder {finished.run}"
    figures = r"loss \d\.\d{3} · lr 0\.0\d+ · [\d,]+ img/s · "
    assert re.search(rf"(?m)^epoch 2/3 · 32 px · {figures}ends in \d+ min", finished.output)
    assert re.search(rf"(?m)^epoch 3/3 · 48 px · {figures}top-1 \d+\.\d\d %", finished.output)
    assert re.search(r"\$0.0\d of \$25, \$0.0\d to finish", finished.output)
    # a path or a command is as long as it is
    assert not [line for line in lines if len(line) > 80 and str(finished.run) not in line]


def test_it_ends_with_commands_that_a_shell_takes(finished):
    end = finished.output[finished.output.index("\nfinished: ") :]
    assert re.match(r"\nfinished: 3 epochs, \d+ s of training, \$0.\d\d\nnext: plot its curves, evaluate", end)
    plot, evaluation, exporting = (shlex.split(line) for line in end.splitlines()[3:])
    root = Path.cwd()
    assert plot == [sys.executable, *plot[1:2], str(finished.run), "--out", "curves.png"]
    assert (root / plot[1]).samefile(ROOT / "tools" / "compare_runs.py")
    assert evaluation[1:] == [
        str(ROOT / "train_imagenet.py"), "--config-file", str(finished.run), "--training.eval_only=true"
    ]  # fmt: skip
    assert (root / exporting[1]).samefile(ROOT / "tools" / "export_model.py")
    assert exporting[2:] == ["--checkpoint", str(finished.run), "--out", "model/"]


def test_a_row_of_the_log_says_what_happened(finished):
    row = read_rows(finished.run / "log.jsonl")[-1]
    for key in ("lr", "train_loss", "top1", "top5", "val_loss", "images_per_second", "train_seconds", "val_seconds"):
        assert row[key] >= 0
    assert 0 <= row["data_wait_fraction"] <= 1
    assert row["top1_low"] < row["top1"] < row["top1_high"] or row["top1"] in (0, 100)
    assert row["images"] == 110
    assert set(row["evaluation"]) == {"48", "64"}
    assert set(row["evaluation"]["64"]) == {"single", "flip"}


def test_the_run_folder_says_what_it_ran_on(finished, betons):
    sessions = json.loads((finished.run / "environment.json").read_text())
    manifest = json.loads((betons / "train_64.json").read_text())
    assert len(sessions) == 2
    assert sessions[-1]["betons"]["train_64.beton"] == manifest["beton"]["sha256"]
    assert sessions[-1]["packages"]["torch"]
    assert list((finished.run / "tensorboard").iterdir())
    assert "batch_size: 40" in (finished.run / "config.yaml").read_text()


def headline(output):
    (line,) = [line for line in output.splitlines() if line.endswith("<- headline")]
    return float(re.match(r" +48 px  single +([\d.]+) % ", line)[1])


def test_eval_only_gives_the_figure_of_the_log_from_any_checkpoint(finished, betons, tmp_path):
    expected = read_rows(finished.run / "log.jsonl")[-1]["top1"]
    (printed,) = [line for line in finished.output.splitlines() if line.endswith("--training.eval_only=true")]
    other = f"--logging.folder={tmp_path} --training.checkpoint={finished.run}/last.pt --lr.schedule=step"
    result = subprocess.run(f"{printed} {other}", shell=True, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert headline(result.stdout) == pytest.approx(expected, abs=0.005)
    assert "EMA weights after epoch 3" in result.stdout
    assert not list(tmp_path.iterdir())


def test_eval_only_names_classes_with_other_labels_than_in_training(tiny_checkpoint, betons, textures, tmp_path):
    state = checkpoint.load(tiny_checkpoint)
    files = sorted((textures / "val").rglob("*.jpg"))
    names = sorted(path.name for path in (textures / "val").iterdir())
    learned = {names[2]: 5, names[5]: 2}
    targets = torch.eye(10)[[learned.get(path.parent.name, names.index(path.parent.name)) for path in files]]
    network = export.load_network(export.architecture(state), state["ema"]["model"])
    images = torch.stack([torch.from_numpy(tiny_model.seen(path)) for path in files])
    state["ema"]["model"].update(tiny_model.fit_classifier(network, images, targets))
    checkpoint.save(tmp_path, state)
    given = {"model__blurpool": "true", "model__blur_maxpool": "true", "training__checkpoint": tmp_path / "last.pt"}
    given |= {"validation__resolutions": 64, "validation__headline_resolution": 64}
    result = run(betons, tmp_path, training__eval_only="true", **given)
    assert result.returncode == 0, result.stderr
    assert f"warning: labels: 2 classes are recognised under another name ({names[2]} as {names[5]}, " in result.stdout


def test_repeating_a_finished_run_reports_and_trains_nothing(finished, betons):
    before = (finished.run / "log.jsonl").read_text()
    result = run(betons, finished.folder, model__ema_half_life=5)
    assert result.returncode == 0, result.stderr
    assert headline(result.stdout) == pytest.approx(headline(finished.output), abs=0.005)
    assert (finished.run / "log.jsonl").read_text() == before


def test_a_changed_recipe_refuses_to_resume_and_names_the_key(finished, betons):
    result = run(betons, finished.folder, model__ema_half_life=5, lr__lr_per_256=0.03)
    assert_refused(result, 2, "lr.lr_per_256 is 0.03", "started with 0.1", "logging.run_name")


def test_changed_betons_refuse_to_resume_and_are_named(finished, betons, textures, tmp_path):
    shutil.copytree(betons, tmp_path / "betons")
    flags = [f"--source.dir={textures}", f"--out.dir={tmp_path / 'betons'}", "--out.resolutions=64", "--out.quality=70"]
    for old in (tmp_path / "betons").glob("val_64.*"):
        old.unlink()
    subprocess.run(
        [sys.executable, ROOT / "write_dataset.py", *flags, "--source.splits=val"], check=True, capture_output=True
    )
    result = run(tmp_path / "betons", finished.folder, model__ema_half_life=5)
    assert_refused(result, 1, "val_64.beton", str(finished.run))


def test_what_only_moves_a_run_may_change(finished):
    saved = finished.killed_with["config"]
    current = copy.deepcopy(saved)
    current["data"] |= {"dir": "/elsewhere", "workers": 7}
    current["validation"]["every"] = 9
    refuse = partial(
        config.refuse_change,
        sections=recipe.RECIPE_SECTIONS,
        free=recipe.NOT_RECIPE,
        folder=finished.run,
        defaults={"model": {"blurpool": False}},
    )
    refuse(saved, current)
    older = copy.deepcopy(saved)
    del older["model"]["blurpool"]
    refuse(older, current)  # saved before there was this key
    for section, key, value in (
        ("model", "blurpool", True),
        ("training", "seed", 9),
        ("resolution", "end", 64),
        ("data", "crop_scale", [0.5, 1.0]),
    ):
        changed = copy.deepcopy(saved)
        changed[section][key] = value
        with pytest.raises(UsageError, match=f"{section}.{key}"):
            refuse(saved, changed)


TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
# bf16, BlurPool, sigmoid loss, colour jitter and page-aware order have no run of their own
TWO_RANKS = {
    "training__epochs": 2,
    "training__precision": "bf16",
    "model__blurpool": "true",
    "model__blur_maxpool": "true",
    "model__log_prior_bias": "true",
    "training__loss": "bce",
    "resolution__end": 32,
    "data__order": "page",
    "data__brightness": 0.4,
    "data__contrast": 0.4,
    "data__saturation": 0.4,
    "validation__every": 2,
    "logging__checkpoint_steps": 1,
}


@pytest.fixture(scope="module")
def two_ranks(betons, tmp_path_factory):
    """A run of two ranks on one node that nothing disturbed."""
    folder = tmp_path_factory.mktemp("two")
    result = run(betons, folder, launcher=(*TORCHRUN, "--standalone", "--nproc_per_node=2"), **TWO_RANKS)
    assert result.returncode == 0, result.stderr
    return SimpleNamespace(run=folder / "small", output=result.stdout)


def assert_identical(run, other):
    assert chaos.compare(chaos.outcome(run, epochs=2), chaos.outcome(other, epochs=2)) == "identical"


def test_two_ranks_evaluate_every_image_once_and_share_the_batch(two_ranks):
    first, last = read_rows(two_ranks.run / "log.jsonl")
    assert "top1" not in first
    assert last["images"] == 110
    assert (last["step"], last["images_seen"]) == (10, 400)
    assert "batch 40 = 20 x 2 ranks, peak" in two_ranks.output
    assert two_ranks.output.count("loading ...") == 1
    assert "page order" in two_ranks.output
    assert 1 < last["train_loss"] < 4


def test_two_nodes_of_one_process_reproduce_one_node_of_two(betons, two_ranks, tmp_path):
    """Two of torchrun's agents, which meet on the loopback."""
    nodes = ("--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={faults.free_port()}")
    agents = [
        subprocess.Popen(
            command(betons, tmp_path, launcher=(*TORCHRUN, *nodes, f"--node_rank={number}"), **TWO_RANKS),
            env={**os.environ, "OMP_NUM_THREADS": "1"},  # which torchrun chooses where a node has several processes
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in (0, 1)
    ]
    outputs = [agent.communicate(timeout=240)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert "x 2 ranks" in outputs[0]
    assert_identical(tmp_path / "small", two_ranks.run)


def test_torchrun_restarts_a_killed_worker_but_not_a_planned_stop(betons, two_ranks, tmp_path):
    launcher = (*TORCHRUN, "--standalone", "--nproc_per_node=2", "--max-restarts=3")
    folder = tmp_path / "small"

    def begin():
        with open(tmp_path / "output", "w") as log:
            return subprocess.Popen(command(betons, tmp_path, launcher=launcher, **TWO_RANKS), stdout=log, stderr=log)

    def output():
        return (tmp_path / "output").read_text()

    def wait(agent, condition):
        deadline = time.monotonic() + 240
        while not condition():
            assert agent.poll() is None, output()
            assert time.monotonic() < deadline, output()
            time.sleep(0.01)

    agent = begin()
    wait(agent, (folder / "last.pt").exists)
    os.kill(workers(agent)[1], signal.SIGKILL)
    wait(agent, lambda: "resuming" in output())
    for process in workers(agent):
        os.kill(process, signal.SIGTERM)
    assert agent.wait(120) == 0, output()
    status = json.loads((folder / "status.json").read_text())
    assert (status["status"], status["reason"]) == ("interrupted", "SIGTERM")
    assert output().count("resuming") == 1
    agent = begin()
    assert agent.wait(240) == 0, output()
    assert json.loads((folder / "status.json").read_text())["status"] == "finished"
    assert_identical(folder, two_ranks.run)


def workers(agent):
    """Process ids of an agent's workers, by rank."""
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    found = {}
    for child in children:
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        ranks = [int(entry[5:]) for entry in environment if entry.startswith(b"RANK=")]
        found |= {rank: int(child) for rank in ranks}
    return [found[rank] for rank in sorted(found)]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"resolution__start_ramp": 2, "resolution__end_ramp": 1}, ["resolution.start_ramp=2", "end_ramp=1"]),
        ({"resolution__end_ramp": 3}, ["resolution.end_ramp=3", "training.epochs=3"]),
        ({"resolution__multiple": 112}, ["resolution.multiple=112", "32 px"]),
        ({"training__batch_size": 50}, ["training.batch_size=50", "micro_batch=20"]),
        ({"lr__warmup_epochs": 3}, ["lr.warmup_epochs=3"]),
        ({"validation__headline_resolution": 224}, ["headline_resolution=224", "48,64"]),
        ({"data__crop_scale": "1,0.5"}, ["data.crop_scale"]),
        ({"data__rnug": 64}, ["unknown key data.rnug", "data.rung"]),
        ({"training__checkpoint": "x.pt"}, ["training.checkpoint", "eval_only"]),
        ({"budget__max_dollars": 5}, ["budget.max_dollars needs", "budget.dollars_per_hour or budget.instance"]),
        ({"budget__instance": "g9.huge"}, ["g9.huge", "budget.dollars_per_hour", "g5.xlarge"]),
        ({"training__epochs": "many"}, ["training.epochs", "'many'"]),
        ({"data__dir": None}, ["data.dir is required"]),
        pytest.param(
            {"training__device": "cuda"},
            ["training.device=cuda"],
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU"),
        ),
    ],
)
def test_impossible_settings_are_refused_in_words(overrides, words):
    flags = command("betons", "runs", **overrides)[2:]
    with pytest.raises(UsageError) as refusal:
        recipe.check_batch(load(flags), 1)
    for word in words:
        assert word in str(refusal.value)


def test_a_usage_error_is_one_line_and_status_2_and_leaves_nothing(betons, tmp_path):
    assert_refused(run(betons, tmp_path, training__batch_size=50), 2, "training.batch_size=50", "micro_batch=20")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"data__dir": "/nowhere"}, ["no train_SIZE.beton in /nowhere"]),
        ({"data__rung": 500}, ["no train_500.beton", "(there: 64, 96)", "data.rung=auto"]),
        ({"training__batch_size": 500, "training__micro_batch": 500}, ["500", "200 images"]),
        ({"training__eval_only": "true"}, ["no checkpoint at"]),
        ({"lr__lr_per_256": "1e30"}, ["not finite", "lr.lr_per_256"]),
    ],
)
def test_what_cannot_work_is_one_line_and_status_1(betons, tmp_path, overrides, words):
    assert_refused(run(betons, tmp_path, **overrides), 1, *words)


def test_a_truncated_beton_is_one_line_and_status_1(betons, tmp_path):
    for source in betons.iterdir():
        (tmp_path / source.name).symlink_to(source)
    damaged = tmp_path / "train_64.beton"
    damaged.unlink()
    damaged.write_bytes((betons / "train_64.beton").read_bytes()[:-30])
    assert_refused(run(tmp_path, tmp_path / "runs"), 1, "train_64.beton")


def small_learner(**overrides):
    """A Learner of ResNet-18 for three classes on the CPU."""
    flags = command("betons", "runs", training__precision="fp32", **overrides)[2:]
    return learner.Learner(load(flags), classes=3, device=torch.device("cpu"))


def test_accumulated_gradients_are_those_of_the_whole_batch():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8)
    labels = torch.arange(8) % 3
    made, network = small_learner(), nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    made.model = network

    def gradient(micro_batches):
        network.zero_grad()
        losses = [
            made.forward_backward(x, y, micro_batches)
            for x, y in zip(images.chunk(micro_batches), labels.chunk(micro_batches), strict=True)
        ]
        return sum(losses), network[1].weight.grad.clone()

    for whole, parts in zip(gradient(1), gradient(4), strict=True):
        torch.testing.assert_close(parts, whole)


def test_a_step_takes_its_micro_batches_and_moves_weights_and_average():
    made = small_learner(model__ema_half_life=5)
    made.train()
    before = copy.deepcopy(made.state())
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    micro_batches = iter([(images, torch.arange(4) % 3, np.arange(4))] * 3)
    loss = made.step(micro_batches, accumulation=2, learning_rate=0.1, epoch=0, step=0)
    assert len(list(micro_batches)) == 1
    assert loss.dtype == torch.float64
    assert 0.5 < loss < 5
    for part in ("model", "ema"):
        moved, there = (state[part].get("model", state[part]) for state in (made.state(), before))
        assert not torch.equal(moved["fc.weight"], there["fc.weight"])
    made.restore(before)
    for key, tensor in before["model"].items():
        assert torch.equal(made.network.state_dict()[key], tensor)


def test_a_resumed_epoch_adds_up_its_loss_on_its_device():
    """In a checkpoint it is on the CPU; nothing else here is on another device, so meta stands for a GPU."""
    progress = Progress()
    progress.restore(vars(Progress(loss_sum=torch.ones((), dtype=torch.float64))), torch.device("meta"))
    progress.loss_sum += torch.ones((), dtype=torch.float64, device="meta")


def test_the_largest_step_is_tried_before_the_first_and_leaves_no_trace(betons, monkeypatch):
    flags = command(betons, "runs", model__ema_half_life=5, validation__batch_size=8)[2:]
    run = session.Session(load(flags), Progress())
    train_imagenet.build(run)
    network = run.learner.network
    before, shapes = copy.deepcopy(network.state_dict()), []
    monkeypatch.setattr(learner, "normalize", lambda images: shapes.append(images.shape) or normalize(images))
    run.try_largest()
    assert shapes == [(20, 3, 48, 48), (8, 3, 64, 64)]
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())

    def no_room(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB.\nmore of it")

    monkeypatch.setattr(run.learner, "forward_backward", no_room)
    with pytest.raises(UsageError, match=r"at 48 px with training.micro_batch=20: .* allocate 20 MiB\.$"):
        run.try_largest()
    with pytest.raises(RunError, match="at 32 px with training.micro_batch=20"):
        train_imagenet.train_one_epoch(run)
    run.progress.epoch = 3
    run.try_largest()


@pytest.mark.parametrize(
    "path", [path for path in sorted((ROOT / "rn50_configs").glob("*.yaml")) if not path.name.startswith("write_")]
)
def test_every_config_is_complete_and_possible(path):
    cfg = load(["--config-file", str(path), "--data.dir=betons"])
    recipe.check_batch(cfg, 1)
