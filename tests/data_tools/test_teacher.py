"""Hints, captions and traces from an endpoint: a real server, media made on the spot."""

import base64
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from data_tools import captions, hints, traces
from data_tools.prepare import __main__ as prepare
from megatron_avatar.data.manifest import load_manifest, write_manifest
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
    server = serve(lambda body, n: "4" if "two and two" in said(body) else replies[min(n - 1, 2)])
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


def test_mistakes_are_named(manifest, serve, tmp_path, capsys):
    server = serve(lambda body, n: 500)
    assert hints.main([str(manifest), "--endpoint", "http://me:word@host/v1"]) == 2
    assert hints.main([str(manifest), "--endpoint", server.url, "--model", "judge", "--wait", "0.2"]) == 2
    assert hints.main(arguments(tmp_path / "none.jsonl", server)) == 2
    errors = capsys.readouterr().err
    assert "export AVATAR_ENDPOINT_KEY" in errors and "word" not in errors
    assert "is not ready after 0.2 s" in errors and "no such manifest" in errors
