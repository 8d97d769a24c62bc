"""One POST of JSON that ends in time, whatever the other side does."""

from __future__ import annotations

import asyncio
import email.utils
import json
import os
import time
from collections.abc import Coroutine, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import httpx

from metaopt.search.keys import redact, require_key_name
from metaopt_llm.chat import ChatError

LARGEST = 4 << 20
"""Bytes of an answer; real ones have thousands."""
_SHOWN = 300  # characters of a server's complaint in a message
_RETRIED = {408, 409, 429}
_UNSUPPORTED = {400, 422, 501}

T = TypeVar("T")


def require_url(url: str) -> str:
    """``url`` without a slash at its end.

    Raises:
        ValueError: no http(s) URL, or one that holds a password.
    """
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        parsed = httpx.URL()
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.userinfo or parsed.query:
        raise ValueError(
            f"base_url must be an http or https URL without password or query, such as http://127.0.0.1:8000/v1, got one "
            f"of the host {parsed.host!r}; a key goes into the environment variable that key_env names"
        )
    return url.rstrip("/")


class KeyFromEnvironment(httpx.Auth):
    """Puts the key into one header as a request leaves, so that no object or local variable of ours holds it.

    Args:
        header: name of the header.
        key_env: name of the environment variable.
        prefix: of the header's value, such as ``"Bearer "``.
    """

    def __init__(self, header: str, key_env: str, prefix: str = "") -> None:
        self._header, self._key_env, self._prefix = header, key_env, prefix

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        """What httpx calls with each request."""
        request.headers[self._header] = self._prefix + os.environ[self._key_env].strip()
        yield request


def key_auth(key_env: str, header: str, prefix: str = "") -> KeyFromEnvironment | None:
    """The key in ``header``; None where ``key_env`` is empty, for servers without keys.

    Raises:
        ChatError: the environment variable is not set.
    """
    if not key_env:
        return None
    try:
        require_key(key_env)
    except ValueError as error:
        raise ChatError(str(error), kind="no key") from None
    return KeyFromEnvironment(header, key_env, prefix)


def require_key(key_env: str) -> None:
    """Do nothing, if the environment variable ``key_env`` holds a key.

    Raises:
        ValueError: it is not set, or its name is refused by `metaopt.search.keys.require_key_name`.
    """
    if not os.environ.get(require_key_name(key_env), "").strip():
        raise ValueError(f"the environment variable {key_env} is not set; put the server's key there")


def post_json(
    url: str,
    body: Mapping[str, Any],
    seconds: float,
    auth: httpx.Auth | None = None,
    headers: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """POST ``body``; the JSON object that came back.

    Args:
        url: where to.
        body: what JSON holds.
        seconds: for everything together, from the name look-up to the last byte.
        auth: puts a key in.
        headers: further ones.

    Raises:
        ChatError: anything else came back, or nothing.
    """
    try:
        status, received, retry_after = _run(_post(url, body, seconds, auth, dict(headers or {})))
    except TimeoutError:
        raise ChatError(
            f"{url} gave no whole answer within {seconds:.3g} s", retry=True, billed=True, kind="timed out"
        ) from None
    except (httpx.ConnectError, httpx.ProxyError, httpx.UnsupportedProtocol) as error:
        raise ChatError(
            f"{url} cannot be reached: {redact(str(error)) or type(error).__name__}", retry=True, kind="unreachable"
        ) from None
    except httpx.HTTPError as error:
        raise ChatError(
            f"{url} broke off: {redact(str(error)) or type(error).__name__}", retry=True, billed=True, kind="broke off"
        ) from None
    text = redact(received.decode(errors="replace"))
    if status != 200:
        raise ChatError(
            f"{url} answered {status}: {text[:_SHOWN].strip() or 'no reason given'}",
            retry=status in _RETRIED or (status >= 500 and status != 501),
            unsupported=status in _UNSUPPORTED,
            wait=_seconds(retry_after),
            kind=f"answered {status}",
        )
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict):
        raise ChatError(
            f"{url} answered no JSON object: {text[:_SHOWN].strip()!r}", retry=True, billed=True, kind="no JSON"
        )
    return answer


async def _post(
    url: str, body: Mapping[str, Any], seconds: float, auth: httpx.Auth | None, headers: dict[str, str]
) -> tuple[int, bytes, str]:
    received = bytearray()
    # httpx's own limits are per read: a server that sends a byte now and then passes them.
    async with asyncio.timeout(seconds), httpx.AsyncClient(timeout=None) as client:
        headers = {"Accept-Encoding": "identity", **headers}  # what arrives is as large as what is sent
        async with client.stream("POST", url, json=body, auth=auth, headers=headers) as response:
            async for chunk in response.aiter_bytes():
                received += chunk
                if len(received) > LARGEST:
                    raise ChatError(f"{url} sent more than {LARGEST} bytes", retry=True, billed=True, kind="too long")
            return response.status_code, bytes(received), response.headers.get("Retry-After", "")


def _run(work: Coroutine[Any, Any, T]) -> T:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as thread:  # a notebook's loop is running in this thread
        return thread.submit(asyncio.run, work).result()


def _seconds(retry_after: str) -> float | None:
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return None
