"""DilateFormer against golden files, and against numbers that the official code gives for weights by a formula."""
import pytest, torch
from torch.testing import assert_close

import formula
from deformlit.backbones import create_model
from deformlit.checkpoints import entries, layouts, load_weights, to_layout
from deformlit.core import backend
from deformlit.dilated import MultiDilatedAttention, _dilated
from deformlit.dilateformer import *
from test_golden import FILES, Fixture, folder, only
from truth import need_native

# ---- the systems: each is built from the file's constructor arguments

class BlockFile:
    "A block. Its official names are those of a whole model's block, less where that stands."
    names = {'position.conv.': 'pos_embed.'}
    def __init__(self, config):
        c = self.config = only(config, dim=any, num_heads=any, mlp_ratio=any, qkv_bias=any, cpe_per_block=True, qk_scale=None, drop=0., attn_drop=0., drop_path=0., kernel_size=any, dilation=any)
        self.model = DilateBlock(c['dim'], self.attn(c), c['mlp_ratio'], eps=1e-5)
    def attn(self, c): return MultiDilatedAttention(c['dim'], c['num_heads'], c.get('kernel_size', 3), c.get('dilation', [1, 2, 3]), c['qkv_bias'])
    def ours(self, theirs): return theirs.replace('pos_embed.', 'position.conv.')
    def __call__(self, x): return dict(y=self.model(x))

class GlobalBlockFile(BlockFile):
    def attn(self, c): return GlobalAttention(c['dim'], c['num_heads'], c['qkv_bias'])

class ModelFile:
    stems = dict(overlaping=OverlappingStem, pointconv=PointwiseStem, nonoverlaping=PatchStem)
    downs = dict(conv3_2=ConvDown, conv2_2=PatchDown)
    def __init__(self, config):
        c = only(config, img_size=any, patch_size=4, num_classes=any, embed_dim=any, depths=any, num_heads=any, kernel_size=any, dilation=any, mlp_ratio=any, qkv_bias=any, merging_way=any, patch_way=any,
                 dilate_attention=any, downsamples=[True, True, True, False], cpe_per_satge=any, cpe_per_block=any, drop_path=any)
        self.model = dilateformer([c['embed_dim'] * 2**i for i in range(len(c['depths']))], c['depths'], c['num_heads'], c['dilate_attention'], c['kernel_size'], c['dilation'], c['num_classes'],
            img_size=c['img_size'], mlp_ratio=c['mlp_ratio'], qkv_bias=c['qkv_bias'], drop_path_rate=c['drop_path'], stem=self.stems[c['patch_way']], down=self.downs[c['merging_way']],
            position=DepthwisePosition if c['cpe_per_block'] else NoPosition, down_position=DepthwisePosition if c['cpe_per_satge'] else NoPosition)
        self.by_name = {n: e.ours[0] for e in entries(self.model) for n in e.theirs}
    def ours(self, theirs): return self.by_name[theirs]
    def __call__(self, x):
        seen = {}
        hooks = [self.model.stem.register_forward_hook(lambda m, i, o: seen.update(patch_embed=o))]
        hooks += [m.register_forward_hook(lambda m, i, o, k=k: seen.update({f'stage{k}': o})) for k, m in enumerate([*self.model.downs, self.model.stages[-1]])]
        logits = self.model(x)
        for o in hooks: o.remove()
        return dict(seen, logits=logits)

SYSTEMS = dict(DilateBlock=BlockFile, GlobalBlock=GlobalBlockFile, Dilateformer=ModelFile)
RUN = [(name, case, way) for name, (kind, cases) in FILES.items() if kind in SYSTEMS for case in cases for way in ('eager', 'native')]

