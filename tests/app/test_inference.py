"""The app's decoding and preprocessing: what torchvision's evaluation makes of the same bytes, or a clear sentence."""

import ast
import io
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as transforms

from tests import bombs, tiny_model
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
    close(encoded(image, "WEBP", lossless=True), 0.01)
    close(encoded(image, "JPEG", quality=95), 4)
    close(encoded(image.convert("CMYK"), "JPEG", quality=95), 4)
    close(encoded(image.convert("RGBA"), "PNG"), 0.01)
    close(encoded(image.quantize(256), "GIF"), 8)
    gray = np.asarray(image.convert("L"))
    sixteen = Image.fromarray(gray.astype(np.uint16) * 257)
    close(encoded(sixteen, "PNG"), 1, against=np.repeat(gray[:, :, None], 3, 2).astype(int))
    half = image.convert("RGBA")
    half.putalpha(128)
    close(encoded(half, "PNG"), 1, against=255 - (255 - pixels) * 128 // 255)


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
        (b"just text\n", "is text, not a picture"),
        (b"\x93NUMPY\x01\0", "not a picture in a format known here"),
        (b"%PDF-1.7 \n", "is a document"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is SVG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not a picture"),
        (JPEG[: len(JPEG) // 2], "cut off"),
        (JPEG[:30], "not a picture|damaged|cut off"),
        (encoded(picture(), "PNG")[:200], "cut off|damaged"),
        # Pillow reads it, and would read gigabytes for some
        (encoded(picture(), "TIFF"), "is TIFF .* export it"),
        (bombs.png(12000), "144 megapixels; at most 40"),
        (bombs.gif(), "4295 megapixels"),
        (bombs.webp(), "268 megapixels"),
        (bombs.jpeg_of_many_scans(40, 101), "too many parts"),
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


def test_a_progressive_jpeg_that_cannot_be_decoded_in_part_is_refused():
    wide = bytearray(encoded(Image.new("L", (64, 64)), "JPEG", progressive=True))
    place = wide.index(b"\xff\xc2") + 5
    wide[place : place + 4] = (9000).to_bytes(2, "big") * 2
    with pytest.raises(inference.UnreadableImage, match="81 megapixels"):
        inference.decode_image(bytes(wide))


def decoded_elsewhere(folder, program, files):
    """[(what came of it, seconds)] of files {name: bytes}, and by how many MiB the memory of that process grew."""
    code = (
        "import resource, sys, time; sys.path.insert(0, 'app'); import inference\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "for path in sys.argv[1:]:\n"
        "    started = time.process_time()\n"
        "    try: shown = inference.decode_image(open(path, 'rb').read()); what = shown.size, shown.getpixel((5, 5))\n"
        "    except inference.UnreadableImage as error: what = str(error)\n"
        "    print((what, time.process_time() - started))\n"
        "print((peak() - before) / 1024)"
    )
    for name, content in files.items():
        (folder / name).write_bytes(content)
    command = [program, "-c", code, *(folder / name for name in files)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    *lines, grown = done.stdout.splitlines()
    return [ast.literal_eval(line) for line in lines], float(grown)


def test_a_100_megapixel_jpeg_is_answered_in_little_memory(tmp_path):
    file = encoded(Image.new("RGB", (11000, 10000), (200, 30, 60)), "JPEG", quality=30)
    ((((size, pixel), _),), mib) = decoded_elsewhere(tmp_path, sys.executable, {"large.jpg": file})
    assert size == (5500, 5000)
    assert np.abs(np.array(pixel) - (200, 30, 60)).max() < 4
    assert mib < 200  # all of it would take 330 MB


def test_the_largest_pictures_take_13_bytes_a_pixel(tmp_path):
    files = {"clear.png": bombs.png(6300, bits=8, colour=6, channels=4), "deep.png": bombs.png(6300, bits=16)}
    ((clear, _), (deep, _)), mib = decoded_elsewhere(tmp_path, sys.executable, files)
    assert (clear, deep) == (((6300, 6300), (255, 255, 255)), ((6300, 6300), (0, 0, 0)))
    assert mib < 1.1 * 13 * 6300**2 / 2**20


def test_metadata_and_comments_take_no_more_than_they_have_bytes(tmp_path):
    """With the Space's own Pillow, which is older than the one here and copies EXIF data for each tag."""
    if not tiny_model.APP_PYTHON.exists():
        pytest.skip("the Space's packages are not installed; run: bash tools/app.sh --install")
    many = bombs.exif(400_000, 2000)
    files = {
        "exif.png": bombs.png_with_exif(many),
        "exif.jpg": bombs.jpeg_with_exif(many),
        "exif.webp": encoded(Image.new("RGB", (16, 16)), "WEBP", exif=many),
        "exif.avif": encoded(Image.new("RGB", (16, 16)), "AVIF", exif=many),
        "comment.gif": bombs.gif_with_comment(6_000_000),
        "remark.gif": bombs.gif_with_comment(60_000),
    }
    outcomes, mib = decoded_elsewhere(tmp_path, tiny_model.APP_PYTHON, files)
    assert [what[0] for what, _ in outcomes[:4]] == [(16, 16)] * 4
    assert outcomes[4][0] == "The file is a picture whose beginning is damaged."
    assert outcomes[5][0][0] == (8, 8)
    assert max(seconds for _, seconds in outcomes) < 1
    assert mib < 60  # 800 for each of the first four, unguarded


def test_probabilities_and_maps(exported):
    model = inference.Classifier(exported[0], file="model.onnx")
    prediction = model.predict(encoded(picture(), "PNG"))
    logits = torch.from_numpy(prediction.logits)
    assert 0.02 < model.temperature < 50
    np.testing.assert_allclose(prediction.probabilities, (logits / model.temperature).softmax(0).numpy(), atol=1e-6)
    assert prediction.top(10) == logits.argsort(descending=True).tolist()
    maps = model.activation_maps(prediction.features)
    assert maps.shape == (10, 2, 2)
    np.testing.assert_allclose(maps.reshape(10, -1).max(1), 1, atol=1e-5)
    np.testing.assert_allclose(maps.reshape(10, -1).min(1), 0, atol=1e-5)
    np.testing.assert_allclose(model.activation_maps(prediction.features, [3])[0], maps[3], atol=1e-5)
    assert prediction.shown.size == (79, 79)  # 64/73 of the 90 rows, not enlarged


def test_it_is_unsure_below_the_models_own_threshold(exported, tmp_path):
    config = json.loads((exported[0] / "config.json").read_text()) | {"network": "model.onnx"}
    (tmp_path / "model.onnx").symlink_to(exported[0] / "model.onnx")
    data, best = encoded(picture(), "PNG"), {}
    for temperature in (1.0, 3.0):
        for least in (0.0, best.get(temperature, 1.0)):
            config["probabilities"] |= {"temperature": temperature, "unsure_below": least}
            (tmp_path / "config.json").write_text(json.dumps(config))
            seen = inference.Classifier(tmp_path).predict(data)
            best[temperature] = float(seen.probabilities.max())
            assert seen.unsure == (best[temperature] < least)
            assert seen.probabilities.sum() == pytest.approx(1, abs=1e-5)
    assert best[3.0] < best[1.0]


def test_classes_of_one_name_are_told_apart():
    labels = [{"wnid": f"n0{k}", "name": name} for k, name in enumerate(["crane", "kite", "crane", "sea_snake"])]
    assert inference.display_names(labels) == ["crane (n00)", "kite", "crane (n02)", "sea snake"]


def test_a_folder_that_is_no_model_is_said_to_be_none(tmp_path, exported):
    with pytest.raises(inference.BadModel, match="no config.json"):
        inference.Classifier(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(inference.BadModel, match="cannot be read"):
        inference.Classifier(tmp_path)
    for foreign in ("1", "99"):  # 1: of before the probabilities were calibrated
        (tmp_path / "config.json").write_text(f'{{"format": {foreign}}}')
        with pytest.raises(inference.BadModel, match="not of format 2; export the model again"):
            inference.Classifier(tmp_path)
    config = json.loads((exported[0] / "config.json").read_text()) | {"network": "model.onnx"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(inference.BadModel, match="missing or damaged"):
        inference.Classifier(tmp_path)
    (tmp_path / "model.onnx").write_bytes((exported[0] / "model.onnx").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config | {"labels": config["labels"][1:]}))
    with pytest.raises(inference.BadModel, match="gives 10 classes, config.json names 9"):
        inference.Classifier(tmp_path)


def test_a_space_uses_the_processors_it_was_given_not_those_of_its_host(monkeypatch, tmp_path):
    monkeypatch.setattr(inference.os, "sched_getaffinity", lambda process: set(range(64)), raising=False)
    monkeypatch.setattr(inference, "Path", lambda path: tmp_path / "none")  # no quota that can be read
    for said, expected in (("2", 2), ("", 64), ("many", 64), ("128", 64)):
        monkeypatch.setenv("CPU_CORES", said)
        assert inference.cores() == expected


def test_the_app_imports_nothing_of_the_project_nor_torch():
    allowed = {"gradio", "huggingface_hub", "numpy", "onnxruntime", "PIL", "simplejpeg", "spaces"}
    allowed |= {"markdown_it", "yaml"}  # of Gradio's own requirements
    allowed |= sys.stdlib_module_names | {path.stem for path in (ROOT / "app").glob("*.py")}
    for path in (ROOT / "app").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module]
            assert {name.split(".")[0] for name in names} <= allowed, path
    assert "gradio" not in (ROOT / "app/inference.py").read_text().lower()
