"""What Gradio keeps for pages is bounded in number, size and time."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from serve.ui import sessions
from serve.ui.sessions import SessionError, Sessions


class FakeGradio:
    """Gradio's own books, with an entry for each session."""

    def __init__(self) -> None:
        self.state_holder = SimpleNamespace(session_data={}, time_last_used={})
        self.queue = SimpleNamespace(
            pending_messages_per_session={}, pending_event_ids_session={},
            event_ids_to_events={}, clean_events=self.clean_events,
        )  # fmt: skip

    async def clean_events(self, *, session_hash: str) -> None:
        assert session_hash in self.names()

    def get_blocks(self) -> SimpleNamespace:
        return SimpleNamespace(_queue=self.queue)

    def add(self, name: str) -> None:
        self.state_holder.session_data[name] = self.state_holder.time_last_used[name] = object()
        self.queue.pending_messages_per_session[name] = object()
        self.queue.pending_event_ids_session[name] = {f"event-{name}"}
        self.queue.event_ids_to_events[f"event-{name}"] = object()

    def names(self) -> list[str]:
        names = list(self.state_holder.session_data)
        assert names == list(self.state_holder.time_last_used)
        assert names == list(self.queue.pending_messages_per_session)
        assert names == list(self.queue.pending_event_ids_session)
        assert [f"event-{name}" for name in names] == list(self.queue.event_ids_to_events)
        return names


class Pages:
    def __init__(self) -> None:
        self.gradio = FakeGradio()
        gradio: Any = self.gradio
        self.sessions = Sessions(gradio)

    def send(self, name: str, size: int = 10) -> None:
        asyncio.run(self.sessions.admit(name, b"a" * size))
        if name not in self.gradio.names():
            self.gradio.add(name)


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> Pages:
    monkeypatch.setattr(sessions, "MAX_SESSIONS", 3)
    monkeypatch.setattr(sessions, "MAX_COST", 4000)
    monkeypatch.setattr(sessions, "MAX_COST_OF_ONE", 1000)
    return Pages()


def test_the_longest_unused_session_makes_room(pages: Pages) -> None:
    for name in "abcabd":
        pages.send(name)
    assert pages.gradio.names() == ["a", "b", "d"]


def test_session_with_an_open_page_stays(pages: Pages) -> None:
    with pages.sessions.opened("a"):
        for name in "abcd":
            pages.send(name)
        assert pages.gradio.names() == ["a", "c", "d"]


def test_no_room_among_open_pages_is_said(pages: Pages) -> None:
    opened = pages.sessions.opened
    refused = pytest.raises(SessionError, match="Too many pages")
    with opened("a"), opened("b"), opened("c"), refused as caught:
        pages.send("d")
    assert caught.value.status == 503


def test_session_that_sent_nothing_ends_with_its_stream(pages: Pages) -> None:
    for name in "abcd":
        with pages.sessions.opened(name):
            pass
    assert pages.sessions._sessions == {}


def test_unread_answers_count_until_they_are_read(pages: Pages) -> None:
    with pages.sessions.opened("a"):
        for _ in range(4):
            pages.send("a", 1000)
        with pytest.raises(SessionError, match="Too many pages"):
            pages.send("a", 1000)
        pages.sessions.settle("a")
        for _ in range(3):
            pages.send("a", 1000)


def test_bytes_of_all_sessions_are_bounded(pages: Pages) -> None:
    for name in "aab":
        pages.send(name, 1000)
    pages.send("c", 1000)
    assert pages.gradio.names() == ["a", "b", "c"]
    pages.send("b", 1000)
    assert pages.gradio.names() == ["b", "c"]


def test_values_count_for_more_than_their_bytes(pages: Pages) -> None:
    with pytest.raises(SessionError, match="too much for the page") as caught:
        asyncio.run(pages.sessions.admit("a", b"[],[],[],[],[],[],[],[],[]"))
    assert caught.value.status == 413


def test_session_whose_page_is_gone_is_forgotten_in_time(
    pages: Pages, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages.send("a")
    with pages.sessions.opened("b"):
        pages.send("b")
        monkeypatch.setattr(sessions, "EXPIRY_S", -1.0)
        asyncio.run(pages.sessions.forget_expired())
        assert pages.gradio.names() == ["b"]
    asyncio.run(pages.sessions.forget_expired())
    assert pages.gradio.names() == []
