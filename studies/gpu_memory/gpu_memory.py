"""How many images fit each GPU: the memory of a recipe's step, counted on a processor without computing it.

    python studies/gpu_memory/gpu_memory.py > studies/gpu_memory/results.md

The step runs on fake tensors, which have shapes and types but no data. A dispatch mode adds up the storages that are
alive and keeps the largest sum. studies/gpu_h100 measured some of these steps: the first table compares. Prints
Markdown.
"""

import argparse
import copy
import json
import weakref
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rn50 import augment, recipe
from rn50.command import run
from rn50.learner import Learner
from rn50.planning import budget, costs

ROOT = Path(__file__).parents[2]
MEASURED = {  # candidate of studies/gpu_step: settings on top of the flagship's
    "fp16": (),
    "fp16_no_blur_maxpool": ("--model.blur_maxpool=false",),
    "fp16_no_blur": ("--model.blur_maxpool=false", "--model.blurpool=false"),
}
RECIPES = ("rn50_78", "rn50_88_epochs", "rn50_baseline_90_step")
MICRO_BATCHES = (512, 256, 128, 64)
# GiB as the driver reports them: published in modal-labs/modal-client, pull request 2797. Others: by the card's name.
CARDS = {
    "8-GB card": 8.0,
    "RTX 3060": 12.0,
    "T4": 15.0,
    "RTX 4060 Ti": 16.0,
    "L4": 22.5,
    "A10G": 22.5,
    "RTX 3090": 24.0,
    "RTX 4090": 24.0,
    "A100": 40.0,
    "H100": 79.6,
}
# Assumed: CUDA's context, cuDNN's workspaces, batches under way, and what the allocator holds without using it.
UNSEEN_GIB = 1.5
GIB = 2**30
FAKE = FakeTensorMode()


class Living(TorchDispatchMode):
    """Counts the bytes of the storages that are alive. peak: the most at any time."""

    def __init__(self):
        super().__init__()
        self.bytes = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.see(tensor.untyped_storage())
        self.peak = max(self.peak, self.bytes)
        return result

    def see(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.bytes += size
            weakref.finalize(storage, self.forget, key, size)

    def forget(self, key, size):
        self.known.discard(key)
        self.bytes -= size


def main():
    argparse.ArgumentParser(description=__doc__.partition("\n\n")[0]).parse_args()
    print("| step of 256 images | measured on an H100, GiB | counted, GiB | difference |\n|---|---|---|---|")
    for name, px, measured in measurements():
        counted = step_gib(build("rn50_78", *MEASURED[name]), 256, px)
        print(f"| `{name}`, {px} px | {measured:.2f} | {counted:.2f} | {counted / measured - 1:+.1%} |")
    print("\nA whole run at its largest resolution, GiB, by `training.micro_batch`: the step as counted, weights,")
    print(f"momentum, average, and {UNSEEN_GIB} GiB assumed for what is not counted.\n")
    print("| recipe | px |" + "".join(f" {micro} |" for micro in MICRO_BATCHES))
    print("|---|---|" + "---|" * len(MICRO_BATCHES))
    need = {name: needs(name) for name in RECIPES}
    for name, (px, gib) in need.items():
        print(f"| `{name}` | {px} |" + "".join(f" {gib[micro]:.1f} |" for micro in MICRO_BATCHES))
    print("\nThe `training.micro_batch` to set: the recipe's own where it fits, else the largest that does. Hours:")
    print("projected from published speeds, beside 8 vCPU.\n")
    print("| GPU | GiB |" + "".join(f" `{name}` |" for name in RECIPES) + " hours of `rn50_mild_28` | of `rn50_78` |")
    print("|---|---|" + "---|" * (len(RECIPES) + 2))
    for gpu, there_is in CARDS.items():
        cells = [micro_batch(name, gib, there_is) for name, (_, gib) in need.items()]
        cells += [hours(gpu, name) for name in ("rn50_mild_28", "rn50_78")]
        print(f"| {gpu} | {there_is:g} |" + "".join(f" {cell} |" for cell in cells))


def measurements():
    """(candidate, px, GiB) of the steps that studies/gpu_h100 measured and this file can count."""
    for name in ("step.json", "untuned.json"):
        for row in json.loads((ROOT / "studies/gpu_h100" / name).read_text())["results"]:
            if row["name"] in MEASURED and (name, row["resolution"]) != ("untuned.json", 176):
                yield row["name"], row["resolution"], row["peak_gib"]


def build(name, *settings):
    """The Learner of a recipe on the processor, as it is before its first step."""
    arguments = [f"--config-file={ROOT}/rn50_configs/{name}.yaml", "--data.dir=none", "--training.device=cpu"]
    return Learner(recipe.load("", [*arguments, *settings]), classes=1000, device=torch.device("cpu"))


def step_gib(learner, images, px, *, climb=False):
    """GiB that a forward and a backward pass of `images` at `px` pixels take at most, gradients included."""
    with FakeCopyMode(FAKE):
        network = copy.deepcopy(learner.network).train()
    augment._of_channels.cache_clear()  # it keeps the channels' means, which here are fake and elsewhere are not
    try:
        with FAKE, Living() as living:
            pixels = torch.zeros(images, px, px, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
            labels = torch.zeros(images, dtype=torch.int64)
            share = learner.cfg.training.mixup
            for _ in range(2):  # the second has the first one's gradients beside it
                learner.forward_backward(pixels, labels, 1, share=share, climb=climb, model=network)
    finally:
        augment._of_channels.cache_clear()
    return living.peak / GIB


def needs(name):
    """(largest resolution in px, {micro-batch: GiB}) of a recipe."""
    learner = build(name)
    px, climb = max(recipe.resolutions(learner.cfg)), learner.cfg.training.sam_rho > 0
    weights = sum(tensor.numel() * tensor.element_size() for tensor in learner.network.state_dict().values()) / GIB
    kept = UNSEEN_GIB + weights * (3 if learner.ema else 2)  # the weights, their momentum, their average
    return px, {micro: step_gib(learner, micro, px, climb=climb) + kept for micro in MICRO_BATCHES}


def micro_batch(name, gib, there_is):
    """What to set for a recipe on a card, as text. gib: {micro-batch: GiB}."""
    own = costs.read_recipe(ROOT / f"rn50_configs/{name}.yaml").micro_batch
    fits = max((micro for micro, needed in gib.items() if needed <= there_is), default=0)
    return f"{own}, its own" if own <= fits else str(fits)


def hours(gpu, name):
    """Projected hours of a whole recipe on one such GPU, or a dash where the table does not know it."""
    found = budget.projected_hours(
        costs.read_recipe(ROOT / f"rn50_configs/{name}.yaml"),
        images=1_281_167,
        validation_images=50_000,
        instance=None,
        spot=False,
        gpu_name=gpu,
        gpus=1,
        machines=1,
        vcpus=8,
        memory_gib=32,
    )
    return f"{found[0]:.0f} (+- {found[1]:.0%})" if found else "-"


if __name__ == "__main__":
    run(main)
