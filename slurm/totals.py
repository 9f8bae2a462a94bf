"""A graph on a page that a person reads: jobs by kind, GPU hours, disk, and what is missing."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from megatron_avatar.planning import outline
from megatron_avatar.planning.outline import GIB, TIB
from slurm.tasks import Task

KINDS = {"eval.prepare": "benchmarks prepared", "eval.run": "evaluations", "eval.reproduction": "report"}


@dataclass
class Total:
    """Of one kind of task."""

    jobs: int = 0
    done: int = 0
    gpu_hours: float = 0.0
    longest: float = 0.0  # hours
    gpus: tuple[int, ...] = ()


@dataclass(frozen=True)
class Disk:
    """Bytes: what is left at the end, the most if all trainings that are to do run at once, and of the largest one."""

    left: float
    most: float
    largest: float


def kind(task: Task) -> str:
    """What a task is, in words."""
    if not task.module:
        config = task.config()
        return "cold starts" if all(s.kind == "sft" for s in config.stages.values()) else "trainings"
    return KINDS.get(task.module, "data")


def hours(task: Task) -> float:
    """By the plan."""
    if task.module:
        return task.hours
    config = task.config()
    nodes, tasks = task.layout()
    return sum(outline.stage_hours(config, outline.of(config, nodes, tasks)).values())


def totals(tasks: Iterable[Task], done: set[str]) -> dict[str, Total]:
    """Kind -> its total; hours are those of what is to do."""
    found: dict[str, Total] = {}
    for task in tasks:
        total = found.setdefault(kind(task), Total())
        total.jobs += 1
        if task.name in done:
            total.done += 1
            continue
        nodes, per_node = task.layout()
        gpus = nodes * per_node if task.parallel and task.config().cluster.gpu != "cpu" else 0
        total.gpus = tuple(sorted({*total.gpus, gpus}))
        total.gpu_hours += gpus * hours(task)
        total.longest = max(total.longest, hours(task))
    return found


def disk(tasks: Iterable[Task], done: set[str]) -> Disk:
    """What the trainings that are to do will take."""
    configs = [task.config() for task in tasks if not task.module and task.name not in done]
    shaped = [(config, outline.shape_of(config)) for config in configs]
    left = sum(outline.left_bytes(config, shape) for config, shape in shaped)
    most = [outline.kept_bytes(config, shape) for config, shape in shaped]
    return Disk(left, sum(most), max(most, default=0.0))


def check_disk(tasks: list[Task], done: set[str], out: Path) -> str:
    """What is to be said about the space; empty where it is enough. ValueError where what is left doesn't fit."""
    need, there = disk(tasks, done), outline.existing(out)
    free = shutil.disk_usage(there).free
    if free < max(need.left, need.largest):
        raise ValueError(
            f"the trainings leave {need.left / GIB:.0f} GiB (the largest takes {need.largest / GIB:.0f} meanwhile), "
            f"and {there} has {free / GIB:.0f} GiB free: make room there, choose another output_dir, lower "
            "checkpoint.keep, or write checkpoint.keep_finished=false"
        )
    if free < need.most:
        return (f"warning: if all trainings run at once they take {need.most / GIB:.0f} GiB, and {there} has "
                f"{free / GIB:.0f} GiB free: lower concurrency, or checkpoint.keep")  # fmt: skip
    return ""


def show(tasks: list[Task], done: set[str], out: Path, missing: list[str], console: Console) -> None:
    """Print the page."""
    table = Table("kind", "jobs", "done", "GPUs a job", "GPU hours", "longest, hours", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    found = totals(tasks, done)
    for name, total in found.items():
        gpus, spent = " or ".join(map(str, total.gpus)), f"{total.gpu_hours:,.1f}"
        table.add_row(name, str(total.jobs), str(total.done), *((gpus, spent) if any(total.gpus) else ("-", "-")),
                      f"{total.longest:.1f}" if total.longest else "-")  # fmt: skip
    table.add_row("[bold]all", *(f"[bold]{sum(values):,.0f}" for values in (
        [t.jobs for t in found.values()], [t.done for t in found.values()])), "",
        f"[bold]{sum(t.gpu_hours for t in found.values()):,.0f}", "")  # fmt: skip
    console.print(table)
    need, there = disk(tasks, done), outline.existing(out)
    console.print(f"\ndisk: {need.left / TIB:.2f} TiB are left at the end; {need.most / TIB:.2f} TiB if all trainings "
                  f"run at once; {shutil.disk_usage(there).free / TIB:.2f} TiB are free in {there}",
                  highlight=False)  # fmt: skip
    if any(total.gpu_hours for total in found.values()):
        config = next(task.config() for task in tasks)
        console.print(f"hours: from {outline.read_rates(config).source}; evaluations at full length", highlight=False)
    if missing:
        console.print("\n[bold]missing[/]:")
        for line in missing:
            words, *commands = line.split("\n")
            console.print(Padding(Text(words), (0, 0, 0, 2)))
            for command in commands:  # whole, to be copied, however wide the terminal is
                console.print(command, highlight=False, soft_wrap=True, markup=False)
