"""N:M by symmetry: channels between linears are ordered so that the largest weights do not share a group.

N:M keeps n weights of every m consecutive inputs of an output, whatever their size. If the outputs of a linear are
permuted and the inputs of the linear that reads them alike, the model computes the same, but other weights meet in a
group. Two kinds of channels of a block can be permuted: those of a feed-forward unit (outputs of gate and up, inputs of
down), and those of attention's values within a head (outputs of v, inputs of o), alike in all heads that share values.

A permutation maximises the sum of kept scores ``|w_ij| √E[x_j²]`` (arXiv 2310.15929): in turn, one member is taken out
of every group, and a linear assignment puts the members back where they are worth most. A structure is a guess that
:func:`find_channels` proves: the block, with its channels permuted at random, must have the same output.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from sparsellm import parallel
from sparsellm.chain import LinearView
from sparsellm.chain.capture import InputGroups, watch
from sparsellm.errors import NumericalError
from sparsellm.methods.routed import without_experts
from sparsellm.methods.task import BlockTask
from sparsellm.patterns import NM
from sparsellm.solvers.divided import safe_factor

ROUNDS = 3  # each takes every member out of its group once; later rounds change nothing
GROUPS = 256  # that exchange members with each other: the time of a round rises with their number
PIECE = 1 << 18  # scores compared at a time, which fit into a processor's cache
UNPROVED = "its inputs were not permuted for {}: {}"  # note of a linear


@dataclass(frozen=True)
class Channels:
    """Outputs of some linears that are, elementwise or averaged over tokens, the inputs of another, the reader.

    Their places are ``(copies, heads, width)``. Channels are permuted within a head, alike in all copies.
    """

    reader: LinearView
    pattern: NM  # the pattern of the reader
    inputs: Tensor
    sources: tuple[tuple[LinearView, Tensor], ...]

    def permute(self, order: Tensor) -> None:
        """Moves channel ``order[h, p]`` of each head h to position p, in all linears."""
        self.reader.permute(inputs=_index(self.reader.in_features, self.inputs, order))
        for linear, outputs in self.sources:
            linear.permute(outputs=_index(linear.out_features, outputs, order))

    def best_order(self, mean_squares: Tensor) -> Tensor:
        """The order ``(heads, width)`` that :func:`spread` chooses by the mean squares ``(in,)`` of the inputs, on the
        CPU, so that any process can take it."""
        if not bool(torch.isfinite(mean_squares).all()):
            raise NumericalError(f"{self.reader.name}: the squares of its inputs are too large for fp32")
        weight = self.reader.weight().abs_()
        scores = weight.mul_(safe_factor(weight)).mul_(mean_squares.sqrt())
        heads = [torch.cat([scores[:, copy] for copy in head]) for head in self.inputs.transpose(0, 1)]
        return torch.stack([spread(head, self.pattern) for head in heads]).cpu()


def permute_block(task: BlockTask, weights: list[Tensor] | None) -> None:
    """Permutes the channels of the loaded block, for the linears that get an N:M pattern.

    The first process chooses the permutations, from its first batch and ``weights`` of its tokens, batches
    ``(batch, seq)`` or None. A linear for whose inputs no permutation was proved, or whose sources stay dense, is left
    as it is, with a note.
    """
    if not any(isinstance(task.patterns[linear.name], NM) for linear in task.linears):
        return
    task.report("permutation")
    with task.clock.phase("prune/permutation"), torch.no_grad():
        proved = find_channels(task)
        orders = parallel.from_main(partial(_orders, task, proved, weights))
        for channels, order in zip(proved, orders, strict=True):
            channels.permute(order)
            for linear, outputs in channels.sources:
                if (costs := task.output_costs.get(linear.name)) is not None:
                    index = _index(len(costs), outputs, order).to(costs.device)
                    task.output_costs = {**task.output_costs, linear.name: costs[index]}


def _orders(task: BlockTask, proved: list[Channels], weights: list[Tensor] | None) -> list[Tensor]:
    """The best order of the channels of each, from the first batch of this process."""
    squares: dict[str, Tensor] = {}

    def see(linear: LinearView, x: Tensor, y: Tensor) -> None:
        rows = x.flatten(0, -2).float().square()
        squares[linear.name] = rows.mean(0) if weights is None else (rows * weights[0].reshape(-1, 1)).mean(0)

    with watch([channels.reader for channels in proved], see):
        task.stream.run_batch(task.index, 0)
    return [channels.best_order(squares[channels.reader.name]) for channels in proved]


def find_channels(task: BlockTask) -> list[Channels]:
    """The channels of the block whose reader gets an N:M pattern, each proved on one window."""
    chain = task.stream.chain
    tokens, stream_width = task.stream.hidden[0].shape[1:]
    free = [x for x in without_experts(task.linears) if not chain.is_shared(x.weight_name)]
    names = {linear.name for linear in free}
    grouping = InputGroups()  # all linears that every token of a window reaches, pruned or not, in run order

    def see(linear: LinearView, x: Tensor, y: Tensor) -> None:
        if x.shape[:-1].numel() == tokens:
            grouping.add(linear, x)

    with watch(without_experts(chain.linears(task.index)), see):
        task.stream.run_window(task.index)
    proved = []
    for position, (reader, *others) in enumerate(grouping.groups):
        pattern = task.patterns.get(reader.name)
        if others or not position or reader.name not in names or not isinstance(pattern, NM):
            continue
        guesses = _guesses(reader, pattern, grouping.groups[:position], chain.config)
        fitting = [guess for guess in guesses if guess.inputs.shape[-1] % pattern.m == 0]
        number = parallel.from_main(partial(_first_proved, fitting, task))
        if number is None:
            why = "no order of channels that was tried leaves the output of the block as it is"
        elif any(linear.name not in names for linear, _ in fitting[number].sources):
            why = "the linears before it stay dense"
        else:
            proved.append(fitting[number])
            continue
        if reader.out_features == stream_width:  # others read the stream, whose channels are those of all blocks
            task.notes[reader.name] = (*task.notes.get(reader.name, ()), UNPROVED.format(pattern, why))
    return proved


def _guesses(
    reader: LinearView, pattern: NM, earlier: list[list[LinearView]], config: PretrainedConfig
) -> Iterator[Channels]:
    """Channels that ``reader`` may read, the likelier ones first."""
    width = reader.in_features
    places = torch.arange(width, device=reader.parameter.device)

    def unit(sources: list[LinearView]) -> Channels:
        """All inputs as the outputs of each source, or as those of each half of it."""
        rows = [torch.arange(x.out_features, device=places.device).view(-1, 1, width) for x in sources]
        return Channels(reader, pattern, places.view(1, 1, -1), tuple(zip(sources, rows, strict=True)))

    for group in reversed(earlier):
        sources = [linear for linear in group if linear.out_features in (width, 2 * width)]
        if sources:  # a unit's gate and up, perhaps as the halves of one linear
            yield unit(sources)
        if len(sources) > 1:
            yield from (unit([linear]) for linear in sources)
    text = config.get_text_config()
    queries = getattr(text, "num_attention_heads", None)
    if not isinstance(queries, int) or queries < 1 or width % queries:
        return
    size, keys = width // queries, getattr(text, "num_key_value_heads", None)
    for heads in dict.fromkeys([keys if isinstance(keys, int) and keys > 0 else queries, queries, 1]):
        if queries % heads:
            continue
        inputs = places.view(heads, queries // heads, size).transpose(0, 1)
        for linear in (linear for group in reversed(earlier) for linear in reversed(group)):
            for outputs in _value_rows(linear, heads, size):
                yield Channels(reader, pattern, inputs, ((linear, outputs),))


def _value_rows(linear: LinearView, heads: int, size: int) -> Iterator[Tensor]:
    """The outputs ``(1, heads, size)`` that may be the values of attention: the last ones, of all or of each head."""
    outputs = linear.out_features
    if outputs < heads * size:
        return
    rows = torch.arange(outputs, device=linear.parameter.device)
    yield rows[outputs - heads * size :].view(1, heads, size)
    if outputs % heads == 0 and outputs > heads * size:
        yield rows.view(1, heads, outputs // heads)[..., -size:]


def _first_proved(guesses: list[Channels], task: BlockTask) -> int | None:
    """The first guess with which the block has the same outputs, up to rounding, if channels are in a random order."""
    before: list[Tensor] = []
    dtype = task.stream.chain.dtype if task.stream.chain.products is None else torch.bfloat16
    tolerance = max(1e-4, 4 * torch.finfo(dtype).eps)  # a wrong guess changes the reader's output by about its size
    for number, guess in enumerate(guesses):
        before = before or _outputs(task, guess.reader)
        heads, width = guess.inputs.shape[1:]
        generator = torch.Generator().manual_seed(width)
        order = torch.stack([torch.randperm(width, generator=generator) for _ in range(heads)]).to(guess.inputs.device)
        guess.permute(order)
        after = _outputs(task, guess.reader)
        guess.permute(order.argsort(dim=-1))
        pairs = zip(after, before, strict=True)
        if all(float((x.float() - y.float()).norm()) <= tolerance * float(y.float().norm()) for x, y in pairs):
            return number
    return None


def _outputs(task: BlockTask, reader: LinearView) -> list[Tensor]:
    """The outputs of a linear and of the block for one window, and the keys and values that some models' blocks put
    into their arguments for later blocks."""
    seen: list[Tensor] = []
    with watch([reader], lambda linear, x, y: seen.append(y.clone())):
        output = task.stream.run_window(task.index)
    call = task.stream.call_of_window(task.index)
    return [*seen, output, *(tensor.clone() for tensor in _inside((call.args, call.kwargs)))]


def _inside(value: Any) -> list[Tensor]:
    """The tensors of real numbers in nested containers."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for item in items for tensor in _inside(item)]


