# Sourced by the scripts beside it: the places they write to, and how they speak. Everything stays inside the clone,
# except pip's own cache.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
venv=${VENV:-.venv}
case $venv in /*) ;; *) venv=$root/$venv ;; esac
py=$venv/bin/python

mkdir -p build/tmp build/link
[ build/link/undertow -ef . ] || ln -sfn ../.. build/link/undertow # for tools that follow `import undertow` by path
# A Unix socket's path must stay under 108 bytes and tests put sockets below TMPDIR: a very deep clone keeps the system's.
if [ ${#root} -le 50 ]; then export TMPDIR=$root/build/tmp; fi
export MPLCONFIGDIR=$root/build/matplotlib TORCH_EXTENSIONS_DIR=$root/build/torch_extensions
export TRITON_CACHE_DIR=$root/build/triton PIP_DISABLE_PIP_VERSION_CHECK=1
# Where Python may not write bytecode beside the sources, as in many containers, each process would compile torch anew.
if [ -n "${PYTHONDONTWRITEBYTECODE:-}" ]; then
    unset PYTHONDONTWRITEBYTECODE
    export PYTHONPYCACHEPREFIX=${PYTHONPYCACHEPREFIX:-$root/build/bytecode}
fi

say() { printf 'undertow: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }
