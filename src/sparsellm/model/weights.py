"""The weights of a model: their names in the checkpoint, which of them are tied, loading and release."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial, reduce
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from sparsellm.errors import ModelError, NumericalError, some
from sparsellm.files.reader import WEIGHT_DTYPES, CheckpointReader, Outline, not_finite
from sparsellm.files.writer import TensorSource
from sparsellm.machine import bf16_is_native
from sparsellm.model.experts import gates_of, separate_experts
from sparsellm.model.names import (
    checkpoint_names,
    expert_parts,
    published_names,
    refuse_converted,
    unused_tensors,
)
from sparsellm.model.structure import (
    LinearView,
    find_blocks,
    iterate_linears,
    tower_names,
)


class ModelWeights:
    """The weights of a decoder. Those of a checkpoint are in memory only while their block is loaded.

    Attributes:
        model: with experts as separate linears; weights that are not loaded are on the meta device.
        blocks, block_names: the decoder blocks, in order, and their names in the model.
        reader: the checkpoint; None for a model in memory, which keeps its weights, device and dtype.
        key_of: for each weight, the name of the tensor of the checkpoint that is read or will be written.
        parts: for each weight of an expert that is a part of such a tensor, that part.
        towers: modules of a multimodal model that read no text. They are copied, neither run nor pruned.
        gates: names of weights that choose or scale other modules; they are not pruned.
        device, dtype: where and in which dtype blocks run.

    A ModelError says that config and weights do not fit each other, or names the first weight of an unsupported dtype.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        reader: CheckpointReader | None,
        device: torch.device,
        dtype: torch.dtype | None,
    ) -> None:
        stacked = model.eval().state_dict(keep_vars=True)
        self.model, experts = separate_experts(model)
        self.config: PretrainedConfig = model.config
        list_name, blocks = find_blocks(self.model)
        self.blocks: list[nn.Module] = list(blocks)
        self.block_names = [f"{list_name}.{index}" for index in range(len(blocks))]
        self.gates = set().union(*map(gates_of, self.blocks, self.block_names))
        self._prefix = f"{list_name}."
        self.reader = reader
        self._same = _tied(self.model)
        self.towers = tower_names(self.model)
        values = self.model.state_dict(keep_vars=True)
        self._outer = [name for name in values if not name.startswith(self._prefix)]
        self._run_outer = [name for name in self._outer if not self._in_tower(name)]
        # weights of several blocks, as the first of these blocks left them
        self._shared: dict[str, Tensor] = {}
        if reader is None:
            names, self._shapes = published_names(self.model, stacked)
        else:
            names = checkpoint_names(self.model, reader, stacked)
            self._shapes = {key: reader.shape(key) for key in reader}
        parts = expert_parts(experts, names, stacked, self._shapes)
        self.parts = {
            name: part for name, part in parts.items() if part.index or part.transposed
        }
        direct = {**names.key_of, **{name: part.source for name, part in parts.items()}}
        keys = {
            name: [direct[n] for n in (name, *self._same.get(name, ())) if n in direct]
            for name in values
        }
        self.key_of = {name: known[0] for name, known in keys.items() if known}
        self._unused: list[str] = []
        if reader is not None:
            for name in filter(self.owns, self.key_of):
                _check_tied(keys[name], reader)
            separated = {experts[name].source for name in parts}
            unknown = {
                n: c.keys
                for n, c in names.conversions.items()
                if n not in separated and not self._in_tower(n)
            }
            refuse_converted(unknown, self.model, reader)
            self._unused = unused_tensors(
                self.model, reader, list_name, len(blocks), names
            )
            stacks = {name: stacked[experts[name].source] for name in self.parts}
            self._check_shapes(values, stacks, reader)
        self._check_dtypes(values)
        if reader is None:
            first = next(self.blocks[0].parameters())
            self.device = first.device
            self.dtype = first.dtype
            return
        self._compute(device, dtype)
        # buffers that no checkpoint has, such as rotary frequencies
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[name] = buffer.to(device)

    def describe(
        self,
        place: Path,
        device: torch.device,
        dtype: torch.dtype | None,
        like: ModelWeights,
    ) -> None:
        """Gives a model without weights the names and dtypes of ``like``, so that a run can be planned as if a
        checkpoint lay in ``place``. ``like`` is this model, or the same one with more experts in each stack."""
        if like is not self:
            self.key_of = {name: like.key_of[name] for name in self.key_of}
            self.parts = {
                name: like.parts[name] for name in self.key_of if name in like.parts
            }
            few, many = (
                Counter(part.source for part in weights.parts.values())
                for weights in (self, like)
            )
            self._shapes = {
                key: tuple(self.value(name).shape) for name, key in self.key_of.items()
            }
            self._shapes |= {
                k: (like._shapes[k][0] * few[k] // many[k], *like._shapes[k][1:])
                for k in few
            }
        stored = {
            key: (like.stored_dtype(name), self._shapes[key])
            for name, key in self.key_of.items()
            if self.owns(name)
        }
        self.reader = Outline(place, stored)
        self._compute(device, dtype)
        # They do not change, and a mixture has thousands.
        for name in ("linears", "mixtures", "names_of", "outer_tensors"):
            setattr(self, name, cache(getattr(self, name)))

    def _compute(self, device: torch.device, dtype: torch.dtype | None) -> None:
        """Sets the device, and the dtype of blocks: if None, one that holds the values of every linear."""
        stored = (
            linear.storage_dtype
            for index in range(len(self))
            for linear in self.linears(index)
        )
        self.device = device
        self.dtype = dtype or _fast_dtype(reduce(torch.promote_types, stored), device)

    def _in_tower(self, name: str) -> bool:
        return name.startswith(tuple(f"{tower}." for tower in self.towers))

    def _check_shapes(
        self,
        values: dict[str, Tensor],
        stacks: dict[str, Tensor],
        reader: CheckpointReader,
    ) -> None:
        """Refuses weights that are missing, or have another shape. ``stacks`` has the parameters that were divided into
        parts."""
        for name in values:
            if name not in self.key_of and not self._in_tower(name):
                raise ModelError(
                    f"weight {name} of the model of config.json is not in {reader.directory}; the checkpoint is "
                    "incomplete, or of another model: download it again"
                )
        for name, key in self.key_of.items():
            shape: tuple[int, ...] | None = self._shapes[key]
            if name in self.parts:
                tensor = torch.empty(self._shapes[key], device="meta")
                try:
                    shape = tuple(self.parts[name].of(tensor).shape)
                except (IndexError, RuntimeError):  # the tensor does not have this part
                    shape = None
            if shape != tuple(values[name].shape):
                raise ModelError(
                    f"weight {key} has shape {self._shapes[key]} in {reader.directory}, but its config asks for "
                    f"{tuple(stacks.get(name, values[name]).shape)}"
                )

    def _check_dtypes(self, values: Mapping[str, Tensor]) -> None:
        """Refuses weights that are not floating-point numbers of at least 16 bits."""
        for name, key in self.key_of.items():
            floating = (
                isinstance(values[name], nn.Parameter)
                or values[name].is_floating_point()
            )
            if floating and (stored := self.stored_dtype(name)) not in WEIGHT_DTYPES:
                place = "the model"
                if self.reader is not None:
                    place = str(self.reader.file_of(key))
                raise ModelError(
                    f"weight {key} in {place} is stored as {str(stored).removeprefix('torch.')}; weights are read in "
                    "bfloat16, float16, float32 and float64: convert the model to one of these first"
                )

    def __len__(self) -> int:
        return len(self.blocks)

    def linears(self, index: int) -> list[LinearView]:
        """The linears of block ``index``, without ``gates`` and those tied to embedding, head or earlier blocks."""
        linears = []
        for name, module in iterate_linears(
            self.blocks[index], self.block_names[index]
        ):
            weight = f"{name}.weight"
            if weight not in self.gates and self.owns(weight):
                of_bias = None
                if isinstance(module.bias, Tensor):
                    of_bias = self.stored_dtype(f"{name}.bias")
                linears.append(
                    LinearView(name, module, self.stored_dtype(weight), of_bias)
                )
        return linears

    def unused(self) -> list[str]:
        """Warnings that name tensors which the model does not use, or not for text."""
        copied = "copied as they are, not pruned"
        said = []
        if tensors := len(self._outer) - len(self._run_outer):
            said.append(
                f"{' and '.join(self.towers)} ({tensors} tensors) read no text; {copied}"
            )
        if self._unused and self.reader is not None:
            share = f"{sum(map(self.reader.bytes_of, self._unused)) / self.reader.bytes:.1%} of the checkpoint's bytes"
            said.append(
                f"the model of config.json does not use {some(self._unused, 1)} ({share}); {copied}"
            )
        return said

    def stored_dtype(self, name: str) -> torch.dtype:
        """The dtype in which a weight is read and written."""
        if self.reader is None:
            return self.value(name).dtype
        return self.reader.dtype(self.key_of[name])

    def is_shared(self, name: str) -> bool:
        """Whether a parameter is used in several places: in two blocks, or in a block and the embedding."""
        return name in self._same

    def owns(self, name: str) -> bool:
        """Whether this is the first name of a parameter, under which it is written."""
        return self._names(name)[0] == name

    def home(self, name: str) -> tuple[int, str]:
        """The first block that uses a parameter of a block, in which it counts, and its name there."""
        first = next(
            same for same in self._names(name) if same.startswith(self._prefix)
        )
        return int(first.removeprefix(self._prefix).partition(".")[0]), first

    def outside(self, name: str) -> str | None:
        """A name of the same parameter outside the blocks; None if there is none."""
        return next(
            (same for same in self._names(name) if not same.startswith(self._prefix)),
            None,
        )

    def _names(self, name: str) -> list[str]:
        return self._same.get(name, [name])

    def names_of(self, index: int) -> list[str]:
        """The names of the parameters and buffers of a block that a checkpoint has."""
        return [
            f"{self.block_names[index]}.{name}"
            for name in self.blocks[index].state_dict(keep_vars=True)
        ]

    def _outer_names(self, head: bool) -> list[str]:
        inside = [
            name
            for name in self._run_outer
            if name.startswith(f"{self.model.base_model_prefix}.")
        ]
        if inside and not head:
            return inside
        return self._run_outer

    @contextlib.contextmanager
    def block(
        self, index: int, pruned: CheckpointReader | None = None
    ) -> Iterator[nn.Module]:
        """Loads the weights of block ``index`` onto the device, in the computing dtype, until the context ends. Those
        in ``pruned``, a shard or a checkpoint, come first; they replace those of a model in memory for good."""
        try:
            self._load(self.names_of(index), pruned)
            yield self.blocks[index]
        finally:
            self._release(self.names_of(index))

    @contextlib.contextmanager
    def outer(self, *, head: bool = True) -> Iterator[None]:
        """Loads embedding, final norm and, with ``head``, the head until the context ends."""
        try:
            self._load(self._outer_names(head))
            yield
        finally:
            self._release(self._run_outer)

    def outer_elements(self) -> int:
        """The number of elements that ``outer`` loads."""
        names = {self._names(name)[0] for name in self._run_outer}
        return sum(self.value(name).numel() for name in names)

    def forget_shared(self) -> None:
        """Drops the weights that blocks share, for a walk over other weights."""
        self._shared.clear()

    @contextlib.contextmanager
    def unpruned(self) -> Iterator[None]:
        """Until the context ends, blocks without a shard are the model's own, with the weights that they share."""
        pruned = self._shared
        self._shared = {}
        try:
            yield
        finally:
            self._shared = pruned

    def _load(self, names: list[str], pruned: CheckpointReader | None = None) -> None:
        # tensors of the checkpoint of which several weights are parts
        tensors: dict[str, Tensor] = {}
        if self.reader is None:
            if pruned is not None:
                for name in filter(self.owns, names):
                    value = self.parameter(name, pruned, tensors)
                    self.value(name).detach().copy_(value)
            return
        loaded: dict[str, Tensor] = {}
        for name in names:  # one weight at a time, so that only one is in memory twice
            first = self._names(name)[0]
            if first not in loaded:
                # A weight of an earlier block was pruned with that block.
                source = pruned if first == name else None
                loaded[first] = self._fetch(first, source, tensors)
            self.assign(name, loaded[first])

    def _fetch(
        self, name: str, pruned: CheckpointReader | None, tensors: dict[str, Tensor]
    ) -> Tensor:
        """A weight on the device, in the computing dtype. The tensor of which it is a part is added to ``tensors``."""
        key = self.key_of[name]
        reader = self.reader
        if pruned is not None and key in pruned:
            reader = pruned
        elif name in self._shared:
            return self._shared[name].to(self.device, self.dtype)
        assert reader is not None
        dtype = self.dtype
        # patterns, in which "*" is anything
        wide = getattr(self.model, "_keep_in_fp32_modules_strict", None) or ()
        if any(re.search(pattern.replace("*", ".*"), name) for pattern in wide):
            dtype = torch.float32
        return self._part(name, tensors, partial(reader.get, key, self.device, dtype))

    def _part(
        self, name: str, tensors: dict[str, Tensor], read: Callable[[], Tensor]
    ) -> Tensor:
        """A weight that ``read`` returns, or the tensor of which it is a part: that one is kept in ``tensors``."""
        if name not in self.parts:
            return read()
        key = self.key_of[name]
        if key not in tensors:
            tensors[key] = read()
        return self.parts[name].of(tensors[key])

    def _release(self, names: list[str]) -> None:
        if self.reader is None:
            return
        for name in names:
            value = self.value(name)
            if not isinstance(value, nn.Parameter):
                continue
            first = self._names(name)[0]
            in_block = first.startswith(self._prefix)
            if self.is_shared(name) and in_block and not value.is_meta:
                stored = self.stored_dtype(first)
                self._shared[first] = value.detach().to(stored, copy=True)
            self.assign(name, value.to("meta"))

    def parameter(
        self,
        name: str,
        pruned: CheckpointReader | None = None,
        tensors: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """The values of one parameter: from ``pruned`` if it is there, else as loaded, else from the checkpoint. The
        tensor that it is a part of is added to ``tensors``, or taken from there."""
        key = self.key_of[name]
        reader = pruned
        if reader is None or key not in reader:
            value = self.value(name).detach()
            if not value.is_meta or self.reader is None:
                return value
            reader = self.reader
        tensors = {} if tensors is None else tensors
        return self._part(name, tensors, partial(reader.get, key))

    def assign(self, name: str, value: Tensor) -> None:
        """Replaces a parameter, which then has no gradient, or a buffer."""
        module, leaf = self._place(name)
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(value.detach(), requires_grad=False)
        else:
            module._buffers[leaf] = value

    def set_parameter(self, name: str, value: nn.Parameter) -> None:
        module, leaf = self._place(name)
        module._parameters[leaf] = value

    def block_parameters(self, index: int) -> dict[str, nn.Parameter]:
        """The parameters of block ``index``, by name."""
        return {
            name: value
            for name in self.names_of(index)
            if isinstance(value := self.value(name), nn.Parameter)
        }

    @torch.no_grad()
    def settle_block(self, index: int) -> None:
        """Rounds every weight of the loaded block to its storage dtype, so that memory and disk have the same block. A
        NumericalError says that a weight is NaN or too large for it; nothing of the block has been written."""
        for name in self.names_of(index):
            value = self.value(name)
            stored = self.stored_dtype(name)
            if value.is_floating_point():
                if value.dtype != stored:
                    value.copy_(value.to(stored))
                value.add_(0.0)  # no negative zero is written
            if isinstance(value, nn.Parameter):
                require_storable(value, name, stored)

    def block_tensors(self, index: int) -> dict[str, TensorSource]:
        """The weights of a loaded block under the checkpoint's names and in its dtypes, ready to be written."""
        return self._tensors(self.names_of(index))

    def stored_block(self, index: int) -> dict[str, Tensor]:
        """The weights of a block read from the checkpoint, under its names, loaded or not; tied weights once."""
        assert self.reader is not None, "a model in memory has no checkpoint"
        return {key: self.reader.get(key) for key in self._stored_keys(index)}

    def stored_bytes(self) -> list[int]:
        """The bytes in the checkpoint of each block, and, last, of all else."""
        assert self.reader is not None, "a model in memory has no checkpoint"
        blocks = [
            sum(map(self.reader.bytes_of, self._stored_keys(index)))
            for index in range(len(self))
        ]
        outer = sum(tensor.bytes for tensor in self.outer_tensors().values())
        return [*blocks, outer]

    def _stored_keys(self, index: int) -> list[str]:
        owned = filter(self.owns, self.names_of(index))
        return list(dict.fromkeys(self.key_of[name] for name in owned))

    def outer_tensors(self) -> dict[str, TensorSource]:
        """Every tensor outside the blocks, unchanged, tied weights once. Each is read only when it is written."""
        if self.reader is None:
            return self._tensors(self._outer)
        reader = self.reader
        blocks = {
            self.key_of[name]
            for index in range(len(self))
            for name in self.names_of(index)
        }
        return {
            key: TensorSource(
                reader.dtype(key), reader.shape(key), partial(reader.get, key)
            )
            for key in reader
            if key not in blocks
        }

    def _tensors(self, names: list[str]) -> dict[str, TensorSource]:
        members: dict[str, list[str]] = {}
        for name in filter(self.owns, names):
            members.setdefault(self.key_of[name], []).append(name)
        return {
            key: TensorSource(
                self.stored_dtype(parts[0]),
                self._shapes[key],
                partial(self._written, parts),
            )
            for key, parts in members.items()
        }

    def _written(self, names: list[str]) -> Tensor:
        """The tensor of the checkpoint that these weights are, or are parts of. A whole weight that was only rounded to
        a narrower type to compute is written with the checkpoint's own values."""
        first = names[0]
        key = self.key_of[first]
        value = self.value(first).detach()
        dtype = self.stored_dtype(first)
        if first in self.parts:
            tensor = torch.empty(self._shapes[key], dtype=dtype, device=self.device)
            for name in names:
                self.parts[name].of(tensor).copy_(self.value(name).detach())
            return tensor
        if (
            self.reader is None
            or isinstance(self.reader, Outline)
            or dtype.itemsize <= value.dtype.itemsize
        ):
            return value
        stored = self.reader.get(key, self.device)
        if torch.equal(stored.to(value.dtype), value):
            return stored
        return value

    def _place(self, name: str) -> tuple[nn.Module, str]:
        """The module that has a weight, and the name there."""
        owner, _, leaf = name.rpartition(".")
        return self.model.get_submodule(owner), leaf

    def value(self, name: str) -> Tensor:
        """A parameter or a buffer, loaded or not."""
        value = getattr(*self._place(name))
        assert isinstance(value, Tensor)
        return value


def require_storable(value: Tensor, name: str, stored: torch.dtype) -> None:
    """Raises NumericalError if a pruned weight, rounded to the dtype in which it is stored, is not finite."""
    if bad := not_finite(value.detach()):
        dtype = str(stored).removeprefix("torch.")
        largest = torch.finfo(stored).max
        wider = {torch.float16: "bfloat16 or float32", torch.bfloat16: "float32"}.get(
            stored
        )
        cure = "raise the method's damping"
        if wider:
            cure = f"store the model in {wider} and prune that"
        raise NumericalError(
            f"weight {name} would get {bad} infinite or NaN values once pruned and rounded to {dtype}, whose "
            f"largest number is {largest:.5g}; {cure}, or exclude it. Blocks before this one are kept"
        )


def _check_tied(keys: list[str], reader: CheckpointReader) -> None:
    """Refuses tensors that the model ties although they differ: transformers does not tie these, and loads another
    model."""
    first = keys[0]
    for other in keys[1:]:
        if first != other and not torch.equal(reader.get(first), reader.get(other)):
            raise ModelError(
                f"{first} and {other} of {reader.directory} differ, and the model ties them; for a head, set "
                "tie_word_embeddings to false in config.json"
            )


def _fast_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The stored dtype if the device multiplies matrices in it, else fp32: half precision is emulated by many CPUs, and
    bf16 by older GPUs, slowly. Hidden states may exceed 65504, the largest number of fp16, so that is fp32 too."""
    if stored not in (torch.bfloat16, torch.float16) or device.type not in (
        "cpu",
        "cuda",
    ):
        return stored
    if stored is torch.bfloat16 and bf16_is_native(device):
        return stored
    return torch.float32


def _tied(model: nn.Module) -> dict[str, list[str]]:
    """All names of each parameter that has several, in the model's order, keyed by each of them."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: same for same in names.values() if len(same) > 1 for name in same}
