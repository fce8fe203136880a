// The file named by KERNEL, compiled once for each instruction set.

// region isa
namespace baseline {                                       // what every x86-64 has, and any other processor
#define LANES 4
#include KERNEL
#undef LANES
}
#ifdef DEFORMLIT_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#define LANES 8
#include KERNEL
#undef LANES
}
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
namespace avx512 {
#define LANES 16
#include KERNEL
#undef LANES
}
#pragma GCC pop_options
#endif
// endregion isa
