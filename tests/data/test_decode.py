"""The fast path against full decodes by PIL, torchvision's distributions, and damage."""

import io
import os
import shutil
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from rn50.data import decode, native
from rn50.data.beton import JPG, RAW, BetonInfo
from rn50.errors import RunError
from tests.conftest import ROOT

SUBSAMPLING = {
    "4:4:4": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
    "4:2:2": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_422,
    "4:4:0": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_440,
    "4:2:0": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420,
}


def photograph(width, height, seed=0):
    """Smooth shapes with an edge here and there, as photographs have: uint8 (height, width, 3)."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (height // 24 + 2, width // 24 + 2, 3)).astype(np.uint8)
    picture = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    picture[height // 3 :, width // 2 :] //= 2
    return picture


def encode(rgb, *flags, quality=90):
    pixels = rgb if rgb.ndim == 2 else rgb[:, :, ::-1]
    return cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality, *flags])[1].tobytes()


def with_table(jpeg, tile=3):
    table = native.index_jpeg(jpeg, tile)
    assert table
    return jpeg + table


def info_of(path, stored):
    """A BetonInfo of the images `stored`: (bytes, width, height, mode) each."""
    path.write_bytes(b"".join(data for data, *_ in stored))
    sizes = np.array([len(data) for data, *_ in stored], np.uint64)
    return BetonInfo(
        path=str(path),
        bytes=int(sizes.sum()),
        num_samples=len(stored),
        page_size=8 << 20,
        modes=np.array([mode for *_, mode in stored], np.uint8),
        widths=np.array([width for _, width, _, _ in stored], np.uint16),
        heights=np.array([height for _, _, height, _ in stored], np.uint16),
        labels=np.arange(len(stored)),
        data_ptrs=(np.cumsum(sizes) - sizes).astype(np.uint64),
        sizes=sizes,
        manifest=None,
    )


def cut(stored, boxes, size, flips=None, threads=1):
    """Decode the crops `boxes` [n, 4] (x, y, width, height) of the images `stored`: uint8 [n, size, size, 3]."""
    boxes = np.asarray(boxes)
    crops = np.zeros(len(stored), native.CROP)
    crops["x"], crops["y"], crops["x0"], crops["y0"] = boxes[:, 0], boxes[:, 1], boxes[:, 0], boxes[:, 1]
    crops["x1"], crops["y1"] = boxes[:, 0] + boxes[:, 2], boxes[:, 1] + boxes[:, 3]
    crops["scale_x"], crops["scale_y"] = boxes[:, 2] / size, boxes[:, 3] / size
    if flips is not None:
        crops["flip"] = flips
    data = [np.frombuffer(data, np.uint8) for data, *_ in stored]
    out = np.empty((len(stored), size, size, 3), np.uint8)
    status = native.decode_batch(
        [array.ctypes.data for array in data],
        [array.size for array in data],
        [width for _, width, _, _ in stored],
        [height for _, _, height, _ in stored],
        [mode == RAW for *_, mode in stored],
        crops,
        out,
        threads=threads,
    )
    return status, out


def expected(jpeg, box, size, flip=False):
    """The same by PIL: decode everything, crop, resize with antialiasing."""
    x, y, width, height = (int(value) for value in box)
    picture = Image.open(io.BytesIO(jpeg)).convert("RGB").crop((x, y, x + width, y + height))
    result = np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR)).astype(int)
    return result[:, ::-1] if flip else result


def difference(one, other):
    return np.abs(one.astype(int) - other).mean()


@pytest.mark.parametrize("subsampling", SUBSAMPLING)
@pytest.mark.parametrize("tile", [None, 1, 3, 200])
def test_crops_at_every_edge_equal_a_full_decode(subsampling, tile):
    """Sizes that are no multiple of an MCU, crops of one pixel, of one MCU, at the corners, and of everything."""
    for width, height in [(157, 93), (64, 48), (17, 33)]:
        jpeg = encode(photograph(width, height), cv2.IMWRITE_JPEG_SAMPLING_FACTOR, SUBSAMPLING[subsampling])
        data = with_table(jpeg, tile) if tile else jpeg
        boxes = [(0, 0, width, height), (0, 0, 1, 1), (width - 1, height - 1, 1, 1), (width - 9, 0, 9, height)]
        boxes += [(0, height - 7, width, 7), (width // 2, height // 3, width // 3, height // 3), (3, 2, 13, 15)]
        for size in (1, 16, 30):
            status, out = cut([(data, width, height, JPG)] * len(boxes), boxes, size)
            assert not status.any()
            for box, got in zip(boxes, out, strict=True):
                # a crop of a few pixels is an enlargement, where the smoothing of chroma shows
                assert difference(got, expected(jpeg, box, size)) < (3 if min(box[2:]) > 8 else 6), (box, size)


def test_gray_pixels_and_mirrored_images():
    rgb = photograph(120, 80)
    gray = encode(rgb[:, :, 1])
    jpeg = encode(rgb)
    lossless = io.BytesIO()
    Image.fromarray(rgb).save(lossless, "png")
    box = (11, 7, 90, 60)
    for data, mode, reference in [
        (gray, JPG, gray),
        (with_table(gray), JPG, gray),
        (with_table(jpeg), JPG, jpeg),
        (rgb.tobytes(), RAW, lossless.getvalue()),
    ]:
        for flip in (False, True):
            status, out = cut([(data, 120, 80, mode)], [box], 40, [flip])
            assert not status.any()
            assert difference(out[0], expected(reference, box, 40, flip)) < 1


@pytest.mark.parametrize("quality", [5, 50, 90, 100])
@pytest.mark.parametrize("optimized", [0, 1])
def test_every_pixel_of_noise_and_of_edges(quality, optimized):
    """Codes of all lengths, blocks full to the last coefficient, blocks of one, and an image's own tables."""
    generator = np.random.default_rng(quality)
    rgb = photograph(96, 96)
    rgb[:48, :48] = generator.integers(0, 256, (48, 48, 3))
    rgb[:48, 48:] = generator.integers(0, 2, (48, 48, 1)) * 255
    rgb[48:, :48] += generator.integers(0, 12, (48, 48, 3), np.uint8)
    factor = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    jpeg = encode(rgb, cv2.IMWRITE_JPEG_OPTIMIZE, optimized, *factor, quality=quality)
    for data in (jpeg, with_table(jpeg, 2)):
        status, out = cut([(data, 96, 96, JPG)], [(0, 0, 96, 96)], 96)
        assert not status.any()
        # libjpeg's integer transform rounds otherwise, and so does the conversion from YCbCr
        assert np.abs(out[0].astype(int) - expected(jpeg, (0, 0, 96, 96), 96)).max() <= 4
        assert difference(out[0], expected(jpeg, (0, 0, 96, 96), 96)) < 0.6


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (2, 3)])
def test_images_of_a_pixel(size):
    width, height = size
    jpeg = encode(np.full((height, width, 3), (200, 30, 90), np.uint8), quality=100)
    for data in (jpeg, with_table(jpeg)):
        status, out = cut([(data, width, height, JPG)], [(0, 0, width, height)], 8)
        assert not status.any()
        assert difference(out[0], expected(jpeg, (0, 0, width, height), 8)) < 3


