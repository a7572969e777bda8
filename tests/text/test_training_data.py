"""Training data: every shape, what is learnt of it, and every malformed line by its number."""

import json
from pathlib import Path

import pytest

from adapters.qst.examples import Example
from text.chat_template import ChatTemplate
from text.errors import DataError
from text.records import read_records
from text.tokenizer import Tokenizer
from text.training_data import (
    Limit,
    LongPolicy,
    build_examples,
    build_labelled,
    describe_examples,
)


@pytest.fixture(scope="module")
def tokenizer(tiny_llama_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(tiny_llama_folder)


@pytest.fixture
def bare(tiny_llama_folder: Path) -> Tokenizer:
    """The same without a chat template."""
    found = Tokenizer.from_folder(tiny_llama_folder)
    found.chat_template = None
    return found


def limit(max_tokens: int = 1000, policy: LongPolicy = "error") -> Limit:
    return Limit(max_tokens=max_tokens, policy=policy, reason="--max-length")


def build(content: object, tokenizer: Tokenizer, tmp_path: Path, **options: object) -> list:
    path = tmp_path / "data.jsonl"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return build_examples(read_records(path), tokenizer, limit(**options))  # type: ignore[arg-type]


def split(example: Example, tokenizer: Tokenizer) -> list[str]:
    """Return the pieces of an example, alternately not learnt and learnt."""
    pieces, wanted = [], 0
    run: list[int] = []
    for token_id, is_target in zip(example.token_ids, example.is_target, strict=True):
        if is_target != wanted:
            pieces.append(tokenizer.decode(run))
            run, wanted = [], is_target
        run.append(token_id)
    return [*pieces, tokenizer.decode(run)]


ASK = {"role": "user", "content": "Hi"}
TELL = {"role": "assistant", "content": "Hello"}


@pytest.mark.parametrize(
    ("record", "pieces"),
    [
        ({"messages": [ASK, TELL]}, ["<|user|>Hi<|end|><|assistant|>", "Hello<|end|>"]),
        (
            {"messages": [{"role": "system", "content": "S"}, ASK, TELL, ASK, TELL, ASK]},
            ["<|system|>S<|end|><|user|>Hi<|end|><|assistant|>", "Hello<|end|>",
             "<|user|>Hi<|end|><|assistant|>", "Hello<|end|>"],
        ),
        ({"instruction": "Do", "output": "x"}, ["<|user|>Do<|end|><|assistant|>", "x<|end|>"]),
        ({"instruction": "Do", "input": "", "response": "x"},
         ["<|user|>Do<|end|><|assistant|>", "x<|end|>"]),
        ({"instruction": "Do", "input": "this", "output": "x"},
         ["<|user|>Do\n\nthis<|end|><|assistant|>", "x<|end|>"]),
        ({"question": "1+1?", "answer": "2", "id": 7},
         ["<|user|>1+1?<|end|><|assistant|>", "2<|end|>"]),
        ({"prompt": "def f", "completion": "(x)"}, ["def f", "(x)<|end|>"]),
        ({"text": "All of it"}, ["", "All of it<|end|>"]),
        ({"messages": [ASK, {"role": "assistant", "content": "a <|end|> b"}]},
         ["<|user|>Hi<|end|><|assistant|>", "a <|end|> b<|end|>"]),
    ],
    ids=["chat", "turns", "instruction", "response", "input", "question", "prompt", "text",
         "spelt control token"],
)  # fmt: skip
def test_answers_and_their_end_are_learnt(
    record: dict, pieces: list[str], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (example,) = build([record], tokenizer, tmp_path)
    assert split(example, tokenizer) == pieces


def test_spelt_control_token_is_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (example,) = build([{"text": "<|end|>"}], tokenizer, tmp_path)
    assert len(example.token_ids) == len("<|end|>") + 1


def test_instructions_without_template_are_prompts(bare: Tokenizer, tmp_path: Path) -> None:
    (example,) = build([{"instruction": "Do", "output": "x"}], bare, tmp_path)
    assert split(example, bare) == ["Do\n\n", "x<|end|>"]
    with pytest.raises(DataError, match="entry 1: The model has no chat template"):
        build([{"messages": [ASK, TELL]}], bare, tmp_path)


def test_line_feed_after_the_last_turn_is_not_learnt(
    tiny_llama_folder: Path, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.from_folder(tiny_llama_folder)
    source = (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    tokenizer.chat_template = ChatTemplate(source.replace("\n", "{{ '\\n' }}"), {})
    (example,) = build([{"messages": [ASK, TELL]}], tokenizer, tmp_path)
    assert split(example, tokenizer) == [
        "<|user|>\nHi<|end|>\n<|assistant|>\n", "Hello<|end|>", "\n"
    ]  # fmt: skip


def test_template_that_rewrites_turns_is_refused(tiny_llama_folder: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(tiny_llama_folder)
    tokenizer.chat_template = ChatTemplate(
        "{{ messages | length }}{% for m in messages %}{{ m.content }}<|end|>{% endfor %}", {}
    )
    with pytest.raises(DataError, match="entry 1: the model's chat template rewrites"):
        build([{"messages": [ASK, TELL, ASK, TELL]}], tokenizer, tmp_path)


def test_json_lines_may_have_blank_lines_and_invisible_marks(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    text = '\ufeff{"text": "a"}\r\n\n \u200b{"text": "b\u2028c"}\n'
    examples = build(text, tokenizer, tmp_path)
    assert [split(e, tokenizer)[1] for e in examples] == ["a<|end|>", "b\u2028c<|end|>"]


MALFORMED = [
    ('{"text": "a"}\n{"text": ', "line 2: not valid JSON"),
    ('{"text": "a"}\n\n[1]', "line 3: must be a JSON object, got list"),
    ('{"text": "a"}\n"x"', "line 2: must be a JSON object, got str"),
    ('[{"text": "a"}, 3]', "entry 2: must be a JSON object, got int"),
    ('[{"text": "a"}', "data.jsonl: not valid JSON"),
    ("", "no examples; the file is empty"),
    ("\n \n", "no examples; the file is empty"),
    ("[]", "no examples; the file is empty"),
    ('{"text": ""}', 'line 1: "text" must be text that is not empty'),
    ('{"text": 3}', 'line 1: "text" must be text that is not empty, got 3'),
    ('{"text": "\\ud800"}', 'line 1: "text" has half of a surrogate pair'),
    ('{"prompt": "a"}', 'line 1: "completion" must be text'),
    ('{"instruction": "a"}', 'line 1: "output" must be text'),
    ('{"question": "a", "answer": " "}', 'line 1: "answer" must be text'),
    ('{"story": "a"}', "line 1: needs messages; .* or text; got story"),
    ("{}", "line 1: needs messages; .* got nothing"),
    ('{"messages": "a"}', 'line 1: "messages" must be a list'),
    ('{"messages": [{"content": "a"}]}', '"messages": entry 1 needs a role'),
    ('{"messages": [{"role": "tool", "content": "a"}]}', "one of system, user, assistant"),
    ('{"messages": [{"role": "assistant", "content": null}]}', 'entry 1: "content" must be'),
    ('{"messages": [{"role": "user", "content": "a"}]}', "must hold an answer of the assistant"),
    ("[" * 100_000, "not valid JSON"),
]


@pytest.mark.parametrize(("text", "message"), MALFORMED, ids=[text[:40] for text, _ in MALFORMED])
def test_malformed_line_is_named(
    text: str, message: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        build(text, tokenizer, tmp_path)


LONG = [{"text": "ab"}, {"text": "x" * 20}, {"prompt": "y" * 20, "completion": "z"}]


def test_long_sequence_is_refused_unless_told_otherwise(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    message = "entry 2: 21 tokens, over --max-length of 10, and 1 more; .* --long truncate"
    with pytest.raises(DataError, match=message):
        build(LONG, tokenizer, tmp_path, max_tokens=10)


@pytest.mark.parametrize(
    ("policy", "lengths", "message"),
    [
        ("truncate", [3, 10], "2 examples, 13 tokens, 11 targets, 1 cut to 10 tokens, 1 left out"),
        ("skip", [3], "1 examples, 3 tokens, 2 targets, 2 left out as too long"),
    ],
)
def test_long_sequences_are_cut_or_left_out(
    policy: LongPolicy, lengths: list[int], message: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps(LONG), encoding="utf-8")
    chosen, lines = limit(10, policy), []
    examples = build_examples(read_records(path), tokenizer, chosen)
    describe_examples("data", examples, chosen, lines.append)
    assert [len(example.token_ids) for example in examples] == lengths
    assert message in lines[0]


def test_data_of_which_nothing_is_left_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    chosen = limit(2, "skip")
    path = tmp_path / "data.json"
    path.write_text(json.dumps(LONG), encoding="utf-8")
    examples = build_examples(read_records(path), tokenizer, chosen)
    with pytest.raises(DataError, match="data: no examples are left, 3 left out"):
        describe_examples("data", examples, chosen, print)


def label(
    name: str, text: str, tokenizer: Tokenizer, tmp_path: Path, **options: object
) -> tuple[list[Example], tuple[str, ...]]:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return build_labelled(read_records(path), tokenizer, limit(), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "text", "texts", "labels", "found"),
    [
        ("a.tsv", "sentence\tlabel\ngood \t1\nbad\t0\n", ["good", "bad"], ("0", "1"), [1, 0]),
        ("b.tsv", "index\tsentence1\tsentence2\tlabel\r\n0\ta\tb\tno\r\n1\tc\td\tyes\r\n",
         ["a\nb", "c\nd"], ("no", "yes"), [0, 1]),
        ("c.jsonl", '{"text": "x", "label": 10}\n{"text": "y", "label": 9}', ["x", "y"],
         ("9", "10"), [1, 0]),
    ],
)  # fmt: skip
def test_classes_are_those_of_the_data(
    name: str, text: str, texts: list[str], labels: tuple, found: list[int],
    tokenizer: Tokenizer, tmp_path: Path,
) -> None:  # fmt: skip
    examples, classes = label(name, text, tokenizer, tmp_path)
    assert [tokenizer.decode(list(e.token_ids)) for e in examples] == texts
    assert classes == labels
    assert [e.label for e in examples] == found


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.tsv", "gj04\t1\t\tOur friends\n", "line 1: the header must name a label .*sentence"),
        ("a.tsv", "sentence\tlabel\na\t1\nb\n", "line 3: 1 columns, the header has 2"),
        ("a.tsv", "sentence\tlabel\n", "no examples"),
        ("a.tsv", "sentence\tlabel\n \t1\nb\t0\n", 'line 2: "text" must be text'),
        ("a.tsv", "sentence\tlabel\na\t\nb\t0\n", 'line 2: "label" must be'),
        ("a.jsonl", '{"text": "a"}', 'line 1: "label" must be .* got None'),
        ("a.jsonl", '{"text": "a", "label": true}', 'line 1: "label" must be .* got True'),
        ("a.jsonl", '{"text": "a", "label": 0.5}', 'line 1: "label" must be .* got 0.5'),
        ("a.jsonl", '{"text": "a", "label": 1}', "all examples have the same label, '1'"),
    ],
)
def test_malformed_table_is_named(
    name: str, text: str, message: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        label(name, text, tokenizer, tmp_path)


def test_unknown_label_of_held_out_data_is_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = "sentence\tlabel\na\tyes\nb\tmaybe\n"
    with pytest.raises(DataError, match="line 3: label 'maybe' is not one of the data's: no, yes"):
        label("a.tsv", text, tokenizer, tmp_path, labels=("no", "yes"))
