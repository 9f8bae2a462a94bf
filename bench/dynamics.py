"""What the method does to a training, without a model: the run's own prompts, tracker, hints, replay and objective.

    python -m bench.dynamics [--seeds 4] [--json]

recipes: what the stages of each recipe do with their prompts, at fixed success probabilities (planning/dynamics.py);
`before` is the same with the settings that the recipes had before, and the choices as published. worlds: held-out
success of a tabular policy (bench/tabular.py) after training by each system: mean over seeds, Student's 95 % interval,
and completions generated. agreement: two rules of the self reward, and weights under which none is needed; `early` is
the success after a quarter of the steps. carried: what a stage change leaves of a stage's movement (bench/carried.py).
With --json and the default seeds the results go to bench/results/dynamics.json and dynamics.svg.

About ten minutes of one core. Each training is kept in runs/dynamics.jsonl until the command has ended: after a stop
the same command goes on from there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cache, partial

import numpy as np
import torch
from scipy import stats

from bench.carried import carried
from bench.dynamics_figure import draw
from bench.dynamics_journal import ROOT, Journal
from bench.tabular import Kind, Tabular, World
from bench.timing import JSON_HELP, RESULTS, is_default, report
from megatron_avatar.config import StageConfig, load_config
from megatron_avatar.config.load import CONFIG_DIR
from megatron_avatar.config.schema import Config
from megatron_avatar.planning.dynamics import Outlook, Tally, go_through, outlook
from megatron_avatar.rl.advantages import on_policy_advantages
from megatron_avatar.rl.rewards import weigh_group

STEPS, BATCH, POOL, HELD_OUT = 150, 8, 160, 200
SIZES = (STEPS, BATCH, POOL, HELD_OUT)
EARLY = 0.25  # of the steps
JOURNAL = ROOT / "runs" / "dynamics.jsonl"

EASY = Kind(0.5, 1, success=0.5, hinted=0.7)
GAP = World((EASY, Kind(0.5, 3, success=0.0156, hinted=0.3)), lr=2.0)
NEEDLE = World((EASY, Kind(0.5, 3, success=0.0005, hinted=0.2)), lr=2.0)
SELF = (("format", 0.2), ("accuracy", 0.4), ("self", 0.4))  # published, stage 2
WORLDS = {
    # Half of the prompts need three decisions that no easy prompt shows, right once in 64 completions.
    "gap": GAP,
    "gap, low learning rate": replace(GAP, lr=1.0),
    "gap, high learning rate": replace(GAP, lr=4.0),
    "needle, 1 in 300": World((EASY, Kind(0.5, 3, success=0.0034, hinted=0.19)), lr=2.0),
    "needle, 1 in 2000": NEEDLE,
    "needle, hints don't transfer": replace(NEEDLE, transfer=False),
    "45 % unlearnable": World(
        (Kind(0.3, 1, 0.5, 0.7), Kind(0.25, 2, 0.1, 0.3), Kind(0.45, 2, 0.25, 0.3, learnable=False)), lr=2.0
    ),
}
LURED = World((EASY, Kind(0.5, 2, success=0.05, hinted=0.25)), lr=2.0, lure=2.0, rewards=SELF)

AGAIN = ["rl.revisit_share=0.5"]
HINTED = [*AGAIN, "rl.hints.enabled=true"]
# System -> its overrides of avatar_7b, and the share of the steps that it makes.
SYSTEMS: dict[str, tuple[list[str], float]] = {
    "GRPO": (["ablation=grpo"], 1),
    "GRPO + revisits": (["ablation=grpo_revisits"], 1),
    "GRPO + revisits, hints": (["ablation=grpo", *HINTED], 1),
    "GRPO, beta/2": (["ablation=grpo_beta_matched"], 1),
    "GRPO, beta/2 + revisits, hints": (["ablation=grpo_beta_matched", *HINTED], 1),
    "GRPO half": (["ablation=grpo"], 0.5),
    "GRPO half + revisits, hints": (["ablation=grpo", *HINTED], 0.5),
    "GRPO half, two updates": (["ablation=grpo_two_updates"], 0.5),
    "GRPO half, two updates + revisits, hints": (["ablation=grpo_two_updates", *HINTED], 0.5),
    "AVATAR": ([], 1),
    "AVATAR, replay as published": (["ablation=published"], 1),
    "AVATAR w/o hints": (["ablation=wo_hints"], 1),
    "AVATAR w/o revisits": (["rl.revisit_share=0"], 1),
    "AVATAR w/o replay (8-0)": (["ablation=wo_off_policy"], 1),
    "AVATAR w/o TAS": (["ablation=wo_tas"], 1),
    "AVATAR w/o VCRS": (["ablation=wo_vcrs"], 1),
    "AVATAR, order priority": (["rl.replay.order=priority"], 1),
    "AVATAR, order uniform": (["rl.replay.order=uniform"], 1),
    "AVATAR, order fifo": (["rl.replay.order=fifo"], 1),
    "AVATAR, a quarter revisits": (["rl.revisit_share=0.25"], 1),
}
# What the other learning rates are tried with.
AT_EVERY_RATE = ("GRPO", "GRPO, beta/2", "GRPO, beta/2 + revisits, hints", "GRPO half, two updates", "AVATAR",
                 "AVATAR, replay as published", "AVATAR w/o hints")  # fmt: skip
# What the worlds are tried with that ask one thing each: do hints help where they can't, and does AVATAR waste visits?
FEW = ("GRPO", "GRPO, beta/2 + revisits, hints", "GRPO half, two updates", "AVATAR", "AVATAR w/o hints")
ASK_ONE_THING = ("needle, hints don't transfer", "45 % unlearnable")
AGREEMENT = {
    "majority (published)": ("rl.self_reward=majority", SELF),
    "majority, weights 0.2, 0.5, 0.3": ("rl.self_reward=majority", (("format", 0.2), ("accuracy", 0.5), ("self", 0.3))),
    "where the majority is right": ("rl.self_reward=right", SELF),
    "no self reward": ("rl.self_reward=right", (("format", 0.33), ("accuracy", 0.67))),
}
_OUTLOOKS: dict[str, Outlook] = {}
# The recipes' settings before: ablation=published on top, and these.
NEW = ("avatar_7b_cluster", "grpo_7b_cluster")
BEFORE = {"visual": 134, "audio_visual": 133, "localisation": 133, "math": 400}


def settings(overrides: Sequence[str], recipe: str = "avatar_7b") -> Config:
    """A recipe with overrides, for the caller to change."""
    return deepcopy(_loaded(recipe, *overrides))


@cache
def _loaded(recipe: str, *overrides: str) -> Config:
    return load_config([f"recipe={recipe}", "dry_run=true", *overrides])


# ---- worlds ------------------------------------------------------------------------------------


def train(world: World, overrides: Sequence[str], share: float, seed: int) -> tuple[float, int]:
    """Held-out success and completions generated of one training in a world."""
    config, steps = settings(overrides), round(STEPS * share)
    config.seed = seed
    config.stages = {"world": StageConfig(steps=steps, prompts_per_step=BATCH, rewards=dict(world.rewards))}
    ids = [f"p{k}" for k in range(POOL)]
    policy = Tabular(world, config.rl, ids, HELD_OUT, seed)
    go_through(config, "world", ids, set(ids), policy, Tally(), steps=steps)
    return policy.success(), steps * BATCH * config.rl.n_on


def trainings(
    journal: Journal, world: World, overrides: Sequence[str], share: float, seeds: int
) -> list[tuple[float, int]]:
    """`train` with every seed."""
    return [
        journal.result(repr((world, *overrides, share, *SIZES, seed)), partial(train, world, overrides, share, seed))
        for seed in range(seeds)
    ]


def summary(runs: Sequence[tuple[float, int]]) -> dict[str, object]:
    """Mean of the successes, Student's 95 % interval over seeds, the successes by seed, and completions of one run."""
    values = np.array([value for value, _ in runs])
    half = float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5)
    mean = float(values.mean())
    return {"final": mean, "interval": [mean - half, mean + half], "completions": runs[0][1],
            "by_seed": values.tolist()}  # fmt: skip


