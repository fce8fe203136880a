// The CUDA kernels, without any host code or header of PyTorch, so that NVRTC compiles this file alone.
#pragma once
#include "cuda.h"
#include "deformed_keys.h"

namespace deformlit {
namespace deformed_keys {

// region deformed_cuda_tile
// A block has 64 queries of one head, and takes its keys 32 at a time (or the other way round). Its 256 threads stand in 16
// lines of 16: thread (line, lane) has the queries 4 line to 4 line + 3, and the keys lane and lane + 16.
constexpr int QUERIES = 64, KEYS = 32, DEEP = 16, CHANNELS = 32;

struct Me {
    int line, lane;
    __device__ Me() : line(threadIdx.x / 16), lane(threadIdx.x % 16) {}
    __device__ int query(int i) const { return 4 * line + i; }
    __device__ int key(int j) const { return lane + 16 * j; }
};
template <typename A> struct Scores { A x[4][2]; };        // of a thread's queries with its keys
template <typename A>
struct Room {                                              // what a block's threads share
    A query[DEEP][QUERIES + 1], key[DEEP][KEYS + 1], score[KEYS][QUERIES + 1], part[QUERIES][CHANNELS + 1];
};

// `count` rows of some numbers of channels, from channel c on: to[channel][row] or, turned, to[row][channel]; else zeros.
template <bool TURNED, int N, int C, typename T, typename A, int M>
__device__ __forceinline__ void fetch_tile(const T* from, i64 si, i64 sd, i64 count, int c, int d, A (*to)[M]) {
    for (int e = threadIdx.x; e < N * C; e += THREADS) {
        const int i = e % N, a = e / N;
        const A x = i < count && c + a < d ? A(widen(from[i * si + (c + a) * sd])) : A(0);
        if constexpr (TURNED) to[i][a] = x; else to[a][i] = x;
    }
}

// The products of queries and keys, or of anything laid out as they are.
template <typename T, typename A>
__device__ void products(const T* a, Strides sa, i64 queries, const T* b, Strides sb, i64 keys, int d, Room<A>& room, Scores<A>& to) {
    const Me me;
    to = Scores<A>{};
    for (int c = 0; c < d; c += DEEP) {
        __syncthreads();
        fetch_tile<false, QUERIES, DEEP>(a, sa.i, sa.d, queries, c, d, room.query);
        fetch_tile<false, KEYS, DEEP>(b, sb.i, sb.d, keys, c, d, room.key);
        __syncthreads();
        #pragma unroll
        for (int x = 0; x < DEEP; x++)
            #pragma unroll
            for (int i = 0; i < 4; i++)
                #pragma unroll
                for (int j = 0; j < 2; j++) to.x[i][j] += room.query[x][me.query(i)] * room.key[x][me.key(j)];
    }
}
// endregion deformed_cuda_tile

// region deformed_cuda_bias
// The four numbers of the table around the place where query (qx, qy) reads, and the two shares.
template <typename A>
struct Reading {
    int x, y;
    A share_x, share_y, at[2][2];
    __device__ __forceinline__ Reading(const Problem& o, const A* table, Origin<A> ox, Origin<A> oy, int qx, int qy) {
        const Place<A> px = place(ox, A(o.more_x), qx, o.tw), py = place(oy, A(o.more_y), qy, o.th);
        x = px.low; y = py.low; share_x = px.share; share_y = py.share;
        for (int r = 0; r < 2; r++)
            for (int c = 0; c < 2; c++) at[r][c] = inside(o, r, c) ? table[i64(y + r) * o.tw + x + c] : A(0);
    }
    __device__ __forceinline__ bool inside(const Problem& o, int r, int c) const {
        return unsigned(x + c) < unsigned(o.tw) && unsigned(y + r) < unsigned(o.th);
    }
    __device__ __forceinline__ A value() const {
        return between(between(at[0][0], at[0][1], share_x), between(at[1][0], at[1][1], share_x), share_y);
    }
    __device__ __forceinline__ A slope_x() const { return between(at[0][1] - at[0][0], at[1][1] - at[1][0], share_y); }
    __device__ __forceinline__ A slope_y() const { return between(at[1][0] - at[0][0], at[1][1] - at[0][1], share_x); }
    __device__ __forceinline__ A share(int r, int c) const { return (c ? share_x : 1 - share_x) * (r ? share_y : 1 - share_y); }
};

// What a block works on: 64 queries or 32 keys of an image and head, and some of the channels.
struct Work {
    i64 b, n, first;
    int channel;
    __device__ Work(const Problem& o, i64 i, i64 count, int each) {
        const i64 tiles = (count + each - 1) / each, pieces = (o.d + CHANNELS - 1) / CHANNELS;
        channel = int(i % pieces) * CHANNELS; i /= pieces;
        first = i % tiles * each; i /= tiles;
        n = i % o.n; b = i / o.n;
    }
};
__device__ __forceinline__ i64 works(const Problem& o, i64 count, int each) {
    return o.b * o.n * ((count + each - 1) / each) * ((o.d + CHANNELS - 1) / CHANNELS);
}
template <typename T>
__device__ __forceinline__ const T* head(const T* x, const Strides& s, const Work& at, i64 first) {
    return x + at.b * s.b + at.n * s.n + first * s.i;
}
// endregion deformed_cuda_bias

// region deformed_cuda_forward
template <typename T, typename A>
__device__ void forward(const Problem& o, const T* q, const T* k, const T* v, const A* table, const A* start, T* out, A* sums) {
    __shared__ Room<A> room;
    const Me me;
    const A scale = 1 / sqrt(A(o.d));
    for (i64 i = blockIdx.x; i < works(o, o.q, QUERIES); i += gridDim.x) {
        const Work at(o, i, o.q, QUERIES);
        const A *numbers = table + at.n * o.th * o.tw, *places = start + 2 * (at.b * o.g + at.n / (o.n / o.g)) * o.k;
        A most[4], total[4] = {}, sum[4][2] = {};
        for (int i = 0; i < 4; i++) most[i] = A(-1e38);    // below all scores, and a number
        for (i64 k0 = 0; k0 < o.k; k0 += KEYS) {
            Scores<A> s;
            products(head(q, o.sq, at, at.first), o.sq, o.q - at.first, head(k, o.sk, at, k0), o.sk, o.k - k0, o.d, room, s);
            for (int j = 0; j < 2; j++) {
                const i64 key = k0 + me.key(j);
                const bool there = key < o.k;
                const Origin<A> x = origin(there ? places[2 * key] : A(0)), y = origin(there ? places[2 * key + 1] : A(0));
                for (int i = 0; i < 4; i++) {
                    const i64 query = at.first + me.query(i);
                    const Reading<A> r(o, numbers, x, y, int(query % o.w), int(query / o.w));
                    s.x[i][j] = there ? s.x[i][j] * scale + r.value() : -A(__uint_as_float(0x7f800000u));
                }
            }
            __syncthreads();
            for (int i = 0; i < 4; i++) {
                A high = s.x[i][0] > s.x[i][1] ? s.x[i][0] : s.x[i][1];
                for (int step = 8; step; step /= 2) {
                    const A other = __shfl_xor_sync(0xffffffffu, high, step);
                    high = other > high ? other : high;
                }
                high = most[i] > high ? most[i] : high;
                const A shrink = exp(most[i] - high), p[2] = {exp(s.x[i][0] - high), exp(s.x[i][1] - high)};
                A all = p[0] + p[1];
                for (int step = 8; step; step /= 2) all += __shfl_xor_sync(0xffffffffu, all, step);
                most[i] = high; total[i] = total[i] * shrink + all;
                for (int j = 0; j < 2; j++) { room.score[me.key(j)][me.query(i)] = p[j]; sum[i][j] *= shrink; }
            }
            fetch_tile<true, KEYS, CHANNELS>(head(v, o.sv, at, k0), o.sv.i, o.sv.d, o.k - k0, at.channel, o.d, room.part);
            __syncthreads();
            for (int e = 0; e < KEYS; e++)
                for (int i = 0; i < 4; i++) for (int j = 0; j < 2; j++) sum[i][j] += room.score[e][me.query(i)] * room.part[e][me.key(j)];
        }
        for (int i = 0; i < 4; i++) {
            const i64 query = at.first + me.query(i), bn = at.b * o.n + at.n;
            if (query >= o.q) continue;
            for (int j = 0; j < 2; j++) {
                const int c = at.channel + me.key(j);
                if (c < o.d) narrow(o.k ? sum[i][j] / total[i] : A(0), out[(bn * o.d + c) * o.q + query]);
            }
            if (me.lane == 0 && at.channel == 0) sums[bn * o.q + query] = most[i] + log(total[i]);
        }
    }
}
// endregion deformed_cuda_forward

// region deformed_cuda_backward
// The table's gradient is a sum of very many, added by all blocks at once. Integers can be added in any order: each share times
// `scale`, a power of two so large that the sum of all cannot overflow. For one query the weights of all keys add up to 1, so
// there are as many as queries, and each is at most twice the product of the largest gradient and value, times channels.
struct Fixed { i64* sum; int* mark; const void* largest; };
template <typename A>
__device__ __forceinline__ double fixed_scale(const Problem& o, const A* largest) {
    const double most = 2. * o.d * double(largest[0]) * double(largest[1]);
    return most > 0 ? exp2(fmin(fmax(61 - ceil(log2(most)) - ceil(log2(double(o.b) * double(o.q) + 1)), -1000.), 1000.)) : 1;
}
template <typename T, typename A>
__device__ void largest(const T* x, Strides s, i64 b, int n, i64 count, int d, A* to) {      // of what is finite; *to starts at 0
    A most = 0;
    for (i64 e = blockIdx.x * i64(THREADS) + threadIdx.x; e < b * n * count * d; e += i64(gridDim.x) * THREADS) {
        const i64 i = e % count, c = e / count % d, bn = e / count / d;
        const A a = fabs(widen(x[bn / n * s.b + bn % n * s.n + i * s.i + c * s.d]));
        if (a > most && isfinite(a)) most = a;
    }
    if constexpr (sizeof(A) == 4) atomicMax((unsigned*)to, __float_as_uint(most));
    else atomicMax((unsigned long long*)to, (unsigned long long)__double_as_longlong(most));
}

// For each query the product of its output and the output's gradient, both `b n d q`.
template <typename T, typename A>
__device__ void dots(const Problem& o, const T* grad, const T* out, A* to) {
    for (i64 e = blockIdx.x * i64(THREADS) + threadIdx.x; e < o.b * o.n * o.q; e += i64(gridDim.x) * THREADS) {
        const i64 first = e / o.q * o.d * o.q + e % o.q;
        A sum = 0;
        for (int c = 0; c < o.d; c++) sum += A(widen(grad[first + c * o.q])) * A(widen(out[first + c * o.q]));
        to[e] = sum;
    }
}

// What the backward reads.
template <typename T, typename A>
struct Given { const T *grad, *q, *k, *v; const A *table, *start, *sums, *dots; };

// The weights of a tile once more, and the gradients of its scores.
template <typename T, typename A>
__device__ void again(const Problem& o, const Given<T, A>& g, const Work& at, i64 q0, i64 k0, Room<A>& room, Scores<A>& weight, Scores<A>& grad) {
    const Me me;
    const Strides sg{o.n * i64(o.d) * o.q, i64(o.d) * o.q, 1, o.q};
    const A scale = 1 / sqrt(A(o.d));
    const A *numbers = g.table + at.n * o.th * o.tw, *places = g.start + 2 * (at.b * o.g + at.n / (o.n / o.g)) * o.k;
    products(head(g.q, o.sq, at, q0), o.sq, o.q - q0, head(g.k, o.sk, at, k0), o.sk, o.k - k0, o.d, room, weight);
    products(head(g.grad, sg, at, q0), sg, o.q - q0, head(g.v, o.sv, at, k0), o.sv, o.k - k0, o.d, room, grad);
    for (int j = 0; j < 2; j++) for (int i = 0; i < 4; i++) {
        const i64 key = k0 + me.key(j), query = q0 + me.query(i), e = (at.b * o.n + at.n) * o.q + query;
        if (key < o.k && query < o.q) {
            const Reading<A> r(o, numbers, origin(places[2 * key]), origin(places[2 * key + 1]), int(query % o.w), int(query / o.w));
            weight.x[i][j] = exp(weight.x[i][j] * scale + r.value() - g.sums[e]);
            grad.x[i][j] = weight.x[i][j] * (grad.x[i][j] - g.dots[e]);
        } else weight.x[i][j] = grad.x[i][j] = 0;
    }
}
template <typename A>
__device__ __forceinline__ void show(const Scores<A>& s, Room<A>& room) {
    const Me me;
    for (int i = 0; i < 4; i++) for (int j = 0; j < 2; j++) room.score[me.key(j)][me.query(i)] = s.x[i][j];
}

// A block for 64 queries: their gradients, and what they give to the table.
template <typename T, typename A>
__device__ void to_queries(const Problem& o, const Given<T, A>& g, T* to_q, const Fixed& fixed) {
    __shared__ Room<A> room;
    const Me me;
    const A scale = 1 / sqrt(A(o.d));
    const double whole_scale = fixed_scale(o, (const A*)fixed.largest);
    for (i64 i = blockIdx.x; i < works(o, o.q, QUERIES); i += gridDim.x) {
        const Work at(o, i, o.q, QUERIES);
        const A *numbers = g.table + at.n * o.th * o.tw, *places = g.start + 2 * (at.b * o.g + at.n / (o.n / o.g)) * o.k;
        A sum[4][2] = {};
        for (i64 k0 = 0; k0 < o.k; k0 += KEYS) {
            Scores<A> weight, grad;
            again(o, g, at, at.first, k0, room, weight, grad);
            if (at.channel == 0) for (int j = 0; j < 2; j++) for (int i = 0; i < 4; i++) {
                const i64 key = k0 + me.key(j), query = at.first + me.query(i);
                if (key >= o.k || query >= o.q) continue;
                const Reading<A> r(o, numbers, origin(places[2 * key]), origin(places[2 * key + 1]), int(query % o.w), int(query / o.w));
                for (int y = 0; y < 2; y++) for (int x = 0; x < 2; x++) if (r.inside(o, y, x)) {
                    const A give = r.share(y, x) * grad.x[i][j];
                    i64* to = fixed.sum + (at.n * o.th + r.y + y) * o.tw + r.x + x;
                    if (isfinite(give)) atomicAdd((unsigned long long*)to, (unsigned long long)llrint(double(give) * whole_scale));
                    else atomicOr(fixed.mark + at.n, 1);
                }
            }
            __syncthreads();
            show(grad, room);
            fetch_tile<true, KEYS, CHANNELS>(head(g.k, o.sk, at, k0), o.sk.i, o.sk.d, o.k - k0, at.channel, o.d, room.part);
            __syncthreads();
            for (int e = 0; e < KEYS; e++)
                for (int i = 0; i < 4; i++) for (int j = 0; j < 2; j++) sum[i][j] += room.score[e][me.query(i)] * room.part[e][me.key(j)];
        }
        for (int i = 0; i < 4; i++) for (int j = 0; j < 2; j++) {
            const i64 query = at.first + me.query(i);
            const int c = at.channel + me.key(j);
            if (query < o.q && c < o.d) narrow(sum[i][j] * scale, to_q[((at.b * o.n + at.n) * o.d + c) * o.q + query]);
        }
    }
}

// A block for 32 keys: their gradients, those of the values, and of where they are. Thread (line, lane) has the keys line and
// line + 16 of the sums. `to_start` is `b n k 2`.
template <typename T, typename A>
__device__ void to_keys(const Problem& o, const Given<T, A>& g, T* to_k, T* to_v, A* to_start) {
    __shared__ Room<A> room;
    const Me me;
    const A scale = 1 / sqrt(A(o.d));
    const Strides sg{o.n * i64(o.d) * o.q, i64(o.d) * o.q, 1, o.q};
    for (i64 i = blockIdx.x; i < works(o, o.k, KEYS); i += gridDim.x) {
        const Work at(o, i, o.k, KEYS);
        const A *numbers = g.table + at.n * o.th * o.tw, *places = g.start + 2 * (at.b * o.g + at.n / (o.n / o.g)) * o.k;
        A keys[2][2] = {}, values[2][2] = {}, slope[2][2] = {};
        for (i64 q0 = 0; q0 < o.q; q0 += QUERIES) {
            Scores<A> weight, grad;
            again(o, g, at, q0, at.first, room, weight, grad);
            if (at.channel == 0) for (int j = 0; j < 2; j++) for (int i = 0; i < 4; i++) {
                const i64 key = at.first + me.key(j), query = q0 + me.query(i);
                if (key >= o.k || query >= o.q) continue;
                const Reading<A> r(o, numbers, origin(places[2 * key]), origin(places[2 * key + 1]), int(query % o.w), int(query / o.w));
                slope[j][0] += grad.x[i][j] * r.slope_x(); slope[j][1] += grad.x[i][j] * r.slope_y();
            }
            for (int two = 0; two < 2; two++) {
                __syncthreads();
                show(two ? grad : weight, room);
                if (two) fetch_tile<true, QUERIES, CHANNELS>(head(g.q, o.sq, at, q0), o.sq.i, o.sq.d, o.q - q0, at.channel, o.d, room.part);
                else fetch_tile<true, QUERIES, CHANNELS>(head(g.grad, sg, at, q0), sg.i, sg.d, o.q - q0, at.channel, o.d, room.part);
                __syncthreads();
                for (int e = 0; e < QUERIES; e++)
                    for (int i = 0; i < 2; i++)
                        for (int j = 0; j < 2; j++) (two ? keys : values)[i][j] += room.score[me.line + 16 * i][e] * room.part[e][me.key(j)];
            }
        }
        for (int i = 0; i < 2; i++) for (int j = 0; j < 2; j++) {
            const i64 key = at.first + me.line + 16 * i;
            const int c = at.channel + me.key(j);
            if (key >= o.k || c >= o.d) continue;
            const i64 e = ((at.b * o.n + at.n) * o.d + c) * o.k + key;
            narrow(keys[i][j] * scale, to_k[e]); narrow(values[i][j], to_v[e]);
        }
        __syncthreads();
        for (int j = 0; j < 2; j++) for (int c = 0; c < 2; c++) room.score[me.key(j)][2 * me.line + c] = slope[j][c];
        __syncthreads();
        if (at.channel == 0 && threadIdx.x < 2 * KEYS && at.first + threadIdx.x / 2 < o.k) {
            A sum = 0;
            for (int line = 0; line < 16; line++) sum += room.score[threadIdx.x / 2][2 * line + threadIdx.x % 2];
            to_start[((at.b * o.n + at.n) * o.k + at.first) * 2 + threadIdx.x] = sum;
        }
        __syncthreads();
    }
}

// The table's integers become numbers again, and the heads of a group add up what they say of their keys.
template <typename A>
__device__ void finish(const Problem& o, const Fixed& fixed, const A* from_start, A* to_table, A* to_start) {
    const double scale = fixed_scale(o, (const A*)fixed.largest);
    const i64 size = i64(o.th) * o.tw, first = blockIdx.x * i64(THREADS) + threadIdx.x, all = i64(gridDim.x) * THREADS;
    for (i64 e = first; e < o.n * size; e += all)
        to_table[e] = fixed.mark[e / size] ? A(__uint_as_float(0x7fc00000u)) : A(double(fixed.sum[e]) / scale);
    const int m = o.n / o.g;
    for (i64 e = first; e < o.b * o.g * o.k * 2; e += all) {
        const i64 bg = e / (o.k * 2), j = e % (o.k * 2);
        A sum = 0;
        for (int i = 0; i < m; i++) sum += from_start[(bg * m + i) * o.k * 2 + j];
        to_start[e] = sum;
    }
}
// endregion deformed_cuda_backward

// region deformed_names
#define KERNEL(name) extern "C" __global__ __launch_bounds__(THREADS) void name
#define KERNELS(name, T, A)                                                                                                   \
    KERNEL(dk_forward_##name)(Problem o, const T* q, const T* k, const T* v, const A* table, const A* start, T* out, A* sums) \
        { forward(o, q, k, v, table, start, out, sums); }                                                                     \
    KERNEL(dk_largest_##name)(const T* x, Strides s, i64 b, int n, i64 count, int d, A* to) { largest(x, s, b, n, count, d, to); } \
    KERNEL(dk_dots_##name)(Problem o, const T* grad, const T* out, A* to) { dots(o, grad, out, to); }                         \
    KERNEL(dk_queries_##name)(Problem o, Given<T, A> g, T* to_q, Fixed fixed) { to_queries(o, g, to_q, fixed); }              \
    KERNEL(dk_keys_##name)(Problem o, Given<T, A> g, T* to_k, T* to_v, A* to_start) { to_keys(o, g, to_k, to_v, to_start); }  \
    KERNEL(dk_finish_##name)(Problem o, Fixed fixed, const A* from_start, A* to_table, A* to_start)                           \
        { finish(o, fixed, from_start, to_table, to_start); }
KERNELS(f32, float, float)
KERNELS(f64, double, double)
KERNELS(f16, F16, float)
KERNELS(bf16, BF16, float)
#undef KERNEL
#undef KERNELS
// endregion deformed_names

}  // namespace deformed_keys
}  // namespace deformlit
