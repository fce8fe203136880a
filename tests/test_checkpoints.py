"""The names, shapes and sizes of models in other people's layouts, and folders that are read and written, without their code or weights."""
import json, os, sys, types
from pathlib import Path

import pytest, torch

from deformlit.backbones import ResNet
from deformlit.checkpoints import (FACTORIES, TABLES, WeightsError, class_layers, create_detector, find_folder, from_config, from_transformers, guess_layout,
                                   layouts, load_pretrained, load_weights, read_weights, save_weights, to_layout)
from deformlit.core import ArgumentError
from deformlit.dab_detr import DABDeformableDETR
from deformlit.detr import DETR, Detector, LearnedPosition
from deformlit.deformable_detr import DeformableDETR, Neck, RefiningHeads, SharedHead, deformable_detr

names = Path(__file__).parent/'names'

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
    with pytest.raises(ArgumentError, match='.safetensors, .pth or .bin'): save_weights(model, tmp_path/'w.txt')

# ---- the layouts of transformers, from recorded names

RECORDED = sorted(p.stem.removeprefix('transformers_') for p in names.glob('transformers_*.json'))

def record(file): return dict(line.split() for line in (names/file).read_text().splitlines())
def shape(t): return 'x'.join(map(str, t.shape))

def recorded_model(system): return from_config(json.loads((names/f'transformers_{system}.json').read_text()))

def test_all_systems_are_recorded(): assert {'detr', 'plain', 'refine', 'two_stage', 'single', 'dab'} <= set(RECORDED)

@pytest.mark.parametrize('system', RECORDED)
def test_names_of_transformers(system):
    "In memory, version 5 has exactly the names and shapes that we write."
    told = record(f'transformers_{system}.txt')
    assert {n: shape(t) for n, t in to_layout(recorded_model(system), 'transformers/resnet').items()} == told

@pytest.mark.parametrize('system', RECORDED)
def test_files_of_transformers(system):
    "A file in the names of version 4 lacks copies; what it has is enough, and nothing of it is left over."
    model, told = recorded_model(system), record(f'transformers4_{system}.txt')
    out = to_layout(model, 'transformers4/resnet')
    assert told.items() <= {n: shape(t) for n, t in out.items()}.items() and guess_layout(model, told).endswith('/resnet')
    report = load_weights(recorded_model(system), {n: out[n] for n in told}, 'transformers4/resnet')
    assert not report.wrong and not report.new and not report.dropped
    for lost in told:                                # and not one of them is too many
        if lost.startswith(('class_embed.', 'model.decoder.class_embed.')) and not lost.startswith('class_embed.0'): continue
        with pytest.raises(WeightsError, match='missing'): load_weights(recorded_model(system), {n: out[n] for n in told if n != lost}, 'transformers4/resnet')
        break

SMALL = dict(num_queries=6, dim=32, num_heads=4, num_encoder_layers=1, num_decoder_layers=2, dim_ffn=16)
TRUNK = dict(name='resnet50', norm='frozen', depths=[1, 1, 1, 1], widths=[4, 8, 12, 16], stem=8)

def create(factory, num_classes=5, **args): return create_detector(factory, num_classes, TRUNK, **SMALL, **args).eval()

KINDS = {**{name: {} for name in FACTORIES}, 'deformable_detr refining': dict(heads='RefiningHeads'), 'detr pre-norm': dict(residual='PreNorm'), 'detr learned': dict(position='LearnedPosition'),
         'dab_detr patterns': dict(num_patterns=2), 'dab_detr fixed': dict(anchors='FixedAnchors'), 'dab_deformable_detr shared': dict(heads='SharedAnchors')}

def kind(name, num_classes=5): return create(name.split()[0], num_classes, **KINDS[name])

@pytest.mark.parametrize('name', KINDS)
def test_every_direction(name):
    "From each layout to each other, by way of models: the same tensors come back."
    torch.manual_seed(0)
    model = kind(name)
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn_like(p) * 0.1)
    known = layouts(model)
    assert {'ours', 'official'} <= set(known) and ('transformers' in known) == (name.startswith(('deformable', 'two_stage_detr', 'dab_detr', 'detr')) and name != 'detr pre-norm')
    told = {o: to_layout(model, o) for o in known}
    for first in known:
        there = kind(name)
        assert not load_weights(there, told[first], first).wrong
        for second in known:
            out = to_layout(there, second)
            assert out.keys() == told[second].keys() and all(t.equal(out[n]) for n, t in told[second].items())

