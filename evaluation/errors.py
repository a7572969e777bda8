"""What can go wrong with an evaluation."""


class DataFileError(ValueError):
    """A data file cannot be read, or a line of it cannot be used; the message gives its number."""


class RunError(RuntimeError):
    """An evaluation cannot go on; what it has done is kept, and the same command goes on there."""
