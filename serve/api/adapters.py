"""/v1/adapters: what is attached to the base, variants too; an admin key attaches and detaches."""

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from serve.api.access import make_admin_check
from serve.api.body import read_request
from serve.api.context import ApiContext
from serve.api.errors import ApiError
from serve.api.schema import AdapterBody, LoadAdapterBody, UnloadAdapterBody
from serve.backends.protocol import AdapterInfo, AdapterLoadError, BackendUnavailableError


def build_adapters_router(context: ApiContext) -> APIRouter:
    """Return the routes of adapters."""
    router = APIRouter()
    only_admin = [Depends(make_admin_check(context.settings))]
    backend = context.backend

    def describe(info: AdapterInfo) -> dict[str, object]:
        return {
            "id": f"{context.settings.model_id}:{info.name}",
            "object": "adapter",
            "name": info.name,
            "method": info.method,
            "kind": info.kind,
            "labels": info.labels,
            "description": info.description,
            "num_parameters": info.num_parameters,
            "num_bytes": info.num_bytes,
            "on": info.on,
            "removed": info.removed,
            "speed": info.speed,
            "is_loaded": info.is_loaded,
            "num_running": info.num_running,
            "created": info.created,
        }

    async def attach(name: str, path: str) -> AdapterInfo:
        if context.settings.adapter_root is None:
            raise ApiError(
                "Adapters can be attached only where the server has a folder for them: start it "
                "with --adapter-root.",
                status=403,
                code="forbidden",
            )
        if backend.stats().is_draining:
            raise BackendUnavailableError("the server is shutting down")
        try:
            return await backend.attach_adapter(name, path)
        except AdapterLoadError as error:
            raise ApiError(str(error), code="invalid_adapter") from None

    @router.get("/v1/adapters")
    async def list_adapters() -> dict[str, object]:
        return {"object": "list", "data": [describe(info) for info in backend.adapters()]}

    @router.get("/v1/adapters/{name}")
    async def retrieve_adapter(name: str) -> dict[str, object]:
        for info in backend.adapters():
            if info.name == name:
                return describe(info)
        raise ApiError("There is no such adapter.", status=404, code="adapter_not_found")

    @router.post("/v1/adapters", dependencies=only_admin)
    async def attach_adapter(request: Request) -> dict[str, object]:
        body = await read_request(request, AdapterBody, context.settings)
        return describe(await attach(body.name, body.path))

    @router.delete("/v1/adapters/{name}", dependencies=only_admin)
    async def detach_adapter(name: str) -> dict[str, object]:
        await backend.detach_adapter(name)
        return {"id": f"{context.settings.model_id}:{name}", "object": "adapter", "deleted": True}

    @router.post("/v1/load_lora_adapter", dependencies=only_admin)
    async def load_adapter(request: Request) -> Response:
        body = await read_request(request, LoadAdapterBody, context.settings)
        await attach(body.lora_name, body.lora_path)
        return PlainTextResponse("Success: the adapter is attached.")

    @router.post("/v1/unload_lora_adapter", dependencies=only_admin)
    async def unload_adapter(request: Request) -> Response:
        body = await read_request(request, UnloadAdapterBody, context.settings)
        await backend.detach_adapter(body.lora_name)
        return PlainTextResponse("Success: the adapter is detached.")

    return router
