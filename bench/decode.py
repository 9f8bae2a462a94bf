"""Clips a second from file to features, against the video readers that one would use instead.

    python -m bench.decode [--json]

All get the same files and frame numbers, one thread each, and hand their frames to the same tail: resizing, patches,
and the log-mel spectrogram of ten seconds of FLAC. DALI is timed beside them. Needs requirements-bench.txt; a
peer that can't be loaded, or can't read a kind of clip, is null.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import av
import numpy as np
import soundfile
import torch

from bench.timing import JSON_HELP, in_turns, is_default, medians, report
from megatron_avatar.config.families import OMNI
from megatron_avatar.data import features
from megatron_avatar.data.decode import MediaError, decode_audio, decode_frames

WIDTH, HEIGHT, FPS, WANTED = 320, 240, 25, 16
MAX_PIXELS = 50176  # a frame's, as in the recipes
ALIKE = 6.0  # grey levels that a reader's own colour conversion may differ from ours on average
KINDS: dict[str, tuple[str, str, int, dict[str, str]]] = {  # encoder, container, seconds, options
    "vp9": ("libvpx-vp9", "webm", 8, {"deadline": "realtime", "cpu-used": "8", "b:v": "400k", "g": "128"}),
    "mjpeg": ("mjpeg", "avi", 8, {"qscale": "4"}),
    "h264": ("libx264", "mp4", 8, {"preset": "medium", "crf": "23", "g": "250"}),
    "sparse": ("libx264", "mp4", 180, {"preset": "medium", "crf": "23", "g": "48"}),
}
Reader = Callable[[Path, np.ndarray], np.ndarray]


def make_clip(path: Path, encoder: str, seconds: float, options: dict[str, str]) -> int:
    """Waves that move over a textured ground; returns the number of frames."""
    rng = np.random.default_rng(0)
    ground = rng.integers(0, 60, (HEIGHT, WIDTH, 3))
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    frames = int(seconds * FPS)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(encoder, rate=FPS, options=options)
        stream.width, stream.height = WIDTH, HEIGHT
        stream.pix_fmt = "yuvj420p" if encoder == "mjpeg" else "yuv420p"
        for k in range(frames):
            wave = 90 + 60 * np.sin((x + 3 * k) / 23 + np.sin(y / 31 + k / 40))
            picture = ground + np.stack([wave, np.roll(wave, 2 * k, axis=0), 180 - wave], axis=-1)
            frame = av.VideoFrame.from_ndarray(np.clip(picture, 0, 255).astype(np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return frames


def with_pyav(path: Path, indices: np.ndarray) -> np.ndarray:
    wanted, frames = set(indices.tolist()), []
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        for k, frame in enumerate(container.decode(video=0)):
            if k in wanted:
                frames.append(frame.to_ndarray(format="rgb24"))
            if len(frames) == len(wanted):
                break
    return np.stack(frames)


def with_torchcodec(seek_mode: str) -> Reader:
    from torchcodec.decoders import VideoDecoder

    def read(path: Path, indices: np.ndarray) -> np.ndarray:
        decoder = VideoDecoder(str(path), dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode=seek_mode)
        return decoder.get_frames_at(indices.tolist()).data.numpy()

    return read


def with_decord() -> Reader:
    import decord

    def read(path: Path, indices: np.ndarray) -> np.ndarray:
        return decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1).get_batch(indices.tolist()).asnumpy()

    return read


def readers() -> dict[str, Reader]:
    """The contestants that can be loaded here. torchcodec runs in both of its modes, and its better one counts."""
    found: dict[str, Reader] = {"ours": decode_frames, "pyav": with_pyav,
                                "dali": lambda path, indices: decode_frames(path, indices, "dali")}  # fmt: skip
    peers = {"torchcodec/exact": lambda: with_torchcodec("exact"), "decord": with_decord,
             "torchcodec/approximate": lambda: with_torchcodec("approximate")}  # fmt: skip
    for name, load in peers.items():
        try:
            found[name] = load()
        except (ImportError, OSError, RuntimeError) as error:
            print(f"{name} can't be loaded ({str(error).strip().splitlines()[-1][:100]})")
    return found


def to_features(frames: np.ndarray, sound: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches and log-mel spectrogram, the same for all."""
    h, w = features.smart_resize(*frames.shape[1:3], MAX_PIXELS, MAX_PIXELS, OMNI.factor)
    return features.patchify(features.resize(frames, h, w), OMNI)[0], features.log_mel(decode_audio(sound))


def compare(folder: Path, kind: str, rounds: int, seconds: float | None = None) -> dict[str, Any]:
    """One kind of clip: clips/s by reader, null for one that can't; raises AssertionError where frames differ."""
    encoder, container, length, options = KINDS[kind]
    clip, sound = folder / f"{kind}.{container}", folder / "sound.flac"
    count = make_clip(clip, encoder, seconds or length, options)
    soundfile.write(sound, 0.3 * np.random.default_rng(0).standard_normal(160_000), 16_000)
    indices = np.rint(np.linspace(0, count - 1, WANTED)).astype(np.int64)
    ours = decode_frames(clip, indices).astype(np.int16)
    able: dict[str, Reader] = {}
    for name, read in readers().items():
        try:
            difference = np.abs(read(clip, indices) - ours).mean(axis=(1, 2, 3)).max()
        except (MediaError, RuntimeError, IndexError) as error:
            print(f"{name} can't read {kind} ({str(error).strip().splitlines()[0][:100]})")
            continue
        assert difference < ALIKE, f"{name} gives other frames of {kind}: {difference:.1f} grey levels"
        able[name] = read
    contest = {name: lambda read=read: to_features(read(clip, indices), sound) for name, read in able.items()}
    rates = {name: round(1 / s, 2) for name, s in medians(in_turns(contest, rounds)).items()}
    modes = {m: rates.pop(f"torchcodec/{m}", None) for m in ("exact", "approximate")}
    best = max((rate for rate in modes.values() if rate), default=None)
    return {"ours": rates["ours"], "pyav": rates.get("pyav"), "torchcodec": best, "decord": rates.get("decord"),
            "dali": rates.get("dali"), "torchcodec_modes": modes}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true", help=JSON_HELP)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        result: dict[str, Any] = {kind: compare(Path(folder), kind, args.rounds) for kind in KINDS}
    result["versions"] = {name: _version(name) for name in ("av", "torchcodec", "decord", "nvidia-dali-cuda130")}
    result |= {"unit": "clips/s", "frames": WANTED, "size": [WIDTH, HEIGHT], "rounds": args.rounds}
    report("decode", result, as_json=args.json, keep=is_default(parser, args))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
