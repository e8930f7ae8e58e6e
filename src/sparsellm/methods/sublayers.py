"""The sublayers of a block, such as attention and the feed-forward unit: groups of linears and an output projection."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sparsellm.chain import LinearView
from sparsellm.chain.capture import InputGroups, RunOrder, watch
from sparsellm.methods.routed import without_experts
from sparsellm.methods.task import BlockTask


@dataclass(frozen=True)
class Sublayer:
    """Groups of linears that share an input, in the order in which they run.

    Attributes:
        groups: at least one, none empty.
        writer: the output projection, which adds to the residual stream: the last linear, alone on its input, with as
            many outputs as the stream is wide. None if it is not pruned, or is the only linear of the sublayer.
    """

    groups: list[list[LinearView]]
    writer: LinearView | None

    def linears(self) -> list[LinearView]:
        return [linear for group in self.groups for linear in group]


def find_sublayers(task: BlockTask, order: RunOrder) -> list[Sublayer]:
    """The sublayers of a block, recognised on one window. Linears that do not get all its tokens (experts) are left
    out.

    Args:
        order: records the order in which all linears of the block run.
    """
    width = task.stream.hidden[0].shape[-1]
    sublayers: list[Sublayer] = []
    groups: list[list[LinearView]] = []
    for group in _groups(task, order):
        groups.append(group)
        if len(groups) > 1 and len(group) == 1 and group[0].out_features == width:
            sublayers.append(Sublayer(groups, group[0]))
            groups = []
    return [*sublayers, Sublayer(groups, None)] if groups else sublayers


def _groups(task: BlockTask, order: RunOrder) -> list[list[LinearView]]:
    grouping = InputGroups()
    wanted = {linear.name for linear in without_experts(task.linears)}
    tokens = task.stream.hidden[0].shape[1]

    def see(linear: LinearView, entering: Tensor, leaving: Tensor) -> None:
        order.see(linear)
        if linear.name in wanted and entering.shape[:-1].numel() == tokens:
            grouping.add(linear, entering)

    with watch(task.stream.chain.linears(task.index), see):
        task.stream.run_window(task.index)
    return grouping.agreed(task.linears)
