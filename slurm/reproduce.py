"""The paper as a graph of jobs: prepare, cold starts, trainings, evaluations, tables.

    python slurm/reproduce.py profile=smoke|tiny|paper [--dry-run] [key=value ...]

    profile=NAME       slurm/profiles/NAME.yaml; the paper's needs folders: model_7b=FOLDER data_omni=FILE ...
    cluster=NAME       where (config/cluster; cluster=local: processes on this machine)
    output_dir=FOLDER  of everything (runs/NAME)
    concurrency=2      tasks at the same time on this machine (on a cluster Slurm decides)
    retries=3          failed attempts of a task that are made good by another
    watch=true         show the table until all is done; Ctrl-C leaves the jobs alone
    --dry-run          print the graph, its commands and what is done already; submit nothing

The same command again submits only what is missing. Other settings go to every training and evaluation.
"""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from omegaconf import OmegaConf  # noqa: E402
from rich.console import Console  # noqa: E402

from megatron_avatar.config import load_config  # noqa: E402
from megatron_avatar.config.checks import check_folder, check_same_run  # noqa: E402
from slurm import launch  # noqa: E402
from slurm.jobs import Board, Task, sbatch_options  # noqa: E402
from slurm.snapshot import snapshot  # noqa: E402
from slurm.sweep import join, members_of, on_slurm, split_options  # noqa: E402
from slurm.table import watch  # noqa: E402

PROFILES = Path(__file__).parent / "profiles"
OPTIONS = {"profile": "", "output_dir": "", "concurrency": "2", "retries": "3", "watch": "true"}


