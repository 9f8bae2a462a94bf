"""Media files to arrays: frames as RGB bytes, sound as 16 kHz mono floats.

Two heads decode video and agree bit for bit on the CPU: DALI and PyAV. DALI reads colours as BT.601
whatever the stream's tag says, so PyAV is told to do the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import soundfile
import torch
from PIL import Image

from megatron_avatar.config.families import TEMPORAL_PATCH
from megatron_avatar.config.schema import DataConfig
from megatron_avatar.data import dali, packets
from megatron_avatar.data.container import (
    AV_ERRORS,
    STALE,
    Fit,
    MediaError,
    clip_stream,
    picture_start,
    require_upright,
)
from megatron_avatar.data.features import resize
from megatron_avatar.data.picture import PICTURES, to_rgb
from megatron_avatar.data.sound import MUTE, SAMPLE_RATE, UNKNOWN, Mix, read_track, require_length, require_rate
from megatron_avatar.data.whole import require_whole
from megatron_avatar.files import is_machines
from megatron_avatar.records import Media

MAX_FRAME_PIXELS = 2**27  # a header that claims more is damaged, or meant to fill the memory
RESIZED_AT_ONCE = 4  # frames: with three planes each they fill the resize's pictures of four
TO_RGB = (
    ("scale", "flags=bilinear+full_chroma_int+accurate_rnd:in_color_matrix=bt601"),
    ("format", "gbrp"),  # planes: the same bytes as rgb24 in less than half of the time
)


def clip_seconds(media: Media) -> float:
    """Length of a clip in seconds, its last frame included."""
    if media.pts is None or media.frame_count < 2:
        return media.frame_count / media.fps
    return (media.pts[-1] - media.pts[0]) * media.frame_count / (media.frame_count - 1)


def plan_frames(media: Media, data: DataConfig, odd: bool = False) -> np.ndarray:
    """Indices [T] int64 of the frames to decode, spread evenly over the clip's time from first to last.

    T is the clip's seconds times `data.fps`, within `data.min_frames` and `data.max_frames` and the frames there are,
    and then floored: to even, as qwen-omni-utils counts, or with `odd` to a whole number, as Qwen3-VL's processor in
    transformers does. A clip of one frame shows it twice. `media.pts` (variable frame rate) picks the frames nearest
    in time.
    """
    step, wanted = 1 if odd else TEMPORAL_PATCH, clip_seconds(media) * data.fps
    if media.pts is not None:
        wanted = round(wanted, 6)  # seconds out of times that were rounded: 15.9999999 are 16 frames
    count = int(min(max(wanted, data.min_frames), data.max_frames, media.frame_count) // step) * step
    count = max(TEMPORAL_PATCH, count)
    if media.pts is None:
        return np.rint(np.linspace(0, media.frame_count - 1, count)).astype(np.int64)
    pts = np.asarray(media.pts)
    return np.abs(pts[None] - np.linspace(pts[0], pts[-1], count)[:, None]).argmin(axis=1)


def frame_seconds(media: Media, indices: np.ndarray) -> np.ndarray:
    """When the frames [T] at `indices` are shown: seconds [T] after the clip's first one."""
    if media.pts is None:
        return indices / media.fps
    return np.asarray(media.pts)[indices] - media.pts[0]


def _require_content(path: Path) -> None:
    try:
        size = path.stat().st_size if path.is_file() else None
    except OSError as error:
        _raise_machines(error)
        raise MediaError(path, f"cannot be opened ({error.strerror})", "correct the path in the manifest") from error
    if size is None:
        raise MediaError(path, "the file is missing", "restore it, or correct the path in the manifest")
    if size == 0:
        raise MediaError(path, "the file is empty (0 bytes)")


def _raise_machines(error: Exception) -> None:
    """An error of this machine ends the run: no sample is set aside for it."""
    if is_machines(error):
        raise error


def decode_frames(path: Path, indices: np.ndarray, backend: str = "auto", fit: Fit | None = None) -> np.ndarray:
    """RGB frames [T, H, W, 3] uint8 at `indices` [T] (any order, repeats allowed).

    `backend`: "dali", "pyav", or "auto": with a GPU DALI for the codecs that it decodes, PyAV for the others and for a
    file that DALI refuses; without a GPU PyAV, which is the faster one there (bench.decode). With `fit` frames are
    resized as they come, a few at a time in their full size.
    Raises MediaError for a file that is missing, empty, no video, damaged, ends before the last index, is to be shown
    turned, mirrored or stretched, or has frames of another size than `fit.source`.
    """
    path, indices = Path(path), np.asarray(indices)
    _require_content(path)
    try:
        if prefers_dali(backend) and _dali_reads(path, backend, fit):
            try:
                return dali.reader().take(path, indices, fit)
            except RuntimeError as error:
                if backend == "dali":
                    reason = str(error).strip().splitlines()[-1]
                    raise MediaError(path, f"DALI cannot decode it ({reason})", "try data.decoder=auto") from error
        return _decode_pyav(path, indices, fit)
    except MediaError:
        raise
    except AV_ERRORS as error:
        _raise_machines(error)
        raise MediaError(path, f"not a video, or damaged ({getattr(error, 'strerror', error)})") from error


