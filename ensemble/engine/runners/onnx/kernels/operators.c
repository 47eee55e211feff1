/* The operators of domain deepseek_triton, for an ONNX Runtime session that loads this library. Their weights are
   constants; each kernel keeps them in panels of its own (blocks.h). A graph defines all of them as functions of other
   operators too (builders/graph/blocks/functions.py), for sessions without this. */
#include "kernel.h"

OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base) {
    OrtApi api = base->get_api(API_VERSION);
    const Operator *operators[] = {&PRODUCT_OPERATORS[0], &PRODUCT_OPERATORS[1], &EXPERTS_OPERATOR};
    OrtCustomOpDomain *domain;
    if (!instructions && !blocks_instructions(AVX512)) return CreateStatus(api)(ORT_FAIL, "this processor has no AVX2");
    OrtStatus *status = CreateCustomOpDomain(api)("deepseek_triton", &domain);
    for (size_t i = 0; !status && i < sizeof operators / sizeof *operators; i++)
        status = CustomOpDomain_Add(api)(domain, &operators[i]->op);
    return status ? status : AddCustomOpDomain(api)(options, domain);
}
