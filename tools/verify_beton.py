"""Check .beton files: header, allocation table, manifest, checksum, every image, and whether they belong together.

    python tools/verify_beton.py /data/betons      all .beton files of a folder
    python tools/verify_beton.py --quick FILE...   no checksum, 200 images a file

Exit status 0: all good; 1: a file is damaged, unfinished, misnamed, or not of the same images as another; 2: a file is
missing or not a .beton file, and nothing is worse.
"""

import argparse
import os
import sys
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from rn50.command import run
from rn50.data.beton import FILE_NAME, NotABeton, NotThere, check_other_split, refuse_mixed
from rn50.data.verify import verify
from rn50.errors import RunError, UsageError
from rn50.files import expanded
from rn50.help import HelpFormatter

SHOWN = 10
# Outcomes of a file, worst first.
DAMAGED, UNFINISHED, MISSING, STRANGE = "damaged or misnamed", "unfinished", "missing", "not a .beton file"
REMEDY = {
    DAMAGED: "copy them again, or remove them and run write_dataset.py",
    UNFINISHED: "run the same write_dataset.py command again",
    MISSING: "give the folder or files that write_dataset.py wrote",
    STRANGE: "give the folder or files that write_dataset.py wrote",
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "files", nargs="+", type=expanded, metavar="FILE", help="a .beton file, or a folder: all that are in it"
    )
    parser.add_argument("--quick", action="store_true", help="no checksum, and 200 images spread over each file")
    arguments = parser.parse_args()
    files = [file for given in arguments.files for file in _files(given)]
    outcomes, rungs = Counter(), {}
    for file in files:
        outcome, info = _check(file, arguments.quick)
        outcomes[outcome] += 1
        named = FILE_NAME.fullmatch(os.path.basename(file))
        if info and named:
            rungs.setdefault((os.path.dirname(file), named[1]), []).append(info)
    if len(files) > 1:
        print(
            f"{len(files)} files: {', '.join(f'{count} {outcome}' for outcome, count in outcomes.items())}", flush=True
        )
    for outcome, remedy in REMEDY.items():
        if outcomes[outcome]:
            kind = RunError if outcome in (DAMAGED, UNFINISHED) else UsageError
            raise kind(f"{outcome}: {outcomes[outcome]} of {len(files)} files; {remedy}")
    for infos in rungs.values():
        refuse_mixed(infos)
        check_other_split(infos[0])


def _files(given):
    """The files that an argument stands for; UsageError where it is a folder without any."""
    if not os.path.isdir(given):
        return [given]
    found = sorted(str(path) for kind in ("*.beton", "*.beton.partial") for path in Path(given).glob(kind))
    if not found:
        raise UsageError(f"no .beton file in the folder {given}; {REMEDY[MISSING]}")
    return found


def _check(file, quick):
    """(outcome, BetonInfo where it is good) of a file; prints what there is to say."""
    if file.endswith(".partial"):
        return _say(UNFINISHED, f"{file} is unfinished")
    try:
        info, problems = verify(file, quick=quick, progress=_progress)
    except NotThere as error:
        return _say(MISSING, str(error))
    except NotABeton as error:
        return _say(STRANGE, str(error))
    except RunError as error:
        return _say(DAMAGED, str(error))
    if problems:
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        return _say(DAMAGED, *(f"{file}: {problem}" for problem in problems[:SHOWN] + more))
    print(f"{file}: {_summary(info, quick)}", flush=True)
    return "good", info


def _say(outcome, *lines):
    print("\n".join(lines), file=sys.stderr, flush=True)
    return outcome, None


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
