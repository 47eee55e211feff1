/* Products with weights in blocks of integers, on x86-64 with AVX2 or, faster, with AVX-512 and VNNI.

   A weight [n, k] is cut along k into blocks of 16 or 32 codes. Of a block, weight = (code - 2^(bits - 1)) * scale, plus
   the block's minimum where there is one. x is rounded to eight bits in blocks of the same length, each with a scale of
   its own, amax / 127. An output is the sum over blocks, in order, of

       (sum of code * x) * (scale * scale of x) + (sum of x as it was) * minimum

   where the first sum is exact, in 32 bits. So an output has the same bits whatever rows share its product, and whatever
   instructions compute it.

   A panel is 16 outputs: its blocks lie one behind the other, each with its codes, scales and minima, so that a product
   reads one stream. Of a block's codes, 64 bytes hold 4 neighbours in k of each output; of 4 bits, the low halves are the
   4 before those of the high halves. */
#ifndef BLOCKS_H
#define BLOCKS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* All else is the library's own: nothing in the process can take its place. */
#define EXPORTED __attribute__((visibility("default")))

/* Of operators and of what their sessions are told; operators.py knows it. */
enum { BLOCKS_VERSION = 1 };
EXPORTED int blocks_version(void);

enum { PANEL = 16, TILE = 16, MAX_BLOCK = 32 };
/* How far ahead of a product its weights are asked for: pages of 4 KB end what the processor itself foresees. */
enum { AHEAD = 2048 };

typedef struct {
    size_t count, n, k; /* matrices in the stack, each [n, k] */
    int bits, block;    /* 4 or 8; codes in a block: 16 or 32 */
    int half_scales;    /* scales are float16 here: each was one */
    int has_minima;
    size_t panels, blocks, record; /* of n, rounded up; of k; bytes of one block of a panel */
    uint8_t *data;
    size_t bytes;
} Weights;

/* Of x's row in a tile, each block takes its codes and, behind those of all rows, three numbers of 4 bytes: the scale,
   -2^(bits - 1) times the sum of codes, with which a sum of products starts, and the sum of x as it was. */
enum { ROW_NUMBERS = 12 };

/* numbers: behind the codes of a block of a tile of `count` rows. */
static inline void put_numbers(uint8_t *numbers, size_t count, size_t row, float scale, int32_t start, float sum) {
    memcpy(numbers + 4 * row, &scale, 4);
    memcpy(numbers + 4 * (count + row), &start, 4);
    memcpy(numbers + 4 * (2 * count + row), &sum, 4);
}

/* What one set of instructions does. */
typedef struct {
    /* Round `count` rows of x to one tile. */
    void (*pack)(const Weights *w, const float *x, size_t count, uint8_t *tile);
    /* One panel times one tile of `count` rows, into the first `columns` of 16 outputs of each row. */
    void (*multiply)(const Weights *w, const uint8_t *panel, const uint8_t *tile, size_t count, float *out, size_t columns);
} Instructions;
extern const Instructions WITH_AVX512, WITH_AVX2;

enum { NOTHING, AVX2, AVX512 };
/* The best that this processor has of those up to `limit`; products take it from now on. */
EXPORTED int blocks_instructions(int limit);
extern const Instructions *instructions; /* NULL before */

/* Of each matrix: codes [n, k / block, block * bits / 8] of MatMulNBits, scales [n, k / block], minima [k / block, n] or
   NULL -> panels. Returns 0 if there's no memory. */
int weights_pack(Weights *w, const uint8_t *codes, const float *scales, const float *minima);
void weights_free(Weights *w);

/* Bytes of x [rows, k], rounded: tiles of 16 rows, the last may have fewer. */
size_t rows_bytes(const Weights *w, size_t rows);
void rows_pack(const Weights *w, const float *x, size_t rows, size_t tile, uint8_t *packed);

/* Outputs of panels first ... last - 1 of a matrix for all rows: out [rows, n]. */
void multiply(const Weights *w, size_t matrix, const uint8_t *packed, size_t rows, size_t first, size_t last, float *out);

#endif
