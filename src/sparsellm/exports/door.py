"""The public function: settings, destination and sources are checked here, and the result is recorded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from sparsellm.arguments import Checkpoint, Out, PathGiven, checked
from sparsellm.errors import RecipeError, StorageError
from sparsellm.evaluation.speed import stamp
from sparsellm.exports.blocks import block_type
from sparsellm.exports.compressed import check_compressed, write_compressed
from sparsellm.exports.gguf_file import Contents, check_file, write_gguf
from sparsellm.exports.linears import OnGrid, open_on_grid
from sparsellm.exports.template import (
    SCRIPT,
    Template,
    check_converter,
    converted,
)
from sparsellm.files.demo_model import demo_gguf
from sparsellm.files.directory import (
    WorkingDirectory,
    check_destination,
    checkpoints_among,
    resolved,
)
from sparsellm.files.reader import CheckpointReader, open_checkpoint
from sparsellm.files.resolve import checkpoint_directory
from sparsellm.files.results import append_result
from sparsellm.progress import ProgressCallback, ignore
from sparsellm.records import Export
from sparsepack.grids import GRIDS

GGUF = "gguf"
COMPRESSED = "compressed-tensors"
MAKE_TEMPLATE = (
    f"a GGUF file needs llama.cpp's {SCRIPT}: give it with --converter, such as llama.cpp/{SCRIPT} after "
    "`git clone --depth 1 https://github.com/ggml-org/llama.cpp`"
)
RUNS_IN = {
    GGUF: "llama.cpp, Ollama, LM Studio",
    COMPRESSED: "vLLM; transformers, with the package compressed-tensors",
}


@dataclass(frozen=True)
class ExportResult:
    """What was written to ``path``: its record, and what the linears take there and in the packed format."""

    path: Path
    record: Export
    sparsity: float  # zeros of the linears, which other formats store
    linear_bytes: int
    packed_bytes: int | None  # None for values of 8 bits, which have no packed form

    def to_dict(self) -> dict[str, object]:
        """All attributes as plain JSON values, as ``--json`` prints them."""
        return {
            **vars(self),
            "path": str(self.path),
            "record": self.record.model_dump(),
        }


@checked
def export(  # noqa: PLR0913 - the Python door
    directory: Checkpoint,
    *,
    to: Literal["gguf", "compressed-tensors"],
    out: Out,
    like: PathGiven | None = None,
    converter: PathGiven | None = None,
    head: Literal["keep", "q8_0", "q6_k"] = "keep",
    save: bool = False,
    overwrite: bool = False,
    restart: bool = False,
    progress: ProgressCallback = ignore,
) -> ExportResult:
    """Writes a checkpoint that was pruned on a grid of another program as that program reads it, without loss.

    Args:
        directory: what ``prune`` wrote with a ``grid``, or its packed form.
        to: ``gguf``, one file; or ``compressed-tensors``, a directory.
        out: the file or directory.
        converter: for GGUF, llama.cpp's ``convert_hf_to_gguf.py``. What it makes of the checkpoint is the template,
            from which all but the pruned linears comes.
        like: for GGUF, the ``.gguf`` file that was pruned, as the template instead. None for that of ``demo``.
        head: for GGUF, the type of embedding and head, unless the template has a smaller one; ``keep`` for the
            template's.
        save: append the export's record to the checkpoint's ``results.json``, which its card and report read.
        overwrite: replace the file or the checkpoint in ``out``.
        restart: remove the files that an unfinished run left for ``out``. An export is never resumed.
        progress: called with the progress.

    Raises:
        RecipeError: a setting does not fit the format, or the values are on a grid that it does not have.
        ModelError: checkpoint and template do not belong together, or one of them cannot be read or made.
        StorageError: a weight is not on its grid, or ``out`` cannot be written. No file is left.
        MissingExtraError: compressed-tensors is not installed.
    """
    given = like is not None or converter is not None
    if to == COMPRESSED and (given or head != "keep"):
        raise RecipeError(
            "like, converter and head are settings of GGUF; leave them out for compressed-tensors"
        )
    if like is not None and converter is not None:
        raise RecipeError("like and converter both make a template; give one")
    check = partial(check_destination, out, overwrite=overwrite)
    if to == GGUF:
        place = check_file(out, overwrite=overwrite)
    else:
        place = check(sources=checkpoints_among(directory))
    source = checkpoint_directory(str(directory), "directory")
    if to == COMPRESSED:
        check(sources=[source])
    opened = open_on_grid(source, _grids_of(to))
    record = Export(
        **vars(stamp(torch.device("cpu"))),
        to=to,
        grid=opened.grid.name,
        name=place.name,
        bytes=0,
        runs_in=RUNS_IN[to],
    )

    def keep(record: Export) -> None:
        if save:
            append_result(source, record)

    if to == GGUF:
        with _template(opened, like, converter, place) as (template, dense):
            contents = Contents(opened, dense, template, head)
            record = write_gguf(
                contents,
                place,
                record,
                overwrite=overwrite,
                progress=progress,
                keep=keep,
            )
    else:
        instead = "prune with --grid q4_0 and export to gguf"
        if block_type(opened.grid):
            instead = "export to gguf"
        check_compressed(opened.chain, {*opened.linears.values()}, instead)
        work = WorkingDirectory(
            place,
            {"kind": "export"},
            overwrite=overwrite,
            restart=restart,
            need_bytes=opened.reader.bytes,
        )
        record = write_compressed(opened, work, record, progress, keep)
    run = opened.run
    bits = 0.0
    packed = 0
    for matrix in run.linears:
        grid = GRIDS[run.values_of(matrix)]
        bits += grid.bits_per_weight(matrix.shape[1]) * matrix.weights
        packed += matrix.packed_bytes(grid.values, grid.group)
    return ExportResult(
        place,
        record,
        sparsity=run.sparsity_pruned,
        linear_bytes=round(bits / 8),
        packed_bytes=packed if run.packs else None,
    )


def _grids_of(form: str) -> list[str]:
    """The names of the grids that a format has; first those that are its own, which messages recommend."""
    native = [name for name, grid in GRIDS.items() if grid.form == form]
    others = [name for name in GRIDS if name not in native]
    if form == GGUF:
        # its blocks of 32 are those of some grids of compressed-tensors, too
        others = [name for name in others if block_type(GRIDS[name]) is not None]
    return native + others


@contextlib.contextmanager
def _template(
    opened: OnGrid,
    like: PathGiven | None,
    converter: PathGiven | None,
    place: Path,
) -> Iterator[tuple[Template, CheckpointReader]]:
    """The template of a file to be written to ``place``, and the checkpoint whose rows it has."""
    dtypes = {opened.reader.dtype(key) for key in opened.linears}
    directory = opened.reader.directory
    if converter is not None:
        script = Path(converter).expanduser()
        check_converter(script)
        if (directory / "packed.json").is_file():
            raise RecipeError(
                f"{directory} is packed, which {SCRIPT} does not read; export the pruned checkpoint"
            )
        _refuse_inside(place, [directory])
        dtype = torch.float32
        if len(dtypes) == 1:
            dtype = dtypes.pop()
        name = opened.run.base.name or directory.name
        with converted(script, directory, dtype, name, place.parent) as template:
            yield template, opened.reader
        return
    if like is not None:
        file = Path(like).expanduser()
    elif opened.run.base.name == "demo":
        file = demo_gguf()
    else:
        raise RecipeError(
            f"{MAKE_TEMPLATE}; or, if a .gguf file was pruned, that file with --like"
        )
    _refuse_inside(place, [file, directory])
    template = Template(file)
    of_dense = "auto"
    if torch.float32 in dtypes:
        of_dense = "float32"
    dense = open_checkpoint(checkpoint_directory(str(file), "like", dtype=of_dense))
    yield template, dense


def _refuse_inside(place: Path, sources: list[Path]) -> None:
    """Refuses a file to be written that is one of the sources, or in one (StorageError)."""
    if {place, place.parent} & {resolved(source) for source in sources}:
        raise StorageError(
            f"--out {place} is the template, or in the checkpoint; name another"
        )
