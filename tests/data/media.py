"""Media files and a tokenizer made on the spot."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import soundfile
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5OmniThinkerConfig,
    Qwen3OmniMoeThinkerConfig,
    Qwen3VLConfig,
)

SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|vision_bos|> <|vision_eos|> <|audio_bos|> <|audio_eos|> "
    "<|IMAGE|> <|VIDEO|> <|AUDIO|>"
).split()
VL_SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|>"
).split()
OMNI3_SPECIAL = (*VL_SPECIAL, "<|audio_start|>", "<|audio_end|>", "<|audio_pad|>")
WORDS = "system user assistant You are a helpful . what moves ? A B C red blue Hint : look twice think".split()
QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
        r"\s+(?!\S)|\s+")  # fmt: skip
OPTIONS = {"libvpx-vp9": {"deadline": "realtime", "cpu-used": "8"}, "libvpx": {"deadline": "realtime", "cpu-used": "8"}}


def make_tokenizer(special: Sequence[str] = SPECIAL) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate([*special, "[UNK]", *WORDS])}
    model = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    model.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        unk_token="[UNK]",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=list(special),
    )


def make_qwen_tokenizer(special: Sequence[str]) -> PreTrainedTokenizerFast:
    """Qwen's tokenizer with few merges: its normalizer, its borders of words, its added tokens."""
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(QWEN), behavior="isolated")
    signs = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, signs])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["what is seen and heard in the clip ?\n\nsystem user <|im_end|>" * 3], trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def make_config(**overrides) -> Qwen2_5OmniThinkerConfig:
    token = {name: i for i, name in enumerate(SPECIAL)}
    return Qwen2_5OmniThinkerConfig(
        image_token_index=token["<|IMAGE|>"],
        video_token_index=token["<|VIDEO|>"],
        audio_token_index=token["<|AUDIO|>"],
        audio_start_token_id=token["<|audio_bos|>"],
        audio_end_token_id=token["<|audio_eos|>"],
        vision_start_token_id=token["<|vision_bos|>"],
        **overrides,
    )


def make_vl_config() -> Qwen2_5_VLConfig:
    token = {name: i for i, name in enumerate(VL_SPECIAL)}
    return Qwen2_5_VLConfig(
        image_token_id=token["<|image_pad|>"],
        video_token_id=token["<|video_pad|>"],
        vision_start_token_id=token["<|vision_start|>"],
        vision_end_token_id=token["<|vision_end|>"],
        vision_config={"tokens_per_second": 2},  # of the published models
    )


def make_vl3_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3VLConfig:
    """Of a tokenizer with the tokens of a VL."""
    names = dict(image_token_id="<|image_pad|>", video_token_id="<|video_pad|>",
                 vision_start_token_id="<|vision_start|>", vision_end_token_id="<|vision_end|>")  # fmt: skip
    return Qwen3VLConfig(**{key: tokenizer.convert_tokens_to_ids(name) for key, name in names.items()})


def make_omni3_config(tokenizer: PreTrainedTokenizerFast, **overrides) -> Qwen3OmniMoeThinkerConfig:
    """Of a tokenizer with OMNI3_SPECIAL."""
    names = dict(image_token_id="<|image_pad|>", video_token_id="<|video_pad|>", audio_token_id="<|audio_pad|>",
                 vision_start_token_id="<|vision_start|>", vision_end_token_id="<|vision_end|>",
                 audio_start_token_id="<|audio_start|>", audio_end_token_id="<|audio_end|>")  # fmt: skip
    ids = {key: tokenizer.convert_tokens_to_ids(name) for key, name in names.items()}
    return Qwen3OmniMoeThinkerConfig(**dict(position_id_per_seconds=13) | ids | overrides)


def make_video(path: Path, frames=16, h=84, w=84, fps=8, codec="libvpx-vp9", pts=None, tag=None) -> Path:
    """A square that moves and changes colour; `pts` (ms a frame) makes the frame rate variable; `tag`: its matrix."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height = w, h
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.options = OPTIONS.get(codec, {})
        if tag is not None:
            stream.codec_context.colorspace = tag
        if pts is not None:
            stream.time_base = Fraction(1, 1000)
        for i in range(frames):
            picture = np.full((h, w, 3), 30 + i, np.uint8)
            picture[10 : h // 2, 2 * i : 2 * i + 30] = [200 - 5 * i, 30 + 9 * i, 60]
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if pts is not None:
                frame.pts, frame.time_base = pts[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def make_audio(path: Path, seconds=2.0, rate=16_000, channels=1) -> Path:
    time = np.arange(int(seconds * rate)) / rate
    tone = 0.3 * np.sin(2 * np.pi * 440 * time)
    soundfile.write(path, np.stack([tone] * channels, axis=1), rate)
    return path
