"""What is wrong with a file of text."""


class DataError(ValueError):
    """A file of texts or examples cannot be read, or holds what cannot be used."""
