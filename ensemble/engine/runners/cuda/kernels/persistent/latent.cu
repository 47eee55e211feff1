// A decoder of latent attention and experts; its first layers may have dense MLPs. Phases of a layer:
//   projected = norm(hidden) Wq_kv_a | queries absorbed, the new token's entry |
//   attention, by groups of heads and splits of the entries | values of what was attended to | hidden += values Wo |
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
//   BIASED        1: scores have a bias for the choice
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
constexpr int SHARE_PADDING = 8, SCORE_PADDING = 4, SORTED_STRIDE = LATENT / 2 + 4;
constexpr int SCORE_PARTS = 4;  // warps that share a tile of scores
constexpr int SCORE_STEPS = (ENTRY / 16 + SCORE_PARTS - 1) / SCORE_PARTS;  // products of a warp
constexpr int COLUMNS = LATENT / WARPS;  // of what is attended to, of a warp
constexpr int ABSORBED = 64;             // columns of a head's query that a block absorbs at a time
constexpr int TILES = LATENT / ABSORBED;
constexpr int ABSORB_UNITS = HEADS * TILES;
constexpr int VALUE_ROWS = 16;  // values that a block makes at a time
constexpr int VALUE_UNITS = VALUES / VALUE_ROWS;
constexpr int FEW_HEADS = 4;    // that blocks attend with at least, see Splits
constexpr int LAST_OF = 16;     // one of so many of a group may be missing when a block looks for their numbers
constexpr int BATCH_UNITS = 4;  // units that are attended to at once, at most
constexpr int CHUNK = Tiling<HIDDEN * ELEMENT>::ROWS;  // rows of gate in a stage
constexpr int CHUNKS = EXPERT_SIZE / CHUNK;
// Stages in flight while blocks have much to tell each other. With the chosen experts memory is the limit.
constexpr int FEW_IN_FLIGHT = IN_FLIGHT < 2 ? IN_FLIGHT : 2;
constexpr int PAIR = 2;  // experts computed together
constexpr int MOST_EXPERTS = TOP_K > ALWAYS ? TOP_K : ALWAYS, MOST_PAIRS = (MOST_EXPERTS + PAIR - 1) / PAIR;
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
    const u16* kv_b;       // [HEADS, NOPE + VALUE, LATENT] bfloat16
    const u16* key_tiles;  // its rows that make keys, [HEADS, TILES, NOPE, ABSORBED]
    Matrix o;
    Matrix gate_up, down;  // of a dense MLP; or [EXPERTS + ALWAYS, …]
    const float* router;   // [EXPERTS, HIDDEN]
    const float* bias;     // [EXPERTS], added for the choice alone; or null, if not BIASED
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

// Where a position's entry is in `entries`.
__device__ __forceinline__ i64 entry_offset(const int* table, int position) {
#if PAGE
    return ((i64)__ldg(table + position / PAGE) * PAGE + position % PAGE) * ENTRY;
#else
    return (i64)position * ENTRY;
#endif
}

// Groups of blocks attend with some heads each, and share out the text's units. The fewer heads a group has, the fewer blocks
// tell each other what they found, and the more groups read the same entries, from L2: so the longer a text, the more heads
// (benchmarks/decode_gpu_notes.md).
struct Splits {
    int heads;   // of a group
    int blocks;  // of a group
    int units;   // of the text
    int each;    // units of a block
    int count;   // blocks of a group that have some

    // Of a head.
    __device__ __forceinline__ int group(int head) const { return head / heads; }

    // The block with a head's split.
    __device__ __forceinline__ int owner(int head, int split) const { return group(head) * blocks + split; }
};

__device__ constexpr int fewest_heads() {
    int heads = HEADS;
    while (heads % 2 == 0 && heads > FEW_HEADS && HEADS / heads * 2 <= BLOCKS) heads /= 2;
    return heads;
}

__device__ __forceinline__ Splits splits_of(int position) {
    int heads = fewest_heads(), blocks = BLOCKS / (HEADS / heads);
    const int units = position / UNIT + 1;
    while (heads < HEADS && units > heads * blocks) {
        heads *= 2;
        blocks = BLOCKS / (HEADS / heads);
    }
    const int each = (units + blocks - 1) / blocks;
    return {heads, blocks, units, each, (units + each - 1) / each};
}

// What a block attends to: units, with the heads from `head` on; no units: with none.
struct Span {
    int head, first, last;

