"""studies/loader/benchmark_loader.py as a user runs it, on a few generated images."""

import json
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT


def run(*arguments):
    command = [
        sys.executable,
        ROOT / "studies/loader/benchmark_loader.py",
        "--resolution",
        "32",
        "--repeats",
        "1",
        *arguments,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


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
