"""train_imagenet.py with one thing otherwise that no recipe asks for, because nothing has shown that it pays.

python studies/proxy_study/variants.py alternating_flip --config-file=...
"""

import runpy
import sys
from pathlib import Path

from rn50 import schedules
from rn50.data import decode
from rn50.seeded import CROPS, uniforms

SCRIPT = Path(__file__).resolve().parents[2] / "train_imagenet.py"


def alternating_flip():
    """Each image is mirrored in every other epoch, at random in the first (Jordan 2024, arXiv 2404.00498)."""
    random_crops = decode.random_crops

    def alternating(widths, heights, samples, *, seed, epoch, **options):
        crops = random_crops(widths, heights, samples, seed=seed, epoch=epoch, **options)
        first = uniforms(samples, 1, seed=seed, epoch=0, purpose=CROPS)[:, 0] < 0.5
        crops["flip"] = first ^ bool(epoch % 2)
        return crops

    decode.random_crops = alternating


def interleaved():
    """Start and end size in turns, the end size last in an even number of epochs (arXiv 2112.00954 draws them)."""
    schedules.resolution = lambda epoch, *, start, end, **ramp: end if epoch % 2 else start


VARIANTS = {variant.__name__: variant for variant in (alternating_flip, interleaved)}

if __name__ == "__main__":
    if not VARIANTS.keys() & set(sys.argv[1:2]):
        sys.exit(__doc__ + f"\nThere are {', '.join(VARIANTS)}.")
    VARIANTS[sys.argv[1]]()
    sys.argv = [str(SCRIPT), *sys.argv[2:]]
    runpy.run_path(sys.argv[0], run_name="__main__")
