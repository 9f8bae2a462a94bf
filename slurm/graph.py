"""The graph of a reproduction: preparations, cold starts, trainings, evaluations and the report, as tasks behind each
other, from a profile."""

from __future__ import annotations

import fnmatch
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from eval.asking.benchmark import load_benchmark
from eval.request import CONTROLS
from megatron_avatar.planning import outline
from slurm.sweep import join, members_of
from slurm.tasks import Task, composed

ALIKE = ("name", "output_dir", "checkpoint")  # settings in which two trainings of the same computation differ
ENGINE = ("data.", "rl.sampling.", "parallel", "cluster", "model.dtype")  # settings that evaluations take as well
HELD_OUT = 500  # items of a manifest's held-out part, of which nobody knows more before it is there
REPORT_HOURS, REPORT_GIB = 0.25, 8


@dataclass
class Graph:
    """All tasks, each behind those that it needs. `links`: folder of a system that computes what another does -> that
    one's; `absent`: benchmarks whose data aren't there; `outlined`: they need not be."""

    profile: dict[str, Any]
    out: Path
    settings: list[str]
    retries: str = ""  # a number; empty: the site's
    tasks: list[Task] = field(default_factory=list)
    links: dict[Path, Path] = field(default_factory=dict)
    absent: set[str] = field(default_factory=set)
    outlined: bool = False

    def build(self) -> Graph:
        prepared = self._prepare()
        seeds, families = self.profile["seeds"], self.profile["families"].items()
        families = [_Family(self, name, parts, seed, prepared) for name, parts in families for seed in seeds]
        for one in families:
            one.build_main()
        for one in families:
            one.build_sweeps()
        evaluations = [task.name for task in self.tasks if task.module == "eval.run"]
        self.command("report", "eval.reproduction", [str(self.out)], self.tasks[0].settings, evaluations, partial=True,
                     hours=REPORT_HOURS, gib=REPORT_GIB)  # fmt: skip
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
        report.needs = [name for name in report.needs if name in kept] or [t.name for t in self.tasks if t.name in kept]
        self.tasks = [task for task in self.tasks if task.name in kept or task is report]

    def add(self, task: Task, *, once: bool = False) -> str:
        task.retries = 0 if once else int(self.retries or task.config().cluster.retries)
        self.tasks.append(task)
        return task.name

    def command(self, name: str, module: str, arguments: list[str], where: list[str], needs: list[str], *,
                parallel: bool = False, partial: bool = False, hours: float = 0, gib: float = 0,
                once: bool = False) -> str:  # fmt: skip
        done = self.out / "tasks" / f"{name}.done"
        return self.add(Task(name, self.out / "tasks", where, done, module, parallel, arguments, needs, partial,
                             hours=hours, memory=gib * outline.GIB), once=once)  # fmt: skip

    def _prepare(self) -> dict[str, str]:
        """What data each benchmark's evaluations wait for: benchmark ("": the trainings' own data) -> task. `gate` is
        asked once, before anything is trained or evaluated: what it refuses, another attempt doesn't change."""
        first = next(iter(self.profile["families"].values()))
        where = [*first["train"], f"model.path={first['base']}", f"data.manifest={first['manifest']}",
                 f"output_dir={self.out}", *first.get("settings", []), *self.settings]  # fmt: skip
        made = self.profile.get("prepare")
        cores = composed(*where).cluster.cpus_per_task
        gib = outline.preparation_memory(cores) / outline.GIB
        tasks = {"": self.command("prepare", made["module"], made["arguments"], where, [], gib=gib)} if made else {}
        if gate := self.profile.get("gate"):
            tasks[""] = self.command("gate", gate["module"], gate["arguments"], where, list(tasks.values()), once=True)
        asked = {what.split("-")[0] for parts in self.profile["families"].values()
                 for benchmarks in parts["evaluate"].values() for what in benchmarks} - {"held_out"}  # fmt: skip
        for name in sorted(asked):
            data = Path(self.profile["benchmarks"]) / name
            if not data.exists() and not self.outlined:
                self.absent.add(name)
                continue
            hours = outline.preparation_hours(load_benchmark(name).source.items, cores)
            arguments = [f"benchmark={name}", f"data={data}", f"prepared={self.out / 'benchmarks' / name}"]
            tasks[name] = self.command(f"prepare.{name}", "eval.prepare", arguments, where, [], hours=hours, gib=gib)
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
        """The base, models that are evaluated only, the cold start, and the main systems. `one_sft`: the first seed's
        cold start is that of all."""
        own, start = self._made(), self._of_start()
        if start.seed == self.seed:
            self.evaluate("base", self.parts["base"], own)
            if "sft" in self.parts:
                task = self.train("sft", self._cold_start(), own)
                self.evaluate("sft", self._start(), [task])
        else:
            for kind, system in (("predictions", "base"), ("predictions", "sft"), ("runs", "sft")):
                self.graph.links[self.folder(kind, system)] = start.folder(kind, system)
        for system, folder in self.parts["models"].items():
            if self.seed == self.graph.profile["seeds"][0]:
                self.evaluate(system, folder, own)
        self._systems(self.parts["systems"])

    def _of_start(self) -> _Family:
        """This family on the seed of its cold start."""
        return replace(self, seed=self.graph.profile["seeds"][0] if self.parts.get("one_sft") else self.seed)

    def build_sweeps(self) -> None:
        """Groups of sweeps and systems, each on the seeds that it has."""
        for group in self.parts.get("sweeps", []):
            if self.seed in group.get("seeds", [self.seed]):
                members = {f"{sweep}_{member}": settings for sweep in group.get("names", [])
                           for member, settings in members_of(sweep, []).items()}  # fmt: skip
                members |= group.get("systems", {})
                self._systems({name: [*group.get("settings", []), *settings] for name, settings in members.items()})

    def _systems(self, systems: dict[str, list[str]]) -> None:
        for system, settings in systems.items():
            own = any(item.startswith("model.path=") for item in settings)  # a model that no cold start makes
            needs = [f"{self.name}.sft.{self._of_start().seed}"] if "sft" in self.parts and not own else self._made()
            begin = [] if own else [f"model.path={self._start()}"]
            chosen = join([*self.parts["train"], *begin, *self._common()], settings)
            if not self.is_twin(system, chosen):
                milestones = self._milestones(system, chosen)
                kept = [step for step, model in milestones.items() if model == self.folder("runs", system)]
                task = self.train(system, [*chosen, f"checkpoint.milestones=[{','.join(map(str, kept))}]"], needs)
                self.evaluate(system, str(self.model(system, chosen)), [task])
                for step, model in milestones.items():
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
        start = self._of_start()
        return str(start.model("sft", start._cold_start())) if "sft" in self.parts else self.parts["base"]

    def folder(self, kind: str, system: str) -> Path:
        return self.graph.out / kind / self.name / system / f"seed_{self.seed}"

    def is_twin(self, system: str, settings: list[str]) -> bool:
        """Whether another system computes the same; then this one's folders are links to its."""
        computed = str({k: v for k, v in asdict(composed(*settings)).items() if k not in ALIKE})
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
        return self.folder("runs", system) / "export" / list(composed(*settings).stages)[-1]

    def _milestones(self, system: str, settings: list[str]) -> dict[int, Path]:
        """Update -> what is evaluated of it: the run, which keeps that update's weights, or (`stages`) a stage's
        export. `recipe`: the milestones that the recipe has."""
        wanted, run = self.parts.get("milestones", {}).get(system, []), self.folder("runs", system)
        if wanted == "recipe":
            wanted = composed(*settings).checkpoint.milestones
        if wanted != "stages":
            return dict.fromkeys(wanted, run)
        stages = composed(*settings).stages
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
            arguments += [f"batch={self.parts['batch']}"] if "batch" in self.parts else []
            if benchmark != "held_out":
                arguments.append(f"prepared={self.graph.out / 'benchmarks' / benchmark}")
            arguments.append(f"step={step}" if of_run else recipe)
            where = [recipe, f"model.path={self.parts['base']}", f"data.manifest={self.parts['manifest']}",
                     f"output_dir={self.graph.out}", *layout]  # fmt: skip
            name = ".".join(["eval", self.name, system, str(self.seed), *([f"step_{step}"] if step else []), what])
            behind = [*needs, *([self.prepared[benchmark]] if benchmark in self.prepared else [])]
            drawn = next((int(c[1:]) for c in controls if c not in CONTROLS), 1)
            self.graph.command(name, "eval.run", arguments, where, behind, parallel=True,
                               hours=answering_hours(benchmark, tuple(where), drawn),
                               gib=answering_gib(tuple(where)))  # fmt: skip


