"""The comparison of the detectors: its command, and its page with all results, with some, and with none."""
import json, re, subprocess, sys, types
import pytest, torch
from deformlit.data import DigitScenes
from deformlit.train import DEFAULTS, prepare, train_parser, with_options
from notebooks import root

sys.path.insert(0, str(root/'nbs'/'tutorials'))
import compare_detectors as C
from comparison import IDEAS, NOISE, Comparison, best_query, scene

SPEED = dict(train=100., valid=300.)

@pytest.fixture(autouse=True, scope='module')
def no_screen():
    import matplotlib
    matplotlib.use('agg')

def config(model, **length): return with_options({**DEFAULTS, 'vocab': DigitScenes.vocab}, {**C.options(model), **length})

@pytest.mark.parametrize('hard', [False, True])
@pytest.mark.parametrize('model', C.MODELS)
def test_options_are_those_of_the_command(model, hard):
    "Every word that the script says is understood, and says what was meant."
    words = C.arguments({**C.options(model, hard), 'epochs': 3, 'items': 80, 'device': 'cpu', 'threads': None, 'workers': 0, 'compile': False})
    given = vars(train_parser().parse_args([*words, '--out', 'x', '--speed', '1']))
    said = prepare(given)[1]
    assert said == with_options({**DEFAULTS, 'vocab': DigitScenes.vocab}, {**C.options(model, hard), 'epochs': 3, 'items': 80})

def test_arguments():
    assert C.arguments(dict(a=1, b_c=[2, 3], d=True, e=False, f=None, g=0.)) == ['--a', '1', '--b-c', '2', '3', '--d', '--g', '0.0']

@pytest.mark.parametrize('seconds', [1, 15, 45, 120, 480, 3600])
def test_plan_fills_the_time(seconds):
    p = C.plan(seconds, SPEED, 8, 300)
    assert 2 <= p['epochs'] <= C.EPOCHS and p['items'] % 8 == 0 and p['items'] >= 8
    takes = p['epochs'] * (p['items'] / SPEED['train'] + 300 / SPEED['valid'])
    if seconds >= 15: assert .9 * seconds < takes <= seconds
    assert C.plan(seconds, dict(train=200., valid=300.), 8, 300)['items'] >= p['items']

def fake(folder, model, ap, rate=100):
    "The files of a run."
    length = C.plan(480, dict(train=rate, valid=300.), 8, 300)
    (folder/model).mkdir(parents=True)
    history = [dict(epoch=i, AP=ap * i / length['epochs'], AP50=None if i == 1 else ap, train_loss=9. / i) for i in range(1, length['epochs'] + 1)]
    metrics = dict(AP=ap, AP50=ap, AP75=None, seconds=470., epochs=length['epochs'], times=[47. * i for i in range(1, length['epochs'] + 1)], parameters=2_000_000, threads=2, torch='2', history=history)
    (folder/model/'config.json').write_text(json.dumps(config(model, **length)))
    (folder/model/'metrics.json').write_text(json.dumps(metrics))
    C.note(folder, model, 'run', dict(date='today', minutes=8, device='cpu', threads=2, machine=dict(cpu='x', cores=2, gpu=None), speed=SPEED))

def shown(o): return repr(o) if o is not None else ''

def test_nothing_was_run(tmp_path):
    c = Comparison(folder=tmp_path/'none')
    for f in (c.about, c.table, c.curves, c.buys, c.judge): assert shown(f()) == 'Not run yet: `make compare`.'
    assert 'make compare ARGS="--speed"' in shown(c.compiled())
    assert 'make compare ARGS="--hard"' in shown(Comparison(hard=True, folder=tmp_path/'none').table())

def test_some_were_run(tmp_path):
    fake(tmp_path, 'detr', .01); fake(tmp_path, 'deformable_detr', .4, 80)
    c = Comparison(folder=tmp_path)
    text = shown(c.table())
    assert text.count('not run yet') == 4 and '0.400' in text and '2.00 M' in text
    assert shown(c.buys()).count('not run yet') == 4
    said = shown(c.judge())
    assert 'the best is Deformable DETR with AP 0.400' in said and 'DETR has hardly begun to learn' in said and 'a gain of 0.390' in said and 'DAB' not in said
    assert c.curves() is None and 'today' in shown(c.about())

