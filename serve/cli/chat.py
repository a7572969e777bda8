"""`proa chat`: a conversation with a running server in the terminal."""

import argparse
import json
import os
import sys
from contextlib import suppress
from typing import Any, TextIO

from client.blocking import BlockingClient
from client.errors import RequestError
from serve.cli.arguments import (
    UserError,
    add_request_arguments,
    explain,
    parse_decoding,
    request_fields,
)
from serve.cli.connection import connect, list_models
from serve.environment import client_settings

DESCRIPTION = """\
Chat with a running server. The answer is shown while it is written; Ctrl-C stops it, on the server
too. Without a terminal (a pipe), every input line is one turn and only answers are printed.
"""

EXAMPLES = """\
commands in the chat:
  /reset             forget the conversation
  /system [TEXT]     set the system prompt, or drop it; forgets the conversation
  /decoding [X]      choose a strategy by name or as JSON; nothing: the server's default
  /model [ID]        choose a model, or list them
  /help, /quit       this list; leave (so does Ctrl-D)
A line that ends in a backslash goes on with the next one.

examples:
  proa chat
  proa chat --decoding '{"strategy": "adapt", "a": 1.0, "b": 0.3, "fences_only": true}'
  proa chat --model smollm2:poet --adapter-scale 0.5
  proa chat --url https://example.org --system "You write Python." --temperature 0.7
  echo "Name three rivers." | proa chat --seed 1
"""

HELP = "\n".join(EXAMPLES.splitlines()[1:6])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.usage = "proa chat [options]"
    url, api_key = client_settings(os.environ)
    group = parser.add_argument_group("Server")
    group.add_argument(
        "--url",
        default=url,
        help="address of the server [default: http://127.0.0.1:8000; env: PROA_URL]",
    )
    group.add_argument(
        "--api-key",
        metavar="TEXT",
        default=api_key,
        help="key of the server [default: none; env: PROA_API_KEY]",
    )
    group.add_argument("--model", metavar="ID", help="model id [default: the first of /v1/models]")
    group = parser.add_argument_group("Conversation")
    group.add_argument("--system", metavar="TEXT", help="system prompt [default: none]")
    group.add_argument(
        "--trace",
        action="store_true",
        help="after each answer, list its tokens with class, temperature, entropy and logprob",
    )
    add_request_arguments(parser, max_tokens=512)


class Conversation:
    """The turns so far and the fields every request carries.

    Args:
        client: the server.
        model: model id.
        fields: request fields: sampling parameters and decoding strategy.
        system: system prompt, or None.
        output: where answers go.
    """

    def __init__(
        self,
        client: BlockingClient,
        *,
        model: str,
        fields: dict[str, Any],
        system: str | None,
        output: TextIO,
    ) -> None:
        self.client = client
        self.model = model
        self.fields = fields
        self.system = system
        self.output = output
        self.turns: list[dict[str, str]] = []

    def say(self, text: str) -> None:
        """Send one user turn and print the answer as it comes; Ctrl-C ends the answer.

        Raises:
            RequestError: the server refused or failed; the turn is forgotten.
        """
        system = [{"role": "system", "content": self.system}] if self.system else []
        question = {"role": "user", "content": text}
        body = {
            "model": self.model,
            "messages": [*system, *self.turns, question],
            "stream": True,
            **self.fields,
        }
        pieces: list[str] = []
        trace: list[dict[str, Any]] = []
        chunks = self.client.stream("/v1/chat/completions", body)
        try:
            for chunk in chunks:
                for choice in chunk["choices"]:
                    piece = choice["delta"].get("content") or ""
                    pieces.append(piece)
                    trace += choice.get("decoding_trace") or []
                    self.output.write(piece)
                    self.output.flush()
        except KeyboardInterrupt:
            self.output.write(" [stopped]")
        finally:
            chunks.close()
            if pieces:
                self.output.write("\n")
                self.output.flush()
        answer = "".join(pieces)
        if answer:
            self.turns += [question, {"role": "assistant", "content": answer}]
        if trace:
            print_trace(trace)

    def command(self, line: str) -> str:
        """Carry out a line that starts with a slash.

        Returns:
            What to tell the user.

        Raises:
            UserError: no such command, or a bad argument.
            RequestError: the server does not list its models.
        """
        name, _, argument = line[1:].partition(" ")
        argument = argument.strip()
        if name == "reset":
            self.turns.clear()
            return "the conversation is forgotten"
        if name == "system":
            self.system = argument or None
            self.turns.clear()
            return "system prompt set" if argument else "no system prompt"
        if name == "decoding":
            if not argument:
                self.fields.pop("decoding", None)
                return "decoding: the server's default"
            self.fields["decoding"] = parse_decoding(argument)
            return f"decoding: {json.dumps(self.fields['decoding'])}"
        if name == "model":
            if not argument:
                return "\n".join(list_models(self.client))
            self.model = argument
            return f"model: {argument}"
        if name == "help":
            return HELP
        raise UserError(f"no command /{name}; /help lists them")


