"""`ChatClient`: asks a language model behind an OpenAI-compatible endpoint: retries, time limits, a cache, the cost.

In: a question, and a function that reads the answer and raises ValueError where it cannot. Out: what that function made
of the answer, and the text; ChatFailure when there was none that it can read after all retries. Answers are kept on
disk, so a resumed run pays once. HTTP of the standard library, in threads that all clients of an endpoint share.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import http.client
import json
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rewards.base import Counters
from rewards.daemon_threads import DaemonThreads

_RETRIED_CODES = (408, 409, 425, 429, 500, 502, 503, 504)
_BACKOFF_S, _LONGEST_BACKOFF_S = 0.5, 30.0
_V = TypeVar("_V")


class ChatFailure(Exception):
    """No answer that can be read after all retries."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """body: of every request, but for the messages. timeout_s: of one request, from its start to the end of the answer.
    concurrency: requests at one time, of all clients in this process together. usd_per_million: prompt and completion
    tokens."""

    url: str
    body: dict[str, Any]
    key: str | None
    timeout_s: float
    retries: int
    concurrency: int
    usd_per_million: tuple[float, float]


@dataclass(frozen=True, slots=True)
class ChatClient:
    """cache: the folder where answers are kept, by the hash of everything that went into the request, or None.
    counters: of calls, cached, retries, prompt_tokens, completion_tokens, cost_usd."""

    endpoint: Endpoint
    cache: str | None
    counters: Counters

    async def ask(self, question: str, read: Callable[[str], _V]) -> tuple[_V, str]:
        """What `read` makes of the model's text, and the text."""
        threads = _endpoint_threads(self.endpoint.url, self.endpoint.concurrency)
        return await asyncio.get_running_loop().run_in_executor(threads, self._ask, question, read)

    def _ask(self, question: str, read: Callable[[str], _V]) -> tuple[_V, str]:
        body = {**self.endpoint.body, "messages": [{"role": "user", "content": question}]}
        payload = json.dumps(body, sort_keys=True).encode()
        name = hashlib.sha256(self.endpoint.url.encode() + b"\n" + payload).hexdigest()
        path = Path(self.cache) / name[:2] / f"{name}.json" if self.cache is not None else None
        kept = _read_kept(path)
        if kept is not None:
            with contextlib.suppress(ValueError):  # what cannot be read is asked for again
                verdict = read(kept)
                self.counters.add(cached=1)
                return verdict, kept
        verdict, answer, usage = self._ask_with_retries(payload, read)
        if path is not None:
            _keep(path, {"answer": answer, "usage": usage})
        return verdict, answer

    def _ask_with_retries(self, payload: bytes, read: Callable[[str], _V]) -> tuple[_V, str, dict[str, Any]]:
        """What was read, the model's text and its usage. Retries what may pass (busy, server errors, broken
        connections, an answer that cannot be read), waiting twice as long each time or as long as the server asks."""
        problem = ""
        for attempt in range(self.endpoint.retries + 1):
            if attempt:
                self.counters.add(retries=1)
            wait_s = min(_LONGEST_BACKOFF_S, _BACKOFF_S * 2**attempt) * (0.5 + random.random() / 2)
            try:
                answer, usage = _post(self.endpoint, payload)
                self._count(usage)
                return read(answer), answer, usage
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code}: {_start_of_body(error)}"
                if error.code not in _RETRIED_CODES:
                    break
                asked = error.headers.get("Retry-After", "")
                wait_s = min(_LONGEST_BACKOFF_S, float(asked)) if asked.isdigit() else wait_s
            except (OSError, http.client.HTTPException, ValueError) as error:
                problem = f"{type(error).__name__}: {error}"
            if attempt < self.endpoint.retries:
                threading.Event().wait(wait_s)
        raise ChatFailure(problem)

    def _count(self, usage: dict[str, Any]) -> None:
        tokens = [_whole(usage.get("prompt_tokens")), _whole(usage.get("completion_tokens"))]
        cost = sum(count * price for count, price in zip(tokens, self.endpoint.usd_per_million, strict=True)) / 1e6
        self.counters.add(calls=1, prompt_tokens=tokens[0], completion_tokens=tokens[1], cost_usd=cost)


_threads: dict[tuple[str, int], DaemonThreads] = {}
_threads_lock = threading.Lock()


def _endpoint_threads(url: str, concurrency: int) -> DaemonThreads:
    """The threads that ask this endpoint; its clients share them, so that the limit holds for all of them together."""
    with _threads_lock:
        if (url, concurrency) not in _threads:
            _threads[url, concurrency] = DaemonThreads(concurrency, "chat")
        return _threads[url, concurrency]


def _whole(value: Any) -> int:
    return value if isinstance(value, int) and value >= 0 else 0


def _read_kept(path: Path | None) -> str | None:
    if path is None or not path.exists():
        return None
    try:
        kept = json.loads(path.read_text())
    except ValueError:
        return None
    answer = kept.get("answer") if isinstance(kept, dict) else None
    return answer if isinstance(answer, str) else None


def _keep(path: Path, entry: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
    temporary.write_text(json.dumps(entry))
    temporary.replace(path)  # whole or not at all: ranks share the folder


def _start_of_body(error: urllib.error.HTTPError) -> str:
    try:
        return error.read(300).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return ""


def _read_until(deadline: float, response: http.client.HTTPResponse) -> bytes:
    """The body. The socket's own timeout is for each piece, and some proxies send blanks while they wait."""
    body = bytearray()
    while piece := response.read1(1 << 16):
        body += piece
        if time.monotonic() > deadline:
            raise TimeoutError("the answer was not complete in time (timeout_s)")
    return bytes(body)


def _post(endpoint: Endpoint, payload: bytes) -> tuple[str, dict[str, Any]]:
    headers = {"Content-Type": "application/json"}
    if endpoint.key is not None:
        headers["Authorization"] = f"Bearer {endpoint.key}"
    request = urllib.request.Request(endpoint.url, data=payload, headers=headers)
    deadline = time.monotonic() + endpoint.timeout_s
    with urllib.request.urlopen(request, timeout=endpoint.timeout_s) as response:
        reply = json.loads(_read_until(deadline, response))
    try:
        content = reply["choices"][0]["message"]["content"]
        usage = reply.get("usage") or {}
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"not a chat completion: {str(reply)[:200]}") from error
    if not isinstance(content, str) or not isinstance(usage, dict):
        raise ValueError("the completion has no text")
    return content, usage
