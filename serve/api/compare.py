"""POST /v1/compare: one prompt, answered by several arms at once."""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Sequence

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from decoding import ParameterError, SamplingParams, derive_seed
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
from serve.api.chunks import Details, make_comparison_writer
from serve.api.context import COMPARISON_PREFIX, ApiContext, make_id
from serve.api.enrolment import Enrolment, comparison_arms, enrol_paired, watch
from serve.api.errors import ApiError
from serve.api.generation import Generation, Piece
from serve.api.logprobs import make_trace_entry
from serve.api.prompts import encode_chat, encode_prompts
from serve.api.resolve import (
    DEFAULT_MAX_TOKENS,
    ModelChoice,
    build_arm,
    resolve_adapter_scale,
    resolve_max_tokens,
    split_model,
)
from serve.api.schema import CompareBody, ComparisonArm, SamplingFields, StreamOptions
from serve.experiments.comparison import ArmIdentity, Comparison, build_identity
from serve.experiments.database import DatabaseError
from serve.requests import Arm, GenerationRequest

_LOG = logging.getLogger("proa.api")


def build_compare_router(context: ApiContext) -> APIRouter:
    """Return the route of comparisons."""
    router = APIRouter()

    @router.post("/v1/compare")
    async def create_comparison(request: Request) -> Response:
        body = await read_request(request, CompareBody, context.settings)
        answer_id = make_id(COMPARISON_PREFIX)
        enrolment = None
        if body.experiment is not None:
            enrolment = enrol_paired(context, body.experiment, answer_id)
        compared = body.arms or ()
        if enrolment is not None:
            compared = comparison_arms(enrolment.experiment)
        _check(body, compared, context)
        asked, arms = await _make_request(context, body, compared, answer_id)
        comparison = _Comparison(context, body, asked, arms, enrolment)
        if not body.stream:
            return JsonWhenDone(comparison.answer(), extra=comparison.extra)
        return EventStream(
            comparison.stream(),
            ping_interval_s=context.settings.ping_interval_s,
            extra=comparison.extra,
        )

    return router


def _check(body: CompareBody, arms: Sequence[ComparisonArm], context: ApiContext) -> None:
    if (body.arms is None) == (body.experiment is None):
        raise ApiError(
            "Give exactly one of arms and experiment.",
            param="arms" if body.arms is None else "experiment",
            code="invalid_value",
        )
    if (body.messages is None) == (body.prompt is None):
        raise ApiError(
            "Give exactly one of messages and prompt.",
            param="messages" if body.messages is None else "prompt",
            code="invalid_value",
        )
    limit = context.settings.max_sequences_per_prompt
    if len(arms) > limit:
        raise ApiError(f"arms must be at most {limit}.", param="arms", code="invalid_value")
    if body.common_random_numbers:
        for index, arm in enumerate(arms):
            if arm.seed is not None:
                raise ApiError(
                    f"arms[{index}].seed contradicts common_random_numbers: true.",
                    param=f"arms[{index}].seed",
                    code="invalid_value",
                )


async def _make_request(
    context: ApiContext, body: CompareBody, compared: Sequence[ComparisonArm], answer_id: str
) -> tuple[GenerationRequest, tuple[ArmIdentity, ...]]:
    """Return what the backend is asked, and what votes will know of the arms."""
    add = body.add_special_tokens
    if body.messages is not None:
        token_ids = await encode_chat(context, body.messages, add_special_tokens=add)
    else:
        assert body.prompt is not None
        (token_ids,) = await encode_prompts(context, [body.prompt], add_special_tokens=add)
    seed = secrets.randbits(63) if body.seed is None else body.seed
    SamplingParams(seed=seed)  # refuses one out of range, which a derived seed would hide
    is_common = body.common_random_numbers is not False
    arms, identities, has_sides = [], [], []
    for index, arm in enumerate(compared):
        arm_seed = seed if is_common else derive_seed(seed, index)
        try:
            choice = split_model(arm.model, context)
            has_sides.append(choice.has_side)
            fields = _merge_fields(body, arm, choice, arm_seed)
            arms.append(_make_arm(context, body, fields, choice, len(token_ids)))
            identities.append(_identify(fields))
        except (ApiError, ParameterError) as error:
            raise _at_arm(error, index, arm) from None
    resolve_adapter_scale(body.adapter_scale, has_side=any(has_sides))
    asked = GenerationRequest(
        request_id=answer_id,
        prompt_token_ids=token_ids,
        arms=tuple(arms),
        is_traced=bool(body.return_decoding_trace),
        prompt_is_template=body.messages is not None,
    )
    return asked, tuple(identities)


