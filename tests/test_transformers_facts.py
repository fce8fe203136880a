"""Where transformers departs from the official code, and we do not: a test each, with official numbers where there are any. And what all three share: matching, positions, the normalisation of images."""
import os
os.environ.setdefault('HF_HUB_OFFLINE', '1')

import pytest, torch
transformers = pytest.importorskip('transformers')
from torch.testing import assert_close
from transformers.loss import loss_deformable_detr, loss_for_object_detection
from transformers.models.dab_detr import modeling_dab_detr
from transformers.models.deformable_detr import modeling_deformable_detr
from transformers.models.detr import modeling_detr

from deformlit.anchors import anchor_encoding
from deformlit.backbones import create_backbone
from deformlit.checkpoints import from_config, load_weights, to_layout
from deformlit.dab_detr import Anchors, FixedAnchors, SinePositionYX, spread
from deformlit.data import MEAN, STD
from deformlit.layers import SinePosition
from deformlit.set_loss import FocalLoss, Matcher, SetLoss, SoftmaxLoss
from test_first_weights import FEW, DAB, DETR, PLAIN, REFINE, TWO, bounds, distance, rule_of, star
from test_transformers import batch, config_of, disturb, targets, theirs

def golden(name):
    "A golden file, or skip."
    if not (folder := __import__('test_golden').folder).is_dir(): pytest.skip(f'no golden files: {folder}')
    return __import__('test_golden').fixture(name + '.safetensors')

# ---- fact 2: asked for auxiliary losses, their DETR says something else

def golden_detr(auxiliary):
    "Their DETR with the weights of a golden file."
    from test_golden import SYSTEMS
    f = golden('detr_full')
    t, model = f.config['transformer'], SYSTEMS['DETR'](f.config).model
    load_weights(model, f.state_dict(), 'official')
    body = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1], out_features=['stage4'])
    other = transformers.DetrForObjectDetection(transformers.DetrConfig(backbone_config=body, d_model=t['d_model'], encoder_layers=t['num_encoder_layers'], decoder_layers=t['num_decoder_layers'],
        encoder_attention_heads=t['nhead'], decoder_attention_heads=t['nhead'], encoder_ffn_dim=t['dim_feedforward'], decoder_ffn_dim=t['dim_feedforward'], num_queries=f.config['detr']['num_queries'],
        num_labels=f.config['detr']['num_classes'], auxiliary_loss=auxiliary))
    missing = other.load_state_dict(to_layout(model, 'transformers/resnet'), strict=False)
    assert not missing.unexpected_keys and all('num_batches' in n for n in missing.missing_keys)
    return f, model.eval(), other.eval()

@pytest.mark.parametrize('auxiliary', [False, True])
def test_auxiliary_losses_change_no_answer(auxiliary, parity):
    f, model, other = golden_detr(auxiliary)
    images, mask = f.tensors['input/rect/tensors'], f.tensors['input/rect/mask']
    _, _, dicts = targets()
    with torch.no_grad(): preds, out = model(images, mask), other(images, pixel_mask=(~mask).long(), labels=dicts[:len(images)])
    official = {n: f.tensors[f'output/rect/{n}'] for n in ('pred_logits', 'pred_boxes', 'aux_outputs.0.pred_logits')}
    assert_close(preds.logits[:, -1], official['pred_logits'], atol=2e-5, rtol=0); assert_close(preds.logits[:, 0], official['aux_outputs.0.pred_logits'], atol=2e-5, rtol=0)
    off = (out.logits - official['pred_logits']).abs().max()
    with torch.no_grad():                                             # what theirs does then, with our parts
        memory, p = model.encode(images, mask)
        x, u, _ = model.queries(memory, p)
        for layer in model.decoder.layers: x = model.decoder.norm(layer(x, u, memory, p))
        written_back = [model.heads(0, o, None)[0] for o in (x, model.decoder.norm(x))]
    assert (min((out.logits - o).abs().max() for o in written_back) < 1e-5) == auxiliary
    if auxiliary: parity.departs('DETR', 'transformers', '`auxiliary_loss=True` changes the answer: the decoder goes on with the normed states; difference of the logits from the official file', off, 1e-2)
    else:
        parity.close('DETR', 'transformers', 'theirs and the official file: logits', out.logits, official['pred_logits'], 2e-5)

