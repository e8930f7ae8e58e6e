"""What the tests run in each of several processes. Each leaves what it found in ``folder`` for the test to compare."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import sparsellm
from sparsellm import Recipe, parallel
from sparsellm.errors import NumericalError, RecipeError
from sparsellm.evaluation import perplexity
from sparsellm.method.blocks import METHODS
from sparsellm.method.blocks.task import BlockTask
from sparsellm.method.gram import CrossAccumulator, GramAccumulator
from sparsellm.method.solvers import SOLVERS
from sparsellm.method.solvers.solver import Solution, solution
from sparsellm.method.sweep.gradients import loss_gradients
from sparsellm.model import Chain, Feed, open_chain
from tests.killing import fail_after_passes
from tests.method.allocation.helpers import sizes_of
from tests.models import save_tiny, tiny_gpt2, tiny_llama, tiny_tokenizer, windows
from tests.models.families import mixtral

WINDOWS = 7  # three processes do not divide it
two_blocks = partial(tiny_llama, num_hidden_layers=2)
SWEEP: dict[str, Any] = {
    "method": "sparsellm",
    "passes": 3,
    "options": {"solver": "wanda", "output_metric": 0.0},
}
# name → family and recipe: every solver, N:M, an allocation by gradients, the method's medians and refits, the sweep
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "wanda": (two_blocks, {"method": "wanda", "sparsity": 0.55}),
    "sparsegpt": (two_blocks, {"method": "sparsegpt"}),
    "sparsegpt 2:4": (tiny_gpt2, {"method": "sparsegpt", "pattern": "2:4"}),
    "admm": (two_blocks, {"method": "admm", "options": {"iterations": 8}}),
    "allocated": (two_blocks, {"method": "wanda", "allocation": "threshold"}),
    "sparsellm": (two_blocks, {"method": "sparsellm", "passes": 0}),
    "sparsellm 2:4": (
        two_blocks,
        {"method": "sparsellm", "pattern": "2:4", "passes": 0},
    ),
    "sparsellm biases": (tiny_gpt2, {"method": "sparsellm", "passes": 0}),
    "int4": (tiny_llama, {"method": "sparsegpt", "values": "int4"}),
    "experts": (mixtral, {"method": "sparsellm", "passes": 0}),
    # one step takes all windows, however many processes divide them
    "swept": (two_blocks, {**SWEEP, "allocation": "uniform", "batch_tokens": 1024}),
}


def repeated(size: int) -> tuple[str, ...]:
    """The cases that run twice: a survey and a sweep, whose sums depend on the number of processes; and where no more
    than two wait for each other, linears in order and experts, which wait often."""
    return (
        ("allocated", "swept")
        if size > 2
        else ("allocated", "swept", "admm", "experts")
    )


def counting(owner: type, name: str) -> Any:
    """A context that counts the calls of a method."""
    return mock.patch.object(
        owner, name, autospec=True, side_effect=getattr(owner, name)
    )


def prune_case(name: str) -> dict[str, Any]:
    """The pruned model's weights, and the report."""
    family, fields = CASES[name]
    model = family()
    with (
        pytest.MonkeyPatch.context() as patch,
        counting(BlockTask, "accept") as accepted,
    ):
        # several panels in so small a model
        patch.setattr("sparsellm.method.solvers.sparsegpt.PRUNED_TOGETHER", 16)
        result = sparsellm.prune(
            model,
            Recipe(**{"batch_tokens": 80, **fields}),
            calibration=windows(WINDOWS),
        )
    linears = [(linear.name, linear.zeros, linear.error) for linear in result.linears]
    sweeps = [(record.held_out, record.train or 0.0) for record in result.sweeps]
    facts = {
        "weights": dict(model.state_dict()),
        "linears": linears,
        "allocation": result.allocation,
        "sweeps": sweeps,
    }
    counts = {
        "processes": result.processes,
        "tokens": result.calibration_tokens,
        "pruned": accepted.call_count,
    }
    return {**facts, **counts}


SWEPT = {**CASES["swept"][1], "sweep_rate": 0.003}


def sweep_in_directories(folder: Path) -> None:
    """Two runs of one recipe, one that goes on where a single process ended, and one that ends in its sweep."""
    for name in ("two", "again", "begun-by-one"):
        swept_to(folder, name)
    swept_to(folder, "begun-by-two", fails=True)


def swept_to(
    folder: Path, name: str, *, fails: bool = False
) -> sparsellm.PruneResult | None:
    """A run from the model in ``folder``; with ``fails`` it ends when its second pass is judged."""
    with pytest.MonkeyPatch.context() as patch:
        if fails:
            fail_after_passes(1, patch)
        try:
            return sparsellm.prune(
                folder / "model",
                Recipe(**SWEPT),
                calibration=windows(WINDOWS),
                out=folder / name,
            )
        except NumericalError:
            return None


def leave(folder: Path, name: str, output: Any) -> None:
    torch.save(output, folder / f"{name}-{parallel.rank()}-of-{parallel.size()}.pt")


