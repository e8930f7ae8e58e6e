"""A GGUF file as a template: the names of its tensors in a checkpoint, and the order of their rows.

llama.cpp's converter renames tensors, stacks those of experts, and for some families changes the order of rows. Nothing
here says which family does what: rows of the template are found among those of the checkpoint that it was made from.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from sparsellm.errors import (
    ModelError,
    RecipeError,
    StorageError,
    one_line,
    shown,
)
from sparsellm.files.files import explained, lock_while_open, temporary_in
from sparsellm.files.gguf_header import check_header
from sparsepack.files import read_bytes

SCRIPT = "convert_hf_to_gguf.py"
# How the converter names the type in which it stores matrices as they are
_OUTTYPES = {
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
}


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
                f"the template {shown(str(path))} is not a readable GGUF file: {one_line(error)}"
            ) from None
        name = self.value("general.architecture")
        known = {text: arch for arch, text in gguf.MODEL_ARCH_NAMES.items()}
        if name not in known:
            raise ModelError(
                f"the template {path} has the architecture {shown(name)}, which gguf does not know; update gguf"
            )
        self.arch = name
        blocks = self.value(f"{name}.block_count")
        if not isinstance(blocks, int):
            raise ModelError(
                f"the template {path} has no {name}.block_count; give the GGUF of a language model"
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


def values_of(tensor: gguf.ReaderTensor) -> Tensor:
    """A tensor of a GGUF file in fp32, with the rows of all its matrices: ``(rows, columns)``. A vector has one
    column."""
    values = gguf.dequantize(np.ascontiguousarray(tensor.data), tensor.tensor_type)
    columns = 1
    if len(tensor.shape) > 1:
        columns = int(tensor.shape[0])
    return torch.from_numpy(np.array(values, dtype=np.float32)).view(-1, columns)


def row_order(there: Tensor, before: Tensor, now: Tensor) -> Tensor | None:
    """The row of ``before`` that each row of ``there`` is. All are matrices, the first two of one dtype, the last two
    of one shape.

    None if the rows of ``there`` are not those of ``before``. Rows that are equal in ``before`` may be confused, so
    None too if they differ in ``now``, which is put in the same order."""
    order = torch.arange(len(before))
    if torch.equal(there, before):
        return order
    rows = _digests(before)
    places = dict(zip(rows, order.tolist(), strict=True))
    # equal rows have one place, that of their last
    one_place = [places[row] for row in rows]
    positions = [places.get(row, -1) for row in _digests(there)]
    if sorted(positions) != sorted(one_place) or not torch.equal(now[one_place], now):
        return None
    return torch.tensor(positions)


def _digests(rows: Tensor) -> list[bytes]:
    """A digest of each row of a matrix."""
    data = rows.contiguous().view(torch.uint8).numpy()
    return [hashlib.blake2b(row, digest_size=16).digest() for row in data]


def check_converter(converter: Path) -> None:
    """Raises RecipeError unless the path is a file."""
    if not converter.is_file():
        raise RecipeError(
            f"--converter {shown(str(converter))} is not a file; give the path of {SCRIPT} in a clone of llama.cpp"
        )


def metadata_bytes(converter: Path, checkpoint: Path) -> int:
    """The size of a checkpoint's GGUF file without tensors, as llama.cpp's converter makes it. A ModelError says that
    it does not convert this model."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "vocabulary.gguf"
        _convert(converter, checkpoint, out, ["--vocab-only"])
        return out.stat().st_size


@contextlib.contextmanager
def converted(
    converter: Path, checkpoint: Path, dtype: torch.dtype, name: str, folder: Path
) -> Iterator[Template]:
    """The GGUF file that llama.cpp's converter makes of a checkpoint, with matrices in ``dtype`` and this ``name`` of
    the model. It is in ``folder`` until the context ends. A ModelError has what the converter says if it fails."""
    out = temporary_in(folder)
    try:
        with explained(folder), out.open("xb") as file:
            lock_while_open(file)
            options = ["--outtype", _OUTTYPES[dtype], "--model-name", name]
            _convert(converter, checkpoint, out, options)
            yield Template(out)
    finally:
        out.unlink(missing_ok=True)


def _convert(converter: Path, checkpoint: Path, out: Path, options: list[str]) -> None:
    """Runs llama.cpp's converter, with the Python that runs this."""
    command = [sys.executable, str(converter), str(checkpoint), *options]
    command += ["--outfile", str(out)]
    # a model that it would fetch is not the one that it is to convert
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    if result.returncode == 0 and out.is_file() and out.stat().st_size:
        return
    lines = result.stderr.strip().splitlines() or ["it says nothing"]
    advice = "install what its requirements name, or update the clone of llama.cpp"
    raise ModelError(
        f"{converter.name} cannot convert {checkpoint}: {shown(lines[-1].strip())}; {advice}"
    )
