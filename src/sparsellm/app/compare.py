"""A comparison of runs of one model: each is pruned, packed and measured, then all are shown on one page.

Every cell is an ordinary run in an ordinary directory, so a comparison that was stopped goes on where it was, and later
calls add cells to it. What is finished is not done again.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import SkipValidation

from sparsellm import api, parallel
from sparsellm.arguments import RecipeGiven, checked
from sparsellm.convert import check_packable, pack
from sparsellm.errors import MissingExtraError, RecipeError
from sparsellm.evaluation.speed import compared_speed
from sparsellm.files.directory import check_destination, check_folder, differences
from sparsellm.files.files import explained, has_digest, sha256
from sparsellm.files.results import read_results
from sparsellm.inputs import without_folders
from sparsellm.method.blocks import METHODS
from sparsellm.method.experts import SCORES
from sparsellm.method.experts.fewer import FewerExperts
from sparsellm.plugins import loaded
from sparsellm.progress import Progress, ProgressCallback, ignore, note
from sparsellm.recipe import SWEEP, Recipe
from sparsellm.records import (
    PRUNING,
    Evaluation,
    Record,
    Settings,
    read_pruning,
)
from sparsellm.registry import Entry
from sparsellm.report.card import check_card, is_behind
from sparsellm.report.checkpoint import read_checkpoint
from sparsellm.report.comparison import (
    Candidate,
    best_at_each_size,
    recommend,
    write_comparison,
)
from sparsellm.report.document import REPORT, check_page
from sparsellm.run.budget import Budget
from sparsellm.run.calibration import draw_calibration
from sparsellm.run.choice import choice_for
from sparsellm.run.fingerprint import model_fingerprint, tokens_fingerprint
from sparsellm.run.opening import Models
from sparsellm.run.request import Request
from sparsellm.text.sources import SELF, default_source, shares_of
from sparsepack.bench import Rounds, check_positions
from sparsepack.errors import UserError

PAGE = "compare.html"  # the page of a comparison
PACKED = "-packed"  # ends the name of the directory with a cell's packed checkpoint
# Fields that no bit depends on, or that a run settles by its model and text
NOT_COMPARED = {"memory", "device_memory", "samples", "seq_len"}
# Fields that the windows of a text depend on, next to the sets and passes that the method asks for
DRAWN_BY = {"calibration", "samples", "seq_len", "seed", "bos", "sweep_tokens"}
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
    transformers_tokens_per_second: float | None  # dense, as transformers runs it
    seconds: float  # the time of pruning
    peak_rss: int  # most bytes of the process that pruned it


class Comparison(Record):
    """The result of :func:`compare`, with the cells of the call."""

    out: Path
    page: Path | None  # None without the chart library, and for a single cell
    recommended: str | None  # the cell to take; None without a limit, or if none fits
    best_at_each_size: list[str]  # those below every smaller one's KL, smallest first
    cells: list[Measured]


@dataclass(frozen=True)
class _Dense:
    """The dense model, with the text that all cells are measured on."""

    model: str | os.PathLike[str]
    opened: api.Opened
    digest: str  # that of the weights
    text: str
    seq_len: int | None
    max_tokens: int | None
    windows: str  # the digest of the text's token ids

    def evaluation_in(self, directory: Path) -> Evaluation | None:
        """The latest measurement of a checkpoint against this model on this text; None if there is none."""
        for evaluation in reversed(read_results(directory).evaluations):
            if evaluation.protocol.digest != self.windows:
                continue
            against = evaluation.against
            if against is not None and against.model == self.opened.kept.name:
                return evaluation
        return None

    def evaluate(
        self, directory: Path, recipe: Recipe, progress: ProgressCallback
    ) -> Evaluation:
        """Measures a checkpoint on the text. Several processes divide the windows."""
        return api.evaluate(
            directory,
            self.text,
            seq_len=self.seq_len,
            max_tokens=self.max_tokens,
            bos=recipe.bos,
            against=self.opened,
            device=recipe.device,
            dtype=recipe.dtype,
            progress=progress,
        )


def compare(  # noqa: PLR0913 - the Python door
    model: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str],
    cells: Mapping[str, Recipe],
    text: str,
    seq_len: int | None = None,
    max_tokens: int | None = None,
    speed: bool = False,
    max_bytes: int | None = None,
    progress: ProgressCallback = ignore,
) -> Comparison:
    """Prunes, packs and measures a model in every cell, and writes one page that compares them.

    A cell ``name`` is pruned into ``out/name``, packed into ``out/name-packed``, and measured there. Several processes
    of torch.distributed divide the work of each cell.

    Args:
        model, progress: as in :func:`sparsellm.prune`, the model by name; none with code of its own.
        out: the directory; an earlier comparison in it goes on. Calibration texts are read again, to compare them
            with what its finished runs have read.
        cells: the recipe of each cell by the name of its directory, as :func:`cells_of` makes them.
        text, seq_len, max_tokens: those of :func:`sparsellm.evaluate`.
        speed: whether the speed of decoding is measured too.
        max_bytes: the most bytes of packed weight files of a recommended cell.

    Raises:
        SparseLLMError: a recipe, the model or the text is wrong; ``out`` or the directory of a cell is refused as that
            of :func:`sparsellm.prune`, or holds a finished run of other settings, or of another calibration text.
    """
    place = check_folder(out)
    _check_asked(cells, speed)
    first = next(iter(cells.values()))
    settings = Recipe(device=first.device, dtype=first.dtype, products="float32")
    opened = api.Opened(model, settings, trust=False)
    drawn = partial(opened.windows, text, seq_len, max_tokens, first.bos)
    windows = parallel.from_main(drawn)
    if speed:
        check_positions(opened.chain.config, Rounds(), "the model")
    for name, recipe in cells.items():
        with _naming(name):
            _check_recipe(opened, recipe)
    cells = parallel.from_main(partial(_with_text, cells, model, progress))
    dense = _Dense(
        model=model,
        opened=opened,
        digest=model_fingerprint(opened.chain, progress),
        text=text,
        seq_len=seq_len,
        max_tokens=max_tokens,
        windows=tokens_fingerprint(windows),
    )
    check = partial(_check_places, place, cells, dense, speed=speed)
    parallel.from_main(check)
    _check_texts(place, cells, dense, progress)
    measured: list[Measured] = []
    for number, (name, recipe) in enumerate(cells.items(), 1):
        title = f"{number}/{len(cells)} {name}"

        def tell(event: Progress, title: str = title) -> None:
            detail = f"{title}: {event.detail}"
            progress(replace(event, detail=detail, part=title))

        with _naming(name):
            _run(place / name, recipe, dense, tell, speed=speed)
            read = partial(_read, place / name, dense, speed=speed)
            measured.append(parallel.from_main(read))
    return parallel.from_main(partial(_shown, place, measured, max_bytes))


@contextlib.contextmanager
def _naming(cell: str) -> Iterator[None]:
    """Begins the message of an error with the name of the cell that it is about."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"cell {cell}: {error}") from error


