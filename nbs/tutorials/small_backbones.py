"""What `compare_backbones.py` does in a process of its own: models in small forms, CIFAR-10, a training, and what is measured."""
import importlib, io, itertools, json, math, random, re, sys, tarfile, time, warnings
from pathlib import Path
import torch, torch.nn.functional as F
from torch import nn
from deformlit.train import Repeatable, Stopwatch, keep_memory
from deformlit.data import MEAN, STD
from deformlit.classify import image_learner
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastcore.all import noop
from compare_backbones import DENSE, FORMS, RECIPE, plan, rounded

# ---- models ---------------------------------------------------------------------------------------------------------

def named(path:str):
    "The object of that name, such as `'timm.models.resnet.ResNet'`."
    module, _, name = path.rpartition('.')
    return getattr(importlib.import_module(module), name)

def build(model:str, num_classes:int=10) -> nn.Module:
    "A model in its small form, with new weights."
    maker, form = FORMS[model]
    return named(maker)(**{k: named(v) if isinstance(v, str) and v.startswith('timm.') else v for k, v in form.items()}, num_classes=num_classes)

def parameters(model:nn.Module) -> int: return sum(o.numel() for o in model.parameters())

# ---- images ---------------------------------------------------------------------------------------------------------

def read_images(archive) -> dict: # By split: images `n 32 32 3` uint8 and labels `n`, by class and name; and the names of the classes
    "All images of the archive."
    import numpy as np
    from PIL import Image
    found = dict(train=[], test=[])
    with tarfile.open(archive) as tar:
        for o in tar:
            if o.isfile(): found[o.name.split('/')[-3]].append((*o.name.split('/')[-2:], tar.extractfile(o).read()))
    vocab = sorted({o[0] for o in found['train']})
    for split, rows in found.items():
        rows.sort(key=lambda o: o[:2])
        images = torch.from_numpy(np.stack([np.asarray(Image.open(io.BytesIO(o[2])).convert('RGB')) for o in rows]))
        found[split] = images, torch.tensor([vocab.index(o[0]) for o in rows])
    return dict(found, vocab=vocab)

