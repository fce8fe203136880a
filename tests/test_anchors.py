"""Anchors: shapes, dtypes and gradients that no page shows, and the moving figure's formula against ours."""
import json, re, shutil, subprocess
from pathlib import Path

import pytest, torch
from torch.autograd import gradcheck
from torch.testing import assert_close

from deformlit.anchors import *
from deformlit.core import ArgumentError
from deformlit.layers import SinePosition
from deformlit.points import pixel_centres

def test_encoding_is_that_of_the_pixels():
    "At the places where the image's own encoding counts pixels, with its temperature, both are the same."
    h, w = 5, 7
    image = SinePosition(16, 20., eps=0.)(torch.zeros(1, h, w, dtype=torch.bool))[0]
    x, y = torch.arange(1, w + 1) / w, torch.arange(1, h + 1) / h
    places = torch.stack(torch.meshgrid(x, y, indexing='xy'), -1)
    assert_close(anchor_encoding(places, 16, 20.).permute(2, 0, 1), image)

@pytest.mark.parametrize('shape', [(4,), (3, 2), (2, 5, 4), (0, 4)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_shapes_and_dtypes(shape, dtype):
    out = anchor_encoding(torch.rand(shape, dtype=dtype), 8)
    assert out.shape == (*shape[:-1], 4 * shape[-1]) and out.dtype == dtype

def test_gradients():
    a, p, s = (torch.rand(n, m, dtype=torch.float64, requires_grad=True) for n, m in ((3, 4), (5, 2), (3, 2)))
    assert gradcheck(lambda a, p, s: anchor_logits(a * .8 + .1, p, 8, s), (a, p, s))
    assert gradcheck(lambda a, d: move_anchor(a * .8 + .1, d), (a, torch.randn(3, 4, dtype=torch.float64, requires_grad=True)))
    assert gradcheck(lambda a, d: move_anchor(a * .8 + .1, d), (p, torch.randn(5, 4, dtype=torch.float64, requires_grad=True)))

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_modulation_divides_precisely(dtype):
    torch.manual_seed(0)
    part, place, x = SizeModulation(16), torch.randn(1, 5, 16), torch.randn(1, 5, 16)
    anchors = torch.tensor([[[.5, .5, 1e-6, .3]]]).expand(1, 5, 4)
    with torch.autocast('cpu', dtype=dtype): out = part(place, x, anchors)
    assert out.dtype == torch.float32 and out.isfinite().all()
    assert_close(out, part(place, x, anchors), rtol=.02, atol=.02)

def test_nothing_given_is_changed():
    place, asked, anchors = torch.randn(1, 5, 16), torch.rand(1, 5, 2), torch.rand(1, 5, 4)
    before = [o.clone() for o in (place, asked, anchors)]
    modulate(place, asked, anchors); move_anchor(anchors, anchors); anchor_encoding(anchors, 8)
    assert all(torch.equal(a, b) for a, b in zip(before, (place, asked, anchors)))

def test_a_step_of_zero_keeps_the_anchor():
    boxes = torch.rand(100, 4, dtype=torch.float64) * .99 + .005
    assert_close(move_anchor(boxes, torch.zeros_like(boxes)), boxes)
    points = boxes[:, :2]
    assert_close(move_anchor(points, torch.zeros(100, 4, dtype=torch.float64)), torch.cat([points, torch.full_like(points, .5)], -1))
    assert move_anchor(torch.tensor([0., 1., 0., 1.]), torch.full((4,), 20.)).isfinite().all()

def test_bad_arguments():
    for bad in (torch.rand(3, 3), torch.rand(()), [1., 2.]):
        with pytest.raises(ArgumentError, match='`anchors`'): anchor_encoding(bad, 8)
    with pytest.raises(ArgumentError, match='`dim`'): anchor_encoding(torch.rand(3, 4), 6)
    with pytest.raises(ArgumentError, match='`anchors`'): modulate(torch.rand(3, 8), torch.rand(3, 2), torch.rand(3, 2))

def figure():
    "The moving figure's script and data, as they stand in the chapter."
    cells = json.loads((Path(__file__).parents[1]/'nbs/16_anchors.ipynb').read_text())['cells']
    html = [''.join(o['data']['text/html']) for c in cells for o in c.get('outputs', []) if 'text/html' in o.get('data', {})]
    page, = [o for o in html if 'id="live-anchor"' in o]
    return re.search(r'<script>.*?data = (\{.*?\});\nconst svg', page, re.S)[1], re.search(r'\nfunction like\(.*?\n\}\nfunction weights\(.*?\n\}', page, re.S)[0]

@pytest.mark.skipif(not shutil.which('node'), reason='no node on the path')
def test_the_moving_figure_repeats_the_formula():
    data, functions = figure()
    given = json.loads(data)
    rows, cols = given['grid']
    cases = [([.42, .42, .12, .5], given['asked'], '20'), ([.1, .95, .9, .04], given['asked'], '2'), ([.5, .5, .3, .3], None, '200'), ([0., 1., 1.2, .7], [.3, .8], '10000')]
    script = f'const data = {data};{functions}\nconsole.log(JSON.stringify({json.dumps([c[:3] for c in cases])}.map(([box, asked, t]) => weights(box, asked, data.kernels[t], ...data.grid, data.dim))))'
    theirs = json.loads(subprocess.run(['node', '-e', script], capture_output=True, text=True, check=True, timeout=60).stdout)
    pixels = pixel_centres(rows, cols).flatten(0, 1)
    for (box, asked, t), weights in zip(cases, theirs):
        ours = anchor_logits(torch.tensor([box]), pixels, given['dim'], None if asked is None else torch.tensor([asked]), float(t)).softmax(-1)[0]
        assert_close(torch.tensor(weights), ours, rtol=.05, atol=1e-5)
        assert abs(sum(weights) - 1) < 1e-6
