"""What the tests are worth: faults that a person could make, put in one by one, and which test sees each.

    python -m tests.mutate [--all] [--keep REPORT.json] [AREA | words of a fault ...]

tests/mutations/AREA.yaml holds the faults: what, the file, the text that goes and what stands in its place, and the
tests that are nearest. Each is tried in a copy of the checkout: the nearest tests that `make test` runs, and where they
see nothing the slow ones too. --all asks the whole suite about what then survives (minutes each). Third parties are
imported once; every trial is forked from that. Exit status 1 where a fault survives that is not `expected` to.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
FOLDER = Path(__file__).parent / "mutations"
DEADLINE_S = 1200.0  # of one trial
FAST = "(not slow or core) and not slurm and not gpu"
SLOW = "slow and not core and not slurm and not gpu"
# Packages of others that our modules and tests import; ours must be read anew in every trial.
HEAVY = ("torch", "megatron.core", "megatron.core.dist_checkpointing", "megatron.core.optimizer",
         "megatron.core.pipeline_parallel", "megatron.core.models.gpt.gpt_model", "transformers",
         "transformers.models.qwen2_5_omni.modeling_qwen2_5_omni", "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
         "av", "h5py", "hypothesis", "pytest", "pytest_timeout", "scipy.stats", "wandb", "openai", "peft", "pyarrow",
         "hydra", "omegaconf", "matplotlib.pyplot", "datasets", "math_verify", "submitit")  # fmt: skip


@dataclass(frozen=True)
class Mutation:
    """A fault: `old` stands once in `file`. expected: why no test can, or need, see it."""

    area: str
    what: str
    file: str
    old: str
    new: str
    tests: str
    expected: str = ""


@dataclass
class Verdict:
    area: str
    what: str
    seen_by: str = ""  # make test, make test-all, or empty
    test: str = ""  # the first that failed
    seconds: float = 0.0
    expected: str = ""


def load() -> list[Mutation]:
    return [Mutation(path.stem, **entry) for path in sorted(FOLDER.glob("*.yaml"))
            for entry in yaml.safe_load(path.read_text(encoding="utf-8"))]  # fmt: skip


def mutated(mutation: Mutation, text: str) -> str:
    """The file's text with the fault; several lines are found at any depth. ValueError unless `old` is there once."""
    old, new = (part.rstrip("\n").split("\n") for part in (mutation.old, mutation.new))
    if len(old) == 1 and len(new) == 1:
        found = text.count(mutation.old)
        result = text.replace(mutation.old, mutation.new)
    else:
        depth = min(_indent(line) for line in old if line.strip())
        lines = text.split("\n")
        places = []
        for k in range(len(lines) - len(old) + 1):
            more = _indent(lines[k]) - _indent(old[0])
            if all(_moved(line, more) == there for line, there in zip(old, lines[k : k + len(old)], strict=True)):
                places.append((k, more))
        found = len(places)
        for k, more in places[:1]:
            own = [_moved(line, more) for line in new] if mutation.new.strip() else [" " * (depth + more) + "pass"]
            lines[k : k + len(old)] = own
        result = "\n".join(lines)
    if found != 1 or result == text:
        raise ValueError(f"{mutation.area}: {mutation.what}: its text stands {found} times in {mutation.file}")
    compile(result, mutation.file, "exec")
    return result


def misplaced(mutations: list[Mutation]) -> dict[Mutation, str]:
    """Faults whose text or nearest tests are no longer where they stood, and why: code moves on."""
    problems = {}
    for mutation in mutations:
        try:
            mutated(mutation, (ROOT / mutation.file).read_text())
            if gone := [name for name in mutation.tests.split() if not (ROOT / name).exists()]:
                raise ValueError(f"{mutation.area}: {mutation.what}: there is no {', '.join(gone)}")
        except (ValueError, OSError) as problem:
            problems[mutation] = str(problem)
    return problems


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip(" "))


def _moved(line: str, more: int) -> str:
    return " " * (_indent(line) + more) + line.lstrip(" ") if line.strip() else line


def copy_checkout(folder: Path) -> None:
    """Tracked files as they are now, and new ones that git doesn't ignore."""
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                            capture_output=True, check=True).stdout.decode()  # fmt: skip
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / ".venv").symlink_to(ROOT / ".venv")


