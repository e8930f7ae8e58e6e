"""What a Python user imports: :func:`prune`, :func:`evaluate`, :func:`inspect`."""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import os
import platform
import resource
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from sparsellm import __version__, parallel
from sparsellm.allocation import ALLOCATIONS, Allocation, Allocator, LinearSize, Survey
from sparsellm.allocation.base import pattern_of
from sparsellm.allocation.survey import windows_of
from sparsellm.arguments import CHECKPOINT, as_recipe, checked_arguments
from sparsellm.calibration import (
    Text,
    TextGiven,
    as_text,
    calibration_windows,
    check_seq_len,
    evaluation_windows,
    settle_calibration,
    windows_of_ids,
)
from sparsellm.chain import Chain, open_chain
from sparsellm.chain.linears import iterate_linears
from sparsellm.chain.open import checkpoint_directory, load_tokenizer
from sparsellm.devices import resolve_device
from sparsellm.errors import DataError, NumericalError, RecipeError, SparseLLMError
from sparsellm.evaluation.perplexity import Perplexity
from sparsellm.evaluation.streamed import streamed_perplexity
from sparsellm.fingerprint import model_fingerprint, tokens_fingerprint
from sparsellm.memory import MemoryPlan, give_back_freed, plan_memory
from sparsellm.methods import METHODS, LinearResult
from sparsellm.methods.base import Method
from sparsellm.patterns import NM, Pattern, Unstructured, detect
from sparsellm.progress import NOTE, PhaseClock, Progress, ProgressCallback, ignore
from sparsellm.recipe import Recipe
from sparsellm.refine.gradients import TOKENS, WORKSPACE, output_gradient_squares
from sparsellm.refine.sweep import SWEPT_COPIES, Pass, Sweep, check_sweepable, sweep
from sparsellm.refine.sweep_state import SweepState, state_bytes
from sparsellm.registry import Entry, Needs
from sparsellm.storage.packed import is_packed, read_config
from sparsellm.storage.reader import CheckpointReader
from sparsellm.storage.resume import FOLDER, has_kept, unfinished
from sparsellm.storage.scratch import Scratch
from sparsellm.storage.shard import TensorSource
from sparsellm.storage.writer import CheckpointWriter, check_out, count_zeros, partial_of, shard_names
from sparsellm.streams import PIECE_TOKENS, windows_in_batch
from sparsellm.walk import FinishedBlock, selected_linears, walk

DEFAULT_SEQ_LEN = 2048  # the window of the pruning papers
ALLOCATION, OUTPUT_COSTS = "allocation", "output-costs"  # names under which a run keeps them


@dataclass
class PruneResult:
    """What a pruning run did.

    Attributes:
        path: the finished checkpoint, or None if the model was pruned in memory only.
        model: the pruned model if it is in memory, else None.
        recipe: all settings, as used.
        linears: what became of each pruned linear.
        seconds: wall-clock seconds of each phase; ``prune/statistics`` and ``prune/solve`` are parts of ``prune``.
        peak_rss: the most memory that one process, of this run or of an earlier start of it, has held, in bytes.
        calibration_tokens: tokens the statistics come from.
        versions: of Python and the libraries that shape the result.
        warnings: what the user should know.
        command: the command line that ran.
        memory: what was predicted before the start, of the first process.
        resumed: blocks that an earlier process had finished.
        allocation: how sparsities were chosen, where they are not uniform: ``name``, and what that allocation tells;
            for ``auto`` the table of its trials.
        sweeps: of the whole model at the end, if the method asks for them: divergence from the dense model after each.
        processes: that ran together.
    """

    path: Path | None
    model: PreTrainedModel | None
    recipe: Recipe
    linears: list[LinearResult]
    seconds: dict[str, float]
    peak_rss: int
    calibration_tokens: int
    versions: dict[str, str] = field(default_factory=lambda: versions())
    warnings: list[str] = field(default_factory=list)
    command: str = field(default_factory=lambda: shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]))
    memory: MemoryPlan | None = None
    resumed: int = 0
    sweeps: list[Pass] = field(default_factory=list)
    allocation: dict[str, Any] = field(default_factory=dict)
    processes: int = 1

    @property
    def zeros(self) -> int:
        return sum(linear.zeros for linear in self.linears)

    @property
    def weights(self) -> int:
        """Weights in all pruned linears."""
        return sum(linear.shape[0] * linear.shape[1] for linear in self.linears)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over all pruned linears."""
        return self.zeros / self.weights if self.weights else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values; what ``--json`` prints and ``pruning.json`` holds."""
        return {
            "format": 1,
            "path": str(self.path) if self.path else None,
            "sparsity_asked": self.recipe.sparsity,
            "sparsity_reached": self.sparsity,
            "zeros": self.zeros,
            "weights": self.weights,
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "peak_rss_bytes": self.peak_rss,
            "memory": self.memory.to_dict() if self.memory else None,
            "calibration_tokens": self.calibration_tokens,
            "processes": self.processes,
            "seed": self.recipe.seed,
            "recipe": self.recipe.model_dump(),
            "versions": self.versions,
            "command": self.command,
            "warnings": self.warnings,
            "allocation": self.allocation,
            "sweeps": [asdict(record) for record in self.sweeps],
            "linears": [linear.to_dict() for linear in self.linears],
        }


