/* BlockMatMul(x [..., K], codes [N, K / block_size, block_size * bits / 8], scale [N, K / block_size]) -> [..., N]
   ShiftedBlockMatMul(x, codes, scale, minimum [K / block_size, N]) -> [..., N] */
#include "kernel.h"
#include "operator.h"

typedef struct {
    OrtApi api;
    Weights weights;
} Kernel;

typedef struct {
    const Weights *weights;
    const float *x;
    uint8_t *packed;
    float *out;
    size_t rows;
} Job;

static OrtStatus *create(const OrtCustomOp *op, OrtApi api, const OrtKernelInfo *info, void **out) {
    Weights w;
    Sizes sizes;
    OrtStatus *status;
    if ((status = attribute(api, info, "K", &sizes.k)) || (status = attribute(api, info, "N", &sizes.n)) ||
        (status = attribute(api, info, "bits", &sizes.bits)) || (status = attribute(api, info, "block_size", &sizes.block)))
        return status;
    if ((status = constant_weights(api, info, 1, num_inputs(op) - 1, 0, 1, &sizes, &w))) return status;
    Kernel *kernel = malloc(sizeof *kernel);
    if (!kernel) return weights_free(&w), CreateStatus(api)(ORT_FAIL, "no memory for a kernel");
    *kernel = (Kernel){api, w};
    *out = kernel;
    return NULL;
}

static void pack_tile(void *job_, size_t tile) {
    const Job *job = job_;
    rows_pack(job->weights, job->x, job->rows, tile, job->packed);
}

static void multiply_rows(void *job_, size_t chunk) {
    const Job *job = job_;
    multiply_chunk(job->weights, 0, job->packed, job->rows, chunk, job->out);
}

static OrtStatus *compute(void *kernel_, OrtKernelContext *context) {
    Kernel *kernel = kernel_;
    OrtApi api = kernel->api;
    const Weights *w = &kernel->weights;
    Tensor x;
    OrtStatus *status = input_tensor(api, context, 0, &x);
    if (status) return status;
    if (!x.rank || (size_t)x.dims[x.rank - 1] != w->k)
        return CreateStatus(api)(ORT_INVALID_ARGUMENT, "x's last axis isn't K");
    Job job = {.weights = w, .x = x.data, .rows = x.count / w->k};
    x.dims[x.rank - 1] = w->n;
    if ((status = output_tensor(api, context, &x)) || !job.rows) return status;
    job.out = x.data;
    Scratch scratch;
    if ((status = take_scratch(api, context, rows_bytes(w, job.rows), &scratch))) return status;
    job.packed = scratch.data;
    status = share_out(api, context, pack_tile, (job.rows + TILE - 1) / TILE, &job);
    if (!status) status = share_out(api, context, multiply_rows, num_chunks(w), &job);
    give_back(api, &scratch);
    return status;
}

static void destroy(void *kernel_) {
    Kernel *kernel = kernel_;
    weights_free(&kernel->weights);
    free(kernel);
}

static int input_type(const OrtCustomOp *op, size_t i) { return (void)op, i == 1 ? TENSOR_UINT8 : TENSOR_FLOAT; }

const Operator PRODUCT_OPERATORS[2] = {OPERATOR("BlockMatMul", 3), OPERATOR("ShiftedBlockMatMul", 4)};
