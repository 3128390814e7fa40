"""studies/proxy_study/proxy_study.py: equal compute, paired differences, and runs that are never made twice."""

import json

import numpy as np
import pytest
import yaml

from rn50.data import decode
from rn50.errors import RunError, UsageError
from rn50.files import read_rows
from studies.proxy_study import proxy_study, variants
from studies.proxy_study.proxy_study import ARMS, CONFIG, IDEAS, PARTS
from tests.conftest import ROOT
from tests.studies.test_decode_tools import run
from tests.test_train_imagenet import load


def row(arm, seed, top1, **changed):
    settings = {key: str(value) for key, value in PARTS[arm].items()}
    plain = {"top1": top1, "images": 3925, "megapixels": 89.1, "cpu_seconds": 300.0, "settings": settings}
    return {"arm": arm, "seed": seed, **plain, **changed}


@pytest.mark.parametrize("arms", ARMS.values(), ids=ARMS)
def test_every_arm_is_one_change_at_equal_pixels(arms):
    seen = {}
    for arm, changes in arms.items():
        flags = [f"--{key}={value}" for key, value in changes.items() if key != "variant"]
        cfg = load(["--config-file", str(CONFIG), "--data.dir=betons", *flags])
        config = {"training": vars(cfg.training), "resolution": vars(cfg.resolution)}
        seen[arm] = proxy_study.megapixels(config, cfg.training.epochs * 9408)
    assert seen["baseline"] == pytest.approx(3 * 9408 * 56**2 / 1e6)
    for pixels in seen.values():
        assert pixels == pytest.approx(seen["baseline"], rel=0.015)
    plain = yaml.safe_load(CONFIG.read_text())
    assert plain["training"]["label_smoothing"] == 0


def test_differences_are_paired_by_seed_and_a_part_of_the_study_says_what_is_missing(tmp_path):
    rows = [row("baseline", seed, top1) for seed, top1 in enumerate((50.0, 52.0, 54.0))]
    rows += [row("ema", seed, top1, cpu_seconds=330.0) for seed, top1 in enumerate((51.0, 54.0, 55.0))]
    rows += [row("bce", 0, 40.0), row("bce", 1, 41.0), row("bce", 2, 45.0), row("blurpool", 2, 50.0)]
    text = proxy_study.write(rows, [0, 1, 2], tmp_path, PARTS)
    # differences 1, 2, 1: mean 4/3, standard deviation 0.577, t = 4.303
    assert "| ema | 51.00 | 54.00 | 55.00 | +1.33 (-0.10 to +2.77; 3 pairs) | 89 | 1.10 |" in text
    assert "| blurpool | - | - | 50.00 | -4.00 (1 pair: no interval) | 89 | 1.00 |" in text
    assert "| progressive | - | - | - |  | - |  |" in text
    assert text.startswith("# Proxy study: 10 of 18 runs")
    assert "**8 runs are missing**" in text
    assert "- worse than the baseline here: bce" in text
    assert "- not told apart from the baseline: ema" in text
    assert "- better than the baseline here: none" in text
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["missing"] == 8
    assert results["minus_baseline"]["bce"]["paired"] == [-10.0, -11.0, -9.0]


def test_a_run_becomes_a_line_that_is_not_made_again(betons, tmp_path):
    done = [row(arm, seed, 50.0) for seed in (0, 1) for arm in PARTS]
    short = ["--training.epochs=1", "--lr.warmup_epochs=0", "--data.rung=96", "--training.batch_size=40"]
    short += ["--training.micro_batch=40", "--resolution.start=32", "--resolution.end=32"]
    short += ["--validation.resolutions=32", "--validation.headline_resolution=32"]
    for line in done:
        line["settings"] = proxy_study.settings_of(PARTS[line["arm"]], short)
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in done[1:]))
    arguments = ["--data", betons, "--seeds", "0,1", "--runs", tmp_path / "runs", "--out", tmp_path, *short]
    made = run("proxy_study/proxy_study.py", *arguments)
    assert made.returncode == 0, made.stderr
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["baseline_0"]
    lines = read_rows(tmp_path / "runs.jsonl")
    assert lines[:-1] == done[1:]
    assert (lines[-1]["arm"], lines[-1]["seed"], lines[-1]["epochs"], lines[-1]["images"]) == ("baseline", 0, 1, 110)
    assert lines[-1]["megapixels"] == round(200 * 32**2 / 1e6, 1)
    assert "12 of 12 runs" in (tmp_path / "results.md").read_text()


