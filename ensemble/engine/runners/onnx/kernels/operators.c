/* The operators of domain deepseek_triton, for an ONNX Runtime session that loads this library:

   BlockMatMul(x [..., k], codes [n, k / block, block * bits / 8], scale [n, k / block]) -> [..., n]
   ShiftedBlockMatMul(x, codes, scale, minimum [k / block, n]) -> [..., n]

   Attributes: K, N, bits, block_size. Weights are constants; each kernel keeps them in panels of its own (blocks.h). A
   graph defines both as functions of other operators too (builders/graph/blocks/nodes.py), for sessions without this. */
#define _GNU_SOURCE
#include "blocks.h"
#include "onnx_runtime.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

enum { MAX_RANK = 8, CHUNKS = 16, CHUNK_BYTES = 32 << 10, MAX_INPUTS = 4 };

typedef struct {
    OrtCustomOp op;
    const char *name;
    size_t num_inputs;
} Operator;

typedef struct {
    OrtApi api;
    Weights weights;
} Kernel;

typedef struct {
    const Weights *weights;
    const float *x;
    uint8_t *packed;
    float *out;
    size_t rows, chunk; /* panels in a chunk */
} Job;

/* Gives the pages of a file's mapping back: what was read of it stays in the kernel's cache. Other memory is left. */
static void forget(const void *start, size_t bytes) {
    FILE *maps = fopen("/proc/self/maps", "r");
    if (!maps) return;
    size_t page = 4096, first = ((size_t)start + page - 1) & ~(page - 1), end = ((size_t)start + bytes) & ~(page - 1);
    char line[512];
    while (fgets(line, sizeof line, maps)) {
        unsigned long low, high, inode;
        if (sscanf(line, "%lx-%lx %*s %*s %*s %lu", &low, &high, &inode) != 3 || high <= first || low >= end) continue;
        if (inode && low <= first && end <= high && first < end) madvise((void *)first, end - first, MADV_DONTNEED);
        break;
    }
    fclose(maps);
}

/* Input number `input`, of `size` elements */
static OrtStatus *constant(OrtApi api, const OrtKernelInfo *info, size_t input, size_t size, const void **data) {
    int is_constant = 0;
    const OrtValue *value = NULL;
    OrtTensorTypeAndShapeInfo *shape;
    size_t count;
    OrtStatus *status = KernelInfoGetConstantInput_tensor(api)(info, input, &is_constant, &value);
    if (status) return status;
    if (!is_constant || !value) return CreateStatus(api)(ORT_INVALID_ARGUMENT, "weights in blocks must be constants");
    if ((status = GetTensorTypeAndShape(api)(value, &shape))) return status;
    status = GetTensorShapeElementCount(api)(shape, &count);
    ReleaseTensorTypeAndShapeInfo(api)(shape);
    if (status) return status;
    if (count != size) return CreateStatus(api)(ORT_INVALID_ARGUMENT, "shapes of codes, scale and minimum don't fit K and N");
    return GetTensorMutableData(api)((OrtValue *)value, (void **)data);
}

static OrtStatus *create(const OrtCustomOp *op, OrtApi api, const OrtKernelInfo *info, void **out) {
    const char *names[] = {"K", "N", "bits", "block_size"};
    int64_t values[4];
    const void *inputs[MAX_INPUTS] = {NULL};
    OrtStatus *status;
    for (int i = 0; i < 4; i++)
        if ((status = KernelInfoGetAttribute_int64(api)(info, names[i], &values[i]))) return status;
    if ((values[2] != 4 && values[2] != 8) || (values[3] != 16 && values[3] != 32) || values[0] < 1 ||
        values[0] % values[3] || values[1] < 1)
        return CreateStatus(api)(ORT_INVALID_ARGUMENT, "blocks have 16 or 32 codes of 4 or 8 bits, and K is a multiple");
    size_t k = values[0], n = values[1], numbers = n * (k / values[3]);
    for (size_t i = 1; i < ((const Operator *)op)->num_inputs; i++)
        if ((status = constant(api, info, i, i == 1 ? n * k * values[2] / 8 : numbers, &inputs[i]))) return status;
    Kernel *kernel = calloc(1, sizeof *kernel);
    if (!kernel) return CreateStatus(api)(ORT_FAIL, "no memory for a kernel");
    kernel->api = api;
    Weights *w = &kernel->weights;
    w->k = k, w->n = n, w->bits = values[2], w->block = values[3];
    if (!weights_pack(w, inputs[1], inputs[2], inputs[3])) {
        free(kernel);
        return CreateStatus(api)(ORT_FAIL, "no memory for weights in blocks");
    }
    forget(inputs[1], n * k * w->bits / 8);
    forget(inputs[2], numbers * sizeof(float));
    if (inputs[3]) forget(inputs[3], numbers * sizeof(float));
    *out = kernel;
    return NULL;
}

static void pack_tile(void *job_, size_t tile) {
    const Job *job = job_;
    rows_pack(job->weights, job->x, job->rows, tile, job->packed);
}

static void multiply_chunk(void *job_, size_t chunk) {
    const Job *job = job_;
    size_t first = chunk * job->chunk, last = first + job->chunk;
    multiply(job->weights, job->packed, job->rows, first, last < job->weights->panels ? last : job->weights->panels, job->out);
}

