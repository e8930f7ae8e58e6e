"""A grid of runs over one model: each is pruned, packed and measured against the dense model, then compared.

Every cell is a separate checkpoint, so a grid that was stopped goes on with the cell it was in, and later calls add
cells to it. Calibration windows, gradients of the dense model and its outputs on the text are computed once.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from sparsellm import api
from sparsellm.convert import Values, pack
from sparsellm.errors import MissingExtraError, RecipeError, StorageError, shown
from sparsellm.evaluation.speed import compared_speed
from sparsellm.methods import METHODS
from sparsellm.progress import Progress, ProgressCallback, ignore
from sparsellm.recipe import SWEEP, Recipe
from sparsellm.records import PRUNING, Record, Settings, read_pruning, read_record
from sparsellm.report.comparison import write_comparison
from sparsellm.report.document import write_report
from sparsellm.run.plan import Request
from sparsellm.run.prune import prune
from sparsellm.storage.files import explained, replace_atomically, write_all
from sparsellm.storage.results import append_result
from sparsepack.codes import resolve_value_type

GRID, PAGE = "compare.json", "compare.html"  # the finished cells, in the directory of the grid
PACKED = "-packed"  # ends the name of the directory with a cell's packed checkpoint


class Measured(Record):
    """The measurements of one cell, as in :class:`~sparsellm.records.Against`."""

    name: str  # that of its directory
    sparsity: float  # in the pruned linears
    perplexity: float
    dense_perplexity: float
    kl: float
    agreement: float
    recovery: float
    packed_bytes: int  # weight files of the packed checkpoint
    dense_bytes: int
    tokens_per_second: float | None  # while decoding; None if no speed is measured
    dense_tokens_per_second: float | None  # by the same decoder
    transformers_tokens_per_second: float | None = None  # dense, as transformers runs it
    seconds: float  # the time of pruning
    peak_rss: int  # most bytes of the process so far
    settings: Settings  # everything that the measurements depend on


class Grid(Record):
    """The finished cells of a grid."""

    format: Literal[1] = 1
    cells: list[Measured]


class GridResult(Record):
    """The result of :func:`compare`, with the cells of the call."""

    out: Path
    page: Path | None  # None without the chart library
    recommended: str | None  # the cell that fits the constraints best; None if there were none, or none fits
    cells: list[Measured]


@dataclass(frozen=True)
class Protocol:
    """How the cells are measured: arguments of :func:`sparsellm.evaluate` and of :func:`sparsellm.pack`."""

    text: str
    seq_len: int | None = None
    max_tokens: int | None = None
    values: Values = "keep"
    speed: bool = False  # whether that of decoding is measured


def compare(
    model: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str],
    cells: Mapping[str, Recipe],
    protocol: Protocol,
    recover: float | None = None,
    max_bytes: int | None = None,
    trust_remote_code: bool = False,
    progress: ProgressCallback = ignore,
) -> GridResult:
    """Prunes, packs and measures a model in every cell of a grid, and writes one page that compares them.

    Args:
        model, trust_remote_code, progress: as in :func:`sparsellm.prune`, the model by name.
        out: the directory of the grid; each cell has its checkpoint in it. An earlier grid is continued.
        cells: the recipe of each cell by the name of its directory, as :func:`cells_of` makes them.
        protocol: how they are measured.
        recover, max_bytes: the least recovery, and the most bytes of packed weight files, of a recommended cell.

    Raises:
        SparseLLMError: a recipe, the model or the text is wrong, or a cell in ``out`` has other settings.
    """
    folder, known = Path(out).expanduser(), dict[str, Measured]()
    if (folder / GRID).is_file():
        known = {cell.name: cell for cell in read_record(Grid, folder / GRID, "give another --out").cells}
    elif (folder.exists() and not folder.is_dir()) or (folder / "config.json").exists():
        raise StorageError(f"{folder} is not a directory of a comparison; give another --out")
    settings: dict[str, Settings] = {}
    for name, recipe in cells.items():
        kept = recipe.model_dump(mode="json", exclude={"memory"})
        settings[name] = {"model": str(model), "recipe": kept, "protocol": asdict(protocol)}
        if name in known:
            _check_same(folder / name, known[name].settings, settings[name])
    resolve_value_type(protocol.values, torch.float32)
    first = next(iter(cells.values()))
    dense = api.Opened(model, Recipe(device=first.device, products="float32"), trust_remote_code)
    dense.windows(protocol.text, protocol.seq_len, protocol.max_tokens, first.bos)  # refused before the work
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    shared = dict[Hashable, object]()
    for number, (name, recipe) in enumerate(cells.items(), 1):
        if name in known:
            continue

        def tell(event: Progress, title: str = f"{number}/{len(cells)} {name}") -> None:
            progress(replace(event, detail=f"{title}: {event.detail}"))

        request = Request(model, recipe, folder / name, trust_remote_code=trust_remote_code, shared=shared)
        known[name] = _measure(request, protocol, dense, settings[name], tell)
        text = Grid(cells=list(known.values())).model_dump_json(indent=2) + "\n"
        replace_atomically(folder / GRID, partial(write_all, data=text.encode()))
    finished = [known[name] for name in cells]
    page = None
    if len(finished) > 1:
        with contextlib.suppress(MissingExtraError):
            page = write_comparison([folder / f"{cell.name}{PACKED}" for cell in finished], folder / PAGE)
    best = recommend(finished, recover, max_bytes)
    return GridResult(out=folder, page=page, recommended=best.name if best is not None else None, cells=finished)


def cells_of(
    base: Recipe | Settings | str | os.PathLike[str] | None,
    *,
    methods: Sequence[str],
    sparsities: Sequence[float] = (),
    patterns: Sequence[str] = (),
) -> dict[str, Recipe]:
    """The recipes of a grid by name: every method at every sparsity, then at every pattern. The other settings are
    those of ``base``, whose options hold for the methods that have them, and those of a sweep for the methods with one.
    A RecipeError if nothing is asked for, something is named twice or wrong, or no method has an option of the base."""
    recipe = Recipe.of(base)
    if not methods or not (sparsities or patterns):
        raise RecipeError("a comparison needs one method or more, and one sparsity or pattern or more")
    entries = [METHODS[name] for name in methods]
    for option in recipe.options:
        if not any(option in entry.options.model_fields for entry in entries):
            raise RecipeError(f"option {option} is known to none of the methods {', '.join(methods)}; leave it out")
    swept = [field for field in SWEEP if getattr(recipe, field) is not None]
    if swept and all(entry.effort is None for entry in entries):
        raise RecipeError(f"{swept[0]} is known to none of the methods {', '.join(methods)}; leave it out")
    cells: dict[str, Recipe] = {}
    targets: list[Settings] = [{"sparsity": sparsity} for sparsity in sparsities]
    targets += [{"pattern": pattern} for pattern in patterns]
    for target in targets:
        for entry in entries:
            options = {key: value for key, value in recipe.options.items() if key in entry.options.model_fields}
            without = dict.fromkeys(swept) if entry.effort is None else {}
            one = recipe.updated(method=entry.name, options=options, **without, **target)
            name = f"{entry.name}-{one.pattern.replace(':', '-') if one.pattern else format(one.sparsity, 'g')}"
            if name in cells:
                raise RecipeError(f"{name} is asked for twice; name each method, sparsity and pattern once")
            cells[name] = one
    return cells


def recommend(cells: Sequence[Measured], recover: float | None, max_bytes: int | None) -> Measured | None:
    """The cell that fits the constraints: with ``recover`` the smallest one, else the one that recovers most."""
    if recover is None and max_bytes is None:
        return None
    least, most = recover or 0.0, math.inf if max_bytes is None else max_bytes
    fitting = [cell for cell in cells if cell.recovery >= least and cell.packed_bytes <= most]
    if recover is None:
        return max(fitting, key=lambda cell: cell.recovery, default=None)
    return min(fitting, key=lambda cell: (cell.packed_bytes, -cell.recovery), default=None)


def _check_same(place: Path, known: Settings, asked: Settings, before: str = "") -> None:
    """Raises RecipeError, with the first setting that differs, if a cell was made with other settings."""
    for key, value in asked.items():
        was = known.get(key)
        if was == value:
            continue
        if isinstance(was, dict) and isinstance(value, dict):
            _check_same(place, was, value, f"{before}{key}.")
        raise RecipeError(
            f"{place} was made with another {before}{key} ({shown(was)}, not {shown(value)}); give another --out, or "
            "the same settings"
        )


def _measure(
    request: Request, protocol: Protocol, dense: api.Opened, settings: Settings, progress: ProgressCallback
) -> Measured:
    """Prunes one cell unless its checkpoint is there, packs it, and measures the packed checkpoint."""
    place, recipe = Path(os.fspath(request.out or "")), request.recipe
    if (place / PRUNING).is_file():  # pruned by an earlier call and not yet measured; it may have settled two settings
        pruned = read_pruning(place)
        _check_same(place, pruned.recipe, recipe.model_dump(mode="json", exclude={"memory", "samples", "seq_len"}))
    else:
        pruned = prune(request, progress).record
    packed = pack(
        place, out=f"{place}{PACKED}", values=protocol.values, overwrite=True, restart=True, progress=progress
    )
    evaluation = api.evaluate(
        packed.path,
        protocol.text,
        seq_len=protocol.seq_len,
        max_tokens=protocol.max_tokens,
        bos=recipe.bos,
        against=dense,  # type: ignore[arg-type]
        device=recipe.device,
        trust_remote_code=request.trust_remote_code,
        progress=progress,
    )
    for directory in [packed.path, place] if protocol.values == "keep" else [packed.path]:  # else another model
        append_result(directory, evaluation)
    speeds = None
    if protocol.speed:
        measured = compared_speed(packed.path, place, progress=progress)
        for directory in (place, packed.path):
            append_result(directory, measured)
        speeds = measured.decoding
    with contextlib.suppress(MissingExtraError):  # the run has said so
        write_report(place)
    against = evaluation.against
    assert against is not None
    return Measured(
        name=place.name,
        sparsity=pruned.sparsity_pruned,
        perplexity=evaluation.value,
        dense_perplexity=against.perplexity.value,
        **against.model_dump(include={"kl", "agreement", "recovery"}),
        packed_bytes=packed.checkpoint_bytes,
        dense_bytes=pruned.base.bytes or 0,
        tokens_per_second=speeds.packed.median if speeds else None,
        dense_tokens_per_second=speeds.dense.median if speeds else None,
        transformers_tokens_per_second=speeds.transformers.median if speeds else None,
        seconds=sum(pruned.whole_seconds.values()),
        peak_rss=pruned.peak_rss_bytes,
        settings=settings,
    )
