#!/bin/bash
# GRPO, Qwen3-Omni-30B-A3B, LoRA, four GPUs of a node. Submit from the repository's root; submit again to continue.
#   sbatch slurm/grpo_omni3_lora.sh model.path=FOLDER data.manifest=FILE [key=value ...]
#SBATCH --job-name=grpo_omni3_lora
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gres=gpu:4
#SBATCH --cpus-per-task=12
#SBATCH --mem=110G
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
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
train recipe=grpo_omni3_lora "$@"
