"""A picture of a real mask: which weights in a corner of one linear are zero."""

from __future__ import annotations

import base64
import struct
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from sparsellm.errors import StorageError
from sparsellm.records import LinearResult
from sparsellm.report.checkpoint import Checkpoint
from sparsellm.storage.reader import open_checkpoint

MOST = 128  # rows and columns: at three pixels a weight the picture fits a phone
_COLOURS = bytes((0xE8, 0xF1, 0xF4, 0, 0xA4, 0x57, 0x0B, 0))  # blue, green, red of zeros and of kept weights


@dataclass(frozen=True)
class MaskPicture:
    """The mask of the first rows and columns of a linear, or the reason why there is none."""

    linear: str  # its name
    rows: int = 0
    columns: int = 0
    kept: int = 0  # weights in the picture that are not zero
    source: str | None = None  # the picture as a ``data:`` address; kept weights are dark, zeros light
    reason: str = ""


def mask_picture(record: Checkpoint) -> MaskPicture:
    """The picture of the largest pruned linear of the middle block; the reason if its weight cannot be read."""
    blocks = record.pruning.blocks
    middle = [linear for linear in record.pruning.linears if linear.block == blocks[len(blocks) // 2]]
    linear = max(middle, key=lambda each: each.weights)
    try:
        kept = _weight(record, linear)[:MOST, :MOST] != 0
    except StorageError as error:  # the report is of the run; a checkpoint without its weights still has one
        return MaskPicture(linear.name, reason=str(error))
    address = "data:image/bmp;base64," + base64.b64encode(_bmp(kept)).decode("ascii")
    return MaskPicture(linear.name, kept.shape[0], kept.shape[1], int(kept.sum()), address)


def _bmp(kept: Tensor) -> bytes:
    """A BMP of one bit a pixel from ``(rows, columns)`` bool: True in the colour of kept weights."""
    rows, columns = kept.shape
    bits = np.packbits(np.pad(kept.numpy(), ((0, 0), (0, -columns % 32))), axis=1).tobytes()  # lines of whole words
    begin = 62  # bytes before the pixels, whose rows stand from top to bottom
    header = struct.pack("<2sI4xIIiiHH24x8s", b"BM", begin + len(bits), begin, 40, columns, -rows, 1, 1, _COLOURS)
    return header + bits


def _weight(record: Checkpoint, linear: LinearResult) -> Tensor:
    """The weight ``(out, in)`` of a linear; its name in the checkpoint may begin in another way than in the model."""
    reader = open_checkpoint(record.directory)
    name = f"{linear.name}.weight"
    tail = f".{linear.block}.{name.split(f'.{linear.block}.', 1)[-1]}"
    names = [name] if name in reader else [each for each in reader if each.endswith(tail)]
    weight = reader.get(names[0]) if len(names) == 1 else None
    if weight is not None and weight.shape == linear.shape[::-1] != linear.shape:
        weight = weight.t()  # Conv1D stores its weight transposed
    if weight is None or weight.shape != linear.shape:
        raise StorageError(f"{linear.name} has no weight of the recorded shape in the checkpoint")
    return weight
