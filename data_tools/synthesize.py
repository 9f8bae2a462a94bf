"""Synthesise the demo's data: WebM (VP9) clips with FLAC sidecars and one manifest.

    python -m data_tools.synthesize --out DIR --seed 0 --size demo

Sizes tiny and demo ask the demo's families (data_tools/families.py), size study the ladder's (data_tools/ladder.py).
Samples and clips depend on (seed, split, family, index) alone. Finished clips are kept, so that an interrupted run
resumes; a finished set is recognised by its settings and left as it is.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import av
import numpy as np
import soundfile
from av.video.reformatter import VideoReformatter
from rich.progress import Progress

from data_tools.families import FAMILIES, LETTERS, Draft, judge_words
from data_tools.ladder import FULL, HINTED, HINTED_FULL, LADDER, draw_scene, write_trace
from data_tools.world import (
    FPS,
    FRAMES,
    RATE,
    SIDE,
    Scene,
    describe_sound,
    describe_things,
    render_frames,
    render_sound,
)
from megatron_avatar.data.manifest import write_manifest
from megatron_avatar.records import Media, Sample

WORLD = 4  # raised when the same seed gives other clips or questions
MARKER = "complete.json"
GUESSES = 0.5  # of the cold start's traces without a hint answer without looking: what reinforcement can unlearn
SIZES = {  # samples a family
    "tiny": {"sft": 2, "train": 2, "eval": 2},
    "demo": {"sft": 320, "train": 64, "eval": 36},
    "study": {"sft": 320, "train": 14, "eval": 70},
}
DESCRIBE = "describe"  # a family of the study's cold start alone, so that what the base perceives isn't forgotten


def keyed_rng(*key: object) -> np.random.Generator:
    """A generator that depends on the key's parts alone."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))


# --- samples --------------------------------------------------------------------------------------


def draw_samples(seed: int, size: str) -> list[tuple[Sample, Scene]]:
    """All samples of a set with the scenes of their clips. No two samples share a clip and a question's answer."""
    if size == "study":
        return list(_draw_ladder(seed, SIZES[size]))
    seen: set[tuple[str, str]] = set()
    drawn = []
    for split in SIZES[size]:
        for name, family in FAMILIES.items():
            answers = _evenly(family.answers, SIZES[size][split], keyed_rng(seed, split, name, "answers"))
            for index, answer in enumerate(answers):
                rng = keyed_rng(seed, split, name, index)
                draft = family.draft(answer, rng)
                while (name, draft.scene.signature()) in seen:
                    draft = family.draft(answer, rng)
                seen.add((name, draft.scene.signature()))
                drawn.append((_sample(f"{split}-{name}-{index:04d}", split, name, index, draft, rng), draft.scene))
    return drawn


def _draw_ladder(seed: int, counts: dict[str, int]) -> Iterator[tuple[Sample, Scene]]:
    """The ladder's samples: no two clips of the set look and sound alike."""
    seen: set[str] = set()
    for split, count in counts.items():
        for name in (*LADDER, *([DESCRIBE] if split == "sft" else [])):
            for index in range(count):
                rng = keyed_rng(seed, split, name, index)
                while (scene := draw_scene(rng, tones=name == "tones")).signature() in seen:
                    pass
                seen.add(scene.signature())
                yield _ladder_sample(f"{split}-{name}-{index:04d}", split, name, scene, rng), scene


def _ladder_sample(sample_id: str, split: str, name: str, scene: Scene, rng: np.random.Generator) -> Sample:
    caption = f"{describe_things(scene)} {describe_sound(scene.sound)}"
    stage = DESCRIBE if name == DESCRIBE else f"rung_{LADDER[name].rung}"
    about = {"stage": stage, "split": split, "family": name, "media": (clip_media(sample_id, scene),),
             "audio_caption": describe_sound(scene.sound), "problem_type": "other"}  # fmt: skip
    if name == DESCRIBE:
        return Sample(id=sample_id, question="Describe the clip.", answer=caption, trace=caption, **about)
    rung, asked = LADDER[name], LADDER[name].ask(scene, rng)
    question, trace = asked.text, None
    if split == "sft":
        hinted = rng.random() < HINTED
        trace = write_trace(asked, rng, HINTED_FULL if hinted else FULL[rung.rung])
        question += f"\nHint: {asked.hint}" if hinted else ""
    facts = scene.facts() | {"caption": caption, "needs": list(rung.needs), "chance": rung.chance, "looks": rung.looks,
                             "evidence": asked.evidence}  # fmt: skip
    return Sample(id=sample_id, question=question, answer=asked.answer, trace=trace, hint=asked.hint, scene=facts,
                  **about)  # fmt: skip


def _evenly(answers: tuple[str, ...], n: int, rng: np.random.Generator) -> list[str]:
    """n answers, each as often as any other (within one), in random order."""
    start = int(rng.integers(len(answers)))
    return [answers[(start + i) % len(answers)] for i in rng.permutation(n)]


