"""A comparison of runs over one model: each is pruned, packed and measured against the dense model, then compared.

Every cell is a separate checkpoint, so a comparison that was stopped goes on with the cell it was in; later calls add
cells to it. Calibration windows, gradients of the dense model and its outputs on the text are computed once.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Literal

from pydantic import SkipValidation

from sparsellm import api, parallel
from sparsellm.arguments import RecipeGiven, checked
from sparsellm.convert import check_packable
from sparsellm.errors import MissingExtraError, RecipeError, StorageError, shown
from sparsellm.evaluation.speed import compared_speed
from sparsellm.files.directory import (
    check_destination,
    check_place,
    differences,
    partial_of,
)
from sparsellm.files.files import (
    TORN,
    explained,
    has_digest,
    locked,
    remove_torn,
    sha256,
    write_bytes,
)
from sparsellm.inputs import without_folders
from sparsellm.method.blocks import METHODS
from sparsellm.method.experts import SCORES
from sparsellm.method.experts.fewer import FewerExperts
from sparsellm.plugins import loaded
from sparsellm.progress import Progress, ProgressCallback, ignore, note
from sparsellm.recipe import SWEEP, Recipe
from sparsellm.records import (
    PRUNING,
    Pruning,
    Record,
    Settings,
    read_pruning,
    read_record,
)
from sparsellm.report.comparison import (
    Candidate,
    best_at_each_size,
    recommend,
    write_comparison,
)
from sparsellm.report.document import check_page
from sparsellm.run.choice import choice_for
from sparsellm.run.fingerprint import model_fingerprint, tokens_fingerprint
from sparsellm.run.plan import Request
from sparsellm.run.prune import prune
from sparsellm.text.sources import check_sources, default_source
from sparsellm.text.texts import text_file
from sparsepack.bench import Rounds, check_positions
from sparsepack.errors import UserError

GRID, PAGE = "compare.json", "compare.html"  # the record of a comparison, and its page
PACKED = "-packed"  # ends the name of the directory with a cell's packed checkpoint
AnyNumber = Annotated[float, SkipValidation]  # the recipe checks it


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
    transformers_tokens_per_second: float | None = (
        None  # dense, as transformers runs it
    )
    seconds: float  # the time of pruning
    peak_rss: int  # most bytes of the process so far


class Grid(Record):
    """The record of a comparison. A run replaces the directory of a cell only if that cell was begun."""

    format: Literal[2] = 2
    settings: Settings  # what all cells share: digests of the dense model and the text, and the protocol
    begun: dict[str, Settings]  # the recipe of each cell by name
    cells: list[Measured]  # the finished ones


class GridResult(Record):
    """The result of :func:`compare`, with the cells of the call."""

    out: Path
    page: Path | None  # None without the chart library, and for a single cell
    recommended: (
        str | None
    )  # the cell that fits the constraints best; None if there were none, or none fits
    best_at_each_size: list[
        str
    ]  # cells that diverge less than every smaller one, smallest first
    cells: list[Measured]


@dataclass(frozen=True)
class Protocol:
    """How the cells are measured: arguments of :func:`sparsellm.evaluate`."""

    text: str
    seq_len: int | None = None
    max_tokens: int | None = None
    speed: bool = False  # whether that of decoding is measured


def compare(
    model: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str],
    cells: Mapping[str, Recipe],
    protocol: Protocol,
    recover: float | None = None,
    max_bytes: int | None = None,
    progress: ProgressCallback = ignore,
) -> GridResult:
    """Prunes, packs and measures a model in every cell, and writes one page that compares them.

    Args:
        model, progress: as in :func:`sparsellm.prune`, the model by name; none with code of its own.
        out: the directory; each cell has its checkpoint in it. An earlier comparison is continued.
        cells: the recipe of each cell by the name of its directory, as :func:`cells_of` makes them.
        protocol: how they are measured.
        recover, max_bytes: the least recovery, and the most bytes of packed weight files, of a recommended cell.

    Raises:
        SparseLLMError: a recipe, the model or the text is wrong; ``out`` is refused as that of :func:`sparsellm.prune`,
            holds other files, or a cell with other settings, or is in use by another process.
    """
    place = check_place(out)
    _check_asked(cells, protocol, recover)
    device, bos = next((recipe.device, recipe.bos) for recipe in cells.values())
    dense = api.Opened(model, Recipe(device=device, products="float32"), trust=False)
    windows = parallel.from_main(
        partial(
            dense.windows, protocol.text, protocol.seq_len, protocol.max_tokens, bos
        )
    )
    if protocol.speed:
        check_positions(dense.chain.config, Rounds(), "the model")
    for (
        name,
        recipe,
    ) in (
        cells.items()
    ):  # one that could not be pruned or packed is refused before the first is pruned
        with _naming(name):
            check_packable(recipe)
            if recipe.experts is not None:
                SCORES[recipe.expert_score].check(recipe.expert_options)
            chain = (
                dense.chain
                if recipe.experts is None
                else FewerExperts(dense.chain, recipe.experts).chain
            )
            choice_for(
                chain, recipe, taught=recipe.experts is not None
            )  # raises where the two do not fit
    cells = parallel.from_main(partial(_with_text, cells, model, progress))
    recipes = {name: _recorded(recipe) for name, recipe in cells.items()}
    settings: Settings = {
        "model": model_fingerprint(dense.chain, progress),
        "protocol": {**asdict(protocol), "text": without_folders(protocol.text)},
        "text": tokens_fingerprint(windows),
    }
    if plugins := loaded():
        settings["plugins"] = {**plugins}
    shared = dict[Hashable, object]()
    sources = [dense.directory] if dense.directory else []
    with contextlib.ExitStack() as held:

        def begin() -> set[str]:
            grid = held.enter_context(
                _opened(check_place(place, sources), settings, recipes)
            )
            return {cell.name for cell in grid.cells}

        known = parallel.from_main(begin)
        for number, name in parallel.dealt(
            [pair for pair in enumerate(cells, 1) if pair[1] not in known]
        ):

            def tell(
                event: Progress, title: str = f"{number}/{len(cells)} {name}"
            ) -> None:
                progress(replace(event, detail=f"{title}: {event.detail}"))

            with _changed(place) as grid:
                grid.begun[name] = recipes[name]
            with _naming(name):
                cell = _measure(
                    Request(model, cells[name], place / name, shared=shared),
                    protocol,
                    dense,
                    grid,
                    tell,
                )
            with _changed(place) as grid:
                grid.cells.append(cell)

        def end() -> GridResult:
            cell_of = {cell.name: cell for cell in _read(place).cells}
            finished, page = [cell_of[name] for name in cells], None
            packed = [place / f"{name}{PACKED}" for name in cells]
            if len(finished) > 1:
                with contextlib.suppress(MissingExtraError):
                    page = write_comparison(
                        packed, place / PAGE, recover=recover, max_bytes=max_bytes
                    )
            runs = [
                Candidate(cell.name, cell.recovery, cell.packed_bytes, cell.kl)
                for cell in finished
            ]
            taken, best = (
                recommend(runs, recover, max_bytes),
                [run.name for run in best_at_each_size(runs)],
            )
            named = taken and taken.name
            return GridResult(
                out=place,
                page=page,
                recommended=named,
                best_at_each_size=best,
                cells=finished,
            )

        return parallel.from_main(end)


@contextlib.contextmanager
def _naming(cell: str) -> Iterator[None]:
    """Begins the message of an error with the name of the cell that it is about."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"cell {cell}: {error}") from error