@checked_arguments()
def prune(
    model: str | os.PathLike[str] | PreTrainedModel,
    recipe: Recipe | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    calibration: TextGiven | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
    restart: bool = False,
    trust_remote_code: bool = False,
    progress: ProgressCallback = ignore,
) -> PruneResult:
    """Prunes a model block by block.

    What a run that was cut short has written to ``out`` is found again: the blocks that are done are not pruned anew,
    and the result is the same to the bit.

    A model given by name is read from disk one block at a time and written to ``out`` one block at a time. A model
    given as an object is pruned in place, where it is, and also saved if ``out`` is given. A model given by name with
    no ``out`` is loaded whole and returned in ``result.model``.

    Where torch.distributed has been initialised with several processes, all of them must call this with the same
    arguments: they divide the calibration windows and the rows of each weight, the first writes and reports, and all
    end up with the same model.

    Args:
        model: a checkpoint directory, a hub id, a ``.gguf`` file, ``demo``, or a transformers model.
        recipe: what to do: a recipe, a mapping of its fields, or the path of a YAML file; ``Recipe()`` if None.
        out: the directory of the pruned checkpoint.
        calibration: in place of the recipe's: a text source, the path of a file, token ids ``(samples, seq)`` as a
            tensor, an array or lists of one length, or a data set with a column ``text`` or ``input_ids``.
        tokenizer: needed only for a model given as an object; not at all if ``calibration`` is token ids.
        overwrite: replace the checkpoint in ``out``.
        restart: begin anew where an unfinished run into ``out`` has left something.
        trust_remote_code: run modelling code that comes with the checkpoint.
        progress: is told how far the run is.

    Raises:
        SparseLLMError: of the kind that names the trouble; all that can be known before the work starts is checked
            before the work starts.
    """
    calibration = as_text(calibration, "calibration", "calibration") if calibration is not None else None
    recipe = settle_calibration(as_recipe(recipe), calibration)
    method = METHODS[recipe.method]
    options = method.check(recipe.options)
    allocator = ALLOCATIONS[recipe.allocation_by(method.allocation)]
    allocation_options = allocator.check(recipe.allocation_options)
    allocating = allocator.needs_of(allocation_options)
    allocates = allocator.name != "uniform" and recipe.sparsity != 0
    needs = method.needs_of(options)
    _check_processes(method, needs, len(calibration) if isinstance(calibration, Tensor) else recipe.samples)
    if not parallel.is_main():
        progress = ignore
    device = resolve_device(parallel.own_device(recipe.device))
    clock = PhaseClock()
    warnings: list[str] = []
    out = Path(out) if out is not None else None
    if out is not None:
        _check_room(out, overwrite, 0)
    with clock.phase("open"):
        progress(Progress("open", 0, 1, "opening the model"))
        directory = None
        if not isinstance(model, PreTrainedModel):
            directory = parallel.main_first(lambda: checkpoint_directory(str(model)))
        if directory is not None and out is not None and out.absolute() == directory.absolute():
            raise SparseLLMError(f"--out {out} is the model itself; name another directory")
        if directory is not None and out is None and is_packed(read_config(directory)):
            raise RecipeError(f"{directory} is packed, and a packed model is not pruned in memory; give out=DIR")
        if tokenizer is None and directory is not None and not isinstance(calibration, Tensor):
            tokenizer = load_tokenizer(directory, trust_remote_code=trust_remote_code)
        chain, memory_model = _open(model, directory, recipe, device, in_memory=out is None, trust=trust_remote_code)
        patterns = plan(chain, recipe)  # refuses what does not fit
        if not any(pattern.sparsity for pattern in patterns.values()):
            needs = Needs()  # nothing is lost, so nothing is to be made up for
        if not any(isinstance(pattern, Unstructured) for pattern in patterns.values()):
            needs = replace(needs, output_costs=False)  # within a group of N:M, weights of one output compete
        if needs.passes:
            check_sweepable(chain)
        need_bytes = _checkpoint_bytes(chain) * (2 if needs.passes else 1)  # the walk's blocks stay until the end
        if out is not None:
            _check_room(out, overwrite, need_bytes)
    with clock.phase("calibration"):
        progress(Progress("calibration", 0, 1, "reading the calibration text"))
        windows = parallel.from_main(partial(_windows, chain, recipe, calibration, tokenizer, directory, progress))
        if directory is not None:
            tokenizer = None  # its files are copied
        give_back_freed()
        recipe = recipe.updated(samples=len(windows), seq_len=windows.shape[1])
        _check_processes(method, needs, len(windows))  # there may be fewer than were asked for
        own = windows[parallel.share(len(windows), windows_in_batch(recipe.batch_tokens, windows.shape[1]))]
    read_ahead = chain.weights is not None and (
        chain.device.type == "cuda" if recipe.read_ahead is None else recipe.read_ahead
    )
    partial_run = partial_of(out) if out is not None and not restart else None  # that may be gone on with
    known, costs_known = (
        partial_run is not None and has_kept(partial_run, name) for name in (ALLOCATION, OUTPUT_COSTS)
    )
    cost_windows = windows[: windows_of(allocating.gradient_tokens or TOKENS, windows.shape[1])]
    surveyed, gradient_tokens = _surveyed(
        allocating if allocates and not known else None,
        len(cost_windows) if needs.output_costs and not costs_known else 0,
        windows,
    )
    if not parallel.is_main():
        surveyed = gradient_tokens = 0
    workspace = method.workspace.beside(needs.workspace).beside(allocator.workspace)
    if gradient_tokens:
        workspace = workspace.beside(WORKSPACE)
    memory = parallel.together(
        partial(
            plan_memory,
            chain,
            max(surveyed, len(own)),
            windows.shape[1],
            recipe.batch_tokens,
            workspace,
            budget=recipe.memory,
            swept_copies=SWEPT_COPIES if needs.passes else 0,
            sharers=parallel.on_this_machine(),
            read_ahead=read_ahead,
            gradient_tokens=gradient_tokens,
        )
    )
    on_disk = int(parallel.total(memory.hidden_on_disk))
    progress(Progress(NOTE, 1, 1, str(memory)))
    with clock.phase("check"):
        progress(Progress("check", 0, 1, "checking the weights"))

        def check() -> None:
            if out is None or restart or not unfinished(partial_of(out)):  # else they were checked when the run began
                _check_finite(chain)

        parallel.from_main(check)
        already = _already_pruned(chain)
        if already is not None:
            warnings.append(already)
            progress(Progress("check", 1, 1, already))
    with contextlib.ExitStack() as held:
        writer: CheckpointWriter | None = None  # of the first process alone
        finished: list[FinishedBlock] = []
        peaks = [0]
        # Of the model before it is pruned, which may be in place.
        chosen = ((method, options), (allocator, allocation_options))
        identity = parallel.from_main(lambda: _identity(chain, recipe, *chosen, windows))
        shards: list[Path] = []  # of the blocks that the walk writes, for every process to read
        state: SweepState | None = None  # of the sweeps, if there are any
        if out is not None:
            open_writer = partial(CheckpointWriter, out, shards=len(chain) + 1, identity=identity, overwrite=overwrite)
            writer = _in_main(lambda: held.enter_context(open_writer(restart=restart, need_bytes=need_bytes + on_disk)))
            shards = [partial_of(out) / name for name in shard_names(len(chain) + 1)]
            if needs.passes:
                state = _sweep_state(chain, out, writer, need_bytes + on_disk, progress)
            records = parallel.from_main(lambda: _finished(writer, chain, progress) if writer is not None else [])
            for facts in records:
                clock.add(facts["seconds"])
                peaks.append(facts["peak_rss"])
            warnings += _other_versions(records)
            finished = [
                FinishedBlock(_reader(shards[index]), [LinearResult.from_dict(values) for values in facts["linears"]])
                for index, facts in enumerate(records)
            ]
            if writer is not None and writer.finished(len(chain)) is None:
                writer.write_shard(len(chain), chain.outer_tensors())
        scratch = Scratch(memory.hidden_in_memory, partial_of(out) if out is not None else None)
        with clock.phase("allocation"):
            allocation = None
            if allocates:
                allocate = partial(allocator.function, **allocation_options)
                found = partial(
                    _allocated, chain, recipe, allocate, windows, writer, scratch, progress, needs.output_costs
                )
                allocation = parallel.main_alone(found)
        patterns = plan(chain, recipe, allocation)
        costs: dict[str, Tensor] = {}
        if needs.output_costs and len(finished) < len(chain):
            costs = allocation.output_costs if allocation is not None else {}
            if not costs:
                with clock.phase("gradients"):
                    find = partial(_output_costs, chain, recipe, cost_windows, writer, scratch, progress)
                    costs = parallel.main_alone(find)
        clock.lap()

        def write_block(index: int, tensors: dict[str, TensorSource], results: list[LinearResult]) -> None:
            assert writer is not None
            facts = {"linears": [result.to_dict() for result in results], "versions": _conditions()}
            writer.write_shard(index, tensors, {**facts, "seconds": clock.lap(), "peak_rss": peak_rss()})

        walked = walk(
            chain,
            own,
            method.function,
            options,
            patterns,
            batch_tokens=recipe.batch_tokens,
            write_block=write_block if writer is not None else None,
            clock=clock,
            progress=progress,
            name=recipe.method,
            seed=recipe.seed,
            scratch=scratch,
            finished=finished,
            dense_stream=needs.dense_stream,
            pieces=needs.pieces,
            output_costs=costs,
            read_ahead=read_ahead,
        )
        sweeps: list[Pass] = []
        walk_writer = writer
        if needs.passes:
            assert walked.dense is not None
            if out is not None:
                follow = partial(open_writer, need_bytes=_checkpoint_bytes(chain), follows=walk_writer)
                writer = _in_main(lambda: held.enter_context(follow()))  # and now all shards are there for all to read
            reached = state.reached if state is not None else None
            if reached is not None:
                clock.add({"sweep": reached.facts["seconds"]})
                peaks.append(reached.facts["peak_rss"])
            began = time.perf_counter() - clock.seconds.get("sweep", 0.0)

            def so_far() -> dict[str, Any]:
                return {"seconds": time.perf_counter() - began, "peak_rss": max(peak_rss(), *peaks)}

            zeros: dict[str, int] = {}

            def write_swept(index: int) -> None:
                zeros.update({linear.name: count_zeros(linear.parameter) for linear in chain.linears(index)})
                if writer is not None:
                    writer.write_shard(index, chain.block_tensors(index))

            with clock.phase("sweep"):
                sweeps = sweep(
                    chain,
                    own,
                    walked.dense.hidden,
                    Sweep(needs.passes, needs.learning_rate),
                    blocks=[_reader(shard) for shard in shards[: len(chain)]] or None,
                    batch_tokens=recipe.batch_tokens,
                    scratch=scratch,
                    seed=recipe.seed,
                    progress=progress,
                    write_block=write_swept,
                    state=state,
                    facts=so_far,
                )
            walked.dense.close()
            walked = replace(walked, linears=[replace(each, zeros=zeros[each.name]) for each in walked.linears])
            if writer is not None:
                writer.write_shard(len(chain), chain.outer_tensors())
        result = PruneResult(
            None if out is None else out.absolute(),
            memory_model,
            recipe,
            walked.linears,
            clock.seconds,
            max(parallel.gather(max(peak_rss(), *peaks))),
            windows.numel(),
            warnings=warnings,
            memory=memory,
            resumed=len(finished),
            sweeps=sweeps,
            allocation={"name": allocator.name, **allocation.report} if allocation is not None else {},
            processes=parallel.size(),
        )

        def finish() -> None:
            if writer is not None:
                _write_companions(writer, chain, directory, tokenizer)
                writer.write_text("recipe.yaml", recipe.to_yaml())
                writer.write_json("pruning.json", result.to_dict())
                writer.finish()

        parallel.barrier()  # nobody reads the walk's blocks any more, which go now
        parallel.from_main(finish)  # and the checkpoint has its name before any process goes on
    return result


