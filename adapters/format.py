"""The folder that an adapter is: `adapter_config.json` and `adapter_model.safetensors`.

Neither file can hold code. What a method keeps in `fields` and how it names its tensors is the
method's own business.
"""

import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from models.spec import DecoderSpec

FORMAT_VERSION = 1
CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
_MAX_BYTES = {CONFIG_FILE: 1 << 20, TENSOR_FILE: 4 << 30}
SHOWN_DIGITS = 12
"""Digits of a fingerprint or a digest that messages show."""


class AdapterError(ValueError):
    """An adapter cannot be read, does not fit its base, or cannot be written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterConfig:
    """What `adapter_config.json` holds.

    Attributes:
        method: name of an entry of `adapters.methods`, which is checked there.
        base_id: id of the base that it was trained on, for messages.
        base_fingerprint: the base's `Checkpoint.fingerprint`, 64 hexadecimal digits.
        base_quantization: the base's quantisation in training, "nf4", "fp4" or "none".
        fields: the method's own, checked by the method; JSON values.
        chain: digests of what was attached to the base before it, in order.
        description: one line for people.
        training: facts about how it came to be, unchecked; JSON values.
        format_version: 1 .. FORMAT_VERSION.
    """

    method: str
    base_id: str
    base_fingerprint: str
    base_quantization: str
    fields: Mapping[str, Any]
    chain: tuple[str, ...] = ()
    description: str = ""
    training: Mapping[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        _check_version(self.format_version)
        problems = []
        for name in ("method", "base_id", "base_fingerprint", "base_quantization", "description"):
            if not isinstance(getattr(self, name), str):
                problems.append(f"{name} must be a string, got {getattr(self, name)!r}")
        for name in ("fields", "training"):
            if not isinstance(getattr(self, name), Mapping):
                problems.append(f"{name} must be an object, got {getattr(self, name)!r}")
        if not all(isinstance(item, str) for item in self.chain):
            problems.append(f"chain must be a list of strings, got {list(self.chain)!r}")
        if problems:
            raise AdapterError("; ".join(problems))


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredAdapter:
    """Both files, read once.

    Attributes:
        config: what the first says.
        tensors: what the second holds, by name, as stored.
        digest: SHA-256 of the bytes of both, 64 hexadecimal digits; the adapter's identity.
        folder: that they were in.
    """

    config: AdapterConfig
    tensors: dict[str, Tensor]
    digest: str
    folder: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """What an adapter is attached to: a base, or a base and what is attached to it already.

    Attributes:
        spec: of the decoder that runs.
        fingerprint: of the base, `Checkpoint.fingerprint`.
        quantization: of the base, "nf4", "fp4" or "none".
        model_id: of the base, for messages.
        chain: digests of what is attached, in order.
    """

    spec: DecoderSpec
    fingerprint: str
    quantization: str
    model_id: str
    chain: tuple[str, ...] = ()


def read_adapter(folder: Path, *, within: Path | None = None) -> StoredAdapter:
    """Read an adapter into memory; the files may change or go away afterwards.

    What is checked is what is read: each file is opened once, and no link is followed to it.

    Args:
        folder: the adapter.
        within: a folder above it; no link on the way from there is followed either. None: only
            the files themselves must not be links.

    Raises:
        AdapterError: a file is missing, too large, a link, damaged, of a newer version or has a
            field that is unknown or of the wrong type.
    """
    with _opened(folder, within) as descriptor:
        content = _read_file(folder / CONFIG_FILE, descriptor)
        config = _parse_config(content, folder / CONFIG_FILE)
        tensors = _read_file(folder / TENSOR_FILE, descriptor)
    return StoredAdapter(
        config=config,
        tensors=_parse_tensors(tensors, folder / TENSOR_FILE),
        digest=_digest(content, tensors),
        folder=folder,
    )


def read_config(folder: Path) -> AdapterConfig:
    """Read and check `adapter_config.json`; raises as `read_adapter` does."""
    with _opened(folder) as descriptor:
        content = _read_file(folder / CONFIG_FILE, descriptor)
    return _parse_config(content, folder / CONFIG_FILE)


def digest(folder: Path) -> str:
    """Return the SHA-256 of an adapter's two files; raises as `read_adapter` does."""
    with _opened(folder) as descriptor:
        config, tensors = (
            _read_file(folder / name, descriptor) for name in (CONFIG_FILE, TENSOR_FILE)
        )
    return _digest(config, tensors)


