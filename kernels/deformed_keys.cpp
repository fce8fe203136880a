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

// region deformed_cpu
template <typename T, typename A>
void run(const Problem& o, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& table, const Tensor& start,
         Tensor& out, Tensor& sums) {
    const auto kernel = BEST(forward<T, A>);
    const T *from_q = (const T*)q.data_ptr(), *from_k = (const T*)k.data_ptr(), *from_v = (const T*)v.data_ptr();
    const A *numbers = (const A*)table.data_ptr(), *places = (const A*)start.data_ptr();
    T* to = (T*)out.data_ptr();
    A* to_sums = (A*)sums.data_ptr();
    const int64_t tiles = baseline::Tiles(o).count;
    in_pieces(o.b * o.n * tiles, 1, [&](int64_t begin, int64_t end) {
        kernel(o, from_q, from_k, from_v, numbers, places, to, to_sums, begin, end);
    });
}

template <typename T, typename A>
void run_back(const Problem& o, const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& table, const Tensor& start,
              const Tensor& out, const Tensor& logs, Gradients& to) {
    const auto kernel = BEST(backward<T, A>);
    const auto finish = BEST(finish_keys<T, A>);
    const int64_t parts = baseline::parts(o), size = BEST(Sums<A>::size(o)), units = o.b * o.n * parts, table_size = int64_t(o.th) * o.tw;
    const std::unique_ptr<A[]> sums(new A[units * size]);
    A* all = sums.get();
    const T *g = (const T*)grad.data_ptr(), *result = (const T*)out.data_ptr();
    const T *from_q = (const T*)q.data_ptr(), *from_k = (const T*)k.data_ptr(), *from_v = (const T*)v.data_ptr();
    const A *numbers = (const A*)table.data_ptr(), *places = (const A*)start.data_ptr(), *log = (const A*)logs.data_ptr();
    T *to_q = (T*)std::get<0>(to).data_ptr(), *to_k = (T*)std::get<1>(to).data_ptr(), *to_v = (T*)std::get<2>(to).data_ptr();
    A *to_table = (A*)std::get<3>(to).data_ptr(), *to_start = (A*)std::get<4>(to).data_ptr();
    in_pieces(units, 1, [&](int64_t begin, int64_t end) {
        kernel(o, g, from_q, from_k, from_v, numbers, places, result, log, to_q, all, begin, end);
    });
    in_pieces(o.b * o.n, std::max<int64_t>(1, WORTH_A_THREAD / std::max<int64_t>(1, 4 * o.k * o.d * parts)),
              [&](int64_t begin, int64_t end) { finish(o, all, to_k, to_v, begin, end); });
    const A* tables = all + size - table_size;             // of the first unit
    for (int64_t i = 0; i < o.b * o.g; i++)                // the heads of a group, with all their parts
        baseline::add_up(tables - 2 * o.k + i * (o.n / o.g) * parts * size, 2 * o.k, size, o.n / o.g * parts, to_start + i * 2 * o.k);
    for (int64_t n = 0; n < o.n; n++)                      // all images
        for (int64_t p = 0; p < parts; p++)
            baseline::add_up(tables + (n * parts + p) * size, table_size, o.n * parts * size, o.b, to_table + n * table_size, p > 0);
}

std::tuple<Tensor, Tensor> deformed_keys(Tensor q, Tensor k, Tensor v, Tensor table, Tensor start,
                                         double step_x, double step_y, int64_t h, int64_t w) {
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

Gradients deformed_keys_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor table, Tensor start, Tensor out, Tensor sums,
                                 double step_x, double step_y, int64_t h, int64_t w) {
    const Problem o = problem(q, k, v, table, start, step_x, step_y, h, w);
    check_backward(o, q, grad, out, sums);
    Gradients to = gradients(o, q, table, start);
    switch (q.scalar_type()) {
        case ScalarType::Float: run_back<float, float>(o, grad, q, k, v, table, start, out, sums, to); break;
        case ScalarType::Double: run_back<double, double>(o, grad, q, k, v, table, start, out, sums, to); break;
        case ScalarType::Half: run_back<Half, float>(o, grad, q, k, v, table, start, out, sums, to); break;
        default: run_back<BFloat16, float>(o, grad, q, k, v, table, start, out, sums, to);
    }
    return to;
}

STABLE_TORCH_LIBRARY_IMPL(deformlit, CPU, m) {
    m.impl("deformed_keys", TORCH_BOX(&deformed_keys));
    m.impl("deformed_keys_backward", TORCH_BOX(&deformed_keys_backward));
}
// endregion deformed_cpu

}  // namespace deformed_keys
}  // namespace deformlit
