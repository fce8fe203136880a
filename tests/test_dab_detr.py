"""DAB-DETR and DAB-Deformable-DETR: every option against the formulas written out, at the edges, compiled, and their first weights."""
import json, math, os
from pathlib import Path

import pytest, torch, torch.nn.functional as F
from torch import nn

from deformlit.anchors import *
from deformlit.backbones import ResNet
from deformlit.boxes import inverse_sigmoid
from deformlit.checkpoints import load_weights, to_layout
from deformlit.core import needs_compiler
from deformlit.dab_detr import *
from deformlit.deformable_detr import *
from deformlit.detr import *
from deformlit.layers import SinePosition
from deformlit.multiscale import star
from deformlit.set_loss import SetLoss

class Trunk(nn.Module):
    "The smallest backbone: maps of stride 8 and 16."
    channels, strides = [8, 12], [8, 16]
    def __init__(self):
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(3, 8, 8, 8, padding=4), nn.Conv2d(8, 12, 3, 2, 1)
    def forward(self, images):
        x = self.fine(images)
        return [x, self.coarse(x)]

SIZES = dict(dim=32, num_heads=4, num_encoder_layers=1, num_decoder_layers=3, dim_ffn=16)
def dense(num_classes=5, num_queries=6, **kwargs): return dab_detr(num_classes, Trunk(), num_queries=num_queries, **SIZES | kwargs)
def deformable(num_classes=5, num_queries=6, **kwargs): return dab_deformable_detr(num_classes, Trunk(), num_queries=num_queries, num_levels=3, groups=8, **SIZES | kwargs)
def proposing(num_classes=5, num_queries=6, **kwargs): return two_stage_dab_deformable_detr(num_classes, Trunk(), num_queries=num_queries, num_levels=3, groups=8, **SIZES | kwargs)
ALL = [dense, deformable, proposing]

def noisy(model, scale=.15):
    "Noise on every parameter, so that no zero or one of the first weights hides a mistake."
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters(): p += scale * torch.randn(p.shape, generator=g).to(p)
    return model

def batch(h, w, valid=(0.7, 0.8)):
    g = torch.Generator().manual_seed(h)
    images, mask = torch.rand(2, 3, h, w, generator=g), torch.zeros(2, h, w, dtype=torch.bool)
    mask[1, int(h * valid[1]):], mask[1, :, int(w * valid[0]):] = True, True
    return images.masked_fill(mask[:, None], 0), mask

# ---- every option of DAB-DETR, against the formulas with official names

