"""A vLLM server over HTTP: requests with time-outs and retries, answers that are checked before anything uses them.

Requests go to the recipe's `vllm_server_url` and nowhere else: no proxy, no redirect. What comes back is data.
"""

import asyncio
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from .errors import RunError
from .sampler import Sample

ATTEMPTS = 4  # of a request that no server took; the pauses between them double from PAUSE seconds
PAUSE = 0.5
LARGEST = 1 << 28  # bytes of an answer
ABSURD = 1e30  # nats
REMEDY = "(re)start the server, then continue with --resume true"


class AnsweredError(RunError):
    """The server answered that it failed."""


class RefusedError(AnsweredError):
    """The server answered that the request is wrong (HTTP 4xx)."""


class VLLMServer:
    """The HTTP interface of one `vllm serve`, started with VLLM_SERVER_DEV_MODE=1."""

    def __init__(self, url: str, timeout: float):
        """`url`: http(s)://host[:port]; `timeout`: seconds without an answer after which the server has failed.

        Raises RunError for what is no such address.
        """
        try:
            parts = urlsplit(url)
            usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            usable = False
        if not usable:
            raise RunError(f"vllm_server_url is {url!r}: give http://host:port")
        if "@" in parts.netloc:  # it would stand in every message
            raise RunError(
                "vllm_server_url holds a user or a password: give http://host:port, and the key by VLLM_API_KEY"
            )
        self.url, self.host = url.rstrip("/"), parts.hostname
        self.port = parts.port or (443 if parts.scheme == "https" else 80)
        self._timeout = timeout
        key = os.environ.get("VLLM_API_KEY")  # the variable from which `vllm serve` takes its own
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    def get(self, path: str) -> Any:
        """What the server answers to GET `path`."""
        return asyncio.run(self._alone("GET", path, None))

    def post(self, path: str, body: dict | None = None) -> Any:
        """What the server answers to POST `path`."""
        return asyncio.run(self._alone("POST", path, body or {}))

    def post_each(
        self, path: str, bodies: Sequence[dict], *, at_once: int, on_answer: Callable[[int, Any], None]
    ) -> None:
        """Posts all `bodies`, `at_once` at a time; `on_answer(index, answer)` is called as answers come.

        Raises RunError when a request fails for good, or when no answer at all has come for the time-out.
        """
        asyncio.run(self._post_each(path, bodies, at_once, on_answer))

    async def _alone(self, method: str, path: str, body: dict | None) -> Any:
        async with self._session(1) as session:
            try:
                return await asyncio.wait_for(self._ask(session, method, path, body), self._timeout)
            except TimeoutError as error:
                raise self._silent(path) from error

    async def _post_each(
        self, path: str, bodies: Sequence[dict], at_once: int, on_answer: Callable[[int, Any], None]
    ) -> None:
        waiting = iter(enumerate(bodies))
        async with self._session(at_once) as session:
            running: dict[asyncio.Task, int] = {}

            def start() -> None:
                for index, body in waiting:
                    running[asyncio.create_task(self._ask(session, "POST", path, body))] = index
                    if len(running) == at_once:
                        return

            try:
                start()
                while running:
                    done, _ = await asyncio.wait(running, timeout=self._timeout, return_when=asyncio.FIRST_COMPLETED)
                    if not done:
                        raise self._silent(path)
                    for task in done:
                        on_answer(running.pop(task), task.result())
                    start()
            finally:
                for task in running:
                    task.cancel()
                await asyncio.gather(*running, return_exceptions=True)

    def _session(self, connections: int) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            headers=self._headers,
            connector=aiohttp.TCPConnector(limit=connections),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=min(30, self._timeout)),
            trust_env=False,
        )

    async def _ask(self, session: aiohttp.ClientSession, method: str, path: str, body: dict | None) -> Any:
        for attempt in range(ATTEMPTS):
            try:
                async with session.request(method, self.url + path, json=body, allow_redirects=False) as response:
                    status, content = response.status, await self._body(response, path)
                break
            except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, TimeoutError) as error:
                if attempt == ATTEMPTS - 1:
                    raise RunError(
                        f"the vLLM server {self.url} cannot be reached ({error or type(error).__name__}): {REMEDY}"
                    ) from error
                await asyncio.sleep(PAUSE * 2**attempt)
            except (aiohttp.ClientError, ValueError) as error:
                reason = _printable(str(error) or type(error).__name__)
                raise RunError(f"what answers at {self.url} is no vLLM server ({reason}): {REMEDY}") from error
        if status != 200:
            said = f"the vLLM server {self.url} answered {path} with HTTP {status}: {_message(content)}"
            raise RefusedError(said) if 400 <= status < 500 else AnsweredError(f"{said}; {REMEDY}")
        try:
            return json.loads(content) if content else None
        except (ValueError, RecursionError) as error:
            raise RunError(f"the vLLM server {self.url} answered {path} with what is not JSON: {error}") from error

    async def _body(self, response: aiohttp.ClientResponse, path: str) -> bytes:
        found = bytearray()
        async for chunk in response.content.iter_chunked(1 << 20):
            found += chunk
            if len(found) > LARGEST:
                raise RunError(f"the vLLM server {self.url} answered {path} with over {LARGEST >> 20} MiB: {REMEDY}")
        return bytes(found)

    def _silent(self, path: str) -> RunError:
        return RunError(
            f"the vLLM server {self.url} has not answered {path} for {self._timeout:g} s (vllm_timeout): {REMEDY}, or "
            "raise vllm_timeout"
        )