def _check_processes(method: Entry[Method], needs: Needs, samples: int) -> None:
    size = parallel.size()
    if size == 1:
        return
    if not method.distributed:
        raise RecipeError(f"method {method.name} runs in one process, not in {size}; start it without torchrun")
    if needs.one_process:
        raise RecipeError(
            f"option {needs.one_process} of {method.name} runs in one process, not in {size}; leave it out, or start "
            "without torchrun"
        )
    if samples < size:
        raise RecipeError(
            f"{samples} calibration windows cannot be divided among {size} processes; "
            f"ask for {size} samples or more, or start fewer processes"
        )


def _check_room(out: Path, overwrite: bool, need_bytes: int) -> None:
    """By the first process, which puts away what an earlier run has left."""
    parallel.from_main(partial(check_out, out, overwrite=overwrite, need_bytes=need_bytes))


def _in_main(make: Callable[[], CheckpointWriter]) -> CheckpointWriter | None:
    """What the first process makes and keeps to itself; if it fails, all do."""
    made: list[CheckpointWriter] = []
    parallel.from_main(lambda: made.append(make()))
    return made[0] if made else None


def _sweep_state(
    chain: Chain, out: Path, writer: CheckpointWriter | None, beside: int, progress: ProgressCallback
) -> SweepState | None:
    """Where the passes of a sweep are saved; None where the disk has no room for them.

    Args:
        chain, out, writer: of the run.
        beside: bytes of disk that the run takes for other things; what its blocks have taken already is taken off.
        progress: is told if there is no room.
    """
    state = SweepState(partial_of(out) / FOLDER, len(chain), writer.state if writer is not None else None)
    blocks = [chain.block_tensors(index).values() for index in range(len(chain))]
    need = state_bytes(sum(math.prod(source.shape) for sources in blocks for source in sources))

    def has_room() -> bool:
        there = sum(shard.stat().st_size for shard in partial_of(out).glob("*.safetensors"))
        free = shutil.disk_usage(partial_of(out)).free - beside + there
        if state.begun or free >= need:
            return True
        said = f"to save each sweep takes {need / 1e9:.1f} GB of disk, of which {max(free, 0) / 1e9:.1f} GB are left"
        progress(Progress(NOTE, 1, 1, f"{said}: sweeps that are cut short will begin anew"))
        return False

    return state if parallel.from_main(has_room) else None


