"""What a Hugging Face folder's config.json says, and the Megatron-Core configuration that follows from it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5OmniThinkerConfig,
    Qwen3OmniMoeThinkerConfig,
    Qwen3VLConfig,
    Qwen3VLVisionModel,
)
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniAudioEncoder, Qwen2_5OmniVisionEncoder
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import (
    Qwen3OmniMoeAudioEncoder,
    Qwen3OmniMoeVisionEncoder,
)

from megatron_avatar.config.families import NAMES, OMNI, OMNI3, VL, VL3, Family, check_quantized, family_of
from megatron_avatar.config.schema import ModelConfig, ParallelConfig
from megatron_avatar.config.validate import DTYPES
from megatron_avatar.policy.fusions import choose_fusions
from megatron_avatar.policy.routes import UNKNOWN
from megatron_avatar.policy.shape import Shape, active_inner, deepstack_layers, experts_of, hears

# parallel.recompute -> LayerConfig. A feed-forward keeps three quarters of what a layer keeps; the core attention keeps
# nothing that its neighbours don't. `light` computes norms and SwiGLU again, a third of what is kept, and no product;
# of a mixture the norms, as its SwiGLU always is.
RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "light": dict(recompute_light=True),
    "selective": dict(recompute_granularity="selective", recompute_modules=["mlp"]),
    "full": dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
}


@dataclass
class LayerConfig(TransformerConfig):
    """Megatron-Core's configuration, and what our layer adds to it."""

    recompute_light: bool = False  # norms and SwiGLU are computed again in the backward pass
    mrope_interleaved: bool = False  # time, height and width take rotary frequencies in turn
    experts: int = 0  # of each layer's feed-forward; 0: it is dense
    experts_per_token: int = 0
    expert_inner: int = 0  # inner units of one
    normed_shares: bool = True  # what a token's experts count adds up to 1


class Classes(NamedTuple):
    """A family's classes in transformers: its configuration and its encoders."""

    config: Any
    vision: Any
    audio: Any = None


CLASSES: dict[Family, Classes] = {
    OMNI: Classes(Qwen2_5OmniThinkerConfig, Qwen2_5OmniVisionEncoder, Qwen2_5OmniAudioEncoder),
    VL: Classes(Qwen2_5_VLConfig, Qwen2_5_VisionTransformerPretrainedModel),
    VL3: Classes(Qwen3VLConfig, Qwen3VLVisionModel),
    OMNI3: Classes(Qwen3OmniMoeThinkerConfig, Qwen3OmniMoeVisionEncoder, Qwen3OmniMoeAudioEncoder),
}
# A family's configuration; transformers types its parts as dictionaries or None.
PolicyConfig = Shape


def read_model_type(hf_folder: str | Path) -> str:
    """The folder's class: all of Omni, its Thinker alone, or a VL. ValueError for everything else."""
    return _read(hf_folder)["model_type"]


def _read(hf_folder: str | Path) -> dict[str, Any]:
    """A folder's config.json, of one of the families. ValueError for everything else."""
    path = Path(hf_folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} doesn't exist: point model.path to a Hugging Face folder of {NAMES}")
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): download or export it again") from None
    model_type = config.get("model_type") if isinstance(config, dict) else None
    try:
        family_of(model_type)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if model_type == family_of(model_type).whole and not isinstance(config.get("thinker_config"), dict):
        raise ValueError(f"{path}: has no thinker_config, which the policy is built from: download it again")
    return config


