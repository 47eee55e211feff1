/* What the operators share: a graph's constants and tensors by ONNX Runtime's interface. */
#ifndef KERNEL_H
#define KERNEL_H

#include "blocks.h"
#include "onnx_runtime.h"

enum { MAX_RANK = 8 };

typedef struct {
    OrtCustomOp op;
    const char *name;
    size_t num_inputs;
} Operator;

typedef struct {
    void *data;
    int64_t dims[MAX_RANK];
    size_t rank, count; /* count: of elements */
} Tensor;

/* The value of a whole attribute. */
OrtStatus *attribute(OrtApi api, const OrtKernelInfo *info, const char *name, size_t *value);
/* Input number `input` of a computation. */
OrtStatus *input_tensor(OrtApi api, const OrtKernelContext *context, size_t input, Tensor *tensor);
/* Output 0, whose shape is in `tensor`. */
OrtStatus *output_tensor(OrtApi api, OrtKernelContext *context, Tensor *tensor);
/* `bytes` of the session's own memory, for one computation. */
typedef struct {
    OrtAllocator *allocator;
    uint8_t *data;
} Scratch;
OrtStatus *take_scratch(OrtApi api, const OrtKernelContext *context, size_t bytes, Scratch *scratch);
void give_back(OrtApi api, Scratch *scratch);
/* The sizes of a matrix: n, k, bits and codes in a block. */
typedef struct {
    size_t n, k, bits, block;
} Sizes;

/* `count` matrices from constant inputs, the first of them `first`: codes, scales and, up to input `last`, minima. They have
   an axis for `count` if is_stack, and minima may be [count, blocks, 1] zeros then: there are none. */
OrtStatus *constant_weights(OrtApi api, const OrtKernelInfo *info, size_t first, size_t last, int is_stack, size_t count,
                            const Sizes *sizes, Weights *w);
/* A matrix's outputs in chunks, of which a thread takes one at a time; `multiply_chunk` computes it for all rows. */
size_t num_chunks(const Weights *w);
void multiply_chunk(const Weights *w, size_t matrix, const uint8_t *packed, size_t rows, size_t chunk, float *out);
/* work(job, 0) ... work(job, total - 1), shared by the session's threads. */
OrtStatus *share_out(OrtApi api, const OrtKernelContext *context, void (*work)(void *, size_t), size_t total, void *job);

extern const Operator PRODUCT_OPERATORS[2], EXPERTS_OPERATOR;

#endif
