// Attention with a bias read between the numbers of a table, on the CPU: checks, and the registration with PyTorch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <memory>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>
#include "cpu.h"
#include "deformed_keys.h"
#include "deformed_keys_problem.h"

namespace deformlit {
namespace deformed_keys {

#define KERNEL "deformed_keys_cpu.h"
#include "isa.h"

// region cpu
template <typename T, typename A>
void run(const Problem& o, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& table, const Tensor& start, Tensor& out, Tensor& sums) {
    const auto kernel = BEST(forward<T, A>);
    const T *from_q = (const T*)q.data_ptr(), *from_k = (const T*)k.data_ptr(), *from_v = (const T*)v.data_ptr();
    const A *numbers = (const A*)table.data_ptr(), *places = (const A*)start.data_ptr();
    T* to = (T*)out.data_ptr();
    A* to_sums = (A*)sums.data_ptr();
    const int64_t tiles = baseline::Tiles(o).count;
    in_pieces(o.b * o.n * tiles, 1, [&](int64_t begin, int64_t end) { kernel(o, from_q, from_k, from_v, numbers, places, to, to_sums, begin, end); });
}

std::tuple<Tensor, Tensor> deformed_keys(Tensor q, Tensor k, Tensor v, Tensor table, Tensor start, double step_x, double step_y, int64_t h, int64_t w) {
    const Problem o = problem(q, k, v, table, start, step_x, step_y, h, w);
    Tensor out = like(q, {o.b, o.n, o.d, o.q}), sums = like(table, {o.b, o.n, o.q});
    switch (q.scalar_type()) {
        case ScalarType::Float: run<float, float>(o, q, k, v, table, start, out, sums); break;
        case ScalarType::Double: run<double, double>(o, q, k, v, table, start, out, sums); break;
        case ScalarType::Half: run<Half, float>(o, q, k, v, table, start, out, sums); break;
        default: run<BFloat16, float>(o, q, k, v, table, start, out, sums);
    }
    return {out, sums};
}

STABLE_TORCH_LIBRARY_IMPL(deformlit, CPU, m) {
    m.impl("deformed_keys", TORCH_BOX(&deformed_keys));
}
// endregion cpu

}  // namespace deformed_keys
}  // namespace deformlit
