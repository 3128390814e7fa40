"""Train a ResNet on ImageNet from FFCV files: the recipe, top to bottom.

    python train_imagenet.py --config-file rn50_configs/rn50_16_epochs.yaml --data.dir=/data/betons
    torchrun --nproc_per_node=8 train_imagenet.py --config-file ...   # the same recipe on more GPUs

Repeating a command continues the run where its last checkpoint is. Every key of a config can be given as
--section.key=value; --help lists them.
"""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from fastargs import Param, Section
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from rn50 import checkpoint, config, distributed, errors, loaders, schedules
from rn50.augment import color_jitter, jitter_factors, normalize
from rn50.config import choice, either, number, numbers, switch, text, whole
from rn50.ema import EMA
from rn50.errors import RunError, UsageError
from rn50.evaluate import evaluate, report_lines
from rn50.losses import binary_cross_entropy, cross_entropy
from rn50.model import ARCHITECTURES, build_model
from rn50.optimizer import build_optimizer, set_learning_rate
from rn50.order import evaluation_share, rank_positions, steps_per_epoch
from rn50.precision import autocast_dtype, dtype_name
from rn50.run_log import RunLog, describe_environment

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
)

# What may differ when a run resumes: it changes where and how fast the run is, not what it computes.
NOT_RECIPE = {"data.dir", "data.workers", "data.timeout_minutes", "training.device", "training.eval_only"}
NOT_RECIPE |= {"training.checkpoint"}
RECIPE_SECTIONS = ("model", "training", "lr", "resolution", "data")
# How often the bar moves, and how often a line is printed where there is no terminal for a bar.
PROGRESS_SECONDS = 1.0
LINE_SECONDS = 60.0


def main():
    cfg = config.load(__doc__.splitlines()[0])
    check(cfg)
    device, rank, world_size = distributed.setup(cfg.training.device)
    try:
        check_batch(cfg, world_size)
        run = build_run(cfg, device, rank, world_size)
        if cfg.training.eval_only:
            restore_weights(run, checkpoint.load(cfg.training.checkpoint or run.folder / checkpoint.LAST))
            report(run, final_evaluation(run))
        else:
            fit(run)
    finally:
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
    if training.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("training.device=cuda, but torch sees no GPU here; use auto or cpu")
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
    network: torch.nn.Module  # bare, so that checkpoints have plain keys
    model: torch.nn.Module  # the same, compiled and distributed as asked for
    ema: EMA | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    precision: torch.dtype
    autocast: Callable
    epochs_done: int = 0
    step: int = 0
    images_seen: int = 0
    seconds: float = 0.0

    def warn(self, message):
        self.say(f"warning: {message}")


