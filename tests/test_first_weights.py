"""Before training: every tensor of every detector has the distribution that the official code states, and there are as many numbers as the official models have.

The statements are one line for each kind of tensor, by its official name; a tensor without a line fails. Backbones are not drawn at random in the official code: it loads them."""
import json, math, os
from fnmatch import fnmatchcase
from pathlib import Path

import pytest, torch

from deformlit.backbones import ResNet
from deformlit.checkpoints import to_layout
from deformlit.dab_detr import LayerSteps, MovingHeads, dab_detr, dab_deformable_detr, two_stage_dab_deformable_detr
from deformlit.deformable_detr import RefiningHeads, deformable_detr, two_stage_detr
from deformlit.detr import LearnedPosition, PreNorm, detr


# Of matrices that `transformer` makes: Xavier. What PyTorch leaves: uniform in +-1/sqrt(inputs). The first line that fits counts.
COMMON = '''
backbone.0.*                    loaded
backbone.1.*_embed.weight       uniform 0 1
*norm*.weight                   constant 1
*norm*.bias                     constant 0
*in_proj_weight                 xavier
*in_proj_bias                   constant 0
*attn.out_proj.weight           xavier
*attn.out_proj.bias             constant 0
*linear?.weight                 xavier
*linear?.bias                   pytorch
'''
DETR = COMMON + '''
input_proj.*                    pytorch
query_embed.weight              normal
class_embed.*                   pytorch
bbox_embed.layers.*             pytorch
'''
LEVELS = COMMON + '''
input_proj.*.0.weight           xavier
input_proj.*.0.bias             constant 0
input_proj.*.1.weight           constant 1
input_proj.*.1.bias             constant 0
transformer.level_embed         normal
query_embed.weight              normal
tgt_embed.weight                normal
refpoint_embed.weight           normal
patterns_embed.weight           normal
transformer.reference_points.weight  xavier
transformer.reference_points.bias    constant 0
*sampling_offsets.weight        constant 0
*sampling_offsets.bias          star
*attention_weights.*            constant 0
*value_proj.weight              xavier
*value_proj.bias                constant 0
*output_proj.weight             xavier
*output_proj.bias               constant 0
transformer.decoder.ref_point_head.layers.?.weight  xavier
transformer.decoder.query_scale.layers.?.weight     xavier
transformer.decoder.ref_point_head.*                pytorch
transformer.decoder.query_scale.*                   pytorch
transformer.enc_output.weight   xavier
transformer.pos_trans.weight    xavier
transformer.enc_output.bias     pytorch
transformer.pos_trans.bias      pytorch
*class_embed.?.weight           pytorch
*class_embed.?.bias             constant -4.59512
*bbox_embed.?.layers.2.weight   constant 0
*bbox_embed.?.layers.[01].*     pytorch
'''
PLAIN = LEVELS + '*bbox_embed.?.layers.2.bias     small\n'                                    # the one head, under the names of all layers
REFINE = LEVELS + '*bbox_embed.0.layers.2.bias     small\n*bbox_embed.?.layers.2.bias  constant 0\n'
TWO = LEVELS + '*bbox_embed.?.layers.2.bias     constant 0\n'
DAB = COMMON + '''
input_proj.*                    pytorch
refpoint_embed.weight           normal
transformer.patterns.weight     normal
*activation.weight              constant 0.25
transformer.*_proj.weight       xavier
transformer.*_proj.bias         pytorch
*bbox_embed*.layers.2.*         constant 0
*bbox_embed*.layers.[01].*      pytorch
class_embed.weight              pytorch
class_embed.bias                constant -4.59512
transformer.*.layers.?.weight   xavier
transformer.*.layers.?.bias     pytorch
'''
SIZES = dict(num_encoder_layers=1, num_decoder_layers=2)
def body(out=(1, 2, 3)): return ResNet(depths=(1, 1, 1, 1), widths=(16, 32, 64, 128), stem=16, out_indices=out)
MODELS = {
    'DETR': ('DETR', DETR, lambda: detr(91, body((3,)), **SIZES)),
    'DETR, pre-norm, learned positions': ('DETR', DETR, lambda: detr(91, body((3,)), residual=PreNorm, position=LearnedPosition(256), **SIZES)),
    'plain': ('Deformable DETR', PLAIN, lambda: deformable_detr(91, body(), **SIZES)),
    'refine': ('Deformable DETR', REFINE, lambda: deformable_detr(91, body(), RefiningHeads, **SIZES)),
    'two-stage': ('two-stage Deformable DETR', TWO, lambda: two_stage_detr(91, body(), **SIZES)),
    'DAB': ('DAB-DETR', DAB, lambda: dab_detr(91, body((3,)), **SIZES)),
    'DAB, patterns, heads of their own': ('DAB-DETR', DAB, lambda: dab_detr(91, body((3,)), num_patterns=3, heads=lambda *args: MovingHeads(*args, LayerSteps), **SIZES)),
    'DAB-Deformable': ('DAB-Deformable-DETR', REFINE, lambda: dab_deformable_detr(91, body(), num_patterns=3, **SIZES)),
    'two-stage DAB-Deformable': ('two-stage DAB-Deformable-DETR', TWO, lambda: two_stage_dab_deformable_detr(91, body(), **SIZES)),
}

