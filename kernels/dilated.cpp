// Dilated window attention on the CPU: the sharing out of work, and the registration with PyTorch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>
#include "cpu.h"
#include "dilated_problem.h"

namespace deformlit::dilated {

#define KERNEL "dilated_cpu.h"
#include "isa.h"

// region dilated_cpu
// Where there are few images and heads, each is cut into strips of rows, so that there is work for all threads.
inline int64_t strips_of(const Problem& o) {
    const int64_t far = int64_t(o.ks / 2) * *std::max_element(o.dilations.begin(), o.dilations.end()), units = o.b * o.n;
    return std::max<int64_t>(1, std::min<int64_t>(o.h / std::max<int64_t>(8, 4 * far), (4 * torch::stable::get_num_threads() + units - 1) / units));
}

// A number is read about `passes` times for each key of the window.
template <typename F>
void in_units(const Problem& o, int64_t strips, int passes, const F& f) {
    const int64_t numbers = std::max<int64_t>(1, int64_t(o.ks) * o.ks * o.d * o.h / strips * o.w * passes);
    in_pieces(o.b * o.n * strips, std::max<int64_t>(1, WORTH_A_THREAD / numbers), f);
}

template <typename T, typename A>
void run(const Problem& o, const Tensor& q, const Tensor& k, const Tensor& v, Tensor& out) {
    const auto kernel = BEST(forward<T, A>);
    const T *from_q = (const T*)q.data_ptr(), *from_k = (const T*)k.data_ptr(), *from_v = (const T*)v.data_ptr();
    T* to = (T*)out.data_ptr();
    const int64_t strips = strips_of(o);
    in_units(o, strips, 2, [&](int64_t begin, int64_t end) { kernel(o, from_q, from_k, from_v, to, strips, begin, end); });
}

template <typename T, typename A>
void run(const Problem& o, const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, Gradients& to) {
    const auto kernel = BEST(backward<T, A>);
    const T *from_g = (const T*)grad.data_ptr(), *from_q = (const T*)q.data_ptr(), *from_k = (const T*)k.data_ptr(), *from_v = (const T*)v.data_ptr();
    T *to_q = (T*)std::get<0>(to).data_ptr(), *to_k = (T*)std::get<1>(to).data_ptr(), *to_v = (T*)std::get<2>(to).data_ptr();
    const int64_t strips = strips_of(o);
    in_units(o, strips, 5, [&](int64_t begin, int64_t end) { kernel(o, from_g, from_q, from_k, from_v, to_q, to_k, to_v, strips, begin, end); });
}

template <typename... X>
void dispatch(const Problem& o, const Tensor& q, X&&... x) {
    if (q.numel() == 0) return;
    switch (q.scalar_type()) {
        case ScalarType::Float: run<float, float>(o, x...); break;
        case ScalarType::Double: run<double, double>(o, x...); break;
        case ScalarType::Half: run<Half, float>(o, x...); break;
        default: run<BFloat16, float>(o, x...);
    }
}

Tensor dilated_attn(Tensor q, Tensor k, Tensor v, int64_t kernel_size, std::vector<int64_t> dilations, double padding, double scale) {
    const Problem o = problem(q, k, v, kernel_size, dilations, padding, scale);
    Tensor out = like(q);
    dispatch(o, q, q, k, v, out);
    return out;
}

Gradients dilated_attn_backward(Tensor grad, Tensor q, Tensor k, Tensor v, int64_t kernel_size, std::vector<int64_t> dilations,
                                double padding, double scale) {
    const Problem o = problem(q, k, v, kernel_size, dilations, padding, scale, &grad);
    Gradients to{like(q), like(q), like(q)};
    dispatch(o, q, grad, q, k, v, to);
    return to;
}

STABLE_TORCH_LIBRARY_IMPL(deformlit, CPU, m) {
    m.impl("dilated_attn", TORCH_BOX(&dilated_attn));
    m.impl("dilated_attn_backward", TORCH_BOX(&dilated_attn_backward));
}
// endregion dilated_cpu

}  // namespace deformlit::dilated
