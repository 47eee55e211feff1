// One token of one sequence through the whole decoder: a single persistent kernel, one block for each multiprocessor.
//
// At batch 1 memory bandwidth is the limit, so the weights must be read without a pause. One warp of each block, the
// producer, copies the block's share of every matrix into a ring of stages in shared memory, in the order in which the
// other warps, the consumers, read it. Weights depend on nothing, so the producer runs ahead while the consumers wait
// for each other: they synchronise at a barrier over the grid after each of a layer's five phases:
//   qkv = norm(hidden) Wqkv | attention | hidden += attention Wo | activated = silu(gate) up |
//   hidden += activated Wdown
// A block multiplies whole rows of a matrix on tensor cores. A stage holds 2, 4 or 8 rows as they lie in memory, or a
// part of two rows. Two rows are operand A of m16n8k16: a lane's 16 bytes of the first belong to A's row lane / 4,
// those of the second to the row eight further down; the activations of the same columns are column lane / 4 of B. So the
// diagonals of the result are the dot products: each lane's bytes meet the activations of their own columns, however
// the bytes are distributed over the lanes.
//
// The kernel is compiled for one model: the names in capitals below are macros (persistent_decode.py).
//   HIDDEN INTERMEDIATE HEADS KV_HEADS HEAD_DIM VOCAB LAYERS MAX_SEQ_LEN   the decoder's shape
//   PAGE         0: a slot's cached positions lie side by side; else they are in blocks of so many, which a table names
//   FP8          1: the layers' matrices are E4M3 codes, with a scale for each row; 0: bfloat16
//   QK_NORM      1: the heads of q and k are normed
//   EPS          of the norms
//   SCORE_SCALE  factor of the attention scores, times log2(e)
//   BLOCKS       blocks of the grid
//   STAGES STAGE_BYTES KV_BLOCK SCRATCH_BYTES   layout of shared memory, see persistent_decode.py
//   IN_FLIGHT    maximum number of stages being copied at a time
//   RANK RANKS   tensor-parallel rank, and number of ranks
//
// With tensor parallelism each rank has its own heads and its own columns of the MLP, hence a partial sum of everything
// that is added to the residual stream, which every rank keeps whole. A thread sends its partial sum of an element to
// the same thread of the other ranks, through peer buffers that all ranks can write to, and adds theirs in rank order.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

constexpr int WARPS = 8;  // consumers
constexpr int THREADS = 32 * WARPS;
constexpr int GROUP = 512;      // bytes of a row that a warp multiplies at once
constexpr int MAX_ROWS = 256;   // of a matrix whose partial sums are kept at a time
constexpr int MAX_PAIRS = 160;  // rows of gate and of up, likewise
constexpr int MAX_SUMS = 2 * MAX_PAIRS;
constexpr int SHARED_HEADS = HEADS / KV_HEADS;  // query heads that share a key head
constexpr int HALF = HEAD_DIM / 2;
constexpr int Q_SIZE = HEADS * HEAD_DIM;
constexpr int KV_SIZE = KV_HEADS * HEAD_DIM;
constexpr int QKV_SIZE = Q_SIZE + 2 * KV_SIZE;
constexpr int MAX_SPLITS = BLOCKS / KV_HEADS;  // blocks that share a key head's cache
constexpr int ELEMENT = FP8 ? 1 : 2;           // bytes of a weight
constexpr int PREFETCHED = MAX_SPLITS < 4 ? MAX_SPLITS : 4;  // splits loaded early; more would spill
constexpr float E4M3_MAX = 448.0f;
constexpr float MIN_TOKEN_SCALE = 1.0f / 16384;
constexpr float MASKED_SCORE = -1e30f;  // a score of weight 0; −∞ is none, because −∞ − −∞ is NaN

static_assert(MAX_SUMS >= MAX_ROWS && MAX_PAIRS <= THREADS, "a thread sums one row, or a pair of rows");
static_assert(4 * KV_BLOCK * HEAD_DIM <= STAGE_BYTES, "a stage is too small");
static_assert(0 < IN_FLIGHT && IN_FLIGHT < STAGES, "a stage can't be waited for before its copy started");
static_assert(HEADS % KV_HEADS == 0 && SHARED_HEADS <= 16, "a warp does at most two heads");
static_assert(HEAD_DIM % 32 == 0 && HEAD_DIM <= THREADS && THREADS % HALF == 0, "threads share a head's width evenly");
static_assert(KV_BLOCK <= 32 && KV_HEADS <= BLOCKS, "four positions a warp, at least one block a key head");
static_assert(!PAGE || PAGE >= KV_BLOCK, "a stage's positions lie in two blocks of the cache at most");
static_assert(HIDDEN <= THREADS * BLOCKS, "a thread keeps one element of the residual stream");

