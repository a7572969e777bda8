"""The Chat tab."""

import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import gradio as gr

from client.api import ApiClient
from client.errors import RequestError
from serve.ui.answers import SEPARATOR, Answer, paint_at_times
from serve.ui.controls import MAX_NEW_TOKENS, PRIVATE, ArmControls, describe_arm, read_arm
from serve.ui.conversation import (
    Turn,
    clicked,
    conversation_view,
    make_turn,
    render_conversation,
)
from serve.ui.unfinished import Unfinished

MAX_KEPT_CHATS = 30
_TITLE_CHARS = 48
_STORAGE_KEY = "proa-chats"
# Only hides the text from a glance at the browser's storage; the same after a restart.
_STORAGE_SECRET = "proa"

Chats = list[dict[str, Any]]


class ChatTab:
    """Components of the tab and what they do.

    Args:
        client: of the server.
        catalog: of the session.
        key: the API key's field.
    """

    def __init__(self, client: ApiClient, catalog: gr.State, key: gr.Textbox) -> None:
        self._client = client
        # None: a server that was restarted has forgotten them; the browser has kept them.
        self.turns = gr.State(None)
        # The id of the chat that is shown, and all that are kept. Both outlive the server's state.
        self._shown = gr.BrowserState(
            None, storage_key=f"{_STORAGE_KEY}-shown", secret=_STORAGE_SECRET
        )
        self._chats = gr.BrowserState([], storage_key=_STORAGE_KEY, secret=_STORAGE_SECRET)
        with gr.Row(elem_classes="split"):
            with gr.Column(scale=1, min_width=260, elem_classes="side"):
                with gr.Row(elem_classes="tight"):
                    new = gr.Button("New chat", elem_id="chat-new", size="sm")
                    delete = gr.Button("Delete chat", elem_id="chat-delete", size="sm")
                self._history = gr.Dropdown(
                    [], value=None, label="Earlier chats", elem_id="chat-history",
                    interactive=True, allow_custom_value=True,
                )  # fmt: skip
                self._arm = ArmControls(catalog, elem_id="chat")
                self._system = gr.Textbox(
                    label="System prompt", value="", lines=2, elem_id="chat-system"
                )
                self._most = gr.Slider(
                    1, MAX_NEW_TOKENS, value=512, step=1, label="Most new tokens",
                    elem_id="chat-max-tokens",
                )  # fmt: skip
                self._seed = gr.Number(
                    label="Seed (-1: another each time)", value=-1, precision=0,
                    elem_id="chat-seed",
                )  # fmt: skip
            with gr.Column(scale=3, min_width=320, elem_classes="main"):
                self._view = conversation_view("chat-view")
                with gr.Row(elem_classes="composer"):
                    self._text = gr.Textbox(
                        show_label=False, label="Message", value="", lines=1, max_lines=10, scale=5,
                        placeholder="Message (Enter sends, Shift+Enter makes a line)",
                        elem_id="chat-text", autofocus=True, container=False,
                    )  # fmt: skip
                    self._send = gr.Button(
                        "Send", variant="primary", elem_id="chat-send", min_width=80
                    )
                    self._stop = gr.Button(
                        "Stop", variant="stop", elem_id="chat-stop", visible=False, min_width=80
                    )
        self._connect(new, delete, key)

    def _connect(self, new: gr.Button, delete: gr.Button, key: gr.Textbox) -> None:
        request = [key, self._system, self._most, self._seed, *self._arm.inputs]
        shown = [self._view, self.turns, self._send, self._stop]
        kept = [self._chats, self._history, self._shown]
        unfinished, running = Unfinished(), []
        answer = unfinished.track(self._answer)
        for event in (self._text.submit, self._send.click):
            asked = event(
                _ask, [self._text, self.turns, self._chats, self._shown],
                [self._text, self.turns], queue=False, **PRIVATE,
            )  # fmt: skip
            running.append(asked.success(answer, [self.turns, *request], shown, **PRIVATE))
        pressed = self._view.click(
            _press, [self.turns, self._chats, self._shown],
            [self._view, self._text, self.turns], queue=False, **PRIVATE,
        )  # fmt: skip
        running.append(pressed.success(answer, [self.turns, *request], shown, **PRIVATE))

        stopped = unfinished.halt(self._stop.click, running).then(
            _stop, self.turns, shown, **PRIVATE
        )
        for done in (*running, stopped):
            done.then(_keep, [self.turns, self._chats, self._shown], kept, queue=False, **PRIVATE)
        unfinished.halt(new.click, running).then(
            lambda: (*_resting([]), None, gr.Dropdown(value=None)), None,
            [*shown, self._shown, self._history], **PRIVATE,
        )  # fmt: skip
        unfinished.halt(delete.click, running).then(
            _delete, [self._chats, self._shown], [*shown, *kept], **PRIVATE
        )
        unfinished.halt(self._history.input, running).then(
            _open, [self._history, self._chats], [*shown, self._shown], **PRIVATE
        )

    def load(self, page: gr.Blocks) -> None:
        """Show the chats that the browser has kept, and go on with the last one."""
        page.load(
            _restore, [self._chats, self._shown], [self._view, self.turns, self._history],
            queue=False, **PRIVATE,
        )  # fmt: skip

    async def _answer(
        self, turns: list[Turn], key: str, system: str, most: float, seed: float, *arm: Any
    ) -> AsyncIterator[tuple[Any, ...]]:
        """Ask for what comes after the last message, if that is the user's."""
        if not turns or turns[-1]["role"] != "user":
            yield _resting(turns)
            return
        chosen = read_arm(list(arm))
        body = {
            **chosen, "messages": _messages(turns, system), "max_tokens": int(most), "stream": True,
            "stream_options": {"include_usage": True},
        }  # fmt: skip
        if seed >= 0:
            body["seed"] = int(seed)
        answer = Answer()
        name = describe_arm(chosen)
        yield _running([*turns, make_turn("assistant", "", name)])

        def take(chunk: dict[str, Any]) -> None:
            for choice in chunk["choices"]:
                if content := choice["delta"].get("content"):
                    answer.add(content)
                answer.finish_reason = choice["finish_reason"] or answer.finish_reason
            if chunk.get("usage"):
                answer.num_tokens = chunk["usage"]["completion_tokens"]

        try:
            stream = self._client.stream("/v1/chat/completions", body, key=key)
            async with aclosing(stream):
                async for _ in paint_at_times(stream, take):
                    yield _running([*turns, _turn(answer, name)])
        except RequestError as error:
            partial = [_turn(answer, name)] if answer.text else []
            yield _resting([*turns, *partial, make_turn("error", str(error))])
            return
        yield _resting([*turns, _turn(answer, name)])


