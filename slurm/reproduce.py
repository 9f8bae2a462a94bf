"""The paper as a graph of jobs: data, cold starts, trainings, evaluations, and the report with all tables and figures.

    python slurm/reproduce.py profile=smoke|tiny|paper [--dry-run] [key=value ...]

    profile=NAME       slurm/profiles/NAME.yaml; the paper's needs folders: model_7b=FOLDER data_omni=FILE ...
    cluster=NAME       where (config/cluster; cluster=local: processes on this machine)
    output_dir=FOLDER  of everything (runs/NAME)
    concurrency=2      tasks at the same time on this machine, or of one job array (there 256)
    retries=3          failed attempts of a task that are made good by another
    only='*avatar*'    the tasks of these names (several: A|B), what they need, and the report
    watch=true         show the table until all is done; Ctrl-C leaves the jobs alone
    --dry-run          print the graph, its commands and what is done already; submit nothing

The same command again submits only what is missing. Other settings go to every training and evaluation.
"""

from __future__ import annotations

import fnmatch
import re
import shlex
import sys
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from omegaconf import OmegaConf  # noqa: E402
from rich.console import Console  # noqa: E402

from megatron_avatar.config import Config, load_config  # noqa: E402
from megatron_avatar.config.checks import check_folder, check_same_run  # noqa: E402
from slurm import launch  # noqa: E402
from slurm.jobs import Board, sbatch_options  # noqa: E402
from slurm.snapshot import snapshot  # noqa: E402
from slurm.sweep import join, members_of, on_slurm, split_options  # noqa: E402
from slurm.table import watch  # noqa: E402
from slurm.tasks import Task  # noqa: E402

PROFILES = Path(__file__).parent / "profiles"
OPTIONS = {"profile": "", "output_dir": "", "concurrency": "", "retries": "3", "only": "*", "watch": "true"}
ALIKE = ("name", "output_dir")  # settings in which two trainings of the same computation differ
ENGINE = ("data.", "rl.sampling.", "parallel", "cluster", "model.dtype")  # settings that evaluations take as well


