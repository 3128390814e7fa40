"""rn50/data/sources.py: the four forms in which ImageNet comes give the same .beton files, and damage is one line."""

import csv
import hashlib
import io
import itertools
import json
import os
import pickle
import shutil
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet
from scipy.io import savemat

import write_dataset
from rn50.data import encode, imagenet, listing, sources, tars
from rn50.data.imagenet import IMAGENETTE_NAMES
from rn50.data.sources import open_source
from rn50.data.verify import verify
from rn50.errors import RunError
from tests.test_write_dataset import contents, convert

# Label order is that of the wnids; ids follow the devkit's own order, and other synsets lie between them.
WNIDS = ("n01440764", "n02012849", "n02077923", "n02105855", "n03126707")
IDS = {"n02105855": 1, "n01440764": 2, "n03126707": 4, "n02077923": 5, "n02012849": 7}
WORDS = dict(
    zip(WNIDS, ("tench, Tinca tinca", "crane", "sea lion", "Shetland sheepdog, Shetland", "crane"), strict=True)
)
NAMES = ["tench", "crane (n02012849)", "sea lion", "Shetland sheepdog", "crane (n03126707)"]
FORMS = ("imagefolder", "ilsvrc-tar", "kaggle", "parquet")


def picture(k, kind="JPEG", mode="RGB"):
    coarse = np.random.default_rng(k).integers(0, 255, (5, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((50 + 3 * k, 90 - 2 * k), Image.BICUBIC).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def make_images():
    """{split: {wnid: {name: bytes}}}: a PNG and a CMYK file as in the real set."""
    images = {"train": {wnid: {f"{wnid}_{k}.JPEG": picture(k) for k in (2, 10, 7, 31)} for wnid in WNIDS}, "val": {}}
    images["train"]["n02105855"]["n02105855_2933.JPEG"] = picture(5, "PNG")
    images["train"]["n02077923"]["n02077923_14822.JPEG"] = picture(6, mode="CMYK")
    for k in range(1, 11):
        wnid = WNIDS[(3 * k) % 5]
        images["val"].setdefault(wnid, {})[f"ILSVRC2012_val_{k:08d}.JPEG"] = picture(k)
    return images


def flat(classes):
    """[(wnid, name, bytes)] in another order than the sorted one."""
    rows = [(wnid, name, data) for wnid, listed in classes.items() for name, data in listed.items()]
    return [rows[k] for k in np.random.default_rng(3).permutation(len(rows))]


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def add(tar, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def make_tars(root, images):
    root.mkdir()
    with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as outer:
        for wnid in reversed(WNIDS):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for name, data in images["train"][wnid].items():
                    add(tar, name, data)
            add(outer, f"{wnid}.tar", inner.getvalue())
    with tarfile.open(root / "ILSVRC2012_img_val.tar", "w") as tar:
        for _, name, data in flat(images["val"]):
            add(tar, name, data)
    # 3 and 6 are other leaves, 8 is an inner synset: the real file has 1,860 synsets for its 1,000 classes.
    synsets = {number: (wnid, WORDS[wnid], 0) for wnid, number in IDS.items()}
    synsets |= {3: ("n01443537", "goldfish", 0), 6: ("n01484850", "shark", 0), 8: ("n00001740", "entity", 5)}
    fields = [(name, object) for name in ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children")]
    table = np.array([(k, v[0], v[1], "", v[2]) for k, v in sorted(synsets.items())], dtype=fields)
    meta = io.BytesIO()
    savemat(meta, {"synsets": table.reshape(-1, 1)})
    wnid_of = {name: wnid for wnid, listed in images["val"].items() for name in listed}
    truth = "".join(f"{IDS[wnid_of[name]]}\n" for name in sorted(wnid_of))
    with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        add(tar, "ILSVRC2012_devkit_t12/readme.txt", b"...")
        add(tar, "ILSVRC2012_devkit_t12/data/meta.mat", meta.getvalue())
        add(tar, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", truth.encode())


def make_kaggle(root, images):
    data = root / "ILSVRC" / "Data" / "CLS-LOC"
    for wnid, name, content in flat(images["train"]):
        write(data / "train" / wnid / name, content)
    rows = []
    for wnid, name, content in flat(images["val"]):
        write(data / "val" / name, content)
        rows.append((name.removesuffix(".JPEG"), f"{wnid} 111 108 230 164 {wnid} 1 2 3 4"))
    with open(root / "LOC_val_solution.csv", "w", newline="") as file:
        csv.writer(file).writerows([("ImageId", "PredictionString"), *rows])
    write(root / "LOC_synset_mapping.txt", "".join(f"{wnid} {words}\n" for wnid, words in WORDS.items()).encode())
    listed = [f"{wnid}/{name.removesuffix('.JPEG')}" for wnid, name, _ in flat(images["train"])]
    lines = "".join(f"{name} {k}\n" for k, name in enumerate(listed, 1))
    write(root / "ILSVRC" / "ImageSets" / "CLS-LOC" / "train_cls.txt", lines.encode())


def make_parquet(root, images, labels=None):
    (root / "data").mkdir(parents=True)
    labels = labels or {wnid: label for label, wnid in enumerate(WNIDS)}
    info = {"info": {"features": {"label": {"names": [WORDS[wnid] for wnid in WNIDS], "_type": "ClassLabel"}}}}
    for split, title, shards in (("train", "train", 3), ("val", "validation", 2)):
        rows = flat(images[split])
        for shard in range(shards):
            part = rows[shard::shards]
            paths = [f"{name.removesuffix('.JPEG')}_{wnid}.JPEG" for wnid, name, _ in part]
            column = [{"bytes": data, "path": path} for (_, _, data), path in zip(part, paths, strict=True)]
            table = pa.table(
                {
                    "image": pa.array(column, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
                    "label": pa.array([labels[wnid] for wnid, _, _ in part], pa.int64()),
                }
            ).replace_schema_metadata({"huggingface": json.dumps(info)})
            path = root / "data" / f"{title}-{shard:05d}-of-{shards:05d}.parquet"
            parquet.write_table(table, path, row_group_size=3)


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    """{form: folder} of the same miniature set."""
    root, images = tmp_path_factory.mktemp("forms"), make_images()
    for split, classes in images.items():
        for wnid, name, data in flat(classes):
            write(root / "imagefolder" / split / wnid / name, data)
    make_tars(root / "ilsvrc-tar", images)
    (root / "kaggle").mkdir()
    make_kaggle(root / "kaggle", images)
    make_parquet(root / "parquet", images)
    return {form: root / form for form in FORMS}


@pytest.fixture(scope="module")
def expected(forms, tmp_path_factory):
    """The .beton files of the ImageFolder tree, by one worker."""
    out = tmp_path_factory.mktemp("expected")
    convert(forms["imagefolder"], out, *FLAGS, "--out.workers=1")
    return {name: data for name, data in contents(out).items() if name.endswith(".beton")}


FLAGS = ("--out.resolutions=48,70", "--out.raw_share=0.3")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_samples(forms, form, tmp_path):
    for split, classes in make_images().items():
        source = pickle.loads(pickle.dumps(open_source(forms[form], split, tmp_path)))
        items = [source.item(i) for i in range(len(source))]
        wanted = [(f"{wnid}/{name}", WNIDS.index(wnid)) for wnid in WNIDS for name in sorted(classes[wnid])]
        assert source.kind == form
        assert items == wanted
        assert [c["wnid"] for c in source.classes] == list(WNIDS)
        assert [source.read(i) for i in range(len(source))] == [
            classes[wnid][name] for wnid in WNIDS for name in sorted(classes[wnid])
        ]
        assert source.digest() == open_source(forms["imagefolder"], split).digest()
        if form != "imagefolder":
            assert [c["name"] for c in source.classes] == NAMES


@pytest.mark.parametrize("form", FORMS[1:])
def test_every_form_gives_the_same_betons(forms, expected, form, tmp_path):
    said = convert(forms[form], tmp_path, *FLAGS, "--out.workers=2").stdout
    made = contents(tmp_path)
    assert sorted(name for name in made if name.endswith(".beton")) == sorted(expected)
    for name, data in expected.items():
        assert made[name] == data, name
        assert verify(tmp_path / name)[1] == []
    assert "train: 22 images of 5 classes" in said
    assert "2 known odd files are converted to RGB like the others: n02105855/n02105855_2933.JPEG (PNG), " in said
    assert "n02077923/n02077923_14822.JPEG (CMYK)" in said
    assert "still to write" in said
    assert not (tmp_path / "train.staged").exists()


def settings(source, out):
    return SimpleNamespace(
        source=SimpleNamespace(dir=str(source), subset=0, counts="auto", skip_corrupt=False),
        out=SimpleNamespace(dir=str(out), resolutions=[48, 70], quality=90, raw_share=0.3, seed=0),
    )


@pytest.mark.parametrize("form", FORMS)
def test_an_interrupted_conversion_goes_on_to_the_same_bytes(forms, expected, form, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(write_dataset, "COMMIT_SECONDS", -1)
    monkeypatch.setattr(encode, "CHUNK", 2)

    def convert_once(workers, stop_after):
        job = write_dataset.plan(settings(forms[form], tmp_path), "train")
        monkeypatch.setattr(write_dataset, "show_progress", lambda samples, *rest: cut(samples, stop_after))
        write_dataset.convert(job, workers=workers, skip_corrupt=False, later={})

    def cut(samples, stop_after):
        yield from itertools.islice(samples, stop_after)
        if stop_after is not None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_once(1, 9)
    convert_once(2, None)
    assert "continuing after 9 images" in capsys.readouterr().out
    for name in ("train_48.beton", "train_70.beton"):
        assert (tmp_path / name).read_bytes() == expected[name]


def test_staged_images_are_not_copied_again(forms, tmp_path):
    source = open_source(forms["parquet"], "train")
    source.stage(tmp_path, print)
    (first,) = tmp_path.iterdir()
    before = {path.name: path.stat().st_mtime_ns for path in first.iterdir()}
    (first / "1.images").unlink()
    (first / "1.images.partial").write_bytes(b"half")
    again = open_source(forms["parquet"], "train")
    again.stage(tmp_path, print)
    after = {path.name: path.stat().st_mtime_ns for path in first.iterdir()}
    assert {name for name in before if before[name] != after.get(name)} == {"1.images", "1.npy"}
    folder = open_source(forms["imagefolder"], "train")
    for copy in (again, pickle.loads(pickle.dumps(again))):
        assert [copy.read(i) for i in range(len(copy))] == [folder.read(i) for i in range(len(folder))]


def test_validation_ids_are_not_positions_among_the_wnids(forms):
    """The costliest mistake: ids taken for labels give 0.1 % accuracy."""
    source = open_source(forms["ilsvrc-tar"], "val")
    labels = {source.item(i)[0].partition("/")[2]: source.item(i)[1] for i in range(len(source))}
    with tarfile.open(forms["ilsvrc-tar"] / "ILSVRC2012_devkit_t12.tar.gz") as tar:
        truth = tar.extractfile("ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt").read().split()
    by_id = [int(number) - 1 for number in truth]
    assert by_id != [labels[name] for name in sorted(labels)]
    assert [IDS[WNIDS[labels[name]]] - 1 for name in sorted(labels)] == by_id


def test_the_index_of_a_tar_is_kept_and_made_anew_when_the_tar_changes(forms, tmp_path, monkeypatch):
    root = shutil.copytree(forms["ilsvrc-tar"], tmp_path / "tars")
    open_source(root, "train", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(tars, "_members", None)
        assert len(open_source(root, "train", tmp_path / "out")) == 22
    os.utime(root / "ILSVRC2012_img_train.tar", ns=(1, 1))
    (tmp_path / "out" / "train.tar-index.npz").write_bytes(b"PK damaged")
    assert len(open_source(root, "train", tmp_path / "out")) == 22


def spoil(name):
    """What goes wrong with a form: changes a copy of it."""

    def cut_tar(root):
        path = root / "ILSVRC2012_img_train.tar"
        os.truncate(path, path.stat().st_size * 2 // 3)

    def cut_inside_a_class(root):
        path = root / "ILSVRC2012_img_val.tar"
        os.truncate(path, 3000)

    def no_devkit(root):
        (root / "ILSVRC2012_devkit_t12.tar.gz").unlink()

    def damaged_devkit(root):
        (root / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(b"<html>log in</html>")

    def lost_shard(root):
        (root / "data" / "train-00001-of-00003.parquet").unlink()

    def damaged_shard(root):
        path = root / "data" / "train-00001-of-00003.parquet"
        os.truncate(path, path.stat().st_size // 2)

    def shuffled_labels(root):
        shutil.rmtree(root)
        make_parquet(root, make_images(), labels=dict(zip(WNIDS, (1, 0, 2, 3, 4), strict=True)))

    def no_columns(root):
        table = pa.table({"picture": [b"1"], "label": [0]})
        parquet.write_table(table, root / "data" / "train-00001-of-00003.parquet")

    def no_csv(root):
        (root / "LOC_val_solution.csv").unlink()

    def other_csv(root):
        (root / "LOC_val_solution.csv").write_text("a,b\n1,2\n")

    def unknown_image(root):
        write(root / "ILSVRC" / "Data" / "CLS-LOC" / "val" / "ILSVRC2012_val_00000099.JPEG", picture(1))

    def lost_class(root):
        shutil.rmtree(root / "ILSVRC" / "Data" / "CLS-LOC" / "train" / "n02012849")

    return locals()[name]


@pytest.mark.parametrize(
    ("form", "name", "problem"),
    [
        ("ilsvrc-tar", "cut_tar", "ILSVRC2012_img_train.tar is damaged or incomplete"),
        ("ilsvrc-tar", "cut_inside_a_class", "ILSVRC2012_img_val.tar is damaged or incomplete"),
        ("ilsvrc-tar", "no_devkit", "labels of the validation images are in"),
        ("ilsvrc-tar", "damaged_devkit", "cannot read data/meta.mat"),
        ("parquet", "lost_shard", "2 of the 00003 parquet files of train"),
        ("parquet", "damaged_shard", "train-00001-of-00003.parquet cannot be read"),
        ("parquet", "shuffled_labels", "does not order the classes as their wnids do"),
        ("parquet", "no_columns", "train-00001-of-00003.parquet cannot be read"),
        ("kaggle", "no_csv", "LOC_val_solution.csv"),
        ("kaggle", "other_csv", "no columns ImageId and PredictionString"),
        ("kaggle", "unknown_image", "ILSVRC2012_val_00000099.JPEG has no class"),
        ("kaggle", "lost_class", "class n02012849 is in val but not in train"),
    ],
)
def test_what_is_missing_or_damaged_is_one_clear_line(forms, form, name, problem, tmp_path):
    root = shutil.copytree(forms[form], tmp_path / "root")
    spoil(name)(root)
    with pytest.raises(RunError, match=problem):
        [write_dataset.plan(settings(root, tmp_path / "out"), split) for split in ("train", "val")]


def test_counts_are_those_of_imagenet_where_it_should_be_imagenet(forms, monkeypatch):
    source = open_source(forms["kaggle"], "train")
    imagenet.check_counts(source, "train", "auto")
    with pytest.raises(RunError, match="22 images of 5 classes, and ImageNet-1k has 1281167 of 1000"):
        imagenet.check_counts(source, "train", "imagenet")
    monkeypatch.setattr(imagenet, "NEARLY_ALL", 5)
    with pytest.raises(RunError, match="source.counts=any"):
        imagenet.check_counts(source, "train", "auto")
    imagenet.check_counts(source, "train", "any")
    monkeypatch.setattr(imagenet, "CLASSES", 5)
    monkeypatch.setattr(imagenet, "COUNTS", {"train": 22, "val": 10})
    with pytest.raises(RunError, match="its 5 classes are not those of ImageNet-1k"):
        imagenet.check_counts(source, "train", "auto")
    monkeypatch.setattr(imagenet, "IMAGENET_WNIDS_SHA256", hashlib.sha256("\0".join(WNIDS).encode()).hexdigest())
    monkeypatch.setattr(listing, "imagenet_names", lambda wnids: {})
    for form in FORMS:
        for split in ("train", "val"):
            imagenet.check_counts(open_source(forms[form], split), split, "imagenet")


def test_kaggles_own_list_names_what_is_missing(forms, tmp_path):
    root = shutil.copytree(forms["kaggle"], tmp_path / "root")
    data = root / "ILSVRC" / "Data" / "CLS-LOC"
    (data / "train" / "n01440764" / "n01440764_10.JPEG").unlink()
    (data / "val" / "ILSVRC2012_val_00000003.JPEG").unlink()
    for split, problem in (("train", "1 of 22 images in .*n01440764/n01440764_10.JPEG first"), ("val", "_00000003")):
        with pytest.raises(RunError, match=problem):
            imagenet.check_counts(open_source(root, split), split, "imagenet")


def test_the_flagship_conversion_insists_on_all_of_imagenet(forms, tmp_path):
    config = Path(write_dataset.__file__).parent / "rn50_configs" / "write_imagenet.yaml"
    done = convert(forms["imagefolder"], tmp_path, "--config-file", config, status=1)
    assert "error: train in" in done.stderr
    assert "is not all of ImageNet-1k: 22 images of 5 classes" in done.stderr


def test_all_of_imagenet_has_names_for_people_in_every_form(tmp_path):
    """torchvision's names go by position; ImageNet-1k's wnids are known to rn50 by their checksum alone."""
    names = imagenet.imagenet_names([str(k) for k in range(1000)])
    assert len(set(names.values())) == 1000
    assert [names[str(k)] for k in (0, 134, 217, 517, 638, 639, 701, 998)] == [
        "tench", "crane bird", "English springer", "crane", "maillot", "maillot tank suit", "parachute", "ear"
    ]  # fmt: skip
    assert not imagenet.is_imagenet(IMAGENETTE_NAMES)


def test_a_tree_of_all_of_imagenet_gets_its_names(tmp_path, monkeypatch):
    for k in range(1000):
        write(tmp_path / "train" / f"n{k:08d}" / "1.JPEG", b"")
    assert open_source(tmp_path, "train").classes[1]["name"] == "n00000001"
    wnids = "\0".join(f"n{k:08d}" for k in range(1000))
    monkeypatch.setattr(imagenet, "IMAGENET_WNIDS_SHA256", hashlib.sha256(wnids.encode()).hexdigest())
    assert open_source(tmp_path, "train").classes[1] == {"wnid": "n00000001", "name": "goldfish"}


def test_the_odd_validation_image_is_named(tmp_path):
    """ILSVRC2012_val_00019877 is CMYK, and no published list of such files has it."""
    write(tmp_path / "val" / "n13133613" / "ILSVRC2012_val_00019877.JPEG", picture(1, mode="CMYK"))
    odd = imagenet.odd_images(open_source(tmp_path, "val"))
    assert odd == [("n13133613/ILSVRC2012_val_00019877.JPEG", "CMYK")]


def test_kaggles_validation_images_may_lie_in_class_folders(forms, tmp_path):
    """What people's valprep.sh leaves."""
    root = shutil.copytree(forms["kaggle"], tmp_path / "root")
    folder = root / "ILSVRC" / "Data" / "CLS-LOC" / "val"
    for wnid, listed in make_images()["val"].items():
        for name in listed:
            (folder / wnid).mkdir(exist_ok=True)
            (folder / name).rename(folder / wnid / name)
    source, flat = open_source(root, "val"), open_source(forms["kaggle"], "val")
    assert (source.digest(), source.classes) == (flat.digest(), flat.classes)
    assert [source.read(i) for i in range(len(source))] == [flat.read(i) for i in range(len(flat))]
    assert sources.split_classes(root, "val") == set(WNIDS)


def test_tars_beside_folders_without_class_folders_are_read(forms, tmp_path):
    """Folders made for unpacking, or images unpacked flat."""
    root = shutil.copytree(forms["ilsvrc-tar"], tmp_path / "root")
    write(root / "val" / "ILSVRC2012_val_00000001.JPEG", picture(1))
    (root / "train").mkdir()
    for split in ("train", "val"):
        assert open_source(root, split).kind == "ilsvrc-tar"
        assert sources.split_classes(root, split) == set(WNIDS)


@pytest.mark.parametrize("filler", [b"\0", b"\xa5"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_tar_with_its_end_still_to_come_is_not_taken_for_a_small_one(forms, tmp_path, split, filler):
    """Downloaders that reserve the final size leave zeros, which end a tar like any other."""
    root = shutil.copytree(forms["ilsvrc-tar"], tmp_path / "root")
    path = root / f"ILSVRC2012_img_{split}.tar"
    with tarfile.open(path) as tar:
        cut = tar.getmembers()[2].offset
    data = path.read_bytes()
    path.write_bytes(data[:cut] + filler * (2 << 20))
    with pytest.raises(RunError, match="damaged or incomplete .*nothing readable after"):
        open_source(root, split)
    if split == "train":
        with pytest.raises(RunError, match="damaged or incomplete"):
            sources.split_classes(root, split)


def test_an_inner_tar_with_its_end_still_to_come_is_not_taken_for_a_small_one(tmp_path):
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w") as tar:
        for k in range(4):
            add(tar, f"n01440764_{k}.JPEG", bytes([k + 1]) * (1 << 20))
    path = tmp_path / "ILSVRC2012_img_train.tar"
    with tarfile.open(path, "w") as outer:
        add(outer, "n01440764.tar", inner.getvalue())
    assert len(open_source(tmp_path, "train")) == 4
    with open(path, "r+b") as file:
        file.seek(512 + 2 * (512 + (1 << 20)))  # the header of the third image
        file.write(bytes(512))
    with pytest.raises(RunError, match="damaged or incomplete .*nothing readable after"):
        open_source(tmp_path, "train")


def test_what_macos_adds_to_tars_is_left_out(forms, tmp_path):
    root = shutil.copytree(forms["ilsvrc-tar"], tmp_path / "root")
    with tarfile.open(root / "ILSVRC2012_img_train.tar", "a") as tar:
        add(tar, "._n01440764.tar", b"Mac OS X" * 100)
        add(tar, ".DS_Store", b"Bud1" * 100)
    source = open_source(root, "train")
    assert (len(source), source.ignored) == (22, {"hidden": 2})
    assert sources.split_classes(root, "train") == set(WNIDS)


def test_flat_validation_images_without_labels_are_refused_with_what_is_supported(forms, tmp_path):
    shutil.copytree(forms["kaggle"] / "ILSVRC" / "Data" / "CLS-LOC", tmp_path / "CLS-LOC")
    with pytest.raises(
        RunError, match=r"unsorted validation images.*devkit_t12.*LOC_val_solution.csv.* into .*CLS-LOC$"
    ):
        open_source(tmp_path / "CLS-LOC", "val")
