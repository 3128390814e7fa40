"""TrainingLoader and EvaluationLoader as docs/loader.md promises them: what is left after a kill, ranks, refusals."""

import hashlib
import json
import re
import signal
import subprocess
import sys
import threading

import pytest
import torch

from rn50.data import beton_loader, loaders
from rn50.data.loaders import EvaluationLoader, TrainingLoader
from rn50.errors import RunError, UsageError
from tests.conftest import ROOT

# px of each epoch: the first reads train_64.beton, the others train_96.beton
RESOLUTIONS = (24, 32, 32)
# 200 images: 6 steps an epoch, of 4 batches on one rank
SETTINGS = {"batch_size": 32, "micro_batch": 8, "device": "cpu", "workers": 1, "crop_scale": (0.2, 1), "seed": 3}


def opened(folder, **others):
    return TrainingLoader(folder, **SETTINGS | others)


def left(loader, epochs=3):
    """Yields a digest of each batch that is left of the first `epochs` epochs."""
    while loader.epoch < epochs:
        with loader.batches(RESOLUTIONS[loader.epoch]) as batches:
            for batch in batches:
                yield digest(batch)


def digest(batch):
    images, labels, samples = batch
    assert images.is_contiguous(memory_format=torch.channels_last)
    return hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes() + samples.tobytes()).hexdigest()


VICTIM = """
import json, os, signal, sys
from tests.data import test_loader_api as test
loader = test.opened(sys.argv[1])
for number, digest in enumerate(test.left(loader), start=1):
    print(digest, flush=True)
    if number == 38:
        with open(sys.argv[2], "w") as file:
            json.dump(loader.state_dict(), file)
        os.kill(os.getpid(), signal.SIGKILL)
"""
SUCCESSOR = """
import json, sys
from tests.data import test_loader_api as test
state = json.load(open(sys.argv[2]))
print(json.dumps([test.left_by_ranks(sys.argv[1], state, world_size) for world_size in (1, 2)]))
"""


def left_by_ranks(folder, state, world_size, **others):
    """Digests of all batches that are left after `state`, in the order of the steps."""
    ranks = []
    for rank in range(world_size):
        loader = opened(folder, rank=rank, world_size=world_size, **others)
        loader.load_state_dict(state)
        ranks.append(left(loader))
    return [digest for together in zip(*ranks, strict=True) for digest in together]


