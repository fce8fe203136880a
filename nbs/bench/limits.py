"""Micro-benchmarks beside the ops: what the reads and writes of an op cost when nothing else is done, the machine's copy, and its arithmetic.

On the CPU `limits.cpp` is compiled for this machine, if there is a compiler, and on a GPU `limits.cu`; otherwise PyTorch's own `embedding_bag` and `index_add_` stand in."""
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
    a = torch.randn(size * (4 if device == 'cuda' else 1), size, device=device)
    return lambda: a @ a[:size], 2 * a.shape[0] * size * size

# ---- on a GPU -------------------------------------------------------------------------------------------------------

@functools.cache
def kernels():
    "`limits.cu`, compiled by NVRTC when the first of its kernels is launched."
    from deformlit.native import Kernels
    return Kernels(Path(__file__).with_name('limits.cu').read_text())

def launch(name, threads, *args): kernels().launch(name, (-(-threads // 256), 1, 1), (256, 1, 1), *args)

def by_rows(rows):
    "Queries, points and threads for a row, as `limits.cu` takes them; None where it does not take such rows."
    (tables, queries, points), d = rows['first'].shape, rows['table'].shape[1]
    return None if rows['table'].device.type != 'cuda' or d % 4 or 256 % (d // 4) else (tables * queries, points, d // 4)

def cuda_gather(rows):
    "A function that reads and adds the rows on a GPU; None if it cannot."
    if (sizes := by_rows(rows)) is None: return None
    out = torch.empty(sizes[0], rows['table'].shape[1], device='cuda')
    def gather(): launch('gather', sizes[0] * sizes[2], *(rows[o] for o in ('table', 'first', 'weights', 'width', 'step')), out, *sizes); return out
    return gather

def cuda_scatter(rows):
    "A function that adds to the rows on a GPU and does nothing else; None if it cannot."
    if (sizes := by_rows(rows)) is None: return None
    to, grad = torch.zeros_like(rows['table']), torch.ones(sizes[0], rows['table'].shape[1], device='cuda')
    def scatter(): launch('scatter', sizes[0] * sizes[2], to, *(rows[o] for o in ('first', 'weights', 'width', 'step')), grad, *sizes); return to
    return scatter

def cuda_ground(table):
    """By name: a function, and the bytes it moves: reads of a table again and again from the second-level cache; additions to rows of 32 numbers,
    1, 2 or 4 numbers at a time, to rows of the whole table or of its 64th part. `issue`, with instructions instead of bytes: of single threads; `launch`: nothing at all."""
    threads, to, rows = torch.cuda.get_device_properties(table.device).multi_processor_count * 2048, torch.zeros_like(table), table.numel() // 32
    def read(times=8): launch('read', threads, table, table.numel() // 4, times, to)
    def reduce(width, rows, times=64): return lambda: launch(f'reduce_{width}', threads, to, rows, times)
    moved = {f'{w} at a time': (reduce(w, rows), threads * w * 4 * 64) for w in (1, 2, 4)}
    def issue(): launch('multiply_add', threads, to, 64)
    return {'l2': (read, table.numel() * 4 * 8), 'issue': (issue, threads * 128 * 64), **moved, '4 at a time, few rows': (reduce(4, max(1, rows // 64)), threads * 4 * 4 * 64), 'launch': (lambda: kernels().launch('nothing', (1, 1, 1), (32, 1, 1)), 0)}

def distinct(rows, queries):
    "How many rows blocks of so many queries of one table read, each row once for each block."
    first, step, width = rows['first'], rows['step'], rows['width']
    if more := -first.shape[1] % queries: first = torch.cat([first, first[:, -1:].expand(-1, more, -1)], 1)       # the last query again reads nothing new
    numbers = torch.stack([first, first + step, first + width, first + width + step], -1).view(-1, queries * first.shape[2] * 4).sort(-1).values
    return int((numbers[:, 1:] != numbers[:, :-1]).sum()) + len(numbers)
