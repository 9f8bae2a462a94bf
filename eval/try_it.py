"""One minute: a tiny model answers three clips that you see and hear on a page. Nothing is trained.

    python -m eval.try_it [--out runs/try] [--seed 2026] [--model FOLDER]

The clips are made from the seed, one of each stage. Two models answer: the base, and the one that `make demo` trains
from it (assets/tiny_avatar, or that of runs/demo where you have run it).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.markup import escape

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "assets" / "tiny_base"
SHIPPED = ROOT / "assets" / "tiny_avatar"
OWN = Path("runs/demo/avatar/export/localisation")
STAGES = ("visual", "audio_visual", "localisation")
TITLES = {"base": "base", "trained": "trained"}
console = Console(highlight=False)


def make_clips(out: Path, seed: int) -> Path:
    """Three clips with sound, one of each stage, and their manifest."""
    from data_tools.synthesize import draw_samples, write_clip
    from megatron_avatar.data.manifest import write_manifest

    (out / "clips").mkdir(parents=True, exist_ok=True)
    drawn = [(s, scene) for s, scene in draw_samples(seed, "tiny") if s.split == "eval" and s.media[0].audio_path]
    chosen = [next((s, scene) for s, scene in drawn if s.stage == stage) for stage in STAGES]
    for sample, scene in chosen:
        write_clip((sample.media[0], scene), out)
    write_manifest(out / "manifest.jsonl", [sample for sample, _ in chosen])
    return out / "manifest.jsonl"


def answer(manifest: Path, out: Path, name: str, model: Path) -> Path:
    """The file of what the model says of the clips. Raises ValueError with what the evaluation said where it fails."""
    from eval.run import main as evaluate

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = evaluate([f"model={model}", "benchmark=held_out", f"data={manifest}", "recipe=tiny_avatar",
                           "data.workers=0", f"out={out / name}", f"system={name}", "family=tiny"])  # fmt: skip
    if status:
        raise ValueError(said.getvalue().strip())
    return out / name / "held_out.ours.jsonl"


def write_page(out: Path, manifest: Path, files: dict[str, Path], model: Path) -> Path:
    """The page; everything is in it."""
    from jinja2 import Environment, FileSystemLoader

    from eval.paper.figures.side_by_side import LETTERS, load_clip
    from eval.scoring.predictions import read_predictions
    from megatron_avatar.data.manifest import load_manifest

    found = {name: {p["id"]: p for p in read_predictions(file)} for name, file in files.items()}
    clips = [load_clip(sample, manifest.parent, [(TITLES[name], by_id.get(sample.id)) for name, by_id in found.items()],
                       sample.stage) for sample in load_manifest(manifest)]  # fmt: skip
    folder = Path(__file__).parent
    environment = Environment(loader=FileSystemLoader(folder), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = out / "report.html"
    shipped = model.resolve() == SHIPPED
    html = environment.get_template("try.html.j2").render(
        clips=clips, model=model, shipped=shipped, missing="not measured"
    )
    page.write_text(html, encoding="utf-8")
    for clip in clips:
        sample = clip.sample
        choices = ", ".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, sample.choices, strict=False))
        console.print(f"\n{sample.question} {choices}\n  right answer: {sample.answer}", markup=False)
        for name, prediction in clip.answers:
            console.print(f"  {name + ':':<9}{prediction['text'] if prediction else 'nothing'}", markup=False,
                          soft_wrap=True)  # fmt: skip
    return page


def trained_model(asked: Path | None) -> Path:
    """The model that answers beside the base: the one asked for, the demo's of this machine, or the shipped one.
    ValueError where the one asked for is none."""
    if asked is not None and not (asked / "config.json").is_file():
        raise ValueError(f"--model {asked}: there is no config.json of a model; name a folder of `make demo`'s exports")
    return asked or next((path for path in (OWN, SHIPPED) if (path / "config.json").is_file()), BASE)


def seen_from_here(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/try"))
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--model", type=Path, help="a Hugging Face folder of the tiny model's kind")
    parsed = parser.parse_args(arguments)
    began = time.monotonic()
    try:
        model = trained_model(parsed.model)
        console.print(f"making three clips with sound, seed {parsed.seed} ...")
        manifest = make_clips(parsed.out / f"seed_{parsed.seed}", parsed.seed)
        files = {}
        for name, folder in {"base": BASE, "trained": model}.items():
            console.print(f"{name}: {seen_from_here(folder)} answers ...", markup=False)
            files[name] = answer(manifest, manifest.parent, name, folder)
        page = write_page(parsed.out, manifest, files, seen_from_here(model))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console.print(f"\n{time.monotonic() - began:.0f} s. To see and hear the clips, open in a browser: "
                  f"[bold]{escape(str(page))}[/]", soft_wrap=True)
    console.print("Next: [bold]make demo[/] trains such a model")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
