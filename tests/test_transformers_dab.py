"""Our DAB-DETR against that of transformers, with random weights, layer by layer."""
import os, re
os.environ.setdefault('HF_HUB_OFFLINE', '1')

import pytest, torch
from torch import nn
transformers = pytest.importorskip('transformers')
if not hasattr(transformers, 'DabDetrConfig'): pytest.skip('this transformers has no DAB-DETR', allow_module_level=True)

from deformlit.anchors import *
from deformlit.backbones import Bottleneck, ResNet
from deformlit.checkpoints import load_weights
from deformlit.dab_detr import *
from deformlit.detr import MapNeck
from deformlit.layers import SinePosition

DIM, CLASSES, QUERIES = 32, 7, 9

def theirs(**options):
    "A tiny model of theirs, with noise on every tensor, so that no zero or one of the first weights hides a mistake."
    backbone = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[16, 24, 32, 48], depths=[1, 2, 1, 1], out_features=['stage4'])
    config = transformers.DabDetrConfig(backbone_config=backbone, use_timm_backbone=False, use_pretrained_backbone=False, num_labels=CLASSES, hidden_size=DIM, encoder_layers=2, decoder_layers=3,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, num_queries=QUERIES, auxiliary_loss=True, **options)
    torch.manual_seed(0)
    model, seen = transformers.DabDetrForObjectDetection(config), set()
    with torch.no_grad():
        for name, t in model.state_dict(keep_vars=True).items():
            if not t.is_floating_point() or t.data_ptr() in seen: continue
            seen.add(t.data_ptr())
            t.copy_(.5 + torch.rand_like(t) if 'running_var' in name else t + (.12 if 'backbone' in name or 'bbox' in name else .25) * torch.randn_like(t))
    return model.eval()

# Their names, in the official ones; their backbone's in ours
TABLE = [
    (r'model\.backbone\.conv_encoder\.model\.embedder\.embedder\.convolution', 'backbone.0.body.conv1'),
    (r'model\.backbone\.conv_encoder\.model\.embedder\.embedder\.normalization', 'backbone.0.body.bn1'),
    (r'model\.backbone\.conv_encoder\.model\.encoder\.stages\.(\d)\.layers\.(\d+)\.shortcut\.convolution', lambda m: f'backbone.0.body.layer{int(m[1]) + 1}.{m[2]}.downsample.0'),
    (r'model\.backbone\.conv_encoder\.model\.encoder\.stages\.(\d)\.layers\.(\d+)\.shortcut\.normalization', lambda m: f'backbone.0.body.layer{int(m[1]) + 1}.{m[2]}.downsample.1'),
    (r'model\.backbone\.conv_encoder\.model\.encoder\.stages\.(\d)\.layers\.(\d+)\.layer\.(\d)\.convolution', lambda m: f'backbone.0.body.layer{int(m[1]) + 1}.{m[2]}.conv{int(m[3]) + 1}'),
    (r'model\.backbone\.conv_encoder\.model\.encoder\.stages\.(\d)\.layers\.(\d+)\.layer\.(\d)\.normalization', lambda m: f'backbone.0.body.layer{int(m[1]) + 1}.{m[2]}.bn{int(m[3]) + 1}'),
    (r'^model\.query_refpoint_embeddings', 'refpoint_embed'), (r'^model\.input_projection', 'input_proj'), (r'^model\.patterns', 'transformer.patterns'), (r'^bbox_predictor', 'bbox_embed'),
    (r'^model\.', 'transformer.'), (r'decoder\.layernorm', 'decoder.norm'), (r'\.mlp\.', '.'), (r'\.activation_fn\.', '.activation.'), (r'\.fc(\d)\.', r'.linear\1.'),
    (r'self_attn\.self_attn\.output_proj', 'self_attn.out_proj'), (r'cross_attn\.cross_attn\.output_proj', 'cross_attn.out_proj'),
    (r'self_attn\.self_attn_layer_norm', 'norm1'), (r'cross_attn\.cross_attn_layer_norm', 'norm2'), (r'(encoder\.layers\.\d+)\.self_attn_layer_norm', r'\1.norm1'),
    (r'(encoder\.layers\.\d+)\.final_layer_norm', r'\1.norm2'), (r'final_layer_norm', 'norm3'),
    (r'self_attn\.self_attn_(query|key)_(content|pos)_proj', lambda m: f'sa_{m[1][0]}{m[2]}_proj'), (r'self_attn\.self_attn_value_proj', 'sa_v_proj'),
    (r'cross_attn\.cross_attn_query_pos_sine_proj', 'ca_qpos_sine_proj'), (r'cross_attn\.cross_attn_(query|key)_(content|pos)_proj', lambda m: f'ca_{m[1][0]}{m[2]}_proj'),
    (r'cross_attn\.cross_attn_value_proj', 'ca_v_proj'),
]

