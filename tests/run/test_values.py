"""``prune --values``: whole runs whose kept values are integers times a scale."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import sparsellm
from sparsellm import Recipe
from sparsellm.app.tables import print_packed
from sparsellm.errors import NumericalError, RecipeError, StorageError
from sparsellm.files.scratch import Scratch
from sparsellm.method.allocation import Allocation
from sparsellm.method.blocks import task as block
from sparsellm.method.solvers import rounding
from sparsellm.method.sweep import streamed, whole_model
from sparsellm.method.sweep.integers import Integers
from sparsellm.method.sweep.sweep_task import SweepTask
from sparsellm.model import Feed, open_chain
from sparsellm.patterns import parse_pattern
from sparsellm.records import LinearResult, Pruning, bits_per_weight, read_pruning
from sparsellm.run import walk
from sparsellm.run.result import rounded_to
from sparsepack.codes import exponents_of_text
from sparsepack.grid import Groups, codes_of, on_grid
from sparsepack.grids import GRIDS
from tests.files.small import contents, tensors_of
from tests.killing import fail_after_passes, fail_in_block
from tests.method.sweep.helpers import (
    CPU,
    dense_end,
    divergence,
    halved,
    ids_of,
    linear_weights,
    same_bits,
    sharing_llama,
)
from tests.models import (
    RECIPE,
    save_tiny,
    tiny_gpt2,
    tiny_llama,
    tiny_opt,
    tiny_tokenizer,
)
from tests.shares import violations

LOCAL: dict[str, Any] = {"method": "sparsegpt"}
GLOBAL: dict[str, Any] = {"method": "sparsellm", "effort": 0}
SWEPT: dict[str, Any] = {"method": "sparsellm", "passes": 2, "sweep_rate": 0.003}
Pruned = tuple[Path, sparsellm.PruneResult]


def is_on_grid(result: sparsellm.PruneResult, name: str, weight: Tensor) -> bool:
    """Whether a weight of int4 in fp32, by the name of its parameter, is on the grid that the result records."""
    exponents = {linear.name: linear.exponents for linear in result.linears}[
        name.removesuffix(".weight")
    ]
    return torch.equal(
        on_grid(weight.detach(), "int4", torch.float32, exponents_of_text(exponents)),
        weight,
    )


def uneven(model: PreTrainedModel) -> PreTrainedModel:
    """The model with inputs of uneven size, for which columns take exponents."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ("norm" in name or "ln_" in name) and name.endswith("weight"):
                weight[::24] *= 8
    return model


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Pruned:
    """A model of int4 in fp32 whose columns have exponents."""
    source = save_tiny(
        uneven(tiny_llama()), tiny_tokenizer(), tmp_path_factory.mktemp("dense")
    )
    out = tmp_path_factory.mktemp("int4") / "pruned"
    return out, sparsellm.prune(
        source, Recipe(**{**RECIPE, **LOCAL, "values": "int4"}), out=out
    )