class Written:
    "DAB-DETR from a state dict with official names, as the formulas read."
    def __init__(self, state, heads, options): self.s, self.heads, self.o = state, heads, options
    def linear(self, name, x): return F.linear(x, self.s[name + '.weight'], self.s[name + '.bias'])
    def norm(self, name, x): return F.layer_norm(x, x.shape[-1:], self.s[name + '.weight'], self.s[name + '.bias'])
    def mlp(self, name, x, layers):
        for i in range(layers): x = self.linear(f'{name}.layers.{i}', x if i == 0 else x.relu())
        return x
    def sine(self, r, dim):
        t = 10000 ** (2 * (torch.arange(dim // 2) // 2) / (dim // 2))
        def one(v):
            a = v[..., None] * 2 * math.pi / t
            return torch.where(torch.arange(dim // 2) % 2 == 0, a.sin(), a.cos())
        return torch.cat([one(r[..., j]) for j in [1, 0, 2, 3][:r.shape[-1]]], -1)
    def attend(self, name, q, k, v, mask=None):
        "q, k: lists of parts that lie one behind the other in each head."
        cut = lambda x: x.reshape(*x.shape[:2], self.heads, -1).transpose(1, 2)
        q, k = (torch.cat([cut(o) for o in x], -1) for x in (q, k))
        a = q @ k.mT / q.shape[-1] ** .5
        if mask is not None: a = a.masked_fill(mask[:, None, None], -math.inf)
        return self.linear(name + '.out_proj', (a.softmax(-1) @ cut(v)).transpose(1, 2).flatten(2))
    def ffn(self, name, x, norm):
        y = self.linear(name + '.linear1', x)
        y = torch.where(y > 0, y, self.s[name + '.activation.weight'] * y)
        return self.norm(f'{name}.{norm}', x + self.linear(name + '.linear2', y))
    def encode(self, x, pos, mask, layers):
        for i in range(layers):
            n, u = f'transformer.encoder.layers.{i}', x + pos * self.mlp('transformer.encoder.query_scale', x, 2)
            w, b = self.s[n + '.self_attn.in_proj_weight'].chunk(3), self.s[n + '.self_attn.in_proj_bias'].chunk(3)
            q, k, v = (F.linear(o, *wb) for o, *wb in zip((u, u, x), w, b))
            x = self.ffn(n, self.norm(n + '.norm1', x + self.attend(n + '.self_attn', [q], [k], v, mask)), 'norm2')
        return self.norm('transformer.encoder.norm', x) if 'transformer.encoder.norm.weight' in self.s else x
    def box(self, l, x): return self.mlp(f'bbox_embed.{l}' if self.o.get('each') else 'bbox_embed', x, 3)
    def decode(self, memory, pos, mask, layers):
        o, d, T = self.o, memory.shape[-1], 'transformer.decoder'
        r = self.s['refpoint_embed.weight']
        patterns = self.s.get('transformer.patterns.weight')
        x = torch.zeros(len(r), d) if patterns is None else torch.cat([v.expand(len(r), d) for v in patterns])
        r = (r if patterns is None else torch.cat([r] * len(patterns))).sigmoid()
        x, r = x.expand(len(memory), -1, -1), r.expand(len(memory), -1, -1)
        given, logits, boxes, coords = r, [], [], r.shape[-1]
        add = lambda delta, at: torch.cat([delta[..., :coords] + inverse_sigmoid(at, 1e-3), delta[..., coords:]], -1).sigmoid()
        for l in range(layers):
            n, sine = f'{T}.layers.{l}', self.sine(r, d)
            position, kind = self.mlp(T + '.ref_point_head', sine, 2), o.get('scale', 'cond_elewise')
            scale = self.s[T + '.query_scale.weight'][l] if kind == 'fix_elewise' else self.mlp(T + '.query_scale', x, 2) if l else 1
            y_half, x_half = (sine[..., :d] * scale).chunk(2, -1)
            if o.get('modulate', True):
                asked = self.mlp(T + '.ref_anchor_head', x, 2).sigmoid()
                y_half, x_half = y_half * (asked[..., 1] / r[..., 3])[..., None], x_half * (asked[..., 0] / r[..., 2])[..., None]
            q, k = (self.linear(f'{n}.sa_{c}content_proj', x) + self.linear(f'{n}.sa_{c}pos_proj', position) for c in 'qk')
            x = self.norm(n + '.norm1', x + self.attend(n + '.self_attn', [q], [k], self.linear(n + '.sa_v_proj', x)))
            q, k, k_pos = self.linear(n + '.ca_qcontent_proj', x), self.linear(n + '.ca_kcontent_proj', memory), self.linear(n + '.ca_kpos_proj', pos)
            if l == 0 or o.get('keep'): q, k = q + self.linear(n + '.ca_qpos_proj', position), k + k_pos
            place = self.linear(n + '.ca_qpos_sine_proj', torch.cat([y_half, x_half], -1))
            x = self.norm(n + '.norm2', x + self.attend(n + '.cross_attn', [q, place], [k, k_pos], self.linear(n + '.ca_v_proj', memory), mask))
            x = self.ffn(n, x, 'norm3')
            hs = self.norm(T + '.norm', x)
            logits.append(self.linear('class_embed', hs)); boxes.append(add(self.box(l, hs), given))
            if o.get('update', True):
                given = add(self.box(l, x), r)[..., :coords]
                r = given.detach()
        return torch.stack(logits, 1), torch.stack(boxes, 1)

SCALES = dict(cond_elewise=lambda: ContentScale(32), cond_scalar=lambda: ContentScale(32, 1), fix_elewise=lambda: LayerScale(3, 32))
OPTIONS = [dict(), dict(scale='cond_scalar'), dict(scale='fix_elewise'), dict(keep=True), dict(modulate=False), dict(each=True), dict(update=False), dict(patterns=3), dict(coords=2, modulate=False),
           dict(norm=True), dict(temperatures=(10., 30.)), dict(scale='fix_elewise', keep=True, each=True, patterns=2, norm=True), dict(coords=2, modulate=False, update=False, keep=True),
           dict(coords=2, modulate=False, each=True, scale='cond_scalar')]

def optional(o):
    "Our model with these options."
    layer, coords = dict(dim=32, num_heads=4, dim_ffn=16), o.get('coords', 4)
    position = SinePositionYX(32, *o['temperatures']) if 'temperatures' in o else SinePosition(32, 20.)
    asked = AnchorPosition(32, coords, SCALES[o.get('scale', 'cond_elewise')](), SizeModulation(32) if o.get('modulate', True) else NoModulation())
    return DABDETR(Trunk(), MapNeck([8, 12], 32, position), ScaledEncoder(2, norm=nn.LayerNorm if o.get('norm') else nn.Identity, **layer),
        AnchorQueries(Anchors(5, coords), PatternContent(o['patterns'], 32) if 'patterns' in o else EmptyContent(32)),
        AnchorDecoder(3, asked, PositionedCrossAttention if o.get('keep') else AnchorCrossAttention, **layer),
        (MovingHeads if o.get('update', True) else StayingHeads)(32, 7, 3, LayerSteps if o.get('each') else SharedStep))

@pytest.mark.parametrize('o', OPTIONS, ids=lambda o: '-'.join(f'{k}={v}' for k, v in o.items()) or 'default')
def test_options(o):
    "Outputs and all gradients, in float64, with a padded batch."
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    try:
        model = noisy(optional(o)).double()
        images, mask = batch(72, 88)
        images = images.double()
        def pay(logits, boxes):
            g = torch.Generator().manual_seed(1)
            return (logits * torch.randn(logits.shape, generator=g)).sum() + (boxes * torch.randn(boxes.shape, generator=g)).sum()
        ours = model(images, mask)
        pay(*ours).backward()
        mine = {n: p.grad for n, p in model.named_parameters()}
        model.zero_grad()
        live = {n: p for n, p in model.named_parameters()}
        buffers = to_layout(model, 'official')
        with torch.enable_grad():                                   # official names, still attached to our parameters
            state = {}
            from deformlit.checkpoints import entries
            for e in entries(model, 'official'):
                parts = [live.get(n, model.state_dict()[n]) for n in e.ours]
                state.update(dict.fromkeys(e.theirs, parts[0] if len(parts) == 1 else torch.cat(parts, e.dim)))
        assert state.keys() == buffers.keys()
        m = shrink_mask(mask, model.backbone(images)[-1].shape[-2:])
        t = dict(zip('yx', o.get('temperatures', (20., 20.))))
        pos = torch.cat([SinePosition(32, t['y'])(m)[:, :16], SinePosition(32, t['x'])(m)[:, 16:]], 1).double()
        x = F.conv2d(model.backbone(images)[-1], state['input_proj.weight'], state['input_proj.bias'])
        x, pos, m = x.flatten(2).mT, pos.flatten(2).mT, m.flatten(1)
        written = Written(state, 4, o)
        theirs = written.decode(written.encode(x, pos, m, 2), pos, m, 3)
        for a, b in zip(ours, theirs): torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-7)
        pay(*theirs).backward()
        for n, p in model.named_parameters():
            if p.grad is None: assert mine[n] is None or not mine[n].any(), n
            else: torch.testing.assert_close(mine[n], p.grad, atol=1e-8, rtol=1e-6, msg=lambda s: f'{n}: {s}')
    finally: torch.set_default_dtype(torch.float32)

def test_the_updates_official_names_exist_only_where_anchors_move():
    assert 'transformer.decoder.bbox_embed.layers.0.weight' in to_layout(optional({}), 'official')
    assert 'transformer.decoder.bbox_embed.layers.0.weight' not in to_layout(optional(dict(update=False)), 'official')
    assert 'transformer.decoder.layers.1.ca_qpos_proj.weight' not in to_layout(optional({}), 'official')
    assert 'transformer.decoder.layers.1.ca_qpos_proj.weight' in to_layout(optional(dict(keep=True)), 'official')

# ---- what is cut and what is not

def test_gradients_reach_one_layer_back():
    "The box of layer l+1 moves the heads of layer l, not those before; the anchors' place does not."
    model = noisy(optional(dict(each=True))).double()
    images, mask = batch(64, 64)
    for layer in range(3):
        model.zero_grad()
        preds = model(images.double(), mask)
        preds.boxes[:, layer].sum().backward()
        reached = [m[-1].weight.grad is not None and bool(m[-1].weight.grad.any()) for m in model.heads.steps.mlps]
        assert reached == [i in (layer - 1, layer) for i in range(3)]
        assert model.queries.anchors.logits.weight.grad.any()       # through the contents, always

def test_staying_anchors_learn_in_every_layer():
    model = noisy(optional(dict(update=False)))
    model(*batch(64, 64)).boxes[:, -1].sum().backward()
    assert model.queries.anchors.logits.weight.grad.abs().sum() > 0

def test_deformable_references_are_cut():
    model = noisy(deformable())
    model(*batch(64, 64)).boxes[:, 1].sum().backward()
    reached = [h.box[-1].weight.grad is not None and bool(h.box[-1].weight.grad.any()) for h in model.heads.heads]
    assert reached == [False, True, False]

def test_the_trick_that_freezes_nothing_and_the_part_that_does():
    official = nn.Embedding(4, 4)
    official.weight.data[:, :2].requires_grad = False           # of a temporary
    official.weight.sum().backward()
    assert official.weight.grad[:, :2].eq(1).all()
    for make in (dense, deformable):
        model = noisy(make(anchors=FixedAnchors(6)))
        before = model.queries.anchors().detach()
        optim = torch.optim.AdamW(model.parameters(), lr=.1, weight_decay=.1)
        model(*batch(64, 64)).boxes.sum().backward()
        optim.step()
        after = model.queries.anchors().detach()
        assert torch.equal(after[:, :2], before[:, :2]) and not torch.isclose(after[:, 2:], before[:, 2:]).any()
        weight = to_layout(model, 'official')['refpoint_embed.weight']
        torch.testing.assert_close(weight.sigmoid(), after)
        load_weights(model, to_layout(model, 'official'))
    xy = torch.cat([FixedAnchors(500)()[:, :2], spread(Anchors(500))()[:, :2]])
    assert xy.min() < .02 and xy.max() > .98 and abs(xy.mean() - .5) < .03 and abs(xy.std() - 12**-.5) < .02

def test_patterns_of_all_anchors_one_after_the_other():
    anchors = Anchors(3)
    for content in (PatternContent(2, 8), LearnedPatternContent(3, 2, 8)):
        start = AnchorQueries(anchors, content)(torch.zeros(5, 1, 8), None)
        assert start.content.shape == (5, 6, 8) and start.reference.shape == (5, 6, 4) and start.position is None
        for p in range(2):
            for q in range(3):
                torch.testing.assert_close(start.reference[0, p * 3 + q], anchors()[q])
                own = content.content.weight[q] if hasattr(content, 'content') else 0
                torch.testing.assert_close(start.content[0, p * 3 + q], content.patterns.weight[p] + own)

# ---- DAB-Deformable: its position, and its two stages

def test_position_of_the_finest_level_or_of_the_image():
    ratios = torch.tensor([[[.5, .8], [.6, 1.]]])
    r = torch.tensor([[[.4, .5, .2, .1]]])
    torch.testing.assert_close(finest_level(r, ratios), torch.tensor([[[.2, .4, .1, .08]]]))
    assert in_image(r, ratios) is r
    for where, same in ((finest_level, False), (in_image, True)):
        model = noisy(deformable()).eval()
        model.decoder.position.where = where
        ours = [model.decoder.position(0, None, r, o) for o in (ratios, torch.ones_like(ratios))]
        assert torch.allclose(*ours) == same

def test_two_stages_train_every_part():
    model, (images, mask) = noisy(proposing()), batch(64, 96)
    preds = model(images, mask)
    assert isinstance(preds, TwoStagePredictions) and preds.proposals.boxes.shape[:2] == (2, 1)
    logits, boxes, proposals = preds
    targets = torch.tensor([[[.5, .5, .2, .2]], [[.3, .3, .1, .1]]]), torch.tensor([[1], [4]])
    SetLoss(class_weight=1.)(preds, *targets).backward()
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still, still

def test_two_stages_start_from_the_best_proposals():
    model, (images, mask) = noisy(proposing()).eval(), batch(64, 96)
    with torch.no_grad():
        memory, p = model.encode(images, mask)
        start, proposals = model.queries(memory, p, model.heads)
        preds, again = model(images, mask), model(images, mask)
    dead = grid_proposals(p)[1]
    best = proposals.logits[:, 0, :, 0].masked_fill(dead, -math.inf).topk(6, 1).indices
    torch.testing.assert_close(start.reference, proposals.boxes[:, 0].take_along_dim(best[..., None], 1))
    assert torch.equal(preds.boxes, again.boxes) and preds.boxes.isfinite().all()
    state = to_layout(model, 'official')
    assert 'transformer.pos_trans.weight' in state and 'transformer.decoder.ref_point_head.layers.0.weight' in state and 'refpoint_embed.weight' not in state
    assert not load_weights(proposing(), state).wrong

# ---- edges

@pytest.mark.parametrize('make', ALL)
def test_at_the_edges(make):
    "One class, one query, one image; maps of one pixel; sizes that no stride divides."
    model = noisy(make(num_classes=1, num_queries=1)).eval()
    for h, w in ((16, 16), (33, 71), (100, 35)):
        images = torch.rand(1, 3, h, w)
        before = images.clone()
        with torch.no_grad(): preds, again = model(images), model(images)
        logits, boxes = preds[:2]
        assert logits.shape == (1, 3, 1, 1) and boxes.shape == (1, 3, 1, 4) and boxes.dtype == torch.float32
        assert torch.equal(boxes, again.boxes) and boxes.isfinite().all() and logits.isfinite().all() and torch.equal(images, before)
        assert detect(preds).scores.shape == (1, 1)

def test_map_of_one_pixel():
    class Point(nn.Module):
        channels = [4]
        def forward(self, images): return [images.mean((2, 3), keepdim=True).expand(-1, 4, 1, 1)[:, :4]]
    model = noisy(dab_detr(2, Point(), num_queries=3, **SIZES)).eval()
    preds = model(torch.rand(2, 1, 9, 7))
    assert preds.boxes.shape == (2, 3, 3, 4) and preds.boxes.isfinite().all()

@pytest.mark.parametrize('make', ALL)
def test_padding_says_nothing(make):
    "What stands on the padding changes nothing, and no input is changed."
    model, (images, mask) = noisy(make()).eval(), batch(64, 96)
    other = images.clone()
    other[1, :, :, 80:], other[1, :, 60:] = 7., -3.             # farther out than the backbone looks from the image
    before = other.clone(), mask.clone()
    with torch.no_grad():
        # a backbone sees the padding's pixels near the border, so what it gives on padding is changed here instead
        model.backbone.register_forward_hook(lambda m, args, out: [torch.where(shrink_mask(mask, x.shape[-2:])[:, None], float(args[0][1, 0, 63, 95]), x) for x in out])
        a, b = model(images, mask), model(other, mask)
    if make is dense:
        for x, y in zip(a, b): torch.testing.assert_close(x, y)
    else: assert a.boxes.isfinite().all()                       # GroupNorm of the neck counts padding, as in official code
    assert torch.equal(other, before[0]) and torch.equal(mask, before[1])

def test_padded_is_unpadded():
    "DAB-DETR alone or in a padded batch: the same answers, where the backbone gives the same features."
    class Pixels(nn.Module):
        channels = [3]
        def forward(self, images): return [images]
    model = noisy(dab_detr(4, Pixels(), num_queries=5, **SIZES)).double().eval()
    alone = torch.rand(1, 3, 6, 9, dtype=torch.float64)
    images, mask = torch.rand(2, 3, 8, 11, dtype=torch.float64), torch.zeros(2, 8, 11, dtype=torch.bool)
    images[1, :, :6, :9], mask[1, 6:], mask[1, :, 9:] = alone[0], True, True
    with torch.no_grad(): together, single = model(images, mask), model(alone)
    for a, b in zip(together, single): torch.testing.assert_close(a[1:], b)

@pytest.mark.parametrize('make', ALL)
def test_no_mask_is_no_padding(make):
    model, (images, mask) = noisy(make()).eval(), batch(64, 96)
    with torch.no_grad():
        for a, b in zip(model(images)[:2], model(images, torch.zeros_like(mask))[:2]): assert torch.equal(a, b)

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('make', ALL)
def test_autocast_keeps_places_precise(make, dtype):
    model, given, seen = noisy(make(), .05), batch(64, 96), []
    model.heads.register_forward_hook(lambda m, args, out: seen.extend([args[2], out[1], out[2]]))
    precise = model(*given)
    first = seen[0].clone()
    with torch.autocast('cpu', dtype=dtype):
        preds = model(*given)
        assert preds.logits.dtype == dtype and preds.boxes.dtype == torch.float32 and all(o.dtype == torch.float32 for o in seen)
        places = [m for m in model.modules() if isinstance(m, SizeModulation)]
        for m in places:
            out = m(torch.ones(1, 2, 32), torch.randn(1, 2, 32), torch.full((1, 2, 4), 1e-3))
            assert out.dtype == torch.float32 and out.isfinite().all()
    if make is not proposing: torch.testing.assert_close(preds.boxes, precise.boxes, atol=.05, rtol=0)
    (preds.boxes.sum() + preds.logits.float().sum()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())

@pytest.mark.parametrize('make', ALL)
def test_dropout_only_in_training(make):
    model, given = noisy(make(drop=.3)).train(), batch(64, 96)
    assert not torch.equal(model(*given).logits, model(*given).logits)
    model.eval()
    assert torch.equal(model(*given).logits, model(*given).logits)

# ---- compiled and exported

@pytest.mark.parametrize('make', [dense, deformable, pytest.param(proposing, marks=pytest.mark.slow)])
def test_one_graph_for_all_sizes(make):
    model = noisy(make(num_decoder_layers=2)).eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True, dynamic=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for h, w in ((64, 96), (96, 128), (80, 112)):
            for a, b in zip(compiled(*batch(h, w))[:2], model(*batch(h, w))[:2]): torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)

@pytest.mark.parametrize('make', [dense, pytest.param(deformable, marks=pytest.mark.slow)])
def test_one_graph_of_training(make):
    torch._dynamo.reset()
    model = noisy(make(num_decoder_layers=2))
    given, found = batch(64, 96), []
    for m in (model, torch.compile(model, backend='aot_eager', fullgraph=True)):
        model.zero_grad()
        preds = m(*given)
        (preds.logits.square().sum() + preds.boxes.square().sum()).backward()
        found.append((preds, [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    for a, b in zip(found[0][0], found[1][0]): torch.testing.assert_close(a, b)
    for a, b in zip(found[0][1], found[1][1]): torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)

@pytest.mark.slow
@pytest.mark.skipif(needs_compiler() is not None, reason=str(needs_compiler()))
@pytest.mark.parametrize('make', ALL)
def test_inductor(make):
    torch._dynamo.reset()
    model = noisy(make()).eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for h, w in ((64, 96), (96, 128)):
            for a, b in zip(model(*batch(h, w))[:2], compiled(*batch(h, w))[:2]): torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)

@pytest.mark.parametrize('make', ALL)
def test_export(make):
    model, given = noisy(make()).eval(), batch(64, 96)
    program = torch.export.export(model, given)
    with torch.no_grad():
        for a, b in zip(model(*given)[:2], program.module()(*given)[:2]): torch.testing.assert_close(a, b)

# ---- pictures

@pytest.mark.parametrize('make', ALL)
def test_show_anchors(make):
    import matplotlib.pyplot as plt
    model, image = noisy(make()).train(), batch(64, 96)[0][0]
    ax = show_anchors(model, image, 2)
    assert ax.get_title() == 'query 2' and [o.get_text() for o in ax.get_legend().get_texts()] == ['start', 'layer 0', 'layer 1', 'layer 2'] and model.training
    assert len(ax.patches) == 2 * 4                                      # each box is drawn twice
    assert show_anchors(model, image, notes=False).get_legend() is None
    with pytest.raises(ValueError, match='`query`'): show_anchors(model, image, 6)
    plt.close('all')

def test_modulated_weights():
    import matplotlib.pyplot as plt
    model, (images, mask) = noisy(dense()).train(), batch(64, 96)
    for layer in (0, 2, -1):
        with_it, without, preds = modulated_weights(model, images, mask, layer)
        assert with_it.shape == without.shape and with_it.shape[:3] == (2, 4, 6)
        torch.testing.assert_close(with_it.sum(-1), torch.ones(2, 4, 6)); assert (with_it - without).abs().max() > 1e-3
    still = optional(dict(modulate=False))
    with_it, without, _ = modulated_weights(still, images, mask)
    assert torch.equal(with_it, without) and model.training
    axes = show_modulation(model, images[0], 1)
    assert [o.get_title() for o in axes] == ['with modulation', 'without']
    for kwargs in (dict(layer=3), dict(query=9)):
        with pytest.raises(ValueError, match=list(kwargs)[0]): show_modulation(model, images[0], **kwargs)
    with pytest.raises(ValueError, match='AnchorDecoder'): modulated_weights(deformable(), images)
    plt.close('all')

# ---- bad arguments

def test_bad_arguments():
    for make, name in ((lambda: Anchors(0), 'num_queries'), (lambda: Anchors(3, 3), 'coords'), (lambda: AnchorSelfAttention(32, 5), 'num_heads'), (lambda: AnchorCrossAttention(32, 5), 'num_heads'),
                       (lambda: StayingHeads(32, 0, 2), 'num_classes'), (lambda: AnchorDecoder(0, None), 'num_layers'), (lambda: dense(dim=30), 'dim')):
        with pytest.raises(ValueError, match=f'`{name}`'): make()
    with pytest.raises(ValueError, match='`anchors`.*point'): optional(dict(coords=2))(*batch(64, 64))

# ---- first weights and sizes, as in the official code

def uniform(w, bound): assert w.abs().max() <= bound and w.abs().max() > 0.9 * bound and abs(w.std() / (bound / 3**0.5) - 1) < 0.1
def xavier(rows, cols): return math.sqrt(6 / (rows + cols))

def test_first_weights_dense():
    torch.manual_seed(0)
    model = dab_detr(91, ResNet(), num_encoder_layers=1, num_decoder_layers=2, num_patterns=3, num_queries=300)
    d, e, (a, b) = model.decoder, model.encoder, model.decoder.layers
    for w in (a.self_attn.q_content, b.self_attn.k_position, a.self_attn.v_proj, a.cross_attn.q_position, b.cross_attn.q_place, b.cross_attn.k_place, b.cross_attn.k_content, b.cross_attn.v_proj):
        uniform(w.weight, xavier(256, 256)); uniform(w.bias, 1 / 16)
    for w in (a.self_attn.out_proj, b.cross_attn.out_proj): uniform(w.weight, xavier(256, 256)); assert not w.bias.any()
    for w in (e.layers[0].attn.q_proj, e.layers[0].attn.v_proj): uniform(w.weight, xavier(768, 256)); assert not w.bias.any()
    uniform(e.layers[0].attn.out_proj.weight, xavier(256, 256))
    for w in (a.ffn.linear1, b.ffn.linear2, e.layers[0].ffn.linear1): uniform(w.weight, xavier(2048, 256))
    uniform(d.position.mlp[0].weight, xavier(512, 256)); uniform(d.position.scale.mlp[0].weight, xavier(256, 256)); uniform(e.scale[2].weight, xavier(256, 256))
    uniform(d.position.modulation.asked[2].weight, xavier(256, 2))
    uniform(model.neck.conv.weight, 1 / 2048**.5); uniform(model.neck.conv.bias, 1 / 2048**.5)      # as PyTorch makes it
    uniform(model.heads.classes.weight, 1 / 16); uniform(model.heads.steps.mlp[0].weight, 1 / 16)
    torch.testing.assert_close(model.heads.classes.bias.sigmoid(), torch.full((91,), 0.01))
    assert not model.heads.steps.mlp[-1].weight.any() and not model.heads.steps.mlp[-1].bias.any()
    for w in (model.queries.anchors.logits.weight, model.queries.content.patterns.weight): assert abs(w.std() - 1) < .06 and abs(w.mean()) < .06
    assert a.ffn.act.weight.item() == e.layers[0].ffn.act.weight.item() == .25
    scaled = AnchorDecoder(2, AnchorPosition(256, 4, LayerScale(6, 256), SizeModulation(256)), dim_ffn=8).position.scale.factors.weight
    uniform(scaled, xavier(6, 256))
    assert not torch.equal(LayerSteps(32, 2).mlps[0][0].weight, LayerSteps(32, 2).mlps[1][0].weight)   # the official heads do not start as copies

def test_first_weights_deformable():
    torch.manual_seed(0)
    model = dab_deformable_detr(91, ResNet(), num_encoder_layers=1, num_decoder_layers=2, num_patterns=3)
    layer, head, position = model.decoder.layers[0], model.heads.heads, model.decoder.position
    for w in (layer.self_attn.q_proj, layer.self_attn.v_proj): uniform(w.weight, xavier(768, 256))
    for w in (layer.self_attn.out_proj, layer.cross_attn.value_proj): uniform(w.weight, xavier(256, 256)); assert not w.bias.any()
    uniform(position.mlp[0].weight, xavier(512, 256)); uniform(position.scale.mlp[2].weight, xavier(256, 256))
    uniform(layer.ffn.linear1.weight, xavier(2048, 256))
    assert not layer.cross_attn.offsets.weight.any() and torch.equal(layer.cross_attn.offsets.bias, star(8, 4, 4).flatten())
    for e in (model.queries.anchors.logits.weight, model.queries.content.content.weight, model.queries.content.patterns.weight, model.neck.level_embed): assert abs(e.std() - 1) < 0.06
    torch.testing.assert_close(head[1].classes.bias.sigmoid(), torch.full((91,), 0.01))
    assert head[0].box[-1].bias.tolist() == [0, 0, -2, -2] and not head[1].box[-1].bias.any() and not head[1].box[-1].weight.any()
    assert torch.equal(head[0].box[0].weight, head[1].box[0].weight)

COUNTS = Path(os.environ.get('DEFORMLIT_GOLDEN', Path(__file__).parents[1]/'../shared/golden/A')).parent/'param_counts.json'

@pytest.mark.skipif(not COUNTS.is_file(), reason='no param_counts.json beside the golden files')
@pytest.mark.parametrize('name', [n for n in (json.loads(COUNTS.read_text()) if COUNTS.is_file() else {}) if n.startswith('DAB')])
def test_full_size(name):
    "As many parameters as the official model, part by part, and as many names."
    want = json.loads(COUNTS.read_text())[name]
    a, common = want['args'], {}
    with torch.device('meta'):
        common = dict(dim=a['hidden_dim'], num_heads=a['nheads'], num_queries=a['num_queries'], num_encoder_layers=a['enc_layers'], num_decoder_layers=a['dec_layers'], dim_ffn=a['dim_feedforward'], num_patterns=a['num_patterns'])
        assert a['backbone'] == 'resnet50'
        if 'Deformable' in name: model = dab_deformable_detr(91, ResNet(), num_levels=a['num_feature_levels'], num_points=a['dec_n_points'], **common)
        else: model = dab_detr(91, ResNet(dilated=a['dilation'], out_indices=(3,)), **common)
    state = to_layout(model, 'official')
    assert sum(p.numel() for p in model.parameters()) == want['params']
    assert len(state) == want['state_dict_keys'] and sum(t.numel() for t in state.values()) == want['state_dict_elements_with_duplicates']
    assert sum(p.numel() for p in model.backbone.parameters()) == want['per_child']['backbone'] and sum(p.numel() for p in model.neck.parameters()) >= want['per_child']['input_proj']
