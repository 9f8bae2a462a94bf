"""What slurm/eval.sh asks: how an array over benchmarks is submitted, and what one of its tasks runs.

    python slurm/eval_array.py submit SCRIPT [sbatch's options] [key=value ...]     check, say, submit
    python slurm/eval_array.py task [key=value ...]                                 shell text for one task
    python slurm/eval_array.py end STATUS                                           behind its last process
"""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from eval.asking.benchmark import load_benchmark, names  # noqa: E402
from eval.request import Request, parse  # noqa: E402
from megatron_avatar.config import Config  # noqa: E402
from megatron_avatar.config.paths import given, home, variable  # noqa: E402
from megatron_avatar.config.world import torchrun  # noqa: E402
from megatron_avatar.planning import outline  # noqa: E402
from megatron_avatar.resilience import ended, queue  # noqa: E402
from slurm import container, launch, request  # noqa: E402
from slurm.profile import site_paths  # noqa: E402
from slurm.submit import split, submitted  # noqa: E402

OUT = "runs/eval"


@dataclass(frozen=True)
class Evaluation:
    """One task: eval.run's words, what they ask for, and the engine's configuration."""

    words: list[str]
    request: Request
    config: Config


def evaluations(settings: list[str]) -> list[Evaluation]:
    """A task for each benchmark, in an order that stays. ValueError with what is missing."""
    settings = [home(item) for item in settings]
    own = dict(item.partition("=")[::2] for item in settings if item.partition("=")[0] in ("data", "benchmarks"))
    rest = [item for item in settings if item.partition("=")[0] not in own]
    folder = Path(own.get("data") or given("benchmarks", site_paths(rest)))
    if not own.get("data") and folder == Path():
        raise ValueError(f"data is missing: write data=FOLDER, or export {variable('benchmarks')}=FOLDER, with one "
                         "folder a benchmark: python -m eval.run --benchmarks says what fetches them")  # fmt: skip
    if not folder.is_dir():
        raise ValueError(f"data={folder} is no folder; python -m eval.run --benchmarks says what fetches it")
    named = [name for name in own.get("benchmarks", "").split(",") if name]
    there = [name for name in names() if (folder / name).is_dir()]
    for name in named:
        load_benchmark(name)
    if lacking := [name for name in named if name not in there]:
        raise ValueError(f"data={folder} has no folder {', '.join(lacking)}: python -m eval.run --benchmarks "
                         f"{' '.join(lacking)} says what fetches them")  # fmt: skip
    if not there:
        raise ValueError(f"data={folder} has none of the benchmarks' folders ({', '.join(names()[:3])} ...)")
    keys = {item.partition("=")[0] for item in rest}
    more = [] if of_run(rest) or "recipe" in keys else ["recipe=avatar_7b"]
    more += [] if "out" in keys else [f"out={OUT}"]
    found = []
    for name in named or there:
        words = [f"benchmark={name}", f"data={folder / name}", *rest, *more]
        found.append(Evaluation(words, *parse(words)[:2]))
    return found


def of_run(settings: list[str]) -> bool:
    """Whether the model is a run, whose recipe and site are its own."""
    model = next((home(s).partition("=")[2] for s in reversed(settings) if s.startswith("model=")), "")
    return Path(model, "config.yaml").is_file()


def asked(tasks: list[Evaluation], nodes: int, per_node: int) -> request.Request:
    """What each task of the array asks for: the longest one's time."""
    config = tasks[0].config
    where = outline.of(config, nodes, per_node)
    hours = max(outline.evaluation_hours(t.config, where, load_benchmark(t.request.benchmark).source.items or 1000,
                                         t.request.n) for t in tasks)  # fmt: skip
    return request.make(config, nodes, per_node, hours, outline.evaluation_memory(config, where),
                        margin=request.COMMAND_MARGIN)  # fmt: skip


