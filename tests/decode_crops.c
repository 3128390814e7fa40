/* Decodes crops and makes tables without Python: decode_crops SIZE <SAMPLES >RESULTS. SAMPLES: of each a struct sample and
 * its bytes. RESULTS: the statuses, the crops [n, SIZE, SIZE, 3], then of each JPEG what rn50_index returns and the table.
 */
#include <stdio.h>
#include <stdlib.h>

#include "../rn50/data/csrc/decode.h"

/* tests/data/test_arm.py has the same layout. */
struct sample { struct crop crop; uint64_t bytes; uint16_t width, height; uint8_t raw, tile, unused[2]; };

enum { MOST = 1000 };

int main(int argc, char **argv) {
    static const uint8_t *data[MOST];
    static uint64_t bytes[MOST];
    static uint16_t widths[MOST], heights[MOST];
    static uint8_t raw[MOST], tiles[MOST];
    static struct crop crops[MOST];
    static int32_t status[MOST];
    struct sample sample;
    int size = argc > 1 ? atoi(argv[1]) : 0, count = 0;
    for (; count < MOST && fread(&sample, sizeof sample, 1, stdin) == 1; count++) {
        uint8_t *stored = malloc(sample.bytes);
        if (!stored || fread(stored, 1, sample.bytes, stdin) != sample.bytes) return 1;
        data[count] = stored, bytes[count] = sample.bytes, widths[count] = sample.width, heights[count] = sample.height;
        raw[count] = sample.raw, tiles[count] = sample.tile, crops[count] = sample.crop;
    }
    size_t pixels = (size_t)count * (size_t)size * (size_t)size * 3;
    uint8_t *out = calloc(pixels, 1);
    if (!out) return 1;
    struct batch batch = {data, bytes, widths, heights, raw, crops, count, size, out, status, NULL};
    rn50_decode(&batch, 3);
    fwrite(status, sizeof *status, (size_t)count, stdout);
    fwrite(out, 1, pixels, stdout);
    for (int i = 0; i < count; i++) {
        if (raw[i]) continue;
        size_t room = bytes[i] * 8 + 1024;
        uint8_t *table = malloc(room);
        if (!table) return 1;
        int64_t made = rn50_index(data[i], bytes[i], tiles[i], table, room);
        fwrite(&made, sizeof made, 1, stdout);
        if (made > 0) fwrite(table, 1, (size_t)made, stdout);
        free(table);
    }
    return fflush(stdout) ? 1 : 0;
}
