"""Ids of requests and answers."""

import re
import secrets

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


def make_id(prefix: str) -> str:
    """Return a new id such as `chatcmpl-0123...`."""
    return f"{prefix}-{secrets.token_hex(16)}"


def accept_request_id(value: bytes | None) -> str:
    """Return the client's `X-Request-Id`, or a new one where it is missing or unfit to repeat."""
    if value is not None and _REQUEST_ID.fullmatch(value):
        return value.decode("ascii")
    return make_id("req")
