"""Every command of a page is run by a test, has its settings read here, or is one that needs a cluster or a network."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from megatron_avatar.config import load_config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md",
         *sorted(p for p in (ROOT / "docs").glob("*.md") if p.name not in ("log.md", "settings.md"))]  # fmt: skip
# Which test runs a module's command, where it isn't named tests/.../test_MODULE.py.
RUN_BY = {
    "data_tools.prepare": "tests/data_tools/test_prepare.py", "data_tools.captions": "tests/data_tools/test_teacher.py",
    "data_tools.hints": "tests/data_tools/test_teacher.py", "data_tools.traces": "tests/data_tools/test_teacher.py",
    "data_tools.show": "tests/data_tools/test_show.py", "megatron_avatar.doctor": "tests/test_doctor.py",
    "megatron_avatar.export": "tests/test_export.py", "megatron_avatar.config.reference":
    "tests/config/test_reference.py", "megatron_avatar.planning.recipes": "tests/planning/test_plan.py",
    "eval.run": "tests/eval/test_run.py", "eval.score": "tests/eval/test_score.py", "eval.tables":
    "tests/eval/test_tables.py", "eval.figures": "tests/eval/paper/test_figures_folder.py", "eval.reproduction":
    "tests/eval/paper/test_study.py", "eval.lmms": "tests/eval/test_lmms.py", "eval.try_it": "tests/eval/test_try.py",
    "bench.faults": "tests/bench/test_faults.py", "bench.reference": "tests/bench/test_reference.py",
    "bench.dynamics": "tests/planning/test_dynamics.py", "slurm/sweep.py": "tests/test_sweep.py",
    "slurm/reproduce.py": "tests/test_sweep.py", "examples/one_step.py": "tests/test_examples.py",
    "eval.demo": "tests/eval/test_demo.py", "megatron_avatar.train": "tests/training/test_entry.py",
}  # fmt: skip
# What these targets run; the others are tests and checks themselves.
TARGETS = {"try": "eval.try_it", "demo": "eval.demo", "doctor": "megatron_avatar.doctor", "reproduce":
           "slurm/reproduce.py"}  # fmt: skip
CHECKS = ("test", "test-all", "test-slurm", "slurm-up", "slurm-down", "lint")
NETWORK = ("git clone", "pip install", "hf download")
STAND_INS = {"FOLDER": "models/omni_7b", "FILE": "data/manifest.jsonl", "PARTITION": "gpu", "HF_FOLDER": "models/x"}


def text_of(page: Path) -> str:
    """A page with each command on one line."""
    return re.sub(r" *\\\n +", " ", page.read_text())


def commands(page: Path) -> list[str]:
    """The lines of a page's indented blocks that are commands."""
    lines = re.findall(r"^    (?:\$ )?((?:\.venv/|make |sbatch |bash |git |export |pip ).*)$", text_of(page), re.M)
    return [part.strip() for line in lines for part in re.sub(r"  +# .*", "", line).split("&&")]


ALL = [(page.name, command) for page in PAGES for command in commands(page) if not command.startswith("cd ")]