def read_profile(name: str, out: Path, settings: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The profile with its {placeholders} filled in from `settings`, and the settings that are left.

    Entries of `models` whose placeholder (`{name?}`) isn't given are left out.
    """
    path = PROFILES / f"{name}.yaml"
    if not path.is_file():
        choices = ", ".join(sorted(p.stem for p in PROFILES.glob("*.yaml")))
        raise ValueError(f"profile={name}: choose one of {choices}")
    text = path.read_text()
    wanted = {*re.findall(r'"[^"\n]*{(\w+)}', text)} - {"out"}
    optional = {*re.findall(r'"[^"\n]*{(\w+)\?}', text)}
    given = {k: v for k, _, v in (item.partition("=") for item in settings) if k in wanted | optional}
    if missing := sorted(wanted - given.keys()):
        raise ValueError(f"profile={name} needs {' '.join(f'{key}=PATH' for key in missing)}: see {path}")
    for key, value in given.items():
        if not Path(value).exists():
            raise ValueError(f"{key}={value} doesn't exist")
    for key, value in {"out": str(out), **given}.items():
        text = text.replace("{" + key + "}", value).replace("{" + key + "?}", value)
    profile = OmegaConf.to_container(OmegaConf.create(text))
    for parts in profile["families"].values():
        parts["models"] = {name: folder for name, folder in parts.get("models", {}).items() if "?}" not in folder}
    return profile, [s for s in settings if s.partition("=")[0] not in given]


@dataclass
class Graph:
    """All tasks, each behind those that it needs. `links`: folder of a system that computes what another does -> that
    one's; `absent`: benchmarks whose data aren't there."""

    profile: dict[str, Any]
    out: Path
    settings: list[str]
    retries: int
    tasks: list[Task] = field(default_factory=list)
    links: dict[Path, Path] = field(default_factory=dict)
    absent: set[str] = field(default_factory=set)

    def build(self) -> Graph:
        prepared = self._prepare()
        seeds, families = self.profile["seeds"], self.profile["families"].items()
        families = [_Family(self, name, parts, seed, prepared) for name, parts in families for seed in seeds]
        for one in families:
            one.build_main()
        for one in families:
            one.build_sweeps()
        evaluations = [task.name for task in self.tasks if task.module == "eval.run"]
        self.command("report", "eval.reproduction", [str(self.out)], self.tasks[0].settings, evaluations, partial=True)
        return self

    def keep(self, patterns: str) -> None:
        """Only the tasks that the patterns name, what these need, and the report over what there will be."""
        by_name = {task.name: task for task in self.tasks}
        wanted = [name for name in by_name if any(fnmatch.fnmatch(name, p) for p in patterns.split("|"))]
        if not wanted:
            raise ValueError(f"only={patterns}: names no task; --dry-run without it shows them all")
        kept: set[str] = set()
        while wanted:
            name = wanted.pop()
            if name not in kept and name != "report":
                kept.add(name)
                wanted += by_name[name].needs
        report = by_name["report"]
        report.needs = [name for name in report.needs if name in kept]
        self.tasks = [task for task in self.tasks if task.name in kept or task is report]

    def add(self, task: Task) -> str:
        task.retries = self.retries
        self.tasks.append(task)
        return task.name

    def command(self, name: str, module: str, arguments: list[str], where: list[str], needs: list[str], *,
                parallel: bool = False, partial: bool = False) -> str:  # fmt: skip
        done = self.out / "tasks" / f"{name}.done"
        return self.add(Task(name, self.out / "tasks", where, done, module, parallel, arguments, needs, partial))

    def _prepare(self) -> dict[str, str]:
        """What data each benchmark's evaluations wait for: benchmark ("": the trainings' own data) -> task."""
        first = next(iter(self.profile["families"].values()))
        where = [*first["train"], f"model.path={first['base']}", f"data.manifest={first['manifest']}",
                 f"output_dir={self.out}", *first.get("settings", []), *self.settings]  # fmt: skip
        made = self.profile.get("prepare")
        tasks = {"": self.command("prepare", made["module"], made["arguments"], where, [])} if made else {}
        asked = {what.split("-")[0] for parts in self.profile["families"].values()
                 for benchmarks in parts["evaluate"].values() for what in benchmarks} - {"held_out"}  # fmt: skip
        for name in sorted(asked):
            data = Path(self.profile["benchmarks"]) / name
            if not data.exists():
                self.absent.add(name)
                continue
            arguments = [f"benchmark={name}", f"data={data}", f"prepared={self.out / 'benchmarks' / name}"]
            tasks[name] = self.command(f"prepare.{name}", "eval.prepare", arguments, where, [])
        return tasks


@dataclass
class _Family:
    """One family's systems on one seed."""

    graph: Graph
    name: str
    parts: dict[str, Any]
    seed: int
    prepared: dict[str, str]
    trained: dict[str, str] = field(default_factory=dict)  # what is computed -> system

    def build_main(self) -> None:
        """The base, models that are evaluated only, the cold start, and the main systems."""
        base, own = self.parts["base"], self._made()
        self.evaluate("base", base, own)
        for system, folder in self.parts["models"].items():
            if self.seed == self.graph.profile["seeds"][0]:
                self.evaluate(system, folder, own)
        if "sft" in self.parts:
            task = self.train("sft", self._cold_start(), own)
            self.evaluate("sft", self._start(), [task])
        self._systems(self.parts["systems"])

    def build_sweeps(self) -> None:
        """The members of the sweeps, on the seeds that they have."""
        sweeps = self.parts.get("sweeps", {})
        if self.seed in sweeps.get("seeds", [self.seed]):
            members = {f"{sweep}_{member}": settings for sweep in sweeps.get("names", [])
                       for member, settings in members_of(sweep, []).items()}  # fmt: skip
            members |= sweeps.get("systems", {})
            self._systems({name: [*sweeps.get("settings", []), *settings] for name, settings in members.items()})

    def _systems(self, systems: dict[str, list[str]]) -> None:
        needs = [f"{self.name}.sft.{self.seed}"] if "sft" in self.parts else self._made()
        for system, settings in systems.items():
            chosen = join([*self.parts["train"], f"model.path={self._start()}", *self._common()], settings)
            if not self.is_twin(system, chosen):
                task = self.train(system, chosen, needs)
                self.evaluate(system, str(self.model(system, chosen)), [task])
                for step, model in self._milestones(system, chosen).items():
                    self.evaluate(system, str(model), [task], step)

    def _made(self) -> list[str]:
        return [self.prepared[""]] if "" in self.prepared else []

    def _common(self) -> list[str]:
        manifest = f"data.manifest={self.parts['manifest']}"
        return [*self.parts.get("settings", []), manifest, f"seed={self.seed}", *self.graph.settings]

    def _cold_start(self) -> list[str]:
        return [*self.parts["sft"], f"model.path={self.parts['base']}", *self._common()]

    def _start(self) -> str:
        """The folder from which reinforcement learning starts."""
        return str(self.model("sft", self._cold_start())) if "sft" in self.parts else self.parts["base"]

    def folder(self, kind: str, system: str) -> Path:
        return self.graph.out / kind / self.name / system / f"seed_{self.seed}"

    def is_twin(self, system: str, settings: list[str]) -> bool:
        """Whether another system computes the same; then this one's folders are links to its."""
        computed = str({k: v for k, v in asdict(_config(*settings)).items() if k not in ALIKE})
        other = self.trained.setdefault(computed, system)
        if other != system:
            for kind in ("runs", "predictions"):
                self.graph.links[self.folder(kind, system)] = self.folder(kind, other)
        return other != system

    def train(self, system: str, settings: list[str], needs: list[str]) -> str:
        run = self.folder("runs", system)
        name = f"{self.name}.{system}.{self.seed}"
        return self.graph.add(Task(name, run, [*settings, f"output_dir={run}"], run / "done.json", needs=needs))

    def model(self, system: str, settings: list[str]) -> Path:
        return self.folder("runs", system) / "export" / list(_config(*settings).stages)[-1]

    def _milestones(self, system: str, settings: list[str]) -> dict[int, Path]:
        """Update -> what is evaluated of it: the run, which keeps that checkpoint, or (`stages`) a stage's export."""
        wanted, run = self.parts.get("milestones", {}).get(system, []), self.folder("runs", system)
        if wanted != "stages":
            return dict.fromkeys(wanted, run)
        stages = _config(*settings).stages
        ends = accumulate(stage.steps for stage in stages.values())
        return {end: run / "export" / name for end, name in zip(ends, list(stages)[:-1], strict=False)}

    def evaluate(self, system: str, model: str, needs: list[str], step: int = 0) -> None:
        wanted = [what for pattern, benchmarks in self.parts["evaluate"].items()
                  if any(fnmatch.fnmatch(f"{system}@step" if step else system, p) for p in pattern.split("|"))
                  for what in benchmarks]  # fmt: skip
        for what in dict.fromkeys(wanted):
            benchmark, *controls = what.split("-")
            if benchmark in self.graph.absent:
                continue
            published = Path(self.graph.profile["benchmarks"]) / benchmark
            data = self.parts["manifest"] if benchmark == "held_out" else published
            given = [*self.parts["train"], *self.parts.get("settings", []), *self.graph.settings]
            layout = [s for s in given if s.startswith(ENGINE)]
            of_run = Path(model) == self.folder("runs", system)  # which has configuration groups of its own
            own = [s for s in layout if "." in s.partition("=")[0]] if of_run else layout
            control = [item for name in controls for item in _control(name)]
            (recipe,) = (s for s in given if s.startswith("recipe="))
            out = self.folder("predictions", system) / (f"step_{step}" if step else "")
            arguments = [f"model={model}", f"benchmark={benchmark}", f"data={data}", f"out={out}", f"system={system}",
                         f"family={self.name}", f"seed={self.seed}", *control, *own]  # fmt: skip
            if benchmark != "held_out":
                arguments.append(f"prepared={self.graph.out / 'benchmarks' / benchmark}")
            arguments.append(f"step={step}" if of_run else recipe)
            where = [recipe, f"model.path={self.parts['base']}", f"data.manifest={self.parts['manifest']}",
                     f"output_dir={self.graph.out}", *layout]  # fmt: skip
            name = ".".join(["eval", self.name, system, str(self.seed), *([f"step_{step}"] if step else []), what])
            behind = [*needs, *([self.prepared[benchmark]] if benchmark in self.prepared else [])]
            self.graph.command(name, "eval.run", arguments, where, behind, parallel=True)


