"""The fast path on aarch64 (Graviton): built by a cross-compiler, run by qemu, and compared with what runs here."""

import functools
import platform
import runpy
import shutil
import subprocess

import cv2
import numpy as np
import pytest

from rn50.data import decode, native
from tests.conftest import ROOT
from tests.data.test_decode import SUBSAMPLING, encode, photograph, with_table

# struct sample of tests/decode_crops.c
SAMPLE = np.dtype(
    [("crop", native.CROP), ("bytes", "<u8"), ("width", "<u2"), ("height", "<u2"), ("raw", "u1"), ("tile", "u1")]
    + [("unused", "u2")]
)
KINDS = ("this processor", "aarch64")
TILE = 3


def extensions(machine, monkeypatch):
    """What setup.py compiles on a processor of the name `machine`."""
    found = []
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr("setuptools.setup", lambda ext_modules: found.extend(ext_modules))
    runpy.run_path(str(ROOT / "setup.py"))
    return found


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """program(kind, source): the command that runs tests/`source`, compiled with decode.c as setup.py compiles it."""
    folder = tmp_path_factory.mktemp("arm")
    with pytest.MonkeyPatch.context() as monkeypatch:
        [extension] = extensions("aarch64", monkeypatch)

    @functools.cache
    def build(kind, source):
        compiler, emulator, link = "gcc", [], []
        if kind == "aarch64":
            if platform.machine() == "aarch64":
                pytest.skip("this processor is the aarch64 one: test_decode.py is the test")
            compiler, link = "aarch64-linux-gnu-gcc", ["-static"]  # qemu then needs no libraries of that processor
            emulator = [path for path in map(shutil.which, ("qemu-aarch64", "qemu-aarch64-static")) if path][:1]
            if not emulator:
                pytest.skip("no qemu-aarch64 (Debian's and Ubuntu's qemu-user)")
        if not shutil.which(compiler):
            pytest.skip(f"no {compiler} (Debian's and Ubuntu's {'gcc-aarch64-linux-gnu' if link else 'gcc'})")
        out = folder / f"{source} {kind}"
        sources = [ROOT / "tests" / source, *(ROOT / path for path in extension.sources)]
        libraries = [f"-l{name}" for name in extension.libraries]
        command = [compiler, *extension.extra_compile_args, "-Werror", *link, *sources, "-o", out, *libraries]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if link and ("cannot find -lc" in done.stderr or "stdio.h: No such file" in done.stderr):
            pytest.skip("no C library for aarch64 (Debian's and Ubuntu's libc6-dev-arm64-cross)")
        assert done.returncode == 0, done.stderr
        return [*emulator, out]

    return build


def run_here(stored, crops, size):
    """Statuses, crops and tables of rn50.data.native. stored: (bytes, width, height, is_raw) each. crops: CROP [n]."""
    data = [np.frombuffer(data, np.uint8) for data, *_ in stored]
    out = np.zeros((len(stored), size, size, 3), np.uint8)
    status = native.decode_batch(
        [array.ctypes.data for array in data],
        [array.size for array in data],
        *[[sample[column] for sample in stored] for column in (1, 2, 3)],
        crops,
        out,
        threads=1,
    )
    return status, out, [native.index_jpeg(data, TILE) for data, _, _, is_raw in stored if not is_raw]


def run_there(command, stored, crops, size):
    """The same of tests/decode_crops.c."""
    records = np.zeros(len(stored), SAMPLE)
    records["crop"], records["tile"] = crops, TILE
    records["bytes"] = [len(data) for data, *_ in stored]
    for column, name in enumerate(("width", "height", "raw"), 1):
        records[name] = [sample[column] for sample in stored]
    given = b"".join(record.tobytes() + data for record, (data, *_) in zip(records, stored, strict=True))
    result = subprocess.run([*command, str(size)], input=given, stdout=subprocess.PIPE, check=True, timeout=120).stdout
    pixels = len(stored) * size * size * 3
    status = np.frombuffer(result, np.int32, len(stored))
    out = np.frombuffer(result, np.uint8, pixels, status.nbytes).reshape(-1, size, size, 3)
    tables, at = [], status.nbytes + pixels
    while at < len(result):
        made = max(0, int(np.frombuffer(result, np.int64, 1, at)[0]))
        tables.append(result[at + 8 : at + 8 + made])
        at += 8 + made
    return status, out, tables


