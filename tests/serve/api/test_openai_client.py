"""The published client understands what the server says."""

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from text.tokenizer import Tokenizer

from .conftest import FakeBackend

MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]


@pytest.fixture
def api(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def test_client_lists_and_retrieves_models(api: openai.OpenAI) -> None:
    assert "smollm2@adapt" in [model.id for model in api.models.list()]
    assert api.models.retrieve("smollm2@adapt").id == "smollm2@adapt"
    with pytest.raises(openai.NotFoundError, match="no such model") as error:
        api.models.retrieve("gpt-4")
    assert error.value.code == "model_not_found"


def test_client_chats(api: openai.OpenAI) -> None:
    answer = api.chat.completions.create(
        model="smollm2", messages=MESSAGES, n=2, logprobs=True, top_logprobs=2, seed=1
    )
    assert [choice.message.content for choice in answer.choices] == ["hello fox"] * 2
    assert [choice.finish_reason for choice in answer.choices] == ["stop"] * 2
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [entry.token for entry in logprobs.content] == ["hello", " fox", "<|im_end|>"]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 6
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 3


def test_client_streams_a_chat(api: openai.OpenAI) -> None:
    stream = api.chat.completions.create(
        model="smollm2",
        messages=MESSAGES,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={
            "decoding": {"strategy": "adapt", "a": 1.0, "b": 0.3},
            "return_decoding_trace": True,
        },
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == "hello fox"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 3
    trace = [
        entry
        for chunk in chunks
        for choice in chunk.choices
        for entry in (choice.model_extra or {}).get("decoding_trace", [])
    ]
    assert len(trace) == 3


def test_client_sends_its_own_answers_back(api: openai.OpenAI) -> None:
    answer = api.chat.completions.create(model="smollm2", messages=MESSAGES)
    history = [*MESSAGES, answer.choices[0].message.model_dump(), *MESSAGES]
    assert api.chat.completions.create(model="smollm2", messages=history).choices  # type: ignore


def test_client_streams_with_its_helper(api: openai.OpenAI) -> None:
    with api.chat.completions.stream(model="smollm2", messages=MESSAGES) as stream:
        answer = stream.get_final_completion()
    assert answer.choices[0].message.content == "hello fox"


def test_client_completes(api: openai.OpenAI, tokenizer: Tokenizer) -> None:
    answer = api.completions.create(
        model="smollm2", prompt=["the", " fox"], logprobs=2, echo=True, max_tokens=1
    )
    assert [choice.text for choice in answer.choices] == ["thehello", " foxhello"]
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["the", "hello"]
    assert logprobs.text_offset == [0, 3]


def test_client_streams_a_completion(api: openai.OpenAI) -> None:
    stream = api.completions.create(model="smollm2", prompt="the", stream=True, n=2)
    texts = ["", ""]
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == ["hello fox"] * 2


def test_client_raises_what_the_server_refuses(api: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature must be") as error:
        api.chat.completions.create(model="smollm2", messages=MESSAGES, temperature=3)
    assert error.value.param == "temperature"
    assert error.value.type == "invalid_request_error"


def test_client_raises_an_error_inside_a_stream(api: openai.OpenAI, backend: FakeBackend) -> None:
    backend.failure = 1
    stream = api.chat.completions.create(model="smollm2", messages=MESSAGES, stream=True)
    with pytest.raises(openai.APIError, match="failed to answer"):
        list(stream)
