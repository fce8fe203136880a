"""What does not belong on the page of `07 flow`: the flows of all detectors as their papers and the official code have them, swapped parts, the figure."""
import copy, re
import pytest, torch
from xml.etree import ElementTree
from torch import nn
from deformlit.backbones import create_backbone
from deformlit.core import ArgumentError
from deformlit.dab_detr import *
from deformlit.deformable_detr import *
from deformlit.detr import *
from deformlit.flow import *

LAYERS = 3
SMALL = dict(dim=32, num_heads=2, dim_ffn=32, num_queries=4, num_encoder_layers=2, num_decoder_layers=LAYERS)
LEVELS = dict(SMALL, num_levels=4, num_points=2, groups=8)

def backbone(): return create_backbone('convnet', widths=(8, 8, 8, 8), norm='group')

MODELS = dict(
    detr=lambda: detr(3, backbone(), **SMALL),
    detr_pre_norm=lambda: detr(3, backbone(), residual=PreNorm, **SMALL),
    plain=lambda: deformable_detr(3, backbone(), **LEVELS),
    refine=lambda: deformable_detr(3, backbone(), heads=RefiningHeads, **LEVELS),
    two_stage=lambda: two_stage_detr(3, backbone(), **LEVELS),
    dab=lambda: dab_detr(3, backbone(), **SMALL),
    dab_deformable=lambda: dab_deformable_detr(3, backbone(), **LEVELS),
    dab_deformable_stays=lambda: dab_deformable_detr(3, backbone(), heads=SharedAnchors, **LEVELS),
    dab_two_stage=lambda: two_stage_dab_deformable_detr(3, backbone(), **LEVELS),
)
images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))

def flow_of(name):
    torch.manual_seed(0)
    return decoder_flow(MODELS[name](), images)

def one(*sources): return (sources,)

C, P, A, I, W = 'content', 'position', 'anchor', 'image', 'image position'


@pytest.mark.parametrize('name, query', [('detr', P), ('detr_pre_norm', P), ('plain', P), ('refine', P), ('two_stage', P), ('dab', A), ('dab_deformable', A), ('dab_two_stage', A)])
def test_self_attention(name, query):
    for layer in flow_of(name).decoder: assert layer.attention[0] == ('self_attn', one(C, query), one(C, query), one(C), None)


@pytest.mark.parametrize('name', ['detr', 'detr_pre_norm'])
def test_detr(name):
    flow = flow_of(name)
    assert flow.start == {'content': 'zeros', 'position': 'learned', 'image position': 'fixed'}
    assert flow.encoder == [LayerFlow([AttentionFlow('attn', one(I, W), one(I, W), one(I), None)])] * 2
    for i, layer in enumerate(flow.decoder):
        assert layer.attention[1] == ('cross_attn', one(C, P), one(I, W), one(I), None)
        assert layer[1:] == ('', False, False, (i,), (C,))


@pytest.mark.parametrize('name, query', [('plain', P), ('refine', P), ('two_stage', P), ('dab_deformable', A), ('dab_two_stage', A)])
def test_deformable_attention(name, query):
    flow = flow_of(name)
    assert flow.encoder == [LayerFlow([AttentionFlow('attn', one(I, W), (), one(I), ())], anchor='')] * 2
    for layer in flow.decoder:
        assert layer.attention[1] == ('cross_attn', one(C, query), (), one(I), (A,))
        assert layer.box == (C, A)


@pytest.mark.parametrize('name', ['plain', 'dab_deformable_stays'])
def test_anchors_that_stay(name):
    assert [o[1:5] for o in flow_of(name).decoder] == [('start', False, False, (i,)) for i in range(LAYERS)]


@pytest.mark.parametrize('name', ['refine', 'two_stage', 'dab_deformable', 'dab_two_stage'])
def test_anchors_that_move_are_cut(name):
    assert [o[1:5] for o in flow_of(name).decoder] == [('moved' if i else 'start', i > 0, False, (i,)) for i in range(LAYERS)]


