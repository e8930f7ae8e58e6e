"""Hooks on the linears of a running block: inputs and outputs, which inputs are shared, and the order of calls."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial

from torch import Tensor, nn

from sparsellm import parallel
from sparsellm.errors import ModelError
from sparsellm.model.structure import LinearView, iterate_linears

Group = list[LinearView]  # linears that share an input
Hook = Callable[[nn.Module, tuple[object, ...], dict[str, object], object], None]


@contextlib.contextmanager
def hooked(hooks: Mapping[nn.Module, Hook]) -> Iterator[None]:
    """Calls ``hook(module, args, kwargs, output)`` whenever one of the modules has run, until the context ends."""
    with contextlib.ExitStack() as handles:
        for module, hook in hooks.items():
            handles.callback(
                module.register_forward_hook(hook, with_kwargs=True).remove
            )
        yield


def watch(
    linears: list[LinearView], see: Callable[[LinearView, Tensor, Tensor], None]
) -> contextlib.AbstractContextManager[None]:
    """Calls ``see(linear, input, output)`` whenever one of the linears runs, until the context ends. The forward raises
    a ModelError if a linear is not called with one tensor first, or returns something else."""

    def hook(
        linear: LinearView,
        module: nn.Module,
        args: tuple[object, ...],
        kwargs: dict[str, object],
        output: object,
    ) -> None:
        given = next(iter((*args, *kwargs.values())), None)
        if not isinstance(given, Tensor) or not isinstance(output, Tensor):
            raise ModelError(
                f"{linear.name}, a {type(module).__name__}, takes {type(given).__name__} and returns "
                f"{type(output).__name__}, not one tensor each; this model cannot be pruned"
            )
        see(linear, given, output)

    return hooked({linear.module: partial(hook, linear) for linear in linears})


def choosing(
    block: nn.Module, chosen: set[str]
) -> contextlib.AbstractContextManager[None]:
    """Until the context ends, whenever the block runs, adds to ``chosen`` the weights of linears inside modules that
    return one tensor of whole numbers, by name."""

    def hook(
        name: str, module: nn.Module, args: object, kwargs: object, output: object
    ) -> None:
        if (
            isinstance(output, Tensor)
            and not output.is_floating_point()
            and not output.is_complex()
        ):
            chosen.update(
                f"{linear}.weight" for linear, _ in iterate_linears(module, name)
            )

    return hooked(
        {module: partial(hook, name) for name, module in block.named_modules() if name}
    )


@contextlib.contextmanager
def replacing(forwards: Mapping[nn.Module, Callable[..., object]]) -> Iterator[None]:
    """Until the context ends, each of these modules has another ``forward``; then one set before is restored."""
    before = {module: vars(module).get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, earlier in before.items():
            if earlier is None:
                del module.forward
            else:
                module.forward = earlier


def _zeros(linear: LinearView, *args: Tensor, **kwargs: Tensor) -> Tensor:
    """Zeros in the shape of the linear's output."""
    given = next(iter((*args, *kwargs.values())))
    return given.new_zeros(*given.shape[:-1], linear.out_features)


def skipping(linears: list[LinearView]) -> contextlib.AbstractContextManager[None]:
    """Replaces linears whose output nobody needs by functions that return zeros, until the context ends."""
    return replacing({linear.module: partial(_zeros, linear) for linear in linears})


class RunOrder(list[str]):
    """The order in which linears run: append the name of a linear for each of its calls during one run of the block."""

    def runs_later(self, linear: LinearView, other: LinearView) -> bool:
        """Whether a linear first runs after another; False if one of them did not run."""
        ran = linear.name in self and other.name in self
        return ran and self.index(linear.name) > self.index(other.name)

    def unread(
        self,
        linears: list[LinearView],
        *,
        inputs: list[LinearView],
        outputs: list[LinearView],
    ) -> list[LinearView]:
        """Those of ``linears`` that first ran after the inputs of ``inputs`` and the outputs of ``outputs`` existed, so
        that none of these depends on them. Empty if one of ``inputs`` or ``outputs`` did not run."""
        last = {name: number for number, name in enumerate(self)}
        if any(linear.name not in last for linear in (*inputs, *outputs)):
            return []
        known = max(
            [last[x.name] for x in inputs] + [last[x.name] + 1 for x in outputs],
            default=0,
        )
        return [x for x in linears if x.name in last and self.index(x.name) >= known]


class InputGroups:
    """Groups linears whose input is the very same tensor, in the order in which they run, so that they share one Gram
    matrix: in a Llama ``[q, k, v], [o], [gate, up], [down]``. The first batch (until ``freeze``) decides."""

    def __init__(self) -> None:
        self.groups: list[Group] = []
        # kept until freeze(), so that no address is used twice
        self._inputs: list[Tensor] = []
        self._head_of: dict[str, str] = {}
        self._frozen = False

    def add(self, linear: LinearView, given: Tensor) -> bool:
        """Adds a linear to its group; returns whether it is the group's first, whose statistics serve all of them."""
        if linear.name not in self._head_of:
            known = zip(self._inputs, self.groups, strict=False)
            group = next(
                (group for tensor, group in known if same_tensor(tensor, given)), None
            )
            if group is None:
                group = []
                self.groups.append(group)
                if not self._frozen:
                    self._inputs.append(given)
            group.append(linear)
            self._head_of[linear.name] = group[0].name
        return self._head_of[linear.name] == linear.name

    def freeze(self) -> None:
        """Ends the first batch and drops its tensors. A linear that first runs later is a group alone."""
        self._frozen = True
        self._inputs.clear()

    def agreed(self, linears: list[LinearView]) -> list[Group]:
        """The groups of all processes, merged: tokens of one process may reach experts that another's do not reach."""
        by_name = {linear.name: linear for linear in linears}
        views = parallel.gather(
            [[linear.name for linear in group] for group in self.groups]
        )
        return [[by_name[name] for name in group] for group in merged(views)]


def merged(views: list[list[list[str]]]) -> list[list[str]]:
    """The groups of names of several processes as one. Two names that share a group in any process share one here: a
    process that separates them met them after its first batch."""
    head_of: dict[str, str] = {}
    for head, *others in (group for groups in views for group in groups):
        head_of.setdefault(head, head)
        head_of.update(dict.fromkeys(others, head))
    names_of: dict[str, list[str]] = {}
    for name, head in head_of.items():
        names_of.setdefault(head, []).append(name)
    return list(names_of.values())


def same_tensor(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are the same object, or the same values in memory in the same shape."""
    return first is second or (
        first.data_ptr() == second.data_ptr()
        and first.shape == second.shape
        and first.stride() == second.stride()
    )