# ---- fact 3: their first stage is never trained

def test_the_first_stage_learns(parity):
    "Their loss does not look at the proposals: the head of the first stage keeps its random weights for ever. Ours pays for them, as the official loss does."
    other = theirs('two_stage')
    model = from_config(other.config.to_dict())
    load_weights(model, other.state_dict())
    (images, mask), (boxes, labels, dicts) = batch(), targets()
    out = other(images, pixel_mask=(~mask).long(), labels=dicts)
    out.loss.backward()
    last = other.config.decoder_layers
    first_stage = {n: w for n, w in other.named_parameters(remove_duplicate=False) if n.startswith(('model.enc_output', f'model.decoder.bbox_embed.{last}', f'bbox_embed.{last}'))}
    assert len(first_stage) >= 10 and all(w.grad is None or not w.grad.any() for w in first_stage.values()) and not [n for n in out.loss_dict if n.endswith('_enc')]
    parity.departs('two-stage Deformable DETR', 'transformers', 'the loss never reaches the first stage: none of its tensors gets a gradient')
    loss = SetLoss()
    loss(model.train(False)(images, mask), boxes, labels).backward()
    head = model.heads.heads[-1]
    for w in (*model.queries.token_proj.parameters(), *model.queries.token_norm.parameters(), *head.classes.parameters(), *head.box.parameters()): assert w.grad.any()
    assert loss.parts['proposals'] > 0

# ---- fact 4: the weights of the loss and of the matching

def their_loss(f, case, **words):
    "Their loss of a golden file's predictions."
    c, given = f.config, f.part(f'input/{case}/')
    config = (transformers.DeformableDetrConfig if 'focal_alpha' in c else transformers.DetrConfig)(num_labels=c['num_classes'], decoder_layers=c['num_aux'] + 1, auxiliary_loss=True, **words)
    objects = [dict(class_labels=given[f'targets.{i}.labels'], boxes=given[f'targets.{i}.boxes']) for i in range(len(given['target_sizes']))]
    layers = [f'aux_outputs.{i}.' for i in range(c['num_aux'])] + ['']
    logits, boxes = ([given[layer + o] for layer in layers] for o in ('pred_logits', 'pred_boxes'))
    of = loss_deformable_detr.DeformableDetrForObjectDetectionLoss if 'focal_alpha' in c else loss_for_object_detection.ForObjectDetectionLoss
    return of(logits[-1], objects, 'cpu', boxes[-1], config, torch.stack(logits), torch.stack(boxes))[:2]

@pytest.mark.parametrize('name, case', [(name, case) for name in ('deformable_detr_criterion', 'detr_criterion') for case in ('two_images', 'one_empty', 'many')])
def test_each_loss_is_official_but_not_their_sum(name, case, parity):
    "With the official matching costs each term is the official one. The sum is not, for the focal loss: the class counts half, and proposals not at all."
    f = golden(name)
    focal, c = 'focal_alpha' in f.config, f.config
    system = 'focal set loss' if focal else 'softmax set loss'
    total, told = their_loss(f, case, class_cost=c['set_cost_class'])
    official = {n: t for n, t in f.part(f'output/{case}/losses.').items() if n.startswith(('loss_ce', 'loss_bbox', 'loss_giou'))}
    for n, t in official.items():
        if not n.endswith('_enc'): parity.close(system, 'transformers', 'theirs and the official file: each loss of each layer', told[n].detach(), t, 1e-5, 1e-5)
    assert {n for n in official if n not in told} == {n for n in official if n.endswith('_enc')}
    want, weights = f.tensors[f'output/{case}/total'], dict(ce=c['cls_loss_coef'], bbox=c['bbox_loss_coef'], giou=c['giou_loss_coef'])
    assert_close(want, sum(weights[n.split('_')[1]] * t for n, t in official.items()), rtol=1e-4, atol=1e-4)
    if not focal: parity.close(system, 'transformers', 'theirs and the official file: the sum', total, want, 1e-4, 1e-5); return
    parity.departs(system, 'transformers', 'the sum is too small: the class weighs 1 (official 2), and the proposals of a first stage are not paid for', want - total, 0.5)
    assert transformers.DeformableDetrConfig().class_cost == 1 and SetLoss().weights == {'class': 2., 'box': 5., 'giou': 2.} and Matcher().class_cost == 2

