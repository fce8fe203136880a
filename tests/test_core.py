"Checks, errors and the choice of a backend: what is slow, or too dull for the page."
import importlib.util, os, pickle, subprocess, sys, time, timeit, warnings
import numpy as np, pytest, torch
from deformlit import core
from deformlit.core import *

@pytest.fixture
def op():
    "A fresh op; the registry is put back afterwards."
    ops, said = dict(core._ops), set(core._said)
    o = Op('test_op', auto=('native', 'compiled', 'eager'))
    def plain(x, a): return x * a
    o.way('loop')(lambda x, a: x * a + 0)
    o.way('eager')(plain)
    yield o
    core._ops.clear(); core._ops.update(ops); core._said.clear(); core._said.update(said)
    assert not core._forced

def test_error_has_fields_and_pickles():
    e = ArgumentError('points', 'this', 'that')
    f = pickle.loads(pickle.dumps(e))
    assert (f.argument, f.got, f.expected) == ('points', 'this', 'that') and str(f) == str(e) == '`points`: expected that, got this'
    assert isinstance(e, ValueError) and str(ArgumentError('all of it')) == 'all of it'

class Bad(torch.utils.data.Dataset):
    def __len__(self): return 1
    def __getitem__(self, i): raise ArgumentError('labels', 'int 12', 'labels below 10')

def test_error_comes_back_from_a_worker():
    with pytest.raises(ArgumentError, match='labels below 10'):
        list(torch.utils.data.DataLoader(Bad(), num_workers=1))

@pytest.mark.parametrize('x,words', [(torch.zeros(2, 3), 'float32 tensor of shape (2, 3)'), (np.zeros((2, 3)), 'float64 ndarray of shape (2, 3)'),
    (3, 'int 3'), (None, 'NoneType None'), ('a\nb', r"str 'a\nb'"), (torch.zeros(1, device='meta'), 'float32 tensor of shape (1,) on meta')])
def test_describe(x, words): assert describe(x) == words

def test_describe_is_short(): assert len(describe('x' * 1000)) < 100

@pytest.mark.parametrize('shape,pattern,sizes,ok', [((2, 3), 'q c', {}, True), ((2, 3), 'q 3', {}, True), ((2, 3), 'q 4', {}, False), ((2, 3), 'q c', dict(c=4), False),
    ((2, 2), 'h h', {}, True), ((2, 3), 'h h', {}, False), ((2, 3), 'q', {}, False), ((0, 3), 'q c', {}, True), ((), '', {}, True), ((2, 3), 'x argument', {}, True)])
def test_check_shape(shape, pattern, sizes, ok):
    x = torch.zeros(shape)
    if ok: assert check_shape('x', x, pattern, **sizes) == {**sizes, **{o: n for o, n in zip(pattern.split(), shape) if not o.isdigit()}}
    else:
        with pytest.raises(ArgumentError, match='`x`: expected shape'): check_shape('x', x, pattern, **sizes)

def test_check_shape_wants_a_tensor():
    with pytest.raises(ArgumentError, match='a tensor, got list'): check_shape('x', [1, 2], 'q c')

def test_fails_fails():
    with pytest.raises(AssertionError, match='nothing failed'):
        with fails(ValueError): pass
    with pytest.raises(AssertionError, match='is not in'):
        with fails(ValueError, 'this'): raise ValueError('that')
    with pytest.raises(KeyError):
        with fails(ValueError): raise KeyError('other')

def test_checks_are_cheap():
    x = torch.zeros(2, 3, 4, 5, 6, 2)
    def best(f): return min(_time(f) for _ in range(5))
    def _time(f):
        start = time.perf_counter()
        for _ in range(1000): f()
        return (time.perf_counter() - start) / 1000
    assert best(lambda: check(True, 'x', x, 'anything')) < 3e-6
    assert best(lambda: check_shape('x', x, 'b q n l k 2', b=2)) < 15e-6

