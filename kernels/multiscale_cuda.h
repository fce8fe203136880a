// The CUDA kernels, without any host code or header of PyTorch, so that NVRTC compiles this file alone.
#pragma once
#include "cuda.h"
#include "multiscale.h"

namespace deformlit {

// region cuda_problem
constexpr int MOST_LEVELS = 128, SAMPLES = 1024;   // samples (points of a query and head) that a block looks at in one go
struct CudaLevel { int h, w, first; };
struct CudaProblem {                       // passed by value with each launch
    i64 b, q, s, stride_b, stride_s, stride_n;
    int n, d, l, k, lanes;                 // `lanes` threads share a row: a power of two, at most 32
    CudaLevel levels[MOST_LEVELS];
};
// endregion cuda_problem

// region words
// VEC numbers that a thread reads or writes in one go, 16 bytes where it can.
template <typename T, int VEC>
struct alignas(sizeof(T) * VEC) Word { T x[VEC]; };

template <typename T, int VEC>
__device__ __forceinline__ Word<T, VEC> fetch(const T* p) { return *reinterpret_cast<const Word<T, VEC>*>(p); }

// *p += x, by any number of threads at the same time.
template <int VEC>
__device__ __forceinline__ void add(float* p, const float* x) {
#if __CUDA_ARCH__ >= 900
    if constexpr (VEC >= 4) {                                      // four at a time, which GPUs can do since Hopper
        for (int i = 0; i < VEC; i += 4)
            asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};"
                         :: "l"(__cvta_generic_to_global(p + i)), "f"(x[i]), "f"(x[i + 1]), "f"(x[i + 2]), "f"(x[i + 3]) : "memory");
    } else
#endif
    for (int i = 0; i < VEC; i++) atomicAdd(p + i, x[i]);
}
template <int VEC>
__device__ __forceinline__ void add(double* p, const double* x) { for (int i = 0; i < VEC; i++) atomicAdd(p + i, x[i]); }
// endregion words

// region work
// What a block does: some queries of one image and head, a group of `lanes` threads for each. There may be more work than blocks.
struct Work { i64 b, q0; int n; };
__device__ __forceinline__ i64 tiles(const CudaProblem& o) { const int queries = THREADS / o.lanes; return (o.q + queries - 1) / queries; }
__device__ __forceinline__ Work work(const CudaProblem& o, i64 i) {
    const i64 per_head = tiles(o), per_image = per_head * o.n;
    return {i / per_image, i % per_head * (THREADS / o.lanes), int(i % per_image / per_head)};
}
// endregion work

// region cuda_forward
template <typename T, typename A, int VEC>
__device__ void forward(const CudaProblem& o, const T* value, const A* points, const A* weights, T* out) {
    __shared__ int pixel[4][SAMPLES];
    __shared__ A share[4][SAMPLES];
    const int queries = THREADS / o.lanes, mine = threadIdx.x / o.lanes, lane = threadIdx.x % o.lanes;
    const int lk = o.l * o.k, most = SAMPLES / queries;
    for (i64 i = blockIdx.x; i < o.b * o.n * tiles(o); i += gridDim.x) {
        const Work at = work(o, i);
        const T* image = value + at.b * o.stride_b + at.n * o.stride_n;
        for (int c = lane * VEC, c0 = 0; c0 < o.d; c += o.lanes * VEC, c0 += o.lanes * VEC) {
            A sum[VEC] = {};
            for (int p0 = 0; p0 < lk; p0 += most) {
                const int some = min(most, lk - p0);
                __syncthreads();
                for (int e = threadIdx.x; e < queries * some; e += THREADS) {          // a thread for each sample
                    const i64 q = at.q0 + e / some;
                    const int p = p0 + e % some;
                    if (q >= o.q) continue;
                    const i64 j = ((at.b * o.q + q) * o.n + at.n) * lk + p;
                    const CudaLevel& level = o.levels[p / o.k];
                    const Corners<A> at4 = corners(axis(points[2 * j], level.w), axis(points[2 * j + 1], level.h), level.h, level.w, level.first);
                    for (int r = 0; r < 4; r++) { pixel[r][e] = at4.pixel[r]; share[r][e] = at4.share[r] * weights[j]; }
                }
                __syncthreads();
                if (at.q0 + mine < o.q && c < o.d)
                    for (int e = mine * some; e < (mine + 1) * some; e++)              // a group of threads for each row
                        #pragma unroll
                        for (int r = 0; r < 4; r++) {
                            const int row = pixel[r][e];
                            const A a = share[r][e];
                            Word<T, VEC> v = {};
                            if (row != OUTSIDE) v = fetch<T, VEC>(image + row * o.stride_s + c);
                            #pragma unroll
                            for (int x = 0; x < VEC; x++) sum[x] += a * widen(v.x[x]);
                        }
            }
            if (at.q0 + mine < o.q && c < o.d) {
                Word<T, VEC> v;
                for (int x = 0; x < VEC; x++) narrow(sum[x], v.x[x]);
                *reinterpret_cast<Word<T, VEC>*>(out + ((at.b * o.q + at.q0 + mine) * o.n + at.n) * o.d + c) = v;
            }
        }
    }
}
// endregion cuda_forward