def _reader(shard: Path) -> CheckpointReader:
    return CheckpointReader(shard.parent, [shard])


def _surveyed(allocating: Needs | None, cost_windows: int, windows: Tensor) -> tuple[int, int]:
    """What comes before the walk: windows that are run through the dense model, tokens that gradients are taken of.

    Args:
        allocating: what the allocation asks for; None where it looks at nothing.
        cost_windows: that the costs of outputs are found on, by a sweep of their own or the allocation's.
        windows: of the calibration.
    """
    samples, seq_len = windows.shape
    surveyed = gradients = 0
    if allocating is not None:
        tokens = allocating.surveyed_tokens
        surveyed = samples if tokens is None else min(samples, windows_of(tokens, seq_len))
        if allocating.gradient_tokens:
            gradients = min(samples, windows_of(allocating.gradient_tokens, seq_len))
    return max(surveyed, cost_windows), max(gradients, cost_windows) * seq_len


def _allocated(
    chain: Chain,
    recipe: Recipe,
    allocate: Allocator,
    windows: Tensor,
    writer: CheckpointWriter | None,
    scratch: Scratch,
    progress: ProgressCallback,
    keep_costs: bool,
) -> Allocation:
    """How many zeros each linear gets. A run that goes on finds what the first process found."""
    kept = writer.state.kept(ALLOCATION) if writer is not None else None
    if kept is not None:
        return Allocation(**kept)
    survey = Survey(
        chain,
        windows,
        _sizes(chain, recipe),
        recipe.sparsity,
        batch_tokens=recipe.batch_tokens,
        scratch=scratch,
        progress=progress,
    )
    found = allocate(survey)
    if writer is not None:
        if keep_costs and found.output_costs:  # first, so that they are there wherever the allocation is
            writer.state.keep_tensors(OUTPUT_COSTS, found.output_costs)
        writer.state.keep(ALLOCATION, {"zeros": found.zeros, "report": found.report})
    return found


