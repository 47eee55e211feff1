// The functions of kernels/persistent/instructions.cu on an x86-64 CPU, and a grid that runs on it: every CUDA thread has a
// stack of its own. Blocks, warps and lanes take turns in a random order, a warp may be slow; what a thread posts, and what is
// copied to shared memory, comes some time later, in any order; products read their operands when they are waited for.

#include <sys/mman.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <random>
#include <unordered_set>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

constexpr int WARPS = 8;  // consumers
constexpr int STACK = 1 << 16;

struct uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };

// ---- the grid

// Lets so many threads pass together.
struct Gate {
    int arrived = 0;
    u32 passed = 0;
    void pass(int count);
};

struct Warp {
    Gate gate;
    alignas(16) u8 given[2][32][32];  // what lanes show each other, in turn
};

struct Copy {
    void* target;
    const void* source;
    u32 bytes;
    u64* barrier;
};

struct Block {
    int index;
    u8* memory;
    Gate all, consumers;
    std::vector<Warp> warps;
    std::deque<Copy> copies;
};

// A number that a thread wrote to itself or others, and that isn't there yet.
struct Late {
    u32* target;
    u32 value;
    bool adds;
    Block* block;
};
static std::vector<Late> late;

struct Product {
    float* sums;
    void (*multiply)(float*, const u32*, bool);
    u32 operands[6];
    bool adds;
};

struct Thread {
    void* stack_pointer;
    int index;
    Block* block;
    bool has_ended = false;
    u32 turns = 0;  // of the warp's
    std::vector<Product> products;  // begun
    std::vector<std::pair<float*, const float*>> numbers;  // being copied
    int lane() const { return index % 32; }
    Warp& warp() const { return block->warps[index / 32]; }
};

static Thread* me;
static void* scheduler;
static void (*body)();

