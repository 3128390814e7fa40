"""Encoded pictures -> upright RGB, once for the whole project: app/pictures.py is a copy of this file.

JPEG goes through libjpeg-turbo as simplejpeg has it: the same pixels as Pillow's and OpenCV's, but it reports damage,
which those two hide, and each picture gets a decompressor of its own, so nothing passes from one to the next. Other
formats go through Pillow. docs/pictures.md lists what is read and what is refused.
"""

import contextlib
import io
import re
import warnings

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

# Pillow by itself would also run other programs on files, or read gigabytes for some.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF", "TIFF", "PPM", "JPEG2000")
MAX_PIXELS = 2 * 89_478_485  # Pillow's own limit
# A JPEG of more is decoded at an eighth, a quarter or half of its size.
FULL_PIXELS = 40_000_000
START, SCAN, END = b"\xff\xd8", b"\xff\xda", b"\xff\xd9"
SCANS = re.compile(rb"\xff\xda\x00(?:\x08\x01|\x0a\x02|\x0c\x03|\x0e\x04)")
XMP_ORIENTATION = re.compile(rb"Orientation\s*(?:=\s*[\"']|>)\s*([1-8])")
# Bytes that belong to nothing, behind a part that is whole. Within a scan (0xd0 to 0xd7) they are damage.
STRAY_BYTES = re.compile(r"extraneous bytes before marker 0x(?!d[0-7])")
CUT_OFF = "the picture is cut off: part of the file is missing"
# What lies under the names of pictures, by how it begins.
KINDS = tuple(
    (re.compile(start, re.DOTALL | re.IGNORECASE), words)
    for start, words in (
        (rb"version https://git-lfs", "is a Git LFS pointer: get the file itself with git lfs pull"),
        (rb"(\xef\xbb\xbf)?\s*(<!--.*?-->\s*)?<(!doctype\s+html|html|head|body)\b", "is a web page, not a picture"),
        (rb"(\xef\xbb\xbf)?\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*(<!doctype\s+svg|<svg)\b", "is SVG: export it as PNG"),
        (rb"....ftyp(hei|hev|mif1|msf1)", "is HEIC: export it as JPEG"),
        (rb"....ftypavi", "is AVIF, which this Pillow does not read: export it as JPEG"),
        (rb"....ftyp|RIFF....AVI |\x1aE\xdf\xa3|\0\0\x01[\xb0-\xbf]", "is a video, not a picture"),
        (rb"\0\0\0\x0cJXL |\xff\x0a", "is JPEG XL: export it as JPEG"),
        (rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51", "is JPEG 2000: export it as JPEG"),
        (rb"II\*\0|MM\0\*|II\+\0|MM\0\+", "is TIFF or a camera's raw file: export it as JPEG or PNG"),
        (rb"\x1f\x8b|BZh\d|\xfd7zXZ\0|\x28\xb5\x2f\xfd", "is compressed: unpack it"),
        (rb"PK\x03\x04|PK\x05\x06|Rar!|7z\xbc\xaf|.{257}ustar", "is an archive: unpack it"),
        (rb"%PDF|%!PS|\xc5\xd0\xd3\xc6|8BPS", "is a document, not a picture: export it as JPEG or PNG"),
        (rb"\0\x05\x16[\0\x07]", "is what macOS keeps beside a file, not a picture: remove it"),
        (rb"\x89PNG|GIF8|RIFF....WEBP|BM|P[1-6]\s", "is a picture whose beginning is damaged"),
        (rb"([\t\n\r\x20-\x7e]|[\xc2-\xf4][\x80-\xbf]{1,3})+($|(?<=.{200}))", "is text, not a picture"),
    )
)


def decode_image(data, *, formats=FORMATS, max_pixels=MAX_PIXELS):
    """Encoded bytes -> upright RGB, uint8 (height, width, 3), C-contiguous. Of an animation the first picture.

    Transparency is laid on white, 16 bits are scaled to 8, colour profiles are not applied. A JPEG of one scan and more
    than FULL_PIXELS is decoded at an eighth, a quarter or half of its size; other pictures may have `max_pixels`.
    formats: Pillow's names of those that are read. ValueError says what is wrong, in words that begin with "the
    picture" or "the file".
    """
    if not data:
        raise ValueError("the file is empty")
    if data[:2] == START:
        rgb = _decode_jpeg(data, max_pixels)
        if rgb is not None:
            return _upright(rgb, _jpeg_orientation(data))
    return _decode_with_pillow(data, formats, max_pixels)


def decode_stored(data, height, width):
    """A JPEG that a .beton file holds -> RGB, uint8 (height, width, 3). ValueError for the least oddity."""
    try:
        found = simplejpeg.decode_jpeg_header(data)[:2]
        if found != (height, width):
            raise ValueError(f"it has {found[1]}x{found[0]} pixels, not {width}x{height}")
        return simplejpeg.decode_jpeg(data)
    except KeyError:  # of simplejpeg's table of sampling factors
        raise ValueError("its sampling factors are none that the writer uses") from None


def lacks_end(data):
    """Whether `data` is a JPEG without an end-of-image marker; where it decodes, every pixel is there all the same."""
    return data[:2] == START and data[-2:] != END and data.rfind(END) < data.rfind(SCAN)


def is_cmyk(data):
    """Whether `data` is a JPEG of four colours."""
    try:
        return data[:2] == START and simplejpeg.decode_jpeg_header(data)[2] in ("CMYK", "YCCK")
    except (ValueError, KeyError):
        return False


# --- JPEG ------------------------------------------------------------------------------------------------------------


def _decode_jpeg(data, max_pixels):
    """RGB, not turned yet; None where libjpeg-turbo's simple interface cannot read what Pillow may be able to."""
    with contextlib.suppress(ValueError):
        return _turbo(data, max_pixels)
    mended = _mended(data)
    try:
        return _turbo(mended, max_pixels)
    except TooLarge:
        raise
    except ValueError as error:
        problem = str(error)
    if "subsampling" in problem:
        return None
    if STRAY_BYTES.search(problem):
        return _turbo(mended, max_pixels, strict=False)
    if lacks_end(data):
        raise ValueError(CUT_OFF)
    kind = "is damaged" if problem.startswith("Corrupt") else "cannot be decoded"
    raise ValueError(f"the picture {kind} ({problem})")


class TooLarge(ValueError):
    """More pixels than are taken."""


def _too_large(pixels, max_pixels):
    return TooLarge(f"the picture has {pixels / 1e6:.0f} megapixels; at most {max_pixels / 1e6:.0f} are taken here")


def _turbo(data, max_pixels, *, strict=True):
    try:
        height, width, colours = simplejpeg.decode_jpeg_header(data, strict=strict)[:3]
    except KeyError:
        raise ValueError("subsampling that has no name") from None
    pixels, least = height * width, {}
    if pixels > FULL_PIXELS and _scans(data) == 1:
        scale = next((scale for scale in (2, 4, 8) if pixels <= scale * scale * FULL_PIXELS), None)
        if not scale:
            raise _too_large(pixels, 64 * FULL_PIXELS)
        least = {"min_height": -(-height // scale), "min_width": -(-width // scale)}
    elif pixels > max_pixels:
        raise _too_large(pixels, max_pixels)
    if colours not in ("CMYK", "YCCK"):
        return simplejpeg.decode_jpeg(data, strict=strict, **least)
    return _without_black(simplejpeg.decode_jpeg(data, "CMYK", strict=strict, **least))


def _without_black(ink):
    """Inverted CMYK [h, w, 4] -> RGB, rounded as browsers do; simplejpeg's own conversion is one grey level off."""
    rgb = np.empty((*ink.shape[:2], 3), np.uint8)
    for top in range(0, len(ink), 64):  # products take more bytes
        rows = ink[top : top + 64].astype(np.uint16)
        rgb[top : top + 64] = (rows[..., :3] * rows[..., 3:] + 127) // 255
    return rgb


def _scans(data):
    """How many scans a JPEG has: of several, all coefficients are held in memory, at whatever size it is decoded."""
    begin = max((begin for _, begin, _ in _segments(data)), default=4)
    return len(SCANS.findall(data, begin - 4, data.find(END, begin) + 1 or len(data)))


def _segments(data):
    """(marker, begin, end) of the content of each of a JPEG's segments, up to the header of its first scan."""
    at, marker = 2, 0
    while marker != 0xDA and 0 <= (at := data.find(b"\xff", at)) < len(data) - 3:
        marker = data[at + 1]
        if marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD7:
            at += 1
            continue
        end = at + 2 + max(2, int.from_bytes(data[at + 2 : at + 4], "big"))
        yield marker, at + 4, end
        at = end


def _mended(data):
    """A JPEG without the oddities that change no pixel and of which libjpeg warns.

    It reports only the first of its warnings, so one of these would hide real damage.
    """
    segments = list(_segments(data))
    if not segments or segments[-1][0] != 0xDA:
        return data
    frame = next((data[begin:end] for marker, begin, end in segments if marker in (0xC0, 0xC1, 0xC2)), b"")
    parts = [START]
    for marker, begin, end in segments:
        content = bytearray(data[begin:end])
        if marker == 0xE0 and content[:5] == b"JFIF\0" and len(content) > 6:
            content[5] = 1  # the only revision that libjpeg knows
        elif marker == 0xEE and content[:5] == b"Adobe" and len(content) > 11 and content[11] > 2:
            content[11] = 2 if len(frame) == 18 else 1  # what libjpeg takes it for: four colours or three
        elif marker == 0xDA and len(content) > 3 and any(m in (0xC0, 0xC1) for m, *_ in segments):
            content[-3:] = b"\0\x3f\0"  # all coefficients, which is the only choice in a frame of this kind
        parts += [bytes((0xFF, marker)), (len(content) + 2).to_bytes(2, "big"), bytes(content)]
    rest = data[segments[-1][2] :]
    parts.append(rest)
    progressive = any(marker == 0xC2 for marker, *_ in segments)
    if END not in rest and (not progressive or _every_scan_is_there(data, segments[-1][1], frame)):
        parts.append(END)
    return b"".join(parts)


def _every_scan_is_there(data, begin, frame):
    """Whether the scans of a progressive JPEG, the first at `begin`, bring each coefficient to its last bit."""
    missing = {(part, k) for part in frame[6::3] for k in range(64)}
    for scan in SCANS.finditer(data, begin - 4):
        count = data[scan.end() - 1]
        header = data[scan.end() : scan.end() + 2 * count + 3]
        if len(header) == 2 * count + 3 and header[-1] & 15 == 0:
            missing -= {(part, k) for part in header[:-3:2] for k in range(header[-3], header[-2] + 1)}
    return not missing


def _jpeg_orientation(data):
    if b"Exif\0\0" not in data and b"Orientation" not in data:
        return 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _orientation(Image.open(io.BytesIO(data), formats=("JPEG",)))
    except Exception:  # libjpeg-turbo has read the picture; what Pillow cannot read beside it says nothing about it
        return 1


# --- Other formats ---------------------------------------------------------------------------------------------------


def _decode_with_pillow(data, formats, max_pixels):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture = Image.open(io.BytesIO(data), formats=formats)
            if picture.width * picture.height > max_pixels:
                raise _too_large(picture.width * picture.height, max_pixels)
            picture.load()
            orientation = _orientation(picture)
            picture = _opaque(picture)  # and not both in memory
            return _upright(_to_rgb(picture), orientation)
    except ValueError as error:
        if str(error).startswith("the picture"):
            raise
        reason = str(error)
    except UnidentifiedImageError:
        raise ValueError(f"the file {_kind(data, formats)}") from None  # Pillow's text holds a memory address
    except Image.DecompressionBombError as error:
        raise _too_large(int(re.search(r"\((\d+) pixels\)", str(error))[1]), max_pixels) from None
    except MemoryError:
        raise ValueError("the picture is too large for the memory there is") from None
    except Exception as error:  # Pillow's plugins raise whatever their parsers run into
        reason = str(error) or type(error).__name__
    if re.search("truncated|not enough|end of file|EOF", reason, re.IGNORECASE):
        raise ValueError(CUT_OFF)
    raise ValueError(f"the picture is damaged ({reason})")


def _kind(data, formats):
    """What a file that is no picture is, as the end of a sentence."""
    if data[:2] == START:
        return "is a JPEG of a kind that is not read, or only the beginning of one"
    if not data.strip(b"\0"):
        return "holds only zeros: a download or a disk has failed"
    for start, words in KINDS:
        if start.match(data[:600]):
            return words
    return f"is not a picture in a format known here: {', '.join(formats)}"


def _orientation(picture):
    """EXIF's orientation, 1 to 8, of EXIF data or else of XMP."""
    try:
        found = picture.getexif().get(0x0112)
        if found is None:
            xmp = picture.info.get("xmp") or picture.info.get("XML:com.adobe.xmp") or b""
            match = XMP_ORIENTATION.search(xmp.encode() if isinstance(xmp, str) else xmp)
            found = int(match[1]) if match else 1
        return found
    except Exception:  # damaged EXIF data is common and says nothing about the pixels
        return 1


def _upright(rgb, orientation):
    """Undo EXIF's eight orientations: the first four keep width and height, the others swap them."""
    if orientation in (5, 6, 7, 8):
        rgb = rgb.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        rgb = rgb[:, ::-1]
    if orientation in (3, 4, 7, 8):
        rgb = rgb[::-1]
    return np.ascontiguousarray(rgb)


def _opaque(picture):
    """The picture on white, where it has transparency."""
    if picture.mode.startswith(("I", "F")):
        return picture
    if picture.mode not in ("RGBA", "LA", "PA", "RGBa", "La") and "transparency" not in picture.info:
        return picture
    picture = picture.convert("RGBA")
    opacity = picture.getchannel("A")
    picture = picture.convert("RGB")
    white = Image.new("RGB", picture.size, "white")
    white.paste(picture, mask=opacity)
    return white


def _to_rgb(picture):
    if picture.mode == "F" or (picture.mode == "I" and picture.format == "TIFF"):
        kind = "floating-point" if picture.mode == "F" else "32-bit"
        raise ValueError(f"the picture has {kind} pixels, whose brightness is not defined: convert it to 8 bits")
    if picture.mode.startswith("I"):
        # Pillow clips 16 bits at 255, which turns most of a 16-bit picture white.
        gray = np.asarray(picture)
        gray = (gray if gray.dtype.itemsize == 2 else gray.clip(0, 65535)) >> 8
        return np.repeat(gray.astype(np.uint8)[:, :, None], 3, axis=2)
    return np.asarray(picture if picture.mode == "RGB" else picture.convert("RGB"))
