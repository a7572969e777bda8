"""What answers of the HTTP API mean, whichever client reads them."""

import json
from typing import Any

DONE = "[DONE]"


def event_data(line: str) -> str | None:
    """Return the data of a line of an event stream; None: it has none."""
    return line[5:].strip() if line.startswith("data:") else None


def parse_chunk(data: str) -> dict[str, Any]:
    """Return the object of an event.

    Raises:
        ValueError: the server reported an error, whose message this is, or no object.
    """
    chunk = json.loads(data)
    if not isinstance(chunk, dict):
        raise ValueError("the server does not speak this API")
    if "error" in chunk:
        raise ValueError(error_message(chunk, "the server reported an error"))
    return chunk


def error_message(body: Any, fallback: str) -> str:
    """Return what an error's body says, or the fallback."""
    error = body.get("error") if isinstance(body, dict) else None
    if isinstance(error, dict) and isinstance(error.get("message"), str):
        return str(error["message"])
    return error if isinstance(error, str) else fallback
