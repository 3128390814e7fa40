"""studies/loader/benchmark_loader.py as a user runs it, on a few generated images."""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from rn50.errors import RunError, UsageError
from studies.loader import benchmark_loader as script
from tests.conftest import ROOT


def run(*arguments, at=("--resolution", "32")):
    command = [sys.executable, ROOT / "studies/loader/benchmark_loader.py", *at, "--repeats", "1", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


@pytest.fixture
def six_images(tmp_path):
    (tmp_path / "images").mkdir()
    for k in range(6):
        picture = np.random.default_rng(k).integers(0, 256, (60, 80, 3), np.uint8)
        cv2.imwrite(str(tmp_path / "images" / f"{k}.jpg"), picture)
    return tmp_path / "images"


def test_it_measures_and_profiles(textures, tmp_path):
    images = min((textures / "train").iterdir())
    done = run(
        "--images", images, "--only", "rn50,rn50_untiled,torchvision_v2", "--json", tmp_path / "out", "--profile"
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "out").read_text())
    assert (figures["resolution"], figures["threads"], figures["images"]) == (32, 1, 20)
    assert [result["name"] for result in figures["results"]] == ["rn50", "rn50_untiled", "torchvision_v2"]
    for result in figures["results"]:
        assert 0 < result["min"] <= result["images_per_second"] <= result["max"]
        assert len(result["passes"]) == 1  # without the one that warms up
    assert "assemble and decode" in done.stdout


def test_cold_reads_from_disk(textures):
    images = min((textures / "train").iterdir())
    done = run("--images", images, "--cold", "--copies", "3")
    assert done.returncode == 0, done.stderr
    assert "MB/s" in done.stdout


def test_scaling_and_memory(textures):
    images = min((textures / "train").iterdir())
    done = run("--images", images, "--scaling")
    assert done.returncode == 0, done.stderr
    gain, hashing, ratio = map(
        float, re.search(r"rn50 ([\d.]+)x .* hashing ([\d.]+)x; ratio (.+)", done.stdout).groups()
    )
    assert ratio == pytest.approx(gain / hashing, rel=0.02)
    done = run("--images", images, "--memory", "--copies", "60")
    assert done.returncode == 0, done.stderr
    ours, stock = (float(row.split()[1]) for row in done.stdout.splitlines()[-2:])
    # No bound from the size of a batch: what the process had and freed before it is used again, not added.
    assert 0 < ours < stock


def test_bad_input_is_one_line(textures, tmp_path):
    assert run("--images", tmp_path).stderr == f"error: {tmp_path} holds no images\n"
    images = min((textures / "train").iterdir())
    done = run("--images", images, "--only", "rn50,dally")
    assert done.returncode == 1
    assert "--only names dally" in done.stderr
    assert run("--images", tmp_path / "nowhere").stderr == f"error: {tmp_path / 'nowhere'} is no folder\n"


def test_each_loader_runs_in_its_process_and_a_missing_one_is_a_line(six_images, tmp_path):
    without = tmp_path / "python"  # an interpreter without any package
    without.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    without.chmod(0o755)
    loaders = "rn50,slipstream_jpeg,torchvision_pil,slipstream_yuv420"
    done = run(
        "--images", six_images, "--only", loaders, "--python", f"slipstream={without}", at=("--resolution", "32,48")
    )
    assert done.returncode == 0, done.stderr
    tables = re.findall(r"^(\d+) px, 1 thread, 6 images a pass", done.stdout, re.M)
    assert tables == ["32", "48"]
    rows = re.findall(r"^(rn50|torchvision_pil) +\d+ ", done.stdout, re.M)
    assert sorted(rows) == ["rn50", "rn50", "torchvision_pil", "torchvision_pil"]
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"slipstream is skipped, {without} cannot import it (No module named ")
    assert "studies/loader/README.md" in done.stderr


def test_a_schedule_reads_the_rungs_of_training(six_images, tmp_path):
    recipe = ("--schedule", ROOT / "rn50_configs/rn50_78.yaml")
    done = run("--images", six_images, "--only", "rn50,rn50_500", "--json", tmp_path / "out", at=recipe)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "out").read_text())
    assert sum(figures["epochs"].values()) == 94
    assert set(figures["rungs"].values()) == {500}  # no rung of these small images is large enough
    assert [each["resolution"] for each in figures["measurements"]] == [88, 176]
    assert {row["name"]: row["rn50_is"] for row in figures["weighted"]}["rn50"] == 1
    assert "94 epochs; rn50 88 to 176 px from 500" in done.stdout


def test_the_mean_over_a_schedule_is_linear_between_the_nodes_of_a_rung():
    rungs = {10: 256, 20: 256, 40: 256, 44: 400}
    assert script.nodes(rungs) == [10, 40, 44]
    # at 20 px a third of the way from 1 s to 4 s: 2 s; so (2 x 1 + 1 x 2 + 1 x 4 + 4 x 6) / 8
    epochs = {10: 2, 20: 1, 40: 1, 44: 4}
    assert script.mean_seconds(epochs, rungs, {10: 1.0, 40: 4.0, 44: 6.0}) == pytest.approx(4.0)


def test_a_process_that_fails_is_one_line(tmp_path, monkeypatch):
    args = SimpleNamespace(threads=1, copies=1)
    with pytest.raises(RunError, match="^/nowhere, the interpreter of erow, cannot be run: No such file"):
        script.LoaderProcess("erow", "/nowhere", tmp_path, args)
    for name, does, message in (
        ("dies", "echo broken >&2; exit 3", "the process of dies ended: broken"),
        ("fails", """read px; echo '{"error": "ValueError: no"}'""", "fails failed at 32 px: ValueError: no"),
        ("hangs", "exec sleep 60", "hangs gave no answer for 0.2 s"),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
        process = script.LoaderProcess(name, tmp_path / name, tmp_path, args)
        monkeypatch.setattr(script, "PATIENCE", 0.2 if name == "hangs" else 20)
        with pytest.raises(RunError, match=message):
            process.run_pass(32)
        process.stop()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--python", "fast=python"],
            "with a package of dali, erow, ffcv, slipstream, torchvision, not fast=python",
        ),
        (["--python", "erow"], "PACKAGE=PATH"),
        (["--cold", "--resolution", "32,48"], "--cold takes one --resolution"),
        (["--profile", "--schedule", "recipe.yaml"], "--profile takes one --resolution"),
    ],
)
def test_what_the_command_line_cannot_mean(words, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmark_loader.py", "--images", "images", *words])
    with pytest.raises(UsageError, match=message):
        script.arguments()


def test_versions_of_the_decoder_are_compared(betons, tmp_path):
    source, (brighter, broken) = ROOT / "rn50/data/csrc/decode.c", (tmp_path / name for name in ("a.c", "b.c"))
    brighter.write_text(source.read_text().replace("x[0][0] += 128", "x[0][0] += 138"))
    broken.write_text("int")
    command = [sys.executable, ROOT / "studies/loader/compare_decoders.py", betons / "train_96.beton", source]
    options = ["--any", "--count", "20", "--repeats", "1", "--resolution", "24"]
    done = subprocess.run([*command, brighter, *options], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()[2:]
    assert first.split()[3:] == ["1.00x", "0.000", "0.00"]
    assert 5 < float(second.split()[4]) <= float(second.split()[5]) < 60
    for wrong, problem in ((broken, "b.c does not compile"), (tmp_path / "c.c", "c.c does not compile")):
        done = subprocess.run([*command, wrong, *options], capture_output=True, text=True, timeout=100)
        assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
        assert problem in done.stderr