/* x's rows, and the output of as many */
static OrtStatus *tensors(Kernel *kernel, OrtKernelContext *context, Job *job) {
    OrtApi api = kernel->api;
    const OrtValue *x;
    OrtValue *out;
    OrtTensorTypeAndShapeInfo *shape;
    int64_t dims[MAX_RANK];
    size_t rank;
    OrtStatus *status;
    if ((status = KernelContext_GetInput(api)(context, 0, &x))) return status;
    if ((status = GetTensorTypeAndShape(api)(x, &shape))) return status;
    if (!(status = GetDimensionsCount(api)(shape, &rank))) {
        if (rank < 1 || rank > MAX_RANK)
            status = CreateStatus(api)(ORT_INVALID_ARGUMENT, "x has no axis, or too many");
        else
            status = GetDimensions(api)(shape, dims, rank);
    }
    ReleaseTensorTypeAndShapeInfo(api)(shape);
    if (status) return status;
    if ((size_t)dims[rank - 1] != kernel->weights.k)
        return CreateStatus(api)(ORT_INVALID_ARGUMENT, "x's last axis isn't K");
    job->rows = 1;
    for (size_t i = 0; i + 1 < rank; i++) job->rows *= dims[i];
    dims[rank - 1] = kernel->weights.n;
    if ((status = GetTensorMutableData(api)((OrtValue *)x, (void **)&job->x))) return status;
    if ((status = KernelContext_GetOutput(api)(context, 0, dims, rank, &out))) return status;
    return GetTensorMutableData(api)(out, (void **)&job->out);
}

static OrtStatus *compute(void *kernel_, OrtKernelContext *context) {
    Kernel *kernel = kernel_;
    const Weights *w = &kernel->weights;
    Job job = {.weights = w};
    OrtStatus *status = tensors(kernel, context, &job);
    if (status || !job.rows) return status;
    job.packed = malloc(rows_bytes(w, job.rows));
    if (!job.packed) return CreateStatus(kernel->api)(ORT_FAIL, "no memory for rounded rows");
    size_t tiles = (job.rows + TILE - 1) / TILE;
    if (tiles == 1)
        pack_tile(&job, 0);
    else
        status = KernelContext_ParallelFor(kernel->api)(context, pack_tile, tiles, 0, &job);
    size_t least = (CHUNK_BYTES + w->blocks * w->record - 1) / (w->blocks * w->record);
    job.chunk = (w->panels + CHUNKS - 1) / CHUNKS;
    if (job.chunk < least) job.chunk = least;
    size_t chunks = (w->panels + job.chunk - 1) / job.chunk;
    if (!status) status = KernelContext_ParallelFor(kernel->api)(context, multiply_chunk, chunks, 0, &job);
    free(job.packed);
    return status;
}

static void destroy(void *kernel_) {
    Kernel *kernel = kernel_;
    weights_free(&kernel->weights);
    free(kernel);
}

static const char *name(const OrtCustomOp *op) { return ((const Operator *)op)->name; }
static const char *provider(const OrtCustomOp *op) { return (void)op, NULL; } /* the CPU's */
static size_t num_inputs(const OrtCustomOp *op) { return ((const Operator *)op)->num_inputs; }
static int input_type(const OrtCustomOp *op, size_t i) { return (void)op, i == 1 ? TENSOR_UINT8 : TENSOR_FLOAT; }
static size_t num_outputs(const OrtCustomOp *op) { return (void)op, 1; }
static int output_type(const OrtCustomOp *op, size_t i) { return (void)op, (void)i, TENSOR_FLOAT; }
static int required(const OrtCustomOp *op, size_t i) { return (void)op, (void)i, 0; }
static int one(const OrtCustomOp *op) { return (void)op, 1; }

#define OPERATOR(NAME, INPUTS)                                                                                         \
    {{.version = API_VERSION, .GetName = name, .GetExecutionProviderType = provider, .GetInputType = input_type,       \
      .GetInputTypeCount = num_inputs, .GetOutputType = output_type, .GetOutputTypeCount = num_outputs,                \
      .KernelDestroy = destroy, .GetInputCharacteristic = required, .GetOutputCharacteristic = required,               \
      .GetInputMemoryType = required, .GetVariadicInputMinArity = one, .GetVariadicInputHomogeneity = one,             \
      .GetVariadicOutputMinArity = one, .GetVariadicOutputHomogeneity = one, .CreateKernelV2 = create,                 \
      .KernelComputeV2 = compute, .GetStartVersion = one, .GetEndVersion = one},                                       \
     NAME, INPUTS}
static const Operator OPERATORS[] = {OPERATOR("BlockMatMul", 3), OPERATOR("ShiftedBlockMatMul", 4)};

OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base) {
    OrtApi api = base->get_api(API_VERSION);
    OrtCustomOpDomain *domain;
    if (!instructions && !blocks_instructions(AVX512)) return CreateStatus(api)(ORT_FAIL, "this processor has no AVX2");
    OrtStatus *status = CreateCustomOpDomain(api)("deepseek_triton", &domain);
    for (size_t i = 0; !status && i < sizeof OPERATORS / sizeof *OPERATORS; i++)
        status = CustomOpDomain_Add(api)(domain, &OPERATORS[i].op);
    return status ? status : AddCustomOpDomain(api)(options, domain);
}