def _output_costs(
    chain: Chain,
    recipe: Recipe,
    windows: Tensor,
    writer: CheckpointWriter | None,
    scratch: Scratch,
    progress: ProgressCallback,
) -> dict[str, Tensor]:
    """Of every linear to prune, in the dense model. A run that goes on finds what the first process found."""
    kept = writer.state.kept_tensors(OUTPUT_COSTS) if writer is not None else None
    if kept is not None:
        return kept
    found = output_gradient_squares(
        chain,
        windows,
        names={linear.name for linear in _sizes(chain, recipe)},
        batch_tokens=min(recipe.batch_tokens, PIECE_TOKENS),
        scratch=scratch,
        progress=progress,
    )
    if writer is not None:
        writer.state.keep_tensors(OUTPUT_COSTS, found)
    return found


def _sizes(chain: Chain, recipe: Recipe) -> list[LinearSize]:
    return [
        LinearSize(linear.name, index, (linear.out_features, linear.in_features))
        for index in range(len(chain))
        for linear in selected_linears(chain, index, recipe.exclude)
    ]


def _identity(
    chain: Chain,
    recipe: Recipe,
    method: tuple[Entry[Any], dict[str, Any]],
    allocation: tuple[Entry[Any], dict[str, Any]],
    windows: Tensor,
) -> dict[str, Any]:
    """All that the result depends on, defaults of the options too: another release may have others. Where hidden states
    are kept, and when blocks are read, is not part of it."""

    def filled(entry: Entry[Any], options: dict[str, Any]) -> dict[str, Any]:
        return {**{name: option.default for name, option in entry.options.items()}, **options}

    return {
        "format": 1,  # of what is recorded of a block
        "recipe": {
            **recipe.model_dump(exclude={"memory", "read_ahead"}),
            "options": filled(*method),
            "allocation": allocation[0].name,
            "allocation_options": filled(*allocation),
        },
        "model": model_fingerprint(chain),
        "calibration tokens": tokens_fingerprint(windows),
        "computing": f"{chain.dtype} on {chain.device.type}",
    }


