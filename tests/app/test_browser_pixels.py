"""The browser page's pixels in headless Chromium: Pillow's resize bit for bit, and files read as app/pictures.py does.

Everything runs in a module worker, as the page has it.
"""

import base64
import functools
import hashlib
import http.server
import io
import math
import os
import re
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageCms

from tests import bombs, odd_pictures, tiny_model
from tests.conftest import ROOT

pytest.importorskip("selenium")
from selenium import webdriver

sys.path.insert(0, str(ROOT / "app"))
import inference
import pictures

# As the site's build writes them.
KINDS = [[start.pattern.decode("latin-1"), words] for start, words in pictures.KINDS]
# Runs an async function's body with `args` and everything that the modules export.
RUN = """
const [body, args, main, done] = arguments, names = ["decode", "formats", "jpeg", "resize"];
const source = `
    const AsyncFunction = (async () => {}).constructor;
    const load = async (name) => ({...await import("${location.origin}/" + name + ".js")});
    const base64 = (bytes) => {
        let text = "";
        for (let at = 0; at < bytes.length; at += 8192) text += String.fromCharCode(...bytes.subarray(at, at + 8192));
        return btoa(text);
    };
    const bytesOf = async (name) => {
        const response = await fetch("${location.origin}/files/" + name);
        return new Uint8Array(await response.arrayBuffer());
    };
    const sha256 = async (pixels) => {
        const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", pixels));
        return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
    };
    const run = async (body, args) => {
        const modules = Object.assign({}, ...await Promise.all(${JSON.stringify(names)}.map(load)));
        const given = {...modules, args, base64, bytesOf, sha256};
        return new AsyncFunction(...Object.keys(given), body)(...Object.values(given));
    };
    const tell = (body, args, done) => run(body, args).then(done, (error) => done("failed: " + error.stack));
    if (self.document) self.tell = tell;
    else self.onmessage = ({data: [body, args]}) => tell(body, args, postMessage);
`;
const url = URL.createObjectURL(new Blob([source], {type: "text/javascript"}));
if (main) import(url).then(() => self.tell(body, args, done));
else {
    self.worker ??= new Worker(url, {type: "module"});
    self.worker.onmessage = ({data}) => done(data);
    self.worker.onerror = ({message}) => done("failed: " + message);
    self.worker.postMessage([body, args]);
}
"""


@pytest.fixture(scope="module")
def files():
    """{name: bytes} that the page can fetch."""
    return {}


@pytest.fixture(scope="module")
def run(files):
    """run(body, args): what the body of an async JavaScript function returns in a worker, or on the page: main=True."""
    programs = tiny_model.chromium()
    if not programs:
        pytest.skip("no chromium and chromedriver; run: apt-get install chromium chromium-driver")

    class Handler(http.server.SimpleHTTPRequestHandler):
        extensions_map = {".js": "text/javascript", "": "application/octet-stream"}

        def do_GET(self):
            name = self.path.removeprefix("/files/")
            if name == self.path and name != "/":
                return super().do_GET()
            self.send_response(200)
            self.send_header("Content-Type", "text/html" if name == "/" else "application/octet-stream")
            self.end_headers()
            self.wfile.write(b"<!doctype html><title>pixels</title>" if name == "/" else files[name])

        def log_message(self, *_):
            pass

    handler = functools.partial(Handler, directory=ROOT / "app/browser")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(programs[1]))
    driver.set_script_timeout(120)
    driver.get(f"http://127.0.0.1:{server.server_port}/")

    def run(body, args, *, main=False):
        found = driver.execute_async_script(RUN, body, args, main)
        assert not str(found).startswith("failed: "), found
        return found

    yield run
    driver.quit()
    server.shutdown()


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def sha256(pixels):
    return hashlib.sha256(np.ascontiguousarray(pixels)).hexdigest()


# --- resize.js -------------------------------------------------------------------------------------------------------

