"""The terminal chat against a scripted server."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from client.errors import RequestError
from serve.cli.arguments import UserError, explain, parse_decoding
from serve.cli.chat import Conversation
from serve.cli.connection import connect
from serve.cli.main import main

ROOT = Path(__file__).parents[3]


@pytest.fixture
def conversation(server):
    client = connect(server.url, key=None)
    yield Conversation(client, model="tiny", fields={}, system=None, output=io.StringIO())
    client.close()


def test_piped_lines_are_turns(server, run_proa) -> None:
    text = "Hi\n\n/decoding adapt\nAnd \\\nmore\n/quit\nnever sent\n"
    done = run_proa("chat", "--url", server.url, "--seed", "7", stdin=text)
    assert (done.returncode, done.stdout, done.stderr) == (0, "Hello!\nHello!\n", "")
    first, second = server.bodies
    assert first == {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Hi"}],
        "stream": True,
        "max_tokens": 512,
        "seed": 7,
    }
    assert second["decoding"] == {"strategy": "adapt"}
    assert [m["content"] for m in second["messages"]] == ["Hi", "Hello!", "And \nmore"]


def test_flags_become_request_fields(server, run_proa) -> None:
    words = ["--model", "other", "--system", "Be brief.", "--temperature", "0", "--top-p", "0.5",
             "--top-k", "4", "--min-p", "0.1", "--stop", "a", "--stop", "b", "--max-tokens", "9",
             "--decoding", '{"strategy": "adapt", "a": 1.0}', "--trace"]  # fmt: skip
    done = run_proa("chat", "--url", server.url + "/v1/", *words, stdin="Hi\n")
    assert done.returncode == 0
    body = server.bodies[0]
    assert body.pop("messages")[0] == {"role": "system", "content": "Be brief."}
    assert body == {
        "model": "other", "stream": True, "temperature": 0.0, "top_p": 0.5, "top_k": 4,
        "min_p": 0.1, "stop": ["a", "b"], "max_tokens": 9, "return_decoding_trace": True,
        "decoding": {"strategy": "adapt", "a": 1.0},
    }  # fmt: skip
    assert "token" in done.stderr.splitlines()[0]
    assert done.stderr.splitlines()[1].split() == ["Hel", "X", "0.50", "1.250", "-0.750"]


def test_key_is_sent_as_bearer_token(server, run_proa) -> None:
    run_proa("chat", "--url", server.url, variables={"PROA_API_KEY": "k1,k2"})
    run_proa("chat", "--url", server.url, "--api-key", "k3")
    assert server.keys == ["Bearer k1", "Bearer k3"]


def test_refused_turn_is_reported_and_forgotten(server, run_proa) -> None:
    server.failure = (400, "temperature: 9 is too hot")
    done = run_proa("chat", "--url", server.url, stdin="one\ntwo\n")
    assert done.returncode == 1
    line = "proa: error: temperature: 9 is too hot [status 400]\n"
    assert done.stderr == line * 2
    assert [len(body["messages"]) for body in server.bodies] == [1, 1]


def test_refusal_cannot_command_the_terminal(server, run_proa) -> None:
    server.failure = (400, "\x1b[2Jgone\nproa: all is well")
    done = run_proa("chat", "--url", server.url, stdin="one\n")
    assert done.stderr == "proa: error: ?[2Jgone?proa: all is well [status 400]\n"


def test_error_within_the_stream_is_reported(server, conversation) -> None:
    server.stream_error = "the engine broke"
    with pytest.raises(RequestError, match="the engine broke"):
        conversation.say("Hi")
    assert conversation.turns == []


def test_wrong_key_says_how_to_give_one(server, conversation) -> None:
    server.failure = (401, "no such key")
    with pytest.raises(RequestError, match="no such key") as caught:
        conversation.say("Hi")
    hint = " (give --api-key or set PROA_API_KEY) [status 401]"
    assert explain(caught.value) == "no such key" + hint


@pytest.mark.parametrize(
    ("url", "status", "match"),
    [
        ("http://127.0.0.1:1", 1, "no server answers at http://127.0.0.1:1; start one with"),
        ("ftp://127.0.0.1", 2, "--url: 'ftp://127.0.0.1' is not an address"),
        ("http://a:b", 2, "--url: 'http://a:b' is not an address"),
    ],
)
def test_unreachable_server_is_one_line(
    url: str, status: int, match: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", "--url", url]) == status
    errors = capsys.readouterr().err
    assert errors.startswith("proa: error: ")
    assert match in errors
    assert errors.count("\n") == 1


def test_ctrl_c_stops_the_answer_on_the_server_and_keeps_the_chat(server) -> None:
    server.is_endless = True
    with subprocess.Popen(
        [sys.executable, "-m", "serve.cli.main", "chat", "--url", server.url],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # A shell starts its background jobs, these tests perhaps among them, deaf to Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("first\n")
        process.stdin.flush()
        assert process.stdout.read(30) == "Hel" * 10
        os.kill(process.pid, signal.SIGINT)
        assert server.hung_up.wait(30)
        server.is_endless = False
        process.stdin.write("second\n")
        process.stdin.close()
        rest = process.stdout.read()
        assert process.wait(30) == 0
    assert rest.endswith(" [stopped]\nHello!\n")
    assert [m["role"] for m in server.bodies[1]["messages"]] == ["user", "assistant", "user"]


def test_commands_change_the_conversation(server, conversation) -> None:
    conversation.say("Hi")
    assert len(conversation.turns) == 2
    assert conversation.command("/reset") == "the conversation is forgotten"
    assert conversation.turns == []
    assert conversation.command("/system Be kind.") == "system prompt set"
    assert conversation.command('/decoding {"strategy": "dynatemp"}').startswith("decoding: {")
    assert conversation.command("/model big") == "model: big"
    conversation.say("Hi")
    assert server.bodies[-1] == {
        "model": "big",
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Hi"},
        ],
        "stream": True,
        "decoding": {"strategy": "dynatemp"},
    }
    assert conversation.command("/model") == "tiny\ntiny@adapt"
    assert conversation.command("/decoding") == "decoding: the server's default"
    assert conversation.command("/system") == "no system prompt"
    assert "/reset" in conversation.command("/help")
    assert conversation.fields == {}


def test_unknown_command_is_refused(conversation) -> None:
    with pytest.raises(UserError, match="no command /rest; /help lists them"):
        conversation.command("/rest")


def test_decoding_argument_is_a_name_or_an_object() -> None:
    assert parse_decoding(" adapt ") == {"strategy": "adapt"}
    assert parse_decoding(json.dumps({"strategy": "adapt", "b": 0})) == {
        "strategy": "adapt",
        "b": 0,
    }


@pytest.mark.parametrize(
    ("text", "match"),
    [("", "a strategy's name"), ('{"a"', "not a JSON object"), ('{"a": 1}', 'needs a "strategy"')],
)
def test_bad_decoding_argument_is_refused(text: str, match: str) -> None:
    with pytest.raises(UserError, match=match):
        parse_decoding(text)
