"""What a change of the code's layout must not change: compares it with tests/golden/, which an earlier tree recorded.

    python tests/golden.py                   # exit status 1 and the differences where something is not as recorded
    python tests/golden.py --record          # after a change that is meant
    python tests/golden.py --leave FOLDER    # also leave a run that was stopped half-way, for another tree ...
    python tests/golden.py --resume FOLDER   # ... to end: it must come to the recorded weights

Everything is made by the commands that a user types. Digests of weights hold for one processor and torch alone: on
another they are said to be skipped. Texts are kept as files, so that a difference can be read.
"""

import argparse
import base64
import difflib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
KEPT = ROOT / "tests" / "golden"
TIMES = {"images_per_second", "data_wait_fraction", "train_seconds", "cpu_seconds", "elapsed_seconds", "val_seconds"}
BATCH, EPOCHS, IMAGES = 20, 4, 200
STEPS = EPOCHS * IMAGES // BATCH
RUN = {
    "model.arch": "resnet18",
    "model.blurpool": "true",
    "model.blur_maxpool": "true",
    "model.log_prior_bias": "true",
    "model.ema_half_life": 5,
    "training.epochs": EPOCHS,
    "training.batch_size": BATCH,
    "training.micro_batch": 10,
    "training.nesterov": "true",
    "training.loss": "bce",
    "training.device": "cpu",
    "training.precision": "fp32",
    "lr.warmup_epochs": 1,
    "resolution.start": 32,
    "resolution.end": 64,
    "resolution.end_ramp": 2,
    "data.workers": 1,
    "data.brightness": 0.4,
    "data.contrast": 0.3,
    "data.saturation": 0.2,
    "validation.resolutions": "32,64",
    "validation.headline_resolution": 64,
    "validation.headline_view": "flip",
}
RUNS = {"1 rank, random order": (1, "random"), "2 ranks, page order": (2, "page")}
LEFT = "1 rank, random order"
MASKS = {r"\b[0-9a-f]{40}\b": "COMMIT", r"\bcommit [0-9a-f]{12}\b": "commit COMMIT", r"\b[0-9a-f]{64}\b": "SHA256"}
MASKS |= {r"\b(i|sg)-[0-9a-f]{17}\b": r"\1-ID", r"\brn50-[0-9a-f]{10}\b": "rn50-ROLE"}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="take what is there now for right")
    parser.add_argument("--leave", type=Path, metavar="FOLDER", help="where to leave a stopped run and its betons")
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="end the run that another tree left there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="golden-") as folder:
        made = make(Path(folder), args.leave, args.resume)
    if args.record:
        shutil.rmtree(KEPT, ignore_errors=True)
        KEPT.mkdir()
        for name, content in made.items():
            (KEPT / name).write_text(content)
        return
    kept = {path.name: path.read_text() for path in KEPT.iterdir()}
    different = False
    for name in sorted({*kept, *made}):
        if name == "weights.json" and json.loads(kept[name])["machine"] != json.loads(made[name])["machine"]:
            print(f"{name}: skipped, recorded on another machine")
            continue
        lines = (text.get(name, "").splitlines() for text in (kept, made))
        found = list(difflib.unified_diff(*lines, f"recorded {name}", f"{name} now", lineterm="", n=0))
        different = different or bool(found)
        print("\n".join(found) if found else f"{name}: as recorded")
    sys.exit(different)


def make(folder, leave, resume):
    """{name: text} of all that is compared."""
    said = {f"help_{script}.txt": run(f"{script}.py", "--help") for script in ("train_imagenet", "write_dataset")}
    said["plan.txt"] = run("tools/plan_run.py", "--budget", "25", "--target", "78")
    said |= launch()
    tree, betons = folder / "tree", folder / "betons"
    textures(tree)
    said["betons.json"] = json.dumps(written(tree, betons, folder), indent=1) + "\n"
    if leave:
        stop_half_way(betons, leave)
    weights = {"machine": machine()}
    for name, (ranks, order) in RUNS.items():
        weights[name] = train(betons, folder / "runs", name, ranks, order)
        print(f"{name}: done", flush=True)
    if resume:
        weights[LEFT] = train(resume / "betons", resume / "runs", LEFT, *RUNS[LEFT])
    said["weights.json"] = json.dumps(weights, indent=1) + "\n"
    said["export.json"] = export(folder / "runs" / slug(LEFT), tree, folder / "model")
    return said


