"""What a request asks of our sampler, in the extra arguments of vLLM's sampling parameters."""

import json
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from decoding import SamplingParams, parse_strategy
from decoding.options import ParameterError, options_of

WHOLE = "proa"
"""Argument that our backend gives: everything, as JSON."""
DECODING = "decoding"
"""Argument for other clients of vLLM: the strategy, as JSON text; the rest is vLLM's parameters."""


class VllmParams(Protocol):
    """What is read of vLLM's sampling parameters."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    seed: int | None
    extra_args: dict[str, Any] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What one sequence asks for.

    Attributes:
        params: how its tokens are chosen.
        seed: of its draws.
        key: names it in reports; "": nobody reads any.
        prompt_is_template, is_traced: as in `GenerationRequest`.
        head: address of the temperature head that it uses, or None.
        classifier: address of the side network that classifies its prompt, or None.
    """

    params: SamplingParams
    seed: int
    key: str = ""
    prompt_is_template: bool = False
    is_traced: bool = False
    head: str | None = None
    classifier: str | None = None

    def to_extra_args(self) -> dict[str, str]:
        """Return the extra arguments that `read_asked` reads the same of."""
        fields: dict[str, Any] = {
            name: getattr(self.params, name)
            for name, (_, default) in options_of(SamplingParams).items()
            if getattr(self.params, name) != default
        }
        strategy = self.params.strategy
        fields[DECODING] = {"strategy": strategy.name, **asdict(strategy)}  # type: ignore[call-overload]
        others = {
            name: getattr(self, name) for name in self.__dataclass_fields__ if name != "params"
        }
        return {WHOLE: json.dumps({"params": fields, **others})}


def read_asked(params: VllmParams, *, penalties_are_applied: bool) -> Asked | None:
    """Read what a request asks of our sampler; None: nothing, vLLM's is to draw.

    Args:
        params: vLLM's.
        penalties_are_applied: the logits that the sampler sees have them already.

    Raises:
        ParameterError: an argument is malformed or out of range.
    """
    given: Mapping[str, Any] = params.extra_args or {}
    if WHOLE in given:
        return _read_whole(_parse(given[WHOLE], WHOLE))
    if DECODING not in given:
        return None
    strategy = parse_strategy(_parse(given[DECODING], DECODING))
    if strategy.look_ahead is not None or strategy.reads_head:
        raise ParameterError(
            f"decoding.strategy {strategy.name} needs Proa's own API; vllm serve does without it",
            param="decoding.strategy",
        )
    penalties: dict[str, Any] = {} if penalties_are_applied else {
        "presence_penalty": params.presence_penalty, "frequency_penalty": params.frequency_penalty,
        "repetition_penalty": params.repetition_penalty,
    }  # fmt: skip
    asked = SamplingParams(
        temperature=params.temperature, top_p=params.top_p, top_k=params.top_k, min_p=params.min_p,
        strategy=strategy, **penalties,
    )  # fmt: skip
    seed = secrets.randbits(62) if params.seed is None else params.seed
    return Asked(params=asked, seed=seed)


def _parse(value: Any, name: str) -> dict[str, Any]:
    """Read an argument that is an object, or its text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise ParameterError(f"{name} must be JSON text of an object", param=name) from None
    if not isinstance(value, dict):
        raise ParameterError(f"{name} must be an object, got {value!r}", param=name)
    return value


def _read_whole(values: dict[str, Any]) -> Asked:
    fields = dict(values.pop("params"))
    strategy = parse_strategy(fields.pop(DECODING))
    if "logit_bias" in fields:
        fields["logit_bias"] = {int(i): bias for i, bias in fields["logit_bias"].items()}
    return Asked(params=SamplingParams(strategy=strategy, **fields), **values)
