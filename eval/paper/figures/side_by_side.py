"""A clip as a person sees and hears it, with the completions of several systems: for pages, and as Figure 8."""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from eval.paper.figures.style import FAINT, INK, LOOKS, styled, to_svg
from eval.scoring.predictions import Prediction
from megatron_avatar.config.schema import DataConfig
from megatron_avatar.data.decode import MediaError, decode_audio, decode_frames, plan_frames
from megatron_avatar.data.features import SAMPLE_RATE
from megatron_avatar.records import Sample

TEMPLATES = Path(__file__).resolve().parents[2]
FRAMES = 8
FRAME_HEIGHT = 120  # pixels of a picture on a page
HEARD_S = 30  # of a sound on a page: a megabyte and a quarter
COLUMN = 62  # characters in a line of a completion
LINES = 60  # of a completion in the figure; the page has all of it
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Clip:
    """A sample, its pictures [height, width, 3] and sound [n] at 16 kHz; `trouble` says what is missing of them.

    answers: (system's name, its prediction or None). `why`: the rule by which the clip was chosen.
    """

    sample: Sample
    pictures: list[np.ndarray]
    wave: np.ndarray | None
    trouble: list[str]
    answers: list[tuple[str, Prediction | None]]
    why: str = ""

    @property
    def frames(self) -> list[str]:
        """The pictures as data URLs."""
        return [_data_url(picture) for picture in self.pictures]

    @property
    def audio(self) -> str | None:
        """The sound, as much as a page holds of it, as a data URL that every browser plays."""
        if self.wave is None:
            return None
        buffer = io.BytesIO()
        soundfile.write(buffer, self.wave[: HEARD_S * SAMPLE_RATE], SAMPLE_RATE, format="WAV", subtype="PCM_16")
        return f"data:audio/wav;base64,{base64.b64encode(buffer.getvalue()).decode()}"

    @property
    def sound(self) -> Markup | None:
        """The waveform as an `<svg>` element."""
        if self.wave is None:
            return None
        return Markup(to_svg(waveform(self.wave, SAMPLE_RATE), f"wave-{self.sample.id}"))


def load_clip(sample: Sample, root: Path, answers: list[tuple[str, Prediction | None]], why: str = "") -> Clip:
    """Decode a sample's first video and its sound; `root` is what their paths are relative to. Damage is told."""
    media = next(m for m in sample.media if m.kind == "video")
    pictures, wave, trouble = [], None, []
    try:
        plan = plan_frames(media, DataConfig(min_frames=FRAMES, max_frames=FRAMES))
        pictures = list(decode_frames(root / media.path, plan, "pyav"))
    except MediaError as error:
        trouble.append(f"no pictures: {error}")
    try:
        if media.audio_path is None:
            trouble.append("no sound track")
        else:
            wave = decode_audio(root / media.audio_path, in_video=True)
    except MediaError as error:
        trouble.append(f"no sound: {error}")
    return Clip(sample, pictures, wave, trouble, answers, why)


def first_with_sound(samples: Iterable[Sample], systems: Sequence[Mapping[str, Any]]) -> Sample | None:
    """Figure 8's rule: the first sample in the manifest's order that shows a video with sound and that all systems
    (mappings by sample id) were asked; what they answered plays no part."""
    for sample in samples:
        heard = any(m.kind == "video" and m.audio_path for m in sample.media)
        if heard and all(sample.id in answers for answers in systems):
            return sample
    return None


def fragment(clip: Clip) -> str:
    """The clip as an HTML fragment, for a page with the report's style sheet; everything foreign is escaped."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("clip.html.j2").render(clip=clip, missing="not measured")


def score(prediction: Prediction) -> float | None:
    """A prediction's headline score in [0, 1]; None where none was given."""
    return next(iter(prediction["scores"].values())) if "scores" in prediction else prediction["correct"]


