"""All of resuming: the files of an unfinished run, from which the same command continues after a kill.

Beside the finished shards are records: the run's identity, one for each finished block, the allocation, the output
costs, and the last pass of a sweep. Each record is written after the file that it describes, atomically, with a
checksum. So a process may be killed at any moment: every file it leaves is complete, or is ignored.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsellm import parallel
from sparsellm.allocation import Allocation
from sparsellm.machine import heap
from sparsellm.progress import NOTE, Progress, ProgressCallback
from sparsellm.records import LinearResult
from sparsellm.run.counts import Magnitudes
from sparsellm.run.result import versions
from sparsellm.storage.destination import partial_of
from sparsellm.storage.files import explained, replace_atomically
from sparsellm.storage.reader import CheckpointReader
from sparsellm.storage.resume import FOLDER, RunState, has_kept, sha256
from sparsellm.storage.shard import TensorSource, write_shard
from sparsellm.storage.writer import CheckpointWriter, shard_names
from sparsellm.sweep.whole_model import Parameters, Pass, Reached

ALLOCATION, OUTPUT_COSTS, SWEEP = "allocation", "output-costs", "sweep"  # names of the records
_KEY = "bits"  # the one tensor of a sweep's file


@dataclass(frozen=True)
class Identity:
    """Everything that the bits of a result depend on.

    Attributes:
        recipe: every setting, including the defaults of options, which may differ in another release.
        model: digest of the dense model.
        calibration_tokens: digest of the token ids.
        computing: dtype and kind of device.
        plugins: digests of the plugins that the run uses.
        start: digest of the weights that are pruned, if they are not the dense model's.
        stage: 1 for the first stage of a run of two, else 0.
    """

    recipe: dict[str, Any]
    model: str
    calibration_tokens: str
    computing: str
    plugins: dict[str, Any]
    start: str = ""
    stage: int = 0

    def to_dict(self) -> dict[str, Any]:
        values = {each.name.replace("_", " "): getattr(self, each.name) for each in fields(self)}
        for name in ("start", "stage"):
            if not values[name]:
                del values[name]
        return {"format": 2, **values}


@dataclass(frozen=True)
class BlockRecord:
    """The record of a finished block.

    Attributes:
        linears: the results of its linears.
        versions: of the libraries that pruned it, and the number of processes.
        seconds: of each phase since the previous block.
        peak_rss: the peak memory of the process so far, in bytes.
        magnitudes: of its weights before and after; None in records of an older release.
    """

    linears: list[LinearResult]
    versions: dict[str, str]
    seconds: dict[str, float]
    peak_rss: int
    magnitudes: Magnitudes | None = None

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "linears": [linear.model_dump(mode="json") for linear in self.linears]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BlockRecord:
        linears = [LinearResult.model_validate(each) for each in values["linears"]]
        counted = values.get("magnitudes")
        return cls(linears, values["versions"], values["seconds"], values["peak_rss"], counted)


class Journal:
    """The records of one run, and the checkpoint that it writes.

    Every process of a run has one. The first process writes; the others read the finished shards. Without ``out``
    nothing is written, and there is nothing to resume.

    Args:
        out: the final directory; None for a model that is pruned in memory only.
        blocks: the number of blocks of the model.
        restart: discard the files of an unfinished run.
        overwrite: replace the checkpoint in ``out``.
    """

    def __init__(self, out: Path | None, blocks: int, *, restart: bool, overwrite: bool) -> None:
        self.out = out
        self.blocks = blocks
        self._restart = restart
        self._overwrite = overwrite
        self._open: Callable[..., CheckpointWriter] | None = None
        self._held = contextlib.ExitStack()
        self._walked: CheckpointWriter | None = None  # writes the walk's blocks; in the first process only
        self._writer: CheckpointWriter | None = None  # writes the result: of the walk, or of the sweep

    # ------------------------------------------------------------------ before it is opened

    def knows(self, record: str) -> bool:
        """Whether the unfinished run has a record of this name."""
        return self.out is not None and not self._restart and has_kept(partial_of(self.out), record)

    # ------------------------------------------------------------------ opening and closing

    def open(self, identity: Identity, need_bytes: int) -> None:
        """Begins a run, or continues an unfinished one with the same identity.

        Args:
            identity: of the run.
            need_bytes: disk space for everything that it writes.

        Raises:
            StorageError: the directory cannot be written, or holds an unfinished run with another identity.
        """
        if self.out is None:
            return
        self._open = partial(
            CheckpointWriter,
            self.out,
            shards=self.blocks + 1,
            identity=identity.to_dict(),
            overwrite=self._overwrite,
        )
        self._walked = self._in_main(partial(self._open, restart=self._restart, need_bytes=need_bytes))
        self._writer = self._walked

    def open_sweep(self, need_bytes: int) -> None:
        """Begins the second stage: the sweep writes every block again. The walk's blocks are kept until the end."""
        if self._open is not None:
            self._writer = self._in_main(partial(self._open, need_bytes=need_bytes, follows=self._walked))

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def _in_main(self, make: Callable[[], CheckpointWriter]) -> CheckpointWriter | None:
        """Makes a writer in the first process; None in the others. If it fails there, it fails in all processes."""
        made: list[CheckpointWriter] = []
        parallel.from_main(lambda: made.append(self._held.enter_context(make())))
        return made[0] if made else None

    # ------------------------------------------------------------------ blocks

    @property
    def shards(self) -> list[Path]:
        """The shards of the blocks that the walk wrote, readable by every process; empty for a model in memory."""
        if self.out is None:
            return []
        return [partial_of(self.out) / name for name in shard_names(self.blocks + 1)[: self.blocks]]

    def block(self, index: int) -> CheckpointReader | None:
        """The finished block ``index`` as the walk wrote it; None for a model in memory."""
        return CheckpointReader(self.shards[index].parent, [self.shards[index]]) if self.out is not None else None

    def finished(self, progress: ProgressCallback) -> list[BlockRecord]:
        """The records of the first blocks that an earlier process finished; the shard of each is verified."""

        def verified() -> list[dict[str, Any]]:
            records: list[dict[str, Any]] = []
            for index in range(self.blocks if self._walked is not None else 0):
                assert self._walked is not None
                facts = self._walked.finished(index)
                if facts is None:
                    break
                records.append(facts)
                progress(Progress("verify", len(records), self.blocks, "checking the blocks of an earlier run"))
            if records:
                said = f"resuming an unfinished run: {len(records)} of {self.blocks} blocks are done"
                progress(Progress(NOTE, 1, 1, said))
            return records

        return [BlockRecord.from_dict(facts) for facts in parallel.from_main(verified)]

    @property
    def writes(self) -> bool:
        """Whether this process writes the blocks."""
        return self._walked is not None

    def write_block(self, index: int, tensors: Mapping[str, TensorSource], record: BlockRecord) -> None:
        """Writes a block that the walk has finished, then its record."""
        assert self._walked is not None
        self._walked.write_shard(index, tensors, record.to_dict())

    def write_outer(self, tensors: Callable[[], Mapping[str, TensorSource]]) -> None:
        """Writes embedding, final norm and head, unless an earlier process wrote them."""
        if self._writer is not None and self._writer.finished(self.blocks) is None:
            self._writer.write_shard(self.blocks, tensors())

    def write_swept(self, index: int, tensors: Mapping[str, TensorSource]) -> None:
        """Writes a block after the sweep."""
        if self._writer is not None:
            self._writer.write_shard(index, tensors)

    # ------------------------------------------------------------------ before the walk

    def allocation(self) -> Allocation | None:
        """The allocation that an earlier process chose, or None. Call it in the first process only."""
        kept = self._walked.state.kept(ALLOCATION) if self._walked is not None else None
        return Allocation(**kept) if kept is not None else None

    def keep_allocation(self, allocation: Allocation) -> None:
        if self._walked is not None:
            self._walked.state.keep(ALLOCATION, {"zeros": allocation.zeros, "report": allocation.report})

    def output_costs(self) -> dict[str, Tensor] | None:
        """``E[g_i²]`` of every linear's outputs from an earlier process, or None. Call it in the first process only."""
        return self._walked.state.kept_tensors(OUTPUT_COSTS) if self._walked is not None else None

    def keep_output_costs(self, costs: dict[str, Tensor]) -> None:
        if self._walked is not None:
            self._walked.state.keep_tensors(OUTPUT_COSTS, costs)

    # ------------------------------------------------------------------ the sweep

    def saved_passes(self, state_bytes: int, beside: int, progress: ProgressCallback) -> SavedSweep | None:
        """The storage for the passes of a sweep; None if the disk has no room for them, or nothing is written.

        Args:
            state_bytes: the most disk space that they take.
            beside: all disk space that the run takes for other files; the part that is written already is subtracted.
            progress: called with a note if there is no room.
        """
        if self.out is None:
            return None
        partial = partial_of(self.out)
        saved = SavedSweep(partial / FOLDER, self.blocks, self._walked.state if self._walked is not None else None)

        def has_room() -> bool:
            there = sum(shard.stat().st_size for shard in partial.glob("*.safetensors"))
            free = shutil.disk_usage(partial).free - beside + there
            if saved.begun or free >= state_bytes:
                return True
            needs, left = f"{state_bytes / 1e9:.1f} GB", f"{max(free, 0) / 1e9:.1f} GB"
            said = f"saving each pass of the sweep takes {needs} of disk and {left} are left"
            progress(Progress(NOTE, 1, 1, f"{said}: an interrupted sweep will start again"))
            return False

        return saved if parallel.from_main(has_room) else None

    # ------------------------------------------------------------------ the end

    @property
    def written(self) -> list[Path]:
        """The shards of the result's blocks, in the first process; empty in others and for a model in memory."""
        return [self._writer.path(index) for index in range(self.blocks)] if self._writer is not None else []

    @property
    def writer(self) -> CheckpointWriter | None:
        """The writer of the result, in the first process; None in others."""
        return self._writer


