"""The network and what changes it: one training step, for training, preflight and benchmarks alike."""

import contextlib
import copy
from functools import partial

import torch
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

from rn50.augment import color_jitter, jitter_factors, mixup, mixup_share, normalize
from rn50.ema import EMA
from rn50.errors import RunError, UsageError
from rn50.losses import binary_cross_entropy, cross_entropy
from rn50.model import build_model, not_finite
from rn50.optimizer import FiniteSteps, build_optimizer, climbed, set_learning_rate
from rn50.precision import autocast_dtype, dtype_name

COMPILE_ERRORS = (TorchDynamoException, FailOnRecompileLimitHit)
RESOLUTIONS = 256  # that torch.compile may make a graph for; its own limit is 8, after which it goes on without one


def compiled(network):
    """`network` through torch.compile, with a graph for each resolution; one of COMPILE_ERRORS where there is none.

    Static: a graph for any size is slower than one for its own, and torch would make it at the second resolution.
    UsageError where the environment has switched torch.compile off.
    """
    if torch._dynamo.config.disable:
        raise UsageError("training.compile=true, but TORCH_COMPILE_DISABLE or TORCHDYNAMO_DISABLE is set")
    torch._dynamo.config.recompile_limit = RESOLUTIONS
    return torch.compile(network, dynamic=False, fullgraph=True)


def graphs():
    """(graphs that torch.compile has made in this process, how many of them it had in its cache)."""
    return counters["stats"]["unique_graphs"], counters["aot_autograd"]["autograd_cache_hit"]


class Witness:
    """A forward hook of the first convolution: what the network was given last, and what it computed in."""

    resolution = channels_last = dtype = None

    def __call__(self, module, inputs, output):
        self.resolution, self.dtype = inputs[0].shape[-1], output.dtype
        self.channels_last = output.is_contiguous(memory_format=torch.channels_last)


