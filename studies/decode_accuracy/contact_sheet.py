"""A picture to look at for seams: random crops by our decoder, by full decode and Pillow, and their difference.

    python studies/decode_accuracy/contact_sheet.py FILE.beton --out sheet.png

Rows of three: ours, full decode + Pillow's antialiased resize, and 128 + 8 x (ours - the other). Prints the mean
absolute difference in grey levels over all crops, which is to stay under 2.
"""

import argparse

import numpy as np
from PIL import Image

from rn50.command import run
from rn50.data import beton, writer
from rn50.data.decode import RandomCropDecoder
from rn50.data.pictures import decode_image
from rn50.errors import RunError

COLUMNS = 4


def main():
    args = arguments()
    info = beton.read_info(args.file)
    if (info.modes == beton.RAW).any():
        raise RunError(f"{args.file} holds raw pixels; there is nothing to decode")
    samples = np.linspace(0, info.num_samples - 1, min(args.count, info.num_samples)).astype(np.int64)
    decoder = RandomCropDecoder(info, scale=(0.08, 1), seed=args.seed, threads=1)
    decoder.size = args.resolution
    ours = np.empty((len(samples), args.resolution, args.resolution, 3), np.uint8)
    decoder.decode(samples, ours)
    crops = decoder.crops(samples, info.widths[samples], info.heights[samples])
    stored = np.memmap(info.path, np.uint8, mode="r")
    other = np.stack(
        [
            reference(stored[info.data_ptrs[k] : info.data_ptrs[k] + info.sizes[k]].tobytes(), crop, args.resolution)
            for k, crop in zip(samples, crops, strict=True)
        ]
    )
    difference = ours.astype(np.int16) - other
    enlarged = np.clip(128 + 8 * difference, 0, 255).astype(np.uint8)
    triples = np.concatenate([ours, other, enlarged], axis=2)
    blank = np.zeros((-len(triples) % COLUMNS, *triples.shape[1:]), np.uint8)
    rows = np.concatenate([triples, blank]).reshape(-1, COLUMNS, *triples.shape[1:])
    sheet = np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)
    with writer.disk_errors(args.out):
        Image.fromarray(sheet).save(args.out)
    print(
        f"{len(samples)} crops at {args.resolution} px: mean absolute difference {np.abs(difference).mean():.2f} grey "
        f"levels, {np.abs(difference).mean(axis=(1, 2, 3)).max():.2f} in the worst crop; {args.out}"
    )


def reference(jpeg, crop, size):
    """Full decode, cropped, resized by Pillow from the crop's own pixels, mirrored: uint8 [size, size, 3]."""
    picture = Image.fromarray(decode_image(jpeg))
    box = tuple(int(crop[name]) for name in ("x0", "y0", "x1", "y1"))
    resized = np.asarray(picture.crop(box).resize((size, size), Image.Resampling.BILINEAR))
    return resized[:, ::-1] if crop["flip"] else resized


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("file", help="a .beton file of JPEGs")
    parser.add_argument("--out", required=True, help="picture to write")
    parser.add_argument("--resolution", type=int, default=160, help="px of the crops")
    parser.add_argument("--count", type=int, default=24, help="crops, spread over the file")
    parser.add_argument("--seed", type=int, default=0, help="of the crops (%(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
