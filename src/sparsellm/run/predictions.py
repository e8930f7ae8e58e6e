"""The memory and the seconds of a run, predicted before it starts. Every formula of bytes is in this file.

Solvers, methods and allocations declare the tensors they hold in a :class:`~sparsellm.registry.Workspace`. Only the
proportions of the seconds count: :class:`sparsellm.progress.Forecast` corrects them by finished phases.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from sparsellm import machine
from sparsellm.chain import Chain, LinearView
from sparsellm.chain.experts import ExpertLinear
from sparsellm.chain.streams import PIECE_TOKENS, windows_of
from sparsellm.errors import MemoryBudgetError
from sparsellm.inputs import parse_bytes
from sparsellm.records import Memory
from sparsellm.registry import Workspace
from sparsellm.run.choice import Choice
from sparsellm.run.speeds import Speeds
from sparsellm.statistics.gram import CHUNK_ELEMENTS, PANEL, REMEMBERED_BYTES
from sparsellm.sweep.gradients import LEAST_SCORED, LEAST_WINDOWS, SHARE, TOKENS
from sparsellm.sweep.head import HEAD_TOKENS
from sparsellm.sweep.sweep_task import Residence
from sparsellm.sweep.training import MOST_HELD_OUT
from sparsellm.sweep.whole_model import STEP_TOKENS

DEFAULT_SHARE = 0.8  # share of the free memory; the rest is for the page cache and other processes
DEVICE_SHARE = 0.9  # share of the free memory of a GPU; the rest is for libraries, and for holes between tensors
SLACK = 0.05  # hidden states leave this part of the budget free, because the prediction is not exact
LIBRARIES = 128 << 20  # torch, its kernels and the allocator

GRADIENTS = Workspace(weights=3, grams=0, blocks=2.5)  # a block in fp32, its activations, one weight's Fisher diagonal
SWEEP = Workspace(weights=0, grams=0, blocks=5)  # a block's parameters, their gradients, two moments, one temporary
ROUNDED = Workspace(weights=0, grams=0, blocks=7)  # the same with a block on its grid, and a weight's groups
AHEAD = 3  # fp32 copies of a block that a GPU holds more: the next one's parameters and moments are on their way
ATTENTION_COPIES = 4  # fp32 matrices (heads, seq, seq) of attention on a GPU, where gradients follow
SWEPT_COPIES = 4  # fp32 copies of every block during a sweep: parameters, two moments, the best state so far
STREAMED = "streamed"
RESIDENT = {  # name → what it does where all blocks with their activations do not fit
    "resident": Residence(),
    "resident, recomputing": Residence(recomputes=True),
    "resident, offloading": Residence(offloads=True),
    "resident, recomputing and offloading": Residence(recomputes=True, offloads=True),
}
RESIDENT_COPIES = 4  # fp32 copies of every block in a resident one: parameters, two moments, gradients
KEPT_WIDTHS, KEPT_OUTPUTS = 10, 4  # activations that gradients of a block read: as wide as its input, its outputs
SWEEP_STREAMS = 2  # inputs and dense outputs of a set of windows; the first set stays, since it judges every pass
SAVED_COPIES = 7  # fp32 copies of every block on disk: the best, and parameters and moments of two passes
FACTORS = 1 / 32  # factors of groups / elements of a block, at most, where values are rounded
NEXT_TOKEN_COPIES, DIVERGENCE_COPIES = 3, 4  # fp32 copies of a chunk of logits, in each loss of the head


@dataclass(frozen=True)
class Demand:
    """The properties of a run that determine the memory of one process."""

    samples: int  # calibration windows that this process runs, in each of ``sets`` sets
    seq_len: int  # tokens in a window
    batch_tokens: int  # tokens in one forward call
    workspace: Workspace  # holds for the method, the solver inside it, and the allocation
    gradient_tokens: int = 0  # calibration tokens for the gradients of the dense model
    sets: int = 1
    swept: bool = False  # whether a sweep follows
    fresh: bool = False  # whether later passes run on other windows than the first
    unrounded: bool = False  # whether the sweep trains values that are rounded when a block runs
    sweep: str = STREAMED  # how it holds the blocks, see :func:`sweeps`
    ranks: int = 1

    @property
    def streamed(self) -> bool:
        """Whether a streamed sweep follows."""
        return self.swept and self.sweep == STREAMED

    @property
    def whole_workspace(self) -> Workspace:
        """The workspace including that of the gradients and of a streamed sweep."""
        whole = self.workspace.then(GRADIENTS) if self.gradient_tokens else self.workspace
        return whole.then(ROUNDED if self.unrounded else SWEEP) if self.streamed else whole


def device_budget(device: torch.device, asked: str | int | None) -> int:
    """The bytes that a run may take of a CUDA device: a share of what is free, or what is asked for if that is free; 0
    for other devices, whose memory torch does not tell."""
    if device.type != "cuda":
        return 0
    free = machine.free_device_memory(device)
    return int(DEVICE_SHARE * free) if asked is None else min(parse_bytes(asked), free)


def plan_memory(
    chain: Chain, demand: Demand, budget: str | int | None, *, sharers: int = 1, on_device: int = 0
) -> Memory:
    """Predicts the peak and divides the budget: first the working memory, then hidden states; the rest goes to disk.

    Without a budget the process takes a share of the free memory, on top of what it holds; ``sharers`` processes share
    the machine. On a GPU the working memory is there, and hidden states as far as ``on_device`` bytes have room. Raises
    MemoryBudgetError if the run needs more than a budget.
    """
    start = machine.resident()
    most = int(start + DEFAULT_SHARE * machine.free_memory() / sharers) if budget is None else parse_bytes(budget)
    moments = working_bytes(chain, demand)
    worst = max(moments, key=lambda name: moments[name])
    there = moments[worst] if chain.device.type != "cpu" else 0
    working = LIBRARIES + (_largest_tensor(chain) + resident_bytes(chain, demand)[1] if there else moments[worst])
    if chain.device.type == "cuda" and there > on_device:
        raise MemoryBudgetError(
            f"this run needs {_gb(there)} on {machine.machine_name(chain.device)} for {worst}, and may take "
            f"{_gb(on_device)} of what is free there; allow more with --device-memory, lower batch_tokens (now "
            f"{demand.batch_tokens}), or take a method that needs less, or device cpu"
        )
    if start + working > most:
        raise MemoryBudgetError(
            f"this run needs {_gb(start + working)} ({_gb(start)} before the start, {_gb(working)} for {worst}) and "
            f"may take {_gb(most)}; allow more with --memory, lower batch_tokens (now {demand.batch_tokens}), or take "
            "a method that needs less"
        )
    hidden = hidden_bytes(chain, demand)
    held = min(hidden, max(0, int(on_device * (1 - SLACK)) - there))
    hidden -= held
    room = max(0, int(most * (1 - SLACK)) - start - working)
    in_memory = min(hidden, room)
    kept = min(kept_bytes(chain, demand), room - in_memory)
    # The backward sweep ends before the walk and gets no more memory than the walk needs, so the peak is the walk's.
    on_disk = max(hidden, gradient_bytes(chain, demand.gradient_tokens) - held) - in_memory
    during = {"statistics": kept, "solving": kept}
    steps = {step: start + LIBRARIES + size + in_memory + during.get(step, 0) for step, size in moments.items()}
    return Memory(
        budget_bytes=most,
        predicted_peak_rss_bytes=start + working + in_memory + kept,
        start_bytes=start,
        working_bytes=working,
        worst=worst,
        hidden_in_memory_bytes=in_memory,
        hidden_on_disk_bytes=on_disk,
        kept_bytes=kept,
        predicted_peak_device_bytes=there + held,
        hidden_on_device_bytes=held,
        steps_bytes={} if there else steps,
        sweep=demand.sweep if demand.swept else "",
    )


def described(plan: Memory) -> str:
    """The prediction of the memory in one line, with its parts."""
    hidden = f"hidden states and swept weights {_gb(plan.hidden_in_memory_bytes)} in memory"
    if plan.hidden_on_device_bytes:
        hidden += f", {_gb(plan.hidden_on_device_bytes)} on the device"
    if plan.hidden_on_disk_bytes:
        hidden += f", {_gb(plan.hidden_on_disk_bytes)} on disk"
    if plan.kept_bytes:
        hidden += f", {_gb(plan.kept_bytes)} of outputs kept within a block"
    device = f", {_gb(plan.predicted_peak_device_bytes)} on the device" if plan.predicted_peak_device_bytes else ""
    hidden += f"; sweep {plan.sweep}" if plan.sweep else ""
    return (
        f"predicted peak memory {_gb(plan.predicted_peak_rss_bytes)} of {_gb(plan.budget_bytes)}{device} "
        f"({_gb(plan.start_bytes)} before the start, {_gb(plan.working_bytes)} for {plan.worst}; {hidden})"
    )


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def hidden_bytes(chain: Chain, demand: Demand) -> int:
    """Bytes of the hidden states of the calibration windows, and of a sweep's copies of all blocks."""
    mixtures = any(chain.mixtures(index) for index in range(len(chain)))  # their inputs are stored
    dense = demand.swept and chain.reader is None  # its last hidden states are kept from before the walk
    walked = demand.sets + demand.workspace.streams + mixtures + dense
    streams = max(walked, SWEEP_STREAMS * (demand.swept + demand.fresh))
    copies = (SWEPT_COPIES if demand.streamed else demand.swept) * 4 * _trained(chain, demand.unrounded)
    copies //= 1 if demand.streamed else demand.ranks
    return streams * demand.samples * demand.seq_len * _width(chain) * chain.dtype.itemsize + copies


