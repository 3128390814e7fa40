"""tools/check_data.py: what is wrong with the data is named, by a network made here, and nothing where it is well."""

import functools
import http.server
import json
import os
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional
from torchvision import models
from torchvision.transforms.v2 import functional as transforms

import tools.check_data as tool
from rn50.augment import IMAGENET_MEAN, IMAGENET_STD, normalize
from rn50.data import beton, diagnosis, imagenet
from rn50.data.encode import encode_image
from rn50.data.writer import LadderWriter
from rn50.errors import RunError, UsageError
from rn50.files import sha256
from rn50.metrics import renamed_classes
from rn50.model import build_model
from rn50.publishing import pretrained
from tests import tiny_model

PX, SIDE, PER_CLASS = 32, 64, {"train": 48, "val": 40}
COLOURS = {"red": (200, 60, 60), "green": (60, 180, 60), "blue": (60, 60, 200), "yellow": (190, 180, 50)}
SHAPES = ("lying stripes", "standing stripes", "dark above")
CLASSES = [
    {"wnid": f"n{k:08d}", "name": f"{c}, {s}"} for k, (c, s) in enumerate((c, s) for c in COLOURS for s in SHAPES)
]
CATEGORIES = models.ResNet50_Weights.IMAGENET1K_V1.meta["categories"]


