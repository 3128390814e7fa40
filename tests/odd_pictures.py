"""Pictures as people have them, made afresh, and what each must come to: python -m tests.odd_pictures FOLDER

docs/pictures.md says why each is read or refused.
"""

import gzip
import io
import struct
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms

from tests import bombs, odd_jpeg

WIDTH, HEIGHT = 61, 45  # odd, so that every block size and sampling ends in mid-block
ORIENTATION = 0x0112


class Odd(NamedTuple):
    """shown: uint8 [height, width, 3] that must come out, within `near` grey levels on average; None where `refused`, a
    regular expression, says how it must be refused. page: whether the page takes the format."""

    data: bytes
    shown: np.ndarray | None = None
    near: float = 0.5
    refused: str = ""
    page: bool = True


def picture(seed=0, width=WIDTH, height=HEIGHT):
    """Smooth colours that look different in every orientation: uint8 [height, width, 3]."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def encoded(image, kind, **options):
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, kind, **options)
    return file.getvalue()


def stored(upright, orientation):
    """What a camera stores that was held so, written independently of the code under test."""
    return np.ascontiguousarray(
        {
            1: lambda p: p,
            2: np.fliplr,
            3: lambda p: np.rot90(p, 2),
            4: np.flipud,
            5: lambda p: p.transpose(1, 0, 2),
            6: lambda p: np.rot90(p, 1),
            7: lambda p: np.rot90(p, 2).transpose(1, 0, 2),
            8: lambda p: np.rot90(p, -1),
        }[orientation](upright)
    )


def exif(orientation):
    data = Image.Exif()
    data[ORIENTATION] = orientation
    return data


def xmp(text):
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" {text}</rdf:Description></rdf:RDF></x:xmpmeta>'
    ).encode()


def png_chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(depth, colour, rows, *, after_header=b""):
    """rows: bytes of each; colour: PNG's colour type."""
    width = {0: 1, 2: 3, 4: 2, 6: 4}[colour] * depth // 8
    header = struct.pack(">IIBBBBB", len(rows[0]) // width, len(rows), depth, colour, 0, 0, 0)
    packed = zlib.compress(b"".join(b"\0" + row for row in rows))
    return (
        b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + after_header
        + png_chunk(b"IDAT", packed) + png_chunk(b"IEND", b"")
    )  # fmt: skip


def sixteen(values, colour):
    return png(16, colour, [row.astype(">u2").tobytes() for row in values])


def orientations():
    upright = picture(1)
    lossless = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}, "AVIF": {"quality": 100}}
    for turn in range(1, 9):
        for kind in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF"):
            data = encoded(stored(upright, turn), kind, exif=exif(turn), **lossless.get(kind, {}))
            yield f"exif_{turn}.{kind.lower()}", Odd(data, upright, near=3, page=kind != "TIFF")
        for kind in ("JPEG", "PNG", "WEBP"):
            options = lossless.get(kind, {})
            text = xmp(f'tiff:Orientation="{turn}">')
            if kind == "PNG":
                data = encoded(stored(upright, turn), kind)
                content = b"XML:com.adobe.xmp\0\0\0\0\0" + text
                data = data[:33] + png_chunk(b"iTXt", content) + data[33:]
            else:
                data = encoded(stored(upright, turn), kind, xmp=text, **options)
            yield f"xmp_{turn}.{kind.lower()}", Odd(data, upright, near=3)
    exact = lossless["JPEG"]
    element = xmp("><tiff:Orientation>6</tiff:Orientation>")
    yield "xmp_element.jpeg", Odd(encoded(stored(upright, 6), "JPEG", xmp=element, **exact), upright, near=3)
    single = xmp("tiff:Orientation = '6'>")
    yield "xmp_quotes.jpeg", Odd(encoded(stored(upright, 6), "JPEG", xmp=single, **exact), upright, near=3)
    both = encoded(stored(upright, 6), "JPEG", exif=exif(6), xmp=xmp('tiff:Orientation="3">'), **exact)
    yield "exif_before_xmp.jpeg", Odd(both, upright, near=3)
    wild = encoded(upright, "JPEG", exif=exif(99), **exact)
    yield "exif_99.jpeg", Odd(wild, upright, near=3)
    broken = bytearray(encoded(upright, "JPEG", exif=exif(6), **exact))
    at = broken.index(b"Exif\0\0") + 6
    broken[at : at + 8] = b"\xff" * 8
    yield "exif_damaged.jpeg", Odd(bytes(broken), upright, near=3)


