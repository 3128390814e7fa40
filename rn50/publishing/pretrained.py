"""Networks that others, or an earlier run, have trained: weights by torchvision's name or from a file."""

import contextlib
import json
import re
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import torch
from torch import nn
from torchvision import models

from rn50.augment import IMAGENET_MEAN, IMAGENET_STD
from rn50.errors import RunError, UsageError
from rn50.files import sha256
from rn50.model import ARCHITECTURES, not_finite
from rn50.publishing import export
from rn50.training import checkpoint, foreign

# Seconds that a server may be silent.
PATIENCE = 30
# (whether blocks have a third convolution, blocks of the four stages) of each architecture.
SHAPES = {
    (False, (2, 2, 2, 2)): "resnet18",
    (False, (3, 4, 6, 3)): "resnet34",
    (True, (3, 4, 6, 3)): "resnet50",
    (True, (3, 4, 23, 3)): "resnet101",
}
# What DistributedDataParallel, torch.compile and Lightning put before every name, and where programs keep the weights.
PREFIXES = ("module.", "_orig_mod.", "model.")
PLACES = ("state_dict", "model_state_dict", "model")


@dataclass
class Pretrained:
    """A network for evaluation in float32 on the CPU, what it must be shown, and what is known of it.

    arch: its architecture's name; name: of the weights. resolution: pixels; crop_ratio: the crop's side over the short
    side. mean, std: of the pixels in 0..255, for each channel. classes: [{wnid, name}] in the order of the outputs, or
    None. top1: in %, and whose figure that is; None where nothing is known.
    """

    network: nn.Module
    arch: str
    name: str
    resolution: int = 224
    crop_ratio: float = 0.875
    mean: tuple = IMAGENET_MEAN
    std: tuple = IMAGENET_STD
    classes: list | None = None
    top1: float | None = None
    top1_of: str | None = None

    @property
    def outputs(self):
        return self.network.fc.out_features


def load(weights):
    """A Pretrained from torchvision's name (ResNet50_Weights.IMAGENET1K_V1), a file, or the folder of an export.

    Files: a state_dict with torchvision's names (torchvision, timm, ffcv-imagenet with its BlurPool), as it is or in a
    dict, in torch's format or safetensors; a run's last.pt. RunError where it cannot be had, or is something else.
    """
    listed = torchvision_weights()
    loaded = published(listed[weights]) if weights in listed else _of_a_file(Path(weights), listed)
    if spoiled := not_finite(loaded.network.state_dict()):
        raise RunError(f"{loaded.name} holds weights that are not finite ({spoiled}): it is of no use")
    return loaded


def published(entry, state=None):
    """The Pretrained of an entry of torchvision's enumeration; state: its state_dict, downloaded where it is None."""
    arch, preset = _arch_of(entry), entry.transforms()
    categories = entry.meta["categories"]
    state = download(entry.url) if state is None else state
    description = {"arch": arch, "num_classes": len(categories)}
    return Pretrained(
        export.load_network(description, state),
        arch,
        str(entry),
        resolution=preset.crop_size[0],
        crop_ratio=preset.crop_size[0] / preset.resize_size[0],
        mean=tuple(255 * value for value in preset.mean),
        std=tuple(255 * value for value in preset.std),
        top1=entry.meta["_metrics"]["ImageNet-1K"]["acc@1"],
        top1_of="published by torchvision",
    )


def default_name(arch):
    """torchvision's first weights of `arch`: those of the recipe that everybody compares with."""
    return next(name for name, entry in torchvision_weights().items() if _arch_of(entry) == arch)


def torchvision_weights():
    """{name: entry of torchvision's enumeration} of all its ImageNet weights for ARCHITECTURES."""
    return {str(entry): entry for arch in ARCHITECTURES for entry in models.get_model_weights(arch)}


