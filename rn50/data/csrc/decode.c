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

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "bits and tables are read as little-endian words");

const int32_t rn50_layout[6] = {
    sizeof(struct crop), offsetof(struct crop, flip), sizeof(struct batch), offsetof(struct batch, count),
    offsetof(struct batch, nanoseconds), PHASES,
};

typedef float f4 __attribute__((vector_size(16)));
typedef float f8 __attribute__((vector_size(32)));
typedef int32_t i4 __attribute__((vector_size(16)));
typedef int32_t i8 __attribute__((vector_size(32)));
typedef int16_t s8 __attribute__((vector_size(16)));
typedef int16_t s16 __attribute__((vector_size(32)));
typedef uint8_t b8 __attribute__((vector_size(8)));
#define INLINE static inline __attribute__((always_inline)) /* so that constant arguments become constants */

#define DC_PEEK 9            /* bits that look up a code of DC */
#define PEEK 11              /* bits that look up one or two coefficients */
#define END_OF_BLOCK 128     /* added to a coefficient's number; more than two codes can add */
#define SPARE (6 * 64 * 4)   /* bytes, more than one MCU takes: decoding may run that far past the end unnoticed */
#define ENTRY 6              /* bytes of the table for each tile */
#define FOOTER 5             /* bytes after the table: MCUs in a tile, and a mark */
static const uint8_t MARK[4] = {'R', 'N', '5', '0'};

struct code { uint8_t length, symbol; }; /* length 0: it is longer than what looked it up */

/* The first two codes of AC with their values, or the first alone and a second step of 0: `bits` are both, a step is what
 * it adds to the number of the coefficient. Where not even one fits, `bits` is 0 and `code` the first, if that fits. */
struct pair {
    uint8_t bits, first_bits, first_step, second_step;
    union { int16_t values[2]; struct code code; };
};

