#!/bin/bash
# Cold start, Qwen2.5-Omni-3B, two GPUs of one node. Submit from the repository's root; submit again to continue.
#   sbatch slurm/sft_3b.sh model.path=FOLDER data.manifest=FILE [key=value ...]
#SBATCH --job-name=sft_3b
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=2
#SBATCH --gpus-per-node=2
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
: "${SLURM_SUBMIT_DIR:?submit this with sbatch, from the root of the repository}"
source "${AVATAR_SNAPSHOT:-$(readlink -e "$SLURM_SUBMIT_DIR/.jobs/$SLURM_JOB_ID" || echo "$SLURM_SUBMIT_DIR")}/slurm/common.sh"
train recipe=sft_3b "$@"
