"""Prompts and conversations to token ids, and back: all tokenising of the API is here.

What could hold up other requests runs in a thread.
"""

from collections.abc import Callable, Sequence
from functools import partial

from serve.api.context import ApiContext, Result, run_work
from serve.api.errors import ApiError
from serve.api.schema import Message
from text.errors import TextTooLongError, TokenOutsideVocabularyError


async def encode_chat(
    context: ApiContext,
    messages: Sequence[Message],
    *,
    add_special_tokens: bool | None = None,
    add_generation_prompt: bool | None = None,
) -> list[int]:
    """Return the token ids of a conversation.

    Args:
        context: has the tokenizer and the longest context.
        messages: the turns.
        add_special_tokens: add what the tokenizer puts around a text; None: no, as the template
            has written it.
        add_generation_prompt: end with the opening of an answer; None: yes.

    Raises:
        ApiError: there is no message, or they cannot fit the context.
        ChatTemplateError: the model's template refuses the conversation.
    """
    if not messages:
        raise ApiError("messages must not be empty.", param="messages", code="invalid_value")
    turns = [{"role": message.role, "content": message.content} for message in messages]
    work = partial(
        context.tokenizer.apply_chat_template,
        turns,
        add_generation_prompt=add_generation_prompt is not False,
        add_special_tokens=bool(add_special_tokens),
        limit=context.backend.max_context_tokens,
    )
    num_chars = sum(len(turn["content"]) + 32 for turn in turns)
    return await _run(num_chars, work, param="messages")


async def encode_prompts(
    context: ApiContext,
    prompts: Sequence[str | list[int]],
    *,
    suffix: str | None = None,
    add_special_tokens: bool | None = None,
) -> list[list[int]]:
    """Return the token ids of prompts, each of which is text or token ids already.

    Args:
        context: has the tokenizer and the longest context.
        prompts: may hold control tokens.
        suffix: text after the completion.
        add_special_tokens: add what the tokenizer puts around a text; None: yes.

    Raises:
        ApiError: one is empty, cannot fit the context, has ids that the vocabulary lacks, or is ids
            and has a suffix; or the model has no tokens for a suffix.
    """
    if not prompts:
        raise _empty()
    if suffix and context.tokenizer.fim_tokens is None:
        raise ApiError(
            "suffix is not supported: the model has no fill-in-the-middle tokens.",
            param="suffix",
            code="unsupported_field",
        )
    add = add_special_tokens is not False
    num_chars = sum(map(len, prompts)) + len(suffix or "")

    def work() -> list[list[int]]:
        return [_encode_prompt(context, prompt, suffix, add) for prompt in prompts]

    return await _run(num_chars, work, param="prompt")


async def encode_classified(
    context: ApiContext, texts: Sequence[str | list[int]]
) -> list[list[int]]:
    """Return the token ids of texts to classify, as they are in training: control tokens are text.

    Raises:
        ApiError: as `encode_prompts`.
    """
    if not texts:
        raise _empty("input")

    def encode(text: str | list[int]) -> list[int]:
        if not isinstance(text, str):
            _check_token_ids(context, text, param="input")
            return text
        return context.tokenizer.encode(
            text, allow_special=False, add_special_tokens=True,
            limit=context.backend.max_context_tokens,
        )  # fmt: skip

    size = sum(map(len, texts))
    found = await _run(size, lambda: [encode(text) for text in texts], param="input")
    if not all(found):
        raise _empty("input")
    return found


async def encode_text(
    context: ApiContext, text: str, *, allow_special: bool, add_special_tokens: bool, param: str
) -> list[int]:
    """Return the token ids of a text, which may be none.

    Raises:
        ApiError: the text, which is the field `param`, cannot fit the context.
    """
    work = partial(
        context.tokenizer.encode,
        text,
        allow_special=allow_special,
        add_special_tokens=add_special_tokens,
        limit=context.backend.max_context_tokens,
    )
    return await _run(len(text), work, param=param)


async def decode_tokens(context: ApiContext, token_ids: list[int], *, param: str) -> str:
    """Return the text of token ids.

    Raises:
        ApiError: there are more than the context holds, or the vocabulary lacks one.
    """
    _check_token_ids(context, token_ids, param=param)
    return await _run(len(token_ids), partial(context.tokenizer.decode, token_ids), param=param)


def _encode_prompt(
    context: ApiContext, prompt: str | list[int], suffix: str | None, add_special_tokens: bool
) -> list[int]:
    if not prompt:
        raise _empty()
    if not isinstance(prompt, str):
        _check_token_ids(context, prompt, param="prompt")
        if suffix:
            raise ApiError(
                "suffix needs a prompt that is text.", param="suffix", code="invalid_value"
            )
        return prompt
    tokenizer, limit = context.tokenizer, context.backend.max_context_tokens
    if suffix:
        token_ids = tokenizer.encode_infill(
            prompt, suffix, add_special_tokens=add_special_tokens, limit=limit
        )
    else:
        token_ids = tokenizer.encode(
            prompt, allow_special=True, add_special_tokens=add_special_tokens, limit=limit
        )
    if not token_ids:
        raise _empty()
    return token_ids


def _empty(param: str = "prompt") -> ApiError:
    return ApiError(f"{param} must not be empty.", param=param, code="invalid_value")


def _check_token_ids(context: ApiContext, token_ids: Sequence[int], *, param: str) -> None:
    limit, vocab_size = context.backend.max_context_tokens, context.backend.vocab_size
    if len(token_ids) > limit:
        raise _too_long(limit, f"{param} has {len(token_ids)}", param)
    if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
        bad = next(i for i in token_ids if not 0 <= i < vocab_size)
        name = str(bad) if abs(bad) < 10**12 else "a huge number"
        raise ApiError(
            f"{param} must have token ids from 0 to {vocab_size - 1}, got {name}.",
            param=param,
            code="invalid_value",
        )


async def _run(size: int, work: Callable[[], Result], *, param: str) -> Result:
    """Run tokenising work, in a thread where it would hold up other requests.

    Args:
        size: characters or ids that are worked on.
        work: does it.
        param: the field that has them.

    Raises:
        ApiError: a text cannot fit the context, or spells a token that the model lacks.
    """
    try:
        return await run_work(work, size=size)
    except TextTooLongError as error:
        raise _too_long(error.limit, f"{param} has at least {error.num_tokens}", param) from None
    except TokenOutsideVocabularyError as error:
        raise ApiError(
            f"{param} spells the token {error.text!r} (id {error.token_id}), which the model "
            "lacks.",
            param=param,
            code="invalid_value",
        ) from None


def _too_long(limit: int, what: str, param: str) -> ApiError:
    return ApiError(
        f"The context is {limit} tokens, but {what}; shorten it.",
        param=param,
        code="context_length_exceeded",
    )
