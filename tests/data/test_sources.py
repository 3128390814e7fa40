"""rn50/data/{listing,jpeg}.py: what an image folder yields, and that odd pictures come out as upright RGB."""

import glob
import io
import os
import pickle

import cv2
import numpy as np
import pytest
from PIL import Image

from rn50.data import listing
from rn50.data.pictures import decode_image
from rn50.data.sources import open_source
from rn50.errors import RunError


def picture(width=56, height=40):
    """Blocks of 8x8 in strong colours: JPEG keeps them nearly exactly, and every orientation looks different."""
    blocks = np.random.default_rng(0).integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(blocks.repeat(8, 0).repeat(8, 1))


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def make(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


def test_samples_are_sorted_and_labelled_by_class(tmp_path):
    make(tmp_path / "train", "b/2.JPEG", "b/10.jpg", "a/x.Png", "B/1.webp")
    source = open_source(tmp_path, "train")
    assert [source.item(i) for i in range(len(source))] == [("B/1.webp", 0), ("a/x.Png", 1), ("b/10.jpg", 2),
                                                            ("b/2.JPEG", 2)]  # fmt: skip
    assert source.kind == "imagefolder"
    assert [c["wnid"] for c in source.classes] == ["B", "a", "b"]
    assert source.read(2) == b"b/10.jpg"


def test_what_is_not_an_image_is_left_out_and_counted(tmp_path):
    make(tmp_path / "val", "a/1.jpg", "a/notes.TXT", "a/.hidden.jpg", "a/._1.jpg", "a/2.heic", ".cache/3.jpg", "x.jpg")
    make(tmp_path / "val", "__MACOSX/a/._1.jpg", "a/@eaDir/1.jpg", "lost+found/4.jpg", "a/Thumbs.db", "desktop.ini")
    make(tmp_path / "val", "$RECYCLE.BIN/1.jpg", "System Volume Information/1.jpg", "a/x/__MACOSX/1.jpg", "a/x/README")
    source = open_source(tmp_path, "val")
    assert [source.item(i)[0] for i in range(len(source))] == ["a/1.jpg"]
    assert source.ignored == {
        "folders": 6, "hidden": 3, "in no class's folder": 1, ".txt": 1, ".heic": 1, ".db": 1, ".ini": 1,
        "without extension": 1,
    }  # fmt: skip
    assert listing.describe(source.ignored) == "6 folders, 3 hidden, 1 .db, 1 .heic, ..."


def test_imagenette_folders_get_their_names_and_others_keep_the_folder_name(tmp_path):
    make(tmp_path / "train", "n01440764/1.jpg", "zebra/1.jpg")
    classes = open_source(tmp_path, "train").classes
    assert classes == [{"wnid": "n01440764", "name": "tench"}, {"wnid": "zebra", "name": "zebra"}]


def test_odd_file_names_survive(tmp_path):
    names = ["a/ü ö.jpg", "a/two\nlines.jpg", "a/" + os.fsdecode(b"\xff\xfe.jpg")]
    make(tmp_path / "train")
    for name in names:
        path = tmp_path / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"here")
    source = pickle.loads(pickle.dumps(open_source(tmp_path, "train")))
    assert {source.item(i)[0] for i in range(3)} == set(names)
    assert {source.read(i) for i in range(3)} == {b"here"}


def test_the_digest_follows_the_listing_and_not_the_place(tmp_path):
    for place in ("one", "two"):
        make(tmp_path / place / "train", "a/1.jpg", "b/1.jpg")
    digests = [open_source(tmp_path / place, "train").digest() for place in ("one", "two")]
    assert digests[0] == digests[1]
    make(tmp_path / "two" / "train", "b/2.jpg")
    assert open_source(tmp_path / "two", "train").digest() != digests[0]


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ([], "ILSVRC2012_img_train.tar, or ILSVRC/Data/CLS-LOC/train, or data/train-.*parquet"),
        (["train/readme.txt"], "no class folders"),
        (["train/a/1.jpg", "train/b/notes.txt"], "b holds no images"),
    ],
)
def test_a_folder_without_images_is_one_clear_line(tmp_path, files, problem):
    make(tmp_path, *files)
    with pytest.raises(RunError, match=problem) as caught:
        open_source(tmp_path, "train")
    assert str(tmp_path / "train") in str(caught.value)


