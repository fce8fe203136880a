"""COCO's average precision against pycocotools, the loop, and in fastai."""
import contextlib, io, math, pickle, time
import numpy as np, pytest, torch
from deformlit.core import ArgumentError
from deformlit.metrics import *

def scenes(seed, images=8, classes=4, size=200., most=8, extra=6, ties=False, absent=(), grid=True):
    "Random objects, noisy answers on them and some anywhere. On a grid of quarter pixels, so that (x, y, w, h) and corners are the same numbers."
    g = np.random.default_rng(seed)
    snap = (lambda x: np.round(x * 4) / 4) if grid else (lambda x: x)
    targets, detections = [], []
    for _ in range(images):
        n = g.integers(0, most + 1)
        wh = snap(np.exp(g.uniform(np.log(8), np.log(150), (n, 2))))
        xy = snap(g.uniform(0, size - wh))
        label = g.choice([c for c in range(classes) if c not in absent], n)
        wh_any = snap(g.uniform(1, 120, (extra, 2)))
        seen_xy = np.concatenate([snap(xy + g.normal(0, .08, xy.shape) * wh) for _ in range(2)] + [snap(g.uniform(0, 80, (extra, 2)))])
        seen_wh = np.concatenate([snap(wh * np.exp(g.normal(0, .1, wh.shape))) for _ in range(2)] + [wh_any])
        score = g.random(len(seen_xy))
        if ties: score = np.round(score * 3) / 3
        keep = g.random(len(seen_xy)) < .9
        seen = np.concatenate([seen_xy, seen_xy + seen_wh], 1)[keep]
        targets.append((np.concatenate([xy, xy + wh], 1), label))
        detections.append((seen, score[keep], np.concatenate([label, label, g.integers(0, classes, extra)])[keep]))
    return detections, targets

def reference(detections, targets, classes):
    "pycocotools: the six averages, and precision `c a t r`."
    pytest.importorskip('pycocotools')
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    xywh = lambda b: [float(b[0]), float(b[1]), float(b[2] - b[0]), float(b[3] - b[1])]
    anns = [dict(image_id=i, category_id=int(l), bbox=xywh(b), area=xywh(b)[2] * xywh(b)[3], iscrowd=0)
            for i, (boxes, labels) in enumerate(targets) for b, l in zip(np.asarray(boxes).reshape(-1, 4), labels)]
    for k, a in enumerate(anns, 1): a['id'] = k
    found = [dict(image_id=i, category_id=int(l), bbox=xywh(b), score=float(s))
             for i, (boxes, scores, labels) in enumerate(detections) for b, s, l in zip(np.asarray(boxes).reshape(-1, 4), scores, labels)]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = dict(info={}, images=[dict(id=i, width=1000, height=1000) for i in range(len(targets))], annotations=anns, categories=[dict(id=c) for c in range(classes)])
        coco.createIndex()
        if found: res = coco.loadRes(found)
        else:       # loadRes cannot read an empty list
            res = COCO()
            res.dataset = dict(coco.dataset, annotations=[])
            res.createIndex()
        e = COCOeval(coco, res, 'bbox')
        e.evaluate(); e.accumulate(); e.summarize()
    return e.stats[:6], e.eval['precision'][:, :, :, :, 2].transpose(2, 3, 0, 1)

def compare(detections, targets, classes):
    stats, precision = reference(detections, targets, classes)
    ours = coco_ap(detections, targets, classes)
    np.testing.assert_allclose(np.nan_to_num(ours.precision, nan=-1), precision, rtol=0, atol=1e-12)     # pycocotools divides by n + 2e-16
    np.testing.assert_allclose(np.nan_to_num(list(ours.numbers().values()), nan=-1), stats, rtol=0, atol=1e-12)
    return ours

@pytest.mark.parametrize('seed', range(12))
def test_pycocotools(seed): compare(*scenes(seed), 4)

