"""The ops that `make bench` measures: one `Entry` each, which says what to run, on what sizes, beside which peers.

To add an op, write an `Entry` for it and name it in `ENTRIES`; nothing else knows an op by name. A GPU has workloads of its own,
and peers that raise `Missing` elsewhere."""
import importlib.util, math, os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable
import torch
import limits

class Missing(Exception): "A peer is not installed, or cannot run here; says why."

@dataclass
class Entry:
    op:str                # The name of the op for `backend` and `choices.json`
    ours:Callable         # The public function
    handle:Callable       # The `Op` object, whose `ran` tells which way ran
    workloads:dict        # Sizes by name
    small:dict            # The sizes from which the sweeps start
    sweeps:dict           # What is varied: a function that puts a number into the sizes, and the numbers
    kinds:dict            # For `--choose`: the digits in the name of a kind, and sizes
    inputs:Callable       # inputs(sizes, points, generator) -> arguments in float32; those that are float tensors take gradients
    cast:Callable         # cast(args, dtype) -> arguments as our ways take them in that dtype
    peers:dict            # By name: build(args) -> function, arguments. The first is the baseline; raises `Missing`
    slow_peers:tuple      # Names of those that run with `--all` only
    count:Callable        # count(sizes, bytes of a value) -> samples, operations, gathered and compulsory bytes
    rows:Callable         # rows(args) -> what the micro-benchmarks read: see `limits.py`; None if there are none for it
    goals:dict            # What is aimed at: speedup over the baseline by (implementation, direction) and workload
    memory:dict           # The same for memory: (implementation, direction) -> sentence, test of (row, baseline's row, sizes)
    points:tuple = ('near', 'uniform')   # What `inputs` knows to make of points, the first for what is measured once; ('none',) for an op without
    cuda_peers:tuple = () # Names of the peers that run on a GPU only
    cuda_workloads:dict = field(default_factory=dict)   # Sizes by name on a GPU; empty: those of the CPU
    cuda_goals:dict = field(default_factory=dict)       # On a GPU: (implementation, direction, dtype) -> microseconds of the kernels, by workload
    cuda_ratios:dict = field(default_factory=dict)      # (implementation, direction, dtype, how the names of the others begin, 'peers' or 'reductions') -> times as fast as the best of them, by workload
    instructions:dict = field(default_factory=dict)     # (direction, dtype) -> instructions of single threads for a sample, counted in the native kernel's machine code
    reads:Callable = None # reads(rows, bytes of a value) -> bytes from the second-level cache on a GPU if a block's rows stay near it
    def on(self, device):
        "Sizes by name on that device."
        return self.cuda_workloads if device == 'cuda' and self.cuda_workloads else self.workloads

# ---- multi-scale deformable attention ------------------------------------------------------------------------------

def pyramid(side, levels=4): return [(max(1, side >> i),) * 2 for i in range(levels)]
IMAGE = [(100, 134), (50, 67), (25, 34), (13, 17)]      # the levels of an image of about 800 x 1070 pixels
def pixels(shapes): return sum(h * w for h, w in shapes)

def msda_sizes(b, shapes, n, d, q=None, k=4): return dict(b=b, shapes=shapes, n=n, d=d, k=k, q=q or pixels(shapes))

def msda_inputs(sizes, points, generator):
    """Value, sizes of the levels, points and weights. `near`: each query's reference is the centre of its pixel (where the queries are not the pixels, of one
    drawn at random), and each point lies 1 to 2 pixels from it on its level. `uniform`: anywhere on the map, which no trained model does."""
    b, q, n, k, shapes = (sizes[o] for o in ('b', 'q', 'n', 'k', 'shapes'))
    rand = lambda *shape: torch.rand(*shape, generator=generator)
    wh = torch.tensor([(w, h) for h, w in shapes], dtype=torch.float32)[:, None]        # l 1 2
    if points == 'near':
        centres = torch.cat([torch.stack(torch.meshgrid((torch.arange(h) + .5) / h, (torch.arange(w) + .5) / w, indexing='ij'), -1).flip(-1).flatten(0, 1) for h, w in shapes])
        which = torch.arange(q) if q == len(centres) else (rand(q) * len(centres)).long()
        angle, far = rand(b, q, n, len(shapes), k) * (2 * math.pi), 1 + rand(b, q, n, len(shapes), k)
        xy = centres[which][None, :, None, None, None] + torch.stack([angle.cos() * far, angle.sin() * far], -1) / wh
    else: xy = rand(b, q, n, len(shapes), k, 2)
    # The gradient jumps where a point crosses the centre of a pixel, so no point may lie where rounding decides on which side it is.
    pixel = xy * wh - .5
    xy = (pixel.floor() + (pixel - pixel.floor()).clamp(.002, .998) + .5) / wh
    value = torch.randn(b, pixels(shapes), n, sizes['d'], generator=generator)
    weights = torch.randn(b, q, n, len(shapes) * k, generator=generator).softmax(-1).view(b, q, n, len(shapes), k)
    return value, shapes, xy, weights

