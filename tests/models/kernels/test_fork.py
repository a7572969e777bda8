"""Forks: the last layers once more, on the base's keys and values."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from models.batch import ForkBatch, PackedBatch
from models.decoder import Decoder, KernelChoice
from models.fork import AttachedFork, Delta, ForkNetwork, forked_linears
from models.kv_cache import KVCache
from models.spec import DecoderSpec, SpecError
from models.weights import LowRank, Weight, dense
from tests.models.kernels.random_decoders import KINDS, make_decoder_parts

PROMPT = [(7 * i + 3) % 97 for i in range(21)]


def make_fork(
    spec: DecoderSpec, num_layers: int, *, rank: int = 3, seed: int = 0, size: float = 0.3
) -> ForkNetwork:
    """Return a fork whose differences are about as large as the weights."""
    generator = torch.Generator().manual_seed(seed)

    def random(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * size * columns**-0.5

    deltas = {
        name: Delta(right=random(rank, shape[1]), left=random(shape[0], rank) * rank**0.5)
        for name, shape in forked_linears(spec, num_layers)
    }
    return ForkNetwork(num_layers=num_layers, deltas=deltas)


@dataclass
class Row:
    """A sequence of a step: what is new of it, and what stands in for the base in its outputs."""

    tokens: Sequence[int]
    start: int = 0
    block: int = 0
    fork: AttachedFork | None = None
    scale: float = 1.0
    num_outputs: int = 1


def run(decoder: Decoder, cache: KVCache, rows: Sequence[Row]) -> Tensor:
    """Compute a step; each sequence has two blocks of its own."""
    starts, outputs, forks = [0], [], []
    for b, row in enumerate(rows):
        starts.append(starts[-1] + len(row.tokens))
        for i in range(row.num_outputs, 0, -1):
            if row.fork is not None:
                forks.append((row.fork, len(outputs), b, row.scale))
            outputs.append(starts[-1] - i)
    positions = [p for row in rows for p in range(row.start, row.start + len(row.tokens))]

    def ints(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    batch = PackedBatch(
        token_ids=ints([t for row in rows for t in row.tokens]),
        positions=ints(positions),
        query_starts=ints(starts),
        context_lens=ints([row.start + len(row.tokens) for row in rows]),
        block_tables=ints([[2 * row.block, 2 * row.block + 1] for row in rows]),  # type: ignore[arg-type]
        output_rows=ints(outputs),
        forks=ForkBatch(
            networks=tuple(fork for fork, *_ in forks),
            outputs=ints([o for _, o, _, _ in forks]),
            sequences=ints([b for *_, b, _ in forks]),
            scales=torch.tensor([scale for *_, scale in forks]),
        )
        if forks
        else None,
    )  # fmt: skip
    return decoder.forward(batch, cache)


def merged(weights: dict[str, Weight], network: ForkNetwork) -> dict[str, Weight]:
    """Return weights with a fork's differences added to them."""
    changed = dict(weights)
    for name, delta in network.deltas.items():
        changed[f"{name}.weight"] = dense(weights[f"{name}.weight"]) + delta.left @ delta.right
    return changed


@pytest.mark.parametrize("kind", KINDS)
def test_a_fork_is_the_last_layers_with_merged_weights(kind: str) -> None:
    spec, weights = make_decoder_parts(kind)
    network = make_fork(spec, 1)
    base = Decoder(spec, weights, kernels="reference", head="dense")
    # Only q, o and the MLP of the last layer differ, so its keys and values are the base's.
    whole = Decoder(spec, merged(weights, network), kernels="reference", head="dense")
    found = run(base, base.make_cache(num_blocks=2), [Row(PROMPT, fork=base.attach(network))])
    wanted = run(whole, whole.make_cache(num_blocks=2), [Row(PROMPT)])
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", ["whole", "pruned", "quantized"])
@pytest.mark.parametrize("kind", KINDS)
def test_native_forks_are_those_of_the_reference(
    kind: str, form: str, native: KernelChoice
) -> None:
    spec, weights = make_decoder_parts(
        kind, is_pruned=form == "pruned", is_quantized=form == "quantized"
    )
    layers = len(spec.layers)
    networks = [make_fork(spec, 1, seed=1), make_fork(spec, layers, rank=17, seed=2)]
    results = []
    for choice in ("reference", native):
        decoder = Decoder(spec, weights, kernels=choice, head="dense", num_threads=2)
        cache = decoder.make_cache(num_blocks=10, dtype=torch.float32)
        one, all_layers = (decoder.attach(network) for network in networks)
        steps = [
            [Row(PROMPT), Row(PROMPT[:5], block=1, fork=one, num_outputs=3)],
            [
                Row([4], start=21), Row([5, 6], start=5, block=1, fork=all_layers),
                Row(PROMPT[:9], block=2, fork=one, scale=0.25),
            ],
            [
                Row([9], start=22, fork=all_layers), Row([7], start=7, block=1, fork=one),
                Row([2], start=9, block=2),
            ],
            [Row([3], start=23, fork=one, scale=0.5)],
        ]  # fmt: skip
        results.append([run(decoder, cache, rows) for rows in steps])
    for wanted, found in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, atol=2e-3, rtol=2e-3)