extern "C" void switch_stacks(void** old_pointer, void* new_pointer);
asm(R"(
    .text
    .globl switch_stacks
switch_stacks:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");

// The GPU traps where `size` bytes aren't at a multiple of it; an x86-64 CPU doesn't.
static bool is_misaligned = false;
static void check_alignment(const void* p, int size) { is_misaligned |= (uintptr_t)p % size != 0; }

static u32 chance_state = 1;
static u32 chance(u32 of) {
    chance_state ^= chance_state << 13;
    chance_state ^= chance_state >> 17;
    chance_state ^= chance_state << 5;
    return (chance_state >> 4) % of;
}

static void yield() { switch_stacks(&me->stack_pointer, scheduler); }

// Another warp's turn, now and then.
static void maybe_yield() {
    if (!chance(8)) yield();
}

// Let some of what was written become visible, in any order, but for one word's: of a block all.
static void settle(Block* block) {
    std::unordered_set<u32*> waiting;
    size_t kept = 0;
    for (size_t i = 0; i < late.size(); ++i) {
        const Late write = late[i];
        if (!block ? chance(3) == 0 : write.block == block) {
            if (write.adds || !waiting.count(write.target)) {
                *write.target = write.adds ? *write.target + write.value : write.value;
                continue;
            }
        }
        waiting.insert(write.target);
        late[kept++] = write;
    }
    late.resize(kept);
}

inline void Gate::pass(int count) {
    const u32 before = passed;
    if (++arrived == count) {
        arrived = 0;
        ++passed;
    } else {
        while (passed == before) yield();
    }
}

static void enter() {
    body();
    me->has_ended = true;
    yield();
}

// A barrier in shared memory: eight bytes, as on the GPU.
struct Barrier {
    u16 count;
    u16 pending : 15, phase : 1;
    int bytes;  // that copies have yet to bring
    void check() {
        if (pending || bytes) return;
        phase ^= 1;
        pending = count;
    }
};
static_assert(sizeof(Barrier) == 8, "as a u64");

// `size` bytes behind which nothing may be touched.
static u8* guarded(size_t size, size_t& all) {
    const size_t page = 4096;
    all = (size + page - 1) / page * page + page;
    u8* room = (u8*)mmap(nullptr, all, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    mprotect(room + all - page, page, PROT_NONE);
    return room + (all - page - size) / 128 * 128;
}

// Run the grid to its end. slow: a block that gets a turn seldom, or -1. Returns 0; 1: it doesn't end; 2: it
// accesses something misaligned.
static int run_grid(int blocks, int threads, int shared_bytes, u32 seed, int slow, void (*kernel)()) {
    std::mt19937 random(seed);
    chance_state = seed * 2654435761u | 1;
    late.clear();
    std::vector<Block> grid(blocks);
    std::vector<Thread> all(blocks * threads);
    const size_t size = (size_t)STACK * all.size();
    u8* stacks = (u8*)mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    size_t room = 0;
    body = kernel;
    for (int i = 0; i < blocks; ++i) {
        grid[i].index = i;
        grid[i].memory = guarded(shared_bytes, room);
        memset(grid[i].memory, 0xff, shared_bytes);  // no numbers, until something is stored
        grid[i].warps.resize(threads / 32);
    }
    for (size_t i = 0; i < all.size(); ++i) {
        all[i].index = i % threads;
        all[i].block = &grid[i / threads];
        void** top = (void**)(stacks + (i + 1) * STACK) - 2;
        top[0] = (void*)enter;
        all[i].stack_pointer = top - 6;
    }
    int left = all.size(), slow_warp = -1;
    for (int round = 0; left && round < 400000; ++round) {
        const int first = random() % blocks;
        for (int i = 0; i < blocks; ++i) {
            Block& block = grid[(first + i) % blocks];
            if (block.index == slow && random() % 12) continue;
            for (int copies = block.copies.size() / 2 + random() % 2; copies > 0 && !block.copies.empty(); --copies) {
                const size_t which = chance(block.copies.size());
                const Copy copy = block.copies[which];
                block.copies.erase(block.copies.begin() + which);
                memcpy(copy.target, copy.source, copy.bytes);
                ((Barrier*)copy.barrier)->bytes -= copy.bytes;
                ((Barrier*)copy.barrier)->check();
            }
            const int warps = threads / 32, from = chance(warps), step = chance(2) ? 1 : warps - 1;
            if (!chance(16)) slow_warp = chance(4 * warps);
            for (int w = 0; w < warps; ++w) {
                const int warp = (from + w * step) % warps;
                if (warp == slow_warp && chance(16) || !chance(3)) continue;
                const int lane = chance(32);
                for (int l = 0; l < 32; ++l) {
                    Thread& thread = all[block.index * threads + warp * 32 + (lane + l) % 32];
                    if (thread.has_ended) continue;
                    me = &thread;
                    switch_stacks(&scheduler, thread.stack_pointer);
                    left -= thread.has_ended;
                }
            }
        }
        settle(nullptr);
    }
    while (!late.empty()) settle(nullptr);
    munmap(stacks, size);
    for (Block& block : grid) munmap((u8*)((uintptr_t)block.memory / 4096 * 4096), room);
    return left ? 1 : is_misaligned ? 2 : 0;
}

struct Index { int x; };
#define threadIdx (Index{me->index})
#define blockIdx (Index{me->block->index})
#define memory (me->block->memory)

// ---- what a warp's lanes do together

struct Given {
    const u8 (*slots)[32];
    template <class T>
    T of(int lane) const {
        T value;
        memcpy(&value, slots[lane], sizeof value);
        return value;
    }
};

// Every lane's value, once all have given theirs.
template <class T>
static Given give(T value) {
    static_assert(sizeof value <= 32, "too large");
    Warp& warp = me->warp();
    u8(*slots)[32] = warp.given[me->turns++ % 2];
    memcpy(slots[me->lane()], &value, sizeof value);
    warp.gate.pass(32);
    return {slots};
}

inline void __syncwarp() { give(0); }

template <class T>
T __shfl_xor_sync(u32, T value, int distance) {
    return give(value).template of<T>(me->lane() ^ distance);
}

template <class T>
T __shfl_sync(u32, T value, int lane) {
    return give(value).template of<T>(lane);
}

inline u32 __ballot_sync(u32, bool is_so) {
    const Given given = give(is_so);
    u32 lanes = 0;
    for (int i = 0; i < 32; ++i) lanes |= (u32)given.of<bool>(i) << i;
    return lanes;
}

inline u32 __reduce_max_sync(u32, u32 value) {
    const Given given = give(value);
    u32 best = 0;
    for (int i = 0; i < 32; ++i) best = given.of<u32>(i) > best ? given.of<u32>(i) : best;
    return best;
}

// ---- functions of CUDA

template <class T>
T min(T a, T b) { return b < a ? b : a; }
template <class T>
T max(T a, T b) { return a < b ? b : a; }
template <class T>
T __ldg(const T* p) { return *p; }
inline float __uint_as_float(u32 bits) { float v; memcpy(&v, &bits, 4); return v; }
inline u32 __float_as_uint(float v) { u32 bits; memcpy(&bits, &v, 4); return bits; }
inline float __expf(float v) { return expf(v); }
inline float rsqrtf(float v) { return 1.0f / sqrtf(v); }
inline int __ffs(u32 bits) { return __builtin_ffs(bits); }
inline void __syncthreads() { me->block->all.pass(me->block->warps.size() * 32); }

// ---- the instructions

inline u32 shared_address(const void* pointer) { return (u32)((const u8*)pointer - memory); }

inline void init_barrier(u64* barrier, u32 count) { *(Barrier*)barrier = {(u16)count, (u16)count, 0, 0}; }

inline void arrive(u64* barrier) {
    --((Barrier*)barrier)->pending;
    ((Barrier*)barrier)->check();
}

inline void arrive(u64* barrier, u32 count) {
    for (u32 i = 0; i < count; ++i) arrive(barrier);
}

inline void arrive_expecting(u64* barrier, u32 bytes) {
    ((Barrier*)barrier)->bytes += bytes;
    arrive(barrier);
}

inline void wait(u64* barrier, u32 parity) {
    while (((Barrier*)barrier)->phase == parity) yield();
}

inline void copy_bulk(void* target, const void* source, u32 bytes, u64* barrier, u64) {
    for (const void* p : {(const void*)target, source, (const void*)(uintptr_t)bytes}) check_alignment(p, 16);
    memset(target, 0xff, bytes);
    me->block->copies.push_back({target, source, bytes, barrier});
}

inline void copy_number(float* target, const float* source) {
    *target = NAN;
    me->numbers.push_back({target, source});
}
inline void wait_for_numbers() {
    maybe_yield();
    for (auto [target, source] : me->numbers) *target = *source;
    me->numbers.clear();
}
inline void take_registers() {}
inline void give_registers() {}
inline void sync_consumers() { maybe_yield(); me->block->consumers.pass(32 * WARPS); }

inline void post(u32* p, u32 v) { maybe_yield(); late.push_back({p, v, false, me->block}); }
inline void post(float* p, float v) { post((u32*)p, __float_as_uint(v)); }
inline void post4(u32* p, uint4 v) {
    check_alignment(p, 16);
    post(p, v.x);
    post(p + 1, v.y);
    post(p + 2, v.z);
    post(p + 3, v.w);
}
inline float look1(const float* p) { maybe_yield(); return *p; }
inline float2 look2(const float* p) { maybe_yield(); check_alignment(p, 8); return *(const float2*)p; }
inline float4 look4(const float* p) { maybe_yield(); check_alignment(p, 16); return *(const float4*)p; }
inline uint4 look4(const u32* p) { maybe_yield(); check_alignment(p, 16); return *(const uint4*)p; }
inline u32 look1(const u32* p) { maybe_yield(); return *p; }
inline void count(u32* counter) { late.push_back({counter, 1, true, me->block}); }
inline void pause() { yield(); }

inline void send(u64* word, float number, u32 sum) { *word = (u64)sum << 32 | __float_as_uint(number); }

inline float receive(const u64* word, u32 sum, const u32* given_up) {
    while ((u32)(*word >> 32) != sum && !*given_up) yield();
    return __uint_as_float((u32)*word);
}

inline u32 to_bf16(float v) {
    const u32 bits = __float_as_uint(v);
    return std::isnan(v) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline u32 to_bf16x2(float low, float high) { return to_bf16(high) << 16 | to_bf16(low); }

static float decoded(u32 code) {
    const int exponent = code >> 3 & 15, mantissa = code & 7;
    const float size = exponent ? ldexpf(8 + mantissa, exponent - 10) : ldexpf(mantissa, -9);
    return exponent == 15 && mantissa == 7 ? NAN : code & 0x80 ? -size : size;
}

inline float of_code(u32 code) {
    static float numbers[256];
    static bool is_ready = false;
    for (u32 i = 0; !is_ready && i < 256; ++i) numbers[i] = decoded(i);
    is_ready = true;
    return numbers[code & 0xff];
}

inline u32 to_code(float v) {
    if (std::isnan(v)) return 0x7f;
    const float size = fminf(fabsf(v), 448.0f);
    int exponent;
    frexpf(size, &exponent);
    exponent = exponent < -5 ? -5 : exponent;  // of the smallest normal number
    const float step = ldexpf(1.0f, exponent - 4);
    const float nearest = nearbyintf(size / step) * step;
    u32 code = 0;
    while (of_code(code) < nearest) ++code;
    return code | (std::signbit(v) ? 0x80 : 0);
}

inline u16 to_half(float v) { const _Float16 half = v; u16 bits; memcpy(&bits, &half, 2); return bits; }
inline float of_half(u16 bits) { _Float16 half; memcpy(&half, &bits, 2); return half; }
inline u32 codes_to_halves(u16 codes) { return (u32)to_half(of_code(codes >> 8)) << 16 | to_half(of_code(codes & 0xff)); }
inline u16 to_codes(float low, float high) { return to_code(high) << 8 | to_code(low); }
inline u32 to_halves(float low, float high) { return (u32)to_half(high) << 16 | to_half(low); }
inline float2 from_halves(u32 halves) { return {of_half(halves & 0xffff), of_half(halves >> 16)}; }

struct Fragments { u32 a[4], b[2]; };

// c += A B of 16 x 16 and 16 x 8 numbers, which the lanes hold as m16n8k16 has them.
template <class Number>
void multiply_fragments(float (&c)[4], Fragments own, Number number) {
    const Given given = give(own);
    for (int i = 0; i < 4; ++i) {
        const int row = me->lane() / 4 + i / 2 * 8, column = me->lane() % 4 * 2 + i % 2;
        for (int k = 0; k < 16; ++k) {
            const u32 a = given.of<Fragments>(row % 8 * 4 + k % 8 / 2).a[row / 8 + k / 8 * 2];
            const u32 b = given.of<Fragments>(column * 4 + k % 8 / 2).b[k / 8];
            c[i] += number((u16)(a >> k % 2 * 16)) * number((u16)(b >> k % 2 * 16));
        }
    }
}

inline void multiply_halves(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    multiply_fragments(c, {{a0, a1, a2, a3}, {b0, b1}}, of_half);
}

inline void multiply_bf16(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    multiply_fragments(c, {{a0, a1, a2, a3}, {b0, b1}}, [](u16 bits) { return __uint_as_float((u32)bits << 16); });
}

template <int COUNT>
void load_matrices(u32 (&r)[COUNT], u32 address, bool is_transposed) {
    check_alignment(memory + address, 16);
    const Given given = give(address);
    const int lane = me->lane();
    for (int i = 0; i < COUNT; ++i) {
        u16 two[2];
        for (int j = 0; j < 2; ++j) {
            const int row = is_transposed ? lane % 4 * 2 + j : lane / 4, column = is_transposed ? lane / 4 : lane % 4 * 2 + j;
            memcpy(&two[j], memory + given.of<u32>(i * 8 + row) + 2 * column, 2);
        }
        memcpy(&r[i], two, 4);
    }
}

inline void load_four(u32 (&r)[4], u32 address) { load_matrices(r, address, false); }
inline void load_four_transposed(u32 (&r)[4], u32 address) { load_matrices(r, address, true); }
inline void load_two(u32 (&r)[2], u32 address) { load_matrices(r, address, false); }

// Tiles of eight times 16 bytes in shared memory: see instructions.cu.
u32 uniform(u32 number) { return number; }

struct Operand { u32 address, along_k, along_rows; };
inline Operand operand_at(u32 address, u32 along_k, u32 along_rows) {
    for (u32 bytes : {address, along_k, along_rows}) check_alignment((const void*)(uintptr_t)bytes, 16);
    return {address, along_k, along_rows};
}

inline Operand further(Operand operand, u32 bytes) { return {operand.address + bytes, operand.along_k, operand.along_rows}; }

template <bool CODES>
float number_of(Operand tiles, int row, int k) {
    const int byte = CODES ? k : 2 * k;
    const u8* at = memory + tiles.address + row / 8 * tiles.along_rows + byte / 16 * tiles.along_k + row % 8 * 16 + byte % 16;
    return CODES ? of_code(*at) : __uint_as_float((u32)*(const u16*)at << 16);
}

template <bool CODES, int COUNT>
void multiply_now(float* sums, const u32* operands, bool adds) {
    const Operand a{operands[0], operands[1], operands[2]}, b{operands[3], operands[4], operands[5]};
    for (int i = 0; i < COUNT; ++i) {
        const int row = me->index / 32 % 4 * 16 + me->lane() / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + me->lane() % 4 * 2 + i % 2;
        float sum = adds ? sums[i] : 0.0f;
        for (int k = 0; k < (CODES ? 32 : 16); ++k) sum += number_of<CODES>(a, row, k) * number_of<CODES>(b, column, k);
        sums[i] = sum;
    }
}

// Products read their operands some time before they are waited for.
template <bool CODES, int COUNT>
void multiply_tiles(float (&sums)[COUNT], Operand a, Operand b, bool adds) {
    me->products.push_back({sums, multiply_now<CODES, COUNT>,
                            {a.address, a.along_k, a.along_rows, b.address, b.along_k, b.along_rows}, adds});
}

inline void begin_products() { __syncwarp(); }  // of the whole warp, as the next two
inline void end_products() {}
inline void wait_for_products() {
    maybe_yield();
    for (const Product& product : me->products) product.multiply(product.sums, product.operands, product.adds);
    me->products.clear();
    __syncwarp();
}
template <int COUNT>
void are_there(float (&)[COUNT]) {}
inline void publish_barriers() {}
inline void fence_copies() {}
inline u32 count_at(u32* counter, u32 last) {
    settle(me->block);
    const u32 before = *counter;
    *counter = before < last ? before + 1 : 0;
    return before;
}
inline u64 read_once() { return 0; }
template <class T>
void renew(T&) {}
