"""The streaming client of benchmarks/peers: what came when, however the bytes were cut."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest
from wire import Answer, Failed, Reply, answers, ask, exchange, post, read, together

from support_process import fake_server

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
EVENTS = (
    b'data: {"choices": [{"text": "One"}], "usage": null}\n\n',
    b": a comment\n\n",
    b'data: {"choices": [{"text": ""}]}\n\n',
    b'data: {"choices": [{"delta": {"content": " two"}}]}\n\n',
    b'data: {"choices": [], "usage": {"completion_tokens": 5}}\n\n',
    b"data: [DONE]\n\n",
)


def chunked(parts: tuple[bytes, ...]) -> bytes:
    body = b"".join(b"%x;ext=1\r\n%s\r\n" % (len(part), part) for part in parts)
    return HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + body + b"0\r\n\r\n"


def plain(parts: tuple[bytes, ...]) -> bytes:
    return HEAD + b"\r\n" + b"".join(parts)


def cut(data: bytes, size: int) -> Reply:
    """As if `size` bytes came at a time, a second after each other."""
    return Reply(0.0, [(float(i), data[i : i + size]) for i in range(0, len(data), size)])


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 100000])
@pytest.mark.parametrize("frame", [chunked, plain], ids=["chunked", "plain"])
def test_an_answer_is_the_same_however_it_is_cut(frame: object, size: int) -> None:
    answer = read(cut(frame(EVENTS), size))  # type: ignore[operator]
    assert (answer.text, answer.tokens, len(answer.arrivals)) == ("One two", 5, 2)


@pytest.mark.parametrize("frame", [chunked, plain], ids=["chunked", "plain"])
def test_an_event_arrives_with_its_last_byte(frame: object) -> None:
    data = frame(EVENTS)  # type: ignore[operator]
    ends = [data.index(event) + len(event) - 2 for event in (EVENTS[0], EVENTS[3])]
    answer = read(cut(data, 1))
    assert list(answer.arrivals) == ends
    assert answer.first == ends[0]
    assert answer.gaps == [ends[1] - ends[0]]
    assert answer.rate == pytest.approx(4 / (ends[1] - ends[0]))


def test_an_answer_in_one_piece_has_a_rate() -> None:
    assert read(Reply(0.5, [(1.0, plain(EVENTS))])).rate == 5 / 0.5


def test_chunks_need_not_be_events() -> None:
    whole = b"".join(EVENTS)
    parts = tuple(whole[i : i + 11] for i in range(0, len(whole), 11))
    assert read(cut(chunked(parts), 5)).text == "One two"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "without an answer"),
        (b"HTTP/1.1 404 Not Found\r\n\r\nno such\nmodel", "HTTP 404: no such model"),
        (HEAD + b'\r\ndata: {"error": {"message": "no room"}}\n\n', "no room"),
        (HEAD + b'\r\ndata: {"choices": []}\n\n', "empty"),
    ],
    ids=["nothing", "refused", "error-event", "no-text"],
)
def test_what_is_no_answer_fails_in_a_line(data: bytes, reason: str) -> None:
    with pytest.raises(Failed, match=reason):
        read(Reply(0.0, [(1.0, data)]))


def test_streams_of_a_real_server(tmp_path: Path) -> None:
    with fake_server(tmp_path) as url:
        port = int(url.rpartition(":")[2])
        assert answers(port, "/readyz")
        assert not answers(port, "/nothing")
        body = {"model": "tiny", "max_tokens": 6, "stream": True, "ignore_eos": True}
        body |= {"stream_options": {"include_usage": True}}
        found = ask(port, "/v1/completions", [body | {"prompt": f"{i} streams"} for i in range(3)])
        assert [each.tokens for each in found] == [6, 6, 6]
        assert all(each.text and each.first > 0 and min(each.gaps) >= 0 for each in found)
        with pytest.raises(Failed, match="HTTP 404"):
            ask(port, "/v1/completions", [body | {"prompt": "a", "model": "another"}])


def test_a_silent_server_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        port = deaf.getsockname()[1]
        with pytest.raises(Failed, match="no answer within"):
            exchange(port, [post("/", {})], timeout=0.05)
    assert not answers(port, "/")


def test_a_line_that_breaks_is_no_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as rude:

        def hang_up() -> None:
            line, _ = rude.accept()
            line.recv(10)
            line.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        with pytest.raises(Failed, match="without an answer"):
            ask(rude.getsockname()[1], "/", [{"prompt": "x" * 1000}])
        thread.join()


def test_streams_are_counted_while_all_run() -> None:
    early = Answer(0.0, tuple(1.0 + 0.5 * i for i in range(9)), 9, "")  # 1 to 5 s, two a second
    late = Answer(0.0, tuple(3.0 + 0.5 * i for i in range(9)), 18, "")  # 3 to 7 s, two tokens a piece
    assert together([early, late]) == pytest.approx((4 + 2 * 4) / 2)
    after = Answer(0.0, (8.0, 9.0), 2, "")
    assert together([early, after]) == pytest.approx(11 / 9)
