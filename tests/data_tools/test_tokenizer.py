"""The tiny tokenizer: exact round trip of the world's language, nothing unknown, Qwen's chat format."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from data_tools.synthesize import draw_samples
from data_tools.tokenizer import SPECIAL, TAGS, build_tokenizer, words
from megatron_avatar.config.families import OMNI, OMNI3
from megatron_avatar.data.chat import chat_template

TOKENIZER = build_tokenizer()


def encode(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


sentences = st.lists(st.sampled_from(words()), min_size=1, max_size=8).map(lambda w: " ".join(w) + ".")


@given(sentences, st.sampled_from(words()))
def test_the_format_survives_exactly_in_one_token_a_word(sentence, answer):
    text = f"<think>{sentence}</think><answer>{answer}</answer>"
    ids = encode(text)
    assert TOKENIZER.decode(ids) == TOKENIZER.decode(ids, skip_special_tokens=True) == text
    assert len(ids) == len(sentence.split()) + 1 + 1 + len(TAGS)


@given(sentences, st.lists(sentences, max_size=3))
def test_lines_survive(first, rest):
    text = "\n".join([first, *rest])
    assert TOKENIZER.decode(encode(text)) == text


@settings(max_examples=300)
@given(st.text(st.characters(codec="utf-8"), max_size=40))
def test_nothing_is_unknown_and_decoding_settles(text):
    once = TOKENIZER.decode(encode(text))
    assert TOKENIZER.decode(encode(once)) == once
    assert once.split() == text.split()


def test_a_word_is_the_same_token_wherever_it_stands():
    (circle,) = encode("circle")
    assert encode("red circle")[1:] == encode("<answer>circle")[1:] == encode(".\ncircle")[2:] == [circle]


def test_special_tokens_are_one_token_and_dropped_when_asked():
    for token in SPECIAL:
        (index,) = encode(token)
        assert TOKENIZER.decode([index]) == token and TOKENIZER.decode([index], skip_special_tokens=True) == ""
    assert len(TOKENIZER) <= 400


def test_the_chat_format_is_qwens():
    content = [{"type": "video"}, {"type": "text", "text": "What color is the circle?"}]
    turns = [{"role": "user", "content": content}]
    text = TOKENIZER.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_bos|><|VIDEO|><|vision_eos|>What color is the circle?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert TOKENIZER.chat_template == chat_template(OMNI)


def test_all_that_the_synthesiser_says_is_known_words():
    known = set(words())
    for sample, _ in draw_samples(0, "demo"):
        told = [sample.question, sample.hint, sample.audio_caption, sample.scene["caption"], sample.trace or ""]
        text = " ".join(told)
        for mark in (*TAGS, ".", "?", ",", ":"):
            text = text.replace(mark, " ")
        assert set(text.split()) <= known, sample.id


@pytest.mark.parametrize("text", ["<think>noise late.</think><answer>B</answer>"])
def test_a_saved_tokenizer_is_the_same(tmp_path, text):
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(text)["input_ids"] == encode(text) and loaded.decode(encode(text)) == text
    assert loaded.chat_template == chat_template(OMNI)


def test_another_familys_tokenizer_differs_in_the_names_of_media_alone():
    other = build_tokenizer(OMNI3)
    changed = [(TOKENIZER.convert_ids_to_tokens(k), token) for token, k in sorted(other.get_vocab().items())
               if TOKENIZER.convert_ids_to_tokens(k) != token]  # fmt: skip
    assert len(other) == len(TOKENIZER) and set(changed) == {
        ("<|AUDIO|>", "<|audio_pad|>"), ("<|audio_bos|>", "<|audio_start|>"), ("<|audio_eos|>", "<|audio_end|>"),
        ("<|vision_bos|>", "<|vision_start|>"), ("<|vision_eos|>", "<|vision_end|>"), ("<|IMAGE|>", "<|image_pad|>"),
        ("<|VIDEO|>", "<|video_pad|>"),
    }  # fmt: skip
    assert other.chat_template == chat_template(OMNI3)
