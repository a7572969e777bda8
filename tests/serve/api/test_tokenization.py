from typing import Any

import pytest

from text.tokenizer import Tokenizer

from .conftest import Client, FakeBackend, check_error


def test_tokenize_takes_vllms_prompt(client: Client, tokenizer: Tokenizer) -> None:
    body = client.post("/tokenize", {"model": "smollm2", "prompt": "hello fox"}).json()
    ids = tokenizer.encode("hello fox")
    assert body == {"count": 2, "max_model_len": 256, "tokens": ids, "token_strs": None}


def test_tokenize_names_the_tokens_on_request(client: Client) -> None:
    body = client.post("/tokenize", {"prompt": "hello fox", "return_token_strs": True}).json()
    assert body["token_strs"] == ["hello", " fox"]


def test_tokenize_takes_vllms_messages(client: Client, tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "<|im_end|>"}]
    body = client.post("/tokenize", {"messages": messages}).json()
    assert body["tokens"] == tokenizer.apply_chat_template(messages)
    fields = {"messages": messages, "add_generation_prompt": False}
    shorter = client.post("/tokenize", fields).json()
    assert body["tokens"][: shorter["count"]] == shorter["tokens"]
    assert shorter["count"] < body["count"]


def test_tokenize_takes_llama_cpps_content(client: Client, tokenizer: Tokenizer) -> None:
    content = "hello<|im_end|>"
    assert client.post("/tokenize", {"content": content}).json()["tokens"] == [
        *tokenizer.encode("hello"),
        2,
    ]
    fields = {"content": content, "parse_special": False, "with_pieces": True}
    tokens = client.post("/tokenize", fields).json()["tokens"]
    assert "".join(token["piece"] for token in tokens) == content
    assert [token["id"] for token in tokens] == tokenizer.encode(content)


def test_tokenize_of_nothing_is_nothing(client: Client) -> None:
    assert client.post("/tokenize", {"content": ""}).json()["tokens"] == []


@pytest.mark.parametrize(
    ("body", "param", "match"),
    [
        ({}, "prompt", "exactly one"),
        ({"prompt": "a", "content": "a"}, "content", "exactly one"),
        ({"prompt": "a", "with_pieces": True}, "with_pieces", "needs content"),
        ({"content": "a", "add_special_tokens": True}, "add_special_tokens", "needs prompt"),
        ({"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt", "needs messages"),
        ({"messages": []}, "messages", "must not be empty"),
        ({"prompt": 5}, "prompt", "valid string"),
        ({"prompt": "a", "chat_template": "x"}, "chat_template", "not supported"),
        ({"content": "a", "frob": 1}, "frob", "Unknown field"),
    ],
)
def test_bad_tokenize_field_is_refused(
    client: Client, body: dict[str, Any], param: str, match: str
) -> None:
    assert match in check_error(client.post("/tokenize", body), 400, param=param)


def test_tokenize_of_another_model_is_not_found(client: Client) -> None:
    response = client.post("/tokenize", {"model": "gpt-4", "prompt": "a"})
    check_error(response, 404, param="model", code="model_not_found")


def test_detokenize_gives_the_text(client: Client, tokenizer: Tokenizer) -> None:
    ids = [1, *tokenizer.encode("h\u00e9llo \U0001f6f6")]
    body = client.post("/detokenize", {"model": "smollm2", "tokens": ids}).json()
    assert body == dict.fromkeys(("prompt", "content"), "<|im_start|>h\u00e9llo \U0001f6f6")
    assert client.post("/detokenize", {"tokens": []}).json()["content"] == ""


@pytest.mark.parametrize("tokens", [None, [-1], [10**6], [2**63], ["a"], [True], "a", [[1]], [1.5]])
def test_bad_tokens_are_refused(client: Client, tokens: object) -> None:
    check_error(client.post("/detokenize", {"tokens": tokens}), 400, param="tokens")


def test_long_text_is_encoded_alike(
    client: Client, backend: FakeBackend, tokenizer: Tokenizer
) -> None:
    backend.max_context_tokens = 100_000
    line = "hello fox <|im_end|>\n"
    body = client.post("/tokenize", {"content": line * 2000, "parse_special": False}).json()
    assert body["tokens"] == tokenizer.encode(line) * 2000
