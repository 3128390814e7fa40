"""The page: Gradio 6 around inference.py, about.py and uploads.py.

    MODEL_DIR=model python app.py

Without MODEL_DIR the model is the one that model.json beside this file names, a Hub repository and a commit of it;
tools/publish.py writes that file. Works without a network when the model is here.
"""

import atexit
import base64
import errno
import inspect
import io
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

# A stream that is closed is None, which uvicorn asks whether it is a terminal.
for stream in ("stdout", "stderr"):
    if getattr(sys, stream) is None:
        setattr(sys, stream, open(os.devnull, "w"))  # noqa: SIM115  for as long as the page is up
# Read by gradio and huggingface_hub while they are imported.
os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1")
# What is uploaded goes to a folder of this process alone.
try:
    UPLOADS = tempfile.mkdtemp(prefix="uploads-")
except OSError as problem:
    sys.exit(f"error: no folder for uploads: {problem.strerror}; TMPDIR names one that is writable and not full")
os.environ["GRADIO_TEMP_DIR"] = UPLOADS
atexit.register(shutil.rmtree, UPLOADS, ignore_errors=True)

from about import about, api_text, footer, model_card, page_settings, title  # noqa: E402
from inference import MAX_BYTES, BadModel, Classifier, UnreadableImage  # noqa: E402
from uploads import DELETE_AFTER, DELETE_EVERY, Gate, sent_bytes, sweep  # noqa: E402

HERE = Path(__file__).resolve().parent
TOP = 5
BATCH = 24
AT_ONCE = 2  # pictures being decoded, of all visitors together
WAITING = 100  # requests; beyond that visitors are told to come back
# In the place of Gradio's "Drop File Here", "Click to Upload" and a button's name that it has not translated.
WORDS = {
    "upload_text.drop_file": "Drop or paste pictures here",
    "upload_text.click_to_upload": "Choose files",
    "common.upload": "Add pictures",
}
PORT = 7860  # or the first after it that is free


def proxies():
    """The variables that name proxies and what goes past them."""
    return [name for name in os.environ if name.lower() in ("http_proxy", "https_proxy", "all_proxy", "no_proxy")]


def load_model():
    folder = os.environ.get("MODEL_DIR", "")
    if not os.path.lexists(folder):  # else that is its name
        folder = os.path.expanduser(os.path.expandvars(folder))
    return Classifier(folder or from_hub())


