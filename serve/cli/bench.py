"""`proa bench`: measure decode and prefill speed, in this process or through HTTP."""

import argparse
import asyncio
import json
import math
import os
import platform
import resource
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any

from client.api import ApiClient
from serve.bench.http import HttpStreams
from serve.bench.measure import Plan, measure, parse_streams, summarise
from serve.bench.streams import BenchmarkError, Decoding, PlanError
from serve.cli.arguments import (
    CommandError,
    UserError,
    add_options,
    given_options,
    parse_decoding,
    say,
)
from serve.config import CAPACITY, OPTIONS, ServeConfig, build_config
from serve.environment import client_settings
from serve.event_loop import run_on_loop
from serve.machine import describe_processor
from serve.model_options import MODEL_OPTIONS
from serve.resolve import TOKENS_PER_SEQUENCE
from serve.version import VERSION
from stats.timings import TimingError

DESCRIPTION = """\
Measure how fast the engine decodes and prefills: in this process, with the scheduling and sampling
of the server, or through HTTP with --url. Prompts are random tokens, another one for each stream
and repeat, so that no cached prefix helps; every stream generates exactly --new-tokens tokens.

decode    tokens/s of all streams together, counted while every stream decodes
prefill   prompt tokens/s until the first token of one prompt alone
TTFT      time from sending a request to its first token
TPOT      mean time per output token after the first

Figures are medians over the repeats. Nothing else should run on the machine meanwhile.
"""

EXAMPLES = """\
examples:
  proa bench --streams 1,8,32 --prompt-tokens 256 --new-tokens 64 --json
  proa bench ./Llama-3.2-1B --streams 4 --threads 8
  proa bench --decoding adapt --streams 8
  proa bench --variant ./small                            beside the model, in turn
  proa bench --url http://127.0.0.1:8000 --streams 8      a running server, through HTTP
"""

DEFAULTS = Plan()
_VARIANT = "variant"
BENCH_OPTIONS = {
    name: declared
    for name, declared in OPTIONS.items()
    if declared.group == CAPACITY or name in MODEL_OPTIONS or name == "kv"
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.usage = "proa bench [MODEL] [options]"
    group = parser.add_argument_group("What is measured")
    group.add_argument(
        "--streams",
        type=parse_streams,
        default=DEFAULTS.streams,
        metavar="N,N,...",
        help="numbers of streams that run at once [default: "
        f"{','.join(map(str, DEFAULTS.streams))}]",
    )
    for name, least, text in (
        ("prompt_tokens", 1, "tokens of each prompt"),
        ("new_tokens", 2, "tokens that each stream generates"),
        ("repeats", 1, "times that everything is measured"),
    ):
        group.add_argument(
            "--" + name.replace("_", "-"),
            type=_at_least(least),
            default=getattr(DEFAULTS, name),
            metavar="N",
            help=f"{text} [default: {getattr(DEFAULTS, name)}]",
        )
    group.add_argument(
        "--decoding",
        metavar="NAME|JSON",
        help="decoding strategy: a name (fixed, adapt, ...) or an object with its parameters",
    )
    group.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help="0 always takes the most likely token [default: 0; 1 with --decoding]",
    )
    group.add_argument(
        "--variant", metavar="DIR", help="measure this pruned variant of the model beside it"
    )
    group.add_argument("--json", action="store_true", help="end with one line of JSON, no table")
    remote = parser.add_argument_group("A running server")
    remote.add_argument(
        "--url",
        metavar="URL",
        help="measure the server at this address through streamed HTTP completions; MODEL is then "
        "a model id [default: the first that it serves]",
    )
    remote.add_argument("--api-key", metavar="KEY", help="its API key [env: PROA_API_KEY]")
    add_options(parser, BENCH_OPTIONS)


