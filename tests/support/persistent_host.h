// The functions of kernels/persistent/instructions.cu on an x86-64 CPU, and a grid that runs on it: every CUDA thread has a
// stack of its own and runs until it waits for others. Blocks take turns in a random order; copies to shared memory end
// some time after they began.

#include <sys/mman.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <random>
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

struct Thread {
    void* stack_pointer;
    int index;
    Block* block;
    bool has_ended = false;
    u32 turns = 0;  // of the warp's
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

static void yield() { switch_stacks(&me->stack_pointer, scheduler); }

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
    int left = all.size();
    for (int round = 0; left && round < 4000000; ++round) {
        const int first = random() % blocks;
        for (int i = 0; i < blocks; ++i) {
            Block& block = grid[(first + i) % blocks];
            if (block.index == slow && random() % 12) continue;
            for (int copies = block.copies.size() / 2 + random() % 2; copies > 0 && !block.copies.empty(); --copies) {
                const Copy copy = block.copies.front();
                block.copies.pop_front();
                memcpy(copy.target, copy.source, copy.bytes);
                ((Barrier*)copy.barrier)->bytes -= copy.bytes;
                ((Barrier*)copy.barrier)->check();
            }
            for (int t = 0; t < threads; ++t) {
                Thread& thread = all[block.index * threads + t];
                if (thread.has_ended) continue;
                me = &thread;
                switch_stacks(&scheduler, thread.stack_pointer);
                left -= thread.has_ended;
            }
        }
    }
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

inline void arrive_expecting(u64* barrier, u32 bytes) {
    ((Barrier*)barrier)->bytes += bytes;
    arrive(barrier);
}

inline void wait(u64* barrier, u32 parity) {
    while (((Barrier*)barrier)->phase == parity) yield();
}

inline void copy_bulk(void* target, const void* source, u32 bytes, u64* barrier, u64) {
    for (const void* p : {(const void*)target, source, (const void*)(uintptr_t)bytes}) check_alignment(p, 16);
    me->block->copies.push_back({target, source, bytes, barrier});
}

inline void take_registers() {}
inline void give_registers() {}
inline void sync_consumers() { me->block->consumers.pass(32 * WARPS); }
inline float4 load4(const float* p) { check_alignment(p, 16); return *(const float4*)p; }
inline float load1(const float* p) { return *p; }
inline u32 load1(const u32* p) { return *p; }
inline uint4 load16(const u16* p) { check_alignment(p, 16); return *(const uint4*)p; }

inline void wait_for_count(const u32* counter, u32 count) {
    while (*counter < count) yield();
}

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

inline float of_code(u32 code) {
    const int exponent = code >> 3 & 15, mantissa = code & 7;
    const float size = exponent ? ldexpf(8 + mantissa, exponent - 10) : ldexpf(mantissa, -9);
    return exponent == 15 && mantissa == 7 ? NAN : code & 0x80 ? -size : size;
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
inline u32 to_coded_halves(float low, float high) { return codes_to_halves(to_code(high) << 8 | to_code(low)); }

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
inline void publish_barriers() {}
inline void fence_copies() {}
inline void arrive_at(u32* counter) { ++*counter; }
inline u32 count_at(u32* counter) { return (*counter)++; }
inline u64 read_once() { return 0; }
template <class T>
void renew(T&) {}
