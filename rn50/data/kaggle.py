"""ImageNet-1k as Kaggle has it: training folders by class, flat validation images, and a table with their wnids."""

import csv
import os

from rn50.data.imagenet import KAGGLE, WNID
from rn50.data.listing import ImageFolderSource, Listing, has_class_folders, is_image_name
from rn50.errors import RunError


class KaggleTrain(ImageFolderSource):
    """ILSVRC/Data/CLS-LOC/train/<wnid>/<image>, and val where someone has put its images into such folders."""

    kind = "kaggle"

    def __init__(self, root, split):
        self._list_file = os.path.join(str(root), "ILSVRC", "ImageSets", "CLS-LOC", f"{split}_cls.txt")
        self._scan(os.path.join(str(root), KAGGLE, split), _kaggle_names(root))

    def missing(self):
        if not os.path.exists(self._list_file):
            return None
        with open(self._list_file, encoding="utf-8") as lines:
            listed = {f"{line.split()[0]}.JPEG" for line in lines if line.strip()}
        absent = sorted(listed - {self.item(i)[0] for i in range(len(self))})
        return (
            f"{len(absent)} of {len(listed)} images in {self._list_file} are missing, {absent[0]} first"
            if absent
            else None
        )


class KaggleVal(Listing):
    """ILSVRC/Data/CLS-LOC/val/<image>, with the classes of LOC_val_solution.csv."""

    kind = "kaggle"

    def __init__(self, root, split):
        self.folder = os.path.join(str(root), KAGGLE, split)
        wnid_of = _kaggle_solution(root)
        try:
            entries = sorted(os.listdir(self.folder))
        except OSError as error:
            raise RunError(f"cannot read {self.folder}: {error.strerror}") from None
        images = [name for name in entries if is_image_name(name)]
        self.ignored = len(entries) - len(images)
        files = {}
        for name in images:
            wnid = wnid_of.pop(os.path.splitext(name)[0], None)
            if wnid is None:
                raise RunError(f"{os.path.join(self.folder, name)} has no class in LOC_val_solution.csv")
            files.setdefault(wnid, []).append(name)
        if not files:
            raise RunError(f"{self.folder} holds no images")
        self._absent = sorted(wnid_of)
        self._list(dict(sorted(files.items())), _kaggle_names(root))

    def missing(self):
        absent = self._absent
        return f"{len(absent)} images of LOC_val_solution.csv are missing, {absent[0]} first" if absent else None

    def read(self, i):
        """The file's bytes; OSError where it cannot be read."""
        with open(os.path.join(self.folder, self.item(i)[0].partition("/")[2]), "rb") as handle:
            return handle.read()


def kaggle_classes(root, split):
    if split == "val" and not val_by_class(root):
        return set(_kaggle_solution(root).values())
    folder = os.path.join(str(root), KAGGLE, split)
    return {name for name in os.listdir(folder) if WNID.fullmatch(name)} if os.path.isdir(folder) else None


def val_by_class(root):
    """Whether someone has put the validation images into class folders."""
    folder = os.path.join(str(root), KAGGLE, "val")
    return os.path.isdir(folder) and has_class_folders(folder)


def _kaggle_solution(root):
    path = os.path.join(str(root), "LOC_val_solution.csv")
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return {row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(file)}
    except OSError as error:
        raise RunError(f"the labels of Kaggle's validation images are in {path}: {error.strerror}") from None
    except (KeyError, IndexError, TypeError, AttributeError):
        raise RunError(f"{path} has no columns ImageId and PredictionString (`n01440764 103 20 422 433`)") from None


def _kaggle_names(root):
    path = os.path.join(str(root), "LOC_synset_mapping.txt")
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8") as lines:
        return dict(line.strip().split(" ", 1) for line in lines if " " in line)
