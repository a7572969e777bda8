"""Decide what each step computes: host only, no model, no clock.

Every step mixes decoding sequences (one token each) with chunks of prompts under one token budget.
Admission is first come, first served; an admitted sequence gets blocks for all its known tokens at
once, so only decoding can run out of blocks. Then the youngest sequence is preempted: it gives its
blocks back and later computes all its tokens again.

A sequence with a side network has blocks of the side cache beside those of the base, as many. A
token must be computed again as long as one of the two caches lacks it; what the base has of it is
then left alone. The first sequence of a request computes the prompt for its siblings: the side
networks that they use read along. Variants of the base have keys and values of their own, so there
is a first one for each variant.

A sequence that looks ahead waits while probes try tokens for it: sequences of their own over its
published blocks, admitted with blocks for all they will compute. They are younger than it and older
than what came after it. Who needs the blocks of one gets those of all probes of that sequence; it
computes its newest token once more then, and looks ahead again.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass

from serve.engine.cache_blocks import CacheBlocks, side_key
from serve.engine.limits import EngineLimits
from serve.engine.sequence import LiveRequest, Sequence, SequenceState, SideAdapter, SideStream


def _order(sequence: Sequence) -> tuple[int, ...]:
    return sequence.order


def _held_by(sequence: Sequence) -> list[Sequence]:
    """Give the siblings that wait for what a sequence computes: those held of its variant."""
    held = sequence.request.held
    return [other for other in held if other.variant is sequence.variant]


def _discard(sequences: list[Sequence], sequence: Sequence) -> None:
    i = bisect_left(sequences, sequence.order, key=_order)
    assert sequences[i] is sequence, "a sequence is not where its state says"
    del sequences[i]


@dataclass(slots=True)
class Chunk:
    """The tokens of one sequence that a step computes.

    Attributes:
        sequence: whose tokens.
        start: position of the first token, the sequence's `num_computed`.
        num_tokens: how many, >= 1.
        num_logits: how many of them, counted from the end, need logits.
        num_prompt_logits: how many of those are for prompt log probabilities; they come first.
        is_last: the chunk ends with the sequence's newest token: its last logits give the next one.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    num_logits: int
    num_prompt_logits: int
    is_last: bool


