"""Images per second of one training step on a GPU: ours in every form, and those of its peers, in one process.

    python studies/gpu_step/gpu_step.py --json OUT              # CUDA where there is one
    python studies/gpu_step/gpu_step.py --only fp16,ffcv --resolutions 128 --profile OUT

Every candidate has its own network and optimizer, and steps over uint8 images that lie on the device already, so that
no loader is measured. Candidates take turns, --repeats times; medians are printed, with the peak memory, and the share
of what the GPU could do: the time in which it would copy the bytes that the step's operations read and write, and the
time in which it would multiply as much, both from rates measured in the same run, over the time that the step took.
The peers are written here from their described behaviour: github.com/libffcv/ffcv-imagenet (train_imagenet.py),
github.com/pytorch/vision (references/classification), and timm's networks where timm is installed.
"""

import argparse
import contextlib
import json
import platform
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from rn50 import recipe
from rn50.augment import IMAGENET_MEAN, IMAGENET_STD, normalize
from rn50.command import run
from rn50.ema import EMA
from rn50.errors import UsageError
from rn50.files import write_result
from rn50.learner import Learner
from rn50.machine import commit, processor
from rn50.model import BlurConv2d, build_model

FLAGSHIP = Path(__file__).parents[2] / "rn50_configs/rn50_78.yaml"
CLASSES = 1000
RATE = 1e-3


def main():
    args = arguments()
    device = torch.device(args.device)
    torch.backends.cudnn.benchmark = args.cudnn > 0
    torch.backends.cudnn.benchmark_limit = args.cudnn
    report = {
        "made_by": "studies/gpu_step/gpu_step.py",
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else processor(),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
        "arch": args.arch,
        "batch": args.batch,
        "cudnn_benchmark_limit": args.cudnn,
        "repeats": args.repeats,
        "ceilings": ceilings(device),
        "results": [],
        "failed": {},
    }
    print(f"{report['device']}, torch {torch.__version__}, {args.arch}, {args.batch} images a step")
    print("ceilings:", ", ".join(f"{name} {value:.3g}" for name, value in report["ceilings"].items()), flush=True)
    steps = {}
    for name in args.only:
        torch.manual_seed(0)
        steps[name] = CANDIDATES[name](args, device)
    for px in args.resolutions:
        report["results"] += at_resolution(steps, px, args, device, report["ceilings"], report["failed"])
        if args.json:
            write_result(args.json, json.dumps(report, indent=1) + "\n")
    if args.profile:
        write_result(args.profile, profile(steps, args, device))


# --- Candidates: functions of (arguments, device) that give a Candidate --------------------------------------------


class Candidate:
    """`step` and `gradients`, functions of (images uint8 [n, 3, px, px], labels int64 [n]) on the device.

    gradients: forward and backward pass alone; clear: a function that forgets the gradients. micro_batches: in a step.
    """

    def __init__(self, step, gradients, clear, micro_batches=1):
        self.step, self.gradients, self.clear, self.micro_batches = step, gradients, clear, micro_batches


def ours(*settings, change=None, accumulation=1):
    """The flagship's step with further `settings`. change: what is done to the network before it is trained."""

    def build(args, device):
        cfg = recipe.load(
            "",
            [
                f"--config-file={FLAGSHIP}",
                "--data.dir=none",
                f"--model.arch={args.arch}",
                *(f"--{setting}" for setting in settings),
            ],
        )
        learner = Learner(cfg, classes=CLASSES, device=device)
        if change:
            change(learner.network)
            learner.ema = EMA(learner.network, half_life=cfg.model.ema_half_life)
        learner.train()
        samples = np.arange(args.batch)

        def step(images, labels):
            batches = iter([(images, labels, samples)] * accumulation)
            learner.step(batches, accumulation=accumulation, learning_rate=RATE, epoch=0, step=0)

        return Candidate(
            step,
            lambda images, labels: learner.forward_backward(images, labels, 1),
            lambda: learner.optimizer.zero_grad(set_to_none=True),
            accumulation,
        )

    return build


class DenseBlurConv2d(nn.Module):
    """BlurPool as ffcv-imagenet has it: every pixel is blurred, then the convolution strides, 1x1 ones too."""

    def __init__(self, conv, stride, blur_filter):
        super().__init__()
        self.conv, conv.stride = conv, stride
        self.register_buffer("blur_filter", blur_filter)

    def forward(self, x):
        return self.conv(F.conv2d(x, self.blur_filter, padding=1, groups=x.shape[1]))


