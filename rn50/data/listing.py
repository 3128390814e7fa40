"""The samples of one split in a fixed order: by class, then by file name. An ImageFolder tree is one."""

import collections
import hashlib
import os

import numpy as np

from rn50.data.imagenet import IMAGENETTE_NAMES, expected_forms, imagenet_names, is_imagenet
from rn50.errors import RunError

EXTENSIONS = {".jpeg", ".jpg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}


class Listing:
    """The samples of one split by class and then by file name; labels are positions among the sorted classes.

    Every source has `kind`, `folder` (what to show a person), `classes` (a list of {wnid, name} in label order),
    `ignored` (files left out because they are no images), `len()`, `item(i) -> (id, label)`, `read(i) -> bytes` and
    `digest()`, and can be pickled. An id names the sample within the split on every machine and in every form.
    """

    ignored = 0
    staging_bytes = 0  # what `stage` writes

    def _list(self, files, names=None):
        """files: {wnid: sorted file names}, in label order. names: {wnid: name for people}, or part of it."""
        names = {**unique_names(names or {}), **(imagenet_names(files) if is_imagenet(files) else IMAGENETTE_NAMES)}
        self.classes = [{"wnid": wnid, "name": names.get(wnid, wnid)} for wnid in files]
        self._first = np.concatenate([[0], np.cumsum([len(listed) for listed in files.values()])])
        # A million Python strings take 100 MB in every worker and seconds to unpickle; one byte string takes 25 MB.
        encoded = [os.fsencode(name) for listed in files.values() for name in listed]
        self._names = b"".join(encoded)
        self._ends = np.cumsum([0] + [len(name) for name in encoded])

    def __len__(self):
        return len(self._ends) - 1

    def item(self, i):
        """(id, label) of sample `i`; the id is `<class>/<file name>`."""
        label = int(np.searchsorted(self._first, i, side="right")) - 1
        name = os.fsdecode(self._names[self._ends[i] : self._ends[i + 1]])
        return f"{self.classes[label]['wnid']}/{name}", label

    def find(self, label, name):
        """Index of the sample with this label and file name, or None."""
        low, high = int(self._first[label]), int(self._first[label + 1])
        names = [self._names[self._ends[i] : self._ends[i + 1]] for i in range(low, high)]
        return low + names.index(os.fsencode(name)) if os.fsencode(name) in names else None

    def digest(self):
        """sha256 over names, not contents: replacing one bad file must not throw away a half-written conversion."""
        listing = hashlib.sha256("\0".join(c["wnid"] for c in self.classes).encode(errors="surrogateescape"))
        for part in (self._first.tobytes(), self._names, self._ends.tobytes()):
            listing.update(part)
        return listing.hexdigest()

    def missing(self):
        """What the source's own list of images has and the source has not, as text; None where nothing is known."""
        return None

    def stage(self, folder, say):
        """Make random access fast where it is not; `folder` is removed when the split is converted."""


class ImageFolderSource(Listing):
    """`root/split/<class>/<image>`, sorted by class and then by file name."""

    kind = "imagefolder"

    def __init__(self, root, split):
        self._scan(os.path.join(str(root), split))

    def _scan(self, folder, names=None):
        self.folder = folder
        class_names, self.ignored = class_folders(folder)
        files = {}
        for class_name in class_names:
            files[class_name] = self._images(class_name)
            if not files[class_name]:
                raise RunError(f"{os.path.join(folder, class_name)} holds no images; fill or remove it")
        self._list(files, names)

    def _images(self, class_name):
        files = []
        try:
            with os.scandir(os.path.join(self.folder, class_name)) as entries:
                for entry in entries:
                    if is_image_name(entry.name) and entry.is_file():
                        files.append(entry.name)
                    else:
                        self.ignored += 1
        except OSError as error:
            raise RunError(f"cannot read {error.filename}: {error.strerror}") from None
        return sorted(files)

    def read(self, i):
        """The file's bytes; OSError where it cannot be read."""
        with open(self.path(i), "rb") as handle:
            return handle.read()

    def path(self, i):
        """Where sample `i` is."""
        return os.path.join(self.folder, self.item(i)[0])


def is_image_name(name):
    return os.path.splitext(name)[1].lower() in EXTENSIONS and not name.startswith(".")


def unique_names(synonyms):
    """{wnid: first of its comma-separated synonyms}, with the wnid where another class has the same (`crane`)."""
    first = {wnid: words.split(",")[0].strip() for wnid, words in synonyms.items()}
    counts = collections.Counter(first.values())
    return {wnid: name if counts[name] == 1 else f"{name} ({wnid})" for wnid, name in first.items()}


def has_class_folders(folder):
    """Whether `folder` is the top of an ImageFolder tree."""
    with os.scandir(folder) as entries:
        return any(entry.is_dir() and not entry.name.startswith(".") for entry in entries)


def class_folders(folder):
    """(sorted names of the class folders in `folder`, number of its other entries); RunError where there are none."""
    try:
        with os.scandir(folder) as entries:
            listed = [(entry.name, entry.is_dir()) for entry in entries]
    except OSError as error:
        raise RunError(f"cannot read {folder}: {error.strerror}; {expected_forms(folder)}") from None
    names = sorted(name for name, is_folder in listed if is_folder and not name.startswith("."))
    if not names:
        raise RunError(f"{folder} holds no class folders; {expected_forms(folder)}")
    return names, len(listed) - len(names)
