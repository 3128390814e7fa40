"""The page's text about the model: its title, its figures, its training curve, and how programs ask it."""

import html


def headline(config):
    return next((row for row in config["results"] if row["headline"]), None)


def title(config, classes, browser=None):
    """HTML: the model's name, what it is, and how often it is right.

    classes: how many it knows. browser: address of the static Space with the same model, to which it links.
    """
    arch = config["architecture"]["arch"].replace("resnet", "ResNet-")
    row = headline(config)
    accuracy = f" It is right on {row['top1']:.1f} % of the validation images." if row else ""
    # in a new tab: a Space is shown in a frame, in which the Hub's own pages do not open
    words = "The same model in your own browser, without a server"
    link = f' <a href="{html.escape(browser)}" target="_blank">{words}</a>' if browser else ""
    return (
        f'<header class="rn50-header"><h1>{html.escape(config["name"])}</h1><p>{arch}, trained from scratch on '
        f"{html.escape(config['dataset'])}: {classes} classes.{accuracy}{link}</p></header>"
    )


def about(config):
    """HTML: the figures that matter, each with what it depends on, and the training curve."""
    row, made = headline(config), config["training"]
    tiles = []
    if row:
        view = "one view" if row["view"] == "single" else "averaged with the mirror image"
        where = f"{row['resolution']} px, {view}, {row['images']} images"
        interval = f"95 %: {row['top1_low']:.1f} to {row['top1_high']:.1f}"
        tiles += [(f"{row['top1']:.2f} %", f"top-1 ({interval})", where), (f"{row['top5']:.2f} %", "top-5", where)]
    took, priced = duration(made["seconds"]), made.get("dollars") is not None
    cost, more = (f"${made['dollars']:.2f}", took) if priced else (took, "price not recorded")
    tiles.append((cost, "of training", f"{more}, {made['device'] or 'machine not recorded'}"))
    tiles.append((f"{made['epochs']:g}", "epochs", f"of {config['recipe']['training']['epochs']} in the recipe"))
    shown = "".join(
        f'<div class="rn50-tile"><p class="rn50-value">{html.escape(value)}</p><p>{html.escape(what)}</p>'
        f'<p class="rn50-small">{html.escape(more)}</p></div>'
        for value, what, more in tiles
    )
    return f'<div class="rn50-tiles">{shown}</div>{curve(config["curve"])}'


def duration(seconds):
    if seconds < 60:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 3600 else f"{seconds / 3600:.1f} hours"


def curve(rows, width=640, height=240, left=44, bottom=34, top=14):
    """An SVG of training loss and validation top-1 over epochs, in the page's colours."""
    if len(rows) < 2:
        return ""
    last = rows[-1]["epoch"]

    def line(key, name, low, high):
        points = [(row["epoch"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
        if not points:
            return ""
        placed = [
            (
                left + (width - 2 * left) * epoch / max(1, last),
                height - bottom - (height - bottom - top) * (value - low) / max(1e-9, high - low),
            )
            for epoch, value in points
        ]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in placed) if len(placed) <= 40 else ""
        return f'<g class="rn50-{name}"><polyline points="{path}"/>{dots}</g>'

    losses = [row["train_loss"] for row in rows if isinstance(row.get("train_loss"), int | float)]
    most = max(losses, default=1.0) * 1.05
    marks = "".join(
        f'<line x1="{left}" x2="{width - left}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end" class="rn50-loss">{most * share:.1f}</text>'
        f'<text x="{width - left + 6}" y="{y + 4:.1f}" class="rn50-top1">{100 * share:.0f} %</text>'
        for share in (0, 0.25, 0.5, 0.75, 1)
        for y in [height - bottom - (height - bottom - top) * share]
    )
    return (
        '<figure class="rn50-curve"><figcaption>Training: <span class="rn50-loss">loss</span> and '
        '<span class="rn50-top1">validation top-1</span> by epoch</figcaption>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="Training loss and validation top-1 by epoch">'
        f'<g class="rn50-grid">{marks}</g>{line("train_loss", "loss", 0, most)}{line("top1", "top1", 0, 100)}'
        f'<text x="{left}" y="{height - 10}">epoch 1</text>'
        f'<text x="{width - left}" y="{height - 10}" text-anchor="end">epoch {last + 1}</text></svg></figure>'
    )


def model_card(folder):
    """The README.md of the model in `folder`, a Path, without its front matter and title."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
    except OSError:
        return ""
    body = text.split("---\n", 2)[2] if text.startswith("---\n") else text
    return body.lstrip().split("\n", 1)[1] if body.lstrip().startswith("# ") else body


def api_text(url, top, max_bytes):
    """Markdown: how programs ask the page at `url` for the `top` most probable classes. max_bytes: of one picture."""
    return f"""Each picture gives its {top} most probable classes as JSON. It is sent as an upload, as below, or
in its place as a data URI (`"data:image/jpeg;base64,..."`), and has up to {max_bytes // 1_000_000} MB; links are not
followed.

### Python

```python
from gradio_client import Client, handle_file

client = Client("{url}")
print(client.predict(handle_file("picture.jpg"), api_name="/predict"))
```

### curl

```bash
URL={url}
FILE=picture.jpg
UPLOADED=$(curl -sf -F "files=@$FILE" "$URL/gradio_api/upload" | tr -d '[]"')
EVENT=$(curl -sf "$URL/gradio_api/call/predict" -H "Content-Type: application/json" \\
    -d '{{"data": [{{"path": "'"$UPLOADED"'", "meta": {{"_type": "gradio.FileData"}}}}]}}' | cut -d '"' -f 4)
curl -sfN "$URL/gradio_api/call/predict/$EVENT"
```
"""