def _finished(writer: CheckpointWriter, chain: Chain, progress: ProgressCallback) -> list[dict[str, Any]]:
    """What is recorded of the first blocks, which an earlier process wrote; each is verified."""
    found: list[dict[str, Any]] = []
    for index in range(len(chain)):
        progress(Progress("verify", index, len(chain), "checking what an earlier run has written"))
        facts = writer.finished(index)
        if facts is None:
            break
        found.append(facts)
    if found:
        progress(Progress(NOTE, 1, 1, f"going on with an unfinished run: {len(found)} of {len(chain)} blocks are done"))
    return found


def _other_versions(records: list[dict[str, Any]]) -> list[str]:
    """What to say where other libraries pruned the first blocks: the bits may be others than those of one run."""
    here = _conditions()
    for index, facts in reversed(list(enumerate(records))):
        other = {name: version for name, version in facts["versions"].items() if here.get(name) != version}
        if other:
            then, now = (", ".join(f"{name} {known.get(name)}" for name in other) for known in (other, here))
            return [f"blocks up to {index + 1} were pruned with {then}, those after them with {now}"]
    return []


def _conditions() -> dict[str, str]:
    """What the last bits of a block may depend on, and a run that goes on may have otherwise."""
    return {**versions(), "processes": str(parallel.size())}


