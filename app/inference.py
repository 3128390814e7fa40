"""An exported model on ONNX Runtime: pictures as bytes in, probabilities and class activation maps out.

Every number of the preprocessing is read from the model's config.json. Nothing is written to disk.
"""

import json
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

# ONNX Runtime tells Microsoft about models and their runs, unless this is set before it is imported.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import numpy as np
import onnxruntime
import pictures
from PIL import GifImagePlugin, Image

FORMAT = 2
# What browsers and phones produce. Other parsers of Pillow's are not offered to strangers: a TIFF of 1 MB can have it
# read gigabytes.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF")
# A decoded pixel takes up to 13 bytes for a moment.
MAX_PIXELS = pictures.FULL_PIXELS
MAX_BYTES = 20_000_000
# Each scan of a JPEG goes over all of its pixels again, and may take 20 bytes. Programs write 10.
MAX_SCANS = 100
# Of EXIF data in bytes, which is what a JPEG holds of it, and of what comes before a GIF's first picture in blocks.
MAX_EXIF, MAX_GIF_BLOCKS = 65_536, 4000
SHOWN = 448
# Pillow refuses by itself above twice its own limit, which is higher.
Image.MAX_IMAGE_PIXELS = None


class UnreadableImage(ValueError):
    """What is wrong with a picture, in words for the person who sent it."""


class BadModel(ValueError):
    """What is wrong with a model folder, in words for the person who runs it."""


@dataclass(frozen=True)
class Prediction:
    """logits, probabilities: float32 [classes]. features: float32 [channels, h, w], the last feature map.

    unsure: the best class has less than the model's `unsure_below`, as few right answers have. shown: the part of the
    picture that the network saw, square, for people: in up to SHOWN pixels. decode_ms, network_ms: milliseconds.
    """

    logits: np.ndarray
    probabilities: np.ndarray
    unsure: bool
    features: np.ndarray
    shown: Image.Image
    decode_ms: float
    network_ms: float

    def top(self, k):
        """Indices of the k most probable classes, the most probable first."""
        return np.argsort(-self.probabilities, kind="stable")[:k].tolist()


def decode_image(data):
    """Encoded bytes -> upright RGB picture, as pictures.py reads them. UnreadableImage says what is wrong with them."""
    if len(data) > MAX_BYTES:
        raise UnreadableImage(f"The file is larger than {MAX_BYTES // 1_000_000} MB.")
    if data[:2] == pictures.START and len(pictures.SCANS.findall(data)) > MAX_SCANS:
        raise UnreadableImage("The picture is damaged: it is in too many parts.")
    try:
        return Image.fromarray(pictures.decode_image(data, formats=FORMATS, max_pixels=MAX_PIXELS))
    except ValueError as error:
        reason = str(error)
        raise UnreadableImage(f"{reason[0].upper()}{reason[1:]}.") from None


def _bound_parsers():
    """Make Pillow ignore EXIF data and GIF comments whose reading takes more than they have bytes.

    Each of thousands of EXIF tags may name the same bytes, and Pillow copies them for each; it does so as it opens a
    JPEG or an AVIF. A comment it copies as often as it has blocks.
    """
    load, block = Image.Exif.load, GifImagePlugin.GifImageFile.data

    def short_exif(self, data):
        return load(self, data if len(data) <= MAX_EXIF else b"")

    def counted_block(self):
        self.blocks_read = getattr(self, "blocks_read", 0) + 1
        if self.blocks_read > MAX_GIF_BLOCKS:
            raise SyntaxError("too much before the first picture")
        return block(self)

    Image.Exif.load, GifImagePlugin.GifImageFile.data = short_exif, counted_block


_bound_parsers()


