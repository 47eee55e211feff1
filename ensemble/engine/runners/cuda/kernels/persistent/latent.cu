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
constexpr int PIECES = ENTRY / 8;               // 16 bytes of an entry
constexpr int SHARE_STRIDE = 24, SCORE_STRIDE = 20;
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
constexpr int MOST = TOP_K > ALWAYS ? TOP_K : ALWAYS;  // experts computed at a time
constexpr int DOWN_ROWS = Tiling<EXPERT_SIZE * ELEMENT>::ROWS;
constexpr int OWN = (HIDDEN + BLOCKS - 1) / BLOCKS;    // elements of the residual stream of a block, at most
constexpr int OPERAND_FACTOR = FP8 ? 2 : 4;  // bytes of an element of operand B
constexpr int EXPERT_LANES = (EXPERTS + 31) / 32;

static_assert(HEADS <= MAX_HEADS && LATENT % (16 * WARPS) == 0 && ENTRY % 16 == 0, "attention's tiles");
static_assert(LATENT <= 4 * THREADS && THREADS % (LATENT / 8) == 0, "threads share a latent evenly");
static_assert(UNIT <= 16 && UNIT * ENTRY_STRIDE <= STAGE_BYTES, "a stage is too small for a unit");
static_assert(2 * NOPE * ABSORBED <= STAGE_BYTES && 4 * HIDDEN <= STAGE_BYTES, "a stage is too small");
static_assert(NOPE + HALF <= THREADS && NOPE % WARPS == 0 && VALUE % VALUE_ROWS == 0, "threads share a head");
static_assert(EXPERT_SIZE % CHUNK == 0 && EXPERT_SIZE % 16 == 0, "whole stages of an expert");
static_assert((MOST * CHUNKS + BLOCKS - 1) / BLOCKS * CHUNK <= MAX_PAIRS, "a thread sums one pair of rows");
static_assert(MOST * ((OWN + DOWN_ROWS - 1) / DOWN_ROWS) * DOWN_ROWS <= MAX_SUMS && MOST <= 32,
              "sums of all experts are kept; a lane has an expert");

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
    float activated[INTERMEDIATE > TOP_K * EXPERT_SIZE ? INTERMEDIATE : TOP_K * EXPERT_SIZE];
    float shared[(ALWAYS ? ALWAYS : 1) * EXPERT_SIZE];
    u16 partial[BLOCKS][MAX_HEADS][LATENT];  // bfloat16
    float maxima[BLOCKS][MAX_HEADS];
    float sums[BLOCKS][MAX_HEADS];
    u64 logits[EXPERTS];  // as `send` writes them: each with its number
    alignas(16) u16 queries[MAX_HEADS][ENTRY];  // read 16 bytes at a time
    Grid grid;  // zeros at first; each kernel leaves zeros again, except in `sequence`
};
static_assert(sizeof(Work) <= WORK_BYTES, "the buffer is too small");

// What the producer and the consumers tell each other in shared memory, and the consumers themselves.
struct Board {
    u64 chosen;  // barrier: experts and weights are there
    int experts[TOP_K];
    float weights[TOP_K];
    float token_scales[MOST];
    float sums[WARPS];
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
    const u32* given_up;

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

    // This block's rows of gate and up of several experts. mine: a lane's expert.
    __device__ __forceinline__ void gates(const u8* weight, int count, int mine) {
        const Share chunks = share_of(count * CHUNKS);
#pragma unroll 1
        for (int i = 0; i < 2 * chunks.count; ++i) {
            const int chunk = chunks.first + i / 2, expert = __shfl_sync(~0u, mine, chunk / CHUNKS);
            const int row = (expert * 2 + i % 2) * EXPERT_SIZE + chunk % CHUNKS * CHUNK;
            rows<HIDDEN * ELEMENT>(weight, {row, CHUNK});
        }
    }

    __device__ __forceinline__ void downs(const u8* weight, int count, int mine, Share own) {
#pragma unroll 1
        for (int i = 0; i < count; ++i) {
            const int expert = __shfl_sync(~0u, mine, i);
            rows<EXPERT_SIZE * ELEMENT>(weight, {expert * HIDDEN + own.first, own.count});
        }
    }