@pytest.mark.parametrize(
    ("family", "fields", "values"),
    [
        (tiny_gpt2, LOCAL, "int8"),
        (tiny_opt, LOCAL, "int3"),
        (tiny_opt, LOCAL, "int5"),
        (tiny_gpt2, SWEPT, "int6"),
        (tiny_llama, GLOBAL, "int4"),
        (tiny_llama, SWEPT, "int4"),
        (tiny_opt, SWEPT, "int4"),
        (tiny_gpt2, SWEPT, "int8"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_packing_the_result_loses_nothing(
    family: Any, fields: dict[str, Any], values: str, tmp_path: Path
) -> None:
    dtype = torch.float32 if family is tiny_opt else torch.bfloat16
    source = save_tiny(uneven(family()).to(dtype), tiny_tokenizer(), tmp_path / "dense")
    out = tmp_path / "pruned"
    result = sparsellm.prune(
        source, Recipe(**{**RECIPE, **fields, "values": values}), out=out
    )
    packed = sparsellm.pack(out, out=tmp_path / "packed", head="keep")
    assert not packed.rounded
    types = {entry.value_type for entry in packed.linears.values() if entry}
    assert types == {values}
    sparsellm.unpack(tmp_path / "packed", out=tmp_path / "again")
    assert same_bits(tensors_of(out), tensors_of(tmp_path / "again"))
    assert any(linear.exponents for linear in result.linears)
    assert result.sparsity_pruned >= 0.6 - 1e-3
    report = json.loads((out / "pruning.json").read_text())
    assert report["values"] == report["recipe"]["values"] == values
    assert report["bits_per_weight"] == pytest.approx(result.bits_per_weight)
    # int8 costs too little for tiny models to gain
    if fields is SWEPT and values == "int4":
        assert (
            min(sweep.held_out for sweep in result.sweeps[1:])
            < result.sweeps[0].held_out
        )


GRIDDED: dict[str, Any] = {"method": "sparsellm", "effort": 1, "sweep_rate": 0.003}
LLAMA_OF_32, GPT2_OF_32 = (
    partial(tiny_llama, intermediate_size=96),
    partial(tiny_gpt2, n_embd=64, n_inner=128),
)


@pytest.mark.parametrize(
    ("family", "name", "dtype"),
    [
        (LLAMA_OF_32, "q4_0", torch.bfloat16),
        (LLAMA_OF_32, "q8_0", torch.float16),
        (GPT2_OF_32, "w4a16-32", torch.float32),
        (tiny_gpt2, "w8a8", torch.bfloat16),
    ],
    ids=["q4_0", "q8_0", "w4a16-32", "w8a8"],
)
def test_a_run_ends_on_the_grid_with_the_zeros(
    family: Any, name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Every pruned linear, after solver, refit and sweep; and `pack` keeps each bit or refuses."""
    source = save_tiny(uneven(family()).to(dtype), tiny_tokenizer(), tmp_path / "dense")
    out = tmp_path / "pruned"
    result = sparsellm.prune(
        source, Recipe(**{**RECIPE, **GRIDDED, "grid": name}), out=out
    )
    weights, pruning = tensors_of(out), json.loads((out / "pruning.json").read_text())
    grid = GRIDS[name]
    for linear in result.linears:
        weight = weights[f"{linear.name}.weight"]
        # GPT-2 stores (in, out)
        weight = (
            weight.t().contiguous() if linear.name.startswith("transformer") else weight
        )
        codes, _ = codes_of(weight, grid, linear.name)
        assert (
            int((codes == 0).sum())
            == linear.zeros
            >= round(linear.asked * linear.weights)
        )
    assert result.sparsity_pruned >= 0.6 - 1e-3
    assert (
        min(sweep.held_out for sweep in result.sweeps[1:]) < result.sweeps[0].held_out
        or grid.bits == 8
    )
    assert result.bits_per_weight == pytest.approx(
        {"q4_0": 4.5, "q8_0": 8.5, "w4a16-32": 4.5}.get(name, 8.25), abs=0.1
    )
    assert any(
        f"grid {name} stores zeros like other values" in warning
        for warning in result.warnings
    )
    assert (pruning["grid"], pruning["values"], pruning["recipe"]["grid"]) == (
        name,
        grid.values,
        name,
    )
    assert not any(entry.exponents for entry in result.linears)
    if grid.bits == 8:
        with pytest.raises(RecipeError, match=f"on the grid {name}, .* values keep"):
            sparsellm.pack(out, out=tmp_path / "packed")
        return
    assert not sparsellm.pack(out, out=tmp_path / "packed", head="keep").rounded
    sparsellm.unpack(tmp_path / "packed", out=tmp_path / "again")
    assert same_bits(weights, tensors_of(tmp_path / "again"))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("w4a16", "do not divide the 32 inputs of model.layers.0.self_attn.q_proj; take grid w4a16-32"),
        ("q4_0", "do not divide the 80 inputs of model.layers.0.mlp.down_proj; leave it out (exclude)"),
    ],
)  # fmt: skip
def test_groups_that_do_not_divide_are_refused(
    name: str, said: str, tmp_path: Path, refusal: Any
) -> None:
    """Before the work, with the grid that fits, if one does."""
    width = 96 if name == "w4a16" else 80
    source = save_tiny(
        tiny_llama(intermediate_size=width), tiny_tokenizer(), tmp_path / "dense"
    )
    assert said in refusal("prune", source, "--out", tmp_path / "out", "--grid", name)
    assert not list(tmp_path.glob("out*"))


def test_a_grid_without_a_packed_form_is_refused_before_the_work(
    llama: Path, tmp_path: Path, refusal: Any
) -> None:
    said = refusal(
        "prune",
        llama,
        "--out",
        tmp_path / "a",
        "--grid",
        "w8a8",
        "--pack",
        tmp_path / "b",
    )
    assert "grid w8a8 has no packed form in int8; export the result" in said
    assert not list(tmp_path.glob("[ab]*"))


def test_without_exponents_pack_says_so(
    pruned: Pruned, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """They stand in pruning.json; a value of an unknown grid is rounded to nearest."""
    out, result = shutil.copytree(pruned[0], tmp_path / "pruned"), pruned[1]
    (out / "pruning.json").unlink()
    packed = sparsellm.pack(out, out=tmp_path / "packed", values="int4")
    assert set(packed.rounded) == {
        linear.name for linear in result.linears if linear.exponents
    }
    assert packed.to_dict()["rounded"] == packed.rounded
    print_packed(packed)
    assert (
        f"note: {len(packed.rounded)} of {len(packed.linears)} linears were rounded"
        in capfd.readouterr().err
    )
    sparsellm.unpack(tmp_path / "packed", out=tmp_path / "again")
    assert not same_bits(tensors_of(out), tensors_of(tmp_path / "again"))
    kept = sparsellm.pack(out, out=tmp_path / "kept")
    assert not kept.rounded
    assert not kept.head


@pytest.mark.parametrize("values", ["int3", "int8", "bf16"])
def test_values_are_rounded_a_second_time_only_if_asked(
    values: str, pruned: Pruned, tmp_path: Path, run: Any, refusal: Any
) -> None:
    """The fixture's run rounded to int4; ``keep`` loses nothing, and is taken."""
    arguments = ("pack", pruned[0], "--values", values, "--out")
    said = refusal(*arguments, tmp_path / "packed")
    assert f"was rounded to int4 while it was pruned, and {values} would" in said
    assert "--round-again to accept the loss" in said
    assert not list(tmp_path.iterdir())
    assert run(*arguments, tmp_path / "packed", "--round-again")[0] == 0
    sparsellm.pack(pruned[0], out=tmp_path / "kept", values="keep")
    sparsellm.unpack(tmp_path / "kept", out=tmp_path / "again")
    assert same_bits(tensors_of(pruned[0]), tensors_of(tmp_path / "again"))


def test_pack_takes_type_and_head_from_the_record(
    pruned: Pruned, tmp_path: Path
) -> None:
    """int4, which is what the run rounded to, and then int8 for the embedding; a linear that it left out stays."""
    source = shutil.copytree(pruned[0], tmp_path / "pruned")
    record = json.loads((source / "pruning.json").read_text())
    left_out = record["linears"].pop()["name"]
    (source / "pruning.json").write_text(json.dumps(record))
    packed = sparsellm.pack(source, out=tmp_path / "packed")
    types = {name: entry and entry.value_type for name, entry in packed.linears.items()}
    assert types.pop(left_out) not in ("int4", "int8")
    assert set(types.values()) == {"int4"}
    assert {entry.value_type for entry in packed.head.values()} == {"int8"}
    assert not sparsellm.pack(source, out=tmp_path / "b", head="keep").head


def test_an_unknown_type_in_the_record_is_refused(
    pruned: Pruned, tmp_path: Path
) -> None:
    source = shutil.copytree(pruned[0], tmp_path / "pruned")
    record = json.loads((source / "pruning.json").read_text())
    record["linears"][0]["values"] = "int7"
    (source / "pruning.json").write_text(json.dumps(record))
    with pytest.raises(StorageError, match="'int7', which is unknown; put the file"):
        sparsellm.pack(source, out=tmp_path / "packed")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"exponents": "12x"}, "exponents is '12x'"),
        ({"exponents": "88"}, "2 exponents of"),
        ({"name": "no such"}, "no such linear"),
    ],
)
def test_wrong_exponents_are_refused(
    change: dict[str, str], said: str, pruned: Pruned, tmp_path: Path
) -> None:
    out = shutil.copytree(pruned[0], tmp_path / "pruned")
    content = json.loads((out / "pruning.json").read_text())
    next(linear for linear in content["linears"] if linear["exponents"]).update(change)
    (out / "pruning.json").write_text(json.dumps(content))
    with pytest.raises(StorageError, match=said):
        sparsellm.pack(out, out=tmp_path / "packed", values="int4")
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize(
    ("values", "goal", "near"),
    [
        ("int3", {}, 0.02),
        ("int4", {"pattern": "2:4"}, 0),
        ("int8", {"pattern": "4:8"}, 0),
    ],
    ids=["int3", "int4 2:4", "int8 4:8"],
)  # rows that keep different numbers of values each count an even one
def test_bits_a_weight_are_of_the_packed_file(
    values: str, goal: dict[str, Any], near: float, tmp_path: Path
) -> None:
    source = save_tiny(tiny_opt(), tiny_tokenizer(), tmp_path / "dense")
    recipe = Recipe(**{**RECIPE, "sparsity": 0.5, **goal, "values": values})
    result = sparsellm.prune(source, recipe, out=tmp_path / "pruned")
    packed = sparsellm.pack(
        tmp_path / "pruned", out=tmp_path / "packed", values=values
    ).to_dict()
    assert result.bits_per_weight == pytest.approx(
        packed["bits_per_weight"], abs=near, rel=1e-9
    )
    for linear in result.linears if recipe.pattern else ():
        assert (
            violations(
                parse_pattern(recipe.pattern),
                tensors_of(tmp_path / "pruned")[f"{linear.name}.weight"],
            )
            == 0
        )


