"""Settings of the HTTP API."""

import re
from dataclasses import dataclass
from typing import Literal

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#@\s]+")

UnknownFields = Literal["refuse", "ignore"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ApiSettings:
    """How the API serves one model.

    Attributes:
        model_id: id of the base model; `model_id:adapter` is the base with an adapter, and
            `@strategy` after either chooses a decoding strategy as well.
        api_keys: keys that open the API. Without any, only loopback addresses are served.
        admin_keys: keys that open the API and may attach and detach adapters. Without any, nobody
            may.
        adapter_root: resolved folder below which adapters may be attached at run time; None:
            nowhere.
        allowed_hosts: names and addresses accepted in `Host` and, with the same port, in `Origin`
            while there are no keys, so that a web page cannot reach the server through its
            visitor's browser.
        allowed_origins: origins whose pages may use the server, such as "https://app.example".
        unknown_fields: "refuse" a request with a field that the API does not know, or "ignore" the
            field.
        max_body_bytes: longest request body.
        body_timeout_s: longest time that a request body may take to arrive.
        max_keyless_bodies: bodies of the longest size that may be arriving without a key, together.
        max_sequences_per_prompt: largest `n`.
        max_sequences_per_request: largest number of prompts times `n`.
        max_concurrent_prompts: prompts of one request that are in the backend at a time.
        ping_interval_s: time without data after which an event stream gets a comment line.
    """

    model_id: str
    api_keys: tuple[str, ...] = ()
    admin_keys: tuple[str, ...] = ()
    adapter_root: str | None = None
    allowed_hosts: tuple[str, ...] = ("localhost", "127.0.0.1", "::1")
    allowed_origins: tuple[str, ...] = ()
    unknown_fields: UnknownFields = "refuse"
    max_body_bytes: int = 8 * 2**20
    body_timeout_s: float = 30.0
    max_keyless_bodies: int = 8
    max_sequences_per_prompt: int = 128
    max_sequences_per_request: int = 1024
    max_concurrent_prompts: int = 32
    ping_interval_s: float = 15.0

    def __post_init__(self) -> None:
        if not self.model_id:
            raise ValueError("model_id must not be empty")
        if self.unknown_fields not in ("refuse", "ignore"):
            raise ValueError(
                f"unknown_fields must be 'refuse' or 'ignore', got {self.unknown_fields!r}"
            )
        for name in ("api_keys", "admin_keys"):
            if any(not key or not key.isascii() for key in getattr(self, name)):
                raise ValueError(f"{name} must be non-empty ASCII texts")
        for origin in self.allowed_origins:
            if not _ORIGIN.fullmatch(origin):
                raise ValueError(f"allowed_origins: {origin!r} is not like https://app.example")
        if set(self.api_keys) & set(self.admin_keys):
            raise ValueError("admin_keys must differ from api_keys")
        for name in (
            "max_body_bytes",
            "body_timeout_s",
            "max_keyless_bodies",
            "max_sequences_per_prompt",
            "max_sequences_per_request",
            "max_concurrent_prompts",
            "ping_interval_s",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
