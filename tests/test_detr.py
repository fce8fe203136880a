"""DETR as a whole: against its formulas for every option, at the edges, compiled, exported, in reduced precision, and its first weights."""
import json, math, os
from functools import partial
from pathlib import Path

import pytest, torch, torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from deformlit.attend import MultiheadAttention
from deformlit.backbones import Bottleneck, ResNet
from deformlit.checkpoints import to_layout
from deformlit.core import ArgumentError, needs_compiler
from deformlit.detr import *
from deformlit.layers import SinePosition
from deformlit.set_loss import SetLoss, SoftmaxLoss

golden = Path(os.environ.get('DEFORMLIT_GOLDEN', Path(__file__).parents[1]/'../shared/golden/A'))

class Trunk(nn.Module):
    "The smallest backbone: maps of stride 8 and 16; DETR reads the last."
    channels, strides = [8, 12], [8, 16]
    def __init__(self):
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(3, 8, 8, 8, padding=4), nn.Conv2d(8, 12, 3, 2, 1)
    def forward(self, images):
        x = self.fine(images)
        return [x, self.coarse(x)]

class Stub(nn.Module):
    "Gives the maps it was handed."
    channels, strides = [12], [16]
    maps = None
    def forward(self, images): return self.maps

def disturbed(model, noise=0.1):
    "As if it were trained: nothing is zero or one by accident."
    with torch.no_grad():
        for w in model.parameters(): w.add_(noise * torch.randn_like(w))
    return model

def small(num_classes=5, backbone=Trunk, num_queries=6, seed=0, **kwargs):
    torch.manual_seed(seed)
    sizes = dict(dim=32, num_heads=4, num_encoder_layers=1, num_decoder_layers=2, dim_ffn=16)
    return disturbed(detr(num_classes, backbone(), num_queries=num_queries, **{**sizes, **kwargs}))

def batch(h, w, valid=(0.7, 0.8)):
    g = torch.Generator().manual_seed(h)
    images, mask = torch.rand(2, 3, h, w, generator=g), torch.zeros(2, h, w, dtype=torch.bool)
    mask[1, int(h * valid[1]):], mask[1, :, int(w * valid[0]):] = True, True
    return images, mask

# ---- the formulas, for every option

