"""The CUDA kernel of Deformable DETR (2020), which most models still ship, as a peer for `make bench`.

Its text is not in this repository: the source package of mmcv has it, and DEFORMLIT_MMCV names the folder where that was unpacked
(`gpu.py --prepare` does both). Built here as a library of two C functions, it needs nvcc and no header of PyTorch. float32 only."""
import ctypes, functools, os, re, subprocess, tempfile
from pathlib import Path
import torch
from deformlit import native

C = r'''
extern "C" void forward(void* stream, const float* value, const int64_t* shapes, const int64_t* starts, const float* points, const float* weights,
                        int b, int s, int n, int d, int l, int q, int k, float* out) {
    ms_deformable_im2col_cuda<float>((cudaStream_t)stream, value, shapes, starts, points, weights, b, s, n, d, l, q, k, out);
}
extern "C" void backward(void* stream, const float* grad, const float* value, const int64_t* shapes, const int64_t* starts, const float* points, const float* weights,
                         int b, int s, int n, int d, int l, int q, int k, float* to_value, float* to_points, float* to_weights) {
    ms_deformable_col2im_cuda<float>((cudaStream_t)stream, grad, value, shapes, starts, points, weights, b, s, n, d, l, q, k, to_value, to_points, to_weights);
}
'''

def source(folder) -> str:
    "One CUDA file: the kernels and their launches from mmcv's sources, without what they include, and the C functions. Raises FileNotFoundError."
    def text(name):
        found = sorted(Path(folder).rglob(name))
        if not found: raise FileNotFoundError(f'{name} is not below {folder}')
        return re.sub(r'^#include .*$', '', found[0].read_text(), flags=re.M)
    launches = text('ms_deform_attn_cuda.cu')
    launches = launches[launches.index('template <typename scalar_t>'):launches.index('at::Tensor ms_deform_attn_cuda_forward')]
    return '\n'.join(['#include <cstdint>', '#include <cstdio>', '#include <cuda_runtime.h>', text('common_cuda_helper.hpp'), text('ms_deform_attn_cuda_kernel.cuh'), launches, C])

def library(folder, architectures=('90',)) -> Path:
    "The library's file in `folder`, built if it is not there. Raises `BuildError` and FileNotFoundError."
    out = Path(folder)/'kernel_2020.so'
    if out.exists(): return out
    nvcc = native.compiler('cuda')
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        file, part = Path(scratch)/'kernel_2020.cu', Path(scratch)/out.name
        file.write_text(source(folder))
        r = subprocess.run([nvcc, '-O3', '-std=c++17', '-shared', '-Xcompiler', '-fPIC', '-cudart', 'static', *native.architectures(nvcc, architectures), str(file), '-o', str(part)], capture_output=True, text=True)
        if r.returncode: raise native.BuildError(native.first_error(r.stderr + r.stdout), r.stderr + r.stdout)
        os.replace(part, out)
    return out

@functools.cache
def loaded(folder): return ctypes.CDLL(str(library(folder, ['{}{}'.format(*torch.cuda.get_device_capability())])))

def pointers(*tensors): return [ctypes.c_void_p(o.data_ptr()) for o in tensors]
def stream(): return ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)

class Kernel2020(torch.autograd.Function):
    "Value, sizes of the levels (h, w), their first pixels, points, weights and the library -> output. All contiguous."
    @staticmethod
    def forward(ctx, value, shapes, starts, points, weights, c):
        (b, s, n, d), (_, q, _, l, k, _) = value.shape, points.shape
        ctx.save_for_backward(value, shapes, starts, points, weights)
        ctx.c, ctx.sizes = c, [ctypes.c_int(o) for o in (b, s, n, d, l, q, k)]
        out = value.new_zeros(b, q, n * d)
        c.forward(stream(), *pointers(value, shapes, starts, points, weights), *ctx.sizes, *pointers(out))
        return out
    @staticmethod
    def backward(ctx, grad):
        value, shapes, starts, points, weights = ctx.saved_tensors
        to, grad = [torch.zeros_like(o) for o in (value, points, weights)], grad.contiguous()
        ctx.c.backward(stream(), *pointers(grad, value, shapes, starts, points, weights), *ctx.sizes, *pointers(*to))
        return to[0], None, None, to[1], to[2], None
