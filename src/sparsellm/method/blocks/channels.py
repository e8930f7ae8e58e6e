"""Channels between linears of a block: outputs of some that can be changed if the inputs of another are changed alike.

If the outputs of a linear are permuted and the inputs of the linear that reads them alike, the model computes the same.
Two kinds of channels of a block can be permuted: those of a feed-forward unit (outputs of gate and up, inputs of down),
and those of attention's values within a head (outputs of v, inputs of o), alike in all heads that share values. Values
are averaged over tokens, so they can be rotated too. A structure is a guess that ``find_channels`` proves: the
block, with its channels permuted or rotated at random, must have the same output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from sparsellm import parallel
from sparsellm.method.blocks.task import BlockTask
from sparsellm.model import LinearView
from sparsellm.model.capture import Group, InputGroups, watch
from sparsellm.model.experts import without_experts
from sparsellm.patterns import NM

UNPROVED = "its inputs were not permuted for {}: {}"  # note of a linear


@dataclass(frozen=True)
class Channels:
    """Outputs of some linears that are, elementwise or averaged over tokens, the inputs of another, the reader.

    Their places are ``(copies, heads, width)``. Channels are changed within a head, alike in all copies."""

    reader: LinearView
    pattern: NM  # the pattern of the reader
    inputs: Tensor
    sources: tuple[tuple[LinearView, Tensor], ...]
    rotates: bool = False  # whether they can be rotated too

    @property
    def linears(self) -> list[LinearView]:
        """The reader, then the sources."""
        return [self.reader, *(linear for linear, _ in self.sources)]

    def permute(self, order: Tensor) -> None:
        """Moves channel ``order[h, p]`` of each head h to position p, in all linears."""
        self.reader.permute(
            inputs=_places_from(self.reader.in_features, self.inputs, order)
        )
        for linear, outputs in self.sources:
            linear.permute(outputs=_places_from(linear.out_features, outputs, order))

    def rotate(self, rotation: Tensor) -> None:
        """Puts ``rotation (heads, width, width)`` into the sources, and its transpose into the reader."""
        weight = self.reader.weight()
        weight[:, self.inputs] = torch.einsum(
            "ochj,hkj->ochk", weight[:, self.inputs], rotation
        )
        self.reader.assign(weight)
        for linear, (places,) in self.sources:
            weight = linear.weight()
            bias = linear.bias
            weight[places] = rotation @ weight[places]
            linear.assign(weight)
            if bias is not None:
                bias[places] = (rotation @ bias[places][..., None])[..., 0]
                linear.assign_bias(bias)


@torch.no_grad()
def find_channels(task: BlockTask) -> list[Channels]:
    """The channels of the block whose reader gets an N:M pattern, each proved on one window.

    A note tells the user of a reader that is as wide as the stream at its output if no permutation is proved, or if its
    sources stay dense."""
    chain = task.stream.chain
    tokens, stream_width = task.stream.hidden[0].shape[1:]
    names = {
        linear.name
        for linear in without_experts(task.linears)
        if not chain.is_shared(linear.weight_name)
    }
    # all linears that every token of a window reaches, pruned or not, in run order
    grouping = InputGroups()

    def see(linear: LinearView, x: Tensor, y: Tensor) -> None:
        if x.shape[:-1].numel() == tokens:
            grouping.add(linear, x)

    with watch(without_experts(chain.linears(task.index)), see):
        task.stream.run_window(task.index)
    proved = []
    for position, (reader, *others) in enumerate(grouping.groups):
        pattern = task.patterns.get(reader.name)
        if (
            others
            or not position
            or reader.name not in names
            or not isinstance(pattern, NM)
        ):
            continue
        guesses = _guesses(reader, pattern, grouping.groups[:position], chain.config)
        fitting = [
            guess for guess in guesses if guess.inputs.shape[-1] % pattern.m == 0
        ]
        number, rotates = parallel.from_main(partial(_first_proved, task, fitting))
        if not fitting:
            why = "M divides no group of channels that could be permuted"
        elif number is None:
            why = "no order of channels that was tried leaves the output of the block as it is"
        elif any(linear.name not in names for linear, _ in fitting[number].sources):
            why = "the linears before it stay dense"
        else:
            proved.append(replace(fitting[number], rotates=rotates))
            continue
        # others read the stream, whose channels are those of all blocks
        if reader.out_features == stream_width:
            task.note(reader, UNPROVED.format(pattern, why))
    return proved


def _guesses(
    reader: LinearView, pattern: NM, earlier: list[Group], config: PretrainedConfig
) -> Iterator[Channels]:
    """Channels that ``reader`` may read, the likelier ones first."""
    width = reader.in_features
    places = torch.arange(width, device=reader.parameter.device)

    def unit(sources: list[LinearView]) -> Channels:
        """The channels if all inputs of the reader are the outputs of each source, or of each half of a source."""
        rows = [
            torch.arange(x.out_features, device=places.device).view(-1, 1, width)
            for x in sources
        ]
        return Channels(
            reader,
            pattern,
            places.view(1, 1, -1),
            tuple(zip(sources, rows, strict=True)),
        )

    for group in reversed(earlier):
        sources = [
            linear for linear in group if linear.out_features in (width, 2 * width)
        ]
        if sources:  # a unit's gate and up, perhaps as the halves of one linear
            yield unit(sources)
        if len(sources) > 1:
            yield from (unit([linear]) for linear in sources)
    text = config.get_text_config()
    queries = getattr(text, "num_attention_heads", None)
    if not isinstance(queries, int) or queries < 1 or width % queries:
        return
    size = width // queries
    keys = getattr(text, "num_key_value_heads", None)
    for heads in dict.fromkeys([keys, queries, 1]):
        if not isinstance(heads, int) or heads < 1 or queries % heads:
            continue
        inputs = places.view(heads, queries // heads, size).transpose(0, 1)
        for linear in (
            linear for group in reversed(earlier) for linear in reversed(group)
        ):
            for outputs in _value_rows(linear, heads, size):
                yield Channels(
                    reader, pattern, inputs, ((linear, outputs),), rotates=True
                )


def _value_rows(linear: LinearView, heads: int, size: int) -> Iterator[Tensor]:
    """The outputs ``(1, heads, size)`` that may be the values of attention: the last ones, of all or of each head."""
    outputs = linear.out_features
    if outputs < heads * size:
        return
    rows = torch.arange(outputs, device=linear.parameter.device)
    yield rows[outputs - heads * size :].view(1, heads, size)
    if outputs % heads == 0 and outputs > heads * size:
        yield rows.view(1, heads, outputs // heads)[..., -size:]


def _first_proved(task: BlockTask, guesses: list[Channels]) -> tuple[int | None, bool]:
    """The number of the first guess that holds: with its channels in a random order, the block has the same outputs, up
    to rounding. And whether it has them after a random rotation."""
    before: list[Tensor] = []
    for number, guess in enumerate(guesses):
        before = before or _outputs(task, guess.reader)
        heads, width = guess.inputs.shape[1:]
        generator = torch.Generator().manual_seed(width)
        order = torch.stack(
            [torch.randperm(width, generator=generator) for _ in range(heads)]
        ).to(guess.inputs.device)
        same = partial(_same, task, guess, before)
        # a permutation rounds nothing
        if same(change=partial(guess.permute, order), roundings=0.25):
            if not guess.rotates:
                return number, False
            normal = torch.randn(heads, width, width, generator=generator)
            rotation = torch.linalg.qr(normal).Q.to(guess.inputs.device)
            return number, same(change=partial(guess.rotate, rotation), roundings=4)
    return None, False


def _same(
    task: BlockTask,
    guess: Channels,
    before: list[Tensor],
    change: Callable[[], None],
    roundings: float,
) -> bool:
    """Whether the block's outputs stay the same after ``change``, which is undone, up to ``roundings`` of the coarsest
    dtype. A wrong guess changes outputs by about their norm, but by little if attention or gains are nearly uniform."""
    linears = guess.linears
    dtypes = [linear.storage_dtype for linear in linears]
    dtypes.append(task.stream.chain.dtype)
    if task.stream.chain.products is not None:
        dtypes.append(torch.bfloat16)
    tolerance = max(1e-4, *(roundings * torch.finfo(dtype).eps for dtype in dtypes))
    kept = [(linear, linear.weight(), linear.bias) for linear in linears]
    change()
    after = _outputs(task, guess.reader)
    for linear, weight, bias in kept:
        linear.assign(weight)
        linear.assign_bias(bias)
    pairs = zip(after, before, strict=True)
    return all(
        float((x.float() - y.float()).norm()) <= tolerance * float(y.float().norm())
        for x, y in pairs
    )


def _outputs(task: BlockTask, reader: LinearView) -> list[Tensor]:
    """The outputs of a linear and of the block for one window, and the keys and values that some models' blocks put
    into their arguments for later blocks."""
    seen: list[Tensor] = []
    with watch([reader], lambda linear, x, y: seen.append(y.clone())):
        output = task.stream.run_window(task.index)
    call = task.stream.first_window[task.index]
    inside = _inside((call.args, call.kwargs))
    return [*seen, output, *(tensor.clone() for tensor in inside)]


def _inside(value: Any) -> list[Tensor]:
    """The tensors of real numbers in nested containers."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if not isinstance(value, (list, tuple)):
        return []
    return [tensor for item in value for tensor in _inside(item)]


def _places_from(length: int, places: Tensor, order: Tensor) -> Tensor:
    """For each of ``length`` places, the place its value comes from: ``order`` within the heads of ``places``."""
    index = torch.arange(length, device=places.device)
    index[places] = places.gather(
        -1, order.to(places.device).expand(len(places), *order.shape)
    )
    return index
