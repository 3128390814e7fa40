"""Breaks a small training in every way it may break, until it is done, and compares it with one that nothing disturbed.

    python -m tests.chaos --faults 100 --ranks 1,2 --out studies/chaos

The script, the loader, the signals, S3 (moto's server) and the metadata server are real. So that a fault takes seconds,
processes are forked from one that has imported everything, with the environment that torchrun gives its ranks; the
network is a small one, and polls and retries come faster. Kill points inside a checkpoint or an upload are Python's own
audit events (open, rename, send). Exits 1 if a run ends with other weights or another log.
"""

import argparse
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from tests.faults import ROOT, forking, free_port, full_disk, limited_files, victim
from tests.services import Metadata, MotoS3

TIMES = {"images_per_second", "data_wait_fraction", "train_seconds", "cpu_seconds", "elapsed_seconds", "val_seconds"}
DISK_MEGABYTES = 64
EPOCHS, BATCH, MICRO_BATCH = 24, 20, 10
# What the audit hook of a victim waits for: an event, how its first argument ends (None: a connection to S3), and the
# how-many-eth after the first step that is.
POINTS = {
    "kill -9 as a checkpoint is opened": ("open", "last.pt.partial", 1),
    "kill -9 while a checkpoint is written": ("open", "last.pt.partial", 1),
    "kill -9 while a checkpoint is read back": ("open", "last.pt.partial", 2),
    "kill -9 before the first rename": ("os.rename", "last.pt", 1),
    "kill -9 before the second rename": ("os.rename", "last.pt.partial", 1),
    "kill -9 while a checkpoint is mirrored": ("http.client.send", None, 1),
}
ANYWHERE = ("kill -9", "SIGTERM", "spot notice after dropped metadata", "newest checkpoint truncated", "S3 unreachable")
ANYWHERE += ("disk full, then room", "disk full, then kill -9", "new machine with an empty disk")
WITH_RANKS = ("one rank killed",)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--faults", type=int, default=100, help="at least so many, over all runs")
    parser.add_argument("--ranks", default="1,2", help="numbers of ranks, comma-separated")
    parser.add_argument("--out", type=Path, help="folder for README.md and faults.jsonl")
    parser.add_argument("--seed", type=int, default=0, help="of the faults and their moments (%(default)s)")
    parser.add_argument("--short", action="store_true", help="every fault once")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # servers and disk are put away on the way out
    started, faults = time.time(), []
    with (
        tempfile.TemporaryDirectory(prefix="chaos-") as folder,
        Chaos(Path(folder), forking(), options.seed) as chaos,
    ):
        for ranks in (int(word) for word in options.ranks.split(",")):
            share = -(-options.faults // len(options.ranks.split(",")))
            faults += chaos.torment(ranks, None if options.short else share)
    print(table := summary(faults), flush=True)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(fault) + "\n" for fault in faults)
        page = report(faults, table, time.time() - started)  # it names the commit, which a written file makes dirty
        (options.out / "faults.jsonl").write_text(lines)
        (options.out / "README.md").write_text(page)
    sys.exit(any(fault["outcome"] != "identical" for fault in faults))


