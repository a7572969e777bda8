"""Both ways in, as processes: `proa serve --backend vllm`, and vLLM's server with our plugins."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from models.checkpoints import load_checkpoint
from tests.serve.backends.vllm.conftest import save_model, save_side
from tests.serve.conftest import Process, StartServer

pytestmark = pytest.mark.vllm
ROOT = Path(__file__).parents[4]
READY_S = 240
PROMPT = "def f(x):\n    "


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("m") / "tiny", "llama")


@pytest.fixture(scope="module")
def side(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = load_checkpoint(str(model), quantization="none")
    return save_side(tmp_path_factory.mktemp("a") / "one", base)


def start_proa(start_server: StartServer, model: Path, side: Path, *words: str) -> Process:
    return start_server(
        str(model), "--backend", "vllm", "--quantization", "none", "--max-context", "256",
        "--threads", "1", "--adapter", f"one={side}", "--no-ui", *words,
    )  # fmt: skip


def worker_of(process: subprocess.Popen[str]) -> Any:
    """Return the process in which vLLM computes."""
    import psutil

    workers = psutil.Process(process.pid).children(recursive=True)
    return max(workers, key=lambda one: one.memory_info().rss)


def test_proa_serves_over_vllm_until_a_worker_dies(
    model: Path, side: Path, start_server: StartServer
) -> None:
    server = start_proa(start_server, model, side)
    with httpx.Client(base_url=server.url, timeout=60) as client:
        listed = {entry["id"] for entry in client.get("/v1/models").json()["data"]}
        assert {"tiny", "tiny:one", "tiny@adapt"} <= listed
        body = {"model": "tiny:one", "prompt": PROMPT, "max_tokens": 8, "temperature": 0.8,
                "seed": 3, "decoding": {"strategy": "adapt", "a": 1.0, "b": 0.3},
                "return_decoding_trace": True}  # fmt: skip
        answer = client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        trace = answer.json()["choices"][0]["decoding_trace"]
        assert {entry["temperature"] for entry in trace} <= {1.0, 0.3}
        assert answer.json() == client.post("/v1/completions", json=body).json() | {
            name: answer.json()[name] for name in ("id", "created", "usage")
        }
        refused = client.post(
            "/v1/completions", json=body | {"decoding": {"strategy": "look_ahead"}}
        )
        assert refused.status_code == 400
        assert "vLLM cannot" in refused.json()["error"]["message"]
        with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as stream:
            assert "[DONE]" in stream.read().decode()
        metrics = client.get("/metrics").text
        assert "proa_generation_tokens_total" in metrics
        assert "vllm:generation_tokens_total{" in metrics
        assert client.get("/readyz").status_code == 200
        worker_of(server.process).kill()
        end_s = time.monotonic() + 60
        while time.monotonic() < end_s:
            try:
                if client.get("/readyz").status_code == 503:
                    break
            except httpx.TransportError:
                break  # it has stopped already
            time.sleep(0.05)
        else:
            pytest.fail("the server stays ready without its worker")
    assert server.process.wait(60) == 1
    assert "the engine broke: vLLM's engine failed" in server.wait_for("the engine broke")


def test_nothing_of_vllm_outlives_a_server_that_is_killed(
    model: Path, side: Path, start_server: StartServer
) -> None:
    import psutil

    server = start_proa(start_server, model, side)
    family = psutil.Process(server.process.pid).children(recursive=True)
    assert len(family) >= 2
    assert server.stop(signal.SIGKILL) == -signal.SIGKILL
    _, alive = psutil.wait_procs(family, timeout=60)
    assert alive == []


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("--tensor-parallel-size", "3"), "tensor_parallel_size: 3 does not divide the 260 tokens"),
        (("--kv", "int8"), "kv: 'int8' is not for vLLM"),
        (("--adapter", "roleplay=examples/roleplay/adapter"), "the adapter was trained on smollm2"),
    ],
    ids=["ranks", "cache", "adapter of another base"],
)
def test_what_vllm_cannot_do_is_refused_at_the_start(
    words: tuple[str, ...], match: str, model: Path
) -> None:
    command = [sys.executable, "-m", "serve.cli.main", "serve", str(model), "--backend", "vllm",
               "--quantization", "none", "--threads", "1", *words]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=READY_S, check=False
    )
    assert done.returncode == 2, done.stderr
    assert match in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def vllm_server(model: Path, side: Path) -> Iterator[str]:
    """vLLM's own server, as `vllm serve` starts it, with a side network and its base."""
    port = 18731 + os.getpid() % 1000
    settings = {"proa": {"model": str(model), "quantization": "none", "adapters": [str(side)]}}
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model),
        "--served-model-name", "tiny", "--port", str(port), "--host", "127.0.0.1",
        "--load-format", "proa", "--quantization", "proa", "--dtype", "float32",
        "--hf-overrides", '{"architectures": ["ProaLlamaForCausalLM"]}',
        "--additional-config", json.dumps(settings), "--enable-lora", "--lora-modules",
        f"one={side}", "--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "8",
        "--kv-cache-memory-bytes", "50000000",
    ]  # fmt: skip
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        url = f"http://127.0.0.1:{port}"
        end_s = time.monotonic() + READY_S
        try:
            while True:
                try:
                    if httpx.get(f"{url}/health").status_code == 200:
                        break
                except httpx.TransportError:
                    assert process.poll() is None, process.communicate()[1][-4000:]
                assert time.monotonic() < end_s, "vLLM's server does not come up"
                time.sleep(0.5)
            yield url
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def test_vllm_serve_takes_side_networks_and_strategies(vllm_server: str) -> None:
    with httpx.Client(base_url=vllm_server, timeout=60) as client:
        listed = {entry["id"] for entry in client.get("/v1/models").json()["data"]}
        assert listed == {"tiny", "one"}

        def complete(name: str, **fields: Any) -> httpx.Response:
            body = {"model": name, "prompt": PROMPT, "max_tokens": 12, "temperature": 0.8,
                    "seed": 11} | fields  # fmt: skip
            return client.post("/v1/completions", json=body)

        plain, ours = complete("tiny"), complete("one", temperature=0)
        assert plain.status_code == 200, plain.text
        assert (
            ours.json()["choices"][0]["text"]
            != (complete("tiny", temperature=0).json()["choices"][0]["text"])
        )
        adapt = {"decoding": '{"strategy": "adapt", "a": 1.1, "b": 0.2}'}
        hot = complete("one", vllm_xargs=adapt)
        assert hot.status_code == 200, hot.text
        assert hot.json()["choices"] == complete("one", vllm_xargs=adapt).json()["choices"]
        bad = complete("tiny", vllm_xargs={"decoding": '{"strategy": "adapt", "a": 9}'})
        assert bad.status_code == 400
        assert "decoding.a must be" in bad.text
