"""Which form of a network the page in a browser should run.

    python studies/browser/networks.py --model MODEL --data BETONS --json studies/browser/networks.json

Makes four files of a network: float32; weights in float16 or in 8 bits, computing in float32; all in 8 bits. Of each:
megabytes, as stored and gzipped, which is how they travel; milliseconds for one picture in headless Chromium on
app/browser's ONNX Runtime Web, with one and with two WebAssembly threads, in turns; milliseconds to create a session;
and with --data what it gives for the validation images of BETONS beside float32. Time does not depend on weights: a
network of rn50_78's shape with random ones is always measured, and the exported MODEL after it.
"""

import argparse
import functools
import gzip
import http.server
import json
import shutil
import sys
import tempfile
import threading
from pathlib import Path
from statistics import median

import numpy as np
import onnx
import torch
from selenium import webdriver

from rn50.command import run
from rn50.errors import RunError
from rn50.files import expanded, expanded_path, write_atomically
from rn50.help import HelpFormatter
from rn50.machine import commit, cores, processor
from rn50.model import build_model
from rn50.publishing import export

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "app"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import inference

from tools.export_model import CALIBRATED, Data

ORT = Path(inference.__file__).parent / "browser" / "ort"
RESOLUTION, RN50_78 = 224, {"arch": "resnet50", "num_classes": 1000, "blurpool": True, "blur_maxpool": True}
FORMS = FLOAT32, FLOAT16, W8, INT8 = "float32", "float16 weights", "8-bit weights", "8 bits"
THREADS, PAGES, ROUNDS = (1, 2), 3, 12
CLOSE = 0.01  # what the pages may differ by in probability
SPEED = {
    "MB": "{megabytes:.1f}",
    "gzipped": "{gzipped:.1f}",
    "ms, 1 thread (least)": "{median_ms_1:.0f} ({least_ms_1:.0f})",
    "2 threads (least)": "{median_ms_2:.0f} ({least_ms_2:.0f})",
    "session, ms": "{create_ms:.0f}",
}
ACCURACY = {
    "top-1": "{top1:.2f} %",
    "points (95 %, paired)": "{points:+.2f} ({low:+.2f} to {high:+.2f})",
    "largest difference": "{largest:.4f}",
    "of 99 %": "{percentile_99:.4f}",
    "within 0.01": "{close:.2f} %",
    "other five": "{other_five}",
}
PAGE = """<!doctype html><script type="module">
import * as ort from "./ort/ort.wasm.bundle.min.mjs";
window.measure = async (files, resolution, threads, rounds) => {
    const {body} = await fetch("ort/ort-wasm-simd-threaded.wasm.gz");
    ort.env.wasm.wasmBinary = await new Response(body.pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
    ort.env.wasm.numThreads = threads;
    const load = async (file) => new Uint8Array(await (await fetch(encodeURIComponent(file))).arrayBuffer());
    const create = (bytes) => ort.InferenceSession.create(bytes, {executionProviders: ["wasm"]});
    await (await create(await load(files.at(-1)))).release(); // compiles the WebAssembly
    const data = new Float32Array(3 * resolution ** 2).map((_, i) => Math.sin(i * 0.37));
    const images = new ort.Tensor("float32", data, [1, 3, resolution, resolution]);
    const found = [];
    for (const file of files) {
        const [bytes, started] = [await load(file), performance.now()];
        const session = await create(bytes);
        const created = performance.now() - started;
        await session.run({images}); // the first takes twice as long as the others
        found.push({session, created, times: []});
    }
    for (const {session, times} of Array(rounds).fill(found).flat()) {
        const started = performance.now();
        await session.run({images}, ["logits", "features"]);
        times.push(performance.now() - started);
    }
    return found.map(({created, times}) => ({created, times}));
};
</script>"""


def main():
    args = arguments()
    try:
        float32 = args.model and inference.Classifier(args.model, file=export.NETWORK)
    except inference.BadModel as error:
        raise RunError(str(error)) from None
    data = Data(args.data) if args.data else None
    figures = {"machine": {"processor": processor(), "cores": cores(), "commit": commit()}, "networks": {}}
    with tempfile.TemporaryDirectory() as scratch:
        shape, model = Path(scratch) / "shape", Path(scratch) / "model"
        shape.mkdir()
        export.write_onnx(random_network(), shape / FLOAT32, resolution=RESOLUTION)
        figures["networks"]["rn50_78's shape, random weights"] = measured(shape, RESOLUTION)
        if float32:
            model.mkdir()
            shutil.copy(args.model / "config.json", model)
            shutil.copy(args.model / export.NETWORK, model / FLOAT32)
            figures["networks"][float32.config["name"]] = measured(model, float32.resolution, data)
    if args.json:
        write_atomically(args.json, json.dumps(figures, indent=1) + "\n")
    report(figures)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--model", type=expanded_path, help="folder of an exported model")
    parser.add_argument("--data", type=expanded, metavar="BETONS", help="folder of the .beton files it was trained on")
    parser.add_argument("--json", type=expanded_path, metavar="FILE", help="write the figures there")
    return parser.parse_args()


def random_network():
    """Of rn50_78's shape, with BatchNorm's statistics of noise: else the activations would grow from layer to layer."""
    torch.manual_seed(0)
    network = build_model(**RN50_78)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        network.train()(torch.randn(16, 3, RESOLUTION, RESOLUTION))
    return network.eval()


