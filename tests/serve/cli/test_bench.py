"""`proa bench`: its arguments, what it computes from arrival times, and the JSON it prints."""

import asyncio
import json
import re
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import serve.server
from decoding import SamplingParams
from decoding.sampler import Sampler
from decoding.tables import build_token_tables
from models.decoder import Decoder
from models.spec import DecoderSpec, LayerSpec, canonical_weights
from serve.backends.native import NativeBackend
from serve.backends.protocol import GenerationRequest, QueueFullError, TokenOutput
from serve.cli.arguments import CommandError, Parser, UserError
from serve.cli.bench import add_arguments, fit_cache, parse_streams, run
from serve.cli.bench_engine import EngineStreams, stream_params
from serve.cli.bench_http import HttpStreams, Reply
from serve.cli.bench_measure import Plan, latency
from serve.cli.bench_timing import (
    BenchmarkError,
    Decoding,
    StreamTiming,
    decode_rate,
    output_rate,
    prefill_rate,
)
from serve.config import ServeConfig

VOCAB_SIZE = 64
HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def timing(arrivals: Sequence[float], sent: float = 0.0) -> StreamTiming:
    counts = tuple(float(i + 1) for i in range(len(arrivals)))
    return StreamTiming(sent_s=sent, arrivals_s=tuple(arrivals), token_counts=counts)


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
    return NativeBackend(decoder, sampler, eos_token_ids=(0,), num_cache_blocks=16)


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


def test_bench_is_greedy_unless_told_otherwise() -> None:
    params = stream_params(Decoding(), num_tokens=7, seed=1)
    assert params == SamplingParams(temperature=0.0, max_tokens=7, ignore_eos=True, seed=1)


def test_fit_cache_makes_room_for_long_prompts_only() -> None:
    plan = Plan(streams=(2, 64), prompt_tokens=300, new_tokens=10)
    assert fit_cache(ServeConfig(), plan).kv_cache_tokens == 64 * 320
    assert fit_cache(ServeConfig(), Plan()).kv_cache_tokens == "auto"
    assert fit_cache(ServeConfig(kv_cache_tokens=512), plan).kv_cache_tokens == 512


def test_parse_streams_keeps_the_order() -> None:
    assert parse_streams("32,1") == (32, 1)


def test_decode_rate_counts_while_every_stream_decodes() -> None:
    early = timing([1.0, 2.0, 2.5, 3.0, 3.5])
    late = timing([2.0, 2.5, 3.0, 3.5, 4.0])
    assert decode_rate([early, late]) == pytest.approx(4.0)


def test_decode_rate_of_one_stream_leaves_the_first_token_out() -> None:
    assert decode_rate([timing([5.0, 5.5, 6.0])]) == pytest.approx(2.0)


def test_decode_rate_without_a_common_window_counts_from_the_last_first_token() -> None:
    assert decode_rate([timing([1.0, 2.0]), timing([3.0, 4.0])]) == pytest.approx(1.0)


def test_decode_rate_refuses_tokens_that_arrive_at_once() -> None:
    with pytest.raises(BenchmarkError, match="arrived all at once"):
        decode_rate([timing([1.0, 1.0])])


def test_rates_and_latencies_follow_their_definitions() -> None:
    streams = [timing([3.0, 4.0, 6.0], sent=1.0), timing([5.0, 7.0, 9.0], sent=1.0)]
    assert prefill_rate(streams, 10) == pytest.approx(2 * 10 / 4)
    assert output_rate(streams) == pytest.approx(6 / 8)
    assert streams[0].ttft_s == pytest.approx(2.0)
    assert streams[0].tpot_s == pytest.approx(1.5)
    assert timing([1.0]).tpot_s is None


def test_latency_gives_median_and_ninetieth_percentile() -> None:
    assert latency([float(i) for i in range(11)]) == {"median": 5.0, "p90": 9.0}
    assert latency([3.0]) == {"median": 3.0, "p90": 3.0}


def test_timing_refuses_a_stream_without_tokens() -> None:
    with pytest.raises(BenchmarkError, match="ended without a token"):
        timing([])


def chunked(*events: str) -> bytes:
    body = b""
    for event in events:
        data = f"data: {event}\n\n".encode()
        body += f"{len(data):x}\r\n".encode() + data + b"\r\n"
    return body + b"0\r\n\r\n"


def text_chunk(text: str, finish_reason: str | None = None) -> str:
    return json.dumps({"choices": [{"text": text, "finish_reason": finish_reason}]})


def usage_chunk(tokens: int) -> str:
    return json.dumps({"choices": [], "usage": {"completion_tokens": tokens}})


