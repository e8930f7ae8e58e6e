"""Writes a checkpoint shard by shard, each a piece at a time, without a second copy of a block in memory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from sparsellm.files.contents import belongs_to, companions_of, write_list
from sparsellm.files.directory import BLOCKS, WorkingDirectory
from sparsellm.files.files import (
    empty,
    explained,
    replace_atomically,
    write_all,
    write_bytes,
)
from sparsellm.files.reader import DTYPES, PIECE, CheckpointReader, memory_of
from sparsellm.inputs import read_object
from sparsepack.errors import Note

# Keys of compression schemes: vLLM and transformers refuse a config with a scheme that they do not support. The last is
# the name of the weight files, which have other names in what is written.
FOREIGN_CONFIG_KEYS = (
    "sparsity_config",
    "quantization_config",
    "compression_config",
    "transformers_weights",
)

# the most bytes of a shard with several blocks, which are in memory together
SHARD_BYTES = 512 << 20
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorSource:
    """A tensor that is read only when it is written. ``read`` may return another dtype, which is then converted."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class CheckpointWriter:
    """A checkpoint of some shards in the making: the files in one folder of a working directory, ``BLOCKS``, or
    ``SWEPT`` for the one that replaces it after a sweep. If it ``resumes``, the shards that are there stay."""

    def __init__(
        self,
        work: WorkingDirectory,
        shards: int,
        folder: str = BLOCKS,
        *,
        resumes: bool = False,
    ) -> None:
        self.work = work
        self.folder = work.path / folder
        self.shards = [self.folder / name for name in shard_names(shards)]
        # SHA-256 of the shards that are known to be complete, by name.
        self.digests: dict[str, str] = {}
        with explained(self.folder):
            self.folder.mkdir(exist_ok=True)
            if not resumes:
                empty(self.folder)

    def write_shard(
        self, index: int, tensors: Mapping[str, TensorSource | Tensor]
    ) -> str:
        """Writes a shard, waits until it is on the disk, and returns its SHA-256; a StorageError if that fails."""
        digest = replace_atomically(
            self.shards[index], partial(write_shard, tensors=tensors)
        )
        self.digests[self.shards[index].name] = digest
        return digest

    def write_json(self, name: str, content: object) -> None:
        self.write_text(name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def write_text(self, name: str, content: str) -> None:
        # A name that is not UTF-8, such as one in the command line, is written as JSON escapes it.
        write_bytes(self.folder / name, content.encode("utf-8", "backslashreplace"))

    def copy_companions(self, source: Path, *more: str) -> None:
        """Copies config, tokenizer, licence and the like of a checkpoint directory, and files named in ``more``.

        A link that leads out of the model's directory is not copied, which a warning says. In a snapshot of the hub,
        links lead to the blobs of the same repository, which belong to the model. Python files are not copied: loading
        must run no code. Raises StorageError if a file cannot be read or written, or the config is no JSON object."""
        for file, name in companions_of(source, *more).items():
            if not belongs_to(source, file):
                said = f"{name} of the model was not copied: it is a link out of its directory; copy it into the result"
                warnings.warn(said, Note, stacklevel=2)
                continue
            with explained(self.folder):
                (self.folder / name).parent.mkdir(exist_ok=True)
                write_bytes(self.folder / name, file.read_bytes())
        self.write_config(source / "config.json")

    def finish(self) -> Path:
        """Writes the index and the list of files, and gives the checkpoint its final name. Raises StorageError if the
        disk is full, or files were added to the final directory in the meantime."""
        reader = CheckpointReader(self.folder, self.shards)
        weight_map = {key: reader.file_of(key).name for key in sorted(reader)}
        index = {"metadata": {"total_size": reader.bytes}, "weight_map": weight_map}
        self.write_json("model.safetensors.index.json", index)
        with explained(self.folder):
            write_list(self.folder, self.digests)
        self.work.publish(self.folder)
        return self.work.out

    def write_config(self, path: Path) -> None:
        """Writes the config of a file without ``FOREIGN_CONFIG_KEYS``, its path and what may stop it running."""
        config = read_object(path)
        for key in (*FOREIGN_CONFIG_KEYS, "_name_or_path", "return_dict"):
            config.pop(key, None)
        self.write_json("config.json", config)


@contextlib.contextmanager
def written(work: WorkingDirectory, shards: int) -> Iterator[CheckpointWriter]:
    """The writer of a checkpoint that is not resumed; it gets its name at the end; after an error no file is left."""
    with work:
        writer = CheckpointWriter(work, shards)
        try:
            yield writer
        except BaseException:
            work.discard()
            raise
        writer.finish()


def joined(sizes: Sequence[int]) -> list[list[int]]:
    """The numbers of the parts that each shard holds, in order, by the bytes of every part. A shard has one part, or
    several with no more than ``SHARD_BYTES`` together."""
    shards: list[list[int]] = []
    held = 0
    for part, size in enumerate(sizes):
        if shards and held + size <= SHARD_BYTES:
            shards[-1].append(part)
            held += size
        else:
            shards.append([part])
            held = size
    return shards


def shard_names(shards: int) -> list[str]:
    """The file names of a checkpoint's shards, in order."""
    return [
        f"model-{index + 1:05d}-of-{shards:05d}.safetensors" for index in range(shards)
    ]


def write_shard(file: BinaryIO, tensors: Mapping[str, TensorSource | Tensor]) -> str:
    """Writes a safetensors file, in the order of the format's own library: wide dtypes first, then by name.

    Zeros are written as +0.0: packed formats would store −0.0 as a kept value, and bitwise comparison would differ.

    Returns the SHA-256 of the file, in hexadecimal."""
    sources: dict[str, TensorSource] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor):
            tensor = TensorSource(tensor.dtype, tensor.shape, tensor.detach)
        sources[name] = tensor
    order = sorted(sources, key=lambda name: (-sources[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in order:
        source = sources[name]
        end = position + source.bytes
        header[name] = {
            "dtype": _NAMES[source.dtype],
            "shape": source.shape,
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begin at a multiple of eight bytes
    digest = hashlib.sha256()

    def write(data: memoryview | bytes) -> None:
        digest.update(data)
        write_all(file, data)

    write(len(text).to_bytes(8, "little"))
    write(text)
    for name in order:
        source = sources[name]
        for piece in _pieces(source.read(), source.dtype):
            write(piece)
    return digest.hexdigest()


def _pieces(tensor: Tensor, dtype: torch.dtype) -> Iterator[memoryview]:
    flat = tensor.detach().reshape(-1)
    for start in range(0, flat.numel(), PIECE):
        piece = flat[start : start + PIECE].to("cpu", dtype)
        if dtype.is_floating_point and dtype.itemsize > 1:
            piece = piece + 0.0  # -0.0 + 0.0 is +0.0
        yield memory_of(piece.contiguous())
