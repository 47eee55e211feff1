/* BlockExperts(tokens [n, hidden_size], weights [n, k], chosen [n, k] int64,
                in_codes, in_scale, in_minimum, out_codes, out_scale, out_minimum) -> [n, hidden_size]

   A token's sum over the gated MLPs that it has chosen, in the order of their numbers: weight * down(silu(gate) * up).
   in_*: gate and up one behind the other, out_*: down; each a stack of num_experts matrices as BlockMatMul's. A stack's
   minima are [num_experts, blocks, outputs], or [num_experts, blocks, 1] zeros where there are none. */
#include "kernel.h"
#include "operator.h"

#include <math.h>
#include <string.h>

typedef struct {
    OrtApi api;
    Weights in, out;
} Kernel;

/* The pairs of token and place that chose one expert: lines `first` ... `first + rows - 1` of what is computed. */
typedef struct {
    size_t expert, first, rows, tiles_before;
} Group;

typedef struct {
    const Weights *in, *out;
    const float *tokens, *weights;
    size_t n, k, num_groups, num_tiles;
    Group *groups;
    size_t *tokens_of, *lines; /* by line: its token; by token and place: its line */
    float *x, *gated, *down;   /* a line's token, gate and up, contribution */
    uint8_t *packed;
    float *result;
} Job;

static const Group *group_of_tile(const Job *job, size_t tile) {
    const Group *group = job->groups;
    while (group + 1 < job->groups + job->num_groups && group[1].tiles_before <= tile) group++;
    return group;
}

/* Lines first ... last - 1 of a group's tile */
static const Group *tile_lines(const Job *job, size_t tile, size_t *first, size_t *last) {
    const Group *group = group_of_tile(job, tile);
    *first = group->first + (tile - group->tiles_before) * TILE;
    size_t end = group->first + group->rows;
    *last = *first + TILE < end ? *first + TILE : end;
    return group;
}

static void pack_lines(const Job *job, const Weights *w, const Group *group, size_t tile, const float *x) {
    rows_pack(w, x + group->first * w->k, group->rows, tile - group->tiles_before,
              job->packed + rows_bytes(w, group->first));
}

static void pack_tokens(void *job_, size_t tile) {
    const Job *job = job_;
    size_t first, last, k = job->in->k;
    const Group *group = tile_lines(job, tile, &first, &last);
    for (size_t line = first; line < last; line++)
        memcpy(job->x + line * k, job->tokens + job->tokens_of[line] * k, k * sizeof(float));
    pack_lines(job, job->in, group, tile, job->x);
}

static void pack_gated(void *job_, size_t tile) {
    const Job *job = job_;
    size_t first, last, inner = job->out->k;
    const Group *group = tile_lines(job, tile, &first, &last);
    for (size_t line = first; line < last; line++) {
        const float *gate = job->gated + line * 2 * inner, *up = gate + inner;
        float *to = job->x + line * inner;
        for (size_t i = 0; i < inner; i++) to[i] = gate[i] / (1 + expf(-gate[i])) * up[i];
    }
    pack_lines(job, job->out, group, tile, job->x);
}

static void multiply_lines(const Job *job, const Weights *w, size_t chunk, float *out) {
    size_t chunks = num_chunks(w);
    const Group *group = job->groups + chunk / chunks;
    multiply_chunk(w, group->expert, job->packed + rows_bytes(w, group->first), group->rows, chunk % chunks,
                   out + group->first * w->n);
}

static void multiply_in(void *job, size_t chunk) { multiply_lines(job, ((Job *)job)->in, chunk, ((Job *)job)->gated); }
static void multiply_out(void *job, size_t chunk) { multiply_lines(job, ((Job *)job)->out, chunk, ((Job *)job)->down); }

/* A token's sum: its lines lie in the order of their experts. */
static void add_up(void *job_, size_t token) {
    const Job *job = job_;
    size_t hidden = job->out->n, done = 0;
    float *to = job->result + token * hidden;
    memset(to, 0, hidden * sizeof(float));
    for (size_t i = 0; i < job->k; i++) {
        size_t next = SIZE_MAX, place = 0;
        for (size_t j = 0; j < job->k; j++) {
            size_t line = job->lines[token * job->k + j];
            if (line >= done && line < next) next = line, place = j;
        }
        const float *from = job->down + next * hidden;
        float weight = job->weights[token * job->k + place];
        for (size_t j = 0; j < hidden; j++) to[j] += from[j] * weight;
        done = next + 1;
    }
}

/* Sorts pairs by expert; returns 0 where one isn't there. */
static int group_pairs(Job *job, const int64_t *chosen, size_t num_experts, size_t *starts) {
    size_t pairs = job->n * job->k;
    memset(starts, 0, (num_experts + 1) * sizeof *starts);
    for (size_t i = 0; i < pairs; i++) {
        if (chosen[i] < 0 || (size_t)chosen[i] >= num_experts) return 0;
        starts[chosen[i] + 1]++;
    }
    for (size_t expert = 0; expert < num_experts; expert++) {
        size_t rows = starts[expert + 1];
        if (rows) {
            job->groups[job->num_groups++] = (Group){expert, starts[expert], rows, job->num_tiles};
            job->num_tiles += (rows + TILE - 1) / TILE;
        }
        starts[expert + 1] += starts[expert];
    }
    for (size_t i = 0; i < pairs; i++) {
        size_t line = starts[chosen[i]]++;
        job->lines[i] = line;
        job->tokens_of[line] = i / job->k;
    }
    return 1;
}

