"""What a run will do with its prompts, in words: the dry run's table, and what is worth a warning before a step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Group
from rich.table import Table

from megatron_avatar.config.schema import Config, HintConfig, StageConfig
from megatron_avatar.data.manifest import load_manifest
from megatron_avatar.planning.dynamics import FORMAT, HINT_LIFT, SUCCESS, Outlook, outlook

NEXT_TO_NOTHING = 0.02  # of visits hinted
MANY_DEAD, MANY_VANISHED, FEW_REPLAYED = 0.25, 0.8, 0.5


@dataclass(frozen=True)
class Pool:
    """The training samples of a stage: how many, and how many of them have a hint."""

    prompts: int
    hinted: int


def pools(config: Config) -> dict[str, Pool]:
    """Pool of every RL stage, from data.manifest; empty where there is none to read."""
    manifest = Path(config.data.manifest)
    if not manifest.is_file():
        return {}
    samples = [s for s in load_manifest(manifest, check_media=False) if s.split == "train"]
    own = {name: [s for s in samples if s.stage in stage.data] for name, stage in _stages(config)}
    return {name: Pool(len(found), sum(bool(s.hint) for s in found)) for name, found in own.items()}


def never(config: Config, found: Mapping[str, Pool]) -> list[str]:
    """What a stage's settings promise and can't keep with such a pool, however lucky: each with its remedy."""
    rl, problems = config.rl, []
    for name, stage in _stages(config):
        pool, batch = found.get(name), stage.prompts_per_step
        if rl.hints.enabled and pool is not None and not pool.hinted:
            problems.append(f"stages.{name}: hints are on, but none of its {pool.prompts} samples has one: make them "
                            "with data_tools.hints, or write ablation=wo_hints (rl.hints.enabled=false)")  # fmt: skip
        elif rl.hints.enabled and _most_visits(config, name, pool) <= _visits_before(rl.hints):
            problems.append(
                f"stages.{name}: no prompt can ever be hinted: none comes up more than "
                f"{_visits_before(rl.hints)} times in {stage.steps} steps of {batch}. Raise stages.{name}.steps or "
                "rl.revisit_share, lower rl.hints.patience, or write rl.hints.enabled=false"
            )
        steps = min(stage.steps - 1, rl.replay.max_age or math.inf)
        if rl.n_off and rl.n_on * batch * steps < max(rl.replay.min_fill, 1):
            problems.append(
                f"stages.{name}: nothing can ever be replayed: {steps} earlier steps make {rl.n_on * batch * steps} "
                f"completions, fewer than rl.replay.min_fill={rl.replay.min_fill}. Raise stages.{name}.steps or "
                "rl.replay.max_age, lower rl.replay.min_fill, or write rl.n_off=0"
            )
    return problems


def _visits_before(hints: HintConfig) -> int:
    """Plain visits before the first hinted one, at least."""
    return hints.patience if hints.kl_threshold is None else 1


def _most_visits(config: Config, name: str, pool: Pool | None) -> int:
    """Visits that a prompt can have at most: in its turn, and once a step as a revisit, where there are any."""
    stage, share = config.stages[name], config.rl.revisit_share
    in_turn = 1 if pool is None else math.ceil(stage.steps * stage.prompts_per_step / max(pool.prompts, 1))
    return in_turn + (stage.steps - 1 if share > 0 else 0)


def prospects(config: Config) -> tuple[Group | None, list[str]]:
    """A table of what each RL stage is expected to do, what it rests on, and warnings; None without such a stage."""
    found = pools(config)
    expected = {
        name: outlook(config, name, pool.prompts, pool.hinted / max(pool.prompts, 1)) if (pool := found.get(name))
        else outlook(config, name)
        for name, _ in _stages(config)
    }  # fmt: skip
    if not expected:
        return None, []
    warnings = never(config, found)
    for name, what in expected.items():
        if not any(warning.startswith(f"stages.{name}:") for warning in warnings):
            warnings += _warnings(config, name, what)
    return Group(_table(expected, found), _assumptions(bool(found))), warnings


def _assumptions(read: bool) -> str:
    """What the table rests on, in words."""
    a, b = SUCCESS
    pool = "of the manifest" if read else "so many that none comes up twice in its turn"
    return (
        f"Expected of a policy that keeps the format in {FORMAT:.0%} and answers {a / (a + b):.0%} right, each prompt "
        f"with a probability of its own (Beta({a}, {b})), that a hint helps in {HINT_LIFT:.0%} of its failures, and "
        f"that learns nothing; prompts: {pool}. Our assumptions: metrics.jsonl has the figures of a run under the same "
        "names (hints/visits, vanished, replay/...)."
    )


def _stages(config: Config) -> list[tuple[str, StageConfig]]:
    return [(name, stage) for name, stage in config.stages.items() if stage.kind == "rl"]


def _warnings(config: Config, name: str, what: Outlook) -> list[str]:
    rl, warnings = config.rl, []
    if rl.hints.enabled and what.hinted < NEXT_TO_NOTHING:
        warnings.append(f"stages.{name}: hints are next to nothing, {what.hinted:.1%} of the visits: raise "
                        "rl.revisit_share, lower rl.hints.patience, or take fewer prompts or more steps")  # fmt: skip
    if what.dead is not None and what.dead > MANY_DEAD:
        warnings.append(f"stages.{name}: {what.dead:.0%} of the replayed completions have no advantage: write "
                        "rl.replay.live=true")  # fmt: skip
    if what.replayed is not None and what.replayed < FEW_REPLAYED:
        warnings.append(f"stages.{name}: replay fills {what.replayed:.0%} of its places: raise rl.replay.max_age or "
                        "lower rl.replay.min_fill")  # fmt: skip
    if what.vanished > MANY_VANISHED:
        warnings.append(f"stages.{name}: {what.vanished:.0%} of the fresh groups have no signal: raise rl.n_on")
    return warnings


def _table(expected: Mapping[str, Outlook], found: Mapping[str, Pool]) -> Table:
    table = Table(title="What a stage does with its prompts, expected", title_justify="left")
    table.add_column("")
    for name in expected:
        table.add_column(name, justify="right")
    table.add_row("samples, with a hint", *(f"{p.prompts:,}, {p.hinted:,}" if (p := found.get(n)) else "-"
                                            for n in expected))  # fmt: skip
    rows = {
        "visits": lambda o: f"{o.visits:,}",
        "visits of a prompt that is met": lambda o: f"{o.visits_per_prompt:.1f}",
        "prompts that get their hint": lambda o: f"{o.hinted_prompts:,}",
        "hinted, of visits": lambda o: _share(o.hinted),
        "without a signal, of fresh groups": lambda o: _share(o.vanished),
        "filled, of places for replay": lambda o: _share(o.replayed),
        "without an advantage, of replayed": lambda o: _share(o.dead),
        "right, of replayed": lambda o: _share(o.correct),
        "mean advantage of replayed": lambda o: "-" if o.mean_off_advantage is None else f"{o.mean_off_advantage:+.2f}",
    }
    for words, value in rows.items():
        table.add_row(words, *map(value, expected.values()))
    return table


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