struct Matrix {
    const u8* weight;    // [out, in]
    const float* scale;  // [out], of codes
    const float* bias;   // [out], or null
};

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

struct Sync {
    u32 arrived;  // arrivals at the grid's barriers
    u32 done;     // blocks that have finished
    u32 num_sums;   // sums over ranks by earlier kernels; equal on all ranks
    u32 heads[KV_HEADS];
};

struct Work {
    float qkv[QKV_SIZE];
    float attention[Q_SIZE];
    float hidden[HIDDEN];
    float activated[INTERMEDIATE];
    float partial[KV_HEADS][MAX_SPLITS][SHARED_HEADS][HEAD_DIM];
    float maxima[KV_HEADS][MAX_SPLITS][SHARED_HEADS];
    float sums[KV_HEADS][MAX_SPLITS][SHARED_HEADS];
    Sync sync;  // zeros at first; each kernel leaves zeros again, except in `num_sums`
};

// ---- instructions

__device__ __forceinline__ u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }

__device__ __forceinline__ void init_barrier(u64* barrier, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}

__device__ __forceinline__ void arrive(u64* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ void arrive_expecting(u64* barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void wait(u64* barrier, u32 parity) {
    asm volatile(
        "{\n .reg .pred p;\n"
        "again:\n mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n @!p bra again;\n}" ::"r"(
            shared_address(barrier)),
        "r"(parity)
        : "memory");
}

__device__ __forceinline__ void copy_bulk(void* target, const void* source, u32 bytes, u64* barrier, u64 policy) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
            "r"(shared_address(target)),
        "l"(source), "r"(bytes), "r"(shared_address(barrier)), "l"(policy)
        : "memory");
}

__device__ __forceinline__ void sync_consumers() { asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory"); }

// Loads that bypass L1: other blocks' results are in L2, and this block's L1 may hold stale data.
__device__ __forceinline__ float4 load4(const float* p) {
    float4 v;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "l"(p)
                 : "memory");
    return v;
}

__device__ __forceinline__ float load1(const float* p) {
    float v;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(p) : "memory");
    return v;
}

__device__ __forceinline__ u32 load1(const u32* p) {
    u32 v;
    asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}

// Store a value and the sequence number of its sum in another GPU's buffer with one 64-bit store: a reader that sees the
// sequence number has the value.
__device__ __forceinline__ void send(u64* word, float number, u32 sum) {
    asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(word), "l"((u64)sum << 32 | __float_as_uint(number))
                 : "memory");
}

// Wait for the value with this sequence number, or until given_up isn't 0.
__device__ __forceinline__ float receive(const u64* word, u32 sum, const u32* given_up) {
    u64 found;
    for (u32 tries = 1;; ++tries) {
        asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(found) : "l"(word) : "memory");
        if ((u32)(found >> 32) == sum || (tries % 4096 == 0 && *(const volatile u32*)given_up)) break;
    }
    return __uint_as_float((u32)found);
}

__device__ __forceinline__ float from_bf16(u32 bits) { return __uint_as_float(bits << 16); }

__device__ __forceinline__ u32 to_bf16x2(float low, float high) {
    u32 d;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}

__device__ __forceinline__ float rounded(float v) { return from_bf16(to_bf16x2(v, 0.0f) & 0xffff); }

__device__ __forceinline__ u32 codes_to_halves(u16 codes) {
    u32 d;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(d) : "h"(codes));
    return d;
}

// Round two numbers to E4M3, saturating at 448, and return the rounded values as halves.
__device__ __forceinline__ u32 to_coded_halves(float low, float high) {
    u16 codes;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
    return codes_to_halves(codes);
}

// c += A B. a0, a2: four elements of A's row lane / 4; a1, a3: of the row eight further down; b: of B's column
// lane / 4.
__device__ __forceinline__ void multiply_halves(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void multiply_codes(float (&c)[4], u32 low, u32 high, u32 b0, u32 b1) {
    multiply_halves(c, codes_to_halves(low), codes_to_halves(high), codes_to_halves(low >> 16),
                    codes_to_halves(high >> 16), b0, b1);
}

__device__ __forceinline__ void multiply_bf16(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int i = 16; i; i /= 2) v += __shfl_xor_sync(~0u, v, i);
    return v;
}

__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
    for (int i = 16; i; i /= 2) v = fmaxf(v, __shfl_xor_sync(~0u, v, i));
    return v;
}

// ---- shared by producer and consumers

