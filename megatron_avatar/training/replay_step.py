"""One logged step of a run again, from the checkpoint before it: does it come out the same?

    python -m megatron_avatar.train (the run's own arguments) replay_step=N

Nothing in the run's folder is changed. Exit status 0: equal, 1: not, 2: it can't be repeated.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_avatar.config.checks import check_same_run
from megatron_avatar.config.schema import Config
from megatron_avatar.files import step_folders
from megatron_avatar.policy.backend import Backend
from megatron_avatar.resilience import checkpoint
from megatron_avatar.rl.replay.store import damage
from megatron_avatar.training.loop import Run
from megatron_avatar.training.telemetry import plain


def replay_step(config: Config, backend: Backend) -> int:
    """Repeat step config.replay_step of the run in config.output_dir; all ranks call it. Returns the exit status."""
    console = Console(stderr=True, quiet=backend.rank > 0)
    folder, wanted = Path(config.output_dir), config.replay_step
    try:
        check_same_run(config)
        logged = read_metrics(folder, wanted)
        start = checkpoint_before(folder, wanted, backend)
    except ValueError as error:
        if backend.rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2
    run = Run(config, backend)
    try:
        names = list(config.stages)
        if start is None:
            run.enter_stage(names[0])
        else:
            run.load(start)
            if backend.rank == 0:
                layout = json.loads((start / checkpoint.MANIFEST).read_text())["layout"]
                if layout != {"tp": backend.tp, "pp": backend.pp, "dp": backend.dp}:
                    console.print(f"the checkpoint was saved on the layout {layout}: last bits may differ on this one")
        console.print(f"from {start.name if start else 'the beginning'} to step {wanted}")
        equal = True
        while run.step < wanted:
            if run.stage_step == run.stage.steps:
                run.enter_stage(names[names.index(run.stage_name) + 1])
            record = run.take_step()
            if "eval/overall" in logged[run.step]:
                record |= run.held_out()
            equal &= compare(plain(record), logged[run.step], console)
        show_completions(run, console)
        return 0 if all(backend.all_gather_object(equal)) else 1
    finally:
        run.scoring.close()
        run.loader.close()


def read_metrics(folder: Path, wanted: int) -> dict[int, dict[str, Any]]:
    """Step -> record of metrics.jsonl. ValueError where the wanted one was never logged."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        raise ValueError(f"{path} doesn't exist: output_dir must name a run that has logged steps")
    records = {record["step"]: record for record in map(json.loads, path.read_text().splitlines())}
    if wanted not in records:
        raise ValueError(f"replay_step={wanted}: {path} has steps {min(records)} to {max(records)}")
    return records


def checkpoint_before(folder: Path, wanted: int, backend: Backend) -> Path | None:
    """The newest sound checkpoint before step `wanted`; None: the run's beginning. ValueError for lost shards."""
    steps = list(step_folders(folder / checkpoint.CHECKPOINTS))
    for step in reversed([s for s in backend.all_gather_object(steps)[0] if s < wanted]):
        try:
            path = checkpoint.find(folder, step, backend)
        except checkpoint.CheckpointError as error:
            print(f"passed over: {error}", file=sys.stderr)
            continue
        for name, shard in checkpoint.read_state(path).get("replay", {}).items():
            if reason := damage(folder / "replay" / name, shard["sha256"]):
                raise ValueError(f"{folder / 'replay' / name}: {reason}: the steps after {path.name} drew from it and "
                                 "can't be repeated; restore it from a copy")
        return path
    return None


def compare(now: dict[str, Any], logged: dict[str, Any], console: Console) -> bool:
    """Say in which keys a step's record differs from the logged one; what depends on the clock doesn't count."""
    keys = [k for k in logged | now if not k.startswith("time") and k != "peak_rss_mib"]
    different = [key for key in keys if now.get(key) != logged.get(key)]
    if not different:
        console.print(f"step {logged['step']}: [green]equal[/] in all {len(keys)} keys")
        return True
    table = Table("key", "logged", "now", "relative difference", title=f"step {logged['step']} differs")
    for key in different:
        before, after = logged.get(key), now.get(key)
        ratio = ""
        if isinstance(before, int | float) and isinstance(after, int | float):
            ratio = f"{abs(after - before) / max(abs(before), 1e-30):.1e}"
        table.add_row(key, str(before), str(after), ratio)
    console.print(table)
    return False


def show_completions(run: Run, console: Console) -> None:
    """The prompts, completions and rewards of the latest step."""
    for t in run.fresh:
        parts = ", ".join(f"{name} {value:.3f}" for name, value in t.parts.items())
        question = run.samples[t.sample_id].question
        console.print(f"[bold]{escape(t.sample_id)}[/] ({t.variant}), reward {t.reward:.3f} ({parts})", highlight=False)
        console.print(f"    {question}\n    {t.text}", soft_wrap=True, markup=False, highlight=False)
