// Multi-scale deformable attention on CUDA: what is launched, on which stream, and the registration with PyTorch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <cstdint>
#include <string>
#include <tuple>
#include <vector>
#include "launch.h"
#include "multiscale_cuda.h"
#include "multiscale_problem.h"

namespace deformlit {

// region cuda_plan
// Threads for a row, and whether whole words may be read: every row must then begin at a multiple of 16 bytes.
CudaProblem plan(const Problem& p, const Tensor& value, const void* grad, int vec, bool& wide) {
    STD_TORCH_CHECK(p.l <= MOST_LEVELS, "ms_deform_attn: at most ", MOST_LEVELS, " levels on CUDA");
    wide = p.d % vec == 0 && p.stride_b % vec == 0 && p.stride_s % vec == 0 && p.stride_n % vec == 0 &&
           ((uintptr_t)value.data_ptr() | (uintptr_t)grad) % 16 == 0;
    CudaProblem o{p.b, p.q, p.s, p.stride_b, p.stride_s, p.stride_n, p.n, p.d, p.l, p.k, 1, {}};
    while (o.lanes < 32 && o.lanes * (wide ? vec : 1) < p.d) o.lanes *= 2;
    for (int i = 0; i < p.l; i++) o.levels[i] = {p.levels[i].h, p.levels[i].w, p.levels[i].first};
    return o;
}
int64_t blocks(const CudaProblem& o) { const int queries = THREADS / o.lanes; return o.b * o.n * ((o.q + queries - 1) / queries); }
int64_t blocks(int64_t count) { return std::min<int64_t>((count + THREADS - 1) / THREADS, 4096); }
// endregion cuda_plan

// region cuda_run
template <typename T, typename A, int VEC>
struct Kernels {
    void (*forward[2])(CudaProblem, const T*, const A*, const A*, T*);
    void (*backward[2])(CudaProblem, const T*, const T*, const A*, const A*, A*, A*, A*, Fixed);
    void (*largest)(const T*, i64, A*);
    void (*finish)(T*, const A*, Fixed, i64, int);

    Tensor run(Tensor& value, const std::vector<int64_t>& sizes, Tensor& points, Tensor& weights) const {
        const Problem p = problem(value, sizes, points, weights);
        Tensor out = output(p, value);
        bool wide;
        const CudaProblem o = plan(p, value, nullptr, VEC, wide);
        launch(forward[wide], blocks(o), stream(value), o, (const T*)value.data_ptr(), (const A*)points.data_ptr(),
               (const A*)weights.data_ptr(), (T*)out.data_ptr());
        return out;
    }

    Gradients run(Tensor& grad, Tensor& value, const std::vector<int64_t>& sizes, Tensor& points, Tensor& weights, bool deterministic) const {
        const Problem p = problem(value, sizes, points, weights, &grad);
        Gradients to = gradients(value, points, weights);
        bool wide;
        const CudaProblem o = plan(p, value, grad.data_ptr(), VEC, wide);
        const cudaStream_t s = stream(value);
        const int64_t rows = p.b * p.s * p.n, count = rows * p.d;
        T* to_value = (T*)std::get<0>(to).data_ptr();
        const bool direct = std::is_same<T, A>::value && !deterministic;
        const auto room = [&](ScalarType t, int64_t n) {
            const int64_t shape[] = {n};
            return torch::stable::new_zeros(value, {shape, 1}, t);
        };
        const ScalarType a = points.scalar_type();
        Tensor sum = room(a, direct || deterministic ? 0 : count), whole = room(ScalarType::Long, deterministic ? count : 0);
        Tensor mark = room(ScalarType::Int, deterministic ? rows : 0), most = room(a, deterministic ? 2 : 0);
        A* to_sum = direct ? (A*)to_value : (A*)sum.data_ptr();
        if (direct) check(cudaMemsetAsync(to_value, 0, count * sizeof(T), s), "the gradient was not set to zero");
        Fixed fixed{nullptr, nullptr, nullptr, 0};
        if (deterministic) {
            fixed = {(i64*)whole.data_ptr(), (int*)mark.data_ptr(), most.data_ptr(), i64(p.q) * p.k};
            launch(largest, blocks(grad.numel()), s, (const T*)grad.data_ptr(), grad.numel(), (A*)most.data_ptr());
            launch(weights_largest(), blocks(weights.numel()), s, (const A*)weights.data_ptr(), weights.numel(), (A*)most.data_ptr() + 1);
        }
        launch(backward[wide], blocks(o), s, o, (const T*)grad.data_ptr(), (const T*)value.data_ptr(), (const A*)points.data_ptr(),
               (const A*)weights.data_ptr(), to_sum, (A*)std::get<1>(to).data_ptr(), (A*)std::get<2>(to).data_ptr(), fixed);
        if (!direct) launch(finish, blocks(count), s, to_value, (const A*)to_sum, fixed, count, p.d);
        return to;
    }
    static auto weights_largest() -> void (*)(const A*, i64, A*);
};
template <> auto Kernels<float, float, 4>::weights_largest() -> void (*)(const float*, i64, float*) { return msda_largest_f32; }
template <> auto Kernels<double, double, 2>::weights_largest() -> void (*)(const double*, i64, double*) { return msda_largest_f64; }
template <> auto Kernels<F16, float, 8>::weights_largest() -> void (*)(const float*, i64, float*) { return msda_largest_f32; }
template <> auto Kernels<BF16, float, 8>::weights_largest() -> void (*)(const float*, i64, float*) { return msda_largest_f32; }

#define KERNELS(name, VEC) {{msda_forward_##name##_1, msda_forward_##name##_##VEC}, {msda_backward_##name##_1, msda_backward_##name##_##VEC}, \
                            msda_largest_##name, msda_finish_##name}
const Kernels<float, float, 4> f32 = KERNELS(f32, 4);
const Kernels<double, double, 2> f64 = KERNELS(f64, 2);
const Kernels<F16, float, 8> f16 = KERNELS(f16, 8);
const Kernels<BF16, float, 8> bf16 = KERNELS(bf16, 8);

template <typename... A>
auto dispatch(const Tensor& value, A&&... args) {
    const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
    switch (value.scalar_type()) {
        case ScalarType::Float: return f32.run(args...);
        case ScalarType::Double: return f64.run(args...);
        case ScalarType::Half: return f16.run(args...);
        case ScalarType::BFloat16: return bf16.run(args...);
        default: STD_TORCH_CHECK(false, "ms_deform_attn: `value` must be float16, bfloat16, float32 or float64"); return f32.run(args...);
    }
}
Tensor ms_deform_attn(Tensor value, std::vector<int64_t> sizes, Tensor points, Tensor weights) {
    return dispatch(value, value, sizes, points, weights);
}
Gradients ms_deform_attn_backward(Tensor grad, Tensor value, std::vector<int64_t> sizes, Tensor points, Tensor weights, bool deterministic) {
    return dispatch(value, grad, value, sizes, points, weights, deterministic);
}

STABLE_TORCH_LIBRARY_IMPL(deformlit, CUDA, m) {
    m.impl("ms_deform_attn", TORCH_BOX(&ms_deform_attn));
    m.impl("ms_deform_attn_backward", TORCH_BOX(&ms_deform_attn_backward));
}
// endregion cuda_run

}  // namespace deformlit