def side_by_side(clip: Clip) -> Figure:
    """Figure 8: question, pictures, waveform, and below them the completions beside one another, wrapped."""
    texts = [_cut(_wrapped(_shown(answer), COLUMN)) for _, answer in clip.answers]
    question = _wrapped(f"{_question(clip.sample)}  Right answer: {clip.sample.answer}", 118)
    heights = [0.16 * len(question) + 0.1, 1.05, 0.6, 0.14 * max(map(len, texts)) + 0.4]
    columns = len(clip.answers)
    with styled():
        figure = Figure(figsize=(4.4 * columns, sum(heights) + 0.3), layout="constrained")
        rows = figure.add_gridspec(4, 1, height_ratios=heights)
        _write(figure.add_subplot(rows[0]), question, {"fontsize": 9})
        strip = rows[1].subgridspec(1, max(1, len(clip.pictures)), wspace=0.02)
        for index, picture in enumerate(clip.pictures):
            axes = figure.add_subplot(strip[index])
            axes.imshow(picture)
            axes.set_axis_off()
        sound = figure.add_subplot(rows[2])
        if clip.wave is None:
            _write(sound, clip.trouble, {"color": FAINT})
        else:
            draw_wave(sound, clip.wave, SAMPLE_RATE)
        below = rows[3].subgridspec(1, columns)
        for index, ((name, answer), lines) in enumerate(zip(clip.answers, texts, strict=True)):
            axes = figure.add_subplot(below[index])
            _write(axes, lines, {"fontsize": 7.5, "family": "monospace"})
            axes.set_title(f"{name}: {_verdict(answer)}", fontweight="bold")
    return figure


def _shown(answer: Prediction | None) -> str:
    if answer is None:
        return "not measured"
    return (answer["text"] or "(empty)") if answer["error"] is None else f"failed: {answer['error']}"


def _verdict(answer: Prediction | None) -> str:
    value = None if answer is None else score(answer)
    return {None: "not graded", 1.0: "right", 0.0: "wrong"}.get(value, f"score {value}")


def _question(sample: Sample) -> str:
    choices = ", ".join(f"{LETTERS[i]}. {choice}" for i, choice in enumerate(sample.choices))
    return f"{sample.question}  {choices}" if choices else sample.question


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of at most `width` characters; a character without a glyph becomes a replacement mark."""
    plain = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text.replace("\t", " "))
    return [part for line in plain.split("\n") for part in (textwrap.wrap(line, width) or [""])]


def _cut(lines: list[str]) -> list[str]:
    """At most LINES of them, and how many there are more."""
    rest = len(lines) - LINES
    return lines if rest <= 0 else [*lines[:LINES], f"[{rest} more lines]"]


def _write(axes: Axes, lines: Sequence[str], style: Mapping[str, Any]) -> None:
    axes.set_axis_off()
    axes.text(0, 1, "\n".join(lines), va="top", transform=axes.transAxes, parse_math=False, linespacing=1.25, **style)


def waveform(samples: np.ndarray, rate: int) -> Figure:
    """The envelope of a sound [n] over its seconds."""
    with styled():
        figure = Figure(figsize=(6.4, 0.9), layout="constrained")
        draw_wave(figure.subplots(), samples, rate)
    return figure


def draw_wave(axes: Axes, samples: np.ndarray, rate: int) -> None:
    """The envelope of a sound [n] over its seconds."""
    columns = np.array_split(samples, min(len(samples), 600))
    seconds = np.linspace(0, len(samples) / rate, len(columns))
    lows, highs = [c.min() for c in columns], [c.max() for c in columns]
    color = LOOKS["avatar"].color
    axes.fill_between(seconds, lows, highs, color=color, linewidth=0.3, edgecolor=color)
    axes.set(ylim=(-1, 1), yticks=[], xlim=(0, max(len(samples) / rate, 1e-3)))
    axes.spines["left"].set_visible(False)
    axes.tick_params(colors=INK)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} s")


def _data_url(picture: np.ndarray) -> str:
    image, buffer = Image.fromarray(picture), io.BytesIO()
    image = image.resize((max(1, round(image.width * FRAME_HEIGHT / image.height)), FRAME_HEIGHT))
    image.save(buffer, format="JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
