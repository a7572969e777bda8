"""Progress bars of a run."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from tqdm import tqdm

_INTERVAL_S = 1.0


@contextmanager
def bars(output: TextIO, **totals: int) -> Iterator[Callable[[str, int], None]]:
    """Show a bar for each thing that is counted; one with a total of 0 stays hidden.

    Args:
        output: where to.
        totals: how many there will be, by name.

    Yields:
        What is told a name and how many more are done.
    """
    shown = {
        name: tqdm(
            total=total, desc=name, unit="", file=output, disable=not total,
            mininterval=_INTERVAL_S, position=position,
        )
        for position, (name, total) in enumerate(totals.items())
    }  # fmt: skip
    try:
        yield lambda name, count: shown[name].update(count)
    finally:
        for bar in reversed(shown.values()):
            bar.close()