def msda_cast(args, dtype): return args[0].to(dtype), *args[1:]     # points and weights stay float32

def transformers_msda(args):
    "The pure PyTorch form of transformers, all tensors in the dtype of the value: `F.grid_sample` takes no mixture."
    if importlib.util.find_spec('transformers') is None: raise Missing('transformers is not installed (extra `peers`)')
    from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention
    module = MultiScaleDeformableAttention()
    value, shapes, points, weights = args
    def transformers(value, shapes, points, weights): return module(value, None, shapes, None, points, weights, 64)
    return transformers, (value, shapes, points.to(value.dtype), weights.to(value.dtype))

def transformers_msda_compiled(args):
    f, args = transformers_msda(args)
    return torch.compile(f, fullgraph=True, dynamic=False), args

def deformops_msda(name):
    "`deformops` by one of its backends, 'TRITON' or 'CUDA'. On a GPU that can add 16-bit numbers it does so for half precision, as it would by itself."
    def build(args):
        if importlib.util.find_spec('deformops') is None: raise Missing('deformops is not installed')
        value, shapes, points, weights = args
        if value.device.type != 'cuda': raise Missing('its kernels need a GPU')
        try: from deformops.registry import Backend, msda
        except Exception as e: raise Missing(f'deformops cannot be imported: {e}')
        sizes, starts = levels_on(value, shapes)
        more = dict(fp32acc=False) if name == 'TRITON' else {}
        def deformops(value, points, weights): return msda(value, sizes, starts, points, weights.flatten(3), backend=Backend[name], **more)
        return deformops, (value, points, weights.to(value.dtype))
    return build

def kernel_2020_msda(args):
    "The kernel of Deformable DETR (2020), built from mmcv's sources: see `kernel_2020.py`."
    folder, (value, shapes, points, weights) = os.environ.get('DEFORMLIT_MMCV'), args
    if not folder or not Path(folder).is_dir(): raise Missing("the environment's DEFORMLIT_MMCV names no folder with mmcv's sources")
    if value.device.type != 'cuda' or value.dtype != torch.float32: raise Missing('it needs a GPU and takes float32 only')
    import kernel_2020
    try: c = kernel_2020.loaded(folder)
    except Exception as e: raise Missing(f'it could not be built: {e}')
    sizes, starts = levels_on(value, shapes)
    def kernel(value, points, weights): return kernel_2020.Kernel2020.apply(value, sizes, starts, points, weights, c)
    return kernel, (value, points, weights)

def levels_on(value, shapes):
    "Sizes of the levels and their first pixels as tensors."
    sizes = torch.tensor(shapes, device=value.device)
    return sizes, torch.cat([sizes.new_zeros(1), sizes.prod(1).cumsum(0)[:-1]])

def msda_count(sizes, size):
    "8 operations for each sample and channel forward (4 neighbours, multiply and add), 16 more backward; every tensor moved once is compulsory. The gradient of the values is added up in float32."
    b, q, n, d, k, shapes = (sizes[o] for o in ('b', 'q', 'n', 'd', 'k', 'shapes'))
    samples, value, out = b * q * n * len(shapes) * k, b * pixels(shapes) * n * d * size, b * q * n * d * size
    fwd, bwd = value + 12 * samples + out, 2 * value + 24 * samples + out
    return dict(samples=samples, operations=dict(fwd=8 * d * samples, bwd=16 * d * samples, fwd_bwd=24 * d * samples),
                gathered=4 * d * size * samples, reduced=4 * d * 4 * samples, compulsory=dict(fwd=fwd, bwd=bwd, fwd_bwd=fwd + bwd))

