"""What `compare_backbones.py` does in a process of its own: models in small forms, CIFAR-10, a training, and what is measured."""
import importlib, io, json, math, sys, tarfile, time
from pathlib import Path
import torch, torch.nn.functional as F
from torch import nn
from deformlit.data import MEAN, STD
from deformlit.train import keep_memory, rate_loop
from compare_backbones import FORMS, RECIPE, plan, rounded

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

def batches(images, labels, bs:int, size:int):
    "Batches without end: pass after pass, each in a new order."
    while True:
        for keep in torch.randperm(len(images), device=images.device).split(bs):
            if len(keep) == bs or len(images) < bs: yield prepared(moved(images[keep]), size), labels[keep]

# ---- training -------------------------------------------------------------------------------------------------------

def decayed(model:nn.Module, wd:float) -> list:
    "Two groups of parameters: matrices decay; biases, norms and tables of places do not."
    spared = {o for m in model.modules() if hasattr(m, 'no_weight_decay') for o in m.no_weight_decay()}
    free = lambda name, o: o.ndim < 2 or name in spared or 'table' in name
    return [dict(params=[o for name, o in model.named_parameters() if free(name, o) == no], weight_decay=0. if no else wd) for no in (False, True)]

class Training:
    "A model, its images and the recipe; `step` does one step of `steps`."
    def __init__(self, model, images, labels, steps:int, recipe=RECIPE):
        self.model, self.steps, self.done, self.recipe = model.to(images.device, memory_format=torch.channels_last), steps, 0, recipe
        self.opt = torch.optim.AdamW(decayed(model, recipe['wd']), recipe['lr'], fused=True)
        self.batches = batches(images, labels, recipe['bs'], recipe['size'])
    def step(self):
        x, y = next(self.batches)
        lr = rate_loop(self.done / self.steps, self.recipe['lr'], self.recipe['pct_start'])
        for group in self.opt.param_groups: group['lr'] = lr
        loss = F.cross_entropy(self.model(x), y)
        self.opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe['clip'])
        self.opt.step()
        self.done += 1
        return loss.detach()

@torch.no_grad()
def test(model, images, labels, size:int=RECIPE['size'], bs:int=250) -> dict:
    "Accuracy and loss."
    model.eval()
    said = torch.cat([model(prepared(o, size)) for o in images.split(bs)])
    return dict(accuracy=(said.argmax(1) == labels).float().mean().item(), valid_loss=F.cross_entropy(said, labels).item())

def now(device) -> float:
    "Seconds, when all that was asked for is done."
    if torch.device(device).type == 'cuda': torch.cuda.synchronize()
    return time.perf_counter()

def measure(model, images, labels, seconds:float) -> dict:
    "Images per second: in training, and when only tested."
    t, device = Training(model, images, labels, 10**6), images.device
    for _ in range(3): t.step()
    began, steps = now(device), 0
    while now(device) - began < seconds: t.step(); steps += 1
    took = now(device) - began
    few = images[:250], labels[:250]
    test(t.model, *few)
    began, tests = now(device), 0
    while now(device) - began < seconds / 3 or not tests: test(t.model, *few); tests += 1
    return dict(train=steps * t.recipe['bs'] / took, valid=tests * len(few[0]) / (now(device) - began))

def fit(model, train, valid, parts:int, steps:int, tell=print) -> tuple: # rows, and seconds at the end of each
    "Train in parts of so many steps; after each the model is tested, while the clock stands still."
    t, history, times, seconds = Training(model, *train, parts * steps), [], [], 0.
    for part in range(parts):
        model.train()
        began = now(train[0].device)
        losses = [t.step() for _ in range(steps)]
        seconds += now(train[0].device) - began
        seen = (part + 1) * steps * t.recipe['bs']
        row = dict(part=part + 1, seen=seen, epoch=seen / len(train[0]), train_loss=torch.stack(losses).mean().item(), **test(model, *valid))
        if not math.isfinite(row['train_loss']): sys.exit(f'the loss is {row["train_loss"]}')
        history.append(row); times.append(seconds)
        tell(f"  {seconds:7.1f} s  {seen:9,} images  loss {row['train_loss']:.3f}  accuracy {row['accuracy']:.3f}")
    return history, times

# ---- how far dense attention looks ----------------------------------------------------------------------------------

