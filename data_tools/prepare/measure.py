"""What a media file holds, measured as the trainer's decoder will see it. Needs no torch: it runs in the workers."""

from __future__ import annotations

import warnings
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
from PIL import Image

from data_tools.prepare.damage import Refused, refusal
from megatron_avatar.data.container import AV_ERRORS, MediaError, Posture, clip_stream, posture, require_upright
from megatron_avatar.data.picture import PICTURES, to_rgb
from megatron_avatar.data.sound import MAX_SECONDS
from megatron_avatar.data.whole import require_whole
from megatron_avatar.files import is_machines, writing

CODECS = ("vp8", "vp9", "mjpeg", "h264", "hevc", "av1", "mpeg4")  # that DALI decodes, on the CPU or on a GPU
IN_ORDER = ("vp8", "vp9", "mjpeg", "av1")  # a packet's place is its frame's place
HIDDEN_FRAMES = ("vp8", "mpeg4")  # packets without a frame of their own: only decoding tells the frames
# No playlists and no picture sequences: those name other files.
OPEN = {
    "protocol_whitelist": "file",
    "format_whitelist": "mov,matroska,avi,flv,mpegts,mpeg,ogg,asf,mp3,wav,flac,aac,gif",
}
MAX_SIDE = 16_384
MAX_RATE = 1000
ROUNDED_S = 0.002  # containers round times to milliseconds: so near, the declared rate holds
TRANSCODE = "write transcode=needed to have such clips encoded anew"
Image.init()  # before that, open() knows half of these formats


@dataclass(frozen=True)
class Clip:
    """A video's frames as the decoder counts them; `pts` [frame_count] seconds where the frame rate varies."""

    frame_count: int
    fps: float
    pts: list[float] | None
    height: int
    width: int
    codec: str
    container: str
    seconds: float
    start: float
    posture: Posture

    @property
    def is_plain(self) -> bool:
        """Whether the trainer's decoder shows it as it is meant."""
        return self.codec in CODECS and not self.posture.turned and self.posture.is_square


@contextmanager
def opened(path: Path, writes: Path | None = None) -> Iterator[av.container.InputContainer]:
    """An opened media file; what FFmpeg and the trainer refuse becomes a refusal.

    `writes`, a file that is made of it, is another matter: what can't be written there is an OSError.
    """
    try:
        container = av.open(str(path), options=OPEN)
    except AV_ERRORS as error:
        if is_machines(error):
            raise refusal(error) from None
        raise Refused("not_media", f"no media file, or its index is cut off ({_brief(error)})") from None
    with container:
        try:
            yield container
        except MediaError as error:
            raise refusal(error) from None
        except AV_ERRORS as error:
            if isinstance(error, OSError) and writes is not None and error.filename == str(writes):
                with writing(writes):
                    raise OSError(error.errno, error.strerror) from None
            raise Refused("damaged", f"breaks off while it is read ({_brief(error)})") from None


def _brief(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error)


def measure_video(path: Path, *, decode: bool, any_codec: bool = False) -> Clip:
    """Frames, times and size of a clip, from its packets and first frame, or with `decode` from every frame.

    `any_codec` lets everything pass that FFmpeg decodes and turns upright, for a clip that is encoded anew.
    """
    with opened(path) as container:
        stream = clip_stream(container)
        if stream is None:
            raise Refused("no_video", "holds no video stream")
        require_whole(path)
        if stream.codec_context is None:
            raise Refused("codec", "no decoder knows its codec")
        codec = stream.codec_context.codec.canonical_name
        if codec not in CODECS and not any_codec:
            raise Refused("codec", f"codec {codec} is none of {', '.join(CODECS)}; {TRANSCODE}")
        form = container.format.name.split(",")[0]
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        times, missing, opens = _packet_times(container, stream, codec)
    everything = decode or codec in HIDDEN_FRAMES or not opens
    first, shown, decoded = _decoded(path, everything=everything, upright=not any_codec)
    if decoded is not None:
        times, missing = decoded
    if not len(times) + missing:
        raise Refused("no_frames", "its video stream holds no frame")
    height, width = first.height, first.width
    if max(height, width) > MAX_SIDE or not min(height, width):
        raise Refused("size", f"{width}x{height} pixels; a side may have {MAX_SIDE}")
    count, fps, pts, seconds = _rate(times, missing, rate)
    return Clip(count, fps, pts, height, width, codec, form, seconds, float(times[0]) if len(times) else 0.0, shown)