class Scheduler:
    """Waiting and running sequences, and the cache blocks of the latter.

    Attributes:
        waiting: sequences without blocks, oldest first.
        running: sequences with blocks, oldest first.
        num_probes: how many of those running try tokens for others.
        num_preemptions: counter since start.
        num_prompt_tokens, num_cached_prompt_tokens: counters since start, over the sequences that
            were admitted.
        num_base_cached_prompt_tokens: those that the base's cache had, computed again or not.
    """

    def __init__(self, blocks: CacheBlocks, side_blocks: CacheBlocks, limits: EngineLimits) -> None:
        """Start with nothing to do.

        Args:
            blocks: of the base's cache.
            side_blocks: of the side caches; enough for the longest sequence.
            limits: of the engine.
        """
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_probes = 0
        self.num_preemptions = 0
        self.num_prompt_tokens = 0
        self.num_cached_prompt_tokens = 0
        self.num_base_cached_prompt_tokens = 0
        self._blocks = blocks
        self._side_blocks = side_blocks
        self._limits = limits
        self._block_size = limits.block_size
        self._forks: list[Sequence] = []
        self._copies: list[tuple[int, int]] = []

    def add(self, request: LiveRequest) -> None:
        """Queue a started request.

        Where its sequences can share full blocks of the prompt, all but the first of each variant
        are held until that one has computed it.
        """
        num_tokens = len(request.asked.prompt_token_ids)
        is_shared = self._limits.prefix_caching and num_tokens > self._block_size
        variants: set[object] = set()
        for sequence in request.sequences:
            if is_shared and sequence.variant in variants:
                sequence.state = SequenceState.HELD
                request.held.append(sequence)
            else:
                variants.add(sequence.variant)
                self._wait(sequence)

    def take_copies(self) -> list[tuple[int, int]]:
        """Return (source, target) of the blocks to copy before the step that was scheduled."""
        copies, self._copies = self._copies, []
        return copies

    def fork(self, parent: Sequence, probes: list[Sequence]) -> None:
        """Let probes try tokens for a running sequence, which waits until all have finished."""
        parent.probes = probes
        for probe in probes:
            insort(self._forks, probe, key=_order)

    def finish(self, sequence: Sequence) -> None:
        """Take an unfinished sequence out, wherever it is, and free its blocks."""
        if sequence.parent is not None:
            sequence.parent.probes.remove(sequence)
            self._take_out_probe(sequence)
            return
        self._drop_probes(sequence)
        request = sequence.request
        state, sequence.state = sequence.state, SequenceState.FINISHED
        if state is SequenceState.HELD:
            request.held.remove(sequence)
            return
        if state is SequenceState.RUNNING:
            _discard(self.running, sequence)
            self._free(sequence)
        else:
            assert state is SequenceState.WAITING, "a sequence finishes once"
            _discard(self.waiting, sequence)
        held = _held_by(sequence)
        if held:
            self._let_go(held[:1])

    def clear(self) -> None:
        """Forget every sequence, without giving blocks back."""
        self.waiting.clear()
        self.running.clear()
        self._forks.clear()

    def schedule(self) -> list[Chunk]:
        """Choose the tokens of the next step: decoding first, then prompts, then new sequences.

        Returns:
            Chunks, at most one a sequence; empty only when no sequence is waiting or running.
        """
        chunks = self._schedule()
        while not chunks and self._forks:
            # Every sequence waits for probes that find no room.
            self._preempt(self._youngest())
            chunks = self._schedule()
        return chunks

    def _schedule(self) -> list[Chunk]:
        chunks: list[Chunk] = []
        prefilling: list[Sequence] = []
        num_preemptions = self.num_preemptions
        running = SequenceState.RUNNING
        for sequence in tuple(self.running):
            if sequence.state is not running or sequence.probes:
                continue  # preempted by an older one, or waiting for its probes
            start = sequence.num_computed
            if start + 1 < len(sequence.token_ids):
                prefilling.append(sequence)
            elif self._reserve_one(sequence):
                chunks.append(Chunk(sequence, start, 1, 1, 0, True))

        budget = self._limits.max_batch_tokens - len(chunks)
        num_prompt_logits = self._limits.max_prompt_logits
        for sequence in prefilling:
            if budget:
                chunk = self._take_chunk(sequence, budget, num_prompt_logits)
                if chunk:
                    chunks.append(chunk)
                    budget -= chunk.num_tokens
                    num_prompt_logits -= chunk.num_prompt_logits
        if self.num_preemptions > num_preemptions:
            return chunks
        while budget and self._forks and self._admit(self._forks[0]):
            chunk = self._take_chunk(self._forks.pop(0), budget, num_prompt_logits)
            assert chunk is not None
            chunks.append(chunk)
            budget -= chunk.num_tokens
        # What waits to go on comes before what waits to begin.
        while budget and not self._forks and self.waiting and self._admit(self.waiting[0]):
            chunk = self._take_chunk(self.waiting.pop(0), budget, num_prompt_logits)
            if chunk:
                chunks.append(chunk)
                budget -= chunk.num_tokens
                num_prompt_logits -= chunk.num_prompt_logits
        return chunks

    def commit(self, chunks: list[Chunk]) -> None:
        """Record that the chunks were computed: publish full blocks, let held siblings go."""
        for chunk in chunks:
            sequence = chunk.sequence
            sequence.num_computed = chunk.start + chunk.num_tokens
            num_full = sequence.num_computed // self._block_size
            if num_full > sequence.num_published:
                self._publish(sequence, num_full)
            if chunk.start < sequence.num_prompt_tokens <= sequence.num_computed:
                self._publish_prompt_end(sequence)
            if sequence.sides:
                self._commit_sides(sequence, num_full)
            if sequence.request.held and sequence.num_computed >= sequence.num_prompt_tokens:
                self._let_go(_held_by(sequence))

    def _wait(self, sequence: Sequence) -> None:
        sequence.state = SequenceState.WAITING
        insort(self.waiting, sequence, key=_order)

    def _let_go(self, held: list[Sequence]) -> None:
        for sequence in held:
            sequence.request.held.remove(sequence)
            self._wait(sequence)

    def _free(self, sequence: Sequence) -> None:
        self._blocks.release(sequence.blocks)
        del sequence.blocks[:]
        for side in sequence.sides:
            self._side_blocks.release(side.blocks)
        sequence.sides.clear()
        sequence.num_computed = 0
        sequence.num_published = 0

    def _youngest(self) -> Sequence:
        """Return the youngest sequence that runs; of probes, whom they try tokens for."""
        last = self.running[-1]
        return last if last.parent is None else last.parent

    def _preempt(self, sequence: Sequence) -> None:
        """Take the blocks of a running sequence, and of its probes."""
        self._drop_probes(sequence)
        _discard(self.running, sequence)
        self._free(sequence)
        self._wait(sequence)
        self.num_preemptions += 1

    def _drop_probes(self, sequence: Sequence) -> None:
        """End the probes of a sequence before they have decided anything."""
        if sequence.probes:
            for probe in sequence.probes:
                self._take_out_probe(probe)
            sequence.probes = []
            sequence.choice = None
            # Its newest token is computed once more, for the logits.
            sequence.num_computed -= 1

    def _take_out_probe(self, probe: Sequence) -> None:
        if probe.state is SequenceState.RUNNING:
            _discard(self.running, probe)
            self._free(probe)
            self.num_probes -= 1
        else:
            self._forks.remove(probe)
        probe.state = SequenceState.FINISHED

    def _drop_track(self, sequence: Sequence) -> bool:
        """Take a side network that reads along for a sibling off a sequence, if there is one."""
        if not sequence.sides or sequence.sides[-1].scale:
            return False
        self._side_blocks.release(sequence.sides.pop().blocks)
        return True

    def _reserve_one(self, sequence: Sequence) -> bool:
        """Make room for one more token, preempting the youngest while there is none.

        Returns:
            False if `sequence` itself was the youngest.
        """
        if sequence.num_computed < len(sequence.blocks) * self._block_size:
            return True
        blocks, side_blocks = self._blocks, self._side_blocks
        while not blocks.num_available or (sequence.sides and not side_blocks.num_available):
            if blocks.num_available and any(map(self._drop_track, reversed(self.running))):
                continue
            assert len(self.running) > 1, "a sequence that does not fit the cache was admitted"
            youngest = next(
                other for other in reversed(self.running) if other.sides or not blocks.num_available
            )
            if youngest.parent is not None:
                self._drop_probes(youngest.parent)
                self.num_preemptions += 1
                continue
            self._preempt(youngest)
            if youngest is sequence:
                return False
        sequence.blocks.append(blocks.allocate())
        for side in sequence.sides:
            side.blocks.append(side_blocks.allocate())
        return True

    def _admit(self, sequence: Sequence) -> bool:
        """Give a waiting sequence its blocks if there is room; the caller takes it off the queue.

        There must also be room for every running sequence to grow by a block, or the newcomer would
        soon be preempted again.
        """
        if sequence.parent is not None:
            is_full = self.num_probes >= self._limits.max_probes
        else:
            is_full = len(self.running) - self.num_probes >= self._limits.max_running_sequences
        if is_full:
            return False
        num_blocks = -(-sequence.num_reserved_tokens // self._block_size)
        num_reusable = self._num_reusable_blocks(sequence)
        keys = (sequence.block_key(i, self._block_size) for i in range(num_reusable))
        found = self._blocks.find(keys)
        if not self._blocks.has_room(found, num_blocks, num_spare=len(self.running)):
            return False
        adapter = sequence.adapter
        if adapter is not None and adapter.side is not None:
            known = self._find_side(sequence, adapter, num_reusable)
            if not self._add_side(sequence, adapter, sequence.adapter_scale, known):
                return False
        sequence.blocks = self._blocks.take(found, num_blocks)
        if sequence.request.held:
            self._add_tracks(sequence)
        sequence.write_start = len(found) * self._block_size
        if self._limits.prefix_caching and not sequence.sides:
            self._copy_prompt_end(sequence)
        sequence.num_computed = min((sequence.write_start, *(x.start for x in sequence.sides)))
        sequence.num_published = len(found)
        sequence.state = SequenceState.RUNNING
        insort(self.running, sequence, key=_order)
        self.num_probes += sequence.parent is not None
        if sequence.num_cached_prompt_tokens is None:
            sequence.num_cached_prompt_tokens = sequence.num_computed
            self.num_prompt_tokens += sequence.num_prompt_tokens
            self.num_cached_prompt_tokens += sequence.num_computed
            self.num_base_cached_prompt_tokens += sequence.write_start
        sequence.request.is_queued = False
        return True

    def _copy_prompt_end(self, sequence: Sequence) -> None:
        """Copy the block that the same prompt ended in before: only its last token is left.

        Not for a side network with a cache of its own, which would have to compute it anyway.
        """
        first = (sequence.num_prompt_tokens - 1) // self._block_size
        is_next = sequence.write_start == first * self._block_size
        is_fresh = len(sequence.token_ids) == sequence.num_prompt_tokens
        if not (is_next and is_fresh) or sequence.num_missing_prompt_logprobs:
            return
        for block in self._blocks.find([sequence.prompt_end_key(self._block_size)]):
            self._copies.append((block, sequence.blocks[first]))
            sequence.write_start = sequence.num_prompt_tokens - 1

    def _num_reusable_blocks(self, sequence: Sequence) -> int:
        """Count the full blocks short of the first token whose logits are needed."""
        if not self._limits.prefix_caching:
            return 0
        num_reusable = len(sequence.token_ids) - 1
        if sequence.num_missing_prompt_logprobs:
            num_reusable = sequence.num_prompt_logprobs
        return num_reusable // self._block_size

    def _find_side(self, sequence: Sequence, adapter: SideAdapter, num_reusable: int) -> list[int]:
        """Find published blocks of a side network."""
        return self._side_blocks.find(
            side_key(adapter.root_key, sequence.block_key(i, self._block_size))
            for i in range(num_reusable)
        )

    def _add_side(
        self, sequence: Sequence, adapter: SideAdapter, scale: float, found: list[int]
    ) -> bool:
        """Let a side network read a sequence that is being admitted, if there is room for it."""
        num_blocks = -(-sequence.num_reserved_tokens // self._block_size)
        adapters = (other.adapter for other in self.running)
        num_spare = sum(other is not None and other.side is not None for other in adapters)
        if not self._side_blocks.has_room(found, num_blocks, num_spare=num_spare):
            return False
        blocks = self._side_blocks.take(found, num_blocks)
        start = len(found) * self._block_size
        sequence.sides.append(SideStream(adapter, scale, blocks, start, len(found)))
        return True

    def _add_tracks(self, sequence: Sequence) -> None:
        """Let the side networks of held siblings read along, but those that know the prompt.

        A sibling whose side network finds no room computes the prompt again.
        """
        num_shared = (sequence.num_prompt_tokens - 1) // self._block_size
        seen = {sequence.adapter.root_key} if sequence.adapter else set()
        for other in _held_by(sequence):
            adapter = other.adapter
            if adapter is None or adapter.side is None:
                continue
            if adapter.root_key not in seen:
                seen.add(adapter.root_key)
                found = self._find_side(sequence, adapter, num_shared)
                if len(found) < num_shared:
                    self._add_side(sequence, adapter, 0.0, found)

    def _take_chunk(self, sequence: Sequence, budget: int, num_prompt_logits: int) -> Chunk | None:
        """Cut the next chunk of a prefilling sequence; None when no prompt logits are left."""
        start = sequence.num_computed
        end = min(len(sequence.token_ids), start + budget)
        num_wanted = 0
        if sequence.num_missing_prompt_logprobs:
            first = max(start, sequence.num_prompt_logprobs)
            end = min(end, first + num_prompt_logits)
            if end <= start:
                return None
            num_wanted = max(0, min(end, sequence.num_prompt_tokens - 1) - first)
        is_last = end == len(sequence.token_ids)
        return Chunk(sequence, start, end - start, num_wanted + is_last, num_wanted, is_last)

    def _publish(self, sequence: Sequence, num_full: int) -> None:
        if self._limits.prefix_caching:
            for i in range(sequence.num_published, num_full):
                self._blocks.publish(sequence.blocks[i], sequence.block_key(i, self._block_size))
        sequence.num_published = num_full

    def _publish_prompt_end(self, sequence: Sequence) -> None:
        """Make the block that a prompt ends in findable for the same prompt."""
        first, num_tokens = divmod(sequence.num_prompt_tokens, self._block_size)
        if num_tokens > 1 and self._limits.prefix_caching and first == sequence.num_published:
            self._blocks.publish(sequence.blocks[first], sequence.prompt_end_key(self._block_size))

    def _commit_sides(self, sequence: Sequence, num_full: int) -> None:
        """Publish full side blocks; those who read along for siblings leave with the prompt."""
        for side in sequence.sides:
            if num_full > side.num_published:
                self._publish_side(sequence, side, num_full)
        if sequence.num_computed >= sequence.num_prompt_tokens:
            while self._drop_track(sequence):
                pass

    def _publish_side(self, sequence: Sequence, side: SideStream, num_full: int) -> None:
        if self._limits.prefix_caching:
            for i in range(side.num_published, num_full):
                key = side_key(side.adapter.root_key, sequence.block_key(i, self._block_size))
                self._side_blocks.publish(side.blocks[i], key)
        side.num_published = num_full
