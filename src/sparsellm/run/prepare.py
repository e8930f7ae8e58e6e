"""Preparation of a run: opens the model, reads the calibration windows, and refuses bad input before any work."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from sparsellm import parallel
from sparsellm.allocation import ALLOCATIONS, Allocation, Allocator, LinearSize
from sparsellm.allocation.fixed import divide
from sparsellm.calibration import Author, Text, calibration_windows, check_seq_len, leading_token, windows_of_ids
from sparsellm.chain import Chain, open_chain
from sparsellm.chain.linears import LinearView, iterate_linears
from sparsellm.chain.matrices import is_excluded, matches, outside_blocks, refuse_silent_dense, unmatched_patterns
from sparsellm.chain.open import check_vocabulary, load_tokenizer
from sparsellm.chain.products import Bf16Products, bf16_is_native
from sparsellm.chain.streams import check_forward, windows_of
from sparsellm.errors import DataError, RecipeError
from sparsellm.inputs.json_input import read_object
from sparsellm.machine import heap
from sparsellm.machine.devices import resolve_device
from sparsellm.methods import METHODS
from sparsellm.methods.task import Method
from sparsellm.patterns import Pattern, Unstructured
from sparsellm.progress import PhaseClock, Progress, ProgressCallback, plan_of_phases
from sparsellm.recipe import Recipe
from sparsellm.registry import Entry, Needs
from sparsellm.run.costs import predicted_seconds
from sparsellm.run.effort import Effort
from sparsellm.run.memory import checkpoint_bytes
from sparsellm.run.shared import Shared
from sparsellm.run.teacher import check_teacher, open_start
from sparsellm.solvers.rounding import ROUNDING
from sparsellm.sources.resolve import checkpoint_directory
from sparsellm.storage.destination import check_destination
from sparsellm.storage.reader import CheckpointReader
from sparsellm.storage.writer import count_zeros
from sparsellm.sweep.whole_model import STEP_TOKENS, SWEEP_SHARE, check_sweepable
from sparsepack.checkpoint import is_packed

if TYPE_CHECKING:
    from sparsellm.run.stages import Stage

DEFAULT_SEQ_LEN = 2048  # the window of the pruning papers


@dataclass(frozen=True)
class Request:
    """The arguments of :func:`sparsellm.prune`, documented there, and:

    Attributes:
        shared: what the run shares with others.
        name: of the model for reports, in place of the one that it was given by.
        stage: of a run of two stages; None for a run of one.
    """

    model: str | os.PathLike[str] | PreTrainedModel
    recipe: Recipe
    out: str | os.PathLike[str] | None = None
    calibration: Tensor | Text | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    overwrite: bool = False
    restart: bool = False
    trust_remote_code: bool = False
    teacher: str | os.PathLike[str] | None = None
    shared: Shared = field(default_factory=Shared)
    name: str = ""
    stage: Stage | None = None

    @property
    def dense(self) -> str | os.PathLike[str] | PreTrainedModel:
        """The dense model: the teacher if there is one, else the model itself."""
        return self.model if self.teacher is None else self.teacher


@dataclass(frozen=True)
class Choice:
    """The method and the allocation of a run, with all options, and their needs.

    Attributes:
        method: prunes each block.
        options: of the method, including defaults.
        needs: of the method, besides the walk.
        effort: of the sweep.
        allocator: chooses per-layer sparsities.
        allocation_options: of the allocation, including defaults.
        allocation_needs: of the allocation.
        allocates: whether the allocation is called: it is not uniform, and something is pruned.
    """

    method: Entry[Method]
    options: dict[str, Any]
    needs: Needs
    effort: Effort
    allocator: Entry[Allocator]
    allocation_options: dict[str, Any]
    allocation_needs: Needs
    allocates: bool

    @classmethod
    def of(cls, recipe: Recipe) -> Choice:
        """The method and allocation that a recipe names.

        Raises:
            RecipeError: a name or an option is unknown, or an option does not fit.
        """
        method = METHODS[recipe.method]
        options, effort = method.check(recipe.options), Effort.of(recipe)
        allocator = ALLOCATIONS[recipe.allocation_by(method.allocation)]
        allocation_options = allocator.check(recipe.allocation_options)
        allocates = allocator.name != "uniform" and recipe.sparsity != 0
        allocation_needs = allocator.needs_of(allocation_options) if allocates else Needs()
        needs = method.needs_of(options)
        return cls(method, options, needs, effort, allocator, allocation_options, allocation_needs, allocates)

    def on(self, patterns: dict[str, Pattern], values: str) -> Choice:
        """The same choice, without needs that are useless for these patterns, and with those of integer values."""
        needs, pruned = self.needs, any(pattern.sparsity for pattern in patterns.values())
        effort = self.effort
        if values != "keep":
            workspace = needs.workspace.beside(ROUNDING)
            needs = replace(needs, workspace=workspace, output_costs=needs.output_costs and pruned)
        elif not pruned:
            needs, effort = Needs(), Effort()  # no weight changes, so nothing has to be compensated
        if not any(isinstance(pattern, Unstructured) for pattern in patterns.values()):
            needs = replace(needs, output_costs=False)  # in N:M, weights of different outputs do not compete
        return replace(self, needs=needs, effort=effort)

    def check_processes(self, samples: int) -> None:
        """Checks that the run can be divided among the processes that were started.

        Raises:
            RecipeError: the method or an option runs in one process only, or there are fewer windows than processes.
        """
        size = parallel.size()
        if size == 1:
            return
        name = self.method.name
        if not self.method.distributed:
            raise RecipeError(f"method {name} runs in one process, not in {size}; start it without torchrun")
        if self.needs.one_process:
            raise RecipeError(
                f"option {self.needs.one_process} of {name} runs in one process, not in {size}; leave it out, or "
                "start without torchrun"
            )
        if samples < size:
            raise RecipeError(
                f"{samples} calibration windows cannot be divided among {size} processes; "
                f"ask for {size} samples or more, or start fewer processes"
            )


@dataclass(frozen=True)
class Prepared:
    """A run that has been checked and can start.

    Attributes:
        request: the arguments.
        out: the directory to write, absolute and without links; None for a model that is pruned in memory only.
        recipe: with the actual number and length of the calibration windows.
        choice: method and allocation.
        chain: the dense model.
        start: the weights to prune, if they are not those of the dense model.
        directory: of the dense model's checkpoint; None for a model given as an object.
        in_memory: the model that is pruned in memory; None if it is read and written block by block.
        tokenizer: saved with a model given as an object; else None.
        windows: calibration token ids ``(samples, seq)`` of all processes.
        others: further sets of calibration windows ``(sets - 1, samples, seq_len)``: blocks take statistics of all sets
            in turn. There may be none.
        fresh: further windows, for sweeps; there may be none.
        passes: sweeps of all stages.
        bos: whether every window begins with BOS: ``yes`` or ``no``, or ``given`` for token ids that the user passed.
        warnings: messages for the user.
    """

    request: Request
    out: Path | None
    recipe: Recipe
    choice: Choice
    chain: Chain
    start: CheckpointReader | None
    directory: Path | None
    in_memory: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase | None
    windows: Tensor
    others: Tensor
    fresh: Tensor
    passes: int
    bos: str
    warnings: list[str]

    @property
    def own_windows(self) -> Tensor:
        """This process's share of the calibration windows."""
        return self._own(self.windows)

    @property
    def calibration_sets(self) -> list[Tensor]:
        """This process's share of each set of calibration windows."""
        return [self.own_windows, *map(self._own, self.others)]

    @cached_property
    def sweep_windows(self) -> list[Tensor]:
        """This process's share of the windows of each sweep: new ones as far as there are any, then those of the
        statistics, which the pruned weights fit already."""
        size = windows_of_sweep(len(self.windows))
        fresh = [part for part in self.fresh.split(size) if 2 * len(part) >= size]
        known = [] if fresh and len(fresh) == self.passes else [self.windows]
        lead = int(self.windows[0, 0]) if self.bos == "yes" else None
        return [self._own(cut(part, lead) if self.bos != "given" else part) for part in (*fresh, *known)]

    def _own(self, windows: Tensor) -> Tensor:
        unit = windows_of(self.recipe.batch_tokens, windows.shape[1])
        return windows[parallel.share(len(windows), unit)]