// region fixed
// Sums of floats depend on their order, sums of integers do not. The deterministic gradient adds 64-bit integers: each share
// times `scale`, a power of two so large that `count` of the largest shares still fit. (1000: near the ends of what a double
// can be.) What is not finite only leaves a mark.
template <typename A>
__device__ __forceinline__ double scale(const A* largest, i64 count) {
    const double most = double(largest[0]) * double(largest[1]);
    return most > 0 ? exp2(fmin(fmax(61 - ceil(log2(most)) - ceil(log2(double(count) + 1)), -1000.), 1000.)) : 1;
}
struct Fixed { i64* sum; int* mark; const void* largest; i64 count; };   // `sum` is null for the ordinary gradient

template <typename T, typename A>
__device__ void largest(const T* x, i64 count, A* to) {                  // of what is finite; *to starts at 0
    A most = 0;
    for (i64 i = blockIdx.x * i64(THREADS) + threadIdx.x; i < count; i += i64(gridDim.x) * THREADS) {
        const A a = fabs(widen(x[i]));
        if (a > most && isfinite(a)) most = a;
    }
    if constexpr (sizeof(A) == 4) atomicMax((unsigned*)to, __float_as_uint(most));     // bits of floats above zero are in order
    else atomicMax((unsigned long long*)to, (unsigned long long)__double_as_longlong(most));
}
// endregion fixed

// region cuda_backward
template <typename T, typename A, int VEC>
__device__ void backward(const CudaProblem& o, const T* grad, const T* value, const A* points, const A* weights,
                         A* to_value, A* to_points, A* to_weights, const Fixed& fixed) {
    __shared__ int pixel[4][SAMPLES];
    __shared__ A xs[SAMPLES], ys[SAMPLES], weight[SAMPLES];
    const int queries = THREADS / o.lanes, mine = threadIdx.x / o.lanes, lane = threadIdx.x % o.lanes;
    const int lk = o.l * o.k, most = SAMPLES / queries;
    const double by = fixed.sum ? scale((const A*)fixed.largest, fixed.count) : 0;
    for (i64 i = blockIdx.x; i < o.b * o.n * tiles(o); i += gridDim.x) {
        const Work at = work(o, i);
        const bool real = at.q0 + mine < o.q;
        const i64 query = (at.b * o.q + at.q0 + mine) * o.n + at.n;
        const T* image = value + at.b * o.stride_b + at.n * o.stride_n;
        for (int p0 = 0; p0 < lk; p0 += most) {
            const int some = min(most, lk - p0);
            __syncthreads();
            for (int e = threadIdx.x; e < queries * some; e += THREADS) {
                const i64 q = at.q0 + e / some;
                const int p = p0 + e % some;
                if (q >= o.q) continue;
                const i64 j = ((at.b * o.q + q) * o.n + at.n) * lk + p;
                const CudaLevel& level = o.levels[p / o.k];
                const Axis<A> x = axis(points[2 * j], level.w), y = axis(points[2 * j + 1], level.h);
                const Corners<A> at4 = corners(x, y, level.h, level.w, level.first);
                for (int r = 0; r < 4; r++) pixel[r][e] = at4.pixel[r];
                xs[e] = x.share; ys[e] = y.share; weight[e] = weights[j];
            }
            __syncthreads();
            for (int p = 0; p < some; p++) {                                           // all threads of a warp stay together for the sums below
                const int e = mine * some + p;
                A dot[4] = {};
                if (real) {
                    const A x = xs[e], y = ys[e], w = weight[e];
                    const A share[4] = {(1 - x) * (1 - y) * w, x * (1 - y) * w, (1 - x) * y * w, x * y * w};
                    for (int c = lane * VEC; c < o.d; c += o.lanes * VEC) {
                        A g[VEC];
                        const Word<T, VEC> gw = fetch<T, VEC>(grad + query * o.d + c);
                        for (int v = 0; v < VEC; v++) g[v] = widen(gw.x[v]);
                        #pragma unroll
                        for (int r = 0; r < 4; r++) {
                            const int row = pixel[r][e];
                            if (row == OUTSIDE) continue;
                            const Word<T, VEC> v = fetch<T, VEC>(image + row * o.stride_s + c);
                            A to[VEC];
                            for (int u = 0; u < VEC; u++) { dot[r] += g[u] * widen(v.x[u]); to[u] = share[r] * g[u]; }
                            const i64 there = (at.b * o.s + row) * o.n + at.n;
                            if (!fixed.sum) add<VEC>(to_value + there * o.d + c, to);
                            else for (int u = 0; u < VEC; u++) {
                                i64* sum = fixed.sum + there * o.d + c + u;
                                if (isfinite(to[u])) atomicAdd((unsigned long long*)sum, (unsigned long long)llrint(double(to[u]) * by));
                                else atomicOr(fixed.mark + there, 1);
                            }
                        }
                    }
                }
                for (int step = o.lanes / 2; step; step /= 2)
                    for (int r = 0; r < 4; r++) dot[r] += __shfl_xor_sync(0xffffffffu, dot[r], step);
                if (real && lane == 0) {
                    const CudaLevel& level = o.levels[(p0 + p) / o.k];
                    const Slopes<A> t = slopes(xs[e], ys[e], weight[e], level.h, level.w, dot[0], dot[1], dot[2], dot[3]);
                    const i64 j = query * lk + p0 + p;
                    to_points[2 * j] = t.x; to_points[2 * j + 1] = t.y; to_weights[j] = t.weight;
                }
            }
        }
    }
}
// endregion cuda_backward