SIZES = [(1, 1), (2, 3), (3, 2), (500, 37), (37, 500), (400, 20), (20, 400), (1, 90), (64, 64), (80, 85), (73, 91),
         (256, 256), (300, 224), (224, 600), (641, 480), (700, 1001), (2400, 40), (41, 2401), (64, 703)]  # fmt: skip
SEEN = [(64, 1.0), (64, 0.875), (80, 0.95), (176, 0.875), (224, 0.875), (224, 1.0)]
# A picture that lies in memory, and notes how it is read.
PICTURE = """
const inMemory = (pixels, width, height) => {
    const strips = [], strip = (top, rows, left, columns) => {
        strips.push(rows * columns);
        const part = new Uint8ClampedArray(4 * rows * columns);
        for (let row = 0; row < rows; row++) {
            const from = 4 * ((top + row) * width + left);
            const isInside = left >= 0 && left + columns <= width && top >= 0 && top + row < height;
            if (!isInside) throw new Error("beyond the edge");
            part.set(pixels.subarray(from, from + 4 * columns), 4 * row * columns);
        }
        return part;
    };
    return {width, height, strip, strips};
};
"""


@pytest.fixture
def rows_first(monkeypatch):
    """Have Pillow resize along the rows first, as before version 13, which begins with the columns of tall pictures."""
    resize = Image.Image.resize

    def in_two_steps(self, size, resample, box=None):
        left, top, right, bottom = box or (0, 0, *self.size)
        narrow = resize(self, (size[0], self.height), resample, (left, 0, right, self.height))
        return resize(narrow, size, resample, (0, top, size[0], bottom))

    monkeypatch.setattr(Image.Image, "resize", in_two_steps)


def put(files, picture):
    name = f"{picture.width}x{picture.height}"
    files[name] = picture.convert("RGBA").tobytes()
    return [name, picture.width, picture.height]


def test_what_the_network_sees_is_pillows_resize_bit_for_bit(run, files, rows_first):
    wrong = []
    for size in SIZES:
        picture = noise(*size)
        found = run(
            PICTURE
            + """const [[name, width, height], cases] = args, pixels = await bytesOf(name);
            return Promise.all(cases.map(([resolution, cropRatio]) => {
                return sha256(see(inMemory(pixels, width, height), {resolution, cropRatio}));
            }));""",
            [put(files, picture), SEEN],
        )
        for (resolution, ratio), digest in zip(SEEN, found, strict=True):
            seen = inference.resize_and_crop(picture, resolution=resolution, crop_ratio=ratio)
            if sha256(np.asarray(seen)) != digest:
                wrong.append((size, resolution, ratio))
    assert not wrong


def test_the_square_for_people_is_pillows_too(run, files, rows_first):
    wrong = []
    for size in [(1, 1), (2, 3), (300, 224), (471, 640), (513, 512), (1500, 1001), (40, 2400)]:
        picture = noise(*size)
        found = run(
            PICTURE
            + """const [[name, width, height], cases] = args, pixels = await bytesOf(name);
            return Promise.all(cases.map(([resolution, cropRatio]) => {
                return sha256(square(inMemory(pixels, width, height), {resolution, cropRatio, largest: 448}));
            }));""",
            [put(files, picture), SEEN],
        )
        for (resolution, ratio), digest in zip(SEEN, found, strict=True):
            model = SimpleNamespace(resolution=resolution, crop_ratio=ratio)
            if sha256(np.asarray(inference.Classifier.show(model, picture))) != digest:
                wrong.append((size, resolution, ratio))
    assert not wrong


def test_a_large_picture_is_read_in_strips_once_and_only_where_the_crop_is(run, files):
    strips = run(
        PICTURE
        + """const [name, width, height] = args, picture = inMemory(await bytesOf(name), width, height);
        see(picture, {resolution: 64, cropRatio: 0.875});
        return picture.strips;""",
        put(files, noise(1800, 1200)),
    )
    assert len(strips) > 3
    assert max(strips) <= 1 << 18
    assert sum(strips) < (0.92 * 1200) ** 2


