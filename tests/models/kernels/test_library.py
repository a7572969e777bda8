"""The native library is checked when it is loaded: one built for other code is refused."""

import ctypes
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from models.decoder import resolve_kernels
from models.kernels.native import library as native
from models.kernels.native.executor import BLOCK_SIZE
from models.kernels.native.library import FUNCTIONS, NativeLibraryError, load_library
from models.kernels.native.sources import digest_sources
from models.kernels.native.structs import (
    ACTIVATIONS,
    FORMATS,
    OP_KINDS,
    PANEL,
    POOLS,
    PROLOGUES,
    STRUCTURES,
)

SOURCES = Path(native.__file__).with_name("cpp")
HEADER = SOURCES / "program.h"
LAYOUT = [
    number
    for structure in STRUCTURES
    for number in (
        ctypes.sizeof(structure),
        getattr(structure, structure._fields_[-1][0]).offset,
    )
]
Build = Callable[..., Path]


@pytest.fixture
def build(tmp_path: Path, compiler: str) -> Build:
    """Return a function that builds a library that does nothing but tell what it is."""

    def build(
        *,
        layout: list[int] = LAYOUT,
        sources: str | None = None,
        without: str = "",
        is_checkout: bool = True,
    ) -> Path:
        folder = tmp_path / "models" / "kernels" / "native"
        folder.mkdir(parents=True)
        if is_checkout:
            (tmp_path / "setup.py").touch()
            (folder / "cpp").mkdir()
            (folder / "cpp" / "a.cpp").write_text("int x;\n")
        if sources is None:
            sources = digest_sources(folder / "cpp")
        numbers = ", ".join(map(str, layout))
        bodies = {name: f"void {name}() {{}}" for name in FUNCTIONS if name != without}
        bodies |= {
            "proa_layout": f"int proa_layout(int i) {{ int n[] = {{{numbers}, 0}}; return n[i]; }}",
            "proa_sources": f'const char* proa_sources() {{ return "{sources}"; }}',
        }
        code = tmp_path / "library.cpp"
        code.write_text('extern "C" {\n' + "\n".join(bodies.values()) + "\n}\n")
        library = folder / "_native.so"
        command = [*compiler.split(), "-shared", "-fPIC", "-o", str(library), str(code)]
        subprocess.run(command, check=True)
        return library

    return build


def refusal(path: Path) -> str:
    with pytest.raises(NativeLibraryError) as caught:
        load_library(path)
    message = str(caught.value)
    assert message.startswith(f"{path} was not built for this code (")
    assert "\n" not in message
    return message


def test_library_beside_this_code_is_this_codes() -> None:
    library = native.native_library()
    assert library is not None
    assert library.proa_sources().decode() == digest_sources(SOURCES)


def test_library_of_the_sources_beside_it_is_loaded(build: Build) -> None:
    path = build()
    assert load_library(path).proa_sources().decode() == digest_sources(path.with_name("cpp"))


def test_library_of_other_sources_is_refused_with_the_command_that_rebuilds_it(
    build: Build, tmp_path: Path
) -> None:
    path = build(sources="0" * 64)
    assert refusal(path).endswith(
        f"(its sources in {path.with_name('cpp')} have changed); rebuild it with: "
        f"{sys.executable} -m pip install --no-deps -e {tmp_path}"
    )


def test_installed_library_is_loaded_without_its_sources(build: Build) -> None:
    assert load_library(build(sources="old", is_checkout=False)).proa_sources() == b"old"