def prepare(request: Request, clock: PhaseClock, progress: ProgressCallback) -> Prepared:
    """Opens the model and reads the calibration text.

    Raises:
        SparseLLMError: model, text, recipe or destination are wrong in a way that shows before the work.
    """
    recipe, whole = request.recipe, request.out is None
    choice = Choice.of(recipe)
    choice.check_processes(len(request.calibration) if isinstance(request.calibration, Tensor) else recipe.samples)
    check_teacher(request.model, request.teacher, request.out)
    destination(request)
    with clock.phase("open"):
        progress(Progress("open", 0, 1))
        given = _directory(request, request.model)
        directory = given if request.teacher is None else _directory(request, request.teacher, "teacher")
        chain, in_memory = open_model(request.dense, directory, recipe, request.trust_remote_code, whole=whole)
        tokenizer = request.tokenizer
        if tokenizer is None and directory is not None and not isinstance(request.calibration, Tensor):
            tokenizer = load_tokenizer(directory, trust_remote_code=request.trust_remote_code)
        bos = "given"
        if tokenizer is not None and not isinstance(request.calibration, Tensor):
            bos = "no" if leading_token(tokenizer, recipe.bos) is None else "yes"
        start = None
        if request.teacher is not None:
            assert given is not None  # check_teacher refuses models in memory
            assert directory is not None
            trust, texts = request.trust_remote_code, not isinstance(request.calibration, Tensor)
            start = open_start(chain, given, directory, trust=trust, tokenizers=texts)
        # The first of two stages keeps its values, and needs what the second does: that is refused before the work.
        values = recipe.values if request.stage is None else request.stage.asked.values
        choice = choice.on(plan(chain, recipe), values)
        if choice.effort.passes:
            check_sweepable(chain)
        sources = [each for each in (given, directory) if each is not None] or _loaded_from(request.model)
        out = destination(request, sources=sources, need_bytes=disk_bytes(chain, choice, request.stage))
    with clock.phase("calibration"):
        # Sweeps take new windows, on which the dense model runs: a model in memory is not dense any more.
        passes = choice.effort.passes if request.stage is None else request.stage.passes
        sets = passes if chain.reader is not None else 0
        progress(_expected(chain, choice, recipe, sets))
        progress(Progress("calibration", 0, 1))
        more = partial(_windows, request, chain, directory, tokenizer, progress, choice.effort.sets - 1, sets)
        windows, others, fresh = parallel.from_main(more)
        token_states = choice.needs.token_states or choice.allocation_needs.token_states
        check_forward(chain, windows, token_states=token_states)
        heap.trim()
    recipe = recipe.updated(samples=len(windows), seq_len=windows.shape[1])
    choice.check_processes(len(windows))  # there may be fewer than requested
    beside = tokenizer if directory is None else None  # a directory's own files are copied
    warnings = unmatched_patterns(chain, {"exclude": recipe.exclude, "only": recipe.only}, recipe.allow_dense)
    warnings += outside_blocks(chain)
    warnings += _fewer_sets(choice.effort.sets, 1 + len(others), given=isinstance(request.calibration, Tensor))
    if start is not None and not choice.effort.passes:
        warnings.append("no sweep follows, so the teacher changes no weight; it is what the report compares with")
    warnings += [
        f"sparsity_of {pattern!r} matches no pruned linear"
        for pattern in recipe.sparsity_of
        if not any(matches(linear.weight_name, [pattern]) for _, linear in _pruned(chain, recipe))
    ]
    return Prepared(
        request,
        out,
        recipe,
        choice,
        chain,
        start,
        directory,
        in_memory,
        beside,
        windows,
        others,
        fresh,
        passes,
        bos,
        warnings,
    )


