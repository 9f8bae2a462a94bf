"""From settings to a job's command: what is checked first, and how training starts on a node."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from megatron_avatar.config import Config, check_world
from megatron_avatar.config.checks import check_folder, check_same_model, check_same_run
from megatron_avatar.config.paths import check_inputs, refuse
from megatron_avatar.planning import outline


def layout(config: Config) -> tuple[int, int]:
    """(nodes, tasks a node) that cluster.gpus, or one replica of the model, takes; ValueError if it doesn't divide."""
    where = outline.layout(config)
    return where.gpus // where.per_node, where.per_node


def check(config: Config, *, nodes: int, tasks_per_node: int, made: str = "") -> dict[str, Any]:
    """Refuse what can be refused without a GPU: ValueError naming the setting and the remedy. Returns the settings that
    differ from those of the run in output_dir, where they may.

    What lies below `made` need not be there yet: a job before this one makes it. What Slurm thinks: request.py.
    """
    cluster = config.cluster
    check_world(config, nodes * tasks_per_node)
    refuse(check_inputs(config, made))
    image = cluster.container
    if image and (image.startswith(("/", ".")) or image.endswith((".sif", ".sqsh"))) and not Path(image).exists():
        raise ValueError(f"cluster.container={image} doesn't exist: correct the path, or pull the image first")
    for mount in cluster.mounts if image else ():
        if not Path(mount.split(":")[0]).exists():
            raise ValueError(f"cluster.mounts: {mount.split(':')[0]} doesn't exist")
    changed = check_same_run(config)
    if Path(config.model.path).exists():
        check_same_model(config)
    check_folder(Path(config.output_dir))
    outline.check_weights_fit(config, outline.shape_of(config), outline.of(config, nodes, tasks_per_node))
    outline.check_space(config)
    return changed


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
