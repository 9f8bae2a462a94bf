"""Check a training, say what its job will do, and submit it:

    bash slurm/avatar_7b.sh [--with-sft] [--with-judge] [--check] [sbatch's options] [key=value ...]

    --with-sft     the recipe's cold start first, and this job behind it, unless its export is there
    --with-judge   a judge beside it (slurm/judge.sh); training is released by the judge's first answer
    --check        check and print only

sbatch's options are those of `sbatch --help`, as --nodes=2 or -p gpu; they come last and win. Models and data come from
the command line, the environment (AVATAR_MODEL_7B, AVATAR_DATA ...) or the site's file: docs/cluster.md.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from megatron_avatar.config import Config, load_config  # noqa: E402
from megatron_avatar.config.paths import cold_start, home  # noqa: E402
from megatron_avatar.config.world import torchrun  # noqa: E402
from megatron_avatar.resilience import lock, queue  # noqa: E402
from slurm import launch, request  # noqa: E402
from slurm.page import page  # noqa: E402
from slurm.resubmit import FOLLOWED  # noqa: E402

OWN = ("--with-sft", "--with-judge", "--check")
# sbatch's short options with a value, by their long names.
SHORT = {"A": "account", "C": "constraint", "G": "gpus", "J": "job-name", "N": "nodes", "c": "cpus-per-task",
         "d": "dependency", "e": "error", "n": "ntasks", "o": "output", "p": "partition", "q": "qos", "t": "time",
         "w": "nodelist", "x": "exclude", "M": "clusters", "L": "licenses", "b": "begin", "D": "chdir"}  # fmt: skip
SHARED = ("data.", "cluster", "parallel", "log.", "model.dtype", "model.context")  # the cold start's too
JUDGE_MINUTES = 60  # that a judge's job may last beyond the training's
JUDGE_GIB = 64
PLACE = ("partition", "account", "qos", "constraint", "reservation", "clusters", "cpus-per-task", "time")  # the judge's


@dataclass
class Given:
    """A command line: this command's own words, sbatch's options in their long form, and the trainer's settings."""

    own: set[str]
    options: list[str]
    settings: list[str]

    def number(self, name: str, default: int) -> int:
        """A whole number among sbatch's options."""
        values = [o.partition("=")[2] for o in self.options if o.startswith(f"--{name}=")]
        if values and not re.fullmatch(r"\d+", values[-1]):
            raise ValueError(f"--{name}={values[-1]}: write a whole number")
        return int(values[-1]) if values else default


def split(arguments: list[str]) -> Given:
    """A word without `=` behind an option is its value; a setting always has one, or begins with ~ or +."""
    given = Given(set(), [], [])
    waiting = ""
    for item in arguments:
        if waiting and not item.startswith("-") and (item[:1] in "~+") is False and "=" not in item:
            given.options[-1] += f"={item}"
            waiting = ""
            continue
        waiting = ""
        if item in OWN:
            given.own.add(item)
        elif re.match(r"--[a-z]", item):
            given.options.append(item)
            waiting = "" if "=" in item else item
        elif re.match(r"-[A-Za-z]", item):
            name, value = SHORT.get(item[1]), item[2:].removeprefix("=")
            if name is None:
                raise ValueError(f"{item}: write sbatch's option in its long form, as --partition=gpu")
            given.options.append(f"--{name}={value}" if value else f"--{name}")
            waiting = "" if value else item
        elif "=" in item or item[:1] in ("~", "+"):
            given.settings.append(home(item))
        else:
            raise ValueError(f"{item!r} is neither an option nor key=value")
    return given


def recipe_of(script: Path) -> str:
    """The recipe that a script trains, unless it is told another. ValueError for a script of another kind."""
    found = re.search(r"^[^#\n]*\brecipe=(\w+)", script.read_text(), re.MULTILINE)
    if found is None:
        raise ValueError(f"{script} trains no recipe: submit it with sbatch")
    return found[1]


