"""`proa bench`: its arguments, what it computes from arrival times, and the JSON it prints."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import serve.server
from decoding.sampler import Sampler
from decoding.tables import build_token_tables
from models.decoder import Decoder
from models.spec import DecoderSpec, LayerSpec, canonical_weights
from serve.backends.native import NativeBackend
from serve.bench.measure import Plan, parse_streams
from serve.cli.arguments import Parser, UserError
from serve.cli.bench import add_arguments, describe_command, fit_cache, run
from serve.config import ServeConfig
from serve.engine.limits import EngineLimits

VOCAB_SIZE = 64


def parse(*words: str):
    parser = Parser(prog="proa bench")
    add_arguments(parser)
    return parser.parse_args(words)


def make_backend() -> NativeBackend:
    layer = LayerSpec(
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, intermediate_size=32
    )
    spec = DecoderSpec(
        family="llama",
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        max_position_embeddings=64,
        layers=(layer, layer),
        norm="rms",
        norm_eps=1e-5,
        activation="silu",
        gated_mlp=True,
        tied_head=True,
    )
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(shape, generator=generator) * 0.1
        for name, shape, is_required in canonical_weights(spec)
        if is_required
    }
    sampler = Sampler(build_token_tables([b"a"] * VOCAB_SIZE))
    decoder = Decoder(spec, weights, kernels="reference", head="dense")
    return NativeBackend(decoder, sampler, EngineLimits(num_cache_blocks=16), eos_token_ids=(0,))


@pytest.fixture
def tiny_service(monkeypatch: pytest.MonkeyPatch) -> list[ServeConfig]:
    """Let `proa bench` build a tiny random model; returns the configurations it asked for."""
    asked: list[ServeConfig] = []

    def build_service(config: ServeConfig, *, report: object) -> SimpleNamespace:
        asked.append(config)
        resolved = replace(config, device="cpu", kernels="reference")
        return SimpleNamespace(
            config=resolved, model_id="tiny", kernels="reference", backend=make_backend()
        )

    monkeypatch.setattr(serve.server, "build_service", build_service)
    return asked


def test_bench_json_has_the_documented_shape(
    tiny_service: list[ServeConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    words = "--streams 1,3 --prompt-tokens 6 --new-tokens 5 --repeats 2 --json"
    assert run(parse(*words.split())) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    per_stream = {"decode_tokens_per_s", "batch_prefill_tokens_per_s", "output_tokens_per_s"}
    for name in per_stream:
        assert list(figures[name]) == ["1", "3"]
        assert all(value > 0 for value in figures[name].values())
    assert set(figures["ttft_ms"]["3"]) == set(figures["tpot_ms"]["1"]) == {"median", "p90"}
    assert len(figures["spread"]["decode_tokens_per_s"]["1"]) == 2
    assert figures["prefill_tokens_per_s"] > 0
    assert figures["max_rss_mb"] > 0
    assert figures["model"] == "tiny"
    assert figures["kernels"] == "reference"
    assert figures["config"]["new_tokens"] == 5
    assert set(figures["versions"]) == {"proa", "python", "torch"}


def test_bench_prints_a_table(
    tiny_service: list[ServeConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    words = "--streams 2 --prompt-tokens 6 --new-tokens 3 --repeats 1 --decoding adapt"
    assert run(parse(*words.split())) == 0
    output = capsys.readouterr().out
    assert output.startswith("tiny on ")
    assert "decode tokens/s" in output


def test_bench_measures_a_variant_beside_its_base(
    tiny_llama_folder: Path,
    write_variant: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = write_variant(tmp_path / "small")
    words = [
        str(tiny_llama_folder), "--quantization", "none", "--cache-dir", str(tmp_path), "--threads",
        "1", "--streams", "1,2", "--prompt-tokens", "6", "--new-tokens", "3", "--repeats", "1",
        "--variant", str(folder),
    ]  # fmt: skip
    assert run(parse(*words, "--json")) == 0
    captured = capsys.readouterr()
    figures = json.loads(captured.out.splitlines()[-1])
    variant = figures["variant"]
    assert variant.pop("folder") == str(folder)
    assert set(variant) <= set(figures)
    assert list(variant["decode_tokens_per_s"]) == ["1", "2"]
    assert variant["decode_tokens_per_s"] != figures["decode_tokens_per_s"]
    assert "proa: variant, repeat 1 of 1: decode tokens/s 1: " in captured.err
    assert run(parse(*words)) == 0
    output = capsys.readouterr().out
    assert f"the variant {folder}" in output
    assert len(re.findall(r"^ +[12] .* \d+\.\d\dx$", output, re.MULTILINE)) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--streams", "8,x"], "'8,x' is not a list of different whole numbers above 0"),
        (["--streams", "0"], "'0' is not a list of different whole numbers above 0"),
        (["--streams", "8,8"], "'8,8' is not a list of different whole numbers above 0"),
        (["--new-tokens", "1"], "'1' is not a whole number of at least 2"),
        (["--prompt-tokens", "0"], "'0' is not a whole number of at least 1"),
        (["--repeats", "many"], "'many' is not a whole number of at least 1"),
    ],
    ids=["no-number", "zero", "twice", "one-token", "no-prompt", "word"],
)
def test_bench_refuses_bad_numbers(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse(*words)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--api-key", "k"], "--api-key: only a server wants one; add --url"),
        (["--url", "http://x", "--threads", "2"], "--threads: is for an engine in this process"),
        (["--url", "http://x", "--variant", "d"], "--variant: is for an engine in this process"),
        (["--url", "ftp://x"], "--url: 'ftp://x' is not an address"),
        (["--url", "http://x:port"], "--url: 'http://x:port' is not an address"),
        (["--temperature", "nan"], "--temperature: nan is not a finite number"),
        (["--streams", "65"], "--streams: an engine with --max-running-sequences 64"),
        (["--decoding", "{"], "--decoding: not a JSON object"),
    ],
    ids=["key", "engine-option", "variant", "scheme", "port", "nan", "streams", "decoding"],
)
def test_bench_refuses_contradictions(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(parse(*words))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--decoding", "warm"], "decoding.strategy must be one of"),
        (["--temperature", "-1"], "temperature"),
        (["--prompt-tokens", "60", "--new-tokens", "5"], "65 tokens together are more than the"),
    ],
    ids=["strategy", "temperature", "context"],
)
def test_bench_refuses_what_the_model_cannot_do(
    words: list[str], message: str, tiny_service: list[ServeConfig]
) -> None:
    with pytest.raises(UserError, match=message):
        run(parse(*words, "--streams", "1"))


@pytest.mark.parametrize("given", [["--api-key", "hush"], ["--api-key=hush"]])
def test_result_names_the_command_without_its_key(given: list[str]) -> None:
    shown = describe_command(["proa", "bench", *given, "--url", "http://a b"])
    assert "hush" not in shown
    assert shown.endswith("--url 'http://a b'")


def test_fit_cache_makes_room_for_long_prompts_only() -> None:
    plan = Plan(streams=(2, 64), prompt_tokens=300, new_tokens=10)
    assert fit_cache(ServeConfig(), plan).kv_cache_tokens == 64 * 320
    assert fit_cache(ServeConfig(), Plan()).kv_cache_tokens == "auto"
    assert fit_cache(ServeConfig(kv_cache_tokens=512), plan).kv_cache_tokens == 512


def test_parse_streams_keeps_the_order() -> None:
    assert parse_streams("32,1") == (32, 1)
