"""The loaders of benchmark_loader.py, each in a process of its own, started and told by it when to run a pass.

    PYTHON studies/loader/peers.py LOADER FOLDER THREADS COPIES

It runs under the interpreter that holds the loader, so rn50 and the peers are imported where they are used. Each line
of stdin is a resolution in pixels; the answer is a line of JSON on stdout: {"images", "seconds", "bytes"} of one pass
(bytes: stored, an image), {"missing"} where the loader cannot be imported, or {"error"}. The loader is set up at the
first pass of a resolution, before the clock starts; that pass still compiles and fills caches, so it is not counted.
"""

import itertools
import json
import os
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

MAX_SIDE, BATCH = 500, 64


@dataclass
class Setting:
    """What benchmark_loader.py wrote, and how to read it.

    folder: train_SIDE.beton (with tables), untiled.beton, and the image folders tree/ and short256/. copies: so many
    times the images in a pass; the betons hold them already.
    """

    folder: Path
    threads: int
    copies: int
    batch: int = BATCH


def main():
    name, folder, threads, copies = sys.argv[1:]
    # before numba, OpenMP and OpenCV count the cores
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(threads)])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # where libraries may print
    setting = Setting(Path(folder), int(threads), int(copies))
    passes = {}
    for line in sys.stdin:
        print(json.dumps(_answer(name, setting, int(line), passes)), file=answers, flush=True)
    os._exit(0)  # without waiting for the threads of a library


def _answer(name, setting, resolution, passes):
    try:
        if resolution not in passes:
            passes[resolution] = LOADERS[name](setting, resolution)
        run, stored = passes[resolution]
        started = time.perf_counter()
        images = run()
        return {"images": images, "seconds": time.perf_counter() - started, "bytes": stored}
    except ImportError as error:
        return {"missing": str(error)}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def rn50(setting, resolution, rung="auto"):
    """Ours, from the rung that training reads at this resolution, among those there are."""
    from rn50.data import loaders

    rungs = loaders.find_rungs(setting.folder, "train")
    return _rn50(setting, resolution, rungs[loaders.training_rung(rungs, resolution, rung)])


def rn50_untiled(setting, resolution):
    """Ours, from the file that stock FFCV reads: without tables."""
    from rn50.data import beton

    return _rn50(setting, resolution, beton.read_info(setting.folder / "untiled.beton"))


def _rn50(setting, resolution, info):
    import torch

    from rn50.data import loaders

    torch.set_num_threads(1)
    loader, epochs = rn50_loader(info, setting), itertools.count()

    def run():
        order = loaders.epoch_order(info, "random", seed=0, epoch=0)
        with loader.batches(order, resolution, epoch=next(epochs)) as batches:
            return consume(batches)

    return run, float(info.sizes.mean())


def rn50_loader(info, setting):
    import torch

    from rn50.data import loaders

    return loaders.training_loader(
        info,
        batch_size=setting.batch,
        crop_scale=(0.08, 1),
        seed=0,
        device=torch.device("cpu"),
        workers=setting.threads,
        timeout=600,
    )


def ffcv(setting, resolution, **cache):
    """As FFCV's ImageNet example sets it up (github.com/libffcv/ffcv-imagenet)."""
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor, ToTorchImage

    decoder = RandomResizedCropRGBImageDecoder((resolution, resolution))
    loader = Loader(
        str(setting.folder / "untiled.beton"),
        batch_size=setting.batch,
        num_workers=setting.threads,
        order=OrderOption.RANDOM,
        drop_last=False,
        pipelines={
            "image": [decoder, RandomHorizontalFlip(), ToTensor(), ToTorchImage()],
            "label": [IntDecoder(), ToTensor()],
        },
        **(cache or {"os_cache": True}),
    )
    return lambda: consume(loader), _mean_bytes(setting.folder / "tree")


def erow(setting, resolution):
    """github.com/erow/ffcv as its examples/profiler.py has it: crop decode, and the system's page cache."""
    from ffcv.libffcv import imcropresizedecode  # noqa: F401 - stock FFCV, which has the same name, has none

    return ffcv(setting, resolution, cache_type=0)