    __device__ __forceinline__ bool is_empty() const { return first >= last; }
};

__device__ __forceinline__ Span span_of(const Splits& splits) {
    const int head = blockIdx.x / splits.blocks * splits.heads, first = blockIdx.x % splits.blocks * splits.each;
    return {head, first, head < HEADS ? min(first + splits.each, splits.units) : first};
}

// The producer brings a layer's addresses to shared memory while it copies the layer before. It is at most a layer ahead of the
// consumers, because its choice of experts waits for what they make of the layer; but layers without experts don't hold it.
constexpr int KNOWN_LAYERS = DENSE_LAYERS + 2 > 3 ? DENSE_LAYERS + 2 : 3;
constexpr int LAYER_WORDS = sizeof(Layer) / 8;
static_assert(LAYER_WORDS <= 32, "a lane brings a word");

// What the producer and the consumers tell each other in shared memory, and the consumers themselves.
struct Board {
    u64 chosen;  // barrier: `experts` and the logits are there
    Layer layers[KNOWN_LAYERS];
    Splits splits;
    Span span;
    int experts[TOP_K];
    float scores[EXPERTS];  // the router's logits; then, at the beginning, weights of `experts`
    float sums[WARPS];
    float scales[MOST_PAIRS][2][PAIR_ROWS];  // of rows of gate and of up
    float down_scales[MOST_EXPERTS][OWN];
};
static_assert(sizeof(Board) <= BOARD_BYTES, "shared memory is too small");

// This block's chunks of the rows of so many experts; turn: for blocks take turns in having one more.
__device__ __forceinline__ Share chunks_of(int experts, int turn) {
    const int block = (blockIdx.x + turn) % BLOCKS, first = experts * CHUNKS * block / BLOCKS;
    return {first, experts * CHUNKS * (block + 1) / BLOCKS - first};
}

__device__ __forceinline__ u16 bits_of(float v) { return (u16)to_bf16x2(v, 0.0f); }

// What a warp needs to turn the router's logits into scores; a lane has some of them.
struct Softmax {
    float largest = 0.0f, factor = 1.0f;

    static __device__ __forceinline__ Softmax of(const float (&logits)[EXPERT_LANES]) {
        if (SIGMOID) return {};
        float largest = logits[0], sum = 0.0f;
#pragma unroll
        for (int i = 1; i < EXPERT_LANES; ++i) largest = fmaxf(largest, logits[i]);
        largest = warp_max(largest);
#pragma unroll
        for (int i = 0; i < EXPERT_LANES; ++i) sum += __expf(logits[i] - largest);
        return {largest, 1.0f / warp_sum(sum)};
    }
};

__device__ __forceinline__ float score_of(float logit, const Softmax& softmax) {
    return SIGMOID ? 1.0f / (1.0f + __expf(-logit)) : __expf(logit - softmax.largest) * softmax.factor;
}

// Unsigned numbers in the order of the floats.
__device__ __forceinline__ u32 ordered(float v) {
    const u32 bits = __float_as_uint(v);
    return bits & 0x80000000 ? ~bits : bits | 0x80000000;
}

// ---- the producer

struct LatentProducer : Producer {
    Board* board;
    Work* work;

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

    // What comes before the experts. One call copies all but the cache: more calls would be more instructions, which have a
    // cache too.
    __device__ __forceinline__ void before_experts(const Layer& layer, const int* table, int position, bool has_router) {
        const Share own = share_of(HIDDEN);
        enum { PROJECTING, ABSORBING, MAKING_VALUES, ADDING, ROUTING, ALL };
#pragma unroll 1
        for (int i = 0; i < (has_router ? ALL : ROUTING); ++i) {
            if (i == MAKING_VALUES) cache(layer.entries, board->span, table, position);
            // A block has one unit, or those that are a multiple of BLOCKS further on too.
            const int units = i == ABSORBING       ? ABSORB_UNITS
                              : i == MAKING_VALUES ? VALUE_UNITS
                              : i == ROUTING       ? EXPERTS
                                                   : BLOCKS;
#pragma unroll 1
            for (int unit = blockIdx.x; unit < units; unit += BLOCKS) {
                const int head = unit * VALUE_ROWS / VALUE;
                copy_run(i == PROJECTING  ? run_of<HIDDEN * ELEMENT>(layer.q_kv_a.weight, share_of(PROJECTED))
                         : i == ABSORBING ? Run{(const u8*)(layer.key_tiles + (i64)unit * NOPE * ABSORBED),
                                                NOPE * ABSORBED * 2, NOPE * ABSORBED * 2}
                         : i == MAKING_VALUES
                             ? run_of<LATENT * 2>((const u8*)layer.kv_b, {(head + 1) * NOPE + unit * VALUE_ROWS, VALUE_ROWS})
                         : i == ADDING    ? run_of<VALUES * ELEMENT>(layer.o.weight, own)
                                          : Run{(const u8*)(layer.router + (i64)unit * HIDDEN), HIDDEN * 4, HIDDEN * 4});
            }
        }
    }

