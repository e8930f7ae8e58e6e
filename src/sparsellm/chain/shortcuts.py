"""Modules that later passes over a block need not run, because their output is known.

Once all linears before a *writer* (the output projection of a sublayer) are pruned, its input does not change any more.
:class:`KnownOutput` keeps it, and later passes replace the module around the writer by the writer alone. Which module
that is, is read from one run of the block: it returns the very tensor that the writer returned.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparsellm.chain.capture import hooked, same_tensor, zeros_of
from sparsellm.chain.linears import LinearView


@dataclass(frozen=True, eq=False)
class Shortcut:
    """A module that returns the output of its writer, a linear inside."""

    writer: LinearView
    module: nn.Module  # the largest such module; the writer itself if no other returns its output
    items: int  # length of the tuple that it returns, whose first item is the output; 0 for the output alone
    unread: list[LinearView]  # whose outputs only the writer depends on; empty if the module contains them
    like_input: bool  # whether the output has the shape of the module's first tensor

    def returned(self, output: Tensor) -> Any:
        """The return value of the module for this output of the writer. Other items, such as attention weights, are
        None."""
        return (output, *[None] * (self.items - 1)) if self.items else output

    def zeros(self, *args: Any, **kwargs: Any) -> Any:
        """A forward that returns zeros, for passes that need no output of the module."""
        return self.returned(torch.zeros_like(_tensors(args, kwargs)[0]))


@dataclass(frozen=True)
class _Call:
    """One call of a module. The output is kept, so that no address is used twice during the run."""

    output: Tensor
    version: int  # torch's count of changes of the output in place
    items: int
    like_input: bool
    closed: bool  # whether the module can have changed nothing else


class Calls:
    """The calls of the modules of a block during one run of it, with hidden states of ``size`` elements."""

    def __init__(self, block: nn.Module, size: int) -> None:
        self._block = block
        self._size = size
        self._inner = [module for module in block.modules() if module is not block]
        self._calls: dict[nn.Module, list[_Call | None]] = {}
        self._before: dict[nn.Module, dict[str, Any]] = {}

    def recorded(self) -> contextlib.AbstractContextManager[None]:
        """Records calls until the context ends."""
        self._before = {module: _attributes(module) for module in self._inner}
        return hooked(dict.fromkeys(self._inner, self._record))

    def _record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        items = len(output) if type(output) is tuple else 0
        first = output[0] if items else output
        call = None
        if isinstance(first, Tensor) and first.numel() == self._size:
            tensors = _tensors(args, kwargs)
            like_input = bool(tensors) and tensors[0].shape == first.shape
            call = _Call(first, first._version, items, like_input, all(map(_closed, (*args, *kwargs.values()))))
        self._calls.setdefault(module, []).append(call)

    def around(self, writer: LinearView, path: str) -> tuple[nn.Module, int, bool] | None:
        """The largest module that returns the output of ``writer``, at ``path`` in the block, with ``items`` and
        ``like_input`` of :class:`Shortcut`. None if the writer runs more than once, or not at all.

        A larger module counts if it runs once, is given nothing that it could write to but tensors, and keeps no new
        attributes: it has no effect but its return value.
        """
        written = self._only(writer.module)
        if written is None:
            return None
        largest = writer.module, written.items, written.like_input
        while path := path.rpartition(".")[0]:
            module = self._block.get_submodule(path)
            if module not in self._calls:  # a list of modules
                continue
            call = self._only(module)
            if (
                call is None
                or not call.closed
                or call.version != written.version
                or not same_tensor(call.output, written.output)
                or any(_changed(inner, self._before[inner]) for inner in module.modules())
            ):
                break
            largest = module, call.items, call.like_input
        return largest

    def _only(self, module: nn.Module) -> _Call | None:
        calls = self._calls.get(module, [])
        return calls[0] if len(calls) == 1 else None


@dataclass(eq=False)
class KnownOutput:
    """The output of a shortcut's module for each batch, computed from the kept input of the writer when first asked."""

    shortcut: Shortcut
    release: Callable[[], None] = lambda: None  # frees the memory that was reserved for it
    _values: list[Tensor] = field(default_factory=list)
    _computed: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._forward: Callable[..., Tensor] = self.shortcut.writer.module.forward  # before any pass replaces it

    def append(self, given: Tensor) -> None:
        """Adds the input of the writer for the next batch."""
        self._values.append(given.detach().clone())

    def forwards(self, position: int) -> dict[nn.Module, Callable[..., Any]]:
        """The forward of each module that is not run for the batch of this number."""

        def known(*args: Any, **kwargs: Any) -> Any:
            if position not in self._computed:
                self._values[position] = self._forward(self._values[position])
                self._computed.add(position)
            return self.shortcut.returned(self._values[position].clone())  # the block may change it in place

        return {**{linear.module: zeros_of(linear) for linear in self.shortcut.unread}, self.shortcut.module: known}

    def close(self) -> None:
        """Drops the outputs."""
        self._values.clear()
        self._computed.clear()
        self.release()


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    return [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]


def _closed(value: Any) -> bool:
    """Whether nobody else reads what a module writes to this argument, unless it is a tensor."""
    plain = isinstance(value, (Tensor, bool, int, float, str, type(None)))
    return plain or (type(value) is tuple and all(map(_closed, value)))


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {**vars(module), **module._buffers}


def _changed(module: nn.Module, before: dict[str, Any]) -> bool:
    """Whether an attribute of a module is another object than before."""
    now = _attributes(module)
    return now.keys() != before.keys() or any(now[name] is not value for name, value in before.items())
