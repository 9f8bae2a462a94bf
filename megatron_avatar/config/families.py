"""The model families that can be trained, a row each: what pictures, positions and prompts are to them.

A family is known by `model_type` in a folder's config.json. Token ids and sizes are the folder's own; here is what its
configuration doesn't say. Another family is another row.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

MERGE = 2  # patches a side that become one visual token, in all families
TEMPORAL_PATCH = 2  # frames a patch, in all families


@dataclass(frozen=True)
class Family:
    """What the encoders take, how a video's time is told, what a prompt is written with, and what the decoder does.

    patch: pixels a side. mean, std: of the three colours, as bytes over 255. image_min_pixels: a smaller picture is
    enlarged to it. clip_pixels: a clip's budget. Where `whole_clip`, limits hold for the sum of all frames; else for
    each, and the budget is shared by pairs of frames.

    position_rate: the key of config.json with the positions a second of a video's time axis. Empty: there is no such
    axis, and each pair of frames follows its time as text, `<1.5 seconds>`. time_ends: text goes on after a video's
    last position of all axes, not after those of height and width. odd_frames: an odd number of frames is kept, and the
    last one shown twice; else the number is floored to even. planned: the media of which plans count the longest.

    audio_rate: tokens a second of sound. audio_chunk: log-mel frames that three convolutions of stride two see at once;
    0: two convolutions of strides one and two and a pooling see all. continuous: a video's times are not cut to whole
    positions, and its sound goes between its tokens by time, token by token, not by chunks.

    vision_start, image, video, vision_end, audio_start, audio, audio_end, system: what the built-in chat template
    writes, for tokenizers without one.
    kin: model types that look alike and are refused, with the reason.

    ends: keys of config.json with the tokens that end a completion.
    vision_matrices: of a block's feed-forward in the vision encoder; 3 with a gate, 2 without. vision_sizes: what its
    configuration has beside the other families': learned positions, and the layers whose features the decoder gets.
    head_norms: each query and key is normed before its rotation, and their projections have no bias. mrope_interleaved:
    time, height and width take rotary frequencies in turn, not in blocks. nested_names: the hub's folders call weights
    as transformers' modules are called, the language model a part of `model`.
    """

    name: str
    model_types: tuple[str, ...]
    hears: bool
    patch: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    image_min_pixels: int
    clip_pixels: int
    whole_clip: bool
    position_rate: str
    time_ends: bool
    audio_rate: int = 25
    audio_chunk: int = 0
    continuous: bool = False
    vision_start: str = "<|vision_start|>"
    image: str = "<|image_pad|>"
    video: str = "<|video_pad|>"
    vision_end: str = "<|vision_end|>"
    audio_start: str = "<|audio_start|>"
    audio: str = "<|audio_pad|>"
    audio_end: str = "<|audio_end|>"
    system: str = ""
    kin: tuple[tuple[str, str], ...] = ()
    odd_frames: bool = False
    planned: tuple[str, ...] = ("video", "image")
    # At <|endoftext|>, the VLs' bos_token_id, their own generation ends too.
    ends: tuple[str, ...] = ("eos_token_id", "bos_token_id")
    vision_matrices: int = 3
    vision_sizes: tuple[str, ...] = ()
    head_norms: bool = False
    mrope_interleaved: bool = False
    nested_names: bool = False
    text_sizes: tuple[str, ...] = ()
    audio_sizes: tuple[str, ...] = ()
    whole: str = ""

    @property
    def factor(self) -> int:
        """Pixels a side of one visual token."""
        return self.patch * MERGE

    @property
    def token_pixels(self) -> int:
        """Pixels that become one visual token."""
        return self.factor**2

    @property
    def timestamps(self) -> bool:
        """Whether a video's time is text between its pairs of frames."""
        return not self.position_rate

    def audio_tokens(self, mel_frames: int) -> int:
        """Tokens that the audio encoder makes of a sound of `mel_frames` log-mel frames."""
        if not self.audio_chunk:
            return (_halved(mel_frames) - 2) // 2 + 1
        chunks, tail = divmod(mel_frames, self.audio_chunk)
        return chunks * _thrice_halved(self.audio_chunk) + _thrice_halved(tail)


def _halved(frames: int) -> int:
    """What a convolution of stride two leaves of them."""
    return (frames + 1) // 2


def _thrice_halved(frames: int) -> int:
    return _halved(_halved(_halved(frames)))


CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

