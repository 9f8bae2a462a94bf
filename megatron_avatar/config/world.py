"""How many processes this run has, and what is said where their number doesn't fit: before torch is imported."""

from __future__ import annotations

import os
import shlex

from megatron_avatar.config.schema import Config
from megatron_avatar.config.validate import check_world


def place() -> tuple[int, int, int]:
    """(rank, local rank, world size), as torchrun or an srun step says; one process without either."""
    env = os.environ
    if in_step():
        return int(env["SLURM_PROCID"]), int(env["SLURM_LOCALID"]), int(env["SLURM_STEP_NUM_TASKS"])
    if "RANK" in env and "WORLD_SIZE" in env:
        return int(env["RANK"]), int(env.get("LOCAL_RANK", 0)), int(env["WORLD_SIZE"])
    return 0, 0, 1


def in_step() -> bool:
    """Whether srun started this process, and not torchrun below it. A batch script has SLURM_PROCID, but is no step."""
    torchrun = {"RANK", "WORLD_SIZE"} <= os.environ.keys()
    return not torchrun and {"SLURM_STEP_ID", "SLURM_PROCID"} <= os.environ.keys()


def world_size() -> int:
    """Processes of this run."""
    return place()[2]


def check_processes(config: Config, module: str, arguments: list[str]) -> None:
    """ValueError where the processes don't divide into tp x pp, with the command that starts enough of them."""
    size, world = config.parallel.tp * config.parallel.pp, world_size()
    if world % size == 0:
        return
    raise ValueError(
        f"parallel.tp={config.parallel.tp} and parallel.pp={config.parallel.pp} take a multiple of {size} processes, "
        f"one GPU each, and {world} {'was' if world == 1 else 'were'} started. On one machine with {size} GPUs:\n  "
        f"{torchrun(size, module, arguments)}\n"
        f"On Slurm: bash slurm/NAME.sh submits such a job (docs/cluster.md). On fewer GPUs, lower the two: "
        "dry_run=true says what fits"
    )


def check_start(config: Config, module: str, arguments: list[str]) -> None:
    """As check_processes, and ValueError where a stage has fewer prompts than there are model replicas."""
    check_processes(config, module, arguments)
    check_world(config, world_size())


def torchrun(processes: int, module: str, arguments: list[str]) -> str:
    """The command line that starts a module on one machine without Slurm."""
    return f".venv/bin/torchrun --nproc-per-node {processes} -m {module} {shlex.join(arguments)}"
