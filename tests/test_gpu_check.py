"""tools/gpu_check.py where there is no GPU: it says so; its judgements and its table are tried without one."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tests.conftest import ROOT
from tools import gpu_check

BY_NAME = {check.name: check for check in gpu_check.CHECKS}


@pytest.mark.skipif("__import__('torch').cuda.is_available()", reason="there is a GPU here")
def test_without_a_gpu_it_is_one_line(tmp_path):
    command = [sys.executable, "tools/gpu_check.py", "--out", tmp_path / "report"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: torch sees no GPU here")
    assert not (tmp_path / "report").exists()


def test_the_checklist_is_what_the_tool_runs():
    assert gpu_check.checklist() in (ROOT / "docs" / "gpu_checklist.md").read_text()


def test_what_the_checks_start_exists():
    for check in gpu_check.CHECKS:
        for word in check.command.split():
            if word.startswith(("tools/", "rn50_configs/")) or word.endswith(".py"):
                assert (ROOT / word).exists(), word


def checker(folder, **given):
    options = {"imagenette": None, "betons": None, "instance": None, "only": None, "gpu_name": "A10G", "commit": "abc"}
    return gpu_check.Checker(SimpleNamespace(out=folder, **options | given), gpus=1, bf16=False)


def a_run(made, name, top1, speed=100.0, epochs=(0, 1, 2), **more):
    folder = made.work / name
    folder.mkdir()
    rows = [{"epoch": k, "top1": top1, "images_per_second": speed, **more} for k in epochs]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def judged(made, name, output="on cuda:0"):
    made.current = BY_NAME[name]
    return made.current.judge(made, output)


def test_runs_are_compared_with_each_other(tmp_path):
    made = checker(tmp_path)
    a_run(made, "fp32", 81.0)
    a_run(made, "bf16", 80.0, speed=150.0)
    assert "1.50 x fp32" in judged(made, "bf16")
    a_run(made, "fp16", 80.0, speed=50.0)
    with pytest.raises(gpu_check.Failed, match="0.50 x"):
        judged(made, "fp16")
    a_run(made, "compile", 70.0)
    with pytest.raises(gpu_check.Failed, match="points apart"):
        judged(made, "compile")
    assert "against 81.58 %" in judged(made, "fp32")  # the run in studies/imagenette_cpu
    with pytest.raises(gpu_check.Failed, match="on cuda"):
        judged(made, "fp32", "resnet18 on cpu")
    a_run(made, "resume", 81.0, epochs=(0, 1, 1, 2))
    with pytest.raises(gpu_check.Failed, match="epochs in the log"):
        judged(made, "resume", "resuming runs at step 9")
    shutil.rmtree(made.work / "resume")
    a_run(made, "resume", 81.0, step=147)
    line = "resuming runs/resume at step 441: after epoch 2 of 22 and {} steps"
    assert "and 20 steps; top-1 81.00 %" in judged(made, "resume", line.format(20))
    for at_the_end_of_one in (0, 147):
        with pytest.raises(gpu_check.Failed, match="not in the middle"):
            judged(made, "resume", line.format(at_the_end_of_one))
    a_run(made, "imagenet_16", 70.0, evaluation={"224": {"single": {"top1": 70.0}}}, elapsed_seconds=7200)
    with pytest.raises(gpu_check.Failed, match="70.00 % at 224 px, single view, after 2.00 h: not within"):
        judged(made, "imagenet_16")


def test_speed_is_compared_with_the_cost_model(tmp_path):
    made = checker(tmp_path)
    row = {"resolution": 224, "training_images_per_second": 800}
    report = {"device": "NVIDIA A10G", "gpus": 1, "resolutions": [row]}
    (made.work / "preflight.json").write_text(json.dumps(report))
    assert "224 px: 800, " in judged(made, "throughput")
    row["training_images_per_second"] = 100
    (made.work / "preflight.json").write_text(json.dumps(report))
    with pytest.raises(gpu_check.Failed, match="below"):
        judged(made, "throughput")


def test_what_passed_is_not_repeated_and_the_report_says_what_was_left_out(tmp_path, monkeypatch, capsys):
    count = f"echo once >>{tmp_path}/count; echo fine"
    good = gpu_check.Check("good", count, "fine", gpu_check.needs_text("fine"))
    bad = gpu_check.Check("bad", "echo broken; exit 3", "", gpu_check.needs_text("."))
    later = gpu_check.Check("later", "true", "", gpu_check.needs_text("."), after=("bad",))
    two = gpu_check.Check("two", "true", "", gpu_check.needs_text("."), needs=("two GPUs", "bf16"))
    for _ in range(2):
        checker(tmp_path / "out").run([good, bad, later, two])
    assert (tmp_path / "count").read_text() == "once\n"
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| good | passed | fine |" in report
    assert "| bad | failed | exit status 3: broken |" in report
    assert "| later | left out | needs bad |" in report
    assert "| two | left out | needs two GPUs, bf16 |" in report
