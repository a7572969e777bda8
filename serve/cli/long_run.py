"""A run that takes long, from the command line: Ctrl-C saves it, a failure is one line."""

from collections.abc import Callable
from typing import TypeVar

from adapters.format import AdapterError
from adapters.training_state import TrainingError, TrainingInterrupted
from serve.cli.arguments import CommandError, say
from serve.cli.stop_signals import stop_signals

Result = TypeVar("Result")


def run_to_end(start: Callable[[Callable[[], bool]], Result]) -> Result | None:
    """Run a training or a search.

    Args:
        start: does it; what it is given tells whether it was asked to stop.

    Returns:
        What `start` returns; None: it was stopped and has saved a checkpoint.

    Raises:
        CommandError: it failed.
    """
    with stop_signals() as requested:
        try:
            return start(lambda: bool(requested))
        except TrainingInterrupted as stopped:
            say(f"{stopped}; the same command with --resume goes on from there")
            return None
        except (TrainingError, AdapterError) as error:
            raise CommandError(str(error)) from None