class PooledBlurConv2d(nn.Module):
    """The same blur as two 2x2 average pools, the second with the stride of a pointwise convolution."""

    def __init__(self, conv, stride):
        super().__init__()
        self.conv = conv
        self.first = nn.AvgPool2d(2, stride=1, padding=1)
        self.second = nn.AvgPool2d(2, stride=stride)

    def forward(self, x):
        return self.conv(self.second(self.first(x)))


def dense_blur(network):
    """Blur all pixels, also those that a pointwise convolution does not read."""
    replace_blurs(network, lambda blur: DenseBlurConv2d(blur.conv, (2, 2), blur.blur_filter))


def pooled_blur(network):
    replace_blurs(network, lambda blur: PooledBlurConv2d(blur.conv, blur.stride))


def replace_blurs(module, make):
    for name, child in module.named_children():
        if isinstance(child, BlurConv2d):
            setattr(module, name, make(child))
        else:
            replace_blurs(child, make)


def ffcv_imagenet(args, device):
    """fp16 autocast with the loss inside, pixels normalised to half, BlurPool at every pixel, no EMA."""
    network = build_model(arch=args.arch, num_classes=CLASSES, blurpool=True, zero_init_last_bn=False)
    dense_blur(network)
    network = network.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=RATE, momentum=0.9, weight_decay=5e-5)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    scaler = torch.amp.GradScaler(device.type)
    mean, std = (torch.tensor(of, device=device).view(1, 3, 1, 1) for of in (IMAGENET_MEAN, IMAGENET_STD))

    def gradients(images, labels):
        pixels = ((images - mean) / std).half()
        with torch.autocast(device.type, dtype=torch.float16):
            loss = criterion(network(pixels), labels)
        scaler.scale(loss).backward()

    def step(images, labels):
        optimizer.zero_grad(set_to_none=True)
        gradients(images, labels)
        scaler.step(optimizer)
        scaler.update()

    return Candidate(step, gradients, optimizer.zero_grad)


def reference(make, dtype=torch.float16):
    """As torchvision's references with --amp, in channels_last; float32 pixels, the loss read after each step."""

    def build(args, device):
        network = make(args).to(device, memory_format=torch.channels_last).train()
        optimizer = torch.optim.SGD(network.parameters(), lr=RATE, momentum=0.9, weight_decay=1e-4)
        criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
        scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

        def gradients(images, labels):
            pixels = normalize(images)
            with torch.autocast(device.type, dtype=dtype):
                loss = criterion(network(pixels), labels)
            scaler.scale(loss).backward()
            return loss

        def step(images, labels):
            optimizer.zero_grad()
            loss = gradients(images, labels)
            scaler.step(optimizer)
            scaler.update()
            loss.item()

        return Candidate(step, gradients, optimizer.zero_grad)

    return build


def torchvision_network(args):
    return getattr(torchvision.models, args.arch)(weights=None)


def timm_network(name):
    def make(args):
        import timm

        return timm.create_model(name)

    return make


FP16, BF16, PLAIN = "training.precision=fp16", "training.precision=bf16", "model.blurpool=false"
NO_BLUR_MAXPOOL, COMPILE = "model.blur_maxpool=false", "training.compile=true"
CANDIDATES = {
    "fp16": ours(FP16),
    "bf16": ours(BF16),
    "fp32": ours("training.precision=fp32"),
    "fp16_dense_blur": ours(FP16, change=dense_blur),
    "bf16_dense_blur": ours(BF16, change=dense_blur),
    "fp16_pooled_blur": ours(FP16, change=pooled_blur),
    "fp16_no_blur_maxpool": ours(FP16, NO_BLUR_MAXPOOL),
    "fp16_no_blur": ours(FP16, NO_BLUR_MAXPOOL, PLAIN),
    "fp16_contiguous": ours(FP16, "training.channels_last=false"),
    "fp16_no_mixup": ours(FP16, "training.mixup=0"),
    "fp16_sam_in_every_step": ours(FP16, "training.sam_interval=1"),
    "fp16_8_accumulated": ours(FP16, accumulation=8),
    "fp16_compiled": ours(FP16, COMPILE),
    "bf16_compiled": ours(BF16, COMPILE),
    "ffcv": ffcv_imagenet,
    "torchvision": reference(torchvision_network),
    "timm_resnet50": reference(timm_network("resnet50")),
    "timm_resnetblur50": reference(timm_network("resnetblur50")),
}


# --- Measuring -----------------------------------------------------------------------------------------------------


