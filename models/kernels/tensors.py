"""Rebuild and count the tensors of programs, whatever executor runs them."""

import dataclasses
from collections.abc import Callable, Mapping

from torch import Tensor

from models.program import Program


def map_tensors(
    item: object,
    change: Callable[[Tensor], Tensor],
    rebuild: Callable[[object], object | None] = lambda _: None,
) -> object:
    """Rebuild nested dataclasses, tuples and mappings with every tensor changed, each one once.

    Args:
        item: what to rebuild.
        change: gives the new tensor.
        rebuild: gives an item's replacement as a whole, or None to look into it.
    """
    changed: dict[int, tuple[Tensor, Tensor]] = {}

    def visit(item: object) -> object:
        if isinstance(item, Tensor):
            if id(item) not in changed:
                changed[id(item)] = (item, change(item))
            return changed[id(item)][1]
        whole = rebuild(item)
        if whole is not None:
            return whole
        if isinstance(item, tuple):
            return tuple(visit(part) for part in item)
        if isinstance(item, Mapping):
            return {key: visit(part) for key, part in item.items()}
        if dataclasses.is_dataclass(item) and not isinstance(item, type):
            fields = {f.name: visit(getattr(item, f.name)) for f in dataclasses.fields(item)}
            return dataclasses.replace(item, **fields)
        return item

    return visit(item)


def count_bytes(program: Program, base: Program | None = None) -> int:
    """Count the bytes of what a program computes with, without what another one has too."""

    def tensors_of(program: Program) -> dict[int, Tensor]:
        found: dict[int, Tensor] = {}
        map_tensors(program.ops, lambda tensor: found.setdefault(id(tensor), tensor))
        return found

    shared = set() if base is None else tensors_of(base).keys()
    return sum(tensor.nbytes for key, tensor in tensors_of(program).items() if key not in shared)
