"""Two stages: the proposals against the loop and the published formulas, what is cut and what learns, padding, first weights, full size."""
import json, math, os
from pathlib import Path

import matplotlib.pyplot as plt
import pytest, torch
from torch.testing import assert_close

from deformlit.backbones import ResNet
from deformlit.checkpoints import entries, load_weights, to_layout
from deformlit.core import ArgumentError
from deformlit.deformable_detr import *
from deformlit.detr import *
from deformlit.layers import SinePosition, sine_encoding_loop
from deformlit.points import valid_ratios
from deformlit.set_loss import SetLoss
from test_deformable_detr import FAMILY, batch, two, uniform

golden = Path(os.environ.get('DEFORMLIT_GOLDEN', Path(__file__).parents[1]/'../shared/golden/A'))

def disturb(model, noise=0.1):
    torch.manual_seed(1)
    with torch.no_grad():
        for w in model.parameters(): w.add_(noise * torch.randn_like(w))
    return model

def pyramid(shapes, valid, dim=32, seed=0):
    "Random tokens on levels of which only the upper left parts are image."
    g, maps, masks = torch.Generator().manual_seed(seed), [], []
    for l, (h, w) in enumerate(shapes):
        m = torch.ones(len(valid), h, w, dtype=torch.bool)
        for i, sizes in enumerate(valid): m[i, :sizes[l][0], :sizes[l][1]] = False
        masks.append(m); maps.append(torch.randn(len(valid), dim, h, w, generator=g))
    flat = lambda ts: torch.cat([t.flatten(2) for t in ts], 2).transpose(1, 2)
    return Pyramid(flat(maps), flat([SinePosition(dim, offset=-0.5)(m) for m in masks]), torch.cat([m.flatten(1) for m in masks], 1),
                   list(shapes), torch.stack([valid_ratios(m) for m in masks], 1))

# ---- the grid

LEVELS = {'even': (((8, 12), (4, 6), (2, 3)), [((8, 12), (4, 6), (2, 3))]),
          'padded': (((8, 12), (4, 6), (2, 3)), [((8, 12), (4, 6), (2, 3)), ((5, 7), (3, 4), (2, 2)), ((1, 12), (1, 6), (1, 3))]),
          'fifty': (((3, 60), (2, 50)), [((3, 50), (2, 25)), ((3, 60), (2, 50))]),            # 0.5 / 50 is 0.01, which is out
          'many': (((4, 5), (2, 3), (1, 2), (1, 1), (1, 1), (1, 1)), [((4, 5), (2, 3), (1, 2), (1, 1), (1, 1), (1, 1))]),   # 0.05 * 32 is more than the image
          'one': (((1, 1),), [((1, 1),)])}

@pytest.mark.parametrize('name', LEVELS)
@pytest.mark.parametrize('size', [0.05, 0.2])
def test_grid_is_the_loops(name, size):
    shapes, valid = LEVELS[name]
    p = pyramid(shapes, valid)
    boxes, dead = grid_proposals(p, size)
    for i, tokens in enumerate(proposals_loop(shapes, valid, size)):
        assert dead[i].tolist() == [o is None for o in tokens]
        live = [o for o in tokens if o is not None]
        if live: assert_close(boxes[i][~dead[i]], torch.tensor(live))

def test_the_border_of_the_grid_is_exact():
    "The border falls on tokens at 50, 150, ... columns: whether these are in must not hang on rounding, whatever the padding."
    for valid in range(1, 201):
        for w in {valid, valid + 1, valid + 37, 256}:
            dead = grid_proposals(pyramid(((1, w),), [((1, valid),)], dim=4))[1][0, :valid]
            x = (torch.arange(valid) + 0.5) / valid
            assert torch.equal(dead, (x <= 0.01) | (x >= 0.99))

# ---- the published formulas, in logits and with infinities

