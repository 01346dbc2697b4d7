#!/usr/bin/env bash
# The whole R1 pipeline on this machine: set up, cold start, GRPO, and what came out. Arguments override recipe keys:
#
#   bash scripts/quickstart.sh --seed 1 --grpo.steps 60
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH" TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$PWD/.cache/torch_extensions}"
recipe=recipes/quickstart.yaml

# DeepSpeed ZeRO-2 on two processes where there are two cores and its CPU op could be compiled, else one plain process.
# The numbers are the same to rounding; the time differs by less than a tenth on one process.
cores=$(.venv/bin/python -c 'import os; print(os.cpu_count() or 1)')
if [ "$cores" -ge 2 ] && find "$TORCH_EXTENSIONS_DIR" -name 'deepspeed_shm_comm*.so' 2>/dev/null | grep -q .; then
    launch=(accelerate launch --config_file recipes/accelerate_configs/zero2.yaml --num_processes 2)
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
else
    launch=(accelerate launch --config_file recipes/accelerate_configs/cpu.yaml)
fi
if ! command -v nvidia-smi >/dev/null 2>&1; then export DS_ACCELERATOR=cpu; fi
echo "[quickstart] launching with: ${launch[*]}"
echo "[quickstart] 1/2 cold start: imitate traces, most of which guess"
"${launch[@]}" scripts/sft.py --config "$recipe" "$@"
echo "[quickstart] 2/2 GRPO: find out that reasoning to the end pays"
"${launch[@]}" scripts/grpo.py --config "$recipe" "$@"
cat <<'TEXT'

What to try next:
  bash scripts/quickstart.sh --seed 1                 another seed
  bash scripts/quickstart.sh --grpo.loss_type gspo --name gspo
  accelerate launch --config_file recipes/accelerate_configs/cpu.yaml scripts/grpo.py --config recipes/gsm8k/tiny_cpu.yaml
  your own reward function: rewards/README.md         your own data: README.md, "Using your data"
TEXT
