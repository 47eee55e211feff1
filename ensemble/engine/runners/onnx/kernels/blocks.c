#define _GNU_SOURCE
#include "blocks.h"

#include <immintrin.h>
#include <string.h>
#include <sys/mman.h>

#define F16C __attribute__((target("f16c")))
#define HUGE_PAGE ((size_t)2 << 20)
/* Rows whose packed form stays in a core's second cache while panels pass by. */
#define ROWS_IN_CACHE ((size_t)768 << 10)

const Instructions *instructions;

int blocks_version(void) { return BLOCKS_VERSION; }

int blocks_instructions(int limit) {
    __builtin_cpu_init();
    /* Every processor with AVX2 converts float16 too, which not every compiler can ask for. */
    int has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    int has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                     __builtin_cpu_supports("avx512vnni");
    int best = !has_avx2 ? NOTHING : !has_avx512 ? AVX2 : AVX512, chosen = best < limit ? best : limit;
    instructions = chosen == AVX512 ? &WITH_AVX512 : chosen == AVX2 ? &WITH_AVX2 : NULL;
    return chosen;
}

/* Whether each number is one of float16's, so that half of the bytes hold it. */
F16C static int are_halves(const float *values, size_t count) {
    for (size_t i = 0; i < count; i++)
        if (_cvtsh_ss(_cvtss_sh(values[i], 0)) != values[i]) return 0;
    return 1;
}

/* Four codes of four bits -> a byte each. */
static uint32_t spread(uint32_t codes) {
    codes = (codes | codes << 8) & 0x00ff00ff;
    return (codes | codes << 4) & 0x0f0f0f0f;
}

/* One block's codes of one output -> its 4 bytes in each 64. */
static void pack_codes(const Weights *w, const uint8_t *codes, uint8_t *to) {
    for (int i = 0; i < w->block * w->bits / 32; i++) {
        uint32_t four;
        memcpy(&four, codes + 4 * i, 4);
        if (w->bits == 4) four = spread(four & 0xffff) | spread(four >> 16) << 4;
        memcpy(to + 64 * i, &four, 4);
    }
}

/* Zeros, in huge pages as far as they fill some: one thread reads those a quarter faster. */
static int allocate(Weights *w, size_t bytes) {
    size_t page = 4096, whole = (bytes + page - 1) & ~(page - 1);
    uint8_t *memory = mmap(NULL, whole + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return 0;
    size_t before = -(size_t)memory & (HUGE_PAGE - 1);
    if (before) munmap(memory, before);
    munmap(memory + before + whole, HUGE_PAGE - before);
    w->data = memory + before, w->bytes = whole;
    madvise(w->data, w->bytes, MADV_HUGEPAGE);
    return 1;
}

/* One matrix into its panels. */
F16C static void pack_matrix(const Weights *w, const uint8_t *codes, const float *scales, const float *minima, uint8_t *to) {
    size_t code_bytes = (size_t)PANEL * w->block * w->bits / 8, own = code_bytes / PANEL, width = w->half_scales ? 2 : 4;
    for (size_t row = 0; row < w->n; row++) {
        size_t column = row % PANEL;
        for (size_t block = 0; block < w->blocks; block++) {
            uint8_t *record = to + (row / PANEL * w->blocks + block) * w->record, *numbers = record + code_bytes;
            pack_codes(w, codes + (row * w->blocks + block) * own, record + 4 * column);
            float scale = scales[row * w->blocks + block];
            uint16_t half = _cvtss_sh(scale, 0);
            memcpy(numbers + width * column, w->half_scales ? (void *)&half : (void *)&scale, width);
            if (minima) memcpy(numbers + width * PANEL + 4 * column, &minima[block * w->n + row], 4);
        }
    }
}

static size_t matrix_bytes(const Weights *w) { return w->panels * w->blocks * w->record; }

int weights_pack(Weights *w, const uint8_t *codes, const float *scales, const float *minima) {
    w->panels = (w->n + PANEL - 1) / PANEL;
    w->blocks = w->k / w->block;
    size_t numbers = w->n * w->blocks;
    w->half_scales = are_halves(scales, w->count * numbers);
    w->has_minima = minima != NULL;
    w->record = PANEL * (w->block * w->bits / 8 + (w->half_scales ? 2 : 4) + (minima ? 4 : 0));
    if (!allocate(w, w->count * matrix_bytes(w))) return 0;
    for (size_t i = 0; i < w->count; i++)
        pack_matrix(w, codes + i * w->n * w->k * w->bits / 8, scales + i * numbers, minima ? minima + i * numbers : NULL,
                    w->data + i * matrix_bytes(w));
    return 1;
}

void weights_free(Weights *w) {
    if (w->data) munmap(w->data, w->bytes);
}

size_t rows_bytes(const Weights *w, size_t rows) { return rows * w->blocks * (w->block + ROW_NUMBERS); }

void rows_pack(const Weights *w, const float *x, size_t rows, size_t tile, uint8_t *packed) {
    size_t first = tile * TILE, count = rows - first < TILE ? rows - first : TILE;
    instructions->pack(w, x + first * w->k, count, packed + rows_bytes(w, first));
}

void multiply(const Weights *w, size_t matrix, const uint8_t *packed, size_t rows, size_t first, size_t last, float *out) {
    const uint8_t *panels = w->data + matrix * matrix_bytes(w);
    size_t tiles = ROWS_IN_CACHE / rows_bytes(w, TILE);
    size_t together = TILE * (tiles ? tiles : 1);
    for (size_t start = 0; start < rows; start += together) {
        size_t end = start + together < rows ? start + together : rows;
        for (size_t panel = first; panel < last; panel++) {
            size_t column = panel * PANEL, columns = w->n - column < PANEL ? w->n - column : PANEL;
            for (size_t row = start; row < end; row += TILE)
                instructions->multiply(w, panels + panel * w->blocks * w->record, packed + rows_bytes(w, row),
                                       end - row < TILE ? end - row : TILE, out + row * w->n + column, columns);
        }
    }
}
