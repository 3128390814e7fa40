"""The app's decoding and preprocessing: what torchvision's evaluation makes of the same bytes, or a clear sentence."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as transforms

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "app"))
import inference


def picture(width=120, height=90, seed=0):
    """Smooth colours with something in every corner."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (333, 500), (224, 224), (256, 300), (97, 401), (40, 60)])
@pytest.mark.parametrize(("resolution", "ratio"), [(224, 0.875), (64, 1.0), (97, 0.9)])
def test_resize_and_crop_are_torchvisions(size, resolution, ratio):
    image = picture(*size)
    resized = transforms.resize(image, [round(resolution / ratio)], antialias=True)
    expected = transforms.center_crop(resized, [resolution, resolution])
    ours = inference.resize_and_crop(image, resolution=resolution, crop_ratio=ratio)
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(expected))


def test_the_middle_of_a_panorama_is_seen_as_if_all_of_it_had_been_resized():
    image = picture(2400, 40)
    expected = transforms.center_crop(transforms.resize(image, [73], antialias=True), [64, 64])
    ours = inference.resize_and_crop(image, resolution=64, crop_ratio=0.875)
    difference = np.abs(np.asarray(ours).astype(int) - np.asarray(expected))
    assert difference.max() <= 2
    # and a line of pixels does not become gigabytes
    assert inference.resize_and_crop(picture(30000, 1), resolution=64, crop_ratio=0.875).size == (64, 64)


def test_colour_modes_come_out_as_the_picture_they_show():
    image = picture()
    pixels = np.asarray(image).astype(int)

    def close(data, tolerance, against=pixels):
        got = np.asarray(inference.decode_image(data)).astype(int)
        assert got.shape == against.shape
        assert np.abs(got - against).mean() < tolerance

    close(encoded(image, "PNG"), 0.01)
    close(encoded(image, "BMP"), 0.01)
    close(encoded(image, "TIFF"), 0.01)
    close(encoded(image, "WEBP", lossless=True), 0.01)
    close(encoded(image, "JPEG", quality=95), 4)
    close(encoded(image.convert("CMYK"), "JPEG", quality=95), 4)
    close(encoded(image.convert("RGBA"), "PNG"), 0.01)
    close(encoded(image.quantize(256), "GIF"), 8)
    gray = np.asarray(image.convert("L"))
    sixteen = Image.fromarray(gray.astype(np.uint16) * 257)
    for kind in ("PNG", "TIFF"):
        close(encoded(sixteen, kind), 1, against=np.repeat(gray[:, :, None], 3, 2).astype(int))


def test_transparency_shows_white():
    clear = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    assert np.asarray(inference.decode_image(encoded(clear, "PNG"))).min() == 255
    palette = Image.new("P", (40, 40), 0)
    assert np.asarray(inference.decode_image(encoded(palette, "PNG", transparency=0))).min() == 255


def test_of_an_animation_the_first_frame_is_taken():
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue", "green")]
    for kind in ("GIF", "WEBP", "PNG"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        red, green, blue = np.asarray(inference.decode_image(data))[20, 20]
        assert red > 240
        assert max(green, blue) < 20


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation):
    upright = picture(60, 40)
    back = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]
    stored = upright if back is None else upright.transpose(back)
    exif = Image.Exif()
    exif[0x0112] = orientation
    got = inference.decode_image(encoded(stored, "PNG", exif=exif))
    np.testing.assert_array_equal(np.asarray(got), np.asarray(upright))