def first_of_each(images, labels, n:int):
    "The first images of each class, `n` in all, in order of their classes."
    classes = int(labels.max()) + 1
    keep = torch.cat([(labels == i).nonzero()[:, 0][:n // classes] for i in range(classes)])
    return images[keep], labels[keep]

def prepared(images, size:int): # `b h w 3` uint8 -> `b 3 size size`
    "Bytes as a model wants them: normalised, and enlarged."
    x = (images.float() / 255 - MEAN.to(images.device)) / STD.to(images.device)
    return F.interpolate(x.permute(0, 3, 1, 2), (size, size), mode='bilinear', align_corners=False)

def moved(images, most:int=4): # `b h w 3`
    "Each image moved by up to `most` pixels, its border repeated, and half of them mirrored."
    (b, h, w, _), device = images.shape, images.device
    dy, dx = (torch.randint(-most, most + 1, (b, 1), device=device) for _ in range(2))
    y, x = (torch.arange(h, device=device) + dy).clamp(0, h - 1), (torch.arange(w, device=device) + dx).clamp(0, w - 1)
    x = torch.where(torch.rand(b, 1, device=device) < .5, x.flip(1), x)
    return images[torch.arange(b, device=device)[:, None, None], y[:, :, None], x[:, None]]

# ---- training -------------------------------------------------------------------------------------------------------

class Batches:
    "Images in memory, as fastai's `Learner` takes them: to train, so many batches of pass after pass; to test, all in order."
    def __init__(self, images, labels, vocab, bs:int, size:int, steps:int=None):
        self.images, self.labels, self.vocab, self.c, self.bs, self.size, self.steps = images, labels, vocab, len(vocab), bs, size, steps
        self.device, self.rng, self.more = images.device, random.Random(), self.passes()
    def __len__(self): return self.steps or math.ceil(len(self.images) / self.bs)
    def passes(self):
        "Batches without end, each pass in a new order."
        while True:
            for keep in torch.randperm(len(self.images), device=self.device).split(self.bs):
                if len(keep) == min(self.bs, len(self.images)): yield prepared(moved(self.images[keep]), self.size), self.labels[keep]
    def __iter__(self):
        if self.steps: return itertools.islice(self.more, self.steps)
        return ((prepared(x, self.size), y) for x, y in zip(self.images.split(self.bs), self.labels.split(self.bs)))

class Clock(Callback):
    "Seconds of training at the end of each part; it stands still while the model is tested."
    def before_fit(self): self.seconds, self.times = 0., []
    def before_train(self): self.began = now(self.dls.device)
    def after_train(self):
        self.seconds += now(self.dls.device) - self.began
        self.times.append(self.seconds)

class Tell(Callback):
    "A line for each part."
    order = 80
    def after_epoch(self):
        loss, _, accuracy = self.recorder.values[-1]
        if not math.isfinite(loss): sys.exit(f'the loss is {loss}')
        print(f'  {self.clock.seconds:7.1f} s  {(self.epoch + 1) * len(self.dls.train) * self.dls.train.bs:9,} images  loss {loss:.3f}  accuracy {accuracy:.3f}', flush=True)

def now(device) -> float:
    "Seconds, when all that was asked for is done."
    if torch.device(device).type == 'cuda': torch.cuda.synchronize()
    return time.perf_counter()

def learner(model, train, valid, vocab, steps:int, recipe=RECIPE):
    "A classifier's learner on images in memory."
    dls = DataLoaders(Batches(*train, vocab, recipe['bs'], recipe['size'], steps), Batches(*valid, vocab, 250, recipe['size']), device=train[0].device)
    learn = image_learner(dls, model.to(train[0].device, memory_format=torch.channels_last), lr=recipe['lr'], wd=recipe['wd'], clip=recipe['clip'], smooth=0., cbs=[Repeatable(recipe['seed']), Clock()])
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

def cycle(learn, parts:int, cbs=(), recipe=RECIPE):
    "One cycle of the rate, over so many parts."
    learn.fit_one_cycle(parts, recipe['lr'], div=recipe['div'], pct_start=recipe['pct_start'], moms=(.9, .9, .9), cbs=list(cbs))

def measure(model, train, valid, vocab, seconds:float, recipe=RECIPE) -> dict:
    "Images per second: in training, and when only tested."
    few = tuple(o[:250] for o in valid)
    learn, watch = learner(model, train, few, vocab, 10**6, recipe), Stopwatch(seconds)
    cycle(learn, 1, [watch], recipe)
    learn.validate()
    began = now(train[0].device)
    learn.validate()
    return dict(train=watch.steps * recipe['bs'], valid=len(few[0]) / (now(train[0].device) - began))

def fit(model, train, valid, vocab, parts:int, steps:int, recipe=RECIPE) -> tuple: # the learner, its rows, and seconds at the end of each
    "Train in parts of so many steps; after each the model is tested."
    learn = learner(model, train, valid, vocab, steps, recipe)
    cycle(learn, parts, [Tell()], recipe)
    def row(part, values):
        seen = part * steps * recipe['bs']
        return dict(part=part, seen=seen, epoch=seen / len(train[0]), **dict(zip(('train_loss', 'valid_loss', 'accuracy'), values)))
    return learn, [row(i, map(float, o)) for i, o in enumerate(learn.recorder.values, 1)], learn.clock.times

# ---- how far dense attention looks ----------------------------------------------------------------------------------

@torch.no_grad()
def dense_weights(model, x) -> dict: # By layer: `b n (h w) (h w)`, and (h, w)
    "How each pixel of a map weighs all pixels, in timm's ViT and in our dense layers."
    seen, weights, model = {}, {}, model.eval()
    layers = {name: m for name, m in model.named_modules() if type(m).__name__ == 'GlobalAttention' or hasattr(m, 'fused_attn') and not hasattr(m, 'relative_position_bias_table')}
    hooks = [m.register_forward_pre_hook(lambda m, args, name=name: seen.update({name: args[0]})) for name, m in layers.items()]
    model(x)
    for hook in hooks: hook.remove()
    for name, m in layers.items():
        if hasattr(m, 'weights'): weights[name] = m.weights(seen[name]), tuple(seen[name].shape[2:])
        else:
            q, k, _ = m.qkv(seen[name]).unflatten(-1, (3, m.num_heads, -1)).permute(2, 0, 3, 1, 4)
            weights[name] = (m.q_norm(q) @ m.k_norm(k).mT * m.scale).softmax(-1), (math.isqrt(q.shape[2]),) * 2
    return weights

def steps_between(h:int, w:int) -> tuple: # two of `(h w) (h w)`
    "Rows and columns from each query to each key."
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing='ij')
    return tuple(o.flatten()[None] - o.flatten()[:, None] for o in (y, x))

def reach(weights, h:int, w:int, share:float=.9) -> dict:
    """Of weights `b n (h w) (h w)`: how much of the attention is within r pixels of the query, r = 0, 1, ... (`near`); how much goes to the keys
    that windows of 3 x 3 with dilations 1, 2 and 3 would read (`gaps`); how many keys it takes for `share` of it, in the mean (`keys`);
    the mean weight by rows and columns from query to key, times the number of keys (`map`)."""
    weights = weights.double().cpu()
    dy, dx = steps_between(h, w)
    far, mean = torch.maximum(dy.abs(), dx.abs()), weights.mean((0, 1))
    read = (far <= 3) & ((dy.abs() == far) | (dy == 0)) & ((dx.abs() == far) | (dx == 0))
    near = [mean[far <= r].sum().item() / (h * w) for r in range(max(h, w))]
    keys = ((weights.sort(-1, descending=True).values.cumsum(-1) < share - 1e-9).sum(-1) + 1).clamp(max=h * w).double().mean().item()
    index = (dy + h - 1) * (2 * w - 1) + dx + w - 1
    total, count = (torch.zeros((2 * h - 1) * (2 * w - 1), dtype=torch.float64).index_add(0, index.flatten(), o.flatten()) for o in (mean, torch.ones_like(mean)))
    return dict(near=near, gaps=mean[read].sum().item() / (h * w), keys=keys, map=(total / count * h * w).view(2 * h - 1, 2 * w - 1).tolist())

def digits(o, n:int=4):
    "Numbers with few digits, all through a structure."
    if isinstance(o, dict): return {k: digits(v, n) for k, v in o.items()}
    return [digits(v, n) for v in o] if isinstance(o, (list, tuple)) else float(f'{o:.{n}g}') if isinstance(o, float) else o

def measure_reach(model, images, size:int, bs:int=25) -> dict:
    "`reach` of each dense layer, and of attention that is the same for all keys of such a map."
    sums, sizes, n = {}, {}, 0
    for o in images.split(bs):
        for name, (weights, hw) in dense_weights(model, prepared(o, size)).items():
            sums.setdefault(name, []).append((len(o), reach(weights, *hw))); sizes[name] = hw
    def mean(rows):
        total = sum(k for k, _ in rows)
        add = lambda f: sum(k * torch.tensor(f(r), dtype=torch.float64) for k, r in rows) / total
        return {key: add(lambda r: r[key]).tolist() for key in ('near', 'gaps', 'keys', 'map')}
    layers = []
    for name, rows in sums.items():
        h, w = sizes[name]
        equal = reach(torch.full((1, 1, h * w, h * w), 1 / (h * w)), h, w)
        del equal['map']
        layers.append(dict(name=name, h=h, w=w, **mean(rows), equal=equal))
    return digits(dict(images=len(images), share=.9, layers=layers))

# ---- the official formulations --------------------------------------------------------------------------------------

def formulations() -> dict:
    "For each of our parts a class that computes the same as the official code does, from the formulas."
    from deformlit.deformed_keys import SampledKeys
    from deformlit.dilated import MultiDilatedAttention
    from deformlit.dilateformer import GlobalAttention
    from deformlit.points import to_signed
    from deformlit.relative_bias import InterpolatedBias, PixelQueries, interpolated_bias_grid, table_grid
    from deformlit.windows import ShiftedWindowAttention, WindowAttention, block_mask, from_blocks, to_blocks

    class DisplacementBias(InterpolatedBias):
        "DAT: a tensor of all displacements, the table sampled at each, scores and softmax one after the other."
        def logits(self, size, keys, queries=PixelQueries()):
            start, step, _ = table_grid(size, self.table.shape[1:], keys, queries)
            return interpolated_bias_grid(self.table.to(start.dtype), start, step, *size)
        def forward(self, q, k, v, size, keys, queries=PixelQueries(), drop=0.):
            scores = torch.einsum('bnqd,bnkd->bnqk', q, k) * q.shape[-1]**-.5 + self.logits(size, keys, queries).to(q.dtype)
            return torch.einsum('bnqk,bnkd->bnqd', F.dropout(scores.softmax(-1), drop), v)

    class GridKeys(SampledKeys):
        "DAT: `grid_sample`, once for each group."
        def forward(self, x, points):
            maps, at = x.unflatten(1, (points.shape[1], -1)).flatten(0, 1), to_signed(points.flatten(0, 1))
            return F.grid_sample(maps, at, mode='bilinear', padding_mode='zeros', align_corners=False).reshape(*x.shape[:2], *points.shape[2:4])

    class WrittenWindows(ShiftedWindowAttention):
        "DAT's blocks: cut, compare, add the table and the mask, softmax, read, put together."
        def attend(self, q, k, v):
            h, w = q.shape[-2:]
            q, k, v = (to_blocks(o, self.window_size, self.shift) for o in (q, k, v))
            scores = torch.einsum('bgntd,bgnsd->bgnts', q * q.shape[-1]**-.5, k) + self.bias()
            if any(self.shift) or h % self.window_size[0] or w % self.window_size[1]: scores = scores + torch.where(block_mask(h, w, self.window_size, self.shift, q.device), 0., -100.)
            return from_blocks(torch.einsum('bgnts,bgnsd->bgntd', scores.softmax(-1), v), h, w, self.window_size, self.shift)

    class UnfoldedWindows(MultiDilatedAttention):
        "DilateFormer: `unfold` copies each key and each value once for every query that reads it."
        def attend(self, q, k, v, dilations):
            return torch.cat([self.unfolded(*o) for o in zip(*(o.chunk(len(dilations), 1) for o in (q, k, v)), dilations)], 1)
        def unfolded(self, q, k, v, dilation):
            b, n, d, h, w = q.shape
            pad = dilation * (self.kernel_size - 1) // 2
            windows = lambda o: F.unfold(o.flatten(1, 2), self.kernel_size, dilation, pad).view(b, n, d, -1, h * w).permute(0, 1, 4, 2, 3)    # b n (h w) d k
            scores = q.flatten(3).mT[:, :, :, None] @ windows(k) * d**-.5
            return (scores.softmax(-1) @ windows(v).mT)[..., 0, :].mT.unflatten(-1, (h, w))

    class WrittenAttention(GlobalAttention):
        "DilateFormer, where it reads all pixels: compare, softmax, read."
        def forward(self, x):
            q, k, v = self.heads(x)
            out = (q @ k.mT * q.shape[-1]**-.5).softmax(-1) @ v
            return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2))).mT.unflatten(-1, tuple(x.shape[2:]))

    return {InterpolatedBias: DisplacementBias, SampledKeys: GridKeys, ShiftedWindowAttention: WrittenWindows, WindowAttention: WrittenWindows, MultiDilatedAttention: UnfoldedWindows, GlobalAttention: WrittenAttention}

