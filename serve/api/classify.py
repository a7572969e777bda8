"""POST /v1/classify: which class texts are of, by a classification adapter."""

import math
import time
from collections.abc import Sequence
from contextlib import aclosing

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from decoding import SamplingParams
from serve.api.answers import JsonWhenDone
from serve.api.body import read_request
from serve.api.context import ApiContext, make_id
from serve.api.errors import ApiError, encode_json
from serve.api.generation import Generation
from serve.api.prompts import encode_classified
from serve.api.resolve import ModelChoice, list_names, split_model
from serve.api.schema import ClassifyBody
from serve.requests import Arm, GenerationRequest

# Nothing is drawn.
_PARAMS = SamplingParams(max_tokens=0, seed=0)


def build_classify_router(context: ApiContext) -> APIRouter:
    """Return the route of classification."""
    router = APIRouter()

    @router.post("/v1/classify")
    async def classify(request: Request) -> Response:
        body = await read_request(request, ClassifyBody, context.settings)
        choice = split_model(body.model, context)
        labels = _labels_of(choice, context)
        limit = context.settings.max_sequences_per_request
        if len(body.input) > limit:
            raise ApiError(
                f"input must be at most {limit} texts, got {len(body.input)}.",
                param="input",
                code="invalid_value",
            )
        prompts = await encode_classified(context, body.input)
        answer_id = make_id("classify")
        arm = Arm(params=_PARAMS, adapter=choice.adapter)
        requests = [
            GenerationRequest(
                request_id=f"{answer_id}-{index}",
                prompt_token_ids=prompt,
                arms=(arm,),
                is_classification=True,
            )
            for index, prompt in enumerate(prompts)
        ]
        head: dict[str, object] = {
            "id": answer_id,
            "object": "list",
            "created": int(time.time()),
            "model": choice.model,
            "labels": labels,
        }
        return JsonWhenDone(_answer(head, labels, Generation(context, requests)))

    return router


def _labels_of(choice: ModelChoice, context: ApiContext) -> tuple[str, ...]:
    if choice.labels is not None and choice.strategy is None:
        return choice.labels
    names = [info.name for info in context.backend.adapters() if info.labels is not None]
    raise ApiError(
        f"model must name an adapter that classifies, and no strategy; attached: "
        f"{list_names(names)}.",
        param="model",
        code="invalid_value",
    )


async def _answer(head: dict[str, object], labels: Sequence[str], generation: Generation) -> bytes:
    scores: dict[int, tuple[float, ...]] = {}
    async with aclosing(generation.steps()) as steps:
        async for pieces in steps:
            for piece in pieces:
                assert piece.output.class_scores is not None
                scores[piece.choice] = piece.output.class_scores
    data = [_describe(index, labels, scores[index]) for index in sorted(scores)]
    return encode_json({**head, "data": data, "usage": generation.usage()})


def _describe(index: int, labels: Sequence[str], scores: Sequence[float]) -> dict[str, object]:
    """Return the entry of one text; a single label is a regression's, whose score has no bounds."""
    entry: dict[str, object] = {"index": index, "num_classes": len(labels)}
    if len(labels) == 1:
        return {**entry, "label": None, "probs": [], "score": scores[0]}
    largest = max(scores)
    weights = [math.exp(score - largest) for score in scores]
    probs = [weight / sum(weights) for weight in weights]
    label = labels[probs.index(max(probs))]
    return {**entry, "label": label, "probs": probs, "score": None}