@pytest.mark.parametrize("number", range(len(LAYOUT)))
def test_library_with_another_layout_is_refused(build: Build, number: int) -> None:
    layout = [n + 8 * (i == number) for i, n in enumerate(LAYOUT)]
    name = STRUCTURES[number // 2].__name__
    message = refusal(build(layout=layout, is_checkout=False))
    assert f"({name} is laid out otherwise); rebuild it with: " in message
    assert message.endswith("--no-deps --force-reinstall FOLDER, where FOLDER holds Proa's sources")


@pytest.mark.parametrize("name", sorted(set(FUNCTIONS) - {"proa_layout", "proa_sources"}))
def test_library_that_lacks_a_function_is_refused(build: Build, name: str) -> None:
    assert f"(undefined symbol: {name});" in refusal(build(without=name))


@pytest.mark.parametrize(
    "content", [b"", b"not a library", b"\x7fELF"], ids=["empty", "text", "elf"]
)
def test_file_that_is_no_library_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "_native.so"
    path.write_bytes(content)
    assert "rebuild it with: " in refusal(path)


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], None]]:
    """Return a function that has another library taken for ours."""
    native.native_library.cache_clear()
    yield lambda path: monkeypatch.setattr(native, "_PATH", path)
    native.native_library.cache_clear()


def test_refused_library_stops_kernels_from_being_chosen(
    build: Build, place: Callable[[Path], None]
) -> None:
    place(build(sources="other"))
    with pytest.raises(NativeLibraryError, match="was not built for this code"):
        resolve_kernels("auto", "cpu")


@pytest.mark.parametrize("machine", ["x86_64", "AMD64"])
def test_missing_library_is_refused_where_there_are_kernels(
    place: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, machine: str
) -> None:
    place(tmp_path / "models" / "kernels" / "native" / "_native.so")
    monkeypatch.setattr("platform.machine", lambda: machine)
    with pytest.raises(NativeLibraryError, match="No such file or directory"):
        resolve_kernels("auto", "cpu")


def test_missing_library_leaves_torch_to_other_processors(
    place: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    place(tmp_path / "_native.so")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert resolve_kernels("auto", "cpu") == "reference"
    with pytest.raises(ValueError, match="'native' need the native library and an x86-64"):
        resolve_kernels("native", "cpu")


def test_digest_of_sources_tells_names_and_contents(tmp_path: Path) -> None:
    def digest_of(**files: str) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for name, content in files.items():
            (folder / name.replace("_", ".")).write_text(content)
        return digest_sources(folder)

    first = digest_of(a_h="1", b_cpp="2")
    assert first == digest_of(b_cpp="2", a_h="1", c_txt="3")
    assert len({first, digest_of(a_h="1", c_cpp="2"), digest_of(a_h="12", b_cpp="")}) == 3


def test_structures_have_the_fields_of_the_header_in_their_order() -> None:
    header = re.sub(r"//.*", "", HEADER.read_text())
    scalars = {"int32_t": ctypes.c_int32, "float": ctypes.c_float}
    found = dict(re.findall(r"struct (\w+) \{(.*?)\};", header, re.DOTALL))
    assert ["Native" + name for name in found] == [s.__name__ for s in STRUCTURES]
    for structure, body in zip(STRUCTURES, found.values(), strict=True):
        fields = []
        for declaration in filter(None, map(str.strip, body.split(";"))):
            kind, name = declaration.rsplit(maxsplit=1)
            fields.append((name, ctypes.c_void_p if "*" in kind else scalars[kind]))
        assert fields == structure._fields_


@pytest.mark.parametrize(
    ("enum", "numbers"),
    [
        ("OpKind", OP_KINDS),
        ("Prologue", PROLOGUES),
        ("Activation", ACTIVATIONS),
        ("PoolKind", {f"{kind or 'no'}_pool": number for kind, number in POOLS.items()}),
        ("Format", FORMATS),
    ],
)
def test_enumerations_are_those_of_the_header(enum: str, numbers: dict[object, int]) -> None:
    header = re.sub(r"//.*", "", HEADER.read_text())
    body = re.search(rf"enum {enum} : int32_t {{(.*?)}};", header, re.DOTALL)
    assert body is not None
    found = {name.lower(): int(number) for name, number in re.findall(r"k(\w+) = (\d+)", body[1])}
    spelled = {str(k).removeprefix("torch.").replace("_", ""): n for k, n in numbers.items()}
    assert spelled == found


def test_sizes_of_panels_and_blocks_are_those_of_the_header() -> None:
    found = dict(re.findall(r"constexpr int (\w+) = (\d+);", HEADER.read_text()))
    assert (found["kPanel"], found["kBlock"]) == (str(PANEL), str(BLOCK_SIZE))
