"""Writes one safetensors file a piece at a time, without a second copy of a block in memory, and hashes it."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO

import torch
from torch import Tensor

from sparsellm.storage.files import write_all
from sparsellm.storage.reader import DTYPES

PIECE = 1 << 22  # elements converted and written at a time: a small part of a block, large enough for a fast disk

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorSource:
    """A tensor that is read only when it is written. ``read`` may return another dtype, which is then converted."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor, dtype: torch.dtype | None = None) -> TensorSource:
        """The source of a tensor in memory, to be written in ``dtype``, or in its own if that is None."""
        return cls(dtype or tensor.dtype, tuple(tensor.shape), lambda: tensor)

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_shard(file: BinaryIO, tensors: Mapping[str, TensorSource]) -> str:
    """Writes a safetensors file, in the order of the format's own library: wide dtypes first, then by name.

    Zeros are written as +0.0: packed formats would store −0.0 as a kept value, and bitwise comparison would differ.

    Returns the SHA-256 of the file, in hexadecimal.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in order:
        source = tensors[name]
        end = position + source.bytes
        header[name] = {"dtype": _NAMES[source.dtype], "shape": source.shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begin at a multiple of eight bytes
    digest = hashlib.sha256()
    head: list[memoryview | bytes] = [len(text).to_bytes(8, "little"), text]
    pieces = (piece for name in order for piece in _pieces(tensors[name].read(), tensors[name].dtype))
    for data in itertools.chain(head, pieces):
        digest.update(data)
        write_all(file, data)
    return digest.hexdigest()


def _pieces(tensor: Tensor, dtype: torch.dtype) -> Iterator[memoryview]:
    flat = tensor.detach().reshape(-1)
    for start in range(0, flat.numel(), PIECE):
        piece = flat[start : start + PIECE].to("cpu", dtype)
        if dtype.is_floating_point and dtype.itemsize > 1:
            piece = piece + 0.0  # -0.0 + 0.0 is +0.0
        yield memoryview(piece.contiguous().view(torch.uint8).numpy())  # type: ignore[arg-type]
