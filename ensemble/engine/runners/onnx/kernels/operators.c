/* The operators of domain deepseek_triton, for an ONNX Runtime session that loads this library. Their weights are
   constants; each kernel keeps them in panels of its own (blocks.h). A graph defines all of them as functions of other
   operators too (builders/graph/blocks/functions.py), for sessions without this. */
#include "kernel.h"

#include <pthread.h>

EXPORTED OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base) {
    OrtApi api = base->get_api(API_VERSION);
    const Operator *operators[] = {&PRODUCT_OPERATORS[0], &PRODUCT_OPERATORS[1], &EXPERTS_OPERATOR};
    static OrtCustomOpDomain *domain; /* of all sessions: it is ONNX Runtime's until the process ends */
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    OrtStatus *status = NULL;
    if (!instructions && !blocks_instructions(AVX512)) return CreateStatus(api)(ORT_FAIL, "this processor has no AVX2");
    pthread_mutex_lock(&lock);
    if (!domain) {
        OrtCustomOpDomain *whole;
        status = CreateCustomOpDomain(api)("deepseek_triton", &whole);
        for (size_t i = 0; !status && i < sizeof operators / sizeof *operators; i++)
            status = CustomOpDomain_Add(api)(whole, &operators[i]->op);
        if (!status) domain = whole;
    }
    pthread_mutex_unlock(&lock);
    return status ? status : AddCustomOpDomain(api)(options, domain);
}
