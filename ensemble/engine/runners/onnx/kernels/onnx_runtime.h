/* What a custom operator needs of ONNX Runtime's C interface, which is stable: a function keeps its place in OrtApi.

   Source: https://github.com/microsoft/onnxruntime/blob/main/include/onnxruntime/core/session/onnxruntime_c_api.h */
#ifndef ONNX_RUNTIME_H
#define ONNX_RUNTIME_H

#include <stddef.h>
#include <stdint.h>

enum { API_VERSION = 17 /* since ONNX Runtime 1.17, for ParallelFor */ };
enum { ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2 };
enum { ARENA_ALLOCATOR = 1, DEFAULT_MEMORY = 0 };
enum { TENSOR_FLOAT = 1, TENSOR_UINT8 = 2, TENSOR_INT64 = 7 };

typedef struct OrtStatus OrtStatus; /* NULL: success */
typedef struct OrtValue OrtValue;
typedef struct OrtKernelInfo OrtKernelInfo;
typedef struct OrtKernelContext OrtKernelContext;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtCustomOpDomain OrtCustomOpDomain;
typedef struct OrtShapeInferContext OrtShapeInferContext;
typedef struct OrtMemoryInfo OrtMemoryInfo;
typedef struct OrtAllocator OrtAllocator;
typedef struct OrtTensorTypeAndShapeInfo OrtTensorTypeAndShapeInfo;

typedef void (*OrtFunction)(void);
typedef const OrtFunction *OrtApi; /* its functions, by place */

typedef struct {
    OrtApi (*get_api)(uint32_t version);
    const char *(*get_version)(void);
} OrtApiBase;

#define CreateStatus(api) ((OrtStatus * (*)(int, const char *))(api)[0])
#define CreateCustomOpDomain(api) ((OrtStatus * (*)(const char *, OrtCustomOpDomain **))(api)[26])
#define CustomOpDomain_Add(api) ((OrtStatus * (*)(OrtCustomOpDomain *, const OrtCustomOp *))(api)[27])
#define AddCustomOpDomain(api) ((OrtStatus * (*)(OrtSessionOptions *, OrtCustomOpDomain *))(api)[28])
#define GetTensorMutableData(api) ((OrtStatus * (*)(OrtValue *, void **))(api)[51])
#define GetDimensionsCount(api) ((OrtStatus * (*)(const OrtTensorTypeAndShapeInfo *, size_t *))(api)[61])
#define GetDimensions(api) ((OrtStatus * (*)(const OrtTensorTypeAndShapeInfo *, int64_t *, size_t))(api)[62])
#define GetTensorShapeElementCount(api) ((OrtStatus * (*)(const OrtTensorTypeAndShapeInfo *, size_t *))(api)[64])
#define GetTensorTypeAndShape(api) ((OrtStatus * (*)(const OrtValue *, OrtTensorTypeAndShapeInfo **))(api)[65])
#define CreateCpuMemoryInfo(api) ((OrtStatus * (*)(int, int, OrtMemoryInfo **))(api)[69])
#define AllocatorAlloc(api) ((OrtStatus * (*)(OrtAllocator *, size_t, void **))(api)[75])
#define AllocatorFree(api) ((OrtStatus * (*)(OrtAllocator *, void *))(api)[76])
#define KernelInfoGetAttribute_int64(api) ((OrtStatus * (*)(const OrtKernelInfo *, const char *, int64_t *))(api)[86])
#define KernelContext_GetInput(api) ((OrtStatus * (*)(const OrtKernelContext *, size_t, const OrtValue **))(api)[90])
#define KernelContext_GetOutput(api)                                                                                   \
    ((OrtStatus * (*)(OrtKernelContext *, size_t, const int64_t *, size_t, OrtValue **))(api)[91])
#define ReleaseMemoryInfo(api) ((void (*)(OrtMemoryInfo *))(api)[94])
#define ReleaseTensorTypeAndShapeInfo(api) ((void (*)(OrtTensorTypeAndShapeInfo *))(api)[99])
#define ReleaseAllocator(api) ((void (*)(OrtAllocator *))(api)[132])
#define KernelInfoGetConstantInput_tensor(api)                                                                         \
    ((OrtStatus * (*)(const OrtKernelInfo *, size_t, int *, const OrtValue **))(api)[249])
#define KernelContext_GetAllocator(api)                                                                                \
    ((OrtStatus * (*)(const OrtKernelContext *, const OrtMemoryInfo *, OrtAllocator **))(api)[253])
#define KernelContext_ParallelFor(api)                                                                                 \
    ((OrtStatus * (*)(const OrtKernelContext *, void (*)(void *, size_t), size_t, size_t, void *))(api)[274])

typedef struct OrtCustomOp OrtCustomOp;
struct OrtCustomOp {
    uint32_t version;
    void *(*CreateKernel)(const OrtCustomOp *, OrtApi, const OrtKernelInfo *);
    const char *(*GetName)(const OrtCustomOp *);
    const char *(*GetExecutionProviderType)(const OrtCustomOp *);
    int (*GetInputType)(const OrtCustomOp *, size_t);
    size_t (*GetInputTypeCount)(const OrtCustomOp *);
    int (*GetOutputType)(const OrtCustomOp *, size_t);
    size_t (*GetOutputTypeCount)(const OrtCustomOp *);
    void (*KernelCompute)(void *, OrtKernelContext *);
    void (*KernelDestroy)(void *);
    int (*GetInputCharacteristic)(const OrtCustomOp *, size_t);
    int (*GetOutputCharacteristic)(const OrtCustomOp *, size_t);
    int (*GetInputMemoryType)(const OrtCustomOp *, size_t);
    int (*GetVariadicInputMinArity)(const OrtCustomOp *);
    int (*GetVariadicInputHomogeneity)(const OrtCustomOp *);
    int (*GetVariadicOutputMinArity)(const OrtCustomOp *);
    int (*GetVariadicOutputHomogeneity)(const OrtCustomOp *);
    OrtStatus *(*CreateKernelV2)(const OrtCustomOp *, OrtApi, const OrtKernelInfo *, void **);
    OrtStatus *(*KernelComputeV2)(void *, OrtKernelContext *);
    OrtStatus *(*InferOutputShapeFn)(const OrtCustomOp *, OrtShapeInferContext *);
    int (*GetStartVersion)(const OrtCustomOp *);
    int (*GetEndVersion)(const OrtCustomOp *);
};

#endif