def prefers_dali(backend: str) -> bool:
    """Whether clips go to DALI where it can decode them."""
    return backend == "dali" or (backend == "auto" and torch.cuda.is_available() and bool(dali.codecs()))


def decoders(backend: str) -> str:
    """What decodes which clips here, in words."""
    if not prefers_dali(backend):
        return "PyAV, all codecs" + ("" if backend == "pyav" else " (without a GPU it is faster than DALI)")
    device = "the GPU" if torch.cuda.is_available() else "the CPU"
    rest = "nothing else" if backend == "dali" else "PyAV the rest, and what DALI refuses"
    return f"DALI on {device}: {', '.join(dali.codecs())}; {rest}"


def _video_stream(container: av.container.InputContainer, path: Path) -> av.VideoStream:
    stream = clip_stream(container)
    if stream is None:
        raise MediaError(path, "holds no video stream", "correct the media kind in the manifest")
    if stream.codec_context is None:
        raise MediaError(path, "no decoder knows its codec", "encode it anew, as VP9 or H.264")
    width, height = stream.codec_context.width, stream.codec_context.height
    if width * height > MAX_FRAME_PIXELS:
        raise MediaError(path, f"claims frames of {width}x{height} pixels", "encode it anew, smaller")
    stream.codec_context.thread_count = 1  # clips are decoded side by side, and threads take longer to start
    return stream


def _dali_reads(path: Path, backend: str, fit: Fit | None) -> bool:
    """Whether a clip goes to DALI, which sees neither how it is to be shown nor which of several streams is meant."""
    with av.open(str(path)) as container:
        stream = _video_stream(container, path)
        alone = len(container.streams.video) == 1
        if backend == "dali" and not alone:
            raise MediaError(path, "holds several video streams, and DALI can't choose", "try data.decoder=auto")
        if not alone or (backend == "auto" and stream.codec_context.codec.canonical_name not in dali.codecs()):
            return False
        first = next(container.decode(stream), None)
        if first is not None:
            require_upright(path, stream, first)
            if fit is not None:
                fit.check(path, (first.height, first.width))
        return True


def _decode_pyav(path: Path, indices: np.ndarray, fit: Fit | None) -> np.ndarray:
    """From the packets that are needed, where they tell which frames they hold; else from all up to the last frame."""
    wanted, places = np.unique(indices, return_inverse=True)
    try:
        frames = _decode_needed(path, wanted.tolist(), fit)
    except (packets.Untrusted, av.FFmpegError):  # a damaged packet may be one that the frames don't need
        frames = _decode_in_turn(path, wanted.tolist(), fit)
    if frames is None:
        raise MediaError(path, f"ends before frame {wanted[-1]}, which its manifest line promises (truncated?)")
    as_wanted = len(places) == len(wanted) and (places[1:] > places[:-1]).all()
    return (frames if as_wanted else frames[places]).transpose(0, 2, 3, 1)


def _decode_needed(path: Path, wanted: list[int], fit: Fit | None = None) -> np.ndarray | None:
    with av.open(str(path)) as container:
        stream = _video_stream(container, path)
        frames = _Frames(path, stream, wanted, fit)
        index = packets.read_index(container, stream, path.stat().st_size)
        if wanted[-1] < len(index.order):
            for k, frame in packets.decode_chosen(container, stream, index, wanted):
                frames.put(k, frame)
        return frames.all()


def _decode_in_turn(path: Path, wanted: list[int], fit: Fit | None = None) -> np.ndarray | None:
    with av.open(str(path)) as container:
        stream = _video_stream(container, path)
        frames, chosen = _Frames(path, stream, wanted, fit), set(wanted)
        for index, frame in enumerate(container.decode(stream)):
            if index in chosen:
                frames.put(index, frame)
            if index == wanted[-1]:
                break
        return frames.all()


