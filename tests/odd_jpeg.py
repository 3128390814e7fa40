"""A small encoder of baseline JPEG for the kinds that no library here writes: any sampling factors, ids, transforms."""

import io
import struct

import numpy as np
from PIL import Image


def standard_tables():
    """[(class, id), content of a DHT segment] as libjpeg writes them."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    return [content for marker, content in segments(buffer.getvalue()) if marker == 0xC4]


def segments(data):
    """[(marker, content)] of a JPEG up to its first scan's header."""
    at, found = 2, []
    while not found or found[-1][0] != 0xDA:
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        found.append((data[at + 1], data[at + 4 : at + 2 + length]))
        at += 2 + length
    return found


def without(data, marker):
    """The JPEG without its segments of this kind."""
    kept = [part for part in segments(data) if part[0] != marker]
    scan = data.index(b"\xff\xda")
    return b"\xff\xd8" + b"".join(segment(*part) for part in kept[:-1]) + data[scan:]


def segment(marker, content):
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def with_segment(data, marker, content):
    """The JPEG with one more segment at its beginning."""
    return data[:2] + segment(marker, content) + data[2:]


def _codes(content):
    """{symbol: (code, bits)} of a DHT segment with one table."""
    codes, code, at = {}, 0, 17
    for bits in range(1, 17):
        for _ in range(content[bits]):
            codes[content[at]] = (code, bits)
            code, at = code + 1, at + 1
        code <<= 1
    return codes


_DCT = np.array([[np.cos((2 * x + 1) * u * np.pi / 16) * (np.sqrt(1 / 8) if u == 0 else 0.5) for x in range(8)]
                 for u in range(8)])  # fmt: skip
_ZIGZAG = sorted(((y, x) for y in range(8) for x in range(8)),
                 key=lambda p: (sum(p), p[0] if sum(p) % 2 else p[1]))  # fmt: skip


class _Bits:
    def __init__(self):
        self.text = []

    def put(self, value, count):
        if count:
            self.text.append(format(value, f"0{count}b"))

    def stuffed(self):
        bits = "".join(self.text)
        bits += "1" * (-len(bits) % 8)
        return int("1" + bits, 2).to_bytes(len(bits) // 8 + 1, "big")[1:].replace(b"\xff", b"\xff\0")


def encode(planes, factors, *, ids=(1, 2, 3, 4), adobe=None, jfif=False, step=3):
    """Planes, float [height, width] each of the whole picture, as they are stored -> baseline JPEG.

    factors: (h, v) of each. ids: of the components. adobe: the transform of an APP14 segment. step: of all quantisers.
    """
    height, width = planes[0].shape
    declared = factors
    if len(planes) == 1:
        factors = [(1, 1)]  # a scan of one component has its blocks row by row, whatever is declared
    wide, high = max(h for h, _ in factors), max(v for _, v in factors)
    mcus_x, mcus_y = -(-width // (8 * wide)), -(-height // (8 * high))
    tables = standard_tables()
    codes = {content[0]: _codes(content) for content in tables}
    blocks = []
    for plane, (h, v) in zip(planes, factors, strict=True):
        size = (mcus_x * 8 * h, mcus_y * 8 * v)
        full = np.pad(plane, ((0, mcus_y * 8 * high - height), (0, mcus_x * 8 * wide - width)), "edge")
        part = np.asarray(Image.fromarray(full.astype(np.float32)).resize(size, Image.Resampling.BOX)) - 128
        tiles = part.reshape(mcus_y * v, 8, mcus_x * h, 8).transpose(0, 2, 1, 3)
        blocks.append(np.rint(_DCT @ tiles @ _DCT.T / step).astype(int))
    bits, before = _Bits(), [0] * len(planes)
    for my in range(mcus_y):
        for mx in range(mcus_x):
            for c, (h, v) in enumerate(factors):
                dc, ac = codes[0 if c in (0, 3) else 1], codes[0x10 if c in (0, 3) else 0x11]
                for k in range(h * v):
                    block = blocks[c][my * v + k // h, mx * h + k % h]
                    values = [int(block[place]) for place in _ZIGZAG]
                    _put_block(bits, values, values[0] - before[c], dc, ac)
                    before[c] = values[0]
    count = len(planes)
    frame = struct.pack(">BHHB", 8, height, width, count)
    scan = bytes([count])
    for c in range(count):
        frame += bytes([ids[c], declared[c][0] << 4 | declared[c][1], 0])
        scan += bytes([ids[c], 0 if c in (0, 3) else 0x11])
    head = segment(0xE0, b"JFIF\0\1\1\0\0\1\0\1\0\0") if jfif else b""
    if adobe is not None:
        head += segment(0xEE, b"Adobe\0\x64\0\0\0\0" + bytes([adobe]))
    head += segment(0xDB, bytes([0]) + bytes([step]) * 64) + segment(0xC0, frame)
    head += b"".join(segment(0xC4, content) for content in tables) + segment(0xDA, scan + b"\0\x3f\0")
    return b"\xff\xd8" + head + bits.stuffed() + b"\xff\xd9"


def _put_block(bits, values, difference, dc, ac):
    def put(code, prefix, value):
        size = abs(value).bit_length()
        bits.put(*code[prefix << 4 | size])
        bits.put(value if value >= 0 else value + (1 << size) - 1, size)

    put(dc, 0, difference)
    run = 0
    for value in values[1:]:
        if value == 0:
            run += 1
            continue
        while run > 15:
            bits.put(*ac[0xF0])
            run -= 16
        put(ac, run, value)
        run = 0
    if run:
        bits.put(*ac[0])


def ycc(rgb):
    """uint8 [height, width, 3] -> JFIF's three planes, float."""
    r, g, b = rgb.astype(float).transpose(2, 0, 1)
    luma = 0.299 * r + 0.587 * g + 0.114 * b
    return [luma, 128 + (b - luma) / 1.772, 128 + (r - luma) / 1.402]
