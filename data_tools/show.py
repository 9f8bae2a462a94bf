"""Look at one sample of a manifest.

python -m data_tools.show sample ID --manifest runs/demo/data/manifest.jsonl
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import soundfile

from megatron_avatar.config.schema import DataConfig
from megatron_avatar.data.decode import decode_frames, plan_frames
from megatron_avatar.data.manifest import load_manifest, sample_to_dict
from megatron_avatar.records import Media


def media_facts(media: Media, root: Path) -> str:
    """One line of what the files really hold, beside what the manifest says; every planned frame is decoded."""
    facts = [f"{media.kind} {media.path}", f"{(root / media.path).stat().st_size} bytes"]
    if media.kind == "video":
        indices = plan_frames(media, DataConfig())
        frames = decode_frames(root / media.path, indices, "pyav")
        facts += [f"{media.frame_count} frames", f"{len(frames)} decoded at {frames.shape[2]}x{frames.shape[1]}"]
    if media.audio_path:
        info = soundfile.info(root / media.audio_path)
        facts.append(f"sound {media.audio_path}: {info.duration:.2f} s at {info.samplerate} Hz")
    elif media.kind == "video":
        facts.append("mute")
    return ", ".join(facts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["sample"])
    parser.add_argument("id")
    parser.add_argument("--manifest", type=Path, default=Path("runs/demo/data/manifest.jsonl"))
    args = parser.parse_args()
    found = [s for s in load_manifest(args.manifest, check_media=False) if s.id == args.id]
    if not found:
        parser.error(f"{args.manifest} has no sample {args.id!r}")
    print(json.dumps(sample_to_dict(found[0]), indent=2, ensure_ascii=False))
    for media in found[0].media:
        try:
            print(media_facts(media, args.manifest.parent))
        except (OSError, ValueError, soundfile.SoundFileError) as error:  # a damaged file is what one looks for here
            print(f"damaged: {error}")


if __name__ == "__main__":
    main()
