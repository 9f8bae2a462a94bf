"""Hints, captions and traces from an endpoint: a real server, media made on the spot."""

import base64
import json
import os
import resource
import signal
import subprocess
import sys
import time

import pytest

from data_tools import captions, hints, traces
from data_tools.prepare import __main__ as prepare
from megatron_avatar.data.manifest import load_manifest, write_manifest
from megatron_avatar.endpoint import Replies
from megatron_avatar.locks import held
from megatron_avatar.records import Media, Sample
from tests.data.media import make_audio, make_video
from tests.servers import ChatServer


@pytest.fixture
def manifest(tmp_path):
    make_video(tmp_path / "v.webm")
    make_audio(tmp_path / "v.flac", 2.0)
    (tmp_path / "bad.webm").write_bytes(b"no video at all")
    clip = Media("v.webm", "video", 16, 8.0, None, 84, 84, "v.flac", 32_000, True)
    lost = Media("bad.webm", "video", 16, 8.0, None, 84, 84)
    samples = [
        *(Sample(f"t{k}", "visual", "train", "f", f"how many ? {k}", f"{k}", "numerical", (), (clip,))
          for k in range(6)),
        Sample("given", "visual", "train", "f", "what ?", "red", "other", media=(clip,), hint="Look twice."),
        Sample("held", "visual", "eval", "f", "what ?", "red", "other", media=(clip,)),
        Sample("broken", "visual", "train", "f", "what ?", "red", "other", media=(lost,)),
        Sample("cold", "visual", "sft", "f", "what ?", "B", "multiple_choice", ("x", "y"), (clip,), audio_caption="A"),
    ]  # fmt: skip
    write_manifest(tmp_path / "manifest.jsonl", samples)
    return tmp_path / "manifest.jsonl"


@pytest.fixture
def serve():
    servers = []

    def serve(reply):
        servers.append(ChatServer(reply))
        return servers[-1]

    yield serve
    for server in servers:
        server.close()


def said(body):
    content = body["messages"][1]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def arguments(manifest, server, *more):
    return [str(manifest), "--endpoint", server.url, "--model", "judge", "--wait", "5", "--deadline", "5", *more]


def test_hints_are_written_where_none_is_and_leaks_are_refused(manifest, serve, capsys):
    def teach(body, number):
        text = said(body)
        if "how many ? 3" in text and "refused" not in text:
            return '{"hint": "Count: there are three."}'
        return '{"hint": "It is 4."}' if "how many ? 4" in text else '{"hint": "Listen after the flash."}'

    server = serve(teach)
    assert hints.main(arguments(manifest, server)) == 0
    samples = {s.id: s for s in load_manifest(manifest, check_media=False)}
    assert [s for s in samples if samples[s].hint] == ["t0", "t1", "t2", "t3", "t5", "given"]
    assert samples["t3"].hint == "Listen after the flash." and samples["given"].hint == "Look twice."
    report = json.loads((manifest.parent / "manifest.hints.json").read_text())
    assert report["refused attempts"] == {"names the number": 4} and report["refused rate"] == pytest.approx(4 / 9)
    assert report["outcomes"]["refused: names the number"] == 1 and report["outcomes"]["accepted"] == 5
    assert any(outcome.startswith("media: ") for outcome in report["outcomes"])
    body = next(r for r in server.requests if "how many ? 0" in said(r))
    pictures = [p for p in body["messages"][1]["content"] if p["type"] == "image_url"]
    assert 4 <= len(pictures) <= 8 and "Correct answer (secret): 0" in said(body)
    asked = len(server.requests)
    assert hints.main(arguments(manifest, server)) == 1  # only those that failed are asked about again
    assert all("how many ? 4" in said(r) for r in server.requests[asked + 1 :])


