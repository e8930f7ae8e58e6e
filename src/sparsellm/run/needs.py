"""What a run needs, predicted: for the run itself before it starts, and for ``sparsellm plan`` by a config alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from pydantic import JsonValue

from sparsellm.errors import MemoryBudgetError, RecipeError
from sparsellm.inputs import about, parse_bytes
from sparsellm.machine import machine_name
from sparsellm.method.experts.fewer import FewerExperts
from sparsellm.method.sweep.whole_model import check_sweepable
from sparsellm.model import Chain
from sparsellm.progress import LEAST, MOST, between
from sparsellm.recipe import SWEEP, Recipe
from sparsellm.records import Memory, Prediction
from sparsellm.run import predictions
from sparsellm.run.choice import PASSES, Choice, patterns_of
from sparsellm.run.journal import ALLOCATION, OUTPUT_COSTS, Journal
from sparsellm.run.predictions import (
    DEVICE_SHARE,
    STREAMED,
    Demand,
    Extent,
    Removing,
    checkpoint_bytes,
)
from sparsellm.run.speeds import Speeds, measured
from sparsellm.text.sources import SELF, shares_of
from sparsellm.text.windows import seq_len_of

Choose = Callable[[Recipe], Choice]


class Budgets(NamedTuple):
    """The most bytes of a process."""

    host: str | int | None = None  # None: a share of what is free
    gpu: int | None = None  # None: what it needs


UNLIMITED = 1 << 62  # bytes
LOCAL = ("sparsegpt", "wanda")  # methods that hold less, for models that no effort fits


def extent_asked(
    chain: Chain, choice: Choice, recipe: Recipe, ranks: int, sharers: int = 1
) -> Extent:
    """The windows that a recipe asks for, where the text has room for all."""
    seq_len = seq_len_of(chain.config, recipe.seq_len)
    # The sweep takes new windows where the dense model can run: one in memory, or with fewer experts, is another.
    fresh = choice.passes if chain.reader is not None and recipe.experts is None else 0
    of_pass = choice.windows_of_pass(recipe.samples, seq_len)
    drawn = choice.sets * recipe.samples + fresh * of_pass
    return Extent(
        samples=recipe.samples,
        seq_len=seq_len,
        batch_tokens=recipe.batch_tokens,
        sets=choice.sets,
        swept=choice.passes * of_pass * seq_len,
        fresh=fresh > 1,
        ranks=ranks,
        sharers=sharers,
        written=round(
            drawn * seq_len * shares_of(recipe.calibration or "").get(SELF, 0)
        ),
    )


def predict(
    chain: Chain,
    choice: Choice,
    recipe: Recipe,
    extent: Extent,
    budgets: Budgets,
    *,
    speeds: Speeds | None = None,
    journal: Journal | None = None,
    sweep: str | None = None,
) -> Prediction:
    """The predicted memory of this process, seconds, and files of all processes. What ``journal`` has is not counted;
    without one, the run begins anew and writes a checkpoint. ``sweep`` is the way to hold the blocks in the
    sweep; None takes the one that is predicted to be the fastest. Raises MemoryBudgetError if none fits."""
    speeds = speeds or speeds_of(chain)
    finished = journal.begun() if journal is not None else 0
    gradients = predictions.gradient_windows(choice, extent)
    # Whether the journal has from an earlier start what the gradients are needed for.
    done = (
        journal is not None
        and journal.knows(OUTPUT_COSTS)
        and (journal.knows(ALLOCATION) or not choice.allocates)
    )
    workspace = choice.workspace.then(choice.allocator.workspace)
    differentiated = 0 if done else extent.share_of(gradients) * extent.seq_len
    demand = Demand(
        extent, workspace, differentiated, choice.passes, choice.trains_integers(recipe)
    )
    removes = isinstance(choice, Removing)
    reduced = recipe.experts is not None and not removes
    demand = replace(demand, removes=removes, reduced=reduced, zeros=choice.zeros)
    fitting: list[Memory] = []
    for way in predictions.sweeps(chain, demand) if sweep is None else [sweep]:
        try:
            fitting.append(
                predictions.plan_memory(chain, replace(demand, sweep=way), *budgets)
            )
        except MemoryBudgetError as error:
            refused = error
    if not fitting:
        raise refused
    took = partial(
        predictions.predicted_seconds, chain, choice, extent, speeds, finished=finished
    )
    timed = [(memory, took(memory=memory)) for memory in fitting]
    memory, seconds = min(
        timed, key=lambda pair: sum(pair[1].values())
    )  # the first of equals
    files = memory.hidden_on_disk_bytes * extent.ranks
    if journal is None or journal.out is not None:
        files += choice.copies * checkpoint_bytes(chain)
        files += predictions.saved_sweep_bytes(
            chain, choice.passes, choice.zeros, unrounded=demand.unrounded
        )
    tokens = {
        "gradients": gradients,
        "experts" if removes else "prune": extent.sets * extent.samples,
    }
    return Prediction(
        machine=speeds.name,
        ranks=extent.ranks,
        method=recipe.method,
        passes=choice.passes,
        tokens={name: windows * extent.seq_len for name, windows in tokens.items()}
        | {"sweep": extent.swept},
        seconds=seconds,
        memory=memory,
        disk_bytes=files,
    )


def speeds_of(chain: Chain) -> Speeds:
    """The speeds of the device that a chain runs on, which is here."""
    dtype = torch.bfloat16 if chain.products is not None else chain.dtype
    return measured(chain.device, dtype, chain.config.get_text_config().hidden_size)


def added(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float]:
    """The numbers of two mappings, those of the same name added up."""
    return {
        name: first.get(name, 0) + second.get(name, 0) for name in {**first, **second}
    }


def after_removal(first: Prediction, smaller: Chain, rest: Prediction) -> Prediction:
    """The prediction of a run that first removes experts, then does the ``rest`` on the ``smaller`` model."""
    larger = max(
        first.memory, rest.memory, key=lambda memory: memory.predicted_peak_rss_bytes
    )
    changes = {
        "tokens": added(first.tokens, rest.tokens),
        "seconds": added(first.seconds, rest.seconds),
        "memory": larger.model_copy(
            update={"steps_bytes": {**first.memory.steps_bytes, **larger.steps_bytes}}
        ),
        "disk_bytes": checkpoint_bytes(smaller)
        + first.memory.hidden_on_disk_bytes * first.ranks
        + rest.disk_bytes,
        "notes": [*first.notes, *rest.notes],
        "wanted_ranks": first.wanted_ranks
        and rest.wanted_ranks
        and max(first.wanted_ranks, rest.wanted_ranks),
    }
    return rest.model_copy(update=changes)


def chosen_for(chain: Chain, recipe: Recipe, *, taught: bool = False) -> Choose:
    """A function from a recipe to its choice, without needs that are useless for the patterns of this recipe on this
    chain, which is ``taught`` by another model or not. A RecipeError or ModelError says that the two do not fit."""
    patterns = patterns_of(chain, recipe).values()

    def choose(recipe: Recipe) -> Choice:
        return Choice.of(recipe).on(patterns, recipe.values, taught=taught)

    if choose(recipe).passes:
        check_sweepable(chain)
    return choose


def foresee(
    chain: Chain,
    recipe: Recipe,
    *,
    ranks: int = 1,
    speeds: Speeds | None = None,
    choose: Choose | None = None,
) -> Prediction:
    """The prediction for a chain, whose weights are not read: for ``ranks`` processes on this machine; or, with the
    ``speeds`` of another, in the recipe's memory (without one, unlimited). A run that does not fit is predicted, too,
    with a note that names an effort or a method which fits. ``choose`` replaces the recipe's choice in each pass of a
    run that removes experts. Raises SparseLLMError for what cannot run in any memory."""
    if recipe.samples < ranks:
        raise RecipeError(
            f"{recipe.samples} calibration windows cannot be divided among {ranks} processes"
        )
    if recipe.experts is not None and choose is None:
        smaller = FewerExperts(chain, recipe.experts).chain
        rest = foresee(
            smaller,
            recipe,
            ranks=ranks,
            speeds=speeds,
            choose=chosen_for(smaller, recipe, taught=True),
        )
        first = foresee(chain, recipe, ranks=ranks, speeds=speeds, choose=Removing.by)
        return after_removal(first, smaller, rest)
    here, choose = speeds is None, choose or chosen_for(chain, recipe)
    speeds = speeds or speeds_of(chain)
    if here:
        budgets = Budgets(
            recipe.memory, predictions.device_budget(chain.device, recipe.device_memory)
        )
    else:
        gpu = int(DEVICE_SHARE * speeds.gpu_bytes)
        asked = (
            gpu
            if recipe.device_memory is None
            else min(gpu, parse_bytes(recipe.device_memory))
        )
        budgets = Budgets(recipe.memory or UNLIMITED, asked)

    def foreseen(
        recipe: Recipe, ranks: int, budgets: Budgets = budgets, sweep: str | None = None
    ) -> Prediction:
        choice = choose(recipe)
        extent = extent_asked(
            chain, choice, recipe, ranks, sharers=ranks if here else 1
        )
        return predict(
            chain, choice, recipe, extent, budgets, speeds=speeds, sweep=sweep
        )

    def fitting(recipe: Recipe, ranks: int) -> Memory | None:
        """The memory; None if the run does not fit."""
        with suppress(MemoryBudgetError):
            return foreseen(recipe, ranks).memory
        return None

    why = ""
    try:
        prediction = foreseen(recipe, ranks)
    except MemoryBudgetError as error:
        why = (
            str(error)
            .partition("; ")[0]
            .replace(machine_name(chain.device), speeds.name)
        )
        try:
            prediction = foreseen(
                recipe, ranks, budgets._replace(host=UNLIMITED), STREAMED
            )
        except MemoryBudgetError:
            prediction = foreseen(recipe, ranks, Budgets(UNLIMITED), STREAMED)
    counts = (1 << power for power in range(recipe.samples.bit_length()))
    tries = ((count, fitting(recipe, count)) for count in counts)
    least = next(
        (
            count
            for count, memory in tries
            if memory is not None and not memory.hidden_on_disk_bytes
        ),
        0,
    )
    notes = []
    if why:
        lower = [
            effort for effort, passes in enumerate(PASSES) if passes < prediction.passes
        ]
        others: list[dict[str, JsonValue]] = [
            {"effort": effort} for effort in reversed(lower)
        ]
        others += [
            {"method": name, "options": {}, **dict.fromkeys(SWEEP)} for name in LOCAL
        ]
        fits = (
            change
            for change in others
            if fitting(recipe.updated(**change), ranks) is not None
        )
        name, value = next(
            (next(iter(change.items())) for change in fits),
            ("no effort and no local", "method"),
        )
        notes = [f"{why}: it does not fit; {name} {value} does"]
    return prediction.model_copy(update={"notes": notes, "wanted_ranks": least})


def needed(prediction: Prediction) -> str:
    """What a run takes, in one line: memory, bytes of files if it writes any, and a range of time."""
    plan, seconds = prediction.memory, sum(prediction.seconds.values())
    device = (
        f", {about(plan.predicted_peak_device_bytes)} on the device"
        if plan.predicted_peak_device_bytes
        else ""
    )
    files = f", {about(prediction.disk_bytes)} of disk" if prediction.disk_bytes else ""
    took = between(LEAST * seconds, MOST * seconds)
    return f"needs about {about(plan.predicted_peak_rss_bytes)} of memory{device}{files} and {took}"
