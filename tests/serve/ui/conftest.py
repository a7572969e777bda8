"""A scripted server with the interface on a real socket, and pages of a real browser."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.responses import RedirectResponse

from serve.api import ApiSettings, create_app
from serve.api.context import Experiments
from serve.connections import ConnectionLimits, LimitedProtocol
from serve.experiments.exposures import ExposureStore
from serve.experiments.plan import Experiment
from serve.experiments.store import VoteStore
from serve.ui.mount import PATH, UserInterface
from tests.browser import Browser, find_chromium
from tests.serve.api.conftest import END, FakeBackend, make_adapter, tokenizer
from text.tokenizer import Tokenizer

__all__ = ["tokenizer"]

READY_S = 60


class Pace:
    """Lets a scripted backend take a step each so many seconds."""

    def __init__(self, step_s: float) -> None:
        self.step_s = step_s

    async def acquire(self) -> None:
        await asyncio.sleep(self.step_s)


class LiveServer:
    """The API over a scripted backend, with the interface, on one port for as long as it likes.

    Attributes:
        backend: answers; may be changed at any time.
        plan: experiments, of which a server that is started knows.
        say: encodes what it shall answer.
    """

    def __init__(self, tokenizer: Tokenizer, folder: Path, **settings: object) -> None:
        self._tokenizer, self._folder, self._settings = tokenizer, folder, settings
        self.backend = FakeBackend(
            vocab_size=tokenizer.vocab_size, script=lambda request, index: [], cached=0,
            max_context_tokens=8192, attached={"poet": make_adapter("poet")},
        )  # fmt: skip
        self.say("hello fox")
        self.plan: tuple[Experiment, ...] = ()
        self._port = 0
        self.start()

    def say(self, *texts: str) -> None:
        """Answer with a text, or with one for each arm."""
        scripts = [self._tokenizer.encode(text) for text in texts]
        self.backend.script = lambda request, index: [*scripts[index % len(scripts)], END]

    def start(self) -> None:
        """Listen, with a new application."""
        settings = ApiSettings(model_id="smollm2", **self._settings)  # type: ignore[arg-type]
        self.votes = VoteStore(self._folder / "votes.sqlite3")
        self.exposures = ExposureStore(self._folder / "experiments.sqlite3")
        plan = {item.name: item for item in self.plan}
        app = create_app(
            self.backend, self._tokenizer, settings=settings, votes=self.votes,
            experiments=Experiments(plan=plan, store=self.exposures) if plan else None,
        )  # fmt: skip
        self._listener = socket.create_server(("127.0.0.1", self._port))
        self._port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"
        self.interface = UserInterface(lambda: self.url)
        app.add_route("/", lambda _: RedirectResponse(f"{PATH}/"))
        app.mount(PATH, self.interface)
        http: Any = partial(LimitedProtocol, limits=ConnectionLimits())
        self._server = uvicorn.Server(
            uvicorn.Config(
                app, http=http, log_level="error", lifespan="off", timeout_graceful_shutdown=1
            )
        )
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        wait_until(lambda: self._server.started)

    def _run(self) -> None:
        async def run() -> None:
            serving = asyncio.create_task(self._server.serve(sockets=[self._listener]))
            await self._stopping.wait()
            await self.interface.close()
            self._server.should_exit = True
            await serving

        with asyncio.Runner() as runner:
            self._loop, self._stopping = runner.get_loop(), asyncio.Event()
            runner.run(run())

    def is_idle(self) -> bool:
        """Tell whether no page reads what an event does; each has a heartbeat all the time."""
        sessions = self.interface._sessions
        return sessions is not None and all(s.num_open <= 1 for s in sessions._sessions.values())

    def stop(self) -> None:
        """Stop as a server does: open pages lose it."""
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()
        self._listener.close()
        self.votes.close()
        self.exposures.close()


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for something that another thread does; fail after a minute."""
    end_s = time.monotonic() + READY_S
    while not condition():
        assert time.monotonic() < end_s, "it did not come to pass"
        time.sleep(0.01)


def delay_cancellation(page: Any) -> None:
    """Have the server learn late that an answer is to end: what the page asks next comes first.

    Only while a call of the page's waits.
    """

    def wait(route: Any) -> None:
        time.sleep(0.5)
        route.continue_()

    page.route("**/gradio_api/cancel", wait)


@pytest.fixture
def live_settings() -> dict[str, object]:
    """Settings of the API; a test module may give others."""
    return {}


@pytest.fixture
def live(
    tokenizer: Tokenizer, tmp_path: Path, live_settings: dict[str, object]
) -> Iterator[LiveServer]:
    server = LiveServer(tokenizer, tmp_path, **live_settings)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Not for longer: while Playwright runs, this thread can run no event loop of its own."""
    path = find_chromium()
    assert path is not None, "tests marked browser are left out where there is none"
    with Browser(path) as found:
        yield found
