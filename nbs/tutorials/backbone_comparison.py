"""What the page `compare_backbones.ipynb` shows of `runs/compare_backbones/`."""
import math
import numpy as np
from compare_backbones import FORMS, FULL, MODELS, RECIPE
from compare_detectors import root
from comparison import Compared, Run, Sentences, points, told
from deformlit.core import Table
from deformlit.show import INK, panels
from deformlit.train import clock

NAMES = dict(dat='DAT', dat_pp='DAT++', dilateformer='DilateFormer', swin='Swin', convnext='ConvNeXt', vit='ViT', resnet='ResNet', dilateformer_dense='DilateFormer, dense')
IDEAS = [('a hierarchy of maps and windows', 'vit', 'swin'), ('deformed keys in the late stages', 'swin', 'dat'), ('deformed keys in all stages, and convolutions', 'dat', 'dat_pp'),
         ('windows with gaps, and convolutions', 'swin', 'dilateformer'), ('windows with gaps instead of all pixels', 'dilateformer_dense', 'dilateformer'), ('wide convolutions instead of windows', 'swin', 'convnext'), ('a ConvNet built like a transformer', 'resnet', 'convnext')]
NOISE = 0.02    # one seed: what differs by less we call equal

class BackboneRun(Run):
    "The numbers of one finished training."
    def __init__(self, config, metrics):
        self.config, self.metrics, self.seconds = config, metrics, metrics['seconds']
        self.scenes = metrics['history'][-1]['seen']
        self.rate = self.scenes / self.seconds
        self.at_scenes, self.at_minutes = self.curve('seen'), [o / 60 for o in metrics['times']]

