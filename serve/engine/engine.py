"""Run the steps: schedule, forward, sample, finish. Synchronous, for one thread."""

import logging
import traceback
from collections.abc import Container
from collections.abc import Sequence as TokenIds

import torch
from torch import Tensor

from decoding.row import Row
from decoding.sampler import Sampled, Sampler
from serve.engine.cache_blocks import CacheBlocks
from serve.engine.limits import EngineLimits
from serve.engine.model import Model
from serve.engine.runner import ModelRunner, group_by_variant
from serve.engine.scheduler import Chunk, Scheduler
from serve.engine.sequence import LiveRequest, Sequence, SequenceState
from serve.requests import FinishReason, GenerationRequest, TokenLogprob, TokenOutput, TokenTrace

logger = logging.getLogger(__name__)

MAX_FORWARD_FAILURES = 3
"""Forward failures in a row after which the engine gives up."""

Outputs = dict[LiveRequest, list[TokenOutput]]


def describe_error(error: BaseException) -> str:
    """Say what failed and where, without the message: it may quote what a user sent."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {frame.name}, line {frame.lineno} of {frame.filename}"


class Engine:
    """Continuous batching of token streams over one model and its variants.

    Rows never influence one another: what a sequence generates depends on its own request only.

    Attributes:
        limits: with `max_context_tokens` by the model's positions and the cache.
        vocab_size: number of token ids.
        num_steps, num_generated_tokens: counters since start.
        error: why the engine gave up, or None.
        scheduler: read only, for its counters.
    """

    def __init__(
        self,
        model: Model,
        sampler: Sampler,
        limits: EngineLimits,
        *,
        eos_token_ids: TokenIds[int],
    ) -> None:
        """Allocate the cache.

        Args:
            model: the base, a decoder.
            sampler: a `decoding.Sampler` for the model's vocabulary.
            limits: what to use and to take on.
            eos_token_ids: tokens that end a sequence unless `ignore_eos`.

        Raises:
            ValueError: the limits do not go with the model.
        """
        self.limits = limits.fit(max_position_embeddings=model.spec.max_position_embeddings)
        self._blocks = CacheBlocks(limits.num_cache_blocks)
        self._side_blocks = CacheBlocks(limits.num_side_blocks)
        self.scheduler = Scheduler(self._blocks, self._side_blocks, self.limits)
        self.vocab_size = model.spec.vocab_size
        self.num_steps = 0
        self.num_generated_tokens = 0
        self.error: str | None = None
        self._runner = ModelRunner(model, self.limits)
        self._sampler = sampler
        self._eos_token_ids = frozenset(eos_token_ids)
        self._live: dict[LiveRequest, None] = {}
        self._outputs: Outputs = {}
        self._num_arrivals = 0
        self._num_failures = 0

    @property
    def has_work(self) -> bool:
        """Whether a sequence is waiting or running."""
        return bool(self._live)

    @property
    def num_cache_blocks(self) -> int:
        """Blocks of the KV cache."""
        return self._blocks.num_blocks

    @property
    def num_available_cache_blocks(self) -> int:
        """Blocks that no sequence uses, those kept for reuse included."""
        return self._blocks.num_available

    @property
    def num_side_cache_blocks(self) -> int:
        """Blocks for side networks."""
        return self._side_blocks.num_blocks

    @property
    def num_available_side_cache_blocks(self) -> int:
        """Those of them that no sequence uses."""
        return self._side_blocks.num_available

    def check(self, request: GenerationRequest) -> None:
        """Refuse a request that could never run; safe to call from any thread.

        Raises:
            ValueError: the prompt is empty, has ids outside the vocabulary or does not fit.
        """
        request.check(vocab_size=self.vocab_size, max_context_tokens=self.limits.max_context_tokens)

    def add(self, request: LiveRequest) -> None:
        """Queue a checked request."""
        request.start(self._num_arrivals)
        self._num_arrivals += 1
        self._live[request] = None
        self.scheduler.add(request)
        if self.error or not self._has_side_caches(request):
            self._end(request, "error")

    def abort(self, request: LiveRequest) -> None:
        """End every sequence of a request; one that has ended or is unknown is ignored."""
        if request in self._live:
            self._end(request, "abort")

    def abort_sequence(self, request: LiveRequest, index: int) -> None:
        """End one sequence of a request; one that has ended or is unknown is ignored."""
        if request in self._live and 0 <= index < len(request.sequences):
            sequence = request.sequences[index]
            if sequence.state is not SequenceState.FINISHED:
                self._finish(sequence, "abort")

    def abort_all(self) -> None:
        """End every request."""
        for request in list(self._live):
            self._end(request, "abort")

    def abandon(self, error: BaseException) -> None:
        """Give up after a fault of the engine itself: end every request, admit no more."""
        self.error = f"the engine failed: {type(error).__name__}"
        for request in self._live:
            request.is_queued = False
            for sequence in request.sequences:
                if sequence.state is not SequenceState.FINISHED:
                    sequence.state = SequenceState.FINISHED
                    self._emit(sequence, None, "error")
            request.sequences = []
        self._live.clear()
        self.scheduler.clear()

    def take_outputs(self) -> Outputs:
        """Hand out what has come out since the last call, by request."""
        outputs, self._outputs = self._outputs, {}
        return outputs

    def step(self) -> Outputs:
        """Compute one step if there is work.

        Returns:
            The new outputs of each request, those of aborts since the last step included.
        """
        if self._live:
            chunks = self.scheduler.schedule()
            assert chunks, "a sequence is waiting, but none can run"
            with torch.inference_mode():
                computed = self._forward(chunks)
                if computed is not None:
                    self.scheduler.commit(computed[0])
                    self._read_logits(*computed)
        if not self._live:
            self._runner.forget()
        return self.take_outputs()

    def _forward(self, chunks: list[Chunk]) -> tuple[list[Chunk], Tensor] | None:
        """Run the base and the variants that a step needs, one after the other.

        A fault ends the requests whose chunks it meets. The engine gives up after some steps in a
        row of which nothing could be computed.

        Returns:
            The chunks of the requests that go on, those of a variant together, and their logits in
            this order; None where nothing was computed.
        """
        computed: list[Chunk] = []
        parts: list[Tensor] = []
        failed: dict[LiveRequest, None] = {}
        name = ""
        for group in group_by_variant(chunks):
            try:
                parts.append(self._runner.forward(group))
                computed += group
            except Exception as error:
                logger.error("forward failed: %s", describe_error(error))
                name = type(error).__name__
                failed |= {chunk.sequence.request: None for chunk in group}
        if parts:
            self._num_failures = 0
            self.num_steps += 1
        else:
            self._num_failures += 1
            if self._num_failures >= MAX_FORWARD_FAILURES:
                self.error = f"forward failed {self._num_failures} times in a row: {name}"
                failed = dict(self._live)
        for request in failed:
            self._end(request, "error")
        if not parts:
            return None
        logits = parts[0] if len(parts) == 1 else torch.cat(parts)
        return _leave_out(failed, computed, logits) if failed else (computed, logits)

    def _has_side_caches(self, request: LiveRequest) -> bool:
        """Make the side caches that a request needs; False if there is no memory for one."""
        try:
            for sequence in request.sequences:
                if sequence.adapter is not None:
                    self._runner.side_cache(sequence.adapter.side)
        except Exception as error:
            logger.error("a side cache cannot be made: %s", describe_error(error))
            return False
        return True

    def _read_logits(self, chunks: list[Chunk], logits: Tensor) -> None:
        """Turn the logits of a step into prompt log probabilities and new tokens."""
        sequences: list[Sequence] = []
        rows: list[int] = []
        num_read = 0
        for chunk in chunks:
            sequence = chunk.sequence
            is_sound = True
            if chunk.num_prompt_logits:
                prompt_logits = logits[num_read : num_read + chunk.num_prompt_logits]
                is_sound = self._score_prompt(sequence, prompt_logits)
            num_read += chunk.num_logits
            if chunk.is_last and is_sound:
                if not sequence.params.max_tokens:
                    self._finish(sequence, "length")
                else:
                    sequences.append(sequence)
                    rows.append(num_read - 1)
        if sequences:
            self._sample(sequences, logits if len(rows) == len(logits) else logits[rows])

    def _score_prompt(self, sequence: Sequence, logits: Tensor) -> bool:
        """Append prompt log probabilities from (L, V) logits; False if that failed."""
        asked, scored = sequence.request.asked, sequence.prompt_logprobs
        assert scored is not None
        assert asked.prompt_logprobs is not None
        first = len(scored) + 1
        token_ids = asked.prompt_token_ids[first : first + len(logits)]
        try:
            found = self._sampler.score(logits, token_ids, num_top=asked.prompt_logprobs)
            scored += [TokenLogprob(*one) for one in found]
        except Exception as error:
            self._fail(sequence, error)
            return False
        return True

    def _sample(self, sequences: list[Sequence], logits: Tensor) -> None:
        """Draw the next token of each sequence; a fault costs only the sequence that has it."""
        try:
            sampled = self._draw(sequences, logits)
        except Exception:
            for i, sequence in enumerate(sequences):
                self._sample_alone(sequence, logits[i : i + 1])
            return
        for i, sequence in enumerate(sequences):
            self._append(sequence, sampled, i)

    def _sample_alone(self, sequence: Sequence, logits: Tensor) -> None:
        try:
            if sequence.row is not None:
                sequence.row.truncate(sequence.num_generated)
            sampled = self._draw([sequence], logits)
        except Exception as error:
            self._fail(sequence, error)
        else:
            self._append(sequence, sampled, 0)

    def _draw(self, sequences: list[Sequence], logits: Tensor) -> Sampled:
        """Draw from (B, V) logits and let the sampler's rows know the tokens."""
        rows = [self._row(sequence) for sequence in sequences]
        sampled = self._sampler.sample(logits, rows)
        for row, token_id in zip(rows, sampled.token_ids, strict=True):
            row.append(token_id)
        return sampled

    def _row(self, sequence: Sequence) -> Row:
        """Return the sampler's state of a sequence, made at its first draw."""
        if sequence.row is None:
            asked = sequence.request.asked
            sequence.row = self._sampler.start(
                sequence.params,
                asked.prompt_token_ids,
                seed=sequence.seed,
                prompt_is_template=asked.prompt_is_template,
                is_traced=asked.is_traced,
            )
        return sequence.row

    def _append(self, sequence: Sequence, sampled: Sampled, i: int) -> None:
        """Add token `i` of a draw to its sequence, and finish the sequence if it was the last."""
        token_id, params = sampled.token_ids[i], sequence.params
        sequence.token_ids.append(token_id)
        self.num_generated_tokens += 1
        logprob = trace = None
        scored, entropy = sampled.logprobs[i], sampled.entropies[i]
        if scored is not None:
            logprob = TokenLogprob(scored, sampled.top[i])
        if entropy is not None:
            trace = TokenTrace(sampled.classes[i], sampled.temperatures[i], entropy)
        is_eos = token_id in self._eos_token_ids and not params.ignore_eos
        if is_eos or token_id in params.stop_token_ids:
            self._finish(sequence, "stop", token_id, logprob, trace)
        elif sequence.num_generated == params.max_tokens:
            self._finish(sequence, "length", token_id, logprob, trace)
        else:
            self._emit(sequence, token_id, None, logprob, trace)

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        logger.error("a sequence failed: %s", describe_error(error))
        self._finish(sequence, "error")

    def _end(self, request: LiveRequest, reason: FinishReason) -> None:
        """End every unfinished sequence of a request."""
        for sequence in request.sequences:
            if sequence.state is not SequenceState.FINISHED:
                self._finish(sequence, reason)

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        token_id: int | None = None,
        logprob: TokenLogprob | None = None,
        trace: TokenTrace | None = None,
    ) -> None:
        """End a sequence, with its last token if there is one, and free what it holds."""
        self.scheduler.finish(sequence)
        self._emit(sequence, token_id, reason, logprob, trace)
        sequence.row = None
        request = sequence.request
        request.num_unfinished -= 1
        if not request.num_unfinished:
            request.is_queued = False
            request.sequences = []  # a circle would keep them until the next garbage collection
            del self._live[request]

    def _emit(
        self,
        sequence: Sequence,
        token_id: int | None,
        reason: FinishReason | None,
        logprob: TokenLogprob | None = None,
        trace: TokenTrace | None = None,
    ) -> None:
        if sequence.has_output:
            output = TokenOutput(sequence.index, token_id, reason, logprob, trace)
        else:
            sequence.has_output = True
            prompt_logprobs: list[TokenLogprob | None] | None = None
            if sequence.prompt_logprobs is not None and not sequence.num_missing_prompt_logprobs:
                prompt_logprobs = [None, *sequence.prompt_logprobs]
            num_cached = sequence.num_cached_prompt_tokens or 0
            output = TokenOutput(
                sequence.index, token_id, reason, logprob, trace, num_cached, prompt_logprobs
            )
        self._outputs.setdefault(sequence.request, []).append(output)


def _leave_out(
    requests: Container[LiveRequest], chunks: list[Chunk], logits: Tensor
) -> tuple[list[Chunk], Tensor]:
    """Take the chunks of some requests out of a step, and their rows out of its logits."""
    kept: list[Chunk] = []
    rows: list[int] = []
    num_read = 0
    for chunk in chunks:
        if chunk.sequence.request not in requests:
            kept.append(chunk)
            rows += range(num_read, num_read + chunk.num_logits)
        num_read += chunk.num_logits
    return kept, logits[rows]
