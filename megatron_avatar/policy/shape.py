"""The sizes in a Hugging Face folder's config.json, for plans: read without transformers and torch."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

from megatron_avatar.config.families import NAMES, VL, family_of

TEXT = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
        "vocab_size")  # fmt: skip
VISION = ("depth", "hidden_size", "intermediate_size", "in_channels", "patch_size", "temporal_patch_size",
          "spatial_merge_size", "out_hidden_size")  # fmt: skip
AUDIO = ("d_model", "encoder_layers", "encoder_ffn_dim", "num_mel_bins", "output_dim")


class Shape(Protocol):
    """A model's sizes: what `read_shape` returns, and every configuration of transformers."""

    model_type: str
    text_config: Any
    vision_config: Any

    def __getattr__(self, name: str) -> Any: ...  # audio_config, where the model hears


def read_shape(folder: str | Path) -> Shape:
    """model_type, text_config, vision_config and, where the model hears, audio_config of a family's folder (of Omni the
    whole class or its Thinker), with the sizes named above. Raises ValueError where the folder has none of them."""
    path = Path(folder) / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
        model_type = found["model_type"]
    except OSError as error:
        raise ValueError(f"{path} can't be read ({error.strerror}): correct the path") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is no configuration of {NAMES} ({error!r})") from None
    try:
        family = family_of(model_type)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    try:
        found = found.get("thinker_config", found)  # of the full Omni class
        vision = found["vision_config"]
        text = found.get("text_config", found)  # VL's older files have the sizes at their top
        # As transformers reads it: beside vision_config, of Qwen2.5-VL's older files in text_config.
        tied = found.get("tie_word_embeddings", False) or family is VL and text.get("tie_word_embeddings", False)
        if type(tied) is not bool:
            raise TypeError(f"tie_word_embeddings is {tied!r}")
        if family.head_norms or text.get("head_dim") is not None:  # a size of their own, which no quotient gives
            head = _sizes(text, ["head_dim"])["head_dim"]
        else:
            head = text["hidden_size"] // text["num_attention_heads"]
        if head < 1:
            raise ValueError(f"head_dim is {head}")
        shape: Any = SimpleNamespace(
            model_type=model_type,
            text_config=SimpleNamespace(
                tie_word_embeddings=tied, head_dim=head, **_sizes(text, (*TEXT, *family.text_sizes))
            ),
            vision_config=SimpleNamespace(**_sizes(vision, (*VISION, *family.vision_sizes))),
        )
        if "audio_config" in found:
            shape.audio_config = SimpleNamespace(**_sizes(found["audio_config"], (*AUDIO, *family.audio_sizes)))
        return shape
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"{path} is no configuration of {NAMES} ({error!r})") from None


def _sizes(part: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The numbers, of `indexes` lists, of these names. TypeError for anything else, as null."""
    found = {name: part[name] for name in names}
    for name, size in found.items():
        if type(size) is not (list if name.endswith("indexes") else int):
            raise TypeError(f"{name} is {size!r}")
    return found


def hears(shape: Shape) -> bool:
    """Whether the model has an audio encoder."""
    return getattr(shape, "audio_config", None) is not None


def deepstack_layers(shape: Shape) -> int:
    """Decoder layers, from the first on, that features of the vision encoder are added behind."""
    return len(getattr(shape.vision_config, "deepstack_visual_indexes", ()))


def experts_of(shape: Shape) -> int:
    """Experts of each layer's feed-forward; 0: it is dense."""
    return getattr(shape.text_config, "num_experts", 0)


def active_inner(shape: Shape) -> int:
    """Inner units of the feed-forward that a token goes through: of a mixture, of the experts that it is given to."""
    text = shape.text_config
    return text.num_experts_per_tok * text.moe_intermediate_size if experts_of(shape) else text.intermediate_size


def text_parameters(shape: Shape) -> int:
    """Parameters of the language model, embedding and head included."""
    text = shape.text_config
    return text.num_hidden_layers * layer_parameters(shape) + text.hidden_size + embedding_parameters(shape) * (
        1 if text.tie_word_embeddings else 2
    )


def layer_parameters(shape: Shape) -> int:
    """Of one layer: attention with its biases or head norms, feed-forward or router and experts, two norms."""
    text = shape.text_config
    hidden, size = text.hidden_size, text.head_dim
    queries, keys = text.num_attention_heads * size, text.num_key_value_heads * size
    beside = 2 * size if family_of(shape.model_type).head_norms else queries + 2 * keys
    attention = hidden * (queries + 2 * keys) + beside + queries * hidden
    experts = experts_of(shape)
    inner, router = (experts * text.moe_intermediate_size, experts) if experts else (text.intermediate_size, 0)
    return attention + 3 * hidden * inner + router * hidden + 2 * hidden


def embedding_parameters(shape: Shape) -> int:
    return shape.text_config.vocab_size * shape.text_config.hidden_size


def tower_parameters(shape: Shape) -> int:
    """Parameters of the encoders, to what joins them to the language model."""
    vision = shape.vision_config
    hidden, inner, out = vision.hidden_size, vision.intermediate_size, vision.out_hidden_size
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2 * hidden
    attention, wide = 4 * hidden * hidden + 4 * hidden, hidden * vision.spatial_merge_size**2
    merger = wide * wide + wide + wide * out + out
    if "num_position_embeddings" in family_of(shape.model_type).vision_sizes:  # and LayerNorm, GELU without a gate
        block = attention + 2 * hidden * inner + inner + hidden + 4 * hidden
        count = patch + hidden + vision.num_position_embeddings * hidden + vision.depth * block + 2 * hidden + merger
        count += deepstack_layers(shape) * (2 * wide + merger)
    else:
        block = attention + 3 * hidden * inner + 2 * inner + hidden + 2 * hidden
        count = patch + vision.depth * block + hidden + merger
    if hears(shape):
        audio = shape.audio_config
        width, inner, out = audio.d_model, audio.encoder_ffn_dim, audio.output_dim
        block = 4 * width * width + 3 * width + 2 * width * inner + inner + width + 4 * width
        if "downsample_hidden_size" in family_of(shape.model_type).audio_sizes:  # three convolutions in the plane
            channels, rows = audio.downsample_hidden_size, -(-audio.num_mel_bins // 8)
            front = 9 * channels + 18 * channels**2 + 3 * channels + channels * rows * width + width**2 + width
            block += width  # keys have a bias
        else:
            front = 3 * audio.num_mel_bins * width + width + 3 * width * width + width
            front += 2 * out  # embeddings of a clip's begin and end
        count += front + audio.encoder_layers * block + 2 * width + width * out + out
    return count
