"""Compresses a model to a size, for the program that runs it: chooses forms, prunes and rounds, writes what runs.

A run writes a checkpoint with the rounded weights next to ``out``; ``pack`` or ``export`` makes of it what the program
reads, with the same numbers. The checkpoint is removed at the end.
"""

from __future__ import annotations

import math
import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, JsonValue

from sparsellm import api, interrupts
from sparsellm.arguments import Checkpoint, Out, PathGiven, RecipeGiven, checked
from sparsellm.convert import head_bytes, pack
from sparsellm.errors import RecipeError, shown
from sparsellm.exports.compressed import check_compressed
from sparsellm.exports.door import MAKE_TEMPLATE, export
from sparsellm.exports.gguf_file import check_file, expected_bytes, other_bytes
from sparsellm.exports.linears import tensor_of
from sparsellm.exports.template import Template, check_converter, metadata_bytes
from sparsellm.files.contents import companions_of
from sparsellm.files.demo_model import demo_gguf
from sparsellm.files.directory import check_destination, checkpoints_among
from sparsellm.files.files import replace_atomically
from sparsellm.files.named import is_gguf
from sparsellm.files.resolve import checkpoint_directory, config_place
from sparsellm.inputs import parse_bytes
from sparsellm.method.experts.fewer import FewerExperts
from sparsellm.model import Chain, open_chain
from sparsellm.model.heads import heads_of, outer_matrices
from sparsellm.progress import ProgressCallback, ignore
from sparsellm.recipe import Recipe
from sparsellm.records import PRUNING, Evaluation, Pruning
from sparsellm.report.document import REPORT, check_page, write_export_report
from sparsellm.run.choice import sizes_of
from sparsellm.run.fewer_experts import clean_up, clean_up_removal
from sparsellm.run.form_choice import (
    bits_in,
    check_forms,
    check_size,
    most_asked,
    size_range,
    too_large,
)
from sparsellm.run.prune import choose, complete_run, prune
from sparsellm.run.request import Request
from sparsellm.run.smallest_size import Q4_K_M
from sparsellm.text.sources import settle_calibration

ProgramName = Literal["llama.cpp", "vllm", "sparsellm", "transformers"]
# programs for which the result is exported from the run's checkpoint
EXPORTED: frozenset[ProgramName] = frozenset({"llama.cpp", "vllm"})
MOST_BITS = 16.0
Bits = Annotated[float, Field(gt=0, le=MOST_BITS)]
# type of embedding and head in a file for llama.cpp, unless the .gguf file that is pruned has a smaller one
HEAD_OF_GGUF: Literal["q8_0"] = "q8_0"
# A packed directory has a report and a card next to its weights, and records of each linear.
REPORT_BYTES = 2_100_000
RECORD_BYTES = 3_000
# A directory for vLLM has no report. Its card, recipe and records take SETTINGS_BYTES. Each tensor has a line in the
# index, in the header of its shard and in the config. A linear has three tensors, and a record.
SETTINGS_BYTES = 18_000
LINES_BYTES = 135
LINEAR_BYTES = 770


@dataclass(frozen=True)
class Program:
    """A program that runs models."""

    keeps: str  # what it keeps of a model
    starts: str  # the line that starts it, with the path in place of {}


PROGRAMS: dict[ProgramName, Program] = {
    "llama.cpp": Program(
        "a .gguf file in llama.cpp's own types, chosen by linear; no zeros",
        "llama-server -m {}",
    ),
    "vllm": Program(
        "a compressed-tensors directory in 4 and 8 bits, chosen by linear; no zeros; on a CPU vLLM lacks 8 bits",
        "vllm serve {}",
    ),
    "sparsellm": Program(
        "a packed directory with zeros and 3 to 8 bits, chosen by linear; transformers with sparsepack loads it too",
        "sparsellm serve {}",
    ),
    "transformers": Program(
        "a plain checkpoint with zeros, as large as the dense one; takes a sparsity in place of a size",
        "transformers serve {}",
    ),
}


