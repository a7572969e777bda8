"""Who may ask, who may change what is served, and which other origins' pages may read answers."""

import hashlib
import hmac
import ipaddress
from collections.abc import Callable, Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.api.errors import ApiError
from serve.api.settings import ApiSettings

_IS_ADMIN = "proa.is_admin"
_OPEN_PATHS = frozenset({"/", "/ui", "/health", "/livez", "/readyz"})
_INTERFACE = "/ui/"
_CORS_MAX_AGE_S = 600
_CORS_METHODS = "GET, HEAD, POST, DELETE"
_CORS_READABLE = "X-Request-Id, Retry-After"


class AccessMiddleware:
    """Refuse requests that may not be served, before anything reads them.

    With keys, everything but health and the pages of the web interface needs one; an admin key
    opens the same and more.
    Without API keys, the peer must be a loopback address (or a Unix socket), `Host` must name an
    allowed host, and `Origin` one with the same port or an allowed origin: that keeps out web pages
    that reach for the visitor's own machine. The interface, which no key protects, takes nothing
    from other pages in any case.
    """

    def __init__(self, app: ASGIApp, settings: ApiSettings) -> None:
        self._app = app
        self._digests = tuple(_digest(key.encode()) for key in settings.api_keys)
        self._admin_digests = tuple(_digest(key.encode()) for key in settings.admin_keys)
        self._hosts = frozenset(host.lower() for host in settings.allowed_hosts)
        self._origins = frozenset(settings.allowed_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check(scope)
            except ApiError as error:
                await error.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        is_known, is_admin = self._match_key(_header(scope, b"authorization"))
        scope[_IS_ADMIN] = is_admin
        hosts = [value.decode("latin-1") for value in _header(scope, b"host")]
        origins = [value.decode("latin-1") for value in _header(scope, b"origin")]
        host = _split(f"//{hosts[0]}") if len(hosts) == 1 else None
        if self._digests:
            path = scope["path"]
            if is_below_interface(path) and not all(self._is_own(o, host) for o in origins):
                raise _forbidden("The interface takes nothing from pages of other origins.")
            if not (is_known or is_admin or is_open(path)):
                raise _unauthorized("A valid API key")
            return
        client = scope.get("client")
        if client is not None and not is_loopback(client[0]):
            raise _forbidden("Without an API key only loopback addresses are served.")
        if host is None or host[0] not in self._hosts:
            raise _forbidden("The Host header names no allowed host.")
        if not all(self._is_allowed(origin, host[1]) for origin in origins):
            raise _forbidden("The Origin header names no allowed host with the server's own port.")

    def _match_key(self, headers: list[bytes]) -> tuple[bool, bool]:
        """Return whether the one key is an API key, and whether it is an admin key."""
        scheme, _, key = (headers[0] if len(headers) == 1 else b"").partition(b" ")
        digest = _digest(key.strip())
        # Every key is compared, so that the time does not tell which one is near.
        known = [hmac.compare_digest(digest, item) for item in self._digests]
        admin = [hmac.compare_digest(digest, item) for item in self._admin_digests]
        is_bearer = scheme.lower() == b"bearer"
        return is_bearer and any(known), is_bearer and any(admin)

    def _is_allowed(self, origin: str, port: int | None) -> bool:
        found = _split(origin)
        is_local = found is not None and found[0] in self._hosts and found[1] == port
        return is_local or origin in self._origins

    def _is_own(self, origin: str, host: tuple[str, int | None] | None) -> bool:
        found = _split(origin)
        return (found is not None and found == host) or origin in self._origins


class CorsMiddleware:
    """Answer a browser's question before a request, and say which origins may read the answers.

    The question comes without a key and needs none. Answers include errors and streams.
    """

    def __init__(self, app: ASGIApp, origins: Iterable[str]) -> None:
        self._app = app
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        is_allowed = origin in self._origins
        is_question = scope["method"] == "OPTIONS" and "access-control-request-method" in headers

        async def send_allowed(message: Message) -> None:
            if message["type"] == "http.response.start" and self._origins:
                answer = MutableHeaders(scope=message)
                answer.add_vary_header("Origin")
                if is_allowed:
                    answer["Access-Control-Allow-Origin"] = origin or ""
                    answer["Access-Control-Expose-Headers"] = _CORS_READABLE
            await send(message)

        if is_question:
            wanted = headers.get("access-control-request-headers", "")
            await _answer_question(wanted, is_allowed=is_allowed)(scope, receive, send_allowed)
        else:
            await self._app(scope, receive, send_allowed)


def _split(url: str) -> tuple[str, int | None] | None:
    """Return host and port of an origin or a `//host`; a scheme's own port is None."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return None
    if parts.path or parts.query or parts.fragment or "@" in parts.netloc:
        return None
    return parts.hostname or "", None if port in (80, 443) else port


def make_admin_check(settings: ApiSettings) -> Callable[[Request], None]:
    """Return what a route depends on that only an admin key opens."""

    def check_admin(request: Request) -> None:
        if not settings.admin_keys:
            raise _forbidden(
                "Adapters can be attached and detached only where the server has an admin key: "
                "start it with PROA_ADMIN_KEY, --admin-key-file or --admin-key."
            )
        if not request.scope[_IS_ADMIN]:
            if settings.api_keys:
                raise _forbidden("This needs the admin key; an API key is not enough.")
            raise _unauthorized("The admin key")

    return check_admin


def is_below_interface(path: str) -> bool:
    """Return whether a path is the web interface's: a browser sends no key for a page.

    What the page does needs one.
    """
    return path.startswith(_INTERFACE)


def is_open(path: str) -> bool:
    """Return whether a path needs no key: health, and the web interface."""
    return path in _OPEN_PATHS or is_below_interface(path)


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


def _unauthorized(what: str) -> ApiError:
    return ApiError(
        f"{what} is needed, as 'Authorization: Bearer KEY'.",
        status=401,
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def _forbidden(message: str) -> ApiError:
    return ApiError(message, status=403, code="forbidden")


def _header(scope: Scope, name: bytes) -> list[bytes]:
    headers: Iterable[tuple[bytes, bytes]] = scope["headers"]
    return [value for key, value in headers if key == name]


def _answer_question(wanted: str, *, is_allowed: bool) -> Response:
    if not is_allowed:
        return ApiError(
            "Pages of this origin may not use the server; --allowed-origin names those that may.",
            status=403,
            code="origin_not_allowed",
        ).response()
    headers = {
        "Access-Control-Allow-Methods": _CORS_METHODS,
        "Access-Control-Max-Age": str(_CORS_MAX_AGE_S),
    }
    if wanted:
        headers["Access-Control-Allow-Headers"] = wanted
    return Response(status_code=204, headers=headers)
