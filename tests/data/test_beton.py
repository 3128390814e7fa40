"""Betons (beton.py, writer.py, verify.py): stock FFCV reads ours, interruptions leave no trace, and damage is named."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from rn50.data import beton, encode, writer
from rn50.data.verify import verify
from rn50.errors import RunError, UsageError
from tests.conftest import ROOT
from tools import verify_beton

CLASSES = [{"wnid": name, "name": name} for name in ("a", "b", "c")]


def smooth(k, height, width):
    """A picture that JPEG stores well, different for each `k`."""
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [np.sin(rows / (5 + k % 7) + channel) + np.cos(columns / (4 + k % 5) - channel) for channel in range(3)]
    return ((np.stack(waves, 2) + 2) * 63).astype(np.uint8)


def stored(k, side=None):
    """(mode, width, height, bytes) of sample `k`; every fourth as pixels. Without `side` the sizes vary."""
    height, width = (side, side) if side else (20 + k % 17, 24 + k % 11)
    rgb = smooth(k, height, width)
    raw = k % 4 == 3
    return (beton.RAW if raw else beton.JPG, width, height, rgb.tobytes() if raw else encode.encode_image(rgb, 90))


def open_ladder(folder, *, capacity=40, fingerprint="same", rungs=("16", "32")):
    paths = {rung: folder / f"train_{rung}.beton" for rung in rungs}
    return writer.LadderWriter(
        paths=paths, journal=folder / "train.journal", capacity=capacity, fingerprint=fingerprint
    )


def add(ladder, positions, side=None):
    for k in positions:
        if k % 10 == 9 and not side:
            ladder.skip(sample_id=f"a/{k}.jpg", reason="broken")
        else:
            ladder.add(label=k % 3, pictures={rung: stored(k + int(rung), side) for rung in ladder.paths})


def finish(ladder):
    ladder.finish({rung: {"classes": CLASSES, "settings": {"max_side": 512}} for rung in ladder.paths})


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with two files of 36 samples (four of forty skipped), written without interruption."""
    folder = tmp_path_factory.mktemp("finished")
    ladder = open_ladder(folder)
    add(ladder, range(40))
    finish(ladder)
    return folder


STOCK = """
import sys
import numpy as np
from ffcv import types, writer, fields
from ffcv.fields.basics import IntDecoder
from ffcv.fields.rgb_image import SimpleRGBImageDecoder
from ffcv.libffcv import imdecode
from ffcv.loader import Loader, OrderOption
from ffcv.reader import Reader
from rn50.data import beton

def main(constant, varied, stock, out):
    assert beton.HEADER == types.HeaderType and beton.FIELD == types.FieldDescType
    assert beton.ALLOCATION == types.ALLOC_TABLE_TYPE and beton.VERSION == types.CURRENT_VERSION
    assert beton.SAMPLE == types.get_metadata_type([fields.RGBImageField(), fields.IntField()])
    # The writer forks, which hangs once a loader has started threads: it comes first.
    images = [np.full((20 + k % 9, 30, 3), k, "u1") for k in range(60)]
    made = {"image": fields.RGBImageField(write_mode="proportion", compress_probability=0.5),
            "label": fields.IntField()}
    pairs = [(image, k % 5) for k, image in enumerate(images)]
    writer.DatasetWriter(stock, made, num_workers=2).from_indexed_dataset(pairs, chunksize=3)
    image, label = made["image"], made["label"]
    for name, other in (
        ("turned", {"label": label, "image": image}),
        ("names", {"img": image, "target": label}),
        ("types", {"image": image, "label": fields.FloatField()}),
        ("more", {"image": image, "label": label, "index": label}),
    ):
        rows = [tuple(pair[0] if field is image else pair[1] for field in other.values()) for pair in pairs]
        path = stock.replace("stock.beton", f"{name}.beton")
        writer.DatasetWriter(path, other, num_workers=1).from_indexed_dataset(rows)
    results = {}
    for cache in (True, False):
        loader = Loader(constant, batch_size=7, num_workers=1, order=OrderOption.SEQUENTIAL, os_cache=cache,
                        drop_last=False, pipelines={"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]})
        batches = [(image.copy(), label.copy()) for image, label in loader]
        results[f"images{cache}"] = np.concatenate([image for image, _ in batches])
        results[f"labels{cache}"] = np.concatenate([label for _, label in batches])[:, 0]
    reader = Reader(varied)
    results["varied"], results["table"] = reader.metadata, reader.alloc_table
    info, decoded = beton.read_info(constant), []
    for k in range(info.num_samples):
        data = np.fromfile(constant, "u1", int(info.sizes[k]), offset=int(info.data_ptrs[k]))
        image = data
        if info.modes[k] == beton.JPG:
            image = np.empty(int(info.heights[k]) * int(info.widths[k]) * 3, "u1")
            imdecode(data, image, info.heights[k], info.widths[k], info.heights[k], info.widths[k])
        decoded.append(image.reshape(info.heights[k], info.widths[k], 3))
    results["decoded"] = np.stack(decoded)
    np.savez(out, **results)

if __name__ == "__main__":
    main(*sys.argv[1:])
"""


