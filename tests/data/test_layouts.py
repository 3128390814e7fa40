"""rn50/data/sources.py: folders as people have them are read as the trees they stand for, or one line says why not."""

import io
import os
import pickle
import re
import shutil
import tarfile
import tempfile
from pathlib import Path

import pytest
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS, ImageFolder

import write_dataset
from rn50.data import listing, sources
from rn50.data.pictures import decode_image
from rn50.data.sources import open_source, split_classes
from rn50.data.verify import verify
from rn50.errors import RunError, UsageError
from tests.data.test_imagenet import WNIDS, WORDS, make_images, make_kaggle, make_tars, picture, settings, write

DEVKIT = "ILSVRC2012_devkit_t12"
CLS_LOC = "ILSVRC/Data/CLS-LOC"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with the same miniature set as a tree, as the site's tars and as Kaggle's download."""
    root, images = tmp_path_factory.mktemp("made"), make_images()
    for split, classes in images.items():
        for wnid, listed in classes.items():
            for name, data in listed.items():
                write(root / "tree" / split / wnid / name, data)
    make_tars(root / "tars", images)
    (root / "kaggle").mkdir()
    make_kaggle(root / "kaggle", images)
    return root


def copy(made, root, *, train="tree/train", val="tree/val"):
    for split, place in (("train", train), ("val", val)):
        if place:
            shutil.copytree(made / place, root / split)


def extract(tar, folder):
    tar.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.4 and later
    tar.extractall(folder)


def unpack_val(made, folder):
    folder.mkdir(parents=True)
    with tarfile.open(made / "tars/ILSVRC2012_img_val.tar") as tar:
        extract(tar, folder)


def unpack_outer(made, folder):
    folder.mkdir(parents=True)
    with tarfile.open(made / "tars/ILSVRC2012_img_train.tar") as tar:
        extract(tar, folder)


def unpack_devkit(made, folder):
    with tarfile.open(made / f"tars/{DEVKIT}.tar.gz") as tar:
        extract(tar, folder)


def flat_val_with_devkit(made, root):
    copy(made, root, val=None)
    unpack_val(made, root / "val")
    shutil.copy(made / f"tars/{DEVKIT}.tar.gz", root)


def val_tars_own_folder(made, root):
    copy(made, root, val=None)
    unpack_val(made, root / "val/ILSVRC2012_img_val")
    unpack_devkit(made, root)
    return root


def devkit_among_the_images(made, root):
    copy(made, root, val=None)
    unpack_val(made, root / "val")
    unpack_devkit(made, root / "val")


def devkit_files_alone(made, root):
    copy(made, root, val=None)
    unpack_val(made, root / "validation/val/images")
    unpack_devkit(made, root)
    for path in (root / DEVKIT / "data").iterdir():
        path.rename(root / path.name)


def flat_val_with_kaggles_table(made, root):
    copy(made, root, val=f"kaggle/{CLS_LOC}/val")
    shutil.copy(made / "kaggle/LOC_val_solution.csv", root)


def kaggles_inner_folder(made, root):
    shutil.copytree(made / "kaggle", root, dirs_exist_ok=True)
    return root / CLS_LOC


def inner_tars(made, root):
    copy(made, root, train=None)
    unpack_outer(made, root / "train")


def inner_tars_in_their_own_folder(made, root):
    copy(made, root, train=None)
    unpack_outer(made, root / "train/ILSVRC2012_img_train")


def tars_in_the_splits_folders(made, root):
    for split in ("train", "val"):
        (root / split).mkdir(parents=True)
        shutil.copy(made / f"tars/ILSVRC2012_img_{split}.tar", root / split)
    shutil.copy(made / f"tars/{DEVKIT}.tar.gz", root / "val")


def one_level_more(made, root):
    shutil.copytree(made / "tree/train", root / "train/train")
    shutil.copytree(made / "tree/val", root / "val/images")


def the_same_level_more_in_both(made, root):
    shutil.copytree(made / "tree/train", root / "train/data")
    shutil.copytree(made / "tree/val", root / "val/data")


def flat_train(made, root):
    copy(made, root, train=None)
    (root / "train").mkdir()
    for path in (made / "tree/train").glob("*/*"):
        shutil.copy(path, root / "train")


def other_names(made, root):
    copy(made, root)
    (root / "train").rename(root / "Training")
    (root / "val").rename(root / "VALID")


def names_of_the_tars_and_of_hugging_face(made, root):
    unpack_outer(made, root / "ILSVRC2012_img_train")
    for path in (made / "tree/val").glob("*/*"):
        write(root / "val_images" / path.name, path.read_bytes())
    shutil.copy(made / f"tars/{DEVKIT}.tar.gz", root)


def a_tar_beside_its_half_unpacked_folder(made, root):
    shutil.copytree(made / "tars", root)
    write(root / "ILSVRC2012_img_train/n01440764/1.JPEG", b"")


def the_exact_name_beside_another(made, root):
    copy(made, root)
    write(root / "validation/cat/1.jpg", b"")


def what_systems_leave(made, root):
    copy(made, root)
    for place in ("train/__MACOSX/._n01440764", "val/lost+found/x.jpg", "val/n01440764/@eaDir/x.JPEG", "val/.DS_Store"):
        write(root / place, b"")


LAYOUTS = (
    flat_val_with_devkit,
    val_tars_own_folder,
    devkit_among_the_images,
    devkit_files_alone,
    flat_val_with_kaggles_table,
    kaggles_inner_folder,
    inner_tars,
    inner_tars_in_their_own_folder,
    tars_in_the_splits_folders,
    one_level_more,
    the_same_level_more_in_both,
    flat_train,
    other_names,
    names_of_the_tars_and_of_hugging_face,
    a_tar_beside_its_half_unpacked_folder,
    the_exact_name_beside_another,
    what_systems_leave,
)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_a_layout_is_read_as_the_tree_that_it_stands_for(made, layout, tmp_path, monkeypatch):
    root = layout(made, tmp_path / "root") or tmp_path / "root"
    monkeypatch.chdir(root)  # a relative source.dir as well
    for split in ("train", "val"):
        expected = open_source(made / "tree", split)
        source = pickle.loads(pickle.dumps(open_source(".", split, tmp_path / "cache")))
        assert [source.item(i) for i in range(len(source))] == [expected.item(i) for i in range(len(expected))]
        assert [source.read(i) for i in range(len(source))] == [expected.read(i) for i in range(len(expected))]
        assert source.digest() == open_source(root, split, tmp_path / "cache").digest() == expected.digest()
        assert split_classes(root, split) == set(WNIDS)
        assert source.missing() is None
        if source.kind != "ilsvrc-tar":
            assert all(os.path.isfile(source.place(source.item(i)[0])) for i in range(len(source)))
        assert len(write_dataset.plan(settings(root, tmp_path / "out"), split).order) == len(expected)


def test_flat_images_and_inner_tars_become_the_same_betons(made, tmp_path):
    root = tmp_path / "root"
    flat_val_with_devkit(made, root)
    shutil.rmtree(root / "train")
    unpack_outer(made, root / "train")
    for source, out in ((made / "tree", tmp_path / "expected"), (root, tmp_path / "made")):
        for split in ("train", "val"):
            job = write_dataset.plan(settings(source, out), split)
            write_dataset.convert(job, workers=1, skip_corrupt=False, later={})
    for name in ("train_48.beton", "val_70.beton"):
        assert (tmp_path / "made" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()
        assert verify(tmp_path / "made" / name)[1] == []


def test_what_lies_deeper_in_a_class_is_what_torchvision_finds_there(tmp_path):
    """Order too: folder by folder, and a link to a folder is followed."""
    names = (
        "a/2.jpg",
        "a/10.jpg",
        "a/b-c/1.jpg",
        "a/b/1.jpg",
        "a/b/d/0.jpg",
        "a/a.jpg/1.jpg",
        "c/images/x/1.png",
        "d/1.jpg",
    )
    for name in names:
        write(tmp_path / "train" / name, name.encode())
    write(tmp_path / "elsewhere/7.jpg", b"7")
    (tmp_path / "train/d/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "train/d/8.jpg").symlink_to(tmp_path / "elsewhere/7.jpg")
    source = pickle.loads(pickle.dumps(open_source(tmp_path, "train")))
    found = [(source.place(source.item(i)[0]), source.item(i)[1]) for i in range(len(source))]
    assert found == ImageFolder(tmp_path / "train").samples
    assert source.read(source.find(0, "0.jpg")) == b"a/b/d/0.jpg"
    assert len(found) == 10


def test_links_in_a_circle_and_to_nothing_are_one_line(tmp_path):
    root = tmp_path / "train"
    for name in "abc":
        write(root / name / "1.jpg", b"")
    link = root / "a" / "link"

    def refused(problem):
        with pytest.raises(RunError, match=problem) as caught:
            open_source(tmp_path, "train")
        assert str(tmp_path) in str(caught.value)

    for target in (".", "..", "/", str(tmp_path)):
        link.symlink_to(target)
        refused("a/link is a link to .*, a folder above it")
        link.unlink()
    link.symlink_to("../b")
    assert len(open_source(tmp_path, "train")) == 4
    (root / "b" / "link").symlink_to("../a")
    refused("link is a link to .*, a folder above it")
    (root / "b" / "link").unlink()
    (root / "a" / "2.jpg").symlink_to("/mnt/gone/2.jpg")
    refused("a/2.jpg is a link to /mnt/gone/2.jpg, which is not there")
    (root / "a" / "2.jpg").unlink()
    (root / "d").symlink_to("/mnt/gone/d")
    refused("train/d is a link to /mnt/gone/d, which is not there")
    (root / "d").unlink()
    (root / "d").symlink_to("d")
    refused("d, a link to d: Too many levels of symbolic links")


@pytest.fixture
def tiny(tmp_path):
    """tiny-imagenet-200 as its archive unpacks, in miniature."""
    root = tmp_path / "tiny-imagenet-200"
    for wnid in WNIDS:
        write(root / "train" / wnid / f"{wnid}_boxes.txt", b"...")
        for k in range(3):
            write(root / "train" / wnid / "images" / f"{wnid}_{k}.JPEG", picture(k))
    rows = [(f"val_{k}.JPEG", WNIDS[(3 * k) % 5]) for k in range(12)]
    for k, (name, _) in enumerate(rows):
        write(root / "val/images" / name, picture(k))
        write(root / "test/images" / name.replace("val", "test"), picture(k))
    lines = "".join(f"{name}\t{wnid}\t0\t32\t44\t62\n" for name, wnid in rows)
    write(root / "val/val_annotations.txt", lines.encode())
    write(root / "words.txt", "".join(f"{wnid}\t{words}\n" for wnid, words in WORDS.items()).encode())
    write(root / "wnids.txt", "\n".join(reversed(WNIDS)).encode())
    return root


def test_tiny_imagenet_is_read_as_it_unpacks(tiny, tmp_path, capsys):
    train, val = (open_source(tiny, split) for split in ("train", "val"))
    assert train.item(0) == ("n01440764/images/n01440764_0.JPEG", 0)
    assert train.classes == val.classes
    assert train.classes[1] == {"wnid": "n02012849", "name": "crane (n02012849)"}
    assert {val.item(i) for i in range(12)} == {(f"{WNIDS[(3 * k) % 5]}/val_{k}.JPEG", (3 * k) % 5) for k in range(12)}
    assert val.read(val.find(0, "val_5.JPEG")) == picture(5)
    jobs = [write_dataset.plan(settings(tiny, tmp_path / "out"), split) for split in ("train", "val")]
    assert [len(job.order) for job in jobs] == [15, 12]
    assert "train: ignoring 5 entries that are no images of a class: 5 .txt" in capsys.readouterr().out
    (tiny / "val/images/val_3.JPEG").unlink()
    assert open_source(tiny, "val").missing().endswith("val_annotations.txt are missing, val_3 first")
    write(tiny / "val/val_annotations.txt", b"val_0.JPEG\n")
    with pytest.raises(RunError, match="val_annotations.txt has not an image and its class in each line"):
        open_source(tiny, "val")


def nothing(root):
    pass


def a_file(root):
    root.write_bytes(b"")


def train_is_a_file(root):
    write(root / "train", b"")


def train_is_a_link_to_nothing(root):
    root.mkdir()
    (root / "train").symlink_to("/mnt/gone")


def classes_without_splits(root):
    write(root / "cat/1.jpg", b"")
    write(root / "dog/1.jpg", b"")


def deeper(root):
    write(root / "data/imagenet/train/cat/1.jpg", b"")
    write(root / "data/imagenet/val/cat/1.jpg", b"")


def the_folder_above_kaggles(root):
    write(root / "x/ILSVRC/Data/CLS-LOC/train/n01440764/1.jpg", b"")


def packed(root):
    write(root / "tiny-imagenet-200.zip", b"PK")


def tars_at_the_top(root):
    write(root / "n01440764.tar", b"")
    write(root / "ILSVRC2012_devkit_t12.tar.gz", b"")


def devkit_alone(root):
    write(root / "ILSVRC2012_devkit_t12.tar.gz", b"")


def images_at_the_top(root):
    write(root / "ILSVRC2012_val_00000001.JPEG", b"")


def train_alone(root):
    write(root / "train/cat/1.jpg", b"")
    write(root / "validation.txt", b"")


def two_names_for_val(root):
    write(root / "train/cat/1.jpg", b"")
    write(root / "valid/cat/1.jpg", b"")
    write(root / "Validation/cat/1.jpg", b"")


def unsorted(root):
    write(root / "train/n01440764/1.jpg", b"")
    write(root / "val/images/ILSVRC2012_val_00000001.JPEG", b"")


def unsorted_and_no_imagenet(root):
    write(root / "train/cat/1.jpg", b"")
    write(root / "val/images/1.jpg", b"")


def half_sorted(root):
    write(root / "val/n01440764/ILSVRC2012_val_00000001.JPEG", b"")
    write(root / "val/ILSVRC2012_val_00000002.JPEG", b"")


def half_unpacked(root):
    write(root / "train/n01440764/1.JPEG", b"")
    write(root / "train/n01440764.tar", b"")
    write(root / "train/n01443537.tar", b"")


def heic_alone(root):
    for name in ("cat/1.jpg", "dog/1.HEIC", "dog/2.heic", "dog/notes.txt"):
        write(root / "train" / name, b"")


def system_files_alone(root):
    write(root / "train/__MACOSX/cat/._1.jpg", b"")


def damaged_ground_truth(root):
    write(root / "val/ILSVRC2012_val_00000001.JPEG", b"")
    write(root / DEVKIT / "data/ILSVRC2012_validation_ground_truth.txt", b"<html>")
    shutil.copy(root.parent / "meta.mat", root / DEVKIT / "data")


def betons(root):
    write(root / "train_400.beton", b"\2\0")


def damaged_inner_tar(root):
    write(root / "train/n01440764.tar", b"not a tar" * 100)


@pytest.mark.parametrize(
    ("layout", "split", "problem"),
    [
        (nothing, "train", "ROOT does not exist; source.dir is the folder of train/ and val/"),
        (a_file, "train", "ROOT is no folder; source.dir is"),
        (train_is_a_file, "train", "cannot read ROOT/train: Not a directory"),
        (train_is_a_link_to_nothing, "train", "cannot read ROOT/train, a link to /mnt/gone: No such file"),
        (classes_without_splits, "train", r"it holds classes \(cat, dog, ...\): move them into ROOT/train, or share"),
        (deeper, "train", "they are deeper; give source.dir=ROOT/data/imagenet$"),
        (deeper, "val", "they are deeper; give source.dir=ROOT/data/imagenet$"),
        (the_folder_above_kaggles, "train", "they are deeper; give source.dir=ROOT/x$"),
        (packed, "train", "no images of train in ROOT: unpack tiny-imagenet-200.zip, or expected ROOT/train/<class>"),
        (tars_at_the_top, "train", "move n01440764.tar and the other tars of classes into ROOT/train$"),
        (devkit_alone, "train", "no images of train in ROOT: expected ROOT/train/<class>/<image>, or ILSVRC2012_img"),
        (images_at_the_top, "val", "move ILSVRC2012_val_00000001.JPEG and the other validation images into ROOT/val$"),
        (train_alone, "val", "expected ROOT/val/<class>/<image>.*; or convert train alone with source.splits=train"),
        (two_names_for_val, "val", "ROOT has the folders Validation and valid: rename the one that is meant to val"),
        (unsorted, "val", f"ROOT/val/images holds unsorted .* put {DEVKIT}.* LOC_val_solution.csv.* into ROOT/val$"),
        (unsorted_and_no_imagenet, "val", "ROOT/val/images holds images .1.jpg. but no class folders.*sort them into"),
        (half_sorted, "val", "ROOT/val/ILSVRC2012_val_00000002.JPEG lies beside the class folders: finish sorting"),
        (half_unpacked, "train", r"ROOT/train/n01443537.tar is not unpacked, as other classes are: run, there, for t"),
        (heic_alone, "train", r"ROOT/train/dog holds no images \(2 .heic, 1 .txt\); fill or remove it"),
        (system_files_alone, "train", r"ROOT/train holds no class folders \(1 folders\); expected ROOT/train/<class>/"),
        (damaged_ground_truth, "val", "ground_truth.txt of ILSVRC2012_devkit_t12 is damaged"),
        (damaged_inner_tar, "train", "ROOT/train/n01440764.tar is damaged or incomplete"),
        (betons, "train", "ROOT: it holds .beton files already; train_imagenet.py takes it as data.dir$"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)  # fmt: skip
def test_what_cannot_be_read_is_one_line_with_the_folder_and_the_remedy(made, layout, split, problem, tmp_path):
    unpack_devkit(made, tmp_path)
    (tmp_path / DEVKIT / "data/meta.mat").rename(tmp_path / "meta.mat")
    shutil.rmtree(tmp_path / DEVKIT)
    root = tmp_path / "root"
    layout(root)
    with pytest.raises(RunError, match=problem.replace("ROOT", re.escape(str(root)))) as caught:
        open_source(root, split)
    assert "\n" not in str(caught.value)


def test_the_folder_of_a_split_given_as_the_whole_is_named(made, tmp_path, monkeypatch):
    copy(made, tmp_path)
    monkeypatch.chdir(tmp_path / "train")
    for given in (".", tmp_path / "train", tmp_path / "val"):
        with pytest.raises(RunError, match=f"give the folder above it: source.dir={tmp_path}$"):
            open_source(given, "train")
    (a_class,) = sorted((tmp_path / "train").iterdir())[:1]
    with pytest.raises(RunError, match=f"it is a class of a split; give the folder above both: source.dir={tmp_path}$"):
        open_source(a_class, "train")


def test_a_class_of_the_other_split_is_no_extra_level(tmp_path):
    for name in ("train/cat/1.jpg", "train/dog/1.jpg", "val/cat/1.jpg"):
        write(tmp_path / name, b"")
    assert open_source(tmp_path, "val").item(0) == ("cat/1.jpg", 0)
    with pytest.raises(RunError, match=rf"class dog is in train but not in val of {tmp_path}; the labels"):
        write_dataset.plan(settings(tmp_path, tmp_path / "out"), "val")
    write(tmp_path / "train/emu/1.jpg", b"")
    with pytest.raises(RunError, match=r"class dog is in train but not in val .* \(1 more classes differ\)"):
        write_dataset.plan(settings(tmp_path, tmp_path / "out"), "train")


@pytest.mark.parametrize("splits", ["train,validation", "Val", "training", "..", "."])
def test_splits_have_the_names_that_training_looks_for(splits):
    cfg = settings("x", "y")
    cfg.source.splits = splits
    with pytest.raises(UsageError, match=r"say (train|val), which finds|must be different folder names"):
        write_dataset._splits(cfg)


def test_names_of_any_bytes_and_length_are_read(tmp_path):
    long = "x" * 251 + ".jpg"
    names = [os.fsdecode(b"\xff\xfe"), "two\nlines", "ü ö", "#1", "-rf", "c" * 255]
    for name in names:
        write(tmp_path / "train" / name / name[:40] / long, b"here")
    source = pickle.loads(pickle.dumps(open_source(tmp_path, "train")))
    assert [c["wnid"] for c in source.classes] == sorted(names)
    assert {source.item(i)[0] for i in range(len(source))} == {f"{name}/{name[:40]}/{long}" for name in names}
    assert {source.read(i) for i in range(len(source))} == {b"here"}


def test_a_folder_that_may_not_be_read_is_named():
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        root.chmod(0o755)
        write(root / "train/cat/1.jpg", b"")
        for closed in (root / "train/cat", root / "train", root):
            closed.chmod(0)
            user = os.geteuid()
            os.seteuid(user or 65534)  # root may read everything
            try:
                with pytest.raises(RunError, match="cannot read .*: Permission denied") as caught:
                    open_source(root, "train")
            finally:
                os.seteuid(user)
                closed.chmod(0o755)
            assert f"{closed}:" in str(caught.value)


def test_a_folder_is_listed_once_and_no_file_is_asked_for_by_itself(tmp_path, monkeypatch):
    """1.28 million files: what each costs is what a conversion's start costs."""
    for name in ("a", "b"):
        for k in range(20):
            write(tmp_path / "train" / name / f"{k}.jpg", b"")
    listed, asked = [], []
    scan, stat = os.scandir, os.stat
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(str(path)) or scan(path))
    monkeypatch.setattr(os, "stat", lambda path, **more: asked.append(str(path)) or stat(path, **more))
    listing.ImageFolderSource(tmp_path / "train")
    assert len(listed) == 3
    assert not [path for path in asked if path.endswith(".jpg")]
    sources.open_source(tmp_path, "train")
    assert not [path for path in asked if path.endswith(".jpg")]


def test_every_extension_is_of_pictures_that_are_read():
    """Those of torchvision, and what else Pillow reads."""
    assert {*IMG_EXTENSIONS, ".avif", ".gif"} <= listing.EXTENSIONS
    for extension in listing.EXTENSIONS:
        encoded = io.BytesIO()
        Image.new("L" if extension == ".pgm" else "RGB", (24, 16)).save(
            encoded, Image.registered_extensions()[extension]
        )
        assert decode_image(encoded.getvalue()).shape == (16, 24, 3), extension
