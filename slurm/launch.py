"""From settings to a job's command: what is checked first, and how training starts on a node."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from megatron_avatar.config import Config, check_world
from megatron_avatar.config.checks import check_folder, check_same_model, check_same_run
from megatron_avatar.config.paths import check_inputs, refuse
from megatron_avatar.planning.outline import check_space
from megatron_avatar.resilience import queue

REFUSAL_S = 300.0  # for Slurm's opinion of a job, while a person waits


def layout(config: Config) -> tuple[int, int]:
    """(nodes, tasks a node) that cluster.gpus, or one replica of the model, takes; ValueError if it doesn't divide."""
    tasks = config.cluster.gpus or config.parallel.tp * config.parallel.pp
    nodes = -(-tasks // config.cluster.gpus_per_node)
    if tasks % nodes:
        raise ValueError(
            f"{tasks} processes don't spread evenly over {nodes} nodes of cluster.gpus_per_node="
            f"{config.cluster.gpus_per_node}: choose cluster.gpus as a multiple of it"
        )
    return nodes, tasks // nodes


def check(config: Config, *, nodes: int, tasks_per_node: int, submit: list[str] | None = None) -> dict[str, Any]:
    """Refuse what can be refused without a GPU: ValueError naming the setting and the remedy. Returns the settings that
    differ from those of the run in output_dir, where they may.

    Partition, account and the node's size are Slurm's to judge, before anything is submitted: `submit` holds sbatch's
    options, which it tries without queueing anything.
    """
    cluster = config.cluster
    check_world(config, nodes * tasks_per_node)
    refuse(check_inputs(config))
    image = cluster.container
    if image and (image.startswith(("/", ".")) or image.endswith((".sif", ".sqsh"))) and not Path(image).exists():
        raise ValueError(f"cluster.container={image} doesn't exist: correct the path, or pull the image first")
    for mount in cluster.mounts if image else ():
        if not Path(mount.split(":")[0]).exists():
            raise ValueError(f"cluster.mounts: {mount.split(':')[0]} doesn't exist")
    changed = check_same_run(config)
    check_same_model(config)
    check_folder(Path(config.output_dir))
    if warning := check_space(config):
        print(f"warning: {warning}", file=sys.stderr)
    if submit is not None:
        try_submission(submit)
    return changed


def try_submission(options: list[str]) -> None:
    """ValueError with sbatch's own reason where it would refuse such a job; SlurmSilent where it says nothing."""
    if shutil.which("sbatch") is None:
        raise ValueError("sbatch is not on this machine: run this on a login node, or write cluster=local")
    try:
        queue.ask("sbatch", "--test-only", *options, stdin="#!/bin/sh\n", patience_s=REFUSAL_S)
    except queue.SlurmRefused as error:
        raise ValueError(
            f"Slurm refuses such a job ({shlex.join(options)}): {error}. Correct cluster.partition, cluster.account, "
            "cluster.qos, cluster.gres, cluster.gpus_per_node, cluster.cpus_per_task or cluster.minutes"
        ) from None


def environment(config: Config, code: Path) -> dict[str, str]:
    """What every process of the job finds in its environment; `code` is the snapshot."""
    return {
        **config.cluster.env,
        "PYTHONPATH": str(code),  # before the working directory, which holds code that has changed since
        "PYTHONSAFEPATH": "1",
        "HDF5_USE_FILE_LOCKING": "FALSE",  # shared file systems often have no locks
    }


def command(config: Config) -> list[str]:
    """The interpreter of training, inside of Apptainer where the settings say so."""
    cluster = config.cluster
    if not cluster.container:
        return [cluster.python or sys.executable]
    python = cluster.python or "python3"
    if cluster.runtime == "pyxis":
        return [python]
    binds = [item for mount in _mounts(config) for item in ("--bind", mount)]
    gpu = [] if cluster.gpu == "cpu" else ["--nv"]
    return ["apptainer", "exec", *gpu, "--pwd", str(Path.cwd()), *binds, cluster.container, python]


def srun_options(config: Config) -> list[str]:
    """What srun needs beside the job's own options."""
    cluster = config.cluster
    if not cluster.container or cluster.runtime != "pyxis":
        return []
    return [f"--container-image={cluster.container}", f"--container-mounts={','.join(_mounts(config))}",
            f"--container-workdir={Path.cwd()}"]  # fmt: skip


def _mounts(config: Config) -> list[str]:
    """FROM:TO of what a container has to see: the working directory, run, model and data, and cluster.mounts."""
    seen: list[Path] = []
    for path in (Path.cwd(), *map(Path, (config.output_dir, config.model.path)), Path(config.data.manifest).parent):
        if not any(path.absolute().is_relative_to(other) for other in seen):
            seen.append(path.absolute())
    return [*(f"{path}:{path}" for path in seen), *config.cluster.mounts]
