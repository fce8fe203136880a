"""What all tests share: one thread each (two tests run at a time), the same random examples in every run, notebooks first."""
import os
for o in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS'): os.environ.setdefault(o, '1')
os.environ.setdefault('MPLBACKEND', 'agg')

import pytest
from parity import parity, store     # noqa: a fixture

try:
    from hypothesis import settings
    settings.register_profile('deformlit', deadline=None, derandomize=True)
    settings.load_profile('deformlit')
except ImportError: pass

def pytest_addoption(parser):
    parser.addoption('--parity', metavar='FOLDER', help='run only what compares with other code, and write down in FOLDER how it compares')

def pytest_collection_modifyitems(config, items):
    "The longest first, so that two processes end at about the same time."
    if config.getoption('--parity'):
        config.hook.pytest_deselected(items=[o for o in items if 'parity' not in o.fixturenames])
        items[:] = [o for o in items if 'parity' in o.fixturenames]
    items.sort(key=lambda o: 'test_outputs' not in o.nodeid)

def pytest_sessionfinish(session):
    folder = session.config.getoption('--parity')
    if not folder or hasattr(session.config, 'workerinput'): return      # a worker's reports go to the process that started it
    stats = session.config.pluginmanager.get_plugin('terminalreporter').stats
    session.config.parity_wrong = ['a test failed: nothing is written'] if session.exitstatus else store(folder, [r for r in stats.get('passed', []) if r.when == 'call'])
    if session.config.parity_wrong: session.exitstatus = 1

@pytest.fixture
def tell(record_property):
    "`tell('30 cases of 12 files')` shows a line in the summary at the end of the run."
    return lambda line: record_property('tell', line)

def pytest_terminal_summary(terminalreporter, config):
    lines = [v for reports in terminalreporter.stats.values() for r in reports
             if getattr(r, 'when', '') == 'call' for k, v in r.user_properties if k == 'tell']
    lines += getattr(config, 'parity_wrong', [])
    if lines: terminalreporter.section('told by the tests')
    for line in lines: terminalreporter.line(line)