@cache
def _config(*settings: str) -> Config:
    """Composing takes a tenth of a second, and a graph asks for the same hundreds of times."""
    return load_config(list(settings))


def _control(text: str) -> list[str]:
    """`mute`, `blind`, or `g8` (eight drawn completions an item) as eval.run's settings."""
    return [f"control={text}"] if text in ("mute", "blind") else [f"n={int(text[1:])}", "temperature=1"]


def link(graph: Graph) -> None:
    """Make the twins' folders links, where nothing is yet."""
    for path, target in graph.links.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_symlink() and not path.exists():
            path.symlink_to(Path("..") / target.parent.name / target.name)


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


def check_done(tasks: list[Task]) -> None:
    """ValueError where a training that is there already had other settings: its numbers would stand beside new ones."""
    for task in tasks:
        if not task.module:
            check_same_run(task.config())


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
        dry_run = "--dry-run" in arguments
        options, settings = split_options([a for a in arguments if a != "--dry-run"], OPTIONS)
        out = Path(options["output_dir"] or f"runs/{options['profile']}")
        profile, settings = read_profile(options["profile"], out, settings)
        if not any(item.startswith("cluster=") for item in settings):
            settings.append(f"cluster={profile['cluster']}")
        graph = Graph(profile, out, settings, int(options["retries"])).build()
        graph.keep(options["only"])
        board = Board(out, graph.tasks, local=not on_slurm(settings))
        if graph.absent:
            absent = ", ".join(sorted(graph.absent))
            console.print(f"not evaluated, as {profile['benchmarks']} doesn't hold them: {absent}")
        if dry_run:
            show(board, console)
            return 0
        missing = [task for task, state in board.states().items() if state in ("", "failed")]
        if missing:
            check([board.tasks[name] for name in missing], out, slurm=not board.local)
            check_done([task for name, task in board.tasks.items() if name not in missing])
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