def as_published(model:nn.Module) -> nn.Module:
    "A copy of a model or part with the same weights, computed as the official code does."
    import copy
    model, forms = copy.deepcopy(model), formulations()
    for m in model.modules():
        if type(m) in forms: m.__class__ = forms[type(m)]
    return model

def attentions(model:nn.Module, x) -> dict: # By kind: a module, and what it reads
    "The first attention of each kind that has an official formulation, with the map that comes to it."
    forms, first, seen = formulations(), {}, {}
    for name, m in model.named_modules():
        if any(type(o) in forms for o in m.modules()) and hasattr(m, 'num_heads'): first.setdefault(type(m).__name__, m)
    hooks = [m.register_forward_pre_hook(lambda m, args, kind=kind: seen.update({kind: args[0].detach()})) for kind, m in first.items()]
    with torch.no_grad(): model(x)
    for hook in hooks: hook.remove()
    return {kind: (m, seen[kind]) for kind, m in first.items()}

def race(ours, official, x, seconds:float) -> dict:
    "Images per second of both, forward and in training, taking turns; by the median time of a turn."
    def forward(m):
        with torch.no_grad(): m.eval()(x)
    def train(m):
        m.train()(x).square().mean().backward()
        m.zero_grad()
    found = dict(ours={}, official={})
    for how, f in dict(forward=forward, train=train).items():
        for m in (ours, official): f(m)
        times, began = ([], []), time.perf_counter()
        while time.perf_counter() - began < seconds or len(times[1]) < 3:
            for took, m in zip(times, (ours, official)):
                start = now(x.device)
                f(m)
                took.append(now(x.device) - start)
        for who, took in zip(found.values(), times): who[how] = len(x) / sorted(took)[len(took) // 2]
    return found

def same(ours, official, x) -> float:
    "The largest difference of two models' outputs, as a part of the largest output."
    with torch.no_grad(): a, b = ours.eval()(x), official.eval()(x)
    return ((a - b).abs().max() / a.abs().max()).item()

def compare_forms(model:str, device, seconds:float, batch:int, size:int=224) -> list:
    "A model and its attentions, our form beside the official."
    from deformlit.backbones import create_model
    torch.manual_seed(0)
    ours, x = create_model(model, drop_path_rate=0.).to(device), torch.randn(batch, 3, size, size, device=device)
    rows = [(model, ours, x)] + [(f'{kind}, {o.shape[1]} channels, {o.shape[2]} x {o.shape[3]}', m, o) for kind, (m, o) in attentions(ours, x).items()]
    res = []
    for what, m, o in rows:
        theirs = as_published(m)
        difference = same(m, theirs, o)
        if not difference < 1e-4: sys.exit(f'{what}: the two forms differ by {difference:.1e}')
        res.append(dict(what=what, **{k: rounded(v) for k, v in race(m, theirs, o, seconds).items()}))
    return res

# ---- the work -------------------------------------------------------------------------------------------------------

def write(file:Path, o):
    "A JSON file, whole at any time."
    part = file.with_name(f'.{file.name}.part')
    text = re.sub(r'\[\s+([^\[\]{}]*?)\s+\]', lambda m: '[' + ' '.join(m[1].split()) + ']', json.dumps(o, indent=1))      # numbers of a list on one line
    part.write_text(text + '\n', encoding='utf-8')
    part.replace(file)

def train(model, device, threads, seconds, archive, valid, tested, out):
    "Measure, plan, train, and write what came out."
    from safetensors.torch import save_file
    data, out = read_images(archive), Path(out)
    images, vocab = {k: tuple(o.to(device) for o in data[k]) for k in ('train', 'test')}, data['vocab']
    curve = first_of_each(*images['test'], valid)
    found = measure(build(model), images['train'], images['test'], vocab, min(10, max(1, seconds / 12)))
    length = plan(seconds, found['train'], RECIPE['bs'])
    print(f"{model}: {found['train']:.0f} images/s in training, {found['valid']:.0f} when tested: {length['parts']} parts of {length['steps']} steps of {RECIPE['bs']} images in {seconds / 60:g} minutes", flush=True)
    torch.manual_seed(RECIPE['seed'])
    m = build(model)
    learn, history, times = fit(m, images['train'], curve, vocab, **length)
    accuracy = learn.validate(dl=Batches(*first_of_each(*images['test'], tested), vocab, 250, RECIPE['size']))[1]
    metrics = dict(accuracy=float(accuracy), tested=tested, seconds=times[-1], times=times, parameters=parameters(m), threads=torch.get_num_threads(), torch=torch.__version__, speed=rounded(found), history=history)
    if model in DENSE: metrics['reach'] = measure_reach(m, first_of_each(*images['test'], min(tested, 200))[0], RECIPE['size'])
    out.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().cpu().contiguous() for k, v in m.state_dict().items()}, out/'model.safetensors')
    write(out/'metrics.json', digits(metrics, 6))
    write(out/'config.json', dict(model=model, made_by=FORMS[model][0], form=FORMS[model][1], recipe=RECIPE, **length, images=len(images['train'][0]), valid_images=len(curve[0]), vocab=vocab))

def work(job:str):
    "One job, as `compare_backbones.py` says it."
    job = json.loads(job)
    torch.set_num_threads(job['threads'])
    keep_memory()
    warnings.filterwarnings('ignore', 'You are shadowing an attribute')     # fastai says so of its own
    if job['device'] == 'cuda': torch.set_float32_matmul_precision('high')
    if job.pop('what') == 'train': return train(**job)
    write(Path(job['out']), compare_forms(**{k: job[k] for k in ('model', 'device', 'seconds', 'batch')}))
