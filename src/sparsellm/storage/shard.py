"""One safetensors file, written a piece at a time: no second copy of a block in memory, and its checksum on the way."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO

import torch
from torch import Tensor

from sparsellm.storage.files import write_all
from sparsellm.storage.reader import DTYPES

PIECE = 1 << 22  # elements converted and written at a time

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorSource:
    """A tensor that is made when it is written: what has to be known before, and how to get it.

    ``read`` may return another dtype, and is then converted piece by piece.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor, dtype: torch.dtype | None = None) -> TensorSource:
        """A tensor that is there already, to be written in ``dtype``, or in its own."""
        return cls(dtype or tensor.dtype, tuple(tensor.shape), lambda: tensor)

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_shard(file: BinaryIO, tensors: Mapping[str, TensorSource]) -> str:
    """Writes a safetensors file, in the order that the format's own library writes: wide dtypes first, then by name.

    Zeros are written as +0.0: the sign of one would cost packed formats and confuse bitwise comparison.

    Returns:
        SHA-256 of the file, in hexadecimal.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in order:
        source = tensors[name]
        header[name] = {
            "dtype": _NAMES[source.dtype],
            "shape": list(source.shape),
            "data_offsets": [position, position + source.bytes],
        }
        position += source.bytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of eight bytes
    digest = hashlib.sha256()
    for data in (len(text).to_bytes(8, "little"), text):
        digest.update(data)
        write_all(file, data)
    for name in order:
        source = tensors[name]
        for piece in _pieces(source.read(), source.dtype):
            digest.update(piece)
            write_all(file, piece)
    return digest.hexdigest()


def _pieces(tensor: Tensor, dtype: torch.dtype) -> Iterator[memoryview]:
    flat = tensor.detach().reshape(-1)
    for start in range(0, flat.numel(), PIECE):
        piece = flat[start : start + PIECE].to("cpu", dtype)
        if dtype.is_floating_point and dtype.itemsize > 1:
            piece = piece + 0.0  # -0.0 + 0.0 is +0.0
        yield memoryview(piece.contiguous().view(torch.uint8).numpy())  # type: ignore[arg-type]
