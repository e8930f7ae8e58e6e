"""The one schema of ``pruning.json`` (what a run did) and ``results.json`` (what was measured since).

A file may come from another release or from somebody else, so every field is checked by type.
"""

from __future__ import annotations

import html
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    PlainSerializer,
    ValidationError,
    computed_field,
)

from sparsellm.errors import StorageError, refusal, shown
from sparsellm.inputs import read_object
from sparsellm.patterns import parse_pattern
from sparsepack.bench import Comparison, Pair, Ratio, Speed
from sparsepack.checkpoint import is_packed
from sparsepack.grids import GRIDS
from sparsepack.layout import predicted_bytes

PRUNING = "pruning.json"
RESULTS = "results.json"
PUT_BACK = "put the file back as it was"
KEEP = "keep"  # in place of a type: values are not rounded
OWN = "own"  # in place of a grid: that of the packed format, or none
MIXED = "mixed"  # in place of one type or grid: linears differ

Count = Annotated[int, Field(ge=0, lt=2**63)]
Dimension = Annotated[int, Field(gt=0, lt=2**31)]
Seconds = Annotated[float, PlainSerializer(lambda value: round(value, 3))]
Settings = dict[str, JsonValue]


class Record(BaseModel):
    """A model without conversions between types; NaN and infinities are written as ``NaN`` and ``Infinity``."""

    model_config = ConfigDict(strict=True, ser_json_inf_nan="constants")


R = TypeVar("R", bound=BaseModel)


def read_record(kind: type[R], path: Path, advice: str = PUT_BACK) -> R:
    """A JSON file as a record; raises StorageError, with ``advice``, if it cannot be read or a field is wrong."""
    try:
        return kind.model_validate(read_object(path))
    except ValidationError as error:
        raise StorageError(f"{path}: {refusal(error)}; {advice}") from None


class Iteration(Record):
    """One iteration of the decomposition of a unit; its error is on held-out tokens, or else on training tokens."""

    iteration: int
    held_out_error: float | None = None
    train_error: float | None = None
    objective: float | None = None
    chosen: bool = False


class Matrix(Record):
    """Zeros of a matrix. Its name is that of the linear, or of the parameter if no linear owns it; its shape is ``(out,
    in)`` for a linear, else as the parameter is stored."""

    model_config = ConfigDict(frozen=True)

    name: str
    shape: Annotated[tuple[Dimension, ...], Field(strict=False)]
    zeros: Count

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def sparsity(self) -> float:
        return self.zeros / self.weights


class LinearResult(Matrix):
    """The result of one linear. Its error is ‖X Wᵀ − X W₀ᵀ‖² / ‖X W₀ᵀ‖² on the calibration inputs X that the method
    fitted to; W₀ is the dense weight, or that of a writer after its refit. In a unit that was fitted by auxiliary
    variables, ``down`` has the error of the unit on held-out tokens before rounding, the others NaN. ``exponents`` has
    a hexadecimal digit, the exponent plus 8, for each column of integer values; it is empty if all are 0. ``values``
    is what the values are rounded to: ``keep``, a type or a grid; it is empty in records of older releases, see
    ``RunRecord.values_of``."""

    shape: Annotated[tuple[Dimension, Dimension], Field(strict=False)]
    asked: float = math.nan  # fraction of zeros
    error: float = math.nan
    # for the user, such as a damping that was raised
    notes: Annotated[tuple[str, ...], Field(strict=False)] = ()
    history: Annotated[tuple[Iteration, ...], Field(strict=False)] = ()
    # calibration tokens that were routed to it, if it belongs to an expert
    tokens: Count | None = None
    pattern: str | None = None  # such as ``2:4``; None for zeros anywhere
    exponents: Annotated[str, Field(pattern="^[0-9a-f]*$")] = ""
    values: str = ""

    @property
    def block(self) -> int:
        """The number of its block: the first number in its name; 0 if there is none."""
        number = re.search(r"(?<=\.)\d+(?=\.)", self.name)
        if number is None or len(number.group()) >= 10:
            return 0
        return int(number.group())

    @property
    def kind(self) -> str:
        """Its name as ``kind_of`` has it."""
        return kind_of(self.name)

    def packed_bytes(self, values: str, group: int | None = None) -> int:
        """Its bytes packed with values of a type; ``group`` as in ``sparsepack.layout.predicted_bytes``."""
        fixed = None if self.pattern is None else astuple(parse_pattern(self.pattern))
        return predicted_bytes(
            self.shape,
            self.zeros,
            values,
            fixed,
            exponents=bool(self.exponents),
            group=group,
        )