def official(state):
    "Their state dict under the official names."
    out = {}
    for name, t in state.items():
        for pattern, new in TABLE: name = re.sub(pattern, new, name)
        out[name] = t
    for name in [n for n in out if re.search(r'encoder\.layers\.\d+\.self_attn\.q_proj', n)]:
        out[name.replace('q_proj.', 'in_proj_')] = torch.cat([out.pop(name.replace('q_proj', c + '_proj')) for c in 'qkv'])
    return {n: t for n, t in out.items() if not n.endswith('num_batches_tracked')}

def ours(state, patterns=0, keep=False, temperatures=(20., 20.)):
    layer = dict(dim=DIM, num_heads=4, dim_ffn=48)
    backbone = ResNet(Bottleneck, (1, 2, 1, 1), (4, 6, 8, 12), stem=8, out_indices=(3,))
    position = AnchorPosition(DIM, 4, ContentScale(DIM), SizeModulation(DIM))
    model = DABDETR(backbone, MapNeck(backbone.channels, DIM, SinePositionYX(DIM, *temperatures)), ScaledEncoder(2, **layer),
                    AnchorQueries(Anchors(QUERIES), PatternContent(patterns, DIM) if patterns else EmptyContent(DIM)),
                    AnchorDecoder(3, position, PositionedCrossAttention if keep else AnchorCrossAttention, **layer), MovingHeads(DIM, CLASSES, 3))
    assert not load_weights(model, state, 'official').wrong         # every name has its place
    return model.eval()

@pytest.mark.parametrize('options,mine', [({}, {}), (dict(num_patterns=2), dict(patterns=2)), (dict(keep_query_pos=True), dict(keep=True)),
                                          (dict(temperature_height=10, temperature_width=30), dict(temperatures=(10., 30.)))], ids=['default', 'patterns', 'keep_query_pos', 'temperatures'])
def test_same_layer_by_layer(options, mine, parity):
    their_model = theirs(**options)
    model, seen = ours(official(their_model.state_dict()), **mine), {}
    def keep(name, part, pick): part.register_forward_hook(lambda m, args, out: seen.setdefault(name, []).append(pick(args, out)))
    keep('neck', model.neck, lambda args, out: out)
    keep('memory', model.encoder, lambda args, out: out)
    keep('states', model.heads.norm, lambda args, out: out)
    keep('references', model.heads, lambda args, out: args[2])
    torch.manual_seed(1)
    images, mask = torch.randn(2, 3, 128, 160), torch.zeros(2, 128, 160, dtype=torch.bool)
    mask[1, 96:], mask[1, :, 120:] = True, True
    images = images.masked_fill(mask[:, None], 0)
    with torch.no_grad(): preds, out = model(images, mask), their_model(images, pixel_mask=(~mask).long(), output_hidden_states=True)
    close = lambda a, b, what='states and references of each layer, with other options': parity.close('DAB-DETR', 'transformers', what, a, b, 1e-5)
    valid = ~seen['neck'][0].mask
    close(seen['memory'][0][valid], out.encoder_last_hidden_state[valid], 'encoder, with other options')
    close(preds.logits[:, -1], out.logits, 'outputs, with other options'); close(preds.boxes[:, -1], out.pred_boxes, 'outputs, with other options')
    states, references = torch.stack(seen['states']), torch.stack(seen['references'])
    with torch.no_grad(): inner = their_model.model(images, pixel_mask=(~mask).long())
    close(states, inner.intermediate_hidden_states.view_as(states)); close(references, inner.reference_points.view_as(references))
    assert min(preds.boxes[:, -1].std(1).min(), preds.logits[:, -1].std(1).min()) > 1e-3     # not a comparison of constants