def fresh(code, *arguments, folder=ROOT):
    """(exit status, stdout, stderr) of a new Python."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


def test_a_fresh_process_goes_on_with_the_same_batches(betons, tmp_path):
    """Killed in the second epoch, in the midst of a step."""
    whole, state = list(left(opened(betons))), tmp_path / "state.json"
    assert len(set(whole)) == 3 * 24
    assert fresh(VICTIM, betons, state) == (-signal.SIGKILL, "\n".join([*whole[:38], ""]), "")
    status, found, problem = fresh(SUCCESSOR, betons, state)
    assert status == 0, problem
    assert json.loads(found) == [whole[36:], whole[36:]]


@pytest.mark.parametrize(("order", "taken_after"), [("random", 23), ("page", 24), ("page", 45)])
def test_either_order_goes_on_at_any_step_with_any_number_of_ranks(betons, order, taken_after):
    """Before and after a change of the file, and in the midst of a step."""
    loader = opened(betons, order=order)
    batches = left(loader)
    whole = [next(batches) for _ in range(taken_after)]
    state = json.loads(json.dumps(loader.state_dict()))
    whole += batches
    for world_size in (1, 2):
        assert left_by_ranks(betons, state, world_size, order=order) == whole[taken_after // 4 * 4 :]


@pytest.mark.parametrize("order", ["random", "page"])
def test_an_epoch_is_its_order_with_its_crops_from_the_rung_that_suits(betons, order):
    rungs, expected = loaders.find_rungs(betons, "train"), []
    for epoch, (px, side) in enumerate([(24, 64), (32, 96), (32, 96)]):
        samples = loaders.epoch_order(rungs[side], order, seed=3, epoch=epoch)[:192]
        with loaders.training_loader(
            rungs[side], batch_size=8, crop_scale=(0.2, 1), seed=3, device=torch.device("cpu"), workers=1, timeout=60
        ).batches(samples, px, epoch=epoch) as batches:
            for (images, labels), those in zip(batches, samples.reshape(-1, 8), strict=True):
                expected.append(digest((images, labels, those)))
    assert list(left(opened(betons, order=order))) == expected


def test_a_state_counts_whole_steps_that_were_handed_out_and_is_the_same_on_every_rank(betons):
    seen = {}
    for rank, world_size in ((0, 1), (0, 2), (1, 2)):
        loader = opened(betons, rank=rank, world_size=world_size)
        assert loader.steps_per_epoch == 6
        assert loader.accumulation == 4 // world_size
        seen[rank, world_size] = states = [loader.state_dict()]
        states += [loader.state_dict() for _ in left(loader, epochs=2)]
        assert json.loads(json.dumps(states)) == states
        steps = [(state["epoch"], state["step"]) for state in states]
        assert steps == [divmod(number // loader.accumulation, 6) for number in range(48 // world_size + 1)]
        assert [state["reading"] for state in states if not state["step"]] == [None] * (8 // world_size + 1)
    assert seen[0, 1][::4] == seen[0, 2][::2] == seen[1, 2][::2]
    assert {state["reading"]["rung"] for state in seen[0, 1][24:] if state["step"]} == {96}


def test_a_block_that_is_left_early_goes_on_at_the_same_step(betons, monkeypatch):
    whole, loader, got = list(left(opened(betons))), opened(betons), []
    threads = threading.active_count()

    def read(count):
        with loader.batches(24) as batches:
            got.extend(digest(next(batches)) for _ in range(count))

    read(6)  # the step that was begun comes again as a whole
    assert threading.active_count() == threads
    with pytest.raises(KeyboardInterrupt), loader.batches(24):
        raise KeyboardInterrupt
    read(5)
    pipeline, broken = beton_loader._Iterator.run_pipeline, threading.Event()

    def break_down(self, number, *rest):
        if number == 4 and not broken.is_set():
            broken.set()
            raise ValueError("bad weather")
        return pipeline(self, number, *rest)

    monkeypatch.setattr(beton_loader._Iterator, "run_pipeline", break_down)
    with pytest.raises(RunError, match=r"train_64.beton failed: ValueError: bad weather"):
        read(9)
    assert (loader.epoch, loader.step) == (0, 3)
    got += left(loader)
    assert threading.active_count() == threads
    assert got == whole[:6] + whole[4:9] + whole[8:12] + whole[12:]
    loader.seek(1, 2)
    assert list(left(loader)) == whole[24 + 8 :]


def test_an_epoch_ends_from_the_file_and_in_the_order_that_it_was_begun_with(betons, monkeypatch):
    """Another resolution would mean another rung, and less memory another order: images would come twice."""
    monkeypatch.setattr(loaders, "PAGES_IN_WINDOW", 2)
    for memory, order in ((1, "page"), (1 << 60, "random")):
        seen, states = [], []
        for px, more in ((24, memory), (32, memory), (32, 1 if memory > 1 else 1 << 60)):
            monkeypatch.setattr(loaders, "memory_bytes", lambda more=more: more)
            loader = opened(betons, rung="auto")
            for info in loader.rungs.values():
                info.page_size = 1 << 13  # two or three images
            if states:
                loader.load_state_dict(states[-1])
            with loader.batches(px) as batches:
                for images, _, samples in batches:
                    assert images.shape == (8, 3, px, px)
                    seen += samples.tolist()
                    states.append(loader.state_dict())
                    if len(seen) in (64, 128):
                        break
        assert len(seen) == len(set(seen)) == 192
        assert all(state["reading"] == {"rung": 64, "order": order} for state in states if state["step"])
        with loader.batches(32):
            assert loader.reading == {"rung": 96, "order": "page" if order == "random" else "random"}


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ({"seed": 4}, "seed is 3 in it, and 4 here"),
        ({"batch_size": 64}, "batch_size is 32 in it, and 64 here"),
        ({"micro_batch": 16}, "micro_batch is 8 in it, and 16 here"),
        ({"crop_scale": (0.08, 1)}, r"crop_scale is \[0.2, 1.0\] in it, and \[0.08, 1.0\] here"),
        ({"rung": 96}, "rung is auto in it, and 96 here"),
        ({"order": "page"}, "order is auto in it, and page here"),
    ],
)
def test_a_state_of_other_settings_is_refused(betons, setting, problem):
    loader = opened(betons, **setting)
    with pytest.raises(RunError, match=rf"^the state is another loader's: {problem}$"):
        loader.load_state_dict(opened(betons).state_dict())
    assert (loader.epoch, loader.step) == (0, 0)


def test_a_state_of_other_files_is_refused_and_of_the_same_ones_elsewhere_is_not(betons, tmp_path):
    for kind in ("beton", "json"):
        (tmp_path / f"train_64.{kind}").symlink_to(betons / f"train_64.{kind}")
    here, there = opened(tmp_path), opened(betons)
    hexadecimal = "[0-9a-f]{64}"
    with pytest.raises(RunError, match=rf"train_96.beton is {hexadecimal} in it, and missing here$"):
        here.load_state_dict(there.state_dict())
    with pytest.raises(RunError, match=rf"train_96.beton is missing in it, and {hexadecimal} here$"):
        there.load_state_dict(here.state_dict())
    moved = opened(tmp_path, rank=1, world_size=4, workers=2, timeout=5)
    moved.load_state_dict(here.state_dict() | {"epoch": 7})
    assert moved.epoch == 7
    manifest = json.loads((betons / "train_64.json").read_text())
    manifest["beton"]["sha256"] = "0" * 64
    (tmp_path / "train_64.json").unlink()
    (tmp_path / "train_64.json").write_text(json.dumps(manifest))
    with pytest.raises(RunError, match=rf"train_64.beton is {hexadecimal} in it, and {hexadecimal} here$"):
        opened(tmp_path).load_state_dict(here.state_dict())


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"rank": 2, "world_size": 2}, "rank=2 is not one of those that world_size=2 has, which count from 0"),
        ({"rank": -1}, "rank=-1 is not one of those that world_size=1 has"),
        ({"batch_size": 30}, "batch_size=30 is not a multiple of micro_batch=8 x world_size=1"),
        ({"world_size": 3}, "batch_size=32 is not a multiple of micro_batch=8 x world_size=3"),
        ({"micro_batch": None, "world_size": 3}, "batch_size=32 is not a multiple of micro_batch=10 x world_size=3"),
        ({"micro_batch": 0}, "batch_size=32 is not a multiple of micro_batch=0"),
        ({"order": "sorted"}, "order=sorted is none of auto, random and page"),
    ],
)
def test_arguments_that_cannot_be_are_refused(betons, arguments, problem):
    with pytest.raises(UsageError, match=problem):
        opened(betons, **arguments)


def test_an_epoch_without_a_whole_step_is_refused_when_it_is_to_be_read(betons):
    loader = opened(betons, batch_size=208)
    with pytest.raises(RunError, match="batch_size=208 is more than the 200 images there are"):
        loader.batches(24).__enter__()
    with pytest.raises(RunError, match=r"no train_65.beton in .* \(there: 64, 96\)"):
        opened(betons, rung=65)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_an_evaluation_has_every_image_once_for_any_number_of_ranks(betons, world_size):
    """110 images."""
    found, told = [], []
    for rank in range(world_size):
        loader = EvaluationLoader(
            betons, batch_size=16, device="cpu", workers=1, rank=rank, world_size=world_size, warn=told.append
        )
        with loader.batches(40) as batches:
            mine = [(images.clone(), labels.clone()) for images, labels in batches]
        assert loader.rounds - (rank > 0) <= len(mine) <= loader.rounds
        found += [pair for images, labels in mine for pair in zip(images, labels.tolist(), strict=True)]
    assert [label for _, label in found] == loader.info.labels.tolist()
    assert len({image.numpy().tobytes() for image, _ in found}) == 110
    assert told == []
    with pytest.raises(UsageError, match="rank=7"):
        EvaluationLoader(betons, batch_size=16, device="cpu", rank=7, world_size=world_size)


KILL_AFTER_WRITING = """
import os, signal
replace = os.replace
os.replace = lambda *names: (replace(*names), os.kill(os.getpid(), signal.SIGKILL))
"""


def test_the_pages_example_runs_and_goes_on(betons, tmp_path):
    page = (ROOT / "docs/loader.md").read_text()
    code = "".join(re.findall(r"^```python\n(.*?)^```", page, re.M | re.S))
    smaller = {
        "data/imagenet": betons,
        "resnet50": "shufflenet_v2_x0_5",
        "batch_size=256": "batch_size=40",
        "224": "32",
    }
    smaller |= {"128": "24", "160": "32", "< 16": "< 2", "< 8": "< 1", "% 500": "% 3"}
    for text, other in smaller.items():
        assert text in code
        code = code.replace(text, str(other))
    assert fresh(KILL_AFTER_WRITING + code, folder=tmp_path) == (-signal.SIGKILL, "", "")
    state = torch.load(tmp_path / "state.pt")["loader"]
    assert (state["epoch"], state["step"]) == (0, 3)
    assert fresh(code + "print(loader.epoch, 0 <= int(right) <= 110)", folder=tmp_path) == (0, "2 True\n", "")
    state = torch.load(tmp_path / "state.pt")["loader"]
    assert (state["epoch"], state["step"]) == (2, 0)
