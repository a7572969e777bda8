"""/v1/compare/{id}/vote and /v1/compare/votes: votes on comparisons, and what came of them."""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Path
from starlette.requests import Request
from starlette.responses import Response

from serve.api.body import read_request
from serve.api.context import COMPARISON_PREFIX, ApiContext, is_id
from serve.api.errors import ApiError, encode_json
from serve.api.schema import VoteBody
from serve.experiments.comparison import Vote
from serve.experiments.database import DatabaseError
from serve.experiments.store import VoteStore
from serve.experiments.tally import PairTally, pairs_of, tally_pairs
from stats.proportions import CONFIDENCE

_LOG = logging.getLogger("proa.api")

ComparisonId = Annotated[str, Path(alias="id")]


def build_votes_router(context: ApiContext) -> APIRouter:
    """Return the routes of votes on comparisons."""
    router = APIRouter()

    @router.post("/v1/compare/{id}/vote")
    async def vote(request: Request, comparison_id: ComparisonId) -> Response:
        body = await read_request(request, VoteBody, context.settings)
        if not is_id(COMPARISON_PREFIX, comparison_id):
            raise _not_found()
        created = int(time.time())
        return await _answer(
            context, lambda store: _vote(store, comparison_id, body.vote, created=created)
        )

    @router.get("/v1/compare/votes")
    async def list_votes() -> Response:
        return await _answer(context, _list_votes)

    return router


async def _answer(context: ApiContext, work: Callable[[VoteStore], object]) -> Response:
    """Return what `work` gives for the store, in a thread: it waits for the disk."""
    if context.votes is None:
        raise ApiError("This server keeps no votes.", status=404, code="votes_off")
    try:
        body = await asyncio.to_thread(_encode_result, work, context.votes)
    except DatabaseError as error:
        _LOG.error("votes: %s", error)
        raise ApiError(
            "The server cannot read or write its file of votes; its log says why.",
            status=503,
            code="votes_unavailable",
        ) from None
    return Response(body, media_type="application/json")


def _encode_result(work: Callable[[VoteStore], object], store: VoteStore) -> bytes:
    return encode_json(work(store))


def _vote(store: VoteStore, comparison_id: str, vote: Vote, *, created: int) -> dict[str, object]:
    comparison = store.find(comparison_id)
    if comparison is None:
        raise _not_found()
    num_arms = len(comparison.arms)
    if num_arms == 1:
        raise ApiError("A comparison with a single arm cannot be voted on.", code="single_arm")
    if isinstance(vote, int) and not 0 <= vote < num_arms:
        raise ApiError(
            f"vote must be the index of an arm, 0 to {num_arms - 1}, or 'tie' or 'both_bad', got "
            f"{vote if abs(vote) < 10**12 else 'a huge number'}.",
            param="vote",
            code="invalid_value",
        )
    if not store.vote(comparison_id, vote, created=created):
        raise _not_found()
    pairs = pairs_of(comparison.arms)
    return {
        "id": comparison_id,
        "object": "comparison.vote",
        "created": created,
        "vote": vote,
        "label": comparison.arms[vote].label if isinstance(vote, int) else None,
        "tally": [_describe(row) for row in tally_pairs(store.ballots()) if row.arms in pairs],
    }


def _list_votes(store: VoteStore) -> dict[str, object]:
    return {"object": "list", "data": [_describe(row) for row in tally_pairs(store.ballots())]}


def _describe(row: PairTally) -> dict[str, Any]:
    return {
        "arms": [arm.describe() for arm in row.arms],
        "wins": row.wins,
        "ties": row.ties,
        "both_bad": row.both_bad,
        "votes": row.votes,
        "win_rate": row.win_rate,
        "interval": row.interval,
        "confidence": CONFIDENCE,
    }


def _not_found() -> ApiError:
    return ApiError(
        "There is no such comparison to vote on.", status=404, code="comparison_not_found"
    )
