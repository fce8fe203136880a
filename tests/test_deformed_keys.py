"""DAT's attention and its biases beyond the golden files: sizes, types, options, compilation, refusals."""
import json, re, shutil, subprocess
from pathlib import Path

import pytest, torch
from torch.testing import assert_close
from deformlit.core import ArgumentError, backend, needs_compiler
from deformlit.deformed_keys import *
from deformlit.relative_bias import *
from deformlit.sample import sample
import deformlit.relative_bias as rb

GRIDS = [PaperGrid, FirstReleaseGrid, PlusPlusGrid]
BOUNDS = [lambda: Bounded(2), lambda: Bounded(0), Clamped, Squashed, Free]
def biases(dim=8, heads=4, groups=2, size=(6, 7), keys=(3, 4)):
    return dict(none=NoBias(), table=InterpolatedBias(heads, size, std=1.), fixed=FixedBias(heads, size, keys, std=1.), log=LogCPB(heads, groups), depthwise=DepthwiseBias(dim))
def module(grid=PlusPlusGrid, bound=None, bias='table', stride=2, kernel_size=3, **kw):
    torch.manual_seed(0)
    return DeformedKeysAttention(8, 4, 2, stride, kernel_size, grid(bound), biases()[bias], **kw)

@pytest.mark.parametrize('grid', GRIDS)
@pytest.mark.parametrize('bound', BOUNDS)
@pytest.mark.parametrize('bias', ['none', 'table', 'fixed', 'log', 'depthwise'])
def test_any_size_is_finite(grid, bound, bias):
    m = module(grid, bound(), bias)
    for h, w in [(6, 7), (1, 1), (1, 5), (4, 1), (2, 2), (3, 9), (11, 4)]:
        x = torch.randn(2, 8, h, w, requires_grad=True)
        before = x.detach().clone()
        y = m(x)
        assert y.shape == x.shape and y.isfinite().all()
        y.square().sum().backward()
        assert x.grad.isfinite().all() and all(p.grad is None or p.grad.isfinite().all() for p in m.parameters())
        assert torch.equal(x.detach(), before)
        m.zero_grad()

@pytest.mark.parametrize('grid', GRIDS)
@pytest.mark.parametrize('read', [SampledKeys, PooledKeys])
@pytest.mark.parametrize('bias', ['none', 'table', 'fixed', 'log', 'depthwise'])
@pytest.mark.parametrize('stride, kernel_size', [(1, 3), (2, 2), (2, 5), (3, 3), (4, 9)])
def test_without_offsets(grid, read, bias, stride, kernel_size):
    m = module(grid, None, bias, stride, kernel_size, offsets=NoOffsets, read=read())
    assert not any(p.requires_grad for p in m.offsets.parameters())
    for h, w in [(6, 7), (1, 1), (5, 3)]:
        x = torch.randn(1, 8, h, w, requires_grad=True)
        y = m(x)
        y.sum().backward()
        assert y.isfinite().all() and x.grad.isfinite().all()

@pytest.mark.parametrize('bias', ['none', 'table', 'fixed', 'log', 'depthwise'])
@pytest.mark.parametrize('grid', GRIDS)
def test_half_precision(grid, bias):
    m, x = module(grid, None, bias), torch.randn(2, 8, 6, 7)
    want = m(x)
    half = m.to(torch.bfloat16)
    got = half(x.bfloat16())
    assert got.dtype == torch.bfloat16
    assert_close(got.float(), want, atol=.05, rtol=.05)
    assert half.points(half.q_proj(x.bfloat16())).dtype == torch.float32
    got.float().sum().backward()
    m.float()
    with torch.autocast('cpu', torch.bfloat16): assert_close(m(x).float(), want, atol=.05, rtol=.05)

@pytest.mark.parametrize('grid, bias', [(PlusPlusGrid, 'table'), *(pytest.param(*o, marks=pytest.mark.slow) for o in [
    *((PlusPlusGrid, o) for o in ('none', 'fixed', 'log', 'depthwise')), (FirstReleaseGrid, 'table'), (PaperGrid, 'table')])])
