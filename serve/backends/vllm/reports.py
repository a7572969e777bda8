"""What the sampler did, on its way from the worker to the backend.

vLLM's own outputs have no room for it. Records go over ZeroMQ, as JSON: one message a step. They
are sent before the step's tokens are, and may arrive a moment after them.
"""

import asyncio
import json
from collections import defaultdict
from tempfile import TemporaryDirectory
from typing import Any

from serve.backends.vllm.rows import Record, Send

ARRIVAL_S = 10.0
"""How long a token may be there before what is reported of it."""


def make_sender(address: str) -> Send:
    """Return what sends records to the reader at an address."""
    import zmq

    socket: Any = zmq.Context.instance().socket(zmq.PUSH)
    socket.setsockopt(zmq.LINGER, 0)
    socket.connect(address)

    def send(records: list[Record]) -> None:
        socket.send(json.dumps(records).encode(), copy=True)

    return send


class ReportReader:
    """Holds the records of running sequences until they are asked for.

    Args:
        address: to listen on; a port of * takes a free one.
        folder: that the address is in, removed with it.

    Attributes:
        address: that senders connect to.
    """

    def __init__(self, address: str, folder: TemporaryDirectory[str] | None = None) -> None:
        import zmq.asyncio

        self._socket: Any = zmq.asyncio.Context.instance().socket(zmq.PULL)
        self._socket.bind(address)
        self.address: str = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._records: dict[str, dict[int, Record]] = {}
        self._arrived: dict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._reading: asyncio.Task[None] | None = None
        self._folder = folder

    def expect(self, key: str) -> None:
        """Keep the records of a sequence from now on."""
        if self._reading is None or self._reading.done():
            self._reading = asyncio.get_running_loop().create_task(self._read())
        self._records[key] = {}

    def forget(self, key: str) -> None:
        """Drop the records of a sequence."""
        self._records.pop(key, None)
        self._arrived.pop(key, None)

    async def get(self, key: str, position: int) -> Record:
        """Return what is reported of a sequence's token number `position`.

        Raises:
            TimeoutError: nothing has come.
        """
        async with asyncio.timeout(ARRIVAL_S):
            while position not in self._records[key]:
                arrived = self._arrived[key]
                arrived.clear()
                await arrived.wait()
        return self._records[key].pop(position)

    def close(self) -> None:
        """Stop reading."""
        if self._reading is not None:
            self._reading.cancel()
        self._socket.close(linger=0)
        if self._folder is not None:
            self._folder.cleanup()

    async def _read(self) -> None:
        while True:
            for record in json.loads(await self._socket.recv()):
                known = self._records.get(record["key"])
                if known is not None:
                    known[record["position"]] = record
                    self._arrived[record["key"]].set()