def test_quality_on_real_images():
    """Mean difference under 2 grey levels from decoding everything, over the real samples; measured: 0.4."""
    folder = os.environ.get("IMAGENET_SAMPLES_DIR")
    if not folder:
        pytest.skip("IMAGENET_SAMPLES_DIR is not set")
    paths = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in (".jpeg", ".jpg"))[:300]
    generator, differences, whole = np.random.default_rng(0), [], []
    for k, path in enumerate(paths):
        rgb = np.asarray(Image.open(path).convert("RGB"))
        scale = min(1, 500 / max(rgb.shape[:2]))
        rgb = cv2.resize(rgb, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        height, width = rgb.shape[:2]
        jpeg = encode(rgb)
        w, h = generator.integers(40, width + 1), generator.integers(40, height + 1)
        box = (generator.integers(width - w + 1), generator.integers(height - h + 1), w, h)
        status, out = cut([(with_table(jpeg, native.TILE), width, height, JPG)], [box], 160, [k % 2])
        assert not status.any()
        differences.append(difference(out[0], expected(jpeg, box, 160, k % 2)))
        crops = decode.center_crops(np.array([width]), np.array([height]), size=224, ratio=0.875)
        buffer, image = np.frombuffer(jpeg, np.uint8), np.empty((1, 224, 224, 3), np.uint8)
        one = [buffer.ctypes.data], [len(jpeg)], [width], [height], [False]
        assert not native.decode_batch(*one, crops, image, threads=1).any()
        reference = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])
        whole.append(difference(image[0], np.asarray(reference(Image.open(io.BytesIO(jpeg)))).astype(int)))
    assert np.mean(differences) < 1
    assert max(differences) < 4
    assert np.mean(whole) < 1
    assert max(whole) < 2


