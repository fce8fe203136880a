"""Our detectors against those of transformers, with random weights: same logits, same boxes, and weights that go both ways, in memory and in folders."""
import json, os
from pathlib import Path
os.environ.setdefault('HF_HUB_OFFLINE', '1')

import pytest, torch
transformers = pytest.importorskip('transformers')

from deformlit.checkpoints import entries, from_config, from_transformers, layouts, load_pretrained, load_weights, to_layout
from deformlit.deformable_detr import grid_proposals
from deformlit.detr import Detector
from deformlit.set_loss import FocalLoss, Matcher, SetLoss, SoftmaxLoss, set_losses

CLASSES, LEVELS, LAYERS = 7, 5, 3      # 5 levels: two beyond the backbone's three maps
NAMES = Path(__file__).parent/'names'

small = dict(num_labels=CLASSES, num_queries=11, encoder_layers=2, decoder_layers=LAYERS, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48)
deformable = dict(d_model=64, num_feature_levels=LEVELS, auxiliary_loss=True)
SYSTEMS = {
    'detr': ('Detr', dict(d_model=64)),                # with `auxiliary_loss` their forward is another: see below
    'detr_learned': ('Detr', dict(d_model=64, position_embedding_type='learned')),
    'plain': ('DeformableDetr', deformable),
    'refine': ('DeformableDetr', dict(deformable, with_box_refine=True)),
    'two_stage': ('DeformableDetr', dict(deformable, with_box_refine=True, two_stage=True, two_stage_num_proposals=13)),
    'single': ('DeformableDetr', dict(deformable, num_feature_levels=1)),
    'dab': ('DabDetr', dict(hidden_size=64, auxiliary_loss=True)),
    'dab_patterns': ('DabDetr', dict(hidden_size=64, num_patterns=2, temperature_height=10, temperature_width=10)),
}

NAME = dict(detr='DETR', detr_learned='DETR', plain='Deformable DETR', refine='Deformable DETR', two_stage='two-stage Deformable DETR', single='Deformable DETR', dab='DAB-DETR', dab_patterns='DAB-DETR')

def config_of(system, backbone='resnet'):
    "A tiny configuration of theirs, on their own ResNet or on timm's."
    name, fields = SYSTEMS[system]
    stages = ['stage2', 'stage3', 'stage4'] if name == 'DeformableDetr' and system != 'single' else ['stage4']
    if backbone == 'resnet': body = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[16, 24, 32, 48], depths=[1, 2, 1, 1], out_features=stages)
    else: body = dict(model_type='timm_backbone', backbone='resnet18', features_only=True, use_pretrained_backbone=False, out_indices=[int(o[-1]) for o in stages])
    return getattr(transformers, name + 'Config')(backbone_config=body, **small, **fields)

def theirs(system, backbone='resnet', tied=True):
    "A tiny model of theirs; noise on every tensor, so that no zero or one of the first weights hides a mistake."
    config = config_of(system, backbone)
    torch.manual_seed(0)
    model = getattr(transformers, SYSTEMS[system][0] + 'ForObjectDetection')(config)
    disturb(model)
    return model.eval()

NOISE = dict(sampling_offsets=0.3, query_refpoint_embeddings=1., patterns=1., query_position_embeddings=1.)

def disturb(model):
    seen = set()
    with torch.no_grad():
        for name, t in model.state_dict(keep_vars=True).items():
            if not t.is_floating_point() or t.data_ptr() in seen: continue
            seen.add(t.data_ptr())
            t.copy_(0.5 + torch.rand_like(t) if 'running_var' in name else t + NOISE.get(name.split('.')[-2], 0.08) * torch.randn_like(t))

def batch():
    torch.manual_seed(1)
    images, mask = torch.randn(2, 3, 128, 160), torch.zeros(2, 128, 160, dtype=torch.bool)
    mask[1, 96:], mask[1, :, 120:] = True, True              # the second image is smaller
    return images.masked_fill(mask[:, None], 0), mask