def submit(script: Path, arguments: list[str]) -> int:
    words = split(arguments)
    if trained := words.own - {"--check"}:
        raise ValueError(f"{', '.join(sorted(trained))}: of a training (bash slurm/avatar_7b.sh), not of an evaluation")
    sent = with_names(words.settings, evaluations(words.settings))
    tasks = evaluations(sent)  # as the tasks will read them
    config = tasks[0].config
    replica = config.parallel.tp * config.parallel.pp
    spread = outline.layout(replace_gpus(config, config.cluster.gpus or replica))
    nodes = words.number("nodes", spread.gpus // spread.per_node)
    per_node = words.number("ntasks-per-node", spread.per_node)
    if nodes * per_node % replica:
        raise ValueError(f"{nodes} x {per_node} processes don't divide into parallel.tp={config.parallel.tp} x "
                         f"parallel.pp={config.parallel.pp}: take a multiple of {replica}")  # fmt: skip
    container.check(config)
    one = asked(tasks, nodes, per_node)
    array = [] if any(o.startswith("--array") for o in words.options) else [f"--array=0-{len(tasks) - 1}"]
    signal = [] if os.environ.get("SBATCH_SIGNAL") else [f"--signal=USR1@{config.cluster.signal_s}"]
    one = request.without(one, words.options)
    line = [*one.line(), *signal, *array, *words.options]
    here = torchrun(replica, "eval.run", tasks[0].words)
    request.first_accepted([one], lambda _: line, otherwise=f"without Slurm ask one after the other here: {here}")
    limit = "" if one.minutes is None else f", {one.minutes // 60}:{one.minutes % 60:02} h at most"
    benchmarks = ", ".join(task.request.benchmark for task in tasks)
    print(f"{len(tasks)} benchmarks: {benchmarks}\n  each on {nodes} x {per_node} processes{limit}, into "
          f"{tasks[0].request.out}")  # fmt: skip
    if "--check" in words.own:
        return 0
    job = submitted([*line, str(script), *sent])
    print(f"job {job}: tasks 0 to {len(tasks) - 1}; logs: slurm-avatar-eval-{job}_N.out")
    return 0


def with_names(settings: list[str], tasks: list[Evaluation]) -> list[str]:
    """The settings with the benchmarks and their folder named: what is there may change until the tasks start. So may
    the site, which a run has of its own."""
    rest = [s for s in settings if s.partition("=")[0] not in ("benchmarks", "data")]
    site = os.environ.get("AVATAR_CLUSTER", "")
    named = not site or of_run(rest) or any(s.startswith("cluster=") for s in rest)
    folder, names = Path(tasks[0].request.data).parent, ",".join(t.request.benchmark for t in tasks)
    return [f"data={folder}", f"benchmarks={names}", *rest, *([] if named else [f"cluster={site}"])]


def replace_gpus(config: Config, gpus: int) -> Config:
    return replace(config, cluster=replace(config.cluster, gpus=gpus))


def task(arguments: list[str]) -> str:
    """Shell text: the words of this task's eval.run, and how it starts."""
    tasks, number = evaluations(arguments), int(os.environ["SLURM_ARRAY_TASK_ID"])
    if number >= len(tasks):
        raise ValueError(f"the array has a task {number}, and there are {len(tasks)} benchmarks: write "
                         f"--array=0-{len(tasks) - 1}")  # fmt: skip
    one, config = tasks[number], tasks[number].config
    config.data.manifest = one.request.data + "/records"
    config.model.path = config.model.path or one.request.model
    out = Path(one.request.out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    if not any(out.is_relative_to(seen) for seen in (Path.cwd(), Path(config.output_dir).absolute())):
        config.cluster.mounts = [*config.cluster.mounts, f"{out}:{out}"]  # a container has to see it
    prefix = str(out / f".ended-{queue.own_job()}")  # the tasks' words: srun loses their statuses
    ended.forget(prefix)
    lines = [f"module load {shlex.join(config.cluster.modules)}"] if config.cluster.modules else []
    lines += [f"export {name}={shlex.quote(value)}" for name, value in launch.environment(config, ROOT).items()]
    lines += [f"words=({shlex.join(one.words)})", f"command=({shlex.join(launch.command(config, ROOT))})",
              f"srun_options=({shlex.join(launch.srun_options(config, ROOT))})",
              f"master={shlex.quote(config.cluster.master)}", f"export AVATAR_ENDED={shlex.quote(prefix)}",
              f"export SLURM_NTASKS_PER_NODE={queue.tasks_per_node()}"]  # fmt: skip
    return "\n".join(lines)


def end(status: int) -> int:
    """The job's exit status, from its launcher's and from what its processes told. What was stopped with its answers
    kept is put back into the queue."""
    try:
        means = ended.settled(os.environ["AVATAR_ENDED"], status)
    except OSError as error:  # of the disk, no mistake of the user's
        print(f"error: how the processes ended can't be read: {error}", file=sys.stderr)
        return status or ended.FAILED
    if means == ended.INTERRUPTED:
        try:
            queue.requeue(queue.own_job())
        except (queue.SlurmRefused, queue.SlurmSilent) as error:
            print(f"error: job {queue.own_job()} can't be queued again ({error}); its answers are kept: submit the "
                  "same again", file=sys.stderr)  # fmt: skip
    return means


def main(arguments: list[str]) -> int:
    try:
        if arguments[0] == "end":
            return end(int(arguments[1]))
        if arguments[0] == "submit":
            return submit(Path(arguments[1]), arguments[2:])
        print(task(arguments[1:]))
        return 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
