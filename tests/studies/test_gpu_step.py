"""The study of the GPU's step, on a processor: every candidate makes two steps of a small network."""

import json
import subprocess
import sys

from tests.conftest import ROOT

STUDY = ROOT / "studies/gpu_step/gpu_step.py"
SMALL = ["--device=cpu", "--arch=resnet18", "--resolutions=32", "--batch=2", "--repeats=1", "--seconds=0.001"]
ON_A_PROCESSOR = "fp32,bf16,bf16_dense_blur,fp16_pooled_blur,ffcv,torchvision"


def study(*arguments):
    return subprocess.run([sys.executable, STUDY, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_every_candidate_is_measured(tmp_path):
    report = tmp_path / "step.json"
    done = study(*SMALL, "--warm-up=1", f"--only={ON_A_PROCESSOR}", f"--json={report}")
    assert done.returncode == 0, done.stderr
    found = json.loads(report.read_text())
    assert found["failed"] == {}
    assert [row["name"] for row in found["results"]] == ON_A_PROCESSOR.split(",")
    rows = {row["name"]: row for row in found["results"]}
    assert all(row["images_per_second"] > 0 and row["tflop"] > 0 for row in rows.values())
    # the plain network has fewer operations than one with blurs, and a blur of every pixel more than ours
    assert rows["torchvision"]["gigabytes"] < rows["bf16"]["gigabytes"] <= rows["bf16_dense_blur"]["gigabytes"]


def test_an_unknown_candidate_is_one_line():
    done = study(*SMALL, "--only=fp64")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --only names fp64; there are ")
    assert "Traceback" not in done.stderr
