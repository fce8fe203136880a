"""What all tests share: one thread each (two tests run at a time), the same random examples in every run, notebooks first."""
import os
for o in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS'): os.environ.setdefault(o, '1')
os.environ.setdefault('MPLBACKEND', 'agg')

import pytest

try:
    from hypothesis import settings
    settings.register_profile('deformlit', deadline=None, derandomize=True)
    settings.load_profile('deformlit')
except ImportError: pass

def pytest_collection_modifyitems(items):
    "The longest first, so that two processes end at about the same time."
    items.sort(key=lambda o: 'test_outputs' not in o.nodeid)

@pytest.fixture
def tell(record_property):
    "`tell('30 cases of 12 files')` shows a line in the summary at the end of the run."
    return lambda line: record_property('tell', line)

def pytest_terminal_summary(terminalreporter):
    lines = [v for reports in terminalreporter.stats.values() for r in reports
             if getattr(r, 'when', '') == 'call' for k, v in r.user_properties if k == 'tell']
    if lines: terminalreporter.section('told by the tests')
    for line in lines: terminalreporter.line(line)