@pytest.mark.parametrize("fields", [LOCAL, SWEPT], ids=["local", "swept"])
def test_sparsity_0_is_quantisation(fields: dict[str, Any]) -> None:
    recipe = Recipe(**{**RECIPE, **fields, "sparsity": 0.0, "values": "int4"})
    dense, model, nearest = tiny_llama(), tiny_llama(), tiny_llama()
    result = sparsellm.prune(model, recipe, calibration=ids_of(8))
    for name, weight in linear_weights(model).items():
        assert not torch.equal(weight, linear_weights(dense)[name]), name
        assert is_on_grid(result, name, weight), name
    # a mask of one row and exponents of columns
    assert result.bits_per_weight == pytest.approx(4.5, abs=0.3)
    with torch.no_grad():
        for weight in linear_weights(nearest).values():
            weight.copy_(on_grid(weight, "int4", torch.float32))
        assert divergence(dense, model, ids_of(8)) < 0.7 * divergence(
            dense, nearest, ids_of(8)
        )


def test_a_linear_that_rounding_costs_much_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(block, "COARSE", 0.01)
    result = sparsellm.prune(
        tiny_llama(),
        {**RECIPE, "values": "int3", "sparsity": 0.0},
        tokenizer=tiny_tokenizer(),
    )
    for linear in result.linears:
        said = f"rounding to int3 raised its error from 0.000 to {linear.error:.3f}"
        assert linear.notes == ((said,) if linear.error > 0.01 else ())
    assert len({bool(entry.notes) for entry in result.linears}) == 2
    named = [linear.name for linear in result.linears if linear.notes]
    said = (
        f"rounding raised the error of {len(named)} of {len(result.linears)} linears by"
    )
    (warning,) = [text for text in result.warnings if text.startswith(said)]
    assert all(name in warning for name in named[:6])


