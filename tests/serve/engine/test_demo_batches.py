"""The demo model in the engine: a batch gives each request the tokens it gets alone."""

import pytest
import torch

from decoding import Sampler, build_token_tables, parse_strategy
from models.checkpoints import load_checkpoint
from models.decoder import Decoder
from serve.engine.engine import Engine
from serve.engine.limits import EngineLimits
from serve.engine.sequence import LiveRequest
from tests.serve.engine.engine_client import branch, make_live
from text.tokenizer import Tokenizer

pytestmark = pytest.mark.model

PROMPTS = (
    "def quicksort(items):\n    if len(items) < 2:\n",
    "The capital of France is",
    "Once upon a time there was a sailor who",
    "def quicksort(items):\n    if len(items) < 2:\n        return items\n    pivot =",
)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_demo_model_samples_the_same_tokens_alone_and_in_a_batch(quantization: str) -> None:
    checkpoint = load_checkpoint(None, quantization=quantization, report=print)
    tokenizer = Tokenizer.from_folder(checkpoint.folder)
    sampler = Sampler(build_token_tables(tokenizer.token_bytes()))
    decoder = Decoder(checkpoint.spec, checkpoint.weights, head="dense")

    def make_requests() -> list[LiveRequest]:
        strategies = ({"strategy": "fixed"}, {"strategy": "adapt", "a": 1.2, "b": 0.4})
        return [
            make_live(
                tokenizer.encode(prompt),
                branch(
                    temperature=1.0, top_p=0.95, seed=i, max_tokens=24,
                    strategy=parse_strategy(strategies[i % 2]),
                ),
            )
            for i, prompt in enumerate(PROMPTS)
        ]  # fmt: skip

    def run(requests: list[LiveRequest], max_batch_tokens: int) -> list[list[int]]:
        limits = EngineLimits(
            num_cache_blocks=64, max_batch_tokens=max_batch_tokens, max_running_sequences=8,
            cache_dtype=torch.float32,
        )  # fmt: skip
        engine = Engine(decoder, sampler, limits, eos_token_ids=tokenizer.eos_token_ids)
        for request in requests:
            engine.add(request)
        sequences = [request.sequences[0] for request in requests]
        while engine.has_work:
            engine.step()
        return [list(sequence.token_ids) for sequence in sequences]

    alone = [run([request], 512)[0] for request in make_requests()]
    assert run(make_requests(), 512) == alone
    assert run(make_requests(), 8) == alone
    assert len({tuple(ids) for ids in alone}) == len(PROMPTS)
