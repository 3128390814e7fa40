"""rn50/data/textures.py: the same files every time, classes that differ in structure and not in colour."""

import os
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from rn50 import errors
from rn50.data import textures
from tests.conftest import ROOT

TRAIN, VAL = 60, 30


def files(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("textures") / "set"
    assert textures.write_textures(root, TRAIN, VAL, seed=0)
    return root


@pytest.fixture(scope="module")
def images(tree):
    """{split: (list of RGB uint8 arrays, int64 labels)}"""
    loaded = {}
    for split in textures.SPLITS:
        paths = sorted((tree / split).glob("*/*.jpg"))
        names = sorted({path.parent.name for path in paths})
        pixels = [np.asarray(Image.open(path)) for path in paths]
        loaded[split] = pixels, torch.tensor([names.index(path.parent.name) for path in paths])
    return loaded


def test_the_tree_is_an_image_folder_of_ten_classes_of_rgb_jpegs(tree):
    for split, count in (("train", TRAIN), ("val", VAL)):
        assert sorted(os.listdir(tree / split)) == sorted(textures.CLASSES)
        assert len(textures.CLASSES) == 10
        for name in textures.CLASSES:
            assert sorted(os.listdir(tree / split / name)) == [f"{index:04d}.jpg" for index in range(count)]
    with Image.open(tree / "train" / "dots" / "0000.jpg") as image:
        assert (image.format, image.mode) == ("JPEG", "RGB")


def test_sizes_and_aspect_ratios_vary(images):
    sizes = np.array([image.shape[:2] for image in images["train"][0]])
    ratios = sizes[:, 1] / sizes[:, 0]
    assert sizes.min() >= 112
    assert sizes.max() <= 288
    assert len(np.unique(sizes, axis=0)) > len(sizes) / 2
    assert ratios.min() < 0.75
    assert ratios.max() > 1.33


def test_train_and_val_share_no_image(tree):
    content = list(files(tree).values())
    assert len(set(content)) == len(content)


def test_bytes_depend_on_the_seed_alone_and_not_on_order_or_count(tree, tmp_path):
    script = (
        "import sys; from rn50.data import textures\n"
        "for name in reversed(textures.CLASSES):\n"
        "    for split in ('val', 'train'):\n"
        "        sys.stdout.buffer.write(textures.jpeg_bytes(0, split, name, 2))\n"
    )
    fresh = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, check=True, timeout=120
    ).stdout
    stored = [tree / split / name / "0002.jpg" for name in reversed(textures.CLASSES) for split in ("val", "train")]
    assert fresh == b"".join(path.read_bytes() for path in stored)

    textures.write_textures(tmp_path / "small", 2, 1, seed=0)
    whole = files(tree)
    small = files(tmp_path / "small")
    del small["textures.json"]
    assert small == {name: whole[name] for name in small}

    assert textures.jpeg_bytes(1, "train", "dots", 0) != textures.jpeg_bytes(0, "train", "dots", 0)


def test_writing_again_changes_nothing(tmp_path):
    root = tmp_path / "set"
    assert textures.write_textures(root, 1, 1)
    times = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert not textures.write_textures(root, 1, 1)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == times


@pytest.mark.parametrize("other", [(2, 1, 0), (1, 2, 0), (1, 1, 1)])
def test_another_set_is_never_overwritten(tmp_path, other):
    root = tmp_path / "set"
    textures.write_textures(root, 1, 1, seed=0)
    before = files(root)
    with pytest.raises(errors.RunError, match="not this set"):
        textures.write_textures(root, *other)
    assert files(root) == before


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"mine")
    with pytest.raises(errors.RunError, match="not this set"):
        textures.write_textures(tmp_path, 1, 1)
    assert os.listdir(tmp_path) == ["holiday.jpg"]


def test_an_interrupted_write_leaves_no_tree_and_the_next_one_is_whole(tmp_path, monkeypatch):
    root, real, calls = tmp_path / "set", textures.jpeg_bytes, []

    def stop_midway(*args):
        calls.append(args)
        if len(calls) == 13:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(textures, "jpeg_bytes", stop_midway)
    with pytest.raises(KeyboardInterrupt):
        textures.write_textures(root, 1, 1)
    assert not root.exists()
    monkeypatch.setattr(textures, "jpeg_bytes", real)
    textures.write_textures(root, 1, 1)
    textures.write_textures(tmp_path / "undisturbed", 1, 1)
    assert files(root) == files(tmp_path / "undisturbed")
    assert sorted(os.listdir(tmp_path)) == ["set", "undisturbed"]


def test_the_command_writes_the_same_set_and_says_so(tmp_path, capsys):
    textures.main([str(tmp_path / "set"), "--train-per-class", "1", "--val-per-class", "1"])
    assert "20 images, written" in capsys.readouterr().out
    textures.main([str(tmp_path / "set"), "--train-per-class", "1", "--val-per-class", "1"])
    assert "there already" in capsys.readouterr().out
    with pytest.raises(errors.UsageError):
        textures.main([str(tmp_path / "set"), "--train-per-class", "0"])


def test_a_linear_classifier_on_colour_histograms_fails(images):
    def channel_histograms(image):
        return np.concatenate([np.bincount(image[..., c].ravel() // 8, minlength=32) for c in range(3)])

    def joint_histogram(image):
        cells = (image // 32).astype(int) @ (64, 8, 1)
        return np.bincount(cells.ravel(), minlength=512)

    for features in (channel_histograms, joint_histogram):
        accuracy = linear_accuracy(images, lambda image, f=features: np.sqrt(f(image) / image[..., 0].size))
        assert accuracy < 0.6, features.__name__


def test_a_linear_classifier_on_spectra_succeeds(images):
    """The classes can be told apart at 64 px without colour; this also shows that the classifier above can learn."""

    def spectrum(image):
        side = min(image.shape[:2])
        gray = cv2.resize(cv2.cvtColor(image[:side, :side], cv2.COLOR_RGB2GRAY), (64, 64), interpolation=cv2.INTER_AREA)
        gray = (gray - gray.mean()) / (gray.std() + 1)
        power = np.abs(np.fft.rfft2(gray * np.outer(np.hanning(64), np.hanning(64))))
        return np.log1p(np.fft.fftshift(power, axes=0)[16:48, :16]).ravel()

    assert linear_accuracy(images, spectrum) > 0.7


def linear_accuracy(images, features):
    """Share of the validation images that logistic regression, fitted on the training images, gets right."""
    torch.manual_seed(0)
    inputs = {s: torch.tensor(np.stack([features(i) for i in images[s][0]]), dtype=torch.float32) for s in images}
    mean, spread = inputs["train"].mean(0), inputs["train"].std(0) + 1e-3
    inputs = {split: (values - mean) / spread for split, values in inputs.items()}
    model = torch.nn.Linear(len(mean), len(textures.CLASSES))
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=40, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(model(inputs["train"]), images["train"][1])
        value = value + 0.01 * model.weight.square().sum() / 2
        value.backward()
        return value

    # On so little work a second thread costs more than it saves.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    optimizer.step(loss)
    torch.set_num_threads(threads)
    with torch.inference_mode():
        return (model(inputs["val"]).argmax(1) == images["val"][1]).float().mean().item()
