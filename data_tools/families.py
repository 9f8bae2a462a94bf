"""Question families on the synthetic world: a target answer goes in, a scene and its question come out.

Each family is a function (answer, rng) -> Draft. The caller hands out answers evenly, so that no
answer is more frequent than another; everything else is drawn at random, so that nothing but the
modalities a family `needs` tells the answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from data_tools.world import (
    COLORS,
    COLUMNS,
    DIRECTIONS,
    NUMBERS,
    PITCHES,
    SHAPES,
    SLOTS,
    Scene,
    Sound,
    Thing,
    describe_sound,
    describe_things,
    describe_times,
)

LETTERS = "ABCD"
KINDS = ("low tone", "medium tone", "high tone", "chirp", "noise")


@dataclass(frozen=True)
class Draft:
    """A question on a scene. evidence: what is told on the way to the answer, up to the thing it is about. options:
    multiple choice. target: the thing the answer is about; heard: sounds the answer rests on. hint: where or when to
    look, instead of the family's."""

    scene: Scene
    question: str
    answer: str
    evidence: str
    options: tuple[str, ...] = ()
    target: Thing | None = None
    heard: tuple[str, ...] = ()
    hint: str = ""


@dataclass(frozen=True)
class Family:
    """answers: what the answers are balanced over. chance: accuracy of the best guess when a needed
    modality is missing."""

    stage: str
    needs: tuple[str, ...]
    answers: tuple[str, ...]
    chance: float
    problem_type: str
    hint: str
    draft: Callable[[str, np.random.Generator], Draft]


def pick(rng: np.random.Generator, items: Any, n: int) -> list[Any]:
    """n different items in random order."""
    items = list(items)
    return [items[i] for i in rng.permutation(len(items))[:n]]


def trio(rng: np.random.Generator, act: str, n: int = 3, **first: str) -> list[Thing]:
    """n things of different shape, colour, column and (for acts with a time) slot; `first` fixes shape or color of
    the first one."""
    values = {"shape": SHAPES, "color": tuple(COLORS)}
    drawn = {}
    for key, options in values.items():
        head = [first[key]] if key in first else []
        drawn[key] = head + pick(rng, [o for o in options if o not in head], n - len(head))
    columns, slots = pick(rng, range(3), n), pick(rng, SLOTS, n)
    rows = [1] * n if act == "moves" else rng.integers(1, 3, n).tolist()
    whens = slots if act in ("moves", "flashes", "appears") else [""] * n
    return [Thing(*parts, act, when) for *parts, when in zip(*drawn.values(), columns, rows, whens, strict=True)]


def _noise_sound(rng: np.random.Generator) -> Sound:
    """Any sound at all: background for questions about pictures."""
    form = rng.choice(["none", "mute", "slots", "beeps", "steady", "change", "pattern"])
    if form == "mute":
        return Sound(track=False)
    if form == "slots":
        slots = sorted(pick(rng, SLOTS, int(rng.integers(1, 4))), key=list(SLOTS).index)
        return Sound("slots", tuple((str(rng.choice(KINDS)), slot) for slot in slots))
    if form == "beeps":
        return _beeps(rng, int(rng.integers(1, 5)))
    if form == "steady":
        return Sound("steady", (str(rng.choice(list(PITCHES))),))
    if form == "change":
        return Sound("change", tuple(pick(rng, PITCHES, 2)))
    if form == "pattern":
        return Sound("pattern", draw_pattern(rng)[0])
    return Sound()


def _noise_things(rng: np.random.Generator) -> tuple[Thing, ...]:
    """Any one to three things: background for questions about sound."""
    act = str(rng.choice(["still", "moves", "flashes", "appears"]))
    return tuple(trio(rng, act, int(rng.integers(1, 4))))


def _beeps(rng: np.random.Generator, n: int) -> Sound:
    return Sound("beeps", tuple(sorted(pick(rng, (1, 5, 9, 13, 17), n))))


def draw_pattern(rng: np.random.Generator) -> tuple[tuple[str, ...], str]:
    """Five tones of a repeating pattern and the tone that comes next."""
    a, b, c = pick(rng, PITCHES, 3)
    unit = [(a, b), (a, a, b, b), (a, b, b), (a, b, c)][int(rng.integers(4))]
    tones = (unit * 3)[:6]
    return tones[:5], tones[5]


def _seed(rng: np.random.Generator) -> int:
    return int(rng.integers(2**31))


def _scene(rng: np.random.Generator, things: Any, sound: Sound | None = None) -> Scene:
    return Scene(tuple(things), _noise_sound(rng) if sound is None else sound, _seed(rng))


# --- stage visual ---------------------------------------------------------------------------------


def _what(answer: str, rng: np.random.Generator) -> Draft:
    kind = "color" if answer in COLORS else "shape"
    things = trio(rng, "still", int(rng.integers(2, 4)), **{kind: answer})
    target = things[0]
    question = f"What color is the {target.shape}?" if kind == "color" else f"Which shape is {target.color}?"
    options = tuple(COLORS) if kind == "color" else SHAPES
    scene, hint = _scene(rng, things), f"Look at the {COLUMNS[target.column]} object, then find its letter."
    return Draft(scene, question, answer, until(describe_things(scene), target), options, target, hint=hint)


