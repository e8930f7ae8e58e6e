"""The memory and the seconds of a run, predicted before it starts. Every formula of bytes is in this file.

Solvers, methods and allocations declare the tensors they hold in a :class:`~sparsellm.registry.Workspace`. The seconds
are those that `sparsellm plan` prints; in a run :class:`sparsellm.progress.Forecast` corrects them by finished phases.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import psutil
import torch

from sparsellm import machine
from sparsellm.errors import MemoryBudgetError
from sparsellm.inputs import parse_bytes
from sparsellm.method.experts import SCORES
from sparsellm.method.experts.fewer import experts_of_token
from sparsellm.method.experts.sample import PROJECTED, SAMPLE
from sparsellm.method.gram import CHUNK_ELEMENTS, PANEL, REMEMBERED_BYTES
from sparsellm.method.sweep.gradients import (
    BINS,
    LEAST_SCORED,
    LEAST_WINDOWS,
    SHARE,
    TOKENS,
)
from sparsellm.method.sweep.head import HEAD_TOKENS
from sparsellm.method.sweep.streamed import MOST_KEPT, place_dtype
from sparsellm.method.sweep.sweep_task import Residence
from sparsellm.method.sweep.training import LEAST_STEPS, MOST_HELD_OUT
from sparsellm.method.sweep.whole_model import PROBE_STEPS, STEP_TOKENS, cut_to
from sparsellm.model import Chain
from sparsellm.model.chain import Kind, Size
from sparsellm.model.streams import PIECE_TOKENS, windows_of
from sparsellm.recipe import Recipe
from sparsellm.records import Memory
from sparsellm.registry import Workspace
from sparsellm.run.choice import Choice
from sparsellm.run.speeds import Speeds
from sparsellm.text.self_generated import BATCH

DEFAULT_SHARE = (
    0.8  # share of the free memory; the rest is for the page cache and other processes
)
DEVICE_SHARE = 0.9  # share of the free memory of a GPU; the rest is for libraries, and for holes between tensors
SLACK = 0.05  # hidden states leave this part of the budget free, because the prediction is not exact
LIBRARIES = (
    128 << 20
)  # torch, its kernels and the allocator; once more where a CPU runs experts

GRADIENTS = 2.5  # fp32 copies of a block: its parameters in fp32 and in bf16, Fisher diagonals of its weights
STREAMED_COPIES, ROUNDED_COPIES = (
    1.5,
    3.5,
)  # fp32 copies of a block in a step: gradients, half in bf16; two on its grid
HOLES = 2  # fp32 copies of a block in a mixture's step on a CPU: small weights of experts leave holes in the heap
MOVED = 3  # fp32 copies of a block that a step of a streamed sweep reads: parameters, two moments
AHEAD = 3  # fp32 copies of a block that a GPU holds more: the next one's parameters and moments are on their way
ATTENTION_COPIES = 4  # fp32 matrices (heads, seq, seq) of attention as plain products, where gradients follow
FORWARD_COPIES = 2.5  # the same in torch's own plain products, where none follow
STREAMED = "streamed"
RESIDENT = {  # name → what it does where all blocks with their activations do not fit
    "resident": Residence(),
    "resident, recomputing": Residence(recomputes=True),
    "resident, offloading": Residence(offloads=True),
    "resident, recomputing and offloading": Residence(recomputes=True, offloads=True),
}
KEPT = (
    "statistics",
    "solving",
)  # the steps that outputs of pruned sublayers are kept for
TRAINED_COPIES = 3  # fp32 copies of every block in a sweep: parameters and two moments; the best state is one more
KEPT_WIDTHS, KEPT_OUTPUTS = (
    10,
    4,
)  # activations that gradients of a block read: as wide as its input, its outputs
SWEEP_STREAMS = 2  # inputs and dense outputs of a set of windows; the first set stays, since it judges every pass
SAVED_COPIES = 7  # fp32 copies of every block on disk: the best, and parameters and moments of two passes
FACTORS = (
    1 / 32
)  # factors of groups / elements of a block, at most, where values are rounded
LOGITS = 2.5  # fp32 copies of a chunk of logits in a loss: they, their gradient, others in bf16; in fp32 one more


@dataclass(frozen=True)
class Extent:
    """The calibration windows of a run, and the processes that divide them."""

    samples: int  # windows in a set
    seq_len: int  # tokens in a window
    batch_tokens: int  # tokens in one forward call
    sets: int = 1
    swept: int = 0  # tokens of all passes of the sweep
    fresh: bool = False  # whether later passes run on other windows than the first
    ranks: int = 1
    sharers: int = 1  # processes that share the memory of this one's machine
    written: int = 0  # tokens that the model writes itself
    cut: bool = True  # whether a sweep cuts windows to its steps, as it does but for given token ids

    def step(self, sharers: int) -> int:
        """The most tokens of a step of the sweep that one of its ``sharers`` runs."""
        window = cut_to(self.seq_len, sharers) if self.cut else self.seq_len
        return max(window, STEP_TOKENS // sharers)

    @property
    def share(self) -> int:
        """The most windows of a set that one process runs."""
        return self.share_of(self.samples)

    def share_of(self, windows: int) -> int:
        """The most windows of some that one process runs: whole batches, if there are enough for all processes."""
        batch = windows_of(self.batch_tokens, self.seq_len)
        batches = math.ceil(windows / batch)
        if batches < self.ranks:
            return math.ceil(windows / self.ranks)
        return min(windows, math.ceil(batches / self.ranks) * batch)


@dataclass(frozen=True)
class Demand:
    """The properties of a run that determine the memory of one process."""

    extent: Extent
    workspace: (
        Workspace  # holds for the method, the solver inside it, and the allocation
    )
    gradient_tokens: int = (
        0  # calibration tokens of this process for the gradients of the dense model
    )
    passes: int = 0  # those of the sweep that follows
    unrounded: bool = (
        False  # whether the sweep trains values that are rounded when a block runs
    )
    sweep: str = STREAMED  # how it holds the blocks, see :func:`sweeps`
    removes: bool = False  # whether it removes experts
    reduced: bool = False  # whether that was done before
    zeros: float = 0.0  # the share of zeros in the linears of a pruned block

    @property
    def step(self) -> int:
        """The most tokens of a step of the sweep in this process."""
        return self.extent.step(self.extent.ranks if self.sweep in RESIDENT else 1)


class Held(NamedTuple):
    """Bytes of one process in a step of a run."""

    working: int  # where blocks run
    movable: int = 0  # hidden states and swept weights, which are in memory as far as there is room, then in files
    read: int = 0  # what is in memory of those in files
    host: int = 0  # next to a GPU, in the memory of the machine


def device_budget(device: torch.device, asked: str | int | None) -> int:
    """Bytes that a run may take of a CUDA device: what is asked for, or a share of what is free; 0 elsewhere."""
    if device.type != "cuda":
        return 0
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(
        device
    )  # by torch, to use again
    free = torch.cuda.mem_get_info(device)[0] + kept
    return int(DEVICE_SHARE * free) if asked is None else min(parse_bytes(asked), free)


def plan_memory(
    chain: Chain, demand: Demand, budget: str | int | None, on_device: int | None = 0
) -> Memory:
    """Predicts the peak and divides the budget: first what every step holds, then hidden states; the rest goes to disk.

    Without a budget the process takes a share of the free memory, on top of what it holds. On a GPU blocks run there,
    and hidden states stay there as far as ``on_device`` bytes have room; None for as many as the blocks take. Raises
    MemoryBudgetError if the run needs more than a budget."""
    start, most = _start_and_most(demand.extent.sharers, budget)
    steps, base, held, there = (
        steps_of(chain, demand),
        start + LIBRARIES * (1 + _experts_on_cpu(chain)),
        0,
        0,
    )
    advice = f"lower batch_tokens (now {demand.extent.batch_tokens}), or take a method that needs less"
    worst = max(steps, key=lambda name: steps[name].working + steps[name].read)
    if chain.device.type != "cpu":
        needs = steps[worst].working
        on_device = needs if on_device is None else on_device
        if chain.device.type == "cuda" and needs > on_device:
            raise MemoryBudgetError(
                f"this run needs {_gb(needs)} on {machine.machine_name(chain.device)} for {worst}, and may take "
                f"{_gb(on_device)} of what is free there; allow more with --device-memory, {advice}, or device cpu"
            )
        held = _room(steps, int(on_device * (1 - SLACK)))
        there = max(step.working + min(step.movable, held) for step in steps.values())
        base += _largest_tensor(chain) + max(step.host for step in steps.values())
        steps = {
            name: Held(0, max(0, step.movable - held)) for name, step in steps.items()
        }
    needs = base + steps[worst].working + steps[worst].read
    if needs > most:
        asks = f"this run needs {_gb(needs)} ({_gb(start)} before the start, {_gb(needs - start)} for {worst})"
        raise MemoryBudgetError(
            f"{asks} and may take {_gb(most)}; allow more with --memory, {advice}"
        )
    room = int(most * (1 - SLACK)) - base
    memory = _room(steps, room)
    sizes = {
        name: step.working
        + (step.movable if step.movable <= memory else memory + step.read)
        for name, step in steps.items()
    }
    kept = min(
        kept_bytes(chain, demand), max(0, room - max(sizes[name] for name in KEPT))
    )
    sizes |= {name: sizes[name] + kept for name in KEPT}
    peak = max(sizes, key=lambda name: sizes[name])
    return Memory(
        budget_bytes=most,
        predicted_peak_rss_bytes=base + sizes[peak],
        start_bytes=start,
        working_bytes=base - start + steps[peak].working,
        worst=worst if there else peak,
        hidden_in_memory_bytes=memory,
        hidden_on_disk_bytes=max(step.movable for step in steps.values()) - memory,
        kept_bytes=kept,
        predicted_peak_device_bytes=there,
        hidden_on_device_bytes=held,
        steps_bytes={}
        if there
        else {name: base + size for name, size in sizes.items()},
        sweep=demand.sweep if demand.passes else "",
    )


def _start_and_most(sharers: int, budget: str | int | None) -> tuple[int, int]:
    """Bytes that the process holds, and the most that it may hold."""
    start = psutil.Process().memory_info().rss
    free = DEFAULT_SHARE / sharers * machine.free_memory()
    return start, int(start + free) if budget is None else parse_bytes(budget)


def check_writing(
    chain: Chain, extent: Extent, budget: str | int | None, on_device: int
) -> None:
    """MemoryBudgetError if ``budget`` or ``on_device`` bytes are too few for a model that writes its own text."""
    start, most = _start_and_most(1, budget)
    held, room = (
        _writing_bytes(chain, extent),
        most - start - LIBRARIES * (1 + _experts_on_cpu(chain)),
    )
    room = min(room, on_device) if chain.device.type == "cuda" else room
    if held > room:
        raise MemoryBudgetError(
            f"a model writes its own text with all of its weights in memory: {_gb(held)}, and there is room for "
            f"{_gb(max(0, room))}; name a text with --calibration, or allow more (--memory, --device-memory)"
        )


def _room(steps: Mapping[str, Held], most: int) -> int:
    """The bytes of what is movable that every step has room for, next to what it works on, in ``most`` bytes."""
    rooms = (
        most - step.working - step.read
        for step in steps.values()
        if step.working + step.movable > most
    )
    return max(0, min([max(step.movable for step in steps.values()), *rooms]))


def described(plan: Memory) -> str:
    """The prediction of the memory in one line, with its parts."""
    hidden = (
        f"hidden states and swept weights {_gb(plan.hidden_in_memory_bytes)} in memory"
    )
    others = {
        "on the device": plan.hidden_on_device_bytes,
        "on disk": plan.hidden_on_disk_bytes,
    }
    others["of outputs kept within a block"] = plan.kept_bytes
    hidden += "".join(
        f", {_gb(size)} {where}" for where, size in others.items() if size
    )
    device = (
        f", {_gb(plan.predicted_peak_device_bytes)} on the device"
        if plan.predicted_peak_device_bytes
        else ""
    )
    hidden += f"; sweep {plan.sweep}" if plan.sweep else ""
    return (
        f"predicted peak memory {_gb(plan.predicted_peak_rss_bytes)} of {_gb(plan.budget_bytes)}{device} "
        f"({_gb(plan.start_bytes)} before the start, {_gb(plan.working_bytes)} for {plan.worst}; {hidden})"
    )


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def _experts_on_cpu(chain: Chain) -> bool:
    """Whether a CPU runs experts: oneDNN keeps kernels for each number of tokens that one gets."""
    return chain.device.type == "cpu" and any(kind.experts for kind in chain.kinds)


def kept_bytes(chain: Chain, demand: Demand) -> int:
    """The most bytes of a block's writers' inputs, or outputs if larger, on the CPU alone (:meth:`Stream.keep`)."""
    if chain.device.type != "cpu":
        return 0
    width, most = _width(chain), 0
    for kind in chain.kinds:
        inputs = sorted(
            (
                max(size.features, width)
                for size in kind.linears
                if size.outputs == width
            ),
            reverse=True,
        )
        most = max(most, sum(inputs[: demand.workspace.writers]))
    return most * demand.extent.share * demand.extent.seq_len * chain.dtype.itemsize


def gradient_bytes(chain: Chain, tokens: int) -> int:
    """Bytes that a backward sweep keeps for ``tokens`` tokens: hidden states around every block, and a gradient."""
    return tokens * _width(chain) * ((len(chain) + 1) * chain.dtype.itemsize + 4)


def saved_sweep_bytes(
    chain: Chain, passes: int, zeros: float, *, unrounded: bool
) -> int:
    """Most disk that saved passes of a sweep take, without the ``zeros``; a single one saves only its parameters."""
    copies = SAVED_COPIES if passes > 1 else passes
    return round(
        copies * (4 * kept_share(chain, zeros) + 1 / 8) * _trained(chain, unrounded)
    )


def kept_share(chain: Chain, zeros: float) -> float:
    """The share of the elements of all blocks that are not pruned, with these ``zeros`` in their linears."""
    weights = sum(
        kind.number * sum(size.features * size.outputs for size in _linears(kind))
        for kind in chain.kinds
    )
    return 1 - zeros * weights / _trained(chain, unrounded=False)


def stored_share(chain: Chain, zeros: float) -> float:
    """The share of the elements of all blocks that a streamed sweep stores; below 1 with the place of each."""
    share = kept_share(chain, zeros)
    return share if share <= MOST_KEPT else 1.0


def _linears(kind: Kind) -> Iterator[Size]:
    """The linears of a block, those of every expert."""
    yield from kind.linears
    for linears, number in kind.experts.items():
        yield from number * linears


def _trained(chain: Chain, unrounded: bool) -> int:
    """The most elements that a sweep trains."""
    elements = sum(kind.number * kind.elements for kind in chain.kinds)
    return elements + round(FACTORS * elements) if unrounded else elements


def checkpoint_bytes(chain: Chain) -> int:
    """Bytes of the checkpoint's weight files; for a model in memory, of its parameters and buffers."""
    if chain.reader is not None:
        return chain.reader.bytes
    return sum(
        value.numel() * value.element_size()
        for value in chain.model.state_dict().values()
    )