class Chaos:
    """Data, servers and a small disk; `torment` runs one training after another on it."""

    def __init__(self, folder, context, seed):
        self.folder, self.context, self.random = folder, context, random.Random(seed)
        self.disk, self.mounted = folder / "disk", False

    def __enter__(self):

        self.betons = make_betons(self.folder)
        self.disk.mkdir()
        if os.geteuid() == 0:
            mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MEGABYTES}m", "chaos", str(self.disk)]
            self.mounted = subprocess.run(mount, capture_output=True).returncode == 0
        self.metadata, self.s3 = Metadata().__enter__(), MotoS3().__enter__()
        return self

    def __exit__(self, *error):
        self.metadata.__exit__(*error)
        self.s3.__exit__(*error)
        if self.mounted:
            subprocess.run(["umount", "-l", str(self.disk)], check=True)

    def torment(self, ranks, wanted):
        """At least `wanted` faults in whole runs of `ranks` ranks, or every kind once; gives their records."""
        name = f"undisturbed-{ranks}"
        job = Job(self, ranks, name, mirror=False)
        job.wait(600)
        if job.status() != "finished":
            sys.exit(f"the undisturbed run failed:\n{job.output()}")
        expected = outcome(self.disk / name)
        shutil.rmtree(self.disk / name)
        kinds = [*POINTS, *ANYWHERE, *(WITH_RANKS if ranks > 1 else ())]
        faults, queue, runs, idle = [], [], 0, 0
        while queue or len(faults) < (wanted or 1):
            if not queue:
                queue = self.random.sample(kinds, len(kinds))
            runs += 1
            found = self.one_run(ranks, f"run-{ranks}-{runs}", queue, expected)
            idle = 0 if found else idle + 1
            if idle > 20:
                sys.exit(f"'{queue[-1]}' comes too late for every run")
            faults += found
        return faults

    def one_run(self, ranks, name, queue, expected):
        """A run that suffers faults from `queue` until it is finished."""
        faults, pending = [], None
        deadline = time.monotonic() + 900
        while time.monotonic() < deadline:
            kind = queue.pop() if queue else None
            job = Job(self, ranks, name, fault=kind)
            if kind:
                self.inflict(kind, job)
            job.wait(120)
            if pending is not None:
                begun = job.resumed_at()
                pending |= {"resumed_at": begun, "repeated": max(0, pending["step"] - begun)}
                went_on = job.last_step.value >= begun or job.status() == "finished"
                pending["recovered"] = went_on and "error:" not in job.head()
                faults.append(pending)
                pending = None
            if job.status() == "finished":
                if kind:
                    queue.append(kind)  # the run was over before it came to that
                break
            if kind is None:
                sys.exit(f"{name} ended without a fault:\n{job.output()}")
            pending = {"run": name, "ranks": ranks, "fault": kind, "step": job.last_step.value}
            pending |= {"exits": [process.exitcode for process in job.processes], "seconds": round(job.seconds, 2)}
            self.aftermath(kind, name)
        else:
            sys.exit(f"{name} is not finished after 15 minutes:\n{job.output()}")
        same = compare(outcome(self.disk / name), expected)
        shutil.rmtree(self.disk / name)
        for fault in faults:
            fault["outcome"] = same
        print(f"{name}: {len(faults)} faults, {same}", flush=True)
        return faults

    def inflict(self, kind, job):
        """Do to a running job what `kind` says; it may be over before it comes to that."""
        if not job.until_training():
            return
        if kind in POINTS:
            if not job.join(20):
                job.kill()
            return
        job.join(self.random.uniform(0, 0.8))
        if kind == "SIGTERM":
            job.signal(signal.SIGTERM)
        elif kind == "spot notice after dropped metadata":
            self.metadata.trouble = None
            self.metadata.notice = {"action": "terminate", "time": "2030-01-01T00:00:00Z"}
            job.join(20)
            self.metadata.notice = None
        elif kind.startswith("disk full"):
            with self.full_disk(job):
                job.join(self.random.uniform(0.3, 1.0))
                if job.failed():
                    sys.exit(f"a full disk ended the run:\n{job.output()}")
                if kind.endswith("kill -9"):
                    job.kill()
            if not kind.endswith("kill -9"):
                job.join(self.random.uniform(0.4, 1.0))  # time to write one again
                job.kill()
        elif kind == "one rank killed":
            victim = self.random.choice(job.processes)
            victim.kill()
            # the others must notice; torchrun would also send them SIGTERM
            for process in job.processes:
                process.join(20)
                if process.is_alive():
                    sys.exit(f"a rank waits for a dead one:\n{job.output()}")
        else:
            job.kill()

    def full_disk(self, job):
        return full_disk(self.disk) if self.mounted else limited_files(job.processes)

    def aftermath(self, kind, name):
        last = self.disk / name / "last.pt"
        if kind == "newest checkpoint truncated" and last.exists():
            if (self.disk / name / "previous.pt").exists():
                os.truncate(last, self.random.randrange(last.stat().st_size))
        elif kind == "new machine with an empty disk":
            shutil.rmtree(self.disk / name, ignore_errors=True)
        self.metadata.trouble = None


