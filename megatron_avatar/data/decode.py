"""Media files to arrays: frames as RGB bytes, sound as 16 kHz mono floats.

Two heads decode video and agree bit for bit on the CPU: DALI and PyAV. DALI reads colours as BT.601
whatever the stream's tag says, so PyAV is told to do the same.
"""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import av
import numpy as np
import soundfile
import torch
from PIL import Image, ImageOps

from megatron_avatar.config.schema import DataConfig
from megatron_avatar.data import dali, packets
from megatron_avatar.data.features import SAMPLE_RATE, TEMPORAL_PATCH
from megatron_avatar.records import Media

MAX_FRAME_PIXELS = 2**27  # a header that claims more is damaged, or meant to fill the memory
TO_RGB = (
    ("scale", "flags=bilinear+full_chroma_int+accurate_rnd:in_color_matrix=bt601"),
    ("format", "gbrp"),  # planes: the same bytes as rgb24 in less than half of the time
)


class MediaError(ValueError):
    """A media file that cannot be used; the message names the file, what is wrong and the remedy."""

    def __init__(self, path: Path, what: str, remedy: str = "make or download the file again, or drop the sample"):
        super().__init__(f"{path}: {what}; {remedy}")
        self.parts = (path, what, remedy)

    def __reduce__(self):  # crosses process borders with its three parts, not with the finished message
        return type(self), self.parts


def clip_seconds(media: Media) -> float:
    """Length of a clip in seconds, its last frame included."""
    if media.pts is None or media.frame_count < 2:
        return media.frame_count / media.fps
    return (media.pts[-1] - media.pts[0]) * media.frame_count / (media.frame_count - 1)


def plan_frames(media: Media, data: DataConfig) -> np.ndarray:
    """Indices [T] int64 of the frames to decode: T even, spread evenly over the clip's time from first to last.

    T is the clip's seconds times `data.fps`, rounded to even, within `data.min_frames` and `data.max_frames` and the
    frames there are. A clip of one frame shows it twice. `media.pts` (variable frame rate) picks the frames nearest in
    time.
    """
    pair = TEMPORAL_PATCH
    wanted = pair * round(clip_seconds(media) * data.fps / pair)
    wanted = min(max(wanted, data.min_frames), data.max_frames, media.frame_count)
    count = max(pair, wanted // pair * pair)
    if media.pts is None:
        return np.rint(np.linspace(0, media.frame_count - 1, count)).astype(np.int64)
    pts = np.asarray(media.pts)
    return np.abs(pts[None] - np.linspace(pts[0], pts[-1], count)[:, None]).argmin(axis=1)


def _require_content(path: Path) -> None:
    if not path.is_file():
        raise MediaError(path, "the file is missing", "restore it, or correct the path in the manifest")
    if path.stat().st_size == 0:
        raise MediaError(path, "the file is empty (0 bytes)")


def decode_frames(path: Path, indices: np.ndarray, backend: str = "auto") -> np.ndarray:
    """RGB frames [T, H, W, 3] uint8 at `indices` [T] (any order, repeats allowed).

    `backend`: "dali", "pyav", or "auto": with a GPU DALI for the codecs that it decodes, PyAV for the others and for a
    file that DALI refuses; without a GPU PyAV, which is the faster one there (bench.decode).
    Raises MediaError for a file that is missing, empty, no video, damaged, or ends before the last index.
    """
    path, indices = Path(path), np.asarray(indices)
    _require_content(path)
    try:
        if backend == "dali" or (prefers_dali(backend) and _codec(path) in dali.codecs()):
            try:
                return dali.reader().take(path, indices)
            except RuntimeError as error:
                if backend == "dali":
                    reason = str(error).strip().splitlines()[-1]
                    raise MediaError(path, f"DALI cannot decode it ({reason})", "try data.decoder=auto") from error
        return _decode_pyav(path, indices)
    except av.FFmpegError as error:
        raise MediaError(path, f"not a video, or damaged ({error.strerror})") from error


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
    if not container.streams.video:
        raise MediaError(path, "holds no video stream", "correct the media kind in the manifest")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise MediaError(path, "no decoder knows its codec", "encode it anew, as VP9 or H.264")
    width, height = stream.codec_context.width, stream.codec_context.height
    if width * height > MAX_FRAME_PIXELS:
        raise MediaError(path, f"claims frames of {width}x{height} pixels", "encode it anew, smaller")
    return stream


def _codec(path: Path) -> str:
    with av.open(str(path)) as container:
        return _video_stream(container, path).codec_context.codec.canonical_name


def _decode_pyav(path: Path, indices: np.ndarray) -> np.ndarray:
    """From the packets that are needed, where they tell which frames they hold; else from all up to the last frame."""
    wanted, places = np.unique(indices, return_inverse=True)
    try:
        frames = _decode_needed(path, wanted.tolist())
    except (packets.Untrusted, av.FFmpegError):  # a damaged packet may be one that the frames don't need
        frames = _decode_in_turn(path, wanted.tolist())
    if frames is None:
        raise MediaError(path, f"ends before frame {wanted[-1]}, which its manifest line promises (truncated?)")
    as_wanted = len(places) == len(wanted) and (places[1:] > places[:-1]).all()
    return (frames if as_wanted else frames[places]).transpose(0, 2, 3, 1)


def _decode_needed(path: Path, wanted: list[int]) -> np.ndarray | None:
    with av.open(str(path)) as container:
        stream = _video_stream(container, path)
        frames = _Frames(path, stream, wanted)
        index = packets.read_index(container, stream, path.stat().st_size)
        if wanted[-1] < len(index.order):
            for k, frame in packets.decode_chosen(container, stream, index, wanted):
                frames.put(k, frame)
        return frames.all()


def _decode_in_turn(path: Path, wanted: list[int]) -> np.ndarray | None:
    with av.open(str(path)) as container:
        stream = _video_stream(container, path)
        frames, chosen = _Frames(path, stream, wanted), set(wanted)
        for index, frame in enumerate(container.decode(stream)):
            if index in chosen:
                frames.put(index, frame)
            if index == wanted[-1]:
                break
        return frames.all()


class _Frames:
    """The wanted frames of a stream as RGB bytes [T, 3, H, W], with DALI's numbers."""

    def __init__(self, path: Path, stream: av.VideoStream, wanted: list[int]) -> None:
        self._path, self._places = path, {index: place for place, index in enumerate(wanted)}
        self._rgb: np.ndarray | None = None
        self._missing = len(wanted)
        self._graph = av.filter.Graph()
        # one thread: clips are decoded side by side, and starting threads takes longer than a short clip
        stream.codec_context.thread_count = self._graph.threads = 1
        graph = self._graph
        graph.link_nodes(
            graph.add_buffer(template=stream), *(graph.add(*node) for node in TO_RGB), graph.add("buffersink")
        ).configure()

    def put(self, index: int, frame: av.VideoFrame) -> None:
        """Convert a frame into its place."""
        size = frame.height, frame.width
        if self._rgb is None:
            self._rgb = np.empty((len(self._places), 3, *size), np.uint8)
        if self._rgb.shape[2:] != size:  # FFmpeg would stretch it
            raise MediaError(self._path, f"its size changes before frame {index}", "encode it anew")
        self._graph.push(frame)
        picture = self._graph.pull()
        rgb = self._rgb[self._places[index]]
        for channel, plane in zip((1, 2, 0), picture.planes, strict=True):
            rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
            rgb[channel] = rows[: size[0], : size[1]]
        self._missing -= 1

    def all(self) -> np.ndarray | None:
        """None where a frame did not come."""
        return None if self._missing else self._rgb


def decode_image(path: Path) -> np.ndarray:
    """A picture, turned upright, as RGB [1, H, W, 3] uint8. Raises MediaError for a missing or damaged file."""
    path = Path(path)
    _require_content(path)
    try:
        with Image.open(path) as picture:
            return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))[None]
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # as Pillow's formats raise
        raise MediaError(path, f"not a picture, or damaged ({error})") from error


