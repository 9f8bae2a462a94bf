"""From settings to a job's command: what is checked first, and how training starts on a node."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from megatron_avatar.config import Config, check_world
from megatron_avatar.config.checks import check_family, check_folder, check_same_model, check_same_run
from megatron_avatar.config.paths import check_inputs, refuse
from megatron_avatar.planning import outline
from slurm import container


def layout(config: Config) -> tuple[int, int]:
    """(nodes, tasks a node) that cluster.gpus, or one replica of the model, takes; ValueError if it doesn't divide."""
    where = outline.layout(config)
    return where.gpus // where.per_node, where.per_node


def check(config: Config, *, nodes: int, tasks_per_node: int, made: str = "") -> dict[str, Any]:
    """Refuse what can be refused without a GPU: ValueError naming the setting and the remedy. Returns the settings that
    differ from those of the run in output_dir, where they may.

    What lies below `made` need not be there yet: a job before this one makes it. What Slurm thinks: request.py.
    """
    check_world(config, nodes * tasks_per_node)
    refuse(check_inputs(config, made))
    container.check(config)
    changed = check_same_run(config)
    if Path(config.model.path).exists():
        check_family(config)
        check_same_model(config)
    check_folder(Path(config.output_dir))
    outline.check_weights_fit(config, outline.shape_of(config), outline.of(config, nodes, tasks_per_node))
    outline.check_space(config)
    return changed


def environment(config: Config, code: Path) -> dict[str, str]:
    """What every process of the job finds in its environment; `code` is the snapshot."""
    return {
        **config.cluster.env,
        **container.environment(config),
        "PYTHONPATH": str(code),  # before the working directory, which holds code that has changed since
        "PYTHONSAFEPATH": "1",
        "HDF5_USE_FILE_LOCKING": "FALSE",  # shared file systems often have no locks
    }


def command(config: Config, code: Path) -> list[str]:
    """The interpreter of training, inside of a container where the settings say so."""
    if config.cluster.container:
        return container.command(config, environment(config, code))
    return [config.cluster.python or sys.executable]


def srun_options(config: Config, code: Path) -> list[str]:
    """What srun needs beside the job's own options."""
    return container.srun_options(config, environment(config, code))
