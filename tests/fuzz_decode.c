/* Decodes and indexes damaged copies of the given files: fuzz ROUNDS FILE... Prints how many decoded and failed. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../rn50/data/csrc/decode.h"

static uint32_t state = 1;
static uint32_t below(uint32_t limit) {
    state ^= state << 13, state ^= state >> 17, state ^= state << 5;
    return state % limit;
}

int main(int argc, char **argv) {
    int rounds = atoi(argv[1]), decoded = 0, refused = 0;
    for (int file = 2; file < argc; file++) {
        FILE *handle = fopen(argv[file], "rb");
        static uint8_t original[1 << 20];
        size_t size = fread(original, 1, sizeof original, handle);
        fclose(handle);
        for (int round = 0; round < rounds; round++) {
            size_t kept = round % 4 ? size : below((uint32_t)size) + 1;
            uint8_t *data = malloc(kept); /* of the exact size, so that any read past it is caught */
            memcpy(data, original, kept);
            uint32_t from = round % 3 == 1 ? (uint32_t)(kept > 900 ? kept - 900 : 0) : 0; /* often only near the table */
            for (uint32_t i = below(round % 4 ? 8 : 2); i; i--) {
                uint32_t at = from + below((uint32_t)kept - from);
                if (below(2)) data[at] ^= (uint8_t)(1 << below(8));
                else data[at] = (uint8_t)below(256);
            }
            uint16_t width = 90, height = 70;
            int x0 = (int)below(90), y0 = (int)below(70), x1 = x0 + 1 + (int)below(90 - (uint32_t)x0);
            int y1 = y0 + 1 + (int)below(70 - (uint32_t)y0), out_size = 1 + (int)below(40);
            struct crop crop = {x0, y0, (x1 - x0) / (double)out_size, (y1 - y0) / (double)out_size, {x0, y0, x1, y1}, round & 1, 0};
            uint8_t *out = malloc((size_t)out_size * (size_t)out_size * 3), raw = 0;
            uint64_t bytes = kept;
            int32_t status;
            const uint8_t *const pointer = data;
            struct batch batch = {&pointer, &bytes, &width, &height, &raw, &crop, 1, out_size, out, &status, NULL};
            if (rn50_decode(&batch, 1)) refused++;
            else decoded++;
            uint8_t *table = malloc(4096);
            rn50_index(data, kept, 1 + (int)below(5), table, below(4096));
            free(table), free(out), free(data);
        }
    }
    printf("%d %d\n", decoded, refused);
    return 0;
}
