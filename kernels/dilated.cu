// Dilated window attention on CUDA: what is launched, and the registration with PyTorch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>
#include <tuple>
#include <vector>
#include "launch.h"
#include "dilated_cuda.h"
#include "dilated_problem.h"

namespace deformlit::dilated {

// region dilated_cuda_run
CudaProblem plan(const Problem& p) {
    STD_TORCH_CHECK(p.dilations.size() <= MOST_DILATIONS, "dilated_attn: at most ", MOST_DILATIONS, " dilations on CUDA");
    const auto map = [](const Map& m) { return CudaMap{m.b, m.n, m.d}; };
    CudaProblem o{map(p.q), map(p.k), map(p.v), map(p.grad), p.b, p.padding, p.scale, p.n, p.d, p.h, p.w, p.ks, int(p.dilations.size()), {}};
    std::copy(p.dilations.begin(), p.dilations.end(), o.dilations);
    return o;
}
int64_t blocks(const Problem& p) { return p.b * p.n * ((int64_t(p.h) * p.w + PIXELS - 1) / PIXELS); }

template <typename T, typename A>
struct Kernels {
    void (*forward)(CudaProblem, const T*, const T*, const T*, T*);
    void (*backward)(CudaProblem, const T*, const T*, const T*, const T*, T*, A*);
    void (*gather)(CudaProblem, const T*, const T*, const A*, T*, T*);

    void run(const Problem& p, const Tensor& q, const Tensor& k, const Tensor& v, Tensor& out) const {
        launch(forward, blocks(p), stream(q), plan(p), (const T*)q.data_ptr(), (const T*)k.data_ptr(), (const T*)v.data_ptr(), (T*)out.data_ptr());
    }
    void run(const Problem& p, const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, Gradients& to) const {
        const int64_t shape[] = {p.b, p.n, 2, int64_t(p.ks) * p.ks, p.h, p.w};
        Tensor room = torch::stable::new_empty(q, {shape, 6}, sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float);
        const T *from_g = (const T*)grad.data_ptr(), *from_q = (const T*)q.data_ptr();
        launch(backward, blocks(p), stream(q), plan(p), from_g, from_q, (const T*)k.data_ptr(), (const T*)v.data_ptr(),
               (T*)std::get<0>(to).data_ptr(), (A*)room.data_ptr());
        launch(gather, blocks(p), stream(q), plan(p), from_g, from_q, (const A*)room.data_ptr(),
               (T*)std::get<1>(to).data_ptr(), (T*)std::get<2>(to).data_ptr());
    }
};
#define KERNELS(name) {dilated_forward_##name, dilated_backward_##name, dilated_gather_##name}
const Kernels<float, float> f32 = KERNELS(f32);
const Kernels<double, double> f64 = KERNELS(f64);
const Kernels<F16, float> f16 = KERNELS(f16);
const Kernels<BF16, float> bf16 = KERNELS(bf16);

template <typename... X>
void dispatch(const Problem& p, const Tensor& q, X&&... x) {
    if (q.numel() == 0) return;
    const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
    switch (q.scalar_type()) {
        case ScalarType::Float: f32.run(p, x...); break;
        case ScalarType::Double: f64.run(p, x...); break;
        case ScalarType::Half: f16.run(p, x...); break;
        default: bf16.run(p, x...);
    }
}

Tensor dilated_attn(Tensor q, Tensor k, Tensor v, int64_t kernel_size, std::vector<int64_t> dilations, double padding, double scale) {
    const Problem p = problem(q, k, v, kernel_size, dilations, padding, scale);
    Tensor out = like(q);
    dispatch(p, q, q, k, v, out);
    return out;
}
Gradients dilated_attn_backward(Tensor grad, Tensor q, Tensor k, Tensor v, int64_t kernel_size, std::vector<int64_t> dilations,
                                double padding, double scale) {
    const Problem p = problem(q, k, v, kernel_size, dilations, padding, scale, &grad);
    Gradients to{like(q), like(q), like(q)};
    dispatch(p, q, grad, q, k, v, to);
    return to;
}

STABLE_TORCH_LIBRARY_IMPL(deformlit, CUDA, m) {
    m.impl("dilated_attn", TORCH_BOX(&dilated_attn));
    m.impl("dilated_attn_backward", TORCH_BOX(&dilated_attn_backward));
}
// endregion dilated_cuda_run

}  // namespace deformlit::dilated
