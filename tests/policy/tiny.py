"""Tiny models of every family with random weights, and prompts for them.

The same classes as the published models, made in a second. Positions come from transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import (
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen3OmniMoeThinkerConfig,
    Qwen3OmniMoeThinkerForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from megatron_avatar.records import Prompt

VOCABULARY = 203  # odd, so that tensor parallelism has to pad it
TEXT = 180  # ids below are text
AUDIO, IMAGE, VIDEO = 190, 191, 192  # placeholders
VISION_START, VISION_END, AUDIO_START, AUDIO_END = 193, 194, 195, 196
KINDS = ("audio_in_video", "video", "audio", "text")
VL_KINDS = ("image", "video", "image_and_video", "text")
VL_GRIDS = {"image": [1, 6, 10], "video": [4, 4, 6]}  # patches


def tiny_config(*, layers: int = 4, qwen: bool = False, tied: bool = False) -> Qwen2_5OmniThinkerConfig:
    """4 heads and 2 key-value heads of 16; with `qwen` its proportions: head size 128, sections, 7 queries a key."""
    heads = 14 if qwen else 4
    hidden = heads * (128 if qwen else 16)
    text = dict(
        vocab_size=VOCABULARY,
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=2,
        intermediate_size=128,
        max_position_embeddings=4096,
        tie_word_embeddings=tied,
        rope_parameters=dict(
            rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24] if qwen else [2, 3, 3]
        ),
    )  # fmt: skip
    vision = dict(
        depth=2, hidden_size=32, num_heads=2, intermediate_size=64, window_size=112, fullatt_block_indexes=[1],
        out_hidden_size=hidden,
    )  # fmt: skip
    audio = dict(d_model=32, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=64, output_dim=hidden)
    return Qwen2_5OmniThinkerConfig(
        text_config=text,
        vision_config=vision,
        audio_config=audio,
        tie_word_embeddings=tied,
        audio_token_index=AUDIO,
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        audio_start_token_id=AUDIO_START,
        audio_end_token_id=AUDIO_END,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )


def tiny_thinker(config: Qwen2_5OmniThinkerConfig, seed: int = 0) -> Qwen2_5OmniThinkerForConditionalGeneration:
    """A Thinker in float32 whose weights are large enough to tell mistakes apart: its logits' deviation is about 2."""
    return _with_large_weights(Qwen2_5OmniThinkerForConditionalGeneration(config), seed)


