"""Our DETR against that of transformers, with random weights, layer by layer, and where theirs does something else."""
import os, re
os.environ.setdefault('HF_HUB_OFFLINE', '1')

import pytest, torch
transformers = pytest.importorskip('transformers')

from deformlit.backbones import Bottleneck, ResNet
from deformlit.detr import detr

DIM, CLASSES, LAYERS = 64, 7, 3

def theirs(auxiliary_loss):
    backbone = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[16, 24, 32, 48], depths=[1, 2, 1, 1], out_features=['stage4'])
    config = transformers.DetrConfig(
        backbone_config=backbone, use_timm_backbone=False, use_pretrained_backbone=False, num_labels=CLASSES, d_model=DIM, encoder_layers=2, decoder_layers=LAYERS,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, num_queries=11, auxiliary_loss=auxiliary_loss)
    torch.manual_seed(0)
    model = transformers.DetrForObjectDetection(config)
    with torch.no_grad():                                    # noise on every tensor, so that no zero or one of the first weights hides a mistake
        for name, w in model.state_dict(keep_vars=True).items():
            if w.is_floating_point(): w.copy_(0.5 + torch.rand_like(w) if 'running_var' in name else w + 0.08 * torch.randn_like(w))
        # theirs start so much alike that all queries would say the same
        model.model.query_position_embeddings.weight.normal_(0, 2)
        for layer in model.bbox_predictor.layers: layer.weight.mul_(3)
    return model.eval()

# Their names in ours, as a table of this test alone. Their stages of the backbone count from 0 where ours are layer1 to layer4.
TABLE = [
    (r'model\.backbone\.model\.embedder\.embedder\.convolution', 'backbone.conv1'),
    (r'model\.backbone\.model\.embedder\.embedder\.normalization', 'backbone.bn1'),
    (r'model\.backbone\.model\.encoder\.stages\.(\d)\.layers\.(\d+)\.shortcut\.convolution', lambda m: f'backbone.layer{int(m[1]) + 1}.{m[2]}.downsample.0'),
    (r'model\.backbone\.model\.encoder\.stages\.(\d)\.layers\.(\d+)\.shortcut\.normalization', lambda m: f'backbone.layer{int(m[1]) + 1}.{m[2]}.downsample.1'),
    (r'model\.backbone\.model\.encoder\.stages\.(\d)\.layers\.(\d+)\.layer\.(\d)\.convolution', lambda m: f'backbone.layer{int(m[1]) + 1}.{m[2]}.conv{int(m[3]) + 1}'),
    (r'model\.backbone\.model\.encoder\.stages\.(\d)\.layers\.(\d+)\.layer\.(\d)\.normalization', lambda m: f'backbone.layer{int(m[1]) + 1}.{m[2]}.bn{int(m[3]) + 1}'),
    (r'model\.input_projection\.', 'neck.conv.'), (r'model\.query_position_embeddings\.', 'queries.position.'), (r'model\.decoder\.layernorm', 'decoder.norm'),
    (r'model\.encoder\.layers\.(\d+)\.self_attn_layer_norm', r'encoder.layers.\1.residual1.norm'), (r'model\.encoder\.layers\.(\d+)\.final_layer_norm', r'encoder.layers.\1.residual2.norm'),
    (r'model\.encoder\.layers\.(\d+)\.self_attn\.', r'encoder.layers.\1.attn.'),
    (r'model\.decoder\.layers\.(\d+)\.self_attn_layer_norm', r'decoder.layers.\1.residual1.norm'), (r'model\.decoder\.layers\.(\d+)\.encoder_attn_layer_norm', r'decoder.layers.\1.residual2.norm'),
    (r'model\.decoder\.layers\.(\d+)\.final_layer_norm', r'decoder.layers.\1.residual3.norm'), (r'model\.decoder\.layers\.(\d+)\.encoder_attn\.', r'decoder.layers.\1.cross_attn.'),
    (r'model\.', ''), (r'(mlp\.)?fc(\d)\.', r'ffn.linear\2.'), (r'\.o_proj\.', '.out_proj.'), (r'class_labels_classifier', 'heads.classes'),
    (r'bbox_predictor\.layers\.(\d)', lambda m: f'heads.box.{2 * int(m[1])}'),
]

def ours(state):
    model, out = detr(CLASSES, ResNet(Bottleneck, (1, 2, 1, 1), (4, 6, 8, 12), stem=8, out_indices=(3,)), DIM, 4, 11, 2, LAYERS, 48), {}
    for name, t in state.items():
        for pattern, new in TABLE: name = re.sub(pattern, new, name)
        if not name.endswith('num_batches_tracked'): out[name] = t
    model.load_state_dict(out)                              # strict
    return model.eval()

def padded_batch():
    torch.manual_seed(1)
    images, mask = torch.randn(2, 3, 128, 160), torch.zeros(2, 128, 160, dtype=torch.bool)
    mask[1, 96:], mask[1, :, 120:] = True, True
    return images.masked_fill(mask[:, None], 0), mask

def test_same_layer_by_layer():
    "Layer by layer, with padding: the map, the memory, every decoder layer before and after its norm, logits, boxes."
    their_model = theirs(auxiliary_loss=False)
    model, (images, mask) = ours(their_model.state_dict()), padded_batch()
    theirs_seen, states, normed = [], [], []
    for layer in their_model.model.decoder.layers: layer.register_forward_hook(lambda m, args, out: theirs_seen.append(out[0] if isinstance(out, tuple) else out))
    for layer in model.decoder.layers: layer.register_forward_hook(lambda m, args, out: states.append(out))
    model.decoder.norm.register_forward_hook(lambda m, args, out: normed.append(out))
    with torch.no_grad(): preds, (memory, p), out = model(images, mask), model.encode(images, mask), their_model(images, pixel_mask=(~mask).long())
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    close(memory, out.encoder_last_hidden_state)
    close(torch.stack(states), torch.stack(theirs_seen))
    close(normed[-1], out.last_hidden_state)
    close(preds.logits[:, -1], out.logits)
    close(preds.boxes[:, -1], out.pred_boxes)
    assert p.mask.any() and min(preds.boxes[:, -1].std(1).min(), preds.logits[:, -1].std(1).min()) > 1e-3

def test_their_auxiliary_loss_changes_the_forward():
    "With `auxiliary_loss=True` their decoder hands the normalised state on. Official code does not, whatever losses are asked for, and neither do we: ours is the model with False."
    plain, told = theirs(False), theirs(True)
    told.load_state_dict(plain.state_dict())
    model, (images, mask) = ours(plain.state_dict()), padded_batch()
    with torch.no_grad():
        preds, a, b = model(images, mask), plain(images, pixel_mask=(~mask).long()), told(images, pixel_mask=(~mask).long())
        torch.testing.assert_close(preds.logits[:, -1], a.logits, rtol=0, atol=1e-5)
        if (a.logits - b.logits).abs().max() < 1e-3: pytest.skip('mended in this transformers')
        memory, p = model.encode(images, mask)               # what theirs does then, with our parts
        x, u, _ = model.queries(memory, p)
        for layer in model.decoder.layers: x = model.decoder.norm(layer(x, u, memory, p))
        writes_back = [model.heads(0, o, None)[0] for o in (x, model.decoder.norm(x))]
    assert min((b.logits - o).abs().max() for o in writes_back) < 1e-5
    assert (preds.logits[:, -1] - b.logits).abs().max() > 0.01