def kept_bytes(chain: Chain, demand: Demand) -> int:
    """The most bytes of the inputs, or the outputs where these are larger, of a block's writers for all tokens; they
    are kept on the CPU only (:meth:`Stream.keep`)."""
    if chain.device.type != "cpu":
        return 0
    width, most = _width(chain), 0
    for index in range(len(chain)):
        linears, _ = _parted(chain, index)
        inputs = sorted((max(each.in_features, width) for each in linears if each.out_features == width), reverse=True)
        most = max(most, sum(inputs[: demand.workspace.writers]))
    return most * demand.samples * demand.seq_len * chain.dtype.itemsize


def gradient_bytes(chain: Chain, tokens: int) -> int:
    """Bytes that a backward sweep keeps for ``tokens`` tokens: hidden states around every block, and a gradient."""
    return tokens * _width(chain) * ((len(chain) + 1) * chain.dtype.itemsize + 4)


def saved_sweep_bytes(chain: Chain, passes: int, *, unrounded: bool) -> int:
    """The most disk space that the saved passes of a sweep take; of a single one only its parameters are saved."""
    return (SAVED_COPIES if passes > 1 else passes) * 4 * _trained(chain, unrounded)


def _trained(chain: Chain, unrounded: bool) -> int:
    """The most elements that a sweep trains."""
    elements = sum(block_elements(chain, index) for index in range(len(chain)))
    return elements + round(FACTORS * elements) if unrounded else elements


