"""A picture of a real mask: which weights of a window of one linear are zero, as a PNG."""

from __future__ import annotations

import base64
import struct
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsellm.errors import StorageError
from sparsellm.records import LinearResult
from sparsellm.report.checkpoint import Checkpoint
from sparsellm.storage.reader import open_checkpoint

WINDOW = 128  # most rows and columns: at three pixels a weight the picture fits a phone
_KEPT, _ZERO = bytes((0x0B, 0x57, 0xA4)), bytes((0xF4, 0xF1, 0xE8))


@dataclass(frozen=True)
class MaskPicture:
    """The mask of the first rows and columns of a linear, or the reason why there is none.

    Attributes:
        linear: the name of the linear.
        kept: weights in the window that are not zero.
        source: the picture as a ``data:`` address; kept weights are dark, zeros light. None if there is none.
    """

    linear: str
    rows: int = 0
    columns: int = 0
    kept: int = 0
    source: str | None = None
    reason: str = ""


def mask_picture(record: Checkpoint) -> MaskPicture:
    """The picture of the largest pruned linear of the middle block; the reason if its weight cannot be read."""
    linears = record.pruning.linears
    blocks = sorted({linear.block for linear in linears})
    middle = [linear for linear in linears if linear.block == blocks[len(blocks) // 2]]
    linear = max(middle, key=lambda each: each.weights)
    try:
        weight = _weight(record, linear)
    except StorageError as error:  # the report is of the run; a checkpoint without its weights still has one
        return MaskPicture(linear.name, reason=str(error))
    if weight is None:
        return MaskPicture(linear.name, reason=f"{linear.name} has no weight of the recorded shape in the checkpoint")
    kept = weight[:WINDOW, :WINDOW] != 0
    address = "data:image/png;base64," + base64.b64encode(_png(kept)).decode("ascii")
    return MaskPicture(linear.name, kept.shape[0], kept.shape[1], int(kept.sum()), address)


def _png(kept: Tensor) -> bytes:
    """A PNG of one bit a pixel from ``(rows, columns)`` bool: True in the colour of kept weights."""
    rows, columns = kept.shape
    bits = torch.nn.functional.pad(kept.to(torch.uint8), (0, -columns % 8)).view(rows, -1, 8)
    packed = (bits * torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8)).sum(-1).to(torch.uint8)
    lines = b"".join(b"\0" + bytes(row.tolist()) for row in packed)  # each line begins with its filter: none
    header = struct.pack(">IIBBBBB", columns, rows, 1, 3, 0, 0, 0)  # one bit, with a palette
    chunks = ((b"IHDR", header), (b"PLTE", _ZERO + _KEPT), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def _weight(record: Checkpoint, linear: LinearResult) -> Tensor | None:
    """The weight ``(out, in)`` of a linear; its name in the checkpoint may begin in another way than in the model."""
    reader = open_checkpoint(record.directory)
    name = f"{linear.name}.weight"
    if name not in reader:
        tail = f".{linear.block}.{name.split(f'.{linear.block}.', 1)[-1]}"
        names = [each for each in reader if each.endswith(tail)]
        if len(names) != 1:
            return None
        name = names[0]
    weight = reader.get(name)
    if weight.shape == linear.shape:
        return weight
    return weight.t() if weight.shape == linear.shape[::-1] else None  # Conv1D stores its weight transposed
