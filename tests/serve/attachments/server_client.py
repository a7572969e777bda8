"""What the tests of attachments ask of a server."""

from typing import Any

import httpx

ADMIN = {"Authorization": "Bearer sk-admin"}
QUESTION = {"prompt": "abcdefgh" * 4, "max_tokens": 12, "seed": 3, "ignore_eos": True}


async def complete(client: httpx.AsyncClient, model: str, **fields: Any) -> str:
    """Return the answer of a model."""
    body = {"model": model, **QUESTION, **fields}
    response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


async def attach(client: httpx.AsyncClient, name: str, path: str | None = None) -> httpx.Response:
    """Attach an adapter, from the folder of its name unless another is given."""
    body = {"name": name, "path": name if path is None else path}
    return await client.post("/v1/adapters", json=body, headers=ADMIN)


async def detach(client: httpx.AsyncClient, name: str) -> httpx.Response:
    """Detach an adapter."""
    return await client.delete(f"/v1/adapters/{name}", headers=ADMIN)