def test_normalising_is_float32_arithmetic(run, files):
    mean, std = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
    picture = noise(64, 64)
    scale = 1 / np.asarray(std, np.float32)
    model = SimpleNamespace(resolution=64, crop_ratio=1.0, _scale=scale, _offset=np.asarray(mean, np.float32) * scale)
    files["rgb"] = picture.tobytes()
    found = run(
        'return base64(new Uint8Array(normalise(await bytesOf("rgb"), args).buffer))', {"mean": mean, "std": std}
    )
    expected = inference.Classifier.prepare(model, picture)
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(found), np.float32).reshape(3, 64, 64), expected)


# --- decode.js -------------------------------------------------------------------------------------------------------

# For each name: {size, all: RGBA of the whole, seen: RGB at 64 pixels} or {said: the sentence that refuses it}.
DECODE = """
const found = [];
for (const name of args.names) {
    try {
        const picture = await decode(await bytesOf(name), args.kinds);
        const seen = base64(see(picture, {resolution: args.resolution, cropRatio: 0.875}));
        const all = args.all ? base64(picture.strip(0, picture.height)) : null;
        found.push({size: [picture.width, picture.height], all, seen});
        picture.close();
    } catch (error) {
        if (!(error instanceof UnreadableImage)) throw error;
        found.push({said: error.message});
    }
}
return found;
"""
# Mean difference in grey levels. Chromium has libjpeg-turbo, too, and every kind here comes out the same.
NEAR = 0.02
# What is refused in other words: {name: (words, why)}.
OTHER_WORDS = {
    "no_quantisation.jpeg": ("a kind that is not read, or damaged", "a browser does not say what it lacks"),
    "two_colours.jpeg": ("a kind that is not read, or damaged", "a browser does not say what it does not know"),
    "65280_pixels.jpeg": ("is damaged", "its scans are looked at before its size"),
    "60000_pixels.png": ("3600 megapixels; at most 100", "the server has less memory for each visitor"),
}


def decoded(run, files, named, *, resolution=64, whole=True):
    """{name: what DECODE finds}."""
    files.update(named)
    args = {"names": list(named), "kinds": KINDS, "resolution": resolution, "all": whole}
    return dict(zip(named, run(DECODE, args), strict=True))


def by_python(data):
    """(picture, None) or (None, why it is refused)."""
    try:
        return inference.decode_image(data), None
    except inference.UnreadableImage as error:
        return None, str(error)


def pixels(text, size, channels):
    return np.frombuffer(base64.b64decode(text), np.uint8).reshape(size[1], size[0], channels).astype(int)


def apart(found, picture, resolution=64):
    """Mean difference of what the network sees, in grey levels."""
    expected = inference.resize_and_crop(picture, resolution=resolution, crop_ratio=0.875)
    return np.abs(pixels(found["seen"], (resolution, resolution), 3) - np.asarray(expected)).mean()


def test_odd_pictures_mean_the_same_as_in_python(run, files):
    odd, problems = odd_pictures.odd_pictures(), []
    found = decoded(run, files, {name: one.data for name, one in odd.items()})
    assert len(found) > 150
    for name, one in found.items():
        picture, refused = by_python(odd[name].data)
        if refused:
            words = re.escape(refused) if name not in OTHER_WORDS else OTHER_WORDS[name][0]
            if not re.search(words, one.get("said", "")):
                problems.append((name, one.get("said", "is shown"), refused))
            continue
        if "said" in one or tuple(one["size"]) != picture.size:
            problems.append((name, one.get("said", one["size"]), picture.size))
            continue
        rgba = pixels(one["all"], one["size"], 4)
        assert (rgba[..., 3] == 255).all()
        difference = np.abs(rgba[..., :3] - np.asarray(picture)).mean(), apart(one, picture)
        if max(difference) > NEAR:
            problems.append((name, *difference))
    assert not problems
    assert set(OTHER_WORDS) <= set(odd)