def read_config(hf_folder: str | Path) -> PolicyConfig:
    """What the policy is built from: the Thinker's configuration (of the full Omni class or alone), or a VL's.

    All have `text_config` and `vision_config`; a VL, which doesn't hear, has no `audio_config`.
    """
    raw = _read(hf_folder)
    # Of all of Omni the Thinker's part alone: the others say on every reading what they lack.
    own = raw.get("thinker_config", raw)
    if "im_end_token_id" in raw and own.get("eos_token_id") is None:  # Qwen3-Omni names it for all of its parts
        own = own | {"eos_token_id": raw["im_end_token_id"]}
    path = Path(hf_folder) / "config.json"
    check_quantized(raw, path)
    try:
        config = CLASSES[family_of(raw["model_type"])].config.from_dict(own)
    except Exception as error:  # as transformers' configurations and their validators raise
        why = " ".join(str(error).split())
        raise ValueError(f"{path}: can't be taken ({why[:200]}): download it again, or correct it") from None
    text, rope = config.text_config, config.text_config.rope_parameters
    windows, biases = (getattr(text, name, False) for name in ("use_sliding_window", "attention_bias"))
    if windows or biases or rope["rope_type"] != "default" or "mrope_section" not in rope:
        raise ValueError(
            f"{hf_folder}/config.json: sliding windows, attention_bias and scaled or one-dimensional rotary positions "
            "are not supported; expected use_sliding_window and attention_bias false or absent, and rope_parameters of "
            "rope_type 'default' with mrope_section"
        )
    if experts_of(config) and (
        text.decoder_sparse_step != 1 or text.mlp_only_layers or getattr(text, "shared_expert_intermediate_size", 0)
    ):
        raise ValueError(
            f"{hf_folder}/config.json: dense layers beside mixtures, and experts that all tokens share, are not "
            "supported; expected decoder_sparse_step 1, and mlp_only_layers and shared_expert_intermediate_size empty"
        )
    if experts_of(config) > UNKNOWN or experts_of(config) and text.num_experts_per_tok > experts_of(config):
        raise ValueError(
            f"{hf_folder}/config.json: num_experts {experts_of(config)} with num_experts_per_tok "
            f"{text.num_experts_per_tok} is not supported: take a folder with at most {UNKNOWN} experts, of which a "
            "token visits no more than there are"
        )
    if text.hidden_act != "silu":
        raise ValueError(f"{hf_folder}/config.json: hidden_act {text.hidden_act!r} is not supported; expected 'silu'")
    if wrong := _misfits(config):
        raise ValueError(f"{hf_folder}/config.json: {'; '.join(wrong)}: download it again, or correct it")
    return config


def _misfits(config: PolicyConfig) -> list[str]:
    """Numbers of a configuration that don't fit each other, in words: what would end in an encoder's first call."""
    text, vision, audio = config.text_config, config.vision_config, getattr(config, "audio_config", None)
    heads, groups = text.num_attention_heads, text.num_key_value_heads
    if not (groups > 0 and text.num_hidden_layers > 0 and heads > 0 and heads % groups == 0):
        return [f"num_hidden_layers {text.num_hidden_layers}, num_attention_heads {heads} and num_key_value_heads "
                f"{groups} make no decoder"]  # fmt: skip
    half, section = _head_size(text) // 2, text.rope_parameters["mrope_section"]
    blocks = list(getattr(vision, "deepstack_visual_indexes", ()))
    found = {
        f"mrope_section {section} is not three numbers whose sum is {half}, half of a head": not (
            isinstance(section, list | tuple) and len(section) == 3 and all(type(n) is int and n > 0 for n in section)
            and sum(section) == half
        ),
        f"deepstack_visual_indexes {blocks} are not of {vision.depth} blocks, each once": (
            len({*blocks} & {*range(vision.depth)}) < len(blocks)
        ),
        f"vision_config.out_hidden_size {vision.out_hidden_size} is not text_config.hidden_size {text.hidden_size}": (
            vision.out_hidden_size != text.hidden_size
        ),
        f"vision_config.hidden_size {vision.hidden_size} is not a multiple of num_heads {vision.num_heads}": (
            vision.hidden_size % vision.num_heads != 0
        ),
        "num_experts_per_tok is 0": experts_of(config) > 0 and text.num_experts_per_tok < 1,
    }
    if audio is not None:
        found[f"audio_config.output_dim {audio.output_dim} is not text_config.hidden_size {text.hidden_size}"] = (
            audio.output_dim != text.hidden_size
        )
        window = getattr(audio, "n_window_infer", 2 * audio.n_window)
        found[f"n_window_infer {window} is less than the {2 * audio.n_window} frames of a chunk"] = (
            window < 2 * audio.n_window
        )
    return [words for words, wrong in found.items() if wrong]


def _head_size(text: Any) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def classes_of(hf_config: PolicyConfig) -> Classes:
    """The classes of a configuration's family."""
    return CLASSES[family_of(hf_config.model_type)]


def placeholder_ids(hf_config: PolicyConfig) -> tuple[int, ...]:
    """The tokens that media embeddings replace: picture, video and, where the model hears, sound."""
    visual = (hf_config.image_token_id, hf_config.video_token_id)
    return (*visual, hf_config.audio_token_id) if hears(hf_config) else visual


