"""A benchmark's file is refused where it says what nobody can do; layers of files."""

import shutil

import pytest
from omegaconf import OmegaConf

from eval.asking import benchmark
from eval.asking.benchmark import load_benchmark
from eval.scoring import predictions
from eval.scoring.predictions import check_names

GOOD = {
    "title": "Made",
    "source": {"dataset": "owner/made", "files": ["*.json"], "items": 3},
    "records": {"id": "i", "question": "q", "answer": "a", "groups": {"task": "t"}},
}


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Writes a file beside _common.yaml in a folder of its own, and loads it."""
    shutil.copy(benchmark.FOLDER / "_common.yaml", tmp_path)
    for module in (benchmark, predictions):
        monkeypatch.setattr(module, "FOLDER", tmp_path)
    monkeypatch.setattr(benchmark, "load_benchmark", load_benchmark.__wrapped__)

    def load(changes, name="made", base=GOOD):
        OmegaConf.save(OmegaConf.merge(base, changes), tmp_path / f"{name}.yaml")
        made = benchmark.load_benchmark(name)
        check_names(made)
        return made

    return load


def test_a_file_changes_the_common_one_and_another_one_changes_it(written):
    made = written({"protocols": {"released": {"new_tokens": 7, "metric": {"choice": "exact"}}}})
    assert (made.name, made.protocols["released"].new_tokens, made.protocols["ours"].new_tokens) == ("made", 7, 2048)
    assert made.protocols["released"].metric["choice"] == made.protocols["released"].metric["math"] == "exact"
    other = written({"base": "made", "records": {"id": "other"}}, "other", {})
    assert (other.name, other.title, other.records.id, other.records.question) == ("other", "Made", "other", "q")
    assert other.protocols == made.protocols
    assert benchmark.names() == ["made", "other"]


@pytest.mark.parametrize(("changes", "said"), [
    ({"records": {"answer_is": "word"}}, "records.answer_is is 'word'; write one of as_is, letter"),
    ({"records": {"kind": "essay"}}, "records.kind is 'essay'; write one of choice, letters"),
    ({"records": {"kind": {"column": "k", "values": {"x": "essay"}}}}, "records.kind is 'essay'"),
    ({"records": {"columns": {"c": {"column": "a"}}}}, "records.columns.c needs `column`, and `values` or `take`"),
    ({"records": {"media": [{"film": "x"}]}}, "records.media: {'film': 'x'} needs one of video, image, audio"),
    ({"records": {"media": [{"video": "x", "from": "y"}]}}, "start, end and fps may follow"),
    ({"records": {"question": ["q"]}}, "question"),
    ({"record": {}}, "record"),
    ({"aggregate": {"over": "subject"}}, "aggregate.over is 'subject', which is no breakdown"),
    ({"protocols": {"theirs": {}}}, "protocols must be ours and released"),
    ({"protocols": {"ours": {"parser": {"choice": "guess"}}}}, "protocols.ours.parser.choice is 'guess'; write one of"),
    ({"protocols": {"ours": {"metric": {"choice": "bleu"}}}}, "protocols.ours.metric.choice is 'bleu'; write one of"),
    ({"protocols": {"ours": {"failed": "kept"}}}, "protocols.ours.failed is 'kept'; write one of wrong, dropped"),
    ({"protocols": {"released": {"left_out": ["text"]}}}, "protocols.released.left_out is 'text'; write one of choice"),
    ({"base": "", "protocols": {"ours": {}, "released": {}}}, "protocols.ours.parser lacks the kind 'choice'"),
])  # fmt: skip
def test_what_nobody_can_do_is_refused_with_file_and_key(written, changes, said):
    with pytest.raises(ValueError, match=r"made\.yaml: ") as error:
        written(changes)
    assert said in str(error.value)


@pytest.mark.parametrize("name", ["nothing", "_common", "../x"])
def test_an_unknown_benchmark_is_refused(name):
    with pytest.raises(ValueError, match=f"benchmark={name}: choose one of av_counting, "):
        load_benchmark(name)
