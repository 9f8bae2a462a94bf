"""The paper as a graph of jobs: data, cold starts, trainings, evaluations, and the report with all tables and figures.

    python slurm/reproduce.py profile=smoke|tiny|fresh|paper [--dry-run[=full]] [key=value ...]

    profile=NAME       slurm/profiles/NAME.yaml; the paper's needs model_7b, model_3b, model_vl_7b, data, data_vl and
                       benchmarks: as NAME=PATH here, AVATAR_NAME in the environment, or in the site's cluster.paths
    cluster=NAME       where (config/cluster; cluster=local: processes on this machine)
    output_dir=FOLDER  of everything (runs/NAME)
    concurrency=2      tasks at the same time on this machine, or of one job array (there 256)
    retries=3          failed attempts of a task that are made good by another (or cluster.retries)
    only='*avatar*'    the tasks of these names (several: A|B), what they need, and the report
    watch=true         show the table until all is done; Ctrl-C leaves the jobs alone
    --dry-run          a page about it: jobs by kind, GPU hours, disk, what is missing; submit nothing
    --dry-run=full     every task with its command

The same command again submits only what is missing. Other settings go to every training and evaluation.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from megatron_avatar import first_words  # noqa: E402

if __name__ == "__main__" and not {"--help"} >= {*sys.argv[1:]}:  # before what takes long to read
    first_words.tell("reading every task's settings, and planning it: up to a minute ...")

from rich.console import Console  # noqa: E402

from megatron_avatar.config.checks import check_folder, check_same_run  # noqa: E402
from slurm import totals  # noqa: E402
from slurm.graph import Graph, link  # noqa: E402
from slurm.jobs import Board  # noqa: E402
from slurm.profile import read_profile  # noqa: E402
from slurm.snapshot import snapshot  # noqa: E402
from slurm.sweep import check, on_slurm, split_options  # noqa: E402
from slurm.table import watch  # noqa: E402
from slurm.tasks import Task  # noqa: E402

OPTIONS = {"profile": "", "output_dir": "", "concurrency": "", "retries": "", "only": "*", "watch": "true"}


def check_done(tasks: list[Task]) -> None:
    """ValueError where a training that is there already had other settings, or data and gate were another command's:
    their numbers would stand beside new ones."""
    for task in tasks:
        if not task.module:
            check_same_run(task.config())
        elif task.module != "eval.run" and not task.partial and task.done.exists():  # eval.run looks itself at its own
            said = task.done.read_text().strip()
            if said and said != task.command:
                raise ValueError(f"{task.done}: {task.name} was {said!r}, not {task.command!r}: choose another "
                                 "output_dir, or remove that folder to start anew")  # fmt: skip


def show(board: Board, console: Console) -> None:
    """The graph: what every task needs, takes and runs, and where it stands."""
    states = board.states()
    for name, task in board.tasks.items():
        nodes, tasks = task.layout()
        command = [task.module, *task.arguments] if task.module else ["megatron_avatar.train", *task.settings]
        needs = task.needs if len(task.needs) < 5 else [f"{len(task.needs)} others"]
        after = f", after {', '.join(needs)}" if needs else ""
        console.print(f"[bold]{name}[/]: {states[name] or 'to do'}, {nodes} x {tasks} processes{after}",
                      highlight=False, soft_wrap=True)  # fmt: skip
        console.print(f"    python -m {shlex.join(command)}", soft_wrap=True, highlight=False, markup=False)
    console.print(f"{len(states)} tasks, {sum(state == 'done' for state in states.values())} done")


def main(arguments: list[str]) -> int:
    if not arguments or "--help" in arguments:
        print(__doc__)
        return 0 if arguments else 2
    console = Console()
    try:
        dry_run = next((a for a in arguments if a.startswith("--dry-run")), "")
        if dry_run not in ("", "--dry-run", "--dry-run=full"):
            raise ValueError(f"{dry_run}: write --dry-run or --dry-run=full")
        options, settings = split_options([a for a in arguments if a != dry_run], OPTIONS)
        out = Path(options["output_dir"] or f"runs/{options['profile']}")
        profile, settings, lacking = read_profile(options["profile"], out, settings, outlined=bool(dry_run))
        if not any(item.startswith("cluster=") for item in settings):
            settings.append(f"cluster={profile['cluster']}")
        outlined = any(line.startswith("benchmarks") for line in lacking)
        graph = Graph(profile, out, settings, options["retries"], outlined=outlined).build()
        whole = list(graph.tasks)
        graph.keep(options["only"])
        board = Board(out, graph.tasks, local=not on_slurm(settings))
        if graph.absent:
            absent = ", ".join(sorted(graph.absent))
            console.print(f"not evaluated, as {profile['benchmarks']} doesn't hold them: {absent}")
        if dry_run:
            done = {name for name, state in board.states().items() if state == "done"}
            if dry_run == "--dry-run=full":
                show(board, console)
            else:
                site = next(item for item in settings if item.startswith("cluster="))
                console.print(f"profile={options['profile']} into {out}, {site}\n", highlight=False)
                totals.show(graph.tasks, done, out, lacking, console)
                console.print("\n--dry-run=full lists every task with its command")
            return 0
        missing = [task for task, state in board.states().items() if state in ("", "failed")]
        if missing:
            if board.tasks["report"].done.exists():  # it lacks what comes now
                board.tasks["report"].done.unlink()
                missing.append("report")
            check_folder(out)
            check([board.tasks[name] for name in missing], slurm=not board.local, made=str(out))
            check_done(whole)
            if warning := totals.check_disk(graph.tasks, board.tasks.keys() - missing, out):
                print(warning, file=sys.stderr)
            link(graph)
            number = len(list((out / "snapshots").glob("*"))) if out.exists() else 0
            concurrency = int(options["concurrency"] or (2 if board.local else 256))
            board.submit(snapshot(out / "snapshots" / str(number), None, arguments), concurrency)
            console.print(f"submitted {len(missing)} of {len(graph.tasks)} tasks")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    status = watch(board, console) if options["watch"] == "true" else 0
    if (out / "report.html").exists():
        console.print(f"report: {out / 'report.html'}", highlight=False)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
