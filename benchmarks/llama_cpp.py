"""Fetch, build and run llama.cpp, the peer that speeds and perplexities are compared with.

The sources come from the package llama-cpp-python on PyPI, through pip; none of them is kept here.
"""

import json
import os
import re
import shutil
import sys
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.report import BenchmarkFailed, run_command

REQUIREMENT = "llama-cpp-python==0.3.36"
TOOLS = ("llama-batched-bench", "llama-quantize", "llama-perplexity", "llama-tokenize")
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
WITHOUT_AMX = "GGML_BENCHMARK_WITHOUT_AMX"
# File, a line of it, and what that becomes. GCC 12 drops the stores that the first instruction of
# AMX reads, and what is built with AMX has no switch to run without.
PATCHES = (
    (
        "ggml/src/ggml-cpu/amx/mmq.cpp",
        "    _tile_loadconfig(&tc);",
        '    __asm__ volatile("" ::: "memory");\n    _tile_loadconfig(&tc);',
    ),
    (
        "ggml/src/ggml-cpu/amx/amx.cpp",
        "static bool ggml_amx_init() {",
        "#include <cstdlib>\nstatic bool ggml_amx_init() {\n"
        f'    if (getenv("{WITHOUT_AMX}")) {{ return false; }}',
    ),
)
# How a build keeps weights: as the processor's tile unit wants them, as its vector units do, or as
# they are in the file.
AMX, REPACKED, PLAIN = "amx", "repacked", "plain"
SOURCE_FORMAT = "the file"

Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One way to run llama.cpp.

    Attributes:
        format: of the weights, such as "Q4_0", or `SOURCE_FORMAT`.
        flash_attention: "on" or "off".
        layout: of the weights in memory.
        waits_actively: OpenMP's threads spin at barriers, as they do by default; if not, they
            sleep.
    """

    format: str
    flash_attention: str
    layout: str = REPACKED
    waits_actively: bool = True

    def __str__(self) -> str:
        waits = "" if self.waits_actively else " passive"
        return f"{self.format} fa={self.flash_attention} {self.layout}{waits}"

    def environment(self) -> dict[str, str]:
        """Give the environment to run it in."""
        environ = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
        if not self.waits_actively:
            environ["OMP_WAIT_POLICY"] = "PASSIVE"
        if self.layout != AMX:
            environ[WITHOUT_AMX] = "1"
        return environ

    def arguments(self) -> list[str]:
        """Give the arguments of a tool."""
        plain = ["--no-repack"] if self.layout == PLAIN else []
        return ["--flash-attn", self.flash_attention, *plain]


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What is decoded.

    Attributes:
        streams: numbers of streams that run at once, one after the other.
        prompt_tokens: tokens of each prompt.
        new_tokens: tokens that each stream generates.
        threads: that compute.
    """

    streams: tuple[int, ...]
    prompt_tokens: int
    new_tokens: int
    threads: int


