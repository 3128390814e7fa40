"""Where images come from: folders of classes, or ImageNet-1k as it comes from its site, Kaggle or Hugging Face.

All give the samples of an ImageFolder tree of the same images, with the same ids, labels and bytes.
"""

import itertools
import os
from functools import partial

from rn50.data import kaggle, parquet, tars
from rn50.data.flat import FlatSource, wnid_in
from rn50.data.imagenet import COUNTS, KAGGLE, UNSORTED, WNID, expected_forms, tar_path
from rn50.data.listing import ImageFolderSource, class_folders, first_image, reading, subfolders
from rn50.errors import RunError

# What people, the tars and Hugging Face's archives call the folder of a split, in lower case.
NAMES = {
    "train": ("train", "training", "train_images", "ilsvrc2012_img_train", "ilsvrc2012_train", "imagenet_train"),
    "val": ("val", "valid", "validation", "val_images", "ilsvrc2012_img_val", "ilsvrc2012_val", "imagenet_val"),
}
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".7z", ".rar")
# How deep below source.dir its images are looked for, and among how many folders of each depth.
DEPTH, BREADTH = 3, 200


def open_source(directory, split, cache=None):
    """The Listing of `split` ("train", "val") under `directory`, whatever form the images have there.

    cache: a folder for the index of a tar file, which takes minutes to make. RunError where there is nothing of the
    kind, with what to do.
    """
    form = _form(str(directory), split)
    if form is None:
        raise RunError(f"no images of {split} in {directory}: {_advice(str(directory), split)}")
    return form[0](cache)


def split_classes(directory, split):
    """Names of the class folders, or wnids, of a split; None where there is no such split."""
    form = _form(str(directory), split)
    return form and form[1]()


def split_folder(root, split):
    """The folder of a split: `root/split`, or one whose name means the same; RunError where there are two of those."""
    exact = os.path.join(root, split)
    if split not in NAMES or os.path.lexists(exact) or not os.path.isdir(root):
        return exact
    with reading(root):
        found = sorted(
            n for n in os.listdir(root) if n.lower() in NAMES[split] and os.path.isdir(os.path.join(root, n))
        )
    if len(found) > 1:
        raise RunError(f"{root} has the folders {' and '.join(found)}: rename the one that is meant to {split}")
    return os.path.join(root, found[0]) if found else exact


def _form(root, split):
    """(function of `cache` that opens the source, function that returns its classes) of what `root` holds, or None."""
    exact = os.path.join(root, split)
    if split not in COUNTS:
        return _tree(exact) if os.path.lexists(exact) else None
    folder = split_folder(root, split)
    if os.path.isdir(folder):
        folder = _without_extra_levels(folder, split, split_folder(root, "val" if split == "train" else "train"))
        # A folder of the tar's own name may be half unpacked.
        if subfolders(folder) and (os.path.lexists(exact) or not os.path.exists(tar_path(root, split))):
            return _tree(folder)
    for place in (root, exact, folder):
        if os.path.exists(tar_path(place, split)):
            return _tars(tar_path(place, split), split)
    if os.path.isdir(os.path.join(root, KAGGLE)):
        return _kaggle(root, split)
    if parquet.shards(root, split):
        return lambda cache: parquet.ParquetSource(root, split), partial(parquet.parquet_classes, root, split)
    if split == "train" and tars.inner_tars(folder):
        return _tars(folder, split)
    if first_image(folder):
        return _flat(folder)
    # Its reader says what is wrong with what is there.
    return _tree(folder) if os.path.lexists(folder) else None


def _tree(folder):
    return lambda cache: ImageFolderSource(folder, kaggle.synset_names(folder)), lambda: set(class_folders(folder)[0])


def _flat(folder, kind="flat"):
    return lambda cache: FlatSource(folder, kind), lambda: {c["wnid"] for c in FlatSource(folder, kind).classes}


def _tars(path, split):
    return lambda cache: tars.TarSource(path, split, cache), partial(tars.tar_classes, path, split)


