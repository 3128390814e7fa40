"""write_dataset.py as a user runs it: real processes, real signals, real limits."""

import io
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import write_dataset
from rn50.data import beton, encode
from rn50.data.pictures import decode_image
from rn50.data.verify import verify
from rn50.errors import RunError
from tests.conftest import ROOT

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
CLASSES = ("n01440764", "n02102040", "zebra")


def jpeg(k, width, height):
    coarse = np.random.default_rng(k).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.BICUBIC).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """60 + 12 images of varied sizes."""
    root = tmp_path_factory.mktemp("tree")
    for split, count in (("train", 60), ("val", 12)):
        for k in range(count):
            path = root / split / CLASSES[k % 3] / f"{k}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(k, 60 + 7 * (k % 20), 50 + 11 * (k % 13)))
    return root


@pytest.fixture(scope="module")
def long_tree(tmp_path_factory):
    """Seconds of work from few files: 1200 names for ten pictures of 1200x900."""
    root = tmp_path_factory.mktemp("long")
    for k in range(1200):
        path = root / "train" / CLASSES[k % 3] / f"{k}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        if k < 10:
            path.write_bytes(jpeg(k, 1200, 900))
        else:
            os.link(root / "train" / CLASSES[k % 10 % 3] / f"{k % 10}.JPEG", path)
    return root


LONG = ("--source.splits=train", "--out.resolutions=200,320", "--out.workers=2")


@pytest.fixture(scope="module")
def long_result(long_tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp("long_result")
    convert(long_tree, folder, *LONG)
    return contents(folder)


def command(tree, out, *flags):
    return [sys.executable, ROOT / "write_dataset.py", f"--source.dir={tree}", f"--out.dir={out}", *flags]


def convert(tree, out, *flags, status=0, **options):
    result = subprocess.run(
        command(tree, out, *flags), capture_output=True, text=True, timeout=120, env=ENVIRONMENT, **options
    )
    assert result.returncode == status, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result


def start(tree, out, *flags):
    """A conversion in the background, in a process group of its own as a terminal would give it."""
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command(tree, out, *flags), stdout=pipe, stderr=pipe, text=True, env=ENVIRONMENT, start_new_session=True
    )


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def journal_lines(out):
    try:
        return (out / "train.journal").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def has_moved_on(process, out, lines):
    return journal_lines(out) > lines or process.poll() is not None


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return value


def group_members(group):
    """Live processes of a process group, with the command line of each."""
    members = {}
    for entry in Path("/proc").iterdir():
        try:
            state, _, member = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(member) == group and state != "Z":
                members[int(entry.name)] = (entry / "cmdline").read_text()
        except (OSError, ValueError):
            continue
    return members


def workers_of(process):
    return [pid for pid, line in group_members(process.pid).items() if "spawn_main" in line]


def assert_none_left(process):
    try:
        wait_for(lambda: not group_members(process.pid), 10)
    finally:
        for pid in group_members(process.pid):
            os.kill(pid, signal.SIGKILL)


def test_any_number_of_workers_writes_the_same_bytes(tree, tmp_path):
    flags = ("--out.resolutions=64,100", "--out.raw_share=0.3")
    made = []
    for workers in (1, 2, 3):
        folder = tmp_path / str(workers)
        convert(tree, folder, *flags, f"--out.workers={workers}")
        made.append(contents(folder))
    assert made[0] == made[1] == made[2]
    expected = [f"{split}_{side}.{kind}" for split in ("train", "val") for side in ("100", "64")
                for kind in ("beton", "json")]  # fmt: skip
    assert list(made[0]) == expected


def test_every_image_is_there_once_with_its_label_and_size(tree, tmp_path):
    convert(tree, tmp_path, "--out.resolutions=64,150", "--out.quality=95", "--out.workers=2")
    originals = []
    for label, name in enumerate(CLASSES):
        for path in (tree / "train" / name).iterdir():
            originals.append((label, decode_image(path.read_bytes())))
    for side in (64, 150):
        info, problems = verify(tmp_path / f"train_{side}.beton")
        assert problems == []
        assert info.num_samples == len(originals) == 60
        assert info.labels.tolist() != sorted(info.labels)  # shuffled
        content = Path(info.path).read_bytes()
        left = [(label, encode.shrink_image(rgb, side)) for label, rgb in originals]
        for k in range(60):
            stored = decode_image(content[int(info.data_ptrs[k]) : int(info.data_ptrs[k] + info.sizes[k])])
            same = [n for n, (label, rgb) in enumerate(left) if label == info.labels[k] and rgb.shape == stored.shape]
            # JPEG blurs these strong colours by some 10 levels; another picture differs by 70.
            apart = {n: np.abs(left[n][1].astype(int) - stored).mean() for n in same}
            assert apart, f"sample {k} is none of the images left"
            nearest = min(apart, key=apart.get)
            assert apart[nearest] < 20
            del left[nearest]
    assert max(rgb.shape[1] for _, rgb in originals) > 150 > min(max(rgb.shape) for _, rgb in originals)


