"""Where the benchmarks' data are, how many questions and media they have, and the command that fetches them."""

from __future__ import annotations

from eval.asking.benchmark import load_benchmark, names
from megatron_avatar.config.paths import fetch

FOLDER = "benchmarks"  # where the commands below put them, one folder each


def show(wanted: list[str]) -> int:
    """Print all benchmarks, or those that are named. ValueError for one that there isn't."""
    found = [load_benchmark(name) for name in wanted or names() if wanted or name != "held_out"]
    for benchmark in found:
        if benchmark.name == "held_out":
            print("held_out: what a manifest of your own holds out; nothing to fetch: benchmark=held_out data=MANIFEST")
            continue
        source = benchmark.source
        media = f", {source.media}" if source.media else ""
        print(f"{benchmark.name}: {benchmark.title}, {source.items:,} questions{media}")
        print(f"  {fetch(source.dataset, f'{FOLDER}/{benchmark.name}', dataset=True)}")
        if source.note:
            print(f"  {source.note}")
    print(f"\nThen: bash slurm/eval.sh model=FOLDER data={FOLDER}, or for one of them on one machine:\n"
          f"  .venv/bin/python -m eval.run model=FOLDER benchmark=NAME data={FOLDER}/NAME out=FOLDER recipe=avatar_7b\n"
          "Their licences and terms are their owners'.")  # fmt: skip
    return 0
