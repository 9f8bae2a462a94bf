"""Sound tracks as 16 kHz mono: read a frame at a time and in time, with silence where the track has a hole.

Channels are averaged as they are, before any resampling: FFmpeg's own downmix weighs them, and is up to five times
louder for sound that it decodes to floats.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import av
import numpy as np

from megatron_avatar.data.container import MediaError, sound_stream
from megatron_avatar.data.whole import require_end, require_whole

SAMPLE_RATE = 16_000
UNKNOWN = 2**40  # samples; FLAC that was written into a pipe says none, which libsndfile reads as more than this
RATES = (1_000, 768_000)  # Hz; a header that claims another is damaged, or meant to fill the memory
MAX_SECONDS = 24 * 3600
ALIGNED_S = 0.01  # a track that starts so near to the picture is left as it is
SLACK_S = 0.05  # between a frame's time and the end of the one before it: clocks and containers round
BACK_S = 1.0  # a track that overlaps itself by more has another fault than a clock's
HOLE_S = 600.0  # and so has one with a longer hole
CANCELLED = 1e-4  # of the channels' power is left in their mean: they are each other's opposite
MUTE = "leave audio_path out of the manifest line of a mute clip"
_FULL_SCALE = {"u1": (128, 128), "i2": (0, 2**15), "i4": (0, 2**31), "i8": (0, 2**63), "f4": (0, 1), "f8": (0, 1)}


def read_track(
    path: Path, container: av.container.InputContainer, start: float | None = None, *, whole: bool = True
) -> Iterator[np.ndarray]:
    """Blocks [n] float32 of the default track at 16 kHz, the mean of its channels; none for a track without frames.

    The first sample is that of `start` seconds (None: of the track's own beginning): a late track has silence in front,
    of an early one the beginning is left out. Holes become silence, overlaps are heard once. `whole`: read from the
    file's beginning to its end, which must be where it promises. Raises MediaError for what is damaged, not finite, out
    of all measure, or silent only because its channels cancel out; FFmpegError for what FFmpeg refuses.
    """
    stream = sound_stream(container)
    if stream is None:
        raise MediaError(path, "holds no audio stream", MUTE, "no_sound")
    if stream.codec_context is None:
        raise MediaError(path, "no decoder knows the codec of its sound", "encode it anew, as FLAC or AAC", "codec")
    if whole:
        require_whole(path)
    frames = _frames(path, container, stream, whole)
    first = next(frames, None)
    if first is None:
        return
    timeline, mix = _Timeline(path, first.sample_rate, start), Mix(path)
    resampler = _Resampler(first.sample_rate)
    for frame in chain([first], frames):
        if frame.sample_rate != first.sample_rate:
            what = f"its rate changes from {first.sample_rate} to {frame.sample_rate} Hz"
            raise MediaError(path, what, "encode its sound anew")
        for block in timeline.place(frame.time, mix.mean(_channels(frame))):
            yield from resampler.push(block)
    yield from resampler.push(None)
    mix.require_heard()


def require_rate(path: Path, rate: int) -> None:
    """MediaError for a sampling rate that no sound has."""
    if not RATES[0] <= rate <= RATES[1]:
        what = f"claims {rate} samples a second; sound has {RATES[0]} to {RATES[1]}"
        raise MediaError(path, what, "correct its header, or encode it anew", "size")


def require_length(path: Path, seconds: float) -> None:
    """MediaError for sound longer than a day."""
    if seconds > MAX_SECONDS:
        raise MediaError(path, f"holds more than {MAX_SECONDS // 3600} hours of sound", "cut it into parts", "size")


class Mix:
    """The mean of the channels of a sound, given in parts."""

    def __init__(self, path: Path):
        self._path, self._power, self._mean_power = path, 0.0, 0.0

    def mean(self, channels: np.ndarray) -> np.ndarray:
        """[n] float32 of channels [c, n] float32. MediaError for numbers that are not finite."""
        if not np.isfinite(channels).all():
            raise MediaError(self._path, "holds samples that are not finite numbers")
        if len(channels) == 1:
            return channels[0]
        mono = channels.mean(axis=0, dtype=np.float32)
        self._power += float(np.square(channels, dtype=np.float64).mean(axis=0).sum())
        self._mean_power += float(np.square(mono, dtype=np.float64).sum())
        return mono

    def require_heard(self) -> None:
        """MediaError where the whole is silent only because its channels are each other's opposite."""
        if self._mean_power < CANCELLED * self._power:
            what = "its channels cancel each other out: one is the other's opposite, and their mean is silent"
            raise MediaError(self._path, what, "keep one of its channels", "cancelled")


def _frames(
    path: Path, container: av.container.InputContainer, stream: av.AudioStream, whole: bool
) -> Iterator[av.AudioFrame]:
    """Decoded frames in order; at the end what was read must be all that the file promises."""
    packets, samples, end, last = 0, 0, 0.0, b""
    rough = container.format.name == "wav"  # its last packet is short of what a pipe's header says; see require_whole
    stream.codec_context.thread_count = 1
    if stream.codec_context.name == "flac":
        stream.codec_context.options = {"err_detect": "crccheck"}
    # Ogg may end with an empty packet, at which FFmpeg's decoders stop with an error; None flushes.
    for packet in chain((packet for packet in container.demux(stream) if packet.size), [None]):
        if packet is not None:
            packets, last = packets + 1, bytes(packet)[:8192]
            if packet.is_corrupt and not rough:
                raise MediaError(path, "its sound holds a cut or damaged packet", kind="truncated")
            if packet.pts is not None:
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        for frame in stream.codec_context.decode(packet):
            samples += frame.samples
            end = max(end, (frame.time or 0.0) + frame.samples / max(1, frame.sample_rate))
            require_rate(path, frame.sample_rate)
            if frame.samples:
                yield frame
    if whole:
        require_end(path, container, stream, packets=packets, samples=samples, end=end, last=last)


def _channels(frame: av.AudioFrame) -> np.ndarray:
    """[c, n] float32 of a frame in any of FFmpeg's formats, full scale at 1."""
    data = frame.to_ndarray()
    if not frame.format.is_planar:
        data = data.reshape(frame.samples, -1).T
    middle, scale = _FULL_SCALE[data.dtype.str[1:]]
    with np.errstate(over="ignore"):  # a double beyond float32 is refused as infinite
        return (data.astype(np.float32) - np.float32(middle)) / np.float32(scale)


class _Timeline:
    """Where in a track's time its frames lie; `done` samples are placed already."""

    def __init__(self, path: Path, rate: int, start: float | None):
        self._path, self._rate, self._start, self._done, self._begun = path, rate, start, 0, False

    def place(self, time: float | None, mono: np.ndarray) -> Iterator[np.ndarray]:
        """The samples [n] of a frame at `time` seconds (None: right behind the one before) that come next, behind the
        silence that is due before them, in blocks of at most a second."""
        if time is not None and self._start is None:
            self._start = time
        start = self._start or 0.0  # it is None only where no frame has had a time
        late = 0 if time is None else round((time - start) * self._rate) - self._done
        if not self._begun and abs(late) < ALIGNED_S * self._rate and time is not None:
            self._start, late = start + late / self._rate, 0
        elif self._begun and abs(late) <= SLACK_S * self._rate:
            late = 0
        if late > HOLE_S * self._rate or (self._begun and late < -BACK_S * self._rate):
            what = "pauses for" if late > 0 else "goes back in time by"
            where = f"{abs(late) / self._rate:.2f} s behind {self._done / self._rate:.2f} s"
            raise MediaError(self._path, f"its sound {what} {where}", "encode its sound anew", "pts")
        mono = mono[max(0, -late) :]
        require_length(self._path, (self._done + max(0, late) + len(mono)) / self._rate)
        for silent in range(0, late, self._rate):
            yield np.zeros(min(self._rate, late - silent), np.float32)
        self._done += max(0, late) + len(mono)
        if len(mono):
            self._begun = True
            yield mono


class _Resampler:
    """Mono blocks to 16 kHz."""

    def __init__(self, rate: int):
        self._rate, self._pushed = rate, 0
        self._resampler = av.AudioResampler(format="flt", layout="mono", rate=SAMPLE_RATE)

    def push(self, block: np.ndarray | None) -> list[np.ndarray]:
        """What comes out for a block [n], or at the end, None."""
        if self._rate == SAMPLE_RATE:
            return [] if block is None else [block]
        frame = None
        if block is not None:
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(block)[None], format="flt", layout="mono")
            frame.sample_rate, frame.pts = self._rate, self._pushed
            self._pushed += len(block)
        return [chunk.to_ndarray()[0] for chunk in self._resampler.resample(frame)]
