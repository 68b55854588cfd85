"""Streams over bare sockets: while they run only the time of each piece is noted, and taken apart afterwards.

On two cores a client that parses takes its time from the server that it measures.
"""

from __future__ import annotations

import json
import selectors
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

LIMIT = 1 << 16  # bytes taken from a socket at a time


class Failed(Exception):
    """What keeps a subject from being measured, in one line."""


@dataclass
class Reply:
    """The pieces of one answer with the time at which each came, the head of the response included."""

    sent: float
    pieces: list[tuple[float, bytes]] = field(default_factory=list)

    def events(self) -> list[tuple[float, dict[str, Any]]]:
        """(arrival, JSON) of each `data:` event. Raises `Failed` for an answer that is no stream."""
        status, chunked = self._head()
        if status != 200:
            body = b"".join(data for _, data in self._body(chunked))
            raise Failed(f"HTTP {status}: {' '.join(body.decode(errors='replace').split())[:200]}")
        found = []
        for arrival, line in self._lines(chunked):
            data = line.strip().removeprefix(b"data:").strip()
            if line.startswith(b"data:") and data != b"[DONE]":
                found.append((arrival, json.loads(data)))
        return found

    def _head(self) -> tuple[int, bool]:
        """(status, whether the body is chunked)."""
        head = b"".join(data for _, data in self.pieces).partition(b"\r\n\r\n")[0].lower()
        words = head.split(maxsplit=2)
        if len(words) < 2 or not words[1].isdigit():
            raise Failed("the line was closed without an answer")
        return int(words[1]), b"transfer-encoding: chunked" in head

    def _body(self, chunked: bool) -> Iterator[tuple[float, bytes]]:
        """The pieces without the head, and without the framing of chunks."""
        rest, inside, left = b"", b"", 0  # left: bytes of this chunk that are to come
        for arrival, piece in self.pieces:
            rest += piece
            if not inside:
                _, inside, body = rest.partition(b"\r\n\r\n")
                if not inside:
                    continue
                rest = body
            if not chunked:
                yield arrival, rest
                rest = b""
                continue
            while rest:
                if left:
                    data, rest = rest[:left], rest[left:]
                    left -= len(data)
                    yield arrival, data
                elif b"\r\n" in (size := rest.removeprefix(b"\r\n")):
                    line, _, rest = size.partition(b"\r\n")
                    left = int(line.partition(b";")[0], 16)
                else:
                    break

    def _lines(self, chunked: bool) -> Iterator[tuple[float, bytes]]:
        rest = b""
        for arrival, data in self._body(chunked):
            *whole, rest = (rest + data).split(b"\n")
            for line in whole:
                yield arrival, line


@dataclass(frozen=True)
class Answer:
    """One streamed answer. `arrivals`: of the events that carried text; times in seconds."""

    sent: float
    arrivals: tuple[float, ...]
    tokens: int
    text: str

    @property
    def first(self) -> float:
        return self.arrivals[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Seconds between one piece of text and the next."""
        return [later - sooner for sooner, later in pairwise(self.arrivals)]

    @property
    def rate(self) -> float:
        """Tokens a second after the first; an answer that came in one piece is timed from its sending."""
        first, last = self.arrivals[0], self.arrivals[-1]
        return (self.tokens - 1) / (last - first) if last > first else self.tokens / (last - self.sent)


def together(answers: Sequence[Answer]) -> float:
    """Tokens a second of several answers while all of them run: their prompts are not what is measured.

    Where they never all run, of the whole time.
    """
    begin = max(each.arrivals[0] for each in answers)
    end = min(each.arrivals[-1] for each in answers)
    if end <= begin:
        wall = max(each.arrivals[-1] for each in answers) - min(each.sent for each in answers)
        return sum(each.tokens for each in answers) / wall
    pieces = [sum(begin < at <= end for at in each.arrivals) / len(each.arrivals) for each in answers]
    return sum(part * each.tokens for part, each in zip(pieces, answers, strict=True)) / (end - begin)


def read(reply: Reply) -> Answer:
    """Raises `Failed` for a refusal, an error event, or no text at all."""
    arrivals, text, counted = [], [], None
    for arrival, event in reply.events():
        if "error" in event:
            raise Failed(" ".join(json.dumps(event["error"]).split())[:200])
        counted = (event.get("usage") or {}).get("completion_tokens", counted)
        for choice in event.get("choices") or ():
            if piece := text_of(choice):
                arrivals.append(arrival)
                text.append(piece)
    if not arrivals:
        raise Failed("the answer is empty")
    return Answer(reply.sent, tuple(arrivals), counted or len(arrivals), "".join(text))


def text_of(choice: Mapping[str, Any]) -> str:
    return str(choice.get("text") or (choice.get("delta") or {}).get("content") or "")


def ask(port: int, path: str, bodies: Sequence[Mapping[str, Any]], timeout: float = 120) -> list[Answer]:
    """The answers to requests that are sent together. Raises `Failed`."""
    return [read(reply) for reply in exchange(port, [post(path, body) for body in bodies], timeout)]


def post(path: str, body: Mapping[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    return head.encode() + f"Connection: close\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content


def exchange(port: int, requests: Sequence[bytes], timeout: float) -> list[Reply]:
    """Sends all requests, each on a connection of its own, and notes what comes until every one is closed."""
    replies = []
    until = time.monotonic() + timeout
    with selectors.DefaultSelector() as selector:
        for request in requests:
            line = socket.create_connection(("127.0.0.1", port), timeout=timeout)
            replies.append(Reply(time.perf_counter()))
            line.sendall(request)
            selector.register(line, selectors.EVENT_READ, replies[-1])
        try:
            while selector.get_map():
                if not (ready := selector.select(max(until - time.monotonic(), 0))):
                    raise Failed(f"no answer within {timeout:.0f} s")
                for key, _ in ready:
                    _take(selector, key)
        finally:
            for key in list(selector.get_map().values()):
                key.fileobj.close()  # type: ignore[union-attr]
    return replies


def _take(selector: selectors.BaseSelector, key: selectors.SelectorKey) -> None:
    """One piece from a line that has something; a line that has ended is let go."""
    assert isinstance(key.fileobj, socket.socket)
    try:
        piece = key.fileobj.recv(LIMIT)
    except ConnectionResetError:
        piece = b""
    if piece:
        key.data.pieces.append((time.perf_counter(), piece))
        return
    selector.unregister(key.fileobj)
    key.fileobj.close()


def answers(port: int, path: str) -> bool:
    """Whether a GET of this path gives 200."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as line:
            line.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
            return line.recv(LIMIT).split(b" ", 2)[1:2] == [b"200"]
    except OSError:
        return False