def _check_asked(
    cells: Mapping[str, Recipe], protocol: Protocol, recover: float | None
) -> None:
    """Refuses wrong arguments of :func:`compare`, before anything is opened."""
    if not cells or not all(
        isinstance(recipe, Recipe) and Path(name).name == name
        for name, recipe in cells.items()
    ):
        raise RecipeError(
            "cells is empty, or not recipes by names of directories; make one or more with cells_of"
        )
    if not isinstance(protocol, Protocol):
        raise RecipeError(
            f"protocol is {shown(protocol)}; give a Protocol, which has the text"
        )
    if recover is not None and not 0 < recover <= 1:
        raise RecipeError(
            f"recover is {recover}; it is a fraction above 0, up to 1, such as 0.95"
        )
    if protocol.speed and parallel.size() > 1:
        raise RecipeError(
            "speed is measured while nothing else runs; leave it out, or start one process"
        )


def _with_text(
    cells: Mapping[str, Recipe],
    model: str | os.PathLike[str],
    progress: ProgressCallback,
) -> dict[str, Recipe]:
    """The recipes of all cells, with a calibration text, so that a later call takes the same one or is refused."""
    source, warnings = "", list[str]()
    if any(recipe.calibration is None for recipe in cells.values()):
        source, warnings = default_source(demo=str(model) == "demo")
    note(progress, warnings)
    return {
        name: recipe.updated(calibration=recipe.calibration or source)
        for name, recipe in cells.items()
    }


