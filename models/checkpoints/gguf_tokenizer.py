"""Write the tokenizer of a GGUF file as tokenizer.json, with the splits of its own pre-tokenizer.

Source: the pre-tokenizer table of llama.cpp (MIT) and the tokenizer.json files it was made from.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from models.families import CheckpointError

_CONTROL, _USER_DEFINED, _NORMAL = 3, 4, 1
_UNDERLINE = "\u2581"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_DEEPSEEK_CODER = (
    r"[\r\n]",
    r"\s?\p{L}+",
    r"\s?\p{P}+",
    "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
    r"\p{N}",
)
_UNNAMED = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Split:
    """How text is cut before byte-pair merging.

    Attributes:
        build: makes the pre-tokenizer.
        ignore_merges: a piece that is a token needs no merges.
        adds_bos: what a file that does not say means.
        is_nfc: text is brought to Unicode form C first.
    """

    build: Callable[[], pre_tokenizers.PreTokenizer]
    ignore_merges: bool = False
    adds_bos: bool = False
    is_nfc: bool = False


def _by_patterns(*patterns: str) -> Callable[[], pre_tokenizers.PreTokenizer]:
    def build() -> pre_tokenizers.PreTokenizer:
        splits = [pre_tokenizers.Split(Regex(p), behavior="isolated") for p in patterns]
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([*splits, byte_level])

    return build


def _single_digits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


_LLAMA3_SPLIT = _Split(build=_by_patterns(_LLAMA3), ignore_merges=True, adds_bos=True)
_PRE_TOKENIZERS: Mapping[str, _Split] = {
    "smollm": _Split(build=_single_digits),
    "starcoder": _Split(build=_single_digits),
    "refact": _Split(build=_single_digits),
    "command-r": _Split(build=_single_digits),
    "gpt-2": _Split(build=_gpt2),
    "phi-2": _Split(build=_gpt2),
    "mpt": _Split(build=_gpt2),
    "olmo": _Split(build=_gpt2),
    "llama-bpe": _LLAMA3_SPLIT,
    "llama3": _LLAMA3_SPLIT,
    "llama-v3": _LLAMA3_SPLIT,
    "falcon3": _Split(build=_by_patterns(_LLAMA3), ignore_merges=True),
    "qwen2": _Split(build=_by_patterns(_QWEN2), is_nfc=True),
    "deepseek-r1-qwen": _Split(build=_by_patterns(_QWEN2), is_nfc=True),
    "deepseek-coder": _Split(build=_by_patterns(*_DEEPSEEK_CODER)),
    "tekken": _Split(build=_by_patterns(_TEKKEN), ignore_merges=True, adds_bos=True),
    "default": _Split(build=_by_patterns(*_UNNAMED)),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufVocabulary:
    """The tokenizer fields of a GGUF file.

    Attributes:
        path: the file, for messages.
        metadata: its key-value pairs.
    """

    path: Path
    metadata: Mapping[str, object]

    def field(self, name: str, default: object = None) -> object:
        """Return `tokenizer.ggml.NAME`."""
        return self.metadata.get(f"tokenizer.ggml.{name}", default)

    @property
    def tokens(self) -> list[str]:
        """Token texts by id."""
        return self._list("tokens")

    @property
    def token_types(self) -> list[int]:
        """ggml's token type by id."""
        if self.field("token_type") is None:
            return [_NORMAL] * len(self.tokens)
        return cast(list[int], self._list_by_id("token_type"))

    @property
    def scores(self) -> list[float]:
        """Log probability of each piece by id."""
        return cast(list[float], self._list_by_id("scores"))

    def _list_by_id(self, name: str) -> list[object]:
        value = cast(list[object], self._list(name))
        if len(value) != len(self.tokens):
            raise CheckpointError(
                f"{self.path}: tokenizer.ggml.{name} has {len(value)} entries for "
                f"{len(self.tokens)} tokens; the file is damaged, download or convert it again"
            )
        return value

    def _list(self, name: str) -> list[str]:
        value = self.field(name)
        if not isinstance(value, list) or not value:
            raise CheckpointError(f"{self.path}: tokenizer.ggml.{name} is missing")
        return value

    def token_id(self, name: str) -> int | None:
        """Return `tokenizer.ggml.NAME_token_id` if the file has a valid one."""
        value = self.field(f"{name}_token_id")
        is_valid = isinstance(value, int) and 0 <= value < len(self.tokens)
        return cast(int, value) if is_valid else None

    def merges(self) -> list[tuple[str, str]]:
        """Return the byte-pair merges in order."""
        return [cast(tuple[str, str], tuple(m.split(" ", 1))) for m in self._list("merges")]


