"""A scripted backend, a byte-level tokenizer with ChatML, and clients for the application."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import tokenizers
import uvicorn
from fastapi import FastAPI
from prometheus_client.core import Metric
from tokenizers import decoders, models, pre_tokenizers, trainers

from decoding import SamplingParams
from serve.api import ApiSettings, create_app
from serve.backends.protocol import (
    AdapterConflictError,
    AdapterInfo,
    AdapterLoadError,
    AdapterNotFoundError,
    BackendStats,
    BackendUnavailableError,
)
from serve.connections import ConnectionLimits, LimitedProtocol
from serve.requests import GenerationRequest, TokenLogprob, TokenOutput, TokenTrace
from text.tokenizer import Tokenizer

CHATML = (
    "{% for m in messages %}{% if m.content == 'REFUSE' %}{{ raise_exception('no REFUSE') }}"
    "{% endif %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = ["def hello(name):\n    return 'hello ' + name\n", "the quick brown fox jumps over"] * 20
END = 2  # <|im_end|>
CONTEXT = 256


def write_tokenizer(folder: Path, *extra_tokens: str) -> Path:
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(CORPUS, trainer)
    library.add_special_tokens(list(extra_tokens))
    library.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_folder(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@dataclass
class FakeBackend:
    """Answers each sequence with the tokens of `script(request, sequence_index)`.

    Attributes:
        error: raised at admission.
        failure: step at which `failure_error` is raised, or sequences end with `failure_reason`.
        gate: awaited before each step.
        queue_gate: awaited before admission.
    """

    vocab_size: int
    script: Callable[[GenerationRequest, int], list[int]]
    max_context_tokens: int = CONTEXT
    error: Exception | None = None
    failure: int | None = None
    failure_error: Exception | None = None
    failure_reason: Any = "error"
    gate: asyncio.Semaphore | None = None
    queue_gate: asyncio.Event | None = None
    cached: int = 3
    is_draining: bool = False
    broken: str | None = None
    requests: list[GenerationRequest] = field(default_factory=list)
    aborted: list[tuple[str, int]] = field(default_factory=list)
    num_free_blocks: int = 6
    num_open: int = 0
    num_steps: int = 0
    attached: dict[str, AdapterInfo] = field(default_factory=dict)
    metrics: list[Metric] = field(default_factory=list)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[list[TokenOutput], None]:
        if self.error is not None:
            raise self.error
        for arm in request.arms:
            if arm.adapter is not None and arm.adapter not in self.attached:
                raise AdapterNotFoundError(arm.adapter)
        self.requests.append(request)
        self.num_open += 1
        try:
            if self.queue_gate is not None:
                await self.queue_gate.wait()
            num_sequences = sum(arm.num_sequences for arm in request.arms)
            scripts = [self.script(request, i) for i in range(num_sequences)]
            position = 0
            while any(scripts):
                if self.gate is not None:
                    await self.gate.acquire()
                else:
                    await asyncio.sleep(0)
                self.num_steps += 1
                yield self._step(request, scripts, position)
                position += 1
        finally:
            self.num_open -= 1

    def _step(
        self, request: GenerationRequest, scripts: list[list[int]], position: int
    ) -> list[TokenOutput]:
        outputs = []
        is_failing = self.failure == position
        if is_failing and self.failure_error is not None:
            raise self.failure_error
        for index, script in enumerate(scripts):
            if (request.request_id, index) in self.aborted:
                script.clear()
            if not script:
                continue
            params = params_of(request, index)
            if params.max_tokens == 0:
                script.clear()
                ended = self._output(request, index, None, position, "length")
                scores = (0.5, 1.5) if request.is_classification else None
                outputs.append(ended._replace(class_scores=scores))
                continue
            if is_failing:
                script.clear()
                outputs.append(
                    TokenOutput(
                        sequence_index=index, token_id=None, finish_reason=self.failure_reason
                    )
                )
                continue
            token_id = script.pop(0)
            reason = None
            if token_id == END or token_id in params.stop_token_ids:
                reason = "stop"
            elif position + 1 == params.max_tokens or not script:
                reason = "length"
            if reason is not None:
                script.clear()
            outputs.append(self._output(request, index, token_id, position, reason))
        return outputs

    def _output(
        self,
        request: GenerationRequest,
        index: int,
        token_id: int | None,
        position: int,
        reason: Any,
    ) -> TokenOutput:
        num_top = params_of(request, index).logprobs
        if token_id is None:
            request = replace(request, is_traced=False)
            num_top = None
        prompt_logprobs = None
        if request.prompt_logprobs is not None and index == 0 and position == 0:
            prompt_logprobs = [None] + [
                make_logprob(i, request.prompt_logprobs) for i in request.prompt_token_ids[1:]
            ]
        return TokenOutput(
            sequence_index=index,
            token_id=token_id,
            logprob=(
                make_logprob(token_id, num_top or 0)
                if num_top is not None or request.is_traced
                else None
            ),
            trace=(
                TokenTrace(token_class="other", temperature=0.30000001192092896, entropy=1.5)
                if request.is_traced
                else None
            ),
            finish_reason=reason,
            cached_prompt_tokens=self.cached if position == 0 else 0,
            prompt_logprobs=prompt_logprobs,
        )

    def own_metrics(self) -> list[Metric]:
        return self.metrics

    def abort_sequence(self, request_id: str, sequence_index: int) -> None:
        self.aborted.append((request_id, sequence_index))

    def adapters(self) -> list[AdapterInfo]:
        return [self.attached[name] for name in sorted(self.attached)]

    async def attach_adapter(self, name: str, path: str) -> AdapterInfo:
        if self.is_draining:
            raise BackendUnavailableError("draining")
        if name in self.attached:
            raise AdapterConflictError(f"an adapter named {name} is attached already")
        if path != "good":
            raise AdapterLoadError("outside the root")
        self.attached[name] = make_adapter(name)
        return self.attached[name]

    async def detach_adapter(self, name: str) -> None:
        if name not in self.attached:
            raise AdapterNotFoundError(name)
        if self.attached[name].num_running:
            raise AdapterConflictError(f"{name} is in use by 1 request")
        del self.attached[name]

    def stats(self) -> BackendStats:
        return BackendStats(
            num_running_sequences=self.num_open,
            num_waiting_requests=2,
            num_cache_blocks=10,
            num_free_cache_blocks=self.num_free_blocks,
            prompt_tokens=50,
            cached_prompt_tokens=20,
            generated_tokens=70,
            preemptions=1,
            steps=self.num_steps,
            is_draining=self.is_draining,
            error=self.broken,
        )

    async def drain(self, timeout_s: float) -> None:
        self.is_draining = True


def params_of(request: GenerationRequest, index: int) -> SamplingParams:
    arms = [arm for arm in request.arms for _ in range(arm.num_sequences)]
    return arms[index].params


def make_adapter(name: str, **fields: Any) -> AdapterInfo:
    facts: dict[str, Any] = {
        "method": "qst", "kind": "side_network", "description": "a test", "num_parameters": 10,
        "num_bytes": 40, "is_loaded": True, "num_running": 0, "created": 1_700_000_000,
    }  # fmt: skip
    return AdapterInfo(name=name, **{**facts, **fields})


def make_logprob(token_id: int, num_top: int) -> TokenLogprob:
    """The token is the most likely one if its id is even, else the second."""
    value = -0.25 if token_id % 2 == 0 else -1.25
    others = [(token_id, value), ((token_id + 1) % 300, -1.5 - value)]
    top = sorted(others, key=lambda pair: -pair[1]) + [(7, -3.0), (8, -4.0)]
    return TokenLogprob(logprob=value, top=tuple(top[:num_top]))


@pytest.fixture
def backend(tokenizer: Tokenizer) -> FakeBackend:
    answer = tokenizer.encode("hello fox")
    return FakeBackend(
        vocab_size=tokenizer.vocab_size, script=lambda request, index: [*answer, END]
    )


@pytest.fixture
def api_settings() -> ApiSettings:
    return ApiSettings(model_id="smollm2")


@pytest.fixture
def app(backend: FakeBackend, tokenizer: Tokenizer, api_settings: ApiSettings) -> FastAPI:
    return create_app(backend, tokenizer, settings=api_settings)


def make_client(app: FastAPI, **options: Any) -> httpx.AsyncClient:
    client = options.pop("client", ("127.0.0.1", 1234))
    transport = httpx.ASGITransport(app=app, client=client)
    return httpx.AsyncClient(transport=transport, base_url="http://localhost", **options)


class Client:
    """A blocking client without a network."""

    def __init__(self, app: FastAPI, **options: Any) -> None:
        self.app = app
        self.options = options

    def request(self, method: str, url: str, **options: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            async with make_client(self.app, **dict(self.options)) as client:
                return await client.request(method, url, **options)

        return asyncio.run(send())

    def get(self, url: str, **options: Any) -> httpx.Response:
        return self.request("GET", url, **options)

    def post(self, url: str, body: Any = None, **options: Any) -> httpx.Response:
        if body is not None:
            options["json"] = body
        return self.request("POST", url, **options)

    def chat(self, **fields: Any) -> httpx.Response:
        body = {"model": "smollm2", "messages": [{"role": "user", "content": "hi"}], **fields}
        return self.post("/v1/chat/completions", body)

    def complete(self, **fields: Any) -> httpx.Response:
        return self.post("/v1/completions", {"model": "smollm2", "prompt": "the fox", **fields})


@pytest.fixture
def client(app: FastAPI) -> Client:
    return Client(app)


def read_events(response: httpx.Response) -> list[Any]:
    """Return the JSON of each event; the last must be `[DONE]` and is left out."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = response.text.split("\n\n")
    assert blocks[-1] == ""
    assert all(block.startswith("data: ") for block in blocks[:-1])
    assert blocks[-2] == "data: [DONE]"
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-2]]


def check_error(
    response: httpx.Response, status: int, *, param: str | None = None, code: str | None = None
) -> str:
    """Check the shape of an error body and return its message."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["param"] == param
    if code is not None:
        assert body["error"]["code"] == code
    assert isinstance(body["error"]["type"], str)
    assert len(response.content) < 4096
    message = body["error"]["message"]
    assert isinstance(message, str)
    assert "/" + "serve/" not in message
    assert 'File "' not in message
    return message


@contextmanager
def serve(app: FastAPI) -> Iterator[str]:
    """Run the application on a real socket and give its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        http: Any = partial(LimitedProtocol, limits=ConnectionLimits())
        server = uvicorn.Server(uvicorn.Config(app, http=http, log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.005)
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture
def address(app: FastAPI) -> Iterator[str]:
    with serve(app) as url:
        yield url


async def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for something that another task does; fail after five seconds."""
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.002)
