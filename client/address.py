"""The address of a server as people give it."""

import httpx


def parse_address(text: str) -> str:
    """Return the root of a server's address, to which paths such as /v1/models are added.

    Args:
        text: with or without http:// and the ending /v1.

    Raises:
        ValueError: it is no address, or it holds a password.
    """
    root = (text if "://" in text else f"http://{text}").rstrip("/").removesuffix("/v1")
    try:
        parts = httpx.URL(root)
    except (httpx.InvalidURL, ValueError):
        parts = None
    # Messages show addresses.
    if "@" in text:
        raise ValueError("an address holds no user name or password; give a key")
    if parts is None or parts.scheme not in ("http", "https") or not parts.host or parts.query:
        raise ValueError(f"{text!r} is not an address such as http://127.0.0.1:8000")
    return root.rstrip("/")
