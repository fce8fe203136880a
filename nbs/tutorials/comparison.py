"""What the page `compare_detectors.ipynb` shows of `runs/compare_detectors/`: tables, curves, and sentences that hold whatever the numbers are. `Compared` is what it shares with other comparisons."""
import functools, math
from pathlib import Path
import torch
from compare_detectors import FILE, MODELS, options, read, root
from deformlit.core import Table
from deformlit.data import DigitScenes, denormalise, normalise
from deformlit.learner import detect_of
from deformlit.show import COLOURS, INK, panels
from deformlit.train import DEFAULTS, build_model, clock, load_run, with_options

NAMES = dict(detr='DETR', dab_detr='DAB-DETR', deformable_detr='Deformable DETR', deformable_detr_refine='Deformable DETR, refined', deformable_detr_two_stage='Deformable DETR, two stages', dab_deformable_detr='DAB-Deformable-DETR')
IDEAS = [('points instead of all pixels', 'detr', 'deformable_detr'), ('boxes refined layer by layer', 'deformable_detr', 'deformable_detr_refine'),
         ('proposals instead of learned queries', 'deformable_detr_refine', 'deformable_detr_two_stage'), ('anchors as queries, dense', 'detr', 'dab_detr'),
         ('anchors as queries, deformable', 'deformable_detr_refine', 'dab_deformable_detr')]
NOISE = 0.03    # one seed and 300 scenes: what differs by less we call equal

def points(x): return '–' if x is None or math.isnan(x) else f'{x:.3f}'
def more(x): return f'{x:+.3f}'

class Sentences(list):
    "Sentences, as a list in a notebook."
    def __repr__(self): return '\n'.join(self)
    def _repr_markdown_(self): return '\n'.join(f'- {o}' for o in self) if len(self) > 1 else ''.join(self)

def told(f):
    "Instead of a table or a figure, a sentence where there is no run."
    @functools.wraps(f)
    def _f(self, *args, **kwargs):
        if self.runs: return f(self, *args, **kwargs)
        return Sentences([f'Not run yet: `{self.command}`.'])
    return _f

class Run:
    "The numbers of one finished training."
    def __init__(self, config, metrics):
        self.config, self.metrics, n = config, metrics, len(metrics['history'])
        self.seconds, self.scenes = metrics['seconds'], metrics['epochs'] * config['items']
        self.rate = self.scenes / self.seconds
        self.at_scenes, self.at_minutes = [i * config['items'] for i in range(1, n + 1)], [o / 60 for o in metrics['times']]
    def curve(self, column): return [math.nan if o.get(column) is None else o[column] for o in self.metrics['history']]
    def score(self, column): return self.metrics[column] or 0.

class Compared:
    "All trainings of one folder. What a comparison is about is said by its class."
    models, names, ideas, run, command = (), {}, (), Run, ''
    noise, least, things = 0., 0., 'images'     # what differs by less we call equal; who has less has hardly begun; what is counted
    def __init__(self, folder):
        self.folder = Path(folder)
        self.known = read(self.folder/FILE) or {}
        found = {o: (read(self.folder/o/'config.json'), read(self.folder/o/'metrics.json')) for o in (*self.models, *sorted(self.known.keys() - set(self.models)))}
        self.runs = {o: self.run(*v) for o, v in found.items() if all(v)}
    def name(self, model): return self.names.get(model, model)
    def colour(self, model): return COLOURS[[*self.models, *self.runs].index(model) % len(COLOURS)]

    @told
    def about(self):
        "When, where and how long."
        rows, none = [], dict(date='?', minutes='?', device='?', threads='?', machine=dict(cpu='?', gpu=None))
        for o, run in self.runs.items():
            said = self.known.get(o, {}).get('run', none)
            rows.append((self.name(o), said['date'], said['minutes'], clock(run.seconds), said['machine']['gpu'] or said['machine']['cpu'], run.metrics['threads'], run.metrics['torch']))
        return Table(('model', 'date', 'minutes asked for', 'taken', 'machine', 'threads', 'torch'), rows)

    @told
    def buys(self, column='AP'):
        "Pairs of models that differ by one idea."
        rows = []
        for idea, a, b in self.ideas:
            if a not in self.runs or b not in self.runs: rows.append((idea, f'{self.name(a)} → {self.name(b)}', 'not run yet', '', '')); continue
            p, q = self.runs[a], self.runs[b]
            rows.append((idea, f'{self.name(a)} → {self.name(b)}', f'{points(p.score(column))} → {points(q.score(column))}', more(q.score(column) - p.score(column)), f'{q.rate / p.rate:.2f}x'))
        return Table(('idea', 'from → to', column, 'difference', f'{self.things} per second'), rows)

    @told
    def judge(self, column='AP'):
        "What the numbers say, in words."
        order = sorted(self.runs, key=lambda o: -self.runs[o].score(column))
        said = [f"In the same time the best is {self.name(order[0])} with {column} {points(self.runs[order[0]].score(column))}, the last {self.name(order[-1])} with {points(self.runs[order[-1]].score(column))}."]
        said += [f'{o} has hardly begun to learn: {column} {points(self.runs[m].score(column))}. It needs more time, and says little about what it would reach.'
                 for m in order if self.runs[m].score(column) < self.least for o in [self.name(m)]]
        for idea, a, b in self.ideas:
            if a not in self.runs or b not in self.runs: continue
            p, q = self.runs[a], self.runs[b]
            if max(p.score(column), q.score(column)) < self.least: continue         # both have hardly begun: nothing to compare
            d, faster = q.score(column) - p.score(column), q.rate / p.rate
            what = 'no difference that one seed could show' if abs(d) < self.noise else f"{'a gain' if d > 0 else 'a loss'} of {abs(d):.3f}"
            said.append(f"{idea[0].upper() + idea[1:]} ({self.name(a)} → {self.name(b)}): {what}, at {faster:.2f} times the {self.things} per second.")
        return Sentences(said)

