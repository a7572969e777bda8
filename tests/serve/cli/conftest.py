"""A scripted server of the chat API on a real socket, and the command as a process."""

import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from serve.cli.main import main

ROOT = Path(__file__).parents[3]
CHUNKS = ("Hel", "lo", "!")

RunProa = Callable[..., subprocess.CompletedProcess[str]]


def environment(**variables: str) -> dict[str, str]:
    """The process environment without PROA_ variables, plus some."""
    kept = {name: text for name, text in os.environ.items() if not name.startswith("PROA_")}
    return kept | variables


@pytest.fixture
def run_proa() -> RunProa:
    """Run `proa` to its end and return status and output."""

    def run(
        *words: str, stdin: str = "", variables: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "serve.cli.main", *words],
            cwd=ROOT,
            env=environment(**(variables or {})),
            input=stdin,
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


@pytest.fixture
def call_proa(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> RunProa:
    """Like `run_proa`, but in this process: imports need not be repeated."""

    def call(*words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        for name in os.environ:
            if name.startswith("PROA_"):
                monkeypatch.delenv(name)
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        try:
            status = main(words)
        except SystemExit as stop:
            status = int(stop.code or 0)
        output = capsys.readouterr()
        return subprocess.CompletedProcess(words, status, output.out, output.err)

    return call


class ScriptedServer(ThreadingHTTPServer):
    """Answers chats with `CHUNKS`, or as its attributes say.

    Attributes:
        bodies: requests received.
        keys: Authorization headers received.
        failure: (status, message) to answer chats with, or None.
        stream_error: message of an error in the middle of the stream, or None.
        is_endless: stream the first chunk for ever.
        adapters: what /v1/adapters lists.
        hung_up: set once a client has closed an endless stream.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.failure: tuple[int, str] | None = None
        self.stream_error: str | None = None
        self.is_endless = False
        self.adapters: list[dict[str, Any]] = []
        self.hung_up = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: ScriptedServer

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def answer(self, status: int, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        self.server.keys.append(self.headers["Authorization"])
        models = [{"id": "tiny@adapt"}, {"id": "tiny"}]
        self.answer(200, {"data": self.server.adapters if "adapters" in self.path else models})

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        self.server.bodies.append(json.loads(self.rfile.read(length)))
        if self.server.failure:
            status, message = self.server.failure
            self.answer(status, {"error": {"message": message, "type": "x", "param": None}})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            self.event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
            while self.server.is_endless:
                self.event({"choices": [{"index": 0, "delta": {"content": CHUNKS[0]}}]})
            for text in CHUNKS:
                entry = {"token": text, "token_id": 1, "class": "X", "temperature": 0.5,
                         "entropy": 1.25, "logprob": -0.75}  # fmt: skip
                choice = {"index": 0, "delta": {"content": text}}
                if self.server.bodies[-1].get("return_decoding_trace"):
                    choice["decoding_trace"] = [entry]
                self.event({"choices": [choice]})
            if self.server.stream_error:
                self.event({"error": {"message": self.server.stream_error}})
            self.event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
            self.wfile.write(b"data: [DONE]\n\n")
        except (BrokenPipeError, ConnectionResetError):
            self.server.hung_up.set()

    def event(self, chunk: dict[str, Any]) -> None:
        self.wfile.write(b": ping\n\ndata: " + json.dumps(chunk).encode() + b"\n\n")


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    scripted = ScriptedServer()
    thread = threading.Thread(target=scripted.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield scripted
    scripted.shutdown()
    scripted.server_close()
    thread.join()