def _index(length: int, places: Tensor, order: Tensor) -> Tensor:
    """For each of ``length`` places, the place its value comes from: ``order`` within the heads of ``places``."""
    index = torch.arange(length, device=places.device)
    index[places] = places.gather(-1, order.to(places.device).expand(len(places), *order.shape))
    return index


def spread(scores: Tensor, pattern: NM) -> Tensor:
    """An order of the inputs, ``(inputs,)``, in which N:M keeps a larger sum of scores ``(out, in)``: inputs are dealt
    by their mean score, and then parts of at most :data:`GROUPS` similar groups exchange members."""
    groups = scores.shape[1] // pattern.m
    dealt = scores.mean(0).argsort(descending=True, stable=True).view(pattern.m, groups).T  # (groups, m)
    parts = -(-groups // GROUPS)
    ordered = [_exchanged(scores, dealt[part::parts], pattern) for part in range(parts)]
    natural = torch.arange(scores.shape[1], device=scores.device).view(groups, pattern.m)

    def kept(members: Tensor) -> float:
        pieces = (part[:, members].topk(pattern.n, dim=-1).values for part in scores.split(64))
        return sum(float(piece.double().sum()) for piece in pieces)

    return max(natural, torch.cat(ordered), key=kept).reshape(-1)


def _exchanged(scores: Tensor, members: Tensor, pattern: NM) -> Tensor:
    """The members ``(groups, m)`` after rounds of exchanges between these groups."""
    from scipy.optimize import linear_sum_assignment

    rows = max(1, PIECE // len(members) ** 2)
    for _ in range(ROUNDS):
        before = members
        for place in range(pattern.m):
            rest = members[:, [other for other in range(pattern.m) if other != place]]
            worth = scores.new_zeros(len(members), len(members))  # (groups, members that are put back)
            for part in scores.split(rows):
                least = part[:, rest].topk(pattern.n, dim=-1).values[..., -1]  # a group keeps the larger of the two
                worth += torch.maximum(least[:, :, None], part[:, None, members[:, place]]).sum(0)
            _, chosen = linear_sum_assignment(worth.cpu().numpy(), maximize=True)
            members = members.clone()
            members[:, place] = members[torch.from_numpy(chosen).to(members.device), place]
        if torch.equal(members, before):
            break
    return members