def test_another_class_cost_matches_others(parity):
    "Their default costs choose other pairs than the official ones, on the same predictions."
    f = golden('deformable_detr_criterion')
    g = f.part('input/many/')
    objects = [dict(class_labels=g[f'targets.{i}.labels'], boxes=g[f'targets.{i}.boxes']) for i in range(len(g['target_sizes']))]
    def pairs(cost): return [[o.tolist() for o in pair] for pair in loss_deformable_detr.DeformableDetrHungarianMatcher(cost, 5, 2)(dict(logits=g['pred_logits'], pred_boxes=g['pred_boxes']), objects)]
    official = [[f.tensors[f'output/many/indices.main.{i}.{o}'].tolist() for o in ('src', 'tgt')] for i in range(len(objects))]
    parity.same('focal set loss', 'transformers', 'theirs and the official file: matched indices', pairs(2), official)
    if pairs(transformers.DeformableDetrConfig().class_cost) != official: parity.departs('focal set loss', 'transformers', 'the default cost of the class is 1 (official 2), which pairs other queries with objects')
    else: parity.departs('focal set loss', 'transformers', 'the default cost of the class is 1 (official 2)')

@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('classify', [FocalLoss(), SoftmaxLoss()], ids=['focal', 'softmax'])
def test_same_pairs(classify, seed, parity):
    "Their matcher and ours, with the official weights."
    g, soft = torch.Generator().manual_seed(seed), isinstance(classify, SoftmaxLoss)
    logits, boxes = 4 * torch.randn(3, 9, 6, generator=g), torch.rand(3, 9, 4, generator=g) * .4 + .3
    true, labels = torch.rand(3, 5, 4, generator=g) * .4 + .3, torch.randint(-1, 5, (3, 5), generator=g)
    of, weight = (loss_for_object_detection.HungarianMatcher, 1) if soft else (loss_deformable_detr.DeformableDetrHungarianMatcher, 2)
    told = of(weight, 5, 2)(dict(logits=logits, pred_boxes=boxes), [dict(class_labels=c[c >= 0], boxes=b[c >= 0]) for c, b in zip(labels, true)])
    pairs = Matcher(classify, weight, 5., 2.)((logits[:, None], boxes[:, None]), true, labels)
    for i, (queries, objects) in enumerate(told):
        mine, place = pairs.of(0, i), (labels[i] >= 0).nonzero()[:, 0]
        parity.same('softmax set loss' if soft else 'focal set loss', 'transformers', 'matched indices', [o.tolist() for o in mine], [queries.tolist(), place[objects].tolist()], numbers=len(queries))

# ---- fact 5: first weights

FIRST = {'detr': ('DETR', DETR), 'plain': ('Deformable DETR', PLAIN), 'refine': ('Deformable DETR', REFINE), 'two_stage': ('two-stage Deformable DETR', TWO), 'dab': ('DAB-DETR', DAB)}

