"""Small files that a careless program answers with gigabytes or minutes. Each is valid but for what makes it one."""

import io
import struct
import zlib

from PIL import Image


def _encoded(picture, kind, **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def _chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(side, *, bits=1, colour=0, channels=1, claimed=None):
    """A black PNG of side x side pixels. colour: 0 gray, 6 RGBA (of 4 channels). claimed: the side in its header."""
    compressor, row = zlib.compressobj(1), bytes(1 + (side * bits * channels + 7) // 8)
    packed = b"".join(compressor.compress(row) for _ in range(side)) + compressor.flush()
    header = struct.pack(">IIBBBBB", claimed or side, claimed or side, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        _chunk(*part) for part in ((b"IHDR", header), (b"IDAT", packed), (b"IEND", b""))
    )


def gif():
    """4295 megapixels of background around a small picture."""
    data = bytearray(_encoded(Image.new("P", (8, 8)), "GIF"))
    data[6:10] = b"\xff\xff\xff\xff"
    return bytes(data)


def webp():
    """An animation whose canvas has 268 megapixels, and its frames 64 pixels."""
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = bytearray(_encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]))
    place = data.index(b"VP8X") + 12
    data[place : place + 6] = (16383).to_bytes(3, "little") * 2
    return bytes(data)


def jpeg_of_many_scans(side, scans):
    """Each scan has a program go over all of the pixels again."""
    data = _encoded(Image.new("L", (side, side), 77), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * scans + data[-2:]


def exif(size, tags):
    """EXIF data of about `size` bytes, of which each of so many tags names nearly all."""
    entries = b"".join(struct.pack("<HHII", 1000 + k, 1, size - 8, 8) for k in range(tags))
    data = struct.pack("<2sHIH", b"II", 42, 8, tags) + entries + bytes(4)
    return data + bytes(max(0, size - len(data)))


def png_with_exif(content):
    data = png(16)
    return data[:33] + _chunk(b"eXIf", content) + data[33:]


def jpeg_with_exif(content):
    """In as many segments as it takes, and with no density: for that Pillow looks into EXIF data as it opens a file."""
    data = _encoded(Image.new("RGB", (16, 16)), "JPEG")
    after = data.index(b"\xff\xdb")
    pieces = [content[at : at + 65000] for at in range(0, len(content), 65000)]
    segments = b"".join(struct.pack(">HH", 0xFFE1, 8 + len(piece)) + b"Exif\0\0" + piece for piece in pieces)
    return data[:2] + segments + data[after:]


def gif_with_comment(size):
    data = _encoded(Image.new("P", (8, 8)), "GIF")
    palette = 3 << ((data[10] & 7) + 1) if data[10] & 128 else 0
    comment = b"!\xfe" + (b"\xff" + b"a" * 255) * (size // 256) + b"\0"
    return data[: 13 + palette] + comment + data[13 + palette :]
