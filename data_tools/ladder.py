"""The ladder: questions on the synthetic world, by the number of looks that an answer needs.

A look is one short sentence of what is seen or heard at the place or time that the question names; the answer is put
together from the looks. An answer without them is a guess among many. Rung 1 needs one look, rung 2 two, rung 3 three
or more; each rung has a family that sees, one that hears, and from the second on one that needs both.

Nothing about a scene depends on the question, but for the tones of `tones`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from data_tools.families import KINDS, draw_pattern, pick, trio
from data_tools.world import COLORS, COLUMNS, SHAPES, SLOTS, Scene, Sound, Thing

THINGS = tuple(f"{color} {shape}" for color in COLORS for shape in SHAPES)
_PATTERNS = 24  # of five tones
# Of the cold start's traces, which share takes all looks, by rung: rarer, not luckier, the higher it is.
FULL = {1: 0.5, 2: 0.12, 3: 0.004}
HINTED, HINTED_FULL = 1 / 3, 0.35  # the traces under a hint, and which of these take all looks


@dataclass(frozen=True)
class Look:
    """told: the sentence. part: what of the answer it gives ("": nothing yet). guesses: what that could be."""

    told: str
    part: str = ""
    guesses: tuple[str, ...] = ()


@dataclass(frozen=True)
class Question:
    """A question on a scene with the looks that it needs, in the order of its own words."""

    scene: Scene
    text: str
    looks: tuple[Look, ...]
    hint: str

    @property
    def answer(self) -> str:
        return " ".join(look.part for look in self.looks if look.part)

    @property
    def evidence(self) -> str:
        return " ".join(look.told for look in self.looks)

    @property
    def request(self) -> str:
        """What asks the base, which doesn't know the question's form, for the evidence."""
        return f"Describe {self.text[0].lower()}{self.text[1:-1]}."


@dataclass(frozen=True)
class Rung:
    """A family of the ladder. needs: modalities. chance: how often a guess without a look is right. blind: the same
    where one needed modality is missing and all that the other gives is used. ask: a question on a scene."""

    looks: int
    needs: tuple[str, ...]
    chance: float
    blind: float
    ask: Callable[[Scene, np.random.Generator], Question]

    @property
    def rung(self) -> int:
        return min(self.looks, 3)


def draw_scene(rng: np.random.Generator, *, tones: bool = False) -> Scene:
    """Three things in three columns, each of which moves at its own time, and three sounds, one at each time; or a
    pattern of `tones`."""
    things = tuple(trio(rng, "moves"))
    sound = Sound("slots", tuple(zip(pick(rng, KINDS, 3), SLOTS, strict=True)))
    if tones:
        sound = Sound("pattern", draw_pattern(rng)[0])
    return Scene(things, sound, int(rng.integers(2**31)))


def _named(thing: Thing) -> str:
    return f"{thing.color} {thing.shape}"


def _see(n: int) -> Callable[[Scene, np.random.Generator], Question]:
    def ask(scene: Scene, rng: np.random.Generator) -> Question:
        there = {COLUMNS[thing.column]: _named(thing) for thing in scene.things}
        columns = pick(rng, COLUMNS, n)
        looks = tuple(Look(f"{column} {there[column]}.", there[column], THINGS) for column in columns)
        return Question(scene, f"What is {' and '.join(columns)}?", looks, f"Look at {', then '.join(columns)}.")

    return ask


def _hear(n: int) -> Callable[[Scene, np.random.Generator], Question]:
    def ask(scene: Scene, rng: np.random.Generator) -> Question:
        heard = {slot: kind for kind, slot in scene.sound.items}
        slots = pick(rng, SLOTS, n)
        looks = tuple(Look(f"{slot} {heard[slot]}.", heard[slot], KINDS) for slot in slots)
        return Question(scene, f"What sounds {' and '.join(slots)}?", looks, f"Listen {', then '.join(slots)}.")

    return ask


def _match(n: int) -> Callable[[Scene, np.random.Generator], Question]:
    def ask(scene: Scene, rng: np.random.Generator) -> Question:
        moving = {thing.when: _named(thing) for thing in scene.things}
        chosen = pick(rng, scene.sound.items, n)
        looks = [
            look for kind, slot in chosen
            for look in (Look(f"{kind} {slot}."), Look(f"{slot} {moving[slot]}.", moving[slot], THINGS))
        ]  # fmt: skip
        asked = " and ".join(f"when the {kind} sounds" for kind, _ in chosen)
        return Question(scene, f"What moves {asked}?", tuple(looks), "Find when the sound is, then what moves.")

    return ask


def _tones(scene: Scene, rng: np.random.Generator) -> Question:
    said = " ".join(scene.sound.items)
    guesses = tuple(" ".join(draw_pattern(rng)[0]) for _ in range(8))
    return Question(scene, "What are the tones?", (Look(f"tones {said}.", said, guesses),), "Listen to each tone.")


_V, _A, _AV = ("video",), ("audio",), ("video", "audio")
_T, _K = len(THINGS), len(KINDS)
LADDER: dict[str, Rung] = {
    "see_one": Rung(1, _V, 1 / _T, 1 / _T, _see(1)),
    "hear_one": Rung(1, _A, 1 / _K, 1 / _K, _hear(1)),
    "tones": Rung(1, _A, 1 / _PATTERNS, 1 / _PATTERNS, _tones),
    "see_two": Rung(2, _V, 1 / _T**2, 1 / (_T * 9), _see(2)),
    "hear_two": Rung(2, _A, 1 / _K**2, 1 / (_K * (_K - 1)), _hear(2)),
    "match_one": Rung(2, _AV, 1 / _T, 1 / 3, _match(1)),
    "see_three": Rung(3, _V, 1 / _T**3, 1 / (_T * 9 * 4), _see(3)),
    "hear_three": Rung(3, _A, 1 / _K**3, 1 / (_K * (_K - 1) * (_K - 2)), _hear(3)),
    "match_two": Rung(4, _AV, 1 / _T**2, 1 / 6, _match(2)),
}


def ask(name: str, rng: np.random.Generator) -> Question:
    """A question of family `name` on a scene of its own."""
    return LADDER[name].ask(draw_scene(rng, tones=name == "tones"), rng)


def write_trace(question: Question, rng: np.random.Generator, full: float) -> str:
    """A cold start's answer: all looks with probability `full`, else some of the first, the rest guessed."""
    looks = question.looks
    taken = len(looks) if rng.random() < full else int(rng.integers(len(looks)))
    parts = [look.part if k < taken else str(rng.choice(look.guesses)) for k, look in enumerate(looks) if look.part]
    told, said = "".join(f"{look.told} " for look in looks[:taken]), " ".join(parts)
    return f"<think>{told}so {said}.</think><answer>{said}</answer>"


def said_looks(answer: str) -> int:
    """How many sentences stand before the conclusion of an answer: its looks, right or wrong."""
    thought = answer.partition("<think>")[2].partition("</think>")[0]
    return len(re.split(r"\bso\b", thought)[0].split(".")) - 1
