// What a call asks for, checked: the same for CPU and CUDA. The kernels trust these sizes, so wrong ones are refused here.
#pragma once

namespace deformlit {
namespace deformed_keys {

using torch::stable::Tensor;
using torch::headeronly::ScalarType;

// region problem
inline Problem problem(const Tensor& q, const Tensor& k, const Tensor& v, Tensor& table, Tensor& start,
                       double step_x, double step_y, int64_t h, int64_t w) {
    STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4 && table.dim() == 3 && start.dim() == 4 && start.size(3) == 2,
                    "deformed_keys: expected q `b n q d`, k and v `b n k d`, table `n th tw` and start `b g k 2`");
    constexpr int64_t most = int64_t(1) << 22;
    STD_TORCH_CHECK(h > 0 && w > 0 && h < most && w < most && q.size(2) == h * w, "deformed_keys: `h` times `w` must be the number of queries, each below 2^22");
    STD_TORCH_CHECK(table.size(1) > 0 && table.size(2) > 0 && table.size(1) < most && table.size(2) < most && k.size(2) < most && q.size(3) < most && q.size(1) < most,
                    "deformed_keys: sizes of the table must be above zero, and all sizes below 2^22");
    Problem o{};
    o.b = q.size(0); o.n = q.size(1); o.q = q.size(2); o.d = q.size(3); o.k = k.size(2); o.g = start.size(1);
    o.h = h; o.w = w; o.th = table.size(1); o.tw = table.size(2);
    for (const Tensor* x : {&k, &v})
        STD_TORCH_CHECK(x->size(0) == o.b && x->size(1) == o.n && x->size(2) == o.k && x->size(3) == o.d, "deformed_keys: k and v must be `b n k d`, as q is `b n q d`");
    STD_TORCH_CHECK(table.size(0) == o.n && start.size(0) == o.b && start.size(2) == o.k, "deformed_keys: `table` must have a row of heads, `start` the images and keys");
    STD_TORCH_CHECK(o.d > 0 && o.g > 0 && o.n % o.g == 0, "deformed_keys: there must be channels, and groups that divide the heads");
    STD_TORCH_CHECK(step_x - step_x == 0 && step_y - step_y == 0 && step_x > -most && step_x < most && step_y > -most && step_y < most, "deformed_keys: steps must be finite and below 2^22");
    o.more_x = step_x - 1; o.more_y = step_y - 1;

    const ScalarType t = q.scalar_type(), a = t == ScalarType::Double ? t : ScalarType::Float;
    STD_TORCH_CHECK(t == ScalarType::Float || t == ScalarType::Double || t == ScalarType::Half || t == ScalarType::BFloat16,
                    "deformed_keys: q must be float16, bfloat16, float32 or float64");
    STD_TORCH_CHECK(k.scalar_type() == t && v.scalar_type() == t, "deformed_keys: q, k and v must have one dtype");
    STD_TORCH_CHECK(table.scalar_type() == a && start.scalar_type() == a, "deformed_keys: `table` and `start` must be float32, or float64 with such a q");
    for (const Tensor* x : {&k, &v, (const Tensor*)&table, (const Tensor*)&start})
        STD_TORCH_CHECK(x->is_cpu() == q.is_cpu() && x->is_cuda() == q.is_cuda() && x->get_device_index() == q.get_device_index(), "deformed_keys: all tensors must be on one device");
    table = torch::stable::contiguous(table);
    start = torch::stable::contiguous(start);
    const auto strides = [](const Tensor& x) { return Strides{x.stride(0), x.stride(1), x.stride(2), x.stride(3)}; };
    o.sq = strides(q); o.sk = strides(k); o.sv = strides(v);
    return o;
}

// What the backward is given besides: the forward's result and the gradient to it `b n d q`, and the logarithms of its sums `b n q`.
inline void check_backward(const Problem& o, const Tensor& q, Tensor& grad, Tensor& out, Tensor& sums) {
    for (const Tensor* x : {&grad, &out})
        STD_TORCH_CHECK(x->dim() == 4 && x->size(0) == o.b && x->size(1) == o.n && x->size(2) == o.d && x->size(3) == o.q && x->scalar_type() == q.scalar_type(),
                        "deformed_keys_backward: `grad` and `out` must be `b n d q` with the dtype of q");
    STD_TORCH_CHECK(sums.dim() == 3 && sums.size(0) == o.b && sums.size(1) == o.n && sums.size(2) == o.q &&
                    sums.scalar_type() == (q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float),
                    "deformed_keys_backward: `sums` must be `b n q`, float32, or float64 with such a q");
    for (const Tensor* x : {&grad, &out, &sums})
        STD_TORCH_CHECK(x->is_cpu() == q.is_cpu() && x->is_cuda() == q.is_cuda() && x->get_device_index() == q.get_device_index(), "deformed_keys_backward: all tensors must be on one device");
    grad = torch::stable::contiguous(grad); out = torch::stable::contiguous(out); sums = torch::stable::contiguous(sums);
}

inline Tensor like(const Tensor& x, std::initializer_list<int64_t> shape) {
    return torch::stable::new_empty(x, {shape.begin(), shape.size()});
}
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;   // to q `b n d q`, k and v `b n d k`, table, start
inline Gradients gradients(const Problem& o, const Tensor& q, const Tensor& table, const Tensor& start) {
    return {like(q, {o.b, o.n, o.d, o.q}), like(q, {o.b, o.n, o.d, o.k}), like(q, {o.b, o.n, o.d, o.k}), like(table, {o.n, o.th, o.tw}), like(start, {o.b, o.g, o.k, 2})};
}
// endregion problem

}  // namespace deformed_keys
}  // namespace deformlit
