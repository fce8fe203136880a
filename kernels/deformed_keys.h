// Attention with a bias read between the numbers of a table: the arithmetic that g++, nvcc and NVRTC share.
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

// region place
// Along one side of a table of `size` numbers: the number `low` at or before a place, and the share of the one after it.
template <typename A>
struct Place { int low; A share; };

// The whole number at or below x. What is far away is moved to where it is just far; NaN counts as 0.
template <typename A>
DEFORMLIT_INLINE int whole(A x) {
    constexpr A far = 1 << 22;
    x = x > -far ? x : x == x ? -far : A(0);
    x = x < far ? x : far;
    const int cut = int(x);                                // towards zero,
    return cut - (x < A(cut));                             // so one less below zero
}

// Where query i of a line reads: query 0 reads at `start`, and each step is one number of the table and `more`.
template <typename A>
DEFORMLIT_INLINE Place<A> place(A start, A more, int i, int size) {
    const int first = whole(start);
    const A rest = start - A(first) + more * A(i);         // small where steps are near one, so it keeps its digits
    const int part = whole(rest);
    const int low = first + i + part;
    const bool inside = low >= -1 && low < size && start - A(first) < A(2);
    return {inside ? low : -2, inside || start != start ? rest - A(part) : A(0)};
}
// endregion place

// region between
// Between two neighbours: numbers or, on the CPU, vectors of numbers.
template <typename V, typename S>
DEFORMLIT_INLINE V between(V a, V b, S share) { return a + share * (b - a); }
// endregion between

}  // namespace deformed_keys
}  // namespace deformlit