def test_later_linears_see_the_rounded_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """The inputs of every Gram matrix that the rounding gets are those of the model as it is written so far."""
    rounded = Mock(wraps=rounding.rounded)
    monkeypatch.setattr("sparsellm.method.blocks.task.rounded", rounded)
    model, ids = tiny_llama(), ids_of(4)
    recipe = Recipe(
        values="int4",
        effort=0,
        options={"norm_weighting": 0.0, "refit": False},
        products="float32",
    )
    sparsellm.prune(model, recipe, calibration=ids)
    seen: list[Tensor] = []
    down = model.model.layers[0].mlp.down_proj
    with torch.no_grad():
        down.register_forward_pre_hook(
            lambda module, inputs: seen.append(inputs[0].flatten(0, -2))
        )
        model(ids)
    expected = seen[0].T @ seen[0] / len(seen[0])
    grams = [call.args[1].matrix for call in rounded.call_args_list]
    assert any(
        gram.shape == expected.shape
        and torch.allclose(gram, expected, rtol=1e-3, atol=1e-6)
        for gram in grams
    )


def test_the_judge_and_the_steps_see_rounded_values(steps: Any, tmp_path: Path) -> None:
    """The divergence before the first pass is that of the model that effort 0 writes, which has the same rounding."""
    source, ids = save_tiny(tiny_opt(), tiny_tokenizer(), tmp_path / "dense"), ids_of(4)
    given = {"sparsity": 0.5, "values": "int4", "products": "float32"}
    sparsellm.prune(
        source, Recipe(**given, effort=0), calibration=ids, out=tmp_path / "walked"
    )
    swept = sparsellm.prune(
        source,
        Recipe(**given, passes=1, sweep_rate=1e-9),
        calibration=ids,
        out=tmp_path / "swept",
    )
    walked = AutoModelForCausalLM.from_pretrained(tmp_path / "walked")
    expected = float(divergence(tiny_opt(), walked, ids).detach())
    assert swept.sweeps[0].held_out == pytest.approx(expected, rel=1e-3)
    assert steps[0][0] / steps[0][3] == pytest.approx(expected, rel=1e-3)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "swept")
    # steps too small to change a whole number
    assert same_bits(linear_weights(walked), linear_weights(written))


