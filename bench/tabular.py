"""A policy without a model, for bench/dynamics.py: tables of logits that prompts of one kind share.

A completion is a few decisions of one token each, and right where all of them are. What is learned is what prompts of
a kind have in common, so that prompts that were never trained on gain from it; each prompt makes its decisions easier
or harder by a fixed amount of its own. A hint makes the right choices likelier. Updates are the run's own objective,
followed by plain gradient descent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from megatron_avatar.config.schema import RLConfig
from megatron_avatar.keyed import keyed_rng
from megatron_avatar.planning.dynamics import trajectory
from megatron_avatar.records import Completion, Group, Trajectory
from megatron_avatar.rl.objective import kl_k3, policy_loss, token_weights
from megatron_avatar.rl.shaping import temporal_weights
from megatron_avatar.rl.step import Visit

OPTIONS = 8  # of a decision; the first one is right
VARIANTS = ("plain", "hinted")
SPREAD = 0.5  # standard deviation of what a prompt adds to the logit of its right options


@dataclass(frozen=True)
class Kind:
    """A share of a world's prompts, all of whose `decisions` have to be right: `success` is how often they are at the
    start, `hinted` with a hint. `learnable` False: each prompt has decisions of its own, and nothing carries over."""

    share: float
    decisions: int
    success: float
    hinted: float
    learnable: bool = True


@dataclass(frozen=True)
class World:
    """Kinds of prompts and the learning rate; `transfer` False: what is learned from hinted prompts stays with
    them. `lure` is how much likelier than other wrong options the second one is, in every decision, as a logit."""

    kinds: tuple[Kind, ...]
    lr: float
    transfer: bool = True
    lure: float = 0.0
    rewards: tuple[tuple[str, float], ...] = (("format", 0.5), ("accuracy", 0.5))


class Tabular:
    """The policy of one training; see the module's text. `pool` are its training prompts."""

    def __init__(self, world: World, rl: RLConfig, pool: Sequence[str], held_out: int, seed: int) -> None:
        self.world, self.rl, self.updates = world, rl, 0
        shares = np.array([kind.share for kind in world.kinds])
        rng = keyed_rng("tabular", seed)
        edges = np.rint(np.cumsum(shares) / shares.sum() * len(pool)).astype(int)
        kinds = np.searchsorted(edges, np.arange(len(pool)), side="right")
        deepest = max(kind.decisions for kind in world.kinds)
        self._prompts: dict[str, tuple[int, np.ndarray]] = {
            name: (int(kind), rng.normal(0, SPREAD, deepest)) for name, kind in zip(pool, kinds, strict=True)
        }
        self._held_out = rng.normal(0, SPREAD, (held_out, deepest))
        # One table a kind, and one a prompt of a kind that can't be learned; the same again for hinted prompts.
        rows = len(world.kinds) + len(pool)
        self._own = {name: len(world.kinds) + k for k, name in enumerate(pool)}
        start = torch.zeros(rows, deepest, OPTIONS, dtype=torch.float64)
        start[:, :, 1] = world.lure
        for k, kind in enumerate(world.kinds):
            start[k, :, 0] = self._logit(kind.success, kind)
        for name, (k, _) in self._prompts.items():
            start[self._own[name]] = start[k]
        self._lift = [self._logit(kind.hinted, kind) - self._logit(kind.success, kind) for kind in world.kinds]
        self.tables = torch.stack([start, start.clone()]).requires_grad_()  # [plain or hinted, row, decision, option]
        self._reference = self.tables.detach().clone()
        self._lay_out(deepest)

    def _lay_out(self, deepest: int) -> None:
        """Of every prompt, plain and hinted: which tables it reads, and what it adds to the right options' logits."""
        names = list(self._prompts)
        self._number = {(name, variant): (v, k) for k, name in enumerate(names) for v, variant in enumerate(VARIANTS)}
        kinds = np.array([k for k, _ in self._prompts.values()])
        learnable = np.array([kind.learnable for kind in self.world.kinds])[kinds]
        rows = np.where(learnable, kinds, [self._own[name] for name in names])
        table = np.array([0, int(not self.world.transfer)])  # hinted prompts' own, where nothing carries over
        place = table[:, None, None] * len(self.tables[0]) + rows[:, None]
        self._depth = np.array([kind.decisions for kind in self.world.kinds])[kinds]
        self._place = place * deepest + np.arange(deepest)  # [variant, prompt, decision] among all tables' decisions
        own = np.stack([own for _, own in self._prompts.values()])
        self._shift = own + np.array([0.0, 1.0])[:, None, None] * np.array(self._lift)[kinds][:, None]
        self._shift_of, self._place_of = torch.from_numpy(self._shift), torch.from_numpy(self._place)
        self._before = self._all_logprobs(self._reference)
        self._now: tuple[np.ndarray, np.ndarray] | None = None  # log-probabilities and k3 as the tables stand

    def _all_logprobs(self, tables: Tensor) -> Tensor:
        """Log-probabilities [variant, prompt, decision, option]."""
        return _shifted(tables.reshape(-1, OPTIONS)[self._place_of], self._shift_of).log_softmax(-1)

    def _logit(self, success: float, kind: Kind) -> float:
        """The right option's logit under which a completion succeeds so often."""
        one = success ** (1 / kind.decisions)
        return float(np.log(one / (1 - one) * (OPTIONS - 2 + np.exp(self.world.lure))))

    # ---- generation ----------------------------------------------------------------------------

    def complete(self, visit: Visit, n: int, step: int) -> tuple[list[Trajectory], list[str | None]]:
        if self._now is None:
            logprobs = self._all_logprobs(self.tables.detach())
            self._now = logprobs.numpy(), kl_k3(logprobs, self._before).numpy()
        number = self._number[visit.sample_id, visit.variant]
        depth = self._depth[number[1]]
        logprobs, kls = (values[number][:depth] for values in self._now)
        noise = keyed_rng("tabular", visit.key).gumbel(size=(n, depth, OPTIONS))
        ids = (logprobs + noise).argmax(-1)  # [n, depth]
        decision = np.arange(depth)
        scores, kl = logprobs[decision, ids].astype(np.float32), kls[decision, ids].mean(-1).tolist()
        right = (ids == 0).all(-1).astype(float).tolist()
        rows = [
            trajectory(visit, Completion(ids[i], scores[i], True), step, kl[i], format=1.0, accuracy=right[i],
                       correct=right[i])
            for i in range(n)
        ]  # fmt: skip
        return rows, ["-".join(map(str, answer)) for answer in ids.tolist()]

    # ---- updates -------------------------------------------------------------------------------

    def learn(self, fresh: list[Group], replayed: list[Group]) -> None:
        """`updates_per_rollout` steps of the objective, as the learner puts it together."""
        rl, groups = self.rl, [*fresh, *replayed]
        counts = [sum(len(g.trajectories) for g in part) for part in (fresh, replayed)]
        rows = [t for g in groups for t in g.trajectories]
        numbers = tuple(np.array([self._number[t.sample_id, t.variant] for t in rows]).T)
        lengths = self._depth[numbers[1]]
        there = np.arange(self._place.shape[-1]) < lengths[:, None]
        at, shift = torch.from_numpy(self._place[numbers][there]), torch.from_numpy(self._shift[numbers][there])
        surrogate, kl = token_weights(lengths, np.concatenate([g.on_policy for g in groups]), *counts, rl.alpha)
        shape = np.concatenate([_weights(length, rl.shaping.shape, rl.shaping.lam) for length in lengths.tolist()])
        advantages = np.concatenate([g.advantages for g in groups]).repeat(lengths) * shape
        index = torch.arange(len(rows)).repeat_interleave(torch.from_numpy(lengths))
        ids = torch.from_numpy(np.concatenate([t.completion.token_ids for t in rows])).long()
        old = torch.from_numpy(np.concatenate([t.completion.logprobs for t in rows])).double()
        ref = self._scores(self._reference, at, shift, ids)
        for _ in range(rl.updates_per_rollout):
            loss, _ = policy_loss(
                self._scores(self.tables, at, shift, ids), old, ref, torch.from_numpy(advantages).double(),
                surrogate.double(), kl.double(), index, clip_low=rl.clip_low, clip_high=rl.clip_high,
                dual_clip=rl.dual_clip, ratio_level=rl.ratio_level, beta=rl.beta,
            )
            (gradient,) = torch.autograd.grad(loss, self.tables)
            with torch.no_grad():
                self.tables -= self.world.lr * gradient
            self.updates, self._now = self.updates + 1, None

    @staticmethod
    def _scores(tables: Tensor, where: Tensor, shift: Tensor, ids: Tensor) -> Tensor:
        """Log-probabilities [N] of the chosen options; `where` [N] numbers the tables' decisions."""
        logits = tables.reshape(-1, OPTIONS).index_select(0, where)
        return _shifted(logits, shift).log_softmax(-1).gather(-1, ids[:, None])[:, 0]

    # ---- evaluation ----------------------------------------------------------------------------

    def success(self) -> float:
        """Exact mean success of plain prompts that were not trained on, kinds in their shares."""
        total = 0.0
        for k, kind in enumerate(self.world.kinds):
            own = torch.from_numpy(self._held_out[:, : kind.decisions])
            tables = (self.tables if kind.learnable else self._reference)[0, k, : kind.decisions].detach()
            right = _shifted(tables.expand(len(own), -1, -1), own).softmax(-1)[..., 0]
            total += kind.share * float(right.prod(-1).mean())
        return total / sum(kind.share for kind in self.world.kinds)


@lru_cache
def _weights(length: int, shape: str, lam: float) -> np.ndarray:
    return temporal_weights(length, shape, lam).numpy()


def _shifted(logits: Tensor, added: Tensor) -> Tensor:
    """Logits [..., options] with `added` [...] on the right option."""
    return torch.cat([logits[..., :1] + added[..., None], logits[..., 1:]], dim=-1)