def measured(folder, resolution, data=None):
    """{form: its figures} of the network folder/FLOAT32, beside which the others are put. No data: 8 bits see noise."""
    calibration = np.random.default_rng(0).normal(size=(2, 8, 3, resolution, resolution)).astype(np.float32)
    if data:
        prepare = inference.Classifier(folder, file=FLOAT32).prepare
        calibration = [batch for batch, _ in data.batches("train", CALIBRATED, prepare)]
    write_float16(folder / FLOAT32, folder / FLOAT16)
    export.write_w8(folder / FLOAT32, folder / W8)
    export.write_int8(folder / FLOAT32, folder / INT8, calibration)
    found, judged = speeds(folder, resolution), accuracies(folder, data) if data else {}
    return {form: {"resolution": resolution} | found[form] | judged.get(form, {}) for form in FORMS}


def write_float16(source, path):
    """The network of `source` with its weights stored in float16, and cast to float32 before they are used."""
    model = onnx.load(source)
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            name, values = tensor.name, onnx.numpy_helper.to_array(tensor)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float16), f"{name}_float16"))
            cast = onnx.helper.make_node("Cast", [tensor.name], [name], to=onnx.TensorProto.FLOAT)
            model.graph.node.insert(0, cast)
    onnx.save(model, path)


def speeds(folder, resolution):
    """{form: megabytes and milliseconds}."""
    found = {}
    for form in FORMS:
        data = (folder / form).read_bytes()
        found[form] = {"megabytes": len(data) / 1e6, "gzipped": len(gzip.compress(data, 6)) / 1e6}
    (folder / "index.html").write_text(PAGE)
    (folder / "ort").symlink_to(ORT)
    for threads in THREADS:
        pages = [in_chromium(folder, resolution, threads) for _ in range(PAGES)]
        for form, *seen in zip(FORMS, *pages, strict=True):
            times = [time for page in seen for time in page["times"]]
            found[form] |= {f"median_ms_{threads}": median(times), f"least_ms_{threads}": min(times)}
            found[form].setdefault("create_ms", median(page["created"] for page in seen))
    return found


def in_chromium(folder, resolution, threads):
    """What `measure` of a fresh page gives: {created, times} of each form, in milliseconds."""
    programs = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not all(programs):
        raise RunError("no chromium and chromedriver; run: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(flag)
    served = functools.partial(Isolated, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), served) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with webdriver.Chrome(options=options, service=webdriver.ChromeService(programs[1])) as driver:
            driver.set_script_timeout(300)
            driver.get(f"http://127.0.0.1:{server.server_port}/index.html")
            script = "const done = arguments[4]; measure(...arguments).then(done, (error) => done(String(error)));"
            answer = driver.execute_async_script(script, FORMS, resolution, threads, ROUNDS)
        server.shutdown()
    if isinstance(answer, str):
        raise RunError(f"Chromium: {answer}")
    return answer


class Isolated(http.server.SimpleHTTPRequestHandler):
    def end_headers(self):  # what threads need
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()

    def log_message(self, *_):
        pass


def accuracies(folder, data):
    """{form: what it gives for the validation images beside float32}, on ONNX Runtime for Python."""
    classifiers = {form: inference.Classifier(folder, file=form) for form in FORMS}
    given, labels = {form: [] for form in FORMS}, []
    for batch, truth in data.batches("val", sys.maxsize, classifiers[FLOAT32].prepare):
        labels.append(truth)
        for form, classifier in classifiers.items():
            given[form].append(classifier.probabilities(classifier.run(batch)[0]))
    expected, labels = np.concatenate(given[FLOAT32]), np.concatenate(labels)
    return {form: beside(expected, np.concatenate(batches), labels) for form, batches in given.items()}


def beside(expected, other, labels):
    """How probabilities [N, classes] of another form of a network differ from those that are `expected`."""
    apart = np.abs(other - expected).max(1)
    right, other_right = expected.argmax(1) == labels, other.argmax(1) == labels
    best = np.argsort(-expected, axis=1, kind="stable")[:, :5]
    ahead = np.take_along_axis(expected, best, 1)[:, :, None] - expected[:, None] > CLOSE
    overtaken = np.take_along_axis(other, best, 1)[:, :, None] <= other[:, None]
    return {
        "images": len(labels),
        "top1": 100 * float(other_right.mean()),
        **dict(zip(("points", "low", "high"), export.paired_difference(right, other_right), strict=True)),
        "largest": float(apart.max()),
        "percentile_99": float(np.quantile(apart, 0.99)),
        "close": 100 * float((apart <= CLOSE).mean()),
        "other_five": int((ahead & overtaken).any((1, 2)).sum()),
    }


def report(figures):
    for name, forms in figures["networks"].items():
        print(f"\n{name}, {forms[FLOAT32]['resolution']} px")
        for columns in (SPEED, ACCURACY) if "top1" in forms[FLOAT32] else (SPEED,):
            print("\n| |", " | ".join(columns), "|")
            print("|---" * (1 + len(columns)) + "|")
            for form, found in forms.items():
                print(f"| {form} |", " | ".join(cell.format(**found) for cell in columns.values()), "|")


if __name__ == "__main__":
    run(main)