@pytest.mark.parametrize(("page", "command"), ALL)
def test_a_command_of_a_page_is_tried_or_marked(page, command):
    words = shlex.split(command)
    if command.startswith("make "):
        recipe = re.search(rf"^{words[1]}:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)
        assert recipe and (words[1] in CHECKS or TARGETS[words[1]] in recipe[1] and runs(TARGETS[words[1]]))
    elif words[0] in ("sbatch", "bash"):  # needs a cluster: the script is there, and its settings are sound
        script = next(word for word in words if word.startswith("slurm/"))
        text = (ROOT / script).read_text()
        if recipe := re.search(r"^\w+ (recipe=\w+)", text, re.M):
            load_config([recipe[1], "model.path=models/omni_7b", "data.manifest=data.jsonl", *settings(words)])
    elif command.startswith("export ") or any(name in command for name in NETWORK):
        pass
    elif "megatron_avatar.train" in words:
        given = settings(words)
        if "dry_run=true" in given or any(item.startswith("model.path=") for item in given):
            load_config(given)
        assert runs("megatron_avatar.train")
    elif "-m" in words and words[words.index("-m") + 1] == "pytest":
        assert all((ROOT / word).exists() for word in words if word.startswith("tests/"))
    else:
        what = words[words.index("-m") + 1] if "-m" in words else words[1]
        assert what in RUN_BY, f"{page}: neither run by a test nor marked: {command}"
        assert runs(what), f"{RUN_BY[what]} doesn't run {what}"


def runs(what: str) -> bool:
    """Whether the test that is said to run a module names it."""
    name = what if what.endswith(".py") else what.rpartition(".")[2]
    return name.split("/")[-1].removesuffix(".py") in (ROOT / RUN_BY[what]).read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_command_hides_from_these_tests(page):
    known = {line.strip() for line in re.findall(r"^    (?:\$ )?(?:\.venv/|make |sbatch |bash |git |export |pip ).*$",
                                                 text_of(page), re.M)}  # fmt: skip
    odd = re.findall(r"^    ((?:source|python3?|torchrun|srun|docker|apptainer|sudo|apt|cp|mv|rm|curl|uv) .*)$",
                     text_of(page), re.M)  # fmt: skip
    assert not set(odd) - known


def settings(words: list[str]) -> list[str]:
    """The key=value of a command line, with something in the place of FOLDER and FILE."""
    found = [word for word in words if re.match(r"^[+~]?[\w.]+=", word) and not word.startswith("-")]
    return [f"{key}={STAND_INS.get(value, value)}" for key, _, value in (word.partition("=") for word in found)
            if key not in ("cluster", "input", "out", "source", "model") or key == "cluster" and value != "SITE"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_shows_below_a_prompt_is_what_the_command_says(page):
    for command, shown in re.findall(r"^    \$ (.+)\n((?:    (?!\$).+\n)+)", page.read_text(), re.M):
        done = subprocess.run(shlex.split(command), cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
        said = " ".join((done.stdout + done.stderr).split())
        assert " ".join(shown.split()) in said, f"{page.name}: {command}\n{said}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_fit_a_terminal(page):
    """Longer ones are broken where a shell goes on reading."""
    lines = re.findall(r"^    (?:\.venv/|make |sbatch |bash ).*$", page.read_text(), re.M)
    assert not [line for line in lines if len(line) > 120]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 170


@pytest.mark.parametrize(("page", "kept"), [("README.md", "demo.json"), ("docs/quickstart.md", "demo_omni3.json")])
def test_a_demo_that_is_shown_is_the_run_that_is_kept(page, kept):
    results, text = json.loads((ROOT / "bench" / "results" / kept).read_text()), (ROOT / page).read_text()
    for row in ("overall", "what", "sync", "where"):
        wanted = [f"{100 * results['systems'][name][row]:.1f}" for name in ("base", "sft", "grpo", "avatar")]
        shown = re.search(rf"^    {row} +(.+)$", text, re.M)
        assert shown and shown[1].split() == wanted, f"{row}: {wanted}"
    difference = results["avatar_minus_grpo"]
    value, low, high = (f"{100 * difference[key]:+.1f}" for key in ("value", "low", "high"))
    told = f"AVATAR against GRPO: {value} points (95 % interval over clips {low} to {high})"
    assert told in " ".join(text.split()), told


def words_of(node: ast.AST) -> str:
    """What a string literal says; of an f-string the fixed words, with {} between them."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def test_messages_of_the_troubleshooting_page_are_the_codes_own():
    """Each quoted message is made of words that stand in the code, wherever its lines are broken."""
    trees = [ast.parse(p.read_text()) for folder in ("megatron_avatar", "eval", "data_tools", "slurm")
             for p in (ROOT / folder).rglob("*.py")]  # fmt: skip
    code = "\n".join(words_of(node) for tree in trees for node in ast.walk(tree)) + "\n"
    code += (ROOT / "Makefile").read_text() + "".join(p.read_text() for p in (ROOT / "slurm").glob("*.sh"))
    joined = re.sub(r"\s+", " ", code)
    first_cells = re.findall(r"^\| (`.+?) \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.M)
    for cell in first_cells:
        if "(Python's own)" in cell:
            continue
        for message in re.findall(r"`([^`]+)`", cell):
            assert message in joined, message


def test_links_of_pages_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
