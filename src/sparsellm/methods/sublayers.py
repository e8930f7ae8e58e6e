"""The sublayers of a block, such as attention and the feed-forward unit: groups of linears and an output projection."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsellm.chain import LinearView
from sparsellm.chain.capture import InputGroups, RunOrder, replacing, watch
from sparsellm.chain.shortcuts import Calls, KnownOutput, Shortcut
from sparsellm.methods.routed import without_experts
from sparsellm.methods.task import BlockTask


@dataclass(frozen=True)
class Sublayer:
    """Groups of linears that share an input, in the order in which they run.

    Attributes:
        groups: at least one, none empty.
        writer: the output projection, which adds to the residual stream: the last linear, alone on its input, with as
            many outputs as the stream is wide. None if it is not pruned, or is the only linear of the sublayer.
        shortcut: around the writer, for passes after the sublayer is pruned; None if there is none.
    """

    groups: list[list[LinearView]]
    writer: LinearView | None
    shortcut: Shortcut | None = None

    def linears(self) -> list[LinearView]:
        return [linear for group in self.groups for linear in group]


def find_sublayers(task: BlockTask, order: RunOrder) -> list[Sublayer]:
    """The sublayers of a block, recognised on one window. Linears that do not get all its tokens (experts) are left
    out.

    Args:
        order: records the order in which all linears of the block run.
    """
    tokens, width = task.stream.hidden[0].shape[1:]
    calls = Calls(task.stream.chain.blocks[task.index], tokens * width)
    inputs: dict[str, Tensor] = {}
    with calls.recorded():
        found, output = _groups(task, order, inputs)
    sublayers: list[Sublayer] = []
    groups: list[list[LinearView]] = []
    done: list[LinearView] = []
    proven: list[KnownOutput] = []
    for group in found:
        groups.append(group)
        done += group
        if len(groups) > 1 and len(group) == 1 and group[0].out_features == width:
            sublayer = Sublayer(groups, group[0])
            shortcut = _shortcut(task, sublayer, order, calls, done)
            if shortcut is not None and _proves(task, shortcut, inputs[group[0].name], output, proven):
                sublayer = replace(sublayer, shortcut=shortcut)
            sublayers.append(sublayer)
            groups = []
    return [*sublayers, Sublayer(groups, None)] if groups else sublayers


def _groups(task: BlockTask, order: RunOrder, inputs: dict[str, Tensor]) -> tuple[list[list[LinearView]], Tensor]:
    """The groups of linears, and the output of the block, for the first window.

    Args:
        inputs: gets the input of each linear that could be a writer.
    """
    grouping = InputGroups()
    wanted = {linear.name for linear in without_experts(task.linears)}
    tokens, width = task.stream.hidden[0].shape[1:]

    def see(linear: LinearView, x: Tensor, y: Tensor) -> None:
        order.see(linear)
        if linear.name in wanted and x.shape[:-1].numel() == tokens:
            grouping.add(linear, x)
            if linear.out_features == width:
                inputs[linear.name] = x.clone()

    with watch(task.stream.chain.linears(task.index), see):
        output = task.stream.run_window(task.index)
    return grouping.agreed(task.linears), output


def _shortcut(
    task: BlockTask, sublayer: Sublayer, order: RunOrder, calls: Calls, done: list[LinearView]
) -> Shortcut | None:
    """The shortcut around a writer, if its input no longer changes when the linears in ``done`` are pruned."""
    writer, block = sublayer.writer, task.stream.chain.block_names[task.index]
    assert writer is not None
    names = {linear.name for linear in done}
    others = [linear for linear in task.linears if linear.name not in names]
    path = writer.name.removeprefix(f"{block}.")
    around = calls.around(writer, path) if _run_later(task, others, writer, order) else None
    if around is None:
        return None
    module, items, like_input = around
    inside = set(module.modules())
    if any(linear.module in inside for linear in others):
        return None
    own = [linear for linear in sublayer.linears() if linear is not writer]
    return Shortcut(writer, module, items, own if module is writer.module else [], like_input)


def _run_later(task: BlockTask, linears: list[LinearView], writer: LinearView, order: RunOrder) -> bool:
    """Whether all these linears first run after the writer. One that did not run is taken for the smallest module
    around it of which a linear ran, such as the other experts of a mixture."""
    everything = [linear.name for linear in task.stream.chain.linears(task.index)]
    start = order.first([writer.name])
    for linear in linears:
        scope = linear.name
        while (first := order.first(n for n in everything if n == scope or n.startswith(f"{scope}."))) is None:
            scope = scope.rpartition(".")[0]
        if start is None or first <= start:
            return False
    return True


def _proves(task: BlockTask, shortcut: Shortcut, x: Tensor, output: Tensor, proven: list[KnownOutput]) -> bool:
    """Whether the block has the same output for the first window, to the bit, when the module is not run.

    Args:
        x: the input of the writer.
        output: the output of the block.
        proven: those of earlier sublayers, whose modules are not run either; this one is added if it is proven.
    """
    known = KnownOutput(shortcut)
    known.append(x)
    forwards = {module: forward for each in (*proven, known) for module, forward in each.forwards(0).items()}
    try:
        with replacing(forwards):
            same = torch.equal(task.stream.run_window(task.index), output)
    except (TypeError, AttributeError, ValueError):  # the block reads another item that the module returns
        return False
    if same:
        proven.append(known)
    return same