def test_what_a_file_is_has_the_same_words_in_both_languages(run, files):
    """Python's patterns are for bytes, and ignore the case of ASCII alone."""
    data = {f"no_{name}": one.data for name, one in odd_pictures.no_pictures() if one.data}
    data |= {f"swapped_{name}": content.swapcase() for name, content in data.items()}
    for name, content in list(data.items()):
        data[f"other_{name}"] = bytes(byte ^ 0x20 if byte >= 0xC0 else byte for byte in content)
    for number, start in enumerate((
        b"\xcf\xbb\xbf<html>", b"\xdd7zXZ\0", b"\x28\xb5\x2f\xdd", b"caf\xe9 is Latin-1", b"7Z\xbc\xaf",
        "ÄÖÜ äöü ÿ\n".encode(), "\u00a0<svg>".encode(), b"text\n", b"text\0", b"x" * 700, b"\x0b<html>", b"BM",
    )):  # fmt: skip
        data[f"start_{number}"] = start + b"\n" * (number % 2)
    files.update(data)
    body = "return Promise.all(args.names.map(async (name) => kind(await bytesOf(name), args.kinds)))"
    found = run(body, {"names": list(data), "kinds": KINDS})
    expected = [pictures._kind(content, inference.FORMATS) for content in data.values()]
    assert dict(zip(data, found, strict=True)) == dict(zip(data, expected, strict=True))
    assert len(set(expected)) > 12


def damaged_jpegs():
    """{name: bytes}: JPEGs of four kinds, whole, and cut, zeroed, flipped and shortened inside their scans."""
    rng, made = np.random.default_rng(0), {}
    for kind, options in {
        "baseline": {"quality": 90}, "progressive": {"progressive": True, "quality": 90},
        "restarts": {"restart_marker_blocks": 3}, "gray": {"quality": 60},
    }.items():  # fmt: skip
        picture = Image.fromarray(odd_pictures.picture(8, 150, 110))
        whole = odd_pictures.encoded(picture.convert("L") if kind == "gray" else picture, "JPEG", **options)
        scan = whole.index(b"\xff\xda") + 20
        made[f"{kind}_whole"] = whole
        for turn in range(8):
            at = int(rng.integers(scan, len(whole) - 60))
            flipped = bytearray(whole)
            flipped[at] ^= 1 << turn
            made[f"{kind}_cut_{turn}"] = whole[:at]
            made[f"{kind}_closed_{turn}"] = whole[:at] + b"\xff\xd9"
            made[f"{kind}_zeroed_{turn}"] = whole[:at] + bytes(50) + whole[at + 50 :]
            made[f"{kind}_flipped_{turn}"] = bytes(flipped)
            made[f"{kind}_shortened_{turn}"] = whole[:at] + whole[at + 3 :]
            made[f"{kind}_ones_{turn}"] = whole[:at] + b"\xfe" * 30 + whole[at + 30 :]
    made["filled_whole"] = made["restarts_whole"].replace(b"\xff\xd3", b"\xff\xff\xff\xd3")
    for number, scan in enumerate(re.finditer(rb"\xff\xda([^\xff]|\xff\0)*", made["progressive_whole"])):
        made[f"progressive_without_scan_{number}"] = made["progressive_whole"].replace(scan[0], b"")
    return made


def test_a_damaged_scan_that_libjpeg_reports_is_refused(run, files):
    made = damaged_jpegs()
    found = decoded(run, files, made, whole=False)
    agreed = {name: [by_python(made[name])[1], one.get("said")] for name, one in found.items()}
    shown = {name for name, (python, browser) in agreed.items() if python and not browser}
    assert not shown
    assert not any(any(said) for name, said in agreed.items() if name.endswith("_whole"))
    # Here more is told: libjpeg is silent about some codes that do not exist, and of two faults it reports the first.
    refused_alone = [name for name, (python, browser) in agreed.items() if browser and not python]
    assert len(refused_alone) <= 0.1 * len(made)
    same = [name for name, (python, browser) in agreed.items() if python == browser]
    assert len(same) >= 0.9 * len(made)
    said = " ".join(filter(None, (python for python, _ in agreed.values())))
    for reason in ("premature end", "extraneous bytes", "bad Huffman code", "progression sequence", "cut off"):
        assert reason in said