def checkpoint_bytes(chain: Chain) -> int:
    """Bytes of the checkpoint's weight files; for a model in memory, of its parameters and buffers."""
    if chain.reader is not None:
        return chain.reader.bytes
    return sum(value.numel() * value.element_size() for value in chain.model.state_dict().values())


def block_elements(chain: Chain, index: int) -> int:
    return sum(math.prod(source.shape) for source in chain.block_tensors(index).values())


def accumulator_bytes(features: int) -> int:
    """Bytes of a :class:`~sparsellm.statistics.GramAccumulator`: fp64 panels of its upper triangle."""
    starts = range(0, features, PANEL)
    return 8 * sum(min(PANEL, features - start) * (features - start) for start in starts)


def head_bytes(chain: Chain, copies: int) -> int:
    """Bytes of the weights outside the blocks, and of ``copies`` fp32 copies of a chunk of logits."""
    outer = chain.dtype.itemsize * chain.outer_elements() if chain.reader is not None else 0
    return outer + copies * 4 * HEAD_TOKENS * int(chain.config.get_text_config().vocab_size)


def working_bytes(chain: Chain, demand: Demand) -> dict[str, int]:
    """The most bytes that each step of a run holds, in the block where that is largest."""
    workspace, gpu = demand.whole_workspace, chain.device.type == "cuda"
    ahead = AHEAD * gpu * demand.streamed
    attention = _attention_bytes(chain, demand) if gpu else 0
    tokens = min(demand.samples, max(1, demand.batch_tokens // demand.seq_len)) * demand.seq_len
    moments = {"checking": _largest_tensor(chain), "embedding": 0, "statistics": 0, "solving": 0}
    for index in range(len(chain)):
        elements = block_elements(chain, index)
        loaded = chain.dtype.itemsize * elements if chain.reader is not None else 0
        loaded += 2 * elements if chain.products is not None else 0  # the factors in bf16
        loaded += chain.dtype.itemsize * elements if demand.unrounded else 0
        running = loaded + _activation_bytes(chain, index, tokens)
        if index == 0:
            outer = chain.dtype.itemsize * chain.outer_elements(head=False) if chain.reader is not None else 0
            moments["embedding"] = outer + running
        moments["statistics"] = max(moments["statistics"], running + _statistics_bytes(chain, index, workspace))
        optimised = running + int((workspace.blocks + ahead) * 4 * elements) + attention
        moments["solving"] = max(moments["solving"], optimised, loaded + _solver_bytes(chain, index, workspace))
    if demand.gradient_tokens:
        moments["gradients"] = head_bytes(chain, NEXT_TOKEN_COPIES)
    if demand.swept:
        moments["sweeps"] = head_bytes(chain, DIVERGENCE_COPIES) + resident_bytes(chain, demand)[0]
    return moments


def sweeps(chain: Chain, demand: Demand) -> list[str]:
    """The ways to hold the blocks in the sweep of a run, the fastest first; [""] if it has none.

    Experts, rounded values, and parameters without rows that processes could divide are swept by a streamed sweep."""
    if not demand.swept:
        return [""]
    gpu, blocks = chain.device.type == "cuda", range(len(chain))
    if demand.unrounded or any(map(chain.mixtures, blocks)):
        return [STREAMED]
    numbers = any(p.dim() == 0 for index in blocks for p in chain.block_parameters(index).values())
    if demand.ranks > 1 and numbers:
        return [STREAMED]
    fits = gpu or chain.device.type == "cpu"
    offloads = gpu and not numbers
    return [*[name for name, way in RESIDENT.items() if fits and (offloads or not way.offloads)], STREAMED]


def residence(chain: Chain, sweep: str, ranks: int) -> Residence | None:
    """The resident sweep of this name; None for a streamed one or none."""
    gpu = chain.device.type == "cuda"
    narrow = gpu and chain.dtype is torch.bfloat16
    way = RESIDENT.get(sweep)
    return replace(way, sharded=ranks > 1 or way.offloads, narrow=narrow) if way is not None else None


def resident_bytes(chain: Chain, demand: Demand) -> tuple[int, int]:
    """Bytes that a resident sweep holds where blocks run, and those that it offloads to the memory of the machine."""
    way, blocks = residence(chain, demand.sweep, demand.ranks), range(len(chain))
    if way is None:
        return 0, 0
    trained = _trained(chain, unrounded=False)
    masters = 4 * RESIDENT_COPIES * trained // demand.ranks
    largest = max(block_elements(chain, index) for index in blocks)
    running = 3 * 4 * largest if way.sharded else 0  # a block that is gathered, its gradients, and the next one
    running += 2 * trained if chain.products is not None or (way.narrow and not way.sharded) else 0
    tokens = max(min(demand.seq_len, STEP_TOKENS), STEP_TOKENS // demand.ranks)
    widest = max((linear.out_features for index in blocks for linear in chain.linears(index)), default=0)
    kept = tokens * (KEPT_WIDTHS * _width(chain) + KEPT_OUTPUTS * widest) * (2 if way.narrow else 4)
    kept += _attention_bytes(chain, demand) if chain.device.type == "cuda" else 0
    activations = kept + len(chain) * tokens * _width(chain) * 4 if way.recomputes else kept * len(chain)
    return (running + activations, masters) if way.offloads else (masters + running + activations, 0)


def _activation_bytes(chain: Chain, index: int, tokens: int) -> int:
    """Bytes of a block's activations: gate, up, their product and one more; copies of inputs in attention and norms."""
    widest = max((linear.out_features for linear in chain.linears(index)), default=_width(chain))
    return tokens * (4 * widest + 8 * _width(chain)) * chain.dtype.itemsize


def _attention_bytes(chain: Chain, demand: Demand) -> int:
    """Bytes of attention as plain products, which passes with gradients take on a GPU (``attention_for``)."""
    seq = demand.seq_len if demand.gradient_tokens else min(demand.seq_len, STEP_TOKENS)
    tokens = max(seq, min(demand.batch_tokens, PIECE_TOKENS)) if demand.gradient_tokens else seq * demand.swept
    return ATTENTION_COPIES * 4 * tokens * seq * getattr(chain.config.get_text_config(), "num_attention_heads", 0)


def _statistics_bytes(chain: Chain, index: int, workspace: Workspace) -> int:
    """Bytes of the statistics: sums for every linear, the largest Gram matrix, and a chunk of tokens in fp32. Experts
    have statistics one at a time; which linears share an input is known when the block runs, so none is assumed to."""
    if not workspace.grams:
        return 2 * 4 * CHUNK_ELEMENTS
    linears, experts = _parted(chain, index)
    sums = sum(accumulator_bytes(linear.in_features) for linear in linears)
    largest = max((4 * linear.in_features**2 for linear in linears), default=0)
    return 2 * 4 * CHUNK_ELEMENTS + max(sums + largest, max(map(_expert_bytes, experts), default=0))


def _expert_bytes(linears: list[LinearView]) -> int:
    """Bytes of the statistics of one expert: matrices of its tokens and of all, their mean, sums, cross-moments of its
    last linear, and a copy of its weights."""
    matrices = sum(3 * 4 * linear.in_features**2 + accumulator_bytes(linear.in_features) for linear in linears)
    last = linears[-1].in_features * linears[-1].out_features
    return matrices + 5 * 4 * last + 4 * sum(linear.in_features * linear.out_features for linear in linears)


def _parted(chain: Chain, index: int) -> tuple[list[LinearView], list[list[LinearView]]]:
    """The linears of a block that belong to no stacked expert, and those of each expert."""
    experts: dict[str, list[LinearView]] = {}
    others = []
    for linear in chain.linears(index):
        if isinstance(linear.module, ExpertLinear):
            experts.setdefault(linear.name.rpartition(".")[0], []).append(linear)
        else:
            others.append(linear)
    return others, list(experts.values())


def _solver_bytes(chain: Chain, index: int, workspace: Workspace) -> int:
    """Bytes for the most expensive linear of a block: copies of its weight, its Gram matrices and factorisations, and
    the Gram matrices of later linears; for a linear of an expert, those of all tokens."""

    def solving(linear: LinearView, others: list[LinearView]) -> int:
        solved = int(workspace.weights * 4 * linear.in_features * linear.out_features)
        square = 4 * linear.in_features**2
        remembered = min(workspace.remembered * square, max(REMEMBERED_BYTES, square))
        later = sum(4 * other.in_features**2 for other in others)
        return solved + (int(workspace.grams * square) + remembered + later if workspace.grams else 0)

    linears, experts = _parted(chain, index)
    pairs = [(linear, linears[position:]) for position, linear in enumerate(linears, 1)]
    pairs += [(linear, expert) for expert in experts for linear in expert]
    return max((solving(*pair) for pair in pairs), default=0)


def _largest_tensor(chain: Chain) -> int:
    return max(source.bytes for source in [*chain.outer_tensors().values(), *chain.block_tensors(0).values()])


def _width(chain: Chain) -> int:
    return int(chain.config.get_text_config().hidden_size)


DISK = 1e9  # bytes read, checked or written in a second
JOINED = 4e9  # bytes that processes on CPUs exchange in a second; those on cards exchange them by the cards' links
GATHERED = 3 * 2  # bytes that a step of a sharded sweep gathers for each weight: bf16, twice, and its gradient
FORWARD, BUSY = 1.0, 0.5  # shares of a large product's speed that blocks reach forward, and with gradients
COUNTING, SOLVING, NARROW = 0.4, 1.2, 0.33  # the same for statistics, and solvers in fp32 and with bf16 products
PASSES = 2  # runs of a block over all tokens while it is pruned: for statistics, and for the outputs
REPEATED = 3.3  # the same where pruned sublayers run again for each later group: q, k, v five times, down twice
BACKWARD = 3  # passes that a backward pass of the sweep costs: the block again, and twice that for the gradients
GRADIENT = 3  # the same where only inputs have gradients, and the squared gradients of the weights
TRIALS = 2  # rates that a sweep tries, each judged by the held-out steps
WRITING = 10  # passes that a token costs which the model writes itself
TRIANGLE = 0.6  # share of a Gram matrix that is computed: panels of its upper triangle
ADAM = 8 * 4  # bytes that a step moves for each weight: parameters, two moments and gradients in fp32, both ways
UPLOADED, DOWNLOADED = 4 * 4, 3 * 4  # bytes that a step reads for each weight from where it is kept, and writes there


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
    def of(cls, chain: Chain, seq_len: int) -> Work:
        text, blocks, width = chain.config.get_text_config(), range(len(chain)), _width(chain)
        active = statistics = targets = solving = 0.0
        sums = 0
        for index in blocks:
            routed = _routed(chain, index)
            inputs: dict[str, list[LinearView]] = {}  # by module, whose first linears share their input
            for linear in chain.linears(index):
                size = linear.in_features * linear.out_features
                active += size * (routed if isinstance(linear.module, ExpertLinear) else 1)
                solving += 2 * linear.in_features * size
                inputs.setdefault(linear.name.rpartition(".")[0], []).append(linear)
            for linears in inputs.values():
                share = routed if isinstance(linears[0].module, ExpertLinear) else 1
                targets += 2 * linears[-1].in_features * linears[-1].out_features * share
                for linear in linears[:: max(1, len(linears) - 1)]:
                    statistics += TRIANGLE * 2 * linear.in_features**2 * share
                    sums += accumulator_bytes(linear.in_features)
        return cls(
            token=2 * active + 4 * seq_len * width * len(chain),
            head=2.0 * text.vocab_size * width,
            statistics=statistics,
            targets=targets,
            solving=solving,
            weights=sum(block_elements(chain, index) for index in blocks),
            sums=sums,
            stored=checkpoint_bytes(chain),
            hidden=2 * len(chain) * width * chain.dtype.itemsize,
        )


def _routed(chain: Chain, index: int) -> float:
    """The share of the experts of a block that a token is routed to, by the names that configs have for it."""
    experts = max(map(len, chain.mixtures(index)), default=0)
    names = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k")
    text = chain.config.get_text_config()
    chosen = next((value for name in names if isinstance(value := getattr(text, name, None), int)), 1)
    return min(1.0, chosen / experts) if experts else 1.0


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
    moving = away / speeds.link + in_files / DISK  # seconds a byte
    token = work.token / (FORWARD * speeds.blocks) + work.hidden * moving
    tokens = extent.share * extent.seq_len
    differentiated = 0 if finished else extent.share_of(gradient_windows(choice, extent)) * extent.seq_len
    surveyed = tokens if choice.allocates and not choice.allocation_needs.gradient_tokens and not finished else 0
    passes = walked_passes(choice, kept=(memory is None or memory.kept_bytes > 0) and chain.device.type == "cpu")
    narrow = choice.workspace.narrow and chain.products is not None
    solving = choice.workspace.products * work.solving / (NARROW * speeds.blocks if narrow else SOLVING * speeds.exact)
    counted = work.statistics + work.targets * (choice.method.workspace.writers > 0)
    passes -= choice.sets / len(chain)  # outputs of the last block are not needed
    counting = counted / (COUNTING * speeds.exact)
    scored = max(SHARE, min(1.0, LEAST_SCORED / extent.seq_len))
    differentiating = ((1 + GRADIENT) * work.token + 3 * scored * work.head) / (BUSY * speeds.blocks)
    joining = 2 * work.sums / _exchanged(speeds) if extent.ranks > 1 else 0.0
    walking = tokens * (passes * token + counting) + solving / extent.ranks + joining
    return {
        "calibration": extent.written * WRITING * token,
        "check": work.stored / DISK,
        "gradients": differentiated * differentiating,
        "survey": surveyed * token,
        "replay": finished / len(chain) * choice.sets * tokens * token,
        "prune": left * walking + 2 * work.stored / DISK,
        "sweep": sweep_seconds(work, extent, choice.passes, speeds, moving, memory.sweep if memory else STREAMED),
        "save": work.stored / DISK,
    }


def gradient_windows(choice: Choice, extent: Extent) -> int:
    """The windows that the gradients of the dense model's loss run on; 0 if nothing asks for gradients."""
    asked = choice.allocation_needs.gradient_tokens or TOKENS * choice.needs.output_costs
    return min(extent.samples, max(LEAST_WINDOWS, windows_of(asked, extent.seq_len))) if asked else 0


def sweep_seconds(work: Work, extent: Extent, passes: int, speeds: Speeds, moving: float, sweep: str) -> float:
    """Seconds of a sweep in ``passes`` passes: the dense model once, then forward and backward. In a streamed one
    all processes wait for the one that has the windows of a step, and a byte that is not where blocks run takes
    ``moving`` seconds; in a resident one each process has some windows of a step, and some rows of the parameters."""
    if not passes:
        return 0.0
    ranks = extent.ranks if sweep in RESIDENT else 1
    tokens, step = extent.swept / ranks, max(min(extent.seq_len, STEP_TOKENS), STEP_TOKENS // ranks)
    steps = tokens / step / passes
    held = min(MOST_HELD_OUT, max(1.0, steps / 8)) * step
    judged = (passes + 1 + TRIALS * (steps >= 8)) * held
    trained = tokens - held * (steps >= 4)  # in the first pass
    through = tokens + judged + trained * (1 + BACKWARD - (sweep in RESIDENT and not RESIDENT[sweep].recomputes))
    running = (through * work.token + (2 * judged + 4 * trained) * work.head) / (BUSY * speeds.blocks)
    away = moving if sweep == STREAMED else (sweep in RESIDENT and RESIDENT[sweep].offloads) / speeds.link
    moved = ADAM / speeds.memory / ranks + (UPLOADED + DOWNLOADED) * away
    moved += GATHERED / _exchanged(speeds) if ranks > 1 else 0.0
    return running + trained / step * work.weights * moved


def _exchanged(speeds: Speeds) -> float:
    """Bytes that processes exchange in a second."""
    return speeds.link if speeds.card_bytes else JOINED


def walked_passes(choice: Choice, *, kept: bool) -> float:
    """Passes of a block over all tokens in the walk, where outputs of pruned sublayers are kept or not
    (:mod:`sparsellm.chain.shortcuts`)."""
    again = choice.method.workspace.writers > 0 and not kept
    return (REPEATED if again else PASSES) + choice.sets - 1
