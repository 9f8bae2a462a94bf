"""Prepare a dataset for training: rows and media in, manifest.jsonl, media/, report.md and rejected.jsonl out.

    python -m data_tools.prepare source=avatar_rl input=FOLDER out=FOLDER model=HF_FOLDER [key=value ...]

source: avatar_rl, vision_r1_rl, video_r1, or mapping with mapping=FILE.yaml. input: a file or folder of JSONL, JSON
lists or parquet, or OWNER/NAME of the hub with revision=COMMIT. The other keys: data_tools/prepare/settings.py. Keys
with a dot change the recipe that the data are for (recipe=avatar_7b): data.max_frames=8.

--sources says where data sets and models are, how large, and what fetches them.

source=teacher input=MANIFEST endpoint=URL asks a teacher for reasoning traces (data_tools/traces.py).

The same command again continues what was interrupted. In a Slurm array every task does its shard, the last one merges.
"""

from __future__ import annotations

import os
import signal
import sys


def main(arguments: list[str]) -> int:
    if "source=teacher" in arguments:
        return _teacher(arguments)
    if not arguments or {"-h", "--help", "help"} & set(arguments):
        print(__doc__)
        return 0 if arguments else 2
    if arguments == ["--sources"]:
        from data_tools.prepare.published import show

        return show()
    from megatron_avatar.first_words import tell

    tell("preparing: reading settings and the tokenizer ...")
    from rich.console import Console

    from data_tools.prepare.settings import parse
    from data_tools.prepare.work import prepare
    from megatron_avatar.config.urls import mask

    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGUSR1, _interrupt)  # Slurm's notice before the end of a job's time
    try:
        prepare(*parse(arguments), Console(stderr=True, markup=False))
    except KeyboardInterrupt:
        print("stopped; what is done is kept, the same command continues", file=sys.stderr)
        return 75
    except (ValueError, OSError, RuntimeError) as error:  # the last from workers that can't do their part
        print(f"error: {mask(str(error))}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return 0


def _teacher(arguments: list[str]) -> int:
    """Traces for a manifest that is there already, as data_tools.traces writes them, by key=value."""
    from data_tools import traces
    from megatron_avatar.config.paths import home

    given = dict(home(item).partition("=")[::2] for item in arguments)
    names = {"endpoint": "--endpoint", "teacher": "--model", "share": "--share", "out": "--out"}
    unknown = given.keys() - names.keys() - {"source", "input"}
    if unknown or not given.get("input") or not given.get("endpoint"):
        print("error: source=teacher takes input=MANIFEST endpoint=URL [teacher=MODEL] [share=0.1] [out=MANIFEST]"
              + (f", not {', '.join(sorted(unknown))}" if unknown else ""), file=sys.stderr)  # fmt: skip
        return 2
    options = [item for key, option in names.items() if key in given for item in (option, given[key])]
    return traces.main([given["input"], *options])


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main(sys.argv[1:]))
