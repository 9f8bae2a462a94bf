"""The ladder: its answers by rules that the generator doesn't use, its chances, its traces, and the base's lessons."""

from collections import Counter, defaultdict

import numpy as np
import pytest

from data_tools.ladder import FULL, HINTED_FULL, LADDER, ask, draw_scene, said_looks
from data_tools.lessons import LONGEST, draw_lessons, draw_shown, words
from data_tools.synthesize import DESCRIBE, SIZES, draw_samples
from data_tools.world import COLUMNS, SLOTS
from megatron_avatar.rl.rewards import grade


@pytest.fixture(scope="module")
def study():
    return draw_samples(0, "study")


def solved(sample) -> str:
    """The answer from the ground truth, word for word as the question asks."""
    things, sound = sample.scene["things"], sample.scene["sound"]
    asked = sample.question.partition("\n")[0].rstrip("?")
    at = {COLUMNS[t["column"]]: f"{t['color']} {t['shape']}" for t in things}
    when = {t["when"]: f"{t['color']} {t['shape']}" for t in things}
    if sample.family == "tones":
        return " ".join(sound["items"])
    heard = {slot: kind for kind, slot in sound["items"]}
    if sample.family.startswith("see"):
        return " ".join(at[word] for word in asked.split() if word in COLUMNS)
    if sample.family.startswith("hear"):
        return " ".join(heard[word] for word in asked.split() if word in SLOTS)
    order = sorted(heard, key=lambda slot: asked.find(heard[slot]))
    return " ".join(when[slot] for slot in order if heard[slot] in asked)


def test_every_answer_follows_from_the_scene(study):
    asked = [sample for sample, _ in study if sample.family != DESCRIBE]
    assert len(asked) > 3000
    for sample in asked:
        assert solved(sample) == sample.answer, sample.id


def test_rungs_need_both_senses_and_more_looks_the_higher_they_are():
    by_rung = defaultdict(set)
    for rung in LADDER.values():
        by_rung[rung.rung].add(rung.needs)
    assert by_rung.keys() == {1, 2, 3}
    assert all({("video",), ("audio",)} <= needs for needs in by_rung.values())
    assert ("video", "audio") in by_rung[2] and ("video", "audio") in by_rung[3]
    rng = np.random.default_rng(0)
    for name, rung in LADDER.items():
        question = ask(name, rng)
        assert len(question.looks) == rung.looks
        assert not set(question.answer.split()) & set(question.hint.replace(".", "").split())


def test_a_guess_is_right_as_often_as_said(study):
    """Of the cold start's traces that take no look, and of the most frequent answer."""
    answers, guessed = defaultdict(Counter), defaultdict(list)
    for sample, _ in study:
        if sample.family == DESCRIBE:
            continue
        answers[sample.family][sample.answer] += 1
        if sample.trace and not said_looks(sample.trace):
            guessed[sample.family].append(grade(sample, sample.trace)["correct"])
    for name, rung in LADDER.items():
        most = answers[name].most_common(1)[0][1] / answers[name].total()
        assert most <= rung.chance + 4 * (rung.chance / answers[name].total()) ** 0.5 + 0.015, name
        hits = np.array(guessed[name], float)
        assert abs(hits.mean() - rung.chance) < 4 * (rung.chance / len(hits)) ** 0.5 + 1 / len(hits), name


def test_no_two_clips_are_alike_and_splits_have_their_sizes(study):
    assert len({scene.signature() for _, scene in study}) == len({s.id for s, _ in study}) == len(study)
    counts = Counter((sample.split, sample.family) for sample, _ in study)
    wanted = {(split, name): n for split, n in SIZES["study"].items() for name in LADDER}
    assert counts == wanted | {("sft", DESCRIBE): SIZES["study"]["sft"]}


def test_traces_look_in_full_as_rarely_as_their_rung_says(study):
    full = defaultdict(list)
    for sample, _ in study:
        if sample.split != "sft" or sample.family == DESCRIBE:
            assert (sample.trace is None) == (sample.split != "sft")
            continue
        rung, looks = LADDER[sample.family], said_looks(sample.trace)
        assert looks <= rung.looks
        evidence = sample.scene["evidence"]
        told = sample.trace.removeprefix("<think>").partition("so ")[0].rstrip()
        assert evidence.startswith(told) and (told == evidence) == (looks == rung.looks)
        if looks == rung.looks:
            assert grade(sample, sample.trace)["correct"]
        full["Hint:" in sample.question, rung.rung].append(looks == rung.looks)
    for (hinted, rung), flags in full.items():
        wanted = HINTED_FULL if hinted else FULL[rung]
        assert abs(np.mean(flags) - wanted) < 4 * (wanted * (1 - wanted) / len(flags)) ** 0.5, (hinted, rung)


def test_notes_beside_a_clip_are_not_about_it():
    """What is copied can't be seen there more often than by chance, one time in sixteen; what looks tell can."""
    rng, seen = np.random.default_rng(0), defaultdict(list)
    for _ in range(150):
        shown = draw_shown(rng)
        lessons = draw_lessons(shown, rng, (4, 3, 2))
        at = {COLUMNS[thing.column]: f"{thing.color} {thing.shape}" for thing in shown.scene.things}
        assert sum(bool(lesson.begun) for lesson in lessons) == 4
        assert sum(lesson.request.startswith("Describe: ") for lesson in lessons) == 3
        for lesson in lessons:
            assert lesson.request.endswith("?") == bool(lesson.begun)
            if not lesson.request.startswith(("Describe what is ", "What is ")):
                continue
            told = lesson.begun.removesuffix(" so") or lesson.told
            for column, *thing in (part.split() for part in told.split(". ")):
                if column in at and len(thing) == 2 and shown.on_ladder:
                    seen[bool(lesson.begun)].append(" ".join(thing).rstrip(".") == at[column])
    assert all(seen[False]) and len(seen[False]) > 50
    assert np.mean(seen[True]) < 0.2 and len(seen[True]) > 50
    lists = [words(rng) for _ in range(200)]
    assert {len(lesson.told.split()) for lesson in lists} == set(range(1, LONGEST + 1))
    assert all(lesson.request == f"Describe: {lesson.told}" for lesson in lists)


def test_when_a_sound_is_heard_is_asked_of_the_clip_itself():
    rng, asked = np.random.default_rng(1), 0
    for _ in range(60):
        shown = draw_shown(rng)
        slots = dict(shown.scene.sound.items) if shown.scene.sound.form == "slots" else {}
        for lesson in draw_lessons(shown, rng, (4, 3, 2)):
            if lesson.request.startswith("Describe when the "):
                kind = lesson.request.removeprefix("Describe when the ").removesuffix(" sounds.")
                assert lesson.told == f"{kind} {slots[kind]}."
                asked += 1
    assert asked > 20


def test_tones_are_heard_only_where_they_are_asked_for(study):
    for sample, scene in study:
        assert (scene.sound.form == "pattern") == (sample.family == "tones")
    assert draw_scene(np.random.default_rng(0)).sound.form == "slots"
