"""rn50/data/pictures.py: one picture, one meaning, whoever reads it and whatever was read before it."""

import hashlib
import io
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rn50.data import beton, decode, encode, pictures, writer
from rn50.data.verify import verify
from rn50.errors import RunError
from tests import odd_jpeg, tiny_model
from tests.conftest import ROOT
from tests.odd_pictures import Files, encoded, odd_pictures, picture

sys.path.insert(0, str(ROOT / "app"))
import inference

ODD = odd_pictures()
ORDINARY = {f"ordinary_{k}.jpeg": encoded(picture(k, 80 + k, 60), "JPEG", quality=60 + k) for k in range(12)}
FILES = {name: odd.data for name, odd in ODD.items()} | ORDINARY


def outcome(read, data):
    """A digest of the pixels, or the words of the refusal."""
    try:
        rgb = np.asarray(read(data))
    except ValueError as error:
        return str(error)
    return f"{rgb.shape} {hashlib.sha256(rgb.tobytes()).hexdigest()}"


@pytest.mark.parametrize("name", ODD)
def test_an_odd_picture_is_read_as_it_looks_or_refused_by_name(name):
    odd = ODD[name]
    if odd.shown is None:
        with pytest.raises(ValueError, match=odd.refused) as caught:
            pictures.decode_image(odd.data)
        assert re.match("the (picture|file) ", str(caught.value))
        return
    rgb = pictures.decode_image(odd.data)
    assert rgb.dtype == np.uint8
    assert rgb.flags.c_contiguous
    assert rgb.shape == odd.shown.shape
    assert np.abs(rgb.astype(int) - odd.shown).mean() <= odd.near


def test_the_page_reads_what_the_converter_reads():
    """Its copy of the module, its own limits around it: the same pixels, or the same words."""
    assert (ROOT / "app/pictures.py").read_bytes() == (ROOT / "rn50/data/pictures.py").read_bytes(), (
        "cp rn50/data/pictures.py app/"
    )
    for name, data in FILES.items():
        ours, theirs = outcome(pictures.decode_image, data), outcome(inference.decode_image, data)
        if name in ODD and not ODD[name].page:
            assert re.match(r"The file is ", theirs), name
        elif ours.startswith("the "):
            taken_here = re.compile(r"at most \d+|: JPEG, .*")
            assert taken_here.sub("", theirs).lower().rstrip(".") == taken_here.sub("", ours).lower(), name
        else:
            assert ours == theirs, name


def test_the_space_with_its_own_versions_reads_the_same(tmp_path):
    if not tiny_model.APP_PYTHON.exists():
        pytest.skip("the Space's packages are not installed; run: bash tools/app.sh --install")
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, 'app'); import inference, numpy as np\n"
        "for path in map(Path, sys.argv[2:]):\n"
        "    try: np.save(Path(sys.argv[1], path.name), np.asarray(inference.decode_image(path.read_bytes())))\n"
        "    except inference.UnreadableImage: pass\n"
    )
    (tmp_path / "in").mkdir()
    for name, data in FILES.items():
        (tmp_path / "in" / name).write_bytes(data)
    paths = sorted((tmp_path / "in").iterdir())
    subprocess.run([tiny_model.APP_PYTHON, "-c", code, tmp_path, *paths], cwd=ROOT, check=True, timeout=120)
    read = {name: odd for name, odd in ODD.items() if odd.shown is not None and odd.page}
    assert {path.stem for path in tmp_path.glob("*.npy")} == {*read, *ORDINARY}
    for name in read:
        theirs, ours = np.load(tmp_path / f"{name}.npy"), pictures.decode_image(FILES[name])
        assert np.abs(theirs.astype(int) - ours).mean() < 0.5, name


# --- Nothing passes from one picture to the next ----------------------------------------------------------------------