OMNI = Family(
    name="Qwen2.5-Omni",
    model_types=("qwen2_5_omni", "qwen2_5_omni_thinker"),
    hears=True,
    patch=14,
    mean=CLIP_MEAN,
    std=CLIP_STD,
    image_min_pixels=4 * 28**2,
    clip_pixels=90_316_800,
    whole_clip=False,
    position_rate="position_id_per_seconds",
    time_ends=True,
    vision_start="<|vision_bos|>",
    image="<|IMAGE|>",
    video="<|VIDEO|>",
    vision_end="<|vision_eos|>",
    audio_start="<|audio_bos|>",
    audio="<|AUDIO|>",
    audio_end="<|audio_eos|>",
    system="You are a helpful assistant.",
    planned=("video",),
    ends=("eos_token_id",),
    whole="qwen2_5_omni",
)
VL = Family(
    name="Qwen2.5-VL",
    model_types=("qwen2_5_vl",),
    hears=False,
    patch=14,
    mean=CLIP_MEAN,
    std=CLIP_STD,
    image_min_pixels=4 * 28**2,
    clip_pixels=90_316_800,
    whole_clip=False,
    position_rate="vision_config.tokens_per_second",
    time_ends=False,
    system="You are a helpful assistant.",
    kin=(("qwen2_vl", "Qwen2-VL has another vision encoder"),),
)
VL3 = Family(
    name="Qwen3-VL",
    model_types=("qwen3_vl",),
    hears=False,
    patch=16,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    image_min_pixels=64 * 32**2,
    clip_pixels=24_576 * 32**2,
    whole_clip=True,
    position_rate="",
    time_ends=False,
    kin=(
        ("qwen3_vl_moe", "its experts lie on disk in another layout than Qwen3-Omni's, which the policy doesn't read; "
                         "take a dense Qwen3-VL, as its 4B or 8B"),
        ("qwen3_vl_text", "it is the language model of a Qwen3-VL without its vision encoder; take the whole folder"),
        ("qwen3_5", "Qwen3.5 has linear attention, which the policy doesn't have"),
        ("qwen3_5_moe", "Qwen3.5 has linear attention and a mixture of experts, which the policy doesn't have"),
    ),
    odd_frames=True,
    vision_matrices=2,
    vision_sizes=("num_position_embeddings", "deepstack_visual_indexes"),
    head_norms=True,
    mrope_interleaved=True,
    nested_names=True,
)
OMNI3 = Family(
    name="Qwen3-Omni",
    model_types=("qwen3_omni_moe", "qwen3_omni_moe_thinker"),
    hears=True,
    patch=16,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    image_min_pixels=4 * 28**2,
    clip_pixels=90_316_800,
    whole_clip=False,
    position_rate="position_id_per_seconds",
    time_ends=True,
    audio_rate=13,
    audio_chunk=100,
    continuous=True,
    planned=("video",),
    ends=("eos_token_id",),
    vision_matrices=2,
    vision_sizes=("num_position_embeddings", "deepstack_visual_indexes"),
    head_norms=True,
    mrope_interleaved=True,
    text_sizes=("num_experts", "num_experts_per_tok", "moe_intermediate_size"),
    audio_sizes=("downsample_hidden_size",),
    whole="qwen3_omni_moe",
)
FAMILIES = (OMNI, VL, VL3, OMNI3)
NAMES = f"{', '.join(family.name for family in FAMILIES[:-1])} or {FAMILIES[-1].name}"


def family_of(model_type: object) -> Family:
    """The family that has the `model_type` of a config.json. Raises ValueError with the remedy for all others."""
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.model_types)
    why = next((f" ({reason})" for family in FAMILIES for kind, reason in family.kin if kind == model_type), "")
    raise ValueError(f"model_type is {model_type!r}{why}, but the policy is built for {known}: point model.path to a "
                     f"Hugging Face folder of {NAMES}")  # fmt: skip


def check_quantized(found: dict[str, Any], path: Path) -> None:
    """Raise ValueError where a config.json's content says that the weights beside it are quantized (FP8, AWQ, GPTQ)."""
    thinker = found.get("thinker_config", found)
    parts = (found, thinker, thinker.get("text_config")) if isinstance(thinker, dict) else (found,)
    for part in parts:
        if isinstance(part, dict) and (told := part.get("quantization_config")):
            how = told.get("quant_method", "") if isinstance(told, dict) else ""
            raise ValueError(f"{path}: has a quantization_config{how and f' ({how})'}, but quantized weights can't be "
                             "trained: point model.path to the same model's edition in bfloat16")
