"""The studies behind the fast path's evidence, as a user runs them, on generated images."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from rn50.files import read_rows
from tests.conftest import ROOT


def run(tool, *arguments, timeout=300):
    command = [sys.executable, ROOT / "studies" / tool, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


def test_the_contact_sheet_shows_both_decodings(betons, tmp_path):
    done = run(
        "decode_accuracy/contact_sheet.py", betons / "train_96.beton", "--out", tmp_path / "s.png", "--resolution", 64
    )
    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    assert words[:5] == ["24", "crops", "at", "64", "px:"]
    assert 0 < float(words[8]) < 2
    sheet = np.asarray(Image.open(tmp_path / "s.png")).reshape(6, 64, 4, 3, 64, 3).astype(int)
    ours, other, difference = (sheet[:, :, :, k] for k in range(3))
    assert ours.std() > 20
    np.testing.assert_array_equal(difference, (128 + 8 * (ours - other)).clip(0, 255))


def test_the_contact_sheet_refuses_what_it_cannot_show(tmp_path):
    done = run("decode_accuracy/contact_sheet.py", tmp_path / "no.beton", "--out", tmp_path / "s.png")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "does not exist" in done.stderr


def test_the_writer_is_measured_beside_stock_ffcv(textures, tmp_path):
    images = min((textures / "train").iterdir())
    arguments = ("--images", images, "--copies", 2, "--repeats", 1, "--workers", 1, "--json", tmp_path / "out.json")
    done = run("writer/benchmark_writer.py", *arguments)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "out.json").read_text())
    assert (figures["images"], figures["workers"], figures["resolutions"]) == (40, 1, [400, 500])
    assert [result["name"] for result in figures["results"]] == ["write_dataset", "ffcv"]
    assert all(result["images_per_second"] > 0 for result in figures["results"])


def test_the_writer_benchmark_needs_images(tmp_path):
    done = run("writer/benchmark_writer.py", "--images", tmp_path)
    assert (done.returncode, done.stderr) == (1, f"error: {tmp_path} holds no images\n")


def test_accuracy_with_either_decoder_is_paired_by_seed(betons, tmp_path):
    arguments = ["--data", betons, "--seeds", "0,1", "--runs", tmp_path / "runs", "--out", tmp_path / "out"]
    arguments += ["--training.epochs=1", "--lr.warmup_epochs=0", "--data.rung=96", "--resolution.start=32"]
    arguments += ["--resolution.end=32", "--validation.resolutions=32", "--validation.headline_resolution=32"]
    done = run("decode_accuracy/decode_accuracy.py", *arguments)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(row["decoder"], row["seed"]) for row in results["runs"]] == [
        ("stock", 0),
        ("ours", 0),
        ("stock", 1),
        ("ours", 1),
    ]
    losses = [row["train_loss"] for row in results["runs"]]
    assert len(set(losses)) == 4  # two decoders and two seeds, not one run four times
    paired = results["ours_minus_stock"]["32"]["paired"]
    of = {(row["decoder"], row["seed"]): row["top1"]["32"] for row in results["runs"]}
    assert paired == pytest.approx([of["ours", seed] - of["stock", seed] for seed in (0, 1)])
    assert "paired t over 2 seeds" in (tmp_path / "out" / "results.md").read_text()
    again = run("decode_accuracy/decode_accuracy.py", *arguments)
    assert again.returncode == 0
    assert len(read_rows(tmp_path / "runs" / "stock_0" / "log.jsonl")) == 1
    assert "img/s" not in again.stdout  # nothing was trained a second time


def test_one_seed_has_no_interval(betons, tmp_path):
    done = run("decode_accuracy/decode_accuracy.py", "--data", betons, "--seeds", "0", "--out", tmp_path)
    assert done.returncode == 2
    assert "--seeds" in done.stderr
