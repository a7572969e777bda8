"""The network whose output says which channels to keep.

A GRU over fixed random inputs, one for each structure, so that structures share what they learn.
Source: DISP-LLM's published code, `pruning/hypernetwork.py`.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters.disp.estimators import TEMPERATURE

_INPUT, _HIDDEN = 32, 64
_LEAST = 1e-20
_OUTLIERS = (-2.0, 3.0)
_HEAD_START = 1.2
_OFFSET = 3.0  # every channel starts as kept: sigmoid(3.0 / 0.4) is 0.9994


def head_start(importance: Tensor, costs: Tensor) -> Tensor:
    """Turn how much channels matter into a head start of their logits.

    Channels of all structures are compared with each other, so that it also says how much to take
    of which layer and module.

    Args:
        importance: (N,) at least 0, of all structures' channels.
        costs: (N,) above 0, parameters that each takes.

    Returns:
        (N,) float32: by how many standard deviations the log of a channel's importance for its cost
        is off the mean, some outliers cut, times 1.2.
    """
    scores = importance.clamp_min(_LEAST).log() - costs.log()
    scores = (scores - scores.mean()) / scores.std().clamp_min(_LEAST)
    return scores.clamp(*_OUTLIERS) * _HEAD_START


class Hypernetwork(nn.Module):
    """GRU, norm, GELU and a linear for each structure.

    Its buffers are kept with its parameters: `inputs` (fixed, standard normal), `offset` (added to
    each structure's output; at first 3.0, so that every channel is kept), and `head_start` (added
    to each channel's, see `head_start`). The linears begin as zeros, so that at first the head
    start alone tells channels apart.

    Args:
        widths: channels of each structure.
        seed: of inputs and initial parameters.
    """

    inputs: Tensor
    offset: Tensor
    head_start: Tensor

    def __init__(self, widths: Sequence[int], *, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.register_buffer("inputs", torch.randn(len(widths), 1, _INPUT))
            self.register_buffer("offset", torch.full((len(widths),), _OFFSET))
            self.gru = nn.GRU(_INPUT, _HIDDEN, bidirectional=True)
            self.norm = nn.LayerNorm(2 * _HIDDEN)
            heads = [nn.Linear(2 * _HIDDEN, width, bias=False) for width in widths]
        for head in heads:
            nn.init.zeros_(head.weight)
        self.heads = nn.ModuleList(heads)
        self.register_buffer("head_start", torch.zeros(sum(widths)))

    def forward(self) -> Tensor:
        """Return the (N,) float32 logits of all structures' channels, one after the other."""
        states = F.gelu(self.norm(self.gru(self.inputs)[0][:, 0]))
        parts = zip(self.heads, states, self.offset, strict=True)
        theta = torch.cat([head(state) + offset for head, state, offset in parts])
        return (theta + self.head_start) / TEMPERATURE

    def named_state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield parameters and buffers by name."""
        yield from self.named_parameters()
        yield from self.named_buffers()
