"""From the fields of a request to sampling parameters."""

import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from decoding import STRATEGIES, SamplingParams, Strategy, parse_strategy
from decoding.options import options_of
from decoding.strategies import Learned
from serve.api.context import ApiContext
from serve.api.errors import ApiError
from serve.api.schema import GenerationBody, SamplingFields
from serve.api.settings import ApiSettings
from serve.backends.protocol import AdapterInfo
from serve.requests import Arm

DEFAULT_STRATEGY = SamplingParams().strategy
DEFAULT_MAX_TOKENS = 16
"""Of a text; a chat fills the context."""
MAX_LOGPROBS = int(options_of(SamplingParams)["logprobs"][0].maximum or 0)
_MAX_NAMES = 20
_SUFFIXES = re.compile(r"(?::([^:@]*))?(?:@([^:@]*))?")

_PLAIN_FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
)


class ModelChoice(NamedTuple):
    """What a model id stands for.

    Attributes:
        model: the id as the client spelt it.
        adapter: name of the adapter, or None for the base.
        has_side: a side network is part of it, so there is something to scale.
        strategy: name of the decoding strategy, if the id has one.
        has_head: it has a temperature head.
        labels: what it tells apart, if it classifies; None: it generates.
    """

    model: str
    adapter: str | None
    has_side: bool
    strategy: str | None
    has_head: bool = False
    labels: tuple[str, ...] | None = None


def split_model(model: str | None, context: ApiContext) -> ModelChoice:
    """Take a model id apart: `base`, `base:adapter`, either with `@strategy`; None is the base.

    Raises:
        ApiError: 404, no such model, adapter or strategy.
    """
    base = context.settings.model_id
    if model is None:
        return ModelChoice(base, None, False, None)
    found = _SUFFIXES.fullmatch(model.removeprefix(base)) if model.startswith(base) else None
    if found is None or (found[2] is not None and found[2] not in STRATEGIES):
        raise _no_such_model("There is no such model; /v1/models lists what is served.")
    if found[1] is None:
        return ModelChoice(model, None, False, found[2])
    known = {info.name: info for info in context.backend.adapters()}
    info = known.get(found[1])
    if info is None:
        raise _no_such_model(f"There is no such adapter; attached: {list_names(list(known))}.")
    has_head = info.kind == "temperature_head"
    return ModelChoice(model, found[1], info.has_side, found[2], has_head, info.labels)


def usable_strategies(adapter: AdapterInfo | None) -> list[str]:
    """Return the strategies that go with an adapter, None: the base."""
    if adapter is not None and adapter.labels is not None:
        return []
    has_head = adapter is not None and adapter.kind == "temperature_head"
    return [name for name in STRATEGIES if has_head or name != Learned.name]


def list_names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + more if names else "none"


def _no_such_model(message: str) -> ApiError:
    return ApiError(message, status=404, param="model", code="model_not_found")


def resolve_adapter_scale(scale: float | None, *, has_side: bool) -> float:
    """Return how much of the side network is asked for.

    Raises:
        ApiError: out of range, or there is no side network to scale.
    """
    if scale is None:
        return 1.0
    if not has_side:
        message = "adapter_scale needs a model id with a side network, such as base:adapter."
    elif not 0 <= scale <= 1:
        message = f"adapter_scale must be a number from 0 to 1, got {scale:g}."
    else:
        return scale
    raise ApiError(message, param="adapter_scale", code="invalid_value")


def _resolve_strategy(decoding: Mapping[str, Any] | None, choice: ModelChoice) -> Strategy:
    """Return the strategy that the `decoding` object and the model id agree on.

    Raises:
        ApiError: they name different strategies, or the model id lacks what the strategy reads.
        ParameterError: an unknown strategy or a bad parameter.
    """
    suffix = choice.strategy
    if suffix is None and choice.has_head and (decoding is None or "strategy" not in decoding):
        suffix = Learned.name
    if decoding is None:
        strategy = DEFAULT_STRATEGY if suffix is None else parse_strategy({"strategy": suffix})
        return _with_head(strategy, choice)
    fields = {key: value for key, value in decoding.items() if value is not None}
    if suffix is not None and fields.setdefault("strategy", suffix) != suffix:
        raise ApiError(
            f"decoding.strategy differs from the model id's '@{suffix}'; give one of them.",
            param="decoding.strategy",
            code="invalid_value",
        )
    return _with_head(parse_strategy(fields), choice)


