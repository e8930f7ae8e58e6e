"""The records of a run in its working directory, from which the same command continues after a kill.

Each is written after the file that it describes. So whatever the moment of a kill, a file is complete, or is ignored.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from pydantic_core import to_jsonable_python
from torch import Tensor

from sparsellm import interrupts, parallel
from sparsellm.errors import StorageError
from sparsellm.files import directory
from sparsellm.files.directory import (
    BLOCKS,
    STATE,
    SWEPT,
    WorkingDirectory,
    check_room,
    partial_of,
    written_bytes,
)
from sparsellm.files.files import (
    has_digest,
    keep_record,
    kept_record,
    replace_atomically,
)
from sparsellm.files.reader import CheckpointReader
from sparsellm.files.writer import (
    CheckpointWriter,
    TensorSource,
    shard_names,
    write_shard,
)
from sparsellm.method.allocation import Allocation
from sparsellm.method.sweep.saved import SWEEP, SavedSweep
from sparsellm.progress import NOTE, Progress, ProgressCallback
from sparsellm.records import ExpertsOfBlock, LinearResult, Settings
from sparsellm.run.result import versions

# names of records
ALLOCATION = "allocation"
OUTPUT_COSTS = "output-costs"


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Everything that the bits of a result depend on."""

    kind: str = "prune"
    format: int = 6  # version of the working directory
    recipe: Settings  # every setting, including the defaults of options, which may differ in another release
    model: str  # digest of the dense model
    calibration_tokens: str  # digest of the token ids
    computing: str  # dtype and kind of device
    plugins: dict[str, str]  # digests of the plugins that the run uses
    # digest of the weights that are pruned, if they are not the dense model's
    start: str = ""

    def stored(self) -> Settings:
        """The identity as records have it."""
        values: Settings = to_jsonable_python(asdict(self))
        return values


@dataclass(frozen=True)
class BlockRecord:
    """A finished block: the results of its linears, the ``conditions`` under which it was pruned, seconds of each
    phase since the previous block, the peak memory of the process so far in bytes, and the SHA-256 of the shard."""

    linears: list[LinearResult]
    versions: dict[str, str]
    seconds: dict[str, float]
    peak_rss: int
    sha256: str = ""
    experts: ExpertsOfBlock | None = None  # what a run that removes experts did


