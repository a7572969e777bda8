"""Put the application together."""

from fastapi import FastAPI
from starlette.exceptions import HTTPException

from decoding import ParameterError
from serve.api.access import AccessMiddleware, CorsMiddleware
from serve.api.adapters import build_adapters_router
from serve.api.chat import build_chat_router
from serve.api.classify import build_classify_router
from serve.api.compare import build_compare_router
from serve.api.completions import build_completions_router
from serve.api.context import ApiContext, Experiments
from serve.api.enrolment import check_experiments
from serve.api.errors import ApiError, handle_error
from serve.api.experiments import build_experiments_router
from serve.api.metrics import Metrics
from serve.api.middleware import BodyMiddleware, FailureMiddleware, RequestMiddleware
from serve.api.models import build_models_router
from serve.api.openapi import build_openapi
from serve.api.operations import build_operations_router
from serve.api.settings import ApiSettings
from serve.api.tokenization import build_tokenization_router
from serve.api.votes import build_votes_router
from serve.backends.protocol import (
    AdapterConflictError,
    AdapterLoadError,
    AdapterNotFoundError,
    Backend,
    BackendUnavailableError,
    QueueFullError,
)
from serve.experiments.store import VoteStore
from serve.version import VERSION
from text.chat_template import ChatTemplateError
from text.tokenizer import Tokenizer

_ROUTERS = (
    build_chat_router,
    build_completions_router,
    build_classify_router,
    build_compare_router,
    build_votes_router,
    build_experiments_router,
    build_models_router,
    build_adapters_router,
    build_tokenization_router,
    build_operations_router,
)
_HANDLED = (
    AdapterConflictError,
    AdapterLoadError,
    AdapterNotFoundError,
    ApiError,
    BackendUnavailableError,
    ChatTemplateError,
    HTTPException,
    ParameterError,
    QueueFullError,
)


def create_app(
    backend: Backend,
    tokenizer: Tokenizer,
    *,
    settings: ApiSettings,
    votes: VoteStore | None = None,
    experiments: Experiments | None = None,
) -> FastAPI:
    """Build the HTTP API of one model.

    Args:
        backend: runs the requests.
        tokenizer: the model's.
        settings: id, access and limits.
        votes: keeps the votes on comparisons; None: they cannot be voted on.
        experiments: that run; None: none.

    Returns:
        An ASGI application. It starts and stops nothing; the caller drains the backend and closes
        the stores.

    Raises:
        PlanError: an experiment wants what the server cannot do.
    """
    metrics = Metrics(backend, settings.model_id)
    context = ApiContext(
        backend=backend, tokenizer=tokenizer, settings=settings, metrics=metrics, votes=votes,
        experiments=experiments,
    )  # fmt: skip
    if experiments is not None:
        check_experiments(context, experiments.plan)
    app = FastAPI(
        title="Proa",
        version=VERSION,
        docs_url=None,  # the pages of FastAPI load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        exception_handlers=dict.fromkeys(_HANDLED, handle_error),
    )
    for build_router in _ROUTERS:
        app.include_router(build_router(context))
    app.openapi = lambda: build_openapi(app, settings)  # type: ignore[method-assign]
    # The last one added is the outermost.
    app.add_middleware(BodyMiddleware, settings=settings)
    app.add_middleware(AccessMiddleware, settings=settings)
    app.add_middleware(FailureMiddleware)
    app.add_middleware(CorsMiddleware, origins=settings.allowed_origins)
    app.add_middleware(RequestMiddleware, metrics=metrics)
    return app
