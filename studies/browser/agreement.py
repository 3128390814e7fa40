"""Do both pages see the same? `python studies/browser/agreement.py --model model/ --images DIR [--json FILE]`

Makes a picture of another kind of each of DIR's (JPEG of every kind, orientations, transparency, 16 bits, animations,
Display-P3, panoramas, tiny ones), has headless Chromium classify all of them on the Gradio page and on the page that
runs the network in the browser, and compares what they show (rounded to 0.001). Exit status 1 where fewer than 99 % are
within 0.01, or where two classes stand in another order although the Gradio page's are more than 0.01 apart.
"""

import argparse
import io
import json
import struct
import sys
import tempfile
import threading
from collections import Counter, defaultdict
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from selenium.webdriver.common.by import By

from rn50.command import run
from rn50.errors import RunError
from rn50.files import write_atomically
from rn50.help import HelpFormatter

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "app/browser")]
import build  # noqa: E402
import inference  # noqa: E402

from tests import tiny_model  # noqa: E402
from tests.app.visitor import find, start_browser, wait  # noqa: E402
from tests.odd_pictures import sixteen  # noqa: E402

NEAR, SHARE = 0.01, 0.99
ORIENTATION = 0x0112
PICTURE = "#rn50-picture input[type=file]"


def main():
    args = arguments()
    paths = sorted(path for path in args.images.rglob("*") if path.suffix.lower() in (".jpeg", ".jpg"))
    if not paths:
        raise RunError(f"no .jpeg in {args.images}")
    if not tiny_model.chromium():
        raise RunError("no chromium and chromedriver; run: apt-get install chromium chromium-driver")
    config = inference.read_config(args.model)
    names = inference.display_names(config["labels"])
    with tempfile.TemporaryDirectory() as folder:
        pictures = make_all(paths, Path(folder))
        visitor = start_browser()
        try:
            gradio = classify(visitor, gradio_page(args.model), pictures, names)
            browser = classify(visitor, static_page(args.model), pictures, names)
            version = visitor.capabilities["browserVersion"]
        finally:
            visitor.quit()
        figures = {
            "model": f"{config['name']}, {config['architecture']['arch']}, {config['preprocessing']['resolution']} px",
            "networks": {"gradio": config["network"], "browser": config["browser"]["network"]},
            "chromium": version,
            "kinds": dict(sorted(Counter(pictures.values()).items())),
            **compare(browser, gradio, pictures),
        }
    if args.json:
        write_atomically(args.json, json.dumps(figures, indent=1) + "\n")
    report(figures)
    if figures["within"] < SHARE or figures["other_order"] or figures["refused_by_one"]:
        raise RunError("the pages do not agree")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--model", default="model", type=Path, help="an exported model's folder (default: model)")
    parser.add_argument("--images", required=True, type=Path, help="a folder of JPEGs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    return parser.parse_args()


# --- Pictures of every kind ---------------------------------------------------------------------------------------


def encoded(picture, kind, **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def turned(orientation):
    """A JPEG that looks upright because its EXIF data say how it is turned."""
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # Pillow's names for what undoes each

    def make(picture):
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        return encoded(picture.transpose(Image.Transpose(back)), "JPEG", quality=92, exif=exif.tobytes())

    return make


def translucent(picture):
    """Fades to nothing from left to right."""
    across = np.linspace(255, 40, picture.width).astype(np.uint8)
    picture = picture.convert("RGBA")
    picture.putalpha(Image.fromarray(np.repeat(across[None], picture.height, 0)))
    return picture


def deep(picture):
    pixels = np.asarray(picture).astype(np.uint16) * 257
    return sixteen(pixels.reshape(picture.height, -1), 2)


def display_p3():
    """An ICC profile of Display P3 with a plain gamma of 2.2: as iPhones write it, but for the curve's exact shape."""

    def number(value):
        return struct.pack(">i", round(value * 65536))

    def xyz(*values):
        return b"XYZ \0\0\0\0" + b"".join(map(number, values))

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(2.2 * 256)) + b"\0\0"
    text = b"desc\0\0\0\0" + struct.pack(">I", 11) + b"Display P3\0" + bytes(78 + 1)
    tags = {
        b"desc": text,
        b"cprt": b"text\0\0\0\0CC0\0",
        b"wtpt": xyz(0.9505, 1.0, 1.0891),
        b"rXYZ": xyz(0.5151, 0.2412, -0.0011),
        b"gXYZ": xyz(0.2919, 0.6922, 0.0419),
        b"bXYZ": xyz(0.1572, 0.0666, 0.7841),
        b"rTRC": curve,
        b"gTRC": curve,
        b"bTRC": curve,
    }
    table, content, at = b"", b"", 128 + 4 + 12 * len(tags)
    for name, value in tags.items():
        table += name + struct.pack(">II", at + len(content), len(value))
        content += value + bytes(-len(value) % 4)
    head = struct.pack(">I4sI4s4s4s", at + len(content), b"test", 0x02400000, b"mntr", b"RGB ", b"XYZ ")
    head += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + number(0.9642) + number(1) + number(0.8249)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + content


P3 = display_p3()


def frames(picture):
    return {"save_all": True, "append_images": [ImageOps.mirror(ImageOps.invert(picture))] * 2, "duration": 100}


def strip_of(picture, width, height):
    return ImageOps.fit(picture, (width, height))


KINDS = {
    "as it is": None,
    "progressive": lambda p: encoded(p, "JPEG", quality=92, progressive=True),
    **{f"orientation {k}": turned(k) for k in range(2, 9)},
    "CMYK": lambda p: encoded(p.convert("CMYK"), "JPEG", quality=92),
    "gray JPEG": lambda p: encoded(p.convert("L"), "JPEG", quality=92),
    "4:4:4": lambda p: encoded(p, "JPEG", quality=95, subsampling=0),
    "4:2:2": lambda p: encoded(p, "JPEG", quality=75, subsampling=1),
    "poor JPEG": lambda p: encoded(p, "JPEG", quality=15),
    "Display P3 JPEG": lambda p: encoded(p, "JPEG", quality=92, icc_profile=P3),
    "Display P3 PNG": lambda p: encoded(p, "PNG", icc_profile=P3),
    "PNG": lambda p: encoded(p, "PNG"),
    "PNG with transparency": lambda p: encoded(translucent(p), "PNG"),
    "PNG of 256 colours": lambda p: encoded(p.quantize(256), "PNG"),
    "PNG of 16 bits": deep,
    "gray PNG": lambda p: encoded(p.convert("L"), "PNG"),
    "WebP": lambda p: encoded(p, "WEBP", quality=85),
    "WebP with transparency": lambda p: encoded(translucent(p), "WEBP", lossless=True, exact=True),
    "AVIF": lambda p: encoded(p, "AVIF", quality=80),
    "BMP": lambda p: encoded(p, "BMP"),
    "GIF": lambda p: encoded(p, "GIF"),
    "animated GIF": lambda p: encoded(p, "GIF", **frames(p)),
    "animated WebP": lambda p: encoded(p, "WEBP", lossless=True, **frames(p)),
    "animated PNG": lambda p: encoded(p, "PNG", **frames(p)),
    "wide": lambda p: encoded(strip_of(p, 3000, 250), "JPEG", quality=92),
    "very wide": lambda p: encoded(strip_of(p, 4000, 200), "PNG"),
    "tall": lambda p: encoded(strip_of(p, 200, 1400), "JPEG", quality=92),
    "tiny": lambda p: encoded(strip_of(p, 33, 21), "PNG"),
    "12 megapixels": lambda p: encoded(strip_of(p, 4000, 3000), "JPEG", quality=90),
}


def make_all(paths, folder):
    """{file: its kind}: each of `paths` in the next of KINDS, in turn."""
    made, kinds = {}, list(KINDS.items())
    for number, path in enumerate(paths):
        kind, make = kinds[number % len(kinds)]
        data = path.read_bytes()
        if make:
            data = make(Image.open(path).convert("RGB"))
        file = folder / f"{number:03d}_{kind.replace(' ', '_').replace(':', '')}.{suffix(data)}"
        file.write_bytes(data)
        made[file] = kind
    return made


def suffix(data):
    return Image.open(io.BytesIO(data)).format.lower()


# --- The pages ----------------------------------------------------------------------------------------------------


@contextmanager
def gradio_page(model):
    if not tiny_model.APP_PYTHON.exists():
        raise RunError("the Space's packages are not installed; run: bash tools/app.sh --install")
    with tempfile.TemporaryDirectory() as scratch:
        app = tiny_model.App(model.resolve(), Path(scratch))
        try:
            yield app.url
        finally:
            app.close()


@contextmanager
def static_page(model):
    server = build.server(build.site(model))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def classify(visitor, page, pictures, names):
    """{file: {class: probability} of the five that are shown, or the sentence that is shown in their place}"""
    answers = {}
    with page as url:
        visitor.get(url)
        find(visitor, PICTURE, within=60)
        for number, path in enumerate(pictures):
            if removal := visitor.find_elements(By.CSS_SELECTOR, "#rn50-picture button[aria-label='Remove Image']"):
                removal[0].click()
                wait(visitor, lambda: visitor.find_elements(By.CSS_SELECTOR, ".rn50-empty"))
            find(visitor, PICTURE).send_keys(str(path))
            answers[path] = wait(visitor, lambda number=number: answer(visitor, number, names), within=60)
            visitor.execute_script("for (const e of document.querySelectorAll('.rn50-result')) e.dataset.seen = 1")
            if sys.stderr.isatty():
                print(f"\r{url} {number + 1}/{len(pictures)}", end="", file=sys.stderr)
    return answers


def answer(visitor, number, names):
    """What is shown now and was not before."""
    shown = visitor.execute_script(
        """const alert = document.querySelector("#rn50-shown .rn50-alert");
        if (alert) { const text = alert.textContent; alert.remove(); return text; }
        const result = document.querySelector(".rn50-result:not([data-seen])");
        return result && Array.from(result.querySelectorAll(".rn50-row"), (row) => [
            row.querySelector(".rn50-name").textContent, row.querySelector(".rn50-share").textContent]);"""
    )
    if not shown or isinstance(shown, str):
        return shown
    return {names.index(name): float(share.removesuffix(" %")) / 100 for name, share in shown}


# --- What came of it ----------------------------------------------------------------------------------------------


def compare(browser, gradio, pictures):
    """How far apart the pages' probabilities are, and where their classes stand in another order."""
    gaps, order, refused = defaultdict(list), [], {}
    for path, kind in pictures.items():
        ours, theirs = browser[path], gradio[path]
        if isinstance(ours, str) or isinstance(theirs, str):
            refused[path.name] = {"browser": ours, "gradio": theirs} if ours != theirs else ours
            continue
        # of a class that only one shows, no more is known than that it is not above the other's last one
        gaps[kind].append(max(abs(share - theirs.get(k, min(theirs.values()))) for k, share in ours.items()))
        if not same_order(list(ours), theirs):
            order.append(path.name)
    every = np.concatenate(list(gaps.values()))
    return {
        "pictures": len(pictures),
        "within": float((every <= NEAR).mean()),
        "median": float(np.median(every)),
        "largest": float(every.max()),
        "largest_by_kind": {kind: float(max(values)) for kind, values in sorted(gaps.items())},
        "other_order": order,
        "refused": refused,
        "refused_by_one": [name for name, said in refused.items() if not isinstance(said, str)],
    }


def same_order(order, shares):
    """Whether the classes in `order` stand as in `shares`, {class: probability}, where those are over NEAR apart."""
    right = list(shares.items())
    return all(abs(shares.get(k, right[-1][1]) - right[place][1]) <= NEAR for place, k in enumerate(order))


def report(figures):
    networks = ", ".join(f"{page}: {name}" for page, name in figures["networks"].items())
    print(f"{figures['model']} ({networks}); {figures['pictures']} pictures of {len(figures['kinds'])} kinds")
    print(
        f"  {100 * figures['within']:.1f} % within {NEAR}, median {figures['median']:.4f}, largest "
        f"{figures['largest']:.4f}; {len(figures['other_order'])} in another order, {len(figures['refused'])} refused, "
        f"{len(figures['refused_by_one'])} by one page only"
    )


if __name__ == "__main__":
    run(main)
