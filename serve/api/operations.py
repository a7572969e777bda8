"""Health, version, metrics and the list of decoding strategies."""

from fastapi import APIRouter
from starlette.responses import Response

from decoding import STRATEGIES, strategy_schema
from serve.api.context import ApiContext
from serve.api.errors import ApiError, encode_json
from serve.api.openapi import METRICS_TYPE
from serve.api.resolve import DEFAULT_STRATEGY
from serve.version import VERSION


def build_operations_router(context: ApiContext) -> APIRouter:
    """Return the routes for operators."""
    router = APIRouter()

    def check_ready() -> dict[str, str]:
        stats = context.backend.stats()
        if stats.error is not None or stats.is_draining:
            reason = "draining" if stats.error is None else "broken"
            raise ApiError(f"The server is {reason}.", status=503, code=reason)
        return {"status": "ok"}

    @router.get("/livez")
    async def show_liveness() -> dict[str, str]:
        return {"status": "ok"}

    @router.get("/readyz")
    async def show_readiness() -> dict[str, str]:
        return check_ready()

    @router.get("/health")
    async def show_health() -> dict[str, str]:
        return check_ready()

    @router.get("/version")
    async def show_version() -> dict[str, str]:
        return {"version": VERSION}

    @router.get("/metrics")
    async def show_metrics() -> Response:
        return Response(context.metrics.render(), headers={"Content-Type": METRICS_TYPE})

    @router.get("/v1/decoding_strategies")
    async def list_strategies() -> Response:
        data = [
            {
                "id": name,
                "object": "decoding_strategy",
                "model": f"{context.settings.model_id}@{name}",
                "is_default": name == DEFAULT_STRATEGY.name,
                "schema": strategy_schema(cls),
            }
            for name, cls in STRATEGIES.items()
        ]
        body = encode_json({"object": "list", "data": data})
        return Response(body, media_type="application/json")

    return router
