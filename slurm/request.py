"""What a job asks Slurm for: nodes, GPUs, memory and time, from the site's file and the plan. The one place for it."""

from __future__ import annotations

import math
import os
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace

from megatron_avatar.config import Config
from megatron_avatar.planning import outline
from megatron_avatar.planning.outline import GIB
from megatron_avatar.resilience import queue

REFUSAL_S = 300.0  # for Slurm's opinion of a job, while a person waits
STEP_GIB = 10  # memory is asked for in such steps
COMMAND_MARGIN = 3.0  # of a command's time limit over its planned hours: items differ more than steps
# sbatch's options, as far as they have a variable of the user's that says the same.
VARIABLES = {
    "partition": "SBATCH_PARTITION", "account": "SBATCH_ACCOUNT", "qos": "SBATCH_QOS", "time": "SBATCH_TIMELIMIT",
    "mem": "SBATCH_MEM_PER_NODE", "mem-per-cpu": "SBATCH_MEM_PER_CPU", "mem-per-gpu": "SBATCH_MEM_PER_GPU",
    "gres": "SBATCH_GRES", "gpus": "SBATCH_GPUS", "gpus-per-node": "SBATCH_GPUS_PER_NODE",
    "gpus-per-task": "SBATCH_GPUS_PER_TASK",
}  # fmt: skip


@dataclass(frozen=True)
class Request:
    """nodes, tasks a node, minutes (None: the user says it), and GiB of a node's memory (None: likewise, 0: all of it).
    `sbatch`: the site's further options."""

    nodes: int
    tasks: int
    minutes: int | None
    memory: int | None
    cpus: int
    gres: str = ""
    named: tuple[tuple[str, str], ...] = ()  # partition, account, qos
    sbatch: tuple[str, ...] = ()

    def options(self) -> dict[str, object]:
        """By sbatch's long names."""
        found: dict[str, object] = {"nodes": self.nodes, "ntasks-per-node": self.tasks, "cpus-per-task": self.cpus}
        if self.minutes is not None:
            found["time"] = self.minutes
        found |= dict(self.named)
        if self.gres:
            found["gres"] = self.gres
        if self.memory is not None:
            found["mem"] = f"{self.memory}G" if self.memory else "0"
        return found

    def line(self) -> list[str]:
        """As sbatch's arguments."""
        return [*(f"--{name}={value}" for name, value in self.options().items()), *self.sbatch]


def make(
    config: Config, nodes: int, tasks: int, hours: float, memory: float, *, gpus: bool = True,
    margin: float = outline.LIMIT_MARGIN,
) -> Request:  # fmt: skip
    """A job of so many nodes and tasks, `hours` by the plan and `memory` bytes a node."""
    cluster = config.cluster
    named = {name: getattr(cluster, name) for name in ("partition", "account", "qos") if getattr(cluster, name)}
    if not gpus and cluster.cpu_partition:
        named["partition"] = cluster.cpu_partition
    gres = cluster.gres.replace("{n}", str(tasks)) if gpus and cluster.gpu != "cpu" else ""
    asked = 0 if cluster.memory == "all" else STEP_GIB * math.ceil(memory / GIB / STEP_GIB)
    return Request(nodes, tasks, outline.limit_minutes(hours, cluster.minutes, margin), asked, cluster.cpus_per_task,
                   gres, tuple(named.items()), tuple(cluster.sbatch))  # fmt: skip


def trainings(config: Config, nodes: int, tasks: int) -> list[Request]:
    """A training's request, and behind it one with less memory, in which a checkpoint is written in pieces.

    Raises ValueError where the site's nodes have not even that.
    """
    where = outline.of(config, nodes, tasks)
    memory, hours = outline.host_memory(config, where), sum(outline.stage_hours(config, where).values())
    node = config.cluster.host_memory_gib * GIB
    if node and memory.least > node:
        raise ValueError(
            f"{tasks} processes take {memory.least / GIB:.0f} GiB of a node's memory at least, and cluster.host_memory_"
            f"gib={config.cluster.host_memory_gib:g}: take fewer a node (cluster.gpus_per_node), or lower data.workers"
        )
    sizes = [memory.least] if node and memory.whole > node else [memory.whole, memory.least]
    return list(dict.fromkeys(make(config, nodes, tasks, hours, size) for size in sizes))


def first_accepted(
    requests: list[Request], more: Callable[[Request], list[str]] = Request.line, *, otherwise: str = ""
) -> Request:  # fmt: skip
    """The first that Slurm would take, asked without queueing anything. `more`: sbatch's arguments of one; `otherwise`:
    what would do without a Slurm, in words.

    Raises ValueError with sbatch's own reason where it takes none, SlurmSilent where it says nothing.
    """
    if shutil.which("sbatch") is None:
        ways = f"run this on a login node{f', or {otherwise}' if otherwise else ''}"
        raise ValueError(f"sbatch is not on this machine: {ways}")
    for k, request in enumerate(requests):
        line = more(request)
        try:
            queue.ask("sbatch", "--test-only", *line, stdin="#!/bin/sh\n", patience_s=REFUSAL_S)
            return request
        except queue.SlurmRefused as error:
            if k + 1 < len(requests) and _may_be_memory(str(error)):
                continue
            raise ValueError(
                f"Slurm refuses such a job ({shlex.join(line)}): {error}. Correct cluster.partition, cluster.account, "
                "cluster.qos, cluster.gres, cluster.gpus_per_node, cluster.cpus_per_task, cluster.memory or "
                "cluster.minutes"
            ) from None
    raise AssertionError("no request")


def _may_be_memory(reason: str) -> bool:
    """Slurm names the memory, or says of the whole request that no node has it."""
    return any(words in reason.lower() for words in ("memory", "configuration", "not available"))


def without(request: Request, given: list[str]) -> Request:
    """The request without what the user's own options or variables say. Where they or the site want no --gres,
    that of the script's own lines is taken back."""
    names = {item.removeprefix("--").partition("=")[0] for item in given}
    names |= {name for name, variable in VARIABLES.items() if os.environ.get(variable)}
    named = tuple((name, value) for name, value in request.named if name not in names)
    minutes = None if "time" in names else request.minutes
    memory = None if names & {"mem", "mem-per-cpu", "mem-per-gpu"} else request.memory
    gres = "" if "gres" in names else "none" if any(n.startswith("gpus") for n in names) else request.gres or "none"
    return replace(request, named=named, minutes=minutes, memory=memory, gres=gres)
