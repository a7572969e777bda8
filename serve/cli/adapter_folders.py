"""Adapter folders, read for people: a list, a card, a comparison with a base model."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from adapters.format import (
    CONFIG_FILE,
    SHOWN_DIGITS,
    TENSOR_FILE,
    AdapterError,
    StoredAdapter,
    collect_problems,
    describe_chain,
    read_adapter,
    read_config,
)
from adapters.methods import derive_variant, host_of, method_of, order_chain
from models.checkpoints import CheckpointError
from serve.base_model import load_base
from serve.cli.arguments import CommandError, UserError, printable, say
from serve.model_options import ModelOptions


def describe_folders(roots: Sequence[Path]) -> str:
    """List the adapters below some folders, one a line; damaged ones with what is wrong.

    Raises:
        UserError: a folder is missing.
    """
    lines = []
    for root in roots:
        if not root.is_dir():
            raise UserError(f"FOLDER: {root} is not a folder")
        for path in sorted(root.rglob(CONFIG_FILE)):
            folder = path.parent
            try:
                config = read_config(folder)
                title = method_of(config).title
                text = f"{title}, {_describe_size(folder)}, for {config.base_id}"
                text += f": {config.description}" if config.description else ""
            except AdapterError as error:
                text = f"damaged: {error}"
            except OSError as error:
                text = f"damaged: {TENSOR_FILE}: {error.strerror}"
            lines.append(f"{folder}  {printable(text)}")
    return "\n".join(lines) or "no adapter is there"


def inspect_folder(folder: Path) -> str:
    """Describe an adapter.

    Raises:
        CommandError: it cannot be read.
    """
    try:
        stored = read_adapter(folder)
        method = method_of(stored.config)
        own_rows = method.describe(stored)
    except AdapterError as error:
        raise CommandError(str(error)) from None
    config = stored.config
    num_numbers = sum(tensor.numel() for tensor in stored.tensors.values())
    rows = [
        ("method", f"{config.method}: {method.title}"),
        ("kind", method.kind.replace("_", " ")),
        ("description", config.description or "none"),
        ("base", f"{config.base_id}, quantization {config.base_quantization}"),
        ("fingerprint", config.base_fingerprint),
        ("after", ", ".join(config.chain) or "nothing: attaches to the base itself"),
        ("digest", stored.digest),
        ("numbers", f"{num_numbers}, {_describe_size(folder)}"),
        *own_rows,
        *((f"training: {name}", str(value)) for name, value in config.training.items()),
    ]
    width = max(len(printable(name)) for name, _ in rows)
    return "\n".join(f"{printable(name):{width}}  {printable(value)}" for name, value in rows)


def verify_folder(folder: Path, options: ModelOptions, *, on: Sequence[Path] = ()) -> str:
    """Hold an adapter against a base model, or against variants of one.

    Args:
        folder: the adapter.
        options: name the base.
        on: the variants that it sits on, in any order.

    Returns:
        That it fits.

    Raises:
        UserError: the model or a variant cannot be loaded, or the variants are not what the adapter
            sits on.
        CommandError: the adapter cannot be read, or names everything that does not fit.
    """
    try:
        stored = read_adapter(folder)
        method = method_of(stored.config)
    except AdapterError as error:
        raise CommandError(str(error)) from None
    below = _read_below(folder, stored, on)
    try:
        base = load_base(options, report=say)
    except CheckpointError as error:
        raise UserError(str(error)) from None
    host = host_of(base)
    for path, variant in below:
        try:
            step = derive_variant(path, variant, host)
        except AdapterError as error:
            raise UserError(f"--on: {printable(error)}") from None
        host = replace(host, spec=step.spec, chain=(*host.chain, step.digest))
    if problems := collect_problems(lambda: method.check(stored, host)):
        raise CommandError(f"{folder} does not fit {base.name}: {printable(problems[0])}")
    digits = stored.config.base_fingerprint[:SHOWN_DIGITS]
    place = "".join(f" with the variant {path}" for path, _ in below)
    return f"{folder} fits {base.name}{place} (fingerprint {digits})"


def _read_below(
    folder: Path, stored: StoredAdapter, on: Sequence[Path]
) -> list[tuple[Path, StoredAdapter]]:
    """Return what an adapter sits on, from the base on, out of the folders given for it.

    Raises:
        UserError: one of them cannot be read, is missing or is one too many.
    """
    chain = stored.config.chain
    if chain and not on:
        raise UserError(f"{folder} was made for {describe_chain(chain)}; give those with --on")
    try:
        given = {path: read_adapter(path) for path in on}
        return [(path, given[path]) for path in order_chain(chain, given)]
    except AdapterError as error:
        raise UserError(f"--on: {printable(error)}") from None


def _describe_size(folder: Path) -> str:
    size = (folder / TENSOR_FILE).stat().st_size
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"
