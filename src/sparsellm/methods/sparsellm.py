"""One block as coordinated small problems: each linear is fitted to what the pruned ones before it really produce.

Within a block the groups of linears that share an input are pruned in the order in which they run (q,k,v → o →
up,gate → down), and the block runs again after each, so that every statistic is of what the linear will really be
given. The last linear of each sublayer, the one that writes into the residual stream, is first fitted by least squares
to what the sublayer gave before its first linear was pruned; so it makes up for what they lost. Then the kept weights
of the block are polished together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from sparsellm import parallel
from sparsellm.chain import LinearView
from sparsellm.chain.capture import InputGroups, RunOrder, skipping, watch
from sparsellm.chain.units import FeedForwardUnit, find_feed_forward, find_value_output
from sparsellm.decomposition import Chunk, FeedForward, Linear, Settings, StoredChunks, prune_feed_forward, split
from sparsellm.errors import ModelError
from sparsellm.methods.base import METHODS, BlockTask
from sparsellm.methods.values import CoordinatedValues
from sparsellm.patterns import Pattern
from sparsellm.registry import Needs, Workspace
from sparsellm.solvers import SOLVERS, Solution, Solver
from sparsellm.solvers.divided import divide, divided_solution
from sparsellm.statistics import CrossAccumulator, Gram, GramAccumulator, least_squares
from sparsellm.storage.scratch import TensorStore
from sparsellm.sweep.reconstruct import reconstruct

EFFORT = 1
OUTPUT_METRIC = 0.5  # of 0, 0.5 and 1 the best on a whole model: docs/results.md
SOLVER = "admm"
ROUNDING = 1e-2  # of half precision, in sums of what a block's linears give


# By effort. Reconstruction block by block buys far less for its time than sweeps of the whole model: none includes it.
PASSES = (0, 1, 3, 8)


def _needs(options: dict[str, Any]) -> Needs:
    solver = SOLVERS[options.get("solver", SOLVER)]  # an unknown one is refused before the work
    passes = options.get("passes")
    passes = PASSES[options.get("effort", EFFORT)] if passes is None else passes
    two = passes > 0 or any(options.get(name, 0.0) > 0 for name in ("blend", "residual", "refine_blend"))
    steps = options.get("steps", 0)
    metric = options.get("output_metric", OUTPUT_METRIC)
    return Needs(
        dense_stream=two,
        pieces=steps > 0,
        passes=passes,
        learning_rate=options.get("sweep_rate"),
        output_costs=metric > 0,
        token_states=True,
        one_process=next((name for name in ("iterations", "value_iterations") if options.get(name, 0)), ""),
        workspace=replace(
            solver.workspace,
            weights=solver.workspace.weights + (metric > 0),  # beside the one that is weighed
            blocks=5.0 if passes or steps else 0.0,  # an optimiser's copies
        ),
    )


@METHODS.register(
    "sparsellm",
    paper="arXiv 2402.17946, with the solver of 2406.07831 and the refinement of 2510.14444",
    needs=_needs,
    workspace=Workspace(weights=7, grams=2, streams=2),  # a writer's fit
    distributed=True,
    allocation="threshold",
)
def sparsellm(
    task: BlockTask,
    *,
    effort: Annotated[int, Field(ge=0, le=3), "sweeps of the whole model at the end: 0, 1, 3 or 8"] = EFFORT,
    solver: Annotated[str, "the local solver inside"] = SOLVER,
    refit: Annotated[bool, "fit the last linear of each sublayer to the dense sublayer's output"] = True,
    refit_damping: Annotated[float, Field(ge=0), "ridge of that fit towards the dense weight"] = 0.1,
    blend: Annotated[
        float, Field(ge=0, le=1), "how far targets of that fit are the dense model's own activations"
    ] = 0.0,
    residual: Annotated[float, Field(ge=0, le=1), "share of the residual stream's own error in those targets"] = 0.0,
    output_metric: Annotated[
        float, Field(ge=0, le=1), "power of E[g²] by which a linear's outputs compete for weights; 0: alike"
    ] = OUTPUT_METRIC,
    norm_weighting: Annotated[
        float, Field(ge=0), "tokens of a norm above so many medians count less; 0: all count"
    ] = 1.5,
    iterations: Annotated[int, Field(ge=0), "alternations of the feed-forward unit's auxiliary variables"] = 0,
    value_iterations: Annotated[int, Field(ge=0), "alternations of those of attention's values and output"] = 0,
    variables: Annotated[Literal["float32", "bfloat16"], "dtype in which those variables are kept"] = "float32",
    variables_on_disk: Annotated[bool, "in memory-mapped files; else in memory, beside what is predicted"] = False,
    steps: Annotated[int, Field(ge=0), "steps of Adam in each block; no effort includes them"] = 0,
    learning_rate: Annotated[float, Field(gt=0), "of those, relative to the weights' root mean square"] = 0.003,
    refine_blend: Annotated[
        float, Field(ge=0, le=1), "how far their targets are the dense model's hidden states"
    ] = 0.0,
    passes: Annotated[int | None, Field(ge=0), "sweeps of the whole model at the end; null: by effort"] = None,
    sweep_rate: Annotated[
        float | None, Field(gt=0), "learning rate of the sweeps; null: by the divergence at their start"
    ] = None,
) -> None:
    """Global pruning by auxiliary targets: linears in the order they run, each fitted to what is left to it."""
    if not any(task.patterns[linear.name].sparsity for linear in task.linears):
        return  # nothing is lost, so nothing is to be made up for: every bit stays
    weights = token_weights(task.stream.hidden, norm_weighting) if norm_weighting else None
    with contextlib.ExitStack() as held:
        outputs = None
        if steps:
            outputs = held.enter_context(task.stream.store())
            with task.clock.phase("prune/targets"):
                for position, leaving in enumerate(task.stream.run(task.index)):
                    if refine_blend and task.dense is not None:
                        leaving = leaving.lerp(task.dense.leaving[position], refine_blend)
                    outputs.append(leaving)
        width = task.stream.hidden[0].shape[-1]
        order = RunOrder()
        sublayers = _sublayers(_groups(task, task.linears, order), width)
        pull = {}
        if blend or residual:
            with task.clock.phase("prune/targets"):
                pull = _dense_targets(task, _writers(sublayers, width), width, blend, residual, held.enter_context)
        plain = divide(SOLVERS[solver])
        inside = {linear.name: _weighed(plain, costs) for linear, costs in _costs(task, output_metric)}
        fitting = _Fitting(weights, inside, refit_damping, pull, order, value_iterations)
        keeping = _Keeping(iterations, getattr(torch, variables), variables_on_disk)
        units = {unit.down.name: unit for unit in find_units(task)} if iterations else {}
        for sublayer in sublayers:
            unit = units.get(sublayer[-1][0].name)
            if unit is not None and all(linear in unit.linears() for group in sublayer for linear in group):
                with task.clock.phase("prune/variables"):
                    prune_unit(task, unit, weights, inside, keeping)
            else:
                writer = _writer(sublayer, width) if refit else None
                _prune_in_order(task, sublayer, writer, fitting)
        _prune_rest(task, sublayers, weights, inside)
        if steps:
            assert outputs is not None
            task.report("refine")
            with task.clock.phase("prune/refine"):
                looks = reconstruct(task, outputs, weights, steps=steps, learning_rate=learning_rate)
            task.history.setdefault(task.linears[-1].name, []).extend(looks)


@dataclass(frozen=True)
class _Pull:
    """What the dense model's own stream adds to a writer's target, batch by batch: ``blend (T_dense - T) + shift``."""

    blend: float
    dense: TensorStore  # what the writer gives in the dense model
    residual: float
    error: TensorStore | None  # dense minus pruned, of the residual stream that the writer adds to

    def on(self, target: Tensor, position: int) -> Tensor:
        moved = target.lerp(self.dense[position], self.blend) if self.blend else target
        if self.error is None:
            return moved
        return moved.add(self.error[position].reshape(moved.shape), alpha=self.residual)


@dataclass(frozen=True)
class _Fitting:
    """How the linears of a block are fitted and pruned.

    Attributes:
        weights: of tokens, batches ``(batch, seq)``, or None where all count alike.
        solvers: of each linear, by name.
        damping: ridge of a writer's fit.
        pull: by writer, what moves its target.
        order: in which the block's linears run.
        value_iterations: alternations of the variables of attention's values and output.
    """

    weights: list[Tensor] | None
    solvers: Mapping[str, Solver]
    damping: float
    pull: dict[str, _Pull]
    order: RunOrder
    value_iterations: int


def _dense_targets(
    task: BlockTask,
    writers: list[LinearView],
    width: int,
    blend: float,
    residual: float,
    held: Callable[[TensorStore], Any],
) -> dict[str, _Pull]:
    """For each writer, what the dense model gives there on its own hidden states; the block is still dense.

    Raises:
        ModelError: ``residual`` is not 0, and the block is not its input plus what its writers give.
    """
    assert task.dense is not None
    chain, index, calls = task.stream.chain, task.index, task.stream.calls(task.index)
    dense: dict[str, TensorStore] = {writer.name: task.stream.store() for writer in writers}
    errors: dict[str, TensorStore] = {writer.name: task.stream.store() for writer in writers}
    for store in (*dense.values(), *errors.values()):
        held(store)
    adding = writers
    if residual:  # also those that are left out of the pruning
        adding = _writers(_sublayers(_groups(task, chain.linears(index), RunOrder()), width), width)
    for position, (entering, pruned) in enumerate(zip(task.dense.entering, task.stream.hidden, strict=True)):
        there = _outputs(adding, partial(chain.run, index, entering, calls[position]))
        for writer in writers:
            dense[writer.name].append(there[writer.name])
        if not residual:
            continue
        here = _outputs(adding, partial(chain.run, index, pruned, calls[position]))
        error = entering - pruned
        for writer in adding:
            if writer.name in errors:
                errors[writer.name].append(error)
            error = error + (there[writer.name] - here[writer.name]).reshape(error.shape)
        if position == 0:
            _require_sum(entering, there, task.dense.leaving[position], chain.block_names[index])
    return {w.name: _Pull(blend, dense[w.name], residual, errors[w.name] if residual else None) for w in writers}


def _outputs(linears: list[LinearView], run: Callable[[], Any]) -> dict[str, Tensor]:
    """What each of the linears gives in one run, by name."""
    seen: dict[str, Tensor] = {}
    with watch(linears, lambda linear, entering, leaving: seen.update({linear.name: leaving.detach().clone()})):
        run()
    return seen


def _require_sum(entering: Tensor, outputs: dict[str, Tensor], leaving: Tensor, block: str) -> None:
    total = entering.float()
    for output in outputs.values():
        total = total + output.float().reshape(total.shape)
    missed = (leaving.float() - total).norm() / (leaving.float() - entering.float()).norm().clamp(min=1e-30)
    if not missed <= ROUNDING:
        raise ModelError(
            f"{block} is not its input plus what its last linears give (off by {float(missed):.1%}): "
            "the residual stream's error is not known there; set residual=0"
        )


def _sublayers(groups: list[list[LinearView]], width: int) -> list[list[list[LinearView]]]:
    """The groups cut after each writer."""
    sublayers: list[list[list[LinearView]]] = [[]]
    for group in groups:
        sublayers[-1].append(group)
        if _writer(sublayers[-1], width) is not None:
            sublayers.append([])
    return [sublayer for sublayer in sublayers if sublayer]


def _writer(sublayer: list[list[LinearView]], width: int) -> LinearView | None:
    """The linear that writes into the residual stream: last, after others, alone on its input, as wide as the stream.

    A sublayer has none where that linear is not to be pruned, and where it is its only one.
    """
    last = sublayer[-1]
    return last[0] if len(sublayer) > 1 and len(last) == 1 and last[0].out_features == width else None


def _writers(sublayers: list[list[list[LinearView]]], width: int) -> list[LinearView]:
    return [writer for sublayer in sublayers if (writer := _writer(sublayer, width)) is not None]


def _prune_in_order(
    task: BlockTask,
    sublayer: list[list[LinearView]],
    writer: LinearView | None,
    fitting: _Fitting,
) -> None:
    """One group after the other; the writer, where there is one, is fitted to what it gave before the first."""
    with task.stream.store() as target:
        values = None
        if fitting.value_iterations and writer is not None:
            earlier = [linear for group in sublayer[:-1] for linear in group]
            values = _coordinated_values(task, earlier, writer, fitting, target)
        for position, group in enumerate(sublayer):
            task.report("+".join(linear.name.rpartition(".")[2] for linear in group))
            recorded = writer if position == 0 else None
            fitted = group[0] is writer
            moved = fitting.pull.get(group[0].name) if fitted else None
            unread = fitting.order.unread(
                task.stream.chain.linears(task.index),
                inputs=[group[0]],
                outputs=[recorded] if recorded is not None else [],
            )
            with skipping(unread):
                gram, cross = _moments(task, group[0], fitting.weights, target, moved, recorded=recorded, fitted=fitted)
            fit = None
            if cross is not None:
                with task.clock.phase("prune/solve"):
                    fit = least_squares(gram, cross, fitting.damping, prior=group[0].weight())
            del cross
            gram.forget()  # the solver, which takes the most memory, has no use for what the fit was made of
            for linear in group:
                with task.clock.phase("prune/solve"):
                    wanted = linear.weight() if fit is None else fit.weight
                    found = fitting.solvers[linear.name](wanted, gram, task.patterns[linear.name])
                notes = (*(fit.notes if fit is not None else ()), *found.notes)
                task.accept(linear, replace(found, notes=notes))
        if values is not None:
            with task.clock.phase("prune/variables"):
                values.improve(fitting.value_iterations)


def _coordinated_values(
    task: BlockTask,
    earlier: list[LinearView],
    writer: LinearView,
    fitting: _Fitting,
    target: TensorStore,
) -> CoordinatedValues | None:
    """Where the sublayer is attention: its values and its writer, to be coordinated when both are pruned."""
    pair = find_value_output(earlier, writer, lambda: task.stream.run_window(task.index))
    if pair is None:
        return None
    wanted = partial(_wanted, target, fitting.pull.get(writer.name))
    solvers = (fitting.solvers[pair.value.name], fitting.solvers[writer.name])
    return CoordinatedValues(task, pair, fitting.order, wanted, fitting.weights, solvers, fitting.damping)


def _wanted(target: TensorStore, pull: _Pull | None, position: int) -> Tensor:
    """Of a writer, for one batch: what it gave before, moved by what the dense model's stream adds."""
    return target[position] if pull is None else pull.on(target[position], position)