def picture(label, rng):
    """uint8 [h, w, 3]: a colour, and something that has a direction."""
    high, wide = (48, SIDE) if rng.random() < 0.7 else (SIDE, 48)
    y, x = np.mgrid[:high, :wide]
    colour = np.array(list(COLOURS.values())[label // len(SHAPES)]) * (1 + rng.normal(0, 0.1)) + rng.normal(0, 15, 3)
    stripes = 1 + 0.4 * np.sin((x if label % len(SHAPES) else y) * rng.uniform(0.4, 0.6) + rng.uniform(0, 6))
    tone = 0.2 + 0.8 * y / high if label % len(SHAPES) == 2 else stripes
    return (tone[..., None] * colour + rng.normal(0, 8, (high, wide, 3))).clip(0, 255).astype(np.uint8)


@functools.cache
def pictures(split):
    """(pictures, labels) of a split."""
    rng = np.random.default_rng(len(split))
    labels = rng.permutation(np.repeat(np.arange(len(CLASSES)), PER_CLASS[split]))
    return [picture(label, rng) for label in labels], labels


def write(folder, *, change=None, labels=None, side=SIDE, splits=("val",), data=pictures, classes=CLASSES):
    """{split}_{side}.beton in `folder`. change(picture, number): what is stored; labels: in place of the right ones.

    data: a function like `pictures`.
    """
    folder.mkdir(exist_ok=True)
    for split in splits:
        images, right = data(split)
        path = folder / f"{split}_{side}.beton"
        for old in folder.glob(f"{split}_*"):
            old.unlink()
        writer = LadderWriter(paths={side: path}, journal=folder / "journal", capacity=len(images), fingerprint=[])
        for number, image in enumerate(images):
            image = np.ascontiguousarray(change(image, number) if change else image)
            stored = (beton.JPG, image.shape[1], image.shape[0], encode_image(image, 90))
            writer.add(label=int((right if labels is None else labels)[number]), pictures={side: stored})
        writer.finish({side: {"classes": classes, "settings": {"max_side": side}, "split": split}})
    return folder


def seen(image):
    """A picture as torchvision's transforms show it, without a beton: uint8 [3, PX, PX]."""
    resized = transforms.resize(Image.fromarray(image), round(PX / 0.875), antialias=True)
    return torch.from_numpy(np.array(transforms.center_crop(resized, PX))).permute(2, 0, 1)


def train(mean, std):
    """(resnet18 whose classifier is fitted to the pictures of train, top-1 on those of val in %)."""
    torch.manual_seed(0)
    network = build_model(arch="resnet18", num_classes=len(CLASSES))
    shown = {}
    for split in PER_CLASS:
        images, _ = pictures(split)
        shown[split] = normalize(torch.stack([seen(image) for image in images]), mean=mean, std=std)
    targets = functional.one_hot(torch.from_numpy(pictures("train")[1])).float()
    network.load_state_dict(tiny_model.fit_classifier(network, shown["train"], targets))
    with torch.inference_mode():
        answers = network(shown["val"]).argmax(1).numpy()
    return network, 100 * (answers == pictures("val")[1]).mean()


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """(file of the weights of a network that knows the pictures, its top-1 in %)."""
    network, top1 = train(IMAGENET_MEAN, IMAGENET_STD)
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path, top1


@pytest.fixture
def check(known, monkeypatch, capsys, tmp_path):
    """check(folder, *arguments): (lines that the command printed, its --json, its error or None)."""

    def check(folder, *arguments, weights=None, top1=None, train=False):
        argv = ["check_data.py", "--data", folder, "--weights", weights or known[0], "--json", tmp_path / "out.json"]
        argv += ["--resolution", PX, "--crop-ratio", 0.875, "--expect", top1 or known[1], *arguments]
        argv += ["--training.device=cpu", "--data.workers=1"] + ([] if train else ["--train-images", 0])
        monkeypatch.setattr(sys, "argv", [str(word) for word in argv])
        (tmp_path / "out.json").unlink(missing_ok=True)
        error = None
        try:
            tool.main()
        except RunError as caught:
            error = str(caught)
        assert (tmp_path / "out.json").exists(), error
        return capsys.readouterr().out.splitlines(), json.loads((tmp_path / "out.json").read_text()), error

    return check


def causes(report):
    return [found["cause"] for found in report["causes"]]


def test_a_good_set_is_found_good(check, known, tmp_path):
    """And the figure is that of torchvision's own transforms of the pictures, but for what JPEG changes."""
    folder = write(tmp_path / "good", splits=("val", "train"))
    lines, report, error = check(folder, "--budget.dollars_per_hour=3600", "--images", 240, train=True)
    assert error is None
    assert lines[-1].startswith("ok: ")
    assert report["ok"]
    assert report["causes"] == []
    assert report["splits"]["val"]["figures"]["images"] == 240
    assert "240 of 480 images" in lines[1]
    assert "cents)" in lines[1]
    assert report["splits"]["val"]["figures"]["top1"] == pytest.approx(known[1], abs=1.5)
    assert {row["verdict"] for row in report["splits"].values()} == {"ok"}


def test_labels_in_another_order_are_named(check, tmp_path):
    right = pictures("val")[1]
    count = len(CLASSES)
    orders = {
        "each label is one too large": (np.arange(count) - 1) % count,
        "folders that are numbers, sorted as text: 0, 1, 10": np.array(sorted(range(count), key=str)),
        "sorted by name": np.argsort([c["name"] for c in CLASSES]),
    }
    for said, held in orders.items():
        lines, report, error = check(write(tmp_path / "data", labels=np.argsort(held)[right]))
        assert error.endswith("likely cause: labels permuted"), said
        text = report["causes"][0]["text"]
        first = int(np.flatnonzero(held != np.arange(count))[0])
        names = [f"{CLASSES[k]['wnid']} {CLASSES[k]['name']}" for k in (first, held[first])]
        assert f"({said}" in text
        assert f": label {first} ({names[0]}) holds pictures of {names[1]}, " in text
        assert "one to one" in text
        assert f"likely cause: {text}" in lines


def test_labels_at_random_are_guessing(check, tmp_path):
    labels = np.random.default_rng(1).permutation(pictures("val")[1])
    assert causes(check(write(tmp_path / "random", labels=labels))[1]) == ["guessing"]


def test_classes_under_other_labels_are_named_in_their_split(check, tmp_path):
    """Two that are exchanged; one whose pictures are another's, which has its own too; and one that is mixed."""
    right = pictures("train")[1]
    exchanged = np.where(right == 2, 5, np.where(right == 5, 2, right))
    others = [image for image, label in zip(*pictures("train"), strict=True) if label == 7]
    draw = np.random.default_rng(0).random(len(right))

    def replaced(share):
        def change(image, number):
            return others[number % len(others)] if right[number] == 4 and draw[number] < share else image

        return change

    folder = write(tmp_path / "data")
    for fault, cause, labels, text in (
        ({"labels": exchanged}, "class under another label", (2, 5), "are exchanged"),
        ({"change": replaced(1.0)}, "class under another label", (4, 7), "holds pictures of"),
        ({"change": replaced(0.7)}, "class mixed", (4, 7), "sampled pictures are recognised, 100 % of"),
        ({"labels": np.where((right == 4) & (draw < 0.85), 7, right)}, "class mixed", (7, 4), "% are called n00000004"),
    ):
        write(folder, splits=("train",), **fault)
        _, report, error = check(folder, train=True)
        assert cause in causes(report), report
        said = report["causes"][causes(report).index(cause)]["text"]
        assert said.startswith("train: ")
        assert text in said
        assert all(f"{CLASSES[label]['wnid']} {CLASSES[label]['name']}" in said for label in labels)
        assert not any(found["text"].startswith("val") for found in report["causes"])
        assert cause in error


@pytest.mark.parametrize(
    ("change", "cause", "text"),
    [
        (lambda image, number: image[:, :, ::-1], "channels", "red and blue are exchanged"),
        (lambda image, number: image[::-1, ::-1], "orientation", "stand on their heads"),
        (lambda image, number: np.rot90(image), "orientation", "lie on their left side"),
        (lambda image, number: np.rot90(image, -1), "orientation", "lie on their right side"),
        (lambda image, number: np.full_like(image, 90) if number % 10 == 3 else image, "blank pictures", "48 of 480"),
        (lambda image, number: pictures("val")[0][0] if number % 10 == 3 else image, "copies", "49 times"),
        (lambda image, number: image.mean(2, keepdims=True).repeat(3, 2).astype(np.uint8), "grey pictures", "100 %"),
    ],
    ids=["bgr", "upside_down", "left", "right", "blank", "copies", "grey"],
)
def test_pictures_that_are_not_what_they_should_be(check, tmp_path, change, cause, text):
    _, report, error = check(write(tmp_path / "data", change=change))
    assert cause in causes(report), report
    assert text in report["causes"][causes(report).index(cause)]["text"]
    assert cause in error


def test_weights_of_another_normalisation_are_told_from_wrong_data(check, tmp_path):
    network, top1 = train((0.0,) * 3, (255.0,) * 3)
    torch.save(network.state_dict(), tmp_path / "other.pth")
    folder = write(tmp_path / "data")
    _, report, _ = check(folder, weights=tmp_path / "other.pth", top1=top1)
    assert causes(report) == ["normalisation"]
    assert "pixels of 0 to 1:" in report["causes"][0]["text"]
    # where a file beside the weights says what they need, they are shown it
    config = {"input_size": [3, PX, PX], "crop_pct": 0.875, "mean": [0, 0, 0], "std": [1, 1, 1]}
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet18", "pretrained_cfg": config}))
    _, report, error = check(folder, weights=tmp_path / "other.pth", top1=top1)
    assert error is None
    assert report["splits"]["val"]["figures"]["top1"] == pytest.approx(top1, abs=1.5)


def test_files_of_the_wrong_size_are_named(check, tmp_path):
    folder = write(tmp_path / "named")
    for suffix in ("beton", "json"):
        (folder / f"val_{SIDE}.{suffix}").rename(folder / f"val_{2 * SIDE}.{suffix}")
    with pytest.raises(AssertionError, match=f"val_{2 * SIDE}.beton holds images of val of at most {SIDE} pixels"):
        check(folder)
    (folder / f"val_{2 * SIDE}.json").unlink()  # of stock FFCV's files nothing says what they were written for
    lines, report, error = check(folder)
    assert error is None
    notes = [line for line in lines if line.startswith("note: ")]
    assert notes[0].endswith(f"no picture in it is larger than {SIDE} px")

    (folder / f"val_{2 * SIDE}.beton").rename(folder / f"val_{SIDE // 2}.beton")
    _, report, _ = check(folder)
    assert causes(report) == ["wrong rung"]
    assert report["causes"][0]["text"].endswith(f"named for {SIDE // 2} px and holds pictures of up to {SIDE} px")

    def small(image, number):
        return np.array(Image.fromarray(image).resize((12, 12)))

    _, report, _ = check(write(tmp_path / "small", change=small))
    assert {"too small", "squares"} <= set(causes(report))


def test_a_damaged_picture_is_named(check, tmp_path):
    folder = write(tmp_path / "data")
    info = beton.read_info(folder / f"val_{SIDE}.beton")
    with open(info.path, "r+b") as file:
        file.seek(int(info.data_ptrs[17]) + 300)
        file.write(b"\xff" * 200)
    _, report, error = check(folder)
    assert causes(report) == ["damaged"]
    assert "sample 17 " in report["causes"][0]["text"]
    assert f"tools/verify_beton.py {info.path}" in report["causes"][0]["text"]
    assert report["splits"]["val"]["figures"] is None
    assert "not measured" in error


def test_more_than_was_published_and_classes_of_others(check, tmp_path):
    folder = write(tmp_path / "data")
    assert causes(check(folder, top1=80)[1]) == ["training pictures"]
    torch.save(build_model(arch="resnet18", num_classes=20).state_dict(), tmp_path / "twenty.pth")
    with pytest.raises(AssertionError, match="the data has 12 classes and the weights 20"):
        check(folder, weights=tmp_path / "twenty.pth")


@pytest.mark.skipif("IMAGENETTE_DIR" not in os.environ, reason="IMAGENETTE_DIR names no photographs")
def test_photographs_of_ten_of_a_thousand_classes_meet_their_outputs(check, tmp_path, monkeypatch):
    classes = [{"wnid": wnid, "name": name} for wnid, name in sorted(imagenet.IMAGENETTE_NAMES.items())]
    files = [sorted(Path(os.environ["IMAGENETTE_DIR"], "val", c["wnid"]).iterdir())[:6] for c in classes]
    photographs = [np.asarray(Image.open(path).convert("RGB")) for row in files for path in row]
    labels = np.repeat(np.arange(10), 6)
    network = models.resnet18(weights=None)
    with torch.no_grad():
        network.fc.weight.zero_()
        network.fc.bias.zero_()
        network.fc.bias[701] = 1  # the answer to all: parachute
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    folder = write(tmp_path / "data", side=224, data=lambda split: (photographs, labels), classes=classes)
    lines, report, _ = check(folder, weights=tmp_path / "weights.pth", top1=69.76)
    assert report["splits"]["val"]["figures"]["top1"] == pytest.approx(10)
    assert causes(report)[0] == "guessing"
    # the published figure is of a thousand classes
    monkeypatch.setattr(sys, "argv", [word for word in sys.argv if word not in ("--expect", "69.76")])
    with pytest.raises(RunError, match="likely cause: guessing"):
        tool.main()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", 0], "at least 1"),
        (["--expect", 0.7613], "in %"),
        (["--resolution", 8], "at least 16"),
        (["--crop-ratio", 87.5], "0.1 to 1"),
        (["--images", "some"], None),
    ],
)
def test_refusals(check, tmp_path, arguments, message):
    with pytest.raises((UsageError, SystemExit), match=message):
        check(tmp_path, *arguments)


