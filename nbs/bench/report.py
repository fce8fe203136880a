"""What the page `speed.ipynb` shows of `runs/bench/*.json`: tables, figures, and sentences that hold whatever the numbers are."""
import functools, statistics
import ops, predict, results
from deformlit.core import Table
from deformlit.show import COLOURS, INK, panels

WORDS = dict(fwd='forward', bwd='backward', fwd_bwd='forward + backward')
STALE = '†'
plain = dict(malloc='default', isa='default')

def ms(x): return f'{x:.3g}' if x < 100 else f'{x:.0f}'
def times(x): return 'not measured' if x is None else f'{x:.3g}x' if x < 100 else f'{x:.0f}x'
def percent(x): return f'{100 * x:.0f} %'

def svg():
    "From here on, store this notebook's figures as SVG that is the same from run to run."
    import matplotlib
    from matplotlib_inline.backend_inline import set_matplotlib_formats
    set_matplotlib_formats('svg', metadata=dict(Date=None))
    matplotlib.rcParams.update({'svg.hashsalt': 'deformlit', 'svg.fonttype': 'none'})   # text stays text, which is smaller

class Sentences(list):
    "Sentences, as a list in a notebook."
    def __repr__(self): return '\n'.join(self)
    def _repr_markdown_(self): return '\n'.join(f'- {o}' for o in self) if len(self) > 1 else ''.join(self)

def told(f):
    "Instead of a table or a figure, a sentence where there are no measurements; on a GPU one for all."
    @functools.wraps(f)
    def _f(self, *args, **kwargs):
        if self.data is None and self.device == 'cuda': return Sentences(['No measurement on a GPU is here yet: `python nbs/bench/gpu.py` makes them.']) if f.__name__ == 'about' else None
        if self.data is None: return Sentences([f'There is no `runs/bench/{self.name}.json`: `make bench` writes it.'])
        return f(self, *args, **kwargs) or Sentences(['This was not measured yet: `make bench` does.'])
    return _f