def slipstream(setting, resolution, tree="tree", image_format="jpeg"):
    """The decoder without rejection sampling, and no background thread, which its benchmarks recommend.

    Its batches are as decoded: its documentation flips on the GPU.
    """
    os.environ["SLIPSTREAM_CACHE_DIR"] = str(setting.folder / "slipstream")  # read when it is imported
    import numpy as np
    from slipstream import SlipstreamLoader
    from slipstream.decoders import DecodeDirectRandomResizedCrop
    from slipstream.readers import SlipstreamImageFolder

    dataset = SlipstreamImageFolder(setting.folder / tree)
    loader = SlipstreamLoader(
        dataset,
        batch_size=setting.batch,
        indices=np.tile(np.arange(len(dataset)), setting.copies),
        drop_last=False,
        image_format=image_format,
        exclude_fields=["index", "path"],
        pipelines={"image": [DecodeDirectRandomResizedCrop(resolution, num_threads=setting.threads)]},
        use_threading=False,
        verbose=False,
    )
    cache = Path(loader.cache.cache_dir) / ("image.bin" if image_format == "jpeg" else "image_yuv420.bin")
    return lambda: sum(len(batch["image"]) for batch in loader), cache.stat().st_size / len(dataset)


def dali(setting, resolution, filter_name):
    """decoders.image_random_crop, which decodes what it needs, then a resize with or without antialiasing."""
    from nvidia.dali import fn, pipeline_def, types

    interpolation = types.INTERP_TRIANGULAR if filter_name == "triangular" else types.INTERP_LINEAR

    # Without prefetching, which would go on during the next loader's pass.
    @pipeline_def(
        batch_size=setting.batch, num_threads=setting.threads, device_id=None, exec_async=False, exec_pipelined=False
    )
    def pipeline():
        jpegs, labels = fn.readers.file(file_root=str(setting.folder / "tree"), random_shuffle=True, name="reader")
        images = fn.decoders.image_random_crop(
            jpegs, device="cpu", random_area=[0.08, 1.0], random_aspect_ratio=[3 / 4, 4 / 3], use_fast_idct=True
        )
        images = fn.resize(
            images, size=[resolution, resolution], interp_type=interpolation, antialias=filter_name == "triangular"
        )
        return fn.flip(images, horizontal=fn.random.coin_flip()), labels

    made = pipeline()
    made.build()
    batches = -(-len(_files(setting.folder / "tree")) * setting.copies // setting.batch)

    def run():
        return sum(len(made.run()[0]) for _ in range(batches))  # its last batch is a full one

    return run, _mean_bytes(setting.folder / "tree")


def torchvision_pil(setting, resolution):
    """ImageFolder and PIL. One thread is this process; more are worker processes, as its documentation recommends."""
    from torchvision import datasets, transforms

    steps = [transforms.RandomResizedCrop(resolution), transforms.RandomHorizontalFlip(), transforms.PILToTensor()]
    return _torchvision(setting, datasets.ImageFolder(setting.folder / "tree", transforms.Compose(steps)))


def torchvision_v2(setting, resolution):
    """decode_jpeg to a uint8 tensor and v2 transforms, the fastest of torchvision's CPU ways by its own account."""
    from torchvision import datasets, io
    from torchvision.transforms import v2

    steps = v2.Compose([v2.RandomResizedCrop(resolution, antialias=True), v2.RandomHorizontalFlip()])

    def load(path):
        return io.decode_jpeg(io.read_file(path), mode=io.ImageReadMode.RGB)

    return _torchvision(setting, datasets.ImageFolder(setting.folder / "tree", steps, loader=load))


def _torchvision(setting, dataset):
    import torch

    torch.set_num_threads(1)
    workers = 0 if setting.threads == 1 else setting.threads
    dataset.samples *= setting.copies
    loader = torch.utils.data.DataLoader(
        dataset, setting.batch, shuffle=True, num_workers=workers, persistent_workers=workers > 0
    )
    return lambda: consume(loader), _mean_bytes(setting.folder / "tree")


def consume(batches):
    """How many images the batches held."""
    return sum(len(batch[0]) for batch in batches)


def _files(tree):
    return list(tree.glob("*/*"))


def _mean_bytes(tree):
    sizes = [path.stat().st_size for path in _files(tree)]
    return sum(sizes) / len(sizes)


# What --python calls a loader's package is the name up to the first underscore.
LOADERS = {
    "rn50": rn50,
    "rn50_500": partial(rn50, rung=MAX_SIDE),
    "rn50_untiled": rn50_untiled,
    "ffcv": ffcv,
    "erow": erow,
    "slipstream_jpeg": slipstream,
    "slipstream_yuv420": partial(slipstream, image_format="yuv420"),
    "slipstream_yuv420_256": partial(slipstream, image_format="yuv420", tree="short256"),
    "dali_triangular": partial(dali, filter_name="triangular"),
    "dali_linear": partial(dali, filter_name="linear"),
    "torchvision_pil": torchvision_pil,
    "torchvision_v2": torchvision_v2,
}

if __name__ == "__main__":
    main()
