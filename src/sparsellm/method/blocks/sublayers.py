"""The sublayers of a block, such as attention and the feed-forward unit: groups of linears and an output projection."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import Tensor

from sparsellm.method.blocks.task import BlockTask
from sparsellm.model import LinearView
from sparsellm.model.capture import Group, InputGroups, RunOrder, watch
from sparsellm.model.experts import without_experts


@dataclass(frozen=True)
class Sublayer:
    """Groups of linears that share an input, in the order in which they run.

    The writer is the last linear, alone on its input, with as many outputs as the residual stream is wide. A sublayer
    whose writer is not pruned, or alone is pruned, is joined to the next one; the last one then has the writer None."""

    groups: list[Group]  # at least one, none empty
    writer: LinearView | None

    @property
    def names(self) -> set[str]:
        return {linear.name for group in self.groups for linear in group}


def find_sublayers(task: BlockTask, order: RunOrder) -> list[Sublayer]:
    """The sublayers of the block, as far as it is pruned, recognised on one window. Linears that do not get all its
    tokens (experts) are left out. ``order`` records the order in which all linears run."""
    stream = task.stream
    tokens, width = stream.hidden[0].shape[1:]
    pruned = {linear.name for linear in without_experts(task.linears)}
    grouping = InputGroups()
    # calls with all tokens; after several of a linear, a window has several targets
    calls: Counter[str] = Counter()

    def see(linear: LinearView, x: Tensor, y: Tensor) -> None:
        order.append(linear.name)
        if linear.name in pruned and x.shape[:-1].numel() == tokens:
            calls[linear.name] += 1
            grouping.add(linear, x)

    with watch(stream.chain.linears(task.index), see):
        stream.run_window(task.index)
    sublayers: list[Sublayer] = []
    groups: list[Group] = []
    for group in grouping.agreed(task.linears):
        groups.append(group)
        writer = group[0]
        alone = len(group) == 1 and calls[writer.name] < 2
        if not alone or writer.out_features != width:
            continue
        # In a parallel block the feed-forward unit shares the input of attention, but runs after attention's writer.
        late = [
            [linear for linear in sharing if order.runs_later(linear, writer)]
            for sharing in groups
        ]
        early = [
            [linear for linear in sharing if not order.runs_later(linear, writer)]
            for sharing in groups
        ]
        if len(groups) > 1 and all(early):
            sublayers.append(Sublayer(early, writer))
            groups = [sharing for sharing in late if sharing]
    if groups:
        sublayers.append(Sublayer(groups, None))
    return sublayers
