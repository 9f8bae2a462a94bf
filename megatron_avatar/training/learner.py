"""From groups to a gradient: micro-batches, reference scores, the step's loss, the log-prob gate."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_avatar.config.schema import RLConfig
from megatron_avatar.planning.batches import seen_pairs
from megatron_avatar.planning.seconds import forward_flops, update_flops
from megatron_avatar.policy.backend import Backend
from megatron_avatar.policy.flash import to_device
from megatron_avatar.policy.groups import GroupBatch, pack_groups
from megatron_avatar.policy.lora import lora_adapters
from megatron_avatar.policy.micro_batches import plan_micro_batches
from megatron_avatar.policy.model import OmniPolicy
from megatron_avatar.policy.routes import UNKNOWN, Routes
from megatron_avatar.records import Completion, Group, Prompt, Trajectory
from megatron_avatar.rl.objective import policy_loss, token_weights
from megatron_avatar.rl.shaping import between_tags, temporal_weights, token_places
from megatron_avatar.training.balance import even_out, imbalance, packed_tokens
from megatron_avatar.training.guard import Guard, StepError, error_stats, step_error
from megatron_avatar.training.optim import LEAST_SCALE, Optimization

POSITION_BINS = 20
POLL_EVERY = 8  # micro-batches: asking whether to stop is a message between all ranks
OUTSIDE = -1.0  # the place of a token that the temporal weighting leaves out
Pieces = Callable[[np.ndarray], list[str]]  # token ids [L] to the text of each
Poll = Callable[[], None]  # called by all ranks together; raises to drop what is not applied yet
SKIPS_IN_ROW = 3  # one bad batch is skipped; a run that skips on and on learns nothing
TOLD_OVERFLOWS = 5  # of a stage, a line each
log = logging.getLogger(__name__)


class NonFiniteUpdates(RuntimeError):
    """Several updates in a row had numbers that are not finite."""


@dataclass
class MicroBatch:
    """Groups packed to one row, with what the loss needs for each of its N completion tokens."""

    batch: GroupBatch
    prompts: list[Prompt]
    media: list[torch.Tensor | None]
    members: list[tuple[int, list[int]]]  # (index of the group, indices of its trajectories)
    tensors: dict[str, torch.Tensor]  # each [N]; zeros for a filler
    pairs: float  # of queries and keys that they see
    routes: Routes | None = None  # of a mixture's update


def filler_group() -> Group:
    """A text-only group of one token each, weight zero: keeps ranks with less work in step."""
    prompt = Prompt("", "plain", np.zeros(1, np.int64), np.zeros((3, 1), np.int64))
    completion = Completion(np.zeros(1, np.int64), np.zeros(1, np.float32), True)
    trajectory = Trajectory("", "plain", completion, 0.0, {}, 0.0, "", "", 0, 0)
    return Group(prompt, [trajectory], np.zeros(1, np.float32), np.ones(1, bool), weight=0.0)


class Learner:
    """One optimizer step over groups of any mixture of fresh and replayed completions."""

    def __init__(self, policy: OmniPolicy, optimization: Optimization, backend: Backend, rl: RLConfig,
                 *, train_towers: bool = False, pieces: Pieces | None = None, guard: Guard | None = None) -> None:
        assert pieces is not None or rl.shaping.span == "completion", "tags are found in the tokens' texts"
        self.policy = policy
        self.optimization = optimization
        self.backend = backend
        self.rl = rl
        self.train_towers = train_towers
        self.pieces = pieces
        self.guard = guard or Guard(rl.guard, exact=policy.config.params_dtype is torch.float32)
        self.masked: list[tuple[int, int]] = []  # of the latest rollout: (index of the group, of its trajectory)
        self.error: StepError | None = None  # of its first update
        self.flips: float | None = None  # likewise, the share of routes that generation chose otherwise
        self.usable = True  # whether its first update may be applied, and so may the others
        self.reference: dict[str, torch.Tensor] | None = None

    # ---- micro-batches -------------------------------------------------------------------------

    def micro_batches(self, groups: list[Group], media: list[torch.Tensor | None]) -> list[MicroBatch]:
        """Fill micro-batches to the token budget; equal counts on all data-parallel ranks, one at least.

        Through a pipeline they are of about equal size too.
        """
        budget = self.rl.tokens_per_micro_batch
        lengths = [[len(t.completion) for t in g.trajectories] for g in groups]
        plan = plan_micro_batches([len(g.prompt) for g in groups], lengths, budget)
        count = max(1, *self.backend.all_gather_object_dp(len(plan)))
        if self.backend.pp > 1:
            tokens = [[packed_tokens(len(groups[i].prompt), [lengths[i][k] for k in kept]) for i, kept in members]
                      for members in plan]
            plan = even_out(plan, tokens, count, budget)
        batches = [self._pack([groups[i] for i, _ in members], [media[i] for i, _ in members], members)
                   for members in plan]
        while len(batches) < count:
            batches.append(self._pack([filler_group()], [None], [(-1, [0])]))
        return batches

    def _pack(self, groups: list[Group], media: list, members: list[tuple[int, list[int]]]) -> MicroBatch:
        rows = [[g.trajectories[k].completion.token_ids for k in kept]
                for g, (_, kept) in zip(groups, members, strict=True)]
        batch = pack_groups([g.prompt for g in groups], rows)
        prompts, pairs = [g.prompt for g in groups], seen_pairs(batch.segments)
        return MicroBatch(batch.to(self.backend.device), prompts, media, members, {}, pairs)

    def _attach(self, micro: MicroBatch, groups: list[Group], per_token: dict[str, list[list[np.ndarray]]]) -> None:
        """Concatenate per-completion arrays in the order of the batch's completion tokens."""
        for name, rows in per_token.items():
            flat = [rows[i][k] for i, kept in micro.members if i >= 0 for k in kept]
            values = np.concatenate(flat) if flat else np.zeros(len(micro.batch.target_ids), np.float32)
            micro.tensors[name] = to_device(torch.as_tensor(values), self.backend.device)

    # ---- the schedule --------------------------------------------------------------------------

    def _run(
        self, micros: list[MicroBatch], loss: Callable, *, forward_only: bool, embed: bool, poll: Poll | None
    ) -> list:
        """Run Megatron's schedule (pipelined or not); what `loss` returned last, one entry a micro-batch.

        `embed` runs the encoders here, in place of the embeddings that the micro-batches hold. `poll`, a collective
        call, may raise to drop the update: before the schedule, and before each POLL_EVERY-th micro-batch where there
        is no pipeline, whose stages are never at the same one.
        """
        if poll is not None:
            poll()
        temperature = self.rl.sampling.temperature

        def forward_step(iterator: Iterator[tuple[int, MicroBatch]], model: torch.nn.Module) -> tuple:
            number, micro = next(iterator)
            if poll is not None and self.backend.pp == 1 and number and number % POLL_EVERY == 0:
                poll()
            media = self.policy.embed_media(micro.prompts, grad=True) if embed else micro.media
            output = model(micro.batch, media, temperature, micro.routes)
            return output, lambda out, non_loss_data=False: loss(micro, out)

        return get_forward_backward_func()(
            forward_step_func=forward_step, data_iterator=iter(enumerate(micros)), model=[self.optimization.model],
            num_microbatches=len(micros), seq_length=max(m.batch.token_ids.shape[1] for m in micros),
            micro_batch_size=1, forward_only=forward_only, collect_non_loss_data=forward_only,
        )

    # ---- reference -----------------------------------------------------------------------------

    def snapshot_reference(self) -> None:
        """Keep the policy as it is now as the reference of the stage.

        A copy of what trains: with LoRA the adapters, which add nothing in a run's first stage, and trained encoders.
        """
        self.reference = {n: p.detach().clone() for n, p in self.policy.named_parameters() if p.requires_grad}

    @contextmanager
    def _reference_weights(self) -> Iterator[None]:
        """Swap the reference's storage in; the optimizer's buffers are untouched."""
        assert self.reference is not None
        own = {}
        for name, parameter in self.policy.named_parameters():
            if name in self.reference:
                own[name], parameter.data = parameter.data, self.reference[name]
        try:
            yield
        finally:
            for name, parameter in self.policy.named_parameters():
                if name in own:
                    parameter.data = own[name]

    @torch.no_grad()
    def reference_logprobs(
        self, groups: list[Group], media: list, *, poll: Poll | None = None
    ) -> list[list[np.ndarray]]:
        """Log-probabilities [L] of every completion under the stage's reference, on every rank."""
        micros = self.micro_batches(groups, media)
        with self._reference_weights():
            # Encoders that train have changed since the snapshot: the reference embeds the media by its own.
            outputs = self._run(micros, lambda micro, out: out[0].cpu().numpy(), forward_only=True,
                                embed=self.train_towers, poll=poll)
        outputs = self.backend.broadcast_from_last_stage(outputs)
        scores: list[list[np.ndarray]] = [[np.zeros(0)] * len(g.trajectories) for g in groups]
        for micro, values in zip(micros, outputs, strict=True):
            start = 0
            for i, kept in micro.members:
                for k in kept if i >= 0 else []:
                    length = len(groups[i].trajectories[k].completion)
                    scores[i][k] = values[start : start + length]
                    start += length
        return scores

    # ---- updates -------------------------------------------------------------------------------

    def update(self, groups: list[Group], media: list, reference: list[list[np.ndarray]],
               *, n_on: int, n_off: int, check_logprobs: bool = True, poll: Poll | None = None,
               routes: list[list[np.ndarray]] | None = None) -> dict[str, Any]:
        """One optimizer step on the paper's objective J = J_on + alpha J_off - beta KL.

        n_on and n_off count the completions of the whole step, over all ranks. Returns summed
        statistics of the step; raises LogprobMismatch before anything is applied, and NonFiniteUpdates. With
        `check_logprobs`, in a rollout's first update, completions on which generation and training disagree are masked:
        for its other updates too. Where the guard refuses the first, none is applied and all of them are `masked`.
        `routes` are those that `generate` found for the first groups.
        """
        rl, shaping = self.rl, self.rl.shaping
        per_token: dict[str, list[list[np.ndarray]]] = {
            k: [] for k in ("old", "ref", "advantage", "surrogate_weight", "kl_weight", "completion", "on", "known",
                            "position")
        }  # fmt: skip
        places = [(i, k) for i, group in enumerate(groups) for k in range(len(group.trajectories))]
        self.masked = [] if check_logprobs else self.masked
        serial = 0
        for group, ref in zip(groups, reference, strict=True):
            lengths = [len(t.completion) for t in group.trajectories]
            surrogate_w, kl_w = token_weights(lengths, group.on_policy.tolist(), n_on, n_off, rl.alpha)
            bounds = np.cumsum(lengths)[:-1]
            rows: dict[str, list[np.ndarray]] = {
                "surrogate_weight": np.split(np.asarray(surrogate_w) * group.weight, bounds),
                "kl_weight": np.split(np.asarray(kl_w) * group.weight, bounds),
                "old": [t.completion.logprobs for t in group.trajectories],
                "ref": [r if on else t.completion.logprobs
                        for r, t, on in zip(ref, group.trajectories, group.on_policy, strict=True)],
                "advantage": [], "completion": [], "on": [], "known": [], "position": [],
            }
            for trajectory, advantage, on in zip(group.trajectories, group.advantages, group.on_policy, strict=True):
                length, ids = len(trajectory.completion), trajectory.completion.token_ids
                inside = None
                if shaping.span == "between_tags":
                    assert self.pieces is not None
                    inside = between_tags(self.pieces(ids))
                shaped = advantage * temporal_weights(length, shaping.shape, shaping.lam, inside).numpy()
                rows["advantage"].append(shaped.astype(np.float32))
                rows["completion"].append(np.full(length, serial))
                rows["on"].append(np.full(length, bool(on)))
                rows["known"].append(np.full(length, places[serial] in self.masked))
                rows["position"].append(token_places(length, inside).nan_to_num(nan=OUTSIDE).numpy())
                serial += 1
            for name, values in rows.items():
                per_token[name].append(values)
        micros = self.micro_batches(groups, media)
        for micro in micros:
            self._attach(micro, groups, per_token)
            micro.routes = self._routes(micro, routes) if routes else None
        scale = len(micros) * self.backend.dp  # the schedule averages over micro-batches, DDP over ranks

        found: list[torch.Tensor] = []  # of each micro-batch: its masked tokens' completions, -1 for other tokens

        def loss(micro: MicroBatch, out: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            value, stats, masked = self.loss(micro.tensors, out, judge=check_logprobs)
            found.append(masked)
            return value * scale, stats

        again = partial(self._run, micros, loss, forward_only=False, embed=self.train_towers, poll=None)
        self.optimization.zero_grad()
        stats = self._reduce(again(poll=poll))
        # A stage that isn't the last one has found none.
        serials = set(torch.cat([masked.long() for masked in found]).unique().tolist() if found else ()) - {-1}
        self.masked = [places[serial] for serial in sorted(self.backend.broadcast_from_last_stage(serials))]
        stats["masked"] = sum(self.backend.all_gather_object_dp(len(self.masked)))
        error = step_error(stats)
        if check_logprobs and self.policy.config.experts:  # before the error is judged, which it may explain
            counts = sum((micro.routes.counts.cpu() for micro in micros if micro.routes), torch.zeros(2)).tolist()
            flips, tokens = np.sum(self.backend.all_gather_object(counts), axis=0)
            self.flips = float(flips / tokens) if tokens else None
        if check_logprobs:
            self.error, self.usable = error, self.guard.judge(error, speaks=self.backend.rank == 0)
            if not self.usable:  # then none of it is replayed either
                self.masked = [(i, k) for i, k in places if groups[i].on_policy[k]]
        stats |= (self.error or error).record() | self._loads(micros) | self._flops(micros)
        if self.policy.config.experts:
            stats["routing_flips"] = self.flips
        # Where every prompt of the step was set aside, momentum alone must not move the weights.
        applied = self.usable and n_on + n_off > 0
        stats["grad_norm"], stats["skipped"] = 0.0, True
        if applied:
            stats["grad_norm"], stats["skipped"] = self._step(math.isfinite(error.mean), again)
        return stats | self._scaling()

    def _routes(self, micro: MicroBatch, routes: list[list[np.ndarray]]) -> Routes:
        """A micro-batch's, of groups of which the first have them; replayed completions and fillers have none."""
        layers, shape = self.policy.language_model.decoder.layers, routes[0][0].shape[1:]
        lengths = iter(micro.batch.lengths)
        rows = [routes[i][k] if 0 <= i < len(routes) else np.full((length, *shape), UNKNOWN, np.uint8)
                for i, kept in micro.members for k, length in zip(kept, lengths)]  # noqa: B905  (members share it)
        recorded = to_device(torch.from_numpy(np.concatenate(rows)), self.backend.device)
        return Routes(recorded, micro.batch.target_index, layers[0].layer_number, replay=self.rl.routing_replay)

    def loss(
        self, t: dict[str, torch.Tensor], out: torch.Tensor, *, judge: bool
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
        """A micro-batch's share of the step's loss, its statistics, and its masked tokens' completions [N] (-1 for
        other tokens), from `update`'s tensors [N] a token and the policy's output [2, N]. Without `judge` those are
        masked that are known to be. No shape depends on values: the host never waits for the device here.
        """
        rl, (logprobs, entropy), on = self.rl, out, t["on"].bool()  # a filler isn't on
        error = (logprobs.detach() - t["old"]).abs().double().exp()
        masked, means, fresh = self.guard.to_mask(error, on, t["completion"])
        if not judge:
            masked = t["known"].bool()
        surrogate_weight, kl_weight = (t[name].float().masked_fill(masked, 0) for name in
                                       ("surrogate_weight", "kl_weight"))  # fmt: skip
        value, stats = policy_loss(
            logprobs, t["old"], t["ref"], t["advantage"], surrogate_weight, kl_weight, t["completion"],
            clip_low=rl.clip_low, clip_high=rl.clip_high, dual_clip=rl.dual_clip, ratio_level=rl.ratio_level,
            beta=rl.beta,
        )  # fmt: skip
        real = surrogate_weight > 0
        placed = real & (t["position"] >= 0)
        bins = (t["position"] * POSITION_BINS).long().clamp(0, POSITION_BINS - 1)
        surrogate = stats.pop("per_token_surrogate").abs()
        none = surrogate.new_zeros(POSITION_BINS)
        stats = {k: v.detach().double() for k, v in stats.items()}
        stats["loss"] = value.detach().double().clone()
        stats["entropy_sum"] = entropy.detach().double().where(real, 0).sum()
        stats |= error_stats(error, entropy.detach().double(), on, masked, means, fresh)
        stats["surrogate_bins"] = none.index_add(0, bins, surrogate.where(placed, 0)).double()
        stats["position_bins"] = none.double().index_add(0, bins, placed.double())
        return value, stats, t["completion"].where(masked, -1)

    def _step(self, usable: bool, again: Callable[[], Any]) -> tuple[float, bool]:
        """Apply the gradient, or skip it where it, or what it was made from, is not finite: (norm, skipped). `again`
        makes the gradient once more: from the third overflow in a row on, it tells one from a gradient that no loss
        scale makes finite."""
        optimization, speaks = self.optimization, self.backend.rank == 0
        overflows, scale = optimization.overflows, optimization.loss_scale
        norm, skipped = optimization.step(usable=usable)
        if overflows < optimization.overflows and optimization.overflows_in_row >= SKIPS_IN_ROW:
            with optimization.least_scale():
                optimization.zero_grad()
                again()
            if self._first_not_finite():
                optimization.no_overflow()
        if overflows < optimization.overflows <= TOLD_OVERFLOWS and speaks:
            log.warning("a gradient is beyond float16 at a loss scale of %g: this update is skipped, the next one has "
                        "%g (number %d of the stage; a few are how the scale is found)", scale,
                        optimization.loss_scale, optimization.overflows)  # fmt: skip
        if optimization.skipped_in_row >= SKIPS_IN_ROW:
            place, half = self._first_not_finite(), scale is not None
            what = f"by a loss scale of {LEAST_SCALE:g} too, " * half + f"first in {place}"
            what = what if place else "their squares are not"
            raise NonFiniteUpdates(self._said(what if usable else "the latest one's log-probabilities"))
        return norm, skipped

    def _first_not_finite(self) -> str:
        """The layer at which the gradient on its way from the loss is first not finite on any rank; empty where it is
        finite everywhere. Within a layer the parameters' order is not that of the computation."""
        found = []
        for number, name in self.optimization.not_finite():
            above, _, rest = name.partition(".layers.")
            tower, layer = above.startswith("towers"), name.rpartition(".")[0]
            if rest and not tower:
                module = self.policy.get_submodule(f"{above}.layers.{rest.partition('.')[0]}")
                layer = f"layer {module.layer_number}"  # counted over all stages
            found.append((not tower, self.backend.pp_rank, number, layer))
        places = [place for part in self.backend.all_gather_object(found) for place in part]
        return max(places)[-1] if places else ""

    def _said(self, what: str) -> str:
        """Why a run ends whose updates are not finite; `what` is known of the latest one."""
        half = self.optimization.loss_scale is not None
        more = " Or set model.dtype=bfloat16, whose numbers reach further than float16's." if half else ""
        return (
            f"{SKIPS_IN_ROW} updates in a row were skipped, the latest one number {self.optimization.updates} of the "
            f"stage: their log-probabilities or gradients are not finite ({what}). None was applied; the last "
            f"checkpoint is good. Lower optim.lr, or look for broken samples in the data.{more}"
        )

    def update_sft(self, groups: list[Group], media: list, *, poll: Poll | None = None) -> dict[str, float]:
        """One step of cross-entropy on the completions, averaged over all tokens of the step (NaN without any).

        Raises NonFiniteUpdates.
        """
        micros = self.micro_batches(groups, media)
        tokens = sum(self.backend.all_gather_object_dp(
            sum(len(t.completion) for g in groups for t in g.trajectories if g.weight > 0)))
        scale = len(micros) * self.backend.dp / max(tokens, 1)

        def loss(micro: MicroBatch, out: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            real = micro.members[0][0] >= 0
            nll = -out[0].sum() * float(real)
            return nll * scale, {"nll": nll.detach().double().clone(),
                                 "entropy_sum": out[1].detach().double().sum() * float(real)}

        again = partial(self._run, micros, loss, forward_only=False, embed=self.train_towers, poll=None)
        self.optimization.zero_grad()
        stats = self._reduce(again(poll=poll))
        grad_norm, skipped = self._step(math.isfinite(stats["nll"]), again) if tokens else (0.0, True)
        count = tokens or math.nan
        return {"loss": float(stats["nll"] / count), "entropy": float(stats["entropy_sum"] / count),
                "grad_norm": grad_norm, "skipped": skipped, "tokens": tokens, **self._loads(micros),
                **self._flops(micros), **self._scaling()}

    def _scaling(self) -> dict[str, float]:
        """What only float16 has to log: the next update's loss scale, and the stage's overflows."""
        scale = self.optimization.loss_scale
        return {} if scale is None else {"loss_scale": scale, "overflows": self.optimization.overflows}

    def _flops(self, micros: list[MicroBatch]) -> dict[str, float]:
        """FLOP of the language model in an update, over all data-parallel ranks: needed, and done with what is computed
        again. Encoders that train are left out."""
        config, shape = self.policy.config, self.policy.hf_config
        recompute = config.recompute_granularity or ("light" if config.recompute_light else "none")
        adapters = any(True for _ in lora_adapters(self.policy))
        forward = [forward_flops(shape, len(m.batch), m.pairs, len(m.batch.target_ids)) for m in micros]
        own = [update_flops(flops, recompute, adapters=adapters) for flops in forward]
        needed, done = np.sum([flops for rank in self.backend.all_gather_object_dp(own) for flops in rank], axis=0)
        return {"flops": float(needed), "flops/done": float(done)}

    def _loads(self, micros: list[MicroBatch]) -> dict[str, float]:
        """Packed tokens of the step over all data-parallel ranks, and how unevenly they lie."""
        loads = self.backend.all_gather_object_dp(sum(len(micro.batch) for micro in micros))
        return {"packed_tokens": sum(loads), "imbalance": imbalance(loads)}

    def _reduce(self, stored: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
        """Add the micro-batches' statistics over the schedule and all data-parallel ranks (max for *_max)."""
        local: dict[str, np.ndarray] = {}
        for stats in stored:
            for name, value in stats.items():
                add_stat(local, name, value.cpu().numpy())
        local = self.backend.broadcast_from_last_stage(local)
        total: dict[str, np.ndarray] = {}
        for stats in self.backend.all_gather_object_dp(local):
            for name, value in stats.items():
                add_stat(total, name, value)
        return total


def add_stat(into: dict[str, np.ndarray], name: str, value: np.ndarray) -> None:
    """Statistics are sums, except those named *_max."""
    if name not in into:
        into[name] = value
    else:
        into[name] = np.maximum(into[name], value) if name.endswith("_max") else into[name] + value