def accumulator_bytes(features: int) -> int:
    """Bytes of a :class:`~sparsellm.method.gram.GramAccumulator`: fp64 panels of its upper triangle."""
    return 8 * sum(
        min(PANEL, features - start) * (features - start)
        for start in range(0, features, PANEL)
    )


def head_bytes(chain: Chain) -> tuple[int, int]:
    """Bytes of the weights outside the blocks, and of a loss: logits, their gradient, and copies of a chunk of them."""
    outer = (
        chain.dtype.itemsize * chain.outer_elements() if chain.reader is not None else 0
    )
    copies = LOGITS if chain.dtype.itemsize == 2 else LOGITS + 1
    return outer, int(copies * 4 * HEAD_TOKENS) * int(
        chain.config.get_text_config().vocab_size
    )


def steps_of(chain: Chain, demand: Demand) -> dict[str, Held]:
    """The most that each step of a run holds, in the block where that is largest; what is widened is there twice."""
    extent, item, read = demand.extent, chain.dtype.itemsize, chain.reader is not None
    tokens = (
        min(extent.share, windows_of(extent.batch_tokens, extent.seq_len))
        * extent.seq_len
    )
    piece = max(
        extent.seq_len, min(extent.batch_tokens, PIECE_TOKENS)
    )  # tokens of a pass with gradients
    widened = read * max(
        (s.bytes for s in chain.outer_tensors().values() if s.dtype != chain.dtype),
        default=0,
    )
    work, statistics, solving, gradients, removing = (
        demand.workspace,
        [0],
        [0],
        [sum(head_bytes(chain))],
        [0],
    )
    for kind in chain.kinds:
        loaded = item * kind.elements * (read + demand.unrounded)
        loaded += (
            2 * kind.elements if chain.products is not None and item == 4 else 0
        )  # the factors in bf16
        # Activations: gate, up, their product and one more, or attention's scores; copies of inputs, also in norms
        scores = _attention_bytes(chain, tokens, extent.seq_len, gradients=False)
        wide, inputs = (
            4 * item * tokens * _widest(chain, kind),
            8 * item * tokens * _width(chain),
        )
        running = loaded + max(wide, scores) + inputs
        statistics.append(running + _statistics_bytes(kind, work))
        removing.append(
            running + _removal_bytes(chain, kind, tokens, extent.share * extent.seq_len)
        )
        solving += [
            running + int(work.blocks * 4 * kind.elements),
            loaded + _solver_bytes(chain, kind, work),
        ]
        scores = _attention_bytes(chain, piece, extent.seq_len, gradients=True)
        gradients.append(
            loaded + wide + inputs + int(GRADIENTS * 4 * kind.elements) + scores
        )
        if kind.first == 0:
            embedding = max(running, widened) + (
                item * chain.outer_elements(head=False) if read else 0
            )
    mixtures = any(
        kind.experts for kind in chain.kinds
    )  # their inputs are stored; in a removal fp32 outputs, too
    # The last hidden states of a dense model that will not be there any more are kept from before the walk.
    dense = demand.passes > 0 and (not read or demand.reduced)
    streams = extent.sets + work.streams + mixtures + dense
    walked = (
        (streams * item + 4 * demand.removes)
        * extent.share
        * extent.seq_len
        * _width(chain)
    )
    steps = {
        "checking": Held(_largest_tensor(chain)),
        "embedding": Held(embedding, walked),
    }
    steps |= {
        "statistics": Held(max(statistics), walked),
        "solving": Held(max(solving), walked),
    }
    if extent.written:
        steps["calibration"] = Held(_writing_bytes(chain, extent))
    if demand.removes:
        steps["experts"] = Held(max(removing), walked)
    if demand.gradient_tokens:
        steps["gradients"] = Held(
            max(gradients), gradient_bytes(chain, demand.gradient_tokens)
        )
        held = (
            16
            * BINS
            * sum(kind.number * len([*_linears(kind)]) for kind in chain.kinds)
        )  # histograms, sums
        steps["allocating"] = (
            Held(0, host=held) if chain.device.type == "cuda" else Held(held)
        )
    if demand.passes:
        steps |= _sweep_steps(chain, demand)
    # Gemma 4 makes inputs of each block from the token ids, and they stay.
    wide = len(chain) * int(
        getattr(chain.config.get_text_config(), "hidden_size_per_layer_input", None)
        or 0
    )
    handed = (
        (extent.sets + (demand.passes > 0))
        * item
        * extent.share
        * extent.seq_len
        * wide
    )
    return {
        name: held._replace(working=held.working + handed)
        for name, held in steps.items()
    }


