"""Perplexity of models on a text, by windows."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from evaluation.errors import DataFileError
from evaluation.folder import file_names
from evaluation.language.scoring import score_tokens, tokenize
from evaluation.records import Record, RecordLog
from evaluation.server import Arm, Servers, run_each
from evaluation.tables import describe_estimate, table
from stats.bootstrap import bootstrap_mean

# Where a text may be cut without changing its tokens: byte-level tokenizers begin a word with the
# blank before it, and no token reaches over that place.
_CUT = re.compile(r"(?<=\w)(?= [A-Za-z])")
_PIECE_CHARS = 4000


def read_windows_text(path: Path) -> str:
    """Return a text file with line ends as `\\n`.

    Raises:
        DataFileError: it cannot be read, is empty, or is not in UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataFileError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataFileError(f"{path} is not in UTF-8") from None
    if not text.strip():
        raise DataFileError(f"{path} is empty")
    return text


def cut_pieces(text: str) -> Iterator[str]:
    """Yield a text in pieces that have the tokens of the whole, one after the other."""
    start = 0
    while len(text) - start > _PIECE_CHARS:
        found = _CUT.search(text, start + _PIECE_CHARS)
        if found is None:
            break
        yield text[start : found.end()]
        start = found.end()
    yield text[start:]


async def measure_perplexity(
    arms: Sequence[Arm],
    text: str,
    folder: Path,
    servers: Servers,
    *,
    length: int,
    windows: int | None,
    concurrency: int,
    progress: Callable[[str, int], None],
) -> dict[str, Any]:
    """Return the perplexity of each arm; windows that the folder holds are not measured again.

    Each window is read by itself, without a token before it; all its tokens but the first count.

    Args:
        arms: who is asked; their servers must offer /tokenize and echo log probabilities.
        text: that is read.
        folder: of the run.
        servers: of the arms.
        length: tokens of a window.
        windows: the first so many; None: all whole ones.
        concurrency: requests under way at once.
        progress: told `window` and how many more are there.

    Raises:
        DataFileError: the text is shorter than a window.
        RunError: a server refuses or is gone, or a file cannot be written.
    """
    await servers.check(arms)
    names = file_names([arm.label for arm in arms])
    summary: dict[str, Any] = {"length": length, "arms": {}}
    with ExitStack() as stack:
        for arm in arms:
            log = stack.enter_context(RecordLog(folder / f"{names[arm.label]}_windows.jsonl"))
            cut = await _cut(arm, text, servers, length=length, windows=windows)
            there = {record["window"] for record in log.records}
            progress("window", len(there))

            missing = [item for item in enumerate(cut) if item[0] not in there]
            work = partial(_measure, arm, log, servers, progress)
            await run_each(missing, work, concurrency=concurrency)
            summary["arms"][arm.label] = _summarise(log.records)
    return summary


async def _measure(
    arm: Arm,
    log: RecordLog,
    servers: Servers,
    progress: Callable[[str, int], None],
    window: tuple[int, list[int]],
) -> None:
    index, token_ids = window
    values = await score_tokens(arm, token_ids, servers)
    log.add({"window": index, "tokens": len(values), "loss": -sum(values)})
    progress("window", 1)


async def _cut(
    arm: Arm, text: str, servers: Servers, *, length: int, windows: int | None
) -> list[list[int]]:
    wanted = None if windows is None else windows * length
    token_ids: list[int] = []
    for piece in cut_pieces(text):
        if wanted is not None and len(token_ids) >= wanted:
            break
        token_ids += await tokenize(arm, piece, servers)
    count = len(token_ids) // length
    if not count:
        raise DataFileError(f"the text has {len(token_ids)} tokens, a window {length}")
    count = count if windows is None else min(count, windows)
    return [token_ids[i * length : (i + 1) * length] for i in range(count)]


def _summarise(records: Sequence[Record]) -> dict[str, Any]:
    """Return the perplexity of all windows, its interval over windows."""
    losses = [record["loss"] / record["tokens"] for record in records]
    tokens = sum(record["tokens"] for record in records)
    loss = sum(record["loss"] for record in records) / tokens
    interval = describe_estimate(bootstrap_mean(losses))
    return {
        "windows": len(records),
        "tokens": tokens,
        "loss": loss,
        "perplexity": math.exp(loss),
        "low": math.exp(interval["low"]),
        "high": math.exp(interval["high"]),
    }


def to_markdown(summary: dict[str, Any], title: str) -> str:
    """Return the figures as a page."""
    rows = [
        [
            f"`{label}`", str(of["windows"]), str(of["tokens"]), f"{of['loss']:.4f}",
            f"{of['perplexity']:.3f} [{of['low']:.2f}, {of['high']:.2f}]",
        ]
        for label, of in summary["arms"].items()
    ]  # fmt: skip
    lines = [f"# {title}", ""]
    lines += table(["", "windows", "tokens", "nats a token", "perplexity"], rows)
    lines += ["", f"Windows of {summary['length']} tokens. Brackets: 95 % intervals by bootstrap "
              "over windows."]  # fmt: skip
    return "\n".join(lines) + "\n"
