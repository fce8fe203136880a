// Dilated window attention: the arithmetic of one window, the same for g++, nvcc and NVRTC. A is a number, or many side by side.
// Included inside a namespace that knows `exponential(A)`, on the CPU once for each instruction set. Hence no include guard.

#ifndef DEFORMLIT_INLINE
#ifdef __CUDACC__
#define DEFORMLIT_INLINE __host__ __device__ __forceinline__
#else
#define DEFORMLIT_INLINE inline __attribute__((always_inline))
#endif
#endif

// region dilated_window
// Along an axis, how many pixels key i of `ks` lies from its query.
DEFORMLIT_INLINE long long reach(int i, int ks, int dilation) { return (long long)(i - ks / 2) * dilation; }

DEFORMLIT_INLINE bool inside(long long at, int size) { return at >= 0 && at < size; }
// endregion dilated_window

// region dilated_softmax
template <typename A>
DEFORMLIT_INLINE A largest(const A* logits, int count, A top) {
    for (int j = 0; j < count; j++) top = logits[j] > top ? logits[j] : top;
    return top;
}

// Logits become shares of a sum, which is returned. NaN in one of them is NaN in the sum.
template <typename A>
DEFORMLIT_INLINE A shares(A* logits, int count, A top) {
    A total = {};
    for (int j = 0; j < count; j++) total += logits[j] = exponential(logits[j] - top);
    return total;
}
// endregion dilated_softmax

// region dilated_slope
// The gradient to a logit, from its share (all add up to 1), the gradient to the share, and the mean of these by share.
template <typename A>
DEFORMLIT_INLINE A slope(A share, A grad, A mean) { return share * (grad - mean); }
// endregion dilated_slope
