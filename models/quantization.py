"""Round matrices to bitsandbytes' 4-bit format."""

import torch
from torch import Tensor

from models.weights import Quantized4Bit

# The 16 quantiles of a normal distribution of QLoRA (Dettmers et al. 2023, appendix E).
NF4_CODEBOOK = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def quantize_4bit(matrix: Tensor, block_size: int = 64) -> Quantized4Bit:
    """Round a dense (out_features, in_features) matrix to NF4, blocks over the flattened matrix."""
    codebook = torch.tensor(NF4_CODEBOOK)
    boundaries = (codebook[1:] + codebook[:-1]) / 2
    flat = matrix.detach().reshape(-1)
    num_blocks = -(-flat.numel() // block_size)
    absmax = torch.empty(num_blocks)
    packed = torch.empty(num_blocks * block_size // 2, dtype=torch.uint8)
    step = 1 << 16  # blocks at a time: bounds the float32 copies
    for first in range(0, num_blocks, step):
        values = flat[first * block_size : (first + step) * block_size].float()
        count = -(-values.numel() // block_size)
        values = torch.nn.functional.pad(values, (0, count * block_size - values.numel()))
        blocks = values.view(count, block_size)
        absmax[first : first + count] = scales = blocks.abs().amax(1)
        inverse = torch.where(scales > 0, 1 / scales, 0)
        codes = torch.bucketize(blocks * inverse[:, None], boundaries).to(torch.uint8)
        pairs = codes.view(-1, 2)
        start = first * block_size // 2
        packed[start : start + len(pairs)] = pairs[:, 0] << 4 | pairs[:, 1]
    return Quantized4Bit(
        packed=packed[: (flat.numel() + 1) // 2],
        absmax=absmax,
        codebook=codebook,
        shape=(matrix.shape[0], matrix.shape[1]),
        block_size=block_size,
    )
