// What the persistent kernels have in common: one block for each multiprocessor runs a whole step.
//
// At batch 1 memory bandwidth is the limit, so the weights must be read without a pause. One warp of each block, the
// producer, copies the block's share of every matrix into a ring of stages in shared memory, in the order in which the
// other warps, the consumers, read it. Weights depend on nothing, so the producer runs ahead while the consumers wait
// for each other at barriers over the grid.
// A block multiplies whole rows of a matrix on tensor cores. A stage holds 2, 4 or 8 rows as they lie in memory, or a
// part of two rows. Two rows are operand A of m16n8k16: a lane's 16 bytes of the first belong to A's row lane / 4,
// those of the second to the row eight further down; the activations of the same columns are column lane / 4 of B. So the
// diagonals of the result are the dot products: each lane's bytes meet the activations of their own columns, however
// the bytes are distributed over the lanes.
//
// instructions.cu comes before this text, a family's source after it. All are compiled for one model: the names in capitals
// below are macros.
//   HIDDEN       width of the residual stream
//   FP8          1: the layers' matrices are E4M3 codes, with a scale for each row; 0: bfloat16
//   EPS          of the norms
//   BLOCKS       blocks of the grid
//   STAGES STAGE_BYTES SCRATCH_BYTES BOARD_BYTES   layout of shared memory, see persistent/memory.py
//   IN_FLIGHT    maximum number of stages being copied at a time
//   RANK RANKS   tensor-parallel rank, and number of ranks
//   WORK_BYTES   at least a family's Work
//
// With tensor parallelism each rank has its own heads and its own columns of the MLP, hence a partial sum of everything
// that is added to the residual stream, which every rank keeps whole. A thread sends its partial sum of an element to
// the same thread of the other ranks, through peer buffers that all ranks can write to, and adds theirs in rank order.

constexpr int THREADS = 32 * WARPS;
constexpr int ALL_THREADS = THREADS + 128;  // with the producer's warpgroup, of which one warp works
constexpr int GROUP = 512;      // bytes of a row that a warp multiplies at once
constexpr int MAX_ROWS = 256;   // of a matrix whose partial sums are kept at a time
constexpr int MAX_PAIRS = 160;  // rows of gate and of up, likewise
constexpr int MAX_SUMS = 2 * MAX_PAIRS;
constexpr int ELEMENT = FP8 ? 1 : 2;           // bytes of a weight
constexpr float E4M3_MAX = 448.0f;
constexpr float MIN_TOKEN_SCALE = 1.0f / 16384;
constexpr float MASKED_SCORE = -1e30f;  // a score of weight 0; −∞ is none, because −∞ − −∞ is NaN

static_assert(MAX_SUMS >= MAX_ROWS && MAX_PAIRS <= THREADS, "a thread sums one row, or a pair of rows");
static_assert(0 < IN_FLIGHT && IN_FLIGHT < STAGES, "a stage can't be waited for before its copy started");
static_assert(HIDDEN <= THREADS * BLOCKS, "a thread keeps one element of the residual stream");

struct Matrix {
    const u8* weight;    // [out, in]
    const float* scale;  // [out], of codes
    const float* bias;   // [out], or null
};

__device__ __forceinline__ float from_bf16(u32 bits) { return __uint_as_float(bits << 16); }

__device__ __forceinline__ float rounded(float v) { return from_bf16(to_bf16x2(v, 0.0f) & 0xffff); }

__device__ __forceinline__ void multiply_codes(float (&c)[4], u32 low, u32 high, u32 b0, u32 b1) {
    multiply_halves(c, codes_to_halves(low), codes_to_halves(high), codes_to_halves(low >> 16),
                    codes_to_halves(high >> 16), b0, b1);
}

__device__ __forceinline__ float silu(float v) { return v / (1.0f + __expf(-v)); }

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

// Barriers over the grid count arrivals in turn, because a block that has no work in a phase arrives ahead of others: its
// next arrival may not be taken for another block's. It may arrive at COUNTERS barriers in a row without waiting (latent.cu
// does), but not at one more: phases that a block may skip, one after the other, have at most so many arrivals.
constexpr int COUNTERS = 4;

struct Grid {
    u32 arrived[COUNTERS];
    u32 done;      // blocks that have ended
    u32 sequence;  // of numbers that earlier kernels sent; equal on all ranks
};

