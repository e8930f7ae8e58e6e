"""A GGUF file as a template: the names of its tensors in the checkpoint, and the order of their rows.

llama.cpp's converter renames tensors, stacks those of experts, and for some families changes the order of rows (it
rotates neighbouring pairs, Hugging Face the two halves of a head) or adds 1 to the weights of a norm. Nothing here says
which family does what: the dense model's tensor must become the template's in one of these ways.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from sparsellm.errors import ModelError, StorageError, one_line, shown
from sparsellm.files.gguf_header import check_header
from sparsepack.files import read_bytes

EXACT = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NEAR = 0.1  # largest ‖W − T‖² / ‖T‖² of dense W and quantised T: two bits a weight have 0.05, a wrong order of rows 2
_PIECE = 1 << 22  # weights compared at a time


@dataclass(frozen=True)
class Change:
    """What makes a tensor of GGUF out of one of a checkpoint: row ``i`` is row ``order[i]``, plus ``shift``."""

    order: Tensor
    shift: float = 0.0


class Template:
    """A GGUF file; ModelError if it cannot be read, is one of several, or has an unknown architecture."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            read_bytes(path, 4, StorageError)  # refuses a pipe, which might not end
            check_header(path)
            self.reader = gguf.GGUFReader(path)
        except ModelError:
            raise
        except (
            Exception
        ) as error:  # a damaged file raises any of numpy's or gguf's errors
            raise ModelError(
                f"--like {shown(str(path))} is not a readable GGUF file: {one_line(error)}"
            ) from None
        name = self.value("general.architecture")
        known = {text: arch for arch, text in gguf.MODEL_ARCH_NAMES.items()}
        if name not in known:
            raise ModelError(
                f"--like {path} has the architecture {shown(name)}, which gguf does not know; update gguf"
            )
        self.arch = name
        blocks = self.value(f"{name}.block_count")
        if not isinstance(blocks, int):
            raise ModelError(
                f"--like {path} has no {name}.block_count; give the GGUF of a language model"
            )
        self._names = gguf.get_tensor_name_map(known[name], blocks)

    def value(self, key: str) -> Any:
        """The value of a key; None if it is absent."""
        field = self.reader.fields.get(key)
        if field is None:
            return None
        return field.contents()

    def keys_of(self, keys: Sequence[str]) -> dict[str, list[str]]:
        """The tensors of a checkpoint by their name in GGUF: one, or those of all experts in order."""
        stacked: dict[str, dict[int, str]] = {}
        for key in keys:
            plain = re.sub(r"(?<=\.experts)\.\d+(?=\.)", "", key)
            tried = (plain, plain.replace("language_model.", ""), f"model.{plain}")
            names = (
                self._names.get_name(candidate, try_suffixes=(".weight", ".bias"))
                for candidate in tried
            )
            name = next(filter(None, names), None)
            if name is not None:
                expert = re.search(r"(?<=\.experts\.)\d+(?=\.)", key)
                number = 0
                if expert is not None:
                    number = int(expert.group())
                stacked.setdefault(name, {})[number] = key
        return {
            name: [key for _, key in sorted(of.items())] for name, of in stacked.items()
        }

    def change(
        self, tensor: gguf.ReaderTensor, dense: Tensor, orders: Sequence[Tensor]
    ) -> Change | None:
        """The change that makes ``tensor`` of the dense model's rows ``(rows, columns)``, by one of these orders.

        A tensor in floating point must be equal, if need be after it is rounded to the dense one's dtype; a quantised
        one near. None if no change does it, or several do."""
        if dense.numel() != tensor.n_elements or any(
            len(order) != len(dense) for order in orders
        ):
            return None
        shifts = [0.0]
        if dense.shape[1] == 1:
            shifts.append(1.0)
        changes = [Change(order, shift) for order in orders for shift in shifts]
        fitting = [change for change in changes if _fits(tensor, dense, change)]
        if len(fitting) == 1:
            return fitting[0]
        return None


def rows_of(tensor: gguf.ReaderTensor) -> int:
    """The rows of a tensor, of all its matrices; a vector has one column."""
    shape = tensor.shape.tolist()
    if len(shape) > 1:
        return int(np.prod(shape[1:]))
    return int(shape[0])


def orders_of(rows: int, heads: int, groups: Iterable[int]) -> list[Tensor]:
    """The orders of rows in which llama.cpp's converter may store a matrix of ``heads`` heads, each once.

    Rows stay as they are; or the two halves of each head are interleaved (Llama's q and k); or q, k and v, which the
    checkpoint has next to each other in each head or group of heads, are taken apart (BLOOM, GPT-NeoX, Falcon).
    ``groups`` are the numbers of heads, or of groups, to try."""
    order = torch.arange(rows)
    orders = [order]
    for count in groups:
        if rows % (2 * count) == 0:
            orders.append(order.view(count, 2, -1).transpose(1, 2).reshape(-1))
        if heads % count == 0 and rows % (heads + 2 * count) == 0:
            grouped = order.view(count, heads // count + 2, -1)
            parts = (grouped[:, :-2], grouped[:, -2], grouped[:, -1])
            orders.append(torch.cat([part.reshape(-1) for part in parts]))
    different: list[Tensor] = []
    for found in orders:
        if not any(torch.equal(found, other) for other in different):
            different.append(found)
    return different


def _fits(tensor: gguf.ReaderTensor, dense: Tensor, change: Change) -> bool:
    """Whether a change makes the template's tensor out of the dense model's. A few rows are compared at a time."""
    dtype = EXACT.get(tensor.tensor_type.name)
    rows = rows_of(tensor)
    stored = tensor.data.reshape(rows, -1)
    few = max(1, _PIECE // max(1, tensor.n_elements // rows))
    for start in range(0, rows, few):
        part = slice(start, min(start + few, rows))
        values = gguf.dequantize(np.ascontiguousarray(stored[part]), tensor.tensor_type)
        known = torch.from_numpy(np.array(values, dtype=np.float32)).view(
            part.stop - start, -1
        )
        ours = dense[change.order[part]].float() + change.shift
        # A template may have been rounded to the dense model's dtype when it was converted.
        rounded = (known - change.shift).to(dense.dtype)
        if (
            dtype is not None
            and not torch.equal(ours.to(dtype).float(), known)
            and not torch.equal(rounded, dense[change.order[part]])
        ):
            return False
        if dtype is None and float((ours - known).square().sum()) > NEAR * float(
            known.square().sum()
        ):
            return False
    return True
