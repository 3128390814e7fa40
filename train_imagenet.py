"""Train a ResNet on ImageNet from FFCV files: the recipe, top to bottom.

    python train_imagenet.py --config-file rn50_configs/rn50_16_epochs.yaml --data.dir=/data/betons
    torchrun --nproc_per_node=8 train_imagenet.py --config-file ...   # the same recipe on more GPUs

Repeating a command continues the run at the step where its last checkpoint is. Every key of a config can be given as
--section.key=value; --help lists them.
"""

if __name__ == "__main__":
    from rn50.training import interruption

    interruption.catch_signals()  # importing torch takes seconds, in which a signal should not be lost

import contextlib
import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import torch
from fastargs import Param, Section
from torch.nn.parallel import DistributedDataParallel

from rn50 import config, schedules
from rn50.augment import color_jitter, jitter_factors, normalize
from rn50.command import run
from rn50.config import choice, either, number, numbers, switch, text, whole
from rn50.data import loaders
from rn50.data.beton import fingerprint, refuse_others
from rn50.data.order import evaluation_share, rank_positions, steps_per_epoch
from rn50.ema import EMA
from rn50.errors import RunError, Stopped, UsageError
from rn50.evaluate import evaluate, report_lines
from rn50.losses import binary_cross_entropy, cross_entropy
from rn50.machine import cores, memory_bytes
from rn50.model import ARCHITECTURES, build_model
from rn50.optimizer import FiniteSteps, build_optimizer, set_learning_rate
from rn50.planning import budget
from rn50.planning.forecast import forecast, label_warnings
from rn50.precision import autocast_dtype, dtype_name
from rn50.training import checkpoint, distributed, interruption
from rn50.training.mirror import Mirror
from rn50.training.progress import Bar, Progress, Stopwatch, Waiting
from rn50.training.run_folder import RunLog, describe_environment, make_folder, recorded

Section("model", "Network").params(
    arch=Param(choice(*ARCHITECTURES), "torchvision architecture", default="resnet50"),
    blurpool=Param(switch(), "low-pass filter before strided convolutions", default=False),
    blur_maxpool=Param(switch(), "low-pass filter in the max-pool too", default=False),
    zero_init_last_bn=Param(switch(), "residual branches start at zero", default=True),
    log_prior_bias=Param(switch(), "classifier's bias starts at -ln(classes); for loss=bce", default=False),
    ema_half_life=Param(number(0), "steps in which EMA forgets half; 0: no EMA", default=0),
)
Section("training", "Optimisation").params(
    epochs=Param(whole(1), "epochs", required=True),
    batch_size=Param(whole(1), "images per optimizer step over all GPUs", required=True),
    micro_batch=Param(whole(1), "images per forward pass on one GPU; BatchNorm sees these", required=True),
    momentum=Param(number(0, 1), "SGD momentum", default=0.9),
    nesterov=Param(switch(), "Nesterov momentum", default=False),
    weight_decay=Param(number(0), "L2 penalty, coupled", default=1e-4),
    decay=Param(choice("weights", "all"), "what decays: conv and linear weights, or everything", default="weights"),
    loss=Param(choice("cross_entropy", "bce"), "softmax, or a sigmoid for each class", default="cross_entropy"),
    label_smoothing=Param(number(0, 1), "label smoothing", default=0.1),
    precision=Param(choice("auto", "bf16", "fp16", "fp32"), "autocast type; auto: best of the device", default="auto"),
    channels_last=Param(switch(), "NHWC memory format", default=True),
    compile=Param(switch(), "torch.compile", default=False),
    device=Param(choice("auto", "cuda", "cpu"), "where to train", default="auto"),
    seed=Param(whole(0), "weights, order and augmentation", default=0),
    eval_only=Param(switch(), "evaluate a checkpoint and stop", default=False),
    checkpoint=Param(text(), "what eval_only evaluates (default: the run's last)"),
)
Section("lr", "Learning rate").params(
    lr_per_256=Param(number(0), "peak per 256 images of batch_size", default=0.1),
    schedule=Param(choice("cosine", "linear", "step"), "shape after the warm-up", default="cosine"),
    warmup_epochs=Param(number(0), "linear warm-up", default=5),
    warmup_start=Param(number(0, 1), "share of the peak at which it starts", default=0.0),
    step_epochs=Param(numbers(number(0)), "where the step schedule drops", default=[30, 60]),
    step_gamma=Param(number(0, 1), "factor of each drop", default=0.1),
)
Section("resolution", "Progressive resizing of the training crops").params(
    start=Param(whole(16), "px until start_ramp", default=224),
    end=Param(whole(16), "px from end_ramp on", default=224),
    start_ramp=Param(whole(0), "epoch", default=0),
    end_ramp=Param(whole(0), "epoch", default=0),
    multiple=Param(whole(1), "round to this many px", default=32),
)
Section("data", "Betons, loading and augmentation").params(
    dir=Param(text(), "folder of train_SIZE.beton and val_SIZE.beton", required=True),
    rung=Param(either("auto", whole(1)), "SIZE to train from; auto: smallest that is large enough", default="auto"),
    order=Param(choice("auto", "random", "page"), "page: sequential reads, for files beyond memory", default="auto"),
    workers=Param(whole(0), "decoding threads per GPU; 0: all cores, shared among the GPUs here", default=0),
    timeout_minutes=Param(number(0.01), "a batch that takes longer is an error", default=5),
    crop_scale=Param(numbers(number(0.001, 1)), "range of a random crop's share of the area", default=[0.08, 1.0]),
    brightness=Param(number(0), "colour jitter", default=0),
    contrast=Param(number(0), "colour jitter", default=0),
    saturation=Param(number(0), "colour jitter", default=0),
)
Section("validation", "Evaluation").params(
    resolutions=Param(numbers(whole(16)), "px of the final evaluation", default=[224, 256]),
    headline_resolution=Param(whole(16), "px of the figure in the log", default=224),
    headline_view=Param(choice("single", "flip"), "one view, or averaged with its mirror image", default="single"),
    crop_ratio=Param(number(0.1, 1), "side of the centre crop over the short side", default=0.875),
    batch_size=Param(whole(1), "images per forward pass on one GPU", default=256),
    every=Param(whole(1), "epochs between evaluations; the last is always evaluated", default=1),
)
Section("logging", "Run folder").params(
    folder=Param(text(), "where run folders are", default="runs"),
    run_name=Param(text(), "the run's folder; the same name resumes", required=True),
    checkpoint_minutes=Param(number(0), "between checkpoints; one is also made at the end of every epoch", default=10),
    checkpoint_steps=Param(whole(0), "optimizer steps between checkpoints; 0: only by time", default=0),
    mirror=Param(text(), "s3://bucket/prefix that gets a copy of the run folder, to go on with on another machine"),
)

