"""The dense and the pruned stream: the same where nothing is pruned; targets that hooks on a plain model confirm."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import sparsellm
from sparsellm import Recipe
from sparsellm.errors import ModelError, RecipeError
from sparsellm.methods import METHODS
from sparsellm.methods import sparsellm as module
from sparsellm.methods.base import BlockTask
from sparsellm.registry import Needs
from sparsellm.statistics import CrossAccumulator
from tests.models import save_tiny, tiny_gpt2, tiny_llama, tiny_opt
from tests.sweep.helpers import ids_of, tiny_mistral, tiny_post_norm_opt

IDS = ids_of(6)
BATCH = 48  # tokens: two windows
EVERYTHING = {"blend": 0.5, "residual": 0.5, "refine_blend": 0.5, "steps": 3, "passes": 2, "iterations": 1}


def same(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("family", [tiny_llama, tiny_opt, tiny_gpt2], ids=lambda family: family.__name__)
@pytest.mark.parametrize("options", [{}, {"effort": 3}, EVERYTHING], ids=["default", "effort 3", "everything"])
def test_nothing_changes_where_nothing_is_pruned(family: Callable[..., Any], options: dict[str, Any]) -> None:
    model = family()
    recipe = Recipe(method="sparsellm", sparsity=0.0, options=options, batch_tokens=BATCH)
    result = sparsellm.prune(model, recipe, calibration=IDS)
    assert same(model, family())
    assert result.sweeps == []


@pytest.fixture
def both_streams() -> Iterator[list[Tensor]]:
    """A method that prunes nothing and looks at both streams; what leaves each block of the dense one."""
    seen: list[Tensor] = []

    def method(task: BlockTask) -> None:
        """Compares the dense stream with the pruned one."""
        assert task.dense is not None
        for position, leaving in enumerate(task.stream.run(task.index)):
            assert torch.equal(task.dense.entering[position], task.stream.hidden[position])
            assert torch.equal(task.dense.leaving[position], leaving)
        seen.append(torch.cat(list(task.dense.leaving)))

    METHODS.register("both-streams", paper="none", needs=lambda options: Needs(dense_stream=True))(method)
    yield seen
    del METHODS._entries["both-streams"]


@pytest.mark.parametrize("family", [tiny_llama, tiny_opt, tiny_mistral], ids=lambda family: family.__name__)
def test_two_streams_coincide_until_something_is_pruned(family: Callable[..., Any], both_streams: list[Tensor]) -> None:
    recipe = Recipe(method="both-streams", sparsity=0.5, batch_tokens=BATCH)
    sparsellm.prune(family(), recipe, calibration=IDS)
    with torch.no_grad():
        wanted = family()(IDS, output_hidden_states=True, use_cache=False).hidden_states
    assert len(both_streams) == len(wanted) - 1
    for found, plain in zip(both_streams[:-1], wanted[1:-1], strict=True):  # the last one plain has passed the norm
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- targets


def seen_in(model: PreTrainedModel, names: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Input and output ``(windows, seq, features)`` of modules of a plain model, on all windows at once."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def hook_for(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, kwargs: Any, out: Any) -> None:
            entering = args[0] if args else kwargs["hidden_states"]
            seen[name] = (entering.detach(), (out[0] if isinstance(out, tuple) else out).detach())

        return hook

    handles = [model.get_submodule(n).register_forward_hook(hook_for(n), with_kwargs=True) for n in names]
    with torch.no_grad():
        model(IDS, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: tuple(part.view(*IDS.shape, -1) for part in pair) for name, pair in seen.items()}  # type: ignore[misc]


FAMILIES = {
    "llama": (tiny_llama, "model.layers", "self_attn.o_proj", "mlp.down_proj"),
    "opt": (tiny_opt, "model.decoder.layers", "self_attn.out_proj", "fc2"),
    "gpt2": (tiny_gpt2, "transformer.h", "attn.c_proj", "mlp.c_proj"),
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("blend", "residual"), [(0.0, 0.0), (0.3, 0.0), (0.0, 0.7), (0.3, 0.7)])
def test_targets_of_writers_against_hooks_on_plain_models(
    name: str, blend: float, residual: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the fit of each writer in block 1 was given, from a model as it was when that sublayer's turn came."""
    family, blocks, first, last = FAMILIES[name]
    block, writers = f"{blocks}.1", [f"{blocks}.1.{first}", f"{blocks}.1.{last}"]
    dense, model = family(), family()
    targets: list[list[Tensor]] = []
    states: list[PreTrainedModel] = []
    moments = module._moments

    class Watched(CrossAccumulator):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            targets.append([])

        def update(self, target: Tensor, x: Tensor, token_weights: Tensor | None = None) -> None:
            targets[-1].append(target.view(-1, IDS.shape[1], target.shape[-1]).clone())
            super().update(target, x, token_weights)

    def see(task: BlockTask, *args: Any, recorded: Any, **kwargs: Any) -> Any:
        if recorded is not None:
            states.append(copy.deepcopy(model))
        return moments(task, *args, recorded=recorded, **kwargs)

    monkeypatch.setattr(module, "CrossAccumulator", Watched)
    monkeypatch.setattr(module, "_moments", see)
    options = {"effort": 0, "blend": blend, "residual": residual}
    sparsellm.prune(
        model, Recipe(method="sparsellm", sparsity=0.6, options=options, batch_tokens=BATCH), calibration=IDS
    )
    at = 2  # sublayers of block 0 come first
    truth = seen_in(dense, [block, *writers])
    start = seen_in(states[at], [block, *writers])  # block 1 is dense, block 0 is pruned
    streams = {  # what each writer adds to, in the dense model and on the pruned stream
        writers[0]: (truth[block][0], start[block][0]),
        writers[1]: (truth[block][1] - truth[writers[1]][1], start[block][1] - start[writers[1]][1]),
    }
    for number, writer in enumerate(writers):
        own = seen_in(states[at + number], [writer])[writer][1]
        bias = model.get_submodule(writer).bias
        wanted = (1 - blend) * own + blend * truth[writer][1] + residual * (streams[writer][0] - streams[writer][1])
        wanted = wanted if bias is None else wanted - bias.detach()
        torch.testing.assert_close(torch.cat(targets[at + number]), wanted, rtol=1e-3, atol=1e-4)