def has_amx(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Tell whether the processor has the tile unit for 8-bit integers."""
    return re.search(r"^flags\b.*\bamx_int8\b", cpuinfo.read_text(), re.MULTILINE) is not None


def list_variants(formats: Sequence[str], *, with_amx: bool) -> list[Variant]:
    """Give every way to run llama.cpp on some formats."""
    layouts = (AMX, REPACKED, PLAIN) if with_amx else (REPACKED, PLAIN)
    return [
        Variant(format=name, flash_attention=flash, layout=layout)
        for name, layout, flash in product(formats, layouts, ("on", "off"))
    ]


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
    patch_sources(sources)
    report("building llama.cpp; this takes about ten minutes on two cores")
    build = cache / "build"
    run_command(["cmake", "-S", sources, "-B", build, *BUILD_OPTIONS], is_quiet=True)
    make = ["cmake", "--build", build, "--config", "Release", "-j", str(jobs), "--target", *TOOLS]
    run_command(make, is_quiet=True)
    tools = find_tools(cache)
    if tools is None:
        raise BenchmarkFailed(f"the build left no {' and '.join(TOOLS)} in {build / 'bin'}")
    return tools


def patch_sources(sources: Path) -> None:
    """Change the lines of `PATCHES`, unless that is done.

    Raises:
        BenchmarkFailed: the sources have no such line.
    """
    for name, old, new in PATCHES:
        path = sources / name
        text = path.read_text(encoding="utf-8")
        if new in text:
            continue
        if text.count(old) != 1:
            raise BenchmarkFailed(f"{path}: no line {old.strip()!r}; {REQUIREMENT} has one")
        path.write_text(text.replace(old, new), encoding="utf-8")


def make_model(tools: Path, source: Path, format: str, folder: Path) -> Path:
    """Give the model in a 4-bit format, made from another one the first time.

    Args:
        tools: folder with llama-quantize.
        source: GGUF file.
        format: such as "Q4_0".
        folder: where made files are kept.
    """
    target = folder / f"{source.stem}-as-{format}.gguf"
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(".part")
        command = [tools / "llama-quantize", "--allow-requantize", source, part, format]
        run_command(command, is_quiet=True)
        part.rename(target)
    return target


def make_models(tools: Path, source: Path, formats: Sequence[str], folder: Path) -> dict[str, Path]:
    """Give the file itself and the same weights in other formats than its name tells."""
    other = [name for name in formats if not _is_in(source, name)]
    return {SOURCE_FORMAT: source, **{n: make_model(tools, source, n, folder) for n in other}}


def batched_bench(tools: Path, model: Path, variant: Variant, load: Load) -> list[dict[str, Any]]:
    """Run llama-batched-bench once.

    Its first load runs twice and counts once: the tool's own warm-up is a batch of 16 tokens. The
    streams of a load share a prompt, which is computed once and copied; each reads its own copy.

    Returns:
        Its own figures for each number of streams: `pl` streams, `speed_pp` and `speed_tg` in
        tokens per second, of one prompt and of all streams together.

    Raises:
        BenchmarkFailed: it fails or leaves a load out.
    """
    context = max(load.streams) * (load.prompt_tokens + load.new_tokens)
    command = [
        tools / "llama-batched-bench",
        *("--model", model, "--ctx-size", str(context), "--batch-size", str(BATCH_TOKENS)),
        *("--threads", str(load.threads), *variant.arguments(), "-pps"),
        *("-npp", str(load.prompt_tokens), "-ntg", str(load.new_tokens)),
        *("-npl", ",".join(map(str, [load.streams[0], *load.streams]))),
        *("--output-format", "jsonl"),
    ]
    output = run_command(command, is_quiet=True, environ=variant.environment())
    lines = [line for line in output.splitlines() if line.startswith("{")]
    figures = [json.loads(line) for line in lines][1:]
    if [row["pl"] for row in figures] != list(load.streams):
        raise BenchmarkFailed(f"llama-batched-bench did not run every load: {lines}")
    return figures


def perplexity(
    tools: Path, model: Path, text: Path, *, windows: int, length: int, threads: int
) -> float:
    """Run llama-perplexity on the first windows of a text.

    Each window is read by itself, without a token before it; the tokens of its second half are
    predicted, but the first of them, which it leaves out.

    Raises:
        BenchmarkFailed: it fails, or the text is too short.
    """
    command = [
        tools / "llama-perplexity",
        *("--model", model, "--file", text, "--chunks", str(windows), "--threads", str(threads)),
        *("--ctx-size", str(length), "--batch-size", str(length), *_WITHOUT_BOS),
    ]
    output = run_command(command, is_quiet=True, with_messages=True)
    found = re.search(r"calculating perplexity over (\d+) chunks", output)
    estimate = re.search(r"Final estimate: PPL = ([\d.]+)", output)
    if found is None or estimate is None or int(found[1]) != windows:
        raise BenchmarkFailed(f"llama-perplexity did not read {windows} windows of {text}")
    return float(estimate[1])


def tokenize(tools: Path, model: Path, text: Path) -> list[int]:
    """Give the token ids of a text, without one before them."""
    command = [
        tools / "llama-tokenize",
        *("--model", model, "--file", text, "--ids", "--no-bos", "--no-parse-special"),
        "--log-disable",
    ]
    token_ids: list[int] = json.loads(run_command(command, is_quiet=True))
    return token_ids


_WITHOUT_BOS: Sequence[str] = ("--override-kv", "tokenizer.ggml.add_bos_token=bool:false")


def _is_in(source: Path, format: str) -> bool:
    return re.search(rf"\b{format}\b", source.name, re.IGNORECASE) is not None


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