@pytest.mark.parametrize(
    ("width", "height", "size", "ratio"), [(500, 375, 224, 0.875), (333, 500, 160, 0.7), (224, 224, 192, 1)]
)
def test_centre_crops_lie_where_torchvision_puts_them(width, height, size, ratio):
    rgb = photograph(width, height)
    crops = decode.center_crops(np.array([width]), np.array([height]), size=size, ratio=ratio)
    out = np.empty((1, size, size, 3), np.uint8)
    one = [rgb.ctypes.data], [rgb.size], [width], [height], [True]
    assert not native.decode_batch(*one, crops, out, threads=1).any()
    reference = transforms.Compose([transforms.Resize(round(size / ratio)), transforms.CenterCrop(size)])
    assert difference(out[0], np.asarray(reference(Image.fromarray(rgb))).astype(int)) < 0.5


def largest_gap(one, other):
    """Between the two empirical distribution functions."""
    points = np.sort(np.concatenate([one, other]))
    shares = [np.searchsorted(np.sort(values), points, side="right") / len(values) for values in (one, other)]
    return np.abs(shares[0] - shares[1]).max()


@pytest.mark.parametrize(
    ("width", "height", "scale"), [(500, 375, (0.08, 1)), (400, 400, (0.35, 1)), (90, 400, (0.5, 1))]
)
def test_crops_are_distributed_as_torchvisions(width, height, scale):
    """Area, ratio, position and share of mirrored images; seeds are fixed."""
    count = 6000
    crops = decode.random_crops(
        np.full(count, width), np.full(count, height), np.arange(count), size=160, scale=scale, seed=5, epoch=1
    )
    w, h = crops["x1"] - crops["x0"], crops["y1"] - crops["y0"]
    torch.manual_seed(0)
    empty = torch.empty(3, height, width)
    i, j, theirs_h, theirs_w = np.array(
        [transforms.RandomResizedCrop.get_params(empty, list(scale), [3 / 4, 4 / 3]) for _ in range(count)]
    ).T
    ours = (w * h, w / h, crops["x0"], crops["y0"], crops["x0"] / np.maximum(width - w, 1))
    theirs = (theirs_w * theirs_h, theirs_w / theirs_h, j, i, j / np.maximum(width - theirs_w, 1))
    for one, other in zip(ours, theirs, strict=True):
        # the two-sample Kolmogorov-Smirnov test at 0.1 %
        assert largest_gap(one, other) < 1.95 * np.sqrt(2 / count)
    assert 0.47 < crops["flip"].mean() < 0.53
    if np.ptp(crops["y0"]):  # all crops of the tall image are the fallback
        assert abs(np.corrcoef(crops["flip"], crops["y0"])[0, 1]) < 0.05
    np.testing.assert_allclose(crops["scale_x"], w / 160)


def test_neighbouring_samples_and_epochs_are_uncorrelated():
    size = np.full(4000, 300)
    one = decode.random_crops(size, size, np.arange(4000), size=100, scale=(0.08, 1), seed=0, epoch=0)["x1"]
    for seed, epoch in [(0, 1), (1, 0)]:
        other = decode.random_crops(size, size, np.arange(4000), size=100, scale=(0.08, 1), seed=seed, epoch=epoch)[
            "x1"
        ]
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.05
    assert abs(np.corrcoef(one[1:], one[:-1])[0, 1]) < 0.05