def _sweep_steps(chain: Chain, demand: Demand) -> dict[str, Held]:
    """The same for the sweep, and for the end of its first pass, when a copy of the best state is made."""
    gpu, extent, (outer, loss) = (
        chain.device.type == "cuda",
        demand.extent,
        head_bytes(chain),
    )
    windows = math.ceil(extent.swept / demand.passes / extent.seq_len)  # in a pass
    moved = (
        SWEEP_STREAMS * (1 + extent.fresh) * extent.share_of(windows) * extent.seq_len
    )
    moved *= _width(chain) * chain.dtype.itemsize
    inputs = len(chain) * demand.step * _width(chain) * 4
    best, largest = (
        4 * _trained(chain, demand.unrounded),
        4 * max(kind.elements for kind in chain.kinds),
    )
    later = demand.passes > 1  # the best state is there from the second pass on
    way = residence(chain, demand.sweep, extent.ranks)
    if way is None:
        share = stored_share(chain, demand.zeros)
        places = place_dtype(largest // 4).itemsize // 4 * (share < 1)
        best = int(share * best)
        copies = ROUNDED_COPIES if demand.unrounded else STREAMED_COPIES
        copies += (
            MOVED * (gpu or share < 1) + AHEAD * gpu
        )  # a block is made whole to run
        copies += HOLES * _experts_on_cpu(chain)
        block = int(copies * largest) + _activations_for_gradients(chain, demand, 4)
        moved, read = (
            moved + (TRAINED_COPIES + places) * best,
            0 if gpu else MOVED * largest,
        )
        working = outer + inputs + max(loss, block)
        return {
            "sweeps": Held(working, moved + best * later, read),
            "keeping": Held(outer, moved + best, read),
        }
    running = (
        outer + 3 * largest * way.sharded
    )  # a block that is gathered, its gradients, and the next one
    copied = (
        not way.sharded if way.narrow else chain.products is not None
    )  # torch gathers narrow shards in bf16
    running += best // 2 * copied
    kept = _activations_for_gradients(chain, demand, 2 if way.narrow else 4)
    activations = loss + (kept + inputs if way.recomputes else kept * len(chain))
    best //= extent.ranks
    masters = TRAINED_COPIES * best
    step = Held(
        running + activations, moved + best * later, host=masters + best
    )  # their gradients, too
    if not way.offloads:
        step = step._replace(working=step.working + step.host, host=0)
    return {
        "sweeps": step,
        "keeping": Held(0 if way.offloads else masters, moved + best),
    }


def sweeps(chain: Chain, demand: Demand) -> list[str]:
    """The ways to hold the blocks in the sweep of a run; [""] if it has none.

    Only a streamed sweep takes experts, rounded values and, in several processes, models with a parameter that is a
    single number or is shared, which processes do not divide by rows."""
    if not demand.passes:
        return [""]
    gpu, undivided = (
        chain.device.type == "cuda",
        any(kind.scalars for kind in chain.kinds),
    )
    undivided |= any(
        not chain.owns(name)
        for index in range(len(chain))
        for name in chain.names_of(index)
    )
    if (
        demand.unrounded
        or any(kind.experts for kind in chain.kinds)
        or (demand.extent.ranks > 1 and undivided)
    ):
        return [STREAMED]
    resident = RESIDENT.items() if gpu or chain.device.type == "cpu" else ()
    return [
        *[
            name
            for name, way in resident
            if (gpu and not undivided) or not way.offloads
        ],
        STREAMED,
    ]


def residence(chain: Chain, sweep: str, ranks: int) -> Residence | None:
    """The resident sweep of this name; None for a streamed one or none."""
    way, narrow = (
        RESIDENT.get(sweep),
        chain.device.type == "cuda" and chain.dtype is torch.bfloat16,
    )
    return (
        replace(way, sharded=ranks > 1 or way.offloads, narrow=narrow)
        if way is not None
        else None
    )


def _activations_for_gradients(chain: Chain, demand: Demand, item: int) -> int:
    """Bytes that the gradients of a block in a step read, in a dtype of ``item`` bytes."""
    widest = max(_widest(chain, kind) for kind in chain.kinds)
    kept = item * demand.step * (KEPT_WIDTHS * _width(chain) + KEPT_OUTPUTS * widest)
    return kept + _attention_bytes(
        chain, demand.step, min(demand.step, demand.extent.seq_len), gradients=True
    )


def _widest(chain: Chain, kind: Kind) -> int:
    """The most outputs of a linear."""
    return max(
        (size.outputs for linears in (kind.linears, *kind.experts) for size in linears),
        default=_width(chain),
    )


def _attention_bytes(chain: Chain, tokens: int, seq: int, *, gradients: bool) -> int:
    """Bytes of attention as plain products, which passes with ``gradients`` take on a GPU (``attention_for``), and all
    passes of a model for which transformers, or torch on a CPU, has nothing else; and of a sliding window's mask."""
    text, device = chain.config.get_text_config(), chain.device.type
    keys = getattr(text, "qk_head_dim", None) or getattr(text, "head_dim", None)
    uneven = device == "cpu" and getattr(text, "v_head_dim", None) not in (
        None,
        keys,
    )  # not fused there
    plain = getattr(text, "_attn_implementation", None) == "eager" or (
        gradients and (uneven or device == "cuda")
    )
    copies = ATTENTION_COPIES if plain else FORWARD_COPIES * uneven
    masked = (
        getattr(text, "sliding_window", None) or seq
    ) < seq  # one bool mask, and for each window one of numbers
    return (
        int(
            4
            * tokens
            * seq
            * (copies * getattr(text, "num_attention_heads", 0) + masked)
        )
        + masked * seq**2
    )


def _statistics_bytes(kind: Kind, workspace: Workspace) -> int:
    """Bytes of the statistics: a chunk of tokens in fp32, sums for every input, the largest Gram matrix."""
    if not workspace.grams:
        return 2 * 4 * CHUNK_ELEMENTS
    inputs = [features for _, features, _ in _inputs(kind.linears)]
    sums = sum(map(accumulator_bytes, inputs)) + max(
        (4 * features**2 for features in inputs), default=0
    )
    return 2 * 4 * CHUNK_ELEMENTS + max(sums, *map(_expert_bytes, kind.experts), 0)


def _expert_bytes(linears: Sequence[Size]) -> int:
    """Bytes of the statistics of one expert: matrices of its tokens and of all, their mean, sums, cross-moments of its
    last linear, and a copy of its weights."""
    matrices = sum(
        3 * 4 * linear.features**2 + accumulator_bytes(linear.features)
        for linear in linears
    )
    weights = [linear.features * linear.outputs for linear in linears]
    return matrices + 5 * 4 * weights[-1] + 4 * sum(weights)


def _removal_bytes(chain: Chain, kind: Kind, tokens: int, every: int) -> int:
    """Bytes of the removal of experts from a block, with ``tokens`` in a forward call, ``every`` one of this process: a
    copy of the block, all routes, and the sample with the outputs of all experts, or the refit of one."""
    width, inner = (
        _width(chain),
        max((linears[-1].features for linears in kind.experts), default=0),
    )
    sample = min(every, 2 * SAMPLE) * (
        sum(kind.experts.values()) * min(width, PROJECTED) + 4 * width
    )
    refit = 4 * inner**2 + 7 * width * inner + tokens * (2 * inner + 3 * width)
    routes = every * (12 * (experts_of_token(chain) or 1) + 8)
    return chain.dtype.itemsize * kind.elements + routes + 4 * max(sample, refit)


def _inputs(linears: Sequence[Size]) -> dict[tuple[str, int, bool], list[Size]]:
    """Groups of linears with one input, by a guess: one module and number of inputs, each module's last apart."""
    last = {linear.module: position for position, linear in enumerate(linears)}
    groups: dict[tuple[str, int, bool], list[Size]] = {}
    for position, linear in enumerate(linears):
        groups.setdefault(
            (linear.module, linear.features, position == last[linear.module]), []
        ).append(linear)
    return groups


def _solver_bytes(chain: Chain, kind: Kind, workspace: Workspace) -> int:
    """Bytes for the most expensive linear of a block: copies of its weight, its Gram matrices and factorisations, and
    the Gram matrices of later inputs, unless writers are refitted; for a linear of an expert, those of all tokens."""

    def solving(linear: Size, others: Sequence[int]) -> int:
        solved = int(workspace.weights * 4 * linear.features * linear.outputs)
        square = 4 * linear.features**2
        remembered = min(workspace.remembered * square, max(REMEMBERED_BYTES, square))
        remembered += (
            remembered // 2 * (workspace.narrow and chain.products is not None)
        )  # copies in bf16
        later = sum(4 * features**2 for features in others)
        return solved + (
            int(workspace.grams * square) + remembered + later if workspace.grams else 0
        )

    groups = _inputs(kind.linears)
    inputs = [] if workspace.writers else [features for _, features, _ in groups]
    sizes = [
        solving(size, inputs[at:])
        for at, group in enumerate(groups.values(), 1)
        for size in group
    ]
    sizes += [
        solving(size, [other.features for other in expert])
        for expert in kind.experts
        for size in expert
    ]
    return max(sizes, default=0)


def _writing_bytes(chain: Chain, extent: Extent) -> int:
    """All weights, and keys and values of the windows that a model writes at once."""
    text, width = chain.config.get_text_config(), _width(chain)
    heads = getattr(text, "num_attention_heads", None) or 1
    size = getattr(text, "head_dim", None) or width // heads
    values = (
        2 * len(chain) * (getattr(text, "num_key_value_heads", None) or heads) * size
    )
    weights = (
        sum(kind.number * kind.elements for kind in chain.kinds)
        + chain.outer_elements()
    )
    return chain.dtype.itemsize * (
        weights + values * min(BATCH * extent.seq_len, extent.written)
    )


def _largest_tensor(chain: Chain) -> int:
    return max(
        source.bytes
        for source in [
            *chain.outer_tensors().values(),
            *chain.block_tensors(0).values(),
        ]
    )


def _width(chain: Chain) -> int:
    return int(chain.config.get_text_config().hidden_size)


DISK = 1e9  # bytes read, checked or written in a second
GATHERED = (
    3 * 2
)  # bytes that a step of a sharded sweep gathers for each weight: bf16, twice, and its gradient
FORWARD, BUSY = (
    1.0,
    0.5,
)  # shares of a large product's speed that blocks reach forward, and with gradients
COUNTING, SOLVING, NARROW = (
    0.4,
    1.2,
    0.33,
)  # the same for statistics, and solvers in fp32 and with bf16 products
PASSES = 2  # runs of a block over all tokens while it is pruned: for statistics, and for the outputs
REMOVING = 7  # the same while experts are removed: for scores, outputs, and two rounds of refits, of two or three each
REPEATED = 3.3  # the same where pruned sublayers run again for each later group: q, k, v five times, down twice
BACKWARD = 3  # passes that a backward pass of the sweep costs: the block again, and twice that for the gradients
GRADIENT = 3  # the same where only inputs have gradients, and the squared gradients of the weights
TRIALS = 2  # rates that a sweep tries, each judged by the held-out steps
WRITING = 10  # passes that a token costs which the model writes itself
TRIANGLE = 0.6  # share of a Gram matrix that is computed: panels of its upper triangle
ADAM = (
    8 * 4
)  # bytes that a step moves for each weight: parameters, two moments and gradients in fp32, both ways
UPLOADED, DOWNLOADED = (
    4 * 4,
    3 * 4,
)  # bytes that a step reads for each weight from where it is kept, and writes there
PLACES = 2 * 4  # the same for the place of a weight where pruned ones are not stored


@dataclass(frozen=True)
class Work:
    """Operations of a whole model, and bytes."""

    token: float  # for a token to run through all blocks
    head: float  # for a token to run through the head
    statistics: float  # for the Gram matrices, for each token
    targets: float  # for the cross-moments of writers, for each token
    solving: float  # for a product of each weight with its Gram matrix
    weights: int  # elements of all blocks
    sums: int  # bytes of the sums of all Gram matrices
    stored: int  # bytes of the checkpoint
    hidden: int  # bytes of the hidden state of a token, at every block, there and back

    @classmethod
    def of(cls, chain: Chain, seq_len: int) -> Self:
        text, width = chain.config.get_text_config(), _width(chain)
        active = statistics = targets = solving = 0.0
        sums, chosen = (
            0,
            experts_of_token(chain) or 1,
        )  # experts of a block that a token is routed to
        for kind in chain.kinds:
            experts = sum(kind.experts.values())
            parts: list[tuple[Sequence[Size], int, float]] = [(kind.linears, 1, 1.0)]
            parts += [
                (linears, number, min(1.0, chosen / experts))
                for linears, number in kind.experts.items()
            ]
            for linears, number, routed in parts:
                for (_, features, last), group in _inputs(linears).items():
                    outputs, every = (
                        sum(linear.outputs for linear in group),
                        number * kind.number,
                    )
                    active += every * routed * features * outputs
                    statistics += every * routed * TRIANGLE * 2 * features**2
                    targets += every * routed * 2 * features * outputs * last
                    solving += every * 2 * features**2 * outputs
                    sums += every * accumulator_bytes(features)
        return cls(
            token=2 * active + 4 * seq_len * width * len(chain),
            head=2.0 * text.vocab_size * width,
            statistics=statistics,
            targets=targets,
            solving=solving,
            weights=_trained(chain, unrounded=False),
            sums=sums,
            stored=checkpoint_bytes(chain),
            hidden=2 * len(chain) * width * chain.dtype.itemsize,
        )


class Removing(Choice):
    """The choice of the step that removes experts, whose memory and time are not those of a method."""

    @classmethod
    def by(cls, recipe: Recipe) -> Self:
        """The choice of the step that removes the experts of a recipe; a RecipeError if the recipe is wrong."""
        Choice.of(recipe)
        score = SCORES[recipe.expert_score]
        needs = score.needs(score.check(recipe.expert_options))
        nothing = cls.of(Recipe(method="magnitude", sparsity=0.0))
        return replace(nothing, needs=replace(needs, token_states=True))

    @property
    def workspace(self) -> Workspace:
        """The memory and work of the score."""
        return self.needs.workspace


def predicted_seconds(
    chain: Chain,
    choice: Choice,
    extent: Extent,
    speeds: Speeds,
    *,
    finished: int = 0,  # blocks that an earlier process has pruned; it has chosen the sparsities, too
    memory: Memory | None = None,  # None for enough of it
) -> dict[str, float]:
    """Seconds of each phase after the model is opened, by the names of the phases in events."""
    work, left = Work.of(chain, extent.seq_len), 1 - finished / len(chain)
    away, in_files = memory.shares if memory is not None else (0.0, 0.0)
    way = memory.sweep if memory is not None else STREAMED
    moving = away / speeds.link + in_files / DISK  # seconds a byte
    token = work.token / (FORWARD * speeds.blocks) + work.hidden * moving
    tokens = extent.share * extent.seq_len
    differentiated = (
        0
        if finished
        else extent.share_of(gradient_windows(choice, extent)) * extent.seq_len
    )
    passes = walked_passes(
        choice,
        kept=(memory is None or memory.kept_bytes > 0) and chain.device.type == "cpu",
    )
    narrow = choice.workspace.narrow and chain.products is not None
    solving = (
        choice.workspace.products
        * work.solving
        / (NARROW * speeds.blocks if narrow else SOLVING * speeds.exact)
    )
    passes -= choice.sets / len(chain)  # outputs of the last block are not needed
    counting = (
        work.statistics + work.targets * (choice.method.workspace.writers > 0)
    ) / (COUNTING * speeds.exact)
    scored = max(SHARE, min(1.0, LEAST_SCORED / extent.seq_len))
    differentiating = ((1 + GRADIENT) * work.token + 3 * scored * work.head) / (
        BUSY * speeds.blocks
    )
    joining = 2 * work.sums / speeds.exchanged if extent.ranks > 1 else 0.0
    walking = tokens * (passes * token + counting) + solving / extent.ranks + joining
    if isinstance(choice, Removing):
        walking = tokens * (
            REMOVING * token
            + (work.statistics + work.targets) / (COUNTING * speeds.exact)
        )
    return {
        "calibration": extent.written * WRITING * token,
        "check": work.stored / DISK,
        "gradients": differentiated * differentiating,
        "replay": finished / len(chain) * choice.sets * tokens * token,
        "experts" if isinstance(choice, Removing) else "prune": left * walking
        + 2 * work.stored / DISK,
        "sweep": sweep_seconds(
            work,
            extent,
            choice.passes,
            speeds,
            moving,
            way,
            stored_share(chain, choice.zeros),
        ),
        "save": work.stored / DISK,
    }


def gradient_windows(choice: Choice, extent: Extent) -> int:
    """The windows that the gradients of the dense model's loss run on; 0 if nothing asks for gradients."""
    asked = (
        choice.allocation_needs.gradient_tokens or TOKENS * choice.needs.output_costs
    )
    return (
        min(extent.samples, max(LEAST_WINDOWS, windows_of(asked, extent.seq_len)))
        if asked
        else 0
    )


def sweep_seconds(
    work: Work,
    extent: Extent,
    passes: int,
    speeds: Speeds,
    moving: float,
    sweep: str,
    stored: float,
) -> float:
    """Seconds of a sweep in ``passes`` passes: the dense model once, then forward and backward. In a streamed one
    all processes wait for the one that has the windows of a step, and a byte that is not where blocks run takes
    ``moving`` seconds, for the share of the weights that is ``stored``; in a resident one each process has some windows
    of a step, and carries some rows of the parameters."""
    if not passes:
        return 0.0
    ranks = extent.ranks if sweep in RESIDENT else 1
    tokens, step = extent.swept / ranks, extent.step(ranks)
    steps = tokens / step / passes
    held = min(MOST_HELD_OUT, max(1.0, steps / 8)) * (steps >= LEAST_STEPS)
    judged = (
        (passes + 1 + TRIALS * (steps - held >= 3 * PROBE_STEPS))
        * (held or steps)
        * step
    )  # if none, by all
    trained = tokens - held * step  # in the first pass
    through = (
        tokens
        + judged
        + trained
        * (1 + BACKWARD - (sweep in RESIDENT and not RESIDENT[sweep].recomputes))
    )
    running = (through * work.token + (2 * judged + 4 * trained) * work.head) / (
        BUSY * speeds.blocks
    )
    away = (
        moving
        if sweep == STREAMED
        else (sweep in RESIDENT and RESIDENT[sweep].offloads) / speeds.link
    )
    carried: float = UPLOADED + DOWNLOADED
    if sweep == STREAMED and stored < 1:
        carried = stored * (carried + PLACES)
    moved = (ADAM / speeds.memory + carried * away) / ranks
    moved += GATHERED / speeds.exchanged if ranks > 1 else 0.0
    return running + trained / step * work.weights * moved


def walked_passes(choice: Choice, *, kept: bool) -> float:
    """Passes of a block over all tokens in the walk, where outputs of pruned sublayers are ``kept`` or not."""
    return (
        (REPEATED if choice.method.workspace.writers > 0 and not kept else PASSES)
        + choice.sets
        - 1
    )
