/* Products of 8 outputs in a register, up to 4 rows at a time. */
#include "blocks.h"

#include <immintrin.h>
#include <string.h>

#define TARGET __attribute__((target("avx2,fma,f16c")))
#define INLINE TARGET static inline __attribute__((always_inline))
enum { ROWS = 4, HALF = PANEL / 2 };

INLINE float sum_of(__m256 v) {
    __m128 fours = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    __m128 twos = _mm_add_ps(fours, _mm_movehl_ps(fours, fours));
    return _mm_cvtss_f32(_mm_add_ss(twos, _mm_shuffle_ps(twos, twos, 1)));
}

INLINE float largest_in(__m256 v) {
    __m128 fours = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    __m128 twos = _mm_max_ps(fours, _mm_movehl_ps(fours, fours));
    return _mm_cvtss_f32(_mm_max_ss(twos, _mm_shuffle_ps(twos, twos, 1)));
}

TARGET static void pack(const Weights *w, const float *x, size_t count, uint8_t *tile) {
    const __m256 positive = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    int middle = 1 << (w->bits - 1), parts = w->block / 8;
    for (size_t row = 0; row < count; row++) {
        uint8_t *record = tile;
        for (size_t block = 0; block < w->blocks; block++, x += w->block, record += count * (w->block + ROW_NUMBERS)) {
            __m256 largest_of = _mm256_setzero_ps(), parts_of[4] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
            for (int part = 0; part < parts; part++) {
                parts_of[part] = _mm256_loadu_ps(x + 8 * part);
                largest_of = _mm256_max_ps(largest_of, _mm256_and_ps(parts_of[part], positive));
            }
            if (parts == 4) { /* in the order in which AVX-512 adds up */
                parts_of[0] = _mm256_add_ps(parts_of[0], parts_of[2]);
                parts_of[1] = _mm256_add_ps(parts_of[1], parts_of[3]);
            }
            float sum = sum_of(_mm256_add_ps(parts_of[0], parts_of[1])), largest = largest_in(largest_of);
            float scale = sum == sum ? largest / 127.0f : sum; /* what isn't a number stays none */
            __m256 inverse = _mm256_set1_ps(scale > 0 ? 1 / scale : 0);
            int8_t *codes = (int8_t *)record + row * w->block;
            int32_t whole = 0;
            for (int part = 0; part < parts; part++) {
                __m256i q = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8 * part), inverse));
                __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
                _mm_storel_epi64((__m128i *)(codes + 8 * part), _mm_packs_epi16(words, words));
            }
            for (int i = 0; i < w->block; i++) whole += codes[i];
            int32_t start = -middle * whole;
            put_numbers(record + count * w->block, count, row, scale, start, sum);
        }
    }
}

/* 4 products of each output, added to `sum`. Of eight bits, `weights` lie around zero. */
INLINE __m256i add_products(__m256i sum, __m256i weights, __m256i x, int bits) {
    /* Two products of an unsigned byte up to 128 and a signed one fit into 16 bits. */
    __m256i pairs = bits == 4 ? _mm256_maddubs_epi16(weights, x)
                              : _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(x, weights));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

/* Half a panel times rows first ... first + rows - 1 of a tile of `count`, into out [rows, 16]; bits, block and rows are
   constants where this is inlined. */
