"""What every endpoint needs."""

import time
from dataclasses import dataclass, field

from serve.api.metrics import Metrics
from serve.api.settings import ApiSettings
from serve.backends.protocol import Backend
from serve.experiments.store import VoteStore
from text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class ApiContext:
    """The served model and the means to serve it.

    Attributes:
        votes: keeps the votes on comparisons; None: they cannot be voted on.
        created: Unix time at which the application was made, in seconds.
    """

    backend: Backend
    tokenizer: Tokenizer
    settings: ApiSettings
    metrics: Metrics
    votes: VoteStore | None = None
    created: int = field(default_factory=lambda: int(time.time()))
