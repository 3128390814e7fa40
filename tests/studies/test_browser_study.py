"""studies/browser: the pictures of every kind are what they say, and the comparisons see what differs."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT

pytest.importorskip("selenium")


@pytest.fixture(scope="module", params=["agreement", "networks"])
def study(request):
    spec = importlib.util.spec_from_file_location(request.param, ROOT / f"studies/browser/{request.param}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("study", ["agreement"], indirect=True)
def test_a_picture_of_each_kind_is_upright_and_still_the_same(study, textures, tmp_path):
    import inference

    paths = sorted(textures.glob("val/*/*.jpg"))[: len(study.KINDS)]
    pictures = study.make_all(paths, tmp_path)
    assert list(pictures.values()) == list(study.KINDS)
    other_shape = ("wide", "very wide", "tall", "tiny", "12 megapixels")
    for path, (file, kind) in zip(paths, pictures.items(), strict=True):
        seen = np.asarray(inference.decode_image(file.read_bytes())).astype(int)
        if kind in other_shape:
            continue
        original = Image.open(path).convert("RGB")
        if "gray" in kind:
            original = original.convert("L").convert("RGB")
        left = slice(seen.shape[1] // 8)  # where what fades to the right is still opaque
        assert seen.shape == np.asarray(original).shape, kind
        near = 25 if kind in ("poor JPEG", "GIF", "animated GIF", "PNG of 256 colours") or "transparency" in kind else 9
        assert np.abs(seen - np.asarray(original))[:, left].mean() < near, kind
        turned = np.asarray(original.transpose(Image.Transpose.ROTATE_180)).astype(int)
        assert np.abs(seen - np.asarray(original)).mean() < np.abs(seen - turned).mean(), kind


@pytest.mark.parametrize("study", ["agreement"], indirect=True)
def test_what_the_pages_show_otherwise_is_seen(study):
    a, b, c, d = (Path(name) for name in "abcd")
    kinds = {a: "PNG", b: "PNG", c: "GIF", d: "GIF"}
    gradio = {a: {0: 0.5, 1: 0.3, 2: 0.1}, b: {0: 0.5, 1: 0.495, 2: 0.004}, c: {0: 0.9, 1: 0.05, 2: 0.02}, d: "cut off"}
    assert study.compare(gradio, gradio, kinds)["within"] == 1
    # b: two that are near change places; c: a class that is not near does; d: seen by one page alone
    browser = gradio | {b: {1: 0.498, 0: 0.497, 2: 0.004}, c: {1: 0.5, 0: 0.45, 2: 0.02}, d: {0: 0.9}}
    found = study.compare(browser, gradio, kinds)
    assert found["within"] == pytest.approx(2 / 3)
    assert found["largest_by_kind"] == pytest.approx({"PNG": 0.003, "GIF": 0.45})
    assert found["other_order"] == ["c"]
    assert found["refused_by_one"] == ["d"]


@pytest.mark.parametrize("study", ["networks"], indirect=True)
def test_how_far_another_form_of_a_network_is_from_float32(study):
    expected = np.array([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.335, 0.333, 0.332]])
    labels = np.array([0, 1, 2])
    same = study.beside(expected, expected, labels)
    assert (same["largest"], same["close"], same["other_five"], same["points"]) == (0, 100, 0, 0)
    other = np.array([[0.6, 0.3, 0.1], [0.45, 0.25, 0.3], [0.332, 0.333, 0.335]])
    found = study.beside(expected, other, labels)
    assert found["largest"] == pytest.approx(0.25)
    assert found["close"] == pytest.approx(200 / 3)
    assert found["other_five"] == 1  # the third's classes were within 0.01 before
    assert found["points"] == pytest.approx(0)  # one lost, one won
