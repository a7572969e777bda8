import json
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
import transformers
from tokenizers import Tokenizer

from models.checkpoints import (
    CheckpointError,
    UnsupportedArchitectureError,
    load_checkpoint,
    worker,
)
from models.checkpoints.assembly import assemble_weights
from models.checkpoints.gguf_file import GgufFile
from models.checkpoints.gguf_model import GgufModel
from models.checkpoints.gguf_tokenizer import GgufVocabulary, build_tokenizer, save_gguf_tokenizer
from models.checkpoints.origins import find_origin, open_gguf
from models.weights import dense
from tests.models.gguf_files import (
    TEMPLATE,
    TOKENS,
    Metadata,
    metadata,
    write_gguf,
)


def vocabulary(**changes: object) -> GgufVocabulary:
    fields = {f"tokenizer.ggml.{k}": v for k, v in metadata(**changes).items()}
    fields["tokenizer.chat_template"] = TEMPLATE
    return GgufVocabulary(path=Path("x.gguf"), metadata=fields)


@pytest.fixture
def tiny_gguf(tiny_folder: Callable[..., Path], tmp_path: Path) -> Path:
    """A SmolLM-like file with Q8_0 matrices and as many tokens as the model has."""
    folder = tiny_folder("smollm", vocab_size=len(TOKENS))
    return write_gguf(tmp_path / "Tiny.Q8_0.gguf", folder, kinds=("Q8_0",))


