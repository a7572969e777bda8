"""POST /v1/chat/completions."""

import time
from functools import partial

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from serve.api.answers import Answer, collect_answers, run_text_work, stream_answer
from serve.api.body import read_request
from serve.api.chunks import Details, make_chat_writer
from serve.api.context import ApiContext
from serve.api.errors import ApiError
from serve.api.generation import Generation, Piece
from serve.api.identity import make_id
from serve.api.logprobs import make_chat_entry, make_trace_entry
from serve.api.openapi import describe_body
from serve.api.resolve import (
    MAX_LOGPROBS,
    ModelChoice,
    build_params,
    check_num_sequences,
    check_stream_options,
    resolve_adapter_scale,
    resolve_max_tokens,
    resolve_strategy,
    split_model,
)
from serve.api.schema import ChatBody, Message
from serve.api.transport import EventStream, JsonWhenDone
from serve.requests import Arm, GenerationRequest
from text.tokenizer import Tokenizer


def build_chat_router(context: ApiContext) -> APIRouter:
    """Return the routes of chat completions."""
    router = APIRouter()

    @router.post("/v1/chat/completions", openapi_extra=describe_body(ChatBody))
    async def create_chat_completion(request: Request) -> Response:
        body = await read_request(request, ChatBody, context.settings)
        choice = split_model(body.model, context)
        check_stream_options(body)
        asked = await _make_request(context, body, choice, make_id("chatcmpl"))
        describe = None
        if body.logprobs or body.return_decoding_trace:
            describe = partial(_describe, context.tokenizer, body)
        generation = Generation(context, [asked])
        head: dict[str, object] = {
            "id": asked.request_id,
            "object": "chat.completion.chunk" if body.stream else "chat.completion",
            "created": int(time.time()),
            "model": choice.model,
        }
        if not body.stream:
            return JsonWhenDone(_answer(context, body, generation, head))
        options = body.stream_options
        writer = make_chat_writer(head, with_usage=bool(options and options.include_usage))
        frames = stream_answer(
            generation,
            writer,
            num_choices=generation.num_choices,
            opening=writer.opening,
            describe=describe,
            options=options,
        )
        return EventStream(frames, ping_interval_s=context.settings.ping_interval_s)

    return router


async def _make_request(
    context: ApiContext, body: ChatBody, choice: ModelChoice, request_id: str
) -> GenerationRequest:
    num_sequences = check_num_sequences(body.n, 1, context.settings)
    strategy = resolve_strategy(body.decoding, choice.strategy)
    adapter_scale = resolve_adapter_scale(body.adapter_scale, has_side=choice.has_side)
    logprobs = _resolve_logprobs(body)
    token_ids = await encode_messages(context, body.messages)
    max_tokens = resolve_max_tokens(
        {"max_tokens": body.max_tokens, "max_completion_tokens": body.max_completion_tokens},
        default=None,
        minimum=1,
        num_prompt_tokens=len(token_ids),
        prompt_param="messages",
        context=context.backend.max_context_tokens,
    )
    params = build_params(
        body,
        strategy=strategy,
        max_tokens=max_tokens,
        logprobs=logprobs,
        vocab_size=context.backend.vocab_size,
    )
    return GenerationRequest(
        request_id=request_id,
        prompt_token_ids=token_ids,
        arms=(
            Arm(
                params=params,
                num_sequences=num_sequences,
                adapter=choice.adapter,
                adapter_scale=adapter_scale,
            ),
        ),
        is_traced=bool(body.return_decoding_trace),
        prompt_is_template=True,
    )


def _resolve_logprobs(body: ChatBody) -> int | None:
    top = body.top_logprobs
    if top is None:
        return 0 if body.logprobs else None
    if not body.logprobs:
        raise ApiError(
            "top_logprobs needs logprobs: true.", param="top_logprobs", code="invalid_value"
        )
    if not 0 <= top <= MAX_LOGPROBS:
        raise ApiError(
            f"top_logprobs must be from 0 to {MAX_LOGPROBS}.",
            param="top_logprobs",
            code="invalid_value",
        )
    return top


async def encode_messages(
    context: ApiContext, messages: list[Message], *, add_generation_prompt: bool = True
) -> list[int]:
    """Return the token ids of a conversation.

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
        add_generation_prompt=add_generation_prompt,
        limit=context.backend.max_context_tokens,
    )
    num_chars = sum(len(turn["content"]) + 32 for turn in turns)
    return await run_text_work(num_chars, work, param="messages")


def _describe(tokenizer: Tokenizer, body: ChatBody, piece: Piece) -> Details:
    logprobs = None
    if body.logprobs:
        logprobs = {"content": [make_chat_entry(tokenizer, piece.output)], "refusal": None}
    trace = [make_trace_entry(tokenizer, piece.output)] if body.return_decoding_trace else None
    return Details(logprobs, trace)


async def _answer(
    context: ApiContext, body: ChatBody, generation: Generation, head: dict[str, object]
) -> dict[str, object]:
    answers = await collect_answers(generation, generation.num_choices)
    choices = [
        _make_choice(context.tokenizer, body, index, answer) for index, answer in enumerate(answers)
    ]
    return {**head, "choices": choices, "usage": generation.usage()}


def _make_choice(
    tokenizer: Tokenizer, body: ChatBody, index: int, answer: Answer
) -> dict[str, object]:
    outputs = [piece.output for piece in answer.pieces]
    logprobs = None
    if body.logprobs:
        content = [make_chat_entry(tokenizer, output) for output in outputs]
        logprobs = {"content": content, "refusal": None}
    choice: dict[str, object] = {
        "index": index,
        "message": {"role": "assistant", "content": answer.text, "refusal": None},
        "logprobs": logprobs,
        "finish_reason": answer.finish_reason,
    }
    if body.return_decoding_trace:
        choice["decoding_trace"] = [make_trace_entry(tokenizer, output) for output in outputs]
    return choice
