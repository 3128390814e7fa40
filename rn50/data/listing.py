"""The samples of one split in a fixed order: by class, then by file name. An ImageFolder tree is one."""

import collections
import contextlib
import hashlib
import os

import numpy as np

from rn50.data.imagenet import (
    DEVKIT,
    IMAGENETTE_NAMES,
    UNSORTED,
    expected_forms,
    imagenet_names,
    is_imagenet,
    is_inner_tar_name,
)
from rn50.errors import RunError

# torchvision's, and others that Pillow reads.
EXTENSIONS = {".jpeg", ".jpg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}
EXTENSIONS |= {".gif", ".avif", ".jfif", ".jp2"}
# What macOS, Synology, Linux and Windows leave beside people's files, in lower case; and ImageNet's devkit.
NO_CLASSES = {"__macosx", "@eadir", "#recycle", "lost+found", "$recycle.bin", "system volume information"}
NO_CLASSES |= {DEVKIT.lower()}
UNPACK = 'for t in n*.tar; do mkdir -p "${t%.tar}" && tar -xf "$t" -C "${t%.tar}" && rm "$t"; done'
KINDS_SHOWN = 4


class Listing:
    """The samples of one split by class and then by file name; labels are positions among the sorted classes.

    Every source has `kind`, `folder` (what to show a person), `classes` (a list of {wnid, name} in label order),
    `ignored` ({kind of what was left out: how many}), `len()`, `item(i) -> (id, label)`, `read(i) -> bytes`,
    `place(id)` and `digest()`, and can be pickled. An id names the sample within the split on every machine and in
    every form.
    """

    ignored = collections.Counter()
    staging_bytes = 0  # what `stage` writes

    def _list(self, files, names=None):
        """files: {wnid: sorted file names}, in label order. names: {wnid: name for people}, or part of it."""
        names = {wnid: words for wnid, words in (names or {}).items() if wnid in files}
        names = {**unique_names(names), **(imagenet_names(files) if is_imagenet(files) else IMAGENETTE_NAMES)}
        self.classes = [{"wnid": wnid, "name": names.get(wnid, wnid)} for wnid in files]
        self._first = np.concatenate([[0], np.cumsum([len(listed) for listed in files.values()])])
        # A million Python strings take 100 MB in every worker and seconds to unpickle; one byte string takes 25 MB.
        encoded = [os.fsencode(name) for listed in files.values() for name in listed]
        self._names = b"".join(encoded)
        self._ends = np.cumsum([0] + [len(name) for name in encoded])

    def __len__(self):
        return len(self._ends) - 1

    def item(self, i):
        """(id, label) of sample `i`; the id is `<class>/<file name>`, or `<class>/<folders>/<file name>`."""
        label = int(np.searchsorted(self._first, i, side="right")) - 1
        name = os.fsdecode(self._names[self._ends[i] : self._ends[i + 1]])
        return f"{self.classes[label]['wnid']}/{name}", label

    def find(self, label, name):
        """Index of the sample with this label and file name, or None."""
        low, high = int(self._first[label]), int(self._first[label + 1])
        names = [self._names[self._ends[i] : self._ends[i + 1]].rpartition(b"/")[2] for i in range(low, high)]
        return low + names.index(os.fsencode(name)) if os.fsencode(name) in names else None

    def place(self, sample_id):
        """Where a person finds the sample with this id."""
        return os.path.join(self.folder, sample_id)

    def read(self, i):
        """The file's bytes; OSError where it cannot be read."""
        with open(self.place(self.item(i)[0]), "rb") as handle:
            return handle.read()

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
    """`folder/<class>/<image>`, and what lies deeper in a class's folder, as torchvision's ImageFolder takes it.

    names: {wnid: name for people}, or part of it.
    """

    kind = "imagefolder"

    def __init__(self, folder, names=None):
        self.folder = str(folder)
        class_names, self.ignored = class_folders(self.folder)
        files = {}
        for class_name in class_names:
            top, left_out = os.path.join(self.folder, class_name), collections.Counter()
            files[class_name] = images_below(top, left_out)
            if not files[class_name]:
                held = f" ({describe(left_out)})" if left_out else ""
                raise RunError(f"{top} holds no images{held}; fill or remove it")
            self.ignored += left_out
        self._list(files, names)


def images_below(top, left_out):
    """Names of the images in the folder `top` and below it, relative to it; counts the rest in `left_out` by kind.

    Folder by folder, each sorted: the order of torchvision's ImageFolder. RunError where a link leads nowhere or in a
    circle.
    """
    listed, folders = {}, [("", ())]
    while folders:
        folder, ways = folders.pop()
        here, files, inner = os.path.join(top, folder), [], []
        with reading(here), os.scandir(here) as entries:
            for entry in entries:
                if is_image_name(entry.name) and entry.is_file():
                    files.append(entry.name)
                elif not entry.name.startswith(".") and entry.is_dir() and is_class_name(entry.name):
                    inner.append((entry.name, entry.is_symlink()))
                else:
                    left_out[kind_of(entry)] += 1
        listed[folder] = [os.path.join(folder, name) for name in sorted(files)] if folder else sorted(files)
        for name, is_link in inner:
            through = _follow(os.path.join(here, name), ways) if is_link else ways
            folders.append((os.path.join(folder, name), through))
    return [name for folder in sorted(listed) for name in listed[folder]]


def _follow(link, ways):
    """`ways`, the real folders whose links led to `link`, and its own; RunError where it leads back above one."""
    ways = (*ways, os.path.realpath(os.path.dirname(link)))
    target = os.path.realpath(link)
    if any(os.path.commonpath([way, target]) == target for way in ways):
        raise RunError(f"{link} is a link to {target}, a folder above it; remove the link")
    return ways


def kind_of(entry):
    """What an entry that is left out is, for a person. RunError for a link to nothing: an image or class is missing."""
    if entry.name.startswith("."):
        return "hidden"
    if entry.is_dir():
        return "folders"
    extension = os.path.splitext(entry.name)[1].lower()
    if entry.is_symlink() and not os.path.exists(entry.path) and (not extension or is_image_name(entry.name)):
        target = os.readlink(entry.path)
        raise RunError(f"{entry.path} is a link to {target}, which is not there; restore that or remove the link")
    return extension or "without extension"


def describe(left_out):
    """`{kind: count}` as `12 .txt, 3 .heic`."""
    kinds = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    shown = ", ".join(f"{count} {kind}" for kind, count in kinds[:KINDS_SHOWN])
    return shown + (", ..." if len(kinds) > KINDS_SHOWN else "")


def nearest(folder, names):
    """Path of the first of the files `names` in `folder`, or in the nearest of the four folders above it; or None."""
    folder = os.path.abspath(folder)
    for _ in range(5):
        for name in names:
            if os.path.isfile(path := os.path.join(folder, name)):
                return path
        folder = os.path.dirname(folder)
    return None


def is_image_name(name):
    return os.path.splitext(name)[1].lower() in EXTENSIONS and not name.startswith(".")


def is_class_name(name):
    """Whether a folder of this name may be a class: not hidden, and nothing that a system leaves beside files."""
    return not name.startswith(".") and name.lower() not in NO_CLASSES


def unique_names(synonyms):
    """{wnid: first of its comma-separated synonyms}, with the wnid where another class has the same (`crane`)."""
    first = {wnid: words.split(",")[0].strip() for wnid, words in synonyms.items()}
    counts = collections.Counter(first.values())
    return {wnid: name if counts[name] == 1 else f"{name} ({wnid})" for wnid, name in first.items()}


def subfolders(folder):
    """Sorted names of the folders in `folder` that may be classes; empty where there is no such folder."""
    if not os.path.isdir(folder):
        return []
    with reading(folder), os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if is_class_name(entry.name) and entry.is_dir())


