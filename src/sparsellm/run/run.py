"""A pruning run, step by step: open, plan, resume, survey, walk, sweep, save."""

from __future__ import annotations

import shlex
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsellm import parallel, plugins
from sparsellm.allocation import Allocation, LinearSize, Survey
from sparsellm.allocation.allocator import in_groups
from sparsellm.allocation.fixed import divide
from sparsellm.chain.matrices import kind_of
from sparsellm.chain.streams import Feed, Stream, windows_of
from sparsellm.errors import SparseLLMError, one_line
from sparsellm.hub.base import base_of
from sparsellm.hub.card import CARD, first_card
from sparsellm.machine import heap
from sparsellm.methods import LinearResult
from sparsellm.patterns import Pattern
from sparsellm.progress import NOTE, PhaseClock, Progress, ProgressCallback, ignore, plan_of_phases
from sparsellm.recipe import Recipe
from sparsellm.records import Base, EarlierStage, Memory, SweepPass
from sparsellm.report.document import REPORT, write_report
from sparsellm.run import prepare as before
from sparsellm.run.costs import predicted_seconds
from sparsellm.run.counts import few_tokens, left_dense, shortfall, unreached
from sparsellm.run.fingerprint import (
    model_fingerprint,
    start_digests,
    start_fingerprint,
    tokens_fingerprint,
    weight_digests,
)
from sparsellm.run.journal import ALLOCATION, OUTPUT_COSTS, BlockRecord, Identity, Journal, other_conditions
from sparsellm.run.magnitudes import Magnitudes, add, magnitudes
from sparsellm.run.memory import Demand, checkpoint_bytes, plan_memory, saved_sweep_bytes
from sparsellm.run.result import PruneResult, bits_per_weight
from sparsellm.run.teacher import check_outside
from sparsellm.run.walk import walk
from sparsellm.storage.destination import partial_of
from sparsellm.storage.files import explained
from sparsellm.storage.scratch import Scratch
from sparsellm.storage.writer import count_zeros
from sparsellm.sweep.gradients import LEAST_WINDOWS, TOKENS
from sparsellm.sweep.integers import Integers
from sparsellm.sweep.saliency import LossGradients, loss_gradients
from sparsellm.sweep.whole_model import Pass, SweepTask, sweep


