import dataclasses
import random

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from decoding import build_token_tables
from decoding.strategies import Adapt

PROGRAM = "def f(x):\n    if x:\n        return 1\n    return 0\n"
HOT, COLD, BASE = 0.8, 0.3, 0.55


def temperatures(strategy, tables, prompt, generated, *, prompt_is_template=False):
    """Return the temperature for each generated token."""
    controller = strategy.bind(tables)
    state = controller.start(prompt, prompt_is_template=prompt_is_template)
    states = []
    for token_id in generated:
        states.append(state)
        state = controller.automaton.next_state(state, token_id)
    base = torch.full((len(states),), BASE)
    found = controller.temperatures(torch.tensor(states), base, None)
    return [round(value, 4) for value in found.tolist()]


def hot_flags(strategy, vocabulary, prompt, generated, **options):
    ids = vocabulary.ids_of(*prompt), vocabulary.ids_of(*generated)
    return [t == HOT for t in temperatures(strategy, vocabulary.tables, *ids, **options)]


NEWLINE, TAB, FOUR, EIGHT, X, TWO_NEWLINES = 198, 197, 268, 272, 5, 628


@pytest.mark.parametrize(
    ("prompt", "generated", "expected"),
    [
        pytest.param([NEWLINE], [FOUR, X, X], [COLD, HOT, COLD], id="one-indent"),
        pytest.param([NEWLINE], [EIGHT, X], [COLD, COLD], id="eight-blanks"),
        pytest.param([NEWLINE], [TAB, TAB, X], [COLD, HOT, HOT], id="two-tabs"),
        pytest.param([X], [TWO_NEWLINES, FOUR, X], [COLD, COLD, COLD], id="double-newline"),
        pytest.param([NEWLINE], [NEWLINE, FOUR, X], [COLD, COLD, HOT], id="blank-line"),
        pytest.param([X], [FOUR, X], [COLD, HOT], id="prompt-ends-mid-line"),
        pytest.param([NEWLINE], [X, X, X], [COLD, COLD, COLD], id="column-0"),
    ],
)
def test_reference_policy_reproduces_the_released_traces(prompt, generated, expected):
    strategy = Adapt(policy="reference", a=HOT, b=COLD, indent_token_ids=(TAB, FOUR))
    tables = build_token_tables([b"x"] * 700)
    assert temperatures(strategy, tables, [1, 2, *prompt], generated) == expected


def test_reference_policy_begins_with_the_requests_temperature():
    strategy = Adapt(policy="reference", a=HOT, b=COLD, indent_token_ids=(TAB, FOUR))
    tables = build_token_tables([b"x"] * 700)
    assert temperatures(strategy, tables, [X, FOUR], [FOUR, X]) == [BASE, BASE]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        pytest.param("line_initial", ["if", "return", "return"], id="line_initial"),
        pytest.param("block_initial", ["if", "return"], id="block_initial"),
    ],
)
def test_policy_on_a_program(make_vocabulary, policy, expected):
    pieces = ["def", " f", "(", "x", ")", ":", "\n", "    ", "if", " x", ":", "\n", "        "]
    pieces += ["return", " 1", "\n", "    ", "return", " 0", "\n"]
    assert "".join(pieces) == PROGRAM
    vocabulary = make_vocabulary(sorted({piece.encode() for piece in pieces}))
    texts = [piece.encode() for piece in pieces]
    flags = hot_flags(Adapt(policy=policy), vocabulary, [b"\n"], texts)
    hot = [piece for piece, is_hot in zip(pieces, flags, strict=True) if is_hot]
    assert hot == expected


def test_block_initial_takes_brackets_for_openers_only_when_asked(vocabulary):
    generated = [b"x", b"(", b"\n", b"    ", b"x"]
    plain, brackets = (
        hot_flags(Adapt(policy="block_initial", bracket_openers=flag), vocabulary, [], generated)
        for flag in (False, True)
    )
    assert plain == [False] * 5
    assert brackets == [False] * 4 + [True]


def test_block_initial_looks_past_blank_lines(vocabulary):
    generated = [b"x", b":", b"\n\n", b" ", b"\n", b"    ", b"x", b"\n    ", b"x"]
    flags = hot_flags(Adapt(policy="block_initial"), vocabulary, [], generated)
    assert [index for index, is_hot in enumerate(flags) if is_hot] == [4, 6]


@pytest.mark.parametrize(
    ("prompt", "options", "expected"),
    [
        pytest.param([b"x", b"\n"], {}, False, id="after-newline"),
        pytest.param([b"x", b"\n"], {"column0": True}, True, id="after-newline-column0"),
        pytest.param([b"x", b"\n    "], {}, True, id="after-indent"),
        pytest.param([b"\n    ", None], {}, True, id="special-token-leaves-it"),
        pytest.param([b"\n    ", b"x"], {}, False, id="mid-line"),
        pytest.param([b"\n    ", b"x"], {"first": True}, True, id="mid-line-first"),
        pytest.param([b"x", b"\n", b" ", b"\t"], {}, True, id="split-indent"),
        pytest.param([], {"column0": True}, True, id="empty-prompt-is-a-line-start"),
        pytest.param([b"    "], {}, True, id="prompt-is-blank"),
    ],
)
def test_first_token_follows_the_prompts_tail(vocabulary, prompt, options, expected):
    assert hot_flags(Adapt(**options), vocabulary, prompt, [b"x"]) == [expected]