Section("budget", "Money").params(
    max_dollars=Param(number(0), "the run writes a checkpoint and stops before it has cost more"),
    dollars_per_hour=Param(number(0), "price of one machine"),
    instance=Param(text(), "in place of dollars_per_hour: an EC2 type of rn50/planning/costs.csv"),
    spot=Param(switch(), "instance at the highest spot price seen, not on demand", default=False),
    allow_overrun=Param(switch(), "begin also a schedule that is projected to cost more", default=False),
)

# What may differ when a run resumes: it changes where and how fast the run is, not what it computes.
NOT_RECIPE = {"data.dir", "data.workers", "data.timeout_minutes", "training.device", "training.eval_only"}
NOT_RECIPE |= {"training.checkpoint"}
RECIPE_SECTIONS = ("model", "training", "lr", "resolution", "data")
# How long a finished run waits for room on a full disk, and one that fails for the checkpoint it is writing.
DISK_PATIENCE, FAILURE_PATIENCE = 600.0, 30.0


def main():
    cfg = config.load(__doc__.splitlines()[0])
    check(cfg)
    (evaluate_only if cfg.training.eval_only else train)(cfg)
    interruption.release_signals()


def train(cfg):
    folder, progress = run_folder(cfg), Progress()
    if distributed.local_rank() == 0:
        interruption.watch_ec2()
    with contextlib.ExitStack() as at_last, recorded(folder, progress, rank=distributed.rank()), distributed.contact():
        run = build_run(cfg, progress)
        if run.rank == 0 and cfg.logging.mirror:
            run.mirror = Mirror(cfg.logging.mirror, folder=folder, warn=run.warn)
            at_last.callback(run.mirror.put_records)
        fit(run)
        distributed.shutdown()


