"""``results.json`` beside a checkpoint: what was measured of it, one entry for each evaluation and each benchmark.

Only directories that sparsellm wrote have one. ``prune`` and ``pack`` write a new checkpoint without it, since results
hold for the weights that were measured.
"""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any, Literal, NotRequired

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from sparsellm.errors import StorageError, shown
from sparsellm.inputs.json_input import read_object
from sparsellm.storage.files import locked, replace_atomically, write_all

RESULTS = "results.json"
_OURS = ("pruning.json", "packed.json")  # a directory with one of these was written by sparsellm


class IntervalRecord(TypedDict):
    """A value and its 95 % confidence interval; the ends are null if there was one window only."""

    value: float
    low: float | None
    high: float | None


class ProtocolRecord(TypedDict):
    """The conditions of a perplexity; values of different protocols do not compare.

    ``text`` is the name of the source, ``digest`` that of the token ids, ``tokens`` the number scored, ``bos`` ``yes``
    or ``no`` (whether every window begins with BOS) or ``given`` for token ids that the user passed, ``dtype`` that of
    the computation.
    """

    text: str
    digest: str
    window: int
    windows: int
    tokens: int
    bos: str
    dtype: str


class AgainstRecord(TypedDict):
    """A comparison with a dense model, whose name and perplexity on the same windows are included.

    ``kl`` is ``KL(dense ‖ model)`` in nats a token. ``agreement`` and ``recovery`` are fractions, not percent: of the
    tokens for which both models have the same first choice, and the dense perplexity divided by the model's.
    """

    model: str
    perplexity: IntervalRecord
    kl: float
    kl_low: float | None
    kl_high: float | None
    agreement: float
    recovery: float


class MetricRecord(TypedDict):
    """A metric of an lm-eval task; ``stderr`` is null where lm-eval gives none."""

    value: float
    stderr: float | None


class Stamp(TypedDict):
    """The version of sparsellm, the processor with its threads, and the time (ISO 8601, UTC) of a measurement."""

    sparsellm: str
    machine: str
    date: str


class EvaluationRecord(Stamp):
    """One call of ``sparsellm eval``."""

    protocol: ProtocolRecord
    perplexity: IntervalRecord
    against: NotRequired[AgainstRecord]
    tasks: NotRequired[dict[str, dict[str, MetricRecord]]]


class SpeedRecord(TypedDict):
    """Tokens per second of the ``dense`` or ``packed`` model in one setting."""

    model: str
    phase: str
    batch: int
    threads: int
    median: float
    slowest: float
    fastest: float


class BenchmarkRecord(Stamp):
    """One call of ``sparsellm bench``: the fields of its ``--json``, documented at ``sparsepack.bench.Comparison``."""

    speeds: list[SpeedRecord]
    dense_bytes: int
    packed_bytes: int
    dense_linear_bytes: int
    packed_linear_bytes: int
    dense_disk_bytes: int | None
    packed_disk_bytes: int | None
    dtype: str
    dense_dtype: str
    kernel: str
    verdict: list[str]


class ContinuationRecord(TypedDict):
    """One prompt, continued by the dense and by the pruned model."""

    prompt: str
    dense: str
    pruned: str


Record = EvaluationRecord | BenchmarkRecord | ContinuationRecord


@with_config(ConfigDict(strict=True, allow_inf_nan=False, extra="allow"))  # fields of a later release are kept
class Results(TypedDict):
    """The contents of ``results.json``."""

    format: Literal[1]
    evaluations: list[EvaluationRecord]
    benchmarks: list[BenchmarkRecord]
    continuations: NotRequired[list[ContinuationRecord]]


_RESULTS = TypeAdapter(Results)


def keeps_results(directory: str | os.PathLike[str]) -> bool:
    """Whether results are kept in a directory: sparsellm wrote it, as its pruning.json or packed.json shows."""
    return any((Path(directory) / name).is_file() for name in _OURS)


def read_results(directory: Path) -> Results:
    """The results of a checkpoint; empty lists if nothing was measured yet.

    Raises:
        StorageError: results.json cannot be read, or is not of this format.
    """
    path = directory / RESULTS
    if not os.path.lexists(path):
        return {"format": 1, "evaluations": [], "benchmarks": []}
    if not path.is_file():
        raise StorageError(f"{path} is no ordinary file; move it elsewhere, or give --no-save")
    try:
        return _RESULTS.validate_python(read_object(path))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise StorageError(
            f"{path}: {place} is {shown(first['input'])}, not as `sparsellm eval` and `bench` write it; move the file "
            "elsewhere, or give --no-save"
        ) from None


def check_results(directory: Path) -> None:
    """Checks before a measurement that :func:`append_result` will be able to write.

    Raises:
        StorageError: the directory cannot be written, or its results.json cannot be read.
    """
    read_results(directory)
    if not os.access(directory, os.W_OK | os.X_OK):
        raise StorageError(f"{directory} cannot be written, and results are kept in it; give --no-save")


def append_result(directory: Path, kind: Literal["evaluations", "benchmarks", "continuations"], record: Record) -> Path:
    """Appends one record to results.json and returns the path; the file is replaced atomically.

    The directory is locked from reading to writing, so that no record is lost if two processes append at once.

    Raises:
        StorageError: the file cannot be read or written.
    """
    path = directory / RESULTS
    with locked(Path(os.path.realpath(directory)), wait=True):
        results: dict[str, Any] = {**read_results(directory)}
        results[kind] = [*results.get(kind, []), record]
        text = json.dumps(_RESULTS.validate_python(results), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        replace_atomically(path, partial(write_all, data=text.encode()))
    return path
