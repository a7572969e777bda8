"""Adapter folders, read for people: a list, a card, a comparison with a base model."""

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from adapters.format import (
    CONFIG_FILE,
    TENSOR_FILE,
    AdapterConfig,
    AdapterError,
    check_base,
    read_adapter,
    read_config,
)
from adapters.qst.adapter import check_qst_tensors
from adapters.qst.config import QstConfig, from_fields
from models.checkpoints import CheckpointError
from serve.base_model import load_base
from serve.cli.adapters import printable
from serve.cli.arguments import CommandError, UserError, say
from serve.config import ServeConfig

_SHOWN_DIGITS = 12


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
                size = (folder / TENSOR_FILE).stat().st_size / 1e6
                text = f"{config.method}, {size:.1f} MB, for {config.base_id}"
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
        qst = from_fields(stored.config.fields)
    except AdapterError as error:
        raise CommandError(str(error)) from None
    config, tensors = stored.config, stored.tensors
    num_parameters = sum(tensor.numel() for tensor in tensors.values())
    size = (folder / TENSOR_FILE).stat().st_size / 1e6
    rows = [
        ("method", config.method),
        ("description", config.description or "none"),
        ("base", f"{config.base_id}, quantization {config.base_quantization}"),
        ("fingerprint", config.base_fingerprint),
        ("after", ", ".join(config.chain) or "nothing: attaches to the base itself"),
        ("digest", stored.digest),
        ("reduction", f"{qst.reduction}, {_describe_downsample(qst)}"),
        ("task", qst.task + (f", {qst.num_labels} labels" if qst.num_labels else "")),
        ("parameters", f"{num_parameters}, {size:.1f} MB"),
    ]
    if "alpha" in tensors and "gamma" in tensors:
        rows.append(("share of base", _describe_range(_base_share(qst, tensors["alpha"]))))
        rows.append(("mix gates", _describe_range(tensors["gamma"].float().sigmoid())))
    rows += [(f"training: {name}", str(value)) for name, value in config.training.items()]
    width = max(len(printable(name)) for name, _ in rows)
    return "\n".join(f"{printable(name):{width}}  {printable(value)}" for name, value in rows)


def verify_folder(folder: Path, config: ServeConfig) -> str:
    """Hold an adapter against a base model.

    Returns:
        That it fits.

    Raises:
        UserError: the model cannot be loaded.
        CommandError: the adapter cannot be read, or names everything that does not fit.
    """
    try:
        stored = read_adapter(folder)
    except AdapterError as error:
        raise CommandError(str(error)) from None
    try:
        base = load_base(config, report=say)
    except CheckpointError as error:
        raise UserError(str(error)) from None
    about = stored.config

    def hold_against_base() -> None:
        check_base(about, fingerprint=base.fingerprint, model_id=base.name, chain=())

    def hold_tensors() -> None:
        check_qst_tensors(from_fields(about.fields).resolved(base.spec), base.spec, stored.tensors)

    problems = _collect(hold_against_base, hold_tensors)
    if problems:
        raise CommandError(f"{folder} does not fit {base.name}: " + "; ".join(problems))
    return _describe_fit(folder, about, base.name)


def _collect(*checks: Callable[[], None]) -> list[str]:
    problems = []
    for check in checks:
        try:
            check()
        except AdapterError as error:
            problems.append(printable(error))
    return problems


def _describe_fit(folder: Path, config: AdapterConfig, model: str) -> str:
    task = from_fields(config.fields).task
    served = "" if task == "causal_lm" else f"; it is for {task} and cannot be served"
    digits = config.base_fingerprint[:_SHOWN_DIGITS]
    return f"{folder} fits {model} (fingerprint {digits}){served}"


def _describe_downsample(qst: QstConfig) -> str:
    has_rank = qst.downsample in ("lora", "adapter")
    return f"downsample {qst.downsample}" + (f" of rank {qst.rank}" if has_rank else "")


def _base_share(qst: QstConfig, alpha: Tensor) -> Tensor:
    alpha = alpha.float()
    if qst.final_gate == "raw":
        return alpha
    return (alpha if qst.final_gate == "sigmoid" else -alpha).sigmoid()


def _describe_range(values: Tensor) -> str:
    mean = f"{values.mean():.4f}"
    return mean if values.numel() == 1 else f"{mean} ({values.min():.4f} to {values.max():.4f})"
