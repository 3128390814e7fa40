// Pillow's Image.resize(BILINEAR), bit for bit (its Resample.c), of the part that is looked at: app/inference.py's
// resize_and_crop and show. A canvas has other filters, and each browser its own. Rows go first, as in Pillow 12;
// Pillow 13 takes the columns of tall pictures first, which rounds some values to the next.
//
// A picture is {width, height, strip(top, rows, left, columns) -> RGBA}. It is read in strips, each only once.

const BITS = 22;  // of a weight's fraction
const STRIP = 1 << 18;  // pixels
const LONGEST = 8;  // times its short side: of a panorama only the middle is resized

/** What the network sees of a picture: RGB, resolution x resolution. */
export function see(picture, {resolution, cropRatio}) {
    const short = round(resolution / cropRatio), sizes = [picture.width, picture.height];
    const shorter = Math.min(...sizes), enlarged = sizes.map((size) => Math.floor(short * size / shorter));
    const isPanorama = Math.max(...enlarged) > LONGEST * short && enlarged.some((size, k) => size !== sizes[k]);
    const [across, down] = sizes.map((size, k) => {
        const cut = isPanorama && size > shorter, length = cut ? LONGEST * shorter : size;
        const out = cut ? LONGEST * short : enlarged[k], offset = Math.floor((size - length) / 2);
        const first = round((out - resolution) / 2);
        return taps({offset, size: length, from: 0, to: length, out, first, count: resolution});
    });
    return resample(picture, across, down);
}

/** The same part for people: RGB, a square of at most `largest` pixels a side, and not enlarged. */
export function square(picture, {resolution, cropRatio, largest}) {
    const side = Math.min(picture.width, picture.height) * Math.min(1, resolution / round(resolution / cropRatio));
    const count = Math.max(1, Math.min(largest, round(side)));
    const [across, down] = [picture.width, picture.height].map((size) => {
        const begin = (size - side) / 2, from = Math.fround(begin), to = Math.fround(begin + side);
        return taps({offset: 0, size, from, to, out: count, first: 0, count});
    });
    return resample(picture, across, down);
}

/** RGB -> what the network takes: float32 [3, pixels], by the same roundings as in app/inference.py. */
export function normalise(rgb, {mean, std}) {
    const count = rgb.length / 3, images = new Float32Array(rgb.length);
    for (let channel = 0; channel < 3; channel++) {
        const scale = Math.fround(1 / Math.fround(std[channel]));
        const offset = Math.fround(Math.fround(mean[channel]) * scale);
        const values = Float32Array.from({length: 256}, (_, value) => Math.fround(value * scale) - offset);
        for (let k = 0; k < count; k++) images[channel * count + k] = values[rgb[3 * k + channel]];
    }
    return images;
}

/** Python's round(): halves go to the even neighbour. */
function round(value) {
    const floor = Math.floor(value), rest = value - floor;
    return rest > 0.5 || (rest === 0.5 && floor % 2) ? floor + 1 : floor;
}

/**
 * Along one side: the `count` pixels from `first` on of the `out` that from..to becomes, of a picture of `size` pixels
 * that begins at `offset` -> {count, starts, lengths, weights: `most` for each; begin, end: of all that they need}.
 */
function taps({offset, size, from, to, out, first, count}) {
    const scale = Math.fround(to - from) / out, support = Math.max(1, scale), most = Math.ceil(support) * 2 + 1;
    const starts = new Int32Array(count), lengths = new Int32Array(count), weights = new Int32Array(count * most);
    for (let k = 0; k < count; k++) {
        const centre = from + (first + k + 0.5) * scale, step = 1 / support;
        const low = Math.max(0, Math.trunc(centre - support + 0.5));
        const high = Math.min(size, Math.trunc(centre + support + 0.5));
        const share = (x) => Math.max(0, 1 - Math.abs((x + low - centre + 0.5) * step));
        const shares = Array.from({length: high - low}, (_, x) => share(x));
        const sum = shares.reduce((total, share) => total + share, 0);
        starts[k] = offset + low;
        lengths[k] = high - low;
        shares.forEach((share, x) => { weights[k * most + x] = Math.trunc(0.5 + share / sum * 2 ** BITS); });
    }
    const begin = starts[0], end = starts[count - 1] + lengths[count - 1];
    return {count, starts, lengths, weights, most, begin, end};
}

function resample(picture, across, down) {
    const columns = across.end - across.begin, stride = 3 * across.count, half = 1 << (BITS - 1);
    const narrow = new Uint8ClampedArray((down.end - down.begin) * stride);
    const rows = Math.max(1, Math.floor(STRIP / columns));
    for (let top = down.begin; top < down.end; top += rows) {
        const taken = Math.min(rows, down.end - top), pixels = picture.strip(top, taken, across.begin, columns);
        for (let row = 0; row < taken; row++) {
            let to = (top - down.begin + row) * stride;
            for (let k = 0; k < across.count; k++) {
                let from = 4 * (row * columns + across.starts[k] - across.begin), red = half, green = half, blue = half;
                const begin = k * across.most, end = begin + across.lengths[k];
                for (let tap = begin; tap < end; tap++, from += 4) {
                    const weight = across.weights[tap];
                    red += pixels[from] * weight;
                    green += pixels[from + 1] * weight;
                    blue += pixels[from + 2] * weight;
                }
                narrow[to++] = red >> BITS;
                narrow[to++] = green >> BITS;
                narrow[to++] = blue >> BITS;
            }
        }
    }
    const seen = new Uint8ClampedArray(down.count * stride), sums = new Int32Array(stride);
    for (let k = 0; k < down.count; k++) {
        sums.fill(half);
        for (let tap = 0; tap < down.lengths[k]; tap++) {
            const weight = down.weights[k * down.most + tap], from = (down.starts[k] - down.begin + tap) * stride;
            for (let x = 0; x < stride; x++) sums[x] += narrow[from + x] * weight;
        }
        for (let x = 0; x < stride; x++) seen[k * stride + x] = sums[x] >> BITS;
    }
    return seen;
}
