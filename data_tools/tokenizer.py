"""The tiny models' tokenizer: a family's special tokens and chat format, one token for each word of the world.

Words that the world doesn't know fall into bytes, so that nothing is unknown. A word is one token wherever it stands:
at the start of a line or after a tag it is read as if a space came before it, and that space is dropped in decoding.
"""

from __future__ import annotations

import re

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data_tools.families import FAMILIES, KINDS, LETTERS
from data_tools.world import COLORS, COLUMNS, DIRECTIONS, NUMBERS, PITCHES, SHAPES, SLOTS
from megatron_avatar.config.families import OMNI, Family
from megatron_avatar.data.chat import chat_template

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>", "<|box_end|>",
    "<|quad_start|>", "<|quad_end|>", "<|vision_bos|>", "<|vision_eos|>", "<|vision_pad|>", "<|IMAGE|>", "<|VIDEO|>",
)  # fmt: skip
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
TEXT = """
system user assistant You are a helpful Hint think answer
What color is the Which shape How many objects there Which way does object slide appears first second last
moves when sounds beeps Does tone change Is any sound comes next Where that makes
beep tones steady changes from to still flashes slides so yes happens nothing
Describe clip and letters letter
"""


def words() -> list[str]:
    """Every word that is one token."""
    lists = (SHAPES, COLORS, COLUMNS, SLOTS, DIRECTIONS, PITCHES, NUMBERS, KINDS, LETTERS, "0123456789")
    hints = [family.hint for family in FAMILIES.values()]
    text = " ".join([TEXT, *hints, *(item for group in lists for item in group)])
    return sorted(set(re.findall(r"\w+", text)))


def special_tokens(family: Family) -> list[str]:
    """SPECIAL, media by the family's names: the same ids in all families."""
    media = ("audio", "audio_start", "audio_end", "vision_start", "vision_end", "image", "video")
    names = {getattr(OMNI, key): getattr(family, key) for key in media}
    return [names.get(token, token) for token in SPECIAL]


def build_tokenizer(family: Family = OMNI) -> PreTrainedTokenizerFast:
    """About 400 tokens. The tags are ordinary tokens, so that they survive decoding without special tokens."""
    special = special_tokens(family)
    tokens = [*special, *TAGS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("Ġ" + word for word in words())]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[], ignore_merges=True))
    before_words = [normalizers.Prepend(" "), normalizers.Replace(Regex(r"\A (?!\w)"), "")]
    tokenizer.normalizer = normalizers.Sequence([*before_words, normalizers.Replace(Regex(r"\n(?=\w)"), "\n ")])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteLevel(), decoders.Replace(Regex(r"(?<=\A|[\n>]) (?=\w)"), "")],
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=chat_template(family),
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
