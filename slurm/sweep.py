"""A sweep as one job array of trainings, each of which resumes and retries by itself.

    python slurm/sweep.py sweep=tas_lambda recipe=avatar_7b model.path=FOLDER data.manifest=FILE [key=value ...]
    python slurm/sweep.py recipe=avatar_7b rl.shaping.lam=0.1,0.3 seed=0,1 ...        (any Hydra sweep)

    cluster=NAME       where (config/cluster; cluster=local: processes on this machine)
    output_dir=FOLDER  of the whole sweep (runs/sweeps/NAME), with a run in it for each member
    concurrency=4      members that run at the same time
    retries=3          failed attempts of a member that are made good by another (or cluster.retries)
    watch=true         show the table until all is done; Ctrl-C leaves the jobs alone

The same command again shows where it stands, and submits again what has failed. Named sweeps: slurm/sweeps.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from megatron_avatar import first_words  # noqa: E402

if __name__ == "__main__" and not {"--help"} >= {*sys.argv[1:]}:  # before what takes long to read
    first_words.tell("reading every member's settings ...")

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper  # noqa: E402
from hydra.core.override_parser.overrides_parser import OverridesParser  # noqa: E402
from hydra.errors import HydraException  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402
from rich.console import Console  # noqa: E402

from megatron_avatar.config.load import readable  # noqa: E402
from megatron_avatar.config.paths import home  # noqa: E402
from slurm import launch  # noqa: E402
from slurm.jobs import Board  # noqa: E402
from slurm.request import Request, first_accepted  # noqa: E402
from slurm.snapshot import snapshot  # noqa: E402
from slurm.table import watch  # noqa: E402
from slurm.tasks import Task  # noqa: E402

SWEEPS = Path(__file__).parent / "sweeps"
OPTIONS = {"concurrency": "4", "retries": "", "watch": "true"}


def split_options(arguments: list[str], known: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """The command's own key=value options (with `known`'s defaults), and the settings for the trainer; ValueError for
    what can't be either."""
    options, settings = dict(known), []
    for item in map(home, arguments):
        key, _, value = item.partition("=")
        if key.lstrip("+") == "dry_run" or item.startswith("--dry-run"):
            raise ValueError(f"{item}: that plans one training (python -m megatron_avatar.train ... dry_run=true); "
                             "slurm/reproduce.py has --dry-run")  # fmt: skip
        if key in known:
            options[key] = value
        else:
            settings.append(item)
    for key in ("concurrency", "retries"):
        if not (options.get(key) or "1").isdecimal() or (key == "concurrency" and options[key] == "0"):
            raise ValueError(f"{key}={options[key]}: write a whole number, {'at least 1' if key[0] == 'c' else 'or 0'}")
    if options.get("watch", "true") not in ("true", "false"):
        raise ValueError(f"watch={options['watch']}: write true or false")
    site = os.environ.get("AVATAR_CLUSTER")  # said now: the jobs' own environment may be another
    if site and not any(item.startswith("cluster=") for item in settings):
        settings.append(f"cluster={site}")
    return options, settings


def members_of(sweep: str, settings: list[str]) -> dict[str, list[str]]:
    """Member name -> its settings, of a named sweep or of Hydra's comma-separated values; ValueError for none."""
    if not sweep:
        return hydra_members(settings)
    path = SWEEPS / f"{sweep}.yaml"
    if not path.is_file():
        raise ValueError(f"sweep={sweep}: choose one of {', '.join(sorted(p.stem for p in SWEEPS.glob('*.yaml')))}")
    members = OmegaConf.to_container(OmegaConf.load(path))["members"]
    wanted = sorted({name for own in members.values() for item in own for name in re.findall(r"{(\w+)}", item)})
    given = dict(item.split("=", 1) for item in settings if item.partition("=")[0] in wanted)
    if missing := [name for name in wanted if name not in given]:
        raise ValueError(f"sweep={sweep} needs {' '.join(f'{name}=FOLDER' for name in missing)}")
    rest = [item for item in settings if item.partition("=")[0] not in wanted]
    return {name: join(rest, [item.format(**given) for item in own]) for name, own in members.items()}


