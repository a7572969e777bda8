"""What goes wrong between a client and a server, in words for people."""


class RequestError(Exception):
    """The server refused a request, could not finish it, or cannot be reached.

    The message is for people; it holds no key.

    Attributes:
        status: of the response; None where there was none, or it had begun well.
        code: short name that a program can compare with, if the server gave one.
        param: the field at fault as the request spelt it, if the server named one.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        code: str | None = None,
        param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
