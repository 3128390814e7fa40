// Encoded pictures: what is wrong with them, how they are turned, and the bytes that every browser reads alike.
//
// Browsers apply colour profiles and gamma and some of the orientations; app/pictures.py applies all orientations and
// nothing else. So both are left out of what a browser decodes. What browsers show in part is refused.
import {examine, MAX_SCANS} from "./jpeg.js";

export const FORMATS = "JPEG, PNG, WEBP, GIF, BMP, AVIF";
const MAX_EXIF = 65_536;
const CUT_OFF = "The picture is cut off: part of the file is missing.";
const DAMAGED = "The picture is damaged.";
const JPEG_BEGINNING = "The file is a JPEG of a kind that is not read, or only the beginning of one.";
const JPEG_START = new Uint8Array([0xff, 0xd8]), JPEG_END = new Uint8Array([0xff, 0xd9]);
const GIF_END = new Uint8Array([0x3b]);

/** What is wrong with a picture, in words for the person who chose it. */
export class UnreadableImage extends Error {}

/**
 * bytes -> {type, parts: what to decode, width, height, turn: EXIF's orientation, 1 to 8, scans: of a JPEG, failed:
 * what to say where the browser cannot decode it}; null where it is no picture.
 */
export function read(bytes, kinds) {
    const file = jpeg(bytes) ?? png(bytes) ?? webp(bytes) ?? gif(bytes) ?? bmp(bytes) ?? heif(bytes, kinds);
    return file && {turn: 1, failed: DAMAGED, ...file};
}

/** What a file that is no picture is, as the end of a sentence. */
export function kind(bytes, kinds) {
    if (bytes.every((byte) => byte === 0)) return "holds only zeros: a download or a disk has failed";
    // Python's patterns ignore the case of ASCII alone, JavaScript's that of every letter: U+E080 to U+E0FF are none
    const text = String.fromCharCode(...Array.from(bytes.slice(0, 600), (byte) => (byte < 128 ? byte : 0xe000 + byte)));
    const pattern = (source) => new RegExp(`^(?:${source.replace(/\\x([89a-f])/g, "\\ue0$1")})`, "is");
    const known = kinds.find(([source]) => pattern(source).test(text));
    return known?.[1] ?? `is not a picture in a format known here: ${FORMATS}`;
}

function jpeg(bytes) {
    if (bytes[0] !== 0xff || bytes[1] !== 0xd8) return null;
    const {frame, segments, scans, end, checked, problem, cutOff} = examine(bytes);
    if (!frame) throw new UnreadableImage(JPEG_BEGINNING);
    if (scans > MAX_SCANS) throw new UnreadableImage("The picture is damaged: it is in too many parts.");
    if (problem && cutOff) throw new UnreadableImage(CUT_OFF);
    const damage = problem.startsWith("Corrupt") ? "is damaged" : "cannot be decoded";
    if (problem) throw new UnreadableImage(`The picture ${damage} (${problem}).`);
    const metadata = (name) => segments.filter(({marker, begin}) => marker === 0xe1 && begins(bytes, name, begin))
        .map((segment) => bytes.subarray(segment.begin + name.length, segment.end));
    const exif = joined(metadata("Exif\0\0")), xmp = metadata("http://ns.adobe.com/xap/1.0/\0").at(-1);
    // of APPn and comments only JFIF's and Adobe's, which say what the colours are
    const kept = segments.filter(({marker}) => marker < 0xe1 || marker === 0xee || (marker > 0xef && marker !== 0xfe));
    const header = kept.map((segment) => bytes.subarray(segment.begin - 4, segment.end)), first = segments.at(-1).end;
    const rest = checked ? [bytes.subarray(first, end), JPEG_END] : [bytes.subarray(first)];
    return {
        type: "image/jpeg",
        // Firefox does not know a JPEG by a first part of two bytes
        parts: [joined([JPEG_START, ...header]), ...rest],
        width: frame.width,
        height: frame.height,
        turn: orientation(exif, xmp),
        scans,
        failed: checked ? "The file is a JPEG of a kind that is not read, or damaged." : JPEG_BEGINNING,
    };
}

