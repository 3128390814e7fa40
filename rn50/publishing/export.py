"""A trained network as files that other programs read: safetensors, ONNX, 8-bit ONNX, and the card beside them."""

import contextlib
import logging
import os
import warnings
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import nn

from rn50.errors import RunError
from rn50.model import build_model

WEIGHTS, NETWORK, NETWORK_INT8 = "model.safetensors", "model.onnx", "model_int8.onnx"
IMAGENET_CLASSES = 1000
# What the Hub calls a dataset, by what dataset_name calls it.
ON_THE_HUB = {"ImageNet-1k": "imagenet-1k", "Imagenette": "frgfm/imagenette"}


# Of the card: the preprocessing and the five best classes, with no code of ours.
EXAMPLE = """\
import json

import numpy as np
import onnxruntime
from PIL import Image

config = json.load(open("config.json"))
prepared = config["preprocessing"]
image, side = Image.open("picture.jpg").convert("RGB"), prepared["resolution"]
short = round(side / prepared["crop_ratio"])
image = image.resize([short * length // min(image.size) for length in image.size], Image.Resampling.BILINEAR)
left, top = (round((length - side) / 2) for length in image.size)
pixels = np.float32(image.crop((left, top, left + side, top + side)))
pixels = ((pixels - prepared["mean"]) / prepared["std"]).transpose(2, 0, 1)[None].astype(np.float32)
logits = onnxruntime.InferenceSession(config["network"]).run(["logits"], {"images": pixels})[0][0]
for index in logits.argsort()[::-1][:5]:
    print(f"{logits[index]:6.2f}  {config['labels'][index]['name']}")
"""


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


def dataset_name(labels):
    """What the classes say about the data: ImageNet-1k, Imagenette, or nothing."""
    from rn50.data.imagenet import IMAGENETTE_NAMES

    wnids = {label["wnid"] for label in labels}
    if wnids == set(IMAGENETTE_NAMES):
        return "Imagenette"
    ours = all(len(wnid) == 9 and wnid[0] == "n" and wnid[1:].isdigit() for wnid in wnids)
    return "ImageNet-1k" if ours and len(wnids) == IMAGENET_CLASSES else "a dataset without a name"


def model_card(config):
    """The text of a Hugging Face model card for the config.json of an exported model."""
    front = {
        "license": config["licence"],
        "library_name": "onnx",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "resnet", "ffcv", "onnx", config["architecture"]["arch"]],
        "metrics": ["accuracy"],
    }
    on_hub = ON_THE_HUB.get(config["dataset"])
    kind = on_hub or config["dataset"].lower().replace(" ", "-")
    data = {"name": config["dataset"], "type": kind, "split": "validation"}
    headline = headline_row(config)
    if on_hub:
        front["datasets"] = [on_hub]
    if headline:
        metrics = [
            {"type": "accuracy", "name": f"{name}, {_setting(headline)}", "value": round(headline[key], 2)}
            for key, name in (("top1", "top-1"), ("top5", "top-5"))
        ]
        results = [{"task": {"type": "image-classification"}, "dataset": data, "metrics": metrics}]
        front["model-index"] = [{"name": config["name"], "results": results}]
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n\n{_card_text(config, headline)}"


def headline_row(config):
    """The row of `results` that the preprocessing numbers belong to, or None."""
    return next((row for row in config["results"] if row["headline"]), None)


def _setting(row):
    return f"{row['resolution']} px, {'single view' if row['view'] == 'single' else 'averaged with the mirror image'}"


def _card_text(config, headline):
    network, made, prepared = config["architecture"], config["training"], config["preprocessing"]
    parts = [f"# {config['name']}\n", _summary(config, headline) + "\n", "## Results\n"]
    if config["results"]:
        parts += [
            f"On the validation images of {config['dataset']}, centre crop of {prepared['crop_ratio']:g} of the short "
            "side, measured from the training run's `.beton` files. The interval is what the choice of validation "
            "images alone leaves (95 %, Wilson); one training run.\n",
            "| evaluated at | top-1 | 95 % interval | top-5 | images |\n|---|---|---|---|---|",
            *[
                f"| {_setting(row)}{' (headline)' if row['headline'] else ''} | {row['top1']:.2f} % | "
                f"{row['top1_low']:.2f} to {row['top1_high']:.2f} | {row['top5']:.2f} % | {row['images']} |"
                for row in config["results"]
            ],
        ]
    else:
        parts.append("Not evaluated: the run had not reached its last epoch when it was exported.")
    parts += ["", "What serving adds, measured at export:\n", *[f"- {line}" for line in agreement_lines(config)]]
    parts += ["\n## How it was trained\n", f"- {training_sentence(config)}", f"- {optimizer_sentence(config)}"]
    parts.append(f"- Cost: {cost_sentence(config)}")
    parts.append(
        f"- Code: rn50, commit `{made['commit'] or 'not recorded'}`; exported with `{config['export']['commit']}`."
    )
    parts += [f"- Data: `{name}`, sha256 `{checksum or 'not recorded'}`" for name, checksum in config["data"].items()]
    recipe = yaml.safe_dump(config["recipe"], sort_keys=False).rstrip()
    parts.append(f"\n<details><summary>The whole recipe</summary>\n\n```yaml\n{recipe}\n```\n\n</details>\n")
    parts.append(
        "## Use\n\n"
        f"`{config['network']}` takes `images`, float32 [batch, 3, {prepared['resolution']}, "
        f"{prepared['resolution']}]: RGB, resized (bilinear, antialiased) so that the short side is "
        f"{round(prepared['resolution'] / prepared['crop_ratio'])} px, centre-cropped, then per channel "
        f"(value - mean) / std with values in 0..255, mean {prepared['mean']}, std {prepared['std']}. It gives "
        "`logits`, `features` (the last feature map) and `classifier_weight`; the class activation map of class c is "
        "`classifier_weight[c] @ features`. `model.safetensors` has the weights under torchvision's names"
        + (
            ", except that the weight of a blurred convolution is `...conv.weight` and its filter `...blur_filter`.\n"
            if network["blurpool"] or network["blur_maxpool"]
            else ".\n"
        )
    )
    parts.append(f"```python\n{EXAMPLE}```\n")
    parts.append(
        "## Limits\n\n"
        f"It knows {network['num_classes']} classes and gives one of them for every picture, whatever that shows. Its "
        "probabilities are not calibrated. A class activation map says which places raised a class's score, not why. "
        "It repeats what its training images have in common: where, when and by whom they were taken. It was made to "
        "learn from and to build on, not for decisions about people.\n"
    )
    if config["examples"]:
        parts.append("## Example pictures\n")
        parts += [f"- `{example['file']}`: {example['licence']}" for example in config["examples"]]
    terms = "are for non-commercial research" if config["dataset"] == "ImageNet-1k" else "have terms of their own"
    parts.append(f"\n## Licence\n\nWeights: {config['licence']}. The training images {terms}.\n")
    return "\n".join(parts)