def _with_head(strategy: Strategy, choice: ModelChoice) -> Strategy:
    if strategy.reads_head and not choice.has_head:
        raise ApiError(
            f"The strategy {strategy.name} needs a model id with a temperature head, such as "
            "base:head; /v1/adapters lists what is attached.",
            param="decoding.strategy",
            code="invalid_value",
        )
    return strategy


def build_arm(
    body: SamplingFields,
    choice: ModelChoice,
    context: ApiContext,
    *,
    max_tokens: int,
    num_sequences: int = 1,
    logprobs: int | None = None,
) -> Arm:
    """Return what a request asks of a model; an unset seed is drawn.

    Raises:
        ApiError: the fields do not go with the model id.
        ParameterError: a value is out of range.
    """
    if choice.labels is not None:
        raise ApiError(
            f"{choice.model} classifies and writes no text; ask POST /v1/classify.",
            param="model",
            code="invalid_value",
        )
    fields = {name: getattr(body, name) for name in _PLAIN_FIELDS}
    params = SamplingParams(
        **{name: value for name, value in fields.items() if value is not None},
        seed=secrets.randbits(63) if body.seed is None else body.seed,
        max_tokens=max_tokens,
        logprobs=logprobs,
        strategy=_resolve_strategy(body.decoding, choice),
    )
    params.check_vocabulary(context.backend.vocab_size, context.tokenizer.eos_token_ids)
    return Arm(
        params=params,
        num_sequences=num_sequences,
        adapter=choice.adapter,
        adapter_scale=resolve_adapter_scale(body.adapter_scale, has_side=choice.has_side),
    )


def resolve_max_tokens(
    asked: Mapping[str, int | None],
    *,
    default: int | None,
    minimum: int,
    num_prompt_tokens: int,
    prompt_param: str,
    context: int,
) -> int:
    """Return how many tokens to generate at most.

    Args:
        asked: value of each field that limits them; the smallest counts.
        default: used when none is set; None is the rest of the context.
        minimum: smallest value allowed.
        num_prompt_tokens: length of the longest prompt.
        prompt_param: the field that has it.
        context: longest prompt + continuation.

    Raises:
        ApiError: a value is too small, or the prompt and the continuation exceed the context.
    """
    given = {name: value for name, value in asked.items() if value is not None}
    for name, value in given.items():
        if value < minimum:
            raise ApiError(
                f"{name} must be at least {minimum}, got {value if value > -1e9 else 'less'}.",
                param=name,
                code="invalid_value",
            )
    param = min(given, key=lambda name: given[name]) if given else None
    if param is not None:
        max_tokens = given[param]
    else:
        max_tokens = max(1, context - num_prompt_tokens) if default is None else default
    if num_prompt_tokens + max_tokens > context:
        size = str(max_tokens) if max_tokens < 10**12 else "a huge number of"
        limit_param = param or "max_tokens"
        is_prompt_too_long = num_prompt_tokens + max(1, minimum) > context
        raise ApiError(
            f"The context is {context} tokens, but the prompt has {num_prompt_tokens} tokens and "
            f"{size} more are asked for; shorten the prompt or lower {limit_param}.",
            param=prompt_param if is_prompt_too_long else limit_param,
            code="context_length_exceeded",
        )
    return max_tokens


def check_num_sequences(n: int | None, num_prompts: int, settings: ApiSettings) -> int:
    """Return `n`.

    Raises:
        ApiError: it is out of range, or makes too many sequences with this many prompts.
    """
    n = 1 if n is None else n
    limit = settings.max_sequences_per_prompt
    if not 1 <= n <= limit:
        raise ApiError(f"n must be from 1 to {limit}.", param="n", code="invalid_value")
    if n * num_prompts > settings.max_sequences_per_request:
        raise ApiError(
            f"{num_prompts} prompts with n {n} are more than "
            f"{settings.max_sequences_per_request} sequences.",
            param="prompt" if n == 1 else "n",
            code="invalid_value",
        )
    return n


def check_stream_options(body: GenerationBody) -> None:
    """Check that `stream_options` goes with `stream`.

    Raises:
        ApiError: it does not.
    """
    if body.stream_options is not None and not body.stream:
        raise ApiError(
            "stream_options needs stream: true.", param="stream_options", code="invalid_value"
        )