def jpegs():
    shown = picture(2)
    plain = encoded(shown, "JPEG", quality=95)
    progressive = encoded(shown, "JPEG", quality=95, progressive=True)
    gray = np.repeat(np.asarray(Image.fromarray(shown).convert("L"))[:, :, None], 3, 2)
    planes = odd_jpeg.ycc(shown)
    samplings = {
        "444": [(1, 1)] * 3, "420": [(2, 2), (1, 1), (1, 1)], "422": [(2, 1), (1, 1), (1, 1)],
        "440": [(1, 2), (1, 1), (1, 1)], "411": [(4, 1), (1, 1), (1, 1)], "441": [(1, 4), (1, 1), (1, 1)],
        "410": [(4, 2), (1, 1), (1, 1)], "mixed": [(2, 2), (1, 2), (2, 1)], "three": [(3, 1), (1, 1), (1, 1)],
        "fine_chroma": [(1, 1), (2, 2), (2, 2)], "all_tall": [(1, 2)] * 3, "tall_and_wide": [(2, 1), (1, 2), (1, 2)],
    }  # fmt: skip
    for name, factors in samplings.items():
        # how far coarse chroma is from the picture is the encoder's doing; a wrong reading is off by 30 and more
        yield f"sampling_{name}.jpeg", Odd(odd_jpeg.encode(planes, factors, jfif=True), shown, near=9)
    rgb = list(shown.astype(float).transpose(2, 0, 1))
    yield "rgb_by_its_ids.jpeg", Odd(odd_jpeg.encode(rgb, [(1, 1)] * 3, ids=b"RGB"), shown, near=2)
    yield "rgb_by_adobe.jpeg", Odd(odd_jpeg.encode(rgb, [(1, 1)] * 3, adobe=0), shown, near=2)
    inverse, black = odd_jpeg.ycc(255 - shown), np.full(shown.shape[:2], 255.0)
    for name, factors in (("444", [(1, 1)] * 4), ("420", [(2, 2), (1, 1), (1, 1), (2, 2)])):
        ycck = odd_jpeg.encode([*inverse, black], factors, adobe=2)
        yield f"ycck_{name}.jpeg", Odd(ycck, shown, near=5)
    cmyk = encoded(Image.fromarray(shown).convert("CMYK"), "JPEG", quality=95)
    yield "cmyk.jpeg", Odd(cmyk, shown, near=4)
    yield "gray.jpeg", Odd(encoded(gray[:, :, 0], "JPEG", quality=95), gray, near=2)
    gray_planes = [gray[:, :, 0].astype(float)]
    yield "gray_2x2.jpeg", Odd(odd_jpeg.encode(gray_planes, [(2, 2)]), gray, near=2)
    yield "restart.jpeg", Odd(encoded(shown, "JPEG", quality=95, restart_marker_blocks=2), shown, near=4)
    yield "progressive.jpeg", Odd(progressive, shown, near=4)
    yield "optimised.jpeg", Odd(encoded(shown, "JPEG", quality=95, optimize=True), shown, near=4)
    second = picture(3)
    mpo = encoded(shown, "MPO", quality=95, save_all=True, append_images=[Image.fromarray(second)])
    yield "mpo.jpeg", Odd(mpo, shown, near=4)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    yield "icc.jpeg", Odd(encoded(shown, "JPEG", quality=95, icc_profile=profile), shown, near=4)
    yield "quality_1.jpeg", Odd(encoded(shown, "JPEG", quality=1), shown, near=40)
    # what is missing
    yield "no_huffman_tables.jpeg", Odd(odd_jpeg.without(plain, 0xC4), shown, near=4)
    yield "no_quantisation.jpeg", Odd(odd_jpeg.without(plain, 0xDB), refused="Quantization table 0x00 was not defined")
    for name, whole in (("plain", plain), ("progressive", progressive), ("cmyk", cmyk)):
        yield f"{name}_without_end.jpeg", Odd(whole[:-2], shown, near=4)
        yield f"{name}_half_an_end.jpeg", Odd(whole[:-1], shown, near=4)
        for kept in (0.3, 0.6, 0.9):
            scan = whole.index(b"\xff\xda")
            cut = whole[: scan + int((len(whole) - scan) * kept)]
            yield f"{name}_cut_{kept}.jpeg", Odd(cut, refused="cut off")
    last = progressive.rindex(b"\xff\xda")
    yield "progressive_without_its_last_scan.jpeg", Odd(progressive[:last], refused="cut off")
    yield "cut_in_the_header.jpeg", Odd(plain[:200], refused="cut off|beginning")
    yield "cut_and_closed.jpeg", Odd(plain[: len(plain) - 300] + b"\xff\xd9", refused="damaged")
    yield "start_alone.jpeg", Odd(b"\xff\xd8", refused="beginning")
    # what is wrong
    large = encoded(picture(4, 256, 192), "JPEG", quality=95)
    middle = large.index(b"\xff\xda") + (len(large) - large.index(b"\xff\xda")) // 2
    zeros = large[:middle] + bytes(400) + large[middle + 400 :]
    yield "zeros_in_the_scan.jpeg", Odd(zeros, refused="damaged")
    revision = bytearray(plain)
    revision[revision.index(b"JFIF\0") + 5] = 9
    yield "jfif_revision.jpeg", Odd(bytes(revision), shown, near=4)
    hidden = bytearray(zeros)
    hidden[hidden.index(b"JFIF\0") + 5] = 9
    yield "zeros_behind_a_jfif_revision.jpeg", Odd(bytes(hidden), refused="damaged")
    transform = odd_jpeg.with_segment(odd_jpeg.without(plain, 0xE0), 0xEE, b"Adobe\0\x64\0\0\0\0\x07")
    yield "adobe_transform.jpeg", Odd(transform, shown, near=4)
    selection = bytearray(plain)
    scan = selection.index(b"\xff\xda")
    selection[scan + 6 + 2 * selection[scan + 4]] = 0
    yield "scan_parameters.jpeg", Odd(bytes(selection), shown, near=4)
    yield "stray_bytes.jpeg", Odd(plain[:-2] + b"abc\xff\xd9", shown, near=4)
    yield "stray_bytes_in_the_header.jpeg", Odd(plain[:20] + b"abc" + plain[20:], shown, near=4)
    yield "trailing_text.jpeg", Odd(plain + b"and more", shown, near=4)
    restarts = bytearray(encoded(picture(4, 256, 192), "JPEG", quality=95, restart_marker_blocks=2))
    marker = restarts.index(b"\xff\xd3")
    restarts[marker + 1] = 0xD5
    before = bytes(restarts).replace(b"\xff\xd4", bytes(9) + b"\xff\xd4", 1)
    before = before[:marker] + b"\xff\xd3" + before[marker + 2 :]
    yield "stray_bytes_in_the_scan.jpeg", Odd(before, refused="damaged .*extraneous bytes before marker 0xd4")
    yield "restart_marker_changed.jpeg", Odd(bytes(restarts), refused="damaged")
    yield "two_colours.jpeg", Odd(odd_jpeg.encode(planes[:2], [(1, 1)] * 2), refused="JPEG of a kind")
    wide = bytearray(plain)
    frame = wide.index(b"\xff\xc0")
    wide[frame + 5 : frame + 9] = b"\xff\x00\xff\x00"
    yield "65280_pixels.jpeg", Odd(bytes(wide), refused="4261 megapixels|cut off|damaged")