def test_reply_timing_spreads_the_usage_over_the_text() -> None:
    data = HEAD + chunked(text_chunk("a"), text_chunk("bc", "length"), usage_chunk(4), "[DONE]")
    cut = data.index(b'"bc"') + 2
    reply = Reply(sent_s=1.0, pieces=[(2.0, data[:cut]), (3.0, data[cut:])])
    assert reply.timing(4) == StreamTiming(
        sent_s=1.0, arrivals_s=(2.0, 3.0), token_counts=(2.0, 4.0)
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"SSH-2.0-x\r\n", "does not answer in HTTP"),
        (b"", "closed the connection"),
        (HEAD + b"5\r\nda", "closed the connection"),
        (b"HTTP/1.1 503 No\r\nContent-Length: 4\r\n\r\nfull", "answered 503: full"),
        (HEAD + chunked(text_chunk("a"), usage_chunk(1)), "reports 1 tokens of 2"),
        (HEAD + chunked(text_chunk("a")), "reports None tokens of 2"),
        (HEAD + chunked('{"error": {"message": "gone"}}'), "reported an error: .*gone"),
    ],
    ids=["no-http", "nothing", "cut", "status", "usage", "no-usage", "error"],
)
def test_reply_timing_refuses_what_is_no_whole_answer(data: bytes, message: str) -> None:
    pieces = [(1.0, data)] if data else []
    with pytest.raises(BenchmarkError, match=message):
        Reply(sent_s=0.0, pieces=pieces).timing(2)


def test_http_streams_send_each_prompt_and_read_the_usage() -> None:
    requests: list[tuple[bytes, dict[str, object]]] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
        content = await reader.readexactly(length)
        requests.append((head, json.loads(content or b"{}")))
        line = head.split(b"\r\n")[0]
        if b"/v1/models" in line:
            body, kind = json.dumps({"data": [{"id": "m"}]}), "length"
        elif b"/tokenize" in line:
            body, kind = json.dumps({"tokens": [3, 4, 5]}), "length"
        else:
            body, kind = "", "chunked"
        if kind == "chunked":
            writer.write(HEAD + chunked(text_chunk("a"), text_chunk("b"), usage_chunk(2)))
        else:
            writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        writer.close()

    async def scenario() -> list[StreamTiming]:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        decoding = Decoding(temperature=None, strategy={"strategy": "adapt"})
        url = f"http://127.0.0.1:{port}/v1/"
        runner = HttpStreams(url, decoding, model=None, api_key="secret")
        assert list(await runner.token_pool()) == [3, 4, 5]
        async with server:
            return await runner.run([[3], [4, 5]], 2)

    timings = asyncio.run(scenario())
    assert [timing.token_counts[-1] for timing in timings] == [2.0, 2.0]
    heads, bodies = zip(*requests[-2:], strict=True)
    assert sorted(body["prompt"] for body in bodies) == [[3], [4, 5]]
    assert all(body["decoding"] == {"strategy": "adapt"} for body in bodies)
    assert all(body["ignore_eos"] and "temperature" not in body for body in bodies)
    assert all(b"POST /v1/completions " in h and b"Bearer secret" in h for h in heads)


def test_http_streams_report_a_server_that_is_not_there() -> None:
    runner = HttpStreams("http://127.0.0.1:1", Decoding(), model="m", api_key=None)
    with pytest.raises(BenchmarkError, match="cannot talk to http://127.0.0.1:1"):
        asyncio.run(runner.run([[1]], 2))


class ScriptedBackend:
    """Answers every request with the same outputs, or refuses it."""

    vocab_size = VOCAB_SIZE

    def __init__(self, outputs: list[TokenOutput], *, is_full: bool = False) -> None:
        self._outputs = outputs
        self._is_full = is_full

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[list[TokenOutput], None]:
        if self._is_full:
            raise QueueFullError("the queue is full", 1)
        for output in self._outputs:
            yield [output]


@pytest.mark.parametrize(
    ("is_full", "message"),
    [(False, "a stream ended after 1 of 2 tokens"), (True, "the engine refuses a stream")],
    ids=["short", "full"],
)
def test_engine_streams_report_a_stream_that_breaks_off(is_full: bool, message: str) -> None:
    outputs = [
        TokenOutput(sequence_index=0, token_id=1),
        TokenOutput(sequence_index=0, token_id=None, finish_reason="abort"),
    ]
    runner = EngineStreams(ScriptedBackend(outputs, is_full=is_full), Decoding())
    with pytest.raises(CommandError, match=message):
        asyncio.run(runner.run([[1, 2]], 2))