def test_other_kinds_of_jpeg_go_through_libjpeg(tmp_path):
    """Progressive, with restart markers, and 4:1:1, which the compiled decoder does not know."""
    rgb = photograph(150, 100)
    kinds = [
        encode(rgb, cv2.IMWRITE_JPEG_PROGRESSIVE, 1),
        encode(rgb, cv2.IMWRITE_JPEG_RST_INTERVAL, 4),
        encode(rgb, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_411),
    ]
    assert [native.index_jpeg(jpeg) for jpeg in kinds] == [b""] * 3
    info = info_of(tmp_path / "kinds", [(jpeg, 150, 100, JPG) for jpeg in kinds])
    decoder = decode.CenterCropDecoder(info, ratio=0.9, threads=1)
    decoder.size = 64
    out = np.empty((3, 64, 64, 3), np.uint8)
    decoder.decode(np.arange(3), out)
    reference = transforms.Compose([transforms.Resize(71), transforms.CenterCrop(64)])
    for jpeg, got in zip(kinds, out, strict=True):
        assert difference(got, np.asarray(reference(Image.open(io.BytesIO(jpeg)))).astype(int)) < 1


def test_a_table_changes_nothing_for_other_decoders():
    jpeg = encode(photograph(300, 200))
    longer = with_table(jpeg, native.TILE)
    assert len(longer) < 1.03 * len(jpeg)
    one, two = (cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) for data in (jpeg, longer))
    assert np.array_equal(one, two)
    assert native.index_jpeg(longer) == b""


