// A decoder of latent attention and experts; its first layers may have dense MLPs. Phases of a layer:
//   projected = norm(hidden) Wq_kv_a | queries absorbed, the new token's entry | attention, by splits of the entries |
//   values of what was attended to | hidden += values Wo |
//   the router's logits, the shared experts' gate and up | hidden += the shared experts' down |
//   the chosen experts' gate and up | hidden += the chosen experts' down
// The shared experts hide the router: the producer itself waits for its logits and chooses, so that it can go on with
// the chosen experts' weights.
//
// Macros beside common.cu's (persistent/latent.py):
//   INTERMEDIATE HEADS NOPE ROPE VALUE LATENT VOCAB LAYERS MAX_SEQ_LEN   the decoder's shape; LATENT: kv_lora_rank
//   DENSE_LAYERS  the first ones, which have a dense MLP of INTERMEDIATE
//   EXPERTS TOP_K EXPERT_SIZE ALWAYS   the router's experts, how many it chooses, their width; the shared experts
//   SIGMOID       1: scores are sigmoids, 0: softmax
//   NORMALISED    1: the chosen scores are divided by their sum
//   EXPERT_SCALE  factor of the chosen scores
//   PAGE          0: a slot's entries lie side by side; else they are in blocks of so many, which a table names
//   INNER_EPS     of the latent's norm
//   SCORE_SCALE   factor of the attention scores, times log2(e)

constexpr int HALF = ROPE / 2;
constexpr int QUERY = NOPE + ROPE;
constexpr int Q_SIZE = HEADS * QUERY;
constexpr int ENTRY = LATENT + ROPE;
constexpr int PROJECTED = Q_SIZE + ENTRY;
constexpr int VALUES = HEADS * VALUE;
constexpr int MAX_HEADS = 16;  // rows of a product on tensor cores
constexpr int UNIT = 14;       // positions of a stage, at most 16: more would need larger stages
constexpr int ENTRY_BYTES = 2 * ENTRY;
constexpr int ENTRY_STRIDE = ENTRY_BYTES + 16;  // 16 bytes of eight rows lie in different banks
constexpr int SHARE_STRIDE = 24, SCORE_STRIDE = 20, SORTED_STRIDE = LATENT / 2 + 4;
constexpr int SCORE_PARTS = 4;             // warps that share a tile of scores
constexpr int COLUMNS = LATENT / WARPS;    // of what is attended to, of a warp
constexpr int ABSORBED = 64;               // columns of a head's query that a block absorbs at a time
constexpr int TILES = LATENT / ABSORBED;
constexpr int ABSORB_UNITS = HEADS * TILES;
constexpr int VALUE_ROWS = 16;             // values that a block makes at a time
constexpr int VALUE_UNITS = VALUES / VALUE_ROWS;
constexpr int MANY_UNITS = 512;  // fewer use FEW_SPLITS blocks: merging more splits costs more than it saves
constexpr int FEW_SPLITS = BLOCKS < 64 ? BLOCKS : 64;
constexpr int CHUNK = Tiling<HIDDEN * ELEMENT>::ROWS;                    // rows of gate in a stage
constexpr int CHUNKS = EXPERT_SIZE / CHUNK;
// Stages in flight while blocks have much to tell each other. With the chosen experts memory is the limit.
constexpr int FEW_IN_FLIGHT = IN_FLIGHT < 2 ? IN_FLIGHT : 2;
constexpr int PAIR = 2;  // experts computed together
constexpr int MOST_PAIRS = ((TOP_K > ALWAYS ? TOP_K : ALWAYS) + PAIR - 1) / PAIR;
constexpr int PAIR_ROWS = (PAIR * CHUNKS + BLOCKS - 1) / BLOCKS * CHUNK;  // of gate, of a block at most
constexpr int DOWN_ROWS = Tiling<EXPERT_SIZE * ELEMENT>::ROWS;
constexpr int OWN = ((HIDDEN + BLOCKS - 1) / BLOCKS + DOWN_ROWS - 1) / DOWN_ROWS * DOWN_ROWS;  // rows of down, likewise
constexpr float MAX_HALF = 65504.0f;
constexpr int EXPERT_LAYERS = LAYERS - DENSE_LAYERS;
constexpr int EXPERT_LANES = (EXPERTS + 31) / 32;

static_assert(HEADS <= MAX_HEADS && LATENT % (16 * WARPS) == 0 && ENTRY % 16 == 0, "attention's tiles");
static_assert(LATENT <= 4 * THREADS && THREADS % (LATENT / 8) == 0, "threads share a latent evenly");
static_assert(UNIT <= 16 && UNIT * ENTRY_STRIDE <= STAGE_BYTES, "a stage is too small for a unit");
static_assert(2 * NOPE * ABSORBED <= STAGE_BYTES && 4 * HIDDEN <= STAGE_BYTES, "a stage is too small");
static_assert(NOPE + HALF <= THREADS && NOPE % WARPS == 0 && VALUE % VALUE_ROWS == 0, "threads share a head");
static_assert(EXPERT_SIZE % CHUNK == 0 && EXPERT_SIZE % 16 == 0, "whole stages of an expert");
static_assert(PAIR_ROWS <= MAX_PAIRS && PAIR * OWN <= MAX_SUMS, "a thread sums one pair of rows; two experts' sums are kept");
static_assert(TOP_K <= 32, "a lane has an expert");