def test_order_and_reasons(op):
    op.way('native', needs=lambda: 'not built')(lambda x, a: x * a)
    op.way('compiled', fits=lambda x, a: None if x.is_floating_point() else 'floats only')(lambda x, a: x * a)
    assert op.plan() == ('compiled', "no 'native': not built")
    assert op.plan(torch.ones(2), 2) == ('compiled', "no 'native': not built")
    assert op.plan(torch.ones(2, dtype=torch.long), 2) == ('eager', "no 'native': not built; no 'compiled': floats only")
    assert op.why_not('loop') is None and op.why_not('compiled', torch.ones(2, dtype=torch.long), 2) == 'floats only'

def test_warns_once(op):
    op.way('native', needs=lambda: 'not built')(lambda x, a: x * a)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        for _ in range(3): op(torch.ones(2), 2)
    assert [o.category for o in said] == [BackendWarning] and "test_op runs as 'eager'" in str(said[0].message) and said[0].filename == __file__

def test_unwritten_ways_are_no_complaint(op):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        op(torch.ones(2), 2)
    assert op.ran == 'eager' and op.plan() == ('eager', '') and backends('test_op')['test_op']['native'] == 'not written for this op'

def test_needs_is_asked_once_and_by_backends(op):
    asked = []
    op.way('native', needs=lambda: asked.append(1) or (None if len(asked) > 1 else 'not yet'))(lambda x, a: x * a)
    core._said.add(('test_op', 'eager'))
    for _ in range(3): op(torch.ones(2), 2)
    assert len(asked) == 1 and op.ran == 'eager'
    assert backends('test_op').plans['test_op'] == ('native', '') and len(asked) == 2
    op(torch.ones(2), 2)
    assert op.ran == 'native' and len(asked) == 2

@pytest.fixture
def late(monkeypatch):
    "A module of the package that registers a native way when it is imported."
    name = 'deformlit.late_kernel'
    class Finder:
        def find_spec(self, full, path=None, target=None):
            return importlib.util.spec_from_loader(full, self) if full == name else None
        def create_module(self, spec): return None
        def exec_module(self, module): self.run()
    finder = Finder()
    finder.loaded = lambda: name in sys.modules
    monkeypatch.setattr(sys, 'meta_path', [finder, *sys.meta_path])
    yield finder
    sys.modules.pop(name, None)

@pytest.mark.parametrize('how', ['call', 'force', 'backends', 'compile'])
def test_native_module_is_imported_when_asked_about(op, late, how):
    op = Op('test_late', auto=('native', 'eager'), native='late_kernel')
    op.way('eager')(lambda x: x + 0)
    late.run = lambda: op.way('native')(lambda x: x * 1)
    assert not late.loaded()
    x = torch.ones(2)
    if how == 'call': op(x)
    if how == 'force':
        with backend('native'): op(x)
    if how == 'backends': assert backends()['test_late']['native'] == 'can run'
    if how == 'compile':
        torch._dynamo.reset()
        f = torch.compile(lambda x: op(x) + op(x), backend='eager', fullgraph=True)
        for _ in range(2): f(x)
    assert late.loaded() and (op.ran == 'native' or how == 'backends')

def test_native_module_missing_or_broken(op, late):
    absent = Op('test_absent', auto=('native', 'eager'), native='nobody_wrote_it')
    absent.way('eager')(lambda x: x)
    absent(1)
    assert absent.ran == 'eager' and absent.why_not('native') == 'not written for this op'
    broken = Op('test_broken', auto=('native', 'eager'), native='late_kernel')
    broken.way('eager')(lambda x: x)
    def run(): import no_such_module_of_others
    late.run = run
    with pytest.raises(ModuleNotFoundError, match='no_such_module_of_others'): broken(1)

@pytest.mark.parametrize('how', [None, 'eager'])
def test_order_by_arguments(op, how):
    op.auto = lambda x=None, a=None: ('loop', 'eager') if x is not None and x.shape[0] < 3 else ('eager', 'loop')
    torch._dynamo.reset()
    f = torch.compile(lambda x: op(x, 2), backend=how, fullgraph=True, dynamic=False) if how else lambda x: op(x, 2)
    f(torch.ones(2)); assert op.ran == 'loop'
    f(torch.ones(5)); assert op.ran == 'eager'
    assert op.plan() == ('eager', '') and backends('test_op', torch.ones(2), 2).plans['test_op'] == ('loop', '')
    assert backends('test_op', torch.ones(2), 2).orders['test_op'] == ('loop', 'eager') and 'loop, eager' in repr(backends('test_op', torch.ones(2), 2))