def _check_asked(cells: Mapping[str, Recipe], speed: bool) -> None:
    """Refuses wrong arguments of :func:`compare`, before anything is opened."""
    if not cells or not all(
        isinstance(recipe, Recipe) and Path(name).name == name
        for name, recipe in cells.items()
    ):
        raise RecipeError(
            "cells is empty, or not recipes by names of directories; make one or more with cells_of"
        )
    if speed and parallel.size() > 1:
        raise RecipeError(
            "speed is measured while nothing else runs; leave it out, or start one process"
        )


def _check_recipe(dense: api.Opened, recipe: Recipe) -> None:
    """Refuses a recipe whose result could not be pruned or packed."""
    check_packable(recipe)
    chain = dense.chain
    if recipe.experts is not None:
        SCORES[recipe.expert_score].check(recipe.expert_options)
        chain = FewerExperts(chain, recipe.experts).chain
    choice_for(chain, recipe, taught=recipe.experts is not None)


def _with_text(
    cells: Mapping[str, Recipe],
    model: str | os.PathLike[str],
    progress: ProgressCallback,
) -> dict[str, Recipe]:
    """The recipes of all cells with a calibration text, so that all cells have the same."""
    if all(recipe.calibration is not None for recipe in cells.values()):
        return dict(cells)
    source, warnings = default_source(demo=str(model) == "demo")
    note(progress, warnings)
    return {
        name: recipe.updated(calibration=recipe.calibration or source)
        for name, recipe in cells.items()
    }


