// The exponential of numbers that are not above zero, many side by side. Included by each kernel file once for each instruction
// set, inside a namespace of its own. Hence no include guard.

// region exponential
// exp(x) = 2^n exp(r), with n whole and |r| at most half of log 2, where a short series will do. Zero for what is below the
// smallest numbers; NaN stays NaN.
template <typename X>
inline __attribute__((always_inline)) X exponential(X x) {
    using A = std::decay_t<decltype(x[0])>;
    constexpr bool narrow = sizeof(A) == 4;
    constexpr int W = sizeof(X) / sizeof(A), terms = narrow ? 8 : 14, digits = narrow ? 23 : 52;
    using I = std::conditional_t<narrow, uint32_t, uint64_t>;
    constexpr I one = I(narrow ? 127 : 1023) << digits;                               // the bits of 1
    constexpr A half = A(I(3) << (digits - 1));                                       // added to x, it leaves no digit after the point
    constexpr A high = narrow ? 0x1.63p-1 : 0x1.62e42feep-1, low = narrow ? -0x1.bd0105c610ca8p-13 : 0x1.a39ef35793c76p-33;   // log 2
    constexpr A least = narrow ? -87 : -708;
    constexpr double series[] = {1, 1, 1. / 2, 1. / 6, 1. / 24, 1. / 120, 1. / 720, 1. / 5040, 1. / 40320, 1. / 362880,
                                 1. / 3628800, 1. / 39916800, 1. / 479001600, 1. / 6227020800};
    const X t = x * A(1.4426950408889634) + half, n = t - half, r = x - n * high - n * low;
    X sum = {};
    for (int i = terms - 1; i >= 0; i--) sum = sum * r + A(series[i]);
    const X power = (X)(((V<I, W>)t << digits) + one);                                // 2^n: its n is in the last bits of t
    return x < least ? X{} : sum * power;
}
// endregion exponential
