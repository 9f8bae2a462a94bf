#!/bin/bash
# A tiny recipe as a job of CPU tasks, the demo's cold start unless recipe= says otherwise, to try a cluster without GPUs.
#   make demo && sbatch slurm/tiny.sh data.manifest=runs/demo/data/manifest.jsonl [key=value ...]
#SBATCH --job-name=tiny_sft
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=2
#SBATCH --cpus-per-task=2
#SBATCH --mem=10G
#SBATCH --time=00:30:00
#SBATCH --signal=USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
[[ ! -e "$(dirname "$0")/submit.sh" ]] || exec bash "$(dirname "$0")/submit.sh" "$0" "$@" # typed, not Slurm's copy
: "${SLURM_SUBMIT_DIR:?submit this with sbatch}"
# Slurm runs a copy of this file; the rest lies in the run's snapshot, or in the checkout that it was submitted from.
code=${AVATAR_SNAPSHOT:-$(readlink -e "$SLURM_SUBMIT_DIR/.jobs/$SLURM_JOB_ID" ||
  scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\(.*\)/slurm/[^/]*\.sh.*|\1|p')}
source "${code:=$SLURM_SUBMIT_DIR}/slurm/common.sh" || {
  echo "error: $code is no checkout: submit the script in it, not a copy of it" >&2
  exit 2
}
[[ " $* " == *" recipe="* ]] || set -- recipe=tiny_sft "$@"
train "$@"