struct Layer {
    const u16* attention_norm;  // [HIDDEN] bfloat16
    const u16* mlp_norm;
    const u16* kv_norm;  // [LATENT] bfloat16
    Matrix q_kv_a;
    const u16* kv_b;  // [HEADS, NOPE + VALUE, LATENT] bfloat16
    Matrix o;
    Matrix gate_up, down;  // of a dense MLP; or [EXPERTS + ALWAYS, …]
    const float* router;   // [EXPERTS, HIDDEN]
    const float* bias;     // [EXPERTS], added for the choice alone, or null
    u16* entries;          // [MAX_SEQ_LEN, ENTRY] bfloat16, of slot 0; or [blocks, PAGE, ENTRY]
};

struct Work {
    float projected[PROJECTED];
    float attention[VALUES];
    float hidden[HIDDEN];
    float between[HIDDEN];
    float dense[INTERMEDIATE];  // what the first layers' MLPs activate
    float activated[TOP_K * EXPERT_SIZE];
    float shared[(ALWAYS ? ALWAYS : 1) * EXPERT_SIZE];
    float entry[ENTRY];                      // the new token's
    u32 queries[HEADS][ENTRY / 2];           // pairs of halves
    u32 partial[BLOCKS][HEADS][LATENT / 2];  // likewise
    float weights[BLOCKS][HEADS][2];         // maximum and sum of a split's scores
    float logits[EXPERTS];
    Grid grid;  // zeros at first; each kernel leaves zeros again, except in `sequence`
};
static_assert(sizeof(Work) <= WORK_BYTES, "the buffer is too small");

// What the producer and the consumers tell each other in shared memory, and the consumers themselves.
struct Board {
    u64 chosen;  // barrier: experts and weights are there
    int experts[TOP_K];
    float weights[TOP_K];
    float sums[WARPS];
    float scales[MOST_PAIRS][2][PAIR_ROWS];  // of rows of gate and of up
    float down_scales[MOST_PAIRS * PAIR][OWN];
};
static_assert(sizeof(Board) <= BOARD_BYTES, "shared memory is too small");

// Where a position's entry is in `entries`.
__device__ __forceinline__ i64 entry_offset(const int* table, int position) {
#if PAGE
    return ((i64)__ldg(table + position / PAGE) * PAGE + position % PAGE) * ENTRY;
#else
    return (i64)position * ENTRY;
#endif
}

struct Span {
    int num_splits;   // blocks that have one
    int first, last;  // units of this block
};

__device__ __forceinline__ Span span_of(int position) {
    const int units = position / UNIT + 1, limit = units < MANY_UNITS ? FEW_SPLITS : BLOCKS;
    const int each = (units + limit - 1) / limit, first = blockIdx.x * each;
    return {(units + each - 1) / each, first, min(first + each, units)};
}

// This block's chunks of the rows of so many experts; turn: for blocks take turns in having one more.
__device__ __forceinline__ Share chunks_of(int experts, int turn) {
    const int block = (blockIdx.x + turn) % BLOCKS, first = experts * CHUNKS * block / BLOCKS;
    return {first, experts * CHUNKS * (block + 1) / BLOCKS - first};
}

__device__ __forceinline__ u16 bits_of(float v) { return (u16)to_bf16x2(v, 0.0f); }

// Unsigned numbers in the order of the floats.
__device__ __forceinline__ u32 ordered(float v) {
    const u32 bits = __float_as_uint(v);
    return bits & 0x80000000 ? ~bits : bits | 0x80000000;
}

// ---- the producer

struct LatentProducer : Producer {
    Board* board;
    Work* work;

    // A block of 64 columns of one head's rows of kv_b.
    __device__ __forceinline__ void absorbing(const u16* kv_b) {
        for (int unit = blockIdx.x; unit < ABSORB_UNITS; unit += BLOCKS) {
            const u16* source = kv_b + (i64)(unit / TILES) * (NOPE + VALUE) * LATENT + unit % TILES * ABSORBED;
            copy_rows((const u8*)source, NOPE, LATENT * 2, ABSORBED * 2, ABSORBED * 2);
        }
    }

    // Earlier kernels wrote the cached positions, so there is nothing to wait for. The new one's is not among them.
    __device__ __forceinline__ void cache(const u16* entries, const Span& span, const int* table, int position) {
        for (int unit = span.first; unit < span.last; ++unit) {
            const int count = min(UNIT, position - unit * UNIT);
            begin(count * ENTRY_BYTES);
            if (lane < count)
                copy(lane * ENTRY_STRIDE, entries + entry_offset(table, unit * UNIT + lane), ENTRY_BYTES);
            ring.advance();
        }
    }

    __device__ __forceinline__ void values(const u16* kv_b) {
        for (int unit = blockIdx.x; unit < VALUE_UNITS; unit += BLOCKS) {
            const int head = unit * VALUE_ROWS / VALUE, first = unit * VALUE_ROWS % VALUE;
            rows<LATENT * 2>((const u8*)kv_b, {head * (NOPE + VALUE) + NOPE + first, VALUE_ROWS});
        }
    }

    __device__ __forceinline__ void router(const float* weight) {
        for (int expert = blockIdx.x; expert < EXPERTS; expert += BLOCKS)
            copy_pieces((const u8*)(weight + (i64)expert * HIDDEN), HIDDEN * 4, HIDDEN * 4);
    }

