/* What rn50/data/native.py and tests/fuzz_decode.c call. */
#ifndef RN50_DECODE_H
#define RN50_DECODE_H
#include <stddef.h>
#include <stdint.h>

enum status { OK, CORRUPT, UNSUPPORTED, NO_MEMORY };
enum phase { HEADER, DECODE, ROWS, COLUMNS, PHASES };

struct box { int x0, y0, x1, y1; };

/* Where the output lies in the picture, all in pixels; the same layout as rn50.native.CROP. */
struct crop { double x, y, scale_x, scale_y; struct box limit; int32_t flip, unused; };

/* The same layout as rn50.native._Batch. */
struct batch {
    const uint8_t *const *data;
    const uint64_t *bytes;
    const uint16_t *widths, *heights;
    const uint8_t *raw;
    const struct crop *crops;
    int32_t count, size;
    uint8_t *out; /* [count, size, size, 3] */
    int32_t *status; /* [count] */
    _Atomic int64_t *nanoseconds; /* [PHASES], all threads together; NULL: not wanted */
};

/* Decodes the samples of `batch`; gives how many failed, and why in its status. */
int rn50_decode(const struct batch *batch, int threads);

/* Writes the table of a JPEG, for `tile` MCUs a tile, and its footer to `table` [room]; gives its bytes, or -status. */
int64_t rn50_index(const uint8_t *data, size_t size, int tile, uint8_t *table, size_t room);

#endif
