"""Which dtype matrix products are computed in."""

import torch

from adapters.options import ComputeDtype


def resolve_dtype(choice: ComputeDtype, device: torch.device) -> torch.dtype:
    """Return the dtype of matrix products: "auto" takes the faster one."""
    if choice != "auto":
        return torch.bfloat16 if choice == "bfloat16" else torch.float32
    if device.type == "cuda":
        return torch.bfloat16
    found = torch.cpu.get_capabilities()
    return torch.bfloat16 if found.get("amx_bf16") or found.get("avx512_bf16") else torch.float32
