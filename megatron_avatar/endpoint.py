"""Chat models behind OpenAI-compatible HTTP endpoints: the judge, and the teachers that write hints, captions, traces.

Many questions are in flight at once, each under a deadline, with retries over all replicas of the server. A reply of
any form is an answer, or is counted and none. The key comes from the environment variable AVATAR_ENDPOINT_KEY alone.
Replies can be kept by content, so that none is paid twice.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import logging
import math
import operator
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from email.utils import formatdate, parsedate_to_datetime
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import httpx2 as httpx
import openai

from megatron_avatar.config.urls import KEY, addresses, mask
from megatron_avatar.files import append, unwritable

# Control tokens of the chat formats that servers read, as one may be spelled in a data set's question.
CONTROL = re.compile(r"<(?=\|[^\s<>|]{1,40}\|>|/?s>|(?:start|end)_of_turn>)|\[(?=/?INST\])", re.IGNORECASE)
MAX_REPLY = 2**20  # bytes of a response; no answer that we ask for is near it
BACKOFF_S = 0.5
log = logging.getLogger(__name__)
T = TypeVar("T")
Messages = list[dict[str, Any]]


class Replies:
    """Replies kept by the content of their questions: JSON lines in FOLDER/OWNER.jsonl; all owners' are read."""

    def __init__(self, folder: Path, owner: str, *, write: bool = True) -> None:
        self._known: dict[str, str] = {}
        self._path = folder / f"{owner}.jsonl" if write else None
        self._lock = threading.Lock()
        for path in sorted(folder.glob("*.jsonl")):
            with open(path, "rb") as file:
                for line in file:
                    try:
                        key, reply = operator.itemgetter("key", "reply")(json.loads(line))
                    except (ValueError, KeyError, TypeError, RecursionError):  # the torn end of a killed process
                        continue
                    if isinstance(reply, str) and not unwritable(reply):
                        self._known[key] = reply

    def get(self, key: str) -> str | None:
        return self._known.get(key)

    def put(self, key: str, reply: str) -> None:
        """Raises OSError where there is no room for it."""
        with self._lock:
            if self._path is not None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with open(self._path, "ab+", buffering=0) as file:
                    torn = file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n"  # by a kill
                    append(file, ("\n" if torn else "") + json.dumps({"key": key, "reply": reply}) + "\n")
            self._known[key] = reply


