"""What text becomes at every entrance: begin tokens, and tokens that the model lacks."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Library
from tokenizers import processors

from serve.api import ApiSettings, create_app
from text.tokenizer import Tokenizer

from .conftest import END, Client, FakeBackend, check_error, write_tokenizer

BOS = 0
USER = {"role": "user", "content": "hi"}
ARMS = [{"model": "smollm2"}]


@pytest.fixture(scope="module")
def bos_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer that begins a text with a token, and knows one that the model lacks."""
    folder = write_tokenizer(tmp_path_factory.mktemp("bos"), "[PAD]")
    library = Library.from_file(str(folder / "tokenizer.json"))
    library.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", BOS)]
    )
    library.save(str(folder / "tokenizer.json"))
    return Tokenizer.from_folder(folder, num_embeddings=library.get_vocab_size() - 1)


@pytest.fixture
def bos_backend(bos_tokenizer: Tokenizer) -> FakeBackend:
    return FakeBackend(vocab_size=bos_tokenizer.vocab_size - 1, script=lambda *_: [END])


@pytest.fixture
def bos_client(bos_tokenizer: Tokenizer, bos_backend: FakeBackend) -> Client:
    return Client(create_app(bos_backend, bos_tokenizer, settings=ApiSettings(model_id="smollm2")))


ENTRANCES = {
    "completion": ("/v1/completions", {"prompt": "hi"}, True),
    "chat": ("/v1/chat/completions", {"messages": [USER]}, False),
    "compare-prompt": ("/v1/compare", {"prompt": "hi", "arms": ARMS}, True),
    "compare-messages": ("/v1/compare", {"messages": [USER], "arms": ARMS}, False),
    "tokenize-prompt": ("/tokenize", {"prompt": "hi"}, True),
    "tokenize-messages": ("/tokenize", {"messages": [USER]}, False),
}


def token_ids(client: Client, backend: FakeBackend, path: str, body: dict[str, Any]) -> list[int]:
    response = client.post(path, body)
    assert response.status_code == 200, response.text
    if path == "/tokenize":
        return response.json()["tokens"]
    return backend.requests[-1].prompt_token_ids


@pytest.mark.parametrize(("path", "body", "default"), ENTRANCES.values(), ids=ENTRANCES)
def test_add_special_tokens_is_the_clients_choice_at_every_entrance(
    bos_client: Client, bos_backend: FakeBackend, path: str, body: dict[str, Any], default: bool
) -> None:
    without = token_ids(bos_client, bos_backend, path, {**body, "add_special_tokens": False})
    assert BOS not in without
    added = token_ids(bos_client, bos_backend, path, {**body, "add_special_tokens": True})
    assert added == [BOS, *without]
    assert token_ids(bos_client, bos_backend, path, body) == (added if default else without)


LACKING = {
    "completion": ("/v1/completions", {"prompt": "a [PAD] b"}, "prompt"),
    "completions": ("/v1/completions", {"prompt": ["a", "a [PAD] b"]}, "prompt"),
    "compare": ("/v1/compare", {"prompt": "[PAD]", "arms": ARMS}, "prompt"),
    "tokenize-prompt": ("/tokenize", {"prompt": "a [PAD]"}, "prompt"),
    "tokenize-content": ("/tokenize", {"content": "a [PAD]"}, "content"),
}


@pytest.mark.parametrize(("path", "body", "param"), LACKING.values(), ids=LACKING)
def test_text_with_a_token_that_the_model_lacks_is_refused_by_name(
    bos_client: Client, path: str, body: dict[str, Any], param: str
) -> None:
    message = check_error(bos_client.post(path, body), 400, param=param, code="invalid_value")
    assert "'[PAD]'" in message


def test_control_token_that_the_model_lacks_is_plain_text_in_a_chat(bos_client: Client) -> None:
    response = bos_client.chat(messages=[{"role": "user", "content": "a [PAD] b"}])
    assert response.status_code == 200


def test_added_word_that_the_model_lacks_is_refused_in_a_chat(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path)
    library = Library.from_file(str(folder / "tokenizer.json"))
    library.add_tokens(["<note>"])
    library.save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(folder, num_embeddings=library.get_vocab_size() - 1)
    backend = FakeBackend(vocab_size=tokenizer.vocab_size - 1, script=lambda *_: [END])
    client = Client(create_app(backend, tokenizer, settings=ApiSettings(model_id="smollm2")))
    response = client.chat(messages=[{"role": "user", "content": "a <note> b"}])
    assert "'<note>'" in check_error(response, 400, param="messages", code="invalid_value")


def test_detokenize_takes_no_more_than_the_context(client: Client, backend: FakeBackend) -> None:
    limit = backend.max_context_tokens
    assert client.post("/detokenize", {"tokens": [5] * limit}).status_code == 200
    response = client.post("/detokenize", {"tokens": [5] * (limit + 1)})
    assert "257" in check_error(response, 400, param="tokens", code="context_length_exceeded")