def download(url):
    """The state_dict at `url`, through torch.hub and its cache; the name's hash is checked. RunError names the URL."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        # torch.hub says where from and where to on stdout
        with contextlib.redirect_stdout(sys.stderr):
            return torch.hub.load_state_dict_from_url(
                url, map_location="cpu", progress=False, check_hash=True, weights_only=True
            )
    except Exception as error:  # of the network, the disk, the checksum or a damaged file in the cache
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RunError(
            f"cannot download the weights ({reason}): get {url} elsewhere and name the file with --weights FILE"
        ) from None
    finally:
        socket.setdefaulttimeout(before)


def _arch_of(entry):
    return type(entry).__name__.removesuffix("_Weights").lower()


def _file_of(url):
    return Path(urlsplit(url).path).name


def _hash_of(url):
    return re.search(r"-([0-9a-f]{8})", _file_of(url))[1]


def _of_a_file(path, listed):
    """The Pretrained of a file or an export's folder; `listed`: torchvision's, one of which it may be."""
    if not path.exists():
        raise UsageError(
            f"--weights {path}: there is no such file, and it is none of torchvision's: {', '.join(listed)}"
        )
    path = path / export.WEIGHTS if path.is_dir() else path
    content = _read(path)
    if isinstance(content, dict) and content.get("format") == checkpoint.FORMAT and "config" in content:
        return _of_a_run(path, content)
    checksum = sha256(path)[:8]
    for entry in listed.values():
        if _hash_of(entry.url) == checksum:
            return published(entry, content)
        if path.name == _file_of(entry.url):
            raise RunError(f"{path} is not the file of {entry.url}: its checksum is another; download it again")
    network, arch = _network(path, content)
    loaded = Pretrained(network, arch, str(path))
    _describe(loaded, path.parent / "config.json")
    return loaded


def _read(path):
    """What the file holds: tensors and plain values alone."""
    try:
        if path.suffix == ".safetensors":
            return export.read_safetensors(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise RunError(f"no {path.name} in {path.parent}") from None
    except Exception as error:  # a file of any kind: almost anything is raised
        what = foreign.kind(path)
        reason = f"it is {what[0]}{what[1].replace(foreign.PUBLISHED, '')}" if what else str(error).split("\n")[0]
        raise RunError(f"cannot read weights from {path}: {reason}") from None


def _of_a_run(path, state):
    config = state["config"]
    validation, description = config["validation"], export.architecture(state)
    px = validation["headline_resolution"]
    loaded = Pretrained(
        export.load_network(description, state["ema"]["model"] if state["ema"] else state["model"]),
        description["arch"],
        str(path),
        resolution=px,
        crop_ratio=validation["crop_ratio"],
    )
    rows = state["progress"]["rows"]
    figures = (rows[-1].get("evaluation") or {}).get(px) if rows else None
    if figures:
        loaded.top1, loaded.top1_of = figures["single"]["top1"], "measured by its run"
    return loaded


def _network(path, content):
    """(network, its architecture's name) of the state_dict in `content`."""
    for place in PLACES:
        if isinstance(content, dict) and isinstance(content.get(place), dict):
            content = content[place]
    state = content if isinstance(content, dict) else {}
    state = {name: value for name, value in state.items() if torch.is_tensor(value)}
    while any(found := [prefix for prefix in PREFIXES if state and all(name.startswith(prefix) for name in state)]):
        state = {name.removeprefix(found[0]): value for name, value in state.items()}
    stages = [{name.split(".")[1] for name in state if name.startswith(f"layer{k}.")} for k in (1, 2, 3, 4)]
    arch = SHAPES.get(("layer1.0.conv3.weight" in state, tuple(len(blocks) for blocks in stages)))
    if arch is None or "fc.weight" not in state:
        names = sorted(map(str, state or (content if isinstance(content, dict) else [])))
        raise RunError(
            f"{path} holds no {' or '.join(ARCHITECTURES)} under torchvision's names (conv1.weight, layer1.0.bn1.bias, "
            f"fc.weight): {f'it has {len(names)} names: ' + ', '.join(names[:4]) if names else 'it has no names'}"
        )
    description = {
        "arch": arch,
        "num_classes": len(state["fc.weight"]),
        "blurpool": any(name.startswith("layer") and name.endswith(".blur_filter") for name in state),
        "blur_maxpool": "maxpool.blur_filter" in state,
    }
    try:
        return export.load_network(description, state), arch
    except RunError as error:
        raise RunError(f"{path}: {error}") from None


def _describe(loaded, path):
    """What a config.json beside the weights says of them: an export's, or timm's (pretrained_cfg)."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if "pretrained_cfg" in config:
            timm = config["pretrained_cfg"]
            loaded.resolution = (timm.get("test_input_size") or timm["input_size"])[-1]
            loaded.crop_ratio = timm.get("test_crop_pct") or timm["crop_pct"]
            loaded.mean, loaded.std = (tuple(255 * value for value in timm[key]) for key in ("mean", "std"))
            return
        shown = config["preprocessing"]
        loaded.resolution, loaded.crop_ratio = shown["resolution"], shown["crop_ratio"]
        loaded.mean, loaded.std = tuple(shown["mean"]), tuple(shown["std"])
        loaded.classes, loaded.name = config["labels"], config["name"]
        for row in config["results"]:
            if (row["resolution"], row["view"]) == (shown["resolution"], "single"):
                loaded.top1, loaded.top1_of = row["top1"], "measured by its run"
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} beside the weights cannot be read: {error!r}; move it away to do without it") from None
