"""A model folder and a dataset that the tests of data_tools.prepare share."""

from __future__ import annotations

import pytest

from tests.data_tools.clips import make_clip, make_model, write_rows


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def avatar(tmp_path_factory):
    """An AVATAR-RL folder: stages 0 to 3 as the released trainer reads them, a clip that two rows share, a bad row."""
    folder = tmp_path_factory.mktemp("avatar")
    for name, form in (("a", "vp9_opus"), ("b", "h264_aac"), ("c", "mjpeg_mp3"), ("d", "h264_mp3")):
        make_clip(folder / "videos", name, form, sound=0 if name == "d" else None, seed=len(name) * ord(name) % 50)
    base = {"problem_type": "multiple_choice", "audio_cues": "a beep", "prompt_id": "p0"}
    question = "what moves ?\nA. red\nB. blue\n"
    chat = [{"role": "user", "content": f"<video><audio>{question}"}]
    reply = {"role": "assistant", "content": "<think>look twice</think><answer>B</answer>"}
    write_rows(folder / "stage0.jsonl", [
        base | {"messages": [*chat, reply], "videos": ["videos/a.webm"], "solution": "<answer>B</answer>"},
    ])  # fmt: skip
    write_rows(folder / "stage1.jsonl", [
        base | {"messages": chat, "videos": ["videos/b.mp4"], "solution": "<answer>B</answer>",
                "hint": ["look", "twice"]},
        base | {"prompt_id": "p1", "question": "what moves ?", "videos": ["videos/a.webm"], "solution": "blue",
                "problem_type": "free_form"},
        base | {"prompt_id": "p2", "messages": chat, "videos": ["videos/b.mp4"], "solution": "D"},
    ])  # fmt: skip
    write_rows(folder / "stage2.jsonl", [
        base | {"prompt_id": "p3", "question": "A ?", "videos": ["videos/c.avi"], "solution": "12 B",
                "problem_type": "numerical", "hint": "look twice"},
        base | {"prompt_id": "p3b", "question": " a  ?", "videos": ["videos/c.avi"], "solution": "12 b",
                "problem_type": "numerical"},
    ])  # fmt: skip
    write_rows(folder / "stage3.jsonl", [
        base | {"prompt_id": "p4", "question": "A ?", "videos": ["videos/d.mkv"], "solution": "x",
                "problem_type": "odd"},
        base | {"prompt_id": "p5", "question": "A ?", "videos": ["videos/none.mp4"], "solution": "x",
                "problem_type": "ocr"},
    ])  # fmt: skip
    return folder