def astray(weights, table):
    "Official names of tensors that do not start as the official code states, and how far they are, in parts of the tolerance."
    out = {}
    for n, w in weights.items():
        word, *numbers = rule_of(table, n).split()
        if word == 'loaded': continue
        if word in ('constant', 'star', 'small'):
            want = star(w, 4, 4) if word == 'star' else torch.tensor([0., 0., -2., -2.]) if word == 'small' else torch.full_like(w, float(numbers[0]))
            if (w - want).abs().max() > 1e-4: out[n] = (w - want).abs().max().item()
        elif (d := distance(w, *bounds(' '.join([word, *numbers]), n, weights))) > FEW / w.numel()**.5: out[n] = d
    return out

@pytest.mark.parametrize('system', FIRST)
def test_first_weights(system, parity):
    "Theirs, not ours, start otherwise than the official code; test_first_weights.py says the same of ours, tensor by tensor."
    torch.manual_seed(0)
    config = config_of(system)
    other = getattr(transformers, type(config).__name__.removesuffix('Config') + 'ForObjectDetection')(config)
    model = from_config(config.to_dict())
    load_weights(model, other.state_dict())
    found = astray(to_layout(model, 'official'), FIRST[system][1])
    fresh = astray(to_layout(from_config(config.to_dict()), 'official'), FIRST[system][1])
    assert not fresh, f'ours: {fresh}'
    heads = [n for n in found if n.startswith(('class_embed', 'bbox_embed'))]
    assert heads and len(found) > 20 and (system == 'detr' or any(n.startswith('class_embed') and n.endswith('bias') for n in heads))
    parity.departs(FIRST[system][0], 'transformers', f"first weights ({system.replace('_', ' ')}): most are normal with deviation 0.02 where the official ones are Xavier{'' if system == 'detr' else ', and each class starts at 50 % instead of 1 %'}; largest distance from the official distribution", max(found.values()), 0.1)

def test_heads_are_their_own(parity):
    "Refining models have a class head for each layer in official checkpoints; theirs is one under many names."
    other = theirs('refine')
    assert other.class_embed[0].weight is other.class_embed[1].weight
    model = from_config(other.config.to_dict())
    assert model.heads.heads[0].classes.weight is not model.heads.heads[1].classes.weight
    parity.departs('Deformable DETR', 'transformers', 'with refinement, the class heads of all layers are one tensor (official: one each)')

# ---- fact 6: what is trained of the backbone

@pytest.mark.parametrize('system, stays', [('detr', True), ('plain', True), ('dab', False)])
def test_frozen_backbones(system, stays, parity):
    "Official code freezes the stem and the first stage. Theirs, on its own ResNet, everything or nothing."
    other = theirs(system)
    body = [w for n, w in other.named_parameters() if 'backbone' in n]
    trained = sum(w.requires_grad for w in body)
    assert len(body) > 10 and trained == (0 if stays else len(body))
    parity.departs(FIRST[system][0], 'transformers', f"on its own ResNet {'none' if stays else 'all'} of the backbone is trained (official: all but stem and first stage)")
    ours = create_backbone('resnet18', norm='frozen', freeze=('conv1', 'bn1', 'layer1'))
    assert {n.split('.')[0] for n, w in ours.named_parameters() if not w.requires_grad} == {'conv1', 'layer1'} and {n.split('.')[0] for n, w in ours.named_parameters() if w.requires_grad} == {'layer2', 'layer3', 'layer4'}

# ---- fact 7: anchors that should stay

