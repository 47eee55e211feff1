// A decoder of grouped-query attention and dense MLPs. Five phases a layer:
//   qkv = norm(hidden) Wqkv | attention | hidden += attention Wo | activated = silu(gate) up |
//   hidden += activated Wdown
//
// Macros beside common.cu's (persistent/dense.py):
//   INTERMEDIATE HEADS KV_HEADS HEAD_DIM VOCAB LAYERS MAX_SEQ_LEN   the decoder's shape
//   PAGE         0: a slot's cached positions lie side by side; else they are in blocks of so many, which a table names
//   QK_NORM      1: the heads of q and k are normed
//   SCORE_SCALE  factor of the attention scores, times log2(e)
//   KV_BLOCK     cached positions of a stage

constexpr int SHARED_HEADS = HEADS / KV_HEADS;  // query heads that share a key head
constexpr int HALF = HEAD_DIM / 2;
constexpr int Q_SIZE = HEADS * HEAD_DIM;
constexpr int KV_SIZE = KV_HEADS * HEAD_DIM;
constexpr int QKV_SIZE = Q_SIZE + 2 * KV_SIZE;
constexpr int MAX_SPLITS = BLOCKS / KV_HEADS;  // blocks that share a key head's cache
constexpr int PREFETCHED = MAX_SPLITS < 4 ? MAX_SPLITS : 4;  // splits loaded early; more would spill

static_assert(4 * KV_BLOCK * HEAD_DIM <= STAGE_BYTES, "a stage is too small");
static_assert(HEADS % KV_HEADS == 0 && SHARED_HEADS <= 16, "a warp does at most two heads");
static_assert(HEAD_DIM % 32 == 0 && HEAD_DIM <= THREADS && THREADS % HALF == 0, "threads share a head's width evenly");
static_assert(KV_BLOCK <= 32 && KV_HEADS <= BLOCKS, "four positions a warp, at least one block a key head");
static_assert(!PAGE || PAGE >= KV_BLOCK, "a stage's positions lie in two blocks of the cache at most");

struct Layer {
    const u16* attention_norm;  // [HIDDEN] bfloat16
    const u16* mlp_norm;
    const u16* qk_norms;  // [2, HEAD_DIM] bfloat16
    Matrix qkv, o, gate_up, down;
    u16* keys;  // [KV_HEADS, MAX_SEQ_LEN, HEAD_DIM] bfloat16, of slot 0; or [blocks, KV_HEADS, PAGE, HEAD_DIM]
    u16* values;
};

// Where a key head's position is in `keys` and `values`; the next ones follow, up to a multiple of PAGE.
// table: the blocks of slot 0. Nothing in this kernel writes to it.
__device__ __forceinline__ i64 cache_offset(const int* table, int head, int position) {
#if PAGE
    const i64 row = ((i64)__ldg(table + position / PAGE) * KV_HEADS + head) * PAGE + position % PAGE;
#else
    const i64 row = (i64)head * MAX_SEQ_LEN + position;
#endif
    return row * HEAD_DIM;
}
struct Work {
    float qkv[QKV_SIZE];
    float attention[Q_SIZE];
    float hidden[HIDDEN];
    float between[HIDDEN];
    float activated[INTERMEDIATE];
    float partial[KV_HEADS][MAX_SPLITS][SHARED_HEADS][HEAD_DIM];
    float maxima[KV_HEADS][MAX_SPLITS][SHARED_HEADS];
    float sums[KV_HEADS][MAX_SPLITS][SHARED_HEADS];
    Grid grid;  // zeros at first; each kernel leaves zeros again, except in `sequence`
    u32 heads[KV_HEADS];  // splits of each that have ended
};
static_assert(sizeof(Work) <= WORK_BYTES, "the buffer is too small");

struct Span {
    int head, split, num_splits;  // of a key head's cache; split ≥ num_splits: this block has no positions
    int first, last;              // cached positions
    bool has_new;                 // whether the new token's position belongs to the split
};

