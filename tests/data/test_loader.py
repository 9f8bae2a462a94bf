"""Workers that hang, crash and refuse; the cache; the order of samples."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from dataclasses import dataclass, replace

import av
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_avatar.config.schema import DataConfig
from megatron_avatar.data.loader import MediaLoader, SampleOrder
from megatron_avatar.data.prompt import PromptBuilder
from megatron_avatar.records import Media, Prompt, Sample
from tests.data.media import make_audio, make_config, make_tokenizer, make_video


def named(name, *media):
    return Sample(name, "1", "train", "f", "what moves ?", "A", "other", media=media, hint="look twice")


@dataclass
class Scripted:
    """A builder that does what the sample's id says; leaves a mark for every build."""

    marks: str

    def build(self, sample, root, variant="plain"):
        with open(self.marks, "a") as file:
            file.write(f"{sample.id} {variant} {os.getpid()}\n")
        if sample.id.startswith("hang"):
            time.sleep(1000)
        if sample.id.startswith("crash"):
            os.kill(os.getpid(), signal.SIGSEGV)
        if sample.id.startswith("refuse"):
            raise ValueError(f"{sample.id} is damaged; replace it")
        if sample.id.startswith("bug"):
            raise KeyError("ours")
        return Prompt(sample.id, variant, np.arange(3), np.zeros((3, 3), np.int64), pixels=torch.ones(10, 1176))


def requests(*names, variant="plain"):
    return [(named(name), variant) for name in names]


def built(path):
    return [tuple(line.split()[:2]) for line in path.read_text().splitlines()] if path.exists() else []


def gone(pids):
    """Wait until these processes have ended; one that never does meets the test's own timeout."""
    while any(os.path.exists(f"/proc/{pid}") for pid in pids):
        time.sleep(0.02)


@pytest.fixture
def marks(tmp_path):
    return tmp_path / "marks"


@pytest.fixture
def start(marks):
    loaders = []

    def start(workers, deadline_s=30.0, **options):
        loaders.append(MediaLoader(Scripted(str(marks)), ".", workers, deadline_s, **options))
        return loaders[-1]

    yield start
    for loader in loaders:
        loader.close()


def test_bad_samples_alone_are_set_aside(start, tmp_path):
    loader = start(2, deadline_s=3.0)
    names = ["a", "hang", "b", "crash", "c", "refuse", "d", "e"]
    loader.prefetch(requests(*names))
    assert not loader.quarantined  # only asking decides: prefetching must not change results
    prompts = loader.get(requests(*names))
    assert [p and p.sample_id for p in prompts] == ["a", None, "b", None, "c", None, "d", "e"]
    assert list(loader.quarantined) == ["hang", "crash", "refuse"]
    assert "not decoded within 3 s (data.decode_deadline_s)" in loader.quarantined["hang"]
    assert "crashed" in loader.quarantined["crash"]
    assert loader.quarantined["refuse"] == "refuse is damaged; replace it"
    again = len(built(tmp_path / "marks"))
    assert loader.get(requests("hang", "a", "crash"))[0] is None
    assert len(built(tmp_path / "marks")) == again  # neither retried nor decoded anew
    pids = [worker._process.pid for worker in loader._workers.values()]
    assert pids
    loader.close()
    loader.close()
    gone(pids)


def test_workers_leave_signals_to_the_trainer_and_bugs_surface(start):
    loader = start(1)
    loader.get(requests("a"))
    (pid,) = (worker._process.pid for worker in loader._workers.values())
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(pid, number)
    assert loader.get(requests("b"))[0].sample_id == "b" and not loader.quarantined
    assert loader._workers[0]._process.pid == pid
    os.kill(pid, signal.SIGKILL)  # between two samples: neither is to blame
    while loader._workers[0].is_idle():
        time.sleep(0.01)
    assert loader.get(requests("d"))[0].sample_id == "d" and not loader.quarantined
    with pytest.raises(RuntimeError, match="in a decode worker:(.|\n)*KeyError: 'ours'"):
        loader.get(requests("bug"))
    assert loader.get(requests("c"))[0].sample_id == "c"


def test_cache_is_bounded_and_keyed_by_variant(start, marks):
    one = 10 * 1176 * 4 + 12 * 8
    loader = start(0, cache_bytes=2 * one)
    first = loader.get(requests("a", "b"))
    assert loader.get(requests("a", "b"))[0] is first[0]
    loader.get(requests("a", variant="hinted"))  # pushes out the least recently used: a
    assert built(marks) == [("a", "plain"), ("b", "plain"), ("a", "hinted")]
    loader.get(requests("b"))
    assert len(built(marks)) == 3
    loader.get(requests("a"))
    assert built(marks)[3:] == [("a", "plain")]
    assert [p.sample_id for p in loader.get(requests("c", "d", "e", "c"))] == ["c", "d", "e", "c"]
    loader.prefetch(requests("z"))
    assert len(built(marks)) == 7 and len(loader._prompts) <= 2
    assert loader.get(requests("refuse", "refuse")) == [None, None]
    assert loader.quarantined == {"refuse": "refuse is damaged; replace it"}


