"""The policy: transformers' encoders of a family in front of a Megatron-Core GPTModel.

Shapes: S packed tokens, H hidden size, W width of media embeddings (H, and H more for each layer that deepstack feeds),
N completion tokens, M media placeholders, V vocabulary. One row of S tokens a call; with sequence parallelism the
decoder holds S / tp of them a rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from torch import Tensor

from megatron_avatar.policy.architecture import LayerConfig, PolicyConfig, placeholder_ids
from megatron_avatar.policy.backend import Backend
from megatron_avatar.policy.cache import KeyValueCache
from megatron_avatar.policy.flash import to_device
from megatron_avatar.policy.fusions import layer_spec
from megatron_avatar.policy.groups import GroupBatch
from megatron_avatar.policy.kernels.norm import add_norm
from megatron_avatar.policy.layer import Angles, InterleavedAngles
from megatron_avatar.policy.logprobs import completion_logprobs, linear_float32
from megatron_avatar.policy.routes import Recorder, Routes
from megatron_avatar.policy.towers import Towers
from megatron_avatar.records import Prompt

# Which axis of its weight a layer shares out among tensor-parallel ranks; the gradient norm asks for it.
SHARDED_AXIS = {
    tensor_parallel.VocabParallelEmbedding: 0,
    tensor_parallel.ColumnParallelLinear: 0,
    tensor_parallel.RowParallelLinear: 1,
}


class LanguageModel(GPTModel):
    """GPTModel that ends at the last hidden state: the head is the policy's, and sees completion tokens only. Angles
    are made once a pass."""

    def __init__(self, config: LayerConfig, *args, **kwargs) -> None:
        super().__init__(config, *args, **kwargs)
        angles = InterleavedAngles if config.mrope_interleaved else Angles
        self.rotary_pos_emb = angles(
            kv_channels=config.kv_channels, rotary_percent=1.0, rotary_base=kwargs["rotary_base"]
        )

    def _postprocess(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        return hidden_states


class OmniPolicy(MegatronModule):
    """One pipeline stage of the policy. The encoders (`towers`) live on the first stage only."""

    def __init__(self, hf_config: PolicyConfig, config: LayerConfig, backend: Backend) -> None:
        super().__init__(config=config)
        text = hf_config.text_config
        self.hf_config = hf_config
        self.backend = backend
        self.vocab_size = text.vocab_size
        self.placeholder_ids = placeholder_ids(hf_config)
        # What Megatron-Core's schedules and gradient finalisation ask of a model.
        self.model_type = ModelType.encoder_or_decoder
        self.kept_generation: object = None  # see kept.py
        self.vp_stage = None
        self.pre_process, self.post_process = backend.is_first_stage, backend.is_last_stage
        self.share_embeddings_and_output_weights = hf_config.tie_word_embeddings

        layer, norm = layer_spec(config)
        self.language_model = LanguageModel(
            config,
            TransformerBlockSubmodules([layer] * get_num_layers_to_build(config), norm),
            vocab_size=-(-self.vocab_size // backend.tp) * backend.tp,
            max_sequence_length=text.max_position_embeddings,
            pre_process=self.pre_process,
            post_process=self.post_process,
            share_embeddings_and_output_weights=self.share_embeddings_and_output_weights,
            position_embedding_type="mrope",
            rotary_base=text.rope_parameters["rope_theta"],
            scatter_embedding_sequence_parallel=False,  # media embeddings go in before the scatter
        )
        for module in self.language_model.modules():  # Megatron-Core marks its shards only where it initialises them
            axis = SHARDED_AXIS.get(type(module))
            if axis is not None and module.weight is not None:
                tensor_parallel.set_tensor_model_parallel_attributes(module.weight, True, axis, 1)
        if self.pre_process:
            self.towers = Towers(hf_config, config.params_dtype)

    def set_train_towers(self, train: bool) -> None:
        """Freeze or train the encoders. Those that train in any stage have to when the model is wrapped for data
        parallelism; from then on they may rest and go on."""
        if self.pre_process:
            self.towers.set_train(train)

    def embed_media(self, prompts: Sequence[Prompt], grad: bool = False) -> list[Tensor | None]:
        """Embeddings [M, W] of each prompt's media (see Towers); None for all prompts off the first stage."""
        return self.towers(prompts, grad) if self.pre_process else [None] * len(prompts)

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor | None] | None) -> None:
        """The hidden states [S, 1, H] that the previous pipeline stage sent."""
        self.language_model.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> Any:
        return self.language_model.shared_embedding_or_output_weight()

    # ------------------------------------------------------------------------------------------------------------
    # Language model

    def hidden(
        self,
        token_ids: Tensor,
        positions: Tensor,
        segments: Tensor,
        media: Sequence[Tensor | None] | None = None,
        media_index: Tensor | None = None,
        routes: Routes | None = None,
    ) -> Tensor:
        """Run this stage's layers on token_ids [1, S] at positions [3, 1, S].

        `segments` is GroupBatch's table. `media` are embed_media's tensors for the places media_index [M] (rising, on
        the host), which the first stage alone looks at. Mixtures compare with `routes`. Returns the hidden states:
        [S, 1, H] on the last stage, [S, 1, H] or with sequence parallelism [S / tp, 1, H] before.
        """
        decoder_input, beside = None, dict[str, Any](attention_bias=routes)
        recompute = self._set_recompute()
        if self.pre_process:
            decoder_input = self.language_model.embedding(token_ids, None)
            parts = [part for part in media or () if part is not None]
            if parts:
                assert media_index is not None
                decoder_input, deep = self._insert(decoder_input, torch.cat(parts), media_index)
                beside |= deep
            if self.config.sequence_parallel:
                decoder_input = tensor_parallel.scatter_to_sequence_parallel_region(decoder_input)
            if recompute and not decoder_input.requires_grad:
                decoder_input.requires_grad_()  # else the first layer's recomputation would drop its gradients
        hidden = self.language_model(token_ids, positions, segments, decoder_input, extra_block_kwargs=beside)
        if self.post_process and self.config.sequence_parallel:
            # The head sums its input's gradient over the ranks: each takes its own part of it.
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        return hidden

    def _insert(self, embedded: Tensor, features: Tensor, places: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Put media embeddings [M, W] into embedded tokens [S, 1, H] at `places` [M]; the columns behind H are
        deepstack's, and go with their places to the layers (see layer.add_features) as the decoder's context."""
        assert len(features) == len(places), "media embeddings and placeholders differ in number"
        width, index = self.config.hidden_size, to_device(places, embedded.device)
        own, others = features[:, :width].to(embedded.dtype), features[:, width:]
        embedded = embedded[:, 0].index_copy(0, index, own)[:, None]
        if not others.numel():
            return embedded, {}
        if self.config.sequence_parallel:
            share = len(embedded) // self.backend.tp
            first = share * self.backend.tp_rank
            here = slice(*torch.searchsorted(places, torch.tensor([first, first + share])).tolist())
            # Each rank has the gradient of its own tokens; the encoders want all of it on every rank.
            others = tensor_parallel.copy_to_tensor_model_parallel_region(others)[here]
            index = index[here] - first
        return embedded, dict(context=others, context_mask=index)

    def decode(
        self, token_ids: Tensor, positions: Tensor, received: Tensor | None, cache: KeyValueCache,
        routes: Recorder | None = None,
    ) -> Tensor:  # fmt: skip
        """Run this stage's layers on one token a row, without gradient: token_ids [R], positions [3, R].

        `received` [R, 1, H] is the stream of the stage before; `routes` takes down what mixtures choose. Returns the
        stream [R, 1, H], normed on the last stage.
        """
        model: Any = self.language_model
        if self.pre_process:
            stream = model.embedding(token_ids[None], None)[:, 0]
        else:
            assert received is not None
            stream = received[:, 0]
        angles = model.rotary_pos_emb(positions[:, None], self.config.mrope_section)
        branch: Any = None  # a stage has a layer at least, which gives it
        for layer in model.decoder.layers:
            branch, stream = layer.decode(branch, stream, angles, cache, routes)
        if not self.post_process:
            return (stream + branch)[:, None]
        final = model.decoder.final_layernorm
        return add_norm(branch, stream, final.weight, final.eps)[1][:, None]

    def _set_recompute(self) -> bool:
        """Let layers recompute where a backward pass follows, and there alone; returns whether they do."""
        needed = torch.is_grad_enabled()
        if self.config.recompute_granularity is None:
            return needed and self.config.recompute_light
        if self.language_model.training != needed:
            self.language_model.train(needed)
        if self.config.recompute_granularity == "selective":
            for layer in self.language_model.decoder.layers:  # every time: train() and eval() don't set it
                layer.recompute_mlp = needed  # Megatron-Core asks for `training` everywhere else
        return needed

    @property
    def output_weight(self) -> Tensor:
        """This rank's rows [V / tp, H] of the output layer, of the vocabulary padded to a multiple of tp."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.language_model.output_layer.weight

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [n, V], float32, over the whole, unpadded vocabulary of hidden states [n, H] on the last stage."""
        logits = tensor_parallel.gather_from_tensor_model_parallel_region(linear_float32(hidden, self.output_weight))
        return logits[:, : self.vocab_size]

    def forward(
        self, batch: GroupBatch, media: Sequence[Tensor | None] | None = None, temperature: float = 1.0,
        routes: Routes | None = None,
    ) -> Tensor:  # fmt: skip
        """Score the completions of packed groups, `media` being embed_media's list for the batch's prompts; a mixture
        compares its choices with `routes`.

        The last stage returns float32 [2, N]: log-probability and entropy of each completion token. Earlier stages
        return hidden states. Logits of the prompt are never computed.
        """
        hidden = self.hidden(*self._inputs(batch, media, routes))
        if not self.post_process:
            return hidden
        scores = completion_logprobs(
            hidden[batch.target_index, 0],
            self.output_weight,
            batch.target_ids,
            temperature=temperature,
            vocab_size=self.vocab_size,
            group=parallel_state.get_tensor_model_parallel_group(),
        )
        return torch.stack(scores)

    def _inputs(
        self, batch: GroupBatch, media: Sequence[Tensor | None] | None, routes: Routes | None = None
    ) -> tuple:  # fmt: skip
        """`hidden`'s arguments for a batch."""
        batch = batch.pad_to(self.backend.tp if self.config.sequence_parallel else 1)
        index = None if media is None or not self.pre_process else batch.media_index(self.placeholder_ids)
        return batch.token_ids, batch.positions, batch.segments, media, index, routes

    # ------------------------------------------------------------------------------------------------------------
    # Through the pipeline, outside of Megatron-Core's schedules

    @torch.no_grad()
    def run_pipeline(self, token_ids: Tensor, *args, **kwargs) -> Tensor | None:
        """`hidden` through all stages, without gradient: hidden states [S, 1, H] on the last stage, None before.

        Every stage of the pipeline calls it with the same arguments (media count on the first only).
        """
        group = parallel_state.get_pipeline_model_parallel_group()
        if not self.pre_process:
            share = self.backend.tp if self.config.sequence_parallel else 1
            received = torch.empty(
                token_ids.shape[1] // share, 1, self.config.hidden_size,
                dtype=self.config.pipeline_dtype, device=self.backend.device,
            )  # fmt: skip
            dist.recv(received, parallel_state.get_pipeline_model_parallel_prev_rank(), group)
            self.set_input_tensor(received)
        hidden = self.hidden(token_ids, *args, **kwargs)
        if self.post_process:
            return hidden
        dist.send(hidden.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank(), group)
        return None

    @torch.no_grad()
    def logits(self, batch: GroupBatch, media: Sequence[Tensor | None] | None = None) -> Tensor | None:
        """Logits [S, V] of every token on the last stage, None before: for comparisons, not for training."""
        hidden = self.run_pipeline(*self._inputs(batch, media))
        return None if hidden is None else self.head(hidden[: len(batch), 0])
