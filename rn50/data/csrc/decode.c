/* The fast path: crops of JPEGs, resized, mirrored and written as RGB, decoding only what each crop needs.
 *
 * A table behind the end-of-image marker (made by rn50_index) says where every few MCUs begin in the bit stream and
 * what their DC predictions are, so that decoding can begin beside the crop. docs/fast_path.md explains the whole.
 * A JPEG that is not of the plain kind (progressive, restart markers, CMYK, a damaged header, ...) is reported as
 * UNSUPPORTED, for libjpeg-turbo to decode or to refuse.
 */
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "decode.h"
#ifdef __AVX2__
#include <immintrin.h>
#endif

const int32_t rn50_layout[6] = {
    sizeof(struct crop), offsetof(struct crop, flip), sizeof(struct batch), offsetof(struct batch, count),
    offsetof(struct batch, nanoseconds), PHASES,
};

typedef float f8 __attribute__((vector_size(32)));
typedef int32_t i8 __attribute__((vector_size(32)));
typedef uint8_t b16 __attribute__((vector_size(16)));

#define PEEK 10              /* bits of the first table lookup */
#define SLOW 0x80            /* flag of an entry whose extra bits did not fit in PEEK */
#define END_OF_BLOCK 128     /* added to a coefficient's number; more than any damage can add */
#define SPARE (6 * 64 * 4)   /* bytes, more than one MCU takes: decoding may run that far past the end unnoticed */
#define ENTRY 6              /* bytes of the table for each tile */
#define FOOTER 5             /* bytes after the table: MCUs in a tile, and a mark */
static const uint8_t MARK[4] = {'R', 'N', '5', '0'};

struct huffman {
    uint8_t spec[16 + 256];      /* the counts and symbols it was built from */
    uint32_t fast[1 << PEEK];    /* value << 16 | run << 8 | length, or symbol << 8 | SLOW | length, or 0 */
    uint32_t limit[18];          /* the codes of a length are below it; aligned to 16 bits */
    int offset[17], symbols;     /* symbols is 0 until it is built */
};

struct component {
    int h, v;                    /* blocks in an MCU */
    const struct huffman *dc, *ac;
    float scale[64];             /* dequantisation and the scaling of the DCT, in the order of a block */
    uint8_t *plane;              /* what is decoded of it, ... */
    int stride, x0, y0;          /* ... and where that begins, in samples of this component */
};

struct jpeg {
    int width, height, count, hmax, vmax, mcus_x, mcus_y;
    struct component part[3];
    const uint8_t *scan, *end;   /* the entropy-coded bytes and what follows */
    const uint8_t *table;        /* NULL: none */
    int tile, tiles_x;           /* MCUs in a tile, tiles in a row of MCUs */
};

struct bits { uint64_t buffer; int count; const uint8_t *next; }; /* the next bit is the buffer's highest */
struct buffer { void *data; size_t size; };
struct worker { /* of one thread */
    struct huffman huffman[2][2];
    struct buffer clean, planes, rows, weights;
    int64_t timed, last, spent[PHASES]; /* nanoseconds */
};

/* A zigzag order, transposed because the inverse DCT transposes once; numbers past 63 lead to what nothing reads. */
static const uint8_t PLACE[64 + 16] = {
    0,  8,  1,  2,  9,  16, 24, 17, 10, 3,  4,  11, 18, 25, 32, 40, 33, 26, 19, 12, 5,  6,  13, 20, 27, 34, 41,
    48, 56, 49, 42, 35, 28, 21, 14, 7,  15, 22, 29, 36, 43, 50, 57, 58, 51, 44, 37, 30, 23, 31, 38, 45, 52, 59,
    60, 53, 46, 39, 47, 54, 61, 62, 55, 63, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64,
};
static const double AAN[8] = {1, 1.387039845, 1.306562965, 1.175875602, 1, 0.785694958, 0.541196100, 0.275899379};

static void *grow(struct buffer *buffer, size_t wanted) {
    if (buffer->size < wanted) {
        free(buffer->data);
        buffer->size = (wanted + 63) / 64 * 64;
        if (!(buffer->data = aligned_alloc(64, buffer->size))) buffer->size = 0;
    }
    return buffer->data;
}

/* Workers between two batches: they keep their memory and their Huffman tables, so a small batch costs no more. */
static _Atomic(struct worker *) idle[64];

static struct worker *take_worker(void) {
    struct worker *worker = NULL;
    for (int i = 0; i < 64 && !worker; i++) worker = atomic_exchange(&idle[i], NULL);
    if (!worker) return calloc(1, sizeof *worker);
    worker->timed = worker->last = 0;
    memset(worker->spent, 0, sizeof worker->spent);
    return worker;
}

static void leave_worker(struct worker *worker) {
    for (int i = 0; i < 64 && worker; i++)
        if (!(worker = atomic_exchange(&idle[i], worker))) return;
    if (worker) free(worker->clean.data), free(worker->planes.data), free(worker->rows.data), free(worker->weights.data);
    free(worker);
}