@pytest.mark.parametrize("name", ["llama", "smollm", "llama-biased", "qwen2", "qwen3"])
def test_weights_and_spec_equal_those_of_the_folder(
    name: str, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_folder(name)
    expected = load_checkpoint(folder, quantization="none")
    source = open_gguf(write_gguf(tmp_path / "x.gguf", folder))
    weights = assemble_weights(source.description, source.reader, source.path)
    assert source.description.spec == expected.spec
    assert set(weights) == set(expected.weights)
    for key, weight in weights.items():
        assert torch.equal(dense(weight), dense(expected.weights[key])), key


def test_reading_equals_transformers(tiny_gguf: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_gguf.parent,
        gguf_file=tiny_gguf.name,
        quantization_config=transformers.GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    reader = GgufModel(GgufFile(tiny_gguf))
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":
            assert torch.equal(reader.read(name), tensor), name


def test_packed_tensors_are_stored_in_the_narrow_kind_that_errs_less(tiny_gguf: Path) -> None:
    reader = GgufModel(GgufFile(tiny_gguf))
    name = "model.embed_tokens.weight"
    assert reader.read_compact(name).dtype == torch.float16
    assert reader.read_compact("model.norm.weight").dtype == torch.float32
    torch.testing.assert_close(
        reader.read_compact(name).float(), reader.read(name), rtol=2**-11, atol=0
    )


def test_gguf_file_is_converted_with_its_tokenizer(tiny_gguf: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(tiny_gguf, quantization="none", cache_dir=tmp_path / "cache")
    assert checkpoint.name == "Tiny.Q8_0"
    exact = GgufModel(GgufFile(tiny_gguf)).read("model.layers.0.mlp.up_proj.weight")
    ours = checkpoint.weights["layers.0.up.weight"]
    torch.testing.assert_close(dense(ours), exact, rtol=2**-11, atol=0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint.folder)
    assert tokenizer.convert_ids_to_tokens(tokenizer("x123")["input_ids"]) == ["x", "1", "2", "3"]
    assert tokenizer.apply_chat_template([{"content": "hi"}], tokenize=False) == "hi"
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")


def test_error_in_the_converting_process_arrives(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_folder("smollm", vocab_size=len(TOKENS))
    path = write_gguf(tmp_path / "x.gguf", folder, pre="martian")
    with pytest.raises(CheckpointError, match=r"tokenizer\.ggml\.pre 'martian' is not supported"):
        load_checkpoint(path, cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache" / "checkpoints").iterdir())


def test_llama3_rope_factors_are_recognised(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    folder = tiny_folder("llama", head_dim=64, rope_parameters=rope)
    rotary = load_checkpoint(folder, quantization="none").spec.rotary
    assert rotary is not None
    factors = 500000.0 ** -(torch.arange(0, 64, 2) / 64) / torch.tensor(rotary.inv_freq)
    source = open_gguf(write_gguf(tmp_path / "x.gguf", folder, rope_factors=factors))
    assert source.description.spec.rotary == rotary
    other = write_gguf(tmp_path / "y.gguf", folder, rope_factors=factors + 1)
    with pytest.raises(CheckpointError, match="not the scaling of Llama 3"):
        open_gguf(other)


@pytest.mark.parametrize("keep", [3, 30, 700, 50_000], ids=str)
def test_truncated_file_is_refused(tiny_gguf: Path, keep: int) -> None:
    tiny_gguf.write_bytes(tiny_gguf.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"Tiny.*(not a GGUF file|truncated)"):
        GgufFile(tiny_gguf)


def test_unknown_version_is_refused(tiny_gguf: Path) -> None:
    data = bytearray(tiny_gguf.read_bytes())
    data[4] = 9
    tiny_gguf.write_bytes(data)
    with pytest.raises(CheckpointError, match="GGUF version 9 is not supported"):
        GgufFile(tiny_gguf)


def test_other_architecture_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UnsupportedArchitectureError, match=r"'mamba' is not.*llama, qwen2, qwen3"):
        open_gguf(tmp_path / "x.gguf")


def ids_to_tokens(tokenizer: Tokenizer, text: str) -> list[str]:
    return tokenizer.encode(text).tokens


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("smollm", ["1", "2", "3", "ab", "<|im_end|>"]),
        ("gpt-2", ["123", "ab", "<|im_end|>"]),
        ("qwen2", ["1", "2", "3", "ab", "<|im_end|>"]),
        ("default", ["123", "ab", "<|im_end|>"]),
        ("llama-bpe", ["<|im_start|>", "123", "ab", "<|im_end|>"]),
    ],
)
def test_pre_tokenizer_splits_digits_as_its_model_does(pre: str, expected: list[str]) -> None:
    assert ids_to_tokens(build_tokenizer(vocabulary(pre=pre), print), "123ab<|im_end|>") == expected


def test_bos_is_added_when_the_file_says_so() -> None:
    tokenizer = build_tokenizer(vocabulary(add_bos_token=True), print)
    assert ids_to_tokens(tokenizer, "a") == ["<|im_start|>", "a"]
    tokenizer = build_tokenizer(vocabulary(pre="llama-bpe", add_bos_token=False), print)
    assert ids_to_tokens(tokenizer, "a") == ["a"]


def test_unnamed_pre_tokenizer_is_warned_about() -> None:
    lines: list[str] = []
    build_tokenizer(vocabulary(pre="default"), lines.append)
    assert lines == ["warning: x.gguf does not name its pre-tokenizer: using llama.cpp's default"]


@pytest.mark.parametrize("text", ["", " a\n b", "caf\u00e9 \u4e2d\u6587 \U0001f600", "def f(x):\n"])
def test_byte_level_text_round_trips(text: str) -> None:
    tokenizer = build_tokenizer(vocabulary(), print)
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_sentencepiece_merges_follow_the_scores() -> None:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    pieces += ["\u2581", "a", "b", "c", "ab", "bc", "abc", "\u2581abc"]
    scores = [0.0] * 259 + [-9.0, -9.0, -9.0, -9.0, -2.0, -1.0, -3.0, -4.0]
    tokenizer = build_tokenizer(
        vocabulary(
            model="llama",
            pre="default",
            tokens=pieces,
            scores=scores,
            token_type=[2, 3, 3] + [6] * 256 + [1] * 8,
        ),
        print,
    )
    assert ids_to_tokens(tokenizer, "abc abcb") == ["<s>", "\u2581abc", "\u2581abc", "b"]
    assert ids_to_tokens(tokenizer, "ab")[1:] == ["\u2581", "ab"]
    assert ids_to_tokens(tokenizer, "\u00e9")[1:] == ["\u2581", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("abc \u00e9 c").ids) == "abc \u00e9 c"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre": "martian"}, r"ggml\.pre 'martian' is not supported.*Supported: smollm"),
        ({"model": "bert"}, r"ggml\.model 'bert' is not supported; supported: gpt2, llama"),
        ({"merges": None}, r"tokenizer\.ggml\.merges is missing"),
        ({"token_type": [1, 1]}, r"token_type has 2 entries for \d+ tokens; the file is damaged"),
        ({"model": "llama", "scores": [0.0]}, r"scores has 1 entries for \d+ tokens"),
    ],
    ids=["pre", "model", "merges", "types", "scores"],
)
def test_unknown_tokenizer_is_refused(changes: Metadata, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        build_tokenizer(vocabulary(**changes), print)


def test_end_of_turn_counts_as_an_end_token(tmp_path: Path) -> None:
    save_gguf_tokenizer(vocabulary(eos_token_id=0, eot_token_id=2), tmp_path, print)
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [0, 2]


def test_merges_that_fit_no_token_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"x\.gguf: no tokenizer can be made of its"):
        save_gguf_tokenizer(vocabulary(merges=["nothing here"]), tmp_path, print)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("import os; os.kill(os.getpid(), 9)", r"exit code -9: it was killed, as happens when mem"),
        ("raise SystemExit('no reason')", r"exit code 1: no reason"),
    ],
    ids=["killed", "exit"],
)
def test_end_of_the_converting_process_is_told(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, message: str
) -> None:
    monkeypatch.setattr(worker, "_PROGRAM", program)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tiny_gguf, cache_dir=tmp_path / "cache")