    // This block's rows of some experts, in the consumers' order: see LatentConsumer::compute. mine: a lane's expert.
    __device__ __forceinline__ void experts(const Layer& layer, int count, int mine, Share own) {
#pragma unroll 1
        for (int i = 0; i < count; i += PAIR) {
            const Share chunks = chunks_of(min(PAIR, count - i), i / PAIR);
#pragma unroll 1
            for (int j = 0; j < 2 * chunks.count; ++j) {
                const int chunk = chunks.first + j / 2, expert = __shfl_sync(~0u, mine, i + chunk / CHUNKS);
                rows<HIDDEN * ELEMENT>(layer.gate_up.weight,
                                       {(expert * 2 + j % 2) * EXPERT_SIZE + chunk % CHUNKS * CHUNK, CHUNK});
            }
        }
#pragma unroll 1
        for (int i = 0; i < count; ++i)
            rows<EXPERT_SIZE * ELEMENT>(layer.down.weight, {__shfl_sync(~0u, mine, i) * HIDDEN + own.first, own.count});
    }

    // Wait for the router's logits and choose: lane i's result is the i-th expert. tag: the logits'.
    __device__ __forceinline__ int choose(const float* bias, u32 tag) {
        float scores[EXPERT_LANES];
        u32 ranks[EXPERT_LANES];
        float largest = MASKED_SCORE, sum = 0.0f;
#pragma unroll
        for (int i = 0; i < EXPERT_LANES; ++i) {
            const int expert = i * 32 + lane;
            scores[i] = expert < EXPERTS ? await1(work->logits + expert, tag) : MASKED_SCORE;
            largest = fmaxf(largest, scores[i]);
        }
        __syncwarp();
        if (!SIGMOID) largest = warp_max(largest);
#pragma unroll
        for (int i = 0; i < EXPERT_LANES; ++i) {
            scores[i] = SIGMOID ? 1.0f / (1.0f + __expf(-scores[i])) : __expf(scores[i] - largest);
            sum += scores[i];
        }
        const float divisor = SIGMOID ? 1.0f : 1.0f / warp_sum(sum);
#pragma unroll
        for (int i = 0; i < EXPERT_LANES; ++i) {
            const int expert = i * 32 + lane;
            scores[i] *= divisor;
            const float added = bias && expert < EXPERTS ? __ldg(bias + expert) : 0.0f;
            ranks[i] = expert < EXPERTS ? ordered(scores[i] + added) : 0;
        }
        int mine = 0;
        float weight = 0.0f;
        for (int place = 0; place < TOP_K; ++place) {
            u32 best = 0;
#pragma unroll
            for (int i = 0; i < EXPERT_LANES; ++i) best = max(best, ranks[i]);
            best = __reduce_max_sync(~0u, best);
            bool is_found = false;  // of equal ones the first
#pragma unroll
            for (int i = 0; i < EXPERT_LANES; ++i) {
                const u32 lanes = __ballot_sync(~0u, ranks[i] == best);
                if (is_found || !lanes) continue;
                is_found = true;
                const int owner = __ffs(lanes) - 1;
                const float score = __shfl_sync(~0u, scores[i], owner);
                if (lane == place) {
                    mine = i * 32 + owner;
                    weight = score;
                }
                if (lane == owner) ranks[i] = 0;
            }
        }
        mine = min(mine, EXPERTS - 1);
        if (NORMALISED) weight /= warp_sum(weight) + 1e-20f;
        if (lane < TOP_K) {
            board->experts[lane] = mine;
            board->weights[lane] = weight * EXPERT_SCALE;
        }
        __syncwarp();
        if (lane == 0) arrive(&board->chosen);
        return mine;
    }

    __device__ __forceinline__ void run(const Layer* layers, const u8* head, const int* table, int position, u32 sequence) {
        const Span span = span_of(position);
        const Share own = share_of(HIDDEN);
        for (int i = 0; i < LAYERS; ++i) {
            const Layer& layer = layers[i];
            limit = FEW_IN_FLIGHT;
            rows<HIDDEN * ELEMENT>(layer.q_kv_a.weight, share_of(PROJECTED));
            absorbing(layer.kv_b);
            cache(layer.entries, span, table, position);
            values(layer.kv_b);
            rows<VALUES * ELEMENT>(layer.o.weight, own);
            if (i < DENSE_LAYERS) {
                gate_up(layer.gate_up.weight, INTERMEDIATE, share_of(INTERMEDIATE));
                rows<INTERMEDIATE * ELEMENT>(layer.down.weight, own);
                continue;
            }
            router(layer.router);
            if (ALWAYS) experts(layer, ALWAYS, EXPERTS + lane, own);
            const int mine = choose(layer.bias, tag_of(sequence * EXPERT_LAYERS + i - DENSE_LAYERS));
            limit = IN_FLIGHT;
            experts(layer, TOP_K, mine, own);
        }
        limit = IN_FLIGHT;
        rows<HIDDEN * 2>(head, share_of(VOCAB));
    }
};

// ---- the consumers

struct LatentConsumer : Consumer {
    Board* board;
    Work* work;
    const int* table;  // slot 0's blocks of the cache

    // ---- attention

    // Rotate channels r and r + HALF, and round them.
    __device__ __forceinline__ float2 rotated(const float* source, int r, const float* cos, const float* sin) const {
        const float c = __ldg(cos + r), s = __ldg(sin + r);
        const float a = await1(source + r, tag), b = await1(source + HALF + r, tag);
        return {rounded(a * c - b * s), rounded(b * c + a * s)};
    }

