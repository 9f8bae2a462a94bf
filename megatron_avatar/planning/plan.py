"""The plan of a run before it costs anything: does it fit, how long does it take, and what to change if it doesn't.

    python -m megatron_avatar.train recipe=avatar_7b dry_run=true parallel.tp=4 parallel.pp=2 cluster.gpus=32

Needs neither a GPU, nor weights, nor data: config/shapes holds the published models' configurations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table

from megatron_avatar.config.load import CONFIG_DIR
from megatron_avatar.config.schema import Config
from megatron_avatar.config.validate import check_world
from megatron_avatar.planning.memory import RankMemory, largest, rank_memories
from megatron_avatar.planning.outline import GIB, replicas
from megatron_avatar.planning.prospects import prospects
from megatron_avatar.planning.seconds import Rates, read_rates, step_seconds
from megatron_avatar.planning.work import Work, stage_work
from megatron_avatar.policy.architecture import read_config

MOST_TP = 8  # beyond a node, tensor parallelism waits for the network
ITEMS = {
    "weights": "weights",
    "tower_weights": "weights of the encoders",
    "gradients": "gradients",
    "optimizer": "optimizer: main weights, moments",
    "reference": "reference model",
    "margin": "margin (libraries, fragments)",
    "activations": "update: activations",
    "workspace": "update: workspace",
    "cache": "generation: keys and values",
    "generation": "generation: reading, drawing",
    "towers": "encoders",
}


@dataclass(frozen=True)
class StagePlan:
    """One stage: a rank's usual work, and its step's seconds by part."""

    name: str
    steps: int
    work: Work
    seconds: dict[str, float]

    @property
    def hours(self) -> float:
        return self.steps * sum(self.seconds.values()) / 3600


@dataclass(frozen=True)
class Plan:
    """Memory of all ranks of a replica (at the stage that needs most), time of the stages, and what is wrong.

    `problems` would keep the run from starting or from fitting; empty: it fits.
    """

    config: Config
    dp: int
    ranks: list[RankMemory]
    longest: Work
    stages: list[StagePlan]
    rates: Rates
    problems: list[str]


def make_plan(config: Config) -> Plan:
    """Plan a configuration for cluster.gpus, by default those of one replica. Raises ValueError where the model doesn't
    split into the layout."""
    if not config.cluster.gpus:
        config = replace(config, cluster=replace(config.cluster, gpus=config.parallel.tp * config.parallel.pp))
    folder = config.model.path or str(CONFIG_DIR / "shapes" / config.model.shape)
    hf_config = read_config(folder)
    rates = read_rates(config)
    problems = []
    try:
        check_world(config, config.cluster.gpus)
    except ValueError as error:
        problems.append(str(error))
    dp = replicas(config.cluster.gpus, config.parallel)
    ranks, longest = _memory(config, folder, dp, rates, every_rank=True)
    trainable = max(rank.trainable for rank in ranks)
    stages = []
    for name, stage in config.stages.items():
        work = stage_work(config, stage, hf_config, dp, longest=False)
        seconds = step_seconds(config, hf_config, work, dp, trainable, rates)
        stages.append(StagePlan(name, stage.steps, work, seconds))
    limit = config.cluster.gpu_memory_gib
    if (needed := largest(ranks).total / GIB) > limit:
        problems.append(
            f"a rank needs {needed:.1f} GiB, but cluster.gpu_memory_gib={limit:g}: {_remedy(config, folder, rates)}"
        )
    return Plan(config, dp, ranks, longest, stages, rates, problems)


def _memory(
    config: Config, folder: str, dp: int, rates: Rates, *, every_rank: bool
) -> tuple[list[RankMemory], Work]:
    """The ranks at the stage that needs most, and its longest work."""
    hf_config = read_config(folder)
    works = {stage_work(config, stage, hf_config, dp, longest=True): None for stage in config.stages.values()}
    plans = [
        (rank_memories(folder, config, work, dp, rates.memory_ratio, every_rank=every_rank), work)
        for work in works
    ]
    return max(plans, key=lambda plan: largest(plan[0]).total)


def _remedy(config: Config, folder: str, rates: Rates) -> str:
    """The first change that makes it fit: the layout as it is before a larger one, cheap changes before dear ones."""
    limit, found = config.cluster.gpu_memory_gib, {}

    def needed(change: dict[str, str | int]) -> float:
        """GiB of the largest rank with a change; infinite where the model doesn't split."""
        key = tuple(change.items())
        if key not in found:
            candidate = _changed(config, change)
            dp = replicas(config.cluster.gpus, candidate.parallel)
            try:
                ranks, _ = _memory(candidate, folder, dp, rates, every_rank=False)
                found[key] = largest(ranks).total / GIB
            except ValueError:
                found[key] = math.inf
        return found[key]

    for layout in _layouts(config):
        changes = list(_changes(config, layout))
        if needed(changes[-1]) > limit:  # with everything on: no other change of this layout can fit
            continue
        change = next(change for change in changes if needed(change) <= limit)
        return f"write {' '.join(f'{key}={value}' for key, value in change.items())} ({needed(change):.1f} GiB)"
    fewer = [] if config.model.lora.rank else ["train adapters (model.lora.rank=8)"]
    fewer += [f"write stages.{name}.train_towers=false" for name, stage in config.stages.items() if stage.train_towers]
    return (
        f"no layout of {config.cluster.gpus} such GPUs fits (the best needs {min(found.values()):.1f} GiB): take more "
        f"or larger GPUs, lower model.context{''.join(f', or {words}' for words in fewer)}"
    )


