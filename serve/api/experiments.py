"""/v1/experiments and /v1/feedback: what is tried out, and what clients say of it."""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from serve.api.body import read_request
from serve.api.context import ApiContext, Experiments
from serve.api.errors import ApiError, encode_json
from serve.api.schema import FeedbackBody
from serve.experiments.database import DatabaseError
from serve.experiments.exposures import TIE, Feedback
from serve.experiments.summary import summarise

_LOG = logging.getLogger("proa.api")


def build_experiments_router(context: ApiContext) -> APIRouter:
    """Return the routes of experiments."""
    router = APIRouter()

    @router.get("/v1/experiments")
    async def list_experiments() -> dict[str, object]:
        plan = {} if context.experiments is None else context.experiments.plan
        data = [
            {
                "id": experiment.name,
                "object": "experiment",
                "unit": experiment.unit,
                "arms": [
                    {
                        "label": arm.label,
                        "model": arm.model,
                        "fields": dict(arm.fields),
                        "weight": arm.weight,
                    }
                    for arm in experiment.arms
                ],
            }
            for experiment in plan.values()
        ]
        return {"object": "list", "data": data}

    @router.get("/v1/experiments/{name}")
    async def report_experiment(name: str) -> Response:
        experiments = context.experiments
        experiment = None if experiments is None else experiments.plan.get(name)
        if experiments is None or experiment is None:
            raise ApiError(
                "There is no such experiment; /v1/experiments lists them.", status=404,
                code="experiment_not_found",
            )  # fmt: skip
        return await _answer(
            lambda: {"object": "experiment.report", **summarise(experiment, experiments.store)}
        )

    @router.post("/v1/feedback")
    async def give_feedback(request: Request) -> Response:
        body = await read_request(request, FeedbackBody, context.settings)
        experiments = context.experiments
        if experiments is None:
            raise ApiError("This server runs no experiments.", status=404, code="experiments_off")
        _check(body)
        created = time.time()
        return await _answer(lambda: _keep(experiments, body, created))

    return router


def _check(body: FeedbackBody) -> None:
    if body.rating is None and body.accepted is None and body.preferred is None:
        raise ApiError(
            "Give rating, accepted or preferred.", param="rating", code="missing_required_parameter"
        )
    if body.rating is not None and not 0 <= body.rating <= 1:
        raise ApiError(
            f"rating must be a number from 0 to 1, got {body.rating:g}.", param="rating",
            code="invalid_value",
        )  # fmt: skip


def _keep(experiments: Experiments, body: FeedbackBody, created: float) -> dict[str, object]:
    found = experiments.store.find(body.id)
    if found is None:
        raise ApiError(
            "No experiment gave such an answer.", status=404, param="id", code="answer_not_found"
        )
    experiment, arms = found
    is_compared = len(arms) > 1
    for name, value in (("rating", body.rating), ("accepted", body.accepted)):
        if is_compared and value is not None:
            raise ApiError(
                f"{name} is of one answer; of a comparison give preferred.", param=name,
                code="invalid_value",
            )  # fmt: skip
    if body.preferred is not None and (not is_compared or body.preferred not in (*arms, TIE)):
        allowed = ", ".join(map(repr, (*arms, TIE))) if is_compared else "unset: it is one answer"
        raise ApiError(f"preferred must be {allowed}.", param="preferred", code="invalid_value")
    feedback = Feedback(rating=body.rating, accepted=body.accepted, preferred=body.preferred)
    if not experiments.store.add_feedback(body.id, feedback, created=created):
        raise ApiError(
            "No experiment gave such an answer.", status=404, param="id", code="answer_not_found"
        )
    return {
        "id": body.id,
        "object": "feedback",
        "experiment": experiment,
        "arm": None if is_compared else arms[0],
    }


async def _answer(work: Callable[[], dict[str, Any]]) -> Response:
    """Return what `work` gives, in a thread: it waits for the disk."""
    try:
        content = await asyncio.to_thread(lambda: encode_json(work()))
    except DatabaseError as error:
        _LOG.error("experiments: %s", error)
        raise ApiError(
            "The server cannot read or write its file of experiments; its log says why.",
            status=503,
            code="experiments_unavailable",
        ) from None
    return Response(content, media_type="application/json")
