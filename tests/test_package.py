"""The wheel holds the package alone, with its settings, and its commands run in any folder."""

import importlib
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of what git tracks, so that nothing is left in the checkout."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    listing = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                             capture_output=True, check=False)  # fmt: skip
    if listing.returncode:
        pytest.skip("needs a git checkout")
    for name in filter(None, listing.stdout.decode().split("\0")):
        if not name.startswith(("tests/", "assets/", "bench/")) and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w",
                    str(folder), str(source)], check=True, capture_output=True, timeout=240)  # fmt: skip
    (built,) = folder.glob("*.whl")
    site = folder / "site"
    with zipfile.ZipFile(built) as archive:
        archive.extractall(site)
    return site


def run(wheel, folder, *command):
    environment = {**os.environ, "PYTHONPATH": str(wheel), "PYTHONSAFEPATH": "1"}
    return subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True,
                          timeout=120, check=False)  # fmt: skip


def test_the_wheel_holds_the_package_alone_with_its_settings(wheel):
    assert {path.name for path in wheel.iterdir() if not path.name.endswith(".dist-info")} == {"megatron_avatar"}
    for kind in ("*.py", "*.yaml", "config.json"):
        there = {p.relative_to(ROOT) for p in (ROOT / "megatron_avatar").rglob(kind)}
        assert {p.relative_to(wheel) for p in (wheel / "megatron_avatar").rglob(kind)} >= {
            path for path in there if not path.name.startswith("site")}, kind  # fmt: skip


def test_it_asks_for_what_runs_and_for_tests_only_where_they_are_asked_for(wheel):
    about = next(wheel.glob("*.dist-info/METADATA")).read_text().partition("\n\n")[0]
    asked = set(re.findall(r"^Requires-Dist: (.+)$", about, re.MULTILINE))
    pins = {name: {line for line in (ROOT / name).read_text().splitlines() if "==" in line}
            for name in ("requirements.txt", "requirements-test.txt")}  # fmt: skip
    assert {line for line in asked if "extra ==" not in line} == pins["requirements.txt"]
    tests = {line.partition(";")[0] for line in asked if line.endswith('extra == "test"')}
    assert tests == pins["requirements-test.txt"]
    assert "\nLicense-Expression: Apache-2.0\n" in about and "\nLicense-File: LICENSE" in about


def test_its_commands_are_functions(wheel):
    text = next(wheel.glob("*.dist-info/entry_points.txt")).read_text()
    commands = dict(re.findall(r"^(avatar-\w+) = megatron_avatar.commands:(\w+)$", text, re.MULTILINE))
    assert set(commands) == {"avatar-train", "avatar-plan", "avatar-export", "avatar-doctor"}
    module = importlib.import_module("megatron_avatar.commands")
    assert all(callable(getattr(module, name)) for name in commands.values())


def test_they_run_in_any_folder(wheel, tmp_path):
    helped = run(wheel, tmp_path, "-m", "megatron_avatar.train", "--help")
    assert helped.returncode == 0 and "recipe=NAME" in helped.stdout
    refused = run(wheel, tmp_path, "-m", "megatron_avatar.train", "recipe=avatar_7b", "rl.n_onn=8")
    assert refused.returncode == 2 and "The nearest valid name is 'rl.n_on'" in refused.stderr, refused.stderr
    code = "import sys; sys.argv = ['avatar-plan', '--help']; from megatron_avatar import commands; "
    code += "print(commands.__file__); sys.exit(commands.plan())"
    plan = run(wheel, tmp_path, "-c", code)
    assert plan.returncode == 0 and str(wheel) in plan.stdout and "recipe=NAME" in plan.stdout
    assert not list(tmp_path.iterdir())
