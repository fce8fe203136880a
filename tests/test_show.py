"Pictures and moving figures: what does not belong on the page."
import json, re, shutil, subprocess, sys
import numpy as np, pytest, torch
from torch import nn
from deformlit.core import *
from deformlit.show import *

@pytest.fixture(autouse=True)
def paper():
    "Draw without a screen, and leave no figures behind."
    import matplotlib
    matplotlib.use('agg')
    import matplotlib.pyplot as plt
    yield
    plt.close('all')

def test_import_is_light():
    code = "import sys, deformlit.show; print([o for o in ('matplotlib', 'PIL', 'skimage', 'sklearn', 'IPython', 'torchvision') if o in sys.modules])"
    before = "import sys, torch; print([o for o in ('matplotlib', 'PIL', 'skimage', 'sklearn', 'IPython', 'torchvision') if o in sys.modules])"
    run = lambda c: subprocess.run([sys.executable, '-c', c], capture_output=True, text=True, check=True).stdout
    assert run(code) == run(before)

def test_style_is_put_back():
    import matplotlib as mpl
    before = dict(mpl.rcParams)
    with style(): assert mpl.rcParams['text.color'] == '#7a7a7a'
    with pytest.raises(KeyError), style(): raise KeyError
    show_map(ramp())
    assert dict(mpl.rcParams) == before

def test_ramp():
    assert_close(ramp(2, 3), torch.tensor([[[[0., 1, 2], [3, 4, 5]]]]))

@pytest.mark.parametrize('name', ['chelsea', 'astronaut', 'coffee', 'rocket', 'china', 'flower'])
def test_example_photos(name):
    x = example_photo(name, 16)
    assert x.shape == (3, 16, 16) and x.dtype == torch.float32 and 0 <= x.min() < x.max() <= 1

def test_example_photo_whole_and_unknown():
    assert example_photo().shape == (3, 300, 451)
    with pytest.raises(ArgumentError, match='`name`.*chelsea'): example_photo('dog')

def test_to_array_takes_all_forms():
    from PIL import Image
    x = example_photo(size=8)
    a = to_array(x)
    assert a.shape == (8, 8, 3) and a.dtype == np.uint8
    for o in (a, Image.fromarray(a), torch.tensor(a / 255).permute(2, 0, 1), a / 255): np.testing.assert_array_equal(to_array(o), a)
    for o in (x[:1], x[0], a[..., 0], a[..., :1]): np.testing.assert_array_equal(to_array(o), a[..., 0])
    for o in (torch.zeros(2, 4, 4), torch.zeros(1, 3, 4, 4), np.zeros((4, 4, 2)), np.zeros(4)):
        with pytest.raises(ArgumentError, match='`img`'): to_array(o)

def test_boxes_lie_where_they_should():
    ax = show_boxes(torch.zeros(3, 10, 20), torch.tensor([[.5, .5, .2, .4]]), labels=[3], scores=[.5])
    assert_close(torch.tensor(ax.patches[-1].get_bbox().bounds), torch.tensor((.4, .3, .2, .4), dtype=torch.float64))
    assert ax.texts[0].get_text() == '3 0.50'
    for empty in ([], torch.zeros(0, 4)): assert not show_boxes(torch.zeros(3, 10, 20), empty).patches
    assert show_boxes(torch.zeros(3, 4, 4), torch.rand(2, 4), labels=torch.tensor([1, 2])).texts[1].get_text() == '2'
    for bad in (dict(labels=[1, 2]), dict(scores=[])):
        with pytest.raises(ArgumentError): show_boxes(torch.zeros(3, 4, 4), torch.rand(1, 4), **bad)
    with pytest.raises(ArgumentError, match='`boxes`'): show_boxes(torch.zeros(3, 4, 4), torch.rand(2, 5))

def test_offsets_in_pixels():
    ax = show_offsets(torch.tensor([1., -2.]).expand(4, 8, 2))
    q = ax.collections[-1]
    assert_close(torch.tensor(np.asarray(q.get_offsets())[0]), torch.tensor([.5 / 8, .5 / 4], dtype=torch.float64))
    np.testing.assert_allclose(q.U, 1 / 8); np.testing.assert_allclose(q.V, -2 / 4)
    assert len(show_offsets(torch.zeros(100, 50, 2)).collections[-1].U) == 20 * 10
    with pytest.raises(ArgumentError, match='`offsets`'): show_offsets(torch.zeros(4, 4, 3))

def spots(ax): return torch.cat([torch.tensor(np.asarray(o.get_offsets())) for o in ax.collections if len(o.get_offsets())])

