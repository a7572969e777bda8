import threading
from pathlib import Path
from typing import Any

import pytest

from serve.api import ApiSettings, create_app
from serve.api.logprobs import LegacyLogprobs
from text.tokenizer import Tokenizer

from .conftest import CONTEXT, END, Client, FakeBackend, check_error, read_events, write_tokenizer


def test_completion_answers_with_the_text(client: Client, backend: FakeBackend) -> None:
    body = client.complete().json()
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    assert body["choices"] == [
        {"index": 0, "text": "hello fox", "logprobs": None, "finish_reason": "stop"}
    ]
    assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] + 3
    assert backend.requests[0].arms[0].params.max_tokens == 16
    assert not backend.requests[0].prompt_is_template


PROMPTS = {
    "string": ("the fox", [["the fox"]]),
    "strings": (["the", " fox"], [["the"], [" fox"]]),
    "ids": ([5, 6, 7], [[5, 6, 7]]),
    "id-lists": ([[5, 6], [7]], [[5, 6], [7]]),
    "mixed": (["the", [7]], [["the"], [7]]),
}


@pytest.mark.parametrize(("prompt", "expected"), PROMPTS.values(), ids=PROMPTS)
def test_completion_takes_every_kind_of_prompt(
    client: Client,
    backend: FakeBackend,
    tokenizer: Tokenizer,
    prompt: object,
    expected: list[list[object]],
) -> None:
    body = client.complete(prompt=prompt, n=2).json()
    assert [choice["index"] for choice in body["choices"]] == list(range(2 * len(expected)))
    found = [request.prompt_token_ids for request in backend.requests]
    assert found == [
        tokenizer.encode(item[0]) if isinstance(item[0], str) else item for item in expected
    ]
    assert body["usage"]["prompt_tokens"] == sum(map(len, found))
    assert body["usage"]["completion_tokens"] == 6 * len(expected)


def test_completion_keeps_prompts_in_order(
    client: Client, backend: FakeBackend, tokenizer: Tokenizer
) -> None:
    backend.script = lambda request, index: [*request.prompt_token_ids, END]
    prompts = ["the", "hello fox jumps", "a", " quick"] * 20
    body = client.complete(prompt=prompts).json()
    assert [choice["text"] for choice in body["choices"]] == prompts
    events = read_events(client.complete(prompt=prompts, stream=True))
    texts = [""] * len(prompts)
    for event in events:
        texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert texts == prompts
    assert len({request.request_id for request in backend.requests}) == 2 * len(prompts)
    assert backend.num_open == 0


def test_completion_understands_control_tokens_in_its_prompt(
    client: Client, backend: FakeBackend
) -> None:
    client.complete(prompt="<|im_start|>")
    assert backend.requests[0].prompt_token_ids == [1]


def test_completion_streams_text_finish_and_done(client: Client) -> None:
    events = read_events(client.complete(stream=True))
    assert [event["choices"][0] for event in events] == [
        {"index": 0, "text": "hello", "logprobs": None, "finish_reason": None},
        {"index": 0, "text": " fox", "logprobs": None, "finish_reason": None},
        {"index": 0, "text": "", "logprobs": None, "finish_reason": "stop"},
    ]
    assert {event["object"] for event in events} == {"text_completion"}


def test_completion_reports_legacy_log_probabilities(client: Client) -> None:
    (choice,) = client.complete(logprobs=2).json()["choices"]
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["hello", " fox", "<|im_end|>"]
    assert logprobs["text_offset"] == [0, 5, 9]
    for token, own, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert top[token] == own
        assert max(top.values()) >= own


