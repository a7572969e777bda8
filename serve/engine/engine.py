"""Run the steps: schedule, forward, sample, finish. Synchronous, for one thread."""

import logging
import math
import traceback
from collections.abc import Container
from collections.abc import Sequence as TokenIds
from typing import NamedTuple

import torch
from torch import Tensor

from decoding.logprobs import LogitsError
from decoding.row import Row
from decoding.sampler import Sampled, Sampler
from serve.engine.cache_blocks import CacheBlocks
from serve.engine.limits import EngineLimits
from serve.engine.look_ahead import advance, check_room, decide, make_probes
from serve.engine.model import Model
from serve.engine.runner import ModelRunner, group_by_variant
from serve.engine.scheduler import Chunk, Scheduler
from serve.engine.sequence import Choice, LiveRequest, Sequence, SequenceState
from serve.requests import (
    FinishReason,
    GenerationRequest,
    TokenLogprob,
    TokenOutput,
    TokenTrace,
)

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
            ParameterError: there is no room to look ahead.
        """
        request.check(vocab_size=self.vocab_size, max_context_tokens=self.limits.max_context_tokens)
        for arm in request.arms:
            check_room(arm, len(request.prompt_token_ids), self.limits)

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
                self._runner.copy_blocks(self.scheduler.take_copies())
                computed = self._forward(chunks)
                if computed is not None:
                    self.scheduler.commit(computed.chunks)
                    self._read(computed)
        if not self._live:
            self._runner.forget()
        return self.take_outputs()

    def _forward(self, chunks: list[Chunk]) -> "_Computed | None":
        """Run the base and the variants that a step needs, one after the other.

        A fault ends the requests whose chunks it meets. The engine gives up after some steps in a
        row of which nothing could be computed.

        Returns:
            Of the requests that go on, those of a variant together; None where nothing was
            computed.
        """
        needs_states = any(chunk.sequence.needs_states for chunk in chunks)
        computed: list[Chunk] = []
        parts: list[Tensor] = []
        states: list[Tensor] = []
        failed: dict[LiveRequest, None] = {}
        name = ""
        for group in group_by_variant(chunks):
            try:
                logits, read = self._runner.forward(group, needs_states=needs_states)
                parts.append(logits)
                if read is not None:
                    states.append(read)
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
        whole = _Computed(computed, _join(parts), _join(states) if states else None)
        return _leave_out(failed, whole) if failed else whole

    def _has_side_caches(self, request: LiveRequest) -> bool:
        """Make the side caches that a request needs; False if there is no memory for one."""
        try:
            for sequence in request.sequences:
                if sequence.adapter is not None and sequence.adapter.side is not None:
                    self._runner.side_cache(sequence.adapter.side)
        except Exception as error:
            logger.error("a side cache cannot be made: %s", describe_error(error))
            return False
        return True

    def _read(self, computed: "_Computed") -> None:
        """Turn what a step computed into prompt log probabilities, classes and new tokens."""
        chunks, logits, states = computed
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
                if sequence.request.asked.is_classification:
                    assert states is not None
                    self._classify(sequence, states[num_read - 1])
                elif not sequence.params.max_tokens:
                    self._finish(sequence, "length")
                else:
                    sequences.append(sequence)
                    rows.append(num_read - 1)
        if sequences:
            if len(rows) < len(logits):
                logits, states = logits[rows], None if states is None else states[rows]
            self._sample(sequences, logits, states)

    def _classify(self, sequence: Sequence, state: Tensor) -> None:
        """End a sequence with what its classification adapter makes of its last token."""
        assert sequence.adapter is not None
        assert sequence.adapter.classifier is not None
        scores = tuple((sequence.adapter.classifier @ state.cpu()).tolist())
        if all(map(math.isfinite, scores)):
            self._finish(sequence, "stop", class_scores=scores)
        else:
            self._fail(sequence, LogitsError())

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

    def _sample(self, sequences: list[Sequence], logits: Tensor, states: Tensor | None) -> None:
        """Draw the next token of each sequence; a fault costs only the sequence that has it."""
        try:
            sampled = self._draw(sequences, logits, states)
        except Exception:
            for i, sequence in enumerate(sequences):
                one = slice(i, i + 1)
                self._sample_alone(sequence, logits[one], None if states is None else states[one])
            return
        for i, sequence in enumerate(sequences):
            self._take(sequence, sampled, i, logits)

    def _sample_alone(self, sequence: Sequence, logits: Tensor, states: Tensor | None) -> None:
        try:
            if sequence.row is not None:
                sequence.row.truncate(sequence.num_generated)
            sampled = self._draw([sequence], logits, states)
        except Exception as error:
            self._fail(sequence, error)
        else:
            self._take(sequence, sampled, 0, logits)

    def _draw(self, sequences: list[Sequence], logits: Tensor, states: Tensor | None) -> Sampled:
        """Draw from (B, V) logits and let the sampler's rows know the tokens."""
        rows = [self._row(sequence) for sequence in sequences]
        sampled = self._sampler.sample(logits, rows, states)
        for i, row in enumerate(rows):
            if not sampled.candidates[i]:
                row.append(sampled.token_ids[i])
        return sampled

    def _take(self, sequence: Sequence, sampled: Sampled, i: int, logits: Tensor) -> None:
        """Go on with token `i` of a draw: of a sequence, of a probe, or not before it was tried."""
        if sequence.parent is not None:
            self._append_to_probe(sequence, sampled, i)
        elif sampled.candidates[i]:
            choice = Choice(logits[i].clone(), sampled.temperatures[i], sampled.candidates[i], {})
            self._look_ahead(sequence, choice)
        else:
            self._append(sequence, sampled, i)

    def _look_ahead(self, sequence: Sequence, choice: Choice) -> None:
        """Let probes try the candidates of a choice."""
        sequence.choice = choice
        probes = make_probes(sequence, choice)
        if probes:
            self.scheduler.fork(sequence, probes)
        else:
            self._decide(sequence)

    def _append_to_probe(self, probe: Sequence, sampled: Sampled, i: int) -> None:
        """Add token `i` of a draw to a probe; the last probe that ends decides."""
        parent, token_id, logprob = probe.parent, sampled.token_ids[i], sampled.logprobs[i]
        assert parent is not None
        if probe.state is SequenceState.FINISHED:
            return  # its request has ended meanwhile
        assert logprob is not None
        if advance(probe, token_id, logprob, is_end=token_id in self._eos_token_ids):
            self.scheduler.finish(probe)
            if not parent.probes:
                self._decide(parent)

    def _decide(self, sequence: Sequence) -> None:
        """Take the candidate with the best score."""
        choice, row = sequence.choice, sequence.row
        assert choice is not None
        assert row is not None
        sequence.choice = None
        token_id, tried = decide(choice)
        try:
            sampled = self._sampler.report(
                choice.logits[None], [row], [token_id], [choice.temperature], [tried]
            )
        except Exception as error:
            self._fail(sequence, error)
            return
        row.append(token_id)
        self._append(sequence, sampled, 0)

    def _row(self, sequence: Sequence) -> Row:
        """Return the sampler's state of a sequence, made at its first draw."""
        if sequence.row is None:
            asked = sequence.request.asked
            sequence.row = self._sampler.start(
                sequence.params,
                asked.prompt_token_ids,
                seed=sequence.seed,
                prompt_is_template=asked.prompt_is_template,
                is_traced=asked.is_traced and sequence.parent is None,
                temperature_head=sequence.temperature_head,
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
            trace = TokenTrace(
                sampled.classes[i],
                sampled.temperatures[i],
                entropy,
                sampled.stages[i],
                sampled.candidates[i],
            )
        is_eos = token_id in self._eos_token_ids and not params.ignore_eos
        if is_eos or token_id in params.stop_token_ids:
            self._finish(sequence, "stop", token_id, logprob, trace)
        elif sequence.num_generated == params.max_tokens:
            self._finish(sequence, "length", token_id, logprob, trace)
        else:
            self._emit(sequence, token_id, None, logprob, trace)

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        logger.error("a sequence failed: %s", describe_error(error))
        failed = sequence if sequence.parent is None else sequence.parent
        if failed.state is not SequenceState.FINISHED:
            self._finish(failed, "error")

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
        class_scores: tuple[float, ...] | None = None,
    ) -> None:
        """End a sequence, with its last token if there is one, and free what it holds."""
        self.scheduler.finish(sequence)
        self._emit(sequence, token_id, reason, logprob, trace, class_scores)
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
        class_scores: tuple[float, ...] | None = None,
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
                sequence.index, token_id, reason, logprob, trace, num_cached, prompt_logprobs,
                class_scores,
            )  # fmt: skip
        self._outputs.setdefault(sequence.request, []).append(output)


class _Computed(NamedTuple):
    """What a step computed.

    Attributes:
        chunks: what was computed.
        logits: (L, V), in the order of the chunks.
        states: (L, D), what the LM head read for them; None if nobody needs it.
    """

    chunks: list[Chunk]
    logits: Tensor
    states: Tensor | None


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _leave_out(requests: Container[LiveRequest], computed: _Computed) -> _Computed:
    """Take the chunks of some requests out of a step, and their rows."""
    kept: list[Chunk] = []
    rows: list[int] = []
    num_read = 0
    for chunk in computed.chunks:
        if chunk.sequence.request not in requests:
            kept.append(chunk)
            rows += range(num_read, num_read + chunk.num_logits)
        num_read += chunk.num_logits
    states = computed.states
    return _Computed(kept, computed.logits[rows], None if states is None else states[rows])
