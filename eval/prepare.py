"""A benchmark's items with measured media, in a folder that every evaluation of it reads.

    python -m eval.prepare benchmark=NAME data=FOLDER prepared=FOLDER [revision=COMMIT]

    FOLDER/items.jsonl    one item a line; one whose media can't be used stays, with its reason
    FOLDER/media/         named by content
    FOLDER/dataset.json   where the items come from: name, revision, fingerprint, counts
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import sys
from concurrent.futures import TimeoutError as Late
from dataclasses import replace
from pathlib import Path
from typing import Any

from pebble import ProcessExpired, ProcessFuture, ProcessPool
from rich.console import Console
from rich.markup import escape
from rich.progress import track

from data_tools.prepare.damage import Refused, refusal, shown
from data_tools.prepare.store import Handling, find, ignore_signals, read_card, store
from eval.asking.benchmark import Benchmark, load_benchmark
from eval.asking.clips import cut, from_frames
from eval.asking.items import Item, Prepared, Wanted, item_to_dict, make_items, read_prepared
from megatron_avatar.config.paths import home
from megatron_avatar.data.manifest import load_manifest
from megatron_avatar.files import replacing
from megatron_avatar.locks import held
from megatron_avatar.records import Media, Sample

DEADLINE_S = 600.0  # for one medium
PROBLEM_KINDS = {"multiple_choice": "choice", "numerical": "number", "math": "math"}


def prepare(
    benchmark: Benchmark, data: str, folder: Path, *, revision: str = "", processes: int | None = None
) -> Prepared:
    """Read the owners' records in `data`, measure their media into `folder`; what is there of the same is reused.

    Evaluations that begin at once wait for the first, which prepares. Raises ValueError for missing records, columns or
    ids that are not unique, and for a folder of other records.
    """
    with held(folder / "lock", "an evaluation's preparation", wait=True):
        return _prepare(benchmark, data, folder, revision, processes or len(os.sched_getaffinity(0)))


def _prepare(benchmark: Benchmark, data: str, folder: Path, revision: str, processes: int) -> Prepared:
    rows, odd = make_items(benchmark, data, revision)
    fingerprint = hashlib.sha256(
        json.dumps([[item_to_dict(item), [_identity(w) for w in wanted]] for item, wanted in rows]).encode()
    ).hexdigest()[:16]
    dataset = {
        "name": benchmark.source.dataset, "revision": revision, "fingerprint": fingerprint, "items": len(rows),
        "expected": benchmark.source.items, "unreadable": odd,
    }  # fmt: skip
    _unique(benchmark, [item.id for item, _ in rows])
    marker = folder / "dataset.json"
    if marker.exists():
        before = json.loads(marker.read_text())
        if before["fingerprint"] != fingerprint:
            raise ValueError(
                f"{folder} holds items of other records ({before['items']} items, fingerprint {before['fingerprint']}, "
                f"now {len(rows)} and {fingerprint}): the data or their revision changed; write another prepared=FOLDER"
            )
        return read_prepared(folder)
    root = "" if not Path(data).exists() else str(Path(data) if Path(data).is_dir() else Path(data).parent)
    where = root or f"hf://datasets/{data}@{revision}"
    handling = Handling(where, str(folder), str(folder / "scratch"), codec="needed")
    items = _measured(rows, handling, processes, benchmark.title)
    with replacing(folder / "items.jsonl") as file:
        file.writelines(json.dumps(item_to_dict(item), ensure_ascii=False) + "\n" for item in items)
    with replacing(marker) as file:  # last: with it all is there
        file.write(json.dumps(dataset, indent=1) + "\n")
    return Prepared(folder, items, dataset)


def held_out(manifest: Path, split: str = "eval") -> Prepared:
    """The samples of a manifest's split as items; the breakdowns are stage and family."""
    samples = load_manifest(manifest, split=split, check_media=False)  # a missing clip is a failed item, not an error
    if not samples:
        raise ValueError(f"{manifest}: no sample has split '{split}'; name a manifest that has some")
    fingerprint = hashlib.sha256(manifest.read_bytes()).hexdigest()[:16]
    dataset = {"name": "held_out", "revision": "", "fingerprint": fingerprint, "items": len(samples),
               "expected": len(samples)}  # fmt: skip
    return Prepared(manifest.parent, [_held_out_item(sample) for sample in samples], dataset)


def _held_out_item(sample: Sample) -> Item:
    kind = PROBLEM_KINDS.get(sample.problem_type, "text")
    letters = "".join(chr(ord("A") + k) for k in range(len(sample.choices)))
    return Item(
        id=sample.id, kind=kind, question=sample.question, gold=sample.answer, letters=letters, choices=sample.choices,
        groups={"stage": (sample.stage,), "family": (sample.family,)}, keep={"problem_type": sample.problem_type},
        media=sample.media,
    )  # fmt: skip


