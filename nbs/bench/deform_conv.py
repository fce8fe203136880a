"""Deformable convolution beside torchvision's on the CPU: how many times as fast, in turns within one process.

    OMP_WAIT_POLICY=passive python nbs/bench/deform_conv.py                      all sizes, two threads
    OMP_WAIT_POLICY=passive python nbs/bench/deform_conv.py --sizes 1x64x56x56   only this one: images x channels x height x width
"""
import argparse, statistics, sys, time
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch
from deformlit.core import Table
from deformlit.deform_conv import deform_conv2d_compiled, deform_conv2d_eager, deform_conv2d_gather
from torchvision.ops import deform_conv2d

WAYS = dict(torchvision=deform_conv2d, eager=deform_conv2d_eager, compiled=deform_conv2d_compiled, gather=deform_conv2d_gather)

def inputs(b, c, h, w, o):
    "A layer of 3 x 3 taps with mask, offsets of about one pixel."
    torch.manual_seed(0)
    return torch.randn(b, c, h, w), torch.randn(b, 18, h, w), torch.randn(o, c, 3, 3) / (9 * c)**.5, torch.randn(o), torch.rand(b, 9, h, w)

def call(f, args, back):
    x, offset, weight, bias, mask = args
    out = f(x, offset, weight, bias, (1, 1), (1, 1), (1, 1), mask)
    return torch.autograd.grad(out, args, torch.ones_like(out)) if back else out

def seconds(f, args, back, least):
    "The time of one call, in the mean over at least `least` seconds."
    start, n = time.perf_counter(), 0
    while True:
        call(f, args, back)
        n, passed = n + 1, time.perf_counter() - start
        if passed >= least: return passed / n

def measure(size, back, rounds, names, least):
    "By name: the median time, and the median over rounds of torchvision's time over this one's."
    args = [o.requires_grad_(back) for o in inputs(*size, size[1])]
    with torch.set_grad_enabled(back):
        want = call(deform_conv2d, args, back)
        for o in names:
            torch.testing.assert_close(call(WAYS[o], args, back), want, rtol=1e-3, atol=1e-3)
            call(WAYS[o], args, back)
        turns = []
        for i in range(rounds):
            order = names if i % 2 else names[::-1]
            turns.append({o: seconds(WAYS[o], args, back, least) for o in order})
    return {o: (statistics.median(t[o] for t in turns), statistics.median(t['torchvision'] / t[o] for t in turns)) for o in names}

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--sizes', nargs='*', default=['1x64x56x56', '8x64x56x56', '2x128x28x28', '2x256x14x14', '1x64x100x136', '1x16x16x16', '1x8x8x8'])
    p.add_argument('--ways', nargs='*', default=['eager', 'compiled'])
    p.add_argument('--threads', type=int, default=2)
    p.add_argument('--rounds', type=int, default=9)
    p.add_argument('--least', type=float, default=.1, help='seconds for each turn')
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    rows = []
    for size in a.sizes:
        for back in False, True:
            found = measure(tuple(map(int, size.split('x'))), back, a.rounds, ['torchvision', *a.ways], a.least)
            rows.append((size, 'forward+backward' if back else 'forward', f"{found['torchvision'][0]*1e3:.2f} ms", *(f'{found[o][0]*1e3:.2f} ms, {found[o][1]:.1f} x' for o in a.ways)))
            print(*rows[-1], sep=' | ', flush=True)
    print(Table(('size', 'direction', 'torchvision', *a.ways), rows))

if __name__ == '__main__': main()