def targets():
    "Three objects in two images: boxes and labels as ours take them, and as theirs."
    boxes, labels = torch.tensor([[[.3, .4, .2, .3], [.6, .6, .3, .2]], [[.5, .5, .4, .4], [0, 0, 0, 0]]]), torch.tensor([[2, 5], [1, -1]])
    return boxes, labels, [dict(class_labels=c[c >= 0], boxes=b[c >= 0]) for b, c in zip(boxes, labels)]

def ask(model):
    images, mask = batch()
    with torch.no_grad(): return model(images, mask) if isinstance(model, Detector) else model(images, pixel_mask=(~mask).long())

def close(a, b, atol=1e-5): torch.testing.assert_close(a, b, rtol=0, atol=atol)

def same(preds, out, atol=1e-5):
    close(preds.logits[:, -1], out.logits, atol)
    close(preds.boxes[:, -1], out.pred_boxes, atol)
    assert min(preds.boxes[:, -1].std(1).min(), preds.logits[:, -1].std(1).min()) > 20 * atol     # not a comparison of constants

def weights_of(model): return {n: t for n, t in model.state_dict().items() if not n.endswith('num_batches_tracked')}

@pytest.fixture(scope='module', params=SYSTEMS)
def pair(request):
    "A model of theirs, and ours with its weights, read from memory."
    their_model = theirs(request.param)
    model = from_config(their_model.config.to_dict()).eval()
    report = load_weights(model, their_model.state_dict())
    assert report.layout == 'transformers/resnet' and not report.wrong and not report.dropped and not report.new
    return request.param, their_model, model

def test_same_layer_by_layer(pair, parity):
    "Tokens, memory after every encoder layer, proposals, references, states, logits and boxes of every decoder layer, in a padded batch."
    system, their_model, model = pair
    close = lambda what, a, b, mask=None: parity.close(NAME[system], 'transformers', what, a, b, 1e-5, mask=mask)
    seen, (images, mask), (_, _, dicts) = {}, batch(), targets()
    def keep(name, part, pick=lambda args, out: out): return part.register_forward_hook(lambda m, args, out: seen.setdefault(name, []).append(pick(args, out)))
    hooks = [keep('pyramid', model.neck), keep('start', model.queries), keep('references', model.heads, lambda args, out: (args[0], args[2], out[2]))]
    hooks += [keep('memory', o) for o in model.encoder.layers] + [keep('states', o) for o in model.decoder.layers]
    with torch.no_grad(): preds, out = model(images, mask), their_model(images, pixel_mask=(~mask).long(), labels=dicts, output_hidden_states=True)
    for h in hooks: h.remove()
    p, start = seen['pyramid'][0], seen['start'][0]
    for mine, told in zip([p.tokens, *seen['memory']], out.encoder_hidden_states, strict=True): close('tokens, and after each encoder layer', mine, told, ~p.mask[..., None])
    norm = getattr(model.decoder, 'norm', None) or getattr(model.heads, 'norm', None)
    if norm: seen['states'][-1] = norm(seen['states'][-1])                          # theirs norms the last one
    for mine, told in zip([(start if system != 'two_stage' else start[0]).content, *seen['states']], out.decoder_hidden_states, strict=True): close('states, before and after each decoder layer', mine, told)
    if 'intermediate_reference_points' in out:
        references = [o for o in seen['references'] if o[0] >= 0]
        close('references of all layers', references[0][1], out.init_reference_points)
        for mine, told in zip(references, out.intermediate_reference_points.unbind(1), strict=True): close('references of all layers', mine[2], told)
    if system == 'two_stage':
        dead = grid_proposals(p)[1]
        assert dead.any() and torch.equal(dead, out.enc_outputs_coord_logits.isinf().all(-1))
        close('proposals', preds.proposals.logits[:, 0], out.enc_outputs_class)
        close('proposals', preds.proposals.boxes[:, 0], out.enc_outputs_coord_logits.sigmoid())
    close('outputs', preds.logits[:, -1], out.logits); close('outputs', preds.boxes[:, -1], out.pred_boxes)
    if system.startswith('detr'): parity.left_out('DETR', 'transformers', 'outputs of the earlier layers: told only with `auxiliary_loss=True`, which changes them')
    elif their_model.config.auxiliary_loss:
        for layer, told in enumerate(out.auxiliary_outputs):
            close('outputs of the earlier layers', preds.logits[:, layer], told['logits']); close('outputs of the earlier layers', preds.boxes[:, layer], told['pred_boxes'])
        assert layer == LAYERS - 2
    same(preds, out)

