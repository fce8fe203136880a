// What a call asks for, checked: the same for CPU and CUDA. The kernels trust these sizes, so wrong ones are refused here.
#pragma once

namespace deformlit::dilated {

using torch::stable::Tensor;
using torch::headeronly::ScalarType;
using Gradients = std::tuple<Tensor, Tensor, Tensor>;

// region dilated_problem
struct Map { int64_t b, n, d; };                        // strides; the pixels of a map lie side by side
struct Problem {
    int64_t b;
    int n, d, h, w, ks;
    std::vector<int> dilations;                         // one for each of equal groups of heads
    double padding, scale;
    Map q, k, v, grad;
    int dilation(int head) const { return dilations[int64_t(head) * dilations.size() / n]; }
};

// The strides of a map whose pixels lie side by side; it is copied if they do not.
inline Map map(Tensor& x) {
    if ((x.stride(4) != 1 && x.size(4) > 1) || (x.stride(3) != x.size(4) && x.size(3) > 1)) x = torch::stable::contiguous(x);
    const ScalarType t = x.scalar_type();
    STD_TORCH_CHECK((uintptr_t)x.data_ptr() % (t == ScalarType::Double ? 8 : t == ScalarType::Float ? 4 : 2) == 0,
                    "dilated_attn: a tensor's memory begins within a number");
    return {x.stride(0), x.stride(1), x.stride(2)};
}

inline Problem problem(Tensor& q, Tensor& k, Tensor& v, int64_t ks, const std::vector<int64_t>& dilations, double padding, double scale,
                       Tensor* grad = nullptr) {
    constexpr int64_t most = int64_t(1) << 31;
    const ScalarType t = q.scalar_type();
    STD_TORCH_CHECK(t == ScalarType::Float || t == ScalarType::Double || t == ScalarType::Half || t == ScalarType::BFloat16,
                    "dilated_attn: `q` must be float16, bfloat16, float32 or float64");
    STD_TORCH_CHECK(q.dim() == 5, "dilated_attn: `q` must be `b n d h w`");
    for (const Tensor* x : std::initializer_list<const Tensor*>{&k, &v, grad}) {
        if (!x) continue;
        STD_TORCH_CHECK(x->dim() == 5 && x->scalar_type() == t, "dilated_attn: all tensors must have the shape and dtype of `q`");
        for (int i = 0; i < 5; i++) STD_TORCH_CHECK(x->size(i) == q.size(i), "dilated_attn: all tensors must have the shape and dtype of `q`");
        STD_TORCH_CHECK(x->is_cpu() == q.is_cpu() && x->is_cuda() == q.is_cuda() && x->get_device_index() == q.get_device_index(),
                        "dilated_attn: all tensors must be on one device");
    }
    for (int i = 1; i < 5; i++) STD_TORCH_CHECK(q.size(i) < most / 2, "dilated_attn: heads, channels, height and width must be below 2^30");
    STD_TORCH_CHECK(q.size(3) * q.size(4) < most, "dilated_attn: a map must have fewer than 2^31 pixels");
    STD_TORCH_CHECK(ks > 0 && ks % 2 == 1 && ks < (1 << 15), "dilated_attn: `kernel_size` must be odd, above zero and below 2^15");
    STD_TORCH_CHECK(padding < std::numeric_limits<double>::infinity(), "dilated_attn: `padding` must be a number below infinity");
    Problem o{q.size(0), int(q.size(1)), int(q.size(2)), int(q.size(3)), int(q.size(4)), int(ks), {}, padding, scale, {}, {}, {}, {}};
    STD_TORCH_CHECK(dilations.size() > 0 && o.n % int64_t(dilations.size()) == 0,
                    "dilated_attn: `dilations` must hold one for each of equal groups of heads");
    for (int64_t x : dilations) {
        STD_TORCH_CHECK(x > 0, "dilated_attn: `dilations` must be above zero");
        o.dilations.push_back(int(std::min<int64_t>(x, std::max({o.h, o.w, 1}))));     // so far off, all but the own row and column is outside
    }
    o.q = map(q); o.k = map(k); o.v = map(v);
    if (grad) o.grad = map(*grad);
    return o;
}

inline Tensor like(const Tensor& q) { return torch::stable::new_empty(q, q.sizes()); }
// endregion dilated_problem

}  // namespace deformlit::dilated
