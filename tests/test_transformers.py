"""Our detectors against those of transformers, with random weights: same logits, same boxes, and weights that go both ways, in memory and in folders."""
import json, os
from pathlib import Path
os.environ.setdefault('HF_HUB_OFFLINE', '1')

import pytest, torch
transformers = pytest.importorskip('transformers')

from deformlit.checkpoints import from_config, from_transformers, layouts, load_pretrained, load_weights, to_layout
from deformlit.detr import Detector

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

def test_same_layer_by_layer(pair):
    system, their_model, model = pair
    seen = dict(memory=[], states=[], masks=[])
    model.neck.register_forward_hook(lambda m, args, out: seen['masks'].append(out.mask))
    model.encoder.register_forward_hook(lambda m, args, out: seen['memory'].append(out))
    for layer in model.decoder.layers: layer.register_forward_hook(lambda m, args, out: seen['states'].append(out))
    preds, out = ask(model), ask(their_model)
    same(preds, out)
    if 'detr' in system: close(model.decoder.norm(seen['states'][-1]), out.last_hidden_state)
    elif 'dab' in system: close(model.heads.norm(seen['states'][-1]), out.last_hidden_state)
    else: close(torch.stack(seen['states'], 1), out.intermediate_hidden_states)
    valid = ~seen['masks'][0]
    if 'dab' not in system: close(seen['memory'][0][valid], out.encoder_last_hidden_state[valid])       # theirs is not told for DAB-DETR
    if system == 'two_stage':
        proposals, found = preds.proposals, out.enc_outputs_class.isfinite().all(-1) & valid
        close(proposals.logits[:, 0][found], out.enc_outputs_class[found])

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

def test_detr_with_their_auxiliary_loss():
    "Theirs writes the normed state back into the decoder when it is asked for auxiliary losses, and so says something else; official code and ours do not."
    their_model = theirs('detr')
    model = from_config(their_model.config.to_dict()).eval()
    load_weights(model, their_model.state_dict())
    same(ask(model), ask(their_model))
    their_model.config.auxiliary_loss = True
    for m in their_model.modules():
        if hasattr(m, 'config'): m.config.auxiliary_loss = True
    assert (ask(their_model).logits - ask(model).logits[:, -1]).abs().max() > 1e-3

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
