"""A model under lmms-eval: the engine reads what tasks hand in, and lmms-eval scores what the engine answers."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import av
import numpy as np
import pytest
from PIL import Image

from data_tools.prepare.damage import Refused
from data_tools.prepare.store import Handling
from eval.lmms import main
from eval.lmms_engine import NO_ANSWER, Responder, final_answer, question, source
from megatron_avatar.config import load_config
from megatron_avatar.config.load import CONFIG_DIR
from megatron_avatar.config.schema import SamplingConfig
from megatron_avatar.data.decode import decode_image
from megatron_avatar.data.manifest import load_manifest
from megatron_avatar.data.prompt import MEDIUM
from tests.data.films import write_film
from tests.data.media import make_audio
from tests.data_tools.clips import make_clip
from tests.training.small import ROOT

SYNTHETIC = """
task: synthetic_clips
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/items.json}}
test_split: test
output_type: generate_until
doc_to_visual: !function clips_utils.visual
doc_to_text: "{{question}}"
doc_to_target: expected
generation_kwargs: {max_new_tokens: 8}
process_results: !function clips_utils.score
metric_list: [{metric: accuracy, aggregation: mean, higher_is_better: true}]
"""
FUNCTIONS = """
def visual(doc):
    return [doc["video"]]


def score(doc, results):
    return {"accuracy": float(results[0] == doc["expected"])}
