"""Trees, names, files and settings at random: a conversion is right, or one line and nothing half-written.

A few dozen in the suite; thousands by hand: EXAMPLES=3000 pytest tests/test_any_input.py
"""

import os
import re
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import write_dataset
from rn50 import config, recipe
from rn50.data import beton, pictures
from rn50.data.encode import encode_sample
from rn50.data.verify import verify
from rn50.errors import RunError, UsageError
from tests.conftest import ROOT
from tests.odd_pictures import Odd, encoded, odd_pictures, picture

sys.path.insert(0, str(ROOT / "app"))
import inference

MAX = inference.MAX_PIXELS
ODD = odd_pictures()
ORDINARY = {f"{k}.jpeg": picture(k, 24 + 5 * k, 70 - 3 * k) for k in range(8)}
FILES = ODD | {name: Odd(encoded(rgb, "JPEG", quality=95), rgb, near=6) for name, rgb in ORDINARY.items()}

EXTENSIONS = (".jpg", ".JPEG", ".png", ".Jpg", ".webp", ".tif", ".bmp")
NOT_IMAGES = ("notes.txt", ".DS_Store", "._1.jpg", "Thumbs.db", "checksums", "1.jpg.part", "1.heic")
# Characters that people's names have, and some that programs stumble over.
CHARACTERS = st.sampled_from("abcXYZ019 _-.~$%'\"\\()[]{}&;#@!+=,äßéñ漢字🙂\n\t")
FEW = {
    "max_examples": int(os.environ.get("EXAMPLES", 40)),
    "derandomize": "EXAMPLES" not in os.environ,
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}


def stems(longest):
    """Names as bytes: of characters, or of any bytes but those that no name can have."""
    text = st.text(CHARACTERS, min_size=1, max_size=30).map(lambda name: name.encode())
    wild = st.binary(min_size=1, max_size=20).map(lambda name: name.replace(b"\0", b"x").replace(b"/", b"y"))
    long = st.integers(200, longest).map(lambda length: b"n" * length)
    return st.one_of(text, text, wild, long).filter(lambda name: not name.startswith(b"."))


@st.composite
def classes(draw):
    """{class, bytes: {path within it, bytes: key of FILES}}"""
    # of one class alone, its folders could be the classes
    names = draw(st.lists(stems(255), min_size=2, max_size=3, unique=True))
    tree = {}
    for name in names:
        files = {}
        for _ in range(draw(st.integers(1, 5))):
            folder = draw(st.sampled_from([b"", b"", b"", b"images/", b"a b/c/"]))
            extension = draw(st.sampled_from(EXTENSIONS)).encode()
            files[folder + draw(stems(250)) + extension] = draw(st.sampled_from(sorted(FILES)))
        tree[name] = files
    return tree


@st.composite
def flags(draw):
    """(flags that are right, and perhaps one that is wrong; whether all are right)"""
    rungs = draw(st.lists(st.integers(16, 80), min_size=1, max_size=2, unique=True))
    chosen = [
        f"--out.resolutions={','.join(map(str, rungs))}",
        f"--out.quality={draw(st.integers(85, 100))}",
        f"--out.raw_share={draw(st.sampled_from([0, 0.5, 1]))}",
        f"--out.seed={draw(st.integers(0, 9))}",
    ]
    wrong = draw(
        st.sampled_from(
            [None] * 9
            + [
                "--out.resolutions=64,64",
                "--out.resolution=64",
                "--out.quality=0",
                "--out.raw_share=x",
                "--source.splits=a/b",
                "--out.seed=-1",
                "--source.subset=1.5",
            ]
        )
    )
    chosen = [flag for flag in chosen if not wrong or flag.split("=")[0] != wrong.split("=")[0]]
    return [*chosen, *([wrong] if wrong else [])], rungs, wrong is None


def write(path, data):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(data)