@dataclass(frozen=True)
class CompressResult:
    """What was written for a program.

    Attributes:
        path: the file or directory.
        program: the program that runs it.
        asked_bytes: the size that was asked for; None if bits or a sparsity was.
        bytes: the size of the file, or of all files of the directory.
        dense_bytes: that of the dense model's weights, if it is known.
        run: the record of the pruning run: forms by linear, settings, versions.
        evaluation: perplexity, divergence from the dense model and agreement with it, on held-out text.
        start: the line that starts the program with it.
    """

    path: Path
    program: ProgramName
    asked_bytes: int | None
    bytes: int
    dense_bytes: int | None
    run: Pruning
    evaluation: Evaluation
    start: str

    def to_dict(self) -> dict[str, object]:
        """All attributes as plain JSON values, as ``--json`` prints them."""
        return {
            **vars(self),
            "path": str(self.path),
            "run": self.run.model_dump(mode="json"),
            "evaluation": self.evaluation.model_dump(mode="json"),
        }


@checked
def compress(  # noqa: PLR0913 - the Python door
    model: Checkpoint,
    recipe: RecipeGiven = None,
    *,
    program: ProgramName,
    out: Out,
    size: str | int | None = None,
    bits: Bits | None = None,
    converter: PathGiven | None = None,
    overwrite: bool = False,
    restart: bool = False,
    progress: ProgressCallback = ignore,
) -> CompressResult:
    """Compresses a model for the program that runs it, to a size. If it is stopped, the same call goes on.

    Args:
        model: as in ``sparsellm.prune``, by name.
        recipe: calibration, effort, resources and the like; a sparsity for ``transformers`` alone.
        program: ``llama.cpp`` (``out`` is a .gguf file), ``vllm``, ``sparsellm`` or ``transformers`` (a directory).
        out: what is written; an unfinished run keeps its blocks next to it, in ``<out>-pruned``.
        size: bytes of the whole file or directory, embedding, head and metadata included, such as ``4GB``. ``auto`` for
            the smallest whose divergence from the dense model, in a quick pass before the run, is at most that of
            llama.cpp's Q4_K_M; ``auto:0.05`` for a limit in nats a token.
        bits: bits of a weight of the linears instead, on average, with scales and masks.
        converter: for llama.cpp, its ``convert_hf_to_gguf.py``, which is run on what was pruned; None if ``model`` is a
            ``.gguf`` file, or ``demo``.
        overwrite, restart, progress: as in ``sparsellm.prune``.

    Raises:
        SparseLLMError: a subclass that names the cause: no size or two, one that no forms have, a model or a place
            that does not fit. All is checked before the work.
    """
    order = ordered(
        model,
        recipe,
        program=program,
        out=out,
        size=size,
        bits=bits,
        converter=converter,
        overwrite=overwrite,
        restart=restart,
    )
    return carry_out(order, progress)


@dataclass(frozen=True)
class Order:
    """What is to be compressed, checked."""

    request: Request  # the run that writes the checkpoint with the rounded weights
    program: ProgramName
    out: str  # as the user typed it
    asked_bytes: int | None
    template: Path | None = None  # for llama.cpp, the GGUF file that is pruned
    converter: Path | None = None  # or its converter

    @property
    def place(self) -> Path:
        """The file or directory of the result."""
        return Path(os.path.expanduser(self.out))

    @property
    def pruned(self) -> Path:
        """The directory of the run's checkpoint; that of the result for transformers."""
        return _pruned(self.place, self.program)


def carry_out(order: Order, progress: ProgressCallback) -> CompressResult:
    """Does what ``compress`` does, for an order that was checked."""
    program = order.program
    place = order.place
    pruned = order.pruned
    request = order.request
    restart = request.restart
    run = None
    if not restart:
        run = complete_run(request, progress)
    # what an earlier start of this command wrote is written again
    overwrite = request.overwrite or run is not None
    if run is None:
        run = prune(request, progress).record
    elif request.recipe.experts is not None:
        clean_up_removal(pruned)
    interrupts.keeps(
        f"{pruned} is complete, and the same command goes on from it", resumes=False
    )
    measured = pruned
    if program == "sparsellm":
        measured = pack(
            pruned,
            out=place,
            head="int8",
            overwrite=overwrite,
            restart=restart,
            progress=progress,
        ).path
    recipe = request.recipe.updated(seq_len=run.recipe["seq_len"])
    evaluation = api.measure_held_out(measured, recipe, request.model, progress)
    api.keep_results(measured, [evaluation])
    if program == "llama.cpp":
        export(
            pruned,
            to="gguf",
            out=place,
            like=order.template,
            converter=order.converter,
            head=HEAD_OF_GGUF,
            overwrite=overwrite,
            progress=progress,
        )
        text = f"FROM ./{place.name}\n".encode()
        replace_atomically(_modelfile(place), lambda file: file.write(text))
    if program == "vllm":
        export(
            pruned,
            to="compressed-tensors",
            out=place,
            overwrite=overwrite,
            restart=restart,
            progress=progress,
        )
    size = bytes_of(place)
    # a run without the chart library has none
    if program in EXPORTED and (pruned / REPORT).is_file():
        write_export_report(pruned, place, size, _report(place))
    if pruned != place:
        clean_up(pruned)
    return CompressResult(
        path=place,
        program=program,
        asked_bytes=order.asked_bytes,
        bytes=size,
        dense_bytes=run.base.bytes,
        run=run,
        evaluation=evaluation,
        start=PROGRAMS[program].starts.format(shlex.quote(order.out)),
    )


