"""The sublayers of a block, such as attention and the feed-forward unit: groups of linears and an output projection."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from sparsellm.model import LinearView, Stream
from sparsellm.model.capture import Group, InputGroups, RunOrder, watch
from sparsellm.model.experts import without_experts
from sparsellm.model.shortcuts import KnownOutput, Returns, without


@dataclass(frozen=True)
class Sublayer:
    """Groups of linears that share an input, in the order in which they run.

    The writer is the last linear, alone on its input, with as many outputs as the residual stream is wide. A sublayer
    whose writer is not pruned, or alone is pruned, is joined to the next one; the last one then has the writer None."""

    groups: list[Group]  # at least one, none empty
    writer: LinearView | None
    shortcut: KnownOutput | None = (
        None  # the module around the writer, which later passes leave out
    )

    @property
    def names(self) -> set[str]:
        return {linear.name for group in self.groups for linear in group}


def find_sublayers(
    stream: Stream, index: int, linears: list[LinearView], order: RunOrder
) -> list[Sublayer]:
    """The sublayers of the loaded block ``index``, of which ``linears`` are pruned, recognised on one window. Linears
    that do not get all its tokens (experts) are left out. ``order`` records the order in which all linears run."""
    tokens, width = stream.hidden[0].shape[1:]
    returns = Returns(stream.chain.blocks[index], tokens * width)
    pruned = {linear.name for linear in without_experts(linears)}
    grouping = InputGroups()
    outputs: dict[str, Tensor] = {}  # outputs of the linears that could be writers
    # linears that run again, so that a window has several targets
    repeated: set[str] = set()

    def see(linear: LinearView, x: Tensor, y: Tensor) -> None:
        order.append(linear.name)
        if linear.name in pruned and x.shape[:-1].numel() == tokens:
            grouping.add(linear, x)
            if linear.out_features == width:
                repeated.update({linear.name} & outputs.keys())
                outputs[linear.name] = y.clone()

    with returns.recorded(), watch(stream.chain.linears(index), see):
        output = stream.run_window(index)
    sublayers: list[Sublayer] = []
    groups: list[Group] = []
    later = list(linears)
    proven = list[KnownOutput]()
    for group in grouping.agreed(linears):
        groups.append(group)
        later = [linear for linear in later if linear not in group]
        if (
            len(group) > 1
            or group[0].out_features != width
            or group[0].name in repeated
        ):
            continue
        # In a parallel block the feed-forward unit shares the input of attention, but runs after attention's writer.
        late = [
            [x for x in sharing if _run_later([x], group[0], order)]
            for sharing in groups
        ]
        early = [
            [x for x in sharing if x not in after]
            for sharing, after in zip(groups, late, strict=True)
        ]
        if len(groups) > 1 and all(early):
            after = [*later, *chain.from_iterable(late)]
            block_name = stream.chain.block_names[index]
            known = _shortcut(block_name, early, order, returns, after)
            if known is not None:
                trial = [*proven, replace(known, values=[outputs[group[0].name]])]
                if _proves(stream, index, trial, output):
                    proven = trial
                else:
                    known = None
            sublayers.append(Sublayer(early, group[0], known))
            groups = [sharing for sharing in late if sharing]
    if groups:
        sublayers.append(Sublayer(groups, None))
    return sublayers


def _shortcut(
    block_name: str,
    groups: list[Group],
    order: RunOrder,
    returns: Returns,
    later: list[LinearView],
) -> KnownOutput | None:
    """The module around the writer, last of ``groups``, if pruning the linears ``later`` does not change its input."""
    (writer,) = groups[-1]
    if not _run_later(later, writer, order):
        return None
    around = returns.around(writer, writer.name.removeprefix(f"{block_name}."))
    if around is None:
        return None
    module, returned = around
    if not {linear.module for linear in later}.isdisjoint(module.modules()):
        return None
    before: Group = []
    if module is writer.module:
        before = [linear for group in groups[:-1] for linear in group]
    return KnownOutput(writer, module, returned.items, before)


def _run_later(linears: list[LinearView], writer: LinearView, order: RunOrder) -> bool:
    """Whether all these linears first run after the writer. One that did not run is taken for the smallest module
    around it of which a linear ran, such as the other experts of a mixture."""
    start = order.first([writer.name])
    for linear in linears:
        scope = linear.name
        while (
            first := order.first(
                n for n in order if n == scope or n.startswith(f"{scope}.")
            )
        ) is None:
            scope = scope.rpartition(".")[0]
        if start is None or first <= start:
            return False
    return True


def _proves(
    stream: Stream, index: int, known: list[KnownOutput], output: Tensor
) -> bool:
    """Whether the block has the same output for the first window, to the bit, when these modules are not run."""
    try:
        with without(known, 0):
            return torch.equal(stream.run_window(index), output)
    except (
        TypeError,
        AttributeError,
        ValueError,
    ):  # the block reads another item that the module returns
        return False