class Journal(contextlib.ExitStack):
    """The records of one run into ``out``, and the checkpoint that it writes.

    Every process of a run has one. The first process writes; the others read the finished shards. Without ``out``
    nothing is written, and there is nothing to resume."""

    def __init__(
        self, out: Path | None, blocks: int, *, restart: bool, overwrite: bool
    ) -> None:
        super().__init__()
        self.out = out
        self.blocks = blocks
        self._restart = restart
        self._overwrite = overwrite
        self._partial = partial_of(out) if out is not None else Path()
        self._state = self._partial / STATE
        if out is not None and not restart and self._state.is_dir():
            interrupts.keeps(f"finished blocks are kept next to {self.out}", part=True)
        self._shards = [
            self._partial / BLOCKS / name for name in shard_names(blocks + 1)
        ]
        # writes the walk's blocks; in the first process only
        self._walked: CheckpointWriter | None = None
        # writes the result, that of the walk or of the sweep; there only
        self.writer: CheckpointWriter | None = None

    def knows(self, name: str) -> bool:
        """Whether the unfinished run has a record of this name. May be called before ``open``."""
        return (
            self.out is not None
            and not self._restart
            and (self._state / f"{name}.json").is_file()
        )

    def open(self, identity: Identity, need_bytes: int, *, model: str) -> None:
        """Begins a run that takes ``need_bytes`` of disk, or continues an unfinished one with the same identity. Raises
        StorageError if the directory cannot be written, or holds an unfinished run with another identity. ``model`` is
        the name of the model, for messages; empty for an object."""

        def begin(out: Path) -> bool:
            # torchrun and Slurm repeat a command with its --restart, and count starts: a later start resumes the run.
            identical = directory.left_in(self._partial) == identity.stored()
            counts = (
                os.environ.get(f"{launcher}_RESTART_COUNT", "0")
                for launcher in ("TORCHELASTIC", "SLURM")
            )
            self._restart = self._restart and (
                not identical or all(count == "0" for count in counts)
            )
            opened = partial(
                WorkingDirectory,
                out,
                asdict(identity),
                need_bytes=need_bytes,
                model=model,
            )
            work = self.enter_context(
                opened(overwrite=self._overwrite, restart=self._restart)
            )
            self._walked = self.writer = CheckpointWriter(
                work, self.blocks + 1, resumes=True
            )
            return self._restart

        if self.out is not None:
            self._restart = parallel.from_main(partial(begin, self.out))
            interrupts.keeps(f"finished blocks are kept next to {self.out}", part=True)

    def open_sweep(
        self, state_bytes: int, run_bytes: int, progress: ProgressCallback
    ) -> SavedSweep | None:
        """Begins to write every block again, while the walk's blocks are kept until the end.

        Returns the storage for the passes of the sweep, at most ``state_bytes``; None if nothing is written, or if the
        disk has no room for them next to the run's other files, ``run_bytes`` in all, which ``progress`` is told."""

        def begin() -> bool:
            if self._walked is None:
                return False
            self.writer = CheckpointWriter(self._walked.work, self.blocks + 1, SWEPT)
            try:
                if not self.knows(SWEEP):
                    check_room(
                        self._partial,
                        state_bytes + run_bytes - written_bytes(self._partial),
                    )
            except StorageError as full:
                said = f"passes of the sweep are not saved, so an interrupted sweep will start again: {full}"
                progress(Progress(NOTE, 1, 1, said))
                return False
            return True

        if not parallel.from_main(begin):
            return None
        return SavedSweep(self._state, self.blocks)

    def block(self, index: int) -> CheckpointReader | None:
        """The finished block ``index`` as the walk wrote it, for every process; None for a model in memory."""
        if self.out is None:
            return None
        return CheckpointReader(self._partial / BLOCKS, [self._shards[index]])

    def finished(self, progress: ProgressCallback) -> list[BlockRecord]:
        """The records of the first blocks that an earlier process finished; the shard of each is verified."""

        def verified() -> list[BlockRecord]:
            records: list[BlockRecord] = []
            for shard in self._shards[: self.blocks if self.writes else 0]:
                record = kept_record(self._state / f"{shard.name}.json", BlockRecord)
                if record is None or not has_digest(shard, record.sha256):
                    break
                records.append(record)
                assert self._walked is not None
                self._walked.digests[shard.name] = record.sha256
                progress(
                    Progress(
                        "verify",
                        len(records),
                        self.blocks,
                        "checking the blocks of an earlier run",
                    )
                )
            if records:
                said = f"resuming an unfinished run: {len(records)} of {self.blocks} blocks are done"
                progress(Progress(NOTE, 1, 1, said))
            return records

        return parallel.from_main(verified)

    @property
    def writes(self) -> bool:
        """Whether this process writes the blocks."""
        return self._walked is not None

    def write_block(
        self, index: int, tensors: Mapping[str, TensorSource], record: BlockRecord
    ) -> None:
        """Writes a block that the walk has finished, then its record."""
        assert self._walked is not None
        self.keep(
            self._shards[index].name,
            replace(record, sha256=self._walked.write_shard(index, tensors)),
        )

    def allocation(self) -> Allocation | None:
        """The allocation that an earlier start chose, or None."""
        file = self._state / f"{ALLOCATION}.json"
        return parallel.from_main(
            lambda: kept_record(file, Allocation) if self.writes else None
        )

    def output_costs(self) -> dict[str, Tensor] | None:
        """``E[g_i²]`` of every linear's outputs from an earlier start, or None."""
        file = self._state / f"{OUTPUT_COSTS}.safetensors"

        def kept() -> dict[str, Tensor] | None:
            if not self.writes:
                return None
            record = kept_record(self._state / f"{OUTPUT_COSTS}.json", dict)
            if record is None or not has_digest(file, record["sha256"]):
                return None
            reader = CheckpointReader(self._state, [file])
            return {name: reader.get(name) for name in reader}

        return parallel.from_main(kept)

    def keep_output_costs(self, costs: dict[str, Tensor]) -> None:
        if self.writes:
            file = self._state / f"{OUTPUT_COSTS}.safetensors"
            digest = replace_atomically(file, partial(write_shard, tensors=costs))
            self.keep(OUTPUT_COSTS, {"sha256": digest})

    def keep(self, name: str, record: object) -> None:
        """Writes a record, in the first process."""
        if self.writes:
            keep_record(self._state / f"{name}.json", record)


def conditions() -> dict[str, str]:
    """The versions, processes and threads, which may differ when a run is resumed and affect the last bits."""
    return {
        **versions(),
        "processes": str(parallel.size()),
        "threads": str(torch.get_num_threads()),
    }


def other_conditions(records: list[BlockRecord]) -> list[str]:
    """A warning if the first blocks were pruned under other ``conditions``: the last bits may then differ."""
    here = conditions()
    for index, record in reversed(list(enumerate(records))):
        other = {
            name: version
            for name, version in record.versions.items()
            if here.get(name) != version
        }
        if other:
            then, now = (
                ", ".join(f"{name} {known.get(name)}" for name in other)
                for known in (other, here)
            )
            return [
                f"blocks up to {index + 1} were pruned with {then}, those after them with {now}"
            ]
    return []
