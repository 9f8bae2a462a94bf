"""Generation by the policy that trains: every prompt is read once, and its completions decode against that.

Rows of many prompts of different lengths are in flight together; a row that finishes leaves its room to one that
waits. Work goes in ticks. In a tick every pipeline stage passes one lane of rows on, each a different one, and the
last stage's tokens reach all ranks: with as many lanes as stages, no stage waits for another's tokens.

On a GPU without a pipeline the host runs a step behind: a step's tokens stay on the device, where the next step finds
them, and the host reads them while that one runs. A row whose stop token is read then has run once too often, and what
came of it is dropped; a stop signal is seen a token later.

Randomness is keyed: one uniform number for each (key, completion index, token position), whatever else is in the
batch and however ranks share the work.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_avatar.config.schema import SamplingConfig
from megatron_avatar.policy.backend import Backend
from megatron_avatar.policy.cache import KeyValueCache, Room, Shape
from megatron_avatar.policy.flash import to_device
from megatron_avatar.policy.groups import GroupBatch, pack_groups
from megatron_avatar.policy.kept import decoders_for, kept_bytes
from megatron_avatar.policy.lanes import Lane, Turn, make_jobs, plan_room
from megatron_avatar.policy.lora import keep_up
from megatron_avatar.policy.model import OmniPolicy
from megatron_avatar.policy.routes import assembled
from megatron_avatar.policy.sampling import stop_token_ids, uniforms
from megatron_avatar.records import Completion, Prompt

CACHE_BYTES = 2 << 30  # for keys and values on a machine without a GPU
CACHE_SHARE = 0.6  # of a GPU's free memory


class GenerationStopped(Exception):
    """The `stop` callable asked for the end; nothing was generated. Keyed randomness repeats the call exactly."""


@torch.no_grad()
def generate(
    policy: OmniPolicy,
    prompts: Sequence[Prompt],
    n: int,
    sampling: SamplingConfig,
    keys: Sequence[str],
    *,
    media: Sequence[Tensor | None] | None = None,
    stop: Callable[[], bool] | None = None,
    greedy: bool = False,
    routes: list[list[np.ndarray]] | None = None,
) -> list[list[Completion]]:
    """n completions of each prompt, sampled (or the most likely token each time, if `greedy`).

    `keys` name each prompt's randomness (seed, stage, step, sample id, occurrence). `media` is embed_media's list;
    None lets the policy embed. All ranks of a model replica call it alike and get the same result. `stop` is polled
    at every turn, so at every token; the rank that samples (last stage, first tensor rank) decides for its replica.
    `routes`, an empty list, is filled as the result is, with the experts [L, layers, k] uint8 that each token took in
    this stage's layers, where those are mixtures.

    A completion ends with a stop token, which belongs to it, or unfinished after sampling.max_new_tokens.
    Raises GenerationStopped when `stop` says so; ValueError for settings out of range, and for a prompt whose keys
    and values don't fit in memory; FloatingPointError, on all ranks of the replica, for logits that are not finite.
    """
    if sampling.temperature <= 0 or sampling.max_new_tokens < 1 or sampling.top_k < 0 or not 0 < sampling.top_p <= 1:
        raise ValueError(
            f"sampling needs temperature > 0, max_new_tokens >= 1, top_k >= 0 and 0 < top_p <= 1, got {sampling}; "
            "for the most likely token each time, ask for greedy generation"
        )
    if len(keys) != len(prompts) or n < 1:
        raise ValueError(f"{len(prompts)} prompts need as many keys, got {len(keys)}, and n >= 1, got {n}")
    if not prompts:
        return []
    media = policy.embed_media(prompts) if media is None else media
    generation = Generation(policy, prompts, n, sampling, keys, media, stop, greedy)
    generation.keeps_routes = routes is not None
    with _evaluating(policy), keep_up(policy):
        generation.run_behind() if may_run_behind(policy.backend) else generation.run()
    if routes is not None and generation.routes:
        rows = assembled(generation.routes, generation.counts)
        routes += [rows[first : first + n] for first in range(0, len(rows), n)]
    return generation.completions()


@dataclass
class Drawn:
    """What a turn's step drew, on its way to the host: rows [R], and as float64 [3 * R + 1] ids, log-probabilities and
    the probability cut off, and whether to stop. `packet` stays on the device."""

    rows: np.ndarray
    packet: Tensor
    on_host: Tensor
    arrived: torch.cuda.Event | None

    def read(self) -> np.ndarray:
        """The numbers [3, R]; raises GenerationStopped. Where no step was sent since, the device idles meanwhile."""
        if self.arrived is not None:
            self.arrived.synchronize()
        values = self.on_host.cpu().numpy()
        if values[-1]:
            raise GenerationStopped
        return values[:-1].reshape(3, len(self.rows))


def send(rows: np.ndarray, packet: Tensor) -> Drawn:
    """Start copying `packet` to the host, behind the work that the device has."""
    if packet.device.type != "cuda":
        return Drawn(rows, packet, packet, None)
    on_host, arrived = torch.empty_like(packet, device="cpu", pin_memory=True), torch.cuda.Event()
    on_host.copy_(packet, non_blocking=True)
    arrived.record()
    return Drawn(rows, packet, on_host, arrived)


def may_run_behind(backend: Backend) -> bool:
    """Whether the host reads a step's tokens while the next one runs: in a pipeline the other stages need them, and on
    a CPU nothing runs meanwhile."""
    return backend.device.type == "cuda" and backend.pp == 1


class Generation:
    """One call of `generate` on this rank: the completions so far, and the lanes that make them."""

    def __init__(
        self, policy: OmniPolicy, prompts: Sequence[Prompt], n: int, sampling: SamplingConfig, keys: Sequence[str],
        media: Sequence[Tensor | None], stop: Callable[[], bool] | None, greedy: bool,
    ) -> None:  # fmt: skip
        self.policy, self.backend, self.prompts, self.media, self.n = policy, policy.backend, prompts, media, n
        self.stop, self.stop_ids, self.limit = stop, stop_token_ids(policy), sampling.max_new_tokens
        rows = len(prompts) * n
        self.tokens, self.logprobs = np.zeros((rows, self.limit), np.int64), np.zeros((rows, self.limit), np.float32)
        self.counts, self.ahead = np.zeros((2, rows), np.int64)  # tokens of each row: read by the host, and begun
        self.latest: Drawn | None = None  # of the decode step begun last
        self.finished, self.cut = np.zeros(rows, bool), np.zeros(rows)
        self.keeps_routes, self.routes = False, list[tuple[np.ndarray, np.ndarray, Tensor]]()  # of each decode step
        self.uniforms = np.zeros((rows, 0 if greedy else self.limit))
        if not greedy:
            self.uniforms[:] = [uniforms(key, i, self.limit) for key in keys for i in range(n)]
        self.half = policy.config.params_dtype is torch.float16
        self.last_ids = np.array([prompt.token_ids[-1] for prompt in prompts])
        assert not np.isin(self.last_ids, policy.placeholder_ids).any(), "a prompt ends with text"
        self.last_positions = np.stack([prompt.positions[:, -1] for prompt in prompts], axis=1)
        self.next_positions = np.array([prompt.next_position for prompt in prompts])

        layers = policy.language_model.decoder.layers
        attention, on_gpu = layers[0].self_attention, self.backend.device.type == "cuda"
        kv_heads, size = attention.num_query_groups_per_partition, attention.hidden_size_per_attention_head
        self.queue = deque(make_jobs([len(prompt) - 1 for prompt in prompts], n, self.backend.pp))
        token_bytes = 2 * len(layers) * kv_heads * size * policy.config.params_dtype.itemsize
        room = plan_room(self.queue, self.limit, self.backend.pp, self._cache_tokens(token_bytes))
        self.attentions = [layer.self_attention.core_attention for layer in layers]
        numbers = [attention.layer_number for attention in self.attentions]

        def make_cache(room: Room) -> KeyValueCache:
            dtype, device = policy.config.params_dtype, self.backend.device
            return KeyValueCache(room, numbers, kv_heads, size, dtype, device, static=on_gpu)

        self.decoders = decoders_for(policy, room, sampling, greedy, self.backend.pp, token_bytes, make_cache)
        self.lanes = [Lane(decoder.cache) for decoder in self.decoders]

    def completions(self) -> list[list[Completion]]:
        rows = [
            Completion(tokens[:count].copy(), logprobs[:count].copy(), bool(finished), float(cut / count))
            for tokens, logprobs, count, finished, cut in zip(
                self.tokens, self.logprobs, self.counts, self.finished, self.cut, strict=True
            )
        ]
        return [rows[first : first + self.n] for first in range(0, len(rows), self.n)]

    def _cache_tokens(self, token_bytes: int) -> int:
        """Tokens whose keys and values every rank of the replica has memory for."""
        free = CACHE_BYTES
        if self.backend.device.type == "cuda":
            unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
            free = int(CACHE_SHARE * (torch.cuda.mem_get_info()[0] + unused + kept_bytes(self.policy)))
        tokens = torch.tensor(free // token_bytes, device=self.backend.device)
        if self.backend.tp * self.backend.pp > 1:
            dist.all_reduce(tokens, dist.ReduceOp.MIN, parallel_state.get_model_parallel_group())
        return int(tokens)

    # ------------------------------------------------------------------------------------------------------------
    # Ticks

    def run(self) -> None:
        """Give lanes their turns until all rows are done. A lane's turn enters the first stage in tick t and leaves
        the last in tick t + pp - 1; in the next tick its next turn enters."""
        stages, stage = self.backend.pp, self.backend.pp_rank
        turns: list[Turn | None] = [None] * stages  # of each lane, on its way through the stages
        batches: list[GroupBatch | Shape | None] = [None] * stages
        received, tick = None, 0
        try:
            while True:
                entering = tick % stages
                empty = sum(lane.empty for lane in self.lanes)
                turns[entering] = turn = self.lanes[entering].plan(self.queue, empty)
                batches[entering] = self._prepare(self.lanes[entering], turn)
                if not any(turns):
                    return
                here, before, leaving = ((tick - place) % stages for place in (stage, stage - 1, stages - 1))
                output = None
                if (now := turns[here]) and (batch := batches[here]) is not None:
                    output = self._forward(here, now, batch, received)
                received = self._exchange(output, batches[before])
                if done := turns[leaving]:
                    self._record(self.lanes[leaving], self._send(done, output))
                tick += 1
        finally:
            for attention in self.attentions:
                attention.cache = None

    def run_behind(self) -> None:
        """The same without a pipeline: what a turn drew is read once the next one is on its way."""
        lane, pending = self.lanes[0], None
        try:
            while (turn := self.lanes[0].plan(self.queue, int(lane.empty))) or pending:
                newer = None
                if turn is not None:
                    batch = self._prepare(lane, turn)
                    assert batch is not None
                    newer = self._send(turn, self._forward(0, turn, batch, None))
                    lane.leave(self.ahead[lane.rows] == self.limit)
                if pending is not None:
                    self._record(lane, pending)
                pending = newer
        finally:
            for attention in self.attentions:
                attention.cache = None

    def _prepare(self, lane: Lane, turn: Turn | None) -> GroupBatch | Shape | None:
        """The packed prompts of a turn that reads, the shape of a decode step."""
        if turn is None:
            return None
        if not turn.jobs:
            return lane.cache.prepare(self.ahead[turn.rows])
        prompts = [self.prompts[job.prompt] for job in turn.jobs]
        lane.cache.read([job.rows[0] for job in turn.jobs], np.cumsum([0, *map(len, prompts[:-1])]).tolist())
        # A group of one completion of one token is the prompt itself.
        batch = pack_groups(prompts, [[np.zeros(1, np.int64)]] * len(prompts))
        return batch.pad_to(self.backend.tp if self.policy.config.sequence_parallel else 1)

    def _forward(self, lane: int, turn: Turn, batch: GroupBatch | Shape, received: Tensor | None) -> Tensor | None:
        """A turn's work on this stage: hidden states for the next, tokens and what goes with them [3, R] on the last,
        where turns that read have no result."""
        for attention in self.attentions:
            attention.cache = self.lanes[lane].cache
        if isinstance(batch, Shape):
            rows, prompts = turn.rows, turn.rows // self.n
            counts = self.ahead[rows]
            first = counts == 0  # a row opens with its prompt's last token
            known = self.counts[rows] == counts
            inputs = np.stack([
                np.where(first, self.last_ids[prompts], self.tokens[rows, counts - 1]),
                *np.where(first, self.last_positions[:, prompts], self.next_positions[prompts] + counts - 1),
                counts,
                self.uniforms[rows, counts] if self.uniforms.size else counts,
            ])  # fmt: skip
            drawn = self._still_on_device(rows) if not known.all() else None
            self.ahead[rows] += 1
            decoder = self.decoders[lane]
            output = decoder(batch, inputs, received, drawn)
            if self.keeps_routes and decoder.routes is not None:
                self.routes.append((rows, counts, decoder.routes[: len(rows)].clone()))
            return output
        batch = batch.to(self.backend.device)
        if received is not None:
            self.policy.set_input_tensor(received)
        media = [self.media[job.prompt] for job in turn.jobs]
        index = batch.media_index(self.policy.placeholder_ids) if self.backend.is_first_stage else None
        hidden = self.policy.hidden(batch.token_ids, batch.positions, batch.segments, media, index)
        return None if self.backend.is_last_stage else hidden

    def _still_on_device(self, rows: np.ndarray) -> tuple[Tensor, Tensor | None]:
        """The latest step's tokens of `rows`, and which of the rows they are of (None: of all, in that order)."""
        assert self.latest is not None
        drawn, ids = self.latest.rows, self.latest.packet[: len(self.latest.rows)].clamp(0, self.policy.vocab_size - 1)
        if np.array_equal(drawn, rows):
            return ids, None
        place = np.full(len(self.ahead), -1)
        place[drawn] = np.arange(len(drawn))
        places = np.flatnonzero(place[rows] >= 0)
        device = self.backend.device
        sources, targets = (to_device(torch.from_numpy(x), device) for x in (place[rows][places], places))
        return ids[sources], targets

    def _exchange(self, output: Tensor | None, expected: GroupBatch | Shape | None) -> Tensor | None:
        """Pass hidden states to the next stage, all stages at once; returns the previous one's for the next tick."""
        transfers, received = [], None
        group = parallel_state.get_pipeline_model_parallel_group()
        if output is not None and not self.backend.is_last_stage:
            target = parallel_state.get_pipeline_model_parallel_next_rank()
            transfers.append(dist.P2POp(dist.isend, output.contiguous(), target, group))
        if expected is not None and not self.backend.is_first_stage:
            config = self.policy.config
            if isinstance(expected, Shape):
                length = expected.rows
            else:
                length = len(expected) // (self.backend.tp if config.sequence_parallel else 1)
            received = torch.empty(
                length, 1, config.hidden_size, dtype=config.pipeline_dtype, device=self.backend.device
            )
            source = parallel_state.get_pipeline_model_parallel_prev_rank()
            transfers.append(dist.P2POp(dist.irecv, received, source, group))
        for request in dist.batch_isend_irecv(transfers) if transfers else []:
            request.wait()
        return received

    def _record(self, lane: Lane, drawn: Drawn) -> None:
        """Keep the tokens that the last stage drew; rows that are done leave the lane."""
        live = ~self.finished[drawn.rows]  # others went on before their stop token was read
        rows, (ids, logprobs, cut) = drawn.rows[live], drawn.read()[:, live]
        if not len(rows):
            return
        if not np.isfinite(logprobs).all():
            row = rows[~np.isfinite(logprobs)][0]
            raise FloatingPointError(
                f"the policy's logits are not finite at token {self.counts[row]} of a completion of sample "
                f"{self.prompts[row // self.n].sample_id!r}: its weights, or sums made with them, overflowed; "
                "continue from an earlier checkpoint with a lower learning rate"
                + (", or with model.dtype=bfloat16, which holds larger numbers" if self.half else "")
            )
        self.tokens[rows, self.counts[rows]] = ids
        self.logprobs[rows, self.counts[rows]] = logprobs
        self.cut[rows] += cut
        self.counts[rows] += 1
        self.finished[rows] = np.isin(ids, self.stop_ids)
        lane.leave(self.finished[lane.rows] | (self.counts[lane.rows] == self.limit))

    def _send(self, turn: Turn, output: Tensor | None) -> Drawn:
        """The sampling rank's tokens and what goes with them on every rank of the replica, on their way to the host.

        All ranks stop, or none: the flag travels with the tokens.
        """
        backend, rows = self.backend, len(turn.rows)
        packet = torch.zeros(3 * rows + 1, dtype=torch.float64, device=backend.device)  # exact for ids and float32
        if backend.is_last_stage and rows:
            assert output is not None
            packet[:-1] = output.flatten()
        if self.stop is not None and self.stop():
            packet[-1] = 1
        if backend.tp * backend.pp > 1:
            group = parallel_state.get_model_parallel_group()
            dist.broadcast(packet, dist.get_process_group_ranks(group)[-backend.tp], group)
        drawn = send(turn.rows, packet)
        if rows:
            self.latest = drawn
        return drawn


@contextmanager
def _evaluating(policy: OmniPolicy) -> Iterator[None]:
    training = policy.training
    policy.eval()
    try:
        yield
    finally:
        policy.train(training)
