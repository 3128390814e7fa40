"""The page: Gradio 6 around inference.py, about.py and uploads.py.

    MODEL_DIR=model python app.py

Without MODEL_DIR the model is the one that model.json beside this file names, a Hub repository and a commit of it;
tools/publish.py writes that file. Works without a network when the model is here.
"""

import atexit
import base64
import html
import inspect
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

# Read by gradio and huggingface_hub while they are imported.
os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1")
# What is uploaded goes to a folder of this process alone.
UPLOADS = tempfile.mkdtemp(prefix="uploads-")
os.environ["GRADIO_TEMP_DIR"] = UPLOADS
atexit.register(shutil.rmtree, UPLOADS, ignore_errors=True)

from about import about, api_text, model_card, title  # noqa: E402
from inference import MAX_BYTES, BadModel, Classifier, UnreadableImage  # noqa: E402
from uploads import DELETE_AFTER, DELETE_EVERY, Gate, sweep  # noqa: E402

HERE = Path(__file__).resolve().parent
TOP = 5
BATCH = 24
AT_ONCE = 2  # pictures being decoded, of all visitors together
WAITING = 100  # requests; beyond that visitors are told to come back


def load_model():
    return Classifier(os.environ.get("MODEL_DIR") or from_hub())


def from_hub():
    """The folder of the model that model.json names, downloaded where it is not in the cache yet."""
    try:
        named = json.loads((HERE / "model.json").read_text(encoding="utf-8"))
        repo, revision, files = named["repo"], named["revision"], named["files"]
    except (OSError, ValueError, KeyError):
        raise BadModel("no model: set MODEL_DIR to an exported one, or publish this with tools/publish.py") from None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        # with a commit's id, files that are in the cache are taken from it without asking the Hub
        paths = [hf_hub_download(repo, name, revision=revision) for name in files]
    except RepositoryNotFoundError:
        raise BadModel(f"{repo} is gone or private: the Space then needs a secret HF_TOKEN that may read it") from None
    except Exception as error:
        raise BadModel(f"cannot download {repo} at {revision}: {str(error).splitlines()[0]}") from None
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
    """(gradio, the model): each takes seconds, so both at once."""
    with ThreadPoolExecutor(1) as threads:
        model = threads.submit(load_model)
        with without_stubs():
            import gradio
        return gradio, model.result()


try:
    gr, MODEL = start()
except BadModel as problem:
    sys.exit(f"error: {problem}")
CONFIG = MODEL.config


async def only_uploads(self, url_or_file_path):
    """In place of a component's own: Gradio would download whatever address it is sent, of any size."""
    if str(url_or_file_path).lower().startswith("http"):
        raise gr.Error("Send the picture itself; links are not followed.", print_exception=False)
    return await gr.blocks.Block.async_move_resource_to_block_cache(self, url_or_file_path)


with without_stubs():

    class Picture(gr.Image):
        """An image input that gives the file's path: Gradio's own decodes it without our limits."""

        is_template = True  # the browser shows the component that it derives from
        async_move_resource_to_block_cache = only_uploads

        def preprocess(self, payload):
            return payload.path if payload else None

    class Pictures(gr.File):
        """A file input that gives (path, name) of each: Gradio's own leaves an empty file behind for each."""

        is_template = True
        async_move_resource_to_block_cache = only_uploads

        def preprocess(self, payload):
            return [(file.path, file.orig_name or "") for file in getattr(payload, "root", payload) or []]


def classify(path):
    if path is None:
        return EMPTY
    try:
        return result(MODEL.predict(read(path)))
    except UnreadableImage as problem:
        return alert(problem)


def classify_all(files):
    if not files:
        return NO_PICTURES
    cards = [card(path, name) for path, name in files[:BATCH]]
    more = f"<p>Only the first {BATCH} are shown.</p>" if len(files) > BATCH else ""
    return f'<div class="rn50-cards" role="list">{"".join(cards)}</div>{more}'


