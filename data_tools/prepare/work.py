"""The whole of a preparation: this process's shard, and the merge by whoever finishes last."""

from __future__ import annotations

import os
from collections import Counter

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from data_tools.prepare.merge import merge, missing_shards
from data_tools.prepare.rows import Input
from data_tools.prepare.settings import Settings, claim, dataset_of, input_of
from data_tools.prepare.shard import Shard, is_done, journal_path
from data_tools.prepare.store import Handling
from megatron_avatar.config import Config


def prepare(settings: Settings, config: Config, console: Console) -> None:
    """Raises ValueError for settings or data that the user has to correct; KeyboardInterrupt leaves what is done."""
    dataset, rows = dataset_of(settings), input_of(settings)
    out = claim(settings, config, rows)
    if (out / "manifest.jsonl").exists():
        console.print(f"{out}/manifest.jsonl is complete")
        return
    if not settings.merge and not is_done(journal_path(out, settings.shard, settings.shards)):
        from data_tools.prepare.judge_row import RowJudge  # torch and the tokenizer only where there is work

        judge = RowJudge(settings.model, config, out, settings.eval_share)
        processes = settings.processes or len(os.sched_getaffinity(0))
        shard = Shard(dataset, rows, judge, _handling(settings, rows), stage=settings.stage, processes=processes,
                      deadline_s=settings.deadline_s, shards=settings.shards, shard=settings.shard)  # fmt: skip
        _run(shard, console)
    missing = missing_shards(out, settings.shards)
    if missing and settings.merge:
        names = ", ".join(map(str, missing))
        raise ValueError(f"merge=true: of {settings.shards} shards {names} are not done; run them first")
    if missing:
        console.print(f"shard {settings.shard} is done; {len(missing)} of {settings.shards} are not yet")
        return
    report = merge(out, settings.shards, config.model.context)
    kept = f": {report.samples} samples, {report.refused.total()} rows refused" if report else ""
    console.print(f"{out}/manifest.jsonl{kept}; see {out}/report.md", soft_wrap=True)


def _handling(settings: Settings, rows: Input) -> Handling:
    scratch = f"{settings.out}/shards/{settings.shard}-of-{settings.shards}.tmp"
    return Handling(rows.root, settings.out, scratch, decode=settings.check == "decode", codec=settings.transcode,
                    max_side=settings.max_side)  # fmt: skip


def _run(shard: Shard, console: Console) -> None:
    """With a line of progress: the number of rows is not known before all are read."""
    counts: Counter[bool] = Counter()
    text = "{task.completed:,.0f} rows, {task.fields[refused]:,} refused, {task.fields[rate]} rows/s"
    with Progress(SpinnerColumn(), TextColumn(text), TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task("", total=None, refused=0, rate="0.0")

        def progress(kept: bool) -> None:
            counts[kept] += 1
            elapsed = bar.tasks[0].elapsed or 1.0
            bar.update(task, completed=counts.total(), refused=counts[False], rate=f"{counts.total() / elapsed:.1f}")

        shard.run(progress)