def evaluate_only(cfg):
    interruption.release_signals()
    run = build_run(cfg, Progress())
    restore_weights(run, checkpoint.load(cfg.training.checkpoint or run.folder / checkpoint.LAST))
    results = final_evaluation(run)
    report(run, results)
    for warning in label_warnings([results[cfg.validation.headline_resolution]["single"]], class_names(run)):
        run.warn(f"{warning['cause']}: {warning['text']}")
    distributed.shutdown()


def check(cfg):
    """Refuse combinations that no run could mean."""
    resolution, lr, training = cfg.resolution, cfg.lr, cfg.training
    if resolution.start_ramp > resolution.end_ramp:
        raise UsageError(
            f"resolution.start_ramp={resolution.start_ramp} is after resolution.end_ramp={resolution.end_ramp}"
        )
    if resolution.end_ramp >= training.epochs and resolution.start != resolution.end:
        raise UsageError(
            f"resolution.end_ramp={resolution.end_ramp} is not before the last of training.epochs={training.epochs}: "
            f"no epoch would train at resolution.end={resolution.end}"
        )
    if lr.warmup_epochs >= training.epochs:
        raise UsageError(f"lr.warmup_epochs={lr.warmup_epochs:g} leaves nothing of training.epochs={training.epochs}")
    if cfg.validation.headline_resolution not in cfg.validation.resolutions:
        raise UsageError(
            f"validation.headline_resolution={cfg.validation.headline_resolution} is not in "
            f"validation.resolutions={','.join(map(str, cfg.validation.resolutions))}"
        )
    scale = cfg.data.crop_scale
    if len(scale) != 2 or scale[0] > scale[1]:
        raise UsageError(f"data.crop_scale must be two shares of the area, the smaller first, not {scale}")
    if training.nesterov and not training.momentum:
        raise UsageError("training.nesterov needs training.momentum above 0")
    distributed.choose_device(training.device)
    price = budget.price(**prices(cfg))
    if cfg.budget.max_dollars is not None and price is None:
        raise UsageError("budget.max_dollars needs budget.dollars_per_hour or budget.instance")
    if training.checkpoint and not training.eval_only:
        raise UsageError("training.checkpoint is for training.eval_only=true; a run resumes from its own folder")


def check_batch(cfg, world_size):
    batch_size, micro_batch = cfg.training.batch_size, cfg.training.micro_batch
    if batch_size % (micro_batch * world_size):
        raise UsageError(
            f"training.batch_size={batch_size} is not a multiple of training.micro_batch={micro_batch} x {world_size} "
            f"GPU{'s' if world_size > 1 else ''}"
        )


@dataclass
class Run:
    """What a run consists of, and how far it has come."""

    cfg: SimpleNamespace
    device: torch.device
    rank: int
    world_size: int
    folder: Path
    say: Callable
    train: loaders.Ladder
    val: loaders.Ladder
    betons: dict  # {file name: fingerprint} of both
    network: torch.nn.Module  # bare, so that checkpoints have plain keys
    model: torch.nn.Module  # the same, compiled and distributed as asked for
    ema: EMA | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    finite: FiniteSteps
    precision: torch.dtype
    autocast: Callable
    progress: Progress
    checkpoints: checkpoint.Writer | None = None
    mirror: Mirror | None = None
    guard: budget.Guard | None = None  # of the money, on rank 0, where there is a price

    def warn(self, message):
        self.say(f"warning: {message}")


def run_folder(cfg):
    return Path(cfg.logging.folder) / cfg.logging.run_name


