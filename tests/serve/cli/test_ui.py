"""`proa ui`: what it refuses. That it serves the page is tested in a browser."""

import socket

import pytest

from tests.serve.cli.conftest import RunProa


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--url", "ftp://h"], "--url: 'ftp://h' is not an address such as http://127.0.0.1:8000"),
        (["--port", "70000"], "--port must be from 0 to 65535, got 70000"),
        (["--host", "0.0.0.0"], "invalid choice: '0.0.0.0'"),
    ],
    ids=["url", "port", "host"],
)
def test_bad_option_is_refused(words: list[str], told: str, call_proa: RunProa) -> None:
    done = call_proa("ui", *words)
    assert done.returncode == 2
    assert told in done.stderr


def test_port_in_use_is_told(call_proa: RunProa) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        done = call_proa("ui", "--port", str(port))
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
