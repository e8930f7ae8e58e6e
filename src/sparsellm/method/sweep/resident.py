"""The resident sweep: all blocks in memory at once, those of one process or divided over several.

A step runs copies of the blocks as one module, forward and backward, so each block runs once and not twice as in the
streamed sweep. Several processes hold them by torch's fully sharded data parallelism
(``torch.distributed.fsdp.fully_shard``, arXiv 2304.11277): each holds some rows of every parameter, of its gradient
and its moments, gathers the rest while a block runs, and gets the sum of all gradients of its rows. Each process runs
its own windows of a step. Embedding, norm and head are not trained, and every process has them whole.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Sequence
from itertools import zip_longest

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from sparsellm import machine, parallel
from sparsellm.method.sweep.sweep_task import (
    Residence,
    SweepStep,
    SweepTask,
    TrainingSet,
    Weights,
)
from sparsellm.method.sweep.training import adam_step, joined, split
from sparsellm.model import Call, Chain
from sparsellm.model.streams import Piece


class _Blocks(nn.Module):
    """Copies of the blocks of a chain, which run one after another."""

    def __init__(self, chain: Chain, copies: list[nn.Module], way: Residence) -> None:
        super().__init__()
        self.chain = chain
        self.copies = nn.ModuleList(copies)
        self.way = way

    def forward(self, hidden: Tensor, calls: Sequence[Call]) -> Tensor:
        for index, call in enumerate(calls):
            if self.way.recomputes and torch.is_grad_enabled():
                hidden = checkpoint(self._run, index, hidden, call, use_reentrant=False)
            else:
                hidden = self._run(index, hidden, call)
        return hidden

    def _run(self, index: int, hidden: Tensor, call: Call) -> Tensor:
        block = self.copies[index]
        if not self.way.narrow or self.way.sharded:
            return self.chain.apply(index, hidden, call, block)
        rounded = {name: p.to(torch.bfloat16) for name, p in block.named_parameters()}
        return self.chain.apply(
            index,
            hidden,
            call,
            lambda *args, **kwargs: functional_call(block, rounded, args, kwargs),
        )


class Resident(Weights):
    """The fp32 parameters of all blocks and Adam's moments, for each block the rows of this process as one tensor."""

    def __init__(self, task: SweepTask) -> None:
        assert task.resident is not None
        super().__init__(task)
        self.way = task.resident
        self.dtype = torch.float32
        if self.way.narrow:
            self.dtype = torch.bfloat16
        self._parameters: dict[str, nn.Parameter] = {}
        self._mesh = None
        if self.way.sharded:
            self._mesh = init_device_mesh(self.chain.device.type, (parallel.size(),))
        with contextlib.ExitStack() as opened:
            if self.chain.device.type == "cpu":
                opened.enter_context(machine.keeping_freed())
            self._blocks = self._load()
            self._opened = opened.pop_all()
        self._moments: list[Tensor] = []
        for index in range(len(self.chain)):
            flat = self.copied(index)
            self._moments.append(flat.new_zeros(2, len(flat)))
        self.read_saved()

    def _load(self) -> _Blocks:
        """Copies of all blocks with the pruned weights in fp32; a parameter of several blocks is one in all of them."""
        chain = self.chain
        copies = []
        shared: dict[str, nn.Parameter] = {}
        for index in range(len(chain)):
            with chain.block(index, self.task.pruned(index)):
                self.describe(index)
                memo: dict[int, object] = {}
                for name, p in chain.block_parameters(index).items():
                    first = chain.home(name)[1]
                    if first not in shared:
                        wide = p.detach().to(
                            torch.float32,
                            copy=True,
                            memory_format=torch.contiguous_format,
                        )
                        shared[first] = nn.Parameter(wide)
                    memo[id(p)] = shared[first]
                block = copy.deepcopy(chain.blocks[index], memo)
                # The caller's hooks run in the model's own forward.
                block._forward_pre_hooks.clear()
                block._forward_hooks.clear()
                copies.append(block)
            shared = {first: p for first, p in shared.items() if chain.is_shared(first)}
            if self._mesh is not None:
                self._shard(block, set(shared.values()))
        blocks = _Blocks(chain, copies, self.way)
        if self._mesh is not None:
            self._shard(blocks)  # what several blocks share is whole while they all run
        for index, block in enumerate(copies):
            inner = dict(
                block.named_parameters(
                    prefix=chain.block_names[index], remove_duplicate=False
                )
            )
            self._parameters |= {name: inner[name] for name in self.shapes[index]}
        return blocks

    def _shard(
        self, module: nn.Module, ignored: set[nn.Parameter] | None = None
    ) -> None:
        sharded = fully_shard(
            module,
            mesh=self._mesh,
            reshard_after_forward=True,
            mp_policy=MixedPrecisionPolicy(
                self.dtype, torch.float32, cast_forward_inputs=False
            ),
            ignored_params=ignored,
        )
        # Gradients of a mean over the tokens of all processes are added up.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
        # A process takes part even if only others ran a module.
        sharded.set_reduce_scatter_unused_params(True, recurse=False)

    def _rows(self, name: str) -> Tensor:
        return _local(self._parameters[name].detach())

    def _rows_of(self, index: int) -> dict[str, Tensor]:
        return {name: self._rows(name) for name in self.shapes[index]}

    def copied(self, index: int) -> Tensor:
        return joined(self._rows_of(index))

    def replace(self, index: int, parameters: Tensor, moments: Tensor) -> None:
        rows = self._rows_of(index)
        shapes = {name: tensor.shape for name, tensor in rows.items()}
        for name, part in split(parameters, shapes).items():
            rows[name].copy_(part)
        self._moments[index].copy_(moments)

    def part(self, index: int, complete: Tensor) -> Tensor:
        if self._mesh is None:
            return complete
        rank = parallel.rank()
        size = parallel.size()
        parts = []
        for name, tensor in split(complete, self.shapes[index]).items():
            first = -len(self.shapes[index][name])  # the dimension of rows
            chunks = tensor.chunk(size, first)
            if rank < len(chunks):
                rows = chunks[rank]
            else:
                rows = chunks[0].narrow(first, 0, 0)
            parts.append(rows.flatten(first))
        return torch.cat(parts, -1)

    def complete(self, index: int, part: Tensor) -> Tensor:
        if self._mesh is None:
            return part
        rows = self._rows_of(index)
        tensors = split(part, {name: tensor.shape for name, tensor in rows.items()})
        for name, shape in self.shapes[index].items():
            # reports a lost process in one line, as `DTensor.full_tensor` does not
            rows_of_all = parallel.gather_list(tensors[name])
            tensors[name] = torch.cat(rows_of_all, -len(shape))
        return joined(tensors)

    def steps(self, tokens: Sequence[Sequence[int]]) -> list[SweepStep]:
        steps = []
        for number, some in enumerate(zip_longest(*tokens)):
            pieces = tuple(number if count else None for count in some)
            steps.append(SweepStep(pieces, sum(filter(None, some))))
        return steps

    def outputs(
        self, data: TrainingSet, pieces: Sequence[Piece | None]
    ) -> Iterator[tuple[Piece, Tensor]]:
        before = {
            name: self._rows(name).clone()
            for name in self._parameters
            if self.dtypes[name] != (torch.float32, torch.float32)
        }
        for name, rows in before.items():
            self._rows(name).copy_(self.as_written(name, rows))
        try:
            for piece in pieces:
                output = self._run(data, piece)
                if piece is not None:
                    yield piece, output.float()
        finally:
            for name, rows in before.items():
                self._rows(name).copy_(rows)

    def step(
        self, data: TrainingSet, step: SweepStep, rate: float, number: int
    ) -> float:
        piece = data.piece(step)
        with torch.enable_grad():
            output = self._run(data, piece)
        if piece is None:
            loss = 0.0
            slope = torch.zeros_like(output)
        else:
            loss, slope = data.end(output.detach().float(), piece, step.tokens)
        output.backward(slope.to(output.dtype))
        del output
        sizes = self._sizes()
        for index in range(len(self.chain)):
            trained = {}
            for name in self.shapes[index]:
                parameter = self._parameters[name]
                trained[name] = nn.Parameter(self._rows(name))
                if parameter.grad is not None:
                    trained[name].grad = _local(parameter.grad)
                parameter.grad = None
            adam_step(
                trained,
                self._moments[index],
                rate,
                number,
                pruned=self.pruned,
                sizes=sizes,
            )
        return parallel.total(loss)

    def _run(self, data: TrainingSet, piece: Piece | None) -> Tensor:
        """The output of the last block. A process without a piece takes its first one: all must run the blocks."""
        if self.chain.products is not None:
            self.chain.products.forget()  # gathered weights change without a new version
        if piece is None:
            piece = data.stream.pieces[0]
        calls = [
            data.call(piece, index, self.dtype) for index in range(len(self.chain))
        ]
        with warnings.catch_warnings():
            # outputs that are views; none is overwritten
            warnings.filterwarnings("ignore", "FSDP2-wrapped module")
            output: Tensor = self._blocks(data.inputs(piece).to(self.dtype), calls)
        return output

    def _sizes(self) -> dict[str, float]:
        """The root mean square of each parameter, over the rows of all processes; empty where this one has them all."""
        if self._mesh is None:
            return {}
        squares = torch.stack(
            [self._rows(name).norm().double().square() for name in self._parameters]
        )
        totals = parallel.all_sum_(squares).tolist()
        return {
            name: (total / parameter.numel()) ** 0.5
            for (name, parameter), total in zip(
                self._parameters.items(), totals, strict=True
            )
        }

    def parameters(self, block: int) -> Tensor:
        return self.complete(block, self.copied(block))

    def moments(self, block: int) -> Tensor:
        return torch.stack(
            [self.complete(block, moment) for moment in self._moments[block]]
        )

    def close(self) -> None:
        super().close()
        self._opened.close()


def _local(tensor: Tensor) -> Tensor:
    """The rows of a parameter or gradient that this process has."""
    if isinstance(tensor, DTensor):
        return tensor.to_local()
    return tensor