FRESH = """
import hashlib, json, os, sys
import numpy as np
from rn50.data import {module} as module
def outcome(data):
    try: rgb = {read}
    except ValueError as error: return str(error)
    return f"{{rgb.shape}} {{hashlib.sha256(rgb.tobytes()).hexdigest()}}"
for path in sys.stdin.read().split("\\0"):
    with open(path, "rb") as file: data = file.read()
    if not (child := os.fork()):
        print(json.dumps([os.path.basename(path), outcome(data)]), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """{name: outcome} of each file in a process that has decoded nothing before."""
    folder = tmp_path_factory.mktemp("odd")
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    code = FRESH.format(module="pictures", read="module.decode_image(data)")
    paths = "\0".join(str(folder / name) for name in FILES)
    done = subprocess.run(
        [sys.executable, "-c", code], input=paths, capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found = dict(json.loads(line) for line in done.stdout.splitlines())
    assert found.keys() == FILES.keys()
    return found


@settings(max_examples=int(os.environ.get("EXAMPLES", 25)), deadline=None)
@given(names=st.lists(st.sampled_from(sorted(FILES)), min_size=2, max_size=60), threads=st.integers(1, 4))
def test_any_sequence_in_any_threads_is_read_as_in_fresh_processes(fresh, names, threads):
    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(lambda name: outcome(pictures.decode_image, FILES[name]), names))
    assert found == [fresh[name] for name in names]


def test_any_number_of_workers_and_any_order_stores_the_same():
    """Through the converter's own processes."""
    stored = []
    for workers, seed in ((1, 0), (3, 1)):
        names = np.random.default_rng(seed).permutation(sorted(FILES)).tolist()
        encoding = {"quality": 90, "raw_share": 0.0, "seed": 0}
        job = SimpleNamespace(source=Files(names, FILES), paths={64: "unused", 32: "unused"}, encoding=encoding)
        found = {}
        for name, _, result, remark in encode.encode_all(job, np.arange(len(names)), workers):
            sizes = result if isinstance(result, str) else [(*rest, bytes(data)) for *rest, data in result]
            found[name] = sizes, remark
        stored.append(found)
    assert stored[0] == stored[1]
    for name, odd in ODD.items():
        result, remark = stored[0][f"a/{name}"]
        assert isinstance(result, str) == (odd.shown is None), name
        assert (remark is not None) == ("without_end" in name or "half_an_end" in name), name


def odd_beton(path):
    """A file of JPEGs with and without tables of tiles, of several kinds, and of pixels; [what each must decode to]."""
    shown = picture(3)
    plain = encoded(shown, "JPEG", quality=90)
    ycc = odd_jpeg.ycc(shown)
    kinds = [
        encode.encode_image(shown, 90),
        encode.encode_image(picture(4), 40),
        plain,
        encoded(picture(5), "JPEG", quality=1),
        encoded(picture(6), "JPEG", quality=95, optimize=True),
        odd_jpeg.without(plain, 0xC4),
        encoded(shown, "JPEG", progressive=True),
        encoded(shown, "JPEG", quality=90, restart_marker_blocks=1),
        odd_jpeg.encode(ycc, [(1, 2), (1, 1), (1, 1)], step=7),
        odd_jpeg.encode(ycc, [(4, 1), (1, 1), (1, 1)]),
        encoded(shown[:, :, 0], "JPEG", quality=70),
        encoded(Image.fromarray(shown).convert("CMYK"), "JPEG"),
    ]
    count = 3 * len(kinds)
    ladder = writer.LadderWriter(paths={64: path}, journal=f"{path}.journal", capacity=count, fingerprint=["odd"])
    for k in range(count):
        height, width = shown.shape[:2]
        raw = k % 7 == 0
        data = np.roll(shown, k, 0).tobytes() if raw else kinds[k % len(kinds)]
        ladder.add(label=0, pictures={64: (beton.RAW if raw else beton.JPG, width, height, data)})
    classes = [{"wnid": "a", "name": "a"}]
    ladder.finish({64: {"split": "train", "classes": classes, "settings": {"max_side": 64}}})
    return beton.read_info(path)