class Job:
    """One command: its ranks as processes."""

    def __init__(self, chaos, ranks, name, fault=None, mirror=True):
        self.last_step = chaos.context.Value("q", 0)
        self.file = chaos.folder / f"{name}.out"
        self.file.write_text("")
        self.folder, self.started = chaos.disk / name, time.monotonic()
        flags = {
            "model.arch": "resnet18",
            "model.ema_half_life": 5,
            "training.epochs": EPOCHS,
            "training.batch_size": BATCH,
            "training.micro_batch": MICRO_BATCH,
            "training.device": "cpu",
            "training.precision": "fp32",
            "lr.warmup_epochs": 1,
            "resolution.start": 32,
            "resolution.end": 32,
            "data.dir": chaos.betons,
            "data.workers": 1,
            "data.order": "page" if ranks > 1 else "random",
            "data.brightness": 0.2,
            "validation.resolutions": 32,
            "validation.headline_resolution": 32,
            "validation.every": 3,
            "logging.folder": chaos.disk,
            "logging.run_name": name,
            "logging.checkpoint_steps": chaos.random.choice((1, 2, 5)),
        }
        if mirror:
            flags["logging.mirror"] = "s3://chaos/runs"
        if fault == "spot notice after dropped metadata":
            chaos.metadata.trouble = "dropped"
        environment = {
            "AWS_EC2_METADATA_SERVICE_ENDPOINT": chaos.metadata.url,
            "AWS_ENDPOINT_URL": "http://127.0.0.1:9" if fault == "S3 unreachable" else chaos.s3.url,
            "AWS_ACCESS_KEY_ID": "chaos",
            "AWS_SECRET_ACCESS_KEY": "chaos",
            "AWS_DEFAULT_REGION": "us-east-1",
            "OMP_NUM_THREADS": "1",
        }
        if ranks > 1:
            environment |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
            environment["MASTER_PORT"] = str(free_port())
        point = None
        if fault in POINTS:
            event, part, count = POINTS[fault]
            delay = chaos.random.uniform(0, 0.01) if "while" in fault else 0.0
            point = event, part or chaos.s3.port, count + 2 * chaos.random.randrange(3), delay
        self.processes = []
        for rank in range(ranks):
            mine = environment | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {})
            argv = [f"--{key}={value}" for key, value in flags.items()]
            args = argv, mine, str(self.file), point if rank == 0 else None, self.last_step if rank == 0 else None
            self.processes.append(chaos.context.Process(target=victim, args=args))
            self.processes[-1].start()

    def until_training(self):
        """Wait until the first step of this command is done; gives whether it got there."""
        while not self.last_step.value and any(process.is_alive() for process in self.processes):
            time.sleep(0.005)
        return self.last_step.value > 0

    def join(self, seconds):
        """Whether all ranks end within `seconds`; where one is killed the others are not waited for."""
        give_up = time.monotonic() + seconds
        while any(process.is_alive() for process in self.processes) and time.monotonic() < give_up:
            time.sleep(0.005)
        return not any(process.is_alive() for process in self.processes)

    def wait(self, seconds):
        if not self.join(seconds):
            print(f"killed after {seconds} s:\n{self.output()}", flush=True)
            self.kill()
        self.seconds = time.monotonic() - self.started

    def kill(self):
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def signal(self, number):
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, number)

    def failed(self):
        return any(process.exitcode not in (None, 0) for process in self.processes)

    def status(self):
        try:
            return json.loads((self.folder / "status.json").read_text())["status"]
        except (OSError, ValueError):
            return None

    def output(self):
        return self.file.read_text()

    def head(self):
        return self.output().partition("on cpu in")[0]

    def resumed_at(self):
        words = self.output().partition("resuming")[2].partition("at step ")[2]
        return int(words.partition(":")[0] or 0)