def test_damage_is_an_error_with_the_sample(tmp_path):
    """Never the pixels of another image: truncated, of other size than the metadata says, and with another table."""
    jpeg, other = encode(photograph(150, 100)), encode(photograph(150, 100, seed=1))
    table = native.index_jpeg(jpeg, 2)
    damaged = [
        jpeg[: len(jpeg) // 2],
        jpeg[:300],
        b"\0" * 1000,
        jpeg + table[6:],
        other + table,
        encode(photograph(100, 150)),
    ]
    for data in damaged:
        info = info_of(tmp_path / "damaged", [(jpeg, 150, 100, JPG), (data, 150, 100, JPG)])
        decoder = decode.CenterCropDecoder(info, ratio=1, threads=2)
        decoder.size = 64
        with pytest.raises(RunError, match=r"sample 1 \(label 1\) is corrupt"):
            decoder.decode(np.array([0, 1]), np.empty((2, 64, 64, 3), np.uint8))


@pytest.mark.parametrize("missing", [40, 300])
def test_a_cut_end_is_noticed(missing):
    jpeg = encode(photograph(96, 96), quality=95)
    status, _ = cut([(jpeg[: -2 - missing], 96, 96, JPG)], [(0, 0, 96, 96)], 32)
    assert status[0] == native.CORRUPT


ZEROS_16, ONE, ZERO_THEN_ONE, END = "11111111001", "001", "11001", "1010"  # of the standard table of luma


@pytest.mark.parametrize(
    ("coefficients", "status"),
    [
        (ZEROS_16 * 3 + ONE * 14 + ONE, native.OK),  # to the last one, after which there is no end of block
        (ZEROS_16 * 3 + ONE * 14 + END, native.OK),
        (ZEROS_16 * 3 + ONE * 14 + ZERO_THEN_ONE, native.CORRUPT),
        (ZEROS_16 * 3 + ONE * 14 + ZERO_THEN_ONE + END, native.CORRUPT),
        (ZEROS_16 * 3 + ONE * 11 + ZEROS_16, native.CORRUPT),
        (ZEROS_16 * 4, native.CORRUPT),
    ],
)
def test_a_coefficient_past_its_block_is_damage(coefficients, status):
    bits = "00" + coefficients  # 00: DC as before
    bits += "1" * (-len(bits) % 8)
    scan = bytes(int(bits[at : at + 8], 2) for at in range(0, len(bits), 8)).replace(b"\xff", b"\xff\0")
    empty = encode(np.zeros((8, 8), np.uint8))
    header = empty[: empty.index(b"\xff\xda") + 10]
    found, _ = cut([(header + scan + b"\xff\xd9", 8, 8, JPG)], [(0, 0, 8, 8)], 8)
    assert found[0] == status


def test_most_flipped_bits_are_noticed(tmp_path):
    """Where they desynchronise the bit stream; a changed coefficient is a valid picture to any decoder."""
    jpeg = encode(photograph(300, 200), quality=95)
    data = np.frombuffer(with_table(jpeg), np.uint8)
    header, generator = 700, np.random.default_rng(0)
    noticed = 0
    for position in generator.integers(header, len(jpeg) - 2, 200):
        broken = data.copy()
        broken[position] ^= 1 << generator.integers(8)
        status, _ = cut([(broken.tobytes(), 300, 200, JPG)], [(0, 0, 300, 200)], 64)
        noticed += bool(status.any())
    assert noticed > 60


def test_threads_share_a_batch_and_give_the_same():
    stored = [(with_table(encode(photograph(100 + k, 80, seed=k))), 100 + k, 80, JPG) for k in range(20)]
    boxes = [(k, 5, 60, 60) for k in range(20)]
    _, one = cut(stored, boxes, 48)
    for threads in (2, 7, 64, 500):
        status, many = cut(stored, boxes, 48, threads=threads)
        assert not status.any()
        assert np.array_equal(one, many)


def test_callers_and_forked_children_share_the_threads():
    """Several loaders may decode at once, and a forked child has none of its parent's threads."""
    stored = [(with_table(encode(photograph(100, 80))), 100, 80, JPG)] * 40
    boxes = [(k, 5, 60, 60) for k in range(40)]
    _, alone = cut(stored, boxes, 48)
    with ThreadPoolExecutor(4) as callers:
        for _, many in callers.map(lambda _: cut(stored, boxes, 48, threads=3), range(24)):
            np.testing.assert_array_equal(many, alone)
    child = os.fork()
    if not child:
        signal.alarm(20)  # a child that waits for its parent's threads waits for ever
        os._exit(int((cut(stored, boxes, 48, threads=3)[1] != alone).any()))
    assert os.waitpid(child, 0)[1] == 0


def test_both_builds_agree():
    """The one for any x86-64 and the one for AVX2 differ by rounding alone."""
    if not native._cpu_flags() >= native._V3_FLAGS:
        pytest.skip("this processor runs only one of them")
    rgb = photograph(150, 100)
    stored, box = [(with_table(encode(rgb)), 150, 100, JPG), (rgb.tobytes(), 150, 100, RAW)], (9, 9, 120, 80)
    _, fast = cut(stored, [box, box], 64)
    flags, native._cpu_flags = native._cpu_flags, set
    native.library.cache_clear()
    try:
        _, plain = cut(stored, [box, box], 64)
    finally:
        native._cpu_flags = flags
        native.library.cache_clear()
    assert np.abs(fast.astype(int) - plain).max() <= 1


@pytest.mark.parametrize("build", [[], ["-march=x86-64-v3"]], ids=["any processor", "AVX2"])
def test_fuzzing_under_sanitizers(tmp_path, build):
    """Mutated and truncated JPEGs and tables: an error or a picture, never a read or write out of bounds."""
    if not shutil.which("gcc"):
        pytest.skip("no gcc")
    if build and not native._cpu_flags() >= native._V3_FLAGS:
        pytest.skip("this processor has no AVX2")
    rgb = photograph(90, 70)
    seeds = [encode(rgb, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, factor) for factor in SUBSAMPLING.values()]
    seeds += [encode(rgb[:, :, 0]), encode(rgb, quality=100), encode(rgb, cv2.IMWRITE_JPEG_OPTIMIZE, 1)]
    for k, jpeg in enumerate(seeds):
        (tmp_path / f"{k}.jpg").write_bytes(with_table(jpeg, 2))
    sources = [ROOT / "tests" / "fuzz_decode.c", ROOT / "rn50" / "data" / "csrc" / "decode.c"]
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
    sanitizers = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]
    command = ["gcc", "-std=gnu11", "-O1", "-g", *build, *warnings, *sanitizers, *sources, "-o", tmp_path / "fuzz"]
    subprocess.run([*command, "-lm", "-lpthread"], check=True, timeout=120)
    result = subprocess.run(
        [tmp_path / "fuzz", "2000", *sorted(tmp_path.glob("*.jpg"))], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    decoded, refused = map(int, result.stdout.split())
    assert decoded > 1000
    assert refused > 1000


def test_a_library_of_another_version_is_refused_before_it_writes_anywhere(monkeypatch):
    monkeypatch.setattr(native, "LAYOUT", (*native.LAYOUT[:-1], 5))
    native.library.cache_clear()
    with pytest.raises(RunError, match="built from another version of rn50"):
        native.library()
    native.library.cache_clear()