def _prune_rest(
    task: BlockTask,
    sublayers: list[list[list[LinearView]]],
    weights: list[Tensor] | None,
    solvers: Mapping[str, Solver],
) -> None:
    """Linears that do not see every token, such as experts: each by itself, on what the windows route to it, in one
    pass. One that none of them reaches stays dense."""
    known = {linear.name for sublayer in sublayers for group in sublayer for linear in group}
    rest = [linear for linear in task.linears if linear.name not in known]
    if not rest:
        return
    task.report("rest")
    for group, gram in task.statistics(rest, weights):
        for linear in group:
            task.accept(linear, solvers[linear.name](linear.weight(), gram, task.patterns[linear.name]))


@dataclass(frozen=True)
class _Keeping:
    """How often the variables of a unit alternate, and how and where they are kept in between."""

    iterations: int
    dtype: torch.dtype
    on_disk: bool


def prune_unit(
    task: BlockTask,
    unit: FeedForwardUnit,
    weights: list[Tensor] | None,
    solvers: Mapping[str, Solver],
    keeping: _Keeping,
) -> None:
    """The auxiliary variables of one feed-forward unit: targets are what the dense unit gives on the pruned stream.

    Iteration 0 is the local solution with ``down`` refitted; the iterate with the least error on held-out tokens wins,
    and its weights are then fitted to all tokens. The history goes into the record of ``down``.
    """
    task.report("variables")
    with task.stream.store() as inputs, task.stream.store() as outputs:

        def see(linear: LinearView, entering: Tensor, leaving: Tensor) -> None:
            if linear is unit.up:
                inputs.append(entering.detach().flatten(0, -2).clone())
            if linear is unit.down:
                outputs.append(leaving.detach().flatten(0, -2).clone())

        with watch([unit.up, unit.down], see):
            task.run()
        flat = [weight.flatten() for weight in weights] if weights is not None else None
        train, held_out = split(StoredChunks(inputs, outputs, flat))
        _alternate(task, unit, train, held_out, solvers, keeping)


