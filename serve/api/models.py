"""GET /v1/models and /v1/models/{id}."""

from fastapi import APIRouter

from serve.api.context import ApiContext
from serve.api.resolve import split_model, usable_strategies
from serve.backends.protocol import AdapterInfo


def build_models_router(context: ApiContext) -> APIRouter:
    """Return the routes that list what is served."""
    router = APIRouter()
    base = context.settings.model_id

    def describe(adapter: AdapterInfo | None, strategy: str | None) -> dict[str, object]:
        plain, parent, kind = base, None, "base"
        if adapter is not None:
            plain = f"{base}:{adapter.name}"
            parent = base if adapter.on is None else f"{base}:{adapter.on}"
            kind = adapter.kind if adapter.labels is None else "classifier"
        if strategy is not None:
            parent, kind = plain, "strategy"
        return {
            "id": plain if strategy is None else f"{plain}@{strategy}",
            "object": "model",
            "created": context.created if adapter is None else adapter.created,
            "owned_by": "proa",
            "root": base,
            "parent": parent,
            "max_model_len": context.backend.max_context_tokens,
            "x_kind": kind,
        }

    plan = {} if context.experiments is None else context.experiments.plan

    def describe_experiment(name: str) -> dict[str, object]:
        return {**describe(None, None), "id": name, "x_kind": "experiment"}

    @router.get("/v1/models")
    async def list_models() -> dict[str, object]:
        data = [
            describe(adapter, strategy)
            for adapter in (None, *context.backend.adapters())
            for strategy in (None, *usable_strategies(adapter))
        ]
        return {"object": "list", "data": data + [describe_experiment(n) for n in plan]}

    @router.get("/v1/models/{model_id:path}")
    async def retrieve_model(model_id: str) -> dict[str, object]:
        if model_id in plan:
            return describe_experiment(model_id)
        choice = split_model(model_id, context)
        adapters = {info.name: info for info in context.backend.adapters()}
        return describe(adapters[choice.adapter] if choice.adapter else None, choice.strategy)

    return router
