/* What rn50/data/native.py, tests/fuzz_decode.c and tests/decode_crops.c call. */
#ifndef RN50_DECODE_H
#define RN50_DECODE_H
#include <stddef.h>
#include <stdint.h>

enum status { OK, CORRUPT, UNSUPPORTED, NO_MEMORY };
enum phase { HEADER, DECODE, ROWS, COLUMNS, PHASES };

struct box { int x0, y0, x1, y1; };

/* Where the output lies in the picture, all in pixels. native.CROP has the same layout. */
struct crop { double x, y, scale_x, scale_y; struct box limit; int32_t flip, unused; };
_Static_assert(offsetof(struct crop, limit) == 32 && sizeof(struct crop) == 56, "native.CROP is packed like this");

/* native._Batch has the same layout. */
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

/* Sizes and places that native.py compares with its own when it loads the library: a library of another version would
   write where nobody expects it. */
extern const int32_t rn50_layout[6];

/* Decodes the samples of `batch`; returns how many failed, and says why in its status. */
int rn50_decode(const struct batch *batch, int threads);

/* Writes the table of a JPEG, for `tile` MCUs a tile, and its footer to `table` [room]; returns its bytes, or -status. */
int64_t rn50_index(const uint8_t *data, size_t size, int tile, uint8_t *table, size_t room);

#endif
