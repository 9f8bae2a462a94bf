#!/bin/bash
# A dataset prepared by a job array: each task does its share of the rows, the last one merges. Submit the same again
# to continue; array counts from 0 and stays the same:
#   sbatch [--array=0-63] slurm/prepare.sh source=avatar_rl input=FOLDER out=FOLDER model=HF_FOLDER [key=value ...]
#SBATCH --job-name=avatar-prepare
#SBATCH --array=0-15
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=32G
#SBATCH --time=12:00:00
#SBATCH --signal=USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%A_%a.out
# PYTHON in the environment names another interpreter than the repository's .venv.
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
# Slurm runs a copy of this file; the checkout is where it was submitted from.
code=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\(.*\)/slurm/[^/]*\.sh.*|\1|p' | head -n 1)
code=${code:-$PWD}
python=${PYTHON:-$code/.venv/bin/python} status=0
command -v "$python" >/dev/null || {
  echo "error: $python is missing on $(uname -n): run 'make doctor' in the checkout, or export PYTHON=FILE" >&2
  exit 2
}
export OMP_NUM_THREADS=1 SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}" SLURM_EXPORT_ENV=ALL PYTHONPATH="$code"
srun "$python" -m data_tools.prepare "$@" || status=$?
# 75: stopped by Slurm's notice with what is done kept.
[[ "$status" != 75 ]] || "$python" -m megatron_avatar.resilience.queue || true
exit "$status"