def transformer_config(
    hf_config: PolicyConfig, model: ModelConfig, parallel: ParallelConfig, *, on_cpu: bool
) -> LayerConfig:
    """Megatron-Core's configuration of the language model, for a rank of a tp x pp layout.

    Raises ValueError where the model doesn't split into parallel.tp and parallel.pp, naming a layout that does.
    """
    text, family = hf_config.text_config, family_of(hf_config.model_type)
    heads, groups, tp, pp = text.num_attention_heads, text.num_key_value_heads, parallel.tp, parallel.pp
    experts = experts_of(hf_config)
    parts, what = (experts, "experts") if experts else (text.intermediate_size, "feed-forward units")
    if heads % tp or parts % tp or (groups % tp and tp % groups):
        raise ValueError(
            f"parallel.tp={tp} doesn't divide the {heads} attention heads, {groups} key-value heads and "
            f"{parts} {what} of the model: choose a tp that does"
        )
    _check_stages(text.num_hidden_layers, parallel, deepstack_layers(hf_config))
    if model.dtype not in DTYPES:
        raise ValueError(f"model.dtype={model.dtype!r} is unknown: choose one of {', '.join(DTYPES)}")
    dtype = getattr(torch, model.dtype)
    wide = model.residual == "float32" and dtype is not torch.float32
    return LayerConfig(
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=_head_size(text),
        ffn_hidden_size=active_inner(hf_config),
        normalization="RMSNorm",
        layernorm_epsilon=text.rms_norm_eps,
        add_bias_linear=False,
        add_qkv_bias=not family.head_norms,
        qk_layernorm=family.head_norms,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        mrope_section=list(text.rope_parameters["mrope_section"]),
        mrope_interleaved=family.mrope_interleaved,
        experts=experts,
        experts_per_token=text.num_experts_per_tok if experts else 0,
        expert_inner=text.moe_intermediate_size if experts else 0,
        normed_shares=getattr(text, "norm_topk_prob", True),
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        sequence_parallel=parallel.sequence_parallel and tp > 1,
        params_dtype=dtype,
        pipeline_dtype=torch.float32 if wide else dtype,
        fp32_residual_connection=wide,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        perform_initialization=False,
        use_cpu_initialization=on_cpu,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # asked for by variable_seq_lengths, even in a dense model
        num_layers_in_first_pipeline_stage=parallel.first_stage_layers,
        **RECOMPUTE[parallel.recompute],
        **choose_fusions(parallel.kernels, on_cpu=on_cpu, dtype=dtype).settings(),
    )


def _check_stages(layers: int, parallel: ParallelConfig, deepstack: int) -> None:
    """ValueError where the layers don't share out over the pipeline's stages, naming what would. The first stage, which
    has the encoders, needs the layers that deepstack feeds."""
    pp, first = parallel.pp, parallel.first_stage_layers
    if first is None and layers % pp == 0 and (pp == 1 or layers // pp >= deepstack):
        return
    if pp == 1:
        raise ValueError(f"parallel.first_stage_layers={first} needs parallel.pp of 2 or more: raise it, or write null")
    even = [n for n in range(1, layers - pp + 2) if (layers - n) % (pp - 1) == 0]
    fitting = [n for n in even if n >= deepstack]
    if first in fitting:
        return
    if not even:
        raise ValueError(f"parallel.pp={pp} is more than the {layers} layers of the model: lower it")
    need = f"the {deepstack} layers to which the vision encoder's features go (deepstack)"
    if not fitting:
        raise ValueError(f"parallel.pp={pp} leaves the first stage no room for {need}: lower it")
    if first is None and layers % pp:
        why = f"parallel.pp={pp} doesn't divide the {layers} layers of the model"
    elif first is None or first in even:
        why = f"the first stage would have {first or layers // pp} layers, less than {need}"
    else:
        why = (f"parallel.first_stage_layers={first} leaves {layers - first} of {layers} layers for {pp - 1} further "
               "stages")  # fmt: skip
    # The first stage carries the encoders as well: rather fewer layers there than an even share.
    wanted = layers / pp if first is None else first
    best = max((n for n in fitting if n <= wanted), default=fitting[0])
    listed = ", ".join(map(str, fitting))
    if len(fitting) > 8:
        listed = f"{fitting[0]} to {fitting[-1]}" + (f" in steps of {pp - 1}" if pp > 2 else "")
    raise ValueError(
        f"{why}: write parallel.first_stage_layers={best} (then {(layers - best) // (pp - 1)} on each other stage; "
        f"{listed} fit) or change parallel.pp"
    )
