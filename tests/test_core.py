"Checks, errors and the choice of a backend: what is slow, or too dull for the page."
import pickle, time, warnings
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
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        for _ in range(3): op(torch.ones(2), 2)
    assert [o.category for o in said] == [BackendWarning] and "test_op runs as 'eager'" in str(said[0].message) and said[0].filename == __file__

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
