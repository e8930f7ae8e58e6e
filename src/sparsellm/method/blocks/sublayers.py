"""The sublayers of a block, such as attention and the feed-forward unit: groups of linears and an output projection."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sparsellm.model import LinearView, Stream
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


def find_sublayers(
    stream: Stream, index: int, linears: list[LinearView], order: RunOrder
) -> list[Sublayer]:
    """The sublayers of the loaded block ``index``, of which ``linears`` are pruned, recognised on one window. Linears
    that do not get all its tokens (experts) are left out. ``order`` records the order in which all linears run."""
    tokens, width = stream.hidden[0].shape[1:]
    pruned = {linear.name for linear in without_experts(linears)}
    grouping = InputGroups()
    complete: set[str] = set()  # linears that got all tokens
    # those that run again, so that a window has several targets
    repeated: set[str] = set()

    def see(linear: LinearView, x: Tensor, y: Tensor) -> None:
        order.append(linear.name)
        if linear.name in pruned and x.shape[:-1].numel() == tokens:
            if linear.name in complete:
                repeated.add(linear.name)
            complete.add(linear.name)
            grouping.add(linear, x)

    with watch(stream.chain.linears(index), see):
        stream.run_window(index)
    sublayers: list[Sublayer] = []
    groups: list[Group] = []
    for group in grouping.agreed(linears):
        groups.append(group)
        writer = group[0]
        alone = len(group) == 1 and writer.name not in repeated
        if not alone or writer.out_features != width:
            continue
        # In a parallel block the feed-forward unit shares the input of attention, but runs after attention's writer.
        late = [
            [linear for linear in sharing if order.runs_later(linear, writer)]
            for sharing in groups
        ]
        early = [
            [linear for linear in sharing if linear not in after]
            for sharing, after in zip(groups, late, strict=True)
        ]
        if len(groups) > 1 and all(early):
            sublayers.append(Sublayer(early, writer))
            groups = [sharing for sharing in late if sharing]
    if groups:
        sublayers.append(Sublayer(groups, None))
    return sublayers