def _check_places(
    place: Path, cells: Mapping[str, Recipe], dense: _Dense, *, speed: bool
) -> None:
    """Refuses, before the first run, a directory that a cell could not be written into or go on from."""
    directory = dense.opened.directory
    check_folder(place, [directory] if directory is not None else [])
    if place.is_dir():
        check_page(place / PAGE)
    for name, recipe in cells.items():
        with _naming(name):
            _check_cell(place / name, recipe, dense, speed=speed)
    with explained(place):
        place.mkdir(parents=True, exist_ok=True)


def _check_cell(pruned: Path, recipe: Recipe, dense: _Dense, *, speed: bool) -> None:
    """Refuses the directories of a cell if they hold anything but a run with its settings, or pages of somebody else
    where measurements are to be added."""
    packed = packed_of(pruned)
    finished = []
    if _is_finished(pruned):
        _check_same(pruned, recipe, dense)
        finished.append(pruned)
    else:
        check_destination(pruned)
    if _is_packed_from(packed, pruned):
        finished.append(packed)
    else:
        check_destination(packed)
    for directory in finished:
        known = read_checkpoint(directory)
        measured = dense.evaluation_in(directory) is not None
        complete = measured and not (speed and known.decoding() is None)
        if not complete or is_behind(directory):
            check_card(directory)
            check_page(directory / REPORT)


def packed_of(pruned: Path) -> Path:
    """The directory of a cell's packed checkpoint."""
    return pruned.with_name(f"{pruned.name}{PACKED}")


def _is_finished(directory: Path) -> bool:
    return (directory / PRUNING).is_file()


def _is_packed_from(packed: Path, pruned: Path) -> bool:
    """Whether a directory holds the packed form of a finished run: packing copies the record of the run."""
    if not _is_finished(packed) or not _is_finished(pruned):
        return False
    return has_digest(packed / PRUNING, sha256(pruned / PRUNING))


def _check_same(pruned: Path, recipe: Recipe, dense: _Dense) -> None:
    """Raises RecipeError, with the first setting that differs, if a finished run was made with other settings."""
    run = read_pruning(pruned)
    asked: Settings = recipe.named.model_dump(mode="json", exclude=NOT_COMPARED)
    asked |= {"model": dense.digest, "plugins": {**loaded()}}
    known: Settings = {
        **run.recipe,
        "model": run.base.digest,
        "plugins": run.identity.get("plugins", {}),
    }
    for change in differences({key: known.get(key) for key in asked}, asked):
        raise RecipeError(
            f"{pruned} was made with other settings: {change}; give another --out, or the same settings"
        )


def _check_texts(
    place: Path,
    cells: Mapping[str, Recipe],
    dense: _Dense,
    progress: ProgressCallback,
) -> None:
    """Refuses finished cells that read other token ids than their recipes give today. All processes call this."""
    drawn: dict[str, Settings] = {}
    for name, recipe in cells.items():
        finished = partial(_is_finished, place / name)
        if not parallel.from_main(finished) or _is_written(recipe):
            continue
        with _naming(name):
            asked = _calibration_of(recipe, dense, drawn, progress)
            check = partial(_check_text, place / name, recipe, asked)
            parallel.from_main(check)


def _is_written(recipe: Recipe) -> bool:
    """Whether the text cannot be read again: the model writes it alone, or wrote a part after experts were removed."""
    sources = shares_of(recipe.calibration or "")
    return SELF in sources and (len(sources) == 1 or recipe.experts is not None)


