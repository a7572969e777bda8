"""Prune a checkpoint: the derivation of a variant that keeps a part of each layer's channels."""

from models.checkpoints.derived import Derivation
from models.pruning import Selections, kept_parts, prune_spec, slice_blocks, slice_weight
from models.spec import DecoderSpec, canonical_weights


def prune(spec: DecoderSpec, selections: Selections, *, digest: str) -> Derivation:
    """Describe the variant that keeps some of each layer's channels.

    Weights that keep all of their channels stay as they are; of those in a block format, what is
    made of whole blocks keeps its codes.

    Args:
        spec: not pruned.
        selections: channels that each layer keeps.
        digest: names the selections.

    Raises:
        SpecError: the selections do not fit; every problem is named.
    """
    return Derivation(
        digest=digest,
        spec=prune_spec(spec, selections),
        changed=frozenset(
            name
            for name, _, _ in canonical_weights(spec)
            if any(kept_parts(name, spec, selections))
        ),
        derive=lambda name, read: slice_weight(name, read(name), spec, selections),
        take=lambda name, weight: slice_blocks(name, weight, spec, selections),
    )
