// What a call asks for, checked: the same for CPU and CUDA. The kernels trust these sizes, so wrong ones are refused here.
#pragma once

namespace deformlit {
namespace deformed_keys {

using torch::stable::Tensor;
using torch::headeronly::ScalarType;

// region deformed_problem
inline bool shaped(const Tensor& x, std::initializer_list<int64_t> shape) {
    if (x.dim() != int64_t(shape.size())) return false;
    int64_t i = 0;
    for (int64_t size : shape) if (x.size(i++) != size) return false;
    return true;
}
inline void check_kind(const char* name, const Tensor& x, ScalarType t, const Tensor& q) {
    STD_TORCH_CHECK(x.scalar_type() == t, "deformed_keys: `", name, "` must have the dtype of q; table, start and sums float32 with halves");
    STD_TORCH_CHECK(x.is_cpu() == q.is_cpu() && x.is_cuda() == q.is_cuda() && x.get_device_index() == q.get_device_index(),
                    "deformed_keys: `", name, "` must be on the device of q");
    const int size = t == ScalarType::Double ? 8 : t == ScalarType::Float ? 4 : 2;
    STD_TORCH_CHECK((uintptr_t)x.data_ptr() % size == 0, "deformed_keys: the memory of `", name, "` begins within a number");
}
inline ScalarType whole_type(const Tensor& q) { return q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

inline Problem problem(const Tensor& q, const Tensor& k, const Tensor& v, Tensor& table, Tensor& start,
                       double step_x, double step_y, int64_t h, int64_t w) {
    STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && table.dim() == 3 && start.dim() == 4,
                    "deformed_keys: expected q `b n q d`, k and v `b n k d`, table `n th tw` and start `b g k 2`");
    constexpr int64_t most = int64_t(1) << 22;
    for (int64_t size : {h, w, table.size(1), table.size(2), q.size(3)})
        STD_TORCH_CHECK(size > 0 && size < most, "deformed_keys: sizes of map, table and channels must be above zero and below 2^22");
    const int64_t b = q.size(0), n = q.size(1), d = q.size(3), keys = k.size(2), g = start.size(1);
    STD_TORCH_CHECK(q.size(2) == h * w && n < most && keys < most, "deformed_keys: q must have `h` times `w` queries, heads and keys be below 2^22");
    STD_TORCH_CHECK(shaped(k, {b, n, keys, d}) && shaped(v, {b, n, keys, d}), "deformed_keys: k and v must be `b n k d`, as q is `b n q d`");
    STD_TORCH_CHECK(table.size(0) == n && shaped(start, {b, g, keys, 2}), "deformed_keys: `table` must be `n th tw`, and `start` `b g k 2`");
    STD_TORCH_CHECK(g > 0 && n % g == 0, "deformed_keys: `start` must have groups that divide the heads");
    for (double step : {step_x, step_y}) STD_TORCH_CHECK(step > -most && step < most, "deformed_keys: a step must be a number below 2^22");
    const ScalarType t = q.scalar_type();
    STD_TORCH_CHECK(t == ScalarType::Float || t == ScalarType::Double || t == ScalarType::Half || t == ScalarType::BFloat16,
                    "deformed_keys: q must be float16, bfloat16, float32 or float64");
    table = torch::stable::contiguous(table);
    start = torch::stable::contiguous(start);
    check_kind("q", q, t, q); check_kind("k", k, t, q); check_kind("v", v, t, q);
    check_kind("table", table, whole_type(q), q); check_kind("start", start, whole_type(q), q);
    const auto strides = [](const Tensor& x) { return Strides{x.stride(0), x.stride(1), x.stride(2), x.stride(3)}; };
    return {b, h * w, keys, strides(q), strides(k), strides(v), step_x - 1, step_y - 1,
            int(n), int(g), int(d), int(h), int(w), int(table.size(1)), int(table.size(2))};
}

// What the backward is given besides: the forward's result and its gradient `b n d q`, and the logarithms of its sums `b n q`.
inline void check_backward(const Problem& o, const Tensor& q, Tensor& grad, Tensor& out, Tensor& sums) {
    STD_TORCH_CHECK(shaped(grad, {o.b, o.n, o.d, o.q}) && shaped(out, {o.b, o.n, o.d, o.q}) && shaped(sums, {o.b, o.n, o.q}),
                    "deformed_keys_backward: expected `grad` and `out` `b n d q`, and `sums` `b n q`");
    grad = torch::stable::contiguous(grad); out = torch::stable::contiguous(out); sums = torch::stable::contiguous(sums);
    check_kind("grad", grad, q.scalar_type(), q); check_kind("out", out, q.scalar_type(), q); check_kind("sums", sums, whole_type(q), q);
}

inline Tensor like(const Tensor& x, std::initializer_list<int64_t> shape) {
    return torch::stable::new_empty(x, {shape.begin(), shape.size()});
}
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;      // to q `b n d q`, k and v `b n d k`, table, start
inline Gradients gradients(const Problem& o, const Tensor& q, const Tensor& table, const Tensor& start) {
    return {like(q, {o.b, o.n, o.d, o.q}), like(q, {o.b, o.n, o.d, o.k}), like(q, {o.b, o.n, o.d, o.k}),
            like(table, {o.n, o.th, o.tw}), like(start, {o.b, o.g, o.k, 2})};
}
// endregion deformed_problem

}  // namespace deformed_keys
}  // namespace deformlit