__device__ __forceinline__ Span span_of(int position) {
    const int length = position + 1;
    const int per_split = (length + MAX_SPLITS - 1) / MAX_SPLITS;
    const int width = (per_split + KV_BLOCK - 1) / KV_BLOCK * KV_BLOCK;
    Span span;
    span.head = blockIdx.x % KV_HEADS;
    span.split = blockIdx.x / KV_HEADS;
    span.num_splits = (length + width - 1) / width;
    span.first = span.split * width;
    span.last = min(span.first + width, position);
    span.has_new = span.first <= position && position < span.first + width;
    return span;
}

struct DenseProducer : Producer {
    // Earlier kernels wrote the cached positions, so there is nothing to wait for.
    __device__ __forceinline__ void cache(const Layer& layer, const Span& span, const int* table) {
        for (int first = span.first; first < span.last; first += KV_BLOCK) {
            const int count = min(KV_BLOCK, span.last - first);
            begin(2 * count * HEAD_DIM * 2);
            // Lanes 0 and 1 copy the positions in the first one's block, lanes 2 and 3 those in the next block.
            const int in_block = PAGE ? min(count, PAGE - first % (PAGE ? PAGE : 1)) : count;
            const int from = lane < 2 ? 0 : in_block, to = lane < 2 ? in_block : count;
            if (lane < (PAGE ? 4 : 2) && from < to) {
                const u16* cached = lane % 2 ? layer.values : layer.keys;
                const int at = (lane % 2 * KV_BLOCK + from) * HEAD_DIM * 2;
                copy(at, cached + cache_offset(table, span.head, first + from), (to - from) * HEAD_DIM * 2);
            }
            ring.advance();
        }
    }

    __device__ __forceinline__ void run(const Layer* layers, const u8* head, const int* table, int position) {
        const Span span = span_of(position);
        for (int i = 0; i < LAYERS; ++i) {
            const Layer& layer = layers[i];
            rows<HIDDEN * ELEMENT>(layer.qkv.weight, share_of(QKV_SIZE));
            if (span.split < span.num_splits) cache(layer, span, table);
            rows<Q_SIZE * ELEMENT>(layer.o.weight, share_of(HIDDEN));
            gate_up(layer.gate_up.weight, INTERMEDIATE, share_of(INTERMEDIATE));
            rows<INTERMEDIATE * ELEMENT>(layer.down.weight, share_of(HIDDEN));
        }
        rows<HIDDEN * 2>(head, share_of(VOCAB));
    }
};

struct DenseConsumer : Consumer {
    Work* work;
    const int* table;  // slot 0's blocks of the cache

    struct Attention {
        float q[SHARED_HEADS][HEAD_DIM];
        float new_k[HEAD_DIM], new_v[HEAD_DIM];
        float outputs[THREADS / HALF][SHARED_HEADS][HEAD_DIM];
        float scores[SHARED_HEADS][32];
        float maxima[SHARED_HEADS], sums[SHARED_HEADS], corrections[SHARED_HEADS];
        float weights[SHARED_HEADS][MAX_SPLITS];
        u32 is_last;
    };
    static_assert(sizeof(Attention) <= SCRATCH_BYTES, "scratch is too small");