def compare(result, expected):
    """`identical`, or what differs."""
    if result == expected:
        return "identical"
    if isinstance(result, str):
        return f"DIFFERENT: {result}"
    (tensors, rows), (expected_tensors, expected_rows) = result, expected
    places = [k for k, (a, b) in enumerate(zip(tensors, expected_tensors, strict=True)) if a != b]
    words = [f"{len(places)} of {len(tensors)} tensors, the first is number {places[0]}"] if places else []
    for row, other in zip(rows, expected_rows, strict=True):
        words += [f"epoch {row['epoch']}: {key} {row[key]} for {other[key]}" for key in row if row[key] != other[key]]
    return "DIFFERENT: " + "; ".join(words)


def outcome(folder, epochs=EPOCHS):
    """What must be equal: all tensors of the last checkpoint, and the log but for its times."""
    import torch

    from rn50.files import read_rows
    from rn50.training import checkpoint

    state = checkpoint.load(folder / "last.pt")
    tensors = []

    def walk(value):
        if isinstance(value, torch.Tensor):
            tensors.append(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict | list | tuple):
            for item in value.values() if isinstance(value, dict) else value:
                walk(item)

    walk([state[part] for part in ("model", "ema", "optimizer")])
    rows = [{key: value for key, value in row.items() if key not in TIMES} for row in read_rows(folder / "log.jsonl")]
    if [row["epoch"] for row in rows] != list(range(epochs)):
        return f"gaps in the log of {folder}"
    return tensors, rows


def make_betons(folder):
    from rn50.data.textures import write_textures

    write_textures(folder / "tree", train_per_class=10, val_per_class=3)
    command = [sys.executable, ROOT / "write_dataset.py", f"--source.dir={folder / 'tree'}"]
    command += [f"--out.dir={folder / 'betons'}", "--out.resolutions=64"]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    return folder / "betons"


def report(faults, table, seconds):
    """README.md beside faults.jsonl."""
    from rn50.machine import commit, processor

    runs = {fault["run"]: fault["outcome"] for fault in faults}
    same = sum(result == "identical" for result in runs.values())
    command = " ".join(["python -m tests.chaos", *sys.argv[1:]])
    machine = f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} cores ({processor()}), Linux {platform.release()}"
    return f"""# {len(faults)} faults in {len(runs)} runs, of which {same} ended as an undisturbed one does

`{command}` took {seconds:.0f} s on {machine}, commit {commit()}.

- recovered: the next command, without any other help, went on from a checkpoint, or began anew before there was one.
  Where it did not, it met an unreachable S3 with nothing on the disk, and refused to start over, as it should.
- identical: all weights, momenta and averaged weights of the finished run equal those of a run that nothing disturbed,
  bit by bit, and so do the rows of its log except for times; none is missing, none is there twice.

{table}

Every fault is in `faults.jsonl`: at which step the run was, with which statuses its ranks ended (`exits`; -9: killed),
where the next command began (`resumed_at`) and how many steps it `repeated`.
"""


def summary(faults):
    """A Markdown table, a line a kind of fault."""
    kinds = defaultdict(list)
    for fault in faults:
        kinds[f"{fault['fault']}, {fault['ranks']} rank{'s' if fault['ranks'] > 1 else ''}"].append(fault)
    lines = ["| fault | times | recovered | steps repeated (mean, most) | outcome |", "|---|---|---|---|---|"]
    for kind, found in sorted(kinds.items()):
        repeated = [fault["repeated"] for fault in found]
        outcomes = ", ".join(sorted({fault["outcome"] for fault in found}))
        recovered = sum(fault["recovered"] for fault in found)
        mean = f"{sum(repeated) / len(found):.1f}, {max(repeated)}"
        lines.append(f"| {kind} | {len(found)} | {recovered} | {mean} | {outcomes} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