def test_the_training_decoder_keeps_nothing_either(tmp_path):
    """Nor the verifier, whose threads take the pictures in any order."""
    info = odd_beton(tmp_path / "train_64.beton")
    assert verify(info.path)[1] == []

    def decoded(samples, threads):
        decoder = decode.RandomCropDecoder(info, scale=(0.2, 1.0), seed=0, threads=threads)
        out = np.empty((len(samples), 32, 32, 3), np.uint8)
        decoder.decode(np.asarray(samples, np.int64), out)
        return out

    code = (
        "import os, sys, numpy as np\nfrom rn50.data import beton, decode\n"
        "info = beton.read_info(sys.argv[1])\n"
        "decoder = decode.RandomCropDecoder(info, scale=(0.2, 1.0), seed=0, threads=1)\n"
        "for k in range(info.num_samples):\n"
        "    if not (child := os.fork()):\n"
        "        out = np.empty((1, 32, 32, 3), np.uint8)\n"
        "        decoder.decode(np.array([k]), out)\n"
        "        os.write(1, out.tobytes())\n"
        "        os._exit(0)\n"
        "    assert os.waitpid(child, 0)[1] == 0\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, info.path], stdout=subprocess.PIPE, cwd=ROOT, timeout=120, check=True
    )
    alone = np.frombuffer(done.stdout, np.uint8).reshape(info.num_samples, 32, 32, 3)
    for seed in range(40):
        rng = np.random.default_rng(seed)
        samples = rng.integers(0, info.num_samples, rng.integers(1, 50))
        assert (decoded(samples, int(rng.integers(1, 5))) == alone[samples]).all()


def test_a_stored_jpeg_without_its_quantisation_is_an_error_and_spoils_nothing(tmp_path):
    good, bad = encode.encode_image(picture(1), 90), odd_jpeg.without(encoded(picture(2), "JPEG"), 0xDB)
    path = tmp_path / "train_64.beton"
    ladder = writer.LadderWriter(paths={64: path}, journal=tmp_path / "j", capacity=2, fingerprint=[])
    for data in (good, bad):
        ladder.add(label=0, pictures={64: (beton.JPG, 61, 45, data)})
    ladder.finish({64: {"split": "train", "classes": [{"wnid": "a", "name": "a"}], "settings": {"max_side": 64}}})
    decoder = decode.CenterCropDecoder(beton.read_info(path), ratio=1, threads=1)
    before, after = np.empty((1, 32, 32, 3), np.uint8), np.empty((1, 32, 32, 3), np.uint8)
    decoder.decode(np.array([0]), before)
    with pytest.raises(RunError, match="sample 1 .*Quantization table 0x00 was not defined"):
        decoder.decode(np.array([1]), np.empty((1, 32, 32, 3), np.uint8))
    decoder.decode(np.array([0]), after)
    assert (before == after).all()


# --- Large pictures ---------------------------------------------------------------------------------------------------


def test_a_jpeg_of_more_than_40_megapixels_is_decoded_at_half_its_size():
    gray = np.full((6400, 6400), 90, np.uint8)
    gray[:3200] = 160
    thumbnail = encoded(picture(1), "JPEG")
    large = odd_jpeg.with_segment(encoded(gray, "JPEG"), 0xE2, b"a thumbnail\0" + thumbnail)
    rgb = pictures.decode_image(large)
    assert rgb.shape == (3200, 3200, 3)
    assert (rgb[100, 100, 0], rgb[3100, 100, 0]) == (160, 90)


def test_a_text_that_is_no_picture_costs_no_time():
    started = os.times().user
    for data in (b"a" * 20_000_000, bytes(20_000_000), b"<?xml" + b" " * 5_000_000, b"\xc3\xa9" * 5_000_000):
        with pytest.raises(ValueError, match="the file"):
            pictures.decode_image(data)
    assert os.times().user - started < 2


def test_pillow_reads_the_same_where_it_is_asked_alone():
    """Ordinary JPEG: the same pixels as everybody else's."""
    for data in ORDINARY.values():
        assert (pictures.decode_image(data) == np.asarray(Image.open(io.BytesIO(data)))).all()
