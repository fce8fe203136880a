// CUDA's words for g++, so that the tests run the CUDA kernels on a CPU. A block's threads are fibers: one runs until it must wait for others,
// then the next does, in an order that a seed shuffles. Blocks run one after the other. It is slow, and exact about who waits for whom.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <ucontext.h>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static                                  // one block runs at a time
using std::min; using std::fabs; using std::isfinite; using std::exp2; using std::log2; using std::ceil; using std::fmin; using std::fmax;

namespace on_cpu {

struct Index { unsigned x; };
enum State { READY, AT_BLOCK, AT_WARP, DONE };
struct Fiber { ucontext_t context; std::vector<char> stack; State state; int turn; };

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline unsigned current, threads;
inline std::vector<uint64_t> exchanged[2];                 // what the threads of a warp show each other; two in turn, so that one wait is enough
inline Index block, grid;

[[noreturn]] inline void fail(const char* why) { std::fprintf(stderr, "cuda_on_cpu: block %u: %s\n", block.x, why); std::abort(); }

inline void wait(State s) {
    fibers[current].state = s;
    swapcontext(&fibers[current].context, &scheduler);
}

// Those who wait go on when all who must be there are.
inline void let_go() {
    unsigned at_block = 0, done = 0;
    for (const Fiber& f : fibers) { at_block += f.state == AT_BLOCK; done += f.state == DONE; }
    if (at_block == threads) for (Fiber& f : fibers) f.state = READY;
    for (unsigned w = 0; w < threads; w += 32) {
        unsigned at_warp = 0, gone = 0;
        for (unsigned i = w; i < std::min(w + 32, threads); i++) { at_warp += fibers[i].state == AT_WARP; gone += fibers[i].state == DONE; }
        if (at_warp == std::min(32u, threads - w)) for (unsigned i = w; i < std::min(w + 32, threads); i++) fibers[i].state = READY;
        else if (at_warp && gone) fail("a thread ended while others of its warp wait for it in a shuffle");
    }
    if (at_block && done) fail("a thread ended while others wait for it in __syncthreads");
}

template <typename F>
struct Body { static inline F* f; static void start() { (*f)(); fibers[current].state = DONE; swapcontext(&fibers[current].context, &scheduler); } };

// f() by all threads of all blocks.
template <typename F>
void launch(F f, unsigned blocks, unsigned per_block, unsigned seed) {
    std::mt19937 random(seed);
    Body<F>::f = &f;
    threads = per_block; grid.x = blocks;
    fibers.resize(threads);
    for (auto& o : exchanged) o.assign(threads, 0);
    std::vector<unsigned> blocks_in_turn(blocks), order(threads);
    for (unsigned i = 0; i < blocks; i++) blocks_in_turn[i] = i;
    for (unsigned i = 0; i < threads; i++) order[i] = i;
    if (seed) std::shuffle(blocks_in_turn.begin(), blocks_in_turn.end(), random);
    for (unsigned b : blocks_in_turn) {
        block.x = b;
        for (Fiber& o : fibers) {
            o.stack.resize(1 << 16); o.state = READY; o.turn = 0;
            getcontext(&o.context);
            o.context.uc_stack.ss_sp = o.stack.data(); o.context.uc_stack.ss_size = o.stack.size(); o.context.uc_link = nullptr;
            makecontext(&o.context, (void (*)())&Body<F>::start, 0);
        }
        for (bool alive = true; alive;) {
            if (seed) std::shuffle(order.begin(), order.end(), random);
            bool ran = false;
            alive = false;
            for (unsigned i : order) if (fibers[i].state == READY) { ran = true; current = i; swapcontext(&scheduler, &fibers[i].context); }
            let_go();
            for (const Fiber& o : fibers) alive = alive || o.state != DONE;
            if (alive && !ran) fail("all threads wait: some in __syncthreads, some in a shuffle");
        }
    }
}

template <typename T>
T shuffle(T x, int step) {
    Fiber& me = fibers[current];
    auto& room = exchanged[me.turn ^= 1];
    static_assert(sizeof(T) <= 8, "");
    std::memcpy(&room[current], &x, sizeof x);
    const unsigned other = current ^ step;
    if (other >= threads) fail("a shuffle with a thread that is not there");
    wait(AT_WARP);
    std::memcpy(&x, &exchanged[fibers[current].turn][other], sizeof x);
    return x;
}

template <typename To, typename From> To bits(From x) { static_assert(sizeof(To) == sizeof(From), ""); To y; std::memcpy(&y, &x, sizeof y); return y; }

template <typename... P, size_t... I>
void call(void (*kernel)(P...), void** args, unsigned blocks, unsigned per_block, unsigned seed, std::index_sequence<I...>) {
    launch([=] { kernel(*(std::remove_reference_t<P>*)args[I]...); }, blocks, per_block, seed);
}
template <typename... P>
void call(void (*kernel)(P...), void** args, unsigned blocks, unsigned per_block, unsigned seed) {
    call(kernel, args, blocks, per_block, seed, std::index_sequence_for<P...>());
}

}  // namespace on_cpu

#define threadIdx (on_cpu::Index{on_cpu::current})
#define blockIdx on_cpu::block
#define gridDim on_cpu::grid
inline void __syncthreads() { on_cpu::wait(on_cpu::AT_BLOCK); }
template <typename T> T __shfl_xor_sync(unsigned mask, T x, int step) {
    if (mask != 0xffffffffu) on_cpu::fail("a shuffle of a part of a warp");
    return on_cpu::shuffle(x, step);
}
template <typename T> T atomicAdd(T* p, T x) { T old = *p; *p = old + x; return old; }
template <typename T> T atomicMax(T* p, T x) { T old = *p; *p = std::max(old, x); return old; }
template <typename T> T atomicOr(T* p, T x) { T old = *p; *p = old | x; return old; }
inline unsigned __float_as_uint(float x) { return on_cpu::bits<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return on_cpu::bits<float>(x); }
inline long long __double_as_longlong(double x) { return on_cpu::bits<long long>(x); }

#include "multiscale_cuda.h"
#include "dilated_cuda.h"

namespace deformlit {   // PTX on a GPU, PyTorch's own conversions here
float widen(F16 x) { c10::Half h; h.x = x.bits; return h; }
void narrow(float x, F16& y) { y.bits = c10::Half(x).x; }
void narrow(float x, BF16& y) { y.bits = c10::BFloat16(x).x; }
}  // namespace deformlit

#define NAMED(o) if (std::string(name) == #o) { on_cpu::call(o, args, blocks, threads, seed); return 0; }
#define EACH(name, vec) NAMED(msda_forward_##name##_##vec) NAMED(msda_backward_##name##_##vec) NAMED(msda_forward_##name##_1) NAMED(msda_backward_##name##_1) NAMED(msda_largest_##name) NAMED(msda_finish_##name)
#define DILATED(name) NAMED(dilated_forward_##name) NAMED(dilated_backward_##name) NAMED(dilated_gather_##name)

extern "C" __attribute__((visibility("default"))) int launch(const char* name, unsigned blocks, unsigned threads, void** args, unsigned seed) {
    EACH(f32, 4) EACH(f64, 2) EACH(f16, 8) EACH(bf16, 8)
    DILATED(f32) DILATED(f64) DILATED(f16) DILATED(bf16)
    return 1;
}
