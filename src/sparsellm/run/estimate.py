"""What a run would take, by ten formulas that a reader can check by hand: for ``sparsellm plan`` and ``--dry-run``.

Bytes are right within a third (docs/payoff.md). Seconds leave out the time that a choice of types takes. A run itself
goes by what it measures, see ``sparsellm.run.budget``.
"""

from __future__ import annotations

import math
import timeit
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Self

import torch
from torch import Tensor

from sparsellm import machine
from sparsellm.errors import RecipeError, nearest
from sparsellm.inputs import about, parse_bytes
from sparsellm.method.experts import SCORES
from sparsellm.method.experts.fewer import FewerExperts, experts_of_token
from sparsellm.method.solvers import rounding
from sparsellm.method.sweep.gradients import LEAST_WINDOWS, TOKENS
from sparsellm.method.sweep.streamed import MOST_KEPT
from sparsellm.method.sweep.whole_model import STEP_TOKENS
from sparsellm.model import Chain
from sparsellm.model.experts import ExpertLinear
from sparsellm.model.streams import windows_of
from sparsellm.progress import between
from sparsellm.recipe import Recipe
from sparsellm.records import Prediction
from sparsellm.run.budget import (
    DEVICE_SHARE,
    RESIDENT,
    STREAMED,
    Budget,
    can_be_resident,
    device_limit,
    elements_of,
    host_limit,
    logit_bytes,
    sweep_bytes,
)
from sparsellm.run.choice import Choice, choice_for
from sparsellm.text.windows import seq_len_of

LIBRARIES = 128 << 20  # bytes that torch, its kernels and the allocator take in a run
# seconds of runs, as shares of the estimated ones
LEAST = 0.5
MOST = 1.5
UNLIMITED = 1 << 62  # bytes
DISK = 1e9  # bytes read, checked or written in a second
BLOCK_STEP = 0.009  # seconds of a block in a step of the sweep, however small it is
BUSY = 0.5  # share of a large product's speed that passes with gradients reach
EFFICIENCY = 0.4  # share of a data sheet's speed that is assumed to be reached
# By solver: fp32 copies of the largest weight, matrices as large as its Gram matrix, products of each weight with one.
SOLVING = {"magnitude": (6, 1, 1), "wanda": (6, 1, 1), "sparsegpt": (5.5, 2.5, 1)}
ADMM = (13, 7, 28)


@dataclass(frozen=True)
class Machine:
    """The speeds of one process."""

    name: str  # the processor or GPU
    blocks: float  # operations a second in products of blocks, which may be in bf16
    exact: float  # the same for statistics and solvers, in fp32
    memory: float  # bytes a second, read or written
    card_bytes: int = 0  # memory of the GPU; 0 on a CPU


# TFLOP/s in bf16 with fp32 sums, in fp32 without TF32, GB/s of the memory, and GB. By copies of NVIDIA's data sheets:
# A100, H100 SXM, L4, L40S; H200 computes as H100 does. By lists of others: RTX 3090 and 4090, MI300X.
GPUS = {
    "a100": ("A100 80GB", 312, 19.5, 2039, 80),
    "h100": ("H100", 989, 67, 3350, 80),
    "h200": ("H200", 989, 67, 4800, 141),
    "l4": ("L4", 121, 30.3, 300, 24),
    "l40s": ("L40S", 362, 91.6, 864, 48),
    "mi300x": ("MI300X", 1307, 163, 5300, 192),
    "rtx3090": ("RTX 3090", 71, 35.6, 936, 24),
    "rtx4090": ("RTX 4090", 165, 82.6, 1008, 24),
}


def named(gpu: str) -> Machine:
    """The machine with a GPU of the table. Raises RecipeError if it is not there."""
    if gpu.lower() not in GPUS:
        raise RecipeError(
            f"GPU {gpu!r:.100} is not in the table; {nearest(gpu[:100], GPUS)}"
        )
    name, narrow, exact, memory, size = GPUS[gpu.lower()]
    return Machine(
        name,
        EFFICIENCY * narrow * 1e12,
        exact=EFFICIENCY * exact * 1e12,
        memory=EFFICIENCY * memory * 1e9,
        card_bytes=int(size * 1e9),
    )


