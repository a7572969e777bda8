"""Tokenizer of a model folder: text to token ids and back, chat templates, fill-in-the-middle."""

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from text.chat_template import ChatTemplate, ChatTemplateError, load_chat_template
from text.detokenizer import Detokenizer, build_token_texts
from text.errors import TextTooLongError, TokenOutsideVocabularyError
from text.fim import FIM_SPELLINGS, find_fim_tokens
from text.special_tokens import end_token_ids, named_tokens
from text.token_bytes import TokenizerError, build_token_bytes, find_misread

_CONTROL_SHAPE = re.compile(r"<[|\uff5c].*[|\uff5c]>")
_LONG_TEXT_CHARS = 20_000
_MAX_NAMED_TOKENS = 5
_MAX_COMPOSED_CHARS = 4  # that Unicode normalisation makes one of


class Tokenizer:
    """Text to token ids and back, as the model was trained with.

    Control tokens are the added tokens marked special, those spelt `<|...|>` and the
    fill-in-the-middle markers. Text that merely looks like one stays text unless the caller allows
    it: a second tokenizer knows control tokens only behind a random mark, which is put before those
    that the chat template writes.

    Attributes:
        eos_token_ids: tokens that end a text; the first closes one in training.

    Args:
        description: contents of `tokenizer.json`.
        chat_template: template for conversations.
        num_embeddings: tokens that the model has embeddings for; text that spells a token beyond
            them is refused. None: not known, nothing is refused.

    Raises:
        TokenizerError: the files are broken or the kind of tokenizer is not supported.
    """

    def __init__(
        self,
        description: Mapping[str, Any],
        *,
        chat_template: ChatTemplate | None = None,
        num_embeddings: int | None = None,
    ) -> None:
        self._description = {**description, "truncation": None, "padding": None}
        try:
            self._library = tokenizers.Tokenizer.from_str(json.dumps(self._description))
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"tokenizer.json is broken: {error}") from error
        self.chat_template = chat_template
        self.fim_tokens = find_fim_tokens(self._library.token_to_id)
        self._control_texts = _find_control_tokens(description.get("added_tokens", []))
        self.control_ids = frozenset(self._control_texts)
        unknown = description.get("model", {}).get("unk_token")
        self._unwanted_ids = self.control_ids - {self._library.token_to_id(unknown or "")}
        self._mark = f"\ue000{secrets.token_hex(16)}\ue001"
        self._marked = self._build_marked()
        self._control_pattern = re.compile(
            "|".join(
                re.escape(text)
                for text in sorted(self._control_texts.values(), key=len, reverse=True)
            )
            or r"(?!)"
        )
        self.eos_token_ids: tuple[int, ...] = ()
        self._num_embeddings = num_embeddings

    @classmethod
    def from_folder(cls, folder: Path | str, *, num_embeddings: int | None = None) -> "Tokenizer":
        """Load a model folder's tokenizer.

        Args:
            folder: has `tokenizer.json`; `tokenizer_config.json`, `special_tokens_map.json`,
                `chat_template.jinja`, `generation_config.json` and `config.json` are read where
                they exist.
            num_embeddings: see the class.

        Raises:
            TokenizerError: `tokenizer.json` is missing, or a file is broken.
            ChatTemplateError: the chat template is no Jinja template.
        """
        folder = Path(folder)
        description = _load_json(folder / "tokenizer.json")
        if not description:
            raise TokenizerError(f"{folder}: no tokenizer.json")
        settings = _load_json(folder / "tokenizer_config.json")
        named = named_tokens(settings, _load_json(folder / "special_tokens_map.json"))
        tokenizer = cls(
            description,
            chat_template=load_chat_template(folder, settings, named),
            num_embeddings=num_embeddings,
        )
        tokenizer.eos_token_ids = end_token_ids(
            _load_json(folder / "generation_config.json"),
            _load_json(folder / "config.json"),
            tokenizer._library.token_to_id(named.get("eos_token", "")),
        )
        return tokenizer

    @cached_property
    def tokens_outside(self) -> Mapping[int, str]:
        """Tokens that the model has no embeddings for, by id."""
        size = self.vocab_size
        first = size if self._num_embeddings is None else self._num_embeddings
        texts = ((i, self._library.id_to_token(i)) for i in range(first, size))
        return {i: text for i, text in texts if text is not None}

    def warnings(self) -> list[str]:
        """Return what whoever serves the model should know about its files."""
        lines = []
        if not self.eos_token_ids:
            lines.append("the model names no end token: answers run until max_tokens")
        if outside := self.tokens_outside:
            names = ", ".join(map(repr, list(outside.values())[:_MAX_NAMED_TOKENS]))
            more = ", ..." if len(outside) > _MAX_NAMED_TOKENS else ""
            lines.append(
                f"the model has no embeddings for {len(outside)} of the tokenizer's tokens "
                f"({names}{more}): text that spells one is refused"
            )
        if self.chat_template is not None:
            if self.chat_template.fault is not None:
                lines.append(f"chats will fail: {self.chat_template.fault}")
            lines += [
                f"the chat template shows nothing of messages of the role {role}"
                for role in sorted(self.chat_template.unread_roles)
            ]
        return lines

    @cached_property
    def vocab_size(self) -> int:
        """Largest id plus one; the model's vocabulary may be padded beyond it."""
        return len(self._token_bytes)

    @cached_property
    def _token_bytes(self) -> list[bytes | None]:
        vocabulary = self._library.get_vocab(with_added_tokens=True)
        return build_token_bytes(self._description, vocabulary, self.control_ids)

    @cached_property
    def _misread_ids(self) -> frozenset[int]:
        """Added tokens that the library's decoder takes for the spelling of other bytes."""
        return find_misread(self._description)

    @cached_property
    def _token_texts(self) -> list[str | None]:
        return build_token_texts(self._token_bytes)

    def token_bytes(self) -> list[bytes | None]:
        """Return the bytes of each id, None for control tokens and unused ids; read-only."""
        return self._token_bytes

    def token_text(self, token_id: int) -> str | None:
        """Return a token's text, spelt out for control tokens; None if it is no whole UTF-8."""
        if token_id in self._control_texts:
            return self._control_texts[token_id]
        return self._token_texts[token_id] if token_id < self.vocab_size else ""

    def make_detokenizer(self) -> Detokenizer:
        """Return a detokeniser for a new sequence."""
        return Detokenizer(self._token_bytes, self._token_texts)

    @cached_property
    def _max_token_chars(self) -> int:
        """Most characters of a text that one token can stand for."""
        longest = max((len(data) for data in self._token_bytes if data), default=1)
        normalizer = json.dumps(self._description.get("normalizer"))
        kinds = set(re.findall(r'"type": "(\w+)"', normalizer))
        is_shrinking = not kinds <= {"Sequence", "Prepend", "Replace"}
        return longest * (_MAX_COMPOSED_CHARS if is_shrinking else 1)

    def _check_length(self, text: str, limit: int | None) -> None:
        if limit is not None and len(text) // self._max_token_chars > limit:
            raise TextTooLongError(len(text) // self._max_token_chars, limit)

    def encode(
        self,
        text: str,
        *,
        allow_special: bool = False,
        add_special_tokens: bool = False,
        limit: int | None = None,
    ) -> list[int]:
        """Encode text.

        Args:
            text: without lone surrogates.
            allow_special: text spelt like a control token becomes that token.
            add_special_tokens: add what the tokenizer puts around a text (BOS).
            limit: refuse, before any work, a text that must have more tokens.

        Raises:
            TextTooLongError: the text is certainly over `limit`.
            TokenOutsideVocabularyError: it spells a token that the model has no embedding for.
        """
        self._check_length(text, limit)
        if allow_special:
            ids = list(_encode(self._library, text, add_special_tokens=add_special_tokens))
            return self._check_ids(ids)
        return self._encode_marked(text, add_special_tokens=add_special_tokens)

    def _check_ids(self, token_ids: list[int]) -> list[int]:
        if self.tokens_outside and max(token_ids, default=0) >= next(iter(self.tokens_outside)):
            bad = next(i for i in token_ids if i in self.tokens_outside)
            assert self._num_embeddings is not None
            raise TokenOutsideVocabularyError(self.tokens_outside[bad], bad, self._num_embeddings)
        return token_ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Decode a whole text, control tokens spelt out, as the library means to do."""
        first = len(token_ids)
        if self._misread_ids:
            first = next((n for n, i in enumerate(token_ids) if i in self._misread_ids), first)
        text = self._library.decode(token_ids[:first], skip_special_tokens=False)
        return text + self._join(token_ids[first:], self._control_texts)

    def decode_bytes(self, token_ids: Sequence[int]) -> str:
        """Decode the continuation of a text: the tokens' bytes joined, control tokens left out."""
        return self._join(token_ids, {})

    def _join(self, token_ids: Sequence[int], control_texts: Mapping[int, str]) -> str:
        table = self._token_bytes
        data = (
            control_texts[i].encode() if i in control_texts else table[i] or b""
            for i in token_ids
            if i < len(table)
        )
        return b"".join(data).decode(errors="replace")

    def render_chat(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
    ) -> str:
        """Return the text of a conversation as the chat template writes it.

        Raises:
            ChatTemplateError: there is no template, or it refuses the conversation.
        """
        if self.chat_template is None:
            raise ChatTemplateError("The model has no chat template; use /v1/completions.")
        return self.chat_template.render(messages, add_generation_prompt=add_generation_prompt)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        add_generation_prompt: bool = True,
        add_special_tokens: bool = False,
        limit: int | None = None,
    ) -> list[int]:
        """Return the token ids of a conversation.

        The template's control tokens become their ids; the same spellings inside messages stay
        text. Without such spellings the result equals encoding the rendered text.

        Raises:
            ChatTemplateError: there is no template, or it refuses the conversation.
            TextTooLongError: the rendered text is certainly over `limit` tokens.
            TokenOutsideVocabularyError: see `encode`.
        """
        held: list[str] = []

        def hold(match: re.Match[str]) -> str:
            held.append(match[0])
            return f"{self._mark}{len(held) - 1}\ue002"

        safe = [
            {key: self._control_pattern.sub(hold, value) for key, value in message.items()}
            for message in messages
        ]
        text = self.render_chat(safe, add_generation_prompt=add_generation_prompt)
        self._check_length(text, limit)
        text = self._control_pattern.sub(lambda match: self._mark + match[0], text)
        if held:
            slots = re.compile(re.escape(self._mark) + "([0-9]+)\ue002")
            text = slots.sub(lambda match: held[int(match[1])], text)
        return self._encode_marked(text, add_special_tokens=add_special_tokens)

    def encode_infill(
        self,
        prefix: str,
        suffix: str,
        *,
        add_special_tokens: bool = True,
        limit: int | None = None,
    ) -> list[int]:
        """Return the prompt that asks for the text between `prefix` and `suffix`.

        Raises:
            TokenizerError: the vocabulary has no fill-in-the-middle tokens.
            TextTooLongError: the text is certainly over `limit` tokens.
            TokenOutsideVocabularyError: see `encode`; or a marker is such a token.
        """
        self._check_length(prefix + suffix, limit)
        fim = self.fim_tokens
        if fim is None:
            raise TokenizerError("the model has no fill-in-the-middle tokens")
        return self._check_ids(
            [
                *self.encode("", add_special_tokens=add_special_tokens),
                fim.prefix_id,
                *self.encode(prefix),
                fim.suffix_id,
                *self._encode_continuation(suffix),
                fim.middle_id,
            ]
        )

    def _encode_continuation(self, text: str) -> list[int]:
        """Encode without the space that SentencePiece-like tokenizers put before a text."""
        guard = "\u263a"
        if self.decode(self.encode(guard)) == self.decode_bytes(self.encode(guard)):
            return self.encode(text)
        return self.encode(guard + text)[len(self.encode(guard)) :]

    def _build_marked(self) -> tuple[tokenizers.Tokenizer, dict[int, int]]:
        """Return the tokenizer of marked control tokens, and a map from its ids to the model's."""
        library = tokenizers.Tokenizer.from_str(
            json.dumps({**self._description, "added_tokens": []})
        )
        tokens, ids = [], []
        for entry in self._description.get("added_tokens", []):
            flags = {key: entry[key] for key in ("single_word", "lstrip", "rstrip", "normalized")}
            text = entry["content"]
            if entry["id"] in self._control_texts:
                text = self._mark + text
                flags.update(normalized=False, single_word=False)
            tokens.append(tokenizers.AddedToken(text, **flags))
            ids.append(entry["id"])
        library.add_tokens(tokens)
        vocabulary = library.get_added_tokens_decoder()
        new_id = {token.content: token_id for token_id, token in vocabulary.items()}
        return library, {
            new_id[token.content]: token_id for token, token_id in zip(tokens, ids, strict=True)
        }

    def _encode_marked(self, text: str, *, add_special_tokens: bool) -> list[int]:
        library, id_of = self._marked
        ids: list[int] = []
        for token_id in _encode(library, text, add_special_tokens=False):
            if token_id in self._unwanted_ids and token_id not in id_of:
                ids += self._spell(token_id)
            else:
                ids.append(id_of.get(token_id, token_id))
        if add_special_tokens:
            ids = [*self._around[0], *ids, *self._around[1]]
        return self._check_ids(ids)

    @cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        """What the tokenizer's post-processor puts before and after a text."""
        body = list(self._library.encode("a", add_special_tokens=False).ids)
        whole = list(self._library.encode("a", add_special_tokens=True).ids)
        start = next(i for i in range(len(whole)) if whole[i : i + len(body)] == body)
        return whole[:start], whole[start + len(body) :]

    def _spell(self, token_id: int) -> list[int]:
        """Encode a control token's spelling where the merges of the vocabulary would make it."""
        library, _ = self._marked
        ids: list[int] = []
        for char in self._control_texts[token_id]:
            char_id = library.token_to_id(char)
            encoded = library.encode(char, add_special_tokens=False).ids
            ids += encoded if char_id is None else [char_id]
        return ids


def _encode(library: tokenizers.Tokenizer, text: str, *, add_special_tokens: bool) -> Sequence[int]:
    if len(text) < _LONG_TEXT_CHARS:
        return library.encode(text, add_special_tokens=add_special_tokens).ids
    # Only the batch call lets other threads run meanwhile.
    (encoding,) = library.encode_batch_fast([text], add_special_tokens=add_special_tokens)
    return encoding.ids


def _find_control_tokens(added_tokens: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    fim = {name for spelling in FIM_SPELLINGS for name in spelling}
    return {
        entry["id"]: entry["content"]
        for entry in added_tokens
        if entry["special"] or entry["content"] in fim or _CONTROL_SHAPE.fullmatch(entry["content"])
    }


def _load_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizerError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: not a JSON object")
    return value