@pytest.mark.parametrize('seed', range(4))
def test_any_numbers(seed): compare(*scenes(seed, grid=False), 4)

@pytest.mark.parametrize('seed', range(6))
def test_equal_scores(seed): compare(*scenes(seed, ties=True), 4)

@pytest.mark.parametrize('seed', range(3))
def test_class_without_objects(seed):
    ours = compare(*scenes(seed, absent=(1,)), 4)
    assert np.isnan(ours.per_class[1]) and not np.isnan(ours.per_class[0])

def test_many_boxes():
    detections, targets = scenes(0, images=3, classes=2, extra=300)
    assert max(np.bincount(d[2]).max() for d in detections) > 100
    compare(detections, targets, 2)
    assert coco_ap(detections, targets, 2, max_dets=5).AP < coco_ap(detections, targets, 2).AP

@pytest.mark.parametrize('side', [32, 96])
def test_areas_on_the_limit(side):
    at = lambda s, x=0.: [x, 0., x + s, s]
    targets = [([at(side), at(side - .25, 200.), at(side + .25, 400.)], [0, 0, 0])]
    detections = [([at(side), at(side - .25, 200.), at(side + .25, 400.), at(side, 600.), at(side + .25, 800.)], [.9, .8, .7, .95, .6], [0]*5)]
    compare(detections, targets, 1)

def test_same_iou_twice():
    "Two objects in the same place, and boxes half-way between two objects."
    targets = [([[0, 0, 40, 40], [0, 0, 40, 40], [100, 0, 140, 40], [110, 0, 150, 40], [0, 100, 30, 130], [4, 100, 40, 136]], [0]*6)]
    detections = [([[0, 0, 40, 40], [0, 0, 40, 40], [105, 0, 145, 40], [105, 0, 145, 40], [2, 100, 36, 134], [0, 100, 36, 130]], [.9, .8, .7, .7, .6, .5], [0]*6)]
    compare(detections, targets, 1)

def test_nothing():
    none, empty = ([], [], []), ([], [])
    detections, targets = scenes(1)
    compare([none]*len(targets), targets, 4)
    ours = compare(detections, [empty]*len(targets), 4)
    assert all(math.isnan(v) for v in ours.numbers().values()) and np.isnan(ours.per_class).all()
    compare([none], [empty], 4)
    assert math.isnan(coco_ap([], [], 3).AP) and coco_ap([], [], 3).per_class.shape == (3,)
    compare([none if i % 2 else d for i, d in enumerate(detections)], [empty if i % 3 else t for i, t in enumerate(targets)], 4)

def test_empty_boxes():
    compare([([[5, 5, 5, 9], [0, 0, 20, 20]], [.9, .8], [0, 0])], [([[0, 0, 20, 20]], [0])], 1)

@pytest.mark.parametrize('seed', range(3))
def test_loop(seed):
    detections, targets = scenes(seed, images=4)
    ours = coco_ap(detections, targets, 4).precision[:, 0].mean(-1)
    loop = [[average_precision_loop(detections, targets, c, t) for t in np.linspace(.5, .95, 10)] for c in range(4)]
    np.testing.assert_allclose(ours, loop, rtol=0, atol=1e-12)

def test_tensors_and_lists():
    detections, targets = scenes(2)
    tensors = [tuple(torch.tensor(o) for o in d) for d in detections], [tuple(torch.tensor(o) for o in t) for t in targets]
    lists = [tuple(o.tolist() for o in d) for d in detections], [tuple(o.tolist() for o in t) for t in targets]
    want = coco_ap(detections, targets, 4)
    for other in (tensors, lists): np.testing.assert_array_equal(coco_ap(*other, 4).precision, want.precision)

