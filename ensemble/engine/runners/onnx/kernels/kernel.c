#define _GNU_SOURCE
#include "kernel.h"

#include <stdio.h>
#include <sys/mman.h>

enum { CHUNKS = 16, CHUNK_BYTES = 32 << 10 };

OrtStatus *attribute(OrtApi api, const OrtKernelInfo *info, const char *name, size_t *value) {
    int64_t number;
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

/* Gives the pages of a file's mapping back: what was read of it stays in the system's cache. Other memory is left. */
static void forget(const Tensor *tensor, size_t bytes) {
    FILE *maps = fopen("/proc/self/maps", "r");
    if (!maps) return;
    size_t start = (size_t)tensor->data, page = 4096, first = (start + page - 1) & ~(page - 1);
    size_t end = (start + bytes) & ~(page - 1);
    char line[512];
    while (fgets(line, sizeof line, maps)) {
        unsigned long low, high, inode;
        if (sscanf(line, "%lx-%lx %*s %*s %*s %lu", &low, &high, &inode) != 3 || high <= first || low >= end) continue;
        if (inode && low <= first && end <= high && first < end) madvise((void *)first, end - first, MADV_DONTNEED);
        break;
    }
    fclose(maps);
}

/* Input number `input`, of `count` elements */
static OrtStatus *constant(OrtApi api, const OrtKernelInfo *info, size_t input, size_t count, Tensor *tensor) {
    int is_constant = 0;
    const OrtValue *value = NULL;
    OrtStatus *status = KernelInfoGetConstantInput_tensor(api)(info, input, &is_constant, &value);
    if (status) return status;
    if (!is_constant || !value) return CreateStatus(api)(ORT_INVALID_ARGUMENT, "weights in blocks must be constants");
    if ((status = describe(api, value, tensor))) return status;
    if (tensor->count == count) return NULL;
    return CreateStatus(api)(ORT_INVALID_ARGUMENT, "shapes of codes, scale and minimum don't fit the sizes");
}

OrtStatus *constant_weights(OrtApi api, const OrtKernelInfo *info, size_t first, int has_minima, Weights *w) {
    if ((w->bits != 4 && w->bits != 8) || (w->block != 16 && w->block != 32) || w->k % w->block)
        return CreateStatus(api)(ORT_INVALID_ARGUMENT, "blocks have 16 or 32 codes of 4 or 8 bits, and K is a multiple");
    Tensor codes, scales, minima = {.data = NULL};
    size_t numbers = w->count * w->n * (w->k / w->block), bytes = w->count * w->n * w->k * w->bits / 8;
    OrtStatus *status = constant(api, info, first, bytes, &codes);
    if (!status) status = constant(api, info, first + 1, numbers, &scales);
    if (!status && has_minima) status = constant(api, info, first + 2, numbers, &minima);
    if (status) return status;
    if (!weights_pack(w, codes.data, scales.data, minima.data))
        return CreateStatus(api)(ORT_FAIL, "no memory for weights in blocks");
    forget(&codes, bytes);
    forget(&scales, numbers * sizeof(float));
    if (has_minima) forget(&minima, numbers * sizeof(float));
    return NULL;
}

size_t panels_together(const Weights *w) {
    size_t bytes = w->blocks * w->record, least = (CHUNK_BYTES + bytes - 1) / bytes;
    size_t together = (w->panels + CHUNKS - 1) / CHUNKS;
    return together < least ? least : together;
}
