"""Hooks on the linears of a running block: inputs and outputs, which inputs are shared, and the order of calls."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from sparsellm import parallel
from sparsellm.chain.linears import LinearView, iterate_linears
from sparsellm.errors import ModelError


@contextlib.contextmanager
def watch(linears: list[LinearView], see: Callable[[LinearView, Tensor, Tensor], None]) -> Iterator[None]:
    """Calls ``see(linear, input, output)`` whenever one of the linears runs, until the context ends.

    Raises:
        ModelError: from the forward, if a linear is not called with one tensor first, or returns something else.
    """

    def hook_for(linear: LinearView) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            entering = next(iter((*args, *kwargs.values())), None)
            if not isinstance(entering, Tensor) or not isinstance(output, Tensor):
                raise ModelError(
                    f"{linear.name}, a {type(module).__name__}, takes {type(entering).__name__} and returns "
                    f"{type(output).__name__}, not one tensor each; this model cannot be pruned"
                )
            see(linear, entering, output)

        return hook

    handles = [linear.module.register_forward_hook(hook_for(linear), with_kwargs=True) for linear in linears]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def choosing(block: nn.Module, found: set[str]) -> Iterator[None]:
    """Adds the weights of linears inside modules that return one tensor of whole numbers to ``found``, by their names
    in the block, whenever the block runs, until the context ends."""

    def hook_for(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not output.is_floating_point() and not output.is_complex():
                found.update(f"{linear}.weight" for linear, _ in iterate_linears(module, name))

        return hook

    handles = [module.register_forward_hook(hook_for(name)) for name, module in block.named_modules() if name]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def replacing(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Sets another ``forward`` on each of these modules, until the context ends.

    A ``forward`` that was already set on an instance is restored afterwards.
    """
    own = {module: vars(module).get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, before in own.items():
            if before is None:
                del module.forward
            else:
                module.forward = before


def zeros_of(linear: LinearView) -> Callable[..., Tensor]:
    """A forward that returns zeros in the shape of the linear's output."""
    width = linear.out_features

    def zeros(*args: Any, **kwargs: Any) -> Tensor:
        entering: Tensor = next(iter((*args, *kwargs.values())))
        return entering.new_zeros(*entering.shape[:-1], width)

    return zeros


def skipping(linears: list[LinearView]) -> contextlib.AbstractContextManager[None]:
    """Replaces these linears by functions that return zeros, until the context ends: for runs that need no output of
    theirs."""
    return replacing({linear.module: zeros_of(linear) for linear in linears})


class RunOrder:
    """The order in which linears run. Call :meth:`see` for each call of a linear during one run of the block."""

    def __init__(self) -> None:
        self._first: dict[str, int] = {}
        self._last: dict[str, int] = {}
        self._calls = 0

    def see(self, linear: LinearView) -> None:
        self._first.setdefault(linear.name, self._calls)
        self._last[linear.name] = self._calls
        self._calls += 1

    def first(self, names: Iterable[str]) -> int | None:
        """The number of the first call of any of these linears; None if none of them ran."""
        return min((self._first[name] for name in names if name in self._first), default=None)

    def unread(
        self, linears: list[LinearView], *, inputs: list[LinearView], outputs: list[LinearView]
    ) -> list[LinearView]:
        """The linears that first ran after all wanted inputs and outputs existed: none of those depends on them.

        A linear that did not run is not returned. If a linear in ``inputs`` or ``outputs`` did not run, the list is
        empty.

        Args:
            linears: candidates.
            inputs: linears whose input is wanted.
            outputs: linears whose output is wanted.
        """
        if any(linear.name not in self._last for linear in (*inputs, *outputs)):
            return []
        known = max([self._last[x.name] for x in inputs] + [self._last[x.name] + 1 for x in outputs], default=0)
        return [linear for linear in linears if self._first.get(linear.name, -1) >= known]


class InputGroups:
    """Groups linears whose input is the very same tensor, in the order in which they run.

    For a Llama block: ``[q, k, v], [o], [gate, up], [down]``. The linears of a group share one Gram matrix, and one
    factorisation. The first batch decides the groups (:meth:`add` until :meth:`freeze`); they do not change afterwards.
    """

    def __init__(self) -> None:
        self.groups: list[list[LinearView]] = []
        self._inputs: list[Tensor] = []  # kept until freeze(), so that no address is used twice
        self._head_of: dict[str, str] = {}
        self._frozen = False

    def add(self, linear: LinearView, entering: Tensor) -> bool:
        """Adds a linear to its group; returns whether it is the group's first, whose statistics serve all of them."""
        if linear.name not in self._head_of:
            for tensor, group in zip(self._inputs, self.groups, strict=False):
                if same_tensor(tensor, entering):
                    group.append(linear)
                    self._head_of[linear.name] = group[0].name
                    break
            else:
                self.groups.append([linear])
                self._head_of[linear.name] = linear.name
                if not self._frozen:
                    self._inputs.append(entering)
        return self._head_of[linear.name] == linear.name

    def freeze(self) -> None:
        """Ends the first batch and drops its tensors. A linear that runs for the first time later is a group alone."""
        self._frozen = True
        self._inputs.clear()

    def agreed(self, linears: list[LinearView]) -> list[list[LinearView]]:
        """The groups of all processes, merged: tokens of one process may reach experts that another's do not reach."""
        if parallel.size() == 1:
            return self.groups
        by_name = {linear.name: linear for linear in linears}
        views = parallel.gather([[linear.name for linear in group] for group in self.groups])
        return [[by_name[name] for name in group] for group in merged(views)]


def merged(views: list[list[list[str]]]) -> list[list[str]]:
    """One grouping of names from the groupings of several processes.

    Two names that share a group in any view share one here. A view that separates them met them after its first batch.
    """
    head_of: dict[str, str] = {}
    for groups in views:
        for head, *others in groups:
            head_of.setdefault(head, head)
            head_of.update(dict.fromkeys(others, head))
    names_of: dict[str, list[str]] = {}
    for name, head in head_of.items():
        names_of.setdefault(head, []).append(name)
    return list(names_of.values())


def same_tensor(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are one: the same object, or the same values in memory in the same shape."""
    return first is second or (
        first.data_ptr() == second.data_ptr() and first.shape == second.shape and first.stride() == second.stride()
    )