def _recorded(recipe: Recipe) -> Settings:
    """The recipe of a cell as the comparison keeps it: with the digest of the file that it calibrates on."""
    sources = check_sources(recipe.calibration or "", "calibration")
    kept: Settings = recipe.named.model_dump(
        mode="json", exclude={"memory", "device_memory"}
    )
    files = [
        sha256(text_file(file)) for source, file in sources if file and source != "hub"
    ]
    return {**kept, "calibration_file": " ".join(files) or None}


@contextlib.contextmanager
def _opened(
    place: Path, settings: Settings, recipes: Mapping[str, Settings]
) -> Iterator[Grid]:
    """The record in a directory, begun if there is none, and locked against other processes. Raises StorageError or
    RecipeError, before anything is written, if the directory or one of a cell in it belongs to something else."""
    if not place.is_dir():
        _checked(place, settings, recipes)
    with explained(place):
        place.mkdir(parents=True, exist_ok=True)
    with locked(place, place):
        grid = _checked(place, settings, recipes)
        remove_torn(place)
        _keep(grid, place)
        yield grid


def _checked(place: Path, settings: Settings, recipes: Mapping[str, Settings]) -> Grid:
    """The record in a directory, which may be new, after all checks of :func:`_opened`."""
    grid = Grid(settings=settings, begun={}, cells=[])
    if (place / GRID).is_file():
        grid = _read(place)
        _check_same(place, grid.settings, settings)
    elif place.is_dir() and not all(map(TORN.fullmatch, os.listdir(place))):
        raise StorageError(
            f"{place} is not empty, and holds no comparison; give another --out"
        )
    if place.is_dir():
        check_page(place / PAGE)
    finished = {cell.name for cell in grid.cells}
    for name, recipe in recipes.items():
        begun, pruned, packed = (
            grid.begun.get(name),
            place / name,
            place / f"{name}{PACKED}",
        )
        if begun is not None:
            _check_same(pruned, begun, recipe)
        if name in finished and not (packed / PRUNING).is_file():
            raise StorageError(
                f"{packed}, a finished run, is gone; put it back, or give another --out"
            )
        for folder in (pruned, packed) if name not in finished else ():
            if begun is not None:
                check_destination(
                    folder, overwrite=True
                )  # completes a renaming that was cut short
                continue
            check_place(folder)
            if other := [
                path for path in (folder, partial_of(folder)) if os.path.lexists(path)
            ]:
                raise StorageError(
                    f"{other[0]} was not written by this comparison; move it, or give another --out"
                )
        _resumed(pruned, grid)
    return grid


@contextlib.contextmanager
def _changed(place: Path) -> Iterator[Grid]:
    """The record in a directory, which is written again when the context ends; other processes change it too."""
    with parallel.one_at_a_time():
        grid = _read(place)
        yield grid
        _keep(grid, place)


def _read(place: Path) -> Grid:
    return read_record(Grid, place / GRID, "give another --out")


def _keep(grid: Grid, place: Path) -> None:
    write_bytes(place / GRID, (grid.model_dump_json(indent=2) + "\n").encode())