def at_resolution(steps, px, args, device, ceilings, failed):
    """Rows of all candidates at `px` pixels."""
    generator = torch.Generator().manual_seed(px)
    pixels = torch.randint(0, 256, (args.batch, px, px, 3), dtype=torch.uint8, generator=generator)
    images = pixels.permute(0, 3, 1, 2).to(device)
    labels = torch.randint(0, CLASSES, (args.batch,), generator=generator).to(device)
    rows, counts, spent = {}, {}, {}
    for name, candidate in list(steps.items()):
        step = candidate.step
        reset_memory(device)
        before = memory(device)
        started = time.perf_counter()
        with left_out(name, px, steps, failed):
            for _ in range(args.warm_up):
                step(images, labels)
            finish(device)
            first = time.perf_counter() - started
            row = {"name": name, "resolution": px, "first_seconds": round(first, 2)}
            row["peak_gib"] = round((memory(device, peak=True) - before) / 2**30, 2)
            row |= work_of(step, images, labels) if "compiled" not in name else {}
            once = timed(step, images, labels, 1, device)
            counts[name], spent[name] = max(1, round(args.seconds / once)), []
            if device.type == "cuda":
                row |= without_launches(candidate, images, labels, args.repeats)
            rows[name] = row
    for _ in range(args.repeats):
        for name in rows:
            spent[name].append(timed(steps[name].step, images, labels, counts[name], device) / counts[name])
    for name, row in rows.items():
        seconds = statistics.median(spent[name])
        row["images_per_second"] = round(steps[name].micro_batches * args.batch / seconds, 1)
        row["spread"] = round((max(spent[name]) - min(spent[name])) / seconds, 4)
        row["milliseconds"] = round(1000 * seconds, 3)
        # a compiled step does the work of the same step in eager mode, which alone can be watched
        work = row if "tflop" in row else rows.get(name.removesuffix("_compiled"), {})
        if "tflop" in work:
            row["copy_share"] = round(work["gigabytes"] / ceilings["copy_gb_per_s"] / seconds, 3)
            row["multiply_share"] = round(work["tflop"] / ceilings["fp16_tflop_per_s"] / seconds, 3)
    reference = rows.get("ffcv", next(iter(rows.values()), None))
    print(f"\n{px} px   images/s  over {reference['name']}   spread   GiB  copying  multiplying  ms without launches")
    for name, row in rows.items():
        over = row["images_per_second"] / reference["images_per_second"]
        print(
            f"{name:22}{row['images_per_second']:8.0f}{over:8.3f}{row['spread']:9.1%}{row['peak_gib']:7.1f}"
            f"{row.get('copy_share', 0):8.0%}{row.get('multiply_share', 0):8.0%}{row.get('gpu_milliseconds', 0):10.2f}",
            flush=True,
        )
    return list(rows.values())


@contextlib.contextmanager
def left_out(name, px, steps, failed):
    """What fails at this resolution is left out from here on, and said: the others' figures are still worth having."""
    try:
        yield
    except Exception as error:
        failed[f"{name} at {px} px"] = f"{type(error).__name__}: {error}"[:2000]
        print(
            f"{name} is left out from {px} px on: {str(error).splitlines()[0] if str(error) else error!r}", flush=True
        )
        del steps[name]


def without_launches(candidate, images, labels, repeats):
    """gpu_milliseconds of a forward and backward pass: replays of a CUDA graph, for which the GPU needs no host."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            for _ in range(2):
                candidate.clear()
                candidate.gradients(images, labels)
        torch.cuda.current_stream().wait_stream(stream)
        candidate.clear()
        with torch.cuda.graph(graph):
            candidate.gradients(images, labels)
        return {"gpu_milliseconds": round(1000 * median_seconds(graph.replay, images.device, 2 * repeats), 3)}
    except RuntimeError as error:
        return {"no_graph": str(error)[:500]}
    finally:
        candidate.clear()
        del graph
        torch.cuda.empty_cache()


def work_of(step, images, labels):
    """What the operations of a step compute, read and write."""
    moved = Moved()
    with FlopCounterMode(display=False) as flops, moved:
        step(images, labels)
    return {"tflop": flops.get_total_flops() / 1e12, "gigabytes": moved.bytes / 1e9}


class Moved(TorchDispatchMode):
    """Adds up the bytes that operations read and write, each tensor once per operation; views cost nothing."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            for tensor in torch.utils._pytree.tree_leaves((args, kwargs, result)):
                if isinstance(tensor, torch.Tensor):
                    self.bytes += tensor.numel() * tensor.element_size()
        return result