@dataclass(frozen=True)
class ChosenForms:
    """The forms that a run would give to linears.

    Attributes:
        values: the type or grid of each linear, by name.
        sparsity: its share of zeros.
        bits: bits of a weight, on average, with scales and masks.
        candidates: name, bits and quickly measured divergence of what was compared, in nats a token.
        chosen: the name of the candidate that was taken.
        heads: the types of embedding and head by tensor; empty if they stay.
    """

    values: dict[str, str]
    sparsity: dict[str, float]
    bits: float
    candidates: list[dict[str, JsonValue]]
    chosen: str
    heads: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        """All attributes as plain JSON values."""
        return {**vars(self)}


def choose_forms(order: Order, progress: ProgressCallback) -> ChosenForms:
    """Chooses the forms that ``carry_out`` would, and writes nothing."""
    if order.program == "transformers":
        raise RecipeError(
            "transformers has one form for all linears, so there is nothing to choose; leave out the dry run"
        )
    targets = choose(order.request, progress)
    report = targets.report
    candidates = report["candidates"]
    chosen = str(report["chosen"])
    assert isinstance(candidates, list)
    taken = [x for x in candidates if isinstance(x, dict) and x["name"] == chosen]
    return ChosenForms(
        values=targets.values,
        sparsity={name: x.sparsity for name, x in targets.patterns.items()},
        bits=float(str(taken[0]["bits"])),
        candidates=[x for x in candidates if isinstance(x, dict)],
        chosen=chosen,
        heads={key: form.values for key, form in targets.heads.items()},
    )


@checked
def ordered(  # noqa: PLR0913 - the arguments of compress
    model: Checkpoint,
    recipe: RecipeGiven = None,
    *,
    program: ProgramName,
    out: Out,
    size: str | int | None = None,
    bits: Bits | None = None,
    converter: PathGiven | None = None,
    overwrite: bool = False,
    restart: bool = False,
) -> Order:
    """Checks all that can be checked before the work. Arguments and errors: see ``compress``."""
    settled = settle_calibration(Recipe.of(recipe), None)
    _check_size(program, size, bits)
    asked = None
    divergence = _divergence_of(size)
    if size is not None and divergence is None:
        asked = parse_bytes(size)
    script = _converter(model, program, converter)
    template = None
    if program == "llama.cpp" and script is None:
        template = _pruned_file(model)
    pruned = _check_places(model, str(out), program, overwrite=overwrite)
    if program != "transformers":
        source = checkpoint_directory(str(model))
        chain = open_chain(source, device=torch.device("cpu"))
        if settled.experts is not None:
            chain = FewerExperts(chain, settled.experts).chain
        check_forms(program, chain, settled)
        _check_exported(program, chain, settled, source)
        metadata = 0
        if script is not None:
            # refuses a model that it does not convert, before the work
            metadata = metadata_bytes(script, source)
        room = None
        if asked is not None:
            linears = _keys(chain, settled)
            if program == "llama.cpp":
                heads = _heads_in(chain, template)
                others = _other_bytes_of_gguf(
                    chain, linears | heads, template, metadata
                )
            else:
                heads = set()
                others = _other_bytes(program, chain, linears, source)
            room = _room(
                asked, program, chain, settled, others, sized_heads=bool(heads)
            )
            if not heads:
                weights = sum(size.weights for size in sizes_of(chain, settled))
                bits = min(MOST_BITS, bits_in(room, weights))
                room = None
        settled = settled.updated(
            bits=bits, size=room, divergence=divergence, program=program
        )
        check_size(chain, settled)
    request = Request(str(model), settled, pruned, overwrite=overwrite, restart=restart)
    return Order(
        request,
        program,
        str(out),
        asked_bytes=asked,
        template=template,
        converter=script,
    )