def read_profile(name: str, out: Path, settings: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The profile with its {placeholders} filled in from `settings`, and the settings that are left."""
    path = PROFILES / f"{name}.yaml"
    if not path.is_file():
        choices = ", ".join(sorted(p.stem for p in PROFILES.glob("*.yaml")))
        raise ValueError(f"profile={name}: choose one of {choices}")
    text = path.read_text()
    wanted = {*re.findall(r'"[^"\n]*{(\w+)}', text)} - {"out"}
    given = {k: v for k, _, v in (item.partition("=") for item in settings) if k in wanted}
    if missing := sorted(wanted - given.keys()):
        raise ValueError(f"profile={name} needs {' '.join(f'{key}=PATH' for key in missing)}: see {path}")
    for key, value in given.items():
        if not Path(value).exists():
            raise ValueError(f"{key}={value} doesn't exist")
    for key, value in {"out": str(out), **given}.items():
        text = text.replace("{" + key + "}", value)
    return OmegaConf.to_container(OmegaConf.create(text)), [s for s in settings if s.partition("=")[0] not in given]


def graph(profile: dict[str, Any], out: Path, settings: list[str], retries: int) -> list[Task]:
    """All tasks, each behind those that it needs."""
    tasks: list[Task] = []

    def add(task: Task) -> str:
        task.retries = retries
        tasks.append(task)
        return task.name

    def train(name: str, own: list[str], needs: list[str]) -> str:
        run = out / name
        return add(Task(name, run, [*own, f"output_dir={run}"], run / "done.json", needs=needs))

    def command(
        name: str, module: str, arguments: list[str], where: list[str], needs: list[str], *, parallel: bool = False
    ) -> str:
        done = out / "tasks" / f"{name}.done"
        return add(Task(name, out / "tasks", where, done, module, parallel, arguments, needs))

    def evaluate(name: str, model: Path, recipe: str, own: list[str], manifest: str, needs: list[str]) -> str:
        layout = [s for s in own if s.startswith(("data.", "rl.sampling.", "parallel", "cluster", "model.dtype"))]
        arguments = ["--model", str(model), "--manifest", manifest, "--recipe", recipe, "--out",
                     str(out / "eval" / f"{name}.jsonl"), *layout]  # fmt: skip
        where = [f"recipe={recipe}", f"model.path={model}", f"data.manifest={manifest}", *layout]
        return command(f"eval_{name}", "eval.run", arguments, where, needs, parallel=True)

    prepared, evaluations = [], []
    for family, parts in profile["families"].items():
        manifest, prefix = parts["manifest"], "" if len(profile["families"]) == 1 else f"{family}_"
        common = [*parts.get("settings", []), f"data.manifest={manifest}", *settings]
        (recipe,) = (item.partition("=")[2] for item in parts["train"] if item.startswith("recipe="))
        if "prepare" in profile and not prepared:
            where = [f"recipe={recipe}", f"model.path={parts['base']}", *common]
            prepared = [command("prepare", profile["prepare"]["module"], profile["prepare"]["arguments"], where, [])]
        own = [*parts["train"][1:], *common]
        evaluations.append(evaluate(f"{prefix}base", Path(parts["base"]), recipe, own, manifest, prepared))
        start, needs = Path(parts["base"]), prepared
        if "sft" in parts:
            name = f"{prefix}sft"
            train(name, [*parts["sft"], f"model.path={parts['base']}", *common], prepared)
            start, needs = out / name / "export" / "sft", [name]
            evaluations.append(evaluate(name, start, recipe, own, manifest, needs))
        members = {f"{prefix}{name}": settings for name, settings in parts["systems"].items()}
        for sweep in parts.get("sweeps", []):
            members |= {f"{prefix}{sweep}_{name}": own for name, own in members_of(sweep, []).items()}
        for name, settings_of in members.items():
            chosen = join([*parts["train"], f"model.path={start}", *common], settings_of)
            train(name, chosen, needs)
            model = out / name / "export" / list(load_config(chosen).stages)[-1]
            evaluations.append(evaluate(name, model, recipe, own, manifest, [name]))
    where = tasks[0].settings
    command("tables", "eval.tables", ["--out", str(out), str(out / "eval")], where, evaluations)
    return tasks


def check(tasks: list[Task], out: Path, *, slurm: bool) -> None:
    """ValueError with everything that is wrong, before anything is submitted. Models and data that the graph makes
    itself are not looked for."""
    wrong, asked = [], set()
    check_folder(out)
    for task in tasks:
        try:
            config = task.config()
            if not task.module:
                check_same_run(config)
            options = sbatch_options(config, task.layout())
            if slurm and str(options) not in asked:
                asked.add(str(options))
                launch.try_submission(options)
        except ValueError as error:
            wrong.append(f"{task.name}: {error}")
    if wrong:
        raise ValueError("\n  ".join(["nothing was submitted:", *wrong]))


def show(board: Board, console: Console) -> None:
    """The graph: what every task needs, takes and runs, and where it stands."""
    states = board.states()
    for name, task in board.tasks.items():
        nodes, tasks = task.layout()
        command = [task.module, *task.arguments] if task.module else ["megatron_avatar.train", *task.settings]
        after = f", after {', '.join(task.needs)}" if task.needs else ""
        console.print(f"[bold]{name}[/]: {states[name] or 'to do'}, {nodes} x {tasks} processes{after}",
                      highlight=False, soft_wrap=True)  # fmt: skip
        console.print(f"    python -m {shlex.join(command)}", soft_wrap=True, highlight=False, markup=False)
    console.print(f"{len(states)} tasks, {sum(state == 'done' for state in states.values())} done")


def main(arguments: list[str]) -> int:
    console = Console()
    try:
        dry_run = "--dry-run" in arguments
        options, settings = split_options([a for a in arguments if a != "--dry-run"], OPTIONS)
        out = Path(options["output_dir"] or f"runs/{options['profile']}")
        profile, settings = read_profile(options["profile"], out, settings)
        if not any(item.startswith("cluster=") for item in settings):
            settings.append(f"cluster={profile['cluster']}")
        tasks = graph(profile, out, settings, int(options["retries"]))
        board = Board(out, tasks, local=not on_slurm(settings))
        if dry_run:
            show(board, console)
            return 0
        missing = [task for task, state in board.states().items() if state in ("", "failed")]
        if missing:
            check([board.tasks[name] for name in missing], out, slurm=not board.local)
            number = len(list((out / "snapshots").glob("*"))) if out.exists() else 0
            board.submit(snapshot(out / "snapshots" / str(number), None, arguments), int(options["concurrency"]),
                         chained=True)  # fmt: skip
            console.print(f"submitted {len(missing)} of {len(tasks)} tasks")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return watch(board, console) if options["watch"] == "true" else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