def open_model(
    model: str | os.PathLike[str] | PreTrainedModel, directory: Path | None, recipe: Recipe, trust: bool, *, whole: bool
) -> tuple[Chain, PreTrainedModel | None]:
    """A chain over a model, and the model itself if it is in memory.

    Args:
        model: as in :func:`sparsellm.prune`.
        directory: of its checkpoint; None for a model given as an object.
        recipe: for device, dtype and products.
        trust: whether modelling code of the checkpoint may run.
        whole: load the whole checkpoint into memory.

    Raises:
        RecipeError: the recipe sets device or dtype for a model that is in memory already.
    """
    device = resolve_device(parallel.own_device(recipe.device))
    dtype = None if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    if isinstance(model, PreTrainedModel):
        if recipe.device != "auto" or dtype is not None:
            raise RecipeError("a model given as an object is pruned where and as it is: leave device and dtype 'auto'")
        chain, loaded = open_chain(model, device=device), model
    else:
        assert directory is not None
        chain, loaded = open_chain(directory, device=device, dtype=dtype, trust_remote_code=trust), None
        if whole:
            loaded = _load_whole(directory, chain.dtype, device, trust)
            chain = open_chain(loaded, device=device)
    native = chain.device.type == "cpu" and bf16_is_native()
    if recipe.products == "bfloat16" or (recipe.products == "auto" and native):
        chain.products = Bf16Products()
    return chain, loaded