@pytest.mark.parametrize('shape,levels', [((5,), 1), ((3, 5), 3), ((2, 3, 5), 3), ((2, 4, 3, 5), 3)])
def test_points_of_any_rank(shape, levels):
    points, weights = torch.rand(*shape, 2), torch.rand(shape)
    ax = show_points(torch.zeros(3, 6, 8), points, weights, reference=torch.tensor([.5, .5]))
    assert len(ax.collections) >= levels
    found = spots(ax)
    assert len(found) == points[..., 0].numel() == len(set(map(tuple, found.tolist())))
    assert_close(found.sort(0)[0], points.double().view(-1, 2).sort(0)[0], rtol=0, atol=1e-6)
    assert len(np.atleast_1d(show_levels(torch.zeros(3, 6, 8), points, weights, reference=torch.rand(levels, 4)))) == levels

def test_weights_rule_size_and_colour():
    ax = show_points(torch.zeros(3, 6, 8), torch.tensor([[.1, .1], [.9, .9], [.5, .5]]), torch.tensor([.1, .6, .3]))
    c = ax.collections[0]
    order = np.asarray(c.get_offsets())[:, 0]
    np.testing.assert_allclose(order, [.1, .5, .9], atol=1e-6)        # the strongest is drawn last
    assert (np.diff(c.get_sizes()) > 0).all() and (np.diff(np.asarray(c.get_array())) > 0).all()

def test_far_points_are_counted():
    ax = show_points(torch.zeros(3, 6, 8), torch.tensor([[.5, .5], [1.04, .5], [4., 4.], [-1., .2]]))
    assert len(spots(ax)) == 2 and [o.get_text() for o in ax.texts] == ['2 farther out']

@pytest.mark.parametrize('kwargs', [dict(), dict(weights=torch.zeros(3)), dict(reference=torch.tensor([.2, .2, .1, .1])), dict(boxes=torch.rand(2, 4)), dict(notes=False)])
def test_points_options(kwargs): show_points(torch.zeros(3, 6, 8), torch.rand(3, 2, requires_grad=True), **kwargs).figure.canvas.draw()

@pytest.mark.parametrize('bad', [dict(points=torch.rand(3, 3)), dict(points=[[0, 0]]), dict(weights=torch.rand(4)), dict(reference=torch.rand(3)), dict(reference=torch.rand(5, 2))])
def test_bad_points(bad):
    kwargs = dict(points=torch.rand(3, 2)) | bad
    with pytest.raises(ArgumentError, match=f'`{list(bad)[0]}`'): show_points(torch.zeros(3, 6, 8), **kwargs)

class Looks(nn.Module):
    "Counts the calls of `look`."
    def __init__(self): super().__init__(); self.shift, self.calls = nn.Parameter(torch.tensor(.1)), 0
    def look(self, query, reference, spatial_shapes):
        self.calls += 1
        b, q, l = reference.shape[:3]
        return (reference[:, :, None, :, None, :2] + self.shift).expand(b, q, 2, l, 4, 2), torch.full((b, q, 2, l, 4), 1 / (l * 4))
    def forward(self, query, reference, value, spatial_shapes, padding_mask=None): return query + self.look(query, reference, spatial_shapes)[0].mean()

@pytest.mark.parametrize('last', [2, 4])
def test_record_points(last):
    model, shapes = nn.ModuleDict(dict(a=Looks(), b=nn.Linear(2, 2), c=Looks())), torch.tensor([[4, 6], [2, 3]])
    reference = torch.rand(2, 3, 2, last)
    with record_points(model) as looks:
        model['a'](torch.zeros(2, 3, 8), reference, None, shapes)
        model['c'](query=torch.zeros(2, 3, 8), reference=reference, value=None, spatial_shapes=shapes).sum().backward()
    assert [o.name for o in looks] == ['a', 'c'] and looks[0].shapes == [(4, 6), (2, 3)]
    assert_close(looks[0].points, (reference[:, :, None, :, None, :2] + .1).expand(2, 3, 2, 2, 4, 2))
    assert not looks[1].points.requires_grad and looks[1].weights.shape == (2, 3, 2, 2, 4)
    calls = model['a'].calls
    model['a'](torch.zeros(2, 3, 8), reference, None, shapes)
    assert model['a'].calls == calls + 1 and len(looks) == 2          # the hooks are gone
    show_look(torch.zeros(3, 8, 8), looks[0], query=2, batch=1)
    with pytest.raises(ZeroDivisionError), record_points(model): 1 / 0
    assert not any(m._forward_hooks for m in model.modules())
    with record_points(model['a']) as looks: model['a'](torch.zeros(2, 3, 8), reference, None, shapes)
    assert looks[0].name == 'model'

