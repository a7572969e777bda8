"""Turn records of training data into the tokens that a model is trained on."""

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from adapters.qst.examples import Example
from text.chat_template import ChatTemplateError
from text.errors import DataError
from text.records import Record
from text.tokenizer import Tokenizer

LongPolicy = Literal["error", "truncate", "skip"]
ROLES = ("system", "user", "assistant")


@dataclass(kw_only=True, slots=True)
class Limit:
    """What becomes of sequences that are too long.

    Attributes:
        max_tokens: most tokens a sequence may have.
        policy: refuse them, cut them, or leave them out.
        reason: what sets the limit, for messages.
        truncated, skipped: how many were.
        refused: messages about those that were refused.
    """

    max_tokens: int
    policy: LongPolicy
    reason: str
    truncated: int = 0
    skipped: int = 0
    refused: list[str] = field(default_factory=list)

    def apply(self, example: Example, place: str) -> Example | None:
        """Return what is left of an example, None if nothing is."""
        length = len(example.token_ids)
        if length <= self.max_tokens:
            return example
        if self.policy == "error":
            self.refused.append(
                f"{place}: {length} tokens, over {self.reason} of {self.max_tokens}"
            )
            return None
        cut = replace(
            example,
            token_ids=example.token_ids[: self.max_tokens],
            is_target=example.is_target[: self.max_tokens],
        )
        if self.policy == "skip" or not cut.num_targets:
            self.skipped += 1
            return None
        self.truncated += 1
        return cut

    def check(self) -> None:
        """Refuse the data if something was too long.

        Raises:
            DataError: names the first such line and how many more there are.
        """
        if self.refused:
            more = f", and {len(self.refused) - 1} more" if len(self.refused) > 1 else ""
            raise DataError(
                f"{self.refused[0]}{more}; shorten them, or give --long truncate or --long skip"
            )


def build_examples(records: Sequence[Record], tokenizer: Tokenizer, limit: Limit) -> list[Example]:
    """Turn records into sequences for a language model.

    Args:
        records: each has one of the shapes that `proa train --help` lists.
        tokenizer: of the model.
        limit: for sequences that are too long.

    Raises:
        DataError: a record has another shape, or is too long; its line is named.
    """
    examples = []
    for record in records:
        try:
            example = _build_example(record.fields, tokenizer)
        except (ChatTemplateError, ValueError) as error:
            raise DataError(f"{record.place}: {error}") from None
        kept = limit.apply(example, record.place)
        if kept is not None:
            examples.append(kept)
    limit.check()
    return examples


def build_labelled(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    limit: Limit,
    *,
    labels: Sequence[str] | None = None,
) -> tuple[list[Example], tuple[str, ...]]:
    """Turn records with `text` and `label` into sequences for a classifier.

    Args:
        records: texts and their labels; numbers may be labels too.
        tokenizer: of the model.
        limit: for sequences that are too long.
        labels: the classes; None: those of the records.

    Returns:
        The examples, and the classes in order.

    Raises:
        DataError: a record has another shape, an unknown label, or is too long; its line is named.
    """
    for record in records:
        value = record.fields.get("label")
        if not isinstance(value, str | int) or isinstance(value, bool) or value == "":
            raise DataError(
                f'{record.place}: "label" must be text or a whole number, got {value!r}'
            )
    if labels is None:
        labels = sorted({str(r.fields["label"]) for r in records}, key=_label_order)
        if len(labels) < 2:
            raise DataError(f"all examples have the same label, {labels[0]!r}")
    number_of = {label: i for i, label in enumerate(labels)}
    examples = []
    for record in records:
        label = str(record.fields["label"])
        if label not in number_of:
            known = ", ".join(labels)
            raise DataError(f"{record.place}: label {label!r} is not one of the data's: {known}")
        try:
            token_ids = tokenizer.encode(_text(record.fields, "text"), add_special_tokens=True)
        except ValueError as error:
            raise DataError(f"{record.place}: {error}") from None
        example = Example(token_ids=array("i", token_ids), label=number_of[label])
        kept = limit.apply(example, record.place)
        if kept is not None:
            examples.append(kept)
    limit.check()
    return examples, tuple(labels)


def _label_order(label: str) -> tuple[bool, int, str]:
    """Whole numbers by size, before other labels by spelling."""
    return not label.isdecimal(), int(label) if label.isdecimal() else 0, label