@cache
def answering_hours(benchmark: str, where: tuple[str, ...], completions: int) -> float:
    """Planned hours of asking a benchmark, under the frames and lengths of its protocol."""
    config, about = composed(*where), load_benchmark(benchmark)
    protocol = about.protocols["ours"]
    length = replace(config.rl.sampling, max_new_tokens=protocol.new_tokens or config.rl.sampling.max_new_tokens)
    config = replace(config, data=replace(config.data, **protocol.data), rl=replace(config.rl, sampling=length),
                     model=replace(config.model, context=protocol.context or config.model.context))  # fmt: skip
    return outline.evaluation_hours(config, outline.layout(config), about.source.items or HELD_OUT, completions)


@cache
def answering_gib(where: tuple[str, ...]) -> float:
    config = composed(*where)
    return outline.evaluation_memory(config, outline.layout(config)) / outline.GIB


def _control(text: str) -> list[str]:
    """`mute`, `blind`, `trained`, or `g8` (eight drawn completions an item) as eval.run's settings."""
    return [f"control={text}"] if text in CONTROLS else [f"n={int(text[1:])}", "temperature=1"]


def link(graph: Graph) -> None:
    """Make the twins' folders links, where nothing is yet. ValueError where a training's or predictions' own folder is
    in the place: it belongs to another study."""
    for path in graph.links:
        if path.exists() and not path.is_symlink():
            raise ValueError(f"{path} isn't of this study, which links there: take another output_dir, or remove it")
    for path, target in graph.links.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_symlink():
            path.symlink_to(Path("..") / target.parent.name / target.name)