def test_same_losses(pair, parity):
    "Each term of each layer, from their own matching, with their weights of the costs."
    system, their_model, model = pair
    (images, mask), (boxes, labels, dicts), c = batch(), targets(), their_model.config
    with torch.no_grad(): preds, out = ask(model), their_model(images, pixel_mask=(~mask).long(), labels=dicts)
    classify = SoftmaxLoss(c.eos_coefficient) if system.startswith('detr') else FocalLoss(c.focal_alpha)
    if not c.auxiliary_loss: preds = [o[:, -1:] for o in preds[:2]]
    loss = SetLoss(Matcher(classify, c.class_cost, c.bbox_cost, c.giou_cost), classify, 1., c.bbox_loss_coefficient, c.giou_loss_coefficient)
    name = 'softmax set loss' if system.startswith('detr') else "DAB-DETR's set loss" if system.startswith('dab') else 'focal set loss'
    total = loss(preds[:2], boxes, labels)
    parts, last = set_losses(classify, *preds[:2], boxes, labels, loss.pairs, 3), preds[0].shape[1] - 1
    for layer in range(last + 1):
        for mine, told in (('class', 'loss_ce'), ('box', 'loss_bbox'), ('giou', 'loss_giou')):
            parity.close(name, 'transformers', 'each loss of each layer', parts[mine][layer], out.loss_dict[told if layer == last else f'{told}_{layer}'], 1e-5, 1e-5)
    parity.close(name, 'transformers', 'their sum, weighted as theirs', total, out.loss, 1e-5, 1e-5)

def test_same_gradients(pair, parity):
    "Of a random sum of the outputs, to every weight that theirs trains."
    system, their_model, model = pair
    g = torch.Generator().manual_seed(2)
    images, mask = batch()
    logits, boxes = (o[:, -1] for o in model(images, mask)[:2])
    told = their_model(images, pixel_mask=(~mask).long())
    weights = [torch.randn(o.shape, generator=g) for o in (logits, boxes)]
    for m, outs in ((model, (logits, boxes)), (their_model, (told.logits, told.pred_boxes))):
        m.zero_grad()
        sum((o * w).sum() for o, w in zip(outs, weights)).backward()
    grad = lambda w: torch.zeros_like(w) if w.grad is None else w.grad
    mine, theirs_, parameters = {}, dict(their_model.named_parameters(remove_duplicate=False)), dict(model.named_parameters())
    for e in entries(model, 'transformers/resnet'):
        if not all(n in parameters for n in e.ours): continue                      # statistics of frozen norms
        w = theirs_[next(n for n in e.theirs if n in theirs_)]
        parts = [grad(parameters[n]) for n in e.ours]
        mine[w] = mine.get(w, 0) + (parts[0] if len(parts) == 1 else torch.cat(parts, e.dim))      # one tensor of theirs may be several of ours
    trained = [w for w in mine if w.requires_grad and grad(w).any()]
    for w in trained: parity.close(NAME[system], 'transformers', 'gradients', mine[w], grad(w), 1e-6, 2e-4)
    assert len(trained) > 60 and all(not mine[w].any() for w in mine if w.requires_grad and not grad(w).any())
    for m in (model, their_model): m.zero_grad()

def test_names_in_memory(pair):
    "To their layout and back: their names exactly, and their tensors."
    system, their_model, model = pair
    told, out = weights_of(their_model), to_layout(model, 'transformers/resnet')
    assert out.keys() == told.keys() and all(out[n].equal(told[n]) for n in told)

@pytest.mark.parametrize('files', [dict(), dict(max_shard_size='100KB')], ids=['one file', 'shards'])
def test_their_folders(pair, files, tmp_path):
    "What their library writes, version 4's names, is read by the folder alone."
    system, their_model, model = pair
    their_model.save_pretrained(tmp_path, **files)
    assert (tmp_path/'model.safetensors.index.json').is_file() == bool(files)
    other, report = load_pretrained(tmp_path)
    assert report.layout in ('transformers4/resnet', 'transformers/resnet') and not report.wrong and not report.new and not report.dropped
    assert (report.layout == 'transformers4/resnet') == ('dab' not in system)        # whose names did not change
    assert all(a.equal(b) for a, b in zip(ask(other)[:2], ask(model)[:2]))