@pytest.fixture(scope="module")
def stock(tmp_path_factory, finished):
    """What stock FFCV makes of our files, and a file of its own. In a process of its own: it hangs when it fails."""
    folder = tmp_path_factory.mktemp("stock")
    ladder = open_ladder(folder, capacity=30, rungs=("64",))
    add(ladder, range(30), side=64)
    finish(ladder)
    (folder / "read.py").write_text(STOCK)
    arguments = [folder / "train_64.beton", finished / "train_32.beton", folder / "stock.beton", folder / "out.npz"]
    subprocess.run(
        [sys.executable, folder / "read.py", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
        timeout=300,
    )
    return folder, np.load(folder / "out.npz")


@pytest.mark.parametrize("cache", [True, False])
def test_the_stock_loader_returns_the_pixels_that_are_stored(stock, cache):
    _, results = stock
    images, labels = results[f"images{cache}"], results[f"labels{cache}"]
    assert labels.tolist() == [k % 3 for k in range(30)]
    assert (images == results["decoded"]).all()
    for k in range(30):
        mode, width, height, data = stored(k + 64, 64)
        if mode == beton.RAW:
            assert images[k].tobytes() == data
        else:
            # FFCV decodes with the fast inverse transform, OpenCV with the exact one: a few levels apart, no more.
            exact = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[:, :, ::-1]
            assert np.abs(images[k].astype(int) - exact).max() <= 6


def test_the_stock_reader_sees_varied_sizes_as_we_do(stock, finished):
    _, results = stock
    info = beton.read_info(finished / "train_32.beton")
    written = [k for k in range(40) if k % 10 != 9]
    assert info.num_samples == 36
    assert info.labels.tolist() == [k % 3 for k in written] == results["varied"]["f1"].tolist()
    assert info.widths.tolist() == [stored(k + 32)[1] for k in written] == results["varied"]["f0"]["width"].tolist()
    assert info.heights.tolist() == [stored(k + 32)[2] for k in written]
    assert info.sizes.tolist() == [len(stored(k + 32)[3]) for k in written] == results["table"]["size"].tolist()
    assert results["table"]["sample_id"].tolist() == list(range(36))


def test_files_of_stock_ffcv_are_accepted(stock):
    path = stock[0] / "stock.beton"
    info, problems = verify(path)
    assert problems == []
    assert (info.num_samples, info.num_classes, info.manifest, info.classes) == (60, 5, None, None)
    assert info.labels.tolist() == [k % 5 for k in range(60)]
    assert info.median_short_side == 24
    raw = np.flatnonzero(info.modes == beton.RAW)
    content = path.read_bytes()
    assert len(raw) > 0
    assert all(content[int(info.data_ptrs[k])] == k for k in raw)


def test_fields_of_stock_ffcv_may_have_any_order_and_no_other_names(stock):
    info, problems = verify(stock[0] / "turned.beton")
    expected = beton.read_info(stock[0] / "stock.beton")
    assert problems == []
    assert info.labels.tolist() == expected.labels.tolist()
    assert (info.widths.tolist(), info.heights.tolist()) == (expected.widths.tolist(), expected.heights.tolist())
    for name, found in (
        ("names", r"img \(RGBImageField\), target \(IntField\)"),
        ("types", r"image \(RGBImageField\), label \(FloatField\)"),
        ("more", r"image \(RGBImageField\), label \(IntField\) and 1 more"),
    ):
        expected = r"image \(RGBImageField\), label \(IntField\) alone; write it with these fields"
        with pytest.raises(RunError, match=f"{name}.beton cannot be used: its fields are {found}, .* {expected}"):
            beton.read_info(stock[0] / f"{name}.beton")


def test_the_manifest_says_what_is_in_the_file(finished):
    info = beton.read_info(finished / "train_32.beton")
    manifest = info.manifest
    assert manifest["num_samples"] == 36
    assert manifest["class_counts"] == np.bincount(info.labels).tolist()
    assert manifest["width"] == {"min": info.widths.min(), "median": np.median(info.widths), "max": info.widths.max()}
    assert manifest["median_short_side"] == np.median(np.minimum(info.widths, info.heights))
    assert manifest["skipped"] == [{"id": f"a/{k}.jpg", "reason": "broken"} for k in (9, 19, 29, 39)]
    checksum = subprocess.run(["sha256sum", info.path], capture_output=True, text=True, check=True).stdout.split()[0]
    assert manifest["beton"] == {"bytes": os.path.getsize(info.path), "sha256": checksum}
    assert info.num_classes == 3
    assert sorted(path.name for path in finished.iterdir()) == ["train_16.beton", "train_16.json", "train_32.beton",
                                                                "train_32.json"]  # fmt: skip


@pytest.mark.parametrize("committed", [0, 1, 10, 25, 39, 40])
def test_a_conversion_continues_where_its_journal_ends(tmp_path, finished, committed):
    ladder = open_ladder(tmp_path)
    add(ladder, range(committed))
    ladder.commit()
    add(ladder, range(committed, 40))
    for file in ladder._files.values():
        file.flush()  # data beyond the journal, as a crash between the two leaves it
    ladder.close()
    with open(tmp_path / "train.journal", "ab") as journal:
        journal.write(b"[[0,0,24,")  # and half a line of it
    assert not list(tmp_path.glob("*.json"))
    ladder = open_ladder(tmp_path)
    assert (ladder.done, ladder.started_over) == (committed, None)
    add(ladder, range(committed, 40))
    finish(ladder)
    assert contents(tmp_path) == contents(finished)


def test_an_interruption_between_the_final_names_loses_nothing(tmp_path, finished):
    ladder = open_ladder(tmp_path)
    add(ladder, range(40))
    ladder.commit()
    ladder.close()
    # As finish() leaves it when killed: one rung done, the other renamed but without its manifest.
    for name in ("train_16.beton", "train_16.json", "train_32.beton"):
        shutil.copy(finished / name, tmp_path)
    (tmp_path / "train_16.beton.partial").unlink()
    (tmp_path / "train_32.beton.partial").unlink()
    ladder = open_ladder(tmp_path, rungs=("32",))
    assert (ladder.done, ladder.started_over) == (40, None)
    finish(ladder)
    assert contents(tmp_path) == contents(finished)


def _other_settings(folder):
    return {"fingerprint": "other"}


def _shorter_data(folder):
    with open(folder / "train_16.beton.partial", "r+b") as handle:
        handle.truncate(beton.PAGE_SIZE + 100)
    return {}


def _damaged_journal(folder):
    path = folder / "train.journal"
    path.write_bytes(path.read_bytes().replace(b"[[0,", b"[{0,", 1))
    return {}


def _fewer_rungs(folder):
    return {"rungs": ("16",)}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_other_settings, "settings"),
        (_shorter_data, "shorter"),
        (_damaged_journal, "damaged"),
        (_fewer_rungs, "resolutions"),
    ],
)
def test_what_cannot_be_continued_starts_over_and_says_why(tmp_path, finished, change, reason):
    ladder = open_ladder(tmp_path)
    add(ladder, range(20))
    ladder.commit()
    ladder.close()
    ladder = open_ladder(tmp_path, **change(tmp_path))
    assert reason in ladder.started_over
    assert ladder.done == 0
    add(ladder, range(40))
    finish(ladder)
    made, expected = contents(tmp_path), contents(finished)
    assert made == {name: expected[name] for name in made}
    assert "train_16.json" in made


