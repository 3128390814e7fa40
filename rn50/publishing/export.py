"""A trained network as files that other programs read: safetensors, ONNX, 8-bit ONNX."""

import contextlib
import logging
import os
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

from rn50.errors import RunError
from rn50.model import build_model

WEIGHTS, NETWORK, NETWORK_INT8 = "model.safetensors", "model.onnx", "model_int8.onnx"


class WithFeatures(nn.Module):
    """A torchvision ResNet: logits [N, classes], the last feature map [N, C, h, w], the classifier's weight."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        net = self.network
        x = net.maxpool(net.relu(net.bn1(net.conv1(images))))
        features = net.layer4(net.layer3(net.layer2(net.layer1(x))))
        return net.fc(torch.flatten(net.avgpool(features), 1)), features, net.fc.weight.clone()


def architecture(state):
    """build_model's arguments for the network in a checkpoint; RunError where the checkpoint is not a ResNet's."""
    model = state["config"]["model"]
    try:
        classes = state["model"]["fc.weight"].shape[0]
    except (KeyError, TypeError):
        raise RunError("the checkpoint holds no ResNet (no fc.weight)") from None
    return {
        "arch": model["arch"],
        "num_classes": classes,
        "blurpool": model["blurpool"],
        "blur_maxpool": model["blur_maxpool"],
    }


def load_network(description, weights):
    """The network that `description` (from `architecture`) names, with these weights, for evaluation in float32."""
    network = build_model(**description)
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise RunError(f"the weights are not {description['arch']}'s: {str(error).splitlines()[-1].strip()}") from None
    return network.float().eval().requires_grad_(False)


def write_safetensors(network, path):
    from safetensors.torch import save_file

    state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    save_file(state, path, metadata={"format": "pt"})


def read_safetensors(path):
    from safetensors.torch import load_file

    return load_file(path)


def write_onnx(network, path, *, resolution):
    """`images` float32 [batch, 3, resolution, resolution] -> `logits`, `features`, `classifier_weight`; any batch.

    torch's exporter folds BatchNorm into the convolutions and leaves only operations that ONNX Runtime fuses.
    """
    example = torch.zeros(2, 3, resolution, resolution)
    with _quiet():
        torch.onnx.export(
            WithFeatures(network).eval(),
            (example,),
            str(path),
            input_names=["images"],
            output_names=["logits", "features", "classifier_weight"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            external_data=False,
            dynamo=True,
            verbose=False,
        )


def write_int8(source, path, batches):
    """The network of `source` in 8 bits (QDQ, weights by channel), calibrated on normalised `batches` [N, 3, H, W].

    Weights take 7 bits: with 8, processors without VNNI saturate when they add up products (ONNX Runtime's
    documentation of `reduce_range`), and the Space's processor is not ours to choose.
    """
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Batches(CalibrationDataReader):
        def __init__(self):
            self.left = iter(batches)

        def get_next(self):
            batch = next(self.left, None)
            return None if batch is None else {"images": batch}

    prepared = Path(f"{path}.prepared")
    try:
        with _quiet():
            quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
            quantize_static(
                str(prepared),
                str(path),
                Batches(),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                reduce_range=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.MinMax,
                op_types_to_quantize=["Conv", "Add", "MaxPool", "GlobalAveragePool", "Gemm", "MatMul"],
            )
    finally:
        prepared.unlink(missing_ok=True)


def paired_difference(right, other):
    """(points, low, high) by which `other` is better than `right`, bool [N] each: 95 % interval of a paired sample."""
    difference = other.astype(np.float64) - right.astype(np.float64)
    mean = difference.mean()
    margin = 1.96 * difference.std(ddof=1) / np.sqrt(len(difference)) if len(difference) > 1 else 0.0
    return 100 * mean, 100 * (mean - margin), 100 * (mean + margin)


@contextlib.contextmanager
def _quiet():
    """Exporters print what they do and warn about what is being changed under them; errors still come through."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
