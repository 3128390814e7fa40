"""The page's text about the model: its title, its figures, its training curve, and how programs ask it."""

import html
import json
import re


def headline(config):
    return next((row for row in config["results"] if row["headline"]), None)


def title(config, classes, browser=None, model=None):
    """HTML: the model's name, what it is, how often it is right, and links to what it comes from.

    classes: how many it knows. browser: address of the static Space with the same model. model: its repository on the
    Hub.
    """
    arch = config["architecture"]["arch"].replace("resnet", "ResNet-")
    images = f"{config['dataset']}: {classes} classes" if config["dataset"] else f"images of {classes} classes"
    row, where = headline(config), config["links"]
    accuracy = f" It is right on {row['top1']:.1f} % of the validation images." if row else ""
    addresses = {
        "The same model in your own browser, without a server": browser,
        "Model": model and f"https://huggingface.co/{model}",
        "Code": where["code"],
        "Dataset": where["dataset"],
        f"{config['licence'].upper()} licence": where["licence"],
    }
    # in a new tab: a Space is shown in a frame, in which the Hub's own pages do not open
    shown = [
        f'<a href="{html.escape(address)}" target="_blank">{html.escape(words)}</a>'
        for words, address in addresses.items()
        if address
    ]
    links = f'<p class="rn50-links">{" · ".join(shown)}</p>' if shown else ""
    return (
        f'<header class="rn50-header"><h1>{html.escape(config["name"])}</h1><p>{arch}, trained from scratch on '
        f"{html.escape(images)}.{accuracy}</p>{links}</header>"
    )


def footer(config, words=""):
    """HTML: `words`, and the commit of the code that trained the model."""
    commit, link = config["training"]["commit"] or "", config["links"]["commit"]
    if commit:
        # in a new tab: a Space is shown in a frame
        name = html.escape(commit[:10])
        named = f'<a href="{html.escape(link)}" target="_blank">{name}</a>' if link else name
        words = f"{words} Trained with the code of commit {named}."
    return f'<footer class="rn50-footer"><p>{words}</p></footer>'


def example_names(config):
    """What the files of the example pictures are called, in words: one for each."""
    stems = [example["file"].rpartition("/")[2].rpartition(".")[0] for example in config["examples"]]
    return [re.sub(r"^(\d+_)?(n\d{8}_)?", "", stem).replace("_", " ").strip() or stem for stem in stems]


def page_settings(config, names, **more):
    """HTML: what page.js reads of the model, and `more`. names: of the classes."""
    prepared = config["preprocessing"]
    short = round(prepared["resolution"] / prepared["crop_ratio"])
    settings = {
        "names": names,
        "wnids": [label["wnid"] for label in config["labels"]],
        "crop": min(1, prepared["resolution"] / short),
        "examples": example_names(config),
        **more,
    }
    text = json.dumps(settings).replace("<", "\\u003c")
    return f'<script type="application/json" id="rn50-page">{text}</script>'


def about(config):
    """HTML: the figures that matter, each with what it depends on, and the training curve."""
    row, made = headline(config), config["training"]
    tiles = []
    if row:
        view = "one view" if row["view"] == "single" else "averaged with the mirror image"
        where = f"{row['resolution']} px, {view}, {row['images']:,} images"
        interval = f"95 %: {row['top1_low']:.1f} to {row['top1_high']:.1f}"
        tiles += [(f"{row['top1']:.2f} %", f"top-1 ({interval})", where), (f"{row['top5']:.2f} %", "top-5", where)]
    took, machine = duration(made["seconds"]), made["device"] or "a machine that was not recorded"
    if made.get("dollars") is not None:
        tiles.append((f"${made['dollars']:.2f}", "for the training", f"{took} on {machine}"))
    else:
        tiles.append((took, "of training", f"on {machine}"))
    done, planned = f"{made['epochs']:g}", config["recipe"]["training"]["epochs"]
    tiles.append((done, "epoch" if done == "1" else "epochs", f"of {planned} in the recipe"))
    shown = "".join(
        f'<div class="rn50-tile"><p class="rn50-value">{html.escape(value)}</p><p>{html.escape(what)}</p>'
        f'<p class="rn50-small">{html.escape(more)}</p></div>'
        for value, what, more in tiles
    )
    return f'<div class="rn50-tiles">{shown}</div>{curve(config["curve"])}'


def duration(seconds):
    number, unit = (seconds, "second") if seconds < 60 else (seconds / 60, "minute")
    shown = f"{number:.0f}"
    if seconds >= 3600:
        shown, unit = f"{seconds / 3600:.1f}".removesuffix(".0"), "hour"
    return f"{shown} {unit}{'s' * (shown != '1')}"


