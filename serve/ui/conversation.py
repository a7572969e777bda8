"""A conversation as HTML, with buttons on its messages."""

from collections.abc import Sequence
from html import escape
from typing import Any, Literal, TypedDict

import gradio as gr

from serve.ui.markdown import render_markdown

Role = Literal["user", "assistant", "error"]
_NAMES: dict[Role, str] = {"user": "You", "assistant": "Answer", "error": "Error"}
_EMPTY = """<div class="empty"><h2>Ask something</h2>
<p>One 4-bit model in memory. Choose an adapter or a decoding strategy beside it.</p></div>"""
# Copying stays in the browser. The clipboard is there on https and on this machine only, so there
# is the old way too.
COPY_JS = """
function copyText(text) {
  if (navigator.clipboard && window.isSecureContext) return navigator.clipboard.writeText(text);
  const area = document.createElement('textarea');
  area.value = text; area.style.position = 'fixed'; document.body.appendChild(area);
  area.select(); document.execCommand('copy'); area.remove();
  return Promise.resolve();
}
element.addEventListener('click', (event) => {
  const button = event.target.closest('button[data-action^="copy"]');
  if (!button) return;
  const text = button.dataset.action === 'copy' ? button.closest('.message').dataset.text
    : button.closest('.code').querySelector('pre').innerText;
  copyText(text).then(() => {
    const label = button.textContent;
    button.textContent = 'Copied';
    setTimeout(() => { button.textContent = label; }, 1200);
  });
});
"""
# What else is pressed goes to Python as a click with its data.
_ACTION_JS = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('button[data-index]');
  if (!button || button.dataset.action === 'copy') return;
  trigger('click', {action: button.dataset.action, index: Number(button.dataset.index)});
});
"""


class Turn(TypedDict):
    """A message, and what is told below it."""

    role: Role
    text: str
    note: str


def make_turn(role: Role, text: str, note: str = "") -> Turn:
    """Return a turn."""
    return {"role": role, "text": text, "note": note}


def conversation_view(elem_id: str) -> gr.HTML:
    """Make the component that shows conversations."""
    return gr.HTML(
        render_conversation(()), js_on_load=COPY_JS + _ACTION_JS, elem_id=elem_id,
        elem_classes="conversation",
        autoscroll=True, apply_default_css=False,
    )  # fmt: skip


def render_conversation(turns: Sequence[Turn], *, is_running: bool = False) -> str:
    """Return the HTML of a conversation.

    Args:
        turns: in order.
        is_running: whether the last one is still growing.
    """
    if not turns:
        return _EMPTY
    last = len(turns) - 1
    parts = [_message(t, i, i == last, is_running) for i, t in enumerate(turns)]
    busy = str(is_running).lower()
    return f'<div role="log" aria-label="Conversation" aria-busy="{busy}">{"".join(parts)}</div>'


def with_copy_buttons(html: str) -> str:
    """Give each block of code of rendered Markdown a button that copies it."""
    button = (
        '<div class="code"><button type="button" data-action="copy-code" '
        'aria-label="Copy the code">Copy</button><pre>'
    )
    return html.replace("<pre>", button).replace("</pre>", "</pre></div>")


def _message(turn: Turn, index: int, is_last: bool, is_running: bool) -> str:
    role, text = turn["role"], turn["text"]
    if role == "assistant":
        growing = (
            '<span class="cursor" aria-hidden="true"></span>' if is_last and is_running else ""
        )
        body = f'<div class="markdown">{with_copy_buttons(render_markdown(text))}{growing}</div>'
    else:
        body = f'<div class="plain">{escape(text)}</div>'
    note = f'<span class="note">{escape(turn["note"])}</span>' if turn["note"] else ""
    buttons = "" if is_running else _buttons(role, index, is_last)
    alert = ' role="alert"' if role == "error" else ""
    return (
        f'<article class="message {role}" data-text="{escape(text)}" aria-label="{_NAMES[role]}"'
        f'{alert}>{body}<footer>{note}<span class="actions">{buttons}</span></footer></article>'
    )


def _buttons(role: Role, index: int, is_last: bool) -> str:
    actions = [("copy", "Copy", "Copy this message")]
    if role == "user":
        actions.append(("edit", "Edit", "Edit this message and ask again"))
    if role != "user" and is_last:
        actions.append(("regenerate", "Regenerate", "Ask for another answer"))
    return "".join(
        f'<button type="button" data-action="{action}" data-index="{index}" aria-label="{name}">'
        f"{label}</button>"
        for action, label, name in actions
    )


def clicked(event: gr.EventData) -> tuple[str, int]:
    """Return which button was pressed and the place of its message."""
    data: dict[str, Any] = event._data or {}
    return str(data.get("action", "")), int(data.get("index", 0))