def restated(queries, heads, memory, p):
    "What official code computes, step by step: class logits, box logits, the best tokens, reference, position and content."
    proposals, start = [], 0
    for l, (h, w) in enumerate(p.shapes):
        m = p.mask[:, start:start + h * w].view(-1, h, w)
        rows, cols = (~m[:, :, 0]).sum(1), (~m[:, 0]).sum(1)
        y, x = torch.meshgrid(torch.arange(h, dtype=torch.float32), torch.arange(w, dtype=torch.float32), indexing='ij')
        xy = (torch.stack([x, y], -1)[None] + 0.5) / torch.stack([cols, rows], -1)[:, None, None]
        proposals.append(torch.cat([xy, torch.ones_like(xy) * queries.size * 2.**l], -1).flatten(1, 2))
        start += h * w
    proposals = torch.cat(proposals, 1)
    live = ((proposals > 0.01) & (proposals < 0.99)).all(-1, keepdim=True) & ~p.mask[..., None]
    unsure = (proposals / (1 - proposals)).log().masked_fill(~live, math.inf)
    x = queries.token_norm(queries.token_proj(memory.masked_fill(~live, 0.)))
    head = heads.heads[len(heads.heads) - 1]
    logits, boxes = head.classes(x), head.box(x) + unsure
    best = logits[..., 0].topk(queries.num_queries, 1).indices
    top = torch.stack([boxes[i, o] for i, o in enumerate(best)]).detach()
    angle, dim = top.sigmoid() * 2 * math.pi, memory.shape[-1] // 2
    sines = torch.tensor([[[e for v in box for e in sine_encoding_loop(v, dim)] for box in image] for image in angle.tolist()])
    position, content = queries.query_norm(queries.query_proj(sines)).split(memory.shape[-1], -1)
    return logits, boxes.sigmoid(), best, top.sigmoid(), position, content

@pytest.mark.parametrize('dim', [32, 48, 20])
def test_as_published(dim):
    torch.manual_seed(0)
    shapes, valid = LEVELS['padded']
    p, heads = pyramid(shapes, valid, dim), disturb(ProposalHeads(dim, 5, 2))
    queries = disturb(ProposalQueries(7, dim, rank=class_zero))
    memory = torch.randn(3, 126, dim, requires_grad=True)
    start, proposals = queries(memory, p, heads)
    logits, boxes, best, reference, position, content = restated(queries, heads, memory, p)
    for a, b in ((proposals.logits[:, 0], logits), (proposals.boxes[:, 0], boxes), (start.reference, reference), (start.position, position), (start.content, content)):
        assert_close(a, b, atol=2e-5, rtol=1e-4)
    dead = grid_proposals(p)[1]
    assert (proposals.boxes[:, 0][dead] == 1).all() and not start.reference.requires_grad
    weights, parts = [torch.randn_like(o) for o in (logits, boxes, position, content)], [memory, *queries.parameters(), *heads.parameters()]
    of = lambda outs: torch.autograd.grad(sum((o * w).sum() for o, w in zip(outs, weights)), parts, allow_unused=True)
    for a, b in zip(of((proposals.logits[:, 0], proposals.boxes[:, 0], start.position, start.content)), of((logits, boxes, position, content))):
        assert (a is None) == (b is None)
        if a is not None: assert_close(a, b, atol=1e-3, rtol=1e-3)

# ---- tokens without a proposal

def love_the_dead(model):
    "Class 0 of a token of zeros is large, and so it would be chosen."
    with torch.no_grad():
        x = model.queries.token_norm(model.queries.token_proj(torch.zeros(32)))
        model.heads.heads[-1].classes.weight[0] += 5 * x / x.norm()**2
    return model

def test_dead_tokens_come_last():
    "Official code lets tokens without a proposal win; ours only where nothing else is left. All that it does not choose is alike."
    given = batch(64, 96)
    model = love_the_dead(disturb(two()).eval())
    seen = []
    model.queries.register_forward_hook(lambda m, args, out: seen.append(out[0].reference))
    with torch.no_grad():
        ours = model(*given)
        model.queries.rank = class_zero
        theirs = model(*given)
    assert (seen[0] < 1).all() and (seen[1][1] == 1).all()              # the second image is padded, and all six queries are spent on padding
    for a, b in zip(ours.proposals, theirs.proposals): assert torch.equal(a, b)
    with torch.no_grad():                                                # nobody dead among the best: no difference
        model.heads.heads[-1].classes.weight[0] *= -1
        a = model(*given)
        model.queries.rank = live_first
        b = model(*given)
    assert all(torch.equal(x, y) for x, y in zip((*a[:2], *a.proposals), (*b[:2], *b.proposals)))

def test_fewer_proposals_than_queries():
    "Tokens there are, but few that live: the rest start from the dead, whose box is (1, 1, 1, 1), as in official code."
    shapes, valid = ((4, 4), (2, 2)), [((1, 2), (1, 1))]
    queries, p = ProposalQueries(8, 32), pyramid(shapes, valid)
    start, _ = queries(p.tokens, p, ProposalHeads(32, 3, 1))
    assert (start.reference == 1).all(-1).sum() == 5 and (start.reference < 1).all(-1).sum() == 3 and all(o.isfinite().all() for o in start)