def _calibration_of(
    recipe: Recipe,
    dense: _Dense,
    drawn: dict[str, Settings],
    progress: ProgressCallback,
) -> Settings:
    """The number and the length of the calibration windows that a run of a recipe would read, and the digest of all its
    token ids. ``drawn`` keeps it for further recipes that read the same."""
    opened = dense.opened
    chain = opened.chain
    teacher = None
    if recipe.experts is not None:
        chain = FewerExperts(opened.chain, recipe.experts).chain
        teacher = opened.chain
    choice = choice_for(chain, recipe, taught=teacher is not None)
    drawn_by = recipe.model_dump(include=DRAWN_BY)
    key = str([drawn_by, choice.sets, choice.passes, teacher is not None])
    if key in drawn:
        return drawn[key]
    models = Models(
        chain,
        start=None,
        teacher=teacher,
        directory=opened.directory,
        dense=opened.directory,
        in_memory=None,
        tokenizer=opened.tokenizer,
        sources=(),
        trust=False,
    )
    request = Request(dense.model, recipe)
    budget = Budget(recipe, chain.device)
    windows = draw_calibration(request, choice, models, budget, progress).windows
    every = torch.cat([*windows.sets, windows.fresh])
    drawn[key] = {
        "samples": len(windows.first),
        "seq_len": windows.first.shape[1],
        "calibration_tokens": tokens_fingerprint(every),
    }
    return drawn[key]


def _check_text(pruned: Path, recipe: Recipe, asked: Settings) -> None:
    """Raises RecipeError if a finished run read other token ids than those that are ``asked`` for now."""
    run = read_pruning(pruned)
    known: Settings = {
        "samples": run.recipe.get("samples"),
        "seq_len": run.recipe.get("seq_len"),
        "calibration_tokens": run.identity.get("calibration_tokens"),
    }
    if known == asked:
        return
    change = next(differences(known, asked))
    if change.startswith("calibration_tokens"):
        change = (
            f"the text {without_folders(str(recipe.calibration))} has changed since"
        )
    raise RecipeError(
        f"{pruned} was made with another calibration text: {change}; give another --out, or the same text"
    )


def _run(
    pruned: Path,
    recipe: Recipe,
    dense: _Dense,
    progress: ProgressCallback,
    *,
    speed: bool,
) -> None:
    """Does what is not done yet of a cell: prunes it, packs it, and keeps its measurements in ``results.json``."""
    packed = packed_of(pruned)
    if not parallel.from_main(partial(_is_finished, pruned)):
        api.prune(dense.model, recipe, out=pruned, progress=progress)
    if not parallel.from_main(partial(_is_packed_from, packed, pruned)):
        make = partial(pack, pruned, out=packed, allow_copy=True)
        parallel.from_main(partial(make, progress=progress))
    evaluation = parallel.from_main(partial(dense.evaluation_in, packed))
    if evaluation is None:
        evaluation = dense.evaluate(packed, recipe, progress)
    directories = [packed]
    if recipe.values == "keep":  # else the pruned checkpoint is another model
        directories.append(pruned)

    def keep() -> None:
        for directory in directories:
            if dense.evaluation_in(directory) is None:
                api.keep_results(directory, [evaluation])
            elif is_behind(directory):
                api.keep_results(directory, [])

    parallel.from_main(keep)
    if speed and read_checkpoint(packed).decoding() is None:
        benchmark = compared_speed(packed, pruned, progress=progress)
        for directory in directories:
            api.keep_results(directory, [benchmark])


def _read(pruned: Path, dense: _Dense, *, speed: bool) -> Measured:
    """The measurements of a finished cell, as its directories have them."""
    checkpoint = read_checkpoint(packed_of(pruned))
    run = checkpoint.pruning
    evaluation = dense.evaluation_in(checkpoint.directory)
    assert evaluation is not None
    assert evaluation.against is not None
    against = evaluation.against
    decoding = checkpoint.decoding() if speed else None
    speeds = decoding[1] if decoding is not None else None
    return Measured(
        name=pruned.name,
        sparsity=run.sparsity_pruned,
        perplexity=evaluation.value,
        dense_perplexity=against.perplexity.value,
        kl=against.kl,
        agreement=against.agreement,
        recovery=against.perplexity.value / evaluation.value,
        packed_bytes=checkpoint.file_bytes,
        dense_bytes=run.base.bytes or 0,
        tokens_per_second=speeds.packed.median if speeds else None,
        dense_tokens_per_second=speeds.dense.median if speeds else None,
        transformers_tokens_per_second=speeds.transformers.median if speeds else None,
        seconds=sum(run.whole_seconds.values()),
        peak_rss=run.peak_rss_bytes,
    )


