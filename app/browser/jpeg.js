// Is a JPEG whole? Browsers show gray for what is missing or damaged, and say nothing. libjpeg warns of it: this walks
// through the same Huffman codes, without making pixels, and finds the same faults (jdhuff.c, jdphuff.c, jdmarker.c).

// Of what is walked through at all: 64 bits for each of a picture's blocks, and all blocks again for each scan.
export const MAX_PIXELS = 100_000_000, MAX_SCANS = 100;
const SCAN = 0xda, END = 0xd9;
// An entry of a code table, for each of the 65536 ways in which a scan's bits can go on: bits of the code, those of the
// value behind it << 5, zeros before that << 9, and whether the block ends here or no code begins so.
const BLOCK_ENDS = 1 << 13, NO_CODE = 1 << 14;
const PREMATURE = "Corrupt JPEG data: premature end of data segment", BAD_CODE = "Corrupt JPEG data: bad Huffman code";

const hex = (marker) => "0x" + marker.toString(16).padStart(2, "0");
const isFrame = (marker) => marker >= 0xc0 && marker <= 0xcf && ![0xc4, 0xc8, 0xcc].includes(marker);
const isRestart = (marker) => marker >= 0xd0 && marker <= 0xd7;

/**
 * A JPEG's bytes -> {segments: [{marker, begin, end}], their contents, up to the header of the first scan; frame:
 * {width, height, progressive} or null; scans: how many; end: where the last one ends; checked: whether all scans were
 * of a kind that this reads; problem: libjpeg's words, or ""; cutOff: whether it has no end of the image either}.
 */
export function examine(data) {
    const found = {segments: [], frame: null, scans: 0, end: 2, checked: true, problem: "", cutOff: lacksEnd(data)};
    const tables = new Map(), room = new Uint8Array(data.length + 3);
    let interval = 0, at = 2, segment;
    while ((segment = nextSegment(data, at)) && segment.marker !== END) {
        const {marker, begin, end} = segment, content = data.subarray(begin, end);
        at = end;
        if (!found.scans) found.segments.push(segment);
        if (isFrame(marker)) found.frame ??= readFrame(marker, content);
        if (marker === 0xc4) readTables(content, tables);
        if (marker === 0xdd) interval = content[0] << 8 | content[1];
        if (marker !== SCAN) continue;
        const scan = ++found.scans <= MAX_SCANS && found.frame?.parts && readScan(content, found.frame, tables);
        if (!scan) return {...found, checked: false};
        const {end: next, problem} = scan.problem ? scan : follow(scan, data, end, interval, room);
        if (problem) return {...found, problem};
        found.end = at = next;
    }
    // without the end marker every pixel may be there all the same
    const whole = found.scans && (segment || !found.frame.progressive || isComplete(found.frame));
    return whole ? found : {...found, problem: "Premature end of JPEG file"};
}

/** {marker, begin, end} of the content of the first segment from `at` on; null where there is none. */
function nextSegment(data, at) {
    for (at = data.indexOf(0xff, at); at >= 0 && at < data.length - 1; at = data.indexOf(0xff, at + 1)) {
        const marker = data[at + 1];
        if (marker === END) return {marker, begin: at + 2, end: at + 2};
        if (marker <= 0x01 || marker === 0xff || isRestart(marker)) continue;
        const length = data[at + 2] << 8 | data[at + 3], end = at + 2 + length;
        return length >= 2 && end <= data.length ? {marker, begin: at + 4, end} : null;
    }
    return null;
}

function lacksEnd(data) {
    for (let at = data.length - 2; (at = data.lastIndexOf(0xff, at)) >= 0; at--) {
        if (data[at + 1] === END) return false;
        if (data[at + 1] === SCAN || at === 0) return true;
    }
    return true;
}

/**
 * parts: of each component {id, wide, high: its blocks; h, v: its blocks in an MCU; bits: of each coefficient the last
 * one that scans have brought, -1 before; known: of each block the coefficients that are not 0, as 64 bits}.
 */
