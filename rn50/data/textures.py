"""A generated image set that needs no download: ten procedural textures as JPEG files in an ImageFolder tree.

Colour, contrast, brightness and lighting are drawn per image whatever its class, and every pattern has
the same tone histogram before they are applied, so a classifier has to look at structure. No class
turns into another when it is flipped horizontally, cropped or scaled.
"""

import argparse
import json
import os
import shutil
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from rn50 import errors
from rn50.command import run
from rn50.files import expanded

# Part of every tree's description, so that a tree made by older code is not taken for today's.
GENERATOR_VERSION = 2
SPLITS = ("train", "val")


def write_textures(root, train_per_class, val_per_class, seed=0):
    """Write `root/{train,val}/<class>/NNNN.jpg`: 112 to 288 px sides, RGB, JPEG quality 80 to 95.

    The tree is built beside `root` and renamed when it is complete. Returns True when it was written and
    False when `root` already holds exactly this set. Raises RunError when `root` holds anything else.
    The bytes depend on (seed, split, class, index) alone, given the same library versions and CPU family.
    """
    root = Path(root)
    description = {
        "generator_version": GENERATOR_VERSION,
        "train_per_class": train_per_class,
        "val_per_class": val_per_class,
        "seed": seed,
    }
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        if _read_description(root) == description:
            return False
        raise errors.RunError(f"{root} exists and is not this set of textures; remove it or name another folder")
    partial = root.with_name(root.name + ".partial")
    try:
        if partial.exists():
            shutil.rmtree(partial)
        for split, count in zip(SPLITS, (train_per_class, val_per_class), strict=True):
            for name in CLASSES:
                folder = partial / split / name
                folder.mkdir(parents=True)
                for index in range(count):
                    (folder / f"{index:04d}.jpg").write_bytes(jpeg_bytes(seed, split, name, index))
        (partial / "textures.json").write_text(json.dumps(description) + "\n", encoding="utf-8")
        os.replace(partial, root)
    except OSError as error:
        raise errors.RunError(f"cannot write the textures to {root}: {error.strerror or error}") from None
    return True


def jpeg_bytes(seed, split, name, index):
    """The JPEG file of image `index` of class `name`."""
    rng = _generator(seed, split, name, index)
    buffer = BytesIO()
    Image.fromarray(_draw(name, rng)).save(buffer, "JPEG", quality=int(rng.integers(80, 96)))
    return buffer.getvalue()


def draw(seed, split, name, index):
    """uint8 array (height, width, 3), RGB: the image before JPEG compression."""
    return _draw(name, _generator(seed, split, name, index))


def _generator(seed, split, name, index):
    return np.random.default_rng([seed, SPLITS.index(split), list(CLASSES).index(name), index])


def _draw(name, rng):
    height, width = _size(rng)
    x, y = _coordinates(height, width, rng)
    tone = _equalise(CLASSES[name](x, y, rng), rng).astype(np.float32)
    if rng.random() < 0.5:
        tone = 1 - tone
    hardness = float(np.exp(rng.uniform(np.log(3), np.log(16))))
    tone = 0.5 + 0.5 * np.tanh(hardness * (tone - rng.uniform(0.4, 0.6))) / float(np.tanh(hardness / 2))
    return _colour(np.clip(tone, 0, 1), rng)


def _size(rng):
    short = int(rng.integers(112, 193))
    long = int(short * rng.uniform(1, 1.5))
    return (short, long) if rng.random() < 0.4 else (long, short)


def _coordinates(height, width, rng):
    """x and y per pixel, in pattern periods, slightly rotated, sheared and warped, from a random origin.

    Both stay within 0 and 120, which `_nearest_point` relies on.
    """
    periods = rng.uniform(4, 7) / min(height, width)
    row, column = np.meshgrid(np.arange(height, dtype=np.float32), np.arange(width, dtype=np.float32), indexing="ij")
    angle, shear = np.radians(rng.uniform(-8, 8)), rng.uniform(-0.1, 0.1)
    x = float(np.cos(angle)) * column + float(shear - np.sin(angle)) * row
    y = float(np.sin(angle)) * column + float(np.cos(angle)) * row
    bend = rng.uniform(0, 0.15)
    x = periods * x + bend * _smooth_noise(height, width, 3, rng) + rng.uniform(8, 72)
    y = periods * y + bend * _smooth_noise(height, width, 3, rng) + rng.uniform(8, 72)
    return x, y


def _smooth_noise(height, width, cells, rng):
    """float32 (height, width), about unit variance, with about `cells` bumps along the short side."""
    scale = cells / min(height, width)
    grid = rng.standard_normal((int(height * scale) + 2, int(width * scale) + 2), dtype=np.float32)
    return cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)


def _equalise(field, rng):
    """Map a field to [0, 1] so that all levels are equally frequent: no class has a histogram of its own."""
    levels = np.quantile(rng.choice(field.ravel(), 4096), np.linspace(0, 1, 65))
    return np.interp(field, levels, np.linspace(0, 1, 65))


