"""The declared settings of a training run, the combinations that make no sense, and the schedules they ask for."""

from fastargs import Config, Param, Section

from rn50 import config, schedules
from rn50.config import choice, either, number, numbers, path, switch, text, whole
from rn50.errors import UsageError
from rn50.model import ARCHITECTURES, INITIALISATIONS

# Epochs of a run with --quick.
QUICK_EPOCHS = 2
QUICK = {
    "--quick": f"try a recipe in {QUICK_EPOCHS} epochs, with its warm-up and ramps shortened in proportion, as a run "
    "of its own: NAME_quick. A flag wins over what this sets"
}
TRIAL = f"to try a recipe in {QUICK_EPOCHS} epochs, give --quick alone"
ABOUT = """
Usage:
  python train_imagenet.py --config-file rn50_configs/NAME.yaml \\
      --data.dir=BETONS [--quick] [--section.key=VALUE ...]
  torchrun --nproc_per_node=8 train_imagenet.py ...    on eight GPUs

{}

A recipe is a YAML that has the network, the optimisation, the schedules and the evaluation in it. You usually add
where your files are, --data.dir; on a GPU with less memory --training.micro_batch; where an hour costs money
--budget.max_dollars and --budget.instance. The same command again goes on with a run that was interrupted, and a
run's folder in the place of a recipe stands for the settings in it.
"""
SETTINGS = Config()
Section("model", "the network", SETTINGS).params(
    arch=Param(choice(*ARCHITECTURES), "as torchvision calls it", default="resnet50"),
    blurpool=Param(switch(), "BlurPool: a low-pass filter before each strided convolution", default=False),
    blur_maxpool=Param(switch(), "the same filter in the max-pool", default=False),
    initialisation=Param(choice(*INITIALISATIONS), "whose initial weights", default="torchvision"),
    zero_init_last_bn=Param(switch(), "begin with residual branches that give zero", default=True),
    log_prior_bias=Param(
        switch(), "begin with a bias of -ln(classes) in the classifier, for training.loss=bce", default=False
    ),
    ema_half_life=Param(
        number(0), "steps in which the moving average of the weights (EMA) forgets half; 0: no EMA", default=0
    ),
)
Section("training", "optimisation", SETTINGS).params(
    epochs=Param(whole(1, 10_000), "how often every image is seen", required=True),
    batch_size=Param(whole(1), "images of an optimizer step, over all GPUs", required=True),
    micro_batch=Param(
        whole(1), "images that one GPU takes at once, which BatchNorm sees; fewer take less memory", required=True
    ),
    momentum=Param(number(0, 1), "of SGD", default=0.9),
    nesterov=Param(switch(), "Nesterov's momentum", default=False),
    weight_decay=Param(number(0), "L2 penalty, coupled with the learning rate", default=1e-4),
    decay=Param(
        choice("weights", "all"),
        "what decays: weights of convolutions and classifier, or everything",
        default="weights",
    ),
    loss=Param(choice("cross_entropy", "bce"), "softmax, or a sigmoid for each class", default="cross_entropy"),
    label_smoothing=Param(number(0, 1), "share of a label that is spread over all classes", default=0.1),
    mixup=Param(number(0), "alpha of mixup's Beta distribution; 0: no mixup", default=0),
    sam_rho=Param(number(0), "radius of sharpness-aware minimization (SAM); 0: no SAM", default=0),
    sam_interval=Param(whole(1), "optimizer steps from one with SAM to the next", default=10),
    precision=Param(
        choice("auto", "bf16", "fp16", "fp32"), "of autocast; auto: the best that the device has", default="auto"
    ),
    channels_last=Param(switch(), "NHWC memory format", default=True),
    compile=Param(switch(), "use torch.compile", default=False),
    device=Param(choice("auto", "cuda", "cpu"), "auto: the GPU where there is one", default="auto"),
    seed=Param(whole(0), "of weights, order and augmentation", default=0),
    eval_only=Param(switch(), "evaluate a checkpoint and stop", default=False),
    checkpoint=Param(path(), "what eval_only evaluates in place of this run: another run's folder, or a .pt file"),
)
Section("lr", "learning rate", SETTINGS).params(
    lr_per_256=Param(number(0), "the peak, for every 256 images of training.batch_size", default=0.1),
    schedule=Param(choice("cosine", "linear", "step"), "how it falls after the warm-up", default="cosine"),
    warmup_epochs=Param(number(0), "epochs in which it rises to the peak", default=5),
    warmup_start=Param(number(0, 1), "share of the peak at which the warm-up begins", default=0.0),
    step_epochs=Param(numbers(number(0)), "epochs after which schedule=step drops it", default=[30, 60]),
    step_gamma=Param(number(0, 1), "factor of each drop", default=0.1),
)
Section("resolution", "progressive resizing of the training crops", SETTINGS).params(
    start=Param(whole(16), "px in the first epochs", default=224),
    end=Param(whole(16), "px in the last epochs", default=224),
    start_ramp=Param(number(0), "epochs after which px leave start", default=0),
    end_ramp=Param(number(0), "epochs after which px have come to end", default=0),
    multiple=Param(whole(1), "px in between are multiples of this", default=32),
)
Section("data", "files, loading and augmentation", SETTINGS).params(
    dir=Param(path(), "folder of train_SIZE.beton and val_SIZE.beton (write_dataset.py makes them)", required=True),
    rung=Param(
        either("auto", whole(1)), "SIZE to train from; auto: the smallest that is enough for the epoch", default="auto"
    ),
    order=Param(
        choice("auto", "random", "page"), "page: read page by page, for files larger than memory", default="auto"
    ),
    workers=Param(whole(0), "decoding threads of each GPU; 0: all cores, shared by the GPUs", default=0),
    timeout_minutes=Param(number(0.01), "a batch that takes longer is an error", default=5),
    crop_scale=Param(
        numbers(number(0.001, 1)), "least and greatest share of the area that a random crop has", default=[0.08, 1.0]
    ),
    brightness=Param(number(0), "colour jitter; 0: none", default=0),
    contrast=Param(number(0), "colour jitter; 0: none", default=0),
    saturation=Param(number(0), "colour jitter; 0: none", default=0),
)
Section("validation", "evaluation", SETTINGS).params(
    resolutions=Param(numbers(whole(16)), "px of the evaluations at the end", default=[224, 256]),
    headline_resolution=Param(whole(16), "px of the top-1 in the log, one of resolutions", default=224),
    headline_view=Param(
        choice("single", "flip"), "one view of an image, or the average with its mirror image", default="single"
    ),
    crop_ratio=Param(number(0.1, 1), "side of the centre crop over the short side", default=0.875),
    batch_size=Param(whole(1), "images that one GPU takes at once", default=256),
    every=Param(whole(1), "epochs from one evaluation to the next; the last is always evaluated", default=1),
)
Section("logging", "the run's folder", SETTINGS).params(
    folder=Param(path(), "where the folders of all runs are", default="runs"),
    run_name=Param(path(), "this run's folder in it; the same name goes on with that run", required=True),
    checkpoint_minutes=Param(number(0), "minutes between checkpoints; every epoch ends with one, too", default=10),
    checkpoint_steps=Param(whole(0), "optimizer steps between checkpoints; 0: by time alone", default=0),
    mirror=Param(path(), "s3://bucket/prefix that gets a copy of the folder, for another machine to go on from"),
)
Section("budget", "money", SETTINGS).params(
    max_dollars=Param(number(0), "before it costs more, the run writes a checkpoint and stops"),
    dollars_per_hour=Param(number(0), "price of one machine"),
    instance=Param(text(), "EC2 type of rn50/planning/costs.csv, in place of dollars_per_hour"),
    spot=Param(switch(), "of instance, the highest spot price seen, not the price on demand", default=False),
    allow_overrun=Param(switch(), "begin also what is projected to cost more than max_dollars", default=False),
)

