"""A server of chat completions on 127.0.0.1 that does, request by request, what its script says."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Handler(BaseHTTPRequestHandler):
    """One request; the steps of a script are functions of it."""

    server: _Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.lock:
            step = next(self.server.script)
            self.server.seen.append(Seen(self.path, dict(self.headers), body.decode()))
        with suppress(BrokenPipeError, ConnectionResetError):  # the client has gone, as it should
            step(self)

    def send(self, status: int, body: str, **headers: str) -> None:
        """A whole response."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body.encode())), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: Any) -> None:
        pass


Step = Callable[[Handler], None]


@dataclass(frozen=True)
class Seen:
    """A request as it arrived."""

    path: str
    headers: dict[str, str]
    text: str

    @property
    def body(self) -> dict[str, Any]:
        """Its JSON."""
        return dict(json.loads(self.text))


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a stream without end has a thread without end, until its client goes
    script: Iterator[Step]
    seen: list[Seen]
    lock: threading.Lock


@dataclass
class Running:
    """A server that runs: where, and what it was asked."""

    url: str
    seen: list[Seen] = field(default_factory=list)


@contextmanager
def serving(script: Iterable[Step]) -> Iterator[Running]:
    """A server of ``script``, whose end is an error for the client: the connection breaks."""
    with _Server(("127.0.0.1", 0), Handler) as server:
        running = Running(f"http://127.0.0.1:{server.server_port}/v1")
        server.script, server.seen, server.lock = iter(script), running.seen, threading.Lock()
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield running
        finally:
            server.shutdown()
            thread.join()


def completion(text: str | None, finish: str = "stop", tokens: tuple[int, int] | None = (100, 20)) -> str:
    """A body of chat completions."""
    body: dict[str, Any] = {"model": "tiny", "choices": [{"message": {"content": text}, "finish_reason": finish}]}
    if tokens is not None:
        body["usage"] = {"prompt_tokens": tokens[0], "completion_tokens": tokens[1]}
    return json.dumps(body)


def says(text: str | None, finish: str = "stop", tokens: tuple[int, int] | None = (100, 20)) -> Step:
    """A completion."""
    return lambda handler: handler.send(200, completion(text, finish, tokens))


def proposes(source: Any, name: str = "found", thought: str = "why not") -> Step:
    """A completion with a proposal as its schema wants it."""
    return says(json.dumps({"thought": thought, "name": name, "source": source}))


def fails(status: int, body: str = "{}", **headers: str) -> Step:
    """An HTTP error."""
    return lambda handler: handler.send(status, body, **headers)


def body(text: str) -> Step:
    """A response of 200 with that body."""
    return lambda handler: handler.send(200, text)


def cut_off(handler: Handler) -> None:
    """Half of what was announced, and then the connection ends."""
    whole = completion("x" * 100)
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(whole)))
    handler.end_headers()
    handler.wfile.write(whole[:40].encode())
    handler.close_connection = True


def silence(handler: Handler) -> None:
    """No byte until the client has gone."""
    handler.connection.settimeout(10)
    handler.connection.recv(1)


def drip(handler: Handler) -> None:
    """A byte now and then, so that no read takes long, in the headers already."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Drip: ")
    for _ in range(1000):
        handler.wfile.write(b"x")
        handler.wfile.flush()
        time.sleep(0.02)


def flood(handler: Handler) -> None:
    """A stream without end."""
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b" " * 65536)