def bits_per_weight(linears: Iterable[LinearResult]) -> float | None:
    """Bits of a pruned weight on another program's grid, or as ``pack`` will store it, where experts do not count; None
    if values of a linear are kept."""
    stored = [
        linear for linear in linears if linear.values in GRIDS or linear.tokens is None
    ]
    weights = sum(linear.weights for linear in stored)
    if not weights or any(linear.values == KEEP for linear in stored):
        return None
    return sum(map(_stored_bits, stored)) / weights


def _stored_bits(linear: LinearResult) -> float:
    """The bits of a linear with rounded values, on another program's grid or packed."""
    grid = GRIDS.get(linear.values)
    if grid is None:
        return 8 * linear.packed_bytes(linear.values)
    return grid.bits_per_weight(linear.shape[1]) * linear.weights


def by_kind(linears: Iterable[LinearResult]) -> dict[str, list[LinearResult]]:
    """Linears by the last part of their kind, or all of it where two kinds end alike."""
    kinds: dict[str, list[LinearResult]] = {}
    for linear in linears:
        kinds.setdefault(linear.kind, []).append(linear)
    lasts = Counter(kind.rpartition(".")[2] for kind in kinds)
    return {
        last if lasts[last := kind.rpartition(".")[2]] == 1 else kind: part
        for kind, part in kinds.items()
    }


def error_of(linears: Iterable[LinearResult]) -> float:
    """The mean error of some linears, those without a finite one left out; NaN if there are none."""
    errors = [linear.error for linear in linears if math.isfinite(linear.error)]
    return sum(errors) / len(errors) if errors else math.nan


def kind_of(name: str) -> str:
    """The name of a matrix inside its block, with ``*`` for further numbers: ``mlp.experts.*.w1``."""
    inside = re.split(r"\.\d+\.", name, maxsplit=1)[-1]
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", inside)


class DenseMatrix(Matrix):
    """A matrix of a block that a run did not prune, and why; ``kind`` is its name inside the block."""

    block: Count
    reason: str
    kind: str


class Totals(Record):
    """Zeros and weights of several matrices."""

    zeros: Count = 0
    weights: Count = 0

    @classmethod
    def of(cls, matrices: Iterable[Matrix]) -> Self:
        every = list(matrices)
        return cls(
            zeros=sum(matrix.zeros for matrix in every),
            weights=sum(matrix.weights for matrix in every),
        )

    @property
    def sparsity(self) -> float:
        """The fraction of zeros; 0 without weights."""
        return self.zeros / self.weights if self.weights else 0.0


class SweepPass(Record):
    """The mean divergence KL(dense ‖ pruned) per predicted token, in nats, after a number of passes."""

    model_config = ConfigDict(frozen=True)

    passes: int
    held_out: float  # on held-out windows
    sources: dict[str, float] = {}  # the same on those of each text of a mixture
    # on the windows of the last pass, before its steps; None before the first
    train: float | None = None
    # learning rate of the sweep, with the state before the first pass
    rate: float | None = None


class Memory(Record):
    """The memory that one process held in a run, measured, in bytes."""

    budget_bytes: Count = 0
    peak_bytes: Count = 0
    # Hidden states, the sweep's copies of the weights, and outputs kept within a block: the most at any time.
    hidden_in_memory_bytes: Count = 0
    hidden_on_disk_bytes: Count = 0
    device_budget_bytes: Count = 0  # on a GPU; 0 on the CPU
    device_peak_bytes: Count = 0
    hidden_on_device_bytes: Count = 0
    sweep: str = ""  # streamed: one block is in memory at a time; resident: all, perhaps recomputing


