"""A model of modules seen block by block, and from inside its blocks."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def hidden_states(output: Any) -> Tensor:
    """Return the hidden states of what a block gives: itself, or the first of several."""
    return output if isinstance(output, Tensor) else output[0]


class _Stop(Exception):
    """Ends a forward pass: what was to be seen has been seen."""


_Call = tuple[tuple[Any, ...], dict[str, Any]]


class BlockStream:
    """A model, block by block: what each is called with, for every batch.

    Blocks that are done are not computed again: they hand out what they made, and what lies between
    two blocks is computed from that.

    Args:
        model: in evaluation mode.
        batches: (B, C, H, W) pixels.
        blocks: names of its blocks, in order of their use.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Tensor], blocks: Sequence[str]) -> None:
        self.model, self._batches, self._blocks = model, batches, blocks
        self._made: list[Any] = []
        self.calls: list[_Call] = []

    @torch.no_grad()
    def enter(self, block: int) -> None:
        """Find out what a block is called with; those before it are done or are computed."""
        self.calls = []
        for number, batch in enumerate(self._batches):
            made = self._made[number] if self._made else None
            with suppress(_Stop), self._patched(block, made):
                self.model(batch)

    def run(self, block: int, number: int) -> Any:
        """Return what it makes of a batch."""
        inputs, named = self.calls[number]
        return self.module(block)(*inputs, **named)

    @torch.no_grad()
    def leave(self, block: int) -> list[Tensor]:
        """Compute it for all batches; return the hidden states."""
        self._made = [self.run(block, number) for number in range(len(self._batches))]
        return [hidden_states(made) for made in self._made]

    @torch.no_grad()
    def inputs(self, block: int, name: str) -> Iterator[Tensor]:
        """Yield what a linear of it reads of each batch; nothing is computed beyond."""
        found: list[Tensor] = []

        def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found.append(inputs[0])
            raise _Stop

        hook = self.model.get_submodule(name).register_forward_pre_hook(note)
        try:
            for number in range(len(self._batches)):
                with suppress(_Stop):
                    self.run(block, number)
                yield found.pop()
        finally:
            hook.remove()

    def module(self, block: int) -> nn.Module:
        """Return a block."""
        return self.model.get_submodule(self._blocks[block])

    def _patched(self, block: int, made: Any) -> "_Patched":
        return _Patched([self.module(i) for i in range(block + 1)], made, self.calls)


class _Patched:
    """Blocks that hand out what is known, and a last one that notes what it is called with."""

    def __init__(self, modules: Sequence[nn.Module], made: Any, calls: list[_Call]) -> None:
        self._modules, self._made, self._calls = modules, made, calls
        self._hook: Any = None

    def __enter__(self) -> None:
        def note(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            self._calls.append((inputs, named))
            raise _Stop

        *done, last = self._modules
        self._hook = last.register_forward_pre_hook(note, with_kwargs=True)
        if self._made is not None and done:
            # Of the blocks before the last one only the shape of what they make counts.
            for module in done[:-1]:
                module.forward = self._pass_on
            done[-1].forward = lambda *_, **__: self._made

    def _pass_on(self, x: Tensor, *_: Any, **__: Any) -> Any:
        return x if isinstance(self._made, Tensor) else (x, *self._made[1:])

    def __exit__(self, *_: object) -> None:
        self._hook.remove()
        for module in self._modules[:-1]:
            module.__dict__.pop("forward", None)


class Watch:
    """Sees what linears of a model read and, after `backward`, gradients of what they made.

    Args:
        model: to run while this is entered.
        linears: names of linears.
        blocks: names of blocks, whose gradients are those of the hidden states.

    Attributes:
        rows, gradients: of the last run, by name.
    """

    def __init__(self, model: nn.Module, linears: Sequence[str], blocks: Sequence[str]) -> None:
        self.rows: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        self._modules = {name: model.get_submodule(name) for name in (*linears, *blocks)}
        self._linears = frozenset(linears)
        self._hooks: list[Any] = []

    def __enter__(self) -> "Watch":
        for name, module in self._modules.items():
            self._hooks.append(module.register_forward_hook(partial(self._see, name)))
        return self

    def _see(self, name: str, _: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if name in self._linears:
            self.rows[name] = inputs[0].detach()
        made = hidden_states(output)
        if made.requires_grad:
            made.register_hook(partial(self.gradients.__setitem__, name))

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
