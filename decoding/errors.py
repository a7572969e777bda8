"""The error that a bad sampling parameter raises."""


class ParameterError(ValueError):
    """A sampling parameter is out of range, of the wrong type or unknown.

    Attributes:
        param: the field as a request spells it, for example `top_p` or `decoding.a`.
    """

    def __init__(self, message: str, *, param: str) -> None:
        super().__init__(message)
        self.param = param
