"""Reads what a run and its measurements left in a checkpoint directory: ``pruning.json`` and ``results.json``.

Both files may come from another release or from somebody else: every field is checked by type, and all but the few that
a report cannot do without may be absent.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from sparsellm.errors import StorageError, shown
from sparsellm.inputs.json_input import read_object
from sparsellm.storage.results import RESULTS, ContinuationRecord, SpeedRecord

PRUNING = "pruning.json"

_Count = Annotated[int, Field(ge=0, lt=2**63)]
_Size = Annotated[int, Field(gt=0, lt=2**31)]


class Step(BaseModel):
    """One iteration of the decomposition of a feed-forward unit."""

    iteration: int
    held_out_error: float | None = None
    train_error: float | None = None
    objective: float | None = None
    chosen: bool = False


class PrunedLinear(BaseModel):
    """One pruned linear."""

    name: str
    shape: tuple[_Size, _Size]
    zeros: _Count
    error: float = math.nan
    asked: float = math.nan
    history: list[Step] = []
    notes: list[str] = []

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def block(self) -> int:
        """The number of its block: the first number in its name; 0 if there is none."""
        number = re.search(r"(?<=\.)\d+(?=\.)", self.name)
        return int(number.group()) if number is not None and len(number.group()) < 10 else 0

    @property
    def kind(self) -> str:
        """Its name inside the block, with ``*`` for further numbers: ``mlp.experts.*.w1``."""
        inner = re.split(r"\.\d+\.", self.name, maxsplit=1)[-1]
        return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", inner)


class SweepPass(BaseModel):
    """The divergence from the dense model after a number of passes of the sweep."""

    passes: int
    held_out: float
    train: float | None = None


class Memory(BaseModel):
    """The memory prediction."""

    budget_bytes: _Count = 0
    predicted_peak_rss_bytes: _Count = 0
    steps_bytes: dict[str, _Count] = {}


class Base(BaseModel):
    """The dense model."""

    name: str = ""
    digest: str | None = None
    bytes: _Count | None = None


class Matrices(BaseModel):
    """Zeros and weights over every matrix of the blocks."""

    zeros: _Count = 0
    weights: _Count = 0


class EarlierStage(BaseModel):
    """A stage before the last, at a lower sparsity."""

    sparsity_pruned: float
    sweeps: list[SweepPass] = []


class Pruning(BaseModel):
    """The content of ``pruning.json`` that a report shows."""

    linears: list[PrunedLinear] = Field(min_length=1)
    sparsity_asked: float
    sparsity_reached: float
    sparsity_pruned: float
    recipe: dict[str, Any] = {}
    matrices: Matrices = Matrices()
    seconds: dict[str, float] = {}
    predicted_seconds: dict[str, float] = {}
    peak_rss_bytes: _Count = 0
    peaks_bytes: dict[str, _Count] = {}
    memory: Memory | None = None
    calibration_tokens: _Count = 0
    processes: _Count = 1
    base: Base = Base()
    versions: dict[str, str] = {}
    environment: dict[str, str] = {}
    command: str = ""
    warnings: list[str] = []
    allocation: dict[str, Any] = {}
    sweeps: list[SweepPass] = []
    stages: list[EarlierStage] = []
    magnitudes: dict[str, dict[str, list[_Count]]] = {}


class Measured(BaseModel):
    """A perplexity with its interval."""

    value: float
    low: float | None = None
    high: float | None = None


class Against(BaseModel):
    """The comparison with a dense model."""

    model: str = ""
    perplexity: Measured | None = None
    kl: float | None = None
    kl_low: float | None = None
    kl_high: float | None = None
    agreement: float | None = None  # a fraction
    recovery: float | None = None  # a fraction: the dense perplexity divided by the pruned one's


class Protocol(BaseModel):
    """How a text was measured; only results of one protocol compare."""

    text: str = "?"
    digest: str = ""
    window: int = 0
    windows: int = 0
    tokens: int = 0
    bos: bool | str = ""
    dtype: str = ""

    def __str__(self) -> str:
        return f"{os.path.basename(self.text) or self.text}, window {self.window}, {self.tokens:,} tokens"

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for protocols whose results compare; the dtype may differ."""
        return (self.digest or self.text, self.window, self.windows, self.tokens, self.bos)


class TaskMetric(BaseModel):
    """One metric of a task."""

    value: float
    stderr: float | None = None