def test_all_were_run(tmp_path):
    for i, o in enumerate(C.MODELS): fake(tmp_path, o, .5 + i * .02)
    fake(tmp_path, 'dab_deformable_detr_two_stage', .9)
    c = Comparison(folder=tmp_path)
    assert list(c.runs) == [*C.MODELS, 'dab_deformable_detr_two_stage'] and 'not run yet' not in shown(c.table()) + shown(c.buys())
    said = shown(c.judge())
    assert 'the best is dab_deformable_detr_two_stage' in said and said.count('no difference that one seed could show') == sum(abs(C.MODELS.index(a) - C.MODELS.index(b)) * .02 < NOISE for _, a, b in IDEAS)

def test_compiled(tmp_path):
    C.note(tmp_path, 'detr', 'compile', dict(date='today', device='cpu', threads=2, eager=SPEED, compiled=dict(train=150., valid=1.), faster=dict(train=1.5, valid=1.)))
    C.note(tmp_path, 'detr', 'run', dict(date='today'))
    assert '1.50x' in shown(Comparison(folder=tmp_path).compiled()) and set(C.read(tmp_path/C.FILE)['detr']) == {'compile', 'run'}

def test_models_to_look_at(tmp_path):
    model, how = Comparison(folder=tmp_path).model('dab_detr')
    image, photo = scene(1, **{k: C.EASY[k] for k in ('size', 'digit_px', 'max_digits')})
    assert how == 'not trained' and not model.training and image.shape == photo.shape == (3, 96, 96) and 0 <= best_query(model, image) < C.EASY['queries']

@pytest.fixture
def calls(monkeypatch, tmp_path):
    "The processes that would be started; measurements are done at once, trainings leave the files of a run."
    seen = []
    def process(code, words, **kwargs):
        words = [str(o) for o in words]
        seen.append(words)
        if code == C.MEASURE: open(words[0], 'w').write(json.dumps(SPEED if words[1] == 'once' else [dict(eager=dict(SPEED, train=100. + i), compiled=dict(SPEED, train=x * (100. + i))) for i, x in enumerate((1., 5., 2., 1.5, 3.))]))
        else:
            folder = tmp_path/'out'/words[words.index('--out') + 1].rpartition('/')[2]
            if '--resume' not in words: folder.mkdir(parents=True, exist_ok=True)
            (folder/'resume.pt').unlink(missing_ok=True)
            (folder/'config.json').write_text('{"epochs": 1}'); (folder/'metrics.json').write_text('{"epochs": 1}')
        return types.SimpleNamespace(returncode=0)
    monkeypatch.setattr(C, 'process', process)
    return seen

def test_command(calls, tmp_path, capsys):
    out = tmp_path/'out'
    C.main(['--models', 'detr', 'deformable_detr', '--out', str(out), '--minutes', '1', '--threads', '2'])
    assert [o[0] == '--model' for o in calls] == [False, True] * 2 and set(C.read(out/C.FILE)) == {'detr', 'deformable_detr'}
    assert 'deformlit-train --model detr' in capsys.readouterr().out
    calls.clear()
    (out/'detr'/'resume.pt').write_text('')
    C.main(['--missing', '--models', 'detr', 'deformable_detr', 'dab_detr', '--out', str(out)])
    assert [o[0] for o in calls if o[0].startswith('--')] == ['--resume', '--model'] and calls[-1][1] == 'dab_detr'
    calls.clear()
    C.main(['--speed', '--models', 'detr', '--out', str(out)])
    found = C.read(out/C.FILE)['detr']['compile']
    assert len(calls) == 1 and '--compile' in calls[0] and calls[0][1] == '5' and found['faster'] == dict(train=2., valid=1.) and found['compiled'] == dict(train=204., valid=300.) and found['turns'] == 5

@pytest.mark.parametrize('args', [['--models', 'yolo'], ['--minutes', '0'], ['--minutes', 'nan'], ['--seconds', '-1'], ['--epochs', '3']])
def test_bad_options(args, capsys, calls):
    with pytest.raises(SystemExit) as e: C.main(args)
    assert e.value.code == 2 and args[0] in capsys.readouterr().err and not calls

@pytest.mark.slow
def test_it_trains(tmp_path):
    "For real, for some seconds."
    r = subprocess.run([sys.executable, C.__file__, '--models', 'detr', 'deformable_detr', '--minutes', '.1', '--threads', '1', '--out', str(tmp_path)], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    c = Comparison(folder=tmp_path)
    assert set(c.runs) == {'detr', 'deformable_detr'} and c.model('detr')[1] == 'trained' and re.search('DETR +0.0', shown(c.table()))