def curve(rows):
    """HTML: training loss and validation top-1 over epochs, in the page's colours.

    The lines are an SVG that is stretched to the place there is; the labels are text beside it, of the page's size.
    """
    if len(rows) < 2:
        return ""
    last = rows[-1]["epoch"]
    losses, shares = ([row[key] for row in rows if _number(row.get(key))] for key in ("train_loss", "top1"))
    most = max(losses, default=1.0) * 1.05

    def line(key, name, high):
        points = [
            f"{100 * row['epoch'] / max(1, last):.2f} {100 - 100 * row[key] / max(1e-9, high):.2f}"
            for row in rows
            if _number(row.get(key))
        ]
        dots = f'<path d="{" ".join(f"M{point}h0" for point in points)}"/>' if len(points) <= 40 else ""
        return f'<g class="rn50-{name}"><polyline points="{" ".join(points)}"/>{dots}</g>' if points else ""

    def axis(name, labels):
        return f'<div class="rn50-curve-axis rn50-{name}">{"".join(f"<span>{label}</span>" for label in labels)}</div>'

    marks = (1, 0.75, 0.5, 0.25, 0)
    grid = "".join(f'<line x1="0" x2="100" y1="{100 * mark:g}" y2="{100 * mark:g}"/>' for mark in marks)
    ends = " and ".join(
        f"{what} from {values[0]:.{digits}f} to {values[-1]:.{digits}f}{unit}"
        for what, values, digits, unit in (("training loss", losses, 2, ""), ("validation top-1", shares, 1, " %"))
        if values
    )
    return (
        '<figure class="rn50-curve"><figcaption>Training: <span class="rn50-loss">loss</span> and '
        '<span class="rn50-top1">validation top-1</span> by epoch</figcaption>'
        f'<div class="rn50-curve-plot" role="img" aria-label="By epoch: {ends}">'
        f"{axis('loss', [f'{most * mark:.1f}' for mark in marks])}"
        '<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">'
        f'<g class="rn50-grid">{grid}</g>{line("train_loss", "loss", most)}{line("top1", "top1", 100)}</svg>'
        f"{axis('top1', [f'{100 * mark:.0f} %' for mark in marks])}"
        f'<div class="rn50-curve-epochs"><span>epoch 1</span><span>epoch {last + 1}</span></div></div></figure>'
    )


def _number(value):
    return isinstance(value, int | float)


def model_card(folder):
    """The README.md of the model in `folder`, a Path, without its front matter and title."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
    except OSError:
        return ""
    body = text.split("---\n", 2)[2] if text.startswith("---\n") else text
    return body.lstrip().split("\n", 1)[1] if body.lstrip().startswith("# ") else body


def api_text(url, top, max_bytes, config):
    """Markdown: how programs ask the page at `url` for the `top` most probable classes. max_bytes: of one picture."""
    return f"""Each picture gives its {top} most probable classes as JSON. It is sent as an upload, as below, or
in its place as a data URI (`"data:image/jpeg;base64,..."`), and has up to {max_bytes // 1_000_000} MB; links are not
followed.

## Python

Once: `pip install gradio_client`

```python
from gradio_client import Client
from gradio_client import handle_file

client = Client(
    "{url}")
image = "picture.jpg"
print(client.predict(handle_file(image),
    api_name="/predict"))
```

## JavaScript

Once: `npm install @gradio/client`

```js
import {{
    Client, handle_file,
}} from "@gradio/client";

const client = await Client.connect(
    "{url}");
const {{data}} = await client.predict(
    "/predict",
    [handle_file("picture.jpg")]);
console.log(data[0]);
```

## curl

```bash
URL={url}
API=$URL/gradio_api
UPLOADED=$(curl -sf "$API/upload" \\
  -F "files=@picture.jpg" |
  tr -d '[]"')
FILE='{{"path": "'$UPLOADED'",
  "meta": {{"_type": "gradio.FileData"}}}}'
EVENT=$(curl -sf "$API/call/predict" \\
  -H "Content-Type: application/json" \\
  -d "{{\\"data\\": [$FILE]}}" |
  cut -d '"' -f 4)
curl -sfN "$API/call/predict/$EVENT"
```
{sample_answer(config, top)}"""


def sample_answer(config, top):
    """Markdown: what the page answers, with invented probabilities of the model's first classes."""
    shares = (0.81, 0.12, 0.04, 0.02, 0.01)
    classes = [
        {"label": label["name"].replace("_", " "), "wnid": label["wnid"], "probability": share}
        for label, share in zip(config["labels"][:top], shares, strict=False)
    ]
    answer = {
        "label": classes[0]["label"],
        "unsure": False,
        "confidences": classes,
        "milliseconds": {"decode": 3.1, "network": 47.0},
        "model": config["name"],
    }
    return f"""
## The answer

As an example; the figures are invented. `unsure` is true where the best class has less than
{config["probabilities"]["unsure_below"]:.2f}.

```json
{json.dumps(answer, indent=1, ensure_ascii=False)}
```
"""
