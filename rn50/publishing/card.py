"""What a model's page on the Hub says: the card, of which model_card.md is the template, and its sentences."""

import jinja2
import yaml

from rn50.data import textures
from rn50.data.imagenet import IMAGENETTE_NAMES
from rn50.publishing import calibration

IMAGENET_CLASSES = 1000
# What the Hub calls a dataset, by what dataset_name calls it.
ON_THE_HUB = {"ImageNet-1k": "imagenet-1k", "Imagenette": "frgfm/imagenette"}


def dataset_name(labels):
    """What the classes say about the data: ImageNet-1k, Imagenette, generated textures, or None."""
    wnids = {label["wnid"] for label in labels}
    if wnids == set(IMAGENETTE_NAMES):
        return "Imagenette"
    if wnids == set(textures.CLASSES):
        return "generated textures"
    ours = all(len(wnid) == 9 and wnid[0] == "n" and wnid[1:].isdigit() for wnid in wnids)
    return "ImageNet-1k" if ours and len(wnids) == IMAGENET_CLASSES else None


def images_of(config):
    """What the network was trained on, in words: the dataset's name, or else how many classes it has."""
    return config["dataset"] or f"images of {len(config['labels'])} classes"


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
    kind = on_hub or images_of(config).lower().replace(" ", "-")
    data = {"name": images_of(config), "type": kind, "split": "validation"}
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
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n\n{_text(config, headline)}"


def headline_row(config):
    """The row of `results` that the preprocessing numbers belong to, or None."""
    return next((row for row in config["results"] if row["headline"]), None)


def _setting(row):
    return f"{row['resolution']} px, {'single view' if row['view'] == 'single' else 'averaged with the mirror image'}"


def _text(config, headline):
    network, prepared = config["architecture"], config["preprocessing"]
    blurred = network["blurpool"] or network["blur_maxpool"]
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__, package_path=""),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    return templates.get_template("model_card.md").render(
        config=config,
        network=network,
        prepared=prepared,
        headline=headline,
        name=network["arch"].replace("resnet", "ResNet-"),
        blur=" with BlurPool" if blurred else "",
        setting=_setting,
        images=images_of(config),
        probabilities=probability_lines(config),
        agreement=agreement_lines(config),
        training=training_sentence(config),
        optimizer=optimizer_sentence(config),
        cost=cost_sentence(config),
        recipe=yaml.safe_dump(config["recipe"], sort_keys=False).rstrip(),
        short_side=round(prepared["resolution"] / prepared["crop_ratio"]),
        licence=licence_words(config),
        terms="may be used for non-commercial research and teaching alone"
        if config["dataset"] == "ImageNet-1k"
        else "have terms of their own",
    )


def probability_lines(config):
    """What a probability on the page is and is worth, and when the pages say "unsure": a few sentences each."""
    shown = config["probabilities"]
    worth = (
        f"Its probabilities are softmax(logits / {shown['temperature']:.2f}) and add up to 100 %. That temperature was "
        f"fitted on {shown['fitted_images']:,} validation images."
    )
    if shown["images"]:
        worth += (
            f" On {shown['images']:,} others the best class's probability is {shown['ece']:.1f} points off on average "
            f"(expected calibration error, {calibration.BINS} bins; {shown['ece_before']:.1f} at temperature 1). Other "
            "kinds of pictures are another matter."
        )
    unsure = f"Where the best class has less than {100 * shown['unsure_below']:.0f} %, the pages say that it is unsure"
    shares = " and ".join(
        f"{shown[key]:.0f} % of its {what} answers"
        for key, what in (("right_unsure", "right"), ("wrong_unsure", "wrong"))
        if shown[key] is not None
    )
    return [worth, f"{unsure}: on those other images, for {shares}." if shares else f"{unsure}."]


def licence_words(config):
    """The weights' licence in a sentence, with a link where it is a well-known one."""
    name = config["licence"].upper()
    if name == "OTHER":
        return "The weights have a licence of their own"
    address = config["links"]["licence"]
    return f"The weights are under the {f'[{name}]({address})' if address else name} licence"


