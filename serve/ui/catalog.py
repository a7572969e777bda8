"""What a server has to choose from: models, adapters, strategies."""

from collections.abc import Mapping
from typing import Any

from client.api import ApiClient
from client.errors import RequestError

# JSON values, because they are kept in a browser session's state:
# {"models": {id: [adapter ids]}, "strategies": {name: JSON Schema}, "default": name}
Catalog = dict[str, Any]
EMPTY: Catalog = {"models": {}, "strategies": {}, "default": None}
NO_ADAPTER = "none"


async def load_catalog(client: ApiClient, key: str) -> Catalog:
    """Ask a server what it has; another server of the OpenAI API has models only.

    Raises:
        RequestError: it does not answer or refuses.
    """
    models = await client.entries("/v1/models", key=key)
    try:
        strategies = await client.entries("/v1/decoding_strategies", key=key)
    except RequestError as error:
        if error.status != 404:
            raise
        strategies = []
    found: dict[str, list[str]] = {
        entry["id"]: [] for entry in models if entry.get("x_kind", "base") in ("base", "variant")
    }
    for entry in models:
        is_adapter = entry.get("x_kind") in ("side_network", "temperature_head")
        if is_adapter and entry["parent"] in found:
            found[entry["parent"]].append(entry["id"])
    return {
        "models": found,
        "strategies": {entry["id"]: entry["schema"] for entry in strategies},
        "default": next((entry["id"] for entry in strategies if entry["is_default"]), None),
    }


def parameters_of(catalog: Catalog, strategy: str | None) -> Mapping[str, dict[str, Any]]:
    """Return the JSON Schema of each parameter of a strategy."""
    schema = catalog["strategies"].get(strategy, {})
    return {k: v for k, v in schema.get("properties", {}).items() if k != "strategy"}


def short_name(model_id: str) -> str:
    """Return the part of an id after the base's."""
    return model_id.partition(":")[2] or model_id