def run(arguments: argparse.Namespace) -> int:
    """Measure and print.

    Returns:
        0.

    Raises:
        UserError: options contradict each other or do not suit the model.
        CommandError: a stream failed.
        RequestError: the server cannot be reached, or refuses.
    """
    plan = Plan(**{name: getattr(arguments, name) for name in asdict(DEFAULTS) if name != "seed"})
    decoding = _decoding(arguments)
    try:
        figures = _measure(arguments, plan, decoding)
    except PlanError as error:
        raise UserError(str(error)) from error
    except (BenchmarkError, TimingError) as error:
        raise CommandError(str(error)) from error
    figures |= {
        "versions": {
            "proa": VERSION,
            "python": platform.python_version(),
            "torch": version("torch"),
        },
        "cpu": describe_processor(),
        "command": describe_command(["proa", *sys.argv[1:]]),
    }
    figures["config"] |= asdict(plan) | decoding.request_fields()
    if not arguments.json:
        print(table(figures))
    else:
        print(json.dumps(figures))
    return 0


def _measure(arguments: argparse.Namespace, plan: Plan, decoding: Decoding) -> dict[str, Any]:
    given = given_options(arguments, BENCH_OPTIONS)
    if arguments.url is None:
        if arguments.api_key is not None:
            raise UserError("--api-key: only a server wants one; add --url")
        return _run_engine(plan, decoding, given, arguments.variant)
    if arguments.variant is not None:
        raise UserError("--variant: is for an engine in this process; the server has its own")
    model = given.pop("model", None)
    if given:
        raise UserError(
            f"{BENCH_OPTIONS[next(iter(given))].flag}: is for an engine in this process; the "
            "server at --url has its own"
        )
    try:
        client = ApiClient(arguments.url)
    except ValueError as error:
        raise UserError(f"--url: {error}") from None
    key = arguments.api_key or client_settings(os.environ)[1] or ""
    return asyncio.run(
        _run_server(client, HttpStreams(client, decoding, model=model, key=key), plan)
    )


def describe_command(words: Sequence[str]) -> str:
    """Return a command line without the key that may be in it: results are kept and shown."""
    shown: list[str] = []
    for word in words:
        if shown and shown[-1] == "--api-key":
            word = "KEY"
        shown.append("--api-key=KEY" if word.startswith("--api-key=") else word)
    return shlex.join(shown)


def table(figures: dict[str, Any]) -> str:
    """Lay the figures out for reading."""
    config, memory = figures["config"], figures["max_rss_mb"]
    lines = [
        f"{figures['model']} on {figures['cpu']}, kernels {figures['kernels'] or 'of the server'}",
        f"prompts of {config['prompt_tokens']} tokens, {config['new_tokens']} new ones, medians of "
        f"{config['repeats']} repeats (smallest - largest)",
        "",
        *_table_of(figures),
    ]
    if "variant" in figures:
        lines += ["", f"the variant {figures['variant']['folder']}"]
        lines += _table_of(figures["variant"], base=figures)
    resident = "unknown" if memory is None else f"{memory:.0f} MB"
    return "\n".join([*lines, f"resident memory {resident}"])


def _table_of(figures: dict[str, Any], base: dict[str, Any] | None = None) -> list[str]:
    """Lay out what one model does; beside a base also how many times as fast it decodes."""
    head = f"{'streams':>7}  {'decode tokens/s':>24}  {'TTFT ms (p90)':>20}  {'TPOT ms (p90)':>18}"
    lines = [head if base is None else f"{head}  {'of the base':>11}"]
    for streams, decode in figures["decode_tokens_per_s"].items():
        low, high = figures["spread"]["decode_tokens_per_s"][streams]
        ttft, tpot = figures["ttft_ms"][streams], figures["tpot_ms"][streams]
        speed = f"{decode:.1f} ({low:.1f} - {high:.1f})"
        first = f"{ttft['median']:.0f} ({ttft['p90']:.0f})"
        each = f"{tpot['median']:.2f} ({tpot['p90']:.2f})"
        line = f"{streams:>7}  {speed:>24}  {first:>20}  {each:>18}"
        if base is not None:
            line += f"  {decode / base['decode_tokens_per_s'][streams]:>10.2f}x"
        lines.append(line)
    low, high = figures["spread"]["prefill_tokens_per_s"]
    prefill = f"prefill {figures['prefill_tokens_per_s']:.1f} tokens/s ({low:.1f} - {high:.1f})"
    return [*lines, prefill]


