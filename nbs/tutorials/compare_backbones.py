"""Train image classifiers for the same time each: `make compare-backbones`, or `python nbs/tutorials/compare_backbones.py`.

    make compare-backbones                                the seven and one to compare with, 6 minutes each, on all cores
    make compare-backbones ARGS="--models dat swin"       some of them; the results of the others stay
    make compare-backbones ARGS="--missing"               those that have no results yet
    make compare-backbones ARGS="--device cuda"           on a GPU; these results have a folder of their own
    make compare-backbones ARGS="--speed"                 only images per second, our form beside the official one

The images are those of CIFAR-10, from `cifar10.tgz` (cifar10/train/cat/0001.jpg and so on, as fast.ai packs them) in the folder
that DEFORMLIT_DATA names. Nothing is downloaded; without the file nothing is trained.

How many steps fit into the time is measured first, for some seconds. Then the model is trained for so many steps, so that its
schedule ends when the time does. The real seconds are written down. They are those of training: the clock stands still while
the model is tested. Results go to runs/compare_backbones/<model>/, from a GPU to runs/compare_backbones_cuda/<model>/:
config.json and metrics.json are small and belong into git, weights stay out of it. What this script knows besides goes to
compare.json beside them. The page `compare_backbones.ipynb` is made from these files."""
import argparse, json, math, os, sys, time
from pathlib import Path
from compare_detectors import FILE, machine, note, process, read, root, rounded

here = Path(__file__).resolve().parent
RECIPE = dict(size=64, bs=64, lr=1e-3, div=25., pct_start=.1, wd=.05, clip=1., seed=0)      # for all
PARTS = 10                                                                        # at most; so many points has a curve
VALID, TESTED, GLANCE = dict(cpu=2000, cuda=10_000), 10_000, 200                  # test images for a point of a curve; for the last figure; for both, if there is less than a minute
HIERARCHY = dict(img_size=RECIPE['size'], drop_path_rate=0.)
DILATE = dict(name='dilateformer', dims=(30, 60, 120, 240), depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), **HIERARCHY)
FORMS = dict(                                                                     # what makes a model, and what it is told
    dat=('deformlit.backbones.create_model', dict(name='dat', parts='FirstRelease', dims=(32, 64, 128, 256), depths=(2, 2, 6, 2), num_heads=(1, 2, 4, 8), num_groups=(1, 1, 1, 2), strides=(1, 1, 1, 1), window_size=4, **HIERARCHY)),
    dat_pp=('deformlit.backbones.create_model', dict(name='dat', parts='PlusPlus', dims=(32, 64, 128, 256), depths=(2, 2, 4, 2), num_heads=(1, 2, 4, 8), num_groups=(1, 1, 2, 4), strides=(4, 2, 1, 1), window_size=3, **HIERARCHY)),
    dilateformer=('deformlit.backbones.create_model', DILATE),
    swin=('timm.models.swin_transformer.SwinTransformer', dict(img_size=RECIPE['size'], embed_dim=32, depths=(2, 2, 6, 2), num_heads=(1, 2, 4, 8), window_size=4, drop_path_rate=0.)),
    convnext=('timm.models.convnext.ConvNeXt', dict(dims=(40, 80, 160, 320), depths=(2, 2, 4, 2))),
    vit=('timm.models.vision_transformer.VisionTransformer', dict(img_size=RECIPE['size'], patch_size=8, embed_dim=160, depth=9, num_heads=5, class_token=False, global_pool='avg')),
    resnet=('timm.models.resnet.ResNet', dict(block='timm.models.resnet.BasicBlock', layers=(2, 2, 2, 2), channels=(32, 64, 128, 256))),
    dilateformer_dense=('deformlit.backbones.create_model', dict(DILATE, dilated=(False, False, False, False))))       # not one of the seven: to see what windows buy, and what they leave out
MODELS = tuple(FORMS)
DENSE = ('vit', 'dilateformer_dense')                                            # whose attention reads all pixels: how far it looks is measured
FULL = dict(dat='dat_tiny', dat_pp='dat_pp_tiny', dilateformer='dilateformer_tiny')     # whose official formulation is measured, at 224 pixels

def archive():
    "Where the images should be."
    return Path(os.environ.get('DEFORMLIT_DATA') or root.parent/'shared'/'data')/'cifar10.tgz'

