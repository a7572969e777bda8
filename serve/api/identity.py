"""Ids of requests and answers."""

import re
import secrets

COMPARISON_PREFIX = "cmp"
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


def make_id(prefix: str) -> str:
    """Return a new id such as `chatcmpl-0123...`."""
    return f"{prefix}-{secrets.token_hex(16)}"


def is_id(prefix: str, text: str) -> bool:
    """Return whether a text has the form of the ids that `make_id` gives."""
    return re.fullmatch(rf"{prefix}-[0-9a-f]{{32}}", text) is not None


def accept_request_id(value: bytes | None) -> str:
    """Return the client's `X-Request-Id`, or a new one where it is missing or unfit to repeat."""
    if value is not None and _REQUEST_ID.fullmatch(value):
        return value.decode("ascii")
    return make_id("req")
