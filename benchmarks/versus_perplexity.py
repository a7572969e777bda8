"""Perplexity of Proa's kernels and of llama.cpp, of the same tokens of the same windows."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.llama_cpp import SOURCE_FORMAT, perplexity, tokenize
from benchmarks.report import BenchmarkFailed, run_command, say
from benchmarks.versus_goals import Figure
from benchmarks.versus_speed import Peer, Proa
from benchmarks.windows import cut_windows, digest_windows
from serve.model_options import ModelOptions
from text.text_file import read_text

# What of the server's options the script knows, too.
OPTIONS = ("quantization", "head")


def compare_perplexity(
    proa: Proa, peer: Peer, text: Path, *, windows: int, length: int, threads: int
) -> tuple[dict[str, Figure], dict[str, Any]]:
    """Measure both on the first windows of a text, and the peer on its other formats as well.

    Both read each window by itself without a token before it, and predict its second half but the
    first token of that.

    Raises:
        BenchmarkFailed: the two make different tokens of the text.
    """
    ours = _measure_proa(proa, text, windows=windows, length=length)
    say(f"perplexity of proa: {ours['perplexity']:.4f}")
    theirs: dict[str, float] = {}
    with TemporaryDirectory() as folder:
        # With the line ends that Proa reads: other ones are other tokens.
        read = Path(folder) / "text"
        read.write_bytes(read_text(text).encode())
        _check_tokens(peer, read, ours)
        for name, model in peer.models.items():
            theirs[name] = perplexity(
                peer.tools, model, read, windows=windows, length=length, threads=threads
            )
            say(f"perplexity of llama.cpp, {name}: {theirs[name]:.4f}")
    reference = theirs[SOURCE_FORMAT]
    measured = Figure(
        value=100 * (ours["perplexity"] / reference - 1),
        detail=f"{ours['perplexity']:.4f} against {reference:.4f}, {windows} windows of {length}",
    )
    content = {"windows": windows, "length": length, "proa": ours["perplexity"]}
    content |= {f"llama.cpp {name}": value for name, value in theirs.items()}
    return {"perplexity": measured}, content


def _measure_proa(proa: Proa, text: Path, *, windows: int, length: int) -> Mapping[str, Any]:
    # The script's own defaults are other ones.
    given = {name: proa.given.get(name, getattr(ModelOptions(), name)) for name in OPTIONS}
    words = [word for name, value in given.items() for word in (f"--{name}", value)]
    output = run_command(
        [
            *(sys.executable, "-m", "benchmarks.perplexity", "--model", proa.source),
            *("--text", text, "--windows", str(windows), "--length", str(length)),
            *("--second-half", *words),
        ],
        is_quiet=True,
    )
    figures: dict[str, Any] = json.loads(output.splitlines()[-1])
    return figures


def _check_tokens(peer: Peer, text: Path, ours: Mapping[str, Any]) -> None:
    token_ids = tokenize(peer.tools, peer.models[SOURCE_FORMAT], text)
    if (
        digest_windows(cut_windows(token_ids, ours["length"], ours["windows"]))
        != (ours["tokens_sha256"])
    ):
        raise BenchmarkFailed("llama.cpp makes other tokens of the text than Proa")