// How rows of ROW_BYTES are laid out in stages.
template <int ROW_BYTES>
struct Tiling {
    static constexpr int ROWS = 8 * ROW_BYTES <= STAGE_BYTES ? 8 : 4 * ROW_BYTES <= STAGE_BYTES ? 4 : 2;
    static constexpr int GROUPS = (ROW_BYTES + GROUP - 1) / GROUP;
    static constexpr int MAX_GROUPS = STAGE_BYTES / (2 * GROUP);  // groups of a row, if two rows don't fit
    static constexpr int SPLITS = ROWS * ROW_BYTES <= STAGE_BYTES ? 1 : (GROUPS + MAX_GROUPS - 1) / MAX_GROUPS;
    static constexpr int PART = (GROUPS + SPLITS - 1) / SPLITS;
    static constexpr int STRIDE = SPLITS == 1 ? ROW_BYTES : PART * GROUP;  // bytes from one row to the next
    static_assert(ROW_BYTES % 16 == 0, "copied 16 bytes at a time");
};

struct Share {
    int first, count;
};

// This block's rows of `rows`.
__device__ __forceinline__ Share share_of(int rows) {
    const int first = (int)((i64)rows * blockIdx.x / BLOCKS);
    return {first, (int)((i64)rows * (blockIdx.x + 1) / BLOCKS) - first};
}

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

struct Ring {
    u8* stages;
    u64* full;
    u64* empty;
    int index = 0;
    u32 parity = 0;

    __device__ __forceinline__ u8* stage() const { return stages + index * STAGE_BYTES; }

    __device__ __forceinline__ void advance() {
        if (++index == STAGES) {
            index = 0;
            parity ^= 1;
        }
    }
};

// ---- the producer

struct Producer {
    Ring ring;
    int lane;
    u64 evict_first;  // L2 policy: weights are read once

    // Wait for a free stage, and expect so many bytes in it. Messages between blocks queue behind the copies in flight,
    // so no more copies are in flight than saturate memory, even if more stages are free.
    __device__ __forceinline__ void begin(u32 bytes) {
        if (lane == 0) {
            const bool is_same_lap = ring.index >= IN_FLIGHT;
            wait(&ring.full[ring.index - IN_FLIGHT + (is_same_lap ? 0 : STAGES)], ring.parity ^ !is_same_lap);
            wait(&ring.empty[ring.index], ring.parity ^ 1);
            arrive_expecting(&ring.full[ring.index], bytes);
        }
        __syncwarp();
    }

    template <int ROW_BYTES>
    __device__ __forceinline__ void stage(const u8* weight, int row, int rows) {
        using T = Tiling<ROW_BYTES>;
        const u8* source = weight + (i64)row * ROW_BYTES;
        if (T::SPLITS == 1) {
            begin(rows * ROW_BYTES);
            if (lane == 0) copy_bulk(ring.stage(), source, rows * ROW_BYTES, &ring.full[ring.index], evict_first);
            ring.advance();
            return;
        }
        for (int first = 0; first < ROW_BYTES; first += T::STRIDE) {
            const int bytes = min(T::STRIDE, ROW_BYTES - first);
            begin(rows * bytes);
            if (lane < rows)
                copy_bulk(ring.stage() + lane * T::STRIDE, source + (i64)lane * ROW_BYTES + first, bytes,
                          &ring.full[ring.index], evict_first);
            ring.advance();
        }
    }

    template <int ROW_BYTES>
    __device__ __forceinline__ void rows(const u8* weight, Share share) {
        constexpr int ROWS = Tiling<ROW_BYTES>::ROWS;
        for (int i = 0; i < share.count; i += ROWS)
            stage<ROW_BYTES>(weight, share.first + i, min(ROWS, share.count - i));
    }

    __device__ __forceinline__ void gate_up(const u8* weight, Share share) {
        constexpr int ROWS = Tiling<HIDDEN * ELEMENT>::ROWS;
        for (int i = 0; i < share.count; i += ROWS) {
            const int count = min(ROWS, share.count - i);
            stage<HIDDEN * ELEMENT>(weight, share.first + i, count);
            stage<HIDDEN * ELEMENT>(weight, INTERMEDIATE + share.first + i, count);
        }
    }

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
                u8* target = ring.stage() + (lane % 2 * KV_BLOCK + from) * HEAD_DIM * 2;
                copy_bulk(target, cached + cache_offset(table, span.head, first + from), (to - from) * HEAD_DIM * 2,
                          &ring.full[ring.index], evict_first);
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
            gate_up(layer.gate_up.weight, share_of(INTERMEDIATE));
            rows<INTERMEDIATE * ELEMENT>(layer.down.weight, share_of(HIDDEN));
        }
        rows<HIDDEN * 2>(head, share_of(VOCAB));
    }
};