function png(bytes) {
    if (!begins(bytes, "\x89PNG\r\n\x1a\n") || !begins(bytes, "IHDR", 12) || bytes.length < 33) return null;
    const view = viewOf(bytes), parts = [bytes.subarray(0, 8)];
    let exif, xmp;
    for (let at = 8, name = ""; name !== "IEND";) {
        const end = at + 12 <= bytes.length ? at + 12 + view.getUint32(at) : Infinity;
        if (end > bytes.length) throw new UnreadableImage(CUT_OFF);
        name = latin(bytes, at + 4, at + 8);
        const content = bytes.subarray(at + 8, end - 4);
        if (name === "eXIf") exif = content;
        if (name === "iTXt" && begins(content, "XML:com.adobe.xmp\0")) xmp = content;
        // without the chunks that animate it the first picture is left
        if (["IHDR", "PLTE", "tRNS", "IDAT", "IEND"].includes(name)) {
            if (crc32(bytes.subarray(at + 4, end - 4)) !== view.getUint32(end - 4)) throw new UnreadableImage(DAMAGED);
            parts.push(bytes.subarray(at, end));
        }
        at = end;
    }
    const [width, height] = [16, 20].map((at) => view.getUint32(at));
    return {type: "image/png", parts, width, height, turn: orientation(exif, xmp)};
}

function webp(bytes) {
    if (!begins(bytes, "RIFF") || !begins(bytes, "WEBP", 8) || bytes.length < 30) return null;
    const view = viewOf(bytes), whole = view.getUint32(4, true) + 8, kept = [], found = {};
    if (whole > bytes.length) throw new UnreadableImage(CUT_OFF);
    for (let at = 12; at + 8 <= whole;) {
        const name = latin(bytes, at, at + 4), end = at + 8 + view.getUint32(at + 4, true), next = end + end % 2;
        if (end > whole) throw new UnreadableImage(CUT_OFF);
        found[name] ??= bytes.subarray(at + 8, end);
        if (!["ICCP", "EXIF", "XMP "].includes(name)) kept.push(bytes.slice(at, next));
        at = next;
    }
    let width = view.getUint16(26, true) & 0x3fff, height = view.getUint16(28, true) & 0x3fff;
    if (begins(bytes, "VP8L", 12)) {
        [width, height] = [0, 14].map((bit) => (view.getUint32(21, true) >> bit & 0x3fff) + 1);
    }
    if (begins(bytes, "VP8X", 12)) {
        [width, height] = [23, 26].map((at) => (view.getUint32(at, true) >>> 8) + 1);
        kept[0][8] &= ~0x2c; // it has no profile, EXIF or XMP data any more
    }
    const header = bytes.slice(0, 12);
    viewOf(header).setUint32(4, kept.reduce((sum, part) => sum + part.length, 4), true);
    return {type: "image/webp", parts: [header, ...kept], width, height, turn: orientation(found.EXIF, found["XMP "])};
}

function gif(bytes) {
    if (!/^GIF8[79]a/.test(latin(bytes, 0, 6)) || bytes.length < 13) return null;
    const view = viewOf(bytes), palette = (flags) => (flags & 0x80 ? 6 << (flags & 7) : 0);
    let [width, height] = [6, 8].map((at) => view.getUint16(at, true)), at = 13 + palette(bytes[10]), seen = false;
    // up to the end of the first picture
    while (!seen && at + 10 <= bytes.length) {
        seen = bytes[at] === 0x2c;
        if (!seen && bytes[at] !== 0x21) throw new UnreadableImage(DAMAGED);
        if (seen) {
            width = Math.max(width, view.getUint16(at + 1, true) + view.getUint16(at + 5, true));
            height = Math.max(height, view.getUint16(at + 3, true) + view.getUint16(at + 7, true));
        }
        at += seen ? 11 + palette(bytes[at + 9]) : 2;
        while (bytes[at] > 0) at += bytes[at] + 1;
        at++;
    }
    if (!seen || at > bytes.length) throw new UnreadableImage(CUT_OFF);
    return {type: "image/gif", parts: [bytes.subarray(0, at), GIF_END], width, height};
}