class Backbones(Compared):
    "All classifiers."
    models, names, ideas, run, noise, least, things = MODELS, NAMES, IDEAS, BackboneRun, NOISE, .15, 'images'
    def __init__(self, cuda=False, folder=None):
        super().__init__(folder or root/'runs'/('compare_backbones' + '_cuda' * cuda))
        self.command = 'make compare-backbones' + (' ARGS="--device cuda"' if cuda else '')

    @told
    def table(self):
        "What each reached, and how fast it is."
        rows = []
        for o in dict.fromkeys((*MODELS, *self.runs)):
            r = self.runs.get(o)
            if r is None: rows.append((self.name(o), 'not run yet', *[''] * 6)); continue
            m = r.metrics
            rows.append((self.name(o), points(m['accuracy']), f'{r.scenes:,}', f"{m['history'][-1]['epoch']:.2f}", f'{r.rate:.0f}', f"{m['speed']['valid']:.0f}", f"{m['parameters'] / 1e6:.2f} M", clock(r.seconds)))
        return Table(('model', 'accuracy', 'images seen', 'epochs', 'images per second', 'tested per second', 'parameters', 'time'), rows)

    @told
    def curves(self, column='accuracy'):
        "A column of the history by images seen (above: epochs), and by time."
        axes = panels(2, size=(4.4, 3.3))
        for o, r in self.runs.items():
            for ax, x in zip(axes, ([n / 1000 for n in r.at_scenes], r.at_minutes)): ax.plot(x, r.curve(column), color=self.colour(o.removesuffix('_dense')), ls='--' if o.endswith('_dense') else '-', marker='o', ms=3, label=self.name(o))
        for ax, what in zip(axes, ('thousand images seen', 'minutes')): ax.set(xlabel=what, ylabel=column.replace('_', ' '), xlim=(0, None))
        n = next(iter(self.runs.values())).config['images'] / 1000
        above = axes[0].secondary_xaxis('top', functions=(lambda x: x / n, lambda x: x * n))
        above.set_xlabel('epochs', color=INK); above.spines['top'].set_color(INK); above.tick_params(color=INK, labelcolor=INK)
        axes[1].legend(labelcolor=INK, frameon=False, fontsize=8, loc='upper left', bbox_to_anchor=(1, 1))

    def buys(self, column='accuracy'): return super().buys(column)
    def judge(self, column='accuracy'): return super().judge(column)

    def forms(self):
        "Images per second, our form beside the official one."
        rows = []
        for o in FULL:
            c = self.known.get(o, {}).get('forms')
            for row in c['rows'] if c else ():
                ratio = [f"{row['ours'][how] / row['official'][how]:.2f}x" for how in ('forward', 'train')]
                rows.append((row['what'], *(f"{row[who]['forward']:.4g}" for who in ('official', 'ours')), ratio[0], *(f"{row[who]['train']:.4g}" for who in ('official', 'ours')), ratio[1]))
        if not rows: return Sentences(['Not measured yet: `make compare-backbones ARGS="--speed"`.'])
        return Table(('what', 'forward, official', 'ours', 'faster', 'training, official', 'ours', 'faster'), rows)

    def about_forms(self):
        "Where and when that was measured, and the slowest of ours."
        said = [c for o in FULL for c in [self.known.get(o, {}).get('forms')] if c]
        if not said: return Sentences(['Not measured yet: `make compare-backbones ARGS="--speed"`.'])
        ratio, what = min((row['ours'][how] / row['official'][how], f"{row['what']}, {'forward' if how == 'forward' else 'training'}") for c in said for row in c['rows'] for how in ('forward', 'train'))
        where = sorted({f"{c['machine']['gpu'] or c['machine']['cpu']}, {c['threads']} {'thread' if c['threads'] == 1 else 'threads'}, {c['batch']} images at a time, {c['date'][:10]}" for c in said})
        return Sentences([f'Measured on {o}.' for o in where] + [f"{'Ours is nowhere slower' if ratio >= 1 else 'Ours is slower in one place at least'}; the least of the ratios is {ratio:.2f} ({what})."])

    def seen(self, model='vit'):
        "How far the attention of a model reaches, or None."
        return self.runs[model].metrics.get('reach') if model in self.runs else None

    def reach(self, model='vit'):
        "Layer by layer: the share of the attention around the query, and how many keys hold 90 % of it. In brackets: if all keys got the same."
        o = self.seen(model)
        if not o: return Sentences([f'Not run yet: `{self.command}`.'])
        def both(r, f, digits): return f'{f(r):.{digits}f} ({f(r["equal"]):.{digits}f})'
        def near(i): return lambda r: r['near'][min(i, len(r['near']) - 1)]
        rows = [(i, f"{r['h']} x {r['w']}", *(both(r, near(n), 2) for n in (1, 2, 3)), both(r, lambda r: r['gaps'], 2), both(r, lambda r: r['keys'], 0)) for i, r in enumerate(o['layers'], 1) if r['h'] > 2]
        return Table(('layer', 'map', '3 x 3', '5 x 5', '7 x 7', 'windows with gaps', f"keys for {o['share']:.0%}"), rows)

    def judge_reach(self):
        "In words: is attention local and sparse in the first layers, and less so in the last?"
        o = self.seen()
        if not o: return Sentences([f'Not run yet: `{self.command}`.'])
        layers, mean = o['layers'], lambda rows: sum(rows) / len(rows)
        near, keys, third, n = [r['near'][1] / r['equal']['near'][1] for r in layers], [r['keys'] for r in layers], max(1, len(layers) // 3), layers[0]['h'] * layers[0]['w']
        first, last = mean(near[:third]), mean(near[-third:])
        local, fewest = max(range(len(near)), key=near.__getitem__), min(range(len(keys)), key=keys.__getitem__)
        said = [f'Local? The nearest 3 x 3 patches get {first:.1f} times what they would get if all keys were equal in the first {third} layers of the ViT, {last:.1f} times in the last {third}; most in layer {local + 1}, {near[local]:.1f} times.',
                f"Sparse? {o['share']:.0%} of the attention takes {mean(keys[:third]):.0f} of the {n} keys in the first {third} layers, {mean(keys[-third:]):.0f} in the last {third}; fewest in layer {fewest + 1}, {keys[fewest]:.0f}. Equal attention would take {layers[0]['equal']['keys']:.0f}."]
        later = 'DilateFormer saw both in a ViT trained to the end, on ImageNet; so short a training does not show it.'
        said.append({(True, True): 'So shallow attention is local, more so than deep attention, and sparse here, too: what DilateFormer begins from.',
                     (True, False): f'So shallow attention is local here, more so than deep attention, but not sparse. {later}',
                     (False, True): f'So shallow attention is sparse here, but not local: which few keys count, the image says, and not the distance. {later}',
                     (False, False): f'So shallow attention is neither local nor sparse here. {later}'}[first > 1.1 and first > 1.1 * last, mean(keys[:third]) < .5 * layers[0]['equal']['keys']])
        dense = self.seen('dilateformer_dense')
        if dense:
            r = dense['layers'][0]
            said.append(f"In the first layer of the dense DilateFormer the pixels that windows with gaps would read, about {r['equal']['gaps'] * r['h'] * r['w']:.0f} of {r['h'] * r['w']}, get {r['gaps']:.0%} of the attention. Equal attention would give them {r['equal']['gaps']:.0%}.")
        return Sentences(said)

    def show_reach(self, model='vit', least:int=8):
        "Where the attention of each layer goes, seen from the query, on maps of at least so many pixels a side."
        o = self.seen(model)
        if not o: return Sentences([f'Not run yet: `{self.command}`.'])
        layers = [(i, r) for i, r in enumerate(o['layers'], 1) if r['h'] >= least]
        cols = min(5, len(layers))
        axes = np.ravel(panels(cols, math.ceil(len(layers) / cols), size=1.7))
        for ax in axes: ax.axis('off')
        for ax, (i, r) in zip(axes, layers):
            shown = ax.imshow(np.log2(np.maximum(r['map'], 2.**-3)), cmap='PuOr_r', vmin=-3, vmax=3, extent=(.5 - r['w'], r['w'] - .5, r['h'] - .5, .5 - r['h']))
            ax.plot(0, 0, '+', color=INK, ms=5)
            ax.set_title(f'layer {i}', color=INK)
        bar = axes[0].figure.colorbar(shown, ax=list(axes), shrink=.7, ticks=[-3, 0, 3])
        bar.set_label('times the mean', color=INK); bar.ax.set_yticklabels(['1/8', '1', '8'], color=INK); bar.ax.tick_params(color=INK)

def forms():
    "What each model is told."
    words = lambda o: f"({', '.join(map(words, o))})" if isinstance(o, (tuple, list)) else str(o).rpartition('.')[2] if isinstance(o, str) else str(o)
    return Table(('model', 'made by', 'told'), [(NAMES[o], f'`{maker}`', ', '.join(f'{k}={words(v)}' for k, v in form.items())) for o, (maker, form) in FORMS.items()])

def recipe():
    "The recipe of all."
    said = dict(size='side of the image, enlarged from 32 pixels', bs='images in a batch', lr='highest rate of AdamW; one cycle, cosines up and down', div='the first rate is `lr` divided by this', pct_start='part of the training in which it rises', wd='weight decay, of matrices', clip='longest gradient', seed='of weights and batches')
    return Table(('option', 'value', 'what it is'), [(k, v, said[k]) for k, v in RECIPE.items()])
