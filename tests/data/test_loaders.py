"""FFCV behind a fence: right samples, no hang, no leak, the right file for a resolution."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from rn50.data import beton_loader, loaders
from rn50.data.decode import random_crops
from rn50.errors import RunError
from tools import verify_beton

CPU = torch.device("cpu")


@pytest.fixture
def info(betons):
    return loaders.find_rungs(betons, "train")[64]


@pytest.fixture(scope="module")
def loader(betons):
    """One for all tests, as for all epochs of a run."""
    info = loaders.find_rungs(betons, "train")[64]
    return loaders.training_loader(
        info, batch_size=16, crop_scale=[0.35, 1], seed=0, device=CPU, workers=2, timeout=300
    )


def test_batches_are_the_given_samples_at_the_given_resolution(loader):
    info = loader.info
    samples = np.random.default_rng(0).permutation(info.num_samples)[:40]
    for resolution in (32, 48):
        with loader.batches(samples, resolution) as batches:
            got = [(images.clone(), labels.clone()) for images, labels in batches]
        assert [len(labels) for _, labels in got] == [16, 16, 8]
        assert torch.cat([labels for _, labels in got]).tolist() == info.labels[samples].tolist()
        for images, _ in got:
            assert images.shape[1:] == (3, resolution, resolution)
            assert images.dtype == torch.uint8
            assert images.is_contiguous(memory_format=torch.channels_last)
            assert images.float().std() > 10


def test_crops_depend_on_seed_epoch_and_sample_alone(betons):
    """Not on threads, batch size, what was read before, or where in the order a sample is."""
    info = loaders.find_rungs(betons, "train")[96]

    def read(samples, *, seed=0, epoch=3, batch_size=16, workers=1, earlier=()):
        loader = loaders.training_loader(
            info, batch_size=batch_size, crop_scale=[0.1, 1], seed=seed, device=CPU, workers=workers, timeout=60
        )
        for other in earlier:
            with loader.batches(np.arange(20), 64, epoch=other) as batches:
                next(batches)
        with loader.batches(np.array(samples), 48, epoch=epoch) as batches:
            images = torch.cat([images.clone() for images, _ in batches])
        return dict(zip(samples, images, strict=True))

    samples = np.random.default_rng(0).permutation(info.num_samples)[:50].tolist()
    first = read(samples)
    for other in (
        read(samples, workers=4),
        read(samples[::-1], batch_size=7, workers=2),
        read(samples[20:30], earlier=[0, 1]),
    ):
        assert all(torch.equal(first[sample], image) for sample, image in other.items())
    for other in (read(samples, epoch=4), read(samples, seed=1)):
        assert all(not torch.equal(first[sample], image) for sample, image in other.items())


def test_evaluation_is_torchvisions_resize_and_centre_crop(betons):
    info = loaders.find_rungs(betons, "val")[96]
    loader = loaders.evaluation_loader(info, batch_size=4, crop_ratio=0.875, device=CPU, workers=1, timeout=300)
    with loader.batches(np.arange(4), 40) as batches:
        images, _ = next(batches)
    data = np.fromfile(info.path, np.uint8)
    reference = transforms.Compose([transforms.Resize(46), transforms.CenterCrop(40)])
    for index, image in enumerate(images):
        start, size = int(info.data_ptrs[index]), int(info.sizes[index])
        expected = np.asarray(reference(Image.open(io.BytesIO(data[start : start + size].tobytes()))))
        # textures: saturated noise, where chroma differs more than in photographs (tests/data/test_decode.py has those)
        assert np.abs(image.permute(1, 2, 0).numpy().astype(int) - expected).mean() < 2


def test_the_first_batch_comes_at_once(betons):
    """Stock FFCV compiles for ten seconds. The limit is the issue's, generous for a busy machine."""
    info = loaders.find_rungs(betons, "train")[96]
    started = time.monotonic()
    loader = loaders.training_loader(
        info, batch_size=16, crop_scale=[0.1, 1], seed=0, device=CPU, workers=1, timeout=60
    )
    for resolution in (64, 96):
        with loader.batches(np.arange(32), resolution) as batches:
            next(batches)
    assert time.monotonic() - started < 3