@checked
def cells_of(
    base: RecipeGiven,
    *,
    methods: Sequence[str],
    sparsities: Sequence[AnyNumber] = (),
    patterns: Sequence[str] = (),
    efforts: Sequence[AnyNumber] = (),
    values: Sequence[str] = (),
    experts: Sequence[AnyNumber] = (),
) -> dict[str, Recipe]:
    """The cells by name: every method at every sparsity, then with every pattern (auto:M at every sparsity); each with
    every type of ``values``, every entry of ``experts`` and, if the method has a sweep, every effort. ``base`` gives
    the other settings: options to methods that have them, those of a sweep to methods with one. A RecipeError if no
    method, or neither sparsity nor pattern, is given, one is repeated or wrong, or no method has an option of base."""
    recipe = Recipe.of(base)
    if values and recipe.grid != "own":
        raise RecipeError(
            f"grid {recipe.grid} means values {recipe.values}; leave out values, or the grid"
        )
    if not methods or not (sparsities or patterns):
        raise RecipeError(
            "a comparison needs one method or more, and one sparsity or pattern or more"
        )
    entries = [METHODS[name] for name in methods]
    for option in recipe.options:
        if not any(option in entry.options.model_fields for entry in entries):
            raise RecipeError(
                f"option {option} is known to none of the methods {', '.join(methods)}; leave it out"
            )
    swept = [
        field
        for field in SWEEP
        if getattr(recipe, field) is not None or (field == "effort" and efforts)
    ]
    if swept and all(entry.effort is None for entry in entries):
        raise RecipeError(
            f"{swept[0]} is known to none of the methods {', '.join(methods)}; leave it out"
        )
    if efforts and recipe.sweep_tokens is not None:
        raise RecipeError(
            "effort and sweep_tokens both say how long the sweep is; give one of them"
        )
    cells: dict[str, Recipe] = {}
    targets: list[Settings] = [{"sparsity": sparsity} for sparsity in sparsities]
    for pattern in patterns:
        shares = (
            targets[: len(sparsities)] if pattern.startswith("auto") else []
        )  # auto:M has a sparsity too
        targets += [{"pattern": pattern, **share} for share in shares or [{}]]
    typed: list[Settings] = [{"values": kind} for kind in values] or [{}]
    fewer: list[Settings] = [{"experts": setting} for setting in experts] or [{}]
    for left, target, entry, kept in product(fewer, targets, entries, typed):
        options = {
            key: value
            for key, value in recipe.options.items()
            if key in entry.options.model_fields
        }
        without = dict.fromkeys(swept) if entry.effort is None else {}
        for sweep in [
            {"effort": effort} for effort in efforts if entry.effort is not None
        ] or [{}]:
            one = recipe.updated(
                method=entry.name,
                options=options,
                **{**without, **sweep},
                **target,
                **kept,
                **left,
            )
            name = f"{entry.name}-{one.pattern.replace(':', '-') if one.pattern else format(one.sparsity, 'g')}"
            name += f"-{one.sparsity:g}" if one.chosen_of is not None else ""
            name += f"-experts{one.experts:g}" if one.experts is not None else ""
            name += f"-effort{one.effort}" if sweep else ""
            name += f"-{one.values}" if one.values != "keep" else ""
            if name in cells:
                raise RecipeError(
                    f"{name} is asked for twice; name each value of an option once"
                )
            cells[name] = one
    return cells


def _check_same(place: Path, known: Settings, asked: Settings) -> None:
    """Raises RecipeError, with the first setting that differs, if a cell was made with other settings."""
    for change in differences({key: known.get(key) for key in asked}, asked):
        raise RecipeError(
            f"{place} was made with other settings: {change}; give another --out, or the same settings"
        )


def _resumed(place: Path, grid: Grid) -> Pruning | None:
    """The record of a cell that an earlier process pruned and may not have measured; None if it is not there."""
    if not (place / PRUNING).is_file():
        return None
    pruned = read_pruning(place)
    settled = (
        "samples",
        "seq_len",
        "calibration_file",
    )  # the run may have settled two, and does not know the last
    asked = {
        name: value
        for name, value in grid.begun[place.name].items()
        if name not in settled
    }
    _check_same(
        place,
        {**pruned.recipe, "model": pruned.base.digest},
        {**asked, "model": grid.settings["model"]},
    )
    return pruned


def _measure(
    request: Request,
    protocol: Protocol,
    dense: api.Opened,
    grid: Grid,
    progress: ProgressCallback,
) -> Measured:
    """Prunes one cell unless its checkpoint is there, packs it, and measures the packed checkpoint."""
    place, recipe = Path(os.fspath(request.out or "")), request.recipe
    pruned = _resumed(place, grid) or prune(request, progress).record
    target = place.with_name(f"{place.name}{PACKED}")
    ours = (target / PRUNING).is_file() and has_digest(
        target / PRUNING, sha256(place / PRUNING)
    )
    window = {"seq_len": protocol.seq_len, "max_tokens": protocol.max_tokens}
    run = replace(request, overwrite=ours)
    packed, evaluation = api.pack_and_measure(
        run, target, protocol.text, dense, progress, **window
    )
    benchmarks = (
        [compared_speed(packed.path, place, progress=progress)]
        if protocol.speed
        else []
    )
    for directory in (
        [packed.path, place] if recipe.values == "keep" else [packed.path]
    ):  # else another model
        api.keep_results(directory, [evaluation, *benchmarks])
    speeds = benchmarks[0].decoding if benchmarks else None
    against = evaluation.against
    assert against is not None
    return Measured(
        name=place.name,
        sparsity=pruned.sparsity_pruned,
        perplexity=evaluation.value,
        dense_perplexity=against.perplexity.value,
        kl=against.kl,
        agreement=against.agreement,
        recovery=against.perplexity.value / evaluation.value,
        packed_bytes=packed.checkpoint_bytes,
        dense_bytes=pruned.base.bytes or 0,
        tokens_per_second=speeds.packed.median if speeds else None,
        dense_tokens_per_second=speeds.dense.median if speeds else None,
        transformers_tokens_per_second=speeds.transformers.median if speeds else None,
        seconds=sum(pruned.whole_seconds.values()),
        peak_rss=pruned.peak_rss_bytes,
    )
