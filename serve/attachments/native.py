"""Adapters as the native backend runs them: decoders over the base's, side networks on either."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from adapters.format import AdapterError, StoredAdapter
from adapters.methods import HeadMethod, SideMethod, host_of, method_of
from models.checkpoints import Checkpoint, Lineage
from models.decoder import Decoder
from models.spec import SpecError
from models.weights import count_linear_parameters
from serve.attachments.registry import AdapterRegistry, Loaded
from serve.attachments.speed import DecodeSpeedTest
from serve.engine.sequence import Attachment, ModelVariant, SideAdapter


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class NativeHost:
    """What an adapter can sit on: the base, or a variant.

    Attributes:
        decoder: runs it.
        lineage: its weights, and what further variants are derived from.
        variant: what sequences run on, or None for the base.
    """

    decoder: Decoder
    lineage: Lineage
    variant: ModelVariant | None = None


NativeRegistry: TypeAlias = AdapterRegistry[Attachment, NativeHost]
BuildDecoder = Callable[[Checkpoint, Decoder], Decoder]
"""Builds the decoder of a variant over that of what it sits on."""


class NativeLoader:
    """Loads adapters of a base; `load` may run on any thread while the engine steps.

    That only reads what the decoder below keeps of its weights, and runs nothing on it.

    Args:
        base: what nothing is below.
        build: for variants.
        report: called with one line at a time about what is being done.
    """

    def __init__(
        self, base: NativeHost, build: BuildDecoder, *, report: Callable[[str], None]
    ) -> None:
        self._base = base
        self._build = build
        self._report = report
        self._num_linear_parameters = count_linear_parameters(base.lineage.checkpoint.weights)

    def load(
        self, stored: StoredAdapter, below: NativeHost | None
    ) -> Loaded[Attachment, NativeHost]:
        """Make an adapter ready to run.

        Raises:
            AdapterError: it does not fit what it sits on.
            CheckpointError: the base's original weights cannot be read, or there are none.
        """
        on, method = below or self._base, method_of(stored.config)
        host = host_of(on.lineage.checkpoint)
        num_parameters = sum(tensor.numel() for tensor in stored.tensors.values())
        if isinstance(method, SideMethod):
            adapter = method.build(stored, host)
            try:
                side = on.decoder.attach(adapter.network)
            except SpecError as error:
                raise AdapterError(str(error)) from error
            given = SideAdapter(side, stored.digest, classifier=adapter.classifier)
            return Loaded(
                given=Attachment(on.variant, given), num_parameters=num_parameters,
                num_bytes=side.num_bytes, labels=adapter.qst.label_names,
            )  # fmt: skip
        if isinstance(method, HeadMethod):
            head = method.build(stored, host)
            return Loaded(
                given=Attachment(on.variant, None, head),
                num_parameters=num_parameters,
                num_bytes=sum(tensor.nbytes for tensor in head.tensors.values()),
            )
        lineage = on.lineage.derive(method.derive(stored, host), report=self._report)
        decoder = self._build(lineage.checkpoint, on.decoder)
        variant = ModelVariant(decoder, stored.digest)
        num_parameters = count_linear_parameters(lineage.checkpoint.weights)
        return Loaded(
            given=Attachment(variant, None),
            below=NativeHost(decoder=decoder, lineage=lineage, variant=variant),
            num_parameters=num_parameters,
            num_bytes=decoder.num_bytes,
            removed=1 - num_parameters / self._num_linear_parameters,
            speed_test=DecodeSpeedTest(decoder, self._base.decoder),
        )
