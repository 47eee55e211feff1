#define _GNU_SOURCE
#include "blocks.h"

#include <immintrin.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,bmi2,fma,f16c")))
#define INLINE AVX512 static inline __attribute__((always_inline))
#define HUGE_PAGE ((size_t)2 << 20)
/* Rows whose packed form stays in a core's second cache while panels pass by. */
#define ROWS_IN_CACHE ((size_t)768 << 10)
/* How far ahead of a product its weights are asked for: pages of 4 KB end what the processor itself foresees. */
#define AHEAD 2048

int blocks_supported(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("bmi2");
}

/* Whether each number is one of float16's, so that half of the bytes hold it. */
AVX512 static int are_halves(const float *values, size_t count) {
    for (size_t i = 0; i < count; i++)
        if (_cvtsh_ss(_cvtss_sh(values[i], 0)) != values[i]) return 0;
    return 1;
}

/* One block's codes of one output → its 4 bytes in each 64. */
AVX512 static void pack_codes(const Weights *w, const uint8_t *codes, uint8_t *to) {
    uint32_t four;
    if (w->bits == 8) {
        for (int group = 0; group < w->block / 4; group++) memcpy(to + 64 * group, codes + 4 * group, 4);
        return;
    }
    for (int pair = 0; pair < w->block / 8; pair++) {
        uint32_t eight;
        memcpy(&eight, codes + 4 * pair, 4);
        four = _pdep_u32(eight & 0xffff, 0x0f0f0f0f) | _pdep_u32(eight >> 16, 0xf0f0f0f0);
        memcpy(to + 64 * pair, &four, 4);
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

AVX512 int weights_pack(Weights *w, const uint8_t *codes, const float *scales, const float *minima) {
    w->panels = (w->n + PANEL - 1) / PANEL;
    w->blocks = w->k / w->block;
    w->half_scales = are_halves(scales, w->n * w->blocks);
    w->has_minima = minima != NULL;
    size_t code_bytes = (size_t)PANEL * w->block * w->bits / 8, scale_bytes = PANEL * (w->half_scales ? 2 : 4);
    w->record = code_bytes + scale_bytes + (minima ? PANEL * 4 : 0);
    if (!allocate(w, w->panels * w->blocks * w->record)) return 0;
    size_t own = w->block * w->bits / 8; /* bytes of a block of one output */
    for (size_t row = 0; row < w->n; row++) {
        size_t column = row % PANEL;
        for (size_t block = 0; block < w->blocks; block++) {
            uint8_t *record = w->data + (row / PANEL * w->blocks + block) * w->record;
            pack_codes(w, codes + (row * w->blocks + block) * own, record + 4 * column);
            float scale = scales[row * w->blocks + block];
            uint16_t half = _cvtss_sh(scale, 0);
            memcpy(record + code_bytes + scale_bytes / PANEL * column, w->half_scales ? (void *)&half : (void *)&scale,
                   scale_bytes / PANEL);
            if (minima) memcpy(record + code_bytes + scale_bytes + 4 * column, &minima[block * w->n + row], 4);
        }
    }
    return 1;
}

void weights_free(Weights *w) {
    if (w->data) munmap(w->data, w->bytes);
}

/* Of a row's block in a tile: its codes, then for all rows scale, start of the sum of products, sum of x. */
static size_t row_record(const Weights *w) { return w->block + 12; }

size_t rows_bytes(const Weights *w, size_t rows) { return rows * w->blocks * row_record(w); }

AVX512 void rows_pack(const Weights *w, const float *x, size_t rows, size_t tile, uint8_t *packed) {
    size_t first = tile * TILE, count = rows - first < TILE ? rows - first : TILE;
    uint8_t *to = packed + rows_bytes(w, first);
    int middle = 1 << (w->bits - 1), halves = w->block / 16;
    for (size_t row = 0; row < count; row++) {
        const float *from = x + (first + row) * w->k;
        for (size_t block = 0; block < w->blocks; block++, from += w->block) {
            uint8_t *record = to + block * count * row_record(w);
            __m512 v[2];
            v[0] = _mm512_loadu_ps(from);
            v[1] = halves > 1 ? _mm512_loadu_ps(from + 16) : _mm512_setzero_ps();
            float largest = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(v[0]), _mm512_abs_ps(v[1])));
            float sum = _mm512_reduce_add_ps(_mm512_add_ps(v[0], v[1]));
            float scale = largest / 127.0f;
            __m512 inverse = _mm512_set1_ps(scale > 0 ? 1 / scale : 0);
            __m512i whole = _mm512_setzero_si512();
            for (int half = 0; half < halves; half++) {
                __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(v[half], inverse));
                whole = _mm512_add_epi32(whole, q);
                _mm_storeu_si128((__m128i *)(record + row * w->block + 16 * half), _mm512_cvtsepi32_epi8(q));
            }
            int32_t start = -middle * _mm512_reduce_add_epi32(whole);
            uint8_t *numbers = record + count * w->block;
            memcpy(numbers + 4 * row, &scale, 4);
            memcpy(numbers + 4 * (count + row), &start, 4);
            memcpy(numbers + 4 * (2 * count + row), &sum, 4);
        }
    }
}

