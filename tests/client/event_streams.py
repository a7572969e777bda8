"""Answers of a server that streams events, as bytes."""

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunked(*events: str) -> bytes:
    """Return a body of events, each in a chunk of its own."""
    body = b""
    for event in events:
        data = f"data: {event}\n\n".encode()
        body += f"{len(data):x}\r\n".encode() + data + b"\r\n"
    return body + b"0\r\n\r\n"
