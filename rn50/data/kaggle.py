"""ImageNet-1k as Kaggle has it: training folders by class, and tables with the wnids of validation images and names."""

import csv
import os

from rn50.data.listing import ImageFolderSource, nearest
from rn50.errors import RunError

SOLUTION = "LOC_val_solution.csv"
# Kaggle's and tiny-imagenet's: `n01440764 tench, Tinca tinca`, with a space or a tab.
SYNSETS = ("LOC_synset_mapping.txt", "words.txt")


class KaggleTrain(ImageFolderSource):
    """ILSVRC/Data/CLS-LOC/train/<wnid>/<image>, and val where someone has put its images into such folders."""

    kind = "kaggle"

    def __init__(self, root, folder, split):
        self._list_file = os.path.join(root, "ILSVRC", "ImageSets", "CLS-LOC", f"{split}_cls.txt")
        super().__init__(folder, synset_names(folder))

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


def read_solution(path):
    """{image without its extension: wnid} of a LOC_val_solution.csv."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            return {row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(file)}
    except OSError as error:
        raise RunError(f"the labels of Kaggle's validation images are in {path}: {error.strerror}") from None
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, csv.Error):
        raise RunError(f"{path} has no columns ImageId and PredictionString (`n01440764 103 20 422 433`)") from None


def synset_names(folder):
    """{wnid: its synonyms} of the table that lies in `folder` or above it; empty where there is none."""
    path = nearest(folder, SYNSETS)
    if not path:
        return {}
    with open(path, encoding="utf-8", errors="replace") as lines:
        return dict(line.strip().split(None, 1) for line in lines if len(line.split()) > 1)
