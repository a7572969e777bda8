import pytest
import torch

from decoding import TOKEN_CLASSES, build_token_tables


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param(b"\n", "N0", id="newline"),
        pytest.param(b"\n\n", "N0", id="newlines"),
        pytest.param(b":\n", "N0", id="colon-newline"),
        pytest.param(b"\n    ", "N1", id="newline-blanks"),
        pytest.param(b"    ", "W", id="blanks"),
        pytest.param(b"  return", "X", id="blanks-text"),
        pytest.param(b"\t", "W", id="tab"),
        pytest.param(b"\r\n", "N0", id="carriage-return-newline"),
        pytest.param(None, "K", id="special"),
        pytest.param(b"", "K", id="empty"),
        pytest.param(b"\r", "K", id="carriage-return"),
        pytest.param(b")\n  x", "X", id="text-newline-text"),
        pytest.param(b":\n\t", "N1", id="text-newline-tab"),
        pytest.param(b"    \n", "N0", id="blanks-newline"),
        pytest.param(b"\xc2", "X", id="byte-fragment"),
        pytest.param(b"\x0c", "X", id="form-feed"),
        pytest.param(b"|", "X", id="bar"),
    ],
)
def test_class_of_a_token(text, expected):
    tables = build_token_tables([b"a", text, b"b"])
    assert tables.class_name(1) == expected
    assert TOKEN_CLASSES[tables.classes[1]] == expected


def test_classes_are_a_table_over_the_vocabulary(vocabulary):
    assert vocabulary.tables.classes.dtype == torch.uint8
    assert vocabulary.tables.classes.shape == (len(vocabulary.texts),)
    assert vocabulary.tables.vocab_size == len(vocabulary.texts)


def test_tables_refuse_an_empty_vocabulary():
    with pytest.raises(ValueError, match="token_bytes must have an entry"):
        build_token_tables([])


def test_tables_share_shapes_between_tokens_that_act_alike():
    tables = build_token_tables([b"abc", b"x", b"   ", b"\t", b"a:", b"b{", None])
    assert tables.shapes == (b"x", b"b", b"xo", b"")
