"""Load checkpoints: Hugging Face folders and repositories, bitsandbytes 4-bit ones, GGUF files."""

from models.checkpoints.checkpoint import (
    DEFAULT_CACHE_DIR,
    QUANTIZATIONS,
    Checkpoint,
    fingerprint_weights,
    load_checkpoint,
    quantize_checkpoint,
)
from models.checkpoints.derived import (
    Derivation,
    Lineage,
    Originals,
)
from models.checkpoints.pruned import prune
from models.families import CheckpointError, UnsupportedArchitectureError

__all__ = [
    "DEFAULT_CACHE_DIR",
    "QUANTIZATIONS",
    "Checkpoint",
    "CheckpointError",
    "Derivation",
    "Lineage",
    "Originals",
    "UnsupportedArchitectureError",
    "fingerprint_weights",
    "load_checkpoint",
    "prune",
    "quantize_checkpoint",
]
