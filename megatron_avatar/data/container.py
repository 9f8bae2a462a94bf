"""An opened media file: which of its streams are meant, and how its pictures are to be shown.

Whoever reads media asks here, so that preparation, training and evaluation mean the same streams.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.sidedata.sidedata import Type
from av.stream import Disposition

# FFmpeg's errors, and PyAV's own of headers without a format, of odd texts in them, of streams that they don't name.
AV_ERRORS = (av.FFmpegError, ValueError, IndexError)
NO_PICTURE = Disposition.attached_pic | Disposition.timed_thumbnails
LOOKED_AT = 500  # packets
SQUARE = 0.02  # pixels so near to square are taken as such: the resize to multiples of 28 bends more
UPRIGHT = "prepare it with transcode=needed, which shows it upright with square pixels"
STALE = "measure it again, or restore the file that the manifest was made from"
# A matrix (a, b, c, d) takes the point (x, y) of a decoded frame to (ax + cy, bx + dy), y downwards: FFmpeg's filters
# for each of those that only turn by quarters and mirror, and what to call them.
TURNS: dict[tuple[int, ...], tuple[str, tuple[tuple[str, str], ...]]] = {
    (1, 0, 0, 1): ("", ()),
    (0, 1, -1, 0): ("turned by 90 degrees", (("transpose", "clock"),)),
    (-1, 0, 0, -1): ("turned by 180 degrees", (("hflip", ""), ("vflip", ""))),
    (0, -1, 1, 0): ("turned by 270 degrees", (("transpose", "cclock"),)),
    (-1, 0, 0, 1): ("mirrored", (("hflip", ""),)),
    (1, 0, 0, -1): ("mirrored upside down", (("vflip", ""),)),
    (0, 1, 1, 0): ("mirrored and turned by 270 degrees", (("transpose", "cclock_flip"),)),
    (0, -1, -1, 0): ("mirrored and turned by 90 degrees", (("transpose", "clock_flip"),)),
}


class MediaError(ValueError):
    """A media file that cannot be used; the message names the file, what is wrong and the remedy.

    `kind` is one word for it, as a preparation counts what it refuses.
    """

    def __init__(
        self, path: Path, what: str, remedy: str = "make or download the file again, or drop the sample",
        kind: str = "damaged",
    ):  # fmt: skip
        super().__init__(f"{path}: {what}; {remedy}")
        self.parts, self.kind = (path, what, remedy, kind), kind

    def __reduce__(self):  # crosses process borders with its parts, not with the finished message
        return type(self), self.parts


@dataclass(frozen=True)
class Posture:
    """How a clip's decoded frames are to be shown: first turned by `turn`'s filters, then with pixels of `aspect`
    (width to height, before the turn)."""

    turn: tuple[int, ...]
    aspect: Fraction

    @property
    def turned(self) -> str:
        """In words; empty for upright."""
        return TURNS[self.turn][0]

    @property
    def filters(self) -> tuple[tuple[str, str], ...]:
        return TURNS[self.turn][1]

    @property
    def is_square(self) -> bool:
        return abs(self.aspect - 1) <= SQUARE

    def shown(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of decoded frames once they are upright with square pixels; no side gets smaller."""
        wide = max(height, round(height / self.aspect)), max(width, round(width * self.aspect))
        height, width = (height, width) if self.is_square else wide
        return (height, width) if self.turn[0] else (width, height)


@dataclass(frozen=True)
class Fit:
    """What frames are made into: of `source` (height, width), as the manifest says, to `size`."""

    source: tuple[int, int]
    size: tuple[int, int]

    def check(self, path: Path, found: tuple[int, int]) -> None:
        """MediaError for frames of another size than the manifest's."""
        if found != self.source:
            (height, width), (h, w) = found, self.source
            raise MediaError(path, f"is {width}x{height} pixels, the manifest says {w}x{h}", STALE)


def clip_stream(container: av.container.InputContainer) -> av.VideoStream | None:
    """The film of a file: FFmpeg's choice among its video streams, never a cover picture. None without one."""
    films = [stream for stream in container.streams.video if not stream.disposition & NO_PICTURE]
    if len(films) > 1:  # a cover may be a stream of one picture, and even the default one
        moving = _moving(container.name)
        films = [stream for stream in films if stream.index in moving] or films
    return _chosen(films, container.streams.best("video"))


def sound_stream(container: av.container.InputContainer) -> av.AudioStream | None:
    """The sound track that a player would take: the default one, FFmpeg's choice among several. None without one."""
    known = [stream for stream in container.streams.audio if stream.codec_context is not None]
    return _chosen(known or container.streams.audio, container.streams.best("audio"))


def _moving(name: str) -> set[int]:
    """Which streams hold more than one packet, among the first packets of a file."""
    met: Counter[int] = Counter()
    with av.open(name) as container:
        for packet in itertools.islice(container.demux(video=list(range(len(container.streams.video)))), LOOKED_AT):
            met[packet.stream.index] += packet.size > 0
    return {index for index, count in met.items() if count > 1}


def _chosen(streams: Sequence[Any], best: Any) -> Any:
    """The best of them where it is one of them, else the first."""
    return next((s for s in streams if best is not None and s.index == best.index), next(iter(streams), None))


def picture_start(container: av.container.InputContainer) -> float | None:
    """Seconds at which the film of a file begins; None without a film."""
    film = clip_stream(container)
    return None if film is None else float((film.start_time or 0) * (film.time_base or 0))


def posture(path: Path, stream: av.VideoStream, frame: av.VideoFrame) -> Posture:
    """Of a stream, by its first frame. MediaError for a matrix that is no quarter turn and no mirror."""
    aspect = stream.sample_aspect_ratio or Fraction(1)
    entries: Any = frame.side_data  # PyAV types its entries as keys
    matrix = next((side for side in entries if side.type == Type.DISPLAYMATRIX), None)
    if matrix is None:
        return Posture((1, 0, 0, 1), aspect)
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    scale = math.sqrt(abs(a * d - b * c)) or 1.0
    turn = tuple(round(value / scale) for value in (a, b, c, d))
    if turn not in TURNS or max(abs(v / scale - t) for v, t in zip((a, b, c, d), turn, strict=True)) > 0.01:
        degrees = round(math.degrees(math.atan2(b, a)))
        what = f"is to be shown turned by {degrees} degrees or sheared, by a matrix that no encoding undoes"
        raise MediaError(path, what, "turn it upright with a video editor", "rotated")
    return Posture(turn, aspect)


def require_upright(path: Path, stream: av.VideoStream, frame: av.VideoFrame) -> None:
    """MediaError for a clip whose frames are not to be shown as they are decoded."""
    shown = posture(path, stream, frame)
    if shown.turned:
        kind = "mirrored" if shown.turned.startswith("mirrored") else "rotated"
        raise MediaError(path, f"is to be shown {shown.turned}, which the decoder doesn't", UPRIGHT, kind)
    if not shown.is_square:
        aspect = f"{shown.aspect.numerator}:{shown.aspect.denominator}"
        raise MediaError(path, f"has pixels of {aspect}, which the decoder doesn't stretch", UPRIGHT, "anamorphic")