static OrtStatus *run(OrtApi api, OrtKernelContext *context, Job *job) {
    OrtStatus *status = share_out(api, context, pack_tokens, job->num_tiles, job);
    if (!status) status = share_out(api, context, multiply_in, job->num_groups * num_chunks(job->in), job);
    if (!status) status = share_out(api, context, pack_gated, job->num_tiles, job);
    if (!status) status = share_out(api, context, multiply_out, job->num_groups * num_chunks(job->out), job);
    return status ? status : share_out(api, context, add_up, job->n, job);
}

static size_t larger(size_t a, size_t b) { return a > b ? a : b; }

static OrtStatus *compute(void *kernel_, OrtKernelContext *context) {
    Kernel *kernel = kernel_;
    OrtApi api = kernel->api;
    const Weights *in = &kernel->in, *out = &kernel->out;
    Tensor tokens, weights, chosen;
    OrtStatus *status;
    if ((status = input_tensor(api, context, 0, &tokens)) || (status = input_tensor(api, context, 1, &weights)) ||
        (status = input_tensor(api, context, 2, &chosen)))
        return status;
    if (tokens.rank != 2 || (size_t)tokens.dims[1] != in->k || chosen.rank != 2 || chosen.dims[0] != tokens.dims[0] ||
        weights.count != chosen.count)
        return CreateStatus(api)(ORT_INVALID_ARGUMENT, "shapes of tokens, weights and chosen experts don't fit");
    Job job = {.in = in, .out = out, .tokens = tokens.data, .weights = weights.data, .n = tokens.dims[0], .k = chosen.dims[1]};
    if ((status = output_tensor(api, context, &tokens)) || !job.n) return status;
    job.result = tokens.data;
    size_t pairs = job.n * job.k, widest = larger(in->k, out->k);
    size_t packed_bytes = larger(rows_bytes(in, pairs), rows_bytes(out, pairs));
    size_t floats = pairs * (widest + in->n + out->n), whole = in->count + 1 + 2 * pairs;
    size_t bytes = whole * sizeof(size_t) + in->count * sizeof *job.groups + floats * sizeof(float) + packed_bytes;
    Scratch scratch;
    if ((status = take_scratch(api, context, bytes, &scratch))) return status;
    size_t *starts = (size_t *)scratch.data;
    job.tokens_of = starts + in->count + 1;
    job.lines = job.tokens_of + pairs;
    job.groups = (Group *)(job.lines + pairs);
    job.x = (float *)(job.groups + in->count);
    job.gated = job.x + pairs * widest;
    job.down = job.gated + pairs * in->n;
    job.packed = (uint8_t *)(job.down + pairs * out->n);
    if (group_pairs(&job, chosen.data, in->count, starts))
        status = run(api, context, &job);
    else
        status = CreateStatus(api)(ORT_INVALID_ARGUMENT, "a token has chosen an expert that isn't there");
    give_back(api, &scratch);
    return status;
}

static OrtStatus *create(const OrtCustomOp *op, OrtApi api, const OrtKernelInfo *info, void **result) {
    (void)op;
    Weights in, out;
    Sizes in_sizes, out_sizes;
    size_t count;
    const char *names[] = {"num_experts", "hidden_size", "gate_up_size", "intermediate_size",
                           "in_bits", "in_block_size", "out_bits", "out_block_size"};
    size_t *values[] = {&count, &in_sizes.k, &in_sizes.n, &out_sizes.k,
                        &in_sizes.bits, &in_sizes.block, &out_sizes.bits, &out_sizes.block};
    OrtStatus *status;
    for (int i = 0; i < 8; i++)
        if ((status = attribute(api, info, names[i], values[i]))) return status;
    out_sizes.n = in_sizes.k;
    if (in_sizes.n % 2 || in_sizes.n / 2 != out_sizes.k)
        return CreateStatus(api)(ORT_INVALID_ARGUMENT, "gate and up must be as wide as down's input");
    if ((status = constant_weights(api, info, 3, 5, 1, count, &in_sizes, &in))) return status;
    if ((status = constant_weights(api, info, 6, 8, 1, count, &out_sizes, &out))) return weights_free(&in), status;
    Kernel *kernel = malloc(sizeof *kernel);
    if (!kernel) return weights_free(&in), weights_free(&out), CreateStatus(api)(ORT_FAIL, "no memory for a kernel");
    *kernel = (Kernel){.api = api, .in = in, .out = out};
    *result = kernel;
    return NULL;
}

static void destroy(void *kernel_) {
    Kernel *kernel = kernel_;
    weights_free(&kernel->in);
    weights_free(&kernel->out);
    free(kernel);
}

static int input_type(const OrtCustomOp *op, size_t i) {
    return (void)op, i == 2 ? TENSOR_INT64 : i == 3 || i == 6 ? TENSOR_UINT8 : TENSOR_FLOAT;
}

const Operator EXPERTS_OPERATOR = OPERATOR("BlockExperts", 9);
