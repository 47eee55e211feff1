// What the persistent kernels ask of the hardware, nearly an instruction a function: tests/support/persistent_host.h has
// the same functions for a CPU.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

constexpr int WARPS = 8;  // consumers

// A block's shared memory.
extern __shared__ __align__(128) u8 memory[];

__device__ __forceinline__ u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }

__device__ __forceinline__ void init_barrier(u64* barrier, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}

__device__ __forceinline__ void arrive(u64* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ void arrive(u64* barrier, u32 count) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
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

// A thread copies a number that it reads itself, after it waited for all its copies.
__device__ __forceinline__ void copy_number(float* target, const float* source) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(target)), "l"(source) : "memory");
}

__device__ __forceinline__ void wait_for_numbers() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Registers move from the producer's warpgroup to the consumers' two.
__device__ __forceinline__ void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 224;"); }
__device__ __forceinline__ void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 56;"); }

__device__ __forceinline__ void sync_consumers() { asm volatile("bar.sync 1, %0;" ::"n"(32 * WARPS) : "memory"); }

// Numbers that blocks tell each other, in L2, past L1, which may hold stale data: each is whole, and they come in any order.
__device__ __forceinline__ void post(float* p, float v) {
    asm volatile("st.relaxed.gpu.global.f32 [%0], %1;" ::"l"(p), "f"(v) : "memory");
}

__device__ __forceinline__ void post(u32* p, u32 v) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

__device__ __forceinline__ void post4(u32* p, uint4 v) {
    asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

__device__ __forceinline__ float look1(const float* p) {
    float v;
    asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];" : "=f"(v) : "l"(p) : "memory");
    return v;
}

__device__ __forceinline__ u32 look1(const u32* p) {
    u32 v;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}

__device__ __forceinline__ float2 look2(const float* p) {
    float2 v;
    asm volatile("ld.relaxed.gpu.global.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(p) : "memory");
    return v;
}

__device__ __forceinline__ float4 look4(const float* p) {
    float4 v;
    asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "l"(p)
                 : "memory");
    return v;
}

__device__ __forceinline__ uint4 look4(const u32* p) {
    uint4 v;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p)
                 : "memory");
    return v;
}

// Between two looks.
__device__ __forceinline__ void pause() {}

