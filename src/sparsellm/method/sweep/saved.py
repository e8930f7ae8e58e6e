"""The passes of a sweep in a run's working directory, from which an interrupted sweep continues."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sparsellm import machine, parallel
from sparsellm.files.files import (
    empty,
    explained,
    has_digest,
    keep_record,
    kept_record,
    replace_atomically,
)
from sparsellm.files.reader import CheckpointReader
from sparsellm.files.writer import write_shard
from sparsellm.records import SweepPass
from sparsepack.masks import from_bits, to_bits

SWEEP = "sweep"  # name of the record, and of the folder of its files
# The tensors of a file: the elements that are not zero, a bitmask of their places, and the shape.
_BITS = "bits"
_MASK = "mask"
_SHAPE = "shape"


@dataclass(frozen=True)
class SweepRecord:
    """The last saved pass of a sweep."""

    history: list[SweepPass]  # every pass so far, including the state before the first
    best: int  # the number of the best pass so far; 0 for the state before the first
    files: dict[str, str]  # SHA-256 of the files, by name
    # on the wall clock, that the sweep took so far in all starts of the run
    seconds: float
    peak_rss: int  # bytes; the highest of the first process in any of these starts
    way: str = ""  # how processes divide the windows, on which the held-out ones depend


class SavedSweep:
    """The saved passes of one run. Every process reads them, the first writes.

    A block has one file of its parameters after a pass (flat, fp32), and one of Adam's moments ``(2, elements)``, both
    without zeros. One record, written last, has the history and the checksums of the files. Files of earlier passes but
    the best are then removed. ``last`` is the last saved pass with intact files, or None. The sweep sets ``way``."""

    way = ""

    def __init__(self, state: Path, blocks: int) -> None:
        self._folder = state / SWEEP
        self._record = state / f"{SWEEP}.json"
        self._blocks = blocks
        self.last = parallel.from_main(self._intact)
        self._began = time.perf_counter()
        if self.last is not None:
            self._began -= self.last.seconds

    def read(self, kind: str, number: int, block: int) -> Tensor:
        """The ``parameters`` or ``moments`` of a block after pass ``number``, on the CPU."""
        file = CheckpointReader(self._folder, [self._file(kind, number, block)])
        value = torch.zeros(file.get(_SHAPE).tolist(), dtype=torch.int32)
        kept = from_bits(file.get(_MASK), value.shape[-1])
        value.view(kept.shape).masked_scatter_(kept, file.get(_BITS))
        return value.view(torch.float32)

    def save(
        self,
        history: list[SweepPass],
        best: int,
        state: Mapping[str, Callable[[int], Tensor]],
        *,
        last: bool,
    ) -> None:
        """Writes the ``parameters`` and ``moments`` of each block after the newest pass of ``history``, then removes
        those of earlier passes except the ``best``. After the ``last`` pass, only the best parameters are kept. A
        StorageError says that the disk is full. Every process takes part in ``state``."""
        number = history[-1].passes
        seconds = time.perf_counter() - self._began
        kinds: set[tuple[str, int]] = set()  # what is kept, and the pass it is from
        if best:
            kinds.add(("parameters", best))
        if not last:
            kinds.update((kind, number) for kind in state)
        names = {
            self._file(kind, at, block).name
            for kind, at in kinds
            for block in range(self._blocks)
        }
        files: dict[str, str] = {}
        if self.last is not None:
            files.update(self.last.files)

        def write(file: Path, value: Tensor) -> None:
            with explained(self._folder):
                self._folder.mkdir(exist_ok=True)
            # As integers: the writer of floating point drops the sign of zeros, and the bits must stay.
            bits = value.cpu().contiguous().view(torch.int32)
            kept = bits != 0  # pruned weights and their moments are not written
            parts = {
                _BITS: bits[kept],
                _MASK: to_bits(kept.view(-1, bits.shape[-1])),
                _SHAPE: torch.tensor(bits.shape),
            }
            files[file.name] = replace_atomically(
                file, partial(write_shard, tensors=parts)
            )

        def record() -> None:
            peak = machine.peak_rss()
            if self.last is not None:
                peak = max(peak, self.last.peak_rss)
            self.last = SweepRecord(
                history,
                best,
                files={name: files[name] for name in names},
                seconds=seconds,
                peak_rss=peak,
                way=self.way,
            )
            keep_record(self._record, self.last)
            with explained(self._folder):
                empty(self._folder, tuple(names))

        new = sorted(kind for kind, at in kinds if at == number)
        for kind, block in itertools.product(new, range(self._blocks)):
            parallel.from_main(
                partial(write, self._file(kind, number, block), state[kind](block))
            )
        parallel.from_main(record)

    def _file(self, kind: str, number: int, block: int) -> Path:
        return self._folder / f"{kind}-{number:03d}-{block:05d}.safetensors"

    def _intact(self) -> SweepRecord | None:
        record = kept_record(self._record, SweepRecord)
        if record is None:
            return None
        for name, digest in record.files.items():
            if not has_digest(self._folder / name, digest):
                return None
        return record