struct huffman {
    uint8_t spec[16 + 256];      /* the counts and symbols it was built from */
    union { struct code codes[1 << DC_PEEK]; struct pair pairs[1 << PEEK]; };
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
static const uint8_t PLACE[256] = {
    0,  8,  1,  2,  9,  16, 24, 17, 10, 3,  4,  11, 18, 25, 32, 40, 33, 26, 19, 12, 5,  6,  13, 20, 27, 34, 41,
    48, 56, 49, 42, 35, 28, 21, 14, 7,  15, 22, 29, 36, 43, 50, 57, 58, 51, 44, 37, 30, 23, 31, 38, 45, 52, 59,
    60, 53, 46, 39, 47, 54, 61, 62, 55, 63,
    [64 ... 255] = 64,
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

static void build_pair(struct pair *pair, const struct code *codes, uint32_t bits) {
    for (int n = 0; n < 2; n++) {
        uint32_t left = bits << pair->bits & ((1u << PEEK) - 1);
        struct code code = codes[left];
        int size = code.symbol & 15, run = code.symbol >> 4, used = pair->bits + code.length + size;
        if (!n) pair->code = code;
        if (!code.length || used > PEEK) return;
        int value = (int)(left >> (PEEK - code.length - size)) & ((1 << size) - 1);
        if (value < 1 << size >> 1) value -= (1 << size) - 1;
        pair->bits = (uint8_t)used;
        uint8_t step = size || run == 15 ? (uint8_t)(run + 1) : END_OF_BLOCK;
        if (!n) pair->first_bits = pair->bits, pair->first_step = step, pair->values[0] = pair->values[1] = (int16_t)value;
        else pair->second_step = step, pair->values[1] = (int16_t)value;
        if (step == END_OF_BLOCK) return;
    }
}

static int build_huffman(struct huffman *table, const uint8_t *spec, int symbols, int is_ac) {
    if (table->symbols == symbols && !memcmp(table->spec, spec, 16 + (size_t)symbols)) return OK;
    memset(table, 0, sizeof *table);
    memcpy(table->spec, spec, 16 + (size_t)symbols);
    int peek = is_ac ? PEEK : DC_PEEK;
    struct code codes[1 << PEEK] = {0};
    uint32_t code = 0;
    for (int length = 1, index = 0; length <= 16; length++, code <<= 1) {
        table->offset[length] = index - (int)code;
        for (int i = 0; i < spec[length - 1]; i++, code++, index++) {
            if (code >> length || (!is_ac && spec[16 + index] > 11)) return UNSUPPORTED;
            for (uint32_t rest = 0; length <= peek && rest < 1u << (peek - length); rest++)
                codes[code << (peek - length) | rest] = (struct code){(uint8_t)length, spec[16 + index]};
        }
        table->limit[length] = code << (16 - length);
    }
    table->limit[17] = UINT32_MAX;
    if (!is_ac) memcpy(table->codes, codes, sizeof table->codes);
    for (uint32_t bits = 0; is_ac && bits < 1u << PEEK; bits++) build_pair(&table->pairs[bits], codes, bits);
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

/* To 56 bits at least, without a branch that would be guessed wrong (Giesen, "Reading bits in far too many ways"). */
static inline void refill(struct bits *bits) {
    uint64_t word;
    memcpy(&word, bits->next, 8);
    bits->buffer |= __builtin_bswap64(word) >> bits->count;
    bits->next += (63 - bits->count) >> 3, bits->count |= 56;
}

static inline void skip(struct bits *bits, int count) { bits->buffer <<= count, bits->count -= count; }

static inline int take_value(struct bits *bits, int size) {
    int value = (int)(bits->buffer >> 1 >> (63 - size)), negative = (int)(~bits->buffer >> 63);
    skip(bits, size);
    return value - (((1 << size) - 1) & -negative);
}

/* The symbol of a code that is longer than `peek`, or -1. */
static int take_long_code(const struct huffman *table, struct bits *bits, int peek) {
    uint32_t code = (uint32_t)(bits->buffer >> 48);
    int length = peek + 1;
    while (code >= table->limit[length]) length++;
    if (length > 16) return -1;
    skip(bits, length);
    return table->spec[16 + table->offset[length] + (int)(code >> (16 - length))];
}

static inline int take_code(const struct huffman *table, struct bits *bits, struct code code, int peek) {
    if (__builtin_expect(!code.length, 0)) return refill(bits), take_long_code(table, bits, peek);
    skip(bits, code.length);
    return code.symbol;
}

/* One block of quantised coefficients into `block` (zeros until now); returns the number of the last one, or -1. */
static inline int read_block(const struct component *part, struct bits *stream, int *dc, int16_t *block) {
    struct bits bits = *stream, before;
    int k = 0, first, symbol;
    refill(&bits);
    if ((symbol = take_code(part->dc, &bits, part->dc->codes[bits.buffer >> (64 - DC_PEEK)], DC_PEEK)) < 0) return -1;
    *dc = (int16_t)(*dc + take_value(&bits, symbol));
    block[0] = (int16_t)*dc;
    for (;;) {
        refill(&bits);
        for (int n = 0; n < 56 / PEEK; n++) {
            struct pair pair = part->ac->pairs[bits.buffer >> (64 - PEEK)];
            if (__builtin_expect(!pair.bits, 0)) {
                if ((symbol = take_code(part->ac, &bits, pair.code, PEEK)) < 0) return -1;
                refill(&bits);
                if (!(symbol & 15) && symbol != 0xF0) goto end;
                if ((k += (symbol >> 4) + 1) > 63) return -1;
                block[PLACE[k]] = (int16_t)take_value(&bits, symbol & 15);
                if (k == 63) goto end;
                break;
            }
            before = bits, first = k + pair.first_step, k = first + pair.second_step;
            block[PLACE[first]] = pair.values[0], block[PLACE[k]] = pair.values[1];
            skip(&bits, pair.bits);
            if (k < 63) continue;
            if (first == 63) { /* what follows is another block's */
                bits = before, k = 63;
                skip(&bits, pair.first_bits);
            } else if (k > 63) {
                k -= END_OF_BLOCK;
                if (k < 0 || k > 63) return -1;
            }
            goto end;
        }
    }
end:
    *stream = bits;
    return k;
}

/* ------------------------------------------------------------------ inverse DCT */

/* Both without loops, in which GCC keeps the vectors in memory. */
#ifdef __AVX2__
#define PICK(a, b, ...) __builtin_shuffle(a, b, (i8){__VA_ARGS__})
#define MERGE_1(a, b, low, high) low = PICK(a, b, 0, 8, 1, 9, 4, 12, 5, 13), high = PICK(a, b, 2, 10, 3, 11, 6, 14, 7, 15)
#define MERGE_2(a, b, low, high) low = PICK(a, b, 0, 1, 8, 9, 4, 5, 12, 13), high = PICK(a, b, 2, 3, 10, 11, 6, 7, 14, 15)
#define MERGE_4(a, b, low, high) low = PICK(a, b, 0, 1, 2, 3, 8, 9, 10, 11), high = PICK(a, b, 4, 5, 6, 7, 12, 13, 14, 15)

INLINE void transpose(f8 r[8]) {
    f8 t[8], u[8];
    MERGE_1(r[0], r[1], t[0], t[1]), MERGE_1(r[2], r[3], t[2], t[3]);
    MERGE_1(r[4], r[5], t[4], t[5]), MERGE_1(r[6], r[7], t[6], t[7]);
    MERGE_2(t[0], t[2], u[0], u[1]), MERGE_2(t[1], t[3], u[2], u[3]);
    MERGE_2(t[4], t[6], u[4], u[5]), MERGE_2(t[5], t[7], u[6], u[7]);
    MERGE_4(u[0], u[4], r[0], r[4]), MERGE_4(u[1], u[5], r[1], r[5]);
    MERGE_4(u[2], u[6], r[2], r[6]), MERGE_4(u[3], u[7], r[3], r[7]);
}
#else /* by quarters, in the vectors that other processors have: GCC would shuffle longer ones number by number */
#define PICK(a, b, ...) __builtin_shuffle(a, b, (i4){__VA_ARGS__})

INLINE void transpose_quarter(const f4 *in, f4 *out) {
    f4 a = PICK(in[0], in[2], 0, 4, 1, 5), b = PICK(in[0], in[2], 2, 6, 3, 7);
    f4 c = PICK(in[4], in[6], 0, 4, 1, 5), d = PICK(in[4], in[6], 2, 6, 3, 7);
    out[0] = PICK(a, c, 0, 1, 4, 5), out[2] = PICK(a, c, 2, 3, 6, 7);
    out[4] = PICK(b, d, 0, 1, 4, 5), out[6] = PICK(b, d, 2, 3, 6, 7);
}

INLINE void transpose(f8 r[8]) {
    f4 in[16], out[16];
    memcpy(in, r, sizeof in);
    transpose_quarter(in, out), transpose_quarter(in + 1, out + 8);
    transpose_quarter(in + 8, out + 1), transpose_quarter(in + 9, out + 9);
    memcpy(r, out, sizeof out);
}
#endif

/* Arai, Agui and Nakajima's inverse DCT in one dimension, of eight columns at once. */
INLINE void idct(f8 x[8]) {
    f8 a = x[0] + x[4], b = x[0] - x[4], d = x[2] + x[6], c = (x[2] - x[6]) * 1.414213562f - d;
    f8 e0 = a + d, e3 = a - d, e1 = b + c, e2 = b - c;
    f8 z13 = x[5] + x[3], z10 = x[5] - x[3], z11 = x[1] + x[7], z12 = x[1] - x[7], z5 = (z10 + z12) * 1.847759065f;
    f8 o0 = z11 + z13, o1 = z5 - z10 * 2.613125930f - o0;
    f8 o2 = (z11 - z13) * 1.414213562f - o1, o3 = z5 - z12 * 1.082392200f - o2;
    x[0] = e0 + o0, x[7] = e0 - o0, x[1] = e1 + o1, x[6] = e1 - o1;
    x[2] = e2 + o2, x[5] = e2 - o2, x[3] = e3 + o3, x[4] = e3 - o3;
}

static inline f8 widen_16(const int16_t *p) {
    s8 values;
    memcpy(&values, p, sizeof values);
#ifdef __AVX2__
    return (f8)_mm256_cvtepi32_ps(_mm256_cvtepi16_epi32((__m128i)values));
#else
    return __builtin_convertvector(values, f8);
#endif
}

static inline f8 widen_8(const uint8_t *p) {
#ifdef __AVX2__
    return (f8)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#else
    b8 values;
    memcpy(&values, p, sizeof values);
    return __builtin_convertvector(__builtin_convertvector(__builtin_convertvector(values, s8), i8), f8);
#endif
}

static inline uint8_t to_byte(float x) { return x < 0 ? 0 : x > 254.5f ? 255 : (uint8_t)(int)(x + 0.5f); }

#ifdef __AVX2__
/* Rounded and clamped; four of the first vector, of the second, third and fourth, then the other four of each. */
INLINE __m256i to_bytes(const f8 v[4]) {
    __m256i a = _mm256_packs_epi32(_mm256_cvtps_epi32((__m256)v[0]), _mm256_cvtps_epi32((__m256)v[1]));
    __m256i b = _mm256_packs_epi32(_mm256_cvtps_epi32((__m256)v[2]), _mm256_cvtps_epi32((__m256)v[3]));
    return _mm256_packus_epi16(a, b);
}
#endif

/* The block of which only the first `side` rows and columns are not zero, as samples. */
INLINE void write_square(const int16_t *block, const float *scale, int side, uint8_t *out, int stride) {
    f8 x[8] = {0}, factors;
    for (int i = 0; i < side; i++) {
        memcpy(&factors, scale + 8 * i, sizeof factors);
        x[i] = widen_16(block + 8 * i) * factors;
    }
    x[0][0] += 128;
    idct(x);
    transpose(x);
    for (int i = side; i < 8; i++) x[i] = (f8){0};
    idct(x);
#ifdef __AVX2__
    uint8_t bytes[64] __attribute__((aligned(32)));
    for (int i = 0; i < 2; i++) {
        __m256i rows = _mm256_permutevar8x32_epi32(to_bytes(x + 4 * i), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        _mm256_store_si256((__m256i *)bytes + i, rows);
    }
    for (int y = 0; y < 8; y++) memcpy(out + y * stride, bytes + 8 * y, 8);
#else
    for (int y = 0; y < 8; y++)
        for (int i = 0; i < 8; i++) out[y * stride + i] = to_byte(x[y][i]);
#endif
}

/* last: the number of the last coefficient. Those before the tenth lie in the first four rows and columns. */
static inline void write_block(const int16_t *block, const float *scale, int last, uint8_t *out, int stride) {
    if (!last) {
        for (int y = 0; y < 8; y++) memset(out + y * stride, to_byte((float)block[0] * scale[0] + 128), 8);
    } else if (last < 10) write_square(block, scale, 4, out, stride);
    else write_square(block, scale, 8, out, stride);
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
            skip(&bits, (int)(first % 8));
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
                for (int row = 0; row < part->v; row++)
                    for (int column = 0; column < part->h; column++) {
                        int16_t values[64 + 16] __attribute__((aligned(32)));
                        for (int i = 0; i < 4; i++) ((s16 *)values)[i] = (s16){0}; /* memset is slower at such a size */
                        int last = read_block(part, &bits, &dc[c], values);
                        if (last < 0) return CORRUPT;
                        if (x < x0 || x >= x1 || y < y0 || record) continue;
                        ptrdiff_t down = (y - y0) * part->v + row, across = (x - x0) * part->h + column;
                        write_block(values, part->scale, last, part->plane + 8 * (down * part->stride + across),
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
    int taps = (int)ceil(2 * (scale > 1 ? scale : 1));
    return taps < high - low ? taps : high - low;
}

/* Pillow's antialiased bilinear filter: output i covers [start + i * scale, start + (i + 1) * scale), and samples
 * outside [low, high) do not exist. `first` counts from `origin`. A mirrored axis has its outputs in reverse. */
static void make_axis(struct axis *axis, int size, double start, double scale, int low, int high, int origin,
                      int mirrored) {
    double support = scale > 1 ? scale : 1;
    for (int i = 0; i < size; i++) {
        double center = start + (i + 0.5) * scale;
        int begin = (int)floor(center - support + 0.5), end = (int)floor(center + support + 0.5);
        begin = begin < low ? low : begin >= high ? high - 1 : begin;
        end = end > high ? high : end <= begin ? begin + 1 : end;
        int first = begin < high - axis->taps ? begin : high - axis->taps;
        int at = mirrored ? size - 1 - i : i;
        float *weights = axis->weights + (ptrdiff_t)at * axis->taps, sum = 0, per = (float)(1 / support);
        for (int t = 0; t < axis->taps; t++) {
            float weight = 1 - fabsf((float)(first + t + 0.5 - center)) * per;
            weights[t] = weight > 0 && first + t >= begin && first + t < end ? weight : 0;
            sum += weights[t];
        }
        if (sum <= 0) weights[begin - first] = sum = 1;
        for (int t = 0; t < axis->taps; t++) weights[t] /= sum;
        axis->first[at] = first - origin;
        if (!i) axis->begin = axis->first[at];
    }
    axis->end = axis->first[mirrored ? 0 : size - 1] + axis->taps;
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
            for (int t = 0; t < axis->taps; t++, p += plane->stride) sum += widen_8(p) * weights[t];
            columns[r] = sum;
        }
        transpose(columns);
    }
}

INLINE void weigh(const struct axis *axis, int taps, const f8 *columns, int from, int to, f8 *out) {
    const float *weights = axis->weights + (ptrdiff_t)from * taps;
    for (int i = from; i < to; i++, weights += taps) {
        const f8 *in = columns + axis->first[i] - axis->begin;
        f8 sum = in[0] * weights[0];
        for (int t = 1; t < taps; t++) sum += in[t] * weights[t];
        *out++ = sum;
    }
}

/* The outputs [from, to) of eight rows, from columns[x][8]. */
static void resize_columns(const struct axis *axis, const f8 *columns, int from, int to, f8 *out) {
    switch (axis->taps) {
    case 2: return weigh(axis, 2, columns, from, to, out);
    case 3: return weigh(axis, 3, columns, from, to, out);
    case 4: return weigh(axis, 4, columns, from, to, out);
    default: return weigh(axis, axis->taps, columns, from, to, out);
    }
}

/* Sixteen columns of eight rows to eight rows of sixteen bytes. */
INLINE void write_rows(const f8 columns[16], uint8_t *out, ptrdiff_t stride) {
#ifdef __AVX2__
    const __m256i order = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    __m256i v[4], w[4];
    for (int i = 0; i < 4; i++) v[i] = _mm256_shuffle_epi8(to_bytes(columns + 4 * i), order);
    for (int i = 0; i < 4; i += 2)
        w[i] = _mm256_unpacklo_epi32(v[i], v[i + 1]), w[i + 1] = _mm256_unpackhi_epi32(v[i], v[i + 1]);
    for (int i = 0; i < 2; i++)
        v[2 * i] = _mm256_unpacklo_epi64(w[i], w[i + 2]), v[2 * i + 1] = _mm256_unpackhi_epi64(w[i], w[i + 2]);
    for (int i = 0; i < 4; i++) {
        _mm_storeu_si128((__m128i *)(out + i * stride), _mm256_castsi256_si128(v[i]));
        _mm_storeu_si128((__m128i *)(out + (i + 4) * stride), _mm256_extracti128_si256(v[i], 1));
    }
#else
    for (int row = 0; row < 8; row++)
        for (int i = 0; i < 16; i++) out[row * stride + i] = to_byte(columns[i][row]);
#endif
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
    size_t stride = (wide + 15) / 16 * 48; /* of eight rows of output, which are written sixteen pixels at a time */
    f8 *columns[3] = {grow(&worker->rows, room * sizeof(f8) + 8 * stride)};
    if (!free_numbers || !columns[0]) return NO_MEMORY;
    for (int c = 0; c < count; c++) {
        const struct plane *p = &planes[c];
        if (c && p->h == p[-1].h && p->v == p[-1].v) {
            x[c] = x[c - 1], y[c] = y[c - 1];
        } else {
            x[c].weights = free_numbers, y[c].weights = x[c].weights + wide * (size_t)x[c].taps;
            x[c].first = (int *)(y[c].weights + wide * (size_t)y[c].taps), y[c].first = x[c].first + wide;
            free_numbers = (float *)(y[c].first + wide);
            make_axis(&x[c], size, crop->x / p->h, scale_x[c], limit[c].x0, limit[c].x1, p->x0, crop->flip);
            make_axis(&y[c], size, crop->y / p->v, scale_y[c], limit[c].y0, limit[c].y1, p->y0, 0);
        }
        if (c) columns[c] = columns[c - 1] + (size_t)(x[c - 1].end - x[c - 1].begin + 7) / 8 * 8;
    }
    uint8_t *strip = (uint8_t *)(columns[0] + room);
    f8 in[3][16] = {0}, rgb[48]; /* zeros, because a size under 16 leaves some, which are converted and not copied */
    for (int row = 0; row < size; row += 8) {
        for (int c = 0; c < count; c++)
            resize_rows(&planes[c], &y[c], row, size, x[c].begin, x[c].end, columns[c]);
        spend(worker, ROWS);
        for (int i = 0; i < size; i += 16) {
            for (int c = 0; c < count; c++) resize_columns(&x[c], columns[c], i, size - i < 16 ? size : i + 16, in[c]);
            for (int k = 0; k < 16; k++) {
                f8 a = in[0][k], b = in[count / 2][k], c = in[count - 1][k], *pixel = rgb + 3 * k;
                if (is_rgb || count == 1) {
                    pixel[0] = a, pixel[1] = b, pixel[2] = c;
                } else { /* JFIF's conversion, ITU-T T.871 */
                    pixel[0] = a + 1.402f * (c - 128.0f);
                    pixel[1] = a - 0.344136f * (b - 128.0f) - 0.714136f * (c - 128.0f);
                    pixel[2] = a + 1.772f * (b - 128.0f);
                }
            }
            for (int k = 0; k < 3; k++) write_rows(rgb + 16 * k, strip + 3 * i + 16 * k, (ptrdiff_t)stride);
        }
        for (int r = 0; r < 8 && row + r < size; r++)
            memcpy(out + (size_t)(row + r) * 3 * wide, strip + (size_t)r * stride, 3 * wide);
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
