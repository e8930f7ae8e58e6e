"""One sentence on the files that an interrupted run leaves. Imports nothing heavy: a signal may come before torch."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path

GRID = "compare.json"  # the finished cells of a comparison, in its directory


def kept_by_prune(out: Path, began: float) -> tuple[str, bool]:
    """A sentence on the files that a run of ``prune`` into ``out`` has left, and whether the run can be resumed.

    Args:
        out: the directory of the result.
        began: the start of the run, by ``time.time()``; a checkpoint in ``out`` from after that is its result.
    """
    report = out / "pruning.json"
    with contextlib.suppress(OSError):
        if report.stat().st_mtime >= began:
            return f"the checkpoint in {out} is complete", False
    if "sparsellm.storage.destination" not in sys.modules:  # loading it, and torch with it, would take seconds
        return "the run had not begun", True
    from sparsellm.storage.destination import partial_of, stage_of

    partial = partial_of(out)
    first, before = stage_of(out), ""
    if (first / "pruning.json").is_file():
        before = f"the first stage is kept in {first}, and of the second "
    elif _blocks(partial) is None:
        partial = partial_of(first)
    blocks = _blocks(partial)
    if blocks is None:
        return f"{before}no block was finished", True
    done, of = blocks
    beside = out.with_name(partial.name)  # shorter, but another place where ``out`` is a link
    place = beside if os.path.realpath(beside) == str(partial) else partial
    return f"{before}{done} of {of} blocks are kept in {place}", True


def kept_by_compare(out: Path) -> tuple[str, bool]:
    """A sentence on the cells that a comparison into ``out`` has finished, and that the command resumes it."""
    cells = 0
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # no file yet, or another's
        cells = len(json.loads((out / GRID).read_text(encoding="utf-8"))["cells"])
    return f"{cells} finished cell{'' if cells == 1 else 's'} and the blocks of the next one are kept in {out}", True


def _blocks(partial: Path) -> tuple[int, int] | None:
    """The number of leading blocks recorded as finished, and the number of blocks of the model."""
    from sparsellm.storage.resume import FOLDER

    names = {path.name for path in (partial / FOLDER).glob("model-*-of-*.safetensors.json")}
    if not names:
        return None
    shards = int(next(iter(names)).split("-of-")[1].split(".")[0])
    done = 0
    while done < shards - 1 and f"model-{done + 1:05d}-of-{shards:05d}.safetensors.json" in names:
        done += 1
    return done, shards - 1  # the last shard holds the weights outside the blocks