    // Half a phase: multiply the heads' queries with the rows of kv_b that make keys.
    __device__ __forceinline__ void absorb(const float* cos, const float* sin) {
        float* x = (float*)scratch;
        const int r = thread - (THREADS - HALF);
        for (int unit = blockIdx.x; unit < ABSORB_UNITS; unit += BLOCKS) {
            const int head = unit / TILES, tile = unit % TILES;
            const float* query = work->projected + head * QUERY;
            if (thread < NOPE) x[thread] = rounded(await1(query + thread, tag));
            if (tile == 0 && r >= 0) {
                const float2 v = rotated(query + NOPE, r, cos, sin);
                x[NOPE + r] = v.x;
                x[NOPE + HALF + r] = v.y;
            }
            sync_consumers();
            if (tile == 0 && thread < HALF)
                publish_halves(work->queries[head] + LATENT / 2 + thread, x[NOPE + 2 * thread], x[NOPE + 2 * thread + 1]);
            wait(ring.full(), ring.parity);
            const u8* weights = ring.stage() + lane * 4;
            float low = 0.0f, high = 0.0f;
#pragma unroll
            for (int i = 0; i < NOPE / WARPS; ++i) {
                const int n = i * WARPS + warp;
                const u32 pair = *(const u32*)(weights + n * ABSORBED * 2);
                low += x[n] * from_bf16(pair & 0xffff);
                high += x[n] * __uint_as_float(pair & 0xffff0000);
            }
            release_stage();
            *(float2*)(parts + warp * ABSORBED + lane * 2) = {low, high};
            sync_consumers();
            if (thread < ABSORBED / 2) {
                float2 sum = {};
#pragma unroll
                for (int i = 0; i < WARPS; ++i) {
                    const float2 v = *(const float2*)(parts + i * ABSORBED + thread * 2);
                    sum = {sum.x + v.x, sum.y + v.y};
                }
                publish_halves(work->queries[head] + tile * ABSORBED / 2 + thread, rounded(sum.x), rounded(sum.y));
            }
        }
    }

    // The other half: the new token's entry, for this kernel and for later ones.
    __device__ __forceinline__ void write_entry(const Layer& layer, int position, const float* cos, const float* sin) {
        u16* target = layer.entries + entry_offset(table, position);
        const float* source = work->projected + Q_SIZE;
        const int r = thread - (THREADS - HALF);
        Vector<LATENT> norm, x;
        read_bf16<LATENT>(norm, layer.kv_norm);
        fetch<LATENT>(x, source, tag);
        if (r >= 0) {
            const float2 v = rotated(source + LATENT, r, cos, sin);
            publish(work->entry + LATENT + r, v.x);
            publish(work->entry + LATENT + HALF + r, v.y);
            target[LATENT + r] = bits_of(v.x);
            target[LATENT + HALF + r] = bits_of(v.y);
        }
        float squares = 0.0f, unused = 0.0f;
        times<LATENT>(x, norm, squares);
        reduce<true>(squares, unused);
        const float inverse = rsqrtf(squares / LATENT + INNER_EPS);
        if (!holds<LATENT>(thread, 0)) return;
        const float4 v = x.values[0];
        const uint2 pairs = {to_bf16x2(v.x * inverse, v.y * inverse), to_bf16x2(v.z * inverse, v.w * inverse)};
        publish4(work->entry + thread * 4, {from_bf16(pairs.x & 0xffff), from_bf16(pairs.x >> 16),
                                            from_bf16(pairs.y & 0xffff), from_bf16(pairs.y >> 16)});
        *(uint2*)(target + thread * 4) = pairs;
    }

    struct Attention {
        u8 queries[MAX_HEADS * ENTRY_STRIDE];
        u8 zeros[ENTRY_STRIDE];  // the entry of a position behind the unit
        u16 shares[MAX_HEADS * SHARE_STRIDE];  // of the positions of a unit, bfloat16
        float corrections[MAX_HEADS];
    };
    typedef float Scores[MAX_HEADS][SCORE_STRIDE];
    static_assert(sizeof(Attention) <= SCRATCH_BYTES, "scratch is too small");
    static_assert(SCORE_PARTS * sizeof(Scores) <= 4 * WARPS * MAX_SUMS, "the partial sums' room is too small");

