"""The declared settings of a training run, the combinations that make no sense, and the schedules they ask for."""

from fastargs import Config, Param, Section

from rn50 import config, schedules
from rn50.config import choice, either, number, numbers, path, switch, text, whole
from rn50.errors import UsageError
from rn50.model import ARCHITECTURES, INITIALISATIONS

SETTINGS = Config()
Section("model", "Network", SETTINGS).params(
    arch=Param(choice(*ARCHITECTURES), "torchvision architecture", default="resnet50"),
    blurpool=Param(switch(), "low-pass filter before strided convolutions", default=False),
    blur_maxpool=Param(switch(), "low-pass filter in the max-pool too", default=False),
    initialisation=Param(
        choice(*INITIALISATIONS), "of the weights, as the library of that name", default="torchvision"
    ),
    zero_init_last_bn=Param(switch(), "residual branches start at zero", default=True),
    log_prior_bias=Param(switch(), "classifier's bias starts at -ln(classes); for loss=bce", default=False),
    ema_half_life=Param(number(0), "steps in which EMA forgets half; 0: no EMA", default=0),
)
Section("training", "Optimisation", SETTINGS).params(
    epochs=Param(whole(1, 10_000), "epochs", required=True),
    batch_size=Param(whole(1), "images per optimizer step over all GPUs", required=True),
    micro_batch=Param(whole(1), "images per forward pass on one GPU; BatchNorm sees these", required=True),
    momentum=Param(number(0, 1), "SGD momentum", default=0.9),
    nesterov=Param(switch(), "Nesterov momentum", default=False),
    weight_decay=Param(number(0), "L2 penalty, coupled", default=1e-4),
    decay=Param(choice("weights", "all"), "what decays: conv and linear weights, or everything", default="weights"),
    loss=Param(choice("cross_entropy", "bce"), "softmax, or a sigmoid for each class", default="cross_entropy"),
    label_smoothing=Param(number(0, 1), "label smoothing", default=0.1),
    mixup=Param(number(0), "alpha of its Beta distribution; 0: no mixup", default=0),
    sam_rho=Param(number(0), "radius of sharpness-aware minimization; 0: none", default=0),
    sam_interval=Param(whole(1), "optimizer steps from one with SAM to the next", default=10),
    precision=Param(choice("auto", "bf16", "fp16", "fp32"), "autocast type; auto: best of the device", default="auto"),
    channels_last=Param(switch(), "NHWC memory format", default=True),
    compile=Param(switch(), "torch.compile", default=False),
    device=Param(choice("auto", "cuda", "cpu"), "where to train", default="auto"),
    seed=Param(whole(0), "weights, order and augmentation", default=0),
    eval_only=Param(switch(), "evaluate a checkpoint and stop", default=False),
    checkpoint=Param(path(), "what eval_only evaluates (default: the run's last)"),
)
Section("lr", "Learning rate", SETTINGS).params(
    lr_per_256=Param(number(0), "peak per 256 images of batch_size", default=0.1),
    schedule=Param(choice("cosine", "linear", "step"), "shape after the warm-up", default="cosine"),
    warmup_epochs=Param(number(0), "linear warm-up", default=5),
    warmup_start=Param(number(0, 1), "share of the peak at which it starts", default=0.0),
    step_epochs=Param(numbers(number(0)), "where the step schedule drops", default=[30, 60]),
    step_gamma=Param(number(0, 1), "factor of each drop", default=0.1),
)
Section("resolution", "Progressive resizing of the training crops", SETTINGS).params(
    start=Param(whole(16), "px until start_ramp", default=224),
    end=Param(whole(16), "px from end_ramp on", default=224),
    start_ramp=Param(number(0), "epoch", default=0),
    end_ramp=Param(number(0), "epoch", default=0),
    multiple=Param(whole(1), "round to this many px", default=32),
)
Section("data", "Betons, loading and augmentation", SETTINGS).params(
    dir=Param(path(), "folder of train_SIZE.beton and val_SIZE.beton", required=True),
    rung=Param(either("auto", whole(1)), "SIZE to train from; auto: smallest that is large enough", default="auto"),
    order=Param(choice("auto", "random", "page"), "page: sequential reads, for files beyond memory", default="auto"),
    workers=Param(whole(0), "decoding threads per GPU; 0: all cores, shared among the GPUs here", default=0),
    timeout_minutes=Param(number(0.01), "a batch that takes longer is an error", default=5),
    crop_scale=Param(numbers(number(0.001, 1)), "range of a random crop's share of the area", default=[0.08, 1.0]),
    brightness=Param(number(0), "colour jitter", default=0),
    contrast=Param(number(0), "colour jitter", default=0),
    saturation=Param(number(0), "colour jitter", default=0),
)
Section("validation", "Evaluation", SETTINGS).params(
    resolutions=Param(numbers(whole(16)), "px of the final evaluation", default=[224, 256]),
    headline_resolution=Param(whole(16), "px of the figure in the log", default=224),
    headline_view=Param(choice("single", "flip"), "one view, or averaged with its mirror image", default="single"),
    crop_ratio=Param(number(0.1, 1), "side of the centre crop over the short side", default=0.875),
    batch_size=Param(whole(1), "images per forward pass on one GPU", default=256),
    every=Param(whole(1), "epochs between evaluations; the last is always evaluated", default=1),
)
Section("logging", "Run folder", SETTINGS).params(
    folder=Param(path(), "where run folders are", default="runs"),
    run_name=Param(path(), "the run's folder; the same name resumes", required=True),
    checkpoint_minutes=Param(number(0), "between checkpoints; one is also made at the end of every epoch", default=10),
    checkpoint_steps=Param(whole(0), "optimizer steps between checkpoints; 0: only by time", default=0),
    mirror=Param(path(), "s3://bucket/prefix that gets a copy of the run folder, to go on with on another machine"),
)
Section("budget", "Money", SETTINGS).params(
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


def load(description, argv=None):
    """The settings of a command line as a namespace of sections, checked; `config.load` says how it is read."""
    cfg = config.load(description, SETTINGS, argv)
    check(cfg)
    return cfg


def check(cfg):
    """Refuse combinations that no run could mean."""
    resolution, lr, training = cfg.resolution, cfg.lr, cfg.training
    if resolution.start_ramp > resolution.end_ramp:
        raise UsageError(
            f"resolution.start_ramp={resolution.start_ramp:g} is after resolution.end_ramp={resolution.end_ramp:g}"
        )
    if resolution.end_ramp >= training.epochs and resolution.start != resolution.end:
        raise UsageError(
            f"resolution.end_ramp={resolution.end_ramp:g} is not before the last of training.epochs={training.epochs}: "
            f"no epoch would train at resolution.end={resolution.end}"
        )
    smaller = min(resolution.start, resolution.end)
    if resolution.multiple > smaller and resolution.start != resolution.end:
        raise UsageError(f"resolution.multiple={resolution.multiple} is more than {smaller} px: it may round to 0")
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
    if cfg.model.initialisation == "composer" and cfg.model.zero_init_last_bn:
        raise UsageError(
            "model.initialisation=composer draws the gammas that model.zero_init_last_bn=true sets to zero: say which"
        )
    if training.nesterov and not training.momentum:
        raise UsageError("training.nesterov needs training.momentum above 0")
    if training.checkpoint and not training.eval_only:
        raise UsageError("training.checkpoint is for training.eval_only=true; a run resumes from its own folder")


def check_batch(cfg, world_size):
    batch_size, micro_batch = cfg.training.batch_size, cfg.training.micro_batch
    if batch_size % (micro_batch * world_size):
        raise UsageError(
            f"training.batch_size={batch_size} is not a multiple of training.micro_batch={micro_batch} x {world_size} "
            f"GPU{'s' if world_size > 1 else ''}"
        )


def learning_rate(cfg, epoch):
    """At `epoch`, a float in [0, training.epochs]: 2.5 is half-way through the third epoch."""
    return schedules.learning_rate(
        epoch,
        peak=peak_learning_rate(cfg),
        epochs=cfg.training.epochs,
        schedule=cfg.lr.schedule,
        warmup_epochs=cfg.lr.warmup_epochs,
        warmup_start=cfg.lr.warmup_start,
        step_epochs=cfg.lr.step_epochs,
        step_gamma=cfg.lr.step_gamma,
    )


def peak_learning_rate(cfg):
    return schedules.peak_learning_rate(lr_per_256=cfg.lr.lr_per_256, batch_size=cfg.training.batch_size)


def resolution(cfg, epoch):
    """Side of the training crops in `epoch`, a whole number from 0, in pixels."""
    return schedules.resolution(epoch, **vars(cfg.resolution))


def resolutions(cfg):
    """`resolution` of every epoch, a list."""
    return [resolution(cfg, epoch) for epoch in range(cfg.training.epochs)]


def refuse_change(saved, cfg, folder):
    """UsageError where `cfg` is another recipe than `saved`, the nested dict in the checkpoint of `folder`'s run."""
    config.refuse_change(
        saved,
        config.to_dict(cfg),
        sections=RECIPE_SECTIONS,
        free=NOT_RECIPE,
        folder=folder,
        defaults=config.defaults(SETTINGS),
    )