struct Share {
    int first, count;
};

// This block's rows of `rows`.
__device__ __forceinline__ Share share_of(int rows) {
    const int first = (int)((i64)rows * blockIdx.x / BLOCKS);
    return {first, (int)((i64)rows * (blockIdx.x + 1) / BLOCKS) - first};
}

// In shared memory: the ring's stages, the activations, partial sums, what threads tell each other, barriers.
constexpr int SCRATCH_AT = STAGES * STAGE_BYTES, PARTS_AT = SCRATCH_AT + SCRATCH_BYTES;
constexpr int SHARED_AT = PARTS_AT + 4 * WARPS * MAX_SUMS, FULL_AT = SHARED_AT + 8 * WARPS;
constexpr int EMPTY_AT = FULL_AT + 8 * STAGES, BOARD_AT = EMPTY_AT + 8 * STAGES;

struct Ring {
    int index = 0;
    u32 parity = 0;

    __device__ __forceinline__ u8* stage() const { return memory + index * STAGE_BYTES; }
    __device__ __forceinline__ u64* full() const { return full(index); }
    __device__ __forceinline__ u64* empty() const { return empty(index); }
    static __device__ __forceinline__ u64* full(int i) { return (u64*)(memory + FULL_AT) + i; }
    static __device__ __forceinline__ u64* empty(int i) { return (u64*)(memory + EMPTY_AT) + i; }

    __device__ __forceinline__ void advance() {
        if (++index == STAGES) {
            index = 0;
            parity ^= 1;
        }
    }
};

// To be called by thread 0, before barriers_are_ready.
__device__ __forceinline__ void init_ring() {
    for (int i = 0; i < STAGES; ++i) {
        init_barrier(Ring::full(i), 1);
        init_barrier(Ring::empty(i), WARPS);
    }
}

__device__ __forceinline__ void barriers_are_ready() {
    if (threadIdx.x == 0) publish_barriers();
    __syncthreads();
}

// ---- the producer

struct Producer {
    Ring ring;
    int lane;
    u64 policy;  // of L2: weights are read once

    // Wait for a free stage, and expect so many bytes in it. Messages between blocks queue behind the copies in flight,
    // so no more copies are in flight than saturate memory, even if more stages are free.
    __device__ __forceinline__ void begin(u32 bytes) {
        if (lane == 0) {
            const bool is_same_lap = ring.index >= IN_FLIGHT;
            wait(Ring::full(ring.index - IN_FLIGHT + (is_same_lap ? 0 : STAGES)), ring.parity ^ !is_same_lap);
            wait(ring.empty(), ring.parity ^ 1);
            arrive_expecting(ring.full(), bytes);
        }
        __syncwarp();
    }

    // A lane copies to the stage that was begun.
    __device__ __forceinline__ void copy(int at, const void* source, u32 bytes) {
        copy_bulk(ring.stage() + at, source, bytes, ring.full(), policy);
    }

    // Copy `bytes` at `source`, so many of them to each stage.
    __device__ __forceinline__ void copy_pieces(const u8* source, int bytes, int piece) {
#pragma unroll 1
        for (; bytes > 0; bytes -= piece, source += piece) {
            const u32 count = min(bytes, piece);
            begin(count);
            if (lane == 0) copy(0, source, count);
            ring.advance();
        }
    }

    // Copy `bytes` of each of so many rows to one stage. pitch: from one row to the next; stride: likewise in the stage.
    __device__ __forceinline__ void copy_rows(const u8* source, int rows, int pitch, int bytes, int stride) {
        begin(rows * bytes);
#pragma unroll 1
        for (int i = lane; i < rows; i += 32) copy(i * stride, source + (i64)i * pitch, bytes);
        ring.advance();
    }

    template <int ROW_BYTES>
    __device__ __forceinline__ void rows(const u8* weight, Share share) {
        using T = Tiling<ROW_BYTES>;
        const u8* source = weight + (i64)share.first * ROW_BYTES;
        if (T::SPLITS == 1) {
            copy_pieces(source, share.count * ROW_BYTES, T::ROWS * ROW_BYTES);
            return;
        }
        for (int i = 0; i < share.count; i += T::ROWS)
            for (int first = 0; first < ROW_BYTES; first += T::STRIDE)
                copy_rows(source + (i64)i * ROW_BYTES + first, min(T::ROWS, share.count - i), ROW_BYTES,
                          min(T::STRIDE, ROW_BYTES - first), T::STRIDE);
    }