def run(script, *arguments, environment=None, **options):
    """What a command of the repository prints."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=variables() | (environment or {}), **options
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def variables():
    fixed = {"COLUMNS": "100", "OMP_NUM_THREADS": "1", "AWS_EC2_METADATA_DISABLED": "true", "PYTHONPATH": str(ROOT)}
    return {**os.environ, **fixed}


def machine():
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
    return [processor, torch.backends.cpu.get_cpu_capability(), torch.__version__]


def textures(tree):
    """Ten classes, 20 training and 11 validation images each."""
    command = [sys.executable, "-m", "rn50.data.textures", tree, "--train-per-class", "20", "--val-per-class", "11"]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)


def written(tree, betons, folder):
    """{file: sha256} of a ladder made by one and by two workers, and of files with raw images."""
    found = {}
    for name, settings in {
        "1 worker": ["--out.workers=1"],
        "2 workers": ["--out.workers=2"],
        "raw_share 0.3": ["--out.workers=2", "--out.raw_share=0.3"],
    }.items():
        out = betons if name == "2 workers" else folder / slug(name)
        run("write_dataset.py", f"--source.dir={tree}", f"--out.dir={out}", "--out.resolutions=64,96", *settings)
        for path in sorted(out.glob("*.beton")):
            found[f"{name}: {path.name}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def slug(name):
    return re.sub(r"\W+", "_", name)


def flags(betons, folder, name, order):
    settings = RUN | {"data.dir": betons, "data.order": order, "logging.folder": folder, "logging.run_name": slug(name)}
    return [f"--{key}={value}" for key, value in settings.items()]


def train(betons, folder, name, ranks, order):
    """Train, or end what was begun; digests of all tensors of the last checkpoint and of the log without times."""
    script = [str(ROOT / "train_imagenet.py"), *flags(betons, folder, name, order)]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    done = subprocess.run(
        [sys.executable, *launcher, *script], capture_output=True, text=True, cwd=ROOT, env=variables()
    )
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stdout}{done.stderr}")
    return digests(folder / slug(name))


def digests(folder):
    import torch

    state = torch.load(folder / "last.pt", map_location="cpu", weights_only=True)
    tensors = hashlib.sha256()

    def walk(name, value):
        if isinstance(value, torch.Tensor):
            tensors.update(name.encode() + value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict | list | tuple):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                walk(f"{name}/{key}", item)

    for part in ("model", "ema", "optimizer", "scaler", "finite"):
        walk(part, state[part])
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    rows = [{key: value for key, value in row.items() if key not in TIMES} for row in rows]
    keys = sorted(state) + sorted(state["progress"])
    return {
        "step": state["step"],
        "tensors": tensors.hexdigest(),
        "rows": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
        "keys": hashlib.sha256(json.dumps(keys).encode()).hexdigest(),
        "top1": rows[-1]["top1"],
    }


def stop_half_way(betons, leave):
    """A run of LEFT that SIGTERM ended after a quarter to three quarters of its steps, with its betons beside it."""
    shutil.copytree(betons, leave / "betons")
    command = [sys.executable, str(ROOT / "train_imagenet.py"), "--logging.checkpoint_steps=1"]
    command += flags(leave / "betons", leave / "runs", LEFT, RUNS[LEFT][1])
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=variables()) as process:
        for line in process.stdout:
            if line.startswith("epoch 2/"):
                time.sleep(0.3)
                process.send_signal(signal.SIGTERM)
            if line.startswith("stopping at step"):
                print(f"left {leave}: {line}", end="", flush=True)
    if process.returncode != 3:
        sys.exit(f"the run that was to be left ended with status {process.returncode}")


def launch():
    """The plan that a launch shows and the user data it sends, under moto, without what differs from day to day."""
    import boto3

    from tests.services import MotoS3

    with MotoS3() as moto:
        client = {name: client_of(boto3, name, moto) for name in ("s3", "ec2")}
        for split in ("train", "val"):
            for side, kind in ((side, kind) for side in (400, 500) for kind in ("beton", "json")):
                client["s3"].put_object(Bucket="bucket", Key=f"rn50/betons/{split}_{side}.{kind}", Body=b"x")
        command = ["launch", "--bucket", "bucket", "--config", "rn50_configs/rn50_78.yaml", "--instance", "g5.2xlarge"]
        command += ["--spot", "--budget", "40", "--yes", "--commit", "HEAD", "--ami", "ami-03cf127a"]
        said = run("tools/ec2.py", *command, environment=moto.environment)
        (instance,) = client["ec2"].describe_instances()["Reservations"][0]["Instances"]
        found = client["ec2"].describe_instance_attribute(InstanceId=instance["InstanceId"], Attribute="userData")
        user_data = base64.b64decode(found["UserData"]["Value"]).decode()
    said = re.sub(r"\$\d+\.\d+(/h)?( to \$\d+\.\d+/h)?|\d+\.\d h", "N", said)  # moto's spot prices are drawn
    user_data = re.sub(r"RN50_MINUTES=\d+", "RN50_MINUTES=N", user_data)
    return {"launch.txt": masked(re.sub(r"us-east-1[a-f]", "ZONE", said)), "user_data.sh": masked(user_data)}


def client_of(boto3, name, moto):
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
    return boto3.client(name, endpoint_url=moto.url, **keys)


def export(run_folder, tree, out):
    """The exported model's config.json without what depends on weights, machine or time."""
    command = ["--checkpoint", run_folder / "last.pt", "--out", out, "--images", tree, "--no-int8"]
    run("tools/export_model.py", *command)
    config = json.loads((out / "config.json").read_text())
    for key in ("seconds", "commit", "device", "packages"):
        config["training"].pop(key)
    for key in ("agreement", "browser", "export", "links", "probabilities", "results", "curve"):
        config[key] = sorted(config[key]) if isinstance(config[key], dict) else len(config[key])
    return masked(json.dumps(config, indent=1)) + "\n"


def masked(text):
    for pattern, word in MASKS.items():
        text = re.sub(pattern, word, text)
    return text


if __name__ == "__main__":
    main()