    // One warp norms and rotates one head of the projection, and rounds it to the cache's dtype.
    __device__ __forceinline__ void rotate(float* target, const float* source, const u16* norm, const float* cos,
                                           const float* sin) const {
        constexpr int COUNT = (HALF + 31) / 32;
        float a[COUNT], b[COUNT], squares = 0.0f;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const int d = i * 32 + lane;
            a[i] = b[i] = 0.0f;
            if (d < HALF) {
                a[i] = await1(source + d, tag);
                b[i] = await1(source + d + HALF, tag);
            }
            squares += a[i] * a[i] + b[i] * b[i];
        }
        if (QK_NORM) squares = rsqrtf(warp_sum(squares) / HEAD_DIM + EPS);
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const int d = i * 32 + lane;
            if (d >= HALF) continue;
            if (QK_NORM) {
                a[i] *= squares * from_bf16(__ldg(norm + d));
                b[i] *= squares * from_bf16(__ldg(norm + d + HALF));
            }
            const float c = __ldg(cos + d), s = __ldg(sin + d);
            target[d] = rounded(a[i] * c - b[i] * s);
            target[d + HALF] = rounded(b[i] * c + a[i] * s);
        }
    }

    // Load q and the new token's k and v from the projection, write k and v to the cache, and start the softmax with the
    // new token's score.
    __device__ __forceinline__ void load_token(Attention& at, const Layer& layer, const Span& span, int position,
                                               const float* cos, const float* sin) {
        const int head = span.head;
        const i64 row = cache_offset(table, head, position);
        float v = 0.0f;  // loaded before the loop below waits for its loads
        if (span.has_new && thread < HEAD_DIM) v = await1(work->qkv + Q_SIZE + KV_SIZE + head * HEAD_DIM + thread, tag);
        for (int i = warp; i < SHARED_HEADS + span.has_new; i += WARPS) {
            if (i < SHARED_HEADS) {
                rotate(at.q[i], work->qkv + (head * SHARED_HEADS + i) * HEAD_DIM, layer.qk_norms, cos, sin);
            } else {
                const u16* norm = layer.qk_norms + HEAD_DIM;
                rotate(at.new_k, work->qkv + Q_SIZE + head * HEAD_DIM, norm, cos, sin);
                __syncwarp();
                for (int d = lane; d < HEAD_DIM; d += 32) layer.keys[row + d] = __float_as_uint(at.new_k[d]) >> 16;
            }
        }
        if (span.has_new && thread < HEAD_DIM) {
            at.new_v[thread] = rounded(v);
            layer.values[row + thread] = __float_as_uint(at.new_v[thread]) >> 16;
        }
        sync_consumers();
        for (int h = warp; h < SHARED_HEADS; h += WARPS) {
            float score = 0.0f;
            if (span.has_new)
                for (int d = lane; d < HEAD_DIM; d += 32) score += at.q[h][d] * at.new_k[d];
            score = warp_sum(score);
            if (lane == 0) {
                at.maxima[h] = span.has_new ? score * SCORE_SCALE : MASKED_SCORE;
                at.sums[h] = span.has_new ? 1.0f : 0.0f;
            }
        }
    }

    // The scores of up to KV_BLOCK positions, eight lanes a position.
    __device__ __forceinline__ void score(Attention& at, const u8* keys, int count) {
        constexpr int SEGMENTS = HEAD_DIM / 32;
        const int position = warp * 4 + lane / 8, part = lane % 8;
        float scores[SHARED_HEADS] = {};
        if (position < count) {
#pragma unroll
            for (int i = 0; i < SEGMENTS; ++i) {
                const int d = (i + position) % SEGMENTS * 32 + part * 4;  // neighbours read different banks
                const uint2 k = *(const uint2*)(keys + (position * HEAD_DIM + d) * 2);
#pragma unroll
                for (int h = 0; h < SHARED_HEADS; ++h) {
                    const float4 q = *(const float4*)&at.q[h][d];
                    scores[h] += q.x * from_bf16(k.x & 0xffff) + q.y * __uint_as_float(k.x & 0xffff0000) +
                                 q.z * from_bf16(k.y & 0xffff) + q.w * __uint_as_float(k.y & 0xffff0000);
                }
            }
        }
#pragma unroll
        for (int h = 0; h < SHARED_HEADS; ++h) {
#pragma unroll
            for (int i = 4; i; i /= 2) scores[h] += __shfl_xor_sync(~0u, scores[h], i);
            if (part == h % 8) at.scores[h][position] = position < count ? scores[h] * SCORE_SCALE : MASKED_SCORE;
        }
    }

    // One step of the online softmax: replace scores by weights, and update maxima and sums.
    __device__ __forceinline__ void update_softmax(Attention& at, int count) {
        for (int h = warp; h < SHARED_HEADS; h += WARPS) {
            const float score = at.scores[h][lane], before = at.maxima[h];
            const float largest = fmaxf(before, warp_max(score));
            const float weight = lane < count ? exp2f(score - largest) : 0.0f;
            const float sum = warp_sum(weight), correction = exp2f(before - largest);
            at.scores[h][lane] = weight;
            __syncwarp();
            if (lane == 0) {
                at.corrections[h] = correction;
                at.maxima[h] = largest;
                at.sums[h] = at.sums[h] * correction + sum;
            }
        }
    }

    __device__ __forceinline__ void attend(const Layer& layer, const Span& span, int position, const float* cos,
                                           const float* sin) {
        Attention& at = *(Attention*)scratch;
        constexpr int GROUPS = THREADS / HALF;  // groups of threads; each takes every GROUPS-th position
        const int d = thread % HALF * 2, group = thread / HALF;
        load_token(at, layer, span, position, cos, sin);
        float2 out[SHARED_HEADS];
#pragma unroll
        for (int h = 0; h < SHARED_HEADS; ++h) {
            const bool has_new = span.has_new && group == 0;
            out[h] = {has_new ? at.new_v[d] : 0.0f, has_new ? at.new_v[d + 1] : 0.0f};
        }
        for (int first = span.first; first < span.last; first += KV_BLOCK) {
            const int count = min(KV_BLOCK, span.last - first);
            wait(ring.full(), ring.parity);
            score(at, ring.stage(), count);
            sync_consumers();
            update_softmax(at, count);
            sync_consumers();
            const u8* values = ring.stage() + KV_BLOCK * HEAD_DIM * 2 + d * 2;
#pragma unroll
            for (int h = 0; h < SHARED_HEADS; ++h) {
                out[h].x *= at.corrections[h];
                out[h].y *= at.corrections[h];
            }
            for (int i = group; i < count; i += GROUPS) {
                const u32 v = *(const u32*)(values + i * HEAD_DIM * 2);
                const float low = from_bf16(v & 0xffff), high = __uint_as_float(v & 0xffff0000);
#pragma unroll
                for (int h = 0; h < SHARED_HEADS; ++h) {
                    out[h].x += at.scores[h][i] * low;
                    out[h].y += at.scores[h][i] * high;
                }
            }
            sync_consumers();
            if (lane == 0) arrive(ring.empty());
            ring.advance();
        }
#pragma unroll
        for (int h = 0; h < SHARED_HEADS; ++h) *(float2*)&at.outputs[group][h][d] = out[h];
        sync_consumers();
        const bool is_whole = span.num_splits == 1;
        for (int i = thread; i < SHARED_HEADS * HEAD_DIM; i += THREADS) {
            const int h = i / HEAD_DIM;
            float sum = 0.0f;
#pragma unroll
            for (int j = 0; j < GROUPS; ++j) sum += at.outputs[j][h][i % HEAD_DIM];
            if (is_whole) publish(work->attention + span.head * SHARED_HEADS * HEAD_DIM + i, sum / at.sums[h]);
            else (&work->partial[span.head][span.split][0][0])[i] = sum;
        }
        if (!is_whole) merge(at, span);
    }

    // Store this split's maximum and sum; the last block of a head to arrive merges its splits, in split order.
    __device__ __forceinline__ void merge(Attention& at, const Span& span) {
        if (thread < SHARED_HEADS) {
            work->maxima[span.head][span.split][thread] = at.maxima[thread];
            work->sums[span.head][span.split][thread] = at.sums[thread];
        }
        sync_consumers();
        if (thread == 0) {
            const u32 last = span.num_splits - 1;
            at.is_last = count_at(&work->heads[span.head], last) == last;
        }
        sync_consumers();
        if (!at.is_last) return;
        constexpr int PART = SHARED_HEADS * HEAD_DIM;
        const float* source = &work->partial[span.head][0][0][0];
        const int n = span.num_splits;
        float4 prefetched[PREFETCHED];  // loaded while the weights are computed
#pragma unroll
        for (int j = 0; j < PREFETCHED; ++j)
            if (j < n && thread * 4 < PART) prefetched[j] = look4(source + j * PART + thread * 4);
        for (int h = warp; h < SHARED_HEADS; h += WARPS) {
            constexpr int COUNT = (MAX_SPLITS + 31) / 32;
            float maxima[COUNT], sums[COUNT], largest = MASKED_SCORE, sum = 0.0f;
#pragma unroll
            for (int i = 0; i < COUNT; ++i) {
                const int split = i * 32 + lane;
                maxima[i] = split < n ? look1(&work->maxima[span.head][split][h]) : MASKED_SCORE;
                sums[i] = split < n ? look1(&work->sums[span.head][split][h]) : 0.0f;
                largest = fmaxf(largest, maxima[i]);
            }
            largest = warp_max(largest);
#pragma unroll
            for (int i = 0; i < COUNT; ++i) {
                maxima[i] = exp2f(maxima[i] - largest);
                sum += maxima[i] * sums[i];
            }
            sum = warp_sum(sum);
#pragma unroll
            for (int i = 0; i < COUNT; ++i)
                if (i * 32 + lane < n) at.weights[h][i * 32 + lane] = maxima[i] / sum;
        }
        sync_consumers();
        for (int i = thread * 4; i < PART; i += THREADS * 4) {
            const float* weights = at.weights[i / HEAD_DIM];
            const bool is_first = i == thread * 4;
            float4 sum = {};
#pragma unroll
            for (int j = 0; j < PREFETCHED; ++j)
                if (j < n) add(sum, weights[j], is_first ? prefetched[j] : look4(source + j * PART + i));
#pragma unroll 8
            for (int j = PREFETCHED; j < n; ++j) add(sum, weights[j], look4(source + j * PART + i));
            publish4(work->attention + span.head * PART + i, sum);
        }
    }

    static __device__ __forceinline__ void add(float4& sum, float weight, float4 v) {
        sum.x += weight * v.x;
        sum.y += weight * v.y;
        sum.z += weight * v.z;
        sum.w += weight * v.w;
    }

    // ---- the decoder

    __device__ __forceinline__ void run(const Layer* layers, const u16* embedding, const u16* last_norm,
                                        const float* cos, const float* sin, int position, i64 token, float* logits) {
        const Share own = share_of(HIDDEN);
        const Span span = span_of(position);
        const u16* embedded = embedding + token * HIDDEN;
        float residual = thread < own.count ? from_bf16(__ldg(embedded + own.first + thread)) : 0.0f;
        for (int index = 0; index < LAYERS; ++index) {
            const Layer& layer = layers[index];
            project_in<QKV_SIZE>(layer.attention_norm, layer.qkv, index ? nullptr : embedded, work->qkv, index, LAYERS);
            end(PROJECTED_IN);
            if (span.split < span.num_splits) {
                approach(PROJECTED_IN);
                attend(layer, span, position, cos + (i64)position * HALF, sin + (i64)position * HALF);
                sync_consumers();
            }
            end(VALUES_MADE);
            residual_gemv<Q_SIZE, false>(layer.o, work->attention, own, residual);
            mlp<INTERMEDIATE>(layer.mlp_norm, layer.gate_up, layer.down, work->activated, own, residual);
        }
        project_head<VOCAB>(last_norm, logits);
    }
};

extern "C" __global__ void __launch_bounds__(ALL_THREADS, 1)
    persistent_decode(const i64* ids, const i64* last_tokens, const i64* positions, const u16* embedding,
                      const u16* last_norm, const u8* head, const float* cos, const float* sin, const Layer* layers,
                      const int* table, Work* work, u64* const* peer_buffers, const u32* given_up, float* logits) {
    if (threadIdx.x == 0) init_ring();
    barriers_are_ready();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const i64 position = positions[0];
    if (position < 0) return;  // the row holds no token
    if (warp >= WARPS) {
        give_registers();
        if (warp > WARPS) return;
        DenseProducer{{{}, lane, read_once()}}.run(layers, head, table, (int)position);
        return;
    }
    take_registers();
    const i64 id = ids[0], token = id < 0 ? last_tokens[0] : id;
    const u32 sequence = look1(&work->grid.sequence);
    DenseConsumer consumer{{{}, &work->grid, work->hidden, work->between, peer_buffers, given_up,
                            (int)threadIdx.x, warp, lane, sequence},
                           work, table};
    consumer.run(layers, embedding, last_norm, cos, sin, (int)position, token, logits);
    consumer.leave();
}