def _run_engine(
    plan: Plan, decoding: Decoding, given: dict[str, Any], variant: str | None
) -> dict[str, Any]:
    # What a server would attach by its environment is not measured here.
    given |= {"adapter": [], "variant": [] if variant is None else [f"{_VARIANT}={variant}"]}
    config = fit_cache(build_config(given, environ=os.environ), plan)
    # Loads torch, which takes seconds: wrong arguments are refused first.
    from serve.bench.engine import EngineStreams, stream_params
    from serve.server import ServerError, build_service, close_service

    stream_params(decoding, num_tokens=plan.new_tokens, seed=0)

    async def run_engine() -> dict[str, Any]:
        try:
            service = build_service(config, report=say)
        except ServerError as error:
            raise UserError(str(error)) from None
        try:
            longest = service.backend.max_context_tokens
            asked = plan.prompt_tokens + plan.new_tokens
            if asked > longest:
                raise UserError(
                    f"--prompt-tokens and --new-tokens: {asked} tokens together are more than the "
                    f"longest context, {longest}"
                )
            measured = await measure(
                {
                    name: EngineStreams(service.backend, decoding, name or None)
                    for name in (("",) if variant is None else ("", _VARIANT))
                },
                plan,
                report=say,
            )
            figures = summarise(measured[""], plan)
            if variant is not None:
                figures["variant"] = {"folder": variant, **summarise(measured[_VARIANT], plan)}
        finally:
            await close_service(service)
        resolved = service.config
        names = ("device", "threads", "quantization", "head", "kv", "max_batch_tokens")
        return figures | {
            "max_rss_mb": _peak_memory_mb(),
            "model": service.model_id,
            "kernels": service.kernels,
            "config": {name: getattr(resolved, name) for name in names},
        }

    return run_on_loop(run_engine())


def fit_cache(config: ServeConfig, plan: Plan) -> ServeConfig:
    """Make room for every stream in an automatic KV cache.

    Raises:
        UserError: the engine does not run so many streams at once.
    """
    most = max(plan.streams)
    if most > config.max_running_sequences:
        raise UserError(
            f"--streams: an engine with --max-running-sequences {config.max_running_sequences} "
            f"does not run {most} streams at once; raise it"
        )
    blocks = -(-(plan.prompt_tokens + plan.new_tokens) // config.block_size) * most
    automatic = TOKENS_PER_SEQUENCE * config.max_running_sequences
    is_small = blocks * config.block_size > automatic
    if config.kv_cache_tokens != "auto" or not is_small:
        return config
    return replace(config, kv_cache_tokens=blocks * config.block_size)


async def _run_server(client: ApiClient, runner: HttpStreams, plan: Plan) -> dict[str, Any]:
    figures = summarise((await measure({"": runner}, plan, report=say))[""], plan)
    resident = await runner.resident_bytes()
    return figures | {
        "max_rss_mb": None if resident is None else round(resident / 1e6, 1),
        "model": await runner.model(),
        "kernels": None,
        "config": {"url": client.url},
    }


def _decoding(arguments: argparse.Namespace) -> Decoding:
    strategy = None if arguments.decoding is None else parse_decoding(arguments.decoding)
    temperature = arguments.temperature
    if temperature is not None and not math.isfinite(temperature):
        raise UserError(f"--temperature: {temperature} is not a finite number")
    if temperature is None and strategy is None:
        temperature = 0.0
    return Decoding(temperature=temperature, strategy=strategy)


def _at_least(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return number

    return parse


def _peak_memory_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e6, 1)
