// What no kernel that reads rows by index can beat: the reads themselves, with indices and weights given.
// Compiled by limits.py for the machine it runs on. Rows have d floats; of each point the rows first, first + step,
// first + width, first + width + step are read, as bilinear interpolation does.
#include <cstdint>
#include <initializer_list>
#if defined(__AVX512F__)
constexpr int WIDEST = 16;
#elif defined(__AVX__)
constexpr int WIDEST = 8;
#else
constexpr int WIDEST = 4;
#endif

template <int V> struct vector { typedef float type __attribute__((vector_size(4 * V), aligned(4), may_alias)); };

template <int D> struct Rows {
    static constexpr int V = D < WIDEST ? D : WIDEST, N = D / V;
    typedef typename vector<V>::type vec;

    // out[query] = sum over its points of w * (the four rows)
    static void gather(const float* table, const int32_t* first, const float* w, const int32_t* width, const int32_t* step, float* out,
                       int64_t queries, int points, int threads) {
        #pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t q = 0; q < queries; q++) {
            vec sum[N] = {};
            for (int p = 0; p < points; p++) {
                const float* at = table + int64_t(first[q * points + p]) * D;
                const int64_t x = int64_t(step[p]) * D, y = int64_t(width[p]) * D;
                const vec weight = w[q * points + p] - vec{};
                for (int64_t o : {int64_t(0), x, y, x + y})
                    #pragma GCC unroll 32
                    for (int i = 0; i < N; i++) sum[i] += weight * *(const vec*)(at + o + i * V);
            }
            #pragma GCC unroll 32
            for (int i = 0; i < N; i++) *(vec*)(out + q * D + i * V) = sum[i];
        }
    }

    // (the four rows) += w * grad[query]; one table at a time and in it one level at a time, so that nobody else writes there
    static void scatter(float* table, const int32_t* first, const float* w, const int32_t* width, const int32_t* step, const float* grad,
                        int64_t tables, int64_t queries, int points, int levels, int threads) {
        const int k = points / levels;
        #pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t unit = 0; unit < tables * levels; unit++) {
            const int64_t t = unit / levels;
            const int l = unit % levels;
            for (int64_t q = t * queries; q < (t + 1) * queries; q++) {
                vec g[N];
                #pragma GCC unroll 32
                for (int i = 0; i < N; i++) g[i] = *(const vec*)(grad + q * D + i * V);
                for (int p = l * k; p < (l + 1) * k; p++) {
                    float* at = table + int64_t(first[q * points + p]) * D;
                    const int64_t x = int64_t(step[p]) * D, y = int64_t(width[p]) * D;
                    const vec weight = w[q * points + p] - vec{};
                    for (int64_t o : {int64_t(0), x, y, x + y})
                        #pragma GCC unroll 32
                        for (int i = 0; i < N; i++) *(vec*)(at + o + i * V) += weight * g[i];
                }
            }
        }
    }
};

#define EACH_WIDTH(call) switch (d) { case 8: Rows<8>::call; return 0; case 16: Rows<16>::call; return 0; case 32: Rows<32>::call; return 0; \
                                      case 64: Rows<64>::call; return 0; case 128: Rows<128>::call; return 0; default: return 1; }

extern "C" int gather(const float* table, const int32_t* first, const float* w, const int32_t* width, const int32_t* step, float* out,
                      int64_t queries, int points, int d, int threads) {
    EACH_WIDTH(gather(table, first, w, width, step, out, queries, points, threads))
}

extern "C" int scatter(float* table, const int32_t* first, const float* w, const int32_t* width, const int32_t* step, const float* grad,
                       int64_t tables, int64_t queries, int points, int levels, int d, int threads) {
    EACH_WIDTH(scatter(table, first, w, width, step, grad, tables, queries, points, levels, threads))
}
