"""A trained network as files that other programs read: safetensors, ONNX, ONNX in 8 bits or with its weights in 8."""

import contextlib
import logging
import math
import os
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

from rn50.errors import RunError
from rn50.model import build_model

WEIGHTS, NETWORK = "model.safetensors", "model.onnx"
NETWORK_INT8, NETWORK_W8 = "model_int8.onnx", "model_w8.onnx"
# Elements of the smallest weight that write_w8 stores in 8 bits: a ResNet-50's first stage, which all else comes from,
# stays in float for 0.8 MB, and BlurPool's filters, which must add up to 1.
W8_LEAST = 40_000


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
            _share_classifier_weight(path)
    finally:
        prepared.unlink(missing_ok=True)


def _share_classifier_weight(path):
    """Make the output `classifier_weight` out of the classifier's quantised weight, in the place of a copy in float.

    With a DequantizeLinear of its own: ONNX Runtime fuses the classifier's into a product in 8 bits.
    """
    import onnx

    model = onnx.load(path)
    graph = model.graph
    made_by = {name: node for node in graph.node for name in node.output}
    (classifier,) = (node for node in graph.node if node.op_type == "Gemm")
    shared = onnx.NodeProto()
    shared.CopyFrom(made_by[classifier.input[1]])
    shared.name, shared.output[:] = "classifier_weight", ["classifier_weight"]
    graph.node.append(shared)
    (copy,) = (tensor for tensor in graph.initializer if tensor.name == "classifier_weight")
    graph.initializer.remove(copy)
    onnx.save(model, path)


def write_w8(source, path):
    """The network of `source` with its large weights in int8, a scale for each output channel; it computes in float."""
    import onnx

    model = onnx.load(source)
    graph = model.graph
    weights = {node.input[1] for node in graph.node if node.op_type in ("Conv", "Gemm")}
    for tensor in list(graph.initializer):
        if tensor.name not in weights or math.prod(tensor.dims) < W8_LEAST:
            continue
        name, weight = tensor.name, onnx.numpy_helper.to_array(tensor)
        channels = weight.reshape(len(weight), -1)
        scale = np.maximum(np.abs(channels).max(1) / 127, np.finfo(np.float32).tiny)  # there may be nothing but zeros
        whole = balanced_rounding(channels / scale[:, None]).astype(np.int8).reshape(weight.shape)
        tensor.CopyFrom(onnx.numpy_helper.from_array(whole, f"{name}_int8"))
        graph.initializer.append(onnx.numpy_helper.from_array(scale, f"{name}_scale"))
        stored = [f"{name}_int8", f"{name}_scale"]
        graph.node.insert(0, onnx.helper.make_node("DequantizeLinear", stored, [name], axis=0))
    onnx.save(model, path)


def balanced_rounding(rows):
    """float32 [N, K] -> whole numbers, less than 1 from them, whose errors add up to at most 0.5 in each row.

    What the weights are multiplied with comes from a ReLU and has one sign: errors that do not cancel out move the sum
    for every picture. As many as it takes of those that would be moved furthest are rounded the other way (SQuant,
    arXiv 2202.07471).
    """
    rounded = np.rint(rows)
    errors = rounded - rows
    for row, error, surplus in zip(rounded, errors, np.rint(errors.sum(1)).astype(int), strict=True):
        order = np.argsort(error)
        row[order[len(row) - surplus :] if surplus > 0 else order[:-surplus]] -= np.sign(surplus)
    return rounded


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