class _Frames:
    """The wanted frames of a stream as RGB bytes [T, 3, H, W], with DALI's numbers, resized where `fit` says so."""

    def __init__(self, path: Path, stream: av.VideoStream, wanted: list[int], fit: Fit | None) -> None:
        self._path, self._stream, self._fit = path, stream, fit
        self._places = {index: place for place, index in enumerate(wanted)}
        self._missing = len(wanted)
        self._size = (0, 0)
        self._rgb: np.ndarray | None = None
        self._large: np.ndarray | None = None  # frames that wait to be resized, and their places
        self._held: list[int] = []
        self._graph = av.filter.Graph()
        self._graph.threads = 1
        graph = self._graph
        graph.link_nodes(
            graph.add_buffer(template=stream), *(graph.add(*node) for node in TO_RGB), graph.add("buffersink")
        ).configure()

    def put(self, index: int, frame: av.VideoFrame) -> None:
        """Convert a frame into its place."""
        if self._rgb is None:
            self._begin(frame)
        if (frame.height, frame.width) != self._size:  # FFmpeg would stretch it
            raise MediaError(self._path, f"its size changes before frame {index}", "encode it anew")
        self._graph.push(frame)
        picture: Any = self._graph.pull()
        assert self._rgb is not None
        rgb = self._rgb[self._places[index]] if self._large is None else self._large[len(self._held)]
        for channel, plane in zip((1, 2, 0), picture.planes, strict=True):
            rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
            rgb[channel] = rows[: self._size[0], : self._size[1]]
        self._missing -= 1
        if self._large is not None:
            self._held.append(self._places[index])
            if len(self._held) == len(self._large):
                self._resize()

    def all(self) -> np.ndarray | None:
        """None where a frame did not come."""
        if self._missing:
            return None
        self._resize()
        return self._rgb

    def _begin(self, frame: av.VideoFrame) -> None:
        require_upright(self._path, self._stream, frame)
        self._size = size = frame.height, frame.width
        if self._fit is not None:
            self._fit.check(self._path, size)
            if self._fit.size != size:
                self._large, size = np.empty((RESIZED_AT_ONCE, 3, *size), np.uint8), self._fit.size
        self._rgb = np.empty((len(self._places), 3, *size), np.uint8)

    def _resize(self) -> None:
        if self._held:
            assert self._rgb is not None and self._large is not None and self._fit is not None
            large = self._large[: len(self._held)].transpose(0, 2, 3, 1)
            self._rgb[self._held] = resize(large, *self._fit.size).transpose(0, 3, 1, 2)
            self._held.clear()


def decode_image(path: Path) -> np.ndarray:
    """A picture, upright and opaque (transparent parts are white), as RGB [1, H, W, 3] uint8.

    Raises MediaError for a missing or damaged file.
    """
    path = Path(path)
    _require_content(path)
    try:
        with Image.open(path, formats=PICTURES) as picture:
            return np.asarray(to_rgb(picture))[None]
    except Exception as error:  # whatever Pillow's formats raise on damaged bytes
        _raise_machines(error)
        raise MediaError(path, f"not a picture, or damaged ({error})") from error


def decode_audio(path: Path, *, in_video: bool = False, most: int | None = None) -> np.ndarray:
    """Sound [n] float32, 16 kHz, channels averaged.

    soundfile reads FLAC, WAV and Ogg; PyAV reads everything else (AAC, MP3, the track of a video), in time: holes in a
    track are silence, and with `in_video` so is what a video shows before its track begins. At most `most` samples.
    Raises MediaError for a file that is missing, empty, without sound, cut off, damaged, not finite, longer than `most`
    or a day, or whose channels cancel each other out.
    """
    path = Path(path)
    _require_content(path)
    try:
        waveform = _read_soundfile(path, most) if path.suffix.lower() in (".flac", ".wav", ".ogg") else None
        if waveform is None:
            waveform = _read_track(path, in_video, most)
    except MediaError:
        raise
    except (soundfile.LibsndfileError, *AV_ERRORS) as error:
        _raise_machines(error)
        raise MediaError(path, f"not a sound file, or damaged ({error})") from error
    if len(waveform) == 0:
        raise MediaError(path, "holds no sound", MUTE)
    return waveform


def _read_soundfile(path: Path, most: int | None) -> np.ndarray | None:
    """None for a file that doesn't say how long it is."""
    require_whole(path)
    with soundfile.SoundFile(path) as file:
        frames, rate = file.frames, file.samplerate
        if frames >= UNKNOWN:
            return None
        require_rate(path, rate)
        require_length(path, frames / rate)
        _require_at_most(path, -(-frames * SAMPLE_RATE // rate), most)
        mix = Mix(path)
        blocks = [mix.mean(block.T) for block in file.blocks(2**18, dtype="float32", always_2d=True)]
    waveform = np.concatenate(blocks or [np.zeros(0, np.float32)])
    if len(waveform) != frames:
        raise MediaError(path, f"holds {len(waveform)} of the {frames} samples in its header", kind="truncated")
    mix.require_heard()
    if rate != SAMPLE_RATE:
        from scipy.signal import resample_poly  # half a second to import, and sidecars are at 16 kHz already

        waveform = resample_poly(waveform, SAMPLE_RATE, rate).astype(np.float32)
    return waveform


def _read_track(path: Path, in_video: bool, most: int | None) -> np.ndarray:
    chunks, count = [np.zeros(0, np.float32)], 0
    with av.open(str(path)) as container:
        for chunk in read_track(path, container, picture_start(container) if in_video else None):
            chunks.append(chunk)
            count += len(chunk)
            _require_at_most(path, count, most)
    return np.concatenate(chunks)


def _require_at_most(path: Path, count: int, most: int | None) -> None:
    if most is not None and count > most:
        raise MediaError(path, f"holds {count} samples or more, the manifest says {most}", STALE)