def _check_places(
    model: str | os.PathLike[str], out: str, program: ProgramName, *, overwrite: bool
) -> Path:
    """Refuses places of the result where something else is. Returns the directory of the checkpoint from which the
    result is written. Raises RecipeError or StorageError."""
    place = Path(os.path.expanduser(out))
    if not place.name:  # as of / and .
        raise RecipeError(
            f"--out {shown(out)} has no name of its own; name a new directory or file, such as small"
        )
    pruned = _pruned(place, program)
    # an earlier start of this command may have written the result, and been stopped after that
    begun = pruned != place and (pruned / PRUNING).is_file()
    replaces = overwrite or begun
    if program == "llama.cpp":
        check_file(out, overwrite=replaces)
        if _modelfile(place).exists() and not replaces:
            raise RecipeError(
                f"{_modelfile(place)} exists, and one is written next to the .gguf file; give --overwrite to replace it"
            )
    else:
        sources = checkpoints_among(model)
        check_destination(out, overwrite=replaces, sources=sources)
    if program in EXPORTED:
        check_page(_report(place))
    return pruned


def _check_exported(
    program: ProgramName, chain: Chain, recipe: Recipe, source: Path
) -> None:
    """Refuses before the work what the export refuses at its end. Raises ModelError or MissingExtraError."""
    if program not in EXPORTED:
        return
    names = {size.name for size in sizes_of(chain, recipe)}
    if program == "vllm":
        check_compressed(chain, names, "take --for llama.cpp")
    for index in range(len(chain)):
        for linear in chain.linears(index):
            if linear.name in names:
                tensor_of(chain, linear, source)


def _pruned(place: Path, program: ProgramName) -> Path:
    """The directory of the checkpoint from which a result is written."""
    if program == "transformers":
        return place
    return place.with_name(f"{place.name}-pruned")


def _modelfile(place: Path) -> Path:
    """The file by which Ollama makes a model of a GGUF file."""
    return place.with_suffix(".Modelfile")


def _report(place: Path) -> Path:
    """The report next to a GGUF file, or to a directory for vLLM, which has its own files alone."""
    if place.suffix == ".gguf":
        return place.with_suffix(".html")
    return place.with_name(f"{place.name}.html")


def _divergence_of(size: str | int | None) -> float | Literal["Q4_K_M"] | None:
    """The divergence that decides the size, if that is ``auto`` or ``auto:NATS``. Raises RecipeError."""
    if not isinstance(size, str):
        return None
    name, colon, nats = size.strip().lower().partition(":")
    if name != "auto":
        return None
    if not colon:
        return Q4_K_M
    try:
        divergence = float(nats)
    except ValueError:
        divergence = math.nan
    if not 0 < divergence < math.inf:
        raise RecipeError(
            f"size {shown(size)} names no divergence; write auto for that of Q4_K_M, or nats a token, such as auto:0.05"
        )
    return divergence


def _check_size(
    program: ProgramName, size: str | int | None, bits: float | None
) -> None:
    """Refuses two sizes, none, or one for a program that keeps a checkpoint's size. Raises RecipeError."""
    if size is not None and bits is not None:
        raise RecipeError("size and bits both say how small the model is; give one")
    sized = size is not None or bits is not None
    if program == "transformers" and sized:
        raise RecipeError(
            "transformers stores zeros like other values, so no size can be met; give a sparsity, or another program"
        )
    if program != "transformers" and not sized:
        raise RecipeError(
            f"a model for {program} needs a size: give --size, such as 4GB or auto, or --bits, such as 4.2"
        )


def _converter(
    model: str | os.PathLike[str],
    program: ProgramName,
    converter: str | os.PathLike[str] | None,
) -> Path | None:
    """llama.cpp's converter; None where it is not needed. Raises RecipeError if it is, and is not given."""
    if converter is None:
        of_gguf = str(model) == "demo" or is_gguf(model)
        if program == "llama.cpp" and not of_gguf:
            # a model that does not exist needs no converter either
            config_place(str(model))
            raise RecipeError(MAKE_TEMPLATE)
        return None
    if program != "llama.cpp":
        raise RecipeError(
            f"--converter is llama.cpp's, which {program} does not need; leave it out"
        )
    script = Path(converter).expanduser()
    check_converter(script)
    return script


