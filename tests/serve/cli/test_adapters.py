"""`proa adapters`, and an adapter in `proa generate`."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters.format import digest

ENTRY = {
    "id": "tiny:poet", "object": "adapter", "name": "poet", "kind": "side_network",
    "description": "rhymes", "num_parameters": 1234, "num_bytes": 5_000_000, "is_loaded": True,
    "num_running": 0, "created": 1,
}  # fmt: skip


@pytest.fixture
def adapter(write_adapter, tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapters" / "poet")


@pytest.fixture
def model(tiny_llama_folder: Path) -> list[str]:
    return ["--model", str(tiny_llama_folder), "--quantization", "none"]


def test_list_asks_the_server(call_proa, server) -> None:
    server.adapters = [
        ENTRY,
        {**ENTRY, "id": "tiny:b", "is_loaded": False, "description": ""},
        {**ENTRY, "id": "tiny:c", "num_running": 2, "description": "a\x1b[2Jb"},
    ]
    done = call_proa("adapters", "list", "--url", server.url, "--api-key", "k")
    assert done.returncode == 0
    _, first, second, third = done.stdout.splitlines()
    assert first.split() == ["tiny:poet", "side", "network", "1234", "5.0", "loaded", "rhymes"]
    assert second.endswith("waits on disk")
    assert third.endswith("in use by 2  a?[2Jb")
    assert server.keys == ["Bearer k"]


def test_list_shows_variants_and_what_sits_on_them(call_proa, server) -> None:
    variant = {**ENTRY, "kind": "variant", "removed": 0.4, "speed": 1.274, "on": None}
    healed = {**ENTRY, "on": "small", "removed": None, "speed": None, "description": ""}
    server.adapters = [{**variant, "id": "tiny:small"}, {**healed, "id": "tiny:healed"}]
    done = call_proa("adapters", "list", "--url", server.url)
    _, first, second = done.stdout.splitlines()
    assert first.endswith("loaded, 40% removed, 1.27x the base  rhymes")
    assert second.endswith("loaded, on small")


def test_list_of_a_server_without_adapters_says_how_to_attach_one(call_proa, server) -> None:
    done = call_proa("adapters", "list", "--url", server.url)
    assert "proa serve --adapter NAME=DIR" in done.stdout


def test_list_finds_adapters_below_folders(call_proa, adapter: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "adapters" / "damaged"
    damaged.mkdir()
    (damaged / "adapter_config.json").write_text("{", encoding="utf-8")
    done = call_proa("adapters", "list", str(tmp_path))
    first, second = done.stdout.splitlines()
    assert first.startswith(f"{damaged}  damaged: ")
    assert second.startswith(f"{adapter}  QST side network, ")
    assert second.endswith("for tiny-llama: side network 0")
    assert (
        call_proa("adapters", "list", str(tmp_path / "adapters" / "poet" / "none")).returncode == 2
    )


def test_inspect_prints_the_card(call_proa, adapter: Path) -> None:
    done = call_proa("adapters", "inspect", str(adapter))
    assert done.returncode == 0
    rows = dict(line.split("  ", 1) for line in done.stdout.splitlines())
    rows = {name: value.strip() for name, value in rows.items()}
    assert (rows["method"], rows["kind"]) == ("qst: QST side network", "side network")
    assert rows["description"] == "side network 0"
    assert rows["base"] == "tiny-llama, quantization none"
    assert len(rows["fingerprint"]) == len(rows["digest"]) == 64
    assert rows["reduction"] == "4, downsample adapter of rank 4"
    assert rows["task"] == "causal_lm"
    assert rows["share of base"] == "0.2500"
    assert rows["mix gates"] == "0.5000 (0.5000 to 0.5000)"
    assert rows["training: steps"] == "0"
    num_parameters = sum(
        t.numel() for t in load_file(adapter / "adapter_model.safetensors").values()
    )
    assert rows["numbers"].startswith(f"{num_parameters}, ")


def test_verify_says_that_it_fits(call_proa, adapter: Path, model: list[str]) -> None:
    done = call_proa("adapters", "verify", str(adapter), *model)
    assert done.returncode == 0
    assert done.stdout.startswith(f"{adapter} fits tiny-llama (fingerprint ")


def test_verify_names_every_mismatch(
    call_proa, write_adapter, model: list[str], tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path / "a", fingerprint="0" * 64)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors["alpha"]
    tensors["gamma"] = torch.zeros(7)
    tensors["up.weight"][0, 0] = torch.nan
    save_file({**tensors, "extra": torch.zeros(1)}, path)
    done = call_proa("adapters", "verify", str(folder), *model)
    assert done.returncode == 1
    (error,) = [line for line in done.stderr.splitlines() if "error" in line]
    for part in (
        "fingerprint 000000000000", "alpha: missing", "gamma: shape (7,)", "up.weight: holds",
        "extra: not a tensor",
    ):  # fmt: skip
        assert part in error


@pytest.fixture
def variant(write_variant, tmp_path: Path) -> Path:
    return write_variant(tmp_path / "variants" / "small")


def test_list_finds_variants_below_folders(call_proa, variant: Path) -> None:
    done = call_proa("adapters", "list", str(variant.parent))
    assert re.search(
        r"small  pruned variant, \d\.\d kB, for tiny-llama: variant 0$", done.stdout.rstrip("\n")
    )


def test_inspect_prints_the_card_of_a_variant(call_proa, variant: Path) -> None:
    done = call_proa("adapters", "inspect", str(variant))
    assert done.returncode == 0, done.stderr
    rows = dict(line.split("  ", 1) for line in done.stdout.splitlines())
    rows = {name: value.strip() for name, value in rows.items()}
    assert (rows["method"], rows["kind"]) == ("disp: pruned variant", "variant")
    assert len(rows["fingerprint"]) == len(rows["digest"]) == 64
    assert rows["after"] == "nothing: attaches to the base itself"
    assert rows["removed of linears"] == "66.7%"
    assert float(rows["removed of model"].rstrip("%")) < 66.7
    assert rows["residual channels"] == "independent"
    assert rows["widths"] == "of 2 layers, multiples of 8"
    assert rows["widths: attn_in"] == "16.0 (16 to 16)"
    assert rows["widths: mlp_mid"] == "32.0 (32 to 32)"
    assert rows["numbers"].startswith(f"{2 * (4 * 16 + 32)}, ")
    assert rows["training: steps"] == "0"


def test_verify_holds_a_variant_against_the_base(
    call_proa, variant: Path, write_variant, model: list[str], tmp_path: Path
) -> None:
    done = call_proa("adapters", "verify", str(variant), *model)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{variant} fits tiny-llama (fingerprint ")
    other = write_variant(tmp_path / "other", fingerprint="0" * 64)
    done = call_proa("adapters", "verify", str(other), *model)
    assert done.returncode == 1
    assert "does not fit tiny-llama: " in done.stderr
    assert "fingerprint 000000000000" in done.stderr
    done = call_proa("adapters", "verify", str(variant), "--on", str(variant), *model)
    assert done.returncode == 2
    assert f"--on: {variant}: is no part of the chain, which is the base itself" in done.stderr


def test_verify_holds_a_side_network_against_its_variant(
    call_proa, variant: Path, write_adapter, write_variant, model: list[str], tmp_path: Path
) -> None:
    healed = write_adapter(tmp_path / "healed", on=variant)
    done = call_proa("adapters", "verify", str(healed), "--on", str(variant), *model)
    assert done.returncode == 0, done.stderr
    assert f"{healed} fits tiny-llama with the variant {variant} " in done.stdout
    done = call_proa("adapters", "verify", str(healed), *model)
    assert done.returncode == 2
    assert f"was made for the base with {digest(variant)[:12]}; give those with --on" in done.stderr
    other = write_variant(tmp_path / "other", seed=1)
    done = call_proa("adapters", "verify", str(healed), "--on", str(other), *model)
    assert done.returncode == 2
    assert f"give the folder of {digest(variant)[:12]}, too" in done.stderr
    done = call_proa("adapters", "verify", str(healed), "--on", str(healed), *model)
    assert done.returncode == 2
    assert f"give the folder of {digest(variant)[:12]}, too" in done.stderr


@pytest.mark.parametrize(
    ("words", "status", "match"),
    [
        (["inspect", "tests"], 1, "no adapter; adapter_config.json is missing"),
        (["verify", "tests"], 1, "no adapter; adapter_config.json is missing"),
        (["list", "no/such/folder"], 2, "FOLDER: no/such/folder is not a folder"),
        (["list", "tests", "--url", "x"], 2, "give them or folders"),
        (["list", "--url", "http://127.0.0.1:1"], 1, "no server answers"),
        (["list", "--ulr", "x"], 2, "no option --ulr"),
        (["inspect"], 2, "the following arguments are required: DIR"),
        ([], 2, "the following arguments are required: ACTION"),
        (["inspekt"], 2, "invalid choice: 'inspekt'"),
    ],
)
def test_mistake_is_one_line(call_proa, words: list[str], status: int, match: str) -> None:
    done = call_proa("adapters", *words)
    assert done.returncode == status
    assert done.stderr.startswith("proa: error: ")
    assert done.stderr.count("\n") == 1
    assert match in done.stderr


def test_generate_answers_with_the_adapter(call_proa, adapter: Path, model: list[str]) -> None:
    words = ["generate", "abc", *model, "--max-tokens", "8", "--temperature", "0", "--json"]

    def text(*more: str) -> str:
        done = call_proa(*words, *more)
        assert done.returncode == 0, done.stderr
        return str(json.loads(done.stdout)["text"])

    base, blended = text(), text("--adapter", f"poet={adapter}")
    assert blended != base
    assert text("--adapter", f"poet={adapter}", "--adapter-scale", "0") == base
    assert text("--adapter", f"poet={adapter}", "--adapter-scale", "1") == blended


def test_generate_answers_with_a_variant_and_with_what_sits_on_it(
    call_proa, variant: Path, write_adapter, model: list[str], tmp_path: Path
) -> None:
    words = ["generate", "abc", *model, "--max-tokens", "8", "--temperature", "0", "--json",
             "--cache-dir", str(tmp_path)]  # fmt: skip
    healed = write_adapter(tmp_path / "healed", on=variant)

    def text(*more: str) -> str:
        done = call_proa(*words, *more)
        assert done.returncode == 0, done.stderr
        return str(json.loads(done.stdout)["text"])

    on = ["--variant", f"small={variant}"]
    base, pruned = text(), text(*on)
    assert pruned != base
    on += ["--adapter", f"healed={healed}"]
    assert text(*on) != pruned
    assert text(*on, "--adapter-scale", "0") == pruned


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--variant", "small"], "--variant: 'small' is not NAME=DIR"),
        (["--variant", "a=no/such/folder"], "variant: a: no/such/folder is not a folder"),
        (["--variant", "a=tests"], "adapter 'a': "),
        (["--adapter", "poet"], "--adapter: 'poet' is not NAME=DIR"),
        (["--adapter", "poet=no/such/folder"], "adapter: poet: no/such/folder is not a folder"),
        (["--adapter", "a/b=tests"], "adapter name must be"),
        (["--adapter", "a=tests"], "adapter 'a': "),
        (["--adapter-scale", "0.5"], "adapter_scale needs a model id with a side network"),
        (["--adapter-scale", "nan"], "--adapter-scale: nan is not a finite number"),
    ],
)
def test_generate_refuses_a_bad_adapter(
    call_proa, model: list[str], words: list[str], match: str
) -> None:
    done = call_proa("generate", "abc", *model, "--max-tokens", "1", *words)
    assert done.returncode == 2
    assert match in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
