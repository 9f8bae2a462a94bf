"""The policy: transformers' Qwen2.5-Omni encoders in front of a Megatron-Core GPTModel.

Shapes: S packed tokens, H hidden size, N completion tokens, M media placeholders, V vocabulary. One row of S tokens
a call; with sequence parallelism the decoder holds S / tp of them a rank.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from transformers import Qwen2_5OmniConfig, Qwen2_5OmniThinkerConfig
from transformers.initialization import no_init_weights
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniAudioEncoder, Qwen2_5OmniVisionEncoder

from megatron_avatar.config.schema import ModelConfig, ParallelConfig
from megatron_avatar.policy.attention import GroupBatch, GroupCoreAttention
from megatron_avatar.policy.backend import Backend
from megatron_avatar.policy.logprobs import completion_logprobs
from megatron_avatar.records import Prompt

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Which axis of its weight a layer shares out among tensor-parallel ranks; the gradient norm asks for it.
SHARDED_AXIS = {
    tensor_parallel.VocabParallelEmbedding: 0,
    tensor_parallel.ColumnParallelLinear: 0,
    tensor_parallel.RowParallelLinear: 1,
}


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm, with the mark that makes Megatron-Core sum its gradient under sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel


class LanguageModel(GPTModel):
    """GPTModel that ends at the last hidden state: the head is the policy's, and sees completion tokens only."""

    def _postprocess(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        return hidden_states


class OmniPolicy(MegatronModule):
    """One pipeline stage of the policy. Encoders (`visual`, `audio_tower`) live on the first stage only."""

    def __init__(self, hf_config: Qwen2_5OmniThinkerConfig, config: TransformerConfig, backend: Backend) -> None:
        super().__init__(config=config)
        text = hf_config.text_config
        self.hf_config = hf_config
        self.backend = backend
        self.vocab_size = text.vocab_size
        self.placeholder_ids = (hf_config.image_token_id, hf_config.video_token_id, hf_config.audio_token_id)
        # What Megatron-Core's schedules and gradient finalisation ask of a model.
        self.model_type = ModelType.encoder_or_decoder
        self.vp_stage = None
        self.pre_process, self.post_process = backend.is_first_stage, backend.is_last_stage
        self.share_embeddings_and_output_weights = hf_config.tie_word_embeddings

        layer = get_gpt_layer_local_spec(normalization="RMSNorm")
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
        layer.submodules.self_attention.submodules.core_attention = GroupCoreAttention
        self.language_model = LanguageModel(
            config,
            TransformerBlockSubmodules([layer] * get_num_layers_to_build(config), RMSNorm),
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
            with no_init_weights():
                self.visual = Qwen2_5OmniVisionEncoder._from_config(hf_config.vision_config, dtype=config.params_dtype)
                self.audio_tower = Qwen2_5OmniAudioEncoder._from_config(
                    hf_config.audio_config, dtype=config.params_dtype
                )

    def set_train_towers(self, train: bool) -> None:
        """Freeze or train the encoders. Call it before the model is wrapped for data parallelism."""
        if self.pre_process:
            self.visual.requires_grad_(train)
            self.audio_tower.requires_grad_(train)
            # The Thinker embeds these two tokens as text: their parameter never gets a gradient.
            self.audio_tower.audio_bos_eos_token.requires_grad_(False)

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor | None] | None) -> None:
        """The hidden states [S, 1, H] that the previous pipeline stage sent."""
        self.language_model.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        return self.language_model.shared_embedding_or_output_weight()

    # ------------------------------------------------------------------------------------------------------------
    # Media

    def embed_media(self, prompts: Sequence[Prompt], grad: bool = False) -> list[Tensor | None]:
        """Embeddings [M, H] of each prompt's media, in the order of its placeholders; None without media.

        Each encoder runs once over all prompts. With `grad` (training towers) it runs even without media, on a
        dummy that gets a gradient of zero, so that all data-parallel ranks reduce the same parameters.
        None for all prompts off the first pipeline stage. Raises ValueError where placeholders and features differ
        in number.
        """
        if not self.pre_process:
            return [None] * len(prompts)
        with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
            visual, visual_counts = self._embed_pixels(prompts, grad)
            audio, audio_counts = self._embed_sound(prompts, grad)
            media = [
                self._interleave(*parts)
                for parts in zip(prompts, visual.split(visual_counts), audio.split(audio_counts), strict=True)
            ]
            if grad and media:  # an empty slice ties the dummy to the loss
                media[0] = torch.cat([visual[:0], audio[:0], visual[:0] if media[0] is None else media[0]])
        return media

    def _embed_pixels(self, prompts: Sequence[Prompt], always: bool) -> tuple[Tensor, list[int]]:
        """Embeddings of all pictures [sum, H], and how many of them each prompt has."""
        vision = self.hf_config.vision_config
        merged = vision.spatial_merge_size**2
        shown = [prompt for prompt in prompts if prompt.pixels is not None]
        counts = [0 if prompt.pixels is None else len(prompt.pixels) // merged for prompt in prompts]
        if not shown and not always:
            return self._no_media(), counts
        if shown:
            pixels, grid = (torch.cat([getattr(p, name) for p in shown]) for name in ("pixels", "grid_thw"))
        else:
            side = vision.spatial_merge_size
            width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
            pixels, grid = torch.zeros(merged, width), torch.tensor([[1, side, side]])
        device = self.backend.device
        features = self.visual(pixels.to(device, self.config.params_dtype), grid.to(device)).pooler_output
        return features[: sum(counts)], counts

    def _embed_sound(self, prompts: Sequence[Prompt], always: bool) -> tuple[Tensor, list[int]]:
        """Embeddings of all sounds [sum, H], and how many of them each prompt has."""
        heard = [prompt for prompt in prompts if prompt.mel is not None]
        counts = [0 if p.mel is None else sum(_audio_tokens(n) for n in p.mel_lengths.tolist()) for p in prompts]
        if not heard and not always:
            return self._no_media(), counts
        if heard:
            mel, lengths = torch.cat([p.mel for p in heard], dim=1), torch.cat([p.mel_lengths for p in heard])
        else:
            mel, lengths = torch.zeros(self.hf_config.audio_config.num_mel_bins, 4), torch.tensor([4])
        device = self.backend.device
        features = self.audio_tower(mel.to(device, self.config.params_dtype), lengths.to(device)).last_hidden_state
        return features[: sum(counts)], counts

    def _no_media(self) -> Tensor:
        return torch.empty(0, self.config.hidden_size, dtype=self.config.params_dtype, device=self.backend.device)

    def _interleave(self, prompt: Prompt, visual: Tensor, audio: Tensor) -> Tensor | None:
        """Put one prompt's visual and audio embeddings into the order of its placeholders."""
        ids = torch.from_numpy(prompt.token_ids)
        is_audio = ids[torch.isin(ids, torch.tensor(self.placeholder_ids))] == self.hf_config.audio_token_id
        for name, features, wanted in (("visual", visual, ~is_audio), ("audio", audio, is_audio)):
            if len(features) != wanted.sum():
                raise ValueError(
                    f"prompt of sample {prompt.sample_id!r} has {wanted.sum()} {name} placeholders, but its media give "
                    f"{len(features)} {name} embeddings: its tokens and its media don't belong together"
                )
        if not len(is_audio):
            return None
        order = torch.where(is_audio, len(visual) + is_audio.cumsum(0) - 1, (~is_audio).cumsum(0) - 1)
        return torch.cat([visual, audio])[order.to(visual.device)]

    # ------------------------------------------------------------------------------------------------------------
    # Language model

    def hidden(
        self,
        token_ids: Tensor,
        positions: Tensor,
        segments: Tensor | None,
        media: Sequence[Tensor | None] | None = None,
        media_index: Tensor | None = None,
    ) -> Tensor:
        """Run this stage's layers on token_ids [1, S] at positions [3, 1, S].

        `segments` is GroupBatch's table; the rows of a decode step (S rows, one token each) have none, and their
        core attentions a ready cache. `media` are embed_media's tensors for the places media_index [M]. Returns
        the hidden states: [S, 1, H] on the last stage, [S, 1, H] or with sequence parallelism [S / tp, 1, H] before.
        """
        decoder_input = None
        if self.pre_process:
            decoder_input = self.language_model.embedding(token_ids, None)
            features = [features for features in media or () if features is not None]
            if features:
                features = torch.cat(features).to(decoder_input.dtype)
                assert len(features) == len(media_index), "media embeddings and placeholders differ in number"
                decoder_input = decoder_input[:, 0].index_copy(0, media_index, features)[:, None]
            if self.config.sequence_parallel:
                decoder_input = tensor_parallel.scatter_to_sequence_parallel_region(decoder_input)
        hidden = self.language_model(token_ids, positions, segments, decoder_input)
        if self.post_process and self.config.sequence_parallel:
            # The head sums its input's gradient over the ranks: each takes its own part of it.
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        return hidden

    @property
    def output_weight(self) -> Tensor:
        """This rank's rows [V / tp, H] of the output layer, of the vocabulary padded to a multiple of tp."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.language_model.output_layer.weight

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [n, V] over the whole, unpadded vocabulary of hidden states [n, H] on the last stage."""
        logits = tensor_parallel.gather_from_tensor_model_parallel_region(F.linear(hidden, self.output_weight))
        return logits[:, : self.vocab_size]

    def forward(
        self, batch: GroupBatch, media: Sequence[Tensor | None] | None = None, temperature: float = 1.0
    ) -> Tensor:
        """Score the completions of packed groups, `media` being embed_media's list for the batch's prompts.

        The last stage returns float32 [2, N]: log-probability and entropy of each completion token. Earlier stages
        return hidden states. Logits of the prompt are never computed.
        """
        hidden = self.hidden(*self._inputs(batch, media))
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

    def _inputs(self, batch: GroupBatch, media: Sequence[Tensor | None] | None) -> tuple:
        """`hidden`'s arguments for a batch."""
        batch = batch.pad_to(self.backend.tp if self.config.sequence_parallel else 1)
        index = None if media is None else batch.media_index(self.placeholder_ids)
        return batch.token_ids, batch.positions, batch.segments, media, index

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
                dtype=self.config.params_dtype, device=self.backend.device,
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


def build_policy(hf_folder: str | Path, backend: Backend, model: ModelConfig, parallel: ParallelConfig) -> OmniPolicy:
    """This rank's part of the policy that `hf_folder`/config.json describes; weights.load_hf fills it.

    Raises ValueError where the folder holds another architecture, or doesn't split into tp and pp.
    """
    hf_config = read_thinker_config(hf_folder)
    text = hf_config.text_config
    heads, groups, tp, pp = text.num_attention_heads, text.num_key_value_heads, backend.tp, backend.pp
    if heads % tp or text.intermediate_size % tp or (groups % tp and tp % groups):
        raise ValueError(
            f"parallel.tp={tp} doesn't divide the {heads} attention heads, {groups} key-value heads and "
            f"{text.intermediate_size} feed-forward units of {hf_folder}: choose a tp that does"
        )
    if text.num_hidden_layers % pp:
        raise ValueError(
            f"parallel.pp={pp} doesn't divide the {text.num_hidden_layers} layers of {hf_folder}: choose a pp that does"
        )
    if model.dtype not in DTYPES:
        raise ValueError(f"model.dtype={model.dtype!r} is unknown: choose one of {', '.join(DTYPES)}")
    dtype = DTYPES[model.dtype]
    config = TransformerConfig(
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        num_attention_heads=heads,
        num_query_groups=groups,
        ffn_hidden_size=text.intermediate_size,
        normalization="RMSNorm",
        layernorm_epsilon=text.rms_norm_eps,
        add_bias_linear=False,
        add_qkv_bias=True,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        mrope_section=list(text.rope_parameters["mrope_section"]),
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        sequence_parallel=parallel.sequence_parallel and tp > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        perform_initialization=False,
        use_cpu_initialization=backend.device.type == "cpu",
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # asked for by variable_seq_lengths, even in a dense model
        # Fused kernels need Apex or Transformer Engine.
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        **(dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
           if parallel.recompute else {}),
    )  # fmt: skip
    policy = OmniPolicy(hf_config, config, backend).to(backend.device)
    policy.set_train_towers(False)
    return policy


def read_model_type(hf_folder: str | Path) -> str:
    """The folder's class: "qwen2_5_omni" (all of it) or "qwen2_5_omni_thinker"; ValueError for everything else."""
    path = Path(hf_folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} doesn't exist: model.path has to name a Hugging Face folder of Qwen2.5-Omni")
    model_type = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    if model_type not in ("qwen2_5_omni", "qwen2_5_omni_thinker"):
        raise ValueError(
            f"{path}: model_type is {model_type!r}, but the policy is built for 'qwen2_5_omni' and "
            "'qwen2_5_omni_thinker': point model.path to a Qwen2.5-Omni folder"
        )
    return model_type


def read_thinker_config(hf_folder: str | Path) -> Qwen2_5OmniThinkerConfig:
    """The Thinker's configuration in a folder of the full Omni class or of the Thinker alone."""
    if read_model_type(hf_folder) == "qwen2_5_omni":
        config = Qwen2_5OmniConfig.from_pretrained(hf_folder).thinker_config
    else:
        config = Qwen2_5OmniThinkerConfig.from_pretrained(hf_folder)
    rope = config.text_config.rope_parameters
    if config.text_config.use_sliding_window or rope["rope_type"] != "default" or "mrope_section" not in rope:
        raise ValueError(
            f"{hf_folder}/config.json: sliding windows and scaled or one-dimensional rotary positions are not "
            "supported; expected use_sliding_window false and rope_parameters of rope_type 'default' with mrope_section"
        )
    return config


def _audio_tokens(mel_frames: int) -> int:
    """Audio embeddings that the encoder makes of a clip: two convolutions, then pooling by two (25 a second)."""
    return ((mel_frames - 1) // 2 + 1 - 2) // 2 + 1