def test_the_residual_is_refused_where_a_block_is_no_sum() -> None:
    recipe = Recipe(method="sparsellm", sparsity=0.6, options={"effort": 0, "residual": 0.5})
    with pytest.raises(ModelError, match=r"layers\.0 is not its input plus .*residual=0"):
        sparsellm.prune(tiny_post_norm_opt(), recipe, calibration=IDS)
    blended = recipe.updated(options={"effort": 0, "blend": 0.5})
    assert sparsellm.prune(tiny_post_norm_opt(), blended, calibration=IDS).sparsity == pytest.approx(0.6, abs=1e-3)


# ---------------------------------------------------------------- what is left out


@pytest.mark.parametrize(
    "left_in", [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]], ids="+".join
)
@pytest.mark.parametrize("solver", ["admm", "sparsegpt"])
def test_one_group_without_auxiliary_variables_is_the_local_solver(left_in: list[str], solver: str) -> None:
    """With one group in each block both have the same statistics, so every bit is the same."""
    every = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    settings: dict[str, Any] = {
        "sparsity": 0.6,
        "allocation": "uniform",
        "exclude": [f"*.{name}" for name in every if name not in left_in],
        "batch_tokens": BATCH,
    }
    one = tiny_llama()
    sparsellm.prune(one, Recipe(method=solver, **settings), calibration=IDS)
    for options in ({"refit": False}, {"blend": 0.5, "residual": 0.5}):  # a writer alone is fitted to nothing
        other = tiny_llama()
        recipe = Recipe(
            method="sparsellm",
            options={"effort": 0, "solver": solver, "norm_weighting": 0, "output_metric": 0, **options},
            **settings,
        )
        sparsellm.prune(other, recipe, calibration=IDS)
        assert same(one, other)


def test_a_group_of_several_is_never_taken_for_a_writer() -> None:
    """Without o and down, gate and up are the last group that is left; neither is fitted to the other's target."""
    settings: dict[str, Any] = {"sparsity": 0.6, "exclude": ["*.o_proj", "*.down_proj"], "batch_tokens": BATCH}
    fitted, plain = tiny_llama(), tiny_llama()
    options = {"effort": 0, "norm_weighting": 0}
    sparsellm.prune(fitted, Recipe(method="sparsellm", options=options, **settings), calibration=IDS)
    sparsellm.prune(plain, Recipe(method="sparsellm", options={**options, "refit": False}, **settings), calibration=IDS)
    assert same(fitted, plain)


@pytest.mark.parametrize("name", ["steps", "passes", "iterations", "blend", "residual"])
def test_negative_options_are_refused(name: str) -> None:
    with pytest.raises(RecipeError, match=f"option {name} of sparsellm is -1"):
        METHODS["sparsellm"].check({name: -1})


def test_an_unknown_solver_is_refused_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsellm.run.run.walk", None)
    with pytest.raises(RecipeError, match="unknown solver 'adm'; did you mean"):
        sparsellm.prune(tiny_opt(), Recipe(method="sparsellm", options={"solver": "adm"}), calibration=IDS)


@pytest.mark.parametrize("family", [tiny_llama, tiny_opt], ids=lambda family: family.__name__)
def test_token_ids_need_no_tokenizer(family: Callable[..., Any], tmp_path: Any) -> None:
    source = save_tiny(family(), None, tmp_path / "dense")
    recipe = Recipe(method="magnitude", samples=2, seq_len=24)
    assert sparsellm.prune(source, recipe, calibration=IDS, out=tmp_path / "pruned").path == tmp_path / "pruned"
    with pytest.raises(ModelError, match="no readable tokenizer in"):
        sparsellm.prune(source, recipe, out=tmp_path / "other")