def _build_example(fields: Mapping[str, Any], tokenizer: Tokenizer) -> Example:
    if "messages" in fields:
        return _from_messages(_messages(fields["messages"]), tokenizer)
    if "instruction" in fields:
        answer = "output" if "output" in fields or "response" not in fields else "response"
        parts = [_text(fields, "instruction")]
        if fields.get("input"):
            parts.append(_text(fields, "input"))
        return _from_turn("\n\n".join(parts), _text(fields, answer), tokenizer)
    if "question" in fields:
        return _from_turn(_text(fields, "question"), _text(fields, "answer"), tokenizer)
    if "prompt" in fields:
        return _from_prompt(_text(fields, "prompt"), _text(fields, "completion"), tokenizer)
    if "text" in fields:
        return _from_text(_text(fields, "text"), tokenizer)
    raise ValueError(
        "needs messages; instruction and output; question and answer; prompt and completion; or "
        f"text; got {', '.join(fields) or 'nothing'}"
    )


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f'"{name}" must be text that is not empty, got {value!r:.80}')
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f'"{name}" has half of a surrogate pair') from None
    return value


def _messages(value: object) -> list[dict[str, str]]:
    if not isinstance(value, list):
        raise ValueError(f'"messages" must be a list, got {type(value).__name__}')
    messages = []
    for i, message in enumerate(value):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise ValueError(f'"messages": entry {i + 1} needs a role, one of {", ".join(ROLES)}')
        try:
            messages.append({"role": message["role"], "content": _text(message, "content")})
        except ValueError as error:
            raise ValueError(f'"messages": entry {i + 1}: {error}') from None
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()  # nothing is learnt after the last answer
    if not messages:
        raise ValueError('"messages" must hold an answer of the assistant')
    return messages


def _from_turn(question: str, answer: str, tokenizer: Tokenizer) -> Example:
    if tokenizer.chat_template is None:
        return _from_prompt(f"{question}\n\n", answer, tokenizer)
    return _from_messages(
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
        tokenizer,
    )


def _from_messages(messages: list[dict[str, str]], tokenizer: Tokenizer) -> Example:
    """Render a conversation; targets are the answers, each with the token that ends it."""
    token_ids = tokenizer.apply_chat_template(messages, add_generation_prompt=False)
    is_target = bytearray(len(token_ids))
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:i], add_generation_prompt=True)
        after = token_ids
        if i + 1 < len(messages):
            after = tokenizer.apply_chat_template(messages[: i + 1], add_generation_prompt=False)
        start = _common_length(before, after)
        # Text may join with what is before it, by one token at most.
        if start < len(before) - 1 or token_ids[: len(after)] != after:
            raise ValueError(
                "the model's chat template rewrites earlier turns, so that answers cannot be found "
                "in it; give a conversation with one answer"
            )
        stop = _end_of_turn(after, start, tokenizer)
        is_target[start:stop] = b"\1" * (stop - start)
    return Example(token_ids=array("i", token_ids), is_target=bytes(is_target))


def _end_of_turn(token_ids: Sequence[int], start: int, tokenizer: Tokenizer) -> int:
    """Return where an answer ends: after its last control token, or where the text does."""
    ends = {*tokenizer.control_ids, *tokenizer.eos_token_ids}
    found = [i for i in range(start, len(token_ids)) if token_ids[i] in ends]
    return found[-1] + 1 if found else len(token_ids)


def _common_length(a: Sequence[int], b: Sequence[int]) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def _from_prompt(prompt: str, completion: str, tokenizer: Tokenizer) -> Example:
    before = tokenizer.encode(prompt, add_special_tokens=True)
    whole = _closed(tokenizer.encode(prompt + completion, add_special_tokens=True), tokenizer)
    start = max(1, _common_length(before, whole))
    return Example(
        token_ids=array("i", whole), is_target=bytes(start) + b"\1" * (len(whole) - start)
    )


def _from_text(text: str, tokenizer: Tokenizer) -> Example:
    token_ids = _closed(tokenizer.encode(text, add_special_tokens=True), tokenizer)
    return Example(token_ids=array("i", token_ids), is_target=b"\1" * len(token_ids))


def _closed(token_ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """Add the token that ends a text, unless it is there or there is none."""
    ends = tokenizer.eos_token_ids
    return token_ids if not ends or token_ids[-1] in ends else [*token_ids, ends[0]]


def describe_examples(
    name: str, examples: Sequence[Example], limit: Limit, report: Callable[[str], None]
) -> None:
    """Report what was read.

    Raises:
        DataError: nothing is left.
    """
    left_out = f", {limit.skipped} left out as too long" if limit.skipped else ""
    cut = f", {limit.truncated} cut to {limit.max_tokens} tokens" if limit.truncated else ""
    if not examples:
        raise DataError(f"{name}: no examples are left{left_out}")
    tokens = sum(len(example.token_ids) for example in examples)
    targets = sum(example.num_targets for example in examples)
    report(f"{name}: {len(examples)} examples, {tokens} tokens, {targets} targets{cut}{left_out}")
