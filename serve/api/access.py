"""Who may ask: API keys, or loopback only without them."""

import hashlib
import hmac
import ipaddress
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from serve.api.errors import ApiError
from serve.api.settings import ApiSettings

_OPEN_PATHS = frozenset({"/health", "/livez", "/readyz"})


class AccessMiddleware:
    """Refuse requests that may not be served, before anything reads them.

    With keys, everything but the health endpoints needs one. Without, the peer must be a loopback
    address (or a Unix socket), and `Host` and `Origin` must name an allowed host: that keeps out
    web pages that reach for the visitor's own machine.
    """

    def __init__(self, app: ASGIApp, settings: ApiSettings) -> None:
        self._app = app
        self._digests = tuple(_digest(key.encode()) for key in settings.api_keys)
        self._hosts = frozenset(host.lower() for host in settings.allowed_hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check(scope)
            except ApiError as error:
                await error.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        if self._digests:
            if scope["path"] not in _OPEN_PATHS:
                self._check_key(_header(scope, b"authorization"))
            return
        client = scope.get("client")
        if client is not None and not is_loopback(client[0]):
            raise _forbidden("Without an API key only loopback addresses are served.")
        hosts = [value.decode("latin-1") for value in _header(scope, b"host")]
        origins = [value.decode("latin-1") for value in _header(scope, b"origin")]
        if len(hosts) != 1 or not self._is_allowed(f"//{hosts[0]}"):
            raise _forbidden("The Host header names no allowed host.")
        if not all(self._is_allowed(origin) for origin in origins):
            raise _forbidden("The Origin header names no allowed host.")

    def _check_key(self, headers: list[bytes]) -> None:
        scheme, _, key = (headers[0] if len(headers) == 1 else b"").partition(b" ")
        digest = _digest(key.strip())
        # Every key is compared, so that the time does not tell which one is near.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if scheme.lower() != b"bearer" or not any(matches):
            raise ApiError(
                "A valid API key is needed, as 'Authorization: Bearer KEY'.",
                status=401,
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _is_allowed(self, url: str) -> bool:
        try:
            parts = urlsplit(url)
            _ = parts.port
        except ValueError:
            return False
        is_plain = not (parts.path or parts.query or parts.fragment or "@" in parts.netloc)
        return is_plain and (parts.hostname or "") in self._hosts


def is_loopback(address: str) -> bool:
    """Return whether an IP address is the machine itself."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        return ip.ipv4_mapped.is_loopback
    return ip.is_loopback


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _forbidden(message: str) -> ApiError:
    return ApiError(message, status=403, code="forbidden")


def _header(scope: Scope, name: bytes) -> list[bytes]:
    headers: Iterable[tuple[bytes, bytes]] = scope["headers"]
    return [value for key, value in headers if key == name]