def plan(chain: Chain, recipe: Recipe, allocation: Allocation | None = None) -> dict[str, Pattern]:
    """The pattern of every linear that will be pruned, by name.

    Args:
        chain: the model.
        recipe: for the pattern, ``exclude``, ``allow_dense``, ``only`` and ``sparsity_of``.
        allocation: the zeros of each linear; None for the recipe's pattern in every linear that ``sparsity_of`` does
            not name.

    Raises:
        RecipeError: the pattern does not fit a weight, no linear is left to prune, or ``sparsity_of`` does not go with
            the sparsity.
        ModelError: a large part of a block is not in linears, and the recipe does not accept that it stays dense.
    """
    patterns: dict[str, Pattern] = {}
    sizes = sizes_of(chain, recipe)
    if allocation is None and any(linear.fixed is not None for linear in sizes):
        allocation = divide(sizes, recipe.sparsity).allocation()
    for linear in sizes:
        zeros = allocation.zeros[linear.name] if allocation is not None else None
        patterns[linear.name] = recipe.pattern_of(linear.weights, zeros)
        patterns[linear.name].validate(linear.shape, f"{linear.name}.weight")
    if not patterns:
        named = [f"{field} {value}" for field in ("only", "exclude") if (value := getattr(recipe, field))]
        who = " with ".join(named) or "the model"
        raise RecipeError(f"{who} leaves nothing to prune; `sparsellm inspect` lists the names of linears")
    if recipe.sparsity:  # at 0, no pruning was requested
        refuse_silent_dense(chain, [*recipe.exclude, *recipe.allow_dense], recipe.only)
    return patterns


def sizes_of(chain: Chain, recipe: Recipe) -> list[LinearSize]:
    """The linears to prune, in the order of the chain."""
    sizes = []
    for index, linear in _pruned(chain, recipe):
        shape, sparsity = (linear.out_features, linear.in_features), _fixed(linear.weight_name, recipe)
        fixed = None if sparsity is None else round(sparsity * math.prod(shape))
        sizes.append(LinearSize(linear.name, index, shape, fixed))
    return sizes


def _pruned(chain: Chain, recipe: Recipe) -> Iterator[tuple[int, LinearView]]:
    """Each linear that is pruned, with the number of its block."""
    for index in range(len(chain)):
        for linear in chain.linears(index):
            if not is_excluded(linear.weight_name, recipe.exclude, recipe.only):
                yield index, linear


def _fixed(weight: str, recipe: Recipe) -> float | None:
    """The sparsity that ``sparsity_of`` sets for a weight, by its last pattern that matches; None if none does."""
    values = [value for pattern, value in recipe.sparsity_of.items() if matches(weight, [pattern])]
    return values[-1] if values else None


def disk_bytes(chain: Chain, choice: Choice, stage: Stage | None = None) -> int:
    """Disk space for the checkpoint, for the walk's blocks, which are kept until the end if a sweep follows, and for
    the first stage if another one follows."""
    copies = (2 if choice.effort.passes else 1) if stage is None else stage.copies
    return checkpoint_bytes(chain) * copies


def default_seq_len(chain: Chain) -> int:
    """2048 tokens, or the number of the model's positions if that is less."""
    limit = getattr(chain.config.get_text_config(), "max_position_embeddings", None)
    return min(DEFAULT_SEQ_LEN, limit) if isinstance(limit, int) and limit > 0 else DEFAULT_SEQ_LEN


def already_pruned(chain: Chain) -> str | None:
    """A warning if a fifth of the weights of the first block are zero, since dense weights have hardly any zeros."""
    zeros = weights = 0
    with chain.block(0) as block:
        for _, module in iterate_linears(block, chain.block_names[0]):
            weight = module.weight
            assert isinstance(weight, Tensor)
            zeros, weights = zeros + count_zeros(weight), weights + weight.numel()
    if zeros < 0.2 * weights:
        return None
    return f"the model is already pruned: {zeros / weights:.1%} of the weights of block 1 are zero; pruning it further"


def _directory(
    request: Request, model: str | os.PathLike[str] | PreTrainedModel, argument: str = "model"
) -> Path | None:
    """The directory of a checkpoint, fetched or converted first if needed; None for a model given as an object."""
    if isinstance(model, PreTrainedModel):
        return None
    directory = parallel.main_first(lambda: checkpoint_directory(str(model), argument))
    destination(request, sources=[directory])
    if request.out is None and is_packed(read_object(directory / "config.json")):
        raise RecipeError(f"{directory} is packed, and a packed model is not pruned in memory; give out=DIR")
    return directory


def destination(request: Request, *, sources: Sequence[Path] = (), need_bytes: int = 0) -> Path | None:
    """The directory of the result, resolved and checked by the first process; None if the result stays in memory."""
    if request.out is None:
        return None
    check = partial(check_destination, request.out, overwrite=request.overwrite, restart=request.restart)
    return Path(parallel.from_main(partial(check, sources=sources, need_bytes=need_bytes)))