def test_straight_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of each weight is that of its rounded value, computed by autograd on the whole rounded model, and
    that of a group's factor is how the loss changes if all its rounded values grow together."""
    gradients: dict[str, Tensor] = {}

    def recorded(parameters: dict[str, nn.Parameter], *_: Any, **__: Any) -> None:
        gradients.update(
            {
                name: p.grad.clone()
                for name, p in parameters.items()
                if p.grad is not None
            }
        )

    monkeypatch.setattr(streamed, "adam_step", recorded)
    dense, model, plain, ids = (
        tiny_gpt2(),
        halved(tiny_gpt2()),
        halved(tiny_gpt2()),
        ids_of(2),
    )
    chain = open_chain(model, device=CPU)
    names = [
        linear.name for index in range(len(chain)) for linear in chain.linears(index)
    ]
    before = {
        name: weight.detach().clone() for name, weight in linear_weights(model).items()
    }
    task = SweepTask(
        Feed(chain, ids, 96, Scratch()), dense_end(dense, ids, 96), 1, 0, lambda index: None, learning_rate=0.01,
        integers=Integers(
            chain, dict.fromkeys(names, "int4"), dict.fromkeys(names, "")
        ),
    )  # fmt: skip
    whole_model.sweep(task)
    with torch.no_grad():
        for name, weight in linear_weights(plain).items():
            weight.copy_(on_grid(weight.t().contiguous(), "int4", torch.float32).t())
            assert not torch.equal(weight, before[name])
    divergence(dense, plain, ids).backward()
    several = False
    for name, weight in linear_weights(plain).items():
        assert weight.grad is not None
        assert torch.allclose(gradients[name], weight.grad, rtol=1e-3, atol=1e-6), name
        seen, slope = weight.detach().t(), weight.grad.t()
        size = Groups.of(seen, "int4").size
        several = several or size < seen.shape[1]
        for group, start in enumerate(range(0, seen.shape[1], size)):
            part = slice(start, start + size)
            expected = (slope[:, part] * seen[:, part]).sum(dim=1)
            assert torch.allclose(
                gradients[f"{name}.factors"][:, group], expected, rtol=1e-2, atol=1e-6
            ), name
    assert several, "every row is one group"
    # as it is written: no step was taken
    assert same_bits(linear_weights(model), linear_weights(plain))