class Endpoint(Generic[T]):
    """Asks one chat model. `read` makes an answer of a reply's text, and raises ValueError for one that is unusable.

    `schema` is the JSON schema of a reply, which servers that can are asked to keep to. At most `concurrency` questions
    are in flight; a question has `deadline_s` seconds in all, for 1 + `retries` attempts, each at the next replica.
    Where there are several, one that hangs leaves half of that time for the next. A server that asks to wait is waited
    for, which is no attempt. `thinking`: reasoning that a server sends apart from the text stands in front of it, as
    <think>...</think>.
    """

    def __init__(
        self, address: str, model: str, read: Callable[[str], T], *, schema: dict[str, Any] | None = None,
        max_tokens: int = 512, temperature: float = 0.0, concurrency: int = 16, deadline_s: float = 60.0,
        retries: int = 3, replies: Replies | None = None, thinking: bool = False,
    ) -> None:
        self.address, self.model = address, model
        self._read, self._schema, self._max_tokens, self._temperature = read, schema, max_tokens, temperature
        self._deadline_s, self._retries, self._replies, self._thinking = deadline_s, retries, replies, thinking
        self._urls = addresses(address) if "://" in address else []  # a server may write it later
        self._clients: dict[str, openai.AsyncOpenAI] = {}
        self._turn = random.randrange(1000)
        self.failures: dict[str, int] = {}  # attempts that failed, by reason
        self._loop = asyncio.new_event_loop()
        self._slots = asyncio.Semaphore(concurrency)
        threading.Thread(target=self._loop.run_forever, name="endpoint", daemon=True).start()

    def submit(self, messages: Messages) -> Future[T | None]:
        """The answer to come; None once the deadline or the attempts are used up."""
        return asyncio.run_coroutine_threadsafe(self._answer(messages), self._loop)

    def ask(self, conversations: Iterable[Messages]) -> list[T | None]:
        """Answers in the order asked for; None for a question without a usable one."""
        return [future.result() for future in [self.submit(messages) for messages in conversations]]

    def wait_until_ready(self, wait_s: float, probe: Messages, read: Callable[[str], Any] | None = None) -> None:
        """Returns once every replica serves the model and answers `probe` so that `read` (the endpoint's own reader)
        understands it; learns whether they keep to a schema.

        Raises ConnectionError with the reason after `wait_s` seconds, ValueError at once where waiting can't help: the
        key is wrong, or as many replies are unusable as a question has attempts.
        """
        deadline = time.monotonic() + wait_s
        reason, unusable = "", 0
        while True:
            try:
                self._urls = addresses(self.address)
                for url in self._urls:
                    asyncio.run_coroutine_threadsafe(self._probe(url, probe, read or self._read), self._loop).result()
                return
            except Unusable as error:
                reason, unusable = str(error), unusable + 1
                if unusable > self._retries:
                    what = f"{mask(self.address)}: {self.model} answers, but not as it is asked to ({reason})"
                    raise ValueError(f"{what}: serve a model that keeps to the form") from None
            except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
                raise ValueError(f"{self.address} refuses the key ({_reason(error)}): export {KEY}=...") from None
            except (openai.OpenAIError, httpx.HTTPError, ValueError, TimeoutError) as error:
                if _reason(error) != reason:
                    reason = _reason(error)
                    log.warning("waiting up to %g s for %s: %s", wait_s, mask(self.address), reason)
            if time.monotonic() > deadline:
                raise ConnectionError(
                    f"{mask(self.address)} is not ready after {wait_s:g} s ({reason}): see that it runs, serves "
                    f"{self.model}, and can be reached from this node"
                )
            time.sleep(min(2.0, wait_s / 10))

    def close(self) -> None:
        async def end() -> None:
            for client in self._clients.values():
                await client.close()

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(timeout=5)
        self._loop.call_soon_threadsafe(self._loop.stop)

    # ---- in the loop's thread ------------------------------------------------------------------

    async def _answer(self, messages: Messages) -> T | None:
        key = hashlib.sha256(json.dumps([self.model, self._max_tokens, messages]).encode()).hexdigest()
        if self._replies is not None and (kept := self._replies.get(key)) is not None:
            try:
                return self._read(kept)
            except ValueError:  # read by another rule now
                pass
        try:
            async with self._slots, asyncio.timeout(self._deadline_s):
                turn, attempt = self._turn, 0
                self._turn += 1
                while attempt <= self._retries:
                    try:
                        if not self._urls:
                            self._urls = addresses(self.address)
                        patience = self._deadline_s / (2 if self._retries and len(self._urls) > 1 else 1)
                        async with asyncio.timeout(patience):
                            text = await self._chat(self._urls[(turn + attempt) % len(self._urls)], messages)
                        answer = self._read(text)
                    except (openai.OpenAIError, httpx.HTTPError, ValueError, TimeoutError) as error:
                        self._count(_reason(error))
                        if isinstance(error, openai.BadRequestError | openai.UnprocessableEntityError):
                            return None  # this question; asking again changes nothing
                        self._look_again()
                        asked = _asked_pause(error)
                        pause = max(asked, BACKOFF_S * 2**attempt * random.uniform(0.5, 1.5))
                        attempt += not asked
                        await asyncio.sleep(pause if attempt <= self._retries else 0.0)
                        continue
                    if self._replies is not None:
                        self._replies.put(key, text)
                    return answer
        except TimeoutError:
            self._count(f"no answer within {self._deadline_s:g} s")
        return None

    async def _chat(self, url: str, messages: Messages) -> str:
        options: dict[str, Any] = {}
        if self._schema is not None:
            form = {"name": "reply", "schema": self._schema, "strict": True}
            options["response_format"] = {"type": "json_schema", "json_schema": form}
        reply = await self._client(url).chat.completions.with_raw_response.create(
            model=self.model, messages=cast(Any, messages), max_tokens=self._max_tokens,
            temperature=self._temperature, **options,
        )
        text, reasoning = read_reply(reply.content)
        if self._thinking and reasoning and "<think>" not in text:
            return f"<think>{reasoning}</think>{text}"
        return text

    async def _probe(self, url: str, probe: Messages, read: Callable[[str], Any]) -> None:
        async with asyncio.timeout(self._deadline_s):
            text = await self._first(url, probe)
        try:
            read(text)
        except ValueError as error:
            raise Unusable(f"{error}, which begins {text[:80]!r}") from None

    async def _first(self, url: str, probe: Messages) -> str:
        """The reply to a first question, which shows whether the server knows schemas."""
        try:
            return await self._chat(url, probe)
        except openai.NotFoundError:
            raise ValueError(f"{url} serves {', '.join(await self._served(url))}, not {self.model}") from None
        except (openai.BadRequestError, openai.UnprocessableEntityError):
            if self._schema is None:
                raise
            schema, self._schema = self._schema, None  # a server that knows no schemas; replies are checked anyway
            try:
                return await self._chat(url, probe)
            except Exception:
                self._schema = schema
                raise

    async def _served(self, url: str) -> list[str]:
        """Names of some models that a server has."""
        try:
            listed = await self._client(url).models.with_raw_response.list()
            names = [name for entry in json.loads(listed.content)["data"] if isinstance(name := entry["id"], str)]
        except (openai.OpenAIError, httpx.HTTPError, ValueError, LookupError, TypeError, RecursionError):
            names = []  # some serve a model and cannot list it
        return names[:5] or ["other models"]

    def _client(self, url: str) -> openai.AsyncOpenAI:
        if url not in self._clients:
            # Redirects are not followed: the key goes nowhere else.
            http = httpx.AsyncClient(transport=_Bounded(), timeout=self._deadline_s, follow_redirects=False)
            self._clients[url] = openai.AsyncOpenAI(
                base_url=url, api_key=os.environ.get(KEY, "none"), max_retries=0, timeout=self._deadline_s,
                http_client=http,
            )
        return self._clients[url]

    def _look_again(self) -> None:
        """A server that was restarted elsewhere has written another address."""
        try:
            self._urls = addresses(self.address)
        except ValueError:
            pass

    def _count(self, reason: str) -> None:
        if not self.failures.get(reason):
            log.warning("%s: %s", mask(self.address), reason)
        self.failures[reason] = self.failures.get(reason, 0) + 1


