// What the CPU's ops share: reading ahead, the choice of the instruction set, and work in pieces for the threads.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <string>

namespace deformlit {

using c10::BFloat16;
using c10::Half;

// How many numbers lie between two places in memory, whatever they belong to.
template <typename T>
int64_t distance(const T* from, const T* to) { return ((intptr_t)to - (intptr_t)from) / (intptr_t)sizeof(T); }

// Ask for numbers that are needed soon. An address beyond the end does no harm.
template <typename T>
void prefetch(const T* p, int64_t count) {
    for (int64_t i = 0; i < count * int64_t(sizeof(T)); i += 64) __builtin_prefetch((const char*)p + i);
}

// region choice
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define DEFORMLIT_X86
#endif

enum class Isa { baseline, avx2, avx512 };

// The best set that this processor has, or a lower one if DEFORMLIT_ISA names it.
inline Isa isa() {
    static const Isa found = [] {
        const char* asked = std::getenv("DEFORMLIT_ISA");
        const std::string name = asked ? asked : "avx512";
        STD_TORCH_CHECK(name == "baseline" || name == "avx2" || name == "avx512", "DEFORMLIT_ISA: expected baseline, avx2 or avx512, got ", name);
#ifdef DEFORMLIT_X86
        __builtin_cpu_init();
        const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
        if (has_avx512 && name == "avx512") return Isa::avx512;
        if (has_avx2 && name != "baseline") return Isa::avx2;
#endif
        return Isa::baseline;
    }();
    return found;
}

#ifdef DEFORMLIT_X86
#define BEST(...) (isa() == Isa::avx512 ? avx512::__VA_ARGS__ : isa() == Isa::avx2 ? avx2::__VA_ARGS__ : baseline::__VA_ARGS__)
#else
#define BEST(...) (isa(), baseline::__VA_ARGS__)
#endif
// endregion choice

// region pieces
constexpr int64_t WORTH_A_THREAD = 1 << 18;                // numbers read, about ten microseconds

// `f(begin, end)` on pieces of [0, count), at least `grain` long. A thread that wakes late finds less left to do.
template <typename F>
void in_pieces(int64_t count, int64_t grain, const F& f) {
    const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count / grain);
    if (threads <= 1) return f(0, count);
    const int64_t piece = std::max(grain, count / (8 * threads));
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
        for (int64_t begin; (begin = next.fetch_add(piece)) < count;) f(begin, std::min(begin + piece, count));
    });
}
// endregion pieces

}  // namespace deformlit