@pytest.mark.parametrize('name,case,way', RUN, ids=lambda o: o.removesuffix('.safetensors'))
def test_golden(name, case, way, parity):
    if way == 'native': need_native()
    f = Fixture(folder/name)
    system = SYSTEMS[f.kind](f.config)
    system.model.load_state_dict({system.ours(n): t for n, t in f.state_dict().items()}, strict=True)
    system.model.eval()
    inputs, grads, gradw = f.part(f'input/{case}/'), f.part(f'grad/{case}/'), f.part(f'gradw/{case}/')
    leaves = {n: t.clone().requires_grad_(n in grads) for n, t in inputs.items()}
    _dilated.ran = None
    with backend(way, 'dilated_attn'): outputs, params = system(**leaves), dict(system.model.named_parameters())
    assert _dilated.ran == (way if any(isinstance(m, MultiDilatedAttention) for m in system.model.modules()) else None)
    by = ', native' * (way == 'native')
    for n in f.part(f'output/{case}/'): f.check(f'output/{case}/{n}', outputs[n], parity, ('outputs' if n in ('logits', 'y') else 'maps of the stages') + by)
    for n, t in inputs.items(): assert torch.equal(leaves[n], t), f'input {n} was changed'
    sum((outputs[n] * w).sum() for n, w in gradw.items()).backward()
    for n in grads: f.check(f'grad/{case}/{n}', leaves[n].grad if n in leaves else params[system.ours(n.removeprefix('state_dict/'))].grad, parity, 'gradients' + by)

def test_all_are_run(tell):
    assert {FILES[n][0] for n, _, _ in RUN} == set(SYSTEMS)
    tell(f'golden: {len(RUN)} cases of {len({n for n, _, _ in RUN})} files of DilateFormer')

@pytest.mark.parametrize('name', [n for n, (kind, _) in FILES.items() if kind == 'Dilateformer'])
def test_official_weights_round_trip(name, parity):
    f = Fixture(folder/name)
    state, model = f.state_dict(), ModelFile(f.config).model
    report = load_weights(model, state)
    assert report.layout == 'official' and not report.wrong and len(report.kept) == len(model.state_dict())
    back = to_layout(model, 'official')
    assert back.keys() == state.keys() and all(torch.equal(t, state[n]) for n, t in back.items())
    parity.record('DilateFormer', 'official files', 'weights, in and out', 0, 0, tensors=len(state), numbers=sum(t.numel() for t in state.values()))

# ---- models of full size, with weights by the formula; the numbers were printed by the official code in float64

@pytest.fixture(scope='module')
def tiny():
    model = create_model('dilateformer_tiny').double().eval()
    load_weights(model, formula.weights(to_layout(model)), 'official')
    return model

def test_full_size(tiny, parity):
    got = []
    hook = tiny.stem.register_forward_hook(lambda m, i, o: got.append(o))
    with torch.no_grad(): last, maps = tiny.forward_intermediates(formula.image(1, 3, 224, 224).double())
    hook.remove()
    logits = tiny.forward_head(last)[0].detach()
    want = torch.tensor([-1.00384252, 0.76464814, -0.44302006, -0.34166100, 2.1294273217e-02, 2.4182223890e+01], dtype=torch.float64)
    parity.close('DilateFormer', 'official statements', 'logits of the tiny model for weights by a formula', torch.stack([*logits[:3], logits[-1], logits.mean(), logits.norm()]), want, 1e-7)
    assert logits.argmax() == 924
    norms = 1.2757841364e+02, 9.4248302990e+02, 1.5990893868e+03, 1.1974852170e+04, 1.4284656472e+04
    parity.close('DilateFormer', 'official statements', 'maps of the tiny model for weights by a formula', torch.stack([o.norm() for o in got + maps]), torch.tensor(norms, dtype=torch.float64), 1e-4, 1e-9)
    firsts = (0.16629792, 0.43476773, 0.25170168), (-1.43887872, -0.70380343, 0.13766626), (1.21649209, -0.26150315, -1.13255048), (12.82561319, 11.06462707, -5.52442948), (-16.7462687, -2.66173293, 5.8673461)
    for o, numbers in zip(got + maps, firsts): assert_close(o.flatten()[:3], torch.tensor(numbers, dtype=torch.float64), atol=1e-6, rtol=0)