def test_fewer_tokens_than_queries():
    image = torch.rand(1, 3, 16, 16)                                     # 3x3, 2x2 and 1x1 tokens
    assert two(num_queries=14).eval()(image).boxes.shape[2] == 14        # just enough
    with pytest.raises(ArgumentError, match='fewer than 15 queries.*14 tokens'): two(num_queries=15)(image)

def test_padding_says_nothing():
    "Neither rubbish in padded tokens nor the arbitrary positions there reach an answer; more padding changes nothing."
    torch.manual_seed(0)
    model = disturb(two(drop=0.)).eval()
    def answer(p):
        with torch.no_grad():
            memory = model.encoder(p)
            start, proposals = model.queries(memory, p, model.heads)
            return *model.decoder(*start, memory, p, model.heads), start.reference, *proposals
    valid = [((5, 7), (3, 4), (2, 2))]
    tight = pyramid([*valid[0]], valid)
    loose = pyramid(((8, 12), (4, 6), (2, 3)), valid, seed=1)
    live = ~loose.mask
    loose.tokens[live], loose.position[~live] = tight.tokens[~tight.mask], 1e3
    a, b = answer(tight), answer(loose)
    for x, y in zip(a[:3], b[:3]): assert_close(x, y, atol=1e-5, rtol=1e-4)
    for x, y in zip(a[3:], b[3:]): assert_close(x[:, 0], y[:, 0][live][None], atol=1e-5, rtol=1e-4)

# ---- what learns from what

def test_where_the_gradient_goes():
    model, given = disturb(two(drop=0.)), batch(64, 96)
    names = {'proposal box head': model.heads.heads[-1].box[-1].weight, 'proposal class head': model.heads.heads[-1].classes.weight, 'tokens': model.queries.token_proj.weight,
             'queries': model.queries.query_proj.weight, 'encoder': model.encoder.layers[0].attn.value_proj.weight, 'first box head': model.heads.heads[0].box[-1].weight}
    def reached(loss):
        grads = torch.autograd.grad(loss, names.values(), retain_graph=True, allow_unused=True)
        return {n for n, g in zip(names, grads) if g is not None and g.any()}
    preds = model(*given)
    weights = torch.randn_like(preds.boxes), torch.randn_like(preds.proposals.boxes)
    assert reached((preds.boxes[:, 0] * weights[0][:, 0]).sum()) == {'queries', 'encoder', 'first box head'}     # the decoder's loss does not reach the proposals
    assert reached((preds.proposals.boxes * weights[1]).sum()) == {'proposal box head', 'tokens', 'encoder'}
    assert reached(preds.proposals.logits.square().sum()) == {'proposal class head', 'tokens', 'encoder'}
    loss = SetLoss()
    total = loss(preds, torch.tensor([[[.4, .4, .3, .3]], [[.5, .5, .2, .4]]]), torch.tensor([[3], [1]]))
    assert reached(total) == set(names) and loss.parts['proposals'] > 0

def test_first_stage_learns():
    "A few steps on one image: a proposal near the object becomes the best, and fits better than the grid."
    torch.manual_seed(0)
    model, image, box, label = two(drop=0., num_queries=4), torch.rand(1, 3, 64, 64), torch.tensor([[[.45, .55, .3, .4]]]), torch.tensor([[2]])
    image[:, :, 20:48, 19:39] += 2
    opt, loss = torch.optim.AdamW(model.parameters(), 2e-3), SetLoss()
    for _ in range(40):
        opt.zero_grad()
        loss(model(image), box, label).backward()
        opt.step()
    with torch.no_grad(): proposals = model.eval()(image).proposals
    best = proposals.logits[0, 0, :, 0].argmax()
    assert (proposals.boxes[0, 0, best] - box[0, 0]).abs().max() < 0.15 and proposals.logits[0, 0, best].argmax() == 0      # class 0 means: something

# ---- other parts

def test_without_refinement():
    "Official code crashes; parts do not mind. The references are then the proposals, in all layers."
    model = two(heads=SharedHead).eval()
    seen = []
    model.heads.register_forward_hook(lambda m, args, out: seen.append((args[0], args[2])))
    with torch.no_grad(): preds = model(*batch(64, 96))
    assert [i for i, _ in seen] == [-1, 0, 1] and torch.equal(seen[1][1], seen[2][1]) and seen[1][1].shape == (2, 6, 4)
    assert preds.boxes.isfinite().all()

def test_bad_arguments():
    for bad, name in ((dict(num_queries=0), 'num_queries'), (dict(dim=30), 'dim')):
        with pytest.raises(ArgumentError, match=name): ProposalQueries(**{'dim': 32, **bad})

# ---- pictures

