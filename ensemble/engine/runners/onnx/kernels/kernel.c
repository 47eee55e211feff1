#define _GNU_SOURCE
#include "kernel.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

enum { CHUNKS = 16, CHUNK_BYTES = 32 << 10 };

OrtStatus *attribute(OrtApi api, const OrtKernelInfo *info, const char *name, size_t *value) {
    int64_t number = 0;
    OrtStatus *status = KernelInfoGetAttribute_int64(api)(info, name, &number);
    if (!status && number < 1) status = CreateStatus(api)(ORT_INVALID_ARGUMENT, "sizes of blocks are positive");
    *value = number;
    return status;
}

static OrtStatus *describe(OrtApi api, const OrtValue *value, Tensor *tensor) {
    OrtTensorTypeAndShapeInfo *shape;
    OrtStatus *status = GetTensorTypeAndShape(api)(value, &shape);
    if (status) return status;
    if (!(status = GetDimensionsCount(api)(shape, &tensor->rank))) {
        if (tensor->rank > MAX_RANK)
            status = CreateStatus(api)(ORT_INVALID_ARGUMENT, "a tensor has too many axes");
        else
            status = GetDimensions(api)(shape, tensor->dims, tensor->rank);
    }
    ReleaseTensorTypeAndShapeInfo(api)(shape);
    tensor->count = 1;
    for (size_t i = 0; !status && i < tensor->rank; i++) tensor->count *= tensor->dims[i];
    return status ? status : GetTensorMutableData(api)((OrtValue *)value, &tensor->data);
}

OrtStatus *input_tensor(OrtApi api, const OrtKernelContext *context, size_t input, Tensor *tensor) {
    const OrtValue *value;
    OrtStatus *status = KernelContext_GetInput(api)(context, input, &value);
    return status ? status : describe(api, value, tensor);
}

OrtStatus *output_tensor(OrtApi api, OrtKernelContext *context, Tensor *tensor) {
    OrtValue *value;
    OrtStatus *status = KernelContext_GetOutput(api)(context, 0, tensor->dims, tensor->rank, &value);
    return status ? status : GetTensorMutableData(api)(value, &tensor->data);
}

OrtStatus *take_scratch(OrtApi api, const OrtKernelContext *context, size_t bytes, Scratch *scratch) {
    OrtMemoryInfo *memory;
    OrtStatus *status = CreateCpuMemoryInfo(api)(ARENA_ALLOCATOR, DEFAULT_MEMORY, &memory);
    if (status) return status;
    scratch->allocator = NULL;
    status = KernelContext_GetAllocator(api)(context, memory, &scratch->allocator);
    ReleaseMemoryInfo(api)(memory);
    if (!status) status = AllocatorAlloc(api)(scratch->allocator, bytes, (void **)&scratch->data);
    if (status && scratch->allocator) ReleaseAllocator(api)(scratch->allocator);
    return status;
}

void give_back(OrtApi api, Scratch *scratch) {
    OrtStatus *status = AllocatorFree(api)(scratch->allocator, scratch->data);
    (void)status; /* an allocator's Free has none */
    ReleaseAllocator(api)(scratch->allocator);
}

/* Gives the pages of a file's mapping back that nobody has written to: what was read stays in the system's cache. */
static void forget(const Tensor *tensor, size_t bytes) {
    size_t start = (size_t)tensor->data, page = 4096, first = (start + page - 1) & ~(page - 1);
    size_t end = (start + bytes) & ~(page - 1), entries[512];
    int pages = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    if (pages < 0) return;
    while (first < end) {
        size_t count = (end - first) / page < 512 ? (end - first) / page : 512, of_a_file = 0;
        ssize_t got = pread(pages, entries, count * sizeof *entries, first / page * sizeof *entries);
        if (got != (ssize_t)(count * sizeof *entries)) break;
        /* Bit 61: a page of a file, not a copy of it; bit 63: it is there. */
        for (size_t i = 0; i < count; i++) of_a_file += !(entries[i] >> 63) || entries[i] >> 61 & 1;
        if (of_a_file == count) madvise((void *)first, count * page, MADV_DONTNEED);
        first += count * page;
    }
    close(pages);
}

