"""What the kernels are compared with: the op in float64 and its gradients, written out, each with the size of its rounding errors."""
from itertools import product
import pytest, torch
from deformlit.native import BuildError, compiler, needs_library

nan, inf = float('nan'), float('inf')

def truth(value, shapes, points, weights, grad=None):
    """The output, and with `grad` the gradients to value, points and weights: pairs of float64 tensors (number, size).
    `size` adds up what the number is made of without signs, and what a rounding of the coordinates moves; an error is measured in it."""
    v, p, w = (o.detach().double().cpu() for o in (value, points, weights))
    (b, s, n, d), (q, k) = v.shape, (p.shape[1], p.shape[4])
    table, g = v.reshape(-1, d), None if grad is None else grad.detach().double().cpu().reshape(b, q, n, 1, d)
    zero = lambda *size: torch.zeros(size, dtype=torch.float64)
    out, to_value, to_points, to_weights = ([zero(*size), zero(*size)] for size in ((b, q, n, d), (b * s * n, d), p.shape, w.shape))
    image, head, first = torch.arange(b).view(-1, 1, 1, 1), torch.arange(n).view(1, 1, -1, 1), 0
    for l, (rows, cols) in enumerate(shapes):
        size = torch.tensor([cols, rows], dtype=torch.float64)
        exact = p[:, :, :, l] * size - 0.5
        u = exact.maximum(zero(1) - 2).minimum(size)                            # NaN stays NaN
        moved = (p[:, :, :, l].abs().clamp(max=3) * size + 1).nan_to_num(0.).amax(-1)
        low = u.nan_to_num(-2.).floor()
        x, y, a, dots = u[..., 0] - low[..., 0], u[..., 1] - low[..., 1], w[:, :, :, l], []
        share_of = {(0, 0): (1-x)*(1-y), (1, 0): x*(1-y), (0, 1): (1-x)*y, (1, 1): x*y}
        kink = ((exact == u) & ((u - u.round()).abs() <= 64 * torch.finfo(points.dtype).eps * moved[..., None])).any(-1)   # rounding may move it into the next cell
        for dx, dy in product(range(-1, 3), range(-1, 3)):
            col, row, share = low[..., 0] + dx, low[..., 1] + dy, share_of.get((dx, dy), zero(1))
            on = (col >= 0) & (col < cols) & (row >= 0) & (row < rows)
            inside = (dx, dy) in share_of
            if not inside: on &= kink
            at = (image * s + torch.where(on, first + row * cols + col, 0.).long()) * n + head
            got = torch.where(on[..., None], table[at], 0.)
            weight = (share * a)[..., None]
            about = torch.where(on, (share.abs() + moved) * a.abs(), 0.)[..., None]
            if inside: out[0] += (weight * got).sum(3)
            out[1] += (about * got.abs()).sum(3)
            if g is None: continue
            for to, term in zip(to_value, (torch.where(on[..., None], weight * g, 0.), about * g.abs())): to.index_add_(0, at.flatten(), term.flatten(0, 3))
            dots.append(((dx, dy), (g * got).sum(-1), (g * got).abs().sum(-1)))
        if g is not None:
            at4, sizes = {o[0]: o[1] for o in dots}, sum(o[2] for o in dots)
            tl, tr, bl, br = (at4[o] for o in share_of)
            to_weights[0][:, :, :, l] = (1-y) * ((1-x) * tl + x * tr) + y * ((1-x) * bl + x * br)
            to_weights[1][:, :, :, l] = (1 + moved) * sizes
            to_points[0][:, :, :, l] = a[..., None] * size * torch.stack([(1-y) * (tr - tl) + y * (br - bl), (1-x) * (bl - tl) + x * (br - tr)], -1)
            to_points[1][:, :, :, l] = a.abs()[..., None] * size * ((1 + moved) * sizes)[..., None]
        first += rows * cols
    out = [o.view(b, q, n * d) for o in out]
    return (out,) if grad is None else (out, [o.view(v.shape) for o in to_value], to_points, to_weights)

def near_kink(points, shapes, band=8):
    "Where a coordinate lies within `band` roundings of a pixel's centre: there the gradient to a point jumps, and rounding decides on which side it is."
    size = torch.tensor([(w, h) for h, w in shapes], dtype=torch.float64)[:, None]
    p = points.detach().double().cpu()
    u = p * size - 0.5
    return ((u - u.round()).abs() <= band * torch.finfo(points.dtype).eps * (p.abs() * size + 1)).any(-1)

def units(got, want, size, whole):
    """The largest error of `got`, in roundings of the dtype `whole` that is counted in, per `size`. The one rounding to
    the dtype of `got` itself, half a unit of its last place, is allowed for. Infinite where NaN or infinity differ."""
    assert got.shape == want.shape, f'{tuple(got.shape)}, expected {tuple(want.shape)}'
    if not got.numel(): return 0.
    kind, tiny, got = torch.finfo(got.dtype), torch.finfo(whole).smallest_normal * torch.finfo(whole).eps, got.detach().double().cpu()
    own = kind.eps / 2 if kind.eps > torch.finfo(whole).eps else 0.
    want = torch.where(want.abs() >= kind.max * (1 + kind.eps / 4), want.sign() * inf, want)   # beyond the dtype's numbers
    same = (got == want) | (got.isnan() & want.isnan())
    error = (got - want).abs() - own * want.abs() - kind.smallest_normal * kind.eps - 1000 * tiny   # what is lost among the subnormals
    error = torch.where(same, 0., error.nan_to_num(inf).clamp(min=0)) / (torch.finfo(whole).eps / 2 * size + 1e-300)
    return error.nan_to_num(0.).max().item() if same.all() or size.isfinite().all() else torch.where(same, 0., error).nan_to_num(inf).max().item()

def need_native():
    "Skips, saying so, where there is no compiler; where there is one the library must be there."
    try: compiler('cpu')
    except BuildError as e: pytest.skip(str(e))
    assert needs_library('cpu') is None, needs_library('cpu')