# What may differ when a run resumes: it changes where and how fast the run is, not what it computes.
NOT_RECIPE = {"data.dir", "data.workers", "data.timeout_minutes", "training.device", "training.eval_only"}
NOT_RECIPE |= {"training.checkpoint"}
RECIPE_SECTIONS = ("model", "training", "lr", "resolution", "data")


def load(description, argv=None):
    """The settings of a command line as a namespace of sections, checked; `config.read` says how it is read."""
    names = ", ".join(config.recipes())
    advice = f"give a recipe: --config-file {config.shown('NAME')}" + (f", with NAME one of {names}" if names else "")
    files, flags = config.read(ABOUT.format(description), SETTINGS, argv, switches=QUICK, advice=advice)
    quick = flags.pop("quick", False)
    if not files and "training.epochs" not in flags:
        raise UsageError(advice)
    cfg = config.namespace(SETTINGS, files | (quick_settings(files, flags) if quick else {}) | flags)
    check(cfg)
    return cfg


def quick_settings(files, flags):
    """{key: value} of what --quick changes of the recipe that `files` and `flags`, {key: value}, make.

    Every phase takes place: the first epoch trains at resolution.start and the last at resolution.end, both are
    evaluated, and the learning rate runs through its whole schedule.
    """
    own = config.namespace(SETTINGS, flags | files)
    epochs = config.namespace(SETTINGS, files | {"training.epochs": QUICK_EPOCHS} | flags).training.epochs

    def shortened(epoch):
        return round(epoch * epochs / own.training.epochs, 4)

    end_ramp = min(shortened(own.resolution.end_ramp), epochs - 1)
    return {
        "training.epochs": epochs,
        "lr.warmup_epochs": shortened(own.lr.warmup_epochs),
        "lr.step_epochs": [shortened(epoch) for epoch in own.lr.step_epochs],
        # an epoch that begins at start_ramp still has the first size
        "resolution.start_ramp": min(shortened(own.resolution.start_ramp), max(0, end_ramp - 1)),
        "resolution.end_ramp": end_ramp,
        "validation.every": 1,
        "logging.run_name": own.logging.run_name.removesuffix("_quick") + "_quick",
    }


def check(cfg):
    """Refuse combinations that no run could mean."""
    resolution, lr, training = cfg.resolution, cfg.lr, cfg.training
    if resolution.start_ramp > resolution.end_ramp:
        raise UsageError(
            f"resolution.start_ramp={resolution.start_ramp:g} is after resolution.end_ramp={resolution.end_ramp:g}"
        )
    if resolution.end_ramp > training.epochs - 1 and resolution.start != resolution.end:
        raise UsageError(
            f"resolution.end_ramp={resolution.end_ramp:g} is not before the last of training.epochs={training.epochs}: "
            f"no epoch would train at resolution.end={resolution.end}; {TRIAL}"
        )
    smaller = min(resolution.start, resolution.end)
    if resolution.multiple > smaller and resolution.start != resolution.end:
        raise UsageError(f"resolution.multiple={resolution.multiple} is more than {smaller} px: it may round to 0")
    if lr.warmup_epochs >= training.epochs:
        raise UsageError(
            f"lr.warmup_epochs={lr.warmup_epochs:g} leaves nothing of training.epochs={training.epochs}; {TRIAL}"
        )
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