def test_pages_are_asked_for_a_window_ahead(betons, monkeypatch):
    info = loaders.find_rungs(betons, "train")[96]
    asked = []
    monkeypatch.setattr(beton_loader, "PAGES_IN_WINDOW", 2)
    monkeypatch.setattr(os, "posix_fadvise", lambda file, start, length, advice: asked.append((start, length)))
    ahead = beton_loader._ReadAhead(info)
    ahead._page_of = np.array([5, 5, 3, 3, 9, 9, 7, 7])
    with ahead.schedule_epoch([np.array([0, 1]), np.array([2])]):
        ahead.start_batch(0)
    assert asked == []
    ahead.enabled = True
    with ahead.schedule_epoch([np.array([4, 5]), np.array([0, 1]), np.array([2, 3]), np.array([6, 7])]):
        seen = []
        for number in range(4):
            ahead.start_batch(number)
            seen.append([start // info.page_size for start, _ in asked])
    assert seen == [[9, 5, 3], [9, 5, 3, 7], [9, 5, 3, 7], [9, 5, 3, 7]]


def test_an_exception_of_the_loader_thread_reaches_the_training_loop(loader, monkeypatch):
    pipeline = beton_loader._Iterator.run_pipeline

    def break_down(self, number, *rest):
        if number == 2:
            raise ValueError("bad weather")
        return pipeline(self, number, *rest)

    monkeypatch.setattr(beton_loader._Iterator, "run_pipeline", break_down)
    got = 0
    with pytest.raises(RunError, match=r"train_64.beton failed: ValueError: bad weather"):  # noqa: PT012, SIM117
        with loader.batches(np.arange(64), 32) as batches:
            for _ in batches:
                got += 1
    assert got == 2


def test_a_batch_that_does_not_come_is_an_error(loader, monkeypatch):
    release, before = threading.Event(), threading.active_count()
    monkeypatch.setattr(beton_loader._Iterator, "run_pipeline", lambda self, *args: release.wait(60))
    monkeypatch.setattr(beton_loader, "STOP_PATIENCE", 0.5)
    monkeypatch.setattr(loader, "timeout", 1)
    started = time.monotonic()
    with pytest.raises(RunError, match="no batch from"):  # noqa: SIM117
        with loader.batches(np.arange(64), 32) as batches:
            next(batches)
    assert time.monotonic() - started < 10
    release.set()
    while threading.active_count() > before:
        time.sleep(0.01)


def test_a_caller_may_be_in_inference_mode(loader):
    with torch.inference_mode(), loader.batches(np.arange(32), 32) as batches:
        assert sum(len(labels) for _, labels in batches) == 32


def test_leaving_early_joins_the_thread(loader):
    before = threading.active_count()
    for _ in range(5):
        with loader.batches(np.arange(200), 32) as batches:
            next(batches)
        assert threading.active_count() == before
    with pytest.raises(KeyboardInterrupt), loader.batches(np.arange(200), 32) as batches:  # noqa: PT012
        next(batches)
        raise KeyboardInterrupt
    assert threading.active_count() == before


GROWTH = """
import os, sys, threading
import numpy as np, torch
from rn50.data import loaders
from rn50.data.decode import random_crops
info = loaders.find_rungs(sys.argv[1], "train")[96]
loader = loaders.training_loader(info, batch_size=32, crop_scale=[0.35, 1], seed=0, device=torch.device("cpu"),
                                 workers=2, timeout=300)
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
for epoch in range(24):
    with loader.batches(np.random.permutation(info.num_samples), 128 if epoch % 2 else 96) as batches:
        for number, _ in enumerate(batches):
            if epoch % 3 == 0 and number == 4:
                break
    if epoch == 3:
        first = resident(), threading.active_count()
print(first[0], resident(), first[1], threading.active_count(), torch.get_num_threads())
"""


def test_no_thread_or_memory_growth_over_20_epochs(betons):
    result = subprocess.run(
        [sys.executable, "-c", GROWTH, str(betons)], capture_output=True, text=True, check=True, timeout=300
    )
    megabytes_before, megabytes_after, threads_before, threads_after, _ = map(float, result.stdout.split())
    assert threads_after == threads_before
    # one abandoned set of buffers is 5 batches of crops and decoded images: 12 MB
    assert megabytes_after - megabytes_before < 40


def test_ffcv_does_not_take_torchs_threads(loader):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with loader.batches(np.arange(32), 32) as batches:
            assert torch.get_num_threads() == 3
            next(batches)
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_a_truncated_beton_is_refused_before_ffcv_opens_it(betons, tmp_path):
    shutil.copy(betons / "train_64.beton", tmp_path)
    os.truncate(tmp_path / "train_64.beton", (tmp_path / "train_64.beton").stat().st_size // 2)
    with pytest.raises(RunError, match="train_64.beton"):
        loaders.find_rungs(tmp_path, "train")


def test_no_beton_is_one_line_that_says_what_to_do(tmp_path):
    def put(*names):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()

    put("file.beton/train_64.beton", "stock/train_500_0.50_90.ffcv", "other/val_64.beton", "above/betons/val_64.beton")
    put("images/train/a/1.jpg")
    (tmp_path / "empty").mkdir()
    for place, problem in {
        "nowhere": "there is no such folder; data.dir is the one that write_dataset.py wrote to",
        "empty": "write_dataset.py makes them; data.dir is the folder that it wrote to",
        "file.beton/train_64.beton": f"that is a file; give its folder: {tmp_path}/file.beton",
        "stock": "rename train_500_0.50_90.ffcv to train_SIZE.beton, where SIZE is the longest side of its images in",
        "other": "there is val_64.beton; write_dataset.py converts train, too",
        "images": f"it has images; convert them with write_dataset.py --source.dir={tmp_path}/images --out.dir=BETONS",
    }.items():
        with pytest.raises(RunError) as refusal:
            loaders.find_rungs(tmp_path / place, "train")
        assert str(refusal.value).startswith(f"no train_SIZE.beton in {tmp_path / place}: {problem}")
    for place in ("above", "above/betons/train"):
        (tmp_path / place).mkdir(exist_ok=True)
        with pytest.raises(RunError, match=f"they are in {tmp_path}/above/betons; give that folder"):
            loaders.find_rungs(tmp_path / place, "val")


def rungs(**short_sides):
    return {
        int(side[1:]): SimpleNamespace(median_short_side=short, path=f"betons/train{side}.beton")
        for side, short in short_sides.items()
    }


@pytest.mark.parametrize(
    ("side", "px", "share"), [(500, 176, 0.126), (400, 176, 0.262), (256, 88, 0.114), (400, 150, 0.158)]
)
def test_the_share_of_crops_that_must_be_enlarged(side, px, share):
    """What schedules.TRAINING_MARGIN says of 4:3 images."""
    wide, high = np.full(100_000, side), np.full(100_000, side * 3 // 4)
    crops = random_crops(wide, high, np.arange(100_000), size=px, scale=(0.08, 1.0), seed=0, epoch=0)
    assert np.mean(crops["scale_x"] * crops["scale_y"] < 1) == pytest.approx(share, abs=0.005)


def test_training_takes_the_smallest_rung_that_is_large_enough():
    available = rungs(_256=192, _400=300, _500=375)
    assert loaders.training_rung(available, 96, "auto") == 256
    assert loaders.training_rung(available, 97, "auto") == 400
    assert loaders.training_rung(available, 150, "auto") == 400
    assert loaders.training_rung(available, 151, "auto") == 500
    assert loaders.training_rung(available, 320, "auto") == 500
    assert loaders.training_rung(available, 96, 500) == 500
    missing = r"^no train_333.beton in betons \(there: 256, 400, 500\): .*--out.resolutions=333 .* --data.rung=auto$"
    with pytest.raises(RunError, match=missing):
        loaders.training_rung(available, 96, 333)


def test_validation_reads_images_that_it_shrinks_as_training_does_or_warns():
    available, warnings = rungs(_256=192, _400=300, _500=375), []
    assert loaders.validation_rung(available, 96, 0.875, warn=warnings.append) == 256
    # published runs evaluate from 500 px; 300 px would be read as they are, and 267 of 400 px enlarged
    assert loaders.validation_rung(available, 256, 0.875, warn=warnings.append) == 500
    assert loaders.validation_rung(available, 224, 224 / 232, warn=warnings.append) == 500
    assert not warnings
    assert loaders.validation_rung(available, 352, 0.875, warn=warnings.append) == 500
    assert "enlarges" in warnings[0]


def test_order_is_random_while_the_file_fits_in_memory(monkeypatch):
    monkeypatch.setattr(loaders, "memory_bytes", lambda: 100)

    def file(size):
        return SimpleNamespace(bytes=size, labels=np.arange(9) % 3, data_ptrs=np.arange(9), page_size=9)

    assert loaders.choose_order(file(60), "auto") == "random"
    assert loaders.choose_order(file(61), "auto") == "page"
    assert loaders.choose_order(file(61), "random") == "random"
    assert loaders.choose_order(file(1), "page") == "page"


STOCK_IN_CLASS_ORDER = """
import sys
import numpy as np
from ffcv import fields, writer
pairs = [(k // 40, np.full((20, 30, 3), k, "u1")) for k in range(200)]
made = {"label": fields.IntField(), "image": fields.RGBImageField(write_mode="jpg")}
writer.DatasetWriter(sys.argv[1], made, num_workers=2).from_indexed_dataset(pairs, chunksize=7)
"""


def test_a_file_in_class_order_is_not_read_page_by_page(tmp_path, betons, monkeypatch):
    """As stock FFCV writes an ImageFolder; ours are shuffled."""
    path = tmp_path / "train_30.beton"
    subprocess.run([sys.executable, "-c", STOCK_IN_CLASS_ORDER, path], check=True, timeout=120)
    (stock,) = loaders.find_rungs(tmp_path, "train").values()
    loader = loaders.evaluation_loader(stock, batch_size=64, crop_ratio=1, device=CPU, workers=1, timeout=300)
    with loader.batches(np.arange(200), 20) as batches:  # the label is the first field of this one
        read = [(images.float().mean((1, 2, 3)).round().int().tolist(), labels.tolist()) for images, labels in batches]
    assert [value for images, _ in read for value in images] == list(range(200))
    assert [label for _, labels in read for label in labels] == [k // 40 for k in range(200)]
    assert loaders.choose_order(stock, "auto") == loaders.choose_order(stock, "random") == "random"
    monkeypatch.setattr(loaders, "memory_bytes", lambda: 100)
    for order in ("auto", "page"):
        with pytest.raises(RunError, match=r"train_30.beton holds its images class by class.*data.order=random"):
            loaders.choose_order(stock, order)
    shuffled = loaders.find_rungs(betons, "train")[64]
    assert loaders.choose_order(shuffled, "auto") == "page"
    # whatever the classes' sizes: nine of ten images of one class lie beside their own in any order
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1], [900, 100]))
    for classes, sorted_by_class in ((labels, False), (np.sort(labels), True), (np.zeros(1000, int), False)):
        file = SimpleNamespace(labels=classes, data_ptrs=np.arange(1000), page_size=10)
        assert loaders.stored_by_class(file) == sorted_by_class


def random_labels(generator):
    return generator.integers(0, 1000, 75 * 400)


def half_sorted(generator):
    labels = random_labels(generator)
    labels[: len(labels) // 2].sort()
    return labels


def two_classes_a_page(generator):
    """One beside the other, as two workers write: no image lies beside its own class."""
    classes = generator.permutation(1000)[: 2 * 400].reshape(400, 2)
    return np.stack([np.tile(pair, 38)[:75] for pair in classes]).ravel()


def twenty_classes_a_page(generator):
    return np.stack([generator.choice(generator.permutation(1000)[:20], 75) for _ in range(400)]).ravel()


def two_of_a_kind_together(generator):
    return np.repeat(generator.integers(0, 1000, 75 * 200), 2)


@pytest.mark.parametrize(
    ("make", "refused"),
    [
        (random_labels, False),
        (half_sorted, True),
        (two_classes_a_page, True),
        (twenty_classes_a_page, True),
        (two_of_a_kind_together, False),
    ],
)
def test_windows_that_see_few_classes_are_refused(make, refused):
    """400 pages of 75 images in 1,000 classes, like ImageNet's. What is refused shows it in the batches themselves."""
    labels = make(np.random.default_rng(0))
    file = SimpleNamespace(
        path="train_500.beton",
        bytes=1,
        num_samples=len(labels),
        labels=labels,
        page_size=75,
        data_ptrs=np.arange(len(labels)),
    )
    batches = labels[loaders.epoch_order(file, "page", seed=0, epoch=0)][: 20 * 1024].reshape(20, 1024)
    assert (np.mean([len(np.unique(batch)) for batch in batches]) < 600) == refused  # 641 in a random order
    if refused:
        with pytest.raises(RunError, match="a batch would see few classes"):
            loaders.choose_order(file, "page")
    else:
        assert loaders.choose_order(file, "page") == "page"


def other_split(folder):
    for suffix in ("beton", "json"):
        shutil.copy(folder / f"val_64.{suffix}", folder / f"train_64.{suffix}")


def other_rung(folder):
    for suffix in ("beton", "json"):
        shutil.copy(folder / f"train_64.{suffix}", folder / f"train_96.{suffix}")


def other_split_in_val(folder):
    for suffix in ("beton", "json"):
        shutil.copy(folder / f"train_64.{suffix}", folder / f"val_64.{suffix}")


def no_manifest_in_val(folder):
    (folder / "val_64.json").write_text('{"classes": 3}')


def other_images(folder):
    """A stock file: it has no manifest."""
    (folder / "train_96.json").unlink()
    shutil.copy(folder / "val_96.beton", folder / "train_96.beton")


def other_classes(folder):
    path = folder / "train_96.json"
    path.write_text(path.read_text().replace("/", "").replace(json.loads(path.read_text())["classes"][0]["wnid"], "z"))


def other_classes_in_val(folder):
    for path in folder.glob("val_*.json"):
        manifest = json.loads(path.read_text())
        manifest["classes"] = manifest["classes"][::-1]
        path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            other_split,
            "train_64.beton holds images of val of at most 64 pixels, as its manifest says, not what its name",
        ),
        (other_rung, "train_96.beton holds images of train of at most 64 pixels.* name it train_64.beton"),
        (other_split_in_val, "val_64.beton holds images of train of at most 64 pixels"),
        (no_manifest_in_val, "val_64.json is not the manifest of a .beton file"),
        (
            other_images,
            "train_96.beton and .*train_64.beton are not of the same images: the first has 110 images and the",
        ),
        (other_classes, "train_96.beton and .*train_64.beton are not of the same images: the first has other classes"),
        (other_classes_in_val, r"train_\d+.beton and .*val_64.beton have different classes"),
    ],
)
def test_files_that_are_not_what_their_names_say_are_refused(betons, tmp_path, change, problem, monkeypatch, capsys):
    folder = shutil.copytree(betons, tmp_path / "betons")
    loaders.find_rungs(folder, "train")
    change(folder)
    with pytest.raises(RunError, match=problem) as caught:
        loaders.find_rungs(folder, "train")
    assert "\n" not in str(caught.value)
    files = map(str, sorted(folder.glob("train*.beton")))
    monkeypatch.setattr(sys, "argv", ["verify_beton.py", "--quick", *files])
    with pytest.raises(RunError) as caught:
        verify_beton.main()
    assert re.search(problem, f"{capsys.readouterr().err}{caught.value}")