def prune_everything(folder: Path) -> None:
    for name in CASES:
        leave(folder, name, prune_case(name))
    # whoever it is that fails, all know
    with pytest.raises(RecipeError, match="only the second"):
        parallel.together(
            lambda: _refuse("only the second") if parallel.rank() == 1 else None
        )
    ids, few = windows(WINDOWS), windows(WINDOWS)[: parallel.size() - 1]
    with pytest.raises(
        RecipeError,
        match=f"{len(few)} calibration windows .* {parallel.size()} processes",
    ):
        sparsellm.prune(tiny_llama(), Recipe(method="wanda"), calibration=few)
    with pytest.raises(RecipeError, match="sparsellm-paper runs in one process"):
        sparsellm.prune(tiny_llama(), Recipe(method="sparsellm-paper"), calibration=ids)
    with pytest.raises(RecipeError, match=r"iterations .* one process"):
        sparsellm.prune(
            tiny_llama(),
            Recipe(method="sparsellm", options={"iterations": 1}),
            calibration=ids,
        )
    broken = tiny_llama()
    broken.lm_head.weight.data[0, 0] = float("nan")
    # found by the main process alone, told by all
    with pytest.raises(NumericalError, match=r"lm_head\.weight"):
        sparsellm.prune(broken, Recipe(method="wanda"), calibration=ids)

    @SOLVERS.register("keep-large-columns", paper="none")
    def keep_large_columns(weight: Tensor, gram: Any, pattern: Any) -> Solution:
        # rows depend on each other
        scores = (weight / weight.square().sum(dim=0).sqrt()).abs()
        if torch.distributed.get_rank():
            scores = -scores  # another solution in every other process
        return solution(weight, weight, pattern.mask(scores), gram)

    assert METHODS["keep-large-columns"].distributed
    model = tiny_llama()
    sparsellm.prune(
        model, Recipe(method="keep-large-columns"), calibration=windows(WINDOWS)
    )
    leave(folder, "unknown", dict(model.state_dict()))

    @SOLVERS.register("fails-in-the-second", paper="none")
    def fails_in_the_second(weight: Tensor, gram: Any, pattern: Any) -> Solution:
        if torch.distributed.get_rank() == 1:
            raise NumericalError("the second process cannot prune it")
        return solution(weight, weight, pattern.mask(weight.abs()), gram)

    with pytest.raises(NumericalError, match="proj: the second process cannot"):
        sparsellm.prune(
            tiny_llama(), Recipe(method="fails-in-the-second"), calibration=ids
        )


def prune_twice(folder: Path) -> None:
    for name in repeated(parallel.size()):
        leave(folder, name, [prune_case(name)["weights"] for _ in range(2)])


def sums(folder: Path) -> None:
    """Collectives against what one process computes from everything; every process knows everything here."""
    rank, size = parallel.rank(), parallel.size()
    generator = torch.Generator().manual_seed(1)
    parts = [torch.randn(5 + index, 700, generator=generator) for index in range(size)]
    assert [
        torch.equal(a, b)
        for a, b in zip(parallel.gather_list(parts[rank]), parts, strict=True)
    ] == [True] * size
    accumulator, cross = GramAccumulator(700), CrossAccumulator(700, 700)
    accumulator.update(parts[rank])
    cross.update(parts[rank] + 1, parts[rank])
    accumulator.reduce()
    cross.reduce()
    x = torch.cat(parts).double()
    torch.testing.assert_close(
        accumulator.finish().matrix.double(), x.T @ x / len(x), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(
        cross.finish().double(), (x + 1).T @ x / len(x), rtol=1e-5, atol=1e-6
    )
    assert accumulator.tokens == cross.tokens == len(x)
    leave(folder, "gram", accumulator.finish().matrix)
    # would lose digits as floats
    big = torch.full((3,), 2**62 // size, dtype=torch.int64)
    assert (
        parallel.all_sum_(big + rank).tolist()
        == [2**62 // size * size + size * (size - 1) // 2] * 3
    )
    with pytest.raises(RecipeError, match="missing"):
        parallel.from_main(_refuse)
    assert parallel.from_main(lambda: 3) == 3
    with parallel.alone():
        assert parallel.size() == 1
    assert parallel.size() == size
    assert parallel.on_this_machine() == size
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("socket.gethostname", lambda: f"node {rank > 0}")
        assert parallel.on_this_machine() == (size - 1 if rank else 1)
        with parallel.alone():
            assert parallel.on_this_machine() == (size - 1 if rank else 1)
    assert parallel.broadcast(rank, size - 1) == size - 1


def _refuse(why: str = "a field is missing") -> None:
    raise RecipeError(why)


def survey_of_some_windows(folder: Path) -> None:
    """Statistics of the dense model, divided, and as one process takes them; with fewer windows than processes too."""
    chain = open_chain(mixtral(), device=torch.device("cpu"))
    for count in (WINDOWS, 2):
        feed, names = (
            Feed(chain, windows(count), 80),
            {size.name for size in sizes_of(chain)},
        )
        with counting(Chain, "run") as run:
            divided = loss_gradients(feed, names, saliency=True)
        ran = sum(len(call.args[2]) for call in run.call_args_list)
        with parallel.alone():
            single = loss_gradients(feed, names, saliency=True)
        assert ran < count * len(chain)
        leave(folder, f"survey {count}", [vars(divided), vars(single)])


def evaluation_of_some_windows(folder: Path) -> None:
    source = parallel.from_main(
        lambda: save_tiny(tiny_llama(), tiny_tokenizer(), folder / "llama")
    )
    asked = {"seq_len": 32, "max_tokens": WINDOWS * 32, "against": source}
    with mock.patch.object(
        perplexity, "_window", side_effect=perplexity._window
    ) as window:
        divided = sparsellm.evaluate(source, "pydoc", **asked)
    with parallel.alone():
        single = sparsellm.evaluate(source, "pydoc", **asked)
    leave(
        folder,
        "evaluated",
        (
            window.call_count,
            *((score.perplexity, score.against) for score in (divided, single)),
        ),
    )


def everything(folder: Path) -> None:
    sums(folder)
    survey_of_some_windows(folder)
    evaluation_of_some_windows(folder)
    prune_everything(folder)
