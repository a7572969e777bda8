"""Round matrices to GGUF's Q8_0: 8-bit codes and a scale for each 32 values."""

import torch
from torch import Tensor

from models.weights import QuantizedBlocks


def quantize_q8_0(matrix: Tensor) -> QuantizedBlocks:
    """Round a dense (out_features, in_features) matrix; `in_features` is a multiple of 32."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import quantize

    data = quantize(matrix.detach().float().contiguous().numpy(), GGMLQuantizationType.Q8_0)
    return QuantizedBlocks(data=torch.from_numpy(data), kind="Q8_0")
