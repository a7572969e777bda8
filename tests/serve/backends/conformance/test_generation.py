"""What a request gives, whatever runs it."""

import asyncio
from typing import Any

import pytest

from decoding import parse_strategy
from serve.backends.protocol import Backend
from tests.serve.backends.backend_client import ask, collect, ends, run, said

PROMPT = [1 + i * i % 97 for i in range(40)]
ADAPT = parse_strategy({"strategy": "adapt", "a": 1.2, "b": 0.4})
DECODINGS = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 1.0, "seed": 11},
    "filtered": {"temperature": 0.9, "top_p": 0.8, "top_k": 20, "seed": 5},
    "penalised": {"temperature": 0.7, "repetition_penalty": 1.2, "frequency_penalty": 0.3},
    "adaptive": {"temperature": 1.0, "strategy": ADAPT},
}


@pytest.mark.parametrize("fields", DECODINGS.values(), ids=DECODINGS)
def test_request_gives_the_same_again(fields: dict[str, Any], backend: Backend) -> None:
    async def main() -> None:
        first = await collect(backend, ask(prompt=PROMPT, max_tokens=12, **fields))
        again = await collect(backend, ask(prompt=PROMPT, max_tokens=12, **fields))
        assert len(said(first)) == 12
        assert said(first) == said(again)

    run(main())


def test_requests_together_give_what_each_gives_alone(backend: Backend) -> None:
    requests = [
        ask(name, PROMPT[: 7 * i + 3], max_tokens=6 + i, num_sequences=1 + i % 2, **fields)
        for i, (name, fields) in enumerate(DECODINGS.items())
    ]

    async def main() -> None:
        alone = [await collect(backend, request) for request in requests]
        together = await asyncio.gather(*(collect(backend, request) for request in requests))
        for request, ours, expected in zip(requests, together, alone, strict=True):
            for index in range(request.num_sequences):
                assert said(ours, index) == said(expected, index)
            assert ends(ours) == ends(expected)

    run(main())


def test_different_seeds_give_different_texts(backend: Backend) -> None:
    async def main() -> None:
        texts = {
            tuple(said(await collect(backend, ask(prompt=PROMPT, seed=seed)))) for seed in range(4)
        }
        assert len(texts) == 4

    run(main())


def test_sequences_of_an_arm_draw_with_their_own_seeds(backend: Backend) -> None:
    async def main() -> None:
        several = await collect(backend, ask(prompt=PROMPT, num_sequences=3))
        alone = await collect(backend, ask(prompt=PROMPT))
        assert ends(several) == {0: "length", 1: "length", 2: "length"}
        assert said(several, 0) == said(alone)
        assert len({tuple(said(several, index)) for index in range(3)}) == 3

    run(main())


def test_lists_of_outputs_are_never_empty_and_end_with_the_last_sequence(backend: Backend) -> None:
    async def main() -> None:
        steps = [step async for step in backend.generate(ask(num_sequences=2))]
        assert all(steps)
        assert steps[-1][-1].finish_reason is not None

    run(main())


@pytest.mark.parametrize("max_tokens", [0, 1, 9])
def test_sequence_ends_at_max_tokens(max_tokens: int, backend: Backend) -> None:
    async def main() -> None:
        outputs = await collect(backend, ask(prompt=PROMPT, max_tokens=max_tokens))
        assert len(said(outputs)) == max_tokens
        assert ends(outputs) == {0: "length"}

    run(main())


def test_stop_token_is_the_last_and_is_told(backend: Backend) -> None:
    async def main() -> None:
        plain = said(await collect(backend, ask(prompt=PROMPT, max_tokens=10)))
        stop = plain[4]
        outputs = await collect(
            backend, ask(prompt=PROMPT, max_tokens=10, stop_token_ids=(stop,), logprobs=0)
        )
        assert said(outputs) == plain[: plain.index(stop) + 1]
        assert ends(outputs) == {0: "stop"}

    run(main())


def test_end_token_is_held_back_until_min_tokens(backend: Backend) -> None:
    eos = 256
    fields: dict[str, Any] = {"logit_bias": {eos: 100.0}, "ignore_eos": False, "max_tokens": 9}

    async def main() -> None:
        assert said(await collect(backend, ask(prompt=PROMPT, **fields))) == [eos]
        patient = await collect(backend, ask(prompt=PROMPT, min_tokens=4, **fields))
        assert len(said(patient)) == 5
        assert said(patient).index(eos) == 4
        assert ends(patient) == {0: "stop"}
        fields["ignore_eos"] = True
        assert said(await collect(backend, ask(prompt=PROMPT, **fields))) == [eos] * 9

    run(main())


def test_logprobs_are_those_of_the_tokens(backend: Backend) -> None:
    async def main() -> None:
        plain = await collect(backend, ask(prompt=PROMPT, temperature=0.0))
        scored = await collect(backend, ask(prompt=PROMPT, temperature=0.0, logprobs=3))
        assert said(plain) == said(scored)
        assert all(output.logprob is None for output in plain)
        for output in scored:
            assert output.logprob is not None
            token_ids, values = zip(*output.logprob.top, strict=True)
            assert (token_ids[0], values[0]) == (output.token_id, output.logprob.logprob)
            assert list(values) == sorted(values, reverse=True)
            assert len(values) == 3
            assert values[0] < 0

    run(main())


def test_prompt_logprobs_come_once_with_the_first_output(backend: Backend) -> None:
    async def main() -> None:
        request = ask(prompt=PROMPT, prompt_logprobs=2, num_sequences=2)
        outputs = await collect(backend, request)
        (found,) = [o.prompt_logprobs for o in outputs if o.prompt_logprobs is not None]
        first = next(output for output in outputs if output.sequence_index == 0)
        assert first.prompt_logprobs is found
        assert found[0] is None
        assert len(found) == len(PROMPT)
        assert all(one is not None and len(one.top) == 2 for one in found[1:])
        plain = await collect(backend, ask(prompt=PROMPT, num_sequences=2))
        assert [said(outputs, i) for i in (0, 1)] == [said(plain, i) for i in (0, 1)]

    run(main())


@pytest.mark.parametrize("length", [5, 17, 39])
def test_prompt_logprobs_are_those_of_the_same_tokens_generated(
    length: int, backend: Backend
) -> None:
    async def main() -> None:
        request = ask(prompt=PROMPT[:length], temperature=0.0, max_tokens=1, logprobs=1)
        (output,) = await collect(backend, request)
        assert output.token_id is not None
        echo = ask(prompt=[*PROMPT[:length], output.token_id], max_tokens=0, prompt_logprobs=1)
        (scored,) = await collect(backend, echo)
        assert scored.prompt_logprobs is not None
        assert scored.prompt_logprobs[-1] == output.logprob

    run(main())


def test_trace_tells_class_temperature_and_entropy(backend: Backend) -> None:
    async def main() -> None:
        fields: dict[str, Any] = {"prompt": PROMPT, "strategy": ADAPT}
        traced = await collect(backend, ask(is_traced=True, **fields))
        plain = await collect(backend, ask(**fields))
        assert said(traced) == said(plain)
        assert all(output.trace is None for output in plain)
        for output in traced:
            assert output.trace is not None
            assert output.logprob is not None
            assert output.trace.token_class
            assert output.trace.temperature > 0
            assert output.trace.entropy > 0

    run(main())


def test_generated_tokens_are_counted(backend: Backend) -> None:
    async def main() -> None:
        before = backend.stats().generated_tokens
        await collect(backend, ask(prompt=PROMPT, max_tokens=7, num_sequences=2))
        assert backend.stats().generated_tokens == before + 14

    run(main())