def configure(script: Path, settings: list[str], *more: str) -> Config:
    """The configuration that a script's job will have."""
    return load_config([*with_recipe(script, settings), *more])


def with_recipe(script: Path, settings: list[str]) -> list[str]:
    """The trainer's words: the settings, behind the script's recipe unless they name another."""
    named = any(item.startswith("recipe=") for item in settings)
    return settings if named else [f"recipe={recipe_of(script)}", *settings]


@dataclass
class Job:
    """One training to submit: its script, settings, and what it asks for."""

    script: Path
    config: Config
    settings: list[str]
    request: request.Request
    options: list[str]

    def line(self, asked: request.Request) -> list[str]:
        """sbatch's options: the site's and the plan's, then the user's."""
        signal = [f"--signal=USR1@{self.config.cluster.signal_s}"] if not os.environ.get("SBATCH_SIGNAL") else []
        return [*request.without(asked, self.options).line(), *signal, *self.options]


def plan(script: Path, given: Given, *, made: str = "") -> Job:
    """Everything checked that can be from here. `made`: a model's folder that isn't there yet."""
    config = configure(script, given.settings)
    nodes, tasks = launch.layout(config)
    nodes, tasks = given.number("nodes", nodes), given.number("ntasks-per-node", tasks)
    if nodes * tasks != (config.cluster.gpus or config.parallel.tp * config.parallel.pp):
        config.cluster = replace(config.cluster, gpus=nodes * tasks)
    launch.check(config, nodes=nodes, tasks_per_node=tasks, made=made)
    if problem := lock.worker(Path(config.output_dir)):
        raise ValueError(f"{config.output_dir}: {problem}, or choose another output_dir")
    requests = request.trainings(config, nodes, tasks)
    job = Job(script, config, said(config, given.settings), requests[0], given.options)
    here = torchrun(nodes * tasks, "megatron_avatar.train", with_recipe(script, job.settings))
    job.request = request.first_accepted(requests, job.line, otherwise=f"without Slurm start it here: {here}")
    return job


def said(config: Config, settings: list[str]) -> list[str]:
    """The settings with what this shell's environment added to them: the job's may be another."""
    found = {"model.path": config.model.path, "data.manifest": config.data.manifest,
             "cluster": os.environ.get("AVATAR_CLUSTER", "")}  # fmt: skip
    names = {item.partition("=")[0] for item in settings}
    return [*settings, *(f"{key}={value}" for key, value in found.items() if value and key not in names)]


def sbatch(job: Job, *more: str) -> str:
    """Submit; the job's number."""
    return submitted([*job.line(job.request), *more, str(job.script), *job.settings])


def submitted(line: list[str]) -> str:
    """The number of the job that such a line of sbatch queues."""
    return queue.ask("sbatch", "--parsable", *line).strip().split(";")[0]


def main(script: Path, arguments: list[str]) -> int:
    if "--help" in arguments:
        print(__doc__)
        return 0
    try:
        return _submit(script, split(arguments))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _submit(script: Path, given: Given) -> int:
    if "dry_run=true" in given.settings:  # nothing to submit
        words = [sys.executable, "-m", "megatron_avatar.train", *with_recipe(script, given.settings)]
        found = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        return subprocess.run(words, env={**os.environ, "PYTHONPATH": found}).returncode  # paths begin where one types
    cold = _cold_start(script, given) if "--with-sft" in given.own else None
    made = ""
    if cold is not None:
        made = str(Path(cold.config.output_dir) / "export" / "sft")
        given.settings = [*given.settings, f"model.path={made}"]
    job = plan(script, given, made=made)
    if "--with-judge" in given.own:
        _check_judge(job)
    if (Path(job.config.output_dir) / "done.json").exists():
        print(f"{job.config.output_dir} is complete: nothing to submit")
        return 0
    jobs = [j for j in (cold, job) if j is not None]
    for one in jobs:
        after = f"behind {cold.config.name}" if cold is not None and one is job else ""
        own = request.without(one.request, one.options)
        print(page(one.config, own.nodes, own.tasks, minutes=own.minutes, memory=own.memory, after=after))
        print(f"  {'sbatch':<8}{shlex.join(one.line(one.request))}")
    if "--check" in given.own:
        return 0
    behind: list[str] = []
    if cold is not None:
        first = sbatch(cold)
        behind = [f"--dependency=afterok:{first}", "--kill-on-invalid-dep=yes"]
        print(f"job {first}: {cold.config.name}")
    if "--with-judge" in given.own:
        training, judge = _with_judge(job, behind)
        print(f"job {judge}: the judge; job {training}: {job.config.name}, held until the judge answers")
    else:
        training = sbatch(job, *behind)
        print(f"job {training}: {job.config.name}{f', behind job {first}' if cold is not None else ''}")
    print(f"log: slurm-{job.config.name}-{training}.out; metrics: {job.config.output_dir}/metrics.jsonl; "
          f"stop with its state saved: scancel --signal=USR1 {training}")  # fmt: skip
    return 0


