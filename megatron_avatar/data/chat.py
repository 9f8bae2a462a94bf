"""Conversations as tokens: a chat template that is tried before it is used, and control tokens that it alone writes."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_avatar.config.families import Family
from megatron_avatar.records import MediaKind

log = logging.getLogger(__name__)
Message = dict[str, Any]
# What a template that prints, escapes or trims its content does not give back.
TRIED = 'It\'s "so":\n<b>\\n é {{ 问 }}</b> & more'
THINK = "<think>"
UNUSED = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # characters that Unicode keeps for programs' own use


def chat_template(family: Family) -> str:
    """Qwen's conversation format with a family's names for the tokens of media, and its system prompt where it has one:
    for tokenizers that bring no template, or one that can't hold such messages."""
    system = (
        "{% if loop.first and message['role'] != 'system' %}"
        f"<|im_start|>system\n{family.system}<|im_end|>\n{{% endif %}}"
    )
    return (
        "{% for message in messages %}"
        f"{system if family.system else ''}"
        "<|im_start|>{{ message['role'] }}\n"
        "{% for part in message['content'] %}"
        f"{{% if part['type'] == 'image' %}}{family.vision_start}{family.image}{family.vision_end}"
        f"{{% elif part['type'] == 'video' %}}{family.vision_start}{family.video}{family.vision_end}"
        f"{{% elif part['type'] == 'audio' %}}{family.audio_start}{family.audio}{family.audio_end}"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


class Chat:
    """Messages and texts as token ids. `placeholders`: the token that stands for each kind of medium.

    The tokenizer's own chat template is taken if it gives back the texts and media of a message; else the built-in one
    of the family, with a warning. Raises ValueError for a template that opens the assistant's reasoning itself: the
    completion would have no `<think>`.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, placeholders: Mapping[MediaKind, int], family: Family
    ) -> None:
        self.tokenizer, self.placeholders = tokenizer, dict(placeholders)
        control = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._control = re.compile(f"({'|'.join(map(re.escape, sorted(control, key=len, reverse=True))) or '(?!)'})")
        built_in = chat_template(family)
        own = tokenizer.chat_template
        self.template: str = own if isinstance(own, str) and own else built_in
        if own and (fault := self._fault()):
            where = tokenizer.name_or_path or "the tokenizer"
            log.warning("%s: its chat template %s; prompts are written in %s's format instead", where, fault,
                        family.name)  # fmt: skip
            self.template = built_in
        if self._rendered([{"role": "user", "content": [{"type": "text", "text": TRIED}]}]).rstrip().endswith(THINK):
            where = tokenizer.name_or_path or "the tokenizer"
            raise ValueError(
                f"{where}: its chat template ends in {THINK}, as a Thinking edition's, so a completion would lack it "
                "and could never earn the format reward: point model.path to the Instruct edition"
            )

    def prompt_ids(self, messages: list[Message], spread: Callable[[str], str] = str) -> list[int]:
        """Token ids of messages whose content is a list of parts, up to where the assistant speaks.

        Control tokens are those of the template and of `spread`, which may replace what it wrote for media; one that is
        spelled in a text stays text.
        """
        texts = [part["text"] for message in messages for part in message["content"] if part["type"] == "text"]
        if not any(map(self._control.search, texts)):
            return self.tokenizer(spread(self._rendered(messages)), add_special_tokens=False)["input_ids"]
        mark = next(sign for sign in UNUSED if not any(sign in text for text in texts))
        disarmed = [message | {"content": [self._disarmed(part, mark) for part in message["content"]]}
                    for message in messages]  # fmt: skip
        ids: list[int] = []
        for place, piece in enumerate(self._control.split(spread(self._rendered(disarmed)))):
            if place % 2:
                ids.append(int(self.tokenizer.convert_tokens_to_ids(piece)))  # type: ignore[arg-type]  # of one token
            elif piece:
                ids += self.text_ids(piece.replace(mark, ""))
        return ids

    def text_ids(self, text: str) -> list[int]:
        """Token ids of a text, in which nothing is a control token."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def _disarmed(self, part: dict[str, str], mark: str) -> dict[str, str]:
        """The part with `mark` behind the first character of every control token."""
        if part["type"] != "text":
            return part
        return part | {"text": self._control.sub(lambda token: token[0][0] + mark + token[0][1:], part["text"])}

    def _rendered(self, messages: list[Message]) -> str:
        return str(self.tokenizer.apply_chat_template(
            messages, chat_template=self.template, tokenize=False, add_generation_prompt=True
        ))  # fmt: skip

    def _fault(self) -> str:
        """What the template does to a message that prompts may hold; empty for one that holds them all."""
        if not isinstance(self.tokenizer.chat_template, str):
            return "is one of several"
        for kinds in ((), *((kind,) for kind in self.placeholders), tuple(self.placeholders)):
            content: list[dict[str, str]] = [*({"type": str(kind)} for kind in kinds), {"type": "text", "text": TRIED}]
            system: Message = {"role": "system", "content": [{"type": "text", "text": TRIED}]}
            user: Message = {"role": "user", "content": content}
            for messages in ([user], [system, user]):
                what = f"a message of {' and '.join((*kinds, 'text'))}"
                try:
                    text = self._rendered(messages)
                except Exception as error:  # as templates and Jinja raise
                    return f"fails on {what} ({type(error).__name__}: {error})"
                if text.count(TRIED) != len(messages):
                    return f"loses or changes the text of {what}"
                ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
                if [i for i in ids if i in self.placeholders.values()] != [self.placeholders[kind] for kind in kinds]:
                    return f"doesn't write one placeholder for each of {what}"
        return ""