@pytest.mark.parametrize("max_tokens", [0, 1, 5])
@pytest.mark.parametrize("is_streamed", [False, True], ids=["whole", "streamed"])
def test_completion_echoes_the_prompt_with_its_log_probabilities(
    client: Client, tokenizer: Tokenizer, max_tokens: int, is_streamed: bool
) -> None:
    fields = {"echo": True, "logprobs": 1, "max_tokens": max_tokens, "temperature": 0.0}
    prompt = "the quick fox"
    num_prompt = len(tokenizer.encode(prompt))
    response = client.complete(prompt=prompt, stream=is_streamed, **fields)
    text, logprobs = collect(response, is_streamed=is_streamed)
    generated = ["hello", " fox", "<|im_end|>"][:max_tokens]
    assert text == prompt + "".join(generated[:2])
    assert len(logprobs["tokens"]) == num_prompt + len(generated)
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert text[offset : offset + len(token)] == token or token == "<|im_end|>"
    usage = client.complete(prompt=prompt, **fields).json()["usage"]
    assert usage["completion_tokens"] == len(generated)


def collect(response, *, is_streamed: bool) -> tuple[str, dict[str, list[object]]]:
    if not is_streamed:
        (choice,) = response.json()["choices"]
        return choice["text"], choice["logprobs"]
    text = ""
    logprobs: dict[str, list[object]] = {}
    for event in read_events(response):
        (choice,) = event["choices"]
        text += choice["text"]
        for name, values in (choice["logprobs"] or {}).items():
            logprobs.setdefault(name, []).extend(values)
    return text, logprobs


def test_completion_scores_a_prompt_as_long_as_the_context(client: Client) -> None:
    response = client.complete(prompt=[5] * CONTEXT, max_tokens=0, echo=True, logprobs=1)
    (choice,) = response.json()["choices"]
    assert len(choice["logprobs"]["token_logprobs"]) == CONTEXT


def test_completion_scores_as_lm_eval_asks(client: Client, tokenizer: Tokenizer) -> None:
    contexts = [tokenizer.encode(text) for text in ("the quick", "def hello", "a")]
    continuations = [tokenizer.encode(text) for text in (" fox", "(name)", "\U0001f6f6")]
    prompts = [a + b for a, b in zip(contexts, continuations, strict=True)]
    response = client.complete(
        prompt=prompts, temperature=0, max_tokens=1, logprobs=1, seed=1234, echo=True
    )
    choices = response.json()["choices"]
    for choice, context, continuation in zip(choices, contexts, continuations, strict=True):
        values = choice["logprobs"]["token_logprobs"][len(context) : -1]
        tops = choice["logprobs"]["top_logprobs"][len(context) : -1]
        assert len(values) == len(tops) == len(continuation)
        is_greedy = all(v == max(top.values()) for v, top in zip(values, tops, strict=True))
        assert is_greedy == all(token_id % 2 == 0 for token_id in continuation)


@pytest.mark.parametrize("is_streamed", [False, True], ids=["whole", "streamed"])
def test_completion_of_nothing_needs_no_backend(
    client: Client, backend: FakeBackend, is_streamed: bool
) -> None:
    fields = {"echo": True, "max_tokens": 0, "n": 2, "stream": is_streamed}
    response = client.complete(**fields)
    if is_streamed:
        choices = [event["choices"][0] for event in read_events(response)]
        texts = ["".join(c["text"] for c in choices if c["index"] == i) for i in (0, 1)]
        reasons = [c["finish_reason"] for c in choices if c["finish_reason"]]
    else:
        choices = response.json()["choices"]
        texts = [choice["text"] for choice in choices]
        reasons = [choice["finish_reason"] for choice in choices]
    assert texts == ["the fox"] * 2
    assert reasons == ["length"] * 2
    assert backend.requests == []


def test_echo_of_several_choices_waits_for_the_prompt(client: Client, backend: FakeBackend) -> None:
    events = read_events(client.complete(echo=True, logprobs=0, n=2, stream=True))
    for index in (0, 1):
        choices = [e["choices"][0] for e in events if e["choices"][0]["index"] == index]
        assert choices[0]["text"] == "the fox"
        assert choices[0]["logprobs"]["token_logprobs"][0] is None
        assert "".join(choice["text"] for choice in choices) == "the foxhello fox"


