"""What the client makes of bytes: events however they are cut, errors of every form."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client import answers
from client.answers import EventParser, encode_body, parse_chunk, parse_error, parse_json
from client.errors import RequestError

ODD = "a\u2028b\u0085c\x0bd\u00e9\U0001f600"
STREAM = (
    ": a comment\r\n\r\n"
    "data: one\n\n"
    f"event: x\ndata: {ODD}\n\n"
    "data:two\r\ndata:  lines\r\n\r\n"
    "id: 7\n\n"
    "data: with\rdata: returns\r\r"
    "data: cut off"
).encode()
EVENTS = ["one", ODD, "two\n lines", "with\nreturns"]


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_events_are_the_same_however_the_stream_is_cut(cuts: list[int]) -> None:
    parser, found = EventParser(), []
    places = [0, *sorted(cuts), len(STREAM)]
    for start, stop in zip(places, places[1:], strict=False):
        found += parser.feed(STREAM[start:stop])
    assert found == EVENTS


def test_events_are_found_byte_by_byte() -> None:
    parser = EventParser()
    assert [data for byte in STREAM for data in parser.feed(bytes([byte]))] == EVENTS


def test_event_that_is_no_utf8_is_an_error() -> None:
    with pytest.raises(RequestError, match="not in UTF-8"):
        EventParser().feed(b"data: \xff\n\n")


@pytest.mark.parametrize("line", [b"data: abcdefgh", b"data: a\n", b": ping\n"])
def test_endless_event_is_an_error(line: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "MAX_EVENT_BYTES", 1000)
    parser = EventParser()
    with pytest.raises(RequestError, match="longer than 1000 bytes"):
        list(map(parser.feed, [line] * 1000))


def test_many_short_events_are_no_long_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "MAX_EVENT_BYTES", 1000)
    parser = EventParser()
    assert len([d for _ in range(200) for d in parser.feed(b": ping\n\ndata: x\n\n")]) == 200


@pytest.mark.parametrize("data", ["[1]", "no json", "", "[" * 100_000, '"x"'])
def test_chunk_of_something_else_is_an_error(data: str) -> None:
    with pytest.raises(RequestError, match="does not speak this API"):
        parse_chunk(data)


def test_error_in_a_stream_has_its_code_and_field() -> None:
    error = {"message": "no such token", "type": "x", "param": "prompt", "code": "invalid_value"}
    with pytest.raises(RequestError, match="^no such token$") as caught:
        parse_chunk(json.dumps({"error": error}))
    found = caught.value
    assert (found.status, found.param, found.code) == (None, "prompt", "invalid_value")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"error": {"message": "too hot", "param": "temperature"}}', "too hot"),
        (b'{"error": "too hot"}', "too hot"),
        (b'{"error": {"message": 7}}', "Bad Gateway"),
        (b'{"detail": "x"}', "Bad Gateway"),
        (b"[]", "Bad Gateway"),
        (b"<html>", "Bad Gateway"),
        (b"\xff\xfe", "Bad Gateway"),
        (b"", "Bad Gateway"),
    ],
)
def test_refusal_says_what_the_body_says_or_the_status(content: bytes, message: str) -> None:
    error = parse_error(content, 502, "Bad Gateway")
    assert (str(error), error.status) == (message, 502)


def test_refusal_without_a_word_says_so() -> None:
    assert str(parse_error(b"", 599, "")) == "the server did not say why"


def test_body_holds_text_that_is_no_unicode() -> None:
    assert parse_json(encode_body({"a": "\udcff\u00e9"})) == {"a": "\udcff\u00e9"}
    assert encode_body("\udcff").isascii()
