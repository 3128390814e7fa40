"""How fast the Space answers on this machine: `python studies/space/benchmark_app.py --model model/ --image IMAGE`.

Four figures, each with the least that is asked of it: the latency of one picture (bytes to probabilities) against the
same network in PyTorch eager and in a plain pipeline as transformers has it; the time from starting app.py to its first
answer; ten visitors at once, 200 requests; and the installed size of app/requirements.txt in a fresh environment.
Exit status 1 where one falls short. --json FILE keeps the figures.
"""

import argparse
import copy
import io
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as transforms

from rn50.augment import normalize
from rn50.command import run
from rn50.errors import RunError
from rn50.files import write_atomically
from rn50.help import HelpFormatter
from rn50.machine import commit
from rn50.publishing import export

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "app"))
import inference  # noqa: E402

APP_PYTHON = ROOT / ".venv-app" / "bin" / "python"
ROUNDS, COLD_STARTS, USERS, REQUESTS = 60, 3, 10, 200
# name: (at least, aim, unit, whether more is better)
TARGETS = {
    "speedup": (1.5, 2.5, "x", True),
    "cold_start": (6.0, 3.0, "s", False),
    "p95": (3.0, 1.5, "s", False),
    "installed": (700.0, 450.0, "MB", False),
}


def main():
    args = arguments()
    if not APP_PYTHON.exists():
        raise RunError("the Space's packages are not installed; run: bash tools/app.sh --install")
    try:
        data = args.image.read_bytes()
        inference.decode_image(data)
        model = inference.Classifier(args.model)
    except OSError as error:
        raise RunError(f"cannot read {args.image}: {error.strerror}") from None
    except (inference.UnreadableImage, inference.BadModel) as error:
        raise RunError(str(error)) from None
    figures = {"machine": machine(), "model": describe(model), "image": describe_image(data)}
    figures |= latencies(model, data)
    figures |= served(args.model, args.image)
    figures["installed"] = installed_megabytes()
    if args.json:
        write_atomically(args.json, json.dumps(figures, indent=1) + "\n")
    if short := report(figures):
        raise RunError(f"below what is asked: {', '.join(short)}")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--model", default="model", type=Path, help="an exported model's folder (default: model)")
    parser.add_argument("--image", required=True, type=Path, help="the picture to send")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    return parser.parse_args()


def machine():
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions["onnxruntime"] = inference.onnxruntime.__version__
    return {"processor": name, "cores": inference.cores(), "commit": commit(), **versions}


def describe(model):
    return f"{model.config['architecture']['arch']}, {len(model.labels)} classes, {model.resolution} px, " + (
        "8 bits" if model.config["network"] == export.NETWORK_INT8 else "32 bits"
    )


def describe_image(data):
    picture = Image.open(io.BytesIO(data))
    return f"{picture.width}x{picture.height} {picture.format}, {len(data)} bytes"


def latencies(model, data):
    """Median milliseconds from a picture's bytes to its probabilities, in turns so that all see the same machine."""
    torch.set_num_threads(inference.cores())
    network = export.load_network(model.config["architecture"], export.read_safetensors(model.folder / export.WEIGHTS))
    network_nhwc = copy.deepcopy(network).to(memory_format=torch.channels_last)
    programs = {
        "app": lambda: model.predict(data),
        "eager": lambda: eager(network, model, data),
        "eager_nhwc": lambda: eager(network_nhwc, model, data, torch.channels_last),
        "pipeline": lambda: pipeline(network, model, data),
    }
    if model.config["network"] != export.NETWORK:
        float32 = inference.Classifier(model.folder, file=export.NETWORK)
        programs["app_fp32"] = lambda: float32.predict(data)
    taken = {name: [] for name in programs}
    for _ in range(ROUNDS):
        for name, program in programs.items():
            started = time.perf_counter()
            program()
            taken[name].append(1000 * (time.perf_counter() - started))
    # the first rounds warm up allocators and caches
    middle = {f"{name}_ms": median(times[5:]) for name, times in taken.items()}
    # the faster of the two memory layouts: whoever serves with PyTorch would choose it
    return middle | {"speedup": min(middle["eager_ms"], middle["eager_nhwc_ms"]) / middle["app_ms"]}


@torch.inference_mode()
def eager(network, model, data, layout=torch.contiguous_format):
    """The app's own decoding and preprocessing, then PyTorch."""
    pixels = torch.from_numpy(model.prepare(inference.decode_image(data)))
    return network(pixels[None].to(memory_format=layout))[0].softmax(0)


@torch.no_grad()
def pipeline(network, model, data):
    """As transformers' image-classification pipeline: Pillow, normalised arrays, the network, the best five."""
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    resized = transforms.resize(picture, [round(model.resolution / model.crop_ratio)], antialias=True)
    pixels = np.asarray(transforms.center_crop(resized, [model.resolution] * 2))
    inputs = normalize(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None])
    scores, ids = network(inputs).softmax(1)[0].topk(min(5, len(model.labels)))
    return [{"label": model.names[k], "score": s} for k, s in zip(ids.tolist(), scores.tolist(), strict=True)]