class Unusable(ValueError):
    """A reply that came, and can't be used."""


def read_reply(body: bytes) -> tuple[str, str]:
    """(text, reasoning) of the body of a reply; the reasoning is "" unless the server sends it in a field of its own.

    Raises Unusable for a body of any other form, and for one without text.
    """
    try:
        reply = json.loads(body)
    except (ValueError, RecursionError):
        raise Unusable("a reply that is no JSON") from None
    message = _part(_part(_part(reply, "choices"), 0), "message")
    content = _part(message, "content")
    if isinstance(content, list):
        content = "".join(text for part in content if isinstance(text := _part(part, "text"), str))
    thoughts = [_part(message, name) for name in ("reasoning_content", "reasoning")]
    reasoning = next((thought.strip() for thought in thoughts if isinstance(thought, str)), "")
    if not isinstance(content, str) or not content.strip():
        raise Unusable("a reply of reasoning alone, cut before its answer" if reasoning else "an empty reply")
    if reason := unwritable(content + reasoning):
        raise Unusable(f"a reply that is no text: {reason}")
    return content, reasoning


def _part(value: Any, key: str | int) -> Any:
    """What stands at `key`; None where nothing does."""
    try:
        return value[key]
    except (LookupError, TypeError):
        return None


def body_of(reply: str) -> str:
    """What a model replies with, without the thoughts before it and the code fence around it."""
    text = reply.rpartition("</think>")[2].strip()
    for mark in "`~":
        fence = text[: len(text) - len(text.lstrip(mark))]
        if len(fence) >= 3 and len(text) > 2 * len(fence) and text.endswith(fence):
            return re.sub(r"\Ajson[5c]?\b", "", text[len(fence) : -len(fence)].lstrip(), flags=re.IGNORECASE).strip()
    return text


def _reason(error: Exception) -> str:
    """In few words, without URLs and without what the server wrote at length."""
    if isinstance(error, openai.APIStatusError):
        return f"HTTP {error.status_code}"
    if isinstance(error, openai.APITimeoutError | TimeoutError):
        return "too slow"
    if isinstance(error, Unusable):
        return str(error)
    cause = error.__cause__ if isinstance(error, openai.APIConnectionError) and error.__cause__ else error
    return mask(f"{type(cause).__name__}: {cause}".splitlines()[0][:160])


def _asked_pause(error: Exception) -> float:
    """Seconds to wait that a server asks for, in one of the forms of Retry-After; 0 where it doesn't."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    asked = headers.get("retry-after", "").strip()
    try:
        if "retry-after-ms" in headers:
            seconds = float(headers["retry-after-ms"]) / 1000
        elif "," in asked:  # a date, by the server's own clock
            now = headers.get("date") or formatdate(usegmt=True)
            seconds = (parsedate_to_datetime(asked) - parsedate_to_datetime(now)).total_seconds()
        else:
            seconds = float(asked or 0)
    except (ValueError, TypeError):
        return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0


class _Bounded(httpx.AsyncHTTPTransport):
    """Reads at most MAX_REPLY bytes of a response, and none that is packed: a server cannot fill the memory."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        request.headers["accept-encoding"] = "identity"
        response = await super().handle_async_request(request)
        if response.headers.get("content-encoding", "identity") != "identity":
            await response.aclose()
            raise httpx.ReadError("a packed response, which was not asked for", request=request)
        response.stream = _Counted(response.stream, request)
        return response


class _Counted(httpx.AsyncByteStream):
    def __init__(self, stream: Any, request: httpx.Request) -> None:
        self._stream, self._request = stream, request

    async def __aiter__(self):
        size = 0
        async for chunk in self._stream:
            size += len(chunk)
            if size > MAX_REPLY:
                raise httpx.ReadError(f"a response of more than {MAX_REPLY} bytes", request=self._request)
            yield chunk

    async def aclose(self) -> None:
        await self._stream.aclose()


def picture_part(jpeg: bytes) -> dict[str, Any]:
    """A JPEG as part of a message."""
    return {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()}}


def question(system: str, text: str, pictures: Sequence[bytes] = ()) -> Messages:
    """A conversation of one question: what to do, then pictures (JPEG) and text.

    A server's tokenizer would take a control token that is spelled in the text for one: it gets a blank behind its
    first character.
    """
    text = CONTROL.sub(lambda first: first[0] + " ", text)
    content = [*map(picture_part, pictures), {"type": "text", "text": text}]
    return [{"role": "system", "content": system}, {"role": "user", "content": content if pictures else text}]