def join(settings: list[str], own: list[str]) -> list[str]:
    """The user's settings, then the member's; of a stage or reward that the member leaves out nothing is set."""
    gone = tuple(f"{item[1:]}{end}" for item in own if item.startswith("~") for end in (".", "="))
    return [item for item in settings if not item.lstrip("+").startswith(gone or ("~~",))] + own


def hydra_members(settings: list[str]) -> dict[str, list[str]]:
    """Every combination of values, as Hydra's own sweeper makes them; members are named by what differs."""
    try:
        parsed = OverridesParser.create().parse_overrides([readable(item) for item in settings])
        (combinations,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    except HydraException as error:
        raise ValueError(str(error)) from None
    swept = [o.key_or_group for o in parsed if o.is_sweep_override()]
    if not swept:
        raise ValueError("nothing to sweep: write sweep=NAME, or several values, as rl.shaping.lam=0.1,0.3")
    members = {}
    for own in combinations:
        values = dict(item.lstrip("+").split("=", 1) for item in own if "=" in item)
        short = "-".join(f"{key.rpartition('.')[2]}_{values[key]}" for key in swept)
        name = re.sub(r"[^\w.-]+", "_", short)
        if name in members:
            raise ValueError(f"two members would be named {name}: sweep over fewer values, or values of simpler names")
        members[name] = list(own)
    return members


def tasks_of(members: dict[str, list[str]], folder: Path, retries: str = "") -> list[Task]:
    """A training for each member, its settings checked; ValueError lists what is wrong with all of them."""
    tasks = []
    for name, settings in members.items():
        run = folder / name
        tasks.append(Task(name, run, [*settings, f"output_dir={run}"], run / "done.json"))
    check(tasks, slurm=all(on_slurm(settings) for settings in members.values()))
    for task in tasks:
        task.retries = int(retries or task.config().cluster.retries)
    return tasks


def check(tasks: list[Task], *, slurm: bool, made: str = "") -> None:
    """ValueError with everything that is wrong, before anything is submitted: the same for all said once.

    What lies below `made` is not looked for, as earlier tasks make it. Also finds what Slurm takes for each.
    """
    wrong: dict[str, list[str]] = {}
    taken: dict[tuple[Request, ...], Request] = {}
    for task in tasks:
        try:
            if not task.module:
                nodes, per_node = task.layout()
                launch.check(task.config(), nodes=nodes, tasks_per_node=per_node, made=made)
            if slurm:
                requests = tuple(task.requests())
                if requests not in taken:
                    taken[requests] = first_accepted(list(requests), otherwise="write cluster=local")
                task.asked = taken[requests]
        except ValueError as error:
            wrong.setdefault(str(error), []).append(task.name)
    if wrong:
        lines = [f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}: {reason}"
                 for reason, names in wrong.items()]  # fmt: skip
        raise ValueError("\n  ".join(["nothing was submitted:", *lines]))


def on_slurm(settings: list[str]) -> bool:
    return "cluster=local" not in settings


def main(arguments: list[str]) -> int:
    if not arguments or "--help" in arguments:
        print(__doc__)
        return 0 if arguments else 2
    console = Console()
    try:
        options, settings = split_options(arguments, {"sweep": "", "output_dir": "", **OPTIONS})
        name = options["sweep"] or "sweep"
        folder = Path(options["output_dir"] or f"runs/sweeps/{name}")
        tasks = tasks_of(members_of(options["sweep"], settings), folder, options["retries"])
        board = Board(folder, tasks, local=not on_slurm(settings))
        number = len(list((folder / "snapshots").glob("*"))) if folder.exists() else 0
        missing = [task for task, state in board.states().items() if state in ("", "failed")]
        if missing:
            code = snapshot(folder / "snapshots" / str(number), None, arguments)
            board.submit(code, int(options["concurrency"]))
            console.print(f"submitted {', '.join(missing)}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    status = watch(board, console) if options["watch"] == "true" else 0
    told = "the runs, each with its export/, are" if status == 0 and options["watch"] == "true" else "the runs appear"
    console.print(f"{told} in {folder}; the same command shows the table", highlight=False)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