@checked_arguments()
def evaluate(
    model: str | os.PathLike[str] | PreTrainedModel,
    text: TextGiven,
    *,
    seq_len: int | None = None,
    max_tokens: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    progress: ProgressCallback = ignore,
) -> Perplexity:
    """Perplexity of a model, which is read block by block: it need not fit into memory.

    Args:
        model: as in :func:`prune`.
        text: as ``calibration`` in :func:`prune`.
        seq_len: tokens in a window, 2 or more; None for 2048, or what the model can take if less.
        max_tokens: stop after so many tokens of text.
        tokenizer: needed only for a model given as an object, unless ``text`` is token ids.
        device, dtype: as in :class:`Recipe`.
        trust_remote_code: run modelling code that comes with the checkpoint.
        progress: is told how far the run is.

    Raises:
        SparseLLMError: the model or the text cannot be read, or the text is too short.
    """
    progress(Progress("open", 0, 1, "opening the model"))
    directory = None if isinstance(model, PreTrainedModel) else checkpoint_directory(str(model))
    recipe = Recipe(device=device, dtype=dtype)
    place = resolve_device(parallel.own_device(device))
    chain, _ = _open(model, directory, recipe, place, in_memory=False, trust=trust_remote_code)
    text = as_text(text, "text", "evaluation")
    if isinstance(text, Tensor):
        windows = windows_of_ids(text, chain.config, seq_len, max_tokens)
    else:
        seq_len = seq_len or default_seq_len(chain)
        check_seq_len(chain.config, seq_len)
        if tokenizer is None and directory is not None:
            tokenizer = load_tokenizer(directory, trust_remote_code=trust_remote_code)
        if tokenizer is None:
            raise DataError("a model given as an object needs tokenizer=..., or token ids in place of a text")
        windows = evaluation_windows(text, tokenizer, seq_len, max_tokens)
    return streamed_perplexity(chain, windows, progress=progress)


@dataclass(frozen=True)
class LinearZeros:
    """Zeros of one linear of a checkpoint, and the N:M pattern it satisfies (of 1:4, 2:4 and 4:8 the strictest)."""

    name: str
    block: int
    shape: tuple[int, int]
    zeros: int
    pattern: NM | None

    @property
    def sparsity(self) -> float:
        return self.zeros / (self.shape[0] * self.shape[1])


@checked_arguments(model=CHECKPOINT)
def inspect(model: str | os.PathLike[str], *, trust_remote_code: bool = False) -> list[LinearZeros]:
    """Counts the zeros of every linear in the blocks of a checkpoint, read one block at a time.

    Raises:
        SparseLLMError: there is no such checkpoint, or it cannot be read.
    """
    directory = checkpoint_directory(str(model))
    chain = open_chain(directory, device=torch.device("cpu"), dtype=torch.float32, trust_remote_code=trust_remote_code)
    found = []
    for index in range(len(chain)):
        chain.load_block(index)
        for linear in chain.linears(index):
            weight = linear.weight()
            shape = (linear.out_features, linear.in_features)
            found.append(LinearZeros(linear.name, index, shape, count_zeros(weight), detect(weight)))
        chain.release_block(index)
    return found


def plan(chain: Chain, recipe: Recipe, allocation: Allocation | None = None) -> dict[str, Pattern]:
    """The pattern of every linear that will be pruned, by name.

    Args:
        chain: the model.
        recipe: says which linears.
        allocation: how many zeros each gets; None for the recipe's pattern in every linear.

    Raises:
        RecipeError: the pattern does not fit a weight, or nothing is left to prune.
    """
    pattern = recipe.weight_pattern()
    patterns: dict[str, Pattern] = {}
    for linear in _sizes(chain, recipe):
        zeros = allocation.zeros[linear.name] if allocation is not None else None
        patterns[linear.name] = pattern if zeros is None else pattern_of(zeros, linear.weights)
        patterns[linear.name].validate(linear.shape, f"{linear.name}.weight")
    if not patterns:
        raise RecipeError(f"exclude {recipe.exclude} leaves nothing to prune; name fewer linears")
    return patterns