    // This block's rows of some experts, in the consumers' order: see LatentConsumer::compute. mine: a lane's expert.
    __device__ __forceinline__ void experts(const Layer& layer, int count, int mine, Share own) {
#pragma unroll 1
        for (int place = 0; place < count + PAIR; place += PAIR) {
            const Share chunks = chunks_of(max(0, min(PAIR, count - place)), place / PAIR);
            const int firsts = 2 * chunks.count, before = max(0, place - PAIR), seconds = min(place, count) - before;
#pragma unroll 1
            for (int i = 0; i < firsts + seconds; ++i) {
                const int chunk = chunks.first + i / 2;
                const int expert = __shfl_sync(~0u, mine, i < firsts ? place + chunk / CHUNKS : before + i - firsts);
                const int row = (expert * 2 + i % 2) * EXPERT_SIZE + chunk % CHUNKS * CHUNK;
                copy_run(i < firsts ? run_of<HIDDEN * ELEMENT>(layer.gate_up.weight, {row, CHUNK})
                                    : run_of<EXPERT_SIZE * ELEMENT>(layer.down.weight,
                                                                    {expert * HIDDEN + own.first, own.count}));
            }
        }
    }

    // Wait for the router's logits and choose: lane i's result is the i-th expert. tag: the logits'.
    __device__ __forceinline__ int choose(const float* bias, u32 tag) {
        float scores[EXPERT_LANES];  // of experts that lie side by side
        u32 ranks[EXPERT_LANES];
#pragma unroll
        for (int i = 0; i < EXPERT_LANES; ++i) {
            const int expert = lane * EXPERT_LANES + i;
            scores[i] = expert < EXPERTS ? look1(work->logits + expert) : MASKED_SCORE;
        }
#pragma unroll
        for (int i = 0; i < EXPERT_LANES; ++i) {
            const int expert = lane * EXPERT_LANES + i;
            if (expert < EXPERTS) scores[i] = await1(scores[i], work->logits + expert, tag);
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < EXPERT_LANES; ++i)
            if (lane * EXPERT_LANES + i < EXPERTS) board->scores[lane * EXPERT_LANES + i] = scores[i];
        if (SIGMOID || BIASED) {  // else logits have the scores' order
            const Softmax softmax = Softmax::of(scores);
#pragma unroll
            for (int i = 0; i < EXPERT_LANES; ++i) scores[i] = score_of(scores[i], softmax);
        }
        u32 best = 0;  // of this lane's
#pragma unroll
        for (int i = 0; i < EXPERT_LANES; ++i) {
            const int expert = lane * EXPERT_LANES + i;
            const float added = BIASED && expert < EXPERTS ? __ldg(bias + expert) : 0.0f;
            ranks[i] = expert < EXPERTS ? ordered(scores[i] + added) : 0;
            best = max(best, ranks[i]);
        }
#pragma unroll 1
        for (int place = 0; place < TOP_K; ++place) {
            const u32 first = __reduce_max_sync(~0u, best);
            const bool is_owner = lane == __ffs(__ballot_sync(~0u, best == first)) - 1;  // of equal ones the first
            int own = 0;
#pragma unroll
            for (int i = EXPERT_LANES - 1; i >= 0; --i) own = ranks[i] == first ? i : own;
            if (is_owner) board->experts[place] = min(lane * EXPERT_LANES + own, EXPERTS - 1);
            best = 0;
#pragma unroll
            for (int i = 0; i < EXPERT_LANES; ++i) {
                ranks[i] = is_owner && i == own ? 0 : ranks[i];
                best = max(best, ranks[i]);
            }
        }
        __syncwarp();
        if (lane == 0) arrive(&board->chosen);
        return lane < TOP_K ? board->experts[lane] : 0;
    }

