// The CUDA kernels, without any host code or header of PyTorch, so that NVRTC compiles this file alone.
#pragma once
#include "cuda.h"

namespace deformlit::dilated {

__host__ __device__ __forceinline__ float exponential(float x) { return expf(x); }
__host__ __device__ __forceinline__ double exponential(double x) { return exp(x); }
#include "dilated.h"

// region dilated_plan
// A block does 32 pixels side by side of one head and image. Its threads are 8 groups: thread 32 g + i is for pixel i, and for
// every eighth channel from g on, up to 8 of them in one go. Keys are taken 9 at a time.
constexpr int PIXELS = 32, GROUPS = THREADS / PIXELS, KEYS = 9, CHANNELS = 8, MOST_DILATIONS = 64;
struct CudaMap { i64 b, n, d; };                                      // strides
struct CudaProblem {                                                  // passed by value with each launch
    CudaMap q, k, v, grad;
    i64 b;
    double padding, scale;
    int n, d, h, w, ks, groups;
    int dilations[MOST_DILATIONS];
};

struct Tile { i64 b; int n, dilation, y, x, pixel; bool real; };      // of a thread: its head and pixel; beyond the last pixel there are none
__device__ __forceinline__ int tiles_of_a_map(const CudaProblem& o) { return int(((i64)o.h * o.w + PIXELS - 1) / PIXELS); }
__device__ __forceinline__ i64 tiles(const CudaProblem& o) { return o.b * o.n * tiles_of_a_map(o); }
__device__ __forceinline__ Tile tile(const CudaProblem& o, i64 i) {
    const int per_map = tiles_of_a_map(o), n = int(i / per_map % o.n);
    const i64 pixel = i % per_map * PIXELS + threadIdx.x % PIXELS;
    const bool real = pixel < (i64)o.h * o.w;
    const int at = real ? int(pixel) : 0;
    return {i / per_map / o.n, n, o.dilations[(i64)n * o.groups / o.n], at / o.w, at % o.w, at, real};
}

// Where key j of the window lies, counted in pixels from the query; OUTSIDE the map it is read as zeros.
constexpr int OUTSIDE = int(0x80000000u);
__device__ __forceinline__ int step(const CudaProblem& o, const Tile& at, int j) {
    if (!at.real || j >= o.ks * o.ks) return OUTSIDE;
    const i64 y = reach(j / o.ks, o.ks, at.dilation), x = reach(j % o.ks, o.ks, at.dilation);
    return inside(at.y + y, o.h) && inside(at.x + x, o.w) ? int(y * o.w + x) : OUTSIDE;
}
// endregion dilated_plan

// region dilated_products
// The dot products of a pixel of `a` with nine of `b`. Each group of threads adds up its channels. Then each adds up all groups, for
// a key or two of the nine.
template <typename T, typename A>
__device__ __forceinline__ void products(const CudaProblem& o, const T* a, i64 stride_a, const T* b, i64 stride_b, const int* steps, A* to) {
    __shared__ A part[GROUPS][KEYS][PIXELS];
    const int group = threadIdx.x / PIXELS, lane = threadIdx.x % PIXELS;
    A sum[KEYS] = {};
    for (int c = group; c < o.d; c += GROUPS) {
        const A x = widen(a[c * stride_a]);
        #pragma unroll
        for (int j = 0; j < KEYS; j++) sum[j] += x * (steps[j] == OUTSIDE ? A(0) : A(widen(b[c * stride_b + steps[j]])));
    }
    __syncthreads();                                                  // all have read the sums of the time before
    #pragma unroll
    for (int j = 0; j < KEYS; j++) part[group][j][lane] = sum[j];
    __syncthreads();
    for (int j = group; j < KEYS; j += GROUPS) {
        A all = 0;
        for (int g = 0; g < GROUPS; g++) all += part[g][j][lane];
        part[0][j][lane] = all;                                       // nobody else reads key j of this pixel before the next wait
    }
    __syncthreads();
    #pragma unroll
    for (int j = 0; j < KEYS; j++) to[j] = part[0][j][lane];
}

// The logits of nine keys, from j0 on. What is beyond the last key has none of the softmax.
template <typename T, typename A>
__device__ __forceinline__ void logits(const CudaProblem& o, const T* q, const T* k, const int* steps, int j0, A* to) {
    products<T, A>(o, q, o.q.d, k, o.k.d, steps, to);
    #pragma unroll
    for (int j = 0; j < KEYS; j++) {
        to[j] = steps[j] == OUTSIDE && o.padding != 0 ? A(o.padding) : to[j] * A(o.scale);
        if (j0 + j >= o.ks * o.ks) to[j] = -__uint_as_float(0x7f800000u);
    }
}
template <typename A> constexpr A LOWEST = sizeof(A) == 8 ? -1.7e308 : -3.4e38;    // not -inf: two such have no difference
// endregion dilated_products

// region dilated_cuda_forward
// The softmax of a large window is taken nine keys at a time: when a larger logit comes, what was added up before is made smaller.
template <typename T, typename A>
__device__ void forward(const CudaProblem& o, const T* q, const T* k, const T* v, T* out) {
    const int group = threadIdx.x / PIXELS, plane = o.h * o.w;
    for (i64 i = blockIdx.x; i < tiles(o); i += gridDim.x) {
        const Tile at = tile(o, i);
        const T *my_q = q + at.b * o.q.b + at.n * o.q.n + at.pixel, *my_k = k + at.b * o.k.b + at.n * o.k.n + at.pixel;
        const T* my_v = v + at.b * o.v.b + at.n * o.v.n + at.pixel;
        for (int c0 = group; c0 - group < o.d; c0 += GROUPS * CHANNELS) {
            A top = LOWEST<A>, total = 0, sum[CHANNELS] = {};
            for (int j0 = 0; j0 < o.ks * o.ks; j0 += KEYS) {
                int steps[KEYS];
                A share[KEYS];
                for (int j = 0; j < KEYS; j++) steps[j] = step(o, at, j0 + j);
                logits<T, A>(o, my_q, my_k, steps, j0, share);
                const A now = largest(share, KEYS, top), less = exponential(top - now);
                total = total * less + shares(share, KEYS, now);
                top = now;
                #pragma unroll
                for (int e = 0; e < CHANNELS; e++) {
                    const int c = c0 + e * GROUPS;
                    sum[e] *= less;
                    if (c >= o.d) continue;
                    #pragma unroll
                    for (int j = 0; j < KEYS; j++) if (steps[j] != OUTSIDE) sum[e] += share[j] * widen(my_v[c * o.v.d + steps[j]]);
                }
            }
            if (!at.real) continue;
            for (int e = 0; e < CHANNELS && c0 + e * GROUPS < o.d; e++)
                narrow(sum[e] / total, out[((at.b * o.n + at.n) * o.d + c0 + e * GROUPS) * plane + at.pixel]);
        }
    }
}
// endregion dilated_cuda_forward

// region dilated_cuda_backward
// First each query: the gradient to itself, and into `room`, a plane of pixels for each key, its shares and the gradients to its
// logits. (Until all threads have read them, these planes hold the logits and the gradients to the shares.)
template <typename T, typename A>
__device__ void backward(const CudaProblem& o, const T* grad, const T* q, const T* k, const T* v, T* to_q, A* room) {
    const int group = threadIdx.x / PIXELS, plane = o.h * o.w, count = o.ks * o.ks;
    for (i64 i = blockIdx.x; i < tiles(o); i += gridDim.x) {
        const Tile at = tile(o, i);
        const T *my_q = q + at.b * o.q.b + at.n * o.q.n + at.pixel, *my_k = k + at.b * o.k.b + at.n * o.k.n + at.pixel;
        const T *my_v = v + at.b * o.v.b + at.n * o.v.n + at.pixel, *my_grad = grad + at.b * o.grad.b + at.n * o.grad.n + at.pixel;
        A* my_room = room + (at.b * o.n + at.n) * 2 * count * plane + at.pixel;
        A *my_slope = my_room + (i64)count * plane, top = LOWEST<A>, total = 0, mean = 0;
        for (int j0 = 0; j0 < count; j0 += KEYS) {
            int steps[KEYS];
            A logit[KEYS], to_share[KEYS];
            for (int j = 0; j < KEYS; j++) steps[j] = step(o, at, j0 + j);
            logits<T, A>(o, my_q, my_k, steps, j0, logit);
            products<T, A>(o, my_grad, o.grad.d, my_v, o.v.d, steps, to_share);
            for (int j = group; j < KEYS && j0 + j < count; j += GROUPS)
                if (at.real) { my_room[(i64)(j0 + j) * plane] = logit[j]; my_slope[(i64)(j0 + j) * plane] = to_share[j]; }
            const A now = largest(logit, KEYS, top), less = exponential(top - now);
            total = total * less + shares(logit, KEYS, now);
            mean *= less;
            for (int j = 0; j < KEYS; j++) mean += logit[j] * to_share[j];
            top = now;
        }
        mean /= total;
        __syncthreads();
        for (int c0 = group; c0 - group < o.d; c0 += GROUPS * CHANNELS) {
            A sum[CHANNELS] = {};
            for (int j = 0; j < count; j++) {
                const int there = step(o, at, j);
                if (there == OUTSIDE) continue;
                const A share = exponential(my_room[(i64)j * plane] - top) / total;
                const A to_logit = slope(share, my_slope[(i64)j * plane], mean) * A(o.scale);
                #pragma unroll
                for (int e = 0; e < CHANNELS; e++) if (c0 + e * GROUPS < o.d) sum[e] += to_logit * widen(my_k[(c0 + e * GROUPS) * o.k.d + there]);
            }
            for (int e = 0; e < CHANNELS && c0 + e * GROUPS < o.d; e++)
                if (at.real) narrow(sum[e], to_q[((at.b * o.n + at.n) * o.d + c0 + e * GROUPS) * plane + at.pixel]);
        }
        __syncthreads();
        for (int j = group; j < count && at.real; j += GROUPS) {
            const A share = exponential(my_room[(i64)j * plane] - top) / total;
            my_slope[(i64)j * plane] = slope(share, my_slope[(i64)j * plane], mean) * A(o.scale);
            my_room[(i64)j * plane] = share;
        }
    }
}

// Then each key gathers from the queries that looked at it: the one that has it as key j is its own key count - 1 - j.
template <typename T, typename A>
__device__ void gather(const CudaProblem& o, const T* grad, const T* q, const A* room, T* to_k, T* to_v) {
    const int group = threadIdx.x / PIXELS, plane = o.h * o.w, count = o.ks * o.ks;
    for (i64 i = blockIdx.x; i < tiles(o); i += gridDim.x) {
        const Tile at = tile(o, i);
        if (!at.real) continue;
        const T *my_q = q + at.b * o.q.b + at.n * o.q.n + at.pixel, *my_grad = grad + at.b * o.grad.b + at.n * o.grad.n + at.pixel;
        const A* my_room = room + (at.b * o.n + at.n) * 2 * count * plane + at.pixel;
        for (int c0 = group; c0 < o.d; c0 += GROUPS * CHANNELS) {
            A key[CHANNELS] = {}, value[CHANNELS] = {};
            for (int j = 0; j < count; j++) {
                const int there = step(o, at, count - 1 - j);
                if (there == OUTSIDE) continue;
                const A share = my_room[(i64)j * plane + there], to_logit = my_room[(i64)(count + j) * plane + there];
                #pragma unroll
                for (int e = 0; e < CHANNELS; e++) {
                    const int c = c0 + e * GROUPS;
                    if (c >= o.d) continue;
                    key[e] += to_logit * widen(my_q[c * o.q.d + there]);
                    value[e] += share * widen(my_grad[c * o.grad.d + there]);
                }
            }
            for (int e = 0; e < CHANNELS && c0 + e * GROUPS < o.d; e++) {
                const i64 to = ((at.b * o.n + at.n) * o.d + c0 + e * GROUPS) * plane + at.pixel;
                narrow(key[e], to_k[to]); narrow(value[e], to_v[to]);
            }
        }
    }
}
// endregion dilated_cuda_backward

}  // namespace deformlit::dilated

// region dilated_names
// Each kernel under a plain name, for each dtype.
#define DEFORMLIT_DILATED(name, T, A)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(256) dilated_forward_##name(const deformlit::dilated::CudaProblem o, const T* q,     \
        const T* k, const T* v, T* out) { deformlit::dilated::forward<T, A>(o, q, k, v, out); }                                       \
    extern "C" __global__ void __launch_bounds__(256) dilated_backward_##name(const deformlit::dilated::CudaProblem o, const T* grad, \
        const T* q, const T* k, const T* v, T* to_q, A* room) { deformlit::dilated::backward<T, A>(o, grad, q, k, v, to_q, room); }   \
    extern "C" __global__ void __launch_bounds__(256) dilated_gather_##name(const deformlit::dilated::CudaProblem o, const T* grad,   \
        const T* q, const A* room, T* to_k, T* to_v) { deformlit::dilated::gather<T, A>(o, grad, q, room, to_k, to_v); }
DEFORMLIT_DILATED(f32, float, float)
DEFORMLIT_DILATED(f64, double, double)
DEFORMLIT_DILATED(f16, deformlit::F16, float)
DEFORMLIT_DILATED(bf16, deformlit::BF16, float)
// endregion dilated_names