    // All heads attend to this block's units.
    __device__ __forceinline__ void attend(const Span& span, int position) {
        Attention& at = *(Attention*)scratch;
        Scores* scores = (Scores*)parts;  // [SCORE_PARTS]
        const u32 stages = shared_address(memory), queries = shared_address(at.queries);
        const u32 zeros = shared_address(at.zeros);
        const u32 row = lane % 16, half = lane / 16 * 16;  // of a lane's address for ldmatrix; in bytes
        approach(ABSORBED_IN);
        constexpr int OCTETS = ENTRY / 8, COUNT = (MAX_HEADS * OCTETS + THREADS - 1) / THREADS;
        uint4 loaded[COUNT];
        const u32 halves = tag_of_halves(tag);
#pragma unroll
        for (int i = 0; i < COUNT; ++i)
            if (i * THREADS + thread < HEADS * OCTETS) loaded[i] = look4(work->queries[0] + (i * THREADS + thread) * 4);
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const int octet = i * THREADS + thread;
            if (octet >= MAX_HEADS * OCTETS) break;
            uint4 v = {};
            if (octet < HEADS * OCTETS) v = await_halves(loaded[i], work->queries[0] + octet * 4, halves);
            *(uint4*)(at.queries + octet / OCTETS * ENTRY_STRIDE + octet % OCTETS * 16) = {
                halves_to_bf16(v.x), halves_to_bf16(v.y), halves_to_bf16(v.z), halves_to_bf16(v.w)};
        }
        if (thread < ENTRY_STRIDE / 16) ((uint4*)at.zeros)[thread] = {};
        sync_consumers();
        const int head = thread / 16, column = thread % 16, tile = warp / SCORE_PARTS, part = warp % SCORE_PARTS;
        float largest = MASKED_SCORE, total = 0.0f;
        float sums[COLUMNS / 8][4] = {};
        for (int unit = span.first; unit < span.last; ++unit) {
            const int first = unit * UNIT;
            wait(ring.full(), ring.parity);
            if (position < first + UNIT) add_entry(first, position);
            const u32 stage = stages + ring.index * STAGE_BYTES;
            float products[4] = {};
            const u32 key = tile * 8 + lane % 8;
            const u32 keys = (key < UNIT ? stage + key * ENTRY_STRIDE : zeros) + lane / 8 % 2 * 16;
            const u32 entries_at = (row < UNIT ? stage + row * ENTRY_STRIDE : zeros) + half + warp * COLUMNS * 2;
#pragma unroll
            for (int step = 0; step < (ENTRY / 16 + SCORE_PARTS - 1) / SCORE_PARTS; ++step) {
                const int at_step = step * SCORE_PARTS + part;
                if (at_step >= ENTRY / 16) break;
                u32 a[4], b[2];
                load_four(a, queries + row * ENTRY_STRIDE + half + at_step * 32);
                load_two(b, keys + at_step * 32);
                multiply_bf16(products, a[0], a[1], a[2], a[3], b[0], b[1]);
            }
            const int to = tile * 8 + lane % 4 * 2;
            *(float2*)&scores[part][lane / 4][to] = {products[0], products[1]};
            *(float2*)&scores[part][lane / 4 + 8][to] = {products[2], products[3]};
            sync_consumers();
            {  // one step of the online softmax: a thread has one head's score of one position
                const bool is_there = column < UNIT && first + column <= position;
                float score = 0.0f;
#pragma unroll
                for (int i = 0; i < SCORE_PARTS; ++i) score += scores[i][head][column];
                score = is_there ? score * SCORE_SCALE : MASKED_SCORE;
                float best = fmaxf(score, largest);
#pragma unroll
                for (int i = 8; i; i /= 2) best = fmaxf(best, __shfl_xor_sync(~0u, best, i));
                const float share = is_there ? exp2f(score - best) : 0.0f, correction = exp2f(largest - best);
                float sum = share;
#pragma unroll
                for (int i = 8; i; i /= 2) sum += __shfl_xor_sync(~0u, sum, i);
                total = total * correction + sum;
                largest = best;
                at.shares[head * SHARE_STRIDE + column] = bits_of(share);
                if (column == 0) at.corrections[head] = correction;
            }
            sync_consumers();
            u32 shares[4];
            load_four(shares, shared_address(at.shares) + row * SHARE_STRIDE * 2 + half);
            const float low = at.corrections[lane / 4], high = at.corrections[lane / 4 + 8];
#pragma unroll
            for (int i = 0; i < COLUMNS / 16; ++i) {
                u32 latents[4];
                load_four_transposed(latents, entries_at + i * 32);
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    float(&sum)[4] = sums[2 * i + j];
                    sum[0] *= low;
                    sum[1] *= low;
                    sum[2] *= high;
                    sum[3] *= high;
                    multiply_bf16(sum, shares[0], shares[1], shares[2], shares[3], latents[2 * j], latents[2 * j + 1]);
                }
            }
            release_stage();
        }
        sync_consumers();
        if (column == 0) {
            at.corrections[head] = 1.0f / total;
            if (head < HEADS) {
                publish(work->weights[blockIdx.x][head], largest);
                publish(work->weights[blockIdx.x][head] + 1, total);
            }
        }
        sync_consumers();
        // Sorted in shared memory, where the queries were: single numbers would be a sector each.
        u32* const sorted = (u32*)scratch;
        static_assert(MAX_HEADS * SORTED_STRIDE * 4 <= sizeof(at.queries), "what is attended to takes the queries' room");