def test_captions_hear_all_of_the_sound_in_pieces(manifest, serve):
    server = serve(lambda body, n: '{"caption": "A steady tone."}')
    assert captions.main(arguments(manifest, server, "--seconds", "0.8")) == 0
    samples = {s.id: s for s in load_manifest(manifest, check_media=False)}
    assert samples["t0"].audio_caption == "From 0 s: A steady tone. From 0 s: A steady tone. From 1 s: A steady tone."
    assert samples["cold"].audio_caption == "A" and samples["broken"].audio_caption is None
    part = server.requests[1]["messages"][1]["content"][0]
    assert part["type"] == "input_audio" and base64.b64decode(part["input_audio"]["data"])[:4] == b"RIFF"


def test_traces_are_kept_where_their_answer_is_right(manifest, serve):
    replies = ["A", "<think>x</think><answer>A</answer>", "<think>y moves</think><answer>B</answer>"]
    server = serve(lambda body, n: replies[min(n - 1, 2)])  # the last for the first question, which has to be answered
    assert traces.main(arguments(manifest, server, "--sound")) == 0
    samples = {s.id: s for s in load_manifest(manifest, check_media=False)}
    assert samples["cold"].trace == replies[2] and samples["t0"].trace is None
    report = json.loads((manifest.parent / "manifest.traces.json").read_text())
    assert report["refused attempts"] == {"not in the format": 1, "wrong answer": 1}
    assert "B" not in said(server.requests[1]).split() and server.requests[1]["temperature"] == 0.7


def test_a_share_of_the_training_samples_becomes_a_cold_start(manifest, serve, capsys):
    server = serve(lambda body, n: "<think>I count.</think><answer>2</answer>")
    arguments = [f"input={manifest}", f"endpoint={server.url}", "teacher=judge"]
    assert prepare.main(["source=teacher", *arguments, "share=1.0"]) == 0
    samples = {s.id: s for s in load_manifest(manifest, check_media=False)}
    assert [i for i in samples if samples[i].trace] == ["t2"] and samples["t2"].split == "sft"
    assert samples["t1"].split == "train" and samples["held"].split == "eval"
    assert prepare.main(["source=teacher", *arguments, "shares=1"]) == 2 and "not shares" in capsys.readouterr().err


def test_a_killed_run_continues_where_it_stopped(manifest, serve):
    server = serve(lambda body, n: '{"hint": "Listen."}' if n < 4 or finish else "stall")
    finish = False
    before = manifest.read_bytes()
    command = [sys.executable, "-m", "data_tools.hints", *arguments(manifest, server, "--concurrency", "1")]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while len(server.requests) < 5 and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert manifest.read_bytes() == before
    finish, asked = True, len(server.requests)
    assert hints.main(arguments(manifest, server)) == 0
    assert len(server.requests) - asked == 1 + 3  # the health check, and those of six that had no hint yet


def test_reasoning_that_a_server_sends_apart_belongs_to_the_trace(manifest, serve, capsys):
    server = serve(lambda body, n: {"content": "\n\n<answer>B</answer>", "reasoning_content": "It goes left.\n"})
    assert traces.main(arguments(manifest, server)) == 0
    samples = {s.id: s for s in load_manifest(manifest, check_media=False)}
    assert samples["cold"].trace == "<think>It goes left.</think>\n\n<answer>B</answer>"
    manifest.write_text("".join(line for line in manifest.open() if '"cold"' not in line))
    server = serve(lambda body, n: {"content": "B", "reasoning": "It goes left."})
    assert traces.main(arguments(manifest, server, "--share", "1")) == 2  # and before anything is asked in earnest
    assert "not as it is asked to (a reply that is not <think>...</think><answer>" in capsys.readouterr().err
    assert len(server.requests) == 4


def test_two_tools_at_once_on_one_manifest_and_a_third_on_another(manifest, serve, capsys):
    server = serve(lambda body, n: '{"hint": "Listen."}')
    before = manifest.read_bytes()
    with held(manifest.with_name("manifest.jsonl.lock"), "the tool that writes captions"):
        assert hints.main(arguments(manifest, server)) == 2 and not server.requests
        assert "held by the tool that writes captions (process" in capsys.readouterr().err
        assert hints.main(arguments(manifest, server, "--out", str(manifest.with_name("other.jsonl")))) == 0
    assert manifest.read_bytes() == before
    assert hints.main(arguments(manifest, server)) == 0
    assert manifest.read_bytes() == manifest.with_name("other.jsonl").read_bytes() != before
    assert not [path for path in manifest.parent.iterdir() if path.suffix in (".lock", ".part")]