@torch.no_grad()
def dense_weights(model, x) -> list: # of `b n (h w) (h w)`, one for each layer
    "How each patch of timm's ViT weighs all patches, layer by layer."
    seen, weights = {}, []
    hooks = [block.attn.register_forward_pre_hook(lambda m, args, i=i: seen.update({i: args[0]})) for i, block in enumerate(model.blocks)]
    model.eval()(x)
    for hook in hooks: hook.remove()
    for i, block in enumerate(model.blocks):
        m = block.attn
        q, k, _ = m.qkv(seen[i]).unflatten(-1, (3, m.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights.append((m.q_norm(q) @ m.k_norm(k).mT * m.scale).softmax(-1))
    return weights

def steps_between(h:int, w:int) -> tuple: # two of `(h w) (h w)`
    "Rows and columns from each query to each key."
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing='ij')
    return tuple(o.flatten()[None] - o.flatten()[:, None] for o in (y, x))

def reach(weights, h:int, w:int, share:float=.9) -> dict:
    """Of weights `b n (h w) (h w)`: how much of the attention is within r pixels of the query, r = 0, 1, ... (`near`); how many keys it
    takes for `share` of it, in the mean (`keys`); the mean weight by rows and columns from query to key, times the number of keys (`map`)."""
    weights = weights.double().cpu()
    dy, dx = steps_between(h, w)
    far, mean = torch.maximum(dy.abs(), dx.abs()), weights.mean((0, 1))
    near = [mean[far <= r].sum().item() / (h * w) for r in range(max(h, w))]
    keys = ((weights.sort(-1, descending=True).values.cumsum(-1) < share - 1e-9).sum(-1) + 1).double().mean().item()
    index = (dy + h - 1) * (2 * w - 1) + dx + w - 1
    total, count = (torch.zeros((2 * h - 1) * (2 * w - 1), dtype=torch.float64).index_add(0, index.flatten(), o.flatten()) for o in (mean, torch.ones_like(mean)))
    return dict(near=near, keys=keys, map=(total / count * h * w).view(2 * h - 1, 2 * w - 1).tolist())

def digits(o, n:int=4):
    "Numbers with few digits, all through a structure."
    if isinstance(o, dict): return {k: digits(v, n) for k, v in o.items()}
    return [digits(v, n) for v in o] if isinstance(o, list) else float(f'{o:.{n}g}') if isinstance(o, float) else o

def measure_reach(model, images, size:int, bs:int=64) -> dict:
    "`reach` of each layer of a ViT, and of attention that is the same for all keys."
    side = size // FORMS['vit'][1]['patch_size']
    parts = [dense_weights(model, prepared(o, size)) for o in images.split(bs)]
    layers = [reach(torch.cat([o.cpu() for o in layer]), side, side) for layer in zip(*parts)]
    uniform = reach(torch.full((1, 1, side**2, side**2), 1 / side**2), side, side)
    del uniform['map']
    return digits(dict(h=side, w=side, images=len(images), share=.9, layers=layers, uniform=uniform))

# ---- the official formulations --------------------------------------------------------------------------------------

def formulations() -> dict:
    "For each of our parts a class that computes the same as the official code does, from the formulas."
    from deformlit.deformed_keys import SampledKeys
    from deformlit.dilated import MultiDilatedAttention
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
        def attend(self, q, k, v, dilation):
            b, n, d, h, w = q.shape
            pad = dilation * (self.kernel_size - 1) // 2
            windows = lambda o: F.unfold(o.flatten(1, 2), self.kernel_size, dilation, pad).view(b, n, d, -1, h * w).permute(0, 1, 4, 2, 3)    # b n (h w) d k
            scores = q.flatten(3).mT[:, :, :, None] @ windows(k) * d**-.5
            return (scores.softmax(-1) @ windows(v).mT)[..., 0, :].mT.unflatten(-1, (h, w))

    return {InterpolatedBias: DisplacementBias, SampledKeys: GridKeys, ShiftedWindowAttention: WrittenWindows, WindowAttention: WrittenWindows, MultiDilatedAttention: UnfoldedWindows}

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
    import deformlit
    torch.manual_seed(0)
    ours, x = deformlit.create_model(model, drop_path_rate=0.).to(device), torch.randn(batch, 3, size, size, device=device)
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
    part.write_text(json.dumps(o, indent=1) + '\n', encoding='utf-8')
    part.replace(file)

def train(model, device, threads, seconds, archive, valid, out):
    "Measure, plan, train, and write what came out."
    from safetensors.torch import save_file
    data, out, bs = read_images(archive), Path(out), RECIPE['bs']
    images = {k: tuple(o.to(device) for o in data[k]) for k in ('train', 'test')}
    curve = first_of_each(*images['test'], valid)
    found = measure(build(model), *images['train'], min(10, max(1, seconds / 12)))
    length = plan(seconds, found['train'], bs)
    print(f"{model}: {found['train']:.0f} images/s in training, {found['valid']:.0f} when tested: {length['parts']} parts of {length['steps']} steps of {bs} images in {seconds / 60:g} minutes", flush=True)
    torch.manual_seed(RECIPE['seed'])
    m = build(model)
    history, times = fit(m, images['train'], curve, **length, tell=lambda o: print(o, flush=True))
    metrics = dict(accuracy=test(m, *images['test'])['accuracy'], tested=len(images['test'][0]), seconds=times[-1], times=times, parameters=parameters(m), threads=torch.get_num_threads(), torch=torch.__version__, speed=rounded(found), history=history)
    if model == 'vit': metrics['reach'] = measure_reach(m, first_of_each(*images['test'], 200)[0], RECIPE['size'])
    out.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in m.state_dict().items()}, out/'model.safetensors')
    write(out/'metrics.json', digits(metrics, 6))
    write(out/'config.json', dict(model=model, made_by=FORMS[model][0], **FORMS[model][1], **{k: v for k, v in RECIPE.items()}, **length, images=len(images['train'][0]), valid_images=len(curve[0]), vocab=data['vocab']))

def work(job:str):
    "One job, as `compare_backbones.py` says it."
    job = json.loads(job)
    torch.set_num_threads(job['threads'])
    keep_memory()
    if job['device'] == 'cuda': torch.set_float32_matmul_precision('high')
    if job.pop('what') == 'train': return train(**job)
    write(Path(job['out']), compare_forms(**{k: job[k] for k in ('model', 'device', 'seconds', 'batch')}))
