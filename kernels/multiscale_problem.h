// What a call asks for, checked: the same for CPU and CUDA. The kernels trust these sizes, so wrong ones are refused here.
#pragma once

namespace deformlit {

using torch::stable::Tensor;
using torch::headeronly::ScalarType;
using Gradients = std::tuple<Tensor, Tensor, Tensor>;

// region problem
struct Level { int h, w, first; };   // `first`: the number of the level's first pixel
struct Problem {
    int64_t b, q, s;
    int n, d, l, k;
    int64_t stride_b, stride_s, stride_n;
    std::vector<Level> levels;       // one more than there are, with first = s
    int64_t samples() const { return int64_t(n) * l * k; }
};

inline Problem problem(Tensor& value, const std::vector<int64_t>& sizes, Tensor& points, Tensor& weights, Tensor* grad = nullptr) {
    STD_TORCH_CHECK(value.dim() == 4 && points.dim() == 6 && weights.dim() == 5 && points.size(5) == 2,
                    "ms_deform_attn: expected value `b s n d`, points `b q n l k 2` and weights `b q n l k`");
    constexpr int64_t most = int64_t(1) << 31;
    for (int64_t size : {value.size(2), value.size(3), points.size(3), points.size(4)})
        STD_TORCH_CHECK(size < most, "ms_deform_attn: heads, channels, levels and points must be fewer than 2^31");
    Problem o{};
    o.b = points.size(0); o.q = points.size(1); o.s = value.size(1);
    o.n = value.size(2); o.d = value.size(3); o.l = points.size(3); o.k = points.size(4);
    STD_TORCH_CHECK(value.size(0) == o.b && points.size(2) == o.n, "ms_deform_attn: `value` and `points` differ in images or heads");
    for (int i = 0; i < 5; i++)
        STD_TORCH_CHECK(weights.size(i) == points.size(i), "ms_deform_attn: `weights` must have the shape of `points` without the last dimension");
    STD_TORCH_CHECK(int64_t(sizes.size()) == 2 * o.l, "ms_deform_attn: `sizes` must hold h and w of each level of `points`");
    int64_t first = 0;
    for (int i = 0; i < o.l; i++) {
        const int64_t h = sizes[2 * i], w = sizes[2 * i + 1];
        STD_TORCH_CHECK(h > 0 && w > 0 && h < most / 2 && w < most / 2 && first + h * w < most,
                        "ms_deform_attn: `sizes` must be above zero and below 2^30, and all pixels fewer than 2^31");
        o.levels.push_back({int(h), int(w), int(first)});
        first += h * w;
    }
    o.levels.push_back({0, 0, int(first)});
    STD_TORCH_CHECK(first == o.s, "ms_deform_attn: `sizes` must add up to the pixels of `value`");
    STD_TORCH_CHECK(4 * o.samples() < most && 128 * int64_t(o.l) * o.k < most, "ms_deform_attn: too many points for one query");

    const ScalarType t = value.scalar_type(), a = t == ScalarType::Double ? t : ScalarType::Float;
    STD_TORCH_CHECK(t == ScalarType::Float || t == ScalarType::Double || t == ScalarType::Half || t == ScalarType::BFloat16,
                    "ms_deform_attn: `value` must be float16, bfloat16, float32 or float64");
    STD_TORCH_CHECK(points.scalar_type() == a && weights.scalar_type() == a,
                    "ms_deform_attn: `points` and `weights` must be float32, or float64 with such a `value`");
    for (const Tensor* x : {&points, &weights, grad})
        STD_TORCH_CHECK(!x || (x->is_cpu() == value.is_cpu() && x->is_cuda() == value.is_cuda() && x->get_device_index() == value.get_device_index()),
                        "ms_deform_attn: all tensors must be on one device");
    if (grad) {
        STD_TORCH_CHECK(grad->dim() == 3 && grad->size(0) == o.b && grad->size(1) == o.q && grad->size(2) == int64_t(o.n) * o.d &&
                        grad->scalar_type() == t, "ms_deform_attn_backward: `grad` must be `b q (n d)` with the dtype of `value`");
        *grad = torch::stable::contiguous(*grad);
    }
    const int64_t far = value.stride(1);
    if (value.stride(3) != 1 || far < 0 || far >= most) value = torch::stable::contiguous(value);
    points = torch::stable::contiguous(points);
    weights = torch::stable::contiguous(weights);
    const auto aligned = [](const Tensor& x, ScalarType t) {
        return (uintptr_t)x.data_ptr() % (t == ScalarType::Double ? 8 : t == ScalarType::Float ? 4 : 2) == 0;
    };
    STD_TORCH_CHECK(aligned(value, t) && aligned(points, a) && aligned(weights, a) && (!grad || aligned(*grad, t)),
                    "ms_deform_attn: a tensor's memory begins within a number");
    o.stride_b = value.stride(0); o.stride_s = value.stride(1); o.stride_n = value.stride(2);
    return o;
}

inline Tensor output(const Problem& o, const Tensor& value) {
    const int64_t shape[] = {o.b, o.q, int64_t(o.n) * o.d};
    return torch::stable::new_empty(value, {shape, 3});
}
inline Gradients gradients(const Tensor& value, const Tensor& points, const Tensor& weights) {
    return {torch::stable::new_empty(value, value.sizes()), torch::stable::new_empty(points, points.sizes()),
            torch::stable::new_empty(weights, weights.sizes())};
}
// endregion problem

}  // namespace deformlit
