"""`proa generate` and `proa quantize` on a tiny model."""

import json
from pathlib import Path

import pytest

FIELDS = {"token", "token_id", "class", "temperature", "entropy", "logprob"}


@pytest.fixture
def words(tiny_llama_folder: Path) -> list[str]:
    return ["--model", str(tiny_llama_folder), "--quantization", "none", "--max-tokens", "6"]


def test_generate_prints_the_text_and_says_the_rest_elsewhere(call_proa, words) -> None:
    done = call_proa("generate", "ab", *words, "--seed", "1")
    again = call_proa("generate", *words, "--seed", "1", stdin="ab")
    assert done.returncode == again.returncode == 0
    assert done.stdout == again.stdout
    assert done.stdout.endswith("\n")
    assert all(line.startswith("proa: ") for line in done.stderr.splitlines())


@pytest.mark.parametrize("mode", [[], ["--chat", "--system", "s"]], ids=["text", "chat"])
def test_generate_json_has_text_usage_and_trace(call_proa, words, mode: list[str]) -> None:
    done = call_proa("generate", "a", *words, *mode, "--json", "--decoding", "adapt")
    assert done.stderr == ""
    answer = json.loads(done.stdout)
    assert answer.keys() == {"text", "finish_reason", "usage", "decoding_trace"}
    trace = answer["decoding_trace"]
    assert len(trace) == answer["usage"]["completion_tokens"]
    assert all(entry.keys() == FIELDS for entry in trace)


def test_generate_works_where_the_servers_key_is_set(run_proa, words) -> None:
    done = run_proa("generate", "ab", *words, variables={"PROA_API_KEY": "secret"})
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("extra", "match"),
    [
        (["--temperature", "9"], "temperature must be"),
        (["--decoding", "warm"], "decoding.strategy must be one of adapt, dry, dynatemp"),
        (["--decoding", '{"strategy": "adapt", "c": 1}'], "decoding.c is not a parameter"),
        (["--max-tokens", "-1"], "max_tokens must be"),
        (["--max-context", "4"], "no option --max-context"),
    ],
)
def test_generate_refuses_what_the_api_refuses(call_proa, words, extra, match: str) -> None:
    done = call_proa("generate", "ab", *words, *extra)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("proa: error: ")
    assert match in done.stderr
    assert "Traceback" not in done.stderr


def test_quantized_folder_can_be_generated_from(
    call_proa, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    done = call_proa("quantize", str(tiny_llama_folder), str(output), "--double-quant")
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == f"proa: serve it with: proa serve {output}"
    config = json.loads((output / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"]["bnb_4bit_use_double_quant"] is True
    done = call_proa("generate", "ab", "--model", str(output), "--max-tokens", "2")
    assert done.returncode == 0, done.stderr


def test_quantize_of_a_missing_model_is_status_2(call_proa, tmp_path: Path) -> None:
    done = call_proa("quantize", str(tmp_path / "none"), str(tmp_path / "out"))
    assert done.returncode == 2
    assert done.stderr.startswith("proa: error: ")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