static OrtStatus *not_fitting(OrtApi api) {
    return CreateStatus(api)(ORT_INVALID_ARGUMENT, "shapes of codes, scale and minimum don't fit the sizes");
}

static OrtStatus *constant(OrtApi api, const OrtKernelInfo *info, size_t input, Tensor *tensor) {
    int is_constant = 0;
    const OrtValue *value = NULL;
    OrtStatus *status = KernelInfoGetConstantInput_tensor(api)(info, input, &is_constant, &value);
    if (status) return status;
    if (!is_constant || !value) return CreateStatus(api)(ORT_INVALID_ARGUMENT, "weights in blocks must be constants");
    return describe(api, value, tensor);
}

/* Whether the shape is [count, a, b, c], without count unless is_stack, without c if that is 0. */
static int has_shape(const Tensor *tensor, int is_stack, size_t count, size_t a, size_t b, size_t c) {
    const size_t wanted[] = {count, a, b, c};
    size_t first = !is_stack, rank = (c ? 4 : 3) - first;
    if (tensor->rank != rank) return 0;
    for (size_t i = 0; i < rank; i++)
        if ((size_t)tensor->dims[i] != wanted[first + i]) return 0;
    return 1;
}

OrtStatus *constant_weights(OrtApi api, const OrtKernelInfo *info, size_t first, size_t last, int is_stack, size_t count,
                            const Sizes *sizes, Weights *w) {
    size_t n = sizes->n, k = sizes->k, bits = sizes->bits, block = sizes->block;
    if ((bits != 4 && bits != 8) || (block != 16 && block != 32) || k % block)
        return CreateStatus(api)(ORT_INVALID_ARGUMENT, "blocks have 16 or 32 codes of 4 or 8 bits, and K is a multiple");
    size_t blocks = k / block, code_bytes = block * bits / 8;
    Tensor codes, scales, minima = {.data = NULL};
    OrtStatus *status = constant(api, info, first, &codes);
    if (!status) status = constant(api, info, first + 1, &scales);
    if (!status && last > first + 1) status = constant(api, info, last, &minima);
    if (status) return status;
    /* The shapes are those of tensors that are there: no size below is too large to count. */
    if (!has_shape(&codes, is_stack, count, n, blocks, code_bytes) || !has_shape(&scales, is_stack, count, n, blocks, 0))
        return not_fitting(api);
    if (minima.data && is_stack && has_shape(&minima, 1, count, blocks, 1, 0) && n > 1) {
        for (size_t i = 0; i < minima.count; i++)
            if (((const float *)minima.data)[i] != 0) return not_fitting(api);
        minima.data = NULL;
    } else if (minima.data && !has_shape(&minima, is_stack, count, blocks, n, 0)) {
        return not_fitting(api);
    }
    *w = (Weights){.count = count, .n = n, .k = k, .bits = bits, .block = block};
    if (!weights_pack(w, codes.data, scales.data, minima.data))
        return CreateStatus(api)(ORT_FAIL, "no memory for weights in blocks");
    forget(&codes, codes.count);
    forget(&scales, scales.count * sizeof(float));
    if (minima.data) forget(&minima, minima.count * sizeof(float));
    return NULL;
}

/* Panels in a chunk */
static size_t panels_together(const Weights *w) {
    size_t bytes = w->blocks * w->record, least = (CHUNK_BYTES + bytes - 1) / bytes;
    size_t together = (w->panels + CHUNKS - 1) / CHUNKS;
    return together < least ? least : together;
}

size_t num_chunks(const Weights *w) {
    size_t together = panels_together(w);
    return (w->panels + together - 1) / together;
}

void multiply_chunk(const Weights *w, size_t matrix, const uint8_t *packed, size_t rows, size_t chunk, float *out) {
    size_t together = panels_together(w), first = chunk * together, last = first + together;
    multiply(w, matrix, packed, rows, first, last < w->panels ? last : w->panels, out);
}

OrtStatus *share_out(OrtApi api, const OrtKernelContext *context, void (*work)(void *, size_t), size_t total, void *job) {
    if (total == 1) work(job, 0);
    return total > 1 ? KernelContext_ParallelFor(api)(context, work, total, 0, job) : NULL;
}
