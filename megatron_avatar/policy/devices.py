"""Which GPU is a rank's own. Needs torch alone."""

from __future__ import annotations

import os
import socket

import torch
import torch.distributed as dist


def own_device(local_rank: int, tasks: int) -> int:
    """Number of this rank's GPU among those that it sees: all of its node's, or one that its launcher chose for it.

    `tasks` are the processes of the node, 0 where that isn't known. Raises ValueError where there are too few.
    """
    found = torch.cuda.device_count()
    if found > local_rank and (found >= tasks or not tasks):
        return local_rank
    if found == 1:  # Slurm's --gpus-per-task=1; that it is no other rank's is for `claim`
        return 0
    raise ValueError(
        f"{found} GPUs are visible to process {local_rank} of its node, {tasks or local_rank + 1} processes need one "
        "each: check nvidia-smi, and that the job asked for GPUs (--gres=gpu:N, or --gpus-per-task=1)"
    )


def claim(device: int, rank: int, store: dist.Store) -> None:
    """Say in the ranks' common `store` that this GPU is `rank`'s; ValueError where another rank has it."""
    properties = torch.cuda.get_device_properties(device)
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # its store outlives the processes
    key = f"gpu {socket.gethostname()} {properties.uuid} {restart}"
    if store.add(key, 1) > 1:
        raise ValueError(
            f"rank {rank} sees the GPU of another rank ({properties.name}, {properties.uuid}) as its only one: start "
            "one process a GPU"
        )