@pytest.mark.parametrize("workers", [0, 1])
def test_what_frozen_encoders_gave_takes_the_place_of_media(start, marks, workers):
    """In the prompts themselves, in the memory that they take, and nowhere without embeddings."""
    one, small = 10 * 1176 * 4 + 12 * 8, 12 * 8 + 4 * 8 * 4
    loader = start(workers, cache_bytes=one + 3 * small)
    embedded = torch.ones(4, 8)
    for name in "abc":
        prompts = loader.get(requests(name))
        loader.keep(prompts, [embedded])
        assert prompts[0].embedded is embedded and prompts[0].pixels is None
    (text,) = loader.get(requests("text"))
    loader.keep([text], [None])
    assert text.pixels is not None
    assert [p.embedded is not None for p in loader.get(requests("a", "b", "c", "text"))] == [True, True, True, False]
    assert len(built(marks)) == 4 and loader._size == one + 3 * small
    loader.keep(prompts, [torch.zeros(1, 8)])
    assert prompts[0].embedded is embedded, "the first one stays"
    loader.get(requests("d"))  # pushes out the least recently used until there is room
    assert loader.get(requests("text"))[0].pixels is not None and len(built(marks)) == 6
    assert set(loader._sizes) == set(loader._prompts) and loader._size == sum(loader._sizes.values())


def test_real_media_in_workers_equal_in_process(tmp_path):
    make_video(tmp_path / "v.webm")
    make_audio(tmp_path / "a.flac")
    (tmp_path / "bad.webm").write_text("no video")
    good = Media("v.webm", "video", 16, 8.0, None, 84, 84, "a.flac", 32_000, True)
    wanted = [(named("x", good), "plain"), (named("x", good), "hinted"), (named("text"), "plain")]
    wanted.append((named("bad", Media("bad.webm", "video", 16, 8.0, None, 84, 84)), "plain"))
    data = DataConfig(instruction="", fps=4.0, frame_min_pixels=784, frame_max_pixels=7056)
    builder = PromptBuilder(make_tokenizer(), make_config(), data, 1000)
    loaders = [MediaLoader(builder, tmp_path, workers, 60.0) for workers in (0, 1)]
    for here, there in zip(*(loader.get(wanted) for loader in loaders), strict=True):
        assert (here is None) == (there is None)
        for name, value in vars(here).items() if here else ():
            other = getattr(there, name)
            assert type(value) is type(other)
            assert np.array_equal(value, other) if hasattr(value, "shape") else value == other
    assert loaders[0].quarantined == loaders[1].quarantined and "bad.webm" in loaders[0].quarantined["bad"]
    for loader in loaders:
        loader.close()


def test_a_program_that_forgets_to_close_still_ends(tmp_path):
    script = tmp_path / "forgets.py"
    script.write_text(
        textwrap.dedent("""
        import time
        from megatron_avatar.data.loader import MediaLoader
        from megatron_avatar.records import Prompt, Sample

        class Builder:
            def build(self, sample, root, variant):
                time.sleep(1000 if sample.id == "hang" else 0)
                return Prompt(sample.id, variant, None, None)

        def request(name):
            return Sample(name, "1", "train", "f", "q", "a", "other"), "plain"

        if __name__ == "__main__":
            loader = MediaLoader(Builder(), ".", 1, 1000.0)
            loader.get([request("a")])
            loader.prefetch([request("hang"), request("b")])
            print(loader._workers[0]._process.pid)
        """)
    )
    path = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stderr.decode()
    gone([int(done.stdout)])


names = st.lists(st.text(min_size=1, max_size=3), min_size=1, max_size=12, unique=True)


