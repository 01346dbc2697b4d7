#!/usr/bin/env bash
# The whole R1 pipeline on this machine: set up, cold start, GRPO, and what came out. Arguments override recipe keys:
#
#   bash scripts/quickstart.sh --seed 1 --grpo.steps 40
#
# Started again, it goes on with a run that was interrupted, and shows what came of one that is finished.
set -euo pipefail
case " $* " in *" --help "* | *" -h "*) sed -n '1d; s/^# \{0,1\}//p; /^set/q' "${BASH_SOURCE[0]}"; exit ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH" TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$PWD/.cache/torch_extensions}"
recipe=recipes/quickstart.yaml

folder=$(python -c 'from rl.train.launch import run_command; print(run_command("")[0].run_folder)' --config "$recipe" "$@")
if [ -f "$folder/summary.json" ]; then
    echo "[quickstart] $folder holds a finished run:"
    python - "$folder" <<'PY'
import json, pathlib, sys
from rl.train.report import closing_text
folder = pathlib.Path(sys.argv[1])
print(closing_text(json.loads((folder / "summary.json").read_text()), folder))
PY
    echo "[quickstart] to train again: add --seed 1 or --name again (another folder), or remove this one: rm -r $(printf %q "$folder")"
    exit
fi
if [ -d "$folder" ]; then echo "[quickstart] $folder holds an unfinished run: going on with it"; fi
resume() { if [ -d "$1/checkpoints" ]; then echo --resume; fi; }

# DeepSpeed ZeRO-2 on two processes where there are two cores and its CPU op could be compiled, else one plain process.
# The numbers are the same to rounding; the time differs by less than a tenth on one process.
cores=$(python -c 'import os; print(os.cpu_count() or 1)')
if [ "$cores" -ge 2 ] && find "$TORCH_EXTENSIONS_DIR" -name 'deepspeed_shm_comm*.so' 2>/dev/null | grep -q .; then
    launch=(accelerate launch --config_file recipes/accelerate_configs/zero2.yaml --num_processes 2)
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
else
    launch=(accelerate launch --config_file recipes/accelerate_configs/cpu.yaml)
fi
if ! command -v nvidia-smi >/dev/null 2>&1; then export DS_ACCELERATOR=cpu; fi
echo "[quickstart] launching with: ${launch[*]}"
if [ ! -d "$folder/cold_start/policy" ]; then
    echo "[quickstart] 1/2 cold start: imitate traces, most of which guess"
    "${launch[@]}" scripts/sft.py --config "$recipe" "$@" $(resume "$folder/cold_start")
fi
echo "[quickstart] 2/2 GRPO: find out that reasoning to the end pays"
"${launch[@]}" scripts/grpo.py --config "$recipe" "$@" $(resume "$folder")
cat <<'TEXT'

What to try next:
  bash scripts/quickstart.sh --seed 1                 another seed
  bash scripts/quickstart.sh --grpo.loss_type gspo --name gspo
  source .venv/bin/activate && accelerate launch --config_file recipes/accelerate_configs/cpu.yaml scripts/grpo.py --config recipes/gsm8k/tiny_cpu.yaml
  your own reward function: rewards/README.md         your own data: README.md, "Using your data"
TEXT