// ---- the consumers

struct Affine {
    float scale = 1.0f, shift = 0.0f;
};

__device__ __forceinline__ Affine affine_of(const Matrix& matrix, int row, bool is_mine) {
    Affine affine;
    if (is_mine) {
        if (FP8) affine.scale = __ldg(matrix.scale + row);
        if (matrix.bias) affine.shift = __ldg(matrix.bias + row);
    }
    return affine;
}

struct Consumer {
    Ring ring;
    u8* scratch;    // the activations; during attention, an `Attention`
    float* parts;   // [WARPS, PRODUCTS]
    float* shared;  // [2, WARPS]
    Work* work;
    u64* const* peer_buffers;    // [RANKS], each [2, RANKS, HIDDEN]
    const u32* given_up;  // not 0: don't wait for other ranks
    const int* table;     // slot 0's blocks of the cache
    int thread, warp, lane;
    u32 num_sums;  // sums over ranks so far
    u32 barriers = 0;

    // ---- the grid's barrier

    __device__ __forceinline__ void arrive_at_grid() {
        sync_consumers();
        if (thread == 0) {
            asm volatile("fence.acq_rel.gpu;\n red.relaxed.gpu.global.add.u32 [%0], 1;" ::"l"(&work->sync.arrived)
                         : "memory");
        }
        ++barriers;
    }