def _message(content: bytes) -> str:
    """What an error response says, in one short line."""
    text = content.decode("utf-8", "replace")
    with suppress(ValueError, LookupError, TypeError, RecursionError):
        text = str(json.loads(text)["error"]["message"])
    return _printable(text)


def _printable(text: str) -> str:
    """One short line that drives no terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(text.split())[:500])


def parse_choices(answer: Any, *, n: int, limit: int, vocabulary: int, eos: int, with_logps: bool) -> list[Sample]:
    """The n samples of a completion response, in the order of their indices.

    Raises RunError that says what is wrong with a response that is not n completions of 1 to `limit` token ids below
    `vocabulary`, each with a log-prob where `with_logps`, that end with `eos` where they are finished, and only there.
    """
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or not all(isinstance(c, dict) for c in choices):
        raise malformed("it has no choices")
    if sorted(str(c.get("index")) for c in choices) != sorted(map(str, range(n))):
        raise malformed(f"its {len(choices)} choices are not the {n} that were asked for")
    samples = []
    for choice in sorted(choices, key=lambda c: int(c["index"])):
        ids, reason = choice.get("token_ids"), choice.get("finish_reason")
        if not isinstance(ids, list) or not all(type(x) is int and 0 <= x < vocabulary for x in ids):
            raise malformed(f"its token_ids are not ids below {vocabulary}")
        if not 1 <= len(ids) <= limit:
            raise malformed(f"it has {len(ids)} tokens where 1 to {limit} were asked for")
        if reason not in ("stop", "length"):
            raise malformed(f"its finish_reason is {reason!r}")
        if (reason == "stop") != (eos in ids) or eos in ids[:-1]:
            raise malformed(f"it ends by {reason} where the end-of-sequence token {eos} says otherwise")
        logps: Any = []
        if with_logps:
            found = choice.get("logprobs")
            logps = found.get("token_logprobs") if isinstance(found, dict) else None
            if not isinstance(logps, list) or len(logps) != len(ids):
                raise malformed("it has not one log-prob a token")
            if not all(type(x) in (int, float) and abs(x) < ABSURD for x in logps):  # a nan fails, too
                raise malformed("a log-prob is not a finite number")
        samples.append(Sample(ids, [float(x) for x in logps], finished=reason == "stop"))
    return samples


def malformed(what: str) -> RunError:
    """The error for a response that is not what was asked for."""
    return RunError(f"the vLLM server sent a malformed response: {what}. Is it a vLLM server of this version (0.32)?")