def test_other_files_that_are_cut_off_or_damaged_are_refused(run, files):
    picture, made = Image.fromarray(odd_pictures.picture(9, 150, 110)), {}
    for kind in ("PNG", "WEBP", "GIF", "BMP", "AVIF"):
        whole = odd_pictures.encoded(picture, kind)
        made[f"whole.{kind}"] = whole
        for kept in (0.3, 0.6, 0.95):
            made[f"cut_{kept}.{kind}"] = whole[: int(kept * len(whole))]
    made["behind.avif"] = made["whole.AVIF"] + b"abc"
    found = {name: one.get("said") for name, one in decoded(run, files, made, whole=False).items()}
    assert {name: said for name, said in found.items() if name.startswith(("whole", "behind"))} == dict.fromkeys(
        (f"whole.{kind}" for kind in ("PNG", "WEBP", "GIF", "BMP", "AVIF")), None
    ) | {"behind.avif": None}
    cut = {said for name, said in found.items() if name.startswith("cut")}
    assert cut == {"The picture is cut off: part of the file is missing."}


def test_what_the_browser_decodes_has_no_metadata_and_the_same_pixels(run, files):
    """Browsers differ in what they apply of it; Chromium, for one, applies no orientation of a WebP."""
    picture, profile = Image.fromarray(odd_pictures.picture(11)), ImageCms.createProfile("LAB")
    options = {"exif": odd_pictures.exif(6), "icc_profile": ImageCms.ImageCmsProfile(profile).tobytes()}
    files |= {
        "JPEG": odd_pictures.encoded(picture, "JPEG", comment=b"seen", xmp=odd_pictures.xmp(">"), **options),
        "PNG": odd_pictures.encoded(picture, "PNG", **options),
        "WEBP": odd_pictures.encoded(picture, "WEBP", lossless=True, xmp=odd_pictures.xmp(">"), **options),
    }
    gamma = odd_pictures.png_chunk(b"gAMA", (20000).to_bytes(4, "big"))
    files["PNG"] = files["PNG"][:33] + gamma + files["PNG"][33:]
    body = """const {parts, turn} = read(await bytesOf(args), []);
    return [base64(new Uint8Array(await new Blob(parts).arrayBuffer())), turn];"""
    for kind in ("JPEG", "PNG", "WEBP"):
        text, turn = run(body, kind)
        data = base64.b64decode(text)
        stripped = Image.open(io.BytesIO(data))
        assert turn == 6
        assert stripped.format == kind
        assert not {"exif", "icc_profile", "xmp", "comment", "gamma"} & set(stripped.info)
        np.testing.assert_array_equal(np.asarray(stripped), np.asarray(Image.open(io.BytesIO(files[kind]))))
        if kind == "WEBP":
            assert data[12:16] == b"VP8X"
            assert data[20] & 0x2C == 0
            assert int.from_bytes(data[4:8], "little") == len(data) - 8
            assert not re.search(b"EXIF|ICCP|XMP ", data)


def test_a_damaged_png_is_told_by_its_checksums_where_a_browser_shows_it(run, files):
    """Firefox does."""
    whole = odd_pictures.encoded(Image.fromarray(odd_pictures.picture(9, 150, 110)), "PNG")
    files["flipped"] = whole[:500] + bytes([whole[500] ^ 4]) + whole[501:]
    body = 'try { return read(await bytesOf("flipped"), []) } catch (error) { return error.message }'
    assert run(body, None) == "The picture is damaged."