@pytest.mark.parametrize('name', KINDS)
def test_described_and_built_again(name, tmp_path):
    torch.manual_seed(0)
    model, image = kind(name), torch.rand(1, 3, 64, 96)
    model.save_pretrained(tmp_path)
    other = type(model).from_pretrained(tmp_path)
    assert not other.training and other.config == model.config and not other.report.wrong
    with torch.no_grad(): assert all(a.equal(b) for a, b in zip(model(image)[:2], other(image)[:2]))

@pytest.mark.parametrize('name', KINDS)
def test_other_classes(name, tmp_path):
    "All but the layers that say classes is kept; these start as in a new model."
    torch.manual_seed(0)
    model = kind(name)
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match='new_classes=True'): load_weights(kind(name, 9), to_layout(model), 'official')
    fresh = Detector.from_pretrained(tmp_path, num_classes=9)
    new = {f'{n}.{p}' for n in class_layers(fresh) for p in ('weight', 'bias')}
    assert set(fresh.report.new) == set(fresh.report.dropped) == new and len(fresh.report.kept) == len(model.state_dict()) - len(new)
    old = model.state_dict()
    assert all(t.equal(old[n]) for n, t in fresh.state_dict().items() if n not in new)
    for layer in class_layers(fresh).values():
        assert layer.out_features == 9 + isinstance(model, DETR)
        focal = torch.full((9,), -4.59511985)
        assert layer.bias.abs().max() < 1 if isinstance(model, DETR) else torch.allclose(layer.bias, focal)
        assert 0.02 < layer.weight.std() < 0.3
    same = Detector.from_pretrained(tmp_path, num_classes=5)
    assert not same.report.new and same.config['num_classes'] == 5
    report = load_weights(kind(name), tmp_path, new_classes=True)       # the same number, other classes
    assert set(report.new) == new

def test_report_is_short():
    report = load_weights(small(), to_layout(small()), allow='*')
    assert repr(report).splitlines()[0] == "layout   'official'" and len(repr(report).splitlines()) == 4
    weights = to_layout(small())
    weights |= {f'class_embed.{i}.{n}': torch.zeros(9) for i in range(2) for n in ('weight', 'bias')} | {'more': torch.zeros(1)}
    report = load_weights(small(), weights, allow=('heads.head.classes.*', 'more'))
    assert repr(report).splitlines()[2:] == ['dropped  5: class_embed.*.weight (x2), class_embed.*.bias (x2), more', 'new      2: heads.head.classes.weight, heads.head.classes.bias']

def test_counters_may_be_missing():
    "Weights with frozen norms go into a model with live ones, and the other way round."
    frozen, live = (deformable_detr(5, ResNet(depths=(1,) * 4, widths=(4,) * 4, stem=8, **norm), dim=32, num_encoder_layers=1, num_decoder_layers=1)
                    for norm in ({}, dict(norm=torch.nn.BatchNorm2d)))
    for layout in ('official', 'transformers', 'ours'):
        assert not load_weights(live, to_layout(frozen, layout), layout).wrong
        assert not load_weights(frozen, to_layout(live, layout), layout).wrong

# ---- files in parts

def test_shards(tmp_path):
    model = small(RefiningHeads)
    for name in ('model.safetensors', 'pytorch_model.bin'):
        for layout in ('ours', 'transformers4'):
            folder = tmp_path/name/layout
            folder.mkdir(parents=True)
            save_weights(model, folder/name, layout, shard_size=20_000)
            parts = [p for p in folder.iterdir() if not p.name.endswith('.json')]
            assert len(parts) > 3 and sum(p.stat().st_size for p in parts) > 20_000
            for path in (folder, folder/f'{name}.index.json'):
                back = read_weights(path)
                assert back.keys() == to_layout(model, layout).keys() and all(t.equal(back[n]) for n, t in to_layout(model, layout).items())
    with pytest.raises(ArgumentError, match='shard_size'): save_weights(model, tmp_path/'w.pth', shard_size=1)

