"""The sublayers of a block, such as attention and the feed-forward unit: groups of linears and an output projection."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from sparsellm.method.blocks.routed import without_experts
from sparsellm.method.blocks.task import BlockTask, Group
from sparsellm.model import LinearView
from sparsellm.model.capture import InputGroups, RunOrder, watch
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


def find_sublayers(task: BlockTask, order: RunOrder) -> list[Sublayer]:
    """The sublayers of a block, recognised on one window. Linears that do not get all its tokens (experts) are left
    out. ``order`` records the order in which all linears of the block run."""
    tokens, width = task.stream.hidden[0].shape[1:]
    returns = Returns(task.stream.chain.blocks[task.index], tokens * width)
    pruned = {linear.name for linear in without_experts(task.linears)}
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

    with returns.recorded(), watch(task.stream.chain.linears(task.index), see):
        output = task.stream.run_window(task.index)
    sublayers: list[Sublayer] = []
    groups: list[Group] = []
    later = list(task.linears)
    proven = list[KnownOutput]()
    for group in grouping.agreed(task.linears):
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
            [x for x in linears if _run_later([x], group[0], order)]
            for linears in groups
        ]
        early = [
            [x for x in linears if x not in after]
            for linears, after in zip(groups, late, strict=True)
        ]
        if len(groups) > 1 and all(early):
            known = _shortcut(
                task, early, order, returns, [*later, *chain.from_iterable(late)]
            )
            trial = (
                [*proven, replace(known, values=[outputs[group[0].name]])]
                if known is not None
                else []
            )
            if trial and _proves(task, trial, output):
                proven = trial
            else:
                known = None
            sublayers.append(Sublayer(early, group[0], known))
            groups = [linears for linears in late if linears]
    return [*sublayers, Sublayer(groups, None)] if groups else sublayers


def _shortcut(
    task: BlockTask,
    groups: list[Group],
    order: RunOrder,
    returns: Returns,
    later: list[LinearView],
) -> KnownOutput | None:
    """The module around the writer, last of ``groups``, if pruning the linears ``later`` does not change its input."""
    (writer,) = groups[-1]
    path = writer.name.removeprefix(f"{task.stream.chain.block_names[task.index]}.")
    around = returns.around(writer, path) if _run_later(later, writer, order) else None
    if around is None or not {linear.module for linear in later}.isdisjoint(
        around[0].modules()
    ):
        return None
    module, returned = around
    before = (
        [linear for group in groups[:-1] for linear in group]
        if module is writer.module
        else []
    )
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


def _proves(task: BlockTask, known: list[KnownOutput], output: Tensor) -> bool:
    """Whether the block has the same output for the first window, to the bit, when these modules are not run."""
    try:
        with without(known, 0):
            return torch.equal(task.stream.run_window(task.index), output)
    except (
        TypeError,
        AttributeError,
        ValueError,
    ):  # the block reads another item that the module returns
        return False