    __device__ __forceinline__ void wait_for_grid() {
        if (thread == 0) {
            u32 arrived;
            do {
                asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
                             : "=r"(arrived)
                             : "l"(&work->sync.arrived)
                             : "memory");
            } while (arrived < barriers * BLOCKS);
        }
        sync_consumers();
    }

    // ---- the other ranks

    // The sum of all ranks' `part` of a row. Sums use the two halves of a buffer in turn: a rank writes to a half again
    // only after it received what the others sent to the other half, which they did after reading the first.
    __device__ __forceinline__ float sum_over_ranks(float part, int row) const {
        if (RANKS == 1) return part;
        const int half = num_sums % 2 * RANKS * HIDDEN + row;
#pragma unroll
        for (int rank = 0; rank < RANKS; ++rank)
            if (rank != RANK) send(peer_buffers[rank] + half + RANK * HIDDEN, part, num_sums);
        float sum = 0.0f;
#pragma unroll
        for (int rank = 0; rank < RANKS; ++rank)
            sum += rank == RANK ? part : receive(peer_buffers[RANK] + half + rank * HIDDEN, num_sums, given_up);
        return sum;
    }

    // ---- activations

    // Sum and maximum over all consumers.
    __device__ __forceinline__ void reduce(float& sum, float& largest) {
        sum = warp_sum(sum);
        largest = warp_max(largest);
        if (lane == 0) {
            shared[warp] = sum;
            shared[WARPS + warp] = largest;
        }
        sync_consumers();
        sum = 0.0f;
        largest = 0.0f;
#pragma unroll
        for (int i = 0; i < WARPS; ++i) {
            sum += shared[i];
            largest = fmaxf(largest, shared[WARPS + i]);
        }
    }

    // A vector of K numbers, four at a time a thread.
    template <int K>
    struct Vector {
        static constexpr int COUNT = (K + 4 * THREADS - 1) / (4 * THREADS);
        float4 values[COUNT];
    };

    template <int K>
    static __device__ __forceinline__ bool holds(int thread, int i) {
        return (i + 1) * 4 * THREADS <= K || (i * THREADS + thread) * 4 < K;
    }

    template <int K>
    __device__ __forceinline__ void read(Vector<K>& x, const float* source) const {
#pragma unroll
        for (int i = 0; i < Vector<K>::COUNT; ++i)
            if (holds<K>(thread, i)) x.values[i] = load4(source + (i * THREADS + thread) * 4);
    }

    template <int K>
    __device__ __forceinline__ void read_bf16(Vector<K>& x, const u16* source) const {
#pragma unroll
        for (int i = 0; i < Vector<K>::COUNT; ++i) {
            if (!holds<K>(thread, i)) continue;
            const uint2 v = __ldg((const uint2*)source + i * THREADS + thread);
            x.values[i] = {from_bf16(v.x & 0xffff), from_bf16(v.x >> 16), from_bf16(v.y & 0xffff),
                           from_bf16(v.y >> 16)};
        }
    }

    template <int K>
    __device__ __forceinline__ void times(Vector<K>& x, const Vector<K>& y, float& squares) const {
#pragma unroll
        for (int i = 0; i < Vector<K>::COUNT; ++i) {
            if (!holds<K>(thread, i)) continue;
            float4& v = x.values[i];
            squares += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
            v = {v.x * y.values[i].x, v.y * y.values[i].y, v.z * y.values[i].z, v.w * y.values[i].w};
        }
    }

    template <int K>
    __device__ __forceinline__ float largest_of(const Vector<K>& x) const {
        float largest = 0.0f;
#pragma unroll
        for (int i = 0; i < Vector<K>::COUNT; ++i) {
            if (!holds<K>(thread, i)) continue;
            const float4 v = x.values[i];
            largest = fmaxf(largest, fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w))));
        }
        return largest;
    }

    // Store x · factor in `scratch` as operand B: E4M3 codes as halves, or bfloat16 and the rounding error beside it.
    template <int K, bool CODES>
    __device__ __forceinline__ void store_operand(const Vector<K>& x, float factor) {
#pragma unroll
        for (int i = 0; i < Vector<K>::COUNT; ++i) {
            if (!holds<K>(thread, i)) continue;
            const float4 v = {x.values[i].x * factor, x.values[i].y * factor, x.values[i].z * factor,
                              x.values[i].w * factor};
            const int element = (i * THREADS + thread) * 4;
            if (CODES) {  // halves for the first eight of sixteen codes; K bytes further on those for the others
                uint2* target = (uint2*)(scratch + element % 16 / 8 * K + element / 16 * 16 + element % 8 * 2);
                *target = {to_coded_halves(v.x, v.y), to_coded_halves(v.z, v.w)};
            } else {
                const uint2 high = {to_bf16x2(v.x, v.y), to_bf16x2(v.z, v.w)};
                *(uint2*)(scratch + 2 * element) = high;
                *(uint2*)(scratch + 2 * K + 2 * element) = {
                    to_bf16x2(v.x - from_bf16(high.x & 0xffff), v.y - from_bf16(high.x >> 16)),
                    to_bf16x2(v.z - from_bf16(high.y & 0xffff), v.w - from_bf16(high.y >> 16))};
            }
        }
        sync_consumers();
    }

    static __device__ __forceinline__ float token_scale(float largest) {
        return fmaxf(largest / E4M3_MAX, MIN_TOKEN_SCALE);
    }

    // Norm x and store it as operand B; returns the token's scale. norm: the norm's weights.
    template <bool CODES>
    __device__ __forceinline__ float store_normed(Vector<HIDDEN>& x, const Vector<HIDDEN>& norm) {
        float squares = 0.0f;
        times<HIDDEN>(x, norm, squares);
        float largest = CODES ? largest_of<HIDDEN>(x) : 0.0f;
        reduce(squares, largest);
        const float inverse = rsqrtf(squares / HIDDEN + EPS);
        const float scale = CODES ? token_scale(largest * inverse) : 1.0f;
        store_operand<HIDDEN, CODES>(x, inverse * (1.0f / scale));
        return scale;
    }

    template <int K>
    __device__ __forceinline__ float store_scaled(const float* source) {
        Vector<K> x;
        read<K>(x, source);
        float scale = 1.0f;
        if (FP8) {
            float unused = 0.0f, largest = largest_of<K>(x);
            reduce(unused, largest);
            scale = token_scale(largest);
        }
        store_operand<K, FP8>(x, 1.0f / scale);
        return scale;
    }

    // ---- matrix products

    // A lane's share of the dot products of two rows: its elements of the diagonals.
    struct Pair {
        float low, high;
    };

    // This warp's share of the dot products of the next stage's rows: each pair of rows has a team of warps.
    template <int K, bool CODES>
    __device__ __forceinline__ Pair multiply() {
        using T = Tiling<CODES ? K : 2 * K>;
        constexpr int PAIRS = T::ROWS / 2, TEAM = WARPS / PAIRS, ROW_BYTES = CODES ? K : 2 * K;
        const int pair = warp / TEAM, member = warp % TEAM;
        float acc[4][4] = {};
#pragma unroll
        for (int split = 0; split < T::SPLITS; ++split) {
            const int first = split * T::PART;
            wait(&ring.full[ring.index], ring.parity);
            const u8* weights = ring.stage() + pair * T::STRIDE + lane * 16;
            const u8* x = scratch + first * GROUP + lane * 16;
#pragma unroll
            for (int i = 0; i < (T::PART + TEAM - 1) / TEAM; ++i) {
                const int at = (i * TEAM + member) * GROUP;
                const int bytes = min(T::PART * GROUP, ROW_BYTES - first * GROUP);  // of a row in this stage
                if ((i + 1) * TEAM * GROUP > bytes && at >= bytes) break;
                uint4 w = {}, v = {}, x0 = {}, x1 = {};
                if (ROW_BYTES % GROUP == 0 || at + lane * 16 < bytes) {
                    w = *(const uint4*)(weights + at);
                    v = *(const uint4*)(weights + PAIRS * T::STRIDE + at);
                    x0 = *(const uint4*)(x + at);
                    x1 = *(const uint4*)(x + (CODES ? K : 2 * K) + at);
                }
                if (CODES) {
                    multiply_codes(acc[0], w.x, v.x, x0.x, x0.y);
                    multiply_codes(acc[1], w.y, v.y, x0.z, x0.w);
                    multiply_codes(acc[2], w.z, v.z, x1.x, x1.y);
                    multiply_codes(acc[3], w.w, v.w, x1.z, x1.w);
                } else {
                    multiply_bf16(acc[0], w.x, v.x, w.y, v.y, x0.x, x0.y);
                    multiply_bf16(acc[1], w.z, v.z, w.w, v.w, x0.z, x0.w);
                    multiply_bf16(acc[2], w.x, v.x, w.y, v.y, x1.x, x1.y);
                    multiply_bf16(acc[3], w.z, v.z, w.w, v.w, x1.z, x1.w);
                }
            }
            __syncwarp();
            if (lane == 0) arrive(&ring.empty[ring.index]);
            ring.advance();
        }
        const bool is_odd = lane / 4 % 2, is_diagonal = lane % 4 == lane / 8;
        float low = 0.0f, high = 0.0f;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            low += is_odd ? acc[i][1] : acc[i][0];
            high += is_odd ? acc[i][3] : acc[i][2];
        }
        return {is_diagonal ? low : 0.0f, is_diagonal ? high : 0.0f};
    }

    // Sum up the lanes' shares of two pairs into parts[…][first …] and parts[…][second …]. Each shuffle halves the
    // number of sums a lane works on: half of the lanes go on with one sum, half with the other.
    template <int PAIRS>
    __device__ __forceinline__ void store_sums(Pair a, Pair b, int first, int second) {
        const int pair = warp / (WARPS / PAIRS), member = warp % (WARPS / PAIRS);
        const bool is_second = lane & 16, is_high = lane & 8;
        float low = is_second ? b.low : a.low, high = is_second ? b.high : a.high;
        low += __shfl_xor_sync(~0u, is_second ? a.low : b.low, 16);
        high += __shfl_xor_sync(~0u, is_second ? a.high : b.high, 16);
        float sum = is_high ? high : low;
        sum += __shfl_xor_sync(~0u, is_high ? low : high, 8);
#pragma unroll
        for (int i = 4; i; i /= 2) sum += __shfl_xor_sync(~0u, sum, i);
        if (lane % 8 == 0)
            parts[member * MAX_SUMS + (is_second ? second : first) + pair + (is_high ? PAIRS : 0)] = sum;
    }

    template <int PAIRS>
    __device__ __forceinline__ void store_sums(Pair a, int first) {
        const int pair = warp / (WARPS / PAIRS), member = warp % (WARPS / PAIRS);
        const bool is_high = lane & 16;
        float sum = is_high ? a.high : a.low;
        sum += __shfl_xor_sync(~0u, is_high ? a.low : a.high, 16);
#pragma unroll
        for (int i = 8; i; i /= 2) sum += __shfl_xor_sync(~0u, sum, i);
        if (lane % 16 == 0) parts[member * MAX_SUMS + first + pair + (is_high ? PAIRS : 0)] = sum;
    }

    template <int K, bool CODES>
    __device__ __forceinline__ void multiply_rows(int count) {
        constexpr int ROWS = Tiling<CODES ? K : 2 * K>::ROWS;
        for (int i = 0; i < count; i += ROWS) store_sums<ROWS / 2>(multiply<K, CODES>(), i);
        sync_consumers();
    }

    template <int K, bool CODES>
    __device__ __forceinline__ float dot_product(int column) const {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < WARPS / (Tiling<CODES ? K : 2 * K>::ROWS / 2); ++i) sum += parts[i * MAX_SUMS + column];
        return sum;
    }

    // ---- attention

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
                a[i] = load1(source + d);
                b[i] = load1(source + d + HALF);
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
        if (span.has_new && thread < HEAD_DIM) v = load1(work->qkv + Q_SIZE + KV_SIZE + head * HEAD_DIM + thread);
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
            wait(&ring.full[ring.index], ring.parity);
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
            if (lane == 0) arrive(&ring.empty[ring.index]);
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
            if (is_whole) work->attention[span.head * SHARED_HEADS * HEAD_DIM + i] = sum / at.sums[h];
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
            u32 before;
            asm volatile("fence.acq_rel.gpu;\n atom.relaxed.gpu.global.add.u32 %0, [%1], 1;\n fence.acq_rel.gpu;"
                         : "=r"(before)
                         : "l"(&work->sync.heads[span.head])
                         : "memory");
            at.is_last = before == span.num_splits - 1;
            if (at.is_last) work->sync.heads[span.head] = 0;
        }
        sync_consumers();
        if (!at.is_last) return;
        constexpr int PART = SHARED_HEADS * HEAD_DIM;
        const float* source = &work->partial[span.head][0][0][0];
        const int n = span.num_splits;
        float4 prefetched[PREFETCHED];  // loaded while the weights are computed