def _sample(sample_id: str, split: str, name: str, index: int, draft: Draft, rng: np.random.Generator) -> Sample:
    family, scene = FAMILIES[name], draft.scene
    choices: tuple[str, ...] = ()
    if draft.options:
        others = [o for o in draft.options if o != draft.answer]
        others = [others[i] for i in rng.permutation(len(others))]
        position = index % len(draft.options)
        choices = (*others[:position], draft.answer, *others[position:])
    said, answer = draft.answer, _named(draft.answer, choices)
    hint, question = draft.hint or family.hint, draft.question
    hinted = split == "sft" and not choices and index % 2 == 1
    if hinted:
        question = f"{question}\nHint: {hint}"  # as a prompt with its hint reads, so that hints are understood
    facts = scene.facts() | {
        "caption": f"{describe_things(scene)} {describe_sound(scene.sound)}",
        "needs": list(family.needs),
        "chance": family.chance,
        "evidence": draft.evidence,
        "judge": judge_words(draft),
    }
    seen, guesses = f"{draft.evidence} ", keyed_rng("guess", sample_id)
    if not hinted and guesses.random() < GUESSES:
        seen, said = "", str(guesses.choice(list(draft.options or family.answers)))
    named = _named(said, choices)
    trace = f"<think>{seen}so {f'{said} is {named}' if choices else said}.</think><answer>{named}</answer>"
    return Sample(
        id=sample_id,
        stage=family.stage,
        split=split,
        family=name,
        question=question,
        choices=choices,
        answer=answer,
        problem_type=family.problem_type,
        media=(clip_media(sample_id, scene),),
        trace=trace if split == "sft" else None,
        hint=hint,
        audio_caption=describe_sound(scene.sound),
        scene=facts,
    )


def _named(answer: str, choices: tuple[str, ...]) -> str:
    """The answer as it is given: its letter where there are choices."""
    return LETTERS[choices.index(answer)] if choices else answer


def clip_media(sample_id: str, scene: Scene) -> Media:
    """The manifest entry of a scene's clip, known before it is rendered."""
    track = scene.sound.track
    return Media(
        path=f"clips/{sample_id}.webm",
        kind="video",
        frame_count=FRAMES,
        fps=float(FPS),
        height=SIDE,
        width=SIDE,
        audio_path=f"clips/{sample_id}.flac" if track else None,
        audio_samples=FRAMES * RATE // FPS if track else 0,
        audio_in_video=track,
    )


# --- files ----------------------------------------------------------------------------------------


def write_video(path: Path, frames: np.ndarray) -> None:
    """VP9 in WebM of frames [T, H, W, 3] uint8 at 8 fps, BT.601, the same bytes every time."""
    options = {"deadline": "realtime", "cpu-used": "8", "crf": "20", "b:v": "0", "lag-in-frames": "0"}
    with av.open(str(path), "w", format="webm", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libvpx-vp9", rate=FPS, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        converter = VideoReformatter()
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture = converter.reformat(picture, format="yuv420p", dst_colorspace="ITU601")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def write_clip(job: tuple[Media, Scene], root: Path) -> None:
    """The clip's files, each written aside and renamed; sound first, so that a clip with a video is whole."""
    media, scene = job
    video = root / media.path
    if video.exists():
        return
    sound = render_sound(scene)
    if sound is not None:
        aside = root / f"{media.audio_path}.part"
        soundfile.write(aside, sound, RATE, format="FLAC", subtype="PCM_16")
        os.replace(aside, root / media.audio_path)
    aside = video.with_suffix(".webm.part")
    write_video(aside, render_frames(scene))
    os.replace(aside, video)


def synthesize(out: Path, seed: int, size: str, processes: int = 2, progress: bool = True) -> Path:
    """Write a set and return its manifest's path. A complete set is left alone, an interrupted one goes on.

    Raises ValueError when the folder holds a set of other settings.
    """
    if size not in SIZES:
        raise ValueError(f"size {size!r} is none of {sorted(SIZES)}")
    settings = {"world": WORLD, "seed": seed, "size": size, "counts": SIZES[size]}
    manifest, marker, begun = out / "manifest.jsonl", out / MARKER, out / "settings.json"
    text = json.dumps(settings, sort_keys=True)
    if begun.exists() and begun.read_text() != text:
        raise ValueError(f"{out} holds a set of other settings ({begun}); choose another --out or remove the folder")
    if marker.exists() and manifest.exists():
        return manifest
    (out / "clips").mkdir(parents=True, exist_ok=True)
    _replace_text(begun, text)
    drawn = draw_samples(seed, size)
    jobs = [(sample.media[0], scene) for sample, scene in drawn]
    with Progress(disable=not progress) as bar, multiprocessing.get_context("spawn").Pool(processes) as pool:
        task = bar.add_task(f"synthesising {len(jobs)} clips", total=len(jobs))
        for _ in pool.imap_unordered(partial(write_clip, root=out), jobs, chunksize=8):
            bar.advance(task)
    write_manifest(manifest, [sample for sample, _ in drawn])
    _replace_text(marker, json.dumps({"samples": len(drawn)}))
    return manifest


def _replace_text(path: Path, text: str) -> None:
    aside = path.with_suffix(".part")
    aside.write_text(text)
    os.replace(aside, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the set")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", choices=sorted(SIZES), default="demo")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    manifest = synthesize(args.out, args.seed, args.size, args.processes)
    counts = Counter(split for split, *_ in (line.split("-", 1) for line in _ids(manifest)))
    print(f"{manifest}: " + ", ".join(f"{n} {split}" for split, n in counts.items()))


def _ids(manifest: Path) -> list[str]:
    return [json.loads(line)["id"] for line in manifest.read_text().splitlines()]


if __name__ == "__main__":
    main()