def test_the_manifest_names_classes_settings_and_source_but_no_place(tree, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(tree, moved)
    for root, out in ((tree, "one"), (moved, "two")):
        convert(root, tmp_path / out, "--out.resolutions=64", "--out.quality=80", "--source.splits=val")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    manifest = json.loads((tmp_path / "one" / "val_64.json").read_text())
    assert manifest["classes"][0] == {"wnid": "n01440764", "name": "tench"}
    assert manifest["classes"][2] == {"wnid": "zebra", "name": "zebra"}
    assert manifest["class_counts"] == [4, 4, 4]
    assert manifest["settings"] == {"max_side": 64, "quality": 80, "raw_share": 0.0, "seed": 0, "subset": 0,
                                    "page_size": 8 << 20}  # fmt: skip
    assert (manifest["source"]["kind"], manifest["source"]["images"]) == ("imagefolder", 12)


def test_subset_seed_and_raw_share_do_what_they_say(tree, tmp_path):
    common = ("--source.splits=train", "--out.resolutions=64", "--out.workers=1")
    convert(tree, tmp_path / "all", *common)
    convert(tree, tmp_path / "part", *common, "--source.subset=20")
    convert(tree, tmp_path / "seed", *common, "--out.seed=1")
    convert(tree, tmp_path / "raw", *common, "--out.raw_share=0.4")
    read = {name: beton.read_info(tmp_path / name / "train_64.beton") for name in ("all", "part", "seed", "raw")}
    assert read["part"].labels.tolist() == read["all"].labels[:20].tolist()
    assert read["seed"].labels.tolist() != read["all"].labels.tolist()
    assert 10 <= (read["raw"].modes == beton.RAW).sum() <= 38
    assert (read["all"].modes == beton.JPG).all()


def test_what_is_written_is_not_written_again_nor_overwritten(tree, tmp_path):
    flags = ("--source.splits=val", "--out.workers=1")
    convert(tree, tmp_path, *flags, "--out.resolutions=64")
    before = contents(tmp_path)
    again = convert(tree, tmp_path, *flags, "--out.resolutions=64")
    assert "val_64.beton is already written" in again.stdout
    refused = convert(tree, tmp_path, *flags, "--out.resolutions=64,80", "--out.quality=70", status=1)
    what = "with quality=90, and is asked for with quality=70"
    assert re.fullmatch(rf"error: .*val_64.beton was written {what}; remove.*\n", refused.stderr)
    assert contents(tmp_path) == before
    convert(tree, tmp_path, *flags, "--out.resolutions=64,80")  # a further rung joins the others
    after = contents(tmp_path)
    assert {name: after[name] for name in before} == before
    assert "val_80.beton" in after
    (tmp_path / "val_64.json").unlink()
    refused = convert(tree, tmp_path, *flags, "--out.resolutions=64", status=1)
    assert "exists without a manifest" in refused.stderr


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--out.resolutions=64,64"], "twice"),
        (["--out.resolutions=8"], "out.resolutions"),
        (["--out.quality=0"], "out.quality"),
        (["--source.splits=train,,val"], "source.splits"),
        (["--source.splits=../train"], "source.splits"),
        (["--out.raw_share=2"], "out.raw_share"),
        (["--out.qualty=90"], "did you mean --out.quality"),
        (["--config-file", f"{ROOT}/rn50_configs/rn50_78.yaml"], "is for train_imagenet.py; give the images and a fol"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(tree, tmp_path, flags, problem):
    result = convert(tree, tmp_path / "out", *flags, status=2)
    assert problem in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_config_for_imagenet_is_valid(tree, tmp_path):
    file = ROOT / "rn50_configs" / "write_imagenet.yaml"
    flags = ("--source.splits=val", "--source.counts=any", "--source.subset=2", "--out.workers=1")
    convert(tree, tmp_path, "--config-file", file, *flags)
    assert {path.name for path in tmp_path.glob("*.beton")} == {"val_256.beton", "val_400.beton", "val_500.beton"}


def test_a_class_missing_in_one_split_is_an_error(tree, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(tree, broken)
    shutil.rmtree(broken / "val" / "n02102040")
    for split in ("train", "val"):
        result = convert(broken, tmp_path / "out", f"--source.splits={split}", status=1)
        assert "class n02102040 is in train but not in val" in result.stderr


def test_places_that_cannot_be_used_are_one_line(tree, tmp_path):
    (tmp_path / "file").write_text("")
    assert "absent" in convert(tmp_path / "absent", tmp_path, status=1).stderr
    assert "cannot write" in convert(tree, tmp_path / "file" / "out", status=1).stderr


def test_a_corrupt_image_stops_the_run_and_can_be_left_out_without_starting_over(tree, tmp_path):
    broken, out = tmp_path / "broken", tmp_path / "out"
    shutil.copytree(tree, broken)
    bad = broken / "train" / "zebra" / "29.JPEG"
    bad.write_bytes(bad.read_bytes()[:-300])
    unended = [broken / "train" / CLASSES[k % 3] / f"{k}.JPEG" for k in range(12)]
    for path in unended:
        path.write_bytes(path.read_bytes()[:-2])
    flags = ("--out.resolutions=64", "--source.splits=train")
    stopped = convert(broken, out, *flags, "--out.workers=2", status=1)
    cut_off = "the picture is cut off: part of the file is missing"
    assert f"cannot decode {bad}: {cut_off}" in stopped.stderr
    assert "skip_corrupt" in stopped.stderr
    assert stopped.stderr.count("\n") == 1
    assert not list(out.glob("*.json"))
    assert convert(broken, out, *flags, status=1).stderr == stopped.stderr
    finished = convert(broken, out, *flags, "--out.workers=1", "--source.skip_corrupt=true")
    assert re.search(r"continuing after \d+ images", finished.stdout)
    skipped, *taken, more = finished.stdout.splitlines()[-12:]
    assert skipped == f"skipped zebra/29.JPEG: {cut_off}"
    assert all(re.fullmatch(r"taken all the same: \w+/\d+.JPEG has no end-of-image marker; .*", line) for line in taken)
    assert more == "and 2 more, listed in the manifests"
    info, problems = verify(out / "train_64.beton")
    assert problems == []
    assert info.num_samples == 59
    assert info.manifest["skipped"] == [{"id": "zebra/29.JPEG", "reason": cut_off}]
    assert {entry["id"] for entry in info.manifest["odd"]} == {f"{path.parent.name}/{path.name}" for path in unended}
    assert info.manifest["class_counts"] == [20, 20, 19]
    convert(broken, tmp_path / "at once", *flags, "--out.workers=3", "--source.skip_corrupt=true")
    assert contents(tmp_path / "at once") == contents(out)


def test_kill_9_at_random_points_changes_nothing(long_tree, long_result, tmp_path):
    pause, continued, lines = random.Random(0), 0, 0
    for _ in range(3):
        process = start(long_tree, tmp_path, *LONG)
        wait_for(partial(has_moved_on, process, tmp_path, lines))
        time.sleep(pause.uniform(0, 0.7))
        lines = journal_lines(tmp_path)
        process.kill()
        said = process.communicate()[0]
        continued += "continuing after" in said
        assert "starting over" not in said
        assert_none_left(process)
    result = convert(long_tree, tmp_path, *LONG)
    assert continued + ("continuing after" in result.stdout) >= 1
    assert contents(tmp_path) == long_result


def test_a_killed_worker_is_an_error_and_not_a_hang(long_tree, long_result, tmp_path):
    process = start(long_tree, tmp_path, *LONG)
    wait_for(lambda: journal_lines(tmp_path) > 1)
    for pid in workers_of(process):
        os.kill(pid, signal.SIGINT)  # Ctrl-C reaches the workers too, and is the parent's business alone
    wait_for(lambda: journal_lines(tmp_path) > 2 or process.poll() is not None)
    assert process.poll() is None, process.communicate()[1]
    os.kill(workers_of(process)[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 1
    assert re.search(r"^error: an encoding worker was killed by SIGKILL;.*memory.*$", errors, re.M)
    assert "Traceback" not in errors
    assert_none_left(process)
    assert "continuing after" in convert(long_tree, tmp_path, *LONG).stdout
    assert contents(tmp_path) == long_result


@pytest.mark.parametrize("when", ["starting", "working"])
@pytest.mark.parametrize(
    ("number", "to_group", "status", "said"),
    [(signal.SIGINT, True, 130, "interrupted"), (signal.SIGTERM, False, 1, "stopped by SIGTERM")],
)
def test_signals_end_it_with_one_line_and_no_orphans(long_tree, tmp_path, when, number, to_group, status, said):
    process = start(long_tree, tmp_path, *LONG)
    if when == "starting":
        wait_for(lambda: workers_of(process))
    else:
        wait_for(lambda: journal_lines(tmp_path) > 1)
    (os.killpg if to_group else os.kill)(process.pid, number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == status, errors
    assert errors.splitlines()[-1].startswith(f"error: {said}")
    assert "Traceback" not in errors
    assert_none_left(process)
    assert not list(tmp_path.glob("*.json"))


def test_a_full_disk_is_one_line_and_the_run_continues_when_there_is_room(long_tree, long_result, tmp_path):
    limit = beton.PAGE_SIZE + 4_000_000

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    result = convert(long_tree, tmp_path, *LONG, status=1, preexec_fn=limited)
    assert re.search(r"^error: no room left to write .*continue$", result.stderr, re.M)
    assert not list(tmp_path.glob("*.json"))
    assert "starting over" not in convert(long_tree, tmp_path, *LONG).stdout
    assert contents(tmp_path) == long_result


def job(tree, out, *rungs):
    cfg = SimpleNamespace(
        source=SimpleNamespace(dir=str(tree), splits="train", subset=0, counts="auto", skip_corrupt=False),
        out=SimpleNamespace(dir=str(out), resolutions=list(rungs), quality=90, raw_share=0.0, workers=1, seed=0),
    )
    return write_dataset.plan(cfg, "train")


def test_the_preflight_refuses_what_does_not_fit(tree, tmp_path, monkeypatch, capsys):
    one, two = job(tree, tmp_path, 64), job(tree, tmp_path, 64, 100)
    estimates = [sum(write_dataset.measure(each)[0].values()) for each in (one, two)]
    free = sum(estimates) // 2
    monkeypatch.setattr(write_dataset.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    write_dataset.preflight([one], str(tmp_path / "not" / "yet"), 1)
    assert "60 images of 3 classes" in capsys.readouterr().out
    with pytest.raises(RunError, match="make room"):
        write_dataset.preflight([two], str(tmp_path), 1)


def test_the_estimate_is_near_the_truth(long_tree, long_result, tmp_path):
    sizes, seconds, staging = write_dataset.measure(job(long_tree, tmp_path, 200, 320))
    for rung, size in sizes.items():
        written = len(long_result[f"train_{rung}.beton"])
        assert written <= size + beton.PAGE_SIZE <= written + 4 * beton.PAGE_SIZE
    assert 0 < seconds < 1
    assert staging == 0


class SlowSource:
    """The first image takes a while; a file a read shows how far the workers went meanwhile."""

    folder = "nowhere"

    def __init__(self, log, data):
        self.log, self.data = str(log), data

    def item(self, i):
        return f"a/{i}.jpg", 0

    def read(self, i):
        if i == 0:
            time.sleep(2)
        with open(self.log, "a") as handle:
            handle.write(f"{i}\n")
        return self.data


def test_a_slow_image_does_not_let_the_rest_pile_up_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "HELD_BYTES", 200_000)
    log = tmp_path / "reads"
    slow = SimpleNamespace(
        source=SlowSource(log, jpeg(0, 320, 240)),
        paths={320: "unused"},
        encoding={"quality": 90, "raw_share": 1.0, "seed": 0},  # 230 kB each: a chunk is beyond the limit
    )
    chunk = encode.CHUNK
    samples = encode.encode_all(slow, np.arange(12 * chunk), 2)
    assert next(samples)[0] == "a/0.jpg"
    # The slow chunk, one received beyond the limit, one finished but not taken, and one begun by the freed worker.
    assert len(log.read_text().splitlines()) <= 4 * chunk
    rest = [sample_id for sample_id, *_ in samples]
    assert rest == [f"a/{k}.jpg" for k in range(1, 12 * chunk)]


def test_imagenette_converts_as_it_is(tmp_path):
    folder = os.environ.get("IMAGENETTE_DIR")
    if not folder:
        pytest.skip("IMAGENETTE_DIR is not set: no real Imagenette images here")
    convert(folder, tmp_path, "--source.subset=100", "--out.resolutions=128,224", "--out.workers=2")
    info, problems = verify(tmp_path / "val_128.beton")
    assert problems == []
    assert (info.num_samples, info.num_classes, info.median_short_side) == (100, 10, 128)
    assert info.classes[0] == {"wnid": "n01440764", "name": "tench"}
