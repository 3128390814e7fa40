"""What an exported model takes pictures for, in the terminal, by the code that the Space runs.

    python tools/predict.py IMAGE... --model model/            a table
    python tools/predict.py IMAGE... --model model/ --json     one JSON object a picture, a line each
    python tools/predict.py IMAGE --cam out.png                also where the network looked (--cam-class NAME)

Says "unsure" where the best class has less than nearly all right answers have. Exit status 1 where a picture cannot be
read; the others are still answered.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from rn50.command import run
from rn50.errors import RunError, UsageError
from rn50.files import expanded, expanded_path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "app"))
import inference

# Inferno, five stops, as the page has them.
COLOURS = np.array([[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]])


def main():
    args = arguments()
    try:
        model = inference.Classifier(args.model)
    except inference.BadModel as error:
        raise RunError(str(error)) from None
    chosen = class_index(model, args.cam_class) if args.cam_class else None
    failed = 0
    for path in args.images:
        try:
            prediction = model.predict(read(path))
        except (inference.UnreadableImage, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            print(f"error: {path}: {reason}", file=sys.stderr)
            failed += 1
            continue
        row = describe(model, path, prediction, args.top)
        print(json.dumps(row) if args.json else table(row, model))
        if args.cam:
            index = prediction.top(1)[0] if chosen is None else chosen
            save_map(args.cam, prediction.shown, model.activation_maps(prediction.features, [index])[0])
    if failed:
        raise RunError(f"{failed} of {len(args.images)} pictures could not be read")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", type=expanded_path, metavar="IMAGE", help="a picture's file")
    parser.add_argument("--model", default="model", type=expanded, help="an exported model's folder (default: model)")
    parser.add_argument("--top", type=int, default=5, help="classes a picture (5)")
    parser.add_argument("--json", action="store_true", help="a JSON object a line instead of a table")
    parser.add_argument(
        "--cam", type=expanded_path, metavar="PNG", help="write the class activation map over the picture"
    )
    parser.add_argument("--cam-class", metavar="NAME", help="of this class, by name or wnid (default: the best)")
    args = parser.parse_args()
    if args.cam and len(args.images) != 1:
        raise UsageError("--cam writes one picture: give one image")
    if args.cam_class and not args.cam:
        raise UsageError("--cam-class needs --cam PNG")
    if args.top < 1:
        raise UsageError("--top must be at least 1")
    return args


def read(path):
    if path.stat().st_size > inference.MAX_BYTES:
        raise inference.UnreadableImage(f"The file is larger than {inference.MAX_BYTES // 1_000_000} MB.")
    return path.read_bytes()


def class_index(model, name):
    for index, label in enumerate(model.labels):
        if name in (model.names[index], label["name"], label["wnid"]):
            return index
    raise UsageError(f"the model has no class {name}")


def describe(model, path, prediction, count):
    return {
        "image": str(path),
        "unsure": prediction.unsure,
        "confidences": [
            {
                "label": model.names[index],
                "wnid": model.labels[index]["wnid"],
                "probability": round(float(prediction.probabilities[index]), 6),
            }
            for index in prediction.top(count)
        ],
        "milliseconds": {"decode": round(prediction.decode_ms, 2), "network": round(prediction.network_ms, 2)},
    }


def table(row, model):
    took, lines = row["milliseconds"], [row["image"]]
    if row["unsure"]:
        least, classes = f"{100 * model.unsure_below:.0f} %", len(model.labels)
        lines.append(f"  unsure: nearly all right answers have {least} or more; it knows {classes} classes alone")
    lines += [f"  {100 * entry['probability']:5.1f} %  {entry['label']}" for entry in row["confidences"]]
    lines.append(f"  decoded in {took['decode']:.1f} ms, classified in {took['network']:.1f} ms")
    return "\n".join(lines)


def save_map(path, picture, values):
    """The picture with the map (float32 [h, w] in 0..1) over it at half strength."""
    smooth = np.asarray(Image.fromarray(values).resize(picture.size, Image.Resampling.BICUBIC)).clip(0, 1)
    stops = np.linspace(0, 1, len(COLOURS))
    heat = np.stack([np.interp(smooth, stops, COLOURS[:, channel]) for channel in range(3)], axis=-1)
    blended = Image.blend(picture, Image.fromarray(heat.astype(np.uint8)), 0.5)
    partial = path.with_name(f"{path.name}.partial")
    try:
        blended.save(partial, "PNG")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise RunError(f"cannot write {path}: {error.strerror or error}") from None


if __name__ == "__main__":
    run(main)
