// Attention with a bias read between the numbers of a table, on CUDA: what is launched, and the registration with PyTorch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <tuple>
#include "launch.h"
#include "deformed_keys_cuda.h"
#include "deformed_keys_problem.h"

namespace deformlit {
namespace deformed_keys {

// region deformed_cuda_run
int64_t blocks(int64_t count) { return std::min<int64_t>((count + THREADS - 1) / THREADS, 4096); }
int64_t blocks(const Problem& o, int64_t count, int each) {
    return o.b * o.n * ((count + each - 1) / each) * ((o.d + CHANNELS - 1) / CHANNELS);
}

template <typename T, typename A>
struct Kernels {
    void (*forward)(Problem, const T*, const T*, const T*, const A*, const A*, T*, A*);
    void (*largest)(const T*, Strides, i64, int, i64, int, A*);
    void (*dots)(Problem, const T*, const T*, A*);
    void (*queries)(Problem, Given<T, A>, T*, Fixed);
    void (*keys)(Problem, Given<T, A>, T*, T*, A*);
    void (*finish)(Problem, Fixed, const A*, A*, A*);

    void run(const Problem& o, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& table, const Tensor& start,
             Tensor& out, Tensor& sums) const {
        launch(forward, blocks(o, o.q, QUERIES), stream(q), o, (const T*)q.data_ptr(), (const T*)k.data_ptr(), (const T*)v.data_ptr(),
               (const A*)table.data_ptr(), (const A*)start.data_ptr(), (T*)out.data_ptr(), (A*)sums.data_ptr());
    }
    void run(const Problem& o, const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& table, const Tensor& start,
             const Tensor& out, const Tensor& sums, Gradients& to) const {
        const cudaStream_t s = stream(q);
        const auto zeros = [&](int64_t count, ScalarType t) { return torch::stable::new_zeros(table, {&count, 1}, t); };
        Tensor sum = zeros(table.numel(), ScalarType::Long), mark = zeros(o.n, ScalarType::Int), most = zeros(2, table.scalar_type());
        Tensor dot = like(table, {o.b, o.n, o.q}), by_head = like(table, {o.b, o.n, o.k, 2});
        const Fixed fixed{(i64*)sum.data_ptr(), (int*)mark.data_ptr(), most.data_ptr()};
        const Given<T, A> given{(const T*)grad.data_ptr(), (const T*)q.data_ptr(), (const T*)k.data_ptr(), (const T*)v.data_ptr(),
                                (const A*)table.data_ptr(), (const A*)start.data_ptr(), (const A*)sums.data_ptr(), (const A*)dot.data_ptr()};
        const Strides sg{int64_t(o.n) * o.d * o.q, o.d * o.q, 1, o.q};
        launch(largest, blocks(grad.numel()), s, given.grad, sg, o.b, o.n, o.q, o.d, (A*)most.data_ptr());
        launch(largest, blocks(v.numel()), s, given.v, o.sv, o.b, o.n, o.k, o.d, (A*)most.data_ptr() + 1);
        launch(dots, blocks(dot.numel()), s, o, given.grad, (const T*)out.data_ptr(), (A*)dot.data_ptr());
        launch(queries, blocks(o, o.q, QUERIES), s, o, given, (T*)std::get<0>(to).data_ptr(), fixed);
        launch(keys, blocks(o, o.k, KEYS), s, o, given, (T*)std::get<1>(to).data_ptr(), (T*)std::get<2>(to).data_ptr(), (A*)by_head.data_ptr());
        launch(finish, blocks(std::max<int64_t>(table.numel(), start.numel())), s, o, fixed, (const A*)by_head.data_ptr(),
               (A*)std::get<3>(to).data_ptr(), (A*)std::get<4>(to).data_ptr());
    }
};
#define KERNELS(name) {dk_forward_##name, dk_largest_##name, dk_dots_##name, dk_queries_##name, dk_keys_##name, dk_finish_##name}
const Kernels<float, float> f32 = KERNELS(f32);
const Kernels<double, double> f64 = KERNELS(f64);
const Kernels<F16, float> f16 = KERNELS(f16);
const Kernels<BF16, float> bf16 = KERNELS(bf16);

template <typename... X>
void dispatch(const Problem& o, const Tensor& q, X&&... x) {
    const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
    switch (q.scalar_type()) {
        case ScalarType::Float: f32.run(o, x...); break;
        case ScalarType::Double: f64.run(o, x...); break;
        case ScalarType::Half: f16.run(o, x...); break;
        default: bf16.run(o, x...);
    }
}

std::tuple<Tensor, Tensor> deformed_keys(Tensor q, Tensor k, Tensor v, Tensor table, Tensor start,
                                         double step_x, double step_y, int64_t h, int64_t w) {
    const Problem o = problem(q, k, v, table, start, step_x, step_y, h, w);
    Tensor out = like(q, {o.b, o.n, o.d, o.q}), sums = like(table, {o.b, o.n, o.q});
    dispatch(o, q, q, k, v, table, start, out, sums);
    return {out, sums};
}
Gradients deformed_keys_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor table, Tensor start, Tensor out, Tensor sums,
                                 double step_x, double step_y, int64_t h, int64_t w) {
    const Problem o = problem(q, k, v, table, start, step_x, step_y, h, w);
    check_backward(o, q, grad, out, sums);
    Gradients to = gradients(o, q, table, start);
    dispatch(o, q, grad, q, k, v, table, start, out, sums, to);
    return to;
}

STABLE_TORCH_LIBRARY_IMPL(deformlit, CUDA, m) {
    m.impl("deformed_keys", TORCH_BOX(&deformed_keys));
    m.impl("deformed_keys_backward", TORCH_BOX(&deformed_keys_backward));
}
// endregion deformed_cuda_run

}  // namespace deformed_keys
}  // namespace deformlit