@pytest.mark.parametrize("is_streamed", [False, True], ids=["whole", "streamed"])
def test_prompts_log_probabilities_are_written_once_and_off_the_loop(
    client: Client, monkeypatch: pytest.MonkeyPatch, is_streamed: bool
) -> None:
    threads = []
    add_prompt = LegacyLogprobs.add_prompt

    def note(self: LegacyLogprobs, *arguments: Any) -> None:
        threads.append(threading.current_thread())
        add_prompt(self, *arguments)

    monkeypatch.setattr(LegacyLogprobs, "add_prompt", note)
    prompts = [[5] * 250, [6] * 250]
    fields = {"echo": True, "logprobs": 20, "n": 16, "max_tokens": 1, "stream": is_streamed}
    assert client.complete(prompt=prompts, **fields).status_code == 200
    assert len(threads) == 2
    assert threading.main_thread() in threads  # 5,250 values are few
    monkeypatch.setattr("serve.api.context._LARGE", 5000)
    del threads[:]
    assert client.complete(prompt=prompts, **fields).status_code == 200
    assert threading.main_thread() not in threads


def test_more_prompt_log_probabilities_than_an_answer_holds_are_refused(client: Client) -> None:
    fields = {"echo": True, "logprobs": 20, "max_tokens": 0}
    response = client.complete(prompt=[[5] * 256] * 8, n=128, **fields)
    message = check_error(response, 400, param="logprobs", code="invalid_value")
    assert "logprobs 20 and n 128 asks for 5505024" in message
    assert client.complete(prompt=[5] * 256, n=128, **fields).status_code == 200


def test_echo_of_token_ids_is_their_text(client: Client, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the fox")
    assert client.complete(prompt=ids, echo=True).json()["choices"][0]["text"] == "the foxhello fox"


def test_completion_returns_the_decoding_trace(client: Client) -> None:
    (choice,) = client.complete(return_decoding_trace=True).json()["choices"]
    assert [entry["token"] for entry in choice["decoding_trace"]] == ["hello", " fox", "<|im_end|>"]
    events = read_events(client.complete(return_decoding_trace=True, stream=True))
    streamed = [e for event in events for e in event["choices"][0].get("decoding_trace", [])]
    assert streamed == choice["decoding_trace"]


def test_suffix_without_fill_in_the_middle_tokens_is_refused(client: Client) -> None:
    message = check_error(client.complete(suffix="end"), 400, param="suffix")
    assert "no fill-in-the-middle tokens" in message


def test_empty_suffix_is_a_plain_completion(client: Client) -> None:
    assert client.complete(suffix="").status_code == 200


def test_suffix_fills_in_the_middle(backend: FakeBackend, tmp_path: Path) -> None:
    markers = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
    tokenizer = Tokenizer.from_folder(write_tokenizer(tmp_path, *markers))
    backend.vocab_size = tokenizer.vocab_size
    client = Client(create_app(backend, tokenizer, settings=ApiSettings(model_id="smollm2")))
    assert client.complete(prompt="def <|im_end|>", suffix="return").status_code == 200
    text = tokenizer.decode(backend.requests[0].prompt_token_ids)
    assert text == "<|fim_prefix|>def <|im_end|><|fim_suffix|>return<|fim_middle|>"
    assert END not in backend.requests[0].prompt_token_ids
    check_error(client.complete(prompt=[5], suffix="x"), 400, param="suffix")
    check_error(client.complete(suffix="x", echo=True), 400, param="echo")


@pytest.mark.parametrize(
    ("fields", "status"), [({"best_of": 1}, 200), ({"best_of": 2, "n": 2}, 200)]
)
def test_best_of_that_equals_n_is_accepted(
    client: Client, fields: dict[str, int], status: int
) -> None:
    assert client.complete(**fields).status_code == status


def test_best_of_that_differs_from_n_is_refused(client: Client) -> None:
    message = check_error(client.complete(best_of=3, n=2), 400, param="best_of")
    assert "only where it equals n" in message


def test_completion_takes_the_stop_strings_of_code_benchmarks(
    client: Client, backend: FakeBackend
) -> None:
    stop = ["\nclass", "\n#", "\nif", "\nprint", "\n```", "\n```\n\n", "<|eot_id|>", "</s>"] * 2
    assert client.complete(stop=stop).status_code == 200
    assert list(backend.requests[0].arms[0].params.stop) == stop