class Learner:
    """Network, EMA, optimizer and scaler of a recipe, at their beginning.

    cfg: the recipe's settings. classes: of the data. device: a torch.device. rank, world_size: of this process; where
    there are several ranks, the process group is there already. total: sums a tensor over all ranks, in place, and
    returns it.

    network: the bare one, so that checkpoints have plain keys; model: the same, compiled and distributed as asked for.
    ema: an EMA or None. autocast: makes the context in which a forward pass runs. precision: its dtype. layout: the
    torch.memory_format of weights and pixels.
    """

    def __init__(self, cfg, *, classes, device, rank=0, world_size=1, total=lambda tensor: tensor):
        self.cfg, self.device, self.rank, self.world_size, self._total = cfg, device, rank, world_size, total
        training = cfg.training
        torch.manual_seed(training.seed)
        network = build_model(
            arch=cfg.model.arch,
            num_classes=classes,
            blurpool=cfg.model.blurpool,
            blur_maxpool=cfg.model.blur_maxpool,
            initialisation=cfg.model.initialisation,
            zero_init_last_bn=cfg.model.zero_init_last_bn,
            log_prior_bias=cfg.model.log_prior_bias,
        )
        self.layout = torch.channels_last if training.channels_last else torch.contiguous_format
        self.network = network.to(device, memory_format=self.layout)
        self._witness = Witness()
        first = next(module for module in self.network.modules() if isinstance(module, nn.Conv2d))
        first.register_forward_hook(self._witness)
        self._local = self.model = compiled(self.network) if training.compile else self.network
        if world_size > 1:
            self.model = DistributedDataParallel(self._local, device_ids=[device] if device.type == "cuda" else None)
        self.precision = autocast_dtype(training.precision, device)
        enabled = self.precision != torch.float32
        self.autocast = partial(torch.autocast, device.type, dtype=self.precision, enabled=enabled)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == torch.float16)
        self.optimizer = build_optimizer(
            self.network,
            momentum=training.momentum,
            nesterov=training.nesterov,
            weight_decay=training.weight_decay,
            decay=training.decay,
        )
        self.ema = EMA(self.network, half_life=cfg.model.ema_half_life) if cfg.model.ema_half_life else None
        self.finite = FiniteSteps(self.network, self.optimizer, self.scaler)

    def train(self):
        """Make ready for training steps: after an evaluation, and before the first."""
        self.model.train()
        self.finite.remember()

    def step(self, micro_batches, *, accumulation, learning_rate, epoch, step):
        """One optimizer step over `accumulation` micro-batches; returns its loss.

        micro_batches: an iterator of (images uint8 [n, 3, H, W], labels int64 [n], samples int64 [n]); samples are the
        images' numbers in the file, from which their colours are drawn. step: how many came before it in the run, those
        that were left out included. The loss is a float64 scalar on the device, in nats: the mean over the images of
        all ranks, or zero where the step was left out (FiniteSteps); where SAM climbs, that of the weights before it.
        """
        set_learning_rate(self.optimizer, learning_rate)
        climb = self.climbs(step)
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        for number in range(accumulation):
            images, labels, samples = next(micro_batches)
            images = self._jitter(images, samples, epoch)
            share = self._mixup_share(step, number * self.world_size + self.rank)
            with contextlib.nullcontext() if number + 1 == accumulation else self._without_reduction():
                loss += self.forward_backward(images, labels, accumulation, share=share, climb=climb)
        loss = self.finite.step(self._total(loss) / self.world_size)
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.update(self.network)
        return loss

    def climbs(self, step):
        """Whether SAM is in optimizer step `step`, a whole number from 0: the last of every sam_interval steps."""
        training = self.cfg.training
        return training.sam_rho > 0 and (step + 1) % training.sam_interval == 0

    def forward_backward(self, images, labels, accumulation, *, share=0.0, climb=False, model=None):
        """Gradients of one micro-batch, scaled so that those of a step add up to the mean; returns its loss's share.

        share: of each image's neighbour that is mixed into it. climb: take the gradients where SAM climbs to with this
        micro-batch's own, which no other rank sees, as in Composer. model: in place of the learner's own.
        """
        criterion = binary_cross_entropy if self.cfg.training.loss == "bce" else cross_entropy
        pixels = normalize(images)
        if share:
            pixels = mixup(pixels, share)
        # the loader's are channels_last, and a convolution follows either of pixels and weights
        pixels = pixels.contiguous(memory_format=self.layout)

        def loss_of(model):
            with self.autocast():
                logits = model(pixels)
            loss = criterion(logits, labels, smoothing=self.cfg.training.label_smoothing)
            if share:
                # the neighbour's without label smoothing, as in Composer, which smooths first and mixes then
                loss = (1 - share) * loss + share * criterion(logits, labels.roll(1))
            return loss / accumulation

        if not climb:
            loss = loss_of(model or self.model)
            self.scaler.scale(loss).backward()
            return loss.detach()
        local = model or self._local
        parameters = list(local.parameters())
        loss = loss_of(local)
        gradients = torch.autograd.grad(self.scaler.scale(loss), parameters)
        with climbed(parameters, gradients, self.cfg.training.sam_rho):
            self.scaler.scale(loss_of(model or self.model)).backward()
        return loss.detach()

    def planned(self, px):
        """What `seen` must be at `px` pixels."""
        return _account(px, self.layout == torch.channels_last, self.precision)

    def seen(self):
        """{resolution: px, layout, dtype} of the last micro-batch, as the network's first convolution had it."""
        return _account(self._witness.resolution, self._witness.channels_last, self._witness.dtype)

    def try_step(self, images, px):
        """A forward and backward pass of `images` black images, on a copy of the network: it leaves no trace.

        torch.OutOfMemoryError where they do not fit.
        """
        network = copy.deepcopy(self.network).train()  # the own one would count this batch in its BatchNorms
        labels = torch.zeros(images, dtype=torch.int64, device=self.device)
        self.forward_backward(self._black(images, px), labels, 1, climb=self.cfg.training.sam_rho > 0, model=network)

    def try_evaluation(self, images, px):
        """A forward pass of `images` black images, as an evaluation makes it."""
        network = copy.deepcopy(self.network).eval()
        with torch.inference_mode(), self.autocast():
            network(normalize(self._black(images, px)))

    def evaluated(self):
        """The network that is evaluated: the EMA's, or the trained one where there is no EMA."""
        return self.ema.model if self.ema else self.network

    def not_finite(self):
        """Name of a weight or BatchNorm statistic, of the network or its average, with an infinity or NaN, or None."""
        averaged = {f"ema.{name}": tensor for name, tensor in self.ema.model.state_dict().items()} if self.ema else {}
        return not_finite(self.network.state_dict() | averaged)

    def state(self):
        """Tensors and plain values, from which `restore` goes on."""
        return {
            "model": self.network.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "finite": self.finite.state_dict(),
        }

    def restore(self, saved):
        """Go on where `saved`, a `state`, was taken."""
        self.restore_weights(saved)
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        self.finite.load_state_dict(saved["finite"])

    def restore_weights(self, saved):
        """Take over the weights alone, whatever recipe made them. RunError where they are of another network."""
        try:
            self.network.load_state_dict(saved["model"])
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise RunError(f"the checkpoint does not fit this section 'model' and these classes: {reason}") from error
        self.ema = (self.ema or EMA(self.network, half_life=1)) if saved["ema"] else None
        if self.ema:
            self.ema.load_state_dict(saved["ema"])

    def _jitter(self, images, samples, epoch):
        """`images` with the colours that this epoch gives these samples."""
        strengths = {name: getattr(self.cfg.data, name) for name in ("brightness", "contrast", "saturation")}
        if not any(strengths.values()):
            return images
        return color_jitter(images, jitter_factors(samples, **strengths, seed=self.cfg.training.seed, epoch=epoch))

    def _mixup_share(self, step, number):
        training = self.cfg.training
        return mixup_share(training.mixup, seed=training.seed, step=step, number=number) if training.mixup else 0.0

    def _without_reduction(self):
        """DDP adds up gradients over the ranks in the last micro-batch of a step only."""
        return self.model.no_sync() if isinstance(self.model, DistributedDataParallel) else contextlib.nullcontext()

    def _black(self, images, px):
        pixels = torch.zeros(images, px, px, 3, dtype=torch.uint8, device=self.device)
        return pixels.permute(0, 3, 1, 2)


def _account(resolution, channels_last, dtype):
    layout = "channels_last" if channels_last else "contiguous"
    return {"resolution": resolution, "layout": layout, "dtype": dtype_name(dtype)}