function readFrame(marker, content) {
    const height = content[1] << 8 | content[2], width = content[3] << 8 | content[4];
    const found = {width, height, progressive: marker === 0xc2, parts: null};
    if (marker > 0xc2 || content[0] !== 8 || content.length < 6 + 3 * content[5] || !(width * height)) return found;
    if (found.progressive && width * height > MAX_PIXELS) return found;
    const parts = Array.from({length: content[5]}, (_, k) => {
        const [id, factors] = content.subarray(6 + 3 * k);
        return {id, h: factors >> 4, v: factors & 15, bits: new Int8Array(64).fill(-1)};
    });
    const most = {h: Math.max(...parts.map(({h}) => h)), v: Math.max(...parts.map(({v}) => v))};
    if (!parts.every(({h, v}) => h >= 1 && h <= 4 && v >= 1 && v <= 4)) return found;
    for (const part of parts) {
        part.wide = Math.ceil(Math.ceil(width * part.h / most.h) / 8);
        part.high = Math.ceil(Math.ceil(height * part.v / most.v) / 8);
    }
    const mcus = Math.ceil(width / (8 * most.h)) * Math.ceil(height / (8 * most.v));
    return {...found, parts, mcus};
}

const isComplete = ({parts}) => parts.every(({bits}) => bits.every((bit) => bit === 0));

function readTables(content, tables) {
    for (let at = 0; at + 17 <= content.length;) {
        const counts = content.subarray(at + 1, at + 17), total = counts.reduce((sum, count) => sum + count, 0);
        tables.set(content[at], {counts, symbols: content.subarray(at + 17, at + 17 + total)});
        at += 17 + total;
    }
}

function codes(tables, id) {
    const table = tables.get(id);
    if (!table) return null;
    if (table.codes) return table.codes;
    table.codes = new Uint16Array(65536).fill(17 | NO_CODE | BLOCK_ENDS);
    let code = 0, place = 0;
    for (let length = 1; length <= 16; length++, code <<= 1) {
        for (let k = 0; k < table.counts[length - 1]; k++, code++) {
            const symbol = table.symbols[place++], ends = (symbol & 15) === 0 && symbol !== 0xf0 ? BLOCK_ENDS : 0;
            table.codes.fill(length | symbol << 5 | ends, code << (16 - length), (code + 1) << (16 - length));
        }
    }
    return table.codes;
}

/**
 * The header of a scan -> {units: how many MCUs it has, read: what reads some of them, problem}; null where it is of a
 * kind that this does not know, like frames of motion JPEG, which leave out their tables.
 */
function readScan(content, {parts, progressive, mcus}, tables) {
    const count = content[0], [first, last, places] = content.subarray(1 + 2 * count);
    const chosen = Array.from({length: count}, (_, k) => {
        const part = parts.find(({id}) => id === content[1 + 2 * k]), ids = content[2 + 2 * k];
        return {part, dc: codes(tables, ids >> 4), ac: codes(tables, 0x10 | ids & 15)};
    });
    if (!count || count > 4 || places === undefined || chosen.some(({part}) => !part)) return null;
    const alone = chosen[0].part, units = count > 1 ? mcus : alone.wide * alone.high;
    const blocks = chosen.flatMap((one) => Array(count > 1 ? one.part.h * one.part.v : 1).fill(one));
    const dcs = blocks.map(({dc}) => dc), acs = blocks.map(({ac}) => ac);
    if (!progressive) {
        if ([...dcs, ...acs].includes(null)) return null;
        return {units, read: (bits, limit, from, to) => readBlocks(bits, limit, dcs, acs, to - from)};
    }
    const before = places >> 4, low = places & 15, refines = before > 0;
    if (first > last || last > 63 || (first ? count > 1 : last > 0) || (refines && low !== before - 1) || low > 13) {
        return {problem: `Invalid progressive/lossless parameters Ss=${first} Se=${last} Ah=${before} Al=${low}`};
    }
    for (const {part: {bits}} of chosen) {
        const known = bits.subarray(first, last + 1);
        if ((first && bits[0] < 0) || known.some((bit) => Math.max(bit, 0) !== before)) {
            return {problem: "Inconsistent progression sequence"};
        }
        known.fill(low);
    }
    if (!first) {
        if (!refines && dcs.includes(null)) return null;
        if (refines) return {units, read: (bits, limit, from, to) => (to - from) * dcs.length};
        return {units, read: (bits, limit, from, to) => readBlocks(bits, limit, dcs, null, to - from)};
    }
    if (!acs[0]) return null;
    const known = alone.known ??= new Uint32Array(2 * units), read = refines ? refineBand : readBand;
    return {units, read: (bits, limit, from, to) => read(bits, limit, acs[0], first, last, known, from, to)};
}

