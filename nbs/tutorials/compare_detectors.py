"""Train detectors for the same time each: `make compare`, or `python nbs/tutorials/compare_detectors.py`.

    make compare                                      the six, 8 minutes each, on all cores
    make compare ARGS="--models detr dab_detr"        some of them; the results of the others stay
    make compare ARGS="--missing"                     those that have no results yet; one that was interrupted goes on
    make compare ARGS="--minutes 30 --hard --device cuda --workers 8"    scenes as of `make train`, on a GPU
    make compare ARGS="--speed"                       only images per second, without and with --compile

How many scenes fit into the time is measured first, for some seconds, in a process of its own. Then `deformlit-train` runs
with a number of scenes per epoch that fills the time, so that its schedule ends when the time does. The real seconds are
written down by the run. Results go to runs/compare_detectors/<model>/, with --hard to runs/compare_detectors_hard/<model>/:
config.json and metrics.json are small and belong into git, weights and pictures stay out of it. What this script knows
besides goes to compare.json beside them. The page `compare_detectors.ipynb` is made from these files."""
import argparse, json, math, os, platform, re, shlex, statistics, subprocess, sys, tempfile, time
from pathlib import Path

root = Path(__file__).resolve().parents[2]
MODELS = ('detr', 'dab_detr', 'deformable_detr', 'deformable_detr_refine', 'deformable_detr_two_stage', 'dab_deformable_detr')
EASY = dict(size=96, digit_px=[28, 56], max_digits=3, queries=12)     # larger and fewer digits than in `make train`
RECIPE = dict(bs=8, lr=1e-3, valid_items=300)                         # for all
DENSE = dict(dilated=1, lr=4e-4)                                      # for the models that read one map: its stride is 16; at 1e-3 DETR learns nothing
TURNS = 5                                                             # of --speed: first without the compiler, then with it
EPOCHS = 10                                                           # at most; so many points has a curve
FILE = 'compare.json'

def options(model:str, hard:bool=False) -> dict:
    "What `deformlit-train` is told, but for the length of the training."
    return {'model': model, **RECIPE, **({} if hard else EASY), **(DENSE if model in ('detr', 'dab_detr') else {})}

def plan(seconds:float, speed:dict, bs:int, valid_items:int) -> dict:
    "How many epochs, and how many scenes in each, fill the time: training and validation, at so many images per second."
    epochs = max(2, min(EPOCHS, int(seconds // 20)))
    for_training = seconds / epochs - valid_items / speed['valid']
    return dict(epochs=epochs, items=max(bs, int(for_training * speed['train'] / bs) * bs))

def arguments(given:dict) -> list:
    "Options as words of the command."
    said = lambda v: [] if v is True else [str(o) for o in (v if isinstance(v, list) else [v])]
    return [word for k, v in given.items() if v is not None and v is not False for word in ('--' + k.replace('_', '-'), *said(v))]

# ---- the machine ----------------------------------------------------------------------------------------------------

def machine(device:str) -> dict:
    "On what this runs."
    try: name = (re.search(r'^model name\s*:\s*(.*)$', Path('/proc/cpuinfo').read_text(), re.M) or ['', platform.machine()])[1]
    except OSError: name = platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    gpu = None
    if device != 'cpu':
        import torch
        gpu = torch.cuda.get_device_name(device)
    return dict(cpu=name, cores=cores, gpu=gpu)

def process(code:str, words, **kwargs):
    "Some Python with arguments, on this checkout."
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(root), *filter(None, [os.environ.get('PYTHONPATH')])])}
    return subprocess.run([sys.executable, '-c', code, *map(str, words)], env=env, **kwargs)

MEASURE = '''import json, sys
from deformlit.train import keep_memory, prepare, speed, train_parser
parser = train_parser()
with parser.watching():
    given = vars(parser.parse_args(sys.argv[3:]))
    config, where = prepare(given)[1::2]
    keep_memory()
    how = lambda compile: speed({**config, 'compile': compile}, given['speed'], **where)
    if sys.argv[2] == 'once': found = how(config['compile'])
    else: found = [dict(eager=how(False), compiled=how(True)) for _ in range(int(sys.argv[2]))]
open(sys.argv[1], 'w').write(json.dumps(found))'''

def measure(given:dict, run:dict, seconds:float, turns='once'):
    "Images per second, of training and of validation, in a process of its own; or in so many turns, without and with the compiler, one after the other."
    with tempfile.TemporaryDirectory() as folder:
        r = process(MEASURE, [f'{folder}/speed.json', turns, *arguments({**given, **run, 'speed': seconds})])
        if r.returncode: sys.exit(f"{given['model']}: the measurement failed; the lines above say why")
        return json.loads(Path(f'{folder}/speed.json').read_text())

# ---- results --------------------------------------------------------------------------------------------------------

def read(file):
    "What a JSON file holds; None if there is none."
    try: return json.loads(Path(file).read_text(encoding='utf-8'))
    except OSError: return None

def note(folder:Path, model:str, what:str, facts:dict):
    "Add `facts` about a model to the folder's compare.json, which is whole at any time."
    about = read(folder/FILE) or {}
    about.setdefault(model, {})[what] = facts
    folder.mkdir(parents=True, exist_ok=True)
    part = folder/f'.{FILE}.part'
    part.write_text(json.dumps({k: about[k] for k in sorted(about)}, indent=1) + '\n', encoding='utf-8')
    part.replace(folder/FILE)

