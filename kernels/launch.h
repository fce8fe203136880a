// How all ops launch CUDA kernels: on PyTorch's stream, and no failure goes unheard.
#pragma once
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <algorithm>
#include <cstdint>
#include "cuda.h"

namespace deformlit {

// region launch
// A launch that failed raises; it is not printed, and nothing goes on with wrong numbers.
inline void check(cudaError_t e, const char* what) { STD_TORCH_CHECK(e == cudaSuccess, "deformlit: ", what, ": ", cudaGetErrorString(e)); }

inline cudaStream_t stream(const torch::stable::Tensor& x) {
    void* s = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &s));
    return (cudaStream_t)s;
}

template <typename... P, typename... A>
void launch(void (*kernel)(P...), int64_t blocks, cudaStream_t s, A... args) {
    if (blocks == 0) return;
    kernel<<<unsigned(std::min<int64_t>(blocks, 1 << 30)), THREADS, 0, s>>>(P(args)...);
    check(cudaGetLastError(), "a kernel was not launched");
}
// endregion launch

}  // namespace deformlit
