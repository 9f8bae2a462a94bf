"""A decoder layer around the kernels: packed groups in training and reading, one token a row in decoding.

The residual stream keeps its dtype from the embedding to the last norm (float32 where model.residual says so);
branches are computed in the model's. Parameters, their names and the four linear layers are Megatron-Core's.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings.rotary_pos_embedding import MultimodalRotaryEmbedding
from megatron.core.tensor_parallel.mappings import all_gather_last_dim_from_tensor_parallel_region
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from megatron_avatar.policy.cache import KeyValueCache
from megatron_avatar.policy.kernels.norm import add_norm, norm
from megatron_avatar.policy.kernels.rope import HeadNorms, split_rope
from megatron_avatar.policy.kernels.swiglu import swiglu
from megatron_avatar.policy.mixture import Mixture
from megatron_avatar.policy.routes import Recorder, Routes

PLAIN = (tensor_parallel.ColumnParallelLinear, tensor_parallel.RowParallelLinear)


class Angles(MultimodalRotaryEmbedding):
    """Cosines and sines [2, S, d] in float32 of positions [3, 1, S]: once a pass, for all layers."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        angles = super().forward(*args, **kwargs)[:, 0, 0]
        return torch.stack([angles.cos(), angles.sin()])


class InterleavedAngles(Angles):
    """The same where time, height and width take frequencies in turn: of every three the second is height's and the
    third width's, as many as their sections have; all others are time's."""

    def forward(self, position_ids: Tensor, mrope_section: list[int], **_: Any) -> Tensor:
        turns = position_ids[:, 0, :, None].float() * self.inv_freq  # [3, S, d / 2]
        turn = turns[0].clone()
        for axis in (1, 2):
            own = slice(axis, 3 * mrope_section[axis], 3)
            turn[:, own] = turns[axis, :, own]
        turn = torch.cat([turn, turn], dim=-1)
        return torch.stack([turn.cos(), turn.sin()])