def star(bias, heads=8, points=4):
    "Each head looks in a direction of its own, point i + 1 steps far, the longer side of a step being one pixel; the same on all levels."
    angle = torch.arange(heads) * 2 * math.pi / heads
    way = torch.stack([angle.cos(), angle.sin()], -1)
    way = way / way.abs().amax(-1, keepdim=True)
    return torch.stack([way * (i + 1) for i in range(points)], 1)[:, None].expand(-1, bias.numel() // heads // points // 2, -1, -1).flatten()

def rule_of(table, name):
    rule = next((line.split(maxsplit=1)[1] for line in table.splitlines() if line.strip() and fnmatchcase(name, line.split()[0])), None)
    assert rule, f'{name}: no line says how it starts'
    return rule.strip()

def distance(x, low, high):
    "Kolmogorov and Smirnov: the largest difference between the share of numbers below a value and the probability of that, for a uniform distribution; `low` None: a normal one."
    x = x.detach().flatten().double().sort().values
    p = torch.special.ndtr(x) if low is None else (x - low) / (high - low)
    steps = torch.arange(len(x) + 1) / len(x)
    return max((p - steps[:-1]).max().item(), (steps[1:] - p).max().item())

def bounds(rule, name, weights):
    "The range of a uniform distribution; None for a normal one."
    word, *numbers = rule.split()
    if word == 'normal': return None, None
    if word == 'uniform': return map(float, numbers)
    w = weights[name.rsplit('.', 1)[0] + '.weight'] if word == 'pytorch' else weights[name]
    outputs, inputs = w.shape[0] * w[0, 0].numel(), w[0].numel()
    side = math.sqrt(6 / (inputs + outputs)) if word == 'xavier' else inputs**-0.5
    return -side, side

FEW = 2.2      # a distance of 2.2 / sqrt(numbers) is exceeded once in 8,000 draws; the seed is fixed

@pytest.mark.parametrize('name', MODELS)
def test_every_tensor(name, parity):
    system, table, make = MODELS[name]
    torch.manual_seed(0)
    weights, kinds = to_layout(make(), 'official'), set()
    for n, w in weights.items():
        rule = rule_of(table, n)
        word = rule.split()[0]
        kinds.add(word)
        if word == 'loaded': continue
        if word == 'constant': parity.close(system, 'official statements', 'first weights that are constant', w, torch.full_like(w, float(rule.split()[1])), 1e-5)
        elif word == 'star': parity.close(system, 'official statements', 'first weights that are constant', w, star(w), 1e-6)
        elif word == 'small': parity.close(system, 'official statements', 'first weights that are constant', w, torch.tensor([0., 0., -2., -2.]), 0.)
        else:
            low, high = bounds(rule, n, weights)
            assert low is None or low <= w.min() and w.max() <= high, f'{n} leaves [{low}, {high}]'
            if w.numel() >= 64: parity.record(system, 'official statements', 'distributions of the other first weights', distance(w, low, high), FEW / math.sqrt(w.numel()), numbers=w.numel())
    assert {'xavier', 'pytorch', 'normal', 'constant'} <= kinds or system.startswith('two-stage') and 'xavier' in kinds

@pytest.mark.parametrize('change, rule', [(lambda w: w * 1.2, 'xavier'), (lambda w: w * 0.8, 'xavier'), (lambda w: torch.nn.init.normal_(w, 0, 0.02), 'xavier'), (lambda w: w + 0.02, 'pytorch'), (lambda w: torch.nn.init.normal_(w, 0, 0.9), 'normal')])
def test_another_distribution_is_seen(change, rule):
    torch.manual_seed(0)
    w = change({'xavier': torch.nn.init.xavier_uniform_, 'normal': torch.nn.init.normal_, 'pytorch': lambda w: torch.nn.init.uniform_(w, -1 / 16, 1 / 16)}[rule](torch.empty(256, 256)))
    assert distance(w, *bounds(rule, 'a.weight', {'a.weight': w})) > FEW / 256

def test_heads_start_as_copies(parity):
    "Deformable DETR clones one head for all layers; DAB-DETR's heads of their own are drawn one by one."
    torch.manual_seed(0)
    for name, copies in (('refine', True), ('two-stage', True), ('DAB-Deformable', True), ('DAB, patterns, heads of their own', False)):
        system, _, make = MODELS[name]
        weights = to_layout(make(), 'official')
        for part in ('bbox_embed.{}.layers.0.weight', *(['class_embed.{}.weight'] if copies else [])):
            parity.same(system, 'official statements', 'heads of the layers start alike, or not', torch.equal(weights[part.format(0)], weights[part.format(1)]), copies)

# ---- sizes

golden = Path(os.environ.get('DEFORMLIT_GOLDEN', Path(__file__).parents[1]/'../shared/golden/A'))
COUNTS = golden.parent/'param_counts.json'
counts = json.loads(COUNTS.read_text()) if COUNTS.is_file() else {}

def sized(a, name):
    "Our model for the arguments that the official one was counted with."
    def known(key, **words):
        return {ours: a[theirs] for ours, theirs in words.items() if theirs in a}
    sizes = known(a, dim='hidden_dim', num_heads='nheads', num_queries='num_queries', num_encoder_layers='enc_layers', num_decoder_layers='dec_layers', dim_ffn='dim_feedforward')
    levels = a.get('num_feature_levels', 1)
    backbone = ResNet(depths={'resnet50': (3, 4, 6, 3), 'resnet101': (3, 4, 23, 3)}[a['backbone']], dilated=bool(a.get('dilation')), out_indices=(1, 2, 3) if levels > 1 else (3,))
    if name.startswith('DAB-DETR'): return dab_detr(91, backbone, num_patterns=a.get('num_patterns', 0), **sizes)
    if name.startswith('DETR'): return detr(91, backbone, **sizes)
    assert a['enc_n_points'] == a['dec_n_points']
    sizes |= dict(num_levels=levels, num_points=a['enc_n_points'])
    if name.startswith('DAB-Deformable'): return dab_deformable_detr(91, backbone, num_patterns=a.get('num_patterns', 0), **sizes)
    if a.get('two_stage'): return two_stage_detr(91, backbone, **sizes)
    return deformable_detr(91, backbone, **sizes | (dict(heads=RefiningHeads) if a.get('with_box_refine') else {}))

def system_of(name): return next((s for start, s in (('DAB-DETR', 'DAB-DETR'), ('DAB-Deformable', 'DAB-Deformable-DETR'), ('Deformable', 'Deformable DETR'), ('DETR', 'DETR')) if name.startswith(start)), None)

@pytest.mark.skipif(not counts, reason=f'{COUNTS} is not there')
@pytest.mark.parametrize('name', [o for o in counts if system_of(o)])
def test_as_many_numbers(name, parity):
    told, a = counts[name], counts[name]['args']
    system = 'two-stage Deformable DETR' if a.get('two_stage') else system_of(name)
    with torch.device('meta'): model = sized(a, name)
    out = to_layout(model, 'official')
    frozen = sum(p.numel() for n, p in model.backbone.named_parameters() if n.startswith(('conv1', 'layer1')))
    all_ = sum(p.numel() for p in model.parameters())
    mine = dict(params=all_, trainable=all_ - frozen, buffers=sum(b.numel() for b in model.buffers()), state_dict_keys=len(out), state_dict_elements_with_duplicates=sum(t.numel() for t in out.values()))
    for o, n in mine.items(): parity.same(system, 'official statements', 'full size: parameters, trained ones, buffers, names', n, told[o])
