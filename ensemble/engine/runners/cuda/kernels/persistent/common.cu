// What the persistent kernels have in common: one block for each multiprocessor runs a whole step.
//
// At batch 1 memory bandwidth is the limit, so the weights must be read without a pause. One warp of each block, the
// producer, copies the block's share of every matrix into a ring of stages in shared memory, in the order in which the
// other warps, the consumers, read it. Weights depend on nothing, so the producer runs ahead while the consumers wait
// for what other blocks compute.
//
// Blocks have no barrier. A number that others read carries the tag of its layer in its two lowest bits, and who needs it
// loads it until it has this tag: one trip, where a barrier takes four (a store, its acknowledgement, a count, a load).
// Looking costs bandwidth, so blocks count those that have published, and wait for the count before they look.
// A number may be written again in the next layer: all that depends on every block's part of the residual stream, and a block
// writes its part only after it read all that it needs of the layer before.
//
// A block multiplies whole rows of a matrix on tensor cores. A stage holds 2, 4 or 8 rows as they lie in memory, or a
// part of two rows. To a warpgroup's product they are tiles of eight times 16 bytes that lie side by side, so a tile is 128
// bytes of one row, and the same bytes of the activations are a tile of the other operand: of a tile's result the diagonal
// counts, and its sum is the dot product. See Tiles.
// Rows that are no whole tiles are multiplied by single warps: two rows are operand A of m16n8k16, a lane's 16 bytes of the
// first belong to A's row lane / 4, those of the second to the row eight further down; the activations of the same columns are
// column lane / 4 of B. Again the diagonals of the result are the dot products.
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
constexpr int LAST_BLOCKS = 8;  // so many may be missing when a block begins to look for their numbers
constexpr int MAX_GROUPS = 16;  // of heads
constexpr int ELEMENT = FP8 ? 1 : 2;           // bytes of a weight
constexpr float E4M3_MAX = 448.0f;
constexpr float MIN_TOKEN_SCALE = 1.0f / 16384;
constexpr float MASKED_SCORE = -1e30f;  // a score of weight 0; −∞ is none, because −∞ − −∞ is NaN

static_assert(MAX_SUMS >= MAX_ROWS && MAX_PAIRS <= THREADS, "a thread sums one row, or a pair of rows");
// A warpgroup may wait for a stage whose place has the other's before: that one must have been copied, because barriers
// tell laps of the ring apart only by being odd or even.
static_assert(0 < IN_FLIGHT && IN_FLIGHT + 3 <= STAGES, "too many copies at a time");
static_assert(BLOCKS <= HIDDEN && HIDDEN <= THREADS * BLOCKS, "a block has a part of the residual stream, a thread an element");

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

// Of numbers that aren't negative: their bits have the numbers' order.
__device__ __forceinline__ float warp_max_magnitude(float v) {
    return __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(v)));
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

// How rows of K elements are a product's tiles, and their activations operand B, in shared memory.
// Fewer than eight rows of a stage are so many parts that they are eight; each part of the activations has columns of its
// own. bfloat16 activations are two vectors: rounded, and the rounding errors.
template <int K, bool CODES>
struct Tiles {
    static constexpr int ROW_BYTES = CODES ? K : 2 * K;
    static constexpr int ROWS = Tiling<ROW_BYTES>::ROWS, PARTS = 8 / ROWS, PART = ROW_BYTES / PARTS;
    static constexpr bool FIT = Tiling<ROW_BYTES>::SPLITS == 1 && ROWS >= 4 && ROW_BYTES % (128 * PARTS) == 0;
    static constexpr int STEPS = (PART + 255) / 256;  // products; each takes two tiles of a part
    static constexpr int PITCH = STEPS * 256;         // of a part of the activations, with zeros for a tile that isn't there
    static constexpr int VECTOR_BYTES = FIT ? PARTS * PITCH : 2 * K;
    static constexpr int OPERAND_BYTES = CODES ? VECTOR_BYTES : 2 * VECTOR_BYTES;
    static constexpr int COLUMNS = 8 * PARTS * (CODES ? 1 : 2);