def _identity(wanted: Wanted) -> list[Any]:
    source = wanted.source
    content = hashlib.sha256(source.data).hexdigest() if source.data is not None else source.path
    return [source.kind, content, wanted.start, wanted.end, wanted.fps]


def _unique(benchmark: Benchmark, ids: list[str]) -> None:
    if len(ids) != len(set(ids)):
        double = next(i for k, i in enumerate(ids) if i in ids[:k])
        raise ValueError(f"{benchmark.name}: the id {double!r} is there twice; correct records.id in its YAML file")
    if not ids:
        raise ValueError(f"{benchmark.name}: its records hold no question; check data=")


def _measured(rows: list[tuple[Item, list[Wanted]]], handling: Handling, processes: int, title: str) -> list[Item]:
    scratch = Path(handling.scratch)
    shutil.rmtree(scratch, ignore_errors=True)  # what a killed attempt left
    scratch.mkdir(parents=True)
    context = multiprocessing.get_context("forkserver")  # a worker then costs a fork, not the imports
    context.set_forkserver_preload(["eval.prepare", "megatron_avatar.data.loader"])  # whose own start there too
    pool = ProcessPool(processes, initializer=ignore_signals, context=context)
    begun: dict[str, ProcessFuture] = {}
    try:
        for _, wanted in rows:
            for one in wanted:
                key = json.dumps(_identity(one))
                if key not in begun:
                    begun[key] = pool.schedule(place, args=(one, handling), timeout=DEADLINE_S)
        shown = track(rows, escape(f"media of {title}"), console=Console(stderr=True), disable=not sys.stderr.isatty())
        items = [_with_media(item, [begun[json.dumps(_identity(w))] for w in wanted], wanted, handling)
                 for item, wanted in shown]  # fmt: skip
        pool.close()
        return items
    except BaseException:
        pool.stop()
        raise
    finally:
        pool.join()
        shutil.rmtree(scratch, ignore_errors=True)


def place(wanted: Wanted, handling: Handling) -> str:
    """The medium measured and stored, a part of a file or a folder of frames made a clip first; its content's name."""
    whole = wanted.start is None and wanted.end is None
    if whole and wanted.fps is None:
        return store(wanted.source, handling)
    path = find(wanted.source.path, handling.root)
    if whole and path.is_file():
        return store(wanted.source, handling)
    name = hashlib.sha256(json.dumps(_identity(wanted)).encode()).hexdigest()[:32] + ".mkv"
    made = Path(handling.scratch) / name
    try:
        if path.is_dir():
            from_frames(path, made, wanted.fps or 1.0, wanted.start, wanted.end)
        else:
            cut(path, made, wanted.start or 0.0, wanted.end)
    except Exception as error:
        raise refusal(error) from None
    return store(replace(wanted.source, path=name), replace(handling, root=handling.scratch))


def _with_media(item: Item, futures: list[ProcessFuture], wanted: list[Wanted], handling: Handling) -> Item:
    media, out = [], Path(handling.out)
    for one, future in zip(wanted, futures, strict=True):
        what = shown(one.source.path) or f"embedded {one.source.kind}"
        try:
            card = read_card(out, future.result(), one.source.kind)
        except Refused as refused:
            return replace(item, trouble=f"{what}: {refused.detail}")
        except (Late, ProcessExpired) as error:
            return replace(item, trouble=f"{what}: {type(error).__name__}, the decoder hung or crashed on it")
        except (OSError, MemoryError, ImportError, AssertionError):
            raise  # this machine's fault, or this program's
        except Exception as error:  # what a foreign decoder meets
            return replace(item, trouble=f"{what}: {shown(f'{type(error).__name__}: {error}')}")
        if "refused" in card:
            return replace(item, trouble=f"{what}: {card['detail']}")
        pts = card["media"].get("pts")
        media.append(Media(**{**card["media"], "pts": tuple(pts) if pts else None}))
    return replace(item, media=tuple(media))


def main(arguments: list[str]) -> int:
    given = dict(home(item).partition("=")[::2] for item in arguments)
    needed = {"benchmark", "data", "prepared"}
    try:
        if not needed <= given.keys() <= needed | {"revision"}:
            raise ValueError("usage: eval.prepare benchmark=NAME data=FOLDER prepared=FOLDER [revision=COMMIT]")
        benchmark = load_benchmark(given["benchmark"])
        found = prepare(benchmark, given["data"], Path(given["prepared"]), revision=given.get("revision", ""))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    unusable = [item for item in found.items if item.trouble]
    odd = found.dataset.get("unreadable", [])
    print(f"{benchmark.title}: {len(found.items)} items in {given['prepared']} (its owners count "
          f"{benchmark.source.items}), {len(unusable)} without usable media; {len(odd)} records make none")  # fmt: skip
    for line in [*(f"{item.id}: {item.trouble}" for item in unusable), *odd]:
        print(f"  {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
