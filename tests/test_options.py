"""Every option of the official DETR, Deformable DETR, DAB-DETR and DAB-Deformable-DETR, also those that no golden file has: our models, built from the official
constructor's arguments as in test_golden.py, against the formulas written out in straight torch. The formulas themselves are first held against the golden files."""
import math

import pytest, torch, torch.nn.functional as F

from deformlit.checkpoints import entries, to_layout
from deformlit.dab_detr import MovingDecoder, ProposalAnchors, ScaledPosition, TwoStageDABDeformableDETR
from deformlit.deformable_detr import Encoder, Neck, ProposalQueries
from test_dab_detr import Written, noisy
from test_detr import restated
from test_golden import FILES, NAMES, SYSTEMS, TwoStage, build_backbone, build_position, fixture, kind, swap

DIM, HEADS, CLASSES, QUERIES = 32, 4, 7, 9
ACTS = dict(relu=F.relu, gelu=F.gelu)

def learned(state, h, w, b):
    "Learned positions: of the column, then of the row."
    col, row = (state[f'backbone.1.{o}_embed.weight'] for o in ('col', 'row'))
    return torch.cat([col[:w].expand(h, w, -1), row[:h, None].expand(h, w, -1)], -1).permute(2, 0, 1).expand(b, -1, -1, -1)

