/* An operator's table of functions, for a file that defines create, compute, destroy and input_type. */
#ifndef OPERATOR_H
#define OPERATOR_H

#include "kernel.h"

#include <stdlib.h>

static const char *name(const OrtCustomOp *op) { return ((const Operator *)op)->name; }
static const char *provider(const OrtCustomOp *op) { return (void)op, NULL; } /* the CPU's */
static size_t num_inputs(const OrtCustomOp *op) { return ((const Operator *)op)->num_inputs; }
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

#endif
