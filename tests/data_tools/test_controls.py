"""Muted and blinded controls: without the modality that a family needs, no policy can score above chance.

Each sample gets twins that differ only in that modality, and whose answers differ. With it taken away by the
evaluation's own switch their prompts are equal bit by bit: whatever a policy answers, it is right on one of them.
"""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from data_tools.families import FAMILIES
from data_tools.pretrain import VIEW, tiny_config
from data_tools.synthesize import clip_media, draw_samples, write_clip
from data_tools.tokenizer import build_tokenizer
from data_tools.world import DIRECTIONS, PITCHES, SHAPES, SLOTS, Scene, Sound, Thing
from megatron_avatar.data.prompt import PromptBuilder
from tests.data_tools.test_synthesize import _solved

SWITCH = {"audio": "mute", "video": "blind"}
CONTROLS = [(name, modality) for name, family in FAMILIES.items() for modality in family.needs]


def rotated(values, by: int) -> list:
    values = list(values)
    return values[by:] + values[:by]


def other_sounds(name: str, scene: Scene) -> list[Sound]:
    """Sounds under which the same question has another answer each."""
    match name:
        case "sync" | "where" | "source":  # the same sounds at other times
            turns = (dict(zip(SLOTS, rotated(SLOTS, k), strict=True)) for k in range(3))
            return [Sound("slots", tuple((kind, turn[slot]) for kind, slot in scene.sound.items)) for turn in turns]
        case "beeps":
            return [Sound("beeps", (1, 5, 9, 13)[:n]) for n in range(1, 5)]
        case "change":
            return [Sound("steady", ("low",)), Sound("change", ("low", "high"))]
        case "presence":
            return [Sound(track=False), Sound("steady", ("low",))]
        case "next":  # a b c a b: c comes next
            return [Sound("pattern", (*rotated(PITCHES, k), *rotated(PITCHES, k)[:2])) for k in range(3)]


def other_things(name: str, scene: Scene, question: str) -> list[tuple[Thing, ...]]:
    """Pictures under which the same question has another answer each."""
    things = scene.things
    match name:
        case "what":
            asked = next(t for t in things if t.color in question)
            return [(replace(asked, shape=shape),) for shape in SHAPES]
        case "count":
            return [tuple(Thing("circle", "red", k % 3, 1 + k // 3) for k in range(n)) for n in range(1, 5)]
        case "direction":
            return [(replace(things[0], column=1, row=1, when=when),) for when in DIRECTIONS]
        case _:  # the same things at other times
            whens = [t.when for t in things]
            return [
                tuple(replace(t, when=when) for t, when in zip(things, rotated(whens, k), strict=True))
                for k in range(3)
            ]


def twins(name: str, modality: str, scene: Scene, question: str) -> list[Scene]:
    if modality == "audio":
        return [replace(scene, sound=sound) for sound in other_sounds(name, scene)]
    return [replace(scene, things=things) for things in other_things(name, scene, question)]


def equal(one, two) -> bool:
    """Whether the policy is shown the same."""
    pairs = [(getattr(one, key), getattr(two, key)) for key in ("token_ids", "positions", "pixels", "mel")]
    return all((a is None) == (b is None) and (a is None or np.array_equal(a, b)) for a, b in pairs)


@pytest.fixture(scope="module")
def samples():
    return draw_samples(0, "tiny")


@pytest.mark.parametrize(("name", "modality"), CONTROLS, ids=[f"{n}-{SWITCH[m]}" for n, m in CONTROLS])
def test_a_policy_shown_less_is_right_on_one_twin_at_most(samples, tmp_path, name, modality):
    sample, scene = next((s, c) for s, c in samples if s.family == name and "What color" not in s.question)
    (tmp_path / "clips").mkdir()
    tokenizer = build_tokenizer()
    full, control = (
        PromptBuilder(tokenizer, tiny_config(tokenizer), data, context=512)
        for data in (VIEW, replace(VIEW, **{SWITCH[modality]: True}))
    )
    answers, shown, left = [], [], []
    for index, twin in enumerate(twins(name, modality, scene, sample.question)):
        media = clip_media(f"twin{index}", twin)
        write_clip((media, twin), tmp_path)
        changed = replace(sample, media=(media,), scene=twin.facts())
        (answer,) = _solved(changed)
        answers.append(answer)
        shown.append(full.build(changed, tmp_path))
        left.append(control.build(changed, tmp_path))
    assert len(set(answers)) == len(answers) >= round(1 / FAMILIES[name].chance)
    assert all(equal(left[0], prompt) for prompt in left[1:])
    assert not any(equal(a, b) for a, b in itertools.combinations(shown, 2))  # with it they are told apart