def is_done(folder:Path) -> bool:
    "Does the folder hold a run with all its epochs?"
    config, metrics = read(folder/'config.json'), read(folder/'metrics.json')
    return bool(config and metrics and metrics['epochs'] >= config['epochs'] and not (folder/'resume.pt').exists())

# ---- the command ----------------------------------------------------------------------------------------------------

TRAIN = 'from deformlit.train import main_train; raise SystemExit(main_train())'

def train(model:str, a, run:dict):
    "Measure, plan, train; or go on with a run that was interrupted."
    folder, seconds = a.out/model, a.minutes * 60
    if a.missing and (folder/'resume.pt').exists(): words = arguments({'resume': True, **run})
    else:
        given = options(model, a.hard)
        found = measure(given, run, min(10, max(1, seconds / 12)))
        length = plan(seconds, found, given['bs'], given['valid_items'])
        print(f"\n{model}: {found['train']:.0f} images/s in training, {found['valid']:.0f} in validation: {length['epochs']} epochs of {length['items']} scenes in {a.minutes:g} minutes", flush=True)
        note(a.out, model, 'run', dict(date=time.strftime('%Y-%m-%d %H:%M'), minutes=a.minutes, device=run['device'], threads=a.threads, machine=machine(run['device']), speed=rounded(found)))
        words = arguments({**given, **length, **run})
    words += ['--out', str(folder)]
    print('deformlit-train ' + shlex.join(words), flush=True)
    status = process(TRAIN, words).returncode
    if status == 130: sys.exit(f'stopped; the rest: make compare ARGS="--missing{" --hard" if a.hard else ""}"')
    if status: sys.exit(f'{model}: the training failed; the lines above say why')

def rounded(speed:dict) -> dict: return {k: float(f'{v:.4g}') for k, v in speed.items()}

def compiling(model:str, a, run:dict):
    "Images per second without and with `torch.compile`."
    turns = measure({**options(model, a.hard), 'compile': True}, run, a.seconds / TURNS, TURNS)
    found = {how: {what: statistics.median(o[how][what] for o in turns) for what in turns[0][how]} for how in turns[0]}
    faster = {what: float(f"{statistics.median(o['compiled'][what] / o['eager'][what] for o in turns):.3g}") for what in found['eager']}
    note(a.out, model, 'compile', dict(date=time.strftime('%Y-%m-%d %H:%M'), device=run['device'], threads=a.threads, machine=machine(run['device']), turns=TURNS, faster=faster, **{k: rounded(v) for k, v in found.items()}))
    for how, o in found.items(): print(f"{model:28} {how:9} {o['train']:8.1f} images/s in training {o['valid']:8.1f} in validation", flush=True)
    print(f"{'':28} compiled / eager, median of {TURNS} turns: {faster['train']:.2f} in training, {faster['valid']:.2f} in validation", flush=True)

def main(argv=None):
    p = argparse.ArgumentParser(description='Train detectors for the same time each.', allow_abbrev=False)
    p.add_argument('--models', nargs='+', default=list(MODELS), metavar='NAME', help=f"which ({' '.join(MODELS)})")
    p.add_argument('--minutes', type=float, default=8., metavar='X', help='time of each training, validation included (8)')
    p.add_argument('--missing', action='store_true', help='only what has no results yet; an interrupted run goes on')
    p.add_argument('--hard', action='store_true', help='scenes as of `make train`: smaller and more digits')
    p.add_argument('--device', default='cpu', help='cpu or cuda (cpu)')
    p.add_argument('--threads', type=int, default=None, metavar='N', help='threads of the CPU (all cores)')
    p.add_argument('--workers', type=int, default=0, metavar='N', help='processes that make scenes; 0: the one that trains (0)')
    p.add_argument('--speed', action='store_true', help='only measure images per second, without and with --compile')
    p.add_argument('--seconds', type=float, default=20., metavar='X', help='of training in such a measurement (20)')
    p.add_argument('--out', type=Path, default=None, metavar='FOLDER', help='where results go (runs/compare_detectors, with --hard runs/compare_detectors_hard)')
    a = p.parse_args(argv)
    for name, x in (('--minutes', a.minutes), ('--seconds', a.seconds)):
        if not 0 < x < math.inf: p.error(f'argument {name}: expected a time above 0, got {x}')
    from deformlit.train import MODELS as known
    for o in a.models:
        if o not in known: p.error(f"argument --models: no model {o!r}; there are {', '.join(known)}")
    a.out = a.out or root/'runs'/('compare_detectors_hard' if a.hard else 'compare_detectors')
    a.threads = a.threads or machine('cpu')['cores']
    run = dict(device=a.device, threads=a.threads, workers=a.workers)
    try:
        for model in a.models:
            if a.speed: compiling(model, a, run)
            elif not (a.missing and is_done(a.out/model)): train(model, a, run)
    except KeyboardInterrupt: sys.exit(130)
    if not a.speed: print(f'\nresults in {a.out}; the page: python tests/notebooks.py tutorials/compare_detectors')

if __name__ == '__main__':
    sys.path.insert(0, str(root))
    main()