# --- Weights ---------------------------------------------------------------------------------------------------------


class BlurPool(nn.Module):
    """What ffcv-imagenet puts around strided convolutions, written anew after its description."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv
        row = torch.tensor([[[[1, 2, 1], [2, 4, 2], [1, 2, 1]]]]) / 16.0
        self.register_buffer("blur_filter", row.repeat(conv.in_channels, 1, 1, 1))

    def forward(self, x):
        return self.conv(functional.conv2d(x, self.blur_filter, padding=1, groups=self.conv.in_channels))


def blurred(module):
    for name, child in module.named_children():
        if isinstance(child, nn.Conv2d) and max(child.stride) > 1 and child.in_channels >= 16:
            setattr(module, name, BlurPool(child))
        else:
            blurred(child)
    return module


def random_network(arch):
    """torchvision's own, with BatchNorm that is not the identity."""
    torch.manual_seed(1)
    network = getattr(models, arch)(weights=None, num_classes=7)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.data.uniform_(0.2, 0.6)
    return network.eval()


def prefixed(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def test_weights_of_other_programs_give_the_same_outputs(tmp_path):
    images = torch.randn(2, 3, 64, 64)
    for arch in ("resnet18", "resnet50"):
        network, ffcv = random_network(arch), blurred(random_network(arch))
        plain = network.state_dict()
        forms = {
            "torchvision.pth": (network, plain),
            "imagenet_example.pth.tar": (network, {"epoch": 9, "arch": arch, "state_dict": prefixed("module.", plain)}),
            "compiled.pt": (network, {"model": prefixed("_orig_mod.", plain)}),
            "ffcv.pt": (ffcv, prefixed("module.", ffcv.state_dict())),
            "timm.safetensors": (network, {k: t for k, t in plain.items() if not k.endswith("num_batches_tracked")}),
        }
        for name, (source, content) in forms.items():
            (save_file if name.endswith("safetensors") else torch.save)(content, tmp_path / name)
            loaded = pretrained.load(str(tmp_path / name))
            assert (loaded.arch, loaded.outputs, loaded.top1) == (arch, 7, None)
            with torch.inference_mode():
                assert torch.allclose(loaded.network(images), source(images), atol=1e-4), (arch, name)


def test_a_run_and_its_export_say_what_they_were_measured_at(tiny_checkpoint, exported):
    loaded = [pretrained.load(str(path)) for path in (tiny_checkpoint, exported[0], exported[0] / "model.safetensors")]
    for found in loaded:
        assert (found.arch, found.outputs, found.resolution, found.crop_ratio) == ("resnet18", 10, 64, 0.875)
        assert (found.top1, found.top1_of) == (loaded[0].top1, "measured by its run")
    assert loaded[1].classes[0]["name"] == "bricks"


def test_foreign_files_are_refused_in_one_line(tmp_path):
    torch.save({"cls_token": torch.zeros(1), "blocks.0.attn.qkv.weight": torch.zeros(1)}, tmp_path / "vit.pth")
    torch.save(nn.Linear(1, 1), tmp_path / "module.pth")
    (tmp_path / "text.pth").write_text("<html>")
    (tmp_path / "text.safetensors").write_text("<html>")
    torch.save({"half": torch.zeros(3)}, tmp_path / "resnet18-f37072fd.pth")
    wide = random_network("resnet50").state_dict()
    torch.save(wide | {"layer1.0.conv2.weight": torch.zeros(128, 64, 3, 3)}, tmp_path / "wide.pth")
    torch.save(wide | {"fc.bias": torch.full((7,), torch.nan)}, tmp_path / "nan.pth")
    for name, said in {
        "vit.pth": "it has 2 names: blocks.0.attn.qkv.weight, cls_token",
        "module.pth": "it is a pickled module",
        "text.pth": "it is a web page",
        "text.safetensors": "it is a web page",
        "nan.pth": "weights that are not finite .fc.bias.",
        "resnet18-f37072fd.pth": "its checksum is another; download it again",
        "wide.pth": "the weights are not resnet50's: size mismatch for layer1.0.conv2.weight",
    }.items():
        with pytest.raises(RunError, match=said) as error:
            pretrained.load(str(tmp_path / name))
        assert name in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match="ResNet50_Weights.IMAGENET1K_V1"):
        pretrained.load(str(tmp_path / "none.pth"))


