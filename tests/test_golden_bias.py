"""DAT's attention against golden files: each is built from the official constructor's arguments, gets the official weights, and
gives every output and gradient of the file."""
import pytest, torch
from deformlit.deformed_keys import *
from deformlit.core import backend
from deformlit.relative_bias import *
from deformlit.relative_bias import _attend
from truth import need_native
from test_golden import FILES, fixture, only

NAMES = [n for n, (kind, _) in FILES.items() if kind == 'DAttentionBaseline']

def build(c):
    "Our module for the arguments of the official one; `ksize` is DAT++'s, `stage_idx` the first release's."
    first = 'ksize' not in c
    c = only(c, q_size=any, kv_size=any, n_heads=any, n_head_channels=any, n_groups=any, attn_drop=0., proj_drop=0., stride=any, offset_range_factor=any,
             use_pe=any, dwc_pe=any, no_off=any, fixed_pe=any, **(dict(stage_idx=any) if first else dict(ksize=any, log_cpb=any)))
    factor, dim, (h, w) = c['offset_range_factor'], c['n_heads'] * c['n_head_channels'], c['q_size']
    pool = c['no_off'] and not first
    if first: grid = FirstReleaseGrid(Bounded(factor) if factor > 0 else Free() if factor == 0 else Squashed())
    else: grid = PlusPlusGrid(Clamped() if factor < 0 else Bounded(factor))
    if not c['use_pe'] or (pool and not c['dwc_pe']): bias = NoBias()
    elif c['dwc_pe']: bias = DepthwiseBias(dim)
    elif c['fixed_pe']: bias = FixedBias(c['n_heads'], (h, w), (h // c['stride'], w // c['stride']))
    elif c.get('log_cpb'): bias = LogCPB(c['n_heads'], c['n_groups'])
    else: bias = InterpolatedBias(c['n_heads'], (h, w))
    return DeformedKeysAttention(dim, c['n_heads'], c['n_groups'], c['stride'], (9, 7, 5, 3)[c['stage_idx']] if first else c['ksize'], grid, bias,
                                 NoOffsets if c['no_off'] else OffsetNetwork, PooledKeys() if pool else SampledKeys())

OURS = {'proj_q': 'q_proj', 'proj_k': 'k_proj', 'proj_v': 'v_proj', 'proj_out': 'out_proj', 'conv_offset.0': 'offsets.conv', 'conv_offset.1.norm': 'offsets.norm',
        'conv_offset.3': 'offsets.out', 'rpe_table.0': 'bias.mlp.0', 'rpe_table.2': 'bias.mlp.2'}

def our_name(name):
    if name == 'rpe_table': return 'bias.table'
    if name in ('rpe_table.weight', 'rpe_table.bias'): return name.replace('rpe_table', 'bias.conv')
    part, _, last = name.rpartition('.')
    return f'{OURS[part]}.{last}'

def signed(points, h, w):
    "(y, x) from -1 to 1 over the centres of the corner pixels, as official code says it."
    size = torch.tensor([w, h])
    return ((points * size - .5) / (size - 1) * 2 - 1).flip(-1)

@pytest.mark.parametrize('way', ['eager', 'native'])
@pytest.mark.parametrize('name, case', [(n, c) for n in NAMES for c in FILES[n][1]])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=['contiguous', 'channels_last'])
def test_deformed_keys(name, case, layout, way, parity):
    f = fixture(name)
    model = build(f.config).eval()
    if way == 'native':
        if not isinstance(model.bias, InterpolatedBias): pytest.skip('no table: one way only')
        need_native()
    model.load_state_dict({our_name(n): t for n, t in f.state_dict().items()})
    inputs, grads, gradw = f.part(f'input/{case}/'), f.part(f'grad/{case}/'), f.part(f'gradw/{case}/')
    x = inputs['x'].clone().contiguous(memory_format=layout).requires_grad_()
    assert set(inputs) == {'x'}
    _attend.ran = None
    with backend(way, 'table_attend'): y = model(x)
    assert _attend.ran == (way if isinstance(model.bias, InterpolatedBias) else None)
    q = model.q_proj(x)
    points = model.points(q)
    h, w = x.shape[2:]
    reference = model.grid.reference(*points.shape[2:4], points).flip(-1).expand_as(points)
    outputs = dict(y=y, pos=signed(points, h, w), reference=reference)
    for n in f.part(f'output/{case}/'): f.check(f'output/{case}/{n}', outputs[n], parity, dict(y='output', pos='deformed points', reference='reference points')[n])
    sum((outputs[n] * g).sum() for n, g in gradw.items()).backward()
    found = {n: model.get_parameter(our_name(n.removeprefix('state_dict/'))).grad if n != 'x' else x.grad for n in grads}
    for n, g in found.items(): f.check(f'grad/{case}/{n}', torch.zeros_like(f.tensors[f'grad/{case}/{n}']) if g is None else g, parity, 'gradients')
    assert torch.equal(x.detach(), inputs['x']), 'the input was changed'

def test_all_are_there(): assert len(NAMES) >= 15 or not NAMES
