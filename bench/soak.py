"""Ten thousand decodes with damaged files among them: is every damaged one named, and does memory stay flat?

    python -m bench.soak [--json]

Goes through the loader that training uses, with two worker processes that are killed where a file hangs them. Every
damaged sample is a file of its own, of every kind of damage; the sound ones share twelve clips.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
from rich.progress import track

from bench.timing import JSON_HELP, is_default, report
from megatron_avatar.config.schema import DataConfig
from megatron_avatar.data.loader import MediaLoader
from megatron_avatar.data.prompt import PromptBuilder
from megatron_avatar.records import Media, Sample
from tests.data.media import make_audio, make_config, make_tokenizer, make_video

BATCH = 16  # samples asked for at once
DEADLINE_S = 3.0
SETTLED = 0.2  # of the decodes, until caches are full
FLAT = 0.05  # by so much the mean memory of the last third after that may differ from that of the first
CACHE = 32 * 2**20
CODECS = {"webm": "libvpx-vp9", "avi": "mjpeg", "mp4": "libx264"}


def sound_clips(folder: Path) -> list[Media]:
    clips = []
    for k in range(12):
        kind = list(CODECS)[k % 3]
        path = make_video(folder / f"clip{k}.{kind}", frames=16 + k % 8, codec=CODECS[kind])
        sound = make_audio(folder / f"clip{k}.flac", 2.0 + k / 10)
        samples = int((2.0 + k / 10) * 16_000)
        clips.append(Media(path.name, "video", 16 + k % 8, 8.0, None, 84, 84, sound.name, samples, True))
    return clips


def damage(kind: str, media: Media, folder: Path, name: str) -> Media:
    """A copy of a clip that is damaged in one way; returns its manifest entry."""
    source = folder / media.path
    path = folder / f"{name}{source.suffix}"
    data = source.read_bytes()
    match kind:
        case "truncated":
            path.write_bytes(data[: len(data) // 3])
        case "empty":
            path.touch()
        case "missing":
            pass
        case "no media":
            path.write_bytes(random.Random(name).randbytes(4000))
        case "garbled":
            path.write_bytes(data[:200] + random.Random(name).randbytes(len(data) - 200))
        case "other size":
            shutil.copy(source, path)
            return replace(media, path=path.name, width=96)
        case "fewer frames":
            shutil.copy(source, path)
            return replace(media, path=path.name, frame_count=200)
        case "no picture":
            make_audio(path.with_suffix(".wav"))
            return replace(media, path=path.with_suffix(".wav").name)
        case "sound too short":
            sound = make_audio(folder / f"{name}.flac", 0.5)
            return replace(media, audio_path=sound.name)
        case "sound truncated":
            sound = (folder / str(media.audio_path)).read_bytes()
            (folder / f"{name}.flac").write_bytes(sound[: len(sound) // 2])
            return replace(media, audio_path=f"{name}.flac")
        case "hangs":
            shutil.copy(source, path)
            os.mkfifo(folder / f"{name}.m4a")  # a sound file that never says anything
            return replace(media, path=path.name, audio_path=f"{name}.m4a")
    return replace(media, path=path.name)


DAMAGES = ("truncated", "empty", "missing", "no media", "garbled", "other size", "fewer frames", "no picture",
           "sound too short", "sound truncated", "hangs")  # fmt: skip


def resident() -> int:
    """Bytes of this process and its children, each shared page counted in parts."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    total = 0
    for process in processes:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:  # a worker that was just killed
            continue
    return total


def soak(folder: Path, decodes: int, share: float, workers: int = 2) -> dict[str, Any]:
    """Decode and count; raises AssertionError where a damaged file is missed, or a sound one set aside."""
    clips = sound_clips(folder)
    every = max(1, round(1 / share))
    samples, damaged = [], {}
    for k in range(decodes):
        media = clips[k % len(clips)]
        name = f"s{k:06d}"
        if k % every == every - 1:
            damaged[name] = DAMAGES[len(damaged) % len(DAMAGES)]
            media = damage(damaged[name], media, folder, name)
        samples.append(Sample(name, "visual", "train", "f", "what moves ?", "A", "other", media=(media,)))
    random.Random(0).shuffle(samples)
    data = DataConfig(instruction="", fps=4.0, max_frames=8, frame_max_pixels=7056, frame_min_pixels=7056)
    builder = PromptBuilder(make_tokenizer(), make_config(), data, 4096)
    loader = MediaLoader(builder, folder, workers, DEADLINE_S, cache_bytes=CACHE)
    memory, made, start = [], 0, time.perf_counter()
    for at in track(range(0, decodes, BATCH), "decoding"):
        requests = [(sample, "plain") for sample in samples[at : at + BATCH]]
        loader.prefetch([(sample, "plain") for sample in samples[at : at + 2 * BATCH]])
        made += sum(prompt is not None for prompt in loader.get(requests))
        if at // BATCH % max(1, decodes // BATCH // 60) == 0:
            memory.append((at, resident()))
    seconds = time.perf_counter() - start
    found = set(loader.quarantined)
    loader.close()
    missed, wrongly = damaged.keys() - found, found - damaged.keys()
    assert not missed, f"not found: {[(name, damaged[name]) for name in sorted(missed)][:5]}"
    assert not wrongly, f"sound, and set aside: {sorted(wrongly)[:5]}"
    assert made == decodes - len(damaged)
    settled = [size for at, size in memory if at >= SETTLED * decodes]
    third = max(1, len(settled) // 3)
    first, last = (sum(part) / len(part) for part in (settled[:third], settled[-third:]))
    return {
        "decodes": decodes, "damaged": len(damaged), "named": len(found & damaged.keys()), "wrongly": 0,
        "by_kind": dict(Counter(damaged.values())), "memory_mib": round(last / 2**20, 1),
        "memory_growth": round(last / first - 1, 4), "flat": abs(last / first - 1) <= FLAT,
        "memory_peak_mib": round(max(settled) / 2**20, 1),
        "decodes_per_s": round(decodes / seconds, 1), "workers": workers,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--decodes", type=int, default=10_000)
    parser.add_argument("--damaged", type=float, default=0.02, help="share of damaged files")
    parser.add_argument("--json", action="store_true", help=JSON_HELP)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = soak(Path(folder), args.decodes, args.damaged)
    report("soak", result, as_json=args.json, keep=is_default(parser, args))


if __name__ == "__main__":
    main()