#pragma unroll
        for (int j = 0; j < PREFETCHED; ++j)
            if (j < n && thread * 4 < PART) prefetched[j] = load4(source + j * PART + thread * 4);
        for (int h = warp; h < SHARED_HEADS; h += WARPS) {
            constexpr int COUNT = (MAX_SPLITS + 31) / 32;
            float maxima[COUNT], sums[COUNT], largest = MASKED_SCORE, sum = 0.0f;
#pragma unroll
            for (int i = 0; i < COUNT; ++i) {
                const int split = i * 32 + lane;
                maxima[i] = split < n ? load1(&work->maxima[span.head][split][h]) : MASKED_SCORE;
                sums[i] = split < n ? load1(&work->sums[span.head][split][h]) : 0.0f;
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
                if (j < n) add(sum, weights[j], is_first ? prefetched[j] : load4(source + j * PART + i));
#pragma unroll 8
            for (int j = PREFETCHED; j < n; ++j) add(sum, weights[j], load4(source + j * PART + i));
            *(float4*)(work->attention + span.head * PART + i) = sum;
        }
    }

    static __device__ __forceinline__ void add(float4& sum, float weight, float4 v) {
        sum.x += weight * v.x;
        sum.y += weight * v.y;
        sum.z += weight * v.z;
        sum.w += weight * v.w;
    }

    // ---- the decoder

    // One phase: residual stream += source · matrix. residual: this thread's element; work->hidden has all elements.
    template <int K>
    __device__ __forceinline__ void residual_gemv(const Matrix& matrix, const float* source, Share hidden,
                                                float& residual) {
        const bool is_mine = thread < hidden.count;
        const Affine affine = affine_of(matrix, hidden.first + thread, is_mine);
        ++num_sums;
        wait_for_grid();
        const float scale = store_scaled<K>(source);
        multiply_rows<K, FP8>(hidden.count);
        if (is_mine) {
            const float part = dot_product<K, FP8>(thread) * (affine.scale * scale);
            residual += sum_over_ranks(part, hidden.first + thread) + affine.shift;
            work->hidden[hidden.first + thread] = residual;
        }
        arrive_at_grid();
    }

    __device__ __forceinline__ void run(const Layer* layers, const u16* embedding, const u16* last_norm,
                                        const float* cos, const float* sin, int position, i64 token, float* logits) {
        const Share qkv = share_of(QKV_SIZE), hidden = share_of(HIDDEN), pairs = share_of(INTERMEDIATE);
        const Span span = span_of(position);
        const u16* embedded = embedding + token * HIDDEN;
        // This thread's element of the residual stream; work->hidden has a copy for the other threads.
        float residual = thread < hidden.count ? from_bf16(__ldg(embedded + hidden.first + thread)) : 0.0f;
        for (int index = 0; index < LAYERS; ++index) {
            const Layer& layer = layers[index];
            {
                Affine affine = affine_of(layer.qkv, qkv.first + thread, thread < qkv.count);
                Vector<HIDDEN> norm, x;
                read_bf16<HIDDEN>(norm, layer.attention_norm);
                if (index == 0) {
                    read_bf16<HIDDEN>(x, embedded);
                } else {
                    wait_for_grid();
                    read<HIDDEN>(x, work->hidden);
                }
                const float scale = store_normed<FP8>(x, norm);
                for (int first = 0; first < qkv.count; first += MAX_ROWS) {
                    const int count = min(MAX_ROWS, qkv.count - first);
                    if (first) affine = affine_of(layer.qkv, qkv.first + first + thread, thread < count);
                    multiply_rows<HIDDEN, FP8>(count);
                    if (thread < count)
                        work->qkv[qkv.first + first + thread] =
                            dot_product<HIDDEN, FP8>(thread) * (affine.scale * scale) + affine.shift;
                    if (first + MAX_ROWS < qkv.count) sync_consumers();
                }
                arrive_at_grid();
            }
            if (span.split < span.num_splits) {
                wait_for_grid();
                attend(layer, span, position, cos + (i64)position * HALF, sin + (i64)position * HALF);
            }
            arrive_at_grid();
            residual_gemv<Q_SIZE>(layer.o, work->attention, hidden, residual);
            {
                Affine gate = affine_of(layer.gate_up, pairs.first + thread, thread < pairs.count);
                Affine up = affine_of(layer.gate_up, INTERMEDIATE + pairs.first + thread, thread < pairs.count);
                Vector<HIDDEN> norm, x;
                read_bf16<HIDDEN>(norm, layer.mlp_norm);
                wait_for_grid();
                read<HIDDEN>(x, work->hidden);
                const float scale = store_normed<FP8>(x, norm);
                for (int first = 0; first < pairs.count; first += MAX_PAIRS) {
                    const int count = min(MAX_PAIRS, pairs.count - first), row = pairs.first + first + thread;
                    if (first) {
                        gate = affine_of(layer.gate_up, row, thread < count);
                        up = affine_of(layer.gate_up, INTERMEDIATE + row, thread < count);
                    }
                    constexpr int ROWS = Tiling<HIDDEN * ELEMENT>::ROWS;
                    for (int i = 0; i < count; i += ROWS) {
                        const Pair a = multiply<HIDDEN, FP8>(), b = multiply<HIDDEN, FP8>();
                        store_sums<ROWS / 2>(a, b, i, MAX_PAIRS + i);
                    }
                    sync_consumers();
                    if (thread < count) {
                        const float g = dot_product<HIDDEN, FP8>(thread) * (gate.scale * scale) + gate.shift;
                        const float u = dot_product<HIDDEN, FP8>(MAX_PAIRS + thread) * (up.scale * scale) + up.shift;
                        work->activated[row] = g / (1.0f + __expf(-g)) * u;
                    }
                    if (first + MAX_PAIRS < pairs.count) sync_consumers();
                }
                arrive_at_grid();
            }
            residual_gemv<INTERMEDIATE>(layer.down, work->activated, hidden, residual);
        }
        Vector<HIDDEN> norm, x;
        read_bf16<HIDDEN>(norm, last_norm);
        wait_for_grid();
        read<HIDDEN>(x, work->hidden);
        store_normed<false>(x, norm);
        const Share vocab = share_of(VOCAB);
        for (int first = 0; first < vocab.count; first += MAX_ROWS) {
            const int count = min(MAX_ROWS, vocab.count - first);
            multiply_rows<HIDDEN, false>(count);
            if (thread < count) logits[vocab.first + first + thread] = dot_product<HIDDEN, false>(thread);
            sync_consumers();
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS + 32, 1)
    persistent_decode(const i64* ids, const i64* last_tokens, const i64* positions, const u16* embedding,
                      const u16* last_norm, const u8* head, const float* cos, const float* sin, const Layer* layers,
                      const int* table, Work* work, u64* const* peer_buffers, const u32* given_up, float* logits) {
    extern __shared__ __align__(128) u8 memory[];
    u8* scratch = memory + STAGES * STAGE_BYTES;
    float* parts = (float*)(scratch + SCRATCH_BYTES);
    float* shared = parts + WARPS * MAX_SUMS;
    Ring ring;
    ring.stages = memory;
    ring.full = (u64*)(shared + 2 * WARPS);
    ring.empty = ring.full + STAGES;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            init_barrier(&ring.full[i], 1);
            init_barrier(&ring.empty[i], WARPS);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    const i64 position = positions[0];
    if (position < 0) return;  // the row holds no token
    if (warp == WARPS) {
        u64 evict_first;
        asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(evict_first));
        Producer{ring, lane, evict_first}.run(layers, head, table, (int)position);
        return;
    }
    const i64 id = ids[0], token = id < 0 ? last_tokens[0] : id;
    const u32 num_sums = RANKS > 1 ? load1(&work->sync.num_sums) : 0;
    Consumer consumer{ring, scratch, parts, shared, work, peer_buffers,
                      given_up, table, (int)threadIdx.x, warp, lane, num_sums};
    consumer.run(layers, embedding, last_norm, cos, sin, (int)position, token, logits);
    if (threadIdx.x == 0) {  // the last block resets the barrier for the next kernel
        u32 before;
        asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(&work->sync.done) : "memory");
        if (before == BLOCKS - 1) {
            work->sync.arrived = 0;
            work->sync.done = 0;
            work->sync.num_sums += 2 * LAYERS;
        }
    }
}
