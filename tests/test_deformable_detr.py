"""The Deformable DETR family as a whole: compiled, exported, in reduced precision, at odd sizes, and its first weights."""
import math

import pytest, torch, torch._dynamo.testing
from torch import nn

from deformlit.backbones import ResNet
from deformlit.core import needs_compiler
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

def two(num_classes=5, num_queries=6, levels=3, layers=2, backbone=None, **kwargs):
    torch.manual_seed(0)
    return two_stage_detr(num_classes, backbone or Trunk(), dim=32, num_heads=4, num_levels=levels, num_queries=num_queries, num_encoder_layers=1, num_decoder_layers=layers,
                          dim_ffn=16, groups=8, **kwargs)

class Coarse(Trunk):
    "One map alone."
    channels, strides = [12], [16]
    def forward(self, images): return super().forward(images)[1:]

class DC5(Trunk):
    "One map, whose stride a dilation keeps."
    channels, strides = [12], [8]
    def __init__(self):
        super().__init__()
        self.coarse = nn.Conv2d(8, 12, 3, 1, 2, dilation=2)
    def forward(self, images): return super().forward(images)[1:]

def single(backbone, make=small, **kwargs):
    torch.manual_seed(0)
    if make is two: return two(levels=1, backbone=backbone, **kwargs)
    return deformable_detr(kwargs.pop('num_classes', 5), backbone, RefiningHeads, dim=32, num_heads=4, num_levels=1, num_queries=kwargs.pop('num_queries', 6),
                           num_encoder_layers=1, num_decoder_layers=2, dim_ffn=16, groups=8, **kwargs)

FAMILY = {'plain': small, 'refine': lambda **kwargs: small(RefiningHeads, **kwargs), 'two_stage': two,
          'single': lambda **kwargs: single(Coarse(), **kwargs), 'dc5': lambda **kwargs: single(DC5(), **kwargs), 'dc5_two_stage': lambda **kwargs: single(DC5(), two, **kwargs)}
each = pytest.mark.parametrize('name', FAMILY)

def batch(h, w, valid=(0.7, 0.8)):
    g = torch.Generator().manual_seed(h)
    images, mask = torch.rand(2, 3, h, w, generator=g), torch.zeros(2, h, w, dtype=torch.bool)
    mask[1, int(h * valid[1]):], mask[1, :, int(w * valid[0]):] = True, True
    return images, mask

def flat(preds):
    "All tensors of predictions, those of proposals too."
    return [o for x in preds for o in (x if isinstance(x, tuple) else [x])]

# ---- compiled and exported