def test_ranking(monkeypatch, tmp_path):
    monkeypatch.setattr(core, 'files', lambda package: tmp_path)
    core._choices.cache_clear()
    assert ranking('op', 'cpu forward 1e3', ('native', 'eager')) == ('native', 'eager')
    core._choices.cache_clear()
    (tmp_path/'choices.json').write_text('{"op": {"cpu forward 1e3": ["compiled", "eager"]}}')
    assert ranking('op', 'cpu forward 1e3', ('native', 'eager')) == ('compiled', 'eager', 'native')
    (tmp_path/'choices.json').unlink()   # read once
    assert ranking('op', 'cpu forward 1e3', ('native', 'eager')) == ('compiled', 'eager', 'native')
    assert ranking('op', 'cpu forward 1e4', ('eager',)) == ranking('nobody', 'cpu forward 1e3', ('eager',)) == ('eager',)
    f = torch.compile(lambda x: x + len(ranking('op', 'cpu forward 1e3', ('native',))), backend='eager', fullgraph=True)
    assert_close(f(torch.zeros(1)), torch.full((1,), 3.))
    core._choices.cache_clear()

def test_a_call_is_cheap(op):
    op.way('native')(lambda x, a: x)
    x = torch.ones(2)
    op(x, 2)
    assert min(timeit.repeat(lambda: op(x, 2), number=2000, repeat=15)) / 2000 < 8e-6   # about one; other work may run beside it

def test_debug_by_environment():
    for value, on in (('1', True), ('0', False), ('', False)):
        r = subprocess.run([sys.executable, '-c', 'from deformlit.core import debugging; print(debugging())'], env={**os.environ, 'DEFORMLIT_DEBUG': value}, capture_output=True, text=True)
        assert r.stdout.strip() == str(on), r.stderr

def test_debug_nests_and_ends():
    with debug():
        with debug(False): assert not debugging()
        assert debugging()
    with pytest.raises(ZeroDivisionError), debug(): 1 / 0
    assert not debugging()

def test_check_values():
    x = torch.ones(2, 3, 2)
    check_values('x', x, 'q k 2')
    check_values('x', x[:0], 'q k 2')
    x[1, 2, 0] = x[1, 1, 1] = float('nan')
    with pytest.raises(ArgumentError, match=r'`x`: expected finite numbers, got x\[q=1, k=1\] = 1, nan, the first of 2 such'): check_values('x', x.requires_grad_(), 'q k 2')
    with pytest.raises(ArgumentError, match=r'expected small ones, got y\[q=0\] = 5, the first of 1 such'): check_values('y', torch.tensor([5, 1]), 'q', torch.tensor([True, False]), 'small ones')

def test_has_values():
    x = torch.ones(2)
    assert has_values(x, torch.nn.Parameter(x)) and not has_values(x, x.to('meta'))
    seen = []
    def f(x): seen.append(has_values(x)); return x * 2
    torch.func.vmap(f)(x); torch.func.grad(lambda x: f(x).sum())(x); torch.jit.trace(f, x, check_trace=False); torch.fx.experimental.proxy_tensor.make_fx(f)(x)
    torch._dynamo.reset()
    torch.compile(f, backend='eager')(x)
    with torch._subclasses.FakeTensorMode() as mode: fake = mode.from_tensor(x); f(fake)
    f(fake)
    assert not any(seen) and len(seen) >= 7

def test_first_way_is_silent(op):
    op.way('native')(lambda x, a: x * a)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        op(torch.ones(2), 2)
    assert op.ran == 'native'

def test_none_can_run(op):
    op.auto = 'native',
    with pytest.raises(BackendError, match='not written for this op'): op(torch.ones(2), 2)
    assert 'none: no' in repr(backends('test_op'))