def shrink(mask, h, w):
    "The mask of a smaller map, by whole numbers."
    return mask[:, [i * mask.shape[1] // h for i in range(h)]][:, :, [j * mask.shape[2] // w for j in range(w)]]

def sine_map(mask, dim, temperatures, offset):
    "Positions as published: y features, then x features; `b h w` -> `b dim h w`."
    f = torch.arange(dim // 2)
    def one(x, temperature):
        angle = x[..., None] * 2 * math.pi / temperature ** (2 * (f // 2) / (dim // 2))
        return torch.where(f % 2 == 0, angle.sin(), angle.cos())
    y, x = (~mask).cumsum(1).double(), (~mask).cumsum(2).double()
    return torch.cat([one((y + offset) / (y[:, -1:] + 1e-6), temperatures[0]), one((x + offset) / (x[:, :, -1:] + 1e-6), temperatures[1])], -1).permute(0, 3, 1, 2)

# ---- the formulas. All take a state dict with official names, the backbone's maps, the mask, and the positions; all give outputs with official names

def per_layer(hs, logits, boxes):
    "Stacked in dimension 1 -> official names."
    last = logits.shape[1] - 1
    return {} if hs is None else dict(hs=hs.transpose(0, 1)), {('' if i == last else f'aux_outputs.{i}.') + n: o[:, i] for i in range(last + 1) for n, o in (('pred_logits', logits), ('pred_boxes', boxes))}

def dense(state, config, maps, mask, positions):
    "DETR."
    t = config['transformer']
    memory, hs, logits, boxes = restated(state, maps, mask, lambda m: positions[0], t['normalize_before'], ACTS[t['activation']], t['nhead'])
    states, preds = per_layer(hs, logits, boxes)
    return states | preds | dict(memory=memory.mT.unflatten(2, maps[-1].shape[-2:]))

def anchored(state, config, maps, mask, positions):
    "DAB-DETR."
    t, d = config['transformer'], config['detr']
    options = dict(scale=t['query_scale_type'], keep=t['keep_query_pos'], modulate=t['modulate_hw_attn'], each=t['bbox_embed_diff_each_layer'], update=d['iter_update'])
    written = Written(state, t['nhead'], options)
    x = F.conv2d(maps[-1], state['input_proj.weight'], state['input_proj.bias'])
    m, (x, pos) = shrink(mask, *x.shape[-2:]).flatten(1), (o.flatten(2).mT for o in (x, positions[0]))
    memory = written.encode(x, pos, m, t['num_encoder_layers'])
    return per_layer(None, *written.decode(memory, pos, m, t['num_decoder_layers']))[1] | dict(memory=swap(memory))

class WrittenDeformable(Written):
    "The Deformable family: plain, refined, two-stage, each with anchors or without."
    def __init__(self, state, config):
        self.t, self.d = config['transformer'], config['detr']
        super().__init__(state, self.t['nhead'], {})
        self.anchors = self.t.get('use_dab', False)
        self.eps = 1e-3 if self.anchors else 1e-5
    def logit(self, p):
        p = p.clamp(0, 1)
        return (p.clamp(min=self.eps) / (1 - p).clamp(min=self.eps)).log()
    def ffn(self, name, x, norm): return self.norm(f'{name}.{norm}', x + self.linear(name + '.linear2', ACTS[self.t['activation']](self.linear(name + '.linear1', x))))
    def self_attention(self, name, x, position):
        w, b = self.s[name + '.in_proj_weight'].chunk(3), self.s[name + '.in_proj_bias'].chunk(3)
        q, k, v = (F.linear(o, *wb) for o, *wb in zip((x + position, x + position, x), w, b))
        return self.attend(name, [q], [k], v)
    def sample(self, v, x, y):
        "Bilinear, zeros outside: `b n d h w` at pixels `b n q k` -> `b n d q k`."
        (h, w), out = v.shape[-2:], 0
        for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
            col, row = x.detach().floor() + j, y.detach().floor() + i
            weight = (1 - (x - col).abs()) * (1 - (y - row).abs()) * ((col >= 0) & (col < w) & (row >= 0) & (row < h))
            at = (row.clamp(0, h - 1) * w + col.clamp(0, w - 1)).long()
            got = v.flatten(3).gather(3, at.flatten(2)[:, :, None].expand(-1, -1, v.shape[2], -1)).unflatten(3, at.shape[2:])
            out = out + got * weight[:, :, None]
        return out
    def deform(self, name, x, at, memory, points):
        "`at` is `b q l 2|4`."
        b, q, n, levels = *x.shape[:2], self.heads, len(self.sizes)
        v = self.linear(name + '.value_proj', memory).masked_fill(self.mask[..., None], 0).unflatten(-1, (n, -1)).permute(0, 2, 3, 1).split([h * w for h, w in self.sizes], -1)
        offsets = self.linear(name + '.sampling_offsets', x).view(b, q, n, levels, points, 2).transpose(1, 2)
        weights = self.linear(name + '.attention_weights', x).view(b, q, n, levels * points).softmax(-1).view(b, q, n, levels, points).transpose(1, 2)
        out = 0
        for l, (h, w) in enumerate(self.sizes):
            xy, o = at[:, None, :, l, None, :2], offsets[:, :, :, l]
            place = xy + o / torch.tensor([w, h]) if at.shape[-1] == 2 else xy + o / points * at[:, None, :, l, None, 2:] * 0.5
            got = self.sample(v[l].unflatten(-1, (h, w)), place[..., 0] * w - 0.5, place[..., 1] * h - 0.5)
            out = out + (got * weights[:, :, :, l][:, :, None]).sum(-1)
        return self.linear(name + '.output_proj', out.permute(0, 3, 1, 2).flatten(2))
    def levels(self, maps, mask, positions):
        xs, s = [], self.s
        for l in range(self.t['num_feature_levels']):
            given = maps[l] if l < len(maps) else maps[-1] if l == len(maps) else xs[-1]
            stride = dict(stride=2, padding=1) if l >= len(maps) else {}
            xs.append(F.group_norm(F.conv2d(given, s[f'input_proj.{l}.0.weight'], s[f'input_proj.{l}.0.bias'], **stride), 32, s[f'input_proj.{l}.1.weight'], s[f'input_proj.{l}.1.bias']))
        self.sizes = [tuple(x.shape[-2:]) for x in xs]
        masks = [shrink(mask, *size) for size in self.sizes]
        flat = lambda o: torch.cat([x.flatten(2) for x in o], 2).mT
        self.mask, self.ratios = torch.cat([m.flatten(1) for m in masks], 1), torch.stack([torch.stack([(~m[:, 0]).sum(1) / m.shape[2], (~m[:, :, 0]).sum(1) / m.shape[1]], -1) for m in masks], 1)
        return flat(xs), flat([p + e[:, None, None] for p, e in zip(positions, s['transformer.level_embed'])])
    def on_levels(self, r): return r[:, :, None] * torch.cat([self.ratios] * (r.shape[-1] // 2), -1)[:, None]
    def places(self):
        "Each pixel's own place in its image, `b s 2`."
        out = []
        for l, (h, w) in enumerate(self.sizes):
            y, x = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing='ij')
            out.append(torch.stack([x, y], -1).flatten(0, 1) / (self.ratios[:, l] * torch.tensor([w, h]))[:, None])
        return torch.cat(out, 1)
    def encode(self, x, pos):
        at = self.on_levels(self.places())
        for i in range(self.t['num_encoder_layers']):
            n = f'transformer.encoder.layers.{i}'
            x = self.ffn(n, self.norm(n + '.norm1', x + self.deform(n + '.self_attn', x + pos, at, x, self.t['enc_n_points'])), 'norm2')
        return x
    def propose(self, memory):
        T, (xy, last) = 'transformer.', (self.places(), self.t['num_decoder_layers'])
        side = torch.cat([torch.full((h * w, 2), 0.05 * 2**l) for l, (h, w) in enumerate(self.sizes)])
        grid = torch.cat([xy, side.expand_as(xy)], -1)
        live = ((grid > 0.01) & (grid < 0.99)).all(-1, keepdim=True) & ~self.mask[..., None]
        x = self.norm(T + 'enc_output_norm', self.linear(T + 'enc_output', memory * live))
        logits, boxes = self.linear(f'class_embed.{last}', x), self.mlp(f'bbox_embed.{last}', x, 3) + (grid / (1 - grid)).log().masked_fill(~live, math.inf)
        best = logits[..., 0].topk(self.t['two_stage_num_proposals'], 1).indices[..., None]
        assert live.gather(1, best).all(), 'a token without a proposal is among the best: take another seed'
        r = boxes.gather(1, best.expand(-1, -1, 4)).detach().sigmoid()
        position, content = self.norm(T + 'pos_trans_norm', self.linear(T + 'pos_trans', self.sine(r[..., [1, 0, 2, 3]], memory.shape[-1]))).chunk(2, -1)
        return content, position, r, {'enc_outputs.pred_logits': logits, 'enc_outputs.pred_boxes': boxes.sigmoid()}
    def start(self, memory):
        "Content, position, reference, and what the first stage says."
        s, b = self.s, len(memory)
        if self.t['two_stage']: return self.propose(memory)
        if not self.anchors:
            position, content = s['query_embed.weight'].expand(b, -1, -1).chunk(2, -1)
            return content, position, self.linear('transformer.reference_points', position).sigmoid(), {}
        content, r = s['tgt_embed.weight'], s['refpoint_embed.weight'].sigmoid()
        if 'patterns_embed.weight' in s: content, r = torch.cat([content + p for p in s['patterns_embed.weight']]), torch.cat([r] * len(s['patterns_embed.weight']))
        return content.expand(b, -1, -1), None, r.expand(b, -1, -1), {}
    def position(self, l, x, at):
        raw = self.mlp('transformer.decoder.ref_point_head', self.sine(at[:, :, 0], x.shape[-1]), 2)
        return raw if l == 0 else self.mlp('transformer.decoder.query_scale', x, 2) * raw
    def decode(self, x, position, r, memory):
        states, logits, boxes, references = [], [], [], []
        for l in range(self.t['num_decoder_layers']):
            n, at = f'transformer.decoder.layers.{l}', self.on_levels(r)
            if self.anchors: position = self.position(l, x, at)
            x = self.norm(n + '.norm2', x + self.self_attention(n + '.self_attn', x, position))
            x = self.norm(n + '.norm1', x + self.deform(n + '.cross_attn', x + position, at, memory, self.t['dec_n_points']))
            x = self.ffn(n, x, 'norm3')
            delta, before = self.mlp(f'bbox_embed.{l}', x, 3), self.logit(r)
            box = torch.cat([delta[..., :r.shape[-1]] + before, delta[..., r.shape[-1]:]], -1).sigmoid()
            if self.d['with_box_refine']: r = box.detach()
            states.append(x); logits.append(self.linear(f'class_embed.{l}', x)); boxes.append(box); references.append(r)
        return (torch.stack(o, 1) for o in (states, logits, boxes, references))

def deformable(state, config, maps, mask, positions):
    "Deformable DETR and DAB-Deformable-DETR."
    written = WrittenDeformable(state, config)
    memory = written.encode(*written.levels(maps, mask, positions))
    content, position, r, proposals = written.start(memory)
    hs, logits, boxes, references = written.decode(content, position, r, memory)
    states, preds = per_layer(hs, logits, boxes)
    first = r[0] if written.anchors and not config['transformer']['two_stage'] else r              # the official one has no batch there
    return states | preds | proposals | dict(memory=memory, init_reference=first, inter_references=references.transpose(0, 1))

FORMULAS = {'DETR': dense, 'DABDETR': anchored, 'DeformableDETR': deformable, 'DeformableDETR two_stage': deformable, 'DABDeformableDETR': deformable}

# ---- the formulas are the official ones

GOLDEN = [(name, case) for name, (kind_, cases) in FILES.items() if kind_ in FORMULAS for case in cases]

@pytest.mark.parametrize('name,case', GOLDEN, ids=lambda o: o.removesuffix('.safetensors'))
def test_formulas_are_official(name, case, parity):
    "Without any code of ours: from the file's maps and positions to its outputs."
    f = fixture(name)
    of = lambda prefix: [f.tensors[f'output/{case}/{prefix}{i}'] for i in range(9) if f'output/{case}/{prefix}{i}' in f.tensors]
    maps = of('backbone.feature') or [f.tensors[f'input/{case}/feature{i}'] for i in range(9) if f'input/{case}/feature{i}' in f.tensors]
    out = FORMULAS[f.kind](f.state_dict(), f.config, maps, f.tensors[f'input/{case}/mask'], of('pos'))
    for n, got in out.items():
        want, (e, m) = f.tensors[f'output/{case}/{n}'], f.noise[f'output/{case}/{n}']
        valid = None if n != 'memory' or 'Deformable' not in f.kind else torch.cat([~f_.flatten(1) for f_ in level_masks(f, case, of('pos'))], 1)[..., None]
        parity.close(NAMES[f.kind], 'official files', 'the formulas of the tests themselves', got, want, max(20 * e, 2e-5 * m, 1e-6), mask=valid)

def level_masks(f, case, positions): return [shrink(f.tensors[f'input/{case}/mask'], *p.shape[-2:]) for p in positions]

# ---- every option

STUB = dict(kind='stub', channels=[12, 20, 28], strides=[8, 16, 32])
RESNET = dict(kind='resnet', block='bottleneck', layers=[1, 1, 1, 2], stem=8, planes=[4, 8, 12, 16])
T = dict(d_model=DIM, nhead=HEADS, num_encoder_layers=1, num_decoder_layers=3, dim_feedforward=24, dropout=0.1, return_intermediate_dec=True)
BASE = {
    'DETR': dict(transformer=T | dict(activation='relu', normalize_before=False), detr=dict(num_classes=CLASSES, num_queries=QUERIES, aux_loss=True), position_embedding='sine'),
    'DeformableDETR': dict(transformer=T | dict(activation='relu', num_feature_levels=4, dec_n_points=4, enc_n_points=4, two_stage=False, two_stage_num_proposals=QUERIES),
        detr=dict(num_classes=CLASSES, num_queries=QUERIES, num_feature_levels=4, aux_loss=True, with_box_refine=False, two_stage=False), position_embedding='sine'),
    'DABDETR': dict(transformer=T | dict(activation='prelu', num_queries=QUERIES, normalize_before=False, query_dim=4, keep_query_pos=False, query_scale_type='cond_elewise', num_patterns=0,
        modulate_hw_attn=True, bbox_embed_diff_each_layer=False), detr=dict(num_classes=CLASSES, num_queries=QUERIES, num_dec_layers=3, aux_loss=True, iter_update=True, query_dim=4,
        bbox_embed_diff_each_layer=False, random_refpoints_xy=False), position_embedding=dict(kind='sine', temperatureH=20, temperatureW=20)),
    'DABDeformableDETR': dict(transformer=T | dict(activation='relu', num_feature_levels=4, dec_n_points=4, enc_n_points=4, two_stage=False, two_stage_num_proposals=QUERIES, use_dab=True),
        detr=dict(num_classes=CLASSES, num_queries=QUERIES, num_feature_levels=4, aux_loss=True, with_box_refine=True, two_stage=False, use_dab=True, num_patterns=0, random_refpoints_xy=False)),
}

def configure(system, changes):
    "A configuration as the golden files write it; a change goes wherever the argument stands."
    config = {k: dict(v) if isinstance(v, dict) else v for k, v in BASE[system].items()} | dict(backbone=STUB if 'Deformable' in system else STUB | dict(channels=[28], strides=[32]))
    for name, value in changes.items():
        at = [part for part in ('transformer', 'detr') if name in config[part]]
        for part in at: config[part][name] = value
        if not at: config[name] = value
    if 'num_dec_layers' in config['detr']: config['detr']['num_dec_layers'] = config['transformer']['num_decoder_layers']
    if config['transformer'].get('num_feature_levels') == 1: config['backbone'] = changes.get('backbone', STUB | dict(channels=[28], strides=[32]))
    return config

DC5 = RESNET | dict(dilation=True)
OPTIONS = {
    'DETR': [dict(), dict(normalize_before=True), dict(position_embedding='learned'), dict(activation='gelu'), dict(backbone=DC5), dict(num_encoder_layers=0), dict(nhead=8, d_model=64, num_decoder_layers=1),
             dict(normalize_before=True, position_embedding='learned', backbone=DC5), dict(num_encoder_layers=3, num_queries=1)],
    'DeformableDETR': [dict(with_box_refine=refine, **o) for refine in (False, True) for o in (
        dict(), dict(num_feature_levels=1), dict(num_feature_levels=1, backbone=DC5), dict(num_feature_levels=3), dict(num_feature_levels=5), dict(num_feature_levels=6, num_encoder_layers=2), dict(position_embedding='learned'),
        dict(enc_n_points=2, dec_n_points=3), dict(enc_n_points=5, dec_n_points=1), dict(activation='gelu'), dict(nhead=8, d_model=64, num_decoder_layers=1), dict(num_queries=1, num_encoder_layers=0), dict(backbone=RESNET))],
    'DeformableDETR two_stage': [dict(with_box_refine=True, two_stage=True, **o) for o in (
        dict(), dict(num_feature_levels=1, two_stage_num_proposals=3), dict(num_feature_levels=1, backbone=DC5), dict(num_feature_levels=3), dict(num_feature_levels=5, two_stage_num_proposals=3), dict(position_embedding='learned'),
        dict(enc_n_points=2, dec_n_points=3), dict(activation='gelu'), dict(nhead=8, d_model=64), dict(num_decoder_layers=1, two_stage_num_proposals=1))],
    'DABDETR': [dict(**o) for scale in ('cond_elewise', 'cond_scalar', 'fix_elewise') for o in (dict(query_scale_type=scale), dict(query_scale_type=scale, keep_query_pos=True, num_patterns=2),
        dict(query_scale_type=scale, query_dim=2, modulate_hw_attn=False), dict(query_scale_type=scale, bbox_embed_diff_each_layer=True, normalize_before=True))] + [
        dict(keep_query_pos=True), dict(modulate_hw_attn=False), dict(iter_update=False), dict(iter_update=False, keep_query_pos=True, num_patterns=3), dict(num_patterns=3), dict(bbox_embed_diff_each_layer=True),
        dict(query_dim=2, modulate_hw_attn=False, iter_update=False), dict(query_dim=2, modulate_hw_attn=False, bbox_embed_diff_each_layer=True, random_refpoints_xy=True), dict(random_refpoints_xy=True, num_patterns=2),
        dict(normalize_before=True), dict(position_embedding='learned'), dict(position_embedding=dict(kind='sine', temperatureH=10, temperatureW=40)), dict(backbone=DC5), dict(nhead=8, d_model=64, num_decoder_layers=1),
        dict(num_encoder_layers=0), dict(num_queries=1)],
    'DABDeformableDETR': [dict(), dict(num_patterns=2), dict(with_box_refine=False), dict(with_box_refine=False, num_patterns=3), dict(random_refpoints_xy=True), dict(num_feature_levels=1), dict(num_feature_levels=1, backbone=DC5),
        dict(num_feature_levels=3), dict(num_feature_levels=5, num_patterns=1), dict(position_embedding='learned'), dict(enc_n_points=2, dec_n_points=3), dict(activation='gelu'), dict(nhead=8, d_model=64), dict(num_queries=1, num_decoder_layers=1)],
    'DABDeformableDETR two_stage': [dict(two_stage=True), dict(two_stage=True, num_feature_levels=3, enc_n_points=2, dec_n_points=3), dict(two_stage=True, position_embedding='learned')],
}
CASES = [(system, o) for system, options in OPTIONS.items() for o in options]

def name_of(o):
    if isinstance(o, str): return o
    word = lambda v: 'DC5' if v is DC5 else 'resnet' if v is RESNET else '-'.join(map(str, v.values())) if isinstance(v, dict) else v
    return ','.join(f'{k}={word(v)}' for k, v in o.items()) or 'default'

class ProposedAnchors(TwoStage):
    "Two-stage DAB-Deformable-DETR, which crashes in the official code: here what its two halves say apart."
    def __init__(self, config):
        t, d = config['transformer'], config['detr']
        dim, levels, last, backbone = t['d_model'], t['num_feature_levels'], t['num_decoder_layers'], build_backbone(config['backbone'], (1, 2, 3))
        layer = dict(dim=dim, num_heads=t['nhead'], num_levels=levels, dim_ffn=t['dim_feedforward'])
        self.config, self.model = config, TwoStageDABDeformableDETR(backbone, Neck(backbone.channels, dim, levels, position=build_position(config.get('position_embedding', 'sine'), dim)),
            Encoder(t['num_encoder_layers'], num_points=t['enc_n_points'], **layer), ProposalQueries(t['two_stage_num_proposals'], dim),
            MovingDecoder(last, ScaledPosition(dim), num_points=t['dec_n_points'], **layer), ProposalAnchors(dim, d['num_classes'], last))

SYSTEMS = SYSTEMS | {'DABDeformableDETR two_stage': ProposedAnchors}
NAMES = NAMES | {'DABDeformableDETR two_stage': 'two-stage DAB-Deformable-DETR'}
FORMULAS = FORMULAS | {'DABDeformableDETR two_stage': deformable}

@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)

def inputs(config, seed):
    "A batch of two images of other sizes, the second padded; features where a stub stands for the backbone."
    g, (h, w), b = torch.Generator().manual_seed(seed), (96, 128), config['backbone']
    mask = torch.zeros(2, h, w, dtype=torch.bool)
    mask[0, 80:], mask[1, :, 88:] = True, True
    sizes = torch.tensor([[80, 128], [96, 88]])
    if b['kind'] == 'resnet': return dict(mask=mask, sizes=sizes, tensors=torch.rand(2, 3, h, w, generator=g).masked_fill(mask[:, None], 0.))
    return dict(mask=mask, sizes=sizes) | {f'feature{i}': torch.randn(2, c, -(-h // s), -(-w // s), generator=g) for i, (c, s) in enumerate(zip(b['channels'], b['strides']))}

def attached(model):
    "The weights under official names, still part of ours, so that gradients arrive there."
    state = model.state_dict(keep_vars=True)
    return {n: state[e.ours[0]] if len(e.ours) == 1 else torch.cat([state[o] for o in e.ours], e.dim) for e in entries(model, 'official') for n in e.theirs}

def gradients(outputs, counts, leaves):
    "Of a random sum of the outputs; `counts` says which values count."
    total = 0
    for i, n in enumerate(sorted(outputs)):
        o = outputs[n]
        if not o.requires_grad: continue
        weight = torch.randn(o.shape, generator=torch.Generator().manual_seed(i))
        total = total + (o * (weight if n not in counts else weight * counts[n])).sum()
    return torch.autograd.grad(total, leaves, allow_unused=True)

def position_words(kind, config):
    "Temperatures and offset of the sine positions, as the configuration has them."
    p = config.get('position_embedding')
    if kind == 'DABDETR' and isinstance(p, dict): return (p['temperatureH'], p['temperatureW']), 0.
    return (10000, 10000), 0. if kind == 'DETR' else -0.5

@pytest.mark.parametrize('system,changes', CASES, ids=name_of)
def test_option(system, changes, double, parity):
    "Outputs and all gradients in float64, with padding."
    config = configure(system.split()[0], changes)
    name = NAMES[system]
    assert system in (kind(system.split()[0], config), 'DABDeformableDETR two_stage')
    torch.manual_seed(1)
    built = SYSTEMS[system](config)
    model = noisy(built.model).double().eval()
    given = {n: t.requires_grad_() if t.is_floating_point() else t for n, t in inputs(config, 2).items()}
    ours = built(**given)
    state = attached(model)
    assert {n: t.shape for n, t in state.items()} == {n: t.shape for n, t in to_layout(model, 'official').items()}
    maps = [given[f'feature{i}'] for i in range(9) if f'feature{i}' in given] or model.backbone(given['tensors'])
    counts, positions = built.masks(ours), [ours[f'pos{i}'] for i in range(9) if f'pos{i}' in ours]
    if config.get('position_embedding') == 'learned':
        positions = [learned(state, *p.shape[-2:], len(p)) for p in positions]
        for i, p in enumerate(positions): parity.close(name, 'formulas', 'position encodings', ours[f'pos{i}'], p, 0.)
    else:
        for i, p in enumerate(positions):
            want = sine_map(shrink(given['mask'], *p.shape[-2:]), DIM if 'd_model' not in changes else changes['d_model'], *position_words(system, config))
            parity.close(name, 'formulas', 'position encodings', p.double(), want, 5e-6, mask=counts.get(f'pos{i}'))      # ours are computed in float32
    theirs = FORMULAS[system](state, config, maps, given['mask'], [p.double() for p in positions])
    missing = set(theirs) - set(ours)
    assert not missing and {'pred_logits', 'pred_boxes', 'memory'} <= set(theirs) and len([n for n in theirs if 'pred_boxes' in n]) == config['transformer']['num_decoder_layers'] + bool(changes.get('two_stage'))
    for n, want in theirs.items(): parity.close(name, 'formulas', 'outputs of all layers, every option', ours[n], want, 1e-10, 1e-9, counts.get(n))
    assert min(ours[n].detach().flatten(1).std(1).min() for n in ('pred_logits', 'pred_boxes')) > 1e-3      # not a comparison of constants
    leaves = [t for t in given.values() if t.requires_grad] + list(model.parameters())
    mine, want = gradients({n: ours[n] for n in theirs}, counts, leaves), gradients(theirs, counts, leaves)
    reached = 0
    for a, b in zip(mine, want):
        a, b = (torch.zeros(1) if o is None else o for o in (a, b))
        if not a.any() and not b.any(): continue
        reached += 1
        parity.close(name, 'formulas', 'gradients, every option', a, b, 1e-9, 1e-8)
    assert reached > 20

def test_a_wrong_formula_is_seen(double):
    "The comparison itself: another temperature, eps, order or place of a detach is far beyond the tolerance."
    config = configure('DABDeformableDETR', dict(num_patterns=2))
    torch.manual_seed(1)
    built = SYSTEMS['DABDeformableDETR'](config)
    model = noisy(built.model).double().eval()
    given = inputs(config, 2)
    ours = built(**given)
    maps, positions = [given[f'feature{i}'] for i in range(3)], [ours[f'pos{i}'] for i in range(4)]
    right = deformable(attached(model), config, maps, given['mask'], positions)
    for wrong in (dict(on_levels=lambda self, r: torch.cat([r] * (2 // r.shape[-1] or 1), -1)[:, :, None].expand(-1, -1, 4, -1)), dict(sine=lambda self, r, d: Written.sine(self, r[..., [1, 0, 2, 3]], d)),
                  dict(position=lambda self, l, x, at: WrittenDeformable.position(self, 0, x, at))):
        other = type('Wrong', (WrittenDeformable,), wrong)(attached(model), config)
        memory = other.encode(*other.levels(maps, given['mask'], positions))
        content, position, r, _ = other.start(memory)
        _, _, boxes, _ = other.decode(content, position, r, memory)
        assert (boxes[:, -1] - right['pred_boxes']).abs().max() > 1e-6
