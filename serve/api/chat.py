"""POST /v1/chat/completions."""

import time
from functools import partial

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from serve.api.answers import (
    Answer,
    EventStream,
    JsonWhenDone,
    collect_answers,
    count_tokens,
    encode_whole,
    stream_answer,
)
from serve.api.body import read_request
from serve.api.chunks import Details, make_chat_writer
from serve.api.context import ApiContext, make_id
from serve.api.enrolment import OnEnd, enrol, watch
from serve.api.errors import ApiError
from serve.api.generation import Generation, Piece
from serve.api.logprobs import make_chat_entry, make_trace_entry
from serve.api.prompts import encode_chat
from serve.api.resolve import (
    MAX_LOGPROBS,
    ModelChoice,
    build_arm,
    check_num_sequences,
    check_stream_options,
    resolve_max_tokens,
    split_model,
)
from serve.api.schema import ChatBody
from serve.requests import GenerationRequest
from text.tokenizer import Tokenizer


def build_chat_router(context: ApiContext) -> APIRouter:
    """Return the routes of chat completions."""
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def create_chat_completion(request: Request) -> Response:
        answer_id = make_id("chatcmpl")
        body, enrolment = enrol(
            context, await read_request(request, ChatBody, context.settings), answer_id
        )
        choice = split_model(body.model, context)
        check_stream_options(body)
        asked = await _make_request(context, body, choice, answer_id)
        describe = None
        if body.logprobs or body.return_decoding_trace:
            describe = partial(_describe, context.tokenizer, body)
        generation = Generation(context, [asked])
        on_end, extra = watch(enrolment, generation)
        head: dict[str, object] = {
            "id": asked.request_id,
            "object": "chat.completion.chunk" if body.stream else "chat.completion",
            "created": int(time.time()),
            "model": choice.model,
        }
        if not body.stream:
            return JsonWhenDone(_answer(context, body, generation, head, on_end), extra=extra)
        options = body.stream_options
        writer = make_chat_writer(head, with_usage=bool(options and options.include_usage))
        frames = stream_answer(
            generation,
            writer,
            num_choices=generation.num_choices,
            opening=writer.opening,
            describe=describe,
            options=options,
            on_end=on_end,
        )
        return EventStream(frames, ping_interval_s=context.settings.ping_interval_s, extra=extra)

    return router


async def _make_request(
    context: ApiContext, body: ChatBody, choice: ModelChoice, answer_id: str
) -> GenerationRequest:
    num_sequences = check_num_sequences(body.n, 1, context.settings)
    logprobs = _resolve_logprobs(body)
    token_ids = await encode_chat(
        context, body.messages, add_special_tokens=body.add_special_tokens
    )
    max_tokens = resolve_max_tokens(
        {"max_tokens": body.max_tokens, "max_completion_tokens": body.max_completion_tokens},
        default=None,
        minimum=1,
        num_prompt_tokens=len(token_ids),
        prompt_param="messages",
        context=context.backend.max_context_tokens,
    )
    arm = build_arm(
        body,
        choice,
        context,
        max_tokens=max_tokens,
        num_sequences=num_sequences,
        logprobs=logprobs,
    )
    return GenerationRequest(
        request_id=answer_id,
        prompt_token_ids=token_ids,
        arms=(arm,),
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


def _describe(tokenizer: Tokenizer, body: ChatBody, piece: Piece) -> Details:
    logprobs = None
    if body.logprobs:
        logprobs = {"content": [make_chat_entry(tokenizer, piece.output)], "refusal": None}
    trace = [make_trace_entry(tokenizer, piece.output)] if body.return_decoding_trace else None
    return Details(logprobs, trace)


async def _answer(
    context: ApiContext,
    body: ChatBody,
    generation: Generation,
    head: dict[str, object],
    on_end: OnEnd,
) -> bytes:
    answers = await collect_answers(generation, generation.num_choices)
    if on_end is not None:
        await on_end()
    return await encode_whole(
        head,
        "choices",
        partial(_make_choice, context.tokenizer, body),
        answers,
        generation.usage(),
        num_values=count_tokens(answers) * (1 + (body.top_logprobs or 0)),
    )


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