@pytest.mark.parametrize('make', [small, two])
def test_one_graph(make):
    "Forward and backward in one graph each, as training needs it; the numbers do not change."
    model = make(drop=0.)
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    given, found = batch(64, 96), []
    for m in (model, compiled):
        model.zero_grad()
        preds = flat(m(*given))
        sum(o.square().sum() for o in preds).backward()
        found.append((preds, [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    for a, b in zip(found[0][0], found[1][0]): torch.testing.assert_close(a, b)
    for a, b in zip(found[0][1], found[1][1]): torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)

def compiled_once(model, backend, **close):
    "What was compiled for the first image serves images of all sizes."
    torch._dynamo.reset()
    graphs, counts = torch._dynamo.testing.CompileCounterWithBackend(backend), []
    compiled = torch.compile(model.eval(), backend=graphs, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for h, w in ((64, 96), (96, 128), (160, 96), (72, 200)):
            for a, b in zip(flat(model(*batch(h, w))), flat(compiled(*batch(h, w)))): torch.testing.assert_close(a, b, **close)
            counts.append(graphs.frame_count)
    assert len(set(counts)) == 1, f'graphs after each size: {counts}'

@pytest.mark.parametrize('name', [pytest.param(n, marks=() if n == 'two_stage' else pytest.mark.slow) for n in FAMILY])
def test_one_graph_for_all_sizes(name): compiled_once(FAMILY[name](), 'aot_eager')

@pytest.mark.slow
@pytest.mark.skipif(needs_compiler() is not None, reason=str(needs_compiler()))
def test_inductor(): compiled_once(two(), 'inductor', atol=1e-4, rtol=1e-4)

@each
def test_export(name):
    model, given = FAMILY[name]().eval(), batch(64, 96)
    program = torch.export.export(model, given, strict=False)
    other = batch(64, 96, (0.4, 0.9))
    for a, b in zip(flat(program.module()(*other)), flat(model(*other))): torch.testing.assert_close(a, b)

# ---- reduced precision

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@each
def test_autocast(name, dtype):
    "Where something is stays in float32: references, steps of the box heads, boxes. The rest may be rounded."
    model, given = FAMILY[name]().eval(), batch(64, 96)
    with torch.no_grad():
        for head in getattr(model.heads, 'heads', [getattr(model.heads, 'head', None)]): head.box[-1].weight.normal_(0, 0.05)    # else all steps are zero
        want, seen = flat(model(*given)), dict(reference=[], step=[], layers=[])
        for layer in model.decoder.layers:
            layer.cross_attn.register_forward_pre_hook(lambda m, args: seen['reference'].append(args[1].dtype))
            layer.ffn.linear1.register_forward_hook(lambda m, args, out: seen['layers'].append(out.dtype))
        for m in model.heads.modules():
            if isinstance(m, Head): m.box.register_forward_hook(lambda m, args, out: seen['step'].extend([args[0].dtype, out.dtype]))
        model.queries.register_forward_hook(lambda m, args, out: seen['reference'].append((out if isinstance(out, Start) else out[0]).reference.dtype))
        with torch.autocast('cpu', dtype): found = flat(model(*given))
    assert set(seen['reference']) == set(seen['step']) == {torch.float32} and set(seen['layers']) == {dtype}
    assert all(o.dtype == torch.float32 for o in found[1::2])
    for a, b in list(zip(found, want))[:2] if 'two' not in name else list(zip(found, want))[2:]:       # rounding may choose other proposals
        torch.testing.assert_close(a.float(), b, atol=0.1, rtol=0.05)

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_trains(dtype):
    model = two(drop=0.)
    with torch.autocast('cpu', dtype): preds = flat(model(*batch(64, 96)))
    sum(o.float().square().mean() for o in preds).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters()) and model.queries.token_proj.weight.grad.any()

# ---- at the edges

@each
def test_at_the_edges(name):
    "One class, one query, one image; maps of one pixel; sizes that no stride divides."
    model = FAMILY[name](num_classes=1, num_queries=1).eval()
    for h, w in ((8, 8), (32, 32), (33, 71), (100, 35)):
        images = torch.rand(1, 3, h, w)
        before = images.clone()
        with torch.no_grad(): preds, again = model(images), model(images)
        assert preds.logits.shape == (1, 2, 1, 1) and preds.boxes.shape == (1, 2, 1, 4) and preds.boxes.dtype == torch.float32
        assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(flat(preds), flat(again))) and torch.equal(images, before)
        assert detect(preds).scores.shape == (1, 1)

@each
def test_no_input_is_changed(name):
    "In training too."
    model, given = FAMILY[name]().train(), batch(64, 96)
    before = [o.clone() for o in given]
    given[0].requires_grad_()
    sum(o.sum() for o in flat(model(*given))).backward()
    assert all(torch.equal(a, b) for a, b in zip(given, before)) and given[0].grad.any()

@each
def test_neighbours_do_not_matter(name):
    "An image of a batch gets the answer that it gets alone, with the same padding."
    model, (images, mask) = FAMILY[name]().eval(), batch(64, 96)
    with torch.no_grad():
        both = flat(model(images, mask))
        for i in range(2):
            for a, b in zip(flat(model(images[i:i+1], mask[i:i+1])), both): torch.testing.assert_close(a, b[i:i+1], atol=1e-5, rtol=1e-5)

@pytest.mark.parametrize('levels', [2, 3, 5, 6])
@pytest.mark.parametrize('heads', [SharedHead, RefiningHeads, ProposalHeads])
def test_any_number_of_levels(levels, heads):
    make = two_stage_detr if heads is ProposalHeads else deformable_detr
    model = make(3, Trunk(), heads, dim=32, num_heads=4, num_levels=levels, num_queries=4, num_encoder_layers=1, num_decoder_layers=2, dim_ffn=16, groups=8).eval()
    memory, p = model.encode(*batch(64, 96))
    assert len(p.shapes) == levels and p.shapes[1:] == [((h + 1) // 2, (w + 1) // 2) for h, w in p.shapes[:-1]] and memory.shape[1] == sum(h * w for h, w in p.shapes)
    with torch.no_grad(): assert all(o.isfinite().all() for o in flat(model(*batch(64, 96))))

def test_no_mask_is_no_padding():
    model, (images, mask) = small().eval(), batch(64, 96)
    with torch.no_grad():
        for a, b in zip(model(images), model(images, torch.zeros_like(mask))): assert torch.equal(a, b)

def test_dropout_only_in_training():
    model, given = small().train(), batch(64, 96)
    assert not torch.equal(model(*given).logits, model(*given).logits)
    model.eval()
    assert torch.equal(model(*given).logits, model(*given).logits)

@each
def test_double_precision(name):
    model, (images, mask) = FAMILY[name]().eval(), batch(64, 96)
    with torch.no_grad(): once, twice = flat(model(images, mask)), flat(model.double()(images.double(), mask))
    for a, b in zip(once, twice):
        assert b.dtype == torch.float64
        torch.testing.assert_close(b, a.double(), atol=1e-5, rtol=1e-5)

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