def test_compiles_whole(grid, bias):
    torch._dynamo.reset()
    m = module(grid, None, bias)
    f = torch.compile(m, backend='aot_eager', fullgraph=True, dynamic=True)
    for h, w in [(6, 7), (5, 9), (8, 4)]:
        x = torch.randn(2, 8, h, w)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        assert_close(f(a), m(b))
        f(a).square().sum().backward(); m(b).square().sum().backward()
        assert_close(a.grad, b.grad)

@pytest.mark.slow
@pytest.mark.parametrize('read', [SampledKeys, PooledKeys])
def test_compiles_without_offsets(read):
    torch._dynamo.reset()
    m = module(bias='none', offsets=NoOffsets, read=read())
    f = torch.compile(m, backend='aot_eager', fullgraph=True, dynamic=True)
    for h, w in [(6, 8), (4, 10)]:
        x = torch.randn(2, 8, h, w)
        assert_close(f(x), m(x))

def case(size=(3, 4), table=(5, 7), queries=PixelQueries(), b=2, g=2, m=2, d=3, keys=(2, 3), spread=1.4):
    torch.manual_seed(1)
    at = ((torch.rand(b, g, *keys, 2, dtype=torch.float64) - .5) * spread + .5).requires_grad_()
    T = torch.randn(g * m, *table, dtype=torch.float64, requires_grad=True)
    start, step, taps = table_grid(size, table, at, queries)
    q, k, v = (torch.randn(b, g * m, o, d, dtype=torch.float64, requires_grad=True) for o in (size[0] * size[1], keys[0] * keys[1], keys[0] * keys[1]))
    return q, k, v, T, at, start, step, size, taps

CASES = [(dict(size=s, table=t, queries=q), want) for (s, t), q, want in [
    (((3, 4), (5, 7)), PixelQueries(), 2), (((3, 4), (5, 7)), CentredQueries(), 3), (((2, 5), (5, 7)), PixelQueries(), 0), (((2, 5), (5, 7)), CentredQueries(), 0),
    (((1, 1), (1, 1)), PixelQueries(), 2), (((1, 1), (1, 1)), CentredQueries(), 3), (((1, 4), (1, 7)), CentredQueries(), 3), (((6, 1), (11, 1)), PixelQueries(), 2)]]

@pytest.mark.parametrize('kw, want', CASES)
def test_forms_agree(kw, want):
    "Values, and gradients to the table and the keys, of each form with the grid's, and with the loop."
    q, k, v, T, at, start, step, size, taps = case(**kw)
    assert taps == want
    truth, grid, ours = interpolated_bias_loop(T, start, step, *size), interpolated_bias_grid(T, start, step, *size), interpolated_bias(T, start, step, size, taps)
    assert_close(grid, truth.detach()); assert_close(ours, truth.detach())
    weight = torch.randn_like(grid)
    for a, b in zip(torch.autograd.grad(grid, (T, at), weight, retain_graph=True), torch.autograd.grad(ours, (T, at), weight, retain_graph=True)): assert_close(a, b)

@pytest.mark.parametrize('kw, want', CASES)
@pytest.mark.parametrize('way', ['eager', 'compiled'])
def test_ways(kw, want, way):
    if way == 'compiled' and (needs_compiler() or want == 0): pytest.skip(needs_compiler() or 'one form with taps is enough here')
    q, k, v, T, at, start, step, size, taps = case(**kw)
    args = q, k, v, T, start, step, size, taps
    with backend('loop'), torch.no_grad(): truth = table_attend(*args)
    with backend(way): out = table_attend(*args)
    assert rb._attend.ran == way
    assert_close(out, truth)