def _alternate(
    task: BlockTask,
    unit: FeedForwardUnit,
    train: Sequence[Chunk],
    held_out: Sequence[Chunk],
    solvers: Mapping[str, Solver],
    keeping: _Keeping,
) -> None:
    dense, roles = feed_forward_of(unit)
    patterns = {role: task.patterns[linear.name] for role, linear in roles.items()}
    settings = Settings(
        iterations=keeping.iterations,
        mask_only=True,
        refit="all",
        dtype=keeping.dtype,
        directory=task.stream.scratch.directory if keeping.on_disk else None,
    )
    by_role = {role: solvers[linear.name] for role, linear in roles.items()}
    result = prune_feed_forward(dense, train, held_out, by_role, patterns, settings)
    for role, pruned in result.unit.linears().items():
        linear = roles[role]
        weight = torch.where(result.masks[role], pruned.weight, 0.0)
        notes = result.history[result.best_iteration].notes
        task.accept(linear, Solution(weight, result.masks[role], result.error, notes))
        if pruned.bias is not None:
            linear.assign_bias(pruned.bias)
    task.history[unit.down.name] = [
        {
            "iteration": record.iteration,
            "held_out_error": record.held_out_error,
            "train_error": record.train_error,
            "objective": record.terms.total if record.terms is not None else None,
            "chosen": record.iteration == result.best_iteration,
        }
        for record in result.history
    ]


