"""Adapter folders, read for people: a list, a card, a comparison with a base model."""

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from adapters.disp.config import from_fields as disp_from_fields
from adapters.disp.variant import DispVariant, load_disp
from adapters.format import (
    CONFIG_FILE,
    TENSOR_FILE,
    AdapterConfig,
    AdapterError,
    StoredAdapter,
    check_base,
    read_adapter,
    read_config,
)
from adapters.qst.adapter import check_qst_tensors
from adapters.qst.config import QstConfig, from_fields
from models.checkpoints import Checkpoint, CheckpointError
from models.pruning import MODULES, prune_spec
from serve.base_model import load_base
from serve.cli.arguments import CommandError, UserError, printable, say
from serve.model_options import ModelOptions

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
                text = f"{config.method}, {_describe_size(folder)}, for {config.base_id}"
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
        own_rows = _disp_rows(stored) if stored.config.method == "disp" else _qst_rows(stored)
    except AdapterError as error:
        raise CommandError(str(error)) from None
    config = stored.config
    num_numbers = sum(tensor.numel() for tensor in stored.tensors.values())
    kind = "indices" if config.method == "disp" else "parameters"
    rows = [
        ("method", config.method),
        ("description", config.description or "none"),
        ("base", f"{config.base_id}, quantization {config.base_quantization}"),
        ("fingerprint", config.base_fingerprint),
        ("after", ", ".join(config.chain) or "nothing: attaches to the base itself"),
        ("digest", stored.digest),
        (kind, f"{num_numbers}, {_describe_size(folder)}"),
        *own_rows,
        *((f"training: {name}", str(value)) for name, value in config.training.items()),
    ]
    width = max(len(printable(name)) for name, _ in rows)
    return "\n".join(f"{printable(name):{width}}  {printable(value)}" for name, value in rows)


def _qst_rows(stored: StoredAdapter) -> list[tuple[str, str]]:
    qst, tensors = from_fields(stored.config.fields), stored.tensors
    rows = [
        ("reduction", f"{qst.reduction}, {_describe_downsample(qst)}"),
        ("task", qst.task + (f", {qst.num_labels} labels" if qst.num_labels else "")),
    ]
    if "alpha" in tensors and "gamma" in tensors:
        rows.append(("share of base", _describe_range(_base_share(qst, tensors["alpha"]))))
        rows.append(("mix gates", _describe_range(tensors["gamma"].float().sigmoid())))
    return rows


def _disp_rows(stored: StoredAdapter) -> list[tuple[str, str]]:
    disp = disp_from_fields(stored.config.fields)
    rows = [
        ("removed of linears", f"{disp.remove_linears:.1%}"),
        ("removed of model", f"{disp.remove_total:.1%}"),
        ("residual channels", disp.residual),
        ("widths", f"of {len(disp.widths)} layers, multiples of {disp.align}"),
    ]
    for module, widths in zip(MODULES, zip(*disp.widths, strict=True), strict=True):
        mean = sum(widths) / len(widths)
        rows.append((f"widths: {module}", f"{mean:.1f} ({min(widths)} to {max(widths)})"))
    return rows


def verify_folder(folder: Path, options: ModelOptions, *, on: Path | None = None) -> str:
    """Hold an adapter against a base model, or against a variant of one.

    Args:
        folder: the adapter.
        options: name the base.
        on: the variant, or None.

    Returns:
        That it fits.

    Raises:
        UserError: the model or the variant cannot be loaded, or a variant is to be on another.
        CommandError: the adapter cannot be read, or names everything that does not fit.
    """
    try:
        stored = read_adapter(folder)
    except AdapterError as error:
        raise CommandError(str(error)) from None
    about = stored.config
    if about.method == "disp" and on is not None:
        raise UserError(f"--on: {folder} is a pruned variant itself, which sits on the base alone")
    if about.method == "qst" and about.chain and on is None:
        raise UserError(
            f"{folder} was trained on a pruned variant ({about.chain[0][:_SHOWN_DIGITS]}); give it "
            "with --on"
        )
    try:
        base = load_base(options, report=say)
    except CheckpointError as error:
        raise UserError(str(error)) from None
    if about.method == "disp":
        problems = _collect(lambda: _load_disp(folder, base))
    else:
        problems = _check_qst(stored, base, on)
    if problems:
        raise CommandError(f"{folder} does not fit {base.name}: " + "; ".join(problems))
    return _describe_fit(folder, about, base.name, on)


def _load_disp(folder: Path, base: Checkpoint) -> DispVariant:
    return load_disp(
        folder, base.spec, fingerprint=base.fingerprint, quantization=base.quantization,
        model_id=base.name,
    )  # fmt: skip


def _check_qst(stored: StoredAdapter, base: Checkpoint, on: Path | None) -> list[str]:
    """Return what does not fit."""
    about, spec = stored.config, base.spec
    chain: tuple[str, ...] = ()
    if on is not None:
        try:
            variant = _load_disp(on, base)
        except AdapterError as error:
            raise UserError(f"--on: {error}") from None
        spec, chain = prune_spec(spec, variant.selections), (variant.digest,)

    def hold_against_base() -> None:
        check_base(about, fingerprint=base.fingerprint, model_id=base.name, chain=chain)

    def hold_tensors() -> None:
        check_qst_tensors(from_fields(about.fields).resolved(spec), spec, stored.tensors)

    return _collect(hold_against_base, hold_tensors)


def _collect(*checks: Callable[[], object]) -> list[str]:
    problems = []
    for check in checks:
        try:
            check()
        except AdapterError as error:
            problems.append(printable(error))
    return problems


def _describe_fit(folder: Path, config: AdapterConfig, model: str, on: Path | None) -> str:
    task = "causal_lm" if config.method == "disp" else from_fields(config.fields).task
    served = "" if task == "causal_lm" else f"; it is for {task} and cannot be served"
    digits = config.base_fingerprint[:_SHOWN_DIGITS]
    place = "" if on is None else f" with the variant {on}"
    return f"{folder} fits {model}{place} (fingerprint {digits}){served}"


def _describe_size(folder: Path) -> str:
    size = (folder / TENSOR_FILE).stat().st_size
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"


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
