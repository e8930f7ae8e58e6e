"""What a sweep has reached, on disk after each pass: a process that is killed loses the pass it was in, no more.

Files lie beside the records of the finished blocks. The parameters after each pass, and Adam's moments, are one file a
block; one record, written last, names the pass that is in force and the checksums of its files. So a process may be
killed at any moment, and finds the last pass that was recorded. What no record names any more is removed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsellm import parallel
from sparsellm.storage.files import explained, replace_atomically
from sparsellm.storage.reader import CheckpointReader
from sparsellm.storage.resume import RunState, sha256
from sparsellm.storage.shard import TensorSource, write_shard

FOLDER = "sweep"  # beside the records
RECORD = "sweep"
COPIES = 7  # of all parameters in fp32, at the worst: the best, and twice parameters and moments
_KEY = "bits"  # the one tensor of a file


@dataclass(frozen=True)
class Reached:
    """A pass that is on the disk.

    Attributes:
        history: the record of each pass so far, as JSON values, the state before the first included.
        best: the pass after which the parameters were the best so far; 0 for those before the first.
        facts: what :meth:`SweepState.save` was given beside.
    """

    history: list[dict[str, Any]]
    best: int
    facts: dict[str, Any]

    @property
    def passes(self) -> int:
        return len(self.history) - 1


class SweepState:
    """The saved passes of one run. Every process reads them, the main one writes.

    Args:
        folder: of the records of the run.
        blocks: of the model.
        run: the records themselves; in the main process alone.
    """

    def __init__(self, folder: Path, blocks: int, run: RunState | None) -> None:
        self.folder = folder / FOLDER
        self.blocks = blocks
        self._run = run
        self._digests: dict[str, str] = {}

    @property
    def begun(self) -> bool:
        """Whether a pass has been saved. Of the main process."""
        return self._run is not None and self._run.kept(RECORD) is not None

    @cached_property
    def reached(self) -> Reached | None:
        """The last pass that is on the disk as it was written; None if there is none, and the sweep begins anew."""
        return parallel.from_main(self._verified)

    def parameters(self, number: int, block: int) -> Tensor:
        """Of a block after pass ``number``: flat, fp32, on the CPU."""
        return self._read(_parameters(number, block))

    def moments(self, number: int, block: int) -> Tensor:
        """Of a block after pass ``number``: ``(2, elements)`` fp32, on the CPU."""
        return self._read(_moments(number, block))

    def save(
        self,
        history: list[dict[str, Any]],
        best: int,
        parameters: Callable[[int], Tensor],
        moments: Callable[[int], Tensor],
        *,
        last: bool,
        facts: Mapping[str, Any],
    ) -> None:
        """Puts the state after the newest pass of ``history`` on the disk, and then removes the one before.

        Args:
            history, best: as of :class:`Reached`.
            parameters, moments: give those of a block; one is held at a time.
            last: no pass follows: of the state, the best parameters are all that is still needed.
            facts: JSON values to find again.

        Raises:
            StorageError: the disk is full.
        """
        number = len(history) - 1

        def write() -> None:
            assert self._run is not None, "the main process writes"
            with explained(self.folder):
                self.folder.mkdir(exist_ok=True)
            for block in range(self.blocks):
                if best == number or not last:
                    self._write(_parameters(number, block), parameters(block))
                if not last:
                    self._write(_moments(number, block), moments(block))
            needed = set(self._files(number, best, last))
            self._digests = {name: digest for name, digest in self._digests.items() if name in needed}
            self._run.keep(RECORD, {"history": history, "best": best, "files": self._digests, "facts": dict(facts)})
            with explained(self.folder):
                for file in self.folder.iterdir():
                    if file.name not in needed:
                        file.unlink()

        parallel.from_main(write)

    def _files(self, number: int, best: int, last: bool) -> Iterable[str]:
        for block in range(self.blocks):
            if best:
                yield _parameters(best, block)
            if not last:
                yield _parameters(number, block)
                yield _moments(number, block)

    def _write(self, name: str, value: Tensor) -> None:
        # As whole numbers: a file of floating point would lose the sign of zeros, and with it the very same bits.
        tensors = {_KEY: TensorSource.of(value.contiguous().view(torch.int32))}
        self._digests[name] = replace_atomically(self.folder / name, lambda file: write_shard(file, tensors))

    def _read(self, name: str) -> Tensor:
        return CheckpointReader(self.folder, [self.folder / name]).get(_KEY).view(torch.float32)

    def _verified(self) -> Reached | None:
        record = self._run.kept(RECORD) if self._run is not None else None
        if record is None:
            return None
        digests: dict[str, str] = record["files"]
        for name, digest in digests.items():
            try:
                with (self.folder / name).open("rb") as file:
                    if sha256(file) != digest:
                        return None
            except OSError:
                return None
        self._digests = digests
        return Reached(record["history"], record["best"], record["facts"])


def state_bytes(elements: int) -> int:
    """Room on the disk that the state of a sweep over so many parameters takes at its worst."""
    return COPIES * 4 * elements


def _parameters(number: int, block: int) -> str:
    return f"parameters-{number:03d}-{block:05d}.safetensors"


def _moments(number: int, block: int) -> str:
    return f"moments-{number:03d}-{block:05d}.safetensors"