def test_a_million_files_stay_small_in_every_worker(tmp_path):
    make(tmp_path / "train", *(f"n01440764/n01440764_{k:05d}.JPEG" for k in range(500)))
    assert len(pickle.dumps(open_source(tmp_path, "train"))) < 500 * 40


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_come_out_upright(kind, orientation):
    upright = np.asarray(picture())
    # What a camera held this way stores, written out independently of the code under test.
    stored = {
        1: upright,
        2: np.fliplr(upright),
        3: np.rot90(upright, 2),
        4: np.flipud(upright),
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    result = decode_image(encoded(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif, **options))
    assert result.shape == upright.shape
    assert result.flags.c_contiguous
    assert np.abs(result.astype(int) - upright).max() <= 4


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_every_kind_of_pixel_becomes_rgb(mode):
    original = picture()
    if mode == "I;16":
        gray = np.asarray(original.convert("L"))
        stored, expected = Image.fromarray(gray.astype(np.uint16) * 257), gray[:, :, None].repeat(3, 2)
    else:
        stored = original.convert(mode)
        expected = np.asarray(stored.convert("RGB"))
    # PNG cannot hold CMYK; PIL writes CMYK JPEG inverted, as Adobe does and as they are found in ImageNet.
    data = encoded(stored, "JPEG", quality=95) if mode == "CMYK" else encoded(stored, "PNG")
    result = decode_image(data)
    assert result.dtype == np.uint8
    assert result.shape == (40, 56, 3)
    assert np.abs(result.astype(int) - expected).max() <= 4


def test_sixteen_bit_colour_and_gray_jpeg():
    deep = np.asarray(picture()).astype(np.uint16) * 257
    data = cv2.imencode(".png", deep[:, :, ::-1])[1].tobytes()
    assert (decode_image(data) == deep >> 8).all()
    gray = decode_image(encoded(picture().convert("L"), "JPEG"))
    assert gray.shape == (40, 56, 3)
    assert (gray[:, :, 0] == gray[:, :, 2]).all()


@pytest.mark.parametrize("exif", [False, True])
@pytest.mark.parametrize("kept", [0.02, 0.3, 0.6, 0.9, 0.99])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_truncated_picture_is_an_error(kind, kept, exif):
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    orientation = Image.Exif()
    orientation[0x0112] = 6
    data = encoded(noise, kind, **({"exif": orientation} if exif else {}))
    assert decode_image(data).shape == (64, 64, 3)
    with pytest.raises(ValueError, match=r"\w"):
        decode_image(data[: int(len(data) * kept)])


def _jfif_revision(data):
    data[data.index(b"JFIF\0") + 5] = 2


def _adobe_transform(data):
    segment = b"\xff\xee\x00\x0eAdobe\x00\x64\0\0\0\0\x07"
    data[2 : data.index(b"\xff\xdb")] = segment


def _scan_parameters(data):
    scan = data.index(b"\xff\xda")
    data[scan + 6 + 2 * data[scan + 4]] = 0  # the last coefficient of a scan that has them all


def _stray_bytes(data):
    data[-2:-2] = b"abc"


@pytest.mark.parametrize("change", [_jfif_revision, _adobe_transform, _scan_parameters, _stray_bytes])
def test_oddities_that_pillow_and_opencv_pass_over_do_not_stop_a_conversion(change):
    plain = encoded(picture(), "JPEG")
    data = bytearray(plain)
    change(data)
    assert data != plain
    assert (decode_image(bytes(data)) == decode_image(plain)).all()


@pytest.mark.parametrize("part", [0.05, 0.3, 0.5, 0.9])
def test_a_picture_cut_in_its_header_does_not_spoil_the_next_ones(part):
    """libjpeg-turbo's decompressor stays inside a header that it could not read."""
    data = encoded(picture(), "JPEG")
    header = data[: int(data.index(b"\xff\xda") * part)]
    for cut in (header, header + b"\xff\xd9", header + bytes(2000)):
        with pytest.raises(ValueError, match=r"\w"):
            decode_image(cut)
        assert decode_image(data).shape == (40, 56, 3), cut


@pytest.mark.parametrize("data", [b"", b"not a picture", b"\xff\xd8", b"\xff\xd8\xff\xe0 JFIF", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_picture_is_an_error_that_reads_the_same_each_time(data):
    reasons = set()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"\w") as caught:
            decode_image(bytes(bytearray(data)))
        reasons.add(str(caught.value))
    assert len(reasons) == 1
    assert "0x" not in reasons.pop()


def test_damaged_exif_does_not_cost_the_picture():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = bytearray(encoded(picture(), "JPEG", exif=exif))
    at = data.index(b"Exif\0\0") + 6
    data[at : at + 8] = b"\xff" * 8
    assert decode_image(bytes(data)).shape == (40, 56, 3)


def test_an_impossible_size_is_refused_before_memory_is_taken():
    data = bytearray(encoded(picture(), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = b"\xff\x00\xff\x00"
    with pytest.raises(ValueError, match="4261 megapixels"):
        decode_image(bytes(data))


def test_real_images_decode_as_opencv_decodes_them():
    folder = os.environ.get("IMAGENET_SAMPLES_DIR")
    if not folder:
        pytest.skip("IMAGENET_SAMPLES_DIR is not set: no real ImageNet images here")
    files = sorted(glob.glob(os.path.join(folder, "*.JPEG")))
    assert files
    for file in files[::10]:
        with open(file, "rb") as handle:
            data = handle.read()
        expected = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[:, :, ::-1]
        assert (decode_image(data) == expected).all(), file
        with pytest.raises(ValueError, match=r"\w"):
            decode_image(data[: len(data) * 2 // 3])