def _pruned_file(model: str | os.PathLike[str]) -> Path:
    """The GGUF file that is pruned."""
    if str(model) == "demo":
        return demo_gguf()
    return Path(model).expanduser()


def _keys(chain: Chain, recipe: Recipe) -> set[str]:
    """The tensors of the linears to prune."""
    names = {size.name for size in sizes_of(chain, recipe)}
    keys = set()
    for index in range(len(chain)):
        for linear in chain.linears(index):
            if linear.name in names:
                keys.add(chain.key_of[linear.weight_name])
    return keys


def _other_bytes_of_gguf(
    chain: Chain, linears: set[str], template: Path | None, metadata: int
) -> int:
    """Bytes of a GGUF file but for the linears to prune."""
    assert chain.reader is not None
    if template is not None:
        return other_bytes(Template(template), chain.reader, linears, HEAD_OF_GGUF)
    heads = {key for _, key in heads_of(chain)}
    return expected_bytes(metadata, chain.reader, linears, heads, HEAD_OF_GGUF)


def _other_bytes(
    program: ProgramName, chain: Chain, linears: set[str], source: Path
) -> int:
    """Bytes of a directory but for the linears to prune."""
    assert chain.reader is not None
    others = sum(file.stat().st_size for file in companions_of(source))
    for key in chain.reader:
        if key not in linears:
            others += chain.reader.bytes_of(key)
    if program == "sparsellm":
        others += REPORT_BYTES + RECORD_BYTES * len(linears)
        return others - head_bytes(chain, "keep") + head_bytes(chain, "int8")
    others += SETTINGS_BYTES + (source / "config.json").stat().st_size
    for key in chain.reader:
        if key in linears:
            # its name stands in eight lines
            others += LINEAR_BYTES + 8 * len(key)
        else:
            others += LINES_BYTES + 3 * len(key)
    return others


def _heads_in(chain: Chain, template: Path | None) -> set[str]:
    """The tensors of embedding and head, if a GGUF file can have them in other types: it has both, as wide as the
    checkpoint's."""
    assert chain.reader is not None
    heads = {key for _, key in heads_of(chain)}
    if template is None:
        return heads
    opened = Template(template)
    columns = {x.name: int(x.shape[0]) for x in opened.reader.tensors}
    there = set()
    for name, keys in opened.keys_of(list(chain.reader)).items():
        for key in keys:
            if columns.get(name) == chain.reader.shape(key)[-1]:
                there.add(key)
    known = all(there.intersection(matrix.keys) for matrix in outer_matrices(chain))
    return heads if known else set()


def _room(
    size: int,
    program: ProgramName,
    chain: Chain,
    recipe: Recipe,
    others: int,
    *,
    sized_heads: bool,
) -> int:
    """Returns the bytes that forms may take in a result of ``size`` bytes, of which all else takes ``others``. Linears
    have forms; if ``sized_heads``, embedding and head do too. Raises RecipeError if no forms have the size."""
    least, most = size_range(program, chain, recipe, heads=sized_heads)
    if size > most_asked(others + most):
        raise too_large(f"size {_mb(size)} is", program, _mb(others + most))
    if others + least <= size:
        # a hundredth of ``others`` may be more than the forms can use
        return min(size - others, most_asked(most))
    what = "embedding, head and all else but the linears"
    if sized_heads:
        what = "all else but linears, embedding and head"
    raise RecipeError(
        f"size {_mb(size)} is too small for {program}: at least {_mb(others + least)} are possible, of which "
        f"{_mb(others)} are {what}"
    )


def bytes_of(place: Path) -> int:
    """The size of a file, or of all files in a directory."""
    if place.is_file():
        return place.stat().st_size
    return sum(file.stat().st_size for file in place.rglob("*") if file.is_file())


def _mb(size: int) -> str:
    """A size as text. It is rounded up, so that the least possible size is accepted as an error writes it."""
    if size < 1e7:
        return f"{math.ceil(size / 100) / 10:,.1f} kB"
    return f"{math.ceil(size / 1e5) / 10:,.1f} MB"
