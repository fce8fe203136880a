// Attention with a bias read between the numbers of a table: sizes, and the arithmetic that g++, nvcc and NVRTC share.
// Letters: b batch, n heads, g groups, q queries (h w of them), k keys, d channels of a head; the table is th x tw.
#pragma once

#ifndef DEFORMLIT_INLINE
#ifdef __CUDACC__
#define DEFORMLIT_INLINE __host__ __device__ __forceinline__
#else
#define DEFORMLIT_INLINE inline __attribute__((always_inline))
#endif
#endif

namespace deformlit {
namespace deformed_keys {

// region sizes
struct Strides { long long b, n, i, d; };                  // numbers from image to image, head, query or key, channel
struct Problem {
    long long b, q, k;
    Strides sq, sk, sv;
    double more_x, more_y;                                 // a step, less one number of the table
    int n, g, d, h, w, th, tw;
};
// endregion sizes

// region place
// The whole number at or below x. What is far away is moved to where it is just far; NaN counts as 0.
template <typename A>
DEFORMLIT_INLINE int whole(A x) {
    constexpr A far = 1 << 22;
    x = x > -far ? x : x == x ? -far : A(0);
    x = x < far ? x : far;
    const int cut = int(x);                                // towards zero,
    return cut - (x < A(cut));                             // so one less below zero
}

// Where a key's query 0 reads along one side of the table: at or after the number `first`, with a `rest` below one.
template <typename A>
struct Origin { int first; A rest; };

template <typename A>
DEFORMLIT_INLINE Origin<A> origin(A start) {
    const int first = whole(start);
    const A rest = start - A(first);
    if (start == start && !(rest >= A(0) && rest < A(1))) return {-(1 << 28), A(0)};      // too far to count, or infinite: outside
    return {first, rest};                                  // NaN stays, in `rest`
}

// Where its query i reads: at or after the number `low`, with a share of the one after it. A step is one number and `more`.
template <typename A>
struct Place { int low; A share; };

template <typename A>
DEFORMLIT_INLINE Place<A> place(Origin<A> o, A more, int i, int size) {
    const A rest = o.rest + more * A(i);                   // small where steps are near one, so it keeps its digits
    const int part = whole(rest), low = o.first + i + part;
    return {low >= -1 && low < size ? low : -2, rest - A(part)};
}
// endregion place

// region between
// Between two neighbours: numbers or, on the CPU, vectors of numbers.
template <typename V, typename S>
DEFORMLIT_INLINE V between(V a, V b, S share) { return (1 - share) * a + share * b; }
// endregion between

}  // namespace deformed_keys
}  // namespace deformlit