def training_sentence(config):
    made = config["training"]
    resolution = config["recipe"]["resolution"]
    sizes = sorted({resolution["start"], resolution["end"]})
    planned = config["recipe"]["training"]["epochs"]
    return (
        f"{made['epochs']:g} of {planned} epoch{'s' * (planned != 1)} at {' to '.join(map(str, sizes))} px, "
        f"global batch {config['recipe']['training']['batch_size']}, "
        f"{'EMA weights' if config['weights'] == 'ema' else 'the weights of the last step'}, "
        f"{made['precision'] or config['recipe']['training']['precision']}"
    )


def optimizer_sentence(config):
    made, lr, data = (config["recipe"][section] for section in ("training", "lr", "data"))
    loss = made["loss"].replace("_", " ").replace("bce", "binary cross entropy")
    more = f", label smoothing {made['label_smoothing']:g}"
    more += f", mixup {made['mixup']:g}" if made.get("mixup") else ""
    more += f", SAM every {made['sam_interval']} steps" if made.get("sam_rho") else ""
    return (
        f"SGD, momentum {made['momentum']:g}{' (Nesterov)' if made['nesterov'] else ''}, learning rate "
        f"{lr['lr_per_256']:g} per 256 images, {lr['warmup_epochs']:g} epochs of warm-up, {lr['schedule']} schedule, "
        f"weight decay {made['weight_decay']:g}; {loss}{more}; random crops of "
        f"{data['crop_scale'][0]:g} to {data['crop_scale'][1]:g} of the area, random mirror images"
    )


def cost_sentence(config):
    made = config["training"]
    device = made["device"] or "a machine that was not recorded"
    ranks = f"{made['world_size']} x " if made["world_size"] and made["world_size"] > 1 else ""
    dollars = f"; ${made['dollars']:.2f} in all" if made["dollars"] is not None else ""
    return f"{duration(made['seconds'])} of training on {ranks}{device} (evaluations not counted){dollars}"


def duration(seconds):
    number, unit = (seconds, "second") if seconds < 60 else (seconds / 60, "minute")
    shown = f"{number:.0f}"
    if seconds >= 3600:
        shown, unit = f"{seconds / 3600:.1f}".removesuffix(".0"), "hour"
    return f"{shown} {unit}{'s' * (shown != '1')}"


def agreement_lines(config):
    """What was measured at export, a sentence each."""
    check = config["export"]
    lines = [
        f"{check['images']:,} {check['kind']}: logits of `model.onnx` and of the re-loaded `model.safetensors` differ "
        f"from the checkpoint's by at most {check['onnx']:.1e} and {check['safetensors']:.1e}."
    ]
    if files := config["agreement"]:
        lines.append(
            f"{files['images']:,} image files, through the app's own code: {files['app_top1']:.2f} % top-1, against "
            f"{files['pil_top1']:.2f} % of the same files through torchvision's transforms and PyTorch (logits differ "
            f"by at most {files['logits']:.1e}); the `.beton` evaluation of the whole set gave "
            + (f"{files['beton_top1']:.2f} %." if files["beton_top1"] is not None else "nothing to compare with.")
        )
    if small := config["int8"]:
        lines.append(
            f"8-bit variant, {small['images']:,} validation images: {small['points']:+.2f} points (95 %: "
            f"{small['low']:+.2f} to {small['high']:+.2f}, paired), {small['milliseconds']:.1f} ms an image against "
            f"{small['fp32_milliseconds']:.1f} ms: {small['verdict']}."
        )
    page = config["browser"]
    lines.append(
        f"The page in a browser runs `{page['network']}`, {page['bytes'] / 1e6:.1f} MB, {page['images']:,} validation "
        f"images: {page['top1']:.2f} % top-1, {page['points']:+.2f} points (95 %: {page['low']:+.2f} to "
        f"{page['high']:+.2f}, paired) beside `model.onnx`."
    )
    return lines