/* The time since the last call was spent on `phase`. */
static inline void spend(struct worker *worker, enum phase phase) {
    struct timespec now;
    if (!worker->timed) return;
    clock_gettime(CLOCK_MONOTONIC, &now);
    int64_t time = now.tv_sec * (int64_t)1000000000 + now.tv_nsec;
    if (worker->last) worker->spent[phase] += time - worker->last;
    worker->last = time;
}

/* ------------------------------------------------------------------ header */

static int build_huffman(struct huffman *table, const uint8_t *spec, int symbols, int is_ac) {
    if (table->symbols == symbols && !memcmp(table->spec, spec, 16 + (size_t)symbols)) return OK;
    memset(table, 0, sizeof *table);
    memcpy(table->spec, spec, 16 + (size_t)symbols);
    uint32_t code = 0;
    for (int length = 1, index = 0; length <= 16; length++, code <<= 1) {
        table->offset[length] = index - (int)code;
        for (int i = 0; i < spec[length - 1]; i++, code++, index++) {
            int symbol = spec[16 + index], size = symbol & 15, run = symbol >> 4, left = PEEK - length - size;
            if (code >> length || (!is_ac && symbol > 11)) return UNSUPPORTED;
            for (uint32_t rest = 0; length <= PEEK && rest < 1u << (PEEK - length); rest++) {
                uint32_t entry = (uint32_t)symbol << 8 | SLOW | (uint32_t)length;
                if (is_ac && !size) {
                    entry = (uint32_t)(run == 15 ? 15 : END_OF_BLOCK) << 8 | (uint32_t)length;
                } else if (left >= 0) {
                    int value = (int)(rest >> left);
                    if (size && value < 1 << (size - 1)) value -= (1 << size) - 1;
                    entry = (uint32_t)value << 16 | (uint32_t)(is_ac ? run : 0) << 8 | (uint32_t)(length + size);
                }
                table->fast[code << (PEEK - length) | rest] = entry;
            }
        }
        table->limit[length] = code << (16 - length);
    }
    table->limit[17] = UINT32_MAX;
    table->symbols = symbols;
    return OK;
}

static int read_frame(struct jpeg *jpeg, const uint8_t *p, int length, int selectors[3]) {
    if (jpeg->count || length < 6 || p[0] != 8 || (p[5] != 1 && p[5] != 3) || length != 6 + 3 * p[5]) return UNSUPPORTED;
    jpeg->height = p[1] << 8 | p[2], jpeg->width = p[3] << 8 | p[4], jpeg->count = p[5], jpeg->hmax = jpeg->vmax = 1;
    if (!jpeg->width || !jpeg->height || (p[6] == 'R' && p[5] == 3)) return UNSUPPORTED;
    for (int c = 0; c < jpeg->count; c++) {
        struct component *part = &jpeg->part[c];
        part->h = jpeg->count == 1 ? 1 : p[7 + 3 * c] >> 4, part->v = jpeg->count == 1 ? 1 : p[7 + 3 * c] & 15;
        if (part->h < 1 || part->v < 1 || part->h > (c ? 1 : 2) || part->v > (c ? 1 : 2)) return UNSUPPORTED;
        if ((selectors[c] = p[8 + 3 * c]) > 3) return UNSUPPORTED;
        if (!c) jpeg->hmax = part->h, jpeg->vmax = part->v;
    }
    jpeg->mcus_x = (jpeg->width - 1) / (8 * jpeg->hmax) + 1, jpeg->mcus_y = (jpeg->height - 1) / (8 * jpeg->vmax) + 1;
    return OK;
}