def build_run(cfg, device, rank, world_size):
    """Open the data and make the network and its optimizer, all at their beginning."""
    train, val = open_data(cfg, device)
    torch.manual_seed(cfg.training.seed)
    network = build_model(
        arch=cfg.model.arch,
        num_classes=train.rungs[max(train.rungs)].num_classes,
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
    return Run(
        cfg=cfg,
        device=device,
        rank=rank,
        world_size=world_size,
        folder=Path(cfg.logging.folder) / cfg.logging.run_name,
        say=partial(print, flush=True) if rank == 0 else lambda *args: None,
        train=train,
        val=val,
        network=network,
        model=model,
        ema=EMA(network, half_life=cfg.model.ema_half_life) if cfg.model.ema_half_life else None,
        optimizer=build_optimizer(
            network,
            momentum=cfg.training.momentum,
            nesterov=cfg.training.nesterov,
            weight_decay=cfg.training.weight_decay,
            decay=cfg.training.decay,
        ),
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
        precision=dtype,
        autocast=partial(torch.autocast, device.type, dtype=dtype, enabled=dtype != torch.float32),
    )


def open_data(cfg, device):
    """The ladders of the training and the validation split."""
    common = {
        "device": device,
        "workers": cfg.data.workers or max(1, distributed.cores() // distributed.ranks_on_this_node()),
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
    """All epochs that the run's checkpoint does not have yet, then the final evaluation."""
    cfg = run.cfg
    saved = checkpoint.newest(run.folder, warn=run.warn)
    if saved:
        restore(run, saved)
        run.say(f"resuming {run.folder} after epoch {run.epochs_done} of {cfg.training.epochs}")
    log = None
    if run.rank == 0:
        make_folder(run.folder)
        environment = {"precision": dtype_name(run.precision)} | describe_environment(
            device=run.device, world_size=run.world_size, betons=[*run.train.rungs.values(), *run.val.rungs.values()]
        )
        log = RunLog(run.folder, config=config.to_dict(cfg), environment=environment, epochs_done=run.epochs_done)
    announce(run)
    results = None
    for epoch in range(run.epochs_done, cfg.training.epochs):
        last = epoch + 1 == cfg.training.epochs
        row = train_one_epoch(run, epoch)
        started = time.perf_counter()
        if last:
            results = final_evaluation(run)
            row |= results[cfg.validation.headline_resolution][cfg.validation.headline_view]
        elif (epoch + 1) % cfg.validation.every == 0:
            views = evaluate_at(run, cfg.validation.headline_resolution, flip=cfg.validation.headline_view == "flip")
            row |= views[cfg.validation.headline_view]
        row |= {"val_seconds": round(time.perf_counter() - started, 3)}
        run.epochs_done = epoch + 1
        if run.rank == 0:
            if last:
                row["evaluation"] = results
            log.add_epoch(row)
            checkpoint.save(run.folder, state(run))
            accuracy = f"  top-1 {row['top1']:.2f} %" if "top1" in row else ""
            run.say(
                f"epoch {epoch + 1}/{cfg.training.epochs}  {row['resolution']} px  loss {row['train_loss']:.3f}"
                f"{accuracy}  {row['images_per_second']:.0f} img/s  {row['data_wait_fraction']:.0%} waiting for data  "
                f"{row['train_seconds']:.0f} s"
            )
        distributed.barrier()
    report(run, results or final_evaluation(run))
    if log:
        log.close()


def train_one_epoch(run, epoch):
    """One pass over the training set; gives the epoch's row of the log."""
    cfg, training = run.cfg, run.cfg.training
    resolution = epoch_resolution(cfg, epoch)
    side = loaders.training_rung(run.train.rungs, resolution, cfg.data.rung)
    info = run.train.rungs[side]
    steps = steps_per_epoch(info.num_samples, training.batch_size)
    if steps == 0:
        raise RunError(
            f"training.batch_size={training.batch_size} is more than the {info.num_samples} images there are"
        )
    kind = loaders.choose_order(info, cfg.data.order)
    order = loaders.epoch_order(info, kind, seed=training.seed, epoch=epoch)
    mine = rank_positions(
        order,
        batch_size=training.batch_size,
        micro_batch=training.micro_batch,
        rank=run.rank,
        world_size=run.world_size,
    )
    accumulation = training.batch_size // (training.micro_batch * run.world_size)
    loader = run.train.loader(side)
    run.model.train()
    loss_sum = torch.zeros((), dtype=torch.float64, device=run.device)
    started = shown = printed = time.perf_counter()
    processor_started, waited = time.process_time(), 0.0
    with (
        loader.batches(mine, resolution, epoch=epoch, read_ahead=kind == "page") as batches,
        tqdm(
            total=steps,
            desc=f"epoch {epoch + 1}/{training.epochs} {resolution} px",
            unit="step",
            disable=None if run.rank == 0 else True,
            leave=False,
            mininterval=PROGRESS_SECONDS,
        ) as bar,
    ):
        for step in range(steps):
            rate = learning_rate(cfg, epoch + step / steps)
            set_learning_rate(run.optimizer, rate)
            for micro in range(accumulation):
                asked = time.perf_counter()
                images, labels = next(batches)
                waited += time.perf_counter() - asked
                synchronise = contextlib.nullcontext() if micro + 1 == accumulation else without_reduction(run.model)
                first = (step * accumulation + micro) * training.micro_batch
                images = jitter(cfg, images, mine[first : first + len(images)], epoch)
                with synchronise:
                    loss_sum += forward_backward(run, images, labels, accumulation)
            run.scaler.step(run.optimizer)
            run.scaler.update()
            run.optimizer.zero_grad(set_to_none=True)
            if run.ema:
                run.ema.update(run.network)
            run.step += 1
            now = time.perf_counter()
            if now - shown > PROGRESS_SECONDS or step + 1 == steps:
                shown = now
                loss = loss_sum.item() / (step + 1)
                if not torch.isfinite(loss_sum):
                    raise RunError(
                        f"the loss is not finite at step {run.step}: lower lr.lr_per_256 or use "
                        f"training.precision=bf16; the last checkpoint is of epoch {run.epochs_done}"
                    )
                speed = (step + 1) * training.batch_size / (now - started)
                status = f"loss {loss:.3f}, lr {rate:.4f}, {speed:.0f} img/s, {waited / (now - started):.0%} waiting"
                bar.set_postfix_str(status)
                if bar.disable and now - printed > LINE_SECONDS:
                    printed = now
                    run.say(f"epoch {epoch + 1}/{training.epochs} {resolution} px  step {step + 1}/{steps}  {status}")
            bar.update()
    seconds = time.perf_counter() - started
    run.seconds += seconds
    run.images_seen += steps * training.batch_size
    return {
        "epoch": epoch,
        "step": run.step,
        "resolution": resolution,
        "rung": side,
        "lr": rate,
        "train_loss": distributed.total(loss_sum).item() / (steps * run.world_size),
        "images_per_second": round(steps * training.batch_size / seconds, 2),
        "data_wait_fraction": round(waited / seconds, 4),
        "train_seconds": round(seconds, 3),
        "cpu_seconds": round(time.process_time() - processor_started, 3),
        "images_seen": run.images_seen,
        "elapsed_seconds": round(run.seconds, 3),
    }


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
    ratio = run.cfg.validation.crop_ratio
    side = loaders.validation_rung(run.val.rungs, resolution, ratio, warn=run.warn)
    share = evaluation_share(run.val.rungs[side].num_samples, rank=run.rank, world_size=run.world_size)
    network = run.ema.model if run.ema else run.network
    with run.val.loader(side).batches(share, resolution) as batches:
        return evaluate(network, batches, device=run.device, autocast=run.autocast, flip=flip)


def final_evaluation(run):
    """{resolution: {view: figures}} at every resolution of the config, single view and flip-averaged."""
    return {resolution: evaluate_at(run, resolution, flip=True) for resolution in run.cfg.validation.resolutions}


def report(run, results):
    validation = run.cfg.validation
    weights = "EMA weights" if run.ema else "weights"
    run.say(f"\nevaluation of the {weights} after epoch {run.epochs_done}, centre crop {validation.crop_ratio:g}")
    for line in report_lines(results, headline=(validation.headline_resolution, validation.headline_view)):
        run.say(line)


def state(run):
    """The checkpoint of a run: tensors and plain values."""
    return {
        "model": run.network.state_dict(),
        "ema": run.ema.state_dict() if run.ema else None,
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "epochs_done": run.epochs_done,
        "step": run.step,
        "images_seen": run.images_seen,
        "seconds": run.seconds,
        "config": config.to_dict(run.cfg),
    }


def restore(run, saved):
    """Continue where a checkpoint of the same recipe was written."""
    refuse_changed_recipe(saved["config"], config.to_dict(run.cfg), run.folder)
    restore_weights(run, saved)
    run.optimizer.load_state_dict(saved["optimizer"])
    run.scaler.load_state_dict(saved["scaler"])
    run.step, run.images_seen, run.seconds = saved["step"], saved["images_seen"], saved["seconds"]


def restore_weights(run, saved):
    """Take over just the weights, whatever recipe made them."""
    try:
        run.network.load_state_dict(saved["model"])
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise RunError(f"the checkpoint does not fit this section 'model' and these classes: {reason}") from error
    run.ema = (run.ema or EMA(run.network, half_life=1)) if saved["ema"] else None
    if run.ema:
        run.ema.load_state_dict(saved["ema"])
    run.epochs_done = saved["epochs_done"]


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


def refuse_changed_recipe(saved, current, folder):
    for section in RECIPE_SECTIONS:
        for key in {**saved[section], **current[section]}:
            name, value = f"{section}.{key}", current[section].get(key)
            if name not in NOT_RECIPE and saved[section].get(key) != value:
                raise UsageError(
                    f"{name} is {value} but the run in {folder} was started with {saved[section].get(key)}; "
                    "restore it, or choose another logging.run_name"
                )


def announce(run):
    cfg = run.cfg
    batch, micro = cfg.training.batch_size, cfg.training.micro_batch
    peak = schedules.peak_learning_rate(lr_per_256=cfg.lr.lr_per_256, batch_size=batch)
    info = run.train.rungs[max(run.train.rungs)]
    accumulation = batch // (micro * run.world_size)
    run.say(
        f"{cfg.model.arch} on {run.device} in {dtype_name(run.precision)}, {info.num_samples} training images of "
        f"{info.num_classes} classes, "
        f"{cfg.training.epochs} epochs at {cfg.resolution.start} to {cfg.resolution.end} px; batch {batch} = "
        f"{micro} x {run.world_size} ranks x {accumulation} accumulated, peak learning rate {peak:g}; "
        f"{loaders.choose_order(info, cfg.data.order)} order; run folder {run.folder}"
    )


def make_folder(folder):
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot make the run folder {folder}: {error.strerror}") from error


if __name__ == "__main__":
    errors.run(main)