def test_their_pickles(pair, tmp_path):
    system, their_model, model = pair
    their_model.config.save_pretrained(tmp_path)
    torch.save(their_model.state_dict(), tmp_path/'pytorch_model.bin')
    other, report = load_pretrained(tmp_path)
    assert not report.wrong and all(a.equal(b) for a, b in zip(ask(other)[:2], ask(model)[:2]))

@pytest.mark.parametrize('layout', ['transformers4/resnet', 'transformers/resnet'])
def test_our_folders(pair, layout, tmp_path):
    "What we write in their names and words, their library reads, and says the same."
    system, their_model, model = pair
    if system in ('refine', 'two_stage'):                       # six class heads that differ, as in official checkpoints
        with torch.no_grad():
            for i, head in enumerate(model.heads.heads): head.classes.bias.add_(i)
    model.save_pretrained(tmp_path, layout=layout)
    other, told = type(their_model).from_pretrained(tmp_path, output_loading_info=True)
    assert not told['missing_keys'] and not told['mismatched_keys'] and not [n for n in told['unexpected_keys'] if 'num_batches' not in n]
    same(ask(model), ask(other.eval()))
    words = json.loads((tmp_path/'config.json').read_text())
    assert from_config(words).config == from_config(their_model.config.to_dict()).config

@pytest.mark.parametrize('system', ['detr', 'plain', 'dab'])
def test_on_timm(system, tmp_path):
    "With timm's backbone, whose names are ours, in memory and in a folder, and back."
    pytest.importorskip('timm')
    their_model = theirs(system, 'timm')
    model = from_config(their_model.config.to_dict()).eval()
    assert load_weights(model, their_model.state_dict()).layout == 'transformers'
    same(ask(model), ask(their_model))
    assert to_layout(model, 'transformers').keys() == weights_of(their_model).keys()
    their_model.save_pretrained(tmp_path/'theirs')
    assert not load_pretrained(tmp_path/'theirs')[1].wrong
    model.save_pretrained(tmp_path/'ours', layout='transformers4')
    same(ask(model), ask(type(their_model).from_pretrained(tmp_path/'ours').eval()))

def test_any_timm_backbone():
    pytest.importorskip('timm')
    body = dict(model_type='timm_backbone', backbone='resnet10t', features_only=True, use_pretrained_backbone=False, out_indices=[2, 3, 4])
    their_model = transformers.DeformableDetrForObjectDetection(transformers.DeformableDetrConfig(backbone_config=body, **small, d_model=64))
    disturb(their_model)
    model = from_config(their_model.config.to_dict()).eval()
    assert not load_weights(model, their_model.state_dict()).wrong
    same(ask(model), ask(their_model.eval()))

def test_names_are_as_recorded(pair, tmp_path):
    "The lists in `names/` are what this version of their library has. DEFORMLIT_RECORD=1 writes them anew."
    from safetensors import safe_open
    system, their_model, _ = pair
    their_model.save_pretrained(tmp_path)
    with safe_open(tmp_path/'model.safetensors', 'pt') as f: disk = {n: f.get_tensor(n) for n in f.keys()}
    for layout, weights in (('transformers', weights_of(their_model)), ('transformers4', {n: t for n, t in disk.items() if 'num_batches' not in n})):
        lines = ''.join(f'{n} {"x".join(map(str, t.shape))}\n' for n, t in sorted(weights.items()))
        file = NAMES/f'{layout}_{system}.txt'
        if os.environ.get('DEFORMLIT_RECORD'): file.write_text(lines)
        assert file.read_text() == lines
    config = {k: v for k, v in json.loads((tmp_path/'config.json').read_text()).items() if k != 'transformers_version'}
    file = NAMES/f'transformers_{system}.json'
    if os.environ.get('DEFORMLIT_RECORD'): file.write_text(json.dumps(config, indent=1, sort_keys=True) + '\n')
    assert from_transformers(json.loads(file.read_text())) == from_transformers(config)
