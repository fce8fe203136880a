// Multi-scale deformable attention: the arithmetic of one point, the same for g++, nvcc and NVRTC.
// Letters: b batch, q queries, n heads, d channels of a head, l levels, k points, s pixels of all levels, h w of one.
#pragma once

#ifdef __CUDACC__
#define DEFORMLIT_INLINE __host__ __device__ __forceinline__
#else
#define DEFORMLIT_INLINE inline __attribute__((always_inline))
#endif

namespace deformlit {

// region axis
// Along one axis of `size` pixels: the pixel `low` at or before a point, and the share of the pixel after it.
template <typename A>
struct Axis { int low; A share; };

template <typename A>
DEFORMLIT_INLINE Axis<A> axis(A p, int size) {
    A u = p * A(size) - A(0.5);                            // p in [0, 1] over pixel edges; u is 0 at the first centre
    u = u < A(-2) ? A(-2) : u > A(size) ? A(size) : u;     // far outside is as good as outside; NaN stays NaN
    A v = u == u ? u : A(-2);                              // an integer cannot hold NaN
    int low = int(v);                                      // towards zero,
    low -= v < A(low);                                     // so one less below zero
    return {low, u - A(low)};
}
// endregion axis

// region corners
constexpr int OUTSIDE = -1;   // the number of a pixel that is not on the map: it reads zeros, and what is added to it is lost

// The four pixels around a point: top left, top right, bottom left, bottom right.
template <typename A>
struct Corners { int pixel[4]; A share[4]; };

template <typename A>
DEFORMLIT_INLINE Corners<A> corners(Axis<A> x, Axis<A> y, int h, int w, int first) {
    const bool left = unsigned(x.low) < unsigned(w), right = unsigned(x.low + 1) < unsigned(w);
    const bool top = unsigned(y.low) < unsigned(h), bottom = unsigned(y.low + 1) < unsigned(h);
    // `first`: the number of the level's first pixel. Unsigned numbers may wrap, where the point is outside and `at` not used.
    const int at = int(unsigned(first) + unsigned(y.low) * unsigned(w) + unsigned(x.low));
    return {{top & left ? at : OUTSIDE, top & right ? at + 1 : OUTSIDE, bottom & left ? at + w : OUTSIDE, bottom & right ? at + w + 1 : OUTSIDE},
            {(1 - x.share) * (1 - y.share), x.share * (1 - y.share), (1 - x.share) * y.share, x.share * y.share}};
}
// endregion corners

// region slopes
// Gradients to a point and its weight from the dot products of the output's gradient with the four pixels.
template <typename A>
struct Slopes { A x, y, weight; };

template <typename A>
DEFORMLIT_INLINE Slopes<A> slopes(A x, A y, A weight, int h, int w, A tl, A tr, A bl, A br) {
    const A top = (1 - x) * tl + x * tr, bottom = (1 - x) * bl + x * br;
    return {weight * A(w) * ((1 - y) * (tr - tl) + y * (br - bl)), weight * A(h) * (bottom - top), (1 - y) * top + y * bottom};
}
// endregion slopes

}  // namespace deformlit
