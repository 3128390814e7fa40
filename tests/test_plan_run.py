"""tools/plan_run.py and tools/preflight.py as a student runs them."""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rn50 import choices
from rn50.data.loaders import find_rungs
from rn50.errors import RunError, UsageError
from rn50.learner import Learner
from rn50.planning import costs, plan_plot, projection, speeds
from tests.conftest import ROOT
from tests.test_train_imagenet import load
from tools import plan_run, preflight

KEYS = {"instance", "recipe", "hours", "dollars", "dollars_low", "dollars_high", "top1", "top1_low", "top1_high"}
KEYS |= {"evaluation", "probability_of_target", "limited_by", "basis"}


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    command = [sys.executable, ROOT / "tools" / "plan_run.py", "--budget", "40", "--target", "78"]
    command += ["--json", folder / "plan.json", "--plot", folder / "plan.svg", "--proposal", folder / "proposal.md"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, folder


def joined(lines):
    """What was said, however it was broken into lines."""
    return " ".join(" ".join(lines).split())


def test_the_first_line_is_a_recommendation_and_the_second_what_it_is_worth(planned):
    text = joined(planned[0].splitlines())
    rows = json.loads((planned[1] / "plan.json").read_text())
    stages = f"in two stages, rn50_mild_28 and {rows[0]['recipe']} on {rows[0]['instance']}"
    assert text.startswith(f"Recommended: {stages}")
    assert rows[0]["probability_after_acceptance"] >= 0.9
    assert rows[0]["both"]["dollars_high"] <= 40
    sure = [row for row in rows if row["both"] and row["probability_after_acceptance"] >= 0.9]
    assert all(rows[0]["both"]["dollars_high"] <= row["both"]["dollars_high"] for row in sure)
    worth = text.index("Projected from published figures; no ImageNet run has been made with this code yet.")
    assert worth < text.index("The plan, on one ")


def test_the_plan_has_two_stages_their_total_and_what_it_rests_on(planned):
    lines = planned[0].splitlines()
    text, rows = joined(lines), json.loads((planned[1] / "plan.json").read_text())
    of = {row["recipe"]: row for row in rows if row["instance"] == "g5.xlarge"}
    first, second = of["rn50_mild_28"], of["rn50_78"]
    assert f" 1. rn50_mild_28: {first['hours']:.0f} h, ${first['dollars']:.0f} (" in text
    assert f" 2. rn50_78: {second['hours']:.0f} h, ${second['dollars']:.0f} (" in text
    total = first["dollars"] + second["dollars"]
    assert f" Both: {first['hours'] + second['hours']:.0f} h, ${total:.0f} (" in text
    assert second["both"]["dollars"] == pytest.approx(total, abs=0.01)
    assert "Go on at 75.8 % or more: P = 0.66." in text
    chances = second["probability_after_acceptance"], second["probability_of_target"]
    assert "P(>= 78) = {:.2f} after a passed first stage, {:.2f} before anything is known.".format(*chances) in text
    table = lines[lines.index(next(line for line in lines if line.startswith("What P(>= 78) of rn50_78 rests on"))) :][
        2:11
    ]
    assert [line.split()[-2:] for line in table[:1]] == [[f"{chance:.2f}" for chance in chances]]
    assert table[-1].split()[-1] == f"{second['probability_of_target']:.2f}"


def test_it_fits_a_terminal_of_80_columns_and_no_column_is_glued_to_the_next(planned, capsys):
    lines = planned[0].splitlines() + plan(capsys, "--budget", "25", "--target", "78", "--spot", "--elsewhere")
    assert [line for line in lines if len(line) > 80 and not line.startswith("wrote ")] == []
    assert "recipe                  hours  dollars (range)   top-1 (range)           P after" in lines
    row = next(line for line in lines if re.match(r"rn50_78 +\d", line))
    assert re.fullmatch(r"rn50_78 +[\d.]+  [\d.]+ \(\d+ to \d+\) +[\d.]+ \([\d.]+ to [\d.]+\) +0\.\d\d +0\.\d\d", row)
    assert not any(line.strip() == "%" for line in lines)


def test_twenty_five_dollars_are_not_enough_on_demand_and_that_is_said_first(capsys):
    text = joined(plan(capsys, "--budget", "25", "--target", "78"))
    assert text.startswith("$25 is not safe for 78 %: it costs more than that in two stages, rn50_mild_28 and rn50_78")
    assert "Spot machines cost less: see --spot. The most that $25 surely buys: rn50_mild_28 and rn50_mild_60" in text
    said = "Without the first stage no recipe here has 0.9 for $25 or less: rn50_78 has 0.76 for $21, "
    assert f"{said}rn50_medium_135 has 0.93 for $30" in text


def test_on_spot_the_plan_is_the_machine_that_every_page_names(capsys):
    """Its neighbour is projected 3 % cheaper, and may cost more."""
    text = joined(plan(capsys, "--budget", "25", "--target", "78", "--spot"))
    assert text.startswith(
        "Recommended: in two stages, rn50_mild_28 and rn50_78 on g5.2xlarge (spot): about 28 h and $13"
    )


def test_other_places_are_shown_when_asked_for(capsys):
    assert not any("Hugging Face" in line for line in plan(capsys, "--budget", "25", "--target", "78"))
    lines = plan(capsys, "--budget", "25", "--target", "78", "--elsewhere")
    table = lines[lines.index("rn50_78 elsewhere (tools/ does not launch there; betons must be brought)") :]
    places = [line for line in table if line.startswith("Hugging Face Jobs")]
    assert len(places) == len(costs.read_table().place)
    assert places[0].startswith("Hugging Face Jobs a100-large    2.50")
    assert "nobody has published training on L40S" in table[-1]


def test_every_row_has_what_was_promised(planned):
    rows = json.loads((planned[1] / "plan.json").read_text())
    assert len({(row["instance"], row["recipe"]) for row in rows}) == len(rows) == 15 * 14
    for row in rows:
        assert set(row) >= KEYS
        assert row["dollars_low"] < row["dollars"] < row["dollars_high"]
        assert row["top1_low"] < row["top1"] < row["top1_high"]
        assert row["limited_by"] in ("GPU", "CPU", "disk", "memory")
        assert row["evaluation"] == "224 px single view"
        assert "hours +-" in row["basis"]


def test_p3_is_there_with_the_reason_why_not_and_unmeasured_gpus_say_so(planned):
    lines, text = planned[0].splitlines(), joined(planned[0].splitlines())
    assert re.search(r"p3\.2xlarge: not this one: [\d.]+ x the dollars of g5\.xlarge; the pinned PyTorch has no", text)
    assert "g6e.xlarge, g6e.2xlarge, g6e.12xlarge: nobody has published training on L40S" in text
    table = lines[lines.index("How wrong the hours may be: every published run predicted without its own source") :]
    assert any(line.startswith("Sagar063") and "88.00" in line for line in table)
    assert "abhi1021" in text[text.index("Not counted, and why") :]
    assert "A10G 731 (2)" in text
    assert "median of the sources: 14%" in text


def test_a_machine_that_the_pinned_pytorch_does_not_run_on_is_never_recommended(capsys):
    assert torch.cuda.get_arch_list()
    assert "sm_70" not in torch.cuda.get_arch_list()
    alone = plan(capsys, "--budget", "100", "--target", "78", "--instance", "p3.2xlarge")
    assert joined(alone).startswith("Not on p3.2xlarge: the pinned PyTorch has no code for a V100")
    with pytest.raises(UsageError, match="--proposal: not for p3.2xlarge"):
        plan(capsys, "--budget", "100", "--target", "78", "--instance", "p3.2xlarge", "--proposal", "none.md")


def test_the_readme_quotes_this_plan(tmp_path, capsys):
    out = tmp_path / "plan.json"
    plan(capsys, "--spot", "--instance", "g5.2xlarge", "--budget", "25", "--target", "78", "--json", str(out))
    rows = json.loads(out.read_text())
    readme = (ROOT / "README.md").read_text()
    assert len(rows) == 14
    for row in rows:
        money = f"{row['hours']:.0f} h, ${row['dollars']:.0f} (${row['dollars_low']:.0f} to ${row['dollars_high']:.0f})"
        accuracy = f"{row['top1']:.1f} % ({row['top1_low']:.1f} to {row['top1_high']:.1f})"
        (line,) = [line for line in readme.splitlines() if f"[`{row['recipe']}`](rn50_configs/" in line]
        assert f"| {accuracy} |" in line
        assert line.endswith(f"| {money} |")


def test_the_picture_stars_the_plan_and_greys_the_rest(planned):
    assert (planned[1] / "plan.svg").read_text().startswith("<?xml")
    assert f"wrote {planned[1] / 'plan.svg'}" in planned[0]
    rows = json.loads((planned[1] / "plan.json").read_text())
    figure = plan_plot.draw(rows, budget=40, target=78, priced="on demand", basis="Projected")
    (axis,) = figure.axes
    line, (star,) = axis.lines[2], [line for line in axis.lines if line.get_marker() == "*"]
    assert [star.get_xdata()[0], star.get_ydata()[0]] == [rows[0]["both"]["dollars"], rows[0]["top1"]]
    assert all(np.diff(line.get_xdata()) > 0)
    assert all(np.diff(line.get_ydata()) > 0)
    assert figure.get_suptitle() == "Projected."
    figure.draw_without_rendering()
    said = {text.get_text(): text.get_window_extent() for text in axis.texts}
    assert "rn50_78 on g5.xlarge on demand, $27" in said
    named = [text for text in said if text in {row["instance"] for row in rows}]
    assert 1 < len(named) < plan_plot.NAMED
    flat = [box for text, box in said.items() if text not in named]
    assert not any(box.overlaps(other) for index, box in enumerate(flat) for other in flat[:index])
    assert axis.get_xlim()[1] == 4 * 40
    shade = axis.collections[0].get_paths()[0].get_extents()
    assert (shade.x1, shade.y0) == (40, 78)
    plan_plot.plt.close(figure)


@pytest.mark.parametrize(("budget", "target", "instance"), [(4, 60, None), (9999, 90, None), (25, 78, "p3.2xlarge")])
def test_the_picture_of_an_odd_plan_shows_its_star(planned, budget, target, instance):
    rows = json.loads((planned[1] / "plan.json").read_text())
    rows = projection.ranked([row for row in rows if instance in (None, row["instance"])], budget)
    figure = plan_plot.draw(rows, budget=budget, target=target, priced="on demand", basis="Projected")
    (axis,) = figure.axes
    (x, y), (x0, x1), (y0, y1) = plan_plot.at(rows[0]), axis.get_xlim(), axis.get_ylim()
    assert any(" on demand, $" in text.get_text() for text in axis.texts) == (instance is None)
    assert (x0 < x < x1 and y0 < y < y1) or instance
    plan_plot.plt.close(figure)


def test_the_proposal(planned):
    text = (planned[1] / "proposal.md").read_text()
    for word in (
        "**Goal.**",
        "**Plan.**",
        "rn50_78",
        "g5.xlarge",
        "**We ask for $",
        "Projected",
        "Measured",
        "Risks",
        "Team",
    ):
        assert word in text
    assert "no ImageNet run has been made with this code" in text


def plan(capsys, *arguments):
    plan_run.main(list(arguments))
    return capsys.readouterr().out.splitlines()


def test_what_money_cannot_buy_is_said_first(capsys):
    first = joined(plan(capsys, "--budget", "4", "--target", "78"))
    assert first.startswith("$4 is not safe for 78 %: it costs more than that in two stages, rn50_mild_28 and rn50_78")
    assert "Nothing else here fits $4 either. Projected" in first
    first = joined(plan(capsys, "--budget", "25", "--target", "79.5"))
    assert first.startswith("No recipe here reaches 79.5 % with confidence; the likeliest is in two stages")
    first = joined(plan(capsys, "--budget", "30", "--target", "78"))
    assert first.startswith("$30 is not safe for 78 %: its range reaches beyond that in two stages")
    assert "The most that $30 surely buys: rn50_mild_28 and rn50_medium_67 on g5.xlarge" in first


@pytest.mark.parametrize(
    ("budget", "target", "said"),
    [
        ("25", "0.78", "--target: 0.78 %? Write 78: top-1 is in %"),
        ("25", "0", "--target: 0 %? Give top-1 in %, from 1 to below 100, such as 78"),
        ("25", "100", "--target: 100 %?"),
        ("25", "nan", "--target: nan %?"),
        ("25", "78%", "--target: 78% is not a number"),
        ("0", "78", "--budget: $0? Give dollars above 0 and up to 100,000, such as 25"),
        ("-5", "78", "--budget: $-5?"),
        ("1e9", "78", "--budget: $1e9?"),
        ("nan", "78", "--budget: $nan?"),
        ("inf", "78", "--budget: $inf?"),
        ("$25", "78", "--budget: $25 is not a number; give dollars, such as 25"),
    ],
)
def test_a_slip_of_the_keyboard_is_refused_in_one_line(capsys, budget, target, said):
    with pytest.raises(UsageError) as refusal:
        plan(capsys, f"--budget={budget}", f"--target={target}")
    assert str(refusal.value).startswith(said)


def test_what_surely_fits_comes_before_what_is_cheaper_but_may_not():
    def row(name, dollars, high, sure=0.95):
        return {"instance": name, "dollars": dollars, "dollars_high": high, "dollars_low": 1.0, "top1": 78.4} | {
            "probability_of_target": sure,
            "both": None,
        }

    rows = [row("p3.2xlarge", 1, 2), row("unlikely", 5, 6, 0.5), row("cheap", 10, 30), row("dear", 40, 50)]
    found = projection.ranked([*rows, row("sure", 20, 24)], 25)
    assert [row["instance"] for row in found] == ["sure", "cheap", "dear", "unlikely", "p3.2xlarge"]


def test_one_instance_and_spot(capsys):
    lines = plan(capsys, "--budget", "25", "--target", "78", "--instance", "g5.2xlarge", "--spot")
    assert "(spot)" in joined(lines)
    assert not any(line.startswith("p3.2xlarge") for line in lines)
    with pytest.raises(UsageError, match="no spot price is known for p3.2xlarge"):
        plan(capsys, "--budget", "25", "--target", "78", "--instance", "p3.2xlarge", "--spot")
    with pytest.raises(RunError, match="cannot write"):
        plan(capsys, "--budget", "25", "--target", "78", "--instance", "g5.xlarge", "--json", "/")
    with pytest.raises(UsageError, match="a figure is a .png, .svg or .pdf"):
        plan(capsys, "--budget", "25", "--target", "78", "--plot", "plan.jpg")
    with pytest.raises(UsageError, match="there is no g5.xlarg; known are"):
        plan(capsys, "--budget", "25", "--target", "78", "--instance", "g5.xlarg")


DEMO = [f"{ROOT}/rn50_configs/demo.yaml", "--training.device=cpu", "--model.arch=resnet50"]
DEMO += ["--training.micro_batch=8", "--resolution.start=32"]


# A new process, with a network that compiles in seconds in the place of ResNet-50.
WITH_SMALL_NETWORK = f"""
import runpy, sys
sys.path.insert(0, {str(ROOT)!r})
from tests import faults
faults.use_small_network("resnet50")
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_preflight_measures_projects_and_feeds_the_plan(betons, tmp_path, capsys):
    out, written = tmp_path / "preflight.json", tmp_path / "tuned.yaml"
    command = [sys.executable, "-c", WITH_SMALL_NETWORK, ROOT / "tools" / "preflight.py", *DEMO, "--data", betons]
    command += ["--budget", "0.1", "--dollars-per-hour", "2", "--source", betons / "train_64.beton", "--json", out]
    command += ["--seconds", "0.5", "--write", written]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: no go: $")  # above it torch may warn of a driver
    assert "Traceback" not in done.stderr
    report = json.loads(out.read_text())
    assert [row["resolution"] for row in report["resolutions"]] == [32, 48, 64]
    for row in report["resolutions"]:
        assert row["loader_images_per_second"] > row["training_images_per_second"] > 0
        assert 0 <= row["data_wait_fraction"] <= 1
    assert (report["micro_batch"], report["gpus"], report["go"]) == (8, 1, False)
    assert report["staging_mb_per_s"] > 0
    assert {row["settings"]["training.compile"] for row in report["choices"]} == {False, True}
    assert all(row["images_per_second"] > 0 and not row["failed"] for row in report["choices"])
    assert done.stdout.count(" to compile each of 3 sizes: ") == len(report["choices"]) / 2
    assert report["measured_with"] == choices.fastest(report["choices"])
    tuned = load([f"--config-file={DEMO[0]}", f"--config-file={written}", *DEMO[1:], "--data.dir=betons"])
    chosen = report["measured_with"]["settings"]
    assert (tuned.training.precision, tuned.training.compile) == (
        chosen["training.precision"],
        chosen["training.compile"],
    )
    # 200 images for 8 epochs at these speeds
    px = [32, 32, 32, 32, 32, 48, 64, 64]
    speeds = {row["resolution"]: row["training_images_per_second"] for row in report["resolutions"]}
    assert report["hours_by_part"]["training"] == pytest.approx(sum(200 / speeds[p] for p in px) / 3600, abs=1e-3)
    assert report["dollars"] == pytest.approx(2 * report["hours"], abs=0.01)
    assert not list(betons.glob("preflight*"))

    # with more money it is a go, unless the micro-batch does not fit
    cfg = load([f"--config-file={DEMO[0]}", *DEMO[1:], "--data.dir=betons"])
    rungs = find_rungs(betons, "train")
    revised = preflight.revise(costs.read_table(), cfg, report, rungs, 25.0)
    assert revised["go"]
    assert not [reason for reason in revised["reasons"] if "waits for data" not in reason]  # so small a network may
    compiled = report | {"measured_with": {"compile_seconds": 600.0}}
    with_compiling = preflight.revise(costs.read_table(), cfg, compiled, rungs, 25.0)
    assert with_compiling["hours_by_part"]["compiling"] == 0.5  # three sizes
    slow = report | {"staging_mb_per_s": 0.001}
    later = preflight.revise(costs.read_table(), cfg, slow, rungs, 1e9)
    assert later["hours_by_part"]["staging"] == pytest.approx(sum(r.bytes for r in rungs.values()) / 3.6e6, rel=1e-3)
    edge = preflight.revise(costs.read_table(), cfg, slow, rungs, (later["dollars"] + later["dollars_high"]) / 2)
    assert not edge["go"]  # the measurement plus its own error is what must fit
    smaller = preflight.revise(costs.read_table(), cfg, report | {"micro_batch": 4}, rungs, 25.0)
    assert not smaller["go"]
    assert "--training.micro_batch=4 does" in smaller["reasons"][0]

    lines = plan(capsys, "--budget", "25", "--target", "78", "--preflight", str(out), "--json", str(tmp_path / "plan"))
    assert "Hours projected from tools/preflight.py's measurement" in joined(lines)
    rows = json.loads((tmp_path / "plan").read_text())
    assert {row["instance"] for row in rows} == {"this machine"}
    assert all("speed measured by preflight" in row["basis"] for row in rows)

    # it is neither told to measure what was measured, nor that its price is on demand
    proposed = tmp_path / "proposal.md"
    more = ["--budget", "1e5", "--target", "70", "--preflight", str(out), "--proposal", str(proposed)]
    first = joined(plan(capsys, *more)).split(" Hours projected from ")[0]
    assert first.startswith("Recommended: ")
    assert "preflight" not in first
    assert "vCPU, its price)" in proposed.read_text()
    assert "hours and dollars from tools/preflight.py's measurement" in proposed.read_text()

    first = report["resolutions"][0]
    odd = [{"resolutions": []}, {"gpus": 0}, {"dollars_per_hour": "2"}, {"micro_batch": None}]
    odd += [{"resolutions": [{key: value for key, value in first.items() if key != "loader_images_per_second"}]}]
    odd += [{"resolutions": [first | {"training_images_per_second": value}]} for value in (0, -1, float("nan"), "9")]
    for changed in odd:
        out.write_text(json.dumps(report | changed))
        with pytest.raises(RunError, match="is not what tools/preflight.py writes"):
            plan(capsys, "--budget", "25", "--target", "78", "--preflight", str(out))
    out.write_text(json.dumps(report | {"arch": "resnet18"}))
    with pytest.raises(RunError, match="measured with resnet18"):
        plan(capsys, "--budget", "25", "--target", "78", "--preflight", str(out))
    for other in ("{}", "[]", json.dumps(report)[:-9]):
        out.write_text(other)
        with pytest.raises(RunError, match="is not what tools/preflight.py writes"):
            plan(capsys, "--budget", "25", "--target", "78", "--preflight", str(out))


def test_a_micro_batch_is_halved_until_it_fits():
    tried = []

    class Small(Learner):
        def forward_backward(self, images, labels, accumulation, **given):
            tried.append(len(images))
            if len(images) > 8:
                raise torch.cuda.OutOfMemoryError
            return super().forward_backward(images, labels, accumulation, **given)

    cfg = load([f"--config-file={DEMO[0]}", *DEMO[1:], "--data.dir=betons"])
    assert preflight.largest_micro_batch(Small(cfg, classes=10, device=torch.device("cpu")), 32, 32) == 8
    assert tried == [32, 16, 8]


def test_the_loader_sets_the_pace_of_many_gpus():
    fitted = speeds.fit(costs.read_table())
    row = {"training_images_per_second": 100.0, "loader_images_per_second": 300.0, "limited_by": "GPU"}
    assert preflight.share_among([row], 1, fitted) == [row]
    (two,) = preflight.share_among([row], 2, fitted)
    assert (two["training_images_per_second"], two["limited_by"]) == (round(200 * fitted.efficiency(2), 1), "GPU")
    (eight,) = preflight.share_among([row], 8, fitted)
    assert (eight["training_images_per_second"], eight["limited_by"]) == (300.0, "CPU")


def test_preflight_needs_a_price_and_a_source_that_is_there(tmp_path):
    args = SimpleNamespace(dollars_per_hour=None, instance="g9.huge")
    with pytest.raises(UsageError, match="no price is known for g9.huge"):
        preflight.dollars_per_hour(costs.read_table(), args)
    with pytest.raises(RunError, match="cannot stage from /nowhere"):
        preflight.staging_speed("/nowhere", tmp_path)
    assert not list(tmp_path.iterdir())
