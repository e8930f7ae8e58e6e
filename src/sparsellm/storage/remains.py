"""One sentence on the files that an interrupted run leaves. Imports nothing heavy: a signal may come before torch."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

GRID = "compare.json"  # the finished cells of a comparison, in its directory


def kept_by_prune(out: Path, began: float) -> tuple[str, bool]:
    """A sentence on the files that a run of ``prune`` into ``out`` has left, and whether the run can be resumed.

    Args:
        out: the directory of the result.
        began: the start of the run, by ``time.time()``; a checkpoint in ``out`` from after that is its result.
    """
    from sparsellm.storage.directory import STATE, partial_of, stage_of

    with contextlib.suppress(OSError):
        if (out / "pruning.json").stat().st_mtime >= began:
            return f"the checkpoint in {out} is complete", False
    before, partial, stage = "", partial_of(out), stage_of(out)
    if (stage / "pruning.json").is_file():
        before = f"the first stage is kept in {stage}, and of the second "
    elif partial_of(stage).is_dir():
        partial = partial_of(stage)
    names = [path.name for path in (partial / STATE).glob("model-*-of-*.safetensors.json")]
    blocks = int(names[0].split("-of-")[1].split(".")[0]) - 1 if names else 0  # the last has the weights outside them
    done = 0
    while any(name.startswith(f"model-{done + 1:05d}-") for name in names) and done < blocks:
        done += 1
    kept = f"{done} of {blocks} blocks are kept in {partial}" if names else "no block was finished"
    return f"{before}{kept}", True


def kept_by_compare(out: Path) -> tuple[str, bool]:
    """A sentence on the cells that a comparison into ``out`` has finished, and that the command resumes it."""
    cells = 0
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # no file yet, or another's
        cells = len(json.loads((out / GRID).read_text(encoding="utf-8"))["cells"])
    return f"{cells} finished cell{'' if cells == 1 else 's'} and the blocks of the next one are kept in {out}", True