def build_run(cfg, progress):
    """Join the other ranks, open the data and make the network and its optimizer, all at their beginning."""
    device, rank, world_size = distributed.setup(cfg.training.device, timeout=60 * cfg.data.timeout_minutes + 300)
    check_batch(cfg, world_size)
    train, val = open_data(cfg, device)
    torch.manual_seed(cfg.training.seed)
    network = build_model(
        arch=cfg.model.arch,
        num_classes=train.info.num_classes,
        blurpool=cfg.model.blurpool,
        blur_maxpool=cfg.model.blur_maxpool,
        zero_init_last_bn=cfg.model.zero_init_last_bn,
        log_prior_bias=cfg.model.log_prior_bias,
    )
    layout = torch.channels_last if cfg.training.channels_last else torch.contiguous_format
    network = network.to(device, memory_format=layout)
    model = torch.compile(network) if cfg.training.compile else network
    if world_size > 1:
        model = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    dtype = autocast_dtype(cfg.training.precision, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    optimizer = build_optimizer(
        network,
        momentum=cfg.training.momentum,
        nesterov=cfg.training.nesterov,
        weight_decay=cfg.training.weight_decay,
        decay=cfg.training.decay,
    )
    return Run(
        cfg=cfg,
        device=device,
        rank=rank,
        world_size=world_size,
        folder=run_folder(cfg),
        say=partial(print, flush=True) if rank == 0 else lambda *args: None,
        train=train,
        val=val,
        betons={Path(info.path).name: fingerprint(info) for info in [*train.rungs.values(), *val.rungs.values()]},
        network=network,
        model=model,
        ema=EMA(network, half_life=cfg.model.ema_half_life) if cfg.model.ema_half_life else None,
        optimizer=optimizer,
        scaler=scaler,
        finite=FiniteSteps(network, optimizer, scaler),
        precision=dtype,
        autocast=partial(torch.autocast, device.type, dtype=dtype, enabled=dtype != torch.float32),
        progress=progress,
    )


def open_data(cfg, device):
    """The ladders of the training and the validation split."""
    common = {
        "device": device,
        "workers": cfg.data.workers or max(1, cores() // distributed.ranks_on_this_node()),
        "timeout": 60 * cfg.data.timeout_minutes,
    }
    training, validation = cfg.training, cfg.validation
    train = partial(
        loaders.training_loader,
        batch_size=training.micro_batch,
        crop_scale=cfg.data.crop_scale,
        seed=training.seed,
        **common,
    )
    val = partial(
        loaders.evaluation_loader, batch_size=validation.batch_size, crop_ratio=validation.crop_ratio, **common
    )
    return loaders.Ladder(cfg.data.dir, "train", train), loaders.Ladder(cfg.data.dir, "val", val)


def fit(run):
    """All steps that the run's checkpoint does not have yet, then the final evaluation."""
    cfg, progress = run.cfg, run.progress
    log = begin(run)
    try:
        stop_if_asked(run)
        if run.device.type == "cuda":
            try_largest(run)
        results = None
        while progress.epoch < cfg.training.epochs:
            last = progress.epoch + 1 == cfg.training.epochs
            row = train_one_epoch(run)
            # before the evaluation: one that is interrupted must not cost the epoch
            save(run, last=last)
            started = time.perf_counter()
            if last:
                results = final_evaluation(run)
                row |= results[cfg.validation.headline_resolution][cfg.validation.headline_view]
                row["evaluation"] = results
            elif (progress.epoch + 1) % cfg.validation.every == 0:
                flip = cfg.validation.headline_view == "flip"
                row |= evaluate_at(run, cfg.validation.headline_resolution, flip)[cfg.validation.headline_view]
            row["val_seconds"] = round(time.perf_counter() - started, 3)
            progress.next_epoch()
            run.finite.skipped.zero_()  # not before: the checkpoint that comes before the evaluation counts them too
            if log:
                row |= (run.guard.columns(row) if run.guard else {"dollars": None}) | {"forecast": outlook(run, row)}
                log.add_epoch(row)
                say_epoch(run, row)
            if last:
                save(run, last=True)  # with the last row: whoever has this file has the whole log
        report(run, results or final_evaluation(run))
    except Stopped as stop:
        if run.rank == 0 and run.checkpoints.step != progress.step:
            save(run)
        command = "the same command" + (" with a larger budget.max_dollars" if stop.status == "budget" else "")
        run.say(f"stopping at step {progress.step}: {stop}; {command} goes on from there")
        if run.checkpoints:
            run.checkpoints.finish(interruption.STOP_SECONDS)
        raise
    except Exception:
        if run.checkpoints:
            run.checkpoints.finish(FAILURE_PATIENCE)
        raise
    if log:
        run.checkpoints.finish(DISK_PATIENCE, required=True)
        log.close()


def begin(run):
    """Take over the newest checkpoint, if there is one; gives the log, on rank 0."""
    cfg, progress = run.cfg, run.progress
    saved = None
    if run.rank == 0:
        make_folder(run.folder)
        saved = checkpoint.newest(run.folder, warn=run.warn, mirror=run.mirror)
    saved, betons = distributed.from_rank_0((saved, run.betons))
    refuse_others(betons, run.betons, "which rank 0 reads")
    if saved:
        restore(run, saved)
        run.say(
            f"resuming {run.folder} at step {progress.step}: "
            f"after epoch {progress.epoch} of {cfg.training.epochs} and {progress.epoch_step} steps"
        )
    announce(run)
    guard_money(run)
    if run.rank != 0:
        return None
    run.checkpoints = checkpoint.Writer(run.folder, step=progress.step, warn=run.warn, mirror=run.mirror)
    environment = describe_environment(
        device=run.device, world_size=run.world_size, betons=[*run.train.rungs.values(), *run.val.rungs.values()]
    )
    return RunLog(
        run.folder,
        config=config.to_dict(cfg),
        environment={"precision": dtype_name(run.precision)} | environment,
        rows=progress.rows,
        warn=run.warn,
    )


def try_largest(run):
    """UsageError where the largest step or evaluation does not fit: not after hours, where the resolution has risen."""
    cfg, left = run.cfg, range(run.progress.epoch, run.cfg.training.epochs)
    if not left:
        return
    px, micro = max(epoch_resolution(cfg, epoch) for epoch in left), cfg.training.micro_batch
    network = copy.deepcopy(run.network).train()  # the run's own would count this batch in its BatchNorms

    def batch(images, px):
        return torch.zeros(images, px, px, 3, dtype=torch.uint8, device=run.device).permute(0, 3, 1, 2)

    with fitting(run, f"{px} px with training.micro_batch={micro}", UsageError):
        labels = torch.zeros(micro, dtype=torch.int64, device=run.device)
        forward_backward(replace(run, model=network), batch(micro, px), labels, 1)
        if run.device.type == "cuda":
            taken, there_is = torch.cuda.max_memory_reserved(run.device), torch.cuda.mem_get_info(run.device)[1]
            run.say(f"{micro} images of {px} px take {taken / 2**30:.1f} of the GPU's {there_is / 2**30:.1f} GiB")
    px, images = max(cfg.validation.resolutions), cfg.validation.batch_size
    what = f"{px} px with validation.batch_size={images}"
    with fitting(run, what, UsageError), torch.inference_mode(), run.autocast():
        network.eval()(normalize(batch(images, px)))


@contextlib.contextmanager
def fitting(run, what, refusal=RunError):
    """One line where `what`, a resolution and the setting that counts its images, is too much for the GPU's memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise refusal(
            f"out of memory on {run.device} at {what}: make it smaller (for training as a new run; "
            f"tools/preflight.py finds what fits), or end what else uses this GPU. {str(error).splitlines()[0]}"
        ) from error


def stop_if_asked(run, in_a_row=0):
    """Between two steps, on all ranks at the same one: end where something asked for it or nothing is learned.

    in_a_row: how many steps in a row were left out, as far as this rank knows.
    """
    spent = run.guard is not None and run.guard.spent()
    asked, spent, in_a_row = distributed.agree(int(interruption.reason() is not None), int(spent), in_a_row)
    if in_a_row >= run.finite.LIMIT:
        raise RunError(
            f"the loss or its gradient was not finite in {in_a_row} steps in a row, up to step {run.progress.step}: "
            "lower lr.lr_per_256 or use training.precision=bf16; the last checkpoint is from before"
        )
    if asked:
        raise Stopped(interruption.reason() or "another rank was asked to stop")
    if spent:
        raise Stopped(
            f"budget.max_dollars={run.cfg.budget.max_dollars:g} is spent but for what stopping costs", "budget"
        )


def save(run, *, last=False):
    """Have a checkpoint written, unless the newest steps were left out: what comes of that is not known yet."""
    if run.rank == 0 and (last or not run.finite.in_a_row.item()):
        if run.guard:
            run.progress.dollars = run.guard.dollars
            run.guard.write()
        run.checkpoints.put(state(run))


def train_one_epoch(run):
    """The steps of the epoch that are left; gives the epoch's row of the log."""
    cfg, training, progress = run.cfg, run.cfg.training, run.progress
    epoch = progress.epoch
    resolution = epoch_resolution(cfg, epoch)
    side = loaders.training_rung(run.train.rungs, resolution, cfg.data.rung)
    info = run.train.rungs[side]
    steps = progress.epoch_steps = steps_per_epoch(info.num_samples, training.batch_size)
    if steps == 0:
        raise RunError(
            f"training.batch_size={training.batch_size} is more than the {info.num_samples} images there are"
        )
    if progress.epoch_step < steps:
        with fitting(run, f"{resolution} px with training.micro_batch={training.micro_batch}"):
            train_steps(run, side, resolution, steps)
    images, skipped = steps * training.batch_size, run.finite.skipped.item()
    return {
        "epoch": epoch,
        "step": progress.step,
        "resolution": resolution,
        "rung": side,
        "lr": learning_rate(cfg, epoch + (steps - 1) / steps),
        "train_loss": float(progress.loss_sum) / max(1, steps - skipped),
        "skipped_steps": skipped,
        "images_per_second": round(images / progress.epoch_seconds, 2),
        "data_wait_fraction": round(progress.waiting_seconds / progress.epoch_seconds, 4),
        "train_seconds": round(progress.epoch_seconds, 3),
        "cpu_seconds": round(progress.cpu_seconds, 3),
        "images_seen": progress.images_seen,
        "elapsed_seconds": round(progress.seconds, 3),
    }


def train_steps(run, side, resolution, steps):
    """Steps progress.epoch_step to `steps` of an epoch, from the images of one rung."""
    cfg, training, progress = run.cfg, run.cfg.training, run.progress
    epoch, info = progress.epoch, run.train.rungs[side]
    kind = loaders.choose_order(info, cfg.data.order)
    mine = rank_positions(
        loaders.epoch_order(info, kind, seed=training.seed, epoch=epoch),
        batch_size=training.batch_size,
        micro_batch=training.micro_batch,
        rank=run.rank,
        world_size=run.world_size,
        first_step=progress.epoch_step,
    )
    share = mine.reshape(steps - progress.epoch_step, -1, training.micro_batch)
    run.model.train()
    run.finite.remember()
    torch.cuda.empty_cache()  # of pieces in the sizes of another resolution; nothing where there is no GPU
    stopwatch, waiting, in_a_row = Stopwatch(), Waiting(run.device), 0
    with (
        run.train.loader(side).batches(mine, resolution, epoch=epoch, read_ahead=kind == "page") as batches,
        Bar(
            title=f"epoch {epoch + 1}/{training.epochs} {resolution} px",
            done=progress.epoch_step,
            total=steps,
            say=run.say,
            shown=run.rank == 0,
        ) as bar,
    ):
        for micro_batches in share:
            rate = learning_rate(cfg, epoch + progress.epoch_step / steps)
            set_learning_rate(run.optimizer, rate)
            loss = torch.zeros((), dtype=torch.float64, device=run.device)
            for number, samples in enumerate(micro_batches, start=1):
                with waiting.for_data():
                    images, labels = next(batches)
                images = jitter(cfg, images, samples, epoch)
                with contextlib.nullcontext() if number == len(micro_batches) else without_reduction(run.model):
                    loss += forward_backward(run, images, labels, len(micro_batches))
            progress.loss_sum += run.finite.step(distributed.total(loss) / run.world_size)
            run.optimizer.zero_grad(set_to_none=True)
            if run.ema:
                run.ema.update(run.network)
            progress.count_step(images=training.batch_size, **stopwatch.lap())
            progress.waiting_seconds += waiting.lap()
            bar.advance()
            # before this rank waits for its GPU, which a rank that is gone would keep waiting
            stop_if_asked(run, in_a_row)
            if bar.due() or progress.epoch_step == steps:
                in_a_row = run.finite.in_a_row.item()
                bar.state(progress.epoch_step, status_line(run, rate))
            if run.checkpoints and run.checkpoints.due(
                progress.step, steps=cfg.logging.checkpoint_steps, minutes=cfg.logging.checkpoint_minutes
            ):
                save(run)
        # what the GPU was behind the host, which has waited for it above
        progress.count_time(**stopwatch.lap())
        progress.waiting_seconds += waiting.lap()
    stop_if_asked(run, in_a_row)


def status_line(run, rate):
    progress = run.progress
    loss = float(progress.loss_sum) / max(1, progress.epoch_step - run.finite.skipped.item())
    speed = progress.epoch_step * run.cfg.training.batch_size / progress.epoch_seconds
    waiting = progress.waiting_seconds / progress.epoch_seconds
    paid = f", {run.guard}" if run.guard else ""
    return f"loss {loss:.3f}, lr {rate:.4f}, {speed:.0f} img/s, {waiting:.0%} waiting{paid}"


def say_epoch(run, row):
    accuracy = f"  top-1 {row['top1']:.2f} %" if "top1" in row else ""
    expected = row["forecast"]["top1"]
    if expected is not None and row["epoch"] + 1 < run.cfg.training.epochs:
        accuracy += f" (at the end {expected:.1f} at {row['forecast']['evaluation']})"
    run.say(
        f"epoch {row['epoch'] + 1}/{run.cfg.training.epochs}  {row['resolution']} px  loss {row['train_loss']:.3f}"
        f"{accuracy}  {row['images_per_second']:.0f} img/s  {row['data_wait_fraction']:.0%} waiting for data  "
        f"{row['train_seconds']:.0f} s" + (f"  {run.guard}" if run.guard else "")
    )
    if row["skipped_steps"]:
        run.warn(f"{row['skipped_steps']} steps of it were left out: their loss or gradient was not finite")


def prices(cfg):
    return {key: getattr(cfg.budget, key) for key in ("dollars_per_hour", "instance", "spot")}


def guard_money(run):
    """Start the meter where there is a price; refuse a schedule that is projected to cost more than there is."""
    cfg, price = run.cfg, budget.price(**prices(run.cfg))
    if price is None:
        return
    refusal = None
    if run.rank == 0:
        machines = -(-run.world_size // distributed.ranks_on_this_node())
        run.guard = budget.Guard(
            run.folder,
            config=config.to_dict(cfg),
            progress=run.progress,
            images=run.train.info.num_samples,
            validation_images=run.val.info.num_samples,
            dollars_per_hour=price * machines,
        )
        refusal, unknown = run.guard.refusal(
            rung=loaders.training_rung(run.train.rungs, cfg.resolution.end, cfg.data.rung),
            gpu_name=torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else None,
            gpus=run.world_size,
            machines=machines,
            vcpus=cores(),
            memory_gib=memory_bytes() / 2**30,
        )
        if unknown:
            run.say(unknown)
    refusal = distributed.from_rank_0(refusal)
    if refusal and not cfg.budget.allow_overrun:
        raise UsageError(f"{refusal}; budget.allow_overrun=true begins it nevertheless and stops at the limit")
    if refusal:
        run.warn(refusal)


def outlook(run, row):
    """The forecast after an epoch's `row`; says what was not said after the one before."""
    rows, classes = run.progress.rows, run.train.info.num_classes
    found = forecast([*rows, row], config.to_dict(run.cfg), classes=classes, names=class_names(run))
    said = (rows[-1].get("forecast") or {}).get("warnings", []) if rows else []
    for warning in found["warnings"]:
        if warning["cause"] not in [earlier["cause"] for earlier in said]:
            run.warn(f"{warning['cause']}: {warning['text']}")
    return found


def class_names(run):
    """Wnids in label order, or None for files of stock FFCV, which do not say."""
    classes = run.train.info.classes
    return [names["wnid"] for names in classes] if classes else None


def jitter(cfg, images, samples, epoch):
    """`images` with the colours that this epoch gives these samples."""
    strengths = {name: getattr(cfg.data, name) for name in ("brightness", "contrast", "saturation")}
    if not any(strengths.values()):
        return images
    return color_jitter(images, jitter_factors(samples, **strengths, seed=cfg.training.seed, epoch=epoch))


def forward_backward(run, images, labels, accumulation):
    """Gradients of one micro-batch, scaled so that those of a step add up to the mean; gives its share of the loss."""
    training = run.cfg.training
    criterion = binary_cross_entropy if training.loss == "bce" else cross_entropy
    with run.autocast():
        logits = run.model(normalize(images))
    loss = criterion(logits, labels, smoothing=training.label_smoothing) / accumulation
    run.scaler.scale(loss).backward()
    return loss.detach()


def evaluate_at(run, resolution, flip):
    """Figures of the EMA's weights, or of the network's where there is no EMA: {view: figures}."""
    validation = run.cfg.validation
    side = loaders.validation_rung(run.val.rungs, resolution, validation.crop_ratio, warn=run.warn)
    samples = run.val.rungs[side].num_samples
    share = evaluation_share(samples, rank=run.rank, world_size=run.world_size)
    # rank 0 has the largest share; all ask as often as it does, or they would not ask together
    rounds = -(-len(evaluation_share(samples, rank=0, world_size=run.world_size)) // validation.batch_size)
    network = run.ema.model if run.ema else run.network
    distributed.share_buffers(network)
    what = f"{resolution} px with validation.batch_size={validation.batch_size}"
    with fitting(run, what), run.val.loader(side).batches(share, resolution) as batches:
        batches = until_stopped(run, batches, rounds)
        classes = run.train.info.num_classes
        return evaluate(network, batches, classes=classes, device=run.device, autocast=run.autocast, flip=flip)


def until_stopped(run, batches, rounds):
    for _ in range(rounds):
        stop_if_asked(run)
        yield from islice(batches, 1)


def final_evaluation(run):
    """{resolution: {view: figures}} at every resolution of the config, single view and flip-averaged."""
    return {resolution: evaluate_at(run, resolution, flip=True) for resolution in run.cfg.validation.resolutions}


def report(run, results):
    validation = run.cfg.validation
    weights, epochs = "EMA weights" if run.ema else "weights", run.progress.epochs
    run.say(f"\nevaluation of the {weights} after epoch {epochs:.4g}, centre crop {validation.crop_ratio:g}")
    for line in report_lines(results, headline=(validation.headline_resolution, validation.headline_view)):
        run.say(line)


def state(run):
    """The checkpoint of a run: tensors and plain values."""
    return {
        "model": run.network.state_dict(),
        "ema": run.ema.state_dict() if run.ema else None,
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "finite": run.finite.state_dict(),
        "step": run.progress.step,
        "progress": vars(run.progress),
        "config": config.to_dict(run.cfg),
        "betons": run.betons,
    }


def restore(run, saved):
    """Continue where a checkpoint of the same recipe and data was written."""
    config.refuse_change(
        saved["config"],
        config.to_dict(run.cfg),
        sections=RECIPE_SECTIONS,
        free=NOT_RECIPE,
        folder=run.folder,
        defaults=config.defaults(),
    )
    refuse_others(saved["betons"], run.betons, f"which the run in {run.folder} was started with")
    restore_weights(run, saved)
    run.optimizer.load_state_dict(saved["optimizer"])
    run.scaler.load_state_dict(saved["scaler"])
    run.finite.load_state_dict(saved["finite"])


def restore_weights(run, saved):
    """Take over just the weights and how far they have come, whatever recipe made them."""
    try:
        run.network.load_state_dict(saved["model"])
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise RunError(f"the checkpoint does not fit this section 'model' and these classes: {reason}") from error
    run.ema = (run.ema or EMA(run.network, half_life=1)) if saved["ema"] else None
    if run.ema:
        run.ema.load_state_dict(saved["ema"])
    vars(run.progress).update(saved["progress"])
    if isinstance(run.progress.loss_sum, torch.Tensor):
        run.progress.loss_sum = run.progress.loss_sum.to(run.device)


def without_reduction(model):
    """DDP adds up gradients over the ranks in the last micro-batch of a step only."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else contextlib.nullcontext()


def learning_rate(cfg, epoch):
    peak = schedules.peak_learning_rate(lr_per_256=cfg.lr.lr_per_256, batch_size=cfg.training.batch_size)
    return schedules.learning_rate(
        epoch,
        peak=peak,
        epochs=cfg.training.epochs,
        schedule=cfg.lr.schedule,
        warmup_epochs=cfg.lr.warmup_epochs,
        warmup_start=cfg.lr.warmup_start,
        step_epochs=cfg.lr.step_epochs,
        step_gamma=cfg.lr.step_gamma,
    )


def epoch_resolution(cfg, epoch):
    return schedules.resolution(epoch, **vars(cfg.resolution))


def announce(run):
    cfg = run.cfg
    batch, micro = cfg.training.batch_size, cfg.training.micro_batch
    peak = schedules.peak_learning_rate(lr_per_256=cfg.lr.lr_per_256, batch_size=batch)
    info = run.train.info
    accumulation = batch // (micro * run.world_size)
    run.say(
        f"{cfg.model.arch} on {run.device} in {dtype_name(run.precision)}, {info.num_samples} training images of "
        f"{info.num_classes} classes, "
        f"{cfg.training.epochs} epochs at {cfg.resolution.start} to {cfg.resolution.end} px; batch {batch} = "
        f"{micro} x {run.world_size} ranks x {accumulation} accumulated, peak learning rate {peak:g}; "
        f"{loaders.choose_order(info, cfg.data.order)} order; run folder {run.folder}"
    )


if __name__ == "__main__":
    run(main)