def machine_of(chain: Chain) -> Machine:
    """The machine that a chain runs on, which is this one: its products and its memory, measured."""
    dtype = chain.dtype
    if chain.products is not None:
        dtype = torch.bfloat16
    return _measured(chain.device, dtype)


@cache
def _measured(device: torch.device, dtype: torch.dtype) -> Machine:
    """The speeds of a device, measured in about a second."""
    size = 0
    if device.type == "cuda":
        size = torch.cuda.get_device_properties(device).total_memory
    values = torch.ones(1 << 24, device=device)  # more than caches hold
    return Machine(
        machine.machine_name(device),
        _products(device, dtype),
        exact=_products(device, torch.float32),
        memory=8 * len(values) / _least(lambda: values.add_(values, alpha=0.5)),
        card_bytes=size,
    )


def _products(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second in a large matrix product."""
    matrix = torch.ones(1024, 1024, device=device, dtype=dtype)
    return 2.0 * 1024**3 / _least(lambda: matrix @ matrix)


def _least(work: Callable[[], Tensor]) -> float:
    """The least seconds of some rounds."""
    seconds = timeit.repeat(lambda: work().flatten()[0].item(), repeat=6, number=1)
    return max(1e-9, min(seconds))


class Removing(Choice):
    """The choice of the step that removes experts, whose time is not that of a method."""

    @classmethod
    def by(cls, recipe: Recipe) -> Self:
        """The choice of the step that removes the experts of a recipe; a RecipeError if the recipe is wrong."""
        Choice.of(recipe)
        score = SCORES[recipe.expert_score]
        needs = score.needs(score.check(recipe.expert_options))
        nothing = cls.of(Recipe(method="magnitude", sparsity=0.0))
        return replace(nothing, needs=replace(needs, token_states=True))


@dataclass(frozen=True)
class Extent:
    """The calibration windows of a run, and the processes that divide them."""

    samples: int  # windows in a set
    seq_len: int  # tokens in a window
    batch_tokens: int  # tokens in one forward call
    sets: int = 1
    swept: int = 0  # tokens of all passes of the sweep
    ranks: int = 1

    @property
    def tokens(self) -> int:
        """The tokens of a set in one process."""
        return math.ceil(self.samples / self.ranks) * self.seq_len


@dataclass(frozen=True)
class Work:
    """The sizes of a model that the formulas take."""

    blocks: int
    weights: int  # elements of all blocks
    largest: int  # elements of the largest block
    active: float  # weights of all blocks that a token runs through
    statistics: float  # operations a token for all Gram matrices
    solving: float  # operations of a product of each weight with its Gram matrix
    linear: int  # elements of the largest linear
    inputs: int  # its inputs
    widest: int  # the most outputs of a linear
    head: float  # operations of a token in the head
    states: int  # elements of a token's hidden states before all blocks

    @classmethod
    def of(cls, chain: Chain) -> Work:
        text = chain.config.get_text_config()
        sizes = [elements_of(chain, index) for index in range(len(chain))]
        linears = [x for index in range(len(chain)) for x in chain.linears(index)]
        experts = [x for x in linears if isinstance(x.module, ExpertLinear)]
        routed = 1.0
        if experts:
            chosen = experts_of_token(chain) or 1
            per_block = len(chain.mixtures(len(chain) - 1)) or 1
            stacked = len(experts) / (3 * len(chain) * per_block)
            routed = min(1.0, chosen / max(1.0, stacked))
        active = 0.0
        statistics = 0.0
        solving = 0.0
        for linear in linears:
            share = routed if isinstance(linear.module, ExpertLinear) else 1.0
            active += share * linear.in_features * linear.out_features
            # The upper triangle; about two linears share an input.
            statistics += share * 0.6 * linear.in_features**2
            solving += 2.0 * linear.in_features**2 * linear.out_features
        largest = max(linears, key=lambda x: x.in_features * x.out_features)
        return cls(
            blocks=len(chain),
            weights=sum(sizes),
            largest=max(sizes),
            active=active,
            statistics=statistics,
            solving=solving,
            linear=largest.in_features * largest.out_features,
            inputs=max(x.in_features for x in linears),
            widest=max(x.out_features for x in linears),
            head=2.0 * text.hidden_size * text.vocab_size,
            states=text.hidden_size * len(chain),
        )


def estimate(
    chain: Chain,
    choice: Choice,
    recipe: Recipe,
    extent: Extent,
    *,
    speeds: Machine,
    limit: int,
    card: int = 0,
) -> Prediction:
    """The estimated memory of a process, seconds by phase, and files of all processes.

    Args:
        limit: bytes that a process may hold; what is more goes to disk where it can.
        card: the same for its GPU; 0 on the CPU.
    """
    work = Work.of(chain)
    text = chain.config.get_text_config()
    item = chain.dtype.itemsize
    start = machine.held_rss() + LIBRARIES
    solver = str(choice.options.get("solver", recipe.method))
    weights, matrices, products = SOLVING.get(solver, ADMM)
    narrow = chain.products is not None and solver not in SOLVING
    if recipe.values != "keep":
        products += rounding.PRODUCTS
    kept = 1 - choice.zeros

    # 1. Hidden states: those of every set, and the targets of a block.
    state = item * text.hidden_size
    hidden = (extent.sets + 1) * extent.tokens * state
    # 2. One block: its weights, activations of a batch, the solver's copies of a weight and of a Gram matrix.
    batch = max(extent.seq_len, min(extent.tokens, extent.batch_tokens))
    block = item * work.largest + item * batch * (
        4 * work.widest + 8 * text.hidden_size
    )
    block += int(4 * (weights * work.linear + matrices * work.inputs**2))
    # 3. The gradients of the dense model: a block in fp32 with its gradients, logits; hidden states of every block.
    differentiated = _differentiated(choice, extent)
    steps = {"prune": (block, hidden)}
    if differentiated:
        steps["gradients"] = (
            10 * work.largest + logit_bytes(chain),
            differentiated * state * (len(chain) + 1),
        )
    # 4. The sweep: bytes a weight, and the activations of a step.
    sweep = ""
    if choice.passes:
        unrounded = choice.trains_integers(recipe)
        sweep, working, movable = _sweep(
            chain,
            work,
            extent,
            unrounded=unrounded,
            kept=kept,
            room=(card or limit - start),
        )
        movable += 2 * math.ceil(extent.swept / choice.passes / extent.ranks) * state
        steps["sweep"] = (working, movable)
    # 5. The peak: what cannot move, and as much of the rest as the budget has room for.
    room = card or limit - start
    moved = max(size for _, size in steps.values())
    working = max(size for size, _ in steps.values())
    in_room = min(max(sum(step) for step in steps.values()), max(room, working))
    device = in_room if card else 0
    on_disk = max(0, moved - max(0, room - working))
    memory = start + (0 if card else in_room)
    if card:
        beyond = min(on_disk, max(0, limit - start))
        memory += beyond
        on_disk -= beyond
    # 6. Files: the result, the blocks of the walk, what memory has no room for, and saved passes of the sweep.
    stored = checkpoint_bytes(chain)
    saved = min(choice.passes, 2) * 4 * 3 * kept * work.weights
    files = choice.copies * stored + int(saved) + on_disk * extent.ranks
    seconds = _seconds(
        choice,
        extent,
        work,
        speeds,
        products=products,
        narrow=narrow,
        sweep=sweep,
        stored=stored,
    )
    notes = []
    needs = working if card else start + working
    if needs > (card or limit):
        notes.append(
            f"this run needs {about(needs)}, and may take {about(card or limit)}: it does not fit"
        )
    tokens = {
        "gradients": extent.seq_len * gradient_windows(choice, extent),
        "experts" if isinstance(choice, Removing) else "prune": extent.sets
        * extent.samples
        * extent.seq_len,
        "sweep": extent.swept,
    }
    return Prediction(
        machine=speeds.name,
        ranks=extent.ranks,
        method=recipe.method,
        passes=choice.passes,
        tokens=tokens,
        seconds=seconds,
        memory_bytes=memory,
        device_bytes=device,
        hidden_bytes=moved,
        hidden_on_disk_bytes=on_disk,
        disk_bytes=files,
        sweep=sweep,
        notes=notes,
    )


def _seconds(
    choice: Choice,
    extent: Extent,
    work: Work,
    speeds: Machine,
    *,
    products: int,
    narrow: bool,
    sweep: str,
    stored: int,
) -> dict[str, float]:
    """The seconds of each phase of a run, where the solver takes ``products`` and the checkpoint ``stored`` bytes."""
    differentiated = _differentiated(choice, extent)
    # 7. The walk: statistics and outputs of every set, products of the solver.
    attention = 2 * extent.seq_len * work.states
    forward = 2 * (work.active + attention) / speeds.blocks
    head = work.head / speeds.blocks
    pruning = "prune"
    passes = 1 + extent.sets
    if isinstance(choice, Removing):
        pruning = "experts"
        passes = 7
    walk = extent.tokens * (passes * forward + work.statistics / (0.4 * speeds.exact))
    if pruning == "prune":
        # Solvers that may round factors reach a third of the speed of blocks.
        speed = speeds.blocks / 3 if narrow else speeds.exact
        walk += products * work.solving / (speed * extent.ranks)
    # 8. The gradients: forward, and three times that back.
    differentiating = differentiated * 4 * (forward + head) / BUSY
    # 9. The sweep: the dense model once, forward and back with the block run again; Adam moves 32 bytes a weight.
    swept = extent.swept / (extent.ranks if sweep in RESIDENT else 1)
    sweeping = swept * 5 * (forward + head) / BUSY
    moving = work.weights * 32 / speeds.memory
    # a pass has a step of its own, however short its text is
    steps = max(swept / STEP_TOKENS, choice.passes)
    sweeping += steps * (moving + work.blocks * BLOCK_STEP)
    # 10. The checkpoint is read and checked, and every copy of it is written.
    reading = stored / DISK
    return {
        "check": reading,
        "gradients": differentiating,
        pruning: walk + 2 * reading,
        "sweep": sweeping,
        "save": reading,
    }


def _differentiated(choice: Choice, extent: Extent) -> int:
    """The tokens of this process for the gradients of the dense model."""
    return math.ceil(gradient_windows(choice, extent) * extent.seq_len / extent.ranks)


def _sweep(
    chain: Chain, work: Work, extent: Extent, *, unrounded: bool, kept: float, room: int
) -> tuple[str, int, int]:
    """How a sweep would hold the blocks, the bytes that it works on, and those that may be in files."""
    if can_be_resident(chain, unrounded=unrounded, ranks=extent.ranks):
        for name, way in RESIDENT.items():
            state, activations = sweep_bytes(chain, way, STEP_TOKENS)
            size = state // extent.ranks + activations
            if size <= room:
                return name, size, 0
    return (
        STREAMED,
        4 * 5 * work.largest + logit_bytes(chain),
        int(4 * (5 if kept < MOST_KEPT else 4) * kept * work.weights),
    )


def estimate_here(
    chain: Chain, choice: Choice, recipe: Recipe, extent: Extent, budget: Budget
) -> Prediction:
    """The estimate of a run on this machine, with its budget."""
    return estimate(
        chain,
        choice,
        recipe,
        extent,
        speeds=machine_of(chain),
        limit=budget.host.limit,
        card=0 if budget.card is None else budget.card.limit,
    )


def extent_asked(chain: Chain, choice: Choice, recipe: Recipe, ranks: int) -> Extent:
    """The windows that a recipe asks for, where the text has room for all."""
    seq_len = seq_len_of(chain.config, recipe.seq_len)
    of_pass = choice.windows_of_pass(recipe.samples, seq_len)
    return Extent(
        samples=recipe.samples,
        seq_len=seq_len,
        batch_tokens=recipe.batch_tokens,
        sets=choice.sets,
        swept=choice.passes * of_pass * seq_len,
        ranks=ranks,
    )


def foresee(
    chain: Chain, recipe: Recipe, *, ranks: int = 1, gpu: Machine | None = None
) -> Prediction:
    """The estimate for a chain, whose weights are not read: for ``ranks`` processes on this machine, or each with a
    ``gpu``, where the recipe's memory is that of the host (without one, unlimited). Raises SparseLLMError for what
    cannot run in any memory."""
    if recipe.samples < ranks:
        raise RecipeError(
            f"{recipe.samples} calibration windows cannot be divided among {ranks} processes"
        )
    speeds = gpu or machine_of(chain)
    card = 0
    if gpu is None:
        limit = host_limit(recipe.memory, ranks)
        if chain.device.type == "cuda":
            card = device_limit(chain.device, recipe.device_memory)
    else:
        limit = UNLIMITED if recipe.memory is None else parse_bytes(recipe.memory)
        card = int(DEVICE_SHARE * gpu.card_bytes)
        if recipe.device_memory is not None:
            card = min(card, parse_bytes(recipe.device_memory))

    def of(chain: Chain, choice: Choice) -> Prediction:
        extent = extent_asked(chain, choice, recipe, ranks)
        return estimate(
            chain, choice, recipe, extent, speeds=speeds, limit=limit, card=card
        )

    if recipe.experts is None:
        return of(chain, choice_for(chain, recipe))
    smaller = FewerExperts(chain, recipe.experts).chain
    first = of(chain, Removing.by(recipe))
    return after_removal(first, of(smaller, choice_for(smaller, recipe, taught=True)))


def after_removal(first: Prediction, rest: Prediction) -> Prediction:
    """The estimate of a run that first removes experts, then does the ``rest`` on the smaller model."""
    seconds = Counter(first.seconds) + Counter(rest.seconds)
    return rest.model_copy(
        update={
            "tokens": {**rest.tokens, "experts": first.tokens["experts"]},
            "seconds": {
                name: seconds[name] for name in (*first.seconds, *rest.seconds)
            },
            "memory_bytes": max(first.memory_bytes, rest.memory_bytes),
            "device_bytes": max(first.device_bytes, rest.device_bytes),
            "disk_bytes": first.disk_bytes + rest.disk_bytes,
            "notes": [*first.notes, *rest.notes],
        }
    )


def gradient_windows(choice: Choice, extent: Extent) -> int:
    """The windows that the gradients of the dense model's loss run on; 0 if nothing asks for gradients."""
    asked = choice.allocation_needs.gradient_tokens
    if not asked and choice.needs.output_costs:
        asked = TOKENS
    if not asked:
        return 0
    windows = max(LEAST_WINDOWS, windows_of(asked, extent.seq_len))
    return min(extent.samples, windows)


def checkpoint_bytes(chain: Chain) -> int:
    """Bytes of the checkpoint's weight files; for a model in memory, of its parameters and buffers."""
    if chain.reader is not None:
        return chain.reader.bytes
    values = chain.model.state_dict().values()
    return sum(value.numel() * value.element_size() for value in values)


def saved_sweep_bytes(chain: Chain, choice: Choice) -> int:
    """The most disk that saved passes of a sweep take: the best, and parameters and moments of two passes."""
    copies = 7 if choice.passes > 1 else choice.passes
    weights = sum(elements_of(chain, index) for index in range(len(chain)))
    return round(copies * (4 * (1 - choice.zeros) + 0.25) * weights)


def needed(prediction: Prediction) -> str:
    """What a run takes, in one line: memory, bytes of files if it writes any, and a range of time."""
    seconds = sum(prediction.seconds.values())
    device = ""
    if prediction.device_bytes:
        device = f", {about(prediction.device_bytes)} on the device"
    files = ""
    if prediction.disk_bytes:
        files = f", {about(prediction.disk_bytes)} of disk"
    took = between(LEAST * seconds, MOST * seconds)
    return f"needs about {about(prediction.memory_bytes)} of memory{device}{files} and {took}"