    // Wait for the router's logits and choose: lane i's result is the i-th expert. number: the logits'.
    __device__ __forceinline__ int choose(const float* bias, u32 number) {
        float scores[EXPERT_LANES];
        u32 ranks[EXPERT_LANES];
        float largest = MASKED_SCORE, sum = 0.0f;
#pragma unroll
        for (int i = 0; i < EXPERT_LANES; ++i) {
            const int expert = i * 32 + lane;
            scores[i] = expert < EXPERTS ? receive(work->logits + expert, number, given_up) : MASKED_SCORE;
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

    __device__ __forceinline__ void run(const Layer* layers, const u8* head, const int* table, int position, u32 number) {
        const Span span = span_of(position);
        const Share own = share_of(HIDDEN);
        for (int i = 0; i < LAYERS; ++i) {
            const Layer& layer = layers[i];
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
            if (ALWAYS) {
                gates(layer.gate_up.weight, ALWAYS, EXPERTS + lane);
                downs(layer.down.weight, ALWAYS, EXPERTS + lane, own);
            }
            const int mine = choose(layer.bias, ++number);
            gates(layer.gate_up.weight, TOP_K, mine);
            downs(layer.down.weight, TOP_K, mine, own);
        }
        rows<HIDDEN * 2>(head, share_of(VOCAB));
    }
};

// ---- the consumers

struct LatentConsumer : Consumer {
    Board* board;
    Work* work;
    const int* table;  // slot 0's blocks of the cache
    u32 number;        // of logits

    // ---- attention

    // Rotate channels r and r + HALF.
    __device__ __forceinline__ void rotate(u16* target, const float* source, int r, const float* cos, const float* sin) {
        const float a = load1(source + r), b = load1(source + HALF + r), c = __ldg(cos + r), s = __ldg(sin + r);
        target[r] = bits_of(a * c - b * s);
        target[HALF + r] = bits_of(b * c + a * s);
    }

    // Half a phase: multiply the heads' queries with the rows of kv_b that make keys.
    __device__ __forceinline__ void absorb(const float* cos, const float* sin) {
        float* x = (float*)scratch;
        const int r = thread - (THREADS - HALF);
        for (int unit = blockIdx.x; unit < ABSORB_UNITS; unit += BLOCKS) {
            const int head = unit / TILES, tile = unit % TILES;
            const float* query = work->projected + head * QUERY;
            if (thread < NOPE) x[thread] = rounded(load1(query + thread));
            if (tile == 0 && r >= 0) rotate(work->queries[head] + LATENT, query + NOPE, r, cos, sin);
            sync_consumers();
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
            if (thread < ABSORBED) {
                float sum = 0.0f;
#pragma unroll
                for (int i = 0; i < WARPS; ++i) sum += parts[i * ABSORBED + thread];
                work->queries[head][tile * ABSORBED + thread] = bits_of(sum);
            }
        }
    }

    // The other half: the new token's entry.
    __device__ __forceinline__ void write_entry(const Layer& layer, int position, const float* cos, const float* sin) {
        u16* target = layer.entries + entry_offset(table, position);
        const float* source = work->projected + Q_SIZE;
        const int r = thread - (THREADS - HALF);
        Vector<LATENT> norm, x;
        read_bf16<LATENT>(norm, layer.kv_norm);
        read<LATENT>(x, source);
        if (r >= 0) rotate(target + LATENT, source + LATENT, r, cos, sin);
        float squares = 0.0f, unused = 0.0f;
        times<LATENT>(x, norm, squares);
        reduce(squares, unused);
        const float inverse = rsqrtf(squares / LATENT + INNER_EPS);
        if (!holds<LATENT>(thread, 0)) return;
        const float4 v = x.values[0];
        *(uint2*)(target + thread * 4) = {to_bf16x2(v.x * inverse, v.y * inverse),
                                          to_bf16x2(v.z * inverse, v.w * inverse)};
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
    __device__ __forceinline__ void attend(const u16* entries, const Span& span, int position) {
        Attention& at = *(Attention*)scratch;
        Scores* scores = (Scores*)parts;  // [SCORE_PARTS]
        const u32 stages = shared_address(memory), queries = shared_address(at.queries);
        const u32 zeros = shared_address(at.zeros);
        const u32 row = lane % 16, half = lane / 16 * 16;  // of a lane's address for ldmatrix; in bytes
        for (int i = thread; i < MAX_HEADS * PIECES; i += THREADS) {
            const int head = i / PIECES, piece = i % PIECES;
            const uint4 v = head < HEADS ? load16(work->queries[head] + piece * 8) : uint4{};
            *(uint4*)(at.queries + head * ENTRY_STRIDE + piece * 16) = v;
        }
        if (thread < ENTRY_STRIDE / 16) ((uint4*)at.zeros)[thread] = {};
        sync_consumers();
        const int head = thread / 16, column = thread % 16, tile = warp / SCORE_PARTS, part = warp % SCORE_PARTS;
        float largest = MASKED_SCORE, total = 0.0f;
        float sums[COLUMNS / 8][4] = {};
        for (int unit = span.first; unit < span.last; ++unit) {
            const int first = unit * UNIT;
            wait(ring.full(), ring.parity);
            if (position < first + UNIT) add_entry(entries, first, position);
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
            work->maxima[blockIdx.x][head] = largest;
            work->sums[blockIdx.x][head] = total;
        }
        sync_consumers();
        const float low = at.corrections[lane / 4], high = at.corrections[lane / 4 + 8];
#pragma unroll
        for (int i = 0; i < COLUMNS / 8; ++i) {
            const int to = warp * COLUMNS + i * 8 + lane % 4 * 2;
            *(u32*)&work->partial[blockIdx.x][lane / 4][to] = to_bf16x2(sums[i][0] * low, sums[i][1] * low);
            *(u32*)&work->partial[blockIdx.x][lane / 4 + 8][to] = to_bf16x2(sums[i][2] * high, sums[i][3] * high);
        }
    }

    // Put the new token's entry into the stage, and zeros behind it: what lay there may be no numbers.
    __device__ __forceinline__ void add_entry(const u16* entries, int first, int position) {
        const u16* source = entries + entry_offset(table, position);
        for (int i = thread; i < (first + UNIT - position) * PIECES; i += THREADS) {
            const int behind = i / PIECES, piece = i % PIECES;
            const uint4 v = behind ? uint4{} : load16(source + piece * 8);
            *(uint4*)(ring.stage() + (position - first + behind) * ENTRY_STRIDE + piece * 16) = v;
        }
        fence_copies();
        sync_consumers();
    }

    // Merge the splits of what one head attended to, in their order, and make VALUE_ROWS of its values.
    __device__ __forceinline__ void make_values(int unit, int num_splits) {
        constexpr int OCTETS = LATENT / 8, GROUPS = THREADS / OCTETS;  // groups of threads; each takes every GROUPS-th split
        constexpr int COUNT = (BLOCKS + 31) / 32, EARLY = 5;
        float* others = (float*)(scratch + 4 * LATENT);  // [GROUPS, LATENT]
        float* weights = others + GROUPS * LATENT;       // [BLOCKS]
        const int head = unit * VALUE_ROWS / VALUE, group = thread / OCTETS, column = thread % OCTETS * 8;
        uint4 early[EARLY];  // loaded while the weights are computed
#pragma unroll
        for (int i = 0; i < EARLY; ++i)
            if (group + i * GROUPS < num_splits) early[i] = load16(&work->partial[group + i * GROUPS][head][column]);
        if (warp == 0) {
            float maxima[COUNT], sums[COUNT], largest = MASKED_SCORE, sum = 0.0f;
#pragma unroll
            for (int i = 0; i < COUNT; ++i) {
                const int split = i * 32 + lane;
                maxima[i] = split < num_splits ? load1(&work->maxima[split][head]) : MASKED_SCORE;
                sums[i] = split < num_splits ? load1(&work->sums[split][head]) : 0.0f;
                largest = fmaxf(largest, maxima[i]);
            }
            largest = warp_max(largest);
#pragma unroll
            for (int i = 0; i < COUNT; ++i) {
                sums[i] *= exp2f(maxima[i] - largest);
                sum += sums[i];
            }
            sum = 1.0f / warp_sum(sum);
#pragma unroll
            for (int i = 0; i < COUNT; ++i)
                if (i * 32 + lane < num_splits) weights[i * 32 + lane] = sums[i] * sum;
        }
        sync_consumers();
        float merged[8] = {};
#pragma unroll
        for (int i = 0; i < EARLY; ++i)
            if (group + i * GROUPS < num_splits) add(merged, weights[group + i * GROUPS], early[i]);
#pragma unroll 4
        for (int split = group + EARLY * GROUPS; split < num_splits; split += GROUPS)
            add(merged, weights[split], load16(&work->partial[split][head][column]));
#pragma unroll
        for (int i = 0; i < 2; ++i)
            *(float4*)(others + group * LATENT + column + i * 4) = {merged[4 * i], merged[4 * i + 1], merged[4 * i + 2],
                                                                    merged[4 * i + 3]};
        sync_consumers();
        Vector<LATENT> x;
        if (holds<LATENT>(thread, 0)) {
            float4& sum = x.values[0];
            sum = {};
#pragma unroll
            for (int i = 0; i < GROUPS; ++i) {
                const float4 v = *(const float4*)(others + i * LATENT + thread * 4);
                sum = {sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w};
            }
        }
        store_operand<LATENT, false>(x, 1.0f);
        multiply_rows<LATENT, false>(VALUE_ROWS);
        if (thread < VALUE_ROWS) work->attention[unit * VALUE_ROWS + thread] = dot_product<LATENT, false>(thread);
    }

    static __device__ __forceinline__ void add(float (&sums)[8], float weight, uint4 v) {
        const u32 pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            sums[2 * i] += weight * from_bf16(pairs[i] & 0xffff);
            sums[2 * i + 1] += weight * __uint_as_float(pairs[i] & 0xffff0000);
        }
    }

    // ---- experts

    static constexpr int X_BYTES = HIDDEN * OPERAND_FACTOR, OPERAND_BYTES = EXPERT_SIZE * OPERAND_FACTOR;
    static_assert(X_BYTES + MOST * OPERAND_BYTES <= SCRATCH_BYTES, "scratch is too small");

    // This block's logits of the router, which reads the norm in bfloat16. x · inverse: the norm.
    __device__ __forceinline__ void route(const Vector<HIDDEN>& x, float inverse) {
        ++number;
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
                send(work->logits + expert, logit, number);
            }
            if (expert + BLOCKS < EXPERTS) sync_consumers();
        }
    }