def systems_of(name: str) -> list[str]:
    """The systems that are tried in a world."""
    tried = AT_EVERY_RATE if "learning rate" in name else FEW if name in ASK_ONE_THING else SYSTEMS
    return [system for system in SYSTEMS if system in tried]


def worlds(seeds: int, journal: Journal) -> dict[str, dict[str, dict]]:
    found: dict[str, dict[str, dict]] = {}
    for name, world in WORLDS.items():
        for system in systems_of(name):
            what = found.setdefault(name, {})[system] = summary(trainings(journal, world, *SYSTEMS[system], seeds))
            journal.say(f"{name:<30} {system:<42} {100 * what['final']:5.1f}")
    return found


# ---- agreement ---------------------------------------------------------------------------------


def agreement(seeds: int, journal: Journal) -> dict[str, dict]:
    """By rule: how a policy that is right once in twenty is drawn to the right answer, and what becomes of it."""
    found = {}
    for name, (override, rewards) in AGREEMENT.items():
        world = replace(LURED, rewards=rewards)
        early, late = (summary(trainings(journal, world, [override], share, seeds)) for share in (EARLY, 1))
        found[name] = {"drift": drift(dict(rewards), override.partition("=")[2]), "early": early["final"],
                       "early_interval": early["interval"]} | late  # fmt: skip
        journal.say(f"{name:<73} {100 * found[name]['early']:5.1f} {100 * found[name]['final']:5.1f}")
    return found