def feed_forward_of(unit: FeedForwardUnit) -> tuple[FeedForward, dict[str, LinearView]]:
    """The unit as plain tensors, and its linears by role."""
    roles = {"up": unit.up, "down": unit.down, **({"gate": unit.gate} if unit.gate is not None else {})}
    plain = {role: Linear(linear.weight(), linear.bias) for role, linear in roles.items()}
    return FeedForward(plain["up"], plain["down"], unit.activation, plain.get("gate")), roles


def find_units(task: BlockTask) -> list[FeedForwardUnit]:
    """The feed-forward units of the block, from one window."""
    return find_feed_forward(task.linears, lambda: task.stream.run_window(task.index))


def _costs(task: BlockTask, power: float) -> Iterator[tuple[LinearView, Tensor | None]]:
    """Each linear with weights ``(out,)`` of its outputs' squared errors, of mean 1; None where all count alike: in N:M
    they do not compete, and of a linear that no token reached nothing is known."""
    for linear in task.linears:
        costs = task.output_costs.get(linear.name) if power else None
        if costs is not None:
            costs = costs.to(task.stream.chain.device).pow(power)
            costs = (costs / costs.mean().clamp(min=1e-30)).clamp(min=1e-4)
        yield linear, costs


def _weighed(solver: Solver, costs: Tensor | None) -> Solver:
    """``costs (out,)`` weigh the squared errors of the outputs: ``Σ_i c_i ‖(w_i − w̃_i) G^½‖²`` is the plain objective
    of ``√c_i w_i``, so rows that cost more win weights where rows compete for them. The error that the solution names
    is the plain one."""
    if costs is None:
        return solver
    root = costs.sqrt()[:, None]  # (out, 1)

    def solve(weight: Tensor, gram: Gram, pattern: Pattern) -> Solution:
        scaled = solver(weight * root, gram, pattern)
        return divided_solution(weight, scaled.weight / root, scaled.mask, gram, scaled.notes)

    return solve


