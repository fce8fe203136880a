"""What does not belong on the page of `22 dilateformer`: variants, masks, the figure to move. What all models of images must do is in `test_image_models.py`."""
import json, math, re, shutil, subprocess

import pytest, torch
from torch.testing import assert_close

from deformlit.backbones import count_macs, create_model, macs_by_module
from deformlit.core import ArgumentError, backend
from deformlit.dilated import *
from deformlit.dilateformer import *
from notebooks import nbs

SMALL = dict(dims=(12, 24), depths=(1, 1), num_heads=(3, 3), dilated=(True, False), num_classes=4)
def x(*size): return torch.randn(*size, generator=torch.Generator().manual_seed(0))

STEMS, DOWNS = (OverlappingStem, PointwiseStem, PatchStem), (ConvDown, PatchDown, MeanDown3, MeanDown2)

@pytest.mark.parametrize('stem', STEMS)
@pytest.mark.parametrize('down', DOWNS)
def test_variants(stem, down):
    m = dilateformer(**SMALL, stem=stem, down=down, down_position=DepthwisePosition)
    for size in ((1, 1), (33, 7), (64, 40)):
        maps = m.eval().forward_intermediates(x(1, 3, *size), intermediates_only=True)
        assert [o.shape[2:] for o in maps] == [(-(-size[0] // s), -(-size[1] // s)) for s in (4, 8)]
    m.train()(x(2, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None for p in m.parameters())

def test_parts_by_name():
    m = create_model('dilateformer', **SMALL, stem='PatchStem', down=MeanDown2)
    assert type(m.stem) is PatchStem and m.config['stem'] == 'PatchStem' and m.config['down'] == 'MeanDown2'
    assert create_model('dilateformer', **SMALL, stem=lambda i, d: PatchStem(i, d)).config is None       # cannot be written down, but works

def test_whole_model_by_the_loop():
    m = dilateformer(**SMALL, drop_path_rate=0.).double().eval()
    image = x(1, 3, 20, 28).double()
    want = m(image)
    with backend('loop'): assert_close(m(image), want)

def test_masked_windows():
    m = dilateformer(**SMALL, padding=-math.inf)
    assert all(b.attn.padding == -math.inf for b in m.stages[0]) and m.eval()(x(1, 3, 5, 5)).isfinite().all()

def test_drop_rates():
    m = dilateformer(depths=(2, 3), dims=(12, 24), num_heads=(3, 3), dilated=(True, False), drop_path_rate=.4, drop_rate=.1, proj_drop=.2, attn_drop=.3)
    assert [round(b.drop_path.drop, 6) for s in m.stages for b in s] == [0, .1, .2, .3, .4] and m.head_drop.p == .1
    assert all(b.mlp.drop.p == b.attn.proj_drop.p == .2 and b.attn.attn_drop == .3 for s in m.stages for b in s)
    assert m(x(2, 3, 32, 32)).isfinite().all()

def test_first_weights():
    m = dilateformer(**SMALL | dict(num_classes=1000))
    assert abs(m.head.weight.std() / .02 - 1) < .05 and m.head.bias.abs().max() == 0 and abs(m.stages[1][0].mlp.fc1.weight.std() / .02 - 1) < .05
    m.reset_classifier(500)
    assert abs(m.head.weight.std() / .02 - 1) < .05 and m.head.bias.abs().max() == 0

def test_weights_of_global_attention():
    m = GlobalAttention(12, 3)
    w, v = m.weights(x(2, 12, 3, 5)), m.heads(x(2, 12, 3, 5))[2]
    assert w.shape == (2, 3, 15, 15)
    assert_close(m.proj((w @ v).transpose(1, 2).flatten(2)).transpose(1, 2).unflatten(2, (3, 5)), m(x(2, 12, 3, 5)))
    drop = GlobalAttention(12, 3, attn_drop=.5)
    assert not torch.allclose(drop(x(1, 12, 4, 4)), drop(x(1, 12, 4, 4)))

def test_macs_of_attention():
    m = dilateformer(**SMALL)
    by = macs_by_module(m, (32, 64))
    assert by['stages.0.0.attn'] == 2 * 9 * 8 * 16 * 12 and by['stages.1.0.attn'] == 2 * (4 * 8)**2 * 24
    assert by['stages.1.0.attn.qkv'] == 32 * 24 * 72 and by['stages.0.0.position.conv'] == 9 * 8 * 16 * 12 and count_macs(m, (32, 64)) == sum(by.values())

def test_bad_arguments():
    for bad, words in ((dict(num_heads=(3, 5)), 'divisor of dim=24'), (dict(num_heads=(4, 3)), 'multiple of 3'), (dict(depths=(1,)), '`depths`'), (dict(dilated=(True,) * 3), '`dilated`'), (dict(kernel_size=4), '`kernel_size`'), (dict(drop_path_rate=1.), '`drop`')):
        with pytest.raises(ArgumentError, match=words): dilateformer(**SMALL | bad)
    with pytest.raises(ArgumentError, match='divisor'): GlobalAttention(12, 5)
    with pytest.raises(ArgumentError, match='`x`'): GlobalAttention(12, 3)(x(1, 11, 2, 2))

@pytest.mark.skipif(not shutil.which('node'), reason='no node on the path')
def test_the_moving_figure_repeats_the_formula():
    cells = json.loads((nbs/'22_dilateformer.ipynb').read_text(encoding='utf-8'))['cells']
    page, = [h for c in cells for o in c.get('outputs', []) if 'id="live-pyramid"' in (h := ''.join(o.get('data', {}).get('text/html', '')))]
    function = re.search(r'\nfunction reads\(.*?\n\}', page, re.S)[0]
    cases = [(c, r, stage, stride) for stage, stride in enumerate((4, 8, 16, 32)) for c, r in ((0, 0), (3, 5), (6, 6))]
    script = f'{function}\nconsole.log(JSON.stringify([' + ','.join(f'reads({c}, {r}, {stage}, {stride}, 224)' for c, r, stage, stride in cases) + ']))'
    theirs = json.loads(subprocess.run(['node', '-e', script], capture_output=True, text=True, check=True, timeout=60).stdout)
    for (c, r, stage, stride), groups in zip(cases, theirs):
        n = 224 // stride
        want = [[(x, y) for y in range(n) for x in range(n)]] if stage > 1 else [[(c + dx, r + dy) for dx, dy in window_offsets(3, o)] for o in (1, 2, 3)]
        assert [g for g in groups if g] == [[[(a + .5) * stride, (b + .5) * stride] for a, b in g] for g in want]