def test_after_room_was_made_the_manifest_is_as_if_there_had_been_room(manifest, serve, tmp_path_factory, capsys):
    clips = dict(zip("012345", "pqrstu", strict=True))  # a hint must not name the number
    server = serve(lambda body, n: json.dumps({"hint": f"Listen {'closely ' * 9}to {clips[said(body)[21]]}."}))
    other = tmp_path_factory.mktemp("whole")
    for path in manifest.parent.iterdir():
        (other / path.name).symlink_to(path)
    (other / "manifest.jsonl").unlink()
    (other / "manifest.jsonl").write_bytes(manifest.read_bytes())
    assert hints.main(arguments(other / "manifest.jsonl", server)) == 0
    kept, before = "manifest.hints/kept.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    reached = []
    for size in (200, (other / kept).stat().st_size, 3000):  # a hint, and the manifest
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            reached.append(hints.main(arguments(manifest, server)))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said_so = capsys.readouterr().err
    assert reached[:2] == [2, 2] and f"{manifest}'" in said_so, (reached, said_so)
    assert said_so.count("make room, or raise the limit, and run the same command again") == reached.count(2)
    assert hints.main(arguments(manifest, server)) == 0
    assert manifest.read_bytes() == (other / "manifest.jsonl").read_bytes()
    assert sorted((manifest.parent / kept).open()) == sorted((other / kept).open())
    assert not list(manifest.parent.glob("*.part"))


def test_a_text_that_no_file_can_hold_is_no_hint(manifest, serve, caplog):
    """Neither one that the server sends, nor one that an older version has kept, nor one of the manifest's own."""
    odd = {"id": "odd", "stage": "s", "split": "eval", "family": "f", "question": "?", "answer": "a\ud83d",
           "problem_type": "other"}  # fmt: skip
    manifest.write_text("\ufeff" + manifest.read_text() + json.dumps(odd) + "\n")
    server = serve(lambda body, n: '{"hint": "Listen."}' if n % 2 == 0 else '{"hint": "Watch the \\ud83d blocks."}')
    assert hints.main(arguments(manifest, server)) == 0
    kept = manifest.with_name("manifest.hints") / "kept.jsonl"
    assert hints.main(arguments(manifest, server)) == 1  # only the broken clip
    assert "line 11: a text is broken" in caplog.text
    samples = {s.id: s for s in load_manifest(manifest, check_media=False)}
    assert {s.hint for s in samples.values()} == {None, "Listen.", "Look twice."} and samples["odd"].answer == "a\ufffd"
    kept.write_text(kept.read_text().replace("Listen.", "Listen \\ud83d."))
    assert Replies(kept.parent, "kept")._known == {}


def test_foreign_text_is_shown_as_it_is(manifest, serve, capsys):
    """Of brackets nothing is read as markup."""
    manifest.write_text(manifest.read_text().replace("bad.webm", "[INST]a[/INST].webm"))
    server = serve(lambda body, n: '{"hint": "Listen."}')
    assert hints.main(arguments(manifest, server)) == 0
    assert "media: [INST]a[/INST].webm" in " ".join(capsys.readouterr().out.split())


def test_mistakes_are_named(manifest, serve, tmp_path, capsys):
    server = serve(lambda body, n: 500)
    assert hints.main([str(manifest), "--endpoint", "http://me:word@host/v1"]) == 2
    assert hints.main([str(manifest), "--endpoint", server.url, "--model", "judge", "--wait", "0.2"]) == 2
    assert hints.main(arguments(tmp_path / "none.jsonl", server)) == 2
    errors = capsys.readouterr().err
    assert "export AVATAR_ENDPOINT_KEY" in errors and "word" not in errors
    assert "is not ready after 0.2 s" in errors and "no such manifest" in errors
