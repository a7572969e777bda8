"""Sampling parameters of one request."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from decoding.options import ParameterError, check_options, option
from decoding.strategies import STRATEGIES, Fixed, Strategy


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How the tokens of a request are chosen and when a sequence ends.

    Ranges are those of OpenAI's API where it has the field, else vLLM's. The order of application
    is: logit_bias, penalties, min_tokens, temperature, top_k, typical_p, top_p, min_p, draw.

    Raises:
        ParameterError: a value is out of range or of the wrong type; `param` names the field.
    """

    temperature: float = option(
        1.0,
        "Divides the logits; 0 takes the most likely token.",
        "number",
        minimum=0.0,
        maximum=2.0,
    )
    top_p: float = option(
        1.0,
        "Keep the most likely tokens until their probabilities sum to this.",
        "number",
        minimum=0.0,
        maximum=1.0,
        is_minimum_excluded=True,
    )
    top_k: int = option(
        0,
        "Keep this many of the most likely tokens; 0 or -1 keeps all.",
        "integer",
        minimum=-1,
        maximum=2**31 - 1,
    )
    min_p: float = option(
        0.0,
        "Keep tokens at least this fraction as likely as the most likely one.",
        "number",
        minimum=0.0,
        maximum=1.0,
    )
    typical_p: float = option(
        1.0,
        "Keep the tokens whose surprise is nearest to the entropy until they sum to this.",
        "number",
        minimum=0.0,
        maximum=1.0,
        is_minimum_excluded=True,
    )
    presence_penalty: float = option(
        0.0,
        "Subtracted from the logit of every token generated so far.",
        "number",
        minimum=-2.0,
        maximum=2.0,
    )
    frequency_penalty: float = option(
        0.0,
        "Subtracted from a token's logit once for each time it was generated so far.",
        "number",
        minimum=-2.0,
        maximum=2.0,
    )
    repetition_penalty: float = option(
        1.0,
        "Divides positive and multiplies negative logits of tokens in the prompt or generated.",
        "number",
        minimum=0.0,
        maximum=2.0,
        is_minimum_excluded=True,
    )
    logit_bias: Mapping[int, float] = option(
        {},
        "Added to the logits of these token ids.",
        "token_biases",
        minimum=-100.0,
        maximum=100.0,
    )
    seed: int | None = option(
        None,
        "Seed of the random numbers; the same seed gives the same text.",
        "integer",
        minimum=-(2**63),
        maximum=2**63 - 1,
        is_optional=True,
    )
    stop: tuple[str, ...] = option(
        (), "Texts that end the sequence.", "strings", max_items=32, max_chars=256
    )
    stop_token_ids: tuple[int, ...] = option(
        (), "Token ids that end the sequence.", "token_ids", max_items=4096
    )
    include_stop_str_in_output: bool = option(
        False, "Keep the stop text at the end of the output.", "boolean"
    )
    ignore_eos: bool = option(
        False, "Go on after an end-of-sequence token, until max_tokens.", "boolean"
    )
    min_tokens: int = option(
        0,
        "End-of-sequence and stop tokens are not drawn before this many tokens.",
        "integer",
        minimum=0,
        maximum=2**31 - 1,
    )
    max_tokens: int | None = option(
        None,
        "Most tokens to generate; null fills the context.",
        "integer",
        minimum=0,
        maximum=2**31 - 1,
        is_optional=True,
    )
    logprobs: int | None = option(
        None,
        "How many of the most likely tokens to report beside each token's log probability.",
        "integer",
        minimum=0,
        maximum=20,
        is_optional=True,
    )
    strategy: Strategy = Fixed()

    def __post_init__(self) -> None:
        check_options(self)
        if not isinstance(self.strategy, tuple(STRATEGIES.values())):
            known = ", ".join(sorted(STRATEGIES))
            raise ParameterError(
                f"strategy must be an instance of a registered strategy ({known}), "
                f"got {self.strategy!r}",
                param="strategy",
            )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ParameterError(
                f"min_tokens must be at most max_tokens ({self.max_tokens}), got {self.min_tokens}",
                param="min_tokens",
            )

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken, without a draw, whatever the strategy."""
        return self.temperature == 0.0

    def held_back_ids(self, end_token_ids: Iterable[int]) -> frozenset[int]:
        """Return the tokens that are not drawn before `min_tokens`.

        Args:
            end_token_ids: the model's, which count unless `ignore_eos`.
        """
        if not self.min_tokens:
            return frozenset()
        return frozenset((*self.stop_token_ids, *(() if self.ignore_eos else end_token_ids)))

    def check_vocabulary(self, vocab_size: int, end_token_ids: Iterable[int] = ()) -> None:
        """Check that every token id is in a vocabulary, and that some token may be drawn.

        Args:
            vocab_size: ids are below it.
            end_token_ids: the model's.

        Raises:
            ParameterError: `logit_bias`, `stop_token_ids` or a field of the strategy has an id
                that the vocabulary lacks, or `min_tokens` leaves no token of it.
        """
        named = {"logit_bias": tuple(self.logit_bias), "stop_token_ids": self.stop_token_ids}
        for field, token_ids in self.strategy.token_ids().items():
            named[f"decoding.{field}"] = token_ids
        for param, token_ids in named.items():
            bad = [token_id for token_id in token_ids if token_id >= vocab_size]
            if bad:
                raise ParameterError(
                    f"{param} has token id {bad[0]}, but the model's vocabulary is "
                    f"0 to {vocab_size - 1}",
                    param=param,
                )
        if len(self.held_back_ids(end_token_ids)) >= vocab_size:
            raise ParameterError(
                f"stop_token_ids and the end tokens are all {vocab_size} tokens, and none of them "
                "is drawn before min_tokens",
                param="stop_token_ids",
            )
