"""What every linear of a decoder reads, for methods that are fitted to its inputs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from adapters.packed_attention import PackedAttention
from models.kernels.reference.operations import walk_layers
from models.program import LinearOp, Program

Observe: TypeAlias = Callable[[str, Tensor], None]


@torch.no_grad()
def observe_linears(
    program: Program, batches: Sequence[Sequence[Tensor]], observe: Observe
) -> None:
    """Tell the inputs of all linears of the layers, one layer after the other.

    A layer runs over all batches before the next one does, so that what is gathered of a layer can
    be used up at once; between layers only the residual stream of each batch is kept. There is no
    padding: a row is a token.

    Args:
        program: from `models.program.build_program`, on any device.
        batches: sequences to compute together, (S,) int64 token ids each, S > 0.
        observe: called once for each linear and batch with the linear's canonical name, such as
            "layers.3.q", and the (T, in_features) float32 rows that it reads, which must not be
            changed; linears that share their input get the same tensor. Of a low-rank matrix each
            factor is a linear: "layers.3.q.right", then "layers.3.q.left".
    """
    hook, device, walks = _Observer(observe), program.inv_freq.device, []
    for sequences in batches:
        lengths = torch.tensor([0, *map(len, sequences)])
        attend = PackedAttention(lengths.cumsum(0), device)
        positions = torch.cat([torch.arange(len(sequence)) for sequence in sequences]).to(device)
        token_ids = torch.cat(list(sequences)).to(device)
        walks.append(walk_layers(program, token_ids, positions, attend=attend, hook=hook))
    for _ in zip(*walks, strict=True):
        pass


def mean_square_inputs(program: Program, batches: Sequence[Sequence[Tensor]]) -> dict[str, Tensor]:
    """Measure how much each input channel of the layers' linears counts.

    Args:
        program: as for `observe_linears`.
        batches: as for `observe_linears`.

    Returns:
        (in_features,) float32 mean over all tokens of the squared input, by canonical name.
    """
    num_tokens = sum(len(sequence) for sequences in batches for sequence in sequences)
    means: dict[str, Tensor] = {}

    def add(name: str, rows: Tensor) -> None:
        part = rows.square().sum(0) / num_tokens
        means[name] = means[name] + part if name in means else part

    observe_linears(program, batches, add)
    return means


@dataclass(frozen=True, slots=True)
class _Observer:
    """A hook of the reference walk that changes nothing."""

    observe: Observe

    def before(self, op: LinearOp, x: Tensor) -> Tensor:
        for name in op.names:
            self.observe(name, x)
        return x

    def after(self, op: LinearOp, out: Tensor) -> Tensor:
        return out