def _count(answer: str, rng: np.random.Generator) -> Draft:
    n = int(answer)
    cells = pick(rng, [(c, r) for c in range(3) for r in (1, 2)], n)
    things = [Thing(str(rng.choice(SHAPES)), str(rng.choice(list(COLORS))), c, r) for c, r in cells]
    evidence = f"{NUMBERS[n]} object{'s' if n > 1 else ''}."
    return Draft(_scene(rng, things), "How many objects are there?", answer, evidence)


def _direction(answer: str, rng: np.random.Generator) -> Draft:
    dx, dy = DIRECTIONS[answer]
    column, row = (1 if dx else int(rng.integers(3))), (1 if dy else int(rng.integers(3)))
    target = Thing(str(rng.choice(SHAPES)), str(rng.choice(list(COLORS))), column, row, "slides", answer)
    evidence = f"{target.color} {target.shape} slides {answer}."
    return Draft(_scene(rng, [target]), "Which way does the object slide?", answer, evidence, target=target)


def _order(answer: str, rng: np.random.Generator) -> Draft:
    which, slot = [("first", "early"), ("second", "middle"), ("last", "late")][int(rng.integers(3))]
    things = trio(rng, "appears", shape=answer)
    target, things = _swap(things, slot)
    scene, question = _scene(rng, _shuffled(rng, things)), f"Which shape appears {which}?"
    evidence, hint = until(describe_times(scene), target), f"Find what appears {slot}."
    return Draft(scene, question, answer, evidence, _shapes(things), target, hint=hint)


def until(description: str, target: Thing) -> str:
    """The description's sentences up to the one that names the target."""
    before, name, after = description.partition(target.name)
    return before + name + after[: after.index(".") + 1]


def _swap(things: list[Thing], slot: str) -> tuple[Thing, list[Thing]]:
    """Give the first thing the slot, and its own slot to the thing that had it."""
    had = things[0].when
    things = [replace(t, when=had if t.when == slot else t.when) for t in things]
    things[0] = replace(things[0], when=slot)
    return things[0], things


def _shuffled(rng: np.random.Generator, things: list[Thing]) -> list[Thing]:
    return pick(rng, things, len(things))


def _shapes(things: list[Thing]) -> tuple[str, ...]:
    return tuple(t.shape for t in things)


# --- stage audio_visual ---------------------------------------------------------------------------


def _sync(answer: str, rng: np.random.Generator) -> Draft:
    """Every thing moves once; the tone asked for and one or two other tones sound, each at its own time."""
    kinds, slots = pick(rng, KINDS[:3], int(rng.integers(2, 4))), pick(rng, SLOTS, 3)
    things, question = trio(rng, "moves", shape=answer), "Which shape moves when the {} sounds?"
    return _at_the_sound(things, kinds, slots, question, answer, rng)


def _at_the_sound(
    things: list[Thing], kinds: list[str], slots: list[str], question: str, answer: str, rng: np.random.Generator
) -> Draft:
    """A draft whose answer is the thing that acts while the first of `kinds` sounds, in the first of `slots`; the
    other sounds are at the other times."""
    heard = kinds[0]
    target, things = _swap(things, slots[0])
    at = dict(zip(slots, kinds, strict=False))
    sound = Sound("slots", tuple((at[slot], slot) for slot in SLOTS if slot in at))
    scene = _scene(rng, _shuffled(rng, things), sound)
    return Draft(
        scene, question.format(heard), answer, f"{describe_sound(sound)} {until(describe_times(scene), target)}",
        target=target, heard=(heard, target.when), hint=f"Listen, the {heard} is {target.when}.",
    )  # fmt: skip


def _beep_count(answer: str, rng: np.random.Generator) -> Draft:
    sound = _beeps(rng, int(answer))
    scene = _scene(rng, _noise_things(rng), sound)
    return Draft(scene, "How many beeps are there?", answer, describe_sound(sound), heard=(NUMBERS[int(answer)],))


def _change(answer: str, rng: np.random.Generator) -> Draft:
    pitches = tuple(pick(rng, PITCHES, 2 if answer == "yes" else 1))
    sound = Sound("change" if answer == "yes" else "steady", pitches)
    scene = _scene(rng, _noise_things(rng), sound)
    return Draft(scene, "Does the tone change?", answer, describe_sound(sound), heard=("tone", *pitches))


def _presence(answer: str, rng: np.random.Generator) -> Draft:
    """Hallucination: things always happen, half of the clips are silent, half of those without a track."""
    sound = Sound(track=bool(rng.integers(2)))
    while (answer == "yes") != (sound.form != "none"):
        sound = _noise_sound(rng)
    scene = _scene(rng, trio(rng, str(rng.choice(["moves", "flashes"])), int(rng.integers(1, 4))), sound)
    told = describe_sound(sound)
    return Draft(scene, "Is there any sound?", answer, told, heard=tuple(told.replace(".", "").split()))


