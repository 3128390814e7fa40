"""Top-1 and top-5 of a model over a loader, exact for any number of ranks."""

import torch

from rn50.augment import normalize
from rn50.losses import cross_entropy
from rn50.metrics import correct_in_top, renamed_classes, wilson_interval


@torch.inference_mode()
def evaluate(model, batches, *, classes, device, autocast, flip=False, total=lambda tensor: tensor):
    """Run `model` over `batches` of (uint8 images [N, 3, H, W], int64 labels [N]).

    total: sums a tensor over all ranks, in place, and returns it; the default is for one rank.
    With `flip`, a second set of figures is computed from the mean of the logits of each image and its mirror
    image, from the same pass over the data. Returns {view: {top1, top5 in %, top1_low, top1_high (95 %), val_loss
    in nats, images}} with the views `single` and, if asked for, `flip`; and where rn50.metrics.renamed_classes finds
    any, `renamed` in all views, from the single one.
    """
    model.eval()
    views = ("single", "flip") if flip else ("single",)
    # rows: views; columns: right in top 1, right in top 5, summed loss, images
    sums = torch.zeros(len(views), 4, dtype=torch.float64, device=device)
    confusion = torch.zeros(classes * classes, dtype=torch.int64, device=device)
    for images, labels in batches:
        images = normalize(images.to(device, non_blocking=True))
        labels = labels.to(device, non_blocking=True)
        with autocast():
            logits = model(images)
            outputs = [logits, (logits + model(images.flip(3))) / 2] if flip else [logits]
        confusion.index_add_(0, labels * classes + logits.argmax(1), torch.ones_like(labels))
        for row, output in zip(sums, outputs, strict=True):
            row[0] += correct_in_top(output, labels, 1)
            row[1] += correct_in_top(output, labels, 5)
            row[2] += cross_entropy(output, labels) * len(labels)
            row[3] += len(labels)
    total(sums)
    renamed = renamed_classes(total(confusion).view(classes, classes))
    found = {"renamed": renamed} if renamed else {}
    return {view: _figures(*row) | found for view, row in zip(views, sums.tolist(), strict=True)}


def report_lines(results, *, headline):
    """A table of {resolution: {view: figures}}, line by line; `headline` is the (resolution, view) to mark."""
    yield f"{'top-1':>23}{'95 % interval':>18}{'top-5':>10}{'loss':>10}"
    for resolution, views in results.items():
        for view, row in views.items():
            interval = f"{row['top1_low']:.2f} to {row['top1_high']:.2f}"
            yield (
                f"  {resolution:3} px  {view:6} {row['top1']:6.2f} %{interval:>17}{row['top5']:9.2f} %"
                f"{row['val_loss']:9.4f}{'  <- headline' if (resolution, view) == headline else ''}"
            )


def _figures(top1, top5, loss, images):
    low, high = wilson_interval(top1, images)
    return {
        "top1": 100 * top1 / images,
        "top5": 100 * top5 / images,
        "top1_low": 100 * low,
        "top1_high": 100 * high,
        "val_loss": loss / images,
        "images": int(images),
    }
