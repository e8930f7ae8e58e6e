"""The passes of a sweep in a run's working directory, from which an interrupted sweep continues."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sparsellm import machine, parallel
from sparsellm.records import SweepPass
from sparsellm.storage.files import empty, explained, has_digest, keep_record, kept_record, replace_atomically
from sparsellm.storage.reader import CheckpointReader
from sparsellm.storage.writer import TensorSource, write_shard

SWEEP = "sweep"  # name of the record, and of the folder of its files
_BITS = "bits"  # the one tensor of a file


@dataclass(frozen=True)
class SweepRecord:
    """The last saved pass of a sweep.

    Attributes:
        history: every pass so far, including the state before the first.
        best: the number of the best pass so far; 0 for the state before the first.
        files: SHA-256 of the files, by name.
        seconds, peak_rss: those of the sweep so far, in all processes that ran it.
    """

    history: list[SweepPass]
    best: int
    files: dict[str, str]
    seconds: float
    peak_rss: int


class SavedSweep:
    """The saved passes of one run. Every process reads them, the first writes.

    The parameters after each pass, and Adam's moments, are one file per block. One record, written last, has the
    history and the checksums of the files. Files of earlier passes are then removed.

    Attributes:
        last: the last saved pass whose files are intact; None if there is none and the sweep must begin.
        seconds: returns the seconds since the sweep began.
    """

    def __init__(self, state: Path, blocks: int) -> None:
        self._folder, self._record, self._blocks = state / SWEEP, state / f"{SWEEP}.json", blocks
        self.seconds: Callable[[], float] = lambda: 0.0
        self.last = parallel.from_main(self._intact)

    def parameters(self, number: int, block: int) -> Tensor:
        """The parameters of a block after pass ``number``: flat, fp32, on the CPU."""
        return self._read("parameters", number, block)

    def moments(self, number: int, block: int) -> Tensor:
        """Adam's moments of a block after pass ``number``: ``(2, elements)`` fp32, on the CPU."""
        return self._read("moments", number, block)

    def save(
        self, history: list[SweepPass], best: int, state: Mapping[str, Callable[[int], Tensor]], *, last: bool
    ) -> None:
        """Writes the state after the newest pass of ``history``, then removes the previous one.

        Args:
            history: of all passes.
            best: the number of the best one.
            state: the ``parameters`` and ``moments`` of a block, by its number.
            last: whether no pass follows, so that only the best parameters are kept.

        Raises:
            StorageError: the disk is full.
        """
        number, seconds = history[-1].passes, self.seconds()
        kinds = {("parameters", best)} if best else set()
        if not last:
            kinds |= {(kind, number) for kind in state}

        def write() -> None:
            with explained(self._folder):
                self._folder.mkdir(exist_ok=True)
            digests = dict(self.last.files) if self.last is not None else {}
            for block in range(self._blocks):
                for kind in (kind for kind, of in sorted(kinds) if of == number):
                    # As integers: the writer of floating point drops the sign of zeros, and the bits must stay.
                    tensors = {_BITS: TensorSource.of(state[kind](block).contiguous().view(torch.int32))}
                    file = self._file(kind, number, block)
                    digests[file.name] = replace_atomically(file, partial(write_shard, tensors=tensors))
            names = [self._file(kind, of, block).name for kind, of in kinds for block in range(self._blocks)]
            peak = max(machine.peak_rss(), self.last.peak_rss if self.last is not None else 0)
            self.last = SweepRecord(history, best, {name: digests[name] for name in names}, seconds, peak)
            keep_record(self._record, self.last)
            with explained(self._folder):
                empty(self._folder, tuple(names))

        parallel.from_main(write)

    def _file(self, kind: str, number: int, block: int) -> Path:
        return self._folder / f"{kind}-{number:03d}-{block:05d}.safetensors"

    def _read(self, kind: str, number: int, block: int) -> Tensor:
        return CheckpointReader(self._folder, [self._file(kind, number, block)]).get(_BITS).view(torch.float32)

    def _intact(self) -> SweepRecord | None:
        record = kept_record(self._record, SweepRecord)
        files = record.files.items() if record is not None else ()
        return record if all(has_digest(self._folder / name, digest) for name, digest in files) else None