class Run:
    """One run over one model. :meth:`execute` runs all steps.

    Args:
        request: the arguments of :func:`sparsellm.prune`.
        progress: called with the progress of the run.
    """

    def __init__(self, request: before.Request, progress: ProgressCallback = ignore) -> None:
        self.request, self.stage = request, request.stage
        self.earlier = self.stage.before if self.stage is not None else None
        self.progress = progress if parallel.is_main() else ignore
        self.clock = PhaseClock(heap.peak_rss)
        self.warnings: list[str] = plugins.load_installed()
        self.costs: dict[str, Tensor] = {}
        self.predicted: dict[str, float] = {}  # seconds of each phase
        self.allocation: Allocation | None = None
        self.finished: list[BlockRecord] = []
        self.linears: list[LinearResult] = []
        self.magnitudes: Magnitudes = {}
        self.sweeps: list[Pass] = []
        self.dense: Stream | None = None  # behind the last block, if a sweep follows and the model is in memory
        self.started = ""  # digest of the weights to prune, if they are not the dense model's
        self.peak_before = 0  # the peak memory of earlier starts of this run

    def execute(self) -> PruneResult:
        """Prunes the model and, if the request names a directory, writes it there.

        Raises:
            SparseLLMError: a subclass of it that names the cause.
        """
        self.open()
        self.plan()
        return self.finish()

    def finish(self) -> PruneResult:
        """All steps after :meth:`open` and :meth:`plan`."""
        with self.journal:
            self.resume()
            self.survey()
            self.walk()
            self.sweep()
            return self.save()

    def open(self) -> None:
        """Opens the model and reads the calibration text; refuses bad input."""
        if self.earlier is not None:
            self.clock.add(self.earlier["seconds"])
        prepared = before.prepare(self.request, self.clock, self.progress)
        self.recipe, self.choice, self.chain = prepared.recipe, prepared.choice, prepared.chain
        self.windows, self.own_windows = prepared.windows, prepared.own_windows
        self.prepared, self.start = prepared, prepared.start
        self.warnings += prepared.warnings
        self.out, request = prepared.out, self.request
        self.journal = Journal(self.out, len(self.chain), restart=request.restart, overwrite=request.overwrite)

    def plan(self) -> None:
        """Predicts the memory, divides the budget, and checks every weight of the model."""
        demand = self._demand()
        sharers = parallel.on_this_machine()
        plan = partial(plan_memory, self.chain, demand, self.recipe.memory, sharers=sharers)
        self.memory = parallel.together(plan)
        self.progress(Progress(NOTE, 1, 1, str(self.memory)))
        with self.clock.phase("check"):
            self.progress(Progress("check", 0, 1))
            self.digests = parallel.from_main(partial(weight_digests, self.chain, self.progress))
            if self.chain.reader is not None:
                self.chain.reader.expect(self.digests)  # later reads are compared with them
            unused = self.chain.unused()
            if unused is not None:
                self.warnings.append(unused)
            if self.start is not None:
                digests = parallel.from_main(partial(start_digests, self.start, self.progress))
                self.start.expect(digests)
                check_outside(self.chain, self.start)
                self.started = start_fingerprint(self.start, digests)
                if self.stage is not None and self.stage.swept:
                    self.started += f" after {self.stage.swept} passes"
            already = before.already_pruned(self.chain) if self.start is None else None
            if already is not None:
                self.warnings.append(already)
                self.progress(Progress("check", 1, 1, already))
        self.identity = parallel.from_main(self._identity)

    def resume(self) -> None:
        """Opens the output directory, and reads the records of blocks that an earlier start has finished."""
        on_disk = int(parallel.total(self.memory.hidden_on_disk))
        self.disk = before.disk_bytes(self.chain, self.choice, self.stage) + on_disk
        self.journal.open(self.identity, self.disk)
        self.finished = self.journal.finished(self.progress)
        for record in self.finished:
            self.clock.add(record.seconds)
        tokens, seq_len = self.own_windows.numel(), self.windows.shape[1]
        finished, kept = len(self.finished), self.memory.kept > 0
        sets = self.prepared.sweep_windows
        swept = sum(sets[number % len(sets)].numel() for number in range(self.choice.effort.passes))
        self.predicted = predicted_seconds(
            self.chain, self.choice, tokens, seq_len, finished=finished, kept=kept, swept=swept
        )
        self.progress(plan_of_phases(self.predicted))
        earlier = self.earlier["peak_rss_bytes"] if self.earlier is not None else 0
        self.peak_before = max([earlier, *(record.peak_rss for record in self.finished)])
        self.warnings += other_conditions(self.finished)
        self.journal.write_outer(self.chain.outer_tensors)
        folder = partial_of(self.out) if self.out is not None else None
        self.scratch = Scratch(self.memory.hidden_in_memory, folder, spare=self.memory.kept)
        self.feed = Feed(self.chain, self.own_windows, self.recipe.batch_tokens, self.scratch, self.progress)

    def survey(self) -> None:
        """Surveys the dense model: gradients of its loss, if the method or the allocation needs them, then the
        allocation. The first process does it alone and shares the results."""
        self.allocation, self.costs = parallel.main_alone(self._survey)
        self.patterns: dict[str, Pattern] = before.plan(self.chain, self.recipe, self.allocation)
        self.clock.lap()

    @property
    def integers(self) -> Integers | None:
        """The linears whose values are rounded in a sweep; None if there is none or the values are kept."""
        if self.recipe.values == "keep" or not self.choice.effort.passes:
            return None
        return Integers(self.recipe.values, {each.name: each.exponents for each in self.linears})

    def walk(self) -> None:
        """Prunes and writes block after block, each on what the pruned blocks before it produce."""
        walk(self)

    def sweep(self) -> None:
        """Trains all kept weights of the pruned model towards the dense model's predictions, if the method needs it."""
        effort = self.choice.effort
        if not effort.passes:
            return
        self.progress(Progress("sweep", 0, 1))
        saved_bytes = saved_sweep_bytes(self.chain, self.integers is not None)
        saved = self.journal.saved_passes(saved_bytes, self.disk, self.progress)
        self.journal.open_sweep(checkpoint_bytes(self.chain))
        if saved is not None:
            spent, peak = saved.spent
            self.clock.add({"sweep": spent})
            self.peak_before = max(self.peak_before, peak)
            began = time.perf_counter() - spent
            saved.seconds = lambda: time.perf_counter() - began
        zeros: dict[str, int] = {}
        after: Magnitudes = {}

        def write(index: int) -> None:
            for linear in self.chain.linears(index):
                zeros[linear.name] = count_zeros(linear.parameter)
                if linear.name in self.patterns:
                    add(after, kind_of(self.chain, linear.name, index), "after", magnitudes(linear.parameter))
            self.journal.write_swept(index, self.chain.block_tensors(index))

        blocks = [self.journal.block(index) for index in range(len(self.chain))]
        first, *others = self.prepared.sweep_windows
        with self.clock.phase("sweep"):
            self.sweeps = sweep(
                SweepTask(
                    replace(self.feed, windows=first),
                    self.dense.hidden if self.dense is not None else None,
                    effort.passes,
                    self.recipe.seed,
                    write,
                    learning_rate=effort.rate,
                    blocks=[block for block in blocks if block is not None] or None,
                    saved=saved,
                    fresh=others,
                    integers=self.integers,
                    swept=self.stage.swept if self.stage is not None else 0,
                )
            )
        if self.dense is not None:
            self.dense.close()
        self.linears = [each.model_copy(update={"zeros": zeros[each.name]}) for each in self.linears]
        self.magnitudes = {kind: {**counts, **after[kind]} for kind, counts in self.magnitudes.items()}
        self.journal.write_outer(self.chain.outer_tensors)

    def save(self) -> PruneResult:
        """Writes the files beside the weights, and renames the checkpoint to its final name."""
        self.progress(Progress("save", 0, 1))
        with self.clock.phase("count"):
            written = self.journal.written
            dense = parallel.from_main(partial(left_dense, self.chain, self.recipe, self.linears, written))
        self.warnings += few_tokens(self.linears, self.recipe.min_tokens_per_expert)
        self.warnings += unreached(self.linears) + shortfall(self.linears, dense, self.recipe.sparsity)
        peak = max(heap.peak_rss(), self.peak_before)
        recipe = self._asked()
        result = PruneResult(
            path=self.out,
            model=self.prepared.in_memory,
            recipe=recipe,
            sparsity_asked=recipe.sparsity,
            values=recipe.values,
            seed=recipe.seed,
            bits_per_weight=bits_per_weight(recipe, self.linears),
            linears=self.linears,
            seconds=self.clock.seconds,
            peak_rss_bytes=max(parallel.gather(peak)),
            calibration_tokens=self.windows.numel(),
            calibration_bos=self.prepared.bos,
            warnings=self.warnings,
            memory=Memory(**self.memory.to_dict()),
            resumed=len(self.finished),
            sweeps=[SweepPass(**vars(each)) for each in self.sweeps],
            allocation={"name": self.choice.allocator.name, **self.allocation.report} if self.allocation else {},
            processes=parallel.size(),
            dense=dense,
            base=self._base(),
            predicted_seconds=self.predicted,
            peaks_bytes=self.clock.peaks,
            magnitudes=self.magnitudes,
            stages=[EarlierStage.model_validate(self.earlier)] if self.earlier is not None else [],
        )
        parallel.barrier()  # after this no process reads the walk's blocks, so they can be removed
        parallel.from_main(lambda: self._finish(result))  # no process returns before the checkpoint has its name
        return result

    # ------------------------------------------------------------------ parts of the steps above

    def _asked(self) -> Recipe:
        """The recipe of the whole run, with the actual number and length of the calibration windows."""
        if self.stage is None or self.earlier is None:
            return self.recipe
        return self.stage.asked.updated(samples=self.recipe.samples, seq_len=self.recipe.seq_len)

    def _base(self) -> Base:
        """The name, digest and bytes of the dense model, and its hub id and license where they are known."""
        model = self.request.dense
        name = getattr(model, "name_or_path", "") if isinstance(model, PreTrainedModel) else str(model)
        known = base_of(model, self.prepared.directory)
        return Base(
            name=self.request.name or name, digest=self.identity.model, bytes=checkpoint_bytes(self.chain), **known
        )

    def _demand(self) -> Demand:
        """The memory demand of this process; the first one also surveys the dense model.

        The first of two stages demands what the second needs too, which is refused before the work of both.
        """
        choice, seq_len = self.choice, self.windows.shape[1]
        values = self.recipe.values if self.stage is None else self.stage.asked.values
        surveyed = gradient_tokens = 0
        if parallel.is_main():
            if choice.allocates and not self.journal.knows(ALLOCATION):
                tokens = choice.allocation_needs.surveyed_tokens
                most = len(self.windows)
                surveyed = most if tokens is None else min(most, windows_of(tokens, seq_len))
                if choice.allocation_needs.gradient_tokens:
                    gradient_tokens = self._gradient_feed().windows.numel()
            if choice.needs.output_costs and not self.journal.knows(OUTPUT_COSTS):
                gradient_tokens = self._gradient_feed().windows.numel()
        return Demand(
            samples=max(surveyed, len(self.own_windows), gradient_tokens // seq_len),
            seq_len=seq_len,
            batch_tokens=self.recipe.batch_tokens,
            workspace=choice.method.workspace.beside(choice.needs.workspace).beside(choice.allocator.workspace),
            gradient_tokens=gradient_tokens,
            sets=len(self.prepared.calibration_sets),
            swept=bool(choice.effort.passes),
            fresh=len(self.prepared.sweep_windows) > 1,
            unrounded=values != "keep" and bool(choice.effort.passes),
        )

    def _gradient_feed(self) -> Feed:
        """The first calibration windows of the whole run, as the feed for gradients."""
        whole = Feed(self.chain, self.windows, self.recipe.batch_tokens, progress=self.progress)
        return whole.first(self.choice.allocation_needs.gradient_tokens or TOKENS, LEAST_WINDOWS)

    def _identity(self) -> Identity:
        choice = self.choice
        recipe = {
            **self.recipe.model_dump(exclude={"memory", "min_tokens_per_expert", "products", "effort", "stages"}),
            "options": choice.options,
            "passes": choice.effort.passes,
            "sets": choice.effort.sets,
            "allocation": choice.allocator.name,
            "allocation_options": choice.allocation_options,
            "sparsity_of": list(self.recipe.sparsity_of.items()),  # a list, because the order counts
        }
        names = (choice.method.name, choice.allocator.name)
        used = plugins.fingerprints(*names, *choice.options.values(), *choice.allocation_options.values())
        products = ", products in bf16" if self.chain.products is not None else ""
        computing = f"{self.chain.dtype} on {self.chain.device.type}{products}"
        return Identity(
            recipe,
            model_fingerprint(self.chain, self.digests),
            tokens_fingerprint(torch.cat([self.windows, *self.prepared.others, self.prepared.fresh])),
            computing,
            used,
            self.started,
            int(self.stage is not None and self.earlier is None),
        )

    def _survey(self) -> tuple[Allocation | None, dict[str, Tensor]]:
        """The allocation, if it is not uniform, and the output costs, if the method needs them.

        A resumed run takes those of its first start.
        """
        choice, sizes = self.choice, before.sizes_of(self.chain, self.recipe)
        allocation = self.journal.allocation() if choice.allocates else None
        costs: dict[str, Tensor] | None = {}
        if choice.needs.output_costs and len(self.finished) < len(self.chain):
            costs = self.journal.output_costs()
        allocates = choice.allocates and allocation is None
        saliency = allocates and choice.allocation_needs.gradient_tokens > 0
        gradients: LossGradients | None = None
        if saliency or costs is None:
            with self.clock.phase("gradients"):
                feed = replace(self._gradient_feed(), scratch=self.scratch, blocks=self.start)
                names = {size.name for size in sizes}
                who, how = (self.identity.model, self.started), self.identity.computing
                key = (*who, tokens_fingerprint(feed.windows), how, frozenset(names))
                make = partial(loss_gradients, feed, names, saliency=saliency)
                gradients = self.request.shared.gradients_of(key, make, saliency=saliency)
            if choice.needs.output_costs:
                costs = gradients.output_squares
                self.journal.keep_output_costs(costs)  # first: a saved allocation implies saved costs
        if allocates:
            with self.clock.phase("allocation"):
                allocation = self._allocate(sizes, gradients)
                self.journal.keep_allocation(allocation)
        if self.start is not None:
            self.chain.forget_shared()  # the walk reads the teacher's first, also in a process that did not survey
        return allocation, costs or {}

    def _allocate(self, sizes: list[LinearSize], gradients: LossGradients | None) -> Allocation:
        """The allocation of all zeros: fixed ones by the recipe, the others by the allocation that it names."""
        parts = divide(sizes, self.recipe.sparsity)
        if not parts.free:
            return parts.allocation()
        feed = replace(self.feed, windows=self.windows, blocks=self.start)
        survey = Survey(feed, parts.free, parts.sparsity, parts.zeros, gradients)
        found = parts.allocation(self.choice.allocator.function(survey, **self.choice.allocation_options))
        m = self.recipe.chosen_of
        return found if m is None else in_groups(found, parts.free, m, parts.zeros)

    def _finish(self, result: PruneResult) -> None:
        writer = self.journal.writer
        if writer is None:
            return
        directory = self.prepared.directory
        if directory is not None:
            links = writer.copy_companions(directory)
            result.warnings += [
                f"{name} of the model was not copied: it is a link out of {directory}" for name in links
            ]
        else:
            self._save_beside(writer.partial)
            writer.clean_config()
        if self.stage is not None and self.earlier is None:
            writer.write_json("pruning.json", {**result.to_dict(), "stage": self.identity.to_dict()})
            writer.finish()
            return
        writer.write_text("recipe.yaml", result.recipe.to_yaml())
        writer.write_json("pruning.json", result.to_dict())
        writer.write_text(CARD, first_card(result.record))
        try:
            write_report(writer.partial, name=writer.out)
        except Exception as error:  # it can be written at any time, and must not cost the result of hours
            reason = str(error) if isinstance(error, SparseLLMError) else one_line(error)
            later = f"afterwards `sparsellm report {shlex.quote(str(writer.out))}` writes it"
            self.progress(Progress(NOTE, 1, 1, f"{REPORT} was not written: {reason}; {later}"))
        writer.finish()

    def _save_beside(self, folder: Path) -> None:
        """Config, generation config and tokenizer of a model that was given as an object."""
        generation = getattr(self.chain.model, "generation_config", None)
        with explained(folder):
            for part in (self.chain.config, generation, self.prepared.tokenizer):
                if part is not None:
                    part.save_pretrained(folder)
