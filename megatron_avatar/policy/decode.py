"""A decode step of a lane on this rank's stage: a token for every row, as a CUDA graph where there is a GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from megatron_avatar.config.schema import SamplingConfig
from megatron_avatar.policy.cache import KeyValueCache, Shape
from megatron_avatar.policy.flash import to_device
from megatron_avatar.policy.mixture import stays_on_device
from megatron_avatar.policy.model import OmniPolicy
from megatron_avatar.policy.routes import Recorder
from megatron_avatar.policy.sampling import draw

INPUTS = 6  # of a row: token, three positions, own tokens stored, uniform number; all exact in float64
# Steps of a shape before it is captured. A capture takes longer than a step, and waits for the device: shapes that are
# met in passing, while rows leave, are not worth it. Libraries and kernels are loaded in these steps too.
PLAIN_STEPS = 2


class Decoder:
    """Runs the steps of the rows in `cache`. From its third step on a shape is a graph that was captured and is
    replayed; its inputs come through tensors that stay, as do the cache's."""

    def __init__(
        self, policy: OmniPolicy, cache: KeyValueCache, sampling: SamplingConfig, banned: Tensor, greedy: bool
    ) -> None:
        self.policy, self.cache, self.sampling, self.banned, self.greedy = policy, cache, sampling, banned, greedy
        configs = {id(module.config): module.config for module in policy.modules() if hasattr(module, "config")}
        self._sequence_parallel = [
            owner
            for owner in (*policy.modules(), *configs.values())
            if getattr(owner, "sequence_parallel", False) is True
        ]
        self._graphs: dict[Shape, tuple[torch.cuda.CUDAGraph, Tensor, Tensor | None, Tensor]] = {}
        self._steps: Counter[Shape] = Counter()  # of each shape, without a graph
        on_gpu, dense = policy.backend.device.type == "cuda", not policy.config.experts
        self._uses_graphs = on_gpu and (dense or stays_on_device(policy.config.params_dtype))
        self.routes: Tensor | None = None  # [rows, layers, k] of the latest step, at one address
        if not dense:
            shape = cache.room.rows, len(policy.language_model.decoder.layers), policy.config.experts_per_token
            self.routes = torch.zeros(shape, dtype=torch.uint8, device=cache.device)

    def forget(self) -> None:
        """Drop the graphs: weights lie at other addresses than when they were captured."""
        self._graphs, self._steps = {}, Counter()

    def __call__(
        self, shape: Shape, rows: np.ndarray, received: Tensor | None,
        drawn: tuple[Tensor, Tensor | None] | None = None,
    ) -> Tensor:  # fmt: skip
        """One step of `rows` [INPUTS, R], R <= shape.rows; `received` [shape.rows, 1, H] is the previous stage's.
        `drawn` are tokens [n] float64 that take the place of those in `rows`, at the places [n], or at all.

        Returns hidden states [shape.rows, 1, H]; on the last stage tokens, log-probabilities and the
        probability cut off by top_k and top_p, float64 [3, R].
        """
        padded = np.zeros((INPUTS, shape.rows))
        padded[:, : rows.shape[1]] = rows
        inputs = to_device(torch.from_numpy(padded), self.cache.device)
        if drawn is not None:
            tokens, places = drawn
            if places is None:
                inputs[0, : len(tokens)] = tokens
            else:
                inputs[0, places] = tokens
        with self._whole_rows():
            output = (self._replay if self._uses_graphs else self.step)(shape, inputs, received)
        return output[:, : rows.shape[1]] if self.policy.post_process else output

    def step(self, shape: Shape, inputs: Tensor, received: Tensor | None) -> Tensor:
        """The work on the device, from tensors to a tensor of shapes that `shape` decides."""
        tokens, positions, counts = inputs[0].long(), inputs[1:4].float(), inputs[4].long()
        self.cache.begin(shape, counts)
        recorder = None if self.routes is None else Recorder()
        hidden = self.policy.decode(tokens, positions, received, self.cache, recorder)
        if recorder is not None and self.routes is not None:
            self.routes[: shape.rows] = recorder.stacked()
        if not self.policy.post_process:
            return hidden
        uniforms = None if self.greedy else inputs[-1]
        drawn = draw(self.policy.head(hidden[:, 0]), uniforms, self.sampling, self.banned)
        return torch.stack([x.double() for x in drawn])

    def _replay(self, shape: Shape, inputs: Tensor, received: Tensor | None) -> Tensor:
        if shape not in self._graphs:
            if self._steps[shape] < PLAIN_STEPS:
                self._steps[shape] += 1
                return self.step(shape, inputs, received)
            if not self._graphs:
                self._pool = torch.cuda.graph_pool_handle()  # one ends with the last graph that used it
            self._graphs[shape] = self._capture(shape, inputs, received)
        graph, kept_inputs, kept_received, output = self._graphs[shape]
        kept_inputs.copy_(inputs)
        if received is not None and kept_received is not None:
            kept_received.copy_(received)
        graph.replay()
        return output

    def _capture(
        self, shape: Shape, inputs: Tensor, received: Tensor | None
    ) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor | None, Tensor]:
        inputs, received = inputs.clone(), None if received is None else received.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):  # NCCL's watchdog may call
            output = self.step(shape, inputs, received)
        return graph, inputs, received, output

    @contextmanager
    def _whole_rows(self) -> Iterator[None]:
        """Without sequence parallelism, which a step of one token a row has no use for."""
        for owner in self._sequence_parallel:
            owner.sequence_parallel = False
        try:
            yield
        finally:
            for owner in self._sequence_parallel:
                owner.sequence_parallel = True
