"""What it takes to make the betons on EC2: hours and dollars of a conversion, from measured and assumed speeds."""

from rn50.planning.costs import LADDER
from rn50.planning.speeds import beton_gb

# Of a disk: the betons' size is a projection, and a full disk costs the hour before it.
DISK_SHARE = 0.85


def disk_gb(table, origin, gigabytes):
    """GB of local disk that a conversion fills at most. origin: hf, kaggle, links or s3; gigabytes: what it gives.

    Hugging Face's shards are unpacked beside; Kaggle's archive is removed when it is unpacked.
    """
    written = written_gb(table)
    return {"hf": 2 * gigabytes + written, "kaggle": gigabytes + max(gigabytes, written)}.get(
        origin, gigabytes + written
    )


def written_gb(table):
    """GB of the whole ladder, both splits."""
    images = table.value("images_train"), table.value("images_val")
    return sum(beton_gb(table, side) for side in LADDER) * sum(images) / images[0]


def hours(table, vcpus, origin, gigabytes):
    """(expected, lowest, highest) hours of an instance: what the origin gives a second decides most of it.

    vcpus: hyper-threads, two a core.
    """
    images = table.value("images_train") + table.value("images_val")
    encoding = images / (vcpus / 2 * table.value("convert_images_per_core"))
    written, disk = written_gb(table) * 1000, table.value("nvme_mb_per_s")
    unpacking = gigabytes * 1000 / disk if origin in ("hf", "kaggle") else 0
    # the betons are read once for their checksums, once to verify, and once to upload
    after = 2 * written / disk + written / table.value("staging_mb_per_s")
    fixed = table.value("setup_hours") * 3600 + unpacking + encoding + after
    row = table.constant[f"{origin}_mb_per_s"]
    return tuple((fixed + gigabytes * 1000 / row[key]) / 3600 for key in ("value", "high", "low"))


def offers(table, origin, gigabytes=None):
    """[(dollars, hours, row)] of the machines that can convert, the cheapest first."""
    gigabytes = gigabytes or table.value("source_gb")
    able = [row for row in table.cpu.values() if row["disk_gb"] * DISK_SHARE >= disk_gb(table, origin, gigabytes)]
    found = [(hours(table, row["vcpus"], origin, gigabytes), row) for row in able]
    return sorted((spent[0] * row["value"], spent, row) for spent, row in found)