def plan(seconds:float, speed:float, bs:int) -> dict:
    "How many parts a training has, and how many steps each, to fill the time at so many images per second."
    parts = max(2, min(PARTS, int(seconds // 6)))
    return dict(parts=parts, steps=max(1, int(seconds * speed / bs / parts)))

def is_done(folder:Path) -> bool:
    "Does the folder hold a run? Its files are written at the end, all together."
    return all(read(folder/o) for o in ('config.json', 'metrics.json'))

# ---- the command ----------------------------------------------------------------------------------------------------

WORK = f'import sys; sys.path.insert(0, {str(here)!r}); from small_backbones import work; work(sys.argv[1])'

def work(job:dict):
    "A training or a measurement, in a process of its own."
    status = process(WORK, [json.dumps(job)]).returncode
    if status in (130, -2): sys.exit('stopped; the rest: make compare-backbones ARGS="--missing"')
    if status: sys.exit(f"{job['model']}: it failed; the lines above say why")

def train(model:str, a):
    "Measure, plan, train."
    print(f'\n{model}', flush=True)
    valid, tested = (VALID[a.device], TESTED) if a.minutes >= 1 else (GLANCE, GLANCE)
    work(dict(what='train', model=model, device=a.device, threads=a.threads, seconds=a.minutes * 60, archive=str(a.archive), valid=valid, tested=tested, out=str(a.out/model)))
    speed = read(a.out/model/'metrics.json')['speed']
    note(a.out, model, 'run', dict(date=time.strftime('%Y-%m-%d %H:%M'), minutes=a.minutes, device=a.device, threads=a.threads, machine=machine(a.device), speed=speed))

def official(model:str, a):
    "Images per second of our form and of the official one, of the model and of its attentions."
    with_file = a.out/f'.{model}.json'
    a.out.mkdir(parents=True, exist_ok=True)
    work(dict(what='speed', model=FULL[model], device=a.device, threads=a.threads, seconds=a.seconds, batch=a.batch, out=str(with_file)))
    rows = read(with_file)
    with_file.unlink()
    note(a.out, model, 'forms', dict(date=time.strftime('%Y-%m-%d %H:%M'), device=a.device, threads=a.threads, machine=machine(a.device), model=FULL[model], batch=a.batch, rows=rows))
    for row in rows:
        for how in ('forward', 'train'): print(f"{row['what']:44} {how:8} {row['ours'][how]:8.2f} images/s, official {row['official'][how]:8.2f}: {row['ours'][how] / row['official'][how]:.2f}x", flush=True)

def main(argv=None):
    p = argparse.ArgumentParser(description='Train image classifiers for the same time each.', allow_abbrev=False)
    p.add_argument('--models', nargs='+', default=list(MODELS), choices=MODELS, metavar='NAME', help=f"which ({' '.join(MODELS)})")
    p.add_argument('--minutes', type=float, default=6., metavar='X', help='time of each training (6)')
    p.add_argument('--missing', action='store_true', help='only what has no results yet')
    p.add_argument('--device', default='cpu', choices=('cpu', 'cuda'), help='cpu or cuda (cpu)')
    p.add_argument('--threads', type=int, default=None, metavar='N', help='threads of the CPU (all cores)')
    p.add_argument('--speed', action='store_true', help='only measure images per second at 224 pixels, our form beside the official one')
    p.add_argument('--seconds', type=float, default=10., metavar='X', help='of each such measurement (10)')
    p.add_argument('--batch', type=int, default=4, metavar='N', help='images at a time in such a measurement (4)')
    p.add_argument('--out', type=Path, default=None, metavar='FOLDER', help='where results go (runs/compare_backbones, from a GPU runs/compare_backbones_cuda)')
    a = p.parse_args(argv)
    for name in ('minutes', 'seconds', 'batch'):
        x = getattr(a, name)
        if not 0 < x < math.inf: p.error(f'argument --{name}: expected a number above 0, got {x}')
    a.out = a.out or root/'runs'/('compare_backbones' + '_cuda' * (a.device == 'cuda'))
    a.threads, a.archive = a.threads or machine('cpu')['cores'], archive()
    if not a.speed and not a.archive.is_file(): return print(f'Skipped: there is no {a.archive.name} in {a.archive.parent}. Put it there, or set DEFORMLIT_DATA to the folder that holds it.')
    try:
        for model in a.models:
            if a.speed: model in FULL and official(model, a)
            elif not (a.missing and is_done(a.out/model)): train(model, a)
    except KeyboardInterrupt: sys.exit(130)
    if not a.speed: print(f'\nresults in {a.out}; the page: python tests/notebooks.py tutorials/compare_backbones')

if __name__ == '__main__':
    sys.path.insert(0, str(root))
    main()
