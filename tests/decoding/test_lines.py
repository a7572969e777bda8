"""The line automaton against an oracle that looks at the text."""

import random

import pytest

from decoding.lines import LINE_STATES, STATE_INDEX, LineState, Place


def oracle(text, *, brackets):
    """Compute the line state of a text from its characters."""
    lines = text.replace("\r", "").split("\n")
    openers = ":{([" if brackets else ":{"
    with_text = [line.strip(" \t") for line in lines[:-1] if line.strip(" \t")]
    current = lines[-1]
    place = Place.IN if current.strip(" \t") else Place.L1 if current else Place.L0
    stripped = current.lstrip(" \t")
    ticks = len(stripped) - len(stripped.lstrip("`"))
    is_over = ticks >= 3 or ticks < len(stripped)
    fences = sum(line.lstrip(" \t").startswith("```") for line in lines)
    return LineState(
        place=place,
        is_opened=current.strip(" \t")[-1:] in tuple(openers),
        was_opened=bool(with_text) and with_text[-1][-1] in openers,
        ticks=3 if is_over else ticks,
        in_fence=fences % 2 == 1,
    )


@pytest.mark.parametrize("brackets", [False, True], ids=["colon", "brackets"])
def test_token_automaton_equals_the_character_oracle(vocabulary, brackets):
    automaton = vocabulary.tables.line_automaton(is_bracket_opener=brackets)
    chooser = random.Random(7)
    for _ in range(1000):
        token_ids = chooser.choices(range(len(vocabulary.texts)), k=chooser.randint(0, 30))
        state = automaton.run(STATE_INDEX[LineState()], token_ids)
        assert LINE_STATES[state] == oracle(vocabulary.text_of(token_ids), brackets=brackets)


def test_incremental_equals_one_shot(vocabulary):
    automaton = vocabulary.tables.line_automaton(is_bracket_opener=False)
    chooser = random.Random(3)
    for _ in range(50):
        token_ids = chooser.choices(range(len(vocabulary.texts)), k=12)
        state = STATE_INDEX[LineState()]
        for token_id in token_ids:
            state = automaton.next_state(state, token_id)
        assert state == automaton.run(STATE_INDEX[LineState()], token_ids)


@pytest.mark.parametrize(
    "pieces",
    [
        pytest.param([b"```"], id="whole"),
        pytest.param([b"``", b"`"], id="two-one"),
        pytest.param([b"`", b"``"], id="one-two"),
        pytest.param([b"`", b"`", b"`"], id="singles"),
        pytest.param([b"`", b"```"], id="four"),
        pytest.param([b"````"], id="four-in-one"),
        pytest.param([b"    ", b"```"], id="indented"),
        pytest.param([b"x", b"\n```"], id="after-newline"),
        pytest.param([b"`", None, b"``"], id="special-token-between"),
    ],
)
def test_fence_opens_however_the_backticks_are_split(vocabulary, pieces):
    automaton = vocabulary.tables.line_automaton(is_bracket_opener=False)
    state = automaton.run(STATE_INDEX[LineState()], vocabulary.ids_of(*pieces))
    assert LINE_STATES[state].in_fence


@pytest.mark.parametrize(
    "pieces",
    [
        pytest.param([b"``"], id="two"),
        pytest.param([b"x", b"```"], id="mid-line"),
        pytest.param([b"`", b" ", b"``"], id="interrupted"),
        pytest.param([b"``", b"\n", b"`"], id="over-two-lines"),
        pytest.param([b"```", b"\n```"], id="closed-again"),
    ],
)
def test_no_fence_without_three_backticks_at_the_line_start(vocabulary, pieces):
    automaton = vocabulary.tables.line_automaton(is_bracket_opener=False)
    state = automaton.run(STATE_INDEX[LineState()], vocabulary.ids_of(*pieces))
    assert not LINE_STATES[state].in_fence
