"""Convert checkpoints in a process of its own.

Unpacking and quantising take several hundred megabytes, and the libraries they need would stay
loaded; a server that has just converted its model should be no larger than one that has not.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from models.families import CheckpointError, UnsupportedArchitectureError

_PROGRAM = "import sys; from models.checkpoints.worker import run_task; run_task(sys.argv[1])"
_ERRORS: dict[str, type[CheckpointError]] = {
    error.__name__: error for error in (CheckpointError, UnsupportedArchitectureError)
}


def convert_apart(
    source: Path, folder: Path, *, is_quantized: bool, report: Callable[[str], None]
) -> None:
    """Write a checkpoint as a folder, dense or in NF4, in another process.

    Args:
        source: Hugging Face folder or GGUF file.
        folder: an existing, empty folder.
        is_quantized: whether the linears become NF4.
        report: told about the progress.

    Raises:
        CheckpointError: the source cannot be read, or the process died.
    """
    task = {"source": str(source), "folder": str(folder), "is_quantized": is_quantized}
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, json.dumps(task)],
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
    from models.checkpoints.conversion import FourBit, write_folder
    from models.checkpoints.origins import open_folder, open_gguf

    messages = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # what libraries print must not mix with the messages

    def send(**message: str) -> None:
        messages.write(json.dumps(message) + "\n")

    task = json.loads(argument)
    source = Path(task["source"])
    try:
        checkpoint = open_gguf(source) if source.is_file() else open_folder(source)
        four_bit = FourBit() if task["is_quantized"] else None
        write_folder(checkpoint, Path(task["folder"]), four_bit, lambda text: send(text=text))
    except CheckpointError as error:
        send(error=type(error).__name__, text=str(error))