    __device__ __forceinline__ void run(const Layer* layers, const u8* head, const int* table, int position, u32 sequence) {
        const Share own = share_of(HIDDEN);
        for (int i = 0; i < LAYERS; ++i) {
            const Layer& layer = board->layers[i % KNOWN_LAYERS];
            u64 word = 0;  // of the next layer's addresses, which take long to come
            if (i + 1 < LAYERS && lane < LAYER_WORDS) word = ((const u64*)(layers + i + 1))[lane];
            limit = FEW_IN_FLIGHT;
            before_experts(layer, table, position, i >= DENSE_LAYERS);
            if (lane < LAYER_WORDS) ((u64*)(board->layers + (i + 1) % KNOWN_LAYERS))[lane] = word;
            __syncwarp();
            if (i < DENSE_LAYERS) {
                gate_up(layer.gate_up.weight, INTERMEDIATE, share_of(INTERMEDIATE));
                rows<INTERMEDIATE * ELEMENT>(layer.down.weight, own);
                continue;
            }
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
            if (thread == 0) count(&grid->absorbed[board->splits.group(head)].count);
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

    // Rows of `shares` and `scores` are as long as the units of a batch need: fewer heads have larger batches.
    struct Attention {
        u8 queries[MAX_HEADS * ENTRY_STRIDE];
        u8 zeros[ENTRY_STRIDE];  // a head, or the entry of a position, that there isn't
        u16 shares[MAX_HEADS * (16 + SHARE_PADDING)];  // [heads, 16 batch + SHARE_PADDING] of positions, bfloat16
        float corrections[MAX_HEADS];
        float totals[MAX_HEADS];
    };
    typedef float Scores[MAX_HEADS * (16 + SCORE_PADDING)];  // [heads, 16 batch + SCORE_PADDING]
    static_assert(sizeof(Attention) <= SCRATCH_BYTES, "scratch is too small");
    static_assert(SCORE_PARTS * sizeof(Scores) <= 4 * WARPS * MAX_SUMS, "the partial sums' room is too small");

    // Units of so many heads that are attended to at once: the rows of `heads` have the room of MAX_HEADS rows of one unit.
    static __device__ __forceinline__ int batch_of(int heads) {
        return heads * BATCH_UNITS <= MAX_HEADS ? BATCH_UNITS : heads * 2 <= MAX_HEADS ? 2 : 1;
    }

    // Attend to this block's units.
    __device__ __forceinline__ void attend(int position) {
        Attention& at = *(Attention*)scratch;
        Scores* scores = (Scores*)parts;  // [SCORE_PARTS]
        const Span span = board->span;
        const int heads = board->splits.heads, batch = batch_of(heads);
        const int share_stride = 16 * batch + SHARE_PADDING, score_stride = 16 * batch + SCORE_PADDING;
        const int head = thread / 16, column = thread % 16, tile = warp / SCORE_PARTS, part = warp % SCORE_PARTS;
        const u32 row = lane % 16, half = lane / 16 * 16;  // of a lane's address for ldmatrix; in bytes
        const u32 zeros = shared_address(at.zeros);
        const u32 queries = (row < heads ? shared_address(at.queries) + row * ENTRY_STRIDE : zeros) + half;
        const u32 shares_at = shared_address(at.shares) + (row < heads ? row : 0) * share_stride * 2 + half;
        load_queries(at, heads, span.head);
        u32 own_queries[SCORE_STEPS][4];
#pragma unroll
        for (int i = 0; i < SCORE_STEPS; ++i) {
            if (i * SCORE_PARTS + part >= ENTRY / 16) break;
            load_four(own_queries[i], queries + (i * SCORE_PARTS + part) * 32);
        }
        const bool has_head = head < heads;
        const u32 key = tile * 8 + lane % 8;
        float largest = MASKED_SCORE, total = 0.0f;
        float sums[COLUMNS / 8][4] = {};
        for (int unit = span.first; unit < span.last; unit += batch) {
            const int first = unit * UNIT, count = min(batch, span.last - unit);
            Ring unit_ring = ring;
#pragma unroll 1
            for (int i = 0; i < count; ++i) {
                wait(unit_ring.full(), unit_ring.parity);
                if (position < first + (i + 1) * UNIT) add_entry(unit_ring.stage(), first + i * UNIT, position);
                const u32 keys = (key < UNIT ? shared_address(unit_ring.stage()) + key * ENTRY_STRIDE : zeros) + lane / 8 % 2 * 16;
                float products[4] = {};
#pragma unroll
                for (int j = 0; j < SCORE_STEPS; ++j) {
                    if (j * SCORE_PARTS + part >= ENTRY / 16) break;
                    const u32(&a)[4] = own_queries[j];
                    u32 b[2];
                    load_two(b, keys + (j * SCORE_PARTS + part) * 32);
                    multiply_bf16(products, a[0], a[1], a[2], a[3], b[0], b[1]);
                }
                float* to = scores[part] + lane / 4 * score_stride + i * 16 + tile * 8 + lane % 4 * 2;
                if (lane / 4 < heads) *(float2*)to = {products[0], products[1]};
                if (lane / 4 + 8 < heads) *(float2*)(to + 8 * score_stride) = {products[2], products[3]};
                unit_ring.advance();
            }
            sync_consumers();
            {  // one step of the online softmax: a thread has one head's scores of one position of each unit
                float found[BATCH_UNITS], best = largest, sum = 0.0f;
#pragma unroll
                for (int i = 0; i < BATCH_UNITS; ++i) {
                    found[i] = MASKED_SCORE;
                    if (i >= count || !has_head || column >= UNIT || first + i * UNIT + column > position) continue;
                    float score = 0.0f;
#pragma unroll
                    for (int j = 0; j < SCORE_PARTS; ++j) score += scores[j][head * score_stride + i * 16 + column];
                    found[i] = score * SCORE_SCALE;
                    best = fmaxf(best, found[i]);
                }
#pragma unroll
                for (int i = 8; i; i /= 2) best = fmaxf(best, __shfl_xor_sync(~0u, best, i));
#pragma unroll
                for (int i = 0; i < BATCH_UNITS; ++i) {
                    if (i >= count) break;
                    const float share = found[i] == MASKED_SCORE ? 0.0f : exp2f(found[i] - best);
                    sum += share;
                    if (has_head) at.shares[head * share_stride + i * 16 + column] = bits_of(share);
                }
#pragma unroll
                for (int i = 8; i; i /= 2) sum += __shfl_xor_sync(~0u, sum, i);
                const float correction = exp2f(largest - best);
                total = total * correction + sum;
                largest = best;
                if (column == 0) {
                    at.corrections[head] = correction;
                    at.totals[head] = total;
                }
            }
            sync_consumers();
            const float low = at.corrections[lane / 4], high = at.corrections[lane / 4 + 8];
#pragma unroll
            for (int i = 0; i < COLUMNS / 8; ++i) {
                sums[i][0] *= low;
                sums[i][1] *= low;
                sums[i][2] *= high;
                sums[i][3] *= high;
            }
#pragma unroll 1
            for (int i = 0; i < count; ++i) {
                u32 shares[4];
                load_four(shares, shares_at + i * 32);
                const u32 entries =
                    (row < UNIT ? shared_address(ring.stage()) + row * ENTRY_STRIDE : zeros) + half + warp * COLUMNS * 2;
#pragma unroll
                for (int j = 0; j < COLUMNS / 16; ++j) {
                    u32 latents[4];
                    load_four_transposed(latents, entries + j * 32);
#pragma unroll
                    for (int k = 0; k < 2; ++k)
                        multiply_bf16(sums[2 * j + k], shares[0], shares[1], shares[2], shares[3], latents[2 * k],
                                      latents[2 * k + 1]);
                }
                release_stage();
            }
        }
        // Sorted in shared memory, where the queries were: single numbers would be a sector each.
        u32* const sorted = (u32*)scratch;
        static_assert(MAX_HEADS * SORTED_STRIDE * 4 <= sizeof(at.queries), "what is attended to takes the queries' room");
#pragma unroll
        for (int of = 0; of < 2; ++of) {
            const int at_head = lane / 4 + of * 8;
            if (at_head >= heads) break;
            const float factor = 1.0f / at.totals[at_head];
            u32* to = sorted + at_head * SORTED_STRIDE + warp * COLUMNS / 2 + lane % 4;
#pragma unroll
            for (int i = 0; i < COLUMNS / 8; ++i)
                to[i * 4] = tagged_halves(sums[i][2 * of] * factor, sums[i][2 * of + 1] * factor);
        }
        sync_consumers();
        for (int i = thread; i < heads * (LATENT / 8); i += THREADS) {
            const int of = i / (LATENT / 8), piece = i % (LATENT / 8);
            post4(&work->partial[blockIdx.x][of][piece * 4], *(const uint4*)(sorted + of * SORTED_STRIDE + piece * 4));
        }
        if (column == 0 && has_head) {
            publish(work->weights[blockIdx.x][head], largest);
            publish(work->weights[blockIdx.x][head] + 1, total);
        }
        if (thread == 0) count(&grid->attended[board->splits.group(span.head)].count);
        sync_consumers();
    }

    // The queries of the heads from `first` on, as bfloat16.
    __device__ __forceinline__ void load_queries(Attention& at, int heads, int first) {
        constexpr int OCTETS = ENTRY / 8, AT_ONCE = 2;
        const u32* source = work->queries[first];
        const u32 halves = tag_of_halves(tag);
        approach(grid->absorbed[board->splits.group(first)], layers * heads * TILES, heads * TILES / LAST_OF);
#pragma unroll 1
        for (int octet = thread; octet < heads * OCTETS; octet += AT_ONCE * THREADS) {
            uint4 found[AT_ONCE];
            for (;;) {
                bool is_missing = false;
#pragma unroll
                for (int i = 0; i < AT_ONCE; ++i)
                    if (octet + i * THREADS < heads * OCTETS) found[i] = look4(source + (octet + i * THREADS) * 4);
#pragma unroll
                for (int i = 0; i < AT_ONCE; ++i)
                    if (octet + i * THREADS < heads * OCTETS) is_missing |= halves_differ(found[i], halves);
                if (!is_missing) break;
                pause();
            }
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
                const int own = octet + i * THREADS;
                if (own >= heads * OCTETS) break;
                *(uint4*)(at.queries + own / OCTETS * ENTRY_STRIDE + own % OCTETS * 16) = {
                    halves_to_bf16(found[i].x), halves_to_bf16(found[i].y), halves_to_bf16(found[i].z),
                    halves_to_bf16(found[i].w)};
            }
        }
        if (thread < ENTRY_STRIDE / 16) ((uint4*)at.zeros)[thread] = {};
        sync_consumers();
    }

    // Other kernels have other splits, so that these numbers aren't written every time. All were read.
    __device__ __forceinline__ void clear_split() const {
        const int heads = board->splits.heads;
        for (int i = thread; i < heads * (LATENT / 8); i += THREADS)
            post4(&work->partial[blockIdx.x][0][0] + i * 4, {});
        if (thread < 2 * heads) post(&work->weights[blockIdx.x][0][0] + thread, 0.0f);
    }

    static __device__ __forceinline__ u32 halves_to_bf16(u32 halves) {
        const float2 v = from_halves(halves & ~HALVES_TAG_BITS);
        return to_bf16x2(v.x, v.y);
    }

    // Halves are large and precise enough for normed latents, and for what they are multiplied with.
    __device__ __forceinline__ u32 tagged_halves(float low, float high) const {
        const u32 halves = to_halves(fminf(fmaxf(low, -MAX_HALF), MAX_HALF), fminf(fmaxf(high, -MAX_HALF), MAX_HALF));
        return (halves & ~0x00010001) | tag_of_halves(tag);
    }

    __device__ __forceinline__ void publish_halves(u32* p, float low, float high) const { post(p, tagged_halves(low, high)); }

    // Put the new token's entry into the stage with the positions from `first` on, and zeros behind it: what lay there may be
    // no numbers.
    __device__ __forceinline__ void add_entry(u8* stage, int first, int position) {
        constexpr int QUADS = ENTRY / 4;
        for (int i = thread; i < (first + UNIT - position) * QUADS; i += THREADS) {
            const int behind = i / QUADS, quad = i % QUADS;
            const float* source = work->entry + quad * 4;
            const float4 v = behind ? float4{} : await4(source, tag);
            u8* target = stage + (position - first + behind) * ENTRY_STRIDE + quad * 8;
            *(uint2*)target = {to_bf16x2(v.x, v.y), to_bf16x2(v.z, v.w)};
        }
        fence_copies();
        sync_consumers();
    }

    // Merge the splits of what one head attended to, and make VALUE_ROWS of its values.
    __device__ __forceinline__ void make_values(int unit) {
        constexpr int OCTETS = LATENT / 8, GROUPS = THREADS / OCTETS;  // groups of threads; each takes every GROUPS-th split
        constexpr int BATCH = 6;                                      // splits of a thread that are loaded at a time
        float* others = (float*)(scratch + 4 * LATENT);  // [GROUPS, LATENT]
        float* weights = others + GROUPS * LATENT;       // [GROUPS, 2]
        static_assert(4 * (LATENT + GROUPS * (LATENT + 2)) <= SCRATCH_BYTES, "scratch is too small");
        const int head = unit * VALUE_ROWS / VALUE, group = thread / OCTETS, column = thread % OCTETS * 8;
        const Splits splits = board->splits;
        const int owner = splits.owner(head, 0), local = head % splits.heads;
        const u32 halves = tag_of_halves(tag);
        float merged[8] = {}, largest = MASKED_SCORE, total = 0.0f;
        approach(grid->attended[splits.group(head)], layers * splits.count, splits.count / LAST_OF);
        for (int first = group; first < splits.count; first += BATCH * GROUPS) {
            uint4 found[BATCH];
            float2 scores[BATCH];  // maxima and sums
            float best = largest;
            for (;;) {
                bool is_missing = false;
#pragma unroll
                for (int i = 0; i < BATCH; ++i) {
                    const int split = owner + first + i * GROUPS;
                    if (first + i * GROUPS >= splits.count) break;
                    scores[i] = look2(work->weights[split][local]);
                    found[i] = look4(&work->partial[split][local][column / 2]);
                }
#pragma unroll
                for (int i = 0; i < BATCH; ++i) {
                    if (first + i * GROUPS >= splits.count) break;
                    is_missing |= differs(scores[i].x, tag) || differs(scores[i].y, tag) || halves_differ(found[i], halves);
                }
                if (!is_missing) break;
                pause();
            }
#pragma unroll
            for (int i = 0; i < BATCH; ++i) {
                if (first + i * GROUPS >= splits.count) break;
                scores[i] = {without_tag(scores[i].x), without_tag(scores[i].y)};
                best = fmaxf(best, scores[i].x);
            }
            const float correction = exp2f(largest - best);
            largest = best;
            total *= correction;
#pragma unroll
            for (int i = 0; i < 8; ++i) merged[i] *= correction;
#pragma unroll
            for (int i = 0; i < BATCH; ++i) {
                if (first + i * GROUPS >= splits.count) break;
                const float weight = exp2f(scores[i].x - best) * scores[i].y;
                total += weight;
                add(merged, weight, found[i]);
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

    static __device__ __forceinline__ void add(float (&sums)[8], float weight, uint4 v) {
        const u32 pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 pair = from_halves(pairs[i] & ~HALVES_TAG_BITS);
            sums[2 * i] += weight * pair.x;
            sums[2 * i + 1] += weight * pair.y;
        }
    }

    // ---- experts

    static constexpr int X_BYTES = Tiles<HIDDEN, FP8>::OPERAND_BYTES;
    static constexpr int OPERAND_BYTES = Tiles<EXPERT_SIZE, FP8>::OPERAND_BYTES;
    static_assert(X_BYTES + PAIR * OPERAND_BYTES <= SCRATCH_BYTES, "scratch is too small");

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
        ++activations;
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
#pragma unroll
        for (int i = 0; i < PAIR; ++i)
            if (i < count) store_operand<EXPERT_SIZE, FP8>(x[i], 1.0f / scales[i], X_BYTES + i * OPERAND_BYTES);
        operand_is_there();
    }

    // The stored operands times two experts' second matrices. factors: of the experts.
    __device__ __forceinline__ float project(const float (&factors)[PAIR], int place, int count, Share own) {
        wait_for_numbers();
        multiply_sets<EXPERT_SIZE, FP8>(count, {(own.count + DOWN_ROWS - 1) / DOWN_ROWS, OWN, OPERAND_BYTES}, X_BYTES);
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

    // What some experts add to this thread's element of the residual stream. A pair's second product comes after the next
    // pair's first one, so that blocks seldom wait for what others activate, and seldom hold stages that must wait for it.
    // chosen: null: the shared ones. activated: [count, EXPERT_SIZE].
    __device__ __forceinline__ float compute(const Layer& layer, int count, const int* chosen, float scale,
                                             float* activated, Share own) {
        float sum = 0.0f;
        Activated x;
        fetch_scales(layer, count, chosen, own);
#pragma unroll 1
        for (int place = 0; place < count + PAIR; place += PAIR) {
            const bool is_last = place >= count;
            if (!is_last) activate(pair_at(place, count), scale, activated + place * EXPERT_SIZE);
            if (!place) continue;
            const int before = place - PAIR, num = min(PAIR, count - before);
            const float* found = activated + before * EXPERT_SIZE;
            if (is_last && !before) approach(ACTIVATED, activations);
            if (!is_last || !before) look_at_pair(x, found, num);
            float factors[PAIR] = {1.0f, 1.0f};
            store_pair(x, found, num, factors);
            if (!is_last && place + PAIR >= count) look_at_pair(x, activated + place * EXPERT_SIZE, count - place);
            if (chosen)
#pragma unroll
                for (int i = 0; i < PAIR; ++i)
                    if (i < num) factors[i] *= board->scores[before + i];
            sum += project(factors, before, num, own);
        }
        return sum;
    }

    // A warp turns the router's logits on the board into the chosen experts' weights.
    __device__ __forceinline__ void weigh() const {
        float scores[EXPERT_LANES];
        const float logit = lane < TOP_K ? board->scores[board->experts[lane]] : MASKED_SCORE;
#pragma unroll
        for (int i = 0; i < EXPERT_LANES; ++i)
            scores[i] = lane * EXPERT_LANES + i < EXPERTS ? board->scores[lane * EXPERT_LANES + i] : MASKED_SCORE;
        float weight = score_of(logit, Softmax::of(scores));
        if (NORMALISED) weight /= warp_sum(weight) + 1e-20f;
        __syncwarp();
        if (lane < TOP_K) board->scores[lane] = weight * EXPERT_SCALE;
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
            if (pass) {
                wait(&board->chosen, parity);
                if (warp == 0) weigh();
            }
            residual += compute(layer, pass ? TOP_K : ALWAYS, pass ? board->experts : nullptr, scale,
                                pass ? work->activated : work->shared, own);
        }
        if (thread < own.count) publish(hidden + own.first + thread, residual);
        end(LAYER_DONE);
    }

    // ---- the decoder

    __device__ __forceinline__ void run(const u16* embedding, const u16* last_norm, const float* cos, const float* sin,
                                        int position, i64 token, float* logits) {
        const Share own = share_of(HIDDEN);
        const u16* embedded = embedding + token * HIDDEN;
        float residual = thread < own.count ? from_bf16(__ldg(embedded + own.first + thread)) : 0.0f;
        cos += (i64)position * HALF;
        sin += (i64)position * HALF;
        for (int index = 0; index < LAYERS; ++index) {
            const Layer& layer = board->layers[index % KNOWN_LAYERS];
            renew(work);
            renew(thread);
            renew(warp);
            renew(lane);
            const bool is_dense = index < DENSE_LAYERS;
            project_in<PROJECTED>(layer.attention_norm, layer.q_kv_a, index ? nullptr : embedded, work->projected,
                                  is_dense ? index : index - DENSE_LAYERS, is_dense ? DENSE_LAYERS : EXPERT_LAYERS);
            absorb(cos, sin);
            if (blockIdx.x == BLOCKS - 1) write_entry(layer, position, cos, sin);
            if (!board->span.is_empty()) attend(position);
            for (int unit = blockIdx.x; unit < VALUE_UNITS; unit += BLOCKS) make_values(unit);
            end(VALUES_MADE);
            residual_gemv<VALUES, false>(layer.o, work->attention, own, residual);
            if (is_dense) {
                mlp<INTERMEDIATE>(layer.mlp_norm, layer.gate_up, layer.down, work->dense, own, residual);
            } else {
                experts(layer, (index - DENSE_LAYERS) % 2, own, residual);
            }
        }
        project_head<VOCAB>(last_norm, logits);
        if (!board->span.is_empty()) clear_split();
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
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const i64 position = positions[0];
    if (position < 0) return;  // the row holds no token
    if (threadIdx.x < LAYER_WORDS) ((u64*)board->layers)[threadIdx.x] = ((const u64*)layers)[threadIdx.x];
    if (threadIdx.x == 0) {
        board->splits = splits_of((int)position);
        board->span = span_of(board->splits);
    }
    barriers_are_ready();
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
    consumer.run(embedding, last_norm, cos, sin, (int)position, token, logits);
    consumer.leave();
}
