#!/bin/bash
# GRPO, Qwen2.5-VL-7B (mathematics), four GPUs of one node. Submit from the repository's root; submit again to continue.
#   sbatch slurm/grpo_vl_7b.sh model.path=FOLDER data.manifest=FILE [key=value ...]
#SBATCH --job-name=grpo_vl_7b
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
: "${SLURM_SUBMIT_DIR:?submit this with sbatch, from the root of the repository}"
source "${AVATAR_SNAPSHOT:-$(readlink -e "$SLURM_SUBMIT_DIR/.jobs/$SLURM_JOB_ID" || echo "$SLURM_SUBMIT_DIR")}/slurm/common.sh"
train recipe=grpo_vl_7b "$@"
