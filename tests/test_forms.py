"""Runs for a program and a size: what is chosen, what it takes, and how candidates are compared."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

import sparsellm
from sparsellm import Recipe
from sparsellm.convert import check_packable
from sparsellm.errors import RecipeError
from sparsellm.method.allocation import LinearSize
from sparsellm.method.allocation.forms import Form
from sparsellm.model import Feed, open_chain
from sparsellm.run import form_choice as forms
from sparsepack.grid import on_grid
from sparsepack.grids import GRIDS
from tests import line
from tests.exports.checkpoints import mixtral
from tests.files.small import tensors_of
from tests.method.allocation.helpers import Record, sizes_of, weight_of
from tests.models import save_tiny, tiny_gpt2, tiny_llama, tiny_tokenizer, windows

FIELDS: dict[str, Any] = {"effort": 0, "batch_tokens": 80}


def wide(**changes: Any) -> PreTrainedModel:
    """A Llama whose inputs are multiples of 32."""
    return tiny_llama(hidden_size=64, intermediate_size=160, **changes)


def sized(
    model: PreTrainedModel, program: str, bits: float, **changes: Any
) -> sparsellm.PruneResult:
    recipe = Recipe(**{**FIELDS, "program": program, "bits": bits, **changes})
    return sparsellm.prune(model, recipe, calibration=windows(12))


@pytest.mark.parametrize(
    ("program", "bits", "types"),
    [
        ("llama.cpp", 6.0, {x.name for x in GRIDS.values() if x.form == "gguf"}),
        ("vllm", 6.0, {"w4a16-32", "w8a16"}),
        ("sparsellm", 4.3, {"w4a16-64", *(f"int{bits}" for bits in range(3, 9))}),
    ],
)
def test_a_run_takes_at_most_the_size_that_was_asked_for(
    program: str, bits: float, types: set[str]
) -> None:
    model = wide()
    result = sized(model, program, bits)
    assert result.bits_per_weight is not None
    assert 0.96 * bits < result.bits_per_weight <= bits
    assert {linear.values for linear in result.linears} <= types
    assert "mixed" in (result.values, result.grid)
    assert not result.warnings
    weights = {
        name.removesuffix(".weight"): weight
        for name, weight in model.named_parameters()
    }
    for linear in result.linears:
        if linear.values in GRIDS:
            weight = weights[linear.name].detach()
            assert torch.equal(on_grid(weight, linear.values, torch.float32), weight)


def test_vllm_gets_one_type_for_linears_that_it_runs_together() -> None:
    types = {x.name: x.values for x in sized(wide(), "vllm", 6.0).linears}
    assert len({*types.values()}) > 1
    for block in range(3):
        inside = f"model.layers.{block}"
        projections = [types[f"{inside}.self_attn.{x}_proj"] for x in "qkv"]
        assert len({*projections}) == 1
        assert types[f"{inside}.mlp.gate_proj"] == types[f"{inside}.mlp.up_proj"]


@pytest.mark.parametrize(("bits", "named"), [(4.0, "int3"), (4.3, "w4a16-64")])
def test_a_packed_run_has_the_types_that_were_chosen(
    bits: float, named: str, tmp_path: Path
) -> None:
    source = save_tiny(wide(), tiny_tokenizer(), tmp_path / "dense")
    recipe = Recipe(**FIELDS, program="sparsellm", bits=bits, samples=6, seq_len=24)
    result = sparsellm.prune(source, recipe, out=tmp_path / "pruned")
    packed = sparsellm.pack(tmp_path / "pruned", out=tmp_path / "p", head="keep")
    assert not packed.rounded
    assert named in {linear.values for linear in result.linears}
    assert 8 * packed.packed_bytes / packed.weights <= bits
    sparsellm.unpack(tmp_path / "p", out=tmp_path / "again")
    before = tensors_of(tmp_path / "pruned")
    for name, weight in tensors_of(tmp_path / "again").items():
        assert torch.equal(weight, before[name])
    # the recipe that a run writes is one that runs
    again = Recipe.from_yaml(tmp_path / "pruned" / "recipe.yaml")
    assert (again.bits, again.program) == (bits, "sparsellm")
    assert result.allocation["chosen"] in ("by linear", "int3", "int4", "w4a16-64")


@pytest.mark.parametrize("best", [0, 1, 2])
def test_the_candidate_that_diverges_least_is_taken(
    best: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def judged(*arguments: Any) -> list[float]:
        result = [1.0] * len(arguments[-1])
        result[best] = 0.5
        return result

    monkeypatch.setattr(forms, "divergences", judged)
    result = sized(wide(), "sparsellm", 4.3)
    report: Any = result.allocation
    assert report["chosen"] == report["candidates"][best]["name"]
    assert all(candidate["bits"] <= 4.3 for candidate in report["candidates"])
    types = {linear.values for linear in result.linears}
    zeros = sum(linear.asked for linear in result.linears)
    if best == 1:
        assert types == {"int4"}
        assert zeros > 0
    if best == 2:
        assert (types, zeros) == ({"int3"}, 0)


@pytest.mark.parametrize(("by_linear", "best"), [(0.74, 0), (0.76, 1)])
def test_a_mixture_must_be_better_than_one_form_with_zeros_by_a_margin(
    by_linear: float, best: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forms, "divergences", lambda *_: [by_linear, 1.0, 2.0])
    report: Any = sized(wide(), "sparsellm", 4.3).allocation
    assert report["chosen"] == report["candidates"][best]["name"]


def test_an_impossible_size_names_the_least() -> None:
    with pytest.raises(RecipeError, match=r"bits 4.4 are .* at least 4.5 are possible"):
        sized(wide(), "llama.cpp", 4.4)
    least = sized(wide(), "llama.cpp", 4.5)
    assert least.bits_per_weight == 4.5


def test_bits_beyond_the_largest_forms_name_the_most() -> None:
    with pytest.raises(RecipeError, match=r"8.6 are too large .* most 8.5 are possi"):
        sized(wide(), "llama.cpp", 8.6)
    most = sized(wide(), "llama.cpp", 8.58)
    assert most.bits_per_weight == 8.5


@pytest.mark.parametrize("weights", [3, 7 * 10**3, 10**7 + 19, 10**11 + 3])
def test_bits_of_a_size_stand_for_all_its_bytes(weights: int) -> None:
    """Also where the quotient was rounded down."""
    sizes = [weights + number * (weights // 977 + 1) for number in range(900)]
    for size in sizes:
        assert forms._bytes_at(forms.bits_in(size, weights), weights) == size


def test_a_linear_without_a_form_is_named() -> None:
    with pytest.raises(RecipeError, match=r"h\.0\.attn\.c_attn has 48 inputs, for"):
        sized(tiny_gpt2(), "llama.cpp", 6.0)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"bits": 4.0}, "and program go together"),
        ({"program": "vllm"}, "and program go together"),
        ({"size": 10**6}, "and program go together"),
        ({"size": 10**6, "program": "vllm"}, "size 1000000 is of llama.cpp's types"),
        ({"size": 0, "program": "llama.cpp"}, "size"),
        ({"size": 9, "bits": 4.0, "program": "llama.cpp"}, "bits 4 and size 9"),
        ({"values": "mixed"}, "values mixed comes from a size"),
        ({"bits": 4.0, "program": "vllm", "sparsity": 0.5}, "sparsity 0.5 says other"),
        ({"bits": 4.0, "program": "vllm", "grid": "w8a8"}, "grid w8a8 says otherwise"),
        ({"bits": 4.0, "program": "sparsellm", "pattern": "2:4"}, "pattern 2:4 says"),
        (
            {"bits": 4.0, "program": "sparsellm", "allocation": "uniform"},
            "takes allocation threshold",
        ),
    ],
)
def test_what_a_size_leaves_no_choice_of_is_refused(
    fields: dict[str, Any], said: str
) -> None:
    with pytest.raises(RecipeError, match=said):
        Recipe(**fields)


@pytest.mark.parametrize("program", ["llama.cpp", "vllm"])
def test_forms_of_other_programs_are_exported_and_not_packed(
    program: Literal["llama.cpp", "vllm"],
) -> None:
    with pytest.raises(RecipeError, match=f"program {program} has forms that the"):
        check_packable(Recipe(bits=5.0, program=program))
    check_packable(Recipe(bits=5.0, program="sparsellm"))


def test_no_other_grid_is_named_where_a_program_is_given(
    tmp_path: Path,
) -> None:
    source = save_tiny(wide(), tiny_tokenizer(), tmp_path / "dense")
    fields = ["--set", "bits=2", "--set", "program=vllm", "--calibration", "pydoc"]
    command = ["prune", str(source), "--out", str(tmp_path / "out"), *fields]
    code, said = line.run(command)
    assert code == 2
    assert "are possible" in said
    assert "to export it" not in said


def kl_by_hand(
    dense: PreTrainedModel, weights: Mapping[str, Tensor], ids: Tensor
) -> float:
    other = copy.deepcopy(dense)
    with torch.no_grad():
        for name, weight in weights.items():
            other.get_parameter(f"{name}.weight").copy_(weight)
        goal = functional.log_softmax(dense(ids).logits.double(), -1)
        result = functional.log_softmax(other(ids).logits.double(), -1)
    return float((goal.exp() * (goal - result)).sum(-1).mean())


def test_candidates_are_compared_by_their_divergence_on_other_windows() -> None:
    model = wide()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    chain = open_chain(model, device=torch.device("cpu"))
    sizes = sizes_of(chain)
    judges = Feed(chain, windows(3, seed=2), 80)
    few, many = Form("int4"), Form("int4", 0.5)
    measured = forms.Measured(
        errors={size.name: {few: 0.01, many: 0.1} for size in sizes},
        nearest={size.name: {few: 0.04, many: 0.9} for size in sizes},
        squares={size.name: torch.arange(1.0, 1 + size.shape[1]) for size in sizes},
    )
    candidates = [
        forms.Candidate(str(form), dict.fromkeys([size.name for size in sizes], form))
        for form in (few, many)
    ]
    result = forms.divergences(judges, measured, candidates)
    assert all(torch.equal(before[x], y) for x, y in model.state_dict().items())
    # how far weights are moved: the root of the error measured over that of rounding
    for candidate, divergence, share in zip(
        candidates, result, (0.5, 1 / 3), strict=True
    ):
        weights = {}
        for name, form in candidate.forms.items():
            weight = before[f"{name}.weight"]
            stored = weight
            if form == many:
                # the half of each row with the least magnitudes times roots of squares
                scores = weight.abs() * measured.squares[name].sqrt()
                stored = weight * (scores.argsort(1).argsort(1) >= weight.shape[1] // 2)
            stored = on_grid(stored, "int4", torch.float32)
            weights[name] = weight + share * (stored - weight)
        expected = kl_by_hand(model, weights, judges.windows)
        assert divergence == pytest.approx(expected, rel=1e-3)


def test_a_measurement_is_on_the_inputs_of_the_dense_model() -> None:
    model = wide()
    chain = open_chain(model, device=torch.device("cpu"))
    sizes = sizes_of(chain)
    ids = windows(4, 20)
    # two windows at a time
    feed = Feed(chain, ids, 40)
    gradients = {
        size.name: torch.rand(size.shape[0], generator=torch.Generator().manual_seed(0))
        for size in sizes
    }
    measured = forms.measure(feed, sizes, gradients, "llama.cpp")
    record = Record(model, ids, [size.name for size in sizes])
    for size in sizes:
        weight = weight_of(model.get_submodule(size.name))
        x = record.inputs[size.name].double()
        outputs = (x @ weight.T).square().mean(0)
        cost = float(outputs @ gradients[size.name].double())
        assert measured.costs[size.name] == pytest.approx(cost, rel=1e-3)
        stored = on_grid(weight.float(), "iq4_nl", torch.float32).double()
        lost = (x @ (stored - weight).T).square().mean(0)
        error = measured.nearest[size.name][Form("iq4_nl")]
        if size.shape[0] <= 64:  # all rows are measured
            assert error == pytest.approx(float(lost.sum() / outputs.sum()), rel=1e-3)
        assert 0 < measured.errors[size.name][Form("iq4_nl")] < error
        assert Form("q4_0") not in measured.errors[size.name]
    inside = "model.layers.1"
    assert [f"{inside}.mlp.gate_proj", f"{inside}.mlp.up_proj"] in measured.groups


def size_of(name: str) -> LinearSize:
    return LinearSize(name, 0, (8, 32))


def test_experts_that_a_program_stores_together_have_one_form() -> None:
    experts = [f"b.0.mlp.experts.{n}.{kind}" for n in (0, 1) for kind in ("up", "down")]
    sizes = [size_of("b.0.q"), size_of("b.0.k"), *map(size_of, experts)]
    groups = [["b.0.q", "b.0.k"], *[[name] for name in experts]]
    alone = [[size.name] for size in sizes]
    assert forms.units_of(sizes, groups, "sparsellm") == alone
    ups, downs = experts[::2], experts[1::2]
    assert forms.units_of(sizes, groups, "llama.cpp") == [*alone[:2], ups, downs]
    assert forms.units_of(sizes, groups, "vllm") == [["b.0.q", "b.0.k"], experts]


def test_experts_have_no_packed_form() -> None:
    with pytest.raises(RecipeError, match=r"experts\.0\.\S+ is an expert, which the"):
        sized(mixtral().float(), "sparsellm", 6.0)
    result = sized(mixtral().float(), "sparsellm", 6.0, exclude=["*.experts.*"])
    assert result.bits_per_weight is not None


@pytest.mark.parametrize("program", ["llama.cpp", "vllm"])
def test_experts_that_are_stored_together_get_one_form(program: str) -> None:
    types = {x.name: x.values for x in sized(mixtral().float(), program, 6.0).linears}
    assert len({*types.values()}) > 1
    for block in range(2):
        inside = f"model.layers.{block}.mlp.experts."
        for kind in ("gate_proj", "up_proj", "down_proj"):
            of_kind = [
                values
                for name, values in types.items()
                if name.startswith(inside) and name.endswith(kind)
            ]
            assert len(of_kind) == 4
            assert len({*of_kind}) == 1
        if program == "vllm":
            of_all = {x for name, x in types.items() if name.startswith(inside)}
            assert len(of_all) == 1
