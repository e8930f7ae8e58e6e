"""The public function: settings, destination and sources are checked here, and the result is recorded."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from sparsellm.arguments import Checkpoint, Out, PathGiven, checked
from sparsellm.errors import ModelError, RecipeError, StorageError, shown
from sparsellm.evaluation.speed import stamp
from sparsellm.exports.blocks import block_type
from sparsellm.exports.compressed import check_compressed, write_compressed
from sparsellm.exports.gguf_file import Contents, check_file, write_gguf
from sparsellm.exports.linears import OnGrid, open_on_grid
from sparsellm.exports.template import Template
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
    model: Checkpoint | None = None,
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
        like: for GGUF, the template, from which all but the pruned linears comes: the file that was pruned, or that
            llama.cpp's converter made of the dense model. None for that of ``demo``.
        model: for GGUF, the dense model, by which the order of the template's rows is found. None converts the
            template.
        head: for GGUF, the type of embedding and head; ``keep`` for the template's.
        save: append the export's record to the checkpoint's ``results.json``, which its card and report read.
        overwrite: replace the file or the checkpoint in ``out``.
        restart: remove the files that an unfinished run left for ``out``. An export is never resumed.
        progress: called with the progress.

    Raises:
        RecipeError: a setting does not fit the format, or the values are on a grid that it does not have.
        ModelError: checkpoint, dense model and template do not belong together, or one of them cannot be read.
        StorageError: a weight is not on its grid, or ``out`` cannot be written. No file is left.
        MissingExtraError: compressed-tensors is not installed.
    """
    if to == COMPRESSED and (like is not None or model is not None or head != "keep"):
        raise RecipeError(
            "like, model and head are settings of GGUF; leave them out for compressed-tensors"
        )
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
        template = Template(_template_file(opened, like))
        dense = str(model or template.path)
        read = {resolved(path) for path in (template.path, dense, source)}
        if read & {place, place.parent}:
            raise StorageError(
                f"--out {place} is the template or the dense model, or in the checkpoint; name another"
            )
        contents = Contents(
            opened,
            _dense_reader(dense, opened, named=model is not None),
            template,
            head,
        )
        record = write_gguf(
            contents, place, record, overwrite=overwrite, progress=progress, keep=keep
        )
    else:
        check_compressed(opened)
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
    own = [name for name, grid in GRIDS.items() if grid.form == form]
    others = [name for name in GRIDS if name not in own]
    if form == GGUF:
        # its blocks of 32 are those of some grids of compressed-tensors, too
        others = [name for name in others if block_type(GRIDS[name]) is not None]
    return own + others


def _template_file(opened: OnGrid, like: PathGiven | None) -> Path:
    """The path of the template: ``like``, or that of the demo model."""
    if like is not None:
        return Path(like).expanduser()
    if opened.run.base.name != "demo":
        raise RecipeError(
            f"GGUF needs a file of the dense model {shown(opened.run.base.name)} as a template: give the one that "
            "was pruned, or that llama.cpp's convert_hf_to_gguf.py makes, with --like"
        )
    return demo_gguf()


def _dense_reader(model: str, pruned: OnGrid, *, named: bool) -> CheckpointReader:
    """The reader of the dense model, converted as the pruned one was. Unless the user named it, a ModelError says how
    to name another."""
    dtype = "auto"
    if torch.float32 in {pruned.reader.dtype(key) for key in pruned.linears}:
        dtype = "float32"
    try:
        return open_checkpoint(checkpoint_directory(model, dtype=dtype))
    except ModelError as error:
        if named:
            raise
        raise ModelError(f"{error}, and name it with --model") from None
