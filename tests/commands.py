"""train_imagenet.py in processes that are forked from one that has imported everything: a command takes a second."""

import json
import os
import runpy
import sys
import time

from tests import faults
from tests.conftest import ROOT

SMALL = {
    "model.arch": "resnet18",
    "model.ema_half_life": 5,
    "training.epochs": 3,
    "training.batch_size": 20,
    "training.micro_batch": 10,
    "training.device": "cpu",
    "training.precision": "fp32",
    "lr.warmup_epochs": 1,
    "resolution.start": 32,
    "resolution.end": 32,
    "data.rung": 64,
    "data.workers": 1,
    "validation.resolutions": 32,
    "validation.headline_resolution": 32,
    "logging.run_name": "small",
}
context = faults.forking()


class Command:
    """`ranks` processes of the script. prepare: a function of a test's module, called in each before it begins."""

    def __init__(self, betons, folder, *, ranks=1, prepare=None, environment=None, **flags):
        settings = SMALL | {"data.dir": betons, "logging.folder": folder}
        settings |= {name.replace("__", "."): value for name, value in flags.items()}
        common = {"AWS_EC2_METADATA_DISABLED": "true", "OMP_NUM_THREADS": "1"} | (environment or {})
        if ranks > 1:
            common |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
            common["MASTER_PORT"] = str(faults.free_port())
        self.folder, self.processes, self._outputs = folder / settings["logging.run_name"], [], []
        argv = [f"--{name}={value}" for name, value in settings.items()]
        folder.mkdir(parents=True, exist_ok=True)
        for rank in range(ranks):
            mine = common | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {})
            self._outputs.append(folder / f"output-{rank}-{time.monotonic_ns()}")
            self.processes.append(context.Process(target=enter, args=(argv, mine, self._outputs[-1], prepare)))
            self.processes[-1].start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process in self.processes:
            process.kill()
            process.join()

    def until(self, condition, within=60):
        """Wait for `condition()`, which must come while the command runs."""
        deadline = time.monotonic() + within
        while not condition():
            assert self.processes[0].is_alive(), self.output()
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.01)

    def has_checkpoint(self):
        return (self.folder / "last.pt").exists()

    def end(self, within=60):
        """Wait until rank 0 ends; gives its exit status."""
        self.processes[0].join(within)
        assert self.processes[0].exitcode is not None, self.output()
        return self.processes[0].exitcode

    def output(self, rank=0):
        return self._outputs[rank].read_text() if self._outputs[rank].exists() else ""

    def status(self):
        return json.loads((self.folder / "status.json").read_text())


def enter(argv, environment, output, prepare=None):
    """What a forked process does: train_imagenet.py with `argv`, its stdout and stderr in the file `output`."""
    os.environ.update(environment)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    faults.use_small_network()
    if prepare:
        prepare()
    sys.argv = [str(ROOT / "train_imagenet.py"), *argv]
    runpy.run_path(sys.argv[0], run_name="__main__")