class Evaluation(BaseModel):
    """One evaluation of a checkpoint."""

    protocol: Protocol | None = None
    perplexity: Measured | None = None
    against: Against | None = None
    tasks: dict[str, dict[str, TaskMetric]] = {}
    date: str = ""


class Benchmark(BaseModel):
    """What ``sparsellm bench`` prints."""

    speeds: list[SpeedRecord] = []
    dense_bytes: _Count = 0
    packed_bytes: _Count = 0
    kernel: str = ""
    dtype: str = ""
    dense_dtype: str = ""


class Results(BaseModel):
    """The content of ``results.json``: measurements of a checkpoint."""

    format: int = 1
    evaluations: list[Evaluation] = []
    benchmarks: list[Benchmark] = []
    continuations: list[ContinuationRecord] = []


@dataclass(frozen=True)
class PruningRecord:
    """What is known of the run that wrote a checkpoint.

    Attributes:
        directory: of the checkpoint.
        name: of the directory in commands; as the user named it.
        pruning: of the run.
        results: measurements since; empty if there are none.
        file_bytes: size of the weight files.
    """

    directory: Path
    name: str
    pruning: Pruning
    results: Results
    file_bytes: int

    @property
    def model(self) -> str:
        """The name of the dense model for headings: the last part of its path."""
        name = self.pruning.base.name.rstrip("/")
        return os.path.basename(name) or "a model"

    @property
    def blocks(self) -> int:
        """The number of blocks, by the largest number of one."""
        return 1 + max(linear.block for linear in self.pruning.linears)

    def latest(self) -> dict[tuple[object, ...], Evaluation]:
        """The latest evaluation of each protocol."""
        return {each.protocol.key: each for each in self.results.evaluations if each.protocol is not None}

    def tasks(self) -> dict[tuple[str, str], TaskMetric]:
        """The latest value of each task and metric."""
        found: dict[tuple[str, str], TaskMetric] = {}
        for evaluation in self.results.evaluations:
            for task, metrics in evaluation.tasks.items():
                found.update({(task, name): metric for name, metric in metrics.items()})
        return found

    def decode_speeds(self) -> tuple[SpeedRecord, SpeedRecord] | None:
        """The speeds of the dense and the packed model while decoding, of the latest benchmark; the smallest batch."""
        for benchmark in reversed(self.results.benchmarks):
            decoding = [each for each in benchmark.speeds if each["phase"] == "decode"]
            speeds = sorted(decoding, key=lambda each: each["batch"])
            for packed in (each for each in speeds if each["model"] == "packed"):
                for dense in (each for each in speeds if each["model"] == "dense"):
                    if (dense["batch"], dense["threads"]) == (packed["batch"], packed["threads"]):
                        return dense, packed
        return None


def read_record(directory: str | os.PathLike[str], name: str | os.PathLike[str] | None = None) -> PruningRecord:
    """The record of a pruned checkpoint.

    Args:
        directory: of the checkpoint.
        name: of the directory in commands, if it will have another one.

    Raises:
        StorageError: the directory is none, was not written by ``prune``, or a file in it cannot be read.
    """
    text = os.fspath(directory)
    place = Path(text).expanduser()
    try:
        pruned = (place / PRUNING).is_file()
        sizes = [file.stat().st_size for file in place.glob("*.safetensors")] if pruned else []
    except (OSError, ValueError) as error:  # a name that is too long, or has a NUL character
        raise StorageError(f"{shown(text)} cannot be looked up ({error}); give a directory that prune wrote") from None
    if not pruned:
        raise StorageError(
            f"{shown(text)} has no {PRUNING}; give a directory that `sparsellm prune` wrote, or its packed form"
        )
    pruning = _checked(Pruning, place / PRUNING)
    results = _checked(Results, place / RESULTS) if (place / RESULTS).exists() else Results()
    if results.format != 1:
        raise StorageError(f"{place / RESULTS} has format {results.format}, not 1; update sparsellm")
    return PruningRecord(place, os.fspath(directory if name is None else name), pruning, results, sum(sizes))


def _checked(model: type[Any], path: Path) -> Any:
    """A JSON file as a model.

    Raises:
        StorageError: a field is missing or of another type; the message names it.
    """
    try:
        return model.model_validate(read_object(path))
    except ValidationError as error:
        mistake = error.errors(include_url=False)[0]
        where = ".".join(map(str, mistake["loc"]))
        raise StorageError(
            f"{path}: {shown(where)} is {shown(mistake['input'])} ({mistake['msg']}); put the file back as it was"
        ) from None