def test_forcing_nests_and_names_ops(op):
    other, x = Op('test_other'), torch.ones(2)
    other.way('eager')(lambda x: x)
    with backend('eager'):
        with backend('loop', 'test_op'):
            op(x, 2); other(x)
            assert (op.ran, other.ran) == ('loop', 'eager')
        op(x, 2)
        assert op.ran == 'eager'
    with pytest.raises(ZeroDivisionError), backend('loop'): 1 / 0
    assert not core._forced
    with pytest.raises(ArgumentError, match='nobody'), backend('loop', 'nobody'): pass

def test_backends_is_a_dictionary_and_two_tables(op):
    b = backends('test_op')
    assert list(b) == ['test_op'] and b['test_op'] == dict(loop='can run', eager='can run', compiled='not written for this op', native='not written for this op')
    assert 'test_op' in repr(b) and b._repr_markdown_().startswith('| op | loop |') and 'test_op' in backends()
    with pytest.raises(ArgumentError, match='`op`'): backends('nobody')

@pytest.mark.parametrize('how', ['eager', 'aot_eager'])
@pytest.mark.parametrize('dynamic', [None, True])
def test_dispatch_and_checks_inside_compile(op, how, dynamic):
    asked = []
    def needs(): asked.append(open(__file__).close()); return 'not built'      # nothing that could be traced
    op.way('native', needs=needs)(lambda x, a: x * a)
    op.way('compiled', fits=lambda x, a: None if x.dtype == torch.float32 else 'float32 only')(compile_lazily(lambda x, a: x * a, backend='eager'))
    def f(x, w):
        sizes = check_shape('x', x, 'q c')
        check_shape('w', w, 'c', c=sizes['c'])
        check(x.shape[1] % 2 == 0, 'x', x, f"an even number of channels, not {sizes['c']}")
        check_float('w', w)
        check_same_device(x=x, w=w)
        return op(x, w) + 1
    torch._dynamo.reset()
    g, w = torch.compile(f, backend=how, fullgraph=True, dynamic=dynamic), torch.arange(4.)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        for q in (3, 5, 7): assert_close(g(torch.ones(q, 4), w), w.expand(q, 4) + 1)
    assert op.ran == 'compiled' and asked and len([o for o in said if o.category is BackendWarning]) == 1
    g(torch.ones(3, 4, dtype=torch.float64), w); assert op.ran == 'eager'
    with backend('loop'): g(torch.ones(3, 4), w)
    assert op.ran == 'loop'
    g(torch.ones(3, 4), w); assert op.ran == 'compiled'
    for bad in (lambda: g(torch.ones(3, 6), w), lambda: _forced(g, w)):
        with pytest.raises(Exception): bad()

def _forced(g, w):
    with backend('native'): g(torch.ones(3, 4), w)

def test_errors_keep_their_type_in_a_compiled_model_with_breaks(op):
    def f(x):
        check_shape('x', x, 'q 4')
        return op(x, 2)
    torch._dynamo.reset()
    with pytest.raises(ArgumentError, match='`x`'): torch.compile(f, backend='eager')(torch.ones(3, 5))

@pytest.mark.parametrize('strict', [False, True])
@pytest.mark.filterwarnings('ignore')
def test_exports(op, strict):
    class Model(torch.nn.Module):
        def forward(self, x): return op(x, 2)
    torch._dynamo.reset()
    x = torch.ones(3, 4)
    assert_close(torch.export.export(Model(), (x,), strict=strict).module()(x), 2 * x)

def test_compile_lazily_waits():
    calls = []
    def f(x): calls.append(1); return x + 1
    g = compile_lazily(f, backend='eager')
    assert not calls and g.__name__ == 'f'
    assert_close(g(torch.ones(2)), torch.full((2,), 2.))

def test_needs_compiler_says_what_is_missing(monkeypatch):
    monkeypatch.setenv('CXX', 'no-such-compiler')
    needs_compiler.cache_clear()
    assert 'no-such-compiler' in needs_compiler()
    needs_compiler.cache_clear()
