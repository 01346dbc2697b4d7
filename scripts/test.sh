#!/usr/bin/env bash
# Set up with the dev extra, lint, type-check, then run the whole test suite. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh --dev
export PATH="$PWD/.venv/bin:$PATH" TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$PWD/.cache/torch_extensions}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" WANDB_MODE=offline HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
echo "[test] ruff"
ruff check .
echo "[test] mypy"
mypy
echo "[test] pytest"
exec python -m pytest -n "${AHA_TEST_WORKERS:-2}" --dist loadgroup "$@"
