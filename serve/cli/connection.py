"""The server that a command in the terminal talks to."""

from client.api import ApiClient
from client.blocking import BlockingClient
from serve.cli.arguments import UserError


def connect(url: str, *, key: str | None) -> BlockingClient:
    """Return a client of the server at an address.

    Args:
        url: of --url or PROA_URL.
        key: of --api-key or PROA_API_KEY, or None.

    Raises:
        UserError: it is no address.
    """
    try:
        return BlockingClient(ApiClient(url, trust_env=True), key=key or "")
    except ValueError as error:
        raise UserError(f"--url: {error}") from None


def list_models(client: BlockingClient) -> list[str]:
    """Return the ids of the served models, the plain base model first.

    Raises:
        RequestError: the server refuses or cannot be reached.
    """
    ids = [str(entry.get("id")) for entry in client.entries("/v1/models")]
    return sorted(ids, key=lambda name: ("@" in name) + (":" in name))
