"""The model class that lmms-eval builds for `--model megatron_avatar`; eval.lmms hands it the engine."""

from __future__ import annotations

from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms

from eval.lmms_engine import Responder


class MegatronAvatar(lmms):
    """Answers generate_until requests; `responder` is set before lmms-eval builds its model from a string."""

    responder: Responder

    def __init__(self, batch_size: int | str = 1, **_: Any):
        super().__init__()
        self.batch_size = int(batch_size)
        self.device = self.responder.backend.device  # lmms-eval counts documents there

    def generate_until(self, requests: list[Instance]) -> list[str]:
        questions = []
        for context, generation, doc_to_visual, doc, task, split in (request.args for request in requests):
            visuals = doc_to_visual(self.task_dict[task][split][doc]) if callable(doc_to_visual) else None
            questions.append(self.responder.question(f"{task}/{doc}", context, visuals, generation))
        return self.responder.answer(questions, self.batch_size)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("megatron_avatar writes its answers: choose tasks with output_type generate_until")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("megatron_avatar answers one turn: choose tasks with output_type generate_until")