@pytest.mark.slow
def test_full_size_gradients(tiny, parity):
    tiny.zero_grad()
    loss = tiny(formula.image(1, 3, 224, 224).double()).square().sum() / 2
    loss.backward()
    ours = {n: e.ours[0] for e in entries(tiny) for n in e.theirs}
    params = dict(tiny.named_parameters())
    norm = lambda name: params[ours[name]].grad.norm()
    got = [loss.detach(), torch.stack([p.grad.square().sum() for p in params.values()]).sum().sqrt(), norm('patch_embed.proj.0.weight'), norm('stages.0.blocks.0.attn.qkv.weight'), norm('stages.1.blocks.1.attn.qkv.bias'), norm('head.weight')]
    want = torch.tensor([292.3899761413, 2759.576536982, 3.6197620216e+01, 3.9962506635e+02, 8.6844110497, 4.5525982291e+02], dtype=torch.float64)
    parity.close('DilateFormer', 'official statements', 'gradients of the tiny model for weights by a formula', torch.stack(got), want, 1e-6, 1e-9)

def test_attention_alone(parity):
    m = MultiDilatedAttention(36, 6, dilations=(1, 2, 3)).double()
    m.load_state_dict(formula.weights(m.state_dict()))
    y = m(formula.image(2, 9, 11, 36, name='msda').movedim(-1, 1)).movedim(1, -1).detach()
    want = torch.tensor([-0.47290566, -0.00400157, 0.0509523, -1.56846177, -3.1310691628e-02, 3.8410440261e+01], dtype=torch.float64)
    parity.close('DilateFormer', 'official statements', 'attention alone for weights by a formula', torch.stack([*y.flatten()[:3], y.flatten()[-1], y.mean(), y.norm()]), want, 1e-7)

# ---- sizes

def count(ps): return sum(p.numel() for p in ps)

PARAMS = dict(tiny=(17_238_744, 194, 212, 2_246, 65_168, (221_472, 878_400, 7_506_432, 7_989_120), 1_152, 577_000), small=(24_057_504, 292, 310, 2_246, 65_168, (285_336, 1_634_832, 9_510_336, 11_983_680), 1_152, 577_000),
              base=(47_432_376, 376, 394, 2_918, 78_992, (617_664, 4_238_976, 20_439_552, 21_286_656), 1_536, 769_000))

@pytest.mark.parametrize('name', PARAMS)
def test_parameters(name, parity):
    with torch.device('meta'): m = create_model(f'dilateformer_{name}')
    state = to_layout(m, 'official')
    stages = tuple(count([*m.stages[i].parameters(), *(m.downs[i].parameters() if i < 3 else ())]) for i in range(4))
    got = count(m.parameters()), len(list(m.parameters())), len(state), count(m.buffers()), count(m.stem.parameters()), stages, count(m.norm.parameters()), count(m.head.parameters())
    parity.same('DilateFormer', 'official statements', 'numbers of parameters, by module, and of names', got, PARAMS[name], numbers=11)

@pytest.mark.parametrize('args,params', [(dict(num_classes=0), 16_661_744), (dict(in_chans=1), 17_238_456), (dict(num_classes=10), 16_667_514), (dict(stem='PointwiseStem'), 17_197_784), (dict(stem='PatchStem'), 17_177_104),
                                         (dict(down='PatchDown'), 16_150_104), (dict(position='NoPosition', down_position='DepthwisePosition'), 17_215_704)], ids=str)
def test_parameters_of_variants(args, params, parity):
    with torch.device('meta'): m = create_model('dilateformer_tiny', **args)
    parity.same('DilateFormer', 'official statements', 'numbers of parameters of the variants', count(m.parameters()), params)
    assert 'official' in layouts(m)

def test_names_of_the_official_model():
    with torch.device('meta'): state = to_layout(create_model('dilateformer_tiny'), 'official')
    shapes = {'patch_embed.proj.9.weight': (72, 64, 3, 3), 'stages.0.blocks.0.pos_embed.weight': (72, 1, 3, 3), 'stages.1.blocks.1.attn.qkv.weight': (432, 144, 1, 1), 'stages.2.blocks.5.attn.qkv.weight': (864, 288),
              'stages.0.downsample.proj.0.bias': (144,), 'stages.2.downsample.proj.1.running_var': (576,), 'stages.3.blocks.1.mlp.fc2.weight': (576, 2304), 'norm.weight': (576,), 'head.bias': (1000,)}
    for n, shape in shapes.items(): assert tuple(state[n].shape) == shape
