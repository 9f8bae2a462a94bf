"""What a stage of reinforcement learning will do with its prompts, before it costs anything.

The run's own choice of prompts, tracker, hints and replay go through the stage's steps; in place of a model stand
prompts that are solved with fixed probabilities, drawn from an assumed distribution. Nothing is learned here, so it
says what a stage begins with: how often prompts are met, hinted and replayed, and how much of that has an advantage.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatron_avatar.config.schema import Config, StageConfig
from megatron_avatar.data.loader import SampleOrder
from megatron_avatar.keyed import keyed_rng
from megatron_avatar.records import Completion, Group, Prompt, Trajectory, Variant
from megatron_avatar.rl.advantages import dead
from megatron_avatar.rl.hints import HintPolicy
from megatron_avatar.rl.replay.buffer import ReplayBuffer
from megatron_avatar.rl.rewards import weigh_group
from megatron_avatar.rl.step import Visit, assign_on_policy, choose_prompts, commit, draw_replay, rewards_of
from megatron_avatar.rl.tracker import RewardTracker

# Assumed of a cold-started policy on the prompts of a stage; ours, as nothing of it is published.
SUCCESS = (0.4, 0.6)  # Beta: 40 % of completions are right; of one prompt in six fewer than one in fifty
HINT_LIFT = 0.2  # a hint solves a fifth of what would have failed
FORMAT = 0.98
WRONG = (0.6, 0.25, 0.15)  # how wrong answers share out: some are more tempting
JUDGE = (0.6, 0.1)  # mean and deviation of a judge's verdict
MOST_VISITS = 4000  # of a stage that are gone through; a longer one goes on as it stands then
ENOUGH_VISITS, MOST_TIMES = 1500, 4  # a stage of fewer is gone through again, as often as this at most
DRAWS = 50  # of a stage, about: a draw changes nothing, so not every step needs one


@dataclass(frozen=True)
class Outlook:
    """Shares of a stage's visits, groups and replayed completions; None where there is nothing to have a share of.

    visits_per_prompt: of prompts that are met at all. hinted: of visits. hinted_prompts: how many ever are. vanished:
    of fresh groups, rewards all equal. replayed: of the completions that a step wants to replay. dead: of the
    replayed ones, without an advantage. mean_off_advantage and correct: of the replayed ones.
    """

    visits: int
    visits_per_prompt: float
    hinted: float
    hinted_prompts: int
    vanished: float
    replayed: float | None
    dead: float | None
    mean_off_advantage: float | None
    correct: float | None


class Tally:
    """Counts of a stage, step by step."""

    def __init__(self) -> None:
        self._met: Counter[str] = Counter()
        self._hinted: list[str] = []
        self._vanished = self._wanted = 0
        self._advantages: list[np.ndarray] = []
        self._correct: list[float] = []

    def add_visits(self, visits: Sequence[Visit], vanished: int) -> None:
        self._met.update(visit.sample_id for visit in visits)
        self._hinted += [visit.sample_id for visit in visits if visit.variant == "hinted"]
        self._vanished += vanished

    def add_draw(self, drawn: Sequence[Sequence[Trajectory]], advantages: Sequence[np.ndarray], wanted: int) -> None:
        self._wanted += wanted
        self._advantages += advantages
        self._correct += [t.parts["correct"] for group in drawn for t in group]

    def outlook(self, times: int) -> Outlook:
        """Of all that was counted, which is so many times a stage."""
        visits = self._met.total()
        off = np.concatenate(self._advantages) if self._advantages else np.zeros(0)
        return Outlook(
            visits=visits // times,
            visits_per_prompt=visits / max(len(self._met), 1),
            hinted=len(self._hinted) / max(visits, 1),
            hinted_prompts=round(len(set(self._hinted)) / times),
            vanished=self._vanished / max(visits, 1),
            replayed=len(off) / self._wanted if self._wanted else None,
            dead=dead(off) / len(off) if len(off) else None,
            mean_off_advantage=float(off.mean()) if len(off) else None,
            correct=float(np.mean(self._correct)) if len(off) else None,
        )


class Policy(Protocol):
    """What stands in place of a model."""

    def complete(self, visit: Visit, n: int, step: int) -> tuple[list[Trajectory], list[str | None]]:
        """n completions of a visit, with their parts, and the answers in them; rewards are not set yet."""
        ...

    def learn(self, fresh: list[Group], replayed: list[Group]) -> None:
        """An update from a step's groups, whose advantages are set."""
        ...