def default_seq_len(chain: Chain) -> int:
    limit = getattr(chain.config.get_text_config(), "max_position_embeddings", None)
    return min(DEFAULT_SEQ_LEN, limit) if isinstance(limit, int) and limit > 0 else DEFAULT_SEQ_LEN


def peak_rss() -> int:
    """The most memory this process has held so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def versions() -> dict[str, str]:
    packages = ("transformers", "safetensors", "numpy")
    return {
        "sparsellm": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # with its build, which the package's metadata may leave out
        **{name: importlib.metadata.version(name) for name in packages},
    }


def _open(
    model: str | os.PathLike[str] | PreTrainedModel,
    directory: Path | None,
    recipe: Recipe,
    device: torch.device,
    *,
    in_memory: bool,
    trust: bool,
) -> tuple[Chain, PreTrainedModel | None]:
    dtype = None if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    if isinstance(model, PreTrainedModel):
        if recipe.device != "auto" or dtype is not None:
            raise RecipeError("a model given as an object is pruned where and as it is: leave device and dtype 'auto'")
        chain, loaded = open_chain(model, device=device), model
    else:
        assert directory is not None
        chain, loaded = open_chain(directory, device=device, dtype=dtype, trust_remote_code=trust), None
        if in_memory:
            loaded = _load_whole(directory, chain.dtype, device, trust)
            chain = open_chain(loaded, device=device)
    chain.products_in_bf16 = recipe.products == "bfloat16"
    return chain, loaded


def _windows(
    chain: Chain,
    recipe: Recipe,
    calibration: str | Tensor | Text | None,
    tokenizer: PreTrainedTokenizerBase | None,
    directory: Path | None,
    progress: ProgressCallback,
) -> Tensor:
    if isinstance(calibration, Tensor):
        return windows_of_ids(calibration, chain.config)
    seq_len = recipe.seq_len or default_seq_len(chain)
    check_seq_len(chain.config, seq_len)
    if tokenizer is None:
        raise DataError("a model given as an object needs tokenizer=..., or token ids as calibration")
    with _model_that_writes(chain, recipe, directory) as dense:
        return calibration_windows(
            calibration if isinstance(calibration, Text) else recipe.calibration,
            tokenizer,
            recipe.samples,
            seq_len,
            recipe.seed,
            model=dense,
            progress=lambda done, total: progress(Progress("calibration", done, total, "the model writes its text")),
        )


@contextlib.contextmanager
def _model_that_writes(chain: Chain, recipe: Recipe, directory: Path | None) -> Iterator[PreTrainedModel | None]:
    """The whole dense model, only where the calibration text is the model's own."""
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


def _check_finite(chain: Chain) -> None:
    if chain.weights is not None:
        chain.weights.reader.check_finite()
        return
    for name, parameter in chain.model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise NumericalError(f"weight {name} has NaN or infinite values; load the model again")


def _already_pruned(chain: Chain) -> str | None:
    """A dense weight has hardly a zero; a fifth of them in block 0 means that somebody pruned it."""
    chain.load_block(0)
    zeros = weights = 0
    for _, module in iterate_linears(chain.blocks[0], chain.block_names[0]):
        weight = module.weight
        assert isinstance(weight, Tensor)
        zeros, weights = zeros + count_zeros(weight), weights + weight.numel()
    chain.release_block(0)
    if zeros < 0.2 * weights:
        return None
    return f"the model is already pruned: {zeros / weights:.1%} of the weights of block 1 are zero; pruning it further"


def _checkpoint_bytes(chain: Chain) -> int:
    if chain.weights is not None:
        return chain.weights.reader.bytes
    return sum(value.numel() * value.element_size() for value in chain.model.state_dict().values())


def _write_companions(
    writer: CheckpointWriter, chain: Chain, directory: Path | None, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    if directory is not None:
        writer.copy_companions(directory)
        return
    chain.config.save_pretrained(writer.partial)
    generation = getattr(chain.model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(writer.partial)
    if tokenizer is not None:
        tokenizer.save_pretrained(writer.partial)
    writer.clean_config()


__all__ = [
    "LinearZeros",
    "PruneResult",
    "evaluate",
    "inspect",
    "plan",
    "prune",
]
