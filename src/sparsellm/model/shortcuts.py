"""Modules that later passes over a block need not run, because their output is known.

Once all linears before a *writer* (the output projection of a sublayer) are pruned, its input does not change any more.
:class:`KnownOutput` keeps it, and later passes take the writer's output in place of the module around the writer. Which
module that is, is read from one run of the block: it returns the very tensor that the writer returned.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsellm.model.capture import hooked, replacing, same_tensor, zeros_of
from sparsellm.model.structure import LinearView


@dataclass(eq=False)
class KnownOutput:
    """The output of a module that ends with its writer, a linear, for each batch."""

    writer: LinearView
    module: nn.Module  # the largest that returns the writer's output; the linear itself if no other does
    # The length of the tuple that the module returns; 0 if it returns the output alone. The output is the first item.
    # Nobody reads the others, such as attention weights.
    items: int
    unread: list[LinearView]  # whose outputs only the writer depends on
    # inputs of the writer, replaced by its outputs in finish()
    values: list[Tensor] = field(default_factory=list)

    @torch.no_grad()
    def finish(self) -> None:
        """Runs the writer, which is pruned now."""
        for position, given in enumerate(self.values):
            self.values[position] = self.writer.module(given)

    def forwards(self, position: int) -> dict[nn.Module, Callable[..., Any]]:
        """The forward of each module that is not run for the batch of this number."""

        def known(*_: object, **__: object) -> Any:
            output = self.values[position].clone()  # the block may change it in place
            if self.items:
                return (output, *[None] * (self.items - 1))
            return output

        return {
            **{linear.module: zeros_of(linear) for linear in self.unread},
            self.module: known,
        }


def without(
    known: Iterable[KnownOutput], position: int
) -> contextlib.AbstractContextManager[None]:
    """Until the context ends, these modules return their outputs for the batch of this number and do not run."""
    return replacing(
        {
            module: forward
            for output in known
            for module, forward in output.forwards(position).items()
        }
    )


class Return(NamedTuple):
    """What a module returned in its only call."""

    output: Tensor
    version: int  # torch's count of changes of the output in place
    items: int  # length of the returned tuple; 0 for the output alone


class Returns:
    """What the modules of a block return during one run of it, if it has ``size`` elements like the hidden states."""

    def __init__(self, block: nn.Module, size: int) -> None:
        self._block = block
        self._size = size
        # A module has None here if it ran twice, returned something else, or got an argument, other than a tensor, to
        # which it may write.
        self._of: dict[nn.Module, Return | None] = {}

    def recorded(self) -> contextlib.AbstractContextManager[None]:
        """Records returns until the context ends."""
        inside = (
            module for module in self._block.modules() if module is not self._block
        )
        return hooked(dict.fromkeys(inside, self._see))

    def _see(
        self,
        module: nn.Module,
        args: tuple[object, ...],
        kwargs: dict[str, object],
        output: Any,
    ) -> None:
        items = 0
        if type(output) is tuple:
            items = len(output)
        if items:
            first = output[0]
        else:
            first = output
        seen = None
        alone = module not in self._of and all(map(_closed, (*args, *kwargs.values())))
        if alone and isinstance(first, Tensor) and first.numel() == self._size:
            seen = Return(first, first._version, items)
        self._of[module] = seen

    def around(self, writer: LinearView, path: str) -> tuple[nn.Module, Return] | None:
        """The largest module that returns the output of ``writer``, at ``path`` in the block, and has no other effect.
        None if the writer runs more than once, or not at all."""
        written = self._of.get(writer.module)
        if written is None:
            return None
        largest = writer.module, written
        while path := path.rpartition(".")[0]:
            module = self._block.get_submodule(path)
            if module not in self._of:  # a list of modules
                continue
            seen = self._of[module]
            if (
                seen is None
                or seen.version != written.version
                or not same_tensor(seen.output, written.output)
            ):
                break
            largest = module, seen
        return largest


def _closed(value: object) -> bool:
    """Whether this argument holds nothing but tensors to which a module could write."""
    plain = isinstance(value, (Tensor, bool, int, float, str, type(None)))
    return plain or (type(value) is tuple and all(map(_closed, value)))