class FixedPolicy:
    """Every prompt is right with a probability of its own, for good."""

    def __init__(self, pool: list[str], seed: int) -> None:
        rng = keyed_rng("outlook", seed, pool[0])
        self._success = dict(zip(pool, rng.beta(*SUCCESS, len(pool)).tolist(), strict=True))

    def chance(self, sample_id: str, variant: str) -> float:
        """The share of a prompt's completions that are right, `plain` or `hinted`."""
        success = self._success[sample_id]
        return success + HINT_LIFT * (1 - success) * (variant == "hinted")

    def complete(self, visit: Visit, n: int, step: int) -> tuple[list[Trajectory], list[str | None]]:
        rng = keyed_rng("outlook", visit.key)
        formatted = rng.random(n) < FORMAT
        right = formatted & (rng.random(n) < self.chance(visit.sample_id, visit.variant))
        wrong = rng.choice(len(WRONG), n, p=WRONG)
        verdicts = np.clip(rng.normal(*JUDGE, n), 0, 1)
        said = list(zip(formatted, right, verdicts, wrong, strict=True))
        rows = [
            trajectory(visit, Completion(np.array([k]), np.zeros(1, np.float32), True), step,
                       format=float(f), accuracy=float(r), correct=float(r), judge=float(v))
            for k, (f, r, v, _) in enumerate(said)
        ]  # fmt: skip
        return rows, [None if not f else "right" if r else f"wrong {w}" for f, r, _, w in said]

    def learn(self, fresh: list[Group], replayed: list[Group]) -> None:
        pass


def trajectory(visit: Visit, completion: Completion, step: int, kl_ref: float = 0.0, **parts: float) -> Trajectory:
    """A completion that is not scored yet."""
    return Trajectory(visit.sample_id, visit.variant, completion, math.nan, parts, kl_ref, "", "", step, step)


def outlook(config: Config, name: str, pool: int = 0, hintable: float = 1.0) -> Outlook:
    """What stage `name` of a configuration will do with a pool of so many prompts, `hintable` of which have a hint.

    pool 0: so many that none comes up twice in its turn. A short stage is gone through several times, with other
    prompts, and the mean of these counts.
    """
    stage, tally = config.stages[name], Tally()
    steps = min(stage.steps, max(1, MOST_VISITS // stage.prompts_per_step))
    times = max(1, min(MOST_TIMES, ENOUGH_VISITS // (steps * stage.prompts_per_step)))
    for turn in range(times):
        ids = [f"{turn}/{k}" for k in range(pool or steps * stage.prompts_per_step)]
        go_through(config, name, ids, set(ids[: round(hintable * len(ids))]), FixedPolicy(ids, config.seed), tally,
                   steps=steps, draw_every=max(1, steps // DRAWS))  # fmt: skip
    return tally.outlook(times)


def go_through(
    config: Config, name: str, ids: list[str], with_hint: set[str], policy: Policy, tally: Tally, *,
    steps: int, draw_every: int = 1,
) -> None:
    """The first steps of stage `name` on the prompts `ids`, of which `with_hint` have one, as training takes them."""
    rl, stage, pool = config.rl, config.stages[name], set(ids)
    batch = stage.prompts_per_step
    tracker = RewardTracker(rl.vcrs_window)
    hints = HintPolicy(rl.hints, tracker) if rl.hints.enabled else None
    buffer = ReplayBuffer(rl.replay, advantage_clip=rl.advantage_clip) if rl.n_off else None
    order = SampleOrder(ids, config.seed, name)
    for step in range(steps):
        key = (config.seed, name, step)
        visits = choose_prompts(batch, rl.revisit_share, order, tracker, hints, pool, with_hint, key)
        fresh = [_scored(policy, visit, config, stage, step) for visit in visits]
        batch_mean = float(np.mean([rewards_of(group.trajectories).mean() for group in fresh]))
        tally.add_visits(visits, assign_on_policy(fresh, tracker, batch_mean, std_floor=rl.std_floor))
        replayed = []
        if buffer is not None and step and step % draw_every == 0:
            drawn, advantages, _ = draw_replay(buffer, tracker, rl, n=batch * rl.n_off, step=step, key=key)
            tally.add_draw(drawn, advantages, batch * rl.n_off)
            replayed = [
                Group(_prompt(rows[0].sample_id, rows[0].variant), rows, a, np.zeros(len(rows), bool))
                for rows, a in zip(drawn, advantages, strict=True)
            ]
        policy.learn(fresh, replayed)
        commit(visits, {k: group.trajectories for k, group in enumerate(fresh)}, tracker, hints, buffer)


def _scored(policy: Policy, visit: Visit, config: Config, stage: StageConfig, step: int) -> Group:
    """A visit's fresh group."""
    rows, answers = policy.complete(visit, config.rl.n_on, step)
    scored = weigh_group([row.parts for row in rows], answers, stage.rewards, self_reward=config.rl.self_reward)
    for row, (reward, parts) in zip(rows, scored, strict=True):
        row.reward, row.parts = reward, parts
    return Group(_prompt(visit.sample_id, visit.variant), rows, on_policy=np.ones(len(rows), bool))


def _prompt(sample_id: str, variant: Variant) -> Prompt:
    """A prompt that nobody reads."""
    return Prompt(sample_id, variant, np.zeros(1, np.int64), np.zeros((3, 1), np.int64))