INLINE void product(const Weights *w, const uint8_t *weights, const uint8_t *tile, size_t count, size_t first, int half,
                    float *out, int bits, int block, int rows) {
    const __m256i low = _mm256_set1_epi8(15), middle = _mm256_set1_epi8((char)128);
    const int code_bytes = PANEL * block * bits / 8, half_scales = w->half_scales, has_minima = w->has_minima;
    __m256 sums[ROWS];
#pragma GCC unroll 4
    for (int row = 0; row < rows; row++) sums[row] = _mm256_setzero_ps();
    for (size_t i = 0; i < w->blocks; i++, weights += w->record, tile += count * (block + ROW_NUMBERS)) {
        if (count < 8 && !half) /* more rows compute longer than the memory takes */
            for (int line = 0; line < code_bytes + 64; line += 64) _mm_prefetch((const char *)weights + AHEAD + line, _MM_HINT_T0);
        const uint8_t *x = tile + first * block;
        const float *scales = (const float *)(tile + count * block) + first, *whole = scales + 2 * count;
        const int32_t *starts = (const int32_t *)scales + count;
        __m256i dots[ROWS];
#pragma GCC unroll 4
        for (int row = 0; row < rows; row++)
            dots[row] = bits == 4 ? _mm256_set1_epi32(starts[row]) : _mm256_setzero_si256();
#pragma GCC unroll 8
        for (int j = 0; j < code_bytes / 64; j++) {
            __m256i v = _mm256_loadu_si256((const __m256i *)(weights + 64 * j + 32 * half));
#pragma GCC unroll 4
            for (int row = 0; row < rows; row++) {
                const int32_t *fours = (const int32_t *)(x + row * block);
                if (bits == 8) {
                    dots[row] = add_products(dots[row], _mm256_xor_si256(v, middle), _mm256_set1_epi32(fours[j]), 8);
                } else {
                    __m256i high = _mm256_and_si256(_mm256_srli_epi16(v, 4), low);
                    dots[row] = add_products(dots[row], _mm256_and_si256(v, low), _mm256_set1_epi32(fours[2 * j]), 4);
                    dots[row] = add_products(dots[row], high, _mm256_set1_epi32(fours[2 * j + 1]), 4);
                }
            }
        }
        const uint8_t *numbers = weights + code_bytes;
        __m256 scale = half_scales ? _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(numbers + 16 * half)))
                                   : _mm256_loadu_ps((const float *)(numbers + 32 * half));
#pragma GCC unroll 4
        for (int row = 0; row < rows; row++) {
            __m256 factor = _mm256_mul_ps(scale, _mm256_set1_ps(scales[row]));
            sums[row] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[row]), factor, sums[row]);
        }
        if (has_minima) {
            __m256 minimum = _mm256_loadu_ps((const float *)(numbers + (half_scales ? 32 : 64) + 32 * half));
#pragma GCC unroll 4
            for (int row = 0; row < rows; row++)
                sums[row] = _mm256_fmadd_ps(_mm256_set1_ps(whole[row]), minimum, sums[row]);
        }
    }
#pragma GCC unroll 4
    for (int row = 0; row < rows; row++) _mm256_storeu_ps(out + row * PANEL + half * HALF, sums[row]);
}

typedef void (*Product)(const Weights *, const uint8_t *, const uint8_t *, size_t, size_t, int, float *);

#define PRODUCT(BITS, BLOCK, ROWS)                                                                                     \
    TARGET static void product_##BITS##_##BLOCK##_##ROWS(const Weights *w, const uint8_t *weights, const uint8_t *tile, \
                                                         size_t count, size_t first, int half, float *out) {           \
        product(w, weights, tile, count, first, half, out, BITS, BLOCK, ROWS);                                         \
    }
#define NAME(BITS, BLOCK, ROWS) product_##BITS##_##BLOCK##_##ROWS,
#define EACH_ROWS(DO, ...) DO(__VA_ARGS__, 1) DO(__VA_ARGS__, 2) DO(__VA_ARGS__, 3) DO(__VA_ARGS__, 4)
EACH_ROWS(PRODUCT, 4, 16)
EACH_ROWS(PRODUCT, 4, 32)
EACH_ROWS(PRODUCT, 8, 16)
EACH_ROWS(PRODUCT, 8, 32)
static const Product PRODUCTS[][ROWS] = {
    {EACH_ROWS(NAME, 4, 16)}, {EACH_ROWS(NAME, 4, 32)}, {EACH_ROWS(NAME, 8, 16)}, {EACH_ROWS(NAME, 8, 32)}};

static void multiply_tile(const Weights *w, const uint8_t *panel, const uint8_t *tile, size_t count, float *out,
                          size_t columns) {
    const Product *products = PRODUCTS[(w->bits == 8) * 2 + (w->block == 32)];
    for (size_t first = 0; first < count; first += ROWS) {
        size_t rows = count - first < ROWS ? count - first : ROWS;
        float sums[ROWS * PANEL];
        for (int half = 0; half < 2; half++) products[rows - 1](w, panel, tile, count, first, half, sums);
        for (size_t row = 0; row < rows; row++)
            memcpy(out + (first + row) * w->n, sums + row * PANEL, columns * sizeof(float));
    }
}

const Instructions WITH_AVX2 = {pack, multiply_tile};
