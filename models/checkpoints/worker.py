"""Convert checkpoints in a process of its own.

Unpacking and quantising take several hundred megabytes, and the libraries they need would stay
loaded; a server that has just converted its model should be no larger than one that has not.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from models.families import CheckpointError, UnsupportedArchitectureError

Content = Literal["nf4", "none", "tokenizer"]
_PROGRAM = "import sys; from models.checkpoints.worker import run_task; run_task(sys.argv[1])"
_ERRORS: dict[str, type[CheckpointError]] = {
    error.__name__: error for error in (CheckpointError, UnsupportedArchitectureError)
}


def convert_apart(
    source: Path, folder: Path, content: Content, *, report: Callable[[str], None]
) -> None:
    """Write a checkpoint as a folder, in another process.

    Args:
        source: Hugging Face folder or GGUF file.
        folder: an existing, empty folder.
        content: all of it, with its linears in NF4 or not quantised ("none"), or the tokenizer
            alone.
        report: told about the progress.

    Raises:
        CheckpointError: the source cannot be read, or the process died.
    """
    task = {"source": str(source), "folder": str(folder), "content": content}
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            # -P: the current folder, which may be the model's, is no place to import from.
            [sys.executable, "-P", "-c", _PROGRAM, json.dumps(task)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=os.environ | {"PYTHONPATH": path},
            encoding="utf-8",
        )
        try:
            _follow(process, report)
        finally:
            process.kill()
            process.wait()
        if process.returncode:
            errors.seek(0)
            lines = errors.read().decode("utf-8", errors="replace").strip().splitlines()
            if process.returncode == -signal.SIGKILL:
                lines = ["it was killed, as happens when memory runs out"]
            raise CheckpointError(
                f"{source}: converting it failed with exit code {process.returncode}: "
                + " | ".join(lines[-3:] or ["no output"])
            )


def _follow(process: subprocess.Popen[str], report: Callable[[str], None]) -> None:
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            message = json.loads(line)
            if "error" in message:
                raise _ERRORS[message["error"]](message["text"])
            report(message["text"])
    process.wait()


def run_task(argument: str) -> None:
    """Do what `convert_apart` asks for, in the other process, and print messages for it.

    Args:
        argument: the task as JSON.
    """
    from models.checkpoints.conversion import FourBit, write_folder, write_tokenizer_folder
    from models.checkpoints.origins import open_folder, open_gguf

    messages = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # what libraries print must not mix with the messages

    def send(**message: str) -> None:
        messages.write(json.dumps(message) + "\n")

    task = json.loads(argument)
    source = Path(task["source"])
    try:
        folder = Path(task["folder"])
        checkpoint = open_gguf(source) if source.is_file() else open_folder(source)
        if task["content"] == "tokenizer":
            write_tokenizer_folder(checkpoint, folder, lambda text: send(text=text))
            return
        four_bit = FourBit() if task["content"] == "nf4" else None
        write_folder(checkpoint, folder, four_bit, lambda text: send(text=text))
    except CheckpointError as error:
        send(error=type(error).__name__, text=str(error))
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".rstrip(": ")
        send(error="CheckpointError", text=f"{source}: converting it failed ({reason})")
