"""The set loss against official numbers, SciPy, the loops, reduced precision, several processes and fastai."""
import json, math, os, pickle, warnings
from pathlib import Path
import pytest, torch
from torch.testing import assert_close
from scipy.optimize import linear_sum_assignment
from deformlit.core import ArgumentError
from deformlit.set_loss import *

golden = Path(os.environ.get('DEFORMLIT_GOLDEN', Path(__file__).parents[1]/'../shared/golden/A'))

def random_batch(seed, b=3, l=2, q=7, c=5, m=4, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    rand = lambda *size: torch.rand(*size, generator=g, dtype=dtype)
    box = lambda *size: torch.tensor([.3, .3, .1, .1], dtype=dtype) + .4*rand(*size, 4)
    preds = 6*rand(b, l, q, c) - 3, box(b, l, q)
    return preds, box(b, m), torch.randint(-1, c, (b, m), generator=g)

# ---- official numbers

def cases():
    "(case, heads, config): the main and auxiliary layers stacked, and the encoder's head alone."
    from safetensors import safe_open
    with safe_open(golden/'deformable_detr_criterion.safetensors', 'pt') as f:
        return json.loads(f.metadata()['json']), {k: f.get_tensor(k) for k in f.keys()}

def near(a, b, noise):
    e, size = noise
    assert (a - b).abs().max() <= max(20*e, 2e-5*size, 1e-6)

@pytest.mark.skipif(not golden.is_dir(), reason=f'no folder {golden}: set DEFORMLIT_GOLDEN')
@pytest.mark.parametrize('case', ['two_images', 'one_empty', 'all_empty', 'many'])
def test_official(case):
    meta, t = cases()
    cfg, noise = meta['config'], meta['f32_vs_f64']
    get = lambda name: t[f'input/{case}/{name}'].clone()
    heads = [f'aux_outputs.{i}.' for i in range(cfg['num_aux'])] + ['']
    leaves = {h: (get(h + 'pred_logits').requires_grad_(), get(h + 'pred_boxes').requires_grad_()) for h in heads}
    if f'input/{case}/enc_outputs.pred_logits' in t: leaves['enc_outputs.'] = tuple(get(f'enc_outputs.pred_{o}').requires_grad_() for o in ('logits', 'boxes'))
    b = len(leaves[''][0])
    counts = [len(get(f'targets.{i}.labels')) for i in range(b)]
    boxes, labels = torch.zeros(b, max(counts), 4), torch.full((b, max(counts)), -1)
    for i, n in enumerate(counts): boxes[i, :n], labels[i, :n] = get(f'targets.{i}.boxes'), get(f'targets.{i}.labels')

    loss = SetLoss(Matcher(FocalLoss(), cfg['set_cost_class'], cfg['set_cost_bbox'], cfg['set_cost_giou']), FocalLoss(cfg['focal_alpha']),
                   cfg['cls_loss_coef'], cfg['bbox_loss_coef'], cfg['giou_loss_coef'])
    def compare(preds, labels, names, suffixes):
        pairs = loss.matcher(preds, boxes, labels)      # the parts, not the whole: one official target leaves the image a little, which `SetLoss` refuses
        losses = set_losses(loss.classify, *preds, boxes, labels, pairs, max(sum(counts), 1))
        for layer, (name, suffix) in enumerate(zip(names, suffixes)):
            for i in range(b):
                for ours, theirs in zip(pairs.of(layer, i), ('src', 'tgt')): assert torch.equal(ours, t[f'output/{case}/indices.{name}.{i}.{theirs}'])
            for ours, theirs in {'class': 'ce', 'box': 'bbox', 'giou': 'giou'}.items():
                key = f'output/{case}/losses.loss_{theirs}{suffix}'
                near(losses[ours][layer], t[key], noise[key])
            assert_close(cardinality_error(preds[0], labels)[layer], t[f'output/{case}/losses.cardinality_error{suffix}'])
        if '' in suffixes: assert_close(class_error(preds[0], labels, pairs)[-1], t[f'output/{case}/losses.class_error'])
        total = loss.weigh(preds, boxes, labels, pairs, max(sum(counts), 1)).sum()
        return total
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        total = compare([torch.stack(o, 1) for o in zip(*(leaves[h] for h in heads))], labels,
                        [f'aux_outputs.{i}' for i in range(cfg['num_aux'])] + ['main'], [f'_{i}' for i in range(cfg['num_aux'])] + [''])
        if 'enc_outputs.' in leaves: total = total + compare([o[:, None] for o in leaves['enc_outputs.']], labels.clamp(max=0), ['enc_outputs'], ['_enc'])
    near(total, t[f'output/{case}/total'], noise[f'output/{case}/total'])
    if case != 'two_images':                            # the whole at once: decoder and proposals in one call
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            stacked = [torch.stack(o, 1) for o in zip(*(leaves[h] for h in heads))]
            if 'enc_outputs.' in leaves: stacked.append(tuple(o[:, None] for o in leaves['enc_outputs.']))
            whole = loss(stacked, boxes, labels)
        near(whole, t[f'output/{case}/total'], noise[f'output/{case}/total'])
        assert_close(sum(loss.parts.values()), whole.detach())
        if 'enc_outputs.' in leaves:
            official = sum(w * t[f'output/{case}/losses.loss_{name}_enc'] for name, w in dict(ce=cfg['cls_loss_coef'], bbox=cfg['bbox_loss_coef'], giou=cfg['giou_loss_coef']).items())
            assert_close(loss.parts['proposals'], official, rtol=1e-4, atol=1e-5)
            assert torch.autograd.grad(whole, leaves['enc_outputs.'])[0].any()
    (total * t[f'gradw/{case}/total']).backward()
    for h, (logits, found) in leaves.items():
        for name, x in (('logits', logits), ('boxes', found)):
            key = f'grad/{case}/{h}pred_{name}'
            near(x.grad, t[key], noise[key])
    assert loss.unmatched == (3 if case == 'many' else 0)

# ---- the softmax of DETR

@pytest.mark.skipif(not golden.is_dir(), reason=f'no folder {golden}: set DEFORMLIT_GOLDEN')
@pytest.mark.parametrize('case', ['two_images', 'one_empty', 'all_empty', 'many'])
def test_official_softmax(case):
    "`SetLoss` as a whole: total and gradients; its parts are compared with the other golden files."
    from safetensors import safe_open
    with safe_open(golden/'detr_criterion.safetensors', 'pt') as f: meta, t = json.loads(f.metadata()['json']), {k: f.get_tensor(k) for k in f.keys()}
    cfg, noise, get = meta['config'], meta['f32_vs_f64'], lambda name: t[f'input/{case}/{name}'].clone()
    heads = [f'aux_outputs.{i}.' for i in range(cfg['num_aux'])] + ['']
    leaves = {h: (get(h + 'pred_logits').requires_grad_(), get(h + 'pred_boxes').requires_grad_()) for h in heads}
    preds = [torch.stack(o, 1) for o in zip(*leaves.values())]
    each = [(get(f'targets.{i}.boxes'), get(f'targets.{i}.labels')) for i in range(len(preds[0]))]
    boxes = torch.nn.utils.rnn.pad_sequence([o for o, _ in each], True, 0.); labels = torch.nn.utils.rnn.pad_sequence([o for _, o in each], True, -1)
    classify = SoftmaxLoss(cfg['eos_coef'])
    loss = SetLoss(Matcher(classify, cfg['set_cost_class'], cfg['set_cost_bbox'], cfg['set_cost_giou']), classify, cfg['cls_loss_coef'], cfg['bbox_loss_coef'], cfg['giou_loss_coef'])
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')                      # more objects than queries
        pairs = loss.matcher(preds, boxes, labels)           # one official target leaves the image a little, which `SetLoss` refuses
        total = loss.weigh(preds, boxes, labels, pairs, max(int((labels >= 0).sum()), 1)).sum()
    near(total, t[f'output/{case}/total'], noise[f'output/{case}/total'])
    (total * t[f'gradw/{case}/total']).backward()
    for h, given in leaves.items():
        for name, x in zip(('logits', 'boxes'), given): near(x.grad, t[f'grad/{case}/{h}pred_{name}'], noise[f'grad/{case}/{h}pred_{name}'])

@pytest.mark.parametrize('eos', [0.01, 0.1, 1.])
@pytest.mark.parametrize('seed', range(3))
def test_softmax_is_the_loops(seed, eos):
    g = torch.Generator().manual_seed(seed)
    logits, labels = torch.randn(2, 3, 5, 4, generator=g, dtype=torch.float64), torch.randint(-1, 3, (2, 3, 5), generator=g)
    loss = SoftmaxLoss(eos)(logits, labels)
    assert_close(loss, torch.tensor([softmax_loss_loop(logits[:, l].flatten(0, 1), labels[:, l].flatten(), eos) for l in range(3)], dtype=torch.float64))
    for l in range(3):
        want = torch.nn.functional.cross_entropy(logits[:, l].flatten(0, 1), (labels[:, l] % 4).flatten(), torch.tensor([1., 1., 1., eos], dtype=torch.float64))
        assert_close(loss[l], want)
    objects = torch.tensor([[0, 2], [1, 1]])
    cost = SoftmaxLoss(eos).cost(logits[:, 0], objects)
    for i in range(2):
        for q in range(5):
            for j in range(2): assert_close(cost[i, q, j], -logits[i, 0, q].softmax(0)[objects[i, j]])

def test_softmax_in_a_set_loss():
    "The last logit is no class; an image alone is a batch of its own; nothing to divide by is no NaN."
    preds, boxes, labels = random_batch(9, c=6)
    classify = SoftmaxLoss()
    loss = SetLoss(Matcher(classify, class_cost=1.), classify, class_weight=1.)
    whole, each = loss(preds, boxes, labels.clamp(max=4)), None
    loss.reduction = 'none'
    each = loss(preds, boxes, labels.clamp(max=4))
    loss.reduction = 'mean'
    for i in range(3): assert_close(each[i], loss([o[i:i + 1] for o in preds], boxes[i:i + 1], labels[i:i + 1].clamp(max=4)))
    assert whole.isfinite()
    with pytest.raises(ArgumentError, match='classes 0 to 4'): loss(preds, boxes, torch.full_like(labels, 5))
    assert SoftmaxLoss(0.)(preds[0], torch.full((3, 2, 7), -1)).tolist() == [0., 0.]
    with pytest.raises(ArgumentError, match='eos'): SoftmaxLoss(-1.)

# ---- proposals

def with_proposals(seed, s=11, dtype=torch.float32):
    preds, boxes, labels = random_batch(seed, dtype=dtype)
    (logits, found), *_ = random_batch(seed + 100, l=1, q=s, dtype=dtype)
    return (*preds, (logits, found)), boxes, labels

@pytest.mark.parametrize('seed', range(5))
def test_proposals_are_paid_for(seed):
    "The loss is that of the decoder, and that of the proposals with all labels 0, over the same number of boxes."
    preds, boxes, labels = with_proposals(seed)
    both, alone = SetLoss(), SetLoss()
    total = both(preds, boxes, labels)
    assert torch.equal(both((*preds[:2], None), boxes, labels), alone(preds[:2], boxes, labels)) and 'proposals' not in both.parts
    binary = alone(preds[2], boxes, labels.clamp(max=0))
    both(preds, boxes, labels)
    assert_close(both.parts['proposals'], binary)
    assert_close(total, alone(preds[:2], boxes, labels) + binary)
    assert_close(sum(both.parts.values()), total)
    each = SetLoss(reduction='none')(preds, boxes, labels)
    for i in range(3):
        one = [o[i:i+1] for o in preds[:2]] + [tuple(o[i:i+1] for o in preds[2])]
        assert_close(each[i], alone(one, boxes[i:i+1], labels[i:i+1]))

def test_proposals_get_a_gradient():
    preds, boxes, labels = with_proposals(1, dtype=torch.float64)
    leaves = [o.requires_grad_() for o in preds[2]]
    SetLoss()(preds, boxes, labels).backward()
    assert leaves[0].grad.any(-1).all() and leaves[0].grad[..., 1:].gt(0).all()     # every token learns silence in all classes but 0
    found = leaves[1].grad.any(-1)[:, 0].sum(1)
    assert found.tolist() == (labels >= 0).sum(1).tolist()                          # one box for each object

def test_nothing_to_propose():
    preds, boxes, labels = with_proposals(2)
    loss = SetLoss()
    assert loss(preds, boxes, labels.clamp(max=-1)).isfinite() and loss(preds, torch.zeros(3, 0, 4), torch.zeros(3, 0, dtype=torch.long)).isfinite()
    assert loss.parts['proposals'] > 0 and loss.parts['box'] == 0

@pytest.mark.parametrize('where', [0, 1])
def test_nonfinite_proposals_are_named(where):
    preds, boxes, labels = with_proposals(3)
    bad = preds[2][where].clone()
    bad[2, 0, 4, 0] = math.nan
    broken = (*preds[:2], tuple(bad if i == where else o for i, o in enumerate(preds[2])))
    with pytest.raises(NonFinitePredictions) as e: SetLoss()(broken, boxes, labels)
    name = f"proposals.{('logits', 'boxes')[where]}"
    assert e.value.name == name and f'`{name}` of layer 0, image 2' in str(e.value)
    assert str(pickle.loads(pickle.dumps(e.value))).startswith(f'`{name}` of layer 0, image 2')
    with pytest.warns(UserWarning, match=name): assert SetLoss(nonfinite='warn')(broken, boxes, labels).isnan()
    with pytest.warns(UserWarning, match=name): assert SetLoss(nonfinite='warn', reduction='none')(broken, boxes, labels).isnan().all()

def test_odd_proposals_are_refused():
    preds, boxes, labels = with_proposals(4)
    with pytest.raises(ArgumentError, match='preds.proposals.boxes'): SetLoss()((*preds[:2], (preds[2][0], preds[2][1][:, :, :3])), boxes, labels)
    with pytest.raises(ArgumentError, match='preds.proposals.logits'): SetLoss()((*preds[:2], (preds[2][0][:1], preds[2][1][:1])), boxes, labels)

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_proposals_in_reduced_precision(dtype):
    preds, boxes, labels = with_proposals(5)
    small = [o.to(dtype).requires_grad_() for o in (*preds[:2], *preds[2])]
    with torch.autocast('cpu', torch.bfloat16): total = SetLoss()((*small[:2], small[2:]), boxes, labels)
    assert total.dtype == torch.float32
    total.backward()
    assert all(o.grad.isfinite().all() and o.grad.any() for o in small)

# ---- matching

@pytest.mark.parametrize('seed', range(20))
def test_matching_is_the_loops(seed):
    preds, boxes, labels = random_batch(seed, q=[7, 5, 3, 1][seed % 4], m=[4, 1, 0, 3][seed // 5])
    matcher = Matcher()
    pairs = matcher(preds, boxes, labels)
    for layer in range(2):
        for image in range(3):
            there = (labels[image] >= 0).nonzero()[:, 0]
            cost = matcher.cost(preds[0][image, layer, None], preds[1][image, layer, None], boxes[image, None, there], labels[image, None, there])[0]
            queries, objects = pairs.of(layer, image)
            q, o = linear_sum_assignment(cost.numpy())
            assert queries.tolist() == q.tolist() and objects.tolist() == there[o].tolist()
            q, o = match_loop(cost)
            place = {int(x): i for i, x in enumerate(there)}
            assert_close(sum(cost[i, place[int(j)]] for i, j in zip(queries, objects)), sum(cost[i, j] for i, j in zip(q, o)))

@pytest.mark.parametrize('seed', range(5))
def test_order_does_not_matter(seed):
    preds, boxes, labels = random_batch(seed, dtype=torch.float64)
    g = torch.Generator().manual_seed(seed)
    queries, objects = torch.randperm(7, generator=g), torch.randperm(4, generator=g)
    loss = SetLoss()
    assert_close(loss([p[:, :, queries] for p in preds], boxes[:, objects], labels[:, objects]), loss(preds, boxes, labels))

def test_ties_go_as_in_scipy():
    preds, boxes, labels = random_batch(0)
    same = [p[:, :, :1].expand(-1, -1, 7, -1) for p in preds]
    boxes, labels = boxes[:, :1].expand(-1, 4, -1), labels[:, :1].clamp(min=0).expand(-1, 4)
    q, o = linear_sum_assignment(torch.zeros(7, 4).numpy())
    found = Matcher()(same, boxes, labels).of(1, 2)
    assert found[0].tolist() == q.tolist() and found[1].tolist() == o.tolist()

def test_padding_may_hold_anything():
    preds, boxes, labels = random_batch(1)
    labels[0, 1], dirty = -1, boxes.clone()
    dirty[labels < 0] = math.nan
    assert torch.equal(SetLoss()(preds, dirty, labels), SetLoss()(preds, boxes, labels))

# ---- precision, subclasses, copies

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_reduced_precision(dtype):
    preds, boxes, labels = random_batch(2)
    small = [p.to(dtype).requires_grad_() for p in preds]
    with torch.autocast('cpu', torch.bfloat16): total = SetLoss()(small, boxes, labels)
    assert total.dtype == torch.float32
    assert_close(total, SetLoss()([p.to(dtype).float() for p in preds], boxes, labels))
    total.backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in small)

def test_float64_stays():
    preds, boxes, labels = random_batch(3, dtype=torch.float64)
    assert SetLoss()(preds, boxes, labels).dtype == torch.float64

def test_copies():
    e = pickle.loads(pickle.dumps(NonFinitePredictions('logits', 1, 2, '3 of 4 values are not finite', 5, ', training step 5')))
    assert (e.name, e.layer, e.image, e.step) == ('logits', 1, 2, 5) and 'training step 5' in str(e)
    loss = SetLoss(); loss(*random_batch(0))
    assert pickle.loads(pickle.dumps(loss)).parts.keys() == {'class', 'box', 'giou', 'aux'}

# ---- bad input

@pytest.mark.parametrize('name, index, layer, image', [('logits', (1, 0, 3, 2), 0, 1), ('boxes', (2, 1, 0, 0), 1, 2)])
@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
def test_not_finite(name, index, layer, image, value):
    preds, boxes, labels = random_batch(4)
    loss, bad = SetLoss(), dict(zip(('logits', 'boxes'), (p.clone() for p in preds)))
    for _ in range(3): loss([p.clone().requires_grad_() for p in preds], boxes, labels)
    bad[name][index] = value
    with pytest.raises(NonFinitePredictions, match=f'`{name}` of layer {layer}, image {image}, in validation after 3 steps') as e: loss(list(bad.values()), boxes, labels)
    assert (e.value.name, e.value.layer, e.value.image, e.value.step) == (name, layer, image, 3)
    with pytest.raises(NonFinitePredictions, match='training step 4'): loss([p.requires_grad_() for p in bad.values()], boxes, labels)
    loss.nonfinite = 'warn'
    with pytest.warns(UserWarning, match=name): assert loss(list(bad.values()), boxes, labels).isnan()
    loss.reduction = 'none'
    with pytest.warns(UserWarning, match=name): assert loss(list(bad.values()), boxes, labels).isnan().tolist() == [True]*3

def test_cost_overflow_is_told():
    preds, boxes, labels = random_batch(4)
    preds[1][0, 1] = 3e38
    with pytest.raises(NonFinitePredictions, match='overflow'): SetLoss()(preds, boxes, labels)

def test_surplus_is_said_once_per_training():
    preds, boxes, labels = random_batch(5, q=2, m=4)
    labels = labels.clamp(min=0); labels[0, 3] = -1
    loss = SetLoss()
    with pytest.warns(UserWarning, match='image 1 of the batch has 4 objects, but there are 2 queries'): loss(preds, boxes, labels)
    with warnings.catch_warnings():
        warnings.simplefilter('error'); loss(preds, boxes, labels)
    assert loss.unmatched == 2 * (1 + 2 + 2)
    loss.reset()
    with pytest.warns(UserWarning): loss(preds, boxes, labels)

@pytest.mark.parametrize('argument, change', [
    ('labels', lambda p, x, y: (p, x, y + 5)), ('labels', lambda p, x, y: (p, x, y - 2)), ('labels', lambda p, x, y: (p, x, y.float())),
    ('labels', lambda p, x, y: (p, x, y[:2])), ('labels', lambda p, x, y: (p, x, y[..., None])),
    ('boxes', lambda p, x, y: (p, x * 100, y.clamp(min=0))), ('boxes', lambda p, x, y: (p, x * torch.tensor([1., 1, 0, 1]), y.clamp(min=0))),
    ('boxes', lambda p, x, y: (p, x * math.nan, y.clamp(min=0))), ('boxes', lambda p, x, y: (p, x[:, :2], y)), ('boxes', lambda p, x, y: (p, x.long(), y)),
    ('preds.logits', lambda p, x, y: ((p[0][:, 0], p[1]), x, y)), ('preds.boxes', lambda p, x, y: ((p[0], p[1][..., :3]), x, y)),
    ('preds.boxes', lambda p, x, y: ((p[0], p[1][:, :, :2]), x, y))])
def test_bad_targets(argument, change):
    with pytest.raises(ArgumentError) as e: SetLoss()(*change(*random_batch(6)))
    assert e.value.argument == argument

def test_bad_option():
    with pytest.raises(ArgumentError): SetLoss(nonfinite='ignore')

# ---- several processes

def worker(rank, folder):
    import torch.distributed as dist
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    preds, boxes, labels = random_batch(7, b=2)
    labels[0], labels[1] = torch.tensor([0, 1, 2, -1]), -1
    mine = slice(rank, rank + 1)
    torch.save(SetLoss()([p[mine] for p in preds], boxes[mine], labels[mine]), f'{folder}/{rank}.pt')
    dist.destroy_process_group()

def test_two_processes_are_one_batch(tmp_path):
    torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2)
    each = [torch.load(tmp_path/f'{rank}.pt') for rank in range(2)]
    preds, boxes, labels = random_batch(7, b=2)
    labels[0], labels[1] = torch.tensor([0, 1, 2, -1]), -1
    assert_close(sum(each) / 2, SetLoss()(preds, boxes, labels))

# ---- fastai

def test_fastai():
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    from fastai.learner import Learner
    from fastai.torch_core import TensorBase
    from torch import nn
    _, boxes, labels = random_batch(8, b=6)
    class Model(nn.Module):
        def __init__(self): super().__init__(); self.out = nn.Linear(4, 2 * 7 * 9)
        def forward(self, x):
            logits, found = self.out(x).view(-1, 2, 7, 9).split([5, 4], -1)
            return logits, found.sigmoid()
    items = [(torch.randn(4), TensorBase(boxes[i]), TensorBase(labels[i])) for i in range(6)]
    dls = DataLoaders(*(DataLoader(items, bs=2, n_inp=1, num_workers=0) for _ in range(2)))
    for dl in dls: dl.n_inp = 1
    learn = Learner(dls, Model(), loss_func=SetLoss())
    with learn.no_logging(): learn.fit(1, 1e-3)
    assert learn.loss_func.step == 3
    whole = learn.validate()[0]
    preds, *_, losses = learn.get_preds(with_loss=True)
    assert losses.shape == (6,) and losses.isfinite().all() and math.isfinite(whole) and learn.loss_func.reduction == 'mean'
