"""GET /v1/models and /v1/models/{id}."""

from fastapi import APIRouter

from decoding import STRATEGIES
from serve.api.context import ApiContext
from serve.api.resolve import split_model


def build_models_router(context: ApiContext) -> APIRouter:
    """Return the routes that list what is served."""
    router = APIRouter()
    base = context.settings.model_id

    def describe(adapter: str | None, strategy: str | None, created: int) -> dict[str, object]:
        plain = base if adapter is None else f"{base}:{adapter}"
        parent = None if adapter is None else base
        kind = "base" if adapter is None else "adapter"
        if strategy is not None:
            parent, kind = plain, "strategy"
        return {
            "id": plain if strategy is None else f"{plain}@{strategy}",
            "object": "model",
            "created": created,
            "owned_by": "proa",
            "root": base,
            "parent": parent,
            "max_model_len": context.backend.max_context_tokens,
            "x_kind": kind,
        }

    @router.get("/v1/models")
    async def list_models() -> dict[str, object]:
        adapters = [(info.name, info.created) for info in context.backend.adapters()]
        data = [
            describe(adapter, strategy, created)
            for adapter, created in [(None, context.created), *adapters]
            for strategy in (None, *STRATEGIES)
        ]
        return {"object": "list", "data": data}

    @router.get("/v1/models/{model_id:path}")
    async def retrieve_model(model_id: str) -> dict[str, object]:
        choice = split_model(model_id, context)
        created = {info.name: info.created for info in context.backend.adapters()}
        since = created.get(choice.adapter or "", context.created)
        return describe(choice.adapter, choice.strategy, since)

    return router