class Report:
    "The measurements of one op on one device."
    def __init__(self,
        name,          # An entry of ops.py, and the name of its file
        device='cpu',
        folder=results.root/'runs'/'bench',
        kernels=None,  # The digest of the kernels that count as fresh; those of this checkout, if left out
    ):
        self.name, self.device, self.data, self.entry = name, device, results.read(folder/f'{name}.json'), ops.entry(name)
        self.workloads = self.entry.on(device)
        self.now, self.base = kernels or results.kernels_hash(op=name), next(iter(self.entry.peers))
        mine = lambda o: [row for row in (self.data or {}).get(o, []) if row['device'] == device and row.get('timing') != 'eager']
        self.rows, self.sweeps, self.limit_rows = mine('rows'), mine('sweeps'), mine('limits')
        self.threads = max((row['threads'] for row in self.rows), default=1)
        if not self.rows and self.data: self.data = None
    def pick(self, rows=None, **want):
        want = {'threads': self.threads, 'dtype': 'float32', **plain, **want}
        return [row for row in (self.rows if rows is None else rows) if all(row[k] == v for k, v in want.items() if k in row and v is not None)]
    def one(self, **want): return next(iter(self.pick(**want)), None)
    def order(self, rows):
        "The implementations in `rows`, and their (workload, direction), each in our order."
        there = {row['implementation'] for row in rows}, {(row['workload'], row['direction']) for row in rows}
        return [o for o in self.colours() if o in there[0]], [(w, d) for w in self.workloads for d in WORDS if (w, d) in there[1]]
    def kinds(self):
        "What is written behind a number where it holds for one kind of points only."
        return {o: f" with {o} points" if len(self.entry.points) > 1 else "" for o in self.entry.points}
    def mark(self, row): return f' {STALE}' if results.is_stale(self.data, row, self.now) else ''
    def speedup(self, row): return 'not measured' if row is None else times(row['speedup_over_eager']) + self.mark(row)

    @told
    def about(self):
        "The runs that the rows come from."
        rows = []
        for name, run in self.data['runs'].items():
            n = sum(row['run'] == name for o in ('rows', 'sweeps') for row in self.data[o] if row['device'] == self.device)
            if not n: continue
            m, v = run['machine'], run['versions']
            rows.append((run['date'], f"`{run['command']}`", n, m['gpu'] if self.device == 'cuda' else f"{m['cpu']}, {m['isa']}, {m['cores']} cores",
                         ', '.join(f'{k} {v[k]}' for k in v if v[k]), run['kernels'][:8] + (f' {STALE}' if run['kernels'] != self.now else ''), '' if run['load']['others'] is None else f"{run['load']['others']:.2f}"))
        return Table(('date', 'command', 'rows', 'machine', 'versions', 'kernels', 'cores that others used'), rows)

    @told
    def stale(self):
        old = sum(results.is_stale(self.data, row, self.now) for row in self.rows + self.sweeps)
        if not old: return Sentences([f'All rows were measured with the kernels of this checkout ({self.now[:8]}).'])
        return Sentences([f'{old} of {len(self.rows + self.sweeps)} rows were measured with other kernels than those of this checkout ({self.now[:8]}). They are marked {STALE}.'])

    @told
    def goals(self):
        "Speedup over the baseline beside what is aimed at."
        rows = []
        for (who, direction), goal in self.entry.goals.items():
            for workload, least in goal.items():
                found = [self.one(implementation=who, direction=direction, workload=workload, points=p) for p in self.entry.points]
                got = [o['speedup_over_eager'] for o in found if o and o['speedup_over_eager']]
                verdict = 'not measured' if not got else 'yes' if min(got) >= least else percent(min(got) / least)
                rows.append((who, WORDS[direction], workload, f'{least:g}x', *map(self.speedup, found), verdict))
        return Table(('way', 'direction', 'workload', 'goal', *(self.entry.points if len(self.entry.points) > 1 else ('measured',)), 'reached'), rows)

    @told
    def short(self):
        "What falls short, in words."
        out, unknown = [], []
        for (who, direction), goal in self.entry.goals.items():
            for workload, least in goal.items():
                found = [o for p in self.entry.points if (o := self.one(implementation=who, direction=direction, workload=workload, points=p)) and o['speedup_over_eager']]
                if not found: unknown.append(f'{who} {WORDS[direction]} on `{workload}`'); continue
                worst = min(found, key=lambda o: o['speedup_over_eager'])
                if worst['speedup_over_eager'] < least:
                    out.append(f"`{workload}`, {WORDS[direction]}: '{who}' is {times(worst['speedup_over_eager'])} as fast as {self.base}{self.kinds()[worst['points']]}; the goal is {least:g}x.")
        for row, sentence, ok in self.memory_rows():
            # output and gradients have the shapes of output and inputs, which is what the forward pass must move
            must = self.entry.count(self.workloads[row['workload']], 4)['compulsory']['fwd'] / 1e6
            alone = f' (output and gradients alone are {must:.1f} MB)' if row['direction'] == 'fwd_bwd' else ''
            if ok is False: out.append(f"`{row['workload']}`, {WORDS[row['direction']]}: '{row['implementation']}' needs {row['peak_mb']:.1f} MB beyond its inputs{alone}; the goal is {sentence}.")
        if unknown: out.append('Not measured: ' + '; '.join(unknown) + '.')
        return Sentences(out or ["Every goal is reached" + f", with {' and with '.join(self.entry.points)} points" * (len(self.entry.points) > 1) + "."])

    @told
    def times(self, points=None, dtype='float32'):
        "Milliseconds of all implementations."
        points = points or self.entry.points[0]
        names, cases = self.order(self.pick(points=points, dtype=dtype))
        cell = lambda row: '' if row is None else f"{ms(row['median_ms'])} ± {ms(row['iqr_ms'] / 2)}" + self.mark(row)
        rows = [(w, WORDS[d], *(cell(self.one(workload=w, direction=d, points=points, dtype=dtype, implementation=o)) for o in names)) for w, d in cases]
        return rows and Table(('workload', 'direction', *(f'{o} (ms)' for o in names)), rows)

    @told
    def settings(self, who='native'):
        "How the speedup of one way depends on threads, malloc, instruction set, dtype and points."
        settings = [(f'{self.threads} threads', {}), ('uniform points', dict(points='uniform')), *((f'{t} thread', dict(threads=t)) for t in sorted({row['threads'] for row in self.rows} - {self.threads})),
                    ('malloc tuned', dict(malloc='tuned')), ('bfloat16 values', dict(dtype='bfloat16')), *((f'only {o}', dict(isa=o)) for o in ('avx512', 'avx2', 'baseline'))]
        cases = [(w, d) for d in ('fwd', 'fwd_bwd') for w in self.workloads]
        first = lambda row: times(row['first_speedup']) + self.mark(row) if row else ''
        rows = [('first call of a turn', *(first(self.one(workload=w, direction=d, points=self.entry.points[0], implementation=who)) for w, d in cases))]
        rows += [(name, *(self.speedup(row) if (row := self.one(**{**dict(workload=w, direction=d, points=self.entry.points[0], implementation=who), **want})) else '' for w, d in cases)) for name, want in settings]
        rows = [row for row in rows if any(row[1:])]
        return rows and Table(('setting', *(f'{w}, {WORDS[d]}' for w, d in cases)), rows)

    @told
    def effect(self, word, **want):
        "What one setting does to the baseline, in a sentence."
        out = []
        for w in self.workloads:
            a, b = (self.one(workload=w, direction='fwd', implementation=self.base, **{**dict(points=self.entry.points[0]), **o}) for o in ({}, want))
            if a and b and a is not b: out.append(f"on `{w}` {ms(b['median_ms'])} ms instead of {ms(a['median_ms'])} ms")
        return out and Sentences([f"{word}, {self.base} takes " + ', '.join(out) + ' (forward).'])

    def memory_rows(self):
        "(row, goal in words, whether it is reached)."
        for (who, direction), (sentence, test) in self.entry.memory.items():
            for w, sizes in self.workloads.items():
                row, base = (self.one(workload=w, direction=direction, points=self.entry.points[0], implementation=o) for o in (who, self.base))
                if row and row['peak_mb'] is not None and base and base['peak_mb']: yield row, sentence, test(row, base, sizes)

    @told
    def memory(self):
        "Megabytes beyond the inputs."
        rows = [row for row in self.pick(points=self.entry.points[0]) if row['peak_mb'] is not None]
        goal = {(row['workload'], row['direction'], row['implementation']): f" ({sentence}: {'yes' if ok else 'no'})" for row, sentence, ok in self.memory_rows()}
        names, cases = self.order(rows)
        def cell(w, d, who):
            found = [row for row in rows if (row['workload'], row['direction'], row['implementation']) == (w, d, who)]
            return f"{found[0]['peak_mb']:.1f}{self.mark(found[0])}{goal.get((w, d, who), '')}" if found else ''
        return rows and Table(('workload', 'direction', *(f'{o} (MB)' for o in names)), [(w, WORDS[d], *(cell(w, d, o) for o in names)) for w, d in cases])

    def bounds(self):
        "For each workload: its limits, the bound forward and forward + backward, and the native rows."
        for o in self.pick(self.limit_rows):
            both = o['scatter_ms'] and 2 * o['gather_ms'] + o['scatter_ms']
            rows = [self.one(workload=o['workload'], points=o['points'], direction=d, implementation='native') for d in ('fwd', 'fwd_bwd')]
            yield o, (o['gather_ms'], both), rows

    @told
    def limits(self):
        "Counts, and the times below which nobody comes."
        out = []
        for o, bounds, rows in self.bounds():
            floor, flops = (o[k]['fwd'] for k in ('compulsory_mb', 'operations'))
            cell = lambda bound, row: '' if not bound else f'{ms(bound)}' + (f" ({percent(bound / row['median_ms'])} of it reached{self.mark(row)})" if row else '')
            out.append((o['workload'], o['points'], f"{o['samples']:,}", f"{flops / 1e6:.0f}", f"{o['gathered_mb']:.1f}", f'{floor:.1f}',
                        ms(flops / o['gflops'] / 1e6), ms(floor / o['copy_gb_s']), *map(cell, bounds, rows)))
        head = ('workload', 'points', 'samples', 'Mflop', 'MB read by index', 'MB that must move', 'ms by arithmetic', 'ms by memory', 'gather bound, forward (ms)', 'forward + backward (ms)')
        shown = [i for i in range(len(head)) if any(row[i] for row in out) and (head[i] != 'points' or len(self.entry.points) > 1)]      # no column without anything in it
        return out and Table([head[i] for i in shown], [[row[i] for i in shown] for row in out])

    @told
    def ground(self):
        "What the micro-benchmarks say of the machine, in words."
        found = self.pick(self.limit_rows)
        if not found: return []
        middle = lambda key: statistics.median(o[key] for o in found)
        if self.device == 'cuda': return Sentences([f"This GPU copies {middle('copy_gb_s'):.0f} GB/s (bytes read plus bytes written) and multiplies float32 matrices at {middle('gflops') / 1e3:.1f} TFLOP/s.", f"It issues {middle('issue_g_s') / 1e3:.1f} instructions of single threads in a picosecond."] + [
            f"`{o['workload']}`: its table of values is read from the second-level cache at {o['l2_gb_s']:.0f} GB/s. Random rows of it are added to at " + ', '.join(f'{v:.0f} GB/s ({k})' for k, v in o['reduce_gb_s'].items()) +
            f". An empty kernel takes {o['launch_us']:.2f} µs." for o in found if predict.ground(o) and o['points'] == self.entry.points[0]])
        return Sentences([f"With {self.threads} thread{'s' * (self.threads > 1)} this machine copies {middle('copy_gb_s'):.0f} GB/s (bytes read plus bytes written) and multiplies matrices at {middle('gflops'):.0f} GFLOP/s."
                          + (f" Rows are read by {' or '.join(sorted({o['how'] for o in found}))}." if any(o['how'] for o in found) else "")])

    # ---- on a GPU

    @told
    def kernels(self, who='native'):
        "Microseconds: what the counts predict, what the kernels take when a graph replays them, what a call from Python takes, and what is aimed at."
        calls = {tuple(row[k] for k in ('workload', 'points', 'dtype', 'direction', 'implementation')): row for row in self.data['rows'] if row['device'] == self.device and row['timing'] == 'eager'}
        us, rows = lambda row: '' if row is None else f"{1e3 * row['median_ms']:.1f}{self.mark(row)}", []
        for o in self.pick(self.limit_rows):
            for dtype, by in o.get('predicted_us', {}).items():
                for direction, terms in by.items():
                    key = o['workload'], o['points'], dtype, direction, who
                    row, goal = self.one(**dict(zip(('workload', 'points', 'dtype', 'direction', 'implementation'), key))), self.entry.cuda_goals.get((who, direction, dtype), {}).get(o['workload'])
                    if not row: continue
                    rows.append((*key[:3], WORDS[direction], f"{terms['total']:.1f}", predict.longest(terms), us(row), f"{1e3 * row['median_ms'] / terms['total']:.2g}x", us(calls.get(key)),
                                 '' if goal is None else f"{goal} ({'yes' if 1e3 * row['median_ms'] <= goal else 'no'})"))
        return rows and Table(('workload', 'points', 'dtype', 'direction', 'predicted (µs)', 'by', 'kernels (µs)', 'of the prediction', 'called (µs)', 'goal (µs)'), rows)

    @told
    def ratios(self):
        "How many times as fast as the best of some others, beside what is aimed at."
        rows = []
        for (who, direction, dtype, others), goals in self.entry.cuda_ratios.items():
            for workload, least in goals.items():
                for points in self.entry.points:
                    want, known = dict(workload=workload, direction=direction, points=points, dtype=dtype), {'peers': tuple(self.entry.peers)}.get(others, others)
                    mine = self.one(implementation=who, **want)
                    found = {o['implementation']: o['median_ms'] for o in self.pick(**want) if o is not mine and o['implementation'].startswith(known)}
                    if others == 'reductions': found = {o['how']: o['scatter_ms'] for o in self.pick(self.limit_rows, workload=workload, points=points) if o['scatter_ms']}
                    if not mine or not found: rows.append((who, WORDS[direction], workload, points, dtype, others, '', f'{least:.3g}x', 'not measured')); continue
                    best = min(found, key=found.get)
                    got = found[best] / mine['median_ms']
                    rows.append((who, WORDS[direction], workload, points, dtype, best, times(got) + self.mark(mine), f'{least:.3g}x', 'yes' if got >= least else 'no'))
        return rows and Table(('way', 'direction', 'workload', 'points', 'dtype', 'best of the others', 'times as fast', 'goal', 'reached'), rows)

    # ---- figures

    def colours(self):
        names = list(dict.fromkeys([self.base, 'eager', 'compiled', 'native', *self.entry.peers, 'native deterministic']))
        return {name: INK if name == self.base else COLOURS[i - 1] for i, name in enumerate(names)}

    @told
    def against(self, direction='fwd'):
        "Time against each of the sizes that are varied."
        rows, colours = self.pick(self.sweeps, direction=direction), self.colours()
        if not rows: return []
        axes = panels(2, 2, (3.6, 2.7))
        for ax, what in zip(axes, self.entry.sweeps):
            for who in colours:
                mine = sorted((row['at'], row['median_ms']) for row in rows if row['against'] == what and row['implementation'] == who)
                if mine: ax.plot(*zip(*mine), 'o-', ms=3, lw=1.5, color=colours[who], label=who)
            ticks = sorted({row['at'] for row in rows if row['against'] == what})
            ax.set(xscale='log', yscale='log', xlabel=what, ylabel='ms', ylim=(.7 * min(o['median_ms'] for o in rows), 1.5 * max(o['median_ms'] for o in rows)))
            ax.set_xticks(ticks, ticks); ax.set_xticks([], minor=True)
        axes[0].legend(fontsize=8)
        axes[0].figure.suptitle(f'{WORDS[direction]}, ms', color=INK, fontsize=10)
        return axes[0].figure

    @told
    def bars(self):
        "Peak memory, and the share of the gather bound that is reached."
        colours, rows = self.colours(), [row for row in self.pick(points=self.entry.points[0]) if row['peak_mb']]
        shares = [(f"{o['workload']}, {o['points']}", [bound / row['median_ms'] if bound and row else None for bound, row in zip(bounds, found)]) for o, bounds, found in self.bounds()]
        shares = [o for o in shares if any(o[1])]
        if not rows: return []
        axes = panels(2 if shares else 1, 1, (4.2, 3))
        ax = axes[0] if shares else axes
        names, cases = self.order(rows)
        for i, who in enumerate(names):
            got = {(row['workload'], row['direction']): row['peak_mb'] for row in rows if row['implementation'] == who}
            ax.bar([j + i * .8 / len(names) for j, case in enumerate(cases) if case in got], [got[o] for o in cases if o in got], .8 / len(names), color=colours[who], label=who)
        ax.set(yscale='log', ylabel='MB beyond the inputs', title='peak memory', ylim=(None, 12 * max(row['peak_mb'] for row in rows)))
        ax.set_xticks([j + .4 - .4 / len(names) for j in range(len(cases))], [w + '\n' + d.replace('_', '\n') for w, d in cases], fontsize=8)
        ax.legend(fontsize=8, ncols=2, loc='upper center')
        if shares:
            for i, (direction, colour) in enumerate((('forward', COLOURS[2]), ('forward + backward', COLOURS[1]))):
                axes[1].barh([j + .4 * i for j in range(len(shares))], [100 * (o[1][i] or 0) for o in shares], .38, color=colour, label=direction)
            axes[1].set_yticks([j + .2 for j in range(len(shares))], [o[0] for o in shares], fontsize=8)
            axes[1].set(xlabel='% of the gather bound', title="'native' beside its limit")
            axes[1].set_ylim(len(shares) - .3, -1.1); axes[1].legend(fontsize=8, ncols=2, loc='upper right')
        return ax.figure
