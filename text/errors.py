"""What is wrong with a text, or with a file of texts."""


class DataError(ValueError):
    """A file of texts or examples cannot be read, or holds what cannot be used."""


class TextTooLongError(ValueError):
    """A text has certainly more tokens than the limit; it was not encoded.

    Attributes:
        num_tokens: it has at least as many.
        limit: tokens allowed.
    """

    def __init__(self, num_tokens: int, limit: int) -> None:
        super().__init__(f"the text has at least {num_tokens} tokens; the limit is {limit}")
        self.num_tokens = num_tokens
        self.limit = limit


class TokenOutsideVocabularyError(ValueError):
    """A text spells a token that the tokenizer knows and the model's embeddings lack.

    Attributes:
        text: the token, as it is spelt.
        token_id: its id.
    """

    def __init__(self, text: str, token_id: int, num_embeddings: int) -> None:
        super().__init__(
            f"the text spells the token {text!r}, whose id {token_id} the model does not have: its "
            f"vocabulary is 0 to {num_embeddings - 1}"
        )
        self.text = text
        self.token_id = token_id
