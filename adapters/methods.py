"""The methods that adapters are made with: what each makes of a folder that has been read.

Whoever serves, lists or checks adapters asks the entry of their method, and knows none by name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Generic, TypeAlias, TypeVar

from adapters.disp import variant as disp
from adapters.format import (
    SHOWN_DIGITS,
    AdapterConfig,
    AdapterError,
    Host,
    StoredAdapter,
    describe_chain,
)
from adapters.kinds import Kind
from adapters.mixed_rank import variant as mixed_rank
from adapters.qst import adapter as qst
from adapters.temperature_head import head as temperature_head
from models.checkpoints import Checkpoint, Derivation

Built = TypeVar("Built")
Describe: TypeAlias = Callable[[StoredAdapter], list[tuple[str, str]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class VariantMethod:
    """A method that makes variants.

    Attributes:
        title: what one of them is, for people.
        describe: gives rows of name and value for people; raises `AdapterError`.
        derive: holds one against what it is made of, and says how its weights follow from that;
            raises `AdapterError`, which names everything that does not fit.
    """

    kind: ClassVar[Kind] = "variant"
    title: str
    describe: Describe
    derive: Callable[[StoredAdapter, Host], Derivation]

    def check(self, stored: StoredAdapter, host: Host) -> None:
        """Hold an adapter against what it is to be attached to.

        Raises:
            AdapterError: names everything that does not fit.
        """
        self.derive(stored, host)


@dataclass(frozen=True, kw_only=True, slots=True)
class _BuiltMethod(Generic[Built]):
    """A method whose adapters are built of their own tensors.

    Attributes:
        title, describe: as in `VariantMethod`.
        build: holds one against what it is to be attached to, and makes it ready; raises
            `AdapterError`, which names everything that does not fit.
    """

    title: str
    describe: Describe
    build: Callable[[StoredAdapter, Host], Built]

    def check(self, stored: StoredAdapter, host: Host) -> None:
        """Hold an adapter against what it is to be attached to.

        Raises:
            AdapterError: names everything that does not fit.
        """
        self.build(stored, host)


@dataclass(frozen=True, kw_only=True, slots=True)
class SideMethod(_BuiltMethod[qst.QstAdapter]):
    """A method that makes side networks, whose networks go to `Decoder.attach`."""

    kind: ClassVar[Kind] = "side_network"


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadMethod(_BuiltMethod[temperature_head.TemperatureHead]):
    """A method that makes temperature heads."""

    kind: ClassVar[Kind] = "temperature_head"


Method: TypeAlias = VariantMethod | SideMethod | HeadMethod

METHODS: dict[str, Method] = {
    qst.METHOD: SideMethod(
        title="QST side network", describe=qst.describe_qst, build=qst.build_qst
    ),
    disp.METHOD: VariantMethod(
        title="pruned variant", describe=disp.describe_disp, derive=disp.derive_disp
    ),
    mixed_rank.METHOD: VariantMethod(
        title="mixed-rank variant", describe=mixed_rank.describe_mixed_rank,
        derive=mixed_rank.derive_mixed_rank,
    ),
    temperature_head.METHOD: HeadMethod(
        title="temperature head", describe=temperature_head.describe_head,
        build=temperature_head.build_head,
    ),
}  # fmt: skip
"""By the name that an adapter's config has. A new method is one more line here."""


def host_of(checkpoint: Checkpoint) -> Host:
    """Describe a checkpoint to what is to be attached to it."""
    return Host(
        spec=checkpoint.spec, fingerprint=checkpoint.fingerprint,
        quantization=checkpoint.quantization, model_id=checkpoint.name, chain=checkpoint.chain,
    )  # fmt: skip


def method_of(config: AdapterConfig) -> Method:
    """Return the method that an adapter was made with.

    Raises:
        AdapterError: this version does not know it.
    """
    method = METHODS.get(config.method)
    if method is None:
        known = ", ".join(f"{name} ({entry.title})" for name, entry in METHODS.items())
        raise AdapterError(f"method must be one of {known}; got {config.method[:80]!r}")
    return method


def order_chain(chain: tuple[str, ...], given: Mapping[Path, StoredAdapter]) -> list[Path]:
    """Return folders of adapters in the order in which they follow one another.

    Args:
        chain: digests, from the base on.
        given: what the folders hold.

    Raises:
        AdapterError: one of the chain is not among them, or one of them is not in the chain.
    """
    folders = {stored.digest: folder for folder, stored in given.items()}
    if missing := [digest for digest in chain if digest not in folders]:
        raise AdapterError(
            f"it was made for {describe_chain(chain)}; give the folder of "
            f"{missing[0][:SHOWN_DIGITS]}, too ('proa adapters inspect' shows the digest of each)"
        )
    if unused := [str(folder) for digest, folder in folders.items() if digest not in chain]:
        raise AdapterError(
            f"{', '.join(unused)}: is no part of the chain, which is {describe_chain(chain)}"
        )
    return [folders[digest] for digest in chain]


def derive_variant(folder: Path, stored: StoredAdapter, host: Host) -> Derivation:
    """Say how a variant's weights follow from those of what it sits on.

    Raises:
        AdapterError: the folder does not hold a variant of this, or no variant at all.
    """
    try:
        method = method_of(stored.config)
        if not isinstance(method, VariantMethod):
            raise AdapterError(f"it is a {method.title}; nothing can sit on one")
        return method.derive(stored, host)
    except AdapterError as error:
        raise AdapterError(f"{folder}: {error}") from None
