"""POST /v1/completions."""

import time
from collections.abc import AsyncGenerator, Sequence
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
from serve.api.chunks import ChunkWriter, Details, make_completion_writer
from serve.api.context import ApiContext, make_id, run_work
from serve.api.enrolment import Enrolment, enrol, watch
from serve.api.errors import ApiError
from serve.api.generation import Generation, Piece
from serve.api.logprobs import LegacyLogprobs, make_trace_entry
from serve.api.prompts import encode_prompts
from serve.api.resolve import (
    DEFAULT_MAX_TOKENS,
    ModelChoice,
    build_arm,
    check_num_sequences,
    check_stream_options,
    resolve_max_tokens,
    split_model,
)
from serve.api.schema import CompletionBody
from serve.requests import GenerationRequest

_MAX_PROMPT_LOGPROBS = 2**20


def build_completions_router(context: ApiContext) -> APIRouter:
    """Return the routes of text completions."""
    router = APIRouter()

    @router.post("/v1/completions")
    async def create_completion(request: Request) -> Response:
        answer_id = make_id("cmpl")
        body, enrolment = enrol(
            context, await read_request(request, CompletionBody, context.settings), answer_id
        )
        choice = split_model(body.model, context)
        _check(body)
        requests = await _make_requests(context, body, choice, answer_id)
        head: dict[str, object] = {
            "id": answer_id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": choice.model,
        }
        completion = _Completion(context, body, requests, enrolment)
        if not body.stream:
            return JsonWhenDone(completion.answer(head), extra=completion.extra)
        return EventStream(
            completion.stream(head),
            ping_interval_s=context.settings.ping_interval_s,
            extra=completion.extra,
        )

    return router


def _check(body: CompletionBody) -> None:
    check_stream_options(body)
    if body.best_of is not None and body.best_of != (1 if body.n is None else body.n):
        raise ApiError(
            "best_of is supported only where it equals n.", param="best_of", code="invalid_value"
        )
    if body.suffix and body.echo:
        raise ApiError("echo does not go with suffix.", param="echo", code="invalid_value")


async def _make_requests(
    context: ApiContext, body: CompletionBody, choice: ModelChoice, answer_id: str
) -> list[GenerationRequest]:
    num_sequences = check_num_sequences(body.n, len(body.prompt), context.settings)
    prompts = await encode_prompts(
        context, body.prompt, suffix=body.suffix, add_special_tokens=body.add_special_tokens
    )
    max_tokens = resolve_max_tokens(
        {"max_tokens": body.max_tokens},
        default=DEFAULT_MAX_TOKENS,
        minimum=0,
        num_prompt_tokens=max(map(len, prompts)),
        prompt_param="prompt",
        context=context.backend.max_context_tokens,
    )
    prompt_logprobs = body.logprobs if body.echo else None
    if prompt_logprobs is not None:
        num_tokens = num_sequences * sum(map(len, prompts))
        _check_num_logprobs(num_tokens * (1 + prompt_logprobs), body)
    arm = build_arm(
        body,
        choice,
        context,
        max_tokens=max_tokens,
        num_sequences=num_sequences,
        logprobs=body.logprobs,
    )
    return [
        GenerationRequest(
            request_id=f"{answer_id}-{index}",
            prompt_token_ids=prompt,
            arms=(arm,),
            is_traced=bool(body.return_decoding_trace),
            prompt_logprobs=prompt_logprobs,
        )
        for index, prompt in enumerate(prompts)
    ]


def _check_num_logprobs(number: int, body: CompletionBody) -> None:
    if number > _MAX_PROMPT_LOGPROBS:
        raise ApiError(
            f"echo with logprobs {body.logprobs} and n {body.n or 1} asks for {number} log "
            f"probabilities of prompt tokens; the most is {_MAX_PROMPT_LOGPROBS}. Lower one of "
            "them, or send fewer prompts.",
            param="logprobs",
            code="invalid_value",
        )