def test_starts():
    assert flow_of('plain').start == {C: 'learned', P: 'learned', A: 'read off the position', W: 'learned (level_embed)'}
    assert set(flow_of('two_stage').start.items()) >= {(o, 'proposals of the image, cut') for o in (C, P, A)}
    assert flow_of('dab').start == {C: 'zeros', A: 'learned', W: 'fixed'}
    assert flow_of('dab_deformable').start[A] == 'learned'
    fixed = dab_detr(3, backbone(), anchors=FixedAnchors(4), **SMALL)
    assert decoder_flow(fixed, images).start[A] == 'centre fixed, size learned'


def test_dab_joins_content_and_place_in_each_head():
    "The first layer adds the positions too; later ones only have them in the second half of each head. A loss reaches the box head before."
    first, *later = flow_of('dab').decoder
    assert first.attention[1] == ('cross_attn', one(C, A), ((I, W), (W,)), one(I), None)
    for o in later: assert o.attention[1] == ('cross_attn', ((C,), (C, A)), ((I,), (W,)), one(I), None)
    assert [o[1:5] for o in (first, *later)] == [('start', False, False, (0,)), ('moved', True, False, (0, 1)), ('moved', True, False, (1, 2))]


# --- parts swapped: the data follow the model

class Uncut(RefiningHeads):
    def forward(self, i, x, reference):
        logits, box, _ = super().forward(i, x, reference)
        return logits, box, box

class UncutAnchors(MovingHeads):
    def seen(self, i, reference): return reference

class CutTwice(MovingHeads):
    def moved(self, i, x, reference): return super().moved(i, x, reference).detach()

class Forgetful(SharedHead):
    def forward(self, i, x, reference): return *super().forward(i, x, reference)[:2], torch.full_like(reference, .5)


def test_heads_that_do_not_cut():
    for model in (deformable_detr(3, backbone(), heads=Uncut, **LEVELS), dab_detr(3, backbone(), heads=UncutAnchors, **SMALL)):
        flow = decoder_flow(model, images)
        assert [(o.anchor, o.cut) for o in flow.decoder] == [('start', False), ('moved', False), ('moved', False)]
        assert [o.heads for o in flow.decoder] == [(0,), (0, 1), (0, 1, 2)]
        assert crosses(flow) == 0 and 'all heads so far' in show_flow(flow).svg


def test_heads_that_cut_twice():
    flow = decoder_flow(dab_detr(3, backbone(), heads=CutTwice, **SMALL), images)
    assert [o.heads for o in flow.decoder] == [(0,), (1,), (2,)] and flow.decoder[1].cut
    assert crosses(flow) == crosses(flow_of('dab')) + 1


def test_heads_that_forget():
    "A constant in place of a reference is said to be one."
    assert [o.anchor for o in decoder_flow(deformable_detr(3, backbone(), heads=Forgetful, **LEVELS), images).decoder] == ['start', 'fixed', 'fixed']


class Careless(DecoderLayer):
    def forward(self, x, position, reference, memory, p):
        x = self.norm1(x + self.self_attn(x + position, x + position, x + position))
        return self.ffn(self.norm2(x + self.cross_attn(x, reference, memory + p.position, p.shapes, p.mask)))

class Cutting(DecoderLayer):
    def forward(self, x, *args): return super().forward(x.detach(), *args)


def swapped(layer):
    model = MODELS['plain']()
    model.decoder.layers = nn.ModuleList(layer(dim=32, num_heads=2, num_levels=4, num_points=2, dim_ffn=32) for _ in range(LAYERS))
    return decoder_flow(model, images)


def test_layers_that_give_positions_to_values():
    for o in swapped(Careless).decoder:
        assert o.attention == [('self_attn', one(C, P), one(C, P), one(C, P), None), ('cross_attn', one(C), (), one(I, W), (A,))]


def test_layers_that_cut_the_content():
    flow = swapped(Cutting)
    assert [o.content_cut for o in flow.decoder] == [False, False, False]       # what comes in is whole; it is cut inside
    assert flow.decoder[1].attention[0].q == one(C, P)


class CutStream(Decoder):
    def forward(self, content, position, reference, memory, p, heads):
        x, out = content, []
        for i, layer in enumerate(self.layers):
            x = layer(x.detach(), position, on_levels(reference, p.ratios), memory, p)
            *said, reference = heads(i, x, reference)
            out.append(said)
        return Predictions(*(torch.stack(o, 1) for o in zip(*out)))