def predict(image):
    """{label, confidences: [{label, wnid, probability}], milliseconds, model} of one picture, for programs."""
    if image is None:
        raise gr.Error("No picture was sent.", print_exception=False)
    try:
        seen = MODEL.predict(read(image))
    except UnreadableImage as problem:
        raise gr.Error(str(problem), print_exception=False) from None
    top = seen.top(TOP)
    return {
        "label": MODEL.names[top[0]],
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


def read(path):
    """The bytes of an upload. Gradio looks at where a path leads only if the sender calls it a file."""
    if not Path(path).resolve().is_relative_to(Path(UPLOADS).resolve()):
        raise UnreadableImage("Send the picture itself.")
    try:
        if os.path.getsize(path) > MAX_BYTES:
            raise UnreadableImage(f"The file is larger than {MAX_BYTES // 1_000_000} MB.")
        return Path(path).read_bytes()
    except OSError:
        raise UnreadableImage("The picture is no longer here: uploads are deleted at once. Send it again.") from None


def alert(problem):
    return f'<div class="rn50-alert" role="alert">{html.escape(str(problem))}</div>'


def result(seen):
    """HTML: what the network saw, with a map for every class that page.js draws over it, and the five best classes."""
    maps = MODEL.activation_maps(seen.features)
    grid = f"{maps.shape[2]}x{maps.shape[1]}"
    encoded = base64.b64encode((maps * 255).round().astype("uint8").tobytes()).decode()
    rows = "".join(
        f'<label class="rn50-row"><input type="radio" name="rn50-class" value="{index}"{" checked" * (place == 0)}>'
        f'<span class="rn50-name">{html.escape(MODEL.names[index])}</span>'
        f'<span class="rn50-share">{percent(seen.probabilities[index])}</span>'
        f'<span class="rn50-bar" aria-hidden="true"><span style="width:{100 * seen.probabilities[index]:.2f}%"></span>'
        "</span></label>"
        for place, index in enumerate(seen.top(TOP))
    )
    best = seen.top(1)[0]
    return (
        f'<div class="rn50-result" data-grid="{grid}" data-maps="{encoded}"><figure class="rn50-seen">'
        f'<img src="{data_url(seen.shown)}" alt="The part of your picture that the network saw">'
        '<canvas width="448" height="448" aria-hidden="true"></canvas>'
        '<figcaption>Bright where it looked for <strong class="rn50-chosen"></strong></figcaption>'
        '<label class="rn50-control">Strength of the heat map'
        '<input type="range" class="rn50-opacity" min="0" max="100"></label>'
        '<label class="rn50-control">Any other class<select class="rn50-any"></select></label></figure>'
        f'<div><p class="rn50-best" role="status">{html.escape(MODEL.names[best])} '
        f"<span>{percent(seen.probabilities[best])}</span></p>"
        f'<fieldset class="rn50-rows"><legend>Choose a class to see where the network looked for it</legend>{rows}'
        f'</fieldset><p class="rn50-latency">Decoding {seen.decode_ms:.1f} ms, network '
        f"{seen.network_ms:.1f} ms</p></div></div>"
    )


def card(path, name):
    name = html.escape(name[:60])
    try:
        seen = MODEL.predict(read(path))
    except UnreadableImage as problem:
        return f'<div class="rn50-card" role="listitem"><p class="rn50-file">{name}</p>{alert(problem)}</div>'
    rows = "".join(
        f"<li><span>{html.escape(MODEL.names[index])}</span> <span>{percent(seen.probabilities[index])}</span></li>"
        for index in seen.top(3)
    )
    return (
        f'<div class="rn50-card" role="listitem"><img src="{data_url(seen.shown)}" alt="{name}"><ol>{rows}</ol>'
        f'<p class="rn50-file">{name}</p></div>'
    )


def percent(share):
    return f"{100 * share:.1f} %"


def data_url(picture):
    """In the page itself, so that no copy is on disk."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


EMPTY = (
    '<div class="rn50-empty"><p>Choose, drop or paste a picture, or take one of the examples.</p>'
    f"<p>You will see which of its {len(MODEL.labels)} classes the network takes it for, and where it looked.</p></div>"
)
NO_PICTURES = f'<div class="rn50-empty"><p>Up to {BATCH} pictures at a time.</p></div>'


def build():
    theme = gr.themes.Default(
        primary_hue="indigo",
        neutral_hue="slate",
        radius_size="lg",
        # the visitor's own fonts: nothing is fetched from elsewhere
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
        font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"],
    )
    shared = {"concurrency_limit": AT_ONCE, "concurrency_id": "network"}
    on_page = {**shared, "api_visibility": "private", "show_progress": "minimal"}
    names = json.dumps(MODEL.names).replace("<", "\\u003c")
    with gr.Blocks(title=CONFIG["name"], delete_cache=(DELETE_EVERY, DELETE_AFTER), analytics_enabled=False) as page:
        gr.HTML(title(CONFIG, len(MODEL.labels)))
        with gr.Tab("Classify"):
            with gr.Row(equal_height=False):
                with gr.Column(scale=2, min_width=280):
                    picture = Picture(
                        label="Picture",
                        sources=["upload", "clipboard"],
                        buttons=[],
                        height=300,
                        elem_id="rn50-picture",
                        alt_text="The picture that you chose",
                    )
                with gr.Column(scale=3, min_width=280):
                    shown = gr.HTML(EMPTY, elem_id="rn50-shown")
            if examples := [str(MODEL.folder / example["file"]) for example in CONFIG["examples"]]:
                gr.Examples(examples, picture, cache_examples=False, label="Examples", api_visibility="private")
        with gr.Tab("Batch"):
            many = Pictures(
                label=f"Pictures, up to {BATCH}",
                file_count="multiple",
                file_types=["image"],
                elem_id="rn50-pictures",
                height=160,
            )
            gallery = gr.HTML(NO_PICTURES, elem_id="rn50-gallery")
        with gr.Tab("About"):
            gr.HTML(about(CONFIG))
            gr.Markdown(model_card(MODEL.folder), elem_classes="rn50-text")
        with gr.Tab("API"):
            gr.Markdown(api_text(TOP), elem_classes="rn50-text", elem_id="rn50-api")
            sent, answer = Picture(visible=False), gr.JSON(visible=False)
            asked = gr.Button(visible=False)
        gr.HTML(
            '<p class="rn50-footer">Pictures are not kept: they are deleted within '
            f"{DELETE_EVERY + DELETE_AFTER + 5} seconds.</p>"
        )
        picture.change(classify, picture, shown, **on_page)
        many.change(classify_all, many, gallery, **on_page)
        asked.click(predict, sent, answer, api_name="predict", **shared)
    page.queue(max_size=WAITING, api_open=False)  # nobody passes it by
    script = (HERE / "page.js").read_text(encoding="utf-8")
    return page, {
        "theme": theme,
        "css_paths": HERE / "page.css",
        "head": f"<script>window.rn50Names = {names};\n{script}</script>",
    }


def main():
    # so that what atexit does is done
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    global demo  # the name by which a Space finds the page to reload it
    demo, looks = build()
    threading.Thread(target=sweep, args=(UPLOADS, {*Path(UPLOADS).rglob("*")}), daemon=True).start()
    demo.launch(
        **looks,
        footer_links=[],
        max_file_size=MAX_BYTES,
        max_threads=8,
        share=False,
        show_error=False,
        enable_monitoring=False,
        run_history=False,
        ssr_mode=False,
        state_session_capacity=100,
        app_kwargs={
            "middleware": [(Gate, (), {"upload_bytes": BATCH * MAX_BYTES})]
        },  # Starlette unpacks its own Middleware to this
    )


if __name__ == "__main__":
    main()