def _kaggle(root, split):
    folder = os.path.join(root, KAGGLE, split)
    if split == "val" and not subfolders(folder):
        return _flat(folder, "kaggle")
    return lambda cache: kaggle.KaggleTrain(root, folder, split), _tree(folder)[1]


def _without_extra_levels(folder, split, other):
    """`folder`, or where it holds one folder that is no class, as `train/train/<class>/<image>`, that one.

    other: the folder of the other split, which has the same classes.
    """
    for _ in range(DEPTH):
        names = subfolders(folder)
        if len(names) != 1 or WNID.fullmatch(names[0]) or first_image(folder):
            break
        inner = os.path.join(folder, names[0])
        image = first_image(inner)
        if image:
            theirs = subfolders(other)
            extra = UNSORTED.fullmatch(image) or wnid_in(image) or (theirs and names[0] not in theirs)
        else:
            extra = names[0].lower() in NAMES[split] or len(subfolders(inner)) > 1 or tars.inner_tars(inner)
        if not extra:
            break
        folder = inner
    return folder


def _advice(root, split):
    """What to do where `root` has no images of `split`, as text."""
    if not os.path.isdir(root):
        what = "is no folder" if os.path.lexists(root) else "does not exist"
        return f"{root} {what}; source.dir is the folder of train/ and val/"
    names = subfolders(root)
    inside = any(map(split_of, names))
    if split_of(os.path.basename(os.path.abspath(root))) and (first_image(root) or names) and not inside:
        parent = os.path.dirname(os.path.abspath(root))
        return f"it is the folder of a split itself; give the folder above it: source.dir={parent}"
    other = "val" if split == "train" else "train"
    if split in COUNTS and not _holds(root, other):
        found = _below(root, split)
        if found:
            return "they are deeper; give " + " or ".join(f"source.dir={folder}" for folder in found[:3])
        if packed := tars.inner_tars(root):
            return f"move {os.path.basename(packed[0])} and the other tars of classes into {os.path.join(root, split)}"
        if (image := first_image(root)) and UNSORTED.fullmatch(image):
            return f"move {image} and the other validation images into {os.path.join(root, 'val')}"
        if len(names) > 1 and first_image(os.path.join(root, names[0])):
            return (
                f"it holds classes ({names[0]}, {names[1]}, ...): move them into {os.path.join(root, 'train')}, or "
                f"share their images between that and {os.path.join(root, 'val')}"
            )
    elif split in COUNTS and split == "val":
        return f"{expected_forms(os.path.join(root, split))}; or convert train alone with source.splits=train"
    above = os.path.dirname(os.path.abspath(root))
    if split_of(os.path.basename(above)) and _holds(os.path.dirname(above), split):
        return f"it is a class of a split; give the folder above both: source.dir={os.path.dirname(above)}"
    with reading(root):
        if any(name.endswith(".beton") for name in os.listdir(root)):
            return "it holds .beton files already; train_imagenet.py takes it as data.dir"
        packed = sorted(name for name in os.listdir(root) if name.lower().endswith(ARCHIVES))
    packed = [name for name in packed if not name.startswith("ILSVRC2012_")]  # those are read as they are
    unpack = f"unpack {packed[0]}, or " if packed else ""
    return unpack + expected_forms(os.path.join(root, split))


def split_of(name):
    """The split that a folder of this name holds, or None."""
    return next((split for split, names in NAMES.items() if name.lower() in names), None)


def _below(root, split):
    """The folders next below `root` that hold images of `split`, nearest first."""
    level = [root]
    for _ in range(DEPTH):
        inner = (os.path.join(folder, name) for folder in level for name in _readable(folder))
        level = list(itertools.islice(inner, BREADTH))
        if found := [folder for folder in level if _holds(folder, split)]:
            return found
    return []


def _readable(folder):
    try:
        return subfolders(folder)
    except RunError:
        return []


def _holds(root, split):
    try:
        return _form(root, split) is not None
    except RunError:
        return False
