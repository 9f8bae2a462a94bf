"""The synthetic world: coloured shapes on a 3 x 3 stage with tones, beeps, chirps and noise.

A clip lasts 2 s: 16 frames of 84 x 84 pixels at 8 fps, and 16 kHz mono sound. One cell of the stage
is 28 x 28 pixels, one visual token of Qwen2.5-Omni, so that a model of 2 M parameters can see it.
The cell's tint tells its column (blue, grey, red) and row (green), and a light in one of its corners
the quarter of the clip, because neither tower of the model knows absolute positions.

Things happen `early` (first quarter), in the `middle` (second and third) or `late` (last quarter).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

FRAMES, FPS, SIDE, CELL, RATE = 16, 8, 84, 28, 16000
SHAPES = ("circle", "square", "triangle", "cross")
COLORS = {"red": (250, 40, 40), "green": (30, 220, 60), "blue": (50, 90, 255), "yellow": (250, 230, 40)}
COLUMNS = ("left", "center", "right")
SLOTS = {"early": (0, 4), "middle": (4, 12), "late": (12, 16)}  # frames
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
PITCHES = {"low": 300.0, "medium": 900.0, "high": 2700.0}  # Hz
NUMBERS = ("no", "one", "two", "three", "four")

_COLUMN_TINT = np.array([[0, 0, 90], [45, 0, 45], [90, 0, 0]])
_ROW_TINT = np.array([[0, 75, 0], [0, 38, 0], [0, 0, 0]])
_SIZE, _MARGIN = 20, 4


@dataclass(frozen=True)
class Thing:
    """One object. act: still | moves (hops to the top row in slot `when`) | flashes (its cell lights up
    in slot `when`) | appears (in slot `when`) | slides (towards `when`, a direction)."""

    shape: str
    color: str
    column: int
    row: int = 1
    act: str = "still"
    when: str = ""

    @property
    def name(self) -> str:
        return f"{COLUMNS[self.column]} {self.color} {self.shape}"


@dataclass(frozen=True)
class Sound:
    """form: none | slots | beeps | steady | change | pattern. items: of `slots` (kind, slot) pairs, of
    `beeps` onsets in tenths of a second, else pitches. track: False means the clip carries no audio."""

    form: str = "none"
    items: tuple[Any, ...] = ()
    track: bool = True


@dataclass(frozen=True)
class Scene:
    """Full ground truth of a clip; `seed` keys its pixel and sound jitter."""

    things: tuple[Thing, ...]
    sound: Sound
    seed: int

    def facts(self) -> dict[str, Any]:
        """JSON-ready ground truth."""
        return asdict(self)

    def signature(self) -> str:
        """Equal for two clips that look and sound alike, in whatever order their things are listed."""
        return repr((sorted(map(repr, self.things)), self.sound))


# --- captions -----------------------------------------------------------------------------------


def describe_things(scene: Scene) -> str:
    """Count, then every thing from left to right: 'two objects. left red circle moves early. ...'"""
    count = len(scene.things)
    parts = [f"{NUMBERS[count]} object{'s' if count > 1 else ''}."]
    for thing in sorted(scene.things, key=lambda t: (t.column, t.row)):
        if thing.act == "slides":
            parts.append(f"{thing.color} {thing.shape} slides {thing.when}.")
        else:
            parts.append(f"{thing.name} {thing.act} {thing.when}".rstrip() + ".")
    return " ".join(parts)


def describe_times(scene: Scene) -> str:
    """What is seen to happen, in order of time: 'early left red circle moves. late ...'"""
    order = list(SLOTS)
    events = sorted((t for t in scene.things if t.when in SLOTS), key=lambda t: order.index(t.when))
    return " ".join(f"{t.when} {t.name} {t.act}." for t in events) or "nothing happens."


def describe_sound(sound: Sound) -> str:
    """'high tone early. low tone late.' | 'three beeps.' | 'no sound.' | ..."""
    if sound.form == "slots":
        return " ".join(f"{kind} {slot}." for kind, slot in sound.items)
    if sound.form == "beeps":
        return f"{NUMBERS[len(sound.items)]} beep{'s' if len(sound.items) > 1 else ''}."
    if sound.form == "steady":
        return f"steady {sound.items[0]} tone."
    if sound.form == "change":
        return f"tone changes from {sound.items[0]} to {sound.items[1]}."
    if sound.form == "pattern":
        return "tones " + " ".join(sound.items) + "."
    return "no sound."


# --- pictures -----------------------------------------------------------------------------------


def _mask(shape: str) -> np.ndarray:
    """[20, 20] bool."""
    y, x = np.mgrid[:_SIZE, :_SIZE] - (_SIZE - 1) / 2
    half = _SIZE / 2
    if shape == "circle":
        return x**2 + y**2 <= half**2
    if shape == "triangle":
        return np.abs(x) <= (y + half) / 2
    if shape == "cross":
        return (np.abs(x) <= 3) | (np.abs(y) <= 3)
    return np.ones((_SIZE, _SIZE), bool)


_MASKS = {shape: _mask(shape) for shape in SHAPES}


def _progress(frame: int) -> float:
    """0 in the first quarter, 1 in the middle, 2 in the last; half-way at the frames between."""
    return {3: 0.5, 12: 1.5}.get(frame, 0.0 if frame < 4 else 1.0 if frame < 12 else 2.0)


def _place(thing: Thing, frame: int) -> tuple[float, float] | None:
    """Column and row of a thing at a frame, in cells; None while it is not there."""
    start, end = SLOTS.get(thing.when, (0, FRAMES))
    if thing.act == "appears" and frame < start:
        return None
    if thing.act == "slides":
        dx, dy = DIRECTIONS[thing.when]
        step = _progress(frame) - 1
        return thing.column + dx * step, thing.row + dy * step
    if thing.act == "moves" and start <= frame < end:
        landing = frame in (3, 12) and thing.when != "middle"
        return thing.column, thing.row * 0.5 if landing else 0.0
    return thing.column, thing.row


def render_frames(scene: Scene) -> np.ndarray:
    """[16, 84, 84, 3] uint8 RGB."""
    rng = np.random.default_rng([scene.seed, 0])
    stage = np.repeat(np.repeat(_ROW_TINT[:, None] + _COLUMN_TINT[None], CELL, 0), CELL, 1)
    tint = {t: np.clip(np.array(COLORS[t.color]) + rng.integers(-12, 13, 3), 0, 255) for t in scene.things}
    offset = {t: rng.integers(-1, 2, 2) for t in scene.things}
    frames = np.empty((FRAMES, SIDE, SIDE, 3), np.uint8)
    for index, frame in enumerate(frames):
        frame[:] = stage
        for thing in scene.things:
            start, end = SLOTS.get(thing.when, (0, 0))
            if thing.act == "flashes" and start <= index < end:
                x, y = thing.column * CELL, thing.row * CELL
                frame[y + _MARGIN : y + CELL - _MARGIN, x : x + CELL] = 245
                frame[y : y + CELL, x + _MARGIN : x + CELL - _MARGIN] = 245
                frame[y + _MARGIN : y + CELL - _MARGIN, x + _MARGIN : x + CELL - _MARGIN] = stage[y, x]
            if (place := _place(thing, index)) is not None:
                x, y = (round(p * CELL) + _MARGIN + int(o) for p, o in zip(place, offset[thing], strict=True))
                frame[y : y + _SIZE, x : x + _SIZE][_MASKS[thing.shape]] = tint[thing]
        quarter = index // 4
        x, y = (0, CELL - _MARGIN)[quarter in (1, 2)], (0, CELL - _MARGIN)[quarter >= 2]
        for cy in range(y, SIDE, CELL):
            for cx in range(x, SIDE, CELL):
                frame[cy : cy + _MARGIN, cx : cx + _MARGIN] = 255
    return frames


# --- sound --------------------------------------------------------------------------------------


def _voice(kind: str, seconds: float, rng: np.random.Generator) -> np.ndarray:
    """One sound of 0.3 amplitude with 10 ms ramps; kind is 'noise', 'chirp' or a pitch, 'tone' ignored."""
    n = round(seconds * RATE)
    t = np.arange(n) / RATE
    kind = kind.removesuffix(" tone")
    if kind == "noise":
        wave = rng.uniform(-1, 1, n)
    elif kind == "chirp":
        wave = np.sin(2 * np.pi * (300 * t + (5000 - 300) / (2 * seconds) * t**2))
    else:
        wave = np.sin(2 * np.pi * PITCHES[kind] * rng.uniform(0.96, 1.04) * t)
    ramp = np.minimum(1.0, np.minimum(np.arange(n), np.arange(n)[::-1]) / (0.01 * RATE))
    return 0.3 * wave * ramp


def render_sound(scene: Scene) -> np.ndarray | None:
    """[32000] float32 at 16 kHz, or None for a clip without a track."""
    sound = scene.sound
    if not sound.track:
        return None
    rng = np.random.default_rng([scene.seed, 1])
    wave = rng.normal(0, 0.0005, FRAMES * RATE // FPS)
    if sound.form == "slots":
        starts = {"early": 0.05, "middle": 0.8, "late": 1.55}
        voices = [(starts[slot], kind, 0.4) for kind, slot in sound.items]
    elif sound.form == "beeps":
        voices = [(tenth / 10, "medium", 0.12) for tenth in sound.items]
    elif sound.form == "pattern":
        voices = [(0.02 + 0.4 * i, pitch, 0.3) for i, pitch in enumerate(sound.items)]
    elif sound.form == "steady":
        voices = [(0.0, sound.items[0], 2.0)]
    elif sound.form == "change":
        voices = [(0.0, sound.items[0], 1.0), (1.0, sound.items[1], 1.0)]
    else:
        voices = []
    for start, kind, seconds in voices:
        first = round(start * RATE)
        voice = _voice(kind, seconds, rng)
        wave[first : first + len(voice)] += voice
    return wave.astype(np.float32)
