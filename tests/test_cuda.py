"""A step on CUDA tensors that have no data (FakeTensorMode): devices, strides, and whether the host would wait."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from rn50 import augment
from rn50.augment import color_jitter, normalize
from rn50.ema import EMA
from rn50.losses import binary_cross_entropy, cross_entropy
from rn50.metrics import correct_in_top
from rn50.model import build_model
from rn50.optimizer import FiniteSteps, build_optimizer, set_learning_rate

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
FUSED = (torch.ops.aten._fused_sgd_.default,)
COPY = torch.ops.aten.copy_.default
GPU = torch.device("cuda", 0)


class Waits(TorchDispatchMode):
    """Collects what makes the host wait for the GPU: values read, and copies between them that are not asynchronous."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in FUSED:
            return None  # has no fake kernel, and gives nothing
        source = args[0].device.type if args and isinstance(args[0], torch.Tensor) else None
        result = function(*args, **kwargs)
        if function is torch.ops.aten._local_scalar_dense.default or "nonzero" in str(function):
            self.found.append(str(function))
        asynchronous = kwargs.get("non_blocking") or (function is COPY and len(args) > 2 and args[2])
        ends = {source, args[1].device.type if function is COPY else getattr(result, "device", GPU).type}
        if function in (COPY, torch.ops.aten._to_copy.default) and ends == {"cpu", "cuda"} and not asynchronous:
            self.found.append(str(function))
        return result


@pytest.fixture
def gpu(monkeypatch):
    """The mode in which tensors on the GPU can be made here."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.amp.grad_scaler.amp_definitely_not_available", lambda: False, raising=False)
    with FakeTensorMode() as mode:
        yield mode
    augment._of_channels.cache_clear()


def on_gpu(network):
    """`network` as network.to(GPU, memory_format=torch.channels_last), which fake tensors do not support."""
    for module in network.modules():
        for of in (module._parameters, module._buffers):
            for name, tensor in of.items():
                layout = torch.channels_last if tensor is not None and tensor.dim() == 4 else torch.preserve_format
                if tensor is not None:
                    moved = tensor.detach().to(GPU, memory_format=layout)
                    of[name] = torch.nn.Parameter(moved) if of is module._parameters else moved
    return network


def images_on_gpu(count, px):
    return torch.zeros(count, px, px, 3, dtype=torch.uint8, device=GPU).permute(0, 3, 1, 2)


def test_the_watch_sees_what_waits(gpu):
    with Waits() as waits:
        torch.tensor([1.0, 2.0], device=GPU)
        torch.zeros(2, device=GPU).cpu()
        torch.zeros(2, device=GPU).copy_(torch.zeros(2))
        torch.zeros(2).to(GPU, non_blocking=True)
    assert len(waits.found) == 3
    with pytest.raises(RuntimeError, match="item|data-dependent|_local_scalar_dense"):
        torch.zeros(2, device=GPU).sum().item()


def test_a_forward_pass_does_not_wait_and_keeps_channels_last(gpu):
    network = on_gpu(build_model(arch="resnet50", num_classes=10, blurpool=True, blur_maxpool=True)).train()
    outputs = []
    for module in network.modules():
        if not list(module.children()):
            module.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    images, factors = images_on_gpu(2, 96), torch.ones(2, 3)
    labels = torch.zeros(2, dtype=torch.int64, device=GPU)
    normalize(color_jitter(images, factors))  # what is made once may wait
    with Waits() as waits:
        pixels = normalize(color_jitter(images, factors))
        assert pixels.is_contiguous(memory_format=torch.channels_last)
        with torch.autocast("cuda", dtype=torch.float16):
            logits = network(pixels)
        loss = torch.zeros((), dtype=torch.float64, device=GPU)
        for criterion in (cross_entropy, binary_cross_entropy):
            loss += criterion(logits, labels, smoothing=0.1).detach()
        loss += correct_in_top(logits, labels, 5)
    assert not waits.found
    assert logits.dtype == torch.float16
    outputs = [output for output in outputs if output.dim() == 4]
    assert len(outputs) > 100
    assert all(output.is_contiguous(memory_format=torch.channels_last) for output in outputs)


@pytest.mark.parametrize("half", [False, True])
def test_an_optimizer_step_does_not_wait(gpu, half):
    network = on_gpu(build_model(arch="resnet18", num_classes=10, blurpool=True))
    optimizer = build_optimizer(network, momentum=0.9, nesterov=True, weight_decay=1e-4, decay="weights")
    set_learning_rate(optimizer, 0.1)
    scaler = torch.amp.GradScaler("cuda", enabled=half)
    assert scaler.is_enabled() == half
    finite = FiniteSteps(network, optimizer, scaler)
    finite.remember()
    ema = EMA(torch.nn.Identity(), half_life=10)
    ema.model = on_gpu(build_model(arch="resnet18", num_classes=10, blurpool=True))  # fake tensors do not copy deeply
    scaler.scale(torch.zeros((), device=GPU))
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with Waits() as waits:
        loss = finite.step(torch.zeros((), dtype=torch.float64, device=GPU))
        ema.update(network)
    assert not waits.found
    assert loss.device == GPU
