"""The repository keeps its own promises: floors, targets, pins, and nothing of anyone's machine."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.conftest import LONGEST

ROOT = Path(__file__).parents[1]
FOLDERS = ("megatron_avatar", "data_tools", "eval", "slurm")
REQUIREMENTS = ("requirements.txt", "requirements-test.txt", "requirements-bench.txt", "requirements-lmms.txt")
PYTHON_FILES = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
MOST_LINES = 500
# What a room may import of the project besides itself and the ground floor's single files.
FLOORS = {
    "config": set(),
    "rl": {"config"},
    "data": {"config"},
    "policy": {"config"},
    "planning": {"config", "rl", "data", "policy"},
    "resilience": {"config", "rl", "data", "policy", "planning"},
    "training": {"config", "rl", "data", "policy", "planning", "resilience"},
}
EVAL_FLOORS = {"asking": set(), "scoring": {"asking"}, "paper": {"asking", "scoring"}}
# Packages that a room's own floor keeps out.
BARRED = {
    "config": {"torch", "megatron", "transformers", "numpy"},
    "rl": {"megatron", "transformers"},
    "data": {"megatron"},
}


def make(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    """Run make as from a shell: nothing of a make around the tests (``make test-all MEASURE=``) reaches it."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("MAKE") and key != "MEASURE"}
    return subprocess.run(["make", *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=60)


def tracked() -> list[Path]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listing.returncode:
        pytest.skip("needs a git checkout")
    return [ROOT / name for name in listing.stdout.decode().split("\0") if name and (ROOT / name).is_file()]


def imports(path: Path) -> set[str]:
    """Absolute names of the modules that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("room", FLOORS)
def test_imports_go_down_the_floors_only(room):
    files = list((ROOT / "megatron_avatar" / room).rglob("*.py"))
    assert files
    for path in files:
        names = imports(path)
        barred = {"data_tools", "eval", "slurm", "tests"} | BARRED.get(room, set())
        assert not {n.split(".")[0] for n in names} & barred, path
        used = {name.split(".")[1] for name in names if name.startswith("megatron_avatar.")}
        assert used <= FLOORS[room] | {room, "records", "keyed", "endpoint", "files", "locks"}, f"{path} imports {used}"


@pytest.mark.parametrize("room", EVAL_FLOORS)
def test_rooms_of_evaluation_look_down_only(room):
    files = list((ROOT / "eval" / room).rglob("*.py"))
    assert files
    for path in files:
        used = {".".join(name.split(".")[:2]) for name in imports(path) if name.startswith("eval.")}
        assert used <= {f"eval.{name}" for name in EVAL_FLOORS[room] | {room}}, f"{path} imports {used}"


def test_no_circle_of_imports():
    """Wherever in a file an import stands, also below TYPE_CHECKING: no module reaches itself."""
    files = [path for folder in (*FOLDERS, "bench") for path in (ROOT / folder).rglob("*.py")]
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}
    graph = {name: {found for found in imports(path) if found in modules and found != name} - packages_of(name)
             for name, path in modules.items()}  # fmt: skip
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"imports go round: {' -> '.join(error.args[1])}")


def packages_of(module: str) -> set[str]:
    """a and a.b of a.b.c: a package's own __init__, which `from a.b import x` names too."""
    parts = module.split(".")
    return {".".join(parts[:n]) for n in range(1, len(parts))}


@pytest.mark.parametrize("name", ["records.py", "keyed.py", "files.py", "locks.py"])
def test_the_ground_floor_stands_on_nothing(name):
    assert not {name for name in imports(ROOT / "megatron_avatar" / name) if name.startswith("megatron_avatar")}


def test_no_file_is_long():
    long = {path.name: count for path in tracked() if path.suffix in (".py", ".sh")
            and (count := len(path.read_text(encoding="utf-8").splitlines())) > MOST_LINES}  # fmt: skip
    assert not long, "look twice: one file, one thing"


def test_every_fault_that_tests_are_measured_by_is_in_its_place():
    from tests import mutate

    assert not list(mutate.misplaced(mutate.load()).values())


def test_a_fault_without_its_text_or_its_tests_is_named():
    from tests import mutate

    here = dict(area="a", what="w", file="tests/mutate.py", old="FAST = ", new="QUICK = ", tests="tests/mutate.py")
    assert not mutate.misplaced([mutate.Mutation(**here)])
    for change, says in (({"old": "no such text"}, "stands 0 times"), ({"tests": "tests/gone.py"}, "no tests/gone.py"),
                         ({"file": "gone.py"}, "No such file")):  # fmt: skip
        (problem,) = mutate.misplaced([mutate.Mutation(**here | change)]).values()
        assert says in problem


def test_the_longest_files_of_tests_are_there():
    assert all((ROOT / "tests" / name).is_file() for name in LONGEST)


def test_endpoints_need_settings_alone():
    used = {name for name in imports(ROOT / "megatron_avatar" / "endpoint.py") if name.startswith("megatron_avatar.")}
    assert all(name.startswith(("megatron_avatar.config", "megatron_avatar.files")) for name in used)


def test_what_runs_imports_none_of_the_tests_requirements():
    text = "".join((ROOT / name).read_text() for name in ("requirements.txt", "requirements-lmms.txt"))
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", text, re.MULTILINE))
    pinned = {name.lower().replace("_", "-") for name in pins}
    assert "apex" not in pinned
    owners = packages_distributions()
    own = {"megatron_avatar", "data_tools", "eval", "slurm", "tests"}
    optional = {"transformer_engine", "apex"}
    lacking = set()
    for path in PYTHON_FILES:
        for package in {name.split(".")[0] for name in imports(path)} - own - optional - sys.stdlib_module_names:
            distributions = {owner.lower().replace("_", "-") for owner in owners.get(package, [package])}
            if not distributions & pinned:
                lacking.add(f"{path.relative_to(ROOT)}: {package}")
    assert not lacking


def test_requirements_are_exact():
    for name in REQUIREMENTS:
        lines = [line for line in (ROOT / name).read_text().splitlines() if line and line[0] != "#"]
        assert lines and all(re.fullmatch(r"[\w-]+==[\w.]+", line) for line in lines), name


def test_the_readme_names_targets_and_files_that_exist():
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)", " ".join(re.findall(r"`[^`]+`|^    .*$", readme, re.MULTILINE))))
    assert {"demo", "test"} <= named <= targets
    for link in re.findall(r"\]\(([^)#:]+)\)", readme):
        assert (ROOT / link).exists(), link
    for module in re.findall(r"python -m ((?:megatron_avatar|data_tools|eval)[\w.]*)", readme):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
    for recipe in re.findall(r"recipe=(\w+)", readme):
        assert (ROOT / f"megatron_avatar/config/recipe/{recipe}.yaml").exists(), recipe
    for ablation in re.findall(r"ablation=(\w+)", readme):
        assert (ROOT / f"megatron_avatar/config/ablation/{ablation}.yaml").exists(), ablation


def test_make_help_lists_every_target():
    shown = make("-s", "help", cwd=ROOT).stdout
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    assert re.findall(r"^make (\S+)", shown, re.MULTILINE) == phony


@pytest.mark.parametrize(
    ("refuses", "message"),
    [("version_info", "Python 3.11 or newer was not found"), ("ensurepip|pip", "neither venv nor pip")],
)
def test_make_says_what_a_bare_machine_lacks(tmp_path, refuses, message):
    for name in ("Makefile", "requirements.txt", "requirements-test.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    python = tmp_path / "python"
    python.write_text(f'#!/bin/bash\n[[ "$*" =~ {refuses} ]] && exit 1\nexit 0\n')
    python.chmod(0o755)
    run = make("test", f"PYTHON={python}", cwd=tmp_path)
    assert run.returncode and message in run.stderr
    assert not (tmp_path / ".venv").exists()


@pytest.mark.parametrize(("fails", "status"), [("", 0), ("pytest", 3), ("combine", 4), ("tests.covered", 5)])
def test_test_all_ends_as_its_parts_do(tmp_path, fails, status):
    for name in ("Makefile", "requirements.txt", "requirements-test.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    for stamp in (".installed", ".installed-test"):
        (tmp_path / ".venv" / stamp).touch()
    python.write_text(f'#!/bin/bash\necho "$*" >> seen\n[[ "$*" != *{fails or "nothing"}* ]] || exit {status}\n')
    python.chmod(0o755)
    run = make("test-all", cwd=tmp_path)
    assert (run.returncode == 0) == (status == 0), run.stderr
    seen = (tmp_path / "seen").read_text()
    assert "coverage combine" in seen, "also behind a test that fails"


def test_nothing_names_a_machines_folders():
    folders = re.compile(rb"(?<![\w.$}])/(?:home|root|work|Users|mnt|scratch|opt)/\w")
    for path in tracked():
        if path.suffix in {".py", ".md", ".yaml", ".toml", ".txt", ".sh", ".json", ""} and path != Path(__file__):
            assert not folders.search(path.read_bytes()), f"{path} holds {folders.search(path.read_bytes())}"


def test_the_tests_that_pages_name_are_there():
    pages = [page for page in (ROOT / "docs").glob("*.md") if page.name != "log.md"]  # that one tells of its day
    for page in pages:
        for file, name in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", page.read_text()):
            path = ROOT / file
            assert path.exists() and (not name or f"def {name}(" in path.read_text()), f"{page.name}: {file} {name}"
