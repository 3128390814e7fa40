"""A small network that is right on most textures, and the app and the browser that the tests of the Space share."""

import hashlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import requests
import torch
from PIL import Image

from rn50.augment import normalize
from rn50.publishing import export
from rn50.training import checkpoint

ROOT = Path(__file__).resolve().parent.parent
APP_PYTHON = ROOT / ".venv-app" / "bin" / "python"
RESOLUTION, CROP_RATIO = 64, 0.875


def train(betons, textures, folder):
    """last.pt of a real run of one epoch, whose classifier is then fitted to the training images: a path.

    An epoch of 200 images teaches nothing, and more would take a minute; a ridge regression on the features of an
    almost random network is right on every second texture.
    """
    settings = {
        "model.arch": "resnet18",
        "model.blurpool": "true",
        "model.blur_maxpool": "true",
        "model.ema_half_life": 2,
        "training.epochs": 1,
        "training.batch_size": 40,
        "training.micro_batch": 40,
        "training.device": "cpu",
        "training.precision": "fp32",
        "lr.warmup_epochs": 0,
        "lr.lr_per_256": 0.05,
        "resolution.start": 32,
        "resolution.end": 32,
        "data.workers": 1,
        "data.dir": betons,
        "validation.resolutions": RESOLUTION,
        "validation.headline_resolution": RESOLUTION,
        "logging.folder": folder,
        "logging.run_name": "tiny",
    }
    flags = [f"--{name}={value}" for name, value in settings.items()]
    subprocess.run([sys.executable, ROOT / "train_imagenet.py", *flags], check=True, capture_output=True, timeout=200)
    state = checkpoint.load(folder / "tiny" / checkpoint.LAST)
    files = sorted((textures / "train").rglob("*.jpg"))
    names = sorted(path.name for path in (textures / "train").iterdir())
    targets = torch.eye(len(names))[[names.index(path.parent.name) for path in files]]
    images = torch.from_numpy(np.stack([seen(path) for path in files]))
    fitted = fit_classifier(export.load_network(export.architecture(state), state["ema"]["model"]), images, targets)
    state["ema"]["model"].update(fitted)
    # the two must be told apart
    state["model"].update(fitted | {"fc.bias": fitted["fc.bias"] + torch.arange(len(names))})
    checkpoint.save(folder / "tiny", state)
    return folder / "tiny" / checkpoint.LAST


@torch.no_grad()
def fit_classifier(network, images, targets):
    """The network's state with BatchNorm's statistics of `images` and a ridge regression's classifier."""
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    network.train()
    network(images)
    network.eval()
    views = torch.cat([images, images.flip(3)])
    features = export.WithFeatures(network)(views)[1].mean((2, 3)).double()
    mean, spread = features.mean(0), features.std(0) + 1e-6
    scaled, wanted = (features - mean) / spread, torch.cat([targets, targets]).double() - targets.double().mean(0)
    weight = torch.linalg.solve(scaled.T @ scaled + 300 * torch.eye(len(mean)).double(), scaled.T @ wanted)
    weight = 20 * weight / spread[:, None]
    network.fc.weight.copy_(weight.T)
    network.fc.bias.copy_(-mean @ weight)
    return {name: tensor for name, tensor in network.state_dict().items() if "num_batches" not in name}


def seen(path):
    """What torchvision's evaluation makes of a file, by Pillow alone: float32 [3, RESOLUTION, RESOLUTION]."""
    picture = Image.open(path).convert("RGB")
    short, shorter = round(RESOLUTION / CROP_RATIO), min(picture.size)
    resized = picture.resize([short * side // shorter for side in picture.size], Image.Resampling.BILINEAR)
    left, top = (round((side - RESOLUTION) / 2) for side in resized.size)
    pixels = np.asarray(resized)[top : top + RESOLUTION, left : left + RESOLUTION]
    return normalize(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None])[0].numpy()


# Python's own record of whom the page looks up, connects to or sends to.
WATCH = """
import os, sys

def watch(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo"):
        address = arguments[1] if event != "socket.getaddrinfo" else arguments
        with open(os.environ["CONTACTED"], "a") as file:
            print(address[0] if isinstance(address, tuple) else address, file=file)

sys.addaudithook(watch)
"""


def link_checkout(folder):
    """A folder in which tools/app.sh finds the app and its packages installed: those of this checkout."""
    (folder / "tools").mkdir(parents=True)
    shutil.copy2(ROOT / "tools/app.sh", folder / "tools")
    (folder / "app").symlink_to(ROOT / "app")
    (folder / ".venv-app").mkdir()
    for part in APP_PYTHON.parent.parent.iterdir():
        if part.name != "rn50-app-done":
            (folder / ".venv-app" / part.name).symlink_to(part)
    pins = hashlib.sha256((ROOT / "app/requirements.txt").read_bytes()).hexdigest()
    (folder / ".venv-app/rn50-app-done").write_text(f"{folder} {pins}\n")
    return folder


class App:
    """The page as tools/app.sh opens it, in a process of its own. uploads: what it holds of what it was sent.

    settings: environment variables beside its own.
    """

    def __init__(self, model, scratch, **settings):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url, self.scratch = f"http://127.0.0.1:{port}", scratch
        # nothing but the app and the system's own: the Space has no rn50
        environment = {name: value for name, value in os.environ.items() if name in ("PATH", "LANG")}
        environment |= {"TMPDIR": str(scratch), "GRADIO_SERVER_PORT": str(port)}
        self.home, self.log, self._contacted = scratch / "home", scratch / "app.log", scratch / "contacted"
        (scratch / "watch").mkdir()
        (scratch / "watch/sitecustomize.py").write_text(WATCH)
        self.home.mkdir()
        environment |= {"HOME": self.home, "PYTHONPATH": scratch / "watch", "CONTACTED": self._contacted, **settings}
        with open(self.log, "w") as log:
            command = ["bash", link_checkout(scratch / "checkout") / "tools/app.sh", model]
            self.process = subprocess.Popen(command, env=environment, cwd=scratch, stdout=log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 90
        while True:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            try:
                requests.get(f"{self.url}/gradio_api/startup-events", timeout=2)
                break
            except OSError:
                time.sleep(0.1)

    def upload(self, path):
        with open(path, "rb") as file:
            sent = requests.post(f"{self.url}/gradio_api/upload", files={"files": (Path(path).name, file)}, timeout=60)
        sent.raise_for_status()
        return sent.json()[0]

    def ask(self, path, endpoint="predict"):
        """(event, data as text) of the endpoint's answer to a file that is on the server."""
        body = {"data": [{"path": str(path), "meta": {"_type": "gradio.FileData"}}]}
        call = f"{self.url}/gradio_api/call/{endpoint}"
        event = requests.post(call, json=body, timeout=60).json()["event_id"]
        answer = requests.get(f"{call}/{event}", timeout=60).text
        # heartbeats come before it where it takes long
        return re.fullmatch(r"event: (\w+)\ndata: (.*)", answer.strip().split("\n\n")[-1]).groups()

    def predict(self, path):
        return self.ask(self.upload(path))

    def uploads(self):
        return [path for path in self.scratch.glob("uploads-*/**/*") if path.is_file()]

    def contacted(self):
        """Hosts and paths that the page has looked up, connected or sent to."""
        return set(self._contacted.read_text().split()) if self._contacted.exists() else set()

    def peak_mib(self):
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024

    def close(self):
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        assert not list(self.scratch.glob("uploads-*")), "pictures are still there after the page has ended"


def chromium():
    """(chromium, chromedriver), or None where one of them is not installed."""
    programs = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    return programs if all(programs) else None