def test_jpeg_uri():
    import base64, io
    from PIL import Image
    uri = jpeg_uri(example_photo(size=16))
    assert Image.open(io.BytesIO(base64.b64decode(uri.split(',')[1]))).size == (16, 16) and uri == jpeg_uri(example_photo(size=16))

SVG = '<svg viewBox="0 0 200 100" width="400"><circle class="handle" data-x="50" data-y="50" cx="50" cy="50" r="10"/></svg>'

def test_live_html():
    page = live('some-figure', SVG, 'drag(root.querySelector(".handle"), () => 0)', dict(a=torch.tensor([1., 2.]), evil='</script>'), 'x < y')._repr_html_()
    assert 'id="live-some-figure"' in page and '"a":[1.0,2.0]' in page and '"evil":"<\\/script>"' in page and 'x &lt; y' in page and page.count('</script>') == 1
    assert 'http' not in page
    for bad in (dict(name='Some Figure'), dict(svg='<svg></svg>')):
        with pytest.raises(ArgumentError, match=f'`{list(bad)[0]}`'): live(**(dict(name='a', svg=SVG, script='', data={}) | bad))

def browser():
    for o in ('chromium', 'chromium-browser', 'google-chrome', 'chrome'):
        if shutil.which(o): return shutil.which(o)

@pytest.mark.slow
@pytest.mark.skipif(not browser(), reason='no Chromium on the path')
def test_drag_by_pointer_and_keys(tmp_path):
    script = 'const handle = root.querySelector(".handle"); drag(handle, (x, y) => { handle.setAttribute("cx", x); handle.setAttribute("cy", y); }, 2, [0, 0, 100, 100]);'
    gestures = """
    const h = document.querySelector('.handle'), seen = [], note = () => seen.push([+h.dataset.x, +h.dataset.y, +h.getAttribute('cx')]);
    const box = h.getBoundingClientRect(), cx = box.x + box.width / 2, cy = box.y + box.height / 2;
    const send = (type, dx, dy) => h.dispatchEvent(new PointerEvent(type, {clientX: cx + dx, clientY: cy + dy, pointerId: 1, bubbles: true, cancelable: true}));
    const key = (key, shiftKey) => h.dispatchEvent(new KeyboardEvent('keydown', {key, shiftKey, bubbles: true, cancelable: true}));
    send('pointermove', 30, 0); note();                                            // not held: nothing
    send('pointerdown', 4, 0); note();                                             // held off its centre: it must not jump
    send('pointermove', 24, 10); note(); send('pointerup', 24, 10); send('pointermove', 90, 90); note();
    key('ArrowRight'); note(); key('ArrowUp', true); note(); for (let i = 0; i < 60; i++) key('ArrowRight'); note();
    document.title = JSON.stringify({seen, focus: document.activeElement === h, tab: h.tabIndex, text: h.getAttribute('aria-valuetext'), touch: h.style.touchAction});
    """
    (tmp_path / 'page.html').write_text(f'<html><body>{live("test", SVG, script, {})._repr_html_()}<script>{gestures}</script></body></html>')
    dom = subprocess.run([browser(), '--headless', '--no-sandbox', '--disable-gpu', '--window-size=800,600', '--dump-dom', (tmp_path / 'page.html').as_uri()],
                         capture_output=True, text=True, timeout=120).stdout
    told = json.loads(re.search('<title>(.*?)</title>', dom)[1].replace('&quot;', '"'))
    assert told['seen'] == [[50, 50, 50], [50, 50, 50], [60, 55, 60], [60, 55, 60], [62, 55, 62], [62, 45, 62], [100, 45, 100]]
    assert told['focus'] and told['tab'] == 0 and told['text'] == '100, 45' and told['touch'] == 'none'

def test_other_looks_are_left_alone():
    "A backbone's attention has a `look` of another kind: a detector with it is drawn all the same."
    from deformlit.deformed_keys import DeformedKeysAttention
    from deformlit.multiscale import MSDeformAttn
    class Toy(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.attn = DeformedKeysAttention(8, 2), MSDeformAttn(8, 2, 2, 2)
        def forward(self, x): return self.attn(self.backbone(x).flatten(2).mT, torch.rand(1, 16, 2, 2), torch.rand(1, 20, 8), ((4, 4), (2, 2)))
    model = Toy()
    with record_points(model) as looks: model(torch.rand(1, 8, 4, 4))
    assert [o.name for o in looks] == ['attn']
    with pytest.raises(ArgumentError, match='model'):
        with record_points(model.backbone): pass