    // silu(gate) up of this block's rows of some experts, of the token in `scratch`. chosen: null: the shared ones.
    __device__ __forceinline__ void activate(const Matrix& gate_up, int count, const int* chosen, float scale,
                                             float* out) {
        const Share chunks = share_of(count * CHUNKS);
        const int row = chunks.first * CHUNK + thread, slot = row / EXPERT_SIZE;
        const bool is_mine = thread < chunks.count * CHUNK;
        float gate = 1.0f, up = 1.0f;
        if (FP8 && is_mine) {
            const int expert = chosen ? chosen[slot] : EXPERTS + slot;
            const float* scales = gate_up.scale + expert * 2 * EXPERT_SIZE + row % EXPERT_SIZE;
            gate = __ldg(scales);
            up = __ldg(scales + EXPERT_SIZE);
        }
        multiply_gate_up(2 * chunks.count);
        if (is_mine) {
            const float g = dot_product<HIDDEN, FP8>(thread) * (gate * scale);
            const float u = dot_product<HIDDEN, FP8>(MAX_PAIRS + thread) * (up * scale);
            out[row] = silu(g) * u;
        }
        arrive_at_grid();
    }

    // What some experts add to this thread's element of the residual stream. activated: [count, EXPERT_SIZE], which other
    // blocks are still writing. chosen: null: the shared ones.
    __device__ __forceinline__ float project(const Matrix& down, int count, const int* chosen, const float* activated,
                                             Share own) {
        const bool is_mine = thread < own.count;
        float factors[MOST];
#pragma unroll
        for (int i = 0; i < MOST; ++i) {
            if (i >= count) break;
            factors[i] = chosen ? board->weights[i] : 1.0f;
            if (FP8 && is_mine)
                factors[i] *= __ldg(down.scale + (chosen ? chosen[i] : EXPERTS + i) * HIDDEN + own.first + thread);
        }
        wait_for_grid();
        for (int i = warp; i < count; i += WARPS) store_activated(scratch + X_BYTES + i * OPERAND_BYTES, activated, i);
        sync_consumers();
        const int each = (own.count + DOWN_ROWS - 1) / DOWN_ROWS;
        multiply<EXPERT_SIZE, FP8, false>(count * each, X_BYTES, each);
        sync_consumers();
        float sum = 0.0f;
        if (is_mine) {
#pragma unroll
            for (int i = 0; i < MOST; ++i) {
                if (i >= count) break;
                sum += dot_product<EXPERT_SIZE, FP8>(i * each * DOWN_ROWS + thread) * (factors[i] * board->token_scales[i]);
            }
        }
        sync_consumers();
        return sum;
    }