def _turn(answer: Answer, name: str) -> Turn:
    return make_turn(
        "assistant", answer.text, SEPARATOR.join(filter(None, (answer.describe(), name)))
    )


def _messages(turns: list[Turn], system: str) -> list[dict[str, str]]:
    start = [{"role": "system", "content": system}] if system.strip() else []
    said = [{"role": t["role"], "content": t["text"]} for t in turns if t["role"] != "error"]
    return [*start, *said]


def _running(turns: list[Turn]) -> tuple[Any, ...]:
    view = render_conversation(turns, is_running=True)
    return view, turns, gr.Button(visible=False), gr.Button(visible=True)


def _resting(turns: list[Turn]) -> tuple[Any, ...]:
    view = render_conversation(turns)
    return view, turns, gr.Button(visible=True), gr.Button(visible=False)


def _ask(
    text: str, turns: list[Turn] | None, chats: Chats, shown: float | None
) -> tuple[str, list[Turn]]:
    turns = _find(chats, shown) if turns is None else turns
    if not text.strip():
        return text, turns
    kept = [turn for turn in turns if turn["role"] != "error"]
    return "", [*kept, make_turn("user", text)]


def _press(
    turns: list[Turn] | None, chats: Chats, shown: float | None, event: gr.EventData
) -> tuple[Any, ...]:
    """Edit a message of the user's, or have the last answer again."""
    turns = _find(chats, shown) if turns is None else turns
    action, index = clicked(event)
    if action == "edit" and index < len(turns):
        kept = turns[:index]
        return render_conversation(kept), turns[index]["text"], kept
    if action == "regenerate":
        asked = [i for i, turn in enumerate(turns) if turn["role"] == "user"]
        kept = turns[: asked[-1] + 1] if asked else []
        return render_conversation(kept), gr.skip(), kept
    return gr.skip(), gr.skip(), turns


def _stop(turns: list[Turn] | None) -> tuple[Any, ...]:
    turns = turns or []
    if turns and turns[-1]["role"] == "assistant":
        note = SEPARATOR.join(filter(None, (turns[-1]["note"], "stopped")))
        turns = [*turns[:-1], make_turn("assistant", turns[-1]["text"], note)]
    return _resting(turns)


def _keep(
    turns: list[Turn] | None, chats: Chats, shown: float | None
) -> tuple[Chats, gr.Dropdown, float | None]:
    """Keep the conversation in the browser, newest first."""
    if not turns:
        return chats, gr.Dropdown(), shown
    number = shown or time.time()
    others = [chat for chat in chats if chat["id"] != number]
    title = " ".join(turns[0]["text"].split())[:_TITLE_CHARS] or "chat"
    chats = [{"id": number, "title": title, "turns": turns}, *others][:MAX_KEPT_CHATS]
    return chats, gr.Dropdown(choices=_titles(chats), value=number), number


def _delete(chats: Chats, shown: float | None) -> tuple[Any, ...]:
    chats = [chat for chat in chats if chat["id"] != shown]
    dropdown = gr.Dropdown(choices=_titles(chats), value=None)
    return *_resting([]), chats, dropdown, None


def _open(number: float, chats: Chats) -> tuple[Any, ...]:
    turns = _find(chats, number)
    return *_resting(turns), number if turns else None


def _restore(chats: Chats, shown: float | None) -> tuple[str, list[Turn], gr.Dropdown]:
    turns = _find(chats, shown)
    dropdown = gr.Dropdown(choices=_titles(chats), value=shown if turns else None)
    return render_conversation(turns), turns, dropdown


def _find(chats: Chats, number: float | None) -> list[Turn]:
    """Return the turns of a kept chat; also what a server that was restarted has forgotten."""
    return next((chat["turns"] for chat in chats if chat["id"] == number), [])


def _titles(chats: Chats) -> list[tuple[str, float]]:
    return [(chat["title"], chat["id"]) for chat in chats]