def test_a_fork_of_no_difference_and_one_of_no_weight_are_the_base(kernels: KernelChoice) -> None:
    spec, weights = make_decoder_parts("llama", is_quantized=True)
    decoder = Decoder(spec, weights, kernels=kernels)
    base = run(decoder, decoder.make_cache(num_blocks=2), [Row(PROMPT)])
    none, some = make_fork(spec, 2, size=0.0), make_fork(spec, 2)
    for network, scale in ((none, 1.0), (some, 0.0)):
        row = Row(PROMPT, fork=decoder.attach(network), scale=scale)
        found = run(decoder, decoder.make_cache(num_blocks=2), [row])
        torch.testing.assert_close(found, base, atol=1e-5, rtol=0)
    changed = run(
        decoder, decoder.make_cache(num_blocks=2), [Row(PROMPT, fork=decoder.attach(some))]
    )
    assert (changed - base).abs().max() > 0.1


def test_forks_leave_cache_and_other_rows_as_they_are(kernels: KernelChoice) -> None:
    spec, weights = make_decoder_parts("qwen3", is_quantized=True)
    decoder = Decoder(spec, weights, kernels=kernels)
    fork = decoder.attach(make_fork(spec, len(spec.layers)))
    results, caches = [], []
    for chosen in (None, fork):
        cache = decoder.make_cache(num_blocks=4)
        run(decoder, cache, [Row(PROMPT, fork=chosen), Row(PROMPT[:7], block=1)])
        rows = [Row([8], start=21, fork=chosen), Row([9], start=7, block=1)]
        results.append(run(decoder, cache, rows)[1])
        caches.append([*cache.keys, *cache.values])
    assert torch.equal(*results)
    assert all(map(torch.equal, *caches))


def test_forks_read_keys_of_8_bits(kernels: KernelChoice) -> None:
    spec, weights = make_decoder_parts("llama")
    decoder = Decoder(spec, weights, kernels=kernels, head="dense")
    fork = decoder.attach(make_fork(spec, 2))
    logits = [
        run(decoder, decoder.make_cache(num_blocks=2, dtype=dtype), [Row(PROMPT, fork=fork)])
        for dtype in (torch.float32, torch.int8)
    ]
    assert not torch.equal(*logits)
    torch.testing.assert_close(logits[1], logits[0], atol=0.1, rtol=0.05)


def test_native_rows_have_the_same_bits_alone_and_together(native: KernelChoice) -> None:
    spec, weights = make_decoder_parts("llama", is_quantized=True)
    decoder = Decoder(spec, weights, kernels=native)
    one, two = (decoder.attach(make_fork(spec, n, seed=n)) for n in (1, 2))
    rows = [Row(PROMPT, fork=one), Row(PROMPT[3:], block=1, fork=two, scale=0.5)]
    together = run(decoder, decoder.make_cache(num_blocks=4), rows)
    for i, row in enumerate(rows):
        alone = run(decoder, decoder.make_cache(num_blocks=4), [row])
        assert torch.equal(alone[0], together[i])


def test_a_fork_serves_any_prompt_in_the_cache(native: KernelChoice) -> None:
    spec, weights = make_decoder_parts("llama", is_quantized=True)
    decoder = Decoder(spec, weights, kernels=native)
    fork = decoder.attach(make_fork(spec, 2))
    cache = decoder.make_cache(num_blocks=2)
    fresh = run(decoder, cache, [Row(PROMPT, fork=fork)])
    cache = decoder.make_cache(num_blocks=2)
    run(decoder, cache, [Row(PROMPT[:-1])])
    cached = run(decoder, cache, [Row(PROMPT[-1:], start=len(PROMPT) - 1, fork=fork)])
    assert torch.equal(fresh, cached)


def test_what_does_not_fit_is_named(kernels: KernelChoice) -> None:
    spec, weights = make_decoder_parts("llama")
    decoder = Decoder(spec, weights, kernels=kernels)
    network, last = make_fork(spec, 1), len(spec.layers) - 1
    delta = network.deltas[f"layers.{last}.q"]
    narrow = replace(delta, right=delta.right[:, :-1])
    with pytest.raises(SpecError, match=f"layers.{last}.q: .*expected"):
        decoder.attach(replace(network, deltas={f"layers.{last}.q": narrow}))
    with pytest.raises(SpecError, match="layers.0.q: not a linear of the last 1 layers"):
        decoder.attach(replace(network, deltas={"layers.0.q": delta}))
    with pytest.raises(SpecError, match=f"num_layers must be 1 .. {last + 1}, got 99"):
        decoder.attach(replace(network, num_layers=99))
    shape = weights[f"layers.{last}.q.weight"].shape
    weights[f"layers.{last}.q.weight"] = LowRank(
        left=torch.ones(shape[0], 2), right=torch.ones(2, shape[1])
    )
    factored = Decoder(spec, weights, kernels=kernels)
    with pytest.raises(
        SpecError, match=f"layers.{last}.q: two factors here, which cannot be forked"
    ):
        factored.attach(network)