def first_image(folder):
    """Name of an image that lies directly in `folder`, or None."""
    if not os.path.isdir(folder):
        return None
    with reading(folder), os.scandir(folder) as entries:
        return next((entry.name for entry in entries if is_image_name(entry.name) and entry.is_file()), None)


def class_folders(folder):
    """(sorted names of the class folders in `folder`, Counter of its other entries by kind).

    RunError where there are none, and where some classes are not unpacked or some images not sorted yet.
    """
    names, left_out, tars = [], collections.Counter(), []
    with reading(folder, f"; {expected_forms(folder)}"), os.scandir(folder) as entries:
        for entry in entries:
            if is_class_name(entry.name) and entry.is_dir():
                names.append(entry.name)
            elif UNSORTED.fullmatch(entry.name):
                raise RunError(
                    f"{entry.path} lies beside the class folders: finish sorting the images into them, or move them "
                    "all into one folder of their own"
                )
            else:
                tars += [entry.name.removesuffix(".tar")] * is_inner_tar_name(entry.name)
                left_out["in no class's folder" if is_image_name(entry.name) else kind_of(entry)] += 1
    if not names:
        held = f" ({describe(left_out)})" if left_out else ""
        raise RunError(f"{folder} holds no class folders{held}; {expected_forms(folder)}")
    packed = sorted(set(tars) - set(names))
    if packed:
        raise RunError(
            f"{os.path.join(folder, packed[0])}.tar is not unpacked, as other classes are: run, there, {UNPACK}"
        )
    return sorted(names), left_out


@contextlib.contextmanager
def reading(place, advice=""):
    """Errors of the operating system as RunError, with the very file or folder where they say it."""
    try:
        yield
    except OSError as error:
        where = error.filename or place
        link = f", a link to {os.readlink(where)}" if os.path.islink(where) else ""
        raise RunError(f"cannot read {where}{link}: {error.strerror}{advice}") from None
