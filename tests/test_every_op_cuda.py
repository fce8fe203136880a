"""What every native op must do on a GPU, on the sizes and inputs of the benchmark: keep to its stream, be captured and replayed, wait for nothing. Without a GPU these tests are skipped."""
import sys
import pytest, torch
from torch.testing import assert_close
from notebooks import nbs
if not torch.cuda.is_available(): pytest.skip('no GPU: torch.cuda.is_available() is False', allow_module_level=True)

sys.path.insert(0, str(nbs/'bench'))
import ops, worker

every = pytest.mark.parametrize('name', list(ops.ENTRIES))

def call(name, seed=0, way='native', dtype=torch.float32):
    entry = ops.entry(name)
    args = entry.inputs(entry.small, entry.points[0], torch.Generator().manual_seed(seed))
    return worker.Call(entry, way, entry.cast([o.to('cuda') if isinstance(o, torch.Tensor) else o for o in args], dtype))

def both(c, grad): out, grads = c.both(grad); return [out.detach(), *grads]
def close(got, want, tol=1e-4):
    for a, b in zip(got, want): assert_close(a, b, rtol=tol, atol=tol * b.abs().max().item())

@every
def test_same_as_the_eager_form(name):
    c, other = call(name), call(name, way='eager')
    close(both(c, c.ones), both(other, c.ones))

@every
def test_other_stream(name):
    "The op comes after what its stream does before it."
    c, late, side = call(name), call(name), torch.cuda.Stream()
    want, busy = both(c, c.ones), torch.randn(4096, 4096, device='cuda')
    with torch.no_grad(): late.wrt[0].zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        for _ in range(20): busy = (busy @ busy).clamp(-1, 1)
        with torch.no_grad(): late.wrt[0].copy_(c.wrt[0])
        got = both(late, c.ones)
    side.synchronize()
    close(got, want)

@every
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=['f32', 'bf16'])
def test_graph(name, dtype):
    "Forward and backward, captured once and replayed with other numbers in the same memory."
    c, side, graph = call(name, dtype=dtype), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    grad = torch.randn_like(c.ones)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3): both(c, grad)
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph): held = both(c, grad)
    for seed in (1, 2, 3):
        other = call(name, seed, dtype=dtype)
        with torch.no_grad():
            for a, b in zip(c.wrt, other.wrt): a.copy_(b)
            grad.normal_()
        graph.replay()
        close([o.clone() for o in held], both(other, grad), 1e-4 if dtype == torch.float32 else 2e-2)

@every
def test_nothing_waits_for_the_gpu(name):
    c = call(name)
    both(c, c.ones)
    torch.cuda.set_sync_debug_mode('error')
    try: both(c, c.ones)
    finally: torch.cuda.set_sync_debug_mode('default')