def _with_large_weights(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    model, config = model.eval(), model.config
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                inputs = parameter.shape[-1] if ".experts." in name else parameter[0].numel()
                parameter.copy_(noise * (2 if "lm_head" in name else 1) / inputs**0.5)
            else:
                parameter.copy_(0.2 * noise + (0 if "bias" in name else 1))
        scale = 2 / config.text_config.hidden_size**0.5 if config.tie_word_embeddings else 1.0
        embedding = model.get_input_embeddings().weight
        embedding.copy_(scale * torch.randn(embedding.shape, generator=generator))
    return model


def tiny_prompts(config: Qwen2_5OmniThinkerConfig, seed: int = 0) -> dict[str, Prompt]:
    """One prompt of each of KINDS: 4 s of 2-fps video (8 frames of 56 x 84 pixels) and of sound."""
    rng = np.random.default_rng(seed)

    def text(n: int) -> list[int]:
        return rng.integers(0, TEXT, n).tolist()

    video = [VIDEO] * 6
    layouts = {
        # Chunks of 2 s: two frame pairs of 2 x 3 tokens, then 50 audio tokens.
        "audio_in_video": [VISION_START, AUDIO_START, *((video * 2 + [AUDIO] * 50) * 2), AUDIO_END, VISION_END],
        "video": [VISION_START, *(video * 4), VISION_END],
        "audio": [AUDIO_START, *([AUDIO] * 100), AUDIO_END],
        "text": [],
    }
    with torch.device("meta"):
        meta = Qwen2_5OmniThinkerForConditionalGeneration(config)
    prompts = {}
    for kind in KINDS:
        ids = torch.tensor([text(5) + layouts[kind] + text(7)])
        grid = torch.tensor([[4, 4, 6]]) if "video" in kind else None
        lengths = torch.tensor([400]) if "audio" in kind else None
        positions, _ = meta.get_rope_index(
            ids,
            video_grid_thw=grid,
            attention_mask=torch.ones_like(ids),
            use_audio_in_video=kind == "audio_in_video",
            audio_seqlens=lengths,
            second_per_grids=torch.tensor([1.0]),
        )
        prompts[kind] = Prompt(
            sample_id=kind,
            variant="plain",
            token_ids=ids[0].numpy(),
            positions=positions[:, 0].numpy(),
            pixels=None if grid is None else torch.from_numpy(rng.standard_normal((96, 1176), np.float32)),
            grid_thw=grid,
            mel=None if lengths is None else torch.from_numpy(rng.standard_normal((128, 400), np.float32)),
            mel_lengths=lengths,
        )
    return prompts


def tiny_vl_config(*, layers: int = 4, tied: bool = False) -> Qwen2_5_VLConfig:
    """The tiny Thinker's language model and vision encoder as a Qwen2.5-VL."""
    thinker = tiny_config(layers=layers, tied=tied)
    text, vision = thinker.text_config, thinker.vision_config
    shared = (
        "vocab_size", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads",
        "intermediate_size", "max_position_embeddings", "rope_parameters",
    )  # fmt: skip
    seen = (
        "depth", "hidden_size", "num_heads", "intermediate_size", "window_size", "fullatt_block_indexes",
        "out_hidden_size",
    )  # fmt: skip
    return Qwen2_5_VLConfig(
        text_config={name: getattr(text, name) for name in shared} | dict(bos_token_id=None, eos_token_id=TEXT - 1),
        vision_config={name: getattr(vision, name) for name in seen} | {"tokens_per_second": 2},
        tie_word_embeddings=tied,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )


def tiny_vl(config: Qwen2_5_VLConfig, seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """A Qwen2.5-VL in float32, made like the tiny Thinker."""
    return _with_large_weights(Qwen2_5_VLForConditionalGeneration(config), seed)


def tiny_vl3_config(*, layers: int = 4, tied: bool = False) -> Qwen3VLConfig:
    """As small; heads of 32 where hidden size and heads would give 16, and features for the first three layers. The
    slowest rotation, too, tells these short positions apart."""
    text = dict(
        vocab_size=VOCABULARY, num_hidden_layers=layers, hidden_size=64, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, intermediate_size=128, max_position_embeddings=4096, bos_token_id=None, eos_token_id=TEXT - 1,
        rope_parameters=dict(rope_type="default", rope_theta=30.0, mrope_section=[8, 4, 4]),
    )  # fmt: skip
    vision = dict(
        depth=4, hidden_size=32, num_heads=2, intermediate_size=64, out_hidden_size=64, num_position_embeddings=25,
        deepstack_visual_indexes=[0, 1, 3],
    )  # fmt: skip
    return Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=tied,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )


def tiny_vl3(config: Qwen3VLConfig, seed: int = 0) -> Qwen3VLForConditionalGeneration:
    """A Qwen3-VL in float32, made like the tiny Thinker."""
    return _with_large_weights(Qwen3VLForConditionalGeneration(config), seed)


def tiny_vl_prompts(config: Qwen2_5_VLConfig | Qwen3VLConfig, seed: int = 0) -> dict[str, Prompt]:
    """One prompt of each of VL_KINDS: a picture of 6 x 10 patches, 4 s of 2-fps video (8 frames of 4 x 6). Qwen3-VL has
    text and a start and an end token around each pair of frames."""
    rng = np.random.default_rng(seed)
    newer = isinstance(config, Qwen3VLConfig)
    with torch.device("meta"):
        meta = (Qwen3VLForConditionalGeneration if newer else Qwen2_5_VLForConditionalGeneration)(config)
    prompts = {}
    for kind in VL_KINDS:
        ids = rng.integers(0, TEXT, 5).tolist()
        shown = [name for name in VL_GRIDS if name in kind]
        for name in shown:
            count, parts = int(np.prod(VL_GRIDS[name])) // 4, VL_GRIDS[name][0] if newer else 1
            for _ in range(parts):
                ids += [VISION_START, *[IMAGE if name == "image" else VIDEO] * (count // parts), VISION_END]
                ids += rng.integers(0, TEXT, 4).tolist()
        token_ids = torch.tensor([ids])
        positions, _ = meta.model.get_rope_index(
            token_ids, _vl_types(token_ids), attention_mask=torch.ones_like(token_ids), **_vl_grids(token_ids, newer)
        )
        vision = config.vision_config
        columns = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        patches = sum(int(np.prod(VL_GRIDS[name])) for name in shown)
        prompts[kind] = Prompt(
            sample_id=kind,
            variant="plain",
            token_ids=token_ids[0].numpy(),
            positions=positions[:, 0].numpy(),
            pixels=torch.from_numpy(rng.standard_normal((patches, columns), np.float32)) if shown else None,
            grid_thw=torch.tensor([VL_GRIDS[name] for name in shown]) if shown else None,
        )
    return prompts


def vl_logits(model: PreTrainedModel, prompt: Prompt, completion: np.ndarray | None = None) -> torch.Tensor:
    """transformers' logits [P + L, V] of one of tiny_vl_prompts and, if given, one completion [L].

    Positions are transformers' own.
    """
    completion = np.zeros(0, np.int64) if completion is None else completion
    return model(**vl_inputs(model, prompt, completion)).logits[0]


def vl_inputs(model: PreTrainedModel, prompt: Prompt, completion: np.ndarray | None = None) -> dict[str, Any]:
    """What transformers' model is called with, or its `generate`. Of two media the picture comes first."""
    completion = np.zeros(0, np.int64) if completion is None else completion
    ids = torch.from_numpy(np.concatenate([prompt.token_ids, completion]))[None]
    media = _vl_grids(ids, isinstance(model.config, Qwen3VLConfig))
    pictures = int(np.prod(VL_GRIDS["image"])) if "image_grid_thw" in media else 0
    if pictures:
        media["pixel_values"] = prompt.pixels[:pictures]
    if "video_grid_thw" in media:
        media["pixel_values_videos"] = prompt.pixels[pictures:]
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=_vl_types(ids), **media)


def _vl_types(ids: torch.Tensor) -> torch.Tensor:
    """0 text, 1 picture, 2 video."""
    return (ids == IMAGE).int() + 2 * (ids == VIDEO).int()


def _vl_grids(ids: torch.Tensor, newer: bool) -> dict[str, torch.Tensor]:
    grids = {"image_grid_thw": torch.tensor([VL_GRIDS["image"]])} if IMAGE in ids else {}
    if VIDEO in ids:
        grids |= dict(video_grid_thw=torch.tensor([VL_GRIDS["video"]]))
        if not newer:
            grids |= dict(second_per_grid_ts=torch.tensor([1.0]))
    return grids


def tiny_omni3_config(*, layers: int = 4, tied: bool = False, normed: bool = True) -> Qwen3OmniMoeThinkerConfig:
    """The tiny Qwen3-VL's sizes; two of eight experts a token, their weights adding up to one where `normed`; an audio
    encoder that attends over two of its chunks."""
    text = dict(
        vocab_size=VOCABULARY, num_hidden_layers=layers, hidden_size=64, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, intermediate_size=128, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=2,
        norm_topk_prob=normed, max_position_embeddings=4096, tie_word_embeddings=tied, eos_token_id=TEXT - 1,
        rope_parameters=dict(rope_type="default", rope_theta=30.0, mrope_section=[8, 4, 4]),
    )  # fmt: skip
    vision = dict(
        depth=4, hidden_size=32, num_heads=2, intermediate_size=64, out_hidden_size=64, num_position_embeddings=25,
        deepstack_visual_indexes=[0, 1, 3],
    )  # fmt: skip
    audio = dict(
        d_model=32, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=64, output_dim=64,
        downsample_hidden_size=8, n_window_infer=200,
    )  # fmt: skip
    return Qwen3OmniMoeThinkerConfig(
        text_config=text,
        vision_config=vision,
        audio_config=audio,
        tie_word_embeddings=tied,
        position_id_per_seconds=13,  # of the published model, where the class says 25
        audio_token_id=AUDIO,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_start_token_id=AUDIO_START,
        audio_end_token_id=AUDIO_END,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )


def tiny_omni3(config: Qwen3OmniMoeThinkerConfig, seed: int = 0) -> Qwen3OmniMoeThinkerForConditionalGeneration:
    """A Qwen3-Omni Thinker in float32, made like the tiny one of Qwen2.5."""
    return _with_large_weights(Qwen3OmniMoeThinkerForConditionalGeneration(config), seed)


def tiny_omni3_prompts(config: Qwen3OmniMoeThinkerConfig, seed: int = 0) -> dict[str, Prompt]:
    """One prompt of each of KINDS: 2.7 s of 3-fps video (8 frames of 64 x 96 pixels), whose times are fractions, and of
    sound, whose last chunk is short."""
    rng = np.random.default_rng(seed)

    def text(n: int) -> list[int]:
        return rng.integers(0, TEXT, n).tolist()

    video = [VIDEO] * 6
    layouts = {
        # Pairs of frames at 0, 8.67, 17.33 and 26, among sound tokens at 0 to 34.
        "audio_in_video": [VISION_START, AUDIO_START, *video, *[AUDIO] * 9, *video, *[AUDIO] * 9, *video, *[AUDIO] * 8,
                           *video, *[AUDIO] * 9, AUDIO_END, VISION_END],
        "video": [VISION_START, *(video * 4), VISION_END],
        "audio": [AUDIO_START, *([AUDIO] * 35), AUDIO_END],
        "text": [],
    }  # fmt: skip
    with torch.device("meta"):
        meta = Qwen3OmniMoeThinkerForConditionalGeneration(config)
    prompts = {}
    for kind in KINDS:
        ids = torch.tensor([text(5) + layouts[kind] + text(7)])
        grid = torch.tensor([[4, 4, 6]]) if "video" in kind else None
        lengths = torch.tensor([270]) if "audio" in kind else None
        positions, _ = meta.get_rope_index(
            ids,
            video_grid_thw=grid,
            attention_mask=torch.ones_like(ids),
            use_audio_in_video=kind == "audio_in_video",
            audio_seqlens=lengths,
            second_per_grids=torch.tensor([2 / 3]),
        )
        prompts[kind] = Prompt(
            sample_id=kind,
            variant="plain",
            token_ids=ids[0].numpy(),
            positions=positions[:, 0].numpy(),
            pixels=None if grid is None else torch.from_numpy(rng.standard_normal((96, 1536), np.float32)),
            grid_thw=grid,
            mel=None if lengths is None else torch.from_numpy(rng.standard_normal((128, 270), np.float32)),
            mel_lengths=lengths,
        )
    return prompts


def tiny_completions() -> list[np.ndarray]:
    """Three completions of different length."""
    rng = np.random.default_rng(1)
    return [rng.integers(0, TEXT, n) for n in (6, 1, 9)]


def thinker_logits(
    model: PreTrainedModel, prompt: Prompt, completion: np.ndarray | None = None
) -> torch.Tensor:
    """A Thinker's logits [P + L, V] of a prompt and, if given, one completion [L], by transformers."""
    completion = np.zeros(0, np.int64) if completion is None else completion
    ids = torch.from_numpy(np.concatenate([prompt.token_ids, completion]))[None]
    new = prompt.next_position + np.arange(len(completion))
    positions = torch.from_numpy(np.concatenate([prompt.positions, np.tile(new, (3, 1))], axis=1))[:, None]
    media = thinker_media(prompt)
    # Without the mask, transformers would fall back to one-dimensional positions.
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions, **media).logits[0]


def thinker_media(prompt: Prompt) -> dict[str, Any]:
    """What a Thinker is given of a prompt's media."""
    media: dict[str, Any] = {}
    if prompt.pixels is not None:
        media |= dict(pixel_values_videos=prompt.pixels, video_grid_thw=prompt.grid_thw)
    if prompt.mel is not None:
        mask = torch.ones(1, prompt.mel.shape[1], dtype=torch.long)
        media |= dict(input_features=prompt.mel[None], feature_attention_mask=mask)
    return media


class Family(NamedTuple):
    """How a family's tiny model is made, and what transformers says of it. `trained`: kinds of prompts that make a
    step's micro-batches, of which one has no media, though the encoders are trained."""

    config: Callable[..., Any]
    model: Callable[..., PreTrainedModel]
    prompts: Callable[..., dict[str, Prompt]]
    logits: Callable[..., torch.Tensor]
    kinds: tuple[str, ...]
    trained: tuple[str, ...]


FAMILIES = {
    "omni": Family(tiny_config, tiny_thinker, tiny_prompts, thinker_logits, KINDS, ("audio_in_video", "text")),
    "vl": Family(tiny_vl_config, tiny_vl, tiny_vl_prompts, vl_logits, VL_KINDS, ("image_and_video", "text")),
    "vl3": Family(
        tiny_vl3_config, tiny_vl3, tiny_vl_prompts, vl_logits, VL_KINDS, ("image_and_video", "text", "video")
    ),
    "omni3": Family(
        tiny_omni3_config, tiny_omni3, tiny_omni3_prompts, thinker_logits, KINDS, ("audio_in_video", "text", "audio")
    ),
}


def family_of_config(config: Any) -> Family:
    """The family of a configuration that a policy was built from."""
    names = {Qwen3VLConfig: "vl3", Qwen2_5_VLConfig: "vl", Qwen2_5OmniThinkerConfig: "omni",
             Qwen3OmniMoeThinkerConfig: "omni3"}  # fmt: skip
    return FAMILIES[names[type(config)]]
