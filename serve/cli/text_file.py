"""Read a text file that the user names."""

from pathlib import Path

from serve.cli.arguments import UserError


def read_text(path: Path) -> str:
    """Read a text file.

    Raises:
        UserError: it cannot be read or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(f"{path}: line {line}: not UTF-8 text") from None