def others():
    shown = picture(5)
    image = Image.fromarray(shown)
    white = np.full_like(shown, 255)
    half = (255 - (255 - shown.astype(int)) * 128 // 255).astype(np.uint8)
    translucent = image.convert("RGBA")
    translucent.putalpha(128)
    hidden = image.convert("RGBA")
    hidden.putalpha(0)
    gray = np.asarray(image.convert("L"))
    gray_rgb = np.repeat(gray[:, :, None], 3, 2)
    two = Image.merge("LA", (image.convert("L"), Image.new("L", image.size, 0)))
    palette = image.quantize(255)
    of_palette = np.asarray(palette.convert("RGB"))
    holes = of_palette.copy()
    holes[np.asarray(palette) == 7] = 255
    yield "translucent.png", Odd(encoded(translucent, "PNG"), half, near=1)
    yield "transparent.png", Odd(encoded(hidden, "PNG"), white)
    yield "transparent.webp", Odd(encoded(hidden, "WEBP", lossless=True), white)
    yield "transparent.avif", Odd(encoded(hidden, "AVIF"), white, near=2)
    yield "transparent.tiff", Odd(encoded(hidden, "TIFF"), white, page=False)
    yield "transparent_gray.png", Odd(encoded(two, "PNG"), white)
    yield "palette.png", Odd(encoded(palette, "PNG"), of_palette)
    yield "palette_with_a_hole.png", Odd(encoded(palette, "PNG", transparency=7), holes)
    yield "palette_by_entry.png", Odd(encoded(palette, "PNG", transparency=bytes([0]) * 256), white)
    yield "palette.gif", Odd(encoded(palette, "GIF"), of_palette)
    yield "palette_with_a_hole.gif", Odd(encoded(palette, "GIF", transparency=7), holes)
    key = tuple(int(v) for v in shown[20, 30])
    keyed = np.where((shown == key).all(2, keepdims=True), np.uint8(255), shown)
    yield "colour_key.png", Odd(encoded(image, "PNG", transparency=key), keyed)
    yield "bits_1.png", Odd(encoded(image.convert("1"), "PNG"), np.asarray(image.convert("1").convert("RGB")))
    few = image.quantize(4)
    yield "bits_2.png", Odd(encoded(few, "PNG", bits=2), np.asarray(few.convert("RGB")))
    deep, alpha = gray.astype(np.uint16) * 257, np.full((*gray.shape, 1), 65535, np.uint16)
    deep_rgb = shown.astype(np.uint16) * 257
    yield "gray_16.png", Odd(encoded(Image.fromarray(deep), "PNG"), gray_rgb)
    yield "gray_16.tiff", Odd(encoded(Image.fromarray(deep), "TIFF"), gray_rgb, page=False)
    yield "rgb_16.png", Odd(sixteen(deep_rgb.reshape(HEIGHT, -1), 2), shown)
    yield "rgba_16.png", Odd(sixteen(np.concatenate([deep_rgb, alpha], 2).reshape(HEIGHT, -1), 6), shown)
    both = np.concatenate([deep[:, :, None], alpha], 2).reshape(HEIGHT, -1)
    yield "gray_alpha_16.png", Odd(sixteen(both, 4), gray_rgb)
    yield "float.tiff", Odd(encoded(image.convert("F"), "TIFF"), refused="floating-point|TIFF", page=False)
    yield "bits_32.tiff", Odd(encoded(image.convert("I"), "TIFF"), refused="32-bit pixels|TIFF", page=False)
    yield "gray_16.pgm", Odd(b"P5\n61 45\n65535\n" + deep.astype(">u2").tobytes(), gray_rgb, page=False)
    yield "cmyk.tiff", Odd(encoded(image.convert("CMYK"), "TIFF"), shown, near=2, page=False)
    yield "lzw.tiff", Odd(encoded(image, "TIFF", compression="tiff_lzw"), shown, page=False)
    yield "plain.bmp", Odd(encoded(image, "BMP"), shown)
    yield "plain.ppm", Odd(encoded(image, "PPM"), shown, page=False)
    yield "plain.jp2", Odd(encoded(image, "JPEG2000"), shown, near=2, page=False)
    frames = [Image.fromarray(picture(seed)) for seed in (6, 7)]
    for kind, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("AVIF", {"quality": 100})):
        data = encoded(image, kind, save_all=True, append_images=frames, **options)
        yield f"animated.{kind.lower()}", Odd(data, shown, near=12 if kind == "GIF" else 2)
    pages = encoded(image, "TIFF", save_all=True, append_images=frames)
    yield "pages.tiff", Odd(pages, shown, page=False)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    yield "icc.png", Odd(encoded(image, "PNG", icc_profile=profile), shown)
    whole = encoded(image, "PNG")
    yield "cut.png", Odd(whole[: len(whole) * 2 // 3], refused="cut off|damaged")
    yield "60000_pixels.png", Odd(bombs.png(1, claimed=60000), refused="3600 megapixels")


def no_pictures():
    words = {
        "empty": (b"", "is empty"),
        "zeros": (bytes(5000), "only zeros"),
        "page": (b"\n<!DOCTYPE html>\n<html><head><title>403</title>", "web page"),
        "page_in_capitals": (b"\xef\xbb\xbf<HTML><BODY>", "web page"),
        "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100), "HEIC: export it as JPEG"),
        "gzip": (gzip.compress(b"x" * 999), "compressed: unpack"),
        "zip": (b"PK\x03\x04" + bytes(99), "archive: unpack"),
        "tar": (b"n01440764_1.JPEG".ljust(257, b"\0") + b"ustar\0" + bytes(250), "archive: unpack"),
        "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        "json": (b'{"error": "not found"}', "is text"),
        "xml": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', "is text"),
        "svg": (b'<?xml version="1.0"?>\n<svg xmlns="x"/>', "SVG: export"),
        "unicode_text": ("nicht gefunden: Größe\n".encode() * 40, "is text"),
        "video": (b"\0\0\0\x18ftypmp42" + bytes(99), "video"),
        "pdf": (b"%PDF-1.7\n\xe2\xe3", "document"),
        "jxl": (b"\xff\x0a" + bytes(range(99)), "JPEG XL: export"),
        "apple_double": (b"\0\5\x16\7\0\2\0\0" + bytes(99), "macOS keeps"),
        "numbers": (b"\x93NUMPY\x01\0" + bytes(range(256)), "not a picture in a format known here"),
        "damaged_png": (b"\x89PNG\r\n\x1a\n" + bytes(range(99)), "beginning is damaged|damaged|cut off"),
    }
    for name, (data, refused) in words.items():
        yield f"{name}.JPEG", Odd(data, refused=refused)


class Files:
    """A source of the files {name: bytes} of class `a`, in the order of `names`."""

    def __init__(self, names, files):
        self.names, self.files = names, files

    def item(self, i):
        return f"a/{self.names[i]}", 0

    def read(self, i):
        return self.files[self.names[i]]


def odd_pictures():
    """{file name: Odd}"""
    return dict([*orientations(), *jpegs(), *others(), *no_pictures()])


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for file_name, odd in odd_pictures().items():
        (folder / file_name).write_bytes(odd.data)