def test_broken_shards(tmp_path):
    save_weights(small(), tmp_path/'model.safetensors', shard_size=20_000)
    index = tmp_path/'model.safetensors.index.json'
    good = json.loads(index.read_text())
    def broken(match, text):
        index.write_text(text if isinstance(text, str) else json.dumps(text))
        with pytest.raises(ArgumentError, match=match): read_weights(tmp_path)
    broken('cannot be read', '{')
    broken('beside it', {'weight_map': {}})
    broken('JSON object', [1])
    broken('beside it', {'weight_map': {'w': '../model.safetensors'}})
    broken('beside it', {'weight_map': {'w': 'model.safetensors.index.json'}})
    broken('not there: more in', {'weight_map': good['weight_map'] | {'more': next(iter(good['weight_map'].values()))}})
    broken('a file that exists', {'weight_map': good['weight_map'] | {'more': 'model-00009.safetensors'}})
    with pytest.raises(ArgumentError, match='pytorch_model.bin'): read_weights(_empty(tmp_path))

def _empty(folder):
    (folder/'empty').mkdir()
    return folder/'empty'

# ---- folders and the hub

HUB4 = dict(model_type='deformable_detr', architectures=['DeformableDetrForObjectDetection'], activation_function='relu', position_embedding_type='sine', d_model=256, backbone='resnet50',
            use_timm_backbone=True, dilation=False, backbone_config=None, encoder_layers=6, decoder_layers=6, encoder_attention_heads=8, decoder_attention_heads=8, encoder_ffn_dim=1024,
            decoder_ffn_dim=1024, encoder_n_points=4, decoder_n_points=4, num_feature_levels=4, num_queries=300, two_stage=False, two_stage_num_proposals=300, with_box_refine=True, dropout=0.1,
            id2label={str(i): f'c{i}' for i in range(91)}, transformers_version='4.22.0')

def test_words_of_version_4():
    "As the configurations on the hub are written: timm's backbone by name."
    words = from_transformers(HUB4)
    assert words['factory'] == 'deformable_detr' and words['heads'] == 'RefiningHeads' and words['num_classes'] == 91 and words['vocab'][90] == 'c90'
    assert words['backbone'] == dict(name='resnet50', norm='frozen', out_indices=(1, 2, 3))
    with torch.device('meta'): assert count(from_config(HUB4)) == FULL['refine'][2]
    assert from_transformers(HUB4 | dict(dilation=True, num_feature_levels=1))['backbone'] == dict(name='resnet50', norm='frozen', out_indices=(3,), dilated=True)
    assert from_transformers(HUB4 | dict(two_stage=True, two_stage_num_proposals=77))['num_queries'] == 77
    assert from_transformers(dict(model_type='detr', backbone='resnet101', num_labels=91))['backbone'] == dict(name='resnet101', norm='frozen', out_indices=(3,))
    assert from_transformers(dict(model_type='dab-detr', temperature_height=10, temperature_width=10))['temperature'] == 10
    for field, match in ((dict(temperature_height=10, temperature_width=20), 'one value'), (dict(query_dim=2), 'query_dim'), (dict(keep_query_pos=True), 'keep_query_pos')):
        with pytest.raises(ArgumentError, match=match): from_transformers(dict(model_type='dab-detr') | field)

def test_runs_are_read(tmp_path):
    "The folder that `deformlit-train` leaves."
    from safetensors.torch import save_file
    from deformlit.train import DEFAULTS, build_model
    config = DEFAULTS | dict(vocab=['0', '1', '2'], dim=32, ffn=32, decoder_layers=2, widths=[8, 8, 8, 8], queries=5)
    config = json.loads(json.dumps(config))
    model = build_model(config)
    save_file({n: t.contiguous() for n, t in model.state_dict().items()}, tmp_path/'model.safetensors')
    (tmp_path/'config.json').write_text(json.dumps(config))
    other = DeformableDETR.from_pretrained(tmp_path)
    assert not other.report.wrong and other.config == config
    assert list(class_layers(Detector.from_pretrained(tmp_path, num_classes=7)).values())[0].out_features == 7
    other.save_pretrained(tmp_path/'again')
    assert json.loads((tmp_path/'again/config.json').read_text()) == config
    with pytest.raises(ArgumentError, match='transformers has'): other.save_pretrained(tmp_path/'no', layout='transformers4')

