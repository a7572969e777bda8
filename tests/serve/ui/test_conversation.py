"""Conversations as HTML."""

from html import unescape

from serve.ui.conversation import make_turn, render_conversation

TURNS = [make_turn("user", "hi"), make_turn("assistant", "hello", "3 tokens")]


def test_messages_come_in_order_with_their_notes() -> None:
    html = render_conversation(TURNS)
    assert html.index("hi") < html.index("hello") < html.index("3 tokens")


def test_question_is_text_whatever_it_holds() -> None:
    html = render_conversation([make_turn("user", '"><script>x</script>')])
    assert "<script" not in html
    assert 'data-text="&quot;&gt;&lt;script&gt;' in html


def test_message_keeps_its_text_for_copying() -> None:
    html = render_conversation([make_turn("assistant", '**a** & "b"\n<c>')])
    kept = html.partition('data-text="')[2].partition('"')[0]
    assert unescape(kept) == '**a** & "b"\n<c>'


def test_only_the_last_answer_can_be_had_again() -> None:
    html = render_conversation([*TURNS, *TURNS])
    assert html.count('data-action="regenerate"') == 1
    assert 'data-action="regenerate" data-index="3"' in html


def test_only_questions_can_be_edited() -> None:
    html = render_conversation([*TURNS, *TURNS])
    assert html.count('data-action="edit"') == 2


def test_growing_answer_has_no_buttons_and_is_busy() -> None:
    html = render_conversation(TURNS, is_running=True)
    assert 'aria-busy="true"' in html
    assert "data-action" not in html


def test_error_is_announced() -> None:
    assert 'role="alert"' in render_conversation([make_turn("error", "no server")])


def test_code_can_be_copied() -> None:
    html = render_conversation([make_turn("assistant", "```\nx\n```")])
    assert html.count('data-action="copy-code"') == 1
