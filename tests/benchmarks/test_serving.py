"""The serving benchmark starts and stops servers and reads their memory."""

import os
import sys

import pytest

from benchmarks import serving
from benchmarks.report import BenchmarkFailed

SERVER = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[-1])), Handler).serve_forever()
"""


def test_running_server_waits_until_it_is_ready_and_stops_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(serving, "PROA", (sys.executable, "-c", SERVER))
    with serving.running_server([]) as server:
        assert server.ready_s > 0
        assert serving.memory_mb(server.pid, "VmRSS") > 0
    with pytest.raises(ProcessLookupError):
        os.kill(server.pid, 0)


def test_running_server_reports_a_server_that_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "PROA", (sys.executable, "-c", "raise SystemExit(3)"))
    with (
        pytest.raises(BenchmarkFailed, match="the server ended with status 3"),
        serving.running_server([]),
    ):
        pass


def test_memory_refuses_a_field_that_is_not_there() -> None:
    with pytest.raises(BenchmarkFailed, match="has no VmNone"):
        serving.memory_mb(os.getpid(), "VmNone")