# ---- the cold start ------------------------------------------------------------------------------------------------


def _cold_start(script: Path, given: Given) -> Job | None:
    """The recipe's cold start; None where its export is there. ValueError where the recipe has none."""
    config = configure(script, given.settings, "dry_run=true")
    export = cold_start(config)
    if export is None:
        raise ValueError(f"--with-sft: recipe {config.name} has no cold start")
    if any(s.startswith("model.path=") for s in given.settings):
        raise ValueError("--with-sft decides where the model comes from: leave out model.path=, which the cold start "
                         "would not know; its own comes from the environment or the site's file")  # fmt: skip
    if (export / "config.json").is_file():
        return None
    shared = [s for s in given.settings if s.startswith(SHARED)]
    first = Given(set(), [o for o in given.options if not o.startswith(("--job-name", "--output", "--error"))], shared)
    return plan(script.with_name(f"{config.model.cold_start}.sh"), first)


# ---- the judge -------------------------------------------------------------------------------------------------------


def _check_judge(job: Job) -> None:
    if not any(stage.rewards.get("judge") for stage in job.config.stages.values()):
        raise ValueError(f"--with-judge: no stage of {job.config.name} has a judge reward")
    if job.config.judge.endpoint:
        raise ValueError("--with-judge serves a judge of its own: leave out judge.endpoint")
    vllm = os.environ.get("VLLM", "vllm")
    if shutil.which(vllm) is None:
        raise ValueError(f"--with-judge needs vLLM, and {vllm} was not found: pip install vllm into an environment of "
                         "its own, and export VLLM=FILE")  # fmt: skip
    job.config.judge = replace(job.config.judge, endpoint=f"{job.config.output_dir}/judge_server")
    job.settings = [*job.settings, f"judge.endpoint={job.config.judge.endpoint}"]


def _with_judge(job: Job, behind: list[str]) -> tuple[str, str]:
    """Submit the training, held, and a judge that releases it: (training, judge)."""
    config = job.config
    folder = Path(config.judge.endpoint)
    folder.mkdir(parents=True, exist_ok=True)
    training = sbatch(job, "--hold", *behind)
    try:
        (folder / ".released").unlink(missing_ok=True)
        (folder / FOLLOWED).write_text(f"{training}\n")
        asked = request.make(config, 1, 1, 0, JUDGE_GIB << 30)
        asked = replace(asked, minutes=min(config.cluster.minutes, job.request.minutes + JUDGE_MINUTES))
        where = [o for o in job.options if o.partition("=")[0].removeprefix("--") in PLACE]
        asked = request.first_accepted([asked, replace(asked, memory=0)],
                                       lambda one: [*request.without(one, where).line(), *where])  # fmt: skip
        script = [str(ROOT / "slurm" / "judge.sh"), str(folder), config.judge.model]
        judge = submitted([*request.without(asked, where).line(), *where, *behind, *script])
    except BaseException:
        queue.ask("scancel", training)
        raise
    return training, judge


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve(), sys.argv[2:]))
