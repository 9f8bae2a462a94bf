"""A job's script once more, with the options that it had, where Slurm refuses to requeue it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from megatron_avatar.resilience import queue

# What scontrol shows of a job -> sbatch's option.
SHOWN = {
    "Account": "account", "Comment": "comment", "Contiguous": "contiguous", "CoreSpec": "core-spec",
    "CpusPerTres": "cpus-per-gpu", "ExcNodeList": "exclude", "Features": "constraint", "Licenses": "licenses",
    "MailType": "mail-type", "MailUser": "mail-user", "MemPerTres": "mem-per-gpu", "MinTmpDiskNode": "tmp",
    "Network": "network", "Nice": "nice", "Partition": "partition", "Prefer": "prefer", "QOS": "qos",
    "ReqNodeList": "nodelist", "Reservation": "reservation", "Switches": "switches", "TimeLimit": "time",
    "TimeMin": "time-min", "TresBind": "gpu-bind", "TresFreq": "gpu-freq", "TresPerJob": "gpus", "TresPerNode": "gres",
    "TresPerSocket": "gpus-per-socket", "TresPerTask": "gpus-per-task", "WCKey": "wckey", "WorkDir": "chdir",
}  # fmt: skip
NOTHING = {"", "0", "*", "(null)", "N/A", "None", "none", "NONE"}
# What Slurm tells the job alone -> sbatch's option.
TOLD = {
    "SLURM_JOB_NAME": "job-name", "SLURM_JOB_NUM_NODES": "nodes", "SLURM_NTASKS_PER_NODE": "ntasks-per-node",
    "SLURM_CPUS_PER_TASK": "cpus-per-task", "SLURM_MEM_PER_NODE": "mem", "SLURM_MEM_PER_CPU": "mem-per-cpu",
}  # fmt: skip
SHARING = {"NO": "--exclusive", "USER": "--exclusive=user"}
FOLLOWED = ".for"  # in a judge's folder: the job that it serves
HISTORY_S = 10.0  # for the accounting's word, which may be missing


def submit(job: str, run: Path, arguments: list[str]) -> str:
    """Submit `job`'s script with its options and these arguments; the new job's id.

    Raises SlurmRefused, SlurmSilent.
    """
    shown = queue.ask("scontrol", "show", "job", job)
    script = run / f".resubmitted-{job}.sh"
    queue.ask("scontrol", "write", "batch_script", job, str(script))
    os.environ["AVATAR_AFTER"] = job  # whom the new one follows
    try:
        answer = queue.ask("sbatch", "--parsable", *options(job, shown), str(script), *arguments)
    finally:
        script.unlink(missing_ok=True)
    new = answer.strip().split(";")[0]  # a cluster's name may stand behind it
    for folder in (item.partition("=")[2] for item in arguments if item.startswith("judge.endpoint=")):
        if (followed := Path(folder) / FOLLOWED).exists():  # the judge's job ends with the training's
            followed.write_text(f"{new}\n")
    return new


def options(job: str, shown: str) -> list[str]:
    """sbatch's options of a job, from scontrol's words about it and this environment."""
    found = {option: value for name, option in TOLD.items() if (value := os.environ.get(name))}
    for name, option in SHOWN.items():
        if (value := _field(shown, name)) not in NOTHING:
            found[option] = value
    found["gres"] = ",".join(dict.fromkeys(re.sub(r"gres[:/]", "", found.get("gres", "none")).split(",")))
    for name in ("gpus", "gpus-per-task", "gpus-per-socket", "cpus-per-gpu", "mem-per-gpu", "gpu-bind", "gpu-freq"):
        if name in found:  # gres:gpu:a100:1, or cpu=2,gres/gpu:a100=1
            found[name] = re.sub(r"^.*gres[:/]", "", found[name]).replace("=", ":").removeprefix("gpu:")
    if found.get("contiguous"):
        found["contiguous"] = ""
    for name, option in {"StdOut": "output", "StdErr": "error", "StdIn": "input"}.items():
        path = _field(shown, name)
        if path not in NOTHING | {"/dev/null"} and not (name == "StdErr" and path == _field(shown, "StdOut")):
            found[option] = _pattern(path, job)
    if signal := _signal(job):
        found["signal"] = signal
    flags = ["--requeue" if _field(shown, "Requeue") == "1" else "--no-requeue", "--export=ALL"]
    if sharing := SHARING.get(_field(shown, "OverSubscribe")):
        flags.append(sharing)
    if mode := {"a": "append", "t": "truncate"}.get(os.environ.get("SLURM_OPEN_MODE", "")):
        flags.append(f"--open-mode={mode}")
    return [*(f"--{name}={value}" if value else f"--{name}" for name, value in found.items()), *flags]


def move_dependents(job: str, new: str) -> Iterator[str]:
    """Let what waits for `job` wait for `new`; says what was done, and what wasn't."""
    try:
        waiting = queue.ask("squeue", "--noheader", f"--user={os.getuid()}", "--states=PENDING", "--format=%i|%E")
    except (queue.SlurmRefused, queue.SlurmSilent) as error:
        yield f"warning: what waits for job {job} stays behind it ({error})"
        return
    for line in waiting.splitlines():
        name, _, conditions = line.strip().partition("|")
        conditions = re.sub(r"\([^)]*\)", "", conditions)
        moved = re.sub(rf"(?<![\w]){re.escape(job)}(?![\w])", new, conditions)
        if moved == conditions:
            continue
        name = name.partition("_[")[0]  # the tasks of an array that haven't begun
        try:
            queue.ask("scontrol", "update", f"JobId={name}", f"Dependency={moved}")
            yield f"job {name} waits for job {new} now"
        except (queue.SlurmRefused, queue.SlurmSilent) as error:
            yield f"warning: job {name} still waits for job {job}, which has not finished the run ({error})"


def _field(shown: str, name: str) -> str:
    """A value of scontrol's list: up to the next key of its line; a comment may hold anything."""
    end = r"$" if name in ("Comment", "WorkDir", "StdOut", "StdErr", "StdIn", "Command") else r"(?=\s|$)"
    match = re.search(rf"(?:^|\s){name}=(.*?)\s*{end}", shown, re.MULTILINE)
    return match[1] if match else ""


def _pattern(path: str, job: str) -> str:
    """The name of an output file as a pattern: with the job's number it gets the new one's."""
    folder, name = os.path.split(path.replace("%", "%%"))
    return os.path.join(folder, re.sub(rf"(?<!\d){re.escape(job)}(?!\d)", "%j", name))


def _signal(job: str) -> str:
    """--signal of the command line, which Slurm shows nowhere but in its accounting; else the script's own counts."""
    try:
        line = queue.ask("sacct", "--noheader", "--parsable2", f"--jobs={job}", "--format=SubmitLine", patience_s=0,
                         answer_s=HISTORY_S)  # fmt: skip
    except (queue.SlurmRefused, queue.SlurmSilent):
        return ""
    match = re.search(r"--signal[= ]['\"]?([\w:@]+)", line)
    return match[1] if match else ""
