"""The gate: its shares against hand-counted ones, what it refuses, and what the base's own forward says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen2_5OmniThinkerForConditionalGeneration

from bench import world
from data_tools.ladder import LADDER
from data_tools.pretrain import VIEW, told_right
from megatron_avatar.data.prompt import PromptBuilder, load_tokenizer


def found(**shares):
    return {name: {kind: {"value": value} for kind, value in shares.items()} for name in LADDER}


def test_a_share_has_wilsons_interval():
    got = world.share([True] * 81 + [False] * 19)
    z = 1.959963984540054
    middle = (0.81 + z**2 / 200) / (1 + z**2 / 100)
    half = z / (1 + z**2 / 100) * (0.81 * 0.19 / 100 + z**2 / 40000) ** 0.5
    assert got == pytest.approx({"value": 0.81, "low": middle - half, "high": middle + half, "n": 100})
    assert world.share([]) is None


def test_the_gate_names_what_is_below_it():
    assert world.failures(found(evidence=0.9, copied=0.95)) == []
    families = found(evidence=1.0, copied=1.0)
    families["see_two"]["evidence"]["value"] = 0.899
    families["tones"]["copied"]["value"] = 0.949
    assert world.failures(families) == [
        "tones: copied 94.9 %, at least 95 % are needed", "see_two: evidence 89.9 %, at least 90 % are needed",
    ]  # fmt: skip


def prediction(k: int, name: str, text: str, right: float) -> str:
    about = {"id": f"{name}-{k // 8}", "k": k % 8, "groups": {"family": [name]}}
    return json.dumps({**about, "text": text, "scores": {"accuracy": right}})


def test_drawn_answers_count_where_every_look_was_taken(tmp_path):
    file = tmp_path / "drawn.jsonl"
    full, half, guess = (
        f"<think>{told}so red circle blue cross.</think><answer>red circle blue cross</answer>"
        for told in ("left red circle. right blue cross. ", "left red circle. ", "")
    )
    texts = [(full, 1.0)] * 3 + [(full, 0.0), (half, 1.0), (guess, 1.0), (guess, 0.0), ("left red circle.", 0.0)]
    file.write_text("\n".join(prediction(k, "see_two", *said) for k, said in enumerate(texts)))
    shares = world.read_answers(file)
    assert shares["see_two"]["full_looks"]["value"] == 4 / 8
    assert shares["see_two"]["success_given_look"]["value"] == 3 / 4
    assert shares["see_one"] == {"full_looks": None, "success_given_look": None}
    file.write_text(prediction(0, "count", guess, 1.0))
    with pytest.raises(ValueError, match="--size study"):
        world.read_answers(file)


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    model = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(world.BASE, dtype=torch.float32).eval()
    builder = PromptBuilder(load_tokenizer(world.BASE), model.config, VIEW, context=512)
    return model, builder, list(world.examples(builder, tmp_path_factory.mktemp("gate"), 2))


def test_every_family_is_asked_about_clips_for_evidence_and_answer(asked):
    _, builder, made = asked
    assert [len(names) for _, names in made] == [len(LADDER) - 1] * 2 + [1] * 2
    for (_, lessons), names in made:
        assert len(lessons) == 2 * len(names)
        for (_, evidence), (given, answer) in zip(lessons[::2], lessons[1::2], strict=True):
            told, said = builder.decode(evidence), builder.decode(answer)
            assert builder.decode(given).endswith(f"{told} so")
            assert all(word in told.split() or f"{word}." in told.split() for word in said.rstrip(".").split())


@torch.no_grad()
def test_a_reply_is_right_where_greedy_decoding_says_it(asked):
    """Against decoding token by token, of the replies that are right and of those that aren't."""
    model, builder, made = asked
    for (prompt, lessons), _ in made[:1]:
        inputs = {"pixel_values_videos": prompt.pixels, "video_grid_thw": prompt.grid_thw}
        inputs |= {"video_second_per_grid": torch.tensor([0.5]), "input_features": prompt.mel[None]}
        inputs |= {"feature_attention_mask": torch.ones(1, prompt.mel.shape[1], dtype=torch.long)}
        inputs["use_audio_in_video"] = True
        whole = [bool(flags.all()) for flags in told_right(model, [(prompt, lessons)])[0]]
        for (given, told), right in list(zip(lessons, whole, strict=True))[:6]:
            ids = [*prompt.token_ids, *given]
            said = []
            for _ in told:
                row = torch.tensor([[*ids, *said]])
                logits = model(input_ids=row, attention_mask=torch.ones_like(row), **inputs).logits
                said.append(int(logits[0, -1].argmax()))
            assert np.array_equal(said, told) == right


def test_bad_arguments_are_refused(capsys, tmp_path):
    for arguments, word in ((["--limit", "0"], "--limit 0"), (["--base", str(tmp_path)], "--base"),
                            (["--answers", str(tmp_path / "none")], "none")):  # fmt: skip
        assert world.main(arguments) == 2
        assert word in capsys.readouterr().err
    assert Path(world.BASE).is_dir()
