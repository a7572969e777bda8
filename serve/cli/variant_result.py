"""What commands tell of a variant that they have made."""

from pathlib import Path
from typing import Protocol

from serve.cli.arguments import say


class VariantResult(Protocol):
    """A variant that was made.

    Attributes:
        folder: of it.
        remove_linears, remove_total: shares of parameters removed, of the linears and of the model.
        loss, dense_loss: its cross entropy and the whole model's on held-out text; None: there was
            none.
    """

    @property
    def folder(self) -> Path: ...

    @property
    def remove_linears(self) -> float: ...

    @property
    def remove_total(self) -> float: ...

    @property
    def loss(self) -> float | None: ...

    @property
    def dense_loss(self) -> float | None: ...


def describe_variant(result: VariantResult) -> str:
    """Return the line about one variant."""
    losses = ""
    if result.loss is not None and result.dense_loss is not None:
        losses = f"; held-out loss {result.loss:.4f}, of the whole model {result.dense_loss:.4f}"
    return (
        f"{result.folder}: {result.remove_linears:.1%} of the linears' parameters removed, "
        f"{result.remove_total:.1%} of the whole model{losses}"
    )


def say_what_next(folder: Path) -> None:
    """Tell how a variant is served and healed."""
    say(f"serve it with: proa serve --variant {folder.resolve().name}={folder}")
    say(f"heal it with: proa train qst --on {folder} --data FILE --output DIR")