def _packet_times(
    container: av.container.InputContainer, stream: av.VideoStream, codec: str
) -> tuple[np.ndarray, int, bool]:
    """Seconds [n] of the video packets, rising, how many have none, and whether the first is a key frame; refuses a
    clip that ends too early."""
    ticks, missing, packets, end, opens = array("q"), 0, 0, 0.0, True
    for packet in container.demux():
        if not packet.size:
            continue  # the flush at the end
        when = packet.pts if packet.pts is not None else packet.dts
        if when is not None:
            end = max(end, float((when + (packet.duration or 0)) * packet.time_base))
        if packet.stream is not stream:
            continue
        opens = opens and (packets > 0 or packet.is_keyframe)
        packets += 1
        if packet.is_corrupt:
            raise Refused("truncated", "holds a cut or damaged packet")
        if packet.is_discard:
            continue  # before the start that an edit list gives
        if when is None:
            missing += 1
        else:
            ticks.append(when)
    exact = container.format.name.startswith("mov")  # other containers' headers are rough
    indexed = len(stream.index_entries) if exact else stream.frames  # the index is what an edit list leaves
    if packets < (indexed if exact else 0.95 * indexed - 2):
        raise Refused("truncated", f"holds {packets} of the {indexed} frames in its index")
    promised = ((container.duration or 0) + min(0, container.start_time or 0)) / av.time_base
    interval = 1 / float(stream.average_rate or 10)
    if (exact or container.format.name.startswith("matroska")) and packets and end < promised - max(0.25, 2 * interval):
        raise Refused("truncated", f"ends at {end:.2f} s of {promised:.2f} s")
    times = np.asarray(ticks, np.float64) * float(stream.time_base)
    if codec not in IN_ORDER:
        times = np.sort(times)
    return _rising(times), missing, opens


def _rising(times: np.ndarray) -> np.ndarray:
    if len(times) > 1 and not (np.diff(times) > 0).all():
        frame = int(np.argmin(np.diff(times) > 0)) + 1
        raise Refused("pts", f"the time of frame {frame} is not after that of the frame before it")
    return times


def _decoded(
    path: Path, *, everything: bool, upright: bool
) -> tuple[av.VideoFrame, Posture, tuple[np.ndarray, int] | None]:
    """The first frame, how it is to be shown, and with `everything` the seconds of all frames and how many have none.
    `upright` refuses a clip that is to be shown in another way than it is decoded."""
    times, missing, first, shown = array("d"), 0, None, None
    with opened(path) as container:
        stream = clip_stream(container)
        assert stream is not None
        stream.codec_context.thread_count = 1
        for frame in container.decode(stream):
            if first is None:
                first, shown = frame, posture(path, stream, frame)
                if upright:
                    require_upright(path, stream, frame)
            if not everything:
                return first, shown, None
            if frame.is_corrupt:
                raise Refused("damaged", f"frame {len(times) + missing} is damaged")
            if (frame.height, frame.width) != (first.height, first.width):
                raise Refused("size", f"its size changes at frame {len(times) + missing}; {TRANSCODE}")
            if frame.time is None:
                missing += 1
            else:
                times.append(frame.time)
    if first is None or shown is None:
        raise Refused("no_frames", "its video stream holds no frame")
    return first, shown, (_rising(np.asarray(times)), missing)


def _rate(times: np.ndarray, missing: int, rate: float) -> tuple[int, float, list[float] | None, float]:
    """(frames, frames a second, seconds of each frame where the rate varies, seconds of the clip)."""
    count = len(times) + missing
    if missing or count == 1:
        if not 0 < rate <= MAX_RATE:
            rate = 1.0 if count == 1 else 0.0
        if not rate:
            raise Refused("pts", "says neither its frames' times nor its frame rate")
        return count, rate, None, count / rate
    since = times - times[0]
    measured = (count - 1) / float(since[-1])
    seconds = count / measured
    if seconds > MAX_SECONDS or measured > MAX_RATE:
        raise Refused("size", f"{seconds:.0f} s at {measured:.0f} frames a second")
    for fps, off in ((rate, ROUNDED_S), (measured, 0.5 / measured)):
        if fps > 0 and np.abs(since - np.arange(count) / fps).max() <= off:
            return count, fps, None, seconds
    pts = [round(float(t), 6) for t in since]
    if not all(a < b for a, b in pairwise(pts)):
        raise Refused("pts", "frames lie less than a microsecond apart")
    return count, measured, pts, seconds


def measure_image(path: Path) -> tuple[int, int, str]:
    """(height, width, format) of a picture turned upright, every pixel read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(path, formats=PICTURES)
        with picture:
            if max(picture.size) > MAX_SIDE:
                raise Refused("size", f"{picture.width}x{picture.height} pixels; a side may have {MAX_SIDE}")
            kind = str(picture.format)
            picture.load()
            try:
                seen = to_rgb(picture)
            except ValueError as error:
                raise Refused("mode", f"its colours can't be read: {error}") from None
            return seen.height, seen.width, kind.lower()
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise Refused("size", str(error)) from None
    except Image.UnidentifiedImageError:
        raise Refused("not_media", f"no picture of a known format ({', '.join(PICTURES)})") from None
    except (OSError, ValueError, SyntaxError) as error:  # as Pillow's formats raise
        if getattr(error, "errno", None):
            raise
        kind = "truncated" if "truncated" in str(error) else "damaged"
        raise Refused(kind, f"the picture breaks off ({error})") from None