def print_trace(trace: list[dict[str, Any]]) -> None:
    """Print a decoding trace as a table on the standard error output."""
    print(f"{'token':24} {'class':8} {'temp':>6} {'entropy':>8} {'logprob':>8}", file=sys.stderr)
    for entry in trace:
        numbers = f"{entry['temperature']:6.2f} {entry['entropy']:8.3f} {entry['logprob']:8.3f}"
        token = json.dumps(entry["token"])[1:-1][:24]
        print(f"{token:24} {entry['class']:8} {numbers}", file=sys.stderr)


def run(arguments: argparse.Namespace) -> int:
    """Chat until the input ends.

    Returns:
        1 if the input was a pipe and a turn failed, else 0.
    """
    fields = request_fields(arguments)
    if arguments.trace:
        fields["return_decoding_trace"] = True
    client = connect(arguments.url, key=arguments.api_key)
    try:
        model = arguments.model or list_models(client)[0]
        conversation = Conversation(
            client, model=model, fields=fields, system=arguments.system, output=sys.stdout
        )
        if sys.stdin.isatty():
            print(f"{model} at {client.url}; /help lists commands, Ctrl-C stops an answer")
            return _interact(conversation)
        return _answer_lines(conversation, sys.stdin)
    finally:
        client.close()


def _turn(conversation: Conversation, line: str, *, is_quiet: bool) -> None:
    if line.startswith("/"):
        reply = conversation.command(line)
        if not is_quiet:
            print(reply)
    elif line.strip():
        conversation.say(line)


def _describe(error: Exception) -> str:
    return explain(error) if isinstance(error, RequestError) else str(error)


def _interact(conversation: Conversation) -> int:
    with suppress(ImportError):
        import readline  # noqa: F401  (gives input() line editing; not on every platform)
    while True:
        try:
            line = input("> ")
            while line.endswith("\\"):
                line = line[:-1] + "\n" + input(". ")
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /quit leaves)")
            continue
        if line.strip() in ("/quit", "/exit"):
            return 0
        try:
            _turn(conversation, line, is_quiet=False)
        except (RequestError, UserError) as error:
            print(f"error: {_describe(error)}", file=sys.stderr)
        except KeyboardInterrupt:
            print()


def _answer_lines(conversation: Conversation, lines: TextIO) -> int:
    status = 0
    pending = ""
    for raw in lines:
        line = pending + raw.rstrip("\n")
        if line.endswith("\\"):
            pending = line[:-1] + "\n"
            continue
        pending = ""
        if line.strip() in ("/quit", "/exit"):
            break
        try:
            _turn(conversation, line, is_quiet=True)
        except (RequestError, UserError) as error:
            print(f"proa: error: {_describe(error)}", file=sys.stderr)
            status = 1
    return status
