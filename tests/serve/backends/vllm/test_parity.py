"""What the native backend gives, vLLM gives: the same tokens, temperatures and refusals."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from decoding import STRATEGIES, SamplingParams, parse_strategy
from decoding.options import ParameterError
from models.checkpoints import load_checkpoint
from serve.backends.protocol import AdapterNotFoundError
from serve.requests import Arm, GenerationRequest
from tests.serve.backends.backend_client import ask, make_arm
from tests.serve.backends.vllm.comparison import first_divergence
from tests.serve.backends.vllm.conftest import (
    Pair,
    load,
    on,
    open_pair,
    save_factored,
    save_model,
    save_pruned,
    save_side,
    save_warm,
)

pytestmark = pytest.mark.vllm
PROMPT = [1 + i * i % 97 for i in range(40)]
NEEDS_MORE = {"learned", "look_ahead"}
STRATEGY_FIELDS: dict[str, dict[str, Any]] = {
    "adapt": {"a": 1.3, "b": 0.5}, "mirostat2": {"tau": 3.0}, "dry": {"multiplier": 0.8},
    "xtc": {"probability": 0.5, "threshold": 0.05},
}  # fmt: skip
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "plain": {"temperature": 1.0},
    "filtered": {"temperature": 0.9, "top_p": 0.8, "top_k": 20, "min_p": 0.02},
    "typical": {"temperature": 1.0, "typical_p": 0.7},
    "penalised": {"temperature": 0.7, "repetition_penalty": 1.2, "frequency_penalty": 0.3},
    "biased": {"temperature": 0.0, "logit_bias": {7: 100.0}},
}


def arm(adapter: str | None = None, scale: float = 1.0, count: int = 1, **fields: Any) -> Arm:
    made = make_arm(adapter, scale, max_tokens=12, logprobs=5, **fields)
    return replace(made, num_sequences=count)


def several(*arms: Arm, prompt: list[int] = PROMPT, **fields: Any) -> GenerationRequest:
    return ask(prompt=prompt, arms=arms, is_traced=True, **fields)


def assert_same(pair: Pair, request: GenerationRequest) -> None:
    native, other = pair.ask(request)
    assert native
    assert first_divergence(native, other) is None


class TestDecoding:
    """Over one model."""

    @pytest.fixture(scope="class")
    @classmethod
    def pair(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
        folder = save_model(tmp_path_factory.mktemp("m") / "tiny", "llama")
        root, base = tmp_path_factory.mktemp("a"), load(folder)
        classes = {"task": "sequence_classification", "num_labels": 3}
        adapters = {
            "one": save_side(root / "one", base), "warm": save_warm(root / "warm", base),
            "judge": save_side(root / "judge", base, seed=3, **classes),
        }  # fmt: skip
        with open_pair(
            model=str(folder), quantization="none",
            adapter=tuple(f"{name}={path}" for name, path in adapters.items()),
            max_running_sequences=8, max_batch_tokens=48,
        ) as pair:  # fmt: skip
            yield pair

    @pytest.mark.parametrize("fields", SAMPLINGS.values(), ids=SAMPLINGS)
    def test_tokens_are_the_same_for_the_same_seed(
        self, fields: dict[str, Any], pair: Pair
    ) -> None:
        assert_same(pair, several(arm(**fields), arm("one", **fields), arm(count=2, **fields)))

    @pytest.mark.parametrize("name", sorted(STRATEGIES.keys() - NEEDS_MORE))
    def test_strategy_gives_the_same_temperatures_and_tokens(self, name: str, pair: Pair) -> None:
        strategy = parse_strategy({"strategy": name, **STRATEGY_FIELDS.get(name, {})})
        fields = {"temperature": 1.0, "strategy": strategy}
        assert_same(pair, several(arm(**fields), arm("one", seed=9, **fields)))
        assert_same(pair, several(arm(temperature=0.0, strategy=strategy)))

    def test_temperature_head_gives_the_same_temperatures(self, pair: Pair) -> None:
        learned = parse_strategy({"strategy": "learned"})
        assert_same(
            pair, several(arm("warm", strategy=learned), arm("warm", seed=8, strategy=learned))
        )

    def test_classifier_gives_the_same_scores(self, pair: Pair) -> None:
        for prompt in (PROMPT, PROMPT[:3], [1 + i % 251 for i in range(120)]):
            request = ask(
                prompt=prompt, arms=(make_arm("judge", max_tokens=0),), is_classification=True
            )
            (native,), (other,) = pair.ask(request)
            assert (native.finish_reason, other.finish_reason) == ("stop", "stop")
            assert other.class_scores == pytest.approx(native.class_scores, abs=2e-3)

    def test_prompt_longer_than_a_step_is_computed_in_parts(self, pair: Pair) -> None:
        long = [1 + i * i * i % 251 for i in range(150)]
        assert_same(pair, several(arm(temperature=0.8), arm("one"), prompt=long))

    def test_cached_prefix_of_an_adapter_is_its_own(self, pair: Pair) -> None:
        long = [1 + 7 * i % 251 for i in range(100)]
        for adapter in (None, "one", None, "one"):
            assert_same(pair, several(arm(adapter, temperature=0.0), prompt=long))
        outputs = on(pair.vllm, several(arm("one"), prompt=long))
        assert outputs[0].cached_prompt_tokens >= 64

    @pytest.mark.parametrize("scale", [0.0, 0.3, 1.0])
    def test_scale_of_a_side_network_counts(self, scale: float, pair: Pair) -> None:
        assert_same(pair, several(arm("one", scale, temperature=0.0), arm(temperature=0.0)))

    def test_prompt_is_scored_alike(self, pair: Pair) -> None:
        request = ask(prompt=PROMPT, max_tokens=0, prompt_logprobs=2)
        (native,), (other,) = pair.ask(request)
        assert native.prompt_logprobs is not None
        assert other.prompt_logprobs is not None
        for a, b in zip(native.prompt_logprobs[1:], other.prompt_logprobs[1:], strict=True):
            assert a is not None
            assert b is not None
            assert b.logprob == pytest.approx(a.logprob, abs=2e-3)
            assert [value for _, value in b.top] == pytest.approx([v for _, v in a.top], abs=2e-3)

    def test_draws_follow_the_distribution(self, pair: Pair) -> None:
        """Chi-square of 600 first tokens over the likeliest ten and all others; fixed seeds."""
        (scored,) = on(pair.native, ask(prompt=PROMPT, max_tokens=1, temperature=0.0, logprobs=10))
        assert scored.logprob is not None
        expected = {token: 600 * 2.718281828459045**value for token, value in scored.logprob.top}
        counts = dict.fromkeys(expected, 0)
        others = 0
        for seed in range(6):
            request = ask(prompt=PROMPT, max_tokens=1, temperature=1.0, seed=seed,
                          num_sequences=100)  # fmt: skip
            for output in on(pair.vllm, request):
                if output.token_id in counts:
                    counts[output.token_id] += 1
                else:
                    others += 1
        rest = 600 - sum(expected.values())
        statistic = sum((counts[t] - e) ** 2 / e for t, e in expected.items())
        statistic += (others - rest) ** 2 / rest
        assert statistic < 29.6  # 10 degrees of freedom: exceeded once in 1,000 times

    @pytest.mark.parametrize(
        ("fields", "match"),
        [
            ({"strategy": parse_strategy({"strategy": "look_ahead"})}, "vLLM cannot"),
            ({"stop_token_ids": (300,)}, "stop_token_ids has token id 300"),
        ],
        ids=["look ahead", "token of another vocabulary"],
    )
    def test_what_cannot_be_done_is_refused(
        self, fields: dict[str, Any], match: str, pair: Pair
    ) -> None:
        with pytest.raises(ParameterError, match=match):
            on(pair.vllm, ask(prompt=PROMPT, **fields))

    def test_unknown_adapter_is_refused_alike(self, pair: Pair) -> None:
        request = ask(prompt=PROMPT, arms=(make_arm("nobody"),))
        for backend in (pair.native, pair.vllm):
            with pytest.raises(AdapterNotFoundError, match="no adapter is called 'nobody'"):
                on(backend, request)


class TestVariants:
    """A pruned and a factored variant, each in an engine of its own."""

    @pytest.fixture(scope="class")
    @classmethod
    def pair(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
        folder = save_model(tmp_path_factory.mktemp("m") / "tiny", "llama")
        base, root = load(folder), tmp_path_factory.mktemp("a")
        pruned = save_pruned(root / "small", base)
        factored = save_factored(root / "thin", base)
        side = save_side(root / "side", base, on=pruned)
        with open_pair(
            model=str(folder), quantization="none", adapter=(f"side={side}",),
            variant=(f"small={pruned}", f"thin={factored}"),
        ) as pair:  # fmt: skip
            yield pair

    def test_base_variants_and_what_sits_on_them_say_the_same(self, pair: Pair) -> None:
        arms = [arm(name, temperature=0.0) for name in (None, "small", "thin", "side")]
        native, other = pair.ask(several(*arms))
        assert first_divergence(native, other) is None
        texts = {
            tuple(o.token_id for o in other if o.sequence_index == index) for index in range(4)
        }
        assert len(texts) == 4

    def test_they_are_listed_alike(self, pair: Pair) -> None:
        native, other = (
            {info.name: (info.kind, info.on, info.num_parameters, info.removed)
             for info in backend.adapters()}
            for backend in (pair.native, pair.vllm)
        )  # fmt: skip
        assert native == other


FAMILIES = ["mistral", "qwen2", "qwen3", "opt", "phi"]


@pytest.mark.parametrize("family", FAMILIES)
def test_family_with_a_side_network_says_the_same(family: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "tiny", family)
    side = save_side(tmp_path / "side", load(folder))
    with open_pair(model=str(folder), quantization="none", adapter=(f"side={side}",)) as pair:
        assert_same(pair, several(arm(temperature=0.0), arm("side", temperature=0.0), arm(seed=4)))


@pytest.mark.parametrize("size", [1, 2])
def test_nf4_over_one_and_two_ranks_says_the_same(size: int, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "tiny", "llama")
    cache = tmp_path / "cache"
    base = load_checkpoint(str(folder), quantization="nf4", cache_dir=cache)
    side = save_side(tmp_path / "side", base)
    with open_pair(
        model=str(folder), quantization="nf4", cache_dir=str(cache), adapter=(f"side={side}",),
        vllm={"tensor_parallel_size": size, "threads": size},
    ) as pair:  # fmt: skip
        assert_same(pair, several(arm(temperature=0.0), arm("side", temperature=0.0), arm(seed=4)))


@pytest.mark.model
def test_demo_model_with_its_adapter_says_the_same() -> None:
    adapter = Path(__file__).parents[4] / "examples" / "roleplay" / "adapter"
    texts = ("The capital of France is", "def fibonacci(n):\n    ")
    adapt = parse_strategy({"strategy": "adapt", "a": 1.2, "b": 0.4})
    params = SamplingParams(max_tokens=16, seed=1, temperature=0.0, logprobs=5)
    arms = (
        Arm(params=params),
        Arm(params=params, adapter="roleplay"),
        arm(temperature=0.8, strategy=adapt),
    )
    with open_pair(adapter=(f"roleplay={adapter}",), cache_dir=None) as pair:
        for text in texts:
            assert_same(pair, several(*arms, prompt=pair.built.tokenizer.encode(text)))