def drift(weights: Mapping[str, float], rule: str, success: float = 0.05, n: int = 8, groups: int = 4000) -> float:
    """Mean over groups of the right completions' advantages, summed and divided by n: the pull on the right answer."""
    rng, pull = np.random.default_rng(0), 0.0
    for _ in range(groups):
        right = rng.random(n) < success
        wrong = rng.choice(3, n, p=[0.7, 0.2, 0.1])
        parts = [{"format": 1.0, "accuracy": float(r), "correct": float(r)} for r in right]
        answers = ["right" if r else f"wrong {w}" for r, w in zip(right, wrong, strict=True)]
        rewards = np.array([r for r, _ in weigh_group(parts, answers, dict(weights), self_reward=rule)])
        advantages = on_policy_advantages(rewards, baseline=None, running_std=0.0, batch_mean=0.0)
        pull += float(advantages[right].sum()) / n / groups
    return pull


# ---- recipes -----------------------------------------------------------------------------------


def recipes(*, before: bool = False) -> dict[str, dict[str, float | None]]:
    """Shares over a recipe's RL stages, weighted by their visits; `before`: with the settings before."""
    found = {}
    for path in sorted((CONFIG_DIR / "recipe").glob("*.yaml")):
        if before and path.stem in NEW:
            continue
        config = settings((), path.stem)
        names = [name for name, stage in config.stages.items() if stage.kind == "rl"]
        if not names:
            continue
        if before:
            config = as_before(path.stem, config)
        told = [_told(config, name) for name in names]
        found[path.stem] = {
            "hinted": _mean(told, "hinted"), "vanished": _mean(told, "vanished"), "dead": _mean(told, "dead"),
            "visits_per_prompt": _mean(told, "visits_per_prompt"),
            "mean_off_advantage": _mean(told, "mean_off_advantage"),
        }  # fmt: skip
    return found


def as_before(recipe: str, config: Config) -> Config:
    """A recipe with the choices as published, revisits of a quarter where it has any, and the steps it had."""
    published = settings(["ablation=published"], recipe).rl
    rl = replace(config.rl, dual_clip=None, std_floor=0.0, self_reward="majority", replay=published.replay,
                 revisit_share=0.25 if config.rl.revisit_share else 0.0)  # fmt: skip
    stages = config.stages
    if not recipe.startswith(("tiny", "grpo")):
        stages = {name: replace(stage, steps=BEFORE.get(name, stage.steps)) for name, stage in stages.items()}
    return replace(config, rl=rl, stages=stages)


def _told(config: Config, name: str) -> Outlook:
    """A stage's outlook; recipes that differ in other things than these alone have the same."""
    key = repr((config.seed, config.rl, config.stages[name], name))
    if key not in _OUTLOOKS:
        _OUTLOOKS[key] = outlook(config, name)
    return _OUTLOOKS[key]


def _mean(told: list, name: str) -> float | None:
    there = [o for o in told if getattr(o, name) is not None]
    return float(np.average([getattr(o, name) for o in there], weights=[o.visits for o in there])) if there else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--json", action="store_true", help=JSON_HELP)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    total = arguments.seeds * (sum(len(systems_of(name)) for name in WORLDS) + 2 * len(AGREEMENT))
    with Journal(JOURNAL, total) as journal:
        result = {
            "recipes": recipes(), "before": recipes(before=True), "worlds": worlds(arguments.seeds, journal),
            "agreement": agreement(arguments.seeds, journal), "carried": carried(stages=2)["carried"],
        }  # fmt: skip
        keep = is_default(parser, arguments)
        report("dynamics", json.loads(json.dumps(result), parse_float=lambda x: round(float(x), 4)),
               as_json=arguments.json, keep=keep)  # fmt: skip
        if arguments.json and keep:
            draw(result, RESULTS / "dynamics.svg")


if __name__ == "__main__":
    main()