def served(folder, image):
    """Seconds to the first answer after a start, and of requests of ten visitors, uploads included."""
    starts = []
    for number in range(COLD_STARTS):
        with Served(folder) as app:
            app.first_answer(image)
            starts.append(time.perf_counter() - app.started)
            if number == COLD_STARTS - 1:
                with ThreadPoolExecutor(USERS) as users:
                    began = time.perf_counter()
                    outcomes = list(users.map(lambda _: app.request(image), range(REQUESTS)))
                    lasted = time.perf_counter() - began
                peak = app.peak_mib()
    took = [seconds for seconds, right in outcomes if right]
    return {
        "cold_start": median(starts),
        "errors": sum(not right for _, right in outcomes),
        "p50": float(np.percentile(took, 50)) if took else float("nan"),
        "p95": float(np.percentile(took, 95)) if took else float("nan"),
        "requests_per_second": REQUESTS / lasted,
        "peak_mib": peak,
    }


class Served:
    """app.py in a process of its own."""

    def __init__(self, folder):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url, self.environment = f"http://127.0.0.1:{port}", {**os.environ, "MODEL_DIR": str(folder.resolve())}
        self.environment |= {"GRADIO_SERVER_PORT": str(port)}
        self.environment.pop("PYTHONPATH", None)

    def __enter__(self):
        self.started = time.perf_counter()
        self._log = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [APP_PYTHON, ROOT / "app" / "app.py"], env=self.environment, stdout=self._log, stderr=subprocess.STDOUT
        )
        return self

    def __exit__(self, *error):
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def first_answer(self, image, within=120):
        deadline = time.perf_counter() + within
        while True:
            try:
                _, right = self.request(image)
                if right:
                    return
            except OSError:
                pass
            if self._process.poll() is not None or time.perf_counter() > deadline:
                self._log.seek(0)
                raise RunError(f"app.py gave no answer: {self._log.read()[-500:]}")
            time.sleep(0.02)

    def request(self, image):
        """(seconds, whether it was answered) of one visitor's upload and question."""
        started = time.perf_counter()
        boundary = uuid.uuid4().hex
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="picture.jpg"\r\n\r\n'
        body = head.encode() + image.read_bytes() + f"\r\n--{boundary}--\r\n".encode()
        kind = f"multipart/form-data; boundary={boundary}"
        path = json.loads(self._send("/gradio_api/upload", body, kind))[0]
        question = {"data": [{"path": path, "meta": {"_type": "gradio.FileData"}}]}
        call = "/gradio_api/call/predict"
        event = json.loads(self._send(call, json.dumps(question).encode(), "application/json"))["event_id"]
        answer = self._send(f"{call}/{event}")
        # after heartbeats, where it takes long
        return time.perf_counter() - started, "event: complete" in answer and '"confidences"' in answer

    def _send(self, path, body=None, kind=None):
        request = urllib.request.Request(self.url + path, body, {"Content-Type": kind} if kind else {})
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.read().decode()

    def peak_mib(self):
        for line in Path(f"/proc/{self._process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
        return float("nan")


def installed_megabytes():
    """10^6 bytes on disk that `pip install -r app/requirements.txt` adds to a fresh environment, with .pyc files."""
    folder = Path(tempfile.mkdtemp(prefix="rn50-app-"))
    try:
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True, capture_output=True)
        empty = disk_bytes(folder)
        pip = [folder / "venv/bin/python", "-m", "pip", "install", "-q", "-r", ROOT / "app/requirements.txt"]
        done = subprocess.run(pip, capture_output=True, text=True)
        if done.returncode:
            raise RunError(f"pip cannot install app/requirements.txt: {done.stderr.strip().splitlines()[-1]}")
        return (disk_bytes(folder) - empty) / 1e6
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def disk_bytes(folder):
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return sum(path.stat().st_blocks * 512 for path in files)


def report(figures):
    """Print the figures; gives the name of each that falls short of what is asked."""
    print(
        f"{figures['model']}; {figures['image']}; {figures['machine']['cores']} cores of "
        f"{figures['machine']['processor']}"
    )
    for name in ("app", "app_fp32", "eager", "eager_nhwc", "pipeline"):
        if f"{name}_ms" in figures:
            what = {
                "app": "the app's predict",
                "app_fp32": "the same with 32 bits",
                "eager": "PyTorch eager, the app's preprocessing",
                "eager_nhwc": "the same, channels_last",
                "pipeline": "PyTorch in a transformers-style pipeline",
            }[name]
            print(f"  {figures[f'{name}_ms']:7.1f} ms  {what}")
    print(
        f"  {figures['requests_per_second']:7.1f} requests/s of {USERS} visitors at once (median {figures['p50']:.2f} "
        f"s), {figures['errors']} errors, {figures['peak_mib']:.0f} MiB at most"
    )
    short = []
    for name, what in {
        "speedup": "faster than PyTorch eager",
        "cold_start": "from start to first answer",
        "p95": f"95th percentile of {REQUESTS} requests, {USERS} at once",
        "installed": "added to a fresh environment by app/requirements.txt",
    }.items():
        least, aim, unit, more = TARGETS[name]
        value = figures[name]
        reached = value >= least if more else value <= least
        word = "below what is asked" if not reached else "aim reached" if (value >= aim) == more else "reached"
        print(f"  {value:7.2f} {unit:2}  {what}: {word} (at {'least' if more else 'most'} {least:g}, aim {aim:g})")
        if not reached:
            short.append(name)
    if figures["errors"]:
        short.append("errors")
    return short


if __name__ == "__main__":
    run(main)
