"""The sublayers of a block, such as attention and the feed-forward unit: groups of linears, and the one that writes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sparsellm.chain import LinearView
from sparsellm.chain.capture import InputGroups, RunOrder, watch
from sparsellm.methods.task import BlockTask


@dataclass(frozen=True)
class Sublayer:
    """Groups of linears that share an input, in the order in which they run.

    Attributes:
        groups: at least one, none empty.
        writer: the linear that writes into the residual stream: last, after others, alone on its input, as wide as the
            stream. None where that linear is not pruned, or is the only one of the sublayer.
    """

    groups: list[list[LinearView]]
    writer: LinearView | None

    def linears(self) -> list[LinearView]:
        return [linear for group in self.groups for linear in group]


def find_sublayers(task: BlockTask, order: RunOrder) -> list[Sublayer]:
    """The sublayers of a block, from one window. Linears that are not given all its tokens (experts) are left out.

    Args:
        order: learns in which order all linears of the block run.
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
    wanted = {linear.name for linear in task.linears}
    tokens = task.stream.hidden[0].shape[1]

    def see(linear: LinearView, entering: Tensor, leaving: Tensor) -> None:
        order.see(linear)
        if linear.name in wanted and entering.shape[:-1].numel() == tokens:
            grouping.add(linear, entering)

    with watch(task.stream.chain.linears(task.index), see):
        task.stream.run_window(task.index)
    return grouping.agreed(task.linears)
