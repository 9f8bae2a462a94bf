"""The synthetic set: deterministic, resumable, balanced, without leakage, and answerable only by what it needs."""

import hashlib
import json
import sys
from collections import Counter, defaultdict

import numpy as np
import pytest

from data_tools import show
from data_tools.families import FAMILIES
from data_tools.synthesize import GUESSES, MARKER, SIZES, draw_samples, synthesize
from data_tools.world import COLUMNS, SHAPES, SLOTS, describe_sound, render_frames, render_sound
from megatron_avatar.data.decode import decode_audio, decode_frames
from megatron_avatar.data.manifest import load_manifest, sample_to_dict


@pytest.fixture(scope="module")
def demo():
    return draw_samples(0, "demo")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return synthesize(folder, 0, "tiny", processes=1, progress=False)


def test_a_set_depends_on_its_seed_alone(demo):
    again = draw_samples(0, "demo")
    assert [sample_to_dict(s) for s, _ in again] == [sample_to_dict(s) for s, _ in demo]
    other = draw_samples(1, "demo")
    assert not {c.seed for _, c in other} & {c.seed for _, c in demo}


def test_splits_share_no_clip(demo):
    seeds, clips = defaultdict(set), defaultdict(set)
    for sample, scene in demo:
        seeds[sample.split].add(scene.seed)
        seen_and_heard = frozenset(Counter(scene.things).items()), scene.sound  # not the generator's own signature
        clips[sample.split].add((sample.family, *seen_and_heard))
    assert len(seeds) == 3
    assert sum(map(len, seeds.values())) == len(set.union(*seeds.values())) == len(demo)
    assert sum(map(len, clips.values())) == len(set.union(*clips.values())) == len(demo)
    assert len({sample.id for sample, _ in demo}) == len(demo)


