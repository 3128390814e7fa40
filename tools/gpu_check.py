"""The first hour on a machine with a GPU: runs what docs/gpu_checklist.md lists, and writes what came of it.

    python tools/gpu_check.py --out studies/gpu_a10g --imagenette DIR
    python tools/gpu_check.py --out ... --betons DIR --instance g5.2xlarge
    python tools/gpu_check.py --out ... --betons DIR --only imagenet_16    # hours

OUT/report.md and OUT/report.json say of every check passed, failed or left out, with its figures; OUT/NAME.txt has its
output. A check that passed is not repeated. Exit status 1 where one failed.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

from rn50.command import run
from rn50.errors import RunError, UsageError
from rn50.files import expanded, expanded_path, read_rows, write_atomically
from rn50.help import HelpFormatter
from rn50.planning import costs, speeds

ROOT = Path(__file__).resolve().parents[1]
PYTHON = ".venv/bin/python"
POINTS = 1.5  # of top-1 that two short runs on Imagenette may differ by
SLOWEST = 0.6  # of the images/s in fp32; emulated, a type has a fraction of this
IMAGENETTE_RUN = f"{PYTHON} train_imagenet.py --config-file rn50_configs/imagenette_cpu.yaml --data.dir=WORK/imagenette"
IMAGENETTE_RUN += " --logging.folder=WORK"
IMAGENET_RUN = f"{PYTHON} train_imagenet.py --config-file rn50_configs/rn50_16_epochs.yaml --data.dir=BETONS"
IMAGENET_RUN += " --training.micro_batch=256 --logging.folder=WORK --logging.run_name=imagenet_16"
# What rn50_16_epochs is projected to reach at 224 px, single view (80 % range), widened by a point on each side.
TOP1_16_EPOCHS = (71.6, 74.5)


class Check:
    """A command, what it needs, and what it must print; `judge(checker, output)` returns text or raises Failed."""

    def __init__(self, name, command, must, judge, *, needs=(), after=()):
        self.name, self.command, self.must, self.judge, self.needs, self.after = (
            name,
            command,
            must,
            judge,
            needs,
            after,
        )


class Failed(Exception):
    """A check did not print what it must."""


def needs_text(pattern):
    def judge(checker, output):
        found = re.search(pattern, output)
        if not found:
            raise Failed(f"nothing in the output is like: {pattern}")
        return found[0]

    return judge


def both(first, second):
    return lambda checker, output: f"{first(checker, output)}; {second(checker, output)}"


def accuracy_like(other):
    """The run's last top-1 within POINTS of `other`'s, a run of this tool or the log of one on a CPU."""

    def judge(checker, output):
        mine = last_row(checker.work / checker.current.name)
        theirs = last_row(checker.work / other if other else ROOT / "studies/imagenette_cpu")
        text = f"top-1 {mine['top1']:.2f} % against {theirs['top1']:.2f} %, {mine['images_per_second']:.0f} images/s"
        if abs(mine["top1"] - theirs["top1"]) > POINTS:
            raise Failed(f"{text}: more than {POINTS} points apart")
        return text

    return judge


def last_row(folder):
    rows = read_rows(folder / "log.jsonl")
    if not rows:
        raise Failed(f"there is no row in {folder / 'log.jsonl'}")
    return rows[-1]


def faster_than(other, factor):
    """As accurate as `other`, and at least `factor` of its images/s."""

    def judge(checker, output):
        text = accuracy_like(other)(checker, output)
        mine, theirs = (last_row(checker.work / name)["images_per_second"] for name in (checker.current.name, other))
        if mine < factor * theirs:
            raise Failed(f"{text}: {mine / theirs:.2f} x the images/s of {other}, less than {factor} x")
        return f"{text}, {mine / theirs:.2f} x {other}"

    return judge


def judge_speed(checker, output):
    """images/s of tools/preflight.py against what the cost model projects for this GPU."""
    report = json.loads((checker.work / "preflight.json").read_text())
    table = costs.read_table()
    fitted = speeds.fit(table)
    gpu = next((name for name in sorted(table.gpu, key=len, reverse=True) if name in report["device"]), None)
    if gpu is None:
        raise Failed(f"{report['device']} is not in rn50/planning/costs.csv: add a row with its memory bandwidth")
    spread = speeds.prediction_errors(speeds.check(table))[fitted.gpu_rate(gpu, 1)[1] > 0]
    lines, worst = [], 1.0
    for row in report["resolutions"]:
        projected = fitted.total(gpu, table.gpu[gpu]["value"], report["gpus"], row["resolution"])
        ratio = row["training_images_per_second"] / projected
        worst = min(worst, ratio)
        lines.append(f"{row['resolution']} px: {row['training_images_per_second']:.0f}, {ratio:.2f} x the projection")
    if worst < 1 - 2 * spread:
        raise Failed(f"{'; '.join(lines)}: more than twice the model's error ({spread:.0%}) below")
    return "; ".join(lines)


def judge_resume(checker, output):
    rows = read_rows(checker.work / "resume" / "log.jsonl")
    epochs = [row["epoch"] for row in rows]
    if epochs != list(range(len(epochs))):
        raise Failed(f"epochs in the log: {epochs}")
    text = needs_text(r"resuming .* at step \d+: after epoch \d+ of \d+ and \d+ steps")(checker, output)
    if not 0 < int(text.split()[-2]) < rows[0]["step"]:
        raise Failed(f"{text}: not in the middle of an epoch, remove {checker.work / 'resume'} and repeat")
    return f"{text}; {accuracy_like('fp32')(checker, output)}"


def judge_imagenet(checker, output):
    row = last_row(checker.work / "imagenet_16")
    top1 = row["evaluation"]["224"]["single"]["top1"]
    hours = row["elapsed_seconds"] / 3600
    text = f"top-1 {top1:.2f} % at 224 px, single view, after {hours:.2f} h"
    if not TOP1_16_EPOCHS[0] <= top1 <= TOP1_16_EPOCHS[1]:
        raise Failed(f"{text}: not within {TOP1_16_EPOCHS[0]} to {TOP1_16_EPOCHS[1]}")
    return text


GPU_NAME = f'{PYTHON} -c "import torch; print(torch.cuda.get_device_name(), torch.cuda.is_bf16_supported(False))"'
CHECKS = [
    Check("gpu", GPU_NAME, "the GPU's name; `True` on A10G, L4, A100, H100", needs_text(r".+ (True|False)")),
    Check("tests", "CUDA_VISIBLE_DEVICES= bash tools/test.sh", "`passed`, none failed (on the CPU)",
          needs_text(r"\d+ passed(?!.*failed).*")),
    Check("smoke", "bash tools/demo.sh", "`resnet18 on cuda`, and top-1 of at least 95 %",
          needs_text(r"(?s)resnet18 on cuda.*top-1 \d+\.\d+ % on the validation images")),
    Check("betons", f"{PYTHON} write_dataset.py --source.dir=IMAGENETTE --out.dir=WORK/imagenette "
          "--out.resolutions=160,224", "`wrote` or `already written`, four files", needs_text(r"wrote|already written"),
          needs=("imagenette",)),
    Check("fp32", f"{IMAGENETTE_RUN} --logging.run_name=fp32 --training.precision=fp32",
          f"`on cuda`; within {POINTS} points of studies/imagenette_cpu",
          both(needs_text("on cuda"), accuracy_like(None)), after=("betons",)),
    Check("bf16", f"{IMAGENETTE_RUN} --logging.run_name=bf16 --training.precision=bf16",
          f"within {POINTS} points of fp32, at least {SLOWEST} x its images/s (small images: the host sets the pace)",
          faster_than("fp32", SLOWEST), needs=("bf16",), after=("fp32",)),
    Check("fp16", f"{IMAGENETTE_RUN} --logging.run_name=fp16 --training.precision=fp16",
          f"within {POINTS} points of fp32, at least {SLOWEST} x its images/s", faster_than("fp32", SLOWEST),
          after=("fp32",)),
    Check("compile", f"{IMAGENETTE_RUN} --logging.run_name=compile --training.compile=true",
          f"within {POINTS} points of fp32; images/s for comparison", accuracy_like("fp32"), after=("fp32",)),
    Check("accumulation", f"{IMAGENETTE_RUN} --logging.run_name=accumulation --training.micro_batch=32",
          f"within {POINTS} points of fp32 (BatchNorm sees 32)", accuracy_like("fp32"), after=("fp32",)),
    Check("resume", f"{IMAGENETTE_RUN} --logging.run_name=resume --training.precision=fp32 "
          "--logging.checkpoint_steps=20",
          "killed (-9) once in the middle of an epoch: `resuming` there, no epoch twice, the accuracy of fp32",
          judge_resume, after=("fp32",)),
    Check("ddp", f"{IMAGENETTE_RUN} --logging.run_name=ddp --training.precision=fp32 --training.micro_batch=32".replace(
              f"{PYTHON} train", ".venv/bin/torchrun --nproc_per_node=2 train"),
          f"`32 x 2 ranks`; within {POINTS} points of accumulation",
          both(needs_text("32 x 2 ranks"), accuracy_like("accumulation")),
          needs=("two GPUs",), after=("accumulation",)),
    Check("throughput", f"{PYTHON} tools/preflight.py rn50_configs/rn50_78.yaml --data BETONS --instance INSTANCE "
          "--budget 1000 --json WORK/preflight.json", "images/s at three resolutions, none far below the cost model",
          judge_speed, needs=("betons", "instance")),
    Check("imagenet_16", IMAGENET_RUN, f"top-1 at 224 px, single view, of {TOP1_16_EPOCHS[0]} to {TOP1_16_EPOCHS[1]} %",
          judge_imagenet, needs=("betons", "asked for by --only")),
]  # fmt: skip


class Checker:
    """Runs checks one after the other; `current` is the one that is judged."""

    def __init__(self, args, gpus, bf16):
        self.args, self.gpus, self.bf16 = args, gpus, bf16
        self.out, self.work = args.out.resolve(), args.out.resolve() / "work"
        self.work.mkdir(parents=True, exist_ok=True)
        self.file = self.out / "report.json"
        self.results = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.current = None

    def run(self, checks):
        for check in checks:
            missing = self.missing(check)
            if self.results.get(check.name, {}).get("outcome") == "passed":
                print(f"{check.name}: passed before", flush=True)
                continue
            if missing:
                self.note(check, "left out", missing)
                continue
            print(f"{check.name}: {self.command(check)}", flush=True)
            started = time.monotonic()
            outcome, text = self.attempt(check)
            self.note(check, outcome, text, seconds=round(time.monotonic() - started, 1))

    def missing(self, check):
        """Why a check cannot be run, or None."""
        given = {
            "imagenette": self.args.imagenette,
            "betons": self.args.betons,
            "instance": self.args.instance,
            "two GPUs": self.gpus >= 2,
            "bf16": self.bf16,
            "asked for by --only": check.name in (self.args.only or []),
        }
        lacking = [need for need in check.needs if not given[need]]
        lacking += [name for name in check.after if self.results.get(name, {}).get("outcome") != "passed"]
        return f"needs {', '.join(lacking)}" if lacking else None

    def command(self, check):
        words = {"WORK": self.work, "BETONS": self.args.betons, "IMAGENETTE": self.args.imagenette,
                 "INSTANCE": self.args.instance}  # fmt: skip
        return re.sub("|".join(words), lambda found: str(words[found[0]]), check.command)

    def attempt(self, check):
        self.current = check
        log = self.out / f"{check.name}.txt"
        if check.name == "resume":
            self.kill_in_an_epoch(log)
        status = self.shell(self.command(check), log)
        output = log.read_text(errors="replace")
        if status:
            last = next((line for line in reversed(output.splitlines()) if line.strip()), "")
            return "failed", f"exit status {status}: {last.strip()}"
        try:
            return "passed", check.judge(self, output)
        except Failed as failure:
            return "failed", str(failure)
        except (OSError, RunError, KeyError, ValueError) as error:
            return "failed", f"its result cannot be read: {error}"

    def shell(self, command, log):
        with open(log, "ab") as file:
            return subprocess.run(command, shell=True, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT).returncode

    def kill_in_an_epoch(self, log):
        with open(log, "wb") as file:
            process = subprocess.Popen(
                self.command(self.current), shell=True, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        while process.poll() is None and "epoch 3/" not in log.read_text(errors="replace"):
            time.sleep(0.2)
        # the first checkpoint from then on may be the one between two epochs
        seen, last = set(), self.work / "resume" / "last.pt"
        while process.poll() is None and len(seen) < 3:
            with contextlib.suppress(FileNotFoundError):  # for a moment between two
                seen.add(last.stat().st_mtime_ns)
            time.sleep(0.02)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def note(self, check, outcome, text, **more):
        self.results[check.name] = {"outcome": outcome, "text": text, "command": self.command(check), **more}
        print(f"  {outcome}: {text}", flush=True)
        write_atomically(self.file, json.dumps(self.results, indent=1) + "\n")
        write_atomically(self.out / "report.md", self.report())

    def report(self):
        lines = [
            f"# GPU check: {self.args.gpu_name}",
            "",
            f"Commit {self.args.commit}, {time.strftime('%Y-%m-%d')}.",
            "",
        ]
        lines += ["| check | outcome | what it gave | seconds |", "|---|---|---|---|"]
        for name, row in self.results.items():
            lines.append(f"| {name} | {row['outcome']} | {row['text']} | {row.get('seconds', '')} |")
        return "\n".join(lines) + "\n"


def checklist():
    """The table of docs/gpu_checklist.md."""
    lines = ["| check | command | must print |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {c.name} | `{c.command}` | {c.must} |" for c in CHECKS)])


def main():
    args = arguments()
    if args.list:
        print(checklist())
        return
    import torch

    from rn50.machine import commit

    if not torch.cuda.is_available():
        raise RunError("torch sees no GPU here: these checks are for a machine with one (nvidia-smi should list it)")
    args.gpu_name, args.commit = torch.cuda.get_device_name(), commit()
    checker = Checker(args, torch.cuda.device_count(), torch.cuda.is_bf16_supported(including_emulation=False))
    wanted = [check for check in CHECKS if not args.only or check.name in args.only]
    checker.run(wanted)
    failed = [check.name for check in wanted if checker.results[check.name]["outcome"] == "failed"]
    print(f"report: {args.out / 'report.md'}")
    if failed:
        raise RunError(f"failed: {', '.join(failed)}; see {args.out}/{failed[0]}.txt")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--out", type=expanded_path, help="folder for the report; required, except with --list")
    parser.add_argument("--imagenette", type=expanded, help="folder with Imagenette's train/ and val/")
    parser.add_argument("--betons", type=expanded, help="folder of ImageNet's .beton files")
    parser.add_argument("--instance", help="EC2 type of this machine, for its price")
    parser.add_argument("--only", type=lambda text: text.split(","), help="names of checks, comma-separated")
    parser.add_argument("--list", action="store_true", help="print the table of checks and stop")
    args = parser.parse_args()
    unknown = set(args.only or []) - {check.name for check in CHECKS}
    if unknown:
        raise UsageError(
            f"--only: there is no {', '.join(sorted(unknown))}; there are {', '.join(c.name for c in CHECKS)}"
        )
    if not args.list and args.out is None:
        parser.error("--out is required")
    return args


if __name__ == "__main__":
    run(main)