class Comparison(Compared):
    "All detectors."
    models, names, ideas, noise, least, things = MODELS, NAMES, IDEAS, NOISE, .05, 'scenes'
    def __init__(self, hard=False, folder=None):
        super().__init__(folder or root/'runs'/('compare_detectors_hard' if hard else 'compare_detectors'))
        self.hard, self.command = hard, 'make compare' + (' ARGS="--hard"' if hard else '')

    @told
    def table(self):
        "What each reached."
        rows = []
        for o in dict.fromkeys((*MODELS, *self.runs)):
            r = self.runs.get(o)
            if r is None: rows.append((self.name(o), 'not run yet', *[''] * 6)); continue
            m = r.metrics
            rows.append((self.name(o), points(m['AP']), points(m['AP50']), points(m['AP75']), f'{r.scenes:,}', f'{r.rate:.0f}', f"{m['parameters'] / 1e6:.2f} M", clock(r.seconds)))
        return Table(('model', 'AP', 'AP50', 'AP75', 'scenes seen', 'scenes per second', 'parameters', 'time'), rows)

    @told
    def curves(self, column='AP50'):
        "A score by scenes seen, and by time."
        axes = panels(2, size=(4.4, 3))
        for o, r in self.runs.items():
            for ax, x in zip(axes, ([n / 1000 for n in r.at_scenes], r.at_minutes)): ax.plot(x, r.curve(column), color=self.colour(o), marker='o', ms=3, label=self.name(o))
        for ax, what in zip(axes, ('thousand scenes seen', 'minutes')): ax.set(xlabel=what, ylabel=column, ylim=(0, 1), xlim=(0, None))
        axes[1].legend(labelcolor=INK, frameon=False, fontsize=8, loc='upper left', bbox_to_anchor=(1, 1))

    def compiled(self):
        "Images per second in training, without and with `torch.compile`."
        rows = []
        for o in dict.fromkeys((*MODELS, *self.known)):
            c = self.known.get(o, {}).get('compile')
            if c: rows.append((self.name(o), f"{c['eager']['train']:.1f}", f"{c['compiled']['train']:.1f}", f"{c['faster']['train']:.2f}x", c['device'], c['threads'], c['date']))
        if not rows: return Sentences(['Not measured yet: `make compare ARGS="--speed"`.'])
        return Table(('model', 'images/s', 'compiled', 'faster', 'device', 'threads', 'date'), rows)

    def model(self, o):
        "A trained detector where its weights are at hand, else one that has learned nothing; and a word that says which."
        if (self.folder/o/'model.safetensors').exists(): return load_run(self.folder/o)[0], 'trained'
        torch.manual_seed(0)
        return build_model(with_options({**DEFAULTS, 'vocab': DigitScenes.vocab}, options(o, self.hard))).eval(), 'not trained'

def scene(i:int=0, **options):
    "A validation scene: as the model wants it, and to draw on."
    x = normalise(DigitScenes(i + 1, 'valid', **options)[i].image)
    return x, denormalise(x)

@torch.no_grad()
def best_query(model, image) -> int:
    "The query with the best detection in an image `3 h w`."
    return int(detect_of(model)(model(image[None]), 1).queries[0, 0])