    // Rows of gate and of up in turn: `inner` rows of gate, then as many of up.
    __device__ __forceinline__ void gate_up(const u8* weight, int inner, Share share) {
        constexpr int ROWS = Tiling<HIDDEN * ELEMENT>::ROWS;
#pragma unroll 1
        for (int i = 0; i < share.count; i += ROWS)
            for (int part = 0; part < 2; ++part)
                rows<HIDDEN * ELEMENT>(weight, {part * inner + share.first + i, min(ROWS, share.count - i)});
    }
};

// ---- the consumers

// A lane's 16 bytes of each of its warp's groups: of two rows, or of operand B, whose two halves lie apart.
template <int K, bool CODES>
struct Groups {
    static constexpr int ROW_BYTES = CODES ? K : 2 * K;
    using T = Tiling<ROW_BYTES>;
    static constexpr int PAIRS = T::ROWS / 2, TEAM = WARPS / PAIRS;  // each pair of rows has a team of warps
    static constexpr int COUNT = (T::PART + TEAM - 1) / TEAM;
    uint4 first[COUNT], second[COUNT];

    // bytes: of a row that there are, whole groups or until the row's end
    __device__ __forceinline__ void load(const u8* one, const u8* other, int bytes, int member, int lane) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const int at = (i * TEAM + member) * GROUP + lane * 16;
            const bool is_there = (T::SPLITS == 1 && ROW_BYTES % (TEAM * GROUP) == 0) || at < bytes;
            first[i] = is_there ? *(const uint4*)(one + at) : uint4{};
            second[i] = is_there ? *(const uint4*)(other + at) : uint4{};
        }
    }
};

template <bool CODES>
__device__ __forceinline__ void multiply_group(float (&sums)[4][4], uint4 w, uint4 v, uint4 x0, uint4 x1) {
    if (CODES) {
        multiply_codes(sums[0], w.x, v.x, x0.x, x0.y);
        multiply_codes(sums[1], w.y, v.y, x0.z, x0.w);
        multiply_codes(sums[2], w.z, v.z, x1.x, x1.y);
        multiply_codes(sums[3], w.w, v.w, x1.z, x1.w);
    } else {
        multiply_bf16(sums[0], w.x, v.x, w.y, v.y, x0.x, x0.y);
        multiply_bf16(sums[1], w.z, v.z, w.w, v.w, x0.z, x0.w);
        multiply_bf16(sums[2], w.x, v.x, w.y, v.y, x1.x, x1.y);
        multiply_bf16(sums[3], w.z, v.z, w.w, v.w, x1.z, x1.w);
    }
}

constexpr int TOGETHER = 4;  // stages whose sums are reduced together

template <int WIDTH>
__device__ __forceinline__ void halve(float (&sums)[2 * TOGETHER], int lane) {
    const bool is_upper = lane & (WIDTH * 4);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
        const float sent = is_upper ? sums[i] : sums[i + WIDTH], kept = is_upper ? sums[i + WIDTH] : sums[i];
        sums[i] = kept + __shfl_xor_sync(~0u, sent, WIDTH * 4);
    }
}