def restated(state, maps, mask, position, pre, act, heads):
    "DETR in straight torch out of a state dict with official names: hidden states `l b q c`, memory `b s c`, logits, boxes."
    w = lambda name, x: F.linear(x, state[name + '.weight'], state[name + '.bias'])
    ln = lambda name, x: F.layer_norm(x, x.shape[-1:], state[name + '.weight'], state[name + '.bias'])
    def mha(name, q, k, v, pad=None):
        swap = lambda x: x.transpose(0, 1)
        out = F.multi_head_attention_forward(*map(swap, (q, k, v)), q.shape[-1], heads, state[name + '.in_proj_weight'], state[name + '.in_proj_bias'], None, None, False, 0.,
            state[name + '.out_proj.weight'], state[name + '.out_proj.bias'], training=False, key_padding_mask=pad, need_weights=False)[0]
        return swap(out)
    def around(norm, x, f): return x + f(ln(norm, x)) if pre else ln(norm, x + f(x))
    def ffn(name): return lambda x: w(name + '.linear2', act(w(name + '.linear1', x)))
    x = F.conv2d(maps[-1], state['input_proj.weight'], state['input_proj.bias'])
    (b, c, h, wide), (hh, ww) = x.shape, mask.shape[1:]
    m = mask[:, [i * hh // h for i in range(h)]][:, :, [j * ww // wide for j in range(wide)]]
    pos, pad, x = position(m).flatten(2).transpose(1, 2).to(x.dtype), m.flatten(1), x.flatten(2).transpose(1, 2)
    count = lambda part: len({n.split('.')[3] for n in state if n.startswith(f'transformer.{part}.layers.')})
    for i in range(count('encoder')):
        name = f'transformer.encoder.layers.{i}'
        x = around(name + '.norm1', x, lambda y: mha(name + '.self_attn', y + pos, y + pos, y, pad))
        x = around(name + '.norm2', x, ffn(name))
    if pre: x = ln('transformer.encoder.norm', x)
    memory, u, states = x, state['query_embed.weight'].expand(b, -1, -1), []
    x = torch.zeros_like(u)
    for i in range(count('decoder')):
        name = f'transformer.decoder.layers.{i}'
        x = around(name + '.norm1', x, lambda y: mha(name + '.self_attn', y + u, y + u, y))
        x = around(name + '.norm2', x, lambda y: mha(name + '.multihead_attn', y + u, memory + pos, memory, pad))
        x = around(name + '.norm3', x, ffn(name))
        states.append(ln('transformer.decoder.norm', x))
    hs = torch.stack(states, 1)
    box = F.relu(w('bbox_embed.layers.1', F.relu(w('bbox_embed.layers.0', hs))))
    return memory, hs, w('class_embed', hs), w('bbox_embed.layers.2', box).sigmoid()

def sine(m, dim=32):
    "The position formula, without an offset; `b h w` -> `b c h w`."
    y, x = (~m).float().cumsum(1), (~m).float().cumsum(2)
    y, x = y / (y[:, -1:] + 1e-6) * 2 * math.pi, x / (x[:, :, -1:] + 1e-6) * 2 * math.pi
    t = 10000. ** (2 * (torch.arange(dim // 2) // 2) / (dim // 2))
    sines = [torch.where(torch.arange(dim // 2) % 2 == 0, (o[..., None] / t).sin(), (o[..., None] / t).cos()) for o in (y, x)]
    return torch.cat(sines, -1).permute(0, 3, 1, 2)

def learned(state, m):
    "The other: a vector for each column, then one for each row."
    (h, w), (col, row) = m.shape[1:], (state[f'backbone.1.{o}_embed.weight'] for o in ('col', 'row'))
    return torch.stack([torch.stack([torch.cat([col[j], row[i]]) for j in range(w)]) for i in range(h)]).permute(2, 0, 1).expand(len(m), -1, -1, -1)

OPTIONS = {'post': {}, 'pre': dict(residual=PreNorm), 'learned': dict(position=partial(LearnedPosition, 32)), 'pre, learned, gelu': dict(residual=PreNorm, position=partial(LearnedPosition, 32), act=nn.GELU),
           'gelu': dict(act=nn.GELU), 'no encoder': dict(num_encoder_layers=0), 'no encoder, pre': dict(num_encoder_layers=0, residual=PreNorm), 'deep': dict(num_encoder_layers=3, num_decoder_layers=4),
           'one head': dict(num_heads=1), 'dilated': dict(backbone=lambda: ResNet(Bottleneck, (1, 1, 1, 2), (4, 4, 4, 4), stem=4, out_indices=(3,), dilated=True))}

@pytest.mark.parametrize('option', OPTIONS)
def test_formulas(option):
    given = dict(OPTIONS[option])
    if 'position' in given: given['position'] = given['position']()
    model = small(**given).double().eval()
    images, mask = batch(96, 128)
    state, pre = to_layout(model, 'official'), given.get('residual') is PreNorm
    position = partial(learned, state) if 'position' in given else sine
    with torch.no_grad():
        preds, (memory, p) = model(images.double(), mask), model.encode(images.double(), mask)
        want = restated(state, model.backbone(images.double()), mask, position, pre, F.gelu if 'act' in given else F.relu, given.get('num_heads', 4))
    close = partial(assert_close, rtol=0, atol=1e-6)     # positions are computed in float32
    close(memory, want[0]); close(preds.logits, want[2]); close(preds.boxes, want[3])
    assert ('transformer.encoder.norm.weight' in state) == pre and min(preds.boxes.std(2).min(), preds.logits.std(2).min()) > 1e-4     # not a comparison of constants
    assert model.backbone.strides[-1] == 16

@pytest.mark.parametrize('seed', range(4))
def test_attention_is_the_loops(seed):
    torch.manual_seed(seed)
    attn = MultiheadAttention(8, [1, 2, 4, 8][seed]).double()
    for o in (attn.q_proj, attn.k_proj, attn.v_proj, attn.out_proj): nn.init.normal_(o.bias)
    x, u, memory, p = (torch.randn(n, 8, dtype=torch.float64) for n in (3, 3, 5, 5))
    mask = torch.tensor([False, True, False, False, True])
    want = torch.tensor(positioned_attention_loop(attn, x, u, memory, p, mask), dtype=torch.float64)
    assert_close(attn((x + u)[None], (memory + p)[None], memory[None], mask[None])[0], want)

def test_half_pixel_is_named():
    "DETR counts pixels from 1; the Deformable family takes half a pixel off. Both are the same part with another offset."
    mask = torch.zeros(1, 4, 6, dtype=torch.bool)
    assert MapNeck([12], 32).position.offset == 0. and not torch.equal(SinePosition(32)(mask), SinePosition(32, offset=-0.5)(mask))
    model = small(position=SinePosition(32, offset=-0.5)).eval()
    assert not torch.equal(model(*batch(64, 96)).logits, small().eval()(*batch(64, 96)).logits)

# ---- set predictions

@pytest.mark.parametrize('seed', range(3))
def test_detect_softmax_is_the_loops(seed):
    g = torch.Generator().manual_seed(seed)
    logits, boxes = torch.randn(2, 3, 7, 5, generator=g, dtype=torch.float64), torch.rand(2, 3, 7, 4, generator=g, dtype=torch.float64)
    for top in (1, 4, 7, 100):
        found = detect_softmax((logits, boxes), top)
        for i in range(2):
            want = detect_softmax_loop(logits[i, -1])[:top]
            assert_close(found.scores[i], torch.tensor([o[0] for o in want], dtype=torch.float64))
            assert found.labels[i].tolist() == [o[1] for o in want] and found.queries[i].tolist() == [o[2] for o in want]
            assert torch.equal(found.boxes[i], boxes[i, -1][found.queries[i]])
    with pytest.raises(ArgumentError, match='top'): detect_softmax((logits, boxes), 0)

def test_no_object_is_no_label():
    logits = torch.zeros(1, 1, 3, 5); logits[..., -1] = 9.
    assert detect_softmax((logits, torch.rand(1, 1, 3, 4))).labels.max() < 4
    assert DETR.detect is detect_softmax and Detector.detect is detect

# ---- the edges

@pytest.mark.parametrize('residual', [PostNorm, PreNorm])
def test_at_the_edges(residual):
    "One class, one query, one image; maps of one pixel; sizes that no stride divides."
    model = small(1, num_queries=1, residual=residual).eval()
    for h, w in ((16, 16), (33, 71), (100, 35)):
        images = torch.rand(1, 3, h, w)
        before = images.clone()
        with torch.no_grad(): preds, again = model(images), model(images)
        assert preds.logits.shape == (1, 2, 1, 2) and preds.boxes.shape == (1, 2, 1, 4) and preds.boxes.dtype == torch.float32
        assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(preds, again)) and torch.equal(images, before)
        assert detect_softmax(preds).scores.shape == (1, 1)

def test_images_of_different_sizes():
    "A padded image gets the answer it would get alone: masks, positions and keys leave the padding out."
    model = small(backbone=Stub, num_encoder_layers=2).eval()
    tight, padded = torch.randn(1, 12, 4, 3), 9 * torch.randn(2, 12, 6, 5)
    padded[0, :, :4, :3] = tight[0]
    mask = torch.zeros(2, 96, 80, dtype=torch.bool)
    mask[0, 64:], mask[0, :, 48:] = True, True
    before = mask.clone()
    with torch.no_grad():
        model.backbone.maps = [tight]
        alone = model(torch.zeros(1, 3, 64, 48))
        model.backbone.maps = [padded]
        both = model(torch.zeros(2, 3, 96, 80), mask)
    for a, b in zip(alone, both): assert_close(a[0], b[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(mask, before)

def test_order_of_the_batch_does_not_matter():
    model, (images, mask) = small().eval(), batch(64, 96)
    with torch.no_grad():
        for a, b in zip(model(images, mask), model(images.flip(0), mask.flip(0))): assert_close(a, b.flip(0), rtol=1e-5, atol=1e-5)

def test_no_mask_is_no_padding():
    model, (images, mask) = small().eval(), batch(64, 96)
    with torch.no_grad():
        for a, b in zip(model(images), model(images, torch.zeros_like(mask))): assert torch.equal(a, b)

def test_dropout_only_in_training():
    model, given = small().train(), batch(64, 96)
    assert not torch.equal(model(*given).logits, model(*given).logits)
    model.eval()
    assert torch.equal(model(*given).logits, model(*given).logits)

def test_double_precision():
    model, (images, mask) = small().eval(), batch(64, 96)
    with torch.no_grad(): single, double = model(images, mask), model.double()(images.double(), mask)
    assert double.boxes.dtype == double.logits.dtype == torch.float64
    assert_close(double.boxes, single.boxes.double(), atol=1e-5, rtol=1e-5)

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('residual', [PostNorm, PreNorm])
def test_autocast(dtype, residual):
    "Near the numbers of float32, boxes in float32, finite gradients; the box head itself is computed in float32."
    model, (images, mask), seen = small(residual=residual, drop=0.), batch(64, 96), []
    model.heads.box.register_forward_hook(lambda m, args, out: seen.append((args[0].dtype, out.dtype)))
    full = model(images, mask)
    with torch.autocast('cpu', dtype): preds = model(images, mask)
    assert preds.boxes.dtype == torch.float32 and set(seen) == {(torch.float32, torch.float32)}
    assert_close(preds.boxes, full.boxes, atol=0.03, rtol=0)
    assert_close(preds.logits.float(), full.logits, atol=0.15, rtol=0)
    boxes, labels = torch.tensor([[[.5, .5, .2, .2]], [[.3, .4, .2, .1]]]), torch.tensor([[1], [-1]])
    loss = SetLoss(classify=SoftmaxLoss())(preds, boxes, labels)
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())

def test_every_parameter_learns():
    "All but the unused scale of the first values: content starts at zero, and the first self-attention reads nothing but biases."
    model = small(drop=0., residual=PreNorm)
    loss = SetLoss(classify=SoftmaxLoss())(model(*batch(64, 96)), torch.tensor([[[.5, .5, .2, .2]], [[.3, .4, .2, .1]]]), torch.tensor([[1], [0]]))
    loss.backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]

def test_first_self_attention_says_the_same_to_all():
    model, said = small().eval(), []
    for layer in model.decoder.layers: layer.self_attn.register_forward_hook(lambda m, args, out: said.append(out))
    with torch.no_grad(): model(*batch(64, 96))
    assert_close(said[0], said[0][:, :1].expand_as(said[0]))
    assert (said[1] - said[1][:, :1]).abs().max() > 1e-3

# ---- compiled and exported

def test_one_graph():
    "Forward and backward in one graph each, as training needs it; the numbers do not change."
    model = small(drop=0.)
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    given, found = batch(64, 96), []
    for m in (model, compiled):
        model.zero_grad()
        preds = m(*given)
        (preds.logits.square().sum() + preds.boxes.square().sum()).backward()
        found.append((preds, [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    for a, b in zip(found[0][0], found[1][0]): assert_close(a, b)
    for a, b in zip(found[0][1], found[1][1]): assert_close(a, b, atol=1e-4, rtol=1e-4)

def in_all_sizes(model, how):
    "One compilation for all sizes: a second one is an error."
    torch._dynamo.reset()                                # models of other tests share the code of `forward`
    compiled = torch.compile(model, backend=how, fullgraph=True, dynamic=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for h, w in ((64, 96), (96, 128), (160, 96), (100, 70)):
            for a, b in zip(model(*batch(h, w)), compiled(*batch(h, w))): assert_close(a, b, atol=1e-5, rtol=1e-5)

@pytest.mark.parametrize('position', [SinePosition, LearnedPosition])
def test_one_graph_for_all_sizes(position): in_all_sizes(small(residual=PreNorm, position=position(32)).eval(), 'aot_eager')

@pytest.mark.slow
@pytest.mark.skipif(needs_compiler() is not None, reason=str(needs_compiler()))
def test_inductor(): in_all_sizes(small().eval(), 'inductor')

def test_export():
    "One program for all sizes."
    model = small().eval()
    sizes = {2: torch.export.Dim('h', min=32, max=512), 3: torch.export.Dim('w', min=32, max=512)}
    mask = {1: sizes[2], 2: sizes[3]}
    program = torch.export.export(model, batch(64, 96), dynamic_shapes=(sizes, mask)).module()
    with torch.no_grad():
        for size in ((64, 96), (96, 128), (160, 100)):
            for a, b in zip(model(*batch(*size)), program(*batch(*size))): assert_close(a, b, atol=1e-5, rtol=1e-5)

# ---- pictures

def test_record_attention():
    model, given = small(num_encoder_layers=2).eval(), batch(64, 96)
    with record_attention(model) as seen, torch.no_grad(): model(*given)
    assert [o.name for o in seen] == [f'encoder.layers.{i}.attn' for i in range(2)] + [f'decoder.layers.{i}.{o}_attn' for i in range(2) for o in ('self', 'cross')]
    s = model.neck(model.backbone(given[0]), given[1]).tokens.shape[1]
    assert seen[0].weights.shape == (2, 4, s, s) and seen[2].weights.shape == (2, 4, 6, 6) and seen[3].weights.shape == (2, 4, 6, s)
    for o in seen: assert_close(o.weights.sum(-1), torch.ones(o.weights.shape[:-1]))
    assert not seen[3].weights[1, ..., model.neck(model.backbone(given[0]), given[1]).mask[1]].any()      # nobody reads padding
    assert not any(m._forward_hooks for m in model.modules())
    with pytest.raises(ArgumentError, match='weights'):
        with record_attention(nn.Linear(1, 1)): pass

def test_show_attention():
    import matplotlib
    matplotlib.use('agg')
    import matplotlib.pyplot as plt
    model, (images, mask) = small().train(), batch(64, 96)
    assert len(show_attention(model, images, mask, query=3, batch=1)) == 2 and model.training
    assert len(show_attention(model, images, mask, query=3, layer=-1)) == 4
    show_attention(small(num_decoder_layers=1).eval(), images[:1])
    for wrong in (dict(query=6), dict(batch=2), dict(layer=2)):
        with pytest.raises(ArgumentError): show_attention(model, images, mask, **wrong)
    plt.close('all')

# ---- first weights, as in the official code

def uniform(w, bound): assert w.abs().max() <= bound and w.abs().max() > 0.9 * bound and abs(w.std() / (bound / 3**0.5) - 1) < 0.1

@pytest.mark.parametrize('residual', [PostNorm, PreNorm])
def test_first_weights(residual):
    torch.manual_seed(0)
    model = detr(91, ResNet(), num_encoder_layers=1, num_decoder_layers=2, residual=residual)
    xavier = lambda rows, cols: math.sqrt(6 / (rows + cols))
    layers = [model.encoder.layers[0], *model.decoder.layers]
    attentions = [o for layer in layers for o in layer.modules() if isinstance(o, MultiheadAttention)]
    assert len(attentions) == 5
    for attn in attentions:
        for w in (attn.q_proj, attn.k_proj, attn.v_proj): uniform(w.weight, xavier(768, 256)); assert not w.bias.any()     # official: one matrix of 768 rows
        uniform(attn.out_proj.weight, xavier(256, 256)); assert not attn.out_proj.bias.any()
    for layer in layers:
        uniform(layer.ffn.linear1.weight, xavier(2048, 256)); uniform(layer.ffn.linear2.weight, xavier(2048, 256))
        uniform(layer.ffn.linear1.bias, 1 / 16); uniform(layer.ffn.linear2.bias, 2048**-0.5)
    assert abs(model.queries.position.weight.std() - 1) < 0.05
    uniform(model.neck.conv.weight, 2048**-0.5); uniform(model.neck.conv.bias, 2048**-0.5)                                # these are left as PyTorch makes them
    uniform(model.heads.classes.weight, 1 / 16); uniform(model.heads.classes.bias, 1 / 16)
    for i in (0, 2, 4): uniform(model.heads.box[i].weight, 1 / 16)
    for m in model.modules():
        if isinstance(m, nn.LayerNorm): assert m.weight.eq(1).all() and not m.bias.any()
    learned = LearnedPosition(256)
    assert learned.row.weight.min() >= 0 and learned.col.weight.max() <= 1 and abs(learned.row.weight.mean() - 0.5) < 0.01

@pytest.mark.skipif(not golden.is_dir(), reason=f'no folder {golden}: set DEFORMLIT_GOLDEN')
@pytest.mark.parametrize('name, dilated', [('DETR-R50', False), ('DETR-DC5-R50', True)])
def test_full_size(name, dilated):
    want = json.loads((golden.parent/'param_counts.json').read_text())[name]
    model = detr(91, ResNet(out_indices=(3,), dilated=dilated))
    count = lambda part, kind='parameters': sum(o.numel() for o in getattr(part, kind)())
    assert count(model) == want['params'] and count(model, 'buffers') == want['buffers']
    assert len(to_layout(model)) == want['state_dict_keys']
    parts = want['per_child']
    assert count(model.encoder) + count(model.decoder) == parts['transformer'] and count(model.queries) == parts['query_embed'] and count(model.backbone) == parts['backbone']
    assert count(model.heads.classes) == parts['class_embed'] and count(model.heads.box) == parts['bbox_embed'] and count(model.neck) == parts['input_proj']
    frozen = count(model.backbone.conv1) + count(model.backbone.layer1)
    assert count(model) - frozen == want['trainable']

# ---- bad input

def test_bad_arguments():
    trunk = Trunk()
    for wrong in (dict(num_classes=0), dict(num_queries=0), dict(num_decoder_layers=0), dict(num_heads=5), dict(dim=34)):
        with pytest.raises(ArgumentError): detr(**{**dict(num_classes=5, backbone=trunk, dim=32, num_heads=4), **wrong})
    model = small().eval()
    with pytest.raises(ArgumentError, match='maps'): model.neck([torch.zeros(1, 12, 4, 4)], torch.zeros(1, 64, 64, dtype=torch.bool))
    with pytest.raises(ArgumentError, match='at most 50'): LearnedPosition(32)(torch.zeros(1, 51, 4, dtype=torch.bool))
    with pytest.raises(ArgumentError, match='even'): LearnedPosition(33)
    with pytest.raises(ArgumentError, match='images'): model(torch.zeros(3, 64, 64))

def test_bad_images_are_named_before_anything_runs():
    model = small().eval()
    for bad, said in ((torch.rand(3, 64, 64), r'\(b, c, h, w\)'), (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), 'floating point')):
        with pytest.raises(ArgumentError, match=said): model(bad)
    with pytest.raises(ArgumentError, match='mask'): model(torch.rand(1, 3, 64, 64), torch.zeros(1, 3, 3, dtype=torch.bool))