def test_the_most_frequent_answer_scores_near_chance(demo):
    answers = defaultdict(Counter)
    for sample, _ in demo:
        answers[sample.split, sample.family][sample.answer] += 1
    for (split, family), counts in answers.items():
        total = counts.total()
        assert counts.most_common(1)[0][1] <= -(-total // len(counts)), (split, family)
        assert counts.most_common(1)[0][1] / total <= FAMILIES[family].chance + 0.05, (split, family)


def test_counts_follow_the_size(demo):
    counts = Counter((s.split, s.family) for s, _ in demo)
    assert counts.keys() == {(split, name) for split in SIZES["demo"] for name in FAMILIES}
    assert {(split, counts[split, name]) for split in SIZES["demo"] for name in FAMILIES} == {
        ("sft", 320), ("train", 64), ("eval", 36),
    }  # fmt: skip


def _value(sample):
    return sample.choices["ABCD".index(sample.answer)] if sample.choices else sample.answer


def _solved(sample):
    """The answer worked out from what is seen and heard alone, by rules that the generator doesn't use."""
    scene = sample.scene
    things, sound = scene["things"], scene["sound"]
    heard = {slot: kind for kind, slot in sound["items"]} if sound["form"] == "slots" else {}
    times = ["early", "middle", "late"]
    match sample.family:
        case "what":
            asked = sample.question.rstrip("?").split()[-1]
            key, other = ("color", "shape") if "color" in sample.question else ("shape", "color")
            return [t[key] for t in things if t[other] == asked]
        case "count":
            return [str(len(things))]
        case "direction":
            return [t["when"] for t in things]
        case "order":
            place = {"first": 0, "second": 1, "last": -1}[sample.question.rstrip("?").split()[-1]]
            return [sorted(things, key=lambda t: times.index(t["when"]))[place]["shape"]]
        case "sync":
            return [t["shape"] for t in things if heard.get(t["when"], "-") in sample.question]
        case "beeps":
            return [str(len(sound["items"]))]
        case "change":
            return ["yes" if sound["form"] == "change" else "no"]
        case "presence":
            return ["no" if sound["form"] == "none" else "yes"]
        case "next":
            tones = list(sound["items"])
            period = next(p for p in (2, 3, 4) if all(a == b for a, b in zip(tones, tones[p:], strict=False)))
            return [tones[5 - period]]
        case "where":
            return [COLUMNS[t["column"]] for t in things if heard.get(t["when"], "-") in sample.question]
        case "source":
            return [t["shape"] for t in things if heard.get(t["when"], "-") in sample.question]


def test_every_question_has_one_answer_and_the_scene_gives_it(demo):
    for sample, _ in demo:
        assert _solved(sample) == [_value(sample)], sample.id


def test_a_missing_modality_leaves_chance(demo):
    """Grouped by all that is left in question and picture (or sound), no answer is much more likely than chance."""
    for name, family in FAMILIES.items():
        if len(family.needs) < 2:
            continue
        mute, blind = [], []
        for sample, scene in demo:
            if sample.family == name:
                assert sample.scene["needs"] == ["video", "audio"]
                flashing = [t for t in scene.things if t.when]
                mute.append(sum(t.shape == _value(sample) or COLUMNS[t.column] == _value(sample) for t in flashing))
                blind.append(_value(sample))
                assert len(flashing) == len(scene.things) == 3 and len({t.when for t in flashing}) == 3
        assert set(mute) == {1}, "each of three things may be the answer when nothing is heard"
        values = Counter(blind)
        assert len(values) == len(COLUMNS if name == "where" else SHAPES) and max(values.values()) / len(blind) < 0.4


def test_needs_of_one_modality_are_met_by_it_alone(demo):
    """Families about sound see unrelated pictures, families about pictures hear unrelated sound."""
    for name, family in FAMILIES.items():
        rows = [(s, c) for s, c in demo if s.family == name]
        if family.needs == ("audio",):
            other = [(len(c.things), c.things[0].act) for _, c in rows]
        elif family.needs == ("video",):
            other = [describe_sound(c.sound).split()[0] for _, c in rows]
        else:
            continue
        by_other = defaultdict(Counter)
        for key, (sample, _) in zip(other, rows, strict=True):
            by_other[key][_value(sample)] += 1
        guessed = sum(max(c.values()) for c in by_other.values()) / len(rows)
        shuffled = []
        rng = np.random.default_rng(0)
        values = [_value(s) for s, _ in rows]
        for _ in range(200):
            table = defaultdict(Counter)
            for key, value in zip(other, rng.permutation(values), strict=True):
                table[key][value] += 1
            shuffled.append(sum(max(c.values()) for c in table.values()) / len(rows))
        assert guessed <= np.quantile(shuffled, 0.999) + 0.02, name


def test_traces_and_judge_words_agree_with_the_scene(demo):
    for sample, _ in demo:
        assert (sample.trace is not None) == (sample.split == "sft")
        assert sample.hint and _value(sample) not in sample.hint.lower().split()
        trace = sample.trace or f"<think>{sample.scene['evidence']}</think><answer>{sample.answer}</answer>"
        if trace.startswith("<think>so "):  # a guess
            continue
        words = set(trace.replace(".", " ").replace("<", " ").replace(">", " ").split())
        assert trace.endswith(f"</think><answer>{sample.answer}</answer>")
        for name, rule in sample.scene["judge"].items():
            assert not words & set(rule["contradict"]), (sample.id, name)
            if sample.stage == "localisation":
                assert rule["expect"] and set(rule["expect"]) <= words, (sample.id, name)


def test_half_of_the_traces_without_a_hint_guess_and_any_answer_is_as_likely(demo):
    traces = [s for s, _ in demo if s.split == "sft"]
    guessed = [s for s in traces if s.trace.startswith("<think>so ")]
    plain = [s for s in traces if "Hint:" not in s.question]
    assert {s.id for s in guessed} <= {s.id for s in plain} and abs(len(guessed) / len(plain) - GUESSES) < 0.03
    for name, family in FAMILIES.items():
        rows = [s for s in guessed if s.family == name]
        right = sum(s.trace.endswith(f"<answer>{s.answer}</answer>") for s in rows)
        answers = Counter(len(s.choices) or len(family.answers) for s in rows)
        expected = sum(n / of for of, n in answers.items())
        assert abs(right - expected) < 4 * sum(n * (of - 1) / of**2 for of, n in answers.items()) ** 0.5
        said = Counter(s.trace.removesuffix("</answer>").rpartition(">")[2] for s in rows)
        assert len(said) == max(answers), (name, "every possible answer is guessed")
        for sample in rows:  # in the form of a trace that looks
            said, letter = sample.trace.removeprefix("<think>so ").removesuffix("</answer>").split(".</think><answer>")
            assert said == (f"{sample.choices['ABCD'.index(letter)]} is {letter}" if sample.choices else letter)


def test_a_trace_ends_with_the_thing_that_the_answer_is_about(demo):
    """Nothing is told beyond it, so that going on and stopping early are both mistakes that a reward can tell."""
    for sample, _ in demo:
        if sample.family in ("what", "order", "sync", "where", "source"):
            *before, last = sample.scene["evidence"].rstrip(".").split(". ")
            assert _value(sample) in last.split(), sample.id
            named = [sum(c in t.split() for c in SHAPES) for t in before]
            assert sum(named) < len(sample.scene["things"]), sample.id


def test_hints_say_where_or_when_and_a_share_of_traces_has_seen_them(demo):
    seen = Counter()
    for sample, _ in demo:
        timed = sample.family in ("sync", "where", "source")
        if timed:
            when = next(w for w in SLOTS if w in sample.hint)
            heard = {slot: kind for kind, slot in sample.scene["sound"]["items"]}
            assert heard[when] in sample.hint and heard[when] in sample.question
        assert sample.question.endswith(f"Hint: {sample.hint}") == ("Hint:" in sample.question)
        seen[sample.split == "sft" and not sample.choices, "Hint:" in sample.question] += 1
    assert seen[True, True] == seen[True, False] > 0 and seen[False, True] == 0


def test_the_manifest_validates_and_files_hold_what_it_says(tiny):
    samples = load_manifest(tiny)
    assert {s.split for s in samples} == {"sft", "train", "eval"}
    scenes = {s.id: c for s, c in draw_samples(0, "tiny")}
    for sample in samples[::5]:
        media, scene = sample.media[0], scenes[sample.id]
        frames = decode_frames(tiny.parent / media.path, np.arange(media.frame_count), "pyav")
        assert np.abs(frames.astype(int) - render_frames(scene)).mean() < 6
        sound = render_sound(scene)
        assert (sound is None) == (media.audio_path is None) == (not media.audio_in_video)
        if sound is not None:
            np.testing.assert_allclose(decode_audio(tiny.parent / media.audio_path), sound, atol=1e-4)


def _digests(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted((folder / "clips").iterdir())}


def test_an_interrupted_run_resumes_to_the_same_bytes(tiny):
    folder = tiny.parent
    before, clips = _digests(folder), sorted((folder / "clips").glob("*.webm"))
    assert len(set(before.values())) == len(before), "no two files are equal"
    kept = clips[0].stat().st_mtime_ns
    (folder / MARKER).unlink()
    tiny.unlink()
    for clip in clips[1::2]:
        clip.unlink()
    synthesize(folder, 0, "tiny", processes=1, progress=False)
    assert _digests(folder) == before
    assert clips[0].stat().st_mtime_ns == kept
    with pytest.raises(ValueError, match="other settings"):
        synthesize(folder, 1, "tiny", processes=1, progress=False)


def test_show_prints_a_sample(tiny, monkeypatch, capsys):
    sample = load_manifest(tiny)[0]
    monkeypatch.setattr(sys, "argv", ["show", "sample", sample.id, "--manifest", str(tiny)])
    show.main()
    printed = capsys.readouterr().out
    assert json.loads(printed[: printed.rindex("}") + 1])["id"] == sample.id
    assert "16 frames" in printed and "84x84" in printed