def pictures():
    """Every kind of picture that the compiled decoder knows, (bytes, width, height, is_raw) each, at odd sizes: JPEGs
    without and with a table, and pixels.
    """
    found = []
    for k, (width, height) in enumerate([(157, 93), (64, 48), (17, 33), (1, 40), (40, 1), (1, 1)]):
        rgb = photograph(width, height, seed=k)
        jpegs = [encode(rgb, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, factor) for factor in SUBSAMPLING.values()]
        jpegs += [encode(rgb[:, :, 1]), encode(rgb, cv2.IMWRITE_JPEG_OPTIMIZE, 1, quality=100), encode(rgb, quality=30)]
        found += [(jpeg, width, height, False) for jpeg in jpegs]
        found += [(with_table(jpeg, TILE), width, height, False) for jpeg in jpegs]
        found.append((rgb.tobytes(), width, height, True))
    return found


def sizes_of(stored):
    return [np.array([sample[column] for sample in stored]) for column in (1, 2)]


@pytest.mark.parametrize("kind", KINDS)
def test_crops_and_tables_are_those_of_this_processor(program, kind):
    """Pixels to within one grey level, because one rounds a product before it adds and the other does not."""
    command, stored = program(kind, "decode_crops.c"), pictures()
    widths, heights = sizes_of(stored)
    for size in (1, 30, 64):
        number = np.arange(len(stored))
        batches = [decode.center_crops(widths, heights, size=size, ratio=0.875)]
        for epoch, scale in enumerate([(0.35, 1), (0.001, 0.1)]):
            batches.append(decode.random_crops(widths, heights, number, size=size, scale=scale, seed=0, epoch=epoch))
        assert 0 < batches[1]["flip"].mean() < 1
        for crops in batches:
            status, out, tables = run_here(stored, crops, size)
            their_status, their_out, their_tables = run_there(command, stored, crops, size)
            assert not status.any()
            assert not their_status.any()
            assert np.abs(out.astype(int) - their_out).max() <= 1
            assert their_tables == tables
            assert sum(map(bool, tables)) == sum(not is_raw for *_, is_raw in stored) // 2


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_the_same_there(program, kind):
    """A status for a status, and where a damaged file is a picture all the same, that picture."""
    command, generator, stored = program(kind, "decode_crops.c"), np.random.default_rng(0), []
    rgb = photograph(90, 70)
    whole = [encode(rgb), with_table(encode(rgb), TILE), with_table(encode(rgb[:, :, 0]), TILE)]
    for k in range(600):
        data = np.frombuffer(whole[k % 3], np.uint8)[: generator.integers(1, 6000) if k % 7 == 0 else None].copy()
        for position in generator.integers(0, len(data), generator.integers(1, 6)):
            data[position] ^= 1 << generator.integers(8)
        stored.append((data.tobytes(), 90, 70, False))
    crops = decode.random_crops(*sizes_of(stored), np.arange(600), size=24, scale=(0.1, 1), seed=0, epoch=0)
    status, out, tables = run_here(stored, crops, 24)
    their_status, their_out, their_tables = run_there(command, stored, crops, 24)
    assert np.array_equal(their_status, status)
    assert their_tables == tables
    assert np.bincount(status, minlength=3).min() > 20  # of 600, of each status
    decoded = status == native.OK
    assert np.abs(out[decoded].astype(int) - their_out[decoded]).max() <= 1


def test_fuzzing_there_ends_as_here(program, tmp_path):
    """The same damaged files decode and the same are refused."""
    rgb = photograph(90, 70)
    for k, factor in enumerate(SUBSAMPLING.values()):
        (tmp_path / f"{k}.jpg").write_bytes(with_table(encode(rgb, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, factor), 2))
    (tmp_path / "gray.jpg").write_bytes(with_table(encode(rgb[:, :, 0]), 2))
    here, there = (
        subprocess.run(
            [*program(kind, "fuzz_decode.c"), "500", *sorted(tmp_path.glob("*.jpg"))],
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        ).stdout
        for kind in KINDS
    )
    decoded, refused = map(int, there.split())
    assert decoded + refused == 2500
    assert min(decoded, refused) > 400
    assert there == here


def test_setup_compiles_once_for_other_processors(monkeypatch):
    """And never for the very processor it runs on: what is built on one machine runs on another."""
    for machine, names in [("aarch64", ["_decode"]), ("x86_64", ["_decode", "_decode_v3"])]:
        found = extensions(machine, monkeypatch)
        assert [extension.name for extension in found] == [f"rn50.data.{name}" for name in names]
        flags = [flag for extension in found for flag in extension.extra_compile_args if flag.startswith("-m")]
        assert flags == ["-march=x86-64-v3"] * (len(names) - 1)