class SavedSweep:
    """The saved passes of one run. Every process reads them, the first writes.

    The parameters after each pass, and Adam's moments, are one file per block. One record, written last, has the number
    of the current pass and the checksums of its files. Files of earlier passes are then removed.

    Args:
        folder: of the records of the run.
        blocks: the number of blocks of the model.
        run: the records themselves, in the first process; None in others.
    """

    def __init__(self, folder: Path, blocks: int, run: RunState | None) -> None:
        self.folder = folder / SWEEP
        self.blocks = blocks
        self.seconds: Callable[[], float] = lambda: 0.0  # of the sweep so far
        self._run = run
        self._digests: dict[str, str] = {}

    @property
    def begun(self) -> bool:
        """Whether a pass has been saved. Call it in the first process only."""
        return self._run is not None and self._run.kept(SWEEP) is not None

    @property
    def reached(self) -> Reached | None:
        """The last saved pass whose files are intact; None if there is none and the sweep must begin."""
        return self._found[0] if self._found is not None else None

    @property
    def spent(self) -> tuple[float, int]:
        """Seconds that earlier processes spent on the sweep, and their peak memory in bytes."""
        return self._found[1:] if self._found is not None else (0.0, 0)

    @cached_property
    def _found(self) -> tuple[Reached, float, int] | None:
        return parallel.from_main(self._verified)

    def parameters(self, number: int, block: int) -> Tensor:
        return self._read(_file("parameters", number, block))

    def moments(self, number: int, block: int) -> Tensor:
        return self._read(_file("moments", number, block))

    def save(self, history: list[Pass], best: int, state: Parameters, *, last: bool) -> None:
        """Writes the state after the newest pass of ``history``, then removes the previous one.

        Raises:
            StorageError: the disk is full.
        """
        number, seconds = history[-1].passes, self.seconds()

        def write() -> None:
            assert self._run is not None, "the first process writes"
            with explained(self.folder):
                self.folder.mkdir(exist_ok=True)
            for block in range(self.blocks):
                if best == number or not last:
                    self._write(_file("parameters", number, block), state.parameters(block))
                if not last:
                    self._write(_file("moments", number, block), state.moments(block))
            needed = set(self._files(number, best, last))
            self._digests = {name: digest for name, digest in self._digests.items() if name in needed}
            record = {"history": [asdict(each) for each in history], "best": best, "files": self._digests}
            peak = max(heap.peak_rss(), self.spent[1])
            self._run.keep(SWEEP, {**record, "seconds": seconds, "peak_rss": peak})
            with explained(self.folder):
                for file in self.folder.iterdir():
                    if file.name not in needed:
                        file.unlink()

        parallel.from_main(write)

    def _files(self, number: int, best: int, last: bool) -> Iterable[str]:
        for block in range(self.blocks):
            if best:
                yield _file("parameters", best, block)
            if not last:
                yield _file("parameters", number, block)
                yield _file("moments", number, block)

    def _write(self, name: str, value: Tensor) -> None:
        # As integers: the writer of floating-point tensors drops the sign of zeros, and the bits must stay the same.
        tensors = {_KEY: TensorSource.of(value.contiguous().view(torch.int32))}
        self._digests[name] = replace_atomically(self.folder / name, lambda file: write_shard(file, tensors))

    def _read(self, name: str) -> Tensor:
        return CheckpointReader(self.folder, [self.folder / name]).get(_KEY).view(torch.float32)

    def _verified(self) -> tuple[Reached, float, int] | None:
        record = self._run.kept(SWEEP) if self._run is not None else None
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
        history = [Pass(**each) for each in record["history"]]
        return Reached(history, record["best"]), record["seconds"], record["peak_rss"]


def conditions() -> dict[str, str]:
    """The versions, processes and threads, which may differ when a run is resumed and affect the last bits."""
    return {**versions(), "processes": str(parallel.size()), "threads": str(torch.get_num_threads())}


def other_conditions(records: list[BlockRecord]) -> list[str]:
    """A warning if the first blocks were pruned under other :func:`conditions`: the last bits may then differ."""
    here = conditions()
    for index, record in reversed(list(enumerate(records))):
        other = {name: version for name, version in record.versions.items() if here.get(name) != version}
        if other:
            then, now = (", ".join(f"{name} {known.get(name)}" for name in other) for known in (other, here))
            return [f"blocks up to {index + 1} were pruned with {then}, those after them with {now}"]
    return []


def _file(what: str, number: int, block: int) -> str:
    return f"{what}-{number:03d}-{block:05d}.safetensors"