def test_fast():
    g = np.random.default_rng(0)
    targets, detections = [], []
    for _ in range(500):
        n = g.integers(0, 7)
        wh = np.exp(g.uniform(np.log(12), np.log(56), (n, 2)))
        xy = g.uniform(0, 128 - wh)
        targets.append((np.concatenate([xy, xy + wh], 1), g.integers(0, 10, n)))
        near = g.integers(0, max(n, 1), 100)
        box = np.concatenate([xy, xy + wh], 1)[near] + g.normal(0, 2, (100, 4)) if n else g.uniform(0, 50, (100, 4))
        box[:, 2:] = np.maximum(box[:, 2:], box[:, :2])
        detections.append((box, g.random(100), g.integers(0, 10, 100)))
    start = time.process_time()
    coco_ap(detections, targets, 10)
    assert time.process_time() - start < 2

@pytest.mark.parametrize('argument, detections, targets', [
    ('detections', [], [([], [])]),
    ('detections', [([[0, 0, 9, 9]], [], [0])], [([], [])]), ('detections', [([[0, 0, 9, 9]], [.5], [0, 1])], [([], [])]),
    ('detections', [([[0, 0, 9, 9]], [math.nan], [0])], [([], [])]), ('detections', [([[50, 50, 9, 9]], [.5], [0])], [([], [])]),
    ('detections', [([[0, 0, 9, 9]], [.5], [2])], [([], [])]), ('targets', [([], [], [])], [([[0, 0, 9, 9]], [-1])]),
    ('targets', [([], [], [])], [([[0, 0, math.inf, 9]], [0])])])
def test_bad_input(argument, detections, targets):
    with pytest.raises(ArgumentError) as e: coco_ap(detections, targets, 2)
    assert e.value.argument == argument

# ---- fastai

def test_columns_share_one_collection():
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    from fastai.learner import Learner
    from fastai.torch_core import TensorBase
    g = torch.Generator().manual_seed(0)
    boxes, labels = torch.cat([.3 + .3*torch.rand(12, 3, 2, generator=g), .1 + .3*torch.rand(12, 3, 2, generator=g)], -1), torch.randint(-1, 3, (12, 3), generator=g)
    class Model(torch.nn.Module):
        def __init__(self): super().__init__(); self.zero = torch.nn.Parameter(torch.zeros(()))
        def forward(self, x):
            which = x[:, 0, 0, 0].long()
            said = torch.nn.functional.one_hot(labels[which].clamp(min=0), 3) * 4. - 2 - 4. * (labels[which] < 0)[..., None]
            return said[:, None] + self.zero, boxes[which][:, None] + self.zero
    items = [(torch.full((3, 64, 96), float(i)), TensorBase(boxes[i]), TensorBase(labels[i])) for i in range(12)]
    dls = DataLoaders(*(DataLoader(items, bs=5, num_workers=0) for _ in range(2)))
    for dl in dls: dl.n_inp = 1
    metrics = coco_metrics()
    learn = Learner(dls, Model(), loss_func=lambda preds, *y: preds[0].sum() * 0, metrics=metrics)
    for _ in range(2):
        assert learn.validate()[1:] == [1., 1.]
        assert len(metrics[0].collection.detections) == 12
    assert list(learn.metrics.attrgot('name')) == ['AP', 'AP50']
    areas = np.concatenate([(b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]) for b, _ in metrics[0].collection.targets])
    there = labels >= 0
    np.testing.assert_allclose(areas, (boxes[there][:, 2] * 96 * boxes[there][:, 3] * 64).numpy(), rtol=1e-5)
    assert pickle.loads(pickle.dumps(metrics))[0].collection.detections
    with learn.no_logging(): learn.fit(1, 0.)
    assert learn.recorder.metric_names == ['epoch', 'train_loss', 'valid_loss', 'AP', 'AP50', 'time']

def test_unknown_column():
    with pytest.raises(ArgumentError): CocoAP('mAP')

def test_importing_the_package_does_not_import_fastai():
    import subprocess, sys
    assert subprocess.run([sys.executable, '-c', "import sys, deformlit; sys.exit('fastai' in sys.modules)"]).returncode == 0
