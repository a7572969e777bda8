"""`proa generate`: continue one prompt in this process."""

import argparse
import json
import os
import sys
from typing import Any

from client.api import ApiClient
from client.errors import RequestError
from client.in_process import ADDRESS, AsgiTransport
from serve.cli.arguments import (
    UserError,
    add_options,
    add_request_arguments,
    given_options,
    request_fields,
    say,
)
from serve.config import OPTIONS, build_config
from serve.event_loop import run_on_loop
from serve.model_options import MODEL_OPTIONS

DESCRIPTION = """\
Continue a prompt in this process, without a server. The text goes to the standard output as it is
written. Without PROMPT the prompt is read from the standard input.
"""

EXAMPLES = """\
examples:
  proa generate "def fibonacci(n):" --decoding adapt --seed 1
  proa generate --chat "Explain recursion in one sentence." --temperature 0
  proa generate "Once upon a time" --adapter poet=./my-adapter --adapter-scale 0.5
  proa generate "Once upon a time" --variant small=./small
  cat prompt.txt | proa generate --model ./Llama-3.2-1B --max-tokens 200 --json
"""

ENGINE_OPTIONS = {
    name: declared.as_flag()
    for name, declared in OPTIONS.items()
    if name in MODEL_OPTIONS or name == "kv"
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.usage = "proa generate [PROMPT] [options]"
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="text to continue")
    parser.add_argument(
        "--chat",
        action="store_true",
        help="the prompt is a message: use the model's chat template",
    )
    parser.add_argument("--system", metavar="TEXT", help="system prompt; with --chat")
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object: text, finish_reason, usage and the decoding trace",
    )
    parser.add_argument(
        "--adapter", metavar="NAME=DIR", help="attach this adapter to the model and use it"
    )
    parser.add_argument(
        "--variant",
        metavar="NAME=DIR",
        help="load this pruned variant of the model and use it, or what --adapter puts on it",
    )
    add_request_arguments(parser, max_tokens=256)
    add_options(parser, ENGINE_OPTIONS)


def run(arguments: argparse.Namespace) -> int:
    """Generate and print.

    Returns:
        0.

    Raises:
        UserError: no prompt, or a request that the API refuses.
        RequestError: the generation failed.
    """
    if arguments.system is not None and not arguments.chat:
        raise UserError("--system: only a chat has a system prompt; add --chat")
    fields = request_fields(arguments)
    prompt = arguments.prompt
    if prompt is None:
        if sys.stdin.isatty():
            say("reading the prompt from the terminal; Ctrl-D ends it")
        prompt = sys.stdin.read()
    if not prompt:
        raise UserError("PROMPT: the prompt is empty")
    given = {**given_options(arguments, ENGINE_OPTIONS), "max_running_sequences": "1"}
    # What a server would attach by its environment is not asked for here.
    for name in ("adapter", "variant"):
        text = getattr(arguments, name)
        given[name] = [] if text is None else [text]
    config = build_config(given, environ=os.environ)
    # Loads torch, which takes seconds: wrong arguments are refused first.
    from serve.server import build_service, close_service

    async def generate() -> None:
        service = build_service(config, report=_say_nothing if arguments.json else say)
        try:
            model = (service.model_id, *service.adapters)[-1]
            path, body = _request(prompt, arguments, model)
            client = ApiClient(ADDRESS, transport=AsgiTransport(service.app))
            key = next(iter(service.config.api_key), "")
            chunks = client.stream(path, {**body, **fields, "stream": True}, key=key)
            await _print_answer(chunks, is_json=arguments.json)
        except RequestError as error:
            if error.status is not None and 400 <= error.status < 500:
                raise UserError(str(error)) from None
            raise
        finally:
            await close_service(service)

    run_on_loop(generate())
    return 0


def _say_nothing(message: str) -> None:
    """Take a progress message and drop it: JSON output is for programs."""


def _request(prompt: str, arguments: argparse.Namespace, model: str) -> tuple[str, dict[str, Any]]:
    body: dict[str, Any] = {"model": model}
    if arguments.json:
        body |= {"stream_options": {"include_usage": True}, "return_decoding_trace": True}
    if not arguments.chat:
        return "/v1/completions", {**body, "prompt": prompt}
    messages = [{"role": "user", "content": prompt}]
    if arguments.system:
        messages.insert(0, {"role": "system", "content": arguments.system})
    return "/v1/chat/completions", {**body, "messages": messages}


async def _print_answer(chunks: Any, *, is_json: bool) -> None:
    pieces: list[str] = []
    trace: list[Any] = []
    finish_reason = usage = None
    async for chunk in chunks:
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"]:
            piece = choice["text"] if "text" in choice else choice["delta"].get("content")
            pieces.append(piece or "")
            trace += choice.get("decoding_trace") or []
            finish_reason = choice["finish_reason"] or finish_reason
            if not is_json:
                print(piece or "", end="", flush=True)
    if is_json:
        answer = {
            "text": "".join(pieces),
            "finish_reason": finish_reason,
            "usage": usage,
            "decoding_trace": trace,
        }
        print(json.dumps(answer))
    else:
        print()
