#!/bin/sh
# Makes the environment .venv of this checkout and installs the project into it, editable.
#   docs/scripts/setup.sh run    what training needs
#   docs/scripts/setup.sh all    with notebooks, tests and site: the extras of pyproject.toml
# The Makefile calls it when its stamp, .venv/ready-run or .venv/ready-all, is older than pyproject.toml or setup.py.
# A failure says in one sentence what is missing.
set -u
cd "$(dirname "$0")/../.." || exit 1
log=.venv/setup.log
note() { printf 'set-up: %s\n' "$*"; }
fail() { printf '\nset-up failed: %s\n' "$*" >&2; exit 1; }
in_range='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'

# ---- Python. Some names on the path are shims that do not run, so each is tried.
find_python() {
    if [ -n "${PYTHON:-}" ]; then set -- "$PYTHON"; else set -- python3 python3.13 python3.12 python3.11; fi
    for python in "$@"; do
        if "$python" -c "$in_range" >/dev/null 2>&1; then return 0; fi
    done
    if [ -n "${PYTHON:-}" ]; then fail "PYTHON=$PYTHON is not a Python 3.11, 3.12 or 3.13 that runs."; fi
    fail "no Python 3.11, 3.12 or 3.13 was found on the PATH; install one, or name it: make PYTHON=/path/to/python3.12 ..."
}

usable() { .venv/bin/python -c "$in_range" && .venv/bin/python -m pip --version; }
if ! usable >/dev/null 2>&1; then
    find_python
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        fail "$python has no venv module with pip; install it (Debian and Ubuntu: the package python3-venv)."
    note "making .venv with $("$python" --version)"
    "$python" -m venv --clear .venv || fail "the folder .venv could not be made; the line above says why."
fi
command -v "${CXX:-g++}" >/dev/null 2>&1 || command -v clang++ >/dev/null 2>&1 ||
    note "no C++ compiler (g++) was found: everything works, but the native ops cannot be built, and the slower ways run instead."

# ---- The packages. pip's log tells the common failures apart.
explain() {
    said() { grep -Eq "$1" "$log" 2>/dev/null; }
    said 'No space left on device' && fail "the disk is full; torch and its libraries need several GB."
    said "command '[^']*(gcc|cc|g\+\+)' failed|unable to execute '?(gcc|cc)|Python\.h: No such file" &&
        fail "a package has to be compiled and no working C compiler was found; install gcc and Python's headers (Debian and Ubuntu: gcc python3-dev)."
    said 'Failed to establish a new connection|NewConnectionError|name resolution|Network is unreachable|ConnectTimeout|ReadTimeout|ProxyError|SSLError|Max retries exceeded' &&
        fail "pip could not reach the package index; check the network, or pip's index and proxy settings, and run the command again."
    said 'No matching distribution found' &&
        fail "the package index offers no fitting version ($(grep -Eo "No matching distribution found for [^ ]*" "$log" | tail -1)); check that pip can reach it and that it has one for this Python and platform."
    said 'Permission denied' && fail "a file could not be written; $log says which."
    fail "pip could not install the packages; the reason stands above and in $log."
}
case "${1:-run}" in
    run) what=. ready=.venv/ready-run ;;
    all) what='.[dev,peers,docs]' ready='.venv/ready-run .venv/ready-all' ;;
    *) fail "there is no set of packages $1; it is run or all." ;;
esac
note "installing $what (the first time this fetches torch, several GB)"
rm -f "$log" .venv/installed
{ PYTHONUNBUFFERED=1 .venv/bin/python -m pip install --no-input --disable-pip-version-check --log "$log" -e "$what" && touch .venv/installed; } |
    grep --line-buffered -v "^Requirement already satisfied"
[ -e .venv/installed ] || explain

# ---- nbdev's git hooks and merge driver, with full paths so that git finds them when .venv is not activated.
hooks() {
    .venv/bin/nbdev-install-hooks >/dev/null &&
    git config --local merge.jupyternotebook.driver "'$PWD/.venv/bin/nbdev-merge' %O %A %B %P" &&
    git config --local diff.jupyternotebook.command "'$PWD/.venv/bin/nbdev-diff-driver'" &&
    printf '#!/bin/sh\n"%s/.venv/bin/nbdev-trust"\n' "$PWD" > .git/hooks/post-merge
}
if [ -d .git ] && [ -x .venv/bin/nbdev-install-hooks ] && command -v git >/dev/null 2>&1; then
    hooks || note "nbdev's git hooks could not be installed; everything else works."
fi
touch $ready || fail "the folder .venv cannot be written."
note "ready"