def _loaded_from(model: object) -> list[Path]:
    """The directory that a model in memory was loaded from; the result must not replace it."""
    name = getattr(model, "name_or_path", "")
    return [Path(name)] if name and Path(name).is_dir() else []


def _expected(chain: Chain, choice: Choice, recipe: Recipe, sets: int) -> Progress:
    """The prediction of the phases, before the calibration windows are known; ``sets`` as of :func:`_windows`."""
    seq_len = recipe.seq_len or default_seq_len(chain)
    tokens = recipe.samples * seq_len
    more = (choice.effort.sets - 1) * recipe.samples + sets * windows_of_sweep(recipe.samples)
    written = tokens + more * seq_len if recipe.calibration == "self" else 0
    return plan_of_phases(predicted_seconds(chain, choice, tokens // parallel.size(), seq_len, written=written))


def _windows(
    request: Request,
    chain: Chain,
    directory: Path | None,
    tokenizer: PreTrainedTokenizerBase | None,
    progress: ProgressCallback,
    others: int,
    sweeps: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The calibration windows, up to ``others`` sets of as many more, and windows for up to so many sweeps."""
    if isinstance(request.calibration, Tensor):
        windows = windows_of_ids(request.calibration, chain.config, bos=request.recipe.bos)
        return check_vocabulary(windows, chain.config), windows.new_empty(0, *windows.shape), windows[:0]
    recipe = request.recipe
    seq_len = recipe.seq_len or default_seq_len(chain)
    check_seq_len(chain.config, seq_len)
    if tokenizer is None:
        raise DataError("a model given as an object needs tokenizer=..., or token ids as calibration")

    def say(done: int, total: int) -> None:
        progress(Progress("calibration", done, total, "the model writes its text"))

    source = request.calibration or recipe.calibration
    further = others * recipe.samples + sweeps * windows_of_sweep(recipe.samples)

    def draw() -> Tensor:
        with _model_that_writes(chain, recipe, directory) as dense:
            return calibration_windows(
                source,
                tokenizer,
                recipe.samples,
                seq_len,
                recipe.seed,
                Author(dense, say) if dense is not None else None,
                recipe.bos,
                further,
            )

    settings = (recipe.samples, seq_len, recipe.seed, recipe.bos, further)
    named = source if isinstance(source, str) else id(source)  # the request keeps the text alive
    key = (str(directory), named, settings, chain.dtype, chain.device.type)
    windows = check_vocabulary(request.shared.windows_of(key, draw), chain.config, tokenizer)
    windows, rest = windows[: recipe.samples], windows[recipe.samples :]
    others = min(others, len(rest) // max(1, len(windows)))
    taken = others * len(windows)
    new = rest[taken : taken + sweeps * windows_of_sweep(len(windows))]
    return windows, rest[:taken].view(others, *windows.shape), new


def _fewer_sets(wanted: int, sets: int, *, given: bool) -> list[str]:
    """A warning if the text has no room for the sets of calibration windows that are wanted. Token ids are one set."""
    if given or sets >= wanted:
        return []
    return [
        f"the calibration text has room for {sets} of {wanted} sets of windows (sets); a longer text gives a "
        "better model"
    ]


def windows_of_sweep(samples: int) -> int:
    """The windows that a sweep runs on, of a run with so many calibration windows."""
    return math.ceil(SWEEP_SHARE * samples)


def cut(windows: Tensor, lead: int | None) -> Tensor:
    """Windows cut to the tokens of a step of the sweep; what is left at their ends is dropped.

    Args:
        windows: token ids ``(windows, seq)``.
        lead: the id that every part begins with, in place of its first token; None for none.

    Returns:
        ``(more windows, STEP_TOKENS)``, or the windows if they are less than two steps long.
    """
    parts = windows.shape[1] // STEP_TOKENS
    if parts < 2:
        return windows
    shorter = windows[:, : parts * STEP_TOKENS].reshape(-1, STEP_TOKENS).clone()
    if lead is not None:
        shorter[:, 0] = lead
    return shorter


@contextlib.contextmanager
def _model_that_writes(chain: Chain, recipe: Recipe, directory: Path | None) -> Iterator[PreTrainedModel | None]:
    """The whole dense model if it writes the calibration text itself; else None."""
    if recipe.calibration != "self":
        yield None
    elif directory is None:
        yield chain.model
    else:
        yield _load_whole(directory, chain.dtype, chain.device, trust=False)


def _load_whole(directory: Path, dtype: torch.dtype, device: torch.device, trust: bool) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, trust_remote_code=trust, use_safetensors=True)
    assert isinstance(model, PreTrainedModel)
    torch.nn.Module.to(model, device)
    return model