class Prediction(Record):
    """What a run is estimated to take. A process is one of ``ranks``; files and tokens are those of all together."""

    model: str = ""
    machine: str  # the processor or GPU
    ranks: Count
    method: str
    passes: Count  # passes of the sweep
    tokens: dict[str, Count]  # by phase
    seconds: dict[str, Seconds]  # by phase
    memory_bytes: Count  # the peak of a process
    device_bytes: Count = 0  # the peak on its GPU
    hidden_bytes: Count = 0  # hidden states, and the weights of a streamed sweep
    hidden_on_disk_bytes: Count = 0  # the part of these for which memory has no room
    disk_bytes: (
        Count  # at most: the result, the walk's blocks, hidden states, and saved passes
    )
    sweep: str = ""  # how it holds the blocks, as in ``Memory``
    notes: list[str] = []  # what does not fit


class HeldOut(Record):
    """A run's result against the dense model, on windows of a text that no run calibrates on."""

    text: str  # name of the source
    window: Count  # tokens
    windows: Count
    perplexity: float
    dense_perplexity: float
    kl: float  # KL(dense ‖ pruned) in nats, the mean over the scored tokens
    agreement: float  # fraction of tokens for which both have the same first choice

    def __str__(self) -> str:
        return f"{self.text}, {self.windows} windows of {self.window}"


class ExpertsOfBlock(Record):
    """The experts of a mixture, with its output's relative error before and after the refit of those that stay."""

    block: Count
    kept: list[Count]  # their numbers in the dense model
    # calibration tokens that were routed to each expert of the dense model
    tokens: list[Count]
    scores: list[float]
    error: float
    refitted: float


class Base(Record):
    """The dense model: its name, the digest of config and weights, the bytes of the weights, and, where they are known,
    its hub id as ``model`` and the license that its card states."""

    name: str = ""
    digest: str | None = None
    bytes: Count | None = None
    model: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None