class _Completion:
    """The answer to one request.

    Attributes:
        extra: headers of an experiment's.
    """

    def __init__(
        self,
        context: ApiContext,
        body: CompletionBody,
        requests: list[GenerationRequest],
        enrolment: Enrolment | None,
    ) -> None:
        (arm,) = requests[0].arms
        is_dry = not arm.params.max_tokens and requests[0].prompt_logprobs is None
        self._tokenizer = context.tokenizer
        self._body = body
        self._requests = requests
        self._generation = Generation(context, requests, is_dry=is_dry)
        self._on_end, self.extra = watch(enrolment, self._generation)
        self._echoes = [self._echo(prompt) for prompt in body.prompt]
        self._echoed: dict[int, LegacyLogprobs] = {}

    def _echo(self, prompt: str | Sequence[int]) -> str:
        if not self._body.echo:
            return ""
        return prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt)

    async def answer(self, head: dict[str, object]) -> bytes:
        """Return the whole answer."""
        answers = await collect_answers(self._generation, self._generation.num_choices)
        if self._on_end is not None:
            await self._on_end()
        for prompt in range(len(self._requests)):
            await self._prepare(prompt)
        num_tokens = count_tokens(answers)
        if self._echoed:
            num_tokens += self._generation.num_sequences * sum(
                len(request.prompt_token_ids) for request in self._requests
            )
        return await encode_whole(
            head,
            "choices",
            self._make_choice,
            answers,
            self._generation.usage(),
            num_values=num_tokens * (1 + (self._body.logprobs or 0)),
        )

    def _make_choice(self, index: int, answer: Answer) -> dict[str, object]:
        prompt = index // self._generation.num_sequences
        echo = self._echoes[prompt]
        logprobs = None
        if self._body.logprobs is not None:
            logprobs = LegacyLogprobs(self._tokenizer, self._echoed.get(prompt))
            for piece in answer.pieces:
                logprobs.add_piece(piece, len(echo))
        choice: dict[str, object] = {
            "index": index,
            "text": echo + answer.text,
            "logprobs": None if logprobs is None else logprobs.value(),
            "finish_reason": answer.finish_reason,
        }
        if self._body.return_decoding_trace:
            choice["decoding_trace"] = [
                make_trace_entry(self._tokenizer, piece.output) for piece in answer.pieces
            ]
        return choice

    async def _prepare(self, prompt: int) -> None:
        """Write the log probabilities of an echoed prompt, once for all its choices."""
        found = self._generation.prompt_logprobs[prompt]
        if found is None or prompt in self._echoed:
            return
        token_ids, text = self._requests[prompt].prompt_token_ids, self._echoes[prompt]

        def write() -> LegacyLogprobs:
            logprobs = LegacyLogprobs(self._tokenizer)
            logprobs.add_prompt(token_ids, found, text)
            return logprobs

        size = len(token_ids) * (1 + (self._body.logprobs or 0))
        self._echoed[prompt] = await run_work(write, size=size)

    async def _prepare_pieces(self, pieces: list[Piece]) -> None:
        for piece in pieces:
            await self._prepare(piece.choice // self._generation.num_sequences)

    def stream(self, head: dict[str, object]) -> AsyncGenerator[bytes, None]:
        """Return the events of the streamed answer."""
        body = self._body
        options = body.stream_options
        writer = make_completion_writer(head, with_usage=bool(options and options.include_usage))
        return stream_answer(
            self._generation,
            writer,
            num_choices=self._generation.num_choices,
            opening=partial(self._open, writer),
            describe=(
                self._describe if body.logprobs is not None or body.return_decoding_trace else None
            ),
            options=options,
            prepare=self._prepare_pieces,
            on_end=self._on_end,
        )

    def _open(self, writer: ChunkWriter, index: int, usage: str | None) -> str:
        prompt = index // self._generation.num_sequences
        if not self._body.echo:
            return ""
        value = None
        if self._body.logprobs is not None:
            value = (self._echoed.get(prompt) or LegacyLogprobs(self._tokenizer)).value()
        return writer.detailed(index, self._echoes[prompt], Details(value), usage)

    def _describe(self, piece: Piece) -> Details:
        value = None
        if self._body.logprobs is not None:
            logprobs = LegacyLogprobs(self._tokenizer)
            prompt = piece.choice // self._generation.num_sequences
            logprobs.add_piece(piece, len(self._echoes[prompt]))
            value = logprobs.value()
        trace = None
        if self._body.return_decoding_trace:
            trace = [make_trace_entry(self._tokenizer, piece.output)]
        return Details(value, trace)