#pragma unroll
        for (int of = 0; of < 2; ++of) {
            const float correction = at.corrections[lane / 4 + of * 8];
            u32* to = sorted + (lane / 4 + of * 8) * SORTED_STRIDE + warp * COLUMNS / 2 + lane % 4;
#pragma unroll
            for (int i = 0; i < COLUMNS / 8; ++i)
                to[i * 4] = tagged_halves(sums[i][2 * of] * correction, sums[i][2 * of + 1] * correction);
        }
        sync_consumers();
        for (int i = thread; i < HEADS * (LATENT / 8); i += THREADS) {
            const int head = i / (LATENT / 8), piece = i % (LATENT / 8);
            post4(&work->partial[blockIdx.x][head][piece * 4], *(const uint4*)(sorted + head * SORTED_STRIDE + piece * 4));
        }
        sync_consumers();
    }

    // Other kernels have other splits, so that these numbers aren't written every time. All were read.
    __device__ __forceinline__ void clear_split() const {
        for (int i = thread; i < HEADS * (LATENT / 8); i += THREADS)
            post4(&work->partial[blockIdx.x][0][0] + i * 4, {});
        if (thread < 2 * HEADS) post(&work->weights[blockIdx.x][0][0] + thread, 0.0f);
    }

    static __device__ __forceinline__ u32 halves_to_bf16(u32 halves) {
        const float2 v = from_halves(halves);
        return to_bf16x2(v.x, v.y);
    }

    // Halves are large and precise enough for normed latents, and for what they are multiplied with.
    __device__ __forceinline__ u32 tagged_halves(float low, float high) const {
        const u32 halves = to_halves(fminf(fmaxf(low, -MAX_HALF), MAX_HALF), fminf(fmaxf(high, -MAX_HALF), MAX_HALF));
        return (halves & ~0x00010001) | tag_of_halves(tag);
    }

    __device__ __forceinline__ void publish_halves(u32* p, float low, float high) const { post(p, tagged_halves(low, high)); }

    // Put the new token's entry into the stage, and zeros behind it: what lay there may be no numbers.
    __device__ __forceinline__ void add_entry(int first, int position) {
        constexpr int QUADS = ENTRY / 4;
        for (int i = thread; i < (first + UNIT - position) * QUADS; i += THREADS) {
            const int behind = i / QUADS, quad = i % QUADS;
            const float* source = work->entry + quad * 4;
            const float4 v = behind ? float4{} : await4(look4(source), source, tag);
            u8* target = ring.stage() + (position - first + behind) * ENTRY_STRIDE + quad * 8;
            *(uint2*)target = {to_bf16x2(v.x, v.y), to_bf16x2(v.z, v.w)};
        }
        fence_copies();
        sync_consumers();
    }

    // Merge the splits of what one head attended to, and make VALUE_ROWS of its values.
    __device__ __forceinline__ void make_values(int unit, int num_splits) {
        constexpr int OCTETS = LATENT / 8, GROUPS = THREADS / OCTETS;  // groups of threads; each takes every GROUPS-th split
        constexpr int BATCH = 11;                                      // splits of a thread that are loaded at a time
        float* others = (float*)(scratch + 4 * LATENT);  // [GROUPS, LATENT]
        float* weights = others + GROUPS * LATENT;       // [GROUPS, 2]
        static_assert(4 * (LATENT + GROUPS * (LATENT + 2)) <= SCRATCH_BYTES, "scratch is too small");
        const int head = unit * VALUE_ROWS / VALUE, group = thread / OCTETS, column = thread % OCTETS * 8;
        const u32 halves = tag_of_halves(tag);
        float merged[8] = {}, largest = MASKED_SCORE, total = 0.0f;
        approach(ATTENDED);
        for (int first = group; first < num_splits; first += BATCH * GROUPS) {
            uint4 found[BATCH];
            float2 scores[BATCH];  // maxima and sums
#pragma unroll
            for (int i = 0; i < BATCH; ++i) {
                const int split = first + i * GROUPS;
                if (split >= num_splits) break;
                scores[i] = look2(work->weights[split][head]);
                found[i] = look4(&work->partial[split][head][column / 2]);
            }
#pragma unroll
            for (int i = 0; i < BATCH; ++i) {
                const int split = first + i * GROUPS;
                if (split >= num_splits) break;
                scores[i] = await2(scores[i], work->weights[split][head], tag);
                const float best = fmaxf(largest, scores[i].x), correction = exp2f(largest - best);
                const float weight = exp2f(scores[i].x - best) * scores[i].y;
                found[i] = await_halves(found[i], &work->partial[split][head][column / 2], halves);
                total = total * correction + weight;
                add(merged, correction, weight, found[i]);
                largest = best;
            }
        }
#pragma unroll
        for (int i = 0; i < 2; ++i)
            *(float4*)(others + group * LATENT + column + i * 4) = {merged[4 * i], merged[4 * i + 1], merged[4 * i + 2],
                                                                    merged[4 * i + 3]};
        if (column == 0) *(float2*)(weights + 2 * group) = {largest, total};
        sync_consumers();
        Vector<LATENT> x;
        if (holds<LATENT>(thread, 0)) {
            float4& sum = x.values[0];
            sum = {};
            total = 0.0f;
#pragma unroll
            for (int i = 0; i < GROUPS; ++i) largest = i ? fmaxf(largest, weights[2 * i]) : weights[0];
#pragma unroll
            for (int i = 0; i < GROUPS; ++i) {
                const float share = exp2f(weights[2 * i] - largest);
                const float4 v = *(const float4*)(others + i * LATENT + thread * 4);
                sum = {sum.x + share * v.x, sum.y + share * v.y, sum.z + share * v.z, sum.w + share * v.w};
                total += share * weights[2 * i + 1];
            }
        }
        store_operand<LATENT, false>(x, 1.0f / total);
        operand_is_there();
        multiply_rows<LATENT, false>(VALUE_ROWS);
        if (thread < VALUE_ROWS) publish(work->attention + unit * VALUE_ROWS + thread, dot_product<LATENT, false>(thread));
    }

    static __device__ __forceinline__ void add(float (&sums)[8], float correction, float weight, uint4 v) {
        const u32 pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 pair = from_halves(pairs[i]);
            sums[2 * i] = sums[2 * i] * correction + weight * pair.x;
            sums[2 * i + 1] = sums[2 * i + 1] * correction + weight * pair.y;
        }
    }

    // ---- experts

    static constexpr int X_BYTES = Tiles<HIDDEN, FP8>::OPERAND_BYTES;
    static constexpr int OPERAND_BYTES = Tiles<EXPERT_SIZE, FP8>::OPERAND_BYTES;

    // This block's logits of the router, which reads the norm in bfloat16. x · inverse: the norm.
    __device__ __forceinline__ void route(const Vector<HIDDEN>& x, float inverse) {
        for (int expert = blockIdx.x; expert < EXPERTS; expert += BLOCKS) {
            wait(ring.full(), ring.parity);
            const float* weights = (const float*)ring.stage();
            float sum = 0.0f;
#pragma unroll
            for (int i = 0; i < Vector<HIDDEN>::COUNT; ++i) {
                if (!holds<HIDDEN>(thread, i)) continue;
                const float4 w = *(const float4*)(weights + (i * THREADS + thread) * 4), v = x.values[i];
                sum += rounded(v.x * inverse) * w.x + rounded(v.y * inverse) * w.y + rounded(v.z * inverse) * w.z +
                       rounded(v.w * inverse) * w.w;
            }
            release_stage();
            sum = warp_sum(sum);
            if (lane == 0) board->sums[warp] = sum;
            sync_consumers();
            if (thread == 0) {
                float logit = 0.0f;
#pragma unroll
                for (int i = 0; i < WARPS; ++i) logit += board->sums[i];
                publish_mlp(work->logits + expert, logit);
            }
            if (expert + BLOCKS < EXPERTS) sync_consumers();
        }
    }

    // Two experts, or the last one. place: of the first among those that are computed.
    struct Pair {
        int place, count;
        Share chunks;
    };

    // chosen: null: the shared ones.
    static __device__ __forceinline__ int expert_at(int place, const int* chosen) {
        return chosen ? chosen[place] : EXPERTS + place;
    }

    __device__ __forceinline__ Pair pair_at(int place, int count) const {
        const int own = min(PAIR, count - place);
        return {place, own, chunks_of(own, place / PAIR)};
    }

    // Fetch the scales of this thread's row of gate, of up and of down, of every expert.
    __device__ __forceinline__ void fetch_scales(const Layer& layer, int count, const int* chosen, Share own) {
        if (!FP8) return;
        for (int place = 0; place < count; place += PAIR) {
            const Pair pair = pair_at(place, count);
            if (thread >= pair.chunks.count * CHUNK) continue;
            const int row = pair.chunks.first * CHUNK + thread, expert = expert_at(place + row / EXPERT_SIZE, chosen);
            const float* source = layer.gate_up.scale + (i64)expert * 2 * EXPERT_SIZE + row % EXPERT_SIZE;
            copy_number(&board->scales[place / PAIR][0][thread], source);
            copy_number(&board->scales[place / PAIR][1][thread], source + EXPERT_SIZE);
        }
        for (int i = 0; i < count && thread < own.count; ++i)
            copy_number(&board->down_scales[i][thread],
                        layer.down.scale + (i64)expert_at(i, chosen) * HIDDEN + own.first + thread);
    }

    // silu(gate) up of this block's rows of two experts, of the token in `scratch`. out: [PAIR, EXPERT_SIZE].
    __device__ __forceinline__ void activate(const Pair& pair, float scale, float* out) {
        sync_consumers();  // the sums before were read
        multiply_gate_up(2 * pair.chunks.count);
        if (thread < pair.chunks.count * CHUNK) {
            const float* scales = board->scales[pair.place / PAIR][0] + thread;  // the next row of `scales` are those of up
            wait_for_numbers();
            const float g = dot_product<HIDDEN, FP8>(thread) * (FP8 ? scales[0] * scale : 1.0f);
            const float u = dot_product<HIDDEN, FP8>(MAX_PAIRS + thread) * (FP8 ? scales[PAIR_ROWS] * scale : 1.0f);
            publish_mlp(out + pair.chunks.first * CHUNK + thread, silu(g) * u);
        }
        end(ACTIVATED);
    }

    typedef Vector<EXPERT_SIZE> Activated[PAIR];

    __device__ __forceinline__ void look_at_pair(Activated& x, const float* activated, int count) const {
#pragma unroll
        for (int i = 0; i < PAIR; ++i)
            if (i < count) look<EXPERT_SIZE>(x[i], activated + i * EXPERT_SIZE);
    }

    // Store what two experts activated as operands B; `scales` become the tokens' scales.
    __device__ __forceinline__ void store_pair(Activated& x, const float* activated, int count, float (&scales)[PAIR]) {
#pragma unroll
        for (int i = 0; i < PAIR; ++i)
            if (i < count) await<EXPERT_SIZE>(x[i], activated + i * EXPERT_SIZE, mlp_tag);
        if (FP8) {
            scales[0] = largest_of<EXPERT_SIZE>(x[0]);
            scales[1] = count == PAIR ? largest_of<EXPERT_SIZE>(x[1]) : 0.0f;
            reduce<false>(scales[0], scales[1]);
            scales[0] = token_scale(scales[0]);
            scales[1] = token_scale(scales[1]);
        }
        store_operand<EXPERT_SIZE, FP8, X_BYTES>(x[0], 1.0f / scales[0]);
        if (count == PAIR) store_operand<EXPERT_SIZE, FP8, X_BYTES + OPERAND_BYTES>(x[1], 1.0f / scales[1]);
        operand_is_there();
    }

    // The stored operands times two experts' second matrices. factors: of the experts.
    __device__ __forceinline__ float project(const float (&factors)[PAIR], int place, int count, Share own) {
        const int stages = (own.count + DOWN_ROWS - 1) / DOWN_ROWS;
        wait_for_numbers();
        multiply<EXPERT_SIZE, FP8, false, X_BYTES>(stages, 0);
        if (count == PAIR) multiply<EXPERT_SIZE, FP8, false, X_BYTES + OPERAND_BYTES>(stages, OWN);
        sync_consumers();
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < PAIR; ++i) {
            if (i >= count || thread >= own.count) break;
            const float scale = FP8 ? board->down_scales[place + i][thread] : 1.0f;
            sum += dot_product<EXPERT_SIZE, FP8>(i * OWN + thread) * (factors[i] * scale);
        }
        return sum;
    }

    // What some experts add to this thread's element of the residual stream: the first product of all, by pairs, then the
    // second, so that blocks seldom wait for what others activate. activated: [count, EXPERT_SIZE].
    __device__ __forceinline__ float compute(const Layer& layer, int count, const int* chosen, float scale,
                                             float* activated, Share own) {
        const int last = (count - 1) / PAIR * PAIR;  // pair
        Activated x;
        fetch_scales(layer, count, chosen, own);
#pragma unroll 1
        for (int place = 0; place < count; place += PAIR) {
            if (place && place == last) look_at_pair(x, activated, PAIR);
            activate(pair_at(place, count), scale, activated + place * EXPERT_SIZE);
            ++activations;
        }
        if (!last) {
            approach(ACTIVATED, activations);
            look_at_pair(x, activated, count);
        }
        float sum = 0.0f;
#pragma unroll 1
        for (int place = 0; place < count; place += PAIR) {
            const int num = min(PAIR, count - place), next = place + PAIR;
            float factors[PAIR] = {1.0f, 1.0f};
            store_pair(x, activated + place * EXPERT_SIZE, num, factors);
            if (next < count) look_at_pair(x, activated + next * EXPERT_SIZE, count - next);
            if (chosen)
#pragma unroll
                for (int i = 0; i < PAIR; ++i)
                    if (i < num) factors[i] *= board->weights[place + i];
            sum += project(factors, place, num, own);
        }
        return sum;
    }

    // All phases of a layer's experts. parity: of the barrier that the producer chose.
    __device__ __forceinline__ void experts(const Layer& layer, u32 parity, Share own, float& residual) {
        Vector<HIDDEN> norm, x;
        read_bf16<HIDDEN>(norm, layer.mlp_norm);
        approach(BETWEEN);
        fetch<HIDDEN>(x, between, tag);
        const float2 factors = normed<FP8>(x, norm);
        const float inverse = factors.x, scale = factors.y;
        route(x, inverse);
        store_operand<HIDDEN, FP8>(x, inverse * (1.0f / scale));
        operand_is_there();
#pragma unroll 1
        for (int pass = ALWAYS ? 0 : 1; pass < 2; ++pass) {  // the shared experts, then the chosen ones
            if (pass) wait(&board->chosen, parity);
            residual += compute(layer, pass ? TOP_K : ALWAYS, pass ? board->experts : nullptr, scale,
                                pass ? work->activated : work->shared, own);
        }
        if (thread < own.count) publish(hidden + own.first + thread, residual);
        end(LAYER_DONE);
    }

    // ---- the decoder

    __device__ __forceinline__ void run(const Layer* layers, const u16* embedding, const u16* last_norm,
                                        const float* cos, const float* sin, int position, i64 token, float* logits) {
        const Share own = share_of(HIDDEN);
        const Span span = span_of(position);
        const u16* embedded = embedding + token * HIDDEN;
        float residual = thread < own.count ? from_bf16(__ldg(embedded + own.first + thread)) : 0.0f;
        cos += (i64)position * HALF;
        sin += (i64)position * HALF;
        for (int index = 0; index < LAYERS; ++index) {
            const Layer& layer = layers[index];
            renew(work);
            renew(thread);
            renew(warp);
            renew(lane);
            const bool is_dense = index < DENSE_LAYERS;
            project_in<PROJECTED>(layer.attention_norm, layer.q_kv_a, index ? nullptr : embedded, work->projected,
                                  is_dense ? index : index - DENSE_LAYERS, is_dense ? DENSE_LAYERS : EXPERT_LAYERS);
            absorb(cos, sin);
            end(ABSORBED_IN);
            if (blockIdx.x == BLOCKS - 1) write_entry(layer, position, cos, sin);
            if (blockIdx.x < span.num_splits) attend(span, position);
            end(ATTENDED);
            for (int unit = blockIdx.x; unit < VALUE_UNITS; unit += BLOCKS) make_values(unit, span.num_splits);
            end(VALUES_MADE);
            residual_gemv<VALUES, false>(layer.o, work->attention, own, residual);
            if (is_dense) {
                mlp<INTERMEDIATE>(layer.mlp_norm, layer.gate_up, layer.down, work->dense, own, residual);
            } else {
                experts(layer, (index - DENSE_LAYERS) % 2, own, residual);
            }
        }
        project_head<VOCAB>(last_norm, logits);
        if (blockIdx.x < span.num_splits) clear_split();
    }
};