def test_fault_in_the_converting_process_is_one_line(tiny_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"converting it failed \(\w+: Not a directory"):
        worker.convert_apart(tiny_gguf, tmp_path / "file", "none", report=print)


@pytest.fixture
def split_gguf(tiny_folder: Callable[..., Path], tmp_path: Path) -> list[Path]:
    """The parts of a split file."""
    folder = tiny_folder("smollm", vocab_size=len(TOKENS))
    write_gguf(tmp_path / "Tiny.gguf", folder, kinds=("Q8_0",), tensors_per_part=8)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert [part.name for part in parts] == [f"Tiny-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    return parts


def test_split_file_holds_what_the_whole_one_does(
    split_gguf: list[Path], tiny_gguf: Path, tmp_path: Path
) -> None:
    whole = GgufModel(GgufFile(tiny_gguf))
    for named in split_gguf:
        split = GgufModel(GgufFile(named))
        assert split.file.path == split_gguf[0]
        assert split.config() == whole.config()
        assert {n: split.read(n).tolist() for n in split.shapes} == {
            n: whole.read(n).tolist() for n in whole.shapes
        }


def test_split_file_is_one_model_whichever_part_is_named(split_gguf: list[Path]) -> None:
    origins = [find_origin(part, print) for part in split_gguf]
    assert {(origin.name, origin.path) for origin in origins} == {("Tiny", split_gguf[0])}
    before = origins[0].identity()
    split_gguf[2].write_bytes(split_gguf[2].read_bytes() + b"x")
    assert origins[0].identity() != before


def test_split_file_is_converted(split_gguf: list[Path], tmp_path: Path) -> None:
    loaded = load_checkpoint(split_gguf[1], quantization="none", cache_dir=tmp_path / "cache")
    exact = GgufModel(GgufFile(split_gguf[0])).read("model.layers.0.mlp.up_proj.weight")
    torch.testing.assert_close(
        dense(loaded.weights["layers.0.up.weight"]), exact, rtol=2**-11, atol=0
    )


def test_missing_part_is_named(split_gguf: list[Path]) -> None:
    split_gguf[1].unlink()
    with pytest.raises(CheckpointError, match=r"part of 3; missing beside it: Tiny-00002-of-00003"):
        load_checkpoint(split_gguf[2])


def test_part_under_another_name_is_refused(split_gguf: list[Path]) -> None:
    renamed = split_gguf[0].rename(split_gguf[0].with_name("model.gguf"))
    with pytest.raises(
        CheckpointError, match=r"3 parts, its name that it has 1; name them NAME-000"
    ):
        GgufFile(renamed)