"""


@pytest.fixture
def handling(tmp_path):
    (tmp_path / "scratch").mkdir()
    return Handling("/", str(tmp_path), str(tmp_path / "scratch"))


@pytest.mark.parametrize(
    ("text", "until", "answer"),
    [
        ("<think>A or B</think><answer> B </answer>", [], "B"),
        ("<think>one\n\ntwo</think>\n<answer>B</answer>", ["\n\n"], "B"),  # a stop inside the reasoning cuts nothing
        ("<think>A?</think>\nThe answer is B.\n\nQ: another", ["Q:"], "The answer is B."),
        ("B", [], "B"),
        ("<think>cut short", [], "<think>cut short"),
        ("<think>t</think><answer>A</answer><answer>B</answer>", [], "<answer>A</answer><answer>B</answer>"),
        ("<think>t</think>", [], ""),
    ],
)
def test_lmms_eval_reads_the_answer_without_its_tags(text, until, answer):
    assert final_answer(text, until) == answer


def test_a_model_of_another_family_is_refused(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lmms_eval", SimpleNamespace(__main__=None))
    for name in ("lmms_eval.__main__", "lmms_eval.models", "eval.lmms_model"):
        monkeypatch.setitem(sys.modules, name, MagicMock())
    monkeypatch.setattr("eval.lmms.Responder", lambda *_: pytest.fail("a model was loaded"))
    folder = CONFIG_DIR / "shapes" / "qwen3_vl_4b"
    assert main([f"model={folder}", "recipe=avatar_7b", "--", "--tasks", "x"]) == 2
    assert "is a Qwen3-VL, but the recipe (model.shape=qwen2_5_omni_7b) is" in capsys.readouterr().err


def test_visuals_of_every_form_are_measured(tmp_path, handling):
    clip, mute = make_clip(tmp_path, "clip", "h264_aac", frames=24, fps=8), make_clip(tmp_path, "mute", sound=0)
    sound = make_audio(tmp_path / "tone.wav", seconds=1.5)
    array = {"path": None, "array": np.zeros((2, 48_000), np.float32), "sampling_rate": 48_000}  # two channels, 1 s
    picture = Image.new("CMYK", (60, 40))
    visuals = [str(clip), [picture, [array]], None, sound, str(mute)]
    asked = question("task/0", "What?", visuals, {"max_new_tokens": 4}, handling)
    assert asked.trouble == "" and asked.sample.question == "What?"
    video, image, first, second, silent = asked.sample.media
    assert [m.kind for m in asked.sample.media] == ["video", "image", "audio", "audio", "video"]
    assert (video.frame_count, video.fps, video.height, video.width) == (24, 8.0, 84, 84)
    assert video.audio_in_video and abs(video.audio_samples - 48_000) < 2000 and (tmp_path / video.audio_path).is_file()
    assert (image.height, image.width) == (40, 60) and Image.open(tmp_path / image.path).mode == "RGB"
    assert (first.audio_samples, second.audio_samples) == (16_000, 24_000)
    assert not silent.audio_in_video and silent.audio_path is None


def test_places_in_the_text_become_the_engines(tmp_path, handling):
    tone, picture = str(make_audio(tmp_path / "a.wav")), Image.new("RGB", (40, 40))
    asked = question("t/0", "Is <media_0> louder than <media_1>?", [tone, picture], {}, handling)
    assert asked.sample.question == f"Is {MEDIUM} louder than {MEDIUM}?"
    asked = question("t/1", "Is <media_0> loud?", [tone, picture], {}, handling)  # one place for two: media come first
    assert asked.sample.question == "Is <media_0> loud?"


def test_a_medium_that_cannot_be_used_is_named(tmp_path, handling):
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    for visual, said in ((tmp_path / "absent.mp4", "missing"), (tmp_path / "broken.mp4", "not_media")):
        trouble = question("t/0", "What?", [str(visual)], {}, handling).trouble
        assert str(visual) in trouble and said in trouble
    assert "is no picture, sound or path" in question("t/0", "What?", [7], {}, handling).trouble
    with pytest.raises(Refused):
        source({"array": np.zeros(3)})
    sounds = {"not finite": [0.1, np.nan] * 400, "one is the other's opposite": np.outer([1, -1], np.ones(800)),
              "can't be read": "no samples", "claims 1 samples": np.ones(800)}  # fmt: skip
    for said, samples in sounds.items():
        sound = {"array": samples, "sampling_rate": 1 if "claims" in said else 16_000}
        assert said in question("t/0", "What?", [sound], {}, handling).trouble
    assert "32-bit numbers" in question("t/0", "What?", [Image.new("F", (40, 40))], {}, handling).trouble


def test_pictures_are_laid_on_white_and_clips_shown_upright(tmp_path, handling):
    deep = Image.fromarray(np.full((40, 60), 65535, np.uint16))
    turned = write_film(tmp_path / "a.mp4", matrix=(0, 1, -1, 0), aspect=Fraction(2))
    visuals = [Image.new("RGBA", (60, 40)), Image.new("LA", (60, 40)), deep, str(turned)]
    asked = question("t/0", "What?", visuals, {}, replace(handling, codec="needed"))
    assert asked.trouble == ""
    *pictures, film = asked.sample.media
    assert all(decode_image(tmp_path / picture.path).min() == 255 for picture in pictures)
    assert (film.height, film.width) == (128, 48)


def test_main_says_how_it_is_called_and_what_is_missing(capsys, monkeypatch):
    assert main(["recipe=tiny_avatar"]) == 2 and "-- --tasks" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "lmms_eval.__main__", None)  # as where it is not installed
    assert main(["model=assets/tiny_base", "recipe=tiny_avatar", "--", "--tasks", "mvbench"]) == 2
    assert "requirements-lmms.txt" in capsys.readouterr().err


# ---- the engine behind it --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(world):
    """A random model, and held-out clips with their sound in the container, as benchmarks have it."""
    (world / "videos").mkdir()
    return world


def clips(world: Path) -> list[tuple]:
    """(sample, its clip with sound) of four held-out samples."""
    samples = load_manifest(world / "data" / "manifest.jsonl", split="eval")
    found = []
    for sample in [s for s in samples if s.media[0].audio_path][:4]:
        (media,) = sample.media
        path = world / "videos" / f"{sample.id}.mkv"
        with av.open(str(path), "w") as out:
            inputs = [av.open(str(world / "data" / name)) for name in (media.path, media.audio_path)]
            streams = [out.add_stream_from_template(source.streams[0]) for source in inputs]
            for opened, stream in zip(inputs, streams, strict=True):
                for packet in opened.demux():
                    if packet.dts is not None:
                        packet.stream = stream
                        out.mux(packet)
        found.append((sample, path))
    assert len(found) == 4
    return found


def shown(sample) -> str:
    return "\n".join([sample.question, *(f"{a}. {b}" for a, b in zip("ABCDEF", sample.choices, strict=False))])


def expected(responder: Responder, world: Path, samples) -> list[str]:
    """What the engine answers to the manifest's own samples."""
    from megatron_avatar.data.loader import MediaLoader
    from megatron_avatar.training.evaluate import answers

    loader = MediaLoader(responder.builder, world / "data", 0, 60.0)
    rows = answers(responder.policy, responder.backend, responder.builder, loader, samples,
                   sampling=SamplingConfig(max_new_tokens=8))  # fmt: skip
    return [final_answer(answer.text) or NO_ANSWER for (answer,) in rows]