@given(names, st.integers(0, 9), st.lists(st.integers(0, 20), max_size=5))
def test_order_is_a_permutation_an_epoch_and_resumes(ids, seed, sizes):
    order = SampleOrder(ids, seed, "s")
    taken = [i for size in sizes for i in order.take(size)]
    assert taken == SampleOrder(reversed(ids), seed, "s").take(len(taken))
    for epoch in range(len(taken) // len(ids)):
        assert Counter(taken[epoch * len(ids) : (epoch + 1) * len(ids)]) == Counter(ids)
    resumed = SampleOrder(reversed(ids), seed, "s")  # the same samples in a manifest of another order
    resumed.load_state_dict(order.state_dict())
    assert resumed.take(30) == order.take(30)


def test_orders_differ_and_foreign_states_are_refused():
    ids = [str(i) for i in range(50)]
    orders = [SampleOrder(ids, 0, "a"), SampleOrder(ids, 1, "a"), SampleOrder(ids, 0, "b")]
    drawn = [tuple(order.take(50)) for order in orders] + [tuple(orders[0].take(50))]
    assert len(set(drawn)) == 4
    with pytest.raises(ValueError, match="other samples, seed or stage"):
        orders[0].load_state_dict(SampleOrder(ids[1:], 0, "a").state_dict())
    with pytest.raises(ValueError, match="stage a has no samples"):
        SampleOrder([], 0, "a")


def test_clips_are_decoded_ahead_by_dali_and_a_bad_one_spoils_no_other(tmp_path):
    """A worker takes several samples at once; the prompts are those of one at a time."""
    names = ["a", "cut", "b", "c", "gone", "d"]
    media = {}
    for k, name in enumerate(names):
        path = make_video(tmp_path / f"{name}.webm", frames=16 + k)
        media[name] = Media(path.name, "video", 16 + k, 8.0, None, 84, 84)
    cut = tmp_path / "cut.webm"
    cut.write_bytes(cut.read_bytes()[:400])
    (tmp_path / "gone.webm").unlink()
    samples = [(named(name, media[name]), "plain") for name in names]
    outcomes = {}
    for decoder in ("dali", "pyav"):
        builder = PromptBuilder(make_tokenizer(), make_config(), DataConfig(instruction="", decoder=decoder), 4096)
        assert builder.ahead == (4 if decoder == "dali" else 1)
        loader = MediaLoader(builder, tmp_path, 1, 30.0)
        loader.prefetch(samples)
        outcomes[decoder] = loader.get(samples)
        assert list(loader.quarantined) == ["cut", "gone"]
        loader.close()
    for one, other in zip(outcomes["dali"], outcomes["pyav"], strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one.pixels, other.pixels)


def test_where_several_are_made_at_once_the_guilty_one_alone_is_set_aside(marks):
    builder = Scripted(str(marks))
    builder.ahead, builder.announce = 4, announce
    loader = MediaLoader(builder, ".", 1, 1.0)
    names = ["a", "hang", "b", "crash", "c", "refuse", "d"]
    loader.prefetch(requests(*names))
    prompts = loader.get(requests(*names))
    assert [n for n, p in zip(names, prompts, strict=True) if p is None] == ["hang", "crash", "refuse"]
    assert list(loader.quarantined) == ["hang", "crash", "refuse"]
    loader.close()


def announce(requests, root):
    """Decodes nothing ahead."""


# ---- what a foreign file or text makes a decoder raise --------------------------------------------------------------


@pytest.mark.parametrize("error", [
    RuntimeError("libavif"), av.error.MemoryError(12, "a header claims it"), TypeError("a str"), KeyError("x"),
    OSError(36, "File name too long"), av.error.OSError(5, "Input/output error"), ZeroDivisionError(),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "x"),
])  # fmt: skip
def test_whatever_a_decoder_raises_sets_its_sample_aside_by_name(error, tmp_path, monkeypatch):
    def decode(*_, **__):
        raise error

    monkeypatch.setattr("megatron_avatar.data.prompt.decode_image", decode)
    data = DataConfig(frame_min_pixels=28 * 28, frame_max_pixels=84 * 84, instruction="")
    builder = PromptBuilder(make_tokenizer(), make_config(), data, 10_000)
    good, odd = named("good"), named("odd", Media("odd.png", "image", height=56, width=56))
    loader = MediaLoader(builder, tmp_path, 0, 10.0)
    assert [prompt is None for prompt in loader.get([(odd, "plain"), (good, "plain")])] == [True, False]
    assert "odd.png" in loader.quarantined["odd"] and type(error).__name__ in loader.quarantined["odd"]
    loader.close()


@pytest.mark.parametrize("error", [OSError(28, "No space left"), OSError(5, "Input/output error"), ImportError("PIL"),
                                   MemoryError("host memory")])  # fmt: skip
def test_what_is_this_machines_fault_sets_nothing_aside(error, tmp_path, monkeypatch):
    def decode(*_, **__):
        raise error

    monkeypatch.setattr("megatron_avatar.data.prompt.decode_image", decode)
    builder = PromptBuilder(make_tokenizer(), make_config(), DataConfig(instruction=""), 10_000)
    loader = MediaLoader(builder, tmp_path, 0, 10.0)
    with pytest.raises(type(error)):
        loader.get([(named("odd", Media("odd.png", "image", height=56, width=56)), "plain")])
    assert not loader.quarantined
    loader.close()


def test_odd_samples_are_set_aside_in_a_worker(tmp_path):
    """Real files and texts: a name too long, a NUL, a text without UTF-8, a sound declared longer than all memory."""
    make_video(tmp_path / "v.webm")
    clip = Media("v.webm", "video", 16, 8.0, None, 84, 84)
    data = DataConfig(instruction="", decoder="pyav", fps=4.0, frame_min_pixels=784, frame_max_pixels=7056)
    builder = PromptBuilder(make_tokenizer(), make_config(), data, 10_000)
    odd = [
        named("long", replace(clip, path="y" * 300)), named("nul", replace(clip, path="a\0b")),
        replace(named("text", clip), question="what \ud83d moves ?"),
        named("vast", Media("a", "audio", audio_samples=10**17)),
        named("gone", Media("gone.png", "image", height=56, width=56)),
    ]  # fmt: skip
    loader = MediaLoader(builder, tmp_path, 1, 60.0)
    prompts = loader.get([(sample, "plain") for sample in [*odd, named("good", clip)]])
    assert [prompt is None for prompt in prompts] == [True] * 5 + [False]
    assert loader.quarantined.keys() == {"long", "nul", "text", "vast", "gone"}
    loader.close()