def test_the_disk_begins_to_write_before_it_is_waited_for(tmp_path, monkeypatch):
    begun = {}

    def fadvise(descriptor, start, length, advice):
        assert advice == os.POSIX_FADV_DONTNEED
        begun.setdefault(descriptor, []).append((start, start + length))

    monkeypatch.setattr(writer.os, "posix_fadvise", fadvise)
    ladder = open_ladder(tmp_path)
    for first in range(0, 40, 10):
        add(ladder, range(first, first + 10))
        ladder.commit()
    for file in ladder._files.values():
        ranges = begun[file.handle.fileno()]
        assert [start for start, _ in ranges] == [file.start, *(end for _, end in ranges[:-1])]
        assert ranges[-1][1] == file.end == os.path.getsize(file.path)
    ladder.close()


def test_two_conversions_do_not_write_the_same_files(tmp_path):
    ladder = open_ladder(tmp_path)
    with pytest.raises(RunError, match="another conversion"):
        open_ladder(tmp_path)
    ladder.close()


def test_samples_fill_pages_and_never_cross_them(tmp_path):
    ladder = open_ladder(tmp_path, capacity=11, rungs=("1",))
    rgb = np.zeros((900, 1000, 3), np.uint8)  # 2.7 MB: three to a page
    for k in range(11):
        ladder.add(label=0, pictures={"1": (beton.RAW, 1000, 900, (rgb + k).tobytes())})
    finish(ladder)
    info, problems = verify(tmp_path / "train_1.beton", quick=False)
    assert problems == [f"an image is larger than the manifest's {512} pixels"]
    assert (info.data_ptrs // beton.PAGE_SIZE).tolist() == [1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4]


def test_a_sample_larger_than_a_page_is_refused(tmp_path):
    ladder = open_ladder(tmp_path, rungs=("1",))
    with pytest.raises(RunError, match="more than a page"):
        ladder.add(label=0, pictures={"1": (beton.RAW, 2000, 2000, bytes(12_000_000))})
    ladder.close()


def test_nothing_but_skipped_samples_is_an_error(tmp_path):
    ladder = open_ladder(tmp_path, capacity=1)
    ladder.skip(sample_id="a/1.jpg", reason="broken")
    with pytest.raises(RunError, match="nothing to write"):
        finish(ladder)
    ladder.close()
    assert not list(tmp_path.glob("*.beton"))


@pytest.mark.parametrize("side", [16, 100, 333, 400, 500])
def test_pictures_shrink_to_the_longest_side_and_never_grow(side):
    for height, width in [(500, 375), (375, 500), (1, 700), (499, 500), (1000, 999), (333, 100), (16, 16)]:
        rgb = np.zeros((height, width, 3), np.uint8)
        result = encode.shrink_image(rgb, side)
        if max(height, width) <= side:
            assert result is rgb
            continue
        assert max(result.shape[:2]) == side
        ratio = side / max(height, width)
        assert result.shape[0] == max(1, int(height * ratio + 1e-9))
        assert result.shape[1] == max(1, int(width * ratio + 1e-9))


def test_shrinking_averages_areas():
    checker = np.indices((64, 64)).sum(0)[:, :, None].repeat(3, 2).astype(np.uint8) % 2 * 200
    assert (encode.shrink_image(checker, 32) == 100).all()


# Damage ------------------------------------------------------------------------------------------------------------


def patch(path, at, data):
    with open(path, "r+b") as handle:
        handle.seek(at)
        handle.write(data)


def put(path, at, value, kind):
    patch(path, at, np.array(value, kind).tobytes())


def sample_at(k, name):
    return beton.METADATA_START + k * beton.SAMPLE.itemsize + beton.IMAGE.fields[name][1]


def label_at(k):
    return beton.METADATA_START + k * beton.SAMPLE.itemsize + beton.SAMPLE.fields["f1"][1]


def rewrite_manifest(path, **changes):
    target = Path(beton.manifest_path(path))
    target.write_text(json.dumps(json.loads(target.read_text()) | changes))


STRUCTURE = {
    "missing": (lambda p: p.unlink(), "does not exist"),
    "a folder": (lambda p: (p.unlink(), p.mkdir()), "cannot"),
    "empty": (lambda p: os.truncate(p, 0), "0 bytes"),
    "cut in the header": (lambda p: os.truncate(p, 1000), "too short"),
    "cut in the data": (lambda p: os.truncate(p, beton.PAGE_SIZE + 999), "truncated"),
    "cut by one byte": (lambda p: os.truncate(p, os.path.getsize(p) - 1), "truncated"),
    "one byte more": (lambda p: os.truncate(p, os.path.getsize(p) + 1), "1 more"),
    "not a beton": (lambda p: p.write_bytes(b"PK" * 9000), "is not a .beton file of FFCV's version 2"),
    "unfinished": (lambda p: put(p, 16, 0, "<u8"), "never finished"),
    "no samples": (lambda p: put(p, 8, 0, "<u8"), "no samples"),
    "more samples": (lambda p: put(p, 8, 37, "<u8"), "truncated"),
    "absurd samples": (lambda p: put(p, 8, 1 << 60, "<u8"), "truncated"),
    "page size": (lambda p: put(p, 4, 12345, "<u4"), "page size"),
    "fields": (lambda p: put(p, 2, 3, "<u2"), "fields"),
    "field type": (lambda p: put(p, beton.HEADER.itemsize, 0, "u1"), r"fields are image \(FloatField\), label"),
    "field name": (lambda p: patch(p, beton.HEADER.itemsize + 1, b"photo"), r"fields are photo \(RGBImageField\), "),
    "no field": (lambda p: put(p, 2, 0, "<u2"), "fields are none, and should be image"),
    "split": (lambda p: rewrite_manifest(p, split="val"), "holds images of val of at most 512 pixels"),
    "rung": (lambda p: rewrite_manifest(p, split="train"), "train_16.beton holds images of train of at most 512 pix"),
    "pointer": (lambda p: put(p, sample_at(3, "data_ptr"), 77, "<u8"), "allocation table"),
    "width": (lambda p: put(p, sample_at(3, "width"), 0, "<u2"), "sample 3 has no size"),
    "mode": (lambda p: put(p, sample_at(5, "mode"), 9, "u1"), "sample 5 is stored"),
    "raw size": (lambda p: put(p, sample_at(3, "width"), 999, "<u2"), "sample 3 has not as many pixels"),
    "label": (lambda p: put(p, label_at(7), -1, "<i8"), "sample 7 has a negative label"),
    "label beyond": (lambda p: put(p, label_at(7), 3, "<i8"), "sample 7 has a label beyond"),
    "manifest count": (lambda p: rewrite_manifest(p, num_samples=35), "36 samples, its manifest says 35"),
    "manifest bytes": (lambda p: rewrite_manifest(p, beton={"bytes": 1, "sha256": ""}), "manifest says 1"),
    "manifest keys": (lambda p: rewrite_manifest(p, settings=None), "is not its manifest"),
    "manifest text": (lambda p: Path(beton.manifest_path(p)).write_text("{"), "cannot read"),
    "manifest list": (lambda p: Path(beton.manifest_path(p)).write_text("[]"), "is not the manifest"),
}


@pytest.mark.parametrize("damage", STRUCTURE)
def test_a_broken_structure_is_named_before_ffcv_can_hang_on_it(tmp_path, finished, damage):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "train_16.beton"
    change, problem = STRUCTURE[damage]
    # Samples 3 and 5 are meant to be of a known kind: 16 + k of which every fourth is stored as pixels.
    assert beton.read_info(path).modes[3] == beton.RAW
    change(path)
    with pytest.raises(RunError, match=problem) as caught:
        beton.read_info(path)
    assert "train_16" in str(caught.value)
    assert "\n" not in str(caught.value)


def _flip_bit(path, info, k):
    at = int(info.data_ptrs[k] + info.sizes[k] // 2)
    patch(path, at, bytes([path.read_bytes()[at] ^ 4]))


def _cut_sample(path, info, k):
    half = int(info.sizes[k]) // 2
    patch(path, int(info.data_ptrs[k]) + half, bytes(int(info.sizes[k]) - half))


def _wrong_size(path, info, k):
    put(path, sample_at(k, "width"), int(info.widths[k]) - 1, "<u2")


def _swap_labels(path, info, k):
    put(path, label_at(k), (int(info.labels[k]) + 1) % 3, "<i8")


def _flip_padding(path, info, k):
    patch(path, int(info.data_ptrs[-1] + info.sizes[-1]) + 5, b"\1")


@pytest.mark.parametrize(
    ("change", "problem", "needs_manifest"),
    [
        (_flip_bit, "checksum", True),
        (_cut_sample, "sample 8 .* is corrupt", False),
        (_wrong_size, "sample 8 .* is corrupt: it has .* pixels, not", False),
        (_swap_labels, "class_counts", True),
        (_flip_padding, "checksum", True),
    ],
)
def test_verify_names_the_damage(tmp_path, finished, change, problem, needs_manifest):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "train_32.beton"
    assert verify(path)[1] == []
    change(path, beton.read_info(path), 8)
    text = "\n".join(verify(path)[1])
    assert re.search(problem, text), text
    assert "checksum" in text
    if not needs_manifest:
        Path(beton.manifest_path(path)).unlink()
        text = "\n".join(verify(path, quick=True)[1])
        assert re.search(problem, text), text


def verify_script(*arguments):
    command = [sys.executable, ROOT / "tools" / "verify_beton.py", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )


def test_the_script_reports_each_file_and_its_status(tmp_path, finished):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    good, bad = tmp_path / "train_16.beton", tmp_path / "train_32.beton"
    os.truncate(bad, os.path.getsize(bad) - 100)
    result = verify_script(good, "--quick")
    assert (result.returncode, result.stderr) == (0, "")
    assert "OK: 36 images of 3 classes" in result.stdout
    result = verify_script(good, bad, tmp_path / "absent.beton")
    assert result.returncode == 1
    assert "train_16.beton: OK" in result.stdout
    assert "train_32.beton cannot be used: it is truncated" in result.stderr
    assert "absent.beton does not exist" in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout.splitlines()[-1] == "3 files: 1 good, 1 damaged or misnamed, 1 missing"
    assert result.stderr.splitlines()[-1].startswith("error: damaged or misnamed: 1 of 3 files; copy them again")


def test_the_script_takes_a_folder_and_tells_what_is_missing_or_strange_from_what_is_damaged(
    tmp_path, finished, monkeypatch, capsys
):
    def status(*arguments):
        monkeypatch.setattr(sys, "argv", ["verify_beton.py", "--quick", *map(str, arguments)])
        try:
            verify_beton.main()
        except (RunError, UsageError, SystemExit) as end:
            return getattr(end, "code", 2 if isinstance(end, UsageError) else 1), str(end)
        return 0, capsys.readouterr().out.splitlines()[-1]

    assert status(finished) == (0, "2 files: 2 good")
    assert status(tmp_path) == (2, f"no .beton file in the folder {tmp_path}; {verify_beton.REMEDY['missing']}")
    assert status(tmp_path / "absent.beton") == (2, f"missing: 1 of 1 files; {verify_beton.REMEDY['missing']}")
    strange = sorted(finished.glob("*.json"))
    assert status(finished, *strange) == (2, f"not a .beton file: 2 of 4 files; {verify_beton.REMEDY['missing']}")
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    (tmp_path / "val_16.beton.partial").touch()
    assert status(tmp_path) == (1, "unfinished: 1 of 3 files; run the same write_dataset.py command again")
    assert status()[0] == 2