@pytest.fixture
def responder(world):
    config = load_config([
        "recipe=tiny_avatar", f"model.path={world / 'base'}", "data.manifest=-", "output_dir=-", "data.workers=0",
        "rl.sampling.max_new_tokens=12",
    ])  # fmt: skip
    responder = Responder(config)
    yield responder
    responder.close()


@pytest.mark.slow
def test_requests_get_the_answers_of_the_training_engine(world, responder, capsys):
    pairs = clips(world)

    def ask(name: str, sample, *visuals, **generation):
        return responder.question(f"clips/{name}", shown(sample), [str(v) for v in visuals], generation)

    asked = [ask(sample.id, sample, path, max_new_tokens=8) for sample, path in pairs]
    broken = ask("broken", pairs[0][0], world / "absent.mkv", max_new_tokens=8)
    answers = responder.answer([*asked[:2], broken, *asked[2:]], batch=2)
    wanted = expected(responder, world, [sample for sample, _ in pairs])
    assert answers == [*wanted[:2], NO_ANSWER, *wanted[2:]] and len(set(wanted)) > 1
    assert "clips/broken/1: not answered: " in capsys.readouterr().err

    sample, path = pairs[0]
    assert responder.answer([ask("blind", sample, max_new_tokens=8)]) != answers[:1]  # the clip was seen
    short = responder.answer([ask("short", sample, path, max_new_tokens=1, temperature=0.7)])  # greedy all the same
    assert short != answers[:1] and answers[0].startswith(short[0])
    drawn = [ask("drawn", sample, path, do_sample=True, temperature=3.0) for _ in range(4)]
    assert len(set(responder.answer(drawn, batch=4))) > 1  # repeats of one request are drawn anew


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None,
    reason="needs lmms-eval: pip install --no-deps -r requirements-lmms.txt",
)
def test_lmms_eval_scores_the_model_on_two_ranks(world, responder, tmp_path):
    pairs = clips(world)
    right = expected(responder, world, [s for s, _ in pairs])
    rows = [{"question": shown(s), "video": str(path), "expected": text if i else "something else"}
            for i, ((s, path), text) in enumerate(zip(pairs, right, strict=True))]  # fmt: skip
    (tmp_path / "items.json").write_text(json.dumps(rows))
    (tmp_path / "clips.yaml").write_text(SYNTHETIC.replace("FOLDER", str(tmp_path)))
    (tmp_path / "clips_utils.py").write_text(FUNCTIONS)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "eval.lmms", f"model={world / 'base'}", "recipe=tiny_avatar", "data.workers=0", "--",
        "--include_path", str(tmp_path), "--tasks", "synthetic_clips", "--batch_size", "4", "--verbosity", "DEBUG",
        "--log_samples", "--output_path", str(tmp_path / "out"),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    table = next(line for line in done.stdout.splitlines() if line.startswith("|synthetic_clips"))
    assert [cell.strip() for cell in table.split("|")][4:8] == ["accuracy", "↑", "0.75", "±"]  # all but the first
    (results,) = (tmp_path / "out").rglob("*_results.json")
    assert json.loads(results.read_text())["results"]["synthetic_clips"]["accuracy,none"] == 0.75
