"""A small op of its own for the tests of building and loading: its source, its settings, and its gradient."""
import os, re, subprocess, sys
from pathlib import Path
from notebooks import root

CPP = r'''
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
using torch::stable::Tensor;

Tensor gate(const Tensor& a, const Tensor& b, double t) {
  STD_TORCH_CHECK(a.dim() == 1 && b.dim() == 1 && a.size(0) == b.size(0), "gate: a and b must have one and the same length");
  Tensor y = torch::stable::empty_like(a);
  const double *pa = a.const_data_ptr<double>(), *pb = b.const_data_ptr<double>();
  double* py = y.mutable_data_ptr<double>();
  for (int64_t i = 0; i < a.numel(); ++i) py[i] = t * pa[i] * pb[i + PAST];
  return y;
}
STABLE_TORCH_LIBRARY_IMPL(toy, CPU, m) { m.impl("gate", TORCH_BOX(&gate)); }
'''

CU = r'''
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <cuda_runtime.h>
using torch::stable::Tensor;
__global__ void gate_kernel(const double* a, const double* b, double* y, double t, int64_t n) {
  int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (i < n) y[i] = t * a[i] * b[i];
}
Tensor gate(const Tensor& a, const Tensor& b, double t) {
  Tensor y = torch::stable::empty_like(a);
  void* stream;
  aoti_torch_get_current_cuda_stream(a.get_device_index(), &stream);
  gate_kernel<<<unsigned(a.numel() / 256 + 1), 256, 0, (cudaStream_t)stream>>>(a.const_data_ptr<double>(), b.const_data_ptr<double>(), y.mutable_data_ptr<double>(), t, a.numel());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}
STABLE_TORCH_LIBRARY_IMPL(toy, CUDA, m) { m.impl("gate", TORCH_BOX(&gate)); }
'''

CALL = '''
import sys, torch
from deformlit.native import needs_library
why = needs_library('cpu', sys.argv[1])
print(why)
if why is None:
    torch.library.define('toy::gate', '(Tensor a, Tensor b, float t) -> Tensor')
    a, b = torch.arange(4.).double(), torch.arange(4.).double() + 1
    assert torch.equal(torch.ops.toy.gate(a, b, .5), .5 * a * b)
'''

def make(folder, cpp=CPP, past=0):
    "Settings and sources of the toy in `folder`; `past` makes it read that many numbers too far."
    folder.mkdir(parents=True, exist_ok=True)
    text = (root/'settings.ini').read_text()
    for o in ('cpp', 'cu'): text = re.sub(rf'^sources = .*\.{o}$', f'sources = kernels/gate.{o}', text, flags=re.M)
    (folder/'settings.ini').write_text(text)
    (folder/'kernels').mkdir(exist_ok=True)
    (folder/'kernels'/'gate.cpp').write_text(cpp.replace('PAST', str(past)))
    (folder/'kernels'/'gate.cu').write_text(CU)
    return folder

def environment(**kw):
    "The environment without what would change the build, and with `kw`; None takes a name out."
    env = {k: v for k, v in os.environ.items() if not k.startswith('DEFORMLIT_') and k != 'CXX'}
    env |= dict(PYTHONPATH=str(root))
    for k, v in kw.items():
        if v is None: env.pop(k, None)
        else: env[k] = str(v)
    return env

def start(folder, code=CALL, python=sys.executable, **kw):
    "A process that asks for the toy's library, and calls it."
    return subprocess.Popen([python, '-c', code, str(folder)], env=environment(**kw), cwd=Path(folder), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

def call(*args, **kw):
    "What it says, and what it says besides."
    p = start(*args, **kw)
    out, err = p.communicate(timeout=300)
    assert p.returncode == 0, err
    return out.strip(), err
