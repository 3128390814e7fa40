"""How long a visitor of the page in the browser waits.

    python studies/browser/first_answer.py --model model/ --images DIR [--json FILE]

The network has rn50_78's shape with random weights (time does not depend on them); everything else is MODEL's. Headless
Chromium opens the page and is given a picture at once: the time from the address to the answer, with nothing in its
cache and with all. Then milliseconds a picture, with one thread and, where the page is isolated, with several; a
hundred pictures, with the longest time for which the page did not answer; and a photograph of 50 megapixels, with the
memory that all of Chromium's processes take.
"""

import argparse
import json
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

import numpy as np
from networks import RESOLUTION, RN50_78, random_network
from PIL import Image, ImageOps
from selenium.webdriver.common.by import By

from rn50.command import run
from rn50.errors import RunError
from rn50.files import write_atomically
from rn50.help import HelpFormatter
from rn50.machine import commit, cores, processor
from rn50.publishing import export

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "app/browser")]
import build  # noqa: E402
import inference  # noqa: E402

from tests import tiny_model  # noqa: E402
from tests.app.visitor import find, start_browser, tab, wait  # noqa: E402

VISITS, PICTURES = 5, 100
PICTURE = "#rn50-picture input[type=file]"


def main():
    args = arguments()
    images = args.images.resolve().rglob("*")
    paths = sorted(path for path in images if path.suffix.lower() in (".jpeg", ".jpg"))[:PICTURES]
    if not paths:
        raise RunError(f"no .jpeg in {args.images}")
    if not tiny_model.chromium():
        raise RunError("no chromium and chromedriver; run: apt-get install chromium chromium-driver")
    figures = {"machine": {"processor": processor(), "cores": cores(), "commit": commit()}}
    with tempfile.TemporaryDirectory() as folder:
        model, large = Path(folder) / "model", Path(folder) / "large.jpg"
        make_model(args.model, model)
        ImageOps.fit(Image.open(paths[0]).convert("RGB"), (8660, 5774)).save(large, quality=90)
        figures["large"] = f"{8660 * 5774 / 1e6:.0f} megapixels, {large.stat().st_size / 1e6:.0f} MB"
        for network in (export.NETWORK_INT8, export.NETWORK_W8):
            config = json.loads((model / "config.json").read_text())
            (model / "config.json").write_text(json.dumps(config | {"browser": {"network": network}}))
            files = build.site(model)
            figures[network] = {"megabytes": first_visit_bytes(files) / 1e6}
            for name, isolated in (("one thread", False), ("isolated", True)):
                figures[network][name] = visit(files, isolated, paths, large)
                print(f"{network}, {name}: {json.dumps(figures[network][name])}", flush=True)
    if args.json:
        write_atomically(args.json, json.dumps(figures, indent=1) + "\n")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--model", default="model", type=Path, help="an exported model's folder (default: model)")
    parser.add_argument("--images", required=True, type=Path, help="a folder of JPEGs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    return parser.parse_args()


def make_model(source, folder):
    """A copy of the exported model `source` with a random network of rn50_78's shape in its place."""
    folder.mkdir()
    config = inference.read_config(source)
    shutil.copy(source / "README.md", folder)
    labels = [{"wnid": f"n{k:08d}", "name": f"class {k}"} for k in range(RN50_78["num_classes"])]
    config |= {"architecture": RN50_78, "labels": labels, "examples": []}
    config["preprocessing"] |= {"resolution": RESOLUTION, "crop_ratio": 0.875}
    (folder / "config.json").write_text(json.dumps(config))
    export.write_onnx(random_network(), folder / export.NETWORK, resolution=RESOLUTION)
    calibration = [np.random.default_rng(0).standard_normal((4, 3, RESOLUTION, RESOLUTION)).astype(np.float32)]
    export.write_int8(folder / export.NETWORK, folder / export.NETWORK_INT8, calibration)
    export.write_w8(folder / export.NETWORK, folder / export.NETWORK_W8)


def first_visit_bytes(files):
    """What a first visit downloads: all but the card and what graphics processors run on."""
    left_out = (*build.RUNTIMES["webgpu"], "README.md", "ort/LICENSE")
    return sum(len(build.content_of(files[name])) for name in files if name not in left_out)


def visit(files, isolated, paths, large):
    server = build.server(files)
    if not isolated:
        plain = server.RequestHandlerClass.send_header

        def send_header(handler, name, value):
            if not name.startswith("cross-origin"):
                plain(handler, name, value)

        server.RequestHandlerClass.send_header = send_header
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    browser = start_browser("--disable-features=BackForwardCache")  # in which earlier visits would take memory
    try:
        cold = first_answer(browser, url, paths[0])
        browser.execute_async_script("navigator.serviceWorker.ready.then(arguments[0])")
        warm = [first_answer(browser, url, paths[0]) for _ in range(VISITS)]
        took = [milliseconds(browser, path) for path in paths[:20]]
        batch = all_at_once(browser, paths)
        before = megabytes_of(browser)
        peak, large_ms = watch_large(browser, large)
    finally:
        browser.quit()
        server.shutdown()
    decoding, network = (median(times) for times in zip(*took, strict=True))
    return {
        "first answer, empty cache, s": round(cold, 2),
        "first answer, warm cache, s": round(median(warm), 2),
        "decoding, ms": round(decoding, 1),
        "network, ms": round(network, 1),
        **batch,
        "large: decoding, ms": round(large_ms[0]),
        "large: network, ms": round(large_ms[1]),
        "large: memory before, MB": round(before),
        "large: memory at most, MB": round(peak),
    }


def first_answer(browser, url, path):
    """Seconds from opening the page to the answer to a picture that it is given at once."""
    browser.get("about:blank")
    started = time.perf_counter()
    browser.get(url)
    find(browser, PICTURE).send_keys(str(path))
    find(browser, ".rn50-best", within=60)
    return time.perf_counter() - started


def milliseconds(browser, path):
    """(decoding, network) as the page says them."""
    browser.execute_script("for (const e of document.querySelectorAll('.rn50-latency')) e.remove()")
    find(browser, PICTURE).send_keys(str(path))
    words = find(browser, ".rn50-latency", within=60).text.replace(",", "").split()
    return float(words[1]), float(words[4])


def all_at_once(browser, paths):
    tab(browser, "Batch")
    browser.execute_script(
        """window.longest = 0;
        let before = performance.now();
        setInterval(() => {
            window.longest = Math.max(window.longest, performance.now() - before);
            before = performance.now();
        }, 10);"""
    )
    started = time.perf_counter()
    find(browser, "#rn50-pictures input[type=file]").send_keys("\n".join(str(path) for path in paths))
    wait(browser, lambda: browser.find_element(By.ID, "rn50-count").text == f"{len(paths)} pictures", within=300)
    seconds, longest = time.perf_counter() - started, browser.execute_script("return window.longest")
    tab(browser, "Classify")
    return {f"{len(paths)} pictures, s": round(seconds, 1), "page held up at most, ms": round(longest)}


def watch_large(browser, large):
    """(megabytes of all of Chromium's processes at most, (decoding, network) milliseconds) of one photograph."""
    most, done = [0.0], threading.Event()

    def watch():
        while not done.wait(0.02):
            most[0] = max(most[0], megabytes_of(browser))

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        taken = milliseconds(browser, large)
    finally:
        done.set()
        watching.join()
    return most[0], taken


def megabytes_of(browser):
    """Proportional memory of chromedriver's descendants."""
    children = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, parent = int(stat.parent.name), int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(pid)
    todo, total = [browser.service.process.pid], 0
    while todo:
        pid = todo.pop()
        todo += children.get(pid, [])
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1000


if __name__ == "__main__":
    run(main)