JPEG = encoded(picture(400, 300), "JPEG")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (b"just text\n", "not a picture in a format known here"),
        (b"%PDF-1.7 \n", "not a picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not a picture"),
        (JPEG[: len(JPEG) // 2], "cut off"),
        (JPEG[:30], "not a picture|damaged|cut off"),
        (encoded(picture(), "PNG")[:200], "cut off|damaged"),
        (encoded(Image.new("1", (12000, 12000)), "PNG"), "144 megapixels; at most 40"),
        (encoded(Image.new("1", (60000, 60000)), "TIFF", compression="group4"), "3600 megapixels"),
        (encoded(Image.new("L", (9000, 9000)), "JPEG", progressive=True, quality=5), "81 megapixels"),
        (encoded(Image.fromarray(np.ones((9, 9), np.float32)), "TIFF"), "floating-point"),
        (b"\xff\xd8" + bytes(inference.MAX_BYTES), "larger than 20 MB"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value,
)
def test_what_cannot_be_shown_is_one_clear_sentence(data, words):
    with pytest.raises(inference.UnreadableImage, match=words) as problem:
        inference.decode_image(data)
    message = str(problem.value)
    assert message[0].isupper()
    assert message.endswith(".")
    assert not {"/", "<", "0x", "Traceback"} & set(message.split())


def test_a_100_megapixel_jpeg_is_answered_in_little_memory():
    code = (
        "import io, resource, sys; sys.path.insert(0, 'app'); import inference\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "shown = inference.decode_image(open(sys.argv[1], 'rb').read())\n"
        "print(*shown.size, *shown.getpixel((10, 10)), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=".jpg") as file:
        Image.new("RGB", (11000, 10000), (200, 30, 60)).save(file.name, quality=30)
        done = subprocess.run(
            [sys.executable, "-c", code, file.name], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
        )
    width, height, red, green, blue, kib = map(int, done.stdout.split())
    assert (width, height) == (5500, 5000)
    assert np.abs(np.array([red, green, blue]) - (200, 30, 60)).max() < 4
    assert kib < 200 * 1024  # all of it would take 330 MB


def test_probabilities_and_maps(exported):
    model = inference.Classifier(exported[0], file="model.onnx")
    prediction = model.predict(encoded(picture(), "PNG"))
    logits = torch.from_numpy(prediction.logits)
    np.testing.assert_allclose(prediction.probabilities, logits.softmax(0).numpy(), atol=1e-6)
    assert prediction.top(10) == logits.argsort(descending=True).tolist()
    maps = model.activation_maps(prediction.features)
    assert maps.shape == (10, 2, 2)
    np.testing.assert_allclose(maps.reshape(10, -1).max(1), 1, atol=1e-5)
    np.testing.assert_allclose(maps.reshape(10, -1).min(1), 0, atol=1e-5)
    np.testing.assert_allclose(model.activation_maps(prediction.features, [3])[0], maps[3], atol=1e-5)
    assert prediction.shown.size == (79, 79)  # 64/73 of the 90 rows, not enlarged


def test_a_network_trained_with_a_sigmoid_for_each_class_gives_those(exported, tmp_path):
    config = json.loads((exported[0] / "config.json").read_text()) | {"activation": "sigmoid", "network": "model.onnx"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.onnx").symlink_to(exported[0] / "model.onnx")
    prediction = inference.Classifier(tmp_path).predict(encoded(picture(), "PNG"))
    np.testing.assert_allclose(prediction.probabilities, 1 / (1 + np.exp(-prediction.logits)), atol=1e-6)


def test_classes_of_one_name_are_told_apart():
    labels = [{"wnid": f"n0{k}", "name": name} for k, name in enumerate(["crane", "kite", "crane", "sea_snake"])]
    assert inference.display_names(labels) == ["crane (n00)", "kite", "crane (n02)", "sea snake"]


def test_a_folder_that_is_no_model_is_said_to_be_none(tmp_path, exported):
    with pytest.raises(inference.BadModel, match="no config.json"):
        inference.Classifier(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(inference.BadModel, match="cannot be read"):
        inference.Classifier(tmp_path)
    (tmp_path / "config.json").write_text('{"format": 99}')
    with pytest.raises(inference.BadModel, match="not of format 1"):
        inference.Classifier(tmp_path)
    config = json.loads((exported[0] / "config.json").read_text()) | {"network": "model.onnx"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(inference.BadModel, match="missing or damaged"):
        inference.Classifier(tmp_path)
    (tmp_path / "model.onnx").write_bytes((exported[0] / "model.onnx").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config | {"labels": config["labels"][1:]}))
    with pytest.raises(inference.BadModel, match="gives 10 classes, config.json names 9"):
        inference.Classifier(tmp_path)


def test_the_app_imports_nothing_of_the_project_nor_torch():
    import ast

    allowed = {"gradio", "huggingface_hub", "inference", "numpy", "onnxruntime", "PIL"} | sys.stdlib_module_names
    for path in (ROOT / "app").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module]
            assert {name.split(".")[0] for name in names} <= allowed, path
    assert "gradio" not in (ROOT / "app/inference.py").read_text().lower()
