"""The stored tensors of one layer of vLLM, and the packed weights that a rank computes with.

A layer may hold several linears of the checkpoint, such as q, k and v, or one of the checkpoint may hold them all, as
in Phi-3. Ranks of tensor parallelism share the rows of some layers and the columns of others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsepack.checkpoint import PackedEntry, assembled
from sparsepack.codes import STORED_AS
from sparsepack.errors import FormatError
from sparsepack.layout import FIELDS, PackedWeight, as_bitmask
from sparsepack.pieces import columns_of, joined, rows_of

TENSORS = ("weight", *(f"weight_{field}" for field in FIELDS))
"""The tensors of a packed linear in a checkpoint; the first is a placeholder."""

_SCALES = {"int8": torch.float32}
_PLACES = {"q": 0, "k": 1, "v": 2}  # what vLLM calls the parts of an attention layer


@dataclass(frozen=True)
class Share:
    """What one rank holds of a layer.

    Attributes:
        shape: ``(out, in)`` of the layer on all ranks, with repeated heads as often as they are held.
        rows: the rows of each of its parts on this rank.
        columns: the columns on this rank.
        rank: the number of this rank.
        repeats: for each part, how many ranks hold the same rows of it."""

    shape: tuple[int, int]
    rows: tuple[int, ...]
    columns: int
    rank: int
    repeats: tuple[int, ...]

    @property
    def full_rows(self) -> list[int]:
        """The rows of each part in the checkpoint."""
        ranks = self.shape[0] // sum(self.rows)
        return [
            rows * ranks // repeats
            for rows, repeats in zip(self.rows, self.repeats, strict=True)
        ]


def linears_of(
    prefix: str,
    fused: Mapping[str, Sequence[str]],
    entries: Mapping[str, PackedEntry],
) -> list[str]:
    """The packed linears of the checkpoint that are the layer ``prefix`` of vLLM; none if it is dense.

    ``fused`` has the names of the linears that vLLM makes one layer of. A FormatError names a linear that is dense
    where another part of its layer is packed."""
    parent, _, last = prefix.rpartition(".")
    parts = [f"{parent}.{part}".strip(".") for part in fused.get(last, ())]
    packed = [name for name in parts if name in entries]
    if prefix in entries:
        packed = [prefix]
    elif packed and len(packed) < len(parts):
        dense = next(name for name in parts if name not in entries)
        raise FormatError(
            f"{dense} is dense and {packed[0]} is packed, which vLLM makes one layer of: unpack the model and pack it "
            "again so that both are packed, or load it with transformers"
        )
    return packed


class Shards:
    """Collects the stored tensors of the linears of one layer, in any order, and makes weights of them.

    ``names`` are the linears of the checkpoint in the layer's order, ``entries`` describe them."""

    def __init__(
        self, names: Sequence[str], entries: Mapping[str, PackedEntry]
    ) -> None:
        self.names = list(names)
        self.entries = [entries[name] for name in names]
        self._tensors: list[dict[str, Tensor]] = [{} for _ in names]

    def add(self, tensor_name: str, tensor: Tensor, part: Any = None) -> None:
        """Keeps a copy of a stored tensor of one part: ``q``, ``k`` or ``v``, a number, or None for the only one.

        A copy, as a mapped file that is truncated later ends the process."""
        place = _PLACES.get(part, part)
        if place is None and len(self.names) == 1:
            place = 0
        if not isinstance(place, int) or not 0 <= place < len(self.names):
            raise FormatError(
                f"vLLM loads part {part!r:.40} of {self.names[0]}, which this sparsepack-vllm does not know; "
                "update it, or load the model with transformers"
            )
        if tensor_name == "weight":
            self._check_placeholder(self.names[place], tensor)
            return
        field = tensor_name.removeprefix("weight_")
        self._tensors[place][field] = tensor.detach().clone()

    def _check_placeholder(self, name: str, tensor: Tensor) -> None:
        if tuple(tensor.shape) != (1,):
            raise FormatError(
                f"{name}.weight is {tuple(tensor.shape)} where config.json says that it is packed; pack the model again"
            )

    def weights(self) -> list[PackedWeight]:
        """The packed weight of each linear, checked, as kernels read it.

        A FormatError names the linear whose tensors are missing, damaged, or of another shape than its entry."""
        weights = []
        for name, entry, tensors in zip(
            self.names, self.entries, self._tensors, strict=True
        ):
            weights.append(as_bitmask(assembled(name, entry, tensors)))
        return weights

    def of_rank(self, share: Share) -> list[PackedWeight]:
        """What a rank multiplies by: one weight if all parts have one form, else several, one below the other.

        A FormatError names a linear that has another shape than the layer, or that the ranks cannot share."""
        columns = share.shape[1]
        groups = self._parts_of_linears(share)
        pieces = []
        part = 0
        for name, packed, sizes in zip(self.names, self.weights(), groups, strict=True):
            if packed.shape != (sum(sizes), columns):
                raise FormatError(
                    f"packed weight {name} has shape {packed.shape}, where the model has {(sum(sizes), columns)}; "
                    "config.json and the weight files do not belong together"
                )
            first = 0
            for size in sizes:
                rows = share.rows[part]
                begin = first
                if rows < size:
                    begin += share.rank // share.repeats[part] * rows
                pieces.append(rows_of(packed, begin, begin + rows))
                first += size
                part += 1
        ranks = columns // share.columns
        if ranks > 1:
            pieces = [
                columns_of(piece, share.rank, ranks, self.names[0]) for piece in pieces
            ]
        return joined(pieces)

    def _parts_of_linears(self, share: Share) -> list[list[int]]:
        """The rows of the layer's parts in the checkpoint, for each linear that has them."""
        sizes = share.full_rows
        if len(self.names) == 1:
            return [sizes]
        if len(self.names) != len(sizes):
            raise FormatError(
                f"{self.names[0]} and {len(self.names) - 1} more linears are {len(sizes)} parts of a layer of vLLM, "
                "which this sparsepack-vllm cannot divide; load the model with transformers"
            )
        return [[size] for size in sizes]

    def dtype_of(self, tensor_name: str) -> torch.dtype:
        """The dtype of a stored tensor, which vLLM compares with that of the parameter."""
        entry = self.entries[0]
        return {
            "weight": entry.torch_dtype,
            "weight_values": STORED_AS.get(entry.value_type, torch.uint8),
            "weight_offsets": torch.int64,
            "weight_scales": _SCALES.get(entry.value_type, torch.bfloat16),
            "weight_exponents": torch.int8,
            "weight_levels": torch.int8,
        }.get(tensor_name, torch.uint8)
