// Multi-scale deformable attention on the CPU: checks, the choice of the instruction set, and the registration with PyTorch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>
#include "multiscale.h"
#include "multiscale_problem.h"

namespace deformlit {

using c10::BFloat16;
using c10::Half;

// How many numbers lie between two places in memory, whatever they belong to.
template <typename T>
int64_t distance(const T* from, const T* to) { return ((intptr_t)to - (intptr_t)from) / (intptr_t)sizeof(T); }

// Ask for numbers that are needed soon. An address beyond the end does no harm.
template <typename T>
void prefetch(const T* p, int64_t count) {
    for (int64_t i = 0; i < count * int64_t(sizeof(T)); i += 64) __builtin_prefetch((const char*)p + i);
}

// region isa
namespace baseline {                                       // what every x86-64 has, and any other processor
#define LANES 4
#include "multiscale_cpu.h"
#undef LANES
}
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define DEFORMLIT_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#define LANES 8
#include "multiscale_cpu.h"
#undef LANES
}
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
namespace avx512 {
#define LANES 16
#include "multiscale_cpu.h"
#undef LANES
}
#pragma GCC pop_options
#endif

enum class Isa { baseline, avx2, avx512 };

// The best set that this processor has, or a lower one if DEFORMLIT_ISA names it.
Isa isa() {
    static const Isa found = [] {
        const char* asked = std::getenv("DEFORMLIT_ISA");
        const std::string name = asked ? asked : "avx512";
        STD_TORCH_CHECK(name == "baseline" || name == "avx2" || name == "avx512", "DEFORMLIT_ISA: expected baseline, avx2 or avx512, got ", name);
#ifdef DEFORMLIT_X86
        __builtin_cpu_init();
        const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
        if (has_avx512 && name == "avx512") return Isa::avx512;
        if (has_avx2 && name != "baseline") return Isa::avx2;
#endif
        return Isa::baseline;
    }();
    return found;
}

#ifdef DEFORMLIT_X86
#define BEST(...) (isa() == Isa::avx512 ? avx512::__VA_ARGS__ : isa() == Isa::avx2 ? avx2::__VA_ARGS__ : baseline::__VA_ARGS__)
#else
#define BEST(...) (isa(), baseline::__VA_ARGS__)
#endif
// endregion isa

// region cpu
constexpr int64_t WORTH_A_THREAD = 1 << 18;                // numbers read, about ten microseconds

// `f(begin, end)` on pieces of [0, count), at least `grain` long. A thread that wakes late finds less left to do.
template <typename F>
void in_pieces(int64_t count, int64_t grain, const F& f) {
    const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count / grain);
    if (threads <= 1) return f(0, count);
    const int64_t piece = std::max(grain, count / (8 * threads));
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
        for (int64_t begin; (begin = next.fetch_add(piece)) < count;) f(begin, std::min(begin + piece, count));
    });
}

template <typename T, typename A>
void run(const Problem& o, const Tensor& value, const Tensor& points, const Tensor& weights, Tensor& out) {
    const auto kernel = BEST(forward<T, A>);
    const T* v = (const T*)value.data_ptr();
    const A *p = (const A*)points.data_ptr(), *w = (const A*)weights.data_ptr();
    T* to = (T*)out.data_ptr();
    in_pieces(o.b * o.q, std::max<int64_t>(1, WORTH_A_THREAD / std::max<int64_t>(1, 4 * o.samples() * o.d)),
              [&](int64_t begin, int64_t end) { kernel(o, v, p, w, to, begin, end); });
}

template <typename T, typename A>
void run(const Problem& o, const Tensor& grad, const Tensor& value, const Tensor& points, const Tensor& weights, Gradients& to) {
    const auto kernel = BEST(backward<T, A>);
    const T *g = (const T*)grad.data_ptr(), *v = (const T*)value.data_ptr();
    const A *p = (const A*)points.data_ptr(), *w = (const A*)weights.data_ptr();
    T* to_value = (T*)std::get<0>(to).data_ptr();
    A *to_points = (A*)std::get<1>(to).data_ptr(), *to_weights = (A*)std::get<2>(to).data_ptr();
    torch::stable::parallel_for(0, o.b * o.n * o.l, std::max<int64_t>(1, WORTH_A_THREAD / std::max<int64_t>(1, 8 * o.q * o.k * o.d)),
                                [&](int64_t begin, int64_t end) { kernel(o, g, v, p, w, to_value, to_points, to_weights, begin, end); });
}

Tensor ms_deform_attn(Tensor value, std::vector<int64_t> sizes, Tensor points, Tensor weights) {
    const Problem o = problem(value, sizes, points, weights);
    Tensor out = output(o, value);
    switch (value.scalar_type()) {
        case ScalarType::Float: run<float, float>(o, value, points, weights, out); break;
        case ScalarType::Double: run<double, double>(o, value, points, weights, out); break;
        case ScalarType::Half: run<Half, float>(o, value, points, weights, out); break;
        default: run<BFloat16, float>(o, value, points, weights, out);
    }
    return out;
}

Gradients ms_deform_attn_backward(Tensor grad, Tensor value, std::vector<int64_t> sizes, Tensor points, Tensor weights, bool) {
    const Problem o = problem(value, sizes, points, weights, &grad);   // always the same sum in the same order, asked or not
    Gradients to = gradients(value, points, weights);
    switch (value.scalar_type()) {
        case ScalarType::Float: run<float, float>(o, grad, value, points, weights, to); break;
        case ScalarType::Double: run<double, double>(o, grad, value, points, weights, to); break;
        case ScalarType::Half: run<Half, float>(o, grad, value, points, weights, to); break;
        default: run<BFloat16, float>(o, grad, value, points, weights, to);
    }
    return to;
}

STABLE_TORCH_LIBRARY_IMPL(deformlit, CPU, m) {
    m.impl("ms_deform_attn", TORCH_BOX(&ms_deform_attn));
    m.impl("ms_deform_attn_backward", TORCH_BOX(&ms_deform_attn_backward));
}
// endregion cpu

}  // namespace deformlit