def test_hub(tmp_path, monkeypatch):
    create('detr').save_pretrained(tmp_path/'there')
    (tmp_path/'nothing').mkdir()
    asked = []
    def download(name, revision=None, allow_patterns=()):
        asked.append((name, revision, tuple(allow_patterns)))
        if name == 'no/such': raise OSError('404 Client Error\nmore lines')
        return str(tmp_path/name.split('/')[1])
    monkeypatch.setitem(sys.modules, 'huggingface_hub', types.SimpleNamespace(snapshot_download=download))
    assert isinstance(Detector.from_pretrained('owner/there', revision='v1'), DETR)
    assert asked == [('owner/there', 'v1', ('config.json', 'model*.safetensors*'))]
    with pytest.raises(ArgumentError, match='no/such: no folder here, and from the hub OSError: 404 Client Error$'): find_folder('no/such')
    with pytest.raises(ArgumentError, match='config.json'): load_pretrained('owner/nothing')
    assert asked[-1][2] == ('config.json', 'pytorch_model*.bin*')           # pickles only where there is nothing else
    for name in ('no folder', './away', 'a/b/c'):
        with pytest.raises(ArgumentError, match='owner/name'): find_folder(name)
    (tmp_path/'file').write_text('')
    with pytest.raises(ArgumentError, match='load_weights'): find_folder(tmp_path/'file')
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    with pytest.raises(ArgumentError, match='pip install huggingface_hub'): find_folder('owner/name')

def test_folders_that_do_not_fit(tmp_path):
    model = create('deformable_detr')
    model.save_pretrained(tmp_path)
    with pytest.raises(ArgumentError, match='Detector.from_pretrained'): DABDeformableDETR.from_pretrained(tmp_path)
    config = tmp_path/'config.json'
    for text, match in (('{}', "'factory'"), ('[]', 'JSON object'), ('{', 'cannot be read'), (json.dumps(model.config | dict(factory='yolo')), 'yolo'), (json.dumps(model.config | dict(points=3)), 'points'),
                        (json.dumps(model.config | dict(vocab=['a'])), '5 names')):
        config.write_text(text)
        with pytest.raises(ArgumentError, match=match): load_pretrained(tmp_path)
    config.write_text(json.dumps(model.config | dict(num_queries=7)))
    with pytest.raises(WeightsError, match='another shape: queries.content.weight'): load_pretrained(tmp_path)
    assert load_pretrained(tmp_path, allow='queries.*')[1].new == ['queries.content.weight', 'queries.position.weight']

def test_only_what_can_be_described_is_saved(tmp_path):
    with pytest.raises(ArgumentError, match='create_detector'): small().save_pretrained(tmp_path)
    with pytest.raises(ArgumentError, match='numbers'): create_detector('deformable_detr', 5, TRUNK, heads=lambda *_: None)
    assert create('deformable_detr', heads=RefiningHeads).config['heads'] == 'RefiningHeads'
    model = small()
    model.save_pretrained(tmp_path, dict(factory='deformable_detr', num_classes=5, backbone=TRUNK, **SMALL))
    assert not Detector.from_pretrained(tmp_path).report.wrong
    with pytest.raises(ArgumentError, match='neck.level_embed'): model.save_pretrained(tmp_path, dict(factory='deformable_detr', num_classes=5, backbone=TRUNK, num_levels=5, **SMALL))
    with pytest.raises(ArgumentError, match='save_weights'): create('detr').save_pretrained(tmp_path, layout='official')
    for factory, args, match in (('dab_deformable_detr', {}, 'transformers has'), ('detr', dict(residual='PreNorm'), 'residual'), ('deformable_detr', dict(groups=16), 'groups')):
        with pytest.raises(ArgumentError, match=match): create(factory, **args).save_pretrained(tmp_path, layout='transformers4/resnet')
    with pytest.raises(ArgumentError, match="transformers4/resnet"): create('detr').save_pretrained(tmp_path, layout='transformers4')

def test_nothing_of_transformers_is_imported():
    "The chapter's own module needs neither transformers nor the hub."
    import subprocess
    code = "import sys; sys.modules['transformers'] = sys.modules['huggingface_hub'] = sys.modules['timm'] = None; from deformlit.checkpoints import *; print(len(TABLES))"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == str(len(TABLES))
