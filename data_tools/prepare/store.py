"""One medium into out/media: found, measured, copied or encoded, and named by its content. Runs in the workers.

Beside the files lies CONTENT.KIND.json with what was measured, or why the medium is refused: whoever meets the same
content again, in another row, shard or attempt, reads it there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from data_tools.prepare import convert, measure
from data_tools.prepare.damage import Refused, refusal
from megatron_avatar.data.container import sound_stream
from megatron_avatar.data.sound import SAMPLE_RATE
from megatron_avatar.files import is_machines, writing

MIN_SAMPLES = 321  # the manifest's least: less makes no audio token
SILENT = 1e-4  # the loudest sample of a track in which nothing is heard
NO_SUCH = (400, 404, 410, 414, 422)  # HTTP states that waiting doesn't change
# By content, not by the given name: the manifest must not depend on which of two equal files came first.
SUFFIXES = {"mov": ".mp4", "matroska": ".mkv", "avi": ".avi", "mpegts": ".ts", "flv": ".flv", "ogg": ".ogv"}


@dataclass(frozen=True)
class Source:
    """A medium as a row names it: by path (below `Handling.root`) or by its bytes."""

    kind: str  # video | image | audio
    path: str = ""
    data: bytes | None = None


@dataclass(frozen=True)
class Handling:
    """What is done with every medium. `root`: a folder, or an address (hf://...) below which paths lie."""

    root: str
    out: str
    scratch: str
    decode: bool = False
    codec: str = "none"  # none | h264 | vp9: encode every clip anew; needed: as H.264 those that are not plain
    max_side: int = 1280


def ignore_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # the parent answers, and ends its workers


def card_path(out: Path, content: str, kind: str) -> Path:
    return out / "media" / content[:2] / f"{content}.{kind}.json"


def read_card(out: Path, content: str, kind: str) -> dict[str, Any]:
    """What is known of a medium: `media` (of records.Media) and `facts`, or `refused` and `detail`."""
    return json.loads(card_path(out, content, kind).read_bytes())


def store(source: Source, handling: Handling) -> str:
    """Puts a medium and its card into the store; returns its content's name. Raises Refused for one without content."""
    out = Path(handling.out)
    with tempfile.TemporaryDirectory(dir=handling.scratch) as folder:
        path = _fetch(source, handling, Path(folder))
        before = _state(path)
        with open(path, "rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()[:32]
        card = card_path(out, content, source.kind)
        if card.exists():
            return content
        card.parent.mkdir(parents=True, exist_ok=True)
        try:
            known = _KINDS[source.kind](path, content, handling, Path(folder))
        except Exception as error:
            refused = refusal(error)
            known = {"refused": refused.kind, "detail": refused.detail}
        if path.exists() and _state(path) != before:
            raise OSError(f"{path} was changed while it was read; the same command reads it again")
        temporary = Path(folder) / "card.json"
        with writing(temporary):
            temporary.write_text(json.dumps(known), encoding="utf-8")
        os.replace(temporary, card)  # last: with the card all is there
    return content


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _fetch(source: Source, handling: Handling, folder: Path) -> Path:
    """The medium as a file: in place where it is one of the input's, else below `folder`."""
    if source.data is not None:
        path = folder / "embedded"
        with writing(path):
            path.write_bytes(source.data)
    elif "://" in handling.root:
        path = folder / "fetched"
        _download(source.path, handling.root, path)
    else:
        path = find(source.path, handling.root)
        if not path.is_file():
            raise Refused("missing", f"is no file but a folder or a device below {handling.root}")
    if not path.stat().st_size:
        raise Refused("empty", "the file has 0 bytes")
    return path


def find(name: str, root: str) -> Path:
    """What `name` means below the folder `root`; Refused where that is outside, not there, or not to be read."""
    try:
        base = Path(root).resolve()
        path = (base / name).resolve()
        if not path.is_relative_to(base):
            raise Refused("outside", f"lies outside of {root}; put it there, or widen media=FOLDER")
        if not path.exists():
            raise Refused("missing", f"there is no such file below {root}; set media=FOLDER")
        if not os.access(path, os.R_OK):
            raise Refused("missing", "may not be read by this user")
    except (OSError, ValueError, RuntimeError) as error:  # NUL, a text in place of a path, a loop of links
        if is_machines(error):
            raise
        reason = getattr(error, "strerror", None) or error
        raise Refused("missing", f"can't be the path of a file ({reason})") from None
    return path


def _download(name: str, root: str, target: Path) -> None:
    """Copies a file of the hub; addresses that rows bring must lie below `root` as well."""
    address = name if "://" in name else f"{root}/{name}"
    if not address.rpartition("::")[2].startswith(f"{root}/") or ".." in address.split("/"):
        raise Refused("outside", f"lies outside of {root}")
    try:
        with fsspec.open(address, "rb") as remote, open(target, "wb") as local:
            shutil.copyfileobj(remote, local, 1 << 20)
    except (FileNotFoundError, ValueError):
        raise Refused("missing", f"there is no {address}; download the dataset and write input=FOLDER") from None
    except Exception as error:
        if getattr(getattr(error, "response", None), "status_code", 500) in NO_SUCH:
            raise Refused("missing", f"the server knows no {address}") from None
        # Else the network's fault, in classes that don't cross processes.
        raise OSError(f"{address}: {type(error).__name__}: {error}; the same command continues") from None


def _video(path: Path, content: str, handling: Handling, folder: Path) -> dict[str, Any]:
    codec, decode = handling.codec, handling.decode
    clip = measure.measure_video(path, decode=decode and codec in ("none", "needed"), any_codec=codec != "none")
    facts = {"seconds": clip.seconds, "codec": clip.codec, "height": clip.height, "width": clip.width}
    sound = folder / "sound.flac"
    samples, loudest = convert.extract_sound(path, sound, start=clip.start)
    again = codec not in ("none", "needed") or (codec == "needed" and not clip.is_plain)
    if again:
        codec = "h264" if codec == "needed" else codec
        encoded = folder / f"encoded{convert.ENCODERS[codec][1]}"
        convert.transcode(path, encoded, clip, codec, handling.max_side)
        path, count = encoded, clip.frame_count
        clip = measure.measure_video(path, decode=decode)
        if clip.frame_count < count // 2:
            raise Refused("damaged", f"only {clip.frame_count} of {count} frames could be encoded anew")
    suffix = path.suffix if again else SUFFIXES.get(clip.container, ".bin")
    media = {
        "path": _place(path, content, suffix, handling),
        "kind": "video",
        "frame_count": clip.frame_count,
        "fps": clip.fps,
        "height": clip.height,
        "width": clip.width,
    }
    if clip.pts is not None:
        media["pts"] = clip.pts
    if samples >= MIN_SAMPLES:
        heard = {"audio_path": _place(sound, content, ".flac", handling), "audio_samples": samples}
        media |= heard | {"audio_in_video": True}
        facts["silent"] = loudest < SILENT
    return {"media": media, "facts": facts}


def _image(path: Path, content: str, handling: Handling, folder: Path) -> dict[str, Any]:
    height, width, form = measure.measure_image(path)
    place = _place(path, content, f".{form}", handling)
    media = {"path": place, "kind": "image", "height": height, "width": width}
    return {"media": media, "facts": {"codec": form, "height": height, "width": width}}


def _audio(path: Path, content: str, handling: Handling, folder: Path) -> dict[str, Any]:
    """Sound is converted, unless it is as the trainer reads it best already."""
    sound = folder / "sound.flac"
    with measure.opened(path) as container:
        stream = sound_stream(container)
        if stream is None:
            raise Refused("no_sound", "holds no sound track")
        codec = stream.codec_context.codec.canonical_name if stream.codec_context else "unknown"
    ready = convert.ready_sound(path) if codec == "flac" else None
    if ready:
        sound = path
    samples, loudest = ready or convert.extract_sound(path, sound)
    if samples < MIN_SAMPLES:
        raise Refused("no_sound", f"{samples} samples are too short to hear")
    place = _place(sound, content, ".flac", handling)
    facts = {"seconds": samples / SAMPLE_RATE, "codec": codec, "silent": loudest < SILENT}
    return {"media": {"path": place, "kind": "audio", "audio_samples": samples}, "facts": facts}


_KINDS = {"video": _video, "image": _image, "audio": _audio}


def _place(path: Path, content: str, suffix: str, handling: Handling) -> str:
    """Puts a file at its name below out, at once; returns that name.

    What was made here is moved, a file of the input is copied (in no time and room where the file system can): were it
    linked, whoever appends to the input would change what is named by its content.
    """
    name = Path("media") / content[:2] / (content + suffix)
    target = Path(handling.out) / name
    if path.resolve().is_relative_to(Path(handling.scratch).resolve()):
        os.replace(path, target)
        return name.as_posix()
    temporary = Path(handling.scratch) / f"{os.getpid()}-{content}{suffix}"
    try:
        _copy(path, temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return name.as_posix()


def _copy(path: Path, target: Path) -> None:
    with writing(target), open(path, "rb") as source, open(target, "wb") as sink:
        try:
            while os.copy_file_range(source.fileno(), sink.fileno(), 1 << 30):
                pass
        except (AttributeError, OSError) as error:  # Linux's own, and not between all file systems
            if is_machines(error):
                raise
        shutil.copyfileobj(source, sink, 1 << 20)  # the rest, which may be all