def test_published_figures_are_torchvisions():
    listed = pretrained.torchvision_weights()
    assert pretrained.default_name("resnet50") == "ResNet50_Weights.IMAGENET1K_V1"
    assert listed["ResNet50_Weights.IMAGENET1K_V1"].meta["_metrics"]["ImageNet-1K"]["acc@1"] == 76.13
    assert {pretrained.default_name(arch) for arch in pretrained.ARCHITECTURES} <= set(listed)
    random = models.resnet50(weights=None).state_dict()
    for version, top1, short in ((1, 76.13, 256), (2, 80.858, 232)):
        loaded = pretrained.published(listed[f"ResNet50_Weights.IMAGENET1K_V{version}"], random)
        assert (loaded.top1, loaded.resolution, round(loaded.resolution / loaded.crop_ratio)) == (top1, 224, short)
        assert loaded.mean == pytest.approx(IMAGENET_MEAN)
        assert loaded.outputs == 1000


def test_weights_are_downloaded_once_and_their_hash_is_checked(tmp_path, monkeypatch):
    """By torch.hub's own function, from a server here in the place of torchvision's."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    served = tmp_path / "served"
    served.mkdir()
    torch.save(nn.Linear(2, 2).state_dict(), served / "net-00000000.pth")
    right = f"net-{sha256(served / 'net-00000000.pth')[:8]}.pth"
    (served / right).write_bytes((served / "net-00000000.pth").read_bytes())
    handler = functools.partial(Quiet, directory=served)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert set(pretrained.download(f"{url}/{right}")) == {"weight", "bias"}
        for name, why in (("net-00000000.pth", "invalid hash"), ("none-12345678.pth", "404")):
            with pytest.raises(RunError, match=f"{why}.*get {url}/{name} elsewhere .*--weights FILE"):
                pretrained.download(f"{url}/{name}")
        server.shutdown()
    with pytest.raises(RunError, match="cannot download the weights .*refused"):
        pretrained.download(f"{url}/net-12121212.pth")
    assert set(pretrained.download(f"{url}/{right}")) == {"weight", "bias"}, "from the cache"


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


# --- What follows from counts ----------------------------------------------------------------------------------------


def nature(rng, accuracy=0.76, classes=1000):
    """Shares [classes, classes] of the answers to each class: of very different difficulty, most with a twin."""
    every = np.arange(classes)
    right = rng.beta(4 * accuracy, 4 * (1 - accuracy), classes).clip(0.16, 1)
    twins = rng.beta(2, 3, classes)
    shares = np.zeros((classes, classes))
    shares[every, every] = right
    np.add.at(shares, (every, rng.integers(0, classes, classes)), (1 - right) * twins)
    for _ in range(10):
        np.add.at(shares, (every, rng.integers(0, classes, classes)), (1 - right) * (1 - twins) / 10)
    return shares / shares.sum(1, keepdims=True)


def found_in(rng, change=lambda val, train: None):
    """What the tool would find in 5 images of each of 1,000 classes and its closer look: a list of causes."""
    val = nature(rng)
    train = (val + np.eye(len(val))) / 2  # half of the errors: it has learned from these
    change(val, train)
    shares = {"val": val, "train": train}
    counts = {split: np.stack([rng.multinomial(5, row) for row in rows]) for split, rows in shares.items()}
    closer = np.unique(np.concatenate([diagnosis.suspects(found) for found in counts.values()]))
    assert len(closer) < 200
    for split, rows in shares.items():
        for label in closer:
            counts[split][label] += rng.multinomial(45, rows[label])
    causes = []
    for split, other in (("val", "train"), ("train", "val")):
        words = {"split": split, "describe": str, "called": str}
        renamed = renamed_classes(torch.from_numpy(counts[split]))
        causes += diagnosis.class_causes(counts[split], renamed, other=counts[other], learned=split == "train", **words)
        assert diagnosis.order_cause(counts[split], CATEGORIES, **words) is None
    return causes


def test_among_a_thousand_classes_a_good_set_is_not_accused_and_one_class_is_found():
    """Although top-1 hardly moves."""

    def exchange(val, train):
        val[[3, 7]] = val[[7, 3]]

    def copy(val, train):
        train[3] = train[7]

    def mix(val, train):
        train[3] = 0.15 * train[3] + 0.85 * train[7]

    assert [found_in(np.random.default_rng(seed)) for seed in range(6)] == [[]] * 6
    for change, split, often in ((exchange, "val: ", 5), (copy, "train: ", 6), (mix, "train: ", 4)):
        found = [found_in(np.random.default_rng(seed), change) for seed in range(6)]
        named = [any(row["text"].startswith(split) and "3" in row["text"] for row in rows) for rows in found]
        assert sum(named) >= often, (change, found)
        assert sum(map(len, found)) <= 7, (change, found)


def test_orders_of_imagenet_are_recognised():
    rng = np.random.default_rng(0)
    shares = nature(rng)
    ids = [CATEGORIES.index(name) for name in diagnosis.ILSVRC_IDS]
    ids += [k for k in rng.permutation(1000) if k not in ids]
    for order, said in (
        (np.argsort(CATEGORIES), "sorted by name"),
        (sorted(range(1000), key=str), "numbers, sorted as text: 0, 1, 10, 100"),
        (sorted(range(1000), key=lambda k: str(k + 1)), "numbers from 1, sorted as text"),
        (ids, "ILSVRC2012_ID"),
        (rng.permutation(1000), "labels are permuted: "),
    ):
        counts = np.stack([rng.multinomial(5, row) for row in shares[np.asarray(order)]])
        words = {"split": "val", "describe": str, "called": lambda k: CATEGORIES[k]}
        assert said in diagnosis.order_cause(counts, CATEGORIES, **words)["text"]
    same_answer = np.zeros((1000, 1000), np.int64)
    same_answer[:, 5] = 5
    assert diagnosis.order_cause(same_answer, CATEGORIES, **words) is None
    assert diagnosis.class_causes(10 * same_answer, [], **words) == []


def test_a_sample_has_the_same_share_of_every_class_from_its_beginning():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(100), [20] * 50 + [40] * 50))
    samples = diagnosis.sample(labels, 600)
    assert len(set(samples)) == 600
    for first in (300, 600):
        counts = np.bincount(labels[samples[:first]])
        assert np.abs(counts - np.repeat([first / 150, first / 75], 50)).max() <= 1
    assert sorted(diagnosis.sample(labels, 10**6)) == list(range(len(labels)))
    more = diagnosis.more_of(labels, [3, 60], without=samples)
    assert not set(more) & set(samples)
    assert np.bincount(labels[np.concatenate([samples, more])])[[3, 60]].tolist() == [20, 40]


def test_labels_and_outputs_are_brought_together(monkeypatch):
    known = [{"name": name} for name in CATEGORIES]
    imagenette = [{"wnid": wnid, "name": name} for wnid, name in imagenet.IMAGENETTE_NAMES.items()]
    columns, said = diagnosis.columns(imagenette, 10, outputs=1000, known=known)
    assert said
    assert columns.tolist() == [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]  # Imagenette's indices in ImageNet
    known[517]["name"] = known[134]["name"] = "crane"
    for unclear in ("crane", "n02012849"):
        with pytest.raises(RunError, match="the data has 1 classes and the weights 1000"):
            diagnosis.columns([{"wnid": "n02012849", "name": unclear}], 1, outputs=1000, known=known)
    wnids = [f"n{k:08d}" for k in np.random.default_rng(0).permutation(1000)]
    monkeypatch.setattr(diagnosis, "is_imagenet", lambda given: given == sorted(wnids))
    columns, said = diagnosis.columns([{"wnid": w, "name": w} for w in wnids], 1000, outputs=1000, known=known)
    assert said
    assert [f"n{k:08d}" for k in columns] == wnids