static int read_header(struct jpeg *jpeg, struct worker *worker, const uint8_t *data, size_t size) {
    const uint8_t *p = data + 2, *end = data + size, *quant[4] = {0};
    int selectors[3] = {0}, defined = 0, marker = 0, length = 0;
    memset(jpeg, 0, sizeof *jpeg);
    if (size < 4 || data[0] != 0xFF || data[1] != 0xD8) return UNSUPPORTED;
    for (; marker != 0xDA; p += length) {
        if (end - p < 4 || p[0] != 0xFF) return UNSUPPORTED;
        marker = p[1], length = (p[2] << 8 | p[3]) - 2, p += 4;
        if (length < 0 || length > end - p) return UNSUPPORTED;
        if (marker == 0xDB) {
            for (int at = 0; at < length; at += 65) {
                if (p[at] > 3 || length - at < 65) return UNSUPPORTED;
                quant[p[at]] = p + at + 1;
            }
        } else if (marker == 0xC4) {
            for (int at = 0, symbols = 0; at < length; at += 17 + symbols, symbols = 0) {
                for (int i = 1; i <= 16 && length - at >= 17; i++) symbols += p[at + i];
                if ((p[at] & ~0x11) || !symbols || symbols > 256 || length - at < 17 + symbols) return UNSUPPORTED;
                struct huffman *table = &worker->huffman[p[at] >> 4][p[at] & 1];
                if (build_huffman(table, p + at + 1, symbols, p[at] >> 4)) return table->symbols = 0, UNSUPPORTED;
                defined |= 1 << (2 * (p[at] >> 4) + (p[at] & 1));
            }
        } else if (marker == 0xC0) {
            if (read_frame(jpeg, p, length, selectors)) return UNSUPPORTED;
        } else if (marker == 0xEE ? length >= 12 && !p[11] && jpeg->count != 1 : marker < 0xE0 && marker != 0xDA) {
            return UNSUPPORTED; /* RGB; another kind of frame, restart markers, ... */
        }
    }
    const uint8_t *scan = p - length;
    if (!jpeg->count || length != 4 + 2 * jpeg->count || scan[0] != jpeg->count) return UNSUPPORTED;
    if (p[-3] != 0 || p[-2] != 63 || p[-1] != 0) return UNSUPPORTED;
    for (int c = 0; c < jpeg->count; c++) {
        struct component *part = &jpeg->part[c];
        int dc = scan[2 + 2 * c] >> 4, ac = scan[2 + 2 * c] & 15;
        if (dc > 1 || ac > 1 || !(defined >> dc & 1) || !(defined >> ac & 4) || !quant[selectors[c]]) return UNSUPPORTED;
        part->dc = &worker->huffman[0][dc], part->ac = &worker->huffman[1][ac];
        for (int k = 0; k < 64; k++)
            part->scale[PLACE[k]] = (float)(quant[selectors[c]][k] * AAN[PLACE[k] / 8] * AAN[PLACE[k] % 8] / 8);
    }
    jpeg->scan = p, jpeg->end = end;
    if (end - p < FOOTER || memcmp(end - 4, MARK, 4) || !end[-FOOTER]) return OK;
    jpeg->tile = end[-FOOTER], jpeg->tiles_x = (jpeg->mcus_x - 1) / jpeg->tile + 1;
    int64_t bytes = (int64_t)jpeg->tiles_x * jpeg->mcus_y * ENTRY;
    if (end - FOOTER - p < bytes) return CORRUPT;
    jpeg->end = jpeg->table = end - FOOTER - bytes;
    return OK;
}

/* ------------------------------------------------------------------ entropy decoding */

/* Copies [from, to) without the zeros after 0xFF, up to a marker; beyond, `out` reads as zeros. Returns the end. */
static const uint8_t *unstuff(uint8_t *out, const uint8_t *from, const uint8_t *to) {
    while (from < to) {
        const uint8_t *ff = memchr(from, 0xFF, (size_t)(to - from));
        size_t count = (size_t)((ff ? ff + 1 : to) - from);
        memcpy(out, from, count);
        out += count, from += count;
        if (ff && from < to && *from++) { out--; break; }
    }
    memset(out, 0, SPARE);
    return out;
}

static inline void refill(struct bits *bits) {
    uint32_t word;
    if (bits->count > 32) return;
    memcpy(&word, bits->next, 4);
    bits->buffer |= (uint64_t)__builtin_bswap32(word) << (32 - bits->count);
    bits->next += 4, bits->count += 32;
}

static inline void skip(struct bits *bits, uint32_t count) { bits->buffer <<= count, bits->count -= (int)count; }

static inline int take_value(struct bits *bits, int size) {
    if (!size) return 0;
    int value = (int)(bits->buffer >> (64 - size));
    skip(bits, (uint32_t)size);
    return value < 1 << (size - 1) ? value - (1 << size) + 1 : value;
}

/* The symbol of a code that the first lookup did not settle, or -1. */
static int slow_symbol(const struct huffman *table, struct bits *bits, uint32_t entry) {
    uint32_t code = (uint32_t)(bits->buffer >> 48), length = entry ? entry & 0x3F : PEEK + 1;
    while (!entry && code >= table->limit[length]) length++;
    if (length > 16) return -1;
    skip(bits, length);
    return entry ? (int)(entry >> 8) : table->spec[16 + table->offset[length] + (int)(code >> (16 - length))];
}

/* One block of quantised coefficients into `block` (zeros until now); returns the number of the last one, or -1. */
static inline int read_block(const struct component *part, struct bits *bits, int *dc, int32_t *block) {
    int k = 1, last = 0, symbol;
    refill(bits);
    uint32_t entry = part->dc->fast[bits->buffer >> (64 - PEEK)];
    if (entry && !(entry & SLOW)) {
        skip(bits, entry & 0x3F);
        *dc = (int16_t)(*dc + ((int32_t)entry >> 16));
    } else {
        if ((symbol = slow_symbol(part->dc, bits, entry)) < 0) return -1;
        *dc = (int16_t)(*dc + take_value(bits, symbol));
    }
    block[0] = *dc;
    while (k < 64) {
        int value;
        refill(bits);
        entry = part->ac->fast[bits->buffer >> (64 - PEEK)];
        if (__builtin_expect(entry && !(entry & SLOW), 1)) {
            k += (int)(entry >> 8 & 0xFF);
            skip(bits, entry & 0x3F);
            if (k >= END_OF_BLOCK) break;
            value = (int32_t)entry >> 16;
        } else {
            if ((symbol = slow_symbol(part->ac, bits, entry)) < 0) return -1;
            if (!(symbol & 15) && symbol != 0xF0) break;
            k += symbol >> 4;
            value = take_value(bits, symbol & 15);
        }
        if (k >= 64) return -1;
        last = k;
        block[PLACE[k++]] = value;
    }
    return last;
}