def run(monkeypatch, *argv):
    """The error that the command ends with, or None; with the real encoder, but not in processes of its own."""
    monkeypatch.setattr(sys, "argv", ["write_dataset.py", *map(str, argv)])
    monkeypatch.setattr(
        write_dataset,
        "encode_all",
        lambda job, order, workers: (encode_sample(job.source, int(i), list(job.paths), job.encoding) for i in order),
    )
    try:
        write_dataset.main()
    except (RunError, UsageError) as error:
        return error
    return None


def shrunk(shape, side):
    height, width = shape
    longer = max(height, width)
    return (height, width) if longer <= side else (max(1, height * side // longer), max(1, width * side // longer))


def check(out, tree, rungs, quality_of_pixels=30):
    """Every picture that can be read is there once, under its class, with its size and its colours."""
    expected = []
    for label, name in enumerate(sorted(tree, key=os.fsdecode)):
        for key in tree[name].values():
            if FILES[key].shown is not None:
                expected.append((label, FILES[key].shown))
    for rung in rungs:
        path = out / f"train_{rung}.beton"
        info, problems = verify(path)
        assert problems == []
        found = list(zip(info.labels.tolist(), info.heights.tolist(), info.widths.tolist(), strict=True))
        assert sorted(found) == sorted((label, *shrunk(shown.shape[:2], rung)) for label, shown in expected)
        colours = [(label, *shown.mean((0, 1))) for label, shown in expected]
        data = path.read_bytes()
        for k in range(info.num_samples):
            stored = data[int(info.data_ptrs[k]) : int(info.data_ptrs[k] + info.sizes[k])]
            size = int(info.heights[k]), int(info.widths[k])
            raw = info.modes[k] == beton.RAW
            rgb = np.frombuffer(stored, np.uint8).reshape(*size, 3) if raw else pictures.decode_stored(stored, *size)
            mean = rgb.mean((0, 1))
            distances = [np.abs(mean - other[1:]).max() for other in colours if other[0] == info.labels[k]]
            assert min(distances) < quality_of_pixels


@settings(**FEW)
@given(
    tree=classes(),
    flags=flags(),
    skip=st.booleans(),
    junk=st.lists(st.sampled_from(NOT_IMAGES), max_size=3),
    root_name=stems(250).filter(lambda name: b"$" not in name),  # tests/test_paths.py
)
def test_any_tree_is_converted_rightly_or_refused_in_one_line(tree, flags, skip, junk, root_name):
    flags, rungs, valid = flags
    folder = Path(tempfile.mkdtemp())
    try:
        root, out = folder / os.fsdecode(root_name), folder / "out"
        for name, files in tree.items():
            for path, key in files.items():
                write(os.path.join(os.fsencode(root), b"train", name, path), FILES[key].data)
            for extra in junk:
                write(os.path.join(os.fsencode(root), b"train", name, extra.encode()), b"not a picture")
        argv = [
            f"--source.dir={root}",
            f"--out.dir={out}",
            "--source.splits=train",
            f"--source.skip_corrupt={skip}",
            *flags,
        ]
        readable = [FILES[key].shown is not None for files in tree.values() for key in files.values()]
        with pytest.MonkeyPatch.context() as monkeypatch, warnings.catch_warnings():
            warnings.simplefilter("error")
            error = run(monkeypatch, *argv)
            written = sorted(path.name for path in out.glob("*")) if out.exists() else []
            if not valid:
                assert isinstance(error, UsageError)
                assert not written
                return
            if all(readable) or (skip and any(readable)):
                assert error is None
                assert written == sorted(f"train_{rung}.{kind}" for rung in rungs for kind in ("beton", "json"))
                check(out, tree, rungs)
                before = {path.name: path.read_bytes() for path in out.iterdir()}
                assert run(monkeypatch, *argv, "--out.workers=3") is None
                assert before == {path.name: path.read_bytes() for path in out.iterdir()}
            else:
                assert isinstance(error, RunError)
                assert not [name for name in written if name.endswith((".beton", ".json"))]
                assert re.search(
                    r"cannot decode .*: the (picture|file) |none of \d+ images tried", str(error), re.DOTALL
                )
    finally:
        shutil.rmtree(folder)


@settings(**FEW | {"max_examples": 5 * FEW["max_examples"]})
@given(name=st.sampled_from(sorted(FILES)), data=st.data())
def test_any_damage_to_a_file_is_said_in_words_or_changes_no_reading(name, data):
    """And the converter and the page say the same of it."""
    content = bytearray(FILES[name].data)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(0, len(content) - 1)))
        change = data.draw(st.sampled_from(["flip", "cut", "remove", "insert", "zero"]))
        if change == "flip" and content:
            content[at] ^= 1 << data.draw(st.integers(0, 7))
        elif change == "cut":
            del content[at:]
        elif change == "remove":
            del content[at : at + data.draw(st.integers(1, 50))]
        elif change == "insert":
            content[at:at] = data.draw(st.binary(max_size=30))
        else:
            length = min(data.draw(st.integers(1, 400)), len(content) - at)
            content[at : at + length] = bytes(length)
    ours = outcome(
        lambda given: pictures.decode_image(given, formats=inference.FORMATS, max_pixels=MAX), bytes(content)
    )
    theirs = outcome(lambda given: np.asarray(inference.decode_image(given)), bytes(content))
    if isinstance(ours, str):
        assert re.match(r"the (picture|file) \w", ours)
    if isinstance(theirs, str):
        assert re.match(r"The .*\.$", theirs, re.DOTALL)
        assert isinstance(ours, str) or "too many parts" in theirs
    else:
        assert theirs.dtype == np.uint8
        assert (theirs == ours).all()