def token_weights(hidden: Sequence[Tensor], medians: float) -> list[Tensor]:
    """``min(1, (medians · median norm / norm)²)`` for each token: a few tokens with massive activations (2402.17762)
    would otherwise be all that a squared error sees.

    Args:
        hidden: batches ``(batch, seq, hidden)``.
        medians: norms up to so many times the median count fully.

    Returns:
        Weights ``(batch, seq)`` for each batch.
    """
    norms = [batch.float().norm(dim=-1) for batch in hidden]
    limit = medians * torch.cat(parallel.gather_list(torch.cat([norm.flatten() for norm in norms]))).median()
    return [(limit / norm.clamp(min=1e-30)).square().clamp(max=1.0) for norm in norms]


def _groups(task: BlockTask, linears: list[LinearView], order: RunOrder) -> list[list[LinearView]]:
    """The groups of linears that share an input, from one window; only of those that are given all its tokens.

    ``order`` sees all linears of the block run.
    """
    grouping = InputGroups()
    wanted = {linear.name for linear in linears}
    tokens = task.stream.hidden[0].shape[1]

    def see(linear: LinearView, entering: Tensor, leaving: Tensor) -> None:
        order.see(linear)
        if linear.name in wanted and entering.shape[:-1].numel() == tokens:
            grouping.add(linear, entering)

    with watch(task.stream.chain.linears(task.index), see):
        task.stream.run_window(task.index)
    return grouping.agreed(linears)


def _moments(
    task: BlockTask,
    head: LinearView,
    weights: list[Tensor] | None,
    target: TensorStore,
    pull: _Pull | None,
    *,
    recorded: LinearView | None,
    fitted: bool,
) -> tuple[Gram, Tensor | None]:
    """One pass: the Gram matrix of the input of ``head``; what ``recorded`` gives goes into ``target``, or the cross
    moment with ``target``, moved by ``pull``, comes out of it."""
    device = task.stream.chain.device
    gram = GramAccumulator(head.in_features, device)
    cross = CrossAccumulator(head.out_features, head.in_features, device) if fitted else None
    position = 0

    def see(linear: LinearView, entering: Tensor, leaving: Tensor) -> None:
        if linear is head:
            token_weights = weights[position] if weights is not None else None
            gram.update(entering, token_weights)
            if cross is not None:
                wanted = _wanted(target, pull, position)
                bias = linear.bias
                cross.update(wanted if bias is None else wanted - bias, entering, token_weights)
        if linear is recorded:
            target.append(leaving.detach().clone())  # what runs later may work in place

    with task.clock.phase("prune/statistics"), watch([head, *([recorded] if recorded is not None else [])], see):
        for position in range(len(task.stream)):  # the hook reads where the pass is
            task.stream.run_batch(task.index, position)
        gram.reduce()
        if cross is not None:
            cross.reduce()
    return gram.finish(), cross.finish() if cross is not None else None