@pytest.mark.parametrize('queries', [PixelQueries(), CentredQueries()])
def test_gradients(queries):
    q, k, v, T, at, start, step, size, taps = case((2, 3), (3, 5), queries, b=1, m=1, d=2, keys=(1, 2), spread=.7)
    def f(q, k, v, T, at):
        start, step, taps = table_grid(size, T.shape[1:], at, queries)
        return table_attend(q, k, v, T, start, step, size, taps)
    assert torch.autograd.gradcheck(f, (q, k, v, T, at), fast_mode=True)

@pytest.mark.parametrize('size', [(14, 14), (56, 56), (7, 12), (33, 1)])
def test_band_holds_in_float32(size):
    "The last tap is where rounding would show: keys everywhere, also on the pixels."
    table = torch.randn(2, 2*size[0] - 1, 2*size[1] - 1)
    keys = torch.cat([torch.rand(1, 1, 1, 200, 2), (torch.randint(0, 12, (1, 1, 1, 200, 2)) + .5) / 12], 3)
    for queries, want in ((PixelQueries(), 2), (CentredQueries(), 3)):
        start, step, taps = table_grid(size, table.shape[1:], keys, queries)
        exact = interpolated_bias_grid(table.double(), *table_grid(size, table.shape[1:], keys.double(), queries)[:2], *size)
        assert taps == want
        ours = four_crops(table, start, *size) if taps == 2 else three_taps(table, start, step, *size)
        assert_close(ours.double(), exact, atol=2e-4, rtol=0)

def test_far_and_not_a_number():
    T = torch.randn(1, 5, 5)
    start = torch.tensor([[[[1e30, 0.], [-1e30, 2.], [float('inf'), 1.], [float('nan'), 1.]]]])
    for taps in (2, 3):
        out = interpolated_bias(T, start, (1., 1.), (3, 3), taps)
        assert (out[..., :2] == 0).all() and out[..., 3].isnan().all()

@pytest.mark.parametrize('grid', GRIDS)
def test_transposed_image(grid):
    "Turning the image and all that is spatial about its diagonal turns the output: x and y are never mixed up."
    m, t = module(grid).double(), module(grid).double()
    t.load_state_dict(m.state_dict())
    with torch.no_grad():
        t.offsets.conv.weight.copy_(m.offsets.conv.weight.mT); t.offsets.out.weight.copy_(m.offsets.out.weight.flip(0))
        t.bias = InterpolatedBias(4, (7, 6)).double(); t.bias.table.copy_(m.bias.table.mT)
    x = torch.randn(2, 8, 6, 7, dtype=torch.float64)
    assert_close(t(x.mT), m(x).mT)

def test_batch_does_not_matter():
    m, x = module().double(), torch.randn(3, 8, 6, 7, dtype=torch.float64)
    assert_close(torch.cat([m(o[None]) for o in x]), m(x))

def test_dense_attention_is_inside():
    "Paper's grid, no offsets, no bias: attention between all pixels."
    m, x = DeformedKeysAttention(8, 2, 1, 1, 3, PaperGrid(), offsets=NoOffsets).double(), torch.randn(2, 8, 4, 5, dtype=torch.float64)
    q, k, v = (m.heads(o(x)) for o in (m.q_proj, m.k_proj, m.v_proj))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert_close(m(x), m.out_proj(want.transpose(2, 3).reshape(2, 8, 4, 5)))

@pytest.mark.parametrize('bias', ['none', 'table', 'fixed', 'log'])
def test_look_is_what_forward_does(bias):
    m, x = module(bias=bias).double(), torch.randn(2, 8, 6, 7, dtype=torch.float64)
    points, weights = m.look(x)
    assert points.shape == (2, 2, 12, 2) and weights.shape == (2, 4, 42, 12)
    v = m.heads(m.v_proj(m.read(x, points.unflatten(2, (3, 4)))))
    assert_close(m.out_proj((weights @ v).transpose(2, 3).reshape(2, 8, 6, 7)), m(x))

def test_dropout():
    m, x = module(attn_drop=.5, proj_drop=.5), torch.randn(2, 8, 6, 7)
    assert not torch.equal(m(x), m(x))
    m.eval()
    assert torch.equal(m(x), m(x))

