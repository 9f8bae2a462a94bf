#!/bin/bash
# A model on benchmarks, a task of the array for each; submit the same again to continue.
#   bash slurm/eval.sh model=FOLDER data=FOLDER [benchmarks=worldsense,omnibench] [--array=0-3%2] [key=value ...]
# model: a Hugging Face folder, or a run (its newest checkpoint, or step=N). data: a folder with one folder a benchmark, as
# `python -m eval.run --benchmarks` fetches them; benchmarks: those that are there, unless named. out=FOLDER (runs/eval).
# Other words go to eval.run; recipe=avatar_7b unless model is a run. It checks, and submits itself as an array.
#SBATCH --job-name=avatar-eval
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gres=gpu:4
#SBATCH --cpus-per-task=12
#SBATCH --mem=60G
#SBATCH --time=08:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%A_%a.out
[[ ! -e "$(dirname "$0")/eval_array.py" ]] || { # typed, not Slurm's copy
  code=$(cd "$(dirname "$0")/.." && pwd)
  echo "checking the settings ..." >&2
  exec "${PYTHON:-$code/.venv/bin/python}" "$code/slurm/eval_array.py" submit "$code/slurm/eval.sh" "$@"
}
set -euo pipefail
: "${SLURM_ARRAY_TASK_ID:?submit this by typing: bash slurm/eval.sh model=FOLDER data=FOLDER}"
cd "$SLURM_SUBMIT_DIR"
# Slurm runs a copy of this file; the checkout is where it was submitted from.
code=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\(.*\)/slurm/[^/]*\.sh.*|\1|p' | head -n 1)
code=${code:-$PWD}
python=${PYTHON:-$code/.venv/bin/python} status=0
command -v "$python" >/dev/null || {
  echo "error: $python is missing on $(uname -n): run 'make doctor' in the checkout, or export PYTHON=FILE" >&2
  exit 2
}
settings=$("$python" "$code/slurm/eval_array.py" task "$@")
eval "$settings"
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}" SLURM_EXPORT_ENV=ALL SLURM_WAIT="${SLURM_WAIT:-300}"
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR="${master//\{node\}/$MASTER_ADDR}" MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
trap : USR1 USR2 TERM # the tasks get these too, and leave with what is answered kept
srun --kill-on-bad-exit=1 --ntasks-per-node="$SLURM_NTASKS_PER_NODE" ${srun_options[@]+"${srun_options[@]}"} \
  "${command[@]}" -m eval.run "${words[@]}" || status=$?
(trap '' USR1 USR2 TERM && exec "$python" "$code/slurm/eval_array.py" end "$status") # over, or to be continued
