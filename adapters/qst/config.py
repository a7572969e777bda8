"""Sizes and switches of a side network, and the narrow decoder that follows from them.

With `side_attention` "base" there is no narrow decoder: the side network is a fork of the base's
last layers (`models.fork`).

The paper's symbols: r is `reduction`, k is `rank`; gamma are the mix gates' logits, alpha the final
gate. Source: Quantized Side Tuning, arXiv 2401.07159, section 3; the switches that depart from it
reproduce the published code, YouAreSpecialToMe/QST at 27cef0a.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from adapters.format import AdapterError
from models.spec import Activation, DecoderSpec, LayerSpec, RotarySpec

DownsampleKind = Literal["linear", "lora", "adapter", "maxpool", "avgpool"]
SideAttention = Literal["own", "base"]
GateShape = Literal["scalar", "vector"]
FinalGate = Literal["raw", "sigmoid", "sigmoid_swapped"]
Task = Literal["causal_lm", "sequence_classification"]
PerLayer = int | tuple[int, ...]

_CHOICES: dict[str, tuple[str, ...]] = {
    "side_attention": get_args(SideAttention),
    "downsample": get_args(DownsampleKind),
    "activation": get_args(Activation),
    "gate_shape": get_args(GateShape),
    "final_gate": get_args(FinalGate),
    "task": get_args(Task),
}
_MAX_NUMBER = 1e30
DEFAULT_SIDE_LAYERS = 4
_OF_FORKS = ("side_attention", "side_layers", "rank", "task", "num_labels", "labels")
_SIZES = ("side_heads", "side_kv_heads", "side_head_dim", "side_intermediate")


@dataclass(frozen=True, kw_only=True, slots=True)
class QstConfig:
    """A side network's description.

    What is None follows from the base; `resolved` fills it in. Stored configs are resolved, so
    that they mean the same whatever becomes of these rules. A size is one number for all layers,
    or one for each.

    Attributes:
        side_attention: "own": a narrow decoder with keys and values of its own, as in the paper;
            "base": a fork of the base's last layers, which reads the base's. With "base" only
            `side_layers`, `rank`, `task`, `num_labels` and `labels` may differ from their defaults.
        side_layers: layers that are forked; None: 4, or all if the base has fewer. None with "own".
        reduction: the side network is this many times narrower than the base.
        rank: middle width of the downsamples "lora" and "adapter"; of a fork's differences.
        downsample: "linear": one matrix; "lora": two thin ones; "adapter": two thin ones with an
            activation between and a layer norm after; "maxpool", "avgpool": over neighbours.
        activation: of the downsample "adapter".
        downsample_norm: whether the downsample "adapter" has its layer norm.
        tie_embedding_downsample: the embedding goes through the first layer's downsample.
        gate_shape: whether mix and final gates are one number or one for each channel.
        final_gate: share of the base in the output: "raw": alpha; "sigmoid": sigmoid(alpha);
            "sigmoid_swapped": 1 - sigmoid(alpha).
        side_heads, side_kv_heads: attention heads; None: the base's.
        side_head_dim: width of a head; None: the base's / reduction.
        side_intermediate: MLP middle width; None: the base's / reduction, its integer part where
            the layers of the base differ.
        has_linear_bias: whether linears have biases; None: if the base uses layer norms (those
            families have them).
        rotary_inv_freq: inverse frequencies of the side heads; () for no rotation; None: see
            `side_rotary`.
        rotary_scale: factor on cos and sin; None: the base's.
        task: "causal_lm" ends in the base's LM head, "sequence_classification" in its own.
        num_labels: outputs of the classification head; 1 is a regression; 0 without one.
        labels: their names; empty if they have none.
    """

    side_attention: SideAttention = "own"
    side_layers: int | None = None
    reduction: int = 16
    rank: int = 16
    downsample: DownsampleKind = "adapter"
    activation: Activation = "silu"
    downsample_norm: bool = True
    tie_embedding_downsample: bool = False
    gate_shape: GateShape = "scalar"
    final_gate: FinalGate = "raw"
    side_heads: PerLayer | None = None
    side_kv_heads: PerLayer | None = None
    side_head_dim: PerLayer | None = None
    side_intermediate: PerLayer | None = None
    has_linear_bias: bool | None = None
    rotary_inv_freq: tuple[float, ...] | None = None
    rotary_scale: float | None = None
    task: Task = "causal_lm"
    num_labels: int = 0
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if problems := list(_find_problems(self)):
            raise AdapterError("; ".join(problems))

    @property
    def label_names(self) -> tuple[str, ...] | None:
        """A name for each output of the classification head; None without one."""
        if self.task != "sequence_classification":
            return None
        return self.labels or tuple(f"LABEL_{i}" for i in range(self.num_labels))

    def resolved(self, base: DecoderSpec) -> "QstConfig":
        """Fill in what follows from the base.

        Raises:
            AdapterError: names everything that does not fit the base.
        """
        if self.side_attention == "base":
            return self._resolved_fork(base)
        problems: list[str] = []
        if base.hidden_size % self.reduction:
            problems.append(_indivisible("hidden_size", base.hidden_size, self.reduction))
        if self.rank > base.hidden_size:
            problems.append(f"rank must be at most hidden_size {base.hidden_size}, got {self.rank}")
        sizes: dict[str, Any] = {name: self._size(name, base, problems) for name in _SIZES}
        if problems:
            raise AdapterError("the side network does not fit the base: " + "; ".join(problems))
        inv_freq, scale = self.rotary_inv_freq, self.rotary_scale
        rotary = side_rotary(base, _each(sizes["side_head_dim"], base)[0])
        if inv_freq is None:
            inv_freq = rotary.inv_freq if rotary else ()
        if scale is None:
            scale = rotary.attention_scale if rotary else 1.0
        has_bias = self.has_linear_bias
        return replace(
            self, **sizes, rotary_inv_freq=inv_freq, rotary_scale=scale,
            has_linear_bias=base.norm == "layer" if has_bias is None else has_bias,
        )  # fmt: skip

    def side_spec(self, base: DecoderSpec) -> DecoderSpec:
        """Describe the narrow decoder.

        It has the base's kind of layers; it adds no learned positions of its own (neither does
        the published code) and always ends in a norm.

        Raises:
            AdapterError: the config does not fit the base, or there is no such decoder.
        """
        if self.side_attention == "base":
            raise AdapterError("side_attention base: a fork has no narrow decoder")
        config = self.resolved(base)
        heads, kv_heads, dims, middles = (_each(getattr(config, name), base) for name in _SIZES)
        assert config.rotary_inv_freq is not None
        assert config.rotary_scale is not None
        rotated = 2 * len(config.rotary_inv_freq)
        problems = [
            f"layer {i}: side_heads {h} must be a multiple of side_kv_heads {k}"
            for i, (h, k) in enumerate(zip(heads, kv_heads, strict=True))
            if h % k
        ]
        if rotated > min(dims):
            problems.append(f"side_head_dim {min(dims)} is below the {rotated} rotated channels")
        if problems:
            raise AdapterError("the side network does not fit the base: " + "; ".join(problems))
        rotary = RotarySpec(
            dim=rotated, inv_freq=config.rotary_inv_freq, attention_scale=config.rotary_scale
        )
        layers = tuple(
            LayerSpec(num_attention_heads=h, num_key_value_heads=k, head_dim=e, intermediate_size=m)
            for h, k, e, m in zip(heads, kv_heads, dims, middles, strict=True)
        )
        return replace(
            base, hidden_size=base.hidden_size // config.reduction, layers=layers,
            rotary=rotary if rotated else None, learned_positions_offset=None, final_norm=True,
        )  # fmt: skip

    def to_fields(self) -> dict[str, Any]:
        """Return JSON values that `from_fields` makes the same config of; those that mean nothing
        are left out.
        """
        is_fork = self.side_attention == "base"
        names = [item.name for item in fields(self)]
        names = [n for n in names if (n in _OF_FORKS if is_fork else n != "side_layers")]
        values = {name: getattr(self, name) for name in names}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    def _resolved_fork(self, base: DecoderSpec) -> "QstConfig":
        total = len(base.layers)
        layers = self.side_layers or min(DEFAULT_SIDE_LAYERS, total)
        problems = []
        if layers > total:
            problems.append(f"side_layers must be at most the base's {total}, got {layers}")
        if self.rank > base.hidden_size:
            problems.append(f"rank must be at most hidden_size {base.hidden_size}, got {self.rank}")
        if problems:
            raise AdapterError("the side network does not fit the base: " + "; ".join(problems))
        return replace(self, side_layers=layers)

    def _size(self, name: str, base: DecoderSpec, problems: list[str]) -> PerLayer:
        given, r = getattr(self, name), self.reduction
        if given is not None:
            if isinstance(given, tuple) and len(given) != len(base.layers):
                problems.append(f"{name}: {len(given)} values for {len(base.layers)} layers")
            return given
        layers = base.layers
        if name == "side_heads":
            return _shortest(layer.num_attention_heads for layer in layers)
        if name == "side_kv_heads":
            if self.side_heads is not None:
                problems.append("side_kv_heads must be given with side_heads")
                return 1
            return _shortest(layer.num_key_value_heads for layer in layers)
        if name == "side_head_dim":
            if any(layer.head_dim % r or layer.head_dim < 2 * r for layer in layers):
                found = min(layer.head_dim for layer in layers)
                problems.append(
                    _indivisible("head_dim", found, r, at_least=2)
                    + ", or give side_heads, side_kv_heads and side_head_dim"
                )
            elif base.rotary and base.rotary.dim == layers[0].head_dim and base.rotary.dim // r % 2:
                problems.append(
                    f"reduction {r} of head_dim {layers[0].head_dim} gives an odd width, which "
                    "cannot be rotated: give side_heads, side_kv_heads and side_head_dim"
                )
            return _shortest(layer.head_dim // r for layer in layers)
        middles = {layer.intermediate_size for layer in layers}
        if len(middles) == 1 and min(middles) % r:
            problems.append(
                _indivisible("intermediate_size", min(middles), r) + ", or give side_intermediate"
            )
        return _shortest(max(1, layer.intermediate_size // r) for layer in layers)


def from_fields(values: Mapping[str, Any]) -> QstConfig:
    """Read a config from JSON values.

    Raises:
        AdapterError: names every field that is unknown or has a value it may not have.
    """
    known = {item.name for item in fields(QstConfig)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise AdapterError(
            f"unknown qst fields: {', '.join(unknown)}; known: {', '.join(sorted(known))}"
        )
    return QstConfig(**{name: _tupled(value) for name, value in values.items()})


def side_rotary(base: DecoderSpec, head_dim: int) -> RotarySpec | None:
    """Give the rotation of side heads: the base's frequencies, at the same relative channels.

    The base rotates channel pair i of its n with a frequency f(i / n). For theta ** (-i / n), and
    for the scalings, which act on each wavelength, that f is what the same rope settings give a
    narrower head. So side pair j of m turns with f(j / m): where m divides n the frequency is one
    of the base's, else log f is interpolated (exact without scaling). A base that rotates a part
    of its heads has side heads that rotate the same part, rounded down to an even width.

    Args:
        base: the base decoder.
        head_dim: width of a side head.
    """
    rotary = base.rotary
    if rotary is None:
        return None
    share = rotary.dim / base.layers[0].head_dim
    pairs = max(1, int(head_dim * share / 2 + 1e-9))
    logs = [math.log(value) for value in rotary.inv_freq]

    def frequency(j: int) -> float:
        i, rest = divmod(j * len(logs), pairs)
        if rest == 0 and i < len(logs):
            return rotary.inv_freq[i]
        i = min(i, len(logs) - 2)
        if i < 0:
            return rotary.inv_freq[0]
        where = j * len(logs) / pairs - i
        return math.exp(logs[i] + where * (logs[i + 1] - logs[i]))

    return RotarySpec(
        dim=2 * pairs, inv_freq=tuple(frequency(j) for j in range(pairs)),
        attention_scale=rotary.attention_scale,
    )  # fmt: skip


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _find_problems(config: QstConfig) -> Iterator[str]:
    def check(name: str, allowed: str, is_fine: Callable[[Any], bool]) -> Iterator[str]:
        value = getattr(config, name)
        if not is_fine(value):
            yield f"{name} must be {allowed}, got {value!r}"

    def count(value: object) -> bool:
        return type(value) is int and value >= 1

    def sizes(value: object) -> bool:
        return value is None or all(map(count, value if isinstance(value, tuple) else (value,)))

    def number(value: object) -> bool:
        return type(value) in (int, float) and 0 < value < _MAX_NUMBER  # type: ignore[operator]

    if config.side_attention == "base":
        for item in fields(config):
            if item.name not in _OF_FORKS and getattr(config, item.name) != item.default:
                yield f"{item.name} has no meaning with side_attention base"
    yield from check(
        "side_layers",
        "an integer of at least 1, or null"
        if config.side_attention == "base"
        else "null with side_attention own",
        lambda v: v is None or (count(v) and config.side_attention == "base"),
    )
    for name in ("reduction", "rank"):
        yield from check(name, "an integer of at least 1", count)
    for name, choices in _CHOICES.items():
        yield from check(name, f"one of {', '.join(choices)}", lambda v, c=choices: v in c)  # type: ignore[misc]
    for name in ("downsample_norm", "tie_embedding_downsample"):
        yield from check(name, "true or false", lambda v: type(v) is bool)
    yield from check(
        "has_linear_bias", "true, false or null", lambda v: v is None or type(v) is bool
    )
    for name in _SIZES:
        yield from check(name, "positive integers or null", sizes)
    yield from check(
        "rotary_inv_freq", "a list of positive numbers or null",
        lambda v: v is None or (isinstance(v, tuple) and all(map(number, v))),
    )  # fmt: skip
    yield from check("rotary_scale", "above 0 or null", lambda v: v is None or number(v))
    is_classifier = config.task == "sequence_classification"
    yield from check(
        "num_labels",
        "an integer of at least 1" if is_classifier else "0 for causal_lm",
        lambda v: count(v) if is_classifier else type(v) is int and v == 0,
    )
    yield from check(
        "labels", "num_labels different strings, or none",
        lambda v: isinstance(v, tuple) and all(isinstance(s, str) for s in v)
        and len(set(v)) == len(v) and len(v) in (0, config.num_labels),
    )  # fmt: skip


def _each(size: PerLayer, base: DecoderSpec) -> Sequence[int]:
    return size if isinstance(size, tuple) else (size,) * len(base.layers)


def _shortest(sizes: Iterator[int]) -> PerLayer:
    values = tuple(sizes)
    return values[0] if len(set(values)) == 1 else values


def _indivisible(name: str, size: int, reduction: int, *, at_least: int = 1) -> str:
    fitting = [r for r in range(2, 65) if size % r == 0 and size // r >= at_least]
    return (
        f"reduction {reduction} does not divide the base's {name} {size} "
        f"(at least {at_least} must be left): use {', '.join(map(str, fitting)) or 'none'}"
    )
