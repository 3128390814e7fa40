"""The model in the visitor's own browser: the files of a static Space, from an exported model and app/browser/.

MODEL_DIR=model python app/browser/build.py      serves them on this machine, as tools/app.sh MODEL --browser does
"""

import gzip
import hashlib
import html
import json
import os
import signal
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from string import Template
from urllib.parse import unquote, urlsplit

import yaml
from markdown_it import MarkdownIt

HERE = Path(__file__).resolve().parent
APP = HERE.parent
sys.path.insert(0, str(APP))
import about  # noqa: E402
import inference  # noqa: E402
import pictures  # noqa: E402

SHARED = ("page.css", "page.js")  # with the Gradio page
OWN = ("browser.css", "decode.js", "formats.js", "jpeg.js", "main.js", "network.js", "resize.js", "sw.js", "theme.js")
OWN += ("worker.js", "ort/LICENSE")
# ONNX Runtime Web by what it runs on: its module and its compressed WebAssembly.
RUNTIMES = {
    "wasm": ("ort/ort.wasm.bundle.min.mjs", "ort/ort-wasm-simd-threaded.wasm.gz"),
    "webgpu": ("ort/ort.jspi.bundle.min.mjs", "ort/ort-wasm-simd-threaded.jspi.wasm.gz"),
}
# WebGPU has no kernels for activations in 8 bits.
FOR_WEBGPU = "model_w8.onnx"
INDEX = "site.json"
TYPES = {
    ".css": "text/css",
    ".gz": "application/gzip",
    ".html": "text/html",
    ".jpg": "image/jpeg",
    ".js": "text/javascript",
    ".json": "application/json",
    ".mjs": "text/javascript",
}
HOST, PORT = "127.0.0.1", 7860


def site(model, *, repo=None, space_url=None):
    """The files of the static Space that runs the exported model in `model`: {path: bytes or Path}.

    repo: the model's repository on the Hub, named in the card. space_url: of the Gradio Space with the same model, to
    which the page links. `site.json` lists them all. BadModel says what is wrong with the folder.
    """
    config = inference.read_config(model)
    try:
        network = config["browser"]["network"]
    except (KeyError, TypeError):
        raise inference.BadModel(f"{model} has no network for browsers; export the model again") from None
    names = inference.Classifier(model, threads=1, file=network).names
    files = {name: APP / name for name in SHARED} | {name: HERE / name for name in OWN}
    files |= {example["file"]: model / example["file"] for example in config["examples"]}
    # the same bytes for the same network, so that publishing again uploads nothing
    files[f"{network}.gz"] = gzip.compress((model / network).read_bytes(), mtime=0)
    runtimes = {where: RUNTIMES[where] for where in RUNTIMES if where == "wasm" or network == FOR_WEBGPU}
    files |= {name: HERE / name for pair in runtimes.values() for name in pair}
    files["index.html"] = page(config, names, model, repo, space_url).encode()
    files["README.md"] = front_matter(config, repo)
    listed = {
        "name": config["name"],
        "preprocessing": config["preprocessing"],
        "probabilities": config["probabilities"],
        "kinds": [[pattern.pattern.decode("latin-1"), words] for pattern, words in pictures.KINDS],
        "network": checked(f"{network}.gz", files[f"{network}.gz"]),
        "runtimes": {
            where: {"module": module, "wasm": checked(wasm, files[wasm])} for where, (module, wasm) in runtimes.items()
        },
        "files": sorted({*files, INDEX}),
    }
    files[INDEX] = json.dumps(listed, indent=1).encode() + b"\n"
    return files


def content_of(file):
    return file if isinstance(file, bytes) else file.read_bytes()


def checked(path, file):
    """What the page needs to know of a large file, to show how much has come and whether it is whole."""
    content = content_of(file)
    return {"path": path, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def page(config, names, model, repo, space_url):
    """index.html, the template beside this file, filled in."""
    link = ""
    if space_url:
        # in a new tab: a Space is shown in a frame, in which the Hub's own pages do not open
        words = "The same on a server, with an API for programs"
        link = f' <a href="{html.escape(space_url)}" target="_blank">{words}</a>.'
    examples = "".join(
        f'<button type="button" class="rn50-example"><img src="{html.escape(example["file"])}" alt="" loading="lazy">'
        f"{html.escape(name)}</button>"
        for example, name in zip(config["examples"], about.example_names(config), strict=True)
    )
    if examples:
        examples = f'<div class="rn50-examples"><h2>Examples</h2><div>{examples}</div></div>'
    card = MarkdownIt().enable("table").render(about.model_card(model))
    return Template((HERE / "index.html").read_text(encoding="utf-8")).substitute(
        name=html.escape(config["name"]),
        header=about.title(config, len(config["labels"]), model=repo),
        settings=about.page_settings(config, names),
        link=link,
        examples=examples,
        about=about.about(config),
        card=card,
        footer=about.footer(config),
    )


def front_matter(config, repo):
    """README.md of the Space: the one beside this file, with what this model adds."""
    front, body = (HERE / "README.md").read_text(encoding="utf-8").split("---\n", 2)[1:]
    settings = yaml.safe_load(front) | {"title": config["name"]}
    if repo:
        settings["models"] = [repo]
    return f"---\n{yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)}---\n{body}".encode()


def server(files, host=HOST, port=0):
    """An HTTP server of these files, with the headers that the Space's card asks for."""
    headers = yaml.safe_load(content_of(files["README.md"]).decode().split("---\n")[1])["custom_headers"]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            path = unquote(urlsplit(self.path).path).removeprefix("/") or "index.html"
            content = content_of(files[path]) if path in files else b"Not found"
            self.send_response(HTTPStatus.OK if path in files else HTTPStatus.NOT_FOUND)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Type", TYPES.get(Path(path).suffix, "text/plain"))
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-cache")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request, client_address):
            pass  # a browser that has left

    return Server((host, port), Handler)


def main():
    host, asked = os.environ.get("GRADIO_SERVER_NAME") or HOST, os.environ.get("GRADIO_SERVER_PORT", "").strip()
    if asked and not (asked.isascii() and asked.isdecimal() and 0 < int(asked) < 65536):
        sys.exit(f"error: GRADIO_SERVER_PORT is {asked!r}, not a port: choose one from 1024 to 65535")
    model = os.environ.get("MODEL_DIR", "")
    if not os.path.lexists(model):  # else that is its name
        model = os.path.expanduser(os.path.expandvars(model))
    try:
        files = site(Path(model))
    except inference.BadModel as problem:
        sys.exit(f"error: {problem}")
    for port in [int(asked)] if asked else range(PORT, PORT + 100):
        try:
            serving = server(files, host, port)
            break
        except OSError as error:
            reason = error.strerror
    else:
        sys.exit(
            f"error: the page cannot be at {host}:{port}: {reason}; GRADIO_SERVER_NAME and GRADIO_SERVER_PORT choose "
            "where"
        )
    # so that its end by a signal is one without a traceback
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    print(f"Open http://{host}:{port} in a browser; Ctrl-C ends it.", flush=True)
    serving.serve_forever()


if __name__ == "__main__":
    main()