def test_decoders_that_cut_the_content():
    model = MODELS['plain']()
    model.decoder = CutStream(LAYERS, dim=32, num_heads=2, num_levels=4, num_points=2, dim_ffn=32)
    flow = decoder_flow(model, images)
    assert [o.content_cut for o in flow.decoder] == [False, True, True] and crosses(flow) > crosses(flow_of('plain'))


# --- the model is left alone, and whatever state it is in does not matter

@pytest.mark.parametrize('name', MODELS)
def test_model_and_images_are_left_alone(name):
    torch.manual_seed(0)
    model, x = MODELS[name]().train(), images.clone()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    decoder_flow(model, x)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(x, images) and model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize('name', ['detr', 'refine', 'dab'])
def test_flow_does_not_depend_on_state_size_or_grad(name):
    expected = flow_of(name)
    model = MODELS[name]().requires_grad_(False)
    for p in model.parameters(): nn.init.normal_(p, std=.1)
    mask = torch.zeros(2, 45, 70, dtype=torch.bool)
    mask[1, :, 50:] = True
    with torch.no_grad(): assert decoder_flow(model, torch.randn(2, 3, 45, 70), mask) == expected
    assert decoder_flow(model.double(), images.double()) == expected


def test_no_encoder_one_layer():
    model = deformable_detr(3, backbone(), heads=RefiningHeads, **dict(LEVELS, num_encoder_layers=0, num_decoder_layers=1))
    flow = decoder_flow(model, images)
    assert flow.encoder == [] and len(flow.decoder) == 1
    check_svg(show_flow(flow))


@pytest.mark.parametrize('part', ['neck', 'encoder', 'queries', 'decoder', 'heads'])
def test_missing_parts_are_named(part):
    model = MODELS['plain']()
    delattr(model, part)
    with pytest.raises(ArgumentError, match=part): decoder_flow(model, images)


# --- the figure

def crosses(flow): return show_flow(flow).svg.count('data-sign="cut"') - 1       # one is in the legend

def check_svg(drawing):
    "Well formed, follows the page's colour and width; no text leaves the figure."
    svg = ElementTree.fromstring(drawing.svg)
    left, top, width, height = map(float, svg.get('viewBox').split())
    assert 'max-width' in svg.get('style') and svg.get('role') == 'img' and svg.get('aria-label')
    for o in svg.iter('text'):
        words, size = ''.join(o.itertext()), float(o.get('font-size', 12))
        assert o.get('fill') == 'currentColor' and 0 < float(o.get('y')) < height
        if o.get('text-anchor') != 'end': assert float(o.get('x')) + .56 * size * len(words) < width, words
    return svg


@pytest.mark.parametrize('name, groups, cut, ways', [
    ('detr', 1, 0, 0), ('detr_pre_norm', 1, 0, 0), ('plain', 1, 0, 0), ('refine', 2, 3, 1), ('two_stage', 2, 6, 1), ('dab', 2, 2, 1), ('dab_deformable', 2, 3, 1), ('dab_deformable_stays', 1, 0, 0)])
def test_figure(name, groups, cut, ways):
    flow = flow_of(name)
    svg = check_svg(show_flow(flow, name))
    text = [''.join(o.itertext()) for o in svg.iter('text')]
    assert sum(o.startswith('decoder layer') for o in text) == groups and 'encoder layers 1–2' in text
    assert crosses(flow) == cut
    assert sum(o.get('data-sign') == 'loss' for o in svg.iter('path')) == ways


@pytest.mark.parametrize('name', ['detr', 'refine', 'dab'])
def test_arrows_are_the_data(name):
    "As many arrows of each source as the layers that are drawn have."
    flow = flow_of(name)
    drawn = [flow.encoder[0], flow.decoder[0]] + [flow.decoder[1]] * (name != 'detr')
    given = []
    for o in drawn:
        for a in o.attention: given += [s for half in (*a.q, *a.k, *a.v) for s in half] + list(a.reference or ())
        given += o.box
    given += [I] + [C] * (len(drawn) - 1) + [A] * sum(o.anchor == 'moved' for o in flow.decoder[:2]) * (2 if name != 'detr' else 0)   # what is written
    arrows = re.findall(r'data-from="([a-z ]+)"', show_flow(flow).svg)
    assert sorted(arrows) == sorted(given)