// Count an arrival, in no order with what this thread posts.
__device__ __forceinline__ void count(u32* counter) {
    asm volatile("red.relaxed.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
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

__device__ __forceinline__ u32 to_bf16x2(float low, float high) {
    u32 d;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}

__device__ __forceinline__ u32 to_halves(float low, float high) {
    u32 d;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}

__device__ __forceinline__ float2 from_halves(u32 halves) {
    float2 v;
    asm("{\n .reg .b16 low, high;\n mov.b32 {low, high}, %2;\n cvt.f32.f16 %0, low;\n cvt.f32.f16 %1, high;\n}"
        : "=f"(v.x), "=f"(v.y)
        : "r"(halves));
    return v;
}

__device__ __forceinline__ u32 codes_to_halves(u16 codes) {
    u32 d;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(d) : "h"(codes));
    return d;
}

// Round two numbers to E4M3, saturating at 448.
__device__ __forceinline__ u16 to_codes(float low, float high) {
    u16 codes;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
    return codes;
}

// c += A B. a0, a2: four elements of A's row lane / 4; a1, a3: of the row eight further down; b: of B's column
// lane / 4.
__device__ __forceinline__ void multiply_halves(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void multiply_bf16(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Matrices of 8 × 8 numbers of 16 bits, whose rows' addresses the lanes give.
__device__ __forceinline__ void load_four(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void load_four_transposed(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void load_two(u32 (&r)[2], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
}

// A number that is the same in all lanes, which the compiler is to know: it computes such numbers with fewer instructions.
__device__ __forceinline__ u32 uniform(u32 number) { return __shfl_sync(~0u, number, 0); }

// Where a warpgroup's tensor cores find an operand in shared memory: tiles of eight times 16 bytes that lie side by side.
// along_k, along_rows: bytes from one tile to the next.
typedef u64 Operand;

__device__ __forceinline__ Operand operand_at(u32 address, u32 along_k, u32 along_rows) {
    return (u64)(address >> 4 & 0x3fff) | (u64)(along_k >> 4) << 16 | (u64)(along_rows >> 4) << 32;
}

// The same, so many bytes further on.
__device__ __forceinline__ Operand further(Operand operand, u32 bytes) {
    return (operand & 0xffffffff00000000) | ((u32)operand + (bytes >> 4));
}

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wait_for_products() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

// To be called after the wait: the compiler may not move a product's result before it.
template <int COUNT>
__device__ __forceinline__ void are_there(float (&sums)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

// d += A B of 64 rows, two columns for each of d and 32 bytes of K, codes or bfloat16; without `adds` d = A B. A warp has 16
// of the rows; a lane's first four numbers are of row lane / 4 and columns lane % 4 * 2 and the next, and of the row eight
// further down.
template <bool CODES>
__device__ __forceinline__ void multiply_tiles(float (&d)[4], Operand a, Operand b, bool adds) {
    static_assert(CODES, "bfloat16 has two operands");
    asm volatile(
        "{\n .reg .pred p;\n setp.ne.b32 p, %6, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {%0, %1, %2, %3}, %4, %5, p, 1, 1;\n}"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "l"(a), "l"(b), "r"((int)adds));
}

#define FOUR_SUMS(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define EIGHT_SUMS(d, i) FOUR_SUMS(d, i), FOUR_SUMS(d, i + 4)

template <bool CODES>
__device__ __forceinline__ void multiply_tiles(float (&d)[8], Operand a, Operand b, bool adds) {
    if (CODES) {
        asm volatile(
            "{\n .reg .pred p;\n setp.ne.b32 p, %10, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n16k32.f32.e4m3.e4m3 {%0, %1, %2, %3, %4, %5, %6, %7}, %8, %9, p, 1, 1;\n}"
            : EIGHT_SUMS(d, 0)
            : "l"(a), "l"(b), "r"((int)adds));
    } else {
        asm volatile(
            "{\n .reg .pred p;\n setp.ne.b32 p, %10, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7}, %8, %9, p, 1, 1, 0, "
            "0;\n}"
            : EIGHT_SUMS(d, 0)
            : "l"(a), "l"(b), "r"((int)adds));
    }
}

template <bool CODES>
__device__ __forceinline__ void multiply_tiles(float (&d)[16], Operand a, Operand b, bool adds) {
    static_assert(!CODES, "four rows of codes are 16 columns");
    asm volatile(
        "{\n .reg .pred p;\n setp.ne.b32 p, %18, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, "
        "%13, %14, %15}, %16, %17, p, 1, 1, 0, 0;\n}"
        : EIGHT_SUMS(d, 0), EIGHT_SUMS(d, 8)
        : "l"(a), "l"(b), "r"((int)adds));
}

// After the barriers in shared memory were initialised.
__device__ __forceinline__ void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// What threads wrote to shared memory comes before the next copy to it, and before products that read it.
__device__ __forceinline__ void fence_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Count an arrival, the one after `last` as the first again: what this block wrote before comes before it. Returns how many
// there were; what others wrote before theirs can be read afterwards.
__device__ __forceinline__ u32 count_at(u32* counter, u32 last) {
    u32 before;
    asm volatile("fence.acq_rel.gpu;\n atom.relaxed.gpu.global.inc.u32 %0, [%1], %2;\n fence.acq_rel.gpu;"
                 : "=r"(before)
                 : "l"(counter), "r"(last)
                 : "memory");
    return before;
}

// The L2 policy of what is read once.
__device__ __forceinline__ u64 read_once() {
    u64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// Let the compiler not carry over what it computed of the value: it would keep more than it has registers for.
template <class T>
__device__ __forceinline__ void renew(T*& pointer) {
    asm volatile("" : "+l"(pointer));
}
__device__ __forceinline__ void renew(int& number) { asm volatile("" : "+r"(number)); }