def pointer():
    """What model.json beside this file names, as tools/publish.py writes it; nothing where it is not there."""
    try:
        return json.loads((HERE / "model.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def from_hub():
    """The folder of the model that model.json names, downloaded where it is not in the cache yet."""
    try:
        repo, revision, files = POINTER["repo"], POINTER["revision"], POINTER["files"]
    except KeyError:
        raise BadModel("no model: set MODEL_DIR to an exported one, or publish this with tools/publish.py") from None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        # with a commit's id, files that are in the cache are taken from it without asking the Hub
        paths = [hf_hub_download(repo, name, revision=revision) for name in files]
    except RepositoryNotFoundError:
        raise BadModel(f"{repo} is gone or private: the Space then needs a secret HF_TOKEN that may read it") from None
    except Exception as error:
        reason = str(error.__cause__ or error).partition("\n")[0]
        through = f" through {' and '.join(proxies())}" if proxies() else ""
        raise BadModel(f"cannot download {repo} at {revision}{through}: {reason}") from None
    return os.path.dirname(paths[files.index("config.json")])


@contextmanager
def without_stubs():
    """Gradio writes a stub file for each component class when it is defined, which takes half of the time to start."""
    getfile = inspect.getfile

    def no_source(thing):
        if isinstance(thing, type) and any(base.__module__.startswith("gradio.") for base in thing.__mro__):
            raise OSError("no stub is wanted")
        return getfile(thing)

    inspect.getfile = no_source
    try:
        yield
    finally:
        inspect.getfile = getfile


def start():
    """(gradio, the model): each takes seconds, so both at once.

    Not behind a proxy: only the model may have to come through that. Gradio would send what the page asks itself there,
    and cannot be imported where the proxy is of a kind that httpx does not know.
    """
    with ThreadPoolExecutor(1) as threads:
        model = threads.submit(load_model)
        if named := proxies():
            model.result()
            for name in named:
                del os.environ[name]
        with without_stubs():
            import gradio

            # As `spaces` reads it. ZeroGPU, the hardware of a free account's Space, ends a page that has no function
            # for its GPU. This one is never called: no visitor shall pay with quota for what takes the processor
            # milliseconds. Not before gradio, which would let `spaces` wrap the page's own functions.
            if os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "t", "true"):
                import spaces

                spaces.GPU(lambda: None)
        return gradio, model.result()


def asked_port():
    """The port that GRADIO_SERVER_PORT asks for, or None. Gradio fails with a traceback on what is no number."""
    text = os.environ.pop("GRADIO_SERVER_PORT", "").strip()
    if not text:
        return None
    if not text.isdecimal() or len(text) > 5 or not 0 < int(text) < 65536:
        sys.exit(f"error: GRADIO_SERVER_PORT is {text!r}, not a port: choose one from 1024 to 65535")
    os.environ["GRADIO_SERVER_PORT"] = text
    return int(text)


def free_ports():
    """The port that is asked for, else those from PORT on that nobody listens at. Where no more is left, the end."""
    reason = "Address already in use"
    for port in [ASKED_PORT] if ASKED_PORT else range(PORT, PORT + 100):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
            try:
                probe.bind((HOST, port))
            except OSError as problem:
                reason = problem.strerror
                if problem.errno != errno.EADDRINUSE:
                    break
                continue
        yield port
    reason += "; GRADIO_SERVER_NAME and GRADIO_SERVER_PORT choose where"
    sys.exit(f"error: the page cannot be at {HOST}:{port}: {reason}")


POINTER = pointer()
HOST, ASKED_PORT = os.environ.get("GRADIO_SERVER_NAME") or "127.0.0.1", asked_port()
if __name__ == "__main__":
    next(free_ports())  # or the end, before the rest takes its seconds
try:
    gr, MODEL = start()
except BadModel as problem:
    sys.exit(f"error: {problem}")
CONFIG = MODEL.config


class Page(gr.Blocks):
    """Gives each function what was sent, as it was sent: sent_bytes says what is wrong with it.

    Gradio's own preprocessing would download any address, copy files and decode pictures without our limits, and
    answers what is no picture with a traceback in the log.
    """

    async def preprocess_data(self, block_fn, inputs, state, explicit_call=False):
        sent, block = inputs[0] if inputs else None, next(iter(block_fn.inputs), None)
        if isinstance(block, gr.Image | gr.File):
            return [sent]
        if not isinstance(sent, int) or sent not in range(len(getattr(block, "raw_samples", ()))):
            raise gr.Error("There is no such example.", print_exception=False)
        return [block.preprocess(sent)]


def classify(sent):
    """What page.js shows of a picture, or None where there is none."""
    return None if sent is None else answer_to(sent)


def classify_all(sent):
    """The same of each picture of a batch, with the path by which page.js knows it."""
    if not isinstance(sent, list):
        sent = [sent] if sent else []
    return [answer_to(each) | {"path": path_of(each)} for each in sent[:BATCH]]


def path_of(sent):
    path = sent.get("path") if isinstance(sent, dict) else None
    # a half of a surrogate pair cannot be sent back
    return path.encode(errors="replace").decode() if isinstance(path, str) else None


def answer_to(sent):
    """Of a picture: {problem}, or what the network saw, the probabilities, and a map of where it looked for each class.

    In base64: the probabilities are float32 [classes], the maps uint8 [classes, h, w], grid is [w, h].
    """
    try:
        seen = MODEL.predict(sent_bytes(sent, UPLOADS))
    except UnreadableImage as problem:
        return {"problem": str(problem)}
    maps = MODEL.activation_maps(seen.features)
    return {
        "shown": data_url(seen.shown),
        "probabilities": in_base64(seen.probabilities.astype("<f4")),
        "unsure": seen.unsure,
        "grid": [maps.shape[2], maps.shape[1]],
        "maps": in_base64((maps * 255).round().astype("uint8")),
        "milliseconds": [f"{seen.decode_ms:.1f}", f"{seen.network_ms:.1f}"],
    }


def predict(image):
    """{label, unsure, confidences: [{label, wnid, probability}], milliseconds, model} of one picture, for programs."""
    try:
        seen = MODEL.predict(sent_bytes(image, UPLOADS))
    except UnreadableImage as problem:
        raise gr.Error(str(problem), print_exception=False) from None
    top = seen.top(TOP)
    return {
        "label": MODEL.names[top[0]],
        "unsure": seen.unsure,
        "confidences": [
            {
                "label": MODEL.names[index],
                "wnid": MODEL.labels[index]["wnid"],
                "probability": round(float(seen.probabilities[index]), 6),
            }
            for index in top
        ],
        "milliseconds": {"decode": round(seen.decode_ms, 2), "network": round(seen.network_ms, 2)},
        "model": CONFIG["name"],
    }


def data_url(picture):
    """In the page itself, so that no copy is on disk."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{in_base64(file.getvalue())}"


def in_base64(content):
    """Of bytes or an array."""
    return base64.b64encode(content).decode()


def build(url):
    """(the page, what launch() takes for its looks). url: where it will be, for the examples of its API."""
    theme = gr.themes.Default(
        primary_hue="indigo",
        neutral_hue="slate",
        radius_size="lg",
        # the visitor's own fonts: nothing is fetched from elsewhere
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
        font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"],
    )
    shared = {"concurrency_limit": AT_ONCE, "concurrency_id": "network"}
    # page.js shows that it waits, and what comes
    on_page = {**shared, "api_visibility": "private", "show_progress": "hidden"}
    in_page = {"fn": None, "outputs": None, "api_visibility": "private"}
    limit = f"{MAX_BYTES // 1_000_000} MB"
    with Page(title=CONFIG["name"], delete_cache=(DELETE_EVERY, DELETE_AFTER), analytics_enabled=False) as page:
        gr.HTML(title(CONFIG, len(MODEL.labels), POINTER.get("browser"), POINTER.get("repo")))
        with gr.Tab("Classify"), gr.Row(equal_height=False, elem_id="rn50-classify"):
            with gr.Column(scale=2, min_width=280):
                picture = gr.Image(
                    label="Picture",
                    sources=["upload"],
                    buttons=[],
                    height=230,
                    elem_id="rn50-picture",
                    alt_text="The picture that you chose",
                    placeholder=f"# Choose a picture\nor drop or paste one here, up to {limit}",
                )
                if examples := [str(MODEL.folder / example["file"]) for example in CONFIG["examples"]]:
                    gr.Examples(examples, picture, cache_examples=False, label="Examples", api_visibility="private")
            with gr.Column(scale=3, min_width=280):
                gr.HTML('<div id="rn50-shown"></div>')
        with gr.Tab("Batch"):
            many = gr.File(
                label=f"Up to {BATCH} pictures at a time, {limit} each",
                file_count="multiple",
                file_types=["image"],
                elem_id="rn50-pictures",
                height=160,
            )
            gr.HTML(
                '<p id="rn50-after" hidden><span id="rn50-count" role="status"></span> '
                '<button type="button" class="rn50-button" id="rn50-csv">Save as CSV</button></p>'
                '<div id="rn50-gallery" class="rn50-cards" role="list" aria-label="Pictures" hidden></div>'
            )
        with gr.Tab("About"):
            gr.HTML(about(CONFIG))
            gr.Markdown(model_card(MODEL.folder), elem_classes="rn50-text")
        with gr.Tab("API"):
            gr.Markdown(api_text(url, TOP, MAX_BYTES, CONFIG), elem_classes="rn50-text", elem_id="rn50-api")
            sent, answer = gr.Image(visible=False), gr.JSON(visible=False)
            asked = gr.Button(visible=False)
        gone = DELETE_EVERY + DELETE_AFTER + 5
        gr.HTML(footer(CONFIG, f"Pictures are not kept: they are deleted within {gone} seconds."))
        one, all_of_them = gr.JSON(visible=False), gr.JSON(visible=False)
        looked = picture.change(classify, picture, one, js="(picture) => rn50.ask(picture)", **on_page)
        looked.success(inputs=one, js="(answer) => rn50.answered(answer)", **in_page)
        looked.failure(inputs=None, js="() => rn50.unanswered()", **in_page)
        went_through = many.change(classify_all, many, all_of_them, js="(files) => rn50.askMany(files)", **on_page)
        went_through.success(inputs=all_of_them, js="(answers) => rn50.answeredMany(answers)", **in_page)
        went_through.failure(inputs=None, js="() => rn50.answeredMany([])", **in_page)
        asked.click(predict, sent, answer, api_name="predict", **shared)
    page.queue(max_size=WAITING, api_open=False)  # nobody passes it by
    script = (HERE / "page.js").read_text(encoding="utf-8")
    settings = page_settings(CONFIG, MODEL.names, batch=BATCH, limit=limit)
    return page, {
        "theme": theme,
        "css_paths": HERE / "page.css",
        "head": f"{settings}<script>{script}</script>",
    }


def launch(page, looks, port):
    page.launch(
        **looks,
        server_port=port,
        prevent_thread_lock=True,
        footer_links=[],
        max_file_size=MAX_BYTES,
        max_threads=8,
        share=False,
        show_error=False,
        enable_monitoring=False,
        quiet=True,
        run_history=False,
        ssr_mode=False,
        i18n=gr.I18n(en=WORDS),
        state_session_capacity=100,
        # Starlette unpacks its own Middleware to this
        app_kwargs={"middleware": [(Gate, (), {"folder": UPLOADS, "max_bytes": MAX_BYTES, "batch": BATCH})]},
    )


def main():
    # so that what atexit does is done
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    sys.stdout.reconfigure(line_buffering=True)  # its address is wanted in a log, too, while it runs
    global demo  # the name by which a Space finds the page to reload it
    space = os.environ.get("SPACE_HOST")
    for port in free_ports():
        url = f"http://{HOST.replace('0.0.0.0', '127.0.0.1')}:{port}"
        try:
            demo, looks = build(f"https://{space}" if space else url)
            examples = {*Path(UPLOADS).rglob("*")}
            launch(demo, looks, port)
            break
        except OSError as problem:
            if problem.errno:  # else another page has taken the port since it was looked at
                sys.exit(f"error: the page at {url} did not start: {problem}")
    threading.Thread(target=sweep, args=(UPLOADS, examples), daemon=True).start()
    in_use = f"Port {PORT} is in use. " if port != (ASKED_PORT or PORT) else ""
    print(f"Open https://{space} in a browser." if space else f"{in_use}Open {url} in a browser; Ctrl-C ends it.")
    demo.block_thread()


if __name__ == "__main__":
    main()
