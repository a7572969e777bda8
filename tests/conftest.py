"""Which tests run, and a tiny model for those that need a whole checkpoint.

Tests that need a GPU or a browser are left out, loudly, where there is none.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.browser import NAMES, find_chromium
from tests.sandboxes import has_sandbox

# Before torch is imported, here and in the processes that tests start. The models are tiny: a
# second thread would only wait for the first, and torch's threads spin while they wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def has_gpu() -> bool:
    """Return whether torch finds a CUDA device."""
    import torch  # takes seconds; only when a collected test asks for a GPU

    return torch.cuda.is_available()


# Marker: whether what it needs is there, and what that is.
NEEDS: dict[str, tuple[Callable[[], bool], str]] = {
    "gpu": (has_gpu, "no CUDA device"),
    "browser": (lambda: find_chromium() is not None, f"no browser ({', '.join(NAMES)})"),
    "bubblewrap": (lambda: has_sandbox("bubblewrap"), "no bubblewrap that works"),
    "compose": (lambda: shutil.which("docker-compose") is not None, "no docker-compose"),
    "kubernetes": (lambda: find_spec("kubernetes_validate") is not None, "no kubernetes-validate"),
    "vllm": (lambda: find_spec("vllm") is not None, "vLLM is not installed here; make test-vllm"),
    "unshare": (lambda: has_sandbox("unshare"), "no user namespaces"),
}


def pytest_configure(config: pytest.Config) -> None:
    """Give each worker that starts engines of vLLM a core: they bind their threads to the first."""
    worker = getattr(config, "workerinput", {}).get("workerid")
    if worker is not None and find_spec("vllm"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests whose marker asks for something that is not there."""
    for marker, (is_there, missing) in NEEDS.items():
        wanted = [item for item in items if item.get_closest_marker(marker)]
        if not wanted or is_there():
            continue
        for item in wanted:
            item.add_marker(pytest.mark.skip(reason=missing))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many tests were not run, and for want of what, wherever they were collected."""
    reasons = [str(report.longrepr) for report in terminalreporter.getreports("skipped")]
    for marker, (_, missing) in NEEDS.items():
        count = sum(missing in reason for reason in reasons)
        if count:
            terminalreporter.section("TESTS LEFT OUT", sep="!", red=True, bold=True)
            terminalreporter.write_line(
                f"{count} tests marked {marker} were NOT RUN on this machine: {missing}."
            )


@pytest.fixture(scope="session", autouse=True)
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where servers keep votes, also those in processes of their own: not the user's home."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def tiny_llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a seeded random Llama of 2 layers and a byte tokenizer.

    Hidden size 32, vocabulary 260, context 16384; `<|end|>` ends a text. It has a chat template.
    """
    import torch  # slow, and not every test needs a model
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.2

    hidden, middle, heads, kv_heads, vocab = 32, 64, 4, 2, 260
    # vLLM's attention takes no narrower heads than 32.
    width = 32 if find_spec("vllm") else hidden // heads
    tensors = {"model.embed_tokens.weight": random(vocab, hidden)}
    tensors["model.norm.weight"] = random(hidden)
    for i in range(2):
        shapes = {
            "self_attn.q_proj": (width * heads, hidden),
            "self_attn.k_proj": (width * kv_heads, hidden),
            "self_attn.v_proj": (width * kv_heads, hidden),
            "self_attn.o_proj": (hidden, width * heads),
            "mlp.gate_proj": (middle, hidden),
            "mlp.up_proj": (middle, hidden),
            "mlp.down_proj": (hidden, middle),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        tensors |= {f"model.layers.{i}.{n}.weight": random(*s) for n, s in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocab,
        "hidden_size": hidden, "intermediate_size": middle, "num_hidden_layers": 2,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": width,
        "max_position_embeddings": 16384, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "hidden_act": "silu", "tie_word_embeddings": True, "torch_dtype": "float32",
        "eos_token_id": 256,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_byte_tokenizer(folder)
    return folder


def write_byte_tokenizer(folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    settings = {"eos_token": "<|end|>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