    // One warp stores one expert's row as operand B.
    __device__ __forceinline__ void store_activated(u8* operand, const float* activated, int expert) {
        constexpr int EACH = (EXPERT_SIZE + 127) / 128;
        const float* source = activated + expert * EXPERT_SIZE;
        float4 values[EACH];
        float largest = 0.0f;
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const int element = i * 128 + lane * 4;
            if (element < EXPERT_SIZE) values[i] = load4(source + element);
        }
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const float4 v = values[i];
            if (i * 128 + lane * 4 < EXPERT_SIZE)
                largest = fmaxf(largest, fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w))));
        }
        const float scale = FP8 ? token_scale(warp_max(largest)) : 1.0f, inverse = 1.0f / scale;
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const int element = i * 128 + lane * 4;
            if (element < EXPERT_SIZE) store_four<EXPERT_SIZE, FP8>(operand, element, values[i], inverse);
        }
        if (lane == 0) board->token_scales[expert] = scale;
    }

    // All phases of a layer's experts. parity: of the barrier that the producer chose.
    __device__ __forceinline__ void experts(const Layer& layer, u32 parity, Share own, float& residual) {
        Vector<HIDDEN> norm, x;
        read_bf16<HIDDEN>(norm, layer.mlp_norm);
        wait_for_grid();
        read<HIDDEN>(x, hidden);
        const float2 factors = normed<FP8>(x, norm);
        const float inverse = factors.x, scale = factors.y;
        route(x, inverse);
        store_operand<HIDDEN, FP8>(x, inverse * (1.0f / scale));
#pragma unroll 1
        for (int pass = ALWAYS ? 0 : 1; pass < 2; ++pass) {  // the shared experts, then the chosen ones
            const int count = pass ? TOP_K : ALWAYS;
            const int* chosen = pass ? board->experts : nullptr;
            float* activated = pass ? work->activated : work->shared;
            if (pass) wait(&board->chosen, parity);
            activate(layer.gate_up, count, chosen, scale, activated);
            residual += project(layer.down, count, chosen, activated, own);
        }
        if (thread < own.count) hidden[own.first + thread] = residual;
        arrive_at_grid();
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
            project_in<PROJECTED>(layer.attention_norm, layer.q_kv_a, index ? nullptr : embedded, work->projected);
            const bool writes_entry = blockIdx.x == BLOCKS - 1;
            if (blockIdx.x < ABSORB_UNITS || writes_entry) {
                wait_for_grid();
                absorb(cos, sin);
                if (writes_entry) write_entry(layer, position, cos, sin);
            }
            arrive_at_grid();
            if (blockIdx.x < span.num_splits) {
                wait_for_grid();
                attend(layer.entries, span, position);
            }
            arrive_at_grid();
            if (blockIdx.x < VALUE_UNITS) {
                wait_for_grid();
                for (int unit = blockIdx.x; unit < VALUE_UNITS; unit += BLOCKS) make_values(unit, span.num_splits);
            }
            arrive_at_grid();
            residual_gemv<VALUES>(layer.o, work->attention, own, residual);
            if (index < DENSE_LAYERS) {
                mlp<INTERMEDIATE>(layer.mlp_norm, layer.gate_up, layer.down, work->activated, own, residual);
            } else {
                experts(layer, (index - DENSE_LAYERS) % 2, own, residual);
            }
        }
        project_head<VOCAB>(last_norm, logits);
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
    const u32 number = load1(&work->grid.sequence);
    if (warp >= WARPS) {
        give_registers();
        if (warp > WARPS) return;
        LatentProducer{{{}, lane, read_once()}, board, work, given_up}.run(layers, head, table, (int)position, number);
        return;
    }
    take_registers();
    const i64 id = ids[0], token = id < 0 ? last_tokens[0] : id;
    LatentConsumer consumer{{{}, &work->grid, work->hidden, peer_buffers, given_up,
                             (int)threadIdx.x, warp, lane, 0},
                            board, work, table, number};
    consumer.run(layers, embedding, last_norm, cos, sin, (int)position, token, logits);
    consumer.leave(LAYERS - DENSE_LAYERS);
}
