"""What is wrong with sampling parameters, or with the logits to sample from."""


class ParameterError(ValueError):
    """A sampling parameter is out of range, of the wrong type or unknown.

    Attributes:
        param: the field as a request spells it, for example `top_p` or `decoding.a`.
    """

    def __init__(self, message: str, *, param: str) -> None:
        super().__init__(message)
        self.param = param


class LogitsError(ValueError):
    """Logits are not numbers, so no token can be drawn: the weights or the kernels are broken."""

    def __init__(self) -> None:
        super().__init__("the model's logits are not numbers; are its weights damaged?")