@pytest.mark.parametrize(
    ("options", "generated", "expected"),
    [
        pytest.param({}, [b"    ", b"x"], [False, False], id="starts-mid-line"),
        pytest.param({"column0": True}, [b"x"], [False], id="header-newline-does-not-count"),
        pytest.param({"first": True}, [b"    ", b"x"], [True, True], id="first-starts-a-line"),
        pytest.param({"first": True}, [b"x", b"x"], [True, False], id="first-only-once"),
        pytest.param({}, [b"x", b"\n    ", b"x"], [False, False, True], id="later-lines"),
    ],
)
def test_chat_template_header_is_no_part_of_the_text(vocabulary, options, generated, expected):
    prompt = [None, b"x", b"\n", b"\n    "]
    flags = hot_flags(Adapt(**options), vocabulary, prompt, generated, prompt_is_template=True)
    assert flags == expected


def test_fences_only_is_hot_inside_fences(vocabulary):
    generated = [b"``", b"`", b"x", b"\n    ", b"x", b"\n```", b"\n    ", b"x"]
    strategy = Adapt(fences_only=True)
    flags = hot_flags(strategy, vocabulary, [b"```"], generated, prompt_is_template=True)
    assert [index for index, is_hot in enumerate(flags) if is_hot] == [4]


def test_fences_only_reads_the_whole_prompt_of_a_completion(vocabulary):
    prompt = [b"```python\n", b"x", b"\n", b"x", b"\n    "]
    assert hot_flags(Adapt(fences_only=True), vocabulary, prompt, [b"x"]) == [True]
    prompt = [*prompt, b"\n```", b"\n    "]
    assert hot_flags(Adapt(fences_only=True), vocabulary, prompt, [b"x"]) == [False]


def test_fences_only_equals_a_character_oracle(vocabulary):
    chooser = random.Random(11)
    for _ in range(300):
        token_ids = chooser.choices(range(len(vocabulary.texts)), k=25)
        found = temperatures(
            Adapt(fences_only=True), vocabulary.tables, [0], token_ids, prompt_is_template=True
        )
        for index, temperature in enumerate(found):
            lines = vocabulary.text_of(token_ids[:index]).replace("\r", "").split("\n")
            fences = sum(line.lstrip(" \t").startswith("```") for line in lines)
            is_indent = len(lines) > 1 and lines[-1] != "" and lines[-1].strip(" \t") == ""
            assert (temperature == HOT) == (is_indent and fences % 2 == 1)


SOURCE = (
    "class A:\n  def f(self, x):\n    if x:\n\n        return [1,\n            2]\n"
    "    return 0\n\n\n  def g(self):\n\tpass\n\nfor i in range(3):\n    print(i)\n"
)


def byte_level_bpe():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([SOURCE] * 3, trainer)
    return tokenizer


def characters():
    tokenizer = Tokenizer(models.WordLevel(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.train_from_iterator([SOURCE], trainers.WordLevelTrainer(show_progress=False))
    return tokenizer


def words_and_blank_runs():
    tokenizer = Tokenizer(models.WordLevel(unk_token=None))
    pattern = Regex(r"\n[ \t]*|[ \t]+|\w+|[^\w\s]")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, "isolated")
    tokenizer.train_from_iterator([SOURCE], trainers.WordLevelTrainer(show_progress=False))
    return tokenizer


def hot_places(tokenizer):
    """Return the places of the first non-blank characters of hot tokens."""
    encoding = tokenizer.encode(SOURCE)
    texts = [SOURCE[start:end] for start, end in encoding.offsets]
    assert "".join(texts) == SOURCE
    vocabulary = [b""] * tokenizer.get_vocab_size()
    for token_id, text in zip(encoding.ids, texts, strict=True):
        vocabulary[token_id] = text.encode()
    tables = build_token_tables(vocabulary)
    newline = next(id_ for id_, text in enumerate(vocabulary) if text.startswith(b"\n"))
    found = temperatures(Adapt(), tables, [newline], encoding.ids)
    places = set()
    for (start, _), text, temperature in zip(encoding.offsets, texts, found, strict=True):
        if temperature == HOT and text.strip():
            places.add(start + len(text) - len(text.lstrip()))
    return places, len(encoding.ids)


def test_hot_places_do_not_depend_on_the_tokenizer():
    expected, place = set(), 0
    for line in SOURCE.splitlines(keepends=True):
        if line.strip() and line[0] in " \t":
            expected.add(place + len(line) - len(line.lstrip()))
        place += len(line)
    found = [hot_places(make()) for make in (byte_level_bpe, characters, words_and_blank_runs)]
    assert len({count for _, count in found}) == 3
    one_tab = SOURCE.index("pass")
    for places, _ in found:
        # An indent one character wide may be part of the statement's token.
        assert places | {one_tab} == expected


def test_defaults_are_hotter_at_line_starts():
    strategy = Adapt()
    assert (strategy.a, strategy.b) == (HOT, COLD)
    assert dataclasses.replace(strategy, a=0.3).b == COLD