def msda_reads(rows, size):
    "A block has 256 threads, and for each of its queries one for every 16 bytes of a row, up to 32."
    d = rows['table'].shape[1]
    lanes = min(32, 1 << max(0, math.ceil(math.log2(d * size / 16))))
    return limits.distinct(rows, 256 // lanes) * d * size

def msda_rows(args):
    "A table of rows for each (image, head), and for each of its queries and points the first of the four rows that are read: r, r + 1, r + w, r + w + 1."
    value, shapes, points, weights = args
    (b, s, n, d), (_, q, _, l, k, _) = value.shape, points.shape
    wh = torch.tensor([(w, h) for h, w in shapes], dtype=torch.float32)[:, None]
    low = (points * wh - .5).floor().clamp(min=0).minimum((wh - 2).clamp(min=0)).long()                       # b q n l k 2
    start = torch.tensor([0] + [h * w for h, w in shapes[:-1]]).cumsum(0)[:, None]
    first = start + low[..., 1] * wh[:, :, 0].long() + low[..., 0]
    first = first + (torch.arange(b)[:, None, None, None, None] * n + torch.arange(n)[:, None, None]) * s      # rows of all tables, one after the other
    # on a level one pixel wide or high the neighbours would be beyond its end: the row is read again
    width, step = (torch.tensor([o for hw in shapes for o in [f(hw)] * k], dtype=torch.int32) for f in (lambda hw: hw[1] if hw[0] > 1 else 0, lambda hw: int(hw[1] > 1)))
    head_major = lambda x: x.transpose(1, 2).reshape(b * n, q, l * k).contiguous()
    return dict(table=value.transpose(1, 2).reshape(b * n * s, d).contiguous(), first=head_major(first).int(), weights=head_major(weights), width=width, step=step, levels=l)

def _queries(sizes, x): return {**sizes, 'q': x}
def _levels(sizes, x): return {**sizes, 'shapes': pyramid(64, x)}
def _channels(sizes, x): return {**sizes, 'd': x // sizes['n']}
def _batch(sizes, x): return {**sizes, 'b': x}

def _multiscale():
    from deformlit.multiscale import _msda, ms_deform_attn
    out_mb = lambda s: s['b'] * s['q'] * s['n'] * s['d'] * 4 / 1e6
    return Entry(
        op='ms_deform_attn', ours=ms_deform_attn, handle=_msda,
        workloads=dict(
            enc=msda_sizes(1, pyramid(64), 8, 32), dec=msda_sizes(1, pyramid(64), 8, 32, q=300), small=msda_sizes(8, pyramid(20, 3), 8, 16)),
        small=msda_sizes(1, pyramid(32), 8, 16, q=300),
        sweeps=dict(queries=(_queries, (10, 30, 100, 300, 1000, 3000)), levels=(_levels, (1, 2, 3, 4, 5)), channels=(_channels, (64, 128, 256, 512, 1024)), batch=(_batch, (1, 2, 4, 8, 16))),
        kinds={3: msda_sizes(1, pyramid(32), 8, 32, q=25), 4: msda_sizes(1, pyramid(32), 8, 32, q=250), 5: msda_sizes(1, pyramid(44), 8, 32),
               6: msda_sizes(2, pyramid(96), 8, 32), 7: msda_sizes(4, pyramid(128), 8, 32)},
        inputs=msda_inputs, cast=msda_cast, count=msda_count, rows=msda_rows,
        peers={'transformers': transformers_msda, 'transformers compiled': transformers_msda_compiled, '2020 kernel': kernel_2020_msda,
               'deformops Triton': deformops_msda('TRITON'), 'deformops CUDA': deformops_msda('CUDA')}, slow_peers=('transformers compiled',), cuda_peers=('2020 kernel', 'deformops Triton', 'deformops CUDA'),
        goals={('native', 'fwd'): dict(enc=60, dec=20, small=11), ('native', 'fwd_bwd'): dict(enc=27, dec=18, small=10),
               ('compiled', 'fwd'): dict(enc=15, dec=7, small=2), ('compiled', 'fwd_bwd'): dict(enc=7, dec=5, small=2.5),
               ('eager', 'fwd'): dict(enc=5, dec=2, small=1), ('eager', 'fwd_bwd'): dict(enc=2, dec=1.2, small=1)},
        memory={('native', 'fwd'): ('output + 10 %', lambda row, base, sizes: row['peak_mb'] <= 1.1 * out_mb(sizes) + .5),     # half a megabyte is what the measuring itself may err
                ('native', 'fwd_bwd'): ("1/12 of the peer's", lambda row, base, sizes: row['peak_mb'] <= base['peak_mb'] / 12)},
        cuda_workloads=dict(encoder=msda_sizes(2, IMAGE, 8, 32), decoder=msda_sizes(2, IMAGE, 8, 32, q=300), decoder900=msda_sizes(2, IMAGE, 8, 32, q=900)), reads=msda_reads,
        instructions={('fwd', 'float32'): 169 + 8 * 171 / 2, ('fwd', 'bfloat16'): 170 + 4 * 191},      # sm_90: the loop over samples, and for each thread of a row the loop that reads (of two samples in float32)
        cuda_goals={('native', 'fwd', 'float32'): dict(encoder=120, decoder=10, decoder900=15), ('native', 'fwd', 'bfloat16'): dict(encoder=95)},
        cuda_ratios={('native', 'fwd', 'float32', '2020 kernel'): dict(encoder=3), ('native', 'fwd', 'float32', 'deformops'): dict(encoder=1.3), ('native', 'bwd', 'float32', 'peers'): dict(encoder=1 / .75),
                     ('native', 'bwd', 'float32', 'reductions'): dict(encoder=1 / 1.25), ('native deterministic', 'bwd', 'float32', 'native'): dict(encoder=.5)})

# ---- dilated window attention ---------------------------------------------------------------------------------------

def dilated_sizes(b, h, w, n, d, dilations, ks=3): return dict(b=b, h=h, w=w, n=n, d=d, dilations=tuple(dilations), ks=ks)

def dilated_inputs(sizes, points, generator):
    "Queries, keys and values, three views of one map as a convolution makes it; the size of the window and the dilations."
    b, n, d, h, w = (sizes[o] for o in ('b', 'n', 'd', 'h', 'w'))
    return *torch.randn(b, 3, n, d, h, w, generator=generator).unbind(1), sizes['ks'], sizes['dilations']

def dilated_cast(args, dtype): return *(o.to(dtype) for o in args[:3]), *args[3:]

def unfold(q, k, v, kernel_size, dilations):
    "The official formulation: for each group of heads `nn.Unfold` cuts the windows of keys and values out of the map inside a border of zeros; then it is attention."
    (b, _, d, h, w), out = q.shape, []
    for q, k, v, dilation in zip(*(o.chunk(len(dilations), 1) for o in (q, k, v)), dilations):
        cut = torch.nn.Unfold(kernel_size, dilation, dilation * (kernel_size // 2), 1)
        keys, values = (cut(o.flatten(1, 2)).unflatten(1, (q.shape[1], d, kernel_size**2)).movedim(-1, 2) for o in (k, v))       # b n s d k
        weights = (q.flatten(3).mT[:, :, :, None] @ keys * d**-.5).softmax(-1)                                                  # b n s 1 k
        out.append((weights @ values.mT).squeeze(3).mT.unflatten(-1, (h, w)))
    return torch.cat(out, 1)

def unfold_compiled(args): return torch.compile(unfold, fullgraph=True, dynamic=False), args

def flex_dilated(args):
    """`flex_attention` over keys and values inside a border of zeros, with a mask of blocks. Compiled it takes rows of a power of two only, so zeros are put behind each."""
    q, k, v, ks, dilations = args
    if q.device.type != 'cuda': raise Missing('on the CPU it has no backward pass')
    return dilated_by_flex(q, ks, dilations, torch.compile), args

def dilated_by_flex(q, ks, dilations, compiled=lambda f, **kw: f):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    b, n, d, h, w = q.shape
    flex, more, parts = compiled(flex_attention, dynamic=False), max(16, 1 << (d - 1).bit_length()) - d, []
    for dilation in dilations:
        far = dilation * (ks // 2)
        def mask(b, n, i, j, dilation=dilation, far=far):
            y, x = j // (w + 2 * far) - far - i // w, j % (w + 2 * far) - far - i % w
            return (y.abs() <= far) & (y % dilation == 0) & (x.abs() <= far) & (x % dilation == 0)
        parts.append((far, create_block_mask(mask, None, None, h * w, (h + 2 * far) * (w + 2 * far), device=q.device)))
    pad = torch.nn.functional.pad
    def flex_dilated(q, k, v, ks, dilations):
        out = []
        for q, k, v, (far, mask) in zip(*(o.chunk(len(dilations), 1) for o in (q, k, v)), parts):
            tokens = lambda o: pad(o.flatten(3).mT, (0, more)).contiguous()
            o = flex(tokens(q), *(tokens(pad(o, (far,) * 4)) for o in (k, v)), block_mask=mask, scale=d**-.5)
            out.append(o[..., :d].mT.unflatten(-1, (h, w)))
        return torch.cat(out, 1)
    return flex_dilated

def dilated_count(sizes, size):
    """4 operations for each query, key of its window and channel forward (a product with the key, one with the value), 8 more backward and 2 to have the weights again;
    every map moved once is compulsory. Each key is read twice forward and five times backward."""
    maps, k = sizes['b'] * sizes['n'] * sizes['d'] * sizes['h'] * sizes['w'], sizes['ks']**2
    fwd, bwd = 4 * maps * size, 7 * maps * size
    return dict(samples=maps // sizes['d'] * k, operations=dict(fwd=4 * k * maps, bwd=10 * k * maps, fwd_bwd=14 * k * maps), gathered=2 * k * maps * size,
                compulsory=dict(fwd=fwd, bwd=bwd, fwd_bwd=fwd + bwd))

def _side(sizes, x): return {**sizes, 'h': x, 'w': x}
def _width(sizes, x): return {**sizes, 'd': x}
def _kernel(sizes, x): return {**sizes, 'ks': x}

def _dilated():
    from deformlit.dilated import _dilated, dilated_attn
    tenth = "1/10 of the peer's", lambda row, base, sizes: row['peak_mb'] <= base['peak_mb'] / 10
    return Entry(
        op='dilated_attn', ours=dilated_attn, handle=_dilated, points=('none',),
        workloads=dict(t1=dilated_sizes(4, 56, 56, 3, 24, (1, 2, 3)), t1h8=dilated_sizes(4, 56, 56, 8, 24, (2,))),
        small=dilated_sizes(1, 28, 28, 6, 24, (1, 2, 3)),
        sweeps=dict(batch=(_batch, (1, 2, 4, 8, 16)), side=(_side, (7, 14, 28, 56, 112)), width=(_width, (8, 16, 24, 32, 64)), kernel=(_kernel, (1, 3, 5, 7))),
        kinds={3: dilated_sizes(1, 8, 8, 3, 8, (1, 2, 3)), 4: dilated_sizes(1, 14, 14, 3, 24, (1, 2, 3)), 5: dilated_sizes(1, 56, 56, 3, 24, (1, 2, 3)),
               6: dilated_sizes(8, 56, 56, 3, 24, (1, 2, 3)), 7: dilated_sizes(64, 56, 56, 3, 24, (1, 2, 3))},
        inputs=dilated_inputs, cast=dilated_cast, count=dilated_count, rows=None,
        peers={'unfold': lambda args: (unfold, args), 'unfold compiled': unfold_compiled, 'flex_attention': flex_dilated}, slow_peers=('unfold compiled',), cuda_peers=('flex_attention',),
        cuda_workloads=dict(stage1=dilated_sizes(128, 56, 56, 3, 24, (1, 2, 3))), cuda_goals={('native', 'fwd', 'bfloat16'): dict(stage1=80)}, cuda_ratios={('native', 'fwd', 'bfloat16', 'unfold'): dict(stage1=6)},
        goals={('native', 'fwd'): dict(t1=35, t1h8=60), ('native', 'fwd_bwd'): dict(t1=38, t1h8=48), ('compiled', 'fwd'): dict(t1=10, t1h8=15)},
        memory={('native', 'fwd'): tenth, ('native', 'fwd_bwd'): tenth})

# ---- attention with deformed keys -----------------------------------------------------------------------------------

def deformed_sizes(b, h, w, n, g, k, d=32): return dict(b=b, h=h, w=w, n=n, g=g, k=k, d=d)

def deformed_inputs(sizes, points, generator):
    "Queries, keys and values as convolutions make them, channels before places; a table for steps of one; keys anywhere on the map. Each step's share is kept away from 0 and 1, where gradients jump."
    b, n, g, d, h, w, k = (sizes[o] for o in ('b', 'n', 'g', 'd', 'h', 'w', 'k'))
    q, keys, values = (torch.randn(b, n, d, o, generator=generator).mT for o in (h * w, k, k))
    table = .5 * torch.randn(n, 2*h - 1, 2*w - 1, generator=generator)
    start = torch.rand(b, g, k, 2, generator=generator) * torch.tensor([w - 1, h - 1]).clamp(min=1)
    start = start.floor() + (start - start.floor()).clamp(.002, .998)
    return q, keys, values, table, start, (1., 1.), (h, w), 2

def deformed_cast(args, dtype): return *(o.to(dtype) for o in args[:3]), *args[3:]      # table and places stay float32

def displacements(q, k, v, table, start, step, size, taps):
    "The official formulation: a tensor of all displacements, `F.grid_sample` of the table at them, two products and a softmax between them."
    (b, g, keys, _), (h, w), (n, th, tw) = start.shape, size, table.shape
    line = lambda m: torch.arange(m, device=start.device, dtype=start.dtype)
    x = (start[..., 0, None, None] + line(w)) * (2 / max(tw - 1, 1)) - 1                     # b g k 1 w, from -1 to 1 over the centres of the table
    y = (start[..., 1, None, None] + line(h)[:, None]) * (2 / max(th - 1, 1)) - 1
    at = torch.stack(torch.broadcast_tensors(x, y), -1).flatten(3, 4).transpose(2, 3).flatten(0, 1)      # (b g) q k 2
    tables = table.unflatten(0, (g, -1)).expand(b, -1, -1, -1, -1).flatten(0, 1)
    bias = torch.nn.functional.grid_sample(tables, at, mode='bilinear', align_corners=True).unflatten(0, (b, g)).flatten(1, 2)
    scores = torch.einsum('bnqd,bnkd->bnqk', q, k) * q.shape[3]**-.5 + bias.to(q.dtype)
    return torch.einsum('bnqk,bnkd->bnqd', scores.softmax(-1), v)

def displacements_compiled(args): return torch.compile(displacements, fullgraph=True, dynamic=False), args

def deformed_count(sizes, size):
    "4 operations for each query, key and channel forward, 10 backward (the scores once more, and four products); every tensor moved once is compulsory. Gathered are the table's numbers, four for a score."
    b, n, g, d, h, w, k = (sizes[o] for o in ('b', 'n', 'g', 'd', 'h', 'w', 'k'))
    pairs, table = b * n * h * w * k, n * (2*h - 1) * (2*w - 1) * 4
    fwd = b * n * d * (2 * h * w + 2 * k) * size + table + b * g * k * 8
    bwd = b * n * d * (4 * h * w + 4 * k) * size + 2 * table + 2 * b * g * k * 8
    return dict(samples=pairs, operations=dict(fwd=4 * d * pairs, bwd=10 * d * pairs, fwd_bwd=14 * d * pairs), gathered=16 * pairs, compulsory=dict(fwd=fwd, bwd=bwd, fwd_bwd=fwd + bwd))

def _keys(sizes, x): return {**sizes, 'k': x}

def _deformed():
    from deformlit.relative_bias import _attend, table_attend
    pairs = lambda sizes: sizes['b'] * sizes['n'] * sizes['h'] * sizes['w'] * sizes['k'] * 4 / 1e6
    no_pairs = 'less than a number for each query and key', lambda row, base, sizes: row['peak_mb'] < pairs(sizes)
    return Entry(
        op='table_attend', ours=table_attend, handle=_attend, points=('none',),
        workloads=dict(s3=deformed_sizes(4, 14, 14, 12, 3, 196), s2=deformed_sizes(4, 28, 28, 12, 3, 784), s2k196=deformed_sizes(4, 28, 28, 12, 3, 196), pp1=deformed_sizes(1, 56, 56, 2, 1, 49), pp1_large=deformed_sizes(1, 200, 334, 2, 1, 1050)),
        small=deformed_sizes(1, 14, 14, 12, 3, 49),
        sweeps=dict(batch=(_batch, (1, 2, 4, 8, 16)), side=(_side, (7, 14, 28, 56)), width=(_width, (8, 16, 32, 64)), keys=(_keys, (16, 49, 196, 784))),
        kinds={4: deformed_sizes(1, 7, 7, 2, 1, 49), 5: deformed_sizes(1, 14, 14, 4, 1, 49), 6: deformed_sizes(1, 14, 14, 12, 3, 196), 7: deformed_sizes(4, 28, 28, 12, 3, 196)},
        inputs=deformed_inputs, cast=deformed_cast, count=deformed_count, rows=None,
        peers={'displacements': lambda args: (displacements, args), 'displacements compiled': displacements_compiled}, slow_peers=('displacements compiled',),
        goals={('native', 'fwd'): dict(s3=8, s2=16, s2k196=10), ('native', 'fwd_bwd'): dict(s3=3, s2=7, s2k196=4.5)},
        memory={('native', 'fwd'): no_pairs, ('native', 'fwd_bwd'): no_pairs})

ENTRIES = dict(multiscale=_multiscale, dilated=_dilated, deformed_keys=_deformed)

def entry(name) -> Entry: return ENTRIES[name]()
