"""The names, shapes and sizes of full-size models in the official layout, without any official code or weights."""
import json, os
from pathlib import Path

import pytest, torch

from deformlit.backbones import ResNet
from deformlit.checkpoints import WeightsError, load_weights, read_weights, save_weights, to_layout
from deformlit.core import ArgumentError
from deformlit.detr import LearnedPosition
from deformlit.deformable_detr import Neck, RefiningHeads, SharedHead, deformable_detr

recorded = dict(line.split(maxsplit=1) for line in (Path(__file__).parent/'names/deformable_detr_r50.txt').read_text().splitlines())
golden = Path(os.environ.get('DEFORMLIT_GOLDEN', Path(__file__).parents[1]/'../shared/golden/A'))

# the model, its number of official names, its parameters, its name in param_counts.json
FULL = {
    'plain': (dict(), 561, 40_069_665, 'Deformable-DETR-R50 plain'),
    'refine': (dict(heads=RefiningHeads), 597, 40_849_660, 'Deformable-DETR-R50 with_box_refine'),
    'single_scale': (dict(num_levels=1), 549, 34_066_593, 'Deformable-DETR-R50 single_scale'),
    'dc5': (dict(num_levels=1, dilated=True), 549, 34_066_593, 'Deformable-DETR-R50 single_scale DC5'),
}

def full(heads=SharedHead, num_levels=4, dilated=False):
    with torch.device('meta'):
        return deformable_detr(91, ResNet(out_indices=(1, 2, 3) if num_levels > 1 else (3,), dilated=dilated), heads, num_levels=num_levels)

def count(model): return sum(p.numel() for p in model.parameters())

@pytest.mark.parametrize('name', FULL)
def test_full_size(name):
    args, names, params, _ = FULL[name]
    model = full(**args)
    assert len(to_layout(model)) == names and count(model) == params

@pytest.mark.parametrize('name', FULL)
def test_full_size_as_counted(name):
    file = golden.parent/'param_counts.json'
    if not file.is_file(): pytest.skip(f'{file} is not there')
    args, _, _, official = FULL[name]
    told, model = json.loads(file.read_text())[official], full(**args)
    out = to_layout(model)
    assert (count(model), len(out)) == (told['params'], told['state_dict_keys'])
    assert sum(t.numel() for t in out.values()) == told['state_dict_elements_with_duplicates']
    assert sum(b.numel() for b in model.buffers()) == told['buffers']
    frozen = sum(p.numel() for n, p in model.backbone.named_parameters() if n.startswith(('conv1', 'layer1')))      # stem and first stage
    assert count(model) - frozen == told['trainable']
    parts = {child: sum(t.numel() for t in {id(t): t for n, t in out.items() if n.startswith(child + '.') and 'bn' not in n and 'downsample.1' not in n}.values()) for child in told['per_child']}
    assert parts == told['per_child']

def test_names_are_as_recorded():
    "The list was written down once; the tables must go on giving it."
    for args, keep in ((dict(heads=RefiningHeads), lambda n: True), (dict(), lambda n: not n.startswith('transformer.decoder.bbox_embed'))):
        now = {n: 'x'.join(map(str, t.shape)) for n, t in to_layout(full(**args)).items()}
        assert now == {n: shape for n, shape in recorded.items() if keep(n)}

# ---- small models

def small(heads=SharedHead, **kwargs):
    return deformable_detr(5, ResNet(depths=(1, 1, 1, 1), widths=(4, 8, 12, 16), stem=8), heads, dim=32, num_heads=4, num_queries=6,
                           num_encoder_layers=1, num_decoder_layers=2, dim_ffn=16, **kwargs)

def test_learned_positions_have_official_names():
    model, other = small(), small()
    for o in (model, other): o.neck = Neck(o.backbone.channels, 32, position=LearnedPosition(32))
    out = to_layout(model)
    assert out['backbone.1.row_embed.weight'].shape == out['backbone.1.col_embed.weight'].shape == (50, 16)
    assert load_weights(other, out).layout == 'official'
    assert torch.equal(other.neck.position.row.weight, model.neck.position.row.weight)

def test_nothing_is_loaded_unless_all_fits():
    model = small()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    weights = to_layout(small())
    del weights['transformer.level_embed']
    weights['more'] = torch.zeros(1)
    weights['input_proj.0.0.weight'] = torch.zeros(32, 32, 3, 3)
    with pytest.raises(WeightsError) as e: load_weights(model, weights)
    for line in ('missing: neck.level_embed (transformer.level_embed)', 'unexpected: more', 'another shape: neck.convs.0.0.weight'): assert line in str(e.value)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    report = load_weights(model, weights, allow=['neck.*', 'more'])
    assert sorted(report.wrong) == ['more', 'neck.convs.0.0.weight', 'neck.level_embed']
    assert torch.equal(model.neck.level_embed, before['neck.level_embed']) and torch.equal(model.queries.content.weight, weights['query_embed.weight'][:, 32:])

def test_live_batch_norm_keeps_its_counters():
    model, other = (deformable_detr(5, ResNet(depths=(1,) * 4, widths=(4,) * 4, stem=8, norm=torch.nn.BatchNorm2d), dim=32, num_encoder_layers=1, num_decoder_layers=1) for _ in range(2))
    model.train()(torch.rand(2, 3, 64, 64))
    load_weights(other, to_layout(model))
    assert other.backbone.bn1.num_batches_tracked == 1

def test_files(tmp_path):
    from safetensors.torch import save_file, save_model
    model = small(RefiningHeads)
    for name in ('w.pth', 'w.safetensors'):
        save_weights(model, tmp_path/name, 'official')
        back = read_weights(tmp_path/name)
        assert all(torch.equal(t, back[n]) for n, t in to_layout(model).items()) and len(back) == len(to_layout(model))
    twin = torch.nn.Module()                        # a writer that leaves out copies and says so
    twin.a, twin.b = (torch.nn.Linear(2, 2) for _ in range(2))
    twin.b.weight = twin.a.weight
    save_model(twin, str(tmp_path/'twin.safetensors'))
    assert set(read_weights(tmp_path/'twin.safetensors')) == {'a.weight', 'a.bias', 'b.weight', 'b.bias'}
    for content in ([torch.zeros(1)], {'model': {'epoch': 3}}, {}):
        torch.save(content, tmp_path/'no.pth')
        with pytest.raises(ArgumentError, match='state dict'): read_weights(tmp_path/'no.pth')
    with pytest.raises(ArgumentError, match='.safetensors or .pth'): save_weights(model, tmp_path/'w.txt')
