"""Look at one sample of a manifest, or at a replay buffer.

python -m data_tools.show sample ID --manifest runs/demo/data/manifest.jsonl
python -m data_tools.show replay runs/demo/avatar          (a run, or its checkpoints/step_N, or its replay folder)
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from rich.console import Console
from rich.table import Table

from megatron_avatar.config.schema import DataConfig
from megatron_avatar.data.decode import decode_frames, plan_frames
from megatron_avatar.data.manifest import load_manifest, sample_to_dict
from megatron_avatar.files import step_folders
from megatron_avatar.records import Media
from megatron_avatar.rl.replay.buffer import UNRANKED
from megatron_avatar.rl.replay.store import damage, read_tables
from megatron_avatar.rl.tracker import TIERS, RewardTracker

BARS = "▁▂▃▄▅▆▇█"


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


def show_sample(sample_id: str, manifest: Path) -> None:
    found = [s for s in load_manifest(manifest, check_media=False) if s.id == sample_id]
    if not found:
        raise ValueError(f"{manifest} has no sample {sample_id!r}")
    print(json.dumps(sample_to_dict(found[0]), indent=2, ensure_ascii=False))
    for media in found[0].media:
        try:
            print(media_facts(media, manifest.parent))
        except (OSError, ValueError, soundfile.SoundFileError) as error:  # a damaged file is what one looks for here
            print(f"damaged: {error}")


def replay_state(path: Path) -> tuple[Path, dict[str, Any]]:
    """The shards' folder and the checkpoint's state that names what lives in them; without a checkpoint an empty one.

    `path` is a run (its newest checkpoint counts), a checkpoint, or a folder of shards. Raises ValueError for others.
    """
    if (path / "state.json").is_file():
        return path.parent.parent / "replay", json.loads((path / "state.json").read_text())
    states = [folder / "state.json" for folder in step_folders(path / "checkpoints").values()]
    if states := [state for state in states if state.is_file()]:
        return path / "replay", json.loads(states[-1].read_text())
    if any(path.glob("shard-*.h5")):
        return path, {}
    if not path.exists():
        raise ValueError(f"{path} is no folder, seen from {Path.cwd()}: name a run's folder, as runs/demo/avatar")
    raise ValueError(f"{path} holds neither checkpoints nor replay shards: name a run's folder, as runs/avatar_7b")


def read_rows(folder: Path, state: dict[str, Any]) -> tuple[list[dict], list[dict]]:
    """What the shards hold, as (trajectories that are alive, shards); files are only read, damaged ones too."""
    index = state.get("replay")
    if index is None:
        index = {path.name: {"sha256": path.stem.removeprefix("shard-"), "live": None}
                 for path in sorted(folder.glob("shard-*.h5"))}
    rows, shards = [], []
    for name, shard in index.items():
        path, found, total = folder / name, [], shard.get("rows", 0)
        reason = damage(path, shard["sha256"]) if path.parent == folder else "its name leads out of the folder"
        if not reason:
            try:
                found, total = _live_rows(path.read_bytes(), shard["live"])
            except ValueError as error:
                reason = str(error)
        size = path.stat().st_size if path.is_file() else 0
        shards.append({"name": name, "damage": reason, "bytes": size, "rows": total,
                       "live": len(found if not reason else shard["live"] or [])})  # fmt: skip
        rows += found
    return rows, shards


def _live_rows(image: bytes, live: dict[str, Any] | None) -> tuple[list[dict], int]:
    """What a shard says of its trajectories that are alive, and how many it holds. ValueError for no shard."""
    table, _, _, meta = read_tables(image)
    rows, end = [], 0
    for row in table:
        start, end = end, end + int(row["meta"])
        if live is not None and str(row["serial"]) not in live:
            continue
        try:
            about = json.loads(meta[start:end])
            rows.append({"sample_id": about["sample_id"], "variant": about["variant"], "step": int(row["step"]),
                         "tokens": int(row["tokens"]), "reward": float(row["reward"])})
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise ValueError(f"row {row['serial']} can't be read ({type(error).__name__})") from None
    return rows, len(table)


def show_replay(path: Path, console: Console) -> None:
    folder, state = replay_state(path)
    rows, shards = read_rows(folder, state)
    now = state.get("step", max((row["step"] for row in rows), default=0))
    tracker = RewardTracker()
    if state.get("tracker"):
        tracker.load_state_dict(state["tracker"])
    tiers = tracker.tiers()
    where = f"step {state['step']}, stage {state['stage']}" if state else "no checkpoint: every row counts as alive"
    console.print(f"{folder} ({where})")
    console.print(f"{len(rows)} trajectories of {len({r['sample_id'] for r in rows})} prompts, "
                  f"{sum(r['tokens'] for r in rows)} tokens, {sum(s['bytes'] for s in shards) / 2**20:.1f} MiB")
    table = Table("tier", "kept", "prompts", "hinted", "reward", "0 to 1", "age in steps", "tokens")
    for tier in (*TIERS, "all"):
        mine = [r for r in rows if tier in (tiers.get(r["sample_id"], UNRANKED), "all")]
        if mine:
            ages = np.array([now - r["step"] for r in mine])
            rewards = np.array([r["reward"] for r in mine])
            table.add_row(
                tier, str(len(mine)), str(len({r["sample_id"] for r in mine})),
                f"{np.mean([r['variant'] == 'hinted' for r in mine]):.0%}", f"{rewards.mean():.3f}", bars(rewards),
                f"{ages.min()} to {ages.max()}",
                f"{np.mean([r['tokens'] for r in mine]):.0f}",
            )
    console.print(table)
    table = Table("shard", "alive", "rows", "KiB", "state")
    for shard in shards:
        table.add_row(shard["name"], str(shard["live"]), str(shard["rows"]), f"{shard['bytes'] / 1024:.0f}",
                      f"DAMAGED: {shard['damage']}" if shard["damage"] else "sound")
    console.print(table)
    aside = sorted(p.name for p in folder.glob("*.damaged"))
    if aside:
        console.print(f"set aside earlier: {', '.join(aside)}")


def bars(rewards: np.ndarray) -> str:
    """A histogram of eight characters over [0, 1]."""
    counts = np.histogram(np.clip(rewards, 0, 1), bins=8, range=(0, 1))[0]
    return "".join(BARS[min(int(8 * c / max(counts.max(), 1)), 7)] if c else " " for c in counts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(dest="what", required=True)
    sample = what.add_parser("sample", help="one line of a manifest, and what its files really hold")
    sample.add_argument("id")
    sample.add_argument("--manifest", type=Path, default=Path("runs/demo/data/manifest.jsonl"))
    replay = what.add_parser("replay", help="tiers, ages, rewards and sizes of a replay buffer on disk")
    replay.add_argument("path", type=Path)
    args = parser.parse_args()
    try:
        show_sample(args.id, args.manifest) if args.what == "sample" else show_replay(args.path, Console(markup=False))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
