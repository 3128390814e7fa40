// A picture's bytes -> upright pixels on white, by the browser's own decoder, as app/pictures.py has them.
import {kind, read, UnreadableImage} from "./formats.js";
import {MAX_PIXELS} from "./jpeg.js";
import {square} from "./resize.js";

export {UnreadableImage};

// A JPEG of one scan and more pixels is decoded at a half, a quarter or an eighth of its size, where the browser can.
const FULL_PIXELS = 40_000_000;
const SHOWN = 448, QUALITY = 0.88;
// The canvas transforms of EXIF's orientations 1 to 8: what x adds to the upright x and y, and then what y adds.
const TURNS = [
    [1, 0, 0, 1], [-1, 0, 0, 1], [-1, 0, 0, -1], [1, 0, 0, -1],
    [0, 1, 1, 0], [0, 1, -1, 0], [0, -1, -1, 0], [0, -1, 1, 0],
];

/** bytes: Uint8Array. kinds: [[pattern, words]], KINDS of app/pictures.py. UnreadableImage says what is wrong. */
export async function decode(bytes, kinds) {
    requireCanvas();
    if (!bytes.length) throw new UnreadableImage("The file is empty.");
    const file = read(bytes, kinds);
    if (!file) throw new UnreadableImage(`The file ${kind(bytes, kinds)}.`);
    return new Picture(await reduced(file) ?? await whole(file), file.turn);
}

/** An upright picture of width x height pixels. close() gives its memory back. */
class Picture {
    #bitmap;
    #turn;
    #canvas = new OffscreenCanvas(1, 1);
    #context = this.#canvas.getContext("2d", {alpha: false, willReadFrequently: true});

    constructor(bitmap, turn) {
        this.#bitmap = bitmap;
        this.#turn = TURNS[turn - 1];
        [this.width, this.height] = turn > 4 ? [bitmap.height, bitmap.width] : [bitmap.width, bitmap.height];
    }

    /** RGBA on white of some rows, and of these all columns or some: a canvas of the whole would double the memory. */
    strip(top, rows, left = 0, columns = this.width - left) {
        const context = this.#context, [a, b, c, d] = this.#turn;
        if (this.#canvas.width !== columns || this.#canvas.height !== rows) {
            Object.assign(this.#canvas, {width: columns, height: rows});
        }
        context.resetTransform();
        context.fillStyle = "white";
        context.fillRect(0, 0, columns, rows);
        context.setTransform(a, b, c, d, (a + c < 0 ? this.width : 0) - left, (b + d < 0 ? this.height : 0) - top);
        context.imageSmoothingEnabled = false;
        context.drawImage(this.#bitmap, 0, 0);
        return context.getImageData(0, 0, columns, rows).data;
    }

    /** Promise of a JPEG, as a Blob, of the square that the network sees. */
    shown(resolution, cropRatio) {
        const rgb = square(this, {resolution, cropRatio, largest: SHOWN}), side = Math.sqrt(rgb.length / 3);
        const pixels = new ImageData(side, side), canvas = new OffscreenCanvas(side, side);
        for (let k = 0; k < side * side; k++) pixels.data.set([rgb[3 * k], rgb[3 * k + 1], rgb[3 * k + 2], 255], 4 * k);
        canvas.getContext("2d").putImageData(pixels, 0, 0);
        return canvas.convertToBlob({type: "image/jpeg", quality: QUALITY});
    }

    close() {
        this.#bitmap.close();
        this.#canvas.width = this.#canvas.height = 0;
    }
}

/** Some browsers can be set to give noise for what a canvas holds. */
function requireCanvas() {
    const context = new OffscreenCanvas(16, 16).getContext("2d", {alpha: false, willReadFrequently: true});
    context.fillStyle = "rgb(30, 90, 150)";
    context.fillRect(0, 0, 16, 16);
    const {data} = context.getImageData(0, 0, 16, 16), filled = [30, 90, 150, 255];
    if (data.every((value, k) => Math.abs(value - filled[k % 4]) < 5)) return;
    throw new UnreadableImage("This browser hides pixels from pages, against fingerprinting: let this page read them.");
}

async function whole({parts, type, width, height, failed}) {
    const pixels = width * height, said = `The picture has ${Math.round(pixels / 1e6)} megapixels`;
    if (pixels > MAX_PIXELS) throw new UnreadableImage(`${said}; at most ${MAX_PIXELS / 1e6} are taken here.`);
    try {
        const options = {colorSpaceConversion: "none", premultiplyAlpha: "none"};
        return await createImageBitmap(new Blob(parts, {type}), options);
    } catch {
        const large = `${said}: too many for this browser, or it is damaged.`;
        throw new UnreadableImage(pixels > FULL_PIXELS ? large : failed);
    }
}

/** A large JPEG at a half, a quarter or an eighth of its size; null where there is no need or no way. */
async function reduced({parts, type, width, height, scans}) {
    const scale = [1, 2, 4, 8].find((scale) => width * height <= scale * scale * FULL_PIXELS) ?? 1;
    if (scale === 1 || scans !== 1 || !globalThis.ImageDecoder) return null;
    const [desiredWidth, desiredHeight] = [width, height].map((side) => Math.ceil(side / scale));
    const data = await new Blob(parts).arrayBuffer();
    const decoder = new ImageDecoder({data, type, desiredWidth, desiredHeight, colorSpaceConversion: "none"});
    try {
        const {image} = await decoder.decode();
        const fits = image.displayWidth === desiredWidth && image.displayHeight === desiredHeight;
        const bitmap = fits ? await createImageBitmap(image) : null;
        image.close();
        return bitmap;
    } catch {
        return null;
    } finally {
        decoder.close();
    }
}
