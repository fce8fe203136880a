"""Deformable DETR as a whole: compiled, at odd sizes, and its first weights."""
import math

import pytest, torch
from torch import nn

from deformlit.backbones import ResNet
from deformlit.detr import *
from deformlit.deformable_detr import *
from deformlit.multiscale import star

class Trunk(nn.Module):
    "The smallest backbone: maps of stride 8 and 16."
    channels, strides = [8, 12], [8, 16]
    def __init__(self):
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(3, 8, 8, 8, padding=4), nn.Conv2d(8, 12, 3, 2, 1)
    def forward(self, images):
        x = self.fine(images)
        return [x, self.coarse(x)]

def small(heads=SharedHead, num_classes=5, num_queries=6, **kwargs):
    torch.manual_seed(0)
    return deformable_detr(num_classes, Trunk(), heads, dim=32, num_heads=4, num_levels=3, num_queries=num_queries, num_encoder_layers=1, num_decoder_layers=2,
                           dim_ffn=16, groups=8, **kwargs)

def batch(h, w, valid=(0.7, 0.8)):
    g = torch.Generator().manual_seed(h)
    images, mask = torch.rand(2, 3, h, w, generator=g), torch.zeros(2, h, w, dtype=torch.bool)
    mask[1, int(h * valid[1]):], mask[1, :, int(w * valid[0]):] = True, True
    return images, mask

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
    for a, b in zip(found[0][0], found[1][0]): torch.testing.assert_close(a, b)
    for a, b in zip(found[0][1], found[1][1]): torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)

@pytest.mark.slow
def test_one_graph_for_all_sizes():
    model = small(RefiningHeads).eval()
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True, dynamic=True)
    with torch.no_grad():
        for h, w in ((64, 96), (96, 128), (160, 96)):
            for a, b in zip(model(*batch(h, w)), compiled(*batch(h, w))): torch.testing.assert_close(a, b)

@pytest.mark.parametrize('heads', [SharedHead, RefiningHeads])
def test_at_the_edges(heads):
    "One class, one query, one image; maps of one pixel; sizes that no stride divides."
    model = small(heads, num_classes=1, num_queries=1).eval()
    for h, w in ((32, 32), (33, 71), (100, 35)):
        images = torch.rand(1, 3, h, w)
        before = images.clone()
        with torch.no_grad(): preds, again = model(images), model(images)
        assert preds.logits.shape == (1, 2, 1, 1) and preds.boxes.shape == (1, 2, 1, 4) and preds.boxes.dtype == torch.float32
        assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(preds, again)) and torch.equal(images, before)
        assert detect(preds).scores.shape == (1, 1)

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
    model, (images, mask) = small(RefiningHeads).eval(), batch(64, 96)
    with torch.no_grad(): single, double = model(images, mask), model.double()(images.double(), mask)
    assert double.boxes.dtype == torch.float64
    torch.testing.assert_close(double.boxes, single.boxes.double(), atol=1e-5, rtol=1e-5)

# ---- first weights, as in the official code

def uniform(w, bound): assert w.abs().max() <= bound and w.abs().max() > 0.9 * bound and abs(w.std() / (bound / 3**0.5) - 1) < 0.1

def test_first_weights():
    torch.manual_seed(0)
    model = deformable_detr(91, ResNet(), RefiningHeads, num_encoder_layers=1, num_decoder_layers=2)
    xavier = lambda rows, cols: math.sqrt(6 / (rows + cols))
    layer, head = model.decoder.layers[0], model.heads.heads
    for w in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj): uniform(w.weight, xavier(768, 256))
    for w in (layer.self_attn.out_proj, layer.cross_attn.value_proj, layer.cross_attn.out_proj): uniform(w.weight, xavier(256, 256))
    for w in (layer.ffn.linear1, layer.ffn.linear2, model.encoder.layers[0].ffn.linear1): uniform(w.weight, xavier(1024, 256))
    for conv, _ in model.neck.convs: uniform(conv.weight, xavier(*(n * conv.kernel_size[0]**2 for n in conv.weight.shape[:2]))); assert not conv.bias.any()
    uniform(model.queries.reference.weight, xavier(2, 256))
    for attn in (layer.cross_attn, model.encoder.layers[0].attn):
        assert not attn.offsets.weight.any() and not attn.weights.weight.any() and not attn.weights.bias.any()
        assert torch.equal(attn.offsets.bias, star(8, 4, 4).flatten())
    for w in (layer.self_attn.q_proj, layer.self_attn.out_proj, layer.cross_attn.value_proj, model.queries.reference): assert not w.bias.any()
    for e in (model.queries.content.weight, model.queries.position.weight, model.neck.level_embed): assert abs(e.std() - 1) < 0.05
    uniform(layer.ffn.linear1.bias, 1 / 16)                                                 # left as PyTorch makes them
    uniform(head[0].classes.weight, 1 / 16)
    torch.testing.assert_close(head[1].classes.bias.sigmoid(), torch.full((91,), 0.01))
    assert not head[0].box[-1].weight.any() and head[0].box[-1].bias.tolist() == [0, 0, -2, -2] and not head[1].box[-1].bias.any()
    assert torch.equal(head[0].box[0].weight, head[1].box[0].weight)                        # the heads start as copies
    assert SharedHead(256, 91, 6).head.box[-1].bias.tolist() == [0, 0, -2, -2]