    // Where the activation that belongs to a row's byte lies.
    static __device__ __forceinline__ int offset(int byte) {
        return PARTS == 1 ? byte : byte / PART * PITCH + byte % PART;
    }
};

// What blocks wait for.
enum Phase { PROJECTED_IN, VALUES_MADE, BETWEEN, ACTIVATED, LAYER_DONE, PHASES };

struct alignas(128) Counter {
    u32 count;  // of this kernel's layers so far
};

struct Grid {
    Counter ended[PHASES];         // blocks that have ended a phase
    Counter absorbed[MAX_GROUPS];  // of latent.cu's groups of heads: parts of their queries that are there
    Counter attended[MAX_GROUPS];  // likewise: blocks that have attended
    u32 done;                      // blocks that have ended
    u32 sequence;                  // kernels so far, modulo SEQUENCES; equal on all ranks
};

struct Share {
    int first, count;
};

// This block's rows of `rows`.
__device__ __forceinline__ Share share_of(int rows) {
    const u32 first = (u32)rows * blockIdx.x / BLOCKS;  // rows of a matrix times blocks are less than 2³²
    return {(int)first, (int)((u32)rows * (blockIdx.x + 1) / BLOCKS - first)};
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

    // By less than a lap.
    __device__ __forceinline__ void advance(int count = 1) {
        index += count;
        if (index < STAGES) return;
        index -= STAGES;
        parity ^= 1;
    }

    __device__ __forceinline__ void advance_far(int count) {
#pragma unroll 1
        for (index += count; index >= STAGES; index -= STAGES) parity ^= 1;
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
    int limit = IN_FLIGHT;  // stages that are being copied at a time, at most

    // Wait for a free stage, and expect so many bytes in it. Numbers of other blocks queue behind the copies in flight,
    // so no more copies are in flight than saturate memory, even if more stages are free.
    __device__ __forceinline__ void begin(u32 bytes) {
        if (lane == 0) {
            const bool is_same_lap = ring.index >= limit;
            wait(Ring::full(ring.index - limit + (is_same_lap ? 0 : STAGES)), ring.parity ^ !is_same_lap);
            wait(ring.empty(), ring.parity ^ 1);
            arrive_expecting(ring.full(), bytes);
        }
        __syncwarp();
    }

    // A lane copies to the stage that was begun.
    __device__ __forceinline__ void copy(int at, const void* source, u32 bytes) {
        copy_bulk(ring.stage() + at, source, bytes, ring.full(), policy);
    }

    // Bytes that lie side by side, and how many of them a stage gets.
    struct Run {
        const u8* source;
        int bytes, piece;
    };

    __device__ __forceinline__ void copy_run(Run run) {
#pragma unroll 1
        for (; run.bytes > 0; run.bytes -= run.piece, run.source += run.piece) {
            const u32 count = min(run.bytes, run.piece);
            begin(count);
            if (lane == 0) copy(0, run.source, count);
            ring.advance();
        }
    }

    // Rows of which a stage holds several.
    template <int ROW_BYTES>
    static __device__ __forceinline__ Run run_of(const u8* weight, Share share) {
        using T = Tiling<ROW_BYTES>;
        static_assert(T::SPLITS == 1, "a stage is too small for two rows");
        return {weight + (i64)share.first * ROW_BYTES, share.count * ROW_BYTES, T::ROWS * ROW_BYTES};
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
        if constexpr (T::SPLITS == 1) {
            copy_run(run_of<ROW_BYTES>(weight, share));
        } else {
            const u8* source = weight + (i64)share.first * ROW_BYTES;
            for (int i = 0; i < share.count; i += T::ROWS)
                for (int first = 0; first < ROW_BYTES; first += T::STRIDE)
                    copy_rows(source + (i64)i * ROW_BYTES + first, min(T::ROWS, share.count - i), ROW_BYTES,
                              min(T::STRIDE, ROW_BYTES - first), T::STRIDE);
        }
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

// ---- numbers of other blocks

// Tags are 1, 2 and 3 in turn, each number's in the order in which it is written; 0 is none. So a reader can't take what was
// written before for what it waits for, if the number is written every time: count only the layers that write it.
constexpr u32 TAG_BITS = 3;
constexpr u32 SEQUENCES = 3 << 20;  // a multiple of the tags: they go on in turn when kernels are counted from 0 again

__device__ __forceinline__ u32 tag_of(u32 times) { return 1 + times % 3; }

__device__ __forceinline__ bool differs(float v, u32 tag) { return (__float_as_uint(v) ^ tag) & TAG_BITS; }

__device__ __forceinline__ float with_tag(float v, u32 tag) { return __uint_as_float((__float_as_uint(v) & ~TAG_BITS) | tag); }

__device__ __forceinline__ float without_tag(float v) { return with_tag(v, 0); }

__device__ __forceinline__ bool differ(float4 v, u32 tag) {
    const u32 bits = (__float_as_uint(v.x) ^ tag) | (__float_as_uint(v.y) ^ tag) | (__float_as_uint(v.z) ^ tag) |
                     (__float_as_uint(v.w) ^ tag);
    return bits & TAG_BITS;
}

__device__ __forceinline__ float4 without_tags(float4 v) {
    return {without_tag(v.x), without_tag(v.y), without_tag(v.z), without_tag(v.w)};
}

// v: what was found there before.
__device__ __forceinline__ float await1(float v, const float* p, u32 tag) {
    while (differs(v, tag)) {
        pause();
        v = look1(p);
    }
    return without_tag(v);
}

__device__ __forceinline__ float await1(const float* p, u32 tag) { return await1(look1(p), p, tag); }

__device__ __forceinline__ float4 await4(const float* p, u32 tag) {
    float4 v = look4(p);
    while (differ(v, tag)) {
        pause();
        v = look4(p);
    }
    return without_tags(v);
}

// Two halves have a bit of the tag each.
constexpr u32 HALVES_TAG_BITS = 0x00010001;

__device__ __forceinline__ u32 tag_of_halves(u32 tag) { return (tag & 1) | (tag & 2) << 15; }

__device__ __forceinline__ bool halves_differ(uint4 v, u32 tag) {
    return ((v.x ^ tag) | (v.y ^ tag) | (v.z ^ tag) | (v.w ^ tag)) & HALVES_TAG_BITS;
}

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
    float* hidden;   // [HIDDEN], the residual stream after a layer, of which the first threads keep an element each
    float* between;  // [HIDDEN], the residual stream after its attention
    u64* const* peer_buffers;  // [RANKS], each [2, RANKS, HIDDEN]
    const u32* given_up;       // not 0: don't wait for other ranks
    int thread, warp, lane;
    u32 sequence;         // kernels so far
    u32 layers = 0;       // of this kernel so far
    u32 tag = 0, mlp_tag = 0;  // of the layer's numbers, and of those that only layers with such an MLP write
    u32 activations = 0;  // of this kernel so far: times that blocks ended the phase
    u8* const scratch = memory + SCRATCH_AT;             // the activations
    float* const parts = (float*)(memory + PARTS_AT);    // [8 * MAX_SUMS], of dot products
    float* const shared = (float*)(memory + SHARED_AT);  // [2, WARPS]

    // ---- the other blocks

    // To be called before a layer's first number is published. mlp, mlps: layers of this kernel with such an MLP, before this
    // one and altogether.
    __device__ __forceinline__ void begin_layer(u32 mlp, u32 mlps) {
        tag = tag_of(sequence * LAYERS + layers);
        mlp_tag = tag_of(sequence * mlps + mlp);
        ++layers;
    }

    __device__ __forceinline__ void publish(float* p, float v) const { post(p, with_tag(v, tag)); }
    __device__ __forceinline__ void publish4(float* p, float4 v) const {
        publish(p, v.x);
        publish(p + 1, v.y);
        publish(p + 2, v.z);
        publish(p + 3, v.w);
    }
    __device__ __forceinline__ void publish_mlp(float* p, float v) const { post(p, with_tag(v, mlp_tag)); }

    // Threads that look all the time keep others from publishing, and weights from coming: so blocks count those that have
    // published, and look when nearly all have. The count is a hint; tags tell what is there.
    __device__ __forceinline__ void end(Phase phase) const {
        if (thread == 0) count(&grid->ended[phase].count);
    }

    // Wait until all but some of so many have counted.
    __device__ __forceinline__ void approach(const Counter& counter, u32 all, u32 last) const {
        if (thread == 0)
            while (look1(&counter.count) + last < all) pause();
        sync_consumers();
    }

    __device__ __forceinline__ void approach(Phase phase, u32 times) const {
        approach(grid->ended[phase], times * BLOCKS, LAST_BLOCKS);
    }

    __device__ __forceinline__ void approach(Phase phase) const { approach(phase, layers); }

    // ---- the other ranks

    // The sum of all ranks' `part` of a row; number: the sum's. Sums use the two halves of a buffer in turn: a rank writes to a
    // half again only after it received what the others sent to the other half, which they did after reading the first.
    __device__ __forceinline__ float sum_over_ranks(float part, int row, u32 number) const {
        if (RANKS == 1) return part;
        const int half = number % 2 * RANKS * HIDDEN + row;
#pragma unroll
        for (int rank = 0; rank < RANKS; ++rank)
            if (rank != RANK) send(peer_buffers[rank] + half + RANK * HIDDEN, part, number);
        float sum = 0.0f;
#pragma unroll
        for (int rank = 0; rank < RANKS; ++rank)
            sum += rank == RANK ? part : receive(peer_buffers[RANK] + half + rank * HIDDEN, number, given_up);
        return sum;
    }

    // ---- activations

    // Over all consumers: the sum of `one` (ADDS) or its maximum, and the maximum of `other`. Maxima are of numbers that aren't
    // negative.
    template <bool ADDS>
    __device__ __forceinline__ void reduce(float& one, float& other) {
        one = ADDS ? warp_sum(one) : warp_max_magnitude(one);
        other = warp_max_magnitude(other);
        if (lane == 0) {
            shared[warp] = one;
            shared[WARPS + warp] = other;
        }
        sync_consumers();
        one = other = 0.0f;
#pragma unroll
        for (int i = 0; i < WARPS; i += 4) {
            const float4 v = *(const float4*)(shared + i), w = *(const float4*)(shared + WARPS + i);
            one = ADDS ? one + ((v.x + v.y) + (v.z + v.w)) : fmaxf(one, fmaxf(fmaxf(v.x, v.y), fmaxf(v.z, v.w)));
            other = fmaxf(other, fmaxf(fmaxf(w.x, w.y), fmaxf(w.z, w.w)));
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
    __device__ __forceinline__ void look(Vector<K>& x, const float* source) const {
#pragma unroll
        for (int i = 0; i < Vector<K>::COUNT; ++i)
            if (holds<K>(thread, i)) x.values[i] = look4(source + (i * THREADS + thread) * 4);
    }

    // x: what was found there before. Go on looking until all is there.
    template <int K>
    __device__ __forceinline__ void await(Vector<K>& x, const float* source, u32 tag) const {
        for (;;) {
            bool is_missing = false;
#pragma unroll
            for (int i = 0; i < Vector<K>::COUNT; ++i)
                if (holds<K>(thread, i)) is_missing |= differ(x.values[i], tag);
            if (!is_missing) break;
            pause();
            look<K>(x, source);
        }
#pragma unroll
        for (int i = 0; i < Vector<K>::COUNT; ++i)
            if (holds<K>(thread, i)) x.values[i] = without_tags(x.values[i]);
    }

    template <int K>
    __device__ __forceinline__ void fetch(Vector<K>& x, const float* source, u32 tag) const {
        look<K>(x, source);
        await<K>(x, source, tag);
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

    // Store x · factor as operand B, `at` bytes behind the beginning of `scratch`.
    template <int K, bool CODES>
    __device__ __forceinline__ void store_operand(const Vector<K>& x, float factor, int at = 0) {
        static_assert(Tiles<K, CODES>::OPERAND_BYTES <= SCRATCH_BYTES, "scratch is too small");
#pragma unroll
        for (int i = 0; i < Vector<K>::COUNT; ++i)
            if (holds<K>(thread, i)) store_four<K, CODES>(scratch + at, (i * THREADS + thread) * 4, x.values[i], factor);
        store_zeros<K, CODES>(scratch + at, thread);
    }

    // To be called after an operand was stored.
    __device__ __forceinline__ void operand_is_there() {
        fence_copies();
        sync_consumers();
    }

    // Store x · factor as four elements of operand B: as E4M3 codes, which single warps want as halves, or in bfloat16 with
    // the rounding error beside it.
    template <int K, bool CODES>
    static __device__ __forceinline__ void store_four(u8* operand, int element, float4 x, float factor) {
        using T = Tiles<K, CODES>;
        const float4 v = {x.x * factor, x.y * factor, x.z * factor, x.w * factor};
        if (CODES) {
            const u16 low = to_codes(v.x, v.y), high = to_codes(v.z, v.w);
            if (T::FIT) {
                *(u32*)(operand + T::offset(element)) = low | (u32)high << 16;
            } else {  // the first eight of sixteen codes; K bytes further on the others
                uint2* target = (uint2*)(operand + element % 16 / 8 * K + element / 16 * 16 + element % 8 * 2);
                *target = {codes_to_halves(low), codes_to_halves(high)};
            }
        } else {
            u8* target = operand + (T::FIT ? T::offset(2 * element) : 2 * element);
            const uint2 high = {to_bf16x2(v.x, v.y), to_bf16x2(v.z, v.w)};
            *(uint2*)target = high;
            *(uint2*)(target + T::VECTOR_BYTES) = {
                to_bf16x2(v.x - from_bf16(high.x & 0xffff), v.y - from_bf16(high.x >> 16)),
                to_bf16x2(v.z - from_bf16(high.y & 0xffff), v.w - from_bf16(high.y >> 16))};
        }
    }

    // The tiles of an operand that aren't there. index: of a thread, of at least 32.
    template <int K, bool CODES>
    static __device__ __forceinline__ void store_zeros(u8* operand, int index) {
        using T = Tiles<K, CODES>;
        static_assert(!T::FIT || T::COLUMNS <= 32, "a thread stores 16 bytes");
        if (T::FIT && T::PITCH > T::PART && index < T::COLUMNS)
            *(uint4*)(operand + index / 8 * T::PITCH + T::PART + index % 8 * 16) = {};
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
        reduce<true>(squares, largest);
        const float inverse = rsqrtf(squares / HIDDEN + EPS);
        return {inverse, CODES ? token_scale(largest * inverse) : 1.0f};
    }

    // Norm x and store it as operand B; returns the token's scale. norm: the norm's weights.
    template <bool CODES>
    __device__ __forceinline__ float store_normed(Vector<HIDDEN>& x, const Vector<HIDDEN>& norm) {
        const auto [inverse, scale] = normed<CODES>(x, norm);
        store_operand<HIDDEN, CODES>(x, inverse * (1.0f / scale));
        operand_is_there();
        return scale;
    }

    // Store x as operand B; returns the token's scale.
    template <int K>
    __device__ __forceinline__ float store_scaled(const Vector<K>& x) {
        float scale = 1.0f;
        if (FP8) {
            float unused = 0.0f, largest = largest_of<K>(x);
            reduce<true>(unused, largest);
            scale = token_scale(largest);
        }
        store_operand<K, FP8>(x, 1.0f / scale);
        operand_is_there();
        return scale;
    }

    // ---- matrix products

    // The producer may fill the stage again.
    __device__ __forceinline__ void release_stage() {
        __syncwarp();
        if (lane == 0) arrive(ring.empty());
        ring.advance();
    }

    // Multiply the rows of the next `count` stages (of rows in several stages: sets of them) with the operand at the beginning
    // of `scratch`. `parts` gets what dot_product sums up; a stage's rows come behind those of the stage before it. GATED:
    // stages hold rows of gate and of up in turn; those of up begin MAX_PAIRS later.
    template <int K, bool CODES, bool GATED>
    __device__ __forceinline__ void multiply(int count) {
        if constexpr (Tiles<K, CODES>::FIT) multiply_tiled<K, CODES, GATED, false>(count, {}, 0);
        else multiply_by_warps<K, CODES, GATED>(count, 0, 0);
    }

    // Several matrices, each with an operand of its own; the first one's lies `at` bytes behind the beginning of `scratch`.
    struct Sets {
        int each;   // stages of a matrix
        int rows;   // from the first row of a matrix's sums to the next one's
        int bytes;  // from an operand to the next one
    };

    template <int K, bool CODES>
    __device__ __forceinline__ void multiply_sets(int count, const Sets& sets, int at) {
        if constexpr (Tiles<K, CODES>::FIT) {
            multiply_tiled<K, CODES, false, true>(count * sets.each, sets, at);
        } else {
#pragma unroll 1
            for (int i = 0; i < count; ++i)
                multiply_by_warps<K, CODES, false>(sets.each, i * sets.rows, at + i * sets.bytes);
        }
    }

    // Warpgroups take stages in turn. parts [MAX_SUMS, 8]: a tile's diagonal. SEVERAL: `sets` tells how many matrices.
    template <int K, bool CODES, bool GATED, bool SEVERAL>
    __device__ __forceinline__ void multiply_tiled(int count, const Sets& sets, int at) {
        using T = Tiles<K, CODES>;
        constexpr int TEAMS = WARPS / 4, OWN = T::ROWS / 4;  // rows of a warp in a stage
        const bool is_odd = lane / 4 % 2, is_diagonal = lane % 4 == lane / 8;
        Ring own = ring;
        own.advance(warp / 4);
        int set = 0, place = warp / 4;  // of a stage among its set's
#pragma unroll 1
        for (int stage = warp / 4; stage < count; stage += TEAMS, place += TEAMS, own.advance(TEAMS)) {
            if constexpr (SEVERAL) {
#pragma unroll 1
                for (; place >= sets.each; place -= sets.each) ++set;
            }
            const u32 address = uniform(shared_address(scratch) + at + (SEVERAL ? set * sets.bytes : 0));
            const Operand activations = operand_at(address, 128, T::PITCH);
            float sums[T::COLUMNS / 2] = {};
            wait(own.full(), own.parity);
            begin_products();
            const u32 weights = uniform(shared_address(own.stage()));
            const Operand rows = operand_at(weights, 128, T::PART);
            const Operand last = operand_at(weights, 0, T::PART);  // the second tile isn't there
#pragma unroll
            for (int i = 0; i < T::STEPS; ++i) {
                const bool is_half = T::PITCH > T::PART && i == T::STEPS - 1;
                multiply_tiles<CODES>(sums, further(is_half ? last : rows, i * 256), further(activations, i * 256), i > 0);
            }
            end_products();
            wait_for_products();
            are_there(sums);
            if (lane == 0) arrive(own.empty(), TEAMS);
            // A lane's sums of columns 8 i, …: of its row sums[4 i] and the next, of the row eight further down the two behind.
            float shares[2] = {};
#pragma unroll
            for (int i = 0; i < T::COLUMNS / 8; ++i) {
                if (T::PARTS == 1 || i % 2 == 0) shares[0] += is_odd ? sums[4 * i + 1] : sums[4 * i];
                if (T::PARTS == 1 || i % 2 == 1) shares[1] += is_odd ? sums[4 * i + 3] : sums[4 * i + 2];
            }
            const int of_stage = GATED ? place / 2 * T::ROWS + place % 2 * MAX_PAIRS : place * T::ROWS;
            const int row = (SEVERAL ? set * sets.rows : 0) + of_stage + warp % 4 * OWN;
            if (is_diagonal) {
                parts[row * 8 + lane / 4] = OWN == 2 ? shares[0] : shares[0] + shares[1];
                if (OWN == 2) parts[row * 8 + 8 + lane / 4] = shares[1];
            }
        }
        ring.advance_far(count);
    }

    // parts [WARPS, MAX_SUMS]: the partial sums of each team's members.
    template <int K, bool CODES, bool GATED>
    __device__ __forceinline__ void multiply_by_warps(int count, int offset, int at) {
        using G = Groups<K, CODES>;
        using T = typename G::T;
        constexpr int PAIRS = G::PAIRS, TEAM = G::TEAM, ROW_BYTES = G::ROW_BYTES;
        const int pair = warp / TEAM, member = warp % TEAM;
        const bool is_odd = lane / 4 % 2, is_diagonal = lane % 4 == lane / 8;
        const u8* from = scratch + at;
        float* sums_of_team = parts + member * MAX_SUMS + offset + pair + (lane / 4 % 2 ? PAIRS : 0);
        G x;
        if (T::SPLITS == 1) x.load(from, from + ROW_BYTES, ROW_BYTES, member, lane);
#pragma unroll 1
        for (int first = 0; first < count; first += TOGETHER) {
            float shares[2 * TOGETHER] = {};
#pragma unroll
            for (int i = 0; i < TOGETHER; ++i) {
                if (first + i >= count) break;
                float sums[4][4] = {};
#pragma unroll
                for (int split = 0; split < T::SPLITS; ++split) {
                    const int bytes = min(T::PART * GROUP, ROW_BYTES - split * T::PART * GROUP);
                    if (T::SPLITS > 1) {
                        const u8* columns = from + split * T::PART * GROUP;
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

    // Multiply `count` rows.
    template <int K, bool CODES>
    __device__ __forceinline__ void multiply_rows(int count) {
        constexpr int ROWS = Tiling<CODES ? K : 2 * K>::ROWS;
        multiply<K, CODES, false>((count + ROWS - 1) / ROWS);
        sync_consumers();
    }

    // Multiply rows of gate and of up, ROWS of each in turn: the sums of gate begin at 0, those of up at MAX_PAIRS.
    __device__ __forceinline__ void multiply_gate_up(int stages) {
        multiply<HIDDEN, FP8, true>(stages);
        sync_consumers();
    }

    template <int K, bool CODES>
    __device__ __forceinline__ float dot_product(int row) const {
        float sum = 0.0f;
        if (Tiles<K, CODES>::FIT) {
            const float4 v = *(const float4*)(parts + row * 8), w = *(const float4*)(parts + row * 8 + 4);
            return (v.x + v.y) + (v.z + v.w) + ((w.x + w.y) + (w.z + w.w));
        }
#pragma unroll
        for (int i = 0; i < Groups<K, CODES>::TEAM; ++i) sum += parts[i * MAX_SUMS + row];
        return sum;
    }

    // ---- parts of a decoder

    // One phase: residual stream += source · matrix. residual: this thread's element. IS_LAST: of the layer.
    template <int K, bool IS_LAST>
    __device__ __forceinline__ void residual_gemv(const Matrix& matrix, const float* source, Share own, float& residual) {
        const bool is_mine = thread < own.count;
        const Affine affine = affine_of(matrix, own.first + thread, is_mine);
        if (IS_LAST) approach(ACTIVATED, activations);
        else approach(VALUES_MADE);
        Vector<K> x;
        fetch<K>(x, source, IS_LAST ? mlp_tag : tag);
        const float scale = store_scaled<K>(x);
        multiply_rows<K, FP8>(own.count);
        if (!is_mine) return;
        const float part = dot_product<K, FP8>(thread) * (affine.scale * scale);
        residual += sum_over_ranks(part, own.first + thread, 2 * (sequence * LAYERS + layers) + IS_LAST) + affine.shift;
        publish((IS_LAST ? hidden : between) + own.first + thread, residual);
        end(IS_LAST ? LAYER_DONE : BETWEEN);
    }

    // A layer's first phase: out [ROWS] = norm(residual stream) · matrix. embedded: of the first layer, the token's embedding,
    // which is the residual stream; of the others null. mlp, mlps: see begin_layer.
    template <int ROWS>
    __device__ __forceinline__ void project_in(const u16* norm_weights, const Matrix& matrix, const u16* embedded,
                                               float* out, u32 mlp, u32 mlps) {
        const Share own = share_of(ROWS);
        Affine affine = affine_of(matrix, own.first + thread, thread < own.count);
        Vector<HIDDEN> norm, x;
        read_bf16<HIDDEN>(norm, norm_weights);
        if (embedded) {
            read_bf16<HIDDEN>(x, embedded);
        } else {
            approach(LAYER_DONE);
            fetch<HIDDEN>(x, hidden, tag);
        }
        begin_layer(mlp, mlps);
        const float scale = store_normed<FP8>(x, norm);
        for (int first = 0; first < own.count; first += MAX_ROWS) {
            const int count = min(MAX_ROWS, own.count - first);
            if (first) affine = affine_of(matrix, own.first + first + thread, thread < count);
            multiply_rows<HIDDEN, FP8>(count);
            if (thread < count)
                publish(out + own.first + first + thread,
                        dot_product<HIDDEN, FP8>(thread) * (affine.scale * scale) + affine.shift);
            if (first + MAX_ROWS < own.count) sync_consumers();
        }
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
        approach(BETWEEN);
        fetch<HIDDEN>(x, between, tag);
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
                publish_mlp(activated + row, silu(g) * u);
            }
            if (first + MAX_PAIRS < pairs.count) sync_consumers();
        }
        end(ACTIVATED);
        ++activations;
        residual_gemv<INNER, true>(down, activated, own, residual);
    }

    // The last phase: logits [VOCAB] = norm(residual stream) · head, in bfloat16.
    template <int VOCAB_SIZE>
    __device__ __forceinline__ void project_head(const u16* norm_weights, float* logits) {
        Vector<HIDDEN> norm, x;
        read_bf16<HIDDEN>(norm, norm_weights);
        approach(LAYER_DONE);
        fetch<HIDDEN>(x, hidden, tag);
        store_normed<false>(x, norm);
        const Share vocab = share_of(VOCAB_SIZE);
        for (int first = 0; first < vocab.count; first += MAX_ROWS) {
            const int count = min(MAX_ROWS, vocab.count - first);
            multiply_rows<HIDDEN, false>(count);
            if (thread < count) logits[vocab.first + first + thread] = dot_product<HIDDEN, false>(thread);
            sync_consumers();
        }
    }

    // To be called at the end: the last block to do so prepares the next kernel.
    __device__ __forceinline__ void leave() {
        if (thread || count_at(&grid->done, BLOCKS - 1) != BLOCKS - 1) return;
        for (Counter& counter : grid->ended) counter.count = 0;
        for (Counter& counter : grid->absorbed) counter.count = 0;
        for (Counter& counter : grid->attended) counter.count = 0;
        grid->sequence = (sequence + 1) % SEQUENCES;
    }
};
