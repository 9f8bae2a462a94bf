"""What a job will do, on a page that a person reads: before it is submitted, and in its first lines."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_avatar.config import Config
from megatron_avatar.config.paths import cold_start, origin
from megatron_avatar.files import step_folders
from megatron_avatar.planning import outline
from megatron_avatar.planning.outline import GIB
from megatron_avatar.planning.seconds import read_rates

WIDTH = 8


def page(config: Config, nodes: int, tasks: int, *, minutes: int | None = None, memory: float | None = None,
         after: str = "") -> str:  # fmt: skip
    """Lines about a training on so many nodes. `minutes`: its time limit; `memory`: GiB of a node that it gets, 0 for
    all of it; `after`: what it waits for, in words."""
    lines = [f"{config.name}{f', {after}' if after else ''}"]
    lines += [f"  {name:<{WIDTH}}{text}" for name, text in _rows(config, nodes, tasks, minutes, memory)]
    return "\n".join(lines)


def _rows(config: Config, nodes: int, tasks: int, minutes: int | None, memory: float | None) -> Iterator[tuple]:
    where, shape, cluster = outline.of(config, nodes, tasks), outline.shape_of(config), config.cluster
    yield "model", f"{config.model.path} ({origin(config)})"
    yield "data", config.data.manifest
    yield "run", f"{config.output_dir}: {progress(Path(config.output_dir))}"
    parallel = config.parallel
    kind = "CPU processes" if cluster.gpu == "cpu" else f"{cluster.gpu} GPUs of {cluster.gpu_memory_gib:g} GiB"
    yield "takes", (f"{where.gpus} {kind} on {nodes} node{'s' if nodes > 1 else ''}: tp {parallel.tp} x pp "
                    f"{parallel.pp} x dp {where.dp}")  # fmt: skip
    hours = outline.stage_hours(config, where)
    parts = ", ".join(f"{name} {value:.2f}" for name, value in hours.items()) if len(hours) > 1 else ""
    limit = f"; time limit {minutes // 60}:{minutes % 60:02} h" if minutes else ""
    yield "hours", f"{sum(hours.values()):.2f} by the plan{f' ({parts})' if parts else ''}{limit}"
    yield "", f"from {read_rates(config).source}"
    yield "memory", memory_words(config, where, memory)
    most, whole = outline.kept_bytes(config, shape) / GIB, outline.checkpoint_bytes(config, shape) / GIB
    weights, stay = outline.weights_bytes(config, shape) / GIB, len(config.checkpoint.milestones)
    there = outline.existing(Path(config.output_dir))
    yield "disk", (f"up to {most:.0f} GiB: {config.checkpoint.keep + 1} checkpoints of {whole:.1f}, {stay} milestones "
                   f"and {len(config.stages)} exports of {weights:.1f}; {shutil.disk_usage(there).free / GIB:.0f} GiB "
                   f"are free in {there}")  # fmt: skip
    yield from _notes(config)


def memory_words(config: Config, where: outline.Layout, memory: float | None) -> str:
    """What a node's memory is enough for."""
    planned = outline.host_memory(config, where)
    words = f"{planned.whole / GIB:.0f} GiB a node by the plan"
    if memory and memory * GIB < planned.whole:
        words += f", it gets {memory:.0f}: checkpoints are written in pieces, and training waits meanwhile"
    elif memory:
        words += f", it gets {memory:.0f}"
    return words


def _notes(config: Config) -> Iterator[tuple[str, str]]:
    export = cold_start(config)
    if export is not None and config.model.path != str(export) and "without a cold start" in origin(config):
        yield "note", f"no cold start: {export} is not there; --with-sft trains it first"
    judged = [name for name, stage in config.stages.items() if stage.rewards.get("judge")]
    if judged and config.judge.endpoint:
        yield "judge", config.judge.endpoint
    elif judged and not config.model.shape.startswith("tiny_"):
        yield "note", (f"no judge: the judge reward of {', '.join(judged)} is masked, its weight shared by the others; "
                       "--with-judge serves one")  # fmt: skip
    if warning := outline.check_space(config):
        yield "warning", warning


def progress(run: Path) -> str:
    """Where a run stands, from its files."""
    if (run / "done.json").is_file():
        return "complete"
    steps = step_folders(run / "checkpoints")
    return f"goes on at step {max(steps)}" if steps else "new"