class RunRecord(Record):
    """What is known of a run. With its recipe it is ``pruning.json``, which travels: names and digests, no paths."""

    format: Literal[1] = 1
    base: Base = Base()
    sparsity_asked: float  # the recipe's, which holds for the pruned linears
    # to which values were rounded: keep or an integer type; mixed if linears differ
    values: str = KEEP
    # to which values were rounded; own for that of the packed format, or for none; mixed if linears differ
    grid: str = OWN
    seed: int = 0
    # as ``pack`` (experts aside) or the grid stores pruned linears; None if kept
    bits_per_weight: float | None = None
    linears: list[LinearResult]
    dense: list[DenseMatrix] = []  # matrices of the blocks
    # by phase, on the wall clock; ``prune/solve`` is a part of ``prune``
    seconds: dict[str, Seconds] = {}
    # the peak of one process, in this run or an earlier start of it
    peak_rss_bytes: Count = 0
    memory: Memory | None = None
    calibration_tokens: Count = 0
    # whether every window begins with BOS: yes, no, or given for token ids
    calibration_bos: str = "given"
    processes: Count = 1
    versions: dict[str, str] = {}
    environment: dict[str, str] = {}
    command: str = ""
    warnings: list[str] = []
    # the types of embedding and head by tensor; empty if they stay as they are
    heads: dict[str, str] = {}
    allocation: Settings = {}  # its ``name`` and report; empty for uniform sparsities
    sweeps: list[SweepPass] = []
    # None without a tokenizer, or where a warning says why
    held_out: HeldOut | None = None
    # a record for each mixture, if experts were removed
    experts: list[ExpertsOfBlock] = []
    identity: Settings = {}  # everything that the bits of the result depend on
    # how a complete run that removed experts is known again, without the smaller model; empty if it removed none
    removal: Settings = {}

    @computed_field  # type: ignore[prop-decorator]
    @property
    def zeros(self) -> int:
        """Zeros in all pruned linears."""
        return Totals.of(self.linears).zeros

    @computed_field  # type: ignore[prop-decorator]
    @property
    def weights(self) -> int:
        """Weights in all pruned linears."""
        return Totals.of(self.linears).weights

    @computed_field  # type: ignore[prop-decorator]
    @property
    def sparsity_pruned(self) -> float:
        """Fraction of zeros over the pruned linears alone; the recipe's ``sparsity`` sets this one."""
        return Totals.of(self.linears).sparsity

    @computed_field  # type: ignore[prop-decorator]
    @property
    def matrices(self) -> Totals:
        """Zeros and weights over every matrix of the blocks, pruned or not."""
        return Totals.of([*self.linears, *self.dense])

    @computed_field  # type: ignore[prop-decorator]
    @property
    def sparsity_reached(self) -> float:
        """Fraction of zeros over every matrix of the blocks."""
        return self.matrices.sparsity

    def values_of(self, linear: LinearResult) -> str:
        """What the values of a linear of this run are rounded to: ``keep``, a type, or the name of a grid."""
        if linear.values:
            return linear.values
        return self.values if self.grid == OWN else self.grid

    @property
    def mixed(self) -> bool:
        """Whether linears differ in the type or the grid to which their values were rounded."""
        return MIXED in (self.values, self.grid)

    @property
    def sparse(self) -> bool:
        """Whether its zeros were asked for, or save bytes. On the grid of another program they do not, and rounding
        makes some."""
        return self.zeros > 0 and (self.sparsity_asked > 0 or self.grid == OWN)

    @property
    def in_short(self) -> str:
        """Zeros, pattern, values and bits in a few words, for titles: ``50% zeros, int8, 4.9 bits a weight``."""
        parts = []
        if self.sparse:
            parts.append(f"{100 * self.sparsity_reached:.4g}% zeros")
        patterns = {linear.pattern for linear in self.linears}
        parts += [pattern for pattern in patterns if pattern and len(patterns) == 1]
        if self.mixed:
            types = {self.values_of(linear) for linear in self.linears}
            parts.append(f"{len(types)} types of values")
        elif self.values != KEEP:
            grid = f" ({self.grid})" if self.grid != OWN else ""
            parts.append(f"{self.values}{grid}")
        if self.bits_per_weight is not None:
            parts.append(f"{self.bits_per_weight:.2g} bits a weight")
        return ", ".join(parts) or "no zeros"

    @property
    def best_pass(self) -> SweepPass | None:
        """The pass of the sweep whose weights the result has: that with the least divergence; None without a sweep."""
        return min(self.sweeps, key=lambda entry: entry.held_out, default=None)

    @property
    def idle_sweep(self) -> str:
        """A sentence if the sweep gained nothing; else empty."""
        best = self.best_pass
        if best is None or best.passes or len(self.sweeps) < 2:
            return ""
        after = min(entry.held_out for entry in self.sweeps[1:])
        return (
            f"the sweep gained nothing: the divergence on held-out windows was {best.held_out:.3g} nats a token before "
            f"it and {after:.3g} after it, so the weights before it are kept"
        )

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.in_short} in {len(self.linears)} linears of {self.base.name!r:.80}>"

    __str__ = __repr__

    @property
    def allocated_by(self) -> str | None:
        """The name of the allocation; None if all linears have the same sparsity."""
        return str(self.allocation["name"]) if "name" in self.allocation else None

    @property
    def blocks(self) -> list[int]:
        """The numbers of the blocks with pruned linears."""
        return sorted({linear.block for linear in self.linears})

    @property
    def whole_seconds(self) -> dict[str, float]:
        """The seconds of the phases that are not a part of another one."""
        return {name: took for name, took in self.seconds.items() if "/" not in name}