def timed(step, images, labels, count, device):
    finish(device)
    started = time.perf_counter()
    for _ in range(count):
        step(images, labels)
    finish(device)
    return time.perf_counter() - started


def ceilings(device):
    """GB/s of a large copy, read and written bytes counted, and TFLOP/s of a large product in half precision."""
    large = device.type == "cuda"
    source = torch.randn((1 << 29) if large else (1 << 22), device=device)
    target = torch.empty_like(source)
    side = 8192 if large else 256
    a, b = (torch.randn(side, side, device=device).half() for _ in range(2))
    copying = median_seconds(lambda: target.copy_(source), device)
    multiplying = median_seconds(lambda: a @ b, device)
    return {
        "copy_gb_per_s": 2 * source.numel() * source.element_size() / copying / 1e9,
        "fp16_tflop_per_s": 2 * side**3 / multiplying / 1e12,
    }


def median_seconds(function, device, repeats=9):
    function()
    spent = []
    for _ in range(repeats):
        finish(device)
        started = time.perf_counter()
        function()
        finish(device)
        spent.append(time.perf_counter() - started)
    return statistics.median(spent)


def profile(steps, args, device):
    """What takes longest in ten steps of the first two candidates at the first resolution, as text."""
    px, sections = args.resolutions[0], []
    images = torch.randint(0, 256, (args.batch, px, px, 3), dtype=torch.uint8).permute(0, 3, 1, 2).to(device)
    labels = torch.randint(0, CLASSES, (args.batch,)).to(device)
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    key = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    for name, candidate in list(steps.items())[:2]:
        step = candidate.step
        step(images, labels)
        finish(device)
        with torch.profiler.profile(activities=activities) as profiler:
            for _ in range(10):
                step(images, labels)
            finish(device)
        sections.append(f"{name}, ten steps of {args.batch} images at {px} px\n")
        sections.append(kernels(profiler, device) if device.type == "cuda" else "")
        sections.append(profiler.key_averages().table(sort_by=key, row_limit=10, max_name_column_width=60))
    return "\n".join(sections)


def kernels(profiler, device):
    """Time and share of each kernel, those alike added up."""
    events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    total = {}
    for event in events:
        spent, times = total.get(event.name, (0, 0))
        total[event.name] = spent + event.self_device_time_total, times + 1
    everything = sum(spent for spent, _ in total.values())
    longest = sorted(total.items(), key=lambda item: -item[1][0])[:25]
    lines = [f"{everything / 1000:.1f} ms of kernels"]
    lines += [
        f"{spent / everything:6.1%}{spent / 1000:9.2f} ms{times:6} x  {name[:150]}" for name, (spent, times) in longest
    ]
    return "\n".join(lines) + "\n"


def finish(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory(device, peak=False):
    if device.type != "cuda":
        return 0
    return torch.cuda.max_memory_allocated(device) if peak else torch.cuda.memory_allocated(device)


def reset_memory(device):
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: the GPU where there is one",
    )
    parser.add_argument("--arch", default="resnet50", help="network, as torchvision calls it (%(default)s)")
    parser.add_argument("--resolutions", type=numbers, default=[96, 128, 176, 224], help="px, comma-separated")
    parser.add_argument("--batch", type=int, default=256, help="images of a step (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each candidate (%(default)s)")
    parser.add_argument("--seconds", type=float, default=0.25, help="of one turn of one candidate")
    parser.add_argument("--warm-up", type=int, default=3, help="steps, in which cuDNN chooses its kernels")
    parser.add_argument(
        "--cudnn", type=int, default=10, help="kernels that cuDNN tries for a shape; 0: its first choice"
    )
    parser.add_argument("--only", type=names, default=",".join(CANDIDATES), help=f"of {', '.join(CANDIDATES)}")
    parser.add_argument("--json", metavar="OUT", help="where to write the figures")
    parser.add_argument("--profile", metavar="OUT", help="kernels of the first two at the first resolution")
    args = parser.parse_args()
    args.only = names(args.only) if isinstance(args.only, str) else args.only
    if unknown := set(args.only) - set(CANDIDATES):
        raise UsageError(f"--only names {', '.join(sorted(unknown))}; there are {', '.join(CANDIDATES)}")
    if not timm_is_there():
        args.only = [name for name in args.only if not name.startswith("timm")]
    return args


def numbers(text):
    return [int(word) for word in text.split(",")]


def names(text):
    return text.split(",")


def timm_is_there():
    try:
        import timm  # noqa: F401
    except ImportError:
        return False
    return True


if __name__ == "__main__":
    run(main)