def ask(folder: Path, tests: list[str], marks: str, without: list[str], *, all_of_them: bool = False) -> list[str]:
    """The first test that fails (or `all_of_them`), of those in the copy that are not `without`; empty if none does.
    pytest runs in a fork of this process."""
    log = folder / "trial.log"
    child = os.fork()
    if child == 0:
        os.setsid()
        with open(log, "wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.chdir(folder)
        sys.path[:] = [str(folder), *(p for p in sys.path if p not in ("", str(ROOT)))]
        arguments = ["-q", "-p", "no:cacheprovider", "--tb=no", "-m", marks, *(["-x"] if not all_of_them else []),
                     *(f"--deselect={name}" for name in without), *tests]  # fmt: skip
        status: int = 1
        try:
            import pytest

            status = pytest.main(arguments)
        finally:
            sys.stdout.flush()
            os._exit(int(status))
    end, ended = time.monotonic() + DEADLINE_S, (0, 0)
    while time.monotonic() < end and not ended[0]:
        ended = os.waitpid(child, os.WNOHANG)
        time.sleep(0.05)
    if not ended[0]:  # a fault may well make a test wait for ever
        os.killpg(child, 9)
        os.waitpid(child, 0)
        return ["out of time"]
    status = os.waitstatus_to_exitcode(ended[1])
    if status in (0, 5):  # 5: no test was chosen
        return []
    named = re.findall(r"^(?:FAILED|ERROR) (\S+)", log.read_text(errors="replace"), re.MULTILINE)
    return named or [f"status {status}"]


def try_one(mutation: Mutation, folder: Path, without: list[str], *, everything: bool) -> Verdict:
    """Put the fault in, ask, take it out."""
    path, verdict, began = folder / mutation.file, Verdict(mutation.area, mutation.what), time.monotonic()
    original = path.read_text()
    nearest = mutation.tests.split()
    rounds = [("make test", nearest, FAST), ("make test-all", nearest, SLOW)]
    if everything:
        rounds += [("make test", ["tests"], FAST), ("make test-all", ["tests"], SLOW)]
    stamp = path.stat().st_mtime_ns
    path.write_text(mutated(mutation, original))
    sys.dont_write_bytecode = True  # or a fault of the same size would be taken for the file before it
    try:
        for who, tests, marks in rounds:
            failed = ask(folder, tests, marks, without)
            if failed and not _fails_anyhow(failed[0], path, original, folder):
                verdict.seen_by, verdict.test = who, failed[0]
                break
            if failed:  # a test that fails without the fault has no say: ask the others
                without.append(failed[0].split("[")[0])  # pytest deselects by how a name begins
                rounds.append((who, tests, marks))
    finally:
        path.write_text(original)
        os.utime(path, ns=(stamp, stamp))
    verdict.seconds, verdict.expected = round(time.monotonic() - began, 1), mutation.expected
    return verdict


def _fails_anyhow(test: str, path: Path, original: str, folder: Path) -> bool:
    """Whether a test fails without the fault too; the fault is put back."""
    if "::" not in test:
        return False
    faulty = path.read_text()
    path.write_text(original)
    try:
        return bool(ask(folder, [test.split("[")[0]], "not slurm", []))
    finally:
        path.write_text(faulty)


def unsound(folder: Path, mutations: list[Mutation]) -> list[str]:
    """Tests that fail without a fault, as those that measure a process's memory do in a fork: they have no say."""
    tests = sorted({name for m in mutations for name in m.tests.split()})
    return ask(folder, tests, FAST, [], all_of_them=True)


def report(verdicts: list[Verdict], console: Console) -> None:
    table = Table("area", "faults", "seen by make test", "by make test-all too", "survive")
    for area in [*dict.fromkeys(v.area for v in verdicts), "all"]:
        own = [v for v in verdicts if area in (v.area, "all")]
        seen = Counter(v.seen_by for v in own)
        fast = seen["make test"]
        table.add_row(area, str(len(own)), str(fast), str(fast + seen["make test-all"]), str(seen[""]))
    console.print(table)
    for verdict in verdicts:
        if not verdict.seen_by:
            console.print(f"survives: {verdict.area}: {verdict.what}. {verdict.expected}", soft_wrap=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="ask the whole suite about what the nearest tests don't see")
    parser.add_argument("--keep", type=Path, help="write the verdicts there as they come; those there already are kept")
    parser.add_argument("--check", action="store_true", help="only see whether every fault's text and tests are there")
    parser.add_argument("chosen", nargs="*")
    arguments = parser.parse_args()
    console, mutations = Console(), load()
    if arguments.chosen:
        words = set(arguments.chosen) - {m.area for m in mutations}
        mutations = [m for m in mutations if m.area in arguments.chosen or any(word in m.what for word in words)]
    problems = misplaced(mutations)
    console.print("\n".join(problems.values()) or f"{len(mutations)} faults, each in its place", soft_wrap=True)
    if arguments.check:
        return int(bool(problems))
    mutations = [m for m in mutations if m not in problems]
    known: dict[str, dict[str, Any]] = {}
    if arguments.keep and arguments.keep.exists():
        known = {f"{v['area']}: {v['what']}": v for v in json.loads(arguments.keep.read_text())}
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in HEAVY:
        importlib.import_module(name)
    verdicts = []
    with tempfile.TemporaryDirectory(prefix="mutate-") as name:
        folder = Path(name)
        copy_checkout(folder)
        without = unsound(folder, [m for m in mutations if f"{m.area}: {m.what}" not in known])
        for test in without:
            console.print(f"fails without a fault, and is left out: {test}", soft_wrap=True)
        for mutation in mutations:
            before = known.get(f"{mutation.area}: {mutation.what}")
            if before is None:
                verdicts.append(try_one(mutation, folder, without, everything=arguments.all))
                last = verdicts[-1]
                console.print(f"{last.area}: {last.what}: {last.seen_by or 'SURVIVES'} {last.test} ({last.seconds} s)",
                              soft_wrap=True, highlight=False)  # fmt: skip
            else:
                verdicts.append(Verdict(**before))
            if arguments.keep:
                arguments.keep.write_text(json.dumps([asdict(v) for v in verdicts], indent=1) + "\n")
    report(verdicts, console)
    return int(bool(problems) or any(not v.seen_by and not v.expected for v in verdicts))


if __name__ == "__main__":
    sys.exit(main())