class Pruning(RunRecord):
    """The contents of ``pruning.json``, whose recipe may be that of another release."""

    recipe: Settings = {}

    @property
    def method(self) -> str:
        return str(self.recipe.get("method", "unknown method"))

    @property
    def target(self) -> str:
        """The pattern that was asked for, or the sparsity in percent."""
        return str(self.recipe.get("pattern") or f"{100 * self.sparsity_asked:.4g}%")

    @property
    def packs(self) -> bool:
        """Whether its values have a packed form: those of another program's grid in int8 have none."""
        grids = [GRIDS.get(self.values_of(linear)) for linear in self.linears]
        return all(grid is None or grid.values != "int8" for grid in grids)


def read_pruning(directory: Path) -> Pruning:
    """``pruning.json`` of a checkpoint, but for one that was exported; errors as in ``read_record``."""
    if not os.path.isfile(directory / PRUNING):  # also for a name that is too long
        advice = "give a directory that `sparsellm prune` wrote, or its packed form"
        raise StorageError(f"{shown(str(directory))} has no {PRUNING}; {advice}")
    config = read_object(file) if (file := directory / "config.json").is_file() else {}
    if config.get("quantization_config") and not is_packed(config):
        raise StorageError(
            f"{directory} was exported for another program; give the checkpoint that it was made from"
        )
    return read_record(Pruning, directory / PRUNING)


class Measurement(BaseModel):
    """Finite numbers only; fields of a later release are kept when it is written again."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="allow")


class Interval(Measurement):
    """A value and its 95 % confidence interval over windows of the same kind of text; no ends for a single window."""

    value: float
    low: float | None = None
    high: float | None = None

    def shown(self, digits: int = 4) -> str:
        """The value with its interval, such as ``14.37 (13.9–14.9)``."""
        value, *ends = (
            f"{number:.{digits}g}"
            for number in (self.value, self.low, self.high)
            if number is not None
        )
        return f"{value} ({'–'.join(ends)})" if ends else value


class Protocol(Measurement):
    """The conditions of a perplexity; values of different protocols do not compare."""

    text: str  # name of the source
    digest: str  # that of the token ids
    window: Count  # tokens
    windows: Count
    tokens: Count  # scored
    bos: str  # whether every window begins with BOS: yes, no, or given for token ids
    dtype: str

    def __str__(self) -> str:
        return f"{os.path.basename(self.text) or self.text}, window {self.window}, {self.tokens:,} tokens"

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for protocols whose results compare; the dtype may differ."""
        return (
            self.digest or self.text,
            self.window,
            self.windows,
            self.tokens,
            self.bos,
        )


class Against(Measurement):
    """A comparison with a dense model, or with another one, on the same windows."""

    model: str  # the reference
    perplexity: Interval  # the reference's
    kl: float  # KL(reference ‖ model) in nats, the mean over the scored tokens
    kl_low: float | None = None
    kl_high: float | None = None
    agreement: float  # fraction of the scored tokens for which both models have the same first choice
    # dense perplexity / the model's; None if the reference is pruned too
    recovery: float | None = None

    @property
    def divergence(self) -> Interval:
        """``kl`` with its interval."""
        return Interval(value=self.kl, low=self.kl_low, high=self.kl_high)


class Metric(Measurement):
    """A metric of an lm-eval task; ``stderr`` is None where lm-eval gives none."""

    value: float
    stderr: float | None = None

    def shown(self) -> str:
        """The value with its standard error, such as ``0.61 ± 0.01``."""
        if self.stderr is None:
            return f"{self.value:.4g}"
        return f"{self.value:.4g} ± {self.stderr:.2g}"


class Stamp(Measurement):
    """The version of sparsellm, the processor with its threads, and the time (ISO 8601, UTC) of a measurement."""

    sparsellm: str
    machine: str
    date: str


Tasks = dict[str, dict[str, Metric]]  # by task and name of the metric
QUANTITIES = (
    "perplexity",
    "KL(dense ‖ pruned), nats a token",
    "same likeliest token",
    "recovery",
)