def resize_and_crop(picture, *, resolution, crop_ratio):
    """torchvision's Resize(round(resolution / crop_ratio)) and CenterCrop(resolution) of an RGB picture."""
    short, (width, height) = round(resolution / crop_ratio), picture.size
    shorter = min(width, height)
    resized = (short * width // shorter, short * height // shorter)
    if resized != picture.size:
        # only the middle of a panorama is seen: resizing all of it could take any amount of memory
        picture, resized = _middle(picture, resized, short)
        picture = picture.resize(resized, Image.Resampling.BILINEAR)
    left, top = round((resized[0] - resolution) / 2), round((resized[1] - resolution) / 2)
    return picture.crop((left, top, left + resolution, top + resolution))


def _middle(picture, resized, short, limit=8):
    """The picture, and of one longer than `limit` times its short side the middle of that length."""
    width, height = picture.size
    if max(resized) <= limit * short:
        return picture, resized
    if width > height:
        left = (width - limit * height) // 2
        return picture.crop((left, 0, left + limit * height, height)), (limit * short, short)
    top = (height - limit * width) // 2
    return picture.crop((0, top, width, top + limit * width)), (short, limit * short)


class Classifier:
    """The model in `folder`, as tools/export_model.py writes it. BadModel says what is wrong with the folder.

    threads: of ONNX Runtime; by default as many as there are processors. file: the network to take instead of the one
    that config.json names. May be called from several threads; they take turns.
    """

    def __init__(self, folder, *, threads=None, file=None):
        self.folder = Path(folder)
        self.config = read_config(self.folder)
        try:
            prepared = self.config["preprocessing"]
            self.resolution, self.crop_ratio = prepared["resolution"], prepared["crop_ratio"]
            scale = 1 / np.asarray(prepared["std"], np.float32)
            self._scale, self._offset = scale, np.asarray(prepared["mean"], np.float32) * scale
            self.labels, shown = self.config["labels"], self.config["probabilities"]
            self.temperature, self.unsure_below = float(shown["temperature"]), float(shown["unsure_below"])
            path = self.folder / (file or self.config["network"])
        except (KeyError, TypeError) as error:
            raise BadModel(f"{self.folder / 'config.json'} has no {error}; export the model again") from None
        self.names = display_names(self.labels)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or cores()
        options.inter_op_num_threads = 1
        # waiting threads that spin would take the processor from the web server
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception:
            raise BadModel(f"{path} is missing or damaged; export the model again") from None
        self._turn = threading.Lock()
        nothing = np.zeros((1, 3, self.resolution, self.resolution), np.float32)
        try:
            logits, weight = self._session.run(["logits", "classifier_weight"], {"images": nothing})
        except Exception:
            raise BadModel(f"{path} does not have the inputs and outputs of an exported model") from None
        if logits.shape != (1, len(self.labels)):
            raise BadModel(f"{path} gives {logits.shape[1]} classes, config.json names {len(self.labels)}")
        self._weight = weight

    def prepare(self, picture):
        """RGB picture -> what the network sees of it: float32 [3, resolution, resolution], normalised."""
        seen = resize_and_crop(picture, resolution=self.resolution, crop_ratio=self.crop_ratio)
        pixels = np.asarray(seen, np.float32) * self._scale - self._offset
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def show(self, picture):
        """The square of an RGB picture that the network sees, not enlarged, with at most SHOWN pixels a side."""
        side = min(picture.size) * min(1.0, self.resolution / round(self.resolution / self.crop_ratio))
        left, top = (picture.width - side) / 2, (picture.height - side) / 2
        pixels = max(1, min(SHOWN, round(side)))
        return picture.resize((pixels, pixels), Image.Resampling.BILINEAR, (left, top, left + side, top + side))

    def run(self, images):
        """float32 [N, 3, resolution, resolution] -> logits [N, classes], features [N, channels, h, w], float32."""
        with self._turn:
            return self._session.run(["logits", "features"], {"images": images})

    def predict(self, data):
        """The Prediction for one picture given as bytes. UnreadableImage says what is wrong with it."""
        started = time.perf_counter()
        picture = decode_image(data)
        pixels = self.prepare(picture)
        prepared = time.perf_counter()
        logits, features = self.run(pixels[None])
        ended = time.perf_counter()
        probabilities = self.probabilities(logits[0])
        return Prediction(
            logits=logits[0],
            probabilities=probabilities,
            unsure=bool(probabilities.max() < self.unsure_below),
            features=features[0],
            shown=self.show(picture),
            decode_ms=1000 * (prepared - started),
            network_ms=1000 * (ended - prepared),
        )

    def probabilities(self, logits):
        """Softmax at the model's temperature: shares of 1, float32 [..., classes].

        For a network trained with a sigmoid for each class, too: they are in proportion to p / (1 - p) of its sigmoids
        p, which is how probable each class is where exactly one is true.
        """
        logits = logits.astype(np.float64) / self.temperature
        shares = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return (shares / shares.sum(axis=-1, keepdims=True)).astype(np.float32)

    def activation_maps(self, features, classes=None):
        """Class activation maps of features [channels, h, w] for `classes` (default: all): float32 [classes, h, w].

        Each is scaled so that its least value is 0 and its largest 1 (Zhou et al. 2016, arXiv 1512.04150).
        """
        weight = self._weight if classes is None else self._weight[classes]
        maps = np.tensordot(weight, features, axes=1)
        low, high = maps.min(axis=(1, 2), keepdims=True), maps.max(axis=(1, 2), keepdims=True)
        return (maps - low) / np.maximum(high - low, np.float32(1e-9))


def display_names(labels):
    """A name for each of [{wnid, name}]; where two classes share one (ImageNet has two cranes) with the wnid added."""
    names = [label["name"].replace("_", " ") for label in labels]
    shared = {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set()
    return [f"{name} ({label['wnid']})" if name in shared else name for name, label in zip(names, labels, strict=True)]


def cores():
    """Processors that this process may use: by affinity, by what Spaces say, and by the container's quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if (said := os.environ.get("CPU_CORES", "")).isdigit():
        count = max(1, min(count, int(said)))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(count, int(quota) // int(period)))
    except (OSError, ValueError):
        return count


def read_config(folder):
    """The config.json of an exported model's folder, a Path. BadModel where it is none."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadModel(f"no config.json in {folder}; tools/export_model.py makes one") from None
    except (OSError, ValueError) as error:
        raise BadModel(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise BadModel(f"{path} is not of format {FORMAT}; export the model again")
    return config
