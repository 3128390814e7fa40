"""Check .beton files: header, allocation table, manifest, checksum, every image, and whether they belong together.

python tools/verify_beton.py FILE...           everything
python tools/verify_beton.py --quick FILE...   no checksum, 200 images of each file

Exit status 0: all good; 1: a file is damaged; 2: wrong usage.
"""

import argparse
import os
import sys

from tqdm import tqdm

from rn50.command import run
from rn50.data.beton import FILE_NAME, check_other_split, refuse_mixed
from rn50.data.verify import verify
from rn50.errors import RunError
from rn50.files import expanded

SHOWN = 10


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=expanded, metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="no checksum, and 200 images spread over each file")
    arguments = parser.parse_args()
    damaged, rungs = 0, {}
    for file in arguments.files:
        try:
            info, problems = verify(file, quick=arguments.quick, progress=_progress)
        except RunError as error:
            info, problems = None, [str(error)]
        for problem in problems[:SHOWN]:
            print(problem if info is None else f"{file}: {problem}", file=sys.stderr)
        if len(problems) > SHOWN:
            print(f"{file}: and {len(problems) - SHOWN} more", file=sys.stderr)
        if not problems:
            print(f"{file}: {_summary(info, arguments.quick)}")
            if named := FILE_NAME.fullmatch(os.path.basename(file)):
                rungs.setdefault((os.path.dirname(file), named[1]), []).append(info)
        damaged += bool(problems)
    if damaged:
        raise RunError(f"{damaged} of {len(arguments.files)} files damaged or misnamed; copy them again, or remove "
                       "them and run write_dataset.py")  # fmt: skip
    for infos in rungs.values():
        refuse_mixed(infos)
        check_other_split(infos[0])


def _progress(blocks):
    return tqdm(blocks, disable=not sys.stderr.isatty(), unit="block", leave=False)


def _summary(info, quick):
    checked = "structure and 200 images" if quick else "structure, checksum and every image"
    if info.manifest is None:
        checked = checked.replace(", checksum", "") + " (no manifest beside it, so no checksum)"
    return (
        f"OK: {info.num_samples} images of {info.num_classes} classes, {info.widths.max()}x{info.heights.max()} pixels "
        f"at most, median short side {info.median_short_side:.0f}; checked {checked}"
    )


if __name__ == "__main__":
    run(main)