// Sum shares of stages up over the lanes: lane / 4 of a warp has the sum with this number. Each shuffle halves the
// number of sums a lane works on: half of the lanes go on with some, half with the others.
__device__ __forceinline__ float sum_together(float (&sums)[2 * TOGETHER], int lane) {
    halve<TOGETHER>(sums, lane);
    halve<TOGETHER / 2>(sums, lane);
    halve<TOGETHER / 4>(sums, lane);
    float sum = sums[0];
    sum += __shfl_xor_sync(~0u, sum, 2);
    return sum + __shfl_xor_sync(~0u, sum, 1);
}

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
    Grid* grid;
    float* hidden;  // [HIDDEN], the residual stream, of which the first threads keep an element each
    u64* const* peer_buffers;  // [RANKS], each [2, RANKS, HIDDEN]
    const u32* given_up;       // not 0: don't wait for other ranks
    int thread, warp, lane;
    u32 num_sums;  // sums over ranks so far
    u32 barriers = 0;
    u8* const scratch = memory + SCRATCH_AT;             // the activations
    float* const parts = (float*)(memory + PARTS_AT);    // [WARPS, MAX_SUMS]
    float* const shared = (float*)(memory + SHARED_AT);  // [2, WARPS]

    // ---- the grid's barrier

    __device__ __forceinline__ void arrive_at_grid() {
        sync_consumers();
        if (thread == 0) arrive_at(&grid->arrived[barriers % COUNTERS]);
        ++barriers;
    }

    // Wait until every block has arrived as often as this one.
    __device__ __forceinline__ void wait_for_grid() {
        if (thread == 0) {
            const u32 last = barriers - 1;
            wait_for_count(&grid->arrived[last % COUNTERS], (last / COUNTERS + 1) * BLOCKS);
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

    // Store x · factor in `scratch` as operand B.
    template <int K, bool CODES>
    __device__ __forceinline__ void store_operand(const Vector<K>& x, float factor) {
        static_assert(K * (CODES ? 2 : 4) <= SCRATCH_BYTES, "scratch is too small");
#pragma unroll
        for (int i = 0; i < Vector<K>::COUNT; ++i)
            if (holds<K>(thread, i)) store_four<K, CODES>(scratch, (i * THREADS + thread) * 4, x.values[i], factor);
        sync_consumers();
    }

    // Store x · factor as four elements of operand B: E4M3 codes as halves, or bfloat16 and the rounding error beside it.
    template <int K, bool CODES>
    static __device__ __forceinline__ void store_four(u8* operand, int element, float4 x, float factor) {
        const float4 v = {x.x * factor, x.y * factor, x.z * factor, x.w * factor};
        if (CODES) {  // halves for the first eight of sixteen codes; K bytes further on those for the others
            uint2* target = (uint2*)(operand + element % 16 / 8 * K + element / 16 * 16 + element % 8 * 2);
            *target = {to_coded_halves(v.x, v.y), to_coded_halves(v.z, v.w)};
        } else {
            const uint2 high = {to_bf16x2(v.x, v.y), to_bf16x2(v.z, v.w)};
            *(uint2*)(operand + 2 * element) = high;
            *(uint2*)(operand + 2 * K + 2 * element) = {
                to_bf16x2(v.x - from_bf16(high.x & 0xffff), v.y - from_bf16(high.x >> 16)),
                to_bf16x2(v.z - from_bf16(high.y & 0xffff), v.w - from_bf16(high.y >> 16))};
        }
    }

    static __device__ __forceinline__ float token_scale(float largest) {
        return fmaxf(largest / E4M3_MAX, MIN_TOKEN_SCALE);
    }

    // Multiply x by the norm's weights; returns what is left to multiply it by, and the token's scale.
    template <bool CODES>
    __device__ __forceinline__ float2 normed(Vector<HIDDEN>& x, const Vector<HIDDEN>& norm) {
        float squares = 0.0f;
        times<HIDDEN>(x, norm, squares);
        float largest = CODES ? largest_of<HIDDEN>(x) : 0.0f;
        reduce(squares, largest);
        const float inverse = rsqrtf(squares / HIDDEN + EPS);
        return {inverse, CODES ? token_scale(largest * inverse) : 1.0f};
    }

    // Norm x and store it as operand B; returns the token's scale. norm: the norm's weights.
    template <bool CODES>
    __device__ __forceinline__ float store_normed(Vector<HIDDEN>& x, const Vector<HIDDEN>& norm) {
        const auto [inverse, scale] = normed<CODES>(x, norm);
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

    // The producer may fill the stage again.
    __device__ __forceinline__ void release_stage() {
        __syncwarp();
        if (lane == 0) arrive(ring.empty());
        ring.advance();
    }

    // Multiply the rows of the next `count` stages (of rows in several stages: sets of them) with operands.
    // operand: where the first operand begins in the activations, in bytes; the others follow it. each: stages for one.
    // The partial sums of each team's members lie in [WARPS, MAX_SUMS], those of a stage's rows behind those of the stage
    // before it. GATED: stages hold rows of gate and of up in turn; the sums of gate begin at 0, those of up at MAX_PAIRS.
    template <int K, bool CODES, bool GATED>
    __device__ __forceinline__ void multiply(int count, int operand, int each) {
        using G = Groups<K, CODES>;
        using T = typename G::T;
        constexpr int PAIRS = G::PAIRS, TEAM = G::TEAM, ROW_BYTES = G::ROW_BYTES;
        const int pair = warp / TEAM, member = warp % TEAM;
        const bool is_odd = lane / 4 % 2, is_diagonal = lane % 4 == lane / 8;
        const u8* from = scratch + operand;
        float* sums_of_team = parts + member * MAX_SUMS + pair + (lane / 4 % 2 ? PAIRS : 0);
        G x;
        int left = 0;
#pragma unroll 1
        for (int first = 0; first < count; first += TOGETHER) {
            float shares[2 * TOGETHER] = {};
#pragma unroll
            for (int i = 0; i < TOGETHER; ++i) {
                if (first + i >= count) break;
                if (left == 0) {
                    if (T::SPLITS == 1) x.load(from, from + ROW_BYTES, ROW_BYTES, member, lane);
                    from += 2 * ROW_BYTES;
                    left = each;
                }
                --left;
                float sums[4][4] = {};
#pragma unroll
                for (int split = 0; split < T::SPLITS; ++split) {
                    const int bytes = min(T::PART * GROUP, ROW_BYTES - split * T::PART * GROUP);
                    if (T::SPLITS > 1) {
                        const u8* columns = from - 2 * ROW_BYTES + split * T::PART * GROUP;
                        x.load(columns, columns + ROW_BYTES, bytes, member, lane);
                    }
                    wait(ring.full(), ring.parity);
                    const u8* weights = ring.stage() + pair * T::STRIDE;
                    G rows;
                    rows.load(weights, weights + PAIRS * T::STRIDE, bytes, member, lane);
#pragma unroll
                    for (int j = 0; j < G::COUNT; ++j)
                        multiply_group<CODES>(sums, rows.first[j], rows.second[j], x.first[j], x.second[j]);
                    release_stage();
                }
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    shares[2 * i] += is_odd ? sums[j][1] : sums[j][0];
                    shares[2 * i + 1] += is_odd ? sums[j][3] : sums[j][2];
                }
            }
#pragma unroll
            for (int i = 0; i < 2 * TOGETHER; ++i) shares[i] = is_diagonal ? shares[i] : 0.0f;
            const float sum = sum_together(shares, lane);
            const int of = first + lane / 8, to = GATED ? of / 2 * T::ROWS + of % 2 * MAX_PAIRS : of * T::ROWS;
            if (lane % 4 == 0 && of < count) sums_of_team[to] = sum;
        }
    }

    // Multiply `count` rows with the operand in `scratch`.
    template <int K, bool CODES>
    __device__ __forceinline__ void multiply_rows(int count) {
        constexpr int ROWS = Tiling<CODES ? K : 2 * K>::ROWS;
        const int stages = (count + ROWS - 1) / ROWS;
        multiply<K, CODES, false>(stages, 0, stages);
        sync_consumers();
    }

    // Multiply rows of gate and of up, ROWS of each in turn: the sums of gate begin at 0, those of up at MAX_PAIRS.
    __device__ __forceinline__ void multiply_gate_up(int stages) {
        multiply<HIDDEN, FP8, true>(stages, 0, stages);
        sync_consumers();
    }

    template <int K, bool CODES>
    __device__ __forceinline__ float dot_product(int row) const {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < Groups<K, CODES>::TEAM; ++i) sum += parts[i * MAX_SUMS + row];
        return sum;
    }

    // ---- parts of a decoder

    // One phase: residual stream += source · matrix. residual: this thread's element.
    template <int K>
    __device__ __forceinline__ void residual_gemv(const Matrix& matrix, const float* source, Share own, float& residual) {
        const bool is_mine = thread < own.count;
        const Affine affine = affine_of(matrix, own.first + thread, is_mine);
        ++num_sums;
        wait_for_grid();
        const float scale = store_scaled<K>(source);
        multiply_rows<K, FP8>(own.count);
        if (is_mine) {
            const float part = dot_product<K, FP8>(thread) * (affine.scale * scale);
            residual += sum_over_ranks(part, own.first + thread) + affine.shift;
            hidden[own.first + thread] = residual;
        }
        arrive_at_grid();
    }

    // A layer's first phase: out [ROWS] = norm(residual stream) · matrix. embedded: of the first layer, the token's embedding,
    // which is the residual stream; of the others null.
    template <int ROWS>
    __device__ __forceinline__ void project_in(const u16* norm_weights, const Matrix& matrix, const u16* embedded,
                                               float* out) {
        const Share own = share_of(ROWS);
        Affine affine = affine_of(matrix, own.first + thread, thread < own.count);
        Vector<HIDDEN> norm, x;
        read_bf16<HIDDEN>(norm, norm_weights);
        if (embedded) {
            read_bf16<HIDDEN>(x, embedded);
        } else {
            wait_for_grid();
            read<HIDDEN>(x, hidden);
        }
        const float scale = store_normed<FP8>(x, norm);
        for (int first = 0; first < own.count; first += MAX_ROWS) {
            const int count = min(MAX_ROWS, own.count - first);
            if (first) affine = affine_of(matrix, own.first + first + thread, thread < count);
            multiply_rows<HIDDEN, FP8>(count);
            if (thread < count)
                out[own.first + first + thread] =
                    dot_product<HIDDEN, FP8>(thread) * (affine.scale * scale) + affine.shift;
            if (first + MAX_ROWS < own.count) sync_consumers();
        }
        arrive_at_grid();
    }

    // Two phases: residual stream += an MLP of INNER of it. activated: [INNER].
    template <int INNER>
    __device__ __forceinline__ void mlp(const u16* norm_weights, const Matrix& gate_up, const Matrix& down,
                                        float* activated, Share own, float& residual) {
        const Share pairs = share_of(INNER);
        Affine gate = affine_of(gate_up, pairs.first + thread, thread < pairs.count);
        Affine up = affine_of(gate_up, INNER + pairs.first + thread, thread < pairs.count);
        Vector<HIDDEN> norm, x;
        read_bf16<HIDDEN>(norm, norm_weights);
        wait_for_grid();
        read<HIDDEN>(x, hidden);
        const float scale = store_normed<FP8>(x, norm);
        for (int first = 0; first < pairs.count; first += MAX_PAIRS) {
            const int count = min(MAX_PAIRS, pairs.count - first), row = pairs.first + first + thread;
            if (first) {
                gate = affine_of(gate_up, row, thread < count);
                up = affine_of(gate_up, INNER + row, thread < count);
            }
            constexpr int ROWS = Tiling<HIDDEN * ELEMENT>::ROWS;
            multiply_gate_up(2 * ((count + ROWS - 1) / ROWS));
            if (thread < count) {
                const float g = dot_product<HIDDEN, FP8>(thread) * (gate.scale * scale) + gate.shift;
                const float u = dot_product<HIDDEN, FP8>(MAX_PAIRS + thread) * (up.scale * scale) + up.shift;
                activated[row] = silu(g) * u;
            }
            if (first + MAX_PAIRS < pairs.count) sync_consumers();
        }
        arrive_at_grid();
        residual_gemv<INNER>(down, activated, own, residual);
    }

    // The last phase: logits [VOCAB] = norm(residual stream) · head, in bfloat16.
    template <int VOCAB_SIZE>
    __device__ __forceinline__ void project_head(const u16* norm_weights, float* logits) {
        Vector<HIDDEN> norm, x;
        read_bf16<HIDDEN>(norm, norm_weights);
        wait_for_grid();
        read<HIDDEN>(x, hidden);
        store_normed<false>(x, norm);
        const Share vocab = share_of(VOCAB_SIZE);
        for (int first = 0; first < vocab.count; first += MAX_ROWS) {
            const int count = min(MAX_ROWS, vocab.count - first);
            multiply_rows<HIDDEN, false>(count);
            if (thread < count) logits[vocab.first + first + thread] = dot_product<HIDDEN, false>(thread);
            sync_consumers();
        }
    }

    // The last block to end resets the barriers for the next kernel. sent: numbers of this kernel's sequence.
    __device__ __forceinline__ void leave(u32 sent) {
        if (thread) return;
        if (count_at(&grid->done) != BLOCKS - 1) return;
        for (int i = 0; i < COUNTERS; ++i) grid->arrived[i] = 0;
        grid->done = 0;
        grid->sequence += sent;
    }
};