/* ------------------------------------------------------------------ inverse DCT */

#define PICK(a, b, ...) __builtin_shuffle(a, b, (i8){__VA_ARGS__})

static inline void transpose(f8 r[8]) {
    f8 t[8], u[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = PICK(r[i], r[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        t[i + 1] = PICK(r[i], r[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    for (int i = 0; i < 8; i += i % 4 ? 3 : 1) {
        int j = i % 4 ? i + 1 : i;
        u[j] = PICK(t[i], t[i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
        u[j + 1] = PICK(t[i], t[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = PICK(u[i], u[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        r[i + 4] = PICK(u[i], u[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}

/* Arai, Agui and Nakajima's inverse DCT in one dimension, of eight columns at once. */
static inline void idct(f8 x[8]) {
    f8 a = x[0] + x[4], b = x[0] - x[4], d = x[2] + x[6], c = (x[2] - x[6]) * 1.414213562f - d;
    f8 e0 = a + d, e3 = a - d, e1 = b + c, e2 = b - c;
    f8 z13 = x[5] + x[3], z10 = x[5] - x[3], z11 = x[1] + x[7], z12 = x[1] - x[7], z5 = (z10 + z12) * 1.847759065f;
    f8 o0 = z11 + z13, o1 = z5 - z10 * 2.613125930f - o0;
    f8 o2 = (z11 - z13) * 1.414213562f - o1, o3 = z5 - z12 * 1.082392200f - o2;
    x[0] = e0 + o0, x[7] = e0 - o0, x[1] = e1 + o1, x[6] = e1 - o1;
    x[2] = e2 + o2, x[5] = e2 - o2, x[3] = e3 + o3, x[4] = e3 - o3;
}

/* Rounded and clamped. The loop is one that compilers turn into vector code. */
static inline void to_bytes(const f8 values[4], uint8_t out[32]) {
    const float *v = (const float *)values;
    for (int i = 0; i < 32; i++) {
        float x = v[i] + 0.5f;
        x = x < 0 ? 0 : x;
        x = x > 255 ? 255 : x;
        out[i] = (uint8_t)(int)x;
    }
}

static inline void write_block(const int32_t *block, const float *scale, int last, uint8_t *out, int stride) {
    f8 x[8], factors;
    i8 row;
    uint8_t bytes[64];
    if (last) {
        for (int i = 0; i < 8; i++) {
            memcpy(&row, block + 8 * i, sizeof row);
            memcpy(&factors, scale + 8 * i, sizeof factors);
            x[i] = __builtin_convertvector(row, f8) * factors;
        }
        x[0][0] += 128;
        idct(x);
        transpose(x);
        idct(x);
        to_bytes(x, bytes);
        to_bytes(x + 4, bytes + 32);
    } else {
        float level = (float)block[0] * scale[0] + 128.5f;
        memset(bytes, level < 0 ? 0 : level > 255 ? 255 : (int)level, 64);
    }
    for (int y = 0; y < 8; y++) memcpy(out + y * stride, bytes + 8 * y, 8);
}

/* ------------------------------------------------------------------ a rectangle of a JPEG */

static inline uint64_t table_entry(const struct jpeg *jpeg, int tile) {
    uint64_t entry = 0;
    memcpy(&entry, jpeg->table + (size_t)tile * ENTRY, ENTRY);
    return entry;
}

#define TILE_BITS(entry) ((entry) & 0x3FFF) /* then 12, 11 and 11 bits of DC prediction, signed */
static inline int tile_dc(uint64_t entry, int c) {
    return (int)((int64_t)(entry << (38 - 11 * c)) >> (c ? 53 : 52));
}

struct record { uint8_t *table; size_t room, used; }; /* a table in the making */

/* Whole MCUs around `pixels`, to the planes of the components; or only the table of the whole picture to `record`. */
static int decode_rectangle(struct jpeg *jpeg, struct worker *worker, struct box pixels, struct record *record) {
    int mcu_w = 8 * jpeg->hmax, mcu_h = 8 * jpeg->vmax, dc[3] = {0}, tile = 0, begin = 0, end = jpeg->mcus_x;
    int x0 = pixels.x0 / mcu_w, y0 = pixels.y0 / mcu_h, x1 = (pixels.x1 - 1) / mcu_w + 1, y1 = (pixels.y1 - 1) / mcu_h + 1;
    size_t room = 0, position = 0, raw = 0, read = 0; /* position: in bits, stuffing included */
    uint64_t entry = 0;
    for (int c = 0; c < jpeg->count; c++) {
        struct component *part = &jpeg->part[c];
        part->stride = (x1 - x0) * 8 * part->h, part->x0 = x0 * 8 * part->h, part->y0 = y0 * 8 * part->v;
        room += (size_t)part->stride * (size_t)((y1 - y0) * 8 * part->v);
    }
    uint8_t *clean = grow(&worker->clean, (size_t)(jpeg->end - jpeg->scan) + SPARE);
    uint8_t *plane = grow(&worker->planes, room + 8);
    if (!clean || !plane) return NO_MEMORY;
    for (int c = 0; c < jpeg->count; c++) {
        jpeg->part[c].plane = plane;
        plane += (size_t)jpeg->part[c].stride * (size_t)((y1 - y0) * 8 * jpeg->part[c].v);
    }
    struct bits bits = {.next = clean};
    const uint8_t *limit = jpeg->table ? NULL : unstuff(clean, jpeg->scan, jpeg->end) + sizeof bits.buffer;
    if (jpeg->table) begin = x0 / jpeg->tile * jpeg->tile, end = x1;
    for (int y = jpeg->table ? y0 : 0; y < y1; y++) {
        if (jpeg->table) {
            for (; tile < y * jpeg->tiles_x + begin / jpeg->tile; tile++) position += TILE_BITS(table_entry(jpeg, tile));
            size_t first = position, offset = position / 8, bytes = (size_t)(jpeg->end - jpeg->scan);
            for (; tile <= y * jpeg->tiles_x + (end - 1) / jpeg->tile; tile++)
                position += TILE_BITS(table_entry(jpeg, tile));
            if (offset >= bytes) return CORRUPT;
            if (position / 8 + 2 < bytes) bytes = position / 8 + 2; /* 2: the last byte is split, or stuffed */
            limit = unstuff(clean, jpeg->scan + offset, jpeg->scan + bytes) + sizeof bits.buffer;
            bits = (struct bits){.next = clean};
            refill(&bits);
            skip(&bits, first % 8);
        }
        for (int x = begin; x < end; x++) {
            if (record && x % jpeg->tile == 0) {
                entry = (uint64_t)(dc[0] & 0xFFF) << 14 | (uint64_t)(dc[1] & 0x7FF) << 26 | (uint64_t)(dc[2] & 0x7FF) << 37;
                for (int c = 0; c < jpeg->count; c++)
                    if (tile_dc(entry, c) != dc[c]) return UNSUPPORTED;
            } else if (jpeg->table && x % jpeg->tile == 0) {
                entry = table_entry(jpeg, y * jpeg->tiles_x + x / jpeg->tile);
                for (int c = 0; c < jpeg->count; c++) {
                    if (x > begin && tile_dc(entry, c) != dc[c]) return CORRUPT;
                    dc[c] = tile_dc(entry, c);
                }
            }
            for (int c = 0; c < jpeg->count; c++) {
                struct component *part = &jpeg->part[c];
                for (int block = 0; block < part->h * part->v; block++) {
                    int32_t values[64 + 8] __attribute__((aligned(32)));
                    memset(values, 0, 64 * sizeof *values);
                    int last = read_block(part, &bits, &dc[c], values);
                    if (last < 0) return CORRUPT;
                    if (x < x0 || x >= x1 || y < y0 || record) continue;
                    int row = (y - y0) * part->v + block / part->h, column = (x - x0) * part->h + block % part->h;
                    write_block(values, part->scale, last, part->plane + 8 * ((ptrdiff_t)row * part->stride + column),
                                part->stride);
                }
            }
            if (bits.next > limit) return CORRUPT;
            if (!record || ((x + 1) % jpeg->tile && x + 1 < end)) continue;
            size_t now = (size_t)(bits.next - clean) * 8 - (size_t)bits.count;
            for (; read < now / 8; read++) {
                if (jpeg->scan + raw >= jpeg->end) return CORRUPT;
                raw += jpeg->scan[raw] == 0xFF ? 2 : 1;
            }
            now = raw * 8 + now % 8, entry |= now - position;
            if (now - position > TILE_BITS(~0ull) || record->used + ENTRY + FOOTER > record->room) return UNSUPPORTED;
            memcpy(record->table + record->used, &entry, ENTRY);
            record->used += ENTRY, position = now;
        }
    }
    return OK;
}

/* ------------------------------------------------------------------ resizing */

struct axis { int taps, begin, end, *first; float *weights; }; /* out[i] = sum of weights[i][t] * in[first[i] + t] */
struct plane { const uint8_t *data; int stride, x0, y0, h, v; }; /* h, v: subsampling */

static inline int taps_of(double scale, int low, int high) {
    int taps = 2 * (int)ceil(scale > 1 ? scale : 1) + 1;
    return taps < high - low ? taps : high - low;
}

/* Pillow's antialiased bilinear filter: output i covers [start + i * scale, start + (i + 1) * scale), and samples
 * outside [low, high) do not exist. `first` counts from `origin`. */
static void make_axis(struct axis *axis, int size, double start, double scale, int low, int high, int origin) {
    double support = scale > 1 ? scale : 1;
    for (int i = 0; i < size; i++) {
        double center = start + (i + 0.5) * scale;
        int begin = (int)floor(center - support + 0.5), end = (int)floor(center + support + 0.5);
        begin = begin < low ? low : begin >= high ? high - 1 : begin;
        end = end > high ? high : end <= begin ? begin + 1 : end;
        int first = begin < high - axis->taps ? begin : high - axis->taps;
        float *weights = axis->weights + (ptrdiff_t)i * axis->taps, sum = 0, per = (float)(1 / support);
        for (int t = 0; t < axis->taps; t++) {
            float weight = 1 - fabsf((float)(first + t + 0.5 - center)) * per;
            weights[t] = weight > 0 && first + t >= begin && first + t < end ? weight : 0;
            sum += weights[t];
        }
        if (sum <= 0) weights[begin - first] = sum = 1;
        for (int t = 0; t < axis->taps; t++) weights[t] /= sum;
        axis->first[i] = first - origin;
    }
    axis->begin = axis->first[0], axis->end = axis->first[size - 1] + axis->taps;
}

static inline f8 widen(const uint8_t *p) {
#ifdef __AVX2__
    return (f8)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#else
    return (f8){p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]};
#endif
}

/* Eight rows of a plane, resized vertically, as columns[x][8] for the columns [begin, end). */
static void resize_rows(const struct plane *plane, const struct axis *axis, int row, int size, int begin, int end,
                        f8 *columns) {
    for (int x = begin; x < end; x += 8, columns += 8) {
        for (int r = 0; r < 8; r++) {
            int y = row + r < size ? row + r : size - 1;
            const uint8_t *p = plane->data + (ptrdiff_t)axis->first[y] * plane->stride + x;
            const float *weights = axis->weights + (ptrdiff_t)y * axis->taps;
            f8 sum = {0};
            for (int t = 0; t < axis->taps; t++, p += plane->stride) sum += widen(p) * weights[t];
            columns[r] = sum;
        }
        transpose(columns);
    }
}

static inline f8 resize_column(const struct axis *axis, const f8 *columns, int i) {
    const float *weights = axis->weights + (ptrdiff_t)i * axis->taps;
    f8 sum = {0};
    columns += axis->first[i] - axis->begin;
    for (int t = 0; t < axis->taps; t++) sum += columns[t] * weights[t];
    return sum;
}

#define BYTES(a, b, ...) __builtin_shuffle(a, b, (b16){__VA_ARGS__})

/* columns[count][8] to eight rows of `count` bytes, of which the first `rows` are written. */
static void write_rows(const uint8_t *columns, int count, int rows, uint8_t *out) {
    for (int j = 0; j < count; j += 8) {
        b16 q[4], pair[4], r[4];
        memcpy(q, columns + 8 * j, 64);
        for (int i = 0; i < 4; i++) q[i] = BYTES(q[i], q[i], 0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
        for (int i = 0; i < 2; i++) {
            pair[i] = BYTES(q[2 * i], q[2 * i + 1], 0, 1, 16, 17, 2, 3, 18, 19, 4, 5, 20, 21, 6, 7, 22, 23);
            pair[i + 2] = BYTES(q[2 * i], q[2 * i + 1], 8, 9, 24, 25, 10, 11, 26, 27, 12, 13, 28, 29, 14, 15, 30, 31);
        }
        for (int i = 0; i < 4; i += 2) {
            r[i] = BYTES(pair[i], pair[i + 1], 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
            r[i + 1] = BYTES(pair[i], pair[i + 1], 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
        }
        for (int i = 0; i < rows; i++)
            memcpy(out + (ptrdiff_t)i * count + j, (uint8_t *)r + 8 * i, count - j < 8 ? (size_t)(count - j) : 8);
    }
}

/* Planes (one: gray; three: YCbCr, or RGB already) to RGB [size, size, 3]. */
static int resize(const struct plane *planes, int count, int is_rgb, const struct crop *crop, int size,
                  struct worker *worker, uint8_t *out) {
    struct axis x[3], y[3];
    double scale_x[3], scale_y[3];
    struct box limit[3];
    size_t numbers = 0, room = 0, wide = (size_t)size;
    for (int c = 0; c < count; c++) {
        const struct plane *p = &planes[c];
        scale_x[c] = crop->scale_x / p->h, scale_y[c] = crop->scale_y / p->v;
        limit[c] = (struct box){crop->limit.x0 / p->h, crop->limit.y0 / p->v, (crop->limit.x1 - 1) / p->h + 1,
                                (crop->limit.y1 - 1) / p->v + 1};
        x[c].taps = taps_of(scale_x[c], limit[c].x0, limit[c].x1), y[c].taps = taps_of(scale_y[c], limit[c].y0, limit[c].y1);
        numbers += wide * (size_t)(2 + x[c].taps + y[c].taps);
        room += (size_t)(limit[c].x1 - limit[c].x0 + 8);
    }
    float *free_numbers = grow(&worker->weights, numbers * sizeof(float));
    f8 *columns[3] = {grow(&worker->rows, room * sizeof(f8) + (wide + 4) * 24)};
    if (!free_numbers || !columns[0]) return NO_MEMORY;
    for (int c = 0; c < count; c++) {
        const struct plane *p = &planes[c];
        if (c && p->h == p[-1].h && p->v == p[-1].v) {
            x[c] = x[c - 1], y[c] = y[c - 1];
        } else {
            x[c].weights = free_numbers, y[c].weights = x[c].weights + wide * (size_t)x[c].taps;
            x[c].first = (int *)(y[c].weights + wide * (size_t)y[c].taps), y[c].first = x[c].first + wide;
            free_numbers = (float *)(y[c].first + wide);
            make_axis(&x[c], size, crop->x / p->h, scale_x[c], limit[c].x0, limit[c].x1, p->x0);
            make_axis(&y[c], size, crop->y / p->v, scale_y[c], limit[c].y0, limit[c].y1, p->y0);
        }
        if (c) columns[c] = columns[c - 1] + (size_t)(x[c - 1].end - x[c - 1].begin + 7) / 8 * 8;
    }
    uint8_t *strip = (uint8_t *)(columns[0] + room);
    for (int row = 0; row < size; row += 8) {
        for (int c = 0; c < count; c++)
            resize_rows(&planes[c], &y[c], row, size, x[c].begin, x[c].end, columns[c]);
        spend(worker, ROWS);
        for (int i = 0; i < size; i += 4) {
            f8 rgb[4][3];
            for (int k = 0; k < 4; k++) {
                int column = i + k < size ? i + k : size - 1;
                if (crop->flip) column = size - 1 - column;
                for (int c = 0; c < 3; c++) rgb[k][c] = c < count ? resize_column(&x[c], columns[c], column) : rgb[k][0];
                if (is_rgb || count == 1) continue;
                f8 luma = rgb[k][0], cb = rgb[k][1] - 128.0f, cr = rgb[k][2] - 128.0f;
                rgb[k][0] = luma + 1.402f * cr; /* JFIF's conversion, ITU-T T.871 */
                rgb[k][1] = luma - 0.344136f * cb - 0.714136f * cr;
                rgb[k][2] = luma + 1.772f * cb;
            }
            for (int k = 0; k < 3; k++) to_bytes((f8 *)rgb + 4 * k, strip + 24 * i + 32 * k);
        }
        write_rows(strip, 3 * size, size - row < 8 ? size - row : 8, out + (size_t)row * 3 * wide);
        spend(worker, COLUMNS);
    }
    return OK;
}

/* ------------------------------------------------------------------ samples */

/* The pixels that the filters reach. */
static struct box reach(const struct crop *crop, int size) {
    double x = fmax(crop->scale_x, 2) + 1, y = fmax(crop->scale_y, 2) + 1; /* 2: a sample of chroma */
    struct box limit = crop->limit;
    return (struct box){(int)fmax(limit.x0, crop->x - x), (int)fmax(limit.y0, crop->y - y),
                        (int)fmin(limit.x1, ceil(crop->x + size * crop->scale_x + x)),
                        (int)fmin(limit.y1, ceil(crop->y + size * crop->scale_y + y))};
}

static int decode_pixels(const uint8_t *rgb, int width, const struct crop *crop, int size, struct worker *worker,
                         uint8_t *out) {
    struct box box = reach(crop, size);
    int wide = box.x1 - box.x0, high = box.y1 - box.y0;
    size_t room = (size_t)wide * (size_t)high;
    uint8_t *copy = grow(&worker->planes, 3 * room + 8);
    if (!copy) return NO_MEMORY;
    for (int y = 0; y < high; y++) {
        const uint8_t *row = rgb + 3 * ((ptrdiff_t)(box.y0 + y) * width + box.x0);
        for (int c = 0; c < 3; c++)
            for (int x = 0; x < wide; x++) copy[(size_t)c * room + (size_t)(y * wide + x)] = row[3 * x + c];
    }
    struct plane planes[3];
    for (size_t c = 0; c < 3; c++) planes[c] = (struct plane){copy + c * room, wide, box.x0, box.y0, 1, 1};
    spend(worker, DECODE);
    return resize(planes, 3, 1, crop, size, worker, out);
}

static int decode_jpeg(const uint8_t *data, size_t bytes, int width, int height, const struct crop *crop, int size,
                       struct worker *worker, uint8_t *out) {
    struct jpeg jpeg;
    struct plane planes[3];
    int status = read_header(&jpeg, worker, data, bytes);
    if (!status && (jpeg.width != width || jpeg.height != height)) status = UNSUPPORTED;
    spend(worker, HEADER);
    if (!status) status = decode_rectangle(&jpeg, worker, reach(crop, size), NULL);
    if (status) return status;
    spend(worker, DECODE);
    for (int c = 0; c < jpeg.count; c++) {
        struct component *p = &jpeg.part[c];
        planes[c] = (struct plane){p->plane, p->stride, p->x0, p->y0, jpeg.hmax / p->h, jpeg.vmax / p->v};
    }
    return resize(planes, jpeg.count, 0, crop, size, worker, out);
}

struct work { const struct batch *batch; atomic_int next, failed; };

static void *decode_samples(void *argument) {
    struct work *work = argument;
    const struct batch *b = work->batch;
    struct worker *worker = take_worker();
    if (worker && b->nanoseconds) worker->timed = 1, spend(worker, HEADER);
    for (int i; (i = atomic_fetch_add(&work->next, 1)) < b->count;) {
        uint8_t *out = b->out + (size_t)i * 3 * (size_t)b->size * (size_t)b->size;
        const struct crop *crop = &b->crops[i];
        if (!worker) b->status[i] = NO_MEMORY;
        else if (b->raw[i]) b->status[i] = decode_pixels(b->data[i], b->widths[i], crop, b->size, worker, out);
        else b->status[i] = decode_jpeg(b->data[i], b->bytes[i], b->widths[i], b->heights[i], crop, b->size, worker, out);
        if (b->status[i]) atomic_fetch_add(&work->failed, 1);
    }
    for (int i = 0; worker && worker->timed && i < PHASES; i++) atomic_fetch_add(&b->nanoseconds[i], worker->spent[i]);
    leave_worker(worker);
    return NULL;
}

/* Threads that wait for work. A new one for each batch would often begin on the caller's busy core and stay there until
 * the batch is done. */
static struct pool {
    pthread_mutex_t turn, lock; /* turn: of one batch */
    pthread_cond_t wake, done;
    struct work *work;
    int threads, tickets, running; /* tickets: shares of `work` that no thread has taken up yet */
} pool = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, PTHREAD_COND_INITIALIZER,
          NULL, 0, 0, 0};

static void *serve(void *unused) {
    pthread_mutex_lock(&pool.lock);
    for (;;) {
        while (!pool.tickets) pthread_cond_wait(&pool.wake, &pool.lock);
        struct work *work = pool.work;
        pool.tickets--;
        pthread_mutex_unlock(&pool.lock);
        decode_samples(work);
        pthread_mutex_lock(&pool.lock);
        if (!--pool.running) pthread_cond_signal(&pool.done);
    }
    return unused;
}

/* A forked child has none of the threads. */
static void forget_pool(void) {
    pool = (struct pool){PTHREAD_MUTEX_INITIALIZER, PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER,
                         PTHREAD_COND_INITIALIZER, NULL, 0, 0, 0};
}

__attribute__((constructor)) static void prepare_pool(void) { pthread_atfork(NULL, NULL, forget_pool); }

int rn50_decode(const struct batch *batch, int threads) {
    struct work work = {batch, 0, 0};
    int helpers = (threads < batch->count ? threads : batch->count) - 1;
    pthread_t thread;
    pthread_mutex_lock(&pool.turn);
    pthread_mutex_lock(&pool.lock);
    while (pool.threads < helpers && !pthread_create(&thread, NULL, serve, NULL)) pthread_detach(thread), pool.threads++;
    if (helpers > pool.threads) helpers = pool.threads; /* fewer do the same work */
    pool.work = &work, pool.tickets = pool.running = helpers > 0 ? helpers : 0;
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
    decode_samples(&work);
    pthread_mutex_lock(&pool.lock);
    pool.running -= pool.tickets, pool.tickets = 0; /* too late for them */
    while (pool.running) pthread_cond_wait(&pool.done, &pool.lock);
    pthread_mutex_unlock(&pool.lock);
    pthread_mutex_unlock(&pool.turn);
    return work.failed;
}

int64_t rn50_index(const uint8_t *data, size_t size, int tile, uint8_t *table, size_t room) {
    struct jpeg jpeg;
    struct record record = {table, room, 0};
    struct worker *worker = take_worker();
    int status = worker ? read_header(&jpeg, worker, data, size) : NO_MEMORY;
    if (!status && jpeg.table) status = UNSUPPORTED; /* it has one */
    jpeg.tile = tile;
    if (!status) status = decode_rectangle(&jpeg, worker, (struct box){0, 0, jpeg.width, jpeg.height}, &record);
    if (!status) table[record.used] = (uint8_t)tile, memcpy(table + record.used + 1, MARK, 4);
    leave_worker(worker);
    return status ? -status : (int64_t)(record.used + FOOTER);
}