def test_other_settings_need_another_folder(monkeypatch, tmp_path):
    (tmp_path / "runs.jsonl").write_text(json.dumps(row("ema", 0, 50.0)) + "\n")
    monkeypatch.setattr("sys.argv", ["proxy_study.py", "--data", "x", "--out", str(tmp_path), "--training.epochs=9"])
    with pytest.raises(RunError, match="has runs of ema with other settings"):
        proxy_study.main()


def test_what_is_not_a_setting_or_has_no_interval_is_refused(monkeypatch, tmp_path):
    for given, words in ((["--seeds", "0"], "--seeds"), (["--seeds", "1,1"], "--seeds"), (["--fast"], "'--fast'")):
        monkeypatch.setattr("sys.argv", ["proxy_study.py", "--data", "x", "--out", str(tmp_path), *given])
        with pytest.raises(UsageError, match=words):
            proxy_study.main()
    monkeypatch.setattr("sys.argv", ["proxy_study.py", "--data", "x", "--out", str(tmp_path), "--report"])
    with pytest.raises(RunError, match="has no runs to report"):
        proxy_study.main()


def test_a_variant_is_trained_by_the_same_script(betons, tmp_path):
    """Alternating flips: the second epoch mirrors what the first did not."""
    flags = ["--data", betons, "--arms", "ideas", "--seeds", "0,1", "--runs", tmp_path / "runs", "--out", tmp_path]
    short = ["--lr.warmup_epochs=0", "--data.rung=96", "--training.batch_size=40", "--training.micro_batch=40"]
    short += ["--validation.resolutions=32", "--validation.headline_resolution=32"]
    rows = []
    for seed in (0, 1):
        for arm, changes in IDEAS.items():
            if (arm, seed) != ("interleaved", 0):
                plain = {
                    "top1": 50.0,
                    "images": 3925,
                    "megapixels": 89.1,
                    "cpu_seconds": 300.0,
                    "arm": arm,
                    "seed": seed,
                }
                rows.append(plain | {"settings": proxy_study.settings_of(changes, short)})
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = run("proxy_study/proxy_study.py", *flags, *short)
    assert made.returncode == 0, made.stderr
    log = read_rows(tmp_path / "runs" / "interleaved_0" / "log.jsonl")
    assert [row["resolution"] for row in log] == [40, 56, 40, 56]
    assert " against ramped |" in (tmp_path / "results.md").read_text()


def test_alternating_flips_mirror_every_image_in_every_other_epoch(monkeypatch):
    monkeypatch.setattr(decode, "random_crops", decode.random_crops)
    plain, sides = decode.random_crops, np.full(1000, 64)
    variants.alternating_flip()
    given = {"size": 32, "scale": (0.08, 1), "seed": 3}
    first, second, third = (
        decode.random_crops(sides, sides, np.arange(1000), epoch=epoch, **given) for epoch in (0, 1, 2)
    )
    assert (first["flip"] != second["flip"]).all()
    assert (first["flip"] == third["flip"]).all()
    assert 0.45 < first["flip"].mean() < 0.55
    drawn = plain(sides, sides, np.arange(1000), epoch=1, **given)
    assert all((second[key] == drawn[key]).all() for key in drawn.dtype.names if key != "flip")


@pytest.mark.parametrize(("arms", "folder"), [(PARTS, "."), (IDEAS, "ideas")])
def test_the_committed_results_are_what_the_committed_runs_say(tmp_path, arms, folder):
    folder = ROOT / "studies/proxy_study" / folder
    text = proxy_study.write(read_rows(folder / "runs.jsonl"), [0, 1, 2], tmp_path, arms)
    assert text == (folder / "results.md").read_text()