extern "C" __global__ void __launch_bounds__(ALL_THREADS, 1)
    persistent_decode(const i64* ids, const i64* last_tokens, const i64* positions, const u16* embedding,
                      const u16* last_norm, const u8* head, const float* cos, const float* sin, const Layer* layers,
                      const int* table, Work* work, u64* const* peer_buffers, const u32* given_up, float* logits) {
    Board* board = (Board*)(memory + BOARD_AT);
    if (threadIdx.x == 0) {
        init_ring();
        init_barrier(&board->chosen, 1);
    }
    barriers_are_ready();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const i64 position = positions[0];
    if (position < 0) return;  // the row holds no token
    const u32 sequence = look1(&work->grid.sequence);
    if (warp >= WARPS) {
        give_registers();
        if (warp > WARPS) return;
        LatentProducer{{{}, lane, read_once()}, board, work}.run(layers, head, table, (int)position, sequence);
        return;
    }
    take_registers();
    const i64 id = ids[0], token = id < 0 ? last_tokens[0] : id;
    LatentConsumer consumer{{{}, &work->grid, work->hidden, work->between, peer_buffers, given_up,
                             (int)threadIdx.x, warp, lane, sequence},
                            board, work, table};
    consumer.run(layers, embedding, last_norm, cos, sin, (int)position, token, logits);
    consumer.leave();
}