/** Follow a scan that begins `at` to where it ends -> {end, problem}. */
function follow({units, read}, data, at, interval, room) {
    for (let from = 0, restart = 0; ; restart = (restart + 1) % 8) {
        const to = interval ? Math.min(from + interval, units) : units;
        const {length, end} = unstuff(data, at, room), used = read(room, 8 * length, from, to);
        if (used > 8 * length) return {problem: PREMATURE};
        if (used < 0) return {problem: BAD_CODE};
        if (to === units) return {end, problem: ""};
        const marker = data[end + 1] ?? END, extra = length - Math.ceil(used / 8);
        if (extra) return {problem: `Corrupt JPEG data: ${extra} extraneous bytes before marker ${hex(marker)}`};
        const wrong = `Corrupt JPEG data: found marker ${hex(marker)} instead of RST${restart}`;
        if (marker !== 0xd0 + restart) return {problem: wrong};
        from = to;
        at = end + 2;
    }
}

/** Copy a scan's bytes up to its next marker into `room`, without the zeros that keep 0xff from being one. */
function unstuff(data, at, room) {
    let length = 0;
    while (at < data.length) {
        const byte = data[at++];
        if (byte === 0xff) {
            while (data[at] === 0xff) at++;
            if (data[at] !== 0) return {length, end: at - 1};
            at++;
        }
        room[length++] = byte;
    }
    return {length, end: at};
}

// The readers walk through `bits` and return how many they have used: more than `limit` where those are not enough, and
// less than 0 where they are no code.

/** MCUs whose blocks have the tables dcs and acs: all coefficients, or where acs is null the first of each block. */
function readBlocks(bits, limit, dcs, acs, count) {
    let at = 0, all = 0;
    for (; count > 0; count--) {
        for (let block = 0; block < dcs.length; block++) {
            let entry = dcs[block][peek(bits, at)];
            at += (entry & 31) + (entry >> 5 & 15);
            all |= entry;
            if (acs === null) continue;
            const ac = acs[block];
            for (let k = 1; k < 64; k++) {
                entry = ac[peek(bits, at)];
                at += (entry & 31) + (entry >> 5 & 15);
                all |= entry;
                if (entry & BLOCK_ENDS) break;
                k += entry >> 9;
            }
        }
        if (at > limit) return at;
        if (all & NO_CODE) return -1;
    }
    return at;
}

/** The coefficients first..last of the blocks from..to, those that are not 0 for the first time: marked in `known`. */
function readBand(bits, limit, ac, first, last, known, from, to) {
    let at = 0;
    for (let block = from, empty = 0; block < to; block++) {
        if (empty > 0) {
            empty--;
            continue;
        }
        for (let k = first; k <= last; k++) {
            const entry = ac[peek(bits, at)], size = entry >> 5 & 15, run = entry >> 9 & 15;
            at += entry & 31;
            if (entry & NO_CODE) return at > limit ? at : -1;
            if (entry & BLOCK_ENDS) {
                empty = (1 << run) - 1 + (peek(bits, at) >> (16 - run));
                at += run;
                break;
            }
            k += run;
            at += size;
            if (size) mark(known, block, k);
        }
        if (at > limit) return at;
    }
    return at;
}

/** The same in a scan that brings one more bit of them: each that is not 0 already has its own. */
function refineBand(bits, limit, ac, first, last, known, from, to) {
    let at = 0;
    for (let block = from, empty = 0; block < to; block++) {
        let k = first;
        for (; empty === 0 && k <= last; k++) {
            const entry = ac[peek(bits, at)], size = entry >> 5 & 15;
            let run = entry >> 9 & 15;
            at += entry & 31;
            if (entry & NO_CODE || size > 1) return at > limit ? at : -1;
            if (entry & BLOCK_ENDS) {
                empty = (1 << run) + (peek(bits, at) >> (16 - run));
                at += run;
                break;
            }
            at += size;
            for (; k <= last; k++) {
                if (known[2 * block + (k >> 5)] >>> (k & 31) & 1) at++;
                else if (run-- === 0) break;
            }
            if (size) mark(known, block, k);
        }
        if (empty > 0) {
            for (; k <= last; k++) at += known[2 * block + (k >> 5)] >>> (k & 31) & 1;
            empty--;
        }
        if (at > limit) return at;
    }
    return at;
}

/** The 16 bits from `at` on. */
function peek(bits, at) {
    const byte = at >> 3;
    return (bits[byte] << 16 | bits[byte + 1] << 8 | bits[byte + 2]) >> (8 - (at & 7)) & 0xffff;
}

function mark(known, block, k) {
    known[2 * block + (Math.min(k, 63) >> 5)] |= 1 << (Math.min(k, 63) & 31);
}
