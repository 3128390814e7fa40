"""ImageNet-1k and Imagenette: their classes, how many images there are, which of them are odd, and their file names."""

import hashlib
import os
import re

from rn50.data.pictures import is_cmyk
from rn50.errors import RunError

CLASSES, COUNTS = 1000, {"train": 1_281_167, "val": 50_000}
# From this many wnids on, a set is meant to be all of ImageNet-1k.
NEARLY_ALL = 900
# Of ImageNet-1k's 1,000 wnids in label order, joined by zero bytes; they are in timm's imagenet_synsets.txt.
IMAGENET_WNIDS_SHA256 = "9be65c467f39ace6da5b8f775034751d1328f56d229db113bb5b30c39f054d19"
WNID = re.compile(r"n\d{8}")
# The names of validation images that lie in no folder of their class.
UNSORTED = re.compile(r"ILSVRC2012_val_\d{8}\.\w+")
DEVKIT = "ILSVRC2012_devkit_t12"
KAGGLE = os.path.join("ILSVRC", "Data", "CLS-LOC")
# Not what their extension says, or not RGB: github.com/cytsai/ilsvrc-cmyk-image-list, the notes of
# tensorflow_datasets' imagenet2012, and a validation image that their authors overlooked (imread_benchmark's
# "four_component_rgb"). `odd_images` looks into each of them.
ODD_VALIDATION_IMAGE = ("n13133613", "ILSVRC2012_val_00019877")
# fmt: off
ODD_IMAGES = (
    "n02105855_2933", "n01739381_1309", "n02077923_14822", "n02447366_23489", "n02492035_15739", "n02747177_10752",
    "n03018349_4028", "n03062245_4620", "n03347037_9675", "n03467068_12171", "n03529860_11437", "n03544143_17228",
    "n03633091_5218", "n03710637_5125", "n03961711_5286", "n04033995_2932", "n04258138_17003", "n04264628_27969",
    "n04336792_7448", "n04371774_5854", "n04596742_4225", "n07583066_647", "n13037406_4650",
)
# fmt: on
IMAGENETTE_NAMES = {
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}


def expected_forms(folder):
    """What `folder`, a split's, or the one above it may hold, as text for a person who has neither."""
    split, forms = os.path.basename(folder), []
    if split in COUNTS:
        tar, kaggle = os.path.basename(tar_path("", split)), os.path.join(KAGGLE, split)
        forms = [tar, kaggle, f"data/{split}-*.parquet"]
        if split == "val":
            forms = [f"{tar} with {DEVKIT}.tar.gz", f"{kaggle} with LOC_val_solution.csv", "data/validation-*.parquet"]
    return f"expected {folder}/<class>/<image>" + "".join(f", or {form}" for form in forms)


def is_imagenet(wnids):
    """Whether `wnids`, in label order, are the 1,000 of ImageNet-1k."""
    return hashlib.sha256("\0".join(wnids).encode(errors="surrogateescape")).hexdigest() == IMAGENET_WNIDS_SHA256


def imagenet_names(wnids):
    """{wnid: name} of ImageNet-1k's classes, given in label order: the same names whatever form the images have."""
    from torchvision.models import ResNet50_Weights  # brings torch, which the workers do without

    return dict(zip(wnids, ResNet50_Weights.IMAGENET1K_V1.meta["categories"], strict=True))


def check_counts(source, split, rule):
    """RunError where `source` should be all of ImageNet-1k and is not. rule: auto (by its classes), imagenet or any."""
    wnids = sum(bool(WNID.fullmatch(c["wnid"])) for c in source.classes)
    if rule == "any" or split not in COUNTS or (rule == "auto" and wnids < NEARLY_ALL):
        return
    problem = source.missing()
    if not problem and (len(source.classes), len(source)) != (CLASSES, COUNTS[split]):
        problem = (
            f"{len(source)} images of {len(source.classes)} classes, and ImageNet-1k has {COUNTS[split]} of {CLASSES}"
        )
    if not problem and not is_imagenet([c["wnid"] for c in source.classes]):
        problem = f"its {CLASSES} classes are not those of ImageNet-1k"
    if problem:
        raise RunError(
            f"{split} in {source.folder} is not all of ImageNet-1k: {problem}; get the rest, or convert what is there "
            "with source.counts=any"
        )


def odd_images(source):
    """[(id, "PNG" or "CMYK")] of ImageNet's known oddities that `source` has and that are odd."""
    labels = {c["wnid"]: label for label, c in enumerate(source.classes)}
    found = []
    for wnid, stem in [(stem.partition("_")[0], stem) for stem in ODD_IMAGES] + [ODD_VALIDATION_IMAGE]:
        label = labels.get(wnid)
        i = None if label is None else source.find(label, f"{stem}.JPEG")
        if i is not None:
            kind = _odd_kind(source.read(i))
            if kind:
                found.append((source.item(i)[0], kind))
    return found


def _odd_kind(data):
    if data.startswith(b"\x89PNG"):
        return "PNG"
    return "CMYK" if is_cmyk(data) else None


def is_inner_tar_name(name):
    """Whether a file of this name may hold the images of one class, as ILSVRC2012_img_train.tar has 1,000."""
    return name.endswith(".tar") and bool(WNID.fullmatch(name.removesuffix(".tar")))


def tar_path(root, split):
    """Where the tar of a split lies in the folder `root` of the site's downloads."""
    return os.path.join(str(root), f"ILSVRC2012_img_{split}.tar")