def test_both_orders_of_a_real_file_are_permutations(info):
    for order in ("random", "page"):
        samples = loaders.epoch_order(info, order, seed=0, epoch=0)
        assert sorted(samples) == list(range(info.num_samples))


class LateGPU:
    """In the place of CUDA's streams: a device that does nothing before somebody waits for it, on the CPU's memory."""

    def __init__(self, monkeypatch):
        self.lock, self.chosen, self.streams, gpu = threading.RLock(), threading.local(), [], self

        class Stream:
            device = torch.device("cuda", 1)

            def __init__(self):
                self.queue, self.done = [], 0
                gpu.streams.append(self)

            def submit(self, work):
                with gpu.lock:
                    self.queue.append(work)

            def run(self, until):
                with gpu.lock:
                    while self.done < until:
                        self.done += 1
                        self.queue[self.done - 1]()

            def wait_stream(self, other):
                self.submit(partial(other.run, len(other.queue)))

            def query(self):
                self.run(min(self.done + 1, len(self.queue)))
                return self.done == len(self.queue)

        class Event:
            def __init__(self, blocking=False):
                pass

            def record(self, stream):
                self.synchronize = partial(stream.run, len(stream.queue))

            def wait(self):
                gpu.chosen.stream.submit(self.synchronize)

        @contextmanager
        def stream(stream):
            gpu.chosen.stream = stream
            yield

        class LateCopy(beton_loader.ToDevice):
            def __init__(self, device, non_blocking):
                super().__init__(CPU)

            def generate_code(self):
                def to_device(source, target):
                    gpu.chosen.stream.submit(partial(target.copy_, source))
                    return target

                return to_device

        self.main, self.devices_set = Stream(), []
        for name, stand_in in {
            "Stream": Stream, "Event": Event, "stream": stream, "current_stream": lambda: self.main,
            "set_device": self.devices_set.append,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, stand_in)
        monkeypatch.setattr(beton_loader, "ToDevice", LateCopy)
        monkeypatch.setattr(beton_loader.epoch_iterator, "IS_CUDA", False)