def _colour(tone, rng):
    height, width = tone.shape
    lightness = np.array([rng.uniform(20, 100), rng.uniform(150, 235), rng.uniform(20, 235)])
    dark, light, tint = np.float32(lightness[:, None] + rng.uniform(-70, 70, (3, 3)))
    image = dark + (light - dark) * tone[..., None]
    share = np.clip(rng.uniform(0, 0.12) * (1 + _smooth_noise(height, width, 2, rng)), 0, 0.4)[..., None]
    image += (tint - image) * share
    direction, depth = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.35)
    ramp = depth * np.cos(direction) * np.linspace(-1, 1, width, dtype=np.float32)
    ramp = ramp + depth * np.sin(direction) * np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    image *= 1 + ramp[..., None]
    image += rng.uniform(0, 8) * rng.standard_normal((height, width, 1), dtype=np.float32)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _horizontal_stripes(x, y, rng):
    return np.sin(2 * np.pi * y)


def _vertical_stripes(x, y, rng):
    return np.sin(2 * np.pi * x)


def _diagonal_stripes(x, y, rng):
    # Both diagonals are one class: a flip turns one into the other.
    return np.sin(np.sqrt(2) * np.pi * (x + rng.choice((-1, 1)) * y))


def _checker(x, y, rng):
    return np.sin(np.pi * x) * np.sin(np.pi * y)


def _zigzag(x, y, rng):
    along, across = (x, y) if rng.random() < 0.5 else (y, x)
    turn = rng.uniform(2, 3)
    return np.sin(2 * np.pi * (across + 0.35 * turn * np.abs(2 * ((along / turn) % 1) - 1)))


def _dots(x, y, rng):
    nearest, _ = _nearest_point(x, y, 0.4, rng)
    return -nearest


def _rings(x, y, rng):
    nearest, _ = _nearest_point(x / 3, y / 3, 0.6, rng)
    return np.cos(2 * np.pi * 3 * nearest)


def _cells(x, y, rng):
    _, shade = _nearest_point(x, y, 1.0, rng)
    return shade


def _bricks(x, y, rng):
    row = np.floor(y)
    along = x / 2 + 0.5 * (row % 2)
    across = y - row
    mortar = np.minimum(np.minimum(across, 1 - across), 2 * np.minimum(along % 1, 1 - along % 1))
    shade = rng.random((97, 97))[row.astype(int) % 97, np.floor(along).astype(int) % 97]
    return np.minimum(mortar, 0.2) / 0.2 + 0.5 * shade


def _clouds(x, y, rng):
    height, width = x.shape
    # Large and soft: with finer octaves, and hardened, they would look like `_cells`.
    return sum(_smooth_noise(height, width, 2 * 2**octave, rng) / 3**octave for octave in range(3))


def _nearest_point(x, y, jitter, rng):
    """Distance to the nearest of a jittered unit grid of points, and a uniform number that names the point."""
    left, top = np.floor(x), np.floor(y)
    x, y = x - left, y - top
    cell = 128 * top.astype(np.int32) + left.astype(np.int32) + 129
    points_x, points_y = 0.5 + jitter * (rng.random((2, 128 * 128), dtype=np.float32) - 0.5)
    shades = rng.random(128 * 128, dtype=np.float32)
    best, owner = np.full(x.shape, np.inf, np.float32), cell
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            other = cell + (128 * down + right)
            squared = (points_x[other] + right - x) ** 2 + (points_y[other] + down - y) ** 2
            owner = np.where(squared < best, other, owner)
            best = np.minimum(squared, best)
    return np.sqrt(best), shades[owner]


CLASSES = {
    "bricks": _bricks,
    "cells": _cells,
    "checker": _checker,
    "clouds": _clouds,
    "diagonal_stripes": _diagonal_stripes,
    "dots": _dots,
    "horizontal_stripes": _horizontal_stripes,
    "rings": _rings,
    "vertical_stripes": _vertical_stripes,
    "zigzag": _zigzag,
}


def _read_description(root):
    try:
        return json.loads((root / "textures.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m rn50.data.textures", description=__doc__.partition("\n\n")[0])
    parser.add_argument("folder", type=expanded, help="written as FOLDER/{train,val}/<class>/NNNN.jpg")
    parser.add_argument("--train-per-class", type=int, default=200, help="training images of each class (%(default)s)")
    parser.add_argument("--val-per-class", type=int, default=100, help="validation images of each class (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another one makes other images (%(default)s)")
    args = parser.parse_args(argv)
    if min(args.train_per_class, args.val_per_class) < 1 or args.seed < 0:
        raise errors.UsageError("images per class must be at least 1, and the seed at least 0")
    written = write_textures(args.folder, args.train_per_class, args.val_per_class, args.seed)
    total = len(CLASSES) * (args.train_per_class + args.val_per_class)
    print(f"{args.folder}: {total} images, {'written' if written else 'there already'}")


if __name__ == "__main__":
    run(main)