def _summary(config, headline):
    arch = config["architecture"]
    blur = " with BlurPool" if arch["blurpool"] or arch["blur_maxpool"] else ""
    name = arch["arch"].replace("resnet", "ResNet-")
    accuracy = (
        f" {headline['top1']:.2f} % top-1 at {_setting(headline)} (95 %: {headline['top1_low']:.2f} to "
        f"{headline['top1_high']:.2f})."
        if headline
        else ""
    )
    return f"{name}{blur}, trained from scratch on {config['dataset']}, {arch['num_classes']} classes.{accuracy}"


def training_sentence(config):
    made = config["training"]
    resolution = config["recipe"]["resolution"]
    sizes = sorted({resolution["start"], resolution["end"]})
    return (
        f"{made['epochs']:g} of {config['recipe']['training']['epochs']} epochs at {' to '.join(map(str, sizes))} px, "
        f"global batch {config['recipe']['training']['batch_size']}, "
        f"{'EMA weights' if config['weights'] == 'ema' else 'the weights of the last step'}, "
        f"{made['precision'] or config['recipe']['training']['precision']}"
    )


def optimizer_sentence(config):
    made, lr, data = (config["recipe"][section] for section in ("training", "lr", "data"))
    loss = made["loss"].replace("_", " ").replace("bce", "binary cross entropy")
    return (
        f"SGD, momentum {made['momentum']:g}{' (Nesterov)' if made['nesterov'] else ''}, learning rate "
        f"{lr['lr_per_256']:g} per 256 images, {lr['warmup_epochs']:g} epochs of warm-up, {lr['schedule']} schedule, "
        f"weight decay {made['weight_decay']:g}; {loss}, label smoothing {made['label_smoothing']:g}; random crops of "
        f"{data['crop_scale'][0]:g} to {data['crop_scale'][1]:g} of the area, random mirror images"
    )


def cost_sentence(config):
    made = config["training"]
    device = made["device"] or "a machine that was not recorded"
    ranks = f"{made['world_size']} x " if made["world_size"] and made["world_size"] > 1 else ""
    dollars = f"${made['dollars']:.2f} in all" if made["dollars"] is not None else "price not recorded"
    return f"{duration(made['seconds'])} of training on {ranks}{device} (evaluations not counted), {dollars}."


def duration(seconds):
    if seconds < 60:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 3600 else f"{seconds / 3600:.1f} hours"


def agreement_lines(config):
    """What was measured at export, a sentence each."""
    check = config["export"]
    lines = [
        f"{check['images']} {check['kind']}: logits of `model.onnx` and of the re-loaded `model.safetensors` differ "
        f"from the checkpoint's by at most {check['onnx']:.1e} and {check['safetensors']:.1e}."
    ]
    if files := config["agreement"]:
        lines.append(
            f"{files['images']} image files, through the app's own code: {files['app_top1']:.2f} % top-1, against "
            f"{files['pil_top1']:.2f} % of the same files through torchvision's transforms and PyTorch (logits differ "
            f"by at most {files['logits']:.1e}); the `.beton` evaluation of the whole set gave "
            + (f"{files['beton_top1']:.2f} %." if files["beton_top1"] is not None else "nothing to compare with.")
        )
    if small := config["int8"]:
        lines.append(
            f"8-bit variant, {small['images']} validation images: {small['points']:+.2f} points (95 %: "
            f"{small['low']:+.2f} to {small['high']:+.2f}, paired), {small['milliseconds']:.1f} ms an image against "
            f"{small['fp32_milliseconds']:.1f} ms: {small['verdict']}."
        )
    return lines


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