def build_tokenizer(vocabulary: GgufVocabulary, report: Callable[[str], None]) -> Tokenizer:
    """Build the tokenizer of a GGUF file.

    Args:
        vocabulary: the file's tokenizer fields.
        report: told when the file does not name its pre-tokenizer.

    Raises:
        CheckpointError: the kind of vocabulary or the pre-tokenizer is not known.
    """
    kind = vocabulary.field("model")
    if kind == "gpt2":
        tokenizer, adds_bos = _build_byte_level(vocabulary, report)
    elif kind == "llama":
        tokenizer, adds_bos = _build_sentencepiece(vocabulary), True
    else:
        raise CheckpointError(
            f"{vocabulary.path}: tokenizer.ggml.model {kind!r} is not supported; "
            "supported: gpt2, llama"
        )
    for text, token_type in zip(vocabulary.tokens, vocabulary.token_types, strict=True):
        if token_type == _CONTROL:
            tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True)])
        elif token_type == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(text, normalized=False)])
    bos = vocabulary.token_id("bos")
    if bos is not None and vocabulary.field("add_bos_token", adds_bos):
        token = vocabulary.tokens[bos]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{token} $A",
            pair=f"{token} $A {token}:1 $B:1",
            special_tokens=[(token, bos)],
        )
    return tokenizer


def _build_byte_level(
    vocabulary: GgufVocabulary, report: Callable[[str], None]
) -> tuple[Tokenizer, bool]:
    name = vocabulary.field("pre", "default")
    if name not in _PRE_TOKENIZERS:
        raise CheckpointError(
            f"{vocabulary.path}: tokenizer.ggml.pre {name!r} is not supported, and a wrong split "
            "would change every prompt unseen; convert the original Hugging Face folder instead. "
            f"Supported: {', '.join(_PRE_TOKENIZERS)}"
        )
    if name == "default":
        report(
            f"warning: {vocabulary.path.name} does not name its pre-tokenizer: using "
            "llama.cpp's default"
        )
    split = _PRE_TOKENIZERS[str(name)]
    vocab = {token: i for i, token in enumerate(vocabulary.tokens)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=vocabulary.merges(), ignore_merges=split.ignore_merges)
    )
    if split.is_nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = split.build()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, split.adds_bos


def _build_sentencepiece(vocabulary: GgufVocabulary) -> Tokenizer:
    vocab = {token: i for i, token in enumerate(vocabulary.tokens)}
    unknown = vocabulary.token_id("unknown")
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=_merges_from_scores(vocabulary, vocab),
            unk_token=None if unknown is None else vocabulary.tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    has_prefix = bool(vocabulary.field("add_space_prefix", True))
    underline = normalizers.Replace(" ", _UNDERLINE)
    prefix = [normalizers.Prepend(_UNDERLINE)] if has_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, underline])
    strip = [decoders.Strip(content=" ", left=1)] if has_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_UNDERLINE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _merges_from_scores(
    vocabulary: GgufVocabulary, vocab: Mapping[str, int]
) -> list[tuple[str, str]]:
    """List the merges that make each piece, best-scored pieces first."""
    scores = vocabulary.scores
    ranked = []
    for token_id, (piece, kind) in enumerate(
        zip(vocabulary.tokens, vocabulary.token_types, strict=True)
    ):
        if kind != _NORMAL:
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab:
                ranked.append((-scores[token_id], token_id, vocab[left], vocab[right], left, right))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]


def save_gguf_tokenizer(
    vocabulary: GgufVocabulary, folder: Path, report: Callable[[str], None]
) -> None:
    """Write tokenizer.json, tokenizer_config.json and generation_config.json into a folder.

    Args:
        vocabulary: the file's tokenizer fields.
        folder: an existing folder.
        report: told about anything doubtful.

    Raises:
        CheckpointError: the tokenizer is of a kind that is not known, or damaged.
    """
    try:
        tokenizer = build_tokenizer(vocabulary, report)
    except CheckpointError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(
            f"{vocabulary.path}: no tokenizer can be made of its tokenizer.ggml fields ({error})"
        ) from error
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {key: vocabulary.token_id(name) for key, name in names.items()}
    config: dict[str, object] = {
        f"{key}_token": vocabulary.tokens[i] for key, i in ids.items() if i is not None
    }
    config |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    template = vocabulary.metadata.get("tokenizer.chat_template")
    if template:
        config["chat_template"] = template
    ends = [ids["eos"], vocabulary.token_id("eot"), vocabulary.token_id("eom")]
    generation: dict[str, object] = {
        "eos_token_id": list(dict.fromkeys(i for i in ends if i is not None))
    }
    generation |= {f"{k}_token_id": ids[k] for k in ("bos", "pad") if ids[k] is not None}
    for name, content in (("tokenizer_config", config), ("generation_config", generation)):
        text = json.dumps(content, indent=2, sort_keys=True)
        (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
