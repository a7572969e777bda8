"""Requests and what comes of them, in token ids: what API, backends and engine say to one another.

Text, stop strings and chat templates are the API's business.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from decoding import SamplingParams

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """Continuations of a request's prompt that are made alike.

    Attributes:
        params: sampling parameters; `seed` and `max_tokens` are set (the API resolves them).
        num_sequences: how many; number i draws with `decoding.derive_seed(params.seed, i)`.
        adapter: name of an attached adapter, or None for the base.
        adapter_scale: how much of its side network, 0 .. 1; 0 is the base, or the variant that it
            sits on, exactly.
    """

    params: SamplingParams
    num_sequences: int = 1
    adapter: str | None = None
    adapter_scale: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRequest:
    """One prompt and its continuations. The base computes the prompt once for all arms on it; so
    does each variant.

    Attributes:
        request_id: unique among the requests in flight.
        prompt_token_ids: at least one id, each in the vocabulary, prompt + max_tokens within the
            context.
        arms: at least one; their sequences are numbered through, in order.
        prompt_is_template: the prompt ends in a chat template, which the answer does not continue.
        prompt_logprobs: None, or how many alternatives to report beside each prompt token's own
            log probability.
        is_traced: fill `TokenOutput.trace`.
        is_classification: score the prompt with the classification adapter of its only arm, and
            generate nothing; `max_tokens` is 0.
    """

    request_id: str
    prompt_token_ids: list[int]
    arms: tuple[Arm, ...]
    prompt_is_template: bool = False
    prompt_logprobs: int | None = None
    is_traced: bool = False
    is_classification: bool = False

    @property
    def num_sequences(self) -> int:
        """Sequences of all arms."""
        return sum(arm.num_sequences for arm in self.arms)

    def check(self, *, vocab_size: int, max_context_tokens: int) -> None:
        """Refuse what could never run.

        Raises:
            ValueError: the prompt is empty, has ids outside the vocabulary or does not fit, or an
                arm is not complete.
        """
        prompt = self.prompt_token_ids
        if not prompt:
            raise ValueError("the prompt must have at least one token")
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            raise ValueError(f"prompt token ids must be 0 to {vocab_size - 1}")
        if not self.arms:
            raise ValueError("a request must have at least one arm")
        for arm in self.arms:
            max_tokens = arm.params.max_tokens
            if arm.num_sequences < 1:
                raise ValueError(f"num_sequences must be at least 1, got {arm.num_sequences}")
            if max_tokens is None or arm.params.seed is None:
                raise ValueError("max_tokens and seed must be set")
            if not 0.0 <= arm.adapter_scale <= 1.0:
                raise ValueError(f"adapter_scale must be 0 to 1, got {arm.adapter_scale}")
            if len(prompt) + max_tokens > max_context_tokens:
                raise ValueError(
                    f"prompt and max_tokens must be at most {max_context_tokens} tokens "
                    f"together, got {len(prompt)} + {max_tokens}"
                )


# Tuples from here on: they are made for every token, and a frozen dataclass takes four times as
# long.


class TokenLogprob(NamedTuple):
    """Natural log probability of a token under the unscaled logits, with its alternatives.

    Attributes:
        logprob: of the token itself.
        top: (token_id, logprob) pairs, most likely first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class TokenTrace(NamedTuple):
    """What the decoding strategy did for one token.

    Attributes:
        token_class: class of the token's text (`decoding` token classes).
        temperature: temperature the token was drawn with, 0 for greedy.
        entropy: entropy in nats of the model's distribution at temperature 1.
        stage: the strategy's name of where the token stands, if it has one.
        candidates: tokens that were tried before this one was taken, with the mean log probability
            of each and of what was looked at after it.
    """

    token_class: str
    temperature: float
    entropy: float
    stage: str | None = None
    candidates: tuple[tuple[int, float], ...] = ()


class TokenOutput(NamedTuple):
    """One new token of one sequence, or the end of a sequence.

    Attributes:
        sequence_index: number of the sequence in the request, from 0.
        token_id: the token; None when the sequence ended without a new one (abort, error).
        finish_reason: set on a sequence's last output. "stop": the token is an end-of-sequence or
            stop token.
        logprob: set when `params.logprobs` is, or the request is traced.
        trace: set when the request is traced.
        cached_prompt_tokens: prompt tokens that were not computed again; on a sequence's first
            output.
        prompt_logprobs: one entry for each prompt token (None for the first); on sequence 0's first
            output if asked for.
        class_scores: what a classification adapter gives each of its labels, unscaled; on the only
            output of a request for that.
    """

    sequence_index: int
    token_id: int | None
    finish_reason: FinishReason | None = None
    logprob: TokenLogprob | None = None
    trace: TokenTrace | None = None
    cached_prompt_tokens: int = 0
    prompt_logprobs: list[TokenLogprob | None] | None = None
    class_scores: tuple[float, ...] | None = None