def test_a_batch_whose_copy_is_under_way_is_not_overwritten(betons, monkeypatch):
    """The host may be as far ahead of the GPU as it likes, which is what a step without a wait lets it."""
    info = loaders.find_rungs(betons, "train")[64]
    common = {"batch_size": 8, "crop_scale": [0.35, 1], "seed": 0, "workers": 1, "timeout": 60}
    samples = np.random.default_rng(0).permutation(info.num_samples)[:120]
    with loaders.training_loader(info, device=CPU, **common).batches(samples, 32) as batches:
        expected = [(images.clone(), labels.clone()) for images, labels in batches]
    gpu, got = LateGPU(monkeypatch), []
    loader = loaders.training_loader(info, device=torch.device("cuda", 1), **common)
    with loader.batches(samples, 32) as batches:
        for batch in batches:
            gpu.main.submit(lambda batch=batch: got.append([tensor.clone() for tensor in batch]))
        gpu.main.run(len(gpu.main.queue))
    assert len(got) == len(expected)
    for batch, other in zip(got, expected, strict=True):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(batch, other, strict=True))
    # the loader's thread, too, works on this rank's GPU
    assert gpu.devices_set == [torch.device("cuda", 1)]
    with loader.batches(samples, 32) as batches:
        next(batches)
    assert all(len(stream.queue) == stream.done for stream in gpu.streams if stream is not gpu.main)


def test_a_loader_for_the_cpu_leaves_a_gpu_alone(betons, monkeypatch):
    """In a forked process CUDA could not even begin."""
    monkeypatch.setattr(beton_loader.epoch_iterator, "IS_CUDA", True)
    info = loaders.find_rungs(betons, "train")[64]
    loader = loaders.training_loader(
        info, batch_size=8, crop_scale=[0.35, 1], seed=0, device=CPU, workers=1, timeout=60
    )
    with loader.batches(np.arange(8), 32) as batches:
        assert len(next(batches)[0]) == 8


def test_importing_ffcv_leaves_torch_and_numba_as_they_were():
    code = (
        "import torch; torch.set_num_threads(3); import rn50.data.stock, numba.typed, numba.typed.typeddict as typed\n"
    )
    code += "from ffcv.fields.rgb_image import IMAGE_MODES\n"
    code += "print(torch.get_num_threads(), numba.typed.Dict is typed.Dict, IMAGE_MODES)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "3 True {'jpg': 0, 'raw': 1}\n", done.stderr