def _merge_fields(
    body: CompareBody, arm: ComparisonArm, choice: ModelChoice, seed: int
) -> ComparisonArm:
    """Return an arm with the shared fields that hold for it."""
    own = {name for name in SamplingFields.model_fields if getattr(arm, name) is not None}
    shared = {name: getattr(body, name) for name in SamplingFields.model_fields.keys() - own}
    if not choice.has_side:
        shared.pop("adapter_scale", None)
    decoding = shared.get("decoding") or {}
    if choice.strategy is not None and decoding.get("strategy") not in (None, choice.strategy):
        del shared["decoding"]  # the arm's model has a strategy of its own
    if "seed" not in own:
        shared["seed"] = seed
    return arm.model_copy(update=shared)


def _identify(arm: ComparisonArm) -> ArmIdentity:
    fields = {name: getattr(arm, name) for name in SamplingFields.model_fields if name != "seed"}
    label = arm.model if arm.label is None else arm.label
    return build_identity(label, arm.model, fields=fields)


def _make_arm(
    context: ApiContext,
    body: CompareBody,
    fields: ComparisonArm,
    choice: ModelChoice,
    num_prompt_tokens: int,
) -> Arm:
    max_tokens = resolve_max_tokens(
        {"max_tokens": fields.max_tokens},
        default=None if body.prompt is None else DEFAULT_MAX_TOKENS,
        minimum=1,
        num_prompt_tokens=num_prompt_tokens,
        prompt_param="messages" if body.prompt is None else "prompt",
        context=context.backend.max_context_tokens,
    )
    return build_arm(fields, choice, context, max_tokens=max_tokens)


def _at_arm(error: ApiError | ParameterError, index: int, arm: ComparisonArm) -> Exception:
    """Return an error with its arm's name, if the arm has the field at fault."""
    if getattr(arm, (error.param or "").partition(".")[0], None) is None:
        return error
    return ApiError(
        f"arms[{index}]: {error}",
        status=error.status if isinstance(error, ApiError) else 400,
        param=f"arms[{index}].{error.param}",
        code=error.code if isinstance(error, ApiError) else "invalid_value",
    )


class _Comparison:
    """The answer to one request; an arm is a choice.

    Attributes:
        extra: headers of an experiment's.
    """

    def __init__(
        self,
        context: ApiContext,
        body: CompareBody,
        asked: GenerationRequest,
        arms: tuple[ArmIdentity, ...],
        enrolment: Enrolment | None,
    ) -> None:
        self._context = context
        self._body = body
        self._num_arms = len(arms)
        self._comparison = Comparison(id=asked.request_id, created=int(time.time()), arms=arms)
        self._generation = Generation(context, [asked])
        self._on_end, self.extra = watch(enrolment, self._generation)
        self._head: dict[str, object] = {
            "id": self._comparison.id,
            "object": "comparison.chunk" if body.stream else "comparison",
            "created": self._comparison.created,
        }

    async def answer(self) -> bytes:
        """Return the whole answer."""
        answers = await collect_answers(self._generation, self._num_arms)
        await self._remember()
        return await encode_whole(
            self._head,
            "arms",
            self._make_entry,
            answers,
            self._generation.usage(),
            num_values=count_tokens(answers),
        )

    def _make_entry(self, index: int, answer: Answer) -> dict[str, object]:
        arm = self._comparison.arms[index]
        entry: dict[str, object] = {"index": index, "label": arm.label, "model": arm.model}
        if self._body.messages is None:
            entry["text"] = answer.text
        else:
            entry["message"] = {"role": "assistant", "content": answer.text, "refusal": None}
        entry["finish_reason"] = answer.finish_reason
        entry["usage"] = self._generation.choice_usage(index)
        if self._body.return_decoding_trace:
            entry["decoding_trace"] = [self._trace_entry(piece) for piece in answer.pieces]
        return entry

    def stream(self) -> AsyncGenerator[bytes, None]:
        """Return the events of the streamed answer."""
        is_chat = self._body.messages is not None
        writer = make_comparison_writer(self._head, is_chat=is_chat)
        return stream_answer(
            self._generation,
            writer,
            num_choices=self._num_arms,
            opening=writer.opening if is_chat else _open_text,
            describe=self._describe if self._body.return_decoding_trace else None,
            options=StreamOptions(include_usage=True, continuous_usage_stats=None),
            usage=self._usage,
            on_end=self._remember,
        )

    async def _remember(self) -> None:
        """Keep the answered comparison, so that it can be voted on.

        What goes wrong is logged: the answer matters more.
        """
        if self._on_end is not None:
            await self._on_end()
        if self._context.votes is None:
            return
        try:
            await asyncio.to_thread(self._context.votes.remember, self._comparison)
        except DatabaseError as error:
            _LOG.error("a comparison cannot be kept for votes: %s", error)

    def _usage(self) -> dict[str, object]:
        arms = [self._generation.choice_usage(index) for index in range(self._num_arms)]
        return {**self._generation.usage(), "arms": arms}

    def _describe(self, piece: Piece) -> Details:
        return Details(trace=[self._trace_entry(piece)])

    def _trace_entry(self, piece: Piece) -> dict[str, object]:
        return make_trace_entry(self._context.tokenizer, piece.output)


def _open_text(_index: int, _usage: str | None) -> str:
    return ""
