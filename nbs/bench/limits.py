"""Micro-benchmarks beside the ops: what the reads and writes of an op cost when nothing else is done, the machine's copy, and its arithmetic.

On the CPU `limits.cpp` is compiled for this machine, if there is a compiler; otherwise, and on CUDA, PyTorch's own `embedding_bag` and `index_add_` stand in."""
import ctypes, functools, os, subprocess, tempfile
from pathlib import Path
import torch, torch.nn.functional as F

@functools.cache
def library():
    "`limits.cpp`, compiled; None without a compiler."
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)/'limits.so'
        command = [os.environ.get('CXX', 'g++'), '-O3', '-march=native', '-std=c++17', '-shared', '-fPIC', '-fopenmp', str(Path(__file__).with_name('limits.cpp')), '-o', str(out)]
        try: subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError): return None
        return ctypes.CDLL(str(out))     # stays loaded after the file is gone

def pointers(*tensors): return [ctypes.c_void_p(o.data_ptr()) for o in tensors]

def native_gather(rows, threads):
    "A function that reads and adds the rows, compiled; None if it cannot."
    table, first = rows['table'], rows['first']
    (tables, queries, points), d = first.shape, table.shape[1]
    out = torch.empty(tables * queries, d)
    args = [*pointers(table, first, rows['weights'], rows['width'], rows['step'], out), ctypes.c_int64(tables * queries), points, d, threads]
    if table.device.type != 'cpu' or library() is None or library().gather(*args): return None
    def gather(keep=rows): library().gather(*args); return out      # the pointers keep nothing alive
    return gather

def native_scatter(rows, threads):
    "A function that adds to the rows, compiled; None if it cannot."
    table, first = rows['table'], rows['first']
    (tables, queries, points), d = first.shape, table.shape[1]
    to, grad = torch.zeros_like(table), torch.ones(tables * queries, d)
    args = [*pointers(to, first, rows['weights'], rows['width'], rows['step'], grad), ctypes.c_int64(tables), ctypes.c_int64(queries), points, rows['levels'], d, threads]
    if table.device.type != 'cpu' or library() is None or library().scatter(*args): return None
    to.zero_()
    def scatter(keep=(rows, grad)): library().scatter(*args); return to
    return scatter

def four(rows):
    "The numbers of all rows read, `queries (4 points)`, and their weights."
    first, step, width = rows['first'].flatten(0, 1).long(), rows['step'], rows['width']
    numbers = torch.cat([first, first + step, first + width, first + width + step], 1)
    return numbers, rows['weights'].flatten(0, 1).repeat(1, 4)

def torch_gather(rows):
    numbers, weights = four(rows)
    def gather(): return F.embedding_bag(numbers, rows['table'], per_sample_weights=weights, mode='sum')
    return gather

def torch_scatter(rows):
    "Adds a ready tensor of all rows, so its memory is the copy's; None where that would be too large."
    numbers, weights = four(rows)
    d = rows['table'].shape[1]
    if numbers.numel() * d * 4 > 4e9: return None
    to, grad = torch.zeros_like(rows['table']), weights.flatten()[:, None].expand(-1, d).contiguous()
    def scatter(): return to.index_add_(0, numbers.flatten(), grad)
    return scatter

def copy(device, megabytes=128):
    "A copy too large for any cache, and the bytes it moves."
    a = torch.ones(megabytes * 250_000 * (8 if device == 'cuda' else 1), device=device)
    b = torch.empty_like(a)
    return lambda: b.copy_(a), 2 * a.numel() * 4

def multiply(device, size=1024):
    "A product of matrices in float32, and its operations."
    a = torch.ones(size * (4 if device == 'cuda' else 1), size, device=device)
    return lambda: a @ a[:size], 2 * a.shape[0] * size * size
