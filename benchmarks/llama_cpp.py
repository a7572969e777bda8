"""Fetch, build and run llama.cpp, the peer that speeds are compared with.

The sources come from the package llama-cpp-python on PyPI, through pip; none of them is kept here.
"""

import json
import shutil
import sys
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import BenchmarkFailed, run_command

REQUIREMENT = "llama-cpp-python==0.3.36"
TOOLS = ("llama-batched-bench", "llama-quantize")
BUILD_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_SERVER=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_OPENSSL=OFF",
)
BATCH_TOKENS = 2048

Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One way to run llama.cpp: a 4-bit format, and flash attention on or off."""

    format: str
    flash_attention: str

    def __str__(self) -> str:
        return f"{self.format} fa={self.flash_attention}"


def find_tools(folder: Path) -> Path | None:
    """Give the folder with the built tools: `folder` itself, its `bin` or its `build/bin`."""
    for candidate in (folder, folder / "bin", folder / "build" / "bin"):
        if all((candidate / tool).is_file() for tool in TOOLS):
            return candidate
    return None


def build_tools(cache: Path, *, jobs: int, report: Report) -> Path:
    """Build llama.cpp in a cache folder unless it is there, and give the folder with its tools.

    Raises:
        BenchmarkFailed: no cmake, or the download or the build fails.
    """
    tools = find_tools(cache)
    if tools is not None:
        return tools
    if shutil.which("cmake") is None:
        raise BenchmarkFailed("building llama.cpp takes cmake (apt install cmake)")
    sources = cache / "llama.cpp"
    if not (sources / "CMakeLists.txt").is_file():
        report(f"downloading the sources ({REQUIREMENT}, about 70 MB)")
        _fetch_sources(cache)
    report("building llama.cpp; this takes about ten minutes on two cores")
    build = cache / "build"
    run_command(["cmake", "-S", sources, "-B", build, *BUILD_OPTIONS], is_quiet=True)
    make = ["cmake", "--build", build, "--config", "Release", "-j", str(jobs), "--target", *TOOLS]
    run_command(make, is_quiet=True)
    tools = find_tools(cache)
    if tools is None:
        raise BenchmarkFailed(f"the build left no {' and '.join(TOOLS)} in {build / 'bin'}")
    return tools


def make_model(tools: Path, source: Path, format: str, folder: Path) -> Path:
    """Give the model in a 4-bit format, made from another one the first time.

    Args:
        tools: folder with llama-quantize.
        source: GGUF file; taken as it is where its name has the format.
        format: such as "Q4_0".
        folder: where made files are kept.
    """
    if f".{format}." in source.name:
        return source
    target = folder / f"{source.stem.partition('.')[0]}.{format}.gguf"
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(".part")
        command = [tools / "llama-quantize", "--allow-requantize", source, part, format]
        run_command(command, is_quiet=True)
        part.rename(target)
    return target


def batched_bench(
    tools: Path,
    model: Path,
    *,
    flash_attention: str,
    streams: Sequence[int],
    prompt_tokens: int,
    new_tokens: int,
    threads: int,
) -> list[dict[str, Any]]:
    """Run llama-batched-bench once.

    Its first load runs twice and counts once: the tool's own warm-up is a batch of 16 tokens.

    Returns:
        Its own figures for each number of streams: `pl` streams, `speed_pp` and `speed_tg` in
        tokens per second.

    Raises:
        BenchmarkFailed: it fails or leaves a load out.
    """
    context = max(streams) * (prompt_tokens + new_tokens)
    command = [
        tools / "llama-batched-bench",
        *("--model", model, "--ctx-size", str(context), "--batch-size", str(BATCH_TOKENS)),
        *("--threads", str(threads), "--flash-attn", flash_attention),
        *("-npp", str(prompt_tokens), "-ntg", str(new_tokens)),
        *("-npl", ",".join(map(str, [streams[0], *streams]))),
        *("--output-format", "jsonl"),
    ]
    output = run_command(command, is_quiet=True)
    lines = [line for line in output.splitlines() if line.startswith("{")]
    figures = [json.loads(line) for line in lines][1:]
    if [row["pl"] for row in figures] != list(streams):
        raise BenchmarkFailed(f"llama-batched-bench did not run every load: {lines}")
    return figures


def _fetch_sources(cache: Path) -> None:
    downloads = cache / "download"
    downloads.mkdir(parents=True, exist_ok=True)
    run_command(
        [
            *(sys.executable, "-P", "-m", "pip", "download", "--quiet"),
            "--disable-pip-version-check",
            *("--no-deps", "--no-binary", ":all:", "--dest", downloads, REQUIREMENT),
        ]
    )
    archives = list(downloads.glob("llama_cpp_python-*.tar.gz"))
    if len(archives) != 1:
        raise BenchmarkFailed(f"pip left no source archive of {REQUIREMENT} in {downloads}")
    with tarfile.open(archives[0]) as archive:
        for member in archive:
            folder, found, path = member.name.partition("/vendor/llama.cpp/")
            if found and "/" not in folder:
                member.name = path
                archive.extract(member, cache / "llama.cpp", filter="data")