def _layouts(config: Config) -> list[tuple[int, int]]:
    """(tp, pp) that share out the GPUs: the present one, and those as large or larger, first where every replica has a
    prompt. All that there are where the present one doesn't share out the GPUs."""
    gpus, now = config.cluster.gpus, (config.parallel.tp, config.parallel.pp)
    sizes = [size for size in range(1, gpus + 1) if gpus % size == 0]
    pairs = [(tp, pp) for tp in sizes if tp <= MOST_TP for pp in sizes if gpus % (tp * pp) == 0]
    fits = gpus % math.prod(now) == 0
    others = [pair for pair in pairs if pair != now and (math.prod(pair) >= math.prod(now) or not fits)]
    prompts = min(stage.prompts_per_step for stage in config.stages.values())
    others.sort(key=lambda pair: (prompts < gpus // math.prod(pair), math.prod(pair), pair[1]))
    return [now, *others] if fits else others


def _changes(config: Config, layout: tuple[int, int]) -> Iterator[dict[str, str | int]]:
    """Overrides that save more and more memory in a layout; the last has all of them."""
    tp, pp = layout
    parallel = config.parallel
    change: dict[str, str | int] = {}
    if layout != (parallel.tp, parallel.pp):
        change = {"parallel.tp": tp, "parallel.pp": pp}
        if parallel.first_stage_layers is not None:
            change["parallel.first_stage_layers"] = "null"
        if tp == 1 and parallel.sequence_parallel:
            change["parallel.sequence_parallel"] = "false"
        yield dict(change)
    dp, context = config.cluster.gpus // (tp * pp), config.model.context
    steps: list[tuple[str, str | int, bool]] = [
        ("parallel.distributed_optimizer", "true", dp > 1 and not parallel.distributed_optimizer),
        ("parallel.sequence_parallel", "true", tp > 1 and not parallel.sequence_parallel),
        ("parallel.recompute", "light", parallel.recompute == "none"),
        ("parallel.recompute", "selective", parallel.recompute in ("none", "light")),
        ("parallel.recompute", "full", parallel.recompute != "full"),
        ("rl.tokens_per_micro_batch", context, config.rl.tokens_per_micro_batch > context),
    ]
    for key, value, possible in steps:
        if possible:
            change[key] = value
            yield dict(change)
    if not change:
        yield {}


def _changed(config: Config, change: dict[str, str | int]) -> Config:
    """The configuration with overrides of parallel and rl."""
    words = {"true": True, "false": False, "null": None}
    groups: dict[str, dict] = {"parallel": {}, "rl": {}}
    for key, value in change.items():
        group, name = key.split(".")
        groups[group][name] = words.get(str(value), value)
    parallel, rl = (replace(getattr(config, name), **settings) for name, settings in groups.items())
    return replace(config, parallel=parallel, rl=rl)


# ----------------------------------------------------------------------------------------------------------------
# On the terminal


def show(plan: Plan, console: Console) -> None:
    """Print the plan."""
    config, cluster, parallel = plan.config, plan.config.cluster, plan.config.parallel
    console.print(
        f"[bold]{config.name}[/]: {config.model.path or config.model.shape}, {config.model.dtype}, "
        f"{cluster.gpus} GPU{'s' * (cluster.gpus != 1)} "
        f"({cluster.gpu}, {cluster.gpu_memory_gib:g} GiB): tp {parallel.tp} x pp {parallel.pp} x dp {plan.dp}, "
        f"sequence_parallel={str(parallel.sequence_parallel).lower()}, recompute={parallel.recompute}, "
        f"distributed_optimizer={str(parallel.distributed_optimizer).lower()}"
    )
    console.print(_memory_table(plan))
    work = plan.longest
    largest_batch = max(micro.tokens for micro in work.counts())
    console.print(
        f"Memory is for the longest group that model.context={config.model.context} allows: a prompt of {work.prompt} "
        f"tokens ({work.visual} visual, {work.audio} audio), completions of {work.completion}, at most {largest_batch} "
        "packed tokens a micro-batch. "
        "Update, generation and encoders take turns: the largest counts."
    )
    console.print(_time_table(plan))
    console.print(
        f"[bold]{sum(stage.hours for stage in plan.stages):.2f} hours[/] for the whole run, where each prompt shows "
        f"{plan.stages[0].work.shows}."
    )
    console.print(
        f"Estimated from {plan.rates.source}. Completions at their full length; "
        "without sends between pipeline stages, decoding of media, rewards, checkpoints and evaluation."
    )
    for problem in plan.problems:
        console.print(f"[red]has to change[/]: {problem}", highlight=False)
    if not plan.problems:
        console.print(f"[green]fits[/]: {largest(plan.ranks).total / GIB:.1f} of {cluster.gpu_memory_gib:g} GiB")


def _memory_table(plan: Plan) -> Table:
    table = Table(title="Memory of a rank, GiB", title_justify="left")
    table.add_column("item")
    stages = []
    for pp_rank in range(plan.config.parallel.pp):
        ranks = [rank for rank in plan.ranks if rank.pp_rank == pp_rank]
        assert len({rank.total for rank in ranks}) == 1, "the ranks of a stage are alike"
        stages.append(ranks[0])
        tp = f"tp 0-{len(ranks) - 1}" if len(ranks) > 1 else "tp 0"
        table.add_column(f"pp {pp_rank}, {tp}", justify="right")
    table.add_row("parameters, millions", *(f"{rank.parameters / 1e6:,.1f}" for rank in stages))
    table.add_row("of these trained", *(f"{rank.trainable / 1e6:,.1f}" for rank in stages), end_section=True)
    for item, words in ITEMS.items():
        end = item in ("margin", "workspace", "generation", "towers")
        table.add_row(words, *(f"{getattr(rank, item) / GIB:.2f}" for rank in stages), end_section=end)
    table.add_row("[bold]at most at a time", *(f"[bold]{rank.total / GIB:.2f}" for rank in stages))
    return table


def _time_table(plan: Plan) -> Table:
    table = Table(title="A step, estimated", title_justify="left")
    table.add_column("")
    for stage in plan.stages:
        table.add_column(stage.name, justify="right")
    works = [stage.work for stage in plan.stages]
    for words, values in {
        "visual tokens of a prompt": [f"{work.visual:,}" for work in works],
        "audio tokens of a prompt": [f"{work.audio:,}" for work in works],
        "prompt tokens": [f"{work.prompt:,}" for work in works],
        "completions a step": [f"{sum(work.completions) * plan.dp:,} x {work.completion:,}" for work in works],
        "longest group, packed tokens": [f"{w.prompt - 1 + max(w.completions) * w.completion:,}" for w in works],
        "packed tokens a step": [f"{sum(micro.tokens for micro in w.counts()) * plan.dp:,}" for w in works],
        "micro-batches of a rank": [f"{len(work.counts())}" for work in works],
    }.items():
        table.add_row(words, *values)
    table.add_section()
    for part in dict.fromkeys(part for stage in plan.stages for part in stage.seconds):
        table.add_row(f"{part}, s", *(f"{s.seconds[part]:.2f}" if part in s.seconds else "-" for s in plan.stages))
    table.add_row("[bold]step, s", *(f"[bold]{sum(s.seconds.values()):.2f}" for s in plan.stages), end_section=True)
    table.add_row("steps", *(f"{stage.steps:,}" for stage in plan.stages))
    table.add_row("[bold]hours", *(f"[bold]{stage.hours:.2f}" for stage in plan.stages))
    return table


def dry_run(config: Config) -> int:
    """Print the plan of a configuration; exit status 0 where it fits, 2 where something has to change."""
    plan, console = make_plan(config), Console(soft_wrap=False)
    show(plan, console)
    expected, warnings = prospects(config)
    if expected is not None:
        console.print(expected)
    for warning in warnings:
        console.print(f"[yellow]warning[/]: {warning}", highlight=False)
    return 2 if plan.problems else 0
