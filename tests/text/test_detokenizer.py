import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from text.detokenizer import Detokenizer, StopMatcher, build_token_texts
from text.tokenizer import Tokenizer

BYTES = [bytes([byte]) for byte in range(256)]
TEXTS = build_token_texts(BYTES)


def feed_all(detokenizer: Detokenizer, token_ids: list[int]) -> list[str]:
    return [*(detokenizer.feed(i) for i in token_ids), detokenizer.flush()]


@given(data=st.binary(max_size=40) | st.text(max_size=20).map(lambda t: t.encode(errors="ignore")))
def test_feeding_bytes_equals_decoding_at_once(data: bytes) -> None:
    pieces = feed_all(Detokenizer(BYTES, TEXTS), list(data))
    assert "".join(pieces) == data.decode(errors="replace")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(picks=st.lists(st.integers(0, 10_000), max_size=30))
def test_feeding_tokens_equals_decoding_at_once(tokenizer: Tokenizer, picks: list[int]) -> None:
    token_ids = [pick % tokenizer.vocab_size for pick in picks]
    pieces = feed_all(tokenizer.make_detokenizer(), token_ids)
    assert "".join(pieces) == tokenizer.decode_bytes(token_ids)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_feeding_tokens_of_a_text_equals_the_library(byte_level: Tokenizer, text: str) -> None:
    token_ids = byte_level.encode(text)
    assert "".join(feed_all(byte_level.make_detokenizer(), token_ids)) == text
    assert byte_level.decode(token_ids) == text


def test_unfinished_character_is_held_back() -> None:
    detokenizer = Detokenizer(BYTES, TEXTS)
    pieces = [detokenizer.feed(byte) for byte in "\U0001f6f6!".encode()]
    assert pieces == ["", "", "", "\U0001f6f6", "!"]


def test_control_token_inside_a_character_does_not_break_it() -> None:
    table = [*BYTES, None]
    detokenizer = Detokenizer(table, build_token_texts(table))
    assert feed_all(detokenizer, [0xC3, 256, 0xA9]) == ["", "", "\u00e9", ""]


def test_unknown_id_has_no_text() -> None:
    assert feed_all(Detokenizer(BYTES, TEXTS), [300, 65]) == ["", "A", ""]


def cut_naively(text: str, stops: list[str], *, is_included: bool) -> str:
    """Look at every prefix in turn, as if the text came one character at a time."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[:end] if is_included else text[: end - max(map(len, found))]
    return text


@given(
    text=st.text("ab\n", max_size=30),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=8),
    is_included=st.booleans(),
)
def test_stop_is_cut_alike_however_the_text_is_pieced(
    text: str, stops: list[str], cuts: list[int], is_included: bool
) -> None:
    matcher = StopMatcher(stops, is_included=is_included)
    bounds = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    out = ""
    for start, end in zip(bounds, bounds[1:], strict=False):
        if matcher.matched is None:
            out += matcher.feed(text[start:end])
    out += matcher.flush()
    assert out == cut_naively(text, stops, is_included=is_included)


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["one ", "E", "N", "x"], ["one ", "", "", "ENx"]),
        (["one E", "ND two"], ["one ", ""]),
        (["on", "e"], ["on", "e"]),
    ],
    ids=["released", "matched", "nothing-held"],
)
def test_only_a_possible_stop_is_held_back(pieces: list[str], expected: list[str]) -> None:
    matcher = StopMatcher(["END"])
    assert [matcher.feed(piece) for piece in pieces] == expected


def test_matched_names_the_stop() -> None:
    matcher = StopMatcher(["\n\n", "END"])
    assert matcher.feed("a END b") == "a "
    assert matcher.matched == "END"
