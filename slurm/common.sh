#!/bin/bash
# Sourced by the recipe scripts. At a job's first start this file is the checkout's, after a requeue the snapshot's.
# PYTHON in the environment names another interpreter than the repository's .venv for the checks on the first node.
set -euo pipefail
# Before any Python: the code itself lies in the run's folder.
SEES_THE_RUN='[[ -r "$AVATAR_SNAPSHOT/snapshot.json" ]] || { echo "error: pre-flight on $(uname -n): $AVATAR_SNAPSHOT, \
written by the first node, is not there: output_dir must lie on a file system that all nodes share" >&2; exit 2; }
exec "$@"'
CODE=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# train [key=value ...]: one training process for every task of the job.
train() {
  cd "$SLURM_SUBMIT_DIR"
  local python="${PYTHON:-.venv/bin/python}" settings
  command -v "$python" >/dev/null || {
    echo "error: $python is missing in $SLURM_SUBMIT_DIR: run 'make doctor' there, or export PYTHON=FILE" >&2
    return 2
  }
  settings=$("$python" "$CODE/slurm/launch.py" "$@") || return 2
  local command srun_options run log gpus
  eval "$settings"

  AVATAR_NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | tr '\n' ' ')
  export AVATAR_NODES MASTER_ADDR="${AVATAR_NODES%% *}"
  export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000)) # two jobs on one node must not meet
  export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}" # srun no longer inherits --cpus-per-task
  export AVATAR_CHAIN="${AVATAR_CHAIN:-$SLURM_JOB_ID}" # restarts without progress are counted by it
  export AVATAR_STOPPED="$run/.stopped-$SLURM_JOB_ID"  # the trainer touches it: to be continued in another attempt
  rm -f "$AVATAR_STOPPED"

  trap : USR1 USR2 TERM # the tasks get these too, save their state and leave; the batch shell has to outlive them
  local srun=(srun --label --kill-on-bad-exit=1 --ntasks-per-node="$SLURM_NTASKS_PER_NODE"
    ${srun_options[@]+"${srun_options[@]}"}) status=0
  {
    trap : USR1 USR2 TERM # a subshell has its own
    "${srun[@]}" bash -c "$SEES_THE_RUN" pre-flight "${command[@]}" -m slurm.preflight "$run" "$gpus" &&
      "${srun[@]}" "${command[@]}" -m megatron_avatar.train "$@"
  } 2>&1 | (trap '' USR1 USR2 TERM && exec tee -a "$log") || status=$?
  # USR1 or USR2 before Python could answer. Not by srun's status: it ends the others by TERM when any task has failed.
  if grep -q '^srun: error: .*: User defined signal' "$log"; then touch "$AVATAR_STOPPED"; fi
  [[ -e "$AVATAR_STOPPED" ]] || return "$status" # a rank may still fail on its way out, with the state saved
  # Stopped by a signal with its state saved: into the queue again, under the same id where the cluster allows it. Not
  # where Slurm has the last word already: a cancelled job stays cancelled, one that lost a node is queued again.
  rm -f "$AVATAR_STOPPED"
  [[ $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) == RUNNING ]] || return "$status"
  scontrol requeue "$SLURM_JOB_ID" || resubmit "$@"
}

# resubmit [key=value ...]: the same script, options and snapshot as a new job, where requeueing is refused.
resubmit() {
  [[ -z "${SUBMITIT_EXECUTOR:-}" ]] || { # its job is known by its id
    echo "error: job $SLURM_JOB_ID may not be requeued; its state is saved: run sweep.py or reproduce.py again" >&2
    return 75
  }
  local script="$run/.resubmitted-$SLURM_JOB_ID.sh" limit features
  scontrol write batch_script "$SLURM_JOB_ID" "$script" >/dev/null
  limit=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%l)
  features=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%f)
  local options=(--parsable --job-name="$SLURM_JOB_NAME" --partition="$SLURM_JOB_PARTITION" --time="$limit"
    --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node="$SLURM_NTASKS_PER_NODE")
  [[ -z "${SLURM_JOB_ACCOUNT:-}" ]] || options+=(--account="$SLURM_JOB_ACCOUNT")
  [[ -z "${SLURM_JOB_QOS:-}" ]] || options+=(--qos="$SLURM_JOB_QOS")
  [[ -z "${SLURM_CPUS_PER_TASK:-}" ]] || options+=(--cpus-per-task="$SLURM_CPUS_PER_TASK")
  [[ -z "${SLURM_GPUS_PER_NODE:-}" ]] || options+=(--gpus-per-node="$SLURM_GPUS_PER_NODE")
  [[ -z "${SLURM_MEM_PER_NODE:-}" ]] || options+=(--mem="$SLURM_MEM_PER_NODE")
  [[ -z "${SLURM_JOB_RESERVATION:-}" ]] || options+=(--reservation="$SLURM_JOB_RESERVATION")
  [[ "$features" == "(null)" ]] || options+=(--constraint="$features")
  local job
  job=$(sbatch "${options[@]}" "$script" "$@") || {
    echo "error: job $SLURM_JOB_ID can be neither requeued nor resubmitted; its state is saved: submit it again" >&2
    return 75
  }
  rm -f "$script"
  echo "job $SLURM_JOB_ID may not be requeued: job $job continues it"
}
