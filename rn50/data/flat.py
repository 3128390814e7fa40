"""Images of one folder without class folders: unpacked validation tars, Kaggle's and tiny-imagenet's validation images.

Their classes stand in a file that lies beside them or above, or in their names.
"""

import collections
import os
import re
from dataclasses import dataclass

from rn50.data import tars
from rn50.data.imagenet import DEVKIT, UNSORTED
from rn50.data.kaggle import SOLUTION, read_solution, synset_names
from rn50.data.listing import EXTENSIONS, Listing, describe, is_image_name, kind_of, nearest, reading
from rn50.errors import RunError

TINY = "val_annotations.txt"
# n01440764_10026.JPEG, or as Hugging Face has them: n01440764_10026_n01440764.JPEG.
NAMED = re.compile(r"(?:.+_(n\d{8})|(n\d{8})_\d+)\.\w+")


@dataclass
class Labels:
    """The classes of the images of a folder. wnid_of: {file name without extension: wnid}, or empty: by their names."""

    wnid_of: dict
    path: str
    names: dict

    def wnid(self, name):
        """The class of the file `name`, or None."""
        if not self.wnid_of:
            return wnid_in(name)
        return self.wnid_of.get(os.path.splitext(name)[0])


class FlatSource(Listing):
    """`folder/<image>` with a file of labels; ids are as if the images were sorted into class folders."""

    def __init__(self, folder, kind="flat"):
        self.folder, self.kind = folder, kind
        images, self.ignored = _images(folder)
        if not images:
            held = f" ({describe(self.ignored)})" if self.ignored else ""
            raise RunError(f"{folder} holds no images{held}; expected {', '.join(sorted(EXTENSIONS))}")
        labels = find_labels(folder, images[0])
        files = {}
        for name in images:
            wnid = labels.wnid(name)
            if wnid is None:
                raise RunError(f"{os.path.join(folder, name)} has no class in {labels.path}")
            files.setdefault(wnid, []).append(name)
        self._labels = labels.path
        self._absent = sorted(labels.wnid_of.keys() - {os.path.splitext(name)[0] for name in images})
        self._list(dict(sorted(files.items())), labels.names)

    def missing(self):
        absent = self._absent
        return f"{len(absent)} images of {self._labels} are missing, {absent[0]} first" if absent else None

    def place(self, sample_id):
        return os.path.join(self.folder, sample_id.partition("/")[2])


def find_labels(folder, image):
    """The Labels of the images in `folder`, one of which is `image`. RunError where there are none."""
    if wnid_in(image):
        return Labels({}, f"its name, as {image} has", synset_names(folder))
    path = nearest(folder, (TINY, SOLUTION, *tars.DEVKIT_FILES))
    name = os.path.basename(path or "")
    if name == TINY:
        return Labels(_read_tiny(path), path, synset_names(folder))
    if name == SOLUTION:
        return Labels(read_solution(path), path, synset_names(folder))
    if path:
        return Labels(tars.val_wnids(folder), path, tars.read_meta_names(folder))
    if UNSORTED.fullmatch(image):
        raise RunError(
            f"{folder} holds unsorted validation images, as ILSVRC2012_img_val.tar has them: put {DEVKIT}.tar.gz or "
            f"{SOLUTION}, which know their classes, into {os.path.dirname(folder)}"
        )
    raise RunError(
        f"{folder} holds images ({image}) but no class folders, and no {TINY} says their classes; sort them into "
        f"{os.path.join(folder, '<class>', '<image>')}"
    )


def wnid_in(name):
    """The wnid that a file's name has, or None."""
    match = NAMED.fullmatch(name)
    return match and (match[1] or match[2])


def _read_tiny(path):
    """{image without its extension: wnid}: `val_0.JPEG<tab>n03444034<tab>0 32 44 62`."""
    with reading(path), open(path, encoding="utf-8", errors="replace") as lines:
        rows = [line.split() for line in lines if line.strip()]
    if any(len(row) < 2 for row in rows):
        raise RunError(f"{path} has not an image and its class in each line")
    return {os.path.splitext(row[0])[0]: row[1] for row in rows}


def _images(folder):
    """(sorted names of the images directly in `folder`, Counter of its other entries by kind)."""
    images, left_out = [], collections.Counter()
    with reading(folder), os.scandir(folder) as entries:
        for entry in entries:
            if is_image_name(entry.name) and entry.is_file():
                images.append(entry.name)
            else:
                left_out[kind_of(entry)] += 1
    return sorted(images), left_out
