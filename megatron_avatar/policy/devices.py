"""Which GPU is a rank's own. Needs torch alone."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess

import torch
import torch.distributed as dist

DRIVER = 580  # of CUDA 13's generation

def refuse_cpu(shape: str, gpu: str) -> None:
    """ValueError where a recipe for a published model (`shape`) would train on the CPU that torch falls back to, and
    cluster.gpu doesn't say that it should."""
    if not shape or shape.startswith("tiny_") or gpu == "cpu" or torch.cuda.is_available():
        return
    raise ValueError(
        f"torch finds no GPU for the recipe's model.shape={shape}: {no_gpu()}. "
        "cluster.gpu=cpu trains it on the CPU"
    )


def no_gpu() -> str:
    """Why torch has no GPU here, in words: its build and the driver together."""
    built, driver = torch.version.cuda, driver_version()
    if built is None:
        there = f", the driver is {driver}: install a CUDA build" if driver else ", and nvidia-smi shows no driver"
        return f"PyTorch {torch.__version__} is a build for CPUs{there}"
    if not driver:
        return f"PyTorch {torch.__version__} is built for CUDA {built}, but nvidia-smi shows no driver"
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return "CUDA_VISIBLE_DEVICES is set and names no GPU: unset it, or let the job ask for GPUs (--gres=gpu:N)"
    major = driver.split(".")[0]
    if major.isdigit() and int(major) >= DRIVER:
        return (f"the driver is {driver}, new enough for PyTorch {torch.__version__} of CUDA {built}, and torch sees "
                "no GPU all the same: check nvidia-smi -L, that the job asked for GPUs (--gres=gpu:N), and that a "
                "container was given them (--nv, --gpus)")  # fmt: skip
    return (f"the driver is {driver} and PyTorch {torch.__version__} is built for CUDA {built}: PyPI's PyTorch 2.13 "
            f"and DALI's cuda130 wheel both want a driver of CUDA 13's generation ({DRIVER} or later); update the "
            "driver, or install a PyTorch for the driver's CUDA (pytorch.org) and nvidia-dali-cuda120")


def driver_version() -> str:
    """As nvidia-smi says it; empty without one."""
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "of an unknown version"
    return next(iter(run.stdout.split()), "") if run.returncode == 0 else "not answering"


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