function bmp(bytes) {
    const view = viewOf(bytes);
    if (!begins(bytes, "BM") || bytes.length < 34) return null;
    const header = view.getUint32(14, true), old = header === 12;
    if (![12, 40, 52, 56, 64, 108, 124].includes(header)) return null;
    const width = old ? view.getUint16(18, true) : Math.abs(view.getInt32(18, true));
    const height = old ? view.getUint16(20, true) : Math.abs(view.getInt32(22, true));
    const bits = view.getUint16(old ? 24 : 28, true), packed = !old && [1, 2].includes(view.getUint32(30, true));
    // some programs leave out what fills the last row up to four bytes
    const least = view.getUint32(10, true) + 4 * Math.ceil(width * bits / 32) * height - 3;
    if (!packed && bytes.length < least) throw new UnreadableImage(CUT_OFF);
    return {type: "image/bmp", parts: [bytes, new Uint8Array(3)], width, height};
}

/** AVIF, and HEIC for browsers that know it. Their orientation is a property of the picture, which browsers apply. */
function heif(bytes, kinds) {
    if (!/^ftyp(avi|hei|hev|mif1|msf1)/.test(latin(bytes, 4, 12))) return null;
    const view = viewOf(bytes), isAvif = latin(bytes, 8, Math.min(view.getUint32(0), 256)).includes("avi");
    for (let at = 0; at + 16 <= bytes.length;) {
        const size = view.getUint32(at), length = size === 1 ? Number(view.getBigUint64(at + 8)) : size;
        at = length ? at + Math.max(8, length) : bytes.length;
        if (at > bytes.length) throw new UnreadableImage(CUT_OFF);
    }
    const head = bytes.slice(0, 1 << 16), text = latin(head, 0);
    // the sizes of all that it holds, parts and thumbnails too
    const places = Array.from(text.matchAll(/ispe\0{4}(?=[^]{8})/g), ({index}) => index + 8);
    const [width, height] = [0, 4].map((offset) => Math.max(0, ...places.map((at) => view.getUint32(at + offset))));
    // of an animation the still picture: Chromium gives the frame, which is the same, other colours
    if (text.startsWith("avis", 8) && text.includes("pitm")) head.set([0x66], 11);
    const unread = "is AVIF that is damaged, or that this browser does not read: export it as JPEG";
    return {
        type: isAvif ? "image/avif" : "image/heic",
        parts: [head, bytes.subarray(head.length)],
        width,
        height,
        failed: `The file ${isAvif ? unread : kind(bytes, kinds)}.`,
    };
}

/** EXIF's orientation, 1 to 8, of EXIF data or else of XMP; 1 where it is damaged or impossible. */
function orientation(exif, xmp = new Uint8Array()) {
    const ofExif = exif?.length && exif.length <= MAX_EXIF ? exifOrientation(exif) : null;
    const found = ofExif ?? Number(latin(xmp).match(/Orientation\s*(?:=\s*["']|>)\s*([1-8])/)?.[1] ?? 1);
    return found >= 1 && found <= 8 ? found : 1;
}

/** null where EXIF data has none. */
function exifOrientation(exif) {
    while (begins(exif, "Exif\0\0")) exif = exif.subarray(6);
    const view = viewOf(exif), little = begins(exif, "II*\0");
    if (exif.length < 8 || !(little || begins(exif, "MM\0*"))) return 1;
    const begin = view.getUint32(4, little), count = begin + 2 <= exif.length ? view.getUint16(begin, little) : 0;
    for (let at = begin + 2, k = 0; k < count && at + 12 <= exif.length; at += 12, k++) {
        const tag = view.getUint16(at, little), type = view.getUint16(at + 2, little);
        if (tag === 0x0112 && type === 3) return view.getUint16(at + 8, little);
    }
    return null;
}

const viewOf = (bytes) => new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
const latin = (bytes, from, to) => Array.from(bytes.subarray(from, to), (byte) => String.fromCharCode(byte)).join("");
const begins = (bytes, text, at = 0) => latin(bytes, at, at + text.length) === text;

function joined(parts) {
    const all = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
    let at = 0;
    for (const part of parts) {
        all.set(part, at);
        at += part.length;
    }
    return all;
}

const CRC = Uint32Array.from({length: 256}, (_, value) => {
    for (let bit = 0; bit < 8; bit++) value = value & 1 ? 0xedb88320 ^ value >>> 1 : value >>> 1;
    return value;
});

function crc32(bytes) {
    let crc = -1;
    for (let k = 0; k < bytes.length; k++) crc = CRC[(crc ^ bytes[k]) & 255] ^ crc >>> 8;
    return ~crc >>> 0;
}