def decode_audio(path: Path) -> np.ndarray:
    """Sound [n] float32, 16 kHz, channels averaged.

    soundfile reads FLAC, WAV and Ogg; PyAV reads everything else (AAC, MP3, the track of a video).
    Raises MediaError for a file that is missing, empty, without sound, not finite, or damaged.
    """
    path = Path(path)
    _require_content(path)
    try:
        if path.suffix.lower() in (".flac", ".wav", ".ogg"):
            waveform = _read_soundfile(path)
        else:
            waveform = _read_track(path)
    except (soundfile.LibsndfileError, av.FFmpegError) as error:
        raise MediaError(path, f"not a sound file, or damaged ({error})") from error
    if len(waveform) == 0:
        raise MediaError(path, "holds no sound", "leave audio_path out of the manifest line of a mute clip")
    if not np.isfinite(waveform).all():
        raise MediaError(path, "holds samples that are not finite numbers")
    return waveform


def _read_soundfile(path: Path) -> np.ndarray:
    waveform, rate = soundfile.read(path, dtype="float32", always_2d=True)
    waveform = waveform.mean(axis=1)
    if rate != SAMPLE_RATE:
        from scipy.signal import resample_poly  # half a second to import, and sidecars are at 16 kHz already

        waveform = resample_poly(waveform, SAMPLE_RATE, rate).astype(np.float32)
    return waveform


def _read_track(path: Path) -> np.ndarray:
    resampler = av.AudioResampler(format="flt", layout="mono", rate=SAMPLE_RATE)
    with av.open(str(path)) as container:
        if not container.streams.audio:
            raise MediaError(path, "holds no audio stream", "leave audio_path out of the manifest line of a mute clip")
        frames = chain(container.decode(audio=0), [None])  # None flushes the resampler
        chunks = [chunk.to_ndarray()[0] for frame in frames for chunk in resampler.resample(frame)]
    return np.concatenate(chunks or [np.zeros(0, np.float32)])