def _shown(
    place: Path, measured: Sequence[Measured], max_bytes: int | None
) -> Comparison:
    """The result of a comparison, after its page is written."""
    page = None
    if len(measured) > 1:
        packed = [packed_of(place / cell.name) for cell in measured]
        with contextlib.suppress(MissingExtraError):
            page = write_comparison(packed, place / PAGE, max_bytes=max_bytes)
    runs = [
        Candidate(cell.name, cell.recovery, cell.packed_bytes, cell.kl)
        for cell in measured
    ]
    taken = recommend(runs, None, max_bytes)
    return Comparison(
        out=place,
        page=page,
        recommended=taken.name if taken is not None else None,
        best_at_each_size=[run.name for run in best_at_each_size(runs)],
        cells=list(measured),
    )


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
    """The cells by name: every method at every sparsity, then with every pattern; each with
    every type of ``values``, every entry of ``experts`` and, if the method has a sweep, every effort. ``base`` gives
    the other settings: options to methods that have them, those of a sweep to methods with one. A RecipeError if no
    method, or neither sparsity nor pattern, is given, one is repeated or wrong, or no method has an option of base."""
    recipe = Recipe.of(base)
    if not methods or not (sparsities or patterns):
        raise RecipeError(
            "a comparison needs one method or more, and one sparsity or pattern or more"
        )
    entries = [METHODS[name] for name in methods]
    swept = [
        field
        for field in SWEEP
        if getattr(recipe, field) is not None or (field == "effort" and efforts)
    ]
    _check_base(recipe, entries, swept, values=values, efforts=efforts)
    cells: dict[str, Recipe] = {}
    targets: list[Settings] = [{"sparsity": sparsity} for sparsity in sparsities]
    targets += [{"pattern": pattern} for pattern in patterns]
    typed: list[Settings] = [{"values": kind} for kind in values] or [{}]
    fewer: list[Settings] = [{"experts": setting} for setting in experts] or [{}]
    for left, target, entry, kept in product(fewer, targets, entries, typed):
        known = entry.options.model_fields
        options = {key: value for key, value in recipe.options.items() if key in known}
        changes: Settings = {"method": entry.name, "options": options}
        changes |= target | kept | left
        sweeps: list[Settings] = [{"effort": effort} for effort in efforts] or [{}]
        if entry.effort is None:  # no sweep may follow this method
            sweeps = [dict.fromkeys(swept)]
        for sweep in sweeps:
            cell = recipe.updated(**changes, **sweep)
            name = _name_of(
                cell, with_effort=bool(efforts) and entry.effort is not None
            )
            if name in cells:
                raise RecipeError(
                    f"{name} is asked for twice; name each value of an option once"
                )
            cells[name] = cell
    return cells


def _check_base(
    recipe: Recipe,
    entries: Sequence[Entry[Any]],
    swept: Sequence[str],
    *,
    values: Sequence[str],
    efforts: Sequence[float],
) -> None:
    """Refuses settings for all cells that contradict the lists, or that no method has."""
    names = ", ".join(entry.name for entry in entries)
    if values and recipe.grid != "own":
        raise RecipeError(
            f"grid {recipe.grid} means values {recipe.values}; leave out values, or the grid"
        )
    for option in recipe.options:
        if not any(option in entry.options.model_fields for entry in entries):
            raise RecipeError(
                f"option {option} is known to none of the methods {names}; leave it out"
            )
    if swept and all(entry.effort is None for entry in entries):
        raise RecipeError(
            f"{swept[0]} is known to none of the methods {names}; leave it out"
        )
    if efforts and recipe.sweep_tokens is not None:
        raise RecipeError(
            "effort and sweep_tokens both say how long the sweep is; give one of them"
        )


def _name_of(recipe: Recipe, *, with_effort: bool) -> str:
    """The name of a cell's directory, such as ``sparsellm-0.5-effort2-int4``."""
    target = f"{recipe.sparsity:g}"
    if recipe.pattern is not None:
        target = recipe.pattern.replace(":", "-")
    parts = [recipe.method, target]
    if recipe.experts is not None:
        parts.append(f"experts{recipe.experts:g}")
    if with_effort:
        parts.append(f"effort{recipe.effort}")
    if recipe.values != "keep":
        parts.append(recipe.values)
    return "-".join(parts)
