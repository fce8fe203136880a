// Multi-scale deformable attention on the CPU: checks, and the registration with PyTorch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <algorithm>
#include <cstdint>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>
#include "cpu.h"
#include "multiscale.h"
#include "multiscale_problem.h"

namespace deformlit {

#define KERNEL "multiscale_cpu.h"
#include "isa.h"

// region cpu
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
