"""The yardstick for the Imagenette run: the same network and optimizer, a plain torchvision DataLoader,
one fixed resolution, and a given amount of processor time.

    python studies/imagenette_cpu/baseline_torchvision.py --data IMAGENETTE --resolution 80 --eval-resolution 96 \\
        --cpu-minutes 68 --out runs/imagenette_baseline

The learning rate follows the processor time spent (linear to zero at the last minute), so the run takes what
it is given on any machine, busy or not. Only training counts; it resumes by epoch.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path

import torch
from torchvision import datasets, transforms
from torchvision.transforms import InterpolationMode

from rn50 import schedules
from rn50.augment import normalize
from rn50.command import run
from rn50.ema import EMA
from rn50.errors import UsageError
from rn50.evaluate import evaluate
from rn50.files import read_rows, write_atomically
from rn50.losses import cross_entropy
from rn50.model import build_model
from rn50.optimizer import build_optimizer, set_learning_rate
from rn50.precision import autocast_dtype, dtype_name
from rn50.training import checkpoint, distributed


def main():
    args = arguments()
    device, _, _ = distributed.setup("cpu")
    torch.manual_seed(args.seed)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    train, val = data_loaders(args)
    classes = len(train.dataset.classes)
    network = build_model(arch="resnet50", num_classes=classes).to(memory_format=torch.channels_last)
    ema = EMA(network, half_life=args.ema_half_life)
    optimizer = build_optimizer(network, momentum=0.9, nesterov=True, weight_decay=args.weight_decay, decay="weights")
    spent, epoch, budget = 0.0, 0, 60 * args.cpu_minutes
    saved = checkpoint.newest(out, warn=print)
    if saved:
        network.load_state_dict(saved["model"])
        ema.load_state_dict(saved["ema"])
        optimizer.load_state_dict(saved["optimizer"])
        spent, epoch = saved["seconds"], saved["epochs_done"]
    rows = [row for row in read_rows(out / "log.jsonl") if row["epoch"] < epoch]
    peak = schedules.peak_learning_rate(lr_per_256=args.lr_per_256, batch_size=args.batch_size)
    dtype = autocast_dtype("auto", device)
    autocast = partial(torch.autocast, device.type, dtype=dtype, enabled=dtype != torch.float32)
    while spent < budget:
        network.train()
        started, loss_sum, images_seen = time.process_time(), 0.0, 0
        for images, labels in train:
            progress = (spent + time.process_time() - started) / budget
            if progress >= 1:
                break
            rate = schedules.learning_rate(
                progress, peak=peak, epochs=1, schedule="linear", warmup_epochs=args.warmup_share
            )
            set_learning_rate(optimizer, rate)
            with autocast():
                logits = network(normalize(images))
            loss = cross_entropy(logits, labels, smoothing=0.1)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            ema.update(network)
            loss_sum += loss.item() * len(labels)
            images_seen += len(labels)
        seconds = time.process_time() - started
        spent += seconds
        row = {
            "epoch": epoch,
            "resolution": args.resolution,
            "precision": dtype_name(dtype),
            "lr": rate,
            "train_loss": loss_sum / max(images_seen, 1),
            "images_per_cpu_second": round(images_seen / seconds, 2),
            "cpu_seconds": round(seconds, 3),
            "total_cpu_seconds": round(spent, 3),
        }
        if spent >= budget:
            row |= evaluate(ema.model, val, classes=classes, device=device, autocast=autocast)["single"]
        epoch += 1
        rows.append(row)
        write_atomically(out / "log.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        state = {"model": network.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()}
        checkpoint.save(out, {**state, "seconds": spent, "epochs_done": epoch})
        print(json.dumps(row), flush=True)


def data_loaders(args):
    """ImageFolder loaders in FFCV's format of a batch: uint8 [N, 3, H, W], so that the rest is the same code."""
    to_tensor = transforms.PILToTensor()
    crop = transforms.RandomResizedCrop(args.resolution, scale=tuple(args.crop_scale))
    size = round(args.eval_resolution / args.crop_ratio)
    resize = transforms.Resize(size, interpolation=InterpolationMode.BILINEAR)
    trees = [Path(args.data) / split for split in ("train", "val")]
    for tree in trees:
        if not tree.is_dir():
            raise UsageError(f"--data must hold train/ and val/; there is no {tree}")
    train = datasets.ImageFolder(trees[0], transforms.Compose([crop, transforms.RandomHorizontalFlip(), to_tensor]))
    val = datasets.ImageFolder(
        trees[1], transforms.Compose([resize, transforms.CenterCrop(args.eval_resolution), to_tensor])
    )
    # in this process: the time of worker processes would not be in time.process_time()
    return (
        torch.utils.data.DataLoader(train, args.batch_size, shuffle=True, drop_last=True, num_workers=0),
        torch.utils.data.DataLoader(val, 256, num_workers=0),
    )


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--data", required=True, help="ImageFolder tree with train/ and val/")
    parser.add_argument("--out", required=True, help="run folder")
    parser.add_argument("--cpu-minutes", type=float, required=True, help="processor time of the training, all threads")
    parser.add_argument("--resolution", type=int, required=True, help="px of the training crops")
    parser.add_argument("--eval-resolution", type=int, required=True, help="px of the centre crops")
    parser.add_argument("--crop-ratio", type=float, default=1.0, help="centre crop over the short side")
    parser.add_argument("--crop-scale", type=float, nargs=2, default=(0.35, 1.0), help="range of the crop's area")
    parser.add_argument("--batch-size", type=int, default=64, help="images of a step (%(default)s)")
    parser.add_argument(
        "--lr-per-256", type=float, default=0.2, help="peak for every 256 images of a step (%(default)s)"
    )
    parser.add_argument("--weight-decay", type=float, default=5e-4, help="L2 penalty (%(default)s)")
    parser.add_argument("--warmup-share", type=float, default=1 / 12, help="of the minutes")
    parser.add_argument("--ema-half-life", type=float, default=60, help="steps")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and crops (%(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