@pytest.mark.parametrize('name', ['plain', 'refine', 'two_stage', 'dc5_two_stage'])
def test_steps_of_any_model(name):
    model, (images, mask) = disturb(FAMILY[name]()).train(), batch(64, 96)
    preds, steps = layer_steps(model, images, mask)
    assert model.training and not preds.boxes.requires_grad and len(steps) == 2
    for i, o in enumerate(steps):
        assert torch.equal(o.boxes, preds.boxes[:, i]) and o.look.points.shape[1] == 6
    assert torch.equal(steps[1].reference, steps[0].reference if name == 'plain' else steps[0].boxes)
    again = model.eval()(images, mask)
    assert torch.equal(again.boxes, preds.boxes)
    axes = show_references(model, images[0], photo=images[0])
    assert len(axes) == 2 and 'decoder layer 1' in axes[1].get_title()
    best = int(model.detect(model(images[:1]), 1).queries)
    assert axes[0].get_title() == f'query {best}, decoder layer 0'
    if name in ('two_stage', 'dc5_two_stage'): assert len(show_proposals(model, images[0], 4).patches) == 8        # an outline on light and on dark ground each
    else:
        with pytest.raises(ArgumentError, match='two-stage'): show_proposals(model, images[0])
    plt.close('all')

# ---- first weights and full size

def test_first_weights():
    torch.manual_seed(0)
    model = two_stage_detr(91, ResNet(), num_encoder_layers=1, num_decoder_layers=2)
    queries, heads = model.queries, model.heads.heads
    xavier = lambda rows, cols: math.sqrt(6 / (rows + cols))
    uniform(queries.token_proj.weight, xavier(256, 256)); uniform(queries.query_proj.weight, xavier(512, 512))
    uniform(queries.token_proj.bias, 1 / 16); uniform(queries.query_proj.bias, 1 / 512**0.5)      # left as PyTorch makes them
    for norm in (queries.token_norm, queries.query_norm): assert (norm.weight == 1).all() and not norm.bias.any()
    assert len(heads) == 3
    for head in heads:
        assert not head.box[-1].weight.any() and not head.box[-1].bias.any()                      # official: no -2 in two stages
        assert_close(head.classes.bias.sigmoid(), torch.full((91,), 0.01))
        assert all(torch.equal(a, b) for a, b in zip(head.parameters(), heads[0].parameters()))
    p = pyramid(((4, 6), (2, 3)), [((4, 6), (2, 3))], dim=256)
    (boxes, dead), (_, proposals) = grid_proposals(p), ProposalQueries(5)(p.tokens, p, model.heads)
    assert_close(proposals.boxes[:, 0][~dead], boxes[~dead])                                      # so the first references are boxes of the grid

def full():
    with torch.device('meta'): return two_stage_detr(91, ResNet())

def test_full_size():
    model, out = full(), to_layout(full())
    assert sum(p.numel() for p in model.parameters()) == 41_181_529 and len(out) == 630
    file = golden.parent/'param_counts.json'
    if not file.is_file(): pytest.skip(f'{file} is not there')
    told = json.loads(file.read_text())['Deformable-DETR-R50 with_box_refine two_stage']
    assert (sum(p.numel() for p in model.parameters()), len(out), sum(t.numel() for t in out.values())) == tuple(told[o] for o in ('params', 'state_dict_keys', 'state_dict_elements_with_duplicates'))
    frozen = sum(p.numel() for n, p in model.backbone.named_parameters() if n.startswith(('conv1', 'layer1')))
    assert told['params'] - frozen == told['trainable'] and sum(b.numel() for b in model.buffers()) == told['buffers']
    parts = {child: sum(t.numel() for t in {id(t): t for n, t in out.items() if n.startswith(child + '.') and 'bn' not in n and 'downsample.1' not in n}.values()) for child in told['per_child']}
    assert parts == told['per_child']

def test_official_names():
    "Those of official two-stage checkpoints: no learned queries, a head more, copies under the decoder."
    out = to_layout(full())
    assert not [n for n in out if 'query_embed' in n or 'reference_points' in n]
    assert out['transformer.pos_trans.weight'].shape == (512, 512) and out['transformer.enc_output.weight'].shape == (256, 256)
    for i in range(7):
        for n in (f'class_embed.{i}.weight', f'bbox_embed.{i}.layers.2.bias'): assert out[n].shape == out[f'transformer.decoder.{n}'].shape
    model, other = two(), disturb(two())
    report = load_weights(other, to_layout(model))
    assert report.layout == 'official' and not report.wrong
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))
    assert {len(e.theirs) for e in entries(model) if e.ours[0].startswith('heads')} == {2}
