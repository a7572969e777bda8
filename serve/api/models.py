"""GET /v1/models and /v1/models/{id}."""

from fastapi import APIRouter

from decoding import STRATEGIES
from serve.api.context import ApiContext
from serve.api.resolve import split_model


def build_models_router(context: ApiContext) -> APIRouter:
    """Return the routes that list what is served."""
    router = APIRouter()
    base = context.settings.model_id

    def describe(model: str) -> dict[str, object]:
        return {
            "id": model,
            "object": "model",
            "created": context.created,
            "owned_by": "proa",
            "root": base,
            "parent": None if model == base else base,
            "max_model_len": context.backend.max_context_tokens,
            "x_kind": "base" if model == base else "strategy",
        }

    @router.get("/v1/models")
    async def list_models() -> dict[str, object]:
        names = [base, *(f"{base}@{strategy}" for strategy in STRATEGIES)]
        return {"object": "list", "data": [describe(name) for name in names]}

    @router.get("/v1/models/{model_id:path}")
    async def retrieve_model(model_id: str) -> dict[str, object]:
        model, _ = split_model(model_id, base)
        return describe(model)

    return router
