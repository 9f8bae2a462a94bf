"""A line before a command's slow imports: `python -m eval.report` would else be silent for as long as torch loads.

A package's __init__ calls `say`: it is read first, while sys.argv[0] is still "-m".
"""

from __future__ import annotations

import os
import sys

# Commands that read torch, matplotlib or a language model's library before they can say anything of their own.
SLOW = (
    "data_tools.captions", "data_tools.hints", "data_tools.leaks", "data_tools.pretrain", "data_tools.show",
    "data_tools.teacher", "data_tools.traces", "eval.figures", "eval.lmms", "eval.prepare", "eval.report",
    "eval.reproduction", "eval.run", "eval.score", "eval.tables", "megatron_avatar.planning.dynamics",
    "megatron_avatar.planning.recipes",
)  # fmt: skip


def say() -> None:
    """Name the module that is loading, on the first process of a command, where it is a slow one."""
    if not sys.argv or sys.argv[0] != "-m" or "-m" not in sys.orig_argv[:-1]:
        return
    module = sys.orig_argv[sys.orig_argv.index("-m") + 1]
    if module in SLOW:
        tell(f"{module}: loading ...")


def tell(line: str) -> None:
    """A line on standard error, from the first process alone."""
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        print(line, file=sys.stderr, flush=True)
