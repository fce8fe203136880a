"""DAT, DAT++ and their blocks against golden files: each is built from the official constructor's arguments, gets the official
weights by their official names, and gives every output and gradient of the file."""
import functools
import pytest, torch
from torch import nn
from deformlit.backbones import PixelMLP
from deformlit.checkpoints import load_weights, to_layout
from deformlit.dat import *
from deformlit.deformed_keys import *
from deformlit.layers import LayerNorm2d
from deformlit.relative_bias import *
from test_golden import FILES, fixture, official_grads, only

KINDS = 'DAT', 'TransformerMLP', 'TransformerMLPWithConv'
RUN = [(n, case) for n, (kind, cases) in FILES.items() if kind in KINDS for case in cases]

# ---- built from the official arguments

def official_attention(c, s, plan):
    "The deformed attention of stage `s`, whatever its options say."
    first, factor, p = 'ksizes' not in c, c['offset_range_factor'][s], plan
    def bound(): return (Bounded(factor) if factor > 0 else Free() if factor == 0 else Squashed()) if first else Clamped() if factor < 0 else Bounded(factor)
    pool = c['no_offs'][s] and not first
    if not c['use_pes'][s] or (pool and not c['dwc_pes'][s]): bias = lambda p: NoBias()
    elif c['dwc_pes'][s]: bias = lambda p: DepthwiseBias(p.dim)
    elif c['fixed_pes'][s]: bias = lambda p: FixedBias(p.num_heads, p.size, [o // p.stride for o in p.size])
    elif not first and c['log_cpb'][s]: bias = lambda p: LogCPB(p.num_heads, p.num_groups)
    else: bias = interpolated
    return deformed(p, lambda: (FirstReleaseGrid if first else PlusPlusGrid)(bound()), bias, offsets=NoOffsets if c['no_offs'][s] else OffsetNetwork, read=PooledKeys() if pool else SampledKeys())

def build_dat(config):
    "A DAT of the official arguments: layer by layer, since each stage may have its own options."
    first = 'ksizes' not in config
    names = 'img_size patch_size num_classes expansion dim_stem dims depths heads window_sizes strides offset_range_factor stage_spec groups use_pes dwc_pes fixed_pes no_offs use_dwc_mlps use_conv_patches drop_path_rate'.split()
    more = ['sr_ratios'] if first else ['ksizes', 'use_lpus', 'layer_scale_values', 'log_cpb', 'nat_ksizes']
    c = only(config, drop_rate=0., attn_drop_rate=0., **dict.fromkeys(names + more, any))
    assert c['patch_size'] == 4
    side, stages, dims = check_size(c['img_size']), [], c['dims']
    for s, dim in enumerate(dims):
        size = tuple(o // 4 // 2**s for o in side)
        plan = Plan(dim, c['heads'][s], max(c['groups'][s], 1), max(c['strides'][s], 1), (9, 7, 5, 3)[s] if first else c['ksizes'][s], c['window_sizes'][s], size, 0., 0.)
        attns = dict(L=local, S=shifted, N=lambda p, s=s: near(p, c['nat_ksizes'][s]), D=lambda p, s=s: official_attention(c, s, p))
        mlp = (FirstConvMLP if first else ConvMLP) if c['use_dwc_mlps'][s] else PixelMLP
        lpu = PlusAround if not first and c['use_lpus'][s] else nn.Identity
        scale = functools.partial(BranchScale, init=c['layer_scale_values'][s]) if not first and c['layer_scale_values'][s] > 0 else nn.Identity
        stages.append(nn.Sequential(*[DATLayer(dim, attns[kind](plan), mlp(dim, dim * c['expansion']), lpu, scale) for kind in c['stage_spec'][s]]))
    stem = (WideStem if first else ConvStem)(3, c['dim_stem']) if c['use_conv_patches'] else PatchStem(3, c['dim_stem'])
    if c['dim_stem'] != dims[0]: stem.add_module('proj', nn.Conv2d(c['dim_stem'], dims[0], 1))
    down = ConvDown if c['use_conv_patches'] else PatchDown
    return DAT(stem, stages, [down(*o) for o in zip(dims, dims[1:])], LayerNorm2d(dims[-1]), dims, [4 * 2**i for i in range(len(dims))], c['num_classes'], img_size=side)

def build(f):
    if f.kind == 'DAT': return build_dat(f.config)
    c = only(f.config, channels=any, expansion=any, drop=any)
    cls = PixelMLP if f.kind == 'TransformerMLP' else ConvMLP if 'linear1.0.weight' in f.state_dict() else FirstConvMLP
    return cls(c['channels'], c['channels'] * c['expansion'], c['drop'])

# ---- what the files hold

def signed(points, h, w):
    "(y, x) from -1 to 1 over the centres of the corner pixels, as official code says it."
    size = torch.tensor([w, h], dtype=points.dtype)
    return ((points * size - .5) / (size - 1) * 2 - 1).flip(-1)

def run(model, x):
    "Outputs under their official names."
    if not isinstance(model, DAT): return dict(y=model(x))
    out = {}
    def stage(s): return lambda m, args, y: out.update({f'stage{s}': y})
    def place(s, d):
        def hook(m, args, y):
            points, (h, w) = m.points(m.q_proj(args[0])), args[0].shape[2:]
            out.update({f'pos.{s}.{d}': signed(points, h, w), f'reference.{s}.{d}': m.grid.reference(*points.shape[2:4], points).flip(-1).expand_as(points)})
        return hook
    hooks = [m.register_forward_hook(stage(s)) for s, m in enumerate(model.stages)]
    hooks += [layer.attn.register_forward_hook(place(s, d)) for s, m in enumerate(model.stages) for d, layer in enumerate(m) if isinstance(layer.attn, DeformedKeysAttention)]
    out['logits'] = model(x)
    for o in hooks: o.remove()
    return out

WORDS = dict(y='blocks: outputs', logits='outputs', stage='maps of all stages', pos='deformed points', reference='reference points')
def words(name): return WORDS[name.split('.')[0].rstrip('0123')]

@pytest.mark.parametrize('name, case', RUN)
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=['contiguous', 'channels_last'])
def test_golden(name, case, layout, parity):
    f = fixture(name)
    model = build(f).eval()
    report = load_weights(model, f.state_dict(), 'official')
    assert len(report.kept) == len(model.state_dict()) and not report.resized
    inputs, grads, gradw = f.part(f'input/{case}/'), f.part(f'grad/{case}/'), f.part(f'gradw/{case}/')
    assert set(inputs) == {'x'} and gradw
    x = inputs['x'].clone().contiguous(memory_format=layout).requires_grad_('x' in grads)
    outputs = run(model, x)
    for n in f.part(f'output/{case}/'): f.check(f'output/{case}/{n}', outputs[n], parity, words(n))
    sum((outputs[n] * g).sum() for n, g in gradw.items()).backward()
    found = {f'state_dict/{n}': g for n, g in official_grads(model).items()} | {'x': x.grad}
    for n in grads: f.check(f'grad/{case}/{n}', found[n], parity, 'gradients')
    assert torch.equal(x.detach(), inputs['x']), 'the input was changed'

@pytest.mark.parametrize('name', sorted({n for n, _ in RUN}))
def test_round_trip(name, parity):
    f = fixture(name)
    state, model = f.state_dict(), build(f)
    load_weights(model, state)
    back = to_layout(model, 'official')
    assert back.keys() == state.keys()
    for n, t in back.items(): assert t.dtype == state[n].dtype and torch.equal(t, state[n]), n
    parity.record('DAT', 'official files', 'weights and buffers, in and out', 0, 0, tensors=len(state), numbers=sum(t.numel() for t in state.values()))

def test_all_are_run(tell):
    assert {FILES[n][0] for n, _ in RUN} == set(KINDS) and len({n for n, _ in RUN}) >= 8
    tell(f'golden: {len(RUN)} cases of {len({n for n, _ in RUN})} files of DAT and its blocks')
