#!/bin/bash
# Sourced by the recipe scripts, whose own $0 is Slurm's spooled copy: everything is found from SLURM_SUBMIT_DIR.
# PYTHON in the environment names another interpreter than the repository's .venv (a container's, say).
set -euo pipefail

# train [key=value ...]: one training process for every task of the job.
train() {
  cd "$SLURM_SUBMIT_DIR"
  local python="${PYTHON:-.venv/bin/python}" hosts
  command -v "$python" >/dev/null || {
    echo "error: $python is missing in $SLURM_SUBMIT_DIR: run 'make doctor' there, or export PYTHON=FILE" >&2
    return 2
  }

  hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
  export MASTER_ADDR="${hosts%%$'\n'*}"
  export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000)) # two jobs on one node must not meet
  # torch would try for minutes to reach a name that doesn't resolve
  timeout 20 getent hosts "$MASTER_ADDR" >/dev/null || {
    echo "error: $(hostname) can't resolve the first node, $MASTER_ADDR: add it to DNS or /etc/hosts" >&2
    return 2
  }

  export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}" # srun no longer inherits --cpus-per-task
  export HDF5_USE_FILE_LOCKING=FALSE                    # shared file systems often have no locks

  trap : USR1 USR2 TERM # the tasks get these too, save their state and leave; the batch shell has to outlive them
  export AVATAR_STOPPED="$PWD/.stopped-$SLURM_JOB_ID"
  rm -f "$AVATAR_STOPPED"
  local status=0
  srun --kill-on-bad-exit=1 --ntasks-per-node="$SLURM_NTASKS_PER_NODE" "$python" -m megatron_avatar.train "$@" || status=$?
  [[ -e "$AVATAR_STOPPED" ]] || return "$status" # a rank may still fail on its way out, with the state saved
  # Stopped by a signal with its state saved: into the queue again, under the same id where the cluster allows it.
  rm -f "$AVATAR_STOPPED"
  scontrol requeue "$SLURM_JOB_ID" || {
    echo "error: job $SLURM_JOB_ID can't be requeued; its state is saved: submit the same command again" >&2
    return 75
  }
}
