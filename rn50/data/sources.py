"""Where images come from: an ImageFolder tree, or ImageNet-1k as it comes from its site, Kaggle or Hugging Face.

All give the samples of an ImageFolder tree of the same images, with the same ids, labels and bytes.
"""

import os

from rn50.data import kaggle, parquet, tars
from rn50.data.imagenet import COUNTS, KAGGLE, expected_forms, tar_path
from rn50.data.listing import ImageFolderSource, class_folders, has_class_folders
from rn50.errors import RunError


def open_source(directory, split, cache=None):
    """The Listing of `split` ("train", "val") under `directory`, whatever form the images have there.

    cache: a folder for the index of a tar file, which takes minutes to make. RunError where there is nothing of the
    kind.
    """
    make, _ = _form(directory, split)
    folder = os.path.join(str(directory), split)
    if make is ImageFolderSource and not os.path.exists(folder):
        raise RunError(f"no images of {split} in {directory}: {expected_forms(folder)}")
    return make(directory, split, cache) if make is tars.TarSource else make(directory, split)


def split_classes(directory, split):
    """Names of the class folders, or wnids, of a split; None where there is no such split."""
    return _form(directory, split)[1](directory, split)


def _form(directory, split):
    """(class of the source, function of (directory, split) that returns its classes) of what `directory` holds."""
    tree = ImageFolderSource, _tree_classes
    folder = os.path.join(str(directory), split)
    if split not in COUNTS:
        return tree
    try:
        if os.path.isdir(folder) and has_class_folders(folder):
            return tree
    except OSError:
        return tree  # its reader says why
    if os.path.exists(tar_path(directory, split)):
        return tars.TarSource, tars.tar_classes
    if os.path.isdir(os.path.join(str(directory), KAGGLE)):
        flat = split == "val" and not kaggle.val_by_class(directory)
        return kaggle.KaggleVal if flat else kaggle.KaggleTrain, kaggle.kaggle_classes
    if parquet.shards(directory, split):
        return parquet.ParquetSource, parquet.parquet_classes
    return tree


def _tree_classes(directory, split):
    folder = os.path.join(str(directory), split)
    return set(class_folders(folder)[0]) if os.path.isdir(folder) else None