class OmniLayer(TransformerLayer):
    """Norm, attention, norm, SwiGLU or a mixture. Shapes: S packed tokens or R rows, H hidden size, d head size."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        attention_bias: Routes | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The stream [S, 1, H] behind this layer, and what of `context` the layers after it take.

        attention_mask is the segment table, rotary_pos_emb the angles; context are deepstack's features for the places
        context_mask (see `add_features`), attention_bias the routes that a mixture compares with. Arguments all, so
        that every micro-batch in flight has its own, and that recomputation hands their gradients on.
        """
        recompute = self.config.recompute_light and torch.is_grad_enabled()
        attention, keeper = self.self_attention, CheckpointWithoutOutput(fp8=None) if recompute else None
        normed = self._norm(self.input_layernorm, hidden_states, keeper)
        mixed = heads_of(attention, attention.linear_qkv(normed)[0])
        if keeper is not None:
            keeper.discard_output_and_register_recompute(mixed)
        assert rotary_pos_emb is not None
        query, key, value = (x[:, None] for x in split_rope(mixed, rotary_pos_emb, head_norms(attention)))
        branch = attention.linear_proj(attention.core_attention(query, key, value, attention_mask))[0]
        if self.recompute_mlp:
            stream = hidden_states + branch
            feed_forward = partial(self._feed_forward, routes=attention_bias)
            stream = stream + tensor_parallel.checkpoint(feed_forward, False, stream)
        elif recompute:
            stream = hidden_states + branch
            stream = stream + self._light_feed_forward(stream, attention_bias)
        else:
            weight, eps = self.pre_mlp_layernorm.weight, self.config.layernorm_epsilon
            stream, normed = add_norm(branch, hidden_states, weight, eps)
            stream = stream + self._branch(normed, attention_bias)
        return add_features(stream, context, context_mask)

    def _norm(self, module: Any, stream: Tensor, keeper: CheckpointWithoutOutput | None) -> Tensor:
        eps = self.config.layernorm_epsilon
        if keeper is None:
            return norm(stream, module.weight, eps)
        return keeper.checkpoint(partial(norm, eps=eps), stream, module.weight)

    def _feed_forward(self, stream: Tensor, routes: Routes | None) -> Tensor:
        """The branch [S, 1, H], all of which is computed again in the backward pass."""
        normed = norm(stream, self.pre_mlp_layernorm.weight, self.config.layernorm_epsilon)
        return self._branch(normed, routes)

    def _branch(self, normed: Tensor, routes: Routes | None) -> Tensor:
        if isinstance(self.mlp, Mixture):
            return self.mlp(normed, routes)
        return self.mlp.linear_fc2(swiglu(self.mlp.linear_fc1(normed)[0]))[0]

    def _light_feed_forward(self, stream: Tensor, routes: Routes | None) -> Tensor:
        """The same, of which norm and SwiGLU are computed again, and no product."""
        norms, gates = CheckpointWithoutOutput(fp8=None), CheckpointWithoutOutput(fp8=None)
        normed = self._norm(self.pre_mlp_layernorm, stream, norms)
        if isinstance(self.mlp, Mixture):
            branch = self.mlp(normed, routes)
            norms.discard_output_and_register_recompute(branch)
            return branch
        gated = self.mlp.linear_fc1(normed)[0]
        norms.discard_output_and_register_recompute(gated)
        branch = self.mlp.linear_fc2(gates.checkpoint(swiglu, gated))[0]
        gates.discard_output_and_register_recompute(branch)
        return branch

    def decode(
        self, branch: Tensor | None, stream: Tensor, angles: Tensor, cache: KeyValueCache,
        routes: Recorder | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """One token a row: (what the feed-forward adds, the stream before that), both [R, H].

        `branch` is what the layer before adds to the stream, None on a stage's first; angles [2, R, d]; `routes` takes
        down what a mixture chooses.
        """
        attention, eps = self.self_attention, self.config.layernorm_epsilon
        stream, normed = _added(branch, stream, self.input_layernorm.weight, eps)
        mixed = heads_of(attention, project(attention.linear_qkv, normed)[:, None])
        core = attention.core_attention
        attended = cache.attend(core.layer_number, mixed, angles, core.softmax_scale, head_norms(attention))
        stream, normed = add_norm(
            project(attention.linear_proj, attended), stream, self.pre_mlp_layernorm.weight, eps
        )
        if isinstance(self.mlp, Mixture):
            return self.mlp(normed[:, None], routes)[:, 0], stream
        return project(self.mlp.linear_fc2, swiglu(project(self.mlp.linear_fc1, normed))), stream


def _added(branch: Tensor | None, stream: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if branch is None:
        return stream, norm(stream, weight, eps)
    return add_norm(branch, stream, weight, eps)


def add_features(stream: Tensor, features: Tensor | None, places: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Deepstack: the stream [S, 1, H] with the first H columns of features [M, n H] added at `places` [M], and their
    other columns, which are the next layers'; None where none are left."""
    if features is None:
        return stream, None
    assert places is not None
    own, others = features.split([stream.shape[2], features.shape[1] - stream.shape[2]], dim=1)
    stream = stream[:, 0].index_add(0, places, own.to(stream.dtype))[:, None]
    return stream, others if others.shape[1] else None


def head_norms(attention: SelfAttention) -> HeadNorms | None:
    """The norms of queries and keys, in families that have them."""
    if not attention.config.qk_layernorm:
        return None
    return HeadNorms(attention.q_layernorm.weight, attention.k_layernorm.weight, attention.config.layernorm_epsilon)


def heads_of(attention: SelfAttention, mixed: Tensor) -> Tensor:
    """The fused projection's output [S, 1, rows] as [S, groups, share + 2, d]: queries, key and value of each
    key-value head of this rank. With more ranks than key-value heads, those are shared, and gathered here."""
    size, groups = attention.hidden_size_per_attention_head, attention.num_query_groups_per_partition
    total, ranks = attention.config.num_query_groups, attention.world_size
    if total >= ranks:
        return mixed.view(len(mixed), groups, -1, size)
    sharing = ranks // total
    rank = attention.pg_collection.tp.rank()
    mixed = all_gather_last_dim_from_tensor_parallel_region(mixed).view(len(mixed), total, -1, size)
    mixed = mixed[:, rank // sharing : rank // sharing + 1]
    own = (mixed.shape[2] - 2) // sharing
    first = rank % sharing * own
    return torch.cat([mixed[:, :, first : first + own], mixed[:, :, -2:]], dim=2)


def project(linear: nn.Module, x: Tensor) -> Tensor:
    """A linear layer of x [R, columns] without gradient: one product, and the sum over tensor-parallel ranks where its
    columns are split. Adapters and other packages' layers go their own way."""
    if not isinstance(linear, PLAIN) or linear._forward_hooks:
        return linear(x[:, None])[0][:, 0]
    out = F.linear(x, linear.weight, linear.bias)
    if isinstance(linear, tensor_parallel.RowParallelLinear):
        out = tensor_parallel.reduce_from_tensor_model_parallel_region(out)
    return out