def write_adapter(folder: Path, config: AdapterConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write an adapter; other files of the folder are left alone.

    Both files are written out beside the old ones before they take their place, so an adapter
    that was there stays whole if the disk is full or the process is killed meanwhile. Only between
    the two renames at the end would a kill leave new tensors beside the old config.

    Args:
        folder: made if missing.
        config: what it is.
        tensors: by name; copied to the CPU.

    Raises:
        AdapterError: the config is no JSON, or a file cannot be written.
    """
    contents = {
        TENSOR_FILE: safetensors.torch.save(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        ),
        CONFIG_FILE: _config_json(config),
    }
    parts = {name: folder / f".{name}.part" for name in contents}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            for name, content in contents.items():
                with parts[name].open("wb") as stream:
                    stream.write(content)
                    stream.flush()
                    os.fsync(stream.fileno())
            for name, part in parts.items():
                part.replace(folder / name)
        finally:
            for part in parts.values():
                part.unlink(missing_ok=True)
    except OSError as error:
        raise AdapterError(
            f"{folder}: the adapter cannot be written ({error}); what was there is unchanged"
        ) from error


def check_base(config: AdapterConfig, host: Host) -> None:
    """Hold an adapter against the base, and what is on it, that it is to be attached to.

    Raises:
        AdapterError: it was trained on another base, on the same one quantised otherwise, or with
            other attachments on it.
    """
    if config.base_fingerprint != host.fingerprint:
        hint = (
            "the name is the same, but the weights or how they are quantised differ; quantise the "
            "base as it was for the training"
            if config.base_id == host.model_id
            else "attach it to the base that it was trained on"
        )
        raise AdapterError(
            f"the adapter was trained on {config.base_id} (quantization "
            f"{config.base_quantization}, fingerprint {config.base_fingerprint[:SHOWN_DIGITS]}), "
            f"this base is {host.model_id} (fingerprint {host.fingerprint[:SHOWN_DIGITS]}): "
            f"{hint}, or train the adapter anew on this one"
        )
    if config.chain != host.chain:
        raise AdapterError(
            f"the adapter was made for {describe_chain(config.chain)}; this is "
            f"{describe_chain(host.chain)}"
        )


def describe_chain(chain: Sequence[str]) -> str:
    """Name what is attached to a base, from the base on, by the digits that tell it."""
    if not chain:
        return "the base itself"
    return "the base with " + ", then ".join(digest[:SHOWN_DIGITS] for digest in chain)


@contextmanager
def _opened(folder: Path, within: Path | None = None) -> Iterator[int]:
    """Open a folder; from `within` on, each step on the way must be a folder and no link."""
    flags = os.O_RDONLY | os.O_DIRECTORY
    with ExitStack() as stack:

        def enter(path: Path | str, flags: int, above: int | None = None) -> int:
            descriptor = os.open(path, flags, dir_fd=above)
            stack.callback(os.close, descriptor)
            return descriptor

        try:
            descriptor = enter(within or folder, flags)
            for name in folder.relative_to(within).parts if within else ():
                descriptor = enter(name, flags | os.O_NOFOLLOW, descriptor)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise AdapterError(
                f"{folder}: no adapter; it is no folder, or a link to one"
            ) from error
        except OSError as error:
            raise AdapterError(f"{folder}: cannot be read ({error})") from error
        yield descriptor


def _read_file(path: Path, folder: int) -> bytes:
    """Read a file of the folder that is open as `folder`."""
    limit = _MAX_BYTES[path.name]
    try:
        # Without O_NONBLOCK, opening a pipe would wait for its writer.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
        with open(os.open(path.name, flags, dir_fd=folder), "rb") as stream:
            about = os.fstat(stream.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise AdapterError(f"{path}: is no plain file")
            if about.st_size > limit:
                raise AdapterError(f"{path}: over {limit} bytes, the most it may have")
            return stream.read(about.st_size)
    except FileNotFoundError as error:
        raise AdapterError(f"{path.parent}: no adapter; {path.name} is missing") from error
    except (OSError, MemoryError) as error:
        if getattr(error, "errno", None) == errno.ELOOP:
            message = f"{path}: is a link; an adapter is a folder of two plain files"
            raise AdapterError(message) from error
        raise AdapterError(f"{path}: cannot be read ({error})") from error


def check_field_names(values: Mapping[str, Any], known: Collection[str], method: str) -> None:
    """Hold the names of a method's fields against those that it has.

    Raises:
        AdapterError: names every field that is unknown or missing.
    """
    problems = [f"{name}: unknown {method} field" for name in sorted(set(values) - set(known))]
    problems += [f"{name}: missing {method} field" for name in sorted(set(known) - set(values))]
    if problems:
        raise AdapterError("; ".join(problems) + f"; known: {', '.join(sorted(known))}")


def shortened(value: object) -> str:
    """Show a value that may be as large as a file."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def collect_problems(*checks: Callable[[], object]) -> list[str]:
    """Run checks, and return the messages of those that raise `AdapterError`."""
    problems = []
    for check in checks:
        try:
            check()
        except AdapterError as error:
            problems.append(str(error))
    return problems


def _digest(config: bytes, tensors: bytes) -> str:
    hashed = hashlib.sha256(tensors)
    hashed.update(config)
    return hashed.hexdigest()


def _parse_tensors(content: bytes, path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(content)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise AdapterError(
            f"{path}: not a whole safetensors file ({error}); it may be truncated"
        ) from error


def _parse_config(content: bytes, path: Path) -> AdapterConfig:
    try:
        values = json.loads(content, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise AdapterError(f"{path}: must hold a JSON object, got {type(values).__name__}")
    if bad := [_shown(item[0]) for item in values.items() if not _is_text(item)]:
        raise AdapterError(f"{path}: {', '.join(bad)}: text with half a surrogate pair")
    if "peft_type" in values:
        raise AdapterError(
            f"{path}: a PEFT adapter of type {_shown(values['peft_type'])}, which is not served; "
            "served are side networks and variants, as 'proa train' and 'proa prune' make them"
        )
    known = {item.name for item in fields(AdapterConfig)}
    problems = [f"{name}: unknown" for name in sorted(set(values) - known)]
    problems += [f"{name}: missing" for name in sorted(known - set(values))]
    chain = values.get("chain", [])
    if not isinstance(chain, list):
        problems.append(f"chain must be a list of strings, got {chain!r}")
    try:
        _check_version(values.get("format_version", FORMAT_VERSION))  # may explain what is unknown
        if problems:
            raise AdapterError("; ".join(problems))
        return AdapterConfig(**{**values, "chain": tuple(chain)})
    except AdapterError as error:
        raise AdapterError(f"{path}: {error}") from None


def _is_text(value: object) -> bool:
    """Whether UTF-8 can carry a JSON value: half a surrogate pair can be spelt, but not sent."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):
        return False
    return True


def _shown(value: object) -> str:
    """Show a value that may be as large as a file."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _check_version(version: object) -> None:
    if type(version) is not int or version < 1:
        raise AdapterError(f"format_version must be an integer of at least 1, got {version!r}")
    if version > FORMAT_VERSION:
        raise AdapterError(
            f"format_version {version} is newer than {FORMAT_VERSION}, the newest that this "
            "version reads; update proa"
        )


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _config_json(config: AdapterConfig) -> bytes:
    values = {item.name: getattr(config, item.name) for item in fields(config)}
    values |= {name: dict(values[name]) for name in ("fields", "training")}
    try:
        return (json.dumps(values, indent=2, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise AdapterError(f"the adapter's config is no JSON ({error})") from error
