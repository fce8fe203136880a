// What the CUDA kernels of all ops share. No host code and no header of PyTorch, so that NVRTC compiles it.
#pragma once

namespace deformlit {

typedef long long i64;
constexpr int THREADS = 256;               // of a block

// region halves
struct F16 { unsigned short bits; };
struct BF16 { unsigned short bits; };
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(BF16 x) { return __uint_as_float(unsigned(x.bits) << 16); }
__device__ __forceinline__ void narrow(float x, float& y) { y = x; }
__device__ __forceinline__ void narrow(double x, double& y) { y = x; }
#ifdef __CUDACC__
__device__ __forceinline__ float widen(F16 x) { float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits)); return y; }
__device__ __forceinline__ void narrow(float x, F16& y) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }
__device__ __forceinline__ void narrow(float x, BF16& y) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }
#else                                      // tests run these kernels on the CPU, and bring their own
float widen(F16 x); void narrow(float x, F16& y); void narrow(float x, BF16& y);
#endif
// endregion halves

}  // namespace deformlit