def test_bombs_are_refused_before_they_go_off(run, files):
    gray = odd_pictures.encoded(Image.new("L", (64, 64), 77), "JPEG")
    made = {
        "png": bombs.png(16, claimed=60000),
        "gif": bombs.gif(),
        "webp": bombs.webp(),
        "scans": gray[:-2] + gray[gray.index(b"\xff\xda") : -2] * 200 + gray[-2:],
        "exif": bombs.jpeg_with_exif(bombs.exif(500_000, 3000)),
    }
    found = decoded(run, files, made)
    assert all("megapixels; at most 100 are taken here" in found[name]["said"] for name in ("png", "gif", "webp"))
    assert found["scans"]["said"] == "The picture is damaged: it is in too many parts."
    assert found["exif"]["size"] == [16, 16]


def test_a_photograph_of_42_megapixels_is_decoded_at_half_its_size_as_in_python(run, files):
    picture = noise(70, 60).resize((7001, 6001), Image.Resampling.BICUBIC)
    data = odd_pictures.encoded(picture, "JPEG", quality=85, exif=odd_pictures.exif(6))
    expected, _ = by_python(data)
    assert expected.size == (3001, 3501)
    found = decoded(run, files, {"large": data}, resolution=224, whole=False)["large"]
    assert tuple(found["size"]) == expected.size
    assert apart(found, expected, 224) <= NEAR


def test_the_picture_for_people_is_the_square_that_the_network_sees(run, files):
    picture = Image.fromarray(odd_pictures.picture(10, 900, 640))
    lying = picture.transpose(Image.Transpose.ROTATE_90)
    files["photo"] = odd_pictures.encoded(lying, "PNG", exif=odd_pictures.exif(6))
    body = """const picture = await decode(await bytesOf("photo"), []), blob = await picture.shown(224, 0.875);
    return [blob.type, base64(new Uint8Array(await blob.arrayBuffer()))];"""
    for main in (False, True):
        kind, shown = run(body, None, main=main)
        shown = Image.open(io.BytesIO(base64.b64decode(shown)))
        model = SimpleNamespace(resolution=224, crop_ratio=0.875)
        expected = np.asarray(inference.Classifier.show(model, picture)).astype(int)
        assert (kind, shown.format, shown.size) == ("image/jpeg", "JPEG", (448, 448))
        assert np.abs(np.asarray(shown) - expected).mean() < 2


def test_a_closed_picture_has_given_its_memory_back(run, files):
    files["photo"] = odd_pictures.encoded(odd_pictures.picture(), "PNG")
    body = """const picture = await decode(await bytesOf("photo"), []);
    picture.strip(0, 1);
    picture.close();
    try { return picture.strip(0, 1).length } catch (error) { return error.name }"""
    assert run(body, None) == "InvalidStateError"


def test_a_browser_that_hides_pixels_is_told(run, files):
    """What stands in for such a browser: getImageData gives noise, as Firefox's with privacy.resistFingerprinting."""
    files["photo"] = odd_pictures.encoded(odd_pictures.picture(), "PNG")
    body = """const context = OffscreenCanvasRenderingContext2D.prototype, original = context.getImageData;
    context.getImageData = function (...place) {
        const found = original.apply(this, place);
        found.data.forEach((_, k) => { found.data[k] = 37 * k; });
        return found;
    };
    try {
        return await decode(await bytesOf("photo"), []).then(() => "shown", ({message}) => message);
    } finally {
        context.getImageData = original;
    }"""
    assert "hides pixels from pages" in run(body, None)


def test_real_photographs_look_the_same_to_the_network(run, files):
    folder = os.environ.get("IMAGENET_SAMPLES_DIR")
    if not folder:
        pytest.skip("IMAGENET_SAMPLES_DIR is not set: no real ImageNet images here")
    paths = sorted(Path(folder).glob("*.JPEG"))
    made = {path.name: path.read_bytes() for path in paths[:: math.ceil(len(paths) / 40)]}
    found = decoded(run, files, made, resolution=224, whole=False)
    differences = {name: apart(one, by_python(made[name])[0], 224) for name, one in found.items()}
    assert max(differences.values()) <= NEAR, max(differences.items(), key=lambda one: one[1])
