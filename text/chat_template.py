"""Chat templates: Jinja files of a model folder, rendered in a sandbox."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2

from text.template_sandbox import BoundedEnvironment, BudgetError

_MAX_MESSAGE_CHARS = 200
_ROLES = ("system", "user", "assistant", "user")  # any other role is shown as the user's
_PROBES = (_ROLES, _ROLES[1:], ("user",))
_RENDER_ERRORS = (
    jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError,
    TypeError, ValueError,
)  # fmt: skip


class ChatTemplateError(ValueError):
    """The messages do not suit the model's chat template, or it has none."""


class ChatTemplate:
    """A compiled template. It comes from the model's folder, never from a request.

    Templates read a message's content as text or as a list of parts. Which of the two is found by
    rendering a probe, for each role; a template that shows a user's words in neither form is
    refused when it is used.

    Attributes:
        unread_roles: roles whose words it does not show.
        fault: why it takes more work than any conversation may, or None.

    Args:
        source: Jinja text.
        special_tokens: names that the template may use, such as `bos_token`.

    Raises:
        ChatTemplateError: the text is no Jinja template.
    """

    unread_roles: frozenset[str]

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self._environment = BoundedEnvironment({"tojson": _apply_tojson})
        self._environment.globals["raise_exception"] = _raise_exception
        self._environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = self._environment.compile_bounded(source)
        except (jinja2.TemplateError, SyntaxError, RecursionError, MemoryError) as error:
            raise ChatTemplateError(f"the model's chat template is broken: {error}") from error
        self._special_tokens = dict(special_tokens)
        self._part_roles = self.unread_roles = frozenset()
        self.fault: str | None = None
        try:
            self._part_roles, self.unread_roles = self._probe()
        except ChatTemplateError as error:
            self.fault = str(error)

    def render(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
    ) -> str:
        """Return the prompt text of a conversation.

        Args:
            messages: `role` and `content` of each turn.
            add_generation_prompt: end with the opening of an assistant turn.

        Raises:
            ChatTemplateError: the template refuses the conversation, takes too much work for it,
                or does not show what the user says.
        """
        if "user" in self.unread_roles:
            raise ChatTemplateError(
                "The model's chat template shows nothing of a user's message, as text or as a list "
                "of parts; use /v1/completions."
            )
        return self._render(messages, self._part_roles, add_generation_prompt)

    def _render(
        self,
        messages: Sequence[Mapping[str, str]],
        part_roles: frozenset[str],
        add_generation_prompt: bool,
    ) -> str:
        self._environment.give(sum(len(v) for message in messages for v in message.values()))
        try:
            return self._template.render(
                messages=[
                    {**message, "content": [{"type": "text", "text": message["content"]}]}
                    if (message["role"] if message["role"] in _ROLES else "user") in part_roles
                    else dict(message)
                    for message in messages
                ],
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._special_tokens,
            )
        except _RENDER_ERRORS as error:
            reason = str(error)[:_MAX_MESSAGE_CHARS]
            raise ChatTemplateError(f"The model's chat template refuses this: {reason}") from error

    def _probe(self) -> tuple[frozenset[str], frozenset[str]]:
        """Return the roles whose content must be a list of parts, and those that are not shown."""
        for roles in _PROBES:
            turns = [{"role": role, "content": f"probing{i}"} for i, role in enumerate(roles)]
            as_text = self._lost(turns, frozenset())
            if as_text == frozenset():
                return as_text, as_text
            part_roles = frozenset(roles) if as_text is None else as_text
            as_parts = self._lost(turns, part_roles)
            if as_parts is not None:
                # What is not shown as parts either stays text.
                return part_roles - as_parts, as_parts
            if as_text is not None:
                return frozenset(), as_text
        return frozenset(), frozenset()

    def _lost(
        self, turns: Sequence[Mapping[str, str]], part_roles: frozenset[str]
    ) -> frozenset[str] | None:
        """Return the roles whose words are not shown; None where the template refuses them."""
        try:
            text = self._render(turns, part_roles, True)
        except ChatTemplateError as error:
            if isinstance(error.__cause__, BudgetError):
                raise
            return None
        shown = {turn["role"] for turn in turns if turn["content"] in text}
        return frozenset(turn["role"] for turn in turns) - shown


def load_chat_template(
    folder: Path, tokenizer_config: Mapping[str, Any], special_tokens: Mapping[str, str]
) -> ChatTemplate | None:
    """Return the folder's chat template, or None where it has none.

    `chat_template.jinja` comes before `chat_template` in `tokenizer_config.json`; of several named
    templates the one called "default" is taken.

    Raises:
        ChatTemplateError: it is no Jinja template.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return ChatTemplate(path.read_text(encoding="utf-8"), special_tokens)
        except UnicodeDecodeError as error:
            raise ChatTemplateError(f"{path}: not UTF-8 text: {error}") from None
    source = tokenizer_config.get("chat_template")
    if isinstance(source, list):
        named = [entry for entry in source if isinstance(entry, dict)]
        source = next((e.get("template") for e in named if e.get("name") == "default"), None)
    return ChatTemplate(source, special_tokens) if isinstance(source, str) else None


def _apply_tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which a prompt must not have.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