def test_refusals():
    for kw, word in [(dict(dim=10), 'num_heads'), (dict(num_groups=3), 'num_groups'), (dict(stride=4, kernel_size=3), 'kernel_size')]:
        with pytest.raises(ArgumentError, match=word): DeformedKeysAttention(**{**dict(dim=16, num_heads=4, num_groups=2), **kw})
    m = module()
    for x in (torch.randn(2, 9, 6, 7), torch.randn(8, 6, 7), torch.zeros(2, 8, 0, 3), torch.zeros(2, 8, 4, 4, dtype=torch.int)):
        with pytest.raises(ArgumentError, match='x'): m(x)
    with pytest.raises(ArgumentError, match='num_groups'): LogCPB(4, 3)
    with pytest.raises(ArgumentError, match='size'): InterpolatedBias(4, (0, 3))
    with pytest.raises(ArgumentError, match='size'): TableBias(4, 3).logits((4, 3))
    with pytest.raises(ArgumentError, match='factor'): Bounded(-1)

# ---- the figures to move

def function(chapter, name, call):
    "What a function of a figure's JavaScript gives, by node."
    source = ''.join(''.join(c['source']) for c in json.loads((Path(__file__).parents[1]/'nbs'/f'{chapter}.ipynb').read_text(encoding='utf-8'))['cells'])
    body = re.search(rf'^function {name}\(.*?^}}', source, re.M | re.S)[0]
    return json.loads(subprocess.run(['node', '-e', f'{body}; console.log(JSON.stringify({call}))'], capture_output=True, text=True, check=True, timeout=60).stdout)

needs_node = pytest.mark.skipif(not shutil.which('node'), reason='no node on the path')

@needs_node
@pytest.mark.parametrize('queries', [PixelQueries(), CentredQueries()])
def test_figure_of_crops(queries):
    table, key = torch.rand(13, 9, dtype=torch.float64), torch.tensor([2.3, -.4], dtype=torch.float64)
    theirs = torch.tensor(function('12_relative_bias', 'bias', f'bias({table.tolist()}, {key[0]}, {key[1]}, 7, 5, {str(queries.taps == 3).lower()})'), dtype=torch.float64)
    at = ((key + .5) / torch.tensor([5, 7])).view(1, 1, 1, 1, 2)
    start, step, taps = table_grid((7, 5), (13, 9), at, queries)
    assert_close(theirs[:, 2], interpolated_bias(table[None], start, step, (7, 5), taps)[0, 0, :, 0])
    assert_close(theirs[0, :2], start[0, 0, 0])

@needs_node
@pytest.mark.parametrize('grid', GRIDS)
@pytest.mark.parametrize('name, bound', [('bounded', Bounded), ('clamped', Clamped), ('squashed', Squashed), ('free', Free)])
def test_figure_of_grids(grid, name, bound):
    part, offset = grid(bound()), torch.full((1, 1, 7, 7, 2), .37, dtype=torch.float64)
    line = grid(Free()).line(7, torch.arange(7, dtype=torch.float64)).tolist()
    theirs = function('13_deformed_keys', 'place', f"place({line}, {part.unit(7)}, .37, '{name}', 7)")
    assert_close(torch.tensor(theirs, dtype=torch.float64), part(offset, (7, 7))[0, 0, 0, :, 0] * 7 - .5)

@needs_node
@pytest.mark.parametrize('grid', GRIDS)
def test_figure_reads(grid):
    at = grid(Free())(torch.full((1, 1, 7, 7, 2), .3, dtype=torch.float64), (7, 7))
    x, y = (at[0, 0, 0, :, 0] * 7 - .5).tolist(), (at[0, 0, :, 0, 1] * 7 - .5).tolist()
    theirs = torch.tensor(function('13_deformed_keys', 'read', f'read({x}, {y}, 7)'), dtype=torch.float64)
    assert_close(theirs, sample(torch.arange(49, dtype=torch.float64).view(1, 1, 7, 7), at.view(1, 49, 2)).flatten())