class Evaluation(Stamp):
    """The result of ``sparsellm.evaluate``: a perplexity, its conditions, and what was measured with it."""

    protocol: Protocol
    perplexity: Interval
    against: Against | None = None
    tasks: Tasks | None = None

    @property
    def dense(self) -> Against | None:
        """The comparison, if it is one with a dense model."""
        if self.against is None or self.against.recovery is None:
            return None
        return self.against

    def rows(self) -> list[tuple[str, str | None, str]]:
        """Each quantity but the tasks as text: its name, the dense model's value if it is known, and the value."""
        dense = self.dense
        if dense is None:
            return [(QUANTITIES[0], None, self.perplexity.shown())]
        return [
            (QUANTITIES[0], dense.perplexity.shown(), self.perplexity.shown()),
            (QUANTITIES[1], "0", dense.divergence.shown(3)),
            (QUANTITIES[2], "100%", f"{dense.agreement:.1%}"),
            (QUANTITIES[3], "100%", f"{dense.recovery:.1%}"),
        ]

    def _repr_html_(self) -> str:
        """A small table for notebooks."""
        rows = [(name, dense or "", value) for name, dense, value in self.rows()]
        for task, metrics in (self.tasks or {}).items():
            rows += [
                (f"{task}: {name}", "", metric.shown())
                for name, metric in metrics.items()
            ]
        cells = [
            "".join(f"<td>{html.escape(text)}</td>" for text in row) for row in rows
        ]
        head = "<tr><th></th><th>dense</th><th>this model</th></tr>"
        body = "".join(f"<tr>{row}</tr>" for row in cells)
        return f"<table><caption>{html.escape(str(self.protocol))}</caption>{head}{body}</table>"

    @property
    def value(self) -> float:
        return self.perplexity.value

    @property
    def tokens(self) -> int:
        """The number of tokens scored."""
        return self.protocol.tokens


class MeasuredSpeed(Measurement, Speed):
    """The speed of one model in one setting, as a file has it."""

    median: Annotated[float, Field(gt=0)]


class MeasuredRatio(Measurement, Ratio):
    """The ratio of two speeds, as a file has it."""


class Benchmark(Stamp, Comparison):
    """One call of ``sparsellm bench``."""

    speeds: Sequence[MeasuredSpeed]
    ratios: Sequence[MeasuredRatio] = []

    @property
    def decoding(self) -> Pair | None:
        """The speeds of the packed and of the dense model while decoding the smallest batch."""
        pairs = [pair for pair in self.pairs() if pair.packed.phase == "decode"]
        return min(pairs, key=lambda pair: pair.packed.batch, default=None)


class Continuation(Measurement):
    """One prompt, continued by the dense and by the pruned model."""

    prompt: str
    dense: str
    pruned: str


class Export(Stamp):
    """A file, or a directory, that ``sparsellm export`` wrote for other programs."""

    to: str  # the format: gguf or compressed-tensors
    grid: str
    name: str  # the file's or directory's, without the place
    bytes: Count  # size of the file, or of the weight files in the directory
    runs_in: str  # the programs that read it

    def __str__(self) -> str:
        return f"{self.to}, {self.grid}; runs in {self.runs_in}"


class Results(Measurement):
    """The contents of ``results.json``."""

    format: Literal[1] = 1
    evaluations: list[Evaluation] = Field(default_factory=list)
    benchmarks: list[Benchmark] = Field(default_factory=list)
    continuations: list[Continuation] = Field(default_factory=list)
    # the latest into each file or directory
    exports: list[Export] = Field(default_factory=list)

    def latest(self) -> dict[tuple[object, ...], Evaluation]:
        """The latest evaluation of each protocol, by key; one with a dense model is preferred to later ones without."""
        return {
            entry.protocol.key: entry
            for entry in sorted(self.evaluations, key=lambda entry: bool(entry.dense))
        }

    def shown(self) -> list[Evaluation]:
        """What a card has, in order: the latest evaluation of each protocol, and the latest with tasks."""
        latest = [*self.latest().values()]
        with_tasks = (entry for entry in self.evaluations if entry.tasks)
        latest += {entry.protocol.key: entry for entry in with_tasks}.values()
        return [
            entry
            for entry in self.evaluations
            if any(entry is other for other in latest)
        ]
