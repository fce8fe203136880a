"""Window and dilated attention against golden files: numbers that the official code printed, for the same weights and inputs, with gradients."""
import pytest, torch

from deformlit import dilated, windows
from deformlit.core import backend, needs_compiler
from deformlit.dilated import *
from deformlit.windows import *
from test_golden import FILES, Fixture, folder, only
from truth import need_native

# ---- the systems: each is built from the file's constructor arguments; `names` says what its parts are called officially

class Dilated:
    "The official op has all heads side by side, and gives `b h w c`."
    model, names, op, ways = None, {}, dilated._dilated, ('loop', 'eager', 'compiled', 'native')
    def __init__(self, config): self.c = only(config, head_dim=any, kernel_size=any, dilation=any, qk_scale=any)
    def __call__(self, q, k, v):
        q, k, v = (o.unflatten(1, (-1, self.c['head_dim'])) for o in (q, k, v))
        return dict(y=dilated_attn(q, k, v, self.c.get('kernel_size', 3), self.c.get('dilation', 1), scale=self.c.get('qk_scale')).flatten(1, 2).movedim(1, -1))

class MultiDilated(Dilated):
    def __init__(self, config):
        c = only(config, dim=any, num_heads=any, qkv_bias=any, qk_scale=None, attn_drop=any, proj_drop=any, kernel_size=any, dilation=any)
        self.model = MultiDilatedAttention(c['dim'], c.get('num_heads', 8), c.get('kernel_size', 3), c.get('dilation', [1, 2, 3]), c.get('qkv_bias', False), c.get('attn_drop', 0.), c.get('proj_drop', 0.))
    def __call__(self, x): return dict(y=self.model(x.movedim(-1, 1)).movedim(1, -1))

class Window:
    op, ways = windows._window, ('loop', 'eager', 'compiled')
    names = {'qkv': 'proj_qkv', 'proj.': 'proj_out.', 'bias.table': 'relative_position_bias_table'}
    def __init__(self, config):
        c = only(config, dim=any, heads=any, window_size=any, attn_drop=any, proj_drop=any)
        self.model = WindowAttention(c['dim'], c['window_size'], c['heads'], attn_drop=c['attn_drop'], proj_drop=c['proj_drop'])
    def __call__(self, x): return dict(y=self.model(x))

class ShiftedWindow(Window):
    def __init__(self, config):
        c = only(config, dim=any, heads=any, window_size=any, attn_drop=any, proj_drop=any, shift_size=any, fmap_size=any)
        self.model = ShiftedWindowAttention(c['dim'], c['window_size'], c['heads'], c['shift_size'], attn_drop=c['attn_drop'], proj_drop=c['proj_drop'])

class Neighbourhood(Window):
    op, names = windows._neighbourhood, {'bias.table': 'rpb'}
    def __init__(self, config):
        c = only(config, dim=any, kernel_size=any, num_heads=any, qkv_bias=any, attn_drop=any, proj_drop=any, dilation=any)
        self.model = NeighbourhoodAttention(c['dim'], c['kernel_size'], c['num_heads'], c.get('dilation') or 1, qkv_bias=c.get('qkv_bias', True))

SYSTEMS = dict(DilateAttention=Dilated, MultiDilatelocalAttention=MultiDilated, LocalAttention=Window, ShiftWindowAttention=ShiftedWindow, NeighborhoodAttention2D=Neighbourhood)

# ---- the comparison

def ours(names, theirs):
    "Our name of an official one."
    for a, b in names.items(): theirs = theirs.replace(b, a)
    return theirs

LEFT = 'relative_position_index', 'attn_mask'      # buffers that follow from the sizes; we make them when they are needed
RUN = [(n, case, way) for n, (kind, cases) in FILES.items() if kind in SYSTEMS for case in cases for way in SYSTEMS[kind].ways]
SLOW = [pytest.mark.slow, pytest.mark.skipif(needs_compiler() is not None, reason=str(needs_compiler()))]

@pytest.mark.parametrize('name,case,way', [pytest.param(*o, marks=SLOW if o[2] == 'compiled' else pytest.mark.slow if o[2] == 'loop' and FILES[o[0]][0] not in ('DilateAttention', 'MultiDilatelocalAttention') else []) for o in RUN])
def test_golden(name, case, way, parity):
    if way == 'native': need_native()
    f = Fixture(folder/name)
    system = SYSTEMS[f.kind](f.config)
    if system.model is not None:
        state = {ours(system.names, n): t for n, t in f.state_dict().items() if n not in LEFT}
        system.model.load_state_dict(state, strict=True)
        system.model.eval()
    inputs, grads, gradw = f.part(f'input/{case}/'), f.part(f'grad/{case}/'), f.part(f'gradw/{case}/')
    leaves = {n: t.clone().requires_grad_(n in grads) for n, t in inputs.items()}
    system.op.ran = None
    with backend(way, system.op.name): outputs = system(**leaves)
    assert system.op.ran == way
    for n in f.part(f'output/{case}/'): f.check(f'output/{case}/{n}', outputs[n], parity, f'output, {way}')
    for n, t in inputs.items(): assert torch.equal(leaves[n], t), f'input {n} was changed'
    sum((outputs[n] * w).sum() for n, w in gradw.items()).backward()
    params = dict(system.model.named_parameters()) if system.model is not None else {}
    for n in grads: f.check(f'grad/{case}/{n}', leaves[n].grad if n in leaves else params[ours(system.names, n.removeprefix('state_dict/'))].grad, parity, f'gradients, {way}')

def test_all_are_run(tell):
    files = {n for n, _, _ in RUN}
    assert {FILES[n][0] for n in files} == set(SYSTEMS)
    tell(f'golden: {len(RUN)} cases of {len(files)} files of windows')