// region finish
// The gradient of the values in their own dtype, from sums in the dtype of the points, or from integers.
template <typename T, typename A>
__device__ void finish(T* out, const A* sum, const Fixed& fixed, i64 count, int d) {
    const double by = fixed.sum ? 1 / scale((const A*)fixed.largest, fixed.count) : 0;
    for (i64 i = blockIdx.x * i64(THREADS) + threadIdx.x; i < count; i += i64(gridDim.x) * THREADS)
        narrow(!fixed.sum ? sum[i] : fixed.mark[i / d] ? A(__uint_as_float(0x7fc00000u)) : A(double(fixed.sum[i]) * by), out[i]);
}
// endregion finish

}  // namespace deformlit

// region names
// Each kernel under a plain name, for each dtype and width.
#define DEFORMLIT_WIDTHS(name, T, A, VEC)                                                                                             \
    extern "C" __global__ void __launch_bounds__(256) msda_forward_##name##_##VEC(const deformlit::CudaProblem o, const T* value,     \
        const A* points, const A* weights, T* out) { deformlit::forward<T, A, VEC>(o, value, points, weights, out); }                 \
    extern "C" __global__ void __launch_bounds__(256) msda_backward_##name##_##VEC(const deformlit::CudaProblem o, const T* grad,     \
        const T* value, const A* points, const A* weights, A* to_value, A* to_points, A* to_weights, const deformlit::Fixed fixed) {  \
        deformlit::backward<T, A, VEC>(o, grad, value, points, weights, to_value, to_points, to_weights, fixed); }
#define DEFORMLIT_DTYPE(name, T, A, VEC)                                                                                              \
    DEFORMLIT_WIDTHS(name, T, A, VEC) DEFORMLIT_WIDTHS(name, T, A, 1)                                                                 \
    extern "C" __global__ void msda_largest_##name(const T* x, deformlit::i64 count, A* to) { deformlit::largest<T, A>(x, count, to); } \
    extern "C" __global__ void msda_finish_##name(T* out, const A* sum, const deformlit::Fixed fixed, deformlit::i64 count, int d) {  \
        deformlit::finish<T, A>(out, sum, fixed, count, d); }
DEFORMLIT_DTYPE(f32, float, float, 4)
DEFORMLIT_DTYPE(f64, double, double, 2)
DEFORMLIT_DTYPE(f16, deformlit::F16, float, 8)
DEFORMLIT_DTYPE(bf16, deformlit::BF16, float, 8)
// endregion names