def test_fixed_anchors(parity):
    "The official option freezes nothing, as its own gradients show; nor does theirs, which does not spread the anchors either. We have a part that does both."
    f = golden('dab_detr_patterns')
    assert f.config['detr']['random_refpoints_xy'] and f.tensors['grad/rect/state_dict/refpoint_embed.weight'][:, :2].abs().min(1).values.gt(0).any()
    config = config_of('dab')
    config.random_refpoints_xy, config.num_queries = True, 100
    torch.manual_seed(0)
    other = transformers.DabDetrForObjectDetection(config)
    w, width = other.model.query_refpoint_embeddings.weight, lambda logits: distance(logits[:, :2].sigmoid(), 0., 1.)
    parity.departs('DAB-DETR', 'transformers', '`random_refpoints_xy=True` spreads nothing and freezes nothing (official: spreads, freezes nothing); distance of the centres from a uniform distribution', width(w), 0.3)
    disturb(other)
    images, mask = batch()
    other(images, pixel_mask=(~mask).long()).pred_boxes.sum().backward()
    assert w.grad[:, :2].any()
    fixed = FixedAnchors(100)
    assert width(spread(Anchors(100)).logits.weight) < .15 and [n for n, _ in fixed.named_parameters()] == ['wh'] and distance(fixed()[:, :2], 0., 1.) < .15

# ---- fact 9: positions

def masks():
    mask = torch.zeros(3, 11, 17, dtype=torch.bool)
    mask[1, 7:], mask[2, :, 12:] = True, True
    return mask

POSITIONS = {'DETR': (lambda m: modeling_detr.DetrSinePositionEmbedding(32, normalize=True)((len(m), 64, *m.shape[1:]), 'cpu', torch.float32, ~m), SinePosition(64)),
             'Deformable DETR': (lambda m: modeling_deformable_detr.DeformableDetrSinePositionEmbedding(32, normalize=True)((len(m), 64, *m.shape[1:]), 'cpu', torch.float32, ~m), SinePosition(64, offset=-.5)),
             'DAB-DETR': (lambda m: modeling_dab_detr.DabDetrSinePositionEmbedding(transformers.DabDetrConfig(hidden_size=64, temperature_height=20, temperature_width=10))(torch.zeros(1), ~m), SinePositionYX(64, 20., 10.))}

@pytest.mark.parametrize('system', POSITIONS)
def test_same_positions(system, parity):
    "Each model has its own: half a pixel less in the Deformable family, another temperature in DAB-DETR. None fits another."
    mask = masks()
    told = POSITIONS[system][0](mask)
    for other, (_, mine) in POSITIONS.items():
        if other == system: parity.close(system, 'transformers', 'position encodings', mine(mask), told, 1e-5, mask=~mask[:, None])
        else: assert (mine(mask) - told)[(~mask[:, None]).expand_as(told)].abs().max() > .1
    assert transformers.DabDetrConfig().temperature_height == 20

@pytest.mark.parametrize('coords', [2, 4])
def test_same_anchor_encoding(coords, parity):
    "y before x, and the temperature of the queries is 10000 whatever that of the pixels is."
    anchors = torch.rand(2, 5, coords, generator=torch.Generator().manual_seed(0))
    parity.close('DAB-DETR', 'transformers', 'encoding of the anchors', anchor_encoding(anchors, 64), modeling_dab_detr.encode_sinusoidal_position_embedding(anchors, 32), 1e-5)

def test_same_image_normalisation(parity):
    for name in ('DetrImageProcessor', 'DeformableDetrImageProcessor'):
        of = getattr(transformers, name)
        parity.same({'D': 'DETR'}[name[0]] if 'Deform' not in name else 'Deformable DETR', 'transformers', 'normalisation of images', ([round(o, 4) for o in MEAN.flatten().tolist()], [round(o, 4) for o in STD.flatten().tolist()]), (list(of.image_mean), list(of.image_std)))

# ---- what has no counterpart

def test_no_counterpart(parity):
    assert not hasattr(transformers, 'DabDeformableDetrConfig')
    for system in ('DAB-Deformable-DETR', 'two-stage DAB-Deformable-DETR'): parity.left_out(system, 'transformers', 'it has no such model')
    parity.left_out('two-stage DAB-Deformable-DETR', 'official files', 'the official code crashes; what its two halves say apart is compared with the formulas')
    parity.left_out('DAB-DETR', 'transformers', 'the options query_dim=2, query_scale_type, modulate_hw_attn=False, iter_update=False and heads for each layer: it has not got them')