/* One panel times one tile of `rows` rows; bits, block and rows are constants where this is inlined. */
INLINE void product(const Weights *w, const uint8_t *weights, const uint8_t *x, float *out, __mmask16 outputs, int bits,
                    int block, int rows) {
    const __m512i low = _mm512_set1_epi8(15);
    const int groups = block / 4, code_bytes = PANEL * block * bits / 8;
    const int half_scales = w->half_scales, has_minima = w->has_minima, record = w->record;
    __m512 sums[TILE];
#pragma GCC unroll 16
    for (int row = 0; row < rows; row++) sums[row] = _mm512_setzero_ps();
    for (size_t i = 0; i < w->blocks; i++, weights += record, x += rows * (block + 12)) {
        __m512i codes[MAX_BLOCK / 4];
        if (rows < 8) /* more rows compute longer than the memory takes */
#pragma GCC unroll 16
            for (int line = 0; line < code_bytes + 64; line += 64) _mm_prefetch((const char *)weights + AHEAD + line, _MM_HINT_T0);
#pragma GCC unroll 8
        for (int j = 0; j < code_bytes / 64; j++) {
            __m512i v = _mm512_loadu_si512(weights + 64 * j);
            if (bits == 8) {
                codes[j] = v;
            } else {
                codes[2 * j] = _mm512_and_si512(v, low);
                codes[2 * j + 1] = _mm512_and_si512(_mm512_srli_epi16(v, 4), low);
            }
        }
        const uint8_t *numbers = weights + code_bytes;
        __m512 scale = half_scales ? _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)numbers)) : _mm512_loadu_ps(numbers);
        const float *scales = (const float *)(x + rows * block), *whole = scales + 2 * rows;
        const int32_t *starts = (const int32_t *)(scales + rows);
#pragma GCC unroll 16
        for (int row = 0; row < rows; row++) {
            const int32_t *fours = (const int32_t *)(x + row * block);
            __m512i dot = _mm512_set1_epi32(starts[row]);
#pragma GCC unroll 8
            for (int group = 0; group < groups; group++)
                dot = _mm512_dpbusd_epi32(dot, codes[group], _mm512_set1_epi32(fours[group]));
            __m512 factor = _mm512_mul_ps(scale, _mm512_set1_ps(scales[row]));
            sums[row] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), factor, sums[row]);
        }
        if (!has_minima) continue;
        __m512 minimum = _mm512_loadu_ps(numbers + (half_scales ? 32 : 64));
#pragma GCC unroll 16
        for (int row = 0; row < rows; row++) sums[row] = _mm512_fmadd_ps(_mm512_set1_ps(whole[row]), minimum, sums[row]);
    }
#pragma GCC unroll 16
    for (int row = 0; row < rows; row++) _mm512_mask_storeu_ps(out + row * w->n, outputs, sums[row]);
}

typedef void (*Product)(const Weights *, const uint8_t *, const uint8_t *, float *, __mmask16);

#define PRODUCT(BITS, BLOCK, ROWS)                                                                                     \
    AVX512 static void product_##BITS##_##BLOCK##_##ROWS(const Weights *w, const uint8_t *weights, const uint8_t *x,   \
                                                         float *out, __mmask16 outputs) {                              \
        product(w, weights, x, out, outputs, BITS, BLOCK, ROWS);                                                       \
    }
#define NAME(BITS, BLOCK, ROWS) product_##BITS##_##BLOCK##_##ROWS,
#define EACH_ROWS(DO, ...)                                                                                             \
    DO(__VA_ARGS__, 1) DO(__VA_ARGS__, 2) DO(__VA_ARGS__, 3) DO(__VA_ARGS__, 4) DO(__VA_ARGS__, 5) DO(__VA_ARGS__, 6)  \
    DO(__VA_ARGS__, 7) DO(__VA_ARGS__, 8) DO(__VA_ARGS__, 9) DO(__VA_ARGS__, 10) DO(__VA_ARGS__, 11)                   \
    DO(__VA_ARGS__, 12) DO(__VA_ARGS__, 13) DO(__VA_ARGS__, 14) DO(__VA_ARGS__, 15) DO(__VA_ARGS__, 16)
EACH_ROWS(PRODUCT, 4, 16)
EACH_ROWS(PRODUCT, 4, 32)
EACH_ROWS(PRODUCT, 8, 16)
EACH_ROWS(PRODUCT, 8, 32)
static const Product PRODUCTS[][TILE] = {
    {EACH_ROWS(NAME, 4, 16)}, {EACH_ROWS(NAME, 4, 32)}, {EACH_ROWS(NAME, 8, 16)}, {EACH_ROWS(NAME, 8, 32)}};

void multiply(const Weights *w, const uint8_t *packed, size_t rows, size_t first, size_t last, float *out) {
    const Product *products = PRODUCTS[(w->bits == 8) * 2 + (w->block == 32)];
    size_t tiles = ROWS_IN_CACHE / rows_bytes(w, TILE);
    size_t together = TILE * (tiles ? tiles : 1);
    for (size_t start = 0; start < rows; start += together) {
        size_t end = start + together < rows ? start + together : rows;
        for (size_t panel = first; panel < last; panel++) {
            size_t column = panel * PANEL, left = w->n - column;
            __mmask16 outputs = left < PANEL ? (1 << left) - 1 : 0xffff;
            for (size_t row = start; row < end; row += TILE) {
                size_t count = end - row < TILE ? end - row : TILE;
                products[count - 1](w, w->data + panel * w->blocks * w->record, packed + rows_bytes(w, row),
                                    out + row * w->n + column, outputs);
            }
        }
    }
}
