"""What the tiny base is taught: to describe clips, to look where it is asked to, and to copy.

A lesson is a request, the beginning of the reply that is given to it, and the rest, which it learns. Copying is taught
beside a clip that the text is not about: only the text can tell what to copy.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from data_tools.families import FAMILIES, LETTERS, pick
from data_tools.ladder import LADDER, Question, ask, draw_scene
from data_tools.world import (
    COLORS,
    COLUMNS,
    DIRECTIONS,
    NUMBERS,
    PITCHES,
    SHAPES,
    SLOTS,
    Scene,
    describe_sound,
    describe_things,
    describe_times,
)

ON_LADDER = 0.4  # of the clips are scenes of the ladder, where nothing else is said
TONES = 0.25  # of these sound a pattern of tones
SCENE_WEIGHT = {"direction": 3, "beeps": 2}  # the facts that are slowest to learn are seen more often
WORDS = (*SHAPES, *COLORS, *COLUMNS, *SLOTS, *DIRECTIONS, *PITCHES, *NUMBERS, *LETTERS, *"0123456789", "chirp", "noise")
LOOKS, WHENS = 4, 2  # lessons of a clip of the ladder that look, and that only ask when
LONGEST = 6  # words of a list that is said again


class Lesson(NamedTuple):
    request: str
    told: str
    begun: str = ""


class Shown(NamedTuple):
    """What is filmed for lessons: a scene of the ladder, or of one of the demo's families."""

    scene: Scene
    on_ladder: bool


def draw_shown(rng: np.random.Generator, on_ladder: float = ON_LADDER) -> Shown:
    if rng.random() < on_ladder:
        return Shown(draw_scene(rng, tones=rng.random() < TONES), True)
    return draw_demo(rng)


def draw_demo(rng: np.random.Generator) -> Shown:
    """A scene of any family of the demo: only what is seen and heard, never the question."""
    weights = np.array([SCENE_WEIGHT.get(name, 1) for name in FAMILIES])
    family = FAMILIES[str(rng.choice(list(FAMILIES), p=weights / weights.sum()))]
    return Shown(family.draft(str(rng.choice(family.answers)), rng).scene, False)


def draw_lessons(shown: Shown, rng: np.random.Generator, texts: tuple[int, int, int]) -> list[Lesson]:
    """The lessons that are given beside a scene, in any order: none sees another. texts: how many of them only need
    their own text, answers from given evidence, lists said again, and letters beyond those that come with a scene."""
    told = looks(shown.scene, rng) if shown.on_ladder else descriptions(shown, rng)
    asked = [ask(str(name), rng) for name in rng.choice(list(LADDER), texts[0])]
    read = [words(rng) for _ in range(texts[1])] + [letters(rng) for _ in range(texts[2])]
    return [*told, *map(notes, asked), *read]


def descriptions(shown: Shown, rng: np.random.Generator) -> list[Lesson]:
    """All aspects of a scene, and two lists of letters."""
    return [*(describe(shown.scene, what) for what in ("clip", "sounds", "times")), letters(rng), letters(rng)]


def looks(scene: Scene, rng: np.random.Generator) -> list[Lesson]:
    """Evidence for the ladder's families that fit the scene, a family as often as it has looks; when sounds are heard;
    the clip or a list of letters."""
    left_out = {"hear", "match"} if scene.sound.form == "pattern" else {"tones"}
    names = [name for name in LADDER if name.partition("_")[0] not in left_out]
    weights = np.array([LADDER[name].looks for name in names])
    chosen = rng.choice(names, LOOKS, p=weights / weights.sum())
    last = describe(scene, "clip") if rng.random() < 0.5 else letters(rng)
    return [*(look(LADDER[name].ask(scene, rng)) for name in map(str, chosen)), *whens(scene, rng), last]


def whens(scene: Scene, rng: np.random.Generator) -> list[Lesson]:
    """When each sound is heard: the half of matching that only a search through the whole clip finds."""
    heard = pick(rng, scene.sound.items, WHENS) if scene.sound.form == "slots" else []
    return [Lesson(f"Describe when the {kind} sounds.", f"{kind} {slot}.") for kind, slot in heard]


def describe(scene: Scene, aspect: str) -> Lesson:
    """One aspect of a scene: clip, sounds or times."""
    told = {
        "clip": lambda: f"{describe_things(scene)} {describe_sound(scene.sound)}",
        "sounds": lambda: describe_sound(scene.sound),
        "times": lambda: describe_times(scene),
    }[aspect]()
    return Lesson("Describe what happens when." if aspect == "times" else f"Describe the {aspect}.", told)


def look(question: Question) -> Lesson:
    """The evidence that a question asks for."""
    return Lesson(question.request, question.evidence)


def notes(question: Question) -> Lesson:
    """The answer to a question, from evidence that stands there already."""
    return Lesson(question.text, f"{question.answer}.", f"{question.evidence} so")


def words(rng: np.random.Generator) -> Lesson:
    """A single word or digit, or a short list, said again."""
    said = " ".join(pick(rng, WORDS, int(rng.integers(1, LONGEST + 1))))
    return Lesson(f"Describe: {said}.", f"{said}.")


def letters(rng: np.random.Generator) -> Lesson:
    """Which letter stands for which choice of a list."""
    group = list((SHAPES, tuple(COLORS), COLUMNS)[int(rng.integers(3))])
    listed, told = pick(rng, group, len(group)), rng.permutation(len(group))
    lines = [f"{letter}. {word}" for letter, word in zip(LETTERS, listed, strict=False)]
    return Lesson("\n".join(["Describe the letters.", *lines]), " ".join(f"{listed[i]} is {LETTERS[i]}." for i in told))
