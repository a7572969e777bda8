"""What every endpoint needs."""

import asyncio
import re
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from serve.api.metrics import Metrics
from serve.api.settings import ApiSettings
from serve.backends.protocol import Backend
from serve.experiments.exposures import ExposureStore
from serve.experiments.plan import Experiment
from serve.experiments.store import VoteStore
from text.tokenizer import Tokenizer

COMPARISON_PREFIX = "cmp"
_LARGE = 20_000

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True, slots=True)
class Experiments:
    """What is tried out on clients.

    Attributes:
        plan: the experiments by their names.
        store: keeps who was shown what, and what came of it.
    """

    plan: Mapping[str, Experiment]
    store: ExposureStore


@dataclass(frozen=True, kw_only=True, slots=True)
class ApiContext:
    """The served model and the means to serve it.

    Attributes:
        votes: keeps the votes on comparisons; None: they cannot be voted on.
        experiments: that run; None: none.
        created: Unix time at which the application was made, in seconds.
    """

    backend: Backend
    tokenizer: Tokenizer
    settings: ApiSettings
    metrics: Metrics
    votes: VoteStore | None = None
    experiments: Experiments | None = None
    created: int = field(default_factory=lambda: int(time.time()))


def make_id(prefix: str) -> str:
    """Return a new id such as `chatcmpl-0123...`."""
    return f"{prefix}-{secrets.token_hex(16)}"


def is_id(prefix: str, text: str) -> bool:
    """Return whether a text has the form of the ids that `make_id` gives."""
    return re.fullmatch(rf"{prefix}-[0-9a-f]{{32}}", text) is not None


async def run_work(work: Callable[[], Result], *, size: int) -> Result:
    """Run work on so many bytes, characters or values, in a thread if it would hold up others."""
    return work() if size < _LARGE else await asyncio.to_thread(work)
