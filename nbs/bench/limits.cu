// Micro-benchmarks on a GPU: what its memory gives to code that does nothing else. limits.py compiles and launches them.
typedef long long i64;

__device__ __forceinline__ i64 number() { return blockIdx.x * i64(blockDim.x) + threadIdx.x; }
__device__ __forceinline__ i64 threads() { return gridDim.x * i64(blockDim.x); }

extern "C" __global__ void nothing() {}

// 128 multiplications and additions of each thread, `times` over: what the GPU can issue.
extern "C" __global__ void multiply_add(float* to, i64 times) {
    float x[8], sum = 0;
    for (int i = 0; i < 8; i++) x[i] = threadIdx.x + i;
    for (i64 t = 0; t < times; t++)
        #pragma unroll
        for (int i = 0; i < 128; i++) x[i % 8] = fmaf(x[i % 8], .999f, .5f);
    for (int i = 0; i < 8; i++) sum += x[i];
    if (sum == 1e30f) *to = sum;
}

// Reads `count` times 16 bytes, `times` over, past the first-level caches.
extern "C" __global__ void read(const float4* from, i64 count, i64 times, float* to) {
    float sum = 0;
    for (i64 t = 0; t < times; t++)
        #pragma unroll 8
        for (i64 i = number(); i < count; i += threads()) {
            float4 v;
            asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(from + i));
            sum += v.x + v.y + v.z + v.w;
        }
    if (sum == 1e30f) *to = sum;      // never; but the compiler does not know
}

// p[0..W) += x, as one reduction where the GPU has it.
template <int W>
__device__ __forceinline__ void add(float* p, const float* x) {
#if __CUDA_ARCH__ >= 900
    if constexpr (W == 4) {
        asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" :: "l"(p), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]) : "memory");
        return;
    }
    if constexpr (W == 2) { asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" :: "l"(p), "f"(x[0]), "f"(x[1]) : "memory"); return; }
#endif
    for (int i = 0; i < W; i++) atomicAdd(p + i, x[i]);
}

// Adds `times` rows of 32 numbers, each to one of `rows` rows drawn at random; 32 / W threads share a row.
template <int W>
__device__ void reduce(float* to, i64 rows, i64 times) {
    const i64 group = number() / (32 / W);
    const int c = threadIdx.x % (32 / W) * W;
    const float ones[4] = {1, 1, 1, 1};
    unsigned x = unsigned(group) * 2654435761u + 1;
    for (i64 t = 0; t < times; t++) {
        x = x * 1664525u + 1013904223u;
        unsigned y = (x ^ (x >> 16)) * 2246822519u;
        add<W>(to + i64(__umulhi(y ^ (y >> 13), unsigned(rows))) * 32 + c, ones);
    }
}
extern "C" __global__ void reduce_1(float* to, i64 rows, i64 times) { reduce<1>(to, rows, times); }
extern "C" __global__ void reduce_2(float* to, i64 rows, i64 times) { reduce<2>(to, rows, times); }
extern "C" __global__ void reduce_4(float* to, i64 rows, i64 times) { reduce<4>(to, rows, times); }

// As limits.cpp: of each point the rows first, first + step, first + width, first + width + step. A row has 4 * `words` numbers
// and as many threads as words. `gather` reads and adds them up, `scatter` adds to them.
extern "C" __global__ void gather(const float4* table, const int* first, const float* weights, const int* width, const int* step,
                                  float4* out, i64 queries, i64 points, i64 words) {
    const i64 q = number() / words, c = threadIdx.x % words;
    if (q >= queries) return;
    float4 sum = {0, 0, 0, 0};
    for (i64 p = 0; p < points; p++) {
        const int at = first[q * points + p], x = step[p], y = width[p];
        const float w = weights[q * points + p];
        const int rows[4] = {at, at + x, at + y, at + x + y};
        #pragma unroll
        for (int r = 0; r < 4; r++) {
            const float4 v = table[rows[r] * words + c];
            sum.x += w * v.x; sum.y += w * v.y; sum.z += w * v.z; sum.w += w * v.w;
        }
    }
    out[q * words + c] = sum;
}
extern "C" __global__ void scatter(float* table, const int* first, const float* weights, const int* width, const int* step,
                                   const float4* grad, i64 queries, i64 points, i64 words) {
    const i64 q = number() / words, c = threadIdx.x % words;
    if (q >= queries) return;
    const float4 g = grad[q * words + c];
    for (i64 p = 0; p < points; p++) {
        const int at = first[q * points + p], x = step[p], y = width[p];
        const float w = weights[q * points + p], to[4] = {w * g.x, w * g.y, w * g.z, w * g.w};
        const int rows[4] = {at, at + x, at + y, at + x + y};
        #pragma unroll
        for (int r = 0; r < 4; r++) add<4>(table + (rows[r] * words + c) * 4, to);
    }
}
