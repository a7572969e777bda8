"""A model in both backends at once: the native one with plain torch, and vLLM in float32."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adapters.disp.variant import load_disp, save_disp
from adapters.methods import host_of
from adapters.mixed_rank.variant import MixedRankConfig, group_members, save_mixed_rank
from adapters.qst.adapter import save_qst
from adapters.qst.config import QstConfig
from adapters.qst.network import QstNetwork
from adapters.temperature_head.head import HeadConfig, TemperatureHead, save_head
from models.checkpoints import Checkpoint, load_checkpoint
from models.pruning import MODULES, LayerSelection, prune_spec, widths_of
from models.weights import dense
from serve.backends.building import BuiltBackend, build_backend
from serve.backends.protocol import Backend
from serve.config import ServeConfig
from serve.requests import GenerationRequest, TokenOutput
from tests.conftest import write_byte_tokenizer
from tests.models.tiny_models import make_model
from tests.serve.backends.backend_client import collect

WIDE = {"vocab_size": 260, "hidden_size": 128, "eos_token_id": 256, "max_position_embeddings": 512}
"""Changes to a tiny model: heads that vLLM's attention takes, and the byte tokenizer's tokens."""
RUN_S = 120


@dataclass
class Pair:
    """The same model in both backends.

    Attributes:
        native, vllm: the backends.
        built: of the native one, with the tokenizer.
    """

    built: BuiltBackend
    vllm: Backend

    @property
    def native(self) -> Backend:
        return self.built.backend

    def ask(self, request: GenerationRequest) -> tuple[list[TokenOutput], list[TokenOutput]]:
        """Return what each of the two answers."""
        return on(self.native, request), on(self.vllm, request)


def on(backend: Backend, request: GenerationRequest) -> list[TokenOutput]:
    return asyncio.run(asyncio.wait_for(collect(backend, request), RUN_S))


@contextmanager
def open_pair(*, vllm: dict[str, Any] | None = None, **options: Any) -> Iterator[Pair]:
    """Build a pair, closed at the end.

    Args:
        vllm: options of vLLM alone.
        options: of both.
    """
    common = {"max_context": 256, "kernels": "reference"} | options
    built: list[BuiltBackend] = []
    try:
        for own in (
            {"backend": "native", "threads": 1, "head": "dense"},
            {"backend": "vllm", **(vllm or {})},
        ):
            config = ServeConfig(**(common | own))
            built.append(build_backend(config, report=lambda _: None))
        yield Pair(built[0], built[1].backend)
    finally:
        for one in built:
            asyncio.run(one.backend.drain(0.0))


def save_model(folder: Path, name: str, **changes: Any) -> Path:
    """Write a tiny model of a family, with a tokenizer of bytes."""
    middle = "ffn_dim" if name == "opt" else "intermediate_size"
    sizes = WIDE | ({"word_embed_proj_dim": 128} if name == "opt" else {}) | {middle: 128}
    make_model(name, **(sizes | changes)).save_pretrained(folder)
    write_byte_tokenizer(folder)
    return folder


def load(folder: Path, quantization: str = "none") -> Checkpoint:
    return load_checkpoint(str(folder), quantization=quantization)


def save_side(
    folder: Path, base: Checkpoint, *, on: Path | None = None, seed: int = 0, **fields: Any
) -> Path:
    """Write a side network with random weights that say something, for a base or a variant of it.

    Args:
        folder: where to.
        base: the base.
        on: folder of the pruned variant that it is for.
        seed: of the weights.
        fields: of its config.
    """
    spec, chain = base.spec, ()
    if on is not None:
        variant = load_disp(
            on, spec, fingerprint=base.fingerprint, quantization="none", model_id=base.name
        )
        spec, chain = prune_spec(spec, variant.selections), (variant.digest,)
    network = QstNetwork(spec, QstConfig(reduction=4, rank=4, **fields), seed=seed)
    with torch.no_grad():
        network.get_parameter("alpha").fill_(0.25)
        if fields:
            network.get_parameter("classifier.weight").uniform_(-1, 1)
    save_qst(
        folder, network, base_id=base.name, base_fingerprint=base.fingerprint,
        base_quantization=base.quantization, chain=chain,
    )  # fmt: skip
    return folder


def save_warm(folder: Path, base: Checkpoint) -> Path:
    """Write a temperature head with random weights."""
    generator = torch.Generator().manual_seed(5)
    head = TemperatureHead(
        config=HeadConfig(width=6, least=0.2, most=1.4),
        first=torch.randn(6, base.spec.hidden_size, generator=generator), bias=torch.zeros(6),
        second=torch.randn(6, generator=generator), offset=torch.tensor(0.0),
    )  # fmt: skip
    save_head(folder, head, host_of(base), description="", training={})
    return folder


def save_pruned(folder: Path, base: Checkpoint) -> Path:
    """Write a variant that keeps every second channel, or two of three."""
    selections = tuple(
        LayerSelection(
            **{
                module: tuple(i for i in range(width) if i % 4 != n % 2)
                for n, (module, width) in enumerate(zip(MODULES, widths, strict=True))
            }
        )
        for widths in widths_of(base.spec)
    )
    save_disp(
        folder, selections, base.spec, base_id=base.name, base_fingerprint=base.fingerprint,
        base_quantization=base.quantization, dense_fingerprint=base.fingerprint, align=8,
        residual="independent",
    )  # fmt: skip
    return folder


def save_factored(folder: Path, base: Checkpoint, rank: int = 24) -> Path:
    """Write a variant whose first layer is factored: one right factor for q, k and v."""
    groups = ("layers.0.q+k+v", "layers.0.o", "layers.0.gate+up", "layers.0.down")
    factors = {}
    for group in groups:
        matrices = [dense(base.weights[f"{name}.weight"]) for name in group_members(group)]
        left, values, right = torch.linalg.svd(torch.cat(matrices), full_matrices=False)
        scaled = left[:, :rank] * values[:rank]
        lefts = scaled.split([len(matrix) for matrix in matrices])
        factors[group] = (
            [part.half().contiguous() for part in lefts],
            right[:rank].half().contiguous(),
        )
    config = MixedRankConfig(
        ranks=dict.fromkeys(groups, rank), form="float16", plan="uniform", calibration="none",
        metric="outputs", is_compensated=False, remove_linears=0.1, remove_total=0.1,
    )  # fmt: skip
    save_mixed_rank(folder, factors, config, host=host_of(base))
    return folder
