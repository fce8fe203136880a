"""What counts say of an op's time on a GPU before it is measured: bytes and operations over what micro-benchmarks found.

    python nbs/bench/predict.py            with the micro-benchmarks in runs/bench/, or else with ASSUMED, which says so
    python nbs/bench/predict.py --out FOLDER     with those in FOLDER
"""
import argparse
from pathlib import Path
import results

# For an H200 until its micro-benchmarks have run: copy, arithmetic and issue by the vendor's data sheet, the others assumed.
ASSUMED = dict(copy_gb_s=4800., gflops=67000., l2_gb_s=5500., reduce_gb_s={'4 at a time': 2700.}, issue_g_s=33450., launch_us=2.)

def ground(row):
    "What a row of `limits` says of the machine; None if it has no micro-benchmarks of a GPU."
    return row if row and row.get('l2_gb_s') else None

def predict(
    count,       # What an entry's `count` says, for the bytes of a value
    ground,      # As ASSUMED
    instructions={},     # Of single threads, by direction, where they were counted
    reads=None,  # Bytes that come from the second-level cache, again and again; all that are gathered, if left out
) -> dict:       # By direction: microseconds, by term and in total
    """Forward: the longest of what must move to and from memory, what is read from the second-level cache, the arithmetic, and the instructions; each if it were alone.
    Backward: the same, and what is added to rows. `launch`, which an empty kernel takes as well, comes on top. Both passes: their sum."""
    us = lambda amount, per_ns: amount / per_ns / 1e3       # GB/s are bytes per nanosecond
    out = {}
    for direction in ('fwd', 'bwd'):
        terms = dict(memory=us(count['compulsory'][direction], ground['copy_gb_s']), cache=us(count['gathered'] if reads is None else reads, ground['l2_gb_s']),
                     arithmetic=us(count['operations'][direction], ground['gflops']))
        if direction in instructions: terms['instructions'] = us(instructions[direction], ground['issue_g_s'])
        if direction == 'bwd': terms['reductions'] = us(count.get('reduced', 0), ground['reduce_gb_s']['4 at a time'])
        out[direction] = dict(terms, launch=ground['launch_us'], total=max(terms.values()) + ground['launch_us'])
    out['fwd_bwd'] = dict(total=out['fwd']['total'] + out['bwd']['total'])
    return {k: {o: round(x, 2) for o, x in v.items()} for k, v in out.items()}

def longest(terms):
    "The term that rules."
    return max((o for o in terms if o not in ('total', 'launch')), key=terms.get, default='')

def predictions(entry, row, counted):
    "By dtype what `predict` says for a row of `limits`; `counted` is what `row` of an entry's rows gives."
    sizes = entry.on('cuda')[row['workload']]
    def reads(size): return entry.reads(counted, size) if counted and entry.reads else 0 if entry.rows is None else None     # without rows, what is read again lies next to it
    def instructions(dtype): return {d: entry.count(sizes, 4)['samples'] * n for (d, t), n in entry.instructions.items() if t == dtype}
    return {dtype: predict(entry.count(sizes, size), row, instructions(dtype), reads(size)) for dtype, size in (('float32', 4), ('bfloat16', 2))}

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--op', nargs='+', help='only these ops')
    p.add_argument('--out', type=Path, default=results.root/'runs'/'bench', help='folder of the results')
    a = p.parse_args()
    import torch, ops
    for name in a.op or ops.ENTRIES:
        entry, data = ops.entry(name), results.read(a.out/f'{name}.json')
        for workload, sizes in entry.on('cuda').items():
            for points in entry.points:
                measured = ground(next((o for o in (data or {}).get('limits', []) if (o['device'], o['workload'], o['points']) == ('cuda', workload, points)), None))
                counted = entry.rows(entry.inputs(sizes, points, torch.Generator().manual_seed(0))) if entry.rows and entry.reads else None
                found = predictions(entry, dict(measured or ASSUMED, workload=workload), counted)
                for dtype, by in found.items():
                    said = ', '.join(f"{d} {t['total']:.1f} µs{f' ({longest(t)})' if len(t) > 1 else ''}" for d, t in by.items())
                    print(f"{name} {workload} {points} {dtype}: {said}{'' if measured else ', with assumed bandwidths'}", flush=True)

if __name__ == '__main__': main()
