/* Products of 16 outputs in a register, up to 16 rows at a time. */
#include "blocks.h"

#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c")))
#define INLINE TARGET static inline __attribute__((always_inline))

TARGET static void pack(const Weights *w, const float *x, size_t count, uint8_t *tile) {
    const __m512i lowest = _mm512_set1_epi32(-128); /* of what isn't a number */
    int middle = 1 << (w->bits - 1), halves = w->block / 16;
    for (size_t row = 0; row < count; row++) {
        uint8_t *record = tile;
        for (size_t block = 0; block < w->blocks; block++, x += w->block, record += count * (w->block + ROW_NUMBERS)) {
            __m512 v[2] = {_mm512_loadu_ps(x), halves > 1 ? _mm512_loadu_ps(x + 16) : _mm512_setzero_ps()};
            float largest = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(v[0]), _mm512_abs_ps(v[1])));
            float sum = _mm512_reduce_add_ps(_mm512_add_ps(v[0], v[1]));
            float scale = sum == sum ? largest / 127.0f : sum; /* what isn't a number stays none */
            __m512 inverse = _mm512_set1_ps(scale > 0 ? 1 / scale : 0);
            __m512i whole = _mm512_setzero_si512();
            for (int half = 0; half < halves; half++) {
                __m512i q = _mm512_max_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(v[half], inverse)), lowest);
                whole = _mm512_add_epi32(whole, q);
                _mm_storeu_si128((__m128i *)(record + row * w->block + 16 * half), _mm512_cvtsepi32_epi8(q));
            }
            int32_t start = -middle * _mm512_reduce_add_epi32(whole);
            put_numbers(record + count * w->block, count, row, scale, start, sum);
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
    for (size_t i = 0; i < w->blocks; i++, weights += record, x += rows * (block + ROW_NUMBERS)) {
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
    TARGET static void product_##BITS##_##BLOCK##_##ROWS(const Weights *w, const uint8_t *weights, const uint8_t *x,   \
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

static void multiply_tile(const Weights *w, const uint8_t *panel, const uint8_t *tile, size_t count, float *out,
                          size_t columns) {
    PRODUCTS[(w->bits == 8) * 2 + (w->block == 32)][count - 1](w, panel, tile, out, (1u << columns) - 1);
}

const Instructions WITH_AVX512 = {pack, multiply_tile};