@pytest.mark.parametrize(
    "rounding", [{"values": "int4"}, {"grid": "q4_0"}], ids=["own", "q4_0"]
)
def test_a_run_goes_on_bit_for_bit(
    rounding: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stops in a block and in its second pass; blocks and passes hold unrounded values."""
    source = save_tiny(
        LLAMA_OF_32().to(torch.bfloat16), tiny_tokenizer(), tmp_path / "dense"
    )
    recipe = Recipe(
        **{**RECIPE, **SWEPT, **rounding, "dtype": "float32", "allocation": "uniform"}
    )
    sparsellm.prune(source, recipe, out=tmp_path / "whole")
    for stop, place in ((partial(fail_in_block, after=2), 1), (fail_after_passes, 1)):
        with monkeypatch.context() as patched:
            stop(place, patched)
            with pytest.raises(NumericalError):
                sparsellm.prune(source, recipe, out=tmp_path / "p")
    assert sparsellm.prune(source, recipe, out=tmp_path / "p").resumed == 3
    assert contents(tmp_path / "p") == contents(tmp_path / "whole")


def test_weights_that_blocks_share_are_rounded_once() -> None:
    model, ids = sharing_llama(), ids_of(4)
    result = sparsellm.prune(
        model,
        Recipe(**SWEPT, sparsity=0.5, values="int4", products="float32"),
        calibration=ids,
    )
    recorded = {
        id(model.get_submodule(linear.name).weight): linear.name
        for linear in result.linears
    }
    for name, weight in linear_weights(model).items():
        assert is_on_grid(result, recorded[id(weight)], weight), name


def mixed_types(linears: Iterable[str]) -> dict[str, str]:
    """Four types by kind; the values of v are kept."""
    types = {"q_proj": "int8", "o_proj": "q4_0", "v_proj": "keep", "down_proj": "int3"}
    return {name: types.get(name.rpartition(".")[2], "int4") for name in linears}


def allocate_types(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every allocation gives linears their :func:`mixed_types`."""
    before = walk._allocate

    def typed(*arguments: Any) -> Allocation:
        allocation = before(*arguments)
        return replace(allocation, values=mixed_types(allocation.zeros))

    monkeypatch.setattr(walk, "_allocate", typed)


# int4, for the sweep; what the allocation says counts
MIXED: dict[str, Any] = {
    **RECIPE,
    **SWEPT,
    "values": "int4",
    "allocation": "threshold",
    "dtype": "float32",
}


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """A Llama whose inputs are multiples of 32, the group of q4_0."""
    model = uneven(tiny_llama(intermediate_size=96))
    return save_tiny(model, tiny_tokenizer(), tmp_path / "dense")


def test_every_linear_is_rounded_to_its_own_type(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocate_types(monkeypatch)
    out = tmp_path / "pruned"
    result = sparsellm.prune(wide, Recipe(**MIXED), out=out)
    weights = tensors_of(out)
    for linear in result.linears:
        assert linear.values == mixed_types([linear.name])[linear.name]
        weight = weights[f"{linear.name}.weight"]
        if linear.values == "keep":
            assert len(weight.unique()) == weight.count_nonzero() + 1
            continue
        exponents = exponents_of_text(linear.exponents)
        again = on_grid(weight, linear.values, torch.float32, exponents)
        assert torch.equal(again, weight), linear.name
    record = read_pruning(out)
    assert (record.values, record.grid) == ("mixed", "mixed")
    assert result.bits_per_weight is None  # v is kept


def test_packing_takes_the_type_of_each_linear_from_the_record(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocate_types(monkeypatch)
    out = tmp_path / "pruned"
    result = sparsellm.prune(wide, Recipe(**MIXED), out=out)
    packed = sparsellm.pack(out, out=tmp_path / "packed", head="keep")
    assert not packed.rounded
    sparsellm.unpack(packed.path, out=tmp_path / "again")
    assert same_bits(tensors_of(out), tensors_of(tmp_path / "again"))
    expected = {"q4_0": "int4", "keep": "fp32"}
    for linear in result.linears:
        entry = packed.linears[linear.name]
        assert entry is not None
        assert entry.value_type == expected.get(linear.values, linear.values)


def test_a_resumed_run_keeps_the_types(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as typed:
        allocate_types(typed)
        expected = sparsellm.prune(wide, Recipe(**MIXED), out=tmp_path / "uncut")
        with pytest.MonkeyPatch.context() as failing:
            # gradients read each block twice, before the walk
            fail_in_block(1, failing, after=2)
            with pytest.raises(NumericalError, match="fire"):
                sparsellm.prune(wide, Recipe(**MIXED), out=tmp_path / "cut")
    # nothing allocates types any more
    resumed = sparsellm.prune(wide, Recipe(**MIXED), out=tmp_path / "cut")
    assert resumed.resumed == 1
    assert expected.path is not None
    assert contents(tmp_path / "cut") == contents(expected.path)


def result_of(values: str, **changes: Any) -> LinearResult:
    """A linear of 64 × 128 weights without zeros."""
    fields = {"name": "blocks.0.q", "shape": (64, 128), "zeros": 0, "values": values}
    return LinearResult(**{**fields, **changes})


def test_bits_are_counted_by_linear() -> None:
    both = [result_of("q4_0"), result_of("q8_0", shape=(64, 256))]
    assert bits_per_weight(both) == pytest.approx((4.5 + 2 * 8.5) / 3)
    packed_type = result_of("int8")
    # a mask of one row, and fp32 scales of rows
    stored = 64 * 128 + 16 + 4 * 64
    expected = (8 * stored + 4.5 * 64 * 128) / (2 * 64 * 128)
    assert bits_per_weight([packed_type, both[0]]) == pytest.approx(expected)
    # experts do not count in the packed format
    expert = result_of("int8", tokens=3)
    assert bits_per_weight([expert, both[0]]) == 4.5
    assert bits_per_weight([expert]) is None
    assert bits_per_weight([packed_type, result_of("keep")]) is None


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["keep"], ("keep", "own")),
        (["int4", "int4"], ("int4", "own")),
        (["int4", "int8"], ("mixed", "own")),
        (["int4", "keep"], ("mixed", "own")),
        (["q4_0", "w4a16"], ("int4", "mixed")),
        (["q4_0", "q8_0"], ("mixed", "mixed")),
        (["q4_0", "int4"], ("int4", "mixed")),
        (["q8_0"], ("int8", "q8_0")),
    ],
)
def test_the_type_of_a_run_is_that_of_its_linears(
    values: list[str], expected: tuple[str, str]
) -> None:
    assert rounded_to([result_of(name) for name in values]) == expected


def test_a_linear_of_an_older_record_has_the_type_of_its_run() -> None:
    old = result_of("")
    fields: dict[str, Any] = {"sparsity_asked": 0, "linears": [old]}
    assert Pruning(**fields, values="int3").values_of(old) == "int3"
    on_a_grid = Pruning(**fields, values="int8", grid="w8a8")
    assert on_a_grid.values_of(old) == "w8a8"
    assert not on_a_grid.packs
    assert Pruning(**fields, values="int4", grid="q4_0").packs