def outcome(read, data):
    """The pixels, or the words of the refusal."""
    try:
        return read(data)
    except ValueError as error:
        return str(error)


# --- Settings of a training -------------------------------------------------------------------------------------------

KEYS = sorted(".".join(path) for path in recipe.SETTINGS.entries)
VALUES = st.one_of(
    st.sampled_from(
        [
            "",
            "nan",
            "inf",
            "-1",
            "0",
            "1",
            "2",
            "0.5",
            "1e400",
            "true",
            "no",
            "[1, 2]",
            "{}",
            "null",
            "~",
            "1_000",
            "0x10",
        ]
        + [
            "224",
            "128,224",
            "auto",
            "a: b",
            "'",
            "ü",
            "$NOT_SET_ANYWHERE",
            "s3://bucket/x",
            "None",
            "1,",
            "cosine",
            "step",
        ]
    ),
    st.integers(-5, 500).map(str),
    st.floats().map(str),
    st.text(CHARACTERS, max_size=8),
)


@settings(**FEW | {"max_examples": 4 * FEW["max_examples"]})
@given(values=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4), from_file=st.booleans())
def test_any_settings_make_a_schedule_or_one_line(values, from_file):
    with tempfile.TemporaryDirectory() as folder:
        argv = ["--config-file", str(ROOT / "rn50_configs/demo.yaml"), "--data.dir=x"]
        if from_file:
            sections = {}
            for key, value in values.items():
                section, _, name = key.partition(".")
                sections.setdefault(section, []).append(f"  {name}: {value}\n")
            text = "".join(f"{section}:\n{''.join(lines)}" for section, lines in sections.items())
            path = Path(folder, "mine.yaml")
            path.write_text(text or "{}", encoding="utf-8")
            argv += ["--config-file", str(path)]
        else:
            argv = [flag for flag in argv if flag.partition("=")[0].removeprefix("--") not in values]
            argv += [f"--{key}={value}" for key, value in values.items()]
        try:
            cfg = recipe.load("a training", argv)
        except UsageError:
            return
        steps = np.linspace(0, cfg.training.epochs, 50)[:-1]
        assert all(0 <= recipe.learning_rate(cfg, epoch) < np.inf for epoch in steps)
        assert all(recipe.resolution(cfg, int(epoch)) >= 1 for epoch in steps)
        again = Path(folder, "again.yaml")
        again.write_text(yaml.safe_dump(config.to_dict(cfg)), encoding="utf-8")
        assert recipe.load("a training", ["--config-file", str(again)]) == cfg