def _next(answer: str, rng: np.random.Generator) -> Draft:
    tones, following = draw_pattern(rng)
    while following != answer:
        tones, following = draw_pattern(rng)
    sound = Sound("pattern", tones)
    scene = _scene(rng, _noise_things(rng), sound)
    return Draft(scene, "Which tone comes next?", answer, describe_sound(sound), heard=("tones", *dict.fromkeys(tones)))


# --- stage localisation ---------------------------------------------------------------------------


def _where(answer: str, rng: np.random.Generator) -> Draft:
    """Every thing flashes once; of one to three sounds the one asked for tells whose flash it belongs to."""
    things = trio(rng, "flashes")
    column, first = COLUMNS.index(answer), things[0].column
    things = [replace(t, column=first if t.column == column else t.column) for t in things]
    things[0] = replace(things[0], column=column)
    return _sounding(things, "Where is the object that makes the {}?", answer, rng)


def _source(answer: str, rng: np.random.Generator) -> Draft:
    return _sounding(trio(rng, "flashes", shape=answer), "Which shape makes the {}?", answer, rng)


def _sounding(things: list[Thing], question: str, answer: str, rng: np.random.Generator) -> Draft:
    kinds, slots = pick(rng, KINDS, int(rng.integers(1, 4))), pick(rng, SLOTS, 3)
    return _at_the_sound(things, kinds, slots, question, answer, rng)


_V, _A, _AV = ("video",), ("audio",), ("video", "audio")
_DIGITS = ("1", "2", "3", "4")
FAMILIES: dict[str, Family] = {
    "what": Family(
        "visual", _V, (*COLORS, *SHAPES), 1 / 4, "multiple_choice", "Look at each object, then find its letter.", _what
    ),
    "count": Family("visual", _V, _DIGITS, 1 / 4, "numerical", "Count the objects from left to right.", _count),
    "direction": Family(
        "visual", _V, tuple(DIRECTIONS), 1 / 4, "other", "Compare where the object is early and late.", _direction
    ),
    "order": Family("visual", _V, SHAPES, 1 / 3, "multiple_choice", "Find what appears at each time.", _order),
    "sync": Family(
        "audio_visual", _AV, SHAPES, 1 / 3, "other",
        "Find when the tone sounds, then what moves at that time.", _sync,
    ),
    "beeps": Family("audio_visual", _A, _DIGITS, 1 / 4, "numerical", "Listen and count every beep.", _beep_count),
    "change": Family(
        "audio_visual", _A, ("yes", "no"), 1 / 2, "other", "Compare the tone early and late.", _change
    ),
    "presence": Family(
        "audio_visual", _A, ("yes", "no"), 1 / 2, "other", "Trust what you hear, not what you see.", _presence
    ),
    "next": Family(
        "audio_visual", _A, tuple(PITCHES), 1 / 3, "other", "Find the part that repeats in the tones.", _next
    ),
    "where": Family(
        "localisation", _AV, COLUMNS, 1 / 3, "other",
        "Find when the sound is, then what flashes at that time.", _where,
    ),
    "source": Family(
        "localisation", _AV, SHAPES, 1 / 3, "other", "Find when the sound is, then what flashes at that time.", _source
    ),
}  # fmt: skip


def judge_words(draft: Draft) -> dict[str, dict[str, list[str]]]:
    """What a rule-based judge expects, and what contradicts the scene, for each of its four criteria."""
    scene, target = draft.scene, draft.target
    words = {"low", "medium", "high", "chirp", "noise", "beep", "beeps", "tone", "tones"}
    said = words & set(describe_sound(scene.sound).replace(".", "").split())
    plurals = ({"tone", "tones"}, {"beep", "beeps"})
    audible = said.union(*(pair for pair in plurals if pair & said), *([plurals[0]] if said & set(PITCHES) else []))
    heard = sorted({w for item in draft.heard for w in item.split()})
    wrong_sounds = sorted(words - audible)
    told = set(draft.evidence.replace(".", "").split())
    wrong_times = [slot for slot in SLOTS if slot not in told] if set(heard) & set(SLOTS) else []
    seen = {t.shape for t in scene.things} | {t.color for t in scene.things}
    shown = [target.color, target.shape] if target else []
    column = COLUMNS[target.column] if target and target.act != "slides" else None
    return {
        "audio_grounding_score": {"expect": heard, "contradict": [*wrong_sounds, *wrong_times]},
        "visual_id_score": {"expect": shown, "contradict": sorted({*SHAPES, *COLORS} - seen)},
        "location_acc_score": {
            "expect": [column] if column else [],
            "contradict": [c for c in COLUMNS if c not in told] if column else [],
        },
        "caption_corr_score": {"expect": (sorted(said) or ["no"]) if heard else [], "contradict": wrong_sounds},
    }
