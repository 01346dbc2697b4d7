#!/usr/bin/env bash
# Make the environment in .venv, once: pinned versions, torch first, then everything else, then this project (editable).
#
#   bash scripts/setup.sh          what a run needs
#   bash scripts/setup.sh --dev    and what the tests need
#
# PYTHON=/path/to/python3.12 picks the interpreter (3.11 or newer). On Linux without a GPU, set
# TORCH_INDEX=https://download.pytorch.org/whl/cpu to get the small CPU build of torch instead of the CUDA one.
# Nothing is installed again while pyproject.toml and scripts/constraints.txt stay the same.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
case "$*" in
    "") extra="" ;;
    --dev) extra="[dev]" ;;
    *) echo "setup: '$*' is not allowed; --dev, or nothing" >&2; exit 2 ;;
esac

say() { printf '\033[1m[setup]\033[0m %s\n' "$*"; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3.11 python3.12 python3.13 python3; do
        if command -v "$candidate" >/dev/null 2>&1 &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "setup: Python 3.11 or newer is needed; name it with PYTHON=/path/to/python3.11" >&2
    return 1
}

# DeepSpeed compiles a small C++ communication op at its first start on CPU. Doing it here keeps the first run from
# looking stuck; a private folder keeps a half-built op of another project from blocking us.
compile_cpu_op() {
    if ! command -v g++ >/dev/null 2>&1; then
        say "no C++ compiler (g++) found: DeepSpeed on CPU needs one (Debian/Ubuntu: apt-get install g++)"
        return 0
    fi
    say "compiling DeepSpeed's CPU communication op (up to 2 minutes, once)"
    rm -rf "$root/.cache/torch_extensions"
    TORCH_EXTENSIONS_DIR="$root/.cache/torch_extensions" PATH="$root/.venv/bin:$PATH" .venv/bin/python - <<'PY' || say "the op did not compile; runs fall back to plain gloo"
import torch
if not torch.cuda.is_available():
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
    ShareMemCommBuilder().load(verbose=False)
PY
}

stamp=$(cat pyproject.toml scripts/constraints.txt | cksum | cut -d' ' -f1)
wanted="$stamp$extra"
have=$(cat .venv/.aha-installed 2>/dev/null || true)
if [ "$have" = "$wanted" ] || [ "$have" = "${stamp}[dev]" ]; then
    say "environment is up to date (.venv)"
    exit 0
fi

# Asked of pip: where Debian's python3-venv is missing, an environment is left behind that has none.
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    say "creating .venv with $("$python" --version)"
    "$python" -m venv .venv
fi
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }
say "installing pinned packages (a few minutes the first time)"
pip install -q --upgrade -c scripts/constraints.txt pip setuptools wheel ninja
# An extra index, since torch's own does not hold the pinned versions of what torch needs; its builds win by their names
# (2.13.0+cpu is newer than 2.13.0).
pip install -q -c scripts/constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} torch
# deepspeed builds from source and must see the torch that is already there, so no build isolation.
pip install -q --no-build-isolation -c scripts/constraints.txt -e ".$extra"
compile_cpu_op
if ! command -v bwrap >/dev/null 2>&1; then
    say "bubblewrap is not installed: the code reward needs it to isolate model-written programs (apt-get install bubblewrap)"
fi
echo "$wanted" > .venv/.aha-installed
say "done"
